"""`--encapsulate` with real packets: four locations, each in a mode of its own, behind routers that drop strangers.

Not collected by itself: `test_encapsulate.py` runs it with WireGuard in userspace and no IPIP, where it is seen what
does not work and what is said about it, and on a kernel that has both.

    near    always       one host beside the leader, one on another subnet
    far     crosssubnet  one host beside the leader, one on another subnet
    plain   never        one host beside the leader, one on another subnet, which it cannot reach
    sealed  wireguard    the other host on another subnet
"""

from __future__ import annotations

import json
import os
import re
from itertools import permutations

import pytest

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(1000)]

IPIP = os.environ.get("KILO_HAS_IPIP") is not None
WITHIN = 60 if IPIP else 30
"""Seconds; a kernel with IPIP may be a guest's, which is slow."""


def site(name: str, number: int, mode: str, *subnets: int) -> SiteSpec:
    """Hosts `<name>-1`, ... in the given subnets; the first is public and leads."""
    return SiteSpec(
        name=name,
        subnets=tuple(f"10.{100 + number}.{lan}.0/24" for lan in range(max(subnets) + 1)),
        strict=True,
        hosts=tuple(
            HostSpec(
                name=f"{name}-{k}", public=k == 1, label=name, subnet=lan,
                # A slow machine must not make a leader seem not to forward, and another host lead.
                args=("--encapsulate", mode, "--probe", "off"),
            )
            for k, lan in enumerate(subnets, 1)
        ),
    )  # fmt: skip


SPEC = Spec(
    wireguard="kernel" if IPIP else "userspace",
    open=True,
    sites=(
        site("near", 1, "always", 0, 0, 1),
        site("far", 2, "crosssubnet", 0, 0, 1),
        site("plain", 3, "never", 0, 0, 1),
        site("sealed", 4, "wireguard", 0, 1),
    ),
)
LOST = {"plain-3"} if IPIP else {"plain-3", "far-3", "near-2", "near-3"}
"""Hosts that nobody can reach: `never` across subnets; and without IPIP all that would be encapsulated."""


async def errors(lab: Lab, host: str) -> str:
    report = json.loads((await lab.kgctl("status", "-o", "json")).stdout)
    return "\n".join(remark["text"] for remark in report["errors"] if remark["subject"] == host)


async def test_each_mode() -> None:
    require("etcd", "etcdctl", "wg", "nft", "ip", *(() if IPIP else ("wireguard-go",)))
    async with running_lab(SPEC) as lab:
        expected = {pair for pair in permutations(lab.hosts, 2) if LOST & set(pair)}

        async def as_expected() -> bool:
            missing = set(await lab.missing_pings())
            assert missing == expected, f"too many: {missing - expected}, too few: {expected - missing}"
            return True

        try:
            await eventually(as_expected, WITHIN, every=0.2, what=f"all pairs but those of {sorted(LOST)}")
        except AssertionError as error:
            logs = [f"{host}:\n{await lab.log(host)}" for host in lab.hosts if host.startswith("plain")]
            candidacies = (await lab.etcdctl("get", "--prefix", "/kilo/by/")).stdout
            pytest.fail("\n".join((str(error), candidacies, *logs)))

        # What cannot work is said where it cannot, by the agent and by kgctl, and nothing is said elsewhere.
        said = {host: await errors(lab, host) for host in lab.hosts}
        assert (
            "node plain-3 cannot be reached in IPv4 inside the location: 10.103.1.11 is not within" in said["plain-1"]
        )
        assert "use encapsulate crosssubnet or wireguard" in said["plain-1"]
        assert "node plain-1 cannot be reached" in said["plain-3"]
        assert "node plain-3 cannot be reached" in await lab.log("plain-1")
        silent = {"sealed-1", "sealed-2"}
        if IPIP:
            silent |= {"near-1", "near-2", "near-3", "far-1", "far-2", "far-3"}
        else:
            for host in ("near-1", "near-2", "near-3", "far-1", "far-2", "far-3"):
                assert "this kernel has no IPIP (module ipip)" in said[host], host
                assert "this kernel has no IPIP (module ipip)" in await lab.log(host)
        assert {host for host in silent if said[host]} == set()

        await check_wires(lab)
        if IPIP:
            await check_mtu(lab)
            await check_spoofed(lab)


