"""Links, addresses and routes as rtnetlink messages: packed from values, and read into values.

Byte layouts are those of linux/rtnetlink.h, if_link.h and if_addr.h. Pure: the socket is `kernel.netlink`'s.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Mapping

from attrs import field, frozen

from kilo_etcd.kernel import netlink
from kilo_etcd.kernel.netlink import CREATE, EXCLUSIVE, REPLACE, Message
from kilo_etcd.kernel.rules import RoutingRule
from kilo_etcd.kernel.state import (
    FENCE_METRIC,
    MAIN_TABLE,
    ROUTE_PROTOCOL,
    AddressScope,
    HostAddress,
    Link,
    Route,
)
from kilo_etcd.model import IPAddress, IPInterface, IPNetwork

NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
NEWRULE, DELRULE, GETRULE = 32, 33, 34
NEWNETCONF = 80

GROUPS = (1, 5, 9, 7, 11, 8, 19, 24, 25)
"""Multicast groups: link, IPv4 address, IPv6 address, IPv4 route, IPv6 route, IPv4 rule, IPv6 rule, IPv4 settings, IPv6
settings."""

UP = 0x1

_NETCONF_INDEX, _NETCONF_FORWARDING, _NETCONF_ALL = 1, 2, -1

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO = 1, 3, 4, 18
_INFO_KIND, _INFO_DATA = 1, 2
_IPTUN_LOCAL, _IPTUN_TTL, _IPTUN_PMTUDISC = 2, 4, 10
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_NODAD, _TEMPORARY, _DEPRECATED = 0x02, 0x01, 0x20
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS, _RTA_TABLE, _RTA_MARK, _RTA_VIA = (
    1, 4, 5, 6, 7, 8, 15, 16, 18,
)  # fmt: skip
_RTAX_MTU = 2
_ONLINK = 0x4
_CLONED = 0x200
_SCOPE_LINK, _SCOPE_HOST = 253, 254
_UNICAST, _UNREACHABLE = 1, 7
_KINDS = {"": _UNICAST, "unreachable": _UNREACHABLE, "throw": 9}
_KIND_NAMES = {number: name for name, number in _KINDS.items()}
_FRA_SRC, _FRA_PRIORITY, _FRA_FWMARK, _FRA_SUPPRESS, _FRA_TABLE, _FRA_FWMASK, _FRA_PROTOCOL = 2, 6, 10, 14, 15, 16, 21
_NOT_SUPPRESSED = 0xFFFFFFFF
"""What the kernel says of a rule that suppresses nothing."""
_TO_TABLE, _INVERT = 1, 0x2

_NDA_DST, _NDA_LLADDR = 1, 2
_RESOLVED = 0x02 | 0x04 | 0x08 | 0x10 | 0x80
"""States of a neighbour whose link-layer address is known: reachable, stale, delay, probe, permanent."""

_NDMSG = struct.Struct("=BxHiHBB")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")


@frozen(kw_only=True)
class FoundRoute:
    """A route as the kernel tells it: with the device's index instead of its name."""

    destination: IPNetwork
    gateway: IPAddress | None
    index: int
    source: IPAddress | None
    protocol: int
    metric: int
    onlink: bool
    table: int
    type: int
    mtu: int = 0

    @property
    def fence(self) -> bool:
        """Whether it is one of ours that refuses packets for the mesh."""
        return self.last_resort and self.protocol == ROUTE_PROTOCOL

    @property
    def last_resort(self) -> bool:
        """Whether it refuses packets that no other route of its table takes."""
        return (self.type, self.metric) == (_UNREACHABLE, FENCE_METRIC)

    def route(self, names: Mapping[int, str]) -> Route:
        return Route(
            destination=self.destination,
            gateway=self.gateway,
            # In IPv6 the kernel gives routes that lead nowhere the loopback device.
            device=names.get(self.index, "") if self.type == _UNICAST else "",
            source=self.source,
            protocol=self.protocol,
            metric=self.metric,
            onlink=self.onlink,
            table=self.table,
            kind=_KIND_NAMES.get(self.type, ""),
        )


@frozen(kw_only=True)
class FoundLink:
    link: Link
    local: IPAddress | None = None
    """Of a tunnel: the address that it sends from."""
    attributes: Mapping[int, bytes] = field(factory=dict, repr=False)


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _ip(data: bytes) -> IPAddress:
    return ipaddress.IPv4Address(data) if len(data) == 4 else ipaddress.IPv6Address(data)


