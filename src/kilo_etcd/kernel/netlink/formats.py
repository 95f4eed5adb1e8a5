"""pyroute2's message classes, and nothing else of pyroute2.

The classes define every netlink format that is packed or read here. `import pyroute2` as a whole loads asyncio, NDB,
DHCP and more: ten times the memory and six times the time of the classes alone. So the classes are loaded under a bare
package of that name, with empty classes in place of its sockets; afterwards `sys.modules` is as if nothing had been
loaded, so that a program may still import the whole of pyroute2. `tests/kernel/test_kernel_formats.py` fails if
a new pyroute2 changes what this relies on.

What pyroute2 lacks, or packs in another way than the kernel has it, is declared at the end, as subclasses of its own.
The numbers among it are the kernel's, each with the header that has it: pyroute2 0.9's classes have none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from struct import Struct, calcsize
from types import ModuleType
from typing import Any

_PACKAGE = "pyroute2"
_STANDINS = {
    f"{_PACKAGE}.netlink.nlsocket": ("AsyncNetlinkSocket", "NetlinkSocket"),
    "multiprocessing": ("Pipe", "Queue", "Process"),
}
"""Modules that the classes' modules import and never use for messages, with the names that they take from them."""


@contextmanager
def _classes_alone() -> Iterator[None]:
    """pyroute2 without its `__init__` and without its sockets, for as long as the block runs."""
    if _PACKAGE in sys.modules:
        # The program has all of it already, which serves as well.
        yield
        return
    spec = find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {_PACKAGE!r}", name=_PACKAGE)
    package = ModuleType(_PACKAGE)
    package.__path__ = list(spec.submodule_search_locations)
    standins = {name: ModuleType(name) for name in _STANDINS if name not in sys.modules}
    for name, module in standins.items():
        for attribute in _STANDINS[name]:
            setattr(module, attribute, type(attribute, (), {}))
    sys.modules.update({_PACKAGE: package, **standins})
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE or name in standins]:
            del sys.modules[name]


with _classes_alone():
    _core = import_module("pyroute2.netlink")
    _rtnl = import_module("pyroute2.netlink.rtnl")
    _route = import_module("pyroute2.netlink.rtnl.rtmsg")
    _address = import_module("pyroute2.netlink.rtnl.ifaddrmsg")
    _rule = import_module("pyroute2.netlink.rtnl.fibmsg")
    _link = import_module("pyroute2.netlink.rtnl.ifinfmsg")
    _neighbour = import_module("pyroute2.netlink.rtnl.ndmsg")
    _wireguard = import_module("pyroute2.netlink.generic.wireguard")
    _nfnetlink = import_module("pyroute2.netlink.nfnetlink")
    _nft = import_module("pyroute2.netlink.nfnetlink.nftsocket")

nlmsg, nla, ctrlmsg, nlmsgerr = _core.nlmsg, _core.nla, _core.ctrlmsg, _core.nlmsgerr
rtmsg, ifaddrmsg, ifinfmsg = _route.rtmsg, _address.ifaddrmsg, _link.ifinfmsg
ndmsg, nh = _neighbour.ndmsg, _route.nh

core: Any = _core
"""Flags and types of netlink itself."""
rtnl: Any = _rtnl
"""Types and multicast groups of rtnetlink, kinds and scopes of routes."""
wg: Any = _wireguard
"""Commands and flags of WireGuard."""
nfgen_msg = _nfnetlink.nfgen_msg
nfnetlink: Any = _nfnetlink
nft: Any = _nft
"""Messages, commands and expressions of nftables."""
routes: Any = _route
"""Flags of routes."""
addresses: Any = _address
"""Flags of addresses."""
rules: Any = _rule
links: Any = _link
"""Flags of links."""
neighbours: Any = _neighbour
"""States of neighbours."""


def _number(kind: Any) -> Struct:
    ((_, form),) = kind.fields
    return Struct(form if form[0] in "<>!" else f"={form}")


U16, U32, I32, BE32 = map(_number, (nla.uint16, nla.uint32, nla.int32, nla.sbe32))
"""Numbers in the machine's byte order, and one in the network's, which netfilter uses."""


class netconfmsg(nlmsg):  # type: ignore[misc, valid-type]
    """Settings of interfaces (linux/netconf.h), which pyroute2 0.9 lacks."""

    fields = (("family", "B"), ("__align", "3x"))
    nla_map = (
        ("NETCONFA_UNSPEC", "none"),
        ("NETCONFA_IFINDEX", "int32"),
        ("NETCONFA_FORWARDING", "int32"),
        ("NETCONFA_RP_FILTER", "int32"),
    )


