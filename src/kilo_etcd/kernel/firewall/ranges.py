"""Networks as ranges of numbers, so that a set of a thousand is searched and not gone through. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from operator import itemgetter, xor

from attrs import frozen

from kilo_etcd.model import IPNetwork


@frozen
class Ranges:
    """Ranges of one family's addresses, sorted, with gaps between them: the first address of each, and the last."""

    firsts: tuple[int, ...] = ()
    lasts: tuple[int, ...] = ()

    def holds(self, first: int, last: int) -> bool | None:
        """Whether all addresses from one to another are in a range; None: some are."""
        at = bisect_right(self.firsts, first) - 1
        if at >= 0 and self.lasts[at] >= first:
            return True if self.lasts[at] >= last else None
        return None if at + 1 < len(self.firsts) and self.firsts[at + 1] <= last else False

    def met_by(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The ranges with an address from one to another."""
        at = bisect_right(self.firsts, first) - 1
        at += at < 0 or self.lasts[at] < first
        while at < len(self.firsts) and self.firsts[at] <= last:
            yield self.firsts[at], self.lasts[at]
            at += 1


_NONE = Ranges()


@frozen
class Networks:
    """Networks of either family."""

    by_version: Mapping[int, Ranges]

    @cached_property
    def key(self) -> tuple[tuple[int, Ranges], ...]:
        """The same for equal ones."""
        return tuple(sorted(self.by_version.items(), key=itemgetter(0)))

    @classmethod
    def of(cls, networks: Iterable[IPNetwork]) -> Networks:
        """Those of an iterable."""
        numbers: dict[int, list[tuple[int, int]]] = {}
        for network in networks:
            numbers.setdefault(network.version, []).append(bounds(network))
        return cls({version: _merged(pairs) for version, pairs in numbers.items()})

    def hold(self, subnets: Iterable[IPNetwork], version: int) -> bool | None:
        """Whether the networks of a family hold all addresses of some subnets; None: it cannot be told of every
        address."""
        ranges = self.by_version.get(version, _NONE)
        if not ranges.firsts:
            return False
        answers = {ranges.holds(*bounds(subnet)) for subnet in subnets if subnet.version == version}
        return answers.pop() if len(answers) == 1 else None

    def partly_in(self, subnets: Iterable[IPNetwork]) -> Networks:
        """Those that hold some addresses of the subnets and not all."""
        ours: dict[int, list[tuple[int, int]]] = {}
        for subnet in subnets:
            ours.setdefault(subnet.version, []).append(bounds(subnet))
        merged = {}
        for version, ranges in self.by_version.items():
            wanted = ours.get(version, ())
            met = {pair for subnet in wanted for pair in ranges.met_by(*subnet)}
            some = {pair for pair in met if not all(pair[0] <= low and high <= pair[1] for low, high in wanted)}
            if some:
                merged[version] = _merged(some)
        return Networks(merged)


def bounds(network: IPNetwork) -> tuple[int, int]:
    """The numbers of a network's first and last address."""
    first = int(network.network_address)
    return first, first + (1 << network.max_prefixlen - network.prefixlen) - 1


class Index:
    """Which of several sets of networks hold a network, found without going through them. They are named by their
    numbers."""

    def __init__(self, several: Iterable[Networks]) -> None:
        begins_or_ends: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for number, networks in enumerate(several):
            for version, ranges in networks.by_version.items():
                for edge in (*ranges.firsts, *(last + 1 for last in ranges.lasts)):
                    begins_or_ends[version].setdefault(edge, set()).add(number)
        self._edges = {version: sorted(at) for version, at in begins_or_ends.items()}
        self._between = {
            version: tuple(accumulate((at[edge] for edge in self._edges[version]), xor, initial=frozenset[int]()))
            for version, at in begins_or_ends.items()
        }
        """The sets that hold what is before each edge, and after the last one."""
        self._known: dict[tuple[int, int, int], tuple[frozenset[int], frozenset[int]]] = {}

    def of(self, network: IPNetwork) -> tuple[frozenset[int], frozenset[int]]:
        """The sets that hold all of it, and those that hold some or all."""
        version, (first, last) = network.version, bounds(network)
        place = version, bisect_right(self._edges[version], first), bisect_right(self._edges[version], last)
        if place not in self._known:
            met = self._between[version][place[1] : place[2] + 1]
            self._known[place] = met[0].intersection(*met[1:]), met[0].union(*met[1:])
        return self._known[place]


def _merged(pairs: Iterable[tuple[int, int]]) -> Ranges:
    firsts: list[int] = []
    lasts: list[int] = []
    for first, last in sorted(pairs):
        if lasts and first <= lasts[-1] + 1:
            lasts[-1] = max(last, lasts[-1])
        else:
            firsts.append(first)
            lasts.append(last)
    return Ranges(tuple(firsts), tuple(lasts))
