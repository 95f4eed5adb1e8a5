"""Limits how often a line of the log is repeated: what comes and goes all the time must not flood the journal.

The first `BURST` lines of a kind are written as they come. After that they are written one every `PAUSE` seconds, the
newest, with the number of those that were left out before it. So the first are never hidden, the state that a line
tells is never older than a pause, and the last is written when its pause is over. A kind that has been quiet for a
while has its burst again. Lines are of one kind if one node says the same sentence at the same level; other fields may
differ. Where sentences differ and yet are alike, as those on many rejected records, the field `LIKE` names their kind
instead.

Pure: times come in, lines go out. Errors that end the agent, and what is for debugging, are not for this.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from attrs import define, evolve, field, frozen

BURST = 10
"""Lines of a kind that are written one after the other."""
PAUSE = 10.0
"""Seconds between two lines of a kind after that; and what it takes to have one more line of the burst again."""
_ONE = 1.0 - 1e-6
"""Room for a line, as sums of fractions make it."""
KINDS = 1000
"""Kinds that are remembered; the one that was used longest ago is forgotten first."""

LIKE = "_like"
"""The field, never shown, that says of what kind a line is whatever its sentence."""

LEFT_OUT = "left_out_before"
"""The field that tells how many lines of its kind were left out before a line."""


@frozen
class Line:
    """One event of the log."""

    level: str
    event: Mapping[str, Any]

    @property
    def kind(self) -> Hashable:
        """By what lines count as repetitions of each other: level, sentence (or the field `LIKE` in its place), and the
        node that they are about."""
        like = self.event.get(LIKE)
        return self.level, str(self.event.get("event", "")) if like is None else (like,), self.event.get("node")


@define
class _Kind:
    room: float
    """Lines that may be written at once, as of `at`."""
    at: float
    left_out: int = 0
    newest: Line | None = None
    """What was left out last."""


@define
class LogRateLimiter:
    """The account. Times are seconds of one monotonic clock."""

    _kinds: dict[Hashable, _Kind] = field(factory=dict)

    def offer(self, line: Line, now: float) -> list[Line]:
        """What is to be written now that `line` has come: that line, others whose pause is over, or nothing."""
        lines = self.due(now)
        kind = self._kinds.pop(line.kind, None) or _Kind(BURST, now)
        self._kinds[line.kind] = kind
        if len(self._kinds) > KINDS:
            oldest = self._kinds.pop(next(iter(self._kinds)))
            if oldest.newest is not None:
                lines.append(_pop_newest(oldest))
        _refill(kind, now)
        if kind.room >= _ONE:
            kind.room -= 1.0
            lines.append(line)
        else:
            kind.left_out += 1
            kind.newest = line
        return lines

    def due(self, now: float) -> list[Line]:
        """Lines that were left out and whose pause is over."""
        result = []
        for kind in self._kinds.values():
            if kind.newest is not None:
                _refill(kind, now)
                if kind.room >= _ONE:
                    kind.room -= 1.0
                    result.append(_pop_newest(kind))
        return result

    def rest(self) -> list[Line]:
        """All that was left out and is the last of its kind, for the end."""
        return [_pop_newest(kind) for kind in self._kinds.values() if kind.newest is not None]


def _refill(kind: _Kind, now: float) -> None:
    kind.room = min(float(BURST), kind.room + max(0.0, now - kind.at) / PAUSE)
    kind.at = now


def _pop_newest(kind: _Kind) -> Line:
    assert kind.newest is not None
    line, others = kind.newest, kind.left_out - 1
    kind.newest, kind.left_out = None, 0
    return evolve(line, event={**line.event, LEFT_OUT: others}) if others else line
