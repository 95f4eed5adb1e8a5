"""A mapping that never changes, of which the next one costs what differs and not what there is.

The items are spread over blocks by their keys' hashes. A mapping made from another one shares the blocks in which
nothing differs, so that to make it, to compare the two and to give one of them up costs a block for each key that
differs: of 10,000 items some 40.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from itertools import chain
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

_FEW = 64
"""Items of a block, about."""
_MIX = 0x9E3779B97F4A7C15
"""Networks of one length have hashes that differ in some bits alone: multiplied, they differ in the highest ones."""
_MASK = (1 << 64) - 1


class Blocks(Mapping[K, V]):
    """In no particular order."""

    __slots__ = ("_blocks", "_length")

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        items = {} if items is None else items
        count = 1 << (len(items) // _FEW).bit_length()
        blocks: list[dict[K, V]] = [{} for _ in range(count)]
        for key, value in items.items():
            blocks[_place(key, count)][key] = value
        self._blocks = blocks
        self._length = len(items)

    def after(self, come: Mapping[K, V], gone: Iterable[K] = ()) -> Blocks[K, V]:
        """The mapping without the keys `gone`, and then with the items of `come`; itself if nothing differs."""
        if not self._length:
            return Blocks(come) if come else self
        blocks, count = self._blocks.copy(), len(self._blocks)
        length = self._length
        touched: dict[int, dict[K, V]] = {}

        def block_of(key: K) -> dict[K, V]:
            place = _place(key, count)
            if place not in touched:
                touched[place] = blocks[place] = blocks[place].copy()
            return touched[place]

        for key in {*gone}.difference(come):
            if key in self:
                del block_of(key)[key]
                length -= 1
        for key, value in come.items():
            if key not in self:
                length += 1
            elif self[key] is value or self[key] == value:
                continue
            block_of(key)[key] = value
        if not touched:
            return self
        if length > 4 * _FEW * count or (count > 1 and 8 * length < _FEW * count):
            return Blocks(dict(chain.from_iterable(block.items() for block in blocks)))
        result = Blocks[K, V]()
        result._blocks, result._length = blocks, length
        return result

    def changes(self, other: Blocks[K, V]) -> Iterator[K]:
        """The keys whose values differ in `other`, or that are in one of the two alone."""
        if len(self._blocks) != len(other._blocks):
            yield from (key for key, value in self.items() if key not in other or other[key] != value)
            yield from (key for key in other if key not in self)
            return
        for mine, theirs in zip(self._blocks, other._blocks, strict=True):
            if mine is not theirs:
                yield from (key for key, value in mine.items() if key not in theirs or theirs[key] != value)
                yield from (key for key in theirs if key not in mine)

    def __getitem__(self, key: K) -> V:
        return self._blocks[_place(key, len(self._blocks))][key]

    def __contains__(self, key: object) -> bool:
        return key in self._blocks[_place(key, len(self._blocks))]

    def __iter__(self) -> Iterator[K]:
        return chain.from_iterable(self._blocks)

    def __len__(self) -> int:
        return self._length

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Blocks) and len(other._blocks) == len(self._blocks):
            return self._blocks == other._blocks
        return dict(self.items()) == dict(other.items()) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Blocks({dict(self.items())})"

    def items(self) -> ItemsView[K, V]:
        """Fast, and in the order of the keys."""
        return _Items(self)

    def values(self) -> ValuesView[V]:
        """Fast, and in the order of the keys."""
        return _Values(self)


class _Items(ItemsView[K, V]):
    _mapping: Blocks[K, V]

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return chain.from_iterable(block.items() for block in self._mapping._blocks)


class _Values(ValuesView[V]):
    _mapping: Blocks[object, V]

    def __iter__(self) -> Iterator[V]:
        return chain.from_iterable(block.values() for block in self._mapping._blocks)


def _place(key: object, count: int) -> int:
    return (hash(key) * _MIX & _MASK) >> (64 - (count.bit_length() - 1))
