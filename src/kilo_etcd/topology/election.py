"""Elects the leader of a segment: a pure function of its members, their candidacies, the probe reports, and the leader
on record.

The problem. A segment's packets to other segments go through one node. When that node stops, crashes, or lets nothing
through, another must lead, soon, and every host must agree on which: WireGuard accepts a source address from one peer
only, so hosts that disagree drop each other's packets.

Why it is hard. A lease proves that an agent runs and reaches etcd. It does not prove that packets get through its host.
Whoever finds that nothing gets through cannot tell by itself where the fault is: in its leader, in itself, on the path,
or at the far end. A wrong answer is worse than none, since it moves a leader that works. And the hosts that decide
are those whose network is broken, so they cannot hold a vote among themselves.

The rule has three parts:

1. The queue. Candidacies are keys under short leases. Their order is the class, then etcd's create revision; the first
   one leads. A host that comes back has a later revision, so it takes over from nobody of its class or of a better one.
2. The reports. Probers write what they find into etcd, about one candidacy of one leader, and decide nothing.
   `topology.probe_reports.successors` decides: at least two report it, the fault is the leader's, and one candidate has
   completed a WireGuard handshake with a target that is not reached through the leader. Then the first such candidate
   leads. A report counts only if its prober is a candidate of the segment, or is no member of it and has tried one.
3. Without candidates the last leader on record leads; without a record, the best class and the oldest registration.

Why it is right:

* Agreement. Everything is read from one snapshot, so hosts at one revision elect the same node, in whatever order
  things arrived. The deletion of a candidacy is itself the change of leader; no second round trip can fail.
* An answer always. The last part needs no more than members. A site that has lost etcd as a whole has no candidates,
  and keeps the leader that both sides know.
* A change helps. Only a candidate that has just shown a path of its own takes over. If the far end is down, or
  everything, nobody has one and nothing moves.
* It ends. A demoted host gives its candidacy up and comes back in the class DEMOTED, behind all others, and a candidate
  of that class takes over from nobody. Reports name the create revision of a candidacy, so old ones do not count
  against the next. Whatever probers report, each candidate is demoted once at most before its hold-down is over. (That
  ends early if the operator chooses the host, its agent starts anew, or it finds that its obstacle is gone.)

What it does not promise:

* That all hosts change at the same moment. They apply a revision some milliseconds apart, which is the gap of a change.
* That the leader forwards everything. Probes and the takeover check go between leaders; networks behind nodes, and what
  a firewall does to other packets, are not tried.
* A change for each fault. Of two hosts that do not reach each other while both are reached from elsewhere, neither is
  demoted. A candidate behind a NAT that the targets cannot meet passes no takeover check.
* A second demotion at once. While the candidacy of a demoted host stands (until it gives it up, or its lease ends),
  reports on its successor are not considered.
* Safety from malice. Whoever can write probe reports can write candidacies too.

Who probes whom, and when, is in `agent.probing`; which candidacy a host enters, in `agent.leadership.candidacy_policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from attrs import frozen

from kilo_etcd.model import Candidate, Node, ProbeReport
from kilo_etcd.topology.probe_reports import successors


class Reason(StrEnum):
    """Why a node leads."""

    ALONE = "it is alone in its segment"
    CANDIDATE = "it is the best candidate"
    RECORDED = "it led before the last candidate went"
    INSTEAD = "the best candidate does not forward, as probers report"
    FALLBACK = "no candidate and no leader on record: best class, then oldest registration"


@frozen
class Election:
    """`next_in_line` leads when the leader's candidacy ends; None if there is no other candidate."""

    leader: str
    next_in_line: str | None
    reason: Reason
    order: tuple[str, ...] = ()
    """All candidates in the order of the queue, the leader first if none is demoted."""
    demoted: str | None = None
    """The node that would lead, but does not forward."""


def elect(
    members: Sequence[Node],
    candidates: Sequence[Candidate],
    recorded: Sequence[str] = (),
    probe_reports: Sequence[ProbeReport] = (),
) -> Election:
    """Elect the leader of one segment from `members` (at least one).

    Candidates that are no member, or have no internal IP while there are others to serve, do not count. The best rank
    leads, then the lowest create revision (names break ties that etcd cannot produce); if by `probe reports` it does
    not forward, the best of those who can do so instead. ValueError: no members.
    """
    if not members:
        raise ValueError("a segment without members cannot have a leader")
    by_name = {node.name: node for node in members}
    if len(by_name) == 1:
        return Election(members[0].name, None, Reason.ALONE)
    candidacies: dict[str, Candidate] = {}
    for candidate in sorted(
        candidates, key=lambda candidate: (candidate.rank, candidate.create_revision, candidate.node)
    ):
        if candidate.node in by_name and by_name[candidate.node].internal_ips:
            # A node may stand twice for a moment (relabelled there and back); its better offer counts.
            candidacies.setdefault(candidate.node, candidate)
    if candidacies:
        order = tuple(candidacies)
        first, *others = order
        # A member that is not a candidate any more is neither a voter nor somebody elsewhere; nor is one that has moved
        # away, whose report is still there: a prober elsewhere has tried members of this segment.
        probe_reports = [
            report
            for report in probe_reports
            if report.prober in candidacies
            or (report.prober not in by_name and any(target in by_name for target in report.targets))
        ]
        able = (
            successors(candidacies[first], {name: candidacies[name] for name in others}, probe_reports)
            if probe_reports
            else ()
        )
        if able:
            # A prober that can take over leads; the demoted one comes last, as it will when it stands anew.
            line = sorted(others, key=lambda name: name not in able)
            return Election(line[0], [*line[1:], first][0], Reason.INSTEAD, order, first)
        return Election(first, others[0] if others else None, Reason.CANDIDATE, order)
    if (last := next((name for name in recorded if name in by_name), None)) is not None:
        return Election(last, None, Reason.RECORDED)
    best = min(
        members, key=lambda node: (not node.internal_ips, node.candidate_class, node.registered_revision, node.name)
    )
    return Election(best.name, None, Reason.FALLBACK)
