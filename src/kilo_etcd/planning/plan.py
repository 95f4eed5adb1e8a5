"""Computes what the kernel of one host must hold, from the topology and the host's name.

A plan has two parts. The remote part is one WireGuard peer and a few routes for each other segment and each
outside peer; it grows with the mesh. The local part is what the host's own location needs; it does not. Both
are kept in the plan's memo together with what they were computed from, so that the next plan costs what has
changed and not what there is. The outcome is the same with and without a previous plan.

A member of a segment holds the same WireGuard peers as its leader, silent (no keepalive): to take over
it only has to turn its mesh route. Where it reaches its leader through the tunnel they are allowed nothing, because
WireGuard gives the mesh subnet to one peer only, which is then the leader.

A prober that reports that its leader does not forward, and names this host as a target, is a peer too as long as
it reports it, with nothing allowed: a handshake between the two shows that it could lead (`topology.probe_reports`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface
from typing import TypeVar

from attrs import evolve, frozen

from kilo_etcd.base.mappings import Changed, changes
from kilo_etcd.base.quoting import first_of
from kilo_etcd.model import (
    IPAddress,
    IPInterface,
    IPNetwork,
    Node,
    Peer,
    is_within,
)
from kilo_etcd.model.hostplan import TAKEOVER_CHECK_KEEPALIVE, HostPlan, PeerPlan, Problem, RoutePlan, Via
from kilo_etcd.planning.exit_node import ineligible, inside
from kilo_etcd.planning.route_filter import FilterMemo, RoutesMemo
from kilo_etcd.topology.chosen_endpoint import chosen_endpoint
from kilo_etcd.topology.families import apart, same_site
from kilo_etcd.topology.granularity import GranularityPolicy
from kilo_etcd.topology.internal import Links, knows, site_of
from kilo_etcd.topology.nat import observed_endpoint
from kilo_etcd.topology.next_hop import NextHop, local_endpoint, next_hop, tunneled
from kilo_etcd.topology.prefix_allocation import network_key
from kilo_etcd.topology.segments import Segment, Topology, host_network

K = TypeVar("K")
V = TypeVar("V")

MOST_SHOWN = 3
"""Nodes that are named in one sentence."""

NOT_ENCAPSULATED = "go over IPv6 as they are, although encapsulate is always"
"""What the problem says of packets that are to be encapsulated and are not: no packet is lost by it."""


class _TunnelRole(Enum):
    """What a node is to the rest of the mesh."""

    LEADER = "has tunnels to the other segments and uses them"
    STANDBY = "has them too, but sends through its leader"
    BEHIND = "has them, and uses one, to its leader"


@frozen(kw_only=True)
class _RemoteView:
    """All that the remote part depends on, apart from the segments and peers themselves."""

    role: _TunnelRole
    policy: GranularityPolicy
    segment: str
    own: Node
    """Reduced to what counts here: see `_reduced`."""
    hops: tuple[tuple[int, NextHop | None], ...]
    underlay: tuple[IPNetwork, ...]
    """What the segment's hosts reach over their own links: no internal IP within is routed there."""
    called: frozenset[int]
    """The families in which the segment's leader is called at a private endpoint."""
    internal: tuple[IPAddress, ...]
    """The node's own internal IPs that the mesh routes."""
    in_front: bool
    """Whether these may be the far end of a tunnel."""
    knows: bool
    """Whether the node and its leader know the setting internal-ips."""

    def source(self, version: int, other: Segment) -> IPAddress | None:
        """From where it sends to internal IPs of another segment: from its own one, if answers to that find back to
        it; else from its mesh address."""
        own = next((address for address in self.internal if address.version == version), None)
        lost = own is None or other.links.hold(version, int(own)) or (self.in_front and version in other.called)
        return self.own.mesh_address(version) if lost else own


@frozen(kw_only=True, eq=False)
class _Remote:
    view: _RemoteView
    peers: dict[str, PeerPlan]
    routes: dict[IPNetwork, RoutePlan]
    problems: dict[str, Problem]
    changed: Changed[IPNetwork, RoutePlan] | None = None
    """In what `routes` differ from those before, as far as is known."""


