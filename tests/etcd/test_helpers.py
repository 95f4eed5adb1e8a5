"""The helpers of tests/ do what the other tests rely on."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import eventually


async def test_async_tests_run_under_trio() -> None:
    await trio.lowlevel.checkpoint()


@pytest.mark.autojump
async def test_autojump_makes_hours_cost_nothing() -> None:
    started = trio.current_time()
    await trio.sleep(3600)
    assert trio.current_time() - started >= 3600


@settings(max_examples=3)
@given(number=st.integers())
async def test_hypothesis_runs_async_tests(number: int) -> None:
    await trio.lowlevel.checkpoint()
    assert isinstance(number, int)


@pytest.mark.parametrize("value", [1, 2])
async def test_parameters_arrive(value: int, tmp_path: object) -> None:
    assert value in (1, 2)
    assert tmp_path


@pytest.mark.autojump
async def test_eventually_waits_and_gives_up() -> None:
    started = trio.current_time()
    assert await eventually(lambda: trio.current_time() - started > 3, 5)
    with pytest.raises(AssertionError, match="pigs fly"):
        await eventually(lambda: False, 1, what="pigs fly")
