"""How much slower this machine is than an idle one, measured while a test runs, for bounds that depend on it."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio
from attrs import define, field

WORK, EVERY = 0.02, 0.4
"""Seconds of processor time that each measurement takes, and from one to the next."""

TIMER = 0.05
"""Seconds: the timers whose lateness is measured meanwhile. In a guest the processor time says little, since what the
host takes away from the guest may count as the guest's own."""

FREE = 1.5
"""So much slower is a machine that does nothing but the test, whose own processes share two processors."""


STARTS_IN_A_LEASE = 4
"""So many times an agent's program can be loaded within a lease: a restart is more than that, and not alone."""


@define
class Machine:
    """What `measured` has found. `stall` is the longest measurement or lateness of a timer, in seconds: WORK where a
    processor is free."""

    taken: list[float] = field(factory=list)
    late: list[float] = field(factory=list)
    """By how much each timer was late."""

    @property
    def slowness(self) -> float:
        """How many times longer work took than the processor time it needed, on average; 1.0 at least."""
        return max(1.0, sum(self.taken) / (WORK * len(self.taken)) / FREE) if self.taken else 1.0

    @property
    def stall(self) -> float:
        return max((*self.taken, *self.late), default=WORK)

    def allows(self, seconds: float) -> float:
        """What becomes here, in seconds, of a bound that an idle machine keeps with room to spare."""
        return seconds * self.slowness + self.stall


@contextmanager
def measured() -> Iterator[Machine]:
    """Measure while in the block. It takes 5 % of one processor."""
    machine, ended = Machine(), threading.Event()

    def measure() -> None:
        while True:
            began, end = time.monotonic(), time.thread_time() + WORK
            while time.thread_time() < end:
                pass
            machine.taken.append(time.monotonic() - began)
            for _ in range(round(EVERY / TIMER)):
                began = time.monotonic()
                if ended.wait(TIMER):
                    return
                machine.late.append(time.monotonic() - began - TIMER)

    thread = threading.Thread(target=measure, name="load", daemon=True)
    thread.start()
    try:
        yield machine
    finally:
        ended.set()
        thread.join()


def lease_for(seconds: int) -> int:
    """The TTL of leases, in seconds: `seconds`, but longer where a program takes so long to start that an agent's
    restart would end a lease."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import kilo_etcd.agent.main"], check=True)
    return max(seconds, math.ceil(STARTS_IN_A_LEASE * (time.monotonic() - began)))


@asynccontextmanager
async def measured_beside() -> AsyncIterator[Machine]:
    """`measured`, to be written behind a probe in one `async with`."""
    with measured() as machine:
        yield machine


@contextmanager
def soon(seconds: float) -> Iterator[None]:
    """What is in the block takes less than so many seconds; as many times longer as this machine is slower."""
    with measured() as machine, trio.fail_after(seconds * 20):
        began = trio.current_time()
        yield
        took = trio.current_time() - began
    assert took < machine.allows(seconds), (took, machine)
