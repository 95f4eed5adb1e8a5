"""Reads the routing tables and the rules of `kernel.routing.policy`, as far as they are ours. Blocking."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Mapping

from kilo_etcd.kernel.errors import NetlinkError
from kilo_etcd.kernel.netlink import sockets
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.routing.policy import own_priorities, own_rules, own_tables
from kilo_etcd.kernel.routing.rules import ForeignRule, RoutingRule
from kilo_etcd.kernel.state import UNREACHABLE_METRIC, Link, OwnTable, Policy, Route
from kilo_etcd.kernel.write import rtnl as requests
from kilo_etcd.model import IPNetwork

_NOT_THERE = frozenset({errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.ENOENT})
"""What a dump says where there is no such family, or no such table."""


def read(sock: sockets.Socket, interface: str, protocol: int, names: Mapping[int, str]) -> Policy:
    """The routes of the interface's own tables, and the rules that lead there. `names`: of all devices, by index."""
    tables: dict[int, tuple[dict[IPNetwork, Route], dict[IPNetwork, Route]]] = {
        number: ({}, {}) for number in own_tables(interface)
    }
    rules: set[RoutingRule] = set()
    priorities = own_priorities(interface)

    def keep_route(body: bytes) -> None:
        route = replies.read_route(body)
        if route is not None and route.table in tables:
            tables[route.table][route.metric == UNREACHABLE_METRIC][route.destination] = route.route(names)

    def keep_rule(body: bytes) -> None:
        read = replies.read_rule(body)
        if read is not None and read[1] == protocol and read[0].priority in priorities:
            rules.add(read[0])

    for version in (4, 6):
        for number in tables:
            _dump(sock, requests.get_routes(version, number), keep_route)
        _dump(sock, requests.get_rules(version), keep_rule)
    return Policy({n: OwnTable(*kinds) for n, kinds in tables.items() if any(kinds)}, own_rules(rules, interface))


def foreign_rules(sock: sockets.Socket, protocol: int) -> list[ForeignRule]:
    """The rules that do not carry our protocol's number."""
    rules: list[ForeignRule] = []

    def keep(body: bytes) -> None:
        ours = replies.read_rule(body)
        rule = replies.read_foreign_rule(body)
        if rule is not None and (ours is None or ours[1] != protocol):
            rules.append(rule)

    for version in (4, 6):
        _dump(sock, requests.get_rules(version), keep)
    return rules


def routes_of(sock: sockets.Socket, version: int, table: int, names: Mapping[int, str]) -> list[Route]:
    """The routes of one table. `names`: of all devices, by index."""
    routes: list[Route] = []

    def keep(body: bytes) -> None:
        route = replies.read_route(body)
        if route is not None and route.table == table and route.type == replies.UNICAST:
            routes.append(route.route(names))

    _dump(sock, requests.get_routes(version, table), keep)
    return routes


def devices_to(
    sock: sockets.Socket, networks: Collection[IPNetwork], links: Mapping[int, Link]
) -> dict[IPNetwork, str]:  # fmt: skip
    """The devices by which packets for the last addresses of networks go out, of those to which a route leads. (To
    IPv6 the first one is the host itself.)"""
    answers = sock.ask([requests.get_route_to(network.broadcast_address) for network in networks], replies.read_way)
    return {
        network: links[answer[0]].name
        for network, answer in zip(networks, answers, strict=True)
        if not isinstance(answer, NetlinkError) and answer[0] in links
    }


def _dump(sock: sockets.Socket, message: NetlinkMessage, keep: Callable[[bytes], None]) -> None:
    try:
        sock.dump(message, keep)
    except NetlinkError as error:
        if error.errno not in _NOT_THERE:
            raise
