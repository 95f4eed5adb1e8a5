"""Many whole agents on one etcd in memory, in virtual time, and an account of what each of them does.

What is counted, per agent: writes to etcd, calls to etcd of any kind, snapshots that were applied, writes to the
kernel, and lines of log. KILO_CROWD is the number of hosts at each of five sites (`make test`: 10), by which the storms
last longer too.
"""

from __future__ import annotations

import io
import os
import re
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from hashlib import sha256
from ipaddress import ip_interface
from typing import Any

import pytest
import trio
from attrs import evolve, frozen

from helpers import eventually
from kilo_etcd import kernel
from kilo_etcd.agent import discover
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.daemon import FLUSH_SECONDS, Daemon
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.kernel.state import HostAddress
from kilo_etcd.model import Snapshot
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.runtime.logs import setup_logging, write_due
from kilo_etcd.store.keys import Keys
from kilo_etcd.testing.fake_etcd import FakeEtcd
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel

KEYS = Keys()
SITES = 5
PER_SITE = int(os.environ.get("KILO_CROWD", "3"))


@frozen(kw_only=True)
class Account:
    """What one agent has done."""

    etcd_writes: float = 0
    etcd_calls: int = 0
    snapshots: int = 0
    kernel_writes: int = 0
    lines: int = 0

    def __sub__(self, other: Account) -> Account:
        return Account(
            etcd_writes=self.etcd_writes - other.etcd_writes,
            etcd_calls=self.etcd_calls - other.etcd_calls,
            snapshots=self.snapshots - other.snapshots,
            kernel_writes=self.kernel_writes - other.kernel_writes,
            lines=self.lines - other.lines,
        )


class CountingAgent(Daemon):
    """Not ended by this process's signals, and not the owner of its log."""

    applied = 0

    async def _flush_log(self) -> None:
        while True:
            await trio.sleep(FLUSH_SECONDS)
            write_due()

    async def _handle_signals(self) -> None:
        await trio.sleep_forever()

    async def _apply(self, snapshot: Snapshot, fresh: bool) -> None:
        self.applied += 1
        await super()._apply(snapshot, fresh)

    def stop(self) -> None:
        self._stopping.set()


class CrowdHost:
    """One host, and its agent while it runs."""

    def __init__(self, crowd: Crowd, name: str, options: dict[str, Any]) -> None:
        self.crowd, self.name, self.options = crowd, name, options
        self.agent: CountingAgent | None = None
        self.metrics = Metrics()
        self.before = Account()
        """What former agents of this host have done."""
        self._scope: trio.CancelScope | None = None
        self._over: trio.Event | None = None
        self.machine = FakeHost()
        # Echo requests are answered everywhere.
        self.machine.reach = lambda address: True
        self.client = crowd.etcd.client(name)
        self.private = b64encode(sha256(name.encode()).digest()).decode()

    def start(self) -> None:
        self.crowd.nursery.start_soon(self._live)

    async def _live(self) -> None:
        config = evolve(
            AgentConfig.build(hostname=self.name, lease_ttl="5s", resync_period="30s", listen="off"),
            **self.options,
        )
        device = FakeKernel(self.machine, kernel.Setup(private_key=self.private))
        self.metrics = Metrics()
        public_key = key_file.public_key(self.private)
        self.agent = CountingAgent(config, self.client, device, public_key, metrics=self.metrics)
        self._over = trio.Event()
        try:
            with trio.CancelScope() as self._scope:
                await self.agent.run()
        finally:
            self.before = self.now()
            self.agent = None
            self.machine.unwatch(device)
            self._over.set()

    async def kill(self) -> None:
        assert self._scope is not None
        assert self._over is not None
        self._scope.cancel()
        await self._over.wait()

    async def stop(self) -> None:
        assert self.agent is not None
        assert self._over is not None
        self.agent.stop()
        await self._over.wait()

    def now(self) -> Account:
        """What it has done since the beginning."""
        calls, agent = len(self.client.calls), self.agent
        lines = len(re.findall(rf"node={self.name}\b", self.crowd.log.getvalue()))
        if agent is None:
            return evolve(self.before, etcd_calls=calls, lines=lines)
        return Account(
            etcd_writes=self.before.etcd_writes
            + (self.metrics.registry.get_sample_value("kilo_etcd_writes_total") or 0.0),
            etcd_calls=calls,
            snapshots=self.before.snapshots + agent.applied,
            kernel_writes=self.before.kernel_writes + agent.kernel.writes,
            lines=lines,
        )

    @property
    def settled(self) -> bool:
        agent = self.agent
        return agent is not None and agent.session.healthy and agent.mirror.connected and agent.state.role is not None