@frozen(kw_only=True, eq=False)
class _Memo(RoutesMemo):
    name: str
    topology: Topology
    remote: _Remote
    local: _Local
    peers: dict[str, PeerPlan]
    routes: dict[IPNetwork, RoutePlan]
    """Remote and local ones together."""


def host_plan(topology: Topology, name: str, previous: HostPlan | None = None) -> HostPlan:
    """The plan of node `name`. `previous` is its last plan, guarded or not. UnknownNode: it is not in the mesh."""
    segment = topology.segment_of(name)
    own = topology.snapshot.nodes[name]
    memo = _memo_of(previous)
    local = _Local(topology, segment, own, None if memo is None else memo.local)
    remote = _remote_part(topology, local, memo)
    # To copy and to compare what has not changed costs more than all the rest.
    if memo is not None and local.same_as(memo.local) and (remote is memo.remote or not local.leans_on_remote):
        local = memo.local
    else:
        local.add(remote)
    changed = None
    if memo is None or local is not memo.local:
        peers, routes = _merged(remote.peers, local.peers), _merged(remote.routes, local.routes)
        if memo is not None and remote.routes is memo.remote.routes:
            changed = Changed(memo.routes, routes, frozenset(changes(memo.local.routes, local.routes)))
    else:
        peers = memo.peers if remote.peers is memo.remote.peers else _merged(remote.peers, local.peers)
        routes = memo.routes if remote.routes is memo.remote.routes else _merged(remote.routes, local.routes)
        if remote.changed is not None and remote.changed.before is memo.remote.routes:
            changed = Changed(memo.routes, routes, remote.changed.keys)
    families: set[int] = set()
    # What goes from one peer to another enters and leaves by the tunnel.
    joins_networks = len(segment.members) > 1 or bool(segment.networks)
    if joins_networks or topology.peers:
        families.update(topology.families)
    if len(segment.members) > 1:
        inside_it = {ip.version for node in segment.members for ip in node.internal_ips}
        families.update(topology.internal_families & inside_it)
    problems = {*topology.problems, *local.problems, *remote.problems.values()}
    is_exit_node = own.advertises_exit_node
    if is_exit_node and (trouble := ineligible(topology, name)) is not None:
        is_exit_node = False
        problems.add(Problem(subject=name, text=trouble))
    if is_exit_node:
        families.update(topology.families)
    return HostPlan(
        node=name,
        revision=topology.snapshot.revision,
        addresses=tuple(_interface(address) for address in own.mesh_addresses),
        listen_port=own.port,
        peers=peers,
        routes=routes,
        unreachable_routes=topology.snapshot.subnets,
        returns=local.returns,
        forwarding=frozenset(families),
        clamps=name in segment.subnets or (local.leader is None and (joins_networks or is_exit_node)),
        ipip_remotes=frozenset(local.ipip_remotes),
        ipip_local=local.ipip_local if local.ipip_remotes else None,
        behind=segment.subnets.get(name, ()),
        masquerade=local.masquerade(),
        masquerade_not=local.masquerade_not(),
        is_exit_node=is_exit_node,
        inside=inside(topology, name) if is_exit_node else (),
        problems=tuple(sorted(problems, key=lambda problem: (problem.subject, problem.text))),
        memo=_Memo(
            name=name,
            topology=topology,
            remote=remote,
            local=local,
            peers=peers,
            routes=routes,
            changed=changed,
        ),
    )


def _merged(many: dict[K, V], few: dict[K, V]) -> dict[K, V]:
    if not few:
        return many
    result = many.copy()
    result.update(few)
    return result


@frozen
class _NextHops:
    """Between a host and a neighbour: in IPv4 and in IPv6."""

    node: Node
    there: tuple[NextHop | None, NextHop | None]
    back: tuple[NextHop | None, NextHop | None]


