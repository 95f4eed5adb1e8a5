"""A leader that does not forward: who is believed, who leads instead, and who may prove that it can."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from topology_worlds import node, snapshot, standing

from kilo_etcd.model import Candidate, CandidateClass, Encapsulate, Verdict
from kilo_etcd.topology import build_topology, host_plan
from kilo_etcd.topology.election import Election, Reason, elect
from kilo_etcd.topology.render import render

A = [node(f"a{n}", n, "a", f"10.0.0.{n}/24", f"203.0.113.{n}") for n in range(1, 9)]
B = [node(f"b{n}", 20 + n, "b", f"10.0.1.{n}/24", f"198.51.100.{n}") for n in (1, 2)]


def line(*names: str, behind: Sequence[str] = ()) -> list[Candidate]:
    """Candidates in the order in which they stand; those `behind` were passed over before."""
    return [
        Candidate(
            node=name,
            rank=CandidateClass.PASSED_OVER if name in behind else CandidateClass.PUBLIC,
            create_revision=100 + place,
        )
        for place, name in enumerate(names)
    ]


def word(witness: str, flags: str = "", leader: str = "a1", candidacy: int = 100) -> Verdict:
    """What a witness says; `flags` are the letters of answers, fellows and reaches."""
    return Verdict(
        witness=witness, leader=leader, candidacy=candidacy, targets=("a2",) if witness.startswith("b") else ("b1",),
        answers="a" in flags, fellows="f" in flags, reaches="r" in flags,
    )  # fmt: skip


def choose(size: int, *verdicts: Verdict, behind: Sequence[str] = ()) -> Election:
    nodes = A[:size]
    return elect(nodes, line(*(one.name for one in nodes), behind=behind), None, verdicts)


@pytest.mark.parametrize(
    ("size", "verdicts", "leader"),
    [
        pytest.param(3, [word("a2", "ar"), word("a3", "a")], "a2", id="it answers and lets nobody through"),
        pytest.param(3, [word("a2", "ar"), word("b1", "a")], "a2", id="a leader elsewhere is a witness too"),
        pytest.param(3, [word("a2", "afr"), word("b1")], "a2", id="its port is blocked"),
        pytest.param(3, [word("a2", "fr"), word("a3", "f")], "a2", id="its host is gone, of three"),
        pytest.param(2, [word("a2", "r"), word("b1")], "a2", id="gone, seen neither here nor there"),
        pytest.param(2, [word("a2", "r"), word("b1", "a")], "a1", id="the member is cut off, not the leader"),
        pytest.param(3, [word("a2", "ar")], "a1", id="one witness is none"),
        pytest.param(3, [word("a2", "a"), word("a3", "a"), word("b1")], "a1", id="the far end is down"),
        pytest.param(4, [word("a2", "fr"), word("a3", "f")], "a1", id="half against half is no majority"),
        pytest.param(4, [word("a2", "fr"), word("a3", "f"), word("a4", "f")], "a2", id="three of four are one"),
        pytest.param(8, [word(f"a{n}", "fr" if n == 2 else "f") for n in (2, 3, 4)], "a2", id="the panel decides"),
        pytest.param(8, [word(f"a{n}", "fr" if n == 2 else "f") for n in (2, 7, 8)], "a1", id="not on the panel"),
        pytest.param(3, [word("a2", "a"), word("a3", "ar")], "a3", id="who has proved it, not who is next"),
        pytest.param(3, [word("a2", "ar", candidacy=99), word("a3", "a", candidacy=99)], "a1", id="earlier"),
        pytest.param(3, [word("a2", "ar", leader="a3"), word("a3", "a", leader="a3")], "a1", id="of somebody else"),
        pytest.param(3, [word("a1", "ar"), word("a2", "ar")], "a1", id="nobody is a witness against itself"),
        pytest.param(3, [word("b1", "ar"), word("b2", "ar")], "a1", id="others cannot lead this location"),
    ],
)  # fmt: skip
def test_who_leads(size: int, verdicts: list[Verdict], leader: str) -> None:
    found = choose(size, *verdicts)
    assert found.leader == leader
    assert found.passed_over == (None if leader == "a1" else "a1")
    assert (found.reason is Reason.INSTEAD) is (leader != "a1")


def test_a_member_that_does_not_stand_is_neither_of_the_panel_nor_from_elsewhere() -> None:
    nodes, words = A[:4], [word("a2", "fr"), word("a4", "f")]
    assert elect(nodes, line("a1", "a2", "a3"), None, words).leader == "a1"
    assert elect(nodes, line("a1", "a2", "a3"), None, [*words, word("b1")]).leader == "a2"


def test_a_witness_that_has_moved_away_is_not_from_elsewhere() -> None:
    words = [word("a2", "r"), word("a3")]
    assert elect(A[:3], line("a1", "a2", "a3"), None, words).leader == "a1"
    assert elect(A[:2], line("a1", "a2"), None, words).leader == "a1"


def test_who_was_passed_over_before_takes_over_from_nobody() -> None:
    verdicts = [word("a2", "ar"), word("a3", "a")]
    assert choose(3, *verdicts).leader == "a2"
    assert choose(3, *verdicts, behind=["a2"]).leader == "a1"


def test_who_was_passed_over_stands_behind_everyone() -> None:
    nodes = A[:3]
    again = [Candidate(node="a1", rank=CandidateClass.PASSED_OVER, create_revision=200), *line("a1", "a2", "a3")[1:]]
    assert elect(nodes, again, None).order == ("a2", "a3", "a1")
    alone = [Candidate(node="a1", rank=CandidateClass.PASSED_OVER, create_revision=200)]
    assert elect(nodes, alone, "a2").leader == "a1"


def test_the_next_in_line_is_behind_the_one_that_leads_instead() -> None:
    found = choose(3, word("a2", "ar"), word("a3", "a"))
    assert (found.leader, found.next_in_line, found.order) == ("a2", "a3", ("a1", "a2", "a3"))
    assert choose(2, word("a2", "ar"), word("b1")).next_in_line == "a1"


WORDS = st.builds(
    word,
    st.sampled_from(["a1", "a2", "a3", "a4", "b1", "b2"]),
    st.text("afr", max_size=3),
    st.sampled_from(["a1", "a2"]),
    st.sampled_from([99, 100, 101]),
)


@given(
    st.lists(WORDS, max_size=5, unique_by=lambda one: one.witness), st.sets(st.sampled_from(["a1", "a2", "a3", "a4"]))
)
def test_any_words_in_any_order_give_one_leader_and_never_without_proof(words: list[Verdict], behind: set[str]) -> None:
    nodes = A[:4]
    candidates = line("a1", "a2", "a3", "a4", behind=sorted(behind))
    found = elect(nodes, candidates, None, words)
    assert all(elect(nodes, candidates, None, order) == found for order in permutations(words))
    unmoved = elect(nodes, candidates, None)
    if found.leader != unmoved.leader:
        proof = [one for one in words if one.witness == found.leader]
        assert proof
        assert proof[0].reaches
        assert proof[0].leader == unmoved.leader == found.passed_over
        assert found.leader not in behind
    assert found.next_in_line != found.leader


# -- who challenges ---------------------------------------------------------------------------------------------------


def world(*verdicts: Verdict, **rest: Any) -> Any:
    nodes = [*A[:3], *B]
    said = {"verdicts": {"a": verdicts}} if verdicts else {}
    return snapshot(nodes, candidates=standing(*nodes), **said, **rest)


def test_who_says_so_is_known_to_whom_it_has_tried_and_allowed_nothing() -> None:
    topology = build_topology(world())
    plans = {name: host_plan(topology, name) for name in topology.snapshot.nodes}
    assert "peer a2" not in render(plans["b1"])
    doubted = build_topology(world(word("a2", "a"), word("b1", "a", leader="a2")), topology)
    seen = render(host_plan(doubted, "b1", plans["b1"]))
    assert "peer a2 endpoint 203.0.113.2:51820 allowed nothing keepalive 5\n" in seen
    assert "peer a3" not in seen
    for name in ("a1", "a2", "a3", "b2"):
        assert host_plan(doubted, name, plans[name]) == plans[name] == host_plan(doubted, name), (
            "nobody else is concerned"
        )
    again = build_topology(world(), doubted)
    assert host_plan(again, "b1", host_plan(doubted, "b1", plans["b1"])) == plans["b1"]


def test_an_earlier_candidacy_is_challenged_no_more() -> None:
    assert "peer a2" not in render(host_plan(build_topology(world(word("a2", "a", candidacy=99))), "b1"))
    assert "peer a2" not in render(host_plan(build_topology(world(word("a2", "a", leader="a3"))), "b1"))


def test_a_takeover_moves_what_is_allowed_and_the_endpoint_stays() -> None:
    before = build_topology(world(word("a2", "a")))
    plan = host_plan(before, "b1")
    after = build_topology(world(word("a2", "ar"), word("a3", "a")), before)
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
        after = build_topology(snapshot([*A[:3], *B], candidates=standing(*standing_still, *B)), before)
        assert host_plan(after, "b1", plan) == plan


def test_who_reaches_its_leader_through_the_tunnel_knows_the_others_too() -> None:
    nodes = [evolve(one, encapsulate=Encapsulate.WIREGUARD) for one in (*A[:3], *B)]
    plan = host_plan(build_topology(snapshot(nodes, candidates=standing(*nodes))), "a2")
    assert plan.peers["key-b1"].endpoint == B[0].endpoint
    assert [key for key, peer in plan.peers.items() if peer.in_use] == ["key-a1", "key-a3"]


def test_verdicts_change_the_topology_of_their_location_alone() -> None:
    before = world()
    topology = build_topology(before)
    said = evolve(before, verdicts={"a": (word("a2", "ar"), word("a3", "a"))})
    after = build_topology(said, topology)
    assert after == build_topology(said)
    assert after.segment_of("a1").leader.name == "a2"
    assert after.changed == {"location:a"}
    assert host_plan(after, "a1") == host_plan(build_topology(said), "a1")
    assert build_topology(before, after) == topology
