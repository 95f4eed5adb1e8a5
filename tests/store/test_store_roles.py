"""A host that etcd confines to its own keys: a role with its two prefixes and the right to read suffices for its whole
life, and etcd refuses all else (decision 0034)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network

import pytest
import trio
from attrs import evolve
from store_world import KEYS, record, wg_key

from helpers import eventually, require
from kilo_etcd.etcd.api import Client, Config, PermissionDenied, Put
from kilo_etcd.etcd.client import open_client
from kilo_etcd.model import CandidateClass, Endpoint, Granularity, MeshSettings
from kilo_etcd.store.claims import ensure_mesh
from kilo_etcd.store.diagnostics import request_diagnostics, serve
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.operator import statuses
from kilo_etcd.store.records import (
    DiagnosticsRequest,
    DiagnosticsResponse,
    ObservedEndpointRecord,
    ProbeReportRecord,
    StageRecord,
    StatusRecord,
    encode,
)
from kilo_etcd.store.session.session import Session
from kilo_etcd.store.view import View
from kilo_etcd.testing.etcd_server import EtcdServer

pytestmark = [pytest.mark.etcd]
NAMES = ("node-1", "node-11")
"""The name of one begins with that of the other."""
SETTINGS = MeshSettings(Granularity.LOCATION, (ip_network("10.4.0.0/16"),))


@asynccontextmanager
async def confined() -> AsyncIterator[tuple[Client, dict[str, Config]]]:
    """The operator's client, and how each host reaches etcd; the mesh's settings are there."""
    async with EtcdServer.run() as server:
        async with open_client(server.config()) as first:
            await ensure_mesh(first, KEYS, SETTINGS)
        await server.enable_auth({name: (name, [KEYS.by(name), KEYS.status_by(name)]) for name in NAMES})
        for name in NAMES:
            for prefix in (KEYS.root, KEYS.status_root):
                await server.etcdctl("role", "grant-permission", name, "--prefix=true", "read", prefix)
        async with open_client(server.config()) as operator:
            yield operator, {name: evolve(server.config(), user=name, password=name) for name in NAMES}


@asynccontextmanager
async def both_hosts() -> AsyncIterator[tuple[Client, Client, Client]]:
    """The operator's client, and one for each of the two hosts (`NAMES`)."""
    one, other = NAMES
    async with (
        confined() as (operator, configs),
        open_client(configs[one]) as first,
        open_client(configs[other]) as second,
    ):
        yield operator, first, second


async def _respond(_request: DiagnosticsRequest) -> DiagnosticsResponse:
    await trio.lowlevel.checkpoint()
    return DiagnosticsResponse(revision=7)


async def test_two_prefixes_and_the_right_to_read_suffice_for_the_whole_life_of_a_host() -> None:
    require("etcd", "etcdctl")
    async with (
        both_hosts() as (operator, first, second),
        trio.open_nursery() as nursery,
    ):
        clients = {"node-1": first, "node-11": second}
        mirror = Mirror(clients["node-1"], KEYS)
        await nursery.start(mirror.run)
        sessions = {}
        for name, client in clients.items():
            it = sessions[name] = Session(client, KEYS, name, wg_key(name), lease_ttl=5)
            await nursery.start(it.run)
            assert await it.ensure_mesh(SETTINGS) == SETTINGS
            await it.claim_addresses(SETTINGS.subnets)
            await it.register(record(name, location="gcp"))
            assert await it.put_status(StatusRecord(public_key=wg_key(name), revision=1))
            assert await it.put_stage(StageRecord(revision=1))
            assert await it.enter("gcp", CandidateClass.PUBLIC)
            assert await it.put_probe_reports({"home": ProbeReportRecord(leader="h", candidacy=7, targets=("x",))})
            seen = ObservedEndpointRecord(public_key=wg_key("x"), endpoint=Endpoint.parse("203.0.113.9:1"))
            assert await it.put_observed_endpoints({"x": seen})
            nursery.start_soon(serve, client, KEYS, name, _respond)
        one, other = sessions["node-1"], sessions["node-11"]
        assert await one.record_leader("gcp", known_revision=0)
        await eventually(lambda: mirror.current and mirror.current.leaders == {"gcp": ("node-1",)})
        assert mirror.current is not None
        assert {candidate.node for candidate in mirror.current.candidates["gcp"]} == set(NAMES)
        assert set(mirror.current.nodes) == set(NAMES)
        assert mirror.current.rejected == ()
        assert set(await statuses(clients["node-1"], KEYS)) == set(NAMES)
        assert set(await request_diagnostics(operator, KEYS, NAMES, patience=10)) == set(NAMES)

        # An agent that comes back adopts what is there; what another writer deletes is restored.
        again = Session(clients["node-11"], KEYS, "node-11", wg_key("node-11"), lease_ttl=5)
        revision = (await operator.get_prefix(KEYS.root)).header.revision
        await again.claim_addresses(SETTINGS.subnets)
        await again.register(record("node-11", location="gcp"))
        assert again.addresses == other.addresses
        assert again.candidacy is not None
        assert (await operator.get_prefix(KEYS.root)).header.revision == revision
        await operator.delete_prefix(KEYS.by("node-1"))
        await eventually(lambda: mirror.current and one.healthy and "node-1" in mirror.current.nodes)

        # Handing over, and leaving for good.
        assert await one.record_leader("gcp", known_revision=mirror.current.revision)
        assert await one.leave(succeeded=True)
        await one.resign()
        for it in sessions.values():
            await it.forget()
        await again.forget()
        left = [kv.key.decode() for kv in (await operator.get_prefix("/kilo")).kvs]
        assert left == sorted(KEYS.settings)
        nursery.cancel_scope.cancel()


