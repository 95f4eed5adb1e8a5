"""Clocks that go back, in a simulated world whose WireGuards drop replays: who sends is answered before long."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from simulation import Shape, World, in_memory, seeded
from simulation.clockwork import freezable
from simulation.sessions import Sessions

pytestmark = pytest.mark.autojump

DAY = 86400.0
OVERDUE = 170.0
"""Seconds after which a session that works has been renewed if anybody uses it."""
LATE = 30.0
"""Seconds within which a pair works again at the latest, beyond the session's age at which it should be made anew."""


@asynccontextmanager
async def sending(*, granularity: str, sites: tuple[int, ...]) -> AsyncIterator[tuple[World, Sessions]]:
    """A world in which a-1 sends to the other sites, with sessions that work."""
    with seeded(1), in_memory(), freezable():
        async with trio.open_nursery() as nursery:
            world = World(1, nursery, shape=Shape(sites=sites, granularity=granularity), disks=None)
            sessions = world.network.sessions = Sessions(world)
            for host in world.members():
                host.start()
            await trio.sleep(30)
            sessions.senders = {("a-1", "b-1"), ("a-1", "c-1")}
            nursery.start_soon(sessions.send)
            yield world, sessions
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("granularity", "sites"), [("full", (1, 1, 1)), ("location", (1, 2, 1))])
@pytest.mark.parametrize("case", ["it runs on", "it boots", "it boots while etcd is away", "the others start again"])
async def test_a_host_whose_clock_goes_back_is_answered_before_long(
    case: str, granularity: str, sites: tuple[int, ...]
) -> None:
    async with sending(granularity=granularity, sites=sites) as (world, sessions):
        host, others = world.hosts["a-1"], (world.hosts["b-1"], world.hosts["c-1"])
        host.wall = DAY
        await trio.sleep(200)
        assert not sessions.down_since
        host.wall = 0.0
        if "boots" in case:
            host.power_off()
            sessions.lost("a-1")
            if "etcd" in case:
                world.etcd.down()
            await trio.sleep(5)
            host.condition.powered = True
            world.start(host)
        if case == "the others start again":
            await trio.sleep(40)
            for other in others:
                other.kill()
                await trio.sleep(1)
                world.start(other)
        if "etcd" in case:
            await trio.sleep(60)
            world.etcd_up()
        sessions.cut.clear()
        await trio.sleep(OVERDUE + LATE)
        for _ in range(8):
            assert not sessions.down_since, f"handshakes that were dropped: {sessions.dropped}"
            await trio.sleep(50)
        assert not [age for *_, age in sessions.cut if age < OVERDUE - 1], sessions.cut
