"""How a host holds its candidacy while the topology in force and the snapshot differ."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from attrs import evolve
from test_agent_candidacy_policy import TWO

from kilo_etcd.agent.leadership.candidacy import CandidacyTask
from kilo_etcd.store.session.candidacy import Candidacy
from kilo_etcd.topology.segments import build_topology


class Session:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.candidacy: Candidacy | None = None
        self.recorded: list[str] = []

    async def enter(self, location: str, rank: Any, **_: Any) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def leave(self, **_: Any) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def record_leader(self, location: str, **_: Any) -> bool:
        await trio.lowlevel.checkpoint()
        self.recorded.append(location)
        return True


@pytest.mark.autojump
async def test_a_leader_whose_record_was_deleted_records_nothing_until_it_is_in_the_topology_again() -> None:
    session = Session()
    task = CandidacyTask(session, "a")  # type: ignore[arg-type]
    without = build_topology(TWO.__class__(revision=8, subnets=TWO.subnets, nodes={"b": TWO.nodes["b"]}))
    await task.update(TWO, without, leads=True, ready=True)
    assert session.recorded == []
    await task.update(TWO, build_topology(TWO), leads=True, ready=True)
    assert session.recorded == ["gcp"]


@pytest.mark.autojump
async def test_a_leader_that_has_just_been_moved_is_on_record_nowhere_until_the_topology_has_it_there() -> None:
    session = Session()
    task = CandidacyTask(session, "a")  # type: ignore[arg-type]
    moved = evolve(TWO, revision=TWO.revision + 1, nodes={**TWO.nodes, "a": evolve(TWO.nodes["a"], location="aws")})
    await task.update(moved, build_topology(TWO), leads=True, ready=True)
    assert session.recorded == []
