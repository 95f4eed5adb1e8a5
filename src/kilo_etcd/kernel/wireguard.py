"""WireGuard devices, wherever they run, and the kernel's, which are reached by generic netlink."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

from kilo_etcd.kernel.errors import NetlinkError
from kilo_etcd.kernel.netlink import sockets
from kilo_etcd.kernel.netlink.codec import UNREADABLE, FormatError
from kilo_etcd.kernel.netlink.formats import core, wg
from kilo_etcd.kernel.read.wireguard import DeviceReader, DeviceState, read_family
from kilo_etcd.kernel.state import WireGuardChange
from kilo_etcd.kernel.write.wireguard import get_device, get_family, set_device


class Device(Protocol):
    """A WireGuard device, wherever it runs. Failures are OSErrors."""

    writes: int

    def read(self, name: str) -> DeviceState:
        """The device's key, port, mark and peers now."""
        ...

    def fingerprint(self, name: str) -> int:
        """A number that stays the same as long as nothing changes in the device that a plan sets. Of endpoints only
        whether there is one counts."""

    def write(self, name: str, changes: Sequence[WireGuardChange]) -> None:
        """Make changes, in as few transactions as they fit in."""


class KernelDevice:
    """The kernel's own WireGuard. Made only where `available` says so."""

    def __init__(self, generic: sockets.Socket, family: int) -> None:
        self._generic = generic
        self._family = family
        self.writes = 0
        self._last: DeviceReader | None = None

    def read(self, name: str) -> DeviceState:
        """Implements `Device.read`. What has not changed since the last call is the same object as then."""
        reader = DeviceReader(self._last)
        self._dump(name, reader)
        self._last = reader
        try:
            return reader.result()
        except UNREADABLE:
            raise FormatError from None

    def fingerprint(self, name: str) -> int:
        """Implements `Device.fingerprint`."""
        reader = DeviceReader()
        self._dump(name, reader)
        return reader.fingerprint()

    def _dump(self, name: str, reader: DeviceReader) -> None:
        self._generic.dump(get_device(self._family, name), reader.take)

    def write(self, name: str, changes: Sequence[WireGuardChange]) -> None:
        """Implements `Device.write`. Raises the first error of its messages, all of which were sent."""
        batch = set_device(self._family, name, changes)
        self.writes += len(batch)
        for error in self._generic.send(batch):
            if error is not None:
                raise error


def available(generic: sockets.Socket) -> int | None:
    """The number of the kernel's WireGuard family, or None: it has none. (Asking loads the module.)"""
    try:
        return generic.get(get_family(wg.WG_GENL_NAME), read_family)
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def generic_socket() -> sockets.Socket:
    """A socket for generic netlink, by which the kernel's WireGuard is reached."""
    return sockets.Socket(core.NETLINK_GENERIC)
