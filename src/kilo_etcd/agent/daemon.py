"""The agent: one nursery in which small tasks turn snapshots into kernel state and the host's state into records.

Data flows one way: mirror -> topology -> plan -> kernel -> status. Every task is a loop around one wait; they meet
in `_wake`, which says that the plan must be made and applied again, and why. Only `_reconcile` touches the kernel.

What it promises: a snapshot is never applied after a newer one; a failing part (a record, an endpoint's name, a route)
is reported and harms only itself; when etcd is away the kernel keeps what it has; stopping leaves it forwarding unless
the operator asked for `--clean-up`.
"""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import TypeVar

import trio

from kilo_etcd import etcd, kernel, store
from kilo_etcd.agent import decide
from kilo_etcd.agent.answer import Answerer, Programmed
from kilo_etcd.agent.cachefile import Identity, Remembered
from kilo_etcd.agent.candidacy import Candidacy
from kilo_etcd.agent.config import AgentConfig, too_small_for
from kilo_etcd.agent.counted import counted
from kilo_etcd.agent.dnshosts import DnsHosts, WriteNames
from kilo_etcd.agent.encrypting import Encrypting
from kilo_etcd.agent.hearing import Hearing
from kilo_etcd.agent.hearsay import Hearsay, followed
from kilo_etcd.agent.lastknown import Disk, Keeper
from kilo_etcd.agent.logs import Once, get_logger, say_due, say_rest
from kilo_etcd.agent.lookout import Lookout
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.neighbours import Neighbours, Post
from kilo_etcd.agent.notify import notify, notify_reloading, watchdog_interval
from kilo_etcd.agent.program import Programmer
from kilo_etcd.agent.reachability import Reachability
from kilo_etcd.agent.report import Reporter, State
from kilo_etcd.agent.resolve import Resolver, names_of, plan_names, resolve_plan
from kilo_etcd.agent.upkeep import REFUSALS, Upkeep
from kilo_etcd.agent.whereabouts import Whereabouts
from kilo_etcd.agent.witness import Witness
from kilo_etcd.backoff import RepairBackoff
from kilo_etcd.kernel.state import Observed
from kilo_etcd.model import Granularity, InternalIPs, IPAddress, IPNetwork, MeshSettings, Snapshot
from kilo_etcd.topology import Topology, UnknownNode, build_topology, host_plan
from kilo_etcd.topology.encryption import Report
from kilo_etcd.topology.guard import guard
from kilo_etcd.topology.hostplan import HostPlan, RoutePlan, Via
from kilo_etcd.topology.reach import withhold
from kilo_etcd.topology.wayout import STAYS_OUTSIDE, at_gateway, by_way_out

T = TypeVar("T")

HANDOVER_SECONDS = 2.0
"""How long a stopping leader waits for the others to have applied its successor's plan (DESIGN section 5)."""

CONFIRM_POLL_SECONDS = 0.02

RESIGN_SECONDS = 2.0
"""How long a stopping agent tries to take its records away; they are under leases that end by themselves."""

ETCD_PATIENCE_SECONDS = 2.0
"""How long a starting agent waits for etcd before it goes by the last known mesh."""

KERNEL_RETRY_SECONDS = 0.5

POST_RETRY_SECONDS = 60.0
"""After the port for neighbours could not be had."""

OBSTACLES_PAUSE, OBSTACLES_PERIOD = 2.0, 10.0
"""Seconds between two looks at what drops forwarded packets: at least after a change of the plan, and at most."""

SAY_SECONDS = 5.0
"""Between two looks at what of the log was left out."""

MOST_LISTED = 64
"""Members that do not answer, in the status."""

DEMOTED = (
    "for some minutes it leads only if nobody else can. Look for what drops forwarded packets (sysctl "
    "net.ipv4.ip_forward, nft list ruleset) or UDP 51820 (--port); once nothing does, restart the agent to clear it "
    "now: systemctl restart kilo-etcd"
)
"""What follows for a host that was demoted, and what to do."""

SETTLE_SECONDS = 0.5
"""How long changes of the host's own addresses may go on before they are looked at: they come in bursts."""


class Fatal(Exception):
    """The agent cannot go on; the message is the sentence for the operator."""


class StoppedAtOnce(Fatal):
    """Asked to stop a second time."""


class Reload(Exception):
    """The agent was asked to run its code anew. Nothing was given up: the next one adopts all of it."""


