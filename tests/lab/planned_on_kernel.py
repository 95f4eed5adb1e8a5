"""What an operator does on purpose, on the kernel's own WireGuard.

Not collected by itself: `test_mesh_kernel.py` runs it where a kernel has that, on this machine or in a guest, whose one
processor is slow. Shapes are switched there by `mesh_on_kernel.py`.
"""

from __future__ import annotations

import pytest
from planned_scenarios import handed_over, nothing_moves, planned_world

from helpers_load import lease_for

pytestmark = [pytest.mark.lab, pytest.mark.deadline(1000)]


async def test_what_an_operator_does_on_the_kernels_wireguard() -> None:
    # An agent that was killed is to be back within its lease. Where others work too it took one 16 s to begin.
    async with planned_world("kernel", lease_ttl=lease_for(40)) as lab:
        await nothing_moves(lab)
        await handed_over(lab, crowded=True)
