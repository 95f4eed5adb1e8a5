"""The agent: one nursery in which small tasks turn snapshots into kernel state and the host's state into records.

Data flows one way: mirror -> topology -> plan -> kernel -> status. Every task is a loop around one wait; they meet
in the `Reconciler`, whose one task calls `_apply`, which makes the plan and brings it to the kernel.

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
from attrs import evolve

from kilo_etcd import kernel
from kilo_etcd.agent.adoption import LONGEST_SECONDS, Adoption
from kilo_etcd.agent.apply import PlanApplier
from kilo_etcd.agent.cachefile import CachedMesh, CachedSnapshot, Identity
from kilo_etcd.agent.config import AgentConfig, too_small_for
from kilo_etcd.agent.diagnostics import AppliedPlan, DiagnosticsServer
from kilo_etcd.agent.dnshosts import DnsHosts, WriteNames
from kilo_etcd.agent.encrypting import Encrypting
from kilo_etcd.agent.etcd_members import EtcdMembers
from kilo_etcd.agent.instrumented import instrumented
from kilo_etcd.agent.leader_hints.hints import LeaderHints, followed
from kilo_etcd.agent.leader_hints.peer_query import DatagramTransport, PeerQuery
from kilo_etcd.agent.leadership import candidacy_policy
from kilo_etcd.agent.leadership.candidacy import CandidacyTask
from kilo_etcd.agent.leadership.served_families import refused_families
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.namesakes import Namesakes
from kilo_etcd.agent.nat.wireguard_monitor import WireGuardMonitor
from kilo_etcd.agent.notify import notify, notify_reloading, watchdog_interval
from kilo_etcd.agent.probing.prober import Prober
from kilo_etcd.agent.probing.reachability import Reachability
from kilo_etcd.agent.probing.taken_routes import taken_route
from kilo_etcd.agent.registration import HostRegistration
from kilo_etcd.agent.restore import REFUSALS, Restorer
from kilo_etcd.agent.snapshot_cache import Disk, SnapshotCache
from kilo_etcd.agent.state_directory import PERIOD_SECONDS
from kilo_etcd.agent.status import State, StatusReporter
from kilo_etcd.agent.trial import try_installed
from kilo_etcd.etcd import api as etcd
from kilo_etcd.kernel.firewall.chains import Obstacle
from kilo_etcd.kernel.firewall.cleartext import refused_sources
from kilo_etcd.kernel.state import CreateLink, Observed, StartUserspace
from kilo_etcd.model import PEER_QUERY_PORT, Granularity, InternalIPs, IPAddress, IPNetwork, MeshSettings, Snapshot
from kilo_etcd.model.hostplan import HostPlan, RoutePlan, Via
from kilo_etcd.planning.encryption import StageReport
from kilo_etcd.planning.exit_node import BYPASSES
from kilo_etcd.planning.names import plan_names
from kilo_etcd.planning.pipeline import EncryptionInputs, HostPlans, Surroundings, host_plans
from kilo_etcd.planning.reach import Silent
from kilo_etcd.runtime.exit_node_monitor import ExitNodeMonitor
from kilo_etcd.runtime.logs import Once, get_logger, write_due, write_rest
from kilo_etcd.runtime.reconciler import Reconciler
from kilo_etcd.runtime.resolve import Resolver, known_endpoints
from kilo_etcd.runtime.set_back import SetBack
from kilo_etcd.runtime.unanswered_peers import UnansweredPeers
from kilo_etcd.store.events import wait_any
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import ClusterNotTrusted, Mirror
from kilo_etcd.store.operator import statuses
from kilo_etcd.store.records import NodeRecord, RecordError, Role, Unreachable, decode_node
from kilo_etcd.store.session.session import Session
from kilo_etcd.store.status_texts import FORWARDING_LOOK, WAS_DEMOTED
from kilo_etcd.store.view import Holdings
from kilo_etcd.topology.forced_addresses import missing_addresses
from kilo_etcd.topology.mesh_settings import disagreements
from kilo_etcd.topology.segments import Topology, UnknownNode, build_topology

T = TypeVar("T")

HANDOVER_SECONDS = 2.0
"""How long a stopping leader waits for the others to have applied its successor's plan (docs/design.md, "Election,
failure detection and handover")."""

CONFIRM_POLL_SECONDS = 0.02

RESIGN_SECONDS = 2.0
"""How long a stopping agent tries to take its records away; they are under leases that end by themselves."""

ETCD_PATIENCE_SECONDS = 2.0
"""How long a starting agent waits for etcd before it goes by the cached snapshot."""

TRANSPORT_RETRY_SECONDS = 60.0
"""After the port for peer queries could not be had."""

OBSTACLES_PAUSE, OBSTACLES_PERIOD = 2.0, 10.0
"""Seconds between two looks at what drops forwarded packets: at least after a change of the plan, and at most."""

WAITS_FOR_OTHERS = (
    f"etcd is followed again; the last plan stays until the other hosts are back there, for {LONGEST_SECONDS:g} s at "
    "most"
)
"""The line that says why an etcd that was adopted is not followed yet."""

CLOCK_PERIOD = 10.0
"""Seconds between two looks at whether it still matters that the clock went back."""

FLUSH_SECONDS = 5.0
"""Between two looks at what of the log was left out."""

MOST_LISTED = 64
"""Members that do not answer, and exemptions, in the status."""

DEMOTED = (
    f"for some minutes it leads only if no other node can. Look for {FORWARDING_LOOK}, or blocks UDP 51820 (--port), "
    "or for an endpoint at which others do not reach it (kgctl node show); once that is mended, restart the agent to "
    "clear it now: systemctl restart kilo-etcd"
)
"""What follows for a host that was demoted, and what to do."""


class Fatal(Exception):
    """The agent cannot go on; the message is the sentence for the operator."""


class StoppedAtOnce(Fatal):
    """Asked to stop a second time."""


class Reload(Exception):
    """The agent was asked to run its code anew. Nothing was given up: the next one adopts all of it."""


def _kind(failure: etcd.EtcdError | RecordError | None) -> str:
    """The kind of trouble with etcd in a few words; None: it has not answered."""
    if isinstance(failure, RecordError):
        return "etcd holds what cannot be read"
    return (failure or etcd.Unavailable).kind


def _watchdog_beat() -> None:
    notify("WATCHDOG=1")


