"""What `kgctl status` says about small worlds: pure, without etcd."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import attrs
import pytest
from attrs import evolve

from kilo_etcd.agent.etcd_listeners import MEMBERS_UNKNOWN
from kilo_etcd.ctl.commands.check import (
    Examined,
    Finding,
    Severity,
    _agents,
    _mode,
    _records,
    _unrouted,
    bounded,
    findings,
)
from kilo_etcd.ctl.commands.location import check_label, location_lines, locations_table
from kilo_etcd.ctl.impact import impact
from kilo_etcd.ctl.reports.label import oddity
from kilo_etcd.ctl.reports.live import Live, LiveTunnel
from kilo_etcd.ctl.reports.render import Table, clean, framed, plain, status_heading, status_json, status_tables
from kilo_etcd.ctl.reports.report import (
    NOT_IN_FORCE,
    UNREGISTERED,
    KernelRow,
    LiveReport,
    LocationRow,
    NodeRow,
    Remark,
    Report,
    grouped_unrouted,
    newest_revision,
    registered_names,
    remarks_on,
    report,
)
from kilo_etcd.ctl.reports.trace import Plans, explain
from kilo_etcd.etcd.api import Header, KeyValue
from kilo_etcd.model import (
    Candidate,
    CandidateClass,
    EncryptionStage,
    Endpoint,
    Granularity,
    InternalIPs,
    Node,
    Peer,
    RejectedRecord,
    Snapshot,
)
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import DiagnosticsResponse, Role, StatusRecord
from kilo_etcd.store.view import View
from kilo_etcd.topology.internal import REMEDY
from kilo_etcd.topology.mesh_settings import disagreements
from kilo_etcd.topology.segments import build_topology

KEYS = {name: f"{name:_<43}=" for name in ("a1", "a2", "a3", "b1", "b2")}


def node(name: str, number: int, location: str) -> Node:
    return Node(
        name=name,
        public_key=KEYS[name],
        location=location,
        endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
        internal_ips=(ip_interface(f"192.168.{ord(location[:1] or '@')}.{number}/24"),),
        mesh_addresses=(ip_address(f"10.4.0.{number}"),),
        registered_revision=number,
    )


def candidate(name: str, revision: int, rank: CandidateClass = CandidateClass.PUBLIC) -> Candidate:
    return Candidate(node=name, rank=rank, create_revision=revision, since=f"2026-11-22T10:00:{revision:02}Z")


WORLD = Snapshot(
    revision=40,
    subnets=(ip_network("10.4.0.0/16"),),
    nodes={n.name: n for n in (node("a1", 1, "a"), node("a2", 2, "a"), node("a3", 3, "a"), node("b1", 4, ""))},
    candidates={"a": (candidate("a1", 30), candidate("a3", 20), candidate("a2", 31))},
)


def status(name: str, **rest: Any) -> StatusRecord:
    return evolve(StatusRecord(public_key=KEYS[name], revision=40, role=Role.MEMBER, location="a", leader="a3"), **rest)


ALL_WELL = {
    "a1": status("a1"),
    "a2": status("a2"),
    "a3": status("a3", role=Role.LEADER, leads_since="2026-11-22T10:30:00Z"),
    "b1": status("b1", role=Role.ALONE, location="", leader=""),
}


def test_a_mesh_in_order_has_nothing_to_complain_of() -> None:
    found = report(WORLD, ALL_WELL, newest=40, registered=frozenset(WORLD.nodes))
    assert [(row.name, row.role, row.alive, row.behind) for row in found.nodes] == [
        ("a1", "member", True, 0),
        ("a2", "member", True, 0),
        ("a3", "leader", True, 0),
        ("b1", "alone", True, 0),
    ]
    assert (found.disagreements, found.errors, found.problems, found.rejected) == ((), (), (), ())
    assert plain(status_tables(found), status_heading(found)) == (
        "granularity location; internal-ips off; subnets 10.4.0.0/16; 4 nodes, 4 alive; revision 40\n"
        "\n"
        "Nodes:\n"
        "NODE  LOCATION   MESH ADDRESS  INTERNAL IP      ENDPOINT           ROLE    AGENT  REVISION\n"
        "a1    a          10.4.0.1      192.168.97.1/24  203.0.113.1:51820  member  alive  40\n"
        "a2    a          10.4.0.2      192.168.97.2/24  203.0.113.2:51820  member  alive  40\n"
        "a3    a          10.4.0.3      192.168.97.3/24  203.0.113.3:51820  leader  alive  40\n"
        "b1    (default)  10.4.0.4      192.168.64.4/24  203.0.113.4:51820  alone   alive  40\n"
        "\n"
        "Locations:\n"
        "LOCATION   NODES  LEADER  SINCE                 NEXT IN LINE  CANDIDATES\n"
        "(default)  1      b1      -                     -             -\n"
        "a          3      a3      2026-11-22T10:30:00Z  a1            a3, a1, a2"
    )


def unrouted(found: Report, world: Snapshot) -> tuple[Finding, ...]:
    return tuple(_unrouted(Examined(members=(), report=found, topology=build_topology(world))))


def test_internal_ips_wait_for_agents_that_do_not_know_them() -> None:
    known = {name: evolve(node, underlay=()) for name, node in WORLD.nodes.items()}
    world = evolve(WORLD, nodes=known, internal_ips=InternalIPs.ROUTED)
    found = report(world, ALL_WELL, newest=40, registered=frozenset(world.nodes))
    assert (found.internal_ips, found.internal_ips_in_force, found.unaware, found.unrouted) == (
        "routed",
        "routed",
        (),
        (),
    )
    assert "; internal-ips routed; " in status_heading(found)

    world = evolve(world, nodes={**known, "a2": WORLD.nodes["a2"]})
    found = report(world, ALL_WELL, newest=40, registered=frozenset(world.nodes))
    assert "; internal-ips off (routed waits for 1 agent); " in status_heading(found)
    sentence = (
        "routed waits until every agent knows the setting, and off is in force meanwhile: upgrade the agents on a2, or "
        "forget the nodes (kgctl node forget NODE)"
    )
    assert (
        f"Internal IPs that are not routed:\nSUBJECT       NOT FROM  WHY\ninternal-ips  anywhere  {sentence}"
        in plain(status_tables(found))
    )
    assert "wrong" not in plain(status_tables(found))
    told = json.loads(status_json(found))
    assert (told["internalIps"], told["internalIpsInForce"], told["unaware"]) == ("routed", "off", ["a2"])
    assert told["unrouted"] == [
        {"subject": "internal-ips", "text": sentence, "about": "", "nodes": [], "notFrom": [], "outliers": []}
    ]
    assert told["urgent"] == []
    assert [(f.severity, f.text) for f in (*_mode(found), *_records(found), *unrouted(found, world))] == [
        ("note", sentence)
    ]
    meant = report(evolve(world, internal_ips=InternalIPs.ENCRYPTED), ALL_WELL, newest=40)
    assert [f.severity for f in _mode(meant)] == ["error"]
    assert plain(status_tables(meant)).startswith("What is wrong with the mesh:\nSUBJECT       ERROR\ninternal-ips  ")

    old = {f"n{at:02}": evolve(WORLD.nodes["a1"], name=f"n{at:02}", public_key=f"{at}") for at in range(30)}
    (note,) = report(evolve(world, nodes=old), {}, newest=40).unrouted
    assert "the agents on n00, n01, n02, n03, n04 and 25 more, or forget the nodes" in note.text
    (error,) = report(evolve(world, nodes=old, internal_ips=InternalIPs.ENCRYPTED), {}, newest=40).urgent
    assert "the agents on n00, n01, n02, n03, n04 and 25 more do not know the setting" in error.text


def test_internal_ips_that_are_not_routed_are_notes_and_the_same_of_several_is_one_line() -> None:
    nodes = {name: evolve(node, underlay=()) for name, node in WORLD.nodes.items()}
    nodes["b1"] = evolve(nodes["b1"], internal_ips=(ip_interface("192.168.97.2/24"),))
    world = evolve(WORLD, nodes=nodes, internal_ips=InternalIPs.ROUTED)
    found = report(world, ALL_WELL, newest=40, registered=frozenset(nodes))
    remark, twice = found.unrouted
    assert (remark.subject, remark.nowhere) == ("192.168.97.0/24", "a, the default location")
    assert (twice.subject, twice.nowhere, twice.nodes) == ("192.168.97.2", "anywhere", ("a2", "b1"))
    assert twice.text.startswith("a2 and b1 have it; ")
    assert remark.text.startswith("hosts of a, the default location have networks with these addresses of their own; ")
    assert "Internal IPs that are not routed:" in plain(status_tables(found))
    assert [(f.severity, f.subject) for f in unrouted(found, world)] == [
        ("note", "192.168.97.0/24"), ("note", "192.168.97.2 (a2, b1)"),
    ]  # fmt: skip
    assert [f.text.partition(":")[0] for f in unrouted(found, world)] == [
        "not routed from a, the default location", "not routed from anywhere",
    ]  # fmt: skip
    strange = {**nodes, "b1": evolve(nodes["b1"], internal_ips=(ip_interface("192.168.98.2/24"),))}
    strange["a2"] = evolve(nodes["a2"], underlay=(ip_network("192.168.98.0/24"),))
    stray = evolve(world, nodes=strange)
    found_stray = report(stray, ALL_WELL, newest=40, registered=frozenset(nodes))
    assert [(f.severity, f.subject) for f in unrouted(found_stray, stray)] == [("warning", "192.168.98.0/24")]
    note = "note: 192.168.97.0/24: not routed from a, the default location: hosts of a, "
    said = impact(evolve(world, internal_ips=InternalIPs.OFF), world)
    assert any(line.startswith(note) for line in said)

    # One LAN, a full mesh: WireGuard is reached at the internal IPs themselves.
    lan = {
        f"n{at}": evolve(nodes["a1"], name=f"n{at}", public_key=f"{at}", mesh_addresses=(ip_address(f"10.4.1.{at}"),),
                         internal_ips=(ip_interface(f"10.7.0.{at}/24"),), endpoint=Endpoint.parse(f"10.7.0.{at}:51820"))
        for at in range(1, 6)
    }  # fmt: skip
    found = report(evolve(world, nodes=lan, candidates={}, granularity=Granularity.FULL), {}, newest=40)
    assert len(found.unrouted) == 5
    assert [remark.subject for remark in grouped_unrouted(found.unrouted)] == [
        "10.7.0.1 (n1), 10.7.0.2 (n2), 10.7.0.3 (n3) and 2 more"
    ]


def test_candidates_are_in_the_order_in_which_they_would_lead() -> None:
    annotated = evolve(WORLD, candidates={"a": (candidate("a3", 20), candidate("a2", 99, CandidateClass.ANNOTATED))})
    row = report(annotated, {}, newest=40).locations[1]
    assert (row.leader, row.next_in_line, row.candidates) == ("a2", "a3", ("a2", "a3"))


@pytest.mark.parametrize(
    ("said", "since"),
    [
        (status("a3", role=Role.LEADER, leads_since="2026-11-22T10:30:00Z"), "2026-11-22T10:30:00Z"),
        # An agent of an older version, one that has not followed yet, one that speaks of the location it had before.
        (status("a3", role=Role.LEADER), None),
        (status("a3", leads_since="2026-11-22T10:30:00Z"), None),
        (status("a3", role=Role.LEADER, location="b", leads_since="2026-11-22T10:30:00Z"), None),
        (None, None),
    ],
)
def test_since_when_a_leader_leads_is_for_its_own_agent_to_say(said: StatusRecord | None, since: str | None) -> None:
    statuses = {} if said is None else {"a3": said}
    assert report(WORLD, statuses, newest=40).locations[1].since == since


def test_a_leader_without_candidacy_is_no_candidate() -> None:
    row = report(evolve(WORLD, candidates={}, leaders={"a": ("a2",)}), {}, newest=40).locations[1]
    assert (row.leader, row.since, row.candidates) == ("a2", None, ())


@pytest.mark.parametrize("granularity", [Granularity.FULL, Granularity.CROSS])
def test_where_every_node_is_for_itself_a_location_is_one_row(granularity: Granularity) -> None:
    found = report(evolve(WORLD, granularity=granularity), {}, newest=40)
    assert [(row.location, row.nodes, row.leader) for row in found.locations] == [
        ("", ("b1",), "b1"),
        ("a", ("a1", "a2", "a3"), None),
    ]
    assert "each node for itself" in plain(status_tables(found))


def test_nodes_without_an_internal_ip_are_one_note_if_those_of_others_are_routed() -> None:
    nodes = {
        name: evolve(node, internal_ips=()) if name in ("a3", "b1") else node for name, node in WORLD.nodes.items()
    }
    world = evolve(WORLD, nodes=nodes)
    assert not any("no internal IP" in note.text for note in report(world, {}, newest=40).notes), "none is routed"
    knowing = {name: evolve(node, underlay=()) for name, node in nodes.items()}
    routed = evolve(world, internal_ips=InternalIPs.ROUTED, nodes=knowing)
    (note,) = (note for note in report(routed, {}, newest=40).notes if "no internal IP" in note.text)
    assert note.subject == "a3, b1"
    assert not any("no internal IP" in note.text for note in report(evolve(WORLD, nodes={}), {}, newest=40).notes)


def test_a_location_with_several_rows_has_nodes_in_each() -> None:
    alone = evolve(WORLD.nodes["a3"], internal_ips=())
    found = report(evolve(WORLD, nodes={**WORLD.nodes, "a3": alone}), {}, newest=40)
    (table,) = (table for table in status_tables(found) if table.title == "Locations")
    assert [row[0] for row in table.rows] == ["(default)", "a: a1, a2", "a: a3"]


def test_agents_that_disagree_are_named_with_what() -> None:
    found = report(
        WORLD,
        ALL_WELL
        | {
            "a1": status("a1", leader="a1", role=Role.LEADER),
            "a2": status("a2", revision=33, leader=""),
            "b1": status("a2", role=Role.ALONE, location="", leader=""),
        },
        newest=40,
    )
    assert [(remark.subject, remark.text) for remark in found.disagreements] == [
        ("a1", "it takes a1 for its leader, but by etcd's records a3 leads"),
        ("a2", "it has applied revision 33, 7 behind 40"),
        ("a2", "it sees no leader, but by etcd's records a3 leads"),
        ("b1", "it reports another public key than the one registered: are there two hosts of this name?"),
    ]
    assert "33 (7 behind)" in plain(status_tables(found))


def test_agents_that_take_peer_queries_at_another_port_than_most_are_named() -> None:
    def other_ports(**ports: int) -> list[tuple[str, str]]:
        told = ALL_WELL | {name: evolve(ALL_WELL[name], peer_query_port=port) for name, port in ports.items()}
        return [(remark.subject, remark.text) for remark in report(WORLD, told, newest=40).disagreements]

    assert other_ports() == []
    assert other_ports(a2=1107) == [], "as most, and said"
    assert other_ports(**dict.fromkeys(ALL_WELL, 2107)) == []
    (remark,) = other_ports(a2=2107)
    assert remark == (
        "a2",
        "it takes peer queries at UDP 2107 and most others at 1107, so they query each other in vain while etcd is "
        "away: give all agents the same --peer-query-port",
    )
    told = ALL_WELL | {"a2": evolve(ALL_WELL["a2"], peer_query_port=2107)}
    for about in (["a2"], ["a1", "a2"]):
        (of_two,) = report(WORLD, told, newest=40, about=about).disagreements
        assert (of_two.subject, of_two.text) == remark, "most of the mesh, whoever is asked about"
    (remark,) = other_ports(**{name: 2107 for name in ALL_WELL if name != "a2"})
    assert remark[1].startswith("it takes peer queries at UDP 1107 and most others at 2107, ")


def test_what_every_agent_says_of_the_mesh_is_shown_once() -> None:
    greedy = evolve(WORLD.nodes["a2"], subnets=(ip_network("0.0.0.0/0"),))
    world = evolve(WORLD, nodes={**WORLD.nodes, "a2": greedy})
    (problem,) = report(world, {}, newest=40).problems
    assert (problem.subject, problem.about) == ("0.0.0.0/0", "a2")
    statuses = {name: evolve(said, errors=(problem.text, f"{name} itself")) for name, said in ALL_WELL.items()}
    found = report(world, statuses, newest=40)
    assert [(remark.subject, remark.text) for remark in found.errors] == [(name, f"{name} itself") for name in statuses]
    assert plain(status_tables(found)).count(problem.text) == 1
    assert ("a2", problem.text) in remarks_on(found, {"a2"})
    assert all(text != problem.text for _, text in remarks_on(found, {"a1"}))


def test_flags_that_differ_from_the_mesh_are_one_note_for_all_nodes() -> None:
    """As after `kgctl mesh set granularity full`, in a mesh whose agents have the flag that made it."""
    said = disagreements(
        evolve(WORLD, granularity=Granularity.FULL),
        granularity=Granularity.LOCATION,
        subnets=(ip_network("10.5.0.0/16"),),
    )
    assert len(said) == 2
    statuses = {
        name: evolve(one, granularity_flag=Granularity.LOCATION, errors=(*said, f"{name} itself"))
        for name, one in ALL_WELL.items()
    }
    found = report(WORLD, statuses, newest=40)
    assert found.disagreements == ()
    assert [remark.text for remark in found.errors] == [f"{name} itself" for name in statuses]
    assert [(note.subject, note.text) for note in found.notes] == [("a1, a2, a3 and 1 more", text) for text in said]
    assert plain(status_tables(found)).count("--mesh-granularity") == 1
    assert [(finding.severity, finding.subject) for finding in _records(found)] == [
        (Severity.NOTE, "a1, a2, a3 and 1 more")
    ] * 2
    assert all("--" not in text for _, text in remarks_on(found, set(statuses)))


def test_one_internal_ip_of_two_hosts_of_a_location_is_named() -> None:
    def told(location: str, address: str) -> list[tuple[str, str]]:
        other = evolve(WORLD.nodes["a2"], internal_ips=(ip_interface(address),), location=location)
        found = report(evolve(WORLD, nodes={**WORLD.nodes, "a2": other}), ALL_WELL, newest=40)
        return [(remark.subject, remark.text) for remark in found.problems]

    same = str(WORLD.nodes["a1"].internal_ips[0])
    ((subject, text),) = told("a", same)
    assert subject == "a1, a2"
    assert text.startswith(
        "they have the same internal IP 192.168.97.1 at location a, so at most one of them is reached"
    )
    assert "kgctl annotate a2 force-internal-ip=ADDRESS" in text
    assert told("b", same) == told("a", "192.168.97.99/24") == [], "another site may have the same network"


def test_whoever_has_the_internal_ip_of_another_host_is_told_so_and_the_one_that_is_silent_is_to_go() -> None:
    """As of a host that was installed anew under another name."""
    other = evolve(WORLD.nodes["a2"], internal_ips=WORLD.nodes["a1"].internal_ips)
    world = evolve(WORLD, nodes={**WORLD.nodes, "a2": other})
    for name in ("a1", "a2"):
        ((_, text),) = remarks_on(report(world, ALL_WELL, newest=40, about={name, "b1"}), {name, "b1"})
        assert text.startswith("a1, a2: they have the same internal IP")
        assert "node forget" not in text
    silent = {name: one for name, one in ALL_WELL.items() if name != "a1"}
    (remark,) = report(world, silent, newest=40).problems
    assert "if a1 is gone for good, kgctl node forget a1; else give a1 another one" in remark.text


def test_one_public_endpoint_of_two_nodes_is_named() -> None:
    def world(name: str, endpoint: str) -> Snapshot:
        other = evolve(WORLD.nodes[name], endpoint=Endpoint.parse(endpoint))
        return evolve(WORLD, nodes={**WORLD.nodes, "a1": evolve(WORLD.nodes["a1"], endpoint=SAME), name: other})

    SAME = Endpoint.parse("198.51.100.77:51820")
    for name in ("a2", "b1"):
        (remark,) = report(world(name, str(SAME)), ALL_WELL, newest=40).problems
        assert remark.subject == f"a1, {name}"
        assert remark.text.startswith(
            "they have the same endpoint 198.51.100.77:51820, so at most one of them is reached there"
        )
        assert f"kgctl annotate {name} force-endpoint=HOST:PORT" in remark.text
        assert not report(world(name, "198.51.100.77:51821"), ALL_WELL, newest=40).problems
    silent = {name: one for name, one in ALL_WELL.items() if name != "b1"}
    (remark,) = report(world("b1", str(SAME)), silent, newest=40).problems
    assert "if b1 is gone for good, kgctl node forget b1; else give b1 one of its own" in remark.text
    SAME = Endpoint.parse("gw.example.org:51820")
    (remark,) = report(world("b1", str(SAME)), ALL_WELL, newest=40).problems
    assert remark.text.startswith("they have the same endpoint gw.example.org:51820"), "two with one force-endpoint"
    SAME = Endpoint.parse("10.0.0.7:51820")
    assert not report(world("b1", str(SAME)), ALL_WELL, newest=40).problems, "another site may have the same network"
    (remark,) = report(world("a2", str(SAME)), ALL_WELL, newest=40).problems
    assert remark.subject == "a1, a2", "a private one, in one location"


def test_a_host_that_answers_is_up_although_its_agent_does_not_report() -> None:
    living = {name: one for name, one in ALL_WELL.items() if name != "b1"}
    addresses = {name: str(node.mesh_addresses[0]) for name, node in WORLD.nodes.items()}

    def told(answers: bool) -> Finding:
        b1 = (addresses["b1"],)
        responses = {
            name: DiagnosticsResponse(reached=b1, unreached=()) if answers else DiagnosticsResponse(unreached=b1)
            for name in ("a1", "a3")
        }
        examined = Examined(
            members=(), report=report(WORLD, living, newest=40), topology=build_topology(WORLD), statuses=living,
            live=Live(answers=responses),
        )  # fmt: skip
        (finding,) = (one for one in findings(examined) if one.subject == "b1" and "does not report" in one.text)
        return finding

    up = told(True)
    assert "although the host answers echo requests of a1, a3" in up.text
    assert "does not reach etcd" in up.remedy
    assert "is the host up?" in told(False).remedy


def test_a_host_that_is_no_part_of_the_mesh_is_not_said_to_be_of_an_older_version() -> None:
    def untried(*names: str) -> list[str]:
        live = Live(answers={name: DiagnosticsResponse() for name in names})
        examined = Examined(
            members=(), report=report(WORLD, ALL_WELL, newest=40), topology=build_topology(WORLD), statuses=ALL_WELL,
            live=live,
        )  # fmt: skip
        return [finding.text for finding in findings(examined) if "sent no" in finding.text]

    assert untried("renamed", "a1") == ["a1 sent no echo requests"]
    assert untried("renamed") == []


def test_junk_in_a_node_s_name_has_no_place_in_the_mesh() -> None:
    found = report(WORLD, ALL_WELL | {"a1": status("a1")}, newest=40, registered=frozenset({*WORLD.nodes, "junk"}))
    assert [(finding.subject, finding.text) for finding in _agents(found)] == [
        ("junk", "its agent does not report, and the node is no part of the mesh")
    ]
    found = report(WORLD, {}, newest=40, registered=frozenset({*WORLD.nodes, "junk"}))
    kept = {finding.subject: "its place in the mesh is kept" in finding.text for finding in _agents(found)}
    assert kept == {"a1": True, "a2": True, "a3": True, "b1": True, "junk": False}


def test_an_agent_that_listed_later_than_the_newest_record_is_not_behind() -> None:
    found = report(WORLD, {"a1": status("a1", revision=55)}, newest=40)
    assert next(row.behind for row in found.nodes if row.name == "a1") == 0
    assert found.disagreements == ()


def test_errors_and_what_is_rejected_are_listed() -> None:
    found = report(
        evolve(WORLD, rejected=(RejectedRecord("/kilo/by/x/node", "the value is not JSON"),)),
        {"a1": status("a1", errors=("the name vpn.example.org does not resolve",))},
        newest=40,
    )
    text = plain(status_tables(found))
    assert "Rejected:\nKEY              REASON\n/kilo/by/x/node  the value is not JSON" in text
    assert "Errors that agents report:\nNODE  ERROR\na1    the name vpn.example.org does not resolve" in text


def test_nodes_out_of_force_and_agents_without_a_record_are_shown() -> None:
    found = report(WORLD, {"b2": status("b2")}, newest=40, registered=frozenset({*WORLD.nodes, "x"}))
    rows = {row.name: row for row in found.nodes}
    assert (rows["x"].role, rows["x"].alive, rows["x"].location) == (NOT_IN_FORCE, False, None)
    assert (rows["b2"].role, rows["b2"].alive) == (UNREGISTERED, True)


def test_an_empty_mesh_says_so() -> None:
    assert "No node has registered yet." in plain(status_tables(report(Snapshot(revision=0), {}, newest=0)))


def test_the_newest_revision_is_that_of_the_mesh_not_of_etcd() -> None:
    view = View(Keys())
    view.load(
        [
            KeyValue(key=b"/kilo/by/a%20b/node", value=b"{", mod_revision=7),
            KeyValue(key=b"/kilo/x", value=b"", mod_revision=9),
        ],
        Header(revision=500),
    )
    assert newest_revision(view, Keys()) == 9
    assert registered_names(view, Keys()) == {"a b"}
    assert newest_revision(View(Keys()), Keys()) == 0


def test_json_has_everything_in_camel_case() -> None:
    data = json.loads(status_json(report(WORLD, ALL_WELL, newest=40)))
    assert data["subnets"] == ["10.4.0.0/16"]
    assert data["nodes"][2] == {
        "name": "a3",
        "location": "a",
        "meshAddresses": ["10.4.0.3"],
        "internalIps": ["192.168.97.3/24"],
        "endpoint": "203.0.113.3:51820",
        "observedEndpoints": [],
        "role": "leader",
        "alive": True,
        "revision": 40,
        "behind": 0,
        "version": "",
    }
    assert data["locations"][1]["nextInLine"] == "a1"
    assert data["rejected"] == []


def encrypting(**stages: EncryptionStage | None) -> Snapshot:
    nodes = {
        name: evolve(node, underlay=(), encryption=stages.get(name, EncryptionStage.SENDS))
        for name, node in WORLD.nodes.items()
    }
    return evolve(WORLD, nodes=nodes, internal_ips=InternalIPs.ENCRYPTED)


def test_how_far_the_switch_to_encrypted_is() -> None:
    def heading(world: Snapshot, *absent: str) -> str:
        living = {name: status for name, status in ALL_WELL.items() if name not in absent}
        found = report(world, living, newest=40, registered=frozenset(world.nodes))
        return status_heading(found).split("; ")[1]

    some = encrypting(a2=EncryptionStage.ACCEPTS, b1=None)
    through = len(WORLD.nodes) - 2
    of = f"{through} of {len(WORLD.nodes)} nodes"
    assert heading(encrypting()) == "internal-ips encrypted"
    assert heading(some) == f"internal-ips encrypted ({of} encrypt, waits for a2, b1)"
    assert heading(some, "b1") == f"internal-ips encrypted ({of} encrypt, waits for a2, not b1: no agent lives there)"
    back = evolve(encrypting(a1=None, a3=None), internal_ips=InternalIPs.OFF)
    assert heading(back) == f"internal-ips off (2 of {len(WORLD.nodes)} nodes are back, waits for a2, b1)"
    # A member of whose leader less is known sends in clear.
    assert "waits for a1, a2, a3)" in heading(encrypting(a3=None)), "a3 leads"
    # Hosts of both segments have its address on their own links, and are called elsewhere.
    near = encrypting()
    nodes = {**near.nodes, "b1": evolve(near.nodes["b1"], internal_ips=(ip_interface("192.168.97.9/24"),))}
    assert heading(evolve(near, nodes=nodes)) == "internal-ips encrypted (but not 4 addresses, named below)"
    shown = plain(status_tables(report(evolve(near, nodes=nodes), ALL_WELL, newest=40)))
    assert "Addresses that are not routed:" in shown
    routed = evolve(near, nodes={name: evolve(one, encryption=None) for name, one in nodes.items()})
    assert heading(evolve(routed, internal_ips=InternalIPs.ROUTED)) == "internal-ips routed"


def test_what_stays_in_clear_under_encrypted_is_a_warning_unless_the_operator_has_exempted_it() -> None:
    near = encrypting()
    nodes = {**near.nodes, "b1": evolve(near.nodes["b1"], internal_ips=(ip_interface("192.168.97.9/24"),))}

    def found(world: Snapshot, **clear: str) -> dict[str, Severity]:
        answers = {name: DiagnosticsResponse(clear=tuple(text.split(","))) for name, text in clear.items()}
        examined = Examined(
            members=(), report=report(world, ALL_WELL, newest=40), topology=build_topology(world), statuses=ALL_WELL,
            live=Live(answers=answers),
        )  # fmt: skip
        texts = ("is not encrypted", "are not routed", "not routed from")
        return {
            finding.subject: finding.severity
            for finding in findings(examined)
            if any(text in finding.text for text in texts)
        }

    world = evolve(near, nodes=nodes)
    assert set(found(world).values()) == {Severity.WARNING}
    whole = "tcp@192.168.97.0/24,icmp@fd00::/8"
    exempted = found(world, a1=whole, a2=whole, a3=whole, b1="nonsense,udp@192.168.0.0/16")
    assert set(exempted.values()) == {Severity.NOTE}
    # One host that sends there has exempted less.
    some = found(world, a1=whole, a2="tcp@192.168.97.8/32", a3=whole, b1=whole)
    assert Severity.WARNING in some.values()
    routed = evolve(world, nodes={name: evolve(one, encryption=None) for name, one in nodes.items()})
    assert set(found(evolve(routed, internal_ips=InternalIPs.ROUTED)).values()) == {Severity.NOTE}


def test_no_leader_with_a_public_endpoint_is_advised_to_take_a_private_one() -> None:
    """A forced endpoint takes the place of the public one, for the whole mesh."""
    near = encrypting()

    def remedies(*private: str) -> set[str]:
        nodes = {**near.nodes, "b1": evolve(near.nodes["b1"], internal_ips=(ip_interface("192.168.97.9/24"),))}
        for number, name in enumerate(private):
            nodes[name] = evolve(nodes[name], endpoint=Endpoint.parse(f"172.16.{number}.1:51820"))
        entries = build_topology(evolve(near, nodes=nodes)).unrouted
        return {entry.remedy for entry in entries if "is not encrypted" in entry.reason}

    label = "if they share that network, give them one label (granularity full)"
    otherwise = f". If they do not, {REMEDY}"
    assert remedies() == remedies("b1") == {label + otherwise}
    (both,) = remedies("a3", "b1")
    assert both.startswith(f"{label}, or have their leaders call each other at addresses in it (kgctl annotate LEADER")
    assert both.endswith(otherwise)


def test_what_all_agents_report_is_one_error() -> None:
    statuses = {name: evolve(status, errors=(MEMBERS_UNKNOWN,)) for name, status in ALL_WELL.items()}
    (finding,) = (agent for agent in _agents(report(WORLD, statuses, newest=40)) if agent.text == MEMBERS_UNKNOWN)
    assert (finding.severity, finding.subject) == (Severity.ERROR, "a1, a2, a3 and 1 more")


def test_what_becomes_of_packets_is_said_before_the_setting_is_changed() -> None:
    def said(before: InternalIPs, after: InternalIPs) -> str:
        world = encrypting()
        return "\n".join(impact(evolve(world, internal_ips=before), evolve(world, internal_ips=after)))

    on = said(InternalIPs.OFF, InternalIPs.ENCRYPTED)
    assert "internal-ips: off becomes encrypted" in on
    assert f"the agents of {len(WORLD.nodes)} nodes switch one by one, so that no packet is lost" in on
    assert "where a tunnel is down packets are dropped; multicast and broadcast" in on
    assert "packets for internal IPs of other segments go into the tunnels" in on
    back = said(InternalIPs.ENCRYPTED, InternalIPs.ROUTED)
    assert f"packets to {len(WORLD.nodes)} internal IPs stay in the tunnels" in back
    assert "go in clear again" not in back
    assert "leave the tunnels" not in back
    off = said(InternalIPs.ENCRYPTED, InternalIPs.OFF)
    assert f"packets to {len(WORLD.nodes)} internal IPs go in clear again, from the moment on that both ends" in off
    assert (
        "packets for internal IPs of other segments leave the tunnels: the hosts' own routes lead them, in clear" in off
    )


def test_what_leaves_the_tunnels_after_encrypted_is_what_routed_does_not_lead_into_them() -> None:
    def said(*nodes: Node, before: InternalIPs = InternalIPs.ENCRYPTED, after: InternalIPs = InternalIPs.ROUTED) -> str:
        world = evolve(encrypting(), nodes={node.name: node for node in nodes}, granularity=Granularity.FULL)
        return "\n".join(impact(evolve(world, internal_ips=before), evolve(world, internal_ips=after)))

    def host(name: str, number: int, location: str, internal: str, endpoint: str) -> Node:
        return evolve(
            node(name, number, location), internal_ips=(ip_interface(internal),),
            underlay=(ip_network(internal, strict=False),), endpoint=Endpoint.parse(f"{endpoint}:51820"),
            encryption=EncryptionStage.SENDS,
        )  # fmt: skip

    lan = [host(name, number, "", f"10.1.0.{number}/24", f"10.1.0.{number}") for number, name in ((1, "a1"), (2, "a2"))]
    assert "packets to 2 internal IPs go in clear again, from some segments or from all, from the" in said(*lan)
    assert "stay in the tunnels" not in said(*lan)
    on = said(*lan, before=InternalIPs.OFF, after=InternalIPs.ENCRYPTED)
    assert "the agents of 2 nodes switch one by one" in on
    assert "go into the tunnels" not in on, "at once none does"
    assert "ICMP errors, DHCP and what --clear lists; " in on
    # An endpoint that is the host's own; two of one label, which reach each other by their own network.
    own = evolve(
        host("b1", 3, "y", "10.3.0.1/24", "203.0.113.3"),
        underlay=(ip_network("10.3.0.0/24"), ip_network("203.0.113.0/30")),
    )
    one = host("a1", 1, "x", "10.1.0.1/24", "198.51.100.1")
    apart = said(own, one)
    assert "packets to 1 endpoint go in clear again" in apart
    assert "packets to 2 other internal IPs stay in the tunnels" in apart
    labelled = said(one, host("a2", 2, "x", "10.2.0.2/24", "198.51.100.2"), own)
    assert "packets to 1 endpoint and 2 internal IPs go in clear again" in labelled
    assert "packets to 1 other internal IP stay in the tunnels" in labelled


def test_explain_names_the_table_the_rule_and_the_mark() -> None:
    world = encrypting()
    plans = Plans(build_topology(world), ALL_WELL)
    (trace,) = explain(plans, "a1", str(world.nodes["b1"].internal_ips[0].ip))
    tables = [step.table for way in trace.paths for step in way.steps if step.source != "a3"]
    assert tables
    assert all("(rule 10601: not fwmark 107)" in table for table in tables), tables


def test_endpoints_that_stay_in_clear_are_a_note() -> None:
    """Of locations with several members; in a full mesh there are none."""
    world = encrypting()
    links = (ip_network("203.0.113.0/24"), ip_network("198.51.100.0/24"))
    nodes = {name: evolve(node, underlay=links) for name, node in world.nodes.items()}
    found = report(evolve(world, nodes=nodes), ALL_WELL, newest=40)
    (note,) = (note for note in found.notes if note.subject == "internal-ips")
    assert note.text.startswith("packets to and from the endpoints of nodes in locations with several members stay in")
    before = evolve(world, nodes=nodes, internal_ips=InternalIPs.OFF)
    said = "\n".join(impact(before, evolve(world, nodes=nodes)))
    assert "ICMP errors, DHCP, what the next line names and what --clear lists; " in said
    assert "refused\npackets to and from " in said
    for name, node in nodes.items():
        alone = len(build_topology(evolve(world, nodes=nodes)).segment_of(name).members) == 1
        stated = any(endpoint.address in link for endpoint in node.endpoints for link in links)
        assert (f"{name} " in note.text) is (stated and not alone), (name, note.text)
    full = evolve(world, nodes=nodes, granularity=Granularity.FULL)
    assert not [note for note in report(full, ALL_WELL, newest=40).notes if note.subject == "internal-ips"]


def test_an_old_agent_that_a_mesh_leaves_out_is_an_error_above_all() -> None:
    world = encrypting()
    world = evolve(world, nodes={**world.nodes, "b1": evolve(WORLD.nodes["b1"], encryption=None)})
    found = report(world, ALL_WELL, newest=40, registered=frozenset(world.nodes))
    assert found.internal_ips_in_force == "encrypted"
    assert found.switch is None
    (remark,) = found.urgent
    assert remark.subject == "b1"
    assert remark.text.startswith("node b1 is left out of internal-ips=encrypted, since its agent does not know")
    assert remark.text.endswith("upgrade its agent, or forget the node (kgctl node forget b1)")
    worst, *_ = findings(Examined(members=(), report=found, topology=build_topology(world), statuses=ALL_WELL))
    assert (worst.severity, worst.subject) == (Severity.ERROR, "b1")


@pytest.mark.parametrize(
    "kind", [Report, NodeRow, LocationRow, KernelRow, LiveReport, LiveTunnel, Remark, RejectedRecord]
)
def test_each_field_of_json_is_documented(kind: type) -> None:
    page = (Path(__file__).parents[2] / "docs/kgctl.md").read_text()
    first_and_rest = (field.name.split("_") for field in attrs.fields(kind))
    names = [first + "".join(part.title() for part in rest) for first, *rest in first_and_rest]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_a_node_behind_nat_shows_where_it_is_seen() -> None:
    seen = (Endpoint.parse("198.51.100.7:40001"), Endpoint.parse("198.51.100.7:40002"))
    hidden = evolve(WORLD.nodes["b1"], endpoint=Endpoint.parse("192.168.0.4:51820"), observed_endpoints=seen)
    found = report(evolve(WORLD, nodes={**WORLD.nodes, "b1": hidden}), ALL_WELL, newest=40)
    row = next(line for line in plain(status_tables(found)).splitlines() if line.startswith("b1 "))
    assert "  198.51.100.7:40001 (observed)  " in row
    said = json.loads(status_json(found))["nodes"][3]
    assert said["endpoint"] == "192.168.0.4:51820"
    assert said["observedEndpoints"] == ["198.51.100.7:40001", "198.51.100.7:40002"]


def test_names_cannot_steer_the_terminal_nor_be_taken_for_markup() -> None:
    table = Table("", ("A",), ((clean("\x1b[31mred\n"),), ("[bold]b",)))
    assert plain([table]) == "A\n\\x1b[31mred\\n\n[bold]b"
    assert "[bold]b" in framed([table], width=40, colour=False)


def test_a_narrow_terminal_folds_and_cuts_nothing() -> None:
    text = framed(status_tables(report(WORLD, ALL_WELL, newest=40)), width=60, colour=False)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert "…" not in text


def test_eighty_columns_hold_every_address_in_one_piece() -> None:
    found = report(WORLD, ALL_WELL, newest=40)
    text = framed(status_tables(found), width=80, colour=False)
    for row in found.nodes:
        for piece in (row.name, *row.mesh_addresses):
            assert any(piece in line.split() for line in text.splitlines()), (piece, text)
    assert "too narrow for INTERNAL IP" in text
    assert "INTERNAL IP" in framed(status_tables(found), width=140, colour=False)
    assert "too narrow" not in framed(status_tables(found), width=140, colour=False)


def test_wide_characters_keep_the_columns_aligned() -> None:
    assert plain([Table("", ("A", "B"), (("東京", "x"), ("oslo", "y")))]) == "A     B\n東京  x\noslo  y"


def test_locations_say_where_they_come_from() -> None:
    world = evolve(
        WORLD,
        nodes={
            "a1": node("a1", 1, "a"),
            "a2": evolve(node("a2", 2, "r"), default_location="r"),
            "b1": node("b1", 4, ""),
        },
    )
    lines = location_lines(world, {"a1": "a", "soon": "a"}, frozenset(world.nodes))
    assert plain([locations_table(lines)]) == (
        "NODE  LOCATION   FROM            NOTE\n"
        "a1    a          label\n"
        "a2    r          host's default\n"
        "b1    (default)  -\n"
        "soon  a          label           not registered yet"
    )


@pytest.mark.parametrize("label", ["gcp", "  gcp ", "eu/west 1", "東京"])
def test_any_text_may_be_a_label(label: str) -> None:
    assert check_label(label) == label.strip()


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("gcp", None),
        ("eu/west 1", None),
        ("東京", None),
        ("São Paulo-2_b.c:d+e@f", None),
        ("", None),
        ("berlin  # the old site", 'has "#" in its name, and a comment behind a value is part of the value'),
        ("berlin #1", 'has "#" in its name, and a comment behind a value is part of the value'),
        ('"berlin"', 'has """ in its name'),
        ("a=b;c$d", 'has "$" and ";" and "=" in its name'),
        ("a=b;c$d%", 'has "$" and "%" and ";" and more in its name'),
        ("a\x1b", "has \\x1b in its name"),
        ("new  york", "has spaces in its name that are easily overlooked"),
        ("gcp ", "has spaces in its name that are easily overlooked"),
    ],
)
def test_an_odd_character_in_a_location_is_noted_and_no_warning(label: str, says: str | None) -> None:
    assert oddity(label) == says
    nodes = {name: evolve(one, location=label) for name, one in WORLD.nodes.items()}
    found = report(evolve(WORLD, nodes=nodes), {}, newest=40)
    if says is None:
        assert found.notes == ()
        return
    (note,) = found.notes
    assert (note.subject, note.text) == (
        label,
        f"the location of a1 and 3 more {says}: if that is not meant, correct KILO_LOCATION there, or kgctl location "
        "set a1 NAME",
    )
    assert "Is that meant?" in plain(status_tables(found))
    assert [finding.severity for finding in _records(found)] == [Severity.NOTE]


