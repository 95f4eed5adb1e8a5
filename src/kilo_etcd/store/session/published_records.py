"""What this host publishes of others under its short lease: observed endpoints and probe reports.

Each kind of record has keys of its own, `/kilo/<kind>/<subject>/<this host>`, for any number of subjects. Values only;
`store.session.session` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from kilo_etcd.model import Snapshot
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import (
    ObservedEndpointRecord,
    ProbeReportRecord,
    Record,
    RecordError,
    decode_observed_endpoint,
    decode_probe_report,
    encode,
)

R = TypeVar("R", bound=Record)

CHANGED_AGAIN = "changed again and again by another writer"
"""The sentence on keys of an agent that another writer contests."""


def about_status_key(error: str) -> bool:
    """Whether what an agent reports is only that its status is contested, which moves no packet."""
    key, _, rest = error.partition(" ")
    # The name of a location may end in -status too.
    watched = any(f"/{kind}/" in key for kind in ("elections", "endpoints", "probe-reports", "stages"))
    return "-status/" in key and not watched and rest.startswith(f"is {CHANGED_AGAIN}")


class PublishedRecords(Generic[R]):
    """All records of one kind; `values` is the same as keys and bytes, encoded once however often asked for."""

    def __init__(self, root: str, key: Callable[[str], str], decode: Callable[[bytes], R]) -> None:
        self._root = root
        self._key = key
        self._decode = decode
        self.records: Mapping[str, R] = {}
        self.values: Mapping[str, bytes] = {}

    def concern(self, key: str) -> bool:
        """Whether a key is one of this kind."""
        return key.startswith(self._root)

    def replace(self, records: Mapping[str, R]) -> None:
        """Say this, and nothing else."""
        self.records = dict(records)
        self.values = {self._key(subject): encode(record) for subject, record in records.items()}

    def adopt(self, subject: str, value: bytes) -> None:
        """Go on publishing what an earlier run published, if it can be read."""
        try:
            self.replace({subject: self._decode(value), **self.records})
        except RecordError:
            return


def observed_endpoints(keys: Keys, observer: str) -> PublishedRecords[ObservedEndpointRecord]:
    """Where `observer` sees nodes and peers, by their names."""
    return PublishedRecords(keys.endpoints_root, lambda name: keys.endpoint(name, observer), decode_observed_endpoint)


def probe_reports(keys: Keys, prober: str) -> PublishedRecords[ProbeReportRecord]:
    """The probe reports of `prober`, by location."""
    return PublishedRecords(
        keys.probe_reports_root, lambda location: keys.probe_report(location, prober), decode_probe_report
    )


def places(keys: Keys, name: str, snapshot: Snapshot) -> tuple[str, ...]:
    """The keys at which, by `snapshot`, there is a candidacy or a report in the name of a node."""
    return (
        *(
            keys.election(where, name)
            for where, all_ in snapshot.candidates.items()
            for candidate in all_
            if candidate.node == name
        ),
        *(
            keys.probe_report(where, name)
            for where, all_ in snapshot.probe_reports.items()
            for report in all_
            if report.prober == name
        ),
    )
