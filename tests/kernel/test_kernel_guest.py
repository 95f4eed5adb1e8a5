"""The same tests against the kernel's own WireGuard and IPIP: on this machine if it has them, else in a guest."""

from __future__ import annotations

import pytest

from helpers_guest import pytest_in_guest


@pytest.mark.guest
def test_the_kernels_own_wireguard_and_ipip() -> None:
    done = pytest_in_guest("tests/kernel/test_kernel_root.py", environment={"KILO_HAS_IPIP": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
