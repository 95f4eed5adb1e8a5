"""The last good value of a key, from etcd's own history.

An agent that starts while one of the mesh's settings (`/kilo/mesh/...`) holds nonsense never saw what was in force
before; the others go on with that. etcd still has it, until the next compaction, at an earlier revision of the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kilo_etcd.etcd.api import BadRequest, Client, Compacted, KeyValue
from kilo_etcd.store.records import RecordError

T = TypeVar("T")
STEPS = 16
"""How many bad versions in a row are stepped over before giving up."""


async def last_good(client: Client, kv: KeyValue, decode: Callable[[bytes], T]) -> T | None:
    """What `decode` makes of the newest readable version of `kv` up to the one given; None if history has none."""
    for _ in range(STEPS):
        try:
            return decode(kv.value)
        except RecordError:
            pass
        if kv.mod_revision <= kv.create_revision:
            return None
        try:
            result = await client.range(kv.key, revision=kv.mod_revision - 1)
        except (Compacted, BadRequest):
            return None
        if not result.kvs:
            return None
        kv = result.kvs[0]
    return None
