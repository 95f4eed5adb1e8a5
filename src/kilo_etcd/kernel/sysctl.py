"""Forwarding sysctls through /proc/sys: read, set to 1, and given back at `cleanup`.

What a sysctl was before us is kept in a file of the runtime directory, with the network namespace that it is true for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from kilo_etcd.kernel.state import RestoreSysctl, SetForwarding

_ROOT = Path("/proc/sys")


def forwarding() -> frozenset[int]:
    """The families (4, 6) that are forwarded."""
    return frozenset(family for family in (4, 6) if _read(SetForwarding(family).path) == "1")


def set_forwarding(change: SetForwarding, record: Path) -> None:
    """OSError if it is not ours to write."""
    before = _read(change.path)
    _write(change.path, "1")
    former = _load(record)
    if before is not None and change.path not in former:
        former[change.path] = before
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps({"namespace": _namespace(), "before": former}))
        except OSError:
            return  # without a record cleanup leaves the sysctl as it is, which is the safe side


def to_restore(record: Path) -> tuple[RestoreSysctl, ...]:
    """What cleanup has to give back: sysctls that still have the value that we set."""
    return tuple(
        RestoreSysctl(path, value) for path, value in _load(record).items() if value != "1" and _read(path) == "1"
    )


def restore(change: RestoreSysctl) -> None:
    _write(change.path, change.value)


def _read(path: str) -> str | None:
    try:
        return (_ROOT / path).read_text().strip()
    except OSError:
        return None


def _write(path: str, value: str) -> None:
    (_ROOT / path).write_text(value)


def _namespace() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def _load(record: Path) -> dict[str, str]:
    try:
        data = json.loads(record.read_text())
        if data["namespace"] != _namespace():
            return {}
        return {path: value for path, value in data["before"].items() if path.startswith("net/") and ".." not in path}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
