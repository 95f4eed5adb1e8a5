"""What must hold at every step of a schedule, whatever happens: looked at after each apply and each write.

* An agent never applies a revision older than one that its host has applied of the same etcd, and follows another etcd
  only where the operator has adopted it.
* All that is ever applied of one revision is one and the same snapshot, and makes the same leaders, on every host that
  has the same mesh settings in force: while etcd lacks them that is what each host has seen last.
* What is computed from one change to the next is what is computed afresh.
* A mesh address never moves, and no two nodes, and no two kernels, have the same one.
* The kernel is not written to without cause: the plan changed, or somebody has been at the kernel, or a peer's session
  is to be forgotten, or WireGuard went back to an endpoint of a peer that was just replaced (three times at most), or a
  peer has not answered for three minutes although packets were sent (once in three minutes), or the agent is new and
  sets endpoints, which it cannot know to be right. A host that a change does not concern writes nothing.
* Nothing that the last plan held is taken away without a newer snapshot: what is lost with etcd is news only.
* What `encryption` says.

A Watchman says what is wrong by raising Broken, which ends the schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import inf
from typing import TYPE_CHECKING

from attrs import define, evolve, field, fields, frozen

from kilo_etcd.agent.leader_hints.hints import LeaderHints
from kilo_etcd.kernel.diff import SET_AGAIN
from kilo_etcd.kernel.state import (
    MAIN_TABLE,
    AddAddress,
    AddRoute,
    ApplyReport,
    Change,
    DeleteAddress,
    DeleteRoute,
    Former,
    Observed,
    RemovePeer,
    SetPeer,
)
from kilo_etcd.model import SESSION_SECONDS, Endpoint, Granularity, InternalIPs, IPAddress, IPNetwork, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.reach import Silent
from kilo_etcd.store.keys import Keys
from kilo_etcd.topology.segments import Topology, UnknownNode, build_topology
from simulation.encryption import Steady, sent_in_clear

if TYPE_CHECKING:
    from simulation.host import SimulatedAgent, SimulatedHost, SimulatedKernel
    from simulation.world import World

KEYS = Keys()

AFRESH_EVERY = 5
"""Each so many-th apply is compared with what is computed without a predecessor, which takes longer."""

NOT_COMPARED = ("revision", "raft_term", "nodes_changed")
COMPARED = tuple(attribute.name for attribute in fields(Snapshot) if attribute.name not in NOT_COMPARED)
"""A listing is dated by etcd's revision, a change by its own; both may be told of one state of the records."""


class Broken(AssertionError):
    """Something that must hold does not; the message says what, where."""


def differences(one: Snapshot, other: Snapshot) -> list[str]:
    """In what two snapshots differ, for people."""
    return [
        f"{name}: {getattr(one, name)} instead of {getattr(other, name)}"
        for name in COMPARED
        if getattr(one, name) != getattr(other, name)
    ]


SETTINGS = (KEYS.granularity, KEYS.subnets, KEYS.internal_ips)


@frozen
class _Truth:
    """What all hosts that apply it must agree on.

    An etcd that lacks the mesh's settings (it was empty when it was adopted, or somebody deleted them) leaves in force
    what each host has seen of them last, perhaps in different etcds. The stricter claim would need a default for all,
    which takes a mesh down that has other settings, because a key was deleted. Within `restoring.SETTINGS_SECONDS` a
    host puts its own there, and at rest all hosts have those.
    """

    cluster: int
    revision: int
    lacking: tuple[str, ...] = ()
    granularity: Granularity | None = None
    subnets: tuple[IPNetwork, ...] | None = None
    internal_ips: InternalIPs | None = None


def _truth(snapshot: Snapshot) -> _Truth:
    lacking = tuple(
        rejected.key
        for rejected in snapshot.rejected
        if rejected.key in SETTINGS and rejected.reason.startswith("the value is missing")
    )
    return _Truth(
        snapshot.cluster_id,
        snapshot.revision,
        lacking,
        snapshot.granularity if KEYS.granularity in lacking else None,
        snapshot.subnets if KEYS.subnets in lacking else None,
        snapshot.internal_ips if KEYS.internal_ips in lacking else None,
    )


