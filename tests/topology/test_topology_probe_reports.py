"""A leader that does not forward: which reports count, which node leads instead, and which may run a takeover check."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from kilo_etcd.model import Candidate, CandidateClass, Encapsulate, Endpoint, InternalIPs, ProbeReport
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.render import render
from kilo_etcd.topology.election import Election, Reason, elect
from kilo_etcd.topology.segments import Topology, build_topology, host_network
from topology_worlds import candidates_of, node, snapshot

A = [node(f"a{n}", n, "a", f"10.0.0.{n}/24", f"203.0.113.{n}") for n in range(1, 9)]
B = [node(f"b{n}", 20 + n, "b", f"10.0.1.{n}/24", f"198.51.100.{n}") for n in (1, 2)]


def line(*names: str, behind: Sequence[str] = ()) -> list[Candidate]:
    """Candidates in the order in which they stand; those `behind` were demoted before."""
    return [
        Candidate(
            node=name,
            rank=CandidateClass.DEMOTED if name in behind else CandidateClass.PUBLIC,
            create_revision=100 + place,
        )
        for place, name in enumerate(names)
    ]


def report(prober: str, flags: str = "", leader: str = "a1", candidacy: int = 100) -> ProbeReport:
    """What a prober says; `flags` are the letters of answers, local members, reaches and unconfirmed."""
    return ProbeReport(
        prober=prober, leader=leader, candidacy=candidacy, targets=("a2",) if prober.startswith("b") else ("b1",),
        leader_reachable="a" in flags, members_reachable="f" in flags, can_take_over="r" in flags,
        unconfirmed="u" in flags,
    )  # fmt: skip


def choose(size: int, *probe_reports: ProbeReport, behind: Sequence[str] = ()) -> Election:
    nodes = A[:size]
    return elect(nodes, line(*(one.name for one in nodes), behind=behind), (), probe_reports)


@pytest.mark.parametrize(
    ("size", "probe_reports", "leader"),
    [
        pytest.param(3, [report("a2", "ar"), report("a3", "a")], "a2", id="it answers and lets nobody through"),
        pytest.param(3, [report("a2", "ar"), report("b1", "a")], "a2", id="a leader elsewhere is a prober too"),
        pytest.param(3, [report("a2", "afr"), report("b1")], "a2", id="its port is blocked"),
        pytest.param(3, [report("a2", "fr"), report("a3", "f")], "a2", id="its host is gone, of three"),
        pytest.param(2, [report("a2", "r"), report("b1")], "a2", id="gone, seen neither here nor there"),
        pytest.param(2, [report("a2", "r"), report("b1", "a")], "a1", id="the member is cut off, not the leader"),
        pytest.param(3, [report("a2", "ar")], "a1", id="one prober is none"),
        pytest.param(3, [report("a2", "a"), report("a3", "a"), report("b1")], "a1", id="the far end is down"),
        pytest.param(4, [report("a2", "fr"), report("a3", "f")], "a1", id="half against half is no majority"),
        pytest.param(4, [report("a2", "fr"), report("a3", "f"), report("a4", "f")], "a2", id="three of four are one"),
        pytest.param(8, [report(f"a{n}", "fr" if n == 2 else "f") for n in (2, 3, 4)], "a2", id="the voters decide"),
        pytest.param(8, [report(f"a{n}", "fr" if n == 2 else "f") for n in (2, 7, 8)], "a1", id="not among the voters"),
        pytest.param(
            3, [report("a2", "a"), report("a3", "ar")], "a3", id="the one with a takeover check, not the next in line"
        ),
        pytest.param(3, [report("a2", "ar", candidacy=99), report("a3", "a", candidacy=99)], "a1", id="earlier"),
        pytest.param(3, [report("a2", "ar", leader="a3"), report("a3", "a", leader="a3")], "a1", id="of somebody else"),
        pytest.param(3, [report("a1", "ar"), report("a2", "ar")], "a1", id="nobody is a prober against itself"),
        pytest.param(3, [report("b1", "ar"), report("b2", "ar")], "a1", id="others cannot lead this location"),
    ],
)
def test_who_leads(size: int, probe_reports: list[ProbeReport], leader: str) -> None:
    election = choose(size, *probe_reports)
    assert election.leader == leader
    assert election.demoted == (None if leader == "a1" else "a1")
    assert (election.reason is Reason.INSTEAD) is (leader != "a1")


def test_a_member_that_is_no_candidate_is_neither_a_voter_nor_from_elsewhere() -> None:
    nodes, reports = A[:4], [report("a2", "fr"), report("a4", "f")]
    assert elect(nodes, line("a1", "a2", "a3"), (), reports).leader == "a1"
    assert elect(nodes, line("a1", "a2", "a3"), (), [*reports, report("b1")]).leader == "a2"


def test_a_prober_that_has_moved_away_is_not_from_elsewhere() -> None:
    reports = [report("a2", "r"), report("a3")]
    assert elect(A[:3], line("a1", "a2", "a3"), (), reports).leader == "a1"
    assert elect(A[:2], line("a1", "a2"), (), reports).leader == "a1"


def test_a_leader_demoted_before_takes_over_from_nobody() -> None:
    probe_reports = [report("a2", "ar"), report("a3", "a")]
    assert choose(3, *probe_reports).leader == "a2"
    assert choose(3, *probe_reports, behind=["a2"]).leader == "a1"


def test_a_demoted_leader_is_behind_everyone() -> None:
    nodes = A[:3]
    again = [Candidate(node="a1", rank=CandidateClass.DEMOTED, create_revision=200), *line("a1", "a2", "a3")[1:]]
    assert elect(nodes, again, ()).order == ("a2", "a3", "a1")
    alone = [Candidate(node="a1", rank=CandidateClass.DEMOTED, create_revision=200)]
    assert elect(nodes, alone, "a2").leader == "a1"


def test_the_next_in_line_is_behind_the_one_that_leads_instead() -> None:
    election = choose(3, report("a2", "ar"), report("a3", "a"))
    assert (election.leader, election.next_in_line, election.order) == ("a2", "a3", ("a1", "a2", "a3"))
    assert choose(2, report("a2", "ar"), report("b1")).next_in_line == "a1"


WORDS = st.builds(
    report,
    st.sampled_from(["a1", "a2", "a3", "a4", "b1", "b2"]),
    st.text("afr", max_size=3),
    st.sampled_from(["a1", "a2"]),
    st.sampled_from([99, 100, 101]),
)


@given(
    st.lists(WORDS, max_size=5, unique_by=lambda one: one.prober), st.sets(st.sampled_from(["a1", "a2", "a3", "a4"]))
)
def test_any_reports_in_any_order_give_one_leader_and_never_without_a_takeover_check(
    reports: list[ProbeReport], behind: set[str]
) -> None:
    nodes = A[:4]
    candidates = line("a1", "a2", "a3", "a4", behind=sorted(behind))
    election = elect(nodes, candidates, (), reports)
    assert all(elect(nodes, candidates, (), order) == election for order in permutations(reports))
    unmoved = elect(nodes, candidates, ())
    if election.leader != unmoved.leader:
        deciding = [one for one in reports if one.prober == election.leader]
        assert deciding
        assert deciding[0].can_take_over
        assert deciding[0].leader == unmoved.leader == election.demoted
        assert election.leader not in behind
    assert election.next_in_line != election.leader


# -- who challenges ---------------------------------------------------------------------------------------------------


def world(*probe_reports: ProbeReport, **rest: Any) -> Any:
    nodes = [*A[:3], *B]
    if probe_reports:
        rest["probe_reports"] = {"a": probe_reports}
    return snapshot(nodes, candidates=candidates_of(*nodes), **rest)


def test_who_says_so_is_known_to_whom_it_has_tried_and_allowed_nothing() -> None:
    topology = build_topology(world())
    plans = {name: host_plan(topology, name) for name in topology.snapshot.nodes}
    assert "peer a2" not in render(plans["b1"])
    suspected = build_topology(world(report("a2", "a"), report("b1", "a", leader="a2")), topology)
    seen = render(host_plan(suspected, "b1", plans["b1"]))
    assert "peer a2 endpoint 203.0.113.2:51820 allowed nothing keepalive 5\n" in seen
    assert "peer a3" not in seen
    for name in ("a1", "a2", "a3", "b2"):
        assert host_plan(suspected, name, plans[name]) == plans[name] == host_plan(suspected, name), (
            "nobody else is concerned"
        )
    again = build_topology(world(), suspected)
    assert host_plan(again, "b1", host_plan(suspected, "b1", plans["b1"])) == plans["b1"]


def test_one_report_alone_that_nobody_confirms_makes_nobody_known_and_keeps_no_internal_ip_from_being_routed() -> None:
    nodes = {node.name: evolve(node, underlay=()) for node in (*A[:3], *B)}
    # Other segments would call a2 at its internal IP, and WireGuard's packets to it must not be led into a tunnel.
    nodes["a2"] = evolve(nodes["a2"], endpoint=Endpoint.parse(f"{nodes['a2'].internal_ips[0].ip}:51820"))

    def topology(*probe_reports: ProbeReport) -> Topology:
        return build_topology(
            snapshot(
                nodes.values(),
                candidates=candidates_of(*nodes.values()),
                probe_reports={"a": probe_reports} if probe_reports else {},
                internal_ips=InternalIPs.ROUTED,
            )
        )

    def routes_to_a2(topology: Topology) -> bool:
        internal = host_network(nodes["a2"].internal_ips[0].ip)
        return internal in host_plan(topology, "b1").routes

    assert routes_to_a2(topology())
    assert not routes_to_a2(topology(report("a2", "ar"))), "it may take over"
    unconfirmed = topology(report("a2", "aru"))
    assert routes_to_a2(unconfirmed)
    assert "peer a2" not in render(host_plan(unconfirmed, "b1"))
    other = report("a3", "a", candidacy=99)
    assert routes_to_a2(topology(report("a2", "aru"), other)), "of an earlier candidacy"
    confirmed = topology(report("a2", "aru"), report("a3", "a"))
    assert confirmed.segment_of("a1").leader.name == "a2", "at once, although it says of itself that nobody confirms it"


def test_an_earlier_candidacy_is_challenged_no_more() -> None:
    assert "peer a2" not in render(host_plan(build_topology(world(report("a2", "a", candidacy=99))), "b1"))
    assert "peer a2" not in render(host_plan(build_topology(world(report("a2", "a", leader="a3"))), "b1"))


def test_a_takeover_moves_what_is_allowed_and_the_endpoint_stays() -> None:
    before = build_topology(world(report("a2", "a")))
    plan = host_plan(before, "b1")
    after = build_topology(world(report("a2", "ar"), report("a3", "a")), before)
    assert after.segment_of("a1").leader.name == "a2"
    new = host_plan(after, "b1", plan)
    assert new == host_plan(after, "b1")
    assert new.routes == plan.routes
    assert new.peers["key-a2"].allowed_ips == plan.peers["key-a1"].allowed_ips
    assert new.peers["key-a2"].endpoint == plan.peers["key-a2"].endpoint
    assert "key-a1" not in new.peers


def test_who_comes_and_goes_among_the_candidates_changes_no_plan_elsewhere() -> None:
    before = build_topology(world())
    plan = host_plan(before, "b1")
    for standing_still in (A[:1], [A[0], A[2], A[1]], A[:3]):
        after = build_topology(snapshot([*A[:3], *B], candidates=candidates_of(*standing_still, *B)), before)
        assert host_plan(after, "b1", plan) == plan


def test_who_reaches_its_leader_through_the_tunnel_knows_the_others_too() -> None:
    nodes = [evolve(one, encapsulate=Encapsulate.WIREGUARD) for one in (*A[:3], *B)]
    plan = host_plan(build_topology(snapshot(nodes, candidates=candidates_of(*nodes))), "a2")
    assert plan.peers["key-b1"].endpoint == B[0].endpoint
    assert [key for key, peer in plan.peers.items() if peer.in_use] == ["key-a1", "key-a3"]


def test_probe_reports_change_the_topology_of_their_location_alone() -> None:
    before = world()
    topology = build_topology(before)
    said = evolve(before, probe_reports={"a": (report("a2", "ar"), report("a3", "a"))})
    after = build_topology(said, topology)
    assert after == build_topology(said)
    assert after.segment_of("a1").leader.name == "a2"
    assert after.changed == {"location:a"}
    assert host_plan(after, "a1") == host_plan(build_topology(said), "a1")
    assert build_topology(before, after) == topology
