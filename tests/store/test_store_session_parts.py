"""The parts of a host's session, each by itself: see `kilo_etcd.store.session`."""

from __future__ import annotations

import random
from ipaddress import ip_interface, ip_network

import pytest
import trio
from store_world import KEYS, record, wg_key

from kilo_etcd.etcd.api import Put
from kilo_etcd.model import CandidateClass, Endpoint
from kilo_etcd.store.claims import Leases
from kilo_etcd.store.records import (
    CandidateRecord,
    ObservedEndpointRecord,
    StageRecord,
    StatusRecord,
    decode_candidate,
    decode_node,
    encode,
)
from kilo_etcd.store.session.candidacy import WantedCandidacy
from kilo_etcd.store.session.cluster_guard import NoGuard
from kilo_etcd.store.session.contested import about_status_key, contested_sentence
from kilo_etcd.store.session.leased_keys import LeasedKeys
from kilo_etcd.store.session.leased_writer import LeasedWriter
from kilo_etcd.store.session.mesh_addresses import MeshAddresses
from kilo_etcd.store.session.node_identity import NameTaken
from kilo_etcd.store.session.published_records import Published
from kilo_etcd.store.session.registration import RecordChanged, Registration, Written
from kilo_etcd.testing.fake_etcd import FakeEtcd

pytestmark = pytest.mark.autojump
NODE, STATUS, GCP = KEYS.node("a"), KEYS.status("a"), KEYS.election("gcp", "a")
OBSERVED = ObservedEndpointRecord(public_key=wg_key("b"), endpoint=Endpoint.parse("192.0.2.1:1"))


def registration(etcd: FakeEtcd, key: str = "a") -> Registration:
    it = Registration(
        etcd.client(), KEYS, "a", wg_key(key), trio.Lock(), NoGuard(),
        retry_most=1.0, on_changed=lambda: None, on_taken=lambda: None, rng=random.Random(0),
    )  # fmt: skip
    it.record = record(key)
    return it


async def put(it: Registration) -> Written | None:
    return await it.put(it.value(()), 0, (), await it.look())


# --- candidacy ------------------------------------------------------------------------------------------------------


def test_a_candidacy_that_is_wanted_already_keeps_its_time() -> None:
    it = WantedCandidacy(KEYS, "a")
    assert it.values == {}
    it.enter("gcp", CandidateClass.PUBLIC, in_place=False)
    before = it.current
    it.enter("gcp", CandidateClass.PUBLIC, in_place=True)
    assert it.current is before
    assert [decode_candidate(value).rank for value in it.values.values()] == [CandidateClass.PUBLIC]
    it.enter("gcp", CandidateClass.REST, in_place=True)
    assert (it.in_place, list(it.values)) == (True, [GCP])
    it.leave()
    assert (it.in_place, it.values) == (False, {})


def test_a_candidacy_is_adopted_if_it_can_be_read_and_none_is_wanted() -> None:
    it = WantedCandidacy(KEYS, "a")
    assert not it.adopt("gcp", b"junk")
    assert it.current is None
    value = encode(CandidateRecord(rank=CandidateClass.REST, since="2026-01-01T00:00:00Z"))
    assert it.adopt("gcp", value)
    assert it.values == {GCP: value}
    assert not it.adopt("aws", value)
    assert it.values == {GCP: value}


def test_a_candidacy_that_was_given_up_is_not_adopted_and_one_that_was_lost_is() -> None:
    it = WantedCandidacy(KEYS, "a")
    value = encode(CandidateRecord(rank=CandidateClass.REST, since="2026-01-01T00:00:00Z"))
    it.enter("gcp", CandidateClass.PUBLIC, in_place=False)
    it.leave()
    assert not it.adopt("gcp", value)
    assert it.values == {}
    it.enter("gcp", CandidateClass.PUBLIC, in_place=False)
    it.lose()
    it.leave()
    assert it.adopt("gcp", value)
    assert it.values == {GCP: value}


