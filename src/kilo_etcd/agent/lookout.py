"""Whether the gateway by which this host leaves for the internet answers: a dead one is a hole that nobody sees.

WireGuard answers everything: data by data or, after ten seconds, by an empty packet; an attempt at a handshake by its
second half. So where more was sent than keepalives account for, and nothing has come back for a while, the other end is
down or not reached. What is idle is not suspected. Deciding is `Account`'s, which is pure; `Lookout` reads the device
and tells when that changes.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from attrs import define, frozen

from kilo_etcd import kernel
from kilo_etcd.kernel.state import ObservedPeer
from kilo_etcd.topology.hostplan import HostPlan, PeerPlan
from kilo_etcd.topology.wayout import ANYWHERE, NOTHING_BACK

PATIENCE = 20.0
"""Seconds without an answer before it is said: four attempts at a handshake."""

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
class Account:
    """What one peer's counters say over time. Times are seconds of one monotonic clock."""

    _key: str = ""
    _last: _Point | None = None
    _unanswered: float | None = None

    def silent(self, planned: PeerPlan, peer: ObservedPeer | None, *, now: float) -> bool:
        """Whether the peer has been spoken to for PATIENCE and has said nothing."""
        if peer is None:
            self._last = None
            return False
        last = self._last
        another = self._key != planned.public_key
        if last is None or another or last.received != peer.rx_bytes or peer.tx_bytes < last.sent:
            self._key, self._unanswered = planned.public_key, None
            self._last = _Point(peer.rx_bytes, peer.tx_bytes, now)
            return False
        keepalives = 2 + (now - last.time) / planned.persistent_keepalive if planned.persistent_keepalive else 2
        if peer.tx_bytes - last.sent <= KEEPALIVE_BYTES * keepalives:
            return False
        if self._unanswered is None:
            self._unanswered = now
        return now - self._unanswered >= PATIENCE


def gateway_of(plan: HostPlan) -> PeerPlan | None:
    """The WireGuard peer that a plan sends what is for anywhere to."""
    if plan.way_out is None or plan.way_out.by:
        return None
    return next((peer for peer in plan.peers.values() if set(ANYWHERE) <= set(peer.allowed_ips)), None)


class Lookout:
    """Watches the gateway of the plan in force. `tell` gets a sentence without its remedy when the gateway falls
    silent, and None when it answers again, or is not used any more."""

    def __init__(self, device: kernel.Kernel, tell: Callable[[str | None], object]) -> None:
        self._device = device
        self._tell = tell
        self._said: str | None = None
        self._gateway: PeerPlan | None = None
        self._news = trio.Event()

    def follow(self, plan: HostPlan) -> None:
        """`plan` is in the kernel."""
        before, self._gateway = self._gateway, gateway_of(plan)
        if (before is None) is not (self._gateway is None):
            self._news.set()

    async def run(self) -> None:
        """Watch until cancelled; where no gateway is used, nothing is read."""
        account = Account()
        while True:
            self._news = trio.Event()
            gateway = self._gateway
            if gateway is None:
                account = Account()
                self._say(None)
                await self._news.wait()
                continue
            try:
                heard = await self._device.hear()
            except (kernel.KernelError, OSError):
                pass  # Whoever programs the kernel will say so.
            else:
                silent = account.silent(gateway, heard.peers.get(gateway.public_key), now=trio.current_time())
                self._say(f"{NOTHING_BACK}{gateway.name}" if silent else None)
            with trio.move_on_after(PERIOD):
                await self._news.wait()

    def _say(self, sentence: str | None) -> None:
        if sentence != self._said:
            self._said = sentence
            self._tell(sentence)
