"""Which queries on the peer-query port are answered: each once, and so many a second of one source.

A query is authentic (`agent.leader_hints.hints` verifies that), but anybody may have recorded it and send it again. Its
eight random bytes therefore are a stamp: the second in which it was made, two random bytes, and two check bytes by
which a stamp is known. It travels as it always did, so agents of other versions take it for the random number that it
was.

* A stamp whose second is within `WINDOW` of this host's clock is answered if it is later than the last one of its
  sender, or of the same second and new.
* Anything else is from an agent that makes no stamps, or from a host with another time. It is answered if it is none of
  the sender's last ones, slowly, and only if the sender has not shown a stamp within `WINDOW`: then it is a recording.
* A query over the location's own network is answered slowly where the rules above refuse it, unless it is the very
  same again: a clock that was ahead and has been corrected must not make a member look unreachable for minutes. Its
  answer is one small datagram to an address of the sender, so a recording does no harm at that rate.

What is remembered comes from authentic queries only, so strangers can neither fill nor change it. A source that does
not fit the sender has a rate of its own, in a table from which the one used longest ago goes first: a source that is
forgotten may ask at once. A source that fits is not limited before its query has been verified, or a stranger who
forges it would silence its owner.

Pure: times come in, booleans go out.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from hashlib import blake2s

from attrs import define, field

WINDOW = 300.0
"""Seconds by which the clocks of two hosts may differ."""
RATE, BURST = 4.0, 8.0
"""Answers a second to one node. A host that has lost etcd queries twice a second, all nodes in turn."""
SLOW_RATE, SLOW_BURST = 0.5, 4.0
"""The same for queries without a timestamp."""
STRANGE_RATE, STRANGE_BURST = 10.0, 20.0
"""Datagrams a second that are looked at from an address that is none of the sender's."""
MOST_NODES = 16384
MOST_SOURCES = 1024
_RECENT, _NUMBER = 32, 8
"""Numbers of one node that are remembered, and the bytes of each."""

_STAMP = struct.Struct("!IH")


def stamp(second: int, random: int) -> bytes:
    """Eight bytes for a query that is made in this second since 1970; `random` has 16 bits."""
    head = _STAMP.pack(second & 0xFFFFFFFF, random)
    return head + _check(head)


def second_of(nonce: bytes) -> int | None:
    """The second of a stamp, modulo 2**32; None: it is none."""
    return int(_STAMP.unpack(nonce[:6])[0]) if nonce[6:] == _check(nonce[:6]) else None


def _check(head: bytes) -> bytes:
    return blake2s(head, digest_size=2, person=b"kilo-ask").digest()


@define
class Bucket:
    """A token bucket: `burst` at once, `rate` a second after that."""

    rate: float
    burst: float
    room: float
    at: float

    def take(self, now: float) -> bool:
        """Whether there is one left."""
        self.room = min(self.burst, self.room + max(0.0, now - self.at) * self.rate)
        self.at = now
        if self.room < 1.0:
            return False
        self.room -= 1.0
        return True


@define
class _Sender:
    answers: Bucket
    slow: Bucket
    newest: int = 0
    """The second of its last stamp."""
    stamped_at: float = float("-inf")
    """When that was taken, by our clock."""
    recent: bytes = b""
    """Its last numbers, the newest at the end, without space between: there may be half a million of them."""

    def has(self, nonce: bytes) -> bool:
        """Whether the number is one of the last ones."""
        return any(self.recent[at : at + _NUMBER] == nonce for at in range(0, len(self.recent), _NUMBER))


@define
class Admission:
    """The memory of one host. `now`: seconds of a clock that never goes back; `wall`: seconds since 1970."""

    _senders: dict[bytes, _Sender] = field(factory=dict)
    _strange: dict[Hashable, Bucket] = field(factory=dict)

    def repeated(self, sender: bytes, nonce: bytes) -> bool:
        """Whether this very query has been accepted lately; for a look before anything is computed."""
        sender_state = self._senders.get(sender)
        return sender_state is not None and sender_state.has(nonce)

    def from_stranger(self, source: Hashable, now: float) -> bool:
        """Whether a datagram is looked at whose source is no address of the node that it names."""
        bucket = self._strange.pop(source, None) or Bucket(STRANGE_RATE, STRANGE_BURST, STRANGE_BURST, now)
        self._strange[source] = bucket
        if len(self._strange) > MOST_SOURCES:
            del self._strange[next(iter(self._strange))]
        return bucket.take(now)

    def answers(self, sender: bytes, nonce: bytes, *, now: float, wall: float, local: bool = False) -> bool:
        """Whether a query of `sender`, known to be authentic, is answered; `local`: it came over the location's own
        network."""
        sender_state = self._senders.pop(sender, None)
        if sender_state is None:
            sender_state = _Sender(Bucket(RATE, BURST, BURST, now), Bucket(SLOW_RATE, SLOW_BURST, SLOW_BURST, now))
        self._senders[sender] = sender_state
        if len(self._senders) > MOST_NODES:
            del self._senders[next(iter(self._senders))]
        if sender_state.has(nonce):
            return False
        second = second_of(nonce)
        bucket = sender_state.slow
        if second is not None and abs(wall - second) <= WINDOW:
            if second >= sender_state.newest or now - sender_state.stamped_at > 2 * WINDOW:
                sender_state.newest, sender_state.stamped_at = second, now
                bucket = sender_state.answers
            elif not local:
                return False
        elif now - sender_state.stamped_at <= WINDOW and not local:
            return False
        if not bucket.take(now):
            # Not remembered: what was not answered may be asked again.
            return False
        sender_state.recent = (sender_state.recent + nonce)[-_RECENT * _NUMBER :]
        return True
