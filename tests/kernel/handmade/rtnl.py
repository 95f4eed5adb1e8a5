"""Links, addresses, routes and rules, by linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h and fib_rules.h."""

from __future__ import annotations

import socket
import struct

from handmade.attributes import CREATE, EXCLUSIVE, REPLACE, attribute, nested, text, u8, u32
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage
from kilo_etcd.kernel.routing.rules import RoutingRule
from kilo_etcd.kernel.state import MAIN_TABLE, Route
from kilo_etcd.model import IPAddress, IPInterface

NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
GETNEIGH = 30
NEWRULE, DELRULE, GETRULE = 32, 33, 34

UP = 0x1

_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO = 3, 4, 18
_INFO_KIND, _INFO_DATA = 1, 2
_IPTUN_LOCAL, _IPTUN_TTL, _IPTUN_PMTUDISC = 2, 4, 10
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_NODAD = 0x02
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE, _RTA_MARK, _RTA_VIA = (
    1, 4, 5, 6, 7, 15, 16, 18,
)  # fmt: skip
_ONLINK = 0x4
_SCOPE_LINK = 253
_UNICAST, _UNREACHABLE = 1, 7
_KINDS = {"": _UNICAST, "unreachable": _UNREACHABLE, "throw": 9}
_FRA_DST, _FRA_IIFNAME, _FRA_IP_PROTO, _FRA_SPORT_RANGE, _FRA_DPORT_RANGE = 1, 3, 22, 23, 24
_FRA_SRC, _FRA_PRIORITY, _FRA_FWMARK, _FRA_SUPPRESS, _FRA_TABLE, _FRA_FWMASK, _FRA_PROTOCOL = 2, 6, 10, 14, 15, 16, 21
_TO_TABLE, _INVERT = 1, 0x2

_NDA_DST, _NDA_LLADDR = 1, 2
_NDMSG = struct.Struct("=BxHiHBB")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_RTA_SRC, _RTM_F_LOOKUP_TABLE, _RTM_F_FIB_MATCH = 2, 0x1000, 0x2000
_RTMSG = struct.Struct("=BBBBBBBBI")
GETNEXTHOP = 106
_NHMSG = struct.Struct("=BBBBI")
_NHA_ID, _NHA_GROUP, _NHA_OIF, _NHA_GATEWAY = 1, 2, 5, 6


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def get_link(name: str) -> NetlinkMessage:
    return NetlinkMessage(GETLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name))


def get_neighbours(version: int) -> NetlinkMessage:
    return NetlinkMessage(GETNEIGH, 0, _NDMSG.pack(_family(version), 0, 0, 0, 0, 0))


def neighbour(address: IPAddress, state: int, link_address: bytes | None) -> bytes:
    """As the kernel tells of one."""
    found = b"" if link_address is None else attribute(_NDA_LLADDR, link_address)
    return _NDMSG.pack(_family(address.version), 0, 7, state, 0, 0) + attribute(_NDA_DST, address.packed) + found


def get_links() -> NetlinkMessage:
    return NetlinkMessage(GETLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0))


def create_link(name: str, kind: str, local: IPAddress | None = None) -> NetlinkMessage:
    info = [text(_INFO_KIND, kind)]
    if kind == "ipip":
        data = [u8(_IPTUN_TTL, 64), u8(_IPTUN_PMTUDISC, 1)]
        if local is not None:
            data.append(attribute(_IPTUN_LOCAL, local.packed))
        info.append(nested(_INFO_DATA, *data))
    body = _IFINFO.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name) + nested(_IFLA_LINKINFO, *info)
    return NetlinkMessage(NEWLINK, CREATE | EXCLUSIVE, body)


def delete_link(index: int) -> NetlinkMessage:
    return NetlinkMessage(DELLINK, 0, _IFINFO.pack(0, 0, index, 0, 0))


def set_mtu(index: int, mtu: int) -> NetlinkMessage:
    return NetlinkMessage(SETLINK, 0, _IFINFO.pack(0, 0, index, 0, 0) + u32(_IFLA_MTU, mtu))


