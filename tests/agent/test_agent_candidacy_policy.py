"""What the agent decides for its own host: its role, its candidacy, whom it waits for."""

from __future__ import annotations

import errno
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from attrs import evolve

from kilo_etcd.agent.leadership.candidacy_policy import (
    SETTLE_SECONDS,
    WITHDRAW_SECONDS,
    CandidacyInputs,
    DesiredCandidacy,
    able_to_lead,
    confirmed,
    decide_candidacy,
    eligible,
    keeps_its_place,
    on_record,
    role_of,
    succeeded,
)
from kilo_etcd.kernel.errors import failure
from kilo_etcd.kernel.state import AddRoute, Route
from kilo_etcd.model import Candidate, CandidateClass, Endpoint, Granularity, InternalIPs, Node, Snapshot
from kilo_etcd.topology.mesh_settings import disagreements
from kilo_etcd.topology.segments import build_topology

PUBLIC = CandidateClass.PUBLIC
DESIRED = DesiredCandidacy("gcp", PUBLIC)
REST = DesiredCandidacy("gcp", CandidateClass.REST)
CHOSEN = DesiredCandidacy("gcp", CandidateClass.ANNOTATED)
CHOSEN_PUBLIC = DesiredCandidacy("gcp", CandidateClass.ANNOTATED_PUBLIC)


def node(name: str, number: int, location: str = "gcp", *, internal: bool = True) -> Node:
    return Node(
        name=name,
        public_key=f"{name:A<43}=",
        location=location,
        endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
        internal_ips=(ip_interface(f"10.0.0.{number}/24"),) if internal else (),
        mesh_addresses=(ip_address(f"10.4.0.{number}"),),
        registered_revision=number,
    )


def world(*nodes: Node, granularity: Granularity = Granularity.LOCATION) -> Snapshot:
    return Snapshot(
        revision=7,
        granularity=granularity,
        subnets=(ip_network("10.4.0.0/16"),),
        nodes={one.name: one for one in nodes},
        candidates={"gcp": (Candidate(node="b", rank=PUBLIC, create_revision=5),)},
    )


TWO = world(node("a", 1), node("b", 2))


def test_roles_and_how_they_are_put_into_words() -> None:
    topology = build_topology(TWO)
    assert str(role_of(topology, "b")) == "leader of location gcp"
    assert str(role_of(topology, "a")) == "member of location gcp, led by b"
    assert str(role_of(build_topology(world(node("c", 3, ""))), "c")) == "alone in the default location"


@pytest.mark.parametrize(
    ("snapshot", "expected"),
    [
        (TWO, DESIRED),
        (evolve(TWO, granularity=Granularity.FULL), DESIRED),  # kept for the way back
        (world(node("a", 1)), None),
        (world(node("a", 1), node("b", 2, "aws")), None),
        (world(node("a", 1), node("b", 2, internal=False)), None),
        (world(node("a", 1, internal=False), node("b", 2)), None),
        (world(node("b", 2)), None),
    ],
)
def test_who_may_stand(snapshot: Snapshot, expected: DesiredCandidacy | None) -> None:
    assert eligible(snapshot, "a") == expected


def now(**changes: Any) -> CandidacyInputs:
    return evolve(CandidacyInputs(now=100.0, stable_since=99.5, ready=True, leads=False, current=None), **changes)


