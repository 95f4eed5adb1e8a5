"""Sysctls through /proc/sys: read, set, and given back at `cleanup`. Most are those of forwarding, which are set to 1.

A host that begins to forward IPv6 takes itself for a router: from then on it ignores router advertisements, and
forgets at once the default route that it has from them, unless the interface's accept_ra is 2. So each interface that
accepted them before (accept_ra 1) is set to 2 first, so it goes on accepting them. `default` is among them, for the
interfaces that come later. Where something else (systemd-networkd, NetworkManager) does that work, accept_ra is 0
and stays so.

An rp_filter that is strict is made loose for `encrypted` (`kernel.routing.encrypted`), and gets its value back when
that ends.

What a sysctl was before us is kept in a file of the runtime directory, with the network namespace that it is true for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kilo_etcd.base import descriptors
from kilo_etcd.base.namespaces import network_namespace
from kilo_etcd.base.wholefile import write_whole
from kilo_etcd.kernel.state import (
    AllowPings,
    KeepAdvertisements,
    LoosenReversePath,
    RestoreSysctl,
    SetForwarding,
    reverse_path,
)

_ROOT = Path("/proc/sys")


def forwarding() -> frozenset[int]:
    """The families (4, 6) that are forwarded."""
    return frozenset(family for family in (4, 6) if _read(SetForwarding(family).path) == "1")


def not_forwarding(names: Iterable[str]) -> tuple[str, ...]:
    """Those interfaces that are kept from forwarding IPv4 while the host forwards it. IPv6 has no such switch: there
    only that of all interfaces counts (ip-sysctl.rst)."""
    if 4 not in forwarding():
        return ()
    return tuple(name for name in names if _read(f"net/ipv4/conf/{name}/forwarding") == "0")


def command(name: str) -> str:
    """The name of an interface's switch as sysctl takes it: with slashes if the interface's own has dots."""
    path = f"net/ipv4/conf/{name}/forwarding"
    return path if "." in name else path.replace("/", ".")


def lacking() -> frozenset[int]:
    """The families that the kernel has been told to do without (ipv6.disable=1), or was built without."""
    net = _ROOT / "net"
    return frozenset({6}) if (net / "ipv4").is_dir() and not (net / "ipv6").is_dir() else frozenset()


def nexthops_by_number() -> bool:
    """Whether the kernel tells routes that name a nexthop object without what the object says."""
    return _read("net/ipv4/nexthop_compat_mode") == "0"


def advertised(*ours: str) -> tuple[str, ...]:
    """The interfaces, but `ours`, that accept router advertisements only as long as IPv6 is not forwarded; sorted."""
    if 6 in forwarding():
        return ()
    try:
        names = os.listdir(_ROOT / "net/ipv6/conf")
    except OSError as error:
        if descriptors.is_shortage(error):
            raise
        return ()
    devices = [name for name in sorted(names) if name not in ("all", "lo", *ours)]
    return tuple(name for name in devices if _read(KeepAdvertisements(name).path) == "1")


def nobody_may_ping() -> bool:
    """Whether the kernel's echo sockets are for no group at all, as they are by default: the range is empty."""
    words = (_read(AllowPings(0).path) or "").split()
    return len(words) == 2 and all(word.isdecimal() for word in words) and int(words[0]) > int(words[1])


def strict(names: Iterable[str]) -> dict[str, str]:
    """Those devices whose rp_filter is strict, by their own value or by that of all devices -> their own value. The
    larger of the two counts (ip-sysctl.rst)."""
    all_devices = _read(reverse_path("all"))
    values = {name: value for name in names if (value := _read(reverse_path(name))) is not None}
    return {name: value for name, value in values.items() if max(all_devices or "0", value) == "1"}


def loosened(record: Path) -> dict[str, str]:
    """Devices that were made loose by us, and still are -> the former value."""
    before, behind = reverse_path("*").split("*")
    return {
        path.removeprefix(before).removesuffix(behind): value
        for path, value in _load(record).items()
        if path.startswith(before) and path.endswith(behind) and _read(path) == _LOOSE
    }


_LOOSE = "2"


def change_to(change: SetForwarding | AllowPings | KeepAdvertisements | LoosenReversePath, record: Path) -> None:
    """OSError if it is not ours to write."""
    before = _read(change.path)
    _write(change.path, _ours(change.path))
    if isinstance(change, SetForwarding) and change.device:
        return  # It goes with its device.
    former = _load(record)
    if before is not None and change.path not in former:
        former[change.path] = before
        # Without a record cleanup leaves the sysctl as it is, which is the safe side.
        with suppress(OSError):
            _store(record, former)


def _store(record: Path, former: dict[str, str]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    write_whole(record, json.dumps({"namespace": network_namespace(), "before": former}).encode())


def to_restore(record: Path) -> tuple[RestoreSysctl, ...]:
    """What cleanup has to give back: sysctls that still have the value that we set."""
    return tuple(
        RestoreSysctl(path, value)
        for path, value in _load(record).items()
        if value != _ours(path) and _read(path) == _ours(path)
    )


def _ours(path: str) -> str:
    if path == AllowPings(0).path:
        return f"{os.getegid()}\t{os.getegid()}"
    return "2" if path.endswith(("/accept_ra", "/rp_filter")) else "1"


def restore(change: RestoreSysctl, record: Path) -> None:
    """OSError if it is not ours to write."""
    _write(change.path, change.value)
    former = _load(record)
    if former.pop(change.path, None) is not None:
        with suppress(OSError):
            _store(record, former)


def _read(path: str) -> str | None:
    try:
        return (_ROOT / path).read_text().strip()
    except OSError as error:
        if descriptors.is_shortage(error):
            raise
        return None


def _write(path: str, value: str) -> None:
    (_ROOT / path).write_text(value)


def _load(record: Path) -> dict[str, str]:
    try:
        data = json.loads(record.read_text())
        if data["namespace"] != network_namespace():
            return {}
        return {
            path: value
            for path, value in data["before"].items()
            if path.startswith("net/") and ".." not in path and isinstance(value, str)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
