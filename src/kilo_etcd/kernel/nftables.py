"""nftables' expressions as values, packed and read as nfnetlink has them. Pure; the table they make is `firewall`'s.

An expression is its name and those of its attributes that say what it does. The kernel gives back what it was given
with some words of its own; reading takes the attributes that are known and leaves the rest, so that what was read can
be compared with what was meant. What is not known here is read as a name alone, and equals nothing of ours.

Numbers are those of linux/netfilter/nf_tables.h; they are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from kilo_etcd.kernel.netlink import attribute, attributes, nested, text
from kilo_etcd.kernel.table import Expression
from kilo_etcd.model import IPAddress, IPNetwork

_PLAIN, _VALUE, _VERDICT = range(3)
_SHAPES = {
    "meta": {1: _PLAIN, 2: _PLAIN, 3: _PLAIN},
    "ct": {1: _PLAIN, 2: _PLAIN},
    "payload": {1: _PLAIN, 2: _PLAIN, 3: _PLAIN, 4: _PLAIN},
    "bitwise": {1: _PLAIN, 2: _PLAIN, 3: _PLAIN, 4: _VALUE, 5: _VALUE},
    "cmp": {1: _PLAIN, 2: _PLAIN, 3: _VALUE},
    "lookup": {1: _PLAIN, 2: _PLAIN, 5: _PLAIN},
    "objref": {1: _PLAIN, 2: _PLAIN},
    "immediate": {1: _PLAIN, 2: _VERDICT},
    "immediate value": {1: _PLAIN, 2: _VALUE},
    "masq": {1: _PLAIN},
    "reject": {1: _PLAIN, 2: _PLAIN},
}
"""Expression -> its attributes that count, and how each is wrapped. `immediate` has two shapes under one name: what it
puts into the register of verdicts, and what into others."""

_REGISTER = 1
_VERDICT_REGISTER = 0
_MARK, _IIFNAME, _OIFNAME, _NFPROTO, _L4PROTO = 3, 6, 7, 15, 16
_CT_DIRECTION = 1
_FAMILY = {4: 2, 6: 10}
_OFFSET = {(4, "saddr"): 12, (4, "daddr"): 16, (6, "saddr"): 8, (6, "daddr"): 24}
"""Bytes into the network header (RFC 791, RFC 8200)."""
_NETWORK_HEADER = 1
_COUNTER = 1
_LIST_ELEMENT = 1


def be32(value: int) -> bytes:
    return struct.pack("!i", value)


def _string(value: str) -> bytes:
    return value.encode() + b"\0"


def _verdict(code: int) -> Expression:
    return ("immediate", ((1, be32(_VERDICT_REGISTER)), (2, be32(code))))


ACCEPT, DROP, RETURN = _verdict(1), _verdict(0), _verdict(-5)
MASQUERADE: Expression = ("masq", ())
REJECT: Expression = ("reject", ((1, be32(2)), (2, b"\x02")))
"""With an ICMP error of the packet's own family: host unreachable (NFT_REJECT_ICMPX_UNREACH)."""


def _meta(key: int) -> Expression:
    return ("meta", ((1, be32(_REGISTER)), (2, be32(key))))


def _compare(value: bytes, equal: bool = True) -> Expression:
    return ("cmp", ((1, be32(_REGISTER)), (2, be32(not equal)), (3, value)))


def _address(version: int, side: str) -> Iterator[Expression]:
    yield _meta(_NFPROTO)
    yield _compare(bytes([_FAMILY[version]]))
    length = 4 if version == 4 else 16
    offset = _OFFSET[version, side]
    yield ("payload", ((1, be32(_REGISTER)), (2, be32(_NETWORK_HEADER)), (3, be32(offset)), (4, be32(length))))


def match_interface(which: str, name: str, *, equal: bool = True) -> tuple[Expression, ...]:
    """`which`: `iifname` or `oifname`."""
    padded = name.encode().ljust(16, b"\0")
    return _meta(_IIFNAME if which == "iifname" else _OIFNAME), _compare(padded, equal)