NETCONFA_IFINDEX_ALL = -1
"""The setting of all interfaces, and of those that are still to come (linux/netconf.h)."""
LOOPBACK_IFINDEX = 1
"""Index of `lo` in every network namespace (net/flow.h)."""
RT_TABLE_MAIN = 254
"""The table of routes that is asked if no rule says otherwise (linux/rtnetlink.h)."""
RT_TABLE_DEFAULT = 253
"""The table that is asked last, empty on most hosts (linux/rtnetlink.h)."""
RT_TABLE_LOCAL = 255
"""The table of the host's own addresses, which is asked first (linux/rtnetlink.h)."""
RTM_F_CLONED = 0x200
RTM_F_LOOKUP_TABLE = 0x1000
"""A cached copy of a route (linux/rtnetlink.h)."""
RTM_F_FIB_MATCH = 0x2000
"""The answer is to be the route of the table, with all next hops, not the path that one packet takes
(linux/rtnetlink.h). Kernels before 4.13 (IPv4) and 4.14 (IPv6) do not know it, and answer with the path."""
FIB_RULE_INVERT = 0x2
"""The rule takes what it does not match (linux/fib_rules.h)."""
FRA_SUPPRESS_NOTHING = 0xFFFFFFFF
"""FRA_SUPPRESS_PREFIXLEN of a rule that suppresses nothing (-1 in net/core/fib_rules.c)."""
NETLINK_CAP_ACK = 10
"""A refusal does not quote the whole request (linux/netlink.h)."""
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
"""Buffers beyond the host's limit, for who may (asm-generic/socket.h)."""
UCRED = Struct("=iII")
"""Process, user and group at the other end of a unix socket: struct ucred (linux/socket.h)."""
IFNAMSIZ = 16
"""Bytes of an interface's name, with the NUL behind it (linux/if.h)."""


class fibmsg(_rule.fibmsg):  # type: ignore[misc, name-defined]
    """A rule of policy routing. Linux 6.15 and later add the masks of its ports (linux/fib_rules.h), which pyroute2 0.9
    lacks."""

    # Not the tables that the class above may have made of its own attributes.
    _nlmsg_base__compiled_nla = False

    nla_map = (*_rule.fibmsg.nla_map, (28, "FRA_SPORT_MASK", "uint16"), (29, "FRA_DPORT_MASK", "uint16"))


class routemsg(_route.rtmsg):  # type: ignore[misc, name-defined]
    """A route as the kernel tells it: it may name a nexthop object (linux/rtnetlink.h), which pyroute2 0.9 lacks."""

    # Not the tables that the class above may have made of its own attributes.
    _nlmsg_base__compiled_nla = False

    nla_map = (*_route.rtmsg.nla_map, (30, "RTA_NH_ID", "uint32"))


class nexthopmsg(nlmsg):  # type: ignore[misc, valid-type]
    """A nexthop object (linux/nexthop.h), which pyroute2 0.9 lacks."""

    fields = (("family", "B"), ("scope", "B"), ("protocol", "B"), ("reserved", "B"), ("flags", "I"))
    nla_map = (
        ("NHA_UNSPEC", "none"),
        ("NHA_ID", "uint32"),
        ("NHA_GROUP", "hex"),
        ("NHA_GROUP_TYPE", "uint16"),
        ("NHA_BLACKHOLE", "flag"),
        ("NHA_OIF", "uint32"),
        ("NHA_GATEWAY", "hex"),
    )


RTM_GETNEXTHOP = 106
"""Asks for nexthop objects (linux/rtnetlink.h)."""
NEXTHOP_GROUP = Struct("=IBBH")
"""A member of a group: its number, and its weight less one (linux/nexthop.h)."""


class nft_obj_msg(nfgen_msg):  # type: ignore[misc, valid-type]
    """A named object of a table, such as a counter (linux/netfilter/nf_tables.h), which pyroute2 0.9 lacks."""

    prefix = "NFTA_OBJ_"
    nla_map = (
        ("NFTA_OBJ_UNSPEC", "none"),
        ("NFTA_OBJ_TABLE", "asciiz"),
        ("NFTA_OBJ_NAME", "asciiz"),
        ("NFTA_OBJ_TYPE", "be32"),
        ("NFTA_OBJ_DATA", "counter"),
    )

    class counter(nla):  # type: ignore[misc, valid-type]
        """The counts of a named counter."""

        nla_map = (("NFTA_COUNTER_UNSPEC", "none"), ("NFTA_COUNTER_BYTES", "be64"), ("NFTA_COUNTER_PACKETS", "be64"))


