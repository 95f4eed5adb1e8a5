"""The shape of the mesh: which nodes share a leader, which one it is, and which networks are behind it.

`build_topology` is a pure function of a snapshot. Given the topology of an earlier snapshot it does the same
work only for what differs, and what does not differ is the same object as before; that is how a host follows
one change in a mesh of thousands within a millisecond or two. The first topology is computed as the
difference to an empty one, so there is one way of computing, not two.

A location's nodes must be able to reach each other, so nodes that share no address family are not put
into one segment: of one location, those with an internal IP of the mesh's first family form the segment,
those with one of the other family only form a second, and a node with none is a segment of its own.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import TypeVar

from attrs import evolve, field, frozen

from kilo_etcd.base.mappings import changes
from kilo_etcd.model import ACCEPTING, InternalIPs, IPAddress, IPNetwork, Node, Peer, Snapshot
from kilo_etcd.model.hostplan import Problem
from kilo_etcd.topology.election import Election, elect
from kilo_etcd.topology.granularity import POLICIES, GranularityPolicy
from kilo_etcd.topology.internal import (
    Internals,
    Links,
    carried,
    endpoints_of,
    knows,
    public_endpoints,
    site_of,
    stated,
)
from kilo_etcd.topology.prefix_allocation import NetworkOwner, NetworkRequest, PrefixAllocation, allocate, network_key
from kilo_etcd.topology.unrouted import Unrouted, unrouted

K = TypeVar("K")
V = TypeVar("V")


class UnknownNode(KeyError):
    """There is no node of that name in the topology."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"there is no node {self.name!r} in the mesh; `kgctl status` lists those that are"


@frozen(kw_only=True)
class Segment:
    """The nodes that share one leader, and all that other segments need to know of them."""

    key: str
    location: str
    members: tuple[Node, ...]
    """By name."""
    leader: Node
    takeover_candidates: tuple[tuple[Node, tuple[str, ...]], ...]
    """Members who say that nobody gets through the leader, with whom each has tried to reach: those get to know it as a
    WireGuard peer, so that it can run a takeover check. None if there is one report alone that nobody confirms: its
    prober's own tunnel is the more likely cause, and what may be the far end of a tunnel is routed to nobody (`front`).
    """
    election: Election
    subnets: Mapping[str, tuple[IPNetwork, ...]]
    """Member -> the networks behind it that are granted to it; members with none are not in it."""
    location_networks: tuple[IPNetwork, ...]
    """The granted `allowed_location_ips` of all members."""
    networks: tuple[IPNetwork, ...]
    """All networks behind the leader, without the mesh addresses."""
    allowed: tuple[IPNetwork, ...]
    """The allowed IPs of the leader as others' WireGuard peer: mesh addresses and networks."""
    addresses: Mapping[str, tuple[IPNetwork, ...]] = field(factory=dict, eq=False, repr=False)
    """Member -> its mesh addresses, as host routes."""
    carried: Mapping[str, tuple[IPNetwork, ...]] = field(factory=dict, eq=False, repr=False)
    """Member -> its internal IPs that packets can travel to by way of the leader, as host routes."""
    internal: tuple[IPNetwork, ...] = ()
    """Of these, those that the mesh routes, as host routes. Not to segments whose `underlay` holds them (`routed_at`).
    """
    routed: Mapping[str, tuple[IPNetwork, ...]] = field(factory=dict, eq=False, repr=False)
    """`internal` by member."""
    reach: tuple[IPNetwork, ...] = field(default=(), eq=False, repr=False)
    """`allowed` and `internal` together."""
    links: Links = field(factory=Links, eq=False, repr=False)
    """What the members reach over their own links."""
    called: frozenset[int] = field(default=frozenset(), eq=False, repr=False)
    """The families in which others reach the leader at a private endpoint: their WireGuard sends from an internal IP
    then, and is answered there."""

    @property
    def site(self) -> str | None:
        """The location over whose network the members reach others; None: over none (a node without internal IPs)."""
        return site_of(self.leader)

    @property
    def other_family(self) -> bool:
        """Whether it holds those nodes of a location that have no internal IP of the mesh's first family."""
        return self.key.startswith(_OTHER_FAMILY)

    @property
    def front(self) -> tuple[IPNetwork, ...]:
        """Those of `internal` that may be the far end of a tunnel: of the leader and the takeover candidates."""
        ends = (self.leader, *(node for node, _ in self.takeover_candidates))
        return tuple(network for node in ends for network in self.routed.get(node.name, ()))

    @cached_property
    def network_set(self) -> frozenset[IPNetwork]:
        """`networks`, to ask for one: each member may have some."""
        return frozenset(self.networks)

    def reached_at(self, node: Node) -> list[IPNetwork]:
        """A member's internal IPs that other segments may send to, as host routes: those that are routed, and those
        within a network that the location offers."""
        networks = list(self.routed.get(node.name, ()))
        if self.networks:
            networks = [network for network in networks if network not in self.network_set]
        for network in self.location_networks:
            inside = (ip.ip for ip in node.internal_ips if ip.version == network.version and ip.ip in network)
            networks += (host for host in map(host_network, inside) if host not in networks)
        return networks

    @property
    def underlay(self) -> tuple[IPNetwork, ...]:
        """What the members reach over their own links: no address within is routed to this segment."""
        return self.links.networks

    @property
    def internal_families(self) -> set[int]:
        """The families of `internal`, which is sorted by them."""
        return {network.version for network in (*self.internal[:1], *self.internal[-1:])}

    @property
    def next_in_line(self) -> str | None:
        """The node that leads when the leader's candidacy ends."""
        return self.election.next_in_line


