"""That this host's clock went back, and for how long that matters: WireGuard of other hosts takes its handshakes for
replays until they have forgotten the former ones (`agent.nat.renewed_peers`), or until the clock has caught up.

Pure: times come in, a sentence goes out.
"""

from __future__ import annotations

from math import inf

from attrs import define, field

from kilo_etcd.model import SESSION_SECONDS
from kilo_etcd.runtime.parsing import shown_duration


@define
class SetBack:
    """Times are seconds of one monotonic clock."""

    _seconds: float = field(default=0.0, init=False)
    _since: float = field(default=-inf, init=False)

    def note(self, seconds: float, *, now: float) -> None:
        """The clock went back, all in all by `seconds`."""
        self._seconds, self._since = seconds, now

    def sentence(self, *, unanswered: bool, now: float) -> str | None:
        """What to say of it; None: it does not matter, or not any more. `unanswered`: some node does not answer."""
        passed = now - self._since
        if passed >= self._seconds or (passed >= SESSION_SECONDS and not unanswered):
            return None
        return (
            f"this host's clock went back by {shown_duration(round(self._seconds))}: other hosts drop its WireGuard "
            "handshakes as replays until they make it a new peer, which their agents do within some minutes; if a host "
            "does not answer after that, remove its WireGuard device (ip link del kilo0 there: its agent makes it "
            "anew); connect a laptop or phone anew"
        )
