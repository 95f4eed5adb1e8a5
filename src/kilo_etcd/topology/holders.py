"""Which nodes have which addresses, as an index that follows changes. Pure.

The addresses are kept in blocks of neighbours, so that of 10,000 addresses a change copies the few that are near it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from attrs import field, frozen

from kilo_etcd.base.mappings import copied
from kilo_etcd.model import IPAddress, IPNetwork

_Block = Mapping[IPAddress, tuple[str, ...]]
_BITS = {4: 8, 6: 64}
"""Family -> the bits in which the addresses of a block differ."""
_NONE: _Block = {}


@frozen(eq=False)
class Holders:
    """An index over all nodes of a mesh."""

    _blocks: Mapping[tuple[int, int], _Block] = field(factory=dict)
    """Family and number of a block -> its addresses, none without a holder. No block is empty."""
    _numbers: Mapping[int, Sequence[int]] = field(factory=lambda: {4: [], 6: []})
    """The blocks of each family, sorted, to find the addresses within a network."""

    def of(self, address: IPAddress) -> tuple[str, ...]:
        """The nodes that have an address, by name."""
        return self._blocks.get(_block_of(address), _NONE).get(address, ())

    def items(self) -> Iterator[tuple[IPAddress, tuple[str, ...]]]:
        """All addresses, each with the nodes that have it, by name."""
        return chain.from_iterable(block.items() for block in self._blocks.values())

    def after(
        self, gone: Iterable[tuple[str, IPAddress]], come: Iterable[tuple[str, IPAddress]]
    ) -> tuple[Holders, set[IPAddress]]:
        """The index after some nodes lost addresses and then some got addresses, and the addresses that are held by
        others than before."""
        moved: dict[IPAddress, set[str]] = {}
        for name, address in gone:
            moved.setdefault(address, set(self.of(address))).discard(name)
        for name, address in come:
            moved.setdefault(address, set(self.of(address))).add(name)
        moved = {address: names for address, names in moved.items() if names != set(self.of(address))}
        if not moved:
            return self, set()
        touched: dict[tuple[int, int], dict[IPAddress, tuple[str, ...]]] = {}
        for address, names in moved.items():
            key = _block_of(address)
            if key not in touched:
                touched[key] = copied(self._blocks.get(key, _NONE))
            if names:
                touched[key][address] = tuple(sorted(names))
            else:
                del touched[key][address]
        blocks = copied(self._blocks)
        numbers = {version: list(sorted_numbers) for version, sorted_numbers in self._numbers.items()}
        for (version, number), block in touched.items():
            if block and (version, number) not in blocks:
                insort(numbers[version], number)
            elif not block and (version, number) in blocks:
                del numbers[version][bisect_left(numbers[version], number)]
            if block:
                blocks[version, number] = block
            else:
                blocks.pop((version, number), None)
        return Holders(blocks, numbers), set(moved)

    def within(self, networks: Iterable[IPNetwork]) -> Iterator[IPAddress]:
        """The addresses within some networks."""
        for network in networks:
            version = network.version
            lowest, highest = _block_of(network.network_address)[1], _block_of(network.broadcast_address)[1]
            numbers = self._numbers[version]
            first = bisect_left(numbers, lowest)
            for number in numbers[first : bisect_right(numbers, highest, first)]:
                block = self._blocks[version, number]
                # Of the blocks at both ends there may be addresses outside.
                whole = lowest < number < highest
                yield from block if whole else (address for address in block if address in network)


def _block_of(address: IPAddress) -> tuple[int, int]:
    version = address.version
    return version, int(address) >> _BITS[version]
