"""To whom an agent sends packets when an operator asks whether they arrive. Pure.

In a small mesh to everybody. In a large one a leader tries the leaders of other locations, and a member a few nodes
elsewhere, in an order of each host's own, so that together they cover the mesh and none of them floods it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from zlib import crc32

from kilo_etcd.model import IPAddress, Node
from kilo_etcd.topology import Topology, UnknownNode

FEW = 4
"""Nodes that a member tries in a mesh that is larger than what was asked for: half of them leaders, by whom it can be
told whose leader loses what does not arrive."""


def addresses_to_try(topology: Topology, name: str, most: int) -> tuple[IPAddress, ...]:
    """The mesh addresses, in the families that node `name` has itself; of at most `most` nodes."""
    own = topology.snapshot.nodes.get(name)
    try:
        segment = topology.segment_of(name)
    except UnknownNode:
        return ()
    if own is None or most <= 0:
        return ()
    others = [node for node in topology.snapshot.nodes.values() if node.name != name and node.mesh_addresses]
    if len(others) > most:
        far = [node for node in others if topology.segment_of(node.name) is not segment]
        leaders = [node for node in far if topology.segment_of(node.name).leader is node]
        if segment.leader.name == name:
            others = _some(name, leaders if len(leaders) >= most else far, most)
        else:
            others = [*_some(name, leaders, FEW // 2), *_some(name, far, FEW // 2)]
    versions = {address.version for address in own.mesh_addresses}
    chosen = dict.fromkeys(address for node in others for address in node.mesh_addresses)
    return tuple(address for address in chosen if address.version in versions)


def _some(name: str, nodes: Iterable[Node], number: int) -> list[Node]:
    return heapq.nsmallest(number, nodes, key=lambda node: crc32(f"{name} {node.name}".encode()))
