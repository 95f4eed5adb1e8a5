"""The watched prefix, held in memory and given out as snapshots in revision order.

`Mirror.run` lists, watches from the next revision on, and lists again when etcd has compacted that revision away, when
the watch fails, and every few minutes, since a watch alone is not proof that nothing was missed. While etcd is away the
last snapshot stays (`connected` is False) and is tried again with jitter, for ever.

Bursts coalesce: the first change after a quiet time is given out at once; while changes keep coming, at most one
snapshot every `hold` seconds. Whoever waits gets the newest, never one after the other.

etcd going back in time is not followed. When a listing or a probe comes from another cluster, or its revision or raft
term is lower than one seen before, `suspect` says so in a sentence, nothing is given out, and the mirror waits until
that passes or until the operator says in this very etcd that it is the mesh's (`kgctl mesh adopt`). Only answers to
linearizable reads are judged: a watch may rightly be served by a member that lags behind.
"""

from __future__ import annotations

import random

import structlog
import trio

from kilo_etcd.etcd.api import Client, Compacted, EtcdError, Header, KeyValue, RangeResult, WatchBatch
from kilo_etcd.model import Snapshot
from kilo_etcd.store.history import last_good
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import adopts, decode_granularity, decode_subnets
from kilo_etcd.store.view import Holdings, View

HOLD = 0.025
"""Seconds between two snapshots of one burst: enough to gather what belongs together, small beside a lease."""
PROBE_PERIOD = 5.0
"""Seconds between looks at etcd that prove that it can still be reached: a watch is silent by itself."""
RETRY_FIRST = 0.2
RETRY_MOST = 5.0


class _ListAgain(Exception):
    """The watch is to be left for a new listing."""