@pytest.mark.parametrize("label", ["", "  ", "a\nb", "\x1b[0m", "\udcff", "x" * 5000])
def test_labels_that_would_only_do_harm_are_refused(label: str) -> None:
    with pytest.raises(ValueError, match=r"empty|print|longer"):
        check_label(label)


def test_a_field_that_is_not_known_is_a_warning_and_its_record_is_not_said_to_be_rejected() -> None:
    reason = "colour: no such field is known; a peer has publicKey; the rest of the record is in force"
    found = report(evolve(WORLD, rejected=(RejectedRecord("/kilo/peers/laptop", reason),)), {}, newest=40)
    (finding,) = _records(found)
    assert (finding.severity, finding.text) == (Severity.WARNING, reason)
    assert finding.remedy == "etcdctl get /kilo/peers/laptop; upgrade the agents, or take the field out"


def test_ten_thousand_rejected_records_are_counted_and_the_first_are_shown() -> None:
    flood = tuple(RejectedRecord(f"/kilo/by/b{number:05}/node", "the value is not UTF-8") for number in range(10_000))
    names = frozenset(note.key.split("/")[3] for note in flood)
    found = report(evolve(WORLD, rejected=flood), {}, newest=40, registered=names)
    text = plain(status_tables(found), status_heading(found))
    assert len(text.splitlines()) < 80
    assert "/kilo/by/b00000/node" in text
    assert "9980 more" in text
    assert "kgctl status -o json lists all" in text
    assert len(json.loads(status_json(found))["rejected"]) == 10_000
    findings = list(bounded((*_records(found), *_agents(found))))
    assert len(findings) < 60
    assert any(finding.text == "9980 more records are rejected" for finding in findings)
    no_part = [finding.subject for finding in findings if finding.text.endswith("the node is no part of the mesh")]
    assert len(no_part) == 21
    assert no_part[-1] == "9980 more"


