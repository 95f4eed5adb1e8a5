"""A way out: a node that peers and other nodes use as their gateway to the internet (decision 0013). Pure.

The node offers it (annotation `gateway`), whoever uses it asks for it: a peer by a flag, a node by its annotation
`way-out`. A gateway must be its segment's leader, or a segment of its own: other nodes are reached through their
leader, whose WireGuard would have to carry the default route for somebody else.

A node that uses one does so through the tunnel to it, as a leader or a segment of its own; as a member, through its
leader, if that uses the same gateway. What cannot be had so is refused and said, and then nothing leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from ipaddress import ip_network

from attrs import evolve, frozen

from kilo_etcd.model import DEFAULT_LOCATION, Granularity, IPAddress, IPNetwork, Node, is_public
from kilo_etcd.topology.claims import network_key
from kilo_etcd.topology.families import same_site
from kilo_etcd.topology.hostplan import HostPlan, PeerPlan, Problem, RoutePlan, Via, WayOut
from kilo_etcd.topology.segments import Topology, host_network
from kilo_etcd.topology.ways import bonded, hop

ANYWHERE: tuple[IPNetwork, ...] = (ip_network("0.0.0.0/0"), ip_network("::/0"))

LINK_LOCAL: tuple[IPNetwork, ...] = (ip_network("169.254.0.0/16"), ip_network("fe80::/10"))
"""Of one link alone (RFC 3927, RFC 4291); clouds answer a host's questions about itself there."""

STAYS_OUTSIDE = "the mesh, what is near it, answers to callers, and programs that bind to its own addresses or devices"
"""What leaves a node otherwise than by its exit node, as the end of a sentence."""
STAYS_OUTSIDE_A_PEER = "the mesh, its own network, and programs that bind to its devices"
"""The same of a machine that is a peer."""

NOTHING_BACK = "nothing comes back from the gateway "
"""How the sentence on an exit node that does not answer begins; its name follows."""

ON_THE_LINK: tuple[IPNetwork, ...] = (*LINK_LOCAL, ip_network("224.0.0.0/4"), ip_network("255.255.255.255/32"))
"""What a host says to its neighbours whatever its routes are, DHCP included. IPv6's multicast has routes of its own."""


def unfit(topology: Topology, name: str) -> str | None:
    """Why the node, which is in the mesh, cannot be a gateway, as a sentence; None: it can."""
    if there := topology.snapshot.nodes[name].way_out:
        return (
            f"node {name} cannot be a gateway as long as it leaves by {there} itself: take that back with kgctl "
            f"annotate {name} way-out-"
        )
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
    segment = topology.segment_of(name)
    near = (network for networks in segment.subnets.values() for network in networks)
    return tuple(sorted({*topology.snapshot.subnets, *near, *segment.internal}, key=network_key))


def by_gateway(peer: PeerPlan) -> PeerPlan:
    """The peer with everything behind it that is behind nobody else."""
    return evolve(peer, allowed_ips=tuple(sorted({*peer.allowed_ips, *ANYWHERE}, key=network_key)))


def speechless(node: Node, families: Iterable[int]) -> str | None:
    """What to say where a gateway seems to reach nobody in some of `families`, which its users send in; else None."""
    if any(endpoint.address is None for endpoint in node.endpoints):
        return None  # A name may have an address of either family.
    lacking = [v for v in sorted(families) if node.endpoint_in(v) is None and node.internal_ip(v) is None]
    if not lacking:
        return None
    return (
        f"the gateway {node.name} has no IPv{lacking[0]} address of its own, so what is for IPv{lacking[0]} most "
        "likely ends there; give it one, or use a gateway that has"
    )