@frozen(kw_only=True)
class Topology:
    """The mesh as all agents see it that have seen this snapshot."""

    snapshot: Snapshot
    segments: dict[str, Segment]
    peers: Mapping[str, Peer]
    """The outside peers in force, with the allowed IPs that are granted to them."""
    problems: tuple[Problem, ...] = ()
    allocation: PrefixAllocation = field(eq=False, repr=False)
    identity: object = field(factory=object, eq=False, repr=False)
    base: object = field(default=None, eq=False, repr=False)
    """`identity` of the topology that this one was computed from."""
    changed: frozenset[str] = field(default=frozenset(), eq=False, repr=False)
    """Keys of the segments that differ from those of `base`."""
    internals: Internals = field(factory=Internals, eq=False, repr=False)
    internal_families: frozenset[int] = frozenset()
    """The families of the internal IPs that are routed."""
    unaware: frozenset[str] = frozenset()
    """The nodes whose agents do not know the setting internal-ips: they would drop what others send them by it. As long
    as there are any the setting is not put into force."""
    encrypting: int = 0
    """How many nodes take part in `encrypted`. Once there are any, the setting stays in force, and who does not know it
    is left out alone: an agent of an older version must not have the whole mesh send in clear."""

    @property
    def policy(self) -> GranularityPolicy:
        """What follows from the mesh's granularity."""
        return POLICIES[self.snapshot.granularity]

    @property
    def internal_ips(self) -> InternalIPs:
        """What is in force of the setting."""
        return _in_force(self.snapshot, self.unaware, self.encrypting)

    @property
    def left_out(self) -> frozenset[str]:
        """The nodes that have no part in the setting that is in force, since their agents do not know it."""
        return self.unaware if self.internal_ips is not InternalIPs.OFF else frozenset()

    def segment_of(self, name: str) -> Segment:
        """The segment that a node is in. UnknownNode: it is not in the mesh."""
        node = self.snapshot.nodes.get(name)
        if node is None:
            raise UnknownNode(name)
        return self.segments[segment_key(node, self.snapshot)]

    @property
    def families(self) -> frozenset[int]:
        """The families (4, 6) in which packets travel."""
        return self.allocation.versions.union(subnet.version for subnet in self.snapshot.subnets)

    @cached_property
    def unrouted(self) -> tuple[Unrouted, ...]:
        """The internal IPs that are not routed, or not everywhere, and why: for people. Looked up when it is asked."""
        return unrouted(self)

    def __repr__(self) -> str:
        snapshot = self.snapshot
        return f"<Topology r{snapshot.revision} {snapshot.granularity} {len(self.segments)} segments>"


