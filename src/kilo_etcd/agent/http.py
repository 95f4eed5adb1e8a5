"""A small HTTP/1.1 server for `--listen`: one GET or HEAD a connection, answered by a function.

It promises the agent that no client can exhaust it. At most `MOST_CONNECTIONS` are open at once. Each has `DEADLINE`
seconds for its request and the answer together, and `MOST_HEAD` bytes for the request line and headers. One connection
too many closes another one at once: the oldest of the source that has most of them, so a source that opens many pushes
out its own, and a scrape or health check still gets in. The last descriptors that the process may have are never taken
(`kilo_etcd.base.descriptors`).

It refuses what Prometheus and health checks do not need: request bodies, a second request, TLS.
"""

from __future__ import annotations

import ipaddress
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

import trio
from attrs import define, field, frozen

from kilo_etcd.agent.config import ListenAddress
from kilo_etcd.base import descriptors
from kilo_etcd.runtime.logs import get_logger

MOST_CONNECTIONS = 16
DEADLINE = 5.0
"""Seconds from a connection's first moment to the last byte of its answer."""
MOST_HEAD = 8192
"""Bytes of the request line and all headers."""
PACE = 0.002
"""Seconds between two connections that are taken while others have to go for them."""
SHORT_PAUSE = 0.2
"""Seconds until the next connection is taken while descriptors are short."""
_LISTEN_QUEUE = 128
_IP_FREEBIND = 15
"""Which neither Python nor pyroute2 has (linux/in.h)."""


@frozen
class Request:
    """One request, as far as it decides about the answer; a body is ignored."""

    method: str
    path: str
    """Without the query."""
    headers: Mapping[str, str]
    """Names in lower case."""


