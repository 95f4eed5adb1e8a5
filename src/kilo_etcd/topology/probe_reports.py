"""Decides from the probe reports whether a leader is demoted. Pure. `topology.election` has the whole rule, and why.

A candidacy says that a node's agent lives, not that packets get through it: forwarding may be off, a firewall may drop
them, its port may be blocked. Probers try, and write what they found into etcd (`model.ProbeReport`): the members of
its location that are candidates themselves, and the leaders of other locations that those could not reach. One of them
alone never suffices, and none of them if nothing would be gained. A leader is demoted if

* another can take over: a candidate of its segment has just completed a handshake with one of those that it does not
  reach through the leader. When the far location is down, or everything, there is none, and nothing moves;
* at least two report it;
* and the fault is the leader's, not the prober's: it answers a member on their own network, and still does not forward
  for it; or it answers none of more than half of its location's voters (the first few candidates), which answer each
  other; or it answers neither a member nor a leader elsewhere.

A demoted node stands again behind everyone (`CandidateClass.DEMOTED`) and takes over from nobody, so each
candidate is demoted at most once before its hold-down is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from kilo_etcd.model import Candidate, CandidateClass, ProbeReport, Snapshot

PROBERS_NEEDED = 2
"""So many have to report it."""

VOTERS = 5
"""So many candidates at the head of the queue, the leader among them, are the voters of their location."""


def successors(
    leader: Candidate, others: Mapping[str, Candidate], probe_reports: Iterable[ProbeReport]
) -> frozenset[str]:
    """Those of `others`, the further candidates of the segment in the order of the queue, that can lead instead of
    `leader`; empty: it is not demoted. The order of the reports makes no difference."""
    reports = [
        report
        for report in probe_reports
        if report.leader == leader.node and report.candidacy == leader.create_revision
    ]
    reports = [report for report in reports if report.prober != leader.node]
    if len(reports) < PROBERS_NEEDED:
        return frozenset()
    able = frozenset(
        report.prober
        for report in reports
        if report.can_take_over and report.prober in others and others[report.prober].rank is not CandidateClass.DEMOTED
    )
    voters = frozenset(islice(others, VOTERS - 1))
    near = [report for report in reports if report.prober in voters]
    far = [report for report in reports if report.prober not in others]
    alone = sum(not report.leader_reachable and report.members_reachable for report in near)
    guilty = (
        any(report.leader_reachable for report in near)
        or alone * 2 > len(voters) + 1
        or (any(not report.leader_reachable for report in near) and any(not report.leader_reachable for report in far))
    )
    return able if guilty else frozenset()


def standing(leader: str, snapshot: Snapshot) -> tuple[ProbeReport, ...]:
    """The reports on node `leader` by the candidacies that it has now, by prober. If nobody can take over they stand
    as long as it leads."""
    node = snapshot.nodes.get(leader)
    if node is None:
        return ()
    held = {
        candidate.create_revision
        for candidate in snapshot.candidates.get(node.location, ())
        if candidate.node == leader
    }
    reports = snapshot.probe_reports.get(node.location, ())
    return tuple(
        sorted(
            (report for report in reports if report.leader == leader and report.candidacy in held),
            key=lambda report: report.prober,
        )
    )


def sentence(leader: str, probe_reports: Iterable[ProbeReport]) -> str:
    """Why node `leader` is demoted, as the end of a sentence about it."""
    reports = sorted(
        (report for report in probe_reports if report.leader == leader), key=lambda probe_report: probe_report.prober
    )
    names = " and ".join(report.prober for report in reports)
    reached = {target for report in reports if report.can_take_over for target in report.targets}
    # A prober may be another one's target.
    targets = sorted(reached.difference(report.prober for report in reports) or reached)
    return f"{names} found no way through it, to {', '.join(targets)} for instance"
