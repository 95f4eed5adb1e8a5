"""Exit node: who can be an exit node, what that does to its plan, and to the plan of a peer that uses it."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from attrs import evolve

from kilo_etcd.kernel.firewall.packet_filter import table_for
from kilo_etcd.model import DEFAULT_LOCATION, Encapsulate, Endpoint, Granularity, Node, Snapshot
from kilo_etcd.model.hostplan import ExitRoute, HostPlan, Via
from kilo_etcd.planning.exit_node import as_exit_node, no_common_family, through, trouble_of, unusable, with_exit_node
from kilo_etcd.planning.peerplan import peer_plan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.render import render
from kilo_etcd.planning.route_filter import filter_routes
from kilo_etcd.topology.segments import build_topology
from topology_worlds import PHONE, candidates_of, node, pair, peer, snapshot

EXIT = node("gcp-1", 1, "gcp", "10.1.0.1/24", "203.0.113.1", subnets="172.20.0.0/24", advertises_exit_node=True)
OTHER = node("gcp-2", 2, "gcp", "10.1.0.2/24", "203.0.113.2")
HOME = node("home-1", 3, "home", "10.2.0.1/24", "203.0.113.3")
LAPTOP = peer("laptop", "10.9.0.2/32")
WORLD = snapshot([EXIT, OTHER, HOME], peers=[LAPTOP], candidates=candidates_of(EXIT, OTHER))
BEHIND = evolve(WORLD, candidates=candidates_of(OTHER, EXIT))
ETCD = (ip_network("192.0.2.1/32"),)


def used(of: Snapshot = WORLD, name: str = "gcp-1") -> HostPlan:
    topology = build_topology(of)
    return through(filter_routes(peer_plan(topology, "laptop"), ETCD), topology, name, ETCD)


def test_an_exit_node_forwards_what_is_for_outside_in_its_own_name() -> None:
    plan = host_plan(build_topology(WORLD), "gcp-1")
    assert plan.is_exit_node
    assert plan.forwarding == {4}
    table = table_for(plan, "kilo0")
    assert table is not None
    assert [rule.text for rule in table.rules if rule.chain == "postrouting"] == [
        'iifname "kilo0" ip daddr 10.4.0.0/16 return',
        'iifname "kilo0" ip daddr 172.20.0.0/24 return',
        'iifname "kilo0" oifname != "kilo0" counter name exit_node masquerade',
    ]
    assert plan.clamps
    assert table.counters == ("exit_node",)
    assert plan.problems == ()


def test_nobody_else_has_such_rules_and_no_node_gets_a_default_route() -> None:
    for name in ("gcp-2", "home-1"):
        plan = host_plan(build_topology(WORLD), name)
        assert not plan.is_exit_node
        assert table_for(plan, "kilo0") is None
    for name in WORLD.nodes:
        plan = host_plan(build_topology(WORLD), name)
        networks = {*plan.routes, *(network for value in plan.peers.values() for network in value.allowed_ips)}
        assert all(network.prefixlen for network in networks)
        assert plan.exit_route is None


def test_an_exit_node_that_does_not_lead_is_none_and_says_what_to_do() -> None:
    plan = host_plan(build_topology(BEHIND), "gcp-1")
    assert not plan.is_exit_node
    (problem,) = plan.problems
    assert problem.text == (
        "node gcp-1 cannot be an exit node as long as gcp-2 leads its location: annotate gcp-2 with "
        "advertise-exit-node=true instead, "
        "or gcp-1 with leader=true"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gcp-1", None),
        (
            "home-1",
            "node home-1 does not advertise itself as an exit node; allow it with kgctl annotate home-1 "
            "advertise-exit-node=true",
        ),
        ("gcp-9", "the exit node gcp-9 is no node of the mesh; exit nodes are gcp-1"),
    ],
)
def test_who_can_be_used(name: str, says: str | None) -> None:
    assert unusable(build_topology(WORLD), name) == says


def test_the_peer_has_everything_behind_the_exit_node_and_its_routes_as_before() -> None:
    plan = used()
    allowed = {value.name: [str(network) for network in value.allowed_ips] for value in plan.peers.values()}
    assert allowed == {
        "gcp-1": ["0.0.0.0/0", "10.4.0.1/32", "10.4.0.2/32", "172.20.0.0/24", "::/0"],
        "home-1": ["10.4.0.3/32"],
    }
    assert plan.routes == peer_plan(build_topology(WORLD), "laptop").routes
    assert plan.exit_route == ExitRoute(families=frozenset({4}), bypass=ETCD)


@pytest.mark.parametrize("world", [BEHIND, evolve(WORLD, nodes={"home-1": HOME})])
def test_an_exit_node_that_is_none_any_more_lets_nothing_out_beside_it(world: Snapshot) -> None:
    plan = used(world)
    assert plan.exit_route == ExitRoute(families=frozenset({4}), bypass=ETCD)
    assert all(network.prefixlen for value in plan.peers.values() for network in value.allowed_ips)
    assert plan.problems[-1].text.endswith(
        "until then nothing leaves this machine but for the mesh, its own network, and programs that bind to its "
        "devices"
    )


def test_networks_of_an_exit_node_are_blocked_for_its_users_unless_they_are_offered() -> None:
    offering = evolve(EXIT, allowed_location_ips=(ip_network("10.1.0.50/32"),))
    world = snapshot([offering, OTHER, HOME], candidates=candidates_of(offering, OTHER))
    plan = host_plan(build_topology(world), "gcp-1")
    near = [ip_network(text) for text in ("10.1.0.0/24", "203.0.113.0/24", "10.1.0.254/32")]
    table = table_for(as_exit_node(plan, near, {4}), "kilo0")
    assert table is not None
    assert [rule.text for rule in table.rules if rule.chain == "forward"] == [
        'iifname "kilo0" ip daddr 10.4.0.0/16 return',
        'iifname "kilo0" ip daddr 172.20.0.0/24 return',
        'iifname "kilo0" ip daddr 10.1.0.50/32 return',
        'iifname "kilo0" oifname != "kilo0" ip daddr 10.1.0.0/24 counter name exit_node_blocked drop',
        'iifname "kilo0" oifname != "kilo0" ip daddr 10.1.0.254/32 counter name exit_node_blocked drop',
        'iifname "kilo0" oifname != "kilo0" ip daddr 169.254.0.0/16 counter name exit_node_blocked drop',
        'iifname "kilo0" oifname != "kilo0" ip6 daddr fe80::/10 counter name exit_node_blocked drop',
    ]
    other = host_plan(build_topology(world), "home-1")
    assert as_exit_node(other, near, {4}) is other


def test_an_exit_node_without_a_family_says_so_and_so_does_who_uses_it() -> None:
    six = [
        evolve(n, mesh_addresses=tuple(map(ip_address, pair(str(i + 1))))) for i, n in enumerate((EXIT, OTHER, HOME))
    ]
    subnets = (ip_network("10.4.0.0/16"), ip_network("fd00:4::/64"))
    world = snapshot(
        six, candidates=candidates_of(*six[:2]), subnets=subnets, peers=[peer("both", "10.9.0.2/32 fd09::2/128")]
    )
    topology = build_topology(world)
    plan = host_plan(topology, "gcp-1")
    *before, problem = as_exit_node(plan, (), {4}).problems
    assert "exit node gcp-1 has no default route in IPv6" in problem.text
    assert tuple(before) == plan.problems == as_exit_node(plan, (), {4, 6}).problems
    plan = through(peer_plan(topology, "both"), topology, "gcp-1", ())
    assert "the exit node gcp-1 has no IPv6 address of its own" in plan.problems[-1].text
    assert plan.exit_route is not None
    assert plan.exit_route.families == {4, 6}
    assert no_common_family(evolve(EXIT, endpoint=Endpoint.parse("vpn.example.org:1")), {4, 6}) is None
    assert no_common_family(evolve(EXIT, more_endpoints=(Endpoint.parse("[2001:db8::1]:1"),)), {4, 6}) is None


# --- nodes ------------------------------------------------------------------------------------------------------------

ALONE = node("alone", 4, "attic", (), "198.51.100.4", exit_node="gcp-1")
LEADER = node("lan-1", 5, "lan", "10.3.0.1/24", "203.0.113.5", exit_node="gcp-1", subnets="172.21.0.0/24")
MEMBER = node("lan-2", 6, "lan", "10.3.0.2/24", location_ips="10.3.0.50/32", exit_node="gcp-1")
FAR = node("lan-3", 7, "lan", "10.3.1.3/24", exit_node="gcp-1")
NODES = (EXIT, OTHER, HOME, ALONE, LEADER, MEMBER, FAR)


def with_nodes(*nodes: Node, **rest: Any) -> Snapshot:
    every = {**{one.name: one for one in NODES}, **{one.name: one for one in nodes}}
    wanted: dict[str, Any] = {"candidates": candidates_of(EXIT, OTHER, LEADER, MEMBER), **rest}
    return snapshot(every.values(), **wanted)


def left(world: Snapshot, name: str, **rest: Any) -> HostPlan:
    topology = build_topology(world)
    return with_exit_node(filter_routes(host_plan(topology, name), ETCD), topology, bypass=ETCD, **rest)


def beyond(plan: HostPlan) -> list[str]:
    """The peers that have anything for anywhere."""
    return [value.name for value in plan.peers.values() if any(not network.prefixlen for network in value.allowed_ips)]


@pytest.mark.parametrize("name", ["alone", "lan-1"])
def test_a_leader_or_a_segment_of_one_leaves_by_the_tunnel(name: str) -> None:
    plan = left(with_nodes(), name, sources=[ip_address("198.51.100.4")])
    assert beyond(plan) == ["gcp-1"]
    assert plan.exit_route is not None
    assert (plan.exit_route.families, plan.exit_route.by) == (frozenset({4}), ())
    assert plan.exit_route.sources == (ip_address("198.51.100.4"),)
    assert all(network.prefixlen for network in plan.routes)
    assert plan.problems == ()


def test_what_is_near_bypasses_the_exit_node() -> None:
    plan = left(with_nodes(), "lan-1")
    assert plan.exit_route is not None
    assert [str(network) for network in plan.exit_route.bypass] == [
        "10.3.0.1/32", "10.3.0.2/32", "10.3.0.50/32", "10.3.1.3/32", "169.254.0.0/16", "172.21.0.0/24", "192.0.2.1/32",
        "224.0.0.0/4", "255.255.255.255/32", "fe80::/10",
    ]  # fmt: skip
    # In a full mesh the label still says who is near; without one nothing does.
    full = left(with_nodes(granularity=Granularity.FULL), "lan-1")
    assert full.exit_route is not None
    assert {"10.3.0.2/32", "10.3.1.3/32"} <= set(map(str, full.exit_route.bypass))
    nowhere = [evolve(one, location=DEFAULT_LOCATION) for one in (LEADER, MEMBER)]
    strangers = left(with_nodes(*nowhere, granularity=Granularity.FULL), "lan-1")
    assert strangers.exit_route is not None
    assert "10.3.0.2/32" not in set(map(str, strangers.exit_route.bypass))


def test_a_member_leaves_by_its_leader_as_its_other_packets_do() -> None:
    plan = left(with_nodes(), "lan-2")
    assert plan.exit_route is not None
    assert [(route.via, str(route.gateway), str(route.source)) for route in plan.exit_route.by] == [
        (Via.UNDERLAY, "10.3.0.1", "10.4.0.6")
    ]
    assert (beyond(plan), plan.problems) == ([], ())
    far = left(with_nodes(), "lan-3")
    assert far.exit_route is not None
    assert [(route.via, str(route.gateway)) for route in far.exit_route.by] == [(Via.IPIP, "10.3.0.1")]
    assert "default via 10.3.0.1 ipip ipv4" in render(far)
    tunneled = left(with_nodes(evolve(MEMBER, encapsulate=Encapsulate.WIREGUARD)), "lan-2")
    assert (beyond(tunneled), tunneled.exit_route is not None and tunneled.exit_route.by) == (["lan-1"], ())


def test_a_member_becomes_the_leader_and_back() -> None:
    wanted = evolve(MEMBER, leader_wanted=True)
    led = with_nodes(wanted, candidates=candidates_of(EXIT, OTHER, wanted, LEADER))
    assert beyond(left(led, "lan-2")) == ["gcp-1"]
    back = left(led, "lan-1")
    assert back.exit_route is not None
    assert [str(route.gateway) for route in back.exit_route.by] == ["10.3.0.2"]


@pytest.mark.parametrize(
    ("nodes", "name", "says"),
    [
        ((evolve(LEADER, exit_node=""),), "lan-2", "kgctl annotate lan-1 exit-node=gcp-1 too"),
        ((evolve(LEADER, exit_node="home-1"),), "lan-2", "which leads it and does not use gcp-1 itself"),
        (
            (evolve(ALONE, exit_node="nobody"),),
            "alone",
            "the exit node nobody is no node of the mesh; exit nodes are gcp-1",
        ),
        ((evolve(ALONE, exit_node="home-1"),), "alone", "kgctl annotate home-1 advertise-exit-node=true"),
        ((evolve(ALONE, exit_node="alone"),), "alone", "cannot be its own exit node"),
        ((evolve(ALONE, advertises_exit_node=True),), "alone", "cannot use one at once"),
        ((evolve(EXIT, exit_node="home-1"),), "alone", "cannot be an exit node as long as it leaves by home-1 itself"),
        ((evolve(OTHER, exit_node="gcp-1"),), "gcp-2", "set --encapsulate wireguard on one of the two"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence_and_nothing_leaves(
    nodes: tuple[Node, ...], name: str, says: str
) -> None:
    world = with_nodes(*nodes)
    plan = left(world, name)
    assert says in (trouble_of(build_topology(world), name) or "")
    assert any(
        says in problem.text
        and f"until then nothing leaves {name} but for the mesh, what is near it, answers" in problem.text
        for problem in plan.problems
    )
    assert plan.exit_route is not None
    assert plan.exit_route.families == frozenset()
    assert beyond(plan) == []


def test_an_exit_node_in_ones_own_location_is_used_through_a_tunnel_only() -> None:
    tunneled = evolve(OTHER, exit_node="gcp-1", encapsulate=Encapsulate.WIREGUARD)
    assert beyond(left(with_nodes(tunneled), "gcp-2")) == ["gcp-1"]
    cross = with_nodes(evolve(OTHER, exit_node="gcp-1"), granularity=Granularity.CROSS)
    assert "set --encapsulate wireguard" in (trouble_of(build_topology(cross), "gcp-2") or "")
    full = with_nodes(evolve(OTHER, exit_node="gcp-1"), granularity=Granularity.FULL)
    assert beyond(left(full, "gcp-2")) == ["gcp-1"]


def test_an_exit_node_that_leaves_by_another_offers_nothing() -> None:
    world = with_nodes(evolve(EXIT, exit_node="home-1"), evolve(HOME, advertises_exit_node=True))
    plan = host_plan(build_topology(world), "gcp-1")
    assert not plan.is_exit_node
    assert "cannot be an exit node as long as it leaves by home-1" in plan.problems[0].text
    assert trouble_of(build_topology(world), "gcp-1") == (
        "node gcp-1 advertises itself as an exit node and cannot use one at once: kgctl annotate gcp-1 "
        "advertise-exit-node-, or exit-node-"
    )


def test_while_a_name_is_not_resolved_the_kernel_is_left_alone() -> None:
    plan = left(with_nodes(), "alone", unresolved=["etcd.example.org"])
    assert plan.exit_route is not None
    assert plan.exit_route.held
    assert "the DNS name etcd.example.org is not resolved" in plan.problems[0].text


def test_who_names_no_exit_node_has_the_very_same_plan() -> None:
    topology = build_topology(with_nodes(peers=[PHONE]))
    plan = host_plan(topology, "home-1")
    assert with_exit_node(plan, topology, bypass=ETCD) is plan
