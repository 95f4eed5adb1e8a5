"""The last filter of a plan before it meets a kernel: what this host in particular must never route.

The topology is the same for all; what is near is not. A network that somebody far away offers may be the one
that this host's etcd, its own underlay or a tunnel's far end is in, and a route into the mesh would cut
the host off from the very things that it is made of. Such routes are removed, with the allowed
IPs that they belong to, and named. So are default routes.

No host loses a route because of an observed endpoint of a peer: an observed endpoint within a network that goes
into the tunnel is not used.

The mesh itself is never filtered out: on a node the mesh subnet that holds the host's own address, and all within it,
such as the addresses of other nodes; for a peer the subnets that the caller names, but no narrower network that
somebody offers, which would take precedence over the network that the machine is in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import TypeVar

from attrs import evolve, frozen

from kilo_etcd.base.mappings import Changed, changes
from kilo_etcd.model import IPNetwork
from kilo_etcd.model.hostplan import HostPlan, PeerPlan, PlanMemo, Problem, RoutePlan

K = TypeVar("K")
V = TypeVar("V")


@frozen(eq=False)
class _Ranges:
    """Networks to keep clear, as sorted intervals with the furthest end so far, for each family."""

    starts: Mapping[int, list[int]]
    furthest: Mapping[int, list[int]]
    networks: Mapping[int, list[str]]

    @classmethod
    def of(cls, items: Iterable[tuple[int, int, int, str]]) -> _Ranges:
        starts: dict[int, list[int]] = {4: [], 6: []}
        furthest: dict[int, list[int]] = {4: [], 6: []}
        names: dict[int, list[str]] = {4: [], 6: []}
        reach: dict[int, tuple[int, str]] = {4: (-1, ""), 6: (-1, "")}
        for version, start, end, name in sorted(items):
            reach[version] = max(reach[version], (end, name))
            starts[version].append(start)
            furthest[version].append(reach[version][0])
            names[version].append(reach[version][1])
        return cls(starts, furthest, names)

    def met_by(self, network: IPNetwork) -> str | None:
        """What the network overlaps, as text."""
        return self.met_between(network.version, int(network.network_address), int(network.broadcast_address))

    def met_between(self, version: int, start: int, end: int) -> str | None:
        """The same of the addresses from `start` to `end`."""
        # Of all that begins at or before our end, the one that reaches furthest overlaps us if any does.
        at = bisect_right(self.starts[version], end) - 1
        return self.networks[version][at] if at >= 0 and self.furthest[version][at] >= start else None


@frozen
class _Mesh:
    """The mesh's subnets, and how much of them is kept whatever is protected."""

    subnets: tuple[IPNetwork, ...]
    whole: bool
    """All within them; else routes to narrower networks are looked at."""

    def exposes(self, network: IPNetwork, routes: Mapping[IPNetwork, RoutePlan]) -> bool:
        """Whether a network that is routed or allowed is looked at. What is allowed alone draws no packets."""
        if not within(network, self.subnets):
            return True
        return not self.whole and network not in self.subnets and network in routes


@frozen(kw_only=True, eq=False)
class RoutesMemo(PlanMemo):
    """What the route filter finds in the memo of a plan that it is handed."""

    changed: Changed[IPNetwork, RoutePlan] | None = None
    """In what its routes differ from those of the plan before."""


@frozen(eq=False)
class FilterMemo(PlanMemo):
    """What a clean result was about; `inner` is the memo of the plan that was examined."""

    inner: PlanMemo | None
    protected: tuple[IPNetwork, ...]
    mesh: _Mesh
    lengths: frozenset[tuple[int, int]]
    """Family and prefix length of every route that was examined."""


