"""Where tests find a kernel that has WireGuard and IPIP: this machine's, or a guest's (scripts/guest)."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TIMEOUT = "1200"
"""Seconds for a guest, which has one processor and may share it; some take 200 on an idle machine."""

OWN_CLOCK = "KILO_OWN_CLOCK"
"""Set in the environment of a test that may set the clock."""

ROOT = Path(__file__).resolve().parents[1]
GUEST = str(ROOT / "scripts" / "guest")


def guest_runner(*, systemd: bool = False, own_clock: bool = False) -> list[str]:
    """The command that runs another one on a kernel with WireGuard and IPIP; empty if this machine's own has both.

    With `systemd` it is always a guest, and systemd is process 1 there; with `own_clock` it is always a guest too.

    Fails the test where there is neither.
    """
    if not (systemd or own_clock) and all(Path("/sys/module", name).exists() for name in ("wireguard", "ipip")):
        return []
    if named := os.environ.get("KILO_GUEST"):
        return [named, *(["--systemd"] if systemd else []), "--timeout", TIMEOUT, "--"]
    if failure := _failure_of_kernel():
        pytest.fail(
            "needs a kernel with WireGuard and IPIP: load the modules wireguard and ipip, or name a User-mode Linux "
            f"kernel in KILO_UML ({failure})",
            pytrace=False,
        )
    return [GUEST, "run", *(["--systemd"] if systemd else []), "--timeout", TIMEOUT, "--"]


@cache
def _failure_of_kernel() -> str:
    """Why there is no kernel for a guest; empty if there is one.

    A kernel that is not there is built here, or waited for if another test builds it, at a low priority, since tests
    that look at times run meanwhile. A build that failed is not tried again.
    """
    command = ["nice", "-n", "15", GUEST, "kernel"]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    return completed.stderr.strip() or "no reason was given" if completed.returncode != 0 else ""


def pytest_in_guest(
    *arguments: str, environment: dict[str, str] | None = None, systemd: bool = False, own_clock: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run pytest there. The root is read-only in a guest, so nothing is cached."""
    environment = {**(environment or {}), **({OWN_CLOCK: "1"} if own_clock else {})}
    variables = [f"{name}={value}" for name, value in {"HOME": "/tmp", **environment}.items()]
    command = [
        *guest_runner(systemd=systemd, own_clock=own_clock),
        *("env", *variables),
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1300, check=False)
