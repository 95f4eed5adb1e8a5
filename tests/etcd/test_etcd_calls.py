"""The client against one real etcd: calls, transactions, leases, watches, cancellation."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from attrs import evolve

from helpers import eventually, require
from helpers_load import soon
from kilo_etcd.etcd.api import (
    BadRequest,
    Compacted,
    Compare,
    CompareTarget,
    Config,
    Delete,
    EventType,
    Get,
    Is,
    LeaseNotFound,
    Put,
    RangeResult,
    Unavailable,
    WatchBatch,
    absent,
    unchanged,
)
from kilo_etcd.etcd.client import EtcdClient, open_client
from kilo_etcd.etcd.watch import Watcher
from kilo_etcd.testing.etcd_server import EtcdServer, ServerOptions

pytestmark = pytest.mark.etcd


@asynccontextmanager
async def etcd(options: ServerOptions | None = None) -> AsyncIterator[tuple[EtcdServer, EtcdClient]]:
    require("etcd", "etcdctl")
    async with EtcdServer.run(options) as server, open_client(server.config()) as client:
        yield server, client


async def test_keys_are_put_read_listed_and_deleted() -> None:
    async with etcd() as (server, client):
        assert await client.get("/none") is None
        put = await client.put("/a/1", "one")
        await client.put("/a/2", b"\xff\0")
        assert put.header.revision > 1
        kv = await client.get("/a/1")
        assert kv
        assert (kv.value, kv.mod_revision, kv.version) == (b"one", put.header.revision, 1)
        assert [kv.key for kv in (await client.get_prefix("/a/")).kvs] == [b"/a/1", b"/a/2"]
        assert (await client.get_prefix("/a/", revision=put.header.revision)).count == 1
        assert (await client.range("/a/", "/a0", count_only=True)).count == 2
        assert (await client.range("/a/", "/a0", keys_only=True, limit=1)).kvs[0].value == b""
        again = await client.put("/a/1", "uno", prev_kv=True)
        assert again.prev_kv
        assert again.prev_kv.value == b"one"
        assert (await server.etcdctl("get", "/a/1")).split() == ["/a/1", "uno"]
        assert (await client.delete("/a/1")).deleted == 1
        assert (await client.delete_prefix("/a/")).deleted == 1
        assert (await client.get_prefix("")).kvs == ()


async def test_a_prefix_larger_than_a_page_is_read_at_one_revision() -> None:
    async with etcd() as (_, client):
        for start in range(0, 1200, 100):
            await client.txn([], [Put(f"/many/{n:05}", "x" * 100) for n in range(start, start + 100)])
        result = await client.get_prefix("/many/")
        assert [kv.key.decode() for kv in result.kvs] == [f"/many/{n:05}" for n in range(1200)]
        assert (result.more, result.count) == (False, 1200)


async def test_transactions_compare_and_swap() -> None:
    async with etcd() as (_, client):
        made = await client.txn([absent("/k")], [Put("/k", "1"), Get("/k")], [Get("/k")])
        assert made.succeeded
        got = made.responses[1]
        assert isinstance(got, RangeResult)
        assert got.kvs[0].value == b"1"
        refused = await client.txn([absent("/k")], [Put("/k", "2")], [Get("/k"), Delete("/none")])
        assert not refused.succeeded
        got = refused.responses[0]
        assert isinstance(got, RangeResult)
        kv = got.kvs[0]
        assert (await client.txn([unchanged(kv)], [Put("/k", "3")])).succeeded
        assert not (await client.txn([unchanged(kv)], [Put("/k", "4")])).succeeded
        for target, value in ((CompareTarget.VERSION, 2), (CompareTarget.VALUE, b"3"), (CompareTarget.LEASE, 0)):
            assert (await client.txn([Compare("/k", target, Is.EQUAL, value)])).succeeded
            assert not (await client.txn([Compare("/k", target, Is.NOT_EQUAL, value)])).succeeded
        assert (await client.txn([Compare("/k", CompareTarget.VERSION, Is.GREATER, 1)])).succeeded


async def test_large_requests_pass_and_too_large_ones_are_refused() -> None:
    async with etcd() as (_, client):
        big = await client.txn([], [Put(f"/big/{n}", b"x" * 10_000) for n in range(120)])
        assert len(big.responses) == 120
        assert sum(len(kv.value) for kv in (await client.get_prefix("/big/")).kvs) == 1_200_000
        with pytest.raises(BadRequest, match="too many operations"):
            await client.txn([], [Put(f"/k{n}", "") for n in range(129)])
        with pytest.raises(BadRequest, match=r"too large|larger than max"):
            await client.put("/k", b"x" * (2 << 20))
        with pytest.raises(BadRequest, match="duplicate key"):
            await client.txn([], [Put("/k", "1"), Put("/k", "2")])
        assert await client.get("/k") is None


async def test_leases_live_and_end() -> None:
    async with etcd() as (_, client):
        lease = await client.grant_lease(60)
        assert (lease.ttl, await client.refresh_lease(lease.id)) == (60, 60)
        await client.put("/leased", "x", lease=lease.id)
        info = await client.lease_time_to_live(lease.id, keys=True)
        assert (info.granted_ttl, info.keys) == (60, (b"/leased",))
        await client.revoke_lease(lease.id)
        assert await client.get("/leased") is None
        assert (await client.lease_time_to_live(lease.id)).ttl == -1
        for call in (
            client.refresh_lease(lease.id),
            client.revoke_lease(lease.id),
            client.put("/k", "", lease=lease.id),
        ):
            with pytest.raises(LeaseNotFound):
                await call
        assert (await client.grant_lease(9, 1234)).id == 1234


async def test_a_lease_is_kept_beyond_its_ttl_and_its_revocation_is_told() -> None:
    async with etcd() as (_, client):
        lease = await client.grant_lease(2)
        async with client.keep_alive(lease.id, lease.ttl) as kept:
            granted = trio.current_time()
            await eventually(lambda: kept.expires_at > granted + 6)
            assert not kept.lost.is_set()
            assert (await client.lease_time_to_live(lease.id)).ttl >= 0
            await client.revoke_lease(lease.id)
            with trio.fail_after(30):
                await kept.lost.wait()


async def test_a_watch_sees_what_happens_after_it_began_and_what_it_asks_for_of_before() -> None:
    async with etcd() as (_, client):
        first = (await client.put("/w/a", "1")).header.revision
        async with client.watch_prefix("/w/") as watch:
            await client.txn([], [Put("/w/a", "2"), Put("/w/b", "2"), Put("/other", "")])
            await client.delete("/w/a")
            batches = [await anext(watch), await anext(watch)]
        events = [(e.type, e.kv.key, e.kv.value) for batch in batches for e in batch.events]
        assert events[:2] == [(EventType.PUT, b"/w/a", b"2"), (EventType.PUT, b"/w/b", b"2")]
        assert events[2][:2] == (EventType.DELETE, b"/w/a")
        assert [batch.revision for batch in batches] == [first + 1, first + 2]
        async with client.watch_prefix("/w/", start_revision=first) as watch:
            batch = await anext(watch)
            assert [e.kv.mod_revision for e in batch.events] == [first, first + 1, first + 1, first + 2]
        async with client.watch("/w/b", start_revision=first) as watch:
            assert len((await anext(watch)).events) == 1


async def test_progress_can_be_asked_for_and_comes_by_itself() -> None:
    options = ServerOptions(arguments=("--experimental-watch-progress-notify-interval", "300ms"))
    async with etcd(options) as (_, client), client.watch_prefix("/p/") as watch:
        await client.put("/elsewhere", "x")
        await watch.request_progress()
        notice = await anext(watch)
        assert notice.events == ()
        revision = (await client.put("/elsewhere", "y")).header.revision
        while notice.revision < revision:
            notice = await anext(watch)
            assert notice.events == ()


async def test_a_compacted_watch_says_so_and_so_does_a_range() -> None:
    async with etcd() as (_, client):
        for n in range(5):
            revision = (await client.put("/c", str(n))).header.revision
        await client.compact(revision)
        async with client.watch("/c", start_revision=2) as watch:
            with pytest.raises(Compacted) as caught:
                await anext(watch)
            assert caught.value.compact_revision == revision
        with pytest.raises(Compacted) as caught:
            await client.range("/c", revision=2)
        assert caught.value.compact_revision == revision


async def test_fragments_of_one_revision_arrive_as_one_batch() -> None:
    async with etcd(ServerOptions(arguments=("--max-request-bytes", str(8 << 20)))) as (server, client):
        await client.txn([], [Put(f"/f/{n}", b"x" * 900_000) for n in range(6)])
        # etcd cuts at its largest request size: with the default one, this transaction is cut in six.
        server.options = ServerOptions()
        await server.restart()
        async with client.watch_prefix("/f/", start_revision=2) as watch:
            assert isinstance(watch, Watcher)
            batch = await anext(watch)
            assert watch.pieces > 1
            assert [len(event.kv.value) for event in batch.events] == [900_000] * 6
            assert len({event.kv.mod_revision for event in batch.events}) == 1
            await client.put("/f/after", "")
            assert (await anext(watch)).events[0].kv.key == b"/f/after"


async def test_a_slow_watch_does_not_hold_up_other_calls_and_gets_all() -> None:
    """40 MB behind one watch that nobody reads: more than the stream's window and the connection's."""
    async with etcd() as (_, client), client.watch_prefix("/slow/") as watch:
        for n in range(40):
            await client.put(f"/slow/{n % 4}", bytes([n]) * 1_000_000)
        lease = await client.grant_lease(3)
        async with client.keep_alive(lease.id, lease.ttl, interval=0.1) as kept:
            began = kept.expires_at
            await eventually(lambda: kept.expires_at > began + 1)
        seen: list[int] = []
        while len(seen) < 40:
            seen += [event.kv.value[0] for event in (await anext(watch)).events]
        assert seen == list(range(40))


async def test_cancelled_calls_leave_the_connection_usable() -> None:
    async with etcd() as (_, client):
        await client.put("/k", b"v" * 500_000)
        before = repr(client)
        for n in range(30):
            with trio.move_on_after(n * 0.0004):
                await client.get("/k")
            with trio.move_on_after(n * 0.0004):
                await client.put("/k", b"v" * 500_000)
        assert await client.get("/k")
        assert repr(client) == before
        assert "0 streams" in before


async def test_a_cancelled_read_of_a_watch_loses_nothing() -> None:
    async with etcd() as (_, client), client.watch_prefix("/x/") as watch:
        seen: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                for n in range(200):
                    await client.put(f"/x/{n}", "")

            nursery.start_soon(write)
            while len(seen) < 200:
                with trio.move_on_after(0.001):
                    seen += [event.kv.key for event in (await anext(watch)).events]
        assert seen == [f"/x/{n}".encode() for n in range(200)]


async def test_many_tasks_share_one_connection() -> None:
    async with etcd() as (_, client):

        async def work(n: int) -> None:
            for _ in range(5):
                await client.put(f"/t/{n}", "")
                assert await client.get(f"/t/{n}")

        async with trio.open_nursery() as nursery:
            for n in range(50):
                nursery.start_soon(work, n)
        assert "retiring" not in repr(client)


async def test_a_quiet_connection_is_not_hung_up_on_for_its_pings() -> None:
    """grpc-go hangs up after three pings in 5 s; a client that pings ten times a second must not give it cause."""
    async with etcd() as (server, _):
        config = evolve(server.config(), ping_interval=0.05, ping_timeout=1.0)
        async with open_client(config) as client, client.watch("/quiet") as watch:
            before = repr(client)
            connection = client._caller.channel._current
            assert connection
            received = connection.last_received
            await eventually(lambda: connection.last_received > received + 2)
            await client.put("/quiet", "")
            assert (await anext(watch)).events
            assert repr(client) == before


async def test_the_client_opens_without_etcd_and_its_error_names_the_endpoint() -> None:
    config = Config(endpoints=("127.0.0.1:1", "[::1]:1"), call_timeout=0.4)
    async with open_client(config) as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: connection refused.*\[::1\]:1: connection refused"):
            await client.get("/k")
        assert client.endpoint is None


async def test_a_body_that_raises_raises_that() -> None:
    with pytest.raises(KeyError):
        async with open_client(Config()):
            raise KeyError("own")


async def test_status_and_members() -> None:
    async with etcd() as (server, client):
        status = await client.status()
        assert status.version.startswith("3.")
        assert status == evolve(
            await client.status(server.endpoint),
            header=status.header,
            db_size=status.db_size,
            db_size_in_use=status.db_size_in_use,
        )
        assert [member.name for member in await client.members()] == [server.name]
        with pytest.raises(Unavailable, match="connection refused"):
            await client.status("127.0.0.1:1")


async def test_a_watch_delivers_thousands_of_events_soon() -> None:
    async with etcd() as (_, client):
        for start in range(0, 3000, 100):
            await client.txn([], [Put(f"/fast/{n}", "x") for n in range(start, start + 100)])
        async with client.watch_prefix("/fast/", start_revision=2) as watch:
            got: list[WatchBatch] = []
            with soon(3):
                while sum(len(batch.events) for batch in got) < 3000:
                    got.append(await anext(watch))
        assert math.isclose(got[-1].revision, got[-1].events[-1].kv.mod_revision)
