"""A way out: who can be a gateway, what that does to its plan, and to the plan of a peer that uses it."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from attrs import evolve
from topology_worlds import node, peer, snapshot, standing

from kilo_etcd.kernel.firewall import table_for
from kilo_etcd.topology import HostPlan, WayOut, build_topology, host_plan, peer_plan
from kilo_etcd.topology.guard import guard
from kilo_etcd.topology.wayout import through, unusable

EXIT = node("gcp-1", 1, "gcp", "10.1.0.1/24", "203.0.113.1", subnets="172.20.0.0/24", gateway=True)
OTHER = node("gcp-2", 2, "gcp", "10.1.0.2/24", "203.0.113.2")
HOME = node("home-1", 3, "home", "10.2.0.1/24", "203.0.113.3")
LAPTOP = peer("laptop", "10.9.0.2/32")
WORLD = snapshot([EXIT, OTHER, HOME], peers=[LAPTOP], candidates=standing(EXIT, OTHER))
BEHIND = evolve(WORLD, candidates=standing(OTHER, EXIT))
ETCD = (ip_network("192.0.2.1/32"),)


def used(of: object = WORLD, name: str = "gcp-1") -> HostPlan:
    topology = build_topology(of)  # type: ignore[arg-type]
    return through(guard(peer_plan(topology, "laptop"), ETCD), topology, name, ETCD)


def test_a_gateway_forwards_what_is_for_outside_in_its_own_name() -> None:
    plan = host_plan(build_topology(WORLD), "gcp-1")
    assert plan.gateway
    assert plan.forwarding == {4}
    table = table_for(plan, "kilo0")
    assert table is not None
    assert [rule.text for rule in table.rules] == [
        'iifname "kilo0" ip daddr 10.4.0.0/16 return',
        'iifname "kilo0" ip daddr 172.20.0.0/24 return',
        'iifname "kilo0" oifname != "kilo0" counter name way_out masquerade',
    ]
    assert table.counters == ("way_out",)
    assert plan.problems == ()


def test_nobody_else_has_such_rules_and_no_node_gets_a_default_route() -> None:
    for name in ("gcp-2", "home-1"):
        plan = host_plan(build_topology(WORLD), name)
        assert not plan.gateway
        assert table_for(plan, "kilo0") is None
    for name in WORLD.nodes:
        plan = host_plan(build_topology(WORLD), name)
        networks = {*plan.routes, *(network for one in plan.peers.values() for network in one.allowed_ips)}
        assert all(network.prefixlen for network in networks)
        assert plan.way_out is None


def test_a_gateway_that_does_not_lead_is_none_and_says_what_to_do() -> None:
    plan = host_plan(build_topology(BEHIND), "gcp-1")
    assert not plan.gateway
    (problem,) = plan.problems
    assert problem.text == (
        "node gcp-1 cannot be a gateway as long as gcp-2 leads its location: annotate gcp-2 with gateway=true instead, "
        "or gcp-1 with leader=true"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gcp-1", None),
        ("home-1", "node home-1 offers no way out; allow it with kgctl annotate home-1 gateway=true"),
        ("gcp-9", "the gateway gcp-9 is no node of the mesh; gateways are gcp-1"),
    ],
)
def test_who_can_be_used(name: str, says: str | None) -> None:
    assert unusable(build_topology(WORLD), name) == says


def test_the_peer_has_everything_behind_the_gateway_and_its_routes_as_before() -> None:
    plan = used()
    allowed = {one.name: [str(network) for network in one.allowed_ips] for one in plan.peers.values()}
    assert allowed == {
        "gcp-1": ["0.0.0.0/0", "10.4.0.1/32", "10.4.0.2/32", "172.20.0.0/24", "::/0"],
        "home-1": ["10.4.0.3/32"],
    }
    assert plan.routes == peer_plan(build_topology(WORLD), "laptop").routes
    assert plan.way_out == WayOut(families=frozenset({4}), outside=ETCD)


@pytest.mark.parametrize("world", [BEHIND, evolve(WORLD, nodes={"home-1": HOME})])
def test_a_gateway_that_is_none_any_more_lets_nothing_out_beside_it(world: object) -> None:
    plan = used(world)
    assert plan.way_out == WayOut(families=frozenset({4}), outside=ETCD)
    assert all(network.prefixlen for one in plan.peers.values() for network in one.allowed_ips)
    assert plan.problems[-1].text.endswith(
        "until then nothing leaves this machine but for the mesh and its own network"
    )
