"""Watches the stages of other agents in the switch to `encrypted`, as long as this host waits for some.

Each agent has one small key for it (`store.StageRecord`), under its short lease. While the host waits for few nodes
their keys are watched one by one. The keys of many are read by their names, and a few of them, drawn at random, are
watched: once those have reported, about as many of the others have too, and all that the host still waits for are read
again. So the host waits for fewer and fewer. (One watch on all would bring all statuses, which change all the time and
are long.) Nothing is watched if the host waits for none, so a node that joins wakes only those that wait for it.

What is not known counts as "not there yet". A node without the key may have an agent that is being restarted, whose
kernel goes on with what it had: only `GONE_SECONDS` after a look at etcd, and after another one, its agent counts as
gone. A key that cannot be read, or that is under no lease, tells nothing either.

All hosts of a mesh may wait for all others. So the pauses grow with the number of nodes times the number of keys that
each reads, and etcd has the same load in a mesh of any size: see `PAUSE_PER_KEY`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import trio

from kilo_etcd.etcd import api as etcd
from kilo_etcd.planning.encryption import Living
from kilo_etcd.runtime.logs import Once
from kilo_etcd.store.keys import Keys, StageKey
from kilo_etcd.store.records import RecordError, decode_stage

GONE_SECONDS = 20.0
"""How long a node has to be without its key before its agent counts as gone: more than a restart takes, or than a lease
takes to end and to be granted anew."""
FEW = 8
"""Nodes whose keys are watched one by one."""
SAMPLE = 4
"""Nodes whose keys are watched while the host waits for more than `FEW`."""
FIRST_PAUSE, PAUSE_PER_NODE = 0.1, 0.002
"""Seconds between two changes of `living`, and the most before a reading: 1,000 agents that read within 2 s."""
PAUSE_PER_KEY = PAUSE_PER_NODE / 1000
"""The same for each node and each key that is read, if that is more: all agents together read 500,000 keys a second
at most."""
LINGER_SECONDS = 10.0
"""How long a crowd is followed after the host waited for none: during a switch it soon waits again."""
READ_SECONDS, READ_PAUSES = 10.0, 5
"""After which the keys of a crowd are read again, whoever has reported, or after so many pauses, if that is more: all
agents together go on reading 100,000 keys a second at most."""
LIST_SECONDS = 300.0
"""After which a watched key is read again: a watch alone does not ensure that nothing was missed."""
MOST_AT_ONCE = 100
"""Keys that are read in one transaction: etcd takes 128 (--max-txn-ops)."""
ASK_AT_ONCE = 8
"""Transactions of one agent that are on their way at once while its first plan waits for them."""
RETRY_FIRST, RETRY_MOST = 0.2, 5.0


class _Key(NamedTuple):
    """The value of a node's key, if its agent lives."""

    name: str
    revision: int
    """0: it cannot be read."""