async def test_etcd_refuses_a_host_every_write_outside_its_prefixes() -> None:
    require("etcd", "etcdctl")
    own, other = NAMES
    address = ip_address("10.4.0.9")
    keys = (
        KEYS.granularity, KEYS.adopted, KEYS.location(own), KEYS.annotation(own, "leader"), KEYS.peer("laptop"),
        KEYS.peer_address("laptop", address), KEYS.node(other), KEYS.address(other, address),
        KEYS.election("gcp", other), KEYS.leader("gcp", other), KEYS.endpoint(own, other),
        KEYS.probe_report("gcp", other), KEYS.status(other), KEYS.stage(other), KEYS.response(7, other),
        KEYS.request(7),
    )  # fmt: skip
    async with confined() as (operator, configs), open_client(configs[own]) as client:
        there = Session(operator, KEYS, other, wg_key(other))
        await there.claim_addresses(SETTINGS.subnets)
        await there.register(record(other))
        before = await operator.get_prefix("/kilo")
        acts: list[Callable[[], Awaitable[object]]] = []
        for key in keys:
            acts.append(lambda key=key: client.put(key, "x"))  # type: ignore[misc]
            acts.append(lambda key=key: client.delete(key))  # type: ignore[misc]
        for prefix in (KEYS.by_root, KEYS.by(other), KEYS.status_by_root, KEYS.root):
            acts.append(lambda prefix=prefix: client.delete_prefix(prefix))  # type: ignore[misc]
        lease = next(kv.lease for kv in before.kvs if kv.key == KEYS.node(other).encode())
        acts.append(lambda: client.revoke_lease(lease))
        for act in acts:
            with pytest.raises(PermissionDenied):
                await act()
        assert (await operator.get_prefix("/kilo")).kvs == before.kvs
        await client.put(KEYS.node(own), encode(record(own)))


async def test_a_host_leaves_though_another_has_put_a_key_under_its_leases() -> None:
    """etcd checks the keys of a lease when a key is put under it, but not if that is in a transaction."""
    require("etcd", "etcdctl")
    one, other = NAMES
    async with (
        both_hosts() as (operator, client, theirs),
        trio.open_nursery() as nursery,
    ):
        it = Session(client, KEYS, one, wg_key(one), lease_ttl=600)
        await nursery.start(it.run)
        await it.claim_addresses(SETTINGS.subnets)
        await it.register(record(one, location="gcp"))
        assert await it.put_status(StatusRecord(public_key=wg_key(one), revision=1))
        assert await it.enter("gcp", CandidateClass.PUBLIC)
        assert await it.record_leader("gcp", known_revision=0)
        held = {kv.key.decode(): kv for kv in (await operator.get_prefix("/kilo")).kvs}
        for own, key in ((KEYS.election("gcp", one), KEYS.stage(other)), (KEYS.node(one), KEYS.node(other))):
            with pytest.raises(PermissionDenied):
                await theirs.put(key, "x", lease=held[own].lease)
            await theirs.txn([], [Put(key, "x", lease=held[own].lease)])
            with pytest.raises(PermissionDenied):
                await client.revoke_lease(held[own].lease)
        await it.resign()
        left = {kv.key.decode() for kv in (await operator.get_prefix("/kilo")).kvs}
        leased = {KEYS.election("gcp", one), KEYS.status(one)}
        assert left == held.keys() - leased | {KEYS.stage(other), KEYS.node(other)}
        await it.forget()
        left = {kv.key.decode() for kv in (await operator.get_prefix("/kilo")).kvs}
        assert left == {*KEYS.settings, KEYS.stage(other), KEYS.node(other)}
        nursery.cancel_scope.cancel()


