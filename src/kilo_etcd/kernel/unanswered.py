"""Peers that do not answer at the endpoint that WireGuard has for them, although packets are sent there.

WireGuard follows a host that moves as soon as a packet comes from its new address. If the host moves back and none of
its packets arrives from there (this host has moved as well), WireGuard goes on sending to where nobody is any more, and
the plan, which is what it always was, says nothing new. Then each of the two endpoints that are known has its turn: the
one that is stated, and the one that was learnt.

What counts as no answer: packets are sent (WireGuard's own attempts to shake hands among them), none is received, and
there was no handshake for `SESSION_SECONDS`, after which no session can be used. A peer that nobody sends anything is
left alone: an endpoint that was learnt is better than one that is stated as long as it is not known to be dead.

Pure: counters and times come in, an endpoint goes out. Only peers of which two endpoints are known have an account.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf

from attrs import evolve

from kilo_etcd.kernel.state import Change, Memory, Observed, ObservedPeer, SetPeer, Unanswered
from kilo_etcd.model import SESSION_SECONDS, Endpoint
from kilo_etcd.model.hostplan import HostPlan

ANSWER_SECONDS = 15.0
"""A peer that receives something answers within ten seconds, if only with a keepalive, and WireGuard begins a handshake
after fifteen (its paper, sections 6.2 and 6.5)."""

PAUSE_SECONDS = 35.0
"""If nothing more is sent for so long, nobody has anything for the peer. WireGuard tries every five seconds while
somebody has; agents read the device every thirty."""

TURN_SECONDS = SESSION_SECONDS
"""Seconds at least between two settings for the sake of one peer."""


def next_endpoint(account: Unanswered | None, peer: ObservedPeer, stated: Endpoint, now: float) -> Endpoint | None:
    """The endpoint to set on a peer that does not answer where it is looked for, or None.

    `now`: when `peer` was read, Unix seconds.
    """
    if account is None or now - peer.last_handshake < SESSION_SECONDS or now - account.set_at < TURN_SECONDS:
        return None
    account = read_again(account, peer, now)
    if account.since + ANSWER_SECONDS > now or account.sent_at < now:
        return None
    return account.other if peer.endpoint == stated else stated


def accounts(
    plan: HostPlan,
    memory: Memory,
    observed: Observed,
    endpoints: Mapping[str, Endpoint | None],
    made: Collection[Change],
    now: float,
) -> dict[str, Unanswered]:
    """The accounts by public key, after `observed` was read and the changes `made`.

    `memory` is from before, `endpoints` are those that are stated now. `now`: Unix seconds.
    """
    set_peers = {change.public_key: change for change in made if isinstance(change, SetPeer)}
    unanswereds: dict[str, Unanswered] = {}
    for key, stated in endpoints.items():
        planned, peer, before, change = plan.peers.get(key), observed.peers.get(key), None, set_peers.get(key)
        if planned is None or planned.observed or stated is None or peer is None or peer.endpoint is None:
            continue
        if change is not None and change.new:
            continue
        if memory.endpoints.get(key, stated) == stated:
            before = memory.unanswered.get(key)
        if change is None or change.endpoint is None:
            if before is not None:
                before = read_again(before, peer, observed.time)
            if peer.endpoint != stated or (before is not None and before.other is not None):
                unanswereds[key] = before or begun(peer, observed.time)
            continue
        learnt = peer.endpoint not in (stated, memory.endpoints.get(key))
        silent = observed.time - peer.last_handshake >= SESSION_SECONDS
        address = peer.endpoint.address
        usable = address is not None and not plan.leads_into_tunnel(address)
        other = peer.endpoint if learnt and silent and usable else None
        if change.endpoint != stated or other is not None:
            unanswereds[key] = evolve(begun(peer, now), set_at=now, other=other)
    return unanswereds


def begun(peer: ObservedPeer, now: float) -> Unanswered:
    """The account after the first reading, or after something was received."""
    return Unanswered(received=peer.rx_bytes, sent=peer.tx_bytes, sent_at=now)


def read_again(account: Unanswered, peer: ObservedPeer, now: float) -> Unanswered:
    """The account after one more reading."""
    if peer.rx_bytes != account.received or peer.tx_bytes < account.sent:
        return evolve(begun(peer, now), set_at=account.set_at)
    if peer.tx_bytes > account.sent:
        return evolve(account, sent=peer.tx_bytes, sent_at=now, since=min(account.since, now))
    if now - account.sent_at >= PAUSE_SECONDS:
        return evolve(account, since=inf)
    return account
