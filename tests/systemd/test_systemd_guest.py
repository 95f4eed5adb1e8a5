"""The installed service under systemd as process 1, in a guest."""

from __future__ import annotations

import pytest

from helpers_guest import pytest_in_guest


@pytest.mark.guest
@pytest.mark.beside
def test_the_service_under_systemd() -> None:
    done = pytest_in_guest("-x", "tests/systemd/on_systemd.py", "--durations=5", systemd=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
