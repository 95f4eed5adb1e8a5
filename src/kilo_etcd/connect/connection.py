"""This machine as a peer while `kgctl connect` runs: one nursery, as in the agent, of which this is a small relative.

The `Reconciler` is the agent's: its one task calls `_apply_newest`, and nothing else changes the kernel. When
etcd is away the kernel keeps what it has. At the end everything that was made here goes, unless the caller wants it
kept: interface with its routes, block of the hosts file, record.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio
from attrs import frozen

from kilo_etcd import kernel
from kilo_etcd.base.descriptors import OutOfDescriptors
from kilo_etcd.connect.registration import KEEPALIVE, LEASE_SECONDS, DesiredPeer, PeerRegistration
from kilo_etcd.ctl.commands.wait import applied
from kilo_etcd.ctl.context import Failure
from kilo_etcd.etcd import api as etcd
from kilo_etcd.model import IPAddress, IPInterface, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.exit_node import BYPASSES_OF_A_PEER
from kilo_etcd.planning.names import plan_names
from kilo_etcd.planning.pipeline import PeerOptions, peer_plans
from kilo_etcd.runtime import connections
from kilo_etcd.runtime.exit_node_monitor import ExitNodeMonitor
from kilo_etcd.runtime.handshakes import moved, trigger_handshakes
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.runtime.hostnames import known_names
from kilo_etcd.runtime.logs import Once, get_logger
from kilo_etcd.runtime.parsing import shown_duration
from kilo_etcd.runtime.reconciler import Reconciler
from kilo_etcd.runtime.resolve import LOOKUP_TIMEOUT, Resolver, known_endpoints
from kilo_etcd.runtime.set_back import SetBack
from kilo_etcd.runtime.unanswered_peers import PeerAccounts
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.topology.segments import Topology, build_topology

KNOWN_SECONDS = 2.0
"""How long to wait for all agents to know this machine's key: a first handshake that nobody answers costs five."""

WITHDRAW_SECONDS = 3.0
ETCD_RETRY_SECONDS = 2.0

ACTIVITY_SECONDS = 5.0
"""Seconds between two readings of what WireGuard sends and receives."""

Names = dict[str, tuple[IPAddress, ...]]


@frozen(kw_only=True)
class Settings:
    """What the caller asks for besides the record."""

    interface: str
    listen_port: int
    endpoints: tuple[str, ...]
    """etcd's."""
    dns_hosts: bool = False
    exit_node: str | None = None
    """The node by which everything leaves that is for outside the mesh."""
    resync_period: float = 30.0


@frozen(kw_only=True)
class Edges:
    """What else of the machine is touched."""

    look: Callable[[], Awaitable[HostFacts]]
    write_names: Callable[[Names | None], Awaitable[bool]]
    """Whether anything had to be changed. OSError."""
    clean_up: Callable[[], Awaitable[tuple[kernel.Change, ...]]]


def peer_options(topology: Topology, desired: DesiredPeer, settings: Settings, facts: HostFacts) -> PeerOptions:
    """What the machine chooses for itself. KeyError: no such peer is in force."""
    keepalive = desired.persistent_keepalive
    if keepalive is None:
        keepalive = topology.peers[desired.name].persistent_keepalive or KEEPALIVE
    return PeerOptions(
        listen_port=settings.listen_port,
        persistent_keepalive=keepalive,
        exit_node=settings.exit_node,
        links=facts.reached(()).stated(),
    )


