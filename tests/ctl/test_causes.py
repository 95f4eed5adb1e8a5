"""Members of a location that do not reach each other: one error for one cause, and none before it is known."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from attrs import evolve

from kilo_etcd.ctl.commands.check import Examined, Finding, Severity, findings
from kilo_etcd.ctl.reports.causes import causes, silence
from kilo_etcd.ctl.reports.live import Live
from kilo_etcd.ctl.reports.report import report
from kilo_etcd.model import Candidate, CandidateClass, Endpoint, Node, Snapshot
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.reach import Silent, targets, withhold
from kilo_etcd.store.records import DiagnosticsResponse, Role, StatusRecord, Tunnel, Unreachable
from kilo_etcd.store.status_texts import NO_BASELINE, WAS_DEMOTED
from kilo_etcd.topology.segments import Topology, build_topology

KEYS = {name: f"{name:A<42}A=" for name in ("a", "b", "c", "d", "e", "f")}
NOON = "2026-11-27T12:00:00Z"
NOON_MS = 1_795_780_800_000


def mesh(places: Mapping[str, str]) -> Topology:
    """Hosts at these locations; the first of each leads."""
    nodes = {
        name: Node(
            name=name,
            public_key=KEYS[name],
            location=place,
            internal_ips=(ip_interface(f"192.168.1.{number}/24"),),
            mesh_addresses=(ip_address(f"10.4.0.{number}"),),
            endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
        )
        for number, (name, place) in enumerate(places.items(), 1)
    }
    first = {place: next(name for name in places if places[name] == place) for place in places.values()}
    standing = {
        place: (Candidate(node=name, rank=CandidateClass.PUBLIC, create_revision=1),) for place, name in first.items()
    }
    return build_topology(Snapshot(revision=1, nodes=nodes, candidates=standing, subnets=(ip_network("10.4.0.0/16"),)))


ALONE = {"a": "", "b": "", "c": ""}


def statuses(topology: Topology, *apart: tuple[str, str], routed: bool = False) -> dict[str, StatusRecord]:
    """What agents report where these pairs do not reach each other: each end with all the sentences of its plan."""
    result = {}
    for name, node in topology.snapshot.nodes.items():
        mine = [{*pair} - {name} for pair in apart if name in pair]
        unheard = [
            Silent(target=target, withheld=not routed, named=True)
            for target in targets(topology, name)
            if {target.node} in mine
        ]
        plan = withhold(host_plan(topology, name), topology, unheard)
        leader = topology.segment_of(name).leader.name
        role = Role.LEADER if leader == name else Role.MEMBER
        if len(topology.segment_of(name).members) == 1:
            role, leader = Role.ALONE, ""
        result[name] = StatusRecord(
            public_key=node.public_key,
            revision=1,
            role=role,
            location=node.location,
            leader=leader,
            errors=tuple(problem.text for problem in plan.problems),
            answers=True,
            since=NOON,
            unreachable=tuple(
                Unreachable(silent.target.node, str(silent.target.address), routed) for silent in unheard
            ),
        )
    return result


def lost(topology: Topology, *apart: tuple[str, str], **answer: Any) -> Live:
    """Everybody has tried everybody; echo requests between these pairs were not answered. An hour has passed."""
    pairs = {frozenset(pair) for pair in apart}
    answers = {}
    for name in topology.snapshot.nodes:
        found: dict[bool, list[str]] = {False: [], True: []}
        for other, node in topology.snapshot.nodes.items():
            if other != name:
                found[frozenset((name, other)) in pairs].append(str(node.mesh_addresses[0]))
        response = DiagnosticsResponse(
            reached=tuple(found[False]), unreached=tuple(found[True]), time=NOON_MS + 3_600_000
        )
        answers[name] = evolve(response, **answer)
    return Live(answers=answers)


def with_session(live: Live, one: str, other: str) -> Live:
    """The same, with a tunnel between two hosts that has a session."""
    tunnels = {here: (Tunnel(KEYS[there], 5, 1, 1, ""),) for here, there in ((one, other), (other, one))}
    return evolve(live, answers={
        name: evolve(answer, tunnels=tunnels.get(name, ())) for name, answer in live.answers.items()
    })  # fmt: skip


def found(topology: Topology, said: Mapping[str, StatusRecord], live: Live) -> list[Finding]:
    shown = report(topology.snapshot, said, newest=1, registered=frozenset(topology.snapshot.nodes), topology=topology)
    examined = Examined(members=(), report=shown, topology=topology, statuses=said, live=live)
    return [finding for finding in findings(examined) if finding.severity is not Severity.NOTE]


ALL = (("a", "b"), ("a", "c"), ("b", "c"))


def test_three_hosts_without_labels_are_one_error() -> None:
    topology = mesh(ALONE)
    said = statuses(topology, *ALL)
    assert sum(len(status.errors) for status in said.values()) == 6
    (finding,) = found(topology, said, lost(topology, *ALL))
    assert (finding.severity, finding.subject) == (Severity.ERROR, "the default location")
    assert finding.text == "a, b, c have never answered each other at their internal IPs"
    assert finding.remedy == (
        "if they share no network, label them apart (kgctl location set NODE NAME; all are at the default location, "
        "which is that of hosts without a label) or take the address away (kgctl annotate NODE force-internal-ip=-); "
        "if they do, let UDP 1107 (--peer-query-port) or ICMP echo pass between them, or set --encapsulate wireguard"
    )


NEVER = "have never answered each other at their internal IPs"


@pytest.mark.parametrize(
    ("apart", "subject", "text", "label"),
    [
        ([("a", "b")], "a - b", f"they {NEVER}; b cannot reach other locations", "b"),
        ([("b", "c")], "b - c", f"they {NEVER}", "b"),
        ([("a", "d"), ("b", "d"), ("c", "d")], "d", f"it and a, b, c {NEVER}; d cannot reach other locations", "d"),
        ([("a", "b"), ("c", "d")], "location x",
         f"2 pairs of its hosts {NEVER}: a - b, c - d; b cannot reach other locations", "NODE"),
    ],
)  # fmt: skip
def test_the_pairs_that_a_cause_explains_are_named(
    apart: list[tuple[str, str]], subject: str, text: str, label: str
) -> None:
    topology = mesh({"a": "x", "b": "x", "c": "x", "d": "x", "e": "y"})
    (cause,) = causes(topology, silence(topology, statuses(topology, *apart), Live()))
    assert (cause.subject, cause.text) == (subject, text)
    assert f"kgctl location set {label} NAME" in cause.remedy


def test_who_cannot_reach_its_leader_is_not_said_to_lose_packets_elsewhere() -> None:
    topology = mesh({"a": "x", "b": "x", "c": "x", "d": "y"})
    pairs = (("a", "b"), ("b", "d"))
    live = lost(topology, *pairs)
    (finding,) = found(topology, statuses(topology, ("a", "b")), with_session(live, "a", "d"))
    assert (finding.subject, finding.severity) == ("a - b", Severity.ERROR)


def test_members_that_answered_before_are_one_error_of_another_kind() -> None:
    topology = mesh(ALONE)
    (finding,) = found(topology, statuses(topology, *ALL, routed=True), lost(topology, *ALL))
    assert finding.text == "a, b, c no longer answer each other at their internal IPs"
    assert finding.remedy.startswith("is the location's network up? if they share no network, label them apart")


def test_while_the_agents_still_ask_it_is_too_early_to_tell_and_not_well() -> None:
    topology = mesh(ALONE)
    live = lost(topology, *ALL)
    asking = evolve(
        live,
        answers={
            name: evolve(response, undecided=tuple(other for other in topology.snapshot.nodes if other != name))
            for name, response in live.answers.items()
        },
    )
    (finding,) = found(topology, statuses(topology), asking)
    assert (finding.severity, finding.subject) == (Severity.WARNING, "packets")
    assert finding.text == (
        "some are lost between a and b, a and c, b and c, and it is too early to tell why: the agents have just begun "
        "to ask each other"
    )
    # The first pair is known: it is named, and it is early for the others still.
    known, early = found(topology, statuses(topology, ("a", "b")), asking)
    assert (known.subject, early.severity) == ("a - b", Severity.WARNING)
    assert "between a and c, b and c" in early.text
    # Where all arrives nothing is said, and neither where it is known.
    assert found(topology, statuses(topology), lost(topology)) == []
    assert not [one for one in found(topology, statuses(topology), live) if "too early" in one.text]


def test_a_tunnel_of_an_agent_that_has_just_started_may_still_shake_hands() -> None:
    topology = mesh({"a": "x", "b": "y"})
    live = lost(topology, ("a", "b"), time=NOON_MS + 4_000)
    (finding,) = found(topology, statuses(topology), live)
    assert (finding.severity, "too early" in finding.text) == (Severity.WARNING, True)
    (finding,) = found(topology, statuses(topology), lost(topology, ("a", "b")))
    assert (finding.severity, finding.text) == (Severity.ERROR, "no tunnel between them: no handshake yet")


def test_what_is_said_of_an_address_that_is_no_more_or_of_a_stranger_counts_for_nothing() -> None:
    topology = mesh(ALONE)
    said = statuses(topology)
    stale = (Unreachable("b", "192.168.1.99"), Unreachable("zz", "192.168.1.2"), Unreachable("b", "nowhere"))
    said["a"] = evolve(said["a"], unreachable=stale)
    known = silence(topology, {**said, "zz": said["a"]}, Live())
    assert (known.apart, known.queries_answered) == ({}, True)


def test_where_every_host_filters_echo_requests_answered_peer_queries_speak_for_it() -> None:
    topology = mesh(ALONE)
    (finding,) = found(topology, statuses(topology), lost(topology, *ALL))
    assert (finding.severity, finding.subject) == (Severity.WARNING, "packets")
    assert "although members of a location answer each other's peer queries" in finding.text


# -- something else at the internal IP
# ------------------------------------------------------------------------------------------------------

STRANGERS = "do not reach each other: something answers at their internal IPs, but not with their keys"
FORWARDING = f"{WAS_DEMOTED} a and c found no way through it, to c for instance"


def strangers(topology: Topology, *pairs: tuple[str, str]) -> dict[str, StatusRecord]:
    """Other hosts answer at the internal IPs of these pairs."""
    return {
        name: evolve(status, unsigned=tuple(other for pair in pairs if name in pair for other in {*pair} - {name}))
        for name, status in statuses(topology).items()
    }


def test_other_hosts_at_the_internal_ips_are_the_error_and_what_follows_from_them_is_not_listed() -> None:
    topology = mesh({"a": "", "b": "", "c": "y"})
    said = strangers(topology, ("a", "b"))
    no_baseline = f"{NO_BASELINE} a, and they find no way through it either: a does not forward"
    said["b"] = evolve(said["b"], errors=(no_baseline, FORWARDING))
    (finding,) = found(topology, said, with_session(lost(topology, ("a", "b"), ("b", "c")), "a", "c"))
    assert (finding.severity, finding.subject) == (Severity.ERROR, "a - b")
    assert finding.text == f"they {STRANGERS}; b cannot reach other locations"
    assert "label them apart (kgctl location set b NAME; both are at the default location" in finding.remedy


def test_a_firewall_that_drops_peer_queries_alone_stays_a_warning() -> None:
    topology = mesh({"a": "", "b": "", "c": "y"})
    (finding,) = found(topology, strangers(topology, ("a", "b")), with_session(lost(topology), "a", "c"))
    assert finding.severity is Severity.WARNING
    assert finding.text.startswith("something answers at the internal IPs of a, b, but not with their keys")


def test_a_leader_that_does_not_forward_for_a_member_that_reaches_it_is_an_error_beside_it() -> None:
    topology = mesh({"a": "", "b": "", "d": "", "c": "y"})
    said = strangers(topology, ("a", "b"))
    said["a"] = evolve(said["a"], errors=(FORWARDING,))
    said["d"] = evolve(said["d"], errors=(f"{NO_BASELINE} a, so no host notices if a does not forward",))
    errors = found(topology, said, with_session(lost(topology, ("a", "b"), ("b", "c")), "a", "c"))
    assert [(error.subject, error.text.partition(":")[0]) for error in errors] == [
        ("a", WAS_DEMOTED.rstrip(":")), ("a - b", f"they {STRANGERS.partition(':')[0]}"),
        ("d", f"{NO_BASELINE} a, so no host notices if a does not forward"),
    ]  # fmt: skip