class _Local:
    """The part of a plan that the node's own location needs, being put together."""

    def __init__(self, topology: Topology, segment: Segment, own: Node, before: _Local | None) -> None:
        self.topology, self.segment, self.own = topology, segment, own
        self._sources = {version: own.mesh_address(version) for version in (4, 6)}
        self._next_hops: dict[str, _NextHops] = {}
        self._next_hops_before = before._next_hops if before is not None and before.own is own else {}
        self.peers: dict[str, PeerPlan] = {}
        self.routes: dict[IPNetwork, RoutePlan] = {}
        self.problems: list[Problem] = []
        self.plain: dict[str, None] = {}
        """The nodes to which packets go plain although they should be encapsulated."""
        self.ipip_remotes: set[IPAddress] = set()
        self.ipip_local: IPAddress | None = None
        self.returns: dict[IPNetwork, RoutePlan] = {}
        leader = segment.leader
        self.leader = None if leader.name == own.name else leader
        if self.leader is None:
            self.role = _TunnelRole.LEADER
        else:
            self.role = _TunnelRole.BEHIND if tunneled(own, self.leader) else _TunnelRole.STANDBY
        self.families = sorted(topology.families)
        self.outward: dict[int, NextHop | None] = {
            version: self._outward(version) for version in sorted({*self.families, *topology.internal_families})
        }

    def same_as(self, before: _Local) -> bool:
        """Whether the whole comes out as `before` did, as far as it does not lean on the remote part."""
        return (
            self.segment is before.segment
            and self.own is before.own
            and self.outward == before.outward
            and self.topology.families == before.topology.families
            and self.topology.snapshot.subnets == before.topology.snapshot.subnets
            and self.topology.policy is before.topology.policy
            and not self.topology.policy.direct_within_location
        )

    @property
    def leans_on_remote(self) -> bool:
        """Whether the leader is a WireGuard peer inside the location: all that is elsewhere is allowed it."""
        return self.role is _TunnelRole.BEHIND

    def _outward(self, version: int) -> NextHop | None:
        """The next hop of everything that leaves the location."""
        return NextHop(Via.TUNNEL) if self.leader is None else next_hop(self.own, self.leader, version)

    def _neighbours(self) -> Iterable[tuple[Node, Segment]]:
        """The nodes that are reached inside the location, with the segment of each."""
        own = self.own
        if self.topology.policy.direct_within_location:
            for segment in self.topology.segments.values():
                node = segment.leader
                if node.location == own.location and node.name != own.name and same_site(own, node):
                    yield node, segment
        else:
            for node in self.segment.members:
                if node.name != own.name:
                    yield node, self.segment

    def add(self, remote: _Remote) -> None:
        subnets = self.topology.snapshot.subnets
        for subnet in subnets:
            self._route(subnet, self.outward[subnet.version])
        for node, segment in sorted(self._neighbours(), key=lambda pair: pair[0].name):
            networks = segment.subnets.get(node.name, ())
            if tunneled(self.own, node):
                self._tunnel(node, networks, remote)
            self._neighbour(node, segment.addresses[node.name], networks)
            self._return(node)
        if self.plain:
            text = (
                f"packets to {first_of(self.plain, MOST_SHOWN)} {NOT_ENCAPSULATED}: "
                "IPIP carries IPv4 only; encapsulate wireguard encapsulates them"
            )
            self.problems.append(Problem(subject=self.own.name, text=text))

    def masquerade(self) -> tuple[IPNetwork, ...]:
        """The location's networks, where this host is the one that forwards to them."""
        return self.segment.location_networks if self.leader is None else ()

    def masquerade_not(self) -> frozenset[IPAddress]:
        """The addresses among them whose answers come back through this host anyway: its segment's members, as far as
        they send them over the location's network."""
        networks = self.masquerade()
        if not networks:
            return frozenset()
        members = (node for node in self.segment.members if node.name != self.own.name and not tunneled(self.own, node))
        return frozenset(ip.ip for node in members for ip in node.internal_ips if is_within(ip.ip, networks))

    def _next_hops_of(self, node: Node) -> _NextHops:
        """To and from a neighbour; of two nodes that are the same objects they are the same."""
        hops = self._next_hops.get(node.name) or self._next_hops_before.get(node.name)
        if hops is None or hops.node is not node:
            own = self.own
            there = next_hop(own, node, 4), next_hop(own, node, 6)
            hops = _NextHops(node, there, (next_hop(node, own, 4), next_hop(node, own, 6)))
        self._next_hops[node.name] = hops
        return hops

    def _neighbour(self, node: Node, addresses: tuple[IPNetwork, ...], networks: tuple[IPNetwork, ...]) -> None:
        there = self._next_hops_of(node).there
        hops = {version: there[version == 6] for version in self.families}
        for address in addresses:
            hop = hops.get(address.version)
            outward = self.outward.get(address.version)
            # Where the mesh subnet's own route goes the same way, the tunnel's allowed IPs do the rest.
            if not (hop is not None and outward is not None and hop.via is Via.TUNNEL is outward.via):
                self._route(address, hop)
        for network in networks:
            self._route(network, hops[network.version])
        for version, hop in hops.items():
            if hop is None:
                text = (
                    f"node {node.name} cannot be reached in IPv{version} inside the location: the two have no "
                    "internal IP in common that carries it; give both one, or use encapsulate wireguard"
                    + (
                        " (is IPv6 switched off on a network device of one? sysctl net.ipv6.conf)"
                        if version == 6
                        else ""
                    )
                )
                self.problems.append(Problem(subject=node.name, text=text))
            elif hop.plain and not hop.trouble:
                self.plain[node.name] = None
            elif hop.trouble:
                text = f"node {node.name} cannot be reached in IPv{version} inside the location: {hop.trouble}"
                self.problems.append(Problem(subject=node.name, text=text))
        hop, own_ip = hops.get(4), self.own.internal_ip(4)
        if hop is not None and hop.via is Via.IPIP and hop.gateway is not None and own_ip is not None:
            self.ipip_remotes.add(hop.gateway)
            self.ipip_local = own_ip.ip

    def _return(self, node: Node) -> None:
        """Send on what comes out of the tunnel for a member's internal IPs as the member sends what is for there."""
        for destination in self._reached_at(node):
            hop = self._next_hops_of(node).back[destination.version == 6]
            if hop is not None and hop.via is not Via.UNDERLAY:
                gateway = destination.network_address if hop.via is Via.IPIP else None
                self.returns[destination] = RoutePlan(destination=destination, via=hop.via, gateway=gateway)

    def _reached_at(self, node: Node) -> list[IPNetwork]:
        """Where this host leads, the internal IPs of a member to which other segments send."""
        if self.leader is not None or node.name not in self.segment.addresses:
            return []
        return self.segment.reached_at(node)

    def _tunnel(self, node: Node, networks: tuple[IPNetwork, ...], remote: _Remote) -> None:
        allowed = [*map(host_network, node.mesh_addresses), *networks]
        allowed += (network for network in self._reached_at(node) if network not in networks)
        if self.leader is not None and node.name == self.leader.name:
            allowed += [*self.topology.snapshot.subnets, *remote.routes]
        self.peers[node.public_key] = PeerPlan(
            public_key=node.public_key,
            name=node.name,
            endpoint=local_endpoint(self.own, node),
            allowed_ips=tuple(sorted(allowed, key=network_key)),
        )

    def _route(self, destination: IPNetwork, hop: NextHop | None) -> None:
        if hop is not None:
            self.routes[destination] = RoutePlan(
                destination=destination, via=hop.via, gateway=hop.gateway, source=self._sources[destination.version]
            )