def host_network(address: IPAddress) -> IPNetwork:
    """The /32 or /128 of an address."""
    if isinstance(address, IPv4Address):
        return IPv4Network((int(address), 32))
    return IPv6Network((int(address), 128))


def segment_key(node: Node, snapshot: Snapshot) -> str:
    """The key of the segment that a node belongs to; it depends on nothing but the node and the mesh's settings."""
    if not (node.internal_ips and POLICIES[snapshot.granularity].leader_per_location):
        return f"node:{node.name}"
    return _location_keys(node.location)[node.internal_ip(_first_family(snapshot)) is None]


def _location_keys(location: str) -> tuple[str, str]:
    return f"location:{location}", f"{_OTHER_FAMILY}{location}"


_OTHER_FAMILY = "location, other family:"


def _first_family(snapshot: Snapshot) -> int:
    return 6 if snapshot.subnets and all(subnet.version == 6 for subnet in snapshot.subnets) else 4


def build_topology(snapshot: Snapshot, previous: Topology | None = None) -> Topology:
    """The topology of `snapshot`; equal with and without `previous`, which only saves work."""
    if previous is None or _settings(previous.snapshot) != _settings(snapshot):
        previous = _nothing(snapshot)
    before = previous.snapshot
    changed = changes(before.nodes, snapshot.nodes, snapshot.nodes_changed)
    unaware = _unaware(previous.unaware, changed, snapshot)
    encrypting = previous.encrypting + _encrypting(snapshot, changed) - _encrypting(before, changed)
    in_force = _in_force(snapshot, unaware, encrypting)
    if in_force is not previous.internal_ips and before.nodes:
        return build_topology(snapshot)

    members: dict[str, dict[str, Node]] = {}
    for name in changed:
        for nodes in (before.nodes, snapshot.nodes):
            if (node := nodes.get(name)) is not None:
                key = segment_key(node, snapshot)
                if key not in members:
                    segment = previous.segments.get(key)
                    members[key] = {} if segment is None else {member.name: member for member in segment.members}
                if nodes is before.nodes:
                    members[key].pop(name, None)
                else:
                    members[key][name] = node

    requests = dict(_requests_of_nodes(changed, snapshot))
    requests.update(_requests_of_locations(members))
    refused, clashes = _clashing_keys(snapshot, previous, changed)
    if refused or before.peers is not snapshot.peers or len(previous.peers) != len(before.peers):
        requests.update(_requests_of_peers(before, snapshot, refused))
    allocation = allocate(
        previous.allocation,
        requests,
        lambda: (address for node in snapshot.nodes.values() for address in node.mesh_addresses),
        addresses_changed=any(_addresses(before, name) != _addresses(snapshot, name) for name in changed),
    )

    touched = set(members)
    for location in (
        *changes(before.candidates, snapshot.candidates),
        *changes(before.leaders, snapshot.leaders),
        *changes(before.probe_reports, snapshot.probe_reports),
    ):
        touched.update(key for key in _location_keys(location) if key in previous.segments)
    if allocation is not previous.allocation:
        for kind, name in changes(previous.allocation.granted, allocation.granted):
            if kind == "node" and name in snapshot.nodes:
                touched.add(segment_key(snapshot.nodes[name], snapshot))
            elif kind == "location":
                touched.add(name)

    segments = previous.segments.copy()
    really = set()
    routed = in_force is not InternalIPs.OFF
    for key in sorted(touched):
        old = segments.get(key)
        nodes_of = members.get(key) if key in members else {m.name: m for m in old.members} if old else {}
        new = _segment(key, nodes_of, snapshot, allocation, old, routed=routed) if nodes_of else None
        if old != new:
            really.add(key)
            if new is None:
                del segments[key]
            else:
                segments[key] = new
    peers = _peers(snapshot, previous, allocation, refused)
    internals, families = previous.internals, previous.internal_families
    if routed:
        internals = _route_internal_ips(previous, snapshot, changed, allocation, peers, segments, really)
        families = _internal_families(previous, segments, really)
    return Topology(
        snapshot=snapshot,
        segments=segments,
        peers=peers,
        internals=internals,
        internal_families=families,
        problems=allocation.problems + clashes,
        allocation=allocation,
        base=previous.identity,
        changed=frozenset(really),
        unaware=unaware,
        encrypting=encrypting,
    )


