"""What the connections of this machine (`kgctl connect`) are, in files that others of its commands read without etcd.

A connection writes its file before it changes anything, and removes it when nothing is left of it. A file whose process
has ended is that of a connection that crashed, or of one whose interface was to stay (`--no-clean-up`). As with locks,
the number of the network namespace is part of the file's name. Where no file can be written there is none.
"""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen
from attrs.validators import ge, instance_of, lt, optional

from kilo_etcd.base.namespaces import network_namespace
from kilo_etcd.base.wholefile import write_whole
from kilo_etcd.runtime.lock_file import RUNTIME_DIR


def _is_whole(_: object, __: object, value: Any) -> None:
    if type(value) is not int:
        raise TypeError(value)


def _is_time(_: object, __: object, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(value)


@frozen(kw_only=True)
class ConnectionFile:
    """What is known of one connection. There are no secrets in it."""

    interface: str = field(validator=instance_of(str))
    peer: str = field(validator=instance_of(str))
    prefix: str = field(validator=instance_of(str))
    public_key: str = field(validator=instance_of(str))
    exit_node: str | None = field(default=None, validator=optional(instance_of(str)))
    process: int = field(validator=[_is_whole, ge(0), lt(1 << 31)])
    started: int = field(validator=_is_whole)
    """When the process started, in the kernel's ticks since boot: process numbers are used again."""
    since: float = field(validator=_is_time)
    """Unix seconds."""
    joined: bool = field(default=False, validator=instance_of(bool))
    """Whether it has registered: before that it changes nothing here."""
    stays: bool = field(default=False, validator=instance_of(bool))
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


def change(interface: str, directory: Path = RUNTIME_DIR, **fields: Any) -> None:
    """Have the file of the connection, if there is one, say something else of some fields."""
    if (known := read(interface, directory)) is not None:
        write(attrs.evolve(known, **fields), directory)


def remove(interface: str, directory: Path = RUNTIME_DIR) -> None:
    """Nothing is left of the connection."""
    with suppress(OSError):
        _path(interface, directory).unlink()


def read(interface: str, directory: Path = RUNTIME_DIR) -> ConnectionFile | None:
    """What is known of the connection of an interface."""
    with suppress(OSError):
        known = _decoded(_path(interface, directory).read_bytes())
        return known if known is not None and known.interface == interface else None
    return None


def read_all(directory: Path = RUNTIME_DIR) -> tuple[ConnectionFile, ...]:
    """All connections of this network namespace, by interface. OSError: the directory cannot be read."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return ()
    form = re.compile(rf"connection\.(.+)\.{network_namespace()}\.json")
    readings = (read(match[1], directory) for name in names if (match := form.fullmatch(name)))
    return tuple(connection for connection in readings if connection is not None)


def _decoded(content: bytes) -> ConnectionFile | None:
    """None for anything but what `write` writes."""
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        data: Any = json.loads(content)
        known = {part.name for part in attrs.fields(ConnectionFile)}
        return ConnectionFile(**{name: value for name, value in data.items() if name in known})
    return None


def _path(interface: str, directory: Path) -> Path:
    return directory / f"connection.{interface}.{network_namespace()}.json"
