"""Allocates networks to owners: every network that nodes, locations and outside peers offer is allocated once for all
hosts.

WireGuard gives a network to one peer only, and the last one set wins; so if every host settled an overlap
by itself, hosts would disagree about where a packet goes. Here it is a pure function of the snapshot: the
longer-registered node wins, nodes win over outside peers, and the mesh wins over all. What loses is left out
on every host alike, and named; what is left out takes nothing from others.

Networks overlap only by one lying within the other, so all that is offered falls into groups, each within its widest
network, that have nothing to do with each other. A change is allocated anew in the groups that it touches and costs
what is in them; the first allocation is a change to nothing.

It promises that granted networks of different owners are disjoint, that none is a default route or loopback, none
covers a mesh subnet and none holds a node's mesh address. What one host in particular must not route
(its own underlay, its etcd) is not decided here but by `route_filter`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_network
from operator import attrgetter
from typing import TypeAlias

from attrs import field, frozen

from kilo_etcd.base.mappings import copied
from kilo_etcd.model import IPAddress, IPNetwork, overlap
from kilo_etcd.model.hostplan import Problem

NetworkOwner: TypeAlias = tuple[str, str]
"""("node", name), ("location", segment key) or ("peer", name)."""


@frozen
class NetworkRequest:
    """What an owner, or one node for its location, offers; the smaller `priority` wins, which ends with
    the name of who offers. `offered_by` is for people."""

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


def each_hosts_own(address: IPAddress) -> bool:
    """Whether an address means something else on every host or link."""
    number = int(address)
    return any(first <= number <= last for first, last in _EACH_HOSTS_OWN[address.version])


def network_key(network: IPNetwork) -> tuple[int, int, int]:
    """The order of networks everywhere: family, address, prefix length."""
    return (network.version, int(network.network_address), network.prefixlen)


@frozen(eq=False)
class Offer:
    """One network of a request; it reaches from `start` to `end`."""

    start: int
    end: int
    network: IPNetwork
    owner: NetworkOwner
    rank: tuple[tuple[int, int, str], NetworkOwner, int, int]
    """The order of allocation. Within a request the widest comes first, so that what comes later lies within what its
    owner has."""
    by: str

    def refused(self, why: str) -> Problem:
        """The problem that says why this network was not granted, about whoever offers it."""
        (_, _, name), *_ = self.rank
        return Problem(subject=str(self.network), text=f"{self.network} of {self.by} is left out: {why}", about=name)


@frozen(eq=False)
class _Group:
    """The offers within the widest of them, and how they were allocated."""

    start: int
    end: int
    offers: tuple[Offer, ...]
    granted: tuple[Offer, ...]
    problems: tuple[Problem, ...]


@frozen(eq=False)
class _Groups:
    """The groups of one family, which are disjoint, by address; the two lists run in parallel."""

    starts: list[int] = field(factory=list)
    groups: list[_Group] = field(factory=list)

    def copy(self) -> _Groups:
        return _Groups(self.starts[:], self.groups[:])

    def meeting(self, start: int, end: int) -> tuple[int, int]:
        """From which index up to which the groups reach into what lies between `start` and `end`."""
        first = bisect_left(self.starts, start)
        if first and self.groups[first - 1].end >= start:
            first -= 1
        return first, bisect_right(self.starts, end, first)

    def take(self, start: int, end: int) -> list[_Group]:
        """Take these groups out."""
        first, after = self.meeting(start, end)
        taken = self.groups[first:after]
        del self.starts[first:after], self.groups[first:after]
        return taken

    def put(self, group: _Group) -> None:
        at = bisect_left(self.starts, group.start)
        self.starts.insert(at, group.start)
        self.groups.insert(at, group)


@frozen
class PrefixAllocation:
    """The outcome. `granted` has an entry for each owner that requests anything, sorted by `network_key`."""

    mesh: tuple[IPNetwork, ...] = ()
    requests: Mapping[NetworkOwner, tuple[NetworkRequest, ...]] = field(factory=dict)
    granted: Mapping[NetworkOwner, tuple[IPNetwork, ...]] = field(factory=dict)
    problems: tuple[Problem, ...] = ()
    _groups: Mapping[int, _Groups] = field(factory=dict, eq=False, repr=False)
    _troubles: Mapping[object, tuple[Problem, ...]] = field(factory=dict, eq=False, repr=False)
    """The problems by where they are from: an owner, for what nobody may offer, or a group."""

    @property
    def versions(self) -> frozenset[int]:
        """The families of what is granted."""
        return frozenset(v for v, groups in self._groups.items() if any(group.granted for group in groups.groups))

    def offered_by(self, network: IPNetwork) -> str | None:
        """The owner of a granted network, as text."""
        if (groups := self._groups.get(network.version)) is None:
            return None
        near = groups.groups[slice(*groups.meeting(*_interval(network)))]
        return next((offer.by for group in near for offer in group.granted if offer.network == network), None)

    def granted_at(self, address: IPAddress) -> Offer | None:
        """What was granted that an address is in."""
        if (groups := self._groups.get(address.version)) is None:
            return None
        number = int(address)
        for group in groups.groups[slice(*groups.meeting(number, number))]:
            at = bisect_right(group.granted, number, key=_START) - 1
            if at >= 0 and group.granted[at].end >= number:
                return group.granted[at]
        return None

    def within_mesh(self) -> list[tuple[int, int, int]]:
        """Whether something is claimed inside the mesh, so that the outcome depends on the holders of addresses."""
        return [
            (subnet.version, group.start, group.end)
            for subnet in self.mesh
            if (groups := self._groups.get(subnet.version)) is not None
            for group in groups.groups[slice(*groups.meeting(*_interval(subnet)))]
        ]

    def __call__(self, owner: NetworkOwner) -> tuple[IPNetwork, ...]:
        """The networks that an owner was granted; none if it offered none, or lost them all."""
        return self.granted.get(owner, ())


def allocate(
    previous: PrefixAllocation,
    changes: Mapping[NetworkOwner, tuple[NetworkRequest, ...]],
    mesh_addresses: Callable[[], Iterable[IPAddress]],
    addresses_changed: bool = True,
) -> PrefixAllocation:
    """The settlement after `changes` (empty: withdrawn) to `previous`; from `PrefixAllocation(mesh)` for the first.

    `mesh_addresses` is asked only when something is claimed inside the mesh. The outcome depends on the claims
    and addresses alone, not on the way there.
    """
    mesh = previous.mesh
    changes = {owner: requests for owner, requests in changes.items() if previous.requests.get(owner, ()) != requests}
    within = previous.within_mesh() if addresses_changed else []
    if not changes and not within:
        return previous
    requests, troubles = copied(previous.requests), copied(previous._troubles)
    groups = {version: present.copy() for version, present in previous._groups.items()}
    taken: list[_Group] = []
    loose: dict[int, list[Offer]] = {}

    def loosen(version: int, start: int, end: int) -> None:
        for group in groups.setdefault(version, _Groups()).take(start, end):
            taken.append(group)
            loose.setdefault(version, []).extend(offer for offer in group.offers if offer.owner not in changes)
            troubles.pop((version, group.start), None)

    for version, start, end in within:
        loosen(version, start, end)
    for owner, new in changes.items():
        for offer in _offers(owner, requests.get(owner, ())):
            if _never(offer, mesh) is None:
                loosen(offer.network.version, offer.start, offer.end)
        if new:
            requests[owner] = new
        else:
            requests.pop(owner, None)
        void = []
        for offer in _offers(owner, new):
            if (why := _never(offer, mesh)) is not None:
                void.append(offer.refused(why))
            else:
                loosen(offer.network.version, offer.start, offer.end)
                loose.setdefault(offer.network.version, []).append(offer)
        _keep(troubles, owner, tuple(void))

    nodes = _Nodes(mesh, mesh_addresses)
    new_groups = []
    for version, offers in loose.items():
        for together in _apart(offers):
            group = _allocated(together, nodes)
            groups[version].put(group)
            new_groups.append(group)
            _keep(troubles, (version, group.start), group.problems)
    same_troubles = troubles.keys() == previous._troubles.keys() and all(
        problems == previous._troubles[source] for source, problems in troubles.items()
    )
    return PrefixAllocation(
        mesh,
        requests,
        _granted(previous.granted, requests, changes, taken, new_groups),
        previous.problems if same_troubles else _sorted(troubles.values()),
        groups,
        troubles,
    )


@frozen(eq=False)
class _Nodes:
    """The mesh's subnets, and the holders of addresses there, looked up at the first use."""

    mesh: tuple[IPNetwork, ...]
    ask: Callable[[], Iterable[IPAddress]]
    _numbers: dict[int, list[int]] = field(factory=dict)

    def hinder(self, offer: Offer) -> str | None:
        """Why a network that does not cover the mesh cannot be had inside it."""
        if not any(overlap(offer.network, subnet) for subnet in self.mesh):
            return None
        if not self._numbers:
            self._numbers.update({4: [], 6: []})
            for address in self.ask():
                self._numbers[address.version].append(int(address))
            for numbers in self._numbers.values():
                numbers.sort()
        numbers = self._numbers[offer.network.version]
        at = bisect_left(numbers, offer.start)
        if at < len(numbers) and numbers[at] <= offer.end:
            return "it holds the mesh address of a node; choose one outside the mesh's subnet"
        return None


