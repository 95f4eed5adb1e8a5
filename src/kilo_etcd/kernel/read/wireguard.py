"""A kernel WireGuard device as generic netlink tells of it.

A device with many peers is told in several messages, and one peer may come back spread over several: they are merged by
key. Keys pass through here and are kept nowhere.
"""

from __future__ import annotations

import base64
import ipaddress
import struct
from typing import Any

from attrs import field, frozen

from kilo_etcd.kernel.codec import Reader, elements
from kilo_etcd.kernel.effect import network_order
from kilo_etcd.kernel.formats import ctrlmsg, wgmsg
from kilo_etcd.kernel.state import ObservedPeer
from kilo_etcd.model import Endpoint, IPNetwork

_families = Reader(ctrlmsg, "CTRL_ATTR_FAMILY_ID")
_devices = Reader(
    wgmsg, "WGDEVICE_A_PUBLIC_KEY", "WGDEVICE_A_LISTEN_PORT", "WGDEVICE_A_FWMARK", "WGDEVICE_A_PEERS"
)  # fmt: skip
_peers = Reader(
    wgmsg.wgdevice_peer,
    "WGPEER_A_PUBLIC_KEY", "WGPEER_A_PRESHARED_KEY", "WGPEER_A_ENDPOINT", "WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL",
    "WGPEER_A_LAST_HANDSHAKE_TIME", "WGPEER_A_RX_BYTES", "WGPEER_A_TX_BYTES", "WGPEER_A_ALLOWEDIPS",
)  # fmt: skip
_allowed = Reader(wgmsg.wgdevice_peer.wgpeer_allowedip, "WGALLOWEDIP_A_IPADDR", "WGALLOWEDIP_A_CIDR_MASK")
_TIME, _COUNTER, _SHORT, _NUMBER = struct.Struct("=qq"), struct.Struct("=Q"), struct.Struct("=H"), struct.Struct("=I")
_NO_KEY = bytes(32)
_NEVER, _NOTHING, _NO_TIME = bytes(_TIME.size), bytes(_COUNTER.size), bytes(_SHORT.size)


@frozen(kw_only=True)
class DeviceState:
    """What a device says of itself."""

    public_key: str = ""
    listen_port: int = 0
    mark: int = 0
    peers: dict[str, ObservedPeer] = field(factory=dict)


def read_family(body: bytes) -> int:
    """The number of a family of generic netlink."""
    number: int = _SHORT.unpack(_families(body)["CTRL_ATTR_FAMILY_ID"])[0]
    return number


class DeviceReader:
    """Puts the messages of a device's dump together.

    `former` is the reader before this one: what of a peer is the same bytes as then is not taken apart again.
    """

    def __init__(self, former: DeviceReader | None = None) -> None:
        self._public_key = ""
        self._listen_port = 0
        self._mark = 0
        self._peers: dict[bytes, dict[str, Any]] = {}
        """Key -> attributes; allowed IPs of several messages are joined."""
        self._former = {} if former is None else former._parsed
        self._parsed: dict[bytes, tuple[bytes, bytes, ObservedPeer]] = {}
        """Key -> endpoint and allowed IPs as bytes, and the peer made of them."""

    def take(self, body: bytes) -> None:
        """Read one message."""
        found = _devices(body)
        if any(key := found.get("WGDEVICE_A_PUBLIC_KEY", b"")):
            self._public_key = base64.b64encode(key).decode()
        if "WGDEVICE_A_LISTEN_PORT" in found:
            self._listen_port = _SHORT.unpack(found["WGDEVICE_A_LISTEN_PORT"])[0]
        if "WGDEVICE_A_FWMARK" in found:
            self._mark = _NUMBER.unpack(found["WGDEVICE_A_FWMARK"])[0]
        for element in elements(found.get("WGDEVICE_A_PEERS", b"")):
            peer = _peers(element)
            known = self._peers.setdefault(peer["WGPEER_A_PUBLIC_KEY"], peer)
            if known is not peer:
                # A continuation carries the key and more allowed IPs only.
                more = peer.get("WGPEER_A_ALLOWEDIPS", b"")
                known["WGPEER_A_ALLOWEDIPS"] = known.get("WGPEER_A_ALLOWEDIPS", b"") + more

    def mark(self) -> int:
        """See `Device.mark`."""
        return hash(
            (
                self._public_key, self._listen_port, self._mark,
                frozenset(
                    (
                        key, found.get("WGPEER_A_PRESHARED_KEY"), found.get("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL"),
                        found.get("WGPEER_A_ALLOWEDIPS"), "WGPEER_A_ENDPOINT" in found,
                    )
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

    def _peer(self, key: bytes, found: dict[str, Any]) -> ObservedPeer:
        get = found.get
        address, allowed = get("WGPEER_A_ENDPOINT", b""), get("WGPEER_A_ALLOWEDIPS", b"")
        former = self._former.get(key)
        seconds, nanoseconds = _TIME.unpack(get("WGPEER_A_LAST_HANDSHAKE_TIME", _NEVER))
        psk = get("WGPEER_A_PRESHARED_KEY", _NO_KEY)
        peer = ObservedPeer(
            public_key=base64.b64encode(key).decode() if former is None else former[2].public_key,
            endpoint=former[2].endpoint if former and former[0] == address else _endpoint(address),
            allowed_ips=former[2].allowed_ips if former and former[1] == allowed else _networks(allowed),
            persistent_keepalive=_SHORT.unpack(get("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", _NO_TIME))[0],
            preshared_key=base64.b64encode(psk).decode() if psk != _NO_KEY else None,
            last_handshake=seconds + nanoseconds / 1e9,
            rx_bytes=_COUNTER.unpack(get("WGPEER_A_RX_BYTES", _NOTHING))[0],
            tx_bytes=_COUNTER.unpack(get("WGPEER_A_TX_BYTES", _NOTHING))[0],
        )
        self._parsed[key] = (address, allowed, peer)
        return peer


_ENDPOINT4, _ENDPOINT6 = struct.Struct("!2xH4s8x"), struct.Struct("!2xH4x16s4x")


def _endpoint(data: bytes) -> Endpoint | None:
    if len(data) == _ENDPOINT4.size:
        port, packed = _ENDPOINT4.unpack(data)
        return Endpoint(ipaddress.IPv4Address(packed), port)
    if len(data) == _ENDPOINT6.size:
        port, packed = _ENDPOINT6.unpack(data)
        return Endpoint(ipaddress.IPv6Address(packed), port)
    return None


def _networks(data: bytes) -> tuple[IPNetwork, ...]:
    networks: set[IPNetwork] = set()
    for element in elements(data):
        found = _allowed(element)
        packed, length = found["WGALLOWEDIP_A_IPADDR"], found["WGALLOWEDIP_A_CIDR_MASK"][0]
        kind = ipaddress.IPv4Network if len(packed) == 4 else ipaddress.IPv6Network
        networks.add(kind((packed, length), strict=False))
    return tuple(sorted(networks, key=network_order))
