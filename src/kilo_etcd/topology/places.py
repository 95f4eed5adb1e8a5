"""Decides which addresses of nodes are reached through the tunnels under `encrypted`, by which segments, whatever the
stage. Pure.

Packets to an address go through the tunnel if no other node has it, it is not granted to another owner, and it is not
taken for something near: one that the sender's segment reaches over its own links only if the two share those links on
purpose: one label in a full mesh, or the sender's WireGuard calls the node at an address on them. Decision 0032.

All of it is a function of the topology, and the same for all hosts; `Places` follows its changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from attrs import field, frozen

from kilo_etcd.base.mappings import changes, copied
from kilo_etcd.model import DEFAULT_LOCATION, IPAddress, IPNetwork, Node
from kilo_etcd.topology.chosen_endpoint import called_at
from kilo_etcd.topology.granularity import GranularityPolicy
from kilo_etcd.topology.holders import Holders
from kilo_etcd.topology.internal import Links, carried, stated
from kilo_etcd.topology.prefix_allocation import PrefixAllocation, each_hosts_own
from kilo_etcd.topology.segments import Segment, Topology, host_network, segment_key


@frozen(eq=False)
class Address:
    """One address of a node."""

    node: Node
    address: IPAddress
    network: IPNetwork


@frozen(eq=False)
class Place:
    """A segment, with its addresses and links."""

    segment: Segment
    of: Mapping[str, tuple[Address, ...]]
    """Member -> at which addresses it may be sent to through the tunnels."""
    links: Links
    """What its hosts reach over their own links."""

    @property
    def addresses(self) -> Iterator[Address]:
        """Of all members."""
        return chain.from_iterable(self.of.values())


NOWHERE: Mapping[str, Place] = {}


@frozen(eq=False)
class Places:
    """The segments of one topology."""

    topology: Topology | None = None
    of: Mapping[str, Place] = NOWHERE
    """Segment -> its addresses and links."""
    _holders: Holders = field(factory=Holders)

    def key_of(self, name: str) -> str:
        """The segment that a node is in; empty: it is none."""
        snapshot = None if self.topology is None else self.topology.snapshot
        node = None if snapshot is None else snapshot.nodes.get(name)
        return "" if snapshot is None or node is None else segment_key(node, snapshot)

    def holder(self, address: IPAddress) -> str:
        """The first node that has an address; empty: none."""
        return next(iter(self._holders.of(address)), "")

    def near(self, place: Place) -> Iterator[IPAddress]:
        """The addresses of nodes on the links of a segment."""
        return self._holders.within(place.links.networks)

    def after(self, topology: Topology) -> tuple[Places, frozenset[str]]:
        """Those of a later topology, and the segments about which something differs."""
        last = self.topology
        if last is topology:
            return self, frozenset()
        if last is None or last.allocation.mesh != topology.allocation.mesh:
            return Places(topology, *_from_scratch(topology)), frozenset({*self.of, *topology.segments})
        keys = set(topology.changed if topology.base is last.identity else changes(last.segments, topology.segments))
        gone, come = [], []
        for key in keys:
            old, new = (
                () if segment is None else segment.members
                for segment in (last.segments.get(key), topology.segments.get(key))
            )
            gone += _without(old, new)
            come += _without(new, old)
        holders, moved = self._holders.after(_addresses_by_name(gone), _addresses_by_name(come))
        if topology.allocation is not last.allocation:
            moved.update(holders.within(_granted_otherwise(last.allocation, topology.allocation)))
        nodes = topology.snapshot.nodes
        names = {*chain.from_iterable((*self._holders.of(a), *holders.of(a)) for a in moved)}
        keys.update(segment_key(node, topology.snapshot) for name in names if (node := nodes.get(name)) is not None)
        places = copied(self.of)
        for key in keys:
            if (segment := topology.segments.get(key)) is None:
                del places[key]
            else:
                places[key] = _place(segment, topology, holders, self.of.get(key), names)
        return Places(topology, places, holders), frozenset(keys)


def own_addresses(node: Node) -> Iterator[IPAddress]:
    """The internal IPs of a node, and its own endpoints."""
    yield from (ip.ip for ip in node.internal_ips)
    yield from own_endpoints(node)


def own_endpoints(node: Node) -> Iterator[IPAddress]:
    """The endpoints that are addresses of a node's own, in a network that it is attached to, and no internal IPs of it.
    Not that of a router that forwards its port."""
    addresses = {ip.ip for ip in node.internal_ips}
    for endpoint in node.endpoints:
        address = endpoint.address
        if (
            address is not None
            and address not in addresses
            and any(network.version == address.version and address in network for network in stated(node))
        ):
            addresses.add(address)
            yield address


def has_address(node: Node, address: IPAddress) -> bool:
    """Whether a packet to an address is for the node itself."""
    return address in node.mesh_addresses or address in own_addresses(node)


def sent(here: Place, there: Place, addresses: Iterable[Address] | None = None) -> list[Address]:
    """The addresses of `there`, or of those given, that segment `here` sends through the tunnel."""
    all_addresses = list(there.addresses if addresses is None else addresses)
    links = here.links
    near = [place for place in all_addresses if links.hold(place.address.version, int(place.address))]
    if not near:
        return all_addresses
    location = there.segment.location
    if location == here.segment.location and location != DEFAULT_LOCATION:
        return all_addresses
    leader = there.segment.leader
    called = called_at(here.segment.leader, leader)
    # If a node's WireGuard is called at one address over a common link, its other addresses there are its own too.
    called_node = leader.name if any(place.node is leader and place.address == called for place in near) else None
    alike = {id(place) for place in near if place.node.name != called_node}
    return [place for place in all_addresses if id(place) not in alike]


def both_ways(
    here: Place, there: Place, own: str, addresses: Iterable[Address]
) -> tuple[list[Address], set[IPAddress]]:
    """(those of `addresses`, the addresses that `here` sends, to which its node `own` does; own addresses that `there`
    sends).

    Two nodes send to each other through the tunnel in both directions or in none, family by family: what one of them
    sends in clear the other could not answer through the tunnel. The leader of either passes on what goes between the
    two by the same table as its own packets, so all of its segment sends nothing where the leader does not.
    """
    mine, leader = here.of[own], here.segment.leader.name
    ours = mine if leader == own else (*mine, *here.of[leader])
    answered = set(map(id, sent(there, here, ours))) if ours else set()
    given_ids = set(map(id, addresses))
    closed = {address.address.version for address in ours if id(address) not in answered}
    partly = {
        (address.node.name, address.address.version) for address in there.addresses if id(address) not in given_ids
    }
    closed.update(version for name, version in partly if name == there.segment.leader.name)
    if closed or partly:
        addresses = (
            address
            for address in addresses
            if address.address.version not in closed and (address.node.name, address.address.version) not in partly
        )
    return list(addresses), {address.address for address in mine if id(address) in answered}


def exchanged(segment: Segment, other: Segment, policy: GranularityPolicy) -> bool:
    """Whether the hosts of two segments exchange packets through tunnels between the two."""
    return segment.key != other.key and policy.tunnel_between(segment.leader, other.leader)


def _without(members: Iterable[Node], others: Iterable[Node]) -> list[Node]:
    other_ids = set(map(id, others))
    return [node for node in members if id(node) not in other_ids]


def _addresses_by_name(nodes: Iterable[Node]) -> Iterator[tuple[str, IPAddress]]:
    return ((node.name, address) for node in nodes for address in own_addresses(node))


def _granted_otherwise(old: PrefixAllocation, new: PrefixAllocation) -> Iterator[IPNetwork]:
    for owner in changes(old.granted, new.granted):
        yield from {*old(owner)} ^ {*new(owner)}


def _from_scratch(topology: Topology) -> tuple[dict[str, Place], Holders]:
    holders, _ = Holders().after((), _addresses_by_name(topology.snapshot.nodes.values()))
    return {key: _place(segment, topology, holders, None, ()) for key, segment in topology.segments.items()}, holders


def _place(
    segment: Segment, topology: Topology, holders: Holders, old: Place | None, suspected: Iterable[str]
) -> Place:
    """`old` is what it was before, from which unchanged parts are taken: not of the nodes `suspected`."""
    alone = len(segment.members) == 1
    before: Mapping[str, Node] = {}
    if old is not None and (len(old.segment.members) == 1) is alone:
        before = {node.name: node for node in old.segment.members if node.name not in suspected}
    by_member = {}
    for node in segment.members:
        unchanged = old is not None and before.get(node.name) is node
        carried_now = segment.carried.get(node.name)
        if alone:
            networks: Iterable[IPNetwork] = () if unchanged else map(host_network, own_addresses(node))
            reusable = unchanged
        else:
            networks = map(host_network, carried(node, segment.leader)) if carried_now is None else carried_now
            reusable = (
                unchanged
                and carried_now is not None
                and old is not None
                and carried_now is old.segment.carried.get(node.name)
            )
        if reusable and old is not None:
            by_member[node.name] = old.of[node.name]
            continue
        # Of a network that is the same object nothing has changed either.
        former = (
            {id(address.network): address for address in old.of[node.name]} if unchanged and old is not None else {}
        )
        by_member[node.name] = tuple(
            former.get(id(network)) or Address(node, network.network_address, network)
            for network in networks
            if id(network) in former
            or (
                len(holders.of(network.network_address)) == 1
                and _belongs_to(network.network_address, node, segment.key, topology.allocation)
            )
        )
    links = segment.links
    if not links.networks:
        # Where internal IPs are not routed the topology has none.
        links = Links.of(segment.members)
    return Place(segment, by_member, links)


def _belongs_to(address: IPAddress, node: Node, segment: str, allocation: PrefixAllocation) -> bool:
    """Whether an address can belong to no one but the node, apart from what others have near them."""
    if each_hosts_own(address):
        return False
    for subnet in allocation.mesh:
        if subnet.version == address.version and address in subnet:
            return False
    granted = allocation.granted_at(address)
    return granted is None or granted.owner in (("node", node.name), ("location", segment))


def is_offered(topology: Topology, address: IPAddress) -> bool:
    """Whether an address is in a network that a node or a location offers."""
    granted = topology.allocation.granted_at(address)
    return granted is not None and granted.owner[0] != "peer"
