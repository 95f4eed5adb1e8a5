"""An agent that starts under another name than before, and agents with one key."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest
import trio
from agent_world import World, running

from helpers import eventually
from kilo_etcd.etcd.api import Compare, Delete, Op, PermissionDenied, TxnResult
from kilo_etcd.model import EncryptionStage, Endpoint
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import NodeRecord, StatusRecord, decode_node, decode_status, encode
from kilo_etcd.testing.fake_etcd import FakeClient

pytestmark = pytest.mark.autojump
KEYS = Keys()
STAGE = EncryptionStage.SENDS


def errors(world: World, name: str) -> tuple[str, ...]:
    value = world.etcd.get(KEYS.status(name))
    return () if value is None else decode_status(value).errors


def place(world: World, name: str) -> str:
    return decode_status(world.value(KEYS.status(name))).location


async def reported(world: World, name: str) -> None:
    """The host has joined and applied a plan."""
    await eventually(
        lambda: decode_status(world.value(KEYS.status(name))).revision > 0 if KEYS.status(name) in world.etcd else 0,
        10,
        every=0.1,
    )


@pytest.mark.parametrize("name", ["h1.example.net", "H1", "h1-new"])
async def test_a_host_with_another_name_goes_on_as_the_node_that_it_was(world: World, name: str) -> None:
    world.etcd.put(KEYS.location("h1"), "gcp")
    world.etcd.put(KEYS.annotation("h1", "leader"), "true")
    world.etcd.put(KEYS.node("h2"), encode(NodeRecord(public_key="B" + "A" * 42 + "=")))
    world.etcd.put(KEYS.annotation("h2", "exit-node"), "h1")
    world.etcd.put(KEYS.address("h2", ip_address("10.4.0.2")), "")
    async with running(world) as daemon:
        await reported(world, "h1")
        addresses = daemon.session.addresses
    kernel = world.host.observed.addresses, dict(world.host.observed.peers)
    async with running(world, hostname=name) as daemon:
        await reported(world, name)
        assert place(world, name) == "gcp"
        assert daemon.session.addresses == addresses
        assert (world.host.observed.addresses, dict(world.host.observed.peers)) == kernel
        assert world.etcd.keys("/kilo/by/h1/") == world.etcd.keys("/kilo-status/by/h1/") == []
        assert world.logged("this host was renamed; what its former name had in etcd is its own now") == 1
        says = (
            "this host was called h1, and these are still for that name: the label, annotation leader, annotation "
            f"exit-node of h2; kgctl node rename h1 {name} moves them; the label counts until then, annotations do not"
        )
        await eventually(lambda: errors(world, name) == (says,), 10, every=0.1)
        assert world.logged(says) == 1
    # The next run knows it too.
    async with running(world, hostname=name) as daemon:
        await eventually(lambda: errors(world, name) == (says,), 10, every=0.1)
        assert place(world, name) == "gcp"
        world.etcd.put(KEYS.location(name), "gcp")
        for key in (KEYS.location("h1"), KEYS.annotation("h1", "leader"), KEYS.annotation("h2", "exit-node")):
            world.etcd.delete(key)
        await eventually(lambda: errors(world, name) == (), 10, every=0.1)
        await eventually(lambda: b"formerNames" not in world.value(KEYS.node(name)), 60, every=0.1)
        await trio.sleep(1)
        assert place(world, name) == "gcp"
        assert decode_node(world.value(KEYS.node(name))).location == ""


async def test_a_label_of_a_former_name_that_is_taken_away_counts_no_more(world: World) -> None:
    world.etcd.put(KEYS.location("h1"), "gcp")
    async with running(world):
        await reported(world, "h1")
    async with running(world, hostname="h2"):
        await reported(world, "h2")
        assert place(world, "h2") == "gcp"
        world.etcd.delete(KEYS.location("h1"))
        await eventually(lambda: place(world, "h2") == "", 60, every=0.1)
        assert errors(world, "h2") == ()


@asynccontextmanager
async def another_h1(world: World) -> AsyncIterator[None]:
    """h1 has a label and is called h2 now, and another host has registered as h1."""
    world.etcd.put(KEYS.location("h1"), "gcp")
    async with running(world):
        await reported(world, "h1")
    async with running(world, hostname="h2"):
        await eventually(lambda: errors(world, "h2"), 10, every=0.1)
        world.etcd.put_kept(KEYS.node("h1"), encode(NodeRecord(public_key="B" + "A" * 42 + "=")))
        await eventually(lambda: place(world, "h2") == "", 60, every=0.1)
        yield


async def test_what_is_set_for_a_former_name_is_another_hosts_once_that_has_the_name(world: World) -> None:
    async with another_h1(world):
        await eventually(lambda: errors(world, "h2") == (), 10, every=0.1)


async def test_what_is_set_for_a_former_name_stays_another_hosts_when_that_leaves(world: World) -> None:
    async with another_h1(world):
        world.etcd.delete(KEYS.node("h1"))
        await trio.sleep(60)
        assert place(world, "h2") == ""
        assert errors(world, "h2") == ()


async def test_a_host_that_has_its_first_name_again_has_no_former_name(world: World) -> None:
    world.etcd.put(KEYS.location("h1"), "gcp")
    for name in ("h1", "h2", "h1"):
        async with running(world, hostname=name):
            await reported(world, name)
            await trio.sleep(1)
            assert place(world, name) == "gcp"
    assert errors(world, "h1") == ()
    assert not any("node rename h1 h1" in line for line in world.log.getvalue().splitlines())
    assert b"formerNames" not in world.value(KEYS.node("h1"))


@pytest.mark.parametrize("names", [[""], ["\ud800"], [5], "h0"])
async def test_former_names_that_are_none_keep_no_agent_from_starting(world: World, names: object) -> None:
    async with running(world):
        await reported(world, "h1")
    held = world.etcd.data[KEYS.node("h1").encode()]
    value = json.dumps({**json.loads(held.value), "formerNames": names})
    assert decode_node(value.encode()).former_names == ()
    world.etcd.put(KEYS.node("h1"), value, lease=held.lease)
    async with running(world):
        await reported(world, "h1")
        assert b"formerNames" not in world.value(KEYS.node("h1"))


async def test_a_younger_record_with_its_key_does_not_delay_a_hosts_start(world: World) -> None:
    """Any host may write one, and keep a status with it."""
    async with running(world) as daemon:
        await reported(world, "h1")
    for name in ("copy-1", "copy-2"):
        lease = (await world.client.grant_lease(3600)).id
        world.etcd.put(KEYS.node(name), encode(NodeRecord(public_key=daemon.public_key)), lease=lease)
        world.etcd.put(KEYS.status(name), encode(StatusRecord(public_key=daemon.public_key)), lease=lease)
    started = trio.current_time()
    async with running(world):
        await eventually(lambda: KEYS.status("h1") in world.etcd, 10, every=0.1)
        assert trio.current_time() - started < 3


async def test_the_stage_of_encrypted_is_kept(world: World) -> None:
    world.etcd.put(KEYS.internal_ips, "encrypted")
    async with running(world):
        await eventually(lambda: decode_node(world.value(KEYS.node("h1"))).encryption is STAGE, 60, every=0.1)
    stages = set()
    async with running(world, hostname="h2"):
        for _ in range(100):
            if (value := world.etcd.get(KEYS.node("h2"))) is not None:
                stages.add(decode_node(value).encryption)
            await trio.sleep(0.1)
    assert stages == {STAGE}


async def test_a_copy_that_starts_while_the_original_lives_leaves_it_alone_and_both_are_told(world: World) -> None:
    async with running(world) as daemon:
        await reported(world, "h1")
        lease = (await world.client.grant_lease(3600)).id
        copied = NodeRecord(public_key=daemon.public_key, endpoint=Endpoint.parse("198.51.100.9:1"))
        world.etcd.put(KEYS.node("copy"), encode(copied), lease=lease)
        world.etcd.put(KEYS.status("copy"), encode(StatusRecord(public_key=daemon.public_key)), lease=lease)
        says = "copy has registered with this host's public key, as a copy of this host's disk does; h1 keeps its place"
        await eventually(lambda: any(text.startswith(says) for text in errors(world, "h1")), 10, every=0.1)
        assert world.logged(says) == 1
        assert world.host.observed.addresses
        world.etcd.delete(KEYS.node("copy"))
        await eventually(lambda: not errors(world, "h1"), 10, every=0.1)
    original = NodeRecord(public_key=daemon.public_key, endpoint=Endpoint.parse("198.51.100.9:1"))
    world.etcd.put(KEYS.node("h1"), encode(original), lease=lease)
    short = (await world.client.grant_lease(5)).id
    world.etcd.put(KEYS.status("h1"), encode(StatusRecord(public_key=daemon.public_key)), lease=short)
    async with (
        world.client.keep_alive(short, 5, interval=1),
        running(world, hostname="copy", joined=False),
    ):
        says = "another node has this host's public key, and its agent runs or has run beside this one"
        await eventually(lambda: world.logged(says) == 1, 120, every=0.1)
        await eventually(lambda: any("h1 keeps it" in text for text in errors(world, "copy")), 10, every=0.1)
        assert decode_node(world.value(KEYS.node("h1"))) == original
    # Both are off, and the copy comes back first.
    world.etcd.delete(KEYS.status("h1"))
    async with running(world, hostname="copy", joined=False):
        await eventually(lambda: world.logged(says) == 2, 120, every=0.1)
        await eventually(lambda: any("h1 keeps it" in text for text in errors(world, "copy")), 10, every=0.1)
        assert decode_node(world.value(KEYS.node("h1"))) == original
        assert decode_node(world.value(KEYS.node("copy"))).duplicate_of == ("h1",)
        # The operator decides otherwise.
        world.etcd.delete(KEYS.node("h1"))
        await world.ready()
        await eventually(lambda: b"duplicateOf" not in world.value(KEYS.node("copy")), 60, every=0.1)


class Confined(FakeClient):
    """Of a user who may write the keys of h2 only."""

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        if any(isinstance(op, Delete) and "/by/h1/" in str(op.key) for op in success):
            raise PermissionDenied("etcdserver: permission denied")
        return await super().txn(compare, success, failure)


async def test_a_host_that_may_not_write_under_its_former_name_says_what_the_operator_does(world: World) -> None:
    async with running(world):
        await reported(world, "h1")
    world.client = Confined(world.etcd, "h2")
    async with running(world, hostname="h2", joined=False):
        says = "if h1 is this host's former name, run kgctl node rename h1 h2"
        await eventually(lambda: any(says in text for text in errors(world, "h2")), 10, every=0.1)
        for key in [*world.etcd.keys("/kilo/by/h1/"), *world.etcd.keys("/kilo-status/by/h1/")]:
            world.etcd.delete(key)
        await eventually(lambda: world.metrics.health() is None, 10, every=0.1)
        await eventually(lambda: not errors(world, "h2"), 10, every=0.1)
