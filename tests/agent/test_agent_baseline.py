"""How often a prober without a baseline makes its report: a state machine in virtual time, no agent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from kilo_etcd.agent.probing.baseline import LONGEST_PAUSE, OPEN_SECONDS, PAUSE, NoBaseline
from kilo_etcd.model import Node

TRY_SECONDS = 0.75


def reports(seconds: float, targets: Callable[[float], list[str]], baseline: NoBaseline | None = None) -> list[float]:
    """When reports were made, each of which came to nothing; `targets` are the names of those that are tried."""
    baseline = baseline or NoBaseline()
    made: list[float] = []
    now = 0.0
    while now < seconds:
        if baseline.over(now):
            baseline.close(now)
        if baseline.opened is None and baseline.silent(
            [Node(name=name, public_key=name) for name in targets(now)], now
        ):
            baseline.open(now)
            made.append(now)
        now += TRY_SECONDS
    return made


def test_reports_that_come_to_nothing_are_made_ever_less_often() -> None:
    made = reports(3000, lambda _now: ["b", "c"])
    pauses = [later - earlier - OPEN_SECONDS for earlier, later in pairwise(made)]
    assert [round(pause / PAUSE) for pause in pauses] == [1, 2, 4, 8, 16, 20, 20, 20]


def test_targets_that_come_and_go_do_not_cut_the_pauses_short_for_ever() -> None:
    steady = reports(7200, lambda _now: ["b", "c"])
    for period in (10, 60, 300):
        coming = reports(7200, partial(lambda period, now: ["b", f"new-{now // period}"], period))
        assert len(coming) <= len(steady) + 6, f"one new target every {period} s"
        assert max(later - earlier for earlier, later in pairwise(coming)) <= LONGEST_PAUSE + 20
    assert len(reports(7200, lambda now: ["b", "c"] if now // 60 % 2 else ["b"])) <= len(steady) + 6


def test_a_new_target_is_tried_soon() -> None:
    made = reports(3000, lambda now: ["b"] if now < 2200 else ["b", "c"])
    assert any(2200 < one < 2200 + PAUSE + 2 * TRY_SECONDS for one in made)
