"""Links, addresses, routes and rules as rtnetlink tells of them, in dumps and in events. Pure."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from kilo_etcd.kernel import formats
from kilo_etcd.kernel.codec import Reader
from kilo_etcd.kernel.formats import fibmsg, ifaddrmsg, ifinfmsg, ndmsg, netconfmsg, rtmsg, rtnl
from kilo_etcd.kernel.rules import RoutingRule
from kilo_etcd.kernel.state import FENCE_METRIC, ROUTE_PROTOCOL, AddressScope, HostAddress, Link, Route
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
_TO_TABLE = formats.rules.FR_ACT_NAMES["FR_ACT_TO_TBL"]
UNICAST, _UNREACHABLE = rtnl.rt_type["unicast"], rtnl.rt_type["unreachable"]
_KIND_NAMES = {UNICAST: "", _UNREACHABLE: "unreachable", rtnl.rt_type["throw"]: "throw"}
_SCOPES = {rtnl.rt_scope["link"]: AddressScope.LINK, rtnl.rt_scope["host"]: AddressScope.HOST}
_VERSIONS = {int(socket.AF_INET): 4, int(socket.AF_INET6): 6}
_states = formats.neighbours
_RESOLVED = _states.NUD_REACHABLE | _states.NUD_STALE | _states.NUD_DELAY | _states.NUD_PROBE | _states.NUD_PERMANENT
"""States of a neighbour whose link-layer address is known."""
_NOT_SUPPRESSED = formats.FRA_SUPPRESS_NOTHING

_links = Reader(ifinfmsg, "IFLA_IFNAME", "IFLA_MTU", "IFLA_LINKINFO")
_link_info = Reader(ifinfmsg.ifinfo, "IFLA_INFO_KIND", "IFLA_INFO_DATA")
_ipip = Reader(ifinfmsg.ifinfo.ipip_data, "IFLA_IPIP_LOCAL")
_addresses = Reader(ifaddrmsg, "IFA_LOCAL", "IFA_ADDRESS", "IFA_FLAGS")
_routes = Reader(
    rtmsg, "RTA_DST", "RTA_GATEWAY", "RTA_VIA", "RTA_OIF", "RTA_PREFSRC", "RTA_PRIORITY", "RTA_TABLE", "RTA_METRICS"
)  # fmt: skip
_metrics = Reader(rtmsg.metrics, "RTAX_MTU")
_rules = Reader(
    fibmsg, "FRA_SRC", "FRA_PRIORITY", "FRA_TABLE", "FRA_FWMARK", "FRA_SUPPRESS_PREFIXLEN", "FRA_PROTOCOL"
)  # fmt: skip
_settings = Reader(netconfmsg, "NETCONFA_IFINDEX", "NETCONFA_FORWARDING")
_neighbours = Reader(ndmsg, "NDA_DST", "NDA_LLADDR")
_number, _signed = struct.Struct("=I"), struct.Struct("=i")
_unpack, _ZERO = _number.unpack_from, bytes(4)


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
    link: Link
    local: IPAddress | None = None
    """Of a tunnel: the address that it sends from."""


def read_link(body: bytes) -> FoundLink:
    found = _links(body)
    info = _link_info(found["IFLA_LINKINFO"]) if "IFLA_LINKINFO" in found else {}
    kind = _text(info.get("IFLA_INFO_KIND"))
    local: IPAddress | None = None
    if kind == "ipip" and "IFLA_INFO_DATA" in info:
        packed = _ipip(info["IFLA_INFO_DATA"]).get("IFLA_IPIP_LOCAL", b"")
        local = _ip(packed) if len(packed) == 4 and any(packed) else None
    link = Link(
        name=_text(found.get("IFLA_IFNAME")), index=found["index"], kind=kind, up=bool(found["flags"] & _UP),
        mtu=_u32(found, "IFLA_MTU"),
    )  # fmt: skip
    return FoundLink(link=link, local=local)


def read_neighbour(body: bytes) -> IPAddress | None:
    """The address of a neighbour on a link, if it has answered there."""
    found = _neighbours(body)
    answered = found["state"] & _RESOLVED and any(found.get("NDA_LLADDR", b""))
    return _ip(found["NDA_DST"]) if answered and "NDA_DST" in found else None


def read_address(body: bytes, links: Mapping[int, Link]) -> HostAddress | None:
    """None for an address that is neither IPv4 nor IPv6."""
    found = _addresses(body)
    family, index = found["family"], found["index"]
    packed = found.get("IFA_LOCAL") or found.get("IFA_ADDRESS")
    if family not in _VERSIONS or packed is None:
        return None
    flags = _u32(found, "IFA_FLAGS", found["flags"])
    link = links.get(index)
    return HostAddress(
        interface=link.name if link else "",
        index=index,
        address=ipaddress.ip_interface((_ip(packed), found["prefixlen"])),
        scope=_SCOPES.get(found["scope"], AddressScope.GLOBAL),
        deprecated=bool(flags & _DEPRECATED),
        # In IPv4 the same bit says that the address is not the first one of its network.
        temporary=family == socket.AF_INET6 and bool(flags & _TEMPORARY),
        kind=link.kind if link else "",
        up=link.up if link else True,
    )


def read_route(body: bytes) -> FoundRoute | None:
    """None for what is no route of the tables (cached clones, other families)."""
    found = _routes(body)
    family, flags, get = found["family"], found["flags"], found.get
    if flags & formats.RTM_F_CLONED or family not in _VERSIONS:
        return None
    destination: IPNetwork
    if family == socket.AF_INET:
        destination = ipaddress.IPv4Network((get("RTA_DST", bytes(4)), found["dst_len"]), strict=False)
    else:
        destination = ipaddress.IPv6Network((get("RTA_DST", bytes(16)), found["dst_len"]), strict=False)
    gateway = source = None
    if (packed := get("RTA_GATEWAY")) is not None:
        gateway = _ip(packed)
    elif (packed := get("RTA_VIA")) is not None:
        gateway = _ip(packed[2:])
    if (packed := get("RTA_PREFSRC")) is not None:
        source = _ip(packed)
    return FoundRoute(
        destination=destination,
        gateway=gateway,
        index=_unpack(get("RTA_OIF", _ZERO))[0],
        source=source,
        protocol=found["proto"],
        metric=_unpack(get("RTA_PRIORITY", _ZERO))[0],
        onlink=bool(flags & _ONLINK),
        table=_u32(found, "RTA_TABLE", found["table"]),
        type=found["type"],
        mtu=_mtu(found) if "RTA_METRICS" in found else 0,
    )


def read_way(body: bytes) -> tuple[int, int]:
    """Of the answer to `get_route_to`: the index of the device, and the route's own MTU; 0 for what it does not say."""
    found = _routes(body)
    return _u32(found, "RTA_OIF"), _mtu(found)


