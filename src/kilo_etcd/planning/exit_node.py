"""The exit node: a node by which peers and other nodes leave for the internet (decision 0013). Pure.

The node offers it (annotation `advertise-exit-node`), its users ask for it: a peer by a flag, a node by its annotation
`exit-node`. An exit node must be its segment's leader, or a segment of its own: other nodes are reached through their
leader, whose WireGuard would have to carry the default route for somebody else.

A node that uses one does so through the tunnel to it, as a leader or a segment of its own; as a member, through its
leader, if that uses the same exit node. What cannot be had so is refused and reported, and then nothing leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from ipaddress import ip_network

from attrs import evolve, frozen

from kilo_etcd.model import DEFAULT_LOCATION, IPAddress, IPNetwork, Node, is_public
from kilo_etcd.model.hostplan import ExitRoute, HostPlan, PeerPlan, Problem, RoutePlan, Via
from kilo_etcd.topology.next_hop import next_hop, tunneled
from kilo_etcd.topology.prefix_allocation import network_key
from kilo_etcd.topology.segments import Topology, host_network

ANYWHERE: tuple[IPNetwork, ...] = (ip_network("0.0.0.0/0"), ip_network("::/0"))

LINK_LOCAL: tuple[IPNetwork, ...] = (ip_network("169.254.0.0/16"), ip_network("fe80::/10"))
"""Of one link alone (RFC 3927, RFC 4291); clouds answer a host's metadata requests there."""

BYPASSES = "the mesh, what is near it, answers to callers, and programs that bind to its own addresses or devices"
"""What leaves a node otherwise than by its exit node, as the end of a sentence."""
BYPASSES_OF_A_PEER = "the mesh, its own network, and programs that bind to its devices"
"""The same of a machine that is a peer."""

NOTHING_BACK = "nothing comes back from the exit node "
"""How the sentence on an exit node that does not answer begins; its name follows."""

ON_THE_LINK: tuple[IPNetwork, ...] = (*LINK_LOCAL, ip_network("224.0.0.0/4"), ip_network("255.255.255.255/32"))
"""What a host sends on its own links whatever its routes are, DHCP included. IPv6's multicast has routes of its own."""


def ineligible(topology: Topology, name: str) -> str | None:
    """Why the node, which is in the mesh, cannot be an exit node, as a sentence; None: it can."""
    if exit_node := topology.snapshot.nodes[name].exit_node:
        return (
            f"node {name} cannot be an exit node as long as it leaves by {exit_node} itself: take that back with kgctl "
            f"annotate {name} exit-node-"
        )
    leader = topology.segment_of(name).leader.name
    if leader == name:
        return None
    return (
        f"node {name} cannot be an exit node as long as {leader} leads its location: annotate {leader} with "
        f"advertise-exit-node=true "
        f"instead, or {name} with leader=true"
    )


def unusable(topology: Topology, name: str) -> str | None:
    """Why no host can use the node as exit node, as a sentence; None: one can."""
    node = topology.snapshot.nodes.get(name)
    if node is None:
        offering = sorted(other.name for other in topology.snapshot.nodes.values() if other.advertises_exit_node)
        hint = f"exit nodes are {', '.join(offering)}" if offering else "kgctl node list lists those that are"
        return f"the exit node {name} is no node of the mesh; {hint}"
    if not node.advertises_exit_node:
        return (
            f"node {name} does not advertise itself as an exit node; allow it with kgctl annotate {name} "
            f"advertise-exit-node=true"
        )
    return ineligible(topology, name)


def inside(topology: Topology, name: str) -> tuple[IPNetwork, ...]:
    """The networks near exit node `name` that answer the mesh's own addresses."""
    segment = topology.segment_of(name)
    near = (network for networks in segment.subnets.values() for network in networks)
    return tuple(sorted({*topology.snapshot.subnets, *near, *segment.internal}, key=network_key))


def by_exit_node(peer: PeerPlan) -> PeerPlan:
    """The peer with everything behind it that is behind nobody else."""
    return evolve(peer, allowed_ips=tuple(sorted({*peer.allowed_ips, *ANYWHERE}, key=network_key)))