def test_what_the_operator_wrote_is_shown_before_what_hosts_write() -> None:
    flood = [RejectedRecord(f"/kilo/by/b{number:05}/junk", "not known") for number in range(100)]
    own = RejectedRecord("/kilo/mesh/granularity", "'fulll' is none")
    assert report(evolve(WORLD, rejected=(*flood, own)), {}, newest=40, registered=frozenset()).rejected[0] == own


def test_a_field_of_a_newer_agent_is_no_error() -> None:
    newer = RejectedRecord(
        "/kilo/by/a1/node", "colour: no such field is known; the rest of the record is in force", "a1"
    )
    mistyped = RejectedRecord("/kilo/peers/x", "colour: no such field is known")
    found = report(evolve(WORLD, rejected=(newer, mistyped)), {}, newest=40, registered=frozenset())
    severities = {finding.subject: finding.severity for finding in _records(found)}
    assert severities["/kilo/by/a1/node"] is Severity.NOTE
    assert severities["/kilo/peers/x"] is Severity.ERROR


def test_an_answer_that_may_be_another_hosts_is_named_if_the_member_would_have_signed_it() -> None:
    def said(**others: object) -> list[tuple[str, str]]:
        told = {**ALL_WELL, "a1": status("a1", unsigned=("a2",)), "a2": status("a2", **others)}
        return [(remark.subject, remark.text) for remark in report(WORLD, told, newest=40).disagreements]

    ((subject, text),) = said(answers=True)
    assert subject == "a1"
    assert text.startswith("something answers it at 192.168.97.2, the internal IP of a2, but not with a2's key")
    assert "kgctl location set a2 NAME" in text
    assert said() == [], "an agent that is older, or has --probe off, signs nothing"
    (remark,) = said(answers=True, peer_query_port=2107)
    assert remark[1].startswith("it takes peer queries at UDP 2107"), "one cause, one line"


