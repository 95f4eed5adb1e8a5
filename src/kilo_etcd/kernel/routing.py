"""Reads the table and the rules of a way out, as far as they are ours. Blocking."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from attrs import field, frozen

from kilo_etcd.kernel import netlink
from kilo_etcd.kernel.errors import NetlinkError
from kilo_etcd.kernel.netlink import Message
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.rules import RoutingRule
from kilo_etcd.kernel.state import Route
from kilo_etcd.kernel.wayout import exit_table, rule_priorities
from kilo_etcd.kernel.write import rtnl as requests
from kilo_etcd.model import IPNetwork

_NOT_THERE = frozenset({errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.ENOENT})
"""What a dump says where there is no such family, or no such table."""


@frozen(kw_only=True)
class Found:
    """What there is of a way out. `fences`: what the table refuses where no other route of it takes a packet."""

    routes: dict[IPNetwork, Route] = field(factory=dict)
    fences: frozenset[IPNetwork] = frozenset()
    rules: frozenset[RoutingRule] = frozenset()


def read(sock: netlink.Socket, interface: str, protocol: int, names: Mapping[int, str]) -> Found:
    """The routes of the interface's own table, and the rules that lead there. `names`: of all devices, by index."""
    routes: dict[IPNetwork, Route] = {}
    fences: set[IPNetwork] = set()
    rules: set[RoutingRule] = set()
    table, priorities = exit_table(interface), rule_priorities(interface)

    def keep_route(body: bytes) -> None:
        found = replies.read_route(body)
        if found is None or found.table != table:
            return
        if found.last_resort:
            fences.add(found.destination)
        else:
            routes[found.destination] = found.route(names)

    def keep_rule(body: bytes) -> None:
        found = replies.read_rule(body)
        if found is not None and found[1] == protocol and found[0].priority in priorities:
            rules.add(found[0])

    for version in (4, 6):
        _dump(sock, requests.get_routes(version, table), keep_route)
        _dump(sock, requests.get_rules(version), keep_rule)
    return Found(routes=routes, fences=frozenset(fences), rules=frozenset(rules))


def _dump(sock: netlink.Socket, message: Message, keep: Callable[[bytes], None]) -> None:
    try:
        sock.dump(message, keep)
    except NetlinkError as error:
        if error.errno not in _NOT_THERE:
            raise
