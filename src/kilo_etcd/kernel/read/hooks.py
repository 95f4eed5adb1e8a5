"""Base chains of hook forward and the rules that packets meet in them, as nfnetlink tells of them. Pure.

What the chains do to packets is `kernel.firewall.chains`' to say. Expressions that are not known here become conditions
that cannot be told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from ipaddress import ip_network
from typing import Any

from kilo_etcd.kernel.firewall.chains import PROTOCOLS, Condition, FilterRule, Verdict
from kilo_etcd.kernel.firewall.nftables import FAMILY, NETWORK_HEADER, VERDICT_REGISTER, be32, number
from kilo_etcd.kernel.netlink import formats
from kilo_etcd.kernel.netlink.codec import Reader, elements
from kilo_etcd.kernel.netlink.formats import nft
from kilo_etcd.kernel.read.nft import expressions, read_chain_items, text, values, verdicts

FAMILIES = {nft.NFPROTO_INET: "inet", nft.NFPROTO_IPV4: "ip", nft.NFPROTO_IPV6: "ip6"}

_expr = nft.nft_rule_msg.nft_expr
_READERS = {
    "meta": ("NFTA_META_DREG", "NFTA_META_KEY"),
    "ct": ("NFTA_CT_DREG", "NFTA_CT_KEY"),
    "payload": ("NFTA_PAYLOAD_DREG", "NFTA_PAYLOAD_BASE", "NFTA_PAYLOAD_OFFSET", "NFTA_PAYLOAD_LEN"),
    "bitwise": ("NFTA_BITWISE_SREG", "NFTA_BITWISE_DREG", "NFTA_BITWISE_MASK"),
    "cmp": ("NFTA_CMP_SREG", "NFTA_CMP_OP", "NFTA_CMP_DATA"),
    "immediate": ("NFTA_IMMEDIATE_DREG", "NFTA_IMMEDIATE_DATA"),
    "lookup": ("NFTA_LOOKUP_SET", "NFTA_LOOKUP_SREG", "NFTA_LOOKUP_DREG", "NFTA_LOOKUP_FLAGS"),
    "match": ("NFTA_MATCH_NAME", "NFTA_MATCH_REV", "NFTA_MATCH_INFO"),
    "target": ("NFTA_TARGET_NAME",),
}
_rules = Reader(
    nft.nft_rule_msg, "nfgen_family",
    "NFTA_RULE_TABLE", "NFTA_RULE_CHAIN", "NFTA_RULE_HANDLE", "NFTA_RULE_EXPRESSIONS", "NFTA_RULE_USERDATA",
)  # fmt: skip
_lists = Reader(nft.nft_set_elem_list_msg, "NFTA_SET_ELEM_LIST_ELEMENTS")
_members = Reader(nft.nft_set_elem_list_msg.set_elem, "NFTA_SET_ELEM_KEY", "NFTA_SET_ELEM_DATA")

_keys, _ct_keys = _expr.nft_meta.meta_key.ops, _expr.nft_ct.keys.ops
_META = {
    number(_keys, name): kind
    for name, kind in (
        ("NFT_META_IIF", "iif index"), ("NFT_META_OIF", "oif index"),
        ("NFT_META_IIFNAME", "iif"), ("NFT_META_OIFNAME", "oif"), ("NFT_META_NFPROTO", "version"),
        ("NFT_META_L4PROTO", "protocol"),
    )
}  # fmt: skip
_CT = {number(_ct_keys, "NFT_CT_STATE"): "state", number(_ct_keys, "NFT_CT_STATUS"): "status"}
_NEW = formats.NF_CT_STATE_NEW
_comparisons = _expr.nft_cmp.ops.ops
_EQUAL, _UNEQUAL = number(_comparisons, "NFT_CMP_EQ"), number(_comparisons, "NFT_CMP_NEQ")
_codes = _expr.nft_immediate.nfta_data.verdict.verdict_code.ops
_VERDICTS: dict[bytes, Verdict] = {
    number(_codes, "NF_DROP"): "drop", number(_codes, "NF_ACCEPT"): "accept", number(_codes, "NFT_JUMP"): "jump",
    number(_codes, "NFT_GOTO"): "goto", number(_codes, "NFT_RETURN"): "return",
}  # fmt: skip
_INVERTED = 1 << _expr.nft_lookup.lookup_flags.ops.index("NFT_LOOKUP_F_INV")
_VERSIONS = {family: version for version, family in FAMILY.items()}
_SILENT = frozenset({"counter", "log", "objref", "notrack", "last", "dynset"})
"""They match every packet."""
_PROTOCOL_FIELDS = ((9, 1), (6, 1))
"""Offset and length of `protocol` in the header of IPv4, and of `nexthdr` in that of IPv6. Nft asks for the family
first."""
_LOOKED_UP = ("state", "iif", "oif", "protocol")
"""What is looked up in sets that are read for it; other sets cannot be told."""
Found = Mapping[str, Any]
Elements = Callable[[str], Iterable[Found]]


def read_base(body: bytes) -> tuple[int, str, str, bool] | None:
    """Of a base chain of hook forward: its family's number, its table, its name, whether it drops what no rule took."""
    result, hook = read_chain_items(body)
    family = result["nfgen_family"]
    if (
        family not in FAMILIES
        or hook.get("NFTA_HOOK_HOOKNUM") != be32(formats.NF_INET_HOOKS["forward"])
        or text(result, "NFTA_CHAIN_TYPE") != "filter"
    ):
        return None
    drops = _VERDICTS.get(result.get("NFTA_CHAIN_POLICY", b"")) == "drop"
    return family, text(result, "NFTA_CHAIN_TABLE"), text(result, "NFTA_CHAIN_NAME"), drops


