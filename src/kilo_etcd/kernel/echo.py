"""Echo requests (ping), which any host's kernel answers whether or not an agent runs there.

They need no raw socket: the kernel has datagram sockets for them, for the groups in `net.ipv4.ping_group_range`, and
hands each socket the replies to its own requests only. A call has sockets of its own, so calls do not disturb each
other. Nothing here judges: who did not answer may be gone, far away, or behind a firewall.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress

import trio

from kilo_etcd.model import IPAddress

SPACING = 0.035
"""Seconds between two requests to the same address."""

_KINDS = {
    4: (socket.AF_INET, socket.IPPROTO_ICMP, 8, 0),
    6: (socket.AF_INET6, socket.IPPROTO_ICMPV6, 128, 129),
}
"""Family -> socket family, protocol, type of a request, type of its reply (RFC 792, RFC 4443)."""

_HEADERS = {4: 20, 6: 40}
"""Bytes of an IP header."""

_FORM = struct.Struct("!BBHHH4s")
"""Type, code, checksum and identifier (both the kernel's), sequence number, a token by which our request is known."""


async def ping(
    addresses: Collection[IPAddress], *, times: int = 1, patience: float, first: bool = False, size: int = 0
) -> Mapping[IPAddress, float]:
    """Who of `addresses` answers, and the seconds that it took.

    Up to `times` requests go to each that has not answered yet, and `patience` seconds are waited after the last one;
    with `first` the first answer ends it all. `size`: bytes of each request's IP packet, to see whether large ones
    pass; 0: as few as can be. PermissionError: this process may not ping; OSError: it has no socket to
    do it with.
    """
    answered: dict[IPAddress, float] = {}
    if not addresses:
        await trio.lowlevel.checkpoint()
        return answered
    with ExitStack() as stack:
        sockets: dict[int, socket.socket] = {
            version: stack.enter_context(_open(version)) for version in sorted({one.version for one in addresses})
        }
        token = os.urandom(4)
        sent: dict[tuple[int, int], tuple[IPAddress, float]] = {}
        waiting = dict.fromkeys(addresses)

        def done() -> bool:
            return not waiting or (first and bool(answered))

        def read(version: int) -> None:
            while (number := _reply(sockets[version], version, token)) is not None:
                found = sent.get((version, number))
                if found is not None and found[0] in waiting:
                    del waiting[found[0]]
                    answered[found[0]] = trio.current_time() - found[1]

        async def listen(version: int) -> None:
            while True:
                await trio.lowlevel.wait_readable(sockets[version])
                read(version)
                if done():
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for version in sockets:
                nursery.start_soon(listen, version)
            for turn in range(times):
                for address in list(waiting):
                    number = len(sent) & 0xFFFF
                    sent[address.version, number] = (address, trio.current_time())
                    _request(sockets[address.version], address, number, token, size)
                await trio.sleep(SPACING if turn + 1 < times else patience)
            nursery.cancel_scope.cancel()
        # What came while this process was kept from running came all the same.
        for version in sockets:
            read(version)
    return answered


def _open(version: int) -> socket.socket:
    family, protocol, _, _ = _KINDS[version]
    return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)


def _request(out: socket.socket, address: IPAddress, number: int, token: bytes, size: int) -> None:
    kind = _KINDS[address.version][2]
    message = _FORM.pack(kind, 0, 0, 0, number, token)
    # Whatever keeps it from leaving (no route, a firewall, a WireGuard peer that is not there or has no endpoint):
    # nobody will answer it.
    with suppress(OSError):
        out.sendto(message.ljust(size - _HEADERS[address.version], b"\0"), (str(address), 0))


def _reply(source: socket.socket, version: int, token: bytes) -> int | None:
    """The number of the next request that was answered; None: no more has come."""
    kind = _KINDS[version][3]
    while True:
        try:
            data = source.recv(256)
        except BlockingIOError:
            return None
        except OSError:
            continue  # A router's word that somebody cannot be reached.
        with suppress(struct.error):
            found, _, _, _, number, theirs = _FORM.unpack(data[: _FORM.size])
            if found == kind and theirs == token:
                return int(number)
