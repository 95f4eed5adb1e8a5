"""What an operator does on purpose, on userspace WireGuard."""

from __future__ import annotations

import pytest
from planned_scenarios import EVENTS, planned_world

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]


async def test_what_an_operator_does_interrupts_no_more_than_it_must() -> None:
    async with planned_world("auto", lease_ttl=15) as lab:
        for event in EVENTS:
            await event(lab)
