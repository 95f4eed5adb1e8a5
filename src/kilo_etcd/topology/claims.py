"""Who may have which network: every network that nodes, locations and outside peers offer, settled once for all.

WireGuard gives a network to one peer only, and the last one told wins; so if every host settled an overlap
by itself, hosts would disagree about where a packet goes. Here it is a pure function of the snapshot: the
longer-registered node wins, nodes win over outside peers, and the mesh wins over all. What loses is left out
on every host alike, and named.

It promises that granted networks of different owners are disjoint, that none is a default route or loopback, none
covers a mesh subnet and none holds a node's mesh address. What one host in particular must not route
(its own underlay, its etcd) is not settled here but by `guard`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_network
from typing import TypeAlias

from attrs import field, frozen

from kilo_etcd.model import IPAddress, IPNetwork
from kilo_etcd.topology.hostplan import Problem

Owner: TypeAlias = tuple[str, str]
"""("node", name), ("location", segment key) or ("peer", name)."""


@frozen
class Claim:
    """What an owner offers; the smaller `priority` wins. `offered_by` is the name for people."""

    priority: tuple[int, int, str]
    offered_by: str
    networks: tuple[IPNetwork, ...]


_EACH_HOSTS_OWN = {
    version: [(int(n.network_address), int(n.broadcast_address)) for n in map(ip_network, texts)]
    for version, texts in {
        4: ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4"),
        6: ("::/127", "fe80::/10", "ff00::/8"),
    }.items()
}
"""Loopback, link-local, multicast (RFC 6890): a route elsewhere takes from a host what is its own, or its link's (as a
cloud's metadata at 169.254.169.254)."""


def network_key(network: IPNetwork) -> tuple[int, int, int]:
    """The order of networks everywhere: family, address, prefix length."""
    return (network.version, int(network.network_address), network.prefixlen)


@frozen
class _Span:
    """The granted networks of one family as disjoint intervals, sorted; the three lists run in parallel."""

    starts: list[int] = field(factory=list)
    ends: list[int] = field(factory=list)
    owners: list[Owner] = field(factory=list)

    def copy(self) -> _Span:
        return _Span(self.starts[:], self.ends[:], self.owners[:])

    def holder(self, start: int, end: int) -> Owner | None:
        """An owner of something between `start` and `end`."""
        at = bisect_left(self.starts, start)
        if at and self.ends[at - 1] >= start:
            return self.owners[at - 1]
        return self.owners[at] if at < len(self.starts) and self.starts[at] <= end else None

    def put(self, start: int, end: int, owner: Owner) -> None:
        at = bisect_left(self.starts, start)
        self.starts.insert(at, start)
        self.ends.insert(at, end)
        self.owners.insert(at, owner)

    def take(self, start: int) -> None:
        at = bisect_left(self.starts, start)
        del self.starts[at], self.ends[at], self.owners[at]


@frozen
class Settlement:
    """The outcome. `granted` has an entry for each owner that claims anything, sorted by `network_key`."""

    mesh: tuple[IPNetwork, ...] = ()
    claims: Mapping[Owner, Claim] = field(factory=dict)
    granted: Mapping[Owner, tuple[IPNetwork, ...]] = field(factory=dict)
    problems: tuple[Problem, ...] = ()
    within_mesh: bool = False
    """Something claimed lies inside a mesh subnet, so that the outcome depends on who has which address."""
    spans: Mapping[int, _Span] = field(factory=dict, eq=False, repr=False)

    @property
    def versions(self) -> frozenset[int]:
        """The families of what is granted."""
        return frozenset(version for version, span in self.spans.items() if span.starts)

    def __call__(self, owner: Owner) -> tuple[IPNetwork, ...]:
        return self.granted.get(owner, ())


def settle(
    previous: Settlement,
    changes: Mapping[Owner, Claim | None],
    mesh_addresses: Callable[[], Iterable[IPAddress]],
    addresses_changed: bool = True,
) -> Settlement:
    """The settlement after `changes` (None: withdrawn) to `previous`; from `Settlement(mesh)` for the first.

    `mesh_addresses` is asked only when something is claimed inside the mesh. The outcome depends on the claims
    and addresses alone, not on the way there.
    """
    changes = {owner: claim for owner, claim in changes.items() if previous.claims.get(owner) != claim}
    if not changes and not (previous.within_mesh and addresses_changed):
        return previous
    claims = dict(previous.claims)
    for owner, claim in changes.items():
        if claim is None:
            claims.pop(owner, None)
        else:
            claims[owner] = claim
    if len(changes) * 8 < len(claims) and not previous.problems and not previous.within_mesh:
        quick = _amend(previous, claims, changes)
        if quick is not None:
            return quick
    return _settle_all(previous.mesh, claims, mesh_addresses)


