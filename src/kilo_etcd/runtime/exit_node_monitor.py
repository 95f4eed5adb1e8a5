"""Whether the exit node by which this host leaves for the internet answers: a dead one drops packets silently.

WireGuard answers everything: data by data or, after ten seconds, by an empty packet; an attempt at a handshake by its
second half. So where more was sent than keepalives account for, and nothing has come back for a while, the other end is
down or not reached. What is idle is not suspected. `Counters` decides, which is pure; `ExitNodeMonitor` reads the
device and tells when that changes.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from attrs import define, frozen

from kilo_etcd import kernel
from kilo_etcd.kernel.state import ObservedPeer
from kilo_etcd.model.hostplan import HostPlan, PeerPlan
from kilo_etcd.planning.exit_node import ANYWHERE, NOTHING_BACK

PATIENCE = 20.0
"""Seconds without an answer before it is reported: four attempts at a handshake."""

PERIOD = 5.0
"""Seconds between two readings."""

KEEPALIVE_BYTES = 32
"""An empty WireGuard packet; the one that nobody answers."""


@frozen
class _Point:
    """The counters when something last came in, in bytes and seconds."""

    received: int
    sent: int
    time: float


@define
class Counters:
    """What one peer's counters say over time. Times are seconds of one monotonic clock."""

    _key: str = ""
    _last: _Point | None = None
    _unanswered: float | None = None

    def silent(self, planned: PeerPlan, peer: ObservedPeer | None, *, now: float) -> bool:
        """Whether packets have been sent to the peer for PATIENCE and none has come back."""
        if peer is None:
            self._last = None
            return False
        last = self._last
        changed = self._key != planned.public_key
        if last is None or changed or last.received != peer.rx_bytes or peer.tx_bytes < last.sent:
            self._key, self._unanswered = planned.public_key, None
            self._last = _Point(peer.rx_bytes, peer.tx_bytes, now)
            return False
        keepalives = 2 + (now - last.time) / planned.persistent_keepalive if planned.persistent_keepalive else 2
        if peer.tx_bytes - last.sent <= KEEPALIVE_BYTES * keepalives:
            return False
        if self._unanswered is None:
            self._unanswered = now
        return now - self._unanswered >= PATIENCE


def exit_node_of(plan: HostPlan) -> PeerPlan | None:
    """The WireGuard peer that a plan sends what is for anywhere to."""
    if plan.exit_route is None or plan.exit_route.by:
        return None
    return next((peer for peer in plan.peers.values() if set(ANYWHERE) <= set(peer.allowed_ips)), None)


class ExitNodeMonitor:
    """Watches the exit node of the plan in force. `tell` gets a sentence without its remedy when the exit node falls
    silent, and None when it answers again, or is not used any more."""

    def __init__(self, device: kernel.Kernel, tell: Callable[[str | None], object]) -> None:
        self._device = device
        self._tell = tell
        self._reported: str | None = None
        self._exit_node: PeerPlan | None = None
        self._news = trio.Event()

    def follow(self, plan: HostPlan) -> None:
        """`plan` is in the kernel."""
        before, self._exit_node = self._exit_node, exit_node_of(plan)
        if (before is None) is not (self._exit_node is None):
            self._news.set()

    async def run(self) -> None:
        """Watch until cancelled; if no exit node is used, nothing is read."""
        counters = Counters()
        while True:
            self._news = trio.Event()
            exit_node = self._exit_node
            if exit_node is None:
                counters = Counters()
                self._report(None)
                await self._news.wait()
                continue
            try:
                activity = await self._device.peer_activity()
            except (kernel.KernelError, OSError):
                pass  # The reconciler reports it.
            else:
                silent = counters.silent(exit_node, activity.peers.get(exit_node.public_key), now=trio.current_time())
                self._report(f"{NOTHING_BACK}{exit_node.name}" if silent else None)
            with trio.move_on_after(PERIOD):
                await self._news.wait()

    def _report(self, sentence: str | None) -> None:
        if sentence != self._reported:
            self._reported = sentence
            self._tell(sentence)
