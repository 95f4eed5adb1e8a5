"""Who leads a segment: a pure function of its members, their candidacies, what witnesses say, and the leader on record.

It promises the same answer to everyone who has the same snapshot, whatever order things come in, and an
answer always: a segment is never without a leader, even before the first candidate or after the last one.
It does not judge whether a leader is alive; the short lease of a candidacy did that already. Whether packets get
through it, witnesses say (`topology.verdicts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from attrs import frozen

from kilo_etcd.model import Candidate, Node, Verdict
from kilo_etcd.topology.verdicts import successors


class Reason(StrEnum):
    """Why a node leads."""

    ALONE = "it is alone in its segment"
    CANDIDATE = "it is the best candidate"
    RECORDED = "it led before the last candidate went"
    INSTEAD = "the best candidate does not forward, as witnesses say"
    FALLBACK = "nobody stands and nobody is on record: best class, then oldest registration"


@frozen
class Election:
    """`next_in_line` leads when the leader's candidacy ends; None when nobody else stands."""

    leader: str
    next_in_line: str | None
    reason: Reason
    order: tuple[str, ...] = ()
    """All candidates as they stand in the queue, the leader first where nobody is passed over."""
    passed_over: str | None = None
    """Who would lead, but does not forward."""


def elect(
    members: Sequence[Node],
    candidates: Sequence[Candidate],
    recorded: str | None,
    verdicts: Sequence[Verdict] = (),
) -> Election:
    """Elect the leader of one segment from `members` (at least one).

    Candidates that are no member, or have no internal IP while there are others to serve, do not count.
    The best rank leads, then the lowest create revision (names break ties that etcd cannot produce); if by `verdicts`
    it does not forward, the best of those who can do so instead. ValueError: no members.
    """
    if not members:
        raise ValueError("a segment without members cannot have a leader")
    by_name = {node.name: node for node in members}
    if len(by_name) == 1:
        return Election(members[0].name, None, Reason.ALONE)
    standing: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda one: (one.rank, one.create_revision, one.node)):
        if candidate.node in by_name and by_name[candidate.node].internal_ips:
            # A node may stand twice for a moment (relabelled there and back); its better offer counts.
            standing.setdefault(candidate.node, candidate)
    if standing:
        order = tuple(standing)
        first, *others = order
        # A member that stands no more is neither one of the panel nor somebody elsewhere; nor is one that has moved
        # away, whose word is still there: who is elsewhere has tried members of this segment.
        verdicts = [
            one
            for one in verdicts
            if one.witness in standing
            or (one.witness not in by_name and any(target in by_name for target in one.targets))
        ]
        able = successors(standing[first], {name: standing[name] for name in others}, verdicts) if verdicts else ()
        if able:
            # Who has proved that it can leads; the one passed over comes last, as it will when it stands anew.
            line = sorted(others, key=lambda name: name not in able)
            return Election(line[0], [*line[1:], first][0], Reason.INSTEAD, order, first)
        return Election(first, others[0] if others else None, Reason.CANDIDATE, order)
    if recorded is not None and recorded in by_name:
        return Election(recorded, None, Reason.RECORDED)
    best = min(
        members, key=lambda node: (not node.internal_ips, node.candidate_class, node.registered_revision, node.name)
    )
    return Election(best.name, None, Reason.FALLBACK)
