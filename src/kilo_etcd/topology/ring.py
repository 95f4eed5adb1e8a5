"""Where nodes stand in a picture of many tunnels: leaders on a ring, by location; members and peers outside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set

Position = tuple[float, float]

APART = 2.3
"""Inches from the middle of a node to that of the next one."""


def ring(clusters: Sequence[tuple[Sequence[str], Set[str]]], outside: Sequence[str]) -> tuple[list[Position], ...]:
    """Positions in inches: for each cluster those of its nodes, in their order; at the end those of `outside`.

    A cluster is its nodes' names and its leaders. Each has a sector of the ring, wide enough for its leaders,
    and for its members in rows: in so many that those of the largest cluster are about a square.
    """
    leaders = [sum(name in leading for name in names) for names, leading in clusters]
    members = [len(names) - number for (names, _), number in zip(clusters, leaders, strict=True)]
    rows = math.ceil(math.sqrt(max(members, default=0) * 1.2))
    widths = [max(own, math.ceil(led / rows) if rows else 0, 1) for own, led in zip(leaders, members, strict=True)]
    total = sum(widths)
    radius = max(APART, APART * total / math.tau)
    result, begin = [], 0.0
    for (names, leading), width, own, led in zip(clusters, widths, leaders, members, strict=True):
        angle = math.tau * width / total
        on_ring = _row(own, radius, begin, angle)
        beyond = _rows(led, width, radius + APART, begin, angle)
        result.append([next(on_ring if name in leading else beyond) for name in names])
        begin += angle
    rim = max(radius + (rows + 1) * APART, APART * len(outside) / math.tau)
    return *result, list(_row(len(outside), rim, 0.0, math.tau))


def _row(number: int, radius: float, begin: float, angle: float) -> Iterator[Position]:
    """So many places, spread evenly over a part of a circle."""
    for place in range(number):
        at = begin + angle * (place + 0.5) / number
        yield radius * math.sin(at), radius * math.cos(at)


def _rows(number: int, width: int, radius: float, begin: float, angle: float) -> Iterator[Position]:
    """Rows of `width` places, each beyond the last."""
    while number > 0:
        yield from _row(min(number, width), radius, begin, angle)
        number, radius = number - width, radius + APART
