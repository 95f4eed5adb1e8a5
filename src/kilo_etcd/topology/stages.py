"""The stages by which a mesh switches to `encrypted` and back, and what each node may do at its stage. Pure.

Nothing may travel in clear between nodes of two segments, and a switch on a running mesh must lose nothing. So each
node goes through stages, one by one, and reports each in its record (`model.EncryptionStage`):

    on:    (none) --> ACCEPTS --> SENDS          back:   SENDS --> LEAVES --> STOPPED --> (none)

A stage is reported when the kernel holds it, and its promise is given up only after a snapshot shows that it
is not promised any more. All that others need is then in the snapshot:

* A node at ACCEPTS or SENDS takes packets from all nodes out of the tunnels: others may send there, and do.
* A node at SENDS sends so to all nodes that take it, as soon as it has applied the snapshot that has their stage. A
  node refuses its packets in clear from then on: that revision each agent reports, in a record of its own (`Living`).
* On the way back no node refuses (LEAVES), then none sends (STOPPED), then none accepts; a node is sent packets in
  clear as soon as it does not refuse them, and takes them from the tunnel as long as another node may send so.

No node waits for one that does not live: it is treated as its record says, and on the way back counts as having
gone all of it. A living agent has a record under its lease; as an agent that is being restarted has none for
a moment, it counts as gone only after a bound (`agent.stage_watch`). Nothing else depends on time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from attrs import field, frozen

from kilo_etcd.base.mappings import changes
from kilo_etcd.base.quoting import first_of
from kilo_etcd.model import ACCEPTING, EncryptionStage, InternalIPs, Node
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.topology.places import exchanged
from kilo_etcd.topology.segments import Segment, Topology

MAY_SEND = (*ACCEPTING, EncryptionStage.LEAVES)


@frozen(kw_only=True)
class Living:
    """What is known of other agents from their small records of the switch."""

    asked: frozenset[str] = frozenset()
    """The nodes that were asked about. Of others nothing is known, and they count as living and as having applied
    nothing."""
    applied: Mapping[str, int] = field(factory=dict)
    """The nodes whose agents live -> the newest revision that their kernels are known to have held."""

    def changed(self, before: Living) -> set[str]:
        """The nodes of which something else was known before."""
        return {*changes(before.applied, self.applied), *(before.asked ^ self.asked)}

    def lives(self, name: str) -> bool:
        """Whether a node may live."""
        return name in self.applied or name not in self.asked

    def knows_of(self, name: str, revision: int) -> bool:
        """Whether a node acts by the snapshot of `revision`, if it acts at all."""
        return name in self.asked and self.applied.get(name, revision) >= revision


NOBODY_ASKED = Living()


@frozen(kw_only=True)
class StageReport:
    """What a node's record must state of the switch."""

    stage: EncryptionStage | None = None
    accepts_since: int = 0

    @classmethod
    def of(cls, node: Node) -> StageReport:
        """What it says."""
        return cls(stage=node.encryption, accepts_since=node.accepts_since)


def in_force(topology: Topology) -> bool:
    """Whether the mesh encrypts, or is on its way to it."""
    return topology.internal_ips is InternalIPs.ENCRYPTED


def report(topology: Topology, plan: HostPlan) -> StageReport:
    """What the host's record must state once its kernel holds `plan`, which `encrypt` made of the same."""
    own = topology.snapshot.nodes[plan.node]
    own_report = StageReport.of(own)
    if in_force(topology):
        if own.encryption is EncryptionStage.SENDS:
            # A revision that is still to come is another etcd's (this one was restored, or begun anew), and nobody
            # would have applied it for long.
            since = min(own.accepts_since, topology.snapshot.revision)
            return StageReport(stage=EncryptionStage.SENDS, accepts_since=since)
        if own.encryption is EncryptionStage.ACCEPTS:
            return StageReport(stage=EncryptionStage.SENDS, accepts_since=topology.snapshot.revision)
        return StageReport(stage=EncryptionStage.ACCEPTS)
    if own.encryption in ACCEPTING:
        return StageReport(stage=EncryptionStage.LEAVES)
    if own.encryption is EncryptionStage.LEAVES:
        sends = plan.encryption is not None and plan.encryption.send
        return own_report if sends else StageReport(stage=EncryptionStage.STOPPED)
    return StageReport() if own.encryption is None or plan.encryption is None else own_report