def _mtu(found: Mapping[str, Any]) -> int:
    return _u32(_metrics(found["RTA_METRICS"]), "RTAX_MTU") if "RTA_METRICS" in found else 0


def read_rule(body: bytes) -> tuple[RoutingRule, int] | None:
    """A rule, and the protocol that it is marked with; None for what says more than our rules ever do."""
    found = _rules(body)
    family = found["family"]
    if family not in _VERSIONS or found["action"] != _TO_TABLE or found["dst_len"]:
        return None
    address = _ip(found["FRA_SRC"]) if "FRA_SRC" in found else None
    if found["src_len"] != (0 if address is None else address.max_prefixlen):
        return None
    mark = _u32(found, "FRA_FWMARK")
    if bool(mark) is not bool(found["flags"] & formats.FIB_RULE_INVERT):
        return None
    suppressed = _u32(found, "FRA_SUPPRESS_PREFIXLEN", _NOT_SUPPRESSED)
    rule = RoutingRule(
        version=_VERSIONS[family],
        priority=_u32(found, "FRA_PRIORITY"),
        table=_u32(found, "FRA_TABLE", found["table"]),
        not_mark=mark,
        source=address,
        suppress=None if suppressed == _NOT_SUPPRESSED else suppressed,
    )
    return rule, found.get("FRA_PROTOCOL", b"\0")[0]


def read_forwarding(body: bytes) -> tuple[int, bool] | None:
    """Family (4, 6) and whether it is forwarded, of an event on the settings of all interfaces."""
    found = _settings(body)
    family = found["family"]
    if family not in _VERSIONS or "NETCONFA_FORWARDING" not in found:
        return None
    index = _signed.unpack(found.get("NETCONFA_IFINDEX", bytes(4)))[0]
    value = _signed.unpack(found["NETCONFA_FORWARDING"])[0]
    return (_VERSIONS[family], bool(value)) if index == formats.NETCONFA_IFINDEX_ALL else None


def _ip(data: bytes) -> IPAddress:
    return ipaddress.IPv4Address(data) if len(data) == 4 else ipaddress.IPv6Address(data)


def _u32(found: Mapping[str, Any], name: str, default: int = 0) -> int:
    value: int = _number.unpack_from(found[name])[0] if name in found else default
    return value


def _text(data: bytes | None) -> str:
    return (data or b"").rstrip(b"\0").decode(errors="replace")
