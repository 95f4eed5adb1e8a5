"""The probe assignment: which leader this host probes, and what it concludes from the answers (docs/design.md,
"Election, failure detection and handover"; decision 0015).

A location's next in line tries all the time whether packets get through the leader, by an echo request to one leader of
another location after the other. When one that used to answer is silent it tries harder; when then nobody answers it
reports so in etcd. That triggers the other probers: the next few candidates of the location, which try the same, and
the leaders elsewhere that were tried, which try back (cross-check). The election decides what follows
(`topology.probe_reports`).

Pure: topologies, answers and times come in, assignments and targets go out.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Container, Iterable, Mapping
from functools import cached_property
from zlib import crc32

from attrs import define, field, frozen

from kilo_etcd.model import IPAddress, Node, ProbeReport
from kilo_etcd.topology.families import common_family, same_site
from kilo_etcd.topology.next_hop import next_hop
from kilo_etcd.topology.probe_reports import VOTERS
from kilo_etcd.topology.segments import Segment, Topology, UnknownNode

PERIOD = 0.75
"""Seconds between two requests of a next in line: a packet of 32 bytes, which is 92 with WireGuard's headers (IPv4), so
0.98 kbit/s."""

NO_BASELINE_PERIOD = 5.0
"""The same if nothing has ever answered: a firewall, or no host is there."""

BURST = 10
"""Requests to each target before its silence counts. Of packets that get through and back with 64 % (a link that loses
one in five each way), eleven in a row are lost once in 80,000 times, and then a second prober has to report the
same."""

MEMORY = 60.0
"""Seconds for which it counts that a target has answered."""

PATIENCE, MOST_PATIENCE = 0.15, 1.0
"""Seconds to wait for an answer: at least, and at most if answers take long."""

AGAIN = 30.0
"""Seconds after which a target that was silent is tried again, while others answer."""

IN_TURN, TOGETHER, KNOWN = 3, 4, 16
"""Targets that are tried in turn, those that are tried at once on suspicion, and those from which they are taken."""


@frozen(kw_only=True)
class ProbeAssignment:
    """One leader to be watched, through which this host sends."""

    location: str
    leader: Node
    candidacy: int
    """etcd's create revision of the candidacy by which it leads."""
    first: bool
    """Whether this host is next in line: it tries all the time, the others when a report suspects the leader."""
    near: IPAddress
    """The leader on the location's own network."""
    local_members: tuple[IPAddress, ...]
    """Others of the location on that network."""
    at_home: Mapping[IPAddress, IPAddress] = field(factory=dict)
    """Those of them that this host reaches at their mesh addresses without the leader -> those addresses."""
    suspicions: tuple[ProbeReport, ...] = ()
    """The reports of others on this very leader."""
    own: Node = field(eq=False, repr=False)
    topology: Topology = field(eq=False, repr=False)

    @cached_property
    def targets(self) -> tuple[Node, ...]:
        """Leaders of other locations, in an order of this host's own. In a mesh of thousands it takes milliseconds to
        choose them, which a host that has nobody to try just now need not spend at each change of the mesh."""
        reported = {name for report in self.suspicions for name in report.targets}
        return _targets(self.topology, self.topology.segment_of(self.leader.name), self.own, reported)

    @cached_property
    def reported_nearby(self) -> bool:
        """Whether another member of the location suspects the leader too."""
        return any(report.prober in self._members for report in self.suspicions)

    @cached_property
    def far_reports(self) -> tuple[ProbeReport, ...]:
        """The reports of probers in other locations that have tried members of this one through the leader."""
        return tuple(
            report
            for report in self.suspicions
            if report.prober not in self._members and not self._members.isdisjoint(report.targets)
        )

    @cached_property
    def _members(self) -> frozenset[str]:
        return frozenset(node.name for node in self.topology.segment_of(self.leader.name).members)

    def is_deaf(self, answered: Container[IPAddress]) -> bool:
        """Whether others of the location have answered on its network, and none of these at its mesh address: it is
        this host that does not get what is sent to its own mesh address, and the leader may forward all of it."""
        asked = [mesh_address for address, mesh_address in self.at_home.items() if address in answered]
        return bool(asked) and not any(mesh_address in answered for mesh_address in asked)

    def about(self, leader: str, candidacy: int) -> bool:
        """Whether this assignment is about that leader."""
        return (self.leader.name, self.candidacy) == (leader, candidacy)


