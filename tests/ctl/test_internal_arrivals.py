"""What echo requests to internal IPs say: which host drops them, and whose kernel takes another route."""

from __future__ import annotations

from collections.abc import Callable, Collection
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from attrs import evolve
from test_arrivals import PLACES, mesh

from kilo_etcd.ctl.commands.check import Examined, findings
from kilo_etcd.ctl.reports.arrivals import PAIRS, Loss
from kilo_etcd.ctl.reports.causes import Kind, Silence, causes
from kilo_etcd.ctl.reports.evidence import evidence, shown
from kilo_etcd.ctl.reports.hops import suspicions
from kilo_etcd.ctl.reports.internal_arrivals import internal_losses
from kilo_etcd.ctl.reports.live import Live
from kilo_etcd.ctl.reports.report import report
from kilo_etcd.model import EncryptionStage, Granularity, InternalIPs
from kilo_etcd.store.records import DiagnosticsResponse, StatusRecord, TakenRoute
from kilo_etcd.topology.forced_addresses import missing_addresses, missing_in
from kilo_etcd.topology.segments import Topology, build_topology

Lost = Callable[[str, str], bool]


def routed() -> Topology:
    """Locations a, b and c, led by a1, b1 and c1, in which internal IPs are routed."""
    snapshot = mesh().snapshot
    nodes = {name: evolve(node, underlay=()) for name, node in snapshot.nodes.items()}
    return build_topology(evolve(snapshot, nodes=nodes, internal_ips=InternalIPs.ROUTED))


def found(topology: Topology, live: Live, apart: Collection[frozenset[str]] = (), **more: Any) -> tuple[Loss, ...]:
    """What hosts show, and what is lost besides."""
    known = evidence(topology, {}, live)
    return (*shown(known, more.get("missing", ())), *internal_losses(topology, live, known, apart, **more))


def internal(topology: Topology, name: str) -> str:
    return str(topology.snapshot.nodes[name].internal_ips[0].ip)


def asked(topology: Topology, lost: Lost, *, mesh_lost: Lost = lambda one, other: False) -> Live:
    """Everybody has tried everybody at mesh addresses, and those elsewhere at internal IPs."""
    answers = {}
    for name, place in PLACES.items():
        found: dict[bool, list[str]] = {False: [], True: []}
        routes = []
        for other, node in topology.snapshot.nodes.items():
            if other == name:
                continue
            found[mesh_lost(name, other)].append(str(node.mesh_addresses[0]))
            if PLACES[other] != place:
                address = internal(topology, other)
                found[lost(name, other)].append(address)
                routes.append(TakenRoute(address, internal(topology, name), f"{address} dev kilo0", False))
        answers[name] = DiagnosticsResponse(
            reached=tuple(found[False]), unreached=tuple(found[True]), routes=tuple(routes)
        )
    return Live(answers=answers)


