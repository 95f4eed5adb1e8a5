"""What signals ask of the agent: to stop (SIGTERM, SIGINT), at once (again), or to run its code anew (SIGHUP)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable, Callable

import trio

from kilo_etcd.agent.endings import StoppedAtOnce
from kilo_etcd.runtime.logs import Logger


async def follow_signals(
    stopping: trio.Event, log: Callable[[], Logger], *, reload: Callable[[], Awaitable[None]]
) -> None:
    """Set `stopping` at the first signal to stop, until cancelled. `reload` is called at SIGHUP, once at a time (on a
    terminal that stops the agent). StoppedAtOnce, in a group: at a second signal to stop."""
    reloads = False

    async def reload_once() -> None:
        nonlocal reloads
        try:
            await reload()
        finally:
            reloads = False

    received = trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with received as signals:
        async with trio.open_nursery() as nursery:
            async for number in signals:
                # At a terminal it means that the terminal was closed.
                if number == signal.SIGHUP and not (sys.stdin and sys.stdin.isatty()):
                    if not stopping.is_set() and not reloads:
                        reloads = True
                        nursery.start_soon(reload_once)
                    continue
                if stopping.is_set():
                    raise StoppedAtOnce(f"stopped at once: {signal.Signals(number).name} was received a second time")
                log().info("stopping", signal=signal.Signals(number).name)
                stopping.set()


async def until_set(stopping: trio.Event, work: Callable[[], Awaitable[None]]) -> bool:
    """Whether `work` came to its end before `stopping` was set, which cancels it."""
    finished = False
    async with trio.open_nursery() as inner:

        async def give_up() -> None:
            await stopping.wait()
            inner.cancel_scope.cancel()

        inner.start_soon(give_up)
        await work()
        finished = True
        inner.cancel_scope.cancel()
    return finished
