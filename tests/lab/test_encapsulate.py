"""What `--encapsulate` does inside a location, without IPIP here and with it where a kernel has it."""

from __future__ import annotations

import pytest
from encapsulation import test_each_mode as without_ipip

from helpers_guest import pytest_in_guest


@pytest.mark.lab
@pytest.mark.deadline(600)
async def test_each_mode_on_a_kernel_without_ipip() -> None:
    await without_ipip()


@pytest.mark.guest
@pytest.mark.lab
def test_each_mode_on_a_kernel_with_ipip() -> None:
    done = pytest_in_guest("tests/lab/encapsulation.py", environment={"KILO_HAS_IPIP": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