def filter_routes(
    plan: HostPlan,
    protected: Sequence[IPNetwork],
    previous: HostPlan | None = None,
    *,
    offered_by: Callable[[IPNetwork], str | None] = lambda network: None,
    mesh: Sequence[IPNetwork] | None = None,
) -> HostPlan:
    """`plan` without what would harm the host. `protected`: etcd's endpoints, own underlay networks and the like.

    The peers' own endpoints are protected without being named. `offered_by` names who offers a network, for people.
    `previous`, the last guarded plan of the same host, only saves work. `mesh` are the mesh's subnets that are kept for
    a peer, whose own addresses need not be within them. The outcome may be handed to `host_plan` as its previous plan,
    as `plan` may.
    """
    protected = tuple(protected)
    if previous is not None and (memo := _still_clean(plan, protected, previous, mesh)) is not None:
        return evolve(plan, memo=memo)
    kept = _Mesh(_mesh(plan), whole=True) if mesh is None else _Mesh(tuple(mesh), whole=False)
    plan, ignored = _without_observed(plan)
    networks = _networks(plan.routes, plan.peers.values())
    exposed = [network for network in networks if kept.exposes(network, plan.routes) and not _returned(network, plan)]
    harmful: dict[IPNetwork, str] = {}
    if exposed:
        ranges = _Ranges.of([*_items(protected), *_endpoint_items(plan.peers.values())])
        for network in exposed:
            if not network.prefixlen:
                harmful[network] = "a default route is never taken into the mesh"
            elif (met := ranges.met_by(network)) is not None:
                harmful[network] = (
                    f"it would cut this host off from {met}; offer other or smaller networks"
                    if network.prefixlen < network.max_prefixlen or str(network) != met
                    else "it would cut this host off from what it reaches there outside the mesh: etcd, its gateway, "
                    "or a node's WireGuard"
                )
    if not harmful and ignored:
        return plan
    if not harmful and all(network in plan.routes for network in exposed):
        return evolve(plan, memo=FilterMemo(plan.memo, protected, kept, _lengths(exposed)))
    problems = {
        *plan.problems,
        *(
            Problem(subject=str(network), text=f"{_called(network, offered_by(network))} is not routed here: {reason}")
            for network, reason in harmful.items()
        ),
    }
    return evolve(
        plan,
        routes={network: route for network, route in plan.routes.items() if network not in harmful},
        peers={key: _without(peer, harmful) for key, peer in plan.peers.items()},
        problems=tuple(sorted(problems, key=lambda problem: (problem.subject, problem.text))),
    )


def _returned(network: IPNetwork, plan: HostPlan) -> bool:
    """Whether it is a member's internal IP that only what comes out of the tunnel is sent to through the tunnel: this
    host's own packets, WireGuard's among them, take another way."""
    return network in plan.returns and network not in plan.routes


def _without_observed(plan: HostPlan) -> tuple[HostPlan, bool]:
    """The plan without observed endpoints that are within a routed network; whether there were any."""
    observed_peers = {key: peer for key, peer in plan.peers.items() if peer.observed and peer.endpoint is not None}
    if not observed_peers:
        return plan, False
    ranges = _Ranges.of(_items(plan.routes))
    ignored = {}
    for key, peer in observed_peers.items():
        address = None if peer.endpoint is None else peer.endpoint.address
        if address is not None and ranges.met_between(address.version, int(address), int(address)) is not None:
            ignored[key] = evolve(peer, endpoint=None, observed=False)
    return (evolve(plan, peers={**plan.peers, **ignored}), True) if ignored else (plan, False)


def _called(network: IPNetwork, by: str | None) -> str:
    return f"{network} of {by}" if by else str(network)


