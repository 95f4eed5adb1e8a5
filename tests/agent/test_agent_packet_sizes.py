"""Which packet sizes are tried, and what is believed of the answers."""

from __future__ import annotations

import random

import pytest

from kilo_etcd.agent.probing.packet_sizes import LOST_TIMES, SizeSearch


def measured(largest: int, *, mtu: int = 1420, floor: int = 576, loss: float = 0.0, seed: int = 0) -> tuple[int, int]:
    """The result for a way on which `largest` bytes pass, and how many packets it took."""
    rng, search, sent = random.Random(seed), SizeSearch(floor=floor, too_large=mtu), 0
    while (result := search.largest) is None:
        size, sent = search.next_size, sent + 1
        assert floor <= size < mtu
        search = search.tried(size, passes=size <= largest and rng.random() >= loss)
    return result, sent


@pytest.mark.parametrize("mtu", [577, 1280, 1420, 8920, 65455])
def test_every_size_is_found_to_the_byte(mtu: int) -> None:
    sizes = range(576, mtu) if mtu < 2000 else range(577, mtu, 97)
    assert [size for size in sizes if measured(size, mtu=mtu)[0] != size] == []


def test_below_the_smallest_mtu_nothing_is_measured() -> None:
    assert measured(575)[0] == 0
    assert measured(1279, floor=1280)[0] == 0
    assert measured(1280, floor=1280)[0] == 1280


def test_what_networks_mostly_carry_takes_few_packets() -> None:
    assert max(measured(size)[1] for size in (1280, 1340, 1400, 1412, 1419)) <= 7
    assert max(measured(size)[1] for size in range(576, 1420)) <= 17


def test_a_size_that_was_lost_by_chance_is_tried_again() -> None:
    search = SizeSearch(floor=576, too_large=1420).tried(1300, passes=False).tried(1299, passes=True)
    assert search.next_size == 1300
    search = search.tried(1300, passes=False)
    assert search.largest is None
    assert search.tried(1300, passes=False).largest == 1299, f"lost {LOST_TIMES} times"
    search = search.tried(1300, passes=True)
    assert (search.largest, search.next_size > 1300) == (None, True)


def test_a_way_that_loses_packets_is_rarely_measured_wrong() -> None:
    wrong = [seed for seed in range(1000) if measured(1300, loss=0.1, seed=seed)[0] != 1300]
    assert len(wrong) < 20
    assert all(measured(1300, loss=0.1, seed=seed)[0] < 1300 for seed in wrong), "too small, but it passes"
