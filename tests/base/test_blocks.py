"""Blocks against a dict, through any changes."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_etcd.base.blocks import Blocks
from kilo_etcd.base.mappings import changes

keys = st.integers(0, 400)
items = st.dictionaries(keys, st.integers(0, 3), max_size=30)
many = st.sampled_from([{}, dict.fromkeys(range(10), 1), dict.fromkeys(range(400), 1)])
steps = st.lists(st.tuples(items | many, st.lists(keys, max_size=10) | many), max_size=8)


@given(many, steps)
def test_blocks_follow_changes_as_a_dict_does(
    start: dict[int, int], sequence: list[tuple[dict[int, int], list[int] | dict[int, int]]]
) -> None:
    expected, blocks = start.copy(), Blocks(start)
    for come, gone in sequence:
        before, former = expected.copy(), blocks
        expected = {**{key: value for key, value in expected.items() if key not in gone}, **come}
        blocks = blocks.after(come, gone)
        assert dict(blocks.items()) == expected
        assert dict(former.items()) == before, "the former one is as it was"
        assert len(blocks) == len(expected)
        assert list(blocks) == [key for key, _ in blocks.items()]
        assert list(blocks.values()) == [value for _, value in blocks.items()]
        assert blocks == Blocks(expected) == expected
        assert (blocks == former) is (expected == before)
        assert (blocks is former) is (expected == before)
        assert sorted(changes(former, blocks)) == sorted(changes(before, expected))
        assert all((key in blocks) is (key in expected) for key in range(401))
        assert all(blocks.get(key) == expected.get(key) for key in range(401))


@pytest.mark.parametrize(
    ("first", "step"),
    [("10.0.0.0", 1 << bits) for bits in (0, 8, 16)] + [("fd00::1:0:1", 1 << bits) for bits in range(0, 80, 16)],
)
def test_networks_spread_over_all_blocks_in_whatever_place_they_differ(first: str, step: int) -> None:
    blocks = Blocks({ip_network(ip_address(first) + number * step): number for number in range(4000)})
    sizes = [len(block) for block in blocks._blocks]
    assert max(sizes) < 4 * len(blocks) / len(sizes)


def test_the_next_mapping_shares_all_blocks_but_those_in_which_it_differs() -> None:
    """Of networks too, whose hashes are alike."""
    networks = [ip_network((0x0A000000 + (number << 8), 24)) for number in range(10_000)]
    blocks = Blocks(dict.fromkeys(networks, 1))
    later = blocks.after({networks[0]: 2, ip_network("192.0.2.0/24"): 3}, [networks[1]])
    shared = sum(one is other for one, other in zip(blocks._blocks, later._blocks, strict=True))
    assert len(blocks._blocks) - shared <= 3
    assert max(map(len, blocks._blocks)) < 200
