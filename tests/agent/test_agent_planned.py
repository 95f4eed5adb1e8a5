"""What an operator does on purpose, to six agents in virtual time: how often leadership moves, what is written."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from simulation import KEYS, Shape, SimulatedHost, World, in_memory, seeded

from helpers import eventually
from kilo_etcd.runtime.logs import setup_logging
from kilo_etcd.topology.segments import build_topology

pytestmark = pytest.mark.autojump

LEADER_1, LEADER_2, LEADER_3 = (KEYS.annotation(f"a-{number}", "leader") for number in (1, 2, 3))
HOSTS = ("a-1", "a-2", "a-3", "b-1", "b-2", "c-1")


@pytest.fixture(autouse=True)
def _hosts_in_memory() -> Iterator[None]:
    setup_logging("info", stream=io.StringIO())
    with seeded(7), in_memory():
        yield


class Watched(World):
    """The world, and who has led location a, as host b-1 saw it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(7, nursery, shape=Shape(sites=(3, 2, 1)))
        self.led: list[str] = []

    async def look(self) -> None:
        agent = self.hosts["b-1"].agent
        assert agent is not None
        snapshot = None
        while True:
            snapshot = await agent.mirror.wait_newer(snapshot)
            (segment,) = (value for value in build_topology(snapshot).segments.values() if value.location == "a")
            if self.led[-1:] != [segment.leader.name]:
                self.led.append(segment.leader.name)

    def queue(self) -> list[str]:
        """The candidates of a, oldest first."""
        kvs = [kv for key, kv in self.etcd.data.items() if key.decode().endswith("/elections/a")]
        return [kv.key.decode().split("/")[3] for kv in sorted(kvs, key=lambda kv: kv.create_revision)]

    def written(self) -> dict[str, int]:
        return {name: len(host.machine.history) for name, host in self.hosts.items()}


@asynccontextmanager
async def at_rest() -> AsyncIterator[Watched]:
    """Six hosts at locations a, b and c; the queue of a is a-1, a-2, a-3."""
    async with trio.open_nursery() as nursery:
        world = Watched(nursery)
        for name in HOSTS:
            world.etcd.put(KEYS.location(name), name[0])
        for host in world.hosts.values():
            host.start()
            await trio.sleep(1)
        await eventually(world.at_rest, 60, every=0.5)
        await trio.sleep(10)
        world.nursery.start_soon(world.look)
        await eventually(lambda: world.led == ["a-1"], 10)
        assert world.queue() == ["a-1", "a-2", "a-3"]
        yield world
        nursery.cancel_scope.cancel()


def _is_gone(host: SimulatedHost) -> bool:
    return host.agent is None


async def test_annotating_the_leader_changes_nothing() -> None:
    async with at_rest() as world:
        written = world.written()
        for wanted in (True, False):
            if wanted:
                world.etcd.put(LEADER_1, "true")
            else:
                world.etcd.delete(LEADER_1)
            await trio.sleep(20)
            assert world.led == ["a-1"]
            assert world.queue() == ["a-1", "a-2", "a-3"]
        assert world.written() == written


@pytest.mark.parametrize("first", ["taken away", "given"])
async def test_an_annotation_that_moves_hands_leadership_over_once(first: str) -> None:
    async with at_rest() as world:
        world.etcd.put(LEADER_1, "true")
        await trio.sleep(10)
        for source, target, leader in ((LEADER_1, LEADER_3, "a-3"), (LEADER_3, LEADER_2, "a-2")):
            world.led.clear()
            if first == "given":
                world.etcd.put(target, "true")
            world.etcd.delete(source)
            await trio.sleep(0.5)  # an operator's two commands
            if first != "given":
                world.etcd.put(target, "true")
            await trio.sleep(20)
            # The first entry is who led before.
            assert world.led in ([leader], [world.led[0], leader])
            assert world.led[-1] == leader


async def test_a_member_that_reboots_is_no_business_of_any_other_kernel() -> None:
    async with at_rest() as world:
        others = {name: count for name, count in world.written().items() if name != "a-3"}
        revision = world.etcd.revision
        world.hosts["a-3"].power_off()
        await trio.sleep(20)
        assert world.queue() == ["a-1", "a-2"], "its lease has ended"
        world.hosts["a-3"].start()
        await eventually(lambda: world.queue() == ["a-1", "a-2", "a-3"], 30)
        await eventually(world.at_rest, 60, every=0.5)
        # The others have seen it go and come, and had nothing to write.
        assert world.etcd.revision > revision
        assert {name: count for name, count in world.written().items() if name != "a-3"} == others
        assert world.led == ["a-1"]


@pytest.mark.parametrize("away", ["killed", "stopped"])
async def test_an_agent_that_restarts_writes_to_no_kernel_but_where_leadership_moves(away: str) -> None:
    async with at_rest() as world:
        for name in ("a-3", "c-1", "a-1"):
            written = world.written()
            host = world.hosts[name]
            if away == "killed":
                host.kill()
            else:
                host.stop()
            await eventually(partial(_is_gone, host), 10)
            host.start()
            await trio.sleep(10)
            if (away, name) == ("stopped", "a-1"):
                assert world.led == ["a-1", "a-2"]
                assert world.queue() == ["a-2", "a-3", "a-1"]
            else:
                assert world.led == ["a-1"]
                assert world.written() == written, name
