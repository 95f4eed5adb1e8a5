"""Reads every base chain of hook forward from nftables, of all families and whoever made it, and edits those rules in
them that are ours (`--forward-rules`).

The reading only: what the chains do to packets is `kernel.chains`' to say. Expressions that are not known here become
conditions that cannot be told.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import ip_network

from kilo_etcd.kernel import netlink
from kilo_etcd.kernel import nftables as nft
from kilo_etcd.kernel.chains import BaseChain, Condition, FilterRule, Verdict
from kilo_etcd.kernel.netlink import Message, attribute, attributes, nested, text
from kilo_etcd.kernel.openings import Opening
from kilo_etcd.kernel.table import Expression

_SUBSYSTEM = 10
_GETCHAIN, _NEWRULE, _GETRULE, _DELRULE, _GETSETELEM = 4, 6, 7, 8, 13
_FORWARD = 2
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
_NUMBERS = {name: number for number, name in _FAMILIES.items()}
_DROP = 0
_META = {4: "iif index", 5: "oif index", 6: "iif", 7: "oif", 15: "version"}
_CT = {0: "state", 2: "status"}
_NEW = 8
"""The bit of new packets, in nftables' ct state and in xtables' conntrack alike."""
_EQUAL, _UNEQUAL = 0, 1
_VERDICTS: dict[int, Verdict] = {0: "drop", 1: "accept", -3: "jump", -4: "goto", -5: "return"}
_SILENT = frozenset({"counter", "log", "objref", "notrack", "last", "dynset"})
"""They match every packet."""
_LOOKED_UP = ("state", "iif", "oif")
"""What is looked up in sets that are read for it; other sets cannot be told."""
Elements = Callable[[str], Iterable[Mapping[int, bytes]]]
_XT_STATE = struct.Struct("=HHH")
_XT_STATE_AT = 148
"""match_flags, invert_flags and state_mask in struct xt_conntrack_mtinfo3."""


def _message(kind: int, family: int, *body: bytes, flags: int = 0) -> Message:
    return Message(_SUBSYSTEM << 8 | kind, flags, struct.pack("=BBH", family, 0, 0) + b"".join(body))


def read(device: netlink.Socket) -> tuple[BaseChain, ...]:
    """All base chains of hook forward, with their tables' other chains. OSError: nftables is not to be read."""
    bases: dict[tuple[int, str], list[tuple[str, bool]]] = {}

    def chain(data: bytes) -> None:
        item = attributes(data, 4)
        hook = attributes(item.get(4, b""))
        if data[0] in _FAMILIES and hook.get(1) == nft.be32(_FORWARD) and _text(item, 7) == "filter":
            dropping = item.get(5) == nft.be32(_DROP)
            bases.setdefault((data[0], _text(item, 1)), []).append((_text(item, 3), dropping))

    device.dump(_message(_GETCHAIN, 0), chain)
    return tuple(
        BaseChain(
            family=_FAMILIES[family], table=table, name=name, drops=dropping, rules=rules[name], chains=rules,
        )
        for (family, table), chains in sorted(bases.items())
        for name, dropping in chains
        for rules in (_rules_from(device, family, table, name),)
    )  # fmt: skip


def _rules_from(device: netlink.Socket, family: int, table: str, base: str) -> dict[str, tuple[FilterRule, ...]]:
    """The rules of a chain and of those that it leads to. Others are not read: Kubernetes has thousands in a table."""

    def elements(name: str) -> tuple[dict[int, bytes], ...]:
        known: list[dict[int, bytes]] = []
        device.dump(
            _message(_GETSETELEM, family, text(1, table), text(2, name)),
            lambda data: known.extend(map(attributes, nft.elements(attributes(data, 4).get(3, b"")))),
        )
        return tuple(known)

    found: dict[str, tuple[FilterRule, ...]] = {}
    missing = [base]
    while missing:
        chain = missing.pop()
        items: list[dict[int, bytes]] = []

        def keep(data: bytes, chain: str = chain, items: list[dict[int, bytes]] = items) -> None:
            item = attributes(data, 4)
            # An old kernel gives the rules of all chains.
            if data[0] == family and (_text(item, 1), _text(item, 2)) == (table, chain):
                items.append(item)

        device.dump(_message(_GETRULE, family, text(1, table), text(2, chain)), keep)
        found[chain] = rules = tuple(read_rule(item, elements) for item in items)
        missing += [rule.target for rule in rules if rule.target and rule.target not in found]
    return found