class StageWatch:
    """Followed by one agent. `run` is its task; `on_news` is called when `living` has changed."""

    def __init__(
        self,
        client: etcd.Client,
        keys: Keys,
        once: Once,
        on_news: Callable[[], None],
        rng: random.Random | None = None,
    ) -> None:
        self._client, self._keys, self._once, self._on_news = client, keys, once, on_news
        self._rng = rng or random.Random()
        self.living = Living()
        self._nodes = self._cluster = 0
        self._awaited: frozenset[str] = frozenset()
        self._applied: dict[str, int] = {}
        """The nodes whose agents live -> the newest revision that each has reported."""
        self._missing: dict[str, float] = {}
        """Those without a key, that do not count as gone yet -> since when, on trio's clock."""
        self._gone: set[str] = set()
        self._beginning = 0
        """How often all was forgotten."""
        self._changed = trio.Event()
        """Others are waited for, or all was forgotten."""
        self._noted = trio.Event()
        """A key has changed, or the nodes that the host waits for."""

    def forget(self) -> None:
        """Nothing is known of anybody."""
        self._applied, self._missing, self._gone = {}, {}, set()
        self.living = Living()
        self._beginning += 1
        self._notify()

    def take_as_gone(self, names: Iterable[str]) -> None:
        """Treat agents of which nothing is known as gone."""
        self._gone.update(set(names) - self._applied.keys())
        self.living = self._as_known()

    async def ask(self, names: Collection[str], cluster: int) -> None:
        """Look at the keys of these nodes once, in the etcd of that ID. If that fails, or is cancelled, what was read
        until then counts. EtcdError."""
        self._cluster = cluster
        try:
            await self._read_all(names, at_once=ASK_AT_ONCE)
        finally:
            self.living = self._as_known()

    def follow(self, names: frozenset[str], *, nodes: int, cluster: int) -> None:
        """These are waited for now; `nodes`: how many there are in all; `cluster`: the ID of the etcd that says so."""
        self._nodes, self._cluster = nodes, cluster
        if names != self._awaited:
            self._awaited = names
            self._notify()

    async def run(self) -> None:
        """Follow those that are waited for until cancelled."""
        while True:
            changed, names, beginning = self._changed, self._awaited, self._beginning
            if not names:
                await changed.wait()
                self._missing.clear()  # Whoever was missing then may have been there meanwhile.
                continue
            crowd = len(names) > FEW
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._conclude)
                nursery.start_soon(self._find_gone)
                if crowd:
                    nursery.start_soon(self._follow_crowd)
                else:
                    for name in names:
                        nursery.start_soon(self._follow, name)
                await self._watched_in_vain(names, beginning, crowd=crowd)
                nursery.cancel_scope.cancel()

    async def _watched_in_vain(self, names: Collection[str], beginning: int, *, crowd: bool) -> None:
        """Wait until others have to be watched than are."""
        while self._beginning == beginning:
            changed = self._changed
            if not self._awaited:
                with trio.move_on_after(LINGER_SECONDS if crowd else 0):
                    await changed.wait()
                    continue
                return
            if not crowd and not self._awaited <= set(names):
                return
            await changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        self._note()

    def _note(self) -> None:
        noted, self._noted = self._noted, trio.Event()
        noted.set()

    # -- what etcd holds ------------------------------------------------------------------------------------

    async def _follow_crowd(self) -> None:
        """Read the keys of all that are waited for, and again once a few of them have reported."""
        delay = RETRY_FIRST
        await trio.sleep(self._rng.uniform(0, self._pause(len(self._awaited))))
        while True:
            names = self._awaited
            pause = self._pause(len(names))
            try:
                await self._read_all(names)
            except etcd.EtcdError as error:
                self._cannot(error)
                await trio.sleep(delay * self._rng.uniform(0.5, 1.5))
                delay = min(2 * delay, max(RETRY_MOST, pause))
                continue
            delay = RETRY_FIRST
            self._once.clear("stages", "the reports of other agents can be read again")
            # Whoever has reported is not waited for any more, as soon as that is brought into a plan.
            await trio.sleep(FIRST_PAUSE + pause)
            with trio.move_on_after(max(READ_SECONDS, READ_PAUSES * pause) * self._rng.uniform(0.8, 1.2)):
                await self._watch_some()

    def _pause(self, keys: int) -> float:
        """Seconds within which all agents of the mesh may read so many keys each."""
        return self._nodes * max(PAUSE_PER_NODE, keys * PAUSE_PER_KEY)

    async def _watch_some(self) -> None:
        """Watch the keys of a few until each has reported anew, or is not waited for any more."""
        while not self._awaited:
            await self._noted.wait()
        applied = {name: self._applied.get(name) for name in self._awaited}
        drawn = self._rng.sample(sorted(applied), min(SAMPLE, len(applied)))
        async with trio.open_nursery() as nursery:
            for name in drawn:
                nursery.start_soon(self._follow, name)
            while any(name in self._awaited and self._applied.get(name) == applied[name] for name in drawn):
                await self._noted.wait()
            nursery.cancel_scope.cancel()

    async def _read_all(self, names: Collection[str], *, at_once: int = 1) -> None:
        """Take note of the keys of these nodes, by `at_once` transactions at the same time. EtcdError."""
        ordered = sorted(names)
        starts = range(0, len(ordered), MOST_AT_ONCE)
        chunks = iter([ordered[first : first + MOST_AT_ONCE] for first in starts])
        failures: list[etcd.EtcdError] = []

        async def read() -> None:
            try:
                for chunk in chunks:
                    await self._read_chunk(chunk)
            except etcd.EtcdError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in starts[:at_once]:
                nursery.start_soon(read)
        if failures:
            raise failures[0]

    async def _read_chunk(self, names: Sequence[str]) -> None:
        """Take note of the keys of these nodes in one transaction. EtcdError."""
        answer = await self._client.txn([], [etcd.Get(self._keys.stage(name)) for name in names])
        self._check(answer.header)
        ranges = [response for response in answer.responses if isinstance(response, etcd.RangeResult)]
        self._list([kv for result in ranges for kv in result.kvs], names)

    async def _follow(self, name: str) -> None:
        key, delay = self._keys.stage(name), RETRY_FIRST
        await trio.sleep(self._rng.uniform(0, self._nodes * PAUSE_PER_NODE))
        while True:
            try:
                result = await self._client.range(key)
                self._check(result.header)
                self._list(result.kvs, [name], followed=True)
                with trio.move_on_after(LIST_SECONDS * self._rng.uniform(0.8, 1.2)):
                    start = result.header.revision + 1
                    async with self._client.watch(key, start_revision=start) as watch:
                        self._once.clear("stages", "the reports of other agents can be read again")
                        async for batch in watch:
                            delay = RETRY_FIRST
                            self._check(batch.header)
                            self._apply(batch.events)
            except etcd.EtcdError as error:
                self._cannot(error)
                await trio.sleep(delay * self._rng.uniform(0.5, 1.5))
                delay = min(2 * delay, RETRY_MOST)

    def _cannot(self, error: etcd.EtcdError) -> None:
        if isinstance(error, (etcd.Unavailable, etcd.Compacted)):
            return  # The rest of the agent says so, louder; or it is listed again.
        self._once.error(
            "stages",
            "the switch of internal-ips waits, since the reports of other agents cannot be read: what their hosts "
            "send in clear is not refused",
            error=str(error),
        )

    def _check(self, header: etcd.Header) -> None:
        if self._cluster and header.cluster_id not in (0, self._cluster):
            raise etcd.Unavailable("another etcd answers than the one that is followed")

    def _list(self, kvs: Iterable[etcd.KeyValue], names: Iterable[str], *, followed: bool = False) -> None:
        """Take note of the keys of these nodes, and that there are no others of theirs. `followed`: they are not listed
        again soon, and may be waited for again before that."""
        stages = {stage.name: stage for stage in map(self._read, kvs) if stage is not None}
        for name in names:
            awaited = (followed or name in self._awaited) and name not in self._gone
            if name not in stages and (awaited or name in self._applied):
                self._missing.setdefault(name, trio.current_time())
        for value in stages.values():
            self._lives(value)
        self._note()

    def _apply(self, events: Iterable[etcd.Event]) -> None:
        for event in events:
            stage = self._read(event.kv) if event.type is etcd.EventType.PUT else None
            if stage is not None:
                self._lives(stage)
            elif isinstance(key := self._keys.parse(event.kv.key), StageKey) and key.node not in self._gone:
                self._missing.setdefault(key.node, trio.current_time())
        self._note()

    def _read(self, kv: etcd.KeyValue) -> _Key | None:
        key = self._keys.parse(kv.key)
        if not isinstance(key, StageKey) or not kv.lease:
            return None
        try:
            return _Key(key.node, decode_stage(kv.value).revision)
        except RecordError:
            return _Key(key.node, 0)

    def _lives(self, key: _Key) -> None:
        self._applied[key.name] = max(key.revision, self._applied.get(key.name, 0))
        self._missing.pop(key.name, None)
        self._gone.discard(key.name)

    # -- what follows from it -------------------------------------------------------------------------------

    async def _conclude(self) -> None:
        """Bring what is known into `living`, not too often."""
        while True:
            noted, living = self._noted, self._as_known()
            if living != self.living:
                self.living = living
                self._on_news()
                await trio.sleep(FIRST_PAUSE + self._nodes * PAUSE_PER_NODE)
                continue
            await noted.wait()

    async def _find_gone(self) -> None:
        """Have those count as gone that have been missing for long."""
        while True:
            noted, now = self._noted, trio.current_time()
            over = {name: since for name, since in self._missing.items() if since + GONE_SECONDS <= now}
            if over:
                await self._look_again(over)
                continue
            with trio.move_on_at(min(self._missing.values(), default=float("inf")) + GONE_SECONDS):
                await noted.wait()

    async def _look_again(self, missing: Mapping[str, float]) -> None:
        """Those that are missing still count as gone. A watch may have been without etcd all the while."""
        try:
            if len(missing) > FEW:
                await trio.sleep(self._rng.uniform(0, self._pause(len(missing))))
            await self._read_all(missing)
        except etcd.EtcdError as error:
            self._cannot(error)
            await trio.sleep(RETRY_MOST * self._rng.uniform(0.5, 1.0))
            return
        for name, since in missing.items():
            if self._missing.get(name) == since:
                del self._missing[name]
                self._applied.pop(name, None)
                self._gone.add(name)
        self._note()

    def _as_known(self) -> Living:
        return Living(asked=frozenset((*self._gone, *self._applied)), applied=dict(self._applied))
