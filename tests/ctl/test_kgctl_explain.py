"""`kgctl explain`: the way of a packet, as an operator reads it."""

from __future__ import annotations

import json
from ipaddress import ip_interface, ip_network
from typing import Any

import pytest
import trio
from attrs import evolve
from click.testing import CliRunner, Result

from helpers import put_kept
from kilo_etcd.ctl.main import main
from kilo_etcd.ctl.reports.report import DROPPED
from kilo_etcd.ctl.reports.trace import Plans, ends, explain, routing_table
from kilo_etcd.etcd.api import Client
from kilo_etcd.kernel.routing.encrypted import rule_priorities, table_of
from kilo_etcd.kernel.routing.returns import return_priority, return_table
from kilo_etcd.model import CandidateClass, Encapsulate, EncryptionStage, Endpoint
from kilo_etcd.model.hostplan import Encryption, HostPlan, RoutePlan, Via
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys, NodeKey
from kilo_etcd.store.records import (
    CandidateRecord,
    NodeRecord,
    ProbeReportRecord,
    Role,
    StatusRecord,
    Unreachable,
    encode,
    read,
)
from kilo_etcd.testing.fake_etcd import FakeEtcd
from kilo_etcd.topology.internal import AT_MESH_ADDRESS, REMEDY
from kilo_etcd.topology.segments import build_topology
from kilo_etcd.topology.unrouted import ENCRYPTED_REMEDY, ENDPOINT_REMEDY

HOSTS = {
    # name: (number, location, internal IP, public)
    "gcp-1": (1, "gcp", "10.1.0.1/24", True),
    "gcp-2": (2, "gcp", "10.1.0.2/24", False),
    "gcp-3": (3, "gcp", "10.1.9.3/24", False),
    "home-1": (4, "home", "10.2.0.4/24", True),
    "home-2": (5, "home", "10.2.0.5/24", False),
}


async def world(client: Client) -> None:
    """Two locations led by their first hosts; gcp-3 is on another subnet; a laptop; containers behind home-2."""
    keys = Keys()
    await client.put("/kilo/mesh/subnets", "10.4.0.0/16, fd04::/64")
    await client.put("/kilo/mesh/granularity", "location")
    for name, (number, location, internal, public) in HOSTS.items():
        record = NodeRecord(
            public_key=f"{chr(64 + number)}{'A' * 42}=",
            endpoint=Endpoint.parse(f"203.0.113.{number}:51820" if public else f"{internal.partition('/')[0]}:51820"),
            internal_ips=(ip_interface(internal),),
            location=location,
        )
        await client.put(f"/kilo/by/{name}/addresses/10.4.0.{number}", "")
        if number != 2:
            await client.put(f"/kilo/by/{name}/addresses/fd04::{number}", "")
        await client.put(keys.node(name), encode(record))
        await put_kept(
            client, keys.election(location, name), encode(CandidateRecord(rank=CandidateClass.REST, since=""))
        )
    peer = {"publicKey": "Z" + "A" * 42 + "=", "allowedIPs": ["10.9.0.2/32"]}
    await client.put("/kilo/peers/laptop", json.dumps(peer))
    await client.put("/kilo/annotations/home-2/subnets", "172.20.0.0/24")


def reports(
    etcd: FakeEtcd,
    name: str,
    *unreachable: tuple[Any, ...],
    errors: tuple[str, ...] = (),
    clear: tuple[str, ...] | None = None,
    unanswered: tuple[str, ...] = (),
) -> None:
    """The agent of a host lives and has these things to say."""
    number, location = HOSTS[name][:2]
    status = StatusRecord(
        public_key=f"{chr(64 + number)}{'A' * 42}=",
        revision=10**6,
        role=Role.LEADER if name.endswith("-1") else Role.MEMBER,
        location=location,
        leader=f"{location}-1",
        unreachable=tuple(Unreachable(*one) for one in unreachable),
        unanswered=unanswered,
        errors=errors,
        clear=clear,
    )
    etcd.put_kept(Keys().status(name), encode(status))


@pytest.fixture
def etcd(fake: FakeEtcd) -> FakeEtcd:
    """The mesh, with agents that live and have nothing to complain of."""
    trio.run(world, fake.client())
    for name in HOSTS:
        reports(fake, name)
    return fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments], prog_name="kgctl")


