"""The next hop from one node to another of its own location: plainly, encapsulated, or through the tunnel.

A pair uses one way in both directions: the tunnel if the `encapsulate` of either is `wireguard`, else IPIP if either
encapsulates what it sends to the other, else plain packets. A host that checks the reverse path (`rp_filter`) drops
what comes in by another device than its answers go out. Packets of IPv4 may travel over an IPv6 underlay (a route with
a gateway of the other family), never the other way round; IPIP carries IPv4 in IPv4 only.
"""

from __future__ import annotations

from attrs import frozen

from kilo_etcd.model import Encapsulate, Endpoint, IPAddress, Node
from kilo_etcd.model.hostplan import Via
from kilo_etcd.topology.families import common_family, same_site


@frozen
class NextHop:
    """The next hop on a link; `trouble` says, as the end of a sentence, why it cannot work."""

    via: Via
    gateway: IPAddress | None = None
    trouble: str = ""
    plain: bool = False
    """Not encapsulated although one of the two nodes always wants that: IPIP carries IPv4 only."""


def tunneled(own: Node, other: Node) -> bool:
    """Whether the two are WireGuard peers of each other inside their location."""
    return Encapsulate.WIREGUARD in (own.encapsulate, other.encapsulate)


def next_hop(own: Node, other: Node, version: int) -> NextHop | None:
    """The next hop of packets of family `version` from `own` to `other` of the same location; None: there is none."""
    if tunneled(own, other):
        return NextHop(Via.TUNNEL)
    for family in (4, 6) if version == 4 else (6,):
        own_ip, other_ip = own.internal_ip(family), other.internal_ip(family)
        if own_ip is None or other_ip is None:
            continue
        address = other_ip.ip
        near = address in own_ip.network
        modes = (own.encapsulate, other.encapsulate)
        encapsulated = Encapsulate.ALWAYS in modes or (
            Encapsulate.CROSSSUBNET in modes and not (near and own_ip.ip in other_ip.network)
        )
        if encapsulated and family == 4:
            return NextHop(Via.IPIP, address)
        trouble = ""
        if not near:
            # IPIP carries IPv4 only.
            remedy = "encapsulate crosssubnet or wireguard" if family == 4 else "encapsulate wireguard"
            trouble = f"{address} is not within its network {own_ip.network} and may not be encapsulated; use {remedy}"
        return NextHop(Via.UNDERLAY, address, trouble, plain=Encapsulate.ALWAYS in modes)
    return None


def local_endpoint(own: Node, other: Node) -> Endpoint | None:
    """Where `own` reaches the WireGuard of `other` inside their location; None: they are not at one site."""
    family = common_family(own, other) if same_site(own, other) else None
    other_ip = None if family is None else other.internal_ip(family)
    return None if other_ip is None else Endpoint(other_ip.ip, other.port)