def _interval(network: IPNetwork) -> tuple[int, int]:
    return int(network.network_address), int(network.broadcast_address)


def _offers(owner: NetworkOwner, requests: Iterable[NetworkRequest]) -> Iterable[Offer]:
    for request in requests:
        for network in request.networks:
            start, end = _interval(network)
            yield Offer(
                start, end, network, owner, (request.priority, owner, network.prefixlen, start), request.offered_by
            )


def _never(offer: Offer, mesh: Iterable[IPNetwork]) -> str | None:
    """Why no owner may have the network, whatever else is offered."""
    network = offer.network
    if not network.prefixlen:
        return "a default route is never taken into the mesh; offer smaller networks"
    if any(first <= offer.start and offer.end <= last for first, last in _EACH_HOSTS_OWN[network.version]):
        return "loopback, link-local and multicast addresses are each host's own; offer other networks"
    if any(overlap(network, subnet) and network.prefixlen <= subnet.prefixlen for subnet in mesh):
        return "it covers the mesh's own subnet; offer smaller networks"
    return None


def _apart(offers: list[Offer]) -> Iterable[list[Offer]]:
    """Those that lie within one network together."""
    group: list[Offer] = []
    for offer in sorted(offers, key=lambda offer: (offer.start, -offer.end)):
        if group and offer.start > group[0].end:
            yield group
            group = []
        group.append(offer)
    if group:
        yield group


