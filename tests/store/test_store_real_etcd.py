"""The store against a real etcd: what the in-memory one may have got wrong."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
import trio
from store_world import KEYS, record, wg_key

from helpers import eventually, require
from kilo_etcd.etcd.api import KeyValue
from kilo_etcd.etcd.client import open_client
from kilo_etcd.model import CandidateClass, Granularity, MeshSettings
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.operator import (
    MOST_REVISIONS,
    locations,
    newest_change,
    set_location,
    snapshot,
    statuses,
    unset_location,
)
from kilo_etcd.store.records import PeerRecord, StatusRecord, encode
from kilo_etcd.store.session.node_identity import NameTaken
from kilo_etcd.store.session.session import Session
from kilo_etcd.testing.etcd_server import EtcdServer

pytestmark = [pytest.mark.etcd]
SUBNETS = (ip_network("10.4.0.0/16"), ip_network("fd00:4::/64"))


async def test_a_key_and_an_address_stay_with_their_owner() -> None:
    require("etcd")
    async with EtcdServer.run() as server, open_client(server.config()) as client, trio.open_nursery() as nursery:
        mirror = Mirror(client, KEYS)
        await nursery.start(mirror.run)
        it = Session(client, KEYS, "a", wg_key("a"))
        await nursery.start(it.run)
        _, subnets, _ = await it.ensure_mesh(MeshSettings(Granularity.LOCATION, SUBNETS))
        await it.claim_addresses(subnets)
        await it.register(record("a"))
        await eventually(lambda: mirror.current and mirror.current.nodes)
        assert mirror.current is not None
        node = mirror.current.nodes["a"]
        await client.put(KEYS.node("thief"), encode(record("thief", public_key=wg_key("a"))))
        await client.put(KEYS.peer("laptop"), encode(PeerRecord(public_key=wg_key("a"))))
        for address in it.addresses:
            await client.put(KEYS.address("thief", address), "")
            await client.put(KEYS.peer_address("laptop", address), "")
        await client.put(KEYS.subnets, "10.5.0.0/16")
        last = (await client.get_prefix(KEYS.root)).header.revision
        await eventually(lambda: mirror.current and mirror.current.revision >= last)
        assert mirror.current.nodes == {"a": node}
        assert mirror.current.peers == {}
        assert {note.key for note in mirror.current.rejected} == {
            KEYS.node("thief"), KEYS.peer("laptop"), KEYS.subnets,
            *(KEYS.address("thief", address) for address in it.addresses),
            *(KEYS.peer_address("laptop", address) for address in it.addresses),
        }  # fmt: skip
        now, _ = await snapshot(client, KEYS)
        assert (now.nodes, now.rejected) == (mirror.current.nodes, mirror.current.rejected)
        again = Session(client, KEYS, "a", wg_key("a"))
        assert await again.subnets_in_force((ip_network("10.5.0.0/16"),)) == SUBNETS
        assert await again.claim_addresses(SUBNETS) == it.addresses
        for address in it.addresses:
            await client.delete(KEYS.address("a", address))
        (other4, other6) = await again.claim_addresses(SUBNETS)
        assert {other4, other6}.isdisjoint(it.addresses), "an older claim is never taken over"
        nursery.cancel_scope.cancel()


async def test_a_host_comes_crashes_returns_and_leaves() -> None:
    require("etcd")
    async with EtcdServer.run() as server, open_client(server.config()) as client, trio.open_nursery() as nursery:
        mirror = Mirror(client, KEYS)
        await nursery.start(mirror.run)

        async def agent(task_status: trio.TaskStatus[tuple[Session, trio.CancelScope]]) -> None:
            it = Session(client, KEYS, "a", wg_key("a"), lease_ttl=5)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as tasks:
                    await tasks.start(it.run)
                    _, subnets, _ = await it.ensure_mesh(MeshSettings(Granularity.LOCATION, SUBNETS))
                    await it.claim_addresses(subnets)
                    await it.register(record("a"))
                    await it.put_status(StatusRecord(public_key=wg_key("a")))
                    await it.enter("", CandidateClass.PUBLIC)
                    task_status.started((it, scope))

        _, crash = await nursery.start(agent)
        await eventually(lambda: mirror.current and mirror.current.candidates.get(""))
        assert mirror.current is not None
        node, candidate = mirror.current.nodes["a"], mirror.current.candidates[""][0]
        assert [address.version for address in node.mesh_addresses] == [4, 6]
        assert mirror.current.rejected == ()

        intruder = Session(client, KEYS, "a", wg_key("intruder"), lease_ttl=2)
        with pytest.raises(NameTaken, match="is taken by a living host"):
            await intruder.register(record("intruder"))

        before = (await client.get_prefix(KEYS.root)).header.revision
        crash.cancel()
        again, _ = await nursery.start(agent)
        assert again.candidacy is not None
        assert (await client.get_prefix(KEYS.root)).header.revision == before
        await eventually(lambda: again.healthy)

        assert await set_location(client, KEYS, "a", "gcp") > before
        await eventually(lambda: mirror.current and mirror.current.nodes["a"].location == "gcp")
        assert await locations(client, KEYS) == {"a": "gcp"}
        assert await unset_location(client, KEYS, "a")
        assert set(await statuses(client, KEYS)) == {"a"}
        await eventually(lambda: mirror.current and mirror.current.nodes["a"].location == "")
        now, view = await snapshot(client, KEYS)
        assert (now.nodes, now.candidates) == (mirror.current.nodes, mirror.current.candidates)
        assert view.kv(KEYS.node("a")) == mirror.kv(KEYS.node("a"))
        assert candidate.create_revision == now.candidates[""][0].create_revision

        await again.enter("", CandidateClass.ANNOTATED_PUBLIC)
        await again.record_leader("", known_revision=0)
        await eventually(lambda: mirror.current and mirror.current.leaders == {"": ("a",)})
        assert mirror.current.candidates[""][0].create_revision > candidate.create_revision
        await again.forget()
        await eventually(lambda: mirror.current and not mirror.current.nodes and not mirror.current.leaders)
        left = [kv.key.decode() for kv in (await client.get_prefix("/kilo")).kvs]
        assert left == sorted(KEYS.settings)
        nursery.cancel_scope.cancel()


async def test_an_overwritten_candidacy_and_status_are_restored_under_the_lease() -> None:
    """Whatever `etcdctl put` does to them: the place in the queue stays, and nothing is written after that."""
    require("etcd")
    async with EtcdServer.run() as server, open_client(server.config()) as client, trio.open_nursery() as nursery:
        it = Session(client, KEYS, "a", wg_key("a"))
        await nursery.start(it.run)
        await it.register(record("a"))
        await it.put_status(StatusRecord(public_key=wg_key("a")))
        await it.enter("gcp", CandidateClass.PUBLIC)
        other = (await client.grant_lease(600)).id
        for key in (KEYS.election("gcp", "a"), KEYS.status("a")):
            before = await client.get(key)
            assert before is not None
            assert before.lease

            async def restored(key: str = key, before: KeyValue = before) -> bool:
                kv = await client.get(key)
                return kv is not None and (kv.value, kv.lease) == (before.value, before.lease)

            written = await client.put(key, before.value)
            assert written.header.revision > before.mod_revision
            await eventually(restored, 5)
            await client.put(key, b"junk", lease=other)
            await eventually(restored, 5)
            now = await client.get(key)
            assert now is not None
            assert now.create_revision == before.create_revision
            await client.delete(key)
            await eventually(restored, 10)
        revision = (await client.get_prefix("/kilo")).header.revision
        await eventually(lambda: it.healthy)
        await it.put_status(StatusRecord(public_key=wg_key("a")))
        assert (await client.get_prefix("/kilo")).header.revision == revision
        assert it.contested is not None
        nursery.cancel_scope.cancel()


async def test_a_member_killed_and_started_again_costs_no_write() -> None:
    require("etcd")
    async with EtcdServer.run() as server, open_client(server.config()) as client, trio.open_nursery() as nursery:
        mirror = Mirror(client, KEYS, probe_period=0.5)
        await nursery.start(mirror.run)
        it = Session(client, KEYS, "a", wg_key("a"))
        await nursery.start(it.run)
        await it.register(record("a"))
        await it.enter("gcp", CandidateClass.REST)
        revision = (await client.get_prefix(KEYS.root)).header.revision
        await server.kill()
        await eventually(lambda: not mirror.connected, 15)
        assert mirror.current is not None
        await server.restart()
        await eventually(lambda: mirror.connected and it.healthy, 20)
        assert mirror.untrusted_reason is None
        assert (await client.get_prefix(KEYS.root)).header.revision == revision
        await client.put(KEYS.location("a"), "gcp")
        await eventually(lambda: mirror.current and mirror.current.revision > revision, 10)
        nursery.cancel_scope.cancel()


async def test_the_newest_change_may_be_a_deletion() -> None:
    require("etcd", "etcdctl")
    async with EtcdServer.run() as server, open_client(server.config()) as client:
        newest = await set_location(client, KEYS, "a", "gcp")

        async def found() -> int:
            listing = await client.get_prefix(KEYS.root)
            return await newest_change(client, KEYS, newest, listing.header.revision)

        assert await found() == newest
        await client.put("/elsewhere", "")
        assert await found() == newest
        # Keys that are there for a moment leave as many behind as there were.
        for name in ("b", "c"):
            await set_location(client, KEYS, name, "gcp")
            last = (await client.delete(KEYS.location(name))).header.revision
        later = (await client.put("/elsewhere", "")).header.revision
        assert await found() == last
        assert await newest_change(client, KEYS, newest, last - 1) == last - 1, "what came later does not count"
        for _ in range(MOST_REVISIONS // 2 + 1):
            await set_location(client, KEYS, "d", "gcp")
            last = (await client.delete(KEYS.location("d"))).header.revision
        assert await found() == last, "more than etcd sends at once"
        await server.etcdctl("compact", str(later))
        assert await found() == last
        quiet = (await client.put("/elsewhere", "")).header.revision
        await server.etcdctl("compact", str(quiet))
        assert await found() == newest, "history has nothing"
        last = (await client.delete(KEYS.location("a"))).header.revision
        await client.put("/elsewhere", "")
        assert await found() == last
