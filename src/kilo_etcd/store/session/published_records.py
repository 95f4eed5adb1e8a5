"""What this host publishes under its short lease: of itself a status and a stage of the switch to `encrypted`, and of
others observed endpoints and probe reports.

Each kind of record of others has keys of its own, `/kilo/by/<this host>/<kind>/<subject>`, for any number of subjects.
Values only; `store.session.leased_writer` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Generic, TypeVar

from kilo_etcd.store.keys import EndpointKey, Keys, ParsedKey, ProbeReportKey, StageKey, StatusKey
from kilo_etcd.store.records import (
    ObservedEndpointRecord,
    ProbeReportRecord,
    Record,
    RecordError,
    StageRecord,
    StatusRecord,
    decode_observed_endpoint,
    decode_probe_report,
    decode_stage,
    decode_status,
    encode,
)

R = TypeVar("R", bound=Record)


class PublishedRecords(Generic[R]):
    """All records of one kind; `values` is the same as keys and bytes, encoded once however often asked for."""

    def __init__(self, root: str, key: Callable[[str], str], decode: Callable[[bytes], R]) -> None:
        self._root = root
        self._key = key
        self._decode = decode
        self.records: Mapping[str, R] = {}
        self.values: Mapping[str, bytes] = {}
        self._given = False
        """Whether the records are this run's, so that an earlier run's are none any more."""

    def concern(self, key: str) -> bool:
        """Whether a key is one of this kind."""
        return key.startswith(self._root)

    def replace(self, records: Mapping[str, R]) -> None:
        """Publish these, and no others."""
        self._given = True
        self._set(records)

    def _set(self, records: Mapping[str, R]) -> None:
        self.records = dict(records)
        self.values = {self._key(subject): encode(record) for subject, record in records.items()}

    def adopt(self, subject: str, value: bytes) -> None:
        """Go on publishing what an earlier run published, if it can be read and this run has published none yet.
        A record that is under the lease when etcd comes back may be one that this run has withdrawn meanwhile."""
        if not self._given:
            with suppress(RecordError):
                self._set({subject: self._decode(value), **self.records})


def observed_endpoints(keys: Keys, observer: str) -> PublishedRecords[ObservedEndpointRecord]:
    """Where `observer` sees nodes and peers, by their names."""
    return PublishedRecords(
        keys.endpoints(observer), lambda name: keys.endpoint(name, observer), decode_observed_endpoint
    )


def probe_reports(keys: Keys, prober: str) -> PublishedRecords[ProbeReportRecord]:
    """The probe reports of `prober`, by location."""
    return PublishedRecords(
        keys.probe_reports(prober), lambda location: keys.probe_report(location, prober), decode_probe_report
    )


class Published:
    """All that node `name` publishes."""

    def __init__(self, keys: Keys, name: str) -> None:
        self.status_key, self._stage_key = keys.status(name), keys.stage(name)
        self.status: StatusRecord | None = None
        self._status_given = False
        """Whether the status is the agent's, not one that stands in for it."""
        self.stage: StageRecord | None = None
        self._stage_given = False
        """Whether the stage, or that there is none, is this run's."""
        self.observed_endpoints = observed_endpoints(keys, name)
        self.probe_reports = probe_reports(keys, name)

    def report(self, status: StatusRecord) -> None:
        """Publish this status."""
        self.status, self._status_given = status, True

    def stand_in(self, status: StatusRecord) -> None:
        """Publish this status as long as there is no other, be it one of an earlier run."""
        if self.status is None:
            self.status, self._status_given = status, False

    def report_stage(self, stage: StageRecord | None) -> None:
        """Publish this stage, or none."""
        self.stage, self._stage_given = stage, True

    def adopt(self, key: ParsedKey | None, value: bytes) -> None:
        """Go on publishing what an earlier run published, if it can be read and this run has not published others."""
        if isinstance(key, EndpointKey):
            self.observed_endpoints.adopt(key.name, value)
        elif isinstance(key, ProbeReportKey):
            self.probe_reports.adopt(key.location, value)
        with suppress(RecordError):
            if isinstance(key, StatusKey) and not self._status_given:
                self.status = decode_status(value)
            elif isinstance(key, StageKey) and not self._stage_given:
                self.stage = decode_stage(value)

    def clear(self) -> None:
        """Publish nothing."""
        self.status, self.stage = None, None
        self.observed_endpoints.replace({})
        self.probe_reports.replace({})

    @property
    def of_itself(self) -> dict[str, bytes]:
        """What etcd is to hold of this host's status and stage."""
        values = {}
        if self.status is not None:
            values[self.status_key] = encode(self.status)
        if self.stage is not None:
            values[self._stage_key] = encode(self.stage)
        return values

    @property
    def of_others(self) -> dict[str, bytes]:
        """What etcd is to hold of what this host publishes of others."""
        return {**self.observed_endpoints.values, **self.probe_reports.values}

    def concerns_itself(self, key: str) -> bool:
        """Whether a key is the status or the stage."""
        return key in (self.status_key, self._stage_key)

    def concerns_others(self, key: str) -> bool:
        """Whether a key is an observed endpoint or a probe report."""
        return self.observed_endpoints.concern(key) or self.probe_reports.concern(key)
