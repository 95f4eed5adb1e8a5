"""What an agent knows of others in the switch to `encrypted`, and what it costs to know it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import structlog
import trio

from helpers import eventually
from kilo_etcd.agent.stage_watch import FEW, GONE_SECONDS, READ_SECONDS, SAMPLE, StageWatch
from kilo_etcd.etcd.api import Compare, Op, Text, TxnResult, Watch, prefix_end
from kilo_etcd.runtime.logs import Once
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import StageRecord, encode
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd

KEYS = Keys()
MANY = frozenset(f"n{number}" for number in range(FEW + 2))


@asynccontextmanager
async def following(
    server: FakeEtcd, names: frozenset[str]
) -> AsyncIterator[tuple[StageWatch, FakeClient, list[float]]]:
    """One agent's, its client, and when it had news."""
    client, news = server.client(), list[float]()
    others = StageWatch(client, KEYS, Once(structlog.get_logger()), lambda: news.append(trio.current_time()))
    others.follow(names, nodes=len(names), cluster=server.cluster_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others.run)
        yield others, client, news
        nursery.cancel_scope.cancel()


def reports(server: FakeEtcd, name: str, revision: int) -> None:
    server.put_kept(KEYS.stage(name), encode(StageRecord(revision=revision)))


@pytest.mark.autojump
async def test_what_is_reported_is_watched_and_not_asked_for() -> None:
    server = FakeEtcd()
    reports(server, "a", 3)
    async with following(server, frozenset({"a"})) as (others, client, _):
        await eventually(lambda: others.living.applied == {"a": 3}, 5, every=0.1)
        calls = len(client.calls)
        assert calls == 1
        for revision in range(4, 30):
            reports(server, "a", revision)
            await trio.sleep(1)
        assert others.living.applied["a"] == 29
        assert len(client.calls) == calls


@pytest.mark.autojump
async def test_only_those_that_are_waited_for_are_watched() -> None:
    server = FakeEtcd()
    async with following(server, frozenset({"a"})) as (others, client, news):
        reports(server, "a", 3)
        await eventually(lambda: bool(news), 5, every=0.1)
        others.follow(frozenset(), nodes=1, cluster=server.cluster_id)
        await trio.sleep(60)
        calls, told = len(client.calls), len(news)
        reports(server, "a", 4)
        reports(server, "b", 4)
        await trio.sleep(60)
        assert (len(client.calls), len(news)) == (calls, told)
        assert others.living.applied == {"a": 3}


@pytest.mark.parametrize("names", [frozenset({"a"}), MANY | {"a"}])
@pytest.mark.autojump
async def test_an_agent_counts_as_gone_after_a_bound_only(names: frozenset[str]) -> None:
    server = FakeEtcd()
    read_again = 1.5 * READ_SECONDS * (len(names) > 1)
    for name in names:
        reports(server, name, 3)
    async with following(server, names) as (others, _, _):
        await eventually(lambda: others.living.lives("a") and "a" in others.living.asked, 5, every=0.1)
        # It is restarted.
        server.delete(KEYS.stage("a"))
        await trio.sleep(GONE_SECONDS - 5)
        assert others.living.lives("a")
        assert others.living.knows_of("a", 3), "its kernel holds what it held"
        assert not others.living.knows_of("a", 4)
        reports(server, "a", 4)
        await trio.sleep(GONE_SECONDS)
        assert others.living.knows_of("a", 4)
        # It is gone.
        server.delete(KEYS.stage("a"))
        await trio.sleep(GONE_SECONDS + 2 + read_again)
        assert not others.living.lives("a")
        assert others.living.knows_of("a", 99), "it acts by nothing any more, if its host lives"
        reports(server, "a", 5)
        await trio.sleep(1 + read_again)
        assert others.living.lives("a")
        assert not others.living.knows_of("a", 99)


