"""What the agent reports of itself: since when it leads."""

from __future__ import annotations

import json
from datetime import UTC, datetime, tzinfo
from typing import cast

import pytest
import trio
from agent_world import World, running
from attrs import evolve, frozen

from helpers import eventually
from kilo_etcd.agent import status
from kilo_etcd.agent.leadership.candidacy_policy import SegmentRole
from kilo_etcd.agent.status import State, StatusReporter
from kilo_etcd.model import CandidateClass, Snapshot
from kilo_etcd.model.hostplan import Exemption
from kilo_etcd.store.records import CandidateRecord, NodeRecord, Role, StatusRecord, decode_status, encode
from kilo_etcd.store.session.session import Session

EARLIER = "2026-11-22T10:00:00Z"
LEADS = SegmentRole(kind=Role.LEADER, location="gcp", leader="h1")
FOLLOWS = SegmentRole(kind=Role.MEMBER, location="gcp", leader="h2")
BEFORE = StatusRecord(public_key="k", role=Role.LEADER, location="gcp", leader="h1", leads_since=EARLIER)
STATE = State(role=LEADS, revision=1, failures=(), errors=(), programmed=True, address="", without_etcd="")


@frozen
class Published:
    status: StatusRecord | None


def leads_since(before: StatusRecord | None, *roles: SegmentRole) -> str:
    """What is reported after these roles, by an agent that has found this status of an earlier one."""
    reporter = StatusReporter(cast(Session, Published(before)), "k", None)
    for role in roles:
        reporter.publish(Snapshot(revision=1), evolve(STATE, role=role), leaving=True)
    assert reporter._status is not None
    return reporter._status.leads_since


def test_since_when_it_leads_outlasts_its_agent_and_no_leadership() -> None:
    assert leads_since(BEFORE, LEADS) == EARLIER
    assert leads_since(BEFORE, LEADS, LEADS) == EARLIER
    assert leads_since(BEFORE, FOLLOWS) == ""
    for other in (None, evolve(BEFORE, location="home"), evolve(BEFORE, role=Role.MEMBER, leads_since="")):
        assert leads_since(other, LEADS) > EARLIER
    assert leads_since(BEFORE, FOLLOWS, LEADS) > EARLIER


@pytest.mark.autojump
@pytest.mark.parametrize(("number", "says"), [(0, 0), (2, 2), (65, None)])
async def test_it_reports_what_is_exempted_unless_that_is_too_much(world: World, number: int, says: int | None) -> None:
    exemptions = tuple(Exemption.parse(f"tcp/{22 + k}@10.0.0.0/24") for k in range(number))
    async with running(world, clear=exemptions):
        await eventually(lambda: world.etcd.get("/kilo-status/by/h1/status") is not None, 30, every=0.1)
        reported = decode_status(world.etcd.get("/kilo-status/by/h1/status") or b"").clear
    assert reported == (None if says is None else tuple(map(str, exemptions)))


@pytest.mark.autojump
async def test_it_leads_since_it_was_elected_and_not_since_it_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class VirtualTime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> VirtualTime:
            return cls.fromtimestamp(1_700_000_000 + trio.current_time() - began, tz)

    def published() -> StatusRecord:
        return decode_status(world.etcd.get("/kilo-status/by/h1/status") or b"")

    began = trio.current_time()
    monkeypatch.setattr(status, "datetime", VirtualTime)
    other = NodeRecord(public_key="B" + "A" * 42 + "=", internal_ips=())
    world.etcd.put("/kilo/by/h2/addresses/10.4.0.2", "")
    record = json.loads(encode(other)) | {"internalIPs": ["192.168.1.2/24"]}
    world.etcd.put("/kilo/by/h2/node", json.dumps(record))
    world.etcd.put_kept(
        "/kilo/by/h2/elections/@default", encode(CandidateRecord(rank=CandidateClass.PUBLIC, since=EARLIER))
    )
    async with running(world):
        await eventually(lambda: world.etcd.keys("/kilo/by/h1/elections/@default") != [], 30, every=0.1)
        await trio.sleep(300)
        assert published().leads_since == ""
        world.etcd.delete("/kilo/by/h2/elections/@default")
        await eventually(lambda: published().role is Role.LEADER, 10, every=0.1)
        elected = datetime.fromisoformat(published().leads_since)
        assert 0 <= elected.timestamp() - 1_700_000_000 - 300 < 40
        assert elected.tzinfo == UTC
        await trio.sleep(300)
        assert datetime.fromisoformat(published().leads_since) == elected


@pytest.mark.autojump
@pytest.mark.parametrize(("port", "says"), [(1107, None), (2107, 2107)])
async def test_it_reports_another_port_for_peer_queries_than_the_usual_one(
    world: World, port: int, says: int | None
) -> None:
    async with running(world, peer_query_port=port):
        await eventually(lambda: world.etcd.get("/kilo-status/by/h1/status") is not None, 30, every=0.1)
        assert decode_status(world.etcd.get("/kilo-status/by/h1/status") or b"").peer_query_port == says
