"""That this host's clock went back, and for how long that matters: WireGuard of other hosts takes its handshakes for
replays until they have forgotten the former ones (`agent.nat.renewed_peers`), or until the clock has caught up.

A clock that goes to and fro makes no news each time: epochs are `FIRST_PAUSE` apart, then twice as much and so on. What
comes in between waits, and is dropped if the clock has caught up by then.

Pure: readings and times come in, epochs and a sentence go out.
"""

from __future__ import annotations

from math import inf

from attrs import define, field

from kilo_etcd.kernel.handshake_clock import SET_BACK
from kilo_etcd.kernel.state import PeerActivity
from kilo_etcd.model import SESSION_SECONDS
from kilo_etcd.model.node import LATEST_CLOCK_EPOCH
from kilo_etcd.runtime.parsing import shown_duration
from kilo_etcd.runtime.unanswered_peers import UnansweredPeers
from kilo_etcd.store.status_texts import CLOCK_WENT_BACK

FIRST_PAUSE, MOST_PAUSE = 600.0, 6 * 3600.0
"""Seconds between two epochs: at first, and at most."""

LONGEST = 86400.0
"""Seconds for which a node that does not answer may have to do with it."""

_NOBODY = UnansweredPeers()


@define
class SetBack:
    """Times are seconds of one monotonic clock."""

    seconds: float = field(default=0.0, init=False)
    """By how much the clock was behind when that was last noted."""
    _known: float = field(default=0.0, init=False)
    """By how much it was behind then, or less since: nothing once it has caught up, be it asleep."""
    _since: float = field(default=-inf, init=False)
    _was_at: float = field(default=0.0, init=False)
    _seen: bool = field(default=False, init=False)
    _silent_before: frozenset[str] = field(default=frozenset(), init=False)
    _untold: bool = field(default=False, init=False)
    _raised: float = field(default=-inf, init=False)
    _pause: float = field(default=0.0, init=False)

    def read(self, activity: PeerActivity, *, unanswered: UnansweredPeers = _NOBODY, now: float) -> bool:
        """Whether the clock has gone back since the readings before, by as much as matters; it is noted then."""
        self._known = min(self._known, activity.set_back)
        if activity.set_back - self._known < SET_BACK:
            return False
        self.note(activity, unanswered=unanswered, now=now)
        return True

    def note(self, activity: PeerActivity, *, unanswered: UnansweredPeers = _NOBODY, now: float) -> None:
        """The clock went back, as this reading says. `unanswered` are those that did not answer before either."""
        self.seconds, self._known, self._since = activity.set_back, activity.set_back, now
        self._was_at, self._seen = activity.was_at, activity.seen or (self._untold and self._seen)
        self._silent_before, self._untold = frozenset(unanswered.nodes), True

    def epoch(self, former: int | None, *, now: float) -> int | None:
        """The epoch to register now, `former` being in the record; None: none, or not yet."""
        if not self._untold or now < self._raised + self._pause:
            return None
        self._untold = False
        epoch, former = min(round(self._was_at), LATEST_CLOCK_EPOCH), former or 0
        # One second: what is read of the same handshake twice differs by a rounding.
        told = former >= epoch - 1 and not self._seen
        if self._caught_up(now) or told:
            return None
        again = now - self._raised < 2 * self._pause
        self._raised, self._pause = now, min(2 * self._pause, MOST_PAUSE) if again else FIRST_PAUSE
        # The clock may have been further ahead at some time than it was before this jump.
        return min(max(epoch, former + 1), LATEST_CLOCK_EPOCH)

    def matters(self, *, now: float) -> bool:
        """Whether there is to be an epoch or a sentence, or may be before long."""
        return self._untold or not (self._caught_up(now) or now - self._since >= LONGEST)

    def _caught_up(self, now: float) -> bool:
        return self._known <= 0 or now - self._since >= self.seconds

    def sentence(self, *, unanswered: UnansweredPeers = _NOBODY, now: float) -> str | None:
        """What to say of it; None: it does not matter. `unanswered` are those that do not answer: one that did not
        answer before either is silent for another reason. One with which there was a handshake since may have begun it,
        and drops this host's all the same."""
        passed = now - self._since
        if self._caught_up(now) or passed >= LONGEST:
            return None
        if passed >= SESSION_SECONDS and self._silent_before.issuperset(unanswered.nodes):
            return None
        when = "within 3 min"
        if self._untold:
            pause = shown_duration(round(self._pause))
            when = f"not before {pause} after the last time, since it goes back again and again"
        return (
            f"{CLOCK_WENT_BACK}{shown_duration(round(self.seconds))}: other hosts drop its WireGuard "
            f"handshakes as replays until they make it a new peer, which their agents do {when}; if a host "
            "does not answer after that, remove its WireGuard device (ip link del kilo0 there: its agent makes it "
            "anew); connect a laptop or phone anew"
        )
