"""The operator's side: one look at everything, and the labels. Used by `kgctl`, which keeps nothing running."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from attrs import evolve

from kilo_etcd.etcd.api import Client, Compacted, Event, KeyValue, Unavailable, Watch, prefix_end
from kilo_etcd.model import RejectedRecord, Snapshot
from kilo_etcd.store.history import last_good
from kilo_etcd.store.keys import Keys, LocationKey, StatusKey
from kilo_etcd.store.records import (
    RecordError,
    StatusRecord,
    decode_granularity,
    decode_internal_ips,
    decode_label,
    decode_status,
    decode_subnets,
)
from kilo_etcd.store.view import View

SILENCE = 1.0
"""Seconds after which a watch that may begin in the past without an event has none: etcd sends those of the past after
0.1 s."""
MOST_REVISIONS = 1000
"""The most revisions of the past that etcd sends at once (mvcc's watchBatchMaxRevs): after fewer there are no more."""
HISTORY_TIMEOUT = 10.0
"""Seconds in which etcd has to send its history."""


async def snapshot(client: Client, keys: Keys) -> tuple[Snapshot, View]:
    """What is in force now, and the view that it came from (for raw values). EtcdError."""
    listing = await client.get_prefix(keys.root)
    view = View(keys)
    by_key = {kv.key: kv for kv in listing.kvs}
    if (kv := by_key.get(keys.granularity.encode())) is not None:
        view.granularity = await last_good(client, kv, decode_granularity)
    if (kv := by_key.get(keys.internal_ips.encode())) is not None:
        view.internal_ips = await last_good(client, kv, decode_internal_ips)
    if (kv := by_key.get(keys.subnets.encode())) is not None:
        view.subnets = await last_good(client, kv, decode_subnets)
    view.load(listing.kvs, listing.header)
    result = view.snapshot()
    named = any(note.key == keys.internal_ips for note in result.rejected)
    missing_here = keys.internal_ips.encode() not in by_key and not named
    if missing_here and any(node.underlay is not None for node in result.nodes.values()):
        missing = RejectedRecord(
            keys.internal_ips,
            "the value is missing: agents that run keep the one that they know, and one of them restores it; else the "
            "next agent to start writes its --internal-ips, by default routed. kgctl mesh set internal-ips routed, "
            "encrypted or off says which",
        )
        result = evolve(result, rejected=(*result.rejected, missing))
    return result, view


def last_change(newest: int, events: Iterable[Event], now: int) -> int:
    """The revision of the last of `events` up to revision `now`; `newest` if there is none."""
    return max((event.kv.mod_revision for event in events if event.kv.mod_revision <= now), default=newest)


async def newest_change(client: Client, keys: Keys, newest: int, now: int) -> int:
    """The revision of the last change below the prefix up to revision `now`, deletions included. EtcdError.

    `newest` is that of the newest key that is there. A deletion leaves nothing that could be listed, so etcd's history
    is read from `newest` on: the watch begins with the event of that key, and the others come with it. A progress
    notice would not do, since those of older versions overtake events (`etcd.watch`). If etcd has compacted
    `newest`, the history from then on counts, in which there may be nothing.
    """
    import trio

    if not 0 < newest < now:
        return newest
    start: int | None = newest
    patience = math.inf
    with trio.move_on_after(HISTORY_TIMEOUT):
        while start is not None and start <= now:
            newest, start = await _last_since(client, keys, start, newest, now, patience)
            patience = SILENCE
        return newest
    raise Unavailable(f"etcd has not sent the changes since revision {newest} within {HISTORY_TIMEOUT:g} s; retry")


async def _last_since(
    client: Client, keys: Keys, start: int, newest: int, now: int, patience: float
) -> tuple[int, int | None]:  # fmt: skip
    """The last change from revision `start` on, else `newest`; and from where to read once more, if etcd has compacted
    what it was asked for. `patience`: for how many seconds there may be no event before it is taken that there is none.
    """
    try:
        async with client.watch_prefix(keys.root, start_revision=start) as watch:
            while events := await _next_events(watch, patience):
                newest = last_change(newest, events, now)
                revisions = {event.kv.mod_revision for event in events}
                if len(revisions) < MOST_REVISIONS or max(revisions) >= now:
                    break
                patience = SILENCE
    except Compacted as error:
        return newest, error.compact_revision
    return newest, None


async def _next_events(watch: Watch, patience: float) -> Sequence[Event]:
    """The events of the next batch that has some; none: there was no batch for so many seconds."""
    import trio

    while True:
        with trio.move_on_after(patience) as silence:
            batch = await watch.__anext__()
        if silence.cancelled_caught:
            return ()
        if batch.events:
            return batch.events


async def statuses(client: Client, keys: Keys) -> Mapping[str, StatusRecord]:
    """What the living agents report, by node. One that cannot be read is left out, and one under no lease: it would
    stand forever, whether its agent lives or not, which restores it if it does."""
    result = {}
    for kv in (await client.get_prefix(keys.status_by_root)).kvs:
        parsed = keys.parse(kv.key)
        if isinstance(parsed, StatusKey) and kv.lease:
            try:
                result[parsed.node] = decode_status(kv.value)
            except RecordError:
                continue
    return result


async def living(client: Client, keys: Keys) -> frozenset[str]:
    """The nodes whose agents report a status, whether it can be read or not."""
    root = keys.status_by_root
    listing = await client.range(root, prefix_end(root), keys_only=True)
    parsed = (keys.parse(kv.key) for kv in listing.kvs if kv.lease)
    return frozenset(key.node for key in parsed if isinstance(key, StatusKey))


async def set_location(client: Client, keys: Keys, node: str, label: str) -> int:
    """Label a node; the revision at which it is labelled. ValueError if `label` is no possible name, EtcdError."""
    decode_label(label.encode())
    return (await client.put(keys.location(node), label)).header.revision


async def unset_location(client: Client, keys: Keys, node: str) -> bool:
    """Take the label away: the node's own default counts again. Returns whether there was one."""
    return (await client.delete(keys.location(node))).deleted > 0


async def locations(client: Client, keys: Keys) -> Mapping[str, str]:
    """The labels, by node. One that cannot be read is left out."""
    return labels(keys, (await client.get_prefix(keys.locations_root)).kvs)


def labels(keys: Keys, kvs: Iterable[KeyValue]) -> Mapping[str, str]:
    """The labels in these key-values, by node. One that cannot be read is left out."""
    result = {}
    for kv in kvs:
        parsed = keys.parse(kv.key)
        if isinstance(parsed, LocationKey):
            try:
                result[parsed.node] = decode_label(kv.value)
            except RecordError:
                continue
    return result
