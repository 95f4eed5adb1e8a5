"""Queries other nodes while etcd is away, and answers those that ask, for as long as the agent runs."""

from __future__ import annotations

from collections.abc import Callable, Collection

import trio

from kilo_etcd.agent.leader_hints.hints import LeaderHints, followed
from kilo_etcd.agent.leader_hints.peer_query import DatagramTransport, PeerQuery
from kilo_etcd.model import IPAddress, Snapshot
from kilo_etcd.runtime.logs import Logger, Once
from kilo_etcd.topology.segments import Topology

TRANSPORT_RETRY_SECONDS = 60.0
"""After the port for peer queries could not be had."""


class PeerQueryService:
    """`run` is its task. `secret` is what the host's key and a public key agree on, and `transport` the way to other
    nodes; None: no node is queried."""

    def __init__(
        self,
        name: str,
        transport: DatagramTransport | None,
        secret: Callable[[str], bytes | None] | None,
        once: Once,
        *,
        log: Callable[[], Logger],
        etcd_away: Callable[[], bool],
        sources: Callable[[], Collection[IPAddress]],
        nudge: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is called when `answers` is another."""
        self._transport, self._once, self._log = transport, once, log
        self._nudge, self._on_change = nudge, on_change
        self.hints = LeaderHints()
        """The leader hints of other nodes since etcd was out of reach."""
        self.answers = False
        """Whether this host answers peer queries: it has the port."""
        self.peer_query = (
            None
            if secret is None or transport is None
            else PeerQuery(name, transport, secret, etcd_away=etcd_away, on_hints=self._note_hints, sources=sources)
        )

    def follow(self, topology: Topology) -> Snapshot:
        """The snapshot of `topology`, with the leaders that others report while etcd is away."""
        if self.peer_query is None:
            return topology.snapshot
        self.peer_query.follow(topology)
        return followed(topology, self.hints)

    def _note_hints(self, hints: LeaderHints) -> None:
        self.hints = hints
        if hints.leaders:
            self._log().warning("etcd is out of reach; following the leaders that other nodes report",
                                revision=hints.revision, leaders=sorted(set(hints.leaders.values())))  # fmt: skip
        else:
            self._log().info("following etcd again, no longer leader hints")
        self._nudge()

    async def run(self) -> None:
        """Run the peer query, as long as this host has etcd or others have."""
        while self.peer_query is not None and self._transport is not None:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._transport.run)
                    self._once.clear("peer query", "peer queries work again")
                    self._note_answers(True)
                    await self.peer_query.run()
            except* OSError as group:
                lone: BaseException = group
                while isinstance(lone, BaseExceptionGroup):
                    lone = lone.exceptions[0]
                self._once.warning("peer query", "peer queries do not work while etcd is away",
                                   error=str(lone))  # fmt: skip
                self._note_answers(False)
            await trio.sleep(TRANSPORT_RETRY_SECONDS)

    def _note_answers(self, answers: bool) -> None:
        if answers != self.answers:
            self.answers = answers
            self._on_change()
