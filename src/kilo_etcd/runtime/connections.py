"""What the connections of this machine (`kgctl connect`) are, in files that others of its commands read without etcd.

A connection writes its file before it changes anything, and removes it when nothing is left of it. A file whose process
has ended is that of a connection that crashed, or of one whose interface was to stay (`--no-clean-up`). As with locks,
the number of the network namespace is part of the file's name. Where no file can be written there is none.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from kilo_etcd.base.wholefile import write_whole
from kilo_etcd.runtime.lock_file import RUNTIME_DIR


@frozen(kw_only=True)
class ConnectionFile:
    """What is known of one connection. There are no secrets in it."""

    interface: str
    peer: str
    prefix: str
    public_key: str
    exit_node: str | None = None
    process: int
    started: int
    """When the process started, in the kernel's ticks since boot: process numbers are used again."""
    since: float
    """Unix seconds."""
    stays: bool = False
    """Whether the connection ended and was to leave everything in place."""

    @property
    def runs(self) -> bool:
        """Whether its process lives."""
        return started_at(self.process) == self.started


def started_at(process: int) -> int | None:
    """When a process started, in ticks since boot; None: there is none, or it has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may have any character.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def write(connection: ConnectionFile, directory: Path = RUNTIME_DIR) -> None:
    """Have the file of the connection say this, if it can be written."""
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(_path(connection.interface, directory), json.dumps(attrs.asdict(connection)).encode())


def remove(interface: str, directory: Path = RUNTIME_DIR) -> None:
    """Nothing is left of the connection."""
    with suppress(OSError):
        _path(interface, directory).unlink()


def read(interface: str, directory: Path = RUNTIME_DIR) -> ConnectionFile | None:
    """What is known of the connection of an interface."""
    with suppress(OSError):
        return _decoded(_path(interface, directory).read_bytes())
    return None


def read_all(directory: Path = RUNTIME_DIR) -> tuple[ConnectionFile, ...]:
    """All connections of this network namespace, by interface. OSError: the directory cannot be read."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return ()
    form = re.compile(rf"connection\.(.+)\.{_namespace()}\.json")
    found = (read(match[1], directory) for name in names if (match := form.fullmatch(name)))
    return tuple(connection for connection in found if connection is not None)


def _decoded(content: bytes) -> ConnectionFile | None:
    with suppress(ValueError, TypeError, UnicodeDecodeError):
        data: Any = json.loads(content)
        known = {field.name for field in attrs.fields(ConnectionFile)}
        return ConnectionFile(**{name: value for name, value in data.items() if name in known})
    return None


def _path(interface: str, directory: Path) -> Path:
    return directory / f"connection.{interface}.{_namespace()}.json"


def _namespace() -> int:
    return os.stat("/proc/self/ns/net").st_ino
