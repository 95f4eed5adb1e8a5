"""What hosts show of why packets are lost comes before what is suspected of the hosts behind them."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from attrs import evolve
from test_arrivals import PLACES, Lost, asked, mesh, with_sessions

from kilo_etcd.ctl.commands.check import Examined, Finding, Severity, findings
from kilo_etcd.ctl.reports import arrivals
from kilo_etcd.ctl.reports.arrivals import by_host, losses
from kilo_etcd.ctl.reports.causes import Kind
from kilo_etcd.ctl.reports.evidence import evidence, shown
from kilo_etcd.ctl.reports.live import Live
from kilo_etcd.ctl.reports.report import report
from kilo_etcd.kernel.errors import shadow
from kilo_etcd.model import Candidate, CandidateClass, Granularity
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.reach import MemberAddress, Silent, withhold
from kilo_etcd.store.records import DiagnosticsResponse, StatusRecord, TakenRoute, Unreachable
from kilo_etcd.store.status_texts import NO_WIREGUARD
from kilo_etcd.topology.segments import Topology, build_topology

REFUSED = "none: Invalid argument"
SESSIONS = (("a1", "b1"), ("a1", "c1"), ("b1", "c1"))


def address(topology: Topology, name: str) -> str:
    return str(topology.snapshot.nodes[name].mesh_addresses[0])


def pair(*names: str) -> Lost:
    return lambda one, other: {one, other} == set(names)


def around(*names: str) -> Lost:
    return lambda one, other: bool({one, other} & set(names))


def world(lost: Lost, answering: set[str] | None = None) -> tuple[Topology, Live]:
    """The answers in a mesh of three locations whose tunnels have sessions."""
    topology = mesh()
    live = with_sessions(topology, asked(topology, lost), *SESSIONS)
    names = set(PLACES) if answering is None else answering
    return topology, Live(
        answers={name: answer for name, answer in live.answers.items() if name in names},
        silent=tuple(sorted(set(PLACES) - names)),
    )


def with_answer(live: Live, name: str, **more: Any) -> Live:
    return evolve(live, answers={**live.answers, name: evolve(live.answers[name], **more)})


def told(
    topology: Topology,
    live: Live,
    dead: tuple[str, ...] = (),
    errors: dict[str, tuple[str, ...]] | None = None,
    led_anew: frozenset[str] = frozenset(),
) -> list[Finding]:
    statuses = {
        name: StatusRecord(public_key=name, revision=1, errors=(errors or {}).get(name, ()))
        for name in PLACES
        if name not in dead
    }
    found = report(topology.snapshot, statuses, newest=1, topology=topology)
    live = evolve(live, silent=tuple(name for name in live.silent if name not in dead))
    every = findings(
        Examined(members=(), report=found, topology=topology, statuses=statuses, live=live, led_anew=led_anew)
    )
    # The statuses say nothing of leaders.
    return [one for one in every if one.severity is not Severity.NOTE and "it sees no leader" not in one.text]


def test_a_rule_on_a_member_is_named_and_its_leader_is_not() -> None:
    topology, live = world(pair("a2", "b2"))
    assert {loss.subject for loss in losses(topology, live)} == {"a2 - b2"}, "nothing else tells which host it is"
    rule = f"ip -4 rule priority 5 from all to {address(topology, 'b2')}/32 blackhole"
    taken = TakenRoute(address(topology, "b2"), "", f"{REFUSED}, by {rule}", True)
    (one,) = told(topology, with_answer(live, "a2", routes=(taken,)))
    assert (one.severity, one.subject) == (Severity.ERROR, "a2")
    assert one.text.startswith(f"its kernel sends packets for {address(topology, 'b2')} by another route")
    assert one.remedy.endswith(f"on a2 ({rule.replace('rule', 'rule del', 1)})")
    # Each rule has to go.
    second = rule.replace("priority 5", "priority 6")
    other = TakenRoute(address(topology, "b1"), "", f"{REFUSED}, by {second}", True)
    (one,) = told(topology, with_answer(live, "a2", routes=(taken, other)))
    assert one.remedy.endswith("; ".join(text.replace("rule", "rule del", 1) for text in (rule, second)) + ")")


def test_a_route_on_a_leader_explains_what_it_forwards_and_what_is_answered() -> None:
    lost: Lost = lambda one, other: "b2" in (one, other) and "a" in (PLACES[one], PLACES[other])  # noqa: E731
    topology, live = world(lost)
    taken = TakenRoute(address(topology, "b2"), "", REFUSED, True)
    assert [one.subject for one in told(topology, with_answer(live, "a1", routes=(taken,)))] == ["a1"]
    # A route of a host that the packets do not pass explains nothing.
    assert "c1" not in {one.subject for one in told(topology, live)}
    elsewhere = told(topology, with_answer(live, "c1", routes=(taken,)))
    assert {one.subject for one in elsewhere} == {"c1", *(one.subject for one in told(topology, live))}


def test_a_route_on_a_member_explains_why_it_hears_nothing_of_another_member() -> None:
    topology, live = world(lambda one, other: False)
    there = str(topology.snapshot.nodes["a1"].internal_ips[0].ip)
    routes = (TakenRoute(there, "", REFUSED, True),)
    known = evidence(topology, {}, with_answer(live, "a2", routes=routes))
    pairs = {frozenset({"a1", "a2"}): Kind.NO_LONGER, frozenset({"a1", "a3"}): Kind.NO_LONGER}
    assert known.unexplained(pairs) == {frozenset({"a1", "a3"}): Kind.NO_LONGER}


def test_an_agents_error_that_names_a_route_to_a_member_is_shown_and_the_locations_network_is_not_suspected() -> None:
    topology, live = world(pair("a1", "a2"))
    topology = build_topology(evolve(topology.snapshot, subnets=(ip_network("10.4.0.0/16"),)))
    near = topology.snapshot.nodes["a1"].internal_ips[0].ip
    route = f"{near} dev eth1 table 99, by ip -4 rule priority 5 from all to {near}/32 lookup 99"
    silent = Silent(target=MemberAddress("a1", near), withheld=False, route=route, named=True)
    plan = withhold(HostPlan(node="a2", listen_port=51820), topology, [silent])
    status = StatusRecord(
        public_key="a2", revision=1, errors=tuple(problem.text for problem in plan.problems),
        unreachable=(Unreachable("a1", str(near), True),),
    )  # fmt: skip
    statuses = {name: StatusRecord(public_key=name, revision=1) for name in PLACES} | {"a2": status}
    found = report(topology.snapshot, statuses, newest=1, topology=topology)

    def errors(live: Live) -> list[Finding]:
        every = findings(Examined(members=(), report=found, topology=topology, statuses=statuses, live=live))
        return [one for one in every if one.severity is Severity.ERROR]

    (one,) = errors(live)
    assert one.subject == "a2"
    assert f"takes another route than the agent's: {route}; remove that rule" in one.text
    # What the answer names too is named once.
    (one,) = errors(with_answer(live, "a2", routes=(TakenRoute(str(near), "", route, True),)))
    assert one.text.startswith("its kernel sends packets for")


def test_the_route_of_another_program_is_named_once_by_the_agent_or_else_with_the_command_that_removes_it() -> None:
    topology, live = world(around("c1"))
    routes = tuple(
        TakenRoute(address(topology, name), "", f"{REFUSED}, by ip -4 route {network}", True)
        for name, network in (("a1", "10.4.0.0/17"), ("b1", "10.4.0.0/17"))
    )
    live = with_answer(live, "c1", routes=routes)
    (loss,) = shown(evidence(topology, {}, live))
    assert loss.remedy == "remove that route of another program on c1 (ip -4 route del 10.4.0.0/17)"
    named = StatusRecord(
        public_key="c1", revision=1, errors=(shadow(ip_network("10.4.0.0/17"), ip_network("10.4.0.0/16")),)
    )
    places = evidence(topology, {"c1": named}, live)
    assert list(shown(places)) == []
    assert places.explains("c1", "a1")


def test_endpoints_without_a_route_are_named_once_and_no_tunnel_besides() -> None:
    topology, live = world(around("c1"))
    tunnels = tuple(
        tunnel._replace(endpoint=f"203.0.113.{number}:51820", handshake=400)
        for tunnel, number in zip(live.answers["c1"].tunnels, (1, 4), strict=True)
    )
    routes = tuple(TakenRoute(f"203.0.113.{number}", "", "none: Network is unreachable", True) for number in (1, 4))
    (one,) = told(topology, with_answer(live, "c1", tunnels=tunnels, routes=routes))
    assert one.subject == "c1"
    assert one.text.startswith(
        "its WireGuard reaches nobody at 203.0.113.1 (none: Network is unreachable), 203.0.113.4"
    )
    assert "default route" in one.remedy
    # In a large mesh a host sends echo requests to some only.
    untried = with_answer(live, "c1", tunnels=tunnels, routes=routes, unreached=())
    assert "c1" in {one.subject for one in told(topology, untried) if "WireGuard reaches nobody" in one.text}
    # As long as the packets arrive, there is another way.
    well, live = world(lambda one, other: False)
    assert told(well, with_answer(live, "c1", tunnels=tunnels, routes=routes)) == []


def test_a_stopped_wireguard_and_a_host_that_does_not_answer_explain_what_goes_through_them() -> None:
    for host in ("a1", "c1", "b1"):
        lost: Lost = lambda one, other, host=host: (  # type: ignore[misc]  # noqa: E731
            (PLACES[one] == PLACES[host]) != (PLACES[other] == PLACES[host])
        )
        topology, live = world(lost, set(PLACES) - {host})
        if topology.snapshot.nodes[host].location == "c":
            (one,) = told(topology, live)
            assert (one.severity, one.subject) == (Severity.ERROR, host)
            assert "its host answers no echo request of a1" in one.text
        error = f"kilo0 cannot be read: the userspace WireGuard of kilo0 {NO_WIREGUARD}"
        subjects = [(one.severity, one.subject) for one in told(topology, live, errors={host: (error,)})]
        assert subjects[0] == (Severity.ERROR, host)
        assert {subject for _, subject in subjects} == {host}


def test_a_host_that_only_its_own_location_reaches_is_no_fault_of_its_new_leader() -> None:
    """As one whose WireGuard is stopped, and that takes itself for the leader still."""
    topology, live = world(lambda one, other: other == "a2" and PLACES[one] != "a", set(PLACES) - {"a2"})
    (one,) = told(topology, live)
    assert (one.severity, one.subject) == (Severity.ERROR, "a2")
    assert one.text.endswith("its host answers no echo request of b1, b2, c1")


def test_agents_that_do_not_answer_excuse_no_leader_that_does_not_forward() -> None:
    """As those of an older version."""
    lost: Lost = lambda one, other: (  # noqa: E731
        (PLACES[one] == "a") != (PLACES[other] == "a") and "a1" not in (one, other)
    )
    topology, live = world(lost, set(PLACES) - {"a2", "a3"})
    found = told(topology, live)
    assert [(one.severity, one.subject) for one in found] == [
        (Severity.ERROR, "a1"), (Severity.WARNING, "a2"), (Severity.WARNING, "a3"),
    ]  # fmt: skip
    assert found[0].text.startswith("it leads its location and does not forward")
    # A host that follows another leader may be the place itself, and so may one that its own location does not reach.
    stale = StatusRecord(public_key="a2", revision=1, leader="a2")
    assert set(evidence(topology, {"a2": stale}, live).unresponsive) == {"a2"}
    topology, live = world(around("a2"), set(PLACES) - {"a2"})
    assert [one.subject for one in told(topology, live)] == ["a2"]


def test_an_agent_that_is_dead_is_an_error_if_its_host_leads_and_passes_nothing() -> None:
    topology, live = world(around("c1"), set(PLACES) - {"c1"})
    (one,) = told(topology, live, dead=("c1",))
    assert (one.severity, one.subject) == (Severity.ERROR, "c1")
    assert one.text == (
        "its agent does not report, and it leads its location, through which nothing arrives (tried by a1, a2, a3, b1, "
        "b2)"
    )
    # In a full mesh no location has a leader.
    full = build_topology(evolve(topology.snapshot, granularity=Granularity.FULL))
    (one,) = [each for each in told(full, live, dead=("c1",)) if each.subject == "c1"]
    assert (one.severity, "leads" in one.text) == (Severity.WARNING, False)
    # A member cuts off nobody else, and a host that answers is there.
    topology, live = world(around("a3"), set(PLACES) - {"a3"})
    assert [(one.severity, one.subject) for one in told(topology, live, dead=("a3",))] == [(Severity.WARNING, "a3")]
    topology, live = world(lambda one, other: False, set(PLACES) - {"c1"})
    (one,) = told(topology, live, dead=("c1",))
    assert (one.severity, "although the host answers echo requests of" in one.text) == (Severity.WARNING, True)
    # It is an error again if its own location reaches it and no other does.
    topology, live = world(
        lambda one, other: "a1" in (one, other) and PLACES[one] != PLACES[other], set(PLACES) - {"a1"}
    )
    (one,) = [each for each in told(topology, live, dead=("a1",)) if each.subject == "a1"]
    assert (one.severity, one.text) == (
        Severity.ERROR,
        "its agent does not report; the host answers echo requests of a2, a3, and none of b1, b2, c1",
    )


def test_the_nodes_that_leave_by_an_exit_node_at_which_nothing_arrives_are_named() -> None:
    topology, live = world(around("b2"), set(PLACES) - {"b2"})
    nodes = dict(topology.snapshot.nodes)
    nodes["b2"] = evolve(nodes["b2"], advertises_exit_node=True)
    nodes |= {name: evolve(nodes[name], exit_node="b2") for name in ("a2", "b1")}
    topology = build_topology(evolve(topology.snapshot, nodes=nodes))
    for dead in ((), ("b2",)):
        (one,) = [each for each in told(topology, live, dead=dead) if each.subject == "b2"]
        assert one.severity == Severity.ERROR
        assert "; a2, b1 leave for the internet by it, so from there nothing gets out but for the mesh" in one.text
        assert one.remedy.startswith("kgctl annotate NODE exit-node=ANOTHER")
    # Packets arrive there, so they may leave.
    _, live = world(lambda one, other: False, set(PLACES) - {"b2"})
    for dead in ((), ("b2",)):
        assert not [each for each in told(topology, live, dead=dead) if "leave for the internet" in each.text]


def test_tunnels_without_a_session_are_one_error_for_each_host() -> None:
    topology = mesh()
    (one,) = told(topology, with_sessions(topology, asked(topology, around("c1")), ("a1", "b1")))
    assert (one.severity, one.subject, one.text) == (
        Severity.ERROR, "c1", "no tunnel between it and a1, b1: no handshake yet",
    )  # fmt: skip
    ends = [topology.snapshot.nodes[name].endpoint for name in ("c1", "a1")]
    assert one.remedy.startswith(f"let UDP {ends[0]} to c1 and UDP {ends[1]} to a1 pass")
    # Those that once had a session are another error, so that each sentence is true of each tunnel.
    lost = with_sessions(topology, asked(topology, around("c1")), ("a1", "b1"))
    (old,) = with_sessions(topology, asked(topology, around("c1")), ("b1", "c1")).answers["b1"].tunnels
    two = told(topology, with_answer(lost, "b1", tunnels=(*lost.answers["b1"].tunnels, old._replace(handshake=7200))))
    assert [one.text for one in two if one.subject.endswith("c1")] == [
        "no tunnel between them: no handshake yet", "no tunnel between them: last handshake 2 h ago",
    ]  # fmt: skip
    live = asked(topology, lambda one, other: {PLACES[one], PLACES[other]} == {"a", "c"})
    (one,) = told(topology, with_sessions(topology, live, ("a1", "b1"), ("b1", "c1")))
    assert (one.subject, one.text) == ("a1 - c1", "no tunnel between them: no handshake yet")
    assert one.remedy.endswith("kgctl explain a1 c1 --live")


def test_pairs_by_the_host_that_most_of_them_have_in_common() -> None:
    pairs = [frozenset(pair) for pair in ("ab", "ac", "ad", "bc", "ef")]
    assert list(by_host(pairs)) == [("a", ["b", "c", "d"]), ("b", ["c"]), ("e", ["f"])]
    assert list(by_host(pairs, lambda host: int(host in "cf")))[1:] == [("c", ["b"]), ("f", ["e"])]
    assert list(by_host([])) == []


def test_a_candidates_obstacle_that_is_an_error_already_is_no_warning_besides() -> None:
    topology, live = world(lambda one, other: False)
    second = Candidate(node="a2", rank=CandidateClass.PUBLIC, create_revision=2)
    candidates = topology.snapshot.candidates
    topology = build_topology(evolve(topology.snapshot, candidates={**candidates, "a": (*candidates["a"], second)}))
    live = with_answer(live, "a2", possible_obstacles=("forwarding is off on kilo0",))
    assert [one.severity for one in told(topology, live)] == [Severity.WARNING]
    (one,) = told(topology, live, errors={"a2": ("forwarding is off on kilo0",)})
    assert (one.severity, one.text) == (Severity.ERROR, "forwarding is off on kilo0")


def test_what_a_leader_may_drop_is_a_warning_although_echo_requests_arrive() -> None:
    topology, live = world(lambda one, other: False)
    text = "the firewall may drop TCP and UDP packets"
    live = with_answer(live, "a1", possible_obstacles=(text, "it may drop ICMP packets"), untested_obstacles=(text,))
    (one,) = told(topology, live)
    assert (one.severity, one.subject) == (Severity.WARNING, "a1")
    assert one.text == f"it forwards for others, and perhaps not all packets: {text}"
    (one,) = told(topology, live, errors={"a1": (text,)})
    assert (one.severity, one.text) == (Severity.ERROR, text), "an error is no warning besides"


def test_what_is_sent_and_does_not_arrive_is_a_blocked_port_and_not_the_tunnels_rules() -> None:
    topology, live = world(around("c1"))
    counted = with_answer(live, "c1", unanswered_peers=("a1", "b1"))
    (one,) = told(topology, counted)
    assert (one.severity, one.subject) == (Severity.ERROR, "c1")
    assert one.text.startswith("WireGuard's packets from a1, b1 do not arrive at c1, although they are sent")
    assert one.remedy.startswith("let UDP 203.0.113.6:51820 to c1 pass")
    # What is lost both ways, or only what the host sends, is one error too, and none of those at the far ends.
    far = with_answer(with_answer(live, "a1", unanswered_peers=("c1",)), "b1", unanswered_peers=("c1",))
    both = with_answer(far, "c1", unanswered_peers=("a1", "b1"))
    for lost, text in ((both, "between c1 and a1, b1 do not arrive, "), (far, "from c1 do not arrive at a1, b1, ")):
        (one,) = told(topology, lost)
        assert (one.severity, one.subject) == (Severity.ERROR, "c1")
        assert one.text.startswith(f"WireGuard's packets {text}although they are sent (last handshake: ")
    topology, single = world(lambda one, other: {PLACES[one], PLACES[other]} == {"a", "c"})
    (one,) = told(topology, with_answer(single, "c1", unanswered_peers=("a1",)))
    assert one.subject == "c1 - a1"
    # The tunnel may use another endpoint than the one on record, on a network of the two.
    near = tuple(tunnel._replace(endpoint="10.1.0.6:51820") for tunnel in single.answers["a1"].tunnels)
    (one,) = told(topology, with_answer(with_answer(single, "a1", tunnels=near), "c1", unanswered_peers=("a1",)))
    assert one.remedy.startswith("let UDP 10.1.0.6:51820 to c1 pass")
    assert "; ip neigh on a1; kgctl explain" in one.remedy
    # Where one echo request was answered WireGuard's packets arrive both ways.
    topology, one_pair = world(pair("a1", "c1"))
    assert evidence(topology, {}, with_answer(one_pair, "c1", unanswered_peers=("a1",))).blocked == {}
    topology, live = world(around("c1"))
    # An end that sends nothing, for a reason of its own, says nothing of the way.
    quiet = with_answer(with_answer(counted, "a1", unsent_peers=("c1",)), "b1", unsent_peers=("c1",))
    assert evidence(topology, {}, quiet).blocked == {}
    # If it is an end of all that is lost, that is where to look: what WireGuard sends or what goes to it is dropped.
    (one,) = told(topology, with_answer(live, "c1", unsent_peers=("a1", "b1")))
    assert one.remedy.startswith("look there for what drops UDP 51820 (--port) that goes out")
    # Nothing was lost: another moment was counted.
    topology, live = world(lambda one, other: False)
    assert told(topology, with_answer(live, "c1", unanswered_peers=("a1", "b1"))) == []


def test_the_echo_requests_are_looked_at_as_often_whatever_number_of_ways_is_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each look goes through those of all hosts."""
    topology, live = world(around("c1"))
    every, looks = arrivals._tried, list[Live]()
    monkeypatch.setattr(arrivals, "_tried", lambda mesh, live: looks.append(live) or every(mesh, live))  # type: ignore[func-returns-value]
    numbers = set()
    for blocked in ((), ("a1",), ("a1", "b1")):
        found = evidence(topology, {}, with_answer(live, "c1", unanswered_peers=blocked))
        assert set(found.blocked.get("c1", ())) == set(blocked)
        numbers.add(len(looks))
        looks.clear()
    assert len(numbers) == 1


