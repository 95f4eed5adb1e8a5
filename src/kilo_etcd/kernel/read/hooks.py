"""Base chains and the rules that packets meet in them, as nfnetlink tells of them. Pure.

What the chains do to packets is `kernel.firewall.chains`' to say. Expressions that are not known here become conditions
that cannot be told, and what they may have written into registers is forgotten. A set is read by the fields of its
keys, which the registers say, and by the ranges of its members; a verdict map is a rule for each of its members.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from ipaddress import collapse_addresses, ip_address, ip_network, summarize_address_range
from typing import Any

from attrs import evolve, frozen

from kilo_etcd.kernel.firewall.chains import (
    PROTOCOLS,
    TAKING_TARGETS,
    TRANSLATING_TARGETS,
    Condition,
    FilterRule,
    Verdict,
    new_packets,
    of_status,
)
from kilo_etcd.kernel.firewall.nftables import FAMILY, NETWORK_HEADER, VERDICT_REGISTER, be32, number
from kilo_etcd.kernel.netlink import formats
from kilo_etcd.kernel.netlink.codec import Reader, elements, read
from kilo_etcd.kernel.netlink.formats import nft
from kilo_etcd.kernel.read.nft import expressions, read_chain_items, text, values, verdicts
from kilo_etcd.model import IPAddress

FAMILIES = {
    nft.NFPROTO_INET: "inet", nft.NFPROTO_IPV4: "ip", nft.NFPROTO_IPV6: "ip6", nft.NFPROTO_NETDEV: "netdev",
}  # fmt: skip

_expr = nft.nft_rule_msg.nft_expr
_READERS = {
    "meta": ("NFTA_META_DREG", "NFTA_META_KEY"),
    "ct": ("NFTA_CT_DREG", "NFTA_CT_KEY"),
    "fib": ("NFTA_FIB_DREG", "NFTA_FIB_RESULT", "NFTA_FIB_FLAGS"),
    "nat": ("NFTA_NAT_TYPE",),
    "payload": ("NFTA_PAYLOAD_DREG", "NFTA_PAYLOAD_BASE", "NFTA_PAYLOAD_OFFSET", "NFTA_PAYLOAD_LEN"),
    "bitwise": ("NFTA_BITWISE_SREG", "NFTA_BITWISE_DREG", "NFTA_BITWISE_MASK", "NFTA_BITWISE_XOR"),
    "byteorder": ("NFTA_BYTEORDER_SREG", "NFTA_BYTEORDER_DREG", "NFTA_BYTEORDER_SIZE"),
    "cmp": ("NFTA_CMP_SREG", "NFTA_CMP_OP", "NFTA_CMP_DATA"),
    "immediate": ("NFTA_IMMEDIATE_DREG", "NFTA_IMMEDIATE_DATA"),
    "lookup": ("NFTA_LOOKUP_SET", "NFTA_LOOKUP_SREG", "NFTA_LOOKUP_DREG", "NFTA_LOOKUP_FLAGS"),
    "objref": ("NFTA_OBJREF_IMM_TYPE",),
    "match": ("NFTA_MATCH_NAME", "NFTA_MATCH_REV", "NFTA_MATCH_INFO"),
    "target": ("NFTA_TARGET_NAME",),
}
_rules = Reader(
    nft.nft_rule_msg, "nfgen_family",
    "NFTA_RULE_TABLE", "NFTA_RULE_CHAIN", "NFTA_RULE_HANDLE", "NFTA_RULE_EXPRESSIONS", "NFTA_RULE_USERDATA",
)  # fmt: skip
_lists = Reader(nft.nft_set_elem_list_msg, "NFTA_SET_ELEM_LIST_ELEMENTS")
_members = Reader(
    nft.nft_set_elem_list_msg.set_elem,
    "NFTA_SET_ELEM_KEY", "NFTA_SET_ELEM_KEY_END", "NFTA_SET_ELEM_DATA", "NFTA_SET_ELEM_FLAGS", "NFTA_SET_ELEM_EXPR",
    "NFTA_SET_ELEM_EXPRESSIONS",
)  # fmt: skip
_tables = Reader(nft.nft_table_msg, "nfgen_family", "NFTA_TABLE_NAME", "NFTA_TABLE_FLAGS")
_sets = Reader(nft.nft_set_msg, "NFTA_SET_TABLE", "NFTA_SET_NAME", "NFTA_SET_FLAGS", "NFTA_SET_KEY_LEN")

_keys, _ct_keys = _expr.nft_meta.meta_key.ops, _expr.nft_ct.keys.ops
_META = {
    number(_keys, name): kind
    for name, kind in (
        ("NFT_META_IIF", "iif index"), ("NFT_META_OIF", "oif index"),
        ("NFT_META_IIFNAME", "iif"), ("NFT_META_OIFNAME", "oif"), ("NFT_META_NFPROTO", "version"),
        ("NFT_META_L4PROTO", "protocol"), ("NFT_META_PROTOCOL", "ethertype"),
    )
}  # fmt: skip
_CT = {number(_ct_keys, "NFT_CT_STATE"): "state", number(_ct_keys, "NFT_CT_STATUS"): "status"}
_LENGTHS = {
    "iif index": 4,
    "oif index": 4,
    "iif": 16,
    "oif": 16,
    "version": 1,
    "protocol": 1,
    "ethertype": 2,
    "state": 4,
    "status": 4,
    "destination type": 4,
}
"""Bytes of what a register is given."""
_NEW, _UNTRACKED = formats.NF_CT_STATE_NEW, formats.NF_CT_STATE_UNTRACKED
_ETHERTYPES = {b"\x08\x00": 4, b"\x86\xdd": 6}
_comparisons = _expr.nft_cmp.ops.ops
_EQUAL, _UNEQUAL = number(_comparisons, "NFT_CMP_EQ"), number(_comparisons, "NFT_CMP_NEQ")
_ORDERED = {
    number(_comparisons, f"NFT_CMP_{name}"): compare
    for name, compare in (("LT", operator.lt), ("LTE", operator.le), ("GT", operator.gt), ("GTE", operator.ge))
}
_codes = _expr.nft_immediate.nfta_data.verdict.verdict_code.ops
_VERDICTS: dict[bytes, Verdict] = {
    number(_codes, "NF_DROP"): "drop", number(_codes, "NF_ACCEPT"): "accept", number(_codes, "NFT_JUMP"): "jump",
    number(_codes, "NFT_GOTO"): "goto", number(_codes, "NFT_RETURN"): "return",
    (-1).to_bytes(4, signed=True): "",
}  # fmt: skip
"""The last one is NFT_CONTINUE."""
_TARGETS: dict[str, Verdict] = {
    "REJECT": "drop", "NFQUEUE": "unknown",
    "MASQUERADE": "accept", "SNAT": "accept", **dict.fromkeys(TRANSLATING_TARGETS - {"DNPT"}, "accept"),
}  # fmt: skip
"""Targets of iptables' own that end a packet's way. After all others the next rule decides."""
_TRANSLATES = frozenset({"masq", "nat", "redir"})
"""They end a packet's way through their chain."""
_INVERTED = 1 << _expr.nft_lookup.lookup_flags.ops.index("NFT_LOOKUP_F_INV")
_set_flags = nft.nft_set_msg.set_flags.ops
_INTERVAL, _CONCAT = (1 << _set_flags.index(f"NFT_SET_{name}") for name in ("INTERVAL", "CONCAT"))
_VOLATILE = sum(1 << _set_flags.index(f"NFT_SET_{name}") for name in ("TIMEOUT", "EVAL"))
"""Members of such sets come and go by packets or by time, which changes no generation of the ruleset."""
_DORMANT = 1
"""NFT_TABLE_F_DORMANT."""
_END, _CATCHALL = 1, formats.NFT_SET_ELEM_CATCHALL
_VERSIONS = {family: version for version, family in FAMILY.items()}
_SILENT = frozenset({"counter", "log", "notrack", "last"})
"""They match every packet."""
_SILENT_OBJECTS = frozenset(map(be32, formats.NFT_OBJECTS_THAT_MATCH))
_ADDRESS_TYPE = _expr.nft_fib.fib_result.ops.index("NFT_FIB_RESULT_ADDRTYPE")
_DNAT = be32(next(number for number, name in _expr.nft_nat.types.ops.items() if name == "NFT_NAT_DNAT"))
_LOCAL: int = formats.rtnl.rt_type["local"]
_PROTOCOL_FIELDS = ((9, 1), (6, 1))
"""Offset and length of `protocol` in the header of IPv4, and of `nexthdr` in that of IPv6. Nft asks for the family
first."""
_DESTINATIONS = {4: (16, 20), 6: (24, 40)}
"""IP version -> where in its header the destination begins, and ends."""
_UNKNOWN = Condition("?")
_HOOKS = {be32(number): name for name, number in (*formats.NF_INET_HOOKS.items(), ("ingress", formats.NF_INET_INGRESS))}
_NETDEV_HOOKS = {be32(number): name for name, number in formats.NF_NETDEV_HOOKS.items()}
MOST_MEMBERS = 1000
"""A set that has more cannot be told: to read a list of a whole country's addresses takes long."""
MOST_TARGETS = 16
"""A verdict map that leads to more chains cannot be told: some programs make one for each container."""
Found = Mapping[str, Any]


