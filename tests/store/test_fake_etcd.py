"""The in-memory etcd says what a real one says: one exercise, two transcripts, compared."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from helpers import require
from kilo_etcd.etcd.api import (
    Client,
    Compacted,
    Compare,
    CompareTarget,
    Delete,
    EtcdError,
    Get,
    Is,
    KeyValue,
    LeaseNotFound,
    Op,
    Put,
    RangeResult,
    Unavailable,
    absent,
    prefix_end,
    unchanged,
)
from kilo_etcd.etcd.client import open_client
from kilo_etcd.testing.etcd_server import EtcdServer
from kilo_etcd.testing.fake_etcd import FakeEtcd


async def exercise(client: Client) -> list[object]:
    """Everything that the store asks of etcd; what came back, with revisions counted from the start."""
    result: list[object] = []
    base = (await client.put("/x/start", "0")).header.revision

    def shown(kv: KeyValue | None) -> object:
        if kv is None:
            return None
        return kv.key, kv.value, kv.create_revision - base, kv.mod_revision - base, kv.version, bool(kv.lease)

    async def txn(compare: list[Compare], success: list[Op], failure: list[Op] = []) -> None:  # noqa: B006
        try:
            done = await client.txn(compare, success, failure)
        except EtcdError as error:
            result.append(type(error))
            return
        ranges = [[shown(kv) for kv in r.kvs] for r in done.responses if isinstance(r, RangeResult)]
        result.append((done.succeeded, len(done.responses), done.header.revision - base, ranges))

    await txn([absent("/x/a")], [Put("/x/a", "1")], [Get("/x/a")])
    await txn([absent("/x/a")], [Put("/x/a", "2")], [Get("/x/a")])
    await txn([], [Get("/x/", prefix_end("/x/")), Get("/nothing")])
    await txn([Compare("/nothing", CompareTarget.VALUE, Is.EQUAL, b"")], [], [Get("/x/a")])
    await txn([Compare("/nothing", CompareTarget.VALUE, Is.NOT_EQUAL, b"z")], [Put("/x/ne", "1")])
    await txn([Compare("/nothing", CompareTarget.VERSION, Is.LESS, 1)], [Put("/x/b", "1"), Put("/x/c", "1")])
    await txn([Compare("/x/b", CompareTarget.MOD, Is.GREATER, base)], [Delete("/x/b"), Put("/x/d", "1")])
    await txn([Compare("/x/c", CompareTarget.LEASE, Is.EQUAL, 0)], [Delete("/x/gone")])
    await txn([], [Put("/x/e", "1"), Put("/x/e", "2")])
    await txn([], [Put("/x/e", "1"), Delete("/x/", prefix_end("/x/"))])
    await txn([], [Put(f"/x/many/{i}", "") for i in range(129)])
    await txn([], [Put("/x/lease", "", 12345)])
    kv = await client.get("/x/a")
    assert kv is not None
    await client.put("/x/a", "3")
    await txn([unchanged(kv)], [Put("/x/a", "4")])
    result.append(shown(await client.get("/x/a")))
    result.append([shown(kv) for kv in (await client.range("/x/a", revision=kv.mod_revision)).kvs])
    result.append((await client.range("/x/", prefix_end("/x/"), count_only=True)).count)
    keys_only = await client.range("/x/", prefix_end("/x/"), keys_only=True, limit=2)
    result.append(([shown(kv) for kv in keys_only.kvs], keys_only.more))

    lease = await client.grant_lease(60)
    await client.put("/x/l1", "1", lease=lease.id)
    created = (await client.get("/x/l1")) or kv
    other = await client.grant_lease(1)
    result.append((lease.ttl, other.ttl))
    await client.put("/x/l1", "1", lease=other.id)
    result.append(shown(await client.get("/x/l1")))
    info = await client.lease_time_to_live(other.id, keys=True)
    result.append((info.granted_ttl, info.keys, 0 <= info.ttl <= 2))
    await client.revoke_lease(lease.id)
    result.append((await client.get("/x/l1")) is not None)
    result.append((await client.lease_time_to_live(lease.id)).ttl)
    for call in (client.refresh_lease(lease.id), client.revoke_lease(lease.id)):
        with pytest.raises(LeaseNotFound):
            await call
    async with client.watch_prefix("/x/", start_revision=base + 1) as watch:
        events: list[object] = []
        async for batch in watch:
            events += [(event.type, shown(event.kv)) for event in batch.events]
            if any(event.kv.key == b"/x/l1" and event.type.name == "DELETE" for event in batch.events):
                break
    result.append(events)
    assert created.mod_revision > base
    return result


@pytest.mark.etcd
async def test_it_says_what_a_real_etcd_says() -> None:
    require("etcd")
    async with EtcdServer.run() as server, open_client(server.config()) as client:
        real = await exercise(client)
    fake = await exercise(FakeEtcd().client())
    for ours, theirs in zip(fake, real, strict=True):
        assert ours == theirs


@pytest.mark.autojump
async def test_faults() -> None:
    etcd = FakeEtcd()
    client, other = etcd.client("one"), etcd.client("two")
    client.cut()
    with pytest.raises(Unavailable):
        await client.get("/x")
    await other.put("/x", "1")
    client.mend()
    client.lose_answer()
    with pytest.raises(Unavailable):
        await client.put("/x", "2")
    assert etcd.get("/x") == b"2"
    etcd.compact()
    with pytest.raises(Compacted):
        await client.range("/x", revision=1)
    with pytest.raises(Compacted):
        async with client.watch("/x", start_revision=1) as watch:
            await anext(watch)
    lease = await client.grant_lease(5)
    await client.put("/l", "1", lease=lease.id)
    etcd.down()
    await trio.sleep(60)
    etcd.up()
    assert "/l" in etcd, "leases stand still without a quorum"
    started = trio.current_time()
    async with client.watch("/l") as watch:
        batch = await anext(watch)
    assert (batch.events[0].type.name, trio.current_time() - started) == ("DELETE", 5)


@pytest.mark.autojump
async def test_a_watch_does_not_count_the_revisions_of_another_cluster() -> None:
    etcd = FakeEtcd(cluster_id=1)
    client = etcd.client()
    async with client.watch("/x") as watch, trio.open_nursery() as nursery:
        seen: list[object] = []

        async def read() -> None:
            seen.append((await anext(watch)).events[0].kv.value)

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        mesh = etcd.backup()
        etcd.replace_cluster(2)
        for _ in range(20):
            etcd.put("/y", "")
        # Whoever is cut off has been told all there was, there too.
        client.cut()
        etcd.restore(mesh)
        etcd.put("/x", "1")
        etcd.put("/y", "2")
        client.mend()
    assert seen == [b"1"]
