"""The task that changes the kernel: what wakes it, and what becomes of a kernel that cannot be programmed."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from kilo_etcd import kernel
from kilo_etcd.kernel.state import ApplyReport
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.runtime.logs import Once, get_logger
from kilo_etcd.runtime.reconciler import KERNEL_RETRY_SECONDS, SETTLE_SECONDS, Reconciler
from kilo_etcd.runtime.resolve import Resolver
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel

pytestmark = pytest.mark.autojump


class Host:
    """A machine whose agent has one plan for ever."""

    def __init__(self) -> None:
        self.machine = FakeHost()
        self.device = FakeKernel(self.machine, kernel.Setup(private_key=b64encode(bytes(32)).decode()))
        self.applies: list[tuple[float, bool]] = []
        """When, and whether what the kernel holds was to be read anew."""
        self.reports: list[ApplyReport | str] = []
        self.looks = 0
        self.busy = 0.0
        log = get_logger()
        self.reconciler = Reconciler(
            self.apply, self.device, Resolver(), look=self.look, resync_period=30.0, log=log, once=Once(log)
        )

    async def look(self) -> None:
        await trio.lowlevel.checkpoint()
        self.looks += 1

    async def apply(self, fresh: bool) -> None:
        self.applies.append((trio.current_time(), fresh))
        await trio.sleep(self.busy)
        self.reports.append(
            await self.reconciler.program(lambda: self.device.apply(HostPlan(node="a"), fresh=fresh))
        )  # fmt: skip


@asynccontextmanager
async def running() -> AsyncIterator[Host]:
    host = Host()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.reconciler.run)
        await trio.testing.wait_all_tasks_blocked()
        yield host
        nursery.cancel_scope.cancel()


async def test_nudges_that_come_while_it_applies_make_one_more_apply() -> None:
    async with running() as host:
        host.busy = 1.0
        host.reconciler.nudge()
        await trio.testing.wait_all_tasks_blocked()
        for fresh in (False, True, False):
            host.reconciler.nudge(fresh=fresh)
        await trio.sleep(5)
        assert [fresh for _, fresh in host.applies] == [False, True]


async def test_a_beat_alone_applies_nothing() -> None:
    beats = []
    async with running() as host:
        host.reconciler.beat(lambda: beats.append(trio.current_time()))
        await trio.testing.wait_all_tasks_blocked()
        assert beats
        assert not host.applies


async def test_a_task_that_is_stuck_does_not_beat() -> None:
    beats: list[float] = []
    async with running() as host:
        host.busy = 20.0
        host.reconciler.nudge()
        await trio.testing.wait_all_tasks_blocked()
        host.reconciler.beat(lambda: beats.append(trio.current_time()))
        await trio.sleep(10)
        assert not beats
        await trio.sleep(15)
        assert beats


async def test_a_kernel_that_cannot_be_programmed_is_tried_again_and_read_anew() -> None:
    async with running() as host:
        host.reconciler.nudge()
        await trio.testing.wait_all_tasks_blocked()
        host.machine.broken = "netlink is out of buffers"
        host.reconciler.nudge()
        await trio.sleep(2.2 * KERNEL_RETRY_SECONDS)
        assert len(host.applies) == 4
        assert all(fresh for _, fresh in host.applies[2:])
        host.machine.broken = None
        await trio.sleep(KERNEL_RETRY_SECONDS)
        assert isinstance(host.reports[-1], ApplyReport)
        assert all("netlink is out of buffers" in str(report) for report in host.reports[1:4])
        count = len(host.applies)
        await trio.sleep(10)
        assert len(host.applies) == count


async def test_a_kernel_that_was_never_programmed_ends_it() -> None:
    with pytest.RaisesGroup(pytest.RaisesGroup(pytest.RaisesExc(kernel.KernelError, match="out of buffers"))):
        async with running() as host:
            host.machine.broken = "netlink is out of buffers"
            host.reconciler.nudge()
            await trio.sleep(1)


async def test_once_a_period_the_addresses_are_looked_at_and_the_kernel_is_read() -> None:
    async with running() as host:
        await trio.sleep(31)
        assert (host.looks, [fresh for _, fresh in host.applies]) == (1, [True])


async def test_another_address_is_looked_at_once_the_burst_is_over() -> None:
    async with running() as host:
        host.machine.moved.set()
        await trio.sleep(SETTLE_SECONDS / 2)
        assert not host.looks
        await trio.sleep(SETTLE_SECONDS)
        assert (host.looks, len(host.applies)) == (1, 1)