def _allocated(offers: list[Offer], nodes: _Nodes) -> _Group:
    """In order of rank each is granted unless it overlaps what another owner was granted before. `offers` begins with
    the widest."""
    starts: list[int] = []
    granted: list[Offer] = []
    problems = []
    for offer in sorted(offers, key=_RANK) if len(offers) > 1 else offers:
        first, after = bisect_left(starts, offer.start), bisect_right(starts, offer.end)
        if first and granted[first - 1].end >= offer.start:
            first -= 1
        held = granted[first:after]
        rival = next((granted_offer for granted_offer in held if granted_offer.owner != offer.owner), None)
        if rival is not None:
            reason = f"it overlaps {rival.network} of {rival.by}, which comes first; take it out of one of the two"
            problems.append(offer.refused(reason))
        elif held and held[0].start <= offer.start and offer.end <= held[0].end:
            continue
        elif (why := nodes.hinder(offer)) is not None:
            problems.append(offer.refused(why))
        else:
            starts[first:after], granted[first:after] = [offer.start], [offer]
    return _Group(offers[0].start, offers[0].end, tuple(offers), tuple(granted), tuple(problems))


_RANK = attrgetter("rank")
_START = attrgetter("start")


def _granted(
    before: Mapping[NetworkOwner, tuple[IPNetwork, ...]],
    requests: Mapping[NetworkOwner, tuple[NetworkRequest, ...]],
    changed: Iterable[NetworkOwner],
    removed: Iterable[_Group],
    added: Iterable[_Group],
) -> dict[NetworkOwner, tuple[IPNetwork, ...]]:
    networks: dict[NetworkOwner, set[IPNetwork]] = {owner: set(before.get(owner, ())) for owner in changed}
    for group in removed:
        for offer in group.granted:
            networks.setdefault(offer.owner, set(before.get(offer.owner, ()))).discard(offer.network)
    for group in added:
        for offer in group.granted:
            networks.setdefault(offer.owner, set(before.get(offer.owner, ()))).add(offer.network)
    granted = copied(before)
    for owner, granted_networks in networks.items():
        if owner in requests:
            granted[owner] = tuple(sorted(granted_networks, key=network_key))
        else:
            granted.pop(owner, None)
    return granted


def _keep(troubles: dict[object, tuple[Problem, ...]], source: object, problems: tuple[Problem, ...]) -> None:
    if problems:
        troubles[source] = problems
    else:
        troubles.pop(source, None)


def _sorted(problems: Iterable[tuple[Problem, ...]]) -> tuple[Problem, ...]:
    flattened = (problem for group in problems for problem in group)
    return tuple(sorted(flattened, key=lambda problem: (problem.subject, problem.text)))
