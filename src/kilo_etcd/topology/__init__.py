"""Decides, and only decides: who leads, what the mesh looks like, what each host's kernel shall hold."""

from kilo_etcd.topology.election import Election, Reason, elect
from kilo_etcd.topology.graph import Cluster, Edge, EdgeKind, clusters, edges, graph
from kilo_etcd.topology.guard import guard
from kilo_etcd.topology.hostplan import HostPlan, PeerPlan, Problem, RoutePlan, Via, WayOut
from kilo_etcd.topology.peerplan import peer_plan
from kilo_etcd.topology.plan import host_plan
from kilo_etcd.topology.render import render
from kilo_etcd.topology.segments import Segment, Topology, UnknownNode, build_topology
from kilo_etcd.topology.walk import Hop, Path, walk, walk_both

__all__ = [
    "Cluster",
    "Edge",
    "EdgeKind",
    "Election",
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
    "Via",
    "WayOut",
    "build_topology",
    "clusters",
    "edges",
    "elect",
    "graph",
    "guard",
    "host_plan",
    "peer_plan",
    "render",
    "walk",
    "walk_both",
]
