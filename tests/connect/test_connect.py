"""`kgctl connect` from start to end, on an etcd and a kernel in memory, in virtual time."""

from __future__ import annotations

import base64
import io
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import click
import pytest
import trio
from attrs import evolve

from helpers import eventually, put_kept
from kilo_etcd import kernel
from kilo_etcd.connect import connection as connection_module
from kilo_etcd.connect import registration as registration_module
from kilo_etcd.connect.command import run_here
from kilo_etcd.connect.connection import Edges, Names, PeerConnection, Settings
from kilo_etcd.connect.registration import LEASE_SECONDS, DesiredPeer, Gone, PeerRegistration
from kilo_etcd.ctl.context import Failure
from kilo_etcd.etcd.api import Compare, Delete, Op, PermissionDenied, Put, TxnResult, Unavailable
from kilo_etcd.kernel.routing.exit_node import exit_table
from kilo_etcd.kernel.state import Change, DeleteLink, DeleteRoute, HostAddress, SetPeer
from kilo_etcd.model import CandidateClass, Endpoint, IPAddress
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.runtime.logs import setup_logging
from kilo_etcd.runtime.resolve import Resolver
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, NodeRecord, PeerRecord, decode_peer, encode
from kilo_etcd.testing.fake_etcd import FakeEtcd
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel

pytestmark = pytest.mark.autojump

PRIVATE = key_file.generate()
PUBLIC = key_file.public_key(PRIVATE)
KEYS = Keys()
EXIT = exit_table("kilo-kilo")
RECORD = KEYS.peer("laptop")


def key_of(number: int) -> str:
    return base64.b64encode(bytes([number]) * 32).decode()


async def add_node(etcd: FakeEtcd, name: str, number: int, location: str) -> None:
    record = NodeRecord(
        public_key=key_of(number),
        endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
        internal_ips=(ip_interface(f"10.{1 if location == 'gcp' else 2}.0.{number}/24"),),
        location=location,
        underlay=(),
    )
    client = etcd.client()
    await client.put(f"/kilo/by/{name}/addresses/10.4.0.{number}", "")
    await client.put(KEYS.node(name), encode(record))
    await put_kept(client, KEYS.election(location, name), encode(CandidateRecord(rank=CandidateClass.PUBLIC)))


class World:
    """A laptop, and what surrounds it."""

    def __init__(self) -> None:
        self.etcd = FakeEtcd()
        self.client = self.etcd.client("laptop")
        self.host = FakeHost()
        self.log = io.StringIO()
        self.names: Names | None = None
        self.facts = HostFacts(
            addresses=(HostAddress(interface="wlan0", index=2, address=ip_interface("192.168.1.7/24")),)
        )

    async def build(self) -> None:
        client = self.etcd.client()
        await client.put("/kilo/mesh/subnets", "10.4.0.0/16")
        await client.put("/kilo/mesh/granularity", "location")
        await add_node(self.etcd, "gcp-1", 1, "gcp")
        await add_node(self.etcd, "gcp-2", 2, "gcp")
        await add_node(self.etcd, "home-1", 3, "home")

    def leaders(self) -> set[int]:
        """The numbers of the nodes that are WireGuard peers here."""
        return {base64.b64decode(key)[0] for key in self.host.observed.peers}

    def logged(self, sentence: str) -> int:
        return self.log.getvalue().count(sentence)

    def resets(self) -> list[SetPeer]:
        """The peers that were made anew."""
        return [change for change in self.host.history if isinstance(change, SetPeer) and change.reset]

    def record(self) -> PeerRecord:
        return decode_peer(self.etcd.get(RECORD) or b"")

    def record_names(self) -> set[str]:
        """The peers that have a record."""
        return {key.removeprefix("/kilo/peers/") for key in self.etcd.keys("/kilo/peers/")}

    async def look(self) -> HostFacts:
        await trio.lowlevel.checkpoint()
        return self.facts

    async def write_names(self, names: Names | None) -> bool:
        await trio.lowlevel.checkpoint()
        before, self.names = self.names, names
        return before != names

    async def clean_up(self) -> tuple[Change, ...]:
        await trio.lowlevel.checkpoint()
        return self.host.cleanup("kilo-kilo", protocol=kernel.PEER_PROTOCOL)


@pytest.fixture
def world() -> World:
    made = World()
    setup_logging("info", stream=made.log)
    return made


