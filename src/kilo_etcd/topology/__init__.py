"""Decides, and only decides: which nodes lead, the shape of the mesh, and what each host's kernel must hold.

Functions with the name of their module (`graph`, `route_filter`, `render`, `walk`) are imported from there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilo_etcd.topology.election import Election, Reason, elect
    from kilo_etcd.topology.graph import Cluster, Edge, EdgeKind, clusters, edges
    from kilo_etcd.topology.hostplan import (
        Encryption,
        Exemption,
        ExitRoute,
        HostPlan,
        PeerPlan,
        Problem,
        RoutePlan,
        Via,
    )
    from kilo_etcd.topology.peerplan import peer_plan
    from kilo_etcd.topology.plan import host_plan
    from kilo_etcd.topology.segments import Segment, Topology, UnknownNode, build_topology
    from kilo_etcd.topology.unrouted import Unrouted
    from kilo_etcd.topology.walk import Hop, Path, walk_both

__all__ = [
    "Cluster",
    "Edge",
    "EdgeKind",
    "Election",
    "Encryption",
    "Exemption",
    "ExitRoute",
    "Hop",
    "HostPlan",
    "Path",
    "PeerPlan",
    "Problem",
    "Reason",
    "RoutePlan",
    "Segment",
    "Topology",
    "UnknownNode",
    "Unrouted",
    "Via",
    "build_topology",
    "clusters",
    "edges",
    "elect",
    "host_plan",
    "peer_plan",
    "walk_both",
]

_PARTS = {
    "election": ("Election", "Reason", "elect"),
    "graph": ("Cluster", "Edge", "EdgeKind", "clusters", "edges"),
    "hostplan": ("Encryption", "Exemption", "HostPlan", "PeerPlan", "Problem", "RoutePlan", "Via", "ExitRoute"),
    "peerplan": ("peer_plan",),
    "plan": ("host_plan",),
    "segments": ("Segment", "Topology", "UnknownNode", "build_topology"),
    "unrouted": ("Unrouted",),
    "walk": ("Hop", "Path", "walk_both"),
}


def __getattr__(name: str) -> object:
    # A name's module is imported when the name is first asked for: most of kgctl's commands plan for no host.
    for part, names in _PARTS.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"{__name__}.{part}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