class _Fence:
    """The judgement of whichever mirror the agent has."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    @property
    def taken_up(self) -> int:
        return self._daemon.mirror.taken_up

    def heed(self, header: etcd.Header) -> None:
        self._daemon.mirror.heed(header)

    def check(self) -> None:
        self._daemon.mirror.check()

    async def vouch(self) -> None:
        await self._daemon.mirror.vouch()


class Daemon:
    """One host's agent. `run()` returns when the agent was asked to stop and has done so."""

    def __init__(
        self,
        config: AgentConfig,
        client: etcd.Client,
        device: kernel.Kernel,
        public_key: str,
        *,
        metrics: Metrics,
        disk: Disk | None = None,
        secret: Callable[[str], bytes | None] | None = None,
        post: Post | None = None,
        write_names: WriteNames | None = None,
    ) -> None:
        """`disk`: where the last known mesh is kept; None: it is not. `secret` is what the host's key and a public key
        agree on, and `post` the way to neighbours; None: nobody is asked while etcd is away. `write_names`
        writes the hosts file; None: it is not touched."""
        self.config = config
        self.client = client = counted(client, metrics.etcd_writes.inc, metrics.etcd_heard)
        self.kernel = device
        self.programmer = Programmer(device)
        self.metrics = metrics
        self.name = config.hostname
        self.public_key = public_key
        self.keys = store.Keys(config.prefix)
        self.mirror = store.Mirror(client, self.keys)
        self.session = store.Session(
            client,
            self.keys,
            self.name,
            public_key,
            lease_ttl=int(config.lease_ttl),
            forget_after=int(config.forget_after),
            on_event=self._note_event,
            fence=_Fence(self),
        )
        self.resolver = Resolver()
        # Asked for at each scrape, so that nothing has to poll.
        metrics.suspect_when(self._etcd_trouble)
        metrics.suspect_when(self._own_trouble)
        metrics.etcd_connected.set_function(lambda: float(self.mirror.connected and not self.mirror.suspect))
        self.log = get_logger().bind(node=self.name)
        self.once = Once(self.log)
        self.whereabouts = Whereabouts(config, public_key, self.session, self.log, self.once, etcd=self._etcd_networks)
        identity = Identity(prefix=config.prefix, node=self.name, public_key=public_key)
        self.keeper = Keeper(disk, identity, self.once)
        self.remembered: Remembered | None = None
        """The last known mesh, as long as the host has not joined the present one."""
        metrics.last_known.set_function(lambda: float(self.remembered is not None))

        self.snapshot: Snapshot | None = None
        self.topology: Topology | None = None
        self.raw_plan: HostPlan | None = None
        self.guarded: HostPlan | None = None
        self.plan: HostPlan | None = None
        """What was last brought to the kernel: `guarded`, and what the host's own gateway makes of it."""
        self.role: decide.Role | None = None
        self.applied_revision = 0
        self.failures: tuple[str, ...] = ()
        self.disagreements: tuple[str, ...] = ()
        self.unmet: tuple[str, ...] = ()
        """Sentences on nodes that, like this host, are behind NAT, and are not heard."""
        self.hearsay = Hearsay()
        """What neighbours have said of leaders since etcd was out of reach."""
        self.no_baseline: str | None = None
        """A sentence on a leader through which nobody has ever answered this host, which would report it."""
        self.answers = False
        """Whether this host answers peer queries: it has the port."""
        self.obstructed: tuple[str, ...] = ()
        """Sentences on what drops what this host forwards."""
        self.beyond: str | None = None
        """A sentence on the gateway that this host uses and that does not answer."""
        self.subnets: tuple[IPNetwork, ...] = ()
        """The mesh's, as they were when this agent joined."""

        self._waiting: str | None = None
        """What this agent waits for before it can join, as a sentence."""
        self._rng = random.Random()
        self._wake = trio.Event()
        self._wanted = False
        """Somebody wants the plan made and applied again; else it was the watchdog that woke the reconciler."""
        self._fresh = False
        self._beat = False
        self._applied = trio.Event()
        self._stopping = trio.Event()
        self._silent_leader: frozenset[IPAddress] = frozenset()
        """The addresses at which this host's leader has never answered."""
        self._programmed = False
        self._ready = False
        """Programmed well enough to lead."""
        self._leaving = False
        self._internal_ips: decide.InternalIPsState | None = None
        self._reporter = Reporter(self.session, public_key, config.mesh_granularity)
        self._upkeep = Upkeep(
            self.session,
            self.keys,
            self.name,
            self.once,
            mirror=lambda: self.mirror,
            rng=self._rng,
            on_news=self._publish_again,
        )
        self._candidacy = Candidacy(self.session, self.name)
        self._answerer = Answerer(client, self.keys, self.name, device, self._in_force, self.once)
        self._post = post
        self._neighbours = (
            None
            if secret is None or post is None or not config.probe
            else Neighbours(
                self.name,
                post,
                secret,
                etcd_away=self._etcd_away,
                on_heard=self._note_heard,
                sources=lambda: self.whereabouts.sources,
            )
        )
        self._reachability = None
        if config.probe:
            ask = None if self._neighbours is None else self._neighbours.ask_local
            self._reachability = Reachability(
                device, self.name, ask=ask, on_change=self._nudge, programmed=lambda: self.programmer.programmed
            )
            if self._neighbours is not None:
                self._neighbours.reachability = self._reachability
        self._witness = Witness(
            device, self.session, self.name, self.once,
            sound=self._sound, forwards=self._forwards, prove=self._prove,
            look_again=lambda: self._nudge(fresh=True), on_no_baseline=self._note_no_baseline,
        )  # fmt: skip
        self._hearing = Hearing(device, self.session, self.name, on_unmet=self._note_unmet, begin_over=self._begin_over)
        self._lookout = Lookout(device, self._note_gateway)
        self._dns_hosts = write_names and DnsHosts(
            write_names, wanted=config.dns_hosts, prefix=config.prefix, log=self.log, once=self.once,
            on_trouble=self._publish_again,
        )  # fmt: skip
        self._encrypting = Encrypting(
            config, client, self.keys, self.once, disk=disk, register=self._report_stage, keep=self.keeper.flush,
            stage=lambda: self.session.stage, put_stage=self.session.put_stage,
            listening=device.listening, nudge=self._nudge, rng=self._rng,
        )  # fmt: skip

    # -- life -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heed_signals)
            nursery.start_soon(self._mind_log)
            async with trio.open_nursery() as members:
                joined = await self._until_stopped(self._join, members)
                if joined:
                    await self._stopping.wait()
                notify("STOPPING=1")
                self._leaving = True
                if joined:
                    await self._hand_over()
                # What goes now must not be taken for drift and put back.
                members.cancel_scope.cancel()
            await self._leave()
            nursery.cancel_scope.cancel()

    async def _mind_log(self) -> None:
        try:
            while True:
                await trio.sleep(SAY_SECONDS)
                say_due()
        finally:
            say_rest()

    async def _heed_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                # At a terminal it means that the terminal was closed.
                if number == signal.SIGHUP and not (sys.stdin and sys.stdin.isatty()):
                    if self._stopping.is_set():
                        continue
                    self.log.info("reloading")
                    notify_reloading()
                    await self.session.renew()
                    raise Reload
                if self._stopping.is_set():
                    raise StoppedAtOnce(f"stopped at once: {signal.Signals(number).name} was received a second time")
                self.log.info("stopping", signal=signal.Signals(number).name)
                self._stopping.set()

    async def _until_stopped(self, work: Callable[[trio.Nursery], Awaitable[None]], nursery: trio.Nursery) -> bool:
        """Whether `work` came to its end before the agent was asked to stop."""
        done = False
        async with trio.open_nursery() as inner:

            async def give_up() -> None:
                await self._stopping.wait()
                inner.cancel_scope.cancel()

            inner.start_soon(give_up)
            await work(nursery)
            done = True
            inner.cancel_scope.cancel()
        return done

    async def _join(self, nursery: trio.Nursery) -> None:
        """Become a member: addresses, mesh settings, registration; then start what keeps it so.

        A host that could not do its part is never registered: others would send it packets.
        """
        await self.kernel.check()
        settings = await self._bridge(nursery)
        followed = settings is None and self.mirror.current is not None
        if settings is None:
            settings = await self._insist(self._settings)
        subnets = settings.subnets
        self._take_subnets(subnets)
        self._upkeep.joined(settings)
        renumber = self.config.renumber
        addresses = await self._insist(lambda: self.session.claim_addresses(subnets, renumber=renumber))
        self.log.info("address claimed", addresses=",".join(map(str, addresses)), granularity=str(settings.granularity))
        if not followed:
            await nursery.start(self.resolver.run)
            await nursery.start(self.mirror.run)
        # Where the last agent was with the switch to `encrypted`, the kernel still is, or is to be again.
        self.whereabouts.report = await self._insist(self._reported)
        # Not before: etcd may have kept us waiting, and the network may have come meanwhile.
        record = await self.whereabouts.look()
        await self._insist(lambda: self.session.register(record))
        await nursery.start(self.session.run)
        if self.remembered is None:
            self._keep_programmed(nursery)
        else:
            self.remembered = None
            self.log.info("etcd is back: this host has joined again, and follows the mesh")
            self._nudge()
        for task in (
            self._upkeep.run,
            self._stand_for_leader,
            self._reporter.run,
            self._answer_questions,
            self._hearing.run,
            self._follow_obstacles,
            self._encrypting.run,
            self.keeper.run,
        ):
            nursery.start_soon(task)
        if self.config.probe:
            nursery.start_soon(self._witness.run)

    def _keep_programmed(self, nursery: trio.Nursery) -> None:
        """Start what brings snapshots to the kernel and keeps them there; nothing of it writes to etcd."""
        for task in (
            self._follow_snapshots,
            self._follow_drift,
            self._follow_names,
            self._follow_addresses,
            self._follow_first_contacts,
            self._follow_suspicion,
            self._watchdog,
            self._resync,
            self._lookout.run,
            self._reconcile,
        ):
            nursery.start_soon(task)
        if self._neighbours is not None and self._post is not None:
            nursery.start_soon(self._talk, self._neighbours, self._post)
        if self._reachability is not None:
            nursery.start_soon(self._reachability.run)
        if self._dns_hosts is not None:
            nursery.start_soon(self._dns_hosts.run)

    async def _talk(self, neighbours: Neighbours, post: Post) -> None:
        """Speak with neighbours, as long as this host has etcd or they have."""
        while True:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(post.run)
                    self.once.clear("neighbours", "neighbours can be spoken to again")
                    self._note_answers(True)
                    await neighbours.run()
            except* OSError as group:
                lone: BaseException = group
                while isinstance(lone, BaseExceptionGroup):
                    lone = lone.exceptions[0]
                self.once.warning("neighbours", "neighbours cannot be asked while etcd is away",
                                  error=str(lone))  # fmt: skip
                self._note_answers(False)
                await trio.sleep(POST_RETRY_SECONDS)

    def _note_answers(self, answers: bool) -> None:
        if answers != self.answers:
            self.answers = answers
            self._publish_again()

    async def _bridge(self, nursery: trio.Nursery) -> MeshSettings | None:
        """Where etcd does not answer, or is not as the last known mesh on disk knew it: put that mesh in force until
        etcd can be followed. Nothing is written to it before.

        The mesh's settings, if etcd has told them; else, if a last known mesh is kept, the mirror follows etcd now.
        """
        kept = await self.keeper.read()
        if kept is None:
            return None
        self.mirror = store.Mirror(self.client, self.keys, last_seen=kept.last_seen())
        follows = None
        with trio.move_on_after(ETCD_PATIENCE_SECONDS):
            follows = await self._insist(self.mirror.judge)
            if follows:
                return await self._insist(self._settings)
        remembered = await self.keeper.remember(kept, fits=self._fits)
        await nursery.start(self.resolver.run)
        await nursery.start(self.mirror.run)
        if remembered is not None:
            snapshot = remembered.snapshot
            self.log.warning(
                "etcd is held off: the last known mesh is in force"
                if follows is False
                else "etcd is out of reach: the last known mesh is in force",
                revision=snapshot.revision, age=self.keeper.age(remembered), nodes=len(snapshot.nodes),
            )  # fmt: skip
            self._take_subnets(snapshot.subnets)
            self.remembered = remembered
            await self.whereabouts.look()
            self.snapshot = snapshot
            self._keep_programmed(nursery)
            self._nudge()
        await self.mirror.wait_newer(None)
        return None

    async def _settings(self) -> MeshSettings:
        config = self.config
        wanted = MeshSettings(
            config.mesh_granularity or Granularity.LOCATION, config.subnets, config.internal_ips or InternalIPs.ROUTED
        )
        settings = await self.session.ensure_mesh(wanted)
        if config.renumber:
            return settings
        return settings._replace(subnets=await self.session.subnets_in_force(settings.subnets))

    async def _reported(self) -> Report:
        """What this host's record in etcd says of the switch to `encrypted`."""
        found = await self.client.get(self.keys.node(self.name))
        if found is None:
            return Report()
        try:
            record = store.decode_node(found.value)
        except store.RecordError:
            return Report()
        if record.public_key != self.public_key:
            return Report()
        return Report(stage=record.encryption, accepts_since=record.accepts_since or 0)

    async def _report_stage(self, report: Report) -> bool:
        self.whereabouts.report = report
        await self.whereabouts.look_again(register=True)
        record = self.whereabouts.record
        said = record is not None and (record.encryption, record.accepts_since or 0) == (
            report.stage,
            report.accepts_since,
        )
        if said:
            self.log.info("encryption stage reported", stage=report.stage or "none")
        return said

    def _fits(self, snapshot: Snapshot) -> str | None:
        return too_small_for(self.config.mtu, snapshot.subnets)

    def _take_subnets(self, subnets: tuple[IPNetwork, ...]) -> None:
        if reason := too_small_for(self.config.mtu, subnets):
            raise Fatal(reason)
        self.subnets = self.whereabouts.subnets = subnets

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of an etcd call that is tried until etcd is there; what can't be cured by waiting is fatal."""
        delay = 0.2
        while True:
            try:
                result = await call()
            except etcd.Unavailable as error:
                if not isinstance(error, store.HeldOff):
                    self.once.error("etcd", error.kind, error=str(error))
                    self._waiting = f"waiting for etcd: {error.kind}: {error}"
                self.metrics.error("etcd")
                if self.remembered is None:
                    notify(f"STATUS=waiting for etcd: {error}")
                await trio.sleep(delay * self._rng.uniform(0.5, 1.0))
                delay = min(delay * 1.6, 3.0)
            except (etcd.EtcdError, *REFUSALS) as error:
                raise Fatal(str(error)) from error
            else:
                self.once.clear("etcd", "etcd is back")
                self._waiting = None
                return result

    async def _leave(self) -> None:
        """Take away what is only a live agent's; with `--clean-up` everything."""
        error: etcd.EtcdError | str = "it did not answer in time"
        gone = False
        with trio.move_on_after(RESIGN_SECONDS):
            try:
                if self.config.clean_up:
                    await self.session.forget()
                else:
                    await self.session.resign()
                gone = True
            except etcd.EtcdError as refusal:
                error = refusal
        if not gone:
            self.log.warning("the records in etcd could not be removed; their leases end by themselves",
                             error=str(error))  # fmt: skip
        if self.config.clean_up:
            changes = await kernel.cleanup(self.config.interface, public_key=self.public_key)
            if self._dns_hosts is not None:
                await self._dns_hosts.remove()
            try:
                await self.keeper.forget()
                await self._encrypting.forget()
            except OSError as failure:
                self.log.warning("the last known mesh could not be removed from disk", error=str(failure))
            self.log.info("cleaned up", changes=len(changes))
        else:
            await self.keeper.flush()
        self.log.info("stopped", kernel_state="removed" if self.config.clean_up else "left in place")

    async def _hand_over(self) -> None:
        """Let the successor lead before we go: candidacy away, its plan applied here, then seen applied elsewhere."""
        if self.session.candidacy is None or self.topology is None or self.role is None:
            return
        if self.name not in self.topology.snapshot.nodes:
            return  # Its record or its address was taken away, and is on its way back.
        segment = self.topology.segment_of(self.name)
        led = segment.leader.name == self.name and segment.next_in_line is not None
        told = False
        with trio.move_on_after(HANDOVER_SECONDS):
            try:
                told = await self.session.leave()
                if not led or not told:
                    return
                while self.role.leader == self.name:
                    await self._applied.wait()
                revision = self.applied_revision
                while not decide.confirmed(  # noqa: ASYNC110 - what is waited for happens on other hosts
                    {node: status.revision for node, status in (await store.statuses(self.client, self.keys)).items()},
                    revision,
                    self.name,
                ):
                    await trio.sleep(CONFIRM_POLL_SECONDS)
            except etcd.EtcdError as error:
                self.log.warning("leadership was not handed over", error=str(error))
                return
            self.log.info("leadership handed over", location=segment.location, leader=self.role.leader)
            return
        if led and told:
            self.log.warning("not every host has confirmed the new leader in time; going all the same",
                             location=segment.location)  # fmt: skip
        elif led:
            self.log.warning("leadership was not handed over, since etcd does not answer; the lease ends by itself",
                             location=segment.location)  # fmt: skip

    # -- what wakes the reconciler --------------------------------------------------------------------------

    def _nudge(self, *, fresh: bool = False) -> None:
        self._fresh = self._fresh or fresh
        self._wanted = True
        self._wake.set()

    async def _follow_snapshots(self) -> None:
        snapshot: Snapshot | None = None
        while True:
            snapshot = await self.mirror.wait_newer(snapshot)
            self.snapshot = snapshot
            self._nudge()

    async def _follow_drift(self) -> None:
        backoff = RepairBackoff()
        while True:
            what = await self.kernel.wait_drift()
            pause = backoff.pause(trio.current_time())
            if pause:
                self.log.warning("the kernel is changed behind the agent's back again and again; repairing less often",
                                 what=what, seconds=f"{pause:g}")  # fmt: skip
                await trio.sleep(pause)
            else:
                self.log.warning("the kernel was changed behind the agent's back; repairing", what=what)
            self._nudge(fresh=True)

    async def _follow_suspicion(self) -> None:
        """Have the status say when etcd is held off or cannot be read, and when it is followed again: the plan stays
        what it was."""
        standing: str | None = None
        while True:
            standing = await self.mirror.wait_standing(standing)
            if self.snapshot is not None and self.topology is not None:
                self._publish(self.snapshot)

    async def _follow_names(self) -> None:
        while True:
            await self.resolver.wait_changed()
            self._nudge()

    async def _follow_first_contacts(self) -> None:
        while True:
            await self.programmer.wait_due()
            # Read anew: an endpoint that was learnt meanwhile stays as it is.
            self._nudge(fresh=True)

    def _begin_over(self, keys: Collection[str]) -> None:
        self.programmer.begin_over(keys)
        self._nudge(fresh=True)

    async def _resync(self) -> None:
        while True:
            await trio.sleep(self.config.resync_period)
            await self.whereabouts.look_again(register=self.remembered is None)
            self._nudge(fresh=True)

    async def _follow_addresses(self) -> None:
        """Where the host is reached may change while it runs, or have come late at boot."""
        while True:
            await self.kernel.wait_moved()
            await trio.sleep(SETTLE_SECONDS)
            await self.whereabouts.look_again(register=self.remembered is None)
            self._nudge()

    async def _answer_questions(self) -> None:
        """Answer, and begin anew in another etcd: there a watch would wait for a revision that is far away."""
        taken_up = self.mirror.taken_up
        while True:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answerer.run)
                taken_up = await self.mirror.wait_taken_up(taken_up)
                nursery.cancel_scope.cancel()

    async def _watchdog(self) -> None:
        """Have the reconciler tell systemd that it is alive."""
        interval = watchdog_interval()
        while interval is not None:
            self._beat = True
            self._wake.set()
            await trio.sleep(interval / 2)

    # -- the one that acts ----------------------------------------------------------------------------------

    async def _reconcile(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self._beat:
                self._beat = False
                notify("WATCHDOG=1")
            wanted, self._wanted = self._wanted, False
            fresh, self._fresh = self._fresh, False
            if wanted and self.snapshot is not None:
                await self._apply(self.snapshot, fresh)

    async def _apply(self, snapshot: Snapshot, fresh: bool) -> None:
        self._report_snapshot(snapshot)
        if self.remembered is None:
            self._upkeep.follow(snapshot)
        self.topology = build_topology(snapshot, self.topology)
        if self._neighbours is not None:
            self._neighbours.follow(self.topology)
            if (heard := followed(self.topology, self.hearsay)) is not snapshot:
                self.topology = build_topology(heard, self.topology)
        own = snapshot.nodes.get(self.name)
        if own is not None and own.public_key != self.public_key:
            # The same: it has the record of an earlier run with another key, or what another writer has put.
            return
        try:
            self.raw_plan = host_plan(self.topology, self.name, self.raw_plan)
        except UnknownNode:
            record = self.mirror.kv(self.keys.node(self.name))
            if record is None or record.mod_revision > snapshot.revision:
                # The snapshot is older than the registration; the one that has it is on its way.
                return
            twin = await self._living_twin(snapshot)
            silenced = await self._silence(twin) if twin else ""
            self.failures = (self._why_unknown(snapshot) + silenced,)
            self.once.error("unknown", self.failures[0], revision=snapshot.revision)
            self.metrics.not_programmed(self.failures[0])
            self._publish(snapshot)
            notify(f"STATUS={self.failures[0]}")
            return
        self.once.clear("unknown", "this host is among the mesh's nodes again")
        self.resolver.set_names(plan_names(self.raw_plan))
        resolved = resolve_plan(self.raw_plan, self.resolver.table, self.resolver.failed, self.whereabouts.families)
        resolved = decide.from_own_addresses(
            resolved, self.topology.snapshot.nodes[self.name], self.whereabouts.addresses
        )
        guarded = guard(resolved, self.protected(), self.guarded, offered_by=self.topology.settlement.offered_by)
        plan = await self._within_reach(self._at_the_internet(guarded, self.topology), self.topology)
        self._encrypting.withdraw()
        if self._encrypting.concerns(self.topology):
            await self._encrypting.prepare(self.topology, etcd_away=self.remembered is not None)
            self.resolver.networks(self._encrypting.etcd_urls)
            plan = self._encrypting.encrypt(
                plan, self.topology, sources=self.whereabouts.sources, addresses=self.whereabouts.addresses,
                table=self.resolver.table, silent=self._silent_leader,
            )  # fmt: skip
        standby = decide.is_standby(decide.role_of(self.topology, self.name), plan)
        before = self.kernel.writes
        try:
            report = await self.programmer.apply(plan, self.topology, standby=standby, fresh=fresh)
        except kernel.KernelError as error:
            if self.plan is None:
                # Nothing has ever worked: the operator stands before it and wants to know.
                raise
            self._programmed = self._ready = False
            self.failures = (str(error),)
            self.once.error("kernel", "the kernel cannot be programmed; trying again", error=str(error))
            self.metrics.reconciled(trouble=str(error), writes=self.kernel.writes - before)
            self._publish(snapshot)
            await trio.sleep(KERNEL_RETRY_SECONDS)
            self._nudge(fresh=True)
            return
        self.once.clear("kernel", "the kernel can be programmed again")
        self._note_internal_ips(self.topology)
        self.guarded, self.plan = guarded, plan
        self.applied_revision = snapshot.revision
        for change in report.changes:
            self.log.debug("changed", command=str(change))
        self.failures = (
            *(str(failure) for failure in report.failures),
            *(problem.text for problem in plan.problems),
        )
        self.once.errors("plan", self.failures, revision=snapshot.revision)
        self.metrics.reconciled(
            trouble=str(report.failures[0]) if report.failures else None,
            writes=self.kernel.writes - before,
            revision=snapshot.revision,
            problems=len(plan.problems),
        )
        if report.changes:
            self.log.info(
                "applied", changes=len(report.changes), failures=len(report.failures),
                peers=len(plan.peers), routes=len(plan.routes), revision=snapshot.revision,
            )  # fmt: skip
        self._programmed = True
        missing = (failure.destination for failure in report.failures if not failure.aside)
        self._ready = decide.able_to_lead(missing, snapshot.subnets)
        self._candidacy.follow(self.topology)
        self._note_role(snapshot)
        self._publish(snapshot)
        self._hearing.follow(snapshot, plan, tunnels=not standby)
        self._lookout.follow(plan)
        if self._dns_hosts is not None:
            self._dns_hosts.follow(self.topology, guarded, fresh=fresh)
        self._encrypting.follow(self.topology, plan, whole=not report.failures)
        self._witness.follow(self.topology)
        if self.remembered is None or snapshot is not self.remembered.snapshot:
            self.keeper.note(snapshot, self._holdings)
        applied, self._applied = self._applied, trio.Event()
        applied.set()

    def _at_the_internet(self, guarded: HostPlan, topology: Topology) -> HostPlan:
        """The plan with what concerns the world outside the mesh: this host as gateway, or the one that it uses."""
        assert self.raw_plan is not None
        plan = at_gateway(guarded, self.whereabouts.underlay, self.whereabouts.families)
        gateway = topology.snapshot.nodes[self.name].way_out
        endpoints = self.config.etcd.endpoints
        return by_way_out(
            plan,
            topology,
            outside=self.resolver.networks(endpoints),
            sources=self.whereabouts.sources,
            unresolved=(*self.resolver.unresolved(endpoints), *names_of(self.raw_plan, gateway, self.resolver.table)),
        )

    async def _within_reach(self, plan: HostPlan, topology: Topology) -> HostPlan:
        """The plan without the routes to members of the location that have never answered."""
        reachability = self._reachability
        if reachability is None:
            return plan
        if not reachability.ready:
            try:
                reachability.start(await self.kernel.observe())
            except (OSError, kernel.KernelError):
                reachability.start(Observed())  # If that lasts, `apply` says so.
        silent = reachability.follow(topology)
        leader = topology.segment_of(self.name).leader.name
        self._silent_leader = frozenset(
            one.target.address for one in silent if one.withheld and one.target.node == leader
        )
        self.metrics.unreachable.set(len({one.target.node for one in silent if one.named}))
        return withhold(plan, topology, silent)

    def _holdings(self) -> store.Holdings | None:
        return self.mirror.holdings()

    async def _living_twin(self, snapshot: Snapshot) -> str | None:
        """The node that has this host's key and is in the mesh, if its agent runs; None also if etcd does not say."""
        names = (node.name for node in snapshot.nodes.values() if node.public_key == self.public_key)
        if (name := next(names, None)) is None:
            return None
        try:
            status = await self.client.get(self.keys.status(name))
        except etcd.EtcdError:
            return None
        return name if status is not None and status.lease else None

    async def _silence(self, twin: str) -> str:
        """Exchange no packets with the mesh, whose WireGuard would take this host for `twin`, and send here what is for
        that. Returns what to say of it."""
        # A tunnel without peers drops what its routes lead there. By them an agent that starts here with another key
        # knows that the device is its own.
        routes = {subnet: RoutePlan(destination=subnet, way=Via.TUNNEL) for subnet in self.subnets}
        silent = HostPlan(node=self.name, listen_port=self.config.port, routes=routes, fences=self.subnets)
        try:
            await self.programmer.silence(silent)
        except kernel.KernelError as error:
            return f"; the kernel still holds its peers: {error}"
        return f"; the agent of {twin} runs, so this host exchanges no packets with the mesh"

    def _why_unknown(self, snapshot: Snapshot) -> str:
        if set(snapshot.subnets) != set(self.subnets):
            now, own = (",".join(map(str, subnets)) for subnets in (snapshot.subnets, self.subnets))
            return (
                f"this host is not among the mesh's nodes: its address is in {own}, and most nodes' are in {now} now; "
                "to have it renumbered, start its agent once with --renumber"
                if not self.config.renumber
                else f"this host is not among the mesh's nodes: it was renumbered into {own}, and most nodes' "
                f"addresses are in {now} still; start their agents once with --renumber too"
            )
        key = self.keys.node(self.name)
        claims = {self.keys.address(address) for address in self.session.addresses}
        reasons = "; ".join(note.reason for note in snapshot.set_aside if note.key == key or note.key in claims)
        return f"this host is not among the mesh's nodes: {reasons or f'see the records set aside for {self.name}'}"

    def protected(self) -> tuple[IPNetwork, ...]:
        """Networks that no route into the tunnel may cover: etcd's addresses and the host's own underlay."""
        return (*self._etcd_networks(), *self.whereabouts.underlay)

    def _etcd_networks(self) -> tuple[IPNetwork, ...]:
        return self.resolver.networks(self.config.etcd.endpoints)

    def _report_snapshot(self, snapshot: Snapshot) -> None:
        self.once.errors("set aside", snapshot.set_aside, what="rejected records", revision=snapshot.revision)
        self.disagreements = decide.disagreements(
            snapshot,
            granularity=self.config.mesh_granularity,
            subnets=self.config.wanted_subnets,
            internal_ips=self.config.internal_ips,
        )
        self.once.errors("settings", self.disagreements)
        self.metrics.snapshot(snapshot)

    def _note_internal_ips(self, topology: Topology) -> None:
        before, self._internal_ips = self._internal_ips, decide.InternalIPsState.of(topology)
        if (news := self._internal_ips.news(before)) is not None:
            event, fields = news
            self.log.info(event, revision=topology.snapshot.revision, **fields)

    def _note_role(self, snapshot: Snapshot) -> None:
        assert self.topology is not None
        role = decide.role_of(self.topology, self.name)
        if role == self.role:
            return
        self.role = role
        self.log = get_logger().bind(node=self.name, location=role.location)
        if role.kind is store.Role.ALONE:
            self.log.info("this host is a segment of its own", revision=snapshot.revision)
        else:
            passed_over = self.topology.segment_of(self.name).election.passed_over
            self.log.info(
                "leader elected", leader=role.leader, role=role.kind, passed_over=passed_over,
                revision=snapshot.revision,
            )  # fmt: skip
        self.metrics.leads(role.kind is store.Role.LEADER)

    def _note_unmet(self, sentences: tuple[str, ...]) -> None:
        self.unmet = sentences
        self.once.errors("unmet", sentences, level="warning")
        self._publish_again()

    def _note_event(self, event: str) -> None:
        if event == "lease lost":
            self._nudge()
        elif event == "contested":
            self.once.errors("contested", () if self.session.contested is None else (self.session.contested,))
            self._publish_again()

    def _note_no_baseline(self, sentence: str | None) -> None:
        self.no_baseline = sentence
        self.once.errors("blind", () if sentence is None else (sentence,), level="warning")
        self._publish_again()

    async def _follow_obstacles(self) -> None:
        """Say what on this host drops what it forwards, for as long as it forwards or was demoted for it; and when that
        is gone, have a host that was demoted stand as before."""
        obstructed: tuple[str, ...] = ()
        while True:
            applied, plan = self._applied, self._in_force()
            forwards = plan.plan is not None and bool(plan.plan.forwarding)
            # A plan that does not forward says nothing about what drops packets: what was found stays.
            if forwards:
                with suppress(OSError, kernel.KernelError):
                    found = tuple(one.text for one in await self.kernel.obstacles() if one.certain)
                    if obstructed and not found:
                        # Whoever was found wanting is so no more.
                        self._candidacy.release()
                        self._witness.try_again()
                        self._nudge()
                    obstructed = found
            # The demoted leader's operator has to know what to mend, although others forward now.
            concerned = plan.sends or self._candidacy.penance is not None
            in_force = obstructed if forwards and concerned else ()
            if in_force != self.obstructed:
                self.obstructed = in_force
                self.once.errors("forwarding", in_force)
                self._publish_again()
            await trio.sleep(OBSTACLES_PAUSE)
            with trio.move_on_after(OBSTACLES_PERIOD):
                await applied.wait()

    def _note_gateway(self, sentence: str | None) -> None:
        self.beyond = sentence and (
            f"{sentence}, so nothing leaves this host but for {STAYS_OUTSIDE}: is it up, does UDP reach "
            f"it? else kgctl annotate {self.name} way-out=ANOTHER, or way-out-"
        )
        self.once.errors("gateway", () if self.beyond is None else (self.beyond,), level="warning")
        self._publish_again()

    def _publish_again(self) -> None:
        """The status has changed by itself."""
        if self.snapshot is not None and self.role is not None:
            self._publish(self.snapshot)

    def _publish(self, snapshot: Snapshot) -> None:
        state = State(
            role=self.role,
            revision=self.applied_revision,
            failures=self.failures,
            errors=self._standing_errors(),
            programmed=self._programmed,
            address=self.whereabouts.address,
            unreachable=self._unreachable(),
            unsigned=() if self._reachability is None else self._reachability.unsigned[:MOST_LISTED],
            answers=self.answers,
            without_etcd=self.mirror.suspect or self._bridged() or self.mirror.trouble or "",
        )
        self._reporter.publish(snapshot, state, leaving=self._leaving)

    def _unreachable(self) -> tuple[store.Unreachable, ...]:
        silent = () if self._reachability is None else self._reachability.silent
        named = (
            store.Unreachable(one.target.node, str(one.target.address), not one.withheld) for one in silent if one.named
        )
        return tuple(sorted(named))[:MOST_LISTED]

    def _etcd_away(self) -> bool:
        return not self.mirror.connected or self.session.lapsed

    def _note_heard(self, heard: Hearsay) -> None:
        self.hearsay = heard
        if heard.leaders:
            self.log.warning("etcd is out of reach; following the leaders that neighbours name",
                             revision=heard.revision, leaders=sorted(set(heard.leaders.values())))  # fmt: skip
        else:
            self.log.info("following etcd again, no longer what neighbours say")
        self._nudge()

    def _in_force(self) -> Programmed:
        sends = self.role is not None and self.plan is not None and not decide.is_standby(self.role, self.plan)
        undecided = () if self._reachability is None else self._reachability.undecided[:MOST_LISTED]
        return Programmed(
            plan=self.programmer.programmed, revision=self.applied_revision, topology=self.topology, sends=sends,
            undecided=undecided,
        )  # fmt: skip

    def _standing_errors(self) -> tuple[str, ...]:
        """All that is wrong with this host, as sentences."""
        why = self._candidacy.why
        behind = why and f"this host was demoted as leader: {why}; {DEMOTED}"
        # What etcd could not be told it has been told by the time that somebody reads this there.
        further = (
            self.beyond,
            self._encrypting.trouble,
            self.no_baseline,
            self._upkeep.renumbered,
            self._upkeep.trouble,
            self.session.contested,
            self.mirror.suspect or self._bridged(),
            behind,
            self.metrics.listen_trouble,
            self._dns_hosts and self._dns_hosts.trouble,
        )
        said = (*self.disagreements, *self.failures, *self.obstructed, *self.unmet, *self.whereabouts.overlaps)
        return (*said, *(text for text in further if text))

    def _etcd_trouble(self) -> str | None:
        """Why etcd is not followed or does not hold what this host has to say, with etcd's own error and what to do."""
        if (held := self.mirror.suspect or self._bridged()) is not None:
            return held
        if (trouble := self.mirror.trouble) is not None:
            return f"{trouble}; forwarding goes on by the last plan"
        return self._waiting or self.session.last_error or self.session.contested

    def _own_trouble(self) -> str | None:
        """Why this host does not do its part although etcd is followed and the plan is in the kernel."""
        return self._upkeep.trouble or next(iter(self.obstructed), None)

    def _bridged(self) -> str | None:
        if self.remembered is None:
            return None
        age = self.keeper.age(self.remembered)
        failure = self.mirror.failure
        what, why = ("etcd is out of reach", "") if failure is None else (failure.kind, f": {failure}")
        return f"{what}; the last known mesh is in force, which was kept on disk (age {age}){why}"

    # -- candidacy ------------------------------------------------------------------------------------------

    async def _sound(self) -> bool:
        """Whether the kernel is as the plan in force wants it, read anew."""
        plan = self.programmer.programmed
        try:
            return plan is not None and not await self.kernel.preview(plan)
        except (OSError, kernel.KernelError):
            return False  # Who cannot look at itself accuses nobody.

    async def _forwards(self) -> bool:
        """Whether nothing is known on this host that drops all that it would forward in the family that probers try."""
        own = self.topology.snapshot.nodes.get(self.name) if self.topology is not None else None
        tried = {address.version for address in own.mesh_addresses[:1]} if own is not None else set()
        try:
            return not any(one.certain and tried & one.blocked for one in await self.kernel.obstacles())
        except (OSError, kernel.KernelError):
            return True

    def _prove(self, keys: Collection[str]) -> None:
        self.programmer.prove(keys)
        self._nudge()

    async def _stand_for_leader(self) -> None:
        """Hold the candidacy that `decide.stand` says, deciding again after each apply and when a wait is over."""
        while True:
            applied = self._applied
            due = None
            if self.snapshot is not None and self.topology is not None and not self._leaving:
                ready = self._ready and self.applied_revision >= self.snapshot.revision
                leads = self.role is not None and self.role.kind is store.Role.LEADER
                due = await self._candidacy.update(self.snapshot, leads=leads, ready=ready)
            with trio.move_on_at(due if due is not None else float("inf")):
                await applied.wait()
