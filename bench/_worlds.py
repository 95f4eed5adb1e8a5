"""Where benchmarks of the data path and of programming run: throw-away namespaces, here or in a guest.

`run_in_worlds(file)` starts a benchmark's file again inside namespaces of its own, once for each way to have WireGuard:
the kernel's (this machine's, or a guest's where this machine has none) and `wireguard-go` here; KILO_BENCH_WIREGUARD
(`kernel` or `userspace`) chooses one. What it leaves ends with the namespaces.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Backend = Literal["kernel", "userspace"]

_ROOT = Path(__file__).resolve().parents[1]
_PREPARE = (
    "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/wireguard /run/netns && "
    'ip link set lo up && exec "$@"'
)
_TIMEOUT = "1800"
_BACKENDS: tuple[Backend, ...] = ("kernel", "userspace")


def inside() -> Backend | None:
    """The way to have WireGuard that this process was started for, or None: it is the one to call `run_in_worlds`."""
    found = os.environ.get("KILO_BENCH_INSIDE")
    return next((backend for backend in _BACKENDS if backend == found), None)


def sh(command: str, *, given: str | None = None) -> str:
    """Run a line of shell; its output. CalledProcessError if it fails."""
    return subprocess.run(["sh", "-c", command], input=given, text=True, check=True, stdout=subprocess.PIPE).stdout


def at(world: str, host: str, script: str) -> None:
    """Run lines of shell on a host of a world, with a directory of its own for WireGuard's sockets."""
    given = f"set -e\nmount -t tmpfs none /run/wireguard\n{script}\n"
    sh(f"ip netns exec {world}-{host} unshare -m sh >/dev/null", given=given)


def run_in_worlds(file: str, *arguments: str) -> int:
    """0 if the benchmark did well each time. Where no kernel has WireGuard, that part is left out, in words."""
    failed = 0
    for backend in os.environ.get("KILO_BENCH_WIREGUARD", "kernel userspace").split():
        way = _way(backend)
        if way is None:
            print("kernel WireGuard: left out, for this machine has none and there is no guest kernel (KILO_UML)\n")
            continue
        variables = [f"KILO_BENCH_INSIDE={backend}", f"KILO_BENCH_QUICK={os.environ.get('KILO_BENCH_QUICK', '')}"]
        namespaces = ["unshare", "-n", "-m", "-p", "--fork", "--kill-child", "--mount-proc"]
        command = [*way, "env", *variables, *namespaces, "sh", "-c", _PREPARE, "sh", sys.executable, file, *arguments]
        failed |= subprocess.run(command, cwd=Path(file).parent, stdin=subprocess.DEVNULL).returncode != 0
    return int(failed)


def _way(backend: str) -> Sequence[str] | None:
    """What a command is put behind so that it finds that WireGuard."""
    if backend == "userspace" or _has_wireguard():
        return ()
    guest = str(_ROOT / "scripts" / "guest")
    completed = subprocess.run([guest, "kernel"], stdout=subprocess.DEVNULL)  # may build it, and says so
    return (guest, "run", "--memory", "2G", "--timeout", _TIMEOUT, "--") if completed.returncode == 0 else None


def _has_wireguard() -> bool:
    made = ["unshare", "-n", "ip", "link", "add", "kilo-probe", "type", "wireguard"]
    return subprocess.run(made, capture_output=True).returncode == 0
