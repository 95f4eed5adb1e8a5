"""Netlink sockets: batches with one acknowledgement, dumps, events. What the messages say is elsewhere.

The sockets are plain and blocking: the kernel handles a request within `sendto`, so there is nothing to wait for
but locks. They are not bound to a thread; `kernel.linux` uses them in a worker thread, one call at a time. Why not
pyroute2's: docs/decisions/0027.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from ctypes import addressof, create_string_buffer
from typing import TypeVar

from attrs import evolve, frozen

from kilo_etcd.kernel.errors import NetlinkError
from kilo_etcd.kernel.netlink import formats
from kilo_etcd.kernel.netlink.codec import UNREADABLE, FormatError, Reader
from kilo_etcd.kernel.netlink.formats import (
    I32,
    NETLINK_CAP_ACK,
    SO_RCVBUFFORCE,
    SO_SNDBUFFORCE,
    core,
    nlmsg,
    nlmsgerr,
    refusal,
)

ACK, DUMP, REQUEST = core.NLM_F_ACK, core.NLM_F_DUMP, core.NLM_F_REQUEST

_HEADER = struct.Struct("=" + "".join(form for _, form in nlmsg.header))
_OPTIONS = (NETLINK_CAP_ACK, core.NETLINK_EXT_ACK, core.NETLINK_GET_STRICT_CHK)
_ERROR, _DONE = core.NLMSG_ERROR, core.NLMSG_DONE
_refusals, _ends = Reader(refusal, "NLMSGERR_ATTR_MSG"), Reader(nlmsgerr, "NLMSGERR_ATTR_MSG")
"""The answer to a request, and the end of a dump."""
T = TypeVar("T")

_BATCH = 64
"""Messages per send: as many refusals must fit the receive buffer."""
_BATCH_BYTES = 1 << 16
"""Bytes per send, unless one message is larger: the send buffer has 208 KiB by default; more is refused whole."""
_REQUESTS = 16
"""Requests per send: each answer takes up to 8 KiB of the receive buffer."""
_ATTEMPTS = 3
"""Dumps at most, while somebody goes on changing what is read."""
_HIGHEST = 1 << 31
"""A message's number has 32 bits; beyond this one they begin again."""
_PADDING = [bytes(-length % nlmsg.align) for length in range(nlmsg.align)]
_DEADLINE = 10.0
"""Seconds to wait for an answer; the kernel gives it at once unless it is badly stuck."""


@frozen
class NetlinkMessage:
    """One message: its type, its flags, and all that follows the netlink header."""

    type: int
    flags: int
    body: bytes


def _read(read: Callable[[bytes], T], body: bytes) -> T:
    try:
        return read(body)
    except UNREADABLE:
        raise FormatError from None


