"""When the host's candidacy is decided again: after each apply, and when a wait is over."""

from __future__ import annotations

from collections.abc import Callable

import trio

from kilo_etcd.agent.leadership.candidacy import CandidacyTask
from kilo_etcd.agent.snapshot_applier import SnapshotApplier
from kilo_etcd.agent.snapshot_follower import SnapshotFollower


async def follow_candidacy(
    candidacy: CandidacyTask, snapshots: SnapshotFollower, applier: SnapshotApplier, *, leaving: Callable[[], bool]
) -> None:
    """Hold the candidacy that `candidacy_policy` wants, until cancelled; an agent that is `leaving` holds none."""
    while True:
        applied, snapshot, state = applier.applied, snapshots.snapshot, applier.state
        due = None
        if snapshot is not None and state.topology is not None and not leaving():
            ready = state.ready and state.revision >= snapshot.revision
            # Leaders are to be first in an etcd that was adopted.
            if state.leads or not snapshots.waits:
                due = await candidacy.update(
                    snapshot, state.topology, leads=state.leads, ready=ready, refused=state.refused_families
                )
        with trio.move_on_at(due if due is not None else float("inf")):
            await applied.wait()
