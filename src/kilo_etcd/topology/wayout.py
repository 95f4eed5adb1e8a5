"""A way out: a node that a peer uses as its gateway to the internet (decision 0013). Pure.

The node offers it (annotation `gateway`), the peer asks for it. A gateway must be its segment's leader, or a segment of
its own: other nodes are reached through their leader, whose WireGuard would have to carry the default route.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network

from attrs import evolve

from kilo_etcd.model import IPNetwork
from kilo_etcd.topology.claims import network_key
from kilo_etcd.topology.hostplan import HostPlan, PeerPlan, Problem, WayOut
from kilo_etcd.topology.segments import Topology

ANYWHERE: tuple[IPNetwork, ...] = (ip_network("0.0.0.0/0"), ip_network("::/0"))


def unfit(topology: Topology, name: str) -> str | None:
    """Why the node, which is in the mesh, cannot be a gateway, as a sentence; None: it can."""
    leader = topology.segment_of(name).leader.name
    if leader == name:
        return None
    return (
        f"node {name} cannot be a gateway as long as {leader} leads its location: annotate {leader} with gateway=true "
        f"instead, or {name} with leader=true"
    )


def unusable(topology: Topology, name: str) -> str | None:
    """Why nobody can use the node as gateway, as a sentence; None: one can."""
    node = topology.snapshot.nodes.get(name)
    if node is None:
        offering = sorted(other.name for other in topology.snapshot.nodes.values() if other.gateway)
        there = f"gateways are {', '.join(offering)}" if offering else "kgctl node list lists those that are"
        return f"the gateway {name} is no node of the mesh; {there}"
    if not node.gateway:
        return f"node {name} offers no way out; allow it with kgctl annotate {name} gateway=true"
    return unfit(topology, name)


def inside(topology: Topology, name: str) -> tuple[IPNetwork, ...]:
    """The networks near gateway `name` that answer the mesh's own addresses."""
    near = (network for networks in topology.segment_of(name).subnets.values() for network in networks)
    return tuple(sorted({*topology.snapshot.subnets, *near}, key=network_key))


def by_gateway(peer: PeerPlan) -> PeerPlan:
    """The peer with everything behind it that is behind nobody else."""
    return evolve(peer, allowed_ips=tuple(sorted({*peer.allowed_ips, *ANYWHERE}, key=network_key)))


def through(plan: HostPlan, topology: Topology, gateway: str, outside: Iterable[IPNetwork]) -> HostPlan:
    """`plan`, guarded already, with its default route into the tunnel and `gateway` at the other end.

    `outside`: what is reached as before. Where the gateway cannot be used the default route stays in the tunnel, so
    that nothing leaves beside it, and the plan says why.
    """
    problems = plan.problems
    peers = dict(plan.peers)
    trouble = unusable(topology, gateway)
    if trouble is None:
        key = topology.snapshot.nodes[gateway].public_key
        peers[key] = by_gateway(peers[key])
    else:
        text = f"{trouble}; until then nothing leaves this machine but for the mesh and its own network"
        problems = (*problems, Problem(subject=gateway, text=text))
    way_out = WayOut(
        families=frozenset(address.version for address in plan.addresses),
        outside=tuple(sorted(set(outside), key=network_key)),
    )
    return evolve(plan, peers=peers, way_out=way_out, problems=problems)
