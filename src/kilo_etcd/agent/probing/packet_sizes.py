"""Which packet size to try next, to find the largest that passes on a way. Pure.

First the sizes are halved that tunnels mostly have, then the one a byte above the largest that has passed is tried, and
only if that passes too, what lies between. A size counts as too large for the result if it was lost `LOST_TIMES` times;
one that passes after all, however often it was lost, passes. So a packet that is lost by chance costs another one, and
does not make the result smaller.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve, field, frozen

LOST_TIMES = 3
"""One byte above the result: of ways that lose a packet in ten by chance, one in 50 is measured wrong: too small."""

_USUAL = (1280, 1300, 1320, 1340, 1360, 1372, 1380, 1392, 1400, 1412, 1420, 1432, 1440, 8920, 8940)
"""Bytes: what networks carry mostly (1400, 1450, 1460, 1492, 1500, 9000), less what WireGuard adds in IPv4 and IPv6."""


@frozen(kw_only=True)
class SizeSearch:
    """What is known of a way so far. `floor` is the smallest size to be tried, `too_large` one that does not pass."""

    floor: int
    too_large: int
    passed: int = 0
    """The largest that has passed; 0: none yet."""
    lost: Mapping[int, int] = field(factory=dict)
    """Size -> how many times a packet of it was lost."""

    @property
    def largest(self) -> int | None:
        """The result: bytes; 0 if not even `floor` passes. None: it is not known yet."""
        above = self.passed + 1 if self.passed else self.floor
        return self.passed if above >= self.too_large or self.lost.get(above, 0) >= LOST_TIMES else None

    @property
    def next_size(self) -> int:
        """What to try, as long as there is no result."""
        least = max(self.passed + 1, self.floor)
        bound = min((size for size in self.lost if size >= least), default=self.too_large)
        if bound == least:
            return least
        if usual := [size for size in _USUAL if least <= size < bound]:
            return usual[len(usual) // 2]
        if least not in self.lost and self.passed in _USUAL:
            return least
        return (least + bound) // 2

    def tried(self, size: int, *, passes: bool) -> SizeSearch:
        """After a packet of `size` bytes has passed, or was lost."""
        if passes:
            return evolve(self, passed=max(self.passed, size))
        return evolve(self, lost={**self.lost, size: self.lost.get(size, 0) + 1})
