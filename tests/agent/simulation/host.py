"""One simulated host: its disk, its clock, its kernel, its way to etcd, and the real agent while that runs.

The agent is the one that ships. What it would ask the machine for is answered in memory (`in_memory`), by the host
whose task asks.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, tzinfo
from functools import cache
from hashlib import sha256
from ipaddress import ip_interface, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import trio

from kilo_etcd import kernel
from kilo_etcd.agent import apply, discover, snapshot_cache
from kilo_etcd.agent import status as agent_report
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.daemon import Daemon
from kilo_etcd.agent.endings import Fatal, Reload
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.etcd.api import EtcdError
from kilo_etcd.kernel.diff import Difference
from kilo_etcd.kernel.state import ApplyReport, Change, HostAddress, Observed
from kilo_etcd.model import IPAddress, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.runtime.key_file import agreed, public_key
from kilo_etcd.store.session import candidacy as store_candidacy
from kilo_etcd.testing.fake_etcd import FakeClient
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel
from simulation.clockwork import Freezer, running
from simulation.network import Network, Place, moved, place

if TYPE_CHECKING:
    from simulation.invariants import Watchman

SYSTEMD_SECONDS = 2.0
"""Until an agent that ended with an error is started again."""

EPOCH = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
"""Unix seconds at the start of each schedule."""


@cache
def _keys(name: str, seed: int) -> tuple[str, str]:
    private = b64encode(sha256(f"{seed} {name}".encode()).digest()).decode()
    return private, public_key(private)


_agreed = cache(agreed)


def _is_refused(error: BaseException) -> bool:
    """Whether an agent ended since etcd does not let its host join."""
    return isinstance(error, Fatal) and isinstance(error.__cause__, EtcdError)


class SimulatedAgent(Daemon):
    """The agent, with somebody who looks over its shoulder; it is not ended by this process's signals."""

    def __init__(self, host: SimulatedHost, watchman: Watchman, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.host, self._watchman = host, watchman
        self._reload = trio.Event()

    @property
    def raw_plan(self) -> HostPlan | None:
        """What it has planned of the topology alone."""
        return None if self.state.plans is None else self.state.plans.raw

    async def _handle_signals(self) -> None:
        await self._reload.wait()
        if not self._stopping.is_set():
            raise Reload
        await trio.sleep_forever()

    async def _apply(self, snapshot: Snapshot, fresh: bool) -> None:
        account = self._watchman.before(self, snapshot)
        await super()._apply(snapshot, fresh)
        self._watchman.applied(self, snapshot, account)

    def stop(self) -> None:
        """As by SIGTERM."""
        self._stopping.set()

    def reload(self) -> None:
        """As by SIGHUP."""
        self._reload.set()


class SimulatedKernel(FakeKernel):
    """A kernel whose writes somebody looks at."""

    def __init__(self, host: SimulatedHost, watchman: Watchman, setup: kernel.Setup, *, delay: float = 0.0) -> None:
        super().__init__(host.machine, setup, delay=delay)
        self.owner, self._watchman = host, watchman

    async def apply(self, plan: HostPlan, *, fresh: bool = False, reset: Collection[str] = ()) -> ApplyReport:
        touches = self._watchman.touches(self.owner)
        report = await super().apply(plan, fresh=fresh, reset=reset)
        self._watchman.wrote(self, plan, report, touches, reset)
        return report

    def _decide(self, plan: HostPlan, observed: Observed, reset: Collection[str]) -> Difference:
        # A peer may be heard from elsewhere until the very moment of the decision.
        self._watchman.decides(self, plan, observed, self._memory.former)
        return super()._decide(plan, observed, reset)


class SimulatedHost:
    """`start`, `stop`, `kill` and so on are what happens to it."""

    def __init__(
        self, name: str, seed: int, client: FakeClient, network: Network, watchman: Watchman, nursery: trio.Nursery,
        *, options: dict[str, str], dual: bool = False, disk: Path | None = None, kernel_delay: float = 0.0,
        strict: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.strict = {"eth0": "1"} if strict else {}
        """The devices whose rp_filter is strict as long as nobody changes it."""
        self.client = client
        self.freezer = Freezer()
        self.machine = FakeHost()
        self.machine.observed = self._booted()
        self.machine.clock = self.now
        self.wall = 0.0
        """Seconds by which its clock is wrong."""
        self.private, public = _keys(name, seed)
        self.public_key = public
        self.place: Place = place(name, public, dual=dual)
        self.condition = network.add(name, self.place, self.machine)
        self.network = network
        self.disk = None if disk is None else Disk(disk, run=_at_once, clock=self.now)
        self.options = options
        self.home = self.place
        self.links: tuple[str, ...] = ()
        """Networks that it stands in besides."""
        self.clean_up = False
        """Whether it leaves the mesh when it is stopped."""
        self.agent: SimulatedAgent | None = None
        self.device: SimulatedKernel | None = None
        self.over: str | None = None
        """What the agent's last run ended with, if it was an error."""
        self._watchman, self._nursery = watchman, nursery
        self._delay = kernel_delay
        self._scope: trio.CancelScope | None = None
        self._lives = False

    def __repr__(self) -> str:
        return f"<SimulatedHost {self.name}>"

    def now(self) -> float:
        """Unix seconds by its own clock."""
        return EPOCH + trio.current_time() + self.wall

    @property
    def lives(self) -> bool:
        """Whether its agent runs, or is coming to its end."""
        return self._lives

    # -- its life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Switched on, if need be, and the agent started."""
        self.condition.powered = True
        if not self._lives:
            self._lives = True
            token = running.set(self)
            try:
                self._nursery.start_soon(self._live, name=f"agent of {self.name}")
            finally:
                running.reset(token)

    async def _live(self) -> None:
        try:
            with trio.CancelScope() as self._scope:
                while (pause := await self._run()) is not None:  # noqa: ASYNC110 - it runs, and then waits
                    await trio.sleep(pause)
        finally:
            self.agent = self.device = self._scope = None
            self._lives = False

    async def _run(self) -> float | None:
        """One run of the agent; the seconds until it is to run anew, or None."""
        options: dict[str, Any] = {"hostname": self.name, "listen": "off", **self.options, "clean_up": self.clean_up}
        config = AgentConfig.build(**options)
        setup = kernel.Setup(private_key=self.private)
        self.device = SimulatedKernel(self, self._watchman, setup, delay=self._delay)
        try:
            self.agent = SimulatedAgent(
                self,
                self._watchman,
                config,
                self.client,
                self.device,
                self.public_key,
                metrics=Metrics(),
                disk=self.disk,
                transport=self.network.transport(self.name),
                secret=lambda key: _agreed(self.private, key),
            )
            await self.agent.run()
        except BaseExceptionGroup as group:
            reloads, others = group.split(Reload)
            if reloads is not None and others is None:
                return 0.0
            if reloads is not None and others is not None:
                raise others from None  # It was killed in that very moment.
            if group.split(_is_refused)[1] is None:
                return SYSTEMD_SECONDS  # It had no cached snapshot.
            out_of_order = self.machine.broken or self.machine.unreadable
            if out_of_order is not None and group.split(kernel.KernelError)[1] is None:
                return SYSTEMD_SECONDS
            raise
        finally:
            self.machine.unwatch(self.device)
        return None

    def kill(self) -> None:
        """As by SIGKILL."""
        if self._scope is not None:
            self._scope.cancel()
            self.freezer.thaw()

    def stop(self) -> None:
        """As by SIGTERM."""
        if self.agent is not None:
            self.agent.stop()

    def reload(self) -> None:
        """As by SIGHUP."""
        if self.agent is not None:
            self.agent.reload()

    def power_off(self) -> None:
        """The kernel's memory is gone with the agent."""
        self.kill()
        self.condition.powered = False
        self.machine.observed = self._booted()
        self._watchman.touched(self)

    def _booted(self) -> Observed:
        return Observed(underlay=("eth0",), strict=self.strict)

    def move(self, number: int) -> None:
        """To another address on its LAN, as by DHCP; 0: back to its own."""
        self.place = self.home if not number else moved(self.home, number)
        self.network.move(self.name, self.place)
        # A host that received from it at the other address receives from it here now.
        for key in self.machine.observed.peers:
            self.network.shake(self.name, key)

    def tamper(self, changes: list[Change]) -> None:
        """Somebody else changes the kernel's state."""
        self.machine.tamper(changes)
        self._watchman.touched(self)

    def mend_kernel(self) -> None:
        """It takes all changes again."""
        self.machine.refuse, self.machine.broken, self.machine.unreadable = lambda _: None, None, None

    def cleaned_up(self) -> tuple[Change, ...]:
        """Nothing of ours is left."""
        changes = self.machine.cleanup()
        self._watchman.left(self)
        return changes


def facts(host: SimulatedHost) -> HostFacts:
    """What a host finds of itself: a private and a public address, of each family that it has."""
    addresses = (*host.place.inside, *host.place.outside)
    return HostFacts(
        hostname=host.name,
        addresses=(
            *(HostAddress(interface="eth0", index=2, address=address) for address in addresses),
            *(
                HostAddress(interface="docker0", index=3, address=ip_interface(f"{ip_network(link)[1]}/{link[-2:]}"))
                for link in host.links
            ),
        ),
    )


async def _at_once(work: Callable[[], Any]) -> Any:
    await trio.lowlevel.checkpoint()
    return work()


def _here() -> SimulatedHost:
    host = running.get()
    assert isinstance(host, SimulatedHost)
    return host


@contextmanager
def in_memory() -> Iterator[None]:
    """In the block agents ask the simulated host they run on, and not this machine."""

    async def gather(config: AgentConfig) -> HostFacts:
        await trio.lowlevel.checkpoint()
        return facts(_here())

    async def cleanup(interface: str, **_: object) -> tuple[Change, ...]:
        await trio.lowlevel.checkpoint()
        return _here().cleaned_up()

    def trigger_handshakes(addresses: Iterable[IPAddress]) -> None:
        for address in addresses:
            _here().network.trigger_handshake(_here().name, address)

    class HostTime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> HostTime:
            return cls.fromtimestamp(_here().now(), tz)

    with ExitStack() as patches:
        for target, name, stand_in in (
            (discover, "gather", gather),
            (discover, "location_from_cloud_init", lambda: (None, "")),
            (apply, "trigger_handshakes", trigger_handshakes),
            (kernel, "cleanup", cleanup),
            (store_candidacy, "datetime", HostTime),
            (agent_report, "datetime", HostTime),
            (snapshot_cache, "time", SimpleNamespace(time=lambda: _here().now(), monotonic=trio.current_time)),
        ):
            patches.enter_context(patch.object(target, name, stand_in))
        # What the disk keeps is flushed for a power failure that no simulated host has.
        patches.enter_context(patch.object(os, "fsync", lambda _: None))
        yield
