"""WireGuard devices of the kernel, through generic netlink (linux/wireguard.h).

All changes that fit one message go in one; the kernel makes them under one lock. A device with many peers is told
in several messages, and one peer may come back spread over several: they are merged by key. Keys pass through here
and are kept nowhere.
"""

from __future__ import annotations

import base64
import errno
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from attrs import field, frozen

from kilo_etcd.kernel import netlink
from kilo_etcd.kernel.effect import network_order
from kilo_etcd.kernel.errors import NetlinkError
from kilo_etcd.kernel.netlink import Message
from kilo_etcd.kernel.state import ObservedPeer, RemovePeer, SetDevice, SetPeer, WireGuardChange
from kilo_etcd.model import Endpoint, IPNetwork

_GENERIC, _CONTROL, _GETFAMILY = 16, 16, 3
_FAMILY_ID, _FAMILY_NAME = 1, 2
_GET, _SET = 0, 1
_NAME, _PRIVATE, _PUBLIC, _PORT, _MARK, _PEERS = 2, 3, 4, 6, 7, 8
_P_KEY, _P_PSK, _P_FLAGS, _P_ENDPOINT, _P_KEEPALIVE, _P_HANDSHAKE, _P_RX, _P_TX, _P_ALLOWED = range(1, 10)
_REMOVE, _REPLACE_ALLOWED = 0x1, 0x2
_A_FAMILY, _A_ADDRESS, _A_LENGTH = 1, 2, 3
_ALLOWED = {
    socket.AF_INET: struct.Struct("=HHHHHxxHH4sHHBxxx"),
    socket.AF_INET6: struct.Struct("=HHHHHxxHH16sHHBxxx"),
}
"""An allowed IP whole: its header, then family, address and length, each a header and a value."""
_NESTED = 0x8000
_SOCKADDR, _PORT_AND_ADDRESS = struct.pack("=H", socket.AF_INET), struct.Struct("!H4s8x")
_TIME, _COUNTER, _SHORT = struct.Struct("=qq"), struct.Struct("=Q"), struct.Struct("=H")
_LENGTH_AND_KIND = struct.Struct("=HH")
_GENERIC_HEADER = struct.pack("=BBH", _GET, 1, 0), struct.pack("=BBH", _SET, 1, 0)
_NO_KEY = bytes(32)
_ROOM = 30_000
"""Bytes of peers per message: attributes end at 64 KiB, and half of it keeps clear of socket buffers."""


@frozen(kw_only=True)
class DeviceState:
    """What a device says of itself."""

    public_key: str = ""
    listen_port: int = 0
    mark: int = 0
    peers: dict[str, ObservedPeer] = field(factory=dict)


class Device(Protocol):
    """A WireGuard device, wherever it runs. Failures are OSErrors."""

    writes: int

    def read(self, name: str) -> DeviceState: ...

    def mark(self, name: str) -> int:
        """A number that stays the same as long as nothing changes in the device that a plan sets, endpoints aside."""

    def write(self, name: str, changes: Sequence[WireGuardChange]) -> None:
        """Make changes, in as few transactions as they fit in."""


def raw(key: str) -> bytes:
    """The 32 bytes of a base64 key. OSError(EINVAL) if it is none: one bad key must not stop the other peers."""
    try:
        data = base64.b64decode(key, validate=True)
    except ValueError:
        data = b""
    if len(data) != 32:
        raise OSError(errno.EINVAL, "a WireGuard key has 32 bytes in base64 (44 characters)")
    return data


def encode(family: int, name: str, changes: Sequence[WireGuardChange]) -> list[Message]:
    """The messages that make `changes` to the device `name`: one, if they fit."""
    sent: list[Message] = []
    device: list[bytes] = []
    peers: list[bytes] = []
    room = _ROOM

    def flush() -> None:
        nonlocal room
        if device or peers:
            body = _GENERIC_HEADER[_SET] + netlink.text(_NAME, name) + b"".join(device)
            sent.append(Message(family, 0, body + (netlink.nested(_PEERS, *peers) if peers else b"")))
        device.clear()
        peers.clear()
        room = _ROOM

    for change in changes:
        if isinstance(change, SetDevice):
            if change.private_key is not None:
                device.append(netlink.attribute(_PRIVATE, raw(change.private_key)))
            if change.listen_port is not None:
                device.append(netlink.attribute(_PORT, _SHORT.pack(change.listen_port)))
            if change.mark is not None:
                device.append(netlink.u32(_MARK, change.mark))
            continue
        for peer in _encode_peer(change):
            if len(peer) > room:
                flush()
            peers.append(peer)
            room -= len(peer)
    flush()
    return sent