async def test_a_host_takes_an_unused_address_though_it_may_not_delete_the_claim_of_before() -> None:
    require("etcd", "etcdctl")
    one, other = NAMES
    small = (ip_network("10.4.0.0/30"),)
    async with both_hosts() as (operator, client, theirs), trio.open_nursery() as nursery:
        first = Session(operator, KEYS, "first", wg_key("first"))
        await first.claim_addresses((ip_network("10.9.0.0/30"),))
        await first.register(record("first"))
        await nursery.start(first.run)
        for number in (1, 2):
            await operator.put(KEYS.address(f"gone-{number}", ip_address(f"10.4.0.{number}")), "")
        (taken,) = await Session(client, KEYS, one, wg_key(one)).claim_addresses(small)
        assert await operator.get(KEYS.address(f"gone-{int(taken) % 4}", taken)) is not None, "its claim stays"
        (second,) = await Session(theirs, KEYS, other, wg_key(other)).claim_addresses(small)
        assert {taken, second} == {ip_address("10.4.0.1"), ip_address("10.4.0.2")}
        snapshot = View(KEYS)
        listing = await operator.get_prefix(KEYS.root)
        snapshot.load(listing.kvs, listing.header)
        assert snapshot.holder(taken) == ("node", one)
        assert snapshot.holder(second) == ("node", other)
        nursery.cancel_scope.cancel()


async def test_a_host_that_reads_anothers_keys_may_keep_its_lease_alive() -> None:
    """etcd does not authorize keepalives, and the keys tell their lease: this is not defended against."""
    require("etcd", "etcdctl")
    one = NAMES[0]
    async with both_hosts() as (operator, client, theirs):
        it = Session(client, KEYS, one, wg_key(one), lease_ttl=600)
        await it.register(record(one, location="gcp"))
        assert await it.enter("gcp", CandidateClass.PUBLIC)
        candidacy = await theirs.get(KEYS.election("gcp", one))
        assert candidacy is not None
        assert await theirs.refresh_lease(candidacy.lease) == 600
        assert (await operator.get(KEYS.election("gcp", one))) == candidacy


async def test_a_renamed_host_takes_its_place_over_if_etcd_lets_it_and_else_is_told() -> None:
    require("etcd", "etcdctl")
    old, new = NAMES
    async with both_hosts() as (operator, before, after):
        first = Session(before, KEYS, old, wg_key(old), lease_ttl=2)
        await first.claim_addresses(SETTINGS.subnets)
        await first.register(record(old, location="gcp"))
        assert await first.enter("gcp", CandidateClass.PUBLIC)
        assert await first.record_leader("gcp", known_revision=0)
        # It crashes: its status is there until the lease ends. Its user may write under the new name only.
        moved = await Session(after, KEYS, new, wg_key(old), lease_ttl=2).take_over({old: None})
        assert moved.names == ()
        assert "permission denied" in moved.refused or "may not" in moved.refused
        assert len((await operator.get_prefix(KEYS.by(old))).kvs) == 4, "nothing of it was written"
        # A user who may write both, as the operator may.
        second = Session(operator, KEYS, new, wg_key(old), lease_ttl=2)
        assert (await second.take_over({old: None})).names == (old,)
        assert await second.claim_addresses(SETTINGS.subnets, doubted=True) == first.addresses
        assert not (await operator.get_prefix(KEYS.by(old))).kvs
        keys = [kv.key.decode() for kv in (await operator.get_prefix(KEYS.by(new))).kvs]
        claim = KEYS.address(new, first.addresses[0])
        assert keys == [claim, KEYS.leader("gcp", new), KEYS.node(new), KEYS.reservation(new)]
        await second.register(record(old, location="gcp"))


async def test_of_two_copies_at_once_a_real_etcd_gives_the_place_to_one() -> None:
    require("etcd", "etcdctl")
    async with EtcdServer.run() as server, open_client(server.config()) as client:
        await ensure_mesh(client, KEYS, SETTINGS)
        original = Session(client, KEYS, "host", wg_key("host"), lease_ttl=2)
        addresses = await original.claim_addresses(SETTINGS.subnets)
        await original.register(record("host"))
        await original.resign()
        outcomes: dict[str, tuple[str, ...]] = {}
        claims: dict[str, object] = {}

        async def start(name: str) -> None:
            async with open_client(server.config()) as own:
                it = Session(own, KEYS, name, wg_key("host"), lease_ttl=2)
                outcomes[name] = (await it.take_over({"host": None})).names
                claims[name] = await it.claim_addresses(SETTINGS.subnets, doubted=bool(outcomes[name]))
                await it.register(record(name, public_key=wg_key("host")))

        async with trio.open_nursery() as nursery:
            for name in ("copy-1", "copy-2", "copy-3"):
                nursery.start_soon(start, name)
        (winner,) = [name for name, taken in outcomes.items() if taken]
        assert claims[winner] == addresses
        assert [name for name, claimed in claims.items() if claimed == addresses] == [winner]
        records = {name: await client.get(KEYS.node(name)) for name in claims}
        assert min(records, key=lambda name: records[name].create_revision) == winner  # type: ignore[union-attr]