def _u32(data: bytes) -> int:
    value: int = struct.unpack_from("=I", data)[0]
    return value


def get_link(name: str) -> Message:
    return Message(GETLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0) + netlink.text(_IFLA_IFNAME, name))


def get_neighbours(version: int) -> Message:
    return Message(GETNEIGH, 0, _NDMSG.pack(_family(version), 0, 0, 0, 0, 0))


def read_neighbour(body: bytes) -> IPAddress | None:
    """The address of a neighbour on a link, if it has answered there."""
    *_, state, _, _ = _NDMSG.unpack_from(body)
    found = netlink.attributes(body, _NDMSG.size)
    answered = state & _RESOLVED and any(found.get(_NDA_LLADDR, b""))
    return _ip(found[_NDA_DST]) if answered and _NDA_DST in found else None


def get_links() -> Message:
    return Message(GETLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0))


def create_link(name: str, kind: str, local: IPAddress | None = None) -> Message:
    info = [netlink.text(_INFO_KIND, kind)]
    if kind == "ipip":
        data = [netlink.u8(_IPTUN_TTL, 64), netlink.u8(_IPTUN_PMTUDISC, 1)]
        if local is not None:
            data.append(netlink.attribute(_IPTUN_LOCAL, local.packed))
        info.append(netlink.nested(_INFO_DATA, *data))
    body = _IFINFO.pack(0, 0, 0, 0, 0) + netlink.text(_IFLA_IFNAME, name) + netlink.nested(_IFLA_LINKINFO, *info)
    return Message(NEWLINK, CREATE | EXCLUSIVE, body)


def delete_link(index: int) -> Message:
    return Message(DELLINK, 0, _IFINFO.pack(0, 0, index, 0, 0))


def set_mtu(index: int, mtu: int) -> Message:
    return Message(SETLINK, 0, _IFINFO.pack(0, 0, index, 0, 0) + netlink.u32(_IFLA_MTU, mtu))


def set_up(index: int) -> Message:
    return Message(SETLINK, 0, _IFINFO.pack(0, 0, index, UP, UP))


def read_link(body: bytes) -> FoundLink:
    _, _, index, flags, _ = _IFINFO.unpack_from(body)
    found = netlink.attributes(body, 16)
    info = netlink.attributes(found.get(_IFLA_LINKINFO, b""))
    kind = info.get(_INFO_KIND, b"").rstrip(b"\0").decode()
    local: IPAddress | None = None
    if kind == "ipip":
        packed = netlink.attributes(info.get(_INFO_DATA, b"")).get(_IPTUN_LOCAL, b"")
        local = _ip(packed) if len(packed) == 4 and any(packed) else None
    name = found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
    mtu = _u32(found[_IFLA_MTU]) if _IFLA_MTU in found else 0
    return FoundLink(link=Link(name=name, index=index, kind=kind, up=bool(flags & UP), mtu=mtu), local=local)


def get_addresses(index: int = 0) -> Message:
    """Of one device (kernels without strict checking answer for all of them), or of all."""
    return Message(GETADDR, 0, _IFADDR.pack(0, 0, 0, 0, index))


def add_address(index: int, address: IPInterface) -> Message:
    return Message(NEWADDR, CREATE | EXCLUSIVE, _address(index, address))


def delete_address(index: int, address: IPInterface) -> Message:
    return Message(DELADDR, 0, _address(index, address))


def _address(index: int, address: IPInterface) -> bytes:
    flags = _NODAD if address.version == 6 else 0
    packed = address.ip.packed
    return b"".join(
        (
            _IFADDR.pack(_family(address.version), address.network.prefixlen, flags, 0, index),
            netlink.attribute(_IFA_LOCAL, packed),
            netlink.attribute(_IFA_ADDRESS, packed),
        )
    )


