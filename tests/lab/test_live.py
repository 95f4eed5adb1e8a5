"""What hosts say when they are asked, with real agents: `kgctl status --live`, `graph`, `explain --live`, `check`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]


async def read(lab: Lab, *arguments: str) -> Any:
    return json.loads((await lab.kgctl(*arguments, "-o", "json", check=False)).stdout)


async def test_a_broken_kernel_is_seen_and_mended_and_a_dead_tunnel_is_red() -> None:
    require("etcd", "etcdctl", "wireguard-go", "ip", "nft", "iptables", "circo")
    # Without probers: a broken leader would not lead for long.
    spec = Spec.simple({"gcp": 2, "home": 2}, labels={"gcp": "gcp"}, agent_args=("--probe", "off"))
    async with running_lab(spec) as lab:
        await lab.all_pairs_ping(60)
        await lab.kgctl("wait")

        async def well() -> bool:
            found = await read(lab, "check")
            return {finding["severity"] for finding in found} <= {"note"}

        await eventually(well, 60, every=0.5)
        report = await read(lab, "status", "--live")
        assert (report["live"]["tunnels"], report["live"]["up"], report["live"]["silent"]) == (1, 1, [])
        leaders = {row["location"]: row["leader"] for row in report["locations"]}
        one, other = leaders["gcp"], leaders[""]
        peer = next(kernel for kernel in report["live"]["kernels"] if kernel["name"] == one)["tunnels"]
        assert [(tunnel["other"], tunnel["received"] > 0) for tunnel in peer] == [(other, True)]
        assert 'color="#2e7d32"' in (await lab.kgctl("graph")).stdout
        assert 'color="#2e7d32"' not in (await lab.kgctl("graph", "--plain")).stdout

        # A change of WireGuard by hand makes no event; it is found all the same, whether or not somebody asks.
        key = (await lab.exec(one, "wg", "show", "kilo0", "peers", check=True)).stdout.split()[0]
        await lab.exec(one, "wg", "set", "kilo0", "peer", key, "remove", check=True)

        async def mended() -> bool:
            return key in (await lab.exec(one, "wg", "show", "kilo0", "peers", check=True)).stdout

        await eventually(mended, 20, every=0.1)

        async def works() -> bool:
            return bool((await read(lab, "explain", one, other, "--live"))["works"])

        await eventually(works, 60, every=0.2)

        # The firewall of one end stops WireGuard: with no session left, the edge is red, and it is said which port.
        await lab.exec(other, "sh", "-c", "nft add table inet x; nft add chain inet x i '{ type filter hook input "
                       "priority -200; }'; nft add rule inet x i udp dport 51820 drop", check=True)  # fmt: skip
        for host, keys in (
            (one, [key]),
            (other, (await lab.exec(other, "wg", "show", "kilo0", "peers")).stdout.split()),
        ):
            for each in keys:
                await lab.exec(host, "wg", "set", "kilo0", "peer", each, "remove", check=True)

        async def red() -> bool:
            return 'color="#c62828"' in (await lab.kgctl("graph")).stdout

        await eventually(red, 60, every=0.2)

        async def named() -> bool:
            pair = " - ".join(sorted((one, other)))
            found = [finding for finding in await read(lab, "check") if finding["subject"] == pair]
            return [each["severity"] for each in found] == ["error"] and "UDP 198.51.100.1:51820" in found[0]["remedy"]

        # While its agent has just started it is too early to tell.
        await eventually(named, 20, every=0.5)
        await lab.exec(one, "iptables", "-P", "FORWARD", "DROP", check=True)
        texts = [finding["text"] for finding in await read(lab, "check")]
        assert any("in iptables' chain FORWARD (its policy is to drop)" in text for text in texts)
        # Nothing of the requests is left.
        kept = (await lab.etcdctl("get", "--prefix", "--keys-only", "/kilo-status/")).stdout.split()
        assert sorted(kept) == [f"/kilo-status/by/{host}/status" for host in sorted(lab.hosts)]
