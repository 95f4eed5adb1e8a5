"""Which of two hosts that become WireGuard peers starts the handshake.

When both ends of a new pair start a handshake at the same moment, each abandons its own to answer the other's, neither
is completed, and WireGuard tries again only after five seconds (whitepaper section 6.2, Rekey-Timeout). Hosts that
follow one etcd revision are bound to do just that: all of them become peers of each other within a few milliseconds,
which is less than a packet's way across a continent. So of each pair the host with the lower public key starts, at once
and whether or not it has anything to send. The other gets the endpoint a moment later, unless it has learnt it from the
first packet, and then starts a handshake too: the first may have kept a session that the second, whose peer is new,
does not know, and would not notice for fifteen seconds. If a peer has no handshake by then, its session is reset: its
host may have sent before this one could receive, and a new peer need not wait five seconds. A host behind NAT, which
cannot be reached, starts whatever its key, and looks again likewise; a public one only waits.

A member of a location has its leader's peers too, ready to take over, but sends them nothing and is given no endpoints.
When it is promoted, those that lead or are alone already start the handshake, whatever their keys: it has known them
all along, so their packet finds it ready, while its own could come before they know it.

Pure: `peered_since` keeps track of new peers; `handshake_order` says which endpoints are withheld, which handshakes are
triggered, and until when.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from attrs import evolve, field, frozen

from kilo_etcd.model import DEFAULT_LOCATION, IPAddress, Node, Snapshot, is_public
from kilo_etcd.model.hostplan import HostPlan, PeerPlan
from kilo_etcd.topology.segments import Topology

_NOBODY: Mapping[str, int] = MappingProxyType({})

STAGES = (0.06, 0.5, 2.0)
"""Seconds after which a host that left the handshake to the other looks whether there was one. The first is
how long the other has: more than the skew of two hosts and the one-way delay of most paths, and little
compared with the gap of a change of leader. The others repair what a longer path or a lost packet has spoilt."""

MOST_TRIGGERED = 256
"""A host that gets more new peers than this at once lets traffic trigger the handshakes, and resets no session."""


@frozen(kw_only=True)
class HandshakeOrder:
    """What to apply now, and what to do about new peers besides. Peers are named by their public keys."""

    plan: HostPlan
    trigger: Mapping[str, IPAddress] = field(factory=dict)
    """Send these mesh addresses a packet once the plan is applied."""
    late: Mapping[str, IPAddress] = field(factory=dict)
    """Had time for a handshake. Those without one get their session reset, and a handshake is triggered."""
    waiting: Mapping[str, int] = field(factory=dict)
    """Wait for the other's handshake, with the number of the stage that comes next; for the next call."""
    due: float | None = None
    """When to call again."""


def peered_since(before: Mapping[str, float], plan: HostPlan, *, standby: bool, now: float) -> Mapping[str, float]:
    """Public key -> since when the host has exchanged packets with this peer. A standby exchanges none, and with
    peers that are not in use nobody does."""
    if standby:
        return {}
    used = [key for key, peer in plan.peers.items() if peer.in_use]
    if len(before) == len(used) and all(map(before.__contains__, used)):
        return before
    return {key: before.get(key, now) for key in used}


def handshake_order(
    plan: HostPlan,
    snapshot: Snapshot,
    since: Mapping[str, float],
    waiting: Mapping[str, int] = _NOBODY,
    *,
    promoted: Collection[str] = (),
    standby: bool,
    now: float,
) -> HandshakeOrder:
    """`plan` without the endpoints of those new peers that start the handshake.

    `waiting` is the last result's; `promoted` are the nodes that were members and now lead (`promotions`).
    """
    own = snapshot.nodes[plan.node]
    new = list(plan.peers) if standby else [key for key, time in since.items() if time == now]
    withheld: dict[str, PeerPlan] = {}
    trigger: dict[str, IPAddress] = {}
    late: dict[str, IPAddress] = {}
    still: dict[str, int] = {}
    due: list[float] = []
    for key in dict.fromkeys([*new, *waiting]):
        peer = plan.peers.get(key)
        node = None if peer is None else snapshot.nodes.get(peer.name)
        if peer is None or node is None or node.public_key != key or peer.endpoint is None or not node.mesh_addresses:
            continue
        address = node.mesh_addresses[0]
        if standby:
            if _reachable(own, peer):
                withheld[key] = evolve(peer, endpoint=None)
            continue
        if not peer.in_use:
            continue  # It led until now.
        if must_come(own, node, peer):
            # A reset here could undo what it has begun: it would keep a session that is gone.
            continue
        if key not in waiting and not (_listens(own, node, promoted) and _reachable(own, peer)):
            trigger[key] = address
            if not _reachable(own, peer):
                # No other host can, and the other may not have been ready to receive.
                still[key] = 1
                due.append(since[key] + STAGES[1])
            continue
        stage = waiting.get(key, 0)
        if now >= since[key] + STAGES[stage]:
            late[key] = address
            if stage == 0:
                trigger[key] = address
            stage += 1
        if stage == 0:
            withheld[key] = evolve(peer, endpoint=None)
        if stage < len(STAGES):
            still[key] = stage
            due.append(since[key] + STAGES[stage])
    return HandshakeOrder(
        plan=evolve(plan, peers={**plan.peers, **withheld}) if withheld else plan,
        trigger=trigger if len(trigger) <= MOST_TRIGGERED else {},
        late=late if len(late) <= MOST_TRIGGERED else {},
        waiting=still,
        due=min(due, default=None),
    )


def begins(own: Node, other: Node, peer: PeerPlan) -> bool:
    """Whether `own` is the first to send a packet where the two have just become known to each other elsewhere."""
    return not (must_come(own, other, peer) or (_listens(own, other, ()) and _reachable(own, peer)))


def promotions(before: Topology | None, now: Topology) -> frozenset[str]:
    """Nodes that were members of a segment in the topology `before` and lead one `now`."""
    if before is None or before is now:
        return frozenset()
    result = set()
    for segment in now.segments.values():
        name = segment.leader.name
        if len(segment.members) > 1 and name in before.snapshot.nodes and before.segment_of(name).leader.name != name:
            result.add(name)
    return frozenset(result)


def _listens(own: Node, other: Node, promoted: Collection[str]) -> bool:
    """Whether `own` leaves the handshake to `other`; the other end comes to the opposite answer."""
    if (own.name in promoted) != (other.name in promoted):
        return own.name in promoted
    return own.public_key > other.public_key


def must_come(own: Node, other: Node, peer: PeerPlan) -> bool:
    """Whether the peer is behind NAT, as far as this public host can tell, so that it alone can begin."""
    address = None if peer.endpoint is None else peer.endpoint.address
    if address is None or not own.public_in(address.version):
        return False
    if peer.observed or is_public(address):
        return peer.observed
    own_ip = own.internal_ip(address.version)
    # Without labels nothing but the address says that two hosts share a network.
    labelled = own.location == other.location != DEFAULT_LOCATION
    return not labelled and (own_ip is None or address not in own_ip.network)


def _reachable(own: Node, peer: PeerPlan) -> bool:
    """Whether the peer can be expected to reach this host: publicly, or inside the location as this host does it."""
    address = None if peer.endpoint is None else peer.endpoint.address
    if address is None:
        return own.endpoint is not None and own.endpoint.public
    return not is_public(address) or own.public_in(address.version)