@pytest.mark.parametrize(
    ("wanted", "inputs", "hold", "due"),
    [
        (None, now(current=DESIRED), None, None),
        (DESIRED, now(), None, 99.5 + SETTLE_SECONDS),
        (DESIRED, now(now=99.5 + SETTLE_SECONDS), DESIRED, None),
        (DESIRED, now(leads=True), DESIRED, None),
        (DESIRED, now(leads=True, ready=False), None, None),
        (DESIRED, now(ready=False, stable_since=0.0), None, None),
        # What it holds it keeps, also while a route fails.
        (DESIRED, now(current=DESIRED, ready=False), DESIRED, None),
        # Another location: it queues anew.
        (DESIRED, now(current=DesiredCandidacy("aws", PUBLIC)), None, 99.5 + SETTLE_SECONDS),
        (DESIRED, now(current=DesiredCandidacy("aws", PUBLIC), stable_since=0.0), DESIRED, None),
        # A better class: who leads says so at once, others keep what they have until they have been steady.
        (DESIRED, now(current=REST, leads=True, ready=False), DESIRED, None),
        (DESIRED, now(current=REST), REST, 99.5 + SETTLE_SECONDS),
        (DESIRED, now(current=REST, stable_since=0.0), DESIRED, None),
        (DESIRED, now(current=REST, stable_since=0.0, ready=False), REST, None),
        # A worse one: at once, whatever else is; but whoever was chosen in its place is to be there first.
        (REST, now(current=DESIRED, leads=True, ready=False), REST, None),
        (REST, now(current=DESIRED), REST, None),
        (REST, now(current=CHOSEN_PUBLIC, leads=True), REST, None),
        (DESIRED, now(current=CHOSEN_PUBLIC, leads=True), CHOSEN_PUBLIC, 99.5 + WITHDRAW_SECONDS),
        (DESIRED, now(current=CHOSEN_PUBLIC, stable_since=100.0 - WITHDRAW_SECONDS), DESIRED, None),
        (REST, now(current=CHOSEN), CHOSEN, 99.5 + WITHDRAW_SECONDS),
    ],
)
def test_when_it_stands(
    wanted: DesiredCandidacy | None, inputs: CandidacyInputs, hold: DesiredCandidacy | None, due: float | None
) -> None:
    assert decide_candidacy(wanted, inputs) == (hold, due)


@pytest.mark.parametrize(
    ("current", "wanted", "leads", "kept"),
    [
        (None, DESIRED, True, False),
        (DESIRED, None, True, False),
        (DesiredCandidacy("aws", PUBLIC), DESIRED, True, False),
        (REST, DESIRED, True, True),
        (REST, DESIRED, False, False),
        (DESIRED, REST, True, True),
        (DESIRED, REST, False, True),
    ],
)
def test_who_keeps_its_place_in_the_queue(
    current: DesiredCandidacy | None, wanted: DesiredCandidacy | None, leads: bool, kept: bool
) -> None:
    assert keeps_its_place(current, wanted, leads=leads) is kept


def test_all_living_others_must_have_confirmed() -> None:
    assert confirmed({"me": 1, "a": 7, "b": 9}, 7, "me")
    assert not confirmed({"me": 9, "a": 7, "b": 6}, 7, "me")
    assert confirmed({}, 7, "me")


def test_flags_that_the_mesh_overrules_are_named() -> None:
    subnets = (ip_network("10.4.0.0/16"),)
    assert disagreements(TWO, granularity=None, subnets=()) == ()
    assert disagreements(TWO, granularity=Granularity.LOCATION, subnets=subnets) == ()
    (one,) = disagreements(TWO, granularity=Granularity.FULL, subnets=())
    assert "--mesh-granularity=full is not in force" in one
    (one,) = disagreements(TWO, granularity=None, subnets=(), internal_ips=InternalIPs.ROUTED)
    assert "--internal-ips=routed is not in force: the mesh's setting is off" in one
    (one,) = disagreements(TWO, granularity=None, subnets=(ip_network("10.5.0.0/16"),))
    assert "--subnet=10.5.0.0/16 is not in force: the mesh's subnets are 10.4.0.0/16" in one


@pytest.mark.parametrize(
    ("missing", "able"),
    [
        ([], True),
        (["172.17.0.0/16"], True),
        (["172.17.0.0/16", "10.4.0.0/16"], False),
        ([None], False),
        (["172.17.0.0/16", None], False),
    ],
)
def test_a_route_that_is_missing_keeps_nobody_from_leading_unless_it_is_the_meshs(
    missing: list[str | None], able: bool
) -> None:
    routes = [None if text is None else ip_network(text) for text in missing]
    assert able_to_lead(routes, [ip_network("10.4.0.0/16")]) is able


