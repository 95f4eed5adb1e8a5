"""Links, addresses, routes and rules as requests of rtnetlink. Pure: the socket is `kernel.netlink.sockets`'s."""

from __future__ import annotations

import ipaddress
import socket
from functools import cache, lru_cache

from kilo_etcd.kernel.netlink import formats
from kilo_etcd.kernel.netlink.codec import Writer, encode
from kilo_etcd.kernel.netlink.formats import (
    PORT_RANGE,
    core,
    fibmsg,
    ifaddrmsg,
    ifinfmsg,
    ndmsg,
    nexthopmsg,
    rtmsg,
    rtnl,
)
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage
from kilo_etcd.kernel.routing.rules import RoutingRule
from kilo_etcd.kernel.state import MAIN_TABLE, Route
from kilo_etcd.model import IPAddress, IPInterface

_NEW = core.NLM_F_CREATE | core.NLM_F_EXCL
_UP = formats.links.IFF_UP
_NODAD = formats.addresses.IFA_F_NODAD
_ONLINK = formats.routes.RTNH_F_ONLINK
_TO_TABLE = formats.rules.FR_ACT_NAMES["FR_ACT_TO_TBL"]
_SCOPE, _TYPE = rtnl.rt_scope, rtnl.rt_type
_HIGHEST_BYTE = 255
"""A table with a larger number is in an attribute."""

_number, _short = formats.U32, formats.U16
_FAMILY = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}


def _shown(value: bytes) -> object:
    return str(ipaddress.ip_address(value))


def _range(value: bytes) -> object:
    return ":".join(map(str, PORT_RANGE.unpack(value)))


def _via(value: bytes) -> object:
    return {"family": _short.unpack_from(value)[0], "addr": _shown(value[_short.size :])}


_route = Writer(
    rtmsg, {"RTA_DST": _shown, "RTA_SRC": _shown, "RTA_GATEWAY": _shown, "RTA_PREFSRC": _shown, "RTA_VIA": _via}
)
_address = Writer(ifaddrmsg, {"IFA_LOCAL": _shown, "IFA_ADDRESS": _shown})
_rule = Writer(
    fibmsg,
    {
        "FRA_DST": _shown, "FRA_SRC": _shown, "FRA_IIFNAME": lambda value: value[:-1].decode(),
        "FRA_SPORT_RANGE": _range, "FRA_DPORT_RANGE": _range,
    },
)  # fmt: skip


@lru_cache(16)  # As those that are cached below: the same question is asked again and again.
def get_link(name: str) -> NetlinkMessage:
    """Asks for the device of that name."""
    return _link(rtnl.RTM_GETLINK, 0, ("IFLA_IFNAME", name))


@cache
def get_neighbours(version: int) -> NetlinkMessage:
    """Asks for the neighbours of one family (ARP, ND) on all links."""
    return NetlinkMessage(rtnl.RTM_GETNEIGH, 0, encode(ndmsg, (_FAMILY[version], 0, 0, 0, 0), ()))


@cache
def get_links() -> NetlinkMessage:
    """Asks for all devices."""
    return _link(rtnl.RTM_GETLINK, 0)


def create_link(name: str, kind: str, local: IPAddress | None = None) -> NetlinkMessage:
    """A device of this kind; `local`: of an `ipip` device, the address that it sends from."""
    info: list[tuple[str, object]] = [("IFLA_INFO_KIND", kind)]
    if kind == "ipip":
        data: list[tuple[str, object]] = [("IFLA_IPIP_TTL", 64), ("IFLA_IPIP_PMTUDISC", 1)]
        if local is not None:
            data.append(("IFLA_IPIP_LOCAL", str(local)))
        info.append(("IFLA_INFO_DATA", {"attrs": data}))
    return _link(rtnl.RTM_NEWLINK, 0, ("IFLA_IFNAME", name), ("IFLA_LINKINFO", {"attrs": info}), flags=_NEW)


def delete_link(index: int) -> NetlinkMessage:
    """Removes a device, by its index."""
    return _link(rtnl.RTM_DELLINK, index)


def set_mtu(index: int, mtu: int) -> NetlinkMessage:
    """Sets the MTU of a device, in bytes."""
    return _link(rtnl.RTM_SETLINK, index, ("IFLA_MTU", mtu))


def set_up(index: int) -> NetlinkMessage:
    """Brings a device up."""
    return _link(rtnl.RTM_SETLINK, index, up=_UP)


