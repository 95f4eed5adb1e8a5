"""To whom an agent sends packets when an operator asks whether they arrive. Pure.

An internal IP that the mesh routes is tried beside the mesh address. In a small mesh to everybody. In a large one a
leader tries the leaders of other locations, and a member a few nodes elsewhere, in an order of each host's own, so
that together they cover the mesh and none of them floods it.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable

from kilo_etcd.agent.probing.probe_assignment import order_by_chance
from kilo_etcd.model import IPAddress, Node
from kilo_etcd.model.hostplan import HostPlan, RoutePlan
from kilo_etcd.planning.walk import longest_match
from kilo_etcd.topology.places import is_offered, own_endpoints
from kilo_etcd.topology.segments import Topology, UnknownNode, host_network

FEW = 4
"""Nodes that a member tries in a mesh that is larger than what was asked for: half of them leaders, by whom it can be
told whose leader loses what does not arrive."""


def nodes_to_try(topology: Topology, name: str, most: int) -> tuple[Node, ...]:
    """The nodes, at most `most` of them, that node `name` sends packets to."""
    own = topology.snapshot.nodes.get(name)
    try:
        segment = topology.segment_of(name)
    except UnknownNode:
        return ()
    if own is None or most <= 0:
        return ()
    others = [node for node in topology.snapshot.nodes.values() if node.name != name and node.mesh_addresses]
    if len(others) > most:
        far = [node for node in others if topology.segment_of(node.name) is not segment]
        leaders = [node for node in far if topology.segment_of(node.name).leader is node]
        living = topology.snapshot.candidate_names()
        if segment.leader.name == name:
            others = _sample(name, living, leaders if len(leaders) >= most else far, most)
        else:
            some_leaders = _sample(name, living, leaders, FEW // 2)
            others = list(dict.fromkeys((*some_leaders, *_sample(name, living, far, FEW // 2))))
    return tuple(others)


def addresses_to_try(
    topology: Topology, name: str, plan: HostPlan, nodes: Iterable[Node], *, endpoints: bool = False
) -> dict[IPAddress, RoutePlan | None]:
    """The addresses of these nodes at which packets of node `name` may arrive: mesh addresses in the families that it
    has itself, and internal IPs that its plan has a route to, with that route; with `endpoints` also the nodes' own
    endpoints that `encrypted` leads into the tunnels."""
    own = topology.snapshot.nodes.get(name)
    if own is None:
        return {}
    versions = {address.version for address in own.mesh_addresses}
    routes = plan.routes if plan.encryption is None else {**plan.routes, **plan.encryption.send}
    of_peers = {network for peer in topology.peers.values() for network in peer.allowed_ips}
    result: dict[IPAddress, RoutePlan | None] = {}
    for node in nodes:
        if node.name == name:
            continue
        result.update((address, None) for address in node.mesh_addresses if address.version in versions)
        for ip in node.internal_ips:
            # One that two nodes have has no route of its own, and one that a peer has leads to the peer.
            network = host_network(ip.ip)
            if network not in of_peers and (route := routes.get(network)) is not None:
                result[ip.ip] = route
        if endpoints and plan.encryption is not None:
            for address in own_endpoints(node):
                if (route := plan.encryption.send.get(host_network(address))) is not None:
                    result[address] = route
    return result


def offered_to_try(
    topology: Topology, plan: HostPlan, addresses: Iterable[IPAddress]
) -> dict[IPAddress, RoutePlan | None]:  # fmt: skip
    """Those of some addresses that are in offered networks to which a plan has a route, with that route."""
    routes = {
        address: longest_match(plan.routes.items(), address) for address in addresses if is_offered(topology, address)
    }
    return {address: route for address, route in routes.items() if route is not None}


def _sample(name: str, living: Container[str], nodes: Iterable[Node], number: int) -> list[Node]:
    """So many of the nodes, those that are `living` first."""
    return heapq.nsmallest(number, nodes, key=lambda node: (node.name not in living, order_by_chance(name, node)))
