"""The client behind etcd's own gRPC proxy (`etcd grpc-proxy`), real ones both."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from attrs import evolve

from helpers import eventually, require
from kilo_etcd.etcd import lease as keepalives
from kilo_etcd.etcd.api import EtcdError, LeaseNotFound, Watch
from kilo_etcd.etcd.client import EtcdClient, open_client
from kilo_etcd.store.lease import KeptLease
from kilo_etcd.testing.etcd_server import EtcdCluster, EtcdProxy, EtcdServer, ServerOptions

pytestmark = pytest.mark.etcd


@asynccontextmanager
async def proxied(options: ServerOptions | None = None) -> AsyncIterator[tuple[EtcdServer, EtcdProxy, EtcdClient]]:
    require("etcd")
    async with (
        EtcdServer.run(options) as server,
        EtcdProxy.run(server) as proxy,
        open_client(proxy.config()) as client,
    ):
        yield server, proxy, client


def connection(client: EtcdClient) -> str:
    found = re.search(r"Connection \d+", repr(client))
    assert found, client
    return found[0]


async def test_one_keepalive_is_answered() -> None:
    async with proxied() as (_, _, client):
        lease = await client.grant_lease(60)
        assert [await client.refresh_lease(lease.id) for _ in range(3)] == [60, 60, 60]
        await client.revoke_lease(lease.id)
        with pytest.raises(LeaseNotFound):
            await client.refresh_lease(lease.id)


async def test_a_proxy_with_certificates_asks_for_those_of_its_clients() -> None:
    async with proxied(ServerOptions(client_cert=True)) as (server, proxy, client):
        lease = await client.grant_lease(5)
        async with client.keep_alive(lease.id, lease.ttl) as kept, client.watch_prefix("/w/") as watch:
            await client.put("/w/1", "seen", lease=lease.id)
            batch = await anext(aiter(watch))
            assert [event.kv.value for event in batch.events] == [b"seen"]
            await eventually(lambda: " 4 confirmed" in repr(kept), 20)
        tls = server.config().tls
        assert tls is not None
        async with open_client(evolve(proxy.config(), tls=evolve(tls, cert=None, key=None))) as nobody:
            with pytest.raises(EtcdError, match="certificate"):
                await nobody.get("/w/1")


async def test_an_endpoint_that_comes_first_and_cannot_be_trusted_is_passed_by() -> None:
    """It may have the certificate of another authority, or be none that TLS is spoken with, or one of IPv6 that is not
    there."""
    require("etcd")
    options = ServerOptions(client_cert=True)
    async with EtcdServer.run(options) as server, EtcdServer.run(options) as foreign, EtcdServer.run() as clear:
        for first in (foreign.endpoint, clear.endpoint.replace("http:", "https:"), "https://[::1]:1"):
            config = evolve(server.config(), endpoints=(first, server.endpoint), prefer_first=True)
            async with open_client(config) as client:
                await client.get("/k")
                assert client.endpoint == server.endpoint


@pytest.mark.parametrize("ttl", [5, 15, 25])
async def test_a_lease_that_is_kept_is_renewed_at_once(ttl: int) -> None:
    """As before a reload, for which a second is all there is. The proxy would answer with its next keepalive."""
    async with proxied() as (_, _, client), trio.open_nursery() as nursery:
        lease = KeptLease(client, ttl, on_unconfirmed=pytest.fail, on_lost=pytest.fail)
        await lease.grant()
        nursery.start_soon(lease.keep)
        await eventually(lambda: "1 confirmed" in repr(lease))
        before = connection(client)
        for _ in range(3):
            with trio.fail_after(1):
                await lease.renew()
            await eventually(lambda: "1 confirmed" in repr(lease))
        assert connection(client) == before
        nursery.cancel_scope.cancel()


async def test_a_short_lease_is_kept_in_the_rhythm_of_the_proxy() -> None:
    async with proxied() as (_, _, client):
        lease = await client.grant_lease(5)
        async with client.keep_alive(lease.id, lease.ttl) as kept:
            await eventually(lambda: " 1 confirmed" in repr(kept))
            before = connection(client)
            await eventually(lambda: " 7 confirmed" in repr(kept), 20)
            assert connection(client) == before


async def test_a_long_lease_is_kept_more_often_than_the_proxy_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepalives, "STREAM_EACH", 1.0)
    async with proxied() as (_, _, client):
        lease = await client.grant_lease(86400)
        async with client.keep_alive(lease.id, lease.ttl, interval=1.0) as kept:
            await eventually(lambda: " 1 confirmed" in repr(kept))
            before = connection(client)
            await eventually(lambda: " 4 confirmed" in repr(kept), 10)
            assert connection(client) == before


async def test_watch_and_lease_outlive_a_restart_of_the_proxy() -> None:
    async with proxied() as (server, proxy, client), open_client(server.config()) as direct:
        lease = await client.grant_lease(10)
        seen: list[bytes] = []

        async def read(watch: Watch) -> None:
            async for batch in watch:
                seen.extend(event.kv.value for event in batch.events)

        async with (
            client.watch_prefix("/w/") as watch,
            client.keep_alive(lease.id, lease.ttl) as kept,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(read, watch)
            await client.put("/w/1", "before", lease=lease.id)
            await eventually(lambda: seen == [b"before"])
            await proxy.kill()
            await direct.put("/w/2", "meanwhile")
            await proxy.start()
            started = trio.current_time()
            await eventually(lambda: kept.expires_at > started + 10, 60)
            assert not kept.lost.is_set()
            assert await client.refresh_lease(lease.id) == 10
            await direct.put("/w/3", "after")
            await eventually(lambda: seen == [b"before", b"meanwhile", b"after"])
            nursery.cancel_scope.cancel()


async def test_a_proxy_that_is_given_first_is_used_first_and_etcd_itself_while_it_is_away() -> None:
    async with proxied() as (server, proxy, _):
        both = evolve(server.config(), endpoints=(proxy.endpoint, server.endpoint), prefer_first=True)
        for _ in range(5):
            async with open_client(both) as client:
                await client.get("/k")
                assert client.endpoint == proxy.endpoint
        async with AsyncExitStack() as stack:
            any_first = evolve(both, prefer_first=False)
            clients = [await stack.enter_async_context(open_client(any_first)) for _ in range(20)]
            for client in clients:
                await client.get("/k")
            assert {client.endpoint for client in clients} == {proxy.endpoint, server.endpoint}
        async with open_client(both) as client:
            await client.get("/k")
            await proxy.kill()
            await eventually(lambda: client.endpoint is None)
            await client.get("/k")
            assert client.endpoint == server.endpoint


async def test_clients_spread_over_the_endpoints_after_the_first_one() -> None:
    require("etcd")
    async with EtcdCluster.run(3) as cluster, AsyncExitStack() as stack:
        first, *others = (member.endpoint for member in cluster.members)
        config = evolve(cluster.members[0].config(), endpoints=(first, *others), prefer_first=True)
        clients = [await stack.enter_async_context(open_client(config)) for _ in range(20)]
        for client in clients:
            await client.get("/k")
        assert {client.endpoint for client in clients} == {first}
        await cluster.members[0].kill()
        for client in clients:
            await client.get("/k", serializable=True)
        assert {client.endpoint for client in clients} == {*others}
