"""The WireGuard monitor: reads which peers the host's own WireGuard receives from, and from where.

It reads the device every few seconds, less often the longer nothing changes. It publishes what it sees
(`agent.nat.observed_endpoints`); it reports peers that it should receive from and does not (`agent.nat.nat_traversal`,
`runtime.unanswered_peers`), and has those made anew that have begun anew (`agent.nat.renewed_peers`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, KeysView, Mapping

import trio
from attrs import frozen

from kilo_etcd import kernel
from kilo_etcd.agent.nat.nat_traversal import Attempts, partners
from kilo_etcd.agent.nat.observed_endpoints import (
    MADE_ANEW,
    PublishSchedule,
    Watched,
    kept,
    observed_here,
    to_publish,
    to_watch,
)
from kilo_etcd.agent.nat.renewed_peers import RenewedPeers
from kilo_etcd.kernel.state import PeerActivity
from kilo_etcd.model import Node, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.runtime.set_back import SetBack
from kilo_etcd.runtime.unanswered_peers import PeerAccounts, UnansweredPeers
from kilo_etcd.store.records import ObservedEndpointRecord
from kilo_etcd.store.session.session import Session

FIRST, LONGEST = 1.0, 10.0
"""Seconds between two readings: after a change, and when nothing has changed for long."""

WHILE_WAITING = 4.0
"""Seconds at most between two readings while some peer has not been received from yet."""

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
    since: float
    """When the first plan was followed since the last reading; what is news may have come with it."""


_Company = tuple[KeysView[str], KeysView[str]]
"""The public keys of the peers that are watched, and of the peers that are behind NAT like this host."""
_State = tuple[Mapping[str, ObservedEndpointRecord], tuple[str, ...], UnansweredPeers, _Company]
"""The observed endpoints to publish, the sentences on NAT traversal failures, who does not answer, and the peers that
the first two are about."""


@frozen
class _Look:
    """What came of one reading. `due`: when to look again for the sake of what may not be told yet."""

    state: _State | None = None
    concerned: bool = False
    longest: float = LONGEST
    due: float = float("inf")
    peers: int = 0


class WireGuardMonitor:
    """Of node `name`. `on_traversal_failures` is told the sentences when they change, `on_unanswered` who does not
    answer, `on_set_back` that `set_back` has noted that the host's clock went back, `reset_session` whose
    sessions to make anew, and `renew` which peers to make anew with a handshake from here."""

    def __init__(
        self,
        device: kernel.Kernel,
        session: Session,
        name: str,
        *,
        on_traversal_failures: Callable[[tuple[str, ...]], object],
        on_unanswered: Callable[[UnansweredPeers], object],
        set_back: SetBack,
        on_set_back: Callable[[], object],
        reset_session: Callable[[Collection[str]], object],
        renew: Callable[[Collection[str]], object],
        rng: random.Random | None = None,
    ) -> None:
        self._device = device
        self._session = session
        self._name = name
        self._on_traversal_failures = on_traversal_failures
        self._on_unanswered = on_unanswered
        self._set_back = set_back
        self._on_set_back = on_set_back
        self._reset_session = reset_session
        self._renew = renew
        self._schedule = PublishSchedule(rng or random.Random())
        self._attempts = Attempts()
        self._accounts = PeerAccounts()
        self._renewed = RenewedPeers()
        self._made_anew: dict[str, float] = {}
        """The public keys of those that it has had made anew of late, and when."""
        self._reported: tuple[str, ...] = ()
        self._unanswered = UnansweredPeers()
        self._followed: _Followed | None = None
        self._concerned_by: _Followed | None = None
        """What the next two were computed from."""
        self._watched: Mapping[str, Watched] = {}
        self._partners: Mapping[str, Node] = {}
        self._company: _Company | None = None
        """The peers to receive from."""
        self._changed = 0.0
        """When that changed last."""
        self._news = trio.Event()

    def follow(self, snapshot: Snapshot, plan: HostPlan, *, tunnels: bool) -> None:
        """`plan`, made of `snapshot`, is in the kernel. `tunnels`: this host uses them, as a silent member does not."""
        before = self._followed
        since = trio.current_time() if before is None or before is self._concerned_by else before.since
        self._followed = _Followed(snapshot, plan, tunnels, since)
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
            # Here and not with each plan: it takes as long as there are peers.
            self._renewed.follow(snapshot, plan, now=followed.since)
            self._concerned_by = followed
        watched, hidden = self._watched, self._partners
        published = self._session.observed_endpoints
        concerned = bool(plan.peers)
        if own is None or not (concerned or published):
            self._report((), UnansweredPeers())
            return _Look()
        activity = PeerActivity()
        if concerned:
            try:
                activity = await self._device.peer_activity()
            except (kernel.KernelError, OSError):
                return _Look(concerned=True)  # The reconciler will say so.
        now = trio.current_time()
        if concerned and self._set_back.read(activity, unanswered=self._unanswered, now=now):
            self._on_set_back()
        if renewed := self._renewed.look(activity, now=now):
            self._renew(renewed)
            self._made_anew |= dict.fromkeys(renewed, now)
        if self._made_anew:
            self._made_anew = {key: then for key, then in self._made_anew.items() if now - then < MADE_ANEW}
        seen = observed_here(watched, activity) | kept(watched, activity, published, self._made_anew)
        desired = to_publish(seen, snapshot, self._name, published)
        ready, due = self._schedule.ready(desired, published, now=now, nodes=len(snapshot.nodes))
        if ready != published:
            await self._session.put_observed_endpoints(ready)
        outcome = self._attempts.look(own, hidden, plan, activity, now=now)
        if outcome.reset_session:
            self._reset_session(outcome.reset_session)
        unanswered = UnansweredPeers()
        if followed.tunnels:
            unanswered = self._accounts.look(snapshot, plan, activity, apart_from=hidden)
        self._report(outcome.sentences, unanswered)
        company = (watched.keys(), hidden.keys())
        if company != self._company:
            self._company, self._changed = company, now
        at_first = bool(watched or hidden) and now - self._changed < AT_FIRST
        return _Look(
            state=(ready, outcome.sentences, unanswered, company),
            concerned=concerned,
            longest=FIRST_WORDS if at_first else WHILE_WAITING if outcome.waiting or unanswered.waiting else LONGEST,
            due=min(float("inf") if due is None else due, self._renewed.due(now)),
            peers=len(plan.peers),
        )

    def _report(self, sentences: tuple[str, ...], unanswered: UnansweredPeers) -> None:
        if sentences != self._reported:
            self._reported = sentences
            self._on_traversal_failures(sentences)
        if (unanswered.nodes, unanswered.peers) != (self._unanswered.nodes, self._unanswered.peers):
            self._unanswered = unanswered
            self._on_unanswered(unanswered)