def set_up(index: int) -> NetlinkMessage:
    return NetlinkMessage(SETLINK, 0, _IFINFO.pack(0, 0, index, UP, UP))


def get_addresses(index: int = 0) -> NetlinkMessage:
    """Of one device (kernels without strict checking answer for all of them), or of all."""
    return NetlinkMessage(GETADDR, 0, _IFADDR.pack(0, 0, 0, 0, index))


def add_address(index: int, address: IPInterface) -> NetlinkMessage:
    return NetlinkMessage(NEWADDR, CREATE | EXCLUSIVE, _address(index, address))


def delete_address(index: int, address: IPInterface) -> NetlinkMessage:
    return NetlinkMessage(DELADDR, 0, _address(index, address))


def _address(index: int, address: IPInterface) -> bytes:
    flags = _NODAD if address.version == 6 else 0
    packed = address.ip.packed
    return b"".join(
        (
            _IFADDR.pack(_family(address.version), address.network.prefixlen, flags, 0, index),
            attribute(_IFA_LOCAL, packed),
            attribute(_IFA_ADDRESS, packed),
        )
    )


def get_routes(version: int, table: int = MAIN_TABLE) -> NetlinkMessage:
    """Of one table. Kernels without strict checking answer with all tables."""
    low, more = _table(table)
    return NetlinkMessage(GETROUTE, 0, _RTMSG.pack(_family(version), 0, 0, 0, low, 0, 0, 0, 0) + more)


def _table(table: int) -> tuple[int, bytes]:
    """The table in the header, and as an attribute where it does not fit there."""
    return (table, b"") if table < 256 else (0, u32(_RTA_TABLE, table))


def get_route_to(address: IPAddress, mark: int = 0, whole: bool = False) -> NetlinkMessage:
    """Asks which way a packet to `address`, marked with `mark`, would take; `whole`: by which route."""
    flags = _RTM_F_FIB_MATCH if whole else 0
    header = _RTMSG.pack(_family(address.version), address.max_prefixlen, 0, 0, 0, 0, 0, 0, flags)
    marked = u32(_RTA_MARK, mark) if mark else b""
    return NetlinkMessage(GETROUTE, 0, header + attribute(_RTA_DST, address.packed) + marked)


def get_nexthops() -> NetlinkMessage:
    """Asks for all nexthop objects."""
    return NetlinkMessage(GETNEXTHOP, 0, _NHMSG.pack(0, 0, 0, 0, 0))


def nexthop(number: int, index: int = 0, gateway: IPAddress | None = None, group: tuple[int, ...] = ()) -> bytes:
    """As the kernel tells of one."""
    members = b"".join(struct.pack("=IBBH", member, 0, 0, 0) for member in group)
    family = 0 if gateway is None else _family(gateway.version)
    return b"".join(
        (
            _NHMSG.pack(family, 0, 0, 0, 0),
            u32(_NHA_ID, number),
            attribute(_NHA_GROUP, members) if group else u32(_NHA_OIF, index),
            b"" if gateway is None else attribute(_NHA_GATEWAY, gateway.packed),
        )
    )


def get_route_between(source: IPAddress | None, address: IPAddress) -> NetlinkMessage:
    """Asks which route a packet from `source` to `address` would take, and in which table it is."""
    bits = address.max_prefixlen
    flags = _RTM_F_LOOKUP_TABLE if address.version == 4 else 0
    header = _RTMSG.pack(_family(address.version), bits, bits if source else 0, 0, 0, 0, 0, 0, flags)
    sent = attribute(_RTA_SRC, source.packed) if source else b""
    return NetlinkMessage(GETROUTE, 0, header + attribute(_RTA_DST, address.packed) + sent)


def add_route(route: Route, index: int) -> NetlinkMessage:
    """Fails with EEXIST rather than touch a route that another program has set."""
    return NetlinkMessage(NEWROUTE, CREATE | EXCLUSIVE, _route(route, index))