def through(
    plan: HostPlan, topology: Topology, gateway: str, outside: Iterable[IPNetwork], *, unresolved: Collection[str] = ()
) -> HostPlan:
    """A peer's `plan`, guarded already, with its default route into the tunnel and `gateway` at the other end.

    `outside`: what is reached as before. Where the gateway cannot be used the default route stays in the tunnel, so
    that nothing leaves beside it, and the plan says why. `unresolved`: as `by_way_out` has it.
    """
    problems = (*plan.problems, *_waiting(unresolved))
    peers = dict(plan.peers)
    families = frozenset(address.version for address in plan.addresses)
    trouble = unusable(topology, gateway)
    if trouble is None:
        node = topology.snapshot.nodes[gateway]
        peers[node.public_key] = by_gateway(peers[node.public_key])
        if (text := speechless(node, families)) is not None:
            problems = (*problems, Problem(subject=gateway, text=text))
    else:
        text = f"{trouble}; until then nothing leaves this machine but for {STAYS_OUTSIDE_A_PEER}"
        problems = (*problems, Problem(subject=gateway, text=text))
    way_out = WayOut(families=families, outside=tuple(sorted(set(outside), key=network_key)), held=bool(unresolved))
    return evolve(plan, peers=peers, way_out=way_out, problems=problems)


def _waiting(unresolved: Iterable[str]) -> Iterator[Problem]:
    for name in sorted(unresolved):
        text = (
            f"the DNS name {name} is not resolved, so what must stay outside the way out is not known, and that stays "
            "as it is: mend the name or the resolver, or write the address instead"
        )
        yield Problem(subject=name, text=text)


# -- nodes -------------------------------------------------------------------------------------------------------------


@frozen
class Trouble:
    """Why a node cannot leave by the gateway that it names, as a sentence with the remedy."""

    text: str


@frozen(kw_only=True)
class Passage:
    """How a node reaches its gateway: by the WireGuard peer `key`, or `by` its leader, per family."""

    key: str = ""
    by: tuple[RoutePlan, ...] = ()


def passage(topology: Topology, name: str) -> Passage | Trouble:
    """How node `name`, which names a gateway, is to reach it."""
    nodes = topology.snapshot.nodes
    own = nodes[name]
    gateway = own.way_out
    if gateway == name:
        return Trouble(f"node {name} cannot be its own gateway: name another with way-out, or take it back")
    if own.gateway:
        return Trouble(
            f"node {name} offers a way out and cannot use one at once: kgctl annotate {name} gateway-, or way-out-"
        )
    if (text := unusable(topology, gateway)) is not None:
        return Trouble(text)
    leader = topology.segment_of(name).leader
    other = nodes[gateway]
    near = leader.name == name and topology.segment_of(gateway).location == own.location and same_site(own, other)
    in_clear = not bonded(own, other)
    if in_clear and (gateway == leader.name or (near and _apart_by_cross(topology))):
        return Trouble(
            f"node {name} reaches {gateway} over their location's own network and not through a tunnel: set "
            "--encapsulate wireguard on one of the two, or choose a gateway elsewhere"
        )
    if name == leader.name or gateway == leader.name:
        return Passage(key=other.public_key)
    if leader.way_out != gateway:
        return Trouble(
            f"node {name} leaves its location by {leader.name}, which leads it and does not use {gateway} itself: "
            f"kgctl annotate {leader.name} way-out={gateway} too, or give {name} a location of its own"
        )
    if bonded(own, leader):
        return Passage(key=leader.public_key)
    return Passage(by=tuple(_by_leader(own, leader)))


def _apart_by_cross(topology: Topology) -> bool:
    # In a cross mesh alone nodes of one location have no leader and no tunnels to each other.
    return topology.snapshot.granularity is Granularity.CROSS


def _by_leader(own: Node, leader: Node) -> Iterator[RoutePlan]:
    for address in own.mesh_addresses:
        way = hop(own, leader, address.version)
        if way is not None and not way.trouble and way.way is not Via.TUNNEL:
            yield RoutePlan(
                destination=ANYWHERE[address.version == 6], way=way.way, gateway=way.gateway, source=address
            )


def trouble_of(topology: Topology, name: str) -> str | None:
    """Why node `name` cannot leave by the gateway that it names, as a sentence; None: it can, or it names none."""
    if not topology.snapshot.nodes[name].way_out:
        return None
    found = passage(topology, name)
    return found.text if isinstance(found, Trouble) else None


