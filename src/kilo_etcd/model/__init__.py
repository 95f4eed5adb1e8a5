"""The values that everything else uses: nodes, peers, candidates and the snapshot of them all.

Every value is frozen; equality is by content, so `is` may be used as a fast path but never as the meaning.
Nothing here reads a clock, a file or a socket, and nothing here knows how a record looks in etcd
(`store.records`) or how the kernel is told (`kernel`).

A `Snapshot` holds *effective* values: labels and annotations are already applied to the nodes, address
claims are already joined, and what could not be read or contradicts another record has been rejected.
"""

from __future__ import annotations

from kilo_etcd.model.addresses import (
    IPAddress,
    IPInterface,
    IPNetwork,
    is_dns_name,
    is_public,
    is_within,
    overlap,
)
from kilo_etcd.model.candidate import Candidate, CandidateClass, ProbeReport
from kilo_etcd.model.endpoint import SESSION_SECONDS, Endpoint
from kilo_etcd.model.node import Node
from kilo_etcd.model.peer import Peer
from kilo_etcd.model.settings import (
    ACCEPTING,
    CHOICES,
    DEFAULT_INTERFACE,
    DEFAULT_LOCATION,
    DEFAULT_PORT,
    DEFAULT_PREFIX,
    DEFAULT_STATE_DIR,
    DEFAULT_SUBNET,
    LARGEST_MTU,
    PEER_QUERY_PORT,
    SMALLEST_MTU,
    Encapsulate,
    EncryptionStage,
    Granularity,
    InternalIPs,
    MeshSettings,
    parse_value,
)
from kilo_etcd.model.snapshot import ObservedEndpoint, RejectedRecord, Snapshot

__all__ = [
    "ACCEPTING",
    "CHOICES",
    "DEFAULT_INTERFACE",
    "DEFAULT_LOCATION",
    "DEFAULT_PORT",
    "DEFAULT_PREFIX",
    "DEFAULT_STATE_DIR",
    "DEFAULT_SUBNET",
    "LARGEST_MTU",
    "PEER_QUERY_PORT",
    "SESSION_SECONDS",
    "SMALLEST_MTU",
    "Candidate",
    "CandidateClass",
    "Encapsulate",
    "EncryptionStage",
    "Endpoint",
    "Granularity",
    "IPAddress",
    "IPInterface",
    "IPNetwork",
    "InternalIPs",
    "MeshSettings",
    "Node",
    "ObservedEndpoint",
    "Peer",
    "ProbeReport",
    "RejectedRecord",
    "Snapshot",
    "is_dns_name",
    "is_public",
    "is_within",
    "overlap",
    "parse_value",
]