def messages(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    """(type, flags, sequence, port, body) of each message in a datagram. FormatError: it is cut off, or none."""
    offset, end = 0, len(data)
    while offset < end:
        if end - offset < _HEADER.size:
            raise FormatError
        length, kind, flags, sequence, port = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= length <= end - offset:
            raise FormatError
        yield kind, flags, sequence, port, data[offset + _HEADER.size : offset + length]
        offset += length + -length % nlmsg.align


def _error(flags: int, body: bytes, read: Reader) -> NetlinkError | None:
    """What an acknowledgement, or the end of a dump, says; None: all is well. FormatError: it cannot be read."""
    try:
        code = -I32.unpack_from(body)[0]
        if code == 0:
            return None
        detail = read(body).get("NLMSGERR_ATTR_MSG", b"") if flags & core.NLM_F_ACK_TLVS else b""
    except UNREADABLE:
        raise FormatError from None
    return NetlinkError(code, detail.rstrip(b"\0").decode(errors="replace"))


class Socket:
    """A netlink socket of one protocol (NETLINK_ROUTE, ...)."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        for option in _OPTIONS:
            try:
                self._socket.setsockopt(core.SOL_NETLINK, option, 1)
            except OSError:
                continue  # older kernels go without: dumps are filtered here as well
        self._socket.bind((0, 0))
        self._socket.settimeout(_DEADLINE)
        self._sequence = 0
        self._buffer = bytearray(1 << 18)

    def close(self) -> None:
        """Close the socket; the kernel forgets what has not been read."""
        self._socket.close()

    def __repr__(self) -> str:
        return f"<netlink.Socket fd={self._socket.fileno()} sequence={self._sequence}>"

    def send(self, batch: Sequence[NetlinkMessage]) -> list[NetlinkError | None]:
        """Send messages and wait until the kernel has done them all: an error, or None, for each in the same order."""
        results: list[NetlinkError | None] = []
        part: list[NetlinkMessage] = []
        size = 0
        for message in batch:
            if part and (len(part) == _BATCH or size + len(message.body) > _BATCH_BYTES):
                results.extend(self._send(part))
                part, size = [], 0
            part.append(message)
            size += _HEADER.size + len(message.body)
        if part:
            results.extend(self._send(part))
        return results

    def _send(self, batch: Sequence[NetlinkMessage]) -> list[NetlinkError | None]:
        """The kernel does them in their order and tells of each that it refuses; only the last asks for an
        acknowledgement."""
        last = len(batch) - 1
        first = self._submit(batch, last)
        results: list[NetlinkError | None] = [None] * len(batch)
        place = -1
        while place != last:
            for kind, flags, sequence, _, body in messages(self._receive()):
                if kind == _ERROR and 0 <= sequence - first <= last:
                    place = sequence - first
                    results[place] = _error(flags, body, _refusals)
        return results

    def transact(self, batch: Sequence[NetlinkMessage]) -> None:
        """Send netfilter's messages between a begin and an end, done all or none. NetlinkError: the first refusal."""
        last = len(batch) - 2
        first = self._submit(batch, last)
        while True:
            for kind, flags, sequence, _, body in messages(self._receive()):
                if kind == _ERROR and 0 <= sequence - first <= last + 1:
                    if (error := _error(flags, body, _refusals)) is not None:
                        raise error
                    if sequence - first == last:
                        return

    @property
    def port(self) -> int:
        """The kernel's number for this socket."""
        return int(self._socket.getsockname()[0])

    def ask(self, requests: Sequence[NetlinkMessage], read: Callable[[bytes], T]) -> list[T | NetlinkError]:
        """What `read` makes of the one answer to each request, or why it was refused, in the same order. FormatError if
        it cannot read one."""
        answers: list[T | NetlinkError] = []
        for start in range(0, len(requests), _REQUESTS):
            answers.extend(self._ask(requests[start : start + _REQUESTS], read))
        return answers

    def _ask(self, requests: Sequence[NetlinkMessage], read: Callable[[bytes], T]) -> list[T | NetlinkError]:
        first = self._submit(requests)
        answers: dict[int, T | NetlinkError] = {}
        while len(answers) < len(requests):
            for kind, flags, sequence, _, body in messages(self._receive()):
                place = sequence - first
                if not 0 <= place < len(requests):
                    continue
                if kind != _ERROR:
                    answers[place] = _read(read, body)
                elif (error := _error(flags, body, _refusals)) is not None:
                    answers[place] = error
        return [answers[place] for place in range(len(requests))]

    def get(self, message: NetlinkMessage, read: Callable[[bytes], T]) -> T:
        """What `read` makes of the one answer to a request. NetlinkError if it was refused."""
        (answer,) = self.ask([message], read)
        if isinstance(answer, NetlinkError):
            raise answer
        return answer

    def dump(self, message: NetlinkMessage, keep: Callable[[bytes], None]) -> None:
        """Hand the body of each message of a dump to `keep`. FormatError if it cannot read one.

        A dump during which the kernel changed may lack what did not change: it is begun anew, and only the last of
        several such is taken as it is; whoever goes on changing causes events.
        """
        for _ in range(_ATTEMPTS):
            bodies: list[bytes] = []
            if self._dump(message, bodies):
                break
        for body in bodies:
            _read(keep, body)

    def _dump(self, message: NetlinkMessage, bodies: list[bytes]) -> bool:
        """Whether nothing changed meanwhile."""
        expected = self._submit([evolve(message, flags=message.flags | DUMP)])
        interrupted = 0
        while True:
            for kind, flags, sequence, _, body in messages(self._receive()):
                if sequence != expected:
                    continue
                interrupted |= flags & core.NLM_F_DUMP_INTR
                if kind not in (_DONE, _ERROR):
                    bodies.append(body)
                    continue
                # An old kernel's end says nothing more.
                if body and (error := _error(flags, body, _ends if kind == _DONE else _refusals)) is not None:
                    raise error
                return not interrupted

    def _submit(self, batch: Sequence[NetlinkMessage], acknowledged: int = -1) -> int:
        """Send messages at once; the number of the first one, which the others follow. `acknowledged` is the place of
        the one that the kernel is to acknowledge."""
        if self._sequence > _HIGHEST:
            self._sequence = 0
        first = self._sequence + 1
        self._sequence += len(batch)
        parts: list[bytes] = []
        for place, message in enumerate(batch):
            body = message.body
            length = _HEADER.size + len(body)
            flags = message.flags | REQUEST | (ACK if place == acknowledged else 0)
            parts += (_HEADER.pack(length, message.type, flags, first + place, 0), body, _PADDING[length % nlmsg.align])
        data = b"".join(parts)
        try:
            self._socket.sendto(data, (0, 0))
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            # A transaction of a large table, which cannot be sent in parts.
            _enlarge(self._socket, socket.SO_SNDBUF, SO_SNDBUFFORCE, len(data))
            self._socket.sendto(data, (0, 0))
        return first

    def _receive(self) -> bytes:
        try:
            size = self._socket.recv_into(self._buffer)
        except TimeoutError:
            raise NetlinkError(errno.ETIMEDOUT, f"the kernel did not answer within {_DEADLINE:g} s") from None
        return bytes(memoryview(self._buffer)[:size])


class Listener:
    """A socket that receives what the kernel reports to multicast groups; never blocks."""

    def __init__(self, groups: Sequence[int], protocol: int = 0) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self.socket.setblocking(False)
        # A burst of foreign routes then costs no resync.
        _enlarge(self.socket, socket.SO_RCVBUF, SO_RCVBUFFORCE, 1 << 22)
        self.socket.bind((0, 0))
        for group in groups:
            self.socket.setsockopt(core.SOL_NETLINK, core.NETLINK_ADD_MEMBERSHIP, group)

    def leave_out(self, port: int, kinds: Sequence[int]) -> None:
        """Leave out messages of two `kinds` that the socket with this number has caused: the kernel drops them
        before they take room here."""
        # A classic BPF program: it loads numbers as the network orders them, which netlink's are not.
        one, other = (socket.htons(kind) for kind in kinds)
        program = (
            (formats.BPF_LOAD_WORD, 0, 0, _HEADER.size - 4),
            (formats.BPF_IF_EQUAL, 0, 4, socket.htonl(port)),
            (formats.BPF_LOAD_HALF, 0, 0, 4),
            (formats.BPF_IF_EQUAL, 1, 0, one),
            (formats.BPF_IF_EQUAL, 0, 1, other),
            (formats.BPF_RETURN, 0, 0, 0),
            (formats.BPF_RETURN, 0, 0, 0xFFFF_FFFF),
        )
        steps = create_string_buffer(b"".join(formats.SOCK_FILTER.pack(*step) for step in program))
        program_struct = formats.SOCK_FPROG.pack(len(program), addressof(steps))
        self.socket.setsockopt(socket.SOL_SOCKET, formats.SO_ATTACH_FILTER, program_struct)

    def read(self) -> list[tuple[int, bytes]] | None:
        """(type, body) of what is waiting; an empty list: nothing is; None: events were lost, or cannot be read."""
        events = self.read_from()
        return None if events is None else [(kind, body) for kind, _, body in events]

    def read_from(self) -> list[tuple[int, int, bytes]] | None:
        """As `read`, with the number of the socket that caused each event: (type, port, body)."""
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return None
            raise
        try:
            return [(kind, port, body) for kind, _, _, port, body in messages(data)]
        except FormatError:
            return None

    def close(self) -> None:
        """Leave the groups and close the socket."""
        self.socket.close()


def _enlarge(of: socket.socket, buffer: int, forced: int, size: int) -> None:
    """Give a socket a buffer of that many bytes, or as many as this process may."""
    try:
        of.setsockopt(socket.SOL_SOCKET, forced, size)
    except OSError:
        of.setsockopt(socket.SOL_SOCKET, buffer, size)


def same_namespace(process: int) -> bool:
    """Whether a process lives in our network namespace; True where that cannot be seen."""
    try:
        theirs, ours = os.stat(f"/proc/{process}/ns/net"), os.stat("/proc/self/ns/net")
    except OSError:
        return True
    return (theirs.st_ino, theirs.st_dev) == (ours.st_ino, ours.st_dev)
