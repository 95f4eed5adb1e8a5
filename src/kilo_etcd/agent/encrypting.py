"""The agent's part of `encrypted`: the traffic that bypasses the tunnels as far as this host knows it, and the stages
of the switch.

`planning.encryption` decides what follows from a snapshot. This module supplies its inputs (etcd's addresses and
members, which agents live and what they have applied) and reports its outcome: the host's record has the stage, once
the kernel holds it.

It lists etcd's members while the setting is in force, and keeps them on disk: a member that boots while there is no
quorum must reach the others in clear, else there never is one. If they cannot be listed, the agent reports it, and
on a host that seems to run etcd its usual ports bypass the tunnels for all nodes.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress

import trio
from attrs import define, evolve, field

from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.etcd_listeners import EtcdListeners, Members, etcd_endpoints_at
from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.agent.stage_watch import StageWatch
from kilo_etcd.base.fast_ip import ip_address, ip_network
from kilo_etcd.base.mappings import changes
from kilo_etcd.etcd import api as etcd
from kilo_etcd.model import EncryptionStage, InternalIPs, IPAddress, Node
from kilo_etcd.model.hostplan import Exemption, HostPlan
from kilo_etcd.planning.encryption import Living, Outside, StageReport, awaited, report
from kilo_etcd.planning.names import Table
from kilo_etcd.planning.pipeline import EncryptionInputs
from kilo_etcd.runtime.logs import Once
from kilo_etcd.runtime.resolve import known_endpoints
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import StageRecord
from kilo_etcd.topology.places import own_addresses
from kilo_etcd.topology.segments import Topology

MEMBERS_PERIOD, MEMBERS_RETRY = 60.0, 2.0
"""Seconds between two listings of etcd's members, and the first pause after one that failed; doubled each time."""
ASK_PATIENCE = 2.0
"""Seconds that the first plan under the setting waits for etcd."""
PAUSE_PER_NODE, UNDERWAY_PER_NODE = 0.002, 0.01
"""Seconds per node of the mesh: within so many all of them report on their stages, as all may watch; and after so many
one reports again if others are still on their way to `encrypted`."""
RETRY_SECONDS = 1.0
CLIENT_PORT, PEER_PORT = 2379, 2380
"""Where etcd listens unless it is told otherwise."""


def outside(
    config: AgentConfig,
    members: Members | None,
    sources: tuple[IPAddress, ...],
    table: Table,
    *,
    addresses: frozenset[IPAddress] = frozenset(),
    listening: frozenset[int] = frozenset(),
) -> Outside:
    """What stays outside, given etcd's members (None: not known) and the addresses of DNS names. `sources` are the
    host's own addresses on the underlay, `addresses` all that it has: etcd may listen at one of another VPN.
    `listening` are the TCP ports at which something on the host listens."""
    etcd_members = members or Members()
    own = addresses.union(sources)
    peers = set(_sockets(etcd_members.peer, table))
    clients = {*_sockets(config.etcd.endpoints, table), *_sockets(etcd_members.client, table)}
    # A name without an address, as long as DNS does not answer, may be this host's: others must reach etcd here.
    nameless = {port for host, port in _named(etcd_members.peer) if host not in table}
    peer_ports = {PEER_PORT} if members is None else nameless
    a_member = any(address in own for address, _ in peers) or not listening.isdisjoint(peer_ports)
    local_ports = {port for address, port in (*clients, *peers) if address in own or address.is_loopback}
    local_ports |= nameless | {
        port for host, port in _named((*config.etcd.endpoints, *etcd_members.client)) if host not in table
    }
    if members is None:
        a_member = a_member or bool(local_ports)
        local_ports |= listening & {CLIENT_PORT, PEER_PORT}
    # The addresses that a member has to reach are not known.
    anywhere = tuple(
        Exemption(protocol="tcp", port=port, network=ip_network(network))
        for port in (sorted(peer_ports) if a_member else ())
        for network in ("0.0.0.0/0", "::/0")
    )
    remote_sockets = {*clients, *(peers if a_member else ())}
    return Outside(
        etcd=tuple(sorted(
            ((address, port) for address, port in remote_sockets if address not in own and not address.is_loopback),
            key=lambda pair: (pair[0].version, int(pair[0]), pair[1]),
        )),
        etcd_here=tuple(sorted(local_ports)),
        talk=(config.peer_query_port,),
        sources=sources,
        clear=(*config.clear, *(exemption for exemption in anywhere if exemption not in config.clear)),
        addresses=addresses,
    )  # fmt: skip


