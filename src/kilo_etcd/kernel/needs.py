"""What a change needs and what it provides. Pure.

A change on a device that could not be made cannot be made either, and its absence says nothing of other programs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kilo_etcd.kernel.routing import encrypted
from kilo_etcd.kernel.routing.rules import AddRule, RoutingRule
from kilo_etcd.kernel.state import (
    MAIN_TABLE,
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    ReplaceRoute,
    SetMtu,
    SetUp,
    StartUserspace,
)


def needs(change: Change) -> frozenset[str]:
    """The devices, addresses and rules without which a change makes no sense."""
    if isinstance(change, AddRule) and leads_into_tunnel(change.rule):
        return frozenset({_past(change.rule)})
    if isinstance(change, AddRoute | ReplaceRoute):
        route = change.route
        needed = {route.device} if route.source is None else {route.device, str(route.source)}
        if route.device and route.destination.version == 6 and route.table == MAIN_TABLE:
            needed.add(_ipv6(route.device))
        return frozenset(needed)
    if isinstance(change, SetMtu | SetUp | AddAddress):
        return frozenset({change.name})
    return frozenset()


def provides(change: Change) -> frozenset[str]:
    """The device, the address or the rules that are missing if a change fails."""
    if isinstance(change, AddRule) and encrypted.is_ours(change.rule.priority):
        return frozenset({_past(change.rule)})
    if isinstance(change, AddAddress):
        # A device that takes no IPv6 address takes no IPv6 route either.
        six = {_ipv6(change.name)} if change.address.version == 6 else set()
        return frozenset({str(change.address.ip), *six})
    return frozenset({change.name}) if isinstance(change, CreateLink | StartUserspace) else frozenset()


def possible(changes: Collection[Change], failed: Collection[Change]) -> tuple[Change, ...]:
    """The changes without those that are known to fail, and without what needs these."""
    missing = _missing(change for change in changes if change in failed)
    return tuple(change for change in changes if change not in failed and not needs(change) & missing)


def _missing(failed: Iterable[Change]) -> frozenset[str]:
    return frozenset().union(*map(provides, failed))


def leads_into_tunnel(rule: RoutingRule) -> bool:
    """Whether it must not be there without those that keep etcd outside, which a kernel before 4.17 cannot have: who
    is cut off from etcd by `encrypted` could not be told to end it."""
    return encrypted.is_ours(rule.priority) and rule.table != MAIN_TABLE


def _ipv6(device: str) -> str:
    """What stands for IPv6 on a device."""
    return f"IPv6 on {device}"


def _past(rule: RoutingRule) -> str:
    """What stands for the rules that keep something outside."""
    return f"rules past the tunnel in IPv{rule.version}"
