"""Who leads a segment: a pure function of its members, their candidacies and the leader on record.

It promises the same answer to everyone who has the same snapshot, whatever order things come in, and an
answer always: a segment is never without a leader, even before the first candidate or after the last one.
It does not judge whether a leader is alive; the short lease of a candidacy did that already.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from attrs import frozen

from kilo_etcd.model import Candidate, Node


class Reason(StrEnum):
    """Why a node leads."""

    ALONE = "it is alone in its segment"
    CANDIDATE = "it is the best candidate"
    RECORDED = "it led before the last candidate went"
    FALLBACK = "nobody stands and nobody is on record: best class, then oldest registration"


@frozen
class Election:
    """`next_in_line` leads when the leader's candidacy ends; None when nobody else stands."""

    leader: str
    next_in_line: str | None
    reason: Reason


def elect(members: Sequence[Node], candidates: Sequence[Candidate], recorded: str | None) -> Election:
    """Elect the leader of one segment from `members` (at least one).

    Candidates that are no member, or have no internal IP while there are others to serve, are passed over.
    The best rank leads, then the lowest create revision (names break ties that etcd cannot produce).
    ValueError: no members.
    """
    if not members:
        raise ValueError("a segment without members cannot have a leader")
    by_name = {node.name: node for node in members}
    if len(by_name) == 1:
        return Election(members[0].name, None, Reason.ALONE)
    standing = sorted(
        (candidate.rank, candidate.create_revision, candidate.node)
        for candidate in candidates
        if candidate.node in by_name and by_name[candidate.node].internal_ips
    )
    # A node may stand twice for a moment (relabelled there and back); its better offer counts.
    order = list(dict.fromkeys(name for _, _, name in standing))
    if order:
        return Election(order[0], order[1] if len(order) > 1 else None, Reason.CANDIDATE)
    if recorded is not None and recorded in by_name:
        return Election(recorded, None, Reason.RECORDED)
    best = min(
        members, key=lambda node: (not node.internal_ips, node.candidate_class, node.registered_revision, node.name)
    )
    return Election(best.name, None, Reason.FALLBACK)