def read_address(body: bytes, links: Mapping[int, Link]) -> HostAddress | None:
    """None for an address that is neither IPv4 nor IPv6."""
    family, prefix, flags, scope, index = _IFADDR.unpack_from(body)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    found = netlink.attributes(body, 8)
    packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if packed is None:
        return None
    if _IFA_FLAGS in found:
        flags = _u32(found[_IFA_FLAGS])
    link = links.get(index)
    kind = {_SCOPE_LINK: AddressScope.LINK, _SCOPE_HOST: AddressScope.HOST}.get(scope, AddressScope.GLOBAL)
    return HostAddress(
        interface=link.name if link else "",
        index=index,
        address=ipaddress.ip_interface((_ip(packed), prefix)),
        scope=kind,
        deprecated=bool(flags & _DEPRECATED),
        # In IPv4 the same bit says that the address is not the first one of its network.
        temporary=family == socket.AF_INET6 and bool(flags & _TEMPORARY),
        kind=link.kind if link else "",
        up=link.up if link else True,
    )


def get_routes(version: int, table: int = MAIN_TABLE) -> Message:
    """Of one table. Kernels without strict checking answer with all tables."""
    low, more = _table(table)
    return Message(GETROUTE, 0, _RTMSG.pack(_family(version), 0, 0, 0, low, 0, 0, 0, 0) + more)


def _table(table: int) -> tuple[int, bytes]:
    """The table in the header, and as an attribute where it does not fit there."""
    return (table, b"") if table < 256 else (0, netlink.u32(_RTA_TABLE, table))


def get_route_to(address: IPAddress, mark: int = 0) -> Message:
    """Asks which way a packet to `address`, marked with `mark`, would take."""
    header = _RTMSG.pack(_family(address.version), address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    marked = netlink.u32(_RTA_MARK, mark) if mark else b""
    return Message(GETROUTE, 0, header + netlink.attribute(_RTA_DST, address.packed) + marked)


def add_route(route: Route, index: int) -> Message:
    """Fails with EEXIST rather than touch a route that somebody else has set."""
    return Message(NEWROUTE, CREATE | EXCLUSIVE, _route(route, index))


def replace_route(route: Route, index: int) -> Message:
    return Message(NEWROUTE, CREATE | REPLACE, _route(route, index))


def delete_route(route: Route, index: int) -> Message:
    return Message(DELROUTE, 0, _route(route, index, delete=True))


def _route(route: Route, index: int, *, delete: bool = False) -> bytes:
    """`index`: the device, 0 for the one that the kernel finds."""
    destination = route.destination
    if route.fence:
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
        netlink.attribute(_RTA_DST, destination.network_address.packed),
        more,
    ]
    if index:
        parts.append(netlink.u32(_RTA_OIF, index))
    if route.gateway is not None:
        if route.gateway.version == destination.version:
            parts.append(netlink.attribute(_RTA_GATEWAY, route.gateway.packed))
        else:
            via = struct.pack("=H", _family(route.gateway.version)) + route.gateway.packed
            parts.append(netlink.attribute(_RTA_VIA, via))
    if route.source is not None and not delete:
        parts.append(netlink.attribute(_RTA_PREFSRC, route.source.packed))
    if route.metric:
        parts.append(netlink.u32(_RTA_PRIORITY, route.metric))
    return b"".join(parts)


def get_rules(version: int) -> Message:
    return Message(GETRULE, 0, _RTMSG.pack(_family(version), 0, 0, 0, 0, 0, 0, 0, 0))


def add_rule(rule: RoutingRule, protocol: int) -> Message:
    return Message(NEWRULE, CREATE | EXCLUSIVE, _rule(rule, protocol))


def delete_rule(rule: RoutingRule, protocol: int) -> Message:
    return Message(DELRULE, 0, _rule(rule, protocol))


def _rule(rule: RoutingRule, protocol: int) -> bytes:
    flags = _INVERT if rule.not_mark else 0
    low = rule.table if rule.table < 256 else 0
    source = 0 if rule.source is None else rule.source.max_prefixlen
    parts = [
        # struct fib_rule_hdr has the layout of struct rtmsg, with the action in place of the type.
        _RTMSG.pack(_family(rule.version), 0, source, 0, low, 0, 0, _TO_TABLE, flags),
        netlink.u32(_FRA_PRIORITY, rule.priority),
        netlink.u32(_FRA_TABLE, rule.table),
        netlink.u8(_FRA_PROTOCOL, protocol),
    ]
    if rule.source is not None:
        parts.append(netlink.attribute(_FRA_SRC, rule.source.packed))
    if rule.not_mark:
        parts += [netlink.u32(_FRA_FWMARK, rule.not_mark), netlink.u32(_FRA_FWMASK, 0xFFFFFFFF)]
    if rule.suppress is not None:
        parts.append(netlink.u32(_FRA_SUPPRESS, rule.suppress))
    return b"".join(parts)


