"""The one task that changes the kernel, and what wakes it: for the agent and for `kgctl connect` alike.

Whoever wants the plan made and applied again calls `Reconciler.nudge`. Its own tasks do so when another program changes
the kernel, when a name resolves to other addresses, when the host's addresses change, and once a period. Nudges that
come while an apply is under way make one more, however many they are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from kilo_etcd import kernel
from kilo_etcd.base.backoff import RepairBackoff
from kilo_etcd.runtime.logs import Logger, Once
from kilo_etcd.runtime.resolve import Resolver

KERNEL_RETRY_SECONDS = 0.5
SETTLE_SECONDS = 0.5
"""How long changes of the host's own addresses may go on before they are looked at: they come in bursts."""


class Reconciler:
    """`run` is its task. `apply(fresh)` makes the plan and brings it to the kernel, which is read anew if `fresh`."""

    def __init__(
        self,
        apply: Callable[[bool], Awaitable[None]],
        device: kernel.Kernel,
        resolver: Resolver,
        *,
        look: Callable[[], Awaitable[None]],
        resync_period: float,
        log: Logger,
        once: Once,
    ) -> None:
        """`look` finds the host's addresses again, and raises nothing. `resync_period`: seconds."""
        self._apply, self._device, self._resolver, self._look = apply, device, resolver, look
        self._resync_period, self._once = resync_period, once
        self.log = log
        self._wake = trio.Event()
        self._wanted = self._fresh = False
        self._alive: Callable[[], None] | None = None
        """To be called by the task that applies."""
        self._programmed = False
        """Whether the kernel could ever be programmed."""
        self._failed = False
        """Whether it could not the last time."""

    def nudge(self, *, fresh: bool = False) -> None:
        """Have the plan made and applied; `fresh`: what the kernel holds is read anew."""
        self._fresh = self._fresh or fresh
        self._wanted = True
        self._wake.set()

    def beat(self, alive: Callable[[], None]) -> None:
        """Have the task call `alive` when it comes to it, which shows that it is not stuck."""
        self._alive = alive
        self._wake.set()

    async def program(self, call: Callable[[], Awaitable[kernel.ApplyReport]]) -> kernel.ApplyReport | str:
        """What `call` reports; or why the kernel cannot be programmed, which is tried again once `apply` has returned.
        KernelError: it never could, so the operator, who is at the terminal, must know."""
        try:
            report = await call()
        except kernel.KernelError as error:
            if not self._programmed:
                raise
            self._failed = True
            self._once.error("kernel", "the kernel cannot be programmed; trying again", error=str(error))
            return str(error)
        self._programmed = True
        self._once.clear("kernel", "the kernel can be programmed again")
        return report

    async def run(self) -> None:
        """Apply, and look at what calls for it, until cancelled. KernelError: as `program` says."""
        async with trio.open_nursery() as nursery:
            for task in (self._follow_drift, self._follow_names, self._follow_addresses, self._resync):
                nursery.start_soon(task)
            await self._reconcile()

    async def _reconcile(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self._alive is not None:
                self._alive()
                self._alive = None
            wanted, self._wanted = self._wanted, False
            fresh, self._fresh = self._fresh, False
            if wanted:
                await self._apply(fresh)
            if self._failed:
                self._failed = False
                await trio.sleep(KERNEL_RETRY_SECONDS)
                self.nudge(fresh=True)

    async def _follow_drift(self) -> None:
        backoff = RepairBackoff()
        while True:
            drift = await self._device.wait_drift()
            pause = backoff.pause(trio.current_time())
            if pause:
                self.log.warning(
                    "another program changes the kernel again and again; repairing less often",
                    what=drift, seconds=f"{pause:g}",
                )  # fmt: skip
                await trio.sleep(pause)
            else:
                self.log.warning("another program changed the kernel; repairing", what=drift)
            self.nudge(fresh=True)

    async def _follow_names(self) -> None:
        while True:
            await self._resolver.wait_changed()
            self.nudge()

    async def _follow_addresses(self) -> None:
        """The host's addresses may change while it runs: a network comes late at boot, or a laptop moves."""
        while True:
            await self._device.wait_moved()
            await trio.sleep(SETTLE_SECONDS)
            await self._look()
            self.nudge()

    async def _resync(self) -> None:
        while True:
            await trio.sleep(self._resync_period)
            await self._look()
            self.nudge(fresh=True)
