"""Lists what travels in clear although the mesh encrypts: packets to addresses that some host takes for addresses on
its own links, and packets to endpoints of segments with members. For people.

Whether two hosts that have a network with the same numbers share it, or have one each, no record says. Where nothing
says that they share it (`topology.places`), their packets are left to their own links, in both directions.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import islice

from attrs import frozen

from kilo_etcd.model import InternalIPs, IPAddress, Node
from kilo_etcd.topology.granularity import GranularityPolicy
from kilo_etcd.topology.internal import knows
from kilo_etcd.topology.places import Address, Place, Places, both_ways, exchanged, own_endpoints, sent
from kilo_etcd.topology.segments import Segment, Topology, routed_at

MOST_PAIRS = 50_000
"""Pairs of segments with addresses on each other's links that are looked at: in a full mesh on one LAN that is all."""


@frozen
class InClear:
    """An address of a node to which hosts of another segment send in clear."""

    segment: Segment
    senders: tuple[str, ...]
    """Those of the segment's members that do: another member may have no address that the node could mistake."""
    node: Node
    address: IPAddress


def in_clear(topology: Topology) -> Iterator[InClear]:
    """All addresses that are not encrypted between two segments: what the plans of the senders leave to their links."""
    places, _ = Places().after(topology)
    for here, there in islice(_near_each_other(topology, places), MOST_PAIRS):
        for sender, receiver in ((here, there), (there, here)):
            yield from _kept_back(sender, receiver)


def would_be_encrypted(topology: Topology) -> frozenset[IPAddress]:
    """The addresses of nodes that every other segment would send through the tunnels if the mesh encrypted; none of
    them if there is too much to look at."""
    places, _ = Places().after(topology)
    carried = {address.address for place in places.of.values() for address in place.addresses}
    for number, (here, there) in enumerate(_near_each_other(topology, places)):
        if number == MOST_PAIRS:
            return frozenset()
        for sender, receiver in ((here, there), (there, here)):
            carried.difference_update(case.address for case in _kept_back(sender, receiver))
    return frozenset(carried)


def _near_each_other(topology: Topology, places: Places) -> Iterator[tuple[Place, Place]]:
    """The pairs of segments of which one has an address of the other on its links, each pair once."""
    yielded: set[frozenset[str]] = set()
    for key, here in places.of.items():
        for other in sorted({places.key_of(places.holder(address)) for address in places.near(here)}):
            there, pair = places.of.get(other), frozenset({key, other})
            if there is None or pair in yielded:
                continue
            if exchanged(here.segment, there.segment, topology.policy):
                yielded.add(pair)
                yield here, there


def endpoints_in_clear(topology: Topology) -> Iterator[tuple[Node, IPAddress]]:
    """The nodes with an endpoint of their own at which other segments call them in clear, since of a segment with
    members only internal IPs are carried. Such a node refuses no clear text in that family."""
    if topology.internal_ips is not InternalIPs.ENCRYPTED or len(topology.segments) == 1:
        return
    for segment in topology.segments.values():
        if len(segment.members) == 1:
            continue
        for node in segment.members:
            yield from ((node, address) for address in own_endpoints(node))


def back_in_clear(old: Topology, new: Topology) -> tuple[set[IPAddress], set[IPAddress]]:
    """(the addresses that `old` has some segment send through the tunnels, as it encrypts, and that it does not once
    `new` is in force; those that it sends there as before)."""
    places, _ = Places().after(old)
    clear = {
        (case.segment.key, case.address) for case in in_clear(old) if len(case.senders) == len(case.segment.members)
    }
    # To all other senders all is routed that is routed at all: pairs need not be looked at one by one.
    special: dict[str, set[str]] = {}
    for other, place in places.of.items():
        for address in places.near(place):
            special.setdefault(places.key_of(places.holder(address)), set()).add(other)
    sites: dict[str | None, list[str]] = {}
    for other, sender in new.segments.items():
        sites.setdefault(sender.site, []).append(other)
    called = [other for other, sender in new.segments.items() if sender.called or not knows(sender.leader)]
    on, policy = new.internal_ips is not InternalIPs.OFF, old.policy
    leaving: set[IPAddress] = set()
    staying: set[IPAddress] = set()
    for key, place in places.of.items():
        segment = new.segments.get(key)
        near = {*special.get(key, ()), *called, *(() if segment is None else sites[segment.site])} & places.of.keys()
        for destination in place.addresses:
            if next(_senders(places, place, destination, places.of, clear, policy), None) is None:
                continue
            stays = (
                on
                and segment is not None
                and destination.network in segment.internal
                and all(
                    other in new.segments and routed_at(destination.address, segment, new.segments[other], policy)
                    for other in _senders(places, place, destination, near, clear, policy)
                )
            )
            (staying if stays else leaving).add(destination.address)
    return leaving, staying


def _senders(
    places: Places,
    place: Place,
    to: Address,
    of: Iterable[str],
    clear: Container[tuple[str, IPAddress]],
    policy: GranularityPolicy,
) -> Iterator[str]:
    """The segments that send to an address through the tunnel. `clear`: those that do not, with the address."""
    for other in of:
        if (other, to.address) not in clear and exchanged(places.of[other].segment, place.segment, policy):
            yield other


def _kept_back(here: Place, there: Place) -> Iterator[InClear]:
    """The addresses of `there` to which nodes of `here` do not send through the tunnel."""
    addresses = sent(here, there)
    through = {own: {id(address) for address in both_ways(here, there, own, addresses)[0]} for own in here.of}
    for destination in there.addresses:
        if senders := tuple(own for own in here.of if id(destination) not in through[own]):
            yield InClear(here.segment, senders, destination.node, destination.address)