class Mirror:
    """The prefix of `keys` as `client` sees it. One task runs it; any number look and wait.

    `last_seen` is a snapshot from an earlier run (the disk's): what etcd shows is judged against it, but it is
    not given out.
    """

    def __init__(
        self,
        client: Client,
        keys: Keys,
        relist_period: float = 300.0,
        *,
        hold: float = HOLD,
        probe_period: float = PROBE_PERIOD,
        last_seen: Snapshot | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._client = client
        self._keys = keys
        self._relist_period = relist_period
        self._hold = hold
        self._probe_period = probe_period
        self._rng = rng or random.Random()
        self._log = structlog.get_logger()
        self._view = View(
            keys,
            granularity=last_seen.granularity if last_seen else None,
            subnets=last_seen.subnets or None if last_seen else None,
        )
        self._floor = (
            Header(cluster_id=last_seen.cluster_id, revision=last_seen.revision, raft_term=last_seen.raft_term)
            if last_seen
            else None
        )
        self.current: Snapshot | None = None
        """The newest snapshot; None before the first listing."""
        self.connected = False
        self.disconnected_since: float | None = None
        """trio.current_time() since which etcd has not answered; None while it does."""
        self.last_error: str | None = None
        self.suspect: str | None = None
        """Why etcd is not followed at present, as a sentence; None: it is."""
        self._published = trio.Event()
        self._changed = trio.Event()
        self._applied = 0

    def __repr__(self) -> str:
        state = "suspect" if self.suspect else "connected" if self.connected else "disconnected"
        return f"<Mirror {self._keys.root} {state} revision={self._view.revision}>"

    def kv(self, key: str | bytes) -> KeyValue | None:
        """The raw key-value under the prefix as of the newest event; may be newer than `current`."""
        return self._view.kv(key)

    def kvs(self, prefix: str) -> tuple[KeyValue, ...]:
        """The raw key-values under `prefix`, sorted; may be newer than `current`."""
        return self._view.kvs(prefix)

    def holdings(self) -> Holdings | None:
        """What etcd holds as of the newest event, to be kept for an agent that starts later; None: it is not known."""
        return None if self.current is None else self._view.holdings()

    async def wait_newer(self, than: Snapshot | None) -> Snapshot:
        """The newest snapshot, as soon as it is another one than `than`."""
        while self.current is None or self.current is than:
            await self._published.wait()
        return self.current

    def _adopt(self, found: RangeResult) -> bool:
        """Follow etcd although it went back in time or is another one, if the operator has said so there."""
        said = found.kvs[0].value if found.kvs else None
        known = self._view.kv(self._keys.adopted)
        if not adopts(said, known.value if known else None, found.header.cluster_id):
            return False
        self._log.warning("this etcd is adopted; following it", cluster=f"{found.header.cluster_id:x}",
                          revision=found.header.revision)  # fmt: skip
        self._floor = self.suspect = None
        return True

    # --- the tasks ---------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow etcd until cancelled. Started at once, whether or not etcd answers."""
        self.disconnected_since = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publish)
            task_status.started()
            delay = RETRY_FIRST
            while True:
                try:
                    await self._follow()
                    delay = RETRY_FIRST
                except EtcdError as error:
                    if self.connected:
                        delay = RETRY_FIRST
                    self._failed(error)
                    await trio.sleep(delay * self._rng.uniform(0.5, 1.5))
                    delay = min(delay * 2, RETRY_MOST)

    async def _follow(self) -> None:
        """List, watch, until it is time to list again. Raises EtcdError."""
        if self.suspect is not None:
            found = await self._look()
            if not self._adopt(found) and not self._credible(found.header):
                await trio.sleep(self._probe_period * self._rng.uniform(0.8, 1.2))
                return
        listing = await self._client.get_prefix(self._keys.root)
        self._answered()
        if not self._credible(listing.header):
            return
        await self._recall(listing)
        if self._view.load(listing.kvs, listing.header) or self.current is None:
            self._changed.set()
        failure: EtcdError | None = None
        try:
            async with (
                self._client.watch_prefix(self._keys.root, start_revision=listing.header.revision + 1) as watch,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(self._probe)
                async for batch in watch:
                    self._take(batch)
                nursery.cancel_scope.cancel()
        except* _ListAgain:
            pass
        except* EtcdError as group:
            failure = _first(group)
        if isinstance(failure, Compacted):
            self._log.info("listing again", reason=str(failure))
        elif failure is not None:
            raise failure

    async def _look(self) -> RangeResult:
        """The cheapest linearizable read: it proves that etcd answers with a quorum, and its header dates it."""
        found = await self._client.range(self._keys.adopted)
        self._answered()
        return found

    async def _probe(self) -> None:
        """Prove every few seconds that etcd answers and is the one we know; end the watch when it is time to list."""
        relist_at = trio.current_time() + self._relist_period * self._rng.uniform(0.8, 1.2)
        while True:
            await trio.sleep(self._probe_period * self._rng.uniform(0.8, 1.2))
            try:
                header = (await self._look()).header
            except EtcdError as error:
                # The watch comes back by itself where it left off, so there is no need to give it up.
                self._failed(error)
                continue
            if trio.current_time() >= relist_at or not self._credible(header):
                raise _ListAgain

    def _take(self, batch: WatchBatch) -> None:
        if self._floor is not None and batch.header.cluster_id not in (0, self._floor.cluster_id):
            raise _ListAgain
        if self._view.apply(batch.events, batch.header):
            self._applied += 1
            self._changed.set()

    async def _publish(self) -> None:
        """Give snapshots out: the first change at once, then at most one every `hold` seconds."""
        earliest = 0.0
        while True:
            await self._changed.wait()
            while True:
                # What has already arrived belongs to the same burst.
                applied = self._applied
                await trio.lowlevel.checkpoint()
                if applied == self._applied:
                    break
                if trio.current_time() > earliest + self._hold:
                    break
            await trio.sleep_until(max(earliest, trio.current_time()))
            self._changed = trio.Event()
            self.current = self._view.snapshot()
            earliest = trio.current_time() + self._hold
            published, self._published = self._published, trio.Event()
            published.set()

    # --- what is known of etcd ---------------------------------------------------------------------------------

    async def _recall(self, listing: RangeResult) -> None:
        """Look up what is in force where the mesh's own settings hold nonsense and this view has nothing better."""
        for kv in listing.kvs:
            if self._view.granularity is None and kv.key == self._keys.granularity.encode():
                self._view.granularity = await last_good(self._client, kv, decode_granularity)
            if not self._view.subnets and kv.key == self._keys.subnets.encode():
                self._view.subnets = await last_good(self._client, kv, decode_subnets)

    def _credible(self, header: Header) -> bool:
        """Whether a linearizable answer may be followed; sets or clears `suspect`."""
        floor = self._floor
        reason = None
        if floor is not None and floor.cluster_id and header.cluster_id != floor.cluster_id:
            reason = f"etcd is another cluster now ({header.cluster_id:x}, it was {floor.cluster_id:x})"
        elif floor is not None and header.revision < floor.revision:
            reason = f"etcd went back in time: its revision is {header.revision}, it was {floor.revision}"
        elif floor is not None and header.raft_term < floor.raft_term:
            reason = f"etcd went back in time: its raft term is {header.raft_term}, it was {floor.raft_term}"
        if reason is None:
            if self.suspect is not None:
                self._log.info("etcd is as it was; following it again")
            self._floor, self.suspect = header, None
            return True
        sentence = f"{reason}; the last plan stays in force. If this is intended: kgctl mesh adopt"
        if self.suspect is None:
            self._log.error(sentence)
        self.suspect = sentence
        return False

    def _answered(self) -> None:
        if not self.connected:
            self._log.info("etcd answers", prefix=self._keys.root)
        self.connected, self.disconnected_since, self.last_error = True, None, None

    def _failed(self, error: EtcdError) -> None:
        if self.connected or self.last_error is None:
            self._log.warning("etcd does not answer; the last snapshot stays", error=str(error))
        if self.connected:
            self.disconnected_since = trio.current_time()
        self.connected, self.last_error = False, str(error)


def _first(group: BaseExceptionGroup[EtcdError]) -> EtcdError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, EtcdError)
    return found
