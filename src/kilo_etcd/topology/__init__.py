"""Decides, and only decides: which nodes share a leader, who leads, which networks are behind whom.

What is named as its module (`graph`) is imported from there. Plans for single hosts are made in `planning`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilo_etcd.topology.election import Election, Reason, elect
    from kilo_etcd.topology.graph import Cluster, Edge, EdgeKind, clusters, edges
    from kilo_etcd.topology.segments import Segment, Topology, UnknownNode, build_topology
    from kilo_etcd.topology.unrouted import Unrouted

__all__ = [
    "Cluster",
    "Edge",
    "EdgeKind",
    "Election",
    "Reason",
    "Segment",
    "Topology",
    "UnknownNode",
    "Unrouted",
    "build_topology",
    "clusters",
    "edges",
    "elect",
]

_PARTS = {
    "election": ("Election", "Reason", "elect"),
    "graph": ("Cluster", "Edge", "EdgeKind", "clusters", "edges"),
    "segments": ("Segment", "Topology", "UnknownNode", "build_topology"),
    "unrouted": ("Unrouted",),
}


def __getattr__(name: str) -> object:
    # A name's module is imported when the name is first asked for: most of kgctl's commands plan for no host.
    for part, names in _PARTS.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"{__name__}.{part}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
