"""Counting what passes an interface: AF_PACKET sockets inside a machine, decoded to flows.

A flow is (source, destination, protocol, ports); its packets and bytes are counted. Fragments and unknown
protocols are counted under their number, nothing is left out. No libpcap, no files.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import trio
from attrs import asdict, define, field, frozen

from kilo_etcd.lab.machine import Machine

_ETH_ALL = 0x0003
_OUTGOING = 4
_PROTOCOLS = {1: "icmp", 4: "ipip", 6: "tcp", 17: "udp", 41: "ip6ip", 47: "gre", 58: "icmpv6"}


@frozen(kw_only=True, order=True)
class Flow:
    """Packets of one direction between two addresses. Ports are 0 where the protocol has none."""

    source: str
    destination: str
    protocol: str
    source_port: int = 0
    destination_port: int = 0
    packets: int = 0
    bytes: int = 0

    def between(self, port: int) -> bool:
        """Whether the port is on either side."""
        return port in (self.source_port, self.destination_port)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Flow:
        """Inverse of `attrs.asdict`."""
        return cls(**data)


def decode(kind: int, packet: bytes) -> Flow:
    """The flow of one packet (without its Ethernet header) of EtherType `kind`; counts are left at 0."""
    if kind == 0x0806:
        source, target = (str(IPv4Address(packet[i : i + 4])) if len(packet) >= i + 4 else "" for i in (14, 24))
        return Flow(source=source, destination=target, protocol="arp")
    if kind == 0x0800 and len(packet) >= 20:
        head, protocol = (packet[0] & 15) * 4, packet[9]
        fragment = struct.unpack_from("!H", packet, 6)[0] & 0x1FFF
        source, target = str(IPv4Address(packet[12:16])), str(IPv4Address(packet[16:20]))
        rest = b"" if fragment else packet[head:]
    elif kind == 0x86DD and len(packet) >= 40:
        protocol, rest = packet[6], packet[40:]
        if protocol == 0 and len(rest) >= 8:  # hop-by-hop options, as multicast reports carry them
            protocol, rest = rest[0], rest[(rest[1] + 1) * 8 :]
        source, target = str(IPv6Address(packet[8:24])), str(IPv6Address(packet[24:40]))
    else:
        return Flow(source="", destination="", protocol=f"ethertype 0x{kind:04x}")
    name = _PROTOCOLS.get(protocol, f"protocol {protocol}")
    ports = struct.unpack_from("!HH", rest) if name in ("tcp", "udp") and len(rest) >= 4 else (0, 0)
    return Flow(source=source, destination=target, protocol=name, source_port=ports[0], destination_port=ports[1])


@define(eq=False)
class Capture:
    """A running count on some interfaces of a machine."""

    _packets: Counter[Flow] = field(factory=Counter)
    _bytes: Counter[Flow] = field(factory=Counter)
    _sockets: list[trio.socket.SocketType] = field(factory=list)

    def open(self, machine: Machine, interfaces: Iterable[str], *, incoming_only: bool) -> None:
        """Start counting: what the kernel queues from now on is in the result. OSError for an unknown interface."""
        self._incoming_only = incoming_only
        for interface in interfaces:
            raw = machine.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            raw.bind((interface, _ETH_ALL))
            sock = trio.socket.from_stdlib_socket(raw)
            machine.closers.remove(raw)
            machine.closers.append(sock)
            self._sockets.append(sock)

    _incoming_only: bool = False

    async def run(self) -> None:
        """Count until cancelled."""
        async with trio.open_nursery() as nursery:
            for sock in self._sockets:
                nursery.start_soon(self._read, sock)

    async def _read(self, sock: trio.socket.SocketType) -> None:
        while True:
            try:
                packet, address = await sock.recvfrom(65535)
            except (OSError, trio.ClosedResourceError):
                return
            self._count(packet, address)

    def _count(self, packet: bytes, address: Any) -> None:
        _, kind, direction = address[:3]
        if not (self._incoming_only and direction == _OUTGOING):
            flow = decode(kind, packet)
            self._packets[flow] += 1
            self._bytes[flow] += len(packet)

    def close(self) -> list[dict[str, Any]]:
        """Stop; the flows as mappings, after what was still queued has been counted too."""
        for sock in self._sockets:
            raw = socket.socket(fileno=sock.detach()) if sock.fileno() >= 0 else None
            if raw is None:
                continue
            with raw:
                raw.setblocking(False)
                try:
                    while True:
                        self._count(*raw.recvfrom(65535))
                except OSError:
                    pass
        return [
            {**asdict(flow), "packets": count, "bytes": self._bytes[flow]}
            for flow, count in sorted(self._packets.items())
        ]