def read_members(body: bytes) -> list[Found]:
    """The elements of a set that one message holds."""
    return list(map(_members, elements(_lists(body).get("NFTA_SET_ELEM_LIST_ELEMENTS", b""))))


def read_rule_of(body: bytes, family: int, table: str, chain: str) -> Found | None:
    """A rule of a chain, for `to_rule`. None: it is another chain's, of which an old kernel tells too."""
    attributes = _rules(body)
    place = attributes["nfgen_family"], text(attributes, "NFTA_RULE_TABLE"), text(attributes, "NFTA_RULE_CHAIN")
    return attributes if place == (family, table, chain) else None


@cache
def _reader(name: str) -> Reader:
    return Reader(getattr(_expr, f"nft_{name}"), *_READERS[name])


def to_rule(rule: Found, members_of: Elements = lambda name: ()) -> FilterRule:
    """A rule as a value. `members_of` gives the elements of a set of its table."""
    conditions: list[Condition] = []
    verdict: Verdict = ""
    target = ""
    registers: dict[bytes, tuple[str, bytes]] = {}
    """Register -> what it holds, and the mask that was put over it."""
    for element in elements(rule.get("NFTA_RULE_EXPRESSIONS", b"")):
        outer = expressions(element)
        name = text(outer, "NFTA_EXPR_NAME")
        attributes: Found = _reader(name)(outer.get("NFTA_EXPR_DATA", b"")) if name in _READERS else {}
        get = attributes.get
        if name == "meta":
            if "NFTA_META_DREG" in attributes:
                registers[attributes["NFTA_META_DREG"]] = _META.get(get("NFTA_META_KEY", b""), "?"), b""
            else:
                conditions.append(Condition(name))
        elif name == "ct":
            if "NFTA_CT_DREG" in attributes:
                registers[attributes["NFTA_CT_DREG"]] = _CT.get(get("NFTA_CT_KEY", b""), "?"), b""
            else:
                conditions.append(Condition(name))
        elif name == "payload":
            if "NFTA_PAYLOAD_DREG" in attributes:
                registers[attributes["NFTA_PAYLOAD_DREG"]] = _side(attributes), b""
            else:
                conditions.append(Condition(name))
        elif name == "bitwise":
            held = registers.get(get("NFTA_BITWISE_SREG", b""), ("?", b""))[0]
            registers[get("NFTA_BITWISE_DREG", b"")] = held, _value(get("NFTA_BITWISE_MASK", b""))
        elif name == "cmp":
            held, mask = registers.get(get("NFTA_CMP_SREG", b""), ("?", b""))
            conditions.append(_condition(held, mask, get("NFTA_CMP_OP", b""), _value(get("NFTA_CMP_DATA", b""))))
        elif name == "immediate" and get("NFTA_IMMEDIATE_DREG") == VERDICT_REGISTER:
            verdict, target = _verdict(get("NFTA_IMMEDIATE_DATA", b""))
        elif name == "reject":
            verdict = "drop"
        elif name == "lookup":
            held = registers.get(get("NFTA_LOOKUP_SREG", b""), ("?", b""))[0]
            mapped = get("NFTA_LOOKUP_DREG") == VERDICT_REGISTER
            if mapped:
                # A verdict map: whom it does not name goes on.
                members = members_of(text(attributes, "NFTA_LOOKUP_SET")) if held == "state" else ()
                verdict, target = _mapped(members) if held == "state" else ("unknown", "")
            elif held in _LOOKED_UP:
                inverted = bool(int.from_bytes(get("NFTA_LOOKUP_FLAGS", b"")) & _INVERTED)
                conditions.append(_among(held, members_of(text(attributes, "NFTA_LOOKUP_SET")), inverted=inverted))
            else:
                conditions.append(Condition(name))
        elif name == "queue":
            verdict = "unknown"
        elif name == "match":
            conditions += _xt_match(attributes)
        elif name == "target":
            verdict = "drop" if text(attributes, "NFTA_TARGET_NAME") == "REJECT" else verdict
        elif name not in _SILENT and name != "immediate":
            conditions.append(Condition(name))
    return FilterRule(
        conditions=tuple(conditions), verdict=verdict, target=target,
        comment=_comment(rule.get("NFTA_RULE_USERDATA", b"")),
        handle=int.from_bytes(rule.get("NFTA_RULE_HANDLE", b"")),
    )  # fmt: skip


