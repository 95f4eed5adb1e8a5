"""A host's own keys against the in-memory etcd, in virtual time."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
import structlog
import trio
from attrs import evolve
from store_world import KEYS, record, running, wg_key

from helpers import eventually
from kilo_etcd.etcd.api import Compare, Op, PermissionDenied, Put, TxnResult, Unavailable
from kilo_etcd.model import CandidateClass, EncryptionStage, Endpoint, Granularity, InternalIPs, IPAddress, MeshSettings
from kilo_etcd.store.claims import NoAddressLeft, candidates
from kilo_etcd.store.mirror import ClusterNotTrusted, Mirror
from kilo_etcd.store.records import (
    CandidateRecord,
    ObservedEndpointRecord,
    ProbeReportRecord,
    RecordError,
    StageRecord,
    StatusRecord,
    decode_candidate,
    decode_node,
    decode_stage,
    decode_status,
    encode,
)
from kilo_etcd.store.session.cluster_guard import NoGuard
from kilo_etcd.store.session.contested import about_status_key
from kilo_etcd.store.session.node_identity import NameTaken
from kilo_etcd.store.session.session import Session
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd

pytestmark = pytest.mark.autojump
NODE, STATUS = KEYS.node("a"), KEYS.status("a")
GCP = KEYS.election("gcp", "a")
SUBNETS = (ip_network("10.4.0.0/16"),)


def session(client: FakeClient, name: str = "a", key: str = "a", **options: Any) -> Session:
    return Session(client, KEYS, name, wg_key(key), **options)


@asynccontextmanager
async def rejoined(etcd: FakeEtcd, location: str) -> AsyncIterator[tuple[Session, Mirror]]:
    """The next run of host a, registered in `location`, and a mirror that has seen it."""
    mirror, again = Mirror(etcd.client(), KEYS), session(etcd.client())
    async with running(again), trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        await again.claim_addresses(SUBNETS)
        await again.register(record("a", location=location))
        await eventually(lambda: mirror.current and mirror.current.nodes["a"].location == location)
        yield again, mirror
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def member(etcd: FakeEtcd, client: FakeClient | None = None, **options: Any) -> AsyncIterator[Session]:
    """Registered, reported and standing for gcp."""
    it = session(client or etcd.client(), **options)
    async with running(it):
        await it.register(record("a"))
        await it.put_status(StatusRecord(public_key=wg_key("a"), revision=1))
        await it.enter("gcp", CandidateClass.PUBLIC)
        yield it


async def overwritten(etcd: FakeEtcd, key: str, *, times: int) -> None:
    """Another writer overwrites a key so many times, and the session restores it each time."""
    for _ in range(times):
        etcd.put(key, "{}")
        await eventually(lambda: etcd.get(key) != b"{}", 60)


async def test_registration_lives_long_and_candidacy_and_status_live_short() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        assert decode_node(etcd.get(NODE) or b"") == record("a")
        assert it.healthy
        revision = etcd.revision
        await trio.sleep(600)
        assert etcd.revision == revision, "nothing is written in steady state"
        assert etcd.leases()[etcd.data[NODE.encode()].lease] == 86400
        assert etcd.leases()[etcd.data[GCP.encode()].lease] == 5
        assert etcd.data[STATUS.encode()].lease == etcd.data[GCP.encode()].lease
    await trio.sleep(6)
    assert etcd.keys() == [NODE], "a host that has gone stays a member"
    await trio.sleep(86400)
    assert etcd.keys() == []


async def test_saying_the_same_again_writes_nothing() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        revision = etcd.revision
        await it.register(record("a"))
        await it.put_status(StatusRecord(public_key=wg_key("a"), revision=1))
        await it.enter("gcp", CandidateClass.PUBLIC)
        assert await it.record_leader("gcp", known_revision=revision)
        assert etcd.revision == revision + 1
        await it.record_leader("gcp", known_revision=revision)
        assert etcd.revision == revision + 1


LED = KEYS.leader("gcp", "a")


async def test_that_a_host_leads_stands_under_its_long_lease_and_goes_with_its_candidacy() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await it.record_leader("gcp", known_revision=etcd.revision)
        assert etcd.data[LED.encode()].lease == etcd.data[NODE.encode()].lease
        revision = etcd.revision
        await it.leave(succeeded=True)
        assert etcd.revision == revision + 1, "in one write"
        assert LED not in etcd


async def test_without_a_successor_it_stays_on_record_until_the_host_stands_behind_another() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await it.record_leader("gcp", known_revision=etcd.revision)
        await it.leave()
        assert LED in etcd, "a location without candidates keeps its leader"
    await trio.sleep(60)
    assert LED in etcd
    again = session(etcd.client())
    async with running(again):
        await again.register(record("a"))
        revision = etcd.revision
        await again.enter("gcp", CandidateClass.PUBLIC, succeeded=True)
        assert etcd.revision == revision + 1
        assert LED not in etcd


async def test_of_a_location_that_a_host_has_left_it_is_no_leader_on_record() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await it.record_leader("gcp", known_revision=etcd.revision)
        revision = etcd.revision
        await it.enter("aws", CandidateClass.PUBLIC)
        assert etcd.revision == revision + 2, "the candidacies, which queue anew"
        assert LED not in etcd


async def test_a_host_that_was_relabelled_while_it_was_away_gives_its_leader_record_up() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await it.claim_addresses(SUBNETS)
        await it.record_leader("gcp", known_revision=etcd.revision)
        await it.leave()
    etcd.put(KEYS.subnets, "10.4.0.0/16")
    async with rejoined(etcd, "aws") as (again, mirror):
        assert mirror.current is not None
        assert LED in etcd
        await again.compare(mirror.current, mirror, on_record=False)
        assert LED not in etcd


@pytest.mark.parametrize("last", [True, False])
async def test_a_leader_record_under_an_earlier_runs_lease_is_kept_by_the_next_run_or_deleted(last: bool) -> None:
    """The next run cannot adopt that lease if the host's record is not under it any more. A later leader of the
    location may lead its other segment, so only the caller knows whether this host is the last one of its own."""
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await it.claim_addresses(SUBNETS)
        await it.record_leader("gcp", known_revision=etcd.revision)
        await it.leave()
    etcd.put(KEYS.subnets, "10.4.0.0/16")
    etcd.put(NODE, etcd.data[NODE.encode()].value)
    etcd.put_kept(KEYS.leader("gcp", "b"), "")
    async with rejoined(etcd, "gcp") as (again, mirror):
        assert mirror.current is not None
        assert etcd.data[LED.encode()].lease != etcd.data[NODE.encode()].lease
        await again.compare(mirror.current, mirror, on_record=last)
        revision = etcd.revision
        await again.compare(mirror.current, mirror, on_record=last)
        assert etcd.revision == revision, "what is written already is not written again, although the mirror is behind"
        if last:
            assert etcd.data[LED.encode()].lease == etcd.data[NODE.encode()].lease
        else:
            assert LED not in etcd


async def test_a_changed_record_is_one_write_and_keeps_its_create_revision() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        created, revision = etcd.data[NODE.encode()].create_revision, etcd.revision
        await it.register(record("a", subnets="172.16.0.0/16"))
        assert etcd.revision == revision + 1
        assert etcd.data[NODE.encode()].create_revision == created
        await trio.sleep(60)
        assert etcd.revision == revision + 1


async def test_a_crashed_agent_that_restarts_within_the_ttl_changes_nothing() -> None:
    etcd = FakeEtcd()
    async with member(etcd):
        await trio.sleep(10)
    before, revision = dict(etcd.data), etcd.revision
    await trio.sleep(2)
    again = session(etcd.client())
    async with running(again):
        await again.register(record("a"))
        assert again.candidacy is not None
        assert (again.candidacy.location, again.candidacy.rank) == ("gcp", CandidateClass.PUBLIC)
        await again.enter("gcp", CandidateClass.PUBLIC)
        await again.put_status(StatusRecord(public_key=wg_key("a"), revision=1))
        await trio.sleep(60)
        assert (dict(etcd.data), etcd.revision) == (before, revision)
        assert len(etcd.leases()) == 2


async def test_what_is_reported_of_the_switch_is_kept_restored_adopted_and_taken_back() -> None:
    etcd, key = FakeEtcd(), KEYS.stage("a")
    async with member(etcd) as it:
        assert await it.put_stage(StageRecord(revision=7))
        assert etcd.data[key.encode()].lease == etcd.data[STATUS.encode()].lease
        created = etcd.data[key.encode()].create_revision
        await it.put_stage(StageRecord(revision=8))
        assert decode_stage(etcd.get(key) or b"") == StageRecord(revision=8)
        assert etcd.data[key.encode()].create_revision == created, "nobody sees it go"
        etcd.delete(key)
        await eventually(lambda: key in etcd, 60)
    # The agent crashes, and the next one starts within the lease's time.
    before = etcd.data[key.encode()]
    again = session(etcd.client())
    async with running(again):
        await again.register(record("a"))
        await again.put_status(StatusRecord(public_key=wg_key("a"), revision=1))
        assert (again.stage, etcd.data[key.encode()]) == (StageRecord(revision=8), before)
        await again.put_stage(None)
        assert key not in etcd
        await again.put_stage(StageRecord(revision=9))
        await again.resign()
        assert key not in etcd


async def test_a_restart_does_not_adopt_the_leases_of_another_host() -> None:
    """Somebody has put its record and its status under them while it was down."""
    etcd = FakeEtcd()
    async with member(etcd):
        created = etcd.data[GCP.encode()].create_revision
    other = session(etcd.client(), "b", "b")
    async with running(other):
        await other.register(record("b"))
        await other.put_status(StatusRecord(public_key=wg_key("b"), revision=1))
        await other.enter("gcp", CandidateClass.PUBLIC)
        theirs = {key: kv for key, kv in etcd.data.items() if b"/by/b/" in key}
        assert len(theirs) == 3
        for own, their in ((KEYS.node("a"), KEYS.node("b")), (STATUS, KEYS.status("b"))):
            etcd.put(own, etcd.get(own) or b"", lease=theirs[their.encode()].lease)
        again = session(etcd.client())
        async with running(again):
            await again.register(record("a"))
            await again.put_status(StatusRecord(public_key=wg_key("a"), revision=1))
            await again.enter("gcp", CandidateClass.PUBLIC)
            held = {kv.lease for key, kv in etcd.data.items() if b"/by/a/" in key}
            assert not held & {kv.lease for kv in theirs.values()}
            assert etcd.data[GCP.encode()].create_revision == created
            await again.forget()
        await trio.sleep(60)
        assert {key: kv for key, kv in etcd.data.items() if b"/by/" in key} == theirs


async def test_a_restart_with_another_ttl_keeps_the_place_in_the_queue() -> None:
    etcd = FakeEtcd()
    async with member(etcd):
        created = etcd.data[GCP.encode()].create_revision
    again = session(etcd.client(), lease_ttl=3)
    async with running(again):
        await again.register(record("a"))
        await again.enter("gcp", CandidateClass.PUBLIC)
        await trio.sleep(60)
        kv = etcd.data[GCP.encode()]
        assert (etcd.leases()[kv.lease], kv.create_revision) == (3, created)


async def test_a_restart_after_the_ttl_registers_without_touching_the_record() -> None:
    etcd = FakeEtcd()
    async with member(etcd):
        pass
    await trio.sleep(30)
    kv = etcd.data[NODE.encode()]
    again = session(etcd.client())
    async with running(again):
        await again.register(record("a"))
        assert again.candidacy is None
        assert etcd.data[NODE.encode()] == kv
        assert STATUS in etcd


async def test_another_candidacy_gives_the_old_up_first() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        created = etcd.data[GCP.encode()].create_revision
        await it.enter("gcp", CandidateClass.ANNOTATED_PUBLIC)
        assert etcd.data[GCP.encode()].create_revision > created, "entered anew"
        await it.enter("", CandidateClass.ANNOTATED_PUBLIC)
        assert etcd.keys(KEYS.by_root, "/elections/") == [KEYS.election("", "a")]
        changes = [(e.type.name, e.kv.key.decode()) for e in etcd._log if b"/elections/" in e.kv.key]
        assert changes[-2:] == [("DELETE", GCP), ("PUT", KEYS.election("", "a"))]
        await it.leave()
        assert etcd.keys(KEYS.by_root, "/elections/") == []
        await trio.sleep(30)
        assert etcd.keys(KEYS.by_root, "/elections/") == []


async def test_a_candidacy_that_changes_in_place_keeps_its_place_in_the_queue() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        created = etcd.data[GCP.encode()].create_revision
        await it.enter("gcp", CandidateClass.REST, in_place=True)
        assert etcd.data[GCP.encode()].create_revision == created
        assert decode_candidate(etcd.data[GCP.encode()].value).rank is CandidateClass.REST
        # Another one that is to queue anew does so all the same.
        await it.enter("gcp", CandidateClass.ANNOTATED)
        assert etcd.data[GCP.encode()].create_revision > created


async def test_a_lost_short_lease_is_replaced_and_its_keys_come_back_but_the_place_in_the_queue() -> None:
    etcd = FakeEtcd()
    events: list[str] = []
    async with member(etcd, on_event=events.append) as it:
        lease = etcd.data[GCP.encode()].lease
        await etcd.client().revoke_lease(lease)
        assert GCP not in etcd
        await eventually(lambda: STATUS in etcd, 10)
        assert it.healthy
        assert "lease lost" in events
        assert it.candidacy is None
        await trio.sleep(60)
        assert set(etcd.keys()) == {STATUS, NODE}
        assert await it.enter("gcp", CandidateClass.PUBLIC)
        assert GCP in etcd


async def test_a_host_cut_off_from_etcd_loses_its_candidacy_but_not_its_membership() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    async with member(etcd, client) as it:
        client.cut()
        await eventually(lambda: not it.healthy, 10)
        await trio.sleep(60)
        assert etcd.keys() == [NODE]
        assert not await it.put_status(StatusRecord(public_key=wg_key("a"), revision=2))
        client.mend()
        await eventually(lambda: STATUS in etcd and it.healthy, 20)
        assert decode_status(etcd.get(STATUS) or b"").revision == 2


async def test_an_outage_of_etcd_keeps_the_leases() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await trio.sleep(60)
        before, revision = dict(etcd.data), etcd.revision
        etcd.down()
        await trio.sleep(300)
        assert not it.healthy
        etcd.up()
        await eventually(lambda: it.healthy, 20)
        await trio.sleep(60)
        assert (dict(etcd.data), etcd.revision) == (before, revision)


async def test_leaving_while_etcd_is_away_is_made_up_for() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        etcd.down()
        assert not await it.leave()
        etcd.up()
        await eventually(lambda: GCP not in etcd, 20)
        assert STATUS in etcd


async def test_a_write_whose_answer_was_lost_is_found_again() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    it = session(client)
    async with running(it):
        client.lose_answer(1)
        with pytest.raises(Unavailable):
            await it.register(record("a"))
        await it.register(record("a"))
        client.lose_answer(2)
        await it.enter("gcp", CandidateClass.REST)
        await eventually(lambda: it.healthy and GCP in etcd, 20)


async def test_a_record_that_is_taken_away_comes_back_with_its_address() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        (address,) = await it.claim_addresses(SUBNETS)
        etcd.delete(NODE)
        etcd.delete(KEYS.address("a", address))
        await eventually(lambda: NODE in etcd and it.healthy, 10)
        assert KEYS.address("a", address) in etcd
        assert etcd.leases()[etcd.data[NODE.encode()].lease] == 86400


async def test_a_record_older_than_etcds_history_is_watched_too() -> None:
    etcd = FakeEtcd()
    async with member(etcd):
        pass
    for _ in range(5):
        etcd.put("/other", "x")
    etcd.compact()
    client = etcd.client()
    async with member(etcd, client):
        await trio.sleep(10)
        client.calls.clear()
        await trio.sleep(100)
        assert client.calls.count("txn") == 0, "it must not look again and again"
        etcd.delete(NODE)
        await eventually(lambda: NODE in etcd, 10)


async def test_a_candidacy_whose_answer_was_lost_does_not_outlive_its_desired_state() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    async with member(etcd, client) as it:
        await it.leave()
        await trio.sleep(0.5)
        client.lose_answer()
        assert not await it.enter("gcp", CandidateClass.PUBLIC)
        assert GCP in etcd
        await it.enter("aws", CandidateClass.PUBLIC)
        await trio.sleep(60)
        assert etcd.keys(KEYS.by_root, "/elections/") == [KEYS.election("aws", "a")]
        client.lose_answer()
        assert not await it.leave()
        assert await it.enter("aws", CandidateClass.PUBLIC)
        await trio.sleep(60)
        assert etcd.keys(KEYS.by_root, "/elections/") == [KEYS.election("aws", "a")]


@pytest.mark.parametrize("compacted", [False, True])
async def test_what_is_taken_away_from_under_the_short_lease_comes_back(compacted: bool) -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        created = etcd.data[GCP.encode()].create_revision
        for _ in range(3):
            await trio.sleep(60)
            if compacted:
                etcd.put("/other", "")
                etcd.compact()
                etcd.drop_watches()
            revision = etcd.revision
            etcd.delete(GCP)
            etcd.delete(STATUS)
            await trio.sleep(60)
            assert {GCP, STATUS} <= set(etcd.keys())
            assert etcd.data[GCP.encode()].create_revision > created, "it stands in line again, at the end"
            assert etcd.revision <= revision + 4, "and is restored once"
        await it.leave()
        await trio.sleep(60)
        assert GCP not in etcd


def _stands(etcd: FakeEtcd, key: str, value: bytes, lease: int) -> bool:
    kv = etcd.data.get(key.encode())
    return kv is not None and (kv.value, kv.lease) == (value, lease)


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("key", [GCP, STATUS])
@pytest.mark.parametrize("foreign", ["other value", "no lease", "another lease"])
async def test_an_overwritten_key_is_restored_at_once_in_its_place(key: str, foreign: str, compacted: bool) -> None:
    etcd = FakeEtcd()
    async with member(etcd):
        before = etcd.data[key.encode()]
        other = (await etcd.client().grant_lease(3600)).id
        await trio.sleep(60)
        if compacted:
            etcd.put("/other", "")
            etcd.compact()
            etcd.drop_watches()
        with structlog.testing.capture_logs() as logs:
            value = b"{}" if foreign == "other value" else before.value
            lease = {"other value": before.lease, "no lease": 0, "another lease": other}[foreign]
            revision = etcd.put(key, value, lease=lease)
            await eventually(lambda: _stands(etcd, key, before.value, before.lease), 5 if compacted else 0.1)
        assert etcd.data[key.encode()].create_revision == before.create_revision, "its place in the queue is kept"
        assert [log["key"] for log in logs if "another writer" in log["event"]] == [key]
        await trio.sleep(600)
        assert etcd.revision == revision + 1, "and it is restored once"


async def test_a_key_that_is_changed_again_and_again_is_restored_ever_less_often_and_named() -> None:
    etcd = FakeEtcd()
    events: list[str] = []
    async with member(etcd, on_event=events.append) as it:
        before = etcd.data[GCP.encode()]
        waited = []
        with structlog.testing.capture_logs() as logs:
            for count in range(10):
                etcd.put(GCP, "{}")
                if count % 2:
                    etcd.delete(GCP)
                began = trio.current_time()
                await eventually(lambda: _stands(etcd, GCP, before.value, before.lease), 70, every=0.01)
                waited.append(round(trio.current_time() - began, 1))
                assert (it.contested is None) == (count < 2)
                assert STATUS in etcd
        assert waited == [pytest.approx(one, abs=0.1) for one in (0, 1, 2, 4, 8, 16, 32, 60, 60, 60)]
        assert len([log for log in logs if "another writer" in log["event"]]) == 1, "one line for all of them"
        assert it.contested is not None
        assert GCP in it.contested
        assert not about_status_key(it.contested)
        assert events.count("contested") == 1
        await eventually(lambda: it.contested is None, 400, every=10)
        assert events.count("contested") == 2
        etcd.put(GCP, "{}")
        await eventually(lambda: _stands(etcd, GCP, before.value, before.lease), 0.1)


async def test_a_contested_status_is_told_from_other_keys() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await overwritten(etcd, STATUS, times=4)
        assert it.contested is not None
        assert about_status_key(it.contested)


async def test_a_contested_candidacy_is_no_status_whatever_its_location_is_called() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        assert await it.enter("eu-status", CandidateClass.REST)
        key = KEYS.election("eu-status", "a")
        await overwritten(etcd, key, times=4)
        assert it.contested is not None
        assert it.contested.startswith(key)
        assert not about_status_key(it.contested)
        others = (KEYS.endpoint("eu-status", "a"), KEYS.probe_report("eu-status", "a"))
        assert [other for other in others if about_status_key(it.contested.replace(key, other))] == []


async def test_news_is_written_although_a_key_waits_to_be_restored() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        for _ in range(6):
            etcd.put(STATUS, "{}")
            etcd.put(GCP, "{}")
            await eventually(lambda: b"{}" not in (etcd.get(STATUS), etcd.get(GCP)), 60)
        etcd.put(STATUS, "{}")
        etcd.put(GCP, "{}")
        await eventually(lambda: len(it._leased.changed) == 2)
        assert not it.healthy
        assert await it.put_status(StatusRecord(public_key=wg_key("a"), revision=2))
        assert decode_status(etcd.get(STATUS) or b"").revision == 2
        assert etcd.get(GCP) == b"{}"
        assert await it.leave()
        assert GCP not in etcd


async def test_a_host_that_ends_leaves_no_key_that_another_writer_has_taken_from_its_lease() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await overwritten(etcd, GCP, times=6)
        etcd.put(GCP, "{}")
        await eventually(lambda: bool(it._leased.changed))
        await it.resign()
        assert etcd.keys() == [NODE]


@pytest.mark.parametrize("registered", [True, False])
async def test_a_host_that_ends_leaves_the_keys_of_the_host_that_has_its_name_by_now(registered: bool) -> None:
    """The other host has written its status, and its record too or not yet."""
    etcd = FakeEtcd()
    client = etcd.client()
    async with member(etcd, client) as it:
        client.stall(3600)
        lease = (await etcd.client().grant_lease(3600)).id
        theirs = {STATUS: encode(StatusRecord(public_key=wg_key("b")))}
        if registered:
            theirs |= {NODE: encode(record("b")), GCP: encode(CandidateRecord(rank=CandidateClass.REST))}
        for key, value in theirs.items():
            etcd.put(key, value, lease=lease)
            await it._leased.compare(key, etcd.data[key.encode()], etcd.revision)
        assert set(it._leased.changed) == theirs.keys() - {NODE}
        await it.resign()
        assert {key: etcd.get(key) for key in theirs} == theirs
        assert set(etcd.keys()) == {NODE, *theirs}


async def test_a_host_that_ends_deletes_thousands_of_forged_keys_in_a_few_writes() -> None:
    """It has two seconds for that, and its lease ends after it."""
    etcd = FakeEtcd(delay=0.05)
    async with member(etcd) as it:
        forged = {KEYS.election(f"x{number}", "a") for number in range(2000)}
        for key in forged:
            etcd.put(key, '{"rank":0}')
        await overwritten(etcd, STATUS, times=3)
        etcd.put(STATUS, "{}")
        await eventually(lambda: STATUS in it._leased.changed)
        await it._leased.find([etcd.data[key.encode()] for key in forged], etcd.revision)
        with trio.fail_after(2):
            await it.resign()
        assert etcd.keys() == [NODE]


async def test_own_writes_are_not_taken_for_those_of_another() -> None:
    """Answers that are lost, events that come twice or late, a restart with another lease, and a restored etcd."""
    etcd = FakeEtcd(delay=0.05)
    client = etcd.client()
    with structlog.testing.capture_logs() as logs:
        async with member(etcd, client) as it:
            saved = etcd.backup()
            for revision in range(2, 30):
                if revision % 3 == 0:
                    client.lose_answer()
                if revision % 4 == 0:
                    client.repeat_batches(2)
                if revision % 5 == 0:
                    client.stall(3)
                await it.put_status(StatusRecord(public_key=wg_key("a"), revision=revision))
                await it.enter("gcp", CandidateClass.PUBLIC if revision % 2 else CandidateClass.REST)
                await trio.sleep(revision % 7)
            await trio.sleep(10)
            etcd.restore(saved)
            await trio.sleep(30)
            assert it._leased._backoffs == {}
        async with running(again := session(etcd.client(), lease_ttl=3)):
            await again.register(record("a"))
            await trio.sleep(30)
            assert again._leased._backoffs == {}
    assert [log for log in logs if "another writer" in log["event"]] == []


async def test_a_forged_status_without_a_lease_is_no_living_host() -> None:
    """Overwritten are the record and the status; a living host's would be respected."""
    etcd = FakeEtcd()
    async with member(etcd):
        before = etcd.data[STATUS.encode()]
        etcd.put(STATUS, encode(StatusRecord(public_key=wg_key("b"))))
        etcd.put(NODE, encode(record("b")))
        await eventually(lambda: _stands(etcd, STATUS, before.value, before.lease))
        await eventually(lambda: decode_node(etcd.get(NODE) or b"") == record("a"))