def _interface(address: IPAddress) -> IPInterface:
    if isinstance(address, IPv4Address):
        return IPv4Interface((int(address), 32))
    return IPv6Interface((int(address), 128))


def _reduced(own: Node, role: _TunnelRole) -> Node:
    """The node with all that the remote part does not depend on taken out, so that it can be compared."""
    return Node(
        name=own.name,
        public_key="",
        location=own.location,
        endpoint=own.endpoint,
        more_endpoints=own.more_endpoints,
        internal_ips=own.internal_ips,
        mesh_addresses=own.mesh_addresses,
        observed_endpoints=own.observed_endpoints,
        persistent_keepalive=own.persistent_keepalive if role is _TunnelRole.LEADER else 0,
    )


def _memo_of(plan: HostPlan | None) -> _Memo | None:
    memo = plan.memo if plan is not None else None
    if isinstance(memo, FilterMemo):
        memo = memo.inner
    return memo if isinstance(memo, _Memo) else None


def _remote_part(topology: Topology, local: _Local, memo: _Memo | None) -> _Remote:
    view = _RemoteView(
        role=local.role,
        policy=topology.policy,
        segment=local.segment.key,
        own=_reduced(local.own, local.role),
        hops=tuple(local.outward.items()),
        underlay=local.segment.underlay,
        called=local.segment.called,
        in_front=local.leader is None
        or any(node.name == local.own.name for node, _ in local.segment.takeover_candidates),
        internal=tuple(ip.ip for ip in local.own.internal_ips if host_network(ip.ip) in local.segment.internal),
        knows=knows(local.own) and knows(local.segment.leader),
    )
    if memo is None or memo.remote.view != view:
        empty = _Remote(view=view, peers={}, routes={}, problems={})
        return _follow(empty, topology, {}, topology.segments, {}, topology.peers)
    base = memo.topology
    if base is topology:
        return memo.remote
    direct = topology.base is base.identity
    keys = set(topology.changed if direct else changes(base.segments, topology.segments)) - {view.segment}
    peers = changes(base.peers, topology.peers)
    if not keys and not peers:
        return memo.remote
    return _follow(
        memo.remote,
        topology,
        {key: base.segments[key] for key in keys if key in base.segments},
        {key: topology.segments[key] for key in keys if key in topology.segments},
        {name: base.peers[name] for name in peers if name in base.peers},
        {name: topology.peers[name] for name in peers if name in topology.peers},
    )