def _value(data: bytes) -> bytes:
    value: bytes = values(data).get("NFTA_DATA_VALUE", b"")
    return value


def _verdict(data: bytes) -> tuple[Verdict, str]:
    attributes = verdicts(values(data).get("NFTA_DATA_VERDICT", b""))
    code: bytes = attributes.get("NFTA_VERDICT_CODE", bytes(4))
    return _VERDICTS.get(code, "unknown"), text(attributes, "NFTA_VERDICT_CHAIN")


def _key(member: Found) -> bytes:
    return _value(member.get("NFTA_SET_ELEM_KEY", b""))


def _mapped(members: Iterable[Found]) -> tuple[Verdict, str]:
    """What a verdict map of ct state decides for new packets."""
    mapped = (_verdict(member.get("NFTA_SET_ELEM_DATA", b"")) for member in members if _state(_key(member)) & _NEW)
    return next(mapped, ("", ""))


def _among(held: str, members: Iterable[Found], *, inverted: bool) -> Condition:
    """Membership in a set of states or of interface names."""
    keys = [_key(member) for member in members]
    if held == "state":
        return Condition("new", any(_state(key) & _NEW for key in keys), not inverted)
    if held == "protocol":
        return Condition(held, tuple(map(_protocol, keys)), not inverted)
    names = tuple(key.rstrip(b"\0").decode(errors="replace") for key in keys)
    return Condition(held, names, not inverted)


def _state(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def _protocol(data: bytes) -> str:
    number = data[0] if data else 0
    return PROTOCOLS.get(number, str(number))


def _side(attributes: Found) -> str:
    """What of a packet's header a payload expression loads: an address, as `saddr 4`, or `protocol`."""
    offset, length = (int.from_bytes(attributes.get(f"NFTA_PAYLOAD_{name}", b"")) for name in ("OFFSET", "LEN"))
    if attributes.get("NFTA_PAYLOAD_BASE") == NETWORK_HEADER:
        if length <= 4 and offset in (12, 16):
            return f"{'saddr' if offset == 12 else 'daddr'} 4"
        if 4 < length <= 16 and offset in (8, 24):
            return f"{'saddr' if offset == 8 else 'daddr'} 6"
        if (offset, length) in _PROTOCOL_FIELDS:
            return "protocol"
    return "?"


def _condition(held: str, mask: bytes, operator: bytes, data: bytes) -> Condition:
    if operator not in (_EQUAL, _UNEQUAL):
        return Condition("?")
    equal = operator == _EQUAL
    side, _, version = held.partition(" ")
    if held in ("iif", "oif"):
        # A prefix is compared in as many bytes as it has.
        return Condition(held, data.rstrip(b"\0").decode(errors="replace") + ("" if b"\0" in data else "*"), equal)
    if held in ("iif index", "oif index"):
        return (
            Condition(held[:3], "lo", equal) if data == formats.U32.pack(formats.LOOPBACK_IFINDEX) else Condition("?")
        )
    if held == "protocol" and not mask:
        return Condition("protocol", _protocol(data), equal)
    if held == "version":
        return Condition("version", _VERSIONS.get(data[0] if data else 0), equal)
    if held == "state":
        bits = _state(mask or data)
        # With a mask: unequal to nothing means that a bit is set.
        return Condition("new", bool(bits & _NEW), equal if not mask else not equal)
    if held == "status":
        return Condition("new", False, equal if not mask else not equal)
    if side in ("saddr", "daddr"):
        size = 4 if version == "4" else 16
        length = int.from_bytes(mask).bit_count() if mask else len(data) * 8
        return Condition(side, ip_network((data.ljust(size, b"\0")[:size], length), strict=False), equal)
    return Condition("?")


def _xt_match(attributes: Found) -> Iterator[Condition]:
    """A match of iptables' own that nftables carries along."""
    name, info = text(attributes, "NFTA_MATCH_NAME"), attributes.get("NFTA_MATCH_INFO", b"")
    layout = formats.XT_CONNTRACK3
    if (
        name == "conntrack"
        and attributes.get("NFTA_MATCH_REV") == be32(formats.XT_CONNTRACK_REVISION)
        and len(info) >= layout.size
    ):
        flags, inverted, state = layout.unpack_from(info)
        of_state = formats.XT_CONNTRACK_STATE
        yield Condition("new", bool(state & _NEW), not inverted & of_state) if flags == of_state else Condition("?")
    elif name == "state" and len(info) >= 4:
        yield Condition("new", bool(formats.U32.unpack_from(info)[0] & _NEW))
    elif name != "comment":
        yield Condition(name)


def _comment(data: bytes) -> str:
    """From the userdata that nft keeps with a rule."""
    while len(data) >= 2:
        kind, length = data[0], data[1]
        if kind == formats.NFTNL_UDATA_RULE_COMMENT:
            return data[2 : 2 + length].rstrip(b"\0").decode(errors="replace")
        data = data[2 + length :]
    return ""