async def test_copies_of_a_machine_overwrite_each_other_ever_less_often() -> None:
    """They differ in their statuses only, so nobody is refused."""
    etcd = FakeEtcd(delay=0.01)
    one, copy = session(etcd.client()), session(etcd.client())
    async with running(one, copy):
        for number, each in enumerate((one, copy)):
            await each.register(record("a"))
            await each.put_status(StatusRecord(public_key=wg_key("a"), revision=number))
        await trio.sleep(300)
        revision = etcd.revision
        await trio.sleep(600)
        assert 5 <= etcd.revision - revision <= 21
        assert "a copy of this machine" in (one.contested or "")
        assert "a copy of this machine" in (copy.contested or "")


async def test_a_name_lost_with_no_address_left_is_an_error_not_the_end() -> None:
    etcd = FakeEtcd()
    it = session(etcd.client())
    async with running(it):
        small = (ip_network("10.4.0.0/30"),)
        (mine,) = await it.claim_addresses(small)
        await it.register(record("a"))
        etcd.delete(NODE)
        etcd.delete(KEYS.address("a", mine))
        for name, text in (("b", "10.4.0.1"), ("c", "10.4.0.2")):
            etcd.put(KEYS.address(name, ip_address(text)), "")
            etcd.put_kept(KEYS.reservation(name), "")
        await eventually(lambda: "no address is left" in (it.last_error or ""))
        assert not it.healthy
        for name in "bc":
            etcd.delete(KEYS.address(name, mine))
        await eventually(lambda: it.healthy, 90)
        assert KEYS.address("a", mine) in etcd


