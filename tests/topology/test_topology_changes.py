"""One change in a mesh of forty, for which the quick ways are taken that small worlds never need."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from attrs import evolve

from kilo_etcd.model import Endpoint, Granularity, Node, Snapshot
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.route_filter import filter_routes
from kilo_etcd.topology.segments import build_topology
from topology_worlds import node, peer, snapshot

NODES = [
    node(f"n{n}", n, f"l{n % 20}", f"192.168.0.{n}/24", f"203.0.113.{n}", subnets=f"172.20.{n}.0/24")
    for n in range(1, 41)
]
PROTECTED = [ip_network("198.51.100.7/32")]


def changed(number: int, **values: Any) -> Callable[[Snapshot], Snapshot]:
    def change(world: Snapshot) -> Snapshot:
        old: Node = world.nodes[f"n{number}"]
        return evolve(world, nodes={**world.nodes, old.name: evolve(old, **values)})

    return change


def nets(*texts: str) -> tuple[object, ...]:
    return tuple(ip_network(text) for text in texts)


STEPS: dict[str, Callable[[Snapshot], Snapshot]] = {
    "a network more": changed(7, subnets=nets("172.20.7.0/24", "172.30.0.0/24")),
    "a network less": changed(7, subnets=()),
    "a network twice": changed(7, subnets=nets("172.20.7.0/24", "172.20.7.0/25")),
    "a network of somebody younger": changed(7, subnets=nets("172.20.9.0/25")),
    "a network of somebody older": changed(7, subnets=nets("172.20.2.128/25")),
    "a network that covers many": changed(40, subnets=nets("172.20.0.0/16")),
    "what is each host's own": changed(7, subnets=nets("169.254.0.0/16")),
    "a default route": changed(7, subnets=nets("0.0.0.0/0")),
    "the mesh": changed(7, subnets=nets("10.0.0.0/8")),
    "a protected network": changed(7, subnets=nets("198.51.100.0/24")),
    "an endpoint in its own network": changed(7, endpoint=Endpoint(ip_address("172.20.7.1"), 1)),
    "an endpoint in another's network": changed(7, endpoint=Endpoint(ip_address("172.20.30.1"), 1)),
    "an address that a peer sits on": changed(7, mesh_addresses=(ip_address("10.4.200.1"),)),
    "another label": changed(7, location="l1"),
    "an own label": changed(7, location="alone"),
    "no internal IP": changed(7, internal_ips=()),
    "location IPs": changed(7, allowed_location_ips=nets("172.31.0.0/24")),
    "the host itself": changed(5, subnets=(), persistent_keepalive=9),
    "the host's neighbour": changed(25, mesh_addresses=(ip_address("10.4.0.99"),)),
    "the leader on record": lambda world: evolve(world, leaders={"l5": ("n25",), "l7": ("n27",)}),
    "the peer gone": lambda world: evolve(world, peers={}),
    "the peer's networks": lambda world: evolve(world, peers={"p": peer("p", "10.9.0.0/24 172.20.3.0/24")}),
    "a key taken": changed(7, public_key="key-p"),
}


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("inside_mesh", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_there_and_back(step: str, inside_mesh: bool, granularity: Granularity) -> None:
    outside = peer("p", "10.4.200.0/24" if inside_mesh else "10.99.0.0/24")
    world = snapshot(NODES, granularity, [outside])
    topology = build_topology(world)
    plan = host_plan(topology, "n5")
    filtered = filter_routes(plan, PROTECTED)
    seen = [filtered]
    for after in (STEPS[step](world), world):
        topology = build_topology(after, topology)
        plan = host_plan(topology, "n5", filtered)
        filtered = filter_routes(plan, PROTECTED, filtered)
        fresh = build_topology(after)
        assert topology == fresh
        assert plan == host_plan(fresh, "n5")
        assert filtered == filter_routes(host_plan(fresh, "n5"), PROTECTED)
        seen.append(filtered)
    assert seen[0] == seen[2]
