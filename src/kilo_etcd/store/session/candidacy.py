"""The candidacy that this host wants: where and as what it stands for leader, and whether it keeps its place.

Values only; `store.session.leased_writer` writes them.
"""

from __future__ import annotations

from datetime import UTC, datetime

from attrs import frozen

from kilo_etcd.model import CandidateClass
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, RecordError, decode_candidate, encode


@frozen
class Candidacy:
    """Where and as what this host stands for leader."""

    location: str
    rank: CandidateClass
    since: str = ""
    in_place: bool = False
    """Whether it may take the place of one that stands there, whose create revision it then keeps."""


class WantedCandidacy:
    """The candidacy of node `name`, as it is or will be as soon as etcd can be told."""

    def __init__(self, keys: Keys, name: str) -> None:
        self._keys = keys
        self._name = name
        self.current: Candidacy | None = None
        self._left = False
        """Whether this run has given it up, so that one that still stands is to go."""

    def enter(self, location: str, rank: CandidateClass, *, in_place: bool) -> None:
        """Want this one; one that is the same goes on with its time and its place."""
        now = self.current
        if now is None or (now.location, now.rank) != (location, rank):
            since = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            self.current = Candidacy(location, rank, since, in_place)
            self._left = False

    def leave(self) -> None:
        """Want none."""
        self._left = self._left or self.current is not None
        self.current = None

    def lose(self) -> None:
        """Want none until this run decides again, or etcd turns out to hold one under a lease that lives."""
        self.current = None

    def adopt(self, location: str, value: bytes) -> bool:
        """Go on with the one that stands, if it can be read, none is wanted yet and this run has given none up; whether
        it was taken."""
        if self.current is not None or self._left:
            return False
        try:
            record = decode_candidate(value)
        except RecordError:
            return False
        self.current = Candidacy(location, record.rank, record.since)
        return True

    @property
    def values(self) -> dict[str, bytes]:
        """What etcd is to hold of it."""
        if self.current is None:
            return {}
        key = self._keys.election(self.current.location, self._name)
        return {key: encode(CandidateRecord(rank=self.current.rank, since=self.current.since))}

    @property
    def in_place(self) -> bool:
        """Whether its key may be overwritten, and need not go first."""
        return self.current is not None and self.current.in_place