async def test_a_copy_of_a_machine_makes_no_storm() -> None:
    """Both have the name and the key, so neither is refused; but their records differ."""
    etcd = FakeEtcd(delay=0.01)
    one, copy = session(etcd.client()), session(etcd.client())
    async with running(one, copy):
        await one.register(record("a"))
        await copy.register(record("a", subnets="172.16.0.0/16"))
        await trio.sleep(30)
        assert "a copy of this machine" in f"{one.last_error} {copy.last_error}"
        revision = etcd.revision
        await trio.sleep(600)
        assert etcd.revision - revision <= 10 * 11
    await trio.sleep(120)
    alone = session(etcd.client())
    async with running(alone):
        await alone.register(record("a"))
        await eventually(lambda: alone.healthy)
        assert decode_node(etcd.get(NODE) or b"") == record("a")


async def test_a_lost_long_lease_means_registering_again() -> None:
    etcd = FakeEtcd()
    async with member(etcd, forget_after=600) as it:
        await etcd.client().revoke_lease(etcd.data[NODE.encode()].lease)
        await eventually(lambda: NODE in etcd and it.healthy, 20)
        await trio.sleep(1200)
        assert NODE in etcd


async def test_the_second_living_host_of_a_name_is_refused_and_told_who_the_first_is() -> None:
    etcd = FakeEtcd()
    async with member(etcd):
        other = session(etcd.client(), key="other")
        started = trio.current_time()
        with pytest.raises(NameTaken) as refused:
            await other.register(record("other"))
        assert trio.current_time() - started == pytest.approx(6, abs=0.5)
        assert wg_key("a") in str(refused.value)
        assert "203.0.113.1:51820" in str(refused.value)
        assert decode_node(etcd.get(NODE) or b"").public_key == wg_key("a")