@pytest.mark.autojump
async def test_who_was_missing_long_ago_is_not_gone_when_he_is_missing_again() -> None:
    server = FakeEtcd()
    one, nobody = frozenset({"a"}), frozenset[str]()
    async with following(server, one) as (others, _, _):
        await trio.sleep(1)
        others.follow(nobody, nodes=1, cluster=server.cluster_id)
        await trio.sleep(1)
        reports(server, "a", 3)
        await trio.sleep(5 * GONE_SECONDS)
        server.delete(KEYS.stage("a"))
        others.follow(one, nodes=1, cluster=server.cluster_id)
        await trio.sleep(GONE_SECONDS - 5)
        assert others.living.lives("a")


@pytest.mark.parametrize(
    "report",
    [
        lambda server, key: server.put(key, encode(StageRecord(revision=99))),
        lambda server, key: server.put_kept(key, b"nonsense"),
    ],
)
@pytest.mark.autojump
async def test_a_report_that_cannot_be_read_or_is_under_no_lease_tells_nothing(
    report: Callable[[FakeEtcd, str], object],
) -> None:
    server = FakeEtcd()
    async with following(server, frozenset({"a"})) as (others, _, _):
        report(server, KEYS.stage("a"))
        await trio.sleep(GONE_SECONDS / 2)
        assert others.living.lives("a")
        assert not others.living.knows_of("a", 3)


@pytest.mark.autojump
async def test_nobody_counts_as_gone_while_etcd_is_away() -> None:
    server = FakeEtcd()
    reports(server, "a", 3)
    async with following(server, frozenset({"a"})) as (others, client, _):
        await eventually(lambda: others.living.knows_of("a", 3), 5, every=0.1)
        server.delete(KEYS.stage("a"))
        await trio.sleep(1)
        client.cut()
        reports(server, "a", 4)
        await trio.sleep(5 * GONE_SECONDS)
        assert others.living.lives("a")
        client.mend()
        await eventually(lambda: others.living.knows_of("a", 4), 10, every=0.1)


@pytest.mark.autojump
async def test_another_etcd_says_nothing_of_this_mesh() -> None:
    server = FakeEtcd()
    reports(server, "a", 3)
    async with following(server, frozenset({"a"})) as (others, _, _):
        await eventually(lambda: others.living.knows_of("a", 3), 5, every=0.1)
        server.replace_cluster()
        server.drop_watches()
        await trio.sleep(5 * GONE_SECONDS)
        assert others.living.lives("a")


@pytest.mark.autojump
async def test_a_crowd_is_read_again_whoever_is_watched() -> None:
    server = FakeEtcd()
    for name in MANY:
        reports(server, name, 3)
    async with following(server, MANY) as (others, _, _):
        await eventually(lambda: others.living.knows_of("n1", 3), 5, every=0.1)
        for name in MANY:
            reports(server, name, 4)
        await trio.sleep(2 * READ_SECONDS)
        assert others.living.applied == dict.fromkeys(MANY, 4)


class Load(FakeClient):
    """Counts the keys that it reads by transactions, and the watches."""

    def __init__(self, server: FakeEtcd) -> None:
        super().__init__(server)
        self.read: list[int] = []
        self.watches = 0

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        self.read.append(len(success))
        return await super().txn(compare, success, failure)

    def watch(
        self, key: Text, range_end: Text | None = None, *, start_revision: int = 0, progress_notify: bool = True
    ) -> AbstractAsyncContextManager[Watch]:
        self.watches += 1
        return super().watch(key, range_end, start_revision=start_revision, progress_notify=progress_notify)