# --- published records ----------------------------------------------------------------------------------------------


def test_a_status_stands_in_until_an_earlier_or_a_real_one_is_known() -> None:
    it = Published(KEYS, "a")
    early, real, last = (StatusRecord(public_key=wg_key("a"), revision=revision) for revision in (1, 2, 3))
    it.stand_in(early)
    it.adopt(KEYS.parse(STATUS.encode()), b"junk")
    assert it.status == early
    it.adopt(KEYS.parse(STATUS.encode()), encode(real))
    assert it.status == real
    it.report(last)
    it.stand_in(early)
    it.adopt(KEYS.parse(STATUS.encode()), encode(real))
    assert it.of_itself == {STATUS: encode(last)}


def test_what_is_published_of_others_is_apart_from_what_is_published_of_the_host_itself() -> None:
    it = Published(KEYS, "a")
    seen = KEYS.endpoint("b", "a")
    it.stage = StageRecord(revision=7)
    it.adopt(KEYS.parse(seen.encode()), encode(OBSERVED))
    assert it.of_others == {seen: encode(OBSERVED)}
    assert list(it.of_itself) == [KEYS.stage("a")]
    keys = (STATUS, KEYS.stage("a"), seen, KEYS.probe_report("gcp", "a"), GCP)
    assert [it.concerns_itself(key) for key in keys] == [True, True, False, False, False]
    assert [it.concerns_others(key) for key in keys] == [False, False, True, True, False]
    it.clear()
    assert (it.of_itself, it.of_others) == ({}, {})


def test_what_this_run_has_withdrawn_is_not_adopted() -> None:
    it = Published(KEYS, "a")
    seen, stage = KEYS.endpoint("b", "a"), KEYS.stage("a")
    for _ in range(2):
        it.adopt(KEYS.parse(seen.encode()), encode(OBSERVED))
        it.adopt(KEYS.parse(stage.encode()), encode(StageRecord(revision=7)))
        assert (list(it.of_itself), list(it.of_others)) == ([stage], [seen])
    it.report_stage(None)
    it.observed_endpoints.replace({})
    it.adopt(KEYS.parse(seen.encode()), encode(OBSERVED))
    it.adopt(KEYS.parse(stage.encode()), encode(StageRecord(revision=7)))
    assert (it.of_itself, it.of_others) == ({}, {})


def test_contested_keys_are_named_in_one_sentence() -> None:
    assert contested_sentence(()) is None
    assert about_status_key(contested_sentence([STATUS]) or "")
    both = contested_sentence([GCP, STATUS]) or ""
    assert both.startswith(f"{GCP} and 1 more of this host's keys are changed again and again")
    assert not about_status_key(both)


# --- registration ---------------------------------------------------------------------------------------------------


async def test_a_record_is_written_once_and_every_write_depends_on_it() -> None:
    etcd = FakeEtcd()
    it = registration(etcd)
    assert not it.known
    assert await put(it) == Written(record=True, revision=etcd.revision)
    revision = etcd.revision
    assert await put(it) == Written(record=False, revision=0)
    assert (etcd.revision, it.known) == (revision, True)
    assert await it.write([Put(GCP, "x")]) == revision + 1
    etcd.put(NODE, encode(record("b")))
    with pytest.raises(RecordChanged):
        await it.write([Put(GCP, "y")])
    assert etcd.get(GCP) == b"x"


async def test_a_registration_that_another_writer_overtakes_is_tried_again() -> None:
    etcd = FakeEtcd()
    it = registration(etcd)
    standing = await it.look()
    etcd.put(STATUS, "{}")
    assert await it.put(it.value(()), 0, (), standing) is None
    assert not it.known
    assert NODE not in etcd


async def test_a_dead_owner_s_record_is_deleted_before_this_host_registers() -> None:
    etcd = FakeEtcd()
    etcd.put(NODE, encode(record("b")))
    it = registration(etcd)
    assert await put(it) is None
    assert NODE not in etcd
    assert await put(it) is not None
    assert decode_node(etcd.get(NODE) or b"").public_key == wg_key("a")