@frozen
class Answer:
    """The response to one request. `body` is sent unchanged, after a header with its length."""

    status: str
    """Number and reason: `200 OK`."""
    body: bytes
    content_type: str = "text/plain; charset=utf-8"

    @classmethod
    def line(cls, status: str, text: str) -> Answer:
        """One line of text."""
        return cls(status, (text + "\n").encode())

    def pack(self, *, head_only: bool = False) -> bytes:
        """The bytes of the answer."""
        head = (
            f"HTTP/1.1 {self.status}\r\nContent-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode("latin-1") + (b"" if head_only else self.body)


BAD_REQUEST = Answer.line("400 Bad Request", "this is no HTTP request")
TOO_LARGE = Answer.line(
    "431 Request Header Fields Too Large", f"request line and headers have {MOST_HEAD} bytes at most"
)
WRONG_METHOD = Answer.line("405 Method Not Allowed", "only GET and HEAD are answered")

FAILED = Answer.line("500 Internal Server Error", "this could not be answered; the agent's log says why")


def parse(head: bytes) -> Request | None:
    """The request whose line and headers these are; None: it is none."""
    first, *rest = head.decode("latin-1").replace("\r\n", "\n").split("\n")
    words = first.split(" ")
    if len(words) != 3 or not words[0].isalpha() or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
        return None
    headers: dict[str, str] = {}
    for line in rest:
        name, colon, value = line.partition(":")
        if line and (not colon or not name or name != name.strip()):
            return None
        headers[name.lower()] = value.strip()
    return Request(words[0], words[1].partition("?")[0], headers)


@define(eq=False)
class _Connection:
    source: str
    scope: trio.CancelScope = field(factory=trio.CancelScope)


def _source(address: str) -> str:
    """The source that a connection counts for: an IPv4 address, or the /64 of an IPv6 address, of which a host has as
    many as it likes."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def listen(address: ListenAddress) -> trio.socket.SocketType:
    """A listening socket. OSError."""
    host = address.host or ("::" if _has_ipv6() else "0.0.0.0")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    plain = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            plain.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # The mesh address may be listened on although the agent has yet to make it.
        with suppress(OSError):
            plain.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
        plain.bind((host, address.port))
        plain.listen(_LISTEN_QUEUE)
        return trio.socket.from_stdlib_socket(plain)
    except BaseException:
        plain.close()
        raise


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        if descriptors.is_shortage(error):
            raise
        return False
    return True


class Server:
    """Answers by `answer` what comes to `listener`, a socket of `listen`."""

    def __init__(self, listener: trio.socket.SocketType, answer: Callable[[Request], Answer]) -> None:
        self._listener = listener
        self._answer = answer
        self._open: dict[_Connection, None] = {}
        """In the order of their coming."""

    @property
    def connections(self) -> int:
        """How many connections are open now, those that have asked for nothing yet among them."""
        return len(self._open)

    async def run(self) -> None:
        """Answer until cancelled."""
        with self._listener:
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        stream, address = await self._listener.accept()
                    except OSError:
                        # No descriptor, or the client has gone already.
                        await trio.sleep(SHORT_PAUSE)
                        continue
                    short = stream.fileno() >= descriptors.limit() - descriptors.RESERVE
                    connection = _Connection(_source(str(address[0])))
                    crowded = self._make_room(connection, 1 if short else MOST_CONNECTIONS)
                    self._open[connection] = None
                    nursery.start_soon(self._serve, stream, connection)
                    if crowded:
                        await trio.sleep(SHORT_PAUSE if short else PACE)

    def _make_room(self, newcomer: _Connection, most: int) -> bool:
        """Close connections until `newcomer` has a place among `most`; whether any had to go."""
        crowded = False
        while len(self._open) >= most:
            counts = Counter(connection.source for connection in self._open)
            counts[newcomer.source] += 1
            # On a tie the newcomer's own source gives way: others' requests are not cut off for it.
            loser = max(counts, key=lambda source: (counts[source], source == newcomer.source))
            oldest = next(
                (connection for connection in self._open if connection.source == loser), next(iter(self._open))
            )
            oldest.scope.cancel()
            del self._open[oldest]
            crowded = True
        return crowded

    async def _serve(self, stream: trio.socket.SocketType, connection: _Connection) -> None:
        try:
            # A client that hung up or was too slow is no event.
            with stream, suppress(OSError), connection.scope, trio.move_on_after(DEADLINE):
                await self._exchange(stream)
        finally:
            self._open.pop(connection, None)

    async def _exchange(self, stream: trio.socket.SocketType) -> None:
        head = await _head(stream)
        if head is None:
            return
        request = parse(head) if len(head) <= MOST_HEAD else None
        if len(head) > MOST_HEAD:
            answer = TOO_LARGE
        elif request is None:
            answer = BAD_REQUEST
        elif request.method not in ("GET", "HEAD"):
            answer = WRONG_METHOD
        else:
            try:
                answer = self._answer(request)
            except Exception as error:  # Whatever is wrong with a number, the agent goes on.
                get_logger().error("a request to --listen could not be answered", path=request.path, error=repr(error))
                answer = FAILED
        for part in _parts(answer.pack(head_only=request is not None and request.method == "HEAD")):
            await _send_all(stream, part)
        stream.shutdown(socket.SHUT_WR)
        # What the client had still to say must not become a reset that takes the answer from it.
        while await stream.recv(4096):
            pass


async def _head(stream: trio.socket.SocketType) -> bytes | None:
    """Request line and headers; more than MOST_HEAD bytes where they are too long, None where the client went away."""
    data = bytearray()
    while len(data) <= MOST_HEAD:
        part = await stream.recv(4096)
        if not part:
            return None
        data += part
        for end in (b"\r\n\r\n", b"\n\n"):
            if (place := data.find(end)) >= 0 and place <= MOST_HEAD:
                return bytes(data[:place])
    return bytes(data)


def _parts(data: bytes, size: int = 65536) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : start + size] for start in range(0, len(view), size))


async def _send_all(stream: trio.socket.SocketType, data: memoryview) -> None:
    while data:
        data = data[await stream.send(data) :]
