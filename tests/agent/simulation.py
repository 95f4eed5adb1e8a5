"""Whole agents by the dozen, on one etcd in memory and a kernel each, in virtual time, with faults drawn from a seed.

The agents are the real ones: only etcd's client, the kernel and the packets that make WireGuard shake hands are not.
`run_schedule(seed)` plays one schedule and asserts on the way:

* an agent never applies a revision older than one it has applied, as long as etcd itself goes forward;
* after the last fault everything comes to rest: every agent has applied the newest record, every kernel holds its
  agent's plan, the agents agree on the leaders, and every pair of hosts is connected in both directions;
* from then on nothing is written any more, neither to a kernel nor to etcd.
"""

from __future__ import annotations

import random
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from ipaddress import ip_interface, ip_network
from itertools import permutations

import trio
from attrs import fields

from helpers import eventually
from kilo_etcd import kernel
from kilo_etcd.agent import discover, privatekey
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.daemon import Daemon
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.kernel.state import DeleteAddress, DeleteLink, DeleteRoute, HostAddress, RemovePeer
from kilo_etcd.model import Snapshot
from kilo_etcd.store.keys import Keys
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel
from kilo_etcd.topology import build_topology
from kilo_etcd.topology.walk import walk

KEYS = Keys()
SITES = {"a": 3, "b": 2, "c": 1}
CHAOS_SECONDS = 120.0
REST_SECONDS = 120.0
"""How long everything may take to come to rest: the longest waits of the agents are a minute or two."""


def facts(name: str) -> discover.HostFacts:
    """What the host of a name finds of itself: a private and a public address."""
    site, number = ord(name[0]), name.partition("-")[2]
    return discover.HostFacts(
        hostname=name,
        addresses=tuple(
            HostAddress(interface="eth0", index=2, address=ip_interface(address))
            for address in (f"192.168.{site}.{number}/24", f"198.51.{site}.{number}/24")
        ),
    )


class SimulatedAgent(Daemon):
    """An agent that minds the order of what it applies, and is not ended by this process's signals."""

    newest = 0

    async def _heed_signals(self) -> None:
        await trio.sleep_forever()

    async def _apply(self, snapshot: Snapshot, fresh: bool) -> None:
        assert snapshot.revision >= self.newest, f"{self.name} applies {snapshot.revision} after {self.newest}"
        self.newest = snapshot.revision
        await super()._apply(snapshot, fresh)

    def stop(self) -> None:
        """As by SIGTERM."""
        self._stopping.set()