@frozen
class _Causes:
    """Peers of one host that may be written to although the plan is what it was; the rest of the kernel may not."""

    lost: frozenset[str] = frozenset()
    """Their learnt endpoints were led into the tunnel."""
    back: frozenset[str] = frozenset()
    """WireGuard had gone back to a former endpoint of theirs."""
    unanswered: Mapping[str, Collection[Endpoint]] = field(factory=dict)
    """They were sent packets and have not answered for longer than a session lasts: where they have been found."""
    time: float = 0.0
    """Unix seconds by the host's clock."""

    def explain(self, change: Change, plan: HostPlan) -> bool:
        """Whether a change is made for the sake of one of them, and does no more than that needs."""
        if not isinstance(change, SetPeer) or change.public_key not in plan.peers:
            return False
        if _endpoint_only(change) and change.endpoint in self.unanswered.get(change.public_key, ()):
            return True
        if change.endpoint != plan.peers[change.public_key].endpoint:
            return False
        if change.public_key in self.back and change.reset:
            return True
        return _endpoint_only(change) and change.public_key in {*self.lost, *self.back, *self.unanswered}


_NO_CAUSES = _Causes()


@frozen
class _Account:
    """What was true when an apply began."""

    snapshot: Snapshot | None
    """What the host applied last."""
    raw_plan: HostPlan | None
    plan: HostPlan | None
    history: int
    touches: int
    clean: bool
    """Whether its kernel was as it should be."""
    busy: bool
    """Whether handshakes are to be triggered, sessions reset, or takeover checks run."""
    order_due: bool
    """The same, or was so when the host applied something last."""
    before: LeaderHints
    """The leader hints that it had when it applied something last."""
    hints: LeaderHints
    """The leader hints that it has by now: what comes while it applies is for the next time."""
    silent_before: tuple[Silent, ...] | None
    """Who of its location did not answer when it applied something last; None: that changed meanwhile."""
    silent: tuple[Silent, ...]
    """Who does not answer when it begins to apply."""
    new: bool


@define
class _Seen:
    """What is known of one host."""

    newest: dict[int, int] = field(factory=dict)
    """Cluster -> the newest revision that was applied of it."""
    snapshot: Snapshot | None = None
    kernel: SimulatedKernel | None = None
    hints: LeaderHints = field(factory=LeaderHints)
    silent: tuple[Silent, ...] | None = ()
    raw_plan: HostPlan | None = None
    """What its agent had planned then."""
    busy: bool = False
    """Whether its agent was busy with single peers when it had applied something last."""
    plan: HostPlan | None = None
    """The plan that its kernel was brought to last."""
    addresses: frozenset[IPAddress] = frozenset()
    """Those that its agent had found on the host when it had applied something last."""
    moved: bool = False
    """Whether `addresses` were others at the check before: an apply may have begun with those, and the next one finds
    the rest."""
    causes: _Causes = _NO_CAUSES
    """For which peers' sake its kernel may be written to, as things were when that was decided last."""
    caused: frozenset[Change] = frozenset()
    """What has been written for their sake since an apply began."""
    found_at: dict[str, frozenset[Endpoint]] = field(factory=dict)
    """Public key -> all endpoints that WireGuard has had for it."""
    received: dict[str, tuple[int, int]] = field(factory=dict)
    """Public key -> bytes received, and those that had been sent when that became so many."""
    turns: dict[str, float] = field(factory=dict)
    """Public key -> when its endpoint was set last because it did not answer."""
    again: dict[str, tuple[Endpoint | None, int]] = field(factory=dict)
    """Public key -> the endpoint that is planned, and how often it was set again since it is."""
    touches: int = 0
    """How often somebody else has been at its kernel."""
    settled: int = -1
    """`touches` when the kernel was last brought to its plan, without failures."""


