"""Small worlds and a way to look at them: the values that the topology's tests start from."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from attrs import evolve

from kilo_etcd.model import Candidate, Encapsulate, Endpoint, Granularity, Node, Peer, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.render import render
from kilo_etcd.topology.segments import build_topology

MESH = ip_network("10.4.0.0/16")
MESH6 = ip_network("fd00:4::/64")


def node(
    name: str,
    number: int,
    location: str = "",
    internal: str | tuple[str, ...] = (),
    endpoint: str | None = None,
    subnets: str = "",
    location_ips: str = "",
    mesh: tuple[str, ...] | None = None,
    also: str | None = None,
    **rest: Any,
) -> Node:
    """Node `number` has mesh address 10.4.0.number and was registered at revision `number`."""
    internal = (internal,) if isinstance(internal, str) else internal
    return Node(
        name=name,
        public_key=f"key-{name}",
        location=location,
        endpoint=None if endpoint is None else Endpoint.parse(endpoint, 51820),
        more_endpoints=() if also is None else (Endpoint.parse(also, 51820),),
        internal_ips=tuple(ip_interface(text) for text in internal),
        mesh_addresses=tuple(ip_address(text) for text in mesh or (f"10.4.0.{number}",)),
        subnets=tuple(ip_network(text) for text in subnets.split()),
        allowed_location_ips=tuple(ip_network(text) for text in location_ips.split()),
        **{"registered_revision": number, **rest},
    )


def peer(name: str, allowed: str, **rest: Any) -> Peer:
    return Peer(
        name=name, public_key=f"key-{name}", allowed_ips=tuple(ip_network(text) for text in allowed.split()), **rest
    )


def candidates_of(*nodes: Node) -> dict[str, tuple[Candidate, ...]]:
    """Candidacies of nodes, entered in this order."""
    result: dict[str, tuple[Candidate, ...]] = {}
    for revision, node in enumerate(nodes, 100):
        offer = Candidate(node=node.name, rank=node.candidate_class, create_revision=revision)
        result[node.location] = (*result.get(node.location, ()), offer)
    return result


def snapshot(
    nodes: Iterable[Node], granularity: Granularity = Granularity.LOCATION, peers: Iterable[Peer] = (), **rest: Any
) -> Snapshot:
    return Snapshot(
        granularity=granularity,
        nodes={node.name: node for node in nodes},
        peers={peer.name: peer for peer in peers},
        **{"revision": 7, "subnets": (MESH,), **rest},
    )


def pair(number: str) -> tuple[str, str]:
    """Mesh addresses in both families."""
    return f"10.4.0.{number}", f"fd00:4::{number}"


def plans(world: Snapshot) -> dict[str, HostPlan]:
    topology = build_topology(world)
    return {name: host_plan(topology, name) for name in world.nodes}


def seen_by_all(world: Snapshot) -> str:
    """What each host in turn sees."""
    return "\n".join(f"== {name}\n{render(plan)}" for name, plan in sorted(plans(world).items()))


SIX = (
    node("a1", 1, "gcp", "10.0.0.1/24", "203.0.113.1"),
    node("a2", 2, "gcp", "10.0.0.2/24", subnets="172.20.2.0/24"),
    node("a3", 3, "gcp", "10.0.1.3/24"),
    node("b1", 4, "", "192.168.0.1/24", "203.0.113.4", location_ips="192.168.0.0/24"),
    node("b2", 5, "", "192.168.0.2/24"),
    node("c1", 6, "", (), "198.51.100.6", persistent_keepalive=25),
)
"""A cloud of three, of which a3 is on another subnet; a site of two with a printer; and a laptop at large."""


def _tunneled(nodes: Iterable[Node], *names: str) -> tuple[Node, ...]:
    return tuple(evolve(n, encapsulate=Encapsulate.WIREGUARD) if n.name in names else n for n in nodes)


PHONE = peer("phone", "10.5.0.1/32", persistent_keepalive=5)

WORLDS = {
    "location": snapshot(SIX, peers=[PHONE]),
    "full": snapshot(SIX, Granularity.FULL, [PHONE]),
    "cross": snapshot(SIX, Granularity.CROSS, [PHONE]),
    "mixed": snapshot(
        [evolve(n, location=n.name, endpoint=n.endpoint or Endpoint.parse("192.0.2.5:1")) for n in SIX[3:]]
        + list(SIX[:3])
    ),
    "wireguard": snapshot(_tunneled(SIX, "a3")),
    "wireguard-leader": snapshot(_tunneled(SIX, "a1"), peers=[PHONE]),
    "ipip-always": snapshot([evolve(n, encapsulate=Encapsulate.ALWAYS) for n in SIX[:3]]),
    "ipip-never": snapshot([evolve(n, encapsulate=Encapsulate.NEVER) for n in SIX[:3]]),
    "dual-stack": snapshot(
        [
            node("a1", 1, "a", ("10.0.0.1/24", "fd00:a::1/64"), "203.0.113.1", also="[2001:db8::a1]", mesh=pair("1")),
            node("a2", 2, "a", ("10.0.0.2/24", "fd00:a::2/64"), mesh=("10.4.0.2", "fd00:4::2"), subnets="fd00:c2::/64"),
            node("a3", 3, "a", "10.0.0.3/24", mesh=("10.4.0.3", "fd00:4::3")),
            node("b1", 4, "b", "fd00:b::1/64", "[2001:db8::b1]", mesh=("10.4.0.4", "fd00:4::4")),
            node("b2", 5, "b", "fd00:b::2/64", mesh=("10.4.0.5", "fd00:4::5")),
            node("c1", 6, "c", "10.3.0.1/24", "203.0.113.6", mesh=("10.4.0.6", "fd00:4::6")),
        ],
        subnets=(MESH, MESH6),
    ),
}
"""Every world has its picture, seen from each host in turn, in `worlds/<name>.txt`."""
