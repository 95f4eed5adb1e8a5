"""What the mesh remembers, in etcd: keys, records, the mirror of them all, and this host's own `session`.

Uses etcd through `kilo_etcd.etcd.api.Client` only, so the in-memory etcd of `kilo_etcd.testing` serves as well.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilo_etcd.store.annotations import ANNOTATIONS
    from kilo_etcd.store.claims import NoAddressLeft
    from kilo_etcd.store.keys import Keys, ParsedKey
    from kilo_etcd.store.mirror import ClusterNotTrusted, LastSeen, Mirror
    from kilo_etcd.store.operator import locations, set_location, snapshot, statuses, unset_location
    from kilo_etcd.store.records import (
        CandidateRecord,
        NodeRecord,
        ObservedEndpointRecord,
        PeerRecord,
        ProbeReportRecord,
        RecordError,
        Role,
        StageRecord,
        StatusRecord,
        Unreachable,
        decode_candidate,
        decode_node,
        decode_peer,
        decode_stage,
        decode_status,
        encode,
    )
    from kilo_etcd.store.session.candidacy import Candidacy
    from kilo_etcd.store.session.node_identity import NameTaken
    from kilo_etcd.store.session.session import Session
    from kilo_etcd.store.view import Holdings, View

__all__ = [
    "ANNOTATIONS",
    "Candidacy",
    "CandidateRecord",
    "ClusterNotTrusted",
    "Holdings",
    "Keys",
    "LastSeen",
    "Mirror",
    "NameTaken",
    "NoAddressLeft",
    "NodeRecord",
    "ObservedEndpointRecord",
    "ParsedKey",
    "PeerRecord",
    "ProbeReportRecord",
    "RecordError",
    "Role",
    "Session",
    "StageRecord",
    "StatusRecord",
    "Unreachable",
    "View",
    "decode_candidate",
    "decode_node",
    "decode_peer",
    "decode_stage",
    "decode_status",
    "encode",
    "locations",
    "set_location",
    "snapshot",
    "statuses",
    "unset_location",
]

_PARTS = (
    "keys",
    "records",
    "annotations",
    "view",
    "claims",
    "operator",
    "mirror",
    "session.candidacy",
    "session.node_identity",
    "session.session",
)


def __getattr__(name: str) -> object:
    # A name's module is imported when the name is first asked for: `kgctl --help` waits for none of them.
    if name in __all__:
        for part in _PARTS:
            module = import_module(f"{__name__}.{part}")
            if hasattr(module, name):
                globals()[name] = value = getattr(module, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
