"""That this host's clock went back, and for how long that matters: WireGuard of other hosts takes its handshakes for
replays until they have forgotten the former ones (`agent.nat.renewed_peers`), or until the clock has caught up.

A clock that goes to and fro makes no news each time: epochs are `FIRST_PAUSE` apart, then twice as much and so on. What
comes in between waits, and is dropped if the clock has caught up by then.

Pure: times come in, epochs and a sentence go out.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf

from attrs import define, field

from kilo_etcd.model import SESSION_SECONDS
from kilo_etcd.runtime.parsing import shown_duration
from kilo_etcd.store.status_texts import CLOCK_WENT_BACK

FIRST_PAUSE, MOST_PAUSE = 600.0, 6 * 3600.0
"""Seconds between two epochs: at first, and at most."""

LONGEST = 86400.0
"""Seconds for which a node that does not answer may have to do with it."""


@define
class SetBack:
    """Times are seconds of one monotonic clock."""

    _seconds: float = field(default=0.0, init=False)
    _since: float = field(default=-inf, init=False)
    _was_at: float = field(default=0.0, init=False)
    _silent_before: frozenset[str] = field(default=frozenset(), init=False)
    _untold: bool = field(default=False, init=False)
    _raised: float = field(default=-inf, init=False)
    _pause: float = field(default=0.0, init=False)

    def note(self, seconds: float, *, was_at: float, unanswered: Collection[str] = (), now: float) -> None:
        """The clock went back, all in all by `seconds`, from the date `was_at` (Unix seconds). `unanswered` are nodes
        that did not answer before either."""
        self._seconds, self._since, self._was_at = seconds, now, was_at
        self._silent_before, self._untold = frozenset(unanswered), True

    def epoch(self, former: int | None, *, now: float) -> int | None:
        """The epoch to register now, `former` being in the record; None: none, or not yet."""
        if not self._untold or now < self._raised + self._pause:
            return None
        self._untold = False
        epoch = round(self._was_at)
        # One second: what is read of the same handshake twice differs by a rounding.
        if now - self._since >= self._seconds or (former or 0) >= epoch - 1:
            return None
        again = now - self._raised < 2 * self._pause
        self._raised, self._pause = now, min(2 * self._pause, MOST_PAUSE) if again else FIRST_PAUSE
        return epoch

    def matters(self, *, now: float) -> bool:
        """Whether there is to be an epoch or a sentence, or may be before long."""
        return self._untold or now - self._since < min(self._seconds, LONGEST)

    def sentence(self, *, unanswered: Collection[str], now: float) -> str | None:
        """What to say of it; None: it does not matter. `unanswered` are the nodes that do not answer."""
        passed = now - self._since
        if passed >= min(self._seconds, LONGEST):
            return None
        if passed >= SESSION_SECONDS and self._silent_before.issuperset(unanswered):
            return None
        return (
            f"{CLOCK_WENT_BACK}{shown_duration(round(self._seconds))}: other hosts drop its WireGuard "
            "handshakes as replays until they make it a new peer, which their agents do within some minutes; if a host "
            "does not answer after that, remove its WireGuard device (ip link del kilo0 there: its agent makes it "
            "anew); connect a laptop or phone anew"
        )
