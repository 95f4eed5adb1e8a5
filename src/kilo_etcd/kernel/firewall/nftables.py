"""nftables' expressions as values: the steps of our rules. Pure; the table they make is `firewall`'s.

An expression is its name and those of its attributes that say what it does, by their names in pyroute2 and as bytes.
The kernel returns what it was given with some attributes of its own; reading takes the attributes that are known
(`KNOWN`) and leaves the rest, so that what was read can be compared with what was meant. What is not known here is
read as a name alone, and equals nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network

from kilo_etcd.kernel.firewall.table import Expression
from kilo_etcd.kernel.netlink.formats import (
    BE32,
    IFNAMSIZ,
    IP_CT_DIR_REPLY,
    IPPROTO_FRAGMENT,
    NFT_OBJECT_COUNTER,
    NFTA_FIB_F_DADDR,
    NFTA_FIB_F_IIF,
    NFTA_FIB_F_PRESENT,
    NFTA_FIB_F_SADDR,
    TCPOPT_MAXSEG,
    U32,
    nft,
    rtnl,
)
from kilo_etcd.model import IPAddress, IPNetwork

KNOWN: Mapping[str, tuple[str, ...]] = {
    "meta": ("NFTA_META_DREG", "NFTA_META_KEY", "NFTA_META_SREG"),
    "ct": ("NFTA_CT_DREG", "NFTA_CT_KEY"),
    "payload": ("NFTA_PAYLOAD_DREG", "NFTA_PAYLOAD_BASE", "NFTA_PAYLOAD_OFFSET", "NFTA_PAYLOAD_LEN"),
    "bitwise": (
        "NFTA_BITWISE_SREG", "NFTA_BITWISE_DREG", "NFTA_BITWISE_LEN", "NFTA_BITWISE_MASK", "NFTA_BITWISE_XOR"
    ),
    "cmp": ("NFTA_CMP_SREG", "NFTA_CMP_OP", "NFTA_CMP_DATA"),
    "lookup": ("NFTA_LOOKUP_SET", "NFTA_LOOKUP_SREG", "NFTA_LOOKUP_FLAGS"),
    "objref": ("NFTA_OBJREF_IMM_TYPE", "NFTA_OBJREF_IMM_NAME"),
    "immediate": ("NFTA_IMMEDIATE_DREG", "NFTA_IMMEDIATE_DATA"),
    "masq": ("NFTA_MASQ_FLAGS",),
    "reject": ("NFTA_REJECT_TYPE", "NFTA_REJECT_ICMP_CODE"),
    "fib": ("NFTA_FIB_DREG", "NFTA_FIB_RESULT", "NFTA_FIB_FLAGS"),
    "rt": ("NFTA_RT_DREG", "NFTA_RT_KEY"),
    "byteorder": (
        "NFTA_BYTEORDER_SREG", "NFTA_BYTEORDER_DREG", "NFTA_BYTEORDER_OP", "NFTA_BYTEORDER_LEN", "NFTA_BYTEORDER_SIZE"
    ),
    "exthdr": (
        "NFTA_EXTHDR_DREG", "NFTA_EXTHDR_TYPE", "NFTA_EXTHDR_OFFSET", "NFTA_EXTHDR_LEN", "NFTA_EXTHDR_OP",
        "NFTA_EXTHDR_SREG"
    ),
    "nat": ("NFTA_NAT_TYPE", "NFTA_NAT_FAMILY", "NFTA_NAT_REG_ADDR_MIN"),
}  # fmt: skip
"""Expression -> its attributes that count, in the order of their numbers."""

VALUES = frozenset({"NFTA_CMP_DATA", "NFTA_BITWISE_MASK", "NFTA_BITWISE_XOR", "NFTA_IMMEDIATE_DATA"})
"""Attributes that hold a value within a container, or a verdict's number within two."""
TEXTS = frozenset({"NFTA_LOOKUP_SET", "NFTA_OBJREF_IMM_NAME"})

FAMILY = {4: nft.NFPROTO_IPV4, 6: nft.NFPROTO_IPV6}
_OFFSET = {(4, "saddr"): 12, (4, "daddr"): 16, (6, "saddr"): 8, (6, "daddr"): 24}
"""Bytes into the network header (RFC 791, RFC 8200)."""
ICMP = {4: 1, 6: 58}
"""IANA's number of each family's ICMP."""


def be32(value: int) -> bytes:
    """A number of 32 bits in network byte order, as nftables has nearly all of its numbers."""
    return BE32.pack(value)


def number(names: Mapping[int, str], name: str) -> bytes:
    """What stands for a name in pyroute2's table of them."""
    return be32(next(value for value, candidate in names.items() if candidate == name))


