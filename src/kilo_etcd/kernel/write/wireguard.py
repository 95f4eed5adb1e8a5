"""Changes of a kernel WireGuard device as requests of generic netlink.

All changes that fit one message go in one; the kernel makes them under one lock. Keys pass through here and are kept
nowhere.
"""

from __future__ import annotations

import base64
import errno
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from functools import cache

from kilo_etcd.kernel.netlink import formats
from kilo_etcd.kernel.netlink.codec import Container, Form, Writer, attribute
from kilo_etcd.kernel.netlink.formats import core, ctrlmsg, wg, wgmsg
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage
from kilo_etcd.kernel.state import RemovePeer, SetDevice, SetPeer, WireGuardChange
from kilo_etcd.model import Endpoint, IPNetwork

_NO_KEY = bytes(wg.WG_KEY_LEN)
_ROOM = 30_000
"""Bytes of peers per message: attributes end at 64 KiB, and half of it keeps clear of socket buffers."""
_ALLOWED_IPS = 500
"""Allowed IPs of one peer per message."""

_short, _number = formats.U16, formats.U32
_IPV4, _IPV6 = _short.pack(socket.AF_INET), _short.pack(socket.AF_INET6)
_FAMILY = {4: _IPV4, 6: _IPV6}
_ENDPOINT4, _ENDPOINT6 = formats.SOCKADDR_IN, formats.SOCKADDR_IN6


def _as_text(value: bytes) -> object:
    return value.rstrip(b"\0").decode()


def _as_endpoint(value: bytes) -> object:
    if len(value) == _ENDPOINT4.size:
        _, port, packed = _ENDPOINT4.unpack(value)
        return {"addr": str(ipaddress.IPv4Address(packed)), "port": port}
    _, port, flow, packed, scope = _ENDPOINT6.unpack(value)
    address = str(ipaddress.IPv6Address(packed))
    return {"addr": address, "port": port, "flowinfo": flow, "scope_id": _number.unpack(scope)[0]}


_control = Writer(ctrlmsg, {"CTRL_ATTR_FAMILY_NAME": _as_text})
_device = Writer(wgmsg, {"WGDEVICE_A_IFNAME": _as_text, "WGDEVICE_A_PRIVATE_KEY": base64.b64encode})
_peer = Writer(
    wgmsg.wgdevice_peer,
    {
        "WGPEER_A_PUBLIC_KEY": base64.b64encode, "WGPEER_A_PRESHARED_KEY": base64.b64encode,
        "WGPEER_A_ENDPOINT": _as_endpoint,
    },
)  # fmt: skip
_allowed = Writer(wgmsg.wgdevice_peer.wgpeer_allowedip, {})
_peers = Container.of(wgmsg, "WGDEVICE_A_PEERS")
_allowed_ips = Container.of(wgmsg.wgdevice_peer, "WGPEER_A_ALLOWEDIPS")


def get_family(name: str) -> NetlinkMessage:
    """Asks for the number of a family of generic netlink."""
    fixed = (core.CTRL_CMD_GETFAMILY, 1, 0)
    return NetlinkMessage(core.GENL_ID_CTRL, 0, _control(fixed, {"CTRL_ATTR_FAMILY_NAME": _text(name)}))


def get_device(family: int, name: str) -> NetlinkMessage:
    """Asks for all that a device holds; `family` is WireGuard's number."""
    return NetlinkMessage(family, 0, _device((wg.WG_CMD_GET_DEVICE, wg.WG_GENL_VERSION, 0), _name(name)))


def set_device(family: int, name: str, changes: Sequence[WireGuardChange]) -> list[NetlinkMessage]:
    """The messages that make `changes` to the device `name`: one, if they fit. OSError(EINVAL): a value that WireGuard
    cannot have."""
    sent: list[NetlinkMessage] = []
    settings: dict[str, bytes] = {}
    peers: list[bytes] = []
    room = _ROOM

    def flush() -> None:
        nonlocal room
        if settings or peers:
            body = _device((wg.WG_CMD_SET_DEVICE, wg.WG_GENL_VERSION, 0), _name(name) | settings)
            sent.append(NetlinkMessage(family, 0, body + (_peers.whole(peers) if peers else b"")))
        settings.clear()
        peers.clear()
        room = _ROOM

    for change in changes:
        if isinstance(change, SetDevice):
            settings |= _settings(change)
            continue
        for peer in _parts(change):
            if len(peer) > room:
                flush()
            peers.append(peer)
            room -= len(peer)
    flush()
    return sent


