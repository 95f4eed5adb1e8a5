"""When this host's WireGuard is to forget a peer that has begun anew.

WireGuard takes a handshake only if its timestamp is greater than any before from the same peer (whitepaper section
5.1), and goes by the peer's wall clock. If that clock went back, or the host boots with one that does, its handshakes
are dropped as replays until its clock has caught up, and nobody is told. Only a peer that is removed and added again is
forgotten, and its session with it.

So a host raises an epoch in its record (`model.node.StatedNode`) when its device is new, or when its clock went back,
and each other host makes the peer anew once, as soon as that costs nothing. If the device is new, the session is dead
as soon as nothing comes through it since the news. In either case a session older than 170 s is dead or unused:
WireGuard would have renewed it if it worked and packets went through. A session that works stays until nobody uses it:
there is no telling which end began it, and if this host did, the next handshake from the other end is dropped still.

Pure: plans, readings and times come in, public keys go out.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from attrs import define, evolve, field, frozen

from kilo_etcd.kernel.state import PeerActivity
from kilo_etcd.model import Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.handshake_order import MOST_TRIGGERED

QUIET_SECONDS = 1.2
"""How long a host that has begun anew has for a handshake: it looks itself after two seconds whether there was one
(`planning.handshake_order.STAGES`), and the two must not hinder each other."""

OVERDUE_SECONDS = 170.0
"""Age of a session that is about to end, and was not renewed when it should have been: who began it does so with what
it sends after 120 seconds, and with what it receives after 165 (whitepaper section 6.1 and 6.2)."""

_GRACE = 1.0
"""Seconds by which a handshake may come before the news that its host had for it."""

_NEXT = 0.5
"""Seconds until more are made anew if there are too many at once."""


@frozen
class _Epochs:
    device: int = 0
    clock: int = 0


@frozen
class _Renewed:
    since: float
    device: bool
    """Whether the peer's device is new, so that a session of before is lost there, and no session since was seen."""
    looked: float = inf
    """When the peer was first read since then."""
    received: int = 0
    """What had come from it then."""
    overdue: float = inf
    """When its session, which works, should have been renewed."""
    until: float = inf
    """When its clock has caught up, on the readings' clock; infinite: that is not known."""


@define
class RenewedPeers:
    """Times are seconds of one monotonic clock."""

    _epochs: Mapping[str, _Epochs] = field(factory=dict)
    """Public key -> the epochs of its node or peer in the last plan."""
    _pending: dict[str, _Renewed] = field(factory=dict)

    def follow(self, snapshot: Snapshot, plan: HostPlan, *, now: float) -> None:
        """`plan`, made of `snapshot`, is in the kernel."""
        epochs: dict[str, _Epochs] = {}
        for key, planned in plan.peers.items():
            node, peer = snapshot.nodes.get(planned.name), snapshot.peers.get(planned.name)
            if node is not None and node.public_key == key:
                epochs[key] = _Epochs(node.handshake_epoch or 0, node.clock_epoch or 0)
            elif peer is not None and peer.public_key == key:
                # A machine that connects and whose clock went back makes its record anew, and its device. A record
                # without a lease is somebody else's, who knows nothing of the peer's clock.
                epochs[key] = _Epochs(peer.registered_revision if peer.leased else 0)
        for key, epoch in list(epochs.items()):
            before = self._epochs.get(key)
            if before is None:
                if epoch.clock:
                    # This agent has begun since, and the one before may have waited for the session's end.
                    self._pending[key] = _Renewed(now, device=False, until=epoch.clock)
                continue
            # A clock epoch that falls and rises to the same value is no news.
            if before.clock > epoch.clock:
                epochs[key] = evolve(epoch, clock=before.clock)
            device = epoch.device > before.device
            # Less: etcd was restored, or is another one, and nobody's clock went back.
            if device or epoch.clock > before.clock:
                known = self._pending.get(key)
                self._pending[key] = _Renewed(now, device or (known is not None and known.device))
        # A peer that is gone is forgotten already.
        self._pending = {key: renewed for key, renewed in self._pending.items() if key in epochs}
        self._epochs = epochs

    def due(self, now: float) -> float:
        """When to look next; infinite: there is nothing to look for."""
        times = (
            time
            for renewed in self._pending.values()
            for time in (renewed.looked + QUIET_SECONDS if renewed.device else inf, renewed.overdue)
        )
        return min((time for time in times if time > now), default=inf)

    def look(self, activity: PeerActivity, *, now: float) -> frozenset[str]:
        """The public keys of the peers to make anew now: no more than handshakes are triggered at once."""
        reset: set[str] = set()
        for key, renewed in list(self._pending.items()):
            peer = activity.peers.get(key)
            if peer is None:
                continue
            new = not peer.last_handshake and not peer.rx_bytes
            if activity.time >= renewed.until or (new and renewed.until < inf):
                del self._pending[key]
                continue
            if renewed.looked > now:
                self._pending[key] = evolve(renewed, looked=now, received=peer.rx_bytes)
                continue
            silence = activity.silence(peer)
            works = silence <= now - renewed.since + _GRACE or peer.rx_bytes != renewed.received
            lost = renewed.device and not works and now - renewed.looked >= QUIET_SECONDS
            if silence >= OVERDUE_SECONDS or lost:
                if len(reset) < MOST_TRIGGERED:
                    reset.add(key)
                    del self._pending[key]
                else:
                    self._pending[key] = evolve(renewed, overdue=now + _NEXT)
            else:
                device = renewed.device and not works
                self._pending[key] = evolve(renewed, device=device, overdue=now + OVERDUE_SECONDS - silence)
        return frozenset(reset)