def test_answers_without_a_key_are_one_line_for_a_location() -> None:
    """As where a firewall drops UDP 1107 between all hosts of a location."""
    names = sorted(WORLD.nodes)
    told = {
        name: evolve(one, answers=True, unsigned=tuple(other for other in names if other not in (name, "b1")))
        for name, one in ALL_WELL.items()
        if name != "b1"
    }
    (remark,) = report(WORLD, told, newest=40).disagreements
    assert remark.subject == "location a"
    assert remark.text.startswith(
        "something answers at the internal IPs of a1, a2, a3, but not with their keys, in 6 cases (a1 asks a2, a1 asks "
        "a3, a2 asks a1 and 3 more): a firewall drops UDP 1107"
    )
    nodes = {name: evolve(node, location="eu, west") for name, node in WORLD.nodes.items()}
    remarks = report(evolve(WORLD, nodes=nodes), told, newest=40).disagreements
    assert "location eu, west" in {remark.subject for remark in remarks}
    about = report(WORLD, told, newest=40, about={"a1", "a2"})
    assert [text.count("kgctl location set") for _, text in remarks_on(about, {"a1"})] == [1, 1], "of a host each"


def test_wireguard_that_is_not_answered_is_named_once_for_each_host() -> None:
    told = {
        **ALL_WELL,
        "a3": status("a3", role=Role.LEADER, unanswered=("b1",)),
        "b1": status("b1", role=Role.ALONE, location="", leader="", unanswered=("a3", "a2", "gone", "b1")),
    }
    remarks = [remark for remark in report(WORLD, told, newest=40).problems if "WireGuard" in remark.text]
    assert [remark.subject for remark in remarks] == ["b1"]
    assert remarks[0].text.startswith("WireGuard's packets between it and a2, a3 are not answered (sent by a3, b1): ")
    of_a2 = [text for _, text in remarks_on(report(WORLD, told, newest=40, about=("a2",)), ("a2",)) if "WireG" in text]
    assert len(of_a2) == 1
    assert "between it and b1 are not answered (sent by b1)" in of_a2[0]
    # An agent that does not report is named for that.
    del told["a2"], told["a3"]
    assert not [remark for remark in report(WORLD, told, newest=40).problems if "WireGuard" in remark.text]


