"""What travels in clear although the mesh encrypts: to addresses that some host takes for its own links'. For people.

Whether two hosts that have a network with the same numbers share it, or have one each, no record says. Where nothing
says that they share it (`topology.places`), their packets are left to their own links, in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator

from kilo_etcd.model import IPAddress, Node
from kilo_etcd.topology.places import Place, Places, exchanged, sent
from kilo_etcd.topology.segments import Segment, Topology

MOST_PAIRS = 50_000
"""Pairs of segments with addresses on each other's links that are looked at: in a full mesh on one LAN that is all."""


def in_clear(topology: Topology) -> Iterator[tuple[Segment, Node, IPAddress]]:
    """(a segment, a node of another one, the node's address on the segment's links) for all that is not encrypted
    between the two."""
    places, _ = Places().after(topology)
    looked = 0
    for here in places.of.values():
        near: dict[str, list[IPAddress]] = {}
        for address in places.near(here):
            near.setdefault(places.key_of(places.holder(address)), []).append(address)
        for key, addresses in near.items():
            there = places.of.get(key)
            if there is None or not exchanged(here.segment, there.segment, topology.snapshot.granularity):
                continue
            looked += 1
            if looked > MOST_PAIRS:
                return
            yield from _of_pair(here, there, addresses)


def _of_pair(here: Place, there: Place, addresses: list[IPAddress]) -> Iterator[tuple[Segment, Node, IPAddress]]:
    through = {one.address for one in sent(here, there)}
    for one in there.addresses:
        if one.address in addresses and one.address not in through:
            yield here.segment, one.node, one.address
