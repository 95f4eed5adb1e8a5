"""Which internal IPs are routed to nobody, or not everywhere, and what helps: for people (`Topology.unrouted`).

One entry for each address, and one for each network that means hosts of one segment and something else on the links of
another, however many addresses are in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import TYPE_CHECKING

from attrs import field, frozen

from kilo_etcd.model import Granularity, InternalIPs, IPNetwork, Node
from kilo_etcd.topology.internal import REMEDY, knows, share_no_site

if TYPE_CHECKING:
    from kilo_etcd.topology.segments import Segment, Topology

MOST_NAMED = 5


@frozen(kw_only=True)
class Unrouted:
    """An internal IP, or a network of internal IPs, that is not routed."""

    network: IPNetwork
    """A host route for one address."""
    segments: tuple[str, ...]
    """The segments concerned: their locations, or the one node that each consists of."""
    reason: str
    remedy: str

    def __str__(self) -> str:
        what = str(self.network.network_address) if self.network.num_addresses == 1 else str(self.network)
        return f"{what} is not routed: {self.reason}; {self.remedy}"


def unrouted(topology: Topology) -> tuple[Unrouted, ...]:
    """All of it, by address; nothing if internal IPs are not routed at all."""
    if topology.internal_ips is InternalIPs.OFF:
        return ()
    encrypted = topology.internal_ips is InternalIPs.ENCRYPTED
    shared = {} if encrypted else dict(_shared(topology))
    found = {entry.network: entry for entry in shared}
    for segment in topology.segments.values():
        for node in segment.members:
            for entry in _addresses(topology, segment, node):
                # Where all of several concerned have the network itself, that is said of the network once. A network
                # that somebody else states, however wide, hides nothing.
                hidden = len(entry.segments) > 1 and any(
                    _covers(one.network, entry.network) and own >= {*entry.segments} for one, own in shared.items()
                )
                if not hidden:
                    found[entry.network] = entry
    if encrypted:
        found.update((entry.network, entry) for entry in _in_clear(topology))
    return tuple(found[network] for network in sorted(found, key=lambda n: (n.version, n)))


def _in_clear(topology: Topology) -> Iterable[Unrouted]:
    """The addresses that a segment takes for those of its own links, each once."""
    from kilo_etcd.topology.inclear import in_clear

    of: dict[IPNetwork, tuple[Node, list[str]]] = {}
    for segment, node, address in in_clear(topology):
        of.setdefault(ip_network(address), (node, []))[1].append(named(segment))
    for network, (node, near) in of.items():
        first = ", ".join(near[:MOST_NAMED]) + (f" and {len(near) - MOST_NAMED} more" if len(near) > MOST_NAMED else "")
        yield Unrouted(
            network=network,
            segments=tuple(sorted({named(topology.segment_of(node.name)), *near})),
            reason=(
                f"hosts of {first} have it on their own links, and nothing says that {node.name} is meant there: what "
                "they and it send each other by internal IPs is not encrypted"
            ),
            remedy=(
                "if they share that network, give them one label (granularity full), or have them call each other so "
                f"(kgctl annotate {node.name} force-endpoint={network.network_address}:{node.port}); else {REMEDY}"
            ),
        )


def _covers(network: IPNetwork, other: IPNetwork) -> bool:
    return network.version == other.version and other.network_address in network


def named(segment: Segment) -> str:
    """What people call a segment."""
    if len(segment.members) == 1 and segment.key.startswith("node:"):
        return segment.leader.name
    return segment.location or "the default location"


def _addresses(topology: Topology, segment: Segment, node: Node) -> Iterable[Unrouted]:
    """The internal IPs of one node that are routed to nobody."""
    encrypted = topology.internal_ips is InternalIPs.ENCRYPTED  # Then WireGuard's own packets are told by their mark.
    routed, carried = segment.routed.get(node.name, ()), segment.carried.get(node.name, ())
    for ip in node.internal_ips:
        host = next((network for network in carried if network.network_address == ip.ip), None)
        if host is None:
            yield Unrouted(
                network=ip_network(ip.ip),
                segments=(named(segment),),
                reason=_not_carried(node, segment.leader),
                remedy="the mesh address works",
            )
        elif not encrypted and host in segment.front and (callers := _called(topology, segment, ip.version)):
            first = ", ".join(callers[:MOST_NAMED])
            yield Unrouted(
                network=host,
                segments=tuple(callers),
                reason=f"the WireGuard of {first}, called at private endpoints, may hear it there",
                remedy="the mesh address works",
            )
        elif host not in routed and host not in segment.networks:
            why = topology.internals.obstacle(
                ip.ip, node.name, segment.key, topology.settlement, endpoints=not encrypted
            )
            if why is not None:
                holders = topology.internals.holders.get(ip.ip, (node.name,))
                concerned = {named(topology.segment_of(name)) for name in holders}
                yield Unrouted(network=host, segments=tuple(sorted(concerned)), reason=why[0], remedy=why[1])


def _called(topology: Topology, segment: Segment, version: int) -> list[str]:
    """The segments whose leaders are called at private endpoints, so that they may hear this one at its internal IP."""
    granularity = topology.snapshot.granularity
    return sorted(
        named(there)
        for there in topology.segments.values()
        if version in there.called and there is not segment
        and share_no_site(segment.site, there.site, granularity)
    )  # fmt: skip


def _not_carried(node: Node, leader: Node) -> str:
    if older := next((one.name for one in (node, leader) if not knows(one)), None):
        return f"the agent of {older} does not know the setting internal-ips"
    return f"{node.name} and its leader {leader.name} do not reach each other in that family"


@frozen(eq=False)
class _Link:
    """A network that hosts of some segments reach over their own links."""

    network: IPNetwork
    segments: list[Segment] = field(factory=list)
    sites: set[str | None] = field(factory=set)


def _shared(topology: Topology) -> Iterable[tuple[Unrouted, set[str]]]:
    """The networks in question, and the segments whose hosts reach each over their own links."""
    links: dict[tuple[int, int], dict[int, _Link]] = {}
    for segment in topology.segments.values():
        for network in segment.underlay:
            of_length = links.setdefault((network.version, network.prefixlen), {})
            link = of_length.setdefault(int(network.network_address), _Link(network))
            link.segments.append(segment)
            link.sites.add(segment.site)
    hit: dict[IPNetwork, tuple[_Link, dict[str, Segment]]] = {}
    for segment in topology.segments.values():
        for host in (network for networks in segment.carried.values() for network in networks):
            number, bits = int(host.network_address), host.max_prefixlen
            for (version, length), of_length in links.items():
                if version != host.version:
                    continue
                known = of_length.get(number >> (bits - length) << (bits - length))
                if known is not None and _elsewhere(known, segment, topology.snapshot.granularity):
                    hit.setdefault(known.network, (known, {}))[1][segment.key] = segment
    for network, (link, having) in hit.items():
        yield _entry(network, link, having), {named(one) for one in link.segments}


def _elsewhere(link: _Link, segment: Segment, granularity: Granularity) -> bool:
    """Whether somebody reaches the network over his own links who would have to send there through the tunnel."""
    # Nodes of one location have their network in common, and so have those without a label in a full mesh as a rule.
    others = link.sites - {segment.site}
    return any(share_no_site(segment.site, site, granularity) for site in others)


def _entry(network: IPNetwork, link: _Link, having: Mapping[str, Segment]) -> Unrouted:
    there = {one.key: one for one in link.segments}
    names = sorted({named(one) for one in (*there.values(), *having.values())})
    first = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
    if having.keys() <= there.keys():
        reason = f"hosts of {first} have networks with these addresses of their own"
    else:
        near = ", ".join(sorted({named(one) for one in there.values()})[:MOST_NAMED])
        reason = f"hosts of {near} reach these addresses over their own links, so they are not routed from there"
    return Unrouted(
        network=network,
        segments=tuple(names),
        reason=reason,
        remedy=f"give one of them other addresses, or {REMEDY}; the mesh addresses work",
    )
