"""Compares the routes that this host's kernel takes with those that the plan means: another program may have set a rule
or a route that comes before. Pure."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from types import MappingProxyType

from kilo_etcd import kernel
from kilo_etcd.kernel.routing.rules import ForeignRule, deciding_rule
from kilo_etcd.kernel.state import MAIN_TABLE, Observed
from kilo_etcd.model import IPAddress, IPNetwork
from kilo_etcd.store.records import TakenRoute

_NO_ROUTE = os.strerror(errno.ENETUNREACH)
"""The kernel's error if no table has a route. A host may have no route to a host whose network it does not share."""


def taken_route(
    address: IPAddress, source: IPAddress | None, answer: kernel.Route | str, observed: Observed
) -> TakenRoute:
    """The kernel's choice for an address, compared with our own routes. It is another's only if ours is there: what
    the kernel has refused is named as such."""
    own = (
        *observed.routes.values(),
        *(route for table in observed.policy.tables.values() for route in table.routes.values()),
    )
    ours = [
        (route.device, route.gateway)
        for route in own
        if route.destination.version == address.version and address in route.destination
    ]
    if isinstance(answer, str):
        return TakenRoute(str(address), str(source or ""), f"none: {answer}", bool(ours))
    foreign = bool(ours) and (answer.device, answer.gateway) not in ours
    return TakenRoute(str(address), str(source or ""), _shown_route(address, answer), foreign)


def taken_directly(address: IPAddress, answer: kernel.Route | str, rules: Iterable[ForeignRule]) -> TakenRoute:
    """The kernel's choice for a member of the location, to which the host's own routes lead. It is another program's if
    a rule of that leads to it, or if the kernel refuses it, not for want of a route."""
    refused = isinstance(answer, str)
    rule = deciding_rule(rules, address, None if isinstance(answer, str) else answer.table)
    shown = f"none: {answer}" if isinstance(answer, str) else _shown_route(address, answer)
    return TakenRoute(str(address), "", shown, rule is not None or (refused and answer != _NO_ROUTE))


def with_cause(
    route: TakenRoute,
    address: IPAddress,
    answer: kernel.Route | str,
    rules: Iterable[ForeignRule],
    foreign: Mapping[IPNetwork, kernel.Route] = MappingProxyType({}),
) -> TakenRoute:
    """The route, if it is not the agent's with the rule or the route of another program that leads to it. `foreign`:
    other programs' routes in the main table."""
    if not route.foreign:
        return route
    table = None if isinstance(answer, str) else answer.table
    source = ip_address(route.source) if route.source else None
    rule = deciding_rule(rules, address, table, source)
    if rule is not None:
        return route._replace(route=f"{route.route}, by {rule}")
    if table not in (None, MAIN_TABLE):
        return route
    # A default route comes before none of ours.
    covering = [n for n in foreign if n.version == address.version and n.prefixlen and address in n]
    if not covering:
        return route
    narrowest = max(covering, key=lambda network: network.prefixlen)
    return route._replace(route=f"{route.route}, by ip -{address.version} route {narrowest}")


def _shown_route(address: IPAddress, route: kernel.Route) -> str:
    """As `ip route get` shows it."""
    words = [str(address)]
    if route.gateway is not None:
        words.append(f"via {route.gateway}")
    words.append(f"dev {route.device}" if route.device else "local")
    if route.table != MAIN_TABLE:
        words.append(f"table {route.table}")
    return " ".join(words)