def near(plan: HostPlan, topology: Topology) -> set[IPNetwork]:
    """What node `plan.node` reaches as before although it leaves by a gateway: its location, what is behind it, and
    its links. Networks that it stands in need not be named: their routes are narrower than a default route."""
    own = topology.snapshot.nodes[plan.node]
    segment = topology.segment_of(plan.node)
    neighbours = set(segment.members)
    if own.location != DEFAULT_LOCATION and topology.snapshot.granularity is not Granularity.LOCATION:
        neighbours.update(node for node in topology.snapshot.nodes.values() if node.location == own.location)
    found = {host_network(ip.ip) for node in neighbours for ip in node.internal_ips}
    found.update(map(host_network, plan.ipip_remotes))
    return found.union(ON_THE_LINK, plan.behind, segment.location_networks)


def by_way_out(
    plan: HostPlan,
    topology: Topology,
    *,
    outside: Iterable[IPNetwork],
    sources: Iterable[IPAddress] = (),
    unresolved: Collection[str] = (),
) -> HostPlan:
    """A node's `plan`, guarded already, with its way out, if it names a gateway; else `plan` itself.

    `outside`: what else is reached as before (etcd); `sources`: the host's own addresses, see `WayOut`. Where the
    gateway cannot be used, nothing leaves but for what is reached as before, and the plan says why. `unresolved`: DNS
    names of etcd and of the gateway whose addresses are not known; as long as there are any, the kernel is left as it
    is, since the name server may be beyond the very gateway.
    """
    gateway = topology.snapshot.nodes[plan.node].way_out
    if not gateway:
        return plan
    found = passage(topology, plan.node)
    if isinstance(found, Passage) and found.key and found.key not in plan.peers:
        found = Trouble(f"node {plan.node} has no tunnel to {gateway}, which it is to leave by")
    peers, problems = plan.peers, (*plan.problems, *_waiting(unresolved))
    families: frozenset[int] = frozenset()
    by: tuple[RoutePlan, ...] = ()
    if isinstance(found, Trouble):
        text = f"{found.text}; until then nothing leaves {plan.node} but for {STAYS_OUTSIDE}"
        problems = (*problems, Problem(subject=plan.node, text=text))
    elif found.key:
        families = frozenset(address.version for address in plan.addresses)
        peers = {**peers, found.key: by_gateway(peers[found.key])}
    else:
        families, by = frozenset(route.destination.version for route in found.by), found.by
    if families and (said := speechless(topology.snapshot.nodes[gateway], families)) is not None:
        problems = (*problems, Problem(subject=gateway, text=said))
    way_out = WayOut(
        families=families,
        by=by,
        outside=tuple(sorted({*outside, *near(plan, topology)}, key=network_key)),
        sources=tuple(sorted(set(sources), key=lambda address: (address.version, int(address)))),
        held=bool(unresolved),
    )
    return evolve(plan, peers=peers, way_out=way_out, problems=problems)


def at_gateway(plan: HostPlan, stands_in: Iterable[IPNetwork], families: Collection[int]) -> HostPlan:
    """A gateway's plan with what its host alone knows: the networks that it stands in, of which those that are private
    are closed to users, and the families in which it reaches others, of which a missing one is said. Other plans stay.
    """
    if not plan.gateway:
        return plan
    private = {network for network in stands_in if network.prefixlen and not is_public(network.network_address)}
    problems = plan.problems
    for version in sorted(plan.forwarding.difference(families)) if families else ():
        text = (
            f"gateway {plan.node} has no default route in IPv{version}: what users send it in that family ends here; "
            f"give the host IPv{version}, or let them use another gateway"
        )
        problems = (*problems, Problem(subject=plan.node, text=text))
    return evolve(plan, closed=tuple(sorted(private.union(LINK_LOCAL), key=network_key)), problems=problems)
