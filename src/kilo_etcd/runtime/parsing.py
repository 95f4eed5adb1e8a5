"""Reads and checks the texts that operators write: durations, names of nodes and interfaces, prefixes, log levels.

Both `kg` and `kgctl` use it. A text that is wrong is a ValueError of one sentence; `read` makes a refusal of it that
names the flag and its environment variable.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import TypeVar

import click

from kilo_etcd.model import parse_value

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

LOG_LEVELS = ("debug", "info", "warning", "error", "none")
_KILO_LOG_LEVELS = {"all": "debug", "warn": "warning"}


def environment_name(flag: str) -> str:
    """The environment variable of one of the agent's flags: `--lease-ttl` is KILO_LEASE_TTL."""
    return "KILO_" + flag.removeprefix("--").replace("-", "_").upper()


def read(flag: str, parse: Callable[[], T], env: str | None = None) -> T:
    """What `parse` yields; its ValueError becomes a refusal that names the flag and its environment variable."""
    try:
        return parse()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=f"{flag} ({env or environment_name(flag)})") from None


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h|d)")


def parse_duration(text: str) -> float:
    """Seconds of a Go duration such as `2s`, `500ms` or `1h30m`, with `d` for days too; a bare number is seconds."""
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no duration; write for instance 500ms, 5s, 2m, 24h or 7d")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def shown_duration(seconds: int) -> str:
    """A duration for people, in its largest unit that fits twice: `12 s`, `3 min`, `2 h` or `4 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size * 2:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def parse_node_name(text: str) -> str:
    """A node's name: it becomes one part of an etcd key, so it may hold neither `/` nor white space."""
    if not text:
        raise ValueError("the node's name is empty; give --hostname or set the system's host name")
    if "/" in text or any(c.isspace() or not c.isprintable() for c in text):
        raise ValueError(f"{text!r} is no node name; leave out '/', white space and control characters")
    if len(text.encode()) > 253:
        raise ValueError(f"the node name has {len(text.encode())} bytes; at most 253 are allowed")
    return text


_NO_NAME = re.compile(r"localhost([.\d-].*)?|\(none\)", re.IGNORECASE)
"""What a system is called that has no name yet: every such system, so that two of them would be one node."""


def parse_own_name(text: str) -> str:
    """The name under which a host joins: a node's name that is the host's own."""
    if _NO_NAME.fullmatch(parse_node_name(text)):
        raise ValueError(
            f"{text!r} is the name of a system that has none, and no node can have it; set the host's name with "
            "hostnamectl, or give --hostname"
        )
    return text


def parse_prefix(text: str) -> str:
    """The etcd prefix: starts with `/`, ends without."""
    if not text.startswith("/") or text.rstrip("/") == "" or "//" in text or any(c.isspace() for c in text):
        raise ValueError(f"{text!r} is no etcd prefix; write for instance /kilo")
    return text.rstrip("/")


def parse_interface(text: str) -> str:
    """An interface name as the kernel takes it (dev_valid_name: 1 to 15 bytes, no `/`, `:` or white space)."""
    if not 0 < len(text.encode()) <= 15 or text in (".", "..") or any(c in "/:" or c.isspace() for c in text):
        raise ValueError(f"{text!r} is no interface name; use 1 to 15 characters without '/', ':' and white space")
    return text


def parse_log_level(text: str) -> str:
    """One of LOG_LEVELS; Kilo's `all` and `warn` are understood."""
    level = _KILO_LOG_LEVELS.get(text.strip().lower(), text.strip().lower())
    if level not in LOG_LEVELS:
        raise ValueError(f"{text!r} is no log level; choose one of {', '.join(LOG_LEVELS)}")
    return level


def one_of(kind: type[E], text: str) -> E:
    """The value of a kind that a person wrote. ValueError, which lists the values."""
    try:
        return parse_value(kind, text)
    except ValueError:
        raise ValueError(f"{text!r} is unknown; choose one of {', '.join(kind)}") from None
