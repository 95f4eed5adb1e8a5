"""A host with another name than before finds its own key in etcd: what it takes over, and from whom it does not."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
import trio
from attrs import evolve
from store_world import KEYS, record, wg_key

from kilo_etcd.etcd.api import Compare, Get, KeyValue, Op, PermissionDenied, Put, TxnResult, Unavailable
from kilo_etcd.model import CandidateClass
from kilo_etcd.store.claims import Leases
from kilo_etcd.store.records import StatusRecord, decode_node, decode_status, encode
from kilo_etcd.store.session.former_names import FormerName, Moved, move
from kilo_etcd.store.session.node_identity import NameTaken
from kilo_etcd.store.session.session import Session
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd

pytestmark = pytest.mark.autojump
SUBNETS = (ip_network("10.4.0.0/16"),)
HOST = wg_key("host")
LONG = "old.example.net"


def session(client: FakeClient, name: str, key: str = HOST, **options: Any) -> Session:
    return Session(client, KEYS, name, key, **options)


async def joined(etcd: FakeEtcd, name: str = "old", key: str = HOST, **fields: Any) -> Session:
    """A host that has registered and leads gcp; nothing keeps its leases."""
    it = session(etcd.client(), name, key)
    await it.claim_addresses(SUBNETS)
    await it.register(record(name, public_key=key, location="gcp", **fields))
    await it.enter("gcp", CandidateClass.PUBLIC)
    assert await it.record_leader("gcp", known_revision=0)
    return it


async def renamed(etcd: FakeEtcd, name: str = LONG, client: FakeClient | None = None) -> tuple[Session, Moved]:
    it = session(client or etcd.client(), name)
    return it, await it.take_over({"old": None})


def test_what_is_moved() -> None:
    value = encode(record("old", mesh_addresses=(ip_interface("10.4.0.7/16"),)))
    below = [
        KeyValue(key=key.encode(), value=value if key == KEYS.node("old") else b"")
        for key in (
            KEYS.node("old"),
            KEYS.address("old", ip_address("10.4.0.7")),
            KEYS.address("old", ip_address("10.4.0.8")),
            KEYS.election("gcp", "old"),
            KEYS.leader("gcp", "old"),
            KEYS.endpoint("x", "old"),
        )
    ]
    former = FormerName.of(KEYS, "old", below, None)
    writes = move(KEYS, former, "new", long=1, short=2, claims=Leases(reservation=3), status=b"s", label="gcp")
    said = record("old", mesh_addresses=(ip_interface("10.4.0.7/16"),), former_names=("old",), location="gcp")
    assert writes[2:] == [
        Put(KEYS.node("new"), encode(said), lease=1),
        Put(KEYS.status("new"), b"s", lease=2),
        Put(KEYS.reservation("new"), b"", lease=3),
        Put(KEYS.address("new", ip_address("10.4.0.7")), b""),
        Put(KEYS.leader("gcp", "new"), b"", lease=1),
    ]


async def test_a_renamed_host_has_its_record_and_its_address_under_its_new_name() -> None:
    etcd = FakeEtcd()
    before = await joined(etcd)
    await before.resign()
    (claim,) = etcd.keys(KEYS.addresses("old"))
    it, moved = await renamed(etcd)
    assert moved == Moved(names=("old",))
    assert etcd.keys("/kilo/by/old/") == etcd.keys("/kilo-status/by/old/") == []
    assert await it.claim_addresses(SUBNETS, doubted=True) == before.addresses
    await it.register(record("old", public_key=HOST, location="gcp"))
    assert etcd.keys("/kilo/by/") == [
        claim.replace("/old/", f"/{LONG}/"), KEYS.leader("gcp", LONG), KEYS.node(LONG), KEYS.reservation(LONG),
    ]  # fmt: skip
    leases = etcd.leases()
    assert leases[etcd.data[KEYS.node(LONG).encode()].lease] == 86400
    assert leases[etcd.data[KEYS.leader("gcp", LONG).encode()].lease] == 86400
    assert leases[etcd.data[KEYS.reservation(LONG).encode()].lease] == 9 * 86400 // 4
    assert leases[etcd.data[KEYS.status(LONG).encode()].lease] == 5
    assert decode_status(etcd.get(KEYS.status(LONG)) or b"").public_key == HOST

    # A restart finds all of it and writes nothing.
    revision = etcd.revision
    again = session(etcd.client(), LONG)
    await again.claim_addresses(SUBNETS)
    await again.register(record("old", public_key=HOST, location="gcp"))
    assert etcd.revision == revision
    assert again.addresses == before.addresses


async def test_the_status_of_the_run_before_is_waited_for() -> None:
    """As after a crash, or a reload after hostnamectl."""
    etcd = FakeEtcd()
    await joined(etcd)
    _, moved = await renamed(etcd)
    assert moved.names == ("old",)
    assert 4 < trio.current_time() <= 6


async def test_a_host_that_lives_keeps_its_place_against_a_copy_of_its_disk() -> None:
    etcd = FakeEtcd()
    async with trio.open_nursery() as nursery:
        original = await joined(etcd)
        await nursery.start(original.run)
        revision = etcd.revision
        it, moved = await renamed(etcd)
        assert moved == Moved(living=("old",), beside=("old",))
        assert etcd.revision == revision, "nothing was written"
        assert trio.current_time() < 10
        await it.claim_addresses(SUBNETS)
        await it.register(record("old", public_key=HOST))
        assert original.healthy
        assert it.addresses != original.addresses
        nursery.cancel_scope.cancel()


class Slow(FakeClient):
    """Its first write waits until the others have come as far."""

    barrier: list[trio.Event]

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        if self.barrier and compare:
            own = self.barrier.pop()
            own.set()
            for other in EVENTS:
                await other.wait()
        return await super().txn(compare, success, failure)


EVENTS: list[trio.Event] = []


async def test_of_two_copies_that_start_at_once_one_takes_the_place() -> None:
    etcd = FakeEtcd()
    await (await joined(etcd)).resign()
    EVENTS[:] = [trio.Event(), trio.Event()]
    clients = [Slow(etcd, name) for name in ("one", "two")]
    outcomes: dict[str, Moved] = {}
    hosts: dict[str, Session] = {}

    async def start(name: str, client: FakeClient) -> None:
        hosts[name] = session(client, name)
        outcomes[name] = await hosts[name].take_over({"old": None})
        await hosts[name].claim_addresses(SUBNETS, doubted=bool(outcomes[name].names))
        await hosts[name].register(record(name, public_key=HOST))

    async with trio.open_nursery() as nursery:
        for client, event, name in zip(clients, EVENTS, ("one", "two"), strict=True):
            client.barrier = [event]
            nursery.start_soon(start, name, client)
    winners = [name for name, moved in outcomes.items() if moved.names]
    assert len(winners) == 1
    (loser,) = outcomes.keys() - set(winners)
    assert outcomes[loser] == Moved()
    records = {name: etcd.data[KEYS.node(name).encode()] for name in ("one", "two")}
    assert records[winners[0]].create_revision < records[loser].create_revision
    assert not set(hosts[winners[0]].addresses) & set(hosts[loser].addresses)
    assert etcd.keys("/kilo/by/old/") == []


async def test_a_host_that_lives_under_the_new_name_is_told_before_anything_is_moved() -> None:
    etcd = FakeEtcd()
    await (await joined(etcd)).resign()
    etcd.put_kept(KEYS.node(LONG), encode(record("other")))
    etcd.put_kept(KEYS.status(LONG), encode(StatusRecord(public_key=wg_key("other"))))
    revision = etcd.revision
    with pytest.raises(NameTaken):
        await renamed(etcd)
    assert etcd.revision == revision


async def test_a_dead_hosts_record_at_the_new_name_gives_way() -> None:
    etcd = FakeEtcd()
    await (await joined(etcd)).resign()
    etcd.put(KEYS.node(LONG), encode(record("other")))
    _, moved = await renamed(etcd)
    assert moved.names == ("old",)
    assert decode_node(etcd.get(KEYS.node(LONG)) or b"").public_key == HOST


async def test_a_record_of_its_own_stays_and_the_former_one_goes() -> None:
    """As where an agent of an older version has registered the new name beside the old one."""
    etcd = FakeEtcd()
    await (await joined(etcd)).resign()
    there = await joined(etcd, LONG)
    await there.resign()
    own = {key: kv for key, kv in etcd.data.items() if LONG.encode() in key}
    it, moved = await renamed(etcd)
    assert moved.names == ("old",)
    assert etcd.keys("/kilo/by/old/") == []
    assert {key: kv for key, kv in etcd.data.items() if LONG.encode() in key} == own
    assert await it.claim_addresses(SUBNETS, doubted=True) == there.addresses


async def test_a_name_that_has_another_key_is_left_alone() -> None:
    etcd = FakeEtcd()
    await (await joined(etcd, key=wg_key("other"))).resign()
    revision = etcd.revision
    _, moved = await renamed(etcd)
    assert moved == Moved()
    assert etcd.revision == revision


async def test_nothing_is_taken_while_any_host_with_the_key_lives() -> None:
    etcd = FakeEtcd()
    await (await joined(etcd)).resign()
    etcd.put_kept(KEYS.node("copy"), encode(record("copy", public_key=HOST)))
    etcd.put_kept(KEYS.status("copy"), encode(StatusRecord(public_key=HOST)))
    revision = etcd.revision
    assert await session(etcd.client(), LONG).take_over({"old": None, "copy": None}) == Moved(living=("copy",))
    assert etcd.revision == revision


async def test_one_living_host_is_waited_for_and_no_more() -> None:
    etcd = FakeEtcd()
    await (await joined(etcd)).resign()
    copies = ("copy-1", "copy-2", "copy-3")
    for name in copies:
        etcd.put_kept(KEYS.node(name), encode(record(name, public_key=HOST)))
        etcd.put_kept(KEYS.status(name), encode(StatusRecord(public_key=HOST)))
    it = session(etcd.client(), LONG)
    started = trio.current_time()
    assert await it.take_over(dict.fromkeys(("old", *copies))) == Moved(living=copies)
    assert trio.current_time() - started < 70


async def test_a_status_with_a_long_lease_says_of_no_run_that_it_was_beside_this_one() -> None:
    """It may be left by a run that crashed; the next start takes the name over."""
    etcd = FakeEtcd()
    await (await joined(etcd)).resign()
    lease = (await etcd.client().grant_lease(120)).id
    etcd.put(KEYS.status("old"), encode(StatusRecord(public_key=HOST)), lease=lease)
    assert (await renamed(etcd))[1] == Moved(living=("old",))
    assert (await renamed(etcd))[1] == Moved(names=("old",))


class Confined(FakeClient):
    """Of a user who may write the keys of one name only."""

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        for op in success:
            if not isinstance(op, Get) and "/old/" in str(op.key):
                raise PermissionDenied("etcdserver: permission denied")
        return await super().txn(compare, success, failure)


async def test_what_etcd_does_not_let_the_host_write_stays_and_it_is_said() -> None:
    etcd = FakeEtcd()
    await (await joined(etcd)).resign()
    before = etcd.keys("/kilo/by/")
    it, moved = await renamed(etcd, client=Confined(etcd))
    assert moved.names == ()
    assert "permission denied" in moved.refused
    assert etcd.keys("/kilo/by/") == before
    await it.claim_addresses(SUBNETS)
    await it.register(record("old", public_key=HOST))
    assert etcd.get(KEYS.status(LONG)) is not None


class Forgetful(FakeClient):
    """Loses the answer to the first write that has conditions."""

    lost = False

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        result = await super().txn(compare, success, failure)
        if compare and not self.lost:
            self.lost = True
            raise Unavailable("the connection was lost")
        return result


async def test_an_answer_that_is_lost_changes_nothing() -> None:
    etcd = FakeEtcd()
    before = await joined(etcd)
    await before.resign()
    it = session(Forgetful(etcd), LONG)
    with pytest.raises(Unavailable):
        await it.take_over({"old": None})
    assert await it.take_over({"old": None}) == Moved(names=("old",))
    assert await it.claim_addresses(SUBNETS, doubted=True) == before.addresses
    await it.register(evolve(record("old", public_key=HOST), location="gcp"))
    assert etcd.get(KEYS.status(LONG)) is not None


async def test_a_copy_that_started_while_the_original_was_off_keeps_the_place_and_the_original_gets_another() -> None:
    """Which of the two is the original nobody can tell: a renamed host is the same."""
    etcd = FakeEtcd()
    before = await joined(etcd)
    await before.resign()
    async with trio.open_nursery() as nursery:
        copy, moved = await renamed(etcd, "copy")
        assert moved.names == ("old",)
        await copy.claim_addresses(SUBNETS, doubted=True)
        await copy.register(record("copy", public_key=HOST))
        await nursery.start(copy.run)
        original = session(etcd.client(), "old")
        assert await original.take_over({"copy": None}) == Moved(living=("copy",), beside=("copy",))
        await original.claim_addresses(SUBNETS)
        await original.register(record("old", public_key=HOST))
        assert copy.addresses == before.addresses != original.addresses
        assert copy.healthy
        nursery.cancel_scope.cancel()