def _follow(
    remote: _Remote,
    topology: Topology,
    gone: Mapping[str, Segment],
    come: Mapping[str, Segment],
    peers_gone: Mapping[str, Peer],
    peers_come: Mapping[str, Peer],
) -> _Remote:
    """The remote part after some segments and peers went and others came (a changed one does both)."""
    view = remote.view
    own, role = view.own, view.role
    skip = view.segment
    direct = view.policy.direct_within_location
    # Here, the order of a dict matters for speed alone: one in which nothing was ever removed copies ten times
    # faster, so what comes again is overwritten in its place.
    peers, problems = remote.peers.copy(), remote.problems.copy()
    routes: dict[IPNetwork, RoutePlan] = {}
    old_keys = {segment.leader.public_key for segment in gone.values()}
    old_keys.update(node.public_key for segment in gone.values() for node, _ in segment.takeover_candidates)
    old_keys.update(peer.public_key for peer in peers_gone.values())
    old_networks = {network for segment in gone.values() for network in segment.networks}
    internal_gone, internal_come = _internal_changes(gone, come, view)
    old_networks.update(internal_gone)
    old_networks.update(network for peer in peers_gone.values() for network in peer.allowed_ips)
    for key in gone:
        problems.pop(key, None)
    hops = dict(view.hops)
    sources = {version: own.mesh_address(version) for version in (4, 6)}
    links = Links.made_of(view.underlay)

    def route(networks: Iterable[IPNetwork]) -> None:
        for network in networks:
            hop = hops[network.version]
            if hop is not None:
                old_networks.discard(network)
                routes[network] = RoutePlan(
                    destination=network, via=hop.via, gateway=hop.gateway, source=sources[network.version]
                )

    def route_internal(segment: Segment, networks: Iterable[IPNetwork]) -> None:
        come_now = internal_come[segment.key]
        hosts = {version: view.source(version, segment) for version in segment.internal_families}
        for network in networks if come_now is None else come_now.intersection(networks):
            hop, source = hops[network.version], hosts[network.version]
            if hop is not None and not hop.trouble and source is not None:
                old_networks.discard(network)
                routes[network] = RoutePlan(destination=network, via=hop.via, gateway=hop.gateway, source=source)

    def connect(peer: PeerPlan) -> None:
        # Behind another host's tunnel everything is allowed to that one peer; the others are known all the same.
        old_keys.discard(peer.public_key)
        peers[peer.public_key] = peer if role is not _TunnelRole.BEHIND else evolve(peer, allowed_ips=())

    for key, segment in come.items():
        leader = segment.leader
        near = leader.location == own.location and key != skip and same_site(own, leader)
        if key == skip or (direct and near):
            continue
        networks, allowed = segment.networks, segment.allowed
        if near and segment.location_networks:
            # They are this host's own location's networks too: it does not go through a tunnel to get home.
            offered = frozenset(segment.location_networks)
            networks = tuple(n for n in networks if n not in offered)
            allowed = tuple(n for n in allowed if n not in offered)
        route(networks)
        if segment.internal and view.knows and view.policy.share_no_site(segment.site, site_of(own)):
            internal = [n for n in segment.internal if not links.hold(n.version, int(n.network_address))]
            if view.called:
                ends = {network for network in segment.front if network.version in view.called}
                internal = [network for network in internal if network not in ends]
            route_internal(segment, internal)
            if len(internal) == len(segment.internal) and allowed is segment.allowed:
                allowed = segment.reach
            else:
                allowed = tuple(sorted((*allowed, *internal), key=network_key))
        for takeover_candidate, targets in segment.takeover_candidates:
            if own.name in targets and role is _TunnelRole.LEADER:
                # Allowed nothing, with a handshake at once: should it take over, it is allowed what the leader was.
                connect(
                    PeerPlan(
                        public_key=takeover_candidate.public_key,
                        name=takeover_candidate.name,
                        endpoint=chosen_endpoint(own, takeover_candidate, near)[0],
                        persistent_keepalive=TAKEOVER_CHECK_KEEPALIVE,
                    )
                )
        endpoint, observed = chosen_endpoint(own, leader, near)
        connect(
            PeerPlan(
                public_key=leader.public_key,
                name=leader.name,
                endpoint=observed or endpoint,
                observed=observed is not None,
                allowed_ips=allowed,
                persistent_keepalive=own.persistent_keepalive,
            )
        )
        if endpoint is not None or observed is not None or role is not _TunnelRole.LEADER:
            continue
        text = apart(own, leader)
        if text is None and own.endpoint is None:
            text = (
                f"no tunnel to node {leader.name}: neither it nor {own.name} has an endpoint; "
                "set force-endpoint on one of them"
            )
        if text is not None:
            problems[key] = Problem(subject=leader.name, text=text)
    for peer in peers_come.values():
        route(peer.allowed_ips)
        observed = observed_endpoint(own, peer, peer.endpoint)
        connect(
            PeerPlan(
                public_key=peer.public_key,
                name=peer.name,
                endpoint=observed or peer.endpoint,
                observed=observed is not None,
                allowed_ips=peer.allowed_ips,
                persistent_keepalive=peer.persistent_keepalive if role is _TunnelRole.LEADER else 0,
                preshared_key=peer.preshared_key,
            )
        )
    for public_key in old_keys:
        peers.pop(public_key, None)
    # The same dict if nothing differs: to copy many routes, and to compare them later, costs more than to look here.
    routes = {network: route for network, route in routes.items() if remote.routes.get(network) != route}
    lost = [network for network in old_networks if network in remote.routes]
    result = remote.routes
    if routes or lost:
        result = result.copy()
        result.update(routes)
        for network in lost:
            del result[network]
    return _Remote(
        view=view,
        peers=peers,
        routes=result,
        problems=problems,
        changed=Changed(remote.routes, result, frozenset((*routes, *lost))),
    )


def _alike(old: Segment, now: Segment, view: _RemoteView) -> bool:
    """Whether what has stayed of a segment's internal IPs is routed as before."""
    return (
        now.links is old.links
        and now.site == old.site
        and now.called == old.called
        and (not view.called or now.front == old.front)
    )


def _internal_changes(
    gone: Mapping[str, Segment], come: Mapping[str, Segment], view: _RemoteView
) -> tuple[set[IPNetwork], dict[str, set[IPNetwork] | None]]:
    """The internal IPs that are gone, and by segment those that have come; None: all of its, since where they are
    routed to, or from which source, may have changed."""
    removed: set[IPNetwork] = set()
    new: dict[str, set[IPNetwork] | None] = dict.fromkeys(come)
    for key, old in gone.items():
        now = come.get(key)
        if now is None or not _alike(old, now, view):
            removed.update(old.internal)
        else:
            # What has stayed is the same object, and hashes of networks are slow.
            old_ids, new_ids = set(map(id, old.internal)), set(map(id, now.internal))
            removed.update(network for network in old.internal if id(network) not in new_ids)
            new[key] = {network for network in now.internal if id(network) not in old_ids}
    return removed, new