@frozen(kw_only=True)
class SegmentPair:
    """A host and the leader of its segment, before another segment."""

    own: Node
    own_leader: Node
    leader: Node
    """Of the other segment."""
    on: bool
    """Whether the setting is in force."""
    since: int
    """The revision that put the present setting into force."""
    living: Living

    def sent_to(self, members: Iterable[Node]) -> frozenset[str]:
        """Those of the other segment's nodes that get what goes to them through the tunnel, or not at all."""
        if self.own.encryption not in MAY_SEND:
            return frozenset()
        if self.on:
            # What a leader does not take from the tunnels, or does not send into them, its members do not get.
            own_segment_accepts = self.own_leader.name == self.own.name or self.own_leader.encryption in ACCEPTING
            if not own_segment_accepts or self.leader.encryption not in ACCEPTING:
                return frozenset()
            return frozenset(node.name for node in members if node.encryption in ACCEPTING)
        sending = (node.name for node in members if node.encryption is EncryptionStage.SENDS)
        return frozenset(filter(self.living.lives, sending))

    @property
    def agreed(self) -> int:
        """The revision of a snapshot by which a node of the other segment sends the host nothing in clear."""
        return max(*(node.accepts_since for node in (self.own, self.own_leader, self.leader)), self.since)

    def refused(self, members: Iterable[Node]) -> frozenset[str]:
        """Those of the other segment's nodes that send this host nothing in clear any more."""
        if any(node.encryption is not EncryptionStage.SENDS for node in (self.own, self.own_leader, self.leader)):
            return frozenset()
        since, knows = self.agreed, self.living.knows_of
        if not knows(self.leader.name, since):
            return frozenset()
        return frozenset(n.name for n in members if n.encryption is EncryptionStage.SENDS and knows(n.name, since))

    def awaited(self, members: Iterable[Node]) -> frozenset[str]:
        """Those of the other segment of whom the host has to know whether they live, or what they have applied, before
        it goes on."""
        if not self.on:
            return frozenset(n.name for n in members if n.encryption in MAY_SEND and self.living.lives(n.name))
        if not self.own.encryption is self.leader.encryption is EncryptionStage.SENDS:
            return frozenset()
        since, knows = self.agreed, self.living.knows_of
        return frozenset(n.name for n in members if n.encryption is EncryptionStage.SENDS and not knows(n.name, since))


def before(segment: Segment, own: Node, own_leader: Node, topology: Topology, living: Living) -> SegmentPair:
    """A host before another segment, or on the way back its own."""
    return SegmentPair(
        own=own,
        own_leader=own_leader,
        leader=segment.leader,
        on=in_force(topology),
        since=topology.snapshot.internal_ips_since,
        living=living,
    )


def waited_for(topology: Topology, name: str, living: Living) -> frozenset[str]:
    """The nodes whose status the host needs (whether they live, what they have applied) before it goes on."""
    own = topology.snapshot.nodes.get(name)
    if own is None or own.encryption is None:
        return frozenset()
    segment = topology.segment_of(name)
    result: set[str] = set()
    for other in topology.segments.values():
        if not in_force(topology) or exchanged(segment, other, topology.policy):
            result |= before(other, own, segment.leader, topology, living).awaited(other.members)
    return frozenset(result - {name})


@frozen(kw_only=True)
class Switch:
    """How far a mesh is with the switch to `encrypted`, or with the way back. For people."""

    on: bool
    """Whether to it; else back."""
    nodes: int
    """Those that have a part in it."""
    waits_for: tuple[str, ...]
    """Those that have not gone all of it yet, and whose agents may live."""
    absent: tuple[str, ...] = ()
    """Those that have not, and whose agents do not live: no node waits for them."""

    def __str__(self) -> str:
        done = self.nodes - len(self.waits_for) - len(self.absent)
        text = f"{done} of {self.nodes} nodes {'encrypt' if self.on else 'are back'}"
        if self.waits_for:
            text += f", waits for {first_of(self.waits_for, MOST_NAMED)}"
        if self.absent:
            text += f", {'not' if self.on else 'not yet'} {first_of(self.absent, MOST_NAMED)}: no agent lives there"
        return text


def switch(topology: Topology, living: Collection[str] | None = None) -> Switch | None:
    """How far the mesh is; None: all of it is through. `living`: the nodes whose agents live; None: all may."""
    on, nodes = in_force(topology), topology.snapshot.nodes
    unfinished: list[str] = []
    for segment in topology.segments.values():
        ready = segment.leader.encryption is EncryptionStage.SENDS
        for node in segment.members:
            done = ready and node.encryption is EncryptionStage.SENDS if on else node.encryption is None
            if not done and node.name not in topology.left_out:
                unfinished.append(node.name)
    if not unfinished:
        return None
    lives = nodes if living is None else living
    return Switch(
        on=on,
        nodes=len(nodes) - len(topology.left_out),
        waits_for=tuple(sorted(name for name in unfinished if name in lives)),
        absent=tuple(sorted(name for name in unfinished if name not in lives)),
    )


MOST_NAMED = 5
