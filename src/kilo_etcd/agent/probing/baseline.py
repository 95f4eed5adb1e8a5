"""Decides what a prober concludes while nobody has ever answered through its leader. Pure.

Silence counts only against a target that has answered before. A leader that has never forwarded has no such baseline,
and neither has a prober that has just started. In that case a report needs more evidence than a silence that follows
answers:

* the leader answers this host on the location's own network, and no target does through it;
* the takeover check succeeds: a direct WireGuard handshake with a target;
* a target confirms it, by a report of its own: it has tried members of the location through the leader, and none has
  answered. Echo requests travel the other way then, so a target whose firewall drops incoming ones disproves the
  suspicion instead of feeding it. If the leader answers the target, that counts at once; else (its port is blocked, or
  its tunnels are still coming up) once the report has stood for SETTLE_SECONDS.

A report that nobody confirms is taken back after OPEN_SECONDS, and is made again after a pause that doubles, so a
network that filters echo requests sees a write now and then and never a change of leader.
"""

from __future__ import annotations

from collections.abc import Iterable

from attrs import define, field

from kilo_etcd.model import Node, ProbeReport
from kilo_etcd.store.status_texts import NO_BASELINE

TRIES = 2
"""So many tries in a row, PERIOD apart, before all targets are tried at once."""

SETTLE_SECONDS = 5.5
"""WireGuard repeats a handshake after 5 s."""

OPEN_SECONDS = 8.0
"""For so long a report waits to be confirmed. One with a baseline stays in force after that, so that the other probers
go on trying, but says so: its prober is no takeover candidate until another host reports the leader too."""

PAUSE, LONGEST_PAUSE = 30.0, 600.0
"""Seconds between two reports without a baseline that came to nothing: at first, and at most."""

DEFERRAL = 5.0
"""The same, at first, after a try in which the leader itself did not answer."""

WARN_SECONDS = 20.0
"""After so long without a baseline the operator is told."""


@define
class NoBaseline:
    """The state of one prober towards one leader, by one candidacy. Times are seconds of one monotonic clock."""

    _tried: int = 0
    _since: float | None = None
    _due: float = float("-inf")
    _pause: float = PAUSE
    _deferral: float = DEFERRAL
    _shortened: float = PAUSE
    """New targets shorten a pause to this many seconds; it grows each time that they do."""
    _targets: frozenset[str] = frozenset()
    opened: float | None = None
    """When the report that stands without a baseline was made."""
    handshakes: bool | None = None
    """Whether a target has had a direct handshake; None: not tried."""
    confirmed: bool = field(default=False)
    """Whether a target has confirmed that the leader does not forward."""

    def silent(self, targets: Iterable[Node], now: float) -> bool:
        """A try had no answer; whether all `targets` must be tried at once now."""
        names = frozenset(node.name for node in targets)
        news, self._targets = names - self._targets, names
        if news and now + self._shortened < self._due:
            # New targets may know better. In a mesh in which somebody comes every minute, each time the pause is cut
            # short less.
            self._due = now + self._shortened
            self._shortened = min(self._shortened * 2, LONGEST_PAUSE)
        self._since = now if self._since is None else self._since
        self._tried += 1
        return self._tried >= TRIES and now >= self._due

    def waits(self, now: float) -> bool:
        """Whether no report is due for a while, so that there is no hurry to try again."""
        return now < self._due

    def hurry(self) -> None:
        """Whatever came to nothing may come to something now."""
        self._due, self._pause, self._deferral, self._shortened = float("-inf"), PAUSE, DEFERRAL, PAUSE

    def defer(self, now: float) -> None:
        """There is no report to be made: the leader itself does not answer."""
        self._due, self._deferral = now + self._deferral, min(self._deferral * 2, LONGEST_PAUSE)

    def open(self, now: float) -> None:
        """A report without a baseline is made."""
        self.opened = now if self.opened is None else self.opened

    def close(self, now: float) -> None:
        """It is taken back unconfirmed, and is not made again for a while."""
        self.opened = None
        self._due, self._pause = now + self._pause, min(self._pause * 2, LONGEST_PAUSE)

    def over(self, now: float) -> bool:
        """Whether the report has stood for as long as it may without being confirmed."""
        return self.opened is not None and now - self.opened >= OPEN_SECONDS

    def confirms(self, far: Iterable[ProbeReport], since: float, now: float) -> bool:
        """Whether the reports of targets confirm one that was made at `since`."""
        reports = tuple(far)
        self.confirmed = self.confirmed or bool(reports)
        return any(report.leader_reachable for report in reports) or (bool(reports) and now - since >= SETTLE_SECONDS)

    def sentence(self, leader: str, now: float) -> str | None:
        """What to tell the operator; None: nothing yet. It names no targets: those change."""
        if self._since is None or now - self._since < WARN_SECONDS:
            return None
        text = f"{NO_BASELINE} {leader}"
        if self.confirmed:
            return f"{text}, and they find no way through it either: {leader} does not forward; kgctl check says more"
        if self.handshakes:
            return (
                f"{text}, although they have handshakes with this host directly: if {leader} forwards, let ICMP echo "
                f"pass there, since without it no host notices if {leader} stops forwarding; kgctl check says more"
            )
        return (
            f"{text}, so no host notices if {leader} does not forward: are they up, and does UDP reach them? if both, "
            "let ICMP echo pass; kgctl check says more"
        )
