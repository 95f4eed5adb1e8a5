"""Netlink messages in the formats of pyroute2's classes, at the price of a few byte copies.

pyroute2 takes 50 to 300 microseconds for a message, nearly all of it to find out where what belongs. That is the same
for all messages of one *shape*: of one class, with the same attributes of the same lengths. So pyroute2 packs the first
message of a shape; the messages after it are the same bytes with other values in the places of the first one's
(`Writer`). Reading is likewise: the first message of a shape is cut at its attributes' headers, and those after it at
the same places if all these headers are the same bytes (`Reader`). What an attribute's number means, and which fields
stand before the attributes, is said by pyroute2's class. Its own reading is not used: it logs a traceback where a value
is odd, and does not always return.

The caller says what a value looks like as bytes; for each new shape it is checked that pyroute2 packs the same
(`FormatError`). A *body* is what follows the header of a message (16 bytes, `kernel.netlink` puts it there) or of an
attribute (4 bytes).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

from attrs import frozen

from kilo_etcd.kernel.formats import core, nla, nlmsg

Converters: TypeAlias = Mapping[str, Callable[[bytes], object]]
"""Attribute, by its name in pyroute2 -> what makes pyroute2's value of its bytes."""

_HEADER = struct.Struct("=" + "".join(form for _, form in nlmsg.header))
_NLA = struct.Struct("=" + "".join(form for _, form in nla.header))
HEADER = _NLA.size
"""Bytes of an attribute's header."""
_FLAGS = core.NLA_F_NESTED | core.NLA_F_NET_BYTEORDER
_SHAPES = 256
"""Shapes that are remembered for one class; beyond that they are learnt anew."""


UNREADABLE = (ValueError, LookupError, struct.error)
"""What reading a message raises that is not as the kernel has it."""


class FormatError(OSError):
    """pyroute2 has another format than we or the kernel: a change cannot be made, or an answer not be read."""

    def __init__(self, kind: Any = None) -> None:
        # Values may be keys: they are not named.
        told = "the kernel's answer" if kind is None else f"pyroute2's {kind.__name__}"
        self.detail = f"{told} has another format than expected"
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


def _fixed(kind: Any) -> struct.Struct:
    # In this machine's byte order throughout: `Writer.form` refuses a field that pyroute2 packs in another.
    return struct.Struct("=" + "".join(form.lstrip("!>=<") for _, form in kind.fields))


@cache
def _attributes(kind: Any) -> dict[int, str]:
    """Type of an attribute -> its name in a class of pyroute2's."""
    numbered = (each if isinstance(each[0], int) else (number, *each) for number, each in enumerate(kind.nla_map))
    return {number: name for number, name, *_ in numbered}


def _slots(kind: Any, body: bytes) -> list[tuple[str, int, int]]:
    """Name, start and end of each attribute's value in a body; the last one may be cut short. A name that pyroute2 does
    not know is empty."""
    names, slots = _attributes(kind), []
    at, end = _fixed(kind).size, len(body)
    while at + _NLA.size <= end:
        length, number = _NLA.unpack_from(body, at)
        if length < _NLA.size:
            break
        slots.append((names.get(number & ~_FLAGS, ""), at + _NLA.size, min(at + length, end)))
        at += length + -length % nla.align
    return slots


def read(kind: Any, body: bytes) -> dict[str, bytes]:
    """The values of a body's attributes by their names; for what is read seldom. `Reader` is for all else."""
    return {name: body[start:end] for name, start, end in _slots(kind, body)}


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

    `converters` are for the attributes that it may have; pyroute2 is given bytes for one that has none.
    """

    def __init__(self, kind: Any, converters: Converters) -> None:
        self._kind = kind
        self._converters = converters
        self._fixed = _fixed(kind)
        self._forms: dict[tuple[tuple[str, ...], tuple[int, ...]], Form] = {}
        """Names and lengths of the attributes -> form."""

    def __call__(self, fixed: Sequence[int], attributes: Mapping[str, bytes]) -> bytes:
        """The body. `fixed` as in `encode`; `attributes` are in the order in which they are packed. FormatError:
        pyroute2 has another format."""
        values = attributes.values()
        shape = (tuple(attributes), tuple(map(len, values)))
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


_Shape: TypeAlias = tuple[
    Callable[[bytes], tuple[bytes, ...]], tuple[bytes, ...], Callable[[bytes], tuple[Any, ...]], tuple[str, ...]
]
"""How to cut out the attributes' headers, what they are, how to cut out the fields and the wanted values, and their
names."""


class Reader:
    """Reads bodies of one class of pyroute2's, a message's or an attribute's.

    `wanted` are the attributes whose values are handed out, by their names in pyroute2.
    """

    def __init__(self, kind: Any, *wanted: str) -> None:
        self._kind = kind
        self._fixed = _fixed(kind)
        self._wanted = frozenset(wanted)
        self._shapes: dict[int, list[_Shape]] = {}
        """Length of a body -> its shapes."""
        self._number = 0

    def __call__(self, body: bytes) -> dict[str, Any]:
        """The fields (numbers) and the wanted attributes that are there (bytes), by their names; of an attribute that
        comes twice the last one counts. ValueError: it is no such message."""
        for cut_headers, headers, cut_values, names in self._shapes.get(len(body), ()):
            if cut_headers(body) == headers:
                return dict(zip(names, cut_values(body), strict=False))
        if len(body) < self._fixed.size:
            raise ValueError(f"{len(body)} bytes are too few for {self._kind.__name__}")
        if self._number >= _SHAPES:
            self._shapes.clear()
            self._number = 0
        self._number += 1
        shape = self._learn(body)
        self._shapes.setdefault(len(body), []).append(shape)
        return dict(zip(shape[3], shape[2](body), strict=True))

    def _learn(self, body: bytes) -> _Shape:
        headers_at, values_at = f"={self._fixed.size}x", self._fixed.format
        names, headers = _names(self._kind), []
        at = self._fixed.size
        for name, start, end in _slots(self._kind, body):
            gap = start - _NLA.size - at
            headers_at += f"{gap}x{_NLA.size}s{end - start}x"
            values_at += f"{gap + _NLA.size}x{end - start}" + ("s" if name in self._wanted else "x")
            headers.append(body[start - _NLA.size : start])
            names += [name] if name in self._wanted else []
            at = end
        rest = len(body) - at
        values_at += f"{rest}x"
        gap = -at % nla.align if headers else 0
        if rest - gap >= _NLA.size:
            # No header, which it would be in a message of another shape.
            headers_at += f"{gap}x{_NLA.size}s"
            headers.append(body[at + gap : at + gap + _NLA.size])
            rest -= gap + _NLA.size
        return (
            struct.Struct(f"{headers_at}{rest}x").unpack,
            tuple(headers),
            struct.Struct(values_at).unpack,
            tuple(names),
        )