def read_forwarding(body: bytes) -> tuple[int, bool] | None:
    """Family (4, 6) and whether it is forwarded, of an event on the settings of all interfaces (linux/netconf.h)."""
    family = {int(socket.AF_INET): 4, int(socket.AF_INET6): 6}.get(body[0])
    found = netlink.attributes(body, 4)
    if family is None or _NETCONF_FORWARDING not in found:
        return None
    index, value = (struct.unpack("=i", found.get(kind, bytes(4)))[0] for kind in (_NETCONF_INDEX, _NETCONF_FORWARDING))
    return (family, bool(value)) if index == _NETCONF_ALL else None


def read_rule(body: bytes) -> tuple[RoutingRule, int] | None:
    """A rule, and the protocol that it is marked with; None for what says more than our rules ever do."""
    family, to, source, _, table, _, _, action, flags = _RTMSG.unpack_from(body)
    if family not in (socket.AF_INET, socket.AF_INET6) or action != _TO_TABLE or to:
        return None
    found = netlink.attributes(body, 12)
    address = _ip(found[_FRA_SRC]) if _FRA_SRC in found else None
    if source != (0 if address is None else address.max_prefixlen):
        return None
    mark = _u32(found[_FRA_FWMARK]) if _FRA_FWMARK in found else 0
    if bool(mark) is not bool(flags & _INVERT):
        return None
    suppressed = _u32(found[_FRA_SUPPRESS]) if _FRA_SUPPRESS in found else _NOT_SUPPRESSED
    rule = RoutingRule(
        version=4 if family == socket.AF_INET else 6,
        priority=_u32(found[_FRA_PRIORITY]) if _FRA_PRIORITY in found else 0,
        table=_u32(found[_FRA_TABLE]) if _FRA_TABLE in found else table,
        not_mark=mark,
        source=address,
        suppress=None if suppressed == _NOT_SUPPRESSED else suppressed,
    )
    return rule, found[_FRA_PROTOCOL][0] if _FRA_PROTOCOL in found else 0


def read_way(body: bytes) -> tuple[int, int]:
    """Of the answer to `get_route_to`: the index of the device, and the route's own MTU; 0 for what it does not say."""
    found = netlink.attributes(body, 12)
    metrics = netlink.attributes(found.get(_RTA_METRICS, b""))
    return (
        _u32(found[_RTA_OIF]) if _RTA_OIF in found else 0,
        _u32(metrics[_RTAX_MTU]) if _RTAX_MTU in metrics else 0,
    )


def read_route(body: bytes) -> FoundRoute | None:
    """None for what is no route of the tables (cached clones, other families)."""
    family, length, _, _, table, protocol, _, kind, flags = _RTMSG.unpack_from(body)
    if flags & _CLONED or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    found = netlink.attributes(body, 12)
    size = 4 if family == socket.AF_INET else 16
    packed = found.get(_RTA_DST, bytes(size))
    destination: IPNetwork
    if size == 4:
        destination = ipaddress.IPv4Network((packed, length), strict=False)
    else:
        destination = ipaddress.IPv6Network((packed, length), strict=False)
    gateway: IPAddress | None = None
    if _RTA_GATEWAY in found:
        gateway = _ip(found[_RTA_GATEWAY])
    elif _RTA_VIA in found:
        gateway = _ip(found[_RTA_VIA][2:])
    metrics = netlink.attributes(found.get(_RTA_METRICS, b""))
    return FoundRoute(
        destination=destination,
        gateway=gateway,
        index=_u32(found[_RTA_OIF]) if _RTA_OIF in found else 0,
        source=_ip(found[_RTA_PREFSRC]) if _RTA_PREFSRC in found else None,
        protocol=protocol,
        metric=_u32(found[_RTA_PRIORITY]) if _RTA_PRIORITY in found else 0,
        onlink=bool(flags & _ONLINK),
        table=_u32(found[_RTA_TABLE]) if _RTA_TABLE in found else table,
        type=kind,
        mtu=_u32(metrics[_RTAX_MTU]) if _RTAX_MTU in metrics else 0,
    )
