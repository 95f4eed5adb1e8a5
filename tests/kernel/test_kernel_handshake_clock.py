"""The age of handshakes while the host's clock is set, forward and back."""

from __future__ import annotations

import pytest
from kernel_worlds import key

from kilo_etcd.kernel.handshake_clock import HandshakeClock
from kilo_etcd.kernel.state import ObservedPeer

DAY = 86400.0


class Clocks:
    """A host's two clocks, and a device that dates by the wall's."""

    def __init__(self) -> None:
        self.wall, self.boot = 1.7e9, 100.0
        self.handshakes: dict[str, float] = {}

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds

    def shake_hands(self, peer: str) -> None:
        self.handshakes[peer] = self.wall

    def clock(self) -> HandshakeClock:
        return HandshakeClock(lambda: self.wall, lambda: self.boot)

    def ages(self, clock: HandshakeClock) -> dict[str, float]:
        peers = {peer: ObservedPeer(public_key=peer, last_handshake=when) for peer, when in self.handshakes.items()}
        now = clock.now()
        return {name: round(now - peer.last_handshake, 3) for name, peer in clock.date(peers).items()}


ONE, TWO = key(1), key(2)


@pytest.mark.parametrize("jump", [DAY, -DAY, 0.0, 3.0, -3.0])
def test_a_clock_that_is_set_changes_no_age(jump: float) -> None:
    clocks = Clocks()
    clock = clocks.clock()
    clocks.shake_hands(ONE)
    clocks.pass_by(50)
    assert clocks.ages(clock) == {ONE: 50}
    clocks.wall += jump
    clocks.pass_by(10)
    assert clocks.ages(clock) == {ONE: 60}
    clocks.shake_hands(TWO)
    clocks.pass_by(5)
    assert clocks.ages(clock) == {ONE: 65, TWO: 5}
    # And back again, as time synchronisation does in the end.
    clocks.wall -= jump
    clocks.pass_by(100)
    assert clocks.ages(clock) == {ONE: 165, TWO: 105}
    clocks.shake_hands(ONE)
    clocks.pass_by(7)
    assert clocks.ages(clock) == {ONE: 7, TWO: 112}


def test_a_handshake_from_the_future_ages_from_when_it_is_first_seen() -> None:
    clocks = Clocks()
    clocks.handshakes[ONE] = clocks.wall + DAY
    clock = clocks.clock()
    assert clocks.ages(clock) == {ONE: 0}
    clocks.pass_by(200)
    assert clocks.ages(clock) == {ONE: 200}


def test_who_was_never_heard_and_who_is_gone() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    peers = {ONE: ObservedPeer(public_key=ONE)}
    assert clock.date(peers) == peers
    clocks.shake_hands(TWO)
    clocks.ages(clock)
    clocks.wall += DAY
    clocks.ages(clock)
    clocks.handshakes.clear()
    assert clocks.ages(clock) == {}
    clocks.shake_hands(TWO)
    clocks.pass_by(1)
    assert clocks.ages(clock) == {TWO: 1}


def test_as_long_as_nobody_sets_the_clock_nothing_is_copied() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    peer = ObservedPeer(public_key=ONE, last_handshake=clocks.wall)
    clocks.pass_by(9)
    assert clock.date({ONE: peer})[ONE] is peer


def test_how_far_a_clock_went_back_is_known_and_undone_by_going_forward() -> None:
    clocks = Clocks()
    clock = clocks.clock()

    def set_by(seconds: float) -> float:
        clocks.wall += seconds
        clocks.pass_by(10)
        clocks.ages(clock)
        return round(clock.set_back, 3)

    assert [set_by(DAY), set_by(-DAY), set_by(-DAY), set_by(0), set_by(1.5 * DAY)] == [
        0,
        DAY,
        2 * DAY - 10,
        2 * DAY - 20,
        DAY / 2 - 30,
    ]
    assert [set_by(-100) for _ in range(2)] == [DAY / 2 + 60, DAY / 2 + 150], "steps add up"
    assert clock.seen


def test_what_a_clock_has_caught_up_is_no_part_of_the_next_step() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    clocks.wall -= 3600
    clocks.ages(clock)
    assert round(clock.set_back) == 3600
    clocks.pass_by(7200)
    clocks.ages(clock)
    assert round(clock.set_back) == 0
    before = clocks.wall
    clocks.wall -= 130
    clocks.ages(clock)
    assert (round(clock.set_back), round(clock.was_at)) == (130, round(before))


def test_a_handshake_dated_ahead_shows_that_the_clock_went_back_before_the_agent_began() -> None:
    clocks = Clocks()
    clocks.wall += DAY
    clocks.shake_hands(ONE)
    clocks.wall -= DAY
    clocks.pass_by(60)
    clock = clocks.clock()
    assert clocks.ages(clock) == {ONE: 0}
    assert round(clock.set_back) == DAY - 60
    assert round(clock.was_at) == round(clocks.handshakes[ONE])
    assert not clock.seen
    clocks.wall -= 600
    clocks.ages(clock)
    assert clock.seen


def test_the_date_is_known_from_which_a_clock_went_back() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    clocks.pass_by(50)
    before = clocks.wall
    clocks.wall -= DAY
    clocks.ages(clock)
    assert round(clock.was_at) == round(before)
    clocks.pass_by(500)
    clocks.ages(clock)
    assert round(clock.was_at) == round(before), "it stays"