async def test_a_reinstalled_host_replaces_its_dead_self_as_soon_as_it_is_dead() -> None:
    etcd = FakeEtcd()
    async with member(etcd):
        pass
    new = session(etcd.client(), key="new")
    async with running(new):
        started = trio.current_time()
        await new.register(record("new"))
        assert trio.current_time() - started <= 6
        assert decode_node(etcd.get(NODE) or b"").public_key == wg_key("new")
        assert decode_status(etcd.get(STATUS) or b"").public_key == wg_key("new")


async def test_a_host_that_lost_its_name_while_away_does_not_fight_for_it() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    async with member(etcd, client) as old:
        client.cut()
        await trio.sleep(30)
        new = session(etcd.client(), key="new")
        async with running(new):
            await new.register(record("new"))
            client.mend()
            await eventually(lambda: "is taken" in (old.last_error or ""), 30)
            await trio.sleep(60)
            await old.record_leader("gcp", known_revision=etcd.revision)
            assert LED not in etcd
            assert "is taken" in (old.last_error or ""), "what wrote nothing does not end the error"
            assert not old.healthy
            assert new.healthy
            assert decode_node(etcd.get(NODE) or b"").public_key == wg_key("new")
            assert GCP not in etcd


class Confined(FakeClient):
    """A client whose role in etcd has no right to the probe reports."""

    async def txn(self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()) -> Any:
        if any("/probe-reports/" in str(getattr(op, "key", "")) for op in success):
            raise PermissionDenied("etcdserver: permission denied")
        return await super().txn(compare, success, failure)


