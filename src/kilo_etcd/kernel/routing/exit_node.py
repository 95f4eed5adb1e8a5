"""The default route into the tunnel as values: a table of its own, a few rules that lead there, and a mark. Pure.

The rules, in their order: what the main table has more than a default route for goes there (the machine's own network,
the mesh), and so does in IPv4 what is sent from the host's own addresses, where that is asked for; everything else goes
to our table, unless it carries the mark of WireGuard's own packets. Our table has the default route, and `throw`
routes for those addresses that the main table shall decide about after all: etcd's, what is near, and the peers'
endpoints, whose answers a strict rp_filter would drop otherwise. An observed endpoint is none of these: whoever
reports it would decide what bypasses the tunnel. And it has a last resort: a default route that refuses,
for the time when the device, and with it the other one, is gone. No sysctl is needed, nothing in the main table is
touched, and what is ours is known by the interface: table and priorities are computed from its name.

In IPv6 a rule by source would let everything out that our table refuses: a socket without a source address asks for a
route; if it is refused, the kernel chooses an address of any device and asks once more, from that address (Linux,
`ip6_dst_lookup_tail`). So answers are told by connection tracking there: a rule of nftables gives them WireGuard's mark
when they have found a route into the tunnel, and then the kernel looks for a route anew
(`kernel.firewall.packet_filter`). That first route must exist, so that the default route into the tunnel is there
although nothing may get through: WireGuard, here or at the exit node, drops what comes from an address that the mesh
does not know. Without the rule, or without the device, answers do not get out, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network

from kilo_etcd.kernel.routing.rules import RoutingRule, priority_pair, table_number
from kilo_etcd.kernel.state import MAIN_TABLE, UNREACHABLE_METRIC, OwnTable, Policy, Route, ipip_name
from kilo_etcd.model import IPAddress, IPNetwork
from kilo_etcd.model.hostplan import HostPlan, RoutePlan, Via

MARK = 107
"""WireGuard's fwmark on its own packets."""

_TABLES, _PRIORITIES = 107_000_000, 10_700
_WIDE = {4: 7, 6: 6}
"""Prefix length -> what of the main table is as good as a default route: halves of all addresses, as VPN programs set
them, and IPv6's 2000::/3. Private networks are narrower (10.0.0.0/8, fc00::/7)."""
_ANYWHERE: dict[int, IPNetwork] = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


def exit_table(interface: str) -> int:
    """The number of the routing table that belongs to an interface."""
    return table_number(_TABLES, interface)


def rule_priorities(interface: str) -> tuple[int, int]:
    """Where the rules of an interface stand: those that lead to the main table, and the one that leads to ours."""
    return priority_pair(_PRIORITIES, interface)


def policy_for(plan: HostPlan, interface: str, protocol: int) -> Policy:
    """The rules and the table that a plan asks for; `ExitRoute.held` is for the caller to see to."""
    if plan.exit_route is None:
        return Policy()
    table = exit_table(interface)
    last = {network: last_resort(network, table, protocol) for network in _ANYWHERE.values()}
    routes = {route.destination: route for route in _routes(plan, interface, protocol)}
    return Policy({table: OwnTable(routes, last)}, frozenset(_rules(plan, interface)))


def last_resort(network: IPNetwork, table: int, protocol: int) -> Route:
    """Refuses what no other route of the table takes."""
    return Route(destination=network, protocol=protocol, table=table, metric=UNREACHABLE_METRIC, kind="unreachable")


def _rules(plan: HostPlan, interface: str) -> Iterator[RoutingRule]:
    assert plan.exit_route is not None
    main_first, ours = rule_priorities(interface)
    for version in (4, 6):
        yield RoutingRule(version=version, priority=main_first, table=MAIN_TABLE, suppress=_WIDE[version])
        yield RoutingRule(version=version, priority=ours, table=exit_table(interface), not_mark=MARK)
    for address in plan.exit_route.sources:
        if address.version == 4:
            yield RoutingRule(version=4, priority=main_first, table=MAIN_TABLE, source=address)


def _routes(plan: HostPlan, interface: str, protocol: int) -> Iterator[Route]:
    """Those of the table, the default routes last."""
    assert plan.exit_route is not None
    table = exit_table(interface)
    stated_endpoints = (
        peer.endpoint for peer in plan.peers.values() if peer.endpoint is not None and not peer.observed
    )
    endpoints = (endpoint.address for endpoint in stated_endpoints)
    aside = {*plan.exit_route.bypass, *(ip_network(address) for address in endpoints if address is not None)}
    for network in sorted(aside, key=lambda network: (network.version, network)):
        yield Route(destination=network, protocol=protocol, table=table, kind="throw")
    by: dict[int, RoutePlan] = {route.destination.version: route for route in plan.exit_route.by}
    own: dict[int, IPAddress] = {address.version: address.ip for address in reversed(plan.addresses)}
    for version in sorted(plan.exit_route.families | ({6} if plan.exit_route.answers6 else set())):
        if (planned := by.get(version)) is None:
            yield Route(
                destination=_ANYWHERE[version], device=interface, source=own.get(version), protocol=protocol,
                table=table,
            )  # fmt: skip
        else:
            yield route_of(planned, interface, protocol, table)


def route_of(planned: RoutePlan, interface: str, protocol: int, table: int = MAIN_TABLE) -> Route:
    """The route that a plan's route asks for; an underlay route names no device: the kernel finds it."""
    via = planned.via
    return Route(
        destination=planned.destination,
        gateway=None if via is Via.TUNNEL else planned.gateway,
        device=interface if via is Via.TUNNEL else ipip_name(interface) if via is Via.IPIP else "",
        source=planned.source,
        protocol=protocol,
        onlink=via is Via.IPIP,
        table=table,
    )


def same_way(route: Route, planned: Route, interface: str) -> bool:
    """Whether a route of our table does what is wanted of it. Which device leads to a neighbour is the kernel's."""
    if (route.kind, route.gateway, route.source) != (planned.kind, planned.gateway, planned.source):
        return False
    if planned.gateway is not None and not planned.device:
        return route.device not in (interface, ipip_name(interface))
    return route.device == planned.device