async def test_a_living_owner_s_name_is_waited_for_until_the_deadline() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    lease = (await client.grant_lease(5)).id
    etcd.put(STATUS, encode(StatusRecord(public_key=wg_key("b"))), lease=lease)
    it, began = registration(etcd), trio.current_time()
    with pytest.raises(NameTaken, match=wg_key("b").replace("+", r"\+")):
        await it.look_until_free(began + 3)
    assert trio.current_time() - began == pytest.approx(3)
    assert (await it.look_until_free(began + 10)).status is None


async def test_only_its_own_record_is_deleted() -> None:
    etcd = FakeEtcd()
    it = registration(etcd)
    etcd.put(NODE, encode(record("b")))
    await it.delete()
    assert NODE in etcd
    etcd.put(NODE, encode(record("a")))
    await it.delete()
    assert NODE not in etcd


@pytest.mark.parametrize(("whose", "kept"), [("b", True), ("a", False), (None, False)])
async def test_without_a_record_what_another_living_host_of_the_name_has_is_not_deleted(
    whose: str | None, kept: bool
) -> None:
    etcd = FakeEtcd()
    claim = KEYS.address("a", ip_interface("10.4.0.1/16").ip)
    etcd.put(claim, "")
    if whose is not None:
        etcd.put_kept(STATUS, encode(StatusRecord(public_key=wg_key(whose))))
    await registration(etcd).delete()
    assert (claim in etcd, STATUS in etcd) == (kept, kept)


# --- keys under the short lease, and under none ---------------------------------------------------------------------


async def test_a_candidacy_is_deleted_before_it_is_put_again_unless_it_may_be_overwritten() -> None:
    etcd = FakeEtcd()
    client, owner = etcd.client(), registration(etcd)
    lease = (await client.grant_lease(60)).id
    leased = LeasedKeys(
        client, trio.Lock(), retry_most=1.0, lease=lambda: lease, on_due=lambda: None, on_contested=lambda: None,
        rng=random.Random(0),
    )  # fmt: skip
    writer = LeasedWriter(
        "a",
        leased,
        owner,
        lease=lambda: lease,
        replaceable=lambda key: key == STATUS,
        apart=lambda _key: False,
        beside=lambda _keys: [],
    )
    await put(owner)
    await writer.bring({GCP: b"1", STATUS: b"1"}, {})
    created, revision = etcd.data[GCP.encode()].create_revision, etcd.revision
    await writer.bring({GCP: b"1", STATUS: b"1"}, {})
    assert etcd.revision == revision
    await writer.bring({GCP: b"2", STATUS: b"2"}, {})
    assert etcd.revision == revision + 2
    assert etcd.data[GCP.encode()].create_revision > etcd.data[STATUS.encode()].create_revision == created
    await writer.bring({STATUS: b"2"}, {})
    assert set(etcd.keys()) == {NODE, STATUS}


async def test_the_claims_of_a_host_stand_under_no_lease_and_are_restored() -> None:
    etcd = FakeEtcd()
    lease = (await etcd.client().grant_lease(60)).id
    leases, revision = Leases(reservation=lease), etcd.revision
    it = MeshAddresses(etcd.client(), KEYS, "a", 5)
    subnets = (ip_network("10.4.0.0/16"),)
    assert not await it.claim(subnets, leases, ()), "it had none before"
    assert etcd.revision == revision + 1, "the claim and its reservation are one write"
    (address,) = it.addresses
    assert it.stated == (ip_interface(f"{address}/16"),)
    etcd.delete(KEYS.address("a", address))
    await it.claim(it.subnets, leases, ())
    assert etcd.keys() == [KEYS.address("a", address), KEYS.reservation("a")]
    assert not etcd.data[KEYS.address("a", address).encode()].lease
    assert etcd.data[KEYS.reservation("a").encode()].lease == lease
    it.drop()
    assert not it.addresses
    assert not it.stated
