"""A kernel WireGuard device as generic netlink tells of it.

A device with many peers is told in several messages, and one peer may come back spread over several: they are merged by
key. Keys pass through here and are kept nowhere.
"""

from __future__ import annotations

import base64
import ipaddress
from typing import Any

from attrs import field, frozen

from kilo_etcd.kernel.netlink.codec import Reader, elements, layout
from kilo_etcd.kernel.netlink.formats import SOCKADDR_IN, SOCKADDR_IN6, ctrlmsg, wg, wgmsg
from kilo_etcd.kernel.predict import network_order
from kilo_etcd.kernel.state import ObservedPeer
from kilo_etcd.model import Endpoint, IPNetwork

_families = Reader(ctrlmsg, "CTRL_ATTR_FAMILY_ID")
_devices = Reader(
    wgmsg, "WGDEVICE_A_PUBLIC_KEY", "WGDEVICE_A_LISTEN_PORT", "WGDEVICE_A_FWMARK", "WGDEVICE_A_PEERS"
)  # fmt: skip
_peers = Reader(
    wgmsg.wgdevice_peer,
    "WGPEER_A_PUBLIC_KEY", "WGPEER_A_PRESHARED_KEY", "WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", "WGPEER_A_ENDPOINT",
    "WGPEER_A_LAST_HANDSHAKE_TIME", "WGPEER_A_RX_BYTES", "WGPEER_A_TX_BYTES", "WGPEER_A_ALLOWEDIPS",
)  # fmt: skip
_allowed = Reader(wgmsg.wgdevice_peer.wgpeer_allowedip, "WGALLOWEDIP_A_IPADDR", "WGALLOWEDIP_A_CIDR_MASK")
_TIME = layout(wgmsg.wgdevice_peer.parse_handshake_time)
_NO_KEY = bytes(wg.WG_KEY_LEN)
_NEVER = bytes(_TIME.size)


@frozen(kw_only=True)
class DeviceState:
    """What a device reports of itself."""

    public_key: str = ""
    listen_port: int = 0
    mark: int = 0
    peers: dict[str, ObservedPeer] = field(factory=dict)


def read_family(body: bytes) -> int:
    """The number of a family of generic netlink."""
    number: int = _families(body)["CTRL_ATTR_FAMILY_ID"]
    return number


class DeviceReader:
    """Puts the messages of a device's dump together.

    `former` is the reader before this one: what of a peer is the same bytes as then is not taken apart again.
    """

    def __init__(self, former: DeviceReader | None = None) -> None:
        self._public_key = ""
        self._listen_port = 0
        self._mark = 0
        self._peers: dict[bytes, tuple[Any, ...]] = {}
        """Key -> attributes, as `_peers` has them; allowed IPs of several messages are joined."""
        self._former = {} if former is None else former._parsed
        self._parsed: dict[bytes, tuple[bytes, bytes, ObservedPeer]] = {}
        """Key -> endpoint and allowed IPs as bytes, and the peer made of them."""

    def take(self, body: bytes) -> None:
        """Read one message."""
        key, port, mark, peers = _devices.row(body)
        if any(key or b""):
            self._public_key = base64.b64encode(key).decode()
        if port is not None:
            self._listen_port = port
        if mark is not None:
            self._mark = mark
        for element in elements(peers or b""):
            peer = _peers.row(element)
            if len(key := peer[0] or b"") != wg.WG_KEY_LEN:
                raise ValueError(f"a peer's key has {len(key)} bytes")
            first = self._peers.setdefault(key, peer)
            if first is not peer:
                # A continuation carries the key and more allowed IPs only.
                self._peers[key] = (*first[:-1], (first[-1] or b"") + (peer[-1] or b""))

    def fingerprint(self) -> int:
        """See `Device.mark`."""
        return hash(
            (
                self._public_key, self._listen_port, self._mark,
                frozenset(
                    (key, psk, keepalive, allowed, address is not None)
                    for key, psk, keepalive, address, *_, allowed in self._peers.values()
                ),
            )
        )  # fmt: skip

    def result(self) -> DeviceState:
        """The device, with each peer's allowed IPs in the order that plans have them in."""
        peers = [self._peer(*value) for value in self._peers.values()]
        self._former, self._peers = {}, {}
        return DeviceState(
            public_key=self._public_key,
            listen_port=self._listen_port,
            mark=self._mark,
            peers={peer.public_key: peer for peer in peers},
        )

    def _peer(
        self,
        key: bytes,
        psk: bytes | None,
        keepalive: int | None,
        address: bytes | None,
        handshake: bytes | None,
        received: int | None,
        sent: int | None,
        allowed: bytes | None,
    ) -> ObservedPeer:
        address, allowed = address or b"", allowed or b""
        former = self._former.get(key)
        seconds, nanoseconds = _TIME.unpack(handshake or _NEVER)
        peer = ObservedPeer(
            public_key=base64.b64encode(key).decode() if former is None else former[2].public_key,
            endpoint=former[2].endpoint if former and former[0] == address else _endpoint(address),
            allowed_ips=former[2].allowed_ips if former and former[1] == allowed else _networks(allowed),
            persistent_keepalive=keepalive or 0,
            preshared_key=None if psk is None or psk == _NO_KEY else base64.b64encode(psk).decode(),
            last_handshake=seconds + nanoseconds / 1e9,
            rx_bytes=received or 0,
            tx_bytes=sent or 0,
        )
        self._parsed[key] = (address, allowed, peer)
        return peer


def _endpoint(data: bytes) -> Endpoint | None:
    if len(data) == SOCKADDR_IN.size:
        _, port, packed = SOCKADDR_IN.unpack(data)
        return Endpoint(ipaddress.IPv4Address(packed), port)
    if len(data) == SOCKADDR_IN6.size:
        _, port, _, packed, _ = SOCKADDR_IN6.unpack(data)
        return Endpoint(ipaddress.IPv6Address(packed), port)
    return None


def _networks(data: bytes) -> tuple[IPNetwork, ...]:
    networks: set[IPNetwork] = set()
    for element in elements(data):
        packed, length = _allowed.row(element)
        if packed is None or length is None:
            raise ValueError("an allowed IP without its address or length")
        kind = ipaddress.IPv4Network if len(packed) == 4 else ipaddress.IPv6Network
        networks.add(kind((packed, length), strict=False))
    return tuple(sorted(networks, key=network_order))