def replace_route(route: Route, index: int) -> NetlinkMessage:
    return NetlinkMessage(NEWROUTE, CREATE | REPLACE, _route(route, index))


def delete_route(route: Route, index: int) -> NetlinkMessage:
    return NetlinkMessage(DELROUTE, 0, _route(route, index, delete=True))


def _route(route: Route, index: int, *, delete: bool = False) -> bytes:
    """`index`: the device, 0 for the one that the kernel finds."""
    destination = route.destination
    if route.unreachable:
        scope, kind = 0, _UNREACHABLE
    elif delete:
        scope, kind = 255, 0
    else:
        local = route.gateway is None and destination.version == 4 and not route.kind
        scope, kind = _SCOPE_LINK if local else 0, _KINDS[route.kind]
    flags = _ONLINK if route.onlink and not delete else 0
    low, more = _table(route.table)
    parts = [
        _RTMSG.pack(_family(destination.version), destination.prefixlen, 0, 0, low, route.protocol, scope, kind, flags),
        attribute(_RTA_DST, destination.network_address.packed),
        more,
    ]
    if index:
        parts.append(u32(_RTA_OIF, index))
    if route.gateway is not None:
        if route.gateway.version == destination.version:
            parts.append(attribute(_RTA_GATEWAY, route.gateway.packed))
        else:
            via = struct.pack("=H", _family(route.gateway.version)) + route.gateway.packed
            parts.append(attribute(_RTA_VIA, via))
    if route.source is not None and not delete:
        parts.append(attribute(_RTA_PREFSRC, route.source.packed))
    if route.metric:
        parts.append(u32(_RTA_PRIORITY, route.metric))
    return b"".join(parts)


def get_rules(version: int) -> NetlinkMessage:
    return NetlinkMessage(GETRULE, 0, _RTMSG.pack(_family(version), 0, 0, 0, 0, 0, 0, 0, 0))


def add_rule(rule: RoutingRule, protocol: int) -> NetlinkMessage:
    return NetlinkMessage(NEWRULE, CREATE | EXCLUSIVE, _rule(rule, protocol))


def delete_rule(rule: RoutingRule, protocol: int) -> NetlinkMessage:
    return NetlinkMessage(DELRULE, 0, _rule(rule, protocol))


def _rule(rule: RoutingRule, protocol: int) -> bytes:
    flags = _INVERT if rule.not_mark else 0
    low = rule.table if rule.table < 256 else 0
    source = 0 if rule.source is None else rule.source.max_prefixlen
    destination = 0 if rule.destination is None else rule.destination.prefixlen
    parts = [
        # struct fib_rule_hdr has the layout of struct rtmsg, with the action in place of the type.
        _RTMSG.pack(_family(rule.version), destination, source, 0, low, 0, 0, _TO_TABLE, flags),
        u32(_FRA_PRIORITY, rule.priority),
        u32(_FRA_TABLE, rule.table),
        u8(_FRA_PROTOCOL, protocol),
    ]
    if rule.source is not None:
        parts.append(attribute(_FRA_SRC, rule.source.packed))
    if rule.destination is not None:
        parts.append(attribute(_FRA_DST, rule.destination.network_address.packed))
    if rule.protocol:
        parts.append(u8(_FRA_IP_PROTO, rule.protocol))
    for kind, port in ((_FRA_SPORT_RANGE, rule.sport), (_FRA_DPORT_RANGE, rule.dport)):
        if port:
            parts.append(attribute(kind, struct.pack("=HH", port, port)))
    if rule.inbound:
        parts.append(attribute(_FRA_IIFNAME, rule.inbound.encode() + b"\0"))
    if rule.not_mark:
        parts += [u32(_FRA_FWMARK, rule.not_mark), u32(_FRA_FWMASK, 0xFFFFFFFF)]
    if rule.suppress is not None:
        parts.append(u32(_FRA_SUPPRESS, rule.suppress))
    return b"".join(parts)