@pytest.mark.parametrize(
    ("gateway", "code", "able"),
    [
        ("10.103.1.11", errno.ENETUNREACH, True),
        ("10.103.1.11", errno.EINVAL, True),
        ("10.103.1.11", errno.EEXIST, False),
        ("10.103.1.11", errno.EPERM, False),
        (None, errno.ENETUNREACH, False),
    ],
)
def test_a_leader_on_no_network_of_this_host_does_not_keep_it_from_leading_itself(
    gateway: str | None, code: int, able: bool
) -> None:
    """Else the one that cannot be reached leads for good, if it was there first. A route of another program in place of
    the mesh's own would be in its way as a leader too."""
    mesh = ip_network("10.4.0.0/16")
    route = Route(destination=mesh, gateway=None if gateway is None else ip_address(gateway), device="eth0")
    said = failure(AddRoute(route), OSError(code, "refused"))
    assert said.destination == mesh
    assert able_to_lead([] if said.aside else [said.destination], [mesh]) is able


A_AND_B = (Candidate(node="a", rank=PUBLIC, create_revision=4), Candidate(node="b", rank=PUBLIC, create_revision=5))


@pytest.mark.parametrize(
    ("name", "candidates", "granularity", "stays", "leaves"),
    [
        ("b", TWO.candidates["gcp"], Granularity.LOCATION, False, False),  # it leads, and nobody comes after it
        ("a", TWO.candidates["gcp"], Granularity.LOCATION, True, True),
        ("a", A_AND_B, Granularity.LOCATION, False, True),
        ("b", A_AND_B, Granularity.LOCATION, True, True),
        ("b", (), Granularity.LOCATION, False, False),
        ("a", A_AND_B, Granularity.FULL, False, True),
        ("b", TWO.candidates["gcp"], Granularity.FULL, False, False),
    ],
)
def test_whether_another_candidate_leads_instead(
    name: str, candidates: tuple[Candidate, ...], granularity: Granularity, stays: bool, leaves: bool
) -> None:
    topology = build_topology(evolve(TWO, candidates={"gcp": candidates}, granularity=granularity))
    assert succeeded(topology, name, "gcp", leaves=False) is stays
    assert succeeded(topology, name, "gcp", leaves=True) is leaves
    assert succeeded(topology, name, "aws", leaves=False), "it is not there any more"


def test_only_the_last_one_of_its_segment_is_on_record() -> None:
    snapshot = evolve(TWO, candidates={}, leaders={"gcp": ("moved", "a", "b")})
    assert on_record(snapshot, "a")
    assert not on_record(snapshot, "b")
    assert not on_record(snapshot, "moved")
    assert build_topology(snapshot).segment_of("b").leader.name == "a"
    assert not on_record(TWO, "b")
    full = evolve(snapshot, granularity=Granularity.FULL)
    assert (on_record(full, "a"), on_record(full, "b")) == (True, False), "as after the switch back"


def test_each_segment_of_a_location_has_its_own_leader_on_record() -> None:
    """Two families make two segments of one location; each node is compared with those of its own."""
    six = {
        name: evolve(TWO.nodes["a"], name=name, internal_ips=(ip_interface(f"fd00::{number}/64"),))
        for number, name in enumerate(("s", "t"), 1)
    }
    snapshot = evolve(TWO, nodes={**TWO.nodes, **six}, candidates={}, leaders={"gcp": ("a", "t", "b", "s")})
    assert [name for name in snapshot.nodes if on_record(snapshot, name)] == ["a", "t"]
    for name in ("a", "t"):
        assert build_topology(snapshot).segment_of(name).leader.name == name
