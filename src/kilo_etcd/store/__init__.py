"""What the mesh remembers, in etcd: keys, records, the mirror of them all, and this host's own session.

Speaks to etcd through `kilo_etcd.etcd.api.Client` only, so the in-memory etcd of `kilo_etcd.testing` serves as well.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilo_etcd.store.claims import NoAddressLeft
    from kilo_etcd.store.effective import ANNOTATIONS
    from kilo_etcd.store.keys import Keys, ParsedKey
    from kilo_etcd.store.mirror import HeldOff, LastSeen, Mirror
    from kilo_etcd.store.operator import locations, set_location, snapshot, statuses, unset_location
    from kilo_etcd.store.owner import NameTaken
    from kilo_etcd.store.records import (
        CandidateRecord,
        NodeRecord,
        PeerRecord,
        RecordError,
        Role,
        SightingRecord,
        StageRecord,
        StatusRecord,
        Unreachable,
        VerdictRecord,
        decode_candidate,
        decode_node,
        decode_peer,
        decode_stage,
        decode_status,
        encode,
    )
    from kilo_etcd.store.session import Candidacy, Session
    from kilo_etcd.store.view import Holdings, View

__all__ = [
    "ANNOTATIONS",
    "Candidacy",
    "CandidateRecord",
    "HeldOff",
    "Holdings",
    "Keys",
    "LastSeen",
    "Mirror",
    "NameTaken",
    "NoAddressLeft",
    "NodeRecord",
    "ParsedKey",
    "PeerRecord",
    "RecordError",
    "Role",
    "Session",
    "SightingRecord",
    "StageRecord",
    "StatusRecord",
    "Unreachable",
    "VerdictRecord",
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

_PARTS = ("keys", "records", "effective", "view", "claims", "operator", "mirror", "owner", "session")


def __getattr__(name: str) -> object:
    # A name's module is imported when the name is first asked for: `kgctl --help` waits for none of them.
    if name in __all__:
        for part in _PARTS:
            module = import_module(f"{__name__}.{part}")
            if hasattr(module, name):
                globals()[name] = found = getattr(module, name)
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
