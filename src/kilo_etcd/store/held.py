"""What stands under this host's short lease, as far as is known, and the watching that it stays there.

A write whose answer is lost leaves a key unsure: it may stand there or not, so it is for its owner to write again
or to take away, and never to forget. A key that someone else deletes is noticed (`on_gone` is called, and the key is
held no more), so that its owner can put it back; what the owner deletes itself, after `remove`, is not.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from kilo_etcd.etcd.api import Client, EtcdError, EventType

RETRY_FIRST = 0.2


class Held:
    """Changed only by who holds `lock`, from before the write until its outcome is noted here.

    `minded` says of which keys it is worth a watch to see that they stay.
    """

    def __init__(
        self,
        client: Client,
        lock: trio.Lock,
        *,
        retry_most: float,
        on_gone: Callable[[], None],
        rng: random.Random,
        minded: Callable[[str], bool] = lambda _key: True,
    ) -> None:
        self._client = client
        self._lock = lock
        self._retry_most = retry_most
        self._on_gone = on_gone
        self._minded = minded
        self._rng = rng
        self._changed = trio.Event()
        self._unsure: set[str] = set()
        self._since: dict[str, int] = {}
        """etcd's revision from which on a key stands there."""
        self.values: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"<Held {', '.join(sorted(self.values))}>"

    def surely(self, key: str, value: bytes) -> bool:
        return self.values.get(key) == value and key not in self._unsure

    def put(self, key: str, value: bytes, revision: int) -> None:
        """`key` was written, or read, at `revision`."""
        self.values[key], self._since[key] = value, revision
        self._unsure.discard(key)
        self._tell()

    def may_put(self, key: str, value: bytes, after: int) -> None:
        """`key` is about to be written, at a revision after `after`."""
        self.values[key] = value
        self._since.setdefault(key, after)
        self._unsure.add(key)
        self._tell()

    def may_remove(self, key: str) -> None:
        """`key` is about to be deleted."""
        self._unsure.add(key)

    def remove(self, key: str) -> None:
        self.values.pop(key, None)
        self._since.pop(key, None)
        self._unsure.discard(key)
        self._tell()

    def clear(self) -> None:
        for key in list(self.values):
            self.remove(key)

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # --- the tasks ---------------------------------------------------------------------------------------------

    async def mind(self) -> None:
        """Notice when one of the keys is taken away, until cancelled."""
        while True:
            keys = self._to_mind()
            async with trio.open_nursery() as nursery:
                for key in keys:
                    nursery.start_soon(self._mind_key, key)
                while self._to_mind() == keys:
                    await self._changed.wait()
                nursery.cancel_scope.cancel()

    def _to_mind(self) -> set[str]:
        return {key for key in self.values if self._minded(key)}

    async def _mind_key(self, key: str) -> None:
        delay = RETRY_FIRST
        while True:
            try:
                async with self._client.watch(key, start_revision=self._since.get(key, 0) + 1) as watch:
                    async for batch in watch:
                        delay = RETRY_FIRST
                        for event in batch.events:
                            if event.type is EventType.DELETE:
                                await self._gone(key, event.kv.mod_revision)
            except EtcdError:
                await trio.sleep(delay * self._rng.uniform(0.5, 1.5))
                delay = min(delay * 2, self._retry_most)
                await self._look_at(key)

    async def _look_at(self, key: str) -> None:
        """The watch cannot say what has happened to `key` since: see whether it is there."""
        try:
            found = await self._client.range(key)
        except EtcdError:
            return
        if not found.kvs:
            await self._gone(key, found.header.revision)
        elif key in self._since:
            self._since[key] = max(self._since[key], found.header.revision)

    async def _gone(self, key: str, revision: int) -> None:
        # Under the lock, so that no write is under way whose outcome would decide about this.
        async with self._lock:
            if self._since.get(key, revision) >= revision:
                return
            self.remove(key)
        self._on_gone()
