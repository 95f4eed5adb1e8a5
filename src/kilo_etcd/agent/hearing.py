"""The task that listens to the host's own WireGuard: who is heard, and from where.

It reads the device every few seconds, less often the longer nothing changes, and not at all where nobody is behind NAT.
What it hears it tells etcd (`agent.sightings`); whom it should hear and does not, it names (`agent.unmet`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping

import trio
from attrs import frozen

from kilo_etcd import kernel, store
from kilo_etcd.agent.sightings import Account, Watched, seen_here, to_tell, to_watch
from kilo_etcd.agent.unmet import Attempts, partners
from kilo_etcd.kernel.state import Heard
from kilo_etcd.model import Node, Snapshot
from kilo_etcd.topology.hostplan import HostPlan

FIRST, LONGEST = 1.0, 10.0
"""Seconds between two readings: after a change, and when nothing has changed for long."""

WHILE_WAITING = 4.0
"""Seconds at most between two readings while somebody has yet to be heard."""

AT_FIRST, FIRST_WORDS = 30.0, 2.0
"""So many seconds after somebody has come or gone, so many at most between two readings: handshakes take their time."""

PER_PEER = 0.002
"""Seconds more between two readings for each peer of the device: reading takes that much longer too."""


SHORTEST = 0.5
"""Seconds at least between two readings, however much changes."""


@frozen
class _Followed:
    snapshot: Snapshot
    plan: HostPlan
    tunnels: bool


@frozen
class _Look:
    """What came of one reading. `due`: when to look again for the sake of what may not be told yet."""

    state: object = None
    concerned: bool = False
    longest: float = LONGEST
    due: float = float("inf")
    peers: int = 0


class Hearing:
    """Of node `name`. `on_unmet` is told the sentences when they change, `begin_over` whose sessions to make anew."""

    def __init__(
        self,
        device: kernel.Kernel,
        session: store.Session,
        name: str,
        *,
        on_unmet: Callable[[tuple[str, ...]], object],
        begin_over: Callable[[Collection[str]], object],
        rng: random.Random | None = None,
    ) -> None:
        self._device = device
        self._session = session
        self._name = name
        self._on_unmet = on_unmet
        self._begin_over = begin_over
        self._account = Account(rng or random.Random())
        self._attempts = Attempts()
        self._said: tuple[str, ...] = ()
        self._followed: _Followed | None = None
        self._concerned_by: _Followed | None = None
        """What the next two were computed from."""
        self._watched: Mapping[str, Watched] = {}
        self._partners: Mapping[str, Node] = {}
        self._company: object = None
        """Who there is to be heard."""
        self._changed = 0.0
        """When that changed last."""
        self._news = trio.Event()

    def follow(self, snapshot: Snapshot, plan: HostPlan, *, tunnels: bool) -> None:
        """`plan`, made of `snapshot`, is in the kernel. `tunnels`: this host uses them, as a silent member does not."""
        self._followed = _Followed(snapshot, plan, tunnels)
        self._news.set()

    async def run(self) -> None:
        """Listen until cancelled."""
        pause, before = FIRST, None
        while True:
            self._news = trio.Event()
            look = _Look() if self._followed is None else await self._look(self._followed)
            pause = FIRST if look.state != before else min(pause * 2, look.longest)
            before = look.state
            now, longer = trio.current_time(), PER_PEER * look.peers
            again = min(now + pause + longer if look.concerned else float("inf"), look.due)
            await trio.sleep(SHORTEST + longer)
            with trio.move_on_at(again):
                await self._news.wait()

    async def _look(self, followed: _Followed) -> _Look:
        snapshot, plan = followed.snapshot, followed.plan
        own = snapshot.nodes.get(self._name)
        if self._concerned_by is not followed:
            self._watched, self._partners = {}, {}
            if own is not None and followed.tunnels:
                self._watched, self._partners = to_watch(own, snapshot, plan), partners(own, snapshot, plan)
            self._concerned_by = followed
        watched, found = self._watched, self._partners
        told = self._session.sightings
        concerned = bool(watched or found)
        if own is None or not (concerned or told):
            self._say(())
            return _Look()
        heard = Heard()
        if concerned:
            try:
                heard = await self._device.hear()
            except (kernel.KernelError, OSError):
                return _Look(concerned=True)  # The reconciler will say so.
        now = trio.current_time()
        wanted = to_tell(seen_here(watched, heard), snapshot, self._name, told)
        ready, due = self._account.ready(wanted, told, now=now, nodes=len(snapshot.nodes))
        if ready != told:
            await self._session.put_sightings(ready)
        outcome = self._attempts.look(own, found, plan, heard, now=now)
        if outcome.begin_over:
            self._begin_over(outcome.begin_over)
        self._say(outcome.said)
        company = (watched.keys(), found.keys())
        if company != self._company:
            self._company, self._changed = company, now
        at_first = now - self._changed < AT_FIRST
        return _Look(
            state=(ready, outcome.said, company),
            concerned=concerned,
            longest=FIRST_WORDS if at_first else WHILE_WAITING if outcome.waiting else LONGEST,
            due=float("inf") if due is None else due,
            peers=len(plan.peers),
        )

    def _say(self, sentences: tuple[str, ...]) -> None:
        if sentences != self._said:
            self._said = sentences
            self._on_unmet(sentences)
