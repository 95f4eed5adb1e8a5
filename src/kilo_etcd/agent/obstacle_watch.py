"""Says what on this host drops what it forwards, for as long as it forwards or was demoted for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from kilo_etcd import kernel
from kilo_etcd.agent.diagnostics import AppliedPlan
from kilo_etcd.kernel.firewall.chains import Obstacle
from kilo_etcd.store.events import wait_any

OBSTACLES_PAUSE, OBSTACLES_PERIOD = 2.0, 10.0
"""Seconds between two looks at what drops forwarded packets: at least after a change of the plan, and at most."""


class ObstacleWatch:
    """`run` is its task. `in_force` gives the plan that is, `applied` the event of the next one, `demoted` whether this
    host is in its hold-down. `on_cleared` is called when the obstacles are gone; `note` takes what drops all that this
    host forwards and what drops some networks of it, when either is another."""

    def __init__(
        self,
        device: kernel.Kernel,
        *,
        in_force: Callable[[], AppliedPlan],
        applied: Callable[[], trio.Event],
        demoted: Callable[[], bool],
        on_cleared: Callable[[], None],
        note: Callable[[tuple[str, ...], tuple[str, ...]], None],
    ) -> None:
        self._kernel, self._in_force, self._applied, self._demoted = device, in_force, applied, demoted
        self._on_cleared, self._note = on_cleared, note
        self._noted: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._look = trio.Event()

    def look(self) -> None:
        """Look soon, although the plan is the same."""
        self._look.set()

    async def run(self) -> None:
        """Note what drops packets, until cancelled; when that is gone, have a host that was demoted stand as before."""
        obstructed: tuple[str, ...] = ()
        cut: tuple[Obstacle, ...] = ()
        while True:
            applied, plan = self._applied(), self._in_force()
            self._look = trio.Event()
            forwards = plan.plan is not None and bool(plan.plan.forwarding)
            # A plan that does not forward says nothing about what drops packets: what was found stays.
            if forwards:
                with suppress(OSError, kernel.KernelError):
                    obstacles = [obstacle for obstacle in await self._kernel.obstacles() if obstacle.certain]
                    cut = tuple(obstacle for obstacle in obstacles if obstacle.networks)
                    dropping = tuple(obstacle.text for obstacle in obstacles if not obstacle.networks)
                    if obstructed and not dropping:
                        # The reason for the demotion is gone.
                        self._on_cleared()
                    obstructed = dropping
            # The demoted leader's operator has to know what to mend, although others forward now.
            concerned = plan.sends or self._demoted()
            in_force = obstructed if forwards and concerned else ()
            networks = tuple(obstacle.text for obstacle in cut if forwards and (concerned or not obstacle.leading))
            if (in_force, networks) != self._noted:
                self._noted = in_force, networks
                self._note(in_force, networks)
            await trio.sleep(OBSTACLES_PAUSE)
            with trio.move_on_after(OBSTACLES_PERIOD):
                await wait_any(applied, self._look)