async def test_a_host_that_may_publish_nothing_of_others_is_a_candidate_and_reports_all_the_same() -> None:
    etcd = FakeEtcd()
    async with member(etcd, Confined(etcd, "a")) as a:
        record = ProbeReportRecord(leader="b", candidacy=5)
        assert not await a.put_probe_reports({"gcp": record})
        assert a.last_error is not None
        await a.enter("gcp", CandidateClass.PUBLIC)
        assert etcd.get(KEYS.election("gcp", "a")) is not None
        await a.put_status(StatusRecord(public_key=wg_key("a"), revision=9))
        assert decode_status(etcd.get(KEYS.status("a")) or b"").revision == 9
        await a.leave()
        assert etcd.get(KEYS.election("gcp", "a")) is None
        assert etcd.get(KEYS.probe_report("gcp", "a")) is None


async def test_a_lease_that_etcd_refuses_to_end_keeps_nothing_of_the_host() -> None:
    """Another user can put a key of its own under the lease."""

    class Refused(FakeClient):
        async def revoke_lease(self, lease_id: int) -> None:
            await trio.lowlevel.checkpoint()
            raise PermissionDenied("may not revoke the lease")

    etcd = FakeEtcd()
    async with member(etcd, Refused(etcd, "a"), lease_ttl=600) as a:
        await a.record_leader("gcp", known_revision=etcd.revision)
        await a.resign()
        assert etcd.keys() == [LED, NODE]
        await a.forget()
        assert etcd.keys() == []


async def test_a_forged_key_that_a_host_may_not_delete_hinders_no_other_write() -> None:
    etcd = FakeEtcd()
    mirror = Mirror(etcd.client(), KEYS)
    denied, observed, candidacy = KEYS.probe_report("aws", "a"), KEYS.endpoint("b", "a"), KEYS.election("aws", "a")
    async with member(etcd, Confined(etcd, "a")) as a, trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        await trio.sleep(60)
        for key in (denied, candidacy):
            etcd.put(key, "{}")

        async def compared() -> bool:
            assert mirror.current is not None
            await a.compare(mirror.current, mirror, on_record=False)
            return candidacy not in etcd

        await eventually(compared, 30)
        assert denied in etcd
        assert a.last_error is not None
        await a.put_status(StatusRecord(public_key=wg_key("a"), revision=9))
        assert decode_status(etcd.get(KEYS.status("a")) or b"").revision == 9
        await a.put_observed_endpoints(
            {"b": ObservedEndpointRecord(public_key=wg_key("b"), endpoint=Endpoint.parse("192.0.2.1:1"))}
        )
        assert observed in etcd
        await a.leave()
        assert GCP not in etcd
        nursery.cancel_scope.cancel()


async def test_a_record_is_no_older_than_the_key_that_it_states() -> None:
    """Of two records with one key the older one keeps it: whoever gets a copied key file must not be that one."""
    etcd = FakeEtcd()
    first = session(etcd.client(), key="first")
    async with running(first):
        await first.register(record("first"))
        await first.resign()
    before = etcd.data[NODE.encode()]
    again = session(etcd.client(), key="first")
    async with running(again):
        await again.register(record("first"))
        assert etcd.data[NODE.encode()].create_revision == before.create_revision
        etcd.put(NODE, encode(record("another")))
        await eventually(lambda: decode_node(etcd.get(NODE) or b"").public_key == wg_key("first"), 10)
        assert etcd.data[NODE.encode()].create_revision == before.create_revision, "it is restored with its age"
        await again.resign()
    revision = etcd.revision
    other = session(etcd.client(), key="copied")
    async with running(other):
        await other.register(record("copied"))
        assert decode_node(etcd.get(NODE) or b"").public_key == wg_key("copied")
        assert etcd.data[NODE.encode()].create_revision > revision


@pytest.mark.parametrize("away", [False, True])
async def test_before_a_reload_the_lease_is_renewed_but_etcd_is_not_waited_for(away: bool) -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    async with member(etcd, client) as it:
        lease, other = etcd.data[GCP.encode()].lease, etcd.client()

        async def left() -> int:
            return (await other.lease_time_to_live(lease)).ttl

        async def partly_over() -> bool:
            return await left() <= etcd.leases()[lease] - 2

        await eventually(partly_over)
        before, began = await left(), trio.current_time()
        if away:
            client.cut()
        await it.renew()
        assert trio.current_time() - began <= 1
        assert (await left() > before) is not away


async def test_resigning_leaves_the_membership() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await it.resign()
        assert etcd.keys() == [NODE]
        await trio.sleep(30)
        assert etcd.keys() == [NODE]
        assert len(etcd.leases()) == 1


async def test_forgetting_leaves_nothing_of_the_host_and_everything_of_the_operator() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await it.claim_addresses(SUBNETS)
        await it.record_leader("gcp", known_revision=0)
        etcd.put(KEYS.location("a"), "gcp")
        await it.forget()
        await trio.sleep(30)
        assert etcd.keys() == [KEYS.location("a")]
        assert etcd.leases() == {}


# --- what is claimed ------------------------------------------------------------------------------------------------


async def test_the_first_agent_decides_the_mesh_and_the_others_follow() -> None:
    etcd = FakeEtcd()
    first, second = session(etcd.client()), session(etcd.client(), "b")
    wanted = (ip_network("10.4.0.0/16"), ip_network("fd00::/64"))
    assert await first.ensure_mesh(MeshSettings(Granularity.FULL, wanted)) == (Granularity.FULL, wanted, "routed")
    revision = etcd.revision
    assert await second.ensure_mesh(MeshSettings(Granularity.CROSS, SUBNETS, InternalIPs.OFF)) == (
        Granularity.FULL,
        wanted,
        "routed",
    )
    assert etcd.revision == revision


async def test_unreadable_subnets_are_looked_up_in_history_or_named() -> None:
    etcd = FakeEtcd()
    it = session(etcd.client())
    await it.ensure_mesh(MeshSettings(Granularity.FULL, SUBNETS))
    etcd.put(KEYS.subnets, "nonsense")
    assert await it.ensure_mesh(MeshSettings(Granularity.FULL, ())) == (Granularity.FULL, SUBNETS, "routed")
    etcd.compact()
    with pytest.raises(RecordError, match="/kilo/mesh/subnets: 'nonsense' is no network"):
        await it.ensure_mesh(MeshSettings(Granularity.FULL, SUBNETS))


async def test_a_host_that_joins_where_nodes_encrypt_undoes_nothing() -> None:
    """Whether the setting is unreadable in all of history, or missing."""
    etcd = FakeEtcd()
    it = session(etcd.client())
    wanted = MeshSettings(Granularity.FULL, SUBNETS, InternalIPs.ROUTED)
    await it.ensure_mesh(wanted)
    etcd.put(KEYS.internal_ips, "encrypted-please")
    etcd.compact()
    assert (await it.ensure_mesh(wanted)).internal_ips is InternalIPs.OFF
    etcd.put(KEYS.node("z"), encode(record("z", encryption=EncryptionStage.SENDS)))
    assert (await it.ensure_mesh(wanted)).internal_ips is InternalIPs.ENCRYPTED
    etcd.delete(KEYS.internal_ips)
    assert (await it.ensure_mesh(wanted)).internal_ips is InternalIPs.ENCRYPTED
    assert etcd.get(KEYS.internal_ips) == b"encrypted"
    etcd.delete(KEYS.internal_ips)
    await it.ensure_mesh(wanted, restores=True)
    assert etcd.get(KEYS.internal_ips) == b"routed", "known to have been in force"


