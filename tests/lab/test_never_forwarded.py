"""Leaders that have never forwarded, with real packets: a host that the operator has chosen, and firewalls at boot."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from test_mesh_scenarios import candidates, leader, world

from helpers import eventually
from helpers_load import measured_beside
from kilo_etcd.lab.client import Lab

pytestmark = [pytest.mark.lab, pytest.mark.deadline(300)]

REPLACED = 10.0
"""Seconds from a bad leader's taking the lead until packets flow; 2.3 on an idle machine."""

FIREWALLD = """table inet firewalld {
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    iifname "lo" accept
    ct state invalid drop
    reject with icmpx type admin-prohibited
  }
}"""


async def asked(lab: Lab, *arguments: str) -> tuple[int, Any]:
    done = await lab.kgctl(*arguments, "-o", "json", check=False)
    return done.returncode, json.loads(done.stdout)


async def test_a_host_that_does_not_forward_is_chosen_and_replaced_and_check_names_it() -> None:
    async with world({"gcp": 3, "home": 2}, labels={"gcp": "gcp", "home": "home"}, lease_ttl=30) as lab:
        members = await candidates(lab, "gcp", 3)
        first = await leader(lab, "gcp")
        chosen = next(name for name in members if name != first)
        other = next(name for name in members if name != chosen)
        # All others would be no better than the one that leads.
        for name in members:
            await lab.cut(name, "forwarding")

        async def named() -> bool:
            code, found = await asked(lab, "check")
            texts = [finding["text"] for finding in found if finding["severity"] == "error"]
            return code == 1 and any("does not forward: through it nothing arrives" in text for text in texts)

        await eventually(named, 30, every=0.5)
        now = await leader(lab, "gcp")
        away = next(name for name in members if name != now)
        code, found = await asked(lab, "explain", away, "home-2", "--live")
        assert code == 1
        said = [remark["text"] for remark in found["live"] if remark["node"] == now]
        assert any("through it nothing arrives" in text for text in said)
        assert any("the chain through of nftables table inet lab-cut (its policy is to drop)" in text for text in said)
        assert await leader(lab, "gcp") == now, "nobody is better, as each can see of itself"

        for name in members:
            if name != chosen:
                await lab.heal(name)
        await lab.all_pairs_ping(60, hosts=[other, "home-1", "home-2"])
        async with lab.probe(other, "home-2", interval=0.05) as probe, measured_beside() as machine:
            began = trio.current_time()
            await lab.kgctl("annotate", chosen, "leader=true", "--yes")
            await eventually(lambda: _was_elected(lab, other, chosen), 30, every=0.1)
            await eventually(lambda: _is_led_by_another(lab, chosen), REPLACED, every=0.1)
            await probe.flowing_again(REPLACED, after=trio.current_time() - began)
        assert probe.longest_gap < machine.allows(REPLACED), machine
        assert await leader(lab, "gcp") != chosen


async def _was_elected(lab: Lab, host: str, chosen: str) -> bool:
    return f"leader={chosen}" in await lab.log(host)


async def test_a_firewall_at_boot_is_named_and_opened_on_request() -> None:
    for options in ((), ("--forward-rules",)):
        async with world({"gcp": 2, "home": 1}, labels={"gcp": "gcp"}, agent_args=options) as lab:
            hosts = ["gcp-1", "gcp-2"]
            for host in hosts:
                await lab.power_off(host)
            for host in hosts:
                await lab.power_on(host, agent=False)
                await lab.exec(host, "nft", FIREWALLD, check=True)
            for host in hosts:
                await lab.start(host)
            if options:
                await lab.all_pairs_ping(60)
                rules = (await lab.exec("gcp-1", "nft", "list", "table", "inet", "firewalld", check=True)).stdout
                assert rules.count('comment "kilo-etcd:kilo0 ') == 2
                continue

            async def named() -> bool:
                code, found = await asked(lab, "check")
                remedies = [finding["remedy"] + finding["text"] for finding in found]
                return code == 1 and any("--zone=trusted --add-interface=kilo0" in remedy for remedy in remedies)

            await eventually(named, 40, every=0.5)
            await eventually(lambda: _says(lab, "in the chain filter_FORWARD of nftables table inet firewalld"), 30)
            # As soon as one of them can, it does; whether or not the other led, and stood behind everyone.
            bad = await leader(lab, "gcp")
            good = next(host for host in hosts if host != bad)
            await lab.exec(good, "nft", "delete", "table", "inet", "firewalld", check=True)
            await eventually(lambda: _pings(lab, bad, good), 60, every=0.5)  # noqa: B023
            assert await leader(lab, "gcp") == good


async def _is_led_by_another(lab: Lab, chosen: str) -> bool:
    return "demoted as leader" in await lab.log(chosen)


async def _says(lab: Lab, text: str) -> bool:
    return text in await lab.log("gcp-1") + await lab.log("gcp-2")


async def _pings(lab: Lab, *hosts: str) -> bool:
    return not await lab.missing_pings(*hosts, "home-1")