@frozen(kw_only=True)
class FoundSet:
    """A set or a map of a rule's table."""

    flags: int
    key_length: int
    members: Callable[[], Sequence[Found] | None]
    """Reads its elements; None: there are more than `MOST_MEMBERS`."""


Sets = Callable[[str], FoundSet | None]


@frozen(kw_only=True)
class FoundBase:
    """A base chain without its rules."""

    family: int
    table: str
    name: str
    hook: str
    priority: int
    filters: bool
    """Else it translates addresses, and may drop packets besides."""
    drops: bool
    """Its policy: what no rule took."""
    devices: tuple[str, ...] = ()


def read_base(body: bytes) -> FoundBase | None:
    """None: the chain is no base chain, or one of a kind or of a hook that drops no packets."""
    result, hook = read_chain_items(body)
    family, kind = result["nfgen_family"], text(result, "NFTA_CHAIN_TYPE")
    hooks = _NETDEV_HOOKS if family == nft.NFPROTO_NETDEV else _HOOKS
    name = hooks.get(hook.get("NFTA_HOOK_HOOKNUM", b""))
    if family not in FAMILIES or name is None or kind not in ("filter", "nat"):
        return None
    priority = int.from_bytes(hook.get("NFTA_HOOK_PRIORITY", b""), signed=True)
    if kind == "nat" and name == "prerouting":
        # All chains that translate are passed at one place, whatever their own priorities.
        priority = formats.NF_PRIORITIES["dstnat"]
    name_of_one, several = hook.get("NFTA_HOOK_DEV"), hook.get("NFTA_HOOK_DEVS")
    devices = elements(several) if several is not None else () if name_of_one is None else (name_of_one,)
    return FoundBase(
        family=family,
        table=text(result, "NFTA_CHAIN_TABLE"),
        name=text(result, "NFTA_CHAIN_NAME"),
        hook=name,
        priority=priority,
        filters=kind == "filter",
        drops=_VERDICTS.get(result.get("NFTA_CHAIN_POLICY", b"")) == "drop",
        devices=tuple(device.rstrip(b"\0").decode(errors="replace") for device in devices),
    )


