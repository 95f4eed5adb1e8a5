"""The mirror against the in-memory etcd, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from store_world import KEYS, record

from helpers import eventually
from kilo_etcd.etcd.api import Header
from kilo_etcd.model import EncryptionStage, Granularity, InternalIPs, Snapshot
from kilo_etcd.store.mirror import ClusterNotTrusted, LastSeen, Mirror
from kilo_etcd.store.records import encode, encode_adoption
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd

pytestmark = pytest.mark.autojump


def seeded() -> FakeEtcd:
    etcd = FakeEtcd()
    etcd.put(KEYS.granularity, "location")
    etcd.put(KEYS.subnets, "10.4.0.0/16")
    node(etcd, "a", 1)
    return etcd


def node(etcd: FakeEtcd, name: str, number: int) -> int:
    etcd.put(KEYS.node(name), encode(record(name)))
    return etcd.put(f"/kilo/by/{name}/addresses/10.4.0.{number}", "")


@asynccontextmanager
async def mirrored(etcd: FakeEtcd, client: FakeClient | None = None, **options: Any) -> AsyncIterator[Mirror]:
    mirror = Mirror(client or etcd.client(), KEYS, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        yield mirror
        nursery.cancel_scope.cancel()


async def newer(mirror: Mirror, than: Snapshot | None, seconds: float = 60) -> Snapshot:
    with trio.fail_after(seconds):
        return await mirror.wait_newer(than)


async def test_a_listing_then_each_change_at_once() -> None:
    etcd = seeded()
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        assert (first.revision, set(first.nodes)) == (etcd.revision, {"a"})
        assert mirror.connected
        await trio.sleep(1)
        started = trio.current_time()
        revision = etcd.put(KEYS.location("a"), "gcp")
        second = await newer(mirror, first)
        assert trio.current_time() == started
        assert (second.revision, second.nodes["a"].location) == (revision, "gcp")
        kv = mirror.kv(KEYS.location("a"))
        assert kv is not None
        assert kv.value == b"gcp"


async def test_a_burst_is_a_few_snapshots_in_order_and_the_last_is_whole() -> None:
    etcd = seeded()
    seen: list[Snapshot] = []
    async with mirrored(etcd) as mirror, trio.open_nursery() as nursery:

        async def follow() -> None:
            last = None
            while True:
                last = await mirror.wait_newer(last)
                seen.append(last)

        nursery.start_soon(follow)
        await eventually(lambda: seen)
        await trio.sleep(1)
        for i in range(2, 102):
            node(etcd, f"n{i}", i)
            await trio.sleep(0.001)
        await eventually(lambda: len(seen[-1].nodes) == 101)
        nursery.cancel_scope.cancel()
    assert len(seen) <= 8
    revisions = [snapshot.revision for snapshot in seen]
    assert revisions == sorted(set(revisions))


async def test_many_writes_at_one_moment_are_one_snapshot() -> None:
    etcd = seeded()
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        await trio.sleep(1)
        for i in range(2, 52):
            node(etcd, f"n{i}", i)
        assert len((await newer(mirror, first)).nodes) == 51


async def test_etcd_away_keeps_the_last_snapshot_and_comes_back() -> None:
    etcd = seeded()
    client = etcd.client()
    async with mirrored(etcd, client) as mirror:
        first = await newer(mirror, None)
        client.cut()
        await eventually(lambda: not mirror.connected, 20)
        assert mirror.current is first
        assert mirror.trouble == "etcd is out of reach: no endpoint of etcd answered"
        assert mirror.disconnected_since is not None
        node(etcd, "b", 2)
        await trio.sleep(30)
        assert mirror.current is first
        client.mend()
        assert set((await newer(mirror, first)).nodes) == {"a", "b"}
        await eventually(lambda: mirror.connected, 20)
        assert mirror.trouble is None


async def test_it_starts_while_etcd_is_away() -> None:
    etcd = seeded()
    etcd.down()
    async with mirrored(etcd) as mirror:
        await trio.sleep(100)
        assert mirror.current is None
        assert not mirror.connected
        etcd.up()
        assert set((await newer(mirror, None, 10)).nodes) == {"a"}


async def test_a_watch_that_breaks_is_replaced() -> None:
    etcd = seeded()
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        etcd.drop_watches()
        node(etcd, "b", 2)
        assert set((await newer(mirror, first)).nodes) == {"a", "b"}


async def test_compaction_while_cut_off_means_listing_again() -> None:
    etcd = seeded()
    client = etcd.client()
    async with mirrored(etcd, client) as mirror:
        first = await newer(mirror, None)
        client.cut()
        node(etcd, "b", 2)
        etcd.delete(KEYS.node("a"))
        etcd.compact()
        client.mend()
        assert set((await newer(mirror, first)).nodes) == {"b"}


async def test_subnets_that_a_relisting_brings_make_nodes_of_those_who_had_claimed() -> None:
    etcd = FakeEtcd()
    node(etcd, "a", 1)
    client = etcd.client()
    async with mirrored(etcd, client) as mirror:
        first = await newer(mirror, None)
        assert not first.nodes
        client.cut()
        etcd.put(KEYS.granularity, "full")
        etcd.put(KEYS.subnets, "10.4.0.0/16")
        etcd.compact()
        client.mend()
        second = await newer(mirror, first)
        assert second.granularity is Granularity.FULL
        assert set(second.nodes) == {"a"}


async def test_relisting_finds_what_a_watch_missed() -> None:
    etcd = seeded()
    async with mirrored(etcd, relist_period=60) as mirror:
        first = await newer(mirror, None)
        await trio.sleep(1)
        # Behind the watch's back: what a fault in etcd or in the client would look like.
        etcd.put(KEYS.location("a"), "gcp")
        etcd._log.pop()
        second = await newer(mirror, first, 100)
        assert second.nodes["a"].location == "gcp"
        assert second.revision == etcd.revision
        await trio.sleep(500)
        assert mirror.current is second


@pytest.mark.parametrize("empty", [True, False])
async def test_another_cluster_is_not_followed_until_adopted(empty: bool) -> None:
    etcd = seeded()
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        etcd.replace_cluster(keep_data=not empty)
        await eventually(lambda: mirror.untrusted_reason, 20)
        assert "another cluster" in str(mirror.untrusted_reason)
        node(etcd, "b", 2)
        # Another cluster's adoption, as a backup may hold one, is none of this one.
        etcd.put(KEYS.adopted, encode_adoption(etcd.cluster_id - 1, "2026-11-01T00:00:00Z"))
        await trio.sleep(100)
        assert mirror.current is first
        etcd.put(KEYS.adopted, encode_adoption(etcd.cluster_id, "2026-11-24T00:00:00Z"))
        second = await newer(mirror, first, 10)
        assert set(second.nodes) == ({"b"} if empty else {"a", "b"})
        assert second.cluster_id == etcd.cluster_id
        assert mirror.untrusted_reason is None
        etcd.put(KEYS.granularity, "full")
        await eventually(lambda: mirror.current and mirror.current.granularity is Granularity.FULL)


async def test_a_restored_backup_of_the_same_cluster_is_not_followed() -> None:
    etcd = seeded()
    for i in range(50):
        etcd.put(KEYS.location("a"), f"l{i}")
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        etcd.replace_cluster(etcd.cluster_id, keep_data=True)
        await eventually(lambda: mirror.untrusted_reason, 20)
        assert "its revision is 6, it was 55" in str(mirror.untrusted_reason)
        assert mirror.current is first


async def test_an_etcd_that_went_back_is_not_followed_when_it_has_grown() -> None:
    etcd = seeded()
    for i in range(50):
        etcd.put(KEYS.location("a"), f"l{i}")
    right = etcd.backup()
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        etcd.replace_cluster(etcd.cluster_id, keep_data=True)
        await eventually(lambda: mirror.untrusted_reason, 20)
        for i in range(100):
            etcd.put("/elsewhere", str(i))
        await trio.sleep(100)
        assert mirror.current is first
        assert "its revision is 6, it was 55" in str(mirror.untrusted_reason)
        # Nor if its history cannot be read any more.
        etcd.compact()
        await trio.sleep(100)
        assert mirror.untrusted_reason is not None
        # The right one is.
        etcd.restore(right)
        for i in range(60):
            etcd.put("/elsewhere", str(i))
        await eventually(lambda: mirror.untrusted_reason is None, 20)
        assert mirror.generation == 1
        etcd.put(KEYS.location("a"), "gcp")
        assert (await newer(mirror, first)).nodes["a"].location == "gcp"


@pytest.mark.parametrize("silent", [True, False])
async def test_a_restored_backup_that_has_grown_before_it_was_looked_at_is_not_followed(silent: bool) -> None:
    etcd = seeded()
    saved = etcd.backup()
    for i in range(50):
        etcd.put(KEYS.location("a"), f"l{i}")
    right = etcd.backup()
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        etcd.down()
        etcd.restore(saved)
        for i in range(100):
            etcd.put("/elsewhere" if silent else KEYS.location("b"), str(i))
        etcd.up()
        await eventually(lambda: mirror.untrusted_reason, 20)
        assert "etcd went back in time: its history is another one than before" in str(mirror.untrusted_reason)
        with pytest.raises(ClusterNotTrusted):
            await mirror.verify()
        await trio.sleep(100)
        assert mirror.current is first
        etcd.restore(right)
        await eventually(lambda: mirror.untrusted_reason is None, 20)
        assert mirror.generation == 1


async def test_nothing_is_written_to_a_restored_backup_that_has_grown_before_it_was_looked_at() -> None:
    etcd = seeded()
    saved = etcd.backup()
    etcd.put(KEYS.location("a"), "gcp")
    async with mirrored(etcd) as mirror:
        await newer(mirror, None)
        etcd.restore(saved)
        for i in range(100):
            etcd.put("/elsewhere", str(i))
        with pytest.raises(ClusterNotTrusted, match="its history is another one"):
            await mirror.verify()


@pytest.mark.parametrize("compacted", [True, False])
async def test_a_newest_key_that_is_deleted_or_written_again_is_no_other_history(compacted: bool) -> None:
    etcd = seeded()
    etcd.put(KEYS.location("a"), "gcp")
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        for again in (False, True):
            etcd.down()
            etcd.delete(KEYS.location("a"))
            if again:
                etcd.put(KEYS.location("a"), "home")
            if compacted:
                etcd.compact()
            etcd.up()
            await mirror.verify()
            first = await newer(mirror, first)
            await trio.sleep(30)
            assert mirror.untrusted_reason is None
            assert first.nodes["a"].location == ("home" if again else "")
        assert mirror.generation == 0


@pytest.mark.parametrize("compacted", [True, False])
async def test_what_the_disk_remembers_guards_against_one_that_has_grown_since(compacted: bool) -> None:
    etcd = seeded()
    header = Header(revision=1, cluster_id=etcd.cluster_id, raft_term=1)
    kv = next(kv for kv in etcd.data.values() if kv.mod_revision == etcd.revision)
    etcd.put(kv.key, kv.value)
    if compacted:
        etcd.compact()
    # The right one is followed, even if the key has been written since and nothing tells what was before.
    for known in ((kv.key, kv.mod_revision), (kv.key, kv.mod_revision + 1)):
        async with mirrored(etcd, last_seen=LastSeen(header=header, newest=known)) as mirror:
            await newer(mirror, None)
    etcd.put(kv.key, kv.value)
    async with mirrored(etcd, last_seen=LastSeen(header=header, newest=(b"/kilo/other", etcd.revision))) as mirror:
        await eventually(lambda: mirror.untrusted_reason, 20)
        assert "etcd went back in time: its history is another one than before" in str(mirror.untrusted_reason)
        etcd.put(KEYS.adopted, encode_adoption(etcd.cluster_id, "2026-11-24T01:00:00Z"))
        await newer(mirror, None)


async def test_an_adoption_counts_once() -> None:
    etcd = seeded()
    said = encode_adoption(etcd.cluster_id, "2026-11-24T00:00:00Z")
    etcd.put(KEYS.adopted, said)
    for i in range(50):
        etcd.put(KEYS.location("a"), f"l{i}")
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        # The backup has the adoption that everyone knew already.
        etcd.replace_cluster(etcd.cluster_id, keep_data=True)
        await eventually(lambda: mirror.untrusted_reason, 20)
        await trio.sleep(100)
        assert mirror.current is first
        etcd.put(KEYS.adopted, encode_adoption(etcd.cluster_id, "2026-11-24T01:00:00Z"))
        second = await newer(mirror, first, 10)
        assert second.revision == etcd.revision < first.revision
        assert second.rejected == ()


async def test_it_follows_again_when_the_right_cluster_is_back() -> None:
    etcd = seeded()
    right = etcd.cluster_id
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        etcd.cluster_id = 99
        await eventually(lambda: mirror.untrusted_reason, 20)
        etcd.cluster_id = right
        await eventually(lambda: mirror.untrusted_reason is None, 20)
        node(etcd, "b", 2)
        assert set((await newer(mirror, first)).nodes) == {"a", "b"}


async def test_what_the_disk_remembers_guards_the_first_listing() -> None:
    etcd = seeded()
    remembered = LastSeen(header=Header(revision=900, cluster_id=etcd.cluster_id, raft_term=1))
    async with mirrored(etcd, last_seen=remembered) as mirror:
        await eventually(lambda: mirror.untrusted_reason, 20)
        assert mirror.current is None
        etcd.put(KEYS.adopted, encode_adoption(etcd.cluster_id, "2026-11-24T01:00:00Z"))
        assert set((await newer(mirror, None)).nodes) == {"a"}


async def test_an_adoption_that_the_disk_knows_does_not_count_again() -> None:
    etcd = seeded()
    said = encode_adoption(etcd.cluster_id, "2026-11-24T01:00:00Z")
    etcd.put(KEYS.adopted, said)
    header = Header(revision=900, cluster_id=etcd.cluster_id, raft_term=1)
    async with mirrored(etcd, last_seen=LastSeen(header=header, adopted=said.encode())) as mirror:
        await trio.sleep(100)
        assert "its revision is 6, it was 900" in str(mirror.untrusted_reason)
        etcd.put(KEYS.adopted, encode_adoption(etcd.cluster_id, "2026-11-24T02:00:00Z"))
        assert set((await newer(mirror, None)).nodes) == {"a"}
    # One that it did not know, however long ago it was made, does.
    async with mirrored(etcd, last_seen=LastSeen(header=header, adopted=said.encode())) as mirror:
        assert set((await newer(mirror, None, 1)).nodes) == {"a"}


async def test_who_wants_to_write_is_told_at_once_that_etcd_was_replaced() -> None:
    etcd = seeded()
    async with mirrored(etcd) as mirror:
        first = await newer(mirror, None)
        await mirror.verify()
        etcd.replace_cluster()
        with pytest.raises(ClusterNotTrusted, match=r"another cluster now .* kgctl mesh adopt"):
            await mirror.verify()
        with pytest.raises(ClusterNotTrusted):
            mirror.check()
        etcd.put(KEYS.adopted, encode_adoption(etcd.cluster_id, "2026-11-24T02:00:00Z"))
        assert (await newer(mirror, first, 20)).cluster_id == etcd.cluster_id
        await mirror.verify()


async def test_an_answer_that_a_newer_one_overtook_is_no_step_back_in_time() -> None:
    """`verify` compares with what was known when it asked, although the mirror sees a later revision meanwhile."""
    etcd = seeded()
    etcd.delay = 0.5
    async with mirrored(etcd, probe_period=1.0) as mirror:
        await newer(mirror, None)

        async def verify() -> None:
            for _ in range(200):
                await mirror.verify()
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(verify)
            nursery.start_soon(verify)
            for number in range(100):
                etcd.put(KEYS.location("a"), f"l{number}")
                await trio.sleep(0.7)
        assert mirror.untrusted_reason is None


async def test_a_latecomer_finds_the_last_good_settings_in_history() -> None:
    etcd = seeded()
    etcd.put(KEYS.granularity, "cross")
    etcd.put(KEYS.granularity, "crosss")
    etcd.put(KEYS.subnets, "everything")
    etcd.put(KEYS.internal_ips, "encrypted")
    etcd.put(KEYS.internal_ips, "all")
    async with mirrored(etcd) as mirror:
        snapshot = await newer(mirror, None)
    assert snapshot.granularity is Granularity.CROSS
    assert snapshot.internal_ips is InternalIPs.ENCRYPTED
    assert set(snapshot.nodes) == {"a"}
    assert {note.key for note in snapshot.rejected} == {KEYS.granularity, KEYS.subnets, KEYS.internal_ips}


async def test_a_latecomer_without_history_says_what_those_say_that_have_followed() -> None:
    """`encrypted` is misspelt, and history compacted: nodes that encrypt keep it in force for all."""
    etcd = seeded()
    etcd.put(KEYS.internal_ips, "encrypted")
    async with mirrored(etcd) as mirror:
        await newer(mirror, None)
        etcd.put(KEYS.node("a"), encode(record("a", encryption=EncryptionStage.SENDS)))
        etcd.put(KEYS.internal_ips, "encrypted-please")
        etcd.compact()
        await trio.sleep(10)
        async with mirrored(etcd) as late:
            snapshot = await newer(late, None)
            assert mirror.current == snapshot
            assert snapshot.internal_ips is InternalIPs.ENCRYPTED


async def test_a_quiet_etcd_is_only_read_now_and_then() -> None:
    etcd = seeded()
    client = etcd.client()
    async with mirrored(etcd, client) as mirror:
        await newer(mirror, None)
        revision = etcd.revision
        client.calls.clear()
        await trio.sleep(600)
        assert etcd.revision == revision
        assert len(client.calls) < 160
        assert set(client.calls) == {"range"}
