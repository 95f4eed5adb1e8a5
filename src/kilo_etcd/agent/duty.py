"""Whom this host watches as a witness, and what it makes of who answers (DESIGN section 5, decision 0015).

A location's next in line tries all the time whether packets get through the leader, by an echo request to one leader of
another location after the other. When one that used to answer is silent it tries harder; when then nobody answers it
says so in etcd. That calls the other witnesses: the next few candidates of the location, who try the same, and the
leaders elsewhere that were tried, who try back. What all of that amounts to, the election says (`topology.verdicts`).

Pure: topologies, answers and times come in, duties and targets go out.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from zlib import crc32

from attrs import define, field, frozen

from kilo_etcd.model import IPAddress, Node, Verdict
from kilo_etcd.topology import Topology, UnknownNode
from kilo_etcd.topology.families import common_family, same_site
from kilo_etcd.topology.segments import Segment
from kilo_etcd.topology.verdicts import PANEL

PERIOD = 0.75
"""Seconds between two requests of a next in line: a packet of 32 bytes, which is 92 with WireGuard's headers (IPv4), so
0.98 kbit/s."""

BLIND_PERIOD = 5.0
"""The same where nobody has ever answered: a firewall, or nobody is there."""

BURST = 10
"""Requests to each target before its silence counts. Of packets that get through and back with 64 % (a link that loses
one in five each way), eleven in a row are lost once in 80,000 times, and then a second witness has to say the same."""

MEMORY = 60.0
"""Seconds for which it counts that a target has answered."""

PATIENCE, MOST_PATIENCE = 0.15, 1.0
"""Seconds to wait for an answer: at least, and at most if answers take long."""

AGAIN = 30.0
"""Seconds after which a target that was silent is tried again, while others answer."""

IN_TURN, TOGETHER, KNOWN = 3, 4, 16
"""Targets that are tried in turn, those that are tried at once in doubt, and those from which they are taken."""


@frozen(kw_only=True)
class Duty:
    """One leader to be watched, through which this host sends."""

    location: str
    leader: Node
    candidacy: int
    """etcd's create revision of the candidacy by which it leads."""
    first: bool
    """Whether this host is next in line: it tries all the time, the others when somebody has doubts."""
    near: IPAddress
    """The leader on the location's own network."""
    fellows: tuple[IPAddress, ...]
    """Others of the location on that network."""
    doubts: tuple[Verdict, ...] = ()
    """What others say of this very leader."""
    own: Node = field(eq=False, repr=False)
    topology: Topology = field(eq=False, repr=False)

    @cached_property
    def targets(self) -> tuple[Node, ...]:
        """Leaders of other locations, in an order of this host's own. In a mesh of thousands it takes milliseconds to
        choose them, which a host that has nobody to try just now need not spend at each change of the mesh."""
        named = {name for verdict in self.doubts for name in verdict.targets}
        return _targets(self.topology, self.topology.segment_of(self.leader.name), self.own, named)

    @cached_property
    def reported_nearby(self) -> bool:
        """Whether another member of the location doubts the leader too."""
        return any(verdict.witness in self._members for verdict in self.doubts)

    @cached_property
    def far_reports(self) -> tuple[Verdict, ...]:
        """What those in other locations say who have tried members of this one through the leader."""
        return tuple(
            verdict
            for verdict in self.doubts
            if verdict.witness not in self._members and not self._members.isdisjoint(verdict.targets)
        )

    @cached_property
    def _members(self) -> frozenset[str]:
        return frozenset(node.name for node in self.topology.segment_of(self.leader.name).members)

    def about(self, leader: str, candidacy: int) -> bool:
        """Whether that is whom this duty concerns."""
        return (self.leader.name, self.candidacy) == (leader, candidacy)


@frozen(kw_only=True)
class Summons:
    """Another location's leader through which a member of it says that it does not reach this host."""

    location: str
    leader: Node
    candidacy: int
    members: tuple[Node, ...]
    """Whom to try through it, the accuser first."""

    def about(self, leader: str, candidacy: int) -> bool:
        """Whether that is whom this summons concerns."""
        return (self.leader.name, self.candidacy) == (leader, candidacy)


def duty_of(topology: Topology, name: str) -> Duty | None:
    """What node `name` has to watch; None: it leads, does not stand, or has nobody to compare with."""
    try:
        segment = topology.segment_of(name)
    except UnknownNode:
        return None
    own, leader = topology.snapshot.nodes[name], segment.leader
    order = segment.election.order
    candidacy = _candidacy(topology, segment)
    family = common_family(own, leader)
    if leader.name == name or name not in order[:PANEL] or candidacy is None or family is None:
        return None
    near = leader.internal_ip(family)
    assert near is not None
    others = [node for node in segment.members if node.name not in (name, leader.name)]
    # Candidates first: they are known to live.
    others.sort(key=lambda node: order.index(node.name) if node.name in order else len(order))
    addresses = [node.internal_ip(family) for node in others]
    doubts = tuple(
        verdict
        for verdict in topology.snapshot.verdicts.get(segment.location, ())
        if verdict.witness != name and (verdict.leader, verdict.candidacy) == (leader.name, candidacy)
    )
    return Duty(
        location=segment.location,
        leader=leader,
        candidacy=candidacy,
        first=segment.next_in_line == name,
        near=near.ip,
        fellows=tuple(address.ip for address in addresses if address is not None)[: PANEL - 2],
        doubts=doubts,
        own=own,
        topology=topology,
    )


