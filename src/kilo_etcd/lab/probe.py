"""Pings from inside machines, sent by the lab itself: a matrix of all pairs, and probes that measure gaps.

The world opens one raw ICMP socket in each machine's network and sends echo requests from there, so that
testing 2,450 pairs takes no process at all. Answers are matched by identifier and a 64-bit sequence
number in the payload. A gap is measured over what was lost, not over when answers came: a busy lab may send
late, but never reports a loss that was none.
"""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import trio
from attrs import asdict, define, field, frozen

from kilo_etcd.lab.machine import Machine
from kilo_etcd.model import IPAddress

_ICMP_FILTER = 1
_SOL_RAW = 255
_IPPROTO_ICMPV6 = 58
_ICMPV6_FILTER = 1
_ECHO = {4: (8, 0), 6: (128, 129)}
_HEADER = struct.Struct("!BBHHH")
_BODY = struct.Struct("!Q")


@frozen(kw_only=True)
class Gap:
    """Consecutive probes that were never answered."""

    start: float
    """Seconds from the probe's start until the first of them was sent."""
    seconds: float
    """From the first lost probe's sending until the next answered one's (or the end)."""
    packets: int


@frozen(kw_only=True)
class ProbeResult:
    """What a probe has seen."""

    sent: int
    received: int
    duplicates: int
    duration: float
    """Seconds."""
    gaps: tuple[Gap, ...]
    flowing: bool
    """Whether the last thing known is an answer: nothing sent since then is overdue (0.5 s)."""
    slowest: float
    """Longest round trip, seconds."""

    @property
    def lost(self) -> int:
        """Probes never answered."""
        return sum(gap.packets for gap in self.gaps)

    @property
    def longest_gap(self) -> float:
        """Seconds; 0.0 when nothing was lost."""
        return max((gap.seconds for gap in self.gaps), default=0.0)

    def as_mapping(self) -> dict[str, Any]:
        """For the control protocol."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> ProbeResult:
        """Inverse of `as_mapping`."""
        return cls(**{**data, "gaps": tuple(Gap(**gap) for gap in data["gaps"])})


def echo_request(version: int, identifier: int, number: int) -> bytes:
    """An ICMP (4) or ICMPv6 (6) echo request; the kernel adds the checksum of the latter itself."""
    kind = _ECHO[version][0]
    body = _BODY.pack(number)
    header = _HEADER.pack(kind, 0, 0, identifier, number & 0xFFFF)
    if version == 6:
        return header + body
    return _HEADER.pack(kind, 0, checksum(header + body), identifier, number & 0xFFFF) + body


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def parse_reply(version: int, packet: bytes) -> tuple[int, int] | None:
    """(identifier, number) of an echo reply as a raw socket gives it; None for anything else."""
    if version == 4:
        if not packet:
            return None
        packet = packet[(packet[0] & 15) * 4 :]
    if len(packet) < _HEADER.size + _BODY.size:
        return None
    kind, _, _, identifier, _ = _HEADER.unpack_from(packet)
    if kind != _ECHO[version][1]:
        return None
    return identifier, _BODY.unpack_from(packet, _HEADER.size)[0]


@define(eq=False)
class Pinger:
    """Sends echo requests from machines; one for the whole lab."""

    nursery: trio.Nursery
    _sockets: dict[tuple[Machine, int], trio.socket.SocketType] = field(factory=dict)
    _waiting: dict[tuple[Machine, int], Callable[[int], None]] = field(factory=dict)
    _next: int = 0

    def listen(self, machine: Machine, replied: Callable[[int], None]) -> int:
        """An identifier of its own for a series of echo requests; `replied` is told each answered number."""
        while (machine, self._next) in self._waiting:
            self._next = (self._next + 1) & 0xFFFF
        identifier = self._next
        self._next = (self._next + 1) & 0xFFFF
        self._waiting[machine, identifier] = replied
        return identifier

    def forget(self, machine: Machine, identifier: int) -> None:
        """Stop listening."""
        self._waiting.pop((machine, identifier), None)

    async def send(self, machine: Machine, target: IPAddress, identifier: int, number: int) -> None:
        """Send one request. A network that refuses it (no route, no device) is a lost packet, not an error."""
        with suppress(OSError, trio.ClosedResourceError):
            sock = self._socket(machine, target.version)
            await sock.sendto(echo_request(target.version, identifier, number), (str(target), 0))

    def _socket(self, machine: Machine, version: int) -> trio.socket.SocketType:
        key = (machine, version)
        if key in self._sockets:
            return self._sockets[key]
        if version == 4:
            raw = machine.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            raw.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("I", 0xFFFFFFFF ^ (1 << _ECHO[4][1])))
        else:
            raw = machine.socket(socket.AF_INET6, socket.SOCK_RAW, _IPPROTO_ICMPV6)
            words = [0xFFFFFFFF] * 8
            words[_ECHO[6][1] // 32] ^= 1 << (_ECHO[6][1] % 32)
            raw.setsockopt(_IPPROTO_ICMPV6, _ICMPV6_FILTER, struct.pack("8I", *words))
        sock = trio.socket.from_stdlib_socket(raw)
        # Closing must go through trio, which wakes the receiver up.
        machine.closers.remove(raw)
        machine.closers.append(sock)
        self._sockets[key] = sock
        self.nursery.start_soon(self._receive, machine, version, sock)
        return sock

    async def _receive(self, machine: Machine, version: int, sock: trio.socket.SocketType) -> None:
        try:
            while True:
                try:
                    packet = await sock.recv(2048)
                except trio.ClosedResourceError:
                    return
                except OSError:
                    # An ICMP error came back for something we sent; the loss shows by itself.
                    continue
                reply = parse_reply(version, packet)
                if reply and (on_reply := self._waiting.get((machine, reply[0]))):
                    on_reply(reply[1])
        finally:
            self._sockets.pop((machine, version), None)

    async def missing(
        self, pairs: Iterable[tuple[Machine, str, IPAddress]], timeout: float
    ) -> list[tuple[Machine, str]]:
        """Ping all (from, name of target, its address) at once; those unanswered after `timeout` seconds."""
        by_machine: dict[Machine, list[tuple[str, IPAddress]]] = {}
        for machine, name, address in pairs:
            by_machine.setdefault(machine, []).append((name, address))
        unanswered = {(machine, i) for machine, targets in by_machine.items() for i in range(len(targets))}
        done = trio.Event()
        identifiers: dict[Machine, int] = {}

        def replies_of(machine: Machine) -> Callable[[int], None]:
            def replied(number: int) -> None:
                unanswered.discard((machine, number))
                if not unanswered:
                    done.set()

            return replied

        try:
            for machine in by_machine:
                identifiers[machine] = self.listen(machine, replies_of(machine))
            with trio.move_on_after(timeout):
                for machine, targets in by_machine.items():
                    for number, (_, address) in enumerate(targets):
                        await self.send(machine, address, identifiers[machine], number)
                if unanswered:
                    await done.wait()
        finally:
            for machine, identifier in identifiers.items():
                self.forget(machine, identifier)
        return [
            (machine, by_machine[machine][number][0])
            for machine, number in sorted(unanswered, key=lambda x: (x[0].name, x[1]))
        ]


@define(eq=False)
class LabProbe:
    """Echo requests from one machine to one address at a steady pace, each accounted for."""

    pinger: Pinger
    machine: Machine
    target: IPAddress
    interval: float
    _sent: list[float] = field(factory=list)
    _answered: dict[int, float] = field(factory=dict)
    _duplicates: int = 0
    _begun: float = 0.0
    _all_answered: trio.Event = field(factory=trio.Event)

    async def run(self, stop: trio.Event, grace: float = 1.0) -> None:
        """Send until `stop`, then wait at most `grace` seconds for the answers still under way."""
        identifier = self.pinger.listen(self.machine, self._replied)
        self._begun = due = trio.current_time()
        try:
            while not stop.is_set():
                self._sent.append(trio.current_time())
                await self.pinger.send(self.machine, self.target, identifier, len(self._sent) - 1)
                # A late sender goes on from now; a burst would measure something else.
                due = max(due + self.interval, trio.current_time())
                with trio.move_on_at(due):
                    await stop.wait()
            with trio.move_on_after(grace):
                while len(self._answered) < len(self._sent):
                    self._all_answered = trio.Event()
                    await self._all_answered.wait()
        finally:
            self.pinger.forget(self.machine, identifier)

    def _replied(self, number: int) -> None:
        if number in self._answered:
            self._duplicates += 1
        else:
            self._answered[number] = trio.current_time()
            self._all_answered.set()

    def result(self, *, final: bool) -> ProbeResult:
        """The account so far; unless `final`, what was sent within the last 0.5 s is not called lost yet."""
        now = trio.current_time()
        cut = math.inf if final else now - 0.5
        sent = [at for i, at in enumerate(self._sent) if at <= cut or i in self._answered]
        decided = [i for i, at in enumerate(self._sent) if at <= cut or i in self._answered]
        gaps: list[Gap] = []
        first: int | None = None
        for position, number in enumerate([*decided, -1]):
            if number >= 0 and number not in self._answered:
                first = position if first is None else first
            elif first is not None:
                end = sent[position] if number >= 0 else sent[-1] + self.interval
                gaps.append(Gap(start=sent[first] - self._begun, seconds=end - sent[first], packets=position - first))
                first = None
        return ProbeResult(
            sent=len(sent),
            received=len(self._answered),
            duplicates=self._duplicates,
            duration=now - self._begun,
            gaps=tuple(gaps),
            flowing=bool(decided) and decided[-1] in self._answered,
            slowest=max((at - self._sent[i] for i, at in self._answered.items()), default=0.0),
        )
