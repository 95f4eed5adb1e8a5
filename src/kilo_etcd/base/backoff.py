"""How fast the agent repairs what another program changes: at once, but not forever.

Another program that insists on its own idea of our interface, or another writer of our keys, would otherwise make the
two undo each other hundreds of times a second. Pure: times come in, pauses go out.
"""

from __future__ import annotations

from attrs import define


@define
class RepairBackoff:
    """The account of repairs of one thing. Times are seconds of one monotonic clock."""

    burst: int = 10
    """So many repairs in a row are made at once."""
    first: float = 0.5
    """Seconds of the first pause; doubled with each further repair."""
    longest: float = 10.0
    quiet: float = 30.0
    """Seconds without a change after which the next one is repaired at once again."""
    repairs: int = 0
    """In a row, up to the last one."""
    _last: float = float("-inf")

    def pause(self, now: float) -> float:
        """Seconds to wait before the repair that is due at `now`."""
        if now > self.until:
            self.repairs = 0
        self.repairs += 1
        pause = 0.0
        if self.repairs > self.burst:
            pause = min(self.first * 2.0 ** min(self.repairs - self.burst - 1, 16), self.longest)
        self._last = now + pause
        return pause

    @property
    def until(self) -> float:
        """When the row of repairs ends, if nothing changes until then."""
        return self._last + self.quiet