@frozen(kw_only=True)
class CrossCheck:
    """A cross-check: another location's leader through which a member of it reports that it does not reach this
    host."""

    location: str
    leader: Node
    candidacy: int
    members: tuple[Node, ...]
    """The targets through it, the reporter first."""

    def about(self, leader: str, candidacy: int) -> bool:
        """Whether this cross-check is about that leader."""
        return (self.leader.name, self.candidacy) == (leader, candidacy)


def assignment_of(topology: Topology, name: str) -> ProbeAssignment | None:
    """What node `name` has to probe; None: it leads, is no candidate, or has nothing to compare with."""
    try:
        segment = topology.segment_of(name)
    except UnknownNode:
        return None
    own, leader = topology.snapshot.nodes[name], segment.leader
    order = segment.election.order
    candidacy = _candidacy(topology, segment)
    family = common_family(own, leader)
    if leader.name == name or name not in order[:VOTERS] or candidacy is None or family is None:
        return None
    near = leader.internal_ip(family)
    assert near is not None
    others = [node for node in segment.members if node.name not in (name, leader.name)]
    # Candidates first: they are known to live.
    others.sort(key=lambda node: order.index(node.name) if node.name in order else len(order))
    addresses = [node.internal_ip(family) for node in others]
    at_home = {
        address.ip: node.mesh_addresses[0]
        for address, node in zip(addresses[: VOTERS - 2], others, strict=False)
        if address is not None
        and node.mesh_addresses
        and (way := next_hop(own, node, node.mesh_addresses[0].version)) is not None
        and not way.trouble
    }
    suspicions = tuple(
        report
        for report in topology.snapshot.probe_reports.get(segment.location, ())
        if report.prober != name and (report.leader, report.candidacy) == (leader.name, candidacy)
    )
    return ProbeAssignment(
        location=segment.location,
        leader=leader,
        candidacy=candidacy,
        first=segment.next_in_line == name,
        near=near.ip,
        local_members=tuple(address.ip for address in addresses if address is not None)[: VOTERS - 2],
        at_home=at_home,
        suspicions=suspicions,
        own=own,
        topology=topology,
    )


def cross_checks_of(topology: Topology, name: str) -> tuple[CrossCheck, ...]:
    """The leaders of other locations that node `name` has to cross-check."""
    cross_checks: dict[str, CrossCheck] = {}
    own = topology.snapshot.nodes.get(name)
    if own is None or not topology.snapshot.probe_reports:
        return ()
    home = topology.segment_of(name)
    if home.leader.name != name:
        return ()
    for probe_reports in topology.snapshot.probe_reports.values():
        for report in probe_reports:
            node = topology.snapshot.nodes.get(report.leader)
            segment = None if node is None else topology.segment_of(report.leader)
            if segment is None or segment is home or segment.key in cross_checks or name not in report.targets:
                continue
            members = {member.name: member for member in segment.members if member.mesh_addresses}
            reporter = members.pop(report.prober, None)
            leader = members.pop(report.leader, None)
            if reporter is None or leader is None or _candidacy(topology, segment) != report.candidacy:
                continue
            cross_checks[segment.key] = CrossCheck(
                location=segment.location,
                leader=leader,
                candidacy=report.candidacy,
                members=(reporter, *members.values())[:TOGETHER],
            )
    return tuple(cross_checks.values())


def is_candidate(topology: Topology, location: str, leader: str, candidacy: int) -> bool:
    """Whether that candidacy is still there."""
    return any(
        candidate.node == leader and candidate.create_revision == candidacy
        for candidate in topology.snapshot.candidates.get(location, ())
    )


def _candidacy(topology: Topology, segment: Segment) -> int | None:
    """By which candidacy a segment's leader leads; None: by none."""
    name = segment.leader.name
    held = [candidate for candidate in topology.snapshot.candidates.get(segment.location, ()) if candidate.node == name]
    best = min(held, key=lambda candidate: (candidate.rank, candidate.create_revision), default=None)
    return None if best is None else best.create_revision


