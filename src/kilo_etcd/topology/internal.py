"""Which internal IPs the mesh routes: those that cannot be mistaken for anything else, anywhere (decision 0029).

An internal IP of a node is routed to the node's segment if

* its segment can carry it: packets to and from it travel between the node and its leader (`carried`),
* no other node holds it, nobody was granted a network that it is in, and it is not an address of the mesh,
* no tunnel between segments has its far end there: WireGuard's own packets would go into the tunnel (`endpoints_of`),
* and, at the segment that would send there, nothing that a host reaches over its own links is meant by it (`Links`).

The first three are the same for the whole mesh and are what `Segment.internal` holds; the last differs from segment to
segment. All of it is a function of the snapshot. An index over all nodes saves the work for what has not changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from attrs import field, frozen

from kilo_etcd.base.mappings import copied
from kilo_etcd.model import DEFAULT_LOCATION, IPAddress, IPNetwork, Node, Peer
from kilo_etcd.topology.granularity import GranularityPolicy
from kilo_etcd.topology.holders import Holders
from kilo_etcd.topology.next_hop import next_hop
from kilo_etcd.topology.prefix_allocation import PrefixAllocation, each_hosts_own


def knows(node: Node) -> bool:
    """Whether a node's agent is of a version that knows the setting internal-ips: only those state their links."""
    return node.underlay is not None


def carried(own: Node, leader: Node) -> tuple[IPAddress, ...]:
    """The internal IPs at which others can reach node `own`, whose segment `leader` leads."""
    if not (knows(own) and knows(leader)):
        return ()
    if own.name == leader.name:
        return tuple(ip.ip for ip in own.internal_ips)
    result = []
    for ip in own.internal_ips:
        way = None if leader.internal_ip(ip.version) is None else next_hop(own, leader, ip.version)
        if way is not None and not way.trouble:
            result.append(ip.ip)
    return tuple(result)


def endpoints_of(node: Node, policy: GranularityPolicy) -> Iterator[IPAddress]:
    """Where other segments may reach the WireGuard of a node that leads or is about to.

    A node that is seen behind its NAT is reached there, and not at the private endpoint that it states.
    """
    for endpoint in node.endpoints:
        address = endpoint.address
        if address is not None and not endpoint.public and not node.observed_in(address.version):
            yield address
    hidden = node.endpoint is None or not node.endpoint.public
    if hidden and node.location == DEFAULT_LOCATION and not policy.default_location_is_a_site:
        # A node with no label may share a network with it all the same.
        yield from (ip.ip for ip in node.internal_ips if not node.observed_in(ip.version))


def public_endpoints(subject: Node | Peer) -> Iterator[IPAddress]:
    """Where others reach a node or an outside peer whatever its role is."""
    stated = (subject.endpoint,) if isinstance(subject, Peer) else subject.endpoints
    for endpoint in (*stated, *subject.observed_endpoints):
        if endpoint is not None and endpoint.address is not None and (endpoint.public or isinstance(subject, Peer)):
            yield endpoint.address


def site_of(node: Node) -> str | None:
    """The location over whose network a node reaches others; None: it has no internal IP, and is attached to none."""
    return node.location if node.internal_ips else None


def stated(node: Node) -> set[IPNetwork]:
    """What a node reaches over its own links: the network of an internal IP counts whether it is stated or not."""
    return {*(node.underlay or ()), *(ip.network for ip in node.internal_ips)}


