"""Decides whose a node's name is: pure decisions on the records at it, and the count of how often ours was restored.

A name belongs to the public key of the host that lives under it. A host lives while its status is there, under a lease:
one that somebody has put by hand has none and would stand forever.
"""

from __future__ import annotations

from collections import deque

from kilo_etcd.etcd.api import KeyValue
from kilo_etcd.store.records import NodeRecord, RecordError, StatusRecord, decode_node, decode_status

RESTORES, RESTORES_PERIOD = 5, 60.0
"""How often a record is restored in how many seconds, before its changes are taken for a conflict."""


class NameTaken(Exception):
    """A living host has this host's name; the message says which."""


def taken_by(name: str, public_key: str, node_kv: KeyValue | None, status_kv: KeyValue | None) -> str | None:
    """The sentence, if another host than the one of `public_key` lives under `name`."""
    if status_kv is None or not status_kv.lease:
        return None
    try:
        status: StatusRecord | None = decode_status(status_kv.value)
    except RecordError:
        status = None
    record_key = public_key_of(node_kv) if node_kv else None
    owner = status.public_key if status else record_key
    if owner is None or owner == public_key:
        return None
    where = status.address if status else ""
    if node_kv is not None and record_key == owner and not where:
        where = where_is(decode_node(node_kv.value))
    return (
        f"the name {name} is taken by a living host with public key {owner}"
        f"{f' at {where}' if where else ''}; stop the agent there or give this host another name with --hostname"
    )


def public_key_of(kv: KeyValue) -> str | None:
    """The public key in a node's record, if it can be read."""
    try:
        return decode_node(kv.value).public_key
    except RecordError:
        return None


def status_key_of(kv: KeyValue) -> str | None:
    """The public key in a status, if it can be read."""
    try:
        return decode_status(kv.value).public_key
    except RecordError:
        return None


def where_is(record: NodeRecord) -> str:
    """Where people find the host of a record."""
    if record.endpoint is not None:
        return str(record.endpoint)
    return ", ".join(str(interface.ip) for interface in record.internal_ips)


class RestoreCounter:
    """When the record at `key` was restored. Times are seconds on one monotonic clock."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._times: deque[float] = deque()

    def note(self, now: float) -> None:
        """It was restored."""
        self._times.append(now)

    def check(self, now: float) -> None:
        """NameTaken if a copy of this machine changes it again and again."""
        while self._times and self._times[0] < now - RESTORES_PERIOD:
            self._times.popleft()
        if len(self._times) >= RESTORES:
            raise NameTaken(
                f"the record at {self._key} is changed again and again by another; "
                "if a copy of this machine runs, give it a WireGuard key and a --hostname of its own"
            )
