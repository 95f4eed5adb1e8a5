"""Whether a leader is to be passed over, by what witnesses have found of it. Pure.

A candidacy says that a node's agent lives, not that packets get through it: forwarding may be off, a firewall may drop
them, its port may be blocked. Witnesses try, and put what they saw into etcd (`model.Verdict`): the members of its
location who stand for leader themselves, and the leaders of other locations whom those could not reach. One of
them is never believed alone, and none of them if nothing would be gained. A leader is passed over if

* somebody can do better: a candidate of its segment has just shaken hands with one of those whom it does not reach
  through the leader. When the far location is down, or everything, nobody has, and nothing moves;
* two have seen it at least;
* and it is the leader's fault, not the witness's: it answers a member on their own network, and still does not pass
  it through; or it answers none of more than half of its location's panel (the first few candidates), who answer each
  other; or it answers neither a member nor a leader elsewhere.

Who was passed over stands again behind everyone (`CandidateClass.PASSED_OVER`) and takes over from nobody, so each
candidate is passed over once at most before the agents' patience with it is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from kilo_etcd.model import Candidate, CandidateClass, Verdict

WITNESSES = 2
"""So many have to say it."""

PANEL = 5
"""So many candidates at the head of the queue, the leader among them, are the witnesses of their location."""


def successors(leader: Candidate, others: Mapping[str, Candidate], verdicts: Iterable[Verdict]) -> frozenset[str]:
    """Who of `others`, the further candidates of the segment as they stand in the queue, can lead instead of `leader`;
    empty: it is not passed over. The order of the verdicts makes no difference."""
    said = [one for one in verdicts if one.leader == leader.node and one.candidacy == leader.create_revision]
    said = [one for one in said if one.witness != leader.node]
    if len(said) < WITNESSES:
        return frozenset()
    able = frozenset(
        one.witness
        for one in said
        if one.reaches and one.witness in others and others[one.witness].rank is not CandidateClass.PASSED_OVER
    )
    panel = frozenset(islice(others, PANEL - 1))
    near = [one for one in said if one.witness in panel]
    far = [one for one in said if one.witness not in others]
    alone = sum(not one.answers and one.fellows for one in near)
    guilty = (
        any(one.answers for one in near)
        or alone * 2 > len(panel) + 1
        or (any(not one.answers for one in near) and any(not one.answers for one in far))
    )
    return able if guilty else frozenset()


def sentence(leader: str, verdicts: Iterable[Verdict]) -> str:
    """Why node `leader` is demoted, as the end of a sentence about it."""
    said = sorted((one for one in verdicts if one.leader == leader), key=lambda one: one.witness)
    names = " and ".join(one.witness for one in said)
    targets = sorted({target for one in said if one.reaches for target in one.targets})
    return f"{names} found no way through it, to {', '.join(targets)} for instance"