def test_while_a_leader_changes_nobody_is_blamed_for_what_is_lost() -> None:
    topology, live = world(pair("a2", "b2"))
    assert {one.severity for one in told(topology, live)} == {Severity.ERROR}
    (one,) = told(topology, live, led_anew=frozenset({"a1", "a2", "a3"}))
    assert (one.severity, one.subject) == (Severity.WARNING, "packets")
    assert one.text.endswith("between a2 and b2: their leader has just changed")
    assert told(topology, live, led_anew=frozenset({"c1"})) == told(topology, live)
    # Not every pair sends echo requests in a large mesh, so a tunnel without a session may be all that is known.
    topology, live = world(lambda one, other: False)
    for here in ("a1", "c1"):
        tunnels = live.answers[here].tunnels
        fresh = tuple(each._replace(handshake=-1) if each.public_key in ("a1", "c1") else each for each in tunnels)
        live = with_answer(live, here, tunnels=fresh)
    (one,) = told(topology, live, led_anew=frozenset({"a1", "a2", "a3"}))
    assert (one.severity, one.subject) == (Severity.WARNING, "tunnels")
    assert one.text.endswith("between a1 and c1: their leader has just changed")


def test_hosts_that_the_mesh_does_not_have_show_nothing() -> None:
    topology, live = world(lambda one, other: False)
    stranger = DiagnosticsResponse(unreached=("10.4.0.1",), routes=(TakenRoute("10.4.0.1", "", REFUSED, True),))
    known = evidence(topology, {}, evolve(live, answers={**live.answers, "x": stranger}), ["x"])
    assert (known.routes, known.unresponsive) == ({}, {})