async def test_hosts_that_claim_at_once_never_share_an_address() -> None:
    etcd = FakeEtcd(delay=0.01)
    subnets = (ip_network("10.9.0.0/27"), ip_network("fd00::/124"))
    claimed: dict[str, tuple[IPAddress, ...]] = {}

    async def claim(name: str) -> None:
        claimed[name] = await session(etcd.client(), name).claim_addresses(subnets)

    async with trio.open_nursery() as nursery:
        for i in range(15):
            nursery.start_soon(claim, f"node-{i}")
    everything = [address for addresses in claimed.values() for address in addresses]
    assert len(everything) == len(set(everything)) == 30
    assert all([a.version for a in addresses] == [4, 6] for addresses in claimed.values())
    assert {"10.9.0.0", "10.9.0.31", "fd00::"}.isdisjoint(map(str, everything))
    revision = etcd.revision
    assert await session(etcd.client(), "node-3").claim_addresses(subnets) == claimed["node-3"]
    assert etcd.revision == revision


@pytest.mark.parametrize("seed", range(20))
async def test_hosts_that_claim_at_once_share_nothing_whatever_fails(seed: int) -> None:
    """Answers are lost, and agents end between any two steps and start again, in a subnet with few addresses."""
    rng = random.Random(seed)
    etcd = FakeEtcd(delay=0.01)
    subnets = (ip_network("10.9.0.0/28"),)
    used: dict[str, IPAddress] = {}

    async def host(name: str) -> None:
        while name not in used:
            client = etcd.client()
            with trio.move_on_after(rng.choice((0.005, 0.02, 0.035, 0.06, 1.0))), suppress(Unavailable):
                await trio.sleep(rng.uniform(0, 0.03))
                if rng.random() < 0.3:
                    client.lose_answer(rng.randint(1, 2))
                (used[name],) = await session(client, name).claim_addresses(subnets)
                assert len(set(used.values())) == len(used), "no address is used twice, at no time"

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(host, f"node-{number}")
    for name, address in used.items():
        claims = [kv for key, kv in etcd.data.items() if key.endswith(f"/addresses/{address}".encode())]
        assert min(claims, key=lambda kv: kv.create_revision).key == KEYS.address(name, address).encode()


async def claimed_by_a(etcd: FakeEtcd) -> tuple[Session, str]:
    """A member that has a mesh address, and the key of its claim."""
    it = session(etcd.client())
    (address,) = await it.claim_addresses(SUBNETS)
    return it, KEYS.address("a", address)


async def test_a_host_that_joins_reads_keys_and_only_the_records_of_nodes_without_a_claim() -> None:
    read = list[str]()

    class Reading(FakeClient):
        async def txn(self, *arguments: Any, **options: Any) -> TxnResult:
            result = await super().txn(*arguments, **options)
            for response in result.responses:
                read.extend(kv.key.decode() for kv in getattr(response, "kvs", ()) if kv.value)
            return result

        async def range(self, *arguments: Any, **options: Any) -> Any:
            result = await super().range(*arguments, **options)
            read.extend(kv.key.decode() for kv in result.kvs if kv.value)
            return result

        async def get_prefix(self, *arguments: Any, **options: Any) -> Any:
            result = await super().get_prefix(*arguments, **options)
            read.extend(kv.key.decode() for kv in result.kvs if kv.value)
            return result

    etcd, first = FakeEtcd(), list(itertools.islice(candidates("a", SUBNETS[0], lambda _address: True), 2))
    for number in range(150):
        name, address = f"x{number}", ip_address(f"10.4.9.{number}")
        stated = (ip_interface(f"{address}/16"),)
        etcd.put_kept(KEYS.node(name), encode(record(name, mesh_addresses=stated)))
        etcd.put(KEYS.address(name, address), "")
    etcd.put_kept(KEYS.node("unclaimed"), encode(record("u", mesh_addresses=(ip_interface(f"{first[0]}/16"),))))
    etcd.put(KEYS.location("x1"), "gcp")
    it = session(Reading(etcd, "a"))
    assert await it.claim_addresses(SUBNETS) == (first[1],), "an address that a record states is not taken"
    assert read == [KEYS.node("unclaimed")]


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_claim_that_another_writer_deleted_is_restored_and_the_address_stays(restarted: bool) -> None:
    etcd = FakeEtcd()
    it, claim = await claimed_by_a(etcd)
    async with running(it):
        await it.register(record("a"))
        assert decode_node(etcd.data[NODE.encode()].value).mesh_addresses == (ip_interface(f"{it.addresses[0]}/16"),)
        etcd.delete(claim)
        newcomer = session(etcd.client(), "b")
        other = await newcomer.claim_addresses((ip_network(f"{it.addresses[0]}/31", strict=False),))
        assert other != it.addresses, "an address that a record states is not taken"
        again = session(etcd.client()) if restarted else it
        assert await again.claim_addresses(SUBNETS) == it.addresses
        assert claim in etcd
        revision = etcd.revision
        assert await again.claim_addresses(SUBNETS) == it.addresses
        assert etcd.revision == revision


async def test_a_forged_record_does_not_renumber_the_host_that_starts() -> None:
    etcd = FakeEtcd()
    it, _ = await claimed_by_a(etcd)
    other = session(etcd.client(), "b", "b")
    (theirs,) = await other.claim_addresses(SUBNETS)
    etcd.put(NODE, encode(evolve(record("a"), mesh_addresses=(ip_interface(f"{theirs}/16"),))))
    again = session(etcd.client())
    assert await again.claim_addresses(SUBNETS) == it.addresses
    assert etcd.keys(KEYS.by_root, "/addresses/") == [
        KEYS.address("a", it.addresses[0]), KEYS.address("b", theirs)
    ]  # fmt: skip


class Beaten(FakeClient):
    """A client whose first claim comes after one of node b."""

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        for key in [str(op.key) for op in success if isinstance(op, Put)]:
            if "/addresses/" in key and not self.server.keys(KEYS.by("b")):
                self.server.put(key.replace("/by/a/", "/by/b/"), "")
        return await super().txn(compare, success, failure)


async def test_of_two_hosts_that_claim_one_address_at_once_the_first_has_it() -> None:
    (address,) = await session(FakeEtcd().client()).claim_addresses(SUBNETS)
    etcd = FakeEtcd()
    (mine,) = await session(Beaten(etcd)).claim_addresses(SUBNETS)
    assert mine != address
    kept = [KEYS.address("a", mine), KEYS.reservation("a"), KEYS.address("b", address)]
    assert etcd.keys() == kept, "its own later claim is gone"


@pytest.mark.parametrize("rival_first", [False, True])
async def test_a_host_that_ended_between_claim_and_look_looks_again(rival_first: bool) -> None:
    (address,) = await session(FakeEtcd().client()).claim_addresses(SUBNETS)
    etcd = FakeEtcd()
    own, rival = KEYS.address("a", address), KEYS.address("b", address)
    for key in (rival, own) if rival_first else (own, rival):
        etcd.put(key, "")
        etcd.put_kept(KEYS.reservation("a" if key == own else "b"), "")
    revision = etcd.revision
    (mine,) = await session(etcd.client()).claim_addresses(SUBNETS)
    assert (mine == address) is not rival_first
    assert (own in etcd) is not rival_first
    assert rival in etcd, "nobody deletes another's claim"
    assert etcd.revision == revision + 1 + 2 * rival_first, (
        "its reservation is under its lease, and it has moved or not"
    )


