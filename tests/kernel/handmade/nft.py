"""A table, by linux/netfilter/nf_tables.h and nfnetlink.h."""

from __future__ import annotations

import struct

from handmade.attributes import APPEND, CREATE, attribute, nested, text
from kilo_etcd.kernel.firewall.openings import Opening
from kilo_etcd.kernel.firewall.table import AddElements, AddressSet, DeleteElements, Expression, FirewallTable
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage

_SUBSYSTEM, _INET = 10, 1
_GETCHAIN, _GETRULE, _DELRULE, _GETSETELEM = 4, 7, 8, 13
_FAMILIES = {"inet": 1, "ip": 2, "ip6": 10}
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM, _DELSETELEM, _NEWOBJ = 0, 2, 3, 6, 9, 12, 14, 18
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_KEY_TYPE, _KEY_LENGTH = {4: 7, 6: 8}, {4: 4, 6: 16}
_COUNTER, _ACCEPT = 1, 1
_ELEMENTS = 1000
_PLAIN, _VALUE, _VERDICT = range(3)
_ATTRIBUTES = {
    "meta": {"DREG": (1, _PLAIN), "KEY": (2, _PLAIN), "SREG": (3, _PLAIN)},
    "ct": {"DREG": (1, _PLAIN), "KEY": (2, _PLAIN)},
    "payload": {"DREG": (1, _PLAIN), "BASE": (2, _PLAIN), "OFFSET": (3, _PLAIN), "LEN": (4, _PLAIN)},
    "bitwise": {
        "SREG": (1, _PLAIN), "DREG": (2, _PLAIN), "LEN": (3, _PLAIN), "MASK": (4, _VALUE), "XOR": (5, _VALUE),
    },
    "cmp": {"SREG": (1, _PLAIN), "OP": (2, _PLAIN), "DATA": (3, _VALUE)},
    "lookup": {"SET": (1, _PLAIN), "SREG": (2, _PLAIN), "FLAGS": (5, _PLAIN)},
    "objref": {"IMM_TYPE": (1, _PLAIN), "IMM_NAME": (2, _PLAIN)},
    "immediate": {"DREG": (1, _PLAIN), "DATA": (2, _VERDICT)},
    "immediate value": {"DREG": (1, _PLAIN), "DATA": (2, _VALUE)},
    "masq": {},
    "reject": {"TYPE": (1, _PLAIN), "ICMP_CODE": (2, _PLAIN)},
    "fib": {"DREG": (1, _PLAIN), "RESULT": (2, _PLAIN), "FLAGS": (3, _PLAIN)},
    "rt": {"DREG": (1, _PLAIN), "KEY": (2, _PLAIN)},
    "byteorder": {
        "SREG": (1, _PLAIN), "DREG": (2, _PLAIN), "OP": (3, _PLAIN), "LEN": (4, _PLAIN), "SIZE": (5, _PLAIN),
    },
    "exthdr": {
        "DREG": (1, _PLAIN), "TYPE": (2, _PLAIN), "OFFSET": (3, _PLAIN), "LEN": (4, _PLAIN), "OP": (6, _PLAIN),
        "SREG": (7, _PLAIN),
    },
    "nat": {"TYPE": (1, _PLAIN), "FAMILY": (2, _PLAIN), "REG_ADDR_MIN": (3, _PLAIN)},
}  # fmt: skip
"""Expression -> its attributes: number, and how each is wrapped. `immediate` has two forms under one name: what it puts
into the register of verdicts, and what into others."""
_VERDICT_REGISTER = struct.pack("!i", 0)


def be32(value: int) -> bytes:
    return struct.pack("!i", value)


def _message(kind: int, *body: bytes, flags: int = 0, family: int = _INET) -> NetlinkMessage:
    return NetlinkMessage(_SUBSYSTEM << 8 | kind, flags, struct.pack("=BBH", family, 0, 0) + b"".join(body))


def get_all_chains() -> NetlinkMessage:
    return _message(_GETCHAIN, family=0)


def get_rules_of(table: str, chain: str, family: int) -> NetlinkMessage:
    return _message(_GETRULE, text(1, table), text(2, chain), family=family)


