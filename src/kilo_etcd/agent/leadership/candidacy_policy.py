"""Decides for the agent's own host beyond the plan: its role, whether it is a candidate, and which hosts it waits for.

Pure: snapshots, topologies and times come in, values go out. The daemon acts on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import evolve, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.model import CandidateClass, Granularity, InternalIPs, IPNetwork, Node, Snapshot
from kilo_etcd.model.hostplan import HostPlan, Via
from kilo_etcd.store.records import Role
from kilo_etcd.topology.segments import Topology, segment_key

SETTLE_SECONDS = 2.0
"""How long a host that does not lead keeps its class unchanged before it stands for leader (no flapping)."""

WITHDRAW_SECONDS = 3.0
"""How long a host keeps standing as the operator's choice after it is that no more: the one chosen in its place stands
after `SETTLE_SECONDS`, and leadership goes from one to the other, not by way of whoever is next in line."""


@frozen(kw_only=True)
class SegmentRole:
    """What a host is in its segment: `leader` or `member` of a location, or `alone` in a segment of one."""

    kind: Role
    location: str
    leader: str

    def __str__(self) -> str:
        where = f"location {self.location}" if self.location else "the default location"
        if self.kind is Role.LEADER:
            return f"leader of {where}"
        if self.kind is Role.MEMBER:
            return f"member of {where}, led by {self.leader}"
        return f"alone in {where}"


def role_of(topology: Topology, name: str) -> SegmentRole:
    """The role of node `name`; it must be in the topology."""
    segment = topology.segment_of(name)
    if len(segment.members) == 1:
        kind = Role.ALONE
    else:
        kind = Role.LEADER if segment.leader.name == name else Role.MEMBER
    return SegmentRole(kind=kind, location=segment.location, leader=segment.leader.name)


def succeeded(topology: Topology, name: str, location: str, *, leaves: bool) -> bool:
    """Whether another candidate leads in `location` instead of node `name`: now, or once that `leaves`. Then the record
    that the node leads there says nothing any more."""
    segment = topology.segment_of(name)
    if segment.location != location:
        return True
    if len(segment.members) > 1:
        return (leaves or segment.leader.name != name) and any(other != name for other in segment.election.order)
    return leaves and any(candidate.node != name for candidate in topology.snapshot.candidates.get(location, ()))


def on_record(snapshot: Snapshot, name: str) -> bool:
    """Whether node `name` is on record as the last leader of its segment. While each node is a segment of its own, the
    segments count that the locations have otherwise: as with candidacies, the switch back finds its leaders."""
    own = snapshot.nodes.get(name)
    recorded = () if own is None else snapshot.leaders.get(own.location, ())
    if own is None or name not in recorded:
        return False
    grouped = evolve(snapshot, granularity=Granularity.LOCATION)
    key = segment_key(own, grouped)
    nodes = filter(None, map(snapshot.nodes.get, recorded))
    return next(node.name for node in nodes if segment_key(node, grouped) == key) == name


def is_standby(role: SegmentRole, plan: HostPlan) -> bool:
    """Whether a host's own packets leave by none of its tunnels, which are kept for the day when it leads: a member's,
    unless it reaches its location through the tunnel too (`--encapsulate wireguard`)."""
    return role.kind is Role.MEMBER and all(route.via is not Via.TUNNEL for route in plan.routes.values())


HOLD_DOWN_SECONDS, HOLD_DOWN_MOST = 300.0, 3600.0
"""How long a demoted leader stays behind everyone: at first, and at most. Each time that it
happens again within twice that time it is twice as long."""


@frozen
class DesiredCandidacy:
    """A candidacy: for which location, in which class."""

    location: str
    rank: CandidateClass


@frozen
class HoldDown:
    """The demotions of a host count for a while. Seconds of one monotonic clock."""

    until: float = float("-inf")
    seconds: float = 0.0

    def again(self, now: float) -> HoldDown:
        """The hold-down after a demotion at `now`."""
        recent = self.seconds > 0.0 and now - self.until <= self.seconds
        seconds = min(self.seconds * 2, HOLD_DOWN_MOST) if recent else HOLD_DOWN_SECONDS
        return HoldDown(now + seconds, seconds)


def eligible(snapshot: Snapshot, name: str) -> DesiredCandidacy | None:
    """The candidacy that `name` may hold: its location has another node that it could lead, or None.

    Labels count, not the granularity in force: candidacies outlast a switch to `full` and back, so that the
    switch back finds its leaders.
    """
    node = snapshot.nodes.get(name)
    if node is None or not node.internal_ips:
        return None
    if not any(_shares_segment(node, other) for other in snapshot.nodes.values()):
        return None
    return DesiredCandidacy(node.location, node.candidate_class)


def _shares_segment(node: Node, other: Node) -> bool:
    return other.location == node.location and other.name != node.name and bool(other.internal_ips)


@frozen(kw_only=True)
class CandidacyInputs:
    """What is known when the candidacy is decided. Times are seconds on one monotonic clock."""

    now: float
    stable_since: float
    """Since when `eligible` has had its present value."""
    ready: bool
    """The present plan is in the kernel, without failures that would keep the host from leading."""
    leads: bool
    """The present snapshot already makes this host the leader (for want of candidates, or as one)."""
    current: DesiredCandidacy | None
    """The candidacy that this host holds."""
    gives_way_since: float | None = None
    """Since when there is a candidate to give way to, which serves a family that this host does not
    (`served_families`)."""


def decide_candidacy(
    desired: DesiredCandidacy | None, inputs: CandidacyInputs
) -> tuple[DesiredCandidacy | None, float | None]:
    """(the candidacy to hold now, when to decide again).

    A host that wants to stand elsewhere gives the old candidacy up and queues anew; a host that has just come waits
    until its class has been stable, unless it leads already for want of any candidate: then it says so at once. One
    that is ahead of a candidate that serves a family more gives its candidacy up, and enters none ahead of it. One
    whose class changes goes on standing as before until it stands anew: its place in the queue is not empty meanwhile.
    """
    current = inputs.current
    if desired is None:
        return None, None
    if inputs.gives_way_since is not None:
        # An address may be away for a moment only.
        over = inputs.gives_way_since + SETTLE_SECONDS
        return (None, None) if current is None or inputs.now >= over else (current, over)
    if current == desired:
        return desired, None
    settled = inputs.stable_since + SETTLE_SECONDS
    if current is not None and desired.rank is CandidateClass.DEMOTED:
        # Probe reports are about the present candidacy: that has to go first.
        return None, settled
    if current is not None and current.location == desired.location:
        if keeps_its_place(current, desired, leads=inputs.leads):
            settled = inputs.stable_since + WITHDRAW_SECONDS
            if (current.rank, desired.rank) in _NO_LONGER_CHOSEN and inputs.now < settled:
                return current, settled
            return desired, None
        if not inputs.ready:
            return current, None
        return (desired, None) if inputs.now >= settled else (current, settled)
    if not inputs.ready:
        return None, None
    if inputs.leads and current is None:
        return desired, None
    if inputs.now >= settled:
        return desired, None
    return None, settled


_NO_LONGER_CHOSEN = (
    (CandidateClass.ANNOTATED_PUBLIC, CandidateClass.PUBLIC),
    (CandidateClass.ANNOTATED, CandidateClass.REST),
)
"""Classes before and after the operator took the leader annotation away, all else being as it was."""


def keeps_its_place(current: DesiredCandidacy | None, desired: DesiredCandidacy | None, *, leads: bool) -> bool:
    """Whether a candidacy that changes keeps its place among those of its new class, and need not queue anew.

    It may where that cannot make this host take over from one that leads: if it leads itself, or becomes worse.
    """
    if current is None or desired is None or current.location != desired.location:
        return False
    if desired.rank is CandidateClass.DEMOTED:
        return False
    return leads or desired.rank > current.rank


def able_to_lead(missing: Iterable[IPNetwork | None], subnets: Iterable[IPNetwork]) -> bool:
    """Whether a host may lead although something could not be programmed: `missing` are the routes that are not there,
    None for anything else. Only the mesh's own routes count: one network that collides with a route on every host, a
    container bridge's for instance, must not leave a location without candidates."""
    mesh = set(subnets)
    return all(network is not None and network not in mesh for network in missing)