class SimulatedHost:
    """One host: its disk (the key), its kernel, its way to etcd, and its agent while it runs."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.private = b64encode(sha256(f"{world.seed} {name}".encode()).digest()).decode()
        self.machine = FakeHost()
        self.client: FakeClient = world.etcd.client(name)
        self.agent: SimulatedAgent | None = None
        self._scope: trio.CancelScope | None = None
        self._lives = False

    async def run(self) -> None:
        """The agent's life, until it stops or is killed."""
        config = AgentConfig.build(hostname=self.name, lease_ttl="5s", resync_period="20s", listen="off")
        setup = kernel.Setup(private_key=self.private)
        public = privatekey.public_key(self.private)
        async with kernel_of(self.machine, setup) as device:
            self.agent = SimulatedAgent(config, self.client, device, public, metrics=Metrics())
            with trio.CancelScope() as self._scope:
                await self.agent.run()

    def start(self) -> None:
        if not self._lives:
            self._lives = True
            self.world.nursery.start_soon(self._live)

    async def _live(self) -> None:
        try:
            await self.run()
        finally:
            self.agent = self._scope = None
            self._lives = False

    def kill(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def stop(self) -> None:
        if self.agent is not None:
            self.agent.stop()

    def power_off(self) -> None:
        """The kernel's memory is gone with the agent."""
        self.kill()
        self.machine.observed = type(self.machine.observed)()


def kernel_of(machine: FakeHost, setup: kernel.Setup) -> _Held:
    return _Held(machine, setup)


class _Held:
    def __init__(self, machine: FakeHost, setup: kernel.Setup) -> None:
        self._kernel = FakeKernel(machine, setup)
        self._machine = machine

    async def __aenter__(self) -> FakeKernel:
        await trio.lowlevel.checkpoint()
        return self._kernel

    async def __aexit__(self, *_: object) -> None:
        self._machine.unwatch(self._kernel)


class World:
    """All hosts and their etcd."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.etcd = FakeEtcd(delay=self.random.choice((0.0, 0.002, 0.05)))
        self.nursery: trio.Nursery
        self.hosts = {
            f"{site}-{number}": SimulatedHost(self, f"{site}-{number}")
            for site, count in SITES.items()
            for number in range(1, count + 1)
        }
        self.said: list[str] = []

    # -- what happens to them -------------------------------------------------------------------------------------

    def fault(self) -> None:
        """One thing goes wrong, or is changed by the operator."""
        host = self.random.choice(list(self.hosts.values()))
        act: Callable[[], object]
        name, act = self.random.choice(
            [
                ("kill", host.kill),
                ("kill", host.kill),
                ("stop", host.stop),
                ("start", host.start),
                ("start", host.start),
                ("power off", host.power_off),
                ("cut off", host.client.cut),
                ("mend", host.client.mend),
                ("mend", host.client.mend),
                ("lose an answer", host.client.lose_answer),
                ("etcd down", self.etcd.down),
                ("etcd up", self._up),
                ("etcd up", self._up),
                ("watches dropped", self.etcd.drop_watches),
                ("compacted", self.etcd.compact),
                ("label", lambda: self._put(KEYS.location(host.name), self.random.choice("abcd"))),
                ("label", lambda: self._put(KEYS.location(host.name), self.random.choice("abcd"))),
                ("unlabel", lambda: self._delete(KEYS.location(host.name))),
                ("granularity", lambda: self._put(KEYS.granularity, self.random.choice(("location", "full", "cross")))),
                ("leader wanted", lambda: self._put(KEYS.annotation(host.name, "leader"), "true")),
                ("leader not wanted", lambda: self._delete(KEYS.annotation(host.name, "leader"))),
                ("nonsense", lambda: self._put(KEYS.location(host.name), "\x00")),
                ("tampered", lambda: self._tamper(host)),
            ]
        )
        self.said.append(f"{trio.current_time():.3f} {name} {host.name}")
        act()

    def _put(self, key: str, value: str) -> None:
        if self.etcd.available:
            self.etcd.put(key, value)

    def _delete(self, key: str) -> None:
        if self.etcd.available:
            self.etcd.delete(key)

    def _up(self) -> None:
        if not self.etcd.available:
            self.etcd.up()

    def _tamper(self, host: SimulatedHost) -> None:
        observed = host.machine.observed
        changes = [
            *(DeleteRoute(route) for route in observed.routes.values()),
            *(DeleteAddress("kilo0", address) for address in observed.addresses),
            *(RemovePeer("kilo0", key) for key in observed.peers),
        ]
        if observed.link is not None:
            changes.append(DeleteLink("kilo0"))
        if changes:
            host.machine.tamper([self.random.choice(changes)])

    def heal(self) -> None:
        """The last fault is over."""
        self._up()
        for host in self.hosts.values():
            host.client.mend()
            host.start()
        for name in self.hosts:
            if self.etcd.get(KEYS.location(name)) == b"\x00":
                self.etcd.delete(KEYS.location(name))

    # -- what must be true of them in the end ---------------------------------------------------------------------

    def at_rest(self) -> bool:
        """Whether all has been followed; AssertionError says what has not."""
        newest = max((kv.mod_revision for key, kv in self.etcd.data.items() if key.startswith(b"/kilo/")), default=0)
        agents = {}
        for host in self.hosts.values():
            assert host.agent is not None, f"{host.name} does not run"
            agents[host.name] = host.agent
            assert host.agent.applied_revision >= newest, (
                f"{host.name} is at {host.agent.applied_revision}, not {newest}"
            )
            assert host.agent.topology is not None
        topologies = {name: agent.topology for name, agent in agents.items()}
        one = topologies["a-1"]
        assert one is not None
        assert set(one.snapshot.nodes) == set(self.hosts), f"{sorted(one.snapshot.nodes)} are nodes"
        fresh = build_topology(one.snapshot)
        for name, theirs in topologies.items():
            assert theirs is not None
            # A listing is dated by etcd's revision, a change by its own; both may be told of one state of the records.
            differ = [
                f"{field.name}: {getattr(theirs.snapshot, field.name)} instead of {getattr(one.snapshot, field.name)}"
                for field in fields(Snapshot)
                if field.name not in ("revision", "raft_term")
                and getattr(theirs.snapshot, field.name) != getattr(one.snapshot, field.name)
            ]
            assert not differ, f"{name} sees another mesh than a-1: {'; '.join(differ)}"
            assert theirs.segments == fresh.segments, f"{name} draws another mesh"
        for segment in fresh.segments.values():
            standing = {c.node for c in one.snapshot.candidates.get(segment.location, ())}
            members = {node.name for node in segment.members}
            if len(members) > 1:
                assert members <= standing, f"{members - standing} do not stand at {segment.location!r}"
        plans = {name: agent.plan for name, agent in agents.items() if agent.plan is not None}
        for name, other in permutations(self.hosts, 2):
            path = walk(plans, fresh, name, other)
            assert path.delivered, f"{name} to {other}: {path}"
        for host in self.hosts.values():
            held = host.machine.observed
            assert held.link is not None
            assert held.link.up
            assert set(held.peers) == set(plans[host.name].peers), f"the kernel of {host.name} has other peers"
            assert ip_network("10.4.0.0/16") in held.routes, f"the kernel of {host.name} has no route to the mesh"
        return True


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In the block trio's scheduler and every new generator of random numbers depend on the seed alone.

    Sets of texts do not: PYTHONHASHSEED has to be the same for that (the Makefile sees to it).
    """
    original = random.Random

    class Seeded(original):  # type: ignore[valid-type,misc]
        def __init__(self, x: object = None) -> None:
            super().__init__(seed if x is None else x)

    random.Random = Seeded  # type: ignore[misc]
    # What trio has for this purpose (its issue 890).
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio._core._run._r.seed(seed)
    try:
        yield
    finally:
        random.Random = original  # type: ignore[misc]
        trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = False


async def run_schedule(seed: int) -> None:
    """One schedule of faults. AssertionError: something that must hold does not."""
    with seeded(seed):
        await _run_schedule(seed)


async def _run_schedule(seed: int) -> None:
    world = World(seed)
    try:
        async with trio.open_nursery() as world.nursery:
            for host in world.hosts.values():
                host.start()
                await trio.sleep(world.random.choice((0.0, 0.01, 1.0)))
            end = trio.current_time() + CHAOS_SECONDS
            while trio.current_time() < end:
                world.fault()
                await trio.sleep(world.random.expovariate(1 / world.random.choice((0.05, 1.0, 5.0))))
            await trio.sleep(3)  # a stopping agent is given its time
            world.heal()
            await eventually(world.at_rest, REST_SECONDS, every=0.5)
            await trio.sleep(30)
            written = [len(host.machine.history) for host in world.hosts.values()]
            revision = world.etcd.revision
            await trio.sleep(180)
            assert world.at_rest()
            assert [len(host.machine.history) for host in world.hosts.values()] == written, (
                "a kernel was written to at rest"
            )
            news = {kv.key.decode(): kv.value for kv in world.etcd.data.values() if kv.mod_revision > revision}
            assert world.etcd.revision == revision, f"etcd was written to at rest: {news}"
            world.nursery.cancel_scope.cancel()
    except BaseException as error:
        error.add_note(f"seed {seed}; the schedule ended with:\n" + "\n".join(world.said[-40:]))
        raise
