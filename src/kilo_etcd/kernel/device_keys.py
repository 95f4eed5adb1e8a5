"""The public key that an agent has given its WireGuard device, in a file beside the host's other records.

By it the device is known as an agent's after the host's own key was replaced, also on a member of a location, whose
routes do not lead there. An address within the mesh says nothing: another program's device may have one too.

As with locks, the number of the network namespace is part of the file's name. A file counts only if it is root's or
this user's, and nobody else may have written it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from kilo_etcd.base.namespaces import network_namespace
from kilo_etcd.base.regularfile import NotRegular, open_regular
from kilo_etcd.base.wholefile import write_whole

_MOST = 64
"""Bytes of a file that is read; a key has 44."""


class DeviceKeys:
    """One file in `directory` for each interface that an agent has."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)

    def _path(self, interface: str) -> Path:
        return self._directory / f"{interface}.{network_namespace()}.public-key"

    def read(self, interface: str) -> str:
        """Empty: no agent has given the device a key, or which one cannot be read or believed."""
        try:
            with open_regular(self._path(interface), follow=False) as file:
                status = os.fstat(file.fileno())
                if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022 or status.st_size > _MOST:
                    return ""
                return file.read(_MOST).decode("ascii").strip()
        except (OSError, ValueError, NotRegular):
            return ""

    def write(self, interface: str, public_key: str) -> None:
        """If that fails, the device is known by the host's key and by routes alone."""
        if self.read(interface) == public_key:
            return
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(interface), f"{public_key}\n".encode(), mode=0o600)

    def forget(self, interface: str) -> None:
        """Remove the file. OSError."""
        self._path(interface).unlink(missing_ok=True)
