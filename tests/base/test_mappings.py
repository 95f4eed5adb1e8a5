"""Comparisons of mappings come out the same by every short way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kilo_etcd.base.mappings import Changed, changes

mappings = st.dictionaries(st.integers(0, 40), st.integers(0, 3), max_size=40)
edits = st.lists(st.tuples(st.integers(0, 40), st.none() | st.integers(0, 3)), max_size=30)


def naive(old: dict[int, int], new: dict[int, int]) -> set[int]:
    return {key for key in {*old, *new} if old.get(key) != new.get(key)}


@given(mappings, mappings)
def test_of_any_two_mappings_the_keys_that_differ_are_found(old: dict[int, int], new: dict[int, int]) -> None:
    assert sorted(changes(old, new)) == sorted(naive(old, new))


@given(mappings, edits)
def test_what_is_known_of_a_change_leads_to_the_same_keys(
    old: dict[int, int], made: list[tuple[int, int | None]]
) -> None:
    new = old.copy()
    for key, value in made:
        if value is None:
            new.pop(key, None)
        else:
            new[key] = value
    changed = Changed(old, new, frozenset(key for key, _ in made))
    assert sorted(changes(old, new, changed)) == sorted(changes(old, new)) == sorted(naive(old, new))


@given(mappings, mappings, mappings)
def test_what_is_known_of_other_mappings_counts_for_nothing(
    old: dict[int, int], new: dict[int, int], other: dict[int, int]
) -> None:
    for changed in (Changed(other, new, frozenset[int]()), Changed(old, other, frozenset[int]())):
        assert sorted(changes(old, new, changed)) == sorted(naive(old, new))
