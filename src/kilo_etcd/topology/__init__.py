"""Decides, and only decides: who leads, what the mesh looks like, what each host's kernel shall hold."""

from kilo_etcd.topology.election import Election, Reason, elect
from kilo_etcd.topology.guard import guard
from kilo_etcd.topology.hostplan import HostPlan, PeerPlan, Problem, RoutePlan, Via
from kilo_etcd.topology.plan import host_plan
from kilo_etcd.topology.segments import Segment, Topology, UnknownNode, build_topology

__all__ = [
    "Election",
    "HostPlan",
    "PeerPlan",
    "Problem",
    "Reason",
    "RoutePlan",
    "Segment",
    "Topology",
    "UnknownNode",
    "Via",
    "build_topology",
    "elect",
    "guard",
    "host_plan",
]