def get_elements(table: str, name: str, family: int) -> NetlinkMessage:
    return _message(_GETSETELEM, text(1, table), text(2, name), family=family)


def insert_rule(opening: Opening, expressions: tuple[Expression, ...]) -> NetlinkMessage:
    comment = opening.comment.encode() + b"\0"
    return _message(
        _NEWRULE, text(1, opening.table), text(2, opening.chain), attribute(7, bytes([0, len(comment)]) + comment),
        nested(4, pack_expressions(expressions)), flags=CREATE, family=_FAMILIES[opening.family],
    )  # fmt: skip


def delete_rule(opening: Opening) -> NetlinkMessage:
    handle = attribute(3, struct.pack("!Q", opening.handle))
    family = _FAMILIES[opening.family]
    return _message(_DELRULE, text(1, opening.table), text(2, opening.chain), handle, family=family)


def pack_table(table: FirewallTable) -> list[NetlinkMessage]:
    """The messages that put a table in the place of what there is of that name."""
    create = CREATE
    name = text(1, table.name)
    messages = [*pack_deletion(table.name), _message(_NEWTABLE, name, flags=create)]
    for counter in table.counters:
        messages.append(
            _message(_NEWOBJ, name, text(2, counter), attribute(3, be32(_COUNTER)), nested(4), flags=create)
        )
    for number, address_set in enumerate(table.sets, 1):
        messages.append(
            _message(
                _NEWSET,
                name,
                text(2, address_set.name),
                attribute(3, be32(0)),
                attribute(4, be32(_KEY_TYPE[address_set.version])),
                attribute(5, be32(_KEY_LENGTH[address_set.version])),
                attribute(10, be32(number)),
                flags=create,
            )
        )
        messages += _pack_elements(_NEWSETELEM, table.name, address_set, create)
    for chain in table.chains:
        hook = nested(4, attribute(1, be32(_HOOKS[chain.hook])), attribute(2, be32(chain.priority)))
        policy = attribute(5, be32(_ACCEPT))
        messages.append(_message(_NEWCHAIN, name, text(3, chain.name), hook, policy, text(7, chain.kind), flags=create))
    for rule in table.rules:
        packed = nested(4, pack_expressions(rule.expressions))
        messages.append(_message(_NEWRULE, name, text(2, rule.chain), packed, flags=create | APPEND))
    return messages


def change_elements(change: AddElements | DeleteElements) -> list[NetlinkMessage]:
    kind, flags = (_NEWSETELEM, CREATE) if isinstance(change, AddElements) else (_DELSETELEM, 0)
    return _pack_elements(kind, change.table, change.set, flags)


def _pack_elements(kind: int, table: str, address_set: AddressSet, flags: int) -> list[NetlinkMessage]:
    addresses = sorted(address_set.addresses, key=int)
    parts = [addresses[start : start + _ELEMENTS] for start in range(0, len(addresses), _ELEMENTS)]
    packed = [nested(3, *(nested(1, nested(1, attribute(1, a.packed))) for a in part)) for part in parts]
    return [_message(kind, text(1, table), text(2, address_set.name), part, flags=flags) for part in packed]


def pack_deletion(name: str) -> list[NetlinkMessage]:
    """The messages that remove a table, whether it is there or not."""
    return [_message(_NEWTABLE, text(1, name), flags=CREATE), _message(_DELTABLE, text(1, name))]


def pack_expressions(expressions: tuple[Expression, ...]) -> bytes:
    return b"".join(
        nested(
            1,
            text(1, name),
            nested(
                2,
                *(_pack(*_ATTRIBUTES[form][each.split("_", 2)[2]], value) for each, value in values),
            ),
        )
        for name, values in expressions
        for form in (_form(name, values),)
    )


def _form(name: str, values: tuple[tuple[str, bytes], ...]) -> str:
    return "immediate value" if name == "immediate" and values[0][1] != _VERDICT_REGISTER else name


def _pack(kind: int, shape: int, value: bytes) -> bytes:
    if shape == _VALUE:
        return nested(kind, attribute(1, value))
    if shape == _VERDICT:
        return nested(kind, nested(2, attribute(1, value)))
    return attribute(kind, value)
