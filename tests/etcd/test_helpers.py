"""The helpers of tests/ do what the other tests rely on."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import BUSY, eventually
from helpers_load import FREE, WORK, Machine, measured, soon


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


async def test_eventually_is_more_patient_on_the_real_clock() -> None:
    started = trio.current_time()
    assert await eventually(lambda: trio.current_time() - started > 0.1, 0.2 / BUSY)


def test_a_bound_grows_with_the_time_that_work_took() -> None:
    assert Machine([WORK, WORK]).allows(2.0) == 2.0 + WORK
    assert Machine([WORK, 11 * WORK]).allows(2.0) == pytest.approx(2.0 * 6 / FREE + 11 * WORK)
    assert Machine([WORK, WORK], late=[0.001, 0.5]).allows(2.0) == 2.5
    with measured() as machine:
        pass
    assert machine.taken


@pytest.mark.autojump
async def test_soon_fails_when_it_is_late() -> None:
    with soon(1.0):
        await trio.sleep(0.9)
    with pytest.raises(trio.TooSlowError), soon(1.0):
        await trio.sleep(60)
    with pytest.raises(AssertionError, match="taken"), soon(1000.0):
        await trio.sleep(19_000)