class Crowd:
    """All hosts; `hosts` are named by site and number."""

    def __init__(self, log: io.StringIO) -> None:
        self.etcd = FakeEtcd(delay=0.002)
        self.log = log
        self.nursery: trio.Nursery
        self.hosts: dict[str, CrowdHost] = {}

    def add(self, name: str, **options: object) -> CrowdHost:
        host = self.hosts[name] = CrowdHost(self, name, options)
        host.start()
        return host

    async def at_rest(self) -> None:
        """Until all have applied the newest record and nothing more is written."""

        def followed() -> bool:
            written = (kv.mod_revision for key, kv in self.etcd.data.items() if key.startswith(b"/kilo/"))
            newest = max(written, default=0)
            return all(
                host.settled and host.agent is not None and host.agent.state.revision >= newest
                for host in self.hosts.values()
            )

        quiet = 0.0
        revision = -1
        while quiet < 20:
            await eventually(followed, 300, every=0.5, what="all hosts have followed")
            quiet = quiet + 1 if revision == self.etcd.revision else 0.0
            revision = self.etcd.revision
            await trio.sleep(1)

    def accounts(self) -> dict[str, Account]:
        return {name: host.now() for name, host in self.hosts.items()}

    @asynccontextmanager
    async def counting(self) -> AsyncIterator[dict[str, Account]]:
        """What each host does within the block; filled in at its end."""
        done: dict[str, Account] = {}
        before = self.accounts()
        yield done
        done.update({name: account - before.get(name, Account()) for name, account in self.accounts().items()})

    def leaders(self) -> Counter[str]:
        return Counter(
            host.agent.state.role.leader
            for host in self.hosts.values()
            if host.agent is not None and host.agent.state.role is not None
        )


def most(accounts: Iterable[Account], of: Callable[[Account], float]) -> float:
    return max(map(of, accounts))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the agents say; their hosts' addresses are made up from their names."""

    async def gather(config: AgentConfig) -> HostFacts:
        await trio.lowlevel.checkpoint()
        site, number = config.hostname.split("-")
        network = ord(site) - ord("a")
        return HostFacts(
            hostname=config.hostname,
            addresses=tuple(
                HostAddress(interface="eth0", index=2, address=ip_interface(text))
                for text in (f"192.168.{network}.{number}/24", f"198.51.{network}.{number}/24")
            ),
        )

    monkeypatch.setattr(discover, "gather", gather)
    monkeypatch.setattr(discover, "location_from_cloud_init", lambda: (None, ""))
    stream = io.StringIO()
    setup_logging("info", stream=stream, monotonic=trio.current_time)
    return stream


@asynccontextmanager
async def crowd(log: io.StringIO, sites: int = SITES, per_site: int = PER_SITE) -> AsyncIterator[Crowd]:
    """All hosts have joined at one moment, and everything has come to rest."""
    made = Crowd(log)
    async with trio.open_nursery() as made.nursery:
        names = [f"{chr(ord('a') + site)}-{number}" for site in range(sites) for number in range(1, per_site + 1)]
        for name in names:
            made.etcd.put(KEYS.location(name), name[0])
        for name in names:
            made.add(name)
        await made.at_rest()
        yield made
        made.nursery.cancel_scope.cancel()
