"""Hosts of one location that do not reach each other at their internal IPs, with real packets; and networks that filter
what agents ask by."""

from __future__ import annotations

import json

import pytest

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(240)]


async def findings(lab: Lab) -> tuple[int, list[dict[str, str]]]:
    """The exit status of `kgctl check`, and what it finds."""
    done = await lab.kgctl("check", "-o", "json", check=False)
    return done.returncode, json.loads(done.stdout)


async def test_three_sites_without_labels_are_told_apart_and_nothing_leaves_in_clear() -> None:
    require("etcd", "etcdctl", "wireguard-go", "ip", "nft")
    async with running_lab(Spec.simple({"one": 1, "two": 1, "three": 1})) as lab:
        seen: list[tuple[int, list[dict[str, str]]]] = []

        async def registered() -> bool:
            done = await lab.kgctl("status", "-o", "json", check=False)
            return done.returncode == 0 and len(json.loads(done.stdout)["nodes"]) == len(lab.hosts)

        async def told() -> bool:
            seen.append(await findings(lab))
            return [one["text"] for one in seen[-1][1] if one["severity"] == "error"] == [
                "one-1, three-1, two-1 have never answered each other at their internal IPs"
            ]

        # A mesh of one host is well.
        await eventually(registered, 30, every=0.1)
        await eventually(told, 60, every=0.2)
        (cause,) = (one for one in seen[-1][1] if one["severity"] == "error")
        assert "label them apart (kgctl location set NODE NAME" in cause["remedy"]
        # Before the cause is known nothing else is blamed, and nothing is called well.
        for code, result in seen:
            assert code == 1, result
            told_too_much = ("firewall", "does not reach", "do not reach", "no echo request")
            assert not [one for one in result if any(text in str(one.values()) for text in told_too_much)], result
        mesh = [str(await lab.mesh_address(host)) for host in lab.hosts]
        async with lab.capture("one-1") as one, lab.capture("two-1") as two, lab.capture("three-1") as three:
            assert len(await lab.missing_pings()) == 6
        for flow in (*one.flows, *two.flows, *three.flows):
            assert flow.protocol != "ipip", flow
            assert flow.source not in mesh, flow
            assert flow.destination not in mesh, flow
        explained = await lab.kgctl("explain", "one-1", "two-1", "--live", check=False)
        assert explained.returncode == 1
        assert (
            "dropped on the way there: two-1 does not answer one-1 at its internal IP 10.102.0.11" in explained.stdout
        )
        status = (await lab.kgctl("status")).stdout
        assert "two-1 has never answered one-1" in status.replace(", its leader,", "")
        metric = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:1107/metrics').read().decode())"
        assert "kilo_unreachable_members 2.0" in (await lab.exec("one-1", "python3", "-c", metric, check=True)).stdout

        # The remedy, without a restart.
        for host in lab.hosts:
            await lab.kgctl("location", "set", host, host.partition("-")[0], "--yes")
        await lab.all_pairs_ping(30)

        async def well() -> bool:
            document = json.loads((await lab.kgctl("check", "-o", "json", check=False)).stdout)
            return {finding["severity"] for finding in document} <= {"note"}

        await eventually(well, 60, every=0.5)
        assert (await lab.kgctl("explain", "one-1", "two-1", "--live")).returncode == 0


async def test_a_location_whose_network_filters_icmp_and_udp_1107_works_and_so_does_a_restart() -> None:
    require("etcd", "etcdctl", "wireguard-go", "ip", "nft")
    lan = SiteSpec(name="lan", hosts=tuple(HostSpec(name=f"lan-{i}", public=i == 1, label="lan") for i in range(1, 4)))
    far = SiteSpec(name="far", hosts=(HostSpec(name="far-1", public=True, label="far"),))
    spec = Spec(sites=(lan, far), agents=False)
    async with running_lab(spec) as lab:
        for host in lab.hosts:
            # The mesh's own pings, which are plain on the LAN, pass. At their internal IPs lan-1 still answers echo
            # requests, lan-2 queries, and lan-3 nothing but ARP.
            rules = {"lan-1": ["udp dport 1107"], "lan-2": ["icmp type echo-request"]}.get(
                host, ["udp dport 1107", "icmp type echo-request"]
            )
            text = "table inet filtered { chain input { type filter hook input priority -10;\n"
            text += "\n".join(f'iifname "eth0" ip daddr != 10.4.0.0/16 {rule} drop' for rule in rules) + "\n}\n}\n"
            await lab.exec(host, "nft", "-f", "-", input=text, check=True)
        for host in lab.hosts:
            await lab.start(host)
        await lab.all_pairs_ping(60)
        completed = await lab.kgctl("check", check=False)
        assert "never answered" not in completed.stdout
        async with lab.probe("lan-3", "far-1") as out, lab.probe("lan-3", "lan-2") as near:
            runs = await elections(lab, "lan-3")
            await lab.reload("lan-3")
            await eventually(lambda: _more(lab, "lan-3", runs), 30, every=0.2)
            runs = await elections(lab, "lan-3")
            await lab.kill("lan-3")
            await lab.start("lan-3")
            await eventually(lambda: _more(lab, "lan-3", runs), 30, every=0.2)
        assert (out.lost, near.lost) == (0, 0)


async def elections(lab: Lab, host: str) -> int:
    """How often a host's agent has said who leads: each run of it does so once at least."""
    return (await lab.log(host)).count("leader elected")


async def _more(lab: Lab, host: str, before: int) -> bool:
    return await elections(lab, host) > before