def _text(item: Mapping[int, bytes], kind: int) -> str:
    return item.get(kind, b"").rstrip(b"\0").decode(errors="replace")


def read_rule(item: Mapping[int, bytes], elements: Elements = lambda name: ()) -> FilterRule:
    """One rule's netlink attributes as a value. `elements` gives those of a set of its table."""
    conditions: list[Condition] = []
    verdict: Verdict = ""
    target = ""
    registers: dict[bytes, tuple[str, bytes]] = {}
    """Register -> what it holds, and the mask that was put over it."""
    for element in nft.elements(item.get(4, b"")):
        outer = attributes(element)
        name, values = _text(outer, 1), attributes(outer.get(2, b""))
        register = values.get(1, b"")
        if name == "meta" and 1 in values:
            registers[register] = _META.get(_number(values.get(2)), "?"), b""
        elif name == "ct" and 1 in values:
            registers[register] = _CT.get(_number(values.get(2)), "?"), b""
        elif name == "payload" and 1 in values:
            registers[register] = _side(values), b""
        elif name == "bitwise":
            mask = attributes(values.get(4, b"")).get(1, b"")
            registers[values.get(2, b"")] = registers.get(register, ("?", b""))[0], mask
        elif name == "cmp":
            held, mask = registers.get(register, ("?", b""))
            conditions.append(
                _condition(held, mask, _number(values.get(2)), attributes(values.get(3, b"")).get(1, b""))
            )
        elif name == "immediate" and register == nft.be32(0):
            verdict, target = _verdict(values.get(2, b""))
        elif name == "reject":
            verdict = "drop"
        elif name == "lookup" and (held := registers.get(values.get(2, b""), ("?", b""))[0]) in _LOOKED_UP:
            members = elements(_text(values, 1))
            if values.get(3) == nft.be32(0):
                # A verdict map: whom it does not name goes on.
                verdict, target = _mapped(members) if held == "state" else ("unknown", "")
            else:
                conditions.append(_among(held, members, inverted=bool(_number(values.get(5)) & 1)))
        elif name == "queue" or (name == "lookup" and values.get(3) == nft.be32(0)):
            verdict = "unknown"
        elif name == "match":
            conditions += _xt_match(values)
        elif name == "target":
            verdict = "drop" if _text(values, 1) == "REJECT" else verdict
        elif name not in _SILENT and name != "immediate":
            conditions.append(Condition(name))
    return FilterRule(
        conditions=tuple(conditions), verdict=verdict, target=target, comment=_comment(item.get(7, b"")),
        handle=_number(item.get(3)),
    )  # fmt: skip


def _verdict(data: bytes) -> tuple[Verdict, str]:
    said = attributes(attributes(data).get(2, b""))
    return _VERDICTS.get(struct.unpack("!i", said.get(1, bytes(4)))[0], "unknown"), _text(said, 2)


def _key(element: Mapping[int, bytes]) -> bytes:
    return attributes(element.get(1, b"")).get(1, b"")


def _mapped(members: Iterable[Mapping[int, bytes]]) -> tuple[Verdict, str]:
    """What a verdict map of ct state says of new packets."""
    return next((_verdict(one.get(2, b"")) for one in members if _state(_key(one)) & _NEW), ("", ""))


def _among(held: str, members: Iterable[Mapping[int, bytes]], *, inverted: bool) -> Condition:
    """Membership in a set of states or of interface names."""
    keys = [_key(one) for one in members]
    if held == "state":
        return Condition("new", any(_state(key) & _NEW for key in keys), not inverted)
    names = tuple(key.rstrip(b"\0").decode(errors="replace") for key in keys)
    return Condition(held, names, not inverted)