class _MirrorGuard:
    """The cluster guard of whichever mirror the agent has."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    @property
    def generation(self) -> int:
        return self._daemon.mirror.generation

    @property
    def trust(self) -> tuple[int, bool]:
        return self._daemon.mirror.trust

    async def wait_trust_change(self, than: tuple[int, bool]) -> tuple[int, bool]:
        return await self._daemon.mirror.wait_trust_change(than)

    def observe(self, header: etcd.Header) -> None:
        self._daemon.mirror.observe(header)

    def check(self) -> None:
        self._daemon.mirror.check()

    async def verify(self) -> None:
        await self._daemon.mirror.verify()


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
        transport: DatagramTransport | None = None,
        write_names: WriteNames | None = None,
    ) -> None:
        """`disk`: where the cached snapshot is kept; None: it is not. `secret` is what the host's key and a public key
        agree on, and `transport` the way to other nodes; None: no node is queried while etcd is away. `write_names`
        writes the hosts file; None: it is not touched."""
        self.config = config
        self.client = client = instrumented(client, metrics.etcd_writes.inc, metrics.etcd_answered)
        self.kernel = device
        self.applier = PlanApplier(device)
        self.metrics = metrics
        self.name = config.hostname
        self.public_key = public_key
        self.keys = Keys(config.prefix)
        self.mirror = Mirror(client, self.keys)
        self.session = Session(
            client,
            self.keys,
            self.name,
            public_key,
            lease_ttl=int(config.lease_ttl),
            forget_after=int(config.forget_after),
            on_event=self._note_event,
            guard=_MirrorGuard(self),
        )
        self.resolver = Resolver()
        self._served_by: str | None = None
        """The endpoint of the connection to etcd, or of the last one."""
        # Asked for at each scrape, so that nothing has to poll.
        metrics.untrusted_when(self._etcd_trouble)
        metrics.untrusted_when(self._own_trouble)
        metrics.etcd_connected.set_function(lambda: float(self.mirror.connected and not self.mirror.untrusted_reason))
        self.log = get_logger().bind(node=self.name)
        self.once = Once(self.log)
        self.namesakes = Namesakes(
            self.session, self.keys, self.name, public_key, self.once, mirror=lambda: self.mirror
        )
        self.registration = HostRegistration(
            config, public_key, self.session, self.log, self.once,
            endpoints=self._etcd_endpoints, etcd=self._etcd_networks, former=self.namesakes.former,
        )  # fmt: skip
        identity = Identity(prefix=config.prefix, node=self.name, public_key=public_key)
        self.cache = SnapshotCache(disk, identity, self.once)
        self.cached: CachedSnapshot | None = None
        """The cached snapshot, if this host has begun with it and not joined since."""
        metrics.cached_mesh.set_function(lambda: float(self._goes_by_cache()))

        self.snapshot: Snapshot | None = None
        self.topology: Topology | None = None
        self.plans: HostPlans | None = None
        """The newest; the kernel may not have taken it."""
        self.plan: HostPlan | None = None
        """What was last brought to the kernel."""
        self.role: candidacy_policy.SegmentRole | None = None
        self.applied_revision = 0
        self.failures: tuple[str, ...] = ()
        self.disagreements: tuple[str, ...] = ()
        self.traversal_failures: tuple[str, ...] = ()
        """Sentences on nodes that, like this host, are behind NAT, and cannot be reached."""
        self.unanswered = UnansweredPeers()
        """The peers that do not answer although WireGuard sends to them."""
        self.state_trouble: str | None = None
        """A sentence on a state directory that is not of use for the next start."""
        self.clock_set_back: str | None = None
        """A sentence on this host's clock, as long as it matters that it went back."""
        self.leader_hints = LeaderHints()
        """The leader hints of other nodes since etcd was out of reach."""
        self.no_baseline: str | None = None
        """A sentence on a leader through which no target has ever answered this host, which would report it."""
        self.answers = False
        """Whether this host answers peer queries: it has the port."""
        self.obstructed: tuple[str, ...] = ()
        """Sentences on what drops what this host forwards."""
        self.cut_networks: tuple[str, ...] = ()
        """What on this host drops packets for some members or offered networks."""
        self._look_for_obstacles = trio.Event()
        self.beyond: str | None = None
        """A sentence on the exit node that this host uses and that does not answer."""
        self.subnets: tuple[IPNetwork, ...] = ()
        """The mesh's, as they were when this agent joined."""

        self._waiting: str | None = None
        """What this agent waits for before it can join, as a sentence."""
        self._unjoined: etcd.EtcdError | RecordError | None = None
        """Why etcd did not let this host join the last time that it tried."""
        self._on_disk: CachedMesh | None = None
        """The cache's content, as long as it may still be of use."""
        self._follows_etcd = False
        """Whether the tasks run that follow etcd."""
        self._joined = False
        self._adoption = Adoption(0)
        self._reloads = False
        """Whether the installed code is being tried."""
        self.not_reloaded: str | None = None
        """A sentence on installed code that does not run."""
        self._rng = random.Random()
        self._applied = trio.Event()
        self._stopping = trio.Event()
        self._programmed = False
        self._ready = False
        """Programmed well enough to lead."""
        self._made_device = False
        """Whether the WireGuard device was made anew since this agent began."""
        self._set_back = SetBack()
        self._clock_news = trio.Event()
        self._refused_families: frozenset[int] = frozenset()
        self._reconciling = False
        """Whether the tasks run that bring snapshots to the kernel."""
        self._leaving = False
        self._reconciler = Reconciler(
            self._apply_newest,
            device,
            self.resolver,
            look=self._look_again,
            resync_period=config.resync_period,
            log=self.log,
            once=self.once,
        )
        self._nudge = self._reconciler.nudge
        self._internal_ips: candidacy_policy.InternalIPsState | None = None
        self._clear = tuple(map(str, config.clear)) if len(config.clear) <= MOST_LISTED else None
        self._peer_query_port = config.peer_query_port if config.peer_query_port != PEER_QUERY_PORT else None
        self._reporter = StatusReporter(self.session, public_key, config.mesh_granularity)
        self._restorer = Restorer(
            self.session,
            self.keys,
            self.name,
            self.once,
            mirror=lambda: self.mirror,
            rng=self._rng,
            on_news=self._publish_again,
        )
        self._candidacy = CandidacyTask(self.session, self.name)
        self._answerer = DiagnosticsServer(
            client, self.keys, self.name, device, self._in_force, self.once,
            untrusted=lambda: self.mirror.untrusted_reason,
            asked=lambda: self._look_for_obstacles.set(),
        )  # fmt: skip
        self._post = transport
        self._peer_query = (
            None
            if secret is None or transport is None or not config.probe
            else PeerQuery(
                self.name,
                transport,
                secret,
                etcd_away=self._etcd_away,
                on_heard=self._note_leader_hints,
                sources=lambda: self.registration.facts.sources(),
            )
        )
        self._reachability = None
        if config.probe:
            ask = None if self._peer_query is None else self._peer_query.ask_local
            self._reachability = Reachability(
                device, self.name, ask=ask, on_change=self._nudge, programmed=lambda: self.applier.programmed
            )
            if self._peer_query is not None:
                self._peer_query.reachability = self._reachability
        self._prober = Prober(
            device, self.session, self.name, self.once,
            sound=self._sound, forwards=self._forwards, check_takeover=self._check_takeover,
            look_again=lambda: self._nudge(fresh=True), on_no_baseline=self._note_no_baseline,
            examined=lambda: self._answerer.sends_many,
        )  # fmt: skip
        self._wireguard_monitor = WireGuardMonitor(
            device,
            self.session,
            self.name,
            on_traversal_failures=self._note_traversal_failures,
            on_unanswered=self._note_unanswered,
            set_back=self._set_back,
            on_set_back=lambda: self._clock_news.set(),
            reset_session=self._reset_session,
            renew=self._renew,
        )
        self._etcd_members = EtcdMembers(
            config,
            client,
            self.log,
            self.once,
            disk=disk,
            trusted=self._etcd_is_followed,
            rng=self._rng,
        )
        self._exit_node_monitor = ExitNodeMonitor(device, self._note_exit_node)
        self._dns_hosts = write_names and DnsHosts(
            write_names,
            enabled=config.dns_hosts,
            prefix=config.prefix,
            log=self.log,
            once=self.once,
            on_trouble=self._publish_again,
        )
        self._encrypting = Encrypting(
            config, client, self.keys, self.once, disk=disk, register=self._report_stage, keep=self.cache.flush,
            stage=lambda: self.session.stage, put_stage=self.session.put_stage,
            listening=device.listening, refused=self._refused, nudge=self._nudge, rng=self._rng,
        )  # fmt: skip

    # -- life -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Join the mesh and follow it until SIGTERM or SIGINT, then hand over leadership and leave. Raises, in a
        group, Reload at SIGHUP (on a terminal that stops it), and StoppedAtOnce at a second signal to stop."""
        # Nothing waits for it: a boot goes on while etcd is away, and the status line says what the agent waits for.
        notify("READY=1", "STATUS=joining the mesh")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._handle_signals)
            nursery.start_soon(self._flush_log)
            async with trio.open_nursery() as members:
                members.start_soon(self._watchdog)
                joined = await self._until_stopped(self._join, members)
                if joined:
                    await self._stopping.wait()
                notify("STOPPING=1")
                self._leaving = True
                if joined:
                    await self._hand_over()
                # Cleaning up removes things from the kernel: no task may take that for drift and restore them.
                members.cancel_scope.cancel()
            await self._leave()
            nursery.cancel_scope.cancel()

    async def _flush_log(self) -> None:
        try:
            while True:
                await trio.sleep(FLUSH_SECONDS)
                write_due()
        finally:
            write_rest()

    async def _handle_signals(self) -> None:
        received = trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        with received as signals:
            async with trio.open_nursery() as nursery:
                async for number in signals:
                    # At a terminal it means that the terminal was closed.
                    if number == signal.SIGHUP and not (sys.stdin and sys.stdin.isatty()):
                        if not self._stopping.is_set() and not self._reloads:
                            self._reloads = True
                            nursery.start_soon(self._try_reload)
                        continue
                    if self._stopping.is_set():
                        raise StoppedAtOnce(
                            f"stopped at once: {signal.Signals(number).name} was received a second time"
                        )
                    self.log.info("stopping", signal=signal.Signals(number).name)
                    self._stopping.set()

    async def _try_reload(self) -> None:
        """Raise Reload if the code that is installed now runs, and go on with the present code if it does not."""
        self.log.info("reloading")
        notify_reloading()
        reason = await try_installed(etcd_answers=(answers := await self._etcd_answers()))
        if reason is not None and answers and not await self._etcd_answers():
            # It went away meanwhile, which says nothing of the code.
            reason = await try_installed(etcd_answers=False)
        self._reloads = False
        if self._stopping.is_set():
            return
        if reason is None:
            await self.session.renew()
            raise Reload
        self.not_reloaded = (
            "the code that is installed now does not run, so the agent goes on with the old one: "
            f"{reason}; once that is mended: systemctl reload kilo-etcd"
        )
        self.log.error(self.not_reloaded)
        self._publish_again()
        notify("READY=1", f"STATUS={self.not_reloaded}")

    async def _etcd_answers(self) -> bool:
        """Whether etcd can be read now, and is followed."""
        if not self.mirror.connected or self.mirror.untrusted_reason is not None:
            return False
        with suppress(etcd.EtcdError):
            await self.client.get(self.keys.adopted)
            return True
        return False

    async def _until_stopped(self, work: Callable[[trio.Nursery], Awaitable[None]], nursery: trio.Nursery) -> bool:
        """Whether `work` came to its end before the agent was asked to stop."""
        finished = False
        async with trio.open_nursery() as inner:

            async def give_up() -> None:
                await self._stopping.wait()
                inner.cancel_scope.cancel()

            inner.start_soon(give_up)
            await work(nursery)
            finished = True
            inner.cancel_scope.cancel()
        return finished

    async def _join(self, nursery: trio.Nursery) -> None:
        """Become a member: addresses, mesh settings, registration; then start what keeps it so.

        A host that could not do its part is never registered: others would send it packets. One that etcd does not let
        join forwards meanwhile by what it knows (`_forward_unjoined`).
        """
        await self.kernel.check()
        self._on_disk = await self.cache.read()
        patience = float("inf")
        if self._on_disk is not None:
            self.mirror = Mirror(self.client, self.keys, last_seen=self._on_disk.last_seen())
            patience = trio.current_time() + ETCD_PATIENCE_SECONDS
        settings = await self._insist(nursery, self._settings_of_a_followed_etcd, patience=patience)
        subnets = settings.subnets
        self._take_subnets(subnets)
        self._restorer.joined(settings)
        renumber = self.config.renumber
        await self._follow_etcd(nursery)
        await self._insist(nursery, lambda: self.mirror.wait_first())
        moved = await self._insist(nursery, self.namesakes.take_over)
        addresses = await self._insist(
            nursery, lambda: self.session.claim_addresses(subnets, renumber=renumber, doubted=moved)
        )
        self.log.info("address claimed", addresses=",".join(map(str, addresses)), granularity=str(settings.granularity))
        # Where the last agent was with the switch to `encrypted`, the kernel still is, or is to be again.
        self.registration.report = await self._insist(nursery, self._reported)
        if self.registration.epoch is not None and (self._made_device or not await self._has_device()):
            self.registration.epoch += 1
        # Not before: etcd may have kept us waiting, and the network may have come meanwhile.
        record = await self.registration.look()
        await self._insist(nursery, lambda: self.session.register(record))
        await nursery.start(self.session.run)
        self._joined = True
        if not self._reconciling:
            self._keep_programmed(nursery)
        else:
            self.log.info("etcd is back: this host has joined again, and follows the mesh")
            self._nudge()
            if self.mirror.current is not None:
                # A snapshot without this host was not put in force before.
                self._take(self.mirror.current)
        self._on_disk = None
        for task in (
            self._restorer.run,
            self._follow_candidacy,
            self._reporter.run,
            self._wireguard_monitor.run,
            self._follow_obstacles,
            self._follow_clock,
            self._encrypting.run,
        ):
            nursery.start_soon(task)
        if self.config.probe:
            nursery.start_soon(self._prober.run)

    def _keep_programmed(self, nursery: trio.Nursery) -> None:
        """Start what brings snapshots to the kernel and keeps them there; nothing of it writes to etcd, but for answers
        to `kgctl`."""
        self._reconciling = True
        for task in (
            self._follow_snapshots,
            self._follow_handshake_order,
            self._follow_suspicion,
            self._exit_node_monitor.run,
            self._reconciler.run,
            self._serve_diagnostics,
            self.cache.run,
            self._follow_state_directory,
        ):
            nursery.start_soon(task)
        if self._peer_query is not None and self._post is not None:
            nursery.start_soon(self._run_peer_query, self._peer_query, self._post)
        if self._reachability is not None:
            nursery.start_soon(self._reachability.run)
        if self._dns_hosts is not None:
            nursery.start_soon(self._dns_hosts.run)

    async def _run_peer_query(self, peer_query: PeerQuery, transport: DatagramTransport) -> None:
        """Run the peer query, as long as this host has etcd or others have."""
        while True:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(transport.run)
                    self.once.clear("peer query", "peer queries work again")
                    self._note_answers(True)
                    await peer_query.run()
            except* OSError as group:
                lone: BaseException = group
                while isinstance(lone, BaseExceptionGroup):
                    lone = lone.exceptions[0]
                self.once.warning("peer query", "peer queries do not work while etcd is away",
                                  error=str(lone))  # fmt: skip
                self._note_answers(False)
                await trio.sleep(TRANSPORT_RETRY_SECONDS)

    def _note_answers(self, answers: bool) -> None:
        if answers != self.answers:
            self.answers = answers
            self._publish_again()

    async def _follow_etcd(self, nursery: trio.Nursery) -> None:
        """Start what follows etcd, unless it runs already."""
        if not self._follows_etcd:
            self._follows_etcd = True
            await nursery.start(self.resolver.run)
            await nursery.start(self.mirror.run)
            nursery.start_soon(self._follow_etcd_endpoints)
            if self.config.endpoints_from_cluster:
                nursery.start_soon(self._etcd_members.run)

    async def _forward_unjoined(self, nursery: trio.Nursery, failure: etcd.EtcdError | RecordError | None) -> bool:
        """Forward although etcd does not let this host join (None: it has not answered in time): by what etcd holds,
        as soon as it can be read and has this host, and until then by the cached snapshot on disk. Nothing is written
        to etcd. Whether there is either."""
        if self._reconciling:
            return True
        cached = None
        if (on_disk := self._on_disk) is not None:
            self._on_disk = None
            cached = await self.cache.remember(on_disk, fits=self._fits)
        if cached is None and (failure is None or type(failure) is etcd.Unavailable or not await self._is_on_record()):
            return False
        await self._follow_etcd(nursery)
        # What cannot be read of the host now keeps no cached snapshot from being in force.
        await self.registration.look_again(register=False)
        if cached is not None:
            snapshot = cached.snapshot
            self.log.warning(
                f"{_kind(failure)}: the cached snapshot is in force",
                revision=snapshot.revision, age=self.cache.age(cached), nodes=len(snapshot.nodes),
            )  # fmt: skip
            self._take_subnets(snapshot.subnets)
            self.cached = cached
            self.snapshot = snapshot
            self._nudge()
        self._keep_programmed(nursery)
        return True

    async def _settings_of_a_followed_etcd(self) -> MeshSettings:
        """The mesh's settings, once etcd is known to be the one that is followed. EtcdError."""
        if self._follows_etcd:
            await self.mirror.wait_newer(None)
            self.mirror.check()
        elif not await self.mirror.verify_cluster():
            self.mirror.check()
        return await self._settings()

    async def _settings(self) -> MeshSettings:
        config = self.config
        desired = MeshSettings(
            config.mesh_granularity or Granularity.LOCATION, config.subnets, config.internal_ips or InternalIPs.ROUTED
        )
        settings = await self.session.ensure_mesh(desired)
        if config.renumber:
            return settings
        return settings._replace(subnets=await self.session.subnets_in_force(settings.subnets))

    async def _own_record(self) -> NodeRecord | None:
        """This host's record in etcd; None: there is none with its key. EtcdError."""
        kv = await self.client.get(self.keys.node(self.name))
        try:
            record = None if kv is None else decode_node(kv.value)
        except RecordError:
            return None
        return record if record is not None and record.public_key == self.public_key else None

    async def _is_on_record(self) -> bool:
        """Whether etcd can be read, and has this host's record."""
        try:
            return await self._own_record() is not None
        except etcd.EtcdError:
            return False

    async def _reported(self) -> StageReport:
        """The stage of the switch to `encrypted` in this host's record in etcd, whose former names and epochs
        are taken in too."""
        record = await self._own_record()
        if record is None:
            return StageReport()
        self.registration.epoch = record.handshake_epoch or 0
        self.registration.clock_epoch = max(record.clock_epoch or 0, self.registration.clock_epoch or 0) or None
        self.namesakes.recall(record.former_names)
        return StageReport(stage=record.encryption, accepts_since=record.accepts_since or 0)

    async def _has_device(self) -> bool:
        """Whether the host has its WireGuard device already, or that cannot be read."""
        try:
            observed = await self.kernel.observe()
        except (OSError, kernel.KernelError):
            return True
        # One that is not ours leaves this host without a device, and its agent without a start.
        return observed.link is not None

    async def _report_stage(self, report: StageReport) -> bool:
        self.registration.report = report
        await self.registration.look_again(register=True)
        record = self.registration.record
        registered = record is not None and (record.encryption, record.accepts_since or 0) == (
            report.stage,
            report.accepts_since,
        )
        if registered:
            self.log.info("encryption stage reported", stage=report.stage or "none")
        return registered

    def _fits(self, snapshot: Snapshot) -> str | None:
        return too_small_for(self.config.mtu, snapshot.subnets)

    def _take_subnets(self, subnets: tuple[IPNetwork, ...]) -> None:
        if reason := too_small_for(self.config.mtu, subnets):
            raise Fatal(reason)
        self.subnets = self.registration.subnets = subnets

    async def _insist(
        self, nursery: trio.Nursery, call: Callable[[], Awaitable[T]], *, patience: float = float("-inf")
    ) -> T:
        """The result of an etcd call that is tried until etcd answers it and lets this host do it. If it does neither,
        the host forwards by what it knows; that etcd does not answer counts from `patience` on, on trio's clock.

        Fatal: there is nothing that it could go by, and waiting does not cure what etcd says; or the name or the mesh
        address of this host is another's.
        """
        delay = 0.2
        while True:
            failure: etcd.EtcdError | RecordError | None = None
            try:
                with trio.move_on_at(patience if patience > trio.current_time() else float("inf")):
                    result = await call()
                    self.once.clear("etcd", "etcd is back")
                    self._waiting = self._unjoined = None
                    return result
            except (etcd.EtcdError, RecordError) as error:
                failure = error
            except REFUSALS as error:
                raise Fatal(str(error)) from error
            self._unjoined = failure
            self._note_unjoined(failure)
            waits = isinstance(failure, etcd.Unavailable | ClusterNotTrusted | None)
            away = failure is None or type(failure) is etcd.Unavailable
            forwards = (away and trio.current_time() < patience) or await self._forward_unjoined(nursery, failure)
            if not forwards and not waits:
                raise Fatal(str(failure)) from failure
            self.metrics.error("etcd")
            await trio.sleep(delay * self._rng.uniform(0.5, 1.0))
            delay = min(delay * 1.6, 3.0)

    def _note_unjoined(self, failure: etcd.EtcdError | RecordError | None) -> None:
        if failure is None or isinstance(failure, ClusterNotTrusted):
            return  # The mirror logs it.
        self.once.error("etcd", _kind(failure), error=str(failure))
        self._waiting = f"waiting for etcd: {_kind(failure)}: {failure}"
        if not self._reconciling:
            notify(f"STATUS=waiting for etcd: {failure}")

    async def _leave(self) -> None:
        """Take away what is only a live agent's; with `--clean-up` everything."""
        error: etcd.EtcdError | str = "it did not answer in time"
        removed = False
        with trio.move_on_after(RESIGN_SECONDS):
            try:
                if self.config.clean_up:
                    await self.session.forget()
                else:
                    await self.session.resign()
                removed = True
            except etcd.EtcdError as refusal:
                error = refusal
        if not removed:
            self.log.warning("the records in etcd could not be removed; their leases end by themselves",
                             error=str(error))  # fmt: skip
        if self.config.clean_up:
            changes = await kernel.cleanup(self.config.interface, public_key=self.public_key)
            if self._dns_hosts is not None:
                await self._dns_hosts.remove()
            try:
                await self.cache.forget()
                await self._encrypting.forget()
                await self._etcd_members.forget()
            except OSError as failure:
                self.log.warning("the cached snapshot could not be removed from disk", error=str(failure))
            self.log.info("cleaned up", changes=len(changes))
        else:
            await self.cache.flush()
        self.log.info("stopped", kernel_state="removed" if self.config.clean_up else "left in place")

    async def _hand_over(self) -> None:
        """Let the successor lead before we go: candidacy away, its plan applied here, then seen applied elsewhere."""
        if self.session.candidacy is None or self.topology is None or self.role is None:
            return
        if self.name not in self.topology.snapshot.nodes:
            return  # Its record or its address was taken away, and is on its way back.
        segment = self.topology.segment_of(self.name)
        led = segment.leader.name == self.name and segment.next_in_line is not None
        written = False
        with trio.move_on_after(HANDOVER_SECONDS):
            try:
                succeeded = candidacy_policy.succeeded(
                    self.topology, self.name, self.session.candidacy.location, leaves=True
                )
                written = await self.session.leave(succeeded=succeeded)
                if not led or not written:
                    return
                while self.role.leader == self.name:
                    await self._applied.wait()
                revision = self.applied_revision
                while not candidacy_policy.confirmed(  # noqa: ASYNC110 - what is waited for happens on other hosts
                    {node: status.revision for node, status in (await statuses(self.client, self.keys)).items()},
                    revision,
                    self.name,
                ):
                    await trio.sleep(CONFIRM_POLL_SECONDS)
            except etcd.EtcdError as error:
                self.log.warning("leadership was not handed over", error=str(error))
                return
            self.log.info("leadership handed over", location=segment.location, leader=self.role.leader)
            return
        if led and written:
            self.log.warning("not every host has confirmed the new leader in time; stopping anyway",
                             location=segment.location)  # fmt: skip
        elif led:
            self.log.warning("leadership was not handed over, since etcd does not answer; the lease ends by itself",
                             location=segment.location)  # fmt: skip

    # -- what wakes the reconciler --------------------------------------------------------------------------

    async def _follow_snapshots(self) -> None:
        snapshot: Snapshot | None = None
        while True:
            with trio.move_on_at(self._adoption.until):
                snapshot = await self.mirror.wait_newer(snapshot)
            if snapshot is not None:
                self._take(snapshot)

    def _take(self, snapshot: Snapshot) -> None:
        """Put etcd's newest snapshot in force, unless what is in force is better for now."""
        missing = self._adoption.missing(self.mirror.generation, self.topology, snapshot, trio.current_time())
        self.once.errors("adoption", (WAITS_FOR_OTHERS,) if missing else (), level="info")
        if missing:
            if self._joined:
                self._restorer.follow(snapshot)
            return
        if not self._joined:
            own = snapshot.nodes.get(self.name)
            if own is None or own.public_key != self.public_key:
                return  # Until this host is a member again.
            if not self.subnets:
                self._take_subnets(snapshot.subnets)
        self.snapshot = snapshot
        if self._joined:
            self.cached = None
        self._nudge()

    async def _follow_suspicion(self) -> None:
        """Have the status say when etcd is not trusted or cannot be read, and when it is followed again: the plan stays
        what it was."""
        outage: str | None = None
        while True:
            outage = await self.mirror.wait_outage_change(outage)
            if self.snapshot is not None and self.topology is not None:
                self._publish(self.snapshot)

    async def _follow_handshake_order(self) -> None:
        while True:
            await self.applier.wait_due()
            # Read anew: an endpoint that was learnt meanwhile stays as it is.
            self._nudge(fresh=True)

    def _reset_session(self, keys: Collection[str]) -> None:
        self.applier.reset_session(keys)
        self._nudge(fresh=True)

    def _renew(self, keys: Collection[str]) -> None:
        self.applier.renew(keys)
        self._nudge(fresh=True)

    async def _look_again(self) -> None:
        """Find the host's addresses again, and register what has changed."""
        await self.registration.look_again(register=self._joined)

    async def _serve_diagnostics(self) -> None:
        """Answer, and begin anew in another etcd: there a watch would wait for a revision that is far away."""
        trust = self.mirror.trust
        while True:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answerer.run)
                trust = await self.mirror.wait_trust_change(trust)
                nursery.cancel_scope.cancel()

    async def _watchdog(self) -> None:
        """Have the reconciler tell systemd that it is alive. Before it runs, etcd may keep the agent waiting."""
        interval = watchdog_interval()
        while interval is not None:
            if self._reconciling:
                self._reconciler.beat(_watchdog_beat)
            else:
                _watchdog_beat()
            await trio.sleep(interval / 2)

    # -- the one that acts ----------------------------------------------------------------------------------

    async def _apply_newest(self, fresh: bool) -> None:
        if self.snapshot is not None:
            await self._apply(self.snapshot, fresh)

    async def _apply(self, snapshot: Snapshot, fresh: bool) -> None:
        self._report_snapshot(snapshot)
        if self._joined:
            self._restorer.follow(snapshot)
        self.topology = build_topology(snapshot, self.topology)
        if self._peer_query is not None:
            self._peer_query.follow(self.topology)
            if (hints := followed(self.topology, self.leader_hints)) is not snapshot:
                self.topology = build_topology(hints, self.topology)
        own = snapshot.nodes.get(self.name)
        if own is not None and own.public_key != self.public_key:
            # The same: it has the record of an earlier run with another key, or what another writer has put.
            return
        topology = self.topology
        try:
            surroundings = await self._surroundings(topology)
            self.plans = host_plans(topology, self.name, surroundings, self.plans)
        except UnknownNode:
            record = self.mirror.kv(self.keys.node(self.name))
            if record is None or record.mod_revision > snapshot.revision:
                # The snapshot is older than the registration; the one that has it is on its way.
                return
            twin = await self._living_twin(snapshot)
            silenced = await self._silence(twin) if twin else ""
            self.failures = (self._why_unknown(snapshot) + self.namesakes.refusal + silenced,)
            self.once.error("unknown", self.failures[0], revision=snapshot.revision)
            self.metrics.not_programmed(self.failures[0])
            self._publish(snapshot)
            notify(f"STATUS={self.failures[0]}")
            return
        self.once.clear("unknown", "this host is among the mesh's nodes again")
        plan = self.plans.final
        self.resolver.set_names(plan_names(self.plans.raw))
        standby = candidacy_policy.is_standby(candidacy_policy.role_of(topology, self.name), plan)
        before = self.kernel.writes
        report = await self._reconciler.program(
            lambda: self.applier.apply(plan, topology, standby=standby, fresh=fresh)
        )  # fmt: skip
        if isinstance(report, str):
            self._programmed = self._ready = False
            self.failures = (report,)
            self.metrics.reconciled(trouble=report, writes=self.kernel.writes - before)
            self._publish(snapshot)
            return
        self._note_internal_ips(topology)
        self.once.errors("forced addresses", self._missing_addresses())
        self.plan = plan
        self.applied_revision = snapshot.revision
        for change in report.changes:
            self.log.debug("changed", command=str(change))
        self.failures = (
            *(str(failure) for failure in report.failures),
            *(problem.text for problem in plan.problems),
        )
        self.once.errors("plan", self.failures, revision=snapshot.revision)
        self.once.errors("notes", report.notes, level="warning", revision=snapshot.revision)
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
        self._made_device |= any(
            isinstance(change, CreateLink | StartUserspace) and change.name == self.config.interface
            for change in report.changes
        )
        self._refused_families = refused_families(report.failures, snapshot.subnets)
        missing = (failure.destination for failure in report.failures if not failure.aside)
        self._ready = candidacy_policy.able_to_lead(missing, snapshot.subnets)
        self._candidacy.follow(topology)
        self._note_role(snapshot)
        self._publish(snapshot)
        self._wireguard_monitor.follow(snapshot, plan, tunnels=not standby)
        self._exit_node_monitor.follow(plan)
        if self._dns_hosts is not None:
            self._dns_hosts.follow(topology, self.plans.filtered, fresh=fresh)
        self._encrypting.follow(topology, plan, whole=not report.failures)
        self._prober.follow(topology)
        if self.cached is None or snapshot is not self.cached.snapshot:
            self.cache.note(snapshot, self._holdings)
        applied, self._applied = self._applied, trio.Event()
        applied.set()

    async def _surroundings(self, topology: Topology) -> Surroundings:
        """What this host knows, for its plan. UnknownNode: it is not in the mesh."""
        topology.segment_of(self.name)
        silent = await self._never_answered(topology)
        encryption = await self._encryption_inputs(topology, silent)
        networks = self._etcd_networks()
        # Before the first connection it is not known which of them serves.
        needed = (self._served_by,) if self._served_by else self.config.etcd.endpoints or self.client.endpoints
        surroundings = self.registration.facts.surroundings(
            networks, self.resolver.table, self.resolver.failed, self.resolver.unresolved(needed)
        )
        return evolve(surroundings, silent=silent, encryption=encryption)

    async def _never_answered(self, topology: Topology) -> tuple[Silent, ...]:
        """The members of the location that have never answered. UnknownNode."""
        reachability = self._reachability
        if reachability is None:
            return ()
        if not reachability.ready:
            try:
                reachability.start(await self.kernel.observe())
            except (OSError, kernel.KernelError):
                reachability.start(Observed())  # If that lasts, `apply` says so.
        silent = reachability.follow(topology)
        self.metrics.unreachable.set(len({member.target.node for member in silent if member.named}))
        return silent

    async def _encryption_inputs(self, topology: Topology, silent: tuple[Silent, ...]) -> EncryptionInputs | None:
        self._encrypting.withdraw()
        if not self._encrypting.concerns(topology):
            return None
        await self._encrypting.prepare(topology, etcd_away=not self._joined)
        self.resolver.networks(self._encrypting.etcd_urls, purpose="encryption")
        leader, facts = topology.segment_of(self.name).leader.name, self.registration.facts
        return self._encrypting.inputs(
            topology, sources=facts.sources(), addresses=facts.own_addresses(),
            table=self.resolver.table,
            silent=frozenset(
                member.target.address for member in silent if member.withheld and member.target.node == leader
            ),
        )  # fmt: skip

    async def _refused(self) -> frozenset[IPAddress]:
        """The addresses whose packets in clear this host's kernel refuses; none if it cannot be read."""
        try:
            return refused_sources((await self.kernel.observe()).table)
        except (OSError, kernel.KernelError):
            return frozenset()

    def _holdings(self) -> Holdings | None:
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
        silent = HostPlan(node=self.name, listen_port=self.config.port, routes=routes, unreachable_routes=self.subnets)
        try:
            await self.applier.silence(silent)
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
        claims = {self.keys.address(self.name, address) for address in self.session.addresses}
        reasons = "; ".join(note.reason for note in snapshot.rejected if note.key == key or note.key in claims)
        return f"this host is not among the mesh's nodes: {reasons or f'see the rejected records of {self.name}'}"

    def _etcd_networks(self) -> tuple[IPNetwork, ...]:
        return self.resolver.networks(self._etcd_endpoints())

    def _etcd_endpoints(self) -> tuple[str, ...]:
        """Those that are known, and the one of the connection in use or of the last one, which may not be among them
        any more."""
        self._served_by = self.client.endpoint or self._served_by
        served_by = (self._served_by,) if self._served_by else ()
        return tuple(dict.fromkeys((*known_endpoints(self.config.etcd.endpoints, self.client), *served_by)))

    async def _follow_etcd_endpoints(self) -> None:
        """What is discovered, or by the member list, bypasses the exit node too."""
        seen = self.client.endpoints
        while True:
            seen = await self.client.wait_endpoints(seen)
            self._nudge()

    def _etcd_is_followed(self) -> bool:
        return self.mirror.connected and self.mirror.untrusted_reason is None

    def _report_snapshot(self, snapshot: Snapshot) -> None:
        self.once.errors("rejected", snapshot.rejected, noun="rejected records", revision=snapshot.revision)
        self.disagreements = disagreements(
            snapshot,
            granularity=self.config.mesh_granularity,
            subnets=self.config.wanted_subnets,
            internal_ips=self.config.internal_ips,
        )
        self.once.errors("settings", self.disagreements)
        self.once.errors("names", self.namesakes.look())
        self.metrics.snapshot(snapshot)

    def _note_internal_ips(self, topology: Topology) -> None:
        before, self._internal_ips = self._internal_ips, candidacy_policy.InternalIPsState.of(topology)
        if (news := self._internal_ips.news(before)) is not None:
            event, fields = news
            self.log.info(event, revision=topology.snapshot.revision, **fields)

    def _note_role(self, snapshot: Snapshot) -> None:
        assert self.topology is not None
        role = candidacy_policy.role_of(self.topology, self.name)
        if role == self.role:
            return
        self.role = role
        self.log = self._reconciler.log = get_logger().bind(node=self.name, location=role.location)
        if role.kind is Role.ALONE:
            self.log.info("this host is a segment of its own", revision=snapshot.revision)
        else:
            demoted = self.topology.segment_of(self.name).election.demoted
            self.log.info(
                "leader elected", leader=role.leader, role=role.kind, demoted=demoted,
                revision=snapshot.revision,
            )  # fmt: skip
        self.metrics.leads(role.kind is Role.LEADER)

    def _note_traversal_failures(self, sentences: tuple[str, ...]) -> None:
        self.traversal_failures = sentences
        self.once.errors("traversal", sentences, level="warning")
        self._publish_again()

    def _note_unanswered(self, unanswered: UnansweredPeers) -> None:
        self.unanswered = unanswered
        # A phone that sleeps is nothing to warn of.
        for kind, names, level in (("node", unanswered.nodes, "warning"), ("peer", unanswered.peers, "info")):
            self.metrics.unanswered.labels(kind).set(len(names))
            self.once.errors(
                f"unanswered {kind}",
                tuple(f"{kind} {name} does not answer, although WireGuard sends to it" for name in names),
                level=level,
            )
        self._publish_again()

    async def _follow_state_directory(self) -> None:
        """See to it that the state directory has what the next start needs, and say if it has not."""
        while True:
            found = await self.cache.look()
            if found.restored:
                self.log.warning(
                    "the private key was gone from the state directory, and was written there again; to have a new one "
                    "made, stop the agent, remove it, and start the agent"
                )
            self.metrics.state_directory.set(found.trouble is None)
            if found.trouble != self.state_trouble:
                self.state_trouble = found.trouble
                # That a snapshot cannot be written the cache logs itself.
                own = None if found.trouble == self.cache.trouble else found.trouble
                self.once.errors("state directory", () if own is None else (own,), level="warning")
                self._publish_again()
            await trio.sleep(PERIOD_SECONDS)

    async def _follow_clock(self) -> None:
        """Have the others forget this host's handshakes when its clock went back, and say so while it matters."""
        while True:
            await self._clock_news.wait()
            self._clock_news = trio.Event()
            while True:
                now = trio.current_time()
                if (epoch := self._set_back.epoch(self.registration.clock_epoch, now=now)) is not None:
                    self.registration.clock_epoch = epoch
                    await self.registration.look_again(register=True)
                # Of outside peers silence says little: they sleep.
                sentence = self._set_back.sentence(unanswered=self.unanswered, now=now)
                if sentence != self.clock_set_back:
                    self.clock_set_back = sentence
                    self.once.errors("clock", () if sentence is None else (sentence,))
                    self._publish_again()
                if self._clock_news.is_set() or not self._set_back.matters(now=now):
                    break
                with trio.move_on_after(CLOCK_PERIOD):
                    await self._clock_news.wait()

    def _note_event(self, event: str) -> None:
        if event == "lease lost":
            self._nudge()
        elif event == "contested":
            self.once.errors("contested", () if self.session.contested is None else (self.session.contested,))
            self._publish_again()

    def _note_no_baseline(self, sentence: str | None) -> None:
        self.no_baseline = sentence
        self.once.errors("no baseline", () if sentence is None else (sentence,), level="warning")
        self._publish_again()

    async def _follow_obstacles(self) -> None:
        """Say what on this host drops what it forwards, for as long as it forwards or was demoted for it; and when that
        is gone, have a host that was demoted stand as before."""
        obstructed: tuple[str, ...] = ()
        cut: tuple[Obstacle, ...] = ()
        while True:
            applied, plan = self._applied, self._in_force()
            self._look_for_obstacles = trio.Event()
            forwards = plan.plan is not None and bool(plan.plan.forwarding)
            # A plan that does not forward says nothing about what drops packets: what was found stays.
            if forwards:
                with suppress(OSError, kernel.KernelError):
                    found = [obstacle for obstacle in await self.kernel.obstacles() if obstacle.certain]
                    cut = tuple(obstacle for obstacle in found if obstacle.networks)
                    dropping = tuple(obstacle.text for obstacle in found if not obstacle.networks)
                    if obstructed and not dropping:
                        # The reason for the demotion is gone.
                        self._candidacy.release()
                        self._prober.try_again()
                        self._nudge()
                    obstructed = dropping
            # The demoted leader's operator has to know what to mend, although others forward now.
            concerned = plan.sends or self._candidacy.demoted_until is not None
            in_force = obstructed if forwards and concerned else ()
            networks = tuple(one.text for one in cut if forwards and (concerned or not one.leading))
            if (in_force, networks) != (self.obstructed, self.cut_networks):
                self.obstructed, self.cut_networks = in_force, networks
                self.once.errors("forwarding", in_force)
                self.once.errors("dropped networks", networks)
                self._publish_again()
            await trio.sleep(OBSTACLES_PAUSE)
            with trio.move_on_after(OBSTACLES_PERIOD):
                await wait_any(applied, self._look_for_obstacles)

    def _note_exit_node(self, sentence: str | None) -> None:
        self.beyond = sentence and (
            f"{sentence}, so nothing leaves this host but for {BYPASSES}: is it up, does UDP reach "
            f"it? else kgctl annotate {self.name} exit-node=ANOTHER, or exit-node-"
        )
        self.once.errors("exit node", () if self.beyond is None else (self.beyond,), level="warning")
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
            errors=self._current_errors(),
            programmed=self._programmed,
            address=self.registration.address,
            unreachable=self._unreachable(),
            unsigned=() if self._reachability is None else self._reachability.unsigned[:MOST_LISTED],
            unanswered=self.unanswered.nodes[:MOST_LISTED],
            unanswered_peers=self.unanswered.peers[:MOST_LISTED],
            answers=self.answers,
            peer_query_port=self._peer_query_port,
            clear=self._clear,
            without_etcd=self.mirror.untrusted_reason or self._bridged() or self.mirror.trouble or "",
        )
        self._reporter.publish(snapshot, state, leaving=self._leaving)

    def _unreachable(self) -> tuple[Unreachable, ...]:
        silent = () if self._reachability is None else self._reachability.silent
        named = (
            Unreachable(member.target.node, str(member.target.address), not member.withheld)
            for member in silent
            if member.named
        )
        return tuple(sorted(named))[:MOST_LISTED]

    def _etcd_away(self) -> bool:
        return not self.mirror.connected or self.session.lapsed

    def _note_leader_hints(self, hints: LeaderHints) -> None:
        self.leader_hints = hints
        if hints.leaders:
            self.log.warning("etcd is out of reach; following the leaders that other nodes report",
                             revision=hints.revision, leaders=sorted(set(hints.leaders.values())))  # fmt: skip
        else:
            self.log.info("following etcd again, no longer leader hints")
        self._nudge()

    def _in_force(self) -> AppliedPlan:
        sends = (
            self.role is not None and self.plan is not None and not candidacy_policy.is_standby(self.role, self.plan)
        )
        undecided = () if self._reachability is None else self._reachability.undecided[:MOST_LISTED]
        return AppliedPlan(
            plan=self.applier.programmed,
            revision=self.applied_revision,
            topology=self.topology,
            sends=sends,
            undecided=undecided,
        )

    def _is_alone(self) -> bool:
        """Whether this host is in the mesh, and the only one of its location."""
        topology = self.topology
        if topology is None or self.name not in topology.snapshot.nodes:
            return False
        return len(topology.segment_of(self.name).members) == 1

    def _current_errors(self) -> tuple[str, ...]:
        """All that is wrong with this host, as sentences."""
        # A host that is alone in its location leads nobody, so its demotion changes nothing.
        why = None if self._is_alone() else self._candidacy.why
        behind = why and f"{WAS_DEMOTED} {why}; {DEMOTED}"
        # Without failures to write to etcd: whoever reads this status in etcd finds them over.
        further = (
            self.beyond,
            self._encrypting.trouble,
            self.no_baseline,
            self._restorer.renumbered,
            self._restorer.trouble,
            self.session.contested,
            self.mirror.untrusted_reason or self._bridged(),
            behind,
            self._candidacy.not_standing,
            self.metrics.listen_trouble,
            self.not_reloaded,
            self.clock_set_back,
            self.state_trouble,
            self._dns_hosts and self._dns_hosts.trouble,
        )
        errors = (
            *self.disagreements,
            *self.failures,
            *self.namesakes.errors,
            *self.obstructed,
            *self.cut_networks,
            *self.traversal_failures,
            *self.registration.overlaps,
            *self.registration.etcd_inside,
            *self._missing_addresses(),
        )
        return (*errors, *(text for text in further if text))

    def _missing_addresses(self) -> tuple[str, ...]:
        """Sentences on internal IPs that the operator has given this host, and that it does not have."""
        annotation = self.keys.annotation(self.name, "force-internal-ip")
        if self.topology is None or self.mirror.kv(annotation) is None:
            return ()
        facts = self.registration.facts
        return missing_addresses(self.topology, self.name, facts.own_addresses(), facts.underlay())

    def _etcd_trouble(self) -> str | None:
        """Why etcd is not followed or does not hold what this host has to say, with etcd's own error and what to do."""
        if (held := self.mirror.untrusted_reason or self._bridged()) is not None:
            return held
        if (trouble := self.mirror.trouble) is not None:
            return f"{trouble}; forwarding goes on by the last plan"
        return self._waiting or self.session.last_error or self.session.contested

    def _own_trouble(self) -> str | None:
        """Why this host does not do its part, or would not after a boot, although etcd is followed and the plan is in
        the kernel."""
        return self._restorer.trouble or next(iter(self.obstructed), None) or self.state_trouble

    def _bridged(self) -> str | None:
        """Why this host forwards without having joined, and by what, as a sentence; None: it has joined."""
        if self._joined or not self._reconciling:
            return None
        failure = self.mirror.failure or self._unjoined
        why = "" if failure is None else f": {failure}"
        if self.cached is None or not self._goes_by_cache():
            return f"{_kind(failure)}, so this host has not joined again; forwarding follows etcd{why}"
        return f"{_kind(failure)}; the cached snapshot is in force (age {self.cache.age(self.cached)}){why}"

    def _goes_by_cache(self) -> bool:
        return self.cached is not None and self.snapshot is self.cached.snapshot

    # -- candidacy ------------------------------------------------------------------------------------------

    async def _sound(self, targets: Collection[IPAddress]) -> bool:
        """Whether the kernel is as the plan in force wants it, read anew, and sends to these mesh addresses by the
        plan's routes. If a rule of another program leads elsewhere, their silence says nothing of a leader. Nor if
        answers go to an internal IP that the host does not have."""
        plan = self.applier.programmed
        if self._missing_addresses():
            return False
        try:
            if plan is None or await self.kernel.preview(plan):
                return False
            observed = await self.kernel.observe()
            routes = await self.kernel.routes_taken(dict.fromkeys(targets))
            return not any(taken_route(address, None, answer, observed).foreign for address, answer in routes.items())
        except (OSError, kernel.KernelError):
            return False  # A host that cannot check itself reports no other.

    async def _forwards(self) -> bool:
        """Whether nothing is known on this host that drops all that it would forward in the family that probers try."""
        own = self.topology.snapshot.nodes.get(self.name) if self.topology is not None else None
        tried = {address.version for address in own.mesh_addresses[:1]} if own is not None else set()
        try:
            return not any(obstacle.certain and tried & obstacle.blocked for obstacle in await self.kernel.obstacles())
        except (OSError, kernel.KernelError):
            return True

    def _check_takeover(self, keys: Collection[str]) -> None:
        self.applier.check_takeover(keys)
        self._nudge()

    async def _follow_candidacy(self) -> None:
        """Hold the candidacy that `decide.stand` says, deciding again after each apply and when a wait is over."""
        while True:
            applied = self._applied
            due = None
            if self.snapshot is not None and self.topology is not None and not self._leaving:
                ready = self._ready and self.applied_revision >= self.snapshot.revision
                leads = self.role is not None and self.role.kind is Role.LEADER
                # Leaders are to be first in an etcd that was adopted.
                if leads or not self._adoption.waits:
                    due = await self._candidacy.update(
                        self.snapshot, self.topology, leads=leads, ready=ready, refused=self._refused_families
                    )
            with trio.move_on_at(due if due is not None else float("inf")):
                await applied.wait()
