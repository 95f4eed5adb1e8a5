"""An agent with `--ephemeral`: what it leaves in etcd, and when; and agents whose address was taken meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
from agent_world import World, running
from attrs import evolve

from helpers import eventually
from kilo_etcd import kernel
from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.kernel.state import Change, DeleteLink, HostAddress
from kilo_etcd.store.keys import Keys

pytestmark = pytest.mark.autojump
KEYS = Keys()


def written(world: World) -> list[str]:
    """What the agent has in etcd, under both prefixes."""
    return [*world.etcd.keys(KEYS.by("h1")), *world.etcd.keys(KEYS.status_by("h1"))]


@pytest.fixture(autouse=True)
def cleanup(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def removed(interface: str, *, public_key: str) -> tuple[Change, ...]:
        change = DeleteLink(interface)
        world.host.tamper([change])
        await trio.lowlevel.checkpoint()
        return (change,)

    monkeypatch.setattr(kernel, "cleanup", removed)


async def _at_once(work: Callable[[], Any]) -> Any:
    await trio.lowlevel.checkpoint()
    return work()


async def test_it_leaves_nothing_when_it_is_stopped(world: World) -> None:
    async with running(world, ephemeral=True):
        await eventually(lambda: KEYS.status("h1") in written(world), 30)
        assert {world.etcd.leases()[world.etcd.data[key.encode()].lease] for key in written(world)} == {5}
        await trio.sleep(3600)
        assert KEYS.node("h1") in written(world)
    assert written(world) == []
    assert world.host.observed.link is None, "the address may be another's from now on"
    assert world.logged("kernel_state=removed") == 1


async def test_a_host_that_is_not_ephemeral_stays_a_member(world: World) -> None:
    async with running(world):
        await eventually(lambda: KEYS.status("h1") in written(world), 30)
    assert {KEYS.node("h1"), KEYS.reservation("h1")} < set(written(world))
    assert world.host.observed.link is not None, "the kernel keeps what it has"


async def test_it_joins_again_after_etcd_was_away_for_longer_than_its_lease(world: World) -> None:
    async with running(world, ephemeral=True) as daemon:
        await eventually(lambda: KEYS.status("h1") in written(world), 30)
        (before,) = daemon.session.addresses
        world.client.cut()
        await eventually(lambda: written(world) == [], 30)
        assert world.host.observed.link is not None
        await trio.sleep(60)
        world.etcd.put(KEYS.address("other", before), "")
        world.etcd.put_kept(KEYS.reservation("other"), "")
        world.client.mend()
        await eventually(lambda: KEYS.status("h1") in written(world) and daemon.session.healthy, 60)
        (now,) = daemon.session.addresses
        assert now != before
        assert KEYS.address("h1", now) in written(world)
        await eventually(lambda: {each.ip for each in world.host.observed.addresses} == {now}, 30)
        assert world.metrics.health() is None
        assert world.logged("another writer") == 0


async def test_it_goes_by_no_cached_snapshot_whose_addresses_may_be_others(world: World, tmp_path: Path) -> None:
    disk = Disk(tmp_path, run=_at_once)
    async with running(world, disk=disk, ephemeral=True):
        await trio.sleep(60)
    assert disk.path.exists()
    world.etcd.down()
    async with running(world, disk=disk, ephemeral=True, joined=False) as daemon:
        await trio.sleep(600)
        assert daemon.snapshots.cached is None
        assert world.logged("the cached snapshot is in force") == 0
        world.etcd.up()
        await eventually(lambda: KEYS.status("h1") in written(world), 60)


async def test_a_host_whose_address_was_taken_while_it_was_away_says_whose_it_is(world: World, tmp_path: Path) -> None:
    """Nothing is left of it in etcd: its own cached snapshot tells what it had."""
    disk = Disk(tmp_path, run=_at_once)
    async with running(world, disk=disk) as daemon:
        (before,) = daemon.session.addresses
        await trio.sleep(60)
    for key in written(world):
        world.etcd.delete(key)
    async with running(world, disk=disk) as daemon:
        await eventually(lambda: daemon.session.addresses == (before,), 30)
        await trio.sleep(60)
    for key in written(world):
        world.etcd.delete(key)
    world.etcd.put(KEYS.address("taker", before), "")
    world.etcd.put_kept(KEYS.reservation("taker"), "")
    async with running(world, disk=disk) as daemon:
        await eventually(lambda: daemon.session.addresses not in ((), (before,)), 30)
        assert world.logged("the mesh address of before is another's now; another one is chosen") == 1


async def test_a_reservation_that_somebody_put_over_is_under_its_lease_again(world: World) -> None:
    async with running(world):
        key = KEYS.reservation("h1")
        world.etcd.put(key, "")
        await eventually(lambda: key in world.etcd and world.etcd.data[key.encode()].lease, 30)
        await eventually(lambda: world.metrics.health() is None, 30)
        assert world.logged("another writer deleted the claim of this host's mesh address; restored") == 1


async def test_an_agent_that_finds_no_address_any_more_goes_on_and_registers_what_changed_when_one_is_free(
    world: World,
) -> None:
    subnets = (ip_network("10.4.0.0/30"),)
    async with running(world, subnets=subnets, forget_after=120) as daemon:
        world.client.cut()
        await eventually(lambda: KEYS.reservation("h1") not in world.etcd, 600)
        for number, name in enumerate(("b", "c"), 1):
            world.etcd.put(KEYS.address(name, ip_address(f"10.4.0.{number}")), "")
            world.etcd.put_kept(KEYS.reservation(name), "")
        world.client.mend()
        await eventually(lambda: "no address is left for h1" in (daemon.session.last_error or ""), 120)
        moved = HostAddress(interface="eth0", index=2, address=ip_interface("192.168.1.9/24"))
        world.facts = evolve(world.facts, addresses=(moved,))
        await eventually(lambda: world.logged("the changed record is not registered yet") == 1, 120)
        assert world.metrics.health() is not None
        world.etcd.delete(KEYS.address("b", ip_address("10.4.0.1")))
        await eventually(lambda: daemon.session.healthy, 2000)
        assert daemon.session.addresses == (ip_address("10.4.0.1"),)
        await eventually(lambda: b"192.168.1.9" in world.value(KEYS.node("h1")), 120)
