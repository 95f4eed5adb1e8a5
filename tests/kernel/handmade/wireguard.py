"""Changes of a device, by linux/wireguard.h."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence

from handmade.attributes import NESTED, attribute, nested, text, u32
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage
from kilo_etcd.kernel.state import RemovePeer, SetDevice, SetPeer, WireGuardChange
from kilo_etcd.kernel.write.wireguard import raw
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
_ELEMENT = 1 | NESTED
"""pyroute2 begins to count the elements of each list; the kernel does not look."""
_SOCKADDR, _PORT_AND_ADDRESS = struct.pack("=H", socket.AF_INET), struct.Struct("!H4s8x")
_SHORT = struct.Struct("=H")
_GENERIC_HEADER = struct.pack("=BBH", _GET, 1, 0), struct.pack("=BBH", _SET, 1, 0)
_NO_KEY = bytes(32)
_ROOM = 30_000
"""Bytes of peers per message: attributes end at 64 KiB, and half of it keeps clear of socket buffers."""


def encode(family: int, name: str, changes: Sequence[WireGuardChange]) -> list[NetlinkMessage]:
    """The messages that make `changes` to the device `name`: one, if they fit."""
    sent: list[NetlinkMessage] = []
    device: list[bytes] = []
    peers: list[bytes] = []
    room = _ROOM

    def flush() -> None:
        nonlocal room
        if device or peers:
            body = _GENERIC_HEADER[_SET] + text(_NAME, name) + b"".join(device)
            sent.append(NetlinkMessage(family, 0, body + (nested(_PEERS | NESTED, *peers) if peers else b"")))
        device.clear()
        peers.clear()
        room = _ROOM

    for change in changes:
        if isinstance(change, SetDevice):
            if change.private_key is not None:
                device.append(attribute(_PRIVATE, raw(change.private_key)))
            if change.listen_port is not None:
                device.append(attribute(_PORT, _SHORT.pack(change.listen_port)))
            if change.mark is not None:
                device.append(u32(_MARK, change.mark))
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
    key = attribute(_P_KEY, raw(change.public_key))
    removal = nested(_ELEMENT, key, u32(_P_FLAGS, _REMOVE))
    if isinstance(change, RemovePeer):
        yield removal
        return
    head = key
    if change.preshared_key is not None:
        head += attribute(_P_PSK, raw(change.preshared_key) if change.preshared_key else _NO_KEY)
    if change.endpoint is not None:
        head += attribute(_P_ENDPOINT, _sockaddr(change.endpoint))
    if change.persistent_keepalive is not None:
        head += attribute(_P_KEEPALIVE, _SHORT.pack(change.persistent_keepalive))
    if change.replace_allowed_ips:
        head += u32(_P_FLAGS, _REPLACE_ALLOWED)
    ips = change.allowed_ips
    step = 500
    for start in range(0, max(1, len(ips)), step):
        part = [_allowed(ip) for ip in ips[start : start + step]]
        allowed = nested(_P_ALLOWED | NESTED, *part) if part else b""
        if start == 0:
            yield (removal if change.reset else b"") + nested(_ELEMENT, head, allowed)
        else:
            yield nested(_ELEMENT, key, allowed)


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
        24 + size, _ELEMENT, 6, _A_FAMILY, family, 4 + size, _A_ADDRESS, packed, 5, _A_LENGTH, network.prefixlen
    )