@asynccontextmanager
async def connected(
    world: World,
    *,
    dns_hosts: bool = True,
    exit_node: str | None = None,
    endpoints: tuple[str, ...] = ("192.0.2.1:2379",),
    **desired: Any,
) -> AsyncIterator[PeerConnection]:
    """The command runs in the block, in a mesh of three nodes; SIGTERM ends it at the block's end."""
    await world.build()
    setup = kernel.Setup(interface="kilo-kilo", private_key=PRIVATE, protocol=kernel.PEER_PROTOCOL)
    settings = Settings(
        interface="kilo-kilo", listen_port=4711, endpoints=endpoints, dns_hosts=dns_hosts, exit_node=exit_node
    )
    connection = PeerConnection(
        DesiredPeer(**{"name": "laptop", "public_key": PUBLIC, **desired}),
        settings,
        world.client,
        "/kilo",
        FakeKernel(world.host, setup),
        Edges(look=world.look, write_names=world.write_names, clean_up=world.clean_up),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await eventually(lambda: world.logged("connected  interface"), 30, every=0.1)
        yield connection
        os.kill(os.getpid(), signal.SIGTERM)


def nothing_is_left(world: World) -> bool:
    observed = world.host.observed
    return (
        observed.link is None
        and not observed.routes
        and world.names is None
        and not any("peers/" in key or "peer-addresses/" in key for key in world.etcd.keys("/"))
    )


async def test_it_connects_and_leaves_nothing_behind(world: World) -> None:
    async with connected(world):
        observed = world.host.observed
        (address,) = observed.addresses
        assert address.ip in ip_network("10.4.0.0/16")
        assert f"/kilo/peer-addresses/laptop/{address.ip}" in world.etcd
        record = world.record()
        assert (record.public_key, record.allowed_ips, record.persistent_keepalive) == (PUBLIC, (address.network,), 10)
        assert world.leaders() == {1, 3}
        (route,) = observed.routes.values()
        assert str(route) == f"10.4.0.0/16 dev kilo-kilo proto 108 src {address.ip}"
        assert world.names is not None
        assert set(world.names) == {"gcp-1", "gcp-2", "home-1", "laptop"}
        assert (observed.forwarding, observed.table) == (frozenset(), None)
    assert nothing_is_left(world), world.etcd.keys("/")


async def test_no_record_of_a_peer_leads_another_name_or_anything_out_of_the_mesh_astray(world: World) -> None:
    async with connected(world):
        for name, address in {
            "github.com": "203.0.113.66/32",
            "wpad": "10.4.77.1/32",
            "bank": "203.0.113.67/32",
        }.items():
            record = PeerRecord(public_key=key_of(ord(name[0])), allowed_ips=(ip_network(address),))
            await world.etcd.client().put(KEYS.peer(name), encode(record))
        await eventually(
            lambda: world.logged("bank is not written as 203.0.113.67, which is not routed here"), 10, every=0.1
        )
        await trio.sleep(1000)
        assert world.names is not None
        assert set(world.names) == {"gcp-1", "gcp-2", "home-1", "laptop", "wpad"}
        assert "203.0.113" not in str(world.names)
        assert world.logged("wpad is written as wpad.kilo and wpad.mesh only")
        assert world.logged("not all names of the mesh are written") <= 3
        for name in ("github.com", "bank"):
            await world.etcd.client().delete(KEYS.peer(name))
        await world.etcd.client().delete(KEYS.peer("wpad"))
        await eventually(lambda: world.logged("all names of the mesh are written"), 30, every=0.1)


async def test_it_follows_a_failover_a_label_a_new_node_and_granularity(world: World) -> None:
    async with connected(world):
        await world.etcd.client().delete(KEYS.election("gcp", "gcp-1"))
        await eventually(lambda: world.leaders() == {2, 3}, 10, every=0.1)
        await world.etcd.client().put(KEYS.location("gcp-1"), "aws")
        await eventually(lambda: world.leaders() == {1, 2, 3}, 10, every=0.1)
        await add_node(world.etcd, "far-1", 9, "far")
        await eventually(lambda: world.leaders() == {1, 2, 3, 9}, 10, every=0.1)
        assert world.names is not None
        assert "far-1" in world.names
        await world.etcd.client().put(KEYS.location("gcp-1"), "gcp")
        await eventually(lambda: world.leaders() == {2, 3, 9}, 10, every=0.1)
        await world.etcd.client().put(KEYS.granularity, "full")
        await eventually(lambda: world.leaders() == {1, 2, 3, 9}, 10, every=0.1)


async def test_a_leader_whose_endpoint_changes_is_spoken_to_there_until_its_packets_come_from_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    triggered: list[IPAddress] = []
    monkeypatch.setattr(connection_module, "trigger_handshakes", triggered.extend)

    def endpoint() -> Endpoint | None:
        return world.host.observed.peers[key_of(1)].endpoint

    async with connected(world):
        former, new = endpoint(), Endpoint.parse("203.0.113.77:51820")
        world.host.receive_from(key_of(1), endpoint=former)
        assert triggered == []
        await world.etcd.client().put(KEYS.annotation("gcp-1", "force-endpoint"), str(new))
        await eventually(lambda: endpoint() == new, 10, every=0.1)
        assert triggered == [ip_address("10.4.0.1")]
        world.host.receive_from(key_of(1), endpoint=former)
        await eventually(lambda: endpoint() == new, 10, every=0.1)
        assert triggered == [ip_address("10.4.0.1")] * 2


async def test_nothing_is_written_when_nothing_changes_and_drift_is_repaired(world: World) -> None:
    async with connected(world) as connection:
        await trio.sleep(5)
        writes, revision = connection.kernel.writes, world.etcd.revision
        await trio.sleep(1000)
        assert (connection.kernel.writes, world.etcd.revision) == (writes, revision)
        (route,) = world.host.observed.routes.values()
        world.host.tamper([DeleteRoute(route)], "kilo-kilo")
        await eventually(lambda: world.host.observed.routes, 10, every=0.1)
        world.host.tamper([DeleteLink("kilo-kilo")], "kilo-kilo")
        await eventually(lambda: world.leaders() == {1, 3}, 10, every=0.1)


async def test_etcd_away_changes_nothing_here_and_is_followed_again_afterwards(world: World) -> None:
    async with connected(world):
        world.etcd.down()
        await trio.sleep(3 * LEASE_SECONDS)
        assert world.leaders() == {1, 3}
        world.etcd.up()
        await world.etcd.client().delete(KEYS.election("gcp", "gcp-1"))
        await eventually(lambda: world.leaders() == {2, 3}, 30, every=0.1)
        assert world.etcd.get(RECORD) is not None
    assert nothing_is_left(world)


async def test_an_etcd_that_is_another_one_is_told_nothing_and_the_last_plan_stays(world: World) -> None:
    async with connected(world):
        world.etcd.replace_cluster()
        revision = world.etcd.revision
        await trio.sleep(5 * LEASE_SECONDS)
        assert world.logged("etcd is another cluster now") >= 1
        assert (world.etcd.revision, world.etcd.get(RECORD)) == (revision, None)
        assert world.leaders() == {1, 3}
    assert world.host.observed.link is None


async def test_a_machine_that_slept_longer_than_its_lease_comes_back_by_itself(world: World) -> None:
    async with connected(world):
        address = world.host.observed.addresses
        world.client.cut()
        await trio.sleep(2 * LEASE_SECONDS)
        assert world.etcd.get(RECORD) is None
        assert world.leaders() == {1, 3}
        world.client.mend()
        await eventually(lambda: world.etcd.get(RECORD) is not None, 60, every=0.1)
        await eventually(lambda: world.logged("registered again"), 10, every=0.1)
        assert world.host.observed.addresses == address
        await trio.sleep(3 * LEASE_SECONDS)
        assert world.etcd.get(RECORD) is not None
    assert nothing_is_left(world)


async def test_a_machine_whose_clock_goes_back_is_a_new_peer_to_the_nodes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = 0.0
    triggered: list[IPAddress] = []
    monkeypatch.setattr(connection_module, "trigger_handshakes", lambda addresses: triggered.extend(addresses))
    world.host.clock = lambda: trio.current_time() + off
    async with connected(world):
        await trio.sleep(30)
        before, address = world.etcd.data[RECORD.encode()], world.host.observed.addresses
        off = 3600.0
        await trio.sleep(30)
        for back in range(5):
            # A step that is soon made up for is nothing to anybody.
            off = 3600.0 - 20 * back
            await trio.sleep(30)
        assert world.etcd.data[RECORD.encode()] == before
        assert world.resets() == []
        off, begun = 0.0, len(triggered)
        await eventually(lambda: RECORD in world.etcd and world.etcd.data[RECORD.encode()] != before, 20, every=0.1)
        after = world.etcd.data[RECORD.encode()]
        assert after.create_revision > before.create_revision
        assert (after.value, after.lease) == (before.value, before.lease)
        # The nodes have forgotten its sessions, so it begins new ones.
        await eventually(
            lambda: {change.public_key for change in world.resets()} == {key_of(1), key_of(3)}, 5, every=0.1
        )
        assert set(triggered[begun:]) == {ip_address("10.4.0.1"), ip_address("10.4.0.3")}
        await trio.sleep(5 * LEASE_SECONDS)
        assert len(world.resets()) == 2
        assert world.etcd.data[RECORD.encode()] == after
        assert world.host.observed.addresses == address
        assert world.leaders() == {1, 3}
        assert world.logged("this machine's clock went back") == 1
    assert nothing_is_left(world)


async def test_a_record_that_etcd_does_not_take_back_at_once_is_put_again(world: World) -> None:
    off = 3600.0
    world.host.clock = lambda: trio.current_time() + off
    async with connected(world):
        await trio.sleep(30)
        before, transact = world.etcd.data[RECORD.encode()], world.client.txn
        failures = 0

        async def txn(*args: Any, **kwargs: Any) -> TxnResult:
            nonlocal failures
            if RECORD not in world.etcd and failures < 3:
                failures += 1
                raise Unavailable("it is busy")
            return await transact(*args, **kwargs)

        world.client.txn = txn  # type: ignore[method-assign]
        off = 0.0
        await eventually(lambda: failures == 3 and RECORD in world.etcd, 60, every=0.1)
        assert world.etcd.data[RECORD.encode()].create_revision > before.create_revision
        await trio.sleep(3 * LEASE_SECONDS)
        assert world.leaders() == {1, 3}
    assert nothing_is_left(world)


async def test_while_the_record_is_put_anew_the_machine_itself_goes_on(world: World) -> None:
    off = 3600.0
    world.host.clock = lambda: trio.current_time() + off
    async with connected(world):
        await trio.sleep(30)
        transact, busy = world.client.txn, True

        async def txn(*args: Any, **kwargs: Any) -> TxnResult:
            if RECORD not in world.etcd and busy:
                raise Unavailable("it is busy")
            return await transact(*args, **kwargs)

        world.client.txn = txn  # type: ignore[method-assign]
        off = 0.0
        await eventually(lambda: RECORD not in world.etcd, 20, every=0.1)
        (route,) = world.host.observed.routes.values()
        world.host.tamper([DeleteRoute(route)], "kilo-kilo")
        await eventually(lambda: world.host.observed.routes, 40, every=0.1)
        assert RECORD not in world.etcd
        busy = False
        await eventually(lambda: RECORD in world.etcd, 20, every=0.1)
    assert nothing_is_left(world)


async def test_a_record_that_is_put_anew_keeps_what_an_operator_has_added_to_it(world: World) -> None:
    await world.build()
    desired = DesiredPeer(name="laptop", public_key=PUBLIC)
    registration = PeerRegistration(world.client, KEYS, desired, lambda: None)
    await registration.register()
    held = world.etcd.data[RECORD.encode()]
    record = decode_peer(held.value)
    added = evolve(
        record,
        allowed_ips=(*record.allowed_ips, ip_network("192.168.9.0/24")),
        preshared_key=base64.b64encode(bytes(32)).decode(),
    )
    await world.client.put(RECORD, encode(added), lease=held.lease)
    assert await registration.renew()
    anew = world.etcd.data[RECORD.encode()]
    assert decode_peer(anew.value) == added
    assert anew.version == 1


async def test_a_record_that_a_younger_one_would_take_a_network_from_is_put_anew_all_the_same(world: World) -> None:
    off = 3600.0
    world.host.clock = lambda: trio.current_time() + off
    async with connected(world):
        await trio.sleep(30)
        held = world.etcd.data[RECORD.encode()]
        shared = ip_network("192.168.9.0/24")
        record = evolve(world.record(), allowed_ips=(*world.record().allowed_ips, shared))
        await world.client.put(RECORD, encode(record), lease=held.lease)
        other = PeerRecord(public_key=key_of(99), allowed_ips=(ip_network("10.77.0.9/32"), shared))
        world.etcd.put("/kilo/peers/other", encode(other))
        await trio.sleep(10)
        off = 0.0
        await trio.sleep(60)
        anew = world.etcd.data[RECORD.encode()]
        assert anew.create_revision > held.create_revision
        assert (decode_peer(anew.value), anew.lease) == (record, held.lease)
        assert world.leaders() == {1, 3}
    assert world.record_names() == {"other"}


async def test_a_record_that_was_put_without_a_lease_is_not_said_to_be_put_anew(world: World) -> None:
    off = 3600.0
    world.host.clock = lambda: trio.current_time() + off
    async with connected(world):
        await trio.sleep(30)
        # As `etcdctl put` does.
        await world.client.put(
            RECORD, encode(evolve(world.record(), preshared_key=base64.b64encode(bytes(32)).decode()))
        )
        await trio.sleep(30)
        before, resets = world.etcd.data[RECORD.encode()], len(world.resets())
        off = 0.0
        await trio.sleep(60)
        assert world.etcd.data[RECORD.encode()] == before
        # The nodes have its sessions still, and would drop its handshakes.
        assert len(world.resets()) == resets
        assert world.logged("this machine's clock went back") == 1
        assert world.logged("kgctl peer remove laptop") == 1
        assert world.logged("new WireGuard peer") == 0


@pytest.mark.parametrize("lost", [Put, Delete])
async def test_a_record_is_put_anew_once_although_an_answer_of_etcd_gets_lost(
    world: World, lost: type[Put | Delete], monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.build()
    registration = PeerRegistration(world.client, KEYS, DesiredPeer(name="laptop", public_key=PUBLIC), lambda: None)
    await registration.register()
    before, transact, left = world.etcd.data[RECORD.encode()], world.client.txn, 1

    async def txn(compare: Any, success: Any) -> TxnResult:
        nonlocal left
        gone = RECORD not in world.etcd
        result = await transact(compare, success)
        if left and isinstance(success[0], lost) and (lost is Delete or gone):
            left -= 1
            raise Unavailable("the connection broke")
        return result

    monkeypatch.setattr(world.client, "txn", txn)
    with pytest.raises(Unavailable):
        await registration.renew()
    assert registration.renewing
    assert await registration.renew()
    assert not registration.renewing
    anew = world.etcd.data[RECORD.encode()]
    assert anew.create_revision > before.create_revision
    assert (anew.value, anew.lease, anew.version) == (before.value, before.lease, 1)
    assert registration.revision == anew.create_revision


async def test_a_lease_that_ends_while_the_record_is_put_anew_has_it_registered_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.build()
    registration = PeerRegistration(world.client, KEYS, DesiredPeer(name="laptop", public_key=PUBLIC), lambda: None)
    await registration.register()
    before, transact = world.etcd.data[RECORD.encode()], world.client.txn

    async def txn(compare: Any, success: Any) -> TxnResult:
        result = await transact(compare, success)
        if isinstance(success[0], Delete):
            await world.etcd.client().revoke_lease(before.lease)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(world.client, "txn", txn)
        assert await registration.renew(), "whoever puts the record again puts another one"
    assert not registration.renewing
    assert RECORD not in world.etcd
    assert await registration.mend(None)
    assert world.etcd.data[RECORD.encode()].value == before.value


async def test_an_etcd_that_takes_no_writes_keeps_the_record(world: World) -> None:
    off = 3600.0
    world.host.clock = lambda: trio.current_time() + off
    async with connected(world):
        await trio.sleep(30)
        before, transact, full = world.etcd.data[RECORD.encode()], world.client.txn, True

        async def txn(*args: Any, **kwargs: Any) -> TxnResult:
            # So etcd is when its disk is full: it deletes still.
            if full and any(isinstance(op, Put) for op in args[1]):
                raise Unavailable("mvcc: database space exceeded")
            return await transact(*args, **kwargs)

        world.client.txn = txn  # type: ignore[method-assign]
        off = 0.0
        await trio.sleep(60)
        assert world.etcd.data[RECORD.encode()] == before
        full = False
        await eventually(lambda: world.etcd.data[RECORD.encode()].create_revision > before.create_revision, 20, every=1)
    assert nothing_is_left(world)


async def test_a_clock_that_goes_to_and_fro_interrupts_the_sessions_seldom(world: World) -> None:
    off, revisions = 0.0, set[int]()
    world.host.clock = lambda: trio.current_time() + off
    async with connected(world):
        await trio.sleep(30)
        for _ in range(60):
            for ahead in (3600.0, 0.0):
                off = ahead
                await trio.sleep(30)
                if RECORD in world.etcd:
                    revisions.add(world.etcd.data[RECORD.encode()].create_revision)
        # One of before, and three in the hour: pauses grow.
        assert len(revisions) == 4
        assert world.logged("this machine's clock went back") == 3
        assert world.leaders() == {1, 3}
    assert nothing_is_left(world)


async def test_a_node_that_does_not_answer_is_named(world: World) -> None:
    async with connected(world):
        for _ in range(8):
            world.host.send_to(key_of(1))
            await trio.sleep(5)
        assert world.logged("node gcp-1 does not answer, although WireGuard sends to it") == 1
        world.host.receive_from(key_of(1))
        await eventually(lambda: world.logged("no longer: node gcp-1 does not answer"), 15, every=0.1)


async def test_a_machine_that_dies_is_forgotten_when_its_lease_ends(world: World) -> None:
    await world.build()
    registration = PeerRegistration(world.client, KEYS, DesiredPeer(name="laptop", public_key=PUBLIC), lambda: None)
    await registration.register()
    await trio.sleep(LEASE_SECONDS - 5)
    assert world.etcd.get(RECORD) is not None
    await trio.sleep(10)
    assert world.etcd.get(RECORD) is None
    assert not world.etcd.keys("/kilo/peer-addresses/")


async def ended_by(world: World, what: Awaitable[object]) -> None:
    """Raises as the command does when `what` ends it."""
    async with connected(world):
        await what
        await trio.sleep(60)
        pytest.fail("it went on")


async def test_an_operator_who_removes_the_peer_ends_it(world: World) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        await ended_by(world, world.etcd.client().delete(RECORD))
    assert caught.group_contains(Gone, match="record of peer laptop was removed by another writer", depth=None)
    assert nothing_is_left(world)


async def test_somebody_who_takes_the_name_ends_it_and_keeps_the_name(world: World) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        await ended_by(world, world.etcd.client().put(RECORD, encode(PeerRecord(public_key=key_of(77)))))
    assert caught.group_contains(Gone, match="has another public key now", depth=None)
    assert world.host.observed.link is None
    assert world.record().public_key == key_of(77)


async def test_a_record_whose_answer_was_lost_is_taken_away_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    transact = world.client.txn

    async def txn(*args: Any, **kwargs: Any) -> TxnResult:
        world.client.lose_answer()
        return await transact(*args, **kwargs)

    monkeypatch.setattr(world.client, "txn", txn)
    with pytest.raises(BaseExceptionGroup) as caught:
        async with connected(world):
            pytest.fail("it went on")
    assert caught.group_contains(Unavailable, match="broke before the answer came", depth=None)
    assert nothing_is_left(world)


@pytest.mark.parametrize("call", ["range", "grant_lease", "txn"])
async def test_a_user_who_may_not_do_it_is_told_so_and_nothing_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async def denied(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise PermissionDenied("user eve may not do this in etcd")

    monkeypatch.setattr(world.client, call, denied)
    with pytest.raises(BaseExceptionGroup) as caught:
        async with connected(world):
            pytest.fail("it went on")
    assert caught.group_contains(PermissionDenied, match="user eve may not", depth=None)
    assert nothing_is_left(world)


async def test_no_clean_up_leaves_all_of_it_and_a_record_that_stays(world: World) -> None:
    async with connected(world, clean_up=False):
        pass
    assert world.leaders() == {1, 3}
    assert world.names
    await trio.sleep(10 * LEASE_SECONDS)
    assert world.record().public_key == PUBLIC


async def test_an_operators_record_is_used_and_stays(world: World) -> None:
    held = PeerRecord(public_key=PUBLIC, allowed_ips=(ip_network("10.9.0.2/32"),), preshared_key=key_of(99))
    await world.client.put(RECORD, encode(held))
    async with connected(world):
        assert [str(address) for address in world.host.observed.addresses] == ["10.9.0.2/32"]
        assert {peer.preshared_key for peer in world.host.observed.peers.values()} == {key_of(99)}
        # Behind NAT it is still this machine that has to speak.
        assert {peer.persistent_keepalive for peer in world.host.observed.peers.values()} == {10}
        assert world.etcd.get(RECORD) == encode(held)
        await world.client.put(RECORD, encode(evolve(held, allowed_ips=(ip_network("10.9.0.3/32"),))))
        await eventually(
            lambda: [str(address) for address in world.host.observed.addresses] == ["10.9.0.3/32"], 10, every=0.1
        )
    assert world.host.observed.link is None
    assert world.record().public_key == PUBLIC


async def test_a_laptop_that_is_carried_into_another_network_keeps_that_network(world: World) -> None:
    await world.client.put("/kilo/annotations/home-1/subnets", "172.20.0.0/24")
    async with connected(world):
        home = ip_network("172.20.0.0/24")
        assert home in world.host.observed.routes
        here = HostAddress(interface="wlan0", index=2, address=ip_interface("172.20.0.7/24"))
        world.facts = HostFacts(addresses=(here,))
        world.host.moved.set()
        await eventually(lambda: home not in world.host.observed.routes, 10, every=0.1)
        assert world.logged("172.20.0.0/24 is not routed here") == 1


async def test_no_internal_ip_is_taken_from_its_name_server_or_its_containers(world: World) -> None:
    # The cafe's name server is behind its router, and a container network has the numbers of home's.
    containers = HostAddress(interface="docker0", index=3, kind="bridge", address=ip_interface("10.2.0.1/16"))
    world.facts = evolve(
        world.facts, addresses=(*world.facts.addresses, containers), name_servers=(ip_address("10.1.0.2"),)
    )
    async with connected(world):
        await world.etcd.client().put(KEYS.internal_ips, "routed")
        await eventually(lambda: ip_network("10.1.0.1/32") in world.host.observed.routes, 10, every=0.1)
        assert set(map(str, world.host.observed.routes)) == {"10.4.0.0/16", "10.1.0.1/32"}


async def test_an_exit_node_takes_all_but_etcd_and_nothing_passes_when_it_is_none_any_more(world: World) -> None:
    anywhere = ip_network("0.0.0.0/0")

    def allowed() -> set[int]:
        peers = world.host.observed.peers.values()
        return {base64.b64decode(peer.public_key)[0] for peer in peers if anywhere in peer.allowed_ips}

    await world.client.put("/kilo/annotations/gcp-1/advertise-exit-node", "true")
    async with connected(world, exit_node="gcp-1"):
        observed = world.host.observed
        assert allowed() == {1}
        kinds = {
            str(network): route.kind or route.device for network, route in observed.policy.table(EXIT).routes.items()
        }
        assert kinds == {
            "0.0.0.0/0": "kilo-kilo", "192.0.2.1/32": "throw",
            "203.0.113.1/32": "throw", "203.0.113.3/32": "throw",
        }  # fmt: skip
        assert {str(network) for network in observed.policy.table(EXIT).last} == {"0.0.0.0/0", "::/0"}
        assert len(observed.policy.rules) == 4
        assert [str(network) for network in observed.routes] == ["10.4.0.0/16"]
        await world.etcd.client().delete(KEYS.election("gcp", "gcp-1"))
        await eventually(lambda: allowed() == set(), 10, every=0.1)
        assert anywhere in world.host.observed.policy.table(EXIT).routes
        assert world.logged("node gcp-1 cannot be an exit node as long as gcp-2 leads its location") == 1
    assert (world.host.observed.policy.table(EXIT).routes, world.host.observed.policy.rules) == ({}, frozenset())
    assert world.host.observed.policy.table(EXIT).last == {}


async def test_etcd_bypasses_the_exit_node_before_anything_goes_through_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lookup(_name: str) -> tuple[IPAddress, ...]:
        await trio.sleep(2)
        return (ip_address("192.0.2.77"),)

    monkeypatch.setattr("kilo_etcd.connect.connection.Resolver", partial(Resolver, lookup=lookup))
    await world.client.put("/kilo/annotations/gcp-1/advertise-exit-node", "true")
    async with connected(world, exit_node="gcp-1", endpoints=("https://etcd.example.org:2379",)):
        made = [str(change) for change in world.host.history]
        outside = next(at for at, text in enumerate(made) if text.startswith("ip route add throw 192.0.2.77/32"))
        assert outside < min(at for at, text in enumerate(made) if "rule add" in text)


async def test_names_of_etcd_that_do_not_serve_are_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    async def lookup(_name: str) -> tuple[IPAddress, ...]:
        await trio.sleep(1)
        raise OSError("no such name")

    monkeypatch.setattr("kilo_etcd.connect.connection.Resolver", partial(Resolver, lookup=lookup))
    await world.client.put("/kilo/annotations/gcp-1/advertise-exit-node", "true")
    world.client.endpoint = "http://192.0.2.77:2379"
    async with connected(world, exit_node="gcp-1", endpoints=("https://etcd.example.org:2379",)):
        made = [str(change) for change in world.host.history]
        assert any(text.startswith("ip route add throw 192.0.2.77/32") for text in made)


async def test_with_an_exit_node_etcd_whose_name_is_not_resolved_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lookup(_name: str) -> tuple[IPAddress, ...]:
        await trio.sleep(1)
        raise OSError("no such name")

    monkeypatch.setattr("kilo_etcd.connect.connection.Resolver", partial(Resolver, lookup=lookup))
    await world.client.put("/kilo/annotations/gcp-1/advertise-exit-node", "true")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with connected(world, exit_node="gcp-1", endpoints=("https://etcd.example.org:2379",)):
            pytest.fail("it went on")
    assert caught.group_contains(
        Failure, match=r"etcd's name etcd\.example\.org is not resolved within 5 s", depth=None
    )
    assert nothing_is_left(world)


async def test_an_exit_node_that_falls_silent_is_said_once(world: World) -> None:
    await world.client.put("/kilo/annotations/gcp-1/advertise-exit-node", "true")
    async with connected(world, exit_node="gcp-1"):
        (key,) = [k for k, peer in world.host.observed.peers.items() if ip_network("0.0.0.0/0") in peer.allowed_ips]

        def count(sent: int, received: int) -> None:
            peers = world.host.observed.peers
            moved = evolve(peers[key], tx_bytes=sent, rx_bytes=received)
            world.host.observed = evolve(world.host.observed, peers={**peers, key: moved})

        await trio.sleep(30)
        count(5000, 0)
        await eventually(lambda: world.logged("nothing comes back from the exit node gcp-1"), 60, every=0.5)
        await trio.sleep(60)
        assert world.logged("nothing comes back from the exit node gcp-1") == 1
        count(5000, 92)
        await eventually(lambda: world.logged("the exit node answers"), 30, every=0.5)


async def test_an_unusable_kernel_is_said_at_once_and_the_record_goes(world: World) -> None:
    world.host.broken = "kilo-kilo cannot be set up: no"
    with pytest.raises(BaseExceptionGroup) as caught:
        async with connected(world):
            pytest.fail("it went on")
    assert caught.group_contains(kernel.KernelError, match="no", depth=None)
    world.host.broken = None
    assert nothing_is_left(world)


# --- the record -------------------------------------------------------------------------------------------------------


async def refused(world: World, says: str, **desired: Any) -> None:
    before = {key: world.etcd.get(key) for key in world.etcd.keys("/")}
    made = DesiredPeer(**{"name": "laptop", "public_key": PUBLIC, **desired})
    with pytest.raises(Failure, match=says):
        await PeerRegistration(world.client, KEYS, made, lambda: None).register()
    assert {key: world.etcd.get(key) for key in world.etcd.keys("/")} == before


async def test_no_address_is_chosen_of_a_network_that_the_machine_is_in(world: World) -> None:
    """A host there may have it, and the kernel would answer for it."""
    await world.build()

    async def chosen(*attached: str) -> IPAddress:
        made = DesiredPeer(name="laptop", public_key=PUBLIC, attached=tuple(map(ip_network, attached)))
        (address,) = (await PeerRegistration(world.client, KEYS, made, lambda: None).prospect())[0].chosen
        return address

    first = await chosen()
    around = ip_network(f"{first}/24", strict=False)
    assert await chosen(str(around), f"{first}/32") not in around
    halves = [str(half) for half in ip_network("10.4.0.0/16").subnets(1)]
    assert await chosen(*halves) == await chosen("10.0.0.0/8") == first, "there is no other"


async def test_an_address_that_a_node_claims_between_look_and_write_is_left_to_the_node(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.build()
    first = claims_first(world, monkeypatch)
    desired = DesiredPeer(name="laptop", public_key=PUBLIC)
    decision = await PeerRegistration(world.client, KEYS, desired, lambda: None).register()
    (address,) = decision.claims
    assert str(address) not in first
    assert world.etcd.keys("/kilo/peer-addresses/") == [f"/kilo/peer-addresses/laptop/{address}"]
    assert [str(network) for network in world.record().allowed_ips] == [f"{address}/32"]
    assert f"/kilo/by/node-9/addresses/{first[0]}" in world.etcd


def claims_first(world: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """node-9 claims the first address that the machine claims, just before it. The list has the address then."""
    transact, first = world.client.txn, list[str]()

    async def txn(compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()) -> TxnResult:
        for op in success:
            if isinstance(op, Put) and "peer-addresses" in str(op.key) and not first:
                first.append(str(op.key).rpartition("/")[2])
                world.etcd.put(KEYS.address("node-9", ip_address(first[0])), "")
                world.etcd.put_kept(KEYS.reservation("node-9"), "")
        return await transact(compare, success, failure)

    monkeypatch.setattr(world.client, "txn", txn)
    return first


async def test_without_an_answer_to_the_look_no_record_has_a_nodes_address(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.build()
    first = claims_first(world, monkeypatch)
    desired = DesiredPeer(name="laptop", public_key=PUBLIC, clean_up=False)

    async def no_answer(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise Unavailable("no answer")

    with monkeypatch.context() as away:
        away.setattr(registration_module, "look", no_answer)
        with pytest.raises(Unavailable):
            await PeerRegistration(world.client, KEYS, desired, lambda: None).register()
    assert RECORD not in world.etcd
    again = PeerRegistration(world.client, KEYS, desired, lambda: None)
    (address,) = (await again.register()).claims
    assert [str(address)] != first
    assert not again.leased
    await trio.sleep(2 * LEASE_SECONDS)
    assert [str(network) for network in world.record().allowed_ips] == [f"{address}/32"]
    assert world.etcd.keys("/kilo/peer-addresses/") == [KEYS.peer_address("laptop", address)]


async def test_a_record_of_before_is_not_written_with_an_address_that_a_node_claims_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.build()
    before = PeerRecord(public_key=PUBLIC, allowed_ips=(ip_network("10.4.0.77/32"), ip_network("10.9.0.7/32")))
    world.etcd.put_kept(RECORD, encode(before))
    first, written = claims_first(world, monkeypatch), world.etcd.data[RECORD.encode()].mod_revision
    decision = await PeerRegistration(world.client, KEYS, DesiredPeer(name="laptop", public_key=PUBLIC),
                                      lambda: None).register()  # fmt: skip
    (address,) = decision.chosen
    assert first == ["10.4.0.77"]
    assert world.record().allowed_ips == (ip_network("10.9.0.7/32"), ip_network(address))
    assert world.etcd.keys("/kilo/peer-addresses/") == [KEYS.peer_address("laptop", address)]
    assert world.etcd.data[RECORD.encode()].version == 1, "it was put anew once, and not written before the look"
    assert written < world.etcd.data[RECORD.encode()].mod_revision


async def test_a_record_that_stays_is_not_used_with_an_address_that_a_node_has(world: World) -> None:
    await world.build()
    claim = KEYS.peer_address("laptop", ip_address("10.4.0.1"))
    world.etcd.put(RECORD, encode(PeerRecord(public_key=PUBLIC, allowed_ips=(ip_network("10.4.0.1/32"),))))
    world.etcd.put(claim, "")
    await refused(world, "mesh addresses that others claimed before: 10.4.0.1 of node gcp-1; say --yes")
    desired = DesiredPeer(name="laptop", public_key=PUBLIC, replace=True, clean_up=False)
    (address,) = (await PeerRegistration(world.client, KEYS, desired, lambda: None).register()).chosen
    assert world.record().allowed_ips == (ip_network(address),)
    assert world.etcd.keys("/kilo/peer-addresses/") == [KEYS.peer_address("laptop", address)]


async def test_what_cannot_be_is_refused_in_one_sentence_and_nothing_is_written(world: World) -> None:
    await refused(world, "there is no mesh under /kilo yet")
    await world.build()
    await refused(world, "gcp-1 is a node of this mesh already", name="gcp-1")
    await refused(
        world,
        "overlaps the mesh's subnet 10.4.0.0/16",
        allowed_ips=(ip_network("10.9.0.2/32"), ip_network("10.4.0.0/24")),
    )
    await refused(world, "10.4.0.1 is claimed by node gcp-1 already", allowed_ips=(ip_network("10.4.0.1/32"),))
    await refused(world, "names no single address", allowed_ips=(ip_network("10.9.0.0/24"),))
    tablet = PeerRecord(public_key=key_of(20), allowed_ips=(ip_network("10.9.0.0/24"),))
    await world.client.put(KEYS.peer("tablet"), encode(tablet))
    await refused(world, "overlaps 10.9.0.0/24 of peer tablet", allowed_ips=(ip_network("10.9.0.2/32"),),
                  name="zenbook")  # fmt: skip
    await refused(world, "registered with another public key", name="tablet")
    await refused(world, "public key is that of node gcp-1", public_key=key_of(1))
    own = encode(PeerRecord(public_key=PUBLIC, allowed_ips=(ip_network("10.8.0.2/32"),)))
    await world.client.put(RECORD, own)
    await refused(world, "is registered with 10.8.0.2/32; leave --allowed-ips out",
                  allowed_ips=(ip_network("10.8.0.3/32"),))  # fmt: skip
    await world.client.put(RECORD, "nonsense")
    await refused(world, "which cannot be read")


async def test_yes_replaces_a_record_that_is_somebody_elses(world: World) -> None:
    await world.build()
    await world.client.put(RECORD, encode(PeerRecord(public_key=key_of(20), allowed_ips=(ip_network("10.9.0.2/32"),))))
    registration = PeerRegistration(
        world.client, KEYS, DesiredPeer(name="laptop", public_key=PUBLIC, replace=True), lambda: None
    )
    await registration.register()
    assert (world.record().public_key, world.record().allowed_ips) == (PUBLIC, (ip_network("10.9.0.2/32"),))
    await registration.withdraw()
    assert world.etcd.get(RECORD) is None


async def test_a_lease_that_etcd_refuses_to_end_keeps_nothing_of_the_machine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host can put a key of its own under the lease; the record and the claim are deleted all the same."""

    async def refuse(_lease_id: int) -> None:
        await trio.lowlevel.checkpoint()
        raise PermissionDenied("may not revoke the lease")

    monkeypatch.setattr(world.client, "revoke_lease", refuse)
    async with connected(world):
        held = world.etcd.data[RECORD.encode()]
        world.etcd.put("/kilo/by/gcp-1/x", "", lease=held.lease)
    assert nothing_is_left(world), world.etcd.keys("/")
    assert "/kilo/by/gcp-1/x" in world.etcd


async def test_the_leftover_of_a_run_that_crashed_is_taken_over_and_goes_at_the_end(world: World) -> None:
    await world.build()
    desired = DesiredPeer(name="laptop", public_key=PUBLIC)
    first = await PeerRegistration(world.client, KEYS, desired, lambda: None).register()
    await trio.sleep(200)
    second = PeerRegistration(world.client, KEYS, desired, lambda: None)
    before = world.etcd.data[RECORD.encode()]
    assert (await second.register()).record == first.record
    # The machine may have booted with a clock that went back: to the nodes it is a new peer.
    assert world.etcd.data[RECORD.encode()].create_revision > before.create_revision
    async with trio.open_nursery() as nursery:
        nursery.start_soon(second.keep)
        await trio.sleep(2 * LEASE_SECONDS)
        assert world.etcd.get(RECORD) is not None
        nursery.cancel_scope.cancel()
    await second.withdraw()
    assert not any("peers/" in key for key in world.etcd.keys("/"))


async def test_a_name_that_was_taken_over_once_is_not_taken_again_when_the_clock_goes_back(world: World) -> None:
    other = PeerRecord(public_key=key_of(99), allowed_ips=(ip_network("10.4.0.60/32"),))
    await put_kept(world.etcd.client(), RECORD, encode(other))
    off = 3600.0
    world.host.clock = lambda: trio.current_time() + off
    transact = world.client.txn

    async def txn(*args: Any, **kwargs: Any) -> TxnResult:
        result = await transact(*args, **kwargs)
        if off == 0.0 and RECORD not in world.etcd:
            # The other machine is faster.
            await put_kept(world.etcd.client(), RECORD, encode(other))
        return result

    world.client.txn = txn  # type: ignore[method-assign]

    async def connect() -> None:
        nonlocal off
        async with connected(world, replace=True):
            await trio.sleep(30)
            assert world.record().public_key == PUBLIC
            off = 0.0
            await trio.sleep(60)

    with pytest.raises(BaseExceptionGroup) as caught:
        await connect()
    assert caught.group_contains(Failure, match="another machine has taken the name", depth=None)
    assert world.record().public_key == key_of(99)


async def test_no_two_machines_choose_one_address_and_none_a_nodes(world: World) -> None:
    client = world.etcd.client()
    await client.put("/kilo/mesh/subnets", "10.4.0.0/29")
    await client.put("/kilo/mesh/granularity", "location")
    await add_node(world.etcd, "gcp-1", 1, "gcp")
    made = [
        PeerRegistration(
            world.etcd.client(), KEYS, DesiredPeer(name=f"laptop-{n}", public_key=key_of(100 + n)), lambda: None
        )
        for n in range(5)
    ]
    async with trio.open_nursery() as nursery:
        for registration in made:
            nursery.start_soon(registration.register)
    chosen = [
        peer_registration.decision.chosen[0] for peer_registration in made if peer_registration.decision is not None
    ]
    assert sorted(map(str, chosen)) == [f"10.4.0.{n}" for n in range(2, 7)]
    await refused(world, "no address is left for this machine in 10.4.0.0/29")


@pytest.mark.parametrize(
    ("errors", "ends"),
    [
        ([Failure("one"), key_file.KeyFileError("two")], Failure),
        ([KeyboardInterrupt()], KeyboardInterrupt),
        ([click.exceptions.Exit(3)], click.exceptions.Exit),
        ([KeyboardInterrupt(), Failure("one")], Failure),
    ],
)
def test_errors_in_a_group_end_the_command_as_errors_alone_do(
    errors: list[BaseException], ends: type[BaseException]
) -> None:
    async def work() -> None:
        await trio.lowlevel.checkpoint()
        raise BaseExceptionGroup("", errors)

    with pytest.raises(ends):
        run_here(work)
