"""Which observed endpoints of nodes and peers behind NAT this host publishes, and when.

Told is only what helps: of nodes and peers with persistent keepalive (without it the NAT forgets them) that have no
public endpoint; by hosts that are reached publicly themselves, since any other may see what is true for its own site
only; and by a few of them: two show whether the NAT shows each partner another port, and each record wakes every agent.

A laptop that roams must not become a storm. Of each node or peer a change is told after a moment by chance, so that of
many observers the first few publish and the others see that they have, and the more often it changes the later.

Pure: readings and times come in, records and times go out.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from attrs import define, field, frozen

from kilo_etcd.kernel.state import PeerActivity
from kilo_etcd.model import Node, Peer, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.store.records import ObservedEndpointRecord

OBSERVERS = 3
"""So many publish one node or peer; the others do not as long as these live."""

STALE = 240.0
"""Seconds since the last handshake after which a host has gone: with keepalive there is one every three minutes."""

MADE_ANEW = 30.0
"""Seconds that a peer which this host has made anew has for its next handshake until it counts as gone."""

FIRST_PAUSE, LONGEST_PAUSE, QUIET = 5.0, 80.0, 300.0
"""Seconds between two records on one node or peer: at first, at most, and how long it takes to begin anew."""


BOTH = (4, 6)


@frozen
class Watched:
    """A node or peer of the plan that others may need to be told of, in these families."""

    name: str
    versions: tuple[int, ...]


def to_watch(own: Node, snapshot: Snapshot, plan: HostPlan) -> dict[str, Watched]:
    """Public key -> the node or peer to watch; `own` publishes only in families in which it is public itself."""
    versions = tuple(version for version in BOTH if own.public_in(version))
    watched: dict[str, Watched] = {}
    if not versions:
        return watched
    for key, planned in plan.peers.items():
        node = snapshot.nodes.get(planned.name)
        if node is not None and node.public_key == key:
            hidden = tuple(v for v in versions if not node.public_in(v)) if node.persistent_keepalive else ()
            if hidden and planned.in_use:
                watched[key] = Watched(node.name, hidden)
        elif node is None and (peer := snapshot.peers.get(planned.name)) is not None and _roams(peer, key):
            # Had a node that name, the place in etcd would be its.
            watched[key] = Watched(peer.name, versions)
    return watched


def _roams(peer: Peer, key: str) -> bool:
    return peer.public_key == key and bool(peer.persistent_keepalive) and peer.endpoint is None


def observed_here(watched: Mapping[str, Watched], activity: PeerActivity) -> dict[str, ObservedEndpointRecord]:
    """Node or peer -> where this host sees it, as far as that is worth publishing."""
    result = {}
    for key, subject in watched.items():
        peer = activity.peers.get(key)
        if peer is None or peer.endpoint is None or activity.silence(peer) > STALE:
            continue
        address = peer.endpoint.address
        if address is not None and address.version in subject.versions and peer.endpoint.public:
            result[subject.name] = ObservedEndpointRecord(public_key=key, endpoint=peer.endpoint)
    return result


def kept(
    watched: Mapping[str, Watched],
    activity: PeerActivity,
    published: Mapping[str, ObservedEndpointRecord],
    made_anew: Collection[str],
) -> dict[str, ObservedEndpointRecord]:
    """What stays published of the peers of these public keys, which were made anew a moment ago: a peer that is new to
    WireGuard has had no handshake, which says nothing of where it is."""
    result = {}
    for key in made_anew:
        subject, peer = watched.get(key), activity.peers.get(key)
        record = None if subject is None else published.get(subject.name)
        if subject is None or peer is None or record is None or peer.last_handshake:
            continue
        if (record.public_key, record.endpoint) == (key, peer.endpoint):
            result[subject.name] = record
    return result


def to_publish(
    observed: Mapping[str, ObservedEndpointRecord],
    snapshot: Snapshot,
    observer: str,
    published: Mapping[str, ObservedEndpointRecord],
) -> dict[str, ObservedEndpointRecord]:
    """What of it `observer` should have in etcd: what it has published already, and what too few others publish."""
    result = {}
    for name, record in observed.items():
        others = sum(
            other.observer != observer and other.public_key == record.public_key and other.counts(snapshot.nodes)
            for other in snapshot.observed_endpoints.get(name, ())
        )
        if name in published or others < OBSERVERS:
            result[name] = record
    return result


@frozen
class _LastPublished:
    time: float
    pause: float


@define
class PublishSchedule:
    """When what differs from what was published may be published. Times are seconds of one monotonic clock."""

    rng: random.Random = field(factory=random.Random)
    _due: dict[str, float] = field(factory=dict)
    _last: dict[str, _LastPublished] = field(factory=dict)

    def ready(
        self,
        desired: Mapping[str, ObservedEndpointRecord],
        published: Mapping[str, ObservedEndpointRecord],
        *,
        now: float,
        nodes: int,
    ) -> tuple[dict[str, ObservedEndpointRecord], float | None]:
        """(what to have in etcd now, when to ask again although nothing has changed). `nodes`: the mesh's size."""
        differing = [name for name in {**desired, **published} if desired.get(name) != published.get(name)]
        self._due = {name: self._due[name] if name in self._due else self._when(name, now, nodes) for name in differing}
        result = dict(published)
        for name in [name for name in differing if self._due[name] <= now]:
            del self._due[name]
            last = self._last.get(name)
            again = last is not None and now - last.time < QUIET
            self._last[name] = _LastPublished(
                now, min(last.pause * 2, LONGEST_PAUSE) if last and again else FIRST_PAUSE
            )
            if name in desired:
                result[name] = desired[name]
            else:
                del result[name]
        if len(self._last) > 2 * len(result) + 100:
            self._last = {name: last for name, last in self._last.items() if now - last.time < QUIET}
        return result, min(self._due.values(), default=None)

    def _when(self, name: str, now: float, nodes: int) -> float:
        by_chance = self.rng.uniform(0.0, min(10.0, 0.2 + nodes * 0.01))
        last = self._last.get(name)
        return max(now + by_chance, last.time + last.pause if last is not None else now)
