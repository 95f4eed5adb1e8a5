"""What this host says of others under its short lease: where it sees them, and what it found of their leaders.

Each kind of word has a place of its own, `/kilo/<kind>/<subject>/<this host>`, and any number of subjects. Values only;
`store.session` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from kilo_etcd.model import Snapshot
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import (
    Record,
    RecordError,
    SightingRecord,
    VerdictRecord,
    decode_sighting,
    decode_verdict,
    encode,
)

R = TypeVar("R", bound=Record)

CHANGED_AGAIN = "changed again and again by another writer"
"""What an agent says of its keys that another writer contests."""


def about_status_key(error: str) -> bool:
    """Whether what an agent reports is only that its status is contested, which moves no packet."""
    key, _, rest = error.partition(" ")
    # The name of a location may end in -status too.
    watched = any(f"/{kind}/" in key for kind in ("elections", "endpoints", "verdicts", "stages"))
    return "-status/" in key and not watched and rest.startswith(f"is {CHANGED_AGAIN}")


class Said(Generic[R]):
    """All words of one kind; `values` is the same as keys and bytes, encoded once however often asked for."""

    def __init__(self, root: str, key: Callable[[str], str], decode: Callable[[bytes], R]) -> None:
        self._root = root
        self._key = key
        self._decode = decode
        self.records: Mapping[str, R] = {}
        self.values: Mapping[str, bytes] = {}

    def concern(self, key: str) -> bool:
        """Whether a key is one of those where such things are said."""
        return key.startswith(self._root)

    def replace(self, records: Mapping[str, R]) -> None:
        """Say this, and nothing else."""
        self.records = dict(records)
        self.values = {self._key(subject): encode(record) for subject, record in records.items()}

    def adopt(self, subject: str, value: bytes) -> None:
        """Go on saying what an earlier run said, if it can be read."""
        try:
            self.replace({subject: self._decode(value), **self.records})
        except RecordError:
            return


def sightings(keys: Keys, observer: str) -> Said[SightingRecord]:
    """Where `observer` sees nodes and peers, by their names."""
    return Said(keys.endpoints_root, lambda name: keys.endpoint(name, observer), decode_sighting)


def verdicts(keys: Keys, witness: str) -> Said[VerdictRecord]:
    """What `witness` found of leaders, by their locations."""
    return Said(keys.verdicts_root, lambda location: keys.verdict(location, witness), decode_verdict)


def places(keys: Keys, name: str, snapshot: Snapshot) -> tuple[str, ...]:
    """The keys at which, by `snapshot`, a candidacy or a report stands in the name of a node."""
    return (
        *(
            keys.election(where, name)
            for where, all_ in snapshot.candidates.items()
            for one in all_
            if one.node == name
        ),
        *(
            keys.verdict(where, name)
            for where, all_ in snapshot.verdicts.items()
            for one in all_
            if one.witness == name
        ),
    )
