"""Schedules of faults drawn from seeds 0, 1, ...; `make simulate` plays many. The one that fails is in the test's name:
`PYTHONHASHSEED=0 KILO_SEED=13 .venv/bin/python -m pytest tests/agent/test_agent_simulation.py` plays it again."""

from __future__ import annotations

import io
import os

import pytest
import trio
from simulation import facts, run_schedule

from kilo_etcd.agent import discover, program
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.logs import setup_logging

pytestmark = pytest.mark.autojump

SEEDS = [int(os.environ["KILO_SEED"])] if "KILO_SEED" in os.environ else range(int(os.environ.get("KILO_SEEDS", "20")))


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_schedule_of_faults(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gather(config: AgentConfig) -> discover.HostFacts:
        await trio.lowlevel.checkpoint()
        return facts(config.hostname)

    monkeypatch.setattr(discover, "gather", gather)
    monkeypatch.setattr(discover, "location_from_cloud_init", lambda: (None, ""))
    monkeypatch.setattr(program, "speak", lambda addresses: list(addresses))
    setup_logging("info", stream=io.StringIO())
    await run_schedule(seed)