_expressions = nft.nft_rule_msg.nft_expr
_verdicts = _expressions.nft_immediate.nfta_data.verdict.verdict_code.ops
_registers, _keys = _expressions.nft_meta.regs.ops, _expressions.nft_meta.meta_key.ops
_comparisons = _expressions.nft_cmp.ops.ops
_REGISTER, VERDICT_REGISTER = number(_registers, "NFT_REG_1"), number(_registers, "NFT_REG_VERDICT")
NETWORK_HEADER = number(_expressions.nft_payload.base_type.ops, "NFT_PAYLOAD_NETWORK_HEADER")
TRANSPORT_HEADER = number(_expressions.nft_payload.base_type.ops, "NFT_PAYLOAD_TRANSPORT_HEADER")
_COMPARISONS = {True: number(_comparisons, "NFT_CMP_EQ"), False: number(_comparisons, "NFT_CMP_NEQ")}
_AT_LEAST, _AT_MOST = number(_comparisons, "NFT_CMP_GTE"), number(_comparisons, "NFT_CMP_LTE")
_TO_NETWORK = number(_expressions.nft_byteorder.ops.ops, "NFT_BYTEORDER_HTON")
_RESULTS: tuple[str, ...] = _expressions.nft_fib.fib_result.ops
"""Each at its number, although pyroute2 0.9 takes them for bits."""
_INVERTED = 1 << _expressions.nft_lookup.lookup_flags.ops.index("NFT_LOOKUP_F_INV")
_HEADERS = _expressions.nft_exthdr.exthdr_op.ops
ACCEPT_VERDICT = number(_verdicts, "NF_ACCEPT")
_INTERFACE = {"iifname": "NFT_META_IIFNAME", "oifname": "NFT_META_OIFNAME"}


def _expression(name: str, *values: bytes | None) -> Expression:
    """`values`: of the attributes that are known, in their order; None: it has none of that name."""
    return name, tuple(
        (attribute, value) for attribute, value in zip(KNOWN[name], values, strict=True) if value is not None
    )


def _verdict(name: str) -> Expression:
    return _expression("immediate", VERDICT_REGISTER, number(_verdicts, name))


ACCEPT, DROP, RETURN = _verdict("NF_ACCEPT"), _verdict("NF_DROP"), _verdict("NFT_RETURN")
MASQUERADE: Expression = ("masq", ())
REJECT = _expression(
    "reject",
    number(_expressions.nft_reject.types.ops, "NFT_REJECT_ICMPX_UNREACH"),
    number(_expressions.nft_reject.codes.ops, "NFT_REJECT_ICMPX_HOST_UNREACH")[-1:],
)
"""With an ICMP error of the packet's own family: host unreachable."""


def _meta(key: str) -> Expression:
    return _expression("meta", _REGISTER, number(_keys, key), None)


def _compare(value: bytes, equal: bool = True) -> Expression:
    return _expression("cmp", _REGISTER, _COMPARISONS[equal], value)


def _address(version: int, side: str) -> Iterator[Expression]:
    yield from match_family(version)
    length = 4 if version == 4 else 16
    yield _expression("payload", _REGISTER, NETWORK_HEADER, be32(_OFFSET[version, side]), be32(length))


def match_interface(direction: str, name: str, *, equal: bool = True) -> tuple[Expression, ...]:
    """`direction`: `iifname` or `oifname`."""
    return _meta(_INTERFACE[direction]), _compare(name.encode().ljust(IFNAMSIZ, b"\0"), equal)


def match_protocol(number: int) -> tuple[Expression, ...]:
    """Packets of a transport protocol, by IANA's number; IPv6 extension headers before it are skipped."""
    return _meta("NFT_META_L4PROTO"), _compare(bytes([number]))


def match_family(version: int) -> tuple[Expression, ...]:
    """Packets of one address family, 4 or 6, in a table of both."""
    return _meta("NFT_META_NFPROTO"), _compare(bytes([FAMILY[version]]))


def match_answer() -> tuple[Expression, ...]:
    """Packets of a connection that the other side opened. The kernel tracks connections as long as a rule asks."""
    direction = number(_expressions.nft_ct.keys.ops, "NFT_CT_DIRECTION")
    return _expression("ct", _REGISTER, direction), _compare(bytes([IP_CT_DIR_REPLY]))


def match_mark(mark: int) -> tuple[Expression, ...]:
    """Packets that have just this firewall mark."""
    return _meta("NFT_META_MARK"), _compare(U32.pack(mark))


def set_mark(mark: int) -> tuple[Expression, ...]:
    """Gives a packet a firewall mark, in the place of any that it has."""
    value = _expression("immediate", _REGISTER, U32.pack(mark))
    return value, _expression("meta", None, number(_keys, "NFT_META_MARK"), _REGISTER)


def match_address(address: IPAddress, side: str) -> tuple[Expression, ...]:
    """`side`: `saddr` or `daddr`, as everywhere here."""
    return *_address(address.version, side), _compare(address.packed)


def match_network(network: IPNetwork, side: str) -> tuple[Expression, ...]:
    """Packets from (`saddr`) or to (`daddr`) a network."""
    load = tuple(_address(network.version, side))
    compare = _compare(network.network_address.packed)
    if network.prefixlen == network.max_prefixlen:
        return *load, compare
    mask = network.netmask.packed
    return *load, _expression("bitwise", _REGISTER, _REGISTER, be32(len(mask)), mask, bytes(len(mask))), compare