def summons_of(topology: Topology, name: str) -> tuple[Summons, ...]:
    """For which leaders of other locations node `name` is asked to be a witness."""
    found: dict[str, Summons] = {}
    own = topology.snapshot.nodes.get(name)
    if own is None or not topology.snapshot.verdicts:
        return ()
    home = topology.segment_of(name)
    if home.leader.name != name:
        return ()
    for verdicts in topology.snapshot.verdicts.values():
        for verdict in verdicts:
            node = topology.snapshot.nodes.get(verdict.leader)
            segment = None if node is None else topology.segment_of(verdict.leader)
            if segment is None or segment is home or segment.key in found or name not in verdict.targets:
                continue
            members = {member.name: member for member in segment.members if member.mesh_addresses}
            accuser = members.pop(verdict.witness, None)
            leader = members.pop(verdict.leader, None)
            if accuser is None or leader is None or _candidacy(topology, segment) != verdict.candidacy:
                continue
            found[segment.key] = Summons(
                location=segment.location,
                leader=leader,
                candidacy=verdict.candidacy,
                members=(accuser, *members.values())[:TOGETHER],
            )
    return tuple(found.values())


def accused(topology: Topology, name: str) -> tuple[Verdict, ...]:
    """What others say of node `name` and its present candidacy."""
    node = topology.snapshot.nodes.get(name)
    if node is None:
        return ()
    held = {one.create_revision for one in topology.snapshot.candidates.get(node.location, ()) if one.node == name}
    verdicts = topology.snapshot.verdicts.get(node.location, ())
    return tuple(one for one in verdicts if one.leader == name and one.candidacy in held)


def stands(topology: Topology, location: str, leader: str, candidacy: int) -> bool:
    """Whether that candidacy is still there to be judged."""
    return any(
        one.node == leader and one.create_revision == candidacy
        for one in topology.snapshot.candidates.get(location, ())
    )


def _candidacy(topology: Topology, segment: Segment) -> int | None:
    """By which candidacy a segment's leader leads; None: by none."""
    name = segment.leader.name
    held = [one for one in topology.snapshot.candidates.get(segment.location, ()) if one.node == name]
    best = min(held, key=lambda one: (one.rank, one.create_revision), default=None)
    return None if best is None else best.create_revision


def _targets(topology: Topology, segment: Segment, own: Node, named: Collection[str]) -> tuple[Node, ...]:
    """Those `named` first, then in an order by chance, but always the same: many hosts do not all try the same few."""
    leaders: Iterable[Node] = (
        other.leader for other in topology.segments.values() if other is not segment and other.leader.mesh_addresses
    )
    far = (leader for leader in leaders if not same_site(own, leader))
    return tuple(
        heapq.nsmallest(
            KNOWN, far, key=lambda node: (node.name not in named, crc32(f"{own.name} {node.name}".encode()))
        )
    )


@define
class Account:
    """Who has answered through one leader, by one candidacy. Times are seconds of one monotonic clock.

    Nothing is carried over to the next leader: whom nobody ever reached through it, it is not to blame for. So if the
    far end is what is broken, in a way that looks like the leader's fault, one leader is passed over and no more.
    """

    _good: dict[str, float] = field(factory=dict)
    _silent: dict[str, float] = field(factory=dict)
    _took: dict[str, float] = field(factory=dict)
    _turn: int = 0

    def next(self, duty: Duty, now: float) -> Node | None:
        """Whom to try now: those that answer in turn, or one after the other as long as nobody does."""
        answering = [node for node in duty.targets if self._answers(node.name, now)][:IN_TURN]
        # Places are left to who has not been tried yet: one target alone cannot be told from its own failure.
        fresh = [node for node in duty.targets if now - self._silent.get(node.name, float("-inf")) > AGAIN]
        found = list(dict.fromkeys([*answering, *fresh]))[:IN_TURN] or list(duty.targets)
        if not found:
            return None
        self._turn += 1
        return found[self._turn % len(found)]

    def tried(self, targets: Iterable[Node], answered: Mapping[str, float], now: float) -> None:
        """`answered`: name -> seconds that its answer took."""
        for node in targets:
            if (took := answered.get(node.name)) is not None:
                self._good[node.name] = now
                self._took[node.name] = max(took, self._took.get(node.name, 0.0) * 0.9)
                self._silent.pop(node.name, None)
            else:
                self._silent[node.name] = now

    def blind(self, duty: Duty, now: float) -> bool:
        """Whether nobody is known to answer, so that silence means nothing."""
        return not any(self._recent(node.name, now) for node in duty.targets)

    def knows(self, node: Node, now: float) -> bool:
        """Whether it has answered not long ago, so that its silence means something."""
        return self._recent(node.name, now)

    def in_doubt(self, duty: Duty, now: float, said: Collection[str] = ()) -> tuple[Node, ...]:
        """Whom to try together: who answered not long ago, and whom those have tried who say that nobody does; `said`
        is whom this host has named itself."""
        named = {*said, *(name for verdict in duty.doubts for name in verdict.targets)}
        by_time = sorted(
            (node for node in duty.targets if self._recent(node.name, now)), key=lambda node: -self._good[node.name]
        )
        summoned = [node for node in duty.targets if node.name in named and node not in by_time]
        return tuple((by_time + summoned)[:TOGETHER])

    def patience(self, targets: Iterable[Node]) -> float:
        """Seconds to wait for these: twice as long as they took lately."""
        longest = max((self._took.get(node.name, 0.0) for node in targets), default=0.0)
        return min(max(PATIENCE, 2 * longest + 0.05), MOST_PATIENCE)

    def _recent(self, name: str, now: float) -> bool:
        return now - self._good.get(name, float("-inf")) <= MEMORY

    def _answers(self, name: str, now: float) -> bool:
        return self._recent(name, now) and self._silent.get(name, float("-inf")) <= self._good[name]
