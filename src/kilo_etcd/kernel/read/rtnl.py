"""Links, addresses, routes and rules as rtnetlink tells of them, in dumps and in events. Pure."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

from attrs import frozen

from kilo_etcd.kernel.netlink import formats
from kilo_etcd.kernel.netlink.codec import FormatError, Reader, cells, read
from kilo_etcd.kernel.netlink.formats import (
    PORT_RANGE,
    fibmsg,
    ifaddrmsg,
    ifinfmsg,
    ndmsg,
    netconfmsg,
    nexthopmsg,
    nh,
    routemsg,
    rtmsg,
    rtnl,
)  # fmt: skip
from kilo_etcd.kernel.routing.rules import ForeignRule, RoutingRule
from kilo_etcd.kernel.state import ROUTE_PROTOCOL, UNREACHABLE_METRIC, AddressScope, HostAddress, Link, Route
from kilo_etcd.model import IPAddress, IPNetwork

NEWLINK, DELLINK = rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK
NEWADDR, DELADDR = rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR
NEWROUTE, DELROUTE = rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE
NEWRULE, DELRULE = rtnl.RTM_NEWRULE, rtnl.RTM_DELRULE
NEWNETCONF = rtnl.RTM_NEWNETCONF

GROUPS = (
    rtnl.RTNLGRP_LINK,
    rtnl.RTNLGRP_IPV4_IFADDR, rtnl.RTNLGRP_IPV6_IFADDR,
    rtnl.RTNLGRP_IPV4_ROUTE, rtnl.RTNLGRP_IPV6_ROUTE,
    rtnl.RTNLGRP_IPV4_RULE, rtnl.RTNLGRP_IPV6_RULE,
    rtnl.RTNLGRP_IPV4_NETCONF, rtnl.RTNLGRP_IPV6_NETCONF,
)  # fmt: skip
"""The multicast groups whose events are read here."""

_UP = formats.links.IFF_UP
_TEMPORARY, _DEPRECATED = formats.addresses.IFA_F_TEMPORARY, formats.addresses.IFA_F_DEPRECATED
_ONLINK = formats.routes.RTNH_F_ONLINK
_TO_TABLE, _GOTO = (formats.rules.FR_ACT_NAMES[name] for name in ("FR_ACT_TO_TBL", "FR_ACT_GOTO"))
_REFUSING = {
    formats.rules.FR_ACT_NAMES[f"FR_ACT_{word.upper()}"]: word for word in ("blackhole", "unreachable", "prohibit")
}
"""The actions of rules that refuse packets, by number -> their names in ip-rule(8)."""
UNICAST, _UNREACHABLE = rtnl.rt_type["unicast"], rtnl.rt_type["unreachable"]
_KIND_NAMES = {UNICAST: "", _UNREACHABLE: "unreachable", rtnl.rt_type["throw"]: "throw"}
_SCOPES = {rtnl.rt_scope["link"]: AddressScope.LINK, rtnl.rt_scope["host"]: AddressScope.HOST}
_IPV4, _IPV6 = int(socket.AF_INET), int(socket.AF_INET6)
_VERSIONS = {_IPV4: 4, _IPV6: 6}
_ANYWHERE4, _ANYWHERE6 = bytes(4), bytes(16)
_states = formats.neighbours
_RESOLVED = _states.NUD_REACHABLE | _states.NUD_STALE | _states.NUD_DELAY | _states.NUD_PROBE | _states.NUD_PERMANENT
"""States of a neighbour whose link-layer address is known."""
_NOT_SUPPRESSED = formats.FRA_SUPPRESS_NOTHING
_WHOLE_MARK, _WHOLE_PORT = 0xFFFFFFFF, 0xFFFF
"""Masks of a rule that looks at all bits of a mark, and of a port."""

_links = Reader(ifinfmsg, "index", "flags", "IFLA_IFNAME", "IFLA_MTU", "IFLA_LINKINFO")
_link_info = Reader(ifinfmsg.ifinfo, "IFLA_INFO_KIND", "IFLA_INFO_DATA")
_ipip = Reader(ifinfmsg.ifinfo.ipip_data, "IFLA_IPIP_LOCAL")
_addresses = Reader(
    ifaddrmsg, "family", "prefixlen", "flags", "scope", "index", "IFA_LOCAL", "IFA_ADDRESS", "IFA_FLAGS"
)  # fmt: skip
_routes = Reader(
    routemsg, "family", "dst_len", "table", "proto", "type", "flags",
    "RTA_DST", "RTA_GATEWAY", "RTA_VIA", "RTA_OIF", "RTA_PREFSRC", "RTA_PRIORITY", "RTA_TABLE", "RTA_METRICS",
    "RTA_MULTIPATH", "RTA_NH_ID",
)  # fmt: skip
_next_hops = Reader(nh, "oif", "RTA_GATEWAY", "RTA_VIA")
_ways = Reader(rtmsg, "RTA_OIF", "RTA_METRICS")
_whole_routes = Reader(
    routemsg, "family", "dst_len", "RTA_OIF", "RTA_PRIORITY", "RTA_METRICS", "RTA_MULTIPATH", "RTA_NH_ID"
)
_nexthops = Reader(nexthopmsg, "family", "NHA_ID", "NHA_GROUP", "NHA_OIF", "NHA_GATEWAY")
_metrics = Reader(rtmsg.metrics, "RTAX_MTU")
_RULE_ATTRIBUTES = (
    "FRA_DST", "FRA_SRC", "FRA_IIFNAME", "FRA_PRIORITY", "FRA_TABLE", "FRA_FWMARK", "FRA_FWMASK",
    "FRA_SUPPRESS_PREFIXLEN", "FRA_PROTOCOL", "FRA_IP_PROTO", "FRA_SPORT_RANGE", "FRA_DPORT_RANGE",
    "FRA_SPORT_MASK", "FRA_DPORT_MASK",
)  # fmt: skip
"""All that a rule of ours may have, and that the kernel adds to it. A rule with another attribute is somebody else's:
it selects fewer packets, or does something else with them."""
_rules = Reader(fibmsg, "family", "dst_len", "src_len", "tos", "table", "action", "flags", *_RULE_ATTRIBUTES)
_others_rules = Reader(
    fibmsg, "family", "dst_len", "src_len", "tos", "table", "action", "flags",
    "FRA_DST", "FRA_SRC", "FRA_IIFNAME", "FRA_OIFNAME", "FRA_PRIORITY", "FRA_TABLE", "FRA_GOTO", "FRA_FWMARK",
    "FRA_SUPPRESS_PREFIXLEN", "FRA_IP_PROTO", "FRA_UID_RANGE", "FRA_TUN_ID", "FRA_SPORT_RANGE", "FRA_DPORT_RANGE",
    "FRA_SPORT_MASK", "FRA_DPORT_MASK",
)  # fmt: skip
_settings = Reader(netconfmsg, "family", "NETCONFA_IFINDEX", "NETCONFA_FORWARDING", "NETCONFA_RP_FILTER")
_neighbours = Reader(ndmsg, "state", "NDA_DST", "NDA_LLADDR")


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
    several: tuple[tuple[int, IPAddress | None], ...] = ()
    """Device's index and gateway of each next hop, if there are several; `index` and `gateway` are empty then."""
    object: int = 0
    """The number of the nexthop object that it names (`kernel.routing.nexthops`)."""

    @property
    def next_hops(self) -> tuple[tuple[int, IPAddress | None], ...]:
        """Device's index and gateway of each next hop."""
        return self.several or ((self.index, self.gateway),)

    @property
    def unreachable(self) -> bool:
        """Whether it is one of ours that refuses packets for the mesh."""
        return self.last_resort and self.protocol == ROUTE_PROTOCOL

    @property
    def last_resort(self) -> bool:
        """Whether it refuses packets that no other route of its table takes."""
        return (self.type, self.metric) == (_UNREACHABLE, UNREACHABLE_METRIC)

    def route(self, names: Mapping[int, str]) -> Route:
        """The same as a `Route`. `names` maps indexes of devices to their names."""
        return Route(
            destination=self.destination,
            gateway=self.gateway,
            # In IPv6 the kernel gives routes that lead nowhere the loopback device.
            device=names.get(self.index, "") if self.type == UNICAST else "",
            source=self.source,
            protocol=self.protocol,
            metric=self.metric,
            onlink=self.onlink,
            table=self.table,
            kind=_KIND_NAMES.get(self.type, ""),
        )


