"""The leased keys of this host: what stands under its short lease, as far as is known, and the watch on them.

A write whose answer is lost leaves a key unsure: it may stand there or not, so it is for its owner to write again
or to take away, and never to forget.

A key that another writer has deleted, overwritten, or put under another lease is *changed*: `on_due` is called when its
owner may write it again. That is at once the first time. After that the pause doubles from 1 s to 60 s, until the key
has been left alone for five minutes: two copies of a machine would otherwise overwrite each other forever. What tells
a foreign write from an own one is the revision of the last own write, then the lease and the value. Own writes happen
under `lock`, so no event is examined before the outcome of a write is noted here. An own write that arrives after a
later one is restored like a foreign one: etcd holds the wrong value then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import trio

from kilo_etcd.base.backoff import RepairBackoff
from kilo_etcd.etcd.api import Client, EtcdError, EventType, KeyValue

RETRY_FIRST = 0.2

PAUSE_FIRST, PAUSE_LONGEST = 1.0, 60.0
"""Seconds before a key is restored for the second time in a row, and at most."""
QUIET_SECONDS = 300.0
"""More than the longest pauses of two writers that restore one key."""
CONTESTED = 3
"""Changes in a row by which a key is contested."""


class LeasedKeys:
    """Changed only by who holds `lock`, from before the write until its outcome is noted here.

    `watched` says which keys are worth a watch; `compare` looks at the others.
    `lease` gives the ID of the lease under which the keys stand. `on_contested` is called when `contested` is another.
    """

    def __init__(
        self,
        client: Client,
        lock: trio.Lock,
        *,
        retry_most: float,
        lease: Callable[[], int],
        on_due: Callable[[], None],
        on_contested: Callable[[], None],
        rng: random.Random,
        watched: Callable[[str], bool] = lambda _key: True,
    ) -> None:
        self._client = client
        self._lock = lock
        self._retry_most = retry_most
        self._lease = lease
        self._on_due = on_due
        self._on_contested = on_contested
        self._watched = watched
        self._rng = rng
        self._changed = trio.Event()
        self._unsure: set[str] = set()
        self._since: dict[str, int] = {}
        """etcd's revision from which on a key stands there."""
        self._due: dict[str, float] = {}
        """When a changed key may be written again, on trio's clock."""
        self._backoffs: dict[str, RepairBackoff] = {}
        self.foreign: set[str] = set()
        """Keys that `find` has brought: they are only to be deleted, so nobody watches them. There may be thousands."""
        self._deleted_at: dict[str, int] = {}
        """Key -> up to which mod revision its value is known to be gone, as long as who reads etcd may not know."""
        self.values: dict[str, bytes] = {}
        self.contested: tuple[str, ...] = ()
        """Keys that another writer changes again and again."""

    def __repr__(self) -> str:
        return f"<Held {', '.join(sorted(self.values))}>"

    def confirmed(self, key: str, value: bytes) -> bool:
        """Whether `value` stands at `key`, as far as is known."""
        return self.values.get(key) == value and key not in self._unsure and key not in self._due

    def waits(self, key: str, value: bytes) -> bool:
        """Whether `key`, which another writer has changed, is not to be restored to `value` yet."""
        return self.values.get(key) == value and trio.current_time() < self._due.get(key, float("-inf"))

    @property
    def foreign_revisions(self) -> dict[str, int]:
        """The keys that `find` has brought, each with the mod revision that it had."""
        return {key: self._since[key] for key in self.foreign}

    @property
    def changed(self) -> tuple[str, ...]:
        """The keys that another writer has changed and that are not restored yet."""
        return tuple(self._due)

    def changes(self, key: str) -> int:
        """How often in a row another writer has changed `key`."""
        backoff = self._backoffs.get(key)
        return 0 if backoff is None else backoff.repairs

    def put(self, key: str, value: bytes, revision: int) -> None:
        """`key` was written, or read, at `revision`."""
        self.values[key], self._since[key] = value, revision
        self.foreign.discard(key)
        self._unsure.discard(key)
        self._due.pop(key, None)
        self._notify()

    def may_put(self, key: str, value: bytes, after: int) -> None:
        """`key` is about to be written, at a revision after `after`."""
        self.values[key] = value
        self._since.setdefault(key, after)
        self.foreign.discard(key)
        self._unsure.add(key)
        self._notify()

    def may_remove(self, key: str) -> None:
        """`key` is about to be deleted."""
        self._unsure.add(key)

    def remove(self, key: str, revision: int = 0) -> None:
        """`key` is held no more; what it held up to `revision` is gone, or another writer has changed it since."""
        if revision:
            self._deleted_at[key] = revision
        self.values.pop(key, None)
        self.foreign.discard(key)
        self._since.pop(key, None)
        self._due.pop(key, None)
        self._unsure.discard(key)
        self._notify()

    def clear(self) -> None:
        """Nothing is held any more: the lease has gone, or etcd is another one."""
        for key in list(self.values):
            self.remove(key)
        self._deleted_at.clear()
        self._backoffs.clear()
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # --- what etcd holds ---------------------------------------------------------------------------------------

    async def compare(self, key: str, kv: KeyValue | None, revision: int) -> None:
        """Take note of what stands at `key`, one that is held, as of `revision` or later."""
        revision = kv.mod_revision if kv is not None else revision
        # Looked at before the lock is taken, since this is asked of each of many keys again and again.
        if not self._ours(key, kv) and self._since.get(key, revision) < revision:
            await self._note_found(key, kv, revision)

    async def find(self, kvs: Iterable[KeyValue], revision: int) -> None:
        """Take note of `kvs`, of which `revision` or a later one knows, at places that are this host's alone: held and
        not wanted they are deleted, unless they are written once more before that."""
        async with self._lock:
            by_key = {kv.key.decode(): kv for kv in kvs}
            self._deleted_at = {key: at for key, at in self._deleted_at.items() if at > revision or key in by_key}
            new = {key: kv for key, kv in by_key.items() if kv.mod_revision > self._deleted_at.get(key, 0)}
            for key in new.keys() - self.values.keys():
                self._note_change(key)
                self.values[key], self._since[key] = new[key].value, new[key].mod_revision
                self._due[key] = trio.current_time()
                self.foreign.add(key)
            self._notify()

    async def _note_found(self, key: str, kv: KeyValue | None, revision: int) -> None:
        # Under the lock, so that no write is under way whose outcome would decide about this.
        async with self._lock:
            if self._since.get(key, revision) >= revision or key in self._unsure:
                return
            self._since[key] = revision
            if self._ours(key, kv):
                self._due.pop(key, None)
                self._notify()
                return
            if key in self._due:
                return
            self._due[key] = trio.current_time() + self._note_change(key)
            self._notify()

    def _ours(self, key: str, kv: KeyValue | None) -> bool:
        return kv is not None and kv.lease == self._lease() and kv.value == self.values.get(key)

    def _note_change(self, key: str) -> float:
        """Another writer has changed `key`; the seconds until it may be restored."""
        now = trio.current_time()
        backoff = self._backoffs.setdefault(
            key, RepairBackoff(burst=1, first=PAUSE_FIRST, longest=PAUSE_LONGEST, quiet=QUIET_SECONDS)
        )
        return backoff.pause(now)

    # --- the tasks ---------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Notice when one of the keys is changed, and when it may be restored, until cancelled."""
        async with trio.open_nursery() as outer:
            outer.start_soon(self._watch_time)
            while True:
                keys = self._to_watch()
                async with trio.open_nursery() as nursery:
                    for key in keys:
                        nursery.start_soon(self._watch_key, key)
                    while self._to_watch() == keys:
                        await self._changed.wait()
                    nursery.cancel_scope.cancel()

    async def _watch_time(self) -> None:
        notified: dict[str, float] = {}
        while True:
            changed, now = self._changed, trio.current_time()
            over = {key: due for key, due in self._due.items() if due <= now}
            if over.items() - notified.items():
                self._on_due()
            notified = over
            self._backoffs = {
                key: repair_backoff for key, repair_backoff in self._backoffs.items() if now <= repair_backoff.until
            }
            contested = tuple(
                sorted(
                    key
                    for key, repair_backoff in self._backoffs.items()
                    if repair_backoff.repairs >= CONTESTED and now < repair_backoff.until
                )
            )
            if contested != self.contested:
                self.contested = contested
                self._on_contested()
            ends = (self._backoffs[key].until for key in contested)
            with trio.move_on_at(min((*(due for due in self._due.values() if due > now), *ends), default=float("inf"))):
                await changed.wait()

    def _to_watch(self) -> set[str]:
        return {key for key in self.values if key not in self.foreign and self._watched(key)}

    async def _watch_key(self, key: str) -> None:
        delay = RETRY_FIRST
        while True:
            try:
                async with self._client.watch(key, start_revision=self._since.get(key, 0) + 1) as watch:
                    async for batch in watch:
                        delay = RETRY_FIRST
                        for event in batch.events:
                            kv = event.kv if event.type is EventType.PUT else None
                            await self._note_found(key, kv, event.kv.mod_revision)
            except EtcdError:
                await trio.sleep(delay * self._rng.uniform(0.5, 1.5))
                delay = min(delay * 2, self._retry_most)
                await self._look_at(key)

    async def _look_at(self, key: str) -> None:
        """The watch cannot say what has happened to `key` since: see what stands there."""
        try:
            result = await self._client.range(key)
        except EtcdError:
            return
        kv = result.kvs[0] if result.kvs else None
        await self._note_found(key, kv, result.header.revision if kv is None else kv.mod_revision)
        if key in self._since:
            self._since[key] = max(self._since[key], result.header.revision)
