"""Netlink messages in the formats of pyroute2's classes, at the price of a few byte copies.

pyroute2 takes 50 to 300 microseconds for a message, nearly all of it to find out where what belongs. That is the same
for all messages of one *shape*: of one class, with the same attributes of the same lengths. So pyroute2 packs the first
message of a shape; the messages after it are the same bytes with other values in the places of the first one's
(`Writer`). Reading is likewise: the first message of a shape is cut at its attributes' headers, and those after it at
the same places if all these headers are the same bytes (`Reader`). What an attribute's number means, and which fields
precede the attributes, is in pyroute2's class. Its own reading is not used: it logs a traceback where a value
is odd, and does not always return.

The caller says what a value looks like as bytes; for each new shape it is checked that pyroute2 packs the same
(`FormatError`). A *body* is what follows the header of a message (16 bytes, `kernel.netlink.sockets` puts it there) or
of an attribute (4 bytes).
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, TypeAlias

from attrs import frozen

from kilo_etcd.kernel.netlink.formats import core, nh, nla, nlmsg

Converters: TypeAlias = Mapping[str, Callable[[bytes], object]]
"""Attribute, by its name in pyroute2 -> what makes pyroute2's value of its bytes."""

_HEADER = struct.Struct("=" + "".join(form for _, form in nlmsg.header))
_NLA = struct.Struct("=" + "".join(form for _, form in nla.header))
_CELL = struct.Struct("=" + "".join(form for _, form in nh.cell_header))
HEADER = _NLA.size
"""Bytes of an attribute's header."""
_FLAGS = core.NLA_F_NESTED | core.NLA_F_NET_BYTEORDER
_SHAPES = 256
"""Shapes that are remembered for one class; beyond that they are learnt anew."""


UNREADABLE = (ValueError, LookupError, struct.error, OverflowError)
"""What reading a message raises that is not as the kernel has it."""


class FormatError(OSError):
    """pyroute2 has another format than we or the kernel: a change cannot be made, or an answer not be read."""

    def __init__(self, kind: Any = None) -> None:
        # Values may be keys: they are not named.
        subject = "the kernel's answer" if kind is None else f"pyroute2's {kind.__name__}"
        self.detail = f"{subject} has another format than expected"
        super().__init__(errno.EPROTO, self.detail)


def encode(kind: Any, fixed: Sequence[int], attributes: Sequence[tuple[str, object]]) -> bytes:
    """The body of one message or attribute, packed by pyroute2.

    `fixed` are the values of the fields before the attributes, in their order; values are in pyroute2's terms.
    """
    message = kind()
    message.update(zip(_names(kind), fixed, strict=True))
    message["attrs"] = list(attributes)
    message.encode()
    header = _NLA if issubclass(kind, nla) else _HEADER
    return bytes(message.data[header.size : message.length])


def _names(kind: Any) -> list[str]:
    return [name for name, form in kind.fields if form[-1] != "x"]


def layout(kind: Any) -> struct.Struct:
    """The fields before the attributes."""
    # In this machine's byte order throughout: `Writer.form` refuses a field that pyroute2 packs in another.
    return struct.Struct("=" + "".join(form.lstrip("!>=<") for _, form in kind.fields))


def _size(form: str) -> int:
    return struct.calcsize("=" + form.lstrip("!>=<"))


_NUMBERS: Mapping[str, str] = {
    name: getattr(nla, name).fields[0][1]
    for name in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
}
"""Types of pyroute2's that are numbers in the machine's byte order -> their form in `struct`'s terms."""


@cache
def _attributes(kind: Any) -> dict[int, tuple[str, str]]:
    """Type of an attribute -> its name in a class of pyroute2's, and its form if it is a number."""
    numbered = (entry if isinstance(entry[0], int) else (number, *entry) for number, entry in enumerate(kind.nla_map))
    return {number: (name, _NUMBERS.get(of, "")) for number, name, of, *_ in numbered}


def _slots(kind: Any, body: bytes) -> list[tuple[str, int, int]]:
    """Name, start and end of each attribute's value in a body; the last one may be cut short. A name that pyroute2 does
    not know is empty."""
    attributes, slots = _attributes(kind), []
    at, end = layout(kind).size, len(body)
    while at + _NLA.size <= end:
        length, number = _NLA.unpack_from(body, at)
        if length < _NLA.size:
            break
        slots.append((attributes.get(number & ~_FLAGS, ("", ""))[0], at + _NLA.size, min(at + length, end)))
        at += length + -length % nla.align
    return slots


