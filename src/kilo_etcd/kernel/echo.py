"""Echo requests (ping), which any host's kernel answers whether or not an agent runs there.

They need no raw socket: the kernel has datagram sockets for them, for the groups in `net.ipv4.ping_group_range`, and
hands each socket the replies to its own requests only. A call has sockets of its own, so calls do not disturb each
other. Nothing here draws conclusions: a host that did not answer may be gone, far away, or behind a firewall.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from types import MappingProxyType

import trio
from attrs import frozen

from kilo_etcd.model import IPAddress

_From = tuple[int, IPAddress | None]
"""Family (4, 6), and the source address that requests are sent from; None: the kernel's choice."""

SPACING = 0.035
"""Seconds between two requests to the same address."""

_KINDS = {
    4: (socket.AF_INET, socket.IPPROTO_ICMP, 8, 0),
    6: (socket.AF_INET6, socket.IPPROTO_ICMPV6, 128, 129),
}
"""Family -> socket family, protocol, type of a request, type of its reply (RFC 792, RFC 4443)."""

BURST, BURST_SECONDS = 64 * 1024, 0.005
"""Bytes of large requests that are sent at once, and the pause after them: a socket's buffer has no room for more
answers."""

_LARGE, _SMALL = 0, 1
"""The sequence numbers of the two requests of `passes`."""

OVERTAKEN_SECONDS = 0.05
"""How long after the answer to a small packet that to a large one may come which was sent before it."""

_HEADERS = {4: 20, 6: 40}
"""Bytes of an IP header."""

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
"""Options of a socket, and the value by which packets have don't-fragment set and no path MTU that the kernel has
learnt counts (linux/in.h, linux/in6.h); Python names none of them."""

_FORM = struct.Struct("!BBHHH4s")
"""Type, code, checksum and identifier (both the kernel's), sequence number, a token by which our request is known."""


@frozen(kw_only=True)
class EchoRequests:
    """How addresses are pinged."""

    times: int = 1
    """Up to so many requests go to each address that has not answered yet; `count` sends as many to each."""
    patience: float
    """Seconds to wait after the last one."""
    first: bool = False
    """Whether the first answer ends it all."""
    size: int = 0
    """Bytes of each request's IP packet, to see whether large ones pass; 0: as few as can be."""
    dont_fragment: bool = False
    """Whether no router on the way may divide the packet, and this host does not do so either, whatever it has learnt
    of the path MTU. One that is larger than the device takes is not sent, so nobody answers it."""
    sources: Mapping[IPAddress, IPAddress] = MappingProxyType({})
    """The source address of the requests to an address; for others the kernel chooses it."""


async def ping(addresses: Collection[IPAddress], requests: EchoRequests) -> Mapping[IPAddress, float]:
    """Which of `addresses` answer, and the seconds that it took.

    Nothing is sent to an address whose source address the host does not have. PermissionError: this process may not
    ping; OSError: it has no socket to do it with.
    """
    return {address: times[0] for address, times in (await _exchange(addresses, requests, 1)).items()}


async def count(addresses: Collection[IPAddress], requests: EchoRequests) -> Mapping[IPAddress, int]:
    """How many of the requests are answered by those of `addresses` that answer any. Errors as for `ping`."""
    answered = await _exchange(addresses, requests, requests.times)
    return {address: len(times) for address, times in answered.items()}


async def passes(address: IPAddress, size: int, patience: float) -> bool | None:
    """Whether an address answers a request of `size` bytes with don't-fragment set, which a small one follows.

    True: it does. False: it answers the small one alone, so neither a slow link nor a gone host is why the large one
    was not answered. None: it answers neither of them within `patience` seconds. Errors as for `ping`.
    """
    version, token = address.version, os.urandom(4)
    answered: set[int] = set()
    with _open(version) as out, trio.move_on_after(patience) as scope:
        _forbid_fragments(out, version)
        _request(out, address, _LARGE, token, size)
        _request(out, address, _SMALL, token, 0)
        while _LARGE not in answered:
            await trio.lowlevel.wait_readable(out)
            while (number := _reply(out, version, token)) is not None:
                if number == _SMALL and not answered:
                    scope.deadline = min(scope.deadline, trio.current_time() + OVERTAKEN_SECONDS)
                answered.add(number)
    return True if _LARGE in answered else False if answered else None


async def _exchange(
    addresses: Collection[IPAddress], requests: EchoRequests, wanted: int
) -> dict[IPAddress, list[float]]:
    """The seconds that answers took, up to `wanted` from each address; who has given so many is sent no more."""
    answered: dict[IPAddress, list[float]] = {}
    if not addresses:
        await trio.lowlevel.checkpoint()
        return answered
    with ExitStack() as stack:
        sockets: dict[_From, socket.socket] = {}
        starts: dict[IPAddress, _From] = {
            address: (address.version, requests.sources.get(address)) for address in addresses
        }
        for start in dict.fromkeys(starts.values()):
            out = stack.enter_context(_open(start[0]))
            if requests.dont_fragment:
                _forbid_fragments(out, start[0])
            if _bound(out, start[1]):
                sockets[start] = out
        token = os.urandom(4)
        sent: dict[tuple[_From, int], tuple[IPAddress, float]] = {}
        numbers = itertools.count()
        waiting = dict.fromkeys(address for address in addresses if starts[address] in sockets)

        def done() -> bool:
            return not waiting or (requests.first and bool(answered))

        def read(start: _From) -> None:
            while (number := _reply(sockets[start], start[0], token)) is not None:
                request = sent.pop((start, number), None)
                if request is not None and request[0] in waiting:
                    address, at = request
                    answered.setdefault(address, []).append(trio.current_time() - at)
                    if len(answered[address]) == wanted:
                        del waiting[address]

        async def listen(start: _From) -> None:
            while True:
                await trio.lowlevel.wait_readable(sockets[start])
                read(start)
                if done():
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for start in sockets:
                nursery.start_soon(listen, start)
            for turn in range(requests.times):
                burst = 0
                for address in list(waiting):
                    burst += requests.size
                    if burst > BURST:
                        await trio.sleep(BURST_SECONDS)
                        burst = requests.size
                    if address not in waiting:
                        continue
                    number, start = next(numbers) & 0xFFFF, starts[address]
                    sent[start, number] = (address, trio.current_time())
                    _request(sockets[start], address, number, token, requests.size)
                await trio.sleep(SPACING if turn + 1 < requests.times else requests.patience)
            nursery.cancel_scope.cancel()
        # What came while this process was kept from running came all the same.
        for start in sockets:
            read(start)
    return answered


def _open(version: int) -> socket.socket:
    family, protocol, _, _ = _KINDS[version]
    return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)


def _forbid_fragments(out: socket.socket, version: int) -> None:
    if version == 4:
        out.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    else:
        out.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        out.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 1)


def _bound(out: socket.socket, source: IPAddress | None) -> bool:
    """Bind a socket to its source address, if it has one. Whether the host has that address."""
    if source is None:
        return True
    try:
        out.bind((str(source), 0))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return False
    return True


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
            continue  # A router's message that a destination cannot be reached.
        with suppress(struct.error):
            answered, _, _, _, number, theirs = _FORM.unpack(data[: _FORM.size])
            if answered == kind and theirs == token:
                return int(number)
