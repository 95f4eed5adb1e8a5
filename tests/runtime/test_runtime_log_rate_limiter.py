"""Lines of the log that are said again and again."""

from __future__ import annotations

import random

from kilo_etcd.runtime.log_rate_limiter import BURST, KINDS, LEFT_OUT, PAUSE, Line, LogRateLimiter


def line(number: int, event: str = "applied", level: str = "info", **fields: object) -> Line:
    return Line(level, {"event": event, "number": number, **fields})


def numbers(lines: list[Line]) -> list[object]:
    return [one.event["number"] for one in lines]


def test_the_first_are_said_at_once_then_the_newest_now_and_then_and_the_last() -> None:
    limiter = LogRateLimiter()
    said = [limiter.offer(line(number), now=0.0) for number in range(BURST)]
    assert [numbers(lines) for lines in said] == [[number] for number in range(BURST)]
    assert all(LEFT_OUT not in one.event for lines in said for one in lines)
    for second in range(1, int(PAUSE)):
        assert limiter.offer(line(100 + second), now=float(second)) == []
        assert limiter.due(float(second)) == []
    (newest,) = limiter.due(PAUSE)
    assert newest.event == {"event": "applied", "number": 109, LEFT_OUT: int(PAUSE) - 2}
    assert limiter.due(PAUSE) == []
    assert limiter.offer(line(200), now=PAUSE + 1) == []
    assert numbers(limiter.due(2 * PAUSE)) == [200]


def test_after_a_quiet_time_there_is_a_burst_again() -> None:
    limiter = LogRateLimiter()
    for _ in range(2):
        start = 1e6 * _
        assert sum(len(limiter.offer(line(number), now=start)) for number in range(3 * BURST)) == BURST
        assert numbers(limiter.due(start + PAUSE)) == [3 * BURST - 1]


def test_other_sentences_levels_and_nodes_are_of_another_kind() -> None:
    limiter = LogRateLimiter()
    for number in range(2 * BURST):
        limiter.offer(line(number), now=0.0)
    for other in (line(1, "leader elected"), line(1, level="warning"), line(1, node="other")):
        assert limiter.offer(other, now=0.0) == [other]


def test_what_was_left_out_is_said_with_the_next_line_of_any_kind_and_at_the_end() -> None:
    limiter = LogRateLimiter()
    for number in range(BURST + 5):
        limiter.offer(line(number), now=0.0)
    assert numbers(limiter.offer(line(1, "other"), now=PAUSE)) == [BURST + 4, 1]
    limiter.offer(line(99), now=PAUSE)
    assert numbers(limiter.rest()) == [99]
    assert limiter.rest() == []


def test_of_very_many_kinds_the_oldest_are_forgotten_and_their_last_line_is_said() -> None:
    limiter = LogRateLimiter()
    for number in range(BURST + 1):
        limiter.offer(line(number, "old"), now=0.0)
    lines = [one for number in range(KINDS) for one in limiter.offer(line(number, f"kind {number}"), now=0.0)]
    assert len(lines) == KINDS + 1
    assert line(BURST, "old") in lines
    assert len(limiter._kinds) == KINDS


def test_no_line_is_unaccounted_for_and_the_last_of_each_kind_is_said() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        limiter = LogRateLimiter()
        now, lines = 0.0, []
        given = [line(number, rng.choice("abc")) for number in range(300)]
        for one in given:
            now += rng.choice((0.0, 0.01, 1.0, 15.0))
            lines += limiter.offer(one, now)
        lines += limiter.rest()
        assert len(lines) + sum(int(one.event.get(LEFT_OUT, 0)) for one in lines) == len(given)
        for kind in "abc":
            last = [one.event["number"] for one in given if one.event["event"] == kind][-1]
            assert [one.event["number"] for one in lines if one.event["event"] == kind][-1] == last


def test_a_clock_that_stands_still_or_goes_back_is_survived() -> None:
    limiter = LogRateLimiter()
    for number in range(2 * BURST):
        limiter.offer(line(number), now=100.0)
    assert limiter.due(50.0) == []
    assert numbers(limiter.due(50.0 + PAUSE)) == [2 * BURST - 1]
