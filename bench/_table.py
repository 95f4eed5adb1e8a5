"""What all benchmarks share: tables that say of how many runs they are, on what machine, and how loaded it was.

KILO_BENCH_QUICK=1 makes each benchmark do as few runs as still show something.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

QUICK = os.environ.get("KILO_BENCH_QUICK", "") not in ("", "0")

# Both are given, since a "dumb" terminal, as a guest has, would otherwise be taken for one of 80 columns.
console = Console(width=132, height=100)


def runs(usual: int, quick: int = 2) -> int:
    """How many runs to make."""
    return quick if QUICK else usual


def table(title: str, *headings: str) -> Table:
    """A table whose first column is text and whose others are numbers; the machine and its load stand below it."""
    made = Table(title=title, title_justify="left", caption=machine(), caption_justify="left")
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number else "left")
    return made


def machine() -> str:
    """One line on where this was measured; the load is that of the last minute, before the measurement."""
    return (
        f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"load before {os.getloadavg()[0]:.2f}"
    )


def spread(seconds: Sequence[float], *, unit: float = 1000.0, digits: int = 0) -> tuple[str, str, str, str]:
    """Number of runs, min, median and max; milliseconds unless `unit` (units per second) says otherwise."""
    if not seconds:
        return "0", "-", "-", "-"
    least, middle, most = (f"{x * unit:,.{digits}f}" for x in (min(seconds), median(seconds), max(seconds)))
    return str(len(seconds)), least, middle, most


def distribution(seconds: Sequence[float], *, unit: float = 1000.0, digits: int = 0) -> tuple[str, ...]:
    """Number of runs, min, median, 90th percentile (nearest rank) and max, as `spread`."""
    if not seconds:
        return "0", "-", "-", "-", "-"
    found = (min(seconds), median(seconds), percentile(seconds, 0.9), max(seconds))
    return str(len(seconds)), *(f"{x * unit:,.{digits}f}" for x in found)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[math.ceil(len(values) * share) - 1]


def p99(values: Sequence[float]) -> float:
    """Nearest rank; of fewer than a hundred values it is the largest."""
    return percentile(values, 0.99)