def confirmed(revisions: Mapping[str, int], revision: int, apart_from: str) -> bool:
    """Whether every live node but `apart_from` has applied `revision` or a later one."""
    return all(applied >= revision for node, applied in revisions.items() if node != apart_from)


@frozen
class InternalIPsState:
    """The mesh's setting internal-ips, and what is in force of it."""

    setting: InternalIPs
    in_force: InternalIPs
    waits_for: tuple[str, ...] = ()
    """The nodes whose agents do not know the setting."""

    @classmethod
    def of(cls, topology: Topology) -> InternalIPsState:
        """The state that a topology has: the mesh's setting, what is in force, and the nodes that it waits for."""
        return cls(topology.snapshot.internal_ips, topology.internal_ips, tuple(sorted(topology.unaware)))

    def news(self, before: InternalIPsState | None) -> tuple[str, dict[str, str]] | None:
        """The log event, with its fields, that this is after `before` (None: nothing yet); None: no news."""
        if before is not None and (before.setting, before.in_force) == (self.setting, self.in_force):
            return None
        changed = before is not None and before.setting is not self.setting
        fields = {"setting": str(self.setting), **({"before": str(before.setting)} if before and changed else {})}
        if self.setting is self.in_force:
            if before is None:
                return None
            return "internal-ips changed" if changed else "internal-ips is in force now", fields
        fields["in_force"] = str(self.in_force)
        if self.waits_for:
            fields["waits_for_agents_of"] = first_of(self.waits_for, MOST_WAITED)
        lost = before is not None and not changed and before.setting is before.in_force
        return (
            f"internal-ips {'changed and ' if changed else ''}is not in force{' any more' if lost else ' yet'}",
            fields,
        )


MOST_WAITED = 10
"""Nodes that a log line names."""