def _settings(snapshot: Snapshot) -> tuple[object, ...]:
    """What all depends on: if it changes all is made anew."""
    return snapshot.granularity, snapshot.subnets, snapshot.internal_ips


def _nothing(snapshot: Snapshot) -> Topology:
    """The topology of no nodes at all, under the same settings."""
    empty = evolve(
        snapshot, revision=0, nodes={}, peers={}, candidates={}, leaders={}, probe_reports={}, observed_endpoints={}
    )
    return Topology(snapshot=empty, segments={}, peers={}, allocation=PrefixAllocation(snapshot.subnets))


def _route_internal_ips(
    previous: Topology,
    snapshot: Snapshot,
    changed: list[str],
    allocation: PrefixAllocation,
    peers: Mapping[str, Peer],
    segments: dict[str, Segment],
    really: set[str],
) -> Internals:
    """Give each segment the internal IPs that are routed to it, where that may differ from before; what differs is in
    `segments` and `really` afterwards."""
    before = previous.snapshot
    old_nodes = [node for name in changed if (node := before.nodes.get(name)) is not None]
    new_nodes = [node for name in changed if (node := snapshot.nodes.get(name)) is not None]
    changed_peers = changes(previous.peers, peers)
    old_segments = [segment for key in really if (segment := previous.segments.get(key)) is not None]
    new_segments = [segment for key in really if (segment := segments.get(key)) is not None]
    internals, suspects = previous.internals.after(
        old_nodes,
        new_nodes,
        _endpoints(old_nodes, [peer for n in changed_peers if (peer := previous.peers.get(n))], old_segments, snapshot),
        _endpoints(new_nodes, [peer for name in changed_peers if (peer := peers.get(name))], new_segments, snapshot),
    )
    if allocation is not previous.allocation:
        for owner in changes(previous.allocation.granted, allocation.granted):
            networks = {*previous.allocation(owner)} ^ {*allocation(owner)}
            suspects.update(internals.within(networks))
    suspected = {name for address in suspects for name in internals.holders.of(address)}
    affected = {*really, *(segment_key(snapshot.nodes[name], snapshot) for name in suspected)}
    for key in affected:
        if (segment := segments.get(key)) is not None:
            old = previous.segments.get(key)
            segments[key] = new = _with_internal(segment, old, suspected, internals, allocation)
            if old is None or new != old:
                really.add(key)
            else:
                segments[key] = old
                really.discard(key)
    return internals


def _with_internal(
    segment: Segment, old: Segment | None, suspected: set[str], internals: Internals, allocation: PrefixAllocation
) -> Segment:
    """The segment with what is routed to it, given its `old` self, and the nodes about whom something has changed."""
    routed = {}
    for name, networks in segment.carried.items():
        if old is not None and name not in suspected and old.carried.get(name) is networks:
            routed[name] = old.routed[name]
        else:
            routed[name] = tuple(
                network
                for network in networks
                if internals.obstacle(network.network_address, name, segment.key, allocation) is None
            )
    internal = tuple(network for networks in routed.values() for network in networks)
    if segment.networks:
        internal = tuple(network for network in internal if network not in segment.network_set)
    internal = _sorted(internal, () if old is None else old.internal)
    if old is not None and internal == old.internal:
        internal = old.internal
    if old is not None and internal is old.internal and segment.allowed is old.allowed:
        reach = old.reach
    else:
        before = () if old is None else old.reach
        reach = _sorted((*segment.allowed, *internal), before) if internal else segment.allowed
    return evolve(segment, internal=internal, routed=routed, reach=reach)


