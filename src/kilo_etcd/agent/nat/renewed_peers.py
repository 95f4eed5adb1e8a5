"""When this host's WireGuard is to forget a peer that has begun anew.

WireGuard takes a handshake only if its timestamp is greater than any before from the same peer (whitepaper section
5.1), and goes by the peer's wall clock. If that clock went back, or the host boots with one that does, its handshakes
are dropped as replays until its clock has caught up, and nobody is told. Only a peer that is removed and added again is
forgotten, and its session with it.

So a host raises the epoch in its record (`model.node.StatedNode.handshake_epoch`) when its device is new or its clock
went back, and each other host makes the peer anew once, as soon as that costs nothing: the session is dead, since
nothing came through it since the news, or is so old that WireGuard would have renewed one that works. A session that
works stays.

Pure: plans, readings and times come in, public keys go out.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from attrs import define, evolve, field, frozen

from kilo_etcd.kernel.state import PeerActivity
from kilo_etcd.model import Snapshot
from kilo_etcd.model.hostplan import HostPlan

QUIET_SECONDS = 1.2
"""How long a host that has begun anew has for a handshake: it looks itself after two seconds whether there was one
(`planning.handshake_order.STAGES`), and the two must not hinder each other."""

OVERDUE_SECONDS = 170.0
"""Age of a session that is about to end, and was not renewed when it should have been: who began it does so with what
it sends after 120 seconds, and with what it receives after 165 (whitepaper section 6.1 and 6.2)."""

_GRACE = 1.0
"""Seconds by which a handshake may come before the news that its host had for it."""


@frozen
class _Renewed:
    since: float
    looked: float = inf
    """When the peer was first read since then."""
    received: int = 0
    """What had come from it then."""
    overdue: float = inf
    """When its session, which works, should have been renewed."""


@define
class RenewedPeers:
    """Times are seconds of one monotonic clock."""

    _epochs: Mapping[str, int | None] | None = None
    """Public key -> the epoch of its node or peer in the last plan; None: there was none yet."""
    _pending: dict[str, _Renewed] = field(factory=dict)

    def follow(self, snapshot: Snapshot, plan: HostPlan, *, now: float) -> None:
        """`plan`, made of `snapshot`, is in the kernel."""
        epochs: dict[str, int | None] = {}
        for key, planned in plan.peers.items():
            node, peer = snapshot.nodes.get(planned.name), snapshot.peers.get(planned.name)
            if node is not None and node.public_key == key:
                epochs[key] = node.handshake_epoch
            elif peer is not None and peer.public_key == key:
                # A machine that connects and whose clock goes back makes its record anew.
                epochs[key] = peer.registered_revision
        if self._epochs is not None:
            for key, epoch in epochs.items():
                if self._epochs.get(key, epoch) != epoch:
                    self._pending[key] = _Renewed(now)
        # A peer that is gone is forgotten already.
        self._pending = {key: renewed for key, renewed in self._pending.items() if key in epochs}
        self._epochs = epochs

    def due(self, now: float) -> float:
        """When to look next; infinite: there is nothing to look for."""
        times = (
            time
            for renewed in self._pending.values()
            for time in (min(renewed.looked, now) + QUIET_SECONDS, renewed.overdue)
        )
        return min((time for time in times if time > now), default=inf)

    def look(self, activity: PeerActivity, *, now: float) -> frozenset[str]:
        """The public keys of the peers to make anew now."""
        reset = set()
        for key, renewed in list(self._pending.items()):
            peer = activity.peers.get(key)
            if peer is None:
                continue
            if renewed.looked > now:
                self._pending[key] = evolve(renewed, looked=now, received=peer.rx_bytes)
                continue
            silence = activity.silence(peer)
            works = silence <= now - renewed.since + _GRACE or peer.rx_bytes != renewed.received
            if silence >= OVERDUE_SECONDS or (not works and now - renewed.looked >= QUIET_SECONDS):
                reset.add(key)
                del self._pending[key]
            else:
                self._pending[key] = evolve(renewed, overdue=now + OVERDUE_SECONDS - silence)
        return frozenset(reset)
