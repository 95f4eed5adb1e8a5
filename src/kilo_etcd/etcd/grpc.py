"""gRPC's own rules, sans-io: framing, request headers, status, and what a status of etcd's means to a caller.

A status becomes an exception of `api` here and nowhere else.
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md is the source of the framing and of the codes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from urllib.parse import unquote_to_bytes

from attrs import frozen

from .api import BadRequest, Compacted, EtcdError, Full, LeaseNotFound, PermissionDenied, Unauthenticated, Unavailable

OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = range(6)
ALREADY_EXISTS, PERMISSION_DENIED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE = range(6, 12)
UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS, UNAUTHENTICATED = range(12, 17)

_PREFIX = struct.Struct(">BI")
MESSAGE_MAX = 1 << 30
"""Bytes: larger than any answer of etcd; a length above it is garbage."""

Metadata = tuple[tuple[str, str], ...]


class TransportFailed(Exception):
    """The way to the member failed. `processed` False: the request certainly was not acted upon; anyone may retry."""

    def __init__(self, reason: str, *, processed: bool = True, permanent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.processed = processed
        self.permanent = permanent


class StatusError(Exception):
    """etcd's answer was a status other than OK."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} (gRPC status {code})")
        self.code = code
        self.message = message

    @property
    def leaves_member(self) -> bool:
        """Whether another member may do better."""
        return self.code in (UNAVAILABLE, DEADLINE_EXCEEDED) or (
            self.code == RESOURCE_EXHAUSTED and "too many requests" in self.message
        )

    @property
    def token_refused(self) -> bool:
        """Whether a new token helps. etcd has then not acted on the request, whatever it was."""
        return (
            self.code == UNAUTHENTICATED
            or "invalid auth token" in self.message
            or "revision of auth store is old" in self.message
        )


def frame(message: bytes) -> bytes:
    """A message as gRPC sends it: a byte for "not compressed" and the length before it."""
    return _PREFIX.pack(0, len(message)) + message


class Deframer:
    """Cuts a byte stream into messages. Raises TransportFailed at what is not gRPC."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take the next bytes of the stream, and give the messages that they complete."""
        self._buffer += data
        # Parsed at once, not lazily: what has been fed is never half taken.
        messages = []
        start = 0
        while len(self._buffer) - start >= _PREFIX.size:
            compressed, length = _PREFIX.unpack_from(self._buffer, start)
            if compressed or length > MESSAGE_MAX:
                raise TransportFailed("the answer is not a gRPC message that this client asked for")
            end = start + _PREFIX.size + length
            if len(self._buffer) < end:
                break
            messages.append(bytes(memoryview(self._buffer)[start + _PREFIX.size : end]))
            start = end
        if start:
            del self._buffer[:start]
        return iter(messages)

    @property
    def pending(self) -> int:
        """Bytes of a message that is not complete."""
        return len(self._buffer)


def request_headers(path: str, *, authority: str, tls: bool, metadata: Metadata = ()) -> list[tuple[str, str]]:
    """The headers that begin a gRPC call of `path`, with those of `metadata` behind them."""
    return [
        (":method", "POST"),
        (":scheme", "https" if tls else "http"),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "kilo-etcd"),
        *metadata,
    ]


def status_of(headers: Iterable[tuple[bytes, bytes]]) -> StatusError | None:
    """The status in trailers; None is OK. Trailers without one are a failure of what stands between."""
    by_name = dict(headers)
    raw = by_name.get(b"grpc-status")
    message = unquote_to_bytes(by_name.get(b"grpc-message", b"")).decode(errors="replace")
    if raw is None:
        return StatusError(UNKNOWN, "the answer ended without a gRPC status")
    code = int(raw) if raw.isdigit() else UNKNOWN
    return None if code == OK else StatusError(code, message)


def check_response(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise TransportFailed unless these are the first headers of a gRPC answer."""
    by_name = dict(headers)
    status, kind = by_name.get(b":status", b"?"), by_name.get(b"content-type", b"")
    if status != b"200" or not kind.startswith(b"application/grpc"):
        raise TransportFailed(
            f"it is not etcd that answers there (HTTP status {status.decode()}, content type {kind.decode() or 'none'})"
        )


@frozen
class Doing:
    """What a call was for, to word its error: `Doing("write", b"/kilo/x")`."""

    verb: str
    key: bytes | None = None

    def __str__(self) -> str:
        return self.verb if self.key is None else f"{self.verb} {self.key.decode(errors='backslashreplace')!r}"


def to_error(status: StatusError, doing: Doing, *, endpoint: str, user: str | None) -> EtcdError:
    """The exception for a status: one sentence for the operator, which ends with what to do where that is known."""
    code, result = status.code, status.message.removeprefix("etcdserver: ")
    subject = f"user {user!r}" if user else "this client"
    if "user name is empty" in result:
        return Unauthenticated(f"etcd at {endpoint} has authentication on: give a user and password (--user)")
    if "authentication failed" in result:
        return Unauthenticated(f"etcd at {endpoint} refused {subject}: wrong password or no such user; check --user")
    if status.token_refused:
        return Unauthenticated(f"etcd at {endpoint} does not accept the token it gave {subject} ({result})")
    if code == PERMISSION_DENIED or "permission denied" in result:
        return PermissionDenied(
            f"{subject} may not {doing} in etcd at {endpoint}: grant it with etcdctl role grant-permission"
        )
    if "has been compacted" in result:
        return Compacted(0)
    if "lease not found" in result:
        return LeaseNotFound(f"etcd at {endpoint} has no such lease (expired or revoked): could not {doing}")
    if "database space exceeded" in result:
        return Full(
            f"etcd at {endpoint} is full ({result}): could not {doing}; compact, defragment, then etcdctl alarm disarm"
        )
    if status.leaves_member or code in (CANCELLED, ABORTED, INTERNAL):
        return Unavailable(f"etcd at {endpoint} could not {doing}: {result}; retry")
    if code in (INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, OUT_OF_RANGE, RESOURCE_EXHAUSTED):
        return BadRequest(f"etcd at {endpoint} refused to {doing}: {result}")
    return EtcdError(f"etcd at {endpoint} could not {doing}: {result} (gRPC status {code})")