def match_set(name: str, version: int, side: str, *, within: bool = True) -> tuple[Expression, ...]:
    """`within`: whether the address is to be in the set, or outside it."""
    flags = be32(0 if within else _INVERTED)
    return *_address(version, side), _expression("lookup", name.encode() + b"\0", _REGISTER, flags)


def match_some_source() -> tuple[Expression, ...]:
    """IPv4 packets with a source: a host that asks for an address has none."""
    return *_address(4, "saddr"), _compare(bytes(4), equal=False)


def _transport(offset: int, length: int) -> Expression:
    return _expression("payload", _REGISTER, TRANSPORT_HEADER, be32(offset), be32(length))


def match_port(side: str, port: int) -> tuple[Expression, ...]:
    """`side`: `sport` or `dport`; of a protocol that has such ports at the head of its header."""
    return _transport(0 if side == "sport" else 2, 2), _compare(port.to_bytes(2))


def match_ports(sport: int, dport: int) -> tuple[Expression, ...]:
    """Packets with just these two ports, of a protocol that has them at the head of its header."""
    return _transport(0, 4), _compare(sport.to_bytes(2) + dport.to_bytes(2))


def match_tcp_flags(mask: int, flags: int, *, equal: bool = True) -> tuple[Expression, ...]:
    """Of TCP: whether, of the flags in `mask`, just `flags` are set."""
    masked = _expression("bitwise", _REGISTER, _REGISTER, be32(1), bytes([mask]), bytes(1))
    return _transport(13, 1), masked, _compare(bytes([flags]), equal)


def match_icmp(version: int, first: int, last: int) -> tuple[Expression, ...]:
    """ICMP of a family, of the types from `first` to `last`."""
    types = _compare(bytes([first])) if first == last else None
    compared = (types,) if types is not None else (
        _expression("cmp", _REGISTER, _AT_LEAST, bytes([first])), _expression("cmp", _REGISTER, _AT_MOST, bytes([last]))
    )  # fmt: skip
    return *match_family(version), *match_protocol(ICMP[version]), _transport(0, 1), *compared


def match_later_fragment(version: int) -> tuple[Expression, ...]:
    """Fragments but the first, which have no header of a protocol."""
    if version == 4:
        load, mask = _expression("payload", _REGISTER, NETWORK_HEADER, be32(6), be32(2)), b"\x1f\xff"
    else:
        tests = number(_HEADERS, "NFT_EXTHDR_OP_IPV6")
        load = _expression("exthdr", _REGISTER, bytes([IPPROTO_FRAGMENT]), be32(2), be32(2), tests, None)
        mask = b"\xff\xf8"
    masked = _expression("bitwise", _REGISTER, _REGISTER, be32(2), mask, bytes(2))
    return *match_family(version), load, masked, _compare(bytes(2), equal=False)


def match_to_us() -> tuple[Expression, ...]:
    """Packets for an address of this host."""
    to = _expression("fib", _REGISTER, be32(_RESULTS.index("NFT_FIB_RESULT_ADDRTYPE")), be32(NFTA_FIB_F_DADDR))
    return to, _compare(U32.pack(rtnl.rt_type["local"]))


def match_other_way_back() -> tuple[Expression, ...]:
    """Packets whose source is reached by another device than they came by, as a strict rp_filter has it."""
    flags = be32(NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF | NFTA_FIB_F_PRESENT)
    return _expression("fib", _REGISTER, be32(_RESULTS.index("NFT_FIB_RESULT_OIF")), flags), _compare(bytes(4))


def clamp_segments() -> tuple[Expression, ...]:
    """Lower the segment size that a TCP handshake names to what the route takes."""
    tcp_option = number(_HEADERS, "NFT_EXTHDR_OP_TCPOPT")
    return (
        _expression("rt", _REGISTER, number(_expressions.nft_rt.rt_keys.ops, "NFT_RT_TCPMSS")),
        _expression("byteorder", _REGISTER, _REGISTER, _TO_NETWORK, be32(2), be32(2)),
        _expression("exthdr", None, bytes([TCPOPT_MAXSEG]), be32(2), be32(2), tcp_option, _REGISTER),
    )


def source_nat(address: IPAddress) -> tuple[Expression, ...]:
    """Give the packet this source, and its answers the former one as their destination."""
    value = _expression("immediate", _REGISTER, address.packed)
    source = number(_expressions.nft_nat.types.ops, "NFT_NAT_SNAT")
    return value, _expression("nat", source, be32(FAMILY[address.version]), _REGISTER)


def matching(match: Sequence[str]) -> Iterator[Expression]:
    """`match`: as iptables would say it, in pairs of words (`-i kilo0`)."""
    for word, value in zip(match[::2], match[1::2], strict=True):
        if word in ("-i", "-o"):
            yield from match_interface("iifname" if word == "-i" else "oifname", value)
        else:
            yield from match_network(ip_network(value), "saddr" if word == "-s" else "daddr")


def count(name: str) -> tuple[Expression, ...]:
    """Add to the counter of that name."""
    return (_expression("objref", be32(NFT_OBJECT_COUNTER), name.encode() + b"\0"),)