NFT_OBJECT_COUNTER = 1
"""The type of an object that counts (linux/netfilter/nf_tables.h)."""
NFT_OBJECTS_THAT_MATCH = (NFT_OBJECT_COUNTER, 3, 7, 8, 9)
"""Types of objects that match every packet: besides the counter those that set a connection's helper, timeout, secmark
or expectation."""
NFT_SET_ELEM_CATCHALL = 2
"""The flag of a set's element that is all keys which no other element is."""
NFTNL_UDATA_RULE_COMMENT = 0
"""A comment within the userdata of a rule (libnftnl/udata.h)."""
NF_CT_STATE_NEW = 8
"""The bit of new packets, in nftables' ct state and in xtables' conntrack alike (nf_conntrack_common.h)."""
NF_CT_STATE_UNTRACKED = 64
"""The bit of packets that are not tracked: in nftables' ct state, and in the older of xtables' two matches, `state`."""
XT_CONNTRACK_STATE_UNTRACKED = 256
"""The bit of such packets in xtables' newer match, `conntrack` (xt_conntrack.h)."""
XT_CONNTRACK_STATE_DNAT = 128
"""The bit of connections whose destination is translated, there."""
XT_CONNTRACK_REVISION = 3
"""The newest form of the match (net/netfilter/xt_conntrack.c)."""
XT_CONNTRACK3 = Struct("=148xHHH")
"""match_flags, invert_flags and state_mask in struct xt_conntrack_mtinfo3 (linux/netfilter/xt_conntrack.h)."""
XT_CONNTRACK_STATE = 1
"""The match is one of states, and of nothing else."""
XT_ADDRTYPE0, XT_ADDRTYPE1 = Struct("=HHII"), Struct("=HHI")
"""Both forms of xtables' match of the type of an address, by their numbers: the types of the source and of the
destination, each a bit, and of the second the flags (linux/netfilter/xt_addrtype.h)."""
XT_ADDRTYPE_INVERT_DEST = 2
IP_CT_DIR_REPLY = 1
"""Direction of packets that the other side of a connection sends (linux/netfilter/nf_conntrack_tuple_common.h)."""
PORT_RANGE = Struct("=HH")
"""struct fib_rule_port_range: the first and the last (linux/fib_rules.h)."""
NFTA_FIB_F_SADDR, NFTA_FIB_F_DADDR, NFTA_FIB_F_IIF, NFTA_FIB_F_PRESENT = 1, 2, 8, 32
"""Bits, which pyroute2 0.9 takes for numbers (linux/netfilter/nf_tables.h)."""
IPPROTO_FRAGMENT, TCPOPT_MAXSEG = 44, 2
"""IANA's numbers: IPv6's fragment header, TCP's option with the largest segment."""
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
"""What stands around messages that are done all or none (linux/netfilter/nfnetlink.h)."""
NF_INET_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
"""Numbers of the places at which base chains are hooked in (linux/netfilter.h)."""
NF_INET_INGRESS = 5
NF_NETDEV_HOOKS = {"ingress": 0, "egress": 1}
"""Those of single devices, in a table of family inet and in one of family netdev."""
NF_PRIORITIES = {"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "srcnat": 100}
"""Order of base chains at one hook, by their names in nft(8) (linux/netfilter_ipv4.h)."""


SO_ATTACH_FILTER = 26
"""The option by which a socket gets a filter (asm-generic/socket.h)."""
SOCK_FILTER, SOCK_FPROG = Struct("=HBBI"), Struct("@HP")
"""A step of a filter, and the filter: the number of its steps and where they are (linux/filter.h)."""
BPF_LOAD_WORD, BPF_LOAD_HALF, BPF_IF_EQUAL, BPF_RETURN = 0x20, 0x28, 0x15, 0x06
"""BPF_LD|BPF_W|BPF_ABS, BPF_LD|BPF_H|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K and BPF_RET|BPF_K (linux/bpf_common.h)."""


class refusal(nlmsg):  # type: ignore[misc, valid-type]
    """An acknowledgement with the header of its request and the kernel's reason (NETLINK_CAP_ACK, NETLINK_EXT_ACK);
    pyroute2's nlmsgerr has no place for the header."""

    fields = (("error", "i"), *((f"request_{name}", form) for name, form in nlmsg.header))
    nla_map = _core.nlmsgerr.nla_map


class wgmsg(_wireguard.wgmsg):  # type: ignore[misc, name-defined]
    """WireGuard's message. pyroute2 0.9 packs the scope of an IPv6 endpoint big-endian; the kernel has sin6_scope_id in
    its own byte order (linux/in6.h). To be reported there."""

    # Not the tables that the class above may have made of its own attributes.
    _nlmsg_base__compiled_nla = False

    class wgdevice_peer(_wireguard.wgmsg.wgdevice_peer):  # type: ignore[misc, name-defined]
        """A peer, with an IPv6 endpoint as corrected here."""

        _nlmsg_base__compiled_nla = False

        class endpoint_ipv6(_wireguard.wgmsg.wgdevice_peer.endpoint_ipv6):  # type: ignore[misc, name-defined]
            """An IPv6 endpoint whose scope is in the machine's own byte order."""

            fields = (("family", "H"), ("port", ">H"), ("flowinfo", ">I"), ("addr", "16s"), ("scope_id", "I"))


def _sockaddr(kind: Any) -> Struct:
    """A socket address: fields in the network's byte order are numbers, those in the machine's own are bytes."""
    forms = (
        form.lstrip(">!") if form[0] in ">!" or form[-1] in "sx" else f"{calcsize(f'={form}')}s"
        for _, form in kind.fields
    )
    return Struct("!" + "".join(forms))


SOCKADDR_IN = _sockaddr(wgmsg.wgdevice_peer.endpoint_ipv4)
"""Family, port, address."""
SOCKADDR_IN6 = _sockaddr(wgmsg.wgdevice_peer.endpoint_ipv6)
"""Family, port, flow, address, scope."""
