"""The snapshot cache, on disk: for a host that boots while etcd is away (decision 0014), and for one that finds
another etcd than it left, or an older one (decision 0020).

When the file (`cachefile`) is written and read, and what is logged about it. Nothing about it ever ends the agent: a
mesh that cannot be written is kept in memory all the same, and a file that cannot be used leaves the agent with etcd
alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import trio
from attrs import evolve, field, frozen

from kilo_etcd.agent.cachefile import FILE, CachedMesh, CachedSnapshot, Identity, Unusable, read, remove, save
from kilo_etcd.agent.state_directory import StateFound, look
from kilo_etcd.model import Snapshot
from kilo_etcd.runtime.logs import Once
from kilo_etcd.store.view import Holdings

T = TypeVar("T")

PAUSE_SECONDS = 5.0
"""Between two writes at least."""

PAUSE_FACTOR = 50
"""And so many times as long as the last one took: a large mesh that never rests costs 2 % of a CPU at most."""

RETRY_SECONDS = 60.0
"""After a write that failed: what fills a disk takes its time to go."""


async def _in_thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)


@frozen
class Disk:
    """Where the cached snapshot is."""

    state_dir: Path
    run: Callable[[Callable[[], Any]], Awaitable[Any]] = _in_thread
    """What runs file work, in which a disk may take its time."""
    clock: Callable[[], float] = field(default=time.time)
    private_key: str | None = field(default=None, repr=False)
    """The host's, which is to be in that directory too; None: that is not looked at."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.state_dir / FILE


class SnapshotCache:
    """The snapshot cache of one agent. `run` is its task; `disk` None: nothing is ever written or found."""

    def __init__(self, disk: Disk | None, identity: Identity, once: Once) -> None:
        self._disk = disk
        self._identity = identity
        self._once = once
        self._noted: Snapshot | None = None
        self._holdings: Callable[[], Holdings | None] = lambda: None
        self._due = trio.Event()
        self._writing = trio.Lock()
        self._key_unusable = False
        """Whether the key's file was of no use when it was last there."""
        self.trouble: str | None = None
        """A sentence on a snapshot that could not be written; None: the last one was."""

    async def read(self) -> CachedMesh | None:
        """The cached content, if it is of use; if it is not, a warning says so."""
        disk = self._disk
        if disk is None:
            return None
        try:
            cached: CachedMesh | None = await disk.run(lambda: read(disk.path, self._identity))
        except Unusable as error:
            self._unusable(error)
            return None
        return cached

    async def remember(self, cached: CachedMesh, *, fits: Callable[[Snapshot], str | None]) -> CachedSnapshot | None:
        """The cached snapshot, if it is of use; if it is not, a warning says so. `fits`: why it cannot be of use to
        this host, in a sentence; None: it can."""
        assert self._disk is not None
        try:
            decoded: CachedSnapshot = await self._disk.run(cached.decoded)
            if (reason := fits(decoded.snapshot)) is not None:
                raise Unusable(reason)
        except Unusable as error:
            self._unusable(error)
            return None
        return decoded

    def _unusable(self, error: Unusable) -> None:
        self._once.warning(
            "snapshot cache", "the cached snapshot cannot be used; going by etcd alone", error=str(error)
        )

    def age(self, decoded: CachedSnapshot) -> str:
        """How old it is, as text."""
        return decoded.age(time.time() if self._disk is None else self._disk.clock())

    def note(self, snapshot: Snapshot, holdings: Callable[[], Holdings | None]) -> None:
        """`snapshot` is in force, and is to be kept; `holdings`, asked when it is written, is what it was made of."""
        if snapshot is not self._noted:
            self._noted, self._holdings = snapshot, holdings
            self._due.set()

    async def look(self) -> StateFound:
        """What is wrong with the directory, or with what was written there last; what can be restored is. A snapshot
        that is gone is written again."""
        disk = self._disk
        if disk is None or disk.private_key is None:
            await trio.lowlevel.checkpoint()
            return StateFound(self.trouble)
        private_key = disk.private_key
        restore = not self._key_unusable
        state: StateFound = await disk.run(lambda: look(disk.state_dir, private_key, restore=restore))
        self._key_unusable = state.unusable
        gone = self._noted is not None and not await disk.run(lambda: os.path.exists(disk.path))
        if gone:
            self._due.set()
        if state.trouble is None and (gone or self.trouble is not None):
            await self.flush()
        return state if state.trouble is not None else evolve(state, trouble=self.trouble)

    async def run(self) -> None:
        """Write what is noted, the newest only, until cancelled."""
        while True:
            await self._due.wait()
            await trio.sleep(await self.flush())

    async def flush(self) -> float:
        """Write now what is noted and not written yet; the seconds to leave it alone."""
        async with self._writing:
            return await self._flush()

    async def _flush(self) -> float:
        if not self._due.is_set():
            return 0.0
        self._due = trio.Event()
        disk, holdings = self._disk, self._holdings()
        if disk is None or holdings is None:
            return 0.0
        began = time.monotonic()
        try:
            await disk.run(lambda: save(disk.path, self._identity, holdings, now=disk.clock()))
        # ValueError: a clock that shows no year.
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            self._once.warning(
                "snapshot cache", "the snapshot cannot be cached on disk for a boot without etcd",
                path=str(disk.path), error=reason,
            )  # fmt: skip
            remedy = "; make room there, or make the directory writable" if isinstance(error, OSError) else ""
            self.trouble = (
                f"the snapshot cannot be cached on disk for a boot without etcd: {disk.path}: {reason}{remedy}"
            )
            self._due.set()
            return RETRY_SECONDS
        self.trouble = None
        self._once.clear("snapshot cache", "the snapshot is cached on disk again")
        return max(PAUSE_SECONDS, PAUSE_FACTOR * (time.monotonic() - began))

    async def forget(self) -> None:
        """Remove what is kept, and keep nothing more. OSError."""
        disk, self._disk = self._disk, None
        if disk is not None:
            await disk.run(lambda: remove(disk.state_dir))
