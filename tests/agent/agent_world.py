"""One whole agent in memory, and what surrounds it: an etcd, a kernel, the host's addresses. For virtual time."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_interface
from typing import Any

import pytest
import trio
from attrs import evolve

from helpers import eventually
from kilo_etcd import kernel
from kilo_etcd.agent import discover
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.daemon import Daemon
from kilo_etcd.agent.dnshosts import WriteNames
from kilo_etcd.agent.leader_hints.peer_query import DatagramTransport
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.kernel.state import HostAddress
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.runtime.logs import setup_logging
from kilo_etcd.testing.fake_etcd import FakeEtcd
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel

PRIVATE = key_file.generate()


class World:
    """An agent called h1, and what surrounds it."""

    def __init__(self) -> None:
        self.etcd = FakeEtcd()
        self.client = self.etcd.client("h1")
        self.host = FakeHost()
        self.metrics = Metrics()
        self.log = io.StringIO()
        self.facts = HostFacts(
            hostname="h1",
            addresses=(HostAddress(interface="eth0", index=2, address=ip_interface("192.168.1.1/24")),),
        )
        self.daemon: Daemon

    def logged(self, sentence: str) -> int:
        return self.log.getvalue().count(sentence)

    def value(self, key: str | bytes) -> bytes:
        """What etcd holds at a key that is there."""
        value = self.etcd.get(key)
        assert value is not None, f"etcd has no {key!r}"
        return value

    async def ready(self) -> None:
        await eventually(lambda: self.host.observed.link is not None and self.host.observed.link.up, 30, every=0.1)

    def writes(self) -> float:
        return self.metrics.registry.get_sample_value("kilo_etcd_writes_total") or 0.0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()

    async def gather(config: AgentConfig) -> HostFacts:
        await trio.lowlevel.checkpoint()
        return made.facts

    monkeypatch.setattr(discover, "gather", gather)
    monkeypatch.setattr(discover, "location_from_cloud_init", lambda: (None, ""))
    setup_logging("info", stream=made.log, repeated=True)
    return made


@asynccontextmanager
async def running(
    world: World,
    *,
    disk: Disk | None = None,
    transport: DatagramTransport | None = None,
    write_names: WriteNames | None = None,
    joined: bool = True,
    **options: Any,
) -> AsyncIterator[Daemon]:
    """The agent runs in the block, which begins when it has `joined`; SIGTERM ends it, at the block's end if not
    before."""
    config = evolve(
        AgentConfig.build(hostname="h1", lease_ttl="5s", resync_period="20s", listen="off"),
        **options,
    )
    setup = kernel.Setup(private_key=PRIVATE)
    daemon = world.daemon = Daemon(
        config, world.client, FakeKernel(world.host, setup), key_file.public_key(PRIVATE), metrics=world.metrics,
        disk=disk, transport=transport, secret=lambda key: key_file.agreed(PRIVATE, key),
        write_names=write_names,
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(daemon.run)
        if joined:
            await world.ready()
        yield daemon
        with suppress(ProcessLookupError):
            os.kill(os.getpid(), signal.SIGTERM)