def _encode_peer(change: SetPeer | RemovePeer) -> Iterator[bytes]:
    """The peer as one item of the list, or as two that belong into one message; more of them if its allowed IPs do
    not fit one message."""
    key = netlink.attribute(_P_KEY, raw(change.public_key))
    removal = netlink.nested(0, key, netlink.u32(_P_FLAGS, _REMOVE))
    if isinstance(change, RemovePeer):
        yield removal
        return
    head = key
    if change.preshared_key is not None:
        head += netlink.attribute(_P_PSK, raw(change.preshared_key) if change.preshared_key else _NO_KEY)
    if change.endpoint is not None:
        head += netlink.attribute(_P_ENDPOINT, _sockaddr(change.endpoint))
    if change.persistent_keepalive is not None:
        head += netlink.attribute(_P_KEEPALIVE, _SHORT.pack(change.persistent_keepalive))
    if change.replace_allowed_ips:
        head += netlink.u32(_P_FLAGS, _REPLACE_ALLOWED)
    ips = change.allowed_ips
    step = 500
    for start in range(0, max(1, len(ips)), step):
        part = [_allowed(ip) for ip in ips[start : start + step]]
        allowed = netlink.nested(_P_ALLOWED, *part) if part else b""
        if start == 0:
            yield (removal if change.reset else b"") + netlink.nested(0, head, allowed)
        else:
            yield netlink.nested(0, key, allowed)


def _sockaddr(endpoint: Endpoint) -> bytes:
    address = endpoint.address
    if address is None:
        raise OSError(errno.EINVAL, f"the endpoint {endpoint} is a name that was not resolved")
    if address.version == 4:
        return _SOCKADDR + _PORT_AND_ADDRESS.pack(endpoint.port, address.packed)
    return (
        struct.pack("=H", socket.AF_INET6)
        + struct.pack("!HI", endpoint.port, 0)
        + address.packed
        + struct.pack("=I", int(address.scope_id or 0) if str(address.scope_id or 0).isdigit() else 0)
    )


def _allowed(network: IPNetwork) -> bytes:
    packed = network.network_address.packed
    size = len(packed)
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    return _ALLOWED[family].pack(
        24 + size, _NESTED, 6, _A_FAMILY, family, 4 + size, _A_ADDRESS, packed, 5, _A_LENGTH, network.prefixlen
    )


class Reader:
    """Puts the messages of a device's dump together.

    `former` is the reader before this one: what of a peer is the same bytes as then is not taken apart again.
    """

    def __init__(self, former: Reader | None = None) -> None:
        self._public_key = ""
        self._listen_port = 0
        self._mark = 0
        self._peers: dict[bytes, dict[int, bytes]] = {}
        """Key -> attributes; those that are lists of several messages are joined."""
        self._former = {} if former is None else former._parsed
        self._parsed: dict[bytes, tuple[bytes, bytes, ObservedPeer]] = {}
        """Key -> endpoint and allowed IPs as bytes, and the peer made of them."""

    def take(self, body: bytes) -> None:
        """Read one message."""
        found = netlink.attributes(body, 4)
        if any(key := found.get(_PUBLIC, b"")):
            self._public_key = base64.b64encode(key).decode()
        if _PORT in found:
            self._listen_port = _SHORT.unpack(found[_PORT])[0]
        if _MARK in found:
            self._mark = int.from_bytes(found[_MARK], sys.byteorder)
        for data in _items(found.get(_PEERS, b"")):
            peer = netlink.attributes(data)
            known = self._peers.setdefault(peer[_P_KEY], peer)
            if known is not peer:
                # A continuation carries the key and more allowed IPs only.
                known[_P_ALLOWED] = known.get(_P_ALLOWED, b"") + peer.get(_P_ALLOWED, b"")

    def mark(self) -> int:
        """See `Device.mark`."""
        return hash(
            (
                self._public_key, self._listen_port, self._mark,
                frozenset(
                    (key, found.get(_P_PSK), found.get(_P_KEEPALIVE), found.get(_P_ALLOWED))
                    for key, found in self._peers.items()
                ),
            )
        )  # fmt: skip

    def result(self) -> DeviceState:
        """The device, with each peer's allowed IPs in the order that plans have them in."""
        peers = [self._peer(key, found) for key, found in self._peers.items()]
        self._former, self._peers = {}, {}
        return DeviceState(
            public_key=self._public_key,
            listen_port=self._listen_port,
            mark=self._mark,
            peers={peer.public_key: peer for peer in peers},
        )

    def _peer(self, key: bytes, found: dict[int, bytes]) -> ObservedPeer:
        address, allowed = found.get(_P_ENDPOINT, b""), found.get(_P_ALLOWED, b"")
        former = self._former.get(key)
        seconds, nanoseconds = _TIME.unpack(found[_P_HANDSHAKE]) if _P_HANDSHAKE in found else (0, 0)
        psk = found.get(_P_PSK, _NO_KEY)
        peer = ObservedPeer(
            public_key=base64.b64encode(key).decode() if former is None else former[2].public_key,
            endpoint=former[2].endpoint if former and former[0] == address else _decode_endpoint(address),
            allowed_ips=former[2].allowed_ips if former and former[1] == allowed else _decode_allowed(allowed),
            persistent_keepalive=_SHORT.unpack(found[_P_KEEPALIVE])[0] if _P_KEEPALIVE in found else 0,
            preshared_key=base64.b64encode(psk).decode() if psk != _NO_KEY else None,
            last_handshake=seconds + nanoseconds / 1e9,
            rx_bytes=_COUNTER.unpack(found[_P_RX])[0] if _P_RX in found else 0,
            tx_bytes=_COUNTER.unpack(found[_P_TX])[0] if _P_TX in found else 0,
        )
        self._parsed[key] = (address, allowed, peer)
        return peer


