"""A world drawn from a seed: hosts, their etcd, their network, and the schedule of faults that they go through.

`run_schedule(seed)` plays it: all hosts start, faults come for a while, everything is mended, and then the world has to
come to rest. What must hold at each step is `invariants`' business; what must hold at rest is here:

* every agent has applied the newest record, and they all see what etcd holds and draw the same of it;
* every kernel holds what its agent planned, and nothing is left to do;
* every pair of hosts is connected in both directions, by the plans and by what the kernels really hold, and so it is
  at internal IPs, from wherever they are routed;
* what stands in a host's name stands under its lease, and is what its agent has written;
* whoever shares a location stands for leader, and the leader is on record;
* what `encryption` says of `encrypted`;
* from then on nothing is written any more, neither to a kernel nor to etcd, but that peers that have booted, or whose
  clock went back, are made anew once their sessions are out of use.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping
from ipaddress import ip_network
from itertools import pairwise, permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import trio
from attrs import evolve, frozen

from helpers import eventually
from kilo_etcd.agent.nat.observed_endpoints import STALE
from kilo_etcd.base.mappings import changes
from kilo_etcd.etcd.api import KeyValue
from kilo_etcd.kernel.diff import difference
from kilo_etcd.kernel.state import Change, SetPeer
from kilo_etcd.kernel.unanswered import TURN_SECONDS
from kilo_etcd.model import IPNetwork, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.walk import walk
from kilo_etcd.store.keys import Keys, leased_by
from kilo_etcd.store.records import decode_status
from kilo_etcd.store.session.leased_keys import QUIET_SECONDS
from kilo_etcd.store.view import View
from kilo_etcd.testing.fake_etcd import Backup, FakeEtcd
from kilo_etcd.topology.nat import about_partner
from kilo_etcd.topology.segments import Topology, build_topology, host_network
from simulation import encryption, faults
from simulation.clockwork import freezable, seeded
from simulation.faults import FAULTS, Fault
from simulation.host import SimulatedAgent, SimulatedHost, in_memory
from simulation.invariants import Watchman, differences
from simulation.network import Network

KEYS = Keys()

REST_SECONDS = 150.0
"""How long everything may take to come to rest: the longest waits of the agents are a minute or two."""

FOLLOWED_SECONDS = 5.0
"""Within this all agents have followed one change."""
RESYNC_SECONDS = 30.0

TURN_AROUND = TURN_SECONDS + 2 * RESYNC_SECONDS
"""How long a host may take besides to look for one that does not answer where it was found last."""

NAMED_SECONDS = STALE + 40.0
"""How long until the last pair behind NAT that cannot meet is named: its last handshake is old, patience, two looks."""

LISTED_AGAIN = 400.0
"""How long where watches have lost something: until every agent has listed again."""

KEEPALIVE_SECONDS = 100.0

_SHM = next((path for path in (Path("/dev/shm"),) if path.is_dir()), None)


@frozen(kw_only=True)
class Shape:
    """What a schedule is like."""

    sites: tuple[int, ...]
    """Hosts per site."""
    late: int = 0
    """How many of them are not there at the start."""
    families: frozenset[str] = frozenset()
    """Which faults there are."""
    chaos: float = 0.0
    """Seconds during which they come."""
    pauses: tuple[float, ...] = (1.0,)
    """Seconds between two of them, on an average."""
    quiet: float = 45.0
    """Seconds during which nothing may be written at the end."""
    delay: float = 0.0
    """Seconds that etcd takes to answer."""
    granularity: str = "location"
    encapsulate: str = "crosssubnet"
    dual: bool = False
    internal_ips: str = "off"
    modes: tuple[str, ...] = ()
    """What the operator sets that to."""
    steady: bool = False
    """Whether no packet between two hosts may be lost; faults last less long then than leases."""
    strict: bool = False
    """Whether the hosts check reverse paths strictly."""
    disks: bool = False
    forget_after: str = "24h"
    kernel_delays: tuple[float, ...] = (0.0,)
    """Seconds that a kernel takes for changes; one of them for each host."""


FAMILIES = tuple(sorted({fault.family for fault in FAULTS} - {"lossy", "internal", "switch", "restarts"}))


def shape_of(seed: int, rng: random.Random) -> Shape:
    """Most worlds are small and short; a few are large, long or rest for long. Which, does not depend on `rng` alone,
    so that any row of seeds has some of each."""
    large, long = seed % 50 == 7, seed % 10 == 3
    sites: tuple[int, ...] = rng.choice(((2, 1), (2, 2), (3, 1), (2, 1, 1)))
    if large:
        sites = rng.choice(((4, 3, 2, 1), (6, 4), (3, 3, 3, 2)))
    elif long:
        sites = rng.choice(((3, 2, 1), (4, 2), (2, 2, 1)))
    wanted = rng.choice((1, 2, 3, 5, len(FAMILIES)))
    families = set(rng.sample(FAMILIES, wanted))
    if seed % 40 == 11:
        families.add("lossy")
    dual = rng.random() < 0.15
    shape = Shape(
        sites=sites,
        late=rng.choice((0, 0, 1)),
        families=frozenset(families),
        chaos=60.0 if long else 25.0,
        pauses=(0.05, 1.0, 3.0) if large or long else (0.05, 0.5, 2.0),
        quiet=400.0 if seed % 50 == 13 else 45.0,
        delay=rng.choice((0.0, 0.0, 0.002, 0.05)),
        granularity=rng.choice(("location", "location", "location", "full", "cross")),
        encapsulate="wireguard" if dual else rng.choice(("crosssubnet", "crosssubnet", "always", "wireguard")),
        dual=dual,
        disks=rng.random() < 0.3,
        forget_after=rng.choice(("24h", "24h", "24h", "30s")),
        kernel_delays=(0.0, 0.0, 0.01, 0.3),
    )
    if seed % 4 == 1:
        families |= {"internal", "switch"}
        modes: tuple[str, ...] = ("encrypted", "encrypted", "routed", "off")
        shape = evolve(shape, internal_ips=rng.choice(("encrypted", "routed")))
    if seed % 8 == 5:
        families = {"switch", *rng.sample(("agents", "machines", "path", "etcd"), rng.choice((0, 1, 2, 4)))}
        if seed % 16 == 5:
            families.add("restarts")
        modes = rng.choice((("encrypted", "off"), ("encrypted", "routed")))
        shape = evolve(shape, steady=True, granularity="full", disks=False, internal_ips=rng.choice(modes))
        # Each switch is a lot of work for everybody.
        shape = evolve(shape, chaos=12.0, pauses=(0.3, 1.0, 3.0))
    if "switch" in families:
        shape = evolve(shape, families=frozenset(families), modes=modes, strict=rng.random() < 0.5)
    return shape


class World:
    """All hosts and their etcd."""

    stray: IPNetwork = ip_network("172.31.0.0/16")
    """Where somebody else's routes lead."""

    def __init__(
        self, seed: int, nursery: trio.Nursery, *, shape: Shape | None = None, disks: Path | None = None
    ) -> None:
        """`shape`: None draws one; `disks`: a directory in which some hosts, if any by the shape, have a disk."""
        self.seed, self.nursery = seed, nursery
        self.random = random.Random(seed)
        self.shape = shape = shape or shape_of(seed, self.random)
        self.usual_delay = shape.delay
        self.etcd = FakeEtcd(delay=shape.delay)
        self.network = Network()
        self.watchman = Watchman(self)
        if shape.steady:
            self.watchman.steady = encryption.Steady(self)
        self.history: list[str] = []
        self.saved: Backup | None = None
        self.genuine = True
        """Whether etcd is what the agents know, or has been adopted since."""
        self.clusters = 0
        self.adopted: set[int] = set()
        """The etcds that the operator has ever said to be the mesh's."""
        self.put_right: Callable[[], None] = self.adopt
        """What ends the reign of an etcd that is not genuine."""
        self.hosts: dict[str, SimulatedHost] = {}
        self.lost: list[str] = []
        """Who got no answer when everything else was at rest last."""
        self._ends: trio.Nursery | None = None
        options = {
            "lease_ttl": "5s",
            "resync_period": "20s",
            "mesh_granularity": shape.granularity,
            "encapsulate": shape.encapsulate,
            "internal_ips": shape.internal_ips,
            "forget_after": shape.forget_after,
            "subnet": "10.4.0.0/16,fd00:4::/64" if shape.dual else "10.4.0.0/16",
        }
        for site, count in zip("abcd", shape.sites, strict=False):
            for number in range(1, count + 1):
                name = f"{site}-{number}"
                disk = None
                if disks is not None and shape.disks and self.random.random() < 0.7:
                    disk = disks / name
                    disk.mkdir()
                self.hosts[name] = SimulatedHost(
                    name, seed, self.etcd.client(name), self.network, self.watchman, nursery,
                    options=options, dual=shape.dual, disk=disk,
                    kernel_delay=self.random.choice(shape.kernel_delays), strict=shape.strict,
                )  # fmt: skip
        late = min(shape.late, len(self.hosts) - 2)
        self.gone = set(self.random.sample(sorted(self.hosts), late))
        """Who is no member, by the operator's wish."""
        self._faults: list[Fault] = [fault for fault in FAULTS if fault.family in shape.families]

    # -- who there is -------------------------------------------------------------------------------------------

    def members(self) -> Iterable[SimulatedHost]:
        return (host for name, host in self.hosts.items() if name not in self.gone)

    def site_of(self, host: SimulatedHost) -> list[SimulatedHost]:
        """The members at a host's site."""
        return [member for member in self.members() if member.name[0] == host.name[0]]

    def brief(self) -> float:
        """Seconds that a trouble lasts."""
        return self.random.choice(faults.WITHIN_THE_LEASE if self.shape.steady else faults.BRIEF)

    # -- what happens to them -----------------------------------------------------------------------------------

    def fault(self) -> None:
        """One thing goes wrong, or is changed by the operator."""
        host = self.random.choice(list(self.members()))
        (fault,) = self.random.choices(self._faults, [one.weight for one in self._faults])
        more = fault.act(self, host)
        self.history.append(f"{trio.current_time():9.3f} {fault.name} {host.name} {more}".rstrip())

    def later(self, seconds: float, act: Callable[[], object]) -> None:
        """Do it after that time, unless all is healed by then."""

        async def wait() -> None:
            await trio.sleep(seconds)
            act()

        assert self._ends is not None
        self._ends.start_soon(wait)

    def start(self, host: SimulatedHost) -> None:
        """If it is a member."""
        if host.name not in self.gone:
            host.start()

    def put(self, key: str, value: str, *, lease: int = 0) -> None:
        if self.etcd.available:
            self.etcd.put(key, value, lease=lease)

    def delete(self, key: str) -> None:
        if self.etcd.available:
            self.etcd.delete(key)

    def forget_claims(self, name: str) -> None:
        if self.etcd.available:
            self.watchman.unclaimed(name)
            for key in faults.addresses_of(self, name):
                self.etcd.delete(key)

    def etcd_up(self) -> None:
        if not self.etcd.available:
            self.etcd.up()

    def adopt(self) -> None:
        """As by `kgctl mesh adopt`."""
        if self.etcd.available:
            self.adopted.add(self.etcd.cluster_id)
            self.etcd.put(KEYS.adopted, f"{self.etcd.cluster_id:x} {trio.current_time()}")

    def settle_cluster(self) -> None:
        """It is put right which etcd is the mesh's."""
        if not self.genuine and self.etcd.available:
            self.history.append(f"{trio.current_time():9.3f} the etcd of the mesh is settled")
            self.put_right()
            # Those that were started meanwhile follow the other one.
            self.adopt()
            self.genuine = True

    def heal(self) -> None:
        """The last fault is over."""
        self.history.append(f"{trio.current_time():9.3f} healed")
        self.etcd_up()
        self.etcd.delay = self.usual_delay
        self.settle_cluster()
        for host in self.hosts.values():
            host.client.mend_all()
            host.condition.mend()
            host.mend_kernel()
            host.move(0)
            host.freezer.thaw()
            if host.name in self.gone:
                self._see_off(host)
            else:
                host.start()

    def _see_off(self, host: SimulatedHost) -> None:
        """What a host that has left could not take away itself: `kg cleanup` and `kgctl node forget`. A fault may have
        put its status under another host's lease; then whoever did that deletes it."""
        host.kill()
        host.cleaned_up()
        for prefix in (KEYS.by(host.name), KEYS.status_by(host.name)):
            for key in self.etcd.keys(prefix):
                self.etcd.delete(key)

    # -- what must be true of them in the end -------------------------------------------------------------------

    def truth(self) -> Snapshot:
        """What etcd holds, as whoever starts now would see it."""
        view = View(KEYS)
        root = KEYS.root.encode()
        view.load([kv for key, kv in self.etcd.data.items() if key.startswith(root)], self.etcd.header())
        return view.snapshot()

    def at_rest(self) -> bool:
        """Whether all has been followed; AssertionError says what has not."""
        newest = max((kv.mod_revision for key, kv in self.etcd.data.items() if key.startswith(b"/kilo/")), default=0)
        agents: dict[str, SimulatedAgent] = {}
        for host in self.members():
            agent = host.agent
            assert agent is not None, f"{host.name} does not run"
            assert agent.state.revision >= newest, f"{host.name} is at {agent.state.revision}, not {newest}"
            assert agent.state.topology is not None
            assert agent.state.plan is not None
            agents[host.name] = agent
        truth = self.truth()
        assert set(truth.nodes) == set(agents), f"{sorted(truth.nodes)} are nodes"
        fresh = build_topology(truth)
        for name, agent in agents.items():
            assert agent.state.topology is not None
            assert not agent.etcd_away(), f"{name} does not know yet that etcd is back"
            assert not agent.peer_queries.hints.leaders, f"{name} still follows leader hints"
            differ = differences(agent.state.topology.snapshot, truth)
            assert not differ, f"{name} sees another mesh than etcd: {'; '.join(differ)}"
            assert agent.state.topology.segments == fresh.segments, f"{name} draws another mesh"
            assert agent.raw_plan == host_plan(fresh, name), f"{name} has another plan than what is planned afresh"
            self._own_leases(name, agent)
            trouble = agent.etcd_trouble.sentence()
            assert trouble in (None, agent.session.contested), f"{name} is in trouble: {trouble}"
            silent = () if agent.reachability is None else agent.reachability.silent
            assert not silent, f"{name} does not know yet that {silent[0].target.node} answers again"
            self._programmed(self.hosts[name], agent)
        for segment in fresh.segments.values():
            members = {node.name for node in segment.members}
            if len(members) > 1:
                standing = {candidate.node for candidate in truth.candidates.get(segment.location, ())}
                assert members <= standing, f"{members - standing} do not stand at {segment.location!r}"
                # A location may have other segments, whose leaders are on record too.
                recorded = tuple(name for name in truth.leaders.get(segment.location, ()) if name in members)
                assert recorded[:1] == (segment.leader.name,), (
                    f"{recorded} and not {segment.leader.name} are on record at {segment.location!r}"
                )
        for location, recorded in truth.leaders.items():
            gone = [name for name in recorded if name not in agents or truth.nodes[name].location != location]
            assert not gone, f"{gone} are on record as leaders of {location!r}, where they are not"
        plans = {name: agent.state.plan for name, agent in agents.items() if agent.state.plan is not None}
        lost = self.lost = []
        for name, other in permutations(agents, 2):
            for address in truth.nodes[other].mesh_addresses:
                path = walk(plans, fresh, name, address)
                assert path.delivered, f"{name} to {other}: {path}"
                if why := self.network.trace(name, address):
                    lost.append(f"{name} gets no answer from {other} at {address}: {why}")
                    self.network.send_in_vain(name, address)
            self._internal_ips(plans, fresh, name, other)
        encryption.at_rest(self, fresh, agents)
        assert not lost, lost[0]
        return True

    def _own_leases(self, name: str, agent: SimulatedAgent) -> None:
        """What stands in a host's name stands under its lease, and is what it has to say."""
        held, lease = agent.session._leased, agent.session._short.id
        assert not held.changed, f"{name} has yet to restore {held.changed[0]}"
        for raw, kv in self.etcd.data.items():
            key = raw.decode(errors="replace")
            if leased_by(KEYS.parse(key)) == name:
                assert kv.lease == lease, f"{key} stands under lease {kv.lease:x}, that of {name} is {lease:x}"
                assert held.values.get(key) == kv.value, f"{key} has a value that {name} did not write: {kv.value!r}"

    @staticmethod
    def _internal_ips(plans: Mapping[str, HostPlan], topology: Topology, name: str, other: str) -> None:
        """The other host is reached at those of its internal IPs that are routed to this one, and answers."""
        for ip in topology.snapshot.nodes[other].internal_ips:
            if (route := plans[name].routes.get(host_network(ip.ip))) is None:
                continue
            there = walk(plans, topology, name, ip.ip)
            assert there.delivered, f"{name} to {other}: {there}"
            assert route.source is not None
            back = walk(plans, topology, other, route.source, sender=ip.ip)
            assert back.delivered, f"{other}, asked at {ip.ip}, to {name}: {back}"

    @staticmethod
    def _programmed(host: SimulatedHost, agent: SimulatedAgent) -> None:
        """The kernel holds the plan, and there is nothing left to do."""
        device, wanted = host.device, agent.applier.programmed
        assert device is not None
        assert wanted is not None
        assert agent.state.plan is not None
        todo = difference(wanted, device._now(), device._memory, device._target(wanted))
        assert not todo.changes, f"the kernel of {host.name} wants {'; '.join(map(str, todo.changes))}"
        assert not todo.failures, f"the kernel of {host.name}: {'; '.join(map(str, todo.failures))}"
        assert set(wanted.peers) == set(agent.state.plan.peers), f"{host.name} has other peers than planned"
        assert wanted.routes == agent.state.plan.routes, f"{host.name} has other routes than planned"
        for network in agent.registration.subnets:
            assert network in host.machine.observed.routes, f"{host.name} has no route to the mesh"

    def demoted_until(self) -> float:
        """Until when a host stands behind all others, or looks once more, or says that its keys are contested: then it
        writes."""
        standings = [host.agent._candidacy for host in self.members() if host.agent is not None]
        # It is over, and the next look at the kernel says so.
        over = [
            trio.current_time()
            for candidacy_task in standings
            if candidacy_task.demoted_until is None and candidacy_task.why is not None
        ]
        agents = [host.agent for host in self.members() if host.agent is not None]
        over += [
            backoff.until
            for simulated_agent in agents
            for key, backoff in simulated_agent.session._leased._backoffs.items()
            if key in simulated_agent.session._leased.contested
        ]
        return max(
            [
                *over,
                *(
                    candidacy_task.demoted_until
                    for candidacy_task in standings
                    if candidacy_task.demoted_until is not None
                ),
            ],
            default=0.0,
        )

    async def keepalives(self) -> None:
        """What WireGuard does by itself: peers with persistent keepalive shake hands now and then."""
        while True:
            await trio.sleep(KEEPALIVE_SECONDS)
            for name, host in self.hosts.items():
                for key, peer in list(host.machine.observed.peers.items()):
                    if peer.persistent_keepalive:
                        self.network.shake(name, key)

    async def thaw_at_the_end(self) -> None:
        """Who stands still cannot come to an end."""
        try:
            await trio.sleep_forever()
        finally:
            for host in self.hosts.values():
                host.freezer.thaw()

    # -- a schedule ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Play it."""
        async with trio.open_nursery() as self._ends:
            for host in self.members():
                host.start()
                await trio.sleep(self.random.choice((0.0, 0.01, 1.0)))
            end = trio.current_time() + self.shape.chaos
            while trio.current_time() < end:
                self.fault()
                await trio.sleep(self.random.expovariate(1 / self.random.choice(self.shape.pauses)))
            self._ends.cancel_scope.cancel()
        # A stopping agent is given its time.
        for host in self.hosts.values():
            host.freezer.thaw()
        await trio.sleep(6)
        self.heal()
        try:
            await eventually(self.at_rest, LISTED_AGAIN if self.watchman.lossy else REST_SECONDS, every=1.0)
        except AssertionError:
            if not self.lost:
                raise
            await eventually(self.at_rest, TURN_AROUND, every=1.0)
        behind_nat = any(key.endswith(b"/force-endpoint") for key in self.etcd.data)
        # Whether members that have moved, or were away, answer with their keys is found out in turn.
        unsigned = any(
            key.startswith(KEYS.status_root.encode()) and b'"unsigned"' in kv.value
            for key, kv in self.etcd.data.items()
        )
        slow = behind_nat or unsigned or self.shape.internal_ips != "off"
        await trio.sleep(LISTED_AGAIN if self.watchman.lossy else NAMED_SECONDS if slow else 15)
        now, demoted_until = trio.current_time(), self.demoted_until()
        if now <= demoted_until < now + max(self.shape.quiet, QUIET_SECONDS):
            await trio.sleep(demoted_until - now + RESYNC_SECONDS + 15)
        # Time that a host was demoted for may have ended this moment, and leadership has just moved.
        await eventually(self.at_rest, FOLLOWED_SECONDS, every=1.0)
        written = [(host, len(host.machine.history), _to_make_anew(host.agent)) for host in self.members()]
        resting, revision = dict(self.etcd.data), self.etcd.revision
        await trio.sleep(self.shape.quiet)
        assert self.at_rest()
        made = [
            f"{host.name}: {change}"
            for host, before, to_make_anew in written
            for change in without_cause(host.machine.history[before:], to_make_anew)
        ]
        assert not made, f"kernels were written to at rest: {'; '.join(made)}"
        held = dict(self.etcd.data)
        news = {key.decode(): held.get(key) for key in changes(resting, held)}
        # Without keepalive on both sides two hosts behind NATs meet if they happen to send at one moment, and may part.
        puts = [event.kv for event in self.etcd._log if event.kv.mod_revision > revision]
        news = {
            key: kv
            for key, kv in news.items()
            if not (
                kv is not None
                and key.startswith(KEYS.status_root)
                and (before := resting.get(key.encode()))
                and len(history := [before, *(put for put in puts if put.key == before.key)]) <= 1 + 2 * len(self.hosts)
                and _pairs_behind_nat_met(history)
            )
        }
        assert not news, f"etcd was written to at rest: {news}"


