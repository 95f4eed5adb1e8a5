"""Over which address family two nodes of different sites reach each other: IPv4, IPv6, or not at all.

A host of both families publishes an endpoint in each, the better one first: a public one before a private one, IPv4
where both are alike (so that agents which read the first alone, as older ones do, take the same way), and before all
what the operator forced. A pair takes a family that both have. Where both have both, the family counts that more of the
two put first (public ones before private ones, which are first for want of better); then the one in which more of them
are public; then IPv6 if all is public (somebody has put it first on purpose), else IPv4. The rule is symmetrical, so
that the two ends send to each other the same way and neither WireGuard has reason to roam.

Pure. A DNS name stands for any family: which of its addresses to take is decided where it is resolved.
"""

from __future__ import annotations

from kilo_etcd.model import Endpoint, Node

BOTH = frozenset((4, 6))


def families(node: Node) -> frozenset[int]:
    """The families in which a node reaches others, and they it; both, where nothing is known."""
    versions = frozenset(address.version for endpoint in node.endpoints if (address := endpoint.address) is not None)
    if versions or node.endpoint is not None:
        return versions or BOTH
    return frozenset(ip.version for ip in node.internal_ips) or BOTH


def same_site(one: Node, other: Node) -> bool:
    """Whether two nodes reach each other over their location's own network: one label, one family in common."""
    return one.location == other.location and common_family(one, other) is not None


def common_family(one: Node, other: Node) -> int | None:
    """The family in which both have an internal IP; 4 where both will do."""
    return next((v for v in (4, 6) if one.internal_ip(v) is not None and other.internal_ip(v) is not None), None)


def pair_family(one: Node, other: Node) -> int | None:
    """The family in which the two reach each other; None: they have none in common."""
    common = families(one) & families(other)
    if len(common) < 2:
        return next(iter(common), None)
    firsts = [first for node in (one, other) if (first := node.endpoint) is not None]
    public = {version: sum(node.public_in(version) for node in (one, other)) for version in (4, 6)}
    fallback = 6 if public[4] == public[6] == 2 else 4

    def order(version: int) -> tuple[int, int, int, bool]:
        matching = [first for first in firsts if first.address is not None and first.address.version == version]
        return sum(first.public for first in matching), len(matching), public[version], version == fallback

    return max((4, 6), key=order)


def endpoint_for(own: Node, other: Node) -> Endpoint | None:
    """Where `own` reaches the WireGuard of `other` from outside its location; None: nowhere."""
    first = other.endpoint
    if first is None or first.address is None:
        return first
    if not other.more_endpoints and not own.more_endpoints and own.endpoint is not None:
        # By far the most frequent case, in a loop over thousands of nodes.
        own_address = own.endpoint.address
        return first if own_address is None or own_address.version == first.address.version else None
    family = pair_family(own, other)
    return None if family is None else other.endpoint_in(family)


def apart(own: Node, other: Node) -> str | None:
    """Why the two have no tunnel, as a sentence for the operator of `own`; None where a family is common to them."""
    own_families, other_families = families(own), families(other)
    if own_families & other_families:
        return None
    return (
        f"no common address family with node {other.name}: it is reached over {_named(other_families)} only and "
        f"{own.name} over {_named(own_families)} only, so there is no tunnel between them; give one of them "
        "an address of the other family, or let a node that has both lead its location"
    )


def _named(versions: frozenset[int]) -> str:
    return " and ".join(f"IPv{version}" for version in sorted(versions))
