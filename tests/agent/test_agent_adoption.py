"""Many whole agents whose etcd is replaced or goes back in time, until the operator adopts it; in virtual time."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from crowd import KEYS, Crowd, log  # noqa: F401

from helpers import eventually
from kilo_etcd.agent.adoption import LONGEST_SECONDS, Adoption, missing
from kilo_etcd.model import Snapshot
from kilo_etcd.store.diagnostics import ask_why_untrusted
from kilo_etcd.store.records import encode_adoption
from kilo_etcd.topology.segments import build_topology
from topology_worlds import candidates_of, node, snapshot

NOTICED = 7.0
"""Seconds until every agent has looked at etcd again."""


def mesh(*names: str, standing: str = "") -> Snapshot:
    nodes = [node(name, number, "x", f"10.0.0.{number}/24") for number, name in enumerate(names, 1)]
    return snapshot(nodes, candidates=candidates_of(*(one for one in nodes if one.name in standing.split())))


def test_nodes_that_are_not_back_and_leaders_that_do_not_stand_are_missing() -> None:
    before = build_topology(mesh("a", "b", "c", standing="a b"))
    assert missing(before, mesh("a", "b", "c", "d", standing="a")) == set()
    assert missing(before, mesh("a", standing="a")) == {"b", "c"}
    assert missing(before, mesh("a", "b", "c", standing="b")) == {"a"}
    # One that led without standing is not waited for.
    assert missing(build_topology(mesh("a", "b")), mesh("b", "a")) == set()


def test_the_wait_begins_with_a_generation_and_ends_when_all_are_back_or_time_is_up() -> None:
    before, some, others = mesh("a", "b"), mesh("a"), mesh("c")
    known = build_topology(before)
    wait = Adoption(0)
    assert not wait.missing(0, known, some, 100.0), "etcd is the same: what is gone is gone"
    assert wait.missing(1, known, some, 200.0) == {"b"}
    assert wait.missing(1, known, others, 200.0 + LONGEST_SECONDS - 1) == {"a", "b"}
    assert not wait.missing(1, known, some, 200.0 + LONGEST_SECONDS)
    assert not wait.missing(1, known, others, 200.0 + LONGEST_SECONDS + 1), "it is over for good"
    assert wait.missing(2, known, some, 300.0)
    assert not wait.missing(2, known, before, 301.0)
    assert not wait.missing(2, known, some, 302.0)
    # A host that goes by nothing yet has nothing to keep.
    assert not Adoption(0).missing(1, None, some, 0.0)


@asynccontextmanager
async def crowd(log: io.StringIO) -> AsyncIterator[Crowd]:  # noqa: F811
    """Three sites, whose agents know where they are: an empty etcd has no labels."""
    made = Crowd(log)
    async with trio.open_nursery() as made.nursery:
        for site in "abc":
            for number in (1, 2, 3):
                made.add(f"{site}-{number}", location=site)
        await made.at_rest()
        yield made
        made.nursery.cancel_scope.cancel()


def untrusting(it: Crowd) -> bool:
    return all(host.agent is not None and host.agent.mirror.untrusted_reason for host in it.hosts.values())


def adopt(it: Crowd) -> None:
    it.etcd.put(KEYS.adopted, encode_adoption(it.etcd.cluster_id, "2026-11-24T00:00:00Z"))


@pytest.mark.autojump
@pytest.mark.deadline(20_000)
@pytest.mark.parametrize("empty", [True, False])
async def test_no_kernel_is_written_to_when_an_etcd_is_adopted(log: io.StringIO, empty: bool) -> None:  # noqa: F811
    async with crowd(log) as it:
        if not empty:
            saved = it.etcd.backup()
            # Later than the backup, and the one that is missing in it longest.
            it.add("c-9", location="c")
            await it.at_rest()
            it.etcd.restore(saved, cluster_id=0xC7)
        else:
            it.etcd.replace_cluster()
        await eventually(lambda: untrusting(it), NOTICED, every=0.1)
        before = {name: len(host.machine.history) for name, host in it.hosts.items()}
        leaders = set(it.leaders())
        await trio.sleep(60)
        assert all(len(host.machine.history) == before[name] for name, host in it.hosts.items())
        adopt(it)
        await eventually(lambda: all(host.settled for host in it.hosts.values()), 30, every=0.1)
        await it.at_rest()
        # Leaders lead on, so that nothing is written to any kernel.
        assert set(it.leaders()) == leaders
        assert not any(host.machine.history[before[name] :] for name, host in it.hosts.items())
        assert log.getvalue().count("the last plan stays until the other hosts are back there") >= 1


@pytest.mark.autojump
@pytest.mark.deadline(20_000)
async def test_a_host_that_does_not_come_back_is_not_waited_for_long(log: io.StringIO) -> None:  # noqa: F811
    async with crowd(log) as it:
        it.etcd.replace_cluster()
        await eventually(lambda: untrusting(it), NOTICED, every=0.1)
        gone = it.hosts.pop("c-1")
        await gone.kill()
        adopt(it)

        def followed() -> bool:
            agents = [host.agent for host in it.hosts.values()]
            return all(
                agent and agent.state.topology and len(agent.state.topology.snapshot.nodes) == 8 for agent in agents
            )

        await eventually(followed, NOTICED + LONGEST_SECONDS + 2, every=0.1)


@pytest.mark.autojump
@pytest.mark.deadline(20_000)
async def test_no_lease_is_kept_in_an_etcd_that_went_back_and_its_agents_say_so(log: io.StringIO) -> None:  # noqa: F811
    async with crowd(log) as it:
        client = it.etcd.client("operator")
        saved = it.etcd.backup()
        it.etcd.put("/kilo/locations/a-1", "b")
        await it.at_rest()
        assert await ask_why_untrusted(client, KEYS) == {}
        it.etcd.restore(saved, cluster_id=it.etcd.cluster_id)
        assert it.etcd.keys("/kilo-status/by/", "/status")
        await eventually(lambda: untrusting(it), NOTICED, every=0.1)
        await trio.sleep(6)
        assert it.etcd.keys("/kilo-status/") == []
        assert it.etcd.keys("/kilo/", "/elections/") == []
        assert 5 not in it.etcd.leases().values()
        revision = it.etcd.revision
        await trio.sleep(60)
        assert it.etcd.revision == revision
        # Whoever asks is told; what that leaves is gone with the question.
        reasons = await ask_why_untrusted(client, KEYS)
        assert reasons.keys() == it.hosts.keys()
        assert all("etcd went back in time" in reason for reason in reasons.values())
        await trio.sleep(20)
        assert it.etcd.keys("/kilo-status/") == []
        # Nor does an agent that is stopped or reloaded write there.
        revision = it.etcd.revision
        await it.hosts.pop("a-3").stop()
        agent = it.hosts["a-2"].agent
        assert agent is not None
        await agent.session.renew()
        assert it.etcd.revision == revision
        adopt(it)
        await it.at_rest()
        assert await ask_why_untrusted(client, KEYS) == {}
        assert len(it.etcd.keys("/kilo-status/by/", "/status")) == 8
