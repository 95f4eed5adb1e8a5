"""A full mesh on one network that encrypts all of it, and the switch there and back, on the kernel's own WireGuard.

Not collected by itself: `test_mesh_kernel.py` runs it where a kernel has WireGuard, on this machine or in a guest,
whose one processor is slow.
"""

from __future__ import annotations

import pytest
from encrypted_scenarios import nothing_in_clear, one_lan, switched

from helpers_load import lease_for
from kilo_etcd.lab.client import running_lab

pytestmark = [pytest.mark.lab, pytest.mark.deadline(1000)]

WITHIN = 120
"""Seconds for all pairs to ping after the start."""


async def test_a_full_mesh_on_one_lan_says_nothing_in_clear() -> None:
    spec = one_lan("ipv4", "ipv6", wireguard="kernel").evolve(lease_ttl=lease_for(3))
    async with running_lab(spec) as lab:
        await nothing_in_clear(lab, WITHIN)


async def test_the_switch_loses_no_packet_and_leaves_nothing() -> None:
    spec = one_lan("ipv4", "ipv6", wireguard="kernel").evolve(lease_ttl=lease_for(3))
    async with running_lab(spec) as lab:
        await switched(lab, WITHIN)