def _state(data: bytes) -> int:
    return int.from_bytes(data, "little" if struct.pack("=H", 1)[0] else "big")


def _number(data: bytes | None) -> int:
    return int.from_bytes(data or b"")


def _side(values: Mapping[int, bytes]) -> str:
    """Which address a payload expression loads, as `saddr 4`."""
    base, offset, length = (_number(values.get(kind)) for kind in (2, 3, 4))
    if base == 1 and length <= 4 and offset in (12, 16):
        return f"{'saddr' if offset == 12 else 'daddr'} 4"
    if base == 1 and 4 < length <= 16 and offset in (8, 24):
        return f"{'saddr' if offset == 8 else 'daddr'} 6"
    return "?"


def _condition(held: str, mask: bytes, operator: int, data: bytes) -> Condition:
    if operator not in (_EQUAL, _UNEQUAL):
        return Condition("?")
    equal = operator == _EQUAL
    side, _, version = held.partition(" ")
    if held in ("iif", "oif"):
        # A prefix is compared in as many bytes as it has.
        return Condition(held, data.rstrip(b"\0").decode(errors="replace") + ("" if b"\0" in data else "*"), equal)
    if held in ("iif index", "oif index"):
        return Condition(held[:3], "lo", equal) if data == struct.pack("=I", 1) else Condition("?")
    if held == "version":
        return Condition("version", {2: 4, 10: 6}.get(data[0] if data else 0), equal)
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


def _xt_match(values: Mapping[int, bytes]) -> Iterator[Condition]:
    """A match of iptables' own that nftables carries along."""
    name, info = _text(values, 1), values.get(3, b"")
    if name == "conntrack" and _number(values.get(2)) == 3 and len(info) >= _XT_STATE_AT + _XT_STATE.size:
        flags, inverted, state = _XT_STATE.unpack_from(info, _XT_STATE_AT)
        yield Condition("new", bool(state & _NEW), not inverted & 1) if flags == 1 else Condition("?")
    elif name == "state" and len(info) >= 4:
        yield Condition("new", bool(struct.unpack_from("=I", info)[0] & _NEW))
    elif name != "comment":
        yield Condition(name)


def _comment(data: bytes) -> str:
    """From the userdata that nft keeps with a rule: type, length, value; a comment is of type 0."""
    while len(data) >= 2:
        kind, length = data[0], data[1]
        if kind == 0:
            return data[2 : 2 + length].rstrip(b"\0").decode(errors="replace")
        data = data[2 + length :]
    return ""


# -- rules of ours ----------------------------------------------------------------------------------------------------


def ours(chains: tuple[BaseChain, ...], mark: str) -> frozenset[Opening]:
    """The rules that carry our mark: `mark`, a space and the words of the match."""
    return frozenset(
        Opening(chain.family, chain.table, chain.name, tuple(rule.comment.split()[1:]), mark, rule.handle)
        for chain in chains
        if not chain.iptables
        for rule in chain.rules
        if rule.comment.startswith(f"{mark} ")
    )


def pack_insertion(opening: Opening) -> Message:
    """The message that puts a rule at the head of its chain."""
    comment = opening.comment.encode() + b"\0"
    return _message(
        _NEWRULE,
        _NUMBERS[opening.family],
        text(1, opening.table),
        text(2, opening.chain),
        nested(4, nft.pack_expressions((*_expressions(opening.match), nft.ACCEPT))),
        attribute(7, bytes([0, len(comment)]) + comment),
        flags=netlink.CREATE,
    )


def pack_removal(opening: Opening) -> Message:
    handle = attribute(3, struct.pack("!Q", opening.handle))
    return _message(_DELRULE, _NUMBERS[opening.family], text(1, opening.table), text(2, opening.chain), handle)


def _expressions(match: tuple[str, ...]) -> Iterator[Expression]:
    for word, value in zip(match[::2], match[1::2], strict=True):
        if word in ("-i", "-o"):
            yield from nft.match_interface("iifname" if word == "-i" else "oifname", value)
        else:
            yield from nft.match_network(ip_network(value), "saddr" if word == "-s" else "daddr")