def match_protocol(number: int) -> tuple[Expression, ...]:
    return _meta(_L4PROTO), _compare(bytes([number]))


def match_family(version: int) -> tuple[Expression, ...]:
    return _meta(_NFPROTO), _compare(bytes([_FAMILY[version]]))


def match_answer() -> tuple[Expression, ...]:
    """Packets of a connection that the other side opened. The kernel tracks connections as long as a rule asks."""
    return ("ct", ((1, be32(_REGISTER)), (2, be32(_CT_DIRECTION)))), _compare(b"\x01")


def match_mark(mark: int) -> tuple[Expression, ...]:
    return _meta(_MARK), _compare(struct.pack("=I", mark))


def set_mark(mark: int) -> tuple[Expression, ...]:
    value: Expression = ("immediate value", ((1, be32(_REGISTER)), (2, struct.pack("=I", mark))))
    return value, ("meta", ((2, be32(_MARK)), (3, be32(_REGISTER))))


def match_address(address: IPAddress, side: str) -> tuple[Expression, ...]:
    """`side`: `saddr` or `daddr`, as everywhere here."""
    return *_address(address.version, side), _compare(address.packed)


def match_network(network: IPNetwork, side: str) -> tuple[Expression, ...]:
    load = tuple(_address(network.version, side))
    compare = _compare(network.network_address.packed)
    if network.prefixlen == network.max_prefixlen:
        return *load, compare
    mask = network.netmask.packed
    masked: Expression = (
        "bitwise",
        ((1, be32(_REGISTER)), (2, be32(_REGISTER)), (3, be32(len(mask))), (4, mask), (5, bytes(len(mask)))),
    )
    return *load, masked, compare


def match_set(name: str, version: int, side: str) -> tuple[Expression, ...]:
    return *_address(version, side), ("lookup", ((1, _string(name)), (2, be32(_REGISTER)), (5, be32(0))))


def count(name: str) -> tuple[Expression, ...]:
    """Add to the counter of that name."""
    return (("objref", ((1, be32(_COUNTER)), (2, _string(name)))),)


def pack_expressions(expressions: tuple[Expression, ...]) -> bytes:
    return b"".join(
        nested(
            _LIST_ELEMENT,
            text(1, name.partition(" ")[0]),
            nested(2, *(_pack(_SHAPES[name][kind], kind, value) for kind, value in values)),
        )
        for name, values in expressions
    )


def _pack(shape: int, kind: int, value: bytes) -> bytes:
    if shape == _VALUE:
        return nested(kind, attribute(1, value))
    if shape == _VERDICT:
        return nested(kind, nested(2, attribute(1, value)))
    return attribute(kind, value)


def read_expressions(data: bytes) -> tuple[Expression, ...]:
    return tuple(_read(element) for element in elements(data))


def _read(element: bytes) -> Expression:
    outer = attributes(element)
    name = outer.get(1, b"").rstrip(b"\0").decode(errors="replace")
    found = attributes(outer.get(2, b""))
    if name == "immediate" and found.get(1) != be32(_VERDICT_REGISTER):
        name = "immediate value"
    shapes = _SHAPES.get(name, {})
    values = []
    for kind, value in sorted(found.items()):
        if kind not in shapes:
            continue
        if shapes[kind] == _VALUE:
            value = attributes(value).get(1, b"")
        elif shapes[kind] == _VERDICT:
            value = attributes(attributes(value).get(2, b"")).get(1, b"")
        values.append((kind, value))
    return name, tuple(values)


def elements(data: bytes) -> Iterator[bytes]:
    """The contents of a list, whose attributes all have the same number."""
    offset = 0
    while offset + 4 <= len(data):
        (length,) = struct.unpack_from("=H", data, offset)
        if length < 4:
            return
        yield data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
