"""Holds this host's candidacy as `decide.stand` says: remembers since when the host has wished what it wishes.

It decides nothing itself and knows nothing of plans and kernels; whoever calls it says whether the host is ready.
"""

from __future__ import annotations

import trio

from kilo_etcd import store
from kilo_etcd.agent import decide
from kilo_etcd.model import Snapshot


class Candidacy:
    """The candidacy of node `name`, entered and given up through `session`."""

    def __init__(self, session: store.Session, name: str) -> None:
        self._session = session
        self._name = name
        self._eligible: decide.Stand | None = None
        self._steady_since = 0.0

    async def update(self, snapshot: Snapshot, *, leads: bool, ready: bool) -> float | None:
        """Stand, or stand no more, in the face of `snapshot`; when to call again although nothing changed."""
        now = trio.current_time()
        wanted = decide.eligible(snapshot, self._name)
        if wanted != self._eligible:
            self._eligible, self._steady_since = wanted, now
        held = self._session.candidacy
        current = None if held is None else decide.Stand(held.location, held.rank)
        hold, due = decide.stand(
            wanted,
            decide.Standing(now=now, steady_since=self._steady_since, ready=ready, leads=leads, current=current),
        )
        if hold is None:
            await self._session.leave()
        else:
            in_place = decide.keeps_its_place(current, hold, leads=leads)
            await self._session.enter(hold.location, hold.rank, in_place=in_place)
            if leads and snapshot.leaders.get(hold.location) != self._name:
                await self._session.record_leader(hold.location)
        return due
