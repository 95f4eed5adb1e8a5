"""A program in a lab's machine on the terminal of the person who asked for it, job control and all.

The terminal belongs to the person's session, so the program gets a pseudo-terminal of its own, and this
module carries bytes and window sizes between the two. Where input or output is no terminal, the program
simply gets the descriptors.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import sys
import termios
import tty
from collections.abc import Mapping, Sequence
from contextlib import suppress

import trio

from kilo_etcd.lab.client import Lab

SHELL = ("bash", "--noprofile", "--norc", "-i")
"""Not the person's own shell: its start-up files know nothing of the lab."""
SHELL_ENVIRONMENT = {"PS1": r"\h:\w\$ "}


async def run_here(lab: Lab, machine: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run a program with this process's own input, output and errors; its exit status (128 + n for signal n)."""
    if os.isatty(0) and os.isatty(1):
        status = await _on_terminal(lab, machine, argv, env)
    else:
        sys.stdout.flush()
        status = await lab.attach_program(machine, argv, (0, 1, 2), env=env)
    return status if status >= 0 else 128 - status


async def _on_terminal(lab: Lab, machine: str, argv: Sequence[str], env: Mapping[str, str] | None) -> int:
    master, slave = pty.openpty()
    before = termios.tcgetattr(0)
    try:
        _copy_size(slave)
        tty.setraw(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, 0, master)
            nursery.start_soon(_follow_size, slave)
            done = trio.Event()

            async def show() -> None:
                await _copy(master, 1)
                done.set()

            nursery.start_soon(show)
            status = await lab.attach_program(machine, argv, (slave, slave, slave), terminal=True, env=env)
            os.close(slave)
            slave = -1
            # What the program said last is still on its way; with the last slave closed, reading ends.
            with trio.move_on_after(1):
                await done.wait()
            nursery.cancel_scope.cancel()
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        os.close(master)
        if slave >= 0:
            os.close(slave)
    return status


async def _copy(source: int, target: int) -> None:
    # A pseudo-terminal whose other end has closed fails with EIO instead of ending.
    with suppress(OSError):
        while True:
            await trio.lowlevel.wait_readable(source)
            data = os.read(source, 65536)
            if not data:
                return
            while data:
                await trio.lowlevel.wait_writable(target)
                data = data[os.write(target, data) :]


async def _follow_size(slave: int) -> None:
    with trio.open_signal_receiver(signal.SIGWINCH) as changes:
        async for _ in changes:
            _copy_size(slave)


def _copy_size(slave: int) -> None:
    with suppress(OSError):
        fcntl.ioctl(slave, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))