@frozen(eq=False)
class Links:
    """The networks that a segment's hosts reach over their own links, to ask whether an address is within."""

    networks: tuple[IPNetwork, ...] = ()
    """Sorted, none within another."""
    _starts: Mapping[int, Sequence[int]] = field(factory=dict)
    _ends: Mapping[int, Sequence[int]] = field(factory=dict)

    @classmethod
    def of(cls, members: Iterable[Node]) -> Links:
        """Of all that the members state. The network of an internal IP counts whether it is stated or not."""
        networks: set[IPNetwork] = set()
        for node in members:
            networks |= stated(node)
        return cls.made_of(collapsed(networks))

    @classmethod
    def made_of(cls, networks: tuple[IPNetwork, ...]) -> Links:
        """Of networks that are sorted and disjoint."""
        starts: dict[int, list[int]] = {4: [], 6: []}
        ends: dict[int, list[int]] = {4: [], 6: []}
        for network in networks:
            starts[network.version].append(int(network.network_address))
            ends[network.version].append(int(network.broadcast_address))
        return cls(networks, starts, ends)

    def hold(self, version: int, number: int) -> bool:
        """Whether an address, as a number, is within."""
        starts = self._starts.get(version, ())
        at = bisect_right(starts, number) - 1
        return at >= 0 and self._ends[version][at] >= number

    def holding(self, address: IPAddress) -> IPNetwork | None:
        """The network that an address is in."""
        return next((n for n in self.networks if n.version == address.version and address in n), None)


@frozen(eq=False)
class Internals:
    """All internal IPs of the mesh, and all addresses that are endpoints in use, how often each."""

    holders: Holders = field(factory=Holders)
    """Of internal IPs."""
    endpoints: Mapping[IPAddress, int] = field(factory=dict)

    def after(
        self,
        gone: Iterable[Node],
        come: Iterable[Node],
        endpoints_gone: Iterable[IPAddress],
        endpoints_come: Iterable[IPAddress],
    ) -> tuple[Internals, set[IPAddress]]:
        """The index after a change, and the addresses whose result may differ now."""
        held, moved = self.holders.after(
            ((node.name, ip.ip) for node in gone for ip in node.internal_ips),
            ((node.name, ip.ip) for node in come for ip in node.internal_ips),
        )
        balance = Counter(endpoints_come)
        balance.subtract(Counter(endpoints_gone))
        shifted = {address: more for address, more in balance.items() if more}
        if not moved and not shifted:
            return self, set()
        counts = self.endpoints
        if shifted:
            counts = copied(counts)
            for address, more in shifted.items():
                count = counts.get(address, 0) + more
                if count:
                    counts[address] = count
                else:
                    del counts[address]
        return Internals(held, counts), {*moved, *shifted}

    def within(self, networks: Iterable[IPNetwork]) -> Iterator[IPAddress]:
        """The internal IPs within some networks."""
        return self.holders.within(networks)

    def obstacle(
        self, address: IPAddress, node: str, segment: str, allocation: PrefixAllocation, *, endpoints: bool = True
    ) -> tuple[str, str] | None:
        """Why an internal IP of `node` is routed to nobody, and the remedy; None: it may be routed.
        `endpoints`: whether being one is an obstacle."""
        if len(holders := self.holders.of(address)) > 1:
            more = f", {len(holders) - MOST_HOLDERS} more" if len(holders) > MOST_HOLDERS else ""
            return f"{' and '.join(holders[:MOST_HOLDERS])}{more} have it", REMEDY
        if endpoints and address in self.endpoints:
            return ENDPOINT
        if each_hosts_own(address):
            return "it is each host's own (loopback, link-local, multicast)", REMEDY
        if any(subnet.version == address.version and address in subnet for subnet in allocation.mesh):
            return "it is within the mesh's subnet", REMEDY
        granted = allocation.granted_at(address)
        if granted is not None and granted.owner not in (("node", node), ("location", segment)):
            return f"it is within {granted.network} of {granted.by}", f"take it out of that, or {REMEDY}"
        return None


def collapsed(networks: Iterable[IPNetwork]) -> tuple[IPNetwork, ...]:
    """The same addresses in as few networks as can be, sorted."""
    distinct = set(networks)
    four = [network for network in distinct if isinstance(network, IPv4Network)]
    six = [network for network in distinct if isinstance(network, IPv6Network)]
    return (*collapse_addresses(four), *collapse_addresses(six))


MOST_HOLDERS = 5
"""Nodes with one address that are named; the others are counted."""
AT_MESH_ADDRESS = "the host is to be reached at its mesh address"
"""What is meant to be: whether packets arrive there, a topology does not know."""
ENDPOINT = ("other segments reach a WireGuard device there", AT_MESH_ADDRESS)
"""`topology.unrouted` says whose."""
REMEDY = "name other addresses of the hosts with kgctl annotate NODE force-internal-ip=..."