def cells(value: bytes) -> list[bytes]:
    """The bodies of structures that stand in a row, each after its own length, as the next hops of a route do.
    ValueError: a length is none."""
    bodies, at = [], 0
    while at + _CELL.size <= len(value):
        (length,) = _CELL.unpack_from(value, at)
        if length < _CELL.size:
            raise ValueError(f"{length} is no length of a structure")
        bodies.append(value[at + _CELL.size : at + length])
        at += length + -length % nla.align
    return bodies


def read(kind: Any, body: bytes) -> dict[str, bytes]:
    """The values of a body's attributes by their names; for what is read seldom. `Reader` is for all else."""
    return {name: body[start:end] for name, start, end in _slots(kind, body)}


def _number(value: bytes) -> object:
    return int.from_bytes(value, sys.byteorder)


class Form:
    """A body whose values are still to be filled in."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[bytes]) -> None:
        """`parts`: by turns what is always the same, and the place of a value."""
        self.parts = parts

    def __call__(self, *values: bytes) -> bytes:
        """The body with these values, the class's fields being the first; they have the lengths of the shape."""
        parts = self.parts.copy()
        parts[1::2] = values
        return b"".join(parts)


class Writer:
    """Packs bodies of one class of pyroute2's, a message's or an attribute's.

    `converters` are for the attributes that it may have; pyroute2 is given numbers as such, and bytes for what else has
    none.
    """

    def __init__(self, kind: Any, converters: Converters) -> None:
        self._kind = kind
        numbers = {name: _number for name, form in _attributes(kind).values() if form}
        self._converters = {**numbers, **converters}
        self._fixed = layout(kind)
        self._forms: dict[tuple[object, ...], Form] = {}
        """Names and lengths of the attributes -> form."""

    def __call__(self, fixed: Sequence[int], attributes: Mapping[str, bytes]) -> bytes:
        """The body. `fixed` as in `encode`; `attributes` are in the order in which they are packed. FormatError:
        pyroute2 has another format."""
        values = attributes.values()
        shape = (*attributes, *map(len, values))
        form = self._forms.get(shape)
        if form is None:
            form = self.form(fixed, attributes)
            if len(self._forms) >= _SHAPES:
                self._forms.clear()
            self._forms[shape] = form
        # As `form` does, a call less: there are 10,000 routes.
        parts = form.parts.copy()
        parts[1::2] = (self._fixed.pack(*fixed), *values)
        return b"".join(parts)

    def form(self, fixed: Sequence[int], attributes: Mapping[str, bytes]) -> Form:
        """The form that a body of this shape has, to be filled in again and again."""
        convert = self._converters
        head = self._fixed.pack(*fixed)
        try:
            body = encode(
                self._kind, fixed, [(name, convert.get(name, bytes)(value)) for name, value in attributes.items()]
            )
            slots = _slots(self._kind, body)
        except Exception:  # of any kind: what pyroute2 makes of a value that it does not like is nowhere said
            raise FormatError(self._kind) from None
        packed = [(name, body[start:end]) for name, start, end in slots]
        if packed != list(attributes.items()) or body[: self._fixed.size] != head:
            raise FormatError(self._kind)
        parts = [b"", b""]
        at = self._fixed.size
        for _, start, end in slots:
            parts += (body[at:start], b"")
            at = end
        return Form([*parts, body[at:]])


@frozen
class Container:
    """An attribute that holds attributes: those of a nested class, or the elements of a list."""

    type: int
    element: int
    """The type of a list's elements; 0 where it is no list."""

    @classmethod
    def of(cls, kind: Any, name: str) -> Container:
        """The container `name` of a class of pyroute2's."""
        body = encode(kind, [0] * len(_names(kind)), [(name, [{"attrs": []}])])
        return cls(*(_NLA.unpack_from(body, at)[1] for at in (len(body) - 2 * _NLA.size, len(body) - _NLA.size)))

    def __call__(self, *elements: bytes) -> bytes:
        """The container, whole, with these bodies as its elements."""
        return self.whole([attribute(self.element, element) for element in elements])

    def whole(self, elements: Sequence[bytes]) -> bytes:
        """As `__call__`, with elements that have their headers."""
        return attribute(self.type, b"".join(elements))

    def element_form(self, form: Form, *values: bytes) -> Form:
        """The form of a whole element, with its header; `values` are of the right lengths."""
        body = form(*values)
        first, *rest, last = form.parts
        return Form([_NLA.pack(HEADER + len(body), self.element) + first, *rest, last + bytes(-len(body) % nla.align)])