@frozen(kw_only=True)
class FoundLink:
    """A device as the kernel reports it, with what only tunnels have."""

    link: Link
    local: IPAddress | None = None
    """Of a tunnel: the address that it sends from."""


def read_link(body: bytes) -> FoundLink:
    """The device that a message of rtnetlink is about."""
    index, flags, name, mtu, info = _links.row(body)
    packed_kind, data = (None, None) if info is None else _link_info.row(info)
    kind = _text(packed_kind)
    local: IPAddress | None = None
    if kind == "ipip" and data is not None:
        (packed,) = _ipip.row(data)
        local = _ip(packed) if packed is not None and len(packed) == 4 and any(packed) else None
    link = Link(name=_text(name), index=index, kind=kind, up=bool(flags & _UP), mtu=mtu or 0)
    return FoundLink(link=link, local=local)


def read_neighbour(body: bytes) -> IPAddress | None:
    """The address of a neighbour on a link, if it has answered there."""
    state, address, link_layer = _neighbours.row(body)
    answered = state & _RESOLVED and any(link_layer or b"")
    return _ip(address) if answered and address is not None else None


def read_address(body: bytes, links: Mapping[int, Link]) -> HostAddress | None:
    """None for an address that is neither IPv4 nor IPv6."""
    family, length, few_flags, scope, index, local, address, more_flags = _addresses.row(body)
    packed = local or address
    if family not in _VERSIONS or packed is None:
        return None
    flags = few_flags if more_flags is None else more_flags
    link = links.get(index)
    return HostAddress(
        interface=link.name if link else "",
        index=index,
        address=ipaddress.ip_interface((_ip(packed), length)),
        scope=_SCOPES.get(scope, AddressScope.GLOBAL),
        deprecated=bool(flags & _DEPRECATED),
        # In IPv4 the same bit says that the address is not the first one of its network.
        temporary=family == _IPV6 and bool(flags & _TEMPORARY),
        kind=link.kind if link else "",
        up=link.up if link else True,
    )