def read_dormant(body: bytes) -> tuple[int, str] | None:
    """The family's number and the name of a table whose chains are switched off; None: they are not."""
    attributes = _tables(body)
    flags = int.from_bytes(attributes.get("NFTA_TABLE_FLAGS", b""))
    return (attributes["nfgen_family"], text(attributes, "NFTA_TABLE_NAME")) if flags & _DORMANT else None


def read_set(body: bytes, table: str) -> tuple[str, int, int] | None:
    """The name, the flags and the length of the keys of a set. None: it is another table's."""
    attributes = _sets(body)
    if text(attributes, "NFTA_SET_TABLE") != table:
        return None
    flags, length = (int.from_bytes(attributes.get(f"NFTA_SET_{name}", b"")) for name in ("FLAGS", "KEY_LEN"))
    return text(attributes, "NFTA_SET_NAME"), flags, length


def read_members(body: bytes) -> list[Found]:
    """The elements of a set that one message holds."""
    return list(map(_members, elements(_lists(body).get("NFTA_SET_ELEM_LIST_ELEMENTS", b""))))


def read_rule_of(body: bytes, family: int, table: str, chain: str) -> Found | None:
    """A rule of a chain, for `to_rules`. None: it is another chain's, of which an old kernel tells too."""
    attributes = _rules(body)
    place = attributes["nfgen_family"], text(attributes, "NFTA_RULE_TABLE"), text(attributes, "NFTA_RULE_CHAIN")
    return attributes if place == (family, table, chain) else None


