"""Copies and comparisons of large mappings, fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from operator import is_not
from typing import Any, Generic, TypeVar

from attrs import frozen

from kilo_etcd.base.blocks import Blocks

K = TypeVar("K")
V = TypeVar("V")


@frozen(eq=False)
class Changed(Generic[K, V]):
    """That mapping `now` differs from mapping `before`, which it was made from, in no more than `keys`."""

    before: Mapping[K, V]
    now: Mapping[K, V]
    keys: frozenset[K]


def copied(mapping: Mapping[K, V]) -> dict[K, V]:
    """A dict with the same items. Of a dict from which items were deleted, `dict()` copies one item after the other;
    `dict.copy` takes it as one block, as long as most of it is in use."""
    return mapping.copy() if isinstance(mapping, dict) else dict(mapping)


def changes(old: Mapping[K, V], new: Mapping[K, V], changed: Changed[K, V] | None = None) -> list[K]:
    """The keys whose values differ or are on one side only, in no order. `changed`, if it is about these two mappings,
    saves the comparison of all others.

    It is fast if one mapping was made from the other: then few keys came and went, and the others are in the same order
    and have the same objects as values. Lists compare those a hundred times as fast as anything that looks at each
    item, and no key but the few is looked up, since the hash of a network is slow.
    """
    if old is new:
        return []
    if isinstance(old, Blocks) and isinstance(new, Blocks):
        return list(old.changes(new))
    if changed is not None and changed.before is old and changed.now is new:
        return [key for key in changed.keys if _differs(old, new, key)]
    here, there = list(old), list(new)
    before, after = list(old.values()), list(new.values())
    result: list[K] = []
    if here != there:
        at = 0
        for _ in range(_FEW):
            shorter = min(len(here), len(there))
            at = next(_differing(here, there, at, shorter), shorter)
            if at == shorter:
                break
            if here[at] not in new:
                result.append(here[at])
                del here[at], before[at]
            elif there[at] not in old:
                result.append(there[at])
                del there[at], after[at]
            else:
                return _changes_in_any_order(old, new)
        else:
            return _changes_in_any_order(old, new)
        result += [*here[at:], *there[at:]]
        del here[at:], there[at:]
    return [*result, *(here[at] for at in _differing(before, after, 0, len(here)))]


def _differs(old: Mapping[K, V], new: Mapping[K, V], key: K) -> bool:
    if key not in old or key not in new:
        return key in old or key in new
    return old[key] is not new[key] and old[key] != new[key]


def _changes_in_any_order(old: Mapping[K, V], new: Mapping[K, V]) -> list[K]:
    differing = list(compress(new, map(is_not, new.values(), map(old.get, new))))
    added = sum(key not in old for key in differing)
    result = [key for key in differing if key not in old or old[key] != new[key]]
    if len(new) - added != len(old):
        result += [key for key in old if key not in new]
    return result


def _differing(one: Sequence[Any], other: Sequence[Any], start: int, stop: int) -> Iterator[int]:
    """The indices between `start` and `stop` at which two lists differ."""
    for first in range(start, stop, _BLOCK):
        here, there = one[first : min(first + _BLOCK, stop)], other[first : min(first + _BLOCK, stop)]
        if here != there:
            for at, (mine, theirs) in enumerate(zip(here, there, strict=True), first):
                if mine is not theirs and mine != theirs:
                    yield at


_FEW = 12
_BLOCK = 512