def no_common_family(node: Node, families: Iterable[int]) -> str | None:
    """What to report if an exit node seems to reach nothing in some of `families`, which its users send in; else
    None."""
    if any(endpoint.address is None for endpoint in node.endpoints):
        return None  # A name may have an address of either family.
    lacking = [v for v in sorted(families) if node.endpoint_in(v) is None and node.internal_ip(v) is None]
    if not lacking:
        return None
    return (
        f"the exit node {node.name} has no IPv{lacking[0]} address of its own, so what is for IPv{lacking[0]} most "
        "likely ends there; give it one, or use an exit node that has"
    )


def through(
    plan: HostPlan, topology: Topology, exit_node: str, bypass: Iterable[IPNetwork], *, unresolved: Collection[str] = ()
) -> HostPlan:
    """A peer's `plan`, filtered already, with its default route into the tunnel and `exit_node` at the other end.

    `bypass`: what is reached as before. If the exit node cannot be used the default route stays in the tunnel, so
    that nothing bypasses it, and the plan says why. `unresolved`: as `with_exit_node` has it.
    """
    problems = (*plan.problems, *_waiting(unresolved))
    peers = dict(plan.peers)
    families = frozenset(address.version for address in plan.addresses)
    trouble = unusable(topology, exit_node)
    if trouble is None:
        node = topology.snapshot.nodes[exit_node]
        peers[node.public_key] = by_exit_node(peers[node.public_key])
        if (text := no_common_family(node, families)) is not None:
            problems = (*problems, Problem(subject=exit_node, text=text))
    else:
        text = f"{trouble}; until then nothing leaves this machine but for {BYPASSES_OF_A_PEER}"
        problems = (*problems, Problem(subject=exit_node, text=text))
    exit_route = ExitRoute(families=families, bypass=tuple(sorted(set(bypass), key=network_key)), held=bool(unresolved))
    return evolve(plan, peers=peers, exit_route=exit_route, problems=problems)


def _waiting(unresolved: Iterable[str]) -> Iterator[Problem]:
    for name in sorted(unresolved):
        text = (
            f"the DNS name {name} is not resolved, so what must bypass the exit node is not known, and that stays "
            "as it is: mend the name or the resolver, or write the address instead"
        )
        yield Problem(subject=name, text=text)


# -- nodes -------------------------------------------------------------------------------------------------------------


@frozen
class Trouble:
    """Why a node cannot leave by the exit node that it names, as a sentence with the remedy."""

    text: str


@frozen(kw_only=True)
class ExitPath:
    """How a node reaches its exit node: by the WireGuard peer `key`, or `by` its leader, per family."""

    key: str = ""
    by: tuple[RoutePlan, ...] = ()


def exit_path(topology: Topology, name: str) -> ExitPath | Trouble:
    """How node `name`, which names an exit node, is to reach it."""
    nodes = topology.snapshot.nodes
    own = nodes[name]
    exit_node = own.exit_node
    if exit_node == name:
        return Trouble(f"node {name} cannot be its own exit node: name another with exit-node, or take it back")
    if own.advertises_exit_node:
        return Trouble(
            f"node {name} advertises itself as an exit node and cannot use one at once: kgctl annotate {name} "
            f"advertise-exit-node-, or exit-node-"
        )
    if (text := unusable(topology, exit_node)) is not None:
        return Trouble(text)
    leader = topology.segment_of(name).leader
    other = nodes[exit_node]
    apart = leader.name == name and not topology.policy.tunnel_between(own, other)
    if not tunneled(own, other) and (exit_node == leader.name or apart):
        return Trouble(
            f"node {name} reaches {exit_node} over their location's own network and not through a tunnel: set "
            "--encapsulate wireguard on one of the two, or choose an exit node elsewhere"
        )
    if name == leader.name or exit_node == leader.name:
        return ExitPath(key=other.public_key)
    if leader.exit_node != exit_node:
        return Trouble(
            f"node {name} leaves its location by {leader.name}, which leads it and does not use {exit_node} itself: "
            f"kgctl annotate {leader.name} exit-node={exit_node} too, or give {name} a location of its own"
        )
    if tunneled(own, leader):
        return ExitPath(key=leader.public_key)
    return ExitPath(by=tuple(_by_leader(own, leader)))


def _by_leader(own: Node, leader: Node) -> Iterator[RoutePlan]:
    for address in own.mesh_addresses:
        hop = next_hop(own, leader, address.version)
        if hop is not None and not hop.trouble and hop.via is not Via.TUNNEL:
            yield RoutePlan(
                destination=ANYWHERE[address.version == 6], via=hop.via, gateway=hop.gateway, source=address
            )


