"""Who speaks first when two hosts become WireGuard peers of each other.

When both ends of a new pair start a handshake at the same moment, each abandons its own to answer the other's, neither
is completed, and WireGuard tries again only after five seconds (whitepaper section 6.2, Rekey-Timeout). Hosts
that follow one etcd revision are bound to do just that: all of them become peers of each other within a few
milliseconds, which is less than a packet's way across a continent. So of each pair the host with the lower public key
speaks first, at once and whether or not it has anything to send. The other is told the endpoint a moment later, unless
it has learnt it from the first packet, and speaks then: the first may have kept a session that the second, whose peer
is new, knows nothing of, and would not notice for fifteen seconds.

A member of a location has its leader's peers too, ready to take over. There nothing is sent, and those who have the
first word are given no endpoint until the member leads.

Pure: `contacts` keeps the account of who is new; `first_contact` says what is withheld, who is spoken to, until when.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve, frozen

from kilo_etcd.model import IPAddress, Node, Snapshot
from kilo_etcd.topology.hostplan import HostPlan, PeerPlan

FIRST_WORD_SECONDS = 0.15
"""How long the other end has the first word: more than the skew of two hosts and one way of a packet, on most paths,
and less than the gap that a change of leader may have (0.2 s)."""

MOST_SPOKEN_TO = 256
"""A host that gets more new peers than this at once lets traffic decide whom it speaks to."""


@frozen
class FirstContact:
    """What to apply now, whom to send a packet then (mesh addresses), and when to apply the whole plan."""

    plan: HostPlan
    speak_to: tuple[IPAddress, ...] = ()
    waiting: frozenset[str] = frozenset()
    """Public keys of those who have the first word."""
    late: frozenset[str] = frozenset()
    """Public keys of those who had the first word until now; they may not have used it."""
    due: float | None = None


def contacts(before: Mapping[str, float], plan: HostPlan, *, standby: bool, now: float) -> Mapping[str, float]:
    """Public key -> since when the host has exchanged packets with this peer. A standby exchanges none."""
    if standby:
        return {}
    if before.keys() == plan.peers.keys():
        return before
    return {key: before.get(key, now) for key in plan.peers}


def first_contact(
    plan: HostPlan,
    snapshot: Snapshot,
    since: Mapping[str, float],
    waiting: frozenset[str] = frozenset(),
    *,
    standby: bool,
    now: float,
) -> FirstContact:
    """`plan` without the endpoints of those new peers that have the first word. `waiting` is the last result's."""
    own = snapshot.nodes[plan.node]
    fresh = list(plan.peers) if standby else [key for key, time in since.items() if now < time + FIRST_WORD_SECONDS]
    if not fresh and not waiting:
        return FirstContact(plan)
    withheld: dict[str, PeerPlan] = {}
    speak_to: list[IPAddress] = []
    late = []
    for key in dict.fromkeys([*fresh, *waiting]):
        peer = plan.peers.get(key)
        node = None if peer is None else snapshot.nodes.get(peer.name)
        if peer is None or node is None or node.public_key != key or peer.endpoint is None:
            continue
        listens = own.public_key > key and _reachable(own, peer)
        if listens and (standby or now < since[key] + FIRST_WORD_SECONDS):
            withheld[key] = evolve(peer, endpoint=None)
        elif not standby and (key in waiting or since[key] == now):
            speak_to.extend(node.mesh_addresses[:1])
            if key in waiting:
                late.append(key)
    return FirstContact(
        evolve(plan, peers={**plan.peers, **withheld}) if withheld else plan,
        tuple(speak_to) if len(speak_to) <= MOST_SPOKEN_TO else (),
        frozenset() if standby else frozenset(withheld),
        frozenset(late),
        min(since[key] for key in withheld) + FIRST_WORD_SECONDS if withheld and not standby else None,
    )


def _reachable(own: Node, peer: PeerPlan) -> bool:
    """Whether the peer can be expected to reach this host: publicly, or inside the location as this host does it."""
    inside = peer.endpoint is not None and not peer.endpoint.public
    return inside or (own.endpoint is not None and own.endpoint.public)
