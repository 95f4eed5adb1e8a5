"""Tells systemd how the agent is: sd_notify(3) and the watchdog, without a library.

Nothing is sent where nobody listens ($NOTIFY_SOCKET is not set), and nothing here raises or waits: a supervisor that
does not read is no reason to stop forwarding.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import trio


def notify(*assignments: str) -> bool:
    """Send assignments such as `READY=1` or `STATUS=...` in one message; whether systemd has it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not assignments or address[:1] not in ("/", "@"):
        return False
    # Each assignment is one line: a line break in a status must not become an assignment of its own.
    message = "\n".join(" ".join(assignment.splitlines()) for assignment in assignments)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as out:
            # A leading @ stands for the null byte of an abstract socket.
            out.sendto(
                message.encode(errors="replace"), b"\0" + os.fsencode(address[1:]) if address[0] == "@" else address
            )
    except (OSError, ValueError):
        return False
    return True


def notify_reloading() -> bool:
    """Say that the agent reloads; systemd wants the moment with it (Type=notify-reload). READY=1 ends it."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_interval() -> float | None:
    """Seconds within which systemd wants a WATCHDOG=1 (send it at half of that); None: it does not wait for any."""
    try:
        microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
        owner = int(os.environ.get("WATCHDOG_PID", str(os.getpid())))
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 and owner == os.getpid() else None


async def watchdog(beat: Callable[[Callable[[], None]], None]) -> None:
    """Have `beat` call what tells systemd that the agent is alive, as often as it wants that, until cancelled."""
    interval = watchdog_interval()
    while interval is not None:
        beat(_alive)
        await trio.sleep(interval / 2)


def _alive() -> None:
    notify("WATCHDOG=1")