def _to_make_anew(agent: SimulatedAgent | None) -> frozenset[str]:
    """The public keys of the peers that have booted, or whose clock went back, and that the host is still to forget: it
    makes them anew when nobody uses their sessions any more, however long that takes."""
    if agent is None:
        return frozenset()
    applier = agent.applier
    return frozenset({*agent.wireguard_monitor._renewed._pending, *applier._reset_session, *applier._waiting})


def without_cause(made: Iterable[Change], to_make_anew: Collection[str]) -> list[Change]:
    """The changes at rest without those that make a peer of `to_make_anew` anew: once, and once more if it was to begin
    the handshake and, having heard no news itself, has not (`planning.handshake_order`)."""
    left = dict.fromkeys(to_make_anew, 2)
    found = []
    for change in made:
        if isinstance(change, SetPeer) and change.reset and left.get(change.public_key):
            left[change.public_key] -= 1
        else:
            found.append(change)
    return found


def _pairs_behind_nat_met(history: list[KeyValue]) -> bool:
    """Whether each status differs from the one before in what it reports of pairs behind NATs, and in nothing else."""
    if len(history) < 2 or any(before.value == after.value for before, after in pairwise(history)):
        return False
    first, *rest = (
        evolve(status, errors=tuple(error for error in status.errors if about_partner(error) is None))
        for status in (decode_status(kv.value) for kv in history)
    )
    return all(status == first for status in rest)


async def run_schedule(seed: int) -> list[str]:
    """One schedule of faults; what happened in it. AssertionError: something that must hold does not."""
    with seeded(seed), in_memory(), freezable(), TemporaryDirectory(dir=_SHM) as disks:
        history: list[str] = []
        try:
            async with trio.open_nursery() as nursery:
                world = World(seed, nursery, disks=Path(disks))
                history = world.history
                nursery.start_soon(world.thaw_at_the_end)
                nursery.start_soon(world.keepalives)
                if world.watchman.steady is not None:
                    nursery.start_soon(world.watchman.steady.run)
                await world.run()
                nursery.cancel_scope.cancel()
        except BaseException as error:
            error.add_note(f"seed {seed}, {world.shape}; the schedule ended with:\n" + "\n".join(history[-60:]))
            raise
        return history