@cache
def _reader(name: str) -> Reader:
    return Reader(getattr(_expr, f"nft_{name}"), *_READERS[name])


@frozen
class _Loaded:
    """A field of a packet, loaded into registers. `kind`: as of a condition, or `saddr 4` and the like; `mask` was put
    over it; `big`: a number that is in network byte order by now."""

    kind: str = "?"
    length: int = 0
    """0: it is not known."""
    mask: bytes = b""
    big: bool = False

    def number(self, data: bytes) -> int:
        return int.from_bytes(data, "big" if self.big else sys.byteorder)


_NOTHING = _Loaded()


class _Registers:
    """What is known of the registers, of 4 bytes each. Those of 16 bytes, 1 to 4, are four of these."""

    def __init__(self) -> None:
        self._loaded: dict[int, _Loaded] = {}

    def load(self, register: bytes, loaded: _Loaded = _NOTHING) -> None:
        """Forget what the overwritten registers held: all from the first one on, if the length is not known."""
        first = _first(register)
        end = first + -(-loaded.length // 4) if loaded.length else sys.maxsize
        for at, other in list(self._loaded.items()):
            if at < end and at + -(-other.length // 4) > first:
                del self._loaded[at]
        if loaded.length and loaded.kind != "?":
            self._loaded[first] = loaded

    def at(self, register: bytes) -> _Loaded:
        return self._loaded.get(_first(register), _NOTHING)

    def key(self, register: bytes, length: int) -> tuple[tuple[int, _Loaded], ...]:
        """The known fields of a key of so many bytes, each with its place in the key. In a concatenation each field is
        padded to 4 bytes."""
        first, result = _first(register), []
        for at in range(0, length, 4):
            loaded = self._loaded.get(first + at // 4)
            # In a set of one field the key is as long as that.
            if loaded is not None and not loaded.mask and at + loaded.length <= length:
                result.append((at, loaded))
        return tuple(result)

    def hold_destination(self, register: bytes, searched: FoundSet | None) -> bool:
        """Whether what is searched in a set may be a destination, or a part of one."""
        first = _first(register)
        end = sys.maxsize if searched is None else first + -(-searched.key_length // 4)
        return any(
            at < end and at + -(-loaded.length // 4) > first and loaded.kind.startswith("daddr")
            for at, loaded in self._loaded.items()
        )

    def forget(self) -> None:
        self._loaded.clear()


def _first(register: bytes) -> int:
    value = int.from_bytes(register)
    return (value - 1) * 4 if value <= 4 else value - 8


Branch = tuple[tuple[Condition, ...], Verdict, str]


def to_rules(rule: Found, sets: Sets = lambda name: None, hook: str = "prerouting") -> tuple[FilterRule, ...]:
    """A rule as a value, or as several if it has a verdict map. `sets` gives the sets of its table; `hook` is that of
    its base chain."""
    conditions: list[Condition] = []
    branches: tuple[Branch, ...] = (((), "", ""),)
    translates = takes = False
    registers = _Registers()
    for element in elements(rule.get("NFTA_RULE_EXPRESSIONS", b"")):
        outer = expressions(element)
        name, data = text(outer, "NFTA_EXPR_NAME"), outer.get("NFTA_EXPR_DATA", b"")
        attributes: Found = _reader(name)(data) if name in _READERS else {}
        get = attributes.get
        if name in ("meta", "ct"):
            # Without a register to write to it sets a mark or the like, of every packet.
            if (register := get(f"NFTA_{name.upper()}_DREG")) is not None:
                kind = _META.get(get("NFTA_META_KEY", b"")) if name == "meta" else _CT.get(get("NFTA_CT_KEY", b""))
                registers.load(register, _NOTHING if kind is None else _Loaded(kind, _LENGTHS[kind]))
        elif name == "payload":
            if "NFTA_PAYLOAD_DREG" in attributes:
                ipv6 = rule.get("nfgen_family") == nft.NFPROTO_IPV6 or Condition("version", 6) in conditions
                registers.load(attributes["NFTA_PAYLOAD_DREG"], _side(attributes, ipv6=ipv6))
            else:
                writes = _writes_destination(attributes, rule, conditions)
                translates = translates or writes
                # Into that header it can be written in every packet.
                conditions += () if writes else (Condition(name),)
        elif name == "fib":
            registers.load(get("NFTA_FIB_DREG", b""), _destination_type(attributes))
        elif name == "bitwise":
            mask, flipped = (_value(get(f"NFTA_BITWISE_{part}", b"")) for part in ("MASK", "XOR"))
            loaded = registers.at(get("NFTA_BITWISE_SREG", b""))
            plain = mask and not loaded.mask and not any(flipped)
            registers.load(get("NFTA_BITWISE_DREG", b""), evolve(loaded, mask=mask) if plain else _NOTHING)
        elif name == "byteorder":
            loaded = registers.at(get("NFTA_BYTEORDER_SREG", b""))
            if loaded.kind == "state" and not loaded.mask and get("NFTA_BYTEORDER_SIZE") == be32(loaded.length):
                loaded = evolve(loaded, big=not loaded.big)
            elif loaded.length != 1:
                loaded = _NOTHING
            registers.load(get("NFTA_BYTEORDER_DREG", b""), loaded)
        elif name == "cmp":
            loaded = registers.at(get("NFTA_CMP_SREG", b""))
            conditions.append(_condition(loaded, get("NFTA_CMP_OP", b""), _value(get("NFTA_CMP_DATA", b""))))
        elif name == "immediate":
            if get("NFTA_IMMEDIATE_DREG") == VERDICT_REGISTER:
                branches = (((), *_verdict(get("NFTA_IMMEDIATE_DATA", b""))),)
            else:
                registers.load(get("NFTA_IMMEDIATE_DREG", b""))
        elif name in _TRANSLATES:
            branches = (((), "accept", ""),)
            takes = takes or name == "redir"
            translates = translates or takes or get("NFTA_NAT_TYPE") == _DNAT
        elif name == "reject":
            branches = (((), "drop", ""),)
        elif name == "lookup":
            register, searched = get("NFTA_LOOKUP_SREG", b""), sets(text(attributes, "NFTA_LOOKUP_SET"))
            members = _looked_up(registers, register, searched)
            if get("NFTA_LOOKUP_DREG") == VERDICT_REGISTER:
                # A packet that it does not name goes on to the next rule.
                branches = _branches(members)
                continue
            inverted = bool(int.from_bytes(get("NFTA_LOOKUP_FLAGS", b"")) & _INVERTED)
            conditions.append(
                Condition("lookup", "daddr" if registers.hold_destination(register, searched) else None, not inverted)
                if members is None
                else _among(members, inverted=inverted)
            )
            if "NFTA_LOOKUP_DREG" in attributes:
                registers.load(attributes["NFTA_LOOKUP_DREG"])
        elif name == "queue":
            branches = (((), "unknown", ""),)
        elif name == "match":
            conditions += _xt_match(attributes)
        elif name == "target":
            target = text(attributes, "NFTA_TARGET_NAME")
            branches = (((), _TARGETS[target], ""),) if target in _TARGETS else branches
            # After routing NETMAP translates sources.
            translates = translates or (target in TRANSLATING_TARGETS and (target, hook) != ("NETMAP", "postrouting"))
            takes = takes or target in TAKING_TARGETS
        elif name == "objref":
            if get("NFTA_OBJREF_IMM_TYPE") not in _SILENT_OBJECTS:
                conditions.append(Condition(name))
        elif name == "dynset":
            if not _adds_only(data):
                conditions.append(Condition(name))
        elif name not in _SILENT:
            conditions.append(Condition(name))
            registers.forget()
            takes = takes or name == "tproxy"
            translates = translates or takes
    return tuple(
        FilterRule(
            conditions=(*conditions, *further), verdict=verdict, target=target,
            comment=_comment(rule.get("NFTA_RULE_USERDATA", b"")), translates=translates, takes=takes,
            handle=int.from_bytes(rule.get("NFTA_RULE_HANDLE", b"")),
        )
        for further, verdict, target in branches
    )  # fmt: skip


def _value(data: bytes) -> bytes:
    value: bytes = values(data).get("NFTA_DATA_VALUE", b"")
    return value


def _verdict(data: bytes) -> tuple[Verdict, str]:
    attributes = verdicts(values(data).get("NFTA_DATA_VERDICT", b""))
    code: bytes = attributes.get("NFTA_VERDICT_CODE", bytes(4))
    return _VERDICTS.get(code, "unknown"), text(attributes, "NFTA_VERDICT_CHAIN")


def _adds_only(data: bytes) -> bool:
    """Whether an expression that adds to a set matches every packet: not if it has a limit or is inverted. (A set that
    is full is not looked for.)"""
    attributes = read(_expr.nft_dynset, data)
    # pyroute2 has no name for several expressions.
    return not any(attributes.get("NFTA_DYNSET_FLAGS", b"")) and not {"", "NFTA_DYNSET_EXPR"} & attributes.keys()


# -- sets -------------------------------------------------------------------------------------------------------------

_Member = tuple[tuple[Condition, ...], Found]


def _looked_up(registers: _Registers, register: bytes, searched: FoundSet | None) -> list[_Member] | None:
    """The members of a set, each with what a packet must fulfil to be it. None: it cannot be told."""
    if searched is None or searched.flags & _VOLATILE:
        return None
    key = registers.key(register, searched.key_length)
    if not key or (members := searched.members()) is None:
        return None
    known = sum(-(-loaded.length // 4) for _, loaded in key)
    rest = () if known == -(-searched.key_length // 4) else (_UNKNOWN,)
    result = []
    for low, high, member in _ranges(members, searched.flags):
        tests = [_within(loaded, low[at : at + loaded.length], high[at : at + loaded.length]) for at, loaded in key]
        result.append(((*tests, *rest, *_limited(member)), member))
    # It counts only for those that no other member takes.
    caught = [(_limited(member), member) for member in members if _flags(member) & _CATCHALL]
    return result + caught


def _ranges(members: Sequence[Found], flags: int) -> Iterator[tuple[bytes, bytes, Found]]:
    """The first and the last key of each member."""
    keyed = [(_value(member["NFTA_SET_ELEM_KEY"]), member) for member in members if "NFTA_SET_ELEM_KEY" in member]
    if not flags & _INTERVAL or flags & _CONCAT:
        for key, member in keyed:
            yield key, _value(member["NFTA_SET_ELEM_KEY_END"]) if "NFTA_SET_ELEM_KEY_END" in member else key, member
        return
    # Each one reaches to the next one; those that have the flag END are the gaps.
    keyed.sort(key=lambda entry: (entry[0], not _flags(entry[1]) & _END))
    ends = [int.from_bytes(key) for key, _ in keyed[1:]] + [1 << len(keyed[-1][0]) * 8] if keyed else []
    for (key, member), end in zip(keyed, ends, strict=True):
        if not _flags(member) & _END and end > int.from_bytes(key):
            yield key, (end - 1).to_bytes(len(key)), member


def _flags(member: Found) -> int:
    return int.from_bytes(member.get("NFTA_SET_ELEM_FLAGS", b""))


def _limited(member: Found) -> tuple[Condition, ...]:
    """That an expression of the member's own may keep a packet from matching."""
    several = elements(member.get("NFTA_SET_ELEM_EXPRESSIONS", b""))
    own = [member["NFTA_SET_ELEM_EXPR"]] if "NFTA_SET_ELEM_EXPR" in member else []
    names = {text(expressions(body), "NFTA_EXPR_NAME") for body in (*own, *several)}
    return () if names <= _SILENT else (_UNKNOWN,)


def _within(loaded: _Loaded, low: bytes, high: bytes) -> Condition:
    """Whether a field of a packet is within a range."""
    side, _, version = loaded.kind.partition(" ")
    if side == "protocol":
        return Condition("protocol", tuple(_protocol(bytes([value])) for value in range(low[0], high[0] + 1)))
    if side in ("iif", "oif") and not version:
        start = low.rstrip(b"\0")
        if low == high or high == start.ljust(len(high), b"\xff"):
            return Condition(side, start.decode(errors="replace") + ("" if low == high else "*"))
    if side in ("saddr", "daddr"):
        networks = summarize_address_range(ip_address(low), ip_address(high))
        return Condition(side, tuple(networks))
    return _condition(loaded, _EQUAL, low) if low == high else _UNKNOWN


def _among(members: Sequence[_Member], *, inverted: bool) -> Condition:
    either = tuple(dict.fromkeys(tests for tests, _ in members))
    sides = {tests[0].kind if len(tests) == 1 else "" for tests in either}
    if len(sides) == 1 and sides <= {"saddr", "daddr"}:
        # Several networks may hold a mesh's subnets only together.
        networks = [network for (test,) in either if isinstance(test.value, tuple) for network in test.value]
        return Condition(sides.pop(), tuple(collapse_addresses(networks)), not inverted)
    return Condition("any", either, not inverted)


def _branches(members: Sequence[_Member] | None) -> tuple[Branch, ...]:
    """What a verdict map decides, a branch for each member."""
    if members is None:
        return (((), "unknown", ""),)
    decided = [(tests, *_verdict(member.get("NFTA_SET_ELEM_DATA", b""))) for tests, member in members]
    if len({target for *_, target in decided}) > MOST_TARGETS:
        return ((_addresses(members), "unknown", ""),)
    return tuple(dict.fromkeys(decided))


def _addresses(members: Iterable[_Member]) -> tuple[Condition, ...]:
    """The sources and destinations that a packet must have to be one of the members, whatever else it must."""
    conditions = []
    for side in ("saddr", "daddr"):
        values = [[test.value for test in tests if test.kind == side] for tests, _ in members]
        if all(values):
            networks = [network for (value, *_) in values if isinstance(value, tuple) for network in value]
            conditions.append(Condition(side, tuple(collapse_addresses(networks))))
    return tuple(conditions)


# -- single fields ----------------------------------------------------------------------------------------------------


def _protocol(data: bytes) -> str:
    number = data[0] if data else 0
    return PROTOCOLS.get(number, str(number))


def _destination_type(attributes: Found) -> _Loaded:
    """What a fib expression loads: the type of the destination, or something that cannot be told."""
    result, flags = (int.from_bytes(attributes.get(f"NFTA_FIB_{name}", b"")) for name in ("RESULT", "FLAGS"))
    kind = "destination type"
    told = (result, flags) == (_ADDRESS_TYPE, formats.NFTA_FIB_F_DADDR)
    return _Loaded(kind, _LENGTHS[kind]) if told else _NOTHING


def _side(attributes: Found, *, ipv6: bool) -> _Loaded:
    """What of a packet's header a payload expression loads: an address, as `saddr 4`, or `protocol`. `ipv6`: it is
    known to be IPv6's. Else of a short prefix it cannot be told."""
    offset, length = (int.from_bytes(attributes.get(f"NFTA_PAYLOAD_{name}", b"")) for name in ("OFFSET", "LEN"))
    kind = "?"
    if attributes.get("NFTA_PAYLOAD_BASE") == NETWORK_HEADER:
        if length <= 4 and offset in (12, 16) and not ipv6:
            kind = f"{'saddr' if offset == 12 else 'daddr'} 4"
        elif (length > 4 or ipv6) and length <= 16 and offset in (8, 24):
            kind = f"{'saddr' if offset == 8 else 'daddr'} 6"
        elif (offset, length) in _PROTOCOL_FIELDS:
            kind = "protocol"
    return _Loaded(kind, length)


def _writes_destination(attributes: Found, rule: Found, conditions: Collection[Condition]) -> bool:
    """Whether a payload expression of a rule writes another destination into a packet. Of neither family, as one that
    may be of both."""
    if attributes.get("NFTA_PAYLOAD_BASE") != NETWORK_HEADER:
        return False
    first, length = (int.from_bytes(attributes.get(f"NFTA_PAYLOAD_{name}", b"")) for name in ("OFFSET", "LEN"))
    of_table = {nft.NFPROTO_IPV4: 4, nft.NFPROTO_IPV6: 6}.get(rule.get("nfgen_family"))
    versions = [
        version for version in _DESTINATIONS if version == of_table or Condition("version", version) in conditions
    ]
    places = (_DESTINATIONS[version] for version in versions or _DESTINATIONS)
    return any(first < end and begin < first + length for begin, end in places)


def _condition(loaded: _Loaded, comparison: bytes, data: bytes) -> Condition:
    held, mask = loaded.kind, loaded.mask
    if (compare := _ORDERED.get(comparison)) is not None and held == "protocol" and not mask:
        return Condition(held, tuple(_protocol(bytes([value])) for value in range(256) if compare(value, data[0])))
    side, _, version = held.partition(" ")
    if compare is not None and side in ("saddr", "daddr") and not mask and len(data) in (4, 16):
        return _beyond(side, compare, ip_address(data))
    if comparison not in (_EQUAL, _UNEQUAL):
        return Condition("?", side)
    equal = comparison == _EQUAL
    if held in ("state", "status"):
        # A new packet has the state `new`, and no bit of the status.
        new, untracked = (
            ((bits & loaded.number(mask) if mask else bits) == loaded.number(data)) is equal
            for bits in ((_NEW, _UNTRACKED) if held == "state" else (0, 0))
        )
        test = new_packets(new, untracked)
        return of_status(test) if held == "status" else test
    if side in ("saddr", "daddr"):
        size = 4 if version == "4" else 16
        length = int.from_bytes(mask).bit_count() if mask else len(data) * 8
        if mask and int.from_bytes(mask) != (1 << len(mask) * 8) - (1 << len(mask) * 8 - length):
            return Condition("?", side, equal)  # No prefix.
        return Condition(side, ip_network((data.ljust(size, b"\0")[:size], length), strict=False), equal)
    if mask:
        return _UNKNOWN
    if held == "destination type":
        return Condition("local", True, equal) if loaded.number(data) == _LOCAL else _UNKNOWN
    if held in ("iif", "oif"):
        # A prefix is compared in as many bytes as it has.
        return Condition(held, data.rstrip(b"\0").decode(errors="replace") + ("" if b"\0" in data else "*"), equal)
    if held in ("iif index", "oif index"):
        return Condition(side, "lo", equal) if data == formats.U32.pack(formats.LOOPBACK_IFINDEX) else _UNKNOWN
    if held == "protocol":
        return Condition("protocol", _protocol(data), equal)
    if held == "version":
        return Condition("version", _VERSIONS.get(data[0] if data else 0), equal)
    if held == "ethertype":
        return Condition("version", _ETHERTYPES.get(data), equal)
    return _UNKNOWN


def _beyond(side: str, compare: Callable[[int, int], bool], bound: IPAddress) -> Condition:
    """Whether an address is less than another one, or greater: one end of a range."""
    first, last, most = 0, int(bound), (1 << bound.max_prefixlen) - 1
    if compare in (operator.gt, operator.ge):
        first, last = int(bound), most
    first, last = first + (compare is operator.gt), last - (compare is operator.lt)
    if first > last:
        return Condition(side, ())
    address = type(bound)
    return Condition(side, tuple(summarize_address_range(address(first), address(last))))


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
        if flags == of_state:
            bits, equal = (_NEW, formats.XT_CONNTRACK_STATE_UNTRACKED), not inverted & of_state
            test = new_packets(*(bool(state & bit) is equal for bit in bits))
            yield of_status(test) if state & formats.XT_CONNTRACK_STATE_DNAT else test
        else:
            yield Condition("?")
    elif name == "state" and len(info) >= 4:
        (state,) = formats.U32.unpack_from(info)
        yield new_packets(bool(state & _NEW), bool(state & _UNTRACKED))
    elif name == "addrtype":
        yield _address_type(attributes.get("NFTA_MATCH_REV"), info)
    elif name != "comment":
        yield Condition(name)


def _address_type(revision: bytes | None, info: bytes) -> Condition:
    layout = formats.XT_ADDRTYPE1 if revision == be32(1) else formats.XT_ADDRTYPE0
    if len(info) < layout.size:
        return _UNKNOWN
    source, destination, *inverted = layout.unpack_from(info)
    if source or destination != 1 << _LOCAL:
        return _UNKNOWN
    if layout is formats.XT_ADDRTYPE0:
        return Condition("local", True, not inverted[1])
    (flags,) = inverted
    if flags & ~formats.XT_ADDRTYPE_INVERT_DEST:
        return _UNKNOWN
    return Condition("local", True, not flags)


def _comment(data: bytes) -> str:
    """From the userdata that nft keeps with a rule."""
    while len(data) >= 2:
        kind, length = data[0], data[1]
        if kind == formats.NFTNL_UDATA_RULE_COMMENT:
            return data[2 : 2 + length].rstrip(b"\0").decode(errors="replace")
        data = data[2 + length :]
    return ""