def trouble_of(topology: Topology, name: str) -> str | None:
    """Why node `name` cannot leave by the exit node that it names, as a sentence; None: it can, or it names none."""
    if not topology.snapshot.nodes[name].exit_node:
        return None
    path = exit_path(topology, name)
    return path.text if isinstance(path, Trouble) else None


def near(plan: HostPlan, topology: Topology) -> set[IPNetwork]:
    """What node `plan.node` reaches as before although it leaves by an exit node: its location, what is behind it, and
    its links. Networks that it is attached to need not be named: their routes are narrower than a default route."""
    own = topology.snapshot.nodes[plan.node]
    segment = topology.segment_of(plan.node)
    local_nodes = set(segment.members)
    if own.location != DEFAULT_LOCATION and not topology.policy.leader_per_location:
        local_nodes.update(node for node in topology.snapshot.nodes.values() if node.location == own.location)
    networks = {host_network(ip.ip) for node in local_nodes for ip in node.internal_ips}
    networks.update(map(host_network, plan.ipip_remotes))
    return networks.union(ON_THE_LINK, plan.behind, segment.location_networks)


def with_exit_node(
    plan: HostPlan,
    topology: Topology,
    *,
    bypass: Iterable[IPNetwork],
    sources: Iterable[IPAddress] = (),
    unresolved: Collection[str] = (),
) -> HostPlan:
    """A node's `plan`, filtered already, with its exit route, if it names an exit node; else `plan` itself.

    `outside`: what else is reached as before (etcd); `sources`: the host's own addresses, see `ExitRoute`. Where the
    exit node cannot be used, nothing leaves but for what is reached as before, and the plan says why. `unresolved`: DNS
    names of etcd and of the exit node whose addresses are not known; as long as there are any, the kernel is left as it
    is, since the name server may be beyond that very exit node.
    """
    exit_node = topology.snapshot.nodes[plan.node].exit_node
    if not exit_node:
        return plan
    path = exit_path(topology, plan.node)
    if isinstance(path, ExitPath) and path.key and path.key not in plan.peers:
        path = Trouble(f"node {plan.node} has no tunnel to {exit_node}, which it is to leave by")
    peers, problems = plan.peers, (*plan.problems, *_waiting(unresolved))
    families: frozenset[int] = frozenset()
    by: tuple[RoutePlan, ...] = ()
    if isinstance(path, Trouble):
        text = f"{path.text}; until then nothing leaves {plan.node} but for {BYPASSES}"
        problems = (*problems, Problem(subject=plan.node, text=text))
    elif path.key:
        families = frozenset(address.version for address in plan.addresses)
        peers = {**peers, path.key: by_exit_node(peers[path.key])}
    else:
        families, by = frozenset(route.destination.version for route in path.by), path.by
    if families and (sentence := no_common_family(topology.snapshot.nodes[exit_node], families)) is not None:
        problems = (*problems, Problem(subject=exit_node, text=sentence))
    exit_route = ExitRoute(
        families=families,
        by=by,
        bypass=tuple(sorted({*bypass, *near(plan, topology)}, key=network_key)),
        sources=tuple(sorted(set(sources), key=lambda address: (address.version, int(address)))),
        held=bool(unresolved),
    )
    return evolve(plan, peers=peers, exit_route=exit_route, problems=problems)


def as_exit_node(plan: HostPlan, stands_in: Iterable[IPNetwork], families: Collection[int]) -> HostPlan:
    """An exit node's plan with what its host alone knows: the networks that it is attached to, of which those that are
    private are blocked for users, and the families in which it reaches others, of which a missing one is reported.
    Other plans stay.
    """
    if not plan.is_exit_node:
        return plan
    private = {network for network in stands_in if network.prefixlen and not is_public(network.network_address)}
    problems = plan.problems
    for version in sorted(plan.forwarding.difference(families)) if families else ():
        text = (
            f"exit node {plan.node} has no default route in IPv{version}: what users send it in that family ends here; "
            f"give the host IPv{version}, or let them use another exit node"
        )
        problems = (*problems, Problem(subject=plan.node, text=text))
    return evolve(plan, blocked=tuple(sorted(private.union(LINK_LOCAL), key=network_key)), problems=problems)