def _link(kind: int, index: int, *attributes: tuple[str, object], flags: int = 0, up: int = 0) -> NetlinkMessage:
    return NetlinkMessage(kind, flags, encode(ifinfmsg, (socket.AF_UNSPEC, 0, index, up, up), attributes))


def get_addresses(index: int = 0) -> NetlinkMessage:
    """Of one device (kernels without strict checking answer for all of them), or of all."""
    return NetlinkMessage(rtnl.RTM_GETADDR, 0, _address((socket.AF_UNSPEC, 0, 0, 0, index), {}))


def add_address(index: int, address: IPInterface) -> NetlinkMessage:
    """Gives a device an address; IPv6 without duplicate address detection. Fails with EEXIST if it has it."""
    return NetlinkMessage(rtnl.RTM_NEWADDR, _NEW, _on_device(index, address))


def delete_address(index: int, address: IPInterface) -> NetlinkMessage:
    """Takes an address from a device."""
    return NetlinkMessage(rtnl.RTM_DELADDR, 0, _on_device(index, address))


def _on_device(index: int, address: IPInterface) -> bytes:
    flags = _NODAD if address.version == 6 else 0
    fixed = (_FAMILY[address.version], address.network.prefixlen, flags, 0, index)
    return _address(fixed, {"IFA_LOCAL": address.ip.packed, "IFA_ADDRESS": address.ip.packed})


def get_routes(version: int, table: int = MAIN_TABLE) -> NetlinkMessage:
    """Of one table. Kernels without strict checking answer with all tables."""
    more = {"RTA_TABLE": _number.pack(table)} if table > _HIGHEST_BYTE else {}
    return NetlinkMessage(rtnl.RTM_GETROUTE, 0, _route((_FAMILY[version], 0, 0, 0, _low(table), 0, 0, 0, 0), more))


@cache
def get_nexthops() -> NetlinkMessage:
    """Asks for all nexthop objects."""
    return NetlinkMessage(formats.RTM_GETNEXTHOP, 0, encode(nexthopmsg, (socket.AF_UNSPEC, 0, 0, 0, 0), ()))


def get_route_to(address: IPAddress, mark: int = 0, *, whole: bool = False) -> NetlinkMessage:
    """Asks which way a packet to `address`, marked with `mark`, would take; `whole`: by which route, with all its next
    hops."""
    attributes = {"RTA_DST": address.packed}
    if mark:
        attributes["RTA_MARK"] = _number.pack(mark)
    flags = formats.RTM_F_FIB_MATCH if whole else 0
    fixed = (_FAMILY[address.version], address.max_prefixlen, 0, 0, 0, 0, 0, 0, flags)
    return NetlinkMessage(rtnl.RTM_GETROUTE, 0, _route(fixed, attributes))


def get_route_between(source: IPAddress | None, address: IPAddress, mark: int = 0) -> NetlinkMessage:
    """Asks which route a packet from `source` to `address`, marked with `mark`, would take, and in which table it
    is."""
    attributes = {"RTA_DST": address.packed}
    if source is not None:
        attributes["RTA_SRC"] = source.packed
    if mark:
        attributes["RTA_MARK"] = _number.pack(mark)
    bits = address.max_prefixlen
    # Of IPv6 the kernel names the table unasked, and refuses the flag.
    flags = formats.RTM_F_LOOKUP_TABLE if address.version == 4 else 0
    fixed = (_FAMILY[address.version], bits, bits if source else 0, 0, 0, 0, 0, 0, flags)
    return NetlinkMessage(rtnl.RTM_GETROUTE, 0, _route(fixed, attributes))


def add_route(route: Route, index: int) -> NetlinkMessage:
    """Fails with EEXIST rather than touch a route that another program has set."""
    return NetlinkMessage(rtnl.RTM_NEWROUTE, _NEW, _route_body(route, index))


def replace_route(route: Route, index: int) -> NetlinkMessage:
    """Sets a route in the place of the one to the same destination with the same metric, whoever has set that."""
    return NetlinkMessage(rtnl.RTM_NEWROUTE, core.NLM_F_CREATE | core.NLM_F_REPLACE, _route_body(route, index))


def delete_route(route: Route, index: int) -> NetlinkMessage:
    """Removes a route. Its source address is not compared."""
    return NetlinkMessage(rtnl.RTM_DELROUTE, 0, _route_body(route, index, delete=True))


