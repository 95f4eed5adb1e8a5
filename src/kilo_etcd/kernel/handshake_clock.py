"""The times of the peers' last handshakes, on a clock that is never set.

WireGuard dates its handshakes by the host's wall clock, and what follows from their age (whether an endpoint is in use,
whether somebody behind NAT is still seen) must not change when that clock is set. So dates are told by a clock that
began with the wall clock's time and has gone on with the time since boot, which includes sleep and which only ever goes
forward. As long as nobody sets the wall clock the two are the same, and nothing is changed or copied.

Pure but for the two clocks, which are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from attrs import evolve

from kilo_etcd.kernel.state import ObservedPeer

SET_BACK = 120.0
"""Seconds at least by which the host's clock goes back before anybody is told: in a session that goes on a host begins
handshakes so far apart (whitepaper section 6.1, Rekey-After-Time), so that less makes no timestamp older than the one
before. One that ended sooner waits until the clock has caught up, for less than that."""

SET_SECONDS = 1.0
"""Differences between the two clocks that grow less than this between two readings are not worth a thought."""


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class HandshakeClock:
    """Dates the readings of one device, one after the other."""

    def __init__(self, wall: Callable[[], float] = time.time, boot: Callable[[], float] = _since_boot) -> None:
        self._wall, self._boot = wall, boot
        self._began = wall() - boot()
        self._shift = 0.0
        """What has to be added to the wall clock's time."""
        self.set_back = 0.0
        """Seconds by which the wall clock is behind the latest date that it had, or that a handshake has, as far as is
        known."""
        self.was_at = wall()
        """That date (Unix seconds)."""
        self.seen = False
        """Whether the wall clock was seen to go back; else a handshake of the future is all that says so."""
        self._last: Mapping[str, ObservedPeer] = {}
        """The last reading as it came."""
        self._fixed: dict[str, tuple[float, float]] = {}
        """Key -> handshake as WireGuard dates it, and when it was: those from before the clock was set."""

    def now(self) -> float:
        """Seconds since 1970, if the wall clock was right when this began."""
        return self._boot() + self._began

    def date(self, peers: Mapping[str, ObservedPeer]) -> dict[str, ObservedPeer]:
        """A reading that was just made, with its handshakes on this clock."""
        now, wall = self.now(), self._wall()
        shift = now - wall
        if abs(shift - self._shift) > SET_SECONDS:
            for key, former in self._last.items():
                if former.last_handshake and self._fixed.get(key, (0.0, 0.0))[0] != former.last_handshake:
                    self._fixed[key] = former.last_handshake, former.last_handshake + self._shift
            self.was_at = max(self.was_at, now - self._shift)
            self.seen |= shift > self._shift
            self._shift = shift
        self._last = peers
        self._fixed = {
            key: fixed
            for key, fixed in self._fixed.items()
            if (peer := peers.get(key)) is not None and peer.last_handshake == fixed[0]
        }
        observed_peers = dict(peers)
        for key, peer in peers.items():
            reported = peer.last_handshake
            if not reported:
                continue
            when = self._fixed[key][1] if key in self._fixed else reported + self._shift
            if when > now + SET_SECONDS:
                # The clock was ahead when this agent was not there yet. It ages from now on.
                if reported > self.was_at + SET_SECONDS:
                    self.was_at, self.seen = reported, False
                self._fixed[key], when = (reported, now), now
            if when != reported and abs(when - reported) > SET_SECONDS:
                observed_peers[key] = evolve(peer, last_handshake=when)
        self.was_at = max(self.was_at, wall)
        self.set_back = self.was_at - wall
        return observed_peers
