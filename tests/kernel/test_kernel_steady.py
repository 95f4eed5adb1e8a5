"""The age of handshakes while the host's clock is set, forward and back."""

from __future__ import annotations

import pytest
from kernel_worlds import key

from kilo_etcd.kernel.state import ObservedPeer
from kilo_etcd.kernel.steady import SteadyTime

DAY = 86400.0


class Clocks:
    """A host's two clocks, and a device that dates by the wall's."""

    def __init__(self) -> None:
        self.wall, self.boot = 1.7e9, 100.0
        self.heard: dict[str, float] = {}

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds

    def shake_hands(self, peer: str) -> None:
        self.heard[peer] = self.wall

    def steady(self) -> SteadyTime:
        return SteadyTime(lambda: self.wall, lambda: self.boot)

    def ages(self, steady: SteadyTime) -> dict[str, float]:
        peers = {peer: ObservedPeer(public_key=peer, last_handshake=when) for peer, when in self.heard.items()}
        now = steady.now()
        return {name: round(now - peer.last_handshake, 3) for name, peer in steady.date(peers).items()}


ONE, TWO = key(1), key(2)


@pytest.mark.parametrize("jump", [DAY, -DAY, 0.0, 3.0, -3.0])
def test_a_clock_that_is_set_changes_no_age(jump: float) -> None:
    clocks = Clocks()
    steady = clocks.steady()
    clocks.shake_hands(ONE)
    clocks.pass_by(50)
    assert clocks.ages(steady) == {ONE: 50}
    clocks.wall += jump
    clocks.pass_by(10)
    assert clocks.ages(steady) == {ONE: 60}
    clocks.shake_hands(TWO)
    clocks.pass_by(5)
    assert clocks.ages(steady) == {ONE: 65, TWO: 5}
    # And back again, as time synchronisation does in the end.
    clocks.wall -= jump
    clocks.pass_by(100)
    assert clocks.ages(steady) == {ONE: 165, TWO: 105}
    clocks.shake_hands(ONE)
    clocks.pass_by(7)
    assert clocks.ages(steady) == {ONE: 7, TWO: 112}


def test_a_handshake_from_the_future_ages_from_when_it_is_first_seen() -> None:
    clocks = Clocks()
    clocks.heard[ONE] = clocks.wall + DAY
    steady = clocks.steady()
    assert clocks.ages(steady) == {ONE: 0}
    clocks.pass_by(200)
    assert clocks.ages(steady) == {ONE: 200}


def test_who_was_never_heard_and_who_is_gone() -> None:
    clocks = Clocks()
    steady = clocks.steady()
    peers = {ONE: ObservedPeer(public_key=ONE)}
    assert steady.date(peers) == peers
    clocks.shake_hands(TWO)
    clocks.ages(steady)
    clocks.wall += DAY
    clocks.ages(steady)
    clocks.heard.clear()
    assert clocks.ages(steady) == {}
    clocks.shake_hands(TWO)
    clocks.pass_by(1)
    assert clocks.ages(steady) == {TWO: 1}


def test_as_long_as_nobody_sets_the_clock_nothing_is_copied() -> None:
    clocks = Clocks()
    steady = clocks.steady()
    peer = ObservedPeer(public_key=ONE, last_handshake=clocks.wall)
    clocks.pass_by(9)
    assert steady.date({ONE: peer})[ONE] is peer