def _endpoints(
    nodes: Iterable[Node], peers: Iterable[Peer], segments: Iterable[Segment], snapshot: Snapshot
) -> Iterator[IPAddress]:
    policy = POLICIES[snapshot.granularity]
    for node in nodes:
        yield from public_endpoints(node)
    for peer in peers:
        yield from public_endpoints(peer)
    for segment in segments:
        for node in (segment.leader, *(node for node, _ in segment.takeover_candidates)):
            yield from endpoints_of(node, policy)


def _internal_families(previous: Topology, segments: Mapping[str, Segment], really: set[str]) -> frozenset[int]:
    families = previous.internal_families
    lost = {version for key in really if (old := previous.segments.get(key)) for version in old.internal_families}
    now = {version for key in really if (new := segments.get(key)) for version in new.internal_families}
    for version in lost - now:
        if not any(version in segment.internal_families for segment in segments.values()):
            families = families - {version}
    return families if now <= families else families | now


def routed_at(address: IPAddress, segment: Segment, other: Segment, policy: GranularityPolicy) -> bool:
    """Whether an internal IP of a member of `segment` is routed to it from segment `other`."""
    network = host_network(address)
    return (
        network in segment.internal
        and knows(other.leader)
        and policy.share_no_site(segment.site, other.site)
        and not other.links.hold(address.version, int(address))
        and not (address.version in other.called and network in segment.front)
    )


def _unaware(before: frozenset[str], changed: list[str], snapshot: Snapshot) -> frozenset[str]:
    now = {name for name in changed if (node := snapshot.nodes.get(name)) is not None and node.underlay is None}
    return before if now == before.intersection(changed) else before.difference(changed) | now


def _encrypting(snapshot: Snapshot, names: Iterable[str]) -> int:
    return sum((node := snapshot.nodes.get(name)) is not None and node.encryption in ACCEPTING for name in names)


def _in_force(snapshot: Snapshot, unaware: Collection[str], encrypting: int) -> InternalIPs:
    setting = snapshot.internal_ips
    if unaware and not (setting is InternalIPs.ENCRYPTED and encrypting):
        return InternalIPs.OFF
    return setting


def _addresses(snapshot: Snapshot, name: str) -> tuple[IPAddress, ...]:
    node = snapshot.nodes.get(name)
    return () if node is None else node.mesh_addresses


def _segment(
    key: str,
    members: Mapping[str, Node],
    snapshot: Snapshot,
    allocation: PrefixAllocation,
    old: Segment | None,
    *,
    routed: bool,
) -> Segment:
    """The segment of these nodes, but for the internal IPs that are routed to it, which depend on other segments."""
    ordered = tuple(members[name] for name in sorted(members))
    location = ordered[0].location
    election = elect(
        ordered,
        snapshot.candidates.get(location, ()),
        snapshot.leaders.get(location, ()),
        snapshot.probe_reports.get(location, ()),
    )
    subnets = {node.name: granted for node in ordered if (granted := allocation(("node", node.name)))}
    location_networks = allocation(("location", key))
    networks = _sorted((*location_networks, *(network for granted in subnets.values() for network in granted)))
    leader = members[election.leader]
    addresses = _same_as_before(ordered, old, _addresses_of, lambda node: tuple(map(host_network, node.mesh_addresses)))
    allowed = _sorted(
        (*(network for host_networks in addresses.values() for network in host_networks), *networks),
        () if old is None else old.allowed,
    )
    takeover_candidates = _takeover_candidates(members, election.leader, snapshot)
    ends = (leader, *(node for node, _ in takeover_candidates)) if routed else ()
    policy = POLICIES[snapshot.granularity]
    if old is not None and allowed == old.allowed:
        allowed = old.allowed
    return Segment(
        key=key,
        location=location,
        members=ordered,
        leader=leader,
        takeover_candidates=takeover_candidates,
        election=election,
        subnets=subnets,
        location_networks=location_networks,
        networks=networks,
        allowed=allowed,
        addresses=addresses,
        carried=_carried(ordered, leader, old) if routed else {},
        reach=allowed,
        links=_links(ordered, old) if routed else Links(),
        called=frozenset(a.version for node in ends for a in endpoints_of(node, policy)),
    )