class Watchman:
    """Of one world. `world` is asked only for what etcd holds and which hosts there are."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._hosts: dict[str, _Seen] = {}
        self._snapshots: dict[_Truth, Snapshot] = {}
        self._leaders: dict[tuple[_Truth, str], tuple[str, str]] = {}
        self._addresses: dict[tuple[int, str, int], IPAddress] = {}
        """Of a cluster, a node and a family."""
        self._fresh: dict[_Truth, Topology] = {}
        self._applies = 0
        self.steady: Steady | None = None
        """If packets between hosts are looked at."""
        self.lossy = False
        """Whether etcd breaks what a watch promises: then agents may differ until they list again."""
        self.disturbed = False
        """Whether claims of addresses were lost: then two kernels may have one for a while."""

    # -- what is looked at --------------------------------------------------------------------------------------

    def before(self, agent: SimulatedAgent, snapshot: Snapshot) -> _Account:
        """An agent begins to apply a snapshot."""
        host = agent.host
        seen = self._seen(host)
        new = agent.snapshots.snapshot is not None and agent.state.plan is None
        newest = seen.newest.get(snapshot.cluster_id, 0)
        bridged = agent.snapshots.cached is not None and snapshot is agent.snapshots.cached.snapshot
        if snapshot.revision < newest and not bridged:
            raise Broken(f"{host.name} applies revision {snapshot.revision} after {newest}")
        last = seen.snapshot
        if last is not None and last.cluster_id != snapshot.cluster_id and not new and not self.lossy:
            self._check_adopted(host.name, last, snapshot)
        busy = _busy(agent)
        seen.busy = seen.busy or busy
        seen.caused = frozenset()
        seen.newest[snapshot.cluster_id] = max(newest, snapshot.revision)
        return _Account(
            snapshot=seen.snapshot,
            raw_plan=seen.raw_plan,
            plan=seen.plan,
            history=len(host.machine.history),
            touches=seen.touches,
            clean=seen.settled == seen.touches,
            busy=busy,
            order_due=seen.busy,
            before=seen.hints,
            hints=agent.peer_queries.hints,
            silent_before=seen.silent,
            silent=_silent(agent),
            new=new,
        )

    def applied(self, agent: SimulatedAgent, snapshot: Snapshot, account: _Account) -> None:
        """It has done so."""
        host, topology = agent.host, agent.state.topology
        if topology is None or agent.state.revision != snapshot.revision or not agent.state.programmed:
            return
        self._applies += 1
        seen = self._seen(host)
        repeated = seen.snapshot is snapshot
        seen.snapshot, seen.raw_plan, seen.hints = snapshot, agent.raw_plan, account.hints
        seen.silent = account.silent if account.silent == _silent(agent) else None
        seen.busy = account.busy or _busy(agent)
        self._check_writes(agent, snapshot, account)
        seen.moved = seen.addresses != agent.registration.facts.own_addresses()
        seen.addresses = agent.registration.facts.own_addresses()
        # Leader hints while etcd is away are not etcd's state.
        if topology.snapshot is not snapshot:
            return
        self._check_refusals(host, snapshot)
        if repeated:
            return
        if not self.lossy:
            self._check_one_truth(host.name, snapshot, topology)
        self._check_addresses(host.name, snapshot)
        if self._applies % AFRESH_EVERY == 0 and not self.lossy:
            self._check_afresh(agent, snapshot)

    def touches(self, host: SimulatedHost) -> int:
        """How often somebody else has been at the kernel of a host."""
        return self._seen(host).touches

    def decides(
        self, kernel: SimulatedKernel, plan: HostPlan, observed: Observed, former: Mapping[str, Former]
    ) -> None:
        """What is to be changed for a plan's sake is decided from what was found, and from `former` endpoints."""
        learnt = {key: peer.endpoint for key, peer in observed.peers.items() if peer.endpoint is not None}
        seen = self._seen(kernel.owner)
        unanswered = {}
        for key, peer in observed.peers.items():
            if peer.endpoint is None:
                continue
            seen.found_at[key] = seen.found_at.get(key, frozenset()) | {peer.endpoint}
            if seen.received.get(key, (-1, 0))[0] != peer.rx_bytes:
                seen.received[key] = peer.rx_bytes, peer.tx_bytes
            silent = observed.time - peer.last_handshake >= SESSION_SECONDS
            if silent and peer.tx_bytes > seen.received[key][1]:
                unanswered[key] = seen.found_at[key]
        seen.causes = _Causes(
            unanswered=unanswered,
            time=observed.time,
            lost=frozenset(
                key
                for key, endpoint in learnt.items()
                if endpoint.address is not None and plan.leads_into_tunnel(endpoint.address)
            ),
            back=frozenset(key for key, one in former.items() if learnt.get(key) in one.endpoints),
        )

    def wrote(
        self,
        kernel: SimulatedKernel,
        plan: HostPlan,
        report: ApplyReport,
        touches: int,
        reset: Collection[str],
    ) -> None:
        """A kernel was brought to a plan; when that began somebody else had been at it so often. The sessions of the
        peers `reset` were to be forgotten, which is a cause to write to these peers, and to nothing else."""
        host, seen = kernel.owner, self._seen(kernel.owner)
        untouched = seen.settled == seen.touches
        caused = frozenset(one for one in report.changes if seen.causes.explain(one, plan))
        self._count_again(host.name, seen, caused, plan)
        if kernel is seen.kernel:
            self._count_turns(host.name, seen, caused, plan)
        changes = [
            one
            for one in report.changes
            if one not in caused and not (isinstance(one, SetPeer) and one.reset and one.public_key in reset)
        ]
        seen.caused |= caused
        if changes and untouched and seen.plan is not None:
            if kernel is seen.kernel:
                if plan == seen.plan:
                    self._broken(f"{host.name} was written to without cause", changes)
            elif _without_endpoints(plan) == _without_endpoints(seen.plan):
                more = [one for one in changes if not _endpoint_only(one)]
                if more:
                    self._broken(f"{host.name} was written to by a new agent that had nothing to change", more)
        for change in report.changes:
            if isinstance(change, AddAddress) and not self.disturbed:
                self._check_agent_lock(host, change.address.ip)
        seen.kernel, seen.plan = kernel, plan
        # What is noted was refused too, and is tried again when the host is read afresh.
        seen.settled = -1 if report.failures or report.notes else touches
        if self.steady is not None:
            settled = {name: one.settled == one.touches for name, one in self._hosts.items()}
            for lost in self.steady.lost(settled):
                self._broken(f"a packet is lost, {lost}, after", report.changes)

    def touched(self, host: SimulatedHost) -> None:
        """Somebody else has been at the kernel of a host."""
        self._seen(host).touches += 1

    def left(self, host: SimulatedHost) -> None:
        """A host has left the mesh, and may get another address when it comes again."""
        self.touched(host)
        self._forget_addresses(host.name)

    def unclaimed(self, name: str) -> None:
        """Somebody has taken away the claim of a node's address."""
        self.disturbed = True
        self._forget_addresses(name)

    def fresh(self, snapshot: Snapshot) -> Topology:
        """The topology of a snapshot, computed without a predecessor."""
        key = _truth(snapshot)
        known = self._fresh.get(key)
        if known is None or known.snapshot is not snapshot:
            known = self._fresh[key] = build_topology(snapshot)
        return known

    # -- what must hold -----------------------------------------------------------------------------------------

    def _forget_addresses(self, name: str) -> None:
        self._addresses = {key: address for key, address in self._addresses.items() if key[1] != name}

    def _seen(self, host: SimulatedHost) -> _Seen:
        return self._hosts.setdefault(host.name, _Seen())

    def _count_again(self, name: str, seen: _Seen, caused: Collection[Change], plan: HostPlan) -> None:
        for key in seen.again.keys() | seen.causes.back:
            planned = plan.peers[key].endpoint if key in plan.peers else None
            endpoint, times = seen.again.get(key, (planned, 0))
            set_again = [one for one in caused if isinstance(one, SetPeer) and one.public_key == key]
            times = (times if endpoint == planned else 0) + (len(set_again) if key in seen.causes.back else 0)
            seen.again[key] = planned, times
            if times > SET_AGAIN:
                self._broken(f"{name} has set an endpoint again {times} times", set_again)

    def _count_turns(self, name: str, seen: _Seen, caused: Collection[Change], plan: HostPlan) -> None:
        for one in caused:
            if not isinstance(one, SetPeer) or (key := one.public_key) in {*seen.causes.lost, *seen.causes.back}:
                continue
            if (
                seen.plan is None
                or key not in seen.plan.peers
                or seen.plan.peers[key].endpoint != plan.peers[key].endpoint
            ):
                continue
            if seen.causes.time - seen.turns.get(key, -inf) < SESSION_SECONDS:
                self._broken(f"{name} turns to another endpoint of a peer again and again", [one])
            seen.turns[key] = seen.causes.time

    @staticmethod
    def _broken(what: str, changes: Iterable[Change]) -> None:
        raise Broken(f"{what}: {'; '.join(map(str, changes))}")

    def _check_adopted(self, name: str, last: Snapshot, snapshot: Snapshot) -> None:
        if snapshot.cluster_id not in self._world.adopted:
            raise Broken(f"{name} follows cluster {snapshot.cluster_id:x} after {last.cluster_id:x}, not adopted")

    def _check_one_truth(self, name: str, snapshot: Snapshot, topology: Topology) -> None:
        key = _truth(snapshot)
        known = self._snapshots.setdefault(key, snapshot)
        if known is not snapshot and (differ := differences(snapshot, known)):
            raise Broken(f"{name} sees another mesh at revision {snapshot.revision}: {'; '.join(differ)}")
        for segment in topology.segments.values():
            leader = segment.leader.name
            first, who = self._leaders.setdefault((key, segment.key), (leader, name))
            if first != leader:
                raise Broken(
                    f"at revision {snapshot.revision} {leader} leads {segment.key!r} for {name}, but {first} for {who}"
                )

    def _check_addresses(self, name: str, snapshot: Snapshot) -> None:
        owners: dict[IPAddress, str] = {}
        for node in snapshot.nodes.values():
            for address in node.mesh_addresses:
                if owners.setdefault(address, node.name) != node.name:
                    raise Broken(f"{node.name} and {owners[address]} have {address}, as {name} sees it")
            if node.name in self._world.gone:
                continue  # It takes back one claim after the other.
            for address in node.mesh_addresses:
                known = self._addresses.setdefault((snapshot.cluster_id, node.name, address.version), address)
                if known != address and not self.disturbed:
                    raise Broken(f"{node.name} moved from {known} to {address}, as {name} sees it")

    def _check_agent_lock(self, host: SimulatedHost, address: IPAddress) -> None:
        for other in self._world.hosts.values():
            if other is not host and any(one.ip == address for one in other.machine.observed.addresses):
                raise Broken(f"the kernels of {host.name} and {other.name} both have {address}")

    def _check_refusals(self, host: SimulatedHost, snapshot: Snapshot) -> None:
        own = self._seen(host)
        if own.settled != own.touches:
            return  # Its kernel has refused changes, or somebody has been at it.
        for name, seen in self._hosts.items():
            other = self._world.hosts[name]
            if other is host or seen.snapshot is None or seen.hints.leaders or not other.condition.powered:
                continue
            same = seen.snapshot.revision == snapshot.revision and seen.snapshot.cluster_id == snapshot.cluster_id
            if same and seen.settled == seen.touches and (why := sent_in_clear(snapshot, host, other)):
                raise Broken(f"at revision {snapshot.revision} {why}")

    def _check_afresh(self, agent: SimulatedAgent, snapshot: Snapshot) -> None:
        fresh = self.fresh(self._snapshots[_truth(snapshot)])
        assert agent.state.topology is not None
        if agent.state.topology.segments != fresh.segments:
            raise Broken(f"{agent.name} draws another mesh than what is drawn afresh, at revision {snapshot.revision}")
        try:
            plan = host_plan(fresh, agent.name)
        except UnknownNode:
            return
        if plan != agent.raw_plan:
            raise Broken(f"the plan of {agent.name} is not what is planned afresh, at revision {snapshot.revision}")

    def _check_writes(self, agent: SimulatedAgent, snapshot: Snapshot, account: _Account) -> None:
        host = agent.host
        seen = self._seen(host)
        made = [one for one in host.machine.history[account.history :] if one not in seen.caused]
        if not made or not account.clean or seen.touches != account.touches or seen.settled != seen.touches:
            return
        # Who changes itself may be reached otherwise, and the handshake order with it is decided anew.
        # An address that is gone or has come is no route's source any more, or may be one again.
        moved = seen.moved or seen.addresses != agent.registration.facts.own_addresses()
        busy = moved or account.order_due or _busy(agent) or _changed(account, snapshot, agent.name)
        silent = not (account.silent_before == account.silent == _silent(agent))
        # What comes out of the tunnel for a member that does not answer is refused if the mesh carries internal IPs.
        mode = None if account.snapshot is None else account.snapshot.internal_ips
        silent = silent or (bool(account.silent) and mode is not snapshot.internal_ips)
        # What `encrypted` asks for follows from others' stages and statuses too.
        busy = (
            busy
            or account.plan is None
            or agent.state.plan is None
            or account.plan.encryption != agent.state.plan.encryption
        )
        if not account.new and account.raw_plan == agent.raw_plan and not (busy or silent or _promoted(account, agent)):
            self._broken(f"{host.name} was written to by a change that does not concern it", made)
        nothing_new = account.snapshot is snapshot and account.before == account.hints and not silent
        if nothing_new and account.plan is not None and not account.new:
            lost = _lost(made, account.plan)
            if lost:
                self._broken(f"{host.name} lost what its plan holds although there is nothing new", lost)


