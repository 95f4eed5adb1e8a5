"""To whom a node gives way that cannot serve a family of the mesh as its location's leader."""

from __future__ import annotations

import errno
from ipaddress import ip_interface, ip_network
from typing import Any

import pytest
import trio
from attrs import evolve
from test_agent_candidacy import Session

from kilo_etcd.agent.leadership import served_families
from kilo_etcd.agent.leadership.candidacy import CandidacyTask
from kilo_etcd.agent.leadership.candidacy_policy import SETTLE_SECONDS
from kilo_etcd.agent.leadership.served_families import gives_way, refused_families
from kilo_etcd.kernel.errors import failure
from kilo_etcd.kernel.state import AddAddress, AddRoute, Change, Route, SetForwarding, SetMtu
from kilo_etcd.model import Candidate, CandidateClass, Encapsulate, Endpoint, Granularity, Node, Snapshot
from kilo_etcd.store.session.candidacy import Candidacy
from kilo_etcd.topology.next_hop import NextHop, next_hop
from kilo_etcd.topology.segments import build_topology

PUBLIC, DEMOTED = CandidateClass.PUBLIC, CandidateClass.DEMOTED
PUBLIC_ENDPOINT = Endpoint.parse("198.51.100.7:51820")
PUBLIC_ENDPOINT_6 = Endpoint.parse("[2001:db8::7]:51820")
NAMED_ENDPOINT = Endpoint.parse("gcp.example.com:51820")
SUBNETS = (ip_network("10.4.0.0/16"), ip_network("fd00:4::/64"))


def node(name: str, number: int, families: str = "46", **values: Any) -> Node:
    internal = {"4": ip_interface(f"10.0.0.{number}/24"), "6": ip_interface(f"fd00:1::{number}/64")}
    return Node(
        name=name,
        public_key=name,
        location=values.pop("location", "gcp"),
        internal_ips=tuple(internal[family] for family in families),
        mesh_addresses=(ip_interface(f"10.4.0.{number}/16"), ip_interface(f"fd00:4::{number}/64")),
        **values,
    )


def world(*nodes: Node, ranks: dict[str, CandidateClass] | None = None, **values: Any) -> Snapshot:
    ranks = {one.name: PUBLIC for one in nodes} if ranks is None else ranks
    standing = [Candidate(node=name, rank=rank, create_revision=n) for n, (name, rank) in enumerate(ranks.items())]
    return Snapshot(
        **{
            "revision": 9,
            "subnets": SUBNETS,
            "nodes": {one.name: one for one in nodes},
            "candidates": {"gcp": tuple(standing)},
            **values,
        }
    )


A, B = node("a", 1), node("b", 2)
A4, B6 = node("a", 1, "4"), node("b", 2, "6")
TUNNELED4 = evolve(A4, encapsulate=Encapsulate.WIREGUARD)


@pytest.mark.parametrize(
    ("snapshot", "refused", "to"),
    [
        (world(A, B), (), None),
        (world(A, B), (6,), "b"),
        (world(A4, B), (), "b"),
        (world(A4, B), (6,), "b"),
        # Nobody serves more.
        (world(A4, node("b", 2, "4")), (), None),
        (world(A4, B, ranks={"a": PUBLIC}), (), None),
        (world(A4, B, ranks={"a": PUBLIC, "b": DEMOTED}), (), None),
        # It enters behind one that serves more, and is in line if that one stops.
        (world(A4, B, ranks={"b": PUBLIC}), (), None),
        (world(A4, B, ranks={"b": PUBLIC, "a": PUBLIC}), (), None),
        (world(evolve(A4, leader_wanted=True), B, ranks={"b": PUBLIC}), (), "b"),
        (world(A4, evolve(B, location="aws"), ranks={"a": PUBLIC}), (), None),
        # Each serves a family that the other does not: neither gives way.
        (world(A4, B6, node("c", 3, "46"), ranks={"a": PUBLIC, "b": PUBLIC}), (), None),
        # A leader that others may not reach serves less than one family.
        (world(evolve(A4, endpoint=PUBLIC_ENDPOINT), B), (), None),
        (world(evolve(A4, endpoint=PUBLIC_ENDPOINT), evolve(B, endpoint=PUBLIC_ENDPOINT)), (), "b"),
        (world(A4, evolve(B, endpoint=PUBLIC_ENDPOINT)), (), "b"),
        (world(evolve(A4, endpoint=PUBLIC_ENDPOINT), evolve(B, endpoint=PUBLIC_ENDPOINT_6)), (), None),
        (world(evolve(A4, endpoint=NAMED_ENDPOINT), evolve(B, endpoint=PUBLIC_ENDPOINT)), (), "b"),
        (world(evolve(A4, endpoint=NAMED_ENDPOINT), B), (), None),
        # What the mesh does not have is nobody's to serve.
        (world(A4, B, subnets=SUBNETS[:1]), (), None),
        # Through the tunnel a member is reached in both.
        (world(A4, evolve(B, encapsulate=Encapsulate.WIREGUARD)), (), None),
        (world(A, B), (4, 6), "b"),
        (world(B), (6,), None),
        # Nor does a candidate of the location's other segment lead this one, or serve its members.
        (world(TUNNELED4, evolve(B6, encapsulate=Encapsulate.WIREGUARD)), (6,), None),
        (world(A4, evolve(TUNNELED4, name="d"), evolve(B6, name="c"), ranks={"a": PUBLIC, "d": PUBLIC}), (), None),
        (world(A4, B, granularity=Granularity.FULL), (), "b"),
    ],
)
def test_a_node_gives_way_to_a_candidate_that_serves_more(
    snapshot: Snapshot, refused: tuple[int, ...], to: str | None
) -> None:
    found = gives_way(snapshot, "a", frozenset(refused), snapshot.nodes.get("a", A).candidate_class)
    assert (None if found is None else found.to) == to
    if found is not None and refused in ((), (6,)):
        assert str(found) == "b serves IPv6 in this location, and this host does not"
        assert gives_way(snapshot, "b", frozenset(), PUBLIC) is None