def _interval(network: IPNetwork) -> tuple[int, int]:
    return int(network.network_address), int(network.broadcast_address)


def _widest_first(networks: Iterable[IPNetwork]) -> list[IPNetwork]:
    """In this order, a network that overlaps one its owner was already granted lies within that one."""
    return sorted(set(networks), key=lambda n: (n.prefixlen, n.version, int(n.network_address)))


def _amend(
    previous: Settlement, claims: dict[Owner, Claim], changes: Mapping[Owner, Claim | None]
) -> Settlement | None:
    """The quick way for a change that touches nobody else's networks; None when it does."""
    spans = {version: span.copy() for version, span in previous.spans.items()}
    granted = dict(previous.granted)
    for owner in changes:
        for network in granted.pop(owner, ()):
            spans[network.version].take(int(network.network_address))
    for owner, claim in changes.items():
        if claim is None:
            continue
        own = []
        for network in _widest_first(claim.networks):
            start, end = _interval(network)
            span = spans.setdefault(network.version, _Span())
            holder = span.holder(start, end)
            if holder == owner:
                continue
            if holder is not None or not network.prefixlen or _overlaps(network, previous.mesh):
                return None
            if _each_hosts_own(network.version, start, end):
                return None
            span.put(start, end, owner)
            own.append(network)
        granted[owner] = tuple(sorted(own, key=network_key))
    return Settlement(previous.mesh, claims, granted, (), False, spans)


def _each_hosts_own(version: int, start: int, end: int) -> bool:
    return any(first <= start and end <= last for first, last in _EACH_HOSTS_OWN[version])


def _overlaps(network: IPNetwork, others: Iterable[IPNetwork]) -> bool:
    return any(network.version == other.version and network.overlaps(other) for other in others)


def _settle_all(
    mesh: tuple[IPNetwork, ...], claims: dict[Owner, Claim], mesh_addresses: Callable[[], Iterable[IPAddress]]
) -> Settlement:
    spans: dict[int, _Span] = {}
    granted: dict[Owner, tuple[IPNetwork, ...]] = {}
    problems: list[Problem] = []
    taken: dict[int, list[int]] | None = None
    within_mesh = False
    for owner in sorted(claims, key=lambda owner: (claims[owner].priority, owner)):
        claim = claims[owner]
        own = []
        for network in _widest_first(claim.networks):
            start, end = _interval(network)
            span = spans.setdefault(network.version, _Span())
            reason = None
            holder = span.holder(start, end)
            if holder == owner:
                continue
            if not network.prefixlen:
                reason = "a default route is never taken into the mesh; offer smaller networks"
            elif _each_hosts_own(network.version, start, end):
                reason = "loopback, link-local and multicast addresses are each host's own; offer other networks"
            elif holder is not None:
                other = claims[holder].offered_by
                reason = f"it overlaps a network that {other} offered before; take it out of one of the two"
            elif _overlaps(network, mesh):
                within_mesh = True
                if taken is None:
                    taken = {4: [], 6: []}
                    for address in mesh_addresses():
                        taken[address.version].append(int(address))
                    taken = {version: sorted(numbers) for version, numbers in taken.items()}
                numbers = taken[network.version]
                at = bisect_left(numbers, start)
                if any(
                    m.version == network.version and m.prefixlen >= network.prefixlen and m.overlaps(network)
                    for m in mesh
                ):
                    reason = "it covers the mesh's own subnet; offer smaller networks"
                elif at < len(numbers) and numbers[at] <= end:
                    reason = "it holds the mesh address of a node; choose one outside the mesh's subnet"
            if reason is None:
                span.put(start, end, owner)
                own.append(network)
            else:
                problems.append(
                    Problem(subject=str(network), text=f"{network} of {claim.offered_by} is left out: {reason}")
                )
        granted[owner] = tuple(sorted(own, key=network_key))
    problems.sort(key=lambda problem: (problem.subject, problem.text))
    return Settlement(mesh, claims, granted, tuple(problems), within_mesh, spans)
