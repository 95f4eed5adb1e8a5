"""All steps from a topology to the plan that goes to the kernel, for a node and for a peer."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

import pytest
from attrs import evolve

from kilo_etcd.model import Endpoint, InternalIPs
from kilo_etcd.model.hostplan import HostPlan, RoutePlan, Via
from kilo_etcd.planning.encryption import Outside
from kilo_etcd.planning.pipeline import (
    EncryptionInputs,
    PeerOptions,
    Surroundings,
    from_own_addresses,
    host_plans,
    peer_plans,
)
from kilo_etcd.topology.segments import UnknownNode, build_topology
from topology_worlds import candidates_of, node, peer, snapshot

EXIT = node("gcp-1", 1, "gcp", "10.1.0.1/24", "203.0.113.1", subnets="172.20.0.0/24", advertises_exit_node=True)
OTHER = node("gcp-2", 2, "gcp", "10.1.0.2/24", "203.0.113.2")
HOME = evolve(node("home-1", 3, "home", "10.2.0.1/24", "203.0.113.3"), exit_node="gcp-1")
NAMED = evolve(EXIT, endpoint=Endpoint("gcp-1.example.com", 51820))
LAPTOP = peer("laptop", "10.9.0.2/32")
WORLD = snapshot([NAMED, OTHER, HOME], peers=[LAPTOP], candidates=candidates_of(EXIT, OTHER))
ETCD = (ip_network("192.0.2.1/32"),)
TABLE = {"gcp-1.example.com": (ip_address("203.0.113.1"),)}
KNOWN = Surroundings(table=TABLE, etcd=ETCD, families=(4,), sources=(ip_address("10.2.0.1"),))


def test_each_step_of_a_nodes_plan() -> None:
    plans = host_plans(build_topology(WORLD), "home-1", KNOWN)
    key = NAMED.public_key
    assert str(plans.raw.peers[key].endpoint) == "gcp-1.example.com:51820"
    assert str(plans.filtered.peers[key].endpoint) == "203.0.113.1:51820"
    assert plans.filtered.exit_route is None
    exit_route = plans.final.exit_route
    assert exit_route is not None
    assert set(ETCD) <= set(exit_route.bypass)
    assert not exit_route.held


def test_hosts_that_join_two_networks_have_tcp_fit_into_the_narrower_one() -> None:
    """gcp-1 leads and gcp-3 has containers; home-1 is alone and forwards from peer to peer at most."""
    behind = evolve(OTHER, name="gcp-3", subnets=(ip_network("172.20.1.0/24"),))
    topology = build_topology(snapshot([EXIT, OTHER, behind, HOME], peers=[LAPTOP]))
    clamping = {name: host_plans(topology, name, KNOWN).final.clamps for name in topology.snapshot.nodes}
    assert clamping == {"gcp-1": True, "gcp-2": False, "gcp-3": True, "home-1": False}


def test_an_exit_route_waits_for_names() -> None:
    topology = build_topology(WORLD)
    for unknown in (evolve(KNOWN, table={}), evolve(KNOWN, etcd_unresolved=("etcd.example.com",))):
        exit_route = host_plans(topology, "home-1", unknown).final.exit_route
        assert exit_route is not None
        assert exit_route.held


def test_what_would_cut_the_host_off_from_etcd_or_its_own_network_is_not_routed() -> None:
    topology = build_topology(WORLD)
    offered = ip_network("172.20.0.0/24")
    assert offered in host_plans(topology, "home-1", KNOWN).final.routes
    for near in (
        evolve(KNOWN, etcd=(*ETCD, ip_network("172.20.0.9/32"))),
        evolve(KNOWN, underlay=(ip_network("172.20.0.0/16"),)),
    ):
        plans = host_plans(topology, "home-1", near)
        assert offered not in plans.final.routes
        assert any(problem.subject == str(offered) for problem in plans.final.problems)


def test_with_a_predecessor_the_outcome_is_the_same() -> None:
    before = host_plans(build_topology(WORLD), "home-1", KNOWN)
    moved = evolve(WORLD, nodes={**WORLD.nodes, "gcp-2": evolve(OTHER, internal_ips=(ip_interface("10.1.0.9/24"),))})
    topology = build_topology(moved, build_topology(WORLD))
    known = evolve(
        KNOWN,
        underlay=(ip_network("10.2.0.0/24"),),
        encryption=EncryptionInputs(outside=Outside()),
    )
    for world in (topology, build_topology(evolve(moved, internal_ips=InternalIPs.ENCRYPTED), topology)):
        assert host_plans(world, "home-1", known, before) == host_plans(world, "home-1", known)


def test_a_node_that_is_not_in_the_mesh_has_no_plan() -> None:
    with pytest.raises(UnknownNode, match="elsewhere"):
        host_plans(build_topology(WORLD), "elsewhere", KNOWN)


def test_a_peers_plan_goes_through_the_exit_node_only_if_it_asks_for_that() -> None:
    topology = build_topology(WORLD)
    options = PeerOptions(listen_port=51820, persistent_keepalive=10)
    plans = peer_plans(topology, "laptop", options, KNOWN)
    assert plans.final is plans.filtered
    assert plans.final.peers[NAMED.public_key].persistent_keepalive == 10
    through = peer_plans(topology, "laptop", evolve(options, exit_node="gcp-1"), KNOWN)
    assert through.filtered == plans.filtered
    assert through.final.exit_route is not None
    assert not through.final.exit_route.held
    held = peer_plans(topology, "laptop", evolve(options, exit_node="gcp-1"), evolve(KNOWN, table={})).final.exit_route
    assert held is not None
    assert held.held


def test_a_route_is_from_an_address_that_the_host_has() -> None:
    own = evolve(HOME, internal_ips=(ip_interface("10.1.0.5/24"),), mesh_addresses=(ip_address("10.4.0.1"),))
    four, six = ip_network("10.2.0.7/32"), ip_network("fd00:2::7/128")
    forced = ip_address("10.1.0.5")
    routes = {
        four: RoutePlan(destination=four, via=Via.TUNNEL, source=forced),
        six: RoutePlan(destination=six, via=Via.TUNNEL, source=ip_address("fd00:4::1")),
    }
    plan = HostPlan(node="home-1", routes=routes)
    assert from_own_addresses(plan, own, {forced, ip_address("10.1.0.6")}) is plan
    assert from_own_addresses(plan, own, ()) is plan, "not known yet"
    changed = from_own_addresses(plan, own, {ip_address("10.1.0.6")})
    assert changed.routes == {four: evolve(routes[four], source=ip_address("10.4.0.1")), six: routes[six]}
    lone = evolve(own, mesh_addresses=())
    assert from_own_addresses(plan, lone, {ip_address("10.1.0.6")}).routes == {six: routes[six]}