def _same_as_before(
    members: tuple[Node, ...],
    old: Segment | None,
    values_of: Callable[[Segment], Mapping[str, tuple[IPNetwork, ...]]],
    make: Callable[[Node], tuple[IPNetwork, ...]],
) -> Mapping[str, tuple[IPNetwork, ...]]:
    """Something of each member, made anew for those alone that `old` has not as they are. To compare the same objects
    costs next to nothing."""
    if old is None:
        return {node.name: make(node) for node in members}
    before, values = {node.name: node for node in old.members}, values_of(old)
    return {node.name: values[node.name] if before.get(node.name) is node else make(node) for node in members}


def _addresses_of(segment: Segment) -> Mapping[str, tuple[IPNetwork, ...]]:
    return segment.addresses


def _carried_of(segment: Segment) -> Mapping[str, tuple[IPNetwork, ...]]:
    return segment.carried


def _carried(members: tuple[Node, ...], leader: Node, old: Segment | None) -> Mapping[str, tuple[IPNetwork, ...]]:
    if old is not None and old.leader is not leader:
        host_networks = {network.network_address: network for networks in old.carried.values() for network in networks}
        result = {}
        for node in members:
            addresses = carried(node, leader)
            networks = tuple(host_networks.get(address) or host_network(address) for address in addresses)
            before = old.carried.get(node.name, ())
            # Networks that are the same object as before are not examined again (`_with_internal`).
            result[node.name] = before if networks == before else networks
        return result
    return _same_as_before(members, old, _carried_of, lambda node: tuple(map(host_network, carried(node, leader))))


def _links(members: tuple[Node, ...], old: Segment | None) -> Links:
    if old is not None and len(members) >= len(old.members):
        before = {node.name: node for node in old.members}
        changed = [node for node in members if before.get(node.name) is not node]
        if (
            len(members) - len(changed) >= len(old.members) - len(changed)
            and all(
                stated(node) == stated(before[node.name])
                if node.name in before
                else stated(node) <= {*old.links.networks}
                for node in changed
            )
            and before.keys() <= {node.name for node in members}
        ):
            return old.links
    links = Links.of(members)
    return old.links if old is not None and old.links.networks == links.networks else links


def _takeover_candidates(
    members: Mapping[str, Node], leader: str, snapshot: Snapshot
) -> tuple[tuple[Node, tuple[str, ...]], ...]:
    location = members[leader].location
    reports = snapshot.probe_reports.get(location, ())
    if not reports:
        return ()
    held = {
        candidate.create_revision for candidate in snapshot.candidates.get(location, ()) if candidate.node == leader
    }
    reports = tuple(
        report for report in reports if report.prober != leader and report.leader == leader and report.candidacy in held
    )
    if len(reports) == 1 and reports[0].unconfirmed:
        return ()
    return tuple((members[report.prober], report.targets) for report in reports if report.prober in members)


