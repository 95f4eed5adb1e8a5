"""Scenarios a to g on the kernel's own WireGuard, in one world that is led from shape to shape; and an exit node.

Not collected by itself: `test_mesh_kernel.py` runs it where a kernel has WireGuard, on this machine or in a guest. A
guest has one slow processor for six hosts and etcd, so its clocks are wider than those of `test_mesh_scenarios.py`.
"""

from __future__ import annotations

import pytest
from test_exit_node import MESH6, in_an_ipv6_mesh
from test_mesh_scenarios import (
    LEASE_SLACK,
    SHORT,
    _is_leader,
    candidates,
    check_routers,
    clear_text,
    leader,
    pids,
    world,
)

from helpers import eventually
from helpers_lab import statuses
from helpers_load import lease_for, measured_beside
from kilo_etcd.lab.client import Lab

pytestmark = [pytest.mark.lab, pytest.mark.deadline(1000)]

WITHIN = 30
"""Seconds for all pairs to ping after a change."""


async def label(lab: Lab, **labels: str) -> None:
    """Put labels with the real etcdctl (`home_1` is home-1), and wait until each host's agent has followed."""
    wanted = {host.replace("_", "-"): text for host, text in labels.items()}
    for host, text in wanted.items():
        await lab.etcdctl(*(("put", f"/kilo/locations/{host}", text) if text else ("del", f"/kilo/locations/{host}")))

    async def followed() -> bool:
        reports = await statuses(lab)
        return all(reports[host].get("location", "") == text for host, text in wanted.items())

    await eventually(followed, WITHIN, every=0.2, what=f"{wanted} followed")


async def handshakes(lab: Lab, host: str) -> int:
    """The number of peers that `host` has shaken hands with."""
    shaken = (await lab.exec(host, "wg", "show", "kilo0", "latest-handshakes", check=True)).stdout.split()
    return sum(int(value) > 0 for value in shaken[1::2])


async def test_a_to_g() -> None:
    lease = lease_for(3)
    async with world(wireguard="kernel", lease_ttl=lease) as lab:
        before = await pids(lab)
        # The devices are the kernel's, and no userspace WireGuard runs.
        for host in lab.hosts:
            shown = (await lab.exec(host, "ip", "-d", "link", "show", "kilo0", check=True)).stdout
            assert " wireguard " in shown, shown

        # a: logical groups. Only the two leaders talk.
        leaders = {await leader(lab, "gcp"), await leader(lab, "")}
        assert {host: await handshakes(lab, host) for host in lab.hosts} == {
            host: int(host in leaders) for host in lab.hosts
        }
        await check_routers(lab, "gcp", "home")

        # f: a live host moves, and its pings go on.
        mover = (await candidates(lab, "", 3))[-1]
        target = (await candidates(lab, "gcp", 3))[-1]
        async with lab.probe(mover, target) as probe, measured_beside() as machine:
            await label(lab, **{mover.replace("-", "_"): "edge"})
            await probe.flowing_again(WITHIN)
        assert probe.longest_gap < machine.allows(SHORT), machine
        await lab.all_pairs_ping(WITHIN)

        # c: gcp grouped, the others by their own names.
        await label(lab, home_1="home-1", home_2="home-2", home_3="home-3")
        await lab.all_pairs_ping(WITHIN)

        # d: two clouds grouped, the rest by name.
        await label(lab, home_1="aws", home_2="aws")
        await lab.all_pairs_ping(WITHIN)
        assert await leader(lab, "aws") in ("home-1", "home-2")

        # b: full mesh; nothing between hosts in clear, on the private networks neither.
        rows = await lab.status()
        private = {ip.partition("/")[0] for row in rows for ip in (*row.private, *row.public)}
        async with lab.probe(mover, target) as probe, measured_beside() as machine:
            await lab.etcdctl("put", "/kilo/mesh/granularity", "full")
            await eventually(lambda: _shaken(lab, 5), WITHIN, every=0.5, what="five tunnels on each host")
            await probe.flowing_again(WITHIN)
        assert probe.longest_gap < machine.allows(SHORT), machine
        async with lab.capture("router:gcp") as gcp, lab.capture("router:home") as home:
            await lab.all_pairs_ping(WITHIN)
        assert len(gcp.flows) > 0
        assert clear_text((*gcp.flows, *home.flows), private) == []

        # e: cross, in which hosts of one location talk directly.
        await label(lab, home_1="", home_2="", home_3="")
        await lab.etcdctl("put", "/kilo/mesh/granularity", "cross")
        await eventually(lambda: _peers(lab, 3), WITHIN, every=0.5, what="three tunnels on each host")
        await lab.all_pairs_ping(WITHIN)
        await lab.etcdctl("put", "/kilo/mesh/granularity", "location")
        await lab.all_pairs_ping(WITHIN)
        assert await pids(lab) == before
        await check_routers(lab, "gcp", "home")

        # g: the leader's host crashes, the next in line leads, and the first does not take it back.
        first, second, third = await candidates(lab, "", 3)
        async with lab.probe(third, target) as probe, measured_beside() as machine:
            await lab.power_off(first)
            await eventually(lambda: _is_leader(lab, second), WITHIN, every=0.1)
            await probe.flowing_again(WITHIN)
        assert 0 < probe.longest_gap < machine.allows(lease + 1 + LEASE_SLACK), machine
        # It comes back as somebody new.
        assert await candidates(lab, "", 2) == [second, third]
        await lab.power_on(first)
        assert await candidates(lab, "", 3) == [second, third, first]
        assert await leader(lab, "") == second
        await lab.all_pairs_ping(WITHIN)


async def test_nothing_leaks_past_an_exit_node() -> None:
    await in_an_ipv6_mesh(MESH6.evolve(wireguard="kernel"), WITHIN)


async def _shaken(lab: Lab, number: int) -> bool:
    return all([await handshakes(lab, host) >= number for host in lab.hosts])


async def _peers(lab: Lab, number: int) -> bool:
    counts = [(await lab.exec(host, "wg", "show", "kilo0", "peers", check=True)).stdout.split() for host in lab.hosts]
    return all(len(peers) == number for peers in counts)
