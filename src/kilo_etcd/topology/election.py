"""Elects the leader of a segment: a pure function of its members, their candidacies, the probe reports, and the leader
on record.

It promises the same answer for the same snapshot, whatever order things come in, and an
answer always: a segment is never without a leader, even before the first candidate or after the last one.
It does not decide whether a leader is alive; the short lease of a candidacy did that already. Whether packets get
through it, probers report (`topology.probe_reports`).
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
    recorded: str | None,
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
    for candidate in sorted(candidates, key=lambda one: (one.rank, one.create_revision, one.node)):
        if candidate.node in by_name and by_name[candidate.node].internal_ips:
            # A node may stand twice for a moment (relabelled there and back); its better offer counts.
            candidacies.setdefault(candidate.node, candidate)
    if candidacies:
        order = tuple(candidacies)
        first, *others = order
        # A member that is not a candidate any more is neither a voter nor somebody elsewhere; nor is one that has moved
        # away, whose report is still there: a prober elsewhere has tried members of this segment.
        probe_reports = [
            one
            for one in probe_reports
            if one.prober in candidacies
            or (one.prober not in by_name and any(target in by_name for target in one.targets))
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
    if recorded is not None and recorded in by_name:
        return Election(recorded, None, Reason.RECORDED)
    best = min(
        members, key=lambda node: (not node.internal_ips, node.candidate_class, node.registered_revision, node.name)
    )
    return Election(best.name, None, Reason.FALLBACK)