def order_by_chance(name: str, node: Node) -> int:
    """Where a node stands for host `name` in an order by chance, always the same: each host has one of its own."""
    return crc32(f"{name} {node.name}".encode())


def _targets(topology: Topology, segment: Segment, own: Node, reported: Collection[str]) -> tuple[Node, ...]:
    """Those `reported` first, then candidates, which are known to live; else in an order by chance, but always the
    same: many hosts do not all try the same few."""
    leaders: Iterable[Node] = (
        other.leader for other in topology.segments.values() if other is not segment and other.leader.mesh_addresses
    )
    far = (leader for leader in leaders if not same_site(own, leader))
    living = topology.snapshot.candidate_names()
    return tuple(
        heapq.nsmallest(
            KNOWN,
            far,
            key=lambda node: (node.name not in reported, node.name not in living, order_by_chance(own.name, node)),
        )
    )


@define
class ProbeHistory:
    """The targets that have answered through one leader, by one candidacy. Times are seconds of one monotonic clock.

    Nothing is carried over to the next leader: a target that was never reached through it is not its fault. So if the
    far end is what is broken, in a way that looks like the leader's fault, one leader is demoted and no more.
    """

    _good: dict[str, float] = field(factory=dict)
    _silent: dict[str, float] = field(factory=dict)
    _took: dict[str, float] = field(factory=dict)
    _turn: int = 0

    def next(self, assignment: ProbeAssignment, now: float) -> Node | None:
        """The target to try now: those that answer in turn, or one after the other as long as none does."""
        answering = [node for node in assignment.targets if self._answers(node.name, now)][:IN_TURN]
        # Places are left to who has not been tried yet: one target alone cannot be told from its own failure.
        fresh = [node for node in assignment.targets if now - self._silent.get(node.name, float("-inf")) > AGAIN]
        nodes = list(dict.fromkeys([*answering, *fresh]))[:IN_TURN] or list(assignment.targets)
        if not nodes:
            return None
        self._turn += 1
        return nodes[self._turn % len(nodes)]

    def tried(self, targets: Iterable[Node], answered: Mapping[str, float], now: float) -> None:
        """`answered`: name -> seconds that its answer took."""
        for node in targets:
            if (took := answered.get(node.name)) is not None:
                self._good[node.name] = now
                self._took[node.name] = max(took, self._took.get(node.name, 0.0) * 0.9)
                self._silent.pop(node.name, None)
            else:
                self._silent[node.name] = now

    def has_no_baseline(self, assignment: ProbeAssignment, now: float) -> bool:
        """Whether no target is known to answer, so that silence means nothing."""
        return not any(self._recent(node.name, now) for node in assignment.targets)

    def knows(self, node: Node, now: float) -> bool:
        """Whether it has answered not long ago, so that its silence means something."""
        return self._recent(node.name, now)

    def suspicious_targets(
        self, assignment: ProbeAssignment, now: float, named: Collection[str] = ()
    ) -> tuple[Node, ...]:
        """The targets to try together: those that answered not long ago, and those that other reports name; `named`
        are those of this host's own report."""
        reported = {*named, *(name for report in assignment.suspicions for name in report.targets)}
        by_time = sorted(
            (node for node in assignment.targets if self._recent(node.name, now)),
            key=lambda node: -self._good[node.name],
        )
        cross_checked = [node for node in assignment.targets if node.name in reported and node not in by_time]
        return tuple((by_time + cross_checked)[:TOGETHER])

    def patience(self, targets: Iterable[Node]) -> float:
        """Seconds to wait for these: twice as long as they took lately."""
        longest = max((self._took.get(node.name, 0.0) for node in targets), default=0.0)
        return min(max(PATIENCE, 2 * longest + 0.05), MOST_PATIENCE)

    def _recent(self, name: str, now: float) -> bool:
        return now - self._good.get(name, float("-inf")) <= MEMORY

    def _answers(self, name: str, now: float) -> bool:
        return self._recent(name, now) and self._silent.get(name, float("-inf")) <= self._good[name]