def _still_clean(
    plan: HostPlan, protected: tuple[IPNetwork, ...], previous: HostPlan, mesh: Sequence[IPNetwork] | None
) -> FilterMemo | None:
    """The quick way: the last plan was clean, and what has changed since is clean too."""
    memo = previous.memo
    if not isinstance(memo, FilterMemo) or memo.protected != protected or previous.addresses != plan.addresses:
        return None
    if memo.mesh.whole != (mesh is None) or (mesh is not None and memo.mesh.subnets != tuple(mesh)):
        return None
    changed_routes = plan.memo.changed if isinstance(plan.memo, RoutesMemo) else None
    routes = {key for key in changes(previous.routes, plan.routes, changed_routes) if key in plan.routes}
    if any(own in network for network in routes for own in plan.addresses if own.version == network.version):
        return None
    changed_peers = changes(previous.peers, plan.peers)
    peers = [plan.peers[key] for key in changed_peers if key in plan.peers]
    if len(routes) + len(peers) > len(plan.peers) // 8:
        return None
    covered = {id(n) for key in changed_peers if (old := previous.peers.get(key)) for n in old.allowed_ips}
    allowed = {network for peer in peers for network in peer.allowed_ips if id(network) not in covered}
    allowed = {network for network in allowed if not _returned(network, plan)}
    fresh = [network for network in routes | allowed if memo.mesh.exposes(network, plan.routes)]
    if any(network not in previous.routes for network in fresh):
        if not all(network.prefixlen and network in plan.routes for network in fresh):
            return None
        # There are few of these and many endpoints, whose names nobody asks for here.
        ranges = _Ranges.of(_items(fresh))
        if any(ranges.met_by(network) is not None for network in protected):
            return None
        for peer in plan.peers.values():
            if peer.endpoint is not None and (address := peer.endpoint.address) is not None:
                number = int(address)
                if ranges.met_between(address.version, number, number) is not None:
                    return None
    lengths = memo.lengths | _lengths(fresh)
    for version, number, _, _ in _endpoint_items(peers):
        for family, length in lengths:
            if family == version:
                covering = _covering(number, family, length)
                if covering in plan.routes and memo.mesh.exposes(covering, plan.routes):
                    return None
    return FilterMemo(plan.memo, protected, memo.mesh, lengths)


def _lengths(networks: Iterable[IPNetwork]) -> frozenset[tuple[int, int]]:
    return frozenset((network.version, network.prefixlen) for network in networks)


def _covering(number: int, version: int, length: int) -> IPNetwork:
    """The network of a given length that an address is in."""
    if version == 4:
        return IPv4Network((number >> (32 - length) << (32 - length), length))
    return IPv6Network((number >> (128 - length) << (128 - length), length))


def _networks(routes: Iterable[IPNetwork], peers: Iterable[PeerPlan]) -> set[IPNetwork]:
    networks = set(routes)
    for peer in peers:
        networks.update(peer.allowed_ips)
    return networks


def _mesh(plan: HostPlan) -> tuple[IPNetwork, ...]:
    """The narrowest route that holds each of the host's own addresses: the mesh's subnets."""
    networks = []
    for own in plan.addresses:
        holding = [n for n in plan.routes if n.version == own.version and n.prefixlen and own.ip in n]
        networks += sorted(holding, key=lambda network: network.prefixlen)[-1:]
    return tuple(networks)


def within(network: IPNetwork, mesh: tuple[IPNetwork, ...]) -> bool:
    """Whether a network is one of `mesh`, or lies in one."""
    return any(
        network.version == subnet.version
        and network.prefixlen >= subnet.prefixlen
        and network.network_address in subnet
        for subnet in mesh
    )


def _items(protected: Iterable[IPNetwork]) -> Iterable[tuple[int, int, int, str]]:
    for network in protected:
        yield network.version, int(network.network_address), int(network.broadcast_address), f"{network}"


def _endpoint_items(peers: Iterable[PeerPlan]) -> Iterable[tuple[int, int, int, str]]:
    for peer in peers:
        if peer.endpoint is not None and (address := peer.endpoint.address) is not None:
            number = int(address)
            yield address.version, number, number, f"{address}, the endpoint of {peer.name}"


def _without(peer: PeerPlan, harmful: Mapping[IPNetwork, str]) -> PeerPlan:
    allowed = tuple(network for network in peer.allowed_ips if network not in harmful)
    return peer if len(allowed) == len(peer.allowed_ips) else evolve(peer, allowed_ips=allowed)
