"""The agent: one nursery in which small tasks turn snapshots into kernel state and the host's state into records.

Data flows one way: mirror -> topology -> plan -> kernel -> status. Every task is a loop around one wait; they meet
in the `Reconciler`, whose one task has a snapshot applied (`agent.snapshot_applier`).

Here the parts are put together, each with what it needs of others, and here is their order: which tasks run when
(`agent.lifecycle`), and what the end is. What the parts do is theirs.

What it promises: a snapshot is never applied after a newer one; a failing part (a record, an endpoint's name, a route)
is reported and harms only itself; when etcd is away the kernel keeps what it has; stopping leaves it forwarding unless
the operator asked for `--clean-up`.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from kilo_etcd import kernel
from kilo_etcd.agent.apply import PlanApplier
from kilo_etcd.agent.cachefile import CachedSnapshot, Identity
from kilo_etcd.agent.candidacy_follower import follow_candidacy
from kilo_etcd.agent.clock_watch import ClockWatch
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.diagnostics import AppliedPlan, DiagnosticsServer
from kilo_etcd.agent.dnshosts import DnsHosts, WriteNames
from kilo_etcd.agent.encrypting import Encrypting
from kilo_etcd.agent.etcd_endpoints import EtcdEndpoints
from kilo_etcd.agent.etcd_members import EtcdMembers
from kilo_etcd.agent.etcd_trouble import EtcdTrouble
from kilo_etcd.agent.host_state import HostState
from kilo_etcd.agent.instrumented import instrumented
from kilo_etcd.agent.joining import Joining
from kilo_etcd.agent.leader_hints.peer_query import DatagramTransport
from kilo_etcd.agent.leader_hints.service import PeerQueryService
from kilo_etcd.agent.leadership.candidacy import CandidacyTask
from kilo_etcd.agent.leaving import Leaving
from kilo_etcd.agent.lifecycle import Lifecycle, Phase
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.namesakes import Namesakes
from kilo_etcd.agent.nat.wireguard_monitor import WireGuardMonitor
from kilo_etcd.agent.notify import notify, watchdog
from kilo_etcd.agent.obstacle_watch import ObstacleWatch
from kilo_etcd.agent.peer_resets import PeerResets
from kilo_etcd.agent.plan_inputs import PlanInputs
from kilo_etcd.agent.probing.prober import Prober
from kilo_etcd.agent.probing.reachability import Reachability
from kilo_etcd.agent.probing.self_check import SelfCheck
from kilo_etcd.agent.registration import HostRegistration
from kilo_etcd.agent.reload import Reloader
from kilo_etcd.agent.restore import Restorer
from kilo_etcd.agent.signals import follow_signals, until_set
from kilo_etcd.agent.snapshot_applier import AppliedSnapshot, SnapshotApplier
from kilo_etcd.agent.snapshot_cache import Disk, SnapshotCache
from kilo_etcd.agent.snapshot_follower import SnapshotFollower
from kilo_etcd.agent.state_directory_watch import watch_state_directory
from kilo_etcd.agent.status import StatusReporter
from kilo_etcd.agent.status_publisher import MOST_LISTED, StatusPublisher, demotion, exit_node_failure
from kilo_etcd.agent.troubles import HostTrouble, Troubles
from kilo_etcd.agent.unknown_host import UnknownHost
from kilo_etcd.etcd import api as etcd
from kilo_etcd.kernel.firewall.cleartext import refused_sources
from kilo_etcd.model import IPAddress, Snapshot
from kilo_etcd.planning.encryption import StageReport
from kilo_etcd.runtime.exit_node_monitor import ExitNodeMonitor
from kilo_etcd.runtime.logs import Logger, Once, get_logger, write_due, write_rest
from kilo_etcd.runtime.reconciler import Reconciler
from kilo_etcd.runtime.resolve import Resolver
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.session.session import Session
from kilo_etcd.topology.forced_addresses import missing_addresses

FLUSH_SECONDS = 5.0
"""Between two looks at what of the log was left out."""

Task = Callable[[], Awaitable[object]]


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
        self.config, self.kernel, self.name, self.public_key = config, device, config.hostname, public_key
        client = instrumented(client, metrics.etcd_writes.inc, metrics.etcd_answered)
        keys = Keys(config.prefix)
        self.lifecycle = Lifecycle()
        self._stopping = trio.Event()
        name, rng, log = self.name, random.Random(), get_logger().bind(node=self.name)
        once = Once(log)

        # -- etcd -------------------------------------------------------------------------------------------
        self.mirror = mirror = Mirror(client, keys)
        self.session = session = Session(
            client,
            keys,
            name,
            public_key,
            lease_ttl=int(config.lease_ttl),
            forget_after=int(config.forget_after),
            ephemeral=config.ephemeral,
            on_event=self._note_event,
            guard=mirror,
        )
        resolver = Resolver()
        endpoints = EtcdEndpoints(config, client, resolver)
        etcd_members = EtcdMembers(
            config, client, log, once, disk=disk, trusted=lambda: mirror.followed, rng=rng
        )  # fmt: skip
        namesakes = Namesakes(session, keys, name, public_key, once, mirror=mirror)
        self.registration = registration = HostRegistration(
            config, public_key, session, log, once,
            endpoints=endpoints.known, etcd=endpoints.networks, former=namesakes.former,
        )  # fmt: skip
        cache = SnapshotCache(disk, Identity(prefix=config.prefix, node=name, public_key=public_key), once)
        restorer = Restorer(
            session, keys, name, once, mirror=mirror, rng=rng, on_news=lambda: status.publish_again()
        )  # fmt: skip

        # -- the reconciler and joining ----------------------------------------------------------------------
        self._reconciler = Reconciler(
            self._apply_newest,
            device,
            resolver,
            look=lambda: registration.look_again(register=self.lifecycle.joined),
            resync_period=config.resync_period,
            log=log,
            once=once,
        )
        nudge = self._reconciler.nudge
        self._joining = Joining(
            config, client, device, public_key,
            keys=keys, session=session, mirror=mirror, cache=cache, namesakes=namesakes, registration=registration,
            once=once, log=self._log, metrics=metrics, rng=rng, lifecycle=lambda: self.lifecycle,
            follow_etcd=self._follow_etcd, forward=self._forward, on_settings=restorer.joined,
            made_device=lambda: self._snapshot_applier.made_device,
        )  # fmt: skip
        self.snapshots = snapshots = SnapshotFollower(
            name, public_key, mirror, once,
            lifecycle=lambda: self.lifecycle, topology=lambda: self.state.topology, on_hold=restorer.follow,
            on_subnets=self._joining.use_first_subnets, nudge=nudge,
        )  # fmt: skip

        def missing() -> tuple[str, ...]:
            """Sentences on internal IPs that the operator has given this host, and that it does not have."""
            topology, facts = self.state.topology, registration.facts
            if topology is None or mirror.kv(keys.annotation(name, "force-internal-ip")) is None:
                return ()
            return missing_addresses(topology, name, facts.own_addresses(), facts.underlay())

        # -- what is wrong ----------------------------------------------------------------------------------
        self.etcd_trouble = EtcdTrouble(
            mirror, session, self._joining, snapshots, cache, lifecycle=lambda: self.lifecycle
        )  # fmt: skip
        dns_hosts = (
            None
            if write_names is None
            else DnsHosts(
                write_names,
                enabled=config.dns_hosts,
                prefix=config.prefix,
                log=log,
                once=once,
                on_trouble=lambda: status.publish_again(),
            )
        )
        self._candidacy = candidacy = CandidacyTask(session, name)
        self.troubles = troubles = Troubles(
            once,
            {
                HostTrouble.PLAN: lambda: self.state.failures,
                HostTrouble.NAMES: lambda: namesakes.errors,
                HostTrouble.OVERLAPS: lambda: registration.overlaps,
                HostTrouble.ETCD_INSIDE: lambda: registration.etcd_inside,
                HostTrouble.FORCED_ADDRESSES: missing,
                HostTrouble.ENCRYPTION: lambda: encrypting.trouble,
                # Without failures to write to etcd: whoever reads this status in etcd finds them over.
                HostTrouble.RENUMBERED: lambda: restorer.renumbered,
                HostTrouble.CLAIM: lambda: restorer.trouble,
                HostTrouble.CONTESTED: lambda: session.contested,
                HostTrouble.ETCD: self.etcd_trouble.not_followed,
                # A host that is alone in its location leads nobody, so its demotion changes nothing.
                HostTrouble.DEMOTED: lambda: demotion(None if self.state.is_alone(name) else candidacy.why),
                HostTrouble.NOT_STANDING: lambda: candidacy.not_standing,
                HostTrouble.LISTEN: lambda: metrics.listen_trouble,
                HostTrouble.HOSTS_FILE: lambda: None if dns_hosts is None else dns_hosts.trouble,
            },
            on_change=lambda: status.publish_again(),
        )
        # Asked for at each scrape, so that nothing has to poll.
        metrics.untrusted_when(self.etcd_trouble.sentence)
        metrics.untrusted_when(self._own_trouble)
        metrics.etcd_connected.set_function(lambda: float(mirror.followed))
        metrics.cached_mesh.set_function(lambda: float(snapshots.goes_by_cache))

        # -- from a snapshot to the kernel ------------------------------------------------------------------
        self.applier = applier = PlanApplier(device)
        self.peer_queries = PeerQueryService(
            name, transport if config.probe else None, secret, once,
            log=self._log, etcd_away=self.etcd_away, sources=lambda: registration.facts.sources(), nudge=nudge,
            on_change=lambda: status.publish_again(),
        )  # fmt: skip
        self.reachability = reachability = None
        peer_query = self.peer_queries.peer_query
        if config.probe:
            self.reachability = reachability = Reachability(
                device, name, ask=None if peer_query is None else peer_query.ask_local, on_change=nudge,
                programmed=lambda: applier.programmed,
            )  # fmt: skip
            if peer_query is not None:
                peer_query.reachability = reachability
        encrypting = Encrypting(
            config, client, keys, once, disk=disk, register=self._report_stage, keep=cache.flush,
            stage=lambda: session.stage, put_stage=session.put_stage,
            listening=device.listening, refused=partial(_refused, device), nudge=nudge, rng=rng,
        )  # fmt: skip
        status = StatusPublisher(
            config, StatusReporter(session, public_key, config.mesh_granularity), troubles, once, metrics,
            etcd_trouble=self.etcd_trouble, registration=registration, namesakes=namesakes, reachability=reachability,
            peer_queries=self.peer_queries, snapshot=lambda: snapshots.snapshot, state=lambda: self.state,
            leaving=lambda: self.lifecycle.leaving,
        )  # fmt: skip

        def on_snapshot(snapshot: Snapshot) -> None:
            status.note_snapshot(snapshot)
            if self.lifecycle.joined:
                restorer.follow(snapshot)

        def on_applied(applied: AppliedSnapshot) -> None:
            plan, topology = applied.plans.final, applied.topology
            wireguard_monitor.follow(applied.snapshot, plan, tunnels=not applied.standby)
            exit_node.follow(plan)
            if dns_hosts is not None:
                dns_hosts.follow(topology, applied.plans.filtered, fresh=applied.fresh)
            encrypting.follow(topology, plan, whole=applied.whole)
            prober.follow(topology)
            if not snapshots.goes_by(applied.snapshot):
                cache.note(applied.snapshot, mirror.holdings)

        self._snapshot_applier = snapshot_applier = SnapshotApplier(
            name, config.interface, public_key, device, applier, self._reconciler,
            inputs=PlanInputs(
                name, device, registration=registration, endpoints=endpoints, resolver=resolver,
                reachability=reachability, encrypting=encrypting, metrics=metrics,
                etcd_away=lambda: not self.lifecycle.joined,
            ),
            unknown_host=UnknownHost(
                config, client, keys, public_key,
                mirror=mirror, session=session, registration=registration, namesakes=namesakes, applier=applier,
            ),
            peer_queries=self.peer_queries, candidacy=candidacy, resolver=resolver, once=once, metrics=metrics,
            missing_addresses=missing, on_snapshot=on_snapshot, publish=status.publish,
            on_applied=on_applied,
        )  # fmt: skip

        # -- what looks at the host and at others -----------------------------------------------------------
        resets = PeerResets(applier, self._reconciler)

        def forward_again() -> None:
            # Nothing keeps this host from forwarding any more, so it may lead again.
            candidacy.release()
            prober.try_again()
            nudge()

        obstacles = ObstacleWatch(
            device,
            in_force=self.in_force,
            applied=lambda: snapshot_applier.applied,
            demoted=lambda: candidacy.demoted_until is not None,
            on_cleared=forward_again,
            note=lambda forwarding, networks: troubles.note(
                {HostTrouble.FORWARDING: forwarding, HostTrouble.DROPPED_NETWORKS: networks}
            ),
        )
        self.diagnostics = DiagnosticsServer(
            client, keys, name, device, self.in_force, once, untrusted=lambda: mirror.untrusted_reason,
            asked=obstacles.look,
        )  # fmt: skip
        self_check = SelfCheck(
            device, name, programmed=lambda: applier.programmed, topology=lambda: self.state.topology,
            missing_addresses=missing,
        )  # fmt: skip
        prober = Prober(
            device, session, name, once,
            sound=self_check.sound, forwards=self_check.forwards, check_takeover=resets.check_takeover,
            look_again=lambda: nudge(fresh=True),
            on_no_baseline=lambda sentence: troubles.note({HostTrouble.NO_BASELINE: sentence}),
            examined=lambda: self.diagnostics.sends_many,
        )  # fmt: skip
        clock = ClockWatch(
            registration,
            unanswered=lambda: status.unanswered,
            note=lambda sentence: troubles.note({HostTrouble.CLOCK: sentence}),
        )
        self.wireguard_monitor = wireguard_monitor = WireGuardMonitor(
            device,
            session,
            name,
            on_traversal_failures=lambda sentences: troubles.note({HostTrouble.TRAVERSAL: sentences}),
            on_unanswered=status.note_unanswered,
            set_back=clock.set_back,
            on_set_back=clock.wake,
            reset_session=resets.reset_session,
            renew=resets.renew,
        )
        exit_node = ExitNodeMonitor(
            device, lambda sentence: troubles.note({HostTrouble.EXIT_NODE: exit_node_failure(name, sentence)})
        )
        self.reloader = Reloader(
            client, keys, mirror, session, stopping=self._stopping, log=self._log,
            note=lambda sentence: troubles.note({HostTrouble.RELOAD: sentence}),
        )  # fmt: skip

        def note_state_directory(trouble: str | None) -> None:
            # That a snapshot cannot be written the cache logs itself.
            troubles.keep(HostTrouble.STATE_DIRECTORY, trouble, logged=cache.trouble)
            status.publish_again()

        # -- which tasks run when, and what is left to the end ------------------------------------------------
        self._tasks: dict[Phase, tuple[Task | None, ...]] = {
            Phase.FOLLOWING: (
                partial(endpoints.follow, nudge),
                etcd_members.run if config.endpoints_from_cluster else None,
            ),
            # Nothing of it writes to etcd, but for answers to `kgctl`.
            Phase.FORWARDING: (
                snapshots.run,
                resets.follow_handshake_order,
                partial(status.follow_outages, mirror),
                exit_node.run,
                self._reconciler.run,
                partial(self.diagnostics.follow, mirror),
                cache.run,
                partial(
                    watch_state_directory, cache, self._log,
                    usable=metrics.state_directory.set, note=note_state_directory,
                ),
                None if peer_query is None else self.peer_queries.run,
                None if reachability is None else reachability.run,
                None if dns_hosts is None else dns_hosts.run,
            ),
            Phase.JOINED: (
                restorer.run,
                partial(
                    follow_candidacy, candidacy, snapshots, snapshot_applier, leaving=lambda: self.lifecycle.leaving
                ),
                status.run,
                wireguard_monitor.run,
                obstacles.run,
                clock.run,
                encrypting.run,
                prober.run if config.probe else None,
            ),
        }  # fmt: skip
        self._resolver = resolver
        self._leaving = Leaving(
            session, client, keys, name, public_key, self._log,
            state=lambda: self.state, applied=lambda: snapshot_applier.applied, keep=cache.flush,
            forget=(cache.forget, encrypting.forget, etcd_members.forget),
            remove_names=None if dns_hosts is None else dns_hosts.remove,
        )  # fmt: skip

    @property
    def state(self) -> HostState:
        """The newest plan of this host, and how much of it is in force."""
        return self._snapshot_applier.state

    def _log(self) -> Logger:
        return self._reconciler.log

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
                members.start_soon(watchdog, self._beat)
                joined = await until_set(self._stopping, partial(self._join, members))
                if joined:
                    await self._stopping.wait()
                notify("STOPPING=1")
                self.lifecycle = self.lifecycle.leave()
                if joined:
                    await self._leaving.hand_over()
                # Cleaning up removes things from the kernel: no task may take that for drift and restore them.
                members.cancel_scope.cancel()
            await self._leaving.leave(
                self.config.interface, ephemeral=self.config.ephemeral, cleans_up=self.config.clean_up
            )
            nursery.cancel_scope.cancel()

    async def _handle_signals(self) -> None:
        await follow_signals(self._stopping, self._log, reload=self.reloader.reload)

    async def _flush_log(self) -> None:
        try:
            while True:
                await trio.sleep(FLUSH_SECONDS)
                write_due()
        finally:
            write_rest()

    def _beat(self, alive: Callable[[], None]) -> None:
        """Have the reconciler tell systemd that it is alive. Before it runs, etcd may keep the agent waiting."""
        if self.lifecycle.reconciles:
            self._reconciler.beat(alive)
        else:
            alive()

    async def _join(self, nursery: trio.Nursery) -> None:
        """Become a member of the mesh, and start what keeps it so."""
        await self._joining.join(nursery)
        await nursery.start(self.session.run)
        forwards = self.lifecycle.reconciles
        self.lifecycle = self.lifecycle.to(Phase.JOINED)
        if not forwards:
            self._start(nursery, Phase.FORWARDING)
        else:
            self._log().info("etcd is back: this host has joined again, and follows the mesh")
            self.snapshots.joined()
        self._joining.joined()
        self._start(nursery, Phase.JOINED)

    async def _follow_etcd(self, nursery: trio.Nursery) -> None:
        """Start what follows etcd, unless it runs already."""
        if not self.lifecycle.follows_etcd:
            self.lifecycle = self.lifecycle.to(Phase.FOLLOWING)
            await nursery.start(self._resolver.run)
            await nursery.start(self.mirror.run)
            self._start(nursery, Phase.FOLLOWING)

    def _forward(self, nursery: trio.Nursery, cached: CachedSnapshot | None) -> None:
        """Forward by what is known, without having joined."""
        if cached is not None:
            self.snapshots.begin_with(cached)
        self.lifecycle = self.lifecycle.to(Phase.FORWARDING)
        self._start(nursery, Phase.FORWARDING)

    def _start(self, nursery: trio.Nursery, phase: Phase) -> None:
        for task in self._tasks[phase]:
            if task is not None:
                nursery.start_soon(task)

    # -- what the reconciler calls --------------------------------------------------------------------------

    async def _apply_newest(self, fresh: bool) -> None:
        if self.snapshots.snapshot is not None:
            await self._apply(self.snapshots.snapshot, fresh)

    async def _apply(self, snapshot: Snapshot, fresh: bool) -> None:
        await self._snapshot_applier.apply(snapshot, fresh)

    def _note_event(self, event: str) -> None:
        if event == "lease lost":
            self._reconciler.nudge()
        elif event == "contested":
            self.troubles.look(HostTrouble.CONTESTED)

    # -- what this host is ----------------------------------------------------------------------------------

    def in_force(self) -> AppliedPlan:
        """What is in the kernel now."""
        undecided = () if self.reachability is None else self.reachability.undecided[:MOST_LISTED]
        return AppliedPlan(
            plan=self.applier.programmed,
            revision=self.state.revision,
            topology=self.state.topology,
            sends=self.state.sends,
            undecided=undecided,
        )

    def etcd_away(self) -> bool:
        """Whether etcd is out of this host's reach."""
        return not self.mirror.connected or self.session.lapsed

    def _own_trouble(self) -> str | None:
        """Why this host does not do its part, or would not after a boot, although etcd is followed and the plan is in
        the kernel."""
        whys = (HostTrouble.CLAIM, HostTrouble.FORWARDING, HostTrouble.STATE_DIRECTORY)
        return next((sentence for why in whys for sentence in self.troubles.of(why)), None)

    async def _report_stage(self, report: StageReport) -> bool:
        registered = await self.registration.report_stage(report)
        if registered:
            self._log().info("encryption stage reported", stage=report.stage or "none")
        return registered


async def _refused(device: kernel.Kernel) -> frozenset[IPAddress]:
    """The addresses whose packets in clear this host's kernel refuses; none if it cannot be read."""
    try:
        return refused_sources((await device.observe()).table)
    except (OSError, kernel.KernelError):
        return frozenset()
