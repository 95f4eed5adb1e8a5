"""Where tests find a kernel that has WireGuard and IPIP: this machine's, or a guest's (scripts/guest)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = "1200"
"""Seconds for a guest, which has one processor and may share it; some take 200 on an idle machine."""

ROOT = Path(__file__).resolve().parents[1]


def guest_runner(*, systemd: bool = False) -> list[str]:
    """The command that runs another one on a kernel with WireGuard and IPIP; empty if this machine's own has both.

    With `systemd` it is always a guest, and systemd is process 1 there.

    Fails the test where there is neither.
    """
    if not systemd and all(Path("/sys/module", name).exists() for name in ("wireguard", "ipip")):
        return []
    if named := os.environ.get("KILO_GUEST"):
        return [named, *(["--systemd"] if systemd else []), "--timeout", TIMEOUT, "--"]
    runner = str(ROOT / "scripts" / "guest")
    # `make test` has seen to it that there is a kernel; else one is built now, in silence.
    completed = subprocess.run([runner, "kernel"], capture_output=True, text=True, timeout=3600, check=False)
    if completed.returncode != 0:
        pytest.fail(
            "needs a kernel with WireGuard and IPIP: load the modules wireguard and ipip, or name a User-mode Linux "
            f"kernel in KILO_UML ({completed.stderr.strip()})",
            pytrace=False,
        )
    return [runner, "run", *(["--systemd"] if systemd else []), "--timeout", TIMEOUT, "--"]


def pytest_in_guest(
    *arguments: str, environment: dict[str, str] | None = None, systemd: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run pytest there. The root is read-only in a guest, so nothing is cached."""
    variables = [f"{name}={value}" for name, value in {"HOME": "/tmp", **(environment or {})}.items()]
    command = [
        *guest_runner(systemd=systemd),
        *("env", *variables),
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1300, check=False)