async def check_wires(lab: Lab) -> None:
    """What is seen on the location's own network when its hosts ping each other."""
    for one, other, kind in (
        ("near-1", "near-2", "ipip" if IPIP else None),
        ("near-2", "near-3", "ipip" if IPIP else None),
        ("far-1", "far-2", "icmp"),
        ("far-1", "far-3", "ipip" if IPIP else None),
        ("sealed-1", "sealed-2", "udp"),
        ("plain-1", "plain-2", "icmp"),
    ):
        if kind is None:
            continue
        async with lab.capture(other) as capture:
            assert await lab.ping(one, other, timeout=5)
        # The echo itself, by mesh or by internal addresses; etcd's traffic apart.
        kinds = {
            flow.protocol
            for flow in capture.flows
            if flow.protocol not in ("arp", "tcp", "icmpv6") and (flow.protocol != "udp" or flow.between(51820))
        }
        if kind != "udp":
            kinds.discard("udp")  # the warm tunnels of standbys
        assert kinds == {kind}, (one, other, kinds)
    # Nothing has passed a router by an address that is no host's, not even where there is no way to the mesh.
    refused = await lab.exec("plain-3", "ping", "-c", "1", "-W", "1", str(await lab.mesh_address("sealed-1")))
    assert "No route to host" in refused.stderr, refused
    for name in ("near", "far", "plain", "sealed"):
        assert (await lab.counters(name))["stray"].packets == 0, name


async def check_mtu(lab: Lab) -> None:
    """The largest packet that a host's tunnel takes passes on every pair, with don't-fragment."""
    reached = [host for host in lab.hosts if host not in LOST]
    width = {
        host: int((await lab.exec(host, "cat", "/sys/class/net/kilo0/mtu", check=True)).stdout) for host in reached
    }
    assert {width["near-1"], width["near-3"], width["far-1"], width["far-3"]} == {1400}  # 1500 - 80 - 20
    assert {width["sealed-1"], width["sealed-2"]} == {1420}
    for one, other in permutations(reached, 2):
        address = await lab.mesh_address(other)
        done = await lab.exec(
            one, "ping", "-c", "1", "-w", "30", "-M", "do", "-s", str(width[one] - 28), str(address), check=False
        )  # fmt: skip
        assert done.returncode == 0, (one, other, width[one], done.stdout)


async def check_spoofed(lab: Lab) -> None:
    """IPIP from a host that is not of the location is dropped, whatever it carries."""
    target = next(row for row in await lab.status() if row.host == "near-1")
    private, mesh = target.private[0].partition("/")[0], await lab.mesh_address("near-1")
    before = await dropped(lab, "near-1")
    # near-2 is a node; under an address that no record has it is a stranger on the same network.
    script = (
        "ip address add 10.101.0.99/24 dev eth0 && "
        f"ip link add spoof type ipip local 10.101.0.99 remote {private} && ip link set spoof up && "
        f"ping -c 1 -W 1 -I spoof {mesh}; ip link del spoof; ip address del 10.101.0.99/24 dev eth0"
    )
    await lab.exec("near-2", "sh", "-c", script, check=False)
    assert await dropped(lab, "near-1") > before


async def dropped(lab: Lab, host: str) -> int:
    printed = (await lab.exec(host, "nft", "list", "counter", "inet", "kilo", "ipip_dropped", check=True)).stdout
    match = re.search(r"packets (\d+)", printed)
    assert match is not None, printed
    return int(match[1])
