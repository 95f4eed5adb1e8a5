"""Lines of the log that are said again and again."""

from __future__ import annotations

import random

from kilo_etcd.agent.repeats import BURST, KINDS, LEFT_OUT, PAUSE, Line, Repeats


def line(number: int, event: str = "applied", level: str = "info", **fields: object) -> Line:
    return Line(level, {"event": event, "number": number, **fields})


def numbers(lines: list[Line]) -> list[object]:
    return [one.event["number"] for one in lines]


def test_the_first_are_said_at_once_then_the_newest_now_and_then_and_the_last() -> None:
    repeats = Repeats()
    said = [repeats.offer(line(number), now=0.0) for number in range(BURST)]
    assert [numbers(one) for one in said] == [[number] for number in range(BURST)]
    assert all(LEFT_OUT not in one.event for lines in said for one in lines)
    for second in range(1, int(PAUSE)):
        assert repeats.offer(line(100 + second), now=float(second)) == []
        assert repeats.due(float(second)) == []
    (newest,) = repeats.due(PAUSE)
    assert newest.event == {"event": "applied", "number": 109, LEFT_OUT: int(PAUSE) - 2}
    assert repeats.due(PAUSE) == []
    assert repeats.offer(line(200), now=PAUSE + 1) == []
    assert numbers(repeats.due(2 * PAUSE)) == [200]


def test_after_a_quiet_time_there_is_a_burst_again() -> None:
    repeats = Repeats()
    for _ in range(2):
        start = 1e6 * _
        assert sum(len(repeats.offer(line(number), now=start)) for number in range(3 * BURST)) == BURST
        assert numbers(repeats.due(start + PAUSE)) == [3 * BURST - 1]


def test_other_sentences_levels_and_nodes_are_of_another_kind() -> None:
    repeats = Repeats()
    for number in range(2 * BURST):
        repeats.offer(line(number), now=0.0)
    for other in (line(1, "leader elected"), line(1, level="warning"), line(1, node="other")):
        assert repeats.offer(other, now=0.0) == [other]


def test_what_was_left_out_is_said_with_the_next_line_of_any_kind_and_at_the_end() -> None:
    repeats = Repeats()
    for number in range(BURST + 5):
        repeats.offer(line(number), now=0.0)
    assert numbers(repeats.offer(line(1, "other"), now=PAUSE)) == [BURST + 4, 1]
    repeats.offer(line(99), now=PAUSE)
    assert numbers(repeats.rest()) == [99]
    assert repeats.rest() == []


def test_of_very_many_kinds_the_oldest_are_forgotten_and_their_last_line_is_said() -> None:
    repeats = Repeats()
    for number in range(BURST + 1):
        repeats.offer(line(number, "old"), now=0.0)
    said = [one for number in range(KINDS) for one in repeats.offer(line(number, f"kind {number}"), now=0.0)]
    assert len(said) == KINDS + 1
    assert line(BURST, "old") in said
    assert len(repeats._kinds) == KINDS


def test_no_line_is_unaccounted_for_and_the_last_of_each_kind_is_said() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        repeats = Repeats()
        now, said = 0.0, []
        given = [line(number, rng.choice("abc")) for number in range(300)]
        for one in given:
            now += rng.choice((0.0, 0.01, 1.0, 15.0))
            said += repeats.offer(one, now)
        said += repeats.rest()
        assert len(said) + sum(int(one.event.get(LEFT_OUT, 0)) for one in said) == len(given)
        for kind in "abc":
            last = [one.event["number"] for one in given if one.event["event"] == kind][-1]
            assert [one.event["number"] for one in said if one.event["event"] == kind][-1] == last


def test_a_clock_that_stands_still_or_goes_back_is_survived() -> None:
    repeats = Repeats()
    for number in range(2 * BURST):
        repeats.offer(line(number), now=100.0)
    assert repeats.due(50.0) == []
    assert numbers(repeats.due(50.0 + PAUSE)) == [2 * BURST - 1]