def _settings(change: SetDevice) -> dict[str, bytes]:
    settings = {}
    if change.private_key is not None:
        settings["WGDEVICE_A_PRIVATE_KEY"] = raw(change.private_key)
    if change.listen_port is not None:
        settings["WGDEVICE_A_LISTEN_PORT"] = _short.pack(change.listen_port)
    if change.mark is not None:
        settings["WGDEVICE_A_FWMARK"] = _number.pack(change.mark)
    return settings


def _parts(change: SetPeer | RemovePeer) -> Iterator[bytes]:
    """The peer as one item of the list, or as two that belong into one message; more of them if its allowed IPs do
    not fit one message."""
    key = {"WGPEER_A_PUBLIC_KEY": raw(change.public_key)}
    if isinstance(change, RemovePeer):
        yield _item(_peer((), key | _REMOVE))
        return
    head = key.copy()
    if (preshared := change.preshared_key) is not None:
        head["WGPEER_A_PRESHARED_KEY"] = raw(preshared) if preshared else _NO_KEY
    if change.endpoint is not None:
        head["WGPEER_A_ENDPOINT"] = _sockaddr(change.endpoint)
    if change.persistent_keepalive is not None:
        head["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL"] = _short.pack(change.persistent_keepalive)
    if change.replace_allowed_ips:
        head["WGPEER_A_FLAGS"] = _REPLACE
    ips = change.allowed_ips
    removal = _item(_peer((), key | _REMOVE)) if change.reset else b""
    yield removal + _item(_peer((), head) + _list(ips[:_ALLOWED_IPS]))
    for start in range(_ALLOWED_IPS, len(ips), _ALLOWED_IPS):
        yield _item(_peer((), key) + _list(ips[start : start + _ALLOWED_IPS]))


_REPLACE = _number.pack(wg.WGPEER_F_REPLACE_ALLOWEDIPS)
_REMOVE = {"WGPEER_A_FLAGS": _number.pack(wg.WGPEER_F_REMOVE_ME)}


def _item(body: bytes) -> bytes:
    return attribute(_peers.element, body)


def _list(ips: Sequence[IPNetwork]) -> bytes:
    if not ips:
        return b""
    forms = _allowed_forms()
    return _allowed_ips.whole(
        [forms[ip.version](b"", _FAMILY[ip.version], ip.network_address.packed, _LENGTHS[ip.prefixlen]) for ip in ips]
    )


@cache
def _allowed_forms() -> dict[int, Form]:
    """Family -> form of an allowed IP with its header: there are many, and their shapes are known beforehand."""
    forms = {}
    for version, length in ((4, 4), (6, 16)):
        values = _FAMILY[version], bytes(length), b"\0"
        names = "WGALLOWEDIP_A_FAMILY", "WGALLOWEDIP_A_IPADDR", "WGALLOWEDIP_A_CIDR_MASK"
        form = _allowed.form((), dict(zip(names, values, strict=True)))
        forms[version] = _allowed_ips.element_form(form, b"", *values)
    return forms


def raw(key: str) -> bytes:
    """The 32 bytes of a base64 key. OSError(EINVAL) if it is none: one bad key must not stop the other peers."""
    try:
        data = base64.b64decode(key, validate=True)
    except ValueError:
        data = b""
    if len(data) != wg.WG_KEY_LEN:
        raise OSError(errno.EINVAL, "a WireGuard key has 32 bytes in base64 (44 characters)")
    return data


def _sockaddr(endpoint: Endpoint) -> bytes:
    address = endpoint.address
    if address is None:
        raise OSError(errno.EINVAL, f"the endpoint {endpoint} is a name that was not resolved")
    if address.version == 4:
        return _ENDPOINT4.pack(_IPV4, endpoint.port, address.packed)
    scope = str(address.scope_id or 0)
    return _ENDPOINT6.pack(_IPV6, endpoint.port, 0, address.packed, _number.pack(int(scope) if scope.isdigit() else 0))


def _name(name: str) -> dict[str, bytes]:
    return {"WGDEVICE_A_IFNAME": _text(name)}


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


_LENGTHS = [bytes((length,)) for length in range(129)]
