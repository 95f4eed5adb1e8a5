"""Lists internal IPs that are not routed, or not everywhere, with reason and remedy (`Topology.unrouted`). Under
`encrypted` it lists endpoints too, if they are the nodes' own addresses.

One entry for each address, and one for each network that means hosts of one segment and something else on the links of
another, however many addresses are in it. An address that two nodes have is always an entry of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen

from kilo_etcd.base.quoting import command, first_of
from kilo_etcd.model import InternalIPs, IPAddress, IPNetwork, Node, Peer
from kilo_etcd.model.hostplan import Problem
from kilo_etcd.topology.granularity import GranularityPolicy
from kilo_etcd.topology.internal import AT_MESH_ADDRESS, ENDPOINT, REMEDY, endpoints_of, knows, public_endpoints, stated

if TYPE_CHECKING:
    from kilo_etcd.topology.segments import Segment, Topology

MOST_NAMED = 5


@frozen(kw_only=True)
class Unrouted:
    """An internal IP, or a network of internal IPs, that is not routed."""

    network: IPNetwork
    """A host route for one address."""
    nodes: tuple[str, ...] = ()
    """The nodes that have this one address."""
    segments: tuple[str, ...]
    """The segments concerned: their locations, or the one node that each consists of."""
    not_from: tuple[str, ...] = ()
    """The segments that do not route it, or the nodes if not all of a segment do not; empty: no segment does."""
    reason: str
    remedy: str
    outliers: tuple[str, ...] = ()
    """Nodes that differ from the others of their location in this, so that what they have there, or their labels, may
    be a mistake. None: the addresses of two sites are alike, perhaps."""

    def __str__(self) -> str:
        subject = str(self.network.network_address) if self.network.num_addresses == 1 else str(self.network)
        return f"{subject} is not routed: {self.reason}; {self.remedy}"


def unrouted(topology: Topology) -> tuple[Unrouted, ...]:
    """All of it, by address; nothing if internal IPs are not routed at all."""
    if topology.internal_ips is InternalIPs.OFF:
        return ()
    encrypted = topology.internal_ips is InternalIPs.ENCRYPTED
    shared = {} if encrypted else dict(_shared(topology))
    entries = {entry.network: entry for entry in shared}
    ends = endpoint_holders(topology)
    for segment in topology.segments.values():
        for node in segment.members:
            for entry in _addresses(topology, segment, node, ends):
                # If every segment concerned has the network itself, one entry for the network is enough, unless two
                # nodes have the address. A network that another segment states hides no address, however wide it is.
                hidden = len(entry.nodes) == 1 < len(entry.segments) and any(
                    _covers(network_entry.network, entry.network) and own >= {*entry.segments}
                    for network_entry, own in shared.items()
                )
                if not hidden:
                    entries[entry.network] = entry
    if encrypted:
        entries.update((entry.network, entry) for entry in _in_clear(topology))
    elif entries:
        entries.update((entry.network, entry) for entry in _with_encrypted(topology, tuple(entries.values())))
    return tuple(entries[network] for network in sorted(entries, key=lambda n: (n.version, n)))


ENCRYPTED_REMEDY = "with internal-ips encrypted it travels in the tunnels (kgctl mesh set internal-ips encrypted)"
ENCRYPTED_REMEDIES = ENCRYPTED_REMEDY.replace("it travels", "they travel")


def _with_encrypted(topology: Topology, entries: Iterable[Unrouted]) -> Iterator[Unrouted]:
    """Those entries whose addresses `encrypted` would have travel in the tunnels, with that as a further remedy."""
    from kilo_etcd.topology.inclear import would_be_encrypted

    carried = would_be_encrypted(topology)
    for entry in entries:
        single = entry.network.num_addresses == 1
        if single:
            encrypted = entry.network.network_address in carried
        else:
            within = [*topology.internals.within([entry.network])]
            encrypted = bool(within) and carried.issuperset(within)
        if encrypted:
            yield evolve(entry, remedy=f"{entry.remedy}; {ENCRYPTED_REMEDY if single else ENCRYPTED_REMEDIES}")


def _in_clear(topology: Topology) -> Iterable[Unrouted]:
    """The addresses to which some segment sends in clear, each once."""
    from kilo_etcd.topology.inclear import InClear, in_clear

    of: dict[IPNetwork, list[InClear]] = {}
    for case in in_clear(topology):
        of.setdefault(ip_network(case.address), []).append(case)
    for network, cases in of.items():
        node = cases[0].node
        own = topology.segment_of(node.name)
        whole_segments = {named(case.segment) for case in cases if len(case.senders) == len(case.segment.members)}
        lone_nodes = {name for case in cases if len(case.senders) < len(case.segment.members) for name in case.senders}
        near = sorted(whole_segments | lone_nodes)
        together = "if they share that network, give them one label (granularity full)"
        # One forced endpoint takes the place of the public one, for the whole mesh.
        if not any(segment.leader.public_in(network.version) for segment in (own, *(case.segment for case in cases))):
            together += (
                ", or have their leaders call each other at addresses in it (kgctl annotate LEADER "
                f"force-endpoint=ADDRESS:{node.port})"
            )
        yield Unrouted(
            network=network,
            nodes=(node.name,),
            segments=tuple(sorted({named(own), *(named(case.segment) for case in cases)})),
            not_from=tuple(near),
            reason=(
                f"a host of {listed(near)}, or of {node.name}'s own segment, has an address of the others on its own "
                "links, and nothing says that they share that network: what they send each other at these addresses "
                "is not encrypted"
            ),
            remedy=f"{together}. If they do not, {REMEDY}",
        )


def private_leaders(topology: Topology) -> Iterator[Problem]:
    """Leaders that are reached at a private endpoint although another node of the location has a public one: as long as
    they lead, internal IPs of leaders are not routed to and from their location."""
    if topology.internal_ips is not InternalIPs.ROUTED or len(topology.segments) == 1:
        return
    policy = topology.policy
    for segment in topology.segments.values():
        leader = segment.leader
        if len(segment.members) == 1:
            continue
        for version in sorted({address.version for address in endpoints_of(leader, policy)}):
            better = [node.name for node in segment.members if node is not leader and node.public_in(version)]
            own = [str(ip.ip) for ip in leader.internal_ips if ip.version == version]
            # One that stands and does not lead was demoted, which its agent and `kgctl status` say.
            demoted = not leader.leader_wanted and bool({*better} & {*segment.election.order})
            if better and own and not demoted:
                yield Problem(
                    subject=named(segment),
                    text=f"{leader.name} leads, and other segments reach its WireGuard at the private endpoint "
                    f"{leader.endpoint_in(version)}: as long as it leads, its internal IP {own[0]} is not routed, and "
                    f"those of other leaders are not routed from here; {_instead(segment, better)}",
                    about=leader.name,
                )


def _instead(segment: Segment, better: Sequence[str]) -> str:
    """What lets a node with a public endpoint lead instead of the leader."""
    leader = segment.leader
    if leader.leader_wanted:
        return f"let {listed(better)} lead, with a public endpoint: kgctl annotate {leader.name} leader-"
    return (
        f"{listed(better)} would lead with a public endpoint, and is not a candidate: is the host up? "
        "systemctl status kilo-etcd there"
    )


def endpoint_holders(topology: Topology) -> dict[IPAddress, tuple[str, ...]]:
    """Each address at which other segments, or outside peers, may be reached -> whose WireGuard that is."""
    result: dict[IPAddress, dict[str, None]] = {}
    policy = topology.policy
    for segment in topology.segments.values():
        for node in (segment.leader, *(node for node, _ in segment.takeover_candidates)):
            for address in endpoints_of(node, policy):
                result.setdefault(address, {})[node.name] = None
    subjects: dict[str, Node | Peer] = {**topology.snapshot.nodes}
    subjects.update((f"peer {peer.name}", peer) for peer in topology.peers.values())
    for name, subject in subjects.items():
        for address in public_endpoints(subject):
            result.setdefault(address, {})[name] = None
    return {address: tuple(names) for address, names in result.items()}


def obstacle(
    topology: Topology, address: IPAddress, node: str, segment: Segment, ends: Mapping[IPAddress, tuple[str, ...]]
) -> tuple[str, str] | None:
    """Why an internal IP of `node` is not routed, with nodes named, and the remedy; None: it may be routed."""
    encrypted = topology.internal_ips is InternalIPs.ENCRYPTED  # Then WireGuard's own packets are told by their mark.
    reason = topology.internals.obstacle(address, node, segment.key, topology.allocation, endpoints=not encrypted)
    if reason != ENDPOINT:
        return reason
    owners = ends.get(address, ())
    return (
        f"other segments reach {'its WireGuard' if owners == (node,) else f'the WireGuard of {listed(owners)}'} there",
        f"{AT_MESH_ADDRESS}; {ENDPOINT_REMEDY}",
    )


ENDPOINT_REMEDY = (
    "reached at a public endpoint (kgctl annotate NODE force-endpoint=...), or as a member of a location that another "
    "node leads, it is routed"
)


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    return first_of(names, MOST_NAMED)


def _covers(network: IPNetwork, other: IPNetwork) -> bool:
    return network.version == other.version and other.network_address in network


def named(segment: Segment) -> str:
    """What people call a segment."""
    if len(segment.members) == 1 and segment.key.startswith("node:"):
        return segment.leader.name
    location = segment.location or "the default location"
    if segment.other_family:
        return f"{location} (its nodes with IPv{segment.leader.internal_ips[0].version} only)"
    return location


def _addresses(
    topology: Topology, segment: Segment, node: Node, ends: Mapping[IPAddress, tuple[str, ...]]
) -> Iterable[Unrouted]:
    """The internal IPs of one node that are not routed."""
    encrypted = topology.internal_ips is InternalIPs.ENCRYPTED  # Then WireGuard's own packets are told by their mark.
    routed, carried = segment.routed.get(node.name, ()), segment.carried.get(node.name, ())
    for ip in node.internal_ips:
        host = next((network for network in carried if network.network_address == ip.ip), None)
        if host is None:
            yield Unrouted(
                network=ip_network(ip.ip),
                nodes=(node.name,),
                segments=(named(segment),),
                reason=_not_carried(node, segment.leader),
                remedy=AT_MESH_ADDRESS,
            )
        elif not encrypted and host in segment.front and (callers := _called(topology, segment, ip.version)):
            yield Unrouted(
                network=host,
                nodes=(node.name,),
                segments=tuple(callers),
                not_from=tuple(callers),
                reason=f"the WireGuard of {listed(callers)}, called at private endpoints, may receive its packets "
                f"there",
                remedy=f"{AT_MESH_ADDRESS}; give the leaders there a public endpoint (kgctl annotate NODE "
                "force-endpoint=...)",
            )
        elif host not in routed and host not in segment.network_set:
            why = obstacle(topology, ip.ip, node.name, segment, ends)
            if why is not None:
                holders = topology.internals.holders.of(ip.ip) or (node.name,)
                concerned = {named(topology.segment_of(name)) for name in holders}
                yield Unrouted(
                    network=host, nodes=holders, segments=tuple(sorted(concerned)), reason=why[0], remedy=why[1]
                )


def _called(topology: Topology, segment: Segment, version: int) -> list[str]:
    """The segments whose leaders are called at private endpoints, so that they may receive this one's packets from its
    internal IP."""
    policy = topology.policy
    return sorted(
        named(other)
        for other in topology.segments.values()
        if version in other.called and other is not segment
        and policy.share_no_site(segment.site, other.site)
    )  # fmt: skip


def _not_carried(node: Node, leader: Node) -> str:
    if older := next((candidate.name for candidate in (node, leader) if not knows(candidate)), None):
        return f"the agent of {older} does not know the setting internal-ips"
    return f"{node.name} and its leader {leader.name} do not reach each other in that family"


@frozen(eq=False)
class _Link:
    """A network that hosts of some segments reach over their own links."""

    network: IPNetwork
    segments: list[Segment] = field(factory=list)
    sites: set[str | None] = field(factory=set)


def _shared(topology: Topology) -> Iterable[tuple[Unrouted, set[str]]]:
    """The networks concerned, and the segments whose hosts reach each over their own links."""
    links: dict[tuple[int, int], dict[int, _Link]] = {}
    for segment in topology.segments.values():
        for network in segment.underlay:
            of_length = links.setdefault((network.version, network.prefixlen), {})
            link = of_length.setdefault(int(network.network_address), _Link(network))
            link.segments.append(segment)
            link.sites.add(segment.site)
    policy = topology.policy
    hit: dict[IPNetwork, tuple[_Link, dict[str, Segment]]] = {}
    for segment in topology.segments.values():
        for host in (network for networks in segment.carried.values() for network in networks):
            number, bits = int(host.network_address), host.max_prefixlen
            for (version, length), of_length in links.items():
                if version != host.version:
                    continue
                host_link = of_length.get(number >> (bits - length) << (bits - length))
                if host_link is not None and _elsewhere(host_link, segment, host, policy):
                    hit.setdefault(host_link.network, (host_link, {}))[1][segment.key] = segment
    for network, (link, having) in hit.items():
        yield _entry(network, link, having), {named(segment) for segment in link.segments}


def _elsewhere(link: _Link, segment: Segment, host: IPNetwork, policy: GranularityPolicy) -> bool:
    """Whether somebody reaches the network over his own links who would have to send there through the tunnel."""
    # Nodes of one location have their network in common.
    if any(policy.share_no_site(segment.site, site) for site in link.sites - {segment.site}):
        return True
    # Nodes without a label in a full mesh may have, so that an address with another reason has that one only.
    return (
        len(link.segments) > 1
        and host in segment.internal
        and policy.share_no_site(segment.site, segment.site)
        and segment in link.segments
    )


def _entry(network: IPNetwork, link: _Link, having: Mapping[str, Segment]) -> Unrouted:
    link_segments = {segment.key: segment for segment in link.segments}
    names = sorted({named(segment) for segment in (*link_segments.values(), *having.values())})
    near = sorted({named(segment) for segment in link_segments.values()})
    reaching = _Reaching.of(network, link_segments.values(), having.values())
    if not having.keys() <= link_segments.keys():
        reason = f"{reaching}, so they are not routed from there"
    elif len(link.sites) == 1:
        reason = (
            f"{listed(names)}, which have no label, are attached to this network, or to several with the same addresses"
        )
    else:
        reason = f"hosts of {listed(names)} have networks with these addresses of their own"
    first = ""
    if reaching.by_a_route:
        first = (
            f"if {listed(reaching.by_a_route)} should not, remove the route or the address there (ip route show "
            f"{network}), or "
        )
    elif reaching.perhaps_of is not None:
        node, home = reaching.perhaps_of
        if home:
            correct = command("kgctl location set", node.name, home)
        elif node.default_location:
            correct = f"--location on {node.name}"
        else:
            correct = command("kgctl location unset", node.name)
        first = (
            f"of its location {node.name} alone is on that network: if its label is wrong, correct it ({correct}), or "
        )
    return Unrouted(
        network=network,
        segments=tuple(names),
        not_from=tuple(near),
        reason=reason,
        remedy=f"{first}give one of them other addresses, or {REMEDY}; the hosts are to be "
        "reached at their mesh addresses",
        outliers=reaching.outliers,
    )


@frozen(kw_only=True)
class _Reaching:
    """Who reaches addresses within a network, which some segments have, over their own links."""

    whole_segments: tuple[str, ...]
    """The segments all of whose members do."""
    lone_nodes: tuple[str, ...]
    """The members of the others that do."""
    by_a_route: tuple[str, ...]
    """Those among these whose own internal IPs are on no such link."""
    perhaps_of: tuple[Node, str] | None
    """The one member of a larger location whose internal IP is there, and the location whose members all are."""

    outliers: tuple[str, ...]
    """Nodes of larger locations that differ in this from all others there."""

    @classmethod
    def of(cls, network: IPNetwork, segments: Iterable[Segment], having: Iterable[Segment]) -> _Reaching:
        """The segments that state the network, and those that have the addresses."""
        addresses = _Numbers.of(
            ip.ip
            for segment in having
            for node in segment.members
            for ip in node.internal_ips
            if ip.version == network.version and ip.ip in network
        )
        whole_segments: list[Segment] = []
        lone_nodes: list[Node] = []
        by_a_route: list[str] = []
        outliers: list[str] = []
        strangers: list[Node] = []
        for segment in segments:
            nodes = [node for node in segment.members if addresses.any_in(stated(node))]
            if len(nodes) == len(segment.members):
                whole_segments.append(segment)
                continue
            lone_nodes += nodes
            by_route_here = [
                node.name for node in nodes if not addresses.any_in(ip.network for ip in node.internal_ips)
            ]
            by_a_route += by_route_here
            if len(nodes) == 1 < len(segment.members) - 1:
                outliers += by_route_here
                if not by_route_here and _is_strange(nodes[0], segment.members):
                    strangers += nodes
        homes = [segment for segment in whole_segments if len(segment.members) > 1 and _all_are_on(network, segment)]
        perhaps_of = (strangers[0], homes[0].location) if len(strangers) == len(homes) == 1 else None
        return cls(
            whole_segments=tuple(sorted(map(named, whole_segments))),
            lone_nodes=tuple(sorted(node.name for node in lone_nodes)),
            by_a_route=tuple(sorted(by_a_route)),
            perhaps_of=None if by_a_route else perhaps_of,
            outliers=tuple(sorted(outliers if by_a_route or perhaps_of is None else [perhaps_of[0].name])),
        )

    def __str__(self) -> str:
        whole = f"hosts of {listed(self.whole_segments)}" if self.whole_segments else ""
        hosts = " and ".join(filter(None, (whole, listed(self.lone_nodes))))
        if len(self.lone_nodes) == 1 and not whole:
            return f"{hosts} reaches these addresses over its own links"
        return f"{hosts} reach these addresses over their own links"


@frozen
class _Numbers:
    """Addresses of one family, sorted, to ask whether any is within a network."""

    version: int
    numbers: Sequence[int]

    @classmethod
    def of(cls, addresses: Iterable[IPAddress]) -> _Numbers:
        items = list(addresses)
        return cls(items[0].version if items else 0, sorted(map(int, items)))

    def any_in(self, networks: Iterable[IPNetwork]) -> bool:
        for network in networks:
            if network.version == self.version:
                at = bisect_left(self.numbers, int(network.network_address))
                if at < len(self.numbers) and self.numbers[at] <= int(network.broadcast_address):
                    return True
        return False


def _is_strange(node: Node, members: Collection[Node]) -> bool:
    """Whether all other members share networks of their internal IPs, each with another one, and none with `node`."""
    number = Counter(network for member in members for network in {ip.network for ip in member.internal_ips})
    return all(any(number[ip.network] > 1 for ip in member.internal_ips) is (member is not node) for member in members)


def _all_are_on(network: IPNetwork, segment: Segment) -> bool:
    """Whether the internal IPs of all members are within a network."""
    return all(
        any(ip.version == network.version and ip.ip in network for ip in node.internal_ips) for node in segment.members
    )
