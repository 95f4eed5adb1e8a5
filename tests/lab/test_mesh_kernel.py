"""Scenarios a to g, what operators do on purpose, and `encrypted`, with the kernel's own WireGuard.

On this machine if it has it, else in a guest. The longest comes first: a worker of pytest-xdist takes its next tests
when it has two left, and nobody else can run these meanwhile.
"""

from __future__ import annotations

import pytest

from helpers_guest import pytest_in_guest


@pytest.mark.guest
@pytest.mark.lab
def test_what_an_operator_does_on_kernel_wireguard() -> None:
    done = pytest_in_guest("tests/lab/planned_on_kernel.py", "--durations=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.guest
@pytest.mark.lab
def test_a_to_g_on_kernel_wireguard() -> None:
    done = pytest_in_guest("tests/lab/mesh_on_kernel.py", "--durations=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.guest
@pytest.mark.lab
@pytest.mark.beside
def test_a_clock_that_goes_back() -> None:
    done = pytest_in_guest("tests/lab/clock_on_kernel.py", "--durations=5", own_clock=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.guest
@pytest.mark.lab
def test_encrypted_on_kernel_wireguard() -> None:
    done = pytest_in_guest("tests/lab/encrypted_on_kernel.py", "--durations=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
