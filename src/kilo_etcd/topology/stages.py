"""The stages by which a mesh switches to `encrypted` and back, and what each node may do at its stage. Pure.

Between two segments' nodes nothing is to travel in clear, and a switch on a running mesh is to lose nothing. So each
node goes through stages, one by one, and reports each in its record (`model.EncryptionStage`):

    on:    (none) --> ACCEPTS --> SENDS          back:   SENDS --> LEAVES --> STOPPED --> (none)

A stage is reported when the kernel holds it, and what it promises is given up only after a snapshot shows that it is
not promised any more. All that others need to know is then in the snapshot:

* Who is ACCEPTS or SENDS takes packets from all nodes out of the tunnels: others may send there, and do.
* Who is SENDS sends so to all who take it, as soon as it has applied the snapshot that says so of them. A node
  refuses its packets in clear from then on: that revision each agent reports, in a record of its own (`Living`).
* On the way back nobody refuses (LEAVES), then nobody sends (STOPPED), then nobody accepts; a node is sent packets in
  clear as soon as it does not refuse them, and takes them from the tunnel as long as somebody may send so.

Who does not live is waited for by nobody: it is treated as its record says, and on the way back counts as having gone
all of it. Who does is known by its record under its agent's lease; as an agent that is being restarted has none for a
moment, it counts as gone only after a bound (`agent.others`). Nothing else follows from the time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from attrs import field, frozen

from kilo_etcd.model import ACCEPTING, EncryptionStage, InternalIPs, Node
from kilo_etcd.quoting import first_of
from kilo_etcd.topology.hostplan import HostPlan
from kilo_etcd.topology.places import exchanged
from kilo_etcd.topology.segments import Segment, Topology, changes

MAY_SEND = (*ACCEPTING, EncryptionStage.LEAVES)


@frozen(kw_only=True)
class Living:
    """What is known of other agents by their small records of the switch."""

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
        """Whether a node acts by what stands in the snapshot of `revision`, if it acts at all."""
        return name in self.asked and self.applied.get(name, revision) >= revision


NOBODY_ASKED = Living()


@frozen(kw_only=True)
class Report:
    """What a node's record is to say of the switch."""

    stage: EncryptionStage | None = None
    accepts_since: int = 0

    @classmethod
    def of(cls, node: Node) -> Report:
        """What it says."""
        return cls(stage=node.encryption, accepts_since=node.accepts_since)


def in_force(topology: Topology) -> bool:
    """Whether the mesh encrypts, or is on its way to it."""
    return topology.internal_ips is InternalIPs.ENCRYPTED


def report(topology: Topology, plan: HostPlan) -> Report:
    """What the record of the host is to say once its kernel holds `plan`, which `encrypt` made of the same."""
    own = topology.snapshot.nodes[plan.node]
    said = Report.of(own)
    if in_force(topology):
        if own.encryption is EncryptionStage.SENDS:
            # A revision that is still to come is another etcd's (this one was restored, or begun anew), and nobody
            # would have applied it for long.
            since = min(own.accepts_since, topology.snapshot.revision)
            return Report(stage=EncryptionStage.SENDS, accepts_since=since)
        if own.encryption is EncryptionStage.ACCEPTS:
            return Report(stage=EncryptionStage.SENDS, accepts_since=topology.snapshot.revision)
        return Report(stage=EncryptionStage.ACCEPTS)
    if own.encryption in ACCEPTING:
        return Report(stage=EncryptionStage.LEAVES)
    if own.encryption is EncryptionStage.LEAVES:
        sends = plan.encryption is not None and plan.encryption.send
        return said if sends else Report(stage=EncryptionStage.STOPPED)
    return Report() if own.encryption is None or plan.encryption is None else said


@frozen(kw_only=True)
class Pair:
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

    def sends(self, node: Node) -> bool:
        """Whether what goes to a node of the other segment goes through the tunnel, or nowhere."""
        if self.own.encryption not in MAY_SEND:
            return False
        if self.on:
            # What a leader does not take from the tunnels, or does not send into them, its members do not get.
            here = self.own_leader.name == self.own.name or self.own_leader.encryption in ACCEPTING
            return here and node.encryption in ACCEPTING and self.leader.encryption in ACCEPTING
        return node.encryption is EncryptionStage.SENDS and self.living.lives(node.name)

    @property
    def agreed(self) -> int:
        """The revision of a snapshot by which a node of the other segment sends the host nothing in clear."""
        return max(*(one.accepts_since for one in (self.own, self.own_leader, self.leader)), self.since)

    def refused(self, members: Iterable[Node]) -> frozenset[str]:
        """Those of the other segment's nodes who send this host nothing in clear any more."""
        if any(one.encryption is not EncryptionStage.SENDS for one in (self.own, self.own_leader, self.leader)):
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


def before(segment: Segment, own: Node, own_leader: Node, topology: Topology, living: Living) -> Pair:
    """A host before another segment, or on the way back its own."""
    return Pair(
        own=own,
        own_leader=own_leader,
        leader=segment.leader,
        on=in_force(topology),
        since=topology.snapshot.internal_ips_since,
        living=living,
    )


def waited_for(topology: Topology, name: str, living: Living) -> frozenset[str]:
    """The nodes of whom the host has to know whether they live or what they have applied, before it goes on."""
    own = topology.snapshot.nodes.get(name)
    if own is None or own.encryption is None:
        return frozenset()
    segment = topology.segment_of(name)
    found: set[str] = set()
    for there in topology.segments.values():
        if not in_force(topology) or exchanged(segment, there, topology.snapshot.granularity):
            found |= before(there, own, segment.leader, topology, living).awaited(there.members)
    return frozenset(found - {name})


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
    """Those that have not, and whose agents do not live: nobody waits for them."""

    def __str__(self) -> str:
        done = self.nodes - len(self.waits_for) - len(self.absent)
        said = f"{done} of {self.nodes} nodes {'encrypt' if self.on else 'are back'}"
        if self.waits_for:
            said += f", waits for {first_of(self.waits_for, MOST_NAMED)}"
        if self.absent:
            said += f", {'not' if self.on else 'not yet'} {first_of(self.absent, MOST_NAMED)}: no agent lives there"
        return said


def switch(topology: Topology, living: Collection[str] | None = None) -> Switch | None:
    """How far the mesh is; None: all of it is through. `living`: the nodes whose agents live; None: all may."""
    on, nodes = in_force(topology), topology.snapshot.nodes
    left: list[str] = []
    for segment in topology.segments.values():
        ready = segment.leader.encryption is EncryptionStage.SENDS
        for node in segment.members:
            done = ready and node.encryption is EncryptionStage.SENDS if on else node.encryption is None
            if not done and node.name not in topology.left_out:
                left.append(node.name)
    if not left:
        return None
    lives = nodes if living is None else living
    return Switch(
        on=on,
        nodes=len(nodes) - len(topology.left_out),
        waits_for=tuple(sorted(name for name in left if name in lives)),
        absent=tuple(sorted(name for name in left if name not in lives)),
    )


MOST_NAMED = 5
