"""Where tests find a kernel that has WireGuard and IPIP: this machine's, or a guest's beside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def guest_runner() -> list[str]:
    """The command that runs another one on a kernel with WireGuard; empty if this machine's own has it.

    Fails the test where there is neither.
    """
    if Path("/sys/module/wireguard").exists():
        return []
    runner = Path(os.environ.get("KILO_GUEST", ROOT.parent / "shared" / "uml" / "run"))
    if not runner.exists():
        pytest.fail(
            "needs a kernel with WireGuard: load the module wireguard, or name a command that runs one in KILO_GUEST",
            pytrace=False,
        )
    return [str(runner), "--timeout", "300", "--"]


def pytest_in_guest(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run pytest there. The root is read-only in a guest, so nothing is cached."""
    variables = [f"{name}={value}" for name, value in {"HOME": "/tmp", **(environment or {})}.items()]
    command = [
        *guest_runner(), "env", *variables, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=320, check=False)