def _sorted(networks: tuple[IPNetwork, ...], before: tuple[IPNetwork, ...] = ()) -> tuple[IPNetwork, ...]:
    """The networks in order. `before`, in order, saves work: as a rule few are other objects than in it."""
    before_ids, present_ids = set(map(id, before)), set(map(id, networks))
    kept = [network for network in before if id(network) in present_ids]
    come = [network for network in networks if id(network) not in before_ids]
    if len(kept) < 4 * len(come) or len(kept) + len(come) != len(networks):
        return tuple(sorted(networks, key=network_key))
    for network in come:
        insort(kept, network, key=network_key)
    return tuple(kept)


def _requests_of_nodes(
    names: Iterable[str], snapshot: Snapshot
) -> Iterator[tuple[NetworkOwner, tuple[NetworkRequest, ...]]]:
    for name in names:
        node = snapshot.nodes.get(name)
        if node is None or not node.subnets:
            yield ("node", name), ()
        else:
            yield ("node", name), (NetworkRequest((0, node.registered_revision, name), f"node {name}", node.subnets),)


def _requests_of_locations(
    members: Mapping[str, Mapping[str, Node]],
) -> Iterator[tuple[NetworkOwner, tuple[NetworkRequest, ...]]]:
    for key, nodes in members.items():
        yield (
            ("location", key),
            tuple(
                NetworkRequest(
                    (0, node.registered_revision, name),
                    f"node {name} (allowed-location-ips)",
                    node.allowed_location_ips,
                )
                for name, node in sorted(nodes.items())
                if node.allowed_location_ips
            ),
        )


def _requests_of_peers(
    before: Snapshot, snapshot: Snapshot, refused: frozenset[str]
) -> Iterator[tuple[NetworkOwner, tuple[NetworkRequest, ...]]]:
    for name in {*before.peers, *snapshot.peers}:
        peer = snapshot.peers.get(name)
        if peer is None or name in refused or not peer.allowed_ips:
            yield ("peer", name), ()
        else:
            yield (
                ("peer", name),
                (NetworkRequest((1, peer.registered_revision, name), f"peer {name}", peer.allowed_ips),),
            )


def _clashing_keys(
    snapshot: Snapshot, previous: Topology, changed: list[str]
) -> tuple[frozenset[str], tuple[Problem, ...]]:
    """The outside peers whose public key is a node's, or that of an older peer. A view has left them out already; a
    snapshot that was made by other means must not bring the kernel one key for two."""
    if not snapshot.peers:
        return frozenset(), ()
    by_key: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in sorted(snapshot.peers, key=lambda name: (snapshot.peers[name].registered_revision, name)):
        first = by_key.setdefault(snapshot.peers[name].public_key, name)
        if first != name:
            refused[name] = f"peer {first}"
    if (
        previous.snapshot.peers is snapshot.peers
        and len(previous.peers) == len(snapshot.peers)
        and not any(node.public_key in by_key for name in changed if (node := snapshot.nodes.get(name)))
    ):
        return frozenset(), ()
    for node in snapshot.nodes.values():
        if node.public_key in by_key:
            refused[by_key[node.public_key]] = f"node {node.name}"
    problems = tuple(
        Problem(
            subject=name, text=f"peer {name} is left out: it has the public key of {refused[name]}; give it its own"
        )
        for name in sorted(refused)
    )
    return frozenset(refused), problems


def _peers(
    snapshot: Snapshot, previous: Topology, allocation: PrefixAllocation, refused: frozenset[str]
) -> Mapping[str, Peer]:
    same_peers = (
        snapshot.peers is previous.snapshot.peers and len(previous.peers) == len(snapshot.peers) and not refused
    )
    if same_peers and allocation is previous.allocation:
        return previous.peers
    result: dict[str, Peer] = {}
    for name, peer in snapshot.peers.items():
        if name not in refused:
            granted = allocation(("peer", name))
            effective = peer if granted == peer.allowed_ips else evolve(peer, allowed_ips=granted)
            old = previous.peers.get(name)
            result[name] = old if old is not None and old == effective else effective
    return result
