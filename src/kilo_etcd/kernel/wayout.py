"""The default route into the tunnel as values: a table of its own, two rules that lead there, and a mark. Pure.

The rules, in their order: what the main table has more than a default route for goes there (the machine's own network,
the mesh); everything else goes to our table, unless it carries the mark of WireGuard's own packets. Our table has the
default route, and `throw` routes for those addresses that the main table shall decide about after all: etcd's, and
the peers' endpoints, whose answers a strict rp_filter would drop otherwise. No sysctl is needed, nothing in the
main table is touched, and what is ours is known by the interface: table and priorities are computed from its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from zlib import crc32

from kilo_etcd.kernel.rules import RoutingRule
from kilo_etcd.kernel.state import Route
from kilo_etcd.model import IPNetwork
from kilo_etcd.topology.hostplan import HostPlan

MARK = 107
"""WireGuard's fwmark on its own packets."""

_TABLES, _PRIORITIES = 107_000_000, 10_700


def exit_table(interface: str) -> int:
    """The number of the routing table that belongs to an interface."""
    return _TABLES + crc32(interface.encode()) % 1_000_000


def rule_priorities(interface: str) -> tuple[int, int]:
    """Where the two rules of an interface stand."""
    first = _PRIORITIES + 2 * (crc32(interface.encode()) % 50)
    return first, first + 1


def rules_for(plan: HostPlan, interface: str) -> frozenset[RoutingRule]:
    """The rules that a plan asks for."""
    if plan.way_out is None:
        return frozenset()
    main_first, ours = rule_priorities(interface)
    return frozenset(
        rule
        for version in (4, 6)
        for rule in (
            RoutingRule(version=version, priority=main_first, table=254, suppress=True),
            RoutingRule(version=version, priority=ours, table=exit_table(interface), not_mark=MARK),
        )
    )


def routes_for(plan: HostPlan, interface: str, protocol: int) -> dict[IPNetwork, Route]:
    """The routes of our table that a plan asks for, the default routes last."""
    return {route.destination: route for route in _routes(plan, interface, protocol)}


def _routes(plan: HostPlan, interface: str, protocol: int) -> Iterator[Route]:
    if plan.way_out is None:
        return
    table = exit_table(interface)
    endpoints = (peer.endpoint.address for peer in plan.peers.values() if peer.endpoint is not None)
    aside = {*plan.way_out.outside, *(ip_network(address) for address in endpoints if address is not None)}
    for network in sorted(aside, key=lambda network: (network.version, network)):
        yield Route(destination=network, protocol=protocol, table=table, kind="throw")
    for version, text in ((4, "0.0.0.0/0"), (6, "::/0")):
        if version in plan.way_out.families:
            yield Route(destination=ip_network(text), device=interface, protocol=protocol, table=table)
        else:
            yield Route(destination=ip_network(text), protocol=protocol, table=table, kind="unreachable")


def same_way(found: Route, wanted: Route) -> bool:
    """Whether a route of our table does what is wanted of it."""
    return (found.kind, found.device, found.gateway) == (wanted.kind, wanted.device, wanted.gateway)
