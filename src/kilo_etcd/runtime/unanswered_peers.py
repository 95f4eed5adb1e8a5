"""Which peers do not answer although this host's WireGuard sends to them.

A peer without a session that is sent to for `PATIENCE` seconds gets a handshake every five, and answers each that it
gets. If nothing comes, packets get lost on the way or at the other end: it is down, a firewall drops them, or its
WireGuard takes this host's handshakes for replays since the clock here went back. A peer that nothing is sent to says
nothing either way, and with a session not everything is answered: keepalives are not.

Pure: readings come in, names go out.
"""

from __future__ import annotations

from collections.abc import Collection

from attrs import define, field, frozen

from kilo_etcd.kernel.state import PeerActivity, Unanswered
from kilo_etcd.kernel.unanswered import begun, read_again
from kilo_etcd.model import SESSION_SECONDS, Snapshot
from kilo_etcd.model.hostplan import HostPlan

PATIENCE = 15.0
"""Seconds between the first packet without an answer and the last one before a peer counts."""

LASTING = 300.0
"""Seconds for which it still counts after the last packet that was sent there."""


@frozen
class UnansweredPeers:
    """The names, sorted, of those that do not answer. `waiting`: others may be found before long."""

    nodes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    """Outside peers: a laptop that sleeps is one."""
    waiting: bool = False


@define
class PeerAccounts:
    """The accounts of all peers that a host uses. Times are seconds of the readings' clock."""

    _accounts: dict[str, Unanswered] = field(factory=dict)
    _silent: frozenset[str] = frozenset()

    def look(
        self, snapshot: Snapshot, plan: HostPlan, activity: PeerActivity, *, apart_from: Collection[str] = ()
    ) -> UnansweredPeers:
        """What one more reading shows; not of the public keys `apart_from`, which others account for."""
        accounts: dict[str, Unanswered] = {}
        silent: set[str] = set()
        nodes: list[str] = []
        peers: list[str] = []
        waiting = False
        for key, planned in plan.peers.items():
            peer = activity.peers.get(key)
            if peer is None or not planned.in_use or key in apart_from:
                continue
            before = self._accounts.get(key)
            account = begun(peer, activity.time) if before is None else read_again(before, peer, activity.time)
            accounts[key] = account
            sending = account.sent_at - account.since
            lasting = key in self._silent and activity.time - account.sent_at < LASTING
            if activity.silence(peer) < SESSION_SECONDS:
                continue
            if sending >= PATIENCE or (lasting and before is not None and before.received == peer.rx_bytes):
                silent.add(key)
                node = snapshot.nodes.get(planned.name)
                if node is None or node.public_key != key:
                    peers.append(planned.name)
                    continue
                nodes.append(planned.name)
            elif sending >= 0:
                waiting = True
        self._accounts, self._silent = accounts, frozenset(silent)
        return UnansweredPeers(tuple(sorted(nodes)), tuple(sorted(peers)), waiting)