def read_route(body: bytes) -> FoundRoute | None:
    """None for what is no route of the tables (cached clones, other families)."""
    flags, route = _route(body)
    return None if flags & formats.RTM_F_CLONED else route


def read_taken(body: bytes) -> FoundRoute:
    """The answer to `get_route_between`. FormatError: it is no route of IPv4 or IPv6."""
    _, route = _route(body)
    if route is None:
        raise FormatError
    return route


def _route(body: bytes) -> tuple[int, FoundRoute | None]:
    """The flags, and the route; None for other families."""
    (
        family, length, low_table, protocol, kind, flags, target, gateway, via, index, source, metric, table, metrics,
        several, nexthop,
    ) = _routes.row(body)  # fmt: skip
    if family not in _VERSIONS:
        return flags, None
    destination: IPNetwork
    if family == _IPV4:
        destination = ipaddress.IPv4Network((_ANYWHERE4 if target is None else target, length), strict=False)
    else:
        destination = ipaddress.IPv6Network((_ANYWHERE6 if target is None else target, length), strict=False)
    return flags, FoundRoute(
        destination=destination,
        gateway=_gateway(gateway, via),
        index=index or 0,
        source=None if source is None else _ip(source),
        protocol=protocol,
        metric=metric or 0,
        onlink=bool(flags & _ONLINK),
        table=low_table if table is None else table,
        type=kind,
        mtu=0 if metrics is None else _mtu(metrics),
        several=() if several is None else tuple(map(_next_hop, cells(several))),
        object=nexthop or 0,
    )


def _next_hop(body: bytes) -> tuple[int, IPAddress | None]:
    index, gateway, via = _next_hops.row(body)
    return index, _gateway(gateway, via)


def _gateway(gateway: bytes | None, via: bytes | None) -> IPAddress | None:
    """Of IPv4, one in IPv6 stands after its family."""
    if gateway is None and via is not None:
        gateway = via[formats.U16.size :]
    return None if gateway is None else _ip(gateway)


def read_way(body: bytes) -> tuple[int, int]:
    """Of the answer to `get_route_to`: the index of the device, and the route's own MTU; 0 for what it does not say."""
    index, metrics = _ways.row(body)
    return index or 0, 0 if metrics is None else _mtu(metrics)


@frozen
class WholeRoute:
    """The route that an address is reached by, as far as the MTU depends on it."""

    default: int | None
    """Of a default route of IPv6: its metric. Routes of several routers may have the same."""
    devices: tuple[int, ...]
    """The index of each next hop's device."""
    mtu: int
    """The route's own; 0: it has none."""
    object: int
    """The number of the nexthop object that it names, or 0."""


def read_whole_route(body: bytes) -> WholeRoute:
    """The answer to `get_route_to` that asks for the whole route."""
    family, length, index, metric, metrics, several, nexthop = _whole_routes.row(body)
    return WholeRoute(
        default=metric or 0 if family == _IPV6 and not length else None,
        devices=(index or 0,) if several is None else tuple(_next_hop(hop)[0] for hop in cells(several)),
        mtu=0 if metrics is None else _mtu(metrics),
        object=nexthop or 0,
    )


@frozen
class FoundNexthop:
    """A nexthop object as the kernel tells it."""

    number: int
    index: int
    """Of its device; 0: it has none."""
    gateway: IPAddress | None
    members: tuple[int, ...]
    """Of a group: the numbers of its members."""


