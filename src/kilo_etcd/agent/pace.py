"""How fast the agent repairs what somebody else changes in the kernel: at once, but not for ever.

Another program that insists on its own idea of our interface would otherwise make the two undo each other hundreds of
times a second. Pure: times come in, pauses go out.
"""

from __future__ import annotations

from attrs import define

BURST = 10
"""So many repairs in a row are made at once."""
FIRST_PAUSE = 0.5
"""Seconds; doubled with each further repair."""
LONGEST_PAUSE = 10.0
QUIET = 30.0
"""Seconds without a change after which the next one is repaired at once again."""


@define
class Pace:
    """The account of repairs."""

    _repairs: int = 0
    _last: float = float("-inf")

    def pause(self, now: float) -> float:
        """Seconds to wait before the repair that is due at `now`, in seconds of one monotonic clock."""
        if now - self._last > QUIET:
            self._repairs = 0
        self._repairs += 1
        pause = 0.0
        if self._repairs > BURST:
            pause = min(FIRST_PAUSE * 2.0 ** min(self._repairs - BURST - 1, 16), LONGEST_PAUSE)
        self._last = now + pause
        return pause
