"""The MTU of the tunnel, from the ways that packets to the peers' endpoints take.

The kernel is asked once for each endpoint; what it answered holds until it reports that links or routes have changed
(`drift.affects_path`), and for a minute at most. Where there are thousands of peers, asking is most of what a fresh
look at the host costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

from kilo_etcd.kernel.state import IPIP_OVERHEAD, WIREGUARD_OVERHEAD
from kilo_etcd.model import SMALLEST_MTU, Endpoint, IPAddress
from kilo_etcd.model.hostplan import HostPlan

Ask: TypeAlias = Callable[[Collection[IPAddress]], Mapping[IPAddress, int | None]]
"""Addresses -> the MTU of the way to each in bytes, None where there is none."""

_OLD = 60.0
"""Seconds."""

_ETHERNET = 1500


class Egress:
    """What is known of the ways. Not for two threads at once."""

    def __init__(self, ask: Ask, uplinks: Callable[[], list[int]] = list) -> None:
        self._ask = ask
        self._uplinks = uplinks
        """The MTUs of the host's uplinks, for one that has no endpoint yet."""
        self._since = time.monotonic()
        self._ways: dict[str, tuple[Endpoint, int | None]] = {}
        """Public key -> the peer's endpoint, and the MTU of the way there."""
        self._inside: tuple[frozenset[IPAddress], int] = frozenset(), _ETHERNET
        """The nodes that IPIP goes to, and the smallest MTU of the ways there."""

    def forget(self) -> None:
        """The ways may have changed."""
        self._ways.clear()
        self._inside = frozenset(), _ETHERNET
        self._since = time.monotonic()

    def expire(self) -> None:
        """Forget what is old: of the MTU that it learns from a router on the way the kernel reports nothing."""
        if time.monotonic() - self._since > _OLD:
            self.forget()

    def mtu(self, plan: HostPlan) -> int:
        """Bytes for the WireGuard interface: the smallest of all ways, less what encapsulation takes."""
        known_ways = self._ways
        unknown: dict[str, Endpoint] = {}
        for key, peer in plan.peers.items():
            endpoint, way = peer.endpoint, known_ways.get(key)
            if endpoint is not None and (way is None or (way[0] is not endpoint and way[0] != endpoint)):
                unknown[key] = endpoint
        if unknown:
            answers = self._ask({e.address for e in unknown.values() if e.address is not None})
            if len(known_ways) > 2 * len(plan.peers):
                self._ways = known_ways = {key: way for key, way in known_ways.items() if key in plan.peers}
            known_ways.update(
                (key, (e, None if e.address is None else answers[e.address])) for key, e in unknown.items()
            )
        ways = [
            mtu
            for key, peer in plan.peers.items()
            if peer.endpoint is not None and (mtu := known_ways[key][1]) is not None
        ]
        overhead = WIREGUARD_OVERHEAD + (IPIP_OVERHEAD if plan.ipip_remotes else 0)
        families = {address.version for address in plan.addresses} or {4}
        return max(
            min(ways or self._uplinks(), default=_ETHERNET) - overhead, max(SMALLEST_MTU[family] for family in families)
        )

    def ipip_mtu(self, plan: HostPlan) -> int:
        """Bytes for the IPIP device: what the location's network takes, less IPIP's own header."""
        remotes, mtu = self._inside
        if remotes != plan.ipip_remotes:
            ways = self._ask(plan.ipip_remotes).values() if plan.ipip_remotes else ()
            mtu = min((way for way in ways if way is not None), default=_ETHERNET)
            self._inside = plan.ipip_remotes, mtu
        return max(mtu - IPIP_OVERHEAD, SMALLEST_MTU[4])