async def test_an_address_that_an_older_claim_has_is_given_up_and_the_record_says_so() -> None:
    """The claim was deleted while the host was away, and another host claimed the address meanwhile."""
    etcd = FakeEtcd()
    it, claim = await claimed_by_a(etcd)
    async with running(it):
        await it.register(record("a"))
        address = it.addresses[0]
        etcd.delete(claim)
        etcd.put(KEYS.address("b", address), "")
        etcd.put_kept(KEYS.reservation("b"), "")
        etcd.put(claim, "")
        assert await it.claim_addresses(SUBNETS) == (address,), "claim and record agree, and nobody doubts it"
        (now,) = await it.claim_addresses(SUBNETS, doubted=True)
        assert now != address
        assert claim not in etcd
        assert KEYS.address("b", address) in etcd
        await eventually(lambda: decode_node(etcd.data[NODE.encode()].value).mesh_addresses[0].ip == now, 10)
        revision = etcd.revision
        assert await it.claim_addresses(SUBNETS, doubted=True) == (now,)
        assert etcd.revision == revision


async def test_a_host_that_starts_with_claim_and_record_asks_for_no_other_s_keys() -> None:
    etcd = FakeEtcd()
    it, _ = await claimed_by_a(etcd)
    async with running(it):
        await it.register(record("a"))
    client = etcd.client()
    assert await session(client).claim_addresses(SUBNETS) == it.addresses
    assert client.calls == ["txn", "range", "lease_time_to_live", "refresh_lease", "txn"], (
        "its name, its reservation, and what it has"
    )


async def test_changed_subnets_renumber_a_host_only_on_purpose() -> None:
    etcd = FakeEtcd()
    it, claim = await claimed_by_a(etcd)
    await it.ensure_mesh(MeshSettings(Granularity.LOCATION, SUBNETS))
    async with running(it):
        await it.register(record("a"))
    etcd.put(KEYS.subnets, "10.5.0.0/16")
    other = (ip_network("10.5.0.0/16"),)
    again = session(etcd.client())
    assert await again.subnets_in_force(other) == SUBNETS
    assert await again.claim_addresses(SUBNETS) == it.addresses
    (new,) = await again.claim_addresses(other, renumber=True)
    assert new in other[0]
    assert claim not in etcd
    await again.register(record("a"))
    assert await session(etcd.client()).subnets_in_force(other) == other


async def test_a_full_subnet_is_said_so() -> None:
    etcd = FakeEtcd()
    subnets = (ip_network("10.9.0.0/30"),)
    for name in ("x", "y"):
        await session(etcd.client(), name).claim_addresses(subnets)
    with pytest.raises(NoAddressLeft, match=r"no address is left for z in 10\.9\.0\.0/30"):
        await session(etcd.client(), "z").claim_addresses(subnets)


async def test_a_claim_whose_answer_was_lost_is_the_one() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    it = session(client)
    (expected,) = await session(FakeEtcd().client()).claim_addresses(SUBNETS)
    etcd.put(KEYS.address("a", expected), "")
    assert await it.claim_addresses(SUBNETS) == (expected,)


@pytest.mark.parametrize(
    ("subnet", "count"),
    [("10.0.0.0/29", 6), ("10.0.0.0/31", 2), ("10.0.0.1/32", 1), ("fd00::/125", 7), ("fd00::/127", 2)],
)
def test_the_candidates_are_every_host_address_once(subnet: str, count: int) -> None:
    addresses = list(candidates("a", ip_network(subnet), lambda _address: True))
    assert len(addresses) == len(set(addresses)) == count
    assert ip_address("10.0.0.0") not in addresses or count == 2


def test_evolve_keeps_equal_records_equal_bytes() -> None:
    assert encode(evolve(record("a"))) == encode(record("a"))