def read_nexthop(body: bytes) -> FoundNexthop:
    """The object that a message of rtnetlink is about."""
    _, number, group, index, gateway = _nexthops.row(body)
    return FoundNexthop(
        number=number or 0,
        index=index or 0,
        gateway=None if gateway is None else _ip(gateway),
        members=() if group is None else tuple(member for member, *_ in formats.NEXTHOP_GROUP.iter_unpack(group)),
    )


def _mtu(metrics: bytes) -> int:
    (mtu,) = _metrics.row(metrics)
    return mtu or 0


def read_rule(body: bytes) -> tuple[RoutingRule, int] | None:
    """A rule, and the protocol that it is marked with; None for what says more than our rules ever do."""
    (
        family, length, source_length, tos, low_table, action, flags,
        to, source, inbound, priority, table, mark, mask, suppressed, protocol, ip_protocol,
        sports, dports, *port_masks,
    ) = _rules.row(body)  # fmt: skip
    if family not in _VERSIONS or action != _TO_TABLE or bool(length) is not bool(to) or tos:
        return None
    if mask != (_WHOLE_MARK if mark else None) or not {None, _WHOLE_PORT}.issuperset(port_masks):
        return None
    if not read(fibmsg, body).keys() <= frozenset(_RULE_ATTRIBUTES):
        return None
    address = None if source is None else _ip(source)
    if source_length != (0 if address is None else address.max_prefixlen):
        return None
    ports = [PORT_RANGE.unpack(packed) if packed is not None else (0, 0) for packed in (sports, dports)]
    if bool(mark) is not bool(flags & formats.FIB_RULE_INVERT) or any(first != last for first, last in ports):
        return None
    rule = RoutingRule(
        version=_VERSIONS[family],
        priority=priority or 0,
        table=low_table if table is None else table,
        not_mark=mark or 0,
        source=address,
        destination=ipaddress.ip_network((to, length), strict=False) if to else None,
        protocol=ip_protocol or 0,
        sport=ports[0][0],
        dport=ports[1][0],
        inbound=_text(inbound),
        suppress=None if suppressed in (None, _NOT_SUPPRESSED) else suppressed,
    )
    return rule, protocol or 0


def read_foreign_rule(body: bytes) -> ForeignRule | None:
    """A rule of anybody's; None: it is of another family, or of a kind that does nothing."""
    (
        family, length, source_length, tos, low_table, action, flags,
        to, source, inbound, outbound, priority, table, goto, mark, suppressed, protocol, users, tunnel,
        sports, dports, *port_masks,
    ) = _others_rules.row(body)  # fmt: skip
    if family not in _VERSIONS or action not in (_TO_TABLE, _GOTO, *_REFUSING):
        return None
    return ForeignRule(
        version=_VERSIONS[family],
        priority=priority or 0,
        table=0 if action != _TO_TABLE else low_table if table is None else table,
        refuses=_REFUSING.get(action, ""),
        goto=goto or 0 if action == _GOTO else 0,
        source=ipaddress.ip_network((source, source_length), strict=False) if source else None,
        destination=ipaddress.ip_network((to, length), strict=False) if to else None,
        protocol=protocol or 0,
        sports=None if sports is None else PORT_RANGE.unpack(sports),
        dports=None if dports is None else PORT_RANGE.unpack(dports),
        suppress=None if suppressed in (None, _NOT_SUPPRESSED) else suppressed,
        picks=bool(
            mark or tos or outbound or users or tunnel or _text(inbound) not in ("", "lo")
            or not {None, _WHOLE_PORT}.issuperset(port_masks) or flags & formats.FIB_RULE_INVERT
        ),
    )  # fmt: skip


def read_forwarding(body: bytes) -> tuple[int, bool] | None:
    """Family (4, 6) and whether it is forwarded, of an event on the settings of all interfaces."""
    family, index, value, _ = _settings.row(body)
    if family not in _VERSIONS or value is None or index != formats.NETCONFA_IFINDEX_ALL:
        return None
    return _VERSIONS[family], bool(value)


EVERY = formats.NETCONFA_IFINDEX_ALL
"""What stands for all interfaces instead of an index."""


def read_strict(body: bytes) -> int | None:
    """Index of the interface (or `EVERY`) of an event that says that its rp_filter is strict."""
    _, index, _, checks = _settings.row(body)
    return index if checks == 1 else None


def _ip(data: bytes) -> IPAddress:
    return ipaddress.IPv4Address(data) if len(data) == 4 else ipaddress.IPv6Address(data)


def _text(data: bytes | None) -> str:
    return (data or b"").rstrip(b"\0").decode(errors="replace")
