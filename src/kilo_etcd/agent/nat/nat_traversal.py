"""NAT traversal: how long this host waits for nodes that are behind NAT, as it is, and what it reports then.

Two hosts behind NATs need each other's observed endpoints from etcd and a few attempts, so silence means nothing at
first. If it lasts, a sentence for the operator has what the mesh knows of the two NATs (`topology.nat`). And
if a partner that was received from falls silent while others see it elsewhere, its NAT has moved it: this host's own
NAT lets in nothing from there, so the two reset their session.

Pure: readings and times come in, sentences and public keys go out.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, field, frozen

from kilo_etcd.agent.nat.observed_endpoints import STALE
from kilo_etcd.kernel.state import PeerActivity
from kilo_etcd.model import Endpoint, Node, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.topology.nat import hidden_pair, traversal_failures

PATIENCE = 20.0
"""Seconds of silence before anything is reported: WireGuard tries every five."""

SILENCE = 15.0
"""Seconds, at least, without a packet after which a partner with keepalive is taken to have been moved."""

MOST_SAID = 8
"""Sentences at most: they are part of a record in etcd."""


def partners(own: Node, snapshot: Snapshot, plan: HostPlan) -> dict[str, Node]:
    """Public key -> the node, of all that are behind NAT as `own` is, and not at its site."""
    if own.public_in(4) and own.public_in(6):
        return {}
    hidden = {}
    for key, planned in plan.peers.items():
        node = snapshot.nodes.get(planned.name)
        if (
            node is None
            or not planned.in_use
            or not (planned.observed or planned.endpoint is None or not planned.endpoint.public)
        ):
            continue  # Most, in most meshes: they have a public endpoint.
        if node.public_key == key and hidden_pair(own, node) is not None:
            hidden[key] = node
    return hidden


@frozen
class _Silent:
    endpoint: Endpoint | None
    since: float


@frozen
class _Received:
    bytes: int
    time: float


@frozen
class TraversalOutcome:
    """`waiting`: some have not been received from yet, and nothing is reported of them so far."""

    sentences: tuple[str, ...] = ()
    reset_session: frozenset[str] = frozenset()
    waiting: bool = False


@define
class Attempts:
    """The account of partners. Times are seconds of one monotonic clock."""

    _silent: dict[str, _Silent] = field(factory=dict)
    _received: dict[str, _Received] = field(factory=dict)

    def look(
        self, own: Node, hidden: Mapping[str, Node], plan: HostPlan, activity: PeerActivity, *, now: float
    ) -> TraversalOutcome:
        """What to report and do about the partners in `hidden`, given what the device reports of them."""
        sentences: list[str] = []
        reset_session = set()
        silent: dict[str, _Silent] = {}
        received: dict[str, _Received] = {}
        waiting = False
        for key, node in hidden.items():
            peer, planned = activity.peers.get(key), plan.peers.get(key)
            if peer is None or planned is None:
                continue
            if activity.silence(peer) <= STALE:
                last = self._received.get(key)
                if last is None or last.bytes != peer.rx_bytes:
                    last = _Received(peer.rx_bytes, now)
                received[key] = last
                elsewhere = planned.observed and planned.endpoint != peer.endpoint
                if elsewhere and now - last.time > max(SILENCE, 2.5 * node.persistent_keepalive):
                    reset_session.add(key)
                    del received[key]
                continue
            before = self._silent.get(key)
            if before is None or before.endpoint != planned.endpoint:
                before = _Silent(planned.endpoint, now)
            silent[key] = before
            if now - before.since < PATIENCE:
                waiting = True
            elif (text := traversal_failures(own, node)) is not None:
                sentences.append(text)
        self._silent, self._received = silent, received
        sentences.sort()
        if len(sentences) > MOST_SAID:
            sentences[MOST_SAID - 1 :] = [
                f"{len(sentences) - MOST_SAID + 1} more nodes behind NAT are not reached directly"
            ]
        return TraversalOutcome(tuple(sentences), frozenset(reset_session), waiting)