CASES: dict[str, tuple[Lost, list[tuple[str, str]]]] = {
    "nothing": (lambda one, other: False, []),
    "a host drops what comes to its internal IP": (
        lambda one, other: other == "b2",
        [("b2", "no echo request to its internal IP 192.168.98.5 is answered (tried by a1, a2, a3, c1), although echo "
                "requests to mesh addresses are answered")],
    ),
    "a host drops what it sends, and the answers": (
        lambda one, other: one == "b2",
        [("b2", "no echo request that it sends to the internal IPs of a1, a2, a3, c1 is answered, although")],
    ),
    "a host drops both": (
        lambda one, other: "b2" in (one, other),
        [("b2", "no echo request between its internal IP and those of a1, a2, a3, c1 is answered, although")],
    ),
    "a leader drops what it forwards": (
        lambda one, other: "a" in (PLACES[one], PLACES[other]) and "a1" not in (one, other),
        [("a1", "it leads its location, and no echo request to internal IPs arrives through it, for instance "
                "from a2 to b1")],
    ),
    "one pair": (
        lambda one, other: {one, other} == {"a2", "b2"},
        [("a2 - b2", "a2 and b2 do not reach each other at internal IPs (192.168.98.5 for instance), although they "
                     "do at mesh addresses")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_who_loses_packets_for_internal_ips(case: str) -> None:
    lost, said = CASES[case]
    topology = routed()
    losses = found(topology, asked(topology, lost))
    assert [loss.subject for loss in losses] == [subject for subject, _ in said]
    for loss, (subject, text) in zip(losses, said, strict=True):
        assert loss.text.startswith(text), loss.text
        assert "nft list ruleset" in loss.remedy
        assert all(name in loss.remedy for name in subject.split(" - "))


def test_what_arrives_at_no_address_is_said_elsewhere() -> None:
    topology = routed()
    lost: Lost = lambda one, other: "b2" in (one, other)  # noqa: E731
    assert found(topology, asked(topology, lost, mesh_lost=lost)) == ()
    live = asked(topology, lambda one, other: {one, other} == {"a2", "b2"})
    assert found(topology, live, {frozenset({"a1", "a2"})}) == ()


def test_an_address_that_a_host_does_not_have_explains_what_is_lost_to_and_from_it() -> None:
    topology = routed()
    live = asked(topology, lambda one, other: "b2" in (one, other))
    assert found(topology, live)
    address = internal(topology, "b2")
    (sentence,) = missing_addresses(topology, "b2", {ip_address("192.0.2.1")}, ())
    assert sentence.startswith(f"{address}, forced by annotation, is none of this host's addresses")
    assert found(topology, live, missing=missing_in(("other", sentence))) == ()
    astray = tuple(route._replace(foreign=True) for route in live.answers["b2"].routes)
    live = evolve(live, answers={**live.answers, "b2": evolve(live.answers["b2"], routes=astray)})
    assert [loss.subject for loss in found(topology, live)][:1] == ["b2"]
    assert found(topology, live, missing={address}) == ()
    silent = Silence(
        apart={frozenset({"b1", "b2"}): Kind.NEVER}, undecided=frozenset(), young=frozenset(), queries_answered=True
    )
    assert len(list(causes(topology, silent))) == 1
    assert list(causes(topology, silent, {address})) == []
    assert len(list(causes(topology, evolve(silent, apart={frozenset({"b1", "b2"}): Kind.TUNNELED}), {address}))) == 1


def test_an_address_that_a_nat_may_translate_is_reported_where_it_is_wrong_in_any_case() -> None:
    topology = routed()
    off = build_topology(evolve(topology.snapshot, internal_ips=InternalIPs.OFF))
    node = topology.snapshot.nodes["b2"]
    have, own = {ip_address("192.0.2.1")}, node.internal_ips[0]
    far = ip_network("192.0.2.0/24")
    assert missing_addresses(off, "b2", have, (far,)) == (), "members of its location may reach it through a NAT"
    (near,) = missing_addresses(off, "b2", have, (far, own.network))
    assert "NAT" not in near
    (translated,) = missing_addresses(topology, "b2", have, (far,))
    assert "what a NAT translates to this host is an endpoint (force-endpoint)" in translated
    assert missing_addresses(topology, "b2", {own.ip}, (own.network,)) == ()
    assert missing_addresses(topology, "b2", (), (own.network,)) == (), "the host has not been looked at yet"


def test_another_route_is_named_with_its_table_and_explains_what_is_lost() -> None:
    topology = routed()
    live = asked(topology, lambda one, other: {one, other} == {"a2", "b1"})
    address = internal(topology, "b1")
    route = f"{address} via 192.168.97.254 dev eth0 table 99"
    answers = dict(live.answers)
    others = (taken_route for taken_route in answers["a2"].routes if taken_route.address != address)
    answers["a2"] = evolve(answers["a2"], routes=(*others, TakenRoute(address, "192.168.97.2", route, True)))
    (loss,) = found(topology, evolve(live, answers=answers))
    assert (loss.subject, loss.text) == (
        "a2", f"its kernel sends packets for {address} by another route than the agent's: {route}",
    )  # fmt: skip
    assert "ip route show table 99" in loss.remedy


def test_echo_requests_that_an_exemption_lets_out_in_clear_are_no_packet_filters_doing() -> None:
    """Refused are the requests of the host that states it, and its answers: that is one warning, and no loss."""
    topology = routed()
    nodes = {name: evolve(node, encryption=EncryptionStage.SENDS) for name, node in topology.snapshot.nodes.items()}
    encrypted = evolve(topology.snapshot, nodes=nodes, internal_ips=InternalIPs.ENCRYPTED)

    def told(b1: tuple[str, ...] | None, *a1: str) -> list[str]:
        snapshot = evolve(encrypted, granularity=Granularity.FULL)
        topology = build_topology(snapshot)
        statuses = {name: StatusRecord(public_key=name, revision=1) for name in nodes}
        statuses |= {name: evolve(statuses[name], clear=clear) for name, clear in (("a1", a1), ("b1", b1))}
        live = asked(topology, lambda one, other: {one, other} == {"a1", "b1"})
        live = evolve(live, answers={**live.answers, "a1": evolve(live.answers["a1"], clear=a1)})
        every = findings(
            Examined(members=(), report=report(snapshot, statuses, newest=1), topology=topology, statuses=statuses,
                     live=live)
        )  # fmt: skip
        of_pair = [one for one in every if one.subject in ("a1 - b1", "b1 - a1") and "no tunnel" not in one.text]
        of_hops = [text for _, text in suspicions((), topology, statuses, live) if "its internal IP" in text]
        losses = [one for one in of_pair if "does not reach" in one.text]
        assert [f"{one.text}: {one.remedy}" for one in losses] == of_hops
        return [f"{one.text}: {one.remedy}" for one in of_pair]

    own, there = internal(topology, "a1"), internal(topology, "b1")
    for b1, a1 in (((), (f"icmp@{there}/32",)), ((f"icmp@{own}/32",), ())):
        (text,) = told(b1, *a1)
        assert "is stated at one end only" in text
    for clear in ((f"udp/53@{own}/32",), ("icmp@192.168.77.0/24",), ()):
        (text,) = told((), *clear)
        assert "look on a1" in text
        assert "--clear" not in text
    # An older agent does not say what it exempts; if both state it, it is something else.
    exempted = f"icmp@{there}/32"
    for other in (None, (f"icmp@{own}/32",)):
        (text,) = told(other, exempted)
        assert (
            f"a1: its --clear {exempted} has these packets travel outside the tunnels, where there may be no path; "
            "look on" in text
        )


def test_many_pairs_are_counted() -> None:
    topology = routed()
    node = topology.snapshot.nodes["a1"]
    nodes = {
        f"{place}{number:02}": evolve(
            node, name=f"{place}{number:02}", public_key=f"{place}{number:02}", location=place,
            mesh_addresses=(ip_address(f"10.4.{ord(place)}.{number}"),),
            internal_ips=(ip_interface(f"192.168.{ord(place)}.{number}/24"),),
        )
        for place in "ab" for number in range(1, 26)
    }  # fmt: skip
    topology = build_topology(evolve(topology.snapshot, nodes=nodes, granularity=Granularity.CROSS))
    answers = {
        f"a{number:02}": DiagnosticsResponse(reached=(f"10.4.98.{number}",), unreached=(f"192.168.98.{number}",))
        for number in range(1, 26)
    }
    *first, last = found(topology, Live(answers=answers))
    assert [loss.subject for loss in first] == [f"a{number:02} - b{number:02}" for number in range(1, PAIRS + 1)]
    assert last.text.startswith("5 more pairs do not reach each other at internal IPs, a21 - b21")
    # So are hosts whose kernels take other routes.
    astray = {
        f"a{number:02}": DiagnosticsResponse(routes=(TakenRoute(f"192.168.98.{number}", "", "x dev eth1", True),))
        for number in range(1, 26)
    }
    *first, last = found(topology, Live(answers=astray))
    assert len(first) == PAIRS
    assert last.text.startswith("the kernels of 5 more hosts take other routes than the agents' too, a21, a22")
