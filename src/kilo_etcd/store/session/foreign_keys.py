"""Finds the keys that other writers have put in this host's name: candidacies, probe reports and observed endpoints
that are not its own, readable or not, and any key, a leader record too, that is under no lease and should be under one
of this host's.

The mirror may be behind this host's own writes, so what is found is deleted only if it was not written since."""

from __future__ import annotations

from collections.abc import Set

from kilo_etcd.etcd.api import KeyValue
from kilo_etcd.model import Snapshot
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import Mirror


class ForeignKeys:
    """In the name of node `name`. The snapshot's records are searched only if it has others than before."""

    def __init__(self, keys: Keys, name: str) -> None:
        self._keys = keys
        self._name = name
        self._places_of: tuple[object, object, tuple[str, ...]] = (None, None, ())
        """Candidacies and probe reports of all, and the keys among them that have this host's name."""
        self._led_in: tuple[object, tuple[str, ...]] = (None, ())
        """The leaders on record, and the locations where this host is one."""

    def find(self, snapshot: Snapshot, mirror: Mirror, *, known_keys: Set[str]) -> list[KeyValue]:
        """Those that `mirror`, which has given `snapshot`, holds besides `known_keys`."""
        if self._places_of[0] is not snapshot.candidates or self._places_of[1] is not snapshot.probe_reports:
            keys = _places(self._keys, self._name, snapshot)
            self._places_of = snapshot.candidates, snapshot.probe_reports, keys
        observed = [self._keys.endpoint(name, self._name) for name in mirror.observed_by(self._name)]
        kvs = (mirror.kv(key) for key in {*self._places_of[2], *observed, *mirror.faulty(self._name)} - known_keys)
        return [kv for kv in kvs if kv is not None]

    def led(self, snapshot: Snapshot) -> tuple[str, ...]:
        """The locations of which this host is on record as a leader."""
        if self._led_in[0] is not snapshot.leaders:
            locations = tuple(where for where, names in snapshot.leaders.items() if self._name in names)
            self._led_in = snapshot.leaders, locations
        return self._led_in[1]


def _places(keys: Keys, name: str, snapshot: Snapshot) -> tuple[str, ...]:
    """The keys at which, by `snapshot`, there is a candidacy or a report in the name of a node."""
    return (
        *(
            keys.election(where, name)
            for where, candidates in snapshot.candidates.items()
            for candidate in candidates
            if candidate.node == name
        ),
        *(
            keys.probe_report(where, name)
            for where, reports in snapshot.probe_reports.items()
            for report in reports
            if report.prober == name
        ),
    )