def _route_body(route: Route, index: int, *, delete: bool = False) -> bytes:
    """`index`: the device, 0 for the one that the kernel finds."""
    destination = route.destination
    version = destination.version
    if route.unreachable:
        scope, kind = _UNIVERSE, _UNREACHABLE
    elif delete:
        scope, kind = _NOWHERE, _UNSPEC
    else:
        local = route.gateway is None and version == 4 and not route.kind
        scope, kind = _LINK if local else _UNIVERSE, _KINDS[route.kind]
    attributes = {"RTA_DST": destination.network_address.packed}
    if (table := route.table) > _HIGHEST_BYTE:
        attributes["RTA_TABLE"] = _number.pack(table)
    if index:
        attributes["RTA_OIF"] = _number.pack(index)
    if (gateway := route.gateway) is not None:
        if gateway.version == version:
            attributes["RTA_GATEWAY"] = gateway.packed
        else:
            attributes["RTA_VIA"] = _short.pack(_FAMILY[gateway.version]) + gateway.packed
    if route.source is not None and not delete:
        attributes["RTA_PREFSRC"] = route.source.packed
    if route.metric:
        attributes["RTA_PRIORITY"] = _number.pack(route.metric)
    flags = _ONLINK if route.onlink and not delete else 0
    fixed = (_FAMILY[version], destination.prefixlen, 0, 0, _low(table), route.protocol, scope, kind, flags)
    return _route(fixed, attributes)


_UNIVERSE, _LINK, _NOWHERE = _SCOPE["universe"], _SCOPE["link"], _SCOPE["nowhere"]
_UNSPEC, _UNREACHABLE = _TYPE["unspec"], _TYPE["unreachable"]
_KINDS = {"": _TYPE["unicast"], "unreachable": _UNREACHABLE, "throw": _TYPE["throw"]}


def _low(table: int) -> int:
    """The part of the number in the header."""
    return table if table <= _HIGHEST_BYTE else 0


def get_rules(version: int) -> NetlinkMessage:
    """Asks for the policy rules of one family."""
    return NetlinkMessage(rtnl.RTM_GETRULE, 0, _rule((_FAMILY[version], 0, 0, 0, 0, 0, 0, 0, 0), {}))


def add_rule(rule: RoutingRule, protocol: int) -> NetlinkMessage:
    """Adds a policy rule, marked as ours by `protocol`. Fails with EEXIST if there is one like it."""
    return NetlinkMessage(rtnl.RTM_NEWRULE, _NEW, _rule_body(rule, protocol))


def delete_rule(rule: RoutingRule, protocol: int) -> NetlinkMessage:
    """Removes the policy rule that agrees in all of this, `protocol` among it."""
    return NetlinkMessage(rtnl.RTM_DELRULE, 0, _rule_body(rule, protocol))


def _rule_body(rule: RoutingRule, protocol: int) -> bytes:
    source = 0 if rule.source is None else rule.source.max_prefixlen
    destination = 0 if rule.destination is None else rule.destination.prefixlen
    flags = formats.FIB_RULE_INVERT if rule.not_mark else 0
    attributes = {
        "FRA_PRIORITY": _number.pack(rule.priority),
        "FRA_TABLE": _number.pack(rule.table),
        "FRA_PROTOCOL": bytes([protocol]),
    }
    if rule.source is not None:
        attributes["FRA_SRC"] = rule.source.packed
    if rule.destination is not None:
        attributes["FRA_DST"] = rule.destination.network_address.packed
    if rule.protocol:
        attributes["FRA_IP_PROTO"] = bytes([rule.protocol])
    if rule.sport:
        attributes["FRA_SPORT_RANGE"] = PORT_RANGE.pack(rule.sport, rule.sport)
    if rule.dport:
        attributes["FRA_DPORT_RANGE"] = PORT_RANGE.pack(rule.dport, rule.dport)
    if rule.inbound:
        attributes["FRA_IIFNAME"] = rule.inbound.encode() + b"\0"
    if rule.not_mark:
        attributes |= {"FRA_FWMARK": _number.pack(rule.not_mark), "FRA_FWMASK": _number.pack(0xFFFFFFFF)}
    if rule.suppress is not None:
        attributes["FRA_SUPPRESS_PREFIXLEN"] = _number.pack(rule.suppress)
    fixed = (_FAMILY[rule.version], destination, source, 0, _low(rule.table), 0, 0, _TO_TABLE, flags)
    return _rule(fixed, attributes)
