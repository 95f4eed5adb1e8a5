"""Holds this host's candidacy as `candidacy_policy.decide_candidacy` says: remembers since when the host has desired
its candidacy, and that it was demoted.

It decides nothing itself and knows nothing of plans and kernels; the caller says whether the host is ready.
"""

from __future__ import annotations

import trio

from kilo_etcd.agent.leadership import candidacy_policy
from kilo_etcd.agent.leadership.served_families import gives_way
from kilo_etcd.model import CandidateClass, Snapshot
from kilo_etcd.runtime.logs import get_logger
from kilo_etcd.store.session.session import Session
from kilo_etcd.topology.probe_reports import sentence
from kilo_etcd.topology.segments import Topology

_CHOSEN = (CandidateClass.ANNOTATED_PUBLIC, CandidateClass.ANNOTATED)


def _newly_chosen(
    before: candidacy_policy.DesiredCandidacy | None, now: candidacy_policy.DesiredCandidacy | None
) -> bool:
    return before is not None and now is not None and now.rank in _CHOSEN and before.rank not in _CHOSEN


class CandidacyTask:
    """The candidacy of node `name`, entered and given up through `session`."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name
        self._eligible: candidacy_policy.DesiredCandidacy | None = None
        self._stable_since = 0.0
        self._desired: candidacy_policy.DesiredCandidacy | None = None
        """The candidacy that this host would have if it had never been demoted."""
        self._stood = False
        """Whether this host wanted to stand when it was last asked."""
        self._hold_down = candidacy_policy.HoldDown()
        self._demoted: str | None = None
        """Why this host does not lead although it is first in line, by the topology in force."""
        self._counted = False
        """`_demoted` is counted in the hold-down: until its candidacy is gone a host is demoted again and again."""
        self._released = False
        """The hold-down is to end as soon as it can."""
        self._gives_way_since: float | None = None
        self.why: str | None = None
        """Why this host is behind all other candidates, as the end of a sentence."""
        self.not_standing: str | None = None
        """Why this host is no candidate although the operator has chosen it, as a sentence."""

    @property
    def demoted_until(self) -> float | None:
        """Until when this host is behind all others, on trio's clock; None: it is not."""
        return self._hold_down.until if trio.current_time() < self._hold_down.until else None

    def release(self) -> None:
        """End the hold-down, since nothing keeps this host from forwarding any more."""
        self._released = True

    def follow(self, topology: Topology) -> None:
        """Take note of whether this host, by the topology that is in force now, would lead but for the probe reports;
        and of whether it would stand, but for a family of the mesh. What its kernel refuses is said as such."""
        desired = candidacy_policy.eligible(topology.snapshot, self._name)
        rival = None
        if desired is not None and desired.rank in _CHOSEN:
            rival = gives_way(topology.snapshot, self._name, frozenset(), desired.rank)
        self.not_standing = None
        if rival is not None:
            self.not_standing = (
                f"this host is annotated as leader, and does not stand: {rival}; give it that family, or "
                f"kgctl annotate {self._name} leader-"
            )
        segment = topology.segment_of(self._name)
        text = None
        if segment.election.demoted == self._name:
            text = sentence(self._name, topology.snapshot.probe_reports.get(segment.location, ()))
        self._demoted = text
        if text is not None and self.why is None:
            self.why = text
            get_logger(node=self._name, location=segment.location).warning("demoted as leader", why=text)
        elif self.why is not None and text is None and self.demoted_until is None:
            self.why = None
            get_logger(node=self._name, location=segment.location).info("candidacy is as before")

    def _succeeded(self, topology: Topology, location: str | None, *, leaves: bool) -> bool:
        if location is None or self._name not in topology.snapshot.nodes:
            return False
        return candidacy_policy.succeeded(topology, self._name, location, leaves=leaves)

    async def update(
        self,
        snapshot: Snapshot,
        topology: Topology,
        *,
        leads: bool,
        ready: bool,
        refused: frozenset[int] = frozenset(),
    ) -> float | None:
        """Stand, or stand no more, in the face of `snapshot`; when to call again although nothing changed. `topology`
        is the one that is in force, perhaps of an older snapshot; `refused` are the families in which the kernel does
        not take what the mesh needs."""
        now = trio.current_time()
        desired = candidacy_policy.eligible(snapshot, self._name)
        held = self._session.candidacy
        current = None if held is None else candidacy_policy.DesiredCandidacy(held.location, held.rank)
        demoted = self._demoted is not None
        if demoted and not self._counted:
            self._hold_down = self._hold_down.again(now)
            self._released = False
        if self._released and not demoted:
            # Not while the candidacy stands that the reports are of: that has to go first.
            self._hold_down, self._released = candidacy_policy.HoldDown(), False
        self._counted = demoted
        if _newly_chosen(self._desired, desired):
            # The operator's choice, made since, outweighs earlier probe reports.
            self._hold_down = candidacy_policy.HoldDown()
        self._desired = desired
        if desired is not None and now < self._hold_down.until:
            desired = candidacy_policy.DesiredCandidacy(desired.location, CandidateClass.DEMOTED)
        if desired != self._eligible or (held is None and self._stood):
            # A host that has lost its place with its lease waits like one that has just come: if all did, the present
            # leader is first.
            self._eligible, self._stable_since = desired, now
        rival = None if desired is None else gives_way(snapshot, self._name, refused, desired.rank)
        if rival is None:
            waited = self._gives_way_since is not None and held is None
            if waited and desired is not None and snapshot.candidates.get(desired.location):
                # A family that comes and goes must not move leadership each time. Without a candidate nobody may wait.
                self._stable_since = now
            self._gives_way_since = None
        elif self._gives_way_since is None:
            self._gives_way_since = now
        hold, due = candidacy_policy.decide_candidacy(
            desired,
            candidacy_policy.CandidacyInputs(
                now=now, stable_since=self._stable_since, ready=ready, leads=leads, current=current,
                gives_way_since=self._gives_way_since,
            ),
        )  # fmt: skip
        if rival is not None and current is not None and hold is None:
            get_logger(node=self._name, location=current.location).warning("candidacy given up", why=str(rival))
        self._stood = hold is not None
        if hold is None:
            where = None if held is None else held.location
            await self._session.leave(succeeded=self._succeeded(topology, where, leaves=True))
        else:
            in_place = candidacy_policy.keeps_its_place(current, hold, leads=leads)
            succeeded = self._succeeded(topology, hold.location, leaves=False)
            await self._session.enter(hold.location, hold.rank, in_place=in_place, succeeded=succeeded)
            # The topology in force may be older than the snapshot: without this host, whose record was deleted, or with
            # it in another location, where it leads.
            own = topology.snapshot.nodes.get(self._name)
            here = own is not None and own.location == hold.location
            if leads and here and not candidacy_policy.on_record(topology.snapshot, self._name):
                await self._session.record_leader(hold.location, known_revision=topology.snapshot.revision)
        if now < self._hold_down.until and hold is not None:
            return self._hold_down.until if due is None else min(due, self._hold_down.until)
        return due