def _busy(agent: SimulatedAgent) -> bool:
    """Whether it has to do with single peers, which may be made anew."""
    applier = agent.applier
    return bool(applier._waiting or applier._proving or applier._reset_session)


def _silent(agent: SimulatedAgent) -> tuple[Silent, ...]:
    """Who of its location does not answer, as far as it has found out."""
    return () if agent.reachability is None else agent.reachability.silent


def _changed(account: _Account, snapshot: Snapshot, name: str) -> bool:
    """Whether the host's own node is another one than before."""
    return account.snapshot is None or account.snapshot.nodes.get(name) != snapshot.nodes.get(name)


def _promoted(account: _Account, agent: SimulatedAgent) -> bool:
    """Whether the hosts have other roles than before, which decides who tells endpoints to its WireGuard."""
    if account.snapshot is None or agent.state.topology is None:
        return True
    before = build_topology(account.snapshot)
    return {segment.leader.name for segment in before.segments.values()} != {
        segment.leader.name for segment in agent.state.topology.segments.values()
    }


def _lost(made: Iterable[Change], plan: HostPlan) -> list[Change]:
    """What `plan` held, was taken away, and was not restored."""
    lost: dict[object, Change] = {}
    for change in made:
        match change:
            case RemovePeer(public_key=key) if key in plan.peers:
                lost[key] = change
            case SetPeer(public_key=key):
                lost.pop(key, None)
            case DeleteRoute(route=route) if route.table == MAIN_TABLE and route.destination in plan.routes:
                lost[route.destination] = change
            case AddRoute(route=route) if route.table == MAIN_TABLE:
                lost.pop(route.destination, None)
            case DeleteAddress(address=address) if address in plan.addresses:
                lost[address] = change
    return list(lost.values())


def _without_endpoints(plan: HostPlan) -> HostPlan:
    return evolve(plan, peers={key: evolve(peer, endpoint=None) for key, peer in plan.peers.items()})


def _endpoint_only(change: Change) -> bool:
    return isinstance(change, SetPeer) and change == SetPeer(
        name=change.name, public_key=change.public_key, endpoint=change.endpoint
    )
