"""What makes one process play many hosts, the same way each time: order by the seed, and processes that stand still.

`seeded` makes everything that is left to chance depend on a seed: trio's choice of the task that runs next, and every
generator of random numbers. `Freezer` is SIGSTOP for the tasks of one host: a task that is frozen makes no step, while
its timers run out and what it waits for arrives, and all of that is there when it thaws. A task belongs to the host of
the task that started it.

It knows trio from inside, as little as that needs: a task is a coroutine that yields to trio's loop, so another
coroutine between the two can keep it from going on. It knows nothing of agents.
"""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any
from unittest.mock import patch

import trio

running: ContextVar[Any] = ContextVar("running", default=None)
"""The host whose task it is."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In the block trio's scheduler and every new generator of random numbers depend on the seed alone.

    Sets of texts do not: PYTHONHASHSEED has to be the same for that (the Makefile sees to it).
    """
    source = random.Random(f"generators of {seed}")

    class Seeded(random.Random):
        def __init__(self, x: float | str | bytes | bytearray | None = None) -> None:
            super().__init__(source.getrandbits(64) if x is None else x)

    # What trio has for this purpose (its issue 890).
    scheduling = patch.object(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    with patch.object(random, "Random", Seeded), scheduling:
        trio._core._run._r.seed(seed)
        yield


class Freezer:
    """Lets the tasks of one host go on, or not."""

    def __init__(self) -> None:
        self.frozen = False
        self._leased: list[trio.lowlevel.Task] = []

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        held, self._leased = self._leased, []
        for task in held:
            trio.lowlevel.reschedule(task)

    @types.coroutine
    def pace(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run a task's coroutine, between whose steps it can be frozen."""
        outcome: Any = None
        while True:
            while self.frozen:
                self._leased.append(trio.lowlevel.current_task())
                # Cancelled or not: who stands still does not notice.
                yield from _wait()
            try:
                wish = coroutine.send(outcome)
            except StopIteration as end:
                return end.value
            outcome = yield wish


@types.coroutine
def _wait() -> Generator[Any, Any, Any]:
    waiting = trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)  # noqa: ASYNC105
    return (yield from waiting.__await__())


@contextmanager
def freezable() -> Iterator[None]:
    """In the block each task that a host's task starts is that host's, and stands still with it."""
    start_soon, start = trio.Nursery.start_soon, trio.Nursery.start

    def paced(function: Callable[..., Any]) -> Callable[..., Any]:
        host = running.get()
        if host is None:
            return function

        @wraps(function)
        async def run(*args: Any, **kwargs: Any) -> Any:
            return await host.freezer.pace(function(*args, **kwargs))

        return run

    def start_paced_soon(nursery: trio.Nursery, function: Callable[..., Any], *args: Any, name: object = None) -> None:
        start_soon(nursery, paced(function), *args, name=name)

    async def start_paced(nursery: trio.Nursery, function: Callable[..., Any], *args: Any, name: object = None) -> Any:
        return await start(nursery, paced(function), *args, name=name)

    with patch.multiple(trio.Nursery, start_soon=start_paced_soon, start=start_paced):
        yield