@pytest.mark.parametrize("families", ["4", "46"])
def test_of_candidates_whose_kernels_all_refuse_a_family_the_last_one_stays(families: str) -> None:
    nodes = [node(name, number, families) for number, name in enumerate("abc", 1)]
    snapshot = world(*nodes)
    standing = snapshot.candidates["gcp"]
    given = [gives_way(snapshot, candidate.node, frozenset({6}), PUBLIC) is not None for candidate in standing]
    assert given == [True, True, False]


@pytest.mark.parametrize("more", [(), (node("z", 200),)], ids=["IPv4 alone", "and one that has both"])
def test_a_large_location_takes_no_comparison_of_all_pairs(monkeypatch: pytest.MonkeyPatch, more: tuple[Node]) -> None:
    asked = []

    def counted(*args: Any) -> NextHop | None:
        asked.append(args)
        return next_hop(*args)

    monkeypatch.setattr(served_families, "next_hop", counted)
    nodes = [node(f"n{number}", number, "4") for number in range(1, 101)]
    snapshot = world(*nodes, *more, ranks={one.name: PUBLIC for one in nodes})
    assert gives_way(snapshot, "n1", frozenset(), PUBLIC) is None
    assert len(asked) < 20


@pytest.mark.parametrize(
    ("change", "code", "families"),
    [
        (AddAddress("kilo0", ip_interface("fd00:4::1/128")), errno.EACCES, {6}),
        (AddRoute(Route(destination=SUBNETS[1], device="kilo0")), errno.EACCES, {6}),
        (AddRoute(Route(destination=ip_network("fd00:7::/64"), device="kilo0")), errno.EACCES, set()),
        (SetForwarding(6), errno.EROFS, {6}),
        (SetForwarding(4, "kilo0"), errno.EROFS, set()),
        (SetMtu("kilo0", 1400), errno.EPERM, set()),
    ],
)
def test_the_kernels_refusals_tell_which_families_are_missing(change: Change, code: int, families: set[int]) -> None:
    assert refused_families([failure(change, OSError(code, "refused"))], SUBNETS) == families


class Standing(Session):
    """One in which node `a` stands."""

    def __init__(self) -> None:
        super().__init__()
        self.candidacy = Candidacy("gcp", A.candidate_class)
        self.entered: list[str] = []

    async def enter(self, location: str, rank: Any, **rest: Any) -> bool:
        self.entered.append(location)
        return await super().enter(location, rank, **rest)

    async def leave(self, **rest: Any) -> bool:
        self.candidacy = None
        return await super().leave(**rest)


@pytest.mark.autojump
async def test_a_leader_that_loses_ipv6_leaves_if_it_does_not_come_back_at_once_and_enters_when_it_has() -> None:
    session = Standing()
    task = CandidacyTask(session, "a")  # type: ignore[arg-type]

    async def update(snapshot: Snapshot) -> float | None:
        return await task.update(snapshot, build_topology(snapshot), leads=session.candidacy is not None, ready=True)

    both, lost = world(A, B), world(A4, B)
    assert await update(both) is None
    start = trio.current_time()
    assert await update(lost) == start + SETTLE_SECONDS
    await trio.sleep(SETTLE_SECONDS / 2)
    assert await update(both) is None
    assert await update(lost) == start + 1.5 * SETTLE_SECONDS
    assert session.candidacy is not None
    await trio.sleep(SETTLE_SECONDS)
    assert await update(lost) is None
    assert session.candidacy is None


@pytest.mark.autojump
async def test_one_that_has_given_way_waits_before_it_stands_again_but_not_if_nobody_stands() -> None:
    session = Standing()
    task = CandidacyTask(session, "a")  # type: ignore[arg-type]

    async def update(snapshot: Snapshot) -> float | None:
        return await task.update(snapshot, build_topology(snapshot), leads=False, ready=True)

    await update(world(A4, B))
    await trio.sleep(SETTLE_SECONDS)
    await update(world(A4, B))
    assert session.candidacy is None
    session.entered.clear()
    assert await update(world(A4, B, ranks={"b": PUBLIC})) == trio.current_time() + SETTLE_SECONDS
    assert session.entered == []
    await trio.sleep(SETTLE_SECONDS)
    await update(world(A4, B, ranks={"b": PUBLIC}))
    assert session.entered == ["gcp"]

    chosen = evolve(A4, leader_wanted=True)
    session = Standing()
    session.candidacy = None
    task = CandidacyTask(session, "a")  # type: ignore[arg-type]
    await update(world(chosen, B, ranks={"b": PUBLIC}))
    await trio.sleep(SETTLE_SECONDS)
    assert session.entered == []
    await update(world(chosen, B, ranks={}))
    assert session.entered == ["gcp"]


def test_an_operators_choice_that_does_not_stand_is_told() -> None:
    task = CandidacyTask(Session(), "a")  # type: ignore[arg-type]
    task.follow(build_topology(world(evolve(A4, leader_wanted=True), B)))
    assert task.not_standing == (
        "this host is annotated as leader, and does not stand: b serves IPv6 in this location, and this host does not; "
        "give it that family, or kgctl annotate a leader-"
    )
    for nodes in ((A4, B), (evolve(A, leader_wanted=True), B)):
        task.follow(build_topology(world(*nodes)))
        assert task.not_standing is None