async def test_who_may_say_nothing_of_others_keeps_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    allowed = client.txn

    async def txn(compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        if any("/probe-reports/" in str(getattr(op, "key", "")) for op in success):
            raise PermissionDenied("user a may not write on '/kilo/by/a/probe-reports/'")
        return await allowed(compare, success, failure)

    monkeypatch.setattr(client, "txn", txn)
    async with member(etcd, client) as it:
        assert not await it.put_probe_reports({"home": ProbeReportRecord(leader="h", candidacy=7)})
        assert await it.leave() is False
        assert GCP not in etcd
        await it.enter("gcp", CandidateClass.PUBLIC)
        assert GCP in etcd
        assert it.last_error is not None
        assert await it.put_probe_reports({})
        assert it.healthy


async def test_probe_reports_stay_under_the_lease_and_are_adopted() -> None:
    etcd = FakeEtcd()
    reports = {"home": ProbeReportRecord(leader="h", candidacy=7, targets=("a",), leader_reachable=True)}
    async with member(etcd) as it:
        assert await it.put_probe_reports(reports)
        assert etcd.data[b"/kilo/by/a/probe-reports/home"].lease == etcd.data[GCP.encode()].lease
        again = session(etcd.client())
        async with running(again):
            await again.register(record("a"))
            assert again.probe_reports == reports
            assert await again.put_probe_reports({})
            assert "/kilo/by/a/probe-reports/home" not in etcd


async def test_what_was_withdrawn_while_etcd_was_not_trusted_goes_when_it_is_again() -> None:
    """The keys stand there yet, under the lease of this very run."""

    class Guard(NoGuard):
        trusted = True

        def check(self) -> None:
            if not self.trusted:
                raise ClusterNotTrusted("another cluster")

    etcd, guard = FakeEtcd(), Guard()
    reports = {"home": ProbeReportRecord(leader="h", candidacy=7, targets=("a",), leader_reachable=True)}
    async with member(etcd, guard=guard) as it:
        await it.put_probe_reports(reports)
        await it.put_stage(StageRecord(revision=1))
        standing = (KEYS.probe_report("home", "a"), KEYS.stage("a"), GCP)
        assert all(key in etcd for key in standing)
        guard.trusted = False
        assert not await it.put_probe_reports({})
        assert not await it.put_stage(None)
        assert not await it.leave()
        guard.trusted, guard.generation = True, 1
        await eventually(lambda: not any(key in etcd for key in standing), 5)
        assert STATUS in etcd


async def test_what_another_put_under_no_lease_is_not_deleted_after_the_host_has_put_its_own() -> None:
    """The mirror is behind: it still has what the other writer put."""
    etcd = FakeEtcd()
    mirror = Mirror(etcd.client(), KEYS)
    async with member(etcd) as it, trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        etcd.put(LED, "x")
        await eventually(lambda: mirror.faulty("a") == {LED})
        nursery.cancel_scope.cancel()
    assert mirror.current is not None
    async with member(etcd) as it:
        assert await it.record_leader("gcp", known_revision=etcd.revision)
        own = etcd.data[LED.encode()]
        await it.compare(mirror.current, mirror, on_record=False)
        await eventually(lambda: it.healthy)
        assert etcd.data[LED.encode()] == own
        await it.compare(mirror.current, mirror, on_record=False)
        assert it.healthy, "what etcd is known to hold otherwise since is not found again"


@pytest.mark.parametrize("resigns", [False, True])
async def test_a_forged_key_that_changes_keeps_no_other_from_being_deleted(resigns: bool) -> None:
    etcd = FakeEtcd()
    mirror = Mirror(etcd.client(), KEYS)
    forged = [KEYS.election(f"x{number}", "a") for number in range(150)]
    async with member(etcd) as it, trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        await trio.sleep(60)
        for key in forged:
            etcd.put(key, '{"rank":0}')
        await eventually(lambda: mirror.current and mirror.current.revision == etcd.revision)
        assert mirror.current is not None
        nursery.cancel_scope.cancel()
    async with member(etcd) as it:
        etcd.put(forged[7], "{}")
        await trio.sleep(60)
        if resigns:
            await it._leased.find(filter(None, map(mirror.kv, forged)), etcd.revision)
            await it.resign()
        else:
            await it.compare(mirror.current, mirror, on_record=False)
            await eventually(lambda: len(etcd.keys(part="/elections/x")) <= 1)
            assert it.healthy
        assert etcd.keys(part="/elections/x") == [forged[7]]


async def test_thousands_of_keys_in_a_host_s_name_are_deleted_in_a_few_writes_and_watched_by_nobody() -> None:
    """As by somebody who may write there and wants to keep the agent busy until its lease ends."""
    calls: list[str] = []

    class Counting(FakeClient):
        async def txn(self, *arguments: Any, **options: Any) -> Any:
            calls.append("txn")
            return await super().txn(*arguments, **options)

        def watch(self, *arguments: Any, **options: Any) -> Any:
            calls.append("watch")
            return super().watch(*arguments, **options)

    etcd = FakeEtcd()
    mirror = Mirror(etcd.client(), KEYS)
    async with member(etcd, Counting(etcd, "a")) as it, trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        await trio.sleep(60)
        calls.clear()
        forged = {make(f"x{number}", "a") for number in range(1000) for make in (KEYS.election, KEYS.probe_report)}
        for key in forged:
            etcd.put(key, '{"rank":0,"leader":"b","candidacy":1}')
        while set(etcd.keys()) & forged:
            await trio.sleep(0.1)
            assert mirror.current is not None
            await it.compare(mirror.current, mirror, on_record=False)
        assert calls.count("watch") == 0
        assert calls.count("txn") <= len(forged) / 100 + 10
        assert GCP in etcd
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("value", ["junk", '{"rank":0,"leader":7}'])
async def test_what_nobody_can_read_in_a_host_s_name_is_deleted_under_whatever_lease_it_stands(value: str) -> None:
    """But no key of another's, nor the host's own record and claims, which are not under a short lease."""
    etcd = FakeEtcd()
    mirror = Mirror(etcd.client(), KEYS)
    etcd.put_kept("/kilo/by/older/addresses/10.4.0.77", "")
    etcd.put_kept("/kilo/by/older/reservation", "")
    unreadable = KEYS.probe_report("home", "a"), KEYS.election("x" * 1100, "a"), KEYS.endpoint("b", "a")
    candidacy = KEYS.election("aws", "a")
    kept = KEYS.election("aws", "b"), KEYS.location("c"), KEYS.node("a"), "/kilo/by/a/addresses/10.4.0.77"
    async with member(etcd) as it, trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        await trio.sleep(60)
        for key in (*unreadable, candidacy, *kept[:2]):
            etcd.put_kept(key, value)
        etcd.put_kept(kept[3], "")
        await eventually(lambda: mirror.current and mirror.current.revision == etcd.revision)
        assert mirror.current is not None
        rejected = {record.key for record in mirror.current.rejected}
        assert rejected >= {unreadable[0], unreadable[2], kept[3]}
        await it.compare(mirror.current, mirror, on_record=False)
        await eventually(lambda: not {*unreadable, candidacy} & set(etcd.keys()))
        await trio.sleep(60)
        assert set(kept) <= set(etcd.keys())
        assert GCP in etcd
        assert it.healthy
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("late", [False, True])
async def test_a_forged_key_goes_although_the_host_has_just_deleted_something_that_the_mirror_does_not_watch(
    late: bool,
) -> None:
    etcd = FakeEtcd()
    mirror = Mirror(etcd.client(), KEYS)
    forged = KEYS.election("aws", "a")
    async with member(etcd) as it, trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        await it.put_stage(StageRecord(revision=1))
        await trio.sleep(60 * late)
        etcd.put_kept(forged, '{"rank":0}')
        await it.put_stage(None)
        await eventually(lambda: mirror.current and "aws" in mirror.current.candidates)
        for _ in range(5):
            await trio.sleep(30)
            assert mirror.current is not None
            await it.compare(mirror.current, mirror, on_record=False)
        await eventually(lambda: forged not in etcd)
        assert it.healthy
        nursery.cancel_scope.cancel()


async def test_a_forged_key_goes_although_it_was_written_again_while_it_was_being_deleted() -> None:
    etcd = FakeEtcd()
    mirror = Mirror(etcd.client(), KEYS)
    forged = KEYS.election("aws", "a")

    class Racing(FakeClient):
        armed = True

        async def txn(self, compare: Any, success: Any = (), failure: Any = ()) -> Any:
            if Racing.armed and any(getattr(op, "key", None) == forged for op in success):
                Racing.armed = False
                etcd.put_kept(forged, '{"rank":1}')
                etcd.put_kept(KEYS.status("b"), "{}")
            return await super().txn(compare, success, failure)

    async with member(etcd, Racing(etcd, "a")) as it, trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        await trio.sleep(60)
        etcd.put_kept(forged, '{"rank":0}')
        await eventually(lambda: mirror.current and "aws" in mirror.current.candidates)
        for _ in range(5):
            await trio.sleep(30)
            assert mirror.current is not None
            await it.compare(mirror.current, mirror, on_record=False)
        assert not Racing.armed, "it was written again"
        await eventually(lambda: forged not in etcd)
        nursery.cancel_scope.cancel()


async def test_a_report_that_another_writer_changes_is_restored_and_a_forged_one_is_deleted() -> None:
    etcd = FakeEtcd()
    mirror = Mirror(etcd.client(), KEYS)
    reports = {"home": ProbeReportRecord(leader="h", candidacy=7, targets=("a",), leader_reachable=True)}
    observed, leased = KEYS.endpoint("b", "a"), KEYS.probe_report("azure", "a")
    home, forged, candidacy = KEYS.probe_report("home", "a"), KEYS.probe_report("gcp", "a"), KEYS.election("aws", "a")
    async with member(etcd) as it, trio.open_nursery() as nursery:
        await nursery.start(mirror.run)

        async def compare() -> None:
            snapshot = None
            while True:
                with trio.move_on_after(10):
                    snapshot = await mirror.wait_newer(snapshot)
                assert snapshot is not None
                await it.compare(snapshot, mirror, on_record=False)

        nursery.start_soon(compare)
        await it.put_probe_reports(reports)
        before = etcd.data[home.encode()]
        etcd.put(home, before.value)
        await eventually(lambda: _stands(etcd, home, before.value, before.lease))
        etcd.put(home, "junk")
        await eventually(lambda: _stands(etcd, home, before.value, before.lease))
        etcd.delete(home)
        await eventually(lambda: _stands(etcd, home, before.value, before.lease))
        etcd.put(forged, before.value)
        etcd.put(
            observed, encode(ObservedEndpointRecord(public_key=wg_key("b"), endpoint=Endpoint.parse("192.0.2.1:1")))
        )
        etcd.put(candidacy, encode(CandidateRecord(rank=CandidateClass.ANNOTATED)))
        etcd.put(leased, before.value, lease=(await etcd.client().grant_lease(3600)).id)
        await eventually(lambda: not {forged, candidacy, observed} & set(etcd.keys()))
        assert leased in etcd, "it may be an earlier run's, and end with its lease"
        await eventually(lambda: leased not in etcd, 30)
        revision = etcd.revision
        await it.put_probe_reports({})
        await it.put_probe_reports(reports)
        await trio.sleep(600)
        assert etcd.revision == revision + 2
        nursery.cancel_scope.cancel()