def hops(way: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    steps: list[dict[str, str]] = way["hops"]
    return [(step["from"], step["to"], step["how"], step["address"]) for step in steps]


def test_from_member_to_member_of_another_location(etcd: FakeEtcd) -> None:
    result = run("gcp-2", "home-2", "-o", "json")
    assert result.exit_code == 0, result.output
    (trace,) = json.loads(result.stdout)["traces"]
    assert hops(trace["there"]) == [
        ("gcp-2", "gcp-1", "clear", "10.1.0.1"),
        ("gcp-1", "home-1", "WireGuard", "203.0.113.4:51820"),
        ("home-1", "home-2", "clear", "10.2.0.5"),
    ]
    assert [(h["from"], h["encrypted"]) for h in trace["back"]["hops"]] == [
        ("home-2", False),
        ("home-1", True),
        ("gcp-1", False),
    ]
    text = run("gcp-2", "home-2").output
    assert text.startswith("gcp-2 (10.4.0.2) to 10.4.0.5: arrives; the answer takes the same way\n"), text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "2 gcp-1 [gcp] home-1 [home] yes WireGuard 203.0.113.4:51820" in lines


def test_each_family_is_a_trace_of_its_own_and_what_cannot_be_is_reported(etcd: FakeEtcd) -> None:
    result = run("gcp-1", "home-2", "-o", "json")
    # The LANs are IPv4 only, so IPv6 gets as far as home-1 and no further.
    assert result.exit_code == 1
    four, six = json.loads(result.stdout)["traces"]
    assert (four["works"], six["works"]) == (True, False)
    assert "home-1" in six["there"]["dropped"]
    assert "dropped on the way there" in run("gcp-1", "home-2").output


def test_another_subnet_is_reached_in_ipip(etcd: FakeEtcd) -> None:
    (trace,) = json.loads(run("gcp-2", "gcp-3", "-o", "json").stdout)["traces"]
    assert hops(trace["there"]) == [("gcp-2", "gcp-3", "clear, in IPIP", "10.1.9.3")]


def test_a_peer_and_a_network_behind_a_node(etcd: FakeEtcd) -> None:
    result = run("gcp-2", "laptop")
    assert result.exit_code == 0, result.output
    assert "arrives; peer laptop answers by its own configuration" in result.output
    (trace,) = json.loads(run("gcp-2", "172.20.0.9", "-o", "json").stdout)["traces"]
    assert [step["to"] for step in trace["there"]["hops"]] == ["gcp-1", "home-1", "home-2"]
    assert [step["to"] for step in trace["back"]["hops"]] == ["home-1", "gcp-1", "gcp-2"]


def test_what_the_agents_on_the_way_say_is_added(etcd: FakeEtcd) -> None:
    reports(etcd, "gcp-1", errors=("the port is taken",))
    etcd.delete(Keys().status("home-1"))
    etcd.delete(Keys().status("home-2"))
    remarks = json.loads(run("gcp-2", "home-1", "-o", "json").stdout)["remarks"]
    assert {"node": "gcp-1", "text": "the port is taken"} in remarks
    assert {"node": "home-1", "text": "its agent does not report: is the host up?"} in remarks
    assert "home-2" not in {remark["node"] for remark in remarks}


def test_a_member_off_the_path_that_does_not_answer_is_no_remark(etcd: FakeEtcd) -> None:
    text = "gcp-3 has never answered gcp-1 at its internal IP 10.1.9.3, so gcp-1 sends it nothing: label them"
    reports(etcd, "gcp-1", errors=(text,))
    assert json.loads(run("gcp-2", "home-1", "-o", "json").stdout)["remarks"] == []
    assert {"node": "gcp-1", "text": text} in json.loads(run("gcp-3", "home-1", "-o", "json").stdout)["remarks"]


def test_why_a_packet_is_dropped_before_its_first_hop_is_a_remark(etcd: FakeEtcd) -> None:
    text = "gcp-1, its leader, has never answered gcp-3 at its internal IP 10.1.0.1, so gcp-3 sends it nothing: label"
    reports(etcd, "gcp-3", ("gcp-1", "10.1.0.1"), errors=(text,))
    found = json.loads(run("gcp-3", "home-1", "-o", "json").stdout)
    dropped = {trace["there"]["dropped"] for trace in found["traces"]}
    assert "gcp-1 does not answer gcp-3 at its internal IP 10.1.0.1" in dropped
    assert {"node": "gcp-3", "text": text} in found["remarks"]


def headline(*arguments: str) -> tuple[int, str]:
    """Exit status and first line; what is asked for has one address."""
    result = run(*arguments)
    (trace,) = json.loads(run(*arguments, "-o", "json").stdout)["traces"]
    assert result.output.splitlines()[0] == trace["says"]
    assert (result.exit_code == 0) == trace["works"]
    return result.exit_code, result.output.splitlines()[0]


THERE = "gcp-2 (10.4.0.2) to 10.4.0.5: "
NO_TUNNEL = (
    "no tunnel to node home-1: it and gcp-1 are both behind NAT, and no host with a public endpoint sees gcp-1; do"
)


@pytest.mark.parametrize(
    ("name", "unreachable", "errors", "says"),
    [
        ("gcp-1", [], ["the port is taken"], "may not arrive: gcp-1 reports an error"),
        ("gcp-1", [], ["the port is taken", "two"], "may not arrive: gcp-1 reports 2 errors"),
        ("gcp-1", [], [NO_TUNNEL],
         "does not arrive: there is no tunnel between gcp-1 and home-1, which are both behind NAT"),
        ("gcp-2", [("gcp-1", "10.1.0.1", True)], [], "does not arrive: gcp-1 does not answer gcp-2 at 10.1.0.1"),
        ("home-1", [("home-2", "10.2.0.5", True)], [], "does not arrive: home-2 does not answer home-1 at 10.2.0.5"),
        ("gcp-1", [("gcp-2", "10.1.0.2", True)], [],
         "arrives, but the answer does not: gcp-2 does not answer gcp-1 at 10.1.0.2"),
        ("gcp-1", [("gcp-2", "10.1.0.2")], [],
         "arrives, but the answer is dropped: gcp-2 does not answer gcp-1 at its internal IP 10.1.0.2"),
        ("gcp-1", [], ["the firewall drops what this host forwards between kilo0 and eth0"],
         "may not arrive: gcp-1 reports an error"),
        ("gcp-2", [], ["no host elsewhere has ever answered an echo request through the leader gcp-1; if it forwards"],
         "may not arrive: gcp-2 reports an error"),
        # What concerns other pairs, other networks, what it would forward, or no packets at all.
        ("gcp-2", [], ["this host was demoted as leader: look for what drops forwarded packets"],
         "arrives; the answer takes the same way"),
        ("home-2", [], ["the firewall drops what this host forwards between kilo0 and eth0"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["metrics and health are not served, since 127.0.0.1:1107 cannot be listened on"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["the names of the mesh cannot be brought into the hosts file: /etc/hosts: Read-only"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["the state directory /var/lib/kilo-etcd cannot be written to: No space left on device"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["the snapshot cannot be cached on disk for a boot without etcd: /var/lib/x: Read-only"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["etcd's endpoint 10.4.0.9 is a mesh address: a host that boots has no tunnel"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["this host's clock went back by 24 h: other hosts drop its WireGuard handshakes as replays"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["packets to gcp-3 go over IPv6 as they are, although encapsulate is always: IPIP carries"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [("gcp-3", "10.1.9.3", True)], ["gcp-3 no longer answers gcp-1 at its internal IP 10.1.9.3"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], [NO_TUNNEL.replace("home-1", "lone-1")], "arrives; the answer takes the same way"),
        ("gcp-1", [], ["--subnet=10.5.0.0/16 is not in force: the mesh's subnets are 10.4.0.0/16"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["/kilo-status/by/gcp-1/status is changed again and again by another writer, and restored"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["/kilo/by/gcp-1/elections/gcp is changed again and again by another writer, and restored"],
         "may not arrive: gcp-1 reports an error"),
        ("gcp-1", [], ["192.168.7.0/24 of node home-2 is not routed here: it would cut this host off from 10.1.0.0/24"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["nothing comes back from the exit node exit-1, so nothing leaves this host but for the mesh"],
         "arrives; the answer takes the same way"),
        ("gcp-1", [], ["nothing comes back from the exit node home-1, so nothing leaves this host but for the mesh"],
         "does not arrive: nothing comes back to gcp-1 from home-1"),
    ],
)  # fmt: skip
def test_the_headline_follows_from_the_worst_hop(
    etcd: FakeEtcd, name: str, unreachable: list[tuple[object, ...]], errors: list[str], says: str
) -> None:
    reports(etcd, name, *unreachable, errors=tuple(errors))
    assert headline("gcp-2", "10.4.0.5") == (0 if says.startswith("arrives;") else 1, THERE + says)


@pytest.mark.parametrize(("name", "other"), [("gcp-1", "home-1"), ("home-1", "gcp-1")])
def test_a_tunnel_whose_other_end_does_not_answer_is_named(etcd: FakeEtcd, name: str, other: str) -> None:
    reports(etcd, name, unanswered=(other,))
    says = f"does not arrive: {other} does not answer WireGuard of {name}"
    assert headline("gcp-2", "10.4.0.5") == (1, THERE + says)


def probed(etcd: FakeEtcd, prober: str, leader: str, *targets: str, candidacy: int | None = None) -> None:
    """A prober reports that it gets no answer from these through a leader."""
    snapshot, _ = trio.run(operator.snapshot, etcd.client(), Keys())
    location = snapshot.nodes[leader].location
    held = next(one.create_revision for one in snapshot.candidates[location] if one.node == leader)
    record = ProbeReportRecord(leader=leader, candidacy=candidacy or held, targets=targets)
    etcd.put_kept(Keys().probe_report(location, prober), encode(record))


def told(*arguments: str) -> str:
    """What a command says, without columns."""
    return " ".join(CliRunner().invoke(main, arguments, prog_name="kgctl").output.split())


def test_tunnels_by_which_probers_get_no_answer_are_named_by_status_and_explain(etcd: FakeEtcd) -> None:
    """Nobody could do better than the leader, so it goes on leading."""
    probed(etcd, "gcp-2", "gcp-1", "home-1", candidacy=1)
    assert "through it packets do not arrive" not in told("status"), "that was an earlier candidacy"
    probed(etcd, "gcp-2", "gcp-1", "home-1")
    probed(etcd, "home-1", "gcp-1", "gcp-2")
    says = (
        "gcp-1 through it packets do not arrive: gcp-2 gets no answer from home-1; home-1 gets no answer from gcp-2; "
        "kgctl check tries its tunnels, kgctl explain gcp-2 home-1 --live the whole way"
    )
    assert says in told("status")
    why = "may not arrive: gcp-2 gets no answer from home-1 through gcp-1"
    assert headline("gcp-3", "10.4.0.5") == (1, f"gcp-3 (10.4.0.3) to 10.4.0.5: {why}")
    assert says in told("explain", "home-2", "gcp-3")
    assert headline("gcp-3", "10.4.0.2")[0] == 0, "no tunnel is on that way"
    encrypts(etcd)
    assert headline("gcp-3", "10.4.0.5")[1].endswith(f"{why}; {DROPPED}")
    assert f"home-1 gets no answer from gcp-2; {DROPPED}; kgctl check tries" in told("status")


def test_where_nothing_is_known_of_a_host_on_the_way_nothing_is_promised(etcd: FakeEtcd) -> None:
    etcd.delete(Keys().status("home-1"))
    assert headline("gcp-2", "10.4.0.5") == (1, THERE + "may not arrive: the agent of home-1 does not report")
    status = StatusRecord(public_key=f"{'D' + 'A' * 42}=", revision=10**6, location="home", leader="home-2")
    etcd.put_kept(Keys().status("home-1"), encode(status))
    leads = "it takes home-2 for its leader, but by etcd's records home-1 leads"
    says = f"may not arrive: home-1 does not follow etcd: {leads}"
    assert headline("gcp-2", "10.4.0.5") == (1, THERE + says)


def test_what_is_the_meshs_and_has_no_route_does_not_leave_by_another(etcd: FakeEtcd) -> None:
    result = run("gcp-3", "home-1", "-o", "json")
    assert result.exit_code == 1
    four, six = json.loads(result.stdout)["traces"]
    assert (four["works"], six["there"]["dropped"]) == (True, "gcp-3 has no route to fd04::4"), "its LAN has no IPv6"


def test_a_remark_is_printed_once(etcd: FakeEtcd) -> None:
    reports(etcd, "gcp-1", errors=("the port is taken", "the port is taken"))
    assert run("gcp-2", "home-2").output.count("the port is taken") == 1


OWN = "sends it by its own routing table"


@pytest.mark.parametrize(
    ("source", "target", "status", "says"),
    [
        ("gcp-1", "8.8.8.8", 0, f"gcp-1 {OWN}, outside the mesh"),
        ("gcp-1", "fd99::7", 1, f"does not arrive: no node or peer of the mesh has it, and gcp-1 {OWN}, in clear"),
        ("gcp-2", "2606:4700::1111", 0, f"gcp-2 {OWN}, outside the mesh"),
        ("gcp-1", "203.0.113.4", 0, f"gcp-1 {OWN}, outside the mesh: it is the endpoint of home-1"),
        ("gcp-1", "192.168.77.5", 1, f"does not arrive: no node or peer of the mesh has it, and gcp-1 {OWN}, in clear"),
        ("gcp-1", "10.1.0.1", 0, "it is the internal IP of gcp-1 itself"),
        ("gcp-1", "10.1.0.2", 0, f"gcp-1 {OWN}, in clear: it is the internal IP of gcp-2 at the same location"),
        ("gcp-1", "10.1.0.77", 0, f"gcp-1 {OWN}, in clear: it is on its location's network"),
        ("gcp-2", "10.2.0.5", 0,
         f"gcp-2 {OWN}, in clear; the mesh does not know whether it arrives: it is the internal IP of home-2, and the "
         "mesh carries no internal IPs (kgctl mesh set internal-ips routed); home-2 is reached at its mesh address "
         "10.4.0.5"),
        ("home-2", "172.20.0.9", 0, f"home-2 {OWN}: it is in a network behind home-2"),
        ("home-2", "10.2.0.50", 0, f"home-2 {OWN}: it is in a network of its own location"),
        ("gcp-2", "10.2.0.50", 0, "arrives; the answer takes the same way"),
        ("gcp-2", "172.20.0.9", 0, "arrives; the answer takes the same way"),
    ],
)  # fmt: skip
def test_any_address_can_be_asked_for(etcd: FakeEtcd, source: str, target: str, status: int, says: str) -> None:
    etcd.put("/kilo/annotations/home-1/allowed-location-ips", "10.2.0.50/32")
    code, line = headline(source, target)
    assert (code, line.partition(": ")[2]) == (status, says)


def test_the_internet_by_an_exit_node(etcd: FakeEtcd) -> None:
    by = "home-1 sends it on to the internet in its own name"
    etcd.put("/kilo/annotations/home-1/advertise-exit-node", "true")
    for name in ("gcp-1", "gcp-2"):
        etcd.put(f"/kilo/annotations/{name}/exit-node", "home-1")
    assert headline("gcp-2", "8.8.8.8") == (0, f"gcp-2 (10.4.0.2) to 8.8.8.8: {by}")
    (trace,) = json.loads(run("gcp-2", "8.8.8.8", "-o", "json").stdout)["traces"]
    assert [(hop["to"], hop["how"]) for hop in trace["there"]["hops"]] == [
        ("gcp-1", "clear"),
        ("home-1", "WireGuard"),
    ]
    assert [hop["to"] for hop in trace["back"]["hops"]] == ["gcp-1", "gcp-2"]
    assert trace["there"]["leaves"] == by
    # Its own location bypasses the exit node, and so does what has no exit.
    assert headline("gcp-2", "10.1.0.77")[1].endswith("it is on its location's network")
    assert headline("home-2", "8.8.8.8")[1].endswith("home-2 sends it by its own routing table, outside the mesh")
    # The exit node leads to the internet, and not to whoever is beside it.
    code, line = headline("gcp-1", "10.2.0.77")
    assert (code, "home-1 leads to the internet, and not into the private networks" in line) == (1, True)
    code, line = headline("gcp-2", "2606:4700::1111")
    assert (code, "gcp-2 has no IPv6 address in the mesh, so gcp-2 refuses" in line) == (1, True)
    # A leader that uses none hands nothing on.
    etcd.delete("/kilo/annotations/gcp-1/exit-node")
    code, line = headline("gcp-2", "8.8.8.8")
    assert (code, "dropped on the way there: node gcp-2 leaves its location by gcp-1" in line) == (1, True)
    etcd.put("/kilo/annotations/gcp-1/exit-node", "home-1")
    etcd.delete("/kilo/annotations/home-1/advertise-exit-node")
    code, line = headline("gcp-1", "8.8.8.8")
    assert (code, "home-1 does not advertise itself as an exit node" in line) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nobody", "gcp-1"], "there is no node nobody; kgctl status lists them"),
        (["gcp-1", "nobody"], "nobody is no node, no peer and no address; kgctl status lists them"),
        (["laptop", "gcp-1"], "laptop is a peer; explain starts at a node"),
        (["gcp-2", "fd04::1"], "node gcp-2 has IPv4 only, in which fd04::1 has no address"),
    ],
)
def test_what_cannot_be_explained_is_one_sentence(etcd: FakeEtcd, arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_why_an_address_in_a_network_that_was_left_out_is_not_reached(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/annotations/gcp-1/subnets", "10.4.0.0/15")
    etcd.put("/kilo/annotations/gcp-2/subnets", "0.0.0.0/0")
    result = run("home-1", "10.5.0.9")
    assert result.exit_code == 1
    assert result.output.splitlines()[0] == (
        "home-1 to 10.5.0.9: does not arrive: it is no part of the mesh, and home-1 sends it by its own routing table "
        "(10.4.0.0/15 of node gcp-1 is left out: it covers the mesh's own subnet; offer smaller networks)"
    )
    assert headline("home-1", "8.8.8.8") == (
        0,
        "home-1 to 8.8.8.8: home-1 sends it by its own routing table, outside the mesh",
    )
    shown = CliRunner().invoke(main, ["node", "show", "gcp-1"], prog_name="kgctl").output
    assert "10.4.0.0/15 of node gcp-1 is left out" in shown
    assert "0.0.0.0/0 of node gcp-2" not in shown


def test_an_address_that_nobody_has_is_dropped_where_it_would_be(etcd: FakeEtcd) -> None:
    result = run("gcp-2", "10.4.200.200")
    assert result.exit_code == 1
    assert "dropped on the way there: gcp-1 has no WireGuard peer whose allowed IPs hold 10.4.200.200" in result.output
    for start, row in ("gcp-2", "2 gcp-1 [gcp] dropped"), ("gcp-1", "1 gcp-1 [gcp] dropped"):
        shown = " ".join(run(start, "10.4.200.200").output.split())
        assert row in shown, "the host that drops it"


def test_a_node_that_was_rejected_is_named_with_its_reason(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/by/broken/node", "{")
    result = run("gcp-1", "broken")
    assert result.exit_code == 1
    assert "broken is not in force: the value is not JSON" in result.stderr


def test_a_member_that_does_not_answer_is_where_a_packets_way_ends(etcd: FakeEtcd) -> None:
    reports(etcd, "gcp-1", ("gcp-2", "10.1.0.2"))
    result = run("home-2", "gcp-2", "-o", "json")
    assert result.exit_code == 1
    (trace,) = json.loads(result.stdout)["traces"]
    assert trace["there"]["dropped"] == "gcp-2 does not answer gcp-1 at its internal IP 10.1.0.2"
    assert [step["to"] for step in trace["there"]["hops"]] == ["home-1", "gcp-1"]
    reports(etcd, "gcp-2", ("gcp-1", "10.1.0.1"))
    assert "dropped on the way there: gcp-1 does not answer gcp-2 at its internal IP 10.1.0.1" in run(
        "gcp-2", "gcp-1"
    ).output.replace("\n", " ")
    # It has another address by now, so what is said of the former one is out of date.
    reports(etcd, "gcp-1", ("gcp-2", "10.1.0.99"))
    reports(etcd, "gcp-2")
    assert run("home-2", "gcp-2").exit_code == 0
    # It answered before, so its route is there still.
    reports(etcd, "gcp-1", ("gcp-2", "10.1.0.2", True))
    (trace,) = json.loads(run("home-2", "gcp-2", "-o", "json").stdout)["traces"]
    assert trace["there"]["dropped"] is None
    assert [(step["to"], step["broken"]) for step in trace["there"]["hops"]] == [
        ("home-1", False),
        ("gcp-1", False),
        ("gcp-2", True),
    ]
    # A record that cannot be meant is no reason to say nothing.
    reports(etcd, "gcp-1", ("gcp-2", "nowhere"))
    assert run("home-2", "gcp-2").exit_code == 0


def test_a_member_with_an_internal_ip_of_each_family_is_reached_at_that_of_the_packets(etcd: FakeEtcd) -> None:
    for name in HOSTS:
        key, number = Keys().node(name), HOSTS[name][0]
        record = read(NodeRecord, etcd.get(key) or b"").record
        internal = (*record.internal_ips, ip_interface(f"fd0{1 if number < 4 else 2}::{number}/64"))
        etcd.put(key, encode(evolve(record, internal_ips=internal)))
    reports(etcd, "home-1", ("home-2", "10.2.0.5", True))
    four, six = json.loads(run("gcp-1", "home-2", "-o", "json").stdout)["traces"]
    assert [hops(trace["there"])[-1][-1] for trace in (four, six)] == ["10.2.0.5", "fd02::5"]
    assert four["says"].endswith("does not arrive: home-2 does not answer home-1 at 10.2.0.5")
    assert not four["works"]
    assert six["works"]


def routes_internal_ips(etcd: FakeEtcd, **changes: dict[str, Any]) -> None:
    """Every agent knows the setting, and it is `routed`. `changes`: how a node's record is otherwise."""
    etcd.put("/kilo/mesh/internal-ips", "routed")
    state(etcd, {"underlay": ()}, changes)


def encrypts(etcd: FakeEtcd, **changes: dict[str, Any]) -> None:
    """The setting is `encrypted`, and the switch to it is over."""
    etcd.put("/kilo/mesh/internal-ips", "encrypted")
    state(etcd, {"underlay": (), "encryption": EncryptionStage.SENDS}, changes)


def state(etcd: FakeEtcd, all_nodes: dict[str, Any], changes: dict[str, dict[str, Any]]) -> None:
    for name in HOSTS:
        key = Keys().node(name)
        record = evolve(read(NodeRecord, etcd.get(key) or b"").record, **all_nodes)
        etcd.put(key, encode(evolve(record, **changes.get(name.replace("-", "_"), {}))))


def test_encrypted_is_in_force_where_only_the_node_records_still_say_so(etcd: FakeEtcd) -> None:
    key = Keys().internal_ips
    routes_internal_ips(etcd)
    for name in [key.node for key in map(Keys().parse, etcd.keys(Keys().by_root)) if isinstance(key, NodeKey)]:
        record = read(NodeRecord, etcd.get(Keys().node(name)) or b"").record
        etcd.put(Keys().node(name), encode(evolve(record, encryption=EncryptionStage.SENDS)))
    for value in ("encrypted-please", None):
        if value is None:
            etcd.delete(key)
        else:
            etcd.put(key, value)
        etcd.compact()
        told = json.loads(CliRunner().invoke(main, ["status", "-o", "json"]).stdout)
        assert told["internalIps"] == "encrypted"
        assert [one["reason"].count("encrypted stays in force") for one in told["rejected"] if one["key"] == key] == [1]
        ran = CliRunner().invoke(main, ["mesh", "set", "internal-ips", "off", "--dry-run"])
        assert "internal-ips: encrypted becomes off" in ran.stdout


def test_a_setting_that_is_nonsense_or_missing_is_named_with_what_is_in_force(etcd: FakeEtcd) -> None:
    key = Keys().internal_ips

    def rejected() -> tuple[str, dict[str, str]]:
        told = json.loads(CliRunner().invoke(main, ["status", "-o", "json"]).stdout)
        return told["internalIps"], {one["key"]: one["reason"] for one in told["rejected"]}

    assert rejected() == ("off", {}), "an older mesh has no such setting"
    routes_internal_ips(etcd)
    assert rejected() == ("routed", {})
    etcd.put(key, "all")
    in_force, reasons = rejected()
    assert (in_force, list(reasons)) == ("routed", [key])
    assert reasons[key].endswith("(kgctl mesh set internal-ips routed); routed stays in force until then")
    etcd.delete(key)
    reasons = rejected()[1]
    assert "the value is missing: agents that run keep the one that they know" in reasons[key]
    assert "by default routed. kgctl mesh set internal-ips" in reasons[key]
    assert any(key in line for line in CliRunner().invoke(main, ["check"]).stdout.splitlines())


def by_internal_ip(source: str, target: str) -> tuple[int, dict[str, Any]]:
    result = run(source, target, "-o", "json")
    (trace,) = json.loads(result.stdout)["internal"]
    return result.exit_code, trace["there"]


def test_an_internal_ip_is_routed_with_the_senders_own_as_source(etcd: FakeEtcd) -> None:
    routes_internal_ips(etcd)
    assert headline("gcp-2", "10.2.0.5") == (
        0,
        "gcp-2 (10.1.0.2) to 10.2.0.5, the internal IP of home-2: arrives; the answer takes the same way",
    )
    (trace,) = json.loads(run("gcp-2", "10.2.0.5", "-o", "json").stdout)["traces"]
    assert hops(trace["there"]) == [
        ("gcp-2", "gcp-1", "clear", "10.1.0.1"),
        ("gcp-1", "home-1", "WireGuard", "203.0.113.4:51820"),
        ("home-1", "home-2", "clear", "10.2.0.5"),
    ]
    assert (trace["there"]["source"], trace["there"]["internalIpOf"]) == ("gcp-2 (10.1.0.2)", "home-2")
    assert [hop["table"] for hop in trace["there"]["hops"]] == ["main"] * 3
    lines = [" ".join(line.split()) for line in run("gcp-2", "10.2.0.5").output.splitlines()]
    assert "2 gcp-1 [gcp] home-1 [home] yes WireGuard 203.0.113.4:51820 main" in lines
    # At its own location nothing of it is the mesh's.
    assert headline("gcp-2", "10.1.0.1") == (
        0,
        f"gcp-2 to 10.1.0.1: gcp-2 {OWN}, in clear: it is the internal IP of gcp-1 at the same location",
    )


@pytest.mark.parametrize(
    ("mode", "how", "address"),
    [
        (Encapsulate.ALWAYS, "clear, in IPIP", "10.2.0.5"),
        (Encapsulate.WIREGUARD, "WireGuard", "10.2.0.5:51820"),
    ],
)
def test_the_table_and_the_rule_by_which_a_leader_answers_its_member_as_the_member_sends(
    etcd: FakeEtcd, mode: Encapsulate, how: str, address: str
) -> None:
    routes_internal_ips(etcd, home_2={"encapsulate": mode})
    (trace,) = json.loads(run("gcp-2", "10.2.0.5", "-o", "json").stdout)["traces"]
    assert hops(trace["there"])[-1] == ("home-1", "home-2", how, address)
    assert hops(trace["back"])[0][2] == how
    table = f"{return_table('kilo0')} (rule {return_priority('kilo0')}: iif kilo0)"
    assert [hop["table"] for hop in trace["there"]["hops"]] == ["main", "main", table]
    assert [hop["table"] for hop in trace["back"]["hops"]] == ["main"] * 3
    # A packet of the leader's own, as one for a mesh address, takes the main table.
    (trace,) = json.loads(run("gcp-2", "10.4.0.5", "-o", "json").stdout)["traces"]
    assert trace["there"]["hops"][-1]["table"] == "main"


def test_a_leader_refuses_what_others_send_to_a_member_that_has_never_answered(etcd: FakeEtcd) -> None:
    routes_internal_ips(etcd)
    reports(etcd, "home-1", ("home-2", "10.2.0.5", False))
    status, said = headline("gcp-2", "10.2.0.5")
    assert (status, "home-2 does not answer home-1 at its internal IP 10.2.0.5" in said) == (1, True), said


def test_between_two_nodes_it_says_how_the_internal_ip_is_reached_too(etcd: FakeEtcd) -> None:
    routes_internal_ips(etcd)
    lines = [" ".join(line.split()) for line in run("gcp-2", "home-2").output.splitlines()]
    assert lines[lines.index("By internal IP:") + 1 :][:2] == [
        "INTERNAL IP FROM BY TABLE OUTCOME",
        "10.2.0.5 gcp-2 (10.1.0.2) gcp-1 (clear), home-1 (WireGuard), home-2 (clear) main arrives; the answer takes "
        "the same way",
    ]
    # What an agent reports on the way counts.
    reports(etcd, "gcp-2", ("gcp-1", "10.1.0.1", False))
    assert by_internal_ip("gcp-2", "home-2")[0] == 1
    reports(etcd, "gcp-2")
    assert "By internal IP" not in run("gcp-1", "10.4.0.5").output
    assert run("gcp-1", "laptop").exit_code == 0
    assert "in clear: it is the internal IP of gcp-3 at the same location" in run("gcp-1", "gcp-3").output


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"home_2": {"underlay": None}},
         "internal-ips routed waits for agents that do not know it (kgctl status names them)"),
        ({"gcp_1": {"underlay": (ip_network("10.2.0.0/16"),)}},
         "gcp-1 reaches these addresses over its own links, so they are not routed from there; if gcp-1 should not, "
         "remove the route or the address there (ip route show 10.2.0.0/16), or give one of them other addresses, or "
         f"{REMEDY}; the hosts are to be reached at their mesh addresses"),
        ({name: {"underlay": (ip_network("10.2.0.0/16"),)} for name in ("gcp_1", "gcp_2")},
         f"gcp-2 or a host of its segment reaches 10.2.0.0/16 over its own links; {REMEDY}"),
        ({"gcp_3": {"internal_ips": (ip_interface("10.2.0.5/24"),)}}, f"gcp-3 and home-2 have it; {REMEDY}"),
        ({"home_1": {"endpoint": Endpoint.parse("10.2.0.5:51820")}},
         f"other segments reach the WireGuard of home-1 there; {AT_MESH_ADDRESS}; {ENDPOINT_REMEDY}"),
        ({"home_2": {"internal_ips": (ip_interface("169.254.7.7/24"),)}},
         f"it is each host's own (loopback, link-local, multicast); {REMEDY}"),
    ],
)  # fmt: skip
def test_why_an_internal_ip_is_not_routed(etcd: FakeEtcd, changes: dict[str, dict[str, Any]], why: str) -> None:
    routes_internal_ips(etcd, **changes)
    status, there = by_internal_ip("gcp-2", "home-2")
    assert (status, there["unrouted"], there["hops"]) == (0, why, [])
    lines = [" ".join(line.split()) for line in run("gcp-2", "home-2").output.splitlines()]
    assert any(line.endswith(f"- - not routed: {why}") for line in lines)


def test_an_address_that_somebody_else_has_on_the_own_network_does_not_arrive_at_the_node(etcd: FakeEtcd) -> None:
    """The homes of home-1 and gcp-1 have networks with the same numbers."""
    same = {"internal_ips": (ip_interface("10.2.0.1/24"),)}
    routes_internal_ips(etcd, gcp_1=same, gcp_2={"internal_ips": (ip_interface("10.2.0.2/24"),)})
    status, said = headline("gcp-1", "10.2.0.5")
    assert status == 1
    assert "does not arrive: it is the internal IP of home-2, which is not routed: gcp-1 or a host of its segm" in said
    assert said.endswith(
        f"gcp-1 {OWN}, in clear, and reaches a host on gcp-1's own network, if there is one; home-2 is reached at its "
        "mesh address 10.4.0.5"
    )
    # Nobody of the mesh has this one, and nobody else could be meant.
    assert headline("gcp-1", "10.2.0.77") == (
        0, f"gcp-1 to 10.2.0.77: gcp-1 {OWN}, in clear: it is on its location's network"
    )  # fmt: skip
    # A node of the own location has it too.
    routes_internal_ips(etcd, gcp_1=same, gcp_2={"internal_ips": (ip_interface("10.2.0.5/24"),)})
    assert headline("gcp-1", "10.2.0.5") == (
        0,
        f"gcp-1 to 10.2.0.5: gcp-1 {OWN}, in clear: it is the internal IP of gcp-2 at the same location; home-2 is "
        "reached at its mesh address 10.4.0.5, elsewhere",
    )
    # The far leader is called at that address, over one network then.
    home = {"internal_ips": (ip_interface("10.2.0.4/24"),), "endpoint": Endpoint.parse("10.2.0.4:51820")}
    routes_internal_ips(etcd, gcp_1=same, home_1=home)
    status, said = headline("gcp-1", "10.2.0.4")
    assert (status, "it is the internal IP of home-1 if both are on that network; it is not routed: " in said) == (
        0, True,
    )  # fmt: skip


def test_a_leader_that_may_be_heard_at_its_internal_ip_is_not_routed_there(etcd: FakeEtcd) -> None:
    routes_internal_ips(etcd, gcp_1={"endpoint": Endpoint.parse("10.1.0.1:51820")})
    _, there = by_internal_ip("gcp-2", "home-1")
    why = "the WireGuard of gcp-1, called at a private endpoint, may receive packets from the WireGuard of home-1 there"
    assert (there["unrouted"], there["hops"]) == (f"{why}; {ENCRYPTED_REMEDY}", [])
    assert by_internal_ip("gcp-2", "gcp-3")[1]["leaves"].endswith("gcp-3 at the same location"), "one segment"
    etcd.put("/kilo/mesh/granularity", "full")
    assert by_internal_ip("gcp-2", "gcp-3")[1]["leaves"].endswith(f"gcp-3 at the same location; {ENCRYPTED_REMEDY}")
    etcd.put("/kilo/mesh/granularity", "cross")
    assert by_internal_ip("gcp-2", "gcp-3")[1]["leaves"].endswith("gcp-3 at the same location"), "there is no tunnel"


def test_the_table_and_the_rule_by_which_encrypted_leads_into_the_tunnel() -> None:
    there, held, other = ip_network("10.2.0.5/32"), ip_network("10.2.0.9/32"), ip_network("10.2.0.7/32")
    route = RoutePlan(destination=there, via=Via.TUNNEL)
    plan = HostPlan(node="a", encryption=Encryption(send={there: route}, hold=frozenset({held})))
    number, (_, priority) = table_of("kilo0"), rule_priorities("kilo0")
    for network in (there, held):
        assert routing_table(plan, network.network_address) == f"{number} (rule {priority}: not fwmark 107)"
    assert routing_table(plan, other.network_address) == "main"
    assert routing_table(HostPlan(node="a"), there.network_address) == "main"


PUBLIC = (ip_network("203.0.113.4/32"),)


def test_an_endpoint_of_a_node_alone_in_its_segment_is_reached_through_the_tunnel(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/mesh/granularity", "full")
    encrypts(etcd, home_1={"underlay": PUBLIC})
    for name in HOSTS:
        reports(etcd, name)
    status, line = headline("gcp-1", "203.0.113.4")
    assert (status, line.partition(": ")[2]) == (0, "arrives; the answer takes the same way")
    (trace,) = json.loads(run("gcp-1", "203.0.113.4", "-o", "json").output)["traces"]
    assert [hop[:3] for hop in hops(trace["there"])] == [("gcp-1", "home-1", "WireGuard")]
    assert trace["back"]["source"] == "home-1 (203.0.113.4)"


def test_an_exemption_that_one_end_states_is_named_with_what_the_other_has_to_state(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/mesh/granularity", "full")
    encrypts(etcd)
    for name in HOSTS:
        reports(etcd, name, clear=())
    says = "is stated at one end only: what "
    assert says not in told("status")

    there = ("tcp/22@10.2.0.0/24", "icmp@10.9.0.0/16", "nonsense")
    reports(etcd, "gcp-1", clear=there)
    text = (
        f"--clear tcp/22@10.2.0.0/24 {says}gcp-1 sends to home-1, home-2 by it leaves in clear, and is refused there; "
        "state it on home-1 too (add tcp/22@10.1.0.1/32 to KILO_CLEAR there; likewise for each pair of the others), or "
        "take it away on gcp-1"
    )
    assert f"gcp-1 - home-1, home-2 {text}" in told("status")
    assert told("status").count(says) == 1, "nobody has an address in the other network"
    for pair in (("gcp-1", "home-2"), ("home-2", "gcp-1")):
        assert f"home-2 --clear tcp/22@10.2.0.0/24 {says}gcp-1 sends to home-2 by it" in told("explain", *pair)
    assert says not in told("explain", "gcp-2", "home-2")

    # Either end is the server's; another port is another matter, and so is an older agent.
    reports(etcd, "home-2", clear=("tcp@10.1.0.0/24",))
    assert f"gcp-1 - home-1 --clear tcp/22@10.2.0.0/24 {says}" in told("status")
    reports(etcd, "home-2", clear=("tcp/2222@10.1.0.0/24",))
    assert f"gcp-1 - home-2 --clear tcp/22@10.2.0.0/24 {says}" in told("status")
    assert f"home-2 - gcp-1 --clear tcp/2222@10.1.0.0/24 {says}" in told("status")
    reports(etcd, "home-2")
    reports(etcd, "home-1", clear=("tcp/22@10.1.0.1/32",))
    assert says not in told("status")
    # Without `encrypted` nothing is refused.
    reports(etcd, "home-1", clear=())
    assert says in told("status")
    state(etcd, {"encryption": None}, {})
    etcd.put("/kilo/mesh/internal-ips", "routed")
    assert says not in told("status")


def test_an_exemption_of_one_end_is_named_where_nobody_refuses_it_and_answers_take_the_tunnels(etcd: FakeEtcd) -> None:
    """In locations of several members whose endpoints are public nothing in clear is refused in that family."""
    encrypts(etcd, home_1={"underlay": PUBLIC})
    for name in HOSTS:
        reports(etcd, name, clear=())
    says = "is stated at one end only: what "
    assert says not in told("status")
    reports(etcd, "home-2", clear=("tcp/7777@10.1.0.0/16",))
    line = next(line for line in told("status").split("home-2 - ") if says in line)
    assert f"--clear tcp/7777@10.1.0.0/16 {says}home-2 sends to gcp-1, gcp-2, gcp-3 by it leaves in clear, and " in line
    assert f"{says}home-2 sends to gcp-1, gcp-2 by it" in told("explain", "gcp-2", "home-2")
    for name in ("gcp-1", "gcp-2", "gcp-3"):
        reports(etcd, name, clear=("tcp/7777@10.2.0.0/24",))
    assert f"home-1 --clear tcp/7777@10.2.0.0/24 {says}" in told("status"), "home-1 does not state it"
    reports(etcd, "home-1", clear=("tcp/7777@10.1.0.0/16",))
    assert says not in told("status")


def test_node_show_has_the_table_of_encrypted_and_how_others_reach_each_address(etcd: FakeEtcd) -> None:
    def document(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(told("node", "show", name, "-o", "json"))
        return found

    assert document("home-1")["encrypted"] is None
    assert "table" not in told("node", "show", "home-1")
    # One host of gcp has an address on the links of home, and home-1 is called at an address of its own.
    encrypts(
        etcd,
        home_1={"underlay": (*PUBLIC, ip_network("10.2.0.0/24"))},
        gcp_3={"internal_ips": (ip_interface("10.2.0.77/24"),)},
    )
    reports(etcd, "home-1", clear=("tcp/22@10.1.0.0/24",))
    found = document("home-1")
    assert (found["facts"]["stage_of_encrypted"], found["facts"]["exempted_(--clear)"]) == (
        "sends", "tcp/22@10.1.0.0/24",
    )  # fmt: skip
    addresses = {one["address"]: one for one in found["encrypted"]["addresses"]}
    assert (addresses["203.0.113.4"]["internalIp"], addresses["203.0.113.4"]["inClear"]) == (False, True)
    assert "locations with several members are not encrypted" in addresses["203.0.113.4"]["why"]
    own = addresses["10.2.0.4"]
    assert (own["internalIp"], own["inClear"], own["notFrom"]) == (True, True, ["gcp"])
    assert "nothing says that they share that network" in own["why"]
    assert found["encrypted"]["routes"] == []
    assert "10.2.0.4 internal IP in clear from gcp " in told("node", "show", "home-1")

    encrypts(etcd, gcp_3={"internal_ips": (ip_interface("10.1.9.3/24"),)})
    routes = {one["to"]: one for one in document("home-1")["encrypted"]["routes"]}
    assert routes["10.1.0.1/32"] == {"to": "10.1.0.1/32", "via": "tunnel", "gateway": None, "source": "10.2.0.4"}
    shown = told("node", "show", "home-1")
    assert f"Routes it should have in table {table_of('kilo0')} (rule {rule_priorities('kilo0')[1]}: not" in shown
    assert "10.1.0.1/32 tunnel - 10.2.0.4" in shown
    assert "10.2.0.4 internal IP through the tunnels -" in shown
    (member,) = document("gcp-2")["encrypted"]["addresses"]
    assert (member["address"], member["inClear"], member["why"]) == ("10.1.0.2", False, None)


def test_an_endpoint_that_is_private_and_no_internal_ip_is_known(etcd: FakeEtcd) -> None:
    state(etcd, {}, {"home_1": {"endpoint": Endpoint.parse("10.200.0.4:51820")}})
    for source, where in (("home-2", "in clear: it is the endpoint of home-1 at the same location"),
                          ("gcp-2", "outside the mesh: it is the endpoint of home-1")):  # fmt: skip
        status, line = headline(source, "10.200.0.4")
        assert (status, line.partition(": ")[2]) == (0, f"{source} {OWN}, {where}")


def test_live_has_endpoints_in_the_tunnels_tried_too(etcd: FakeEtcd) -> None:
    def tried(target: str) -> tuple[str, ...]:
        topology = build_topology(trio.run(operator.snapshot, etcd.client(), Keys())[0])
        return ends(explain(Plans(topology, {}), "gcp-1", target), topology)

    etcd.put("/kilo/mesh/granularity", "full")
    encrypts(etcd, home_1={"underlay": PUBLIC})
    assert "203.0.113.4" in tried("203.0.113.4")
    assert "203.0.113.4" not in tried("home-1")


def test_why_an_address_of_a_node_alone_in_its_segment_is_not_encrypted_is_what_status_says(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/mesh/granularity", "full")
    encrypts(etcd, **{name.replace("-", "_"): {"location": ""} for name in HOSTS})
    (remark,) = (
        one
        for one in json.loads(CliRunner().invoke(main, ["status", "-o", "json"]).stdout)["unrouted"]
        if one["subject"] == "10.1.0.2"
    )
    assert remark["notFrom"] == ["gcp-1"]
    status, line = headline("gcp-1", "10.1.0.2")
    assert (status, line.partition(": ")[2]) == (
        0,
        f"gcp-1 {OWN}, in clear: it is the internal IP of gcp-2 if both are on that network; it is not routed: "
        + remark["text"],
    )


def test_an_endpoint_that_is_not_encrypted_is_said_to_travel_in_clear(etcd: FakeEtcd) -> None:
    """One of a location with several members is not, nor one of a node that has an address on the sender's links."""
    encrypts(etcd, home_1={"underlay": PUBLIC})
    own = f"gcp-1 {OWN}, in clear: it is the endpoint of home-1, and "
    status, line = headline("gcp-1", "203.0.113.4")
    assert (status, line.partition(": ")[2]) == (
        0,
        f"{own}the endpoints of nodes in locations with several members are not encrypted; with granularity full they "
        "are",
    )
    # In its own location nobody expects tunnels; an endpoint of no node's own is its router's.
    at_home = f"{OWN}, in clear: it is the endpoint of home-1 at the same location"
    assert headline("home-2", "203.0.113.4")[1].endswith(at_home)
    assert headline("home-2", "203.0.113.1")[1].endswith(f"{OWN}, outside the mesh: it is the endpoint of gcp-1")
    etcd.put("/kilo/mesh/granularity", "full")
    near = {"internal_ips": (ip_interface("10.2.0.77/24"),)}
    encrypts(etcd, home_1={"underlay": PUBLIC}, gcp_1=near)
    status, line = headline("gcp-1", "203.0.113.4")
    assert (status, line.partition(": ")[2].startswith(f"{own}not encrypted: a host of gcp-1, or of home-1's own")) == (
        0,
        True,
    )
