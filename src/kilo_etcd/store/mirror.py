"""The watched prefix, held in memory and given out as snapshots in revision order.

`Mirror.run` lists, watches from the next revision on, and lists again when etcd has compacted that revision away, when
the watch fails, and every few minutes, since a watch alone does not ensure that nothing was missed. While etcd is away
the last snapshot stays (`connected` is False) and is tried again with jitter, forever.

Bursts coalesce: the first change after a quiet time is given out at once; while changes keep coming, at most one
snapshot every `hold` seconds. A reader that waits gets the newest, never one after the other.

etcd going back in time is not followed. When a listing or a probe comes from another cluster, or its revision or raft
term is lower than one seen before, `untrusted_reason` says so in a sentence, nothing is given out, and the mirror waits
until that passes or until the operator says in this very etcd that it is the mesh's (`kgctl mesh adopt`). The revision
of an etcd that went back grows with each write, perhaps beyond the one that was seen before it is looked at. So the
newest key that is known has to be in its history too; that is looked at with each listing and probe, and before a watch
that connected again gives anything.
Only answers to linearizable reads are verified: a watch may rightly be served by a member that lags behind. A writer
calls `verify` first: nothing is written to an etcd that is not followed.
"""

from __future__ import annotations

import random

import structlog
import trio
from attrs import frozen

from kilo_etcd.etcd.api import (
    Client,
    Compacted,
    EtcdError,
    Header,
    KeyValue,
    RangeResult,
    Unavailable,
    WatchBatch,
)
from kilo_etcd.model import Granularity, InternalIPs, IPAddress, IPNetwork, Snapshot
from kilo_etcd.store.addresses import Claimant
from kilo_etcd.store.events import wait_any
from kilo_etcd.store.history import last_good
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import adopts, decode_granularity, decode_internal_ips, decode_subnets
from kilo_etcd.store.view import Holdings, View

HOLD = 0.025
"""Seconds between two snapshots of one burst: enough to gather what belongs together, short compared with a lease."""
PROBE_PERIOD = 5.0
"""Seconds between reads that confirm that etcd can still be reached: a watch is silent by itself."""
OTHER_HISTORY = "etcd went back in time: its history is another one than before"
RETRY_FIRST = 0.2
RETRY_MOST = 5.0


class ClusterNotTrusted(EtcdError):
    """etcd answers, and is not to be followed or told anything; the message says why."""

    kind = "etcd is not trusted"


@frozen(kw_only=True)
class LastSeen:
    """What an earlier run saw of etcd: what it shows now is compared with that."""

    header: Header
    granularity: Granularity | None = None
    subnets: tuple[IPNetwork, ...] = ()
    internal_ips: InternalIPs | None = None
    adopted: bytes | None = None
    """The operator's adoption that was known already; None: there was none."""
    newest: tuple[bytes, int] | None = None
    """The key that was written last, and the revision of that; None: it is not known."""


class _ListAgain(Exception):
    """The watch is to be left for a new listing."""


