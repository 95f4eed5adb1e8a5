"""A leader that does not forward: who is believed, who leads instead, and who is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from topology_worlds import node, snapshot, standing

from kilo_etcd.model import Candidate, CandidateClass, Encapsulate, Granularity, Verdict
from kilo_etcd.topology import build_topology, host_plan, render
from kilo_etcd.topology.election import Election, Reason, elect

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
        witness=witness, leader=leader, candidacy=candidacy, targets=("b1",),
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


# -- standbys ---------------------------------------------------------------------------------------------------------


def world(**rest: Any) -> Any:
    nodes = [*A[:3], *B]
    return snapshot(nodes, candidates=standing(*nodes), **rest)


def test_the_next_in_line_elsewhere_is_known_and_allowed_nothing() -> None:
    for viewer in ("b1", "b2"):
        seen = render(host_plan(build_topology(world()), viewer))
        assert "peer a2 endpoint 203.0.113.2:51820 allowed nothing\n" in seen
        assert "peer a3" not in seen
    assert "peer a2" not in render(host_plan(build_topology(world()), "a1")), "within a location it is none"


def test_a_takeover_moves_what_is_allowed_and_nothing_else() -> None:
    before = world()
    after = evolve(before, candidates={**before.candidates, "a": before.candidates["a"][1:]})
    topology = build_topology(before)
    plan = host_plan(topology, "b1")
    new = host_plan(build_topology(after, topology), "b1", plan)
    assert new == host_plan(build_topology(after), "b1")
    assert new.routes == plan.routes
    assert new.peers["key-a2"].allowed_ips == plan.peers["key-a1"].allowed_ips
    assert new.peers["key-a2"].endpoint == plan.peers["key-a2"].endpoint
    assert "key-a1" not in new.peers
    assert not new.peers["key-a3"].allowed_ips, "and the next one is known now"


def test_who_reaches_its_leader_through_the_tunnel_knows_the_others_too() -> None:
    nodes = [evolve(one, encapsulate=Encapsulate.WIREGUARD) for one in (*A[:3], *B)]
    plan = host_plan(build_topology(snapshot(nodes, candidates=standing(*nodes))), "a2")
    assert plan.peers["key-b1"].endpoint == B[0].endpoint
    assert [key for key, peer in plan.peers.items() if peer.in_use] == ["key-a1", "key-a3"]


def test_in_a_full_mesh_nobody_waits() -> None:
    plan = host_plan(build_topology(world(granularity=Granularity.FULL)), "b1")
    assert all(peer.in_use for peer in plan.peers.values())


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
