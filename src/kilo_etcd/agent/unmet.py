"""Nodes that are behind NAT, as this host is, and are not heard: how long it waits for them, and what it says then.

Two hosts behind NATs need each other's word from etcd and a few attempts, so silence means nothing at first. If it
lasts, the operator is told; what the mesh knows of the two NATs is in the sentence (`topology.nat`). And if a partner
that was heard falls silent while others see it elsewhere, its NAT has moved it: this host's own NAT lets in nothing
from there, so the two begin over.

Pure: readings and times come in, sentences and public keys go out.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, field, frozen

from kilo_etcd.agent.sightings import STALE
from kilo_etcd.kernel.state import Heard
from kilo_etcd.model import Endpoint, Node, Snapshot
from kilo_etcd.topology.hostplan import HostPlan
from kilo_etcd.topology.nat import hidden_pair, unmet

PATIENCE = 20.0
"""Seconds of silence before anything is said: WireGuard tries every five."""

SILENCE = 15.0
"""Seconds, at least, without a packet after which a partner with keepalive is taken to have been moved."""

MOST_SAID = 8
"""Sentences at most: they are part of a record in etcd."""


def partners(own: Node, snapshot: Snapshot, plan: HostPlan) -> dict[str, Node]:
    """Public key -> the node, of all that are behind NAT as `own` is, and not at its site."""
    if own.public_in(4) and own.public_in(6):
        return {}
    found = {}
    for key, planned in plan.peers.items():
        node = snapshot.nodes.get(planned.name)
        if (
            node is None
            or not planned.in_use
            or not (planned.hearsay or planned.endpoint is None or not planned.endpoint.public)
        ):
            continue  # Most, in most meshes: they have a public endpoint.
        if node.public_key == key and hidden_pair(own, node) is not None:
            found[key] = node
    return found


@frozen
class _Silent:
    endpoint: Endpoint | None
    since: float


@frozen
class _Received:
    bytes: int
    time: float


@frozen
class Outcome:
    """`waiting`: some have not been heard yet, and nothing is said of them so far."""

    said: tuple[str, ...] = ()
    begin_over: frozenset[str] = frozenset()
    waiting: bool = False


@define
class Attempts:
    """The account of partners. Times are seconds of one monotonic clock."""

    _silent: dict[str, _Silent] = field(factory=dict)
    _received: dict[str, _Received] = field(factory=dict)

    def look(self, own: Node, found: Mapping[str, Node], plan: HostPlan, heard: Heard, *, now: float) -> Outcome:
        """What to say and do about the partners in `found`, given what the device says of them."""
        said: list[str] = []
        begin_over = set()
        silent: dict[str, _Silent] = {}
        received: dict[str, _Received] = {}
        waiting = False
        for key, node in found.items():
            peer, planned = heard.peers.get(key), plan.peers.get(key)
            if peer is None or planned is None:
                continue
            if heard.silence(peer) <= STALE:
                last = self._received.get(key)
                if last is None or last.bytes != peer.rx_bytes:
                    last = _Received(peer.rx_bytes, now)
                received[key] = last
                elsewhere = planned.hearsay and planned.endpoint != peer.endpoint
                if elsewhere and now - last.time > max(SILENCE, 2.5 * node.persistent_keepalive):
                    begin_over.add(key)
                    del received[key]
                continue
            before = self._silent.get(key)
            if before is None or before.endpoint != planned.endpoint:
                before = _Silent(planned.endpoint, now)
            silent[key] = before
            if now - before.since < PATIENCE:
                waiting = True
            elif (text := unmet(own, node)) is not None:
                said.append(text)
        self._silent, self._received = silent, received
        said.sort()
        if len(said) > MOST_SAID:
            said[MOST_SAID - 1 :] = [f"{len(said) - MOST_SAID + 1} more nodes behind NAT are not reached directly"]
        return Outcome(tuple(said), frozenset(begin_over), waiting)
