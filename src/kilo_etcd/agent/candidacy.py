"""Holds this host's candidacy as `decide.stand` says: remembers since when the host has wished what it wishes, and that
it was passed over.

It decides nothing itself and knows nothing of plans and kernels; whoever calls it says whether the host is ready.
"""

from __future__ import annotations

import trio

from kilo_etcd import store
from kilo_etcd.agent import decide
from kilo_etcd.agent.logs import get_logger
from kilo_etcd.model import CandidateClass, Snapshot
from kilo_etcd.topology import Topology
from kilo_etcd.topology.verdicts import sentence

_CHOSEN = (CandidateClass.ANNOTATED_PUBLIC, CandidateClass.ANNOTATED)


def _newly_chosen(before: decide.Stand | None, now: decide.Stand | None) -> bool:
    return before is not None and now is not None and now.rank in _CHOSEN and before.rank not in _CHOSEN


class Candidacy:
    """The candidacy of node `name`, entered and given up through `session`."""

    def __init__(self, session: store.Session, name: str) -> None:
        self._session = session
        self._name = name
        self._eligible: decide.Stand | None = None
        self._steady_since = 0.0
        self._wish: decide.Stand | None = None
        """As what this host would stand if it had never been passed over."""
        self._stood = False
        """Whether this host wanted to stand when it was last asked."""
        self._penance = decide.Penance()
        self._passed_over: str | None = None
        """Why this host does not lead although it is first in line, by the topology in force."""
        self._counted = False
        """`_passed_over` is in the penance: until its candidacy is gone a host is passed over again and again."""
        self._released = False
        """The hold-down is to end as soon as it can."""
        self.why: str | None = None
        """Why this host stands behind all other candidates, as the end of a sentence."""

    @property
    def penance(self) -> float | None:
        """Until when this host stands behind everyone, on trio's clock; None: it does not."""
        return self._penance.until if trio.current_time() < self._penance.until else None

    def release(self) -> None:
        """What kept this host from forwarding is gone: end its hold-down."""
        self._released = True

    def follow(self, topology: Topology) -> None:
        """Take note of whether this host, by the topology that is in force now, would lead but for the witnesses."""
        segment = topology.segment_of(self._name)
        text = None
        if segment.election.passed_over == self._name:
            text = sentence(self._name, topology.snapshot.verdicts.get(segment.location, ()))
        self._passed_over = text
        if text is not None and self.why is None:
            self.why = text
            get_logger(node=self._name, location=segment.location).warning("passed over as leader", why=text)
        elif self.why is not None and text is None and self.penance is None:
            self.why = None
            get_logger(node=self._name, location=segment.location).info("standing for leader as before")

    async def update(self, snapshot: Snapshot, *, leads: bool, ready: bool) -> float | None:
        """Stand, or stand no more, in the face of `snapshot`; when to call again although nothing changed."""
        now = trio.current_time()
        wanted = decide.eligible(snapshot, self._name)
        held = self._session.candidacy
        current = None if held is None else decide.Stand(held.location, held.rank)
        passed_over = self._passed_over is not None
        if passed_over and not self._counted:
            self._penance = self._penance.again(now)
            self._released = False
        if self._released and not passed_over:
            # Not while the candidacy stands that the reports are of: that has to go first.
            self._penance, self._released = decide.Penance(), False
        self._counted = passed_over
        if _newly_chosen(self._wish, wanted):
            # The operator's word, put since, counts for more than what witnesses said before.
            self._penance = decide.Penance()
        self._wish = wanted
        if wanted is not None and now < self._penance.until:
            wanted = decide.Stand(wanted.location, CandidateClass.PASSED_OVER)
        if wanted != self._eligible or (held is None and self._stood):
            # Who has lost its place with its lease waits as who has just come: if all did, whoever leads stands first.
            self._eligible, self._steady_since = wanted, now
        hold, due = decide.stand(
            wanted,
            decide.Standing(now=now, steady_since=self._steady_since, ready=ready, leads=leads, current=current),
        )
        self._stood = hold is not None
        if hold is None:
            await self._session.leave()
        else:
            in_place = decide.keeps_its_place(current, hold, leads=leads)
            await self._session.enter(hold.location, hold.rank, in_place=in_place)
            if leads and snapshot.leaders.get(hold.location) != self._name:
                await self._session.record_leader(hold.location)
        if now < self._penance.until and hold is not None:
            return self._penance.until if due is None else min(due, self._penance.until)
        return due
