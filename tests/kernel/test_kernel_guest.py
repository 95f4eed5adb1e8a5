"""The same tests against the kernel's own WireGuard and IPIP: on this machine if it has them, else in a guest."""

from __future__ import annotations

import pytest

from helpers_guest import pytest_in_guest

# A guest is slow: what differs there from userspace WireGuard, not every case.
CHOSEN = (
    "set_up or adopts or one_transaction or failover or port or ipip or plan_to_plan or cleanup or by_hand or mtu or "
    "otherwise or on_kernel or stages"
)


@pytest.mark.guest
@pytest.mark.beside
def test_the_kernels_own_wireguard_and_ipip() -> None:
    done = pytest_in_guest(
        "tests/kernel/test_kernel_root.py",
        "tests/kernel/test_kernel_peer.py",
        "tests/kernel/test_kernel_encrypted.py",
        "tests/kernel/test_kernel_encrypted_packets.py",
        "tests/kernel/on_kernel_wireguard.py",
        "tests/kernel/returns_on_kernel.py",
        "-k",
        CHOSEN,
        "--durations=5",
        environment={"KILO_HAS_IPIP": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