def _items(data: bytes) -> Iterator[bytes]:
    """The values of a list of attributes, whose kinds mean nothing."""
    offset, end = 0, len(data)
    while offset + 4 <= end:
        length = _LENGTH_AND_KIND.unpack_from(data, offset)[0]
        if length < 4:
            return
        yield data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _decode_endpoint(data: bytes) -> Endpoint | None:
    if len(data) < 16:
        return None
    port = struct.unpack_from("!H", data, 2)[0]
    if data[:2] == _SOCKADDR:
        return Endpoint(ipaddress.IPv4Address(data[4:8]), port)
    return Endpoint(ipaddress.IPv6Address(data[8:24]), port)


def _decode_allowed(data: bytes) -> tuple[IPNetwork, ...]:
    networks: set[IPNetwork] = set()
    for item in _items(data):
        found = netlink.attributes(item)
        packed, length = found[_A_ADDRESS], found[_A_LENGTH][0]
        kind = ipaddress.IPv4Network if len(packed) == 4 else ipaddress.IPv6Network
        networks.add(kind((packed, length), strict=False))
    return tuple(sorted(networks, key=network_order))


class KernelDevice:
    """The kernel's own WireGuard. Made only where `available` says so."""

    def __init__(self, generic: netlink.Socket, family: int) -> None:
        self._generic = generic
        self._family = family
        self.writes = 0
        self._last: Reader | None = None

    def read(self, name: str) -> DeviceState:
        reader = Reader(self._last)
        self._dump(name, reader)
        self._last = reader
        return reader.result()

    def mark(self, name: str) -> int:
        reader = Reader()
        self._dump(name, reader)
        return reader.mark()

    def _dump(self, name: str, reader: Reader) -> None:
        self._generic.dump(Message(self._family, 0, _GENERIC_HEADER[_GET] + netlink.text(_NAME, name)), reader.take)

    def write(self, name: str, changes: Sequence[WireGuardChange]) -> None:
        batch = encode(self._family, name, changes)
        self.writes += len(batch)
        for error in self._generic.send(batch):
            if error is not None:
                raise error


def available(generic: netlink.Socket) -> int | None:
    """The number of the kernel's WireGuard family, or None: it has none. (Asking loads the module.)"""
    header = struct.pack("=BBH", _GETFAMILY, 1, 0)
    try:
        body = generic.get(Message(_CONTROL, 0, header + netlink.text(_FAMILY_NAME, "wireguard")))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    family: int = struct.unpack("=H", netlink.attributes(body, 4)[_FAMILY_ID])[0]
    return family


def generic_socket() -> netlink.Socket:
    return netlink.Socket(_GENERIC)
