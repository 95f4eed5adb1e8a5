"""The client while real members are killed, restarted, frozen, and cut off from their quorum."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from attrs import define, evolve, field

from helpers import eventually, require
from helpers_load import measured, soon
from kilo_etcd.etcd.api import Config, EtcdError, LeaseNotFound, Unavailable, Watch
from kilo_etcd.etcd.client import EtcdClient, open_client
from kilo_etcd.testing.etcd_server import EtcdCluster, EtcdServer

pytestmark = pytest.mark.etcd

LEFT_WITHIN = 3.0


@asynccontextmanager
async def one() -> AsyncIterator[tuple[EtcdServer, EtcdClient]]:
    require("etcd")
    async with EtcdServer.run() as server, open_client(server.config()) as client:
        yield server, client


@asynccontextmanager
async def three() -> AsyncIterator[tuple[EtcdCluster, EtcdClient]]:
    require("etcd")
    async with EtcdCluster.run(3) as cluster, open_client(cluster.config()) as client:
        yield cluster, client


async def connected_member(cluster: EtcdCluster, client: EtcdClient) -> EtcdServer:
    await client.get("/any")
    assert client.endpoint
    return cluster.member_at(client.endpoint)


@define
class Writer:
    """Writes numbers to `/n/<i>` of ten keys, from a client of its own, and knows which writes etcd confirmed."""

    client: EtcdClient
    confirmed: dict[int, bytes] = field(factory=dict)
    """mod revision -> value"""
    stop: bool = False
    stopped: bool = False

    async def run(self) -> None:
        number = 0
        while not self.stop:
            number += 1
            try:
                result = await self.client.put(f"/n/{number % 10}", str(number))
                self.confirmed[result.header.revision] = str(number).encode()
            except Unavailable:
                continue  # Done or not, nobody knows.
        self.stopped = True


async def read(watch: Watch, seen: list[tuple[int, bytes]]) -> None:
    async for batch in watch:
        seen += [(event.kv.mod_revision, event.kv.value) for event in batch.events]


def check(seen: list[tuple[int, bytes]], writer: Writer) -> None:
    """Nothing doubled, nothing out of order, nothing lost that was confirmed, and no value twice."""
    revisions = [revision for revision, _ in seen]
    assert revisions == sorted(set(revisions))
    assert revisions == list(range(revisions[0], revisions[-1] + 1))
    assert writer.confirmed.items() <= dict(seen).items()
    values = [value for _, value in seen]
    assert len(values) == len(set(values)), "a put was sent twice"


@asynccontextmanager
async def written_and_watched(
    config: Config, client: EtcdClient
) -> AsyncIterator[tuple[Writer, list[tuple[int, bytes]]]]:
    """A writer that writes and a watch that watches; at the end all that was written must have been seen once."""
    seen: list[tuple[int, bytes]] = []
    async with (
        open_client(evolve(config, call_timeout=10.0)) as other,
        client.watch_prefix("/n/") as watch,
        trio.open_nursery() as nursery,
    ):
        writer = Writer(other)
        nursery.start_soon(read, watch, seen)
        nursery.start_soon(writer.run)
        await eventually(lambda: len(seen) > 50)
        yield writer, seen
        count = len(seen)
        await eventually(lambda: len(seen) > count + 50, 60, what="the watch goes on")
        writer.stop = True
        await eventually(lambda: writer.stopped, 60, what="the last write is over")
        last = max(writer.confirmed)
        await eventually(lambda: seen[-1][0] >= last, 60, what="all that was written is seen")
        nursery.cancel_scope.cancel()
    check(seen, writer)


async def test_watch_over_kill_and_restart_of_the_only_member() -> None:
    async with one() as (server, client), written_and_watched(server.config(), client):
        await server.kill()
        await server.restart()
        await server.stop()
        await server.start()


async def test_watch_over_kill_and_restart_of_each_member() -> None:
    async with three() as (cluster, client), written_and_watched(cluster.config(), client) as (_, seen):
        for _ in range(2):
            member = await connected_member(cluster, client)
            await member.kill()
            count = len(seen)
            await eventually(partial(lambda least: len(seen) > least, count + 50), 60)
            await member.restart()


async def test_watch_over_the_freezing_of_its_member() -> None:
    async with three() as (cluster, client), written_and_watched(cluster.config(), client):
        member = await connected_member(cluster, client)
        member.freeze()
        with soon(LEFT_WITHIN):
            await eventually(lambda: client.endpoint not in (None, member.endpoint))
        member.thaw()


async def test_an_idle_watch_leaves_a_frozen_member_in_time() -> None:
    """Nothing but pings tells: no call is made, no event comes."""
    async with three() as (cluster, client):
        member = await connected_member(cluster, client)
        async with client.watch("/w") as watch, trio.open_nursery() as nursery:
            seen: list[tuple[int, bytes]] = []
            nursery.start_soon(read, watch, seen)
            member.freeze()
            with soon(LEFT_WITHIN):
                await eventually(lambda: client.endpoint not in (None, member.endpoint))
                await eventually(lambda: "watching" in repr(watch))
            async with open_client(cluster.config()) as other:
                await eventually(lambda: put(other, "/w"), 60)
            await eventually(lambda: seen)
            nursery.cancel_scope.cancel()
            member.thaw()


async def put(client: EtcdClient, key: str) -> bool:
    try:
        await client.put(key, "")
    except Unavailable:
        return False
    return True


async def follower(cluster: EtcdCluster) -> EtcdServer:
    """A member that does not lead, so that no election follows when it freezes."""
    for member in cluster.members:
        async with open_client(member.config()) as client:
            status = await client.status()
            if status.leader != status.header.member_id:
                return member
    raise AssertionError("all members lead")


async def client_begins_at(cluster: EtcdCluster, member: EtcdServer, client: EtcdClient) -> None:
    """Make the client leave members until it is connected to `member`."""

    async def connected() -> bool:
        await client.get("/any")
        if client.endpoint == member.endpoint:
            return True
        connection = client._caller.channel._current
        if connection:
            connection.close()
        return False

    await eventually(connected)


async def test_a_unary_call_leaves_a_frozen_member_in_time() -> None:
    async with three() as (cluster, client):
        member = await follower(cluster)
        await client_begins_at(cluster, member, client)
        member.freeze()
        with soon(LEFT_WITHIN):
            assert await client.get("/k") is None
        assert client.endpoint != member.endpoint
        member.thaw()


async def test_a_new_client_does_not_wait_for_a_frozen_member() -> None:
    async with three() as (cluster, _):
        member = await follower(cluster)
        member.freeze()
        for _ in range(6):
            async with open_client(cluster.config()) as client:
                with soon(1.5):
                    await client.get("/k")
                assert client.endpoint != member.endpoint
        member.thaw()


@pytest.mark.parametrize("ttl", [2, 5])
async def test_a_lease_is_kept_while_its_member_freezes(ttl: int) -> None:
    async with three() as (cluster, client):
        member = await follower(cluster)
        await client_begins_at(cluster, member, client)
        lease = await client.grant_lease(ttl)
        async with client.keep_alive(lease.id, lease.ttl) as kept:
            began = kept.expires_at
            await eventually(lambda: kept.expires_at > began)
            member.freeze()
            with soon(LEFT_WITHIN):
                await eventually(lambda: client.endpoint not in (None, member.endpoint))
            frozen = kept.expires_at
            await eventually(lambda: kept.expires_at > frozen + ttl, 3 * ttl)
            assert not kept.lost.is_set()
            assert (await client.lease_time_to_live(lease.id)).ttl >= 0
        member.thaw()


async def test_a_lease_is_kept_over_the_restart_of_the_only_member() -> None:
    async with one() as (server, client):
        lease = await client.grant_lease(5)
        await client.put("/leased", "x", lease=lease.id)
        async with client.keep_alive(lease.id, lease.ttl) as kept:
            await server.kill()
            await server.restart()
            after = trio.current_time()
            await eventually(lambda: kept.expires_at > after + 5)
            assert not kept.lost.is_set()
        assert await client.get("/leased")


async def test_a_lease_that_nobody_confirms_is_lost_when_its_time_is_up() -> None:
    async with one() as (server, client):
        lease = await client.grant_lease(2)
        async with client.keep_alive(lease.id, lease.ttl) as kept:
            await eventually(lambda: kept.expires_at > trio.current_time() + 1.9)
            server.freeze()
            with measured() as machine, trio.fail_after(60):
                await kept.lost.wait()
            assert 0 <= trio.current_time() - kept.expires_at < machine.allows(0.5), machine
        server.thaw()
        # It may still be there, or not: whoever holds it is told.
        with trio.fail_after(15):
            try:
                while await client.refresh_lease(lease.id):
                    await client.revoke_lease(lease.id)
            except LeaseNotFound:
                return
            except Unavailable as error:
                raise AssertionError("etcd is back") from error


async def test_a_member_without_quorum_ends_a_watch_which_goes_on_when_quorum_is_back() -> None:
    """The client has one endpoint, whose member loses its quorum as the others freeze, and gets it back."""
    async with three() as (cluster, client):
        member = await connected_member(cluster, client)
        others = [etcd_server for etcd_server in cluster.members if etcd_server is not member]
        alone = evolve(cluster.config(), endpoints=(member.endpoint,))
        async with open_client(alone) as lonely, lonely.watch("/w") as watch, trio.open_nursery() as nursery:
            seen: list[tuple[int, bytes]] = []
            nursery.start_soon(read, watch, seen)
            for other in others:
                other.freeze()
            # hasleader: etcd ends the stream three election timeouts after the leader is gone.
            await eventually(lambda: "connecting" in repr(watch), 60, what="the stream is ended")
            with pytest.raises(Unavailable):
                await lonely.put("/w", "no")
            for other in others:
                other.thaw()
            await eventually(lambda: put(lonely, "/w"), 60)
            await eventually(lambda: seen)
            nursery.cancel_scope.cancel()


async def test_a_write_that_may_have_happened_is_not_repeated() -> None:
    async with one() as (server, client):
        await client.put("/once", "0")
        server.freeze()
        with pytest.raises(Unavailable, match="may or may not"):
            await client.put("/once", "1")
        server.thaw()
        kv = await client.get("/once")
        assert kv
        assert kv.version <= 2


async def test_a_call_bridges_the_restart_of_a_member() -> None:
    async with one() as (server, client):
        await client.put("/k", "1")
        await server.kill()
        await eventually(lambda: client.endpoint is None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.restart)
            # No connection can be made, so nothing can have been done twice: even a put is tried until it succeeds.
            await client.put("/k", "2")
        kv = await client.get("/k")
        assert kv
        assert (kv.value, kv.version) == (b"2", 2)


async def test_with_all_members_gone_the_error_names_them_and_the_client_recovers() -> None:
    async with three() as (cluster, client):
        await client.put("/k", "1")
        for member in cluster.members:
            await member.kill()
        with pytest.raises(EtcdError) as caught:
            await client.get("/k")
        assert all(member.endpoint in str(caught.value) for member in cluster.members)
        for member in cluster.members:
            await member.start(wait=False)
        await eventually(lambda: put(client, "/k"), 60)