def test_check_names_an_unanswered_host_unless_an_error_about_packets_does() -> None:
    told = {**ALL_WELL, "b1": status("b1", role=Role.ALONE, location="", leader="", unanswered=("a3",))}
    topology = build_topology(WORLD)

    def found(live: Live) -> list[Finding]:
        of = report(WORLD, told, newest=40, registered=frozenset(WORLD.nodes))
        return [
            finding
            for finding in findings(Examined(members=(), report=of, topology=topology, statuses=told, live=live))
            if "not answered" in finding.text or "no tunnel" in finding.text
        ]

    assert [(finding.severity, finding.subject) for finding in found(Live())] == [(Severity.WARNING, "a3")]
    down = Live(answers={"a3": DiagnosticsResponse(), "b1": DiagnosticsResponse()})
    assert [finding.severity for finding in found(down)] == [Severity.ERROR]
    # An error hides no other pair of a host that it names.
    told["b1"] = evolve(told["b1"], unanswered=("a3", "a2"))
    left = [finding for finding in found(down) if finding.severity is Severity.WARNING]
    assert [finding.text.partition(" are not answered")[0] for finding in left] == [
        "WireGuard's packets between it and b1"
    ]
    assert [finding.subject for finding in left] == ["a2"]


def test_outside_peers_that_are_not_answered_are_a_note() -> None:
    peers = {"phone": Peer(name="phone", public_key=KEYS["b2"], allowed_ips=(ip_network("10.9.0.1/32"),))}
    told = {**ALL_WELL, "a3": status("a3", role=Role.LEADER, unanswered_peers=("phone", "gone"))}
    (remark,) = report(evolve(WORLD, peers=peers), told, newest=40).notes
    assert remark.subject == "phone"
    assert "does the device sleep?" in remark.text