def attribute(kind: int, body: bytes) -> bytes:
    """An attribute with its header and the padding behind it."""
    return _NLA.pack(_NLA.size + len(body), kind) + body + bytes(-len(body) % nla.align)


def elements(body: bytes) -> Iterator[bytes]:
    """The bodies of a list's elements."""
    at, end = 0, len(body)
    while at + _NLA.size <= end:
        length = _NLA.unpack_from(body, at)[0]
        if length < _NLA.size:
            return
        yield body[at + _NLA.size : at + length]
        at += length + -length % nla.align


_Values: TypeAlias = Callable[[bytes], tuple[Any, ...]]
_Shape: TypeAlias = tuple[_Values, tuple[bytes, ...], _Values, Callable[[tuple[Any, ...]], tuple[Any, ...]]]
"""How to cut out the attributes' headers, what they are, how to cut out the values, and to put them in order."""
_MISSING = (None,)


class Reader:
    """Reads bodies of one class of pyroute2's, a message's or an attribute's.

    `wanted` are the fields and attributes whose values are handed out, by their names in pyroute2. Numbers in the
    machine's byte order are numbers, all else is bytes. LookupError: pyroute2 has none of that name.
    """

    def __init__(self, kind: Any, *wanted: str) -> None:
        self._kind = kind
        self._wanted = wanted
        self._size = layout(kind).size
        self._numbers = {name: form for name, form in _attributes(kind).values() if name in wanted}
        """Attribute -> its form in `struct`'s terms, if it is a number; else empty."""
        self._fields = [name for name in _names(kind) if name in wanted]
        # A field in another byte order cannot be wanted: struct refuses it here.
        self._head = struct.Struct(
            "=" + "".join(form if name in wanted else f"{_size(form)}x" for name, form in kind.fields)
        ).format
        if unknown := set(wanted).difference(self._fields, self._numbers):
            raise LookupError(f"pyroute2's {kind.__name__} has no {', '.join(sorted(unknown))}")
        self._shapes: dict[int, list[_Shape]] = {}
        """Length of a body -> its shapes."""
        self._number = 0

    def __call__(self, body: bytes) -> dict[str, Any]:
        """What is there of what is wanted, by its name. Errors as of `row`."""
        return {name: value for name, value in zip(self._wanted, self.row(body), strict=True) if value is not None}

    def row(self, body: bytes) -> tuple[Any, ...]:
        """What is wanted, in that order; None for an attribute that is not there. Of one that comes twice the last one
        counts. ValueError: it is no such message."""
        for cut_headers, headers, cut_values, order in self._shapes.get(len(body), ()):
            if cut_headers(body) == headers:
                return order(cut_values(body) + _MISSING)
        shape = self._learn(body)
        if self._number >= _SHAPES:
            self._shapes.clear()
            self._number = 0
        self._number += 1
        self._shapes.setdefault(len(body), []).append(shape)
        return shape[3](shape[2](body) + _MISSING)

    def _learn(self, body: bytes) -> _Shape:
        at = self._size
        if len(body) < at:
            raise ValueError(f"{len(body)} bytes are too few for {self._kind.__name__}")
        headers_at, values_at = f"={at}x", self._head
        names, headers = self._fields.copy(), []
        for name, start, end in _slots(self._kind, body):
            gap = start - _NLA.size - at
            headers_at += f"{gap}x{_NLA.size}s{end - start}x"
            values_at += f"{gap + _NLA.size}x" + (
                self._form(name, end - start) if name in self._numbers else f"{end - start}x"
            )
            headers.append(body[start - _NLA.size : start])
            names += [name] if name in self._numbers else []
            at = end
        rest = len(body) - at
        values_at += f"{rest}x"
        gap = -at % nla.align if headers else 0
        if rest - gap >= _NLA.size:
            # No header, which it would be in a message of another shape.
            headers_at += f"{gap}x{_NLA.size}s"
            headers.append(body[at + gap : at + gap + _NLA.size])
            rest -= gap + _NLA.size
        places = {name: place for place, name in enumerate(names)}
        return (
            struct.Struct(f"{headers_at}{rest}x").unpack,
            tuple(headers),
            struct.Struct(values_at).unpack,
            _in_order([places.get(name, -1) for name in self._wanted]),
        )

    def _form(self, name: str, length: int) -> str:
        form = self._numbers[name]
        if form and _size(form) != length:
            raise ValueError(f"{name} of {self._kind.__name__} has {length} bytes")
        return form or f"{length}s"


def _in_order(places: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return itemgetter(*places)