def _named(urls: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Those of the hosts that are called by a name, and the port."""
    for _, endpoint in etcd_endpoints_at(urls):
        try:
            ip_address(endpoint.host)
        except ValueError:
            yield endpoint.host, endpoint.port


def _sockets(urls: Iterable[str], table: Table) -> Iterator[tuple[IPAddress, int]]:
    for _, endpoint in etcd_endpoints_at(urls):
        try:
            addresses: tuple[IPAddress, ...] = (ip_address(endpoint.host),)
        except ValueError:
            addresses = table.get(endpoint.host, ())
        for address in addresses:
            if not address.is_unspecified:
                yield address, endpoint.port


def concerns(topology: Topology, name: str) -> bool:
    """Whether the setting is in force, or the host is on its way back from it."""
    node = topology.snapshot.nodes.get(name)
    on = topology.internal_ips is InternalIPs.ENCRYPTED
    return on or (node is not None and node.encryption is not None)


@define
class SwitchProgress:
    """How far the nodes are with the switch, in proportion to what has changed since the last look."""

    newest: int = 0
    """The newest revision from which on a node takes packets from the tunnels."""
    underway: set[str] = field(factory=set)
    """The nodes that do not send through the tunnels yet."""
    _nodes: Mapping[str, Node] = field(factory=dict)
    """Those of which both are."""

    def look(self, nodes: Mapping[str, Node]) -> None:
        """These are the mesh's nodes now."""
        for name in changes(self._nodes, nodes):
            node = nodes.get(name)
            self.newest = max(self.newest, 0 if node is None else node.accepts_since)
            if node is None or node.encryption is EncryptionStage.SENDS:
                self.underway.discard(name)
            else:
                self.underway.add(name)
        self._nodes = nodes


class Encrypting:
    """The `encrypted` setting in one agent. `run` is its task, for an agent that is registered; `register` puts a
    report into the host's record, and returns whether it is there; `keep` writes the snapshot in force to disk, for a
    boot without etcd. `stage` is what stands at the host's key of its stage, and `put_stage` has it say something else.
    `listening` gives the TCP ports at which something here listens, and `refused` the addresses whose clear text the
    kernel refuses."""

    def __init__(
        self,
        config: AgentConfig,
        client: etcd.Client,
        keys: Keys,
        once: Once,
        *,
        disk: Disk | None,
        register: Callable[[StageReport], Awaitable[bool]],
        keep: Callable[[], Awaitable[object]],
        stage: Callable[[], StageRecord | None],
        put_stage: Callable[[StageRecord | None], Awaitable[object]],
        listening: Callable[[], Awaitable[frozenset[int]]],
        refused: Callable[[], Awaitable[frozenset[IPAddress]]],
        nudge: Callable[[], None],
        rng: random.Random | None = None,
    ) -> None:
        self._config, self._client, self._name = config, client, config.hostname
        self._register, self._keep, self._nudge = register, keep, nudge
        self._stage, self._put_stage, self._refused = stage, put_stage, refused
        self._listeners = EtcdListeners(client, once, disk=disk, listening=listening)
        self._rng = rng or random.Random()
        self._stage_watch = StageWatch(client, keys, once, nudge, self._rng)
        self._away: bool | None = None
        """Whether etcd was away when this was prepared; None: it was not yet."""
        self._topology: Topology | None = None
        self._wanted_stage: StageRecord | None = None
        self._progress = SwitchProgress()
        self._pending_report: StageReport | None = None
        self._reported_stage: StageReport | None = None
        self._left: StageReport | None = None
        """The last report, and the one in the record before, as long as the snapshot has nothing newer."""
        self._changed = trio.Event()
        self._cluster: int | None = None
        """The etcd that `living` is about."""
        self._on: bool | None = None
        """Whether the setting was in force in the last plan; None: there was none."""

    @property
    def living(self) -> Living:
        """What is known of other agents."""
        return self._stage_watch.living

    @property
    def trouble(self) -> str | None:
        """Why etcd's members are not known, and what follows; None: they are, or are not asked for."""
        return self._listeners.trouble

    async def forget(self) -> None:
        """Remove from disk what is kept of etcd's members. OSError."""
        await self._listeners.forget()

    @property
    def etcd_urls(self) -> tuple[str, ...]:
        """Where etcd's members listen, for their names to be looked up."""
        return self._listeners.urls

    async def prepare(self, topology: Topology, *, etcd_away: bool) -> None:
        """Before the first plan under the setting: learn what `encrypt` needs of etcd and of other nodes. An agent that
        starts goes on from where the last one was, so that nothing leaves in clear meanwhile. Once more when etcd is
        back, if it was away."""
        if self._away in (False, etcd_away):
            return
        first, self._away = self._away is None, etcd_away
        await self._listeners.look_at_ports()
        if first:
            await self._listeners.recall()
        if etcd_away:
            # Nothing can be learnt of other nodes: each is treated as its record says.
            self._stage_watch.take_as_gone(topology.snapshot.nodes)
            return
        self._stage_watch.forget()
        with trio.move_on_after(ASK_PATIENCE), suppress(etcd.EtcdError):
            await self._listeners.ask()
            await self._stage_watch.ask(topology.snapshot.nodes, topology.snapshot.cluster_id)
        if topology.internal_ips is InternalIPs.ENCRYPTED:
            # This host goes on refusing the nodes that it refused before its agent's restart, even if etcd has not told
            # of them in time. The kernel of another whose agent is away may send in clear, as it did when that agent
            # ended.
            refused, nodes = await self._refused(), topology.snapshot.nodes.values()
            self._stage_watch.take_as_gone(
                node.name for node in nodes if not refused.isdisjoint(own_addresses(node))
            )  # fmt: skip

    def withdraw(self) -> None:
        """Another plan than the last is about to be applied, so a report that followed from the last one,
        and is not published yet, may not be true any more."""
        self._pending_report = None

    def concerns(self, topology: Topology) -> bool:
        """Whether the setting is in force here, or the host on its way back from it."""
        return self._reported_stage is not None or concerns(topology, self._name)

    def inputs(
        self,
        topology: Topology,
        *,
        sources: tuple[IPAddress, ...],
        addresses: frozenset[IPAddress],
        table: Table,
        silent: frozenset[IPAddress] = frozenset(),
    ) -> EncryptionInputs:
        """What the plan of a topology needs. `sources` are the host's own addresses on the underlay, `addresses` all
        that it has; `table` those of DNS names; `silent` those of its leader at which that never answered."""
        cluster, on = topology.snapshot.cluster_id, topology.internal_ips is InternalIPs.ENCRYPTED
        if self._cluster not in (None, cluster) or self._on not in (None, on):
            # The revisions that were applied of another etcd mean nothing for this one. And a node that did not live at
            # the last look, and was not waited for, may live by the time of the next switch, and refuse clear text.
            self._stage_watch.forget()
        if self._cluster not in (None, cluster):
            self._progress = SwitchProgress()
            self._wanted_stage = self._wanted_stage and StageRecord()
        self._cluster, self._on = cluster, on
        etcd_now = evolve(
            self._config.etcd, endpoints=known_endpoints(self._config.etcd.endpoints, self._client)
        )  # fmt: skip
        around = outside(
            evolve(self._config, etcd=etcd_now), self._listeners.members, sources, table,
            addresses=addresses, listening=self._listeners.ports,
        )  # fmt: skip
        return EncryptionInputs(
            outside=evolve(around, silent=silent), living=self.living, stage_report=self._reported_stage
        )

    def follow(self, topology: Topology, plan: HostPlan, *, whole: bool) -> None:
        """The kernel holds `plan`; `whole`: all of it."""
        shown = StageReport.of(topology.snapshot.nodes[self._name])
        if shown != self._left:
            self._reported_stage = self._left = None
        if self._reported_stage is None:
            own_report = report(topology, plan)
            self._pending_report = own_report if whole and own_report != shown else None
        self._topology, self._wanted_stage = topology, self._stage_for(topology)
        snapshot = topology.snapshot
        self._stage_watch.follow(awaited(plan), nodes=len(snapshot.nodes), cluster=snapshot.cluster_id)
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def run(self) -> None:
        """Report, and look at others, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report)
            nursery.start_soon(self._stage_watch.run)
            nursery.start_soon(self._confirm)
            nursery.start_soon(self._follow_members)

    async def _report(self) -> None:
        while True:
            stage_report, topology, changed = self._pending_report, self._topology, self._changed
            if stage_report is not None and topology is not None:
                self._reported_stage, self._left, self._pending_report = (
                    stage_report,
                    StageReport.of(topology.snapshot.nodes[self._name]),
                    None,
                )
                # A host that boots without etcd uses the cached snapshot, which must not be from before the switch.
                await self._keep()
                while not await self._register(stage_report):  # noqa: ASYNC110 - etcd does not say when it is back
                    await trio.sleep(RETRY_SECONDS)
                continue
            await changed.wait()

    async def _confirm(self) -> None:
        """Report what the kernel holds, when others may wait for it. As long as some are on their way, one report would
        follow the other, and all nodes may watch: in a switch of the whole mesh most report twice."""
        again = float("-inf")
        while True:
            desired_stage, changed, topology = self._wanted_stage, self._changed, self._topology
            if topology is None or desired_stage == self._stage():
                await changed.wait()
                continue
            nodes = len(topology.snapshot.nodes)
            if desired_stage is not None and self._progress.underway and trio.current_time() < again:
                with trio.move_on_at(again):
                    await changed.wait()
                continue
            if self._stage() is not None:
                await trio.sleep(self._rng.uniform(0, nodes * PAUSE_PER_NODE))
            await self._put_stage(self._wanted_stage)  # The session goes on trying if it fails.
            again = trio.current_time() + nodes * UNDERWAY_PER_NODE

    def _stage_for(self, topology: Topology) -> StageRecord | None:
        """What the host must report of the switch, now that its kernel holds the plan of a topology."""
        snapshot = topology.snapshot
        if not self.concerns(topology):
            return None
        self._progress.look(snapshot.nodes)
        # On the way back it counts which nodes live, and not what they have applied.
        since = snapshot.internal_ips_since if topology.internal_ips is InternalIPs.ENCRYPTED else 0
        newest, record = max(self._progress.newest, since), self._wanted_stage or self._stage()
        enough = record is not None and newest <= record.revision <= snapshot.revision
        return record if enough else StageRecord(revision=snapshot.revision)

    async def _follow_members(self) -> None:
        pause = MEMBERS_RETRY
        while True:
            changed, topology = self._changed, self._topology
            if topology is None or not concerns(topology, self._name):
                self._listeners.note_trouble(None)
                pause = MEMBERS_RETRY
                await changed.wait()
                continue
            news, answered = await self._listeners.look()
            if news:
                self._nudge()
            # As long as they are not known, more bypasses the tunnels than has to.
            pause = MEMBERS_PERIOD if answered else min(pause, MEMBERS_PERIOD)
            await trio.sleep(pause * self._rng.uniform(0.8, 1.0))
            pause = MEMBERS_RETRY if answered else 2 * pause