class Mirror:
    """The prefix of `keys` as `client` sees it. One task runs it; any number look and wait."""

    def __init__(
        self,
        client: Client,
        keys: Keys,
        relist_period: float = 300.0,
        *,
        hold: float = HOLD,
        probe_period: float = PROBE_PERIOD,
        last_seen: LastSeen | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._client = client
        self._keys = keys
        self._relist_period = relist_period
        self._hold = hold
        self._probe_period = probe_period
        self._rng = rng or random.Random()
        self._log = structlog.get_logger()
        self._view = View(keys)
        self._floor: Header | None = None
        self._adopted: bytes | None = None
        self._newest: tuple[bytes, int] | None = None
        """What is to be in etcd's history before it is followed (see `LastSeen.newest`); None: nothing."""
        if last_seen is not None:
            self.go_on_from(last_seen)
        self._went_back = False
        """Whether etcd is untrusted in spite of its cluster id: then a history that cannot be read is none."""
        self.current: Snapshot | None = None
        """The newest snapshot; None before the first listing."""
        self.connected = False
        self.disconnected_since: float | None = None
        """trio.current_time() since which etcd has not answered; None while it does."""
        self.failure: EtcdError | None = None
        """Why etcd could not be read the last time; None while it answers."""
        self.untrusted_reason: str | None = None
        """Why etcd is not followed at present, as a sentence; None: it is."""
        self.generation = 0
        """How often etcd was followed again after it had been another one, or another one was adopted: then what is
        known to stand there may never have been written to it."""
        self._verified = trio.Event()
        self._published = trio.Event()
        self._changed = trio.Event()
        self._applied = 0
        self._loaded_in = -1
        """The generation of the last listing: of an etcd that was adopted since, the view says nothing."""

    def go_on_from(self, last_seen: LastSeen) -> None:
        """Compare etcd with what an earlier run saw. To be called before anything else is asked of the mirror."""
        self._view = View(
            self._keys,
            granularity=last_seen.granularity,
            subnets=last_seen.subnets or None,
            internal_ips=last_seen.internal_ips,
        )
        self._floor, self._adopted, self._newest = last_seen.header, last_seen.adopted, last_seen.newest

    @property
    def followed(self) -> bool:
        """Whether etcd answers, and is the one that is followed."""
        return self.connected and self.untrusted_reason is None

    def __repr__(self) -> str:
        state = "untrusted" if self.untrusted_reason else "connected" if self.connected else "disconnected"
        return f"<Mirror {self._keys.root} {state} revision={self._view.revision}>"

    def kv(self, key: str | bytes) -> KeyValue | None:
        """The raw key-value under the prefix as of the newest event; may be newer than `current`."""
        return self._view.kv(key)

    def kvs(self, prefix: str) -> tuple[KeyValue, ...]:
        """The raw key-values under `prefix`, sorted; may be newer than `current`."""
        return self._view.kvs(prefix)

    def nodes_with_key(self, public_key: str) -> tuple[str, ...]:
        """The nodes whose records have a public key as of the newest event, the one that keeps it first."""
        return self._view.nodes_with_key(public_key)

    def observed_by(self, observer: str) -> frozenset[str]:
        """The nodes and peers whose endpoints a node has observed, as it says as of the newest event."""
        return self._view.observed_by(observer)

    def faulty(self, node: str) -> frozenset[str]:
        """What is in a node's name as of the newest event, would have to be under one of its leases, and is under none
        or cannot be read."""
        return self._view.faulty(node)

    def holder(self, address: IPAddress) -> Claimant | None:
        """Who has a mesh address as of the newest event; None: nobody."""
        return self._view.holder(address)

    def holdings(self) -> Holdings | None:
        """What etcd holds as of the newest event, to be kept for an agent that starts later; None: it is not known."""
        return None if self.current is None else self._view.holdings()

    async def wait_newer(self, than: Snapshot | None) -> Snapshot:
        """The newest snapshot, as soon as it is another one than `than`."""
        while self.current is None or self.current is than:
            await self._published.wait()
        return self.current

    async def wait_first(self) -> Snapshot:
        """The first snapshot. EtcdError as soon as etcd cannot be read, ClusterNotTrusted if it is not followed."""
        while self.current is None:
            self.check()
            if self.failure is not None:
                raise self.failure
            await wait_any(self._published, self._verified)
        return self.current

    @property
    def trouble(self) -> str | None:
        """Why etcd cannot be read at present, as a sentence of etcd's own with what to do; None: it answers."""
        return None if self.failure is None else f"{self.failure.kind}: {self.failure}"

    @property
    def outage(self) -> str | None:
        """What sort of trouble there is with etcd, as a text that changes only with the sort; None: there is none."""
        return self.untrusted_reason or (None if self.failure is None else self.failure.kind)

    async def wait_outage_change(self, than: str | None) -> str | None:
        """`outage`, as soon as it differs from `than`."""
        while self.outage == than:
            await self._verified.wait()
        return self.outage

    @property
    def trust(self) -> tuple[int, bool]:
        """`generation`, and whether etcd may be followed. If it differs from before, what is known of the leases and
        watches in etcd holds no longer."""
        return self.generation, self.untrusted_reason is None

    async def wait_trust_change(self, than: tuple[int, bool]) -> tuple[int, bool]:
        """`trust`, as soon as it differs from `than`."""
        while self.trust == than:
            await self._verified.wait()
        return self.trust

    def observe(self, header: Header) -> None:
        """This etcd took what was written, and may be another one than the last time that it was looked at."""
        floor = self._floor
        if self.untrusted_reason is None and floor is not None and header.cluster_id not in (0, floor.cluster_id):
            reason = _why_not(header, floor)
            if reason is not None:
                self._distrust(reason, header)

    async def verify_cluster(self) -> bool:
        """Look at etcd once, before `run`: whether it may be followed, and written to. EtcdError."""
        floor = self._floor
        result = await self._look()
        in_doubt = self._newest is not None or self._went_back
        if in_doubt and _why_not(result.header, floor) is None and not self._adopts(result):
            known = None if self._newest is None else (await self._look_back(self._newest))[1]
            if known is False or (known is None and self._went_back):
                if self.untrusted_reason is None:
                    self._distrust(OTHER_HISTORY, result.header)
                return False
        return self._follows(result, floor)

    def _newest_known(self) -> tuple[bytes, int] | None:
        """The key that was written last, and its revision, as far as it is known of the etcd that is followed."""
        return self._view.newest() if self._loaded_in == self.generation else self._newest

    async def _look_back(self, newest: tuple[bytes, int]) -> tuple[Header, bool | None]:
        """The header of a linearizable read, and whether the newest key that is known was written in this etcd too, at
        the same revision; None: that cannot be told. EtcdError."""
        key, revision = newest
        result = await self._client.range(key)
        self._answered()
        written = result.kvs[0].mod_revision if result.kvs else 0
        if 0 < written <= revision:
            return result.header, written == revision
        if result.header.revision < revision:
            return result.header, False
        # It was written again since, or deleted.
        try:
            kvs = (await self._client.range(key, revision=revision)).kvs
        except Compacted:
            return result.header, None
        return result.header, bool(kvs) and kvs[0].mod_revision == revision

    async def _reason_to_doubt(self) -> tuple[Header, str | None]:
        """The header of a linearizable read, and why this is not the etcd that was followed until now, as a clause;
        None: it is, as far as can be told. EtcdError."""
        floor, newest = self._floor, self._newest_known()
        if newest is None:
            header, known = (await self._look()).header, None
        else:
            header, known = await self._look_back(newest)
        return header, _why_not(header, floor) or (OTHER_HISTORY if known is False else None)

    async def verify(self) -> None:
        """Raise ClusterNotTrusted if this etcd is not the one that is followed; to be asked before something is written
        to it that a replaced one must not be told. EtcdError."""
        if self.untrusted_reason is None and self._floor is not None:
            generation = self.generation
            header, reason = await self._reason_to_doubt()
            if reason is not None and generation == self.generation:
                # The task will find out whether it has been adopted.
                self._distrust(reason, header)
        self.check()

    def check(self) -> None:
        """Raise ClusterNotTrusted if it is known already that etcd is not to be followed."""
        if self.untrusted_reason is not None:
            raise ClusterNotTrusted(self.untrusted_reason)

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
        if self.untrusted_reason is None:
            self._newest = self._newest_known()
        in_doubt = self.untrusted_reason is not None or self._newest is not None
        if in_doubt and not await self.verify_cluster():
            await trio.sleep(self._probe_period * self._rng.uniform(0.8, 1.2))
            return
        floor = self._floor
        listing = await self._client.get_prefix(self._keys.root)
        self._answered()
        if not self._follows(listing, floor):
            return
        await self._recall(listing)
        self._loaded_in = self.generation
        if self._view.load(listing.kvs, listing.header) or self.current is None:
            self._changed.set()
        failure: EtcdError | None = None
        try:
            async with (
                self._client.watch_prefix(self._keys.root, start_revision=listing.header.revision + 1) as watch,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(self._probe)
                connection = watch.reconnects
                async for batch in watch:
                    if connection != watch.reconnects:
                        connection = watch.reconnects
                        if (await self._reason_to_doubt())[1] is not None:
                            raise _ListAgain
                    self._apply_batch(batch)
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
        """The cheapest linearizable read: it confirms that etcd answers with a quorum, and its header dates it."""
        result = await self._client.range(self._keys.adopted)
        self._answered()
        return result

    async def _probe(self) -> None:
        """Confirm every few seconds that etcd answers and is the one we know; end the watch when it is time to list."""
        relist_at = trio.current_time() + self._relist_period * self._rng.uniform(0.8, 1.2)
        while True:
            await trio.sleep(self._probe_period * self._rng.uniform(0.8, 1.2))
            try:
                header, reason = await self._reason_to_doubt()
            except EtcdError as error:
                # The watch comes back by itself where it left off, so there is no need to give it up.
                self._failed(error)
                continue
            if trio.current_time() >= relist_at or self.untrusted_reason is not None or reason is not None:
                raise _ListAgain
            self._floor = header

    def _apply_batch(self, batch: WatchBatch) -> None:
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
                self._view.recall(granularity=await last_good(self._client, kv, decode_granularity))
            if self._view.internal_ips is None and kv.key == self._keys.internal_ips.encode():
                self._view.recall(internal_ips=await last_good(self._client, kv, decode_internal_ips))
            if not self._view.subnets and kv.key == self._keys.subnets.encode():
                self._view.recall(subnets=await last_good(self._client, kv, decode_subnets))

    def _follows(self, result: RangeResult, floor: Header | None) -> bool:
        """Whether a linearizable answer may be followed, which was asked for when `floor` was known; sets or clears
        `untrusted_reason`. `result` has the operator's adoption, if there is one."""
        reason = _why_not(result.header, floor)
        if reason is not None:
            if not self._adopts(result):
                self._distrust(reason, result.header)
                return False
            self._log.warning("this etcd is adopted; following it", cluster=f"{result.header.cluster_id:x}",
                              revision=result.header.revision)  # fmt: skip
            self.generation += 1
        elif self.untrusted_reason is not None:
            self.generation += 1
            self._log.info("etcd is as it was; following it again")
        self._floor = result.header
        self._went_back, self._newest = False, None
        self._set_untrusted(None)
        return True

    def _adopts(self, result: RangeResult) -> bool:
        """Whether the operator has adopted this etcd since the last time."""
        key = self._keys.adopted.encode()
        adoption = next((kv.value for kv in result.kvs if kv.key == key), None)
        if self.current is not None:
            adopted = self._view.kv(key)
            self._adopted = adopted.value if adopted else None
        return adopts(adoption, self._adopted, result.header.cluster_id)

    def _distrust(self, reason: str, header: Header) -> None:
        if self._floor is not None and header.cluster_id == self._floor.cluster_id:
            self._went_back = True
            self._newest = self._newest_known() or self._newest
        sentence = f"{reason}; the last plan stays in force. If this is intended: kgctl mesh adopt"
        if self.untrusted_reason is None:
            self._log.error(sentence)
        self._set_untrusted(sentence)

    def _set_untrusted(self, sentence: str | None) -> None:
        self.untrusted_reason = sentence
        self._notify()

    def _notify(self) -> None:
        event, self._verified = self._verified, trio.Event()
        event.set()

    def _answered(self) -> None:
        if not self.connected:
            self._log.info("etcd answers", prefix=self._keys.root)
        self.connected, self.disconnected_since = True, None
        if self.failure is not None:
            self.failure = None
            self._notify()

    def _failed(self, error: EtcdError) -> None:
        if self.connected or self.failure is None or self.failure.kind != error.kind:
            symptom = "etcd does not answer" if type(error) is Unavailable else error.kind
            self._log.warning(f"{symptom}; the last snapshot stays", error=str(error))
        if self.connected:
            self.disconnected_since = trio.current_time()
        self.connected, self.failure = False, error
        self._notify()


def _why_not(header: Header, floor: Header | None) -> str | None:
    """Why an etcd whose answer has `header` is not the one that answered with `floor` before, as a clause."""
    if floor is None:
        return None
    if floor.cluster_id and header.cluster_id != floor.cluster_id:
        return f"etcd is another cluster now ({header.cluster_id:x}, it was {floor.cluster_id:x})"
    for quantity, now, before in (
        ("revision", header.revision, floor.revision),
        ("raft term", header.raft_term, floor.raft_term),
    ):
        if now < before:
            return f"etcd went back in time: its {quantity} is {now}, it was {before}"
    return None


def _first(group: BaseExceptionGroup[EtcdError]) -> EtcdError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, EtcdError)
    return error