class PeerConnection:
    """`run()` returns when the command was asked to end and has cleaned up. Failure, KernelError, EtcdError."""

    def __init__(
        self,
        desired: DesiredPeer,
        settings: Settings,
        client: etcd.Client,
        prefix: str,
        device: kernel.Kernel,
        edges: Edges,
    ) -> None:
        self.desired = desired
        self.settings = settings
        self.kernel = device
        self.edges = edges
        self.client = client
        self.prefix = prefix
        self.keys = Keys(prefix)
        self.mirror = Mirror(client, self.keys)
        self.resolver = Resolver()
        self.facts = HostFacts()
        self.log = get_logger()
        self.once = Once(self.log)
        self._reconciler = Reconciler(
            self._apply_newest, device, self.resolver,
            look=self._look, resync_period=settings.resync_period, log=self.log, once=self.once,
        )  # fmt: skip
        self._nudge = self._reconciler.nudge
        self.registration = PeerRegistration(client, self.keys, desired, self._nudge)
        self.exit_node_monitor = ExitNodeMonitor(device, self._note_exit_node)
        self.topology: Topology | None = None
        self.plan: HostPlan | None = None
        self._followed: Snapshot | None = None
        """The last snapshot in which this machine's record stood."""
        self._reset: set[str] = set()
        """The public keys of the peers to make anew with the next plan."""
        self._logged_summary: tuple[tuple[IPInterface, ...], tuple[str, ...]] | None = None
        self._stopping = trio.Event()
        self._joined = False

    async def run(self) -> None:
        """Connect, follow, and clean up."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._handle_signals)
            await self.kernel.check()
            try:
                async with trio.open_nursery() as members:
                    members.start_soon(self._until_stopped, members.cancel_scope)
                    await self._join(members)
            finally:
                with trio.CancelScope(shield=True):
                    await self._leave()
            nursery.cancel_scope.cancel()

    async def _handle_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                if self._stopping.is_set():
                    raise Failure(f"stopped at once: {signal.Signals(number).name} was received a second time")
                self.log.info("disconnecting", signal=signal.Signals(number).name)
                self._stopping.set()

    async def _until_stopped(self, scope: trio.CancelScope) -> None:
        await self._stopping.wait()
        scope.cancel()

    async def _join(self, nursery: trio.Nursery) -> None:
        self.facts = await self.edges.look()
        await nursery.start(self.resolver.run)
        if self.settings.exit_node is not None:
            await self._find_etcd()
        decision = await self.registration.register()
        self._joined = True
        connections.change(self.settings.interface, joined=True)
        nursery.start_soon(self.registration.keep)
        self.log.info(
            "registered" if decision.writes else "registered already", peer=self.desired.name,
            addresses=decision.record.allowed_ips, chosen=decision.chosen or None,
        )  # fmt: skip
        await nursery.start(self.mirror.run)
        # New keys take a moment to arrive everywhere. Slow or dead agents are not waited for.
        with suppress(etcd.EtcdError):
            await applied(self.client, self.keys, timeout=KNOWN_SECONDS)
        for task in (
            self._follow_snapshots,
            self._follow_etcd_endpoints,
            self.exit_node_monitor.run,
            self._reconciler.run,
            self._follow_wireguard,
        ):
            nursery.start_soon(task)

    async def _find_etcd(self) -> None:
        """Have etcd's names looked up: its addresses are kept outside the tunnel, which takes all else. Failure."""
        # The names of endpoints that do not serve need not be known.
        needed = (self.client.endpoint,) if self.client.endpoint else self.settings.endpoints
        self.resolver.networks((*self.settings.endpoints, *needed))
        with trio.move_on_after(LOOKUP_TIMEOUT):
            while self.resolver.unresolved(needed):
                await self.resolver.wait_changed()
        if missing := self.resolver.unresolved(needed):
            raise Failure(
                f"etcd's name {missing[0]} is not resolved within {LOOKUP_TIMEOUT:g} s, so etcd could not "
                "bypass the exit node by its address: mend the name or the resolver, or give --endpoints as addresses"
            )

    def _note_exit_node(self, sentence: str | None) -> None:
        if sentence is None:
            self.once.clear("exit node", "the exit node answers")
            return
        self.once.warning(
            "exit node", f"{sentence}, so nothing leaves this machine but for {BYPASSES_OF_A_PEER}: is it up, "
            "and does UDP reach it? else end this command, or name another exit node",
        )  # fmt: skip

    async def _follow_wireguard(self) -> None:
        """Say which nodes do not answer; and when this machine's clock goes back, have the nodes forget its handshakes,
        which their WireGuard would drop as replays."""
        accounts, set_back, renews = PeerAccounts(), SetBack(), False
        while True:
            await trio.sleep(ACTIVITY_SECONDS)
            if self.plan is None or self.topology is None:
                continue
            try:
                activity = await self.kernel.peer_activity()
            except (OSError, kernel.KernelError):
                continue  # The reconciler will say so.
            unanswered = accounts.look(self.topology.snapshot, self.plan, activity).nodes
            self.once.errors(
                "unanswered",
                tuple(f"node {name} does not answer, although WireGuard sends to it" for name in unanswered),
                level="warning",
            )
            now = trio.current_time()
            set_back.read(activity, now=now)
            # Not each time that it goes back: the sessions are interrupted.
            if set_back.epoch(None, now=now) is not None:
                renews = True
                self.log.warning("this machine's clock went back", by=shown_duration(round(set_back.seconds)))
            follows = self.mirror.connected and self.mirror.untrusted_reason is None
            if renews and (follows or not self.registration.removes):
                with suppress(etcd.EtcdError):
                    renewed, renews = await self.registration.renew(), False
                    await self._begin_anew(self.plan, renewed=renewed)

    async def _begin_anew(self, plan: HostPlan, *, renewed: bool) -> None:
        """The clock has gone back, and the nodes forget this machine's handshakes and sessions if `renewed`."""
        if not renewed:
            self.log.warning(
                "the nodes drop this machine's handshakes as replays until its clock has caught up, since its record "
                "is not under this command's lease; if they are to forget them now, end this command, kgctl peer "
                f"remove {self.desired.name} (and add, if it was added), and connect again"
            )
            return
        self.log.info("the nodes make this machine a new WireGuard peer")
        # They do as soon as they know the new record.
        with suppress(etcd.EtcdError):
            await applied(self.client, self.keys, timeout=KNOWN_SECONDS)
        self._reset |= plan.peers.keys()
        self._nudge(fresh=True)

    # -- what wakes the reconciler ---------------------------------------------------------------------------

    async def _follow_snapshots(self) -> None:
        snapshot: Snapshot | None = None
        while True:
            snapshot = await self.mirror.wait_newer(snapshot)
            self._nudge()

    async def _follow_etcd_endpoints(self) -> None:
        seen = self.client.endpoints
        while True:
            seen = await self.client.wait_endpoints(seen)
            self._nudge()

    async def _look(self) -> None:
        before = self.facts
        try:
            self.facts = await self.edges.look()
        except (OSError, kernel.KernelError, OutOfDescriptors) as error:
            self.once.warning("addresses", "the machine's addresses cannot be read", error=str(error))
            self._nudge(fresh=True)
            return
        self.once.clear("addresses", "the machine's addresses can be read again")
        if self.facts != before:
            # The kernel removes the routes of a network that the machine has left.
            self._nudge(fresh=True)

    # -- the one that acts ----------------------------------------------------------------------------------

    async def _apply_newest(self, fresh: bool) -> None:
        snapshot = self.mirror.current
        if snapshot is not None and await self._still_registered(snapshot):
            self._followed = snapshot
        elif not self.registration.renewing:
            return
        # While the record is being put anew the machine itself goes on: its addresses, names, and what is restored.
        if self._followed is not None:
            await self._apply(self._followed, fresh)

    async def _still_registered(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot is to be followed: the record is this machine's, and stands there. Gone."""
        if self.registration.renewing or snapshot.revision < self.registration.revision:
            return False
        held = self.mirror.kv(self.keys.peer(self.desired.name))
        peer = snapshot.peers.get(self.desired.name)
        sound = held is not None and (peer is None or peer.public_key == self.desired.public_key)
        if self.mirror.untrusted_reason or (sound and not self.registration.unconfirmed):
            # An etcd that went back in time, or is another one, is told nothing.
            return sound
        try:
            if await self.registration.mend(held):
                self.log.warning("the record ended with its lease; registered again", peer=self.desired.name)
        except etcd.EtcdError as error:
            # Without etcd nobody else forgets us either; its return resolves the uncertainty.
            self.once.warning("record", "it is not known whether this machine is still registered", error=str(error))
            await trio.sleep(ETCD_RETRY_SECONDS)
            self._nudge()
            return sound
        self.once.clear("record", "this machine is registered")
        return sound

    async def _apply(self, snapshot: Snapshot, fresh: bool) -> None:
        self.topology = topology = build_topology(snapshot, self.topology)
        if self.desired.name not in topology.peers:
            reasons = [note.reason for note in snapshot.rejected if note.key == self.keys.peer(self.desired.name)]
            self.once.error(
                "peer", f"peer {self.desired.name} is not in force: {'; '.join(reasons) or 'see kgctl status'}"
            )
            return
        self.once.clear("peer", f"peer {self.desired.name} is in force")
        # Discovered ones may be others by now, and the connection may be to one of those before.
        in_use = (self.client.endpoint,) if self.client.endpoint else ()
        endpoints = dict.fromkeys((*known_endpoints(self.settings.endpoints, self.client), *in_use))
        surroundings = self.facts.surroundings(
            self.resolver.networks(endpoints), self.resolver.table, self.resolver.failed
        )  # fmt: skip
        options = peer_options(topology, self.desired, self.settings, self.facts)
        plans = peer_plans(topology, self.desired.name, options, surroundings)
        plan = plans.final
        self.resolver.set_names(plan_names(plans.raw))
        reset = frozenset(self._reset)
        report = await self._reconciler.program(lambda: self.kernel.apply(plan, fresh=fresh, reset=reset))
        if isinstance(report, str):
            return
        self._reset -= reset
        trigger_handshakes(moved(report, self.plan, plan, topology, apart_from=reset))
        trigger_handshakes(
            address
            for peer in plan.peers.values()
            if peer.public_key in reset and (node := topology.snapshot.nodes.get(peer.name)) is not None
            for address in node.mesh_addresses[:1]
        )
        self.plan = plan
        self.exit_node_monitor.follow(plan)
        for change in report.changes:
            self.log.debug("changed", command=str(change))
        self.once.errors(
            "plan", (*map(str, report.failures), *(problem.text for problem in plan.problems)), level="warning"
        )
        # Through the exit node goes everything, so what is of the mesh is told by the plan without it.
        await self._write_names(topology, plans.filtered)
        self._log_summary(plan)

    async def _write_names(self, topology: Topology, plan: HostPlan) -> None:
        if not self.settings.dns_hosts:
            return
        names = known_names(topology, plan, self.prefix)
        if names.left_out:
            short = names.left_out_in_short()
            self.once.error("left out", "not all names of the mesh are written", level="info", names=short)
        else:
            self.once.clear("left out", "all names of the mesh are written")
        try:
            if await self.edges.write_names(dict(names.addresses)):
                self.log.info("names written", names=len(names.addresses))
        except OSError as error:
            self.once.warning("hosts", "the names cannot be written", error=str(error))
        else:
            self.once.clear("hosts", "the names can be written again")

    def _log_summary(self, plan: HostPlan) -> None:
        """One line, where what a person would want to know has changed."""
        leaders = tuple(sorted(peer.name for peer in plan.peers.values()))
        summary = (plan.addresses, leaders)
        if summary != self._logged_summary:
            self.log.info(
                "connected" if self._logged_summary is None else "following",
                interface=self.settings.interface,
                addresses=tuple(address.ip for address in plan.addresses),
                leaders=leaders,
                networks=len(plan.routes),
            )
            self._logged_summary = summary

    # -- the end --------------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        if not self._joined:
            # The record may be there all the same: its answer was not waited for.
            await self._withdraw()
            return
        if not self.desired.clean_up:
            connections.change(self.settings.interface, stays=True)
            self.log.info("ended; everything stays in place", interface=self.settings.interface)
            return
        try:
            changes = await self.edges.clean_up()
        except kernel.KernelError as error:
            self.once.error(
                "device", "the interface cannot be removed", interface=self.settings.interface, error=str(error)
            )
        else:
            self.log.info("interface removed", interface=self.settings.interface, changes=len(changes))
        try:
            if await self.edges.write_names(None):
                self.log.info("names removed")
        except OSError as error:
            self.once.error("hosts", "the names cannot be removed", error=str(error))
        await self._withdraw()

    async def _withdraw(self) -> None:
        if not self.registration.leased:
            return
        reason = "no answer in time"
        with trio.move_on_after(WITHDRAW_SECONDS):
            try:
                await self.registration.withdraw()
            except etcd.EtcdError as error:
                reason = str(error)
            else:
                self.log.info("record removed", peer=self.desired.name)
                return
        self.log.warning(
            "the record could not be removed; it ends by itself",
            peer=self.desired.name,
            seconds=LEASE_SECONDS,
            error=reason,
        )
