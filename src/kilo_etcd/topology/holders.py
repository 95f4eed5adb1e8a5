"""Which nodes have which addresses, as an index that follows changes. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping

from attrs import field, frozen

from kilo_etcd.base.mappings import copied
from kilo_etcd.model import IPAddress, IPNetwork


@frozen(eq=False)
class Holders:
    """An index over all nodes of a mesh."""

    names: Mapping[IPAddress, tuple[str, ...]] = field(factory=dict)
    """Address -> the nodes that have it, by name."""
    _sorted: Mapping[int, list[int]] = field(factory=lambda: {4: [], 6: []})
    """The addresses of each family, as sorted numbers, to find those within a network."""

    def after(
        self, gone: Iterable[tuple[str, IPAddress]], come: Iterable[tuple[str, IPAddress]]
    ) -> tuple[Holders, set[IPAddress]]:
        """The index after some nodes lost addresses and then some got addresses, and the addresses that are held by
        others than before."""
        moved: dict[IPAddress, set[str]] = {}
        for name, address in gone:
            moved.setdefault(address, set(self.names.get(address, ()))).discard(name)
        for name, address in come:
            moved.setdefault(address, set(self.names.get(address, ()))).add(name)
        moved = {address: names for address, names in moved.items() if names != set(self.names.get(address, ()))}
        if not moved:
            return self, set()
        held = copied(self.names)
        ordered = {version: list(numbers) for version, numbers in self._sorted.items()}
        for address, names in moved.items():
            if not names:
                del held[address]
                numbers = ordered[address.version]
                del numbers[bisect_left(numbers, int(address))]
            else:
                if address not in held:
                    insort(ordered[address.version], int(address))
                held[address] = tuple(sorted(names))
        return Holders(held, ordered), set(moved)

    def within(self, networks: Iterable[IPNetwork]) -> Iterator[IPAddress]:
        """The addresses within some networks."""
        for network in networks:
            numbers = self._sorted[network.version]
            first = bisect_left(numbers, int(network.network_address))
            for number in numbers[first : bisect_right(numbers, int(network.broadcast_address), first)]:
                yield network.network_address + (number - int(network.network_address))
