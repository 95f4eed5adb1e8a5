"""What the probe reports that stand say of the tunnels of leaders. Pure.

If no candidate could do better than the leader, because the tunnels of all are cut, or those of the far end, nobody is
elected in its place, and the reports stand: they are all that etcd holds of such tunnels.
"""

from __future__ import annotations

from collections.abc import Iterator

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.reports.report import DROPPED, MOST_SUBJECTS, Remark
from kilo_etcd.model import InternalIPs, ProbeReport
from kilo_etcd.topology.probe_reports import standing
from kilo_etcd.topology.segments import Topology


def unreached_through(topology: Topology) -> Iterator[Remark]:
    """One for each leader through which probers get no answer."""
    for segment in topology.segments.values():
        leader = segment.leader.name
        if not (reports := standing(leader, topology.snapshot)):
            continue
        clauses = [f"{report.prober} gets no answer from {_targets(report)}" for report in reports]
        first = reports[0]
        yield Remark(
            subject=leader,
            text=f"through it packets do not arrive: {first_of(clauses, MOST_SUBJECTS, '; ')}{_dropped(topology)}; "
            f"kgctl check tries its tunnels, kgctl explain {first.prober} {next(iter(first.targets), leader)} --live "
            "the whole way",
            about=leader,
        )


def unanswered(topology: Topology, one: str, other: str) -> str:
    """That packets get no answer through the tunnel between two leaders, by the first report on it, in a clause; empty:
    none says so."""
    for leader, far in ((one, other), (other, one)):
        if far not in topology.snapshot.nodes:
            continue
        beyond = {node.name for node in topology.segment_of(far).members}
        for report in standing(leader, topology.snapshot):
            targets = report.targets if report.prober in beyond else sorted(beyond.intersection(report.targets))
            if targets:
                return f"{report.prober} gets no answer from {targets[0]} through {leader}{_dropped(topology)}"
    return ""


def _targets(report: ProbeReport) -> str:
    return first_of(report.targets, MOST_SUBJECTS) or "anybody"


def _dropped(topology: Topology) -> str:
    return f"; {DROPPED}" if topology.internal_ips is InternalIPs.ENCRYPTED else ""
