"""How far an agent has come: which phase follows which, and what runs in each."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kilo_etcd.agent.lifecycle import Lifecycle, Phase

ALLOWED = {
    (Phase.STARTING, Phase.FOLLOWING),
    (Phase.FOLLOWING, Phase.FORWARDING),
    (Phase.FOLLOWING, Phase.JOINED),
    (Phase.FORWARDING, Phase.JOINED),
}


@pytest.mark.parametrize(
    "way",
    [
        (Phase.STARTING, Phase.FOLLOWING, Phase.JOINED),
        (Phase.STARTING, Phase.FOLLOWING, Phase.FORWARDING, Phase.JOINED),
    ],
)
def test_an_agent_joins_with_or_without_having_forwarded_before(way: tuple[Phase, ...]) -> None:
    lifecycle = Lifecycle()
    for before, phase in pairwise(way):
        assert lifecycle.phase is before
        lifecycle = lifecycle.to(phase)
    assert lifecycle.joined


@pytest.mark.parametrize("before", Phase)
@pytest.mark.parametrize("phase", Phase)
def test_no_other_step_is_taken(before: Phase, phase: Phase) -> None:
    if (before, phase) in ALLOWED:
        assert Lifecycle(before).to(phase) == Lifecycle(phase)
    else:
        with pytest.raises(ValueError, match=f"an agent that is {before.value} cannot be {phase.value} next"):
            Lifecycle(before).to(phase)


@pytest.mark.parametrize(
    ("phase", "follows_etcd", "reconciles", "joined"),
    [
        (Phase.STARTING, False, False, False),
        (Phase.FOLLOWING, True, False, False),
        (Phase.FORWARDING, True, True, False),
        (Phase.JOINED, True, True, True),
    ],
)
@pytest.mark.parametrize("leaving", [False, True])
def test_what_runs_at_a_step(phase: Phase, follows_etcd: bool, reconciles: bool, joined: bool, leaving: bool) -> None:
    lifecycle = Lifecycle(phase, leaving)
    assert (lifecycle.follows_etcd, lifecycle.reconciles, lifecycle.joined) == (follows_etcd, reconciles, joined)


@pytest.mark.parametrize("phase", Phase)
def test_an_agent_leaves_from_any_step_and_takes_none_after_that(phase: Phase) -> None:
    left = Lifecycle(phase).leave()
    assert (left.phase, left.leaving) == (phase, True)
    assert left.leave() == left
    for later in Phase:
        with pytest.raises(ValueError, match=f"{phase.value}, leaving cannot be"):
            left.to(later)