@pytest.mark.parametrize(
    ("nodes", "waited_for"), [(1_000, 200), (1_000, 1_000), (6_000, 200), (10_000, 9), (10_000, 10_000)]
)
@pytest.mark.autojump
async def test_of_a_crowd_that_does_not_report_a_few_are_watched_and_the_load_on_etcd_is_bounded(
    nodes: int, waited_for: int
) -> None:
    """Whatever the size of the mesh, if all its hosts wait for so many."""
    server, seconds = FakeEtcd(), 0.4 * nodes
    crowd = frozenset(f"n{number}" for number in range(waited_for))
    for name in crowd:
        reports(server, name, 3)
    client = Load(server)
    others = StageWatch(client, KEYS, Once(structlog.get_logger()), lambda: None)
    others.follow(crowd, nodes=nodes, cluster=server.cluster_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others.run)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()
    readings = sum(client.read) / waited_for
    assert readings >= 3
    assert client.watches >= 3 * SAMPLE
    assert (readings - 1) * waited_for * nodes / seconds <= 100_000


@pytest.mark.parametrize("names", [frozenset({"a"}), MANY | {"a"}])
@pytest.mark.autojump
async def test_an_agent_that_is_missing_at_the_first_look_alone_is_not_gone(names: frozenset[str]) -> None:
    """The first look may come late: etcd is away, or all hosts of a large mesh read."""
    server = FakeEtcd()
    for name in names - {"a"}:
        reports(server, name, 3)
    async with following(server, names) as (others, client, _):
        client.cut()
        await trio.sleep(3 * GONE_SECONDS)
        client.mend()
        await trio.sleep(GONE_SECONDS - 5)
        assert others.living.lives("a")
        reports(server, "a", 3)
        await trio.sleep(2 * GONE_SECONDS)
        assert others.living.applied == dict.fromkeys(names, 3)


@pytest.mark.autojump
async def test_of_a_crowd_only_those_are_read_again_that_are_waited_for_still() -> None:
    server = FakeEtcd()
    crowd = frozenset(f"n{number}" for number in range(500))
    client = Load(server)
    news: list[float] = []

    def note() -> None:
        """What the agent does: whoever has reported is not waited for any more."""
        news.append(trio.current_time())
        others.follow(frozenset(crowd - others.living.applied.keys()), nodes=500, cluster=server.cluster_id)

    others = StageWatch(client, KEYS, Once(structlog.get_logger()), note)
    others.follow(crowd, nodes=500, cluster=server.cluster_id)
    # Somebody else's statuses are nobody's news.
    server.put_kept(KEYS.status("n1"), b"{}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others.run)
        await trio.sleep(2)
        for name in sorted(crowd):
            reports(server, name, 3)
            await trio.sleep(0.004)
        last = trio.current_time()
        await eventually(lambda: others.living.applied.keys() == crowd, 20, every=0.1)
        assert trio.current_time() - last < 10
        assert len(news) <= 10
        assert sum(client.read) < 3 * 500
        assert max(client.read) <= 100
        nursery.cancel_scope.cancel()


def test_the_keys_are_beside_the_statuses_and_none_of_them() -> None:
    assert KEYS.stage("a/b") == "/kilo-status/by/a%2Fb/stage"
    assert KEYS.stage("a").encode() < prefix_end(KEYS.status_root)
    assert type(KEYS.parse(KEYS.stage("a"))) is not type(KEYS.parse(KEYS.status("a")))


@pytest.mark.autojump
async def test_who_is_waited_for_again_after_the_first_look_counts_as_gone_after_the_same_bound() -> None:
    server = FakeEtcd()
    reports(server, "b", 3)
    names, nodes = frozenset({"a", "b"}), 10_000
    async with following(server, names) as (others, client, _):
        others.follow(names, nodes=nodes, cluster=server.cluster_id)
        await trio.sleep(0.001)  # Both are followed, and wait for their turn to read.
        others.follow(frozenset({"b"}), nodes=nodes, cluster=server.cluster_id)
        await eventually(lambda: len(client.calls) == 2, 60, every=0.1)
        others.follow(names, nodes=nodes, cluster=server.cluster_id)
        await eventually(lambda: "a" in others.living.asked, GONE_SECONDS + 60, every=0.1)
