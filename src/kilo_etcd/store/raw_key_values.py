"""Key-values as etcd holds them, by key; those below a prefix are found without reading all."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import KeysView, ValuesView

from kilo_etcd.etcd.api import KeyValue


class RawKeyValues:
    """One of each key."""

    def __init__(self) -> None:
        self._kvs: dict[bytes, KeyValue] = {}
        self._sorted: list[bytes] | None = None
        """The keys, if they are the same since they were sorted."""

    def __contains__(self, key: object) -> bool:
        return key in self._kvs

    def get(self, key: bytes) -> KeyValue | None:
        """The one of a key; None: there is none."""
        return self._kvs.get(key)

    def keys(self) -> KeysView[bytes]:
        """All keys."""
        return self._kvs.keys()

    def values(self) -> ValuesView[KeyValue]:
        """All of them."""
        return self._kvs.values()

    def put(self, kv: KeyValue) -> None:
        """Have this one, in the place of one with its key."""
        if kv.key not in self._kvs:
            self._sorted = None
        self._kvs[kv.key] = kv

    def remove(self, key: bytes) -> bool:
        """Have none of a key any more; whether there was one."""
        if self._kvs.pop(key, None) is None:
            return False
        self._sorted = None
        return True

    def below(self, prefix: bytes) -> tuple[KeyValue, ...]:
        """Those whose keys begin with a prefix, sorted by key."""
        if self._sorted is None:
            self._sorted = sorted(self._kvs)
        first = bisect_left(self._sorted, prefix)
        last = bisect_right(self._sorted, prefix, first, key=lambda key: key[: len(prefix)])
        return tuple(self._kvs[key] for key in self._sorted[first:last])
