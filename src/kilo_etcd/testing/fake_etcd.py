"""An etcd in memory, on trio's clock: what `kilo_etcd.etcd.api.Client` promises, without a process or a socket.

A `FakeEtcd` is the cluster; `client()` gives any number of clients, each of which can be cut off by itself. It
has etcd's revisions, transactions (with etcd's refusals), leases that end when their time is up, history,
compaction, and watches that resume by themselves. There is no task behind it: due leases end when somebody looks,
and of the watches that wait one looks when the next is due. So it works under any clock, a mock one that jumps
included, and two runs of one test are the same run.

Faults: `down`/`up` (a cluster without a quorum: leases stand still and are refreshed at the next election), `delay`,
`drop_watches`, `compact`, `replace_cluster`, `backup`/`restore`. Of one host: `FakeClient.cut`/`mend` (away),
`cut(answers=False)` and `cut(requests=False)` (one direction only), `refuse` (etcd answers with an error), `lag`
(seconds on the way, which may differ from packet to packet), `lose_answer` (the write is done, the answer is lost),
`stall` (its watches stand still for a while), `lose_batches` and `repeat_batches` (what a watch promises is broken).
It does not know authentication, TLS or members.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import trio
from attrs import define, evolve, field, frozen

from kilo_etcd.etcd.api import (
    BadRequest,
    Client,
    Compacted,
    Compare,
    CompareTarget,
    Delete,
    DeleteResult,
    EtcdError,
    Event,
    EventType,
    Header,
    Is,
    KeepAlive,
    KeyValue,
    Lease,
    LeaseInfo,
    LeaseNotFound,
    Op,
    Put,
    PutResult,
    RangeResult,
    Status,
    Text,
    TxnResult,
    Unavailable,
    Watch,
    WatchBatch,
    prefix_end,
)
from kilo_etcd.etcd.values import Member, only_reads

_T = TypeVar("_T")
MAX_OPERATIONS = 128
MAX_REQUEST = 1536 * 1024
_KEPT = 1
"""The lease that never ends."""
MIN_TTL = 2
"""Seconds; etcd's own floor with its default election timeout."""


@define
class _FakeLease:
    id: int
    ttl: int
    expires_at: float
    keys: set[bytes] = field(factory=set)


@frozen
class Backup:
    """What `etcdctl snapshot save` keeps: the key-values with their revisions and history, and the leases."""

    cluster_id: int
    revision: int
    raft_term: int
    data: Mapping[bytes, KeyValue]
    leases: Mapping[int, int]
    """Lease -> its TTL in seconds."""
    compacted: int
    log: tuple[Event, ...]
    versions: Mapping[bytes, tuple[tuple[int, KeyValue | None], ...]]


class FakeEtcd:
    """The cluster. `delay` is the seconds that every answer and every event takes."""

    def __init__(self, *, cluster_id: int = 0xC1, delay: float = 0.0) -> None:
        self.delay = delay
        self.members: tuple[Member, ...] = ()
        self.cluster_id = cluster_id
        self.raft_term = 2
        self.available = True
        self._waiting: dict[_FakeWatch, trio.Event] = {}
        """The watches that have nothing to say at present, and what tells them that there may be something."""
        self._keeper: _FakeWatch | None = None
        """The one of them that looks when the next lease is due."""
        self._keeper_scope: trio.CancelScope | None = None
        # No two clusters give one lease the same number: etcd makes it of the member's id and the time.
        self._next_lease = 0x1000
        self._generation = 0
        self.reconnects = 0
        """How often the watches have connected anew."""
        self._fresh()

    def _fresh(self) -> None:
        self._generation += 1
        self.reconnects += 1
        self.revision = 1
        self.compacted = 0
        self.data: dict[bytes, KeyValue] = {}
        self._sorted: list[bytes] = []
        self._log: list[Event] = []
        self._versions: dict[bytes, list[tuple[int, KeyValue | None]]] = {}
        self._leases: dict[int, _FakeLease] = {}
        self._drops = 0
        self._drop_error: EtcdError | None = None

    def client(self, name: str = "") -> FakeClient:
        """A client, with faults of its own; `name` is shown in its repr."""
        return FakeClient(self, name)

    def header(self) -> Header:
        """The header that an answer given now has."""
        return Header(cluster_id=self.cluster_id, member_id=1, revision=self.revision, raft_term=self.raft_term)

    # --- faults ------------------------------------------------------------------------------------------------

    def down(self) -> None:
        """Nobody answers any more. Leases stand still, as they do in a cluster without a leader."""
        self._expire()
        self._catch_up()
        self.available = False
        self._wake()

    def up(self) -> None:
        """There is a leader again: a higher raft term, and every lease has its full time."""
        self.available = True
        self.reconnects += 1
        self.raft_term += 1
        for lease in self._leases.values():
            lease.expires_at = trio.current_time() + lease.ttl
        self._wake()

    def drop_watches(self, error: EtcdError | None = None) -> None:
        """Every watch that is open now raises."""
        self._drops += 1
        self._drop_error = error or Unavailable("etcd closed the watch")
        self._wake()

    def compact(self, revision: int | None = None) -> None:
        """Forget history before `revision` (the present one)."""
        self._expire()
        self._catch_up()
        self.compacted = self.revision if revision is None else revision
        self._log = [event for event in self._log if event.kv.mod_revision >= self.compacted]
        for key, versions in list(self._versions.items()):
            keep = max((i for i, (at, _) in enumerate(versions) if at <= self.compacted), default=0)
            del versions[:keep]
            if len(versions) == 1 and versions[0][1] is None:
                del self._versions[key]
        self._wake()

    def replace_cluster(self, cluster_id: int | None = None, *, keep_data: bool = False) -> None:
        """Another cluster answers from now on: an empty one, or a restored backup that keeps the data but starts its
        revisions and terms over. With `cluster_id` the present one it can only be told by these."""
        old = list(self.data.values()) if keep_data else []
        self._wake()
        self._fresh()
        self.cluster_id = self.cluster_id + 1 if cluster_id is None else cluster_id
        self.raft_term = 2
        for kv in old:
            self._commit([Put(kv.key, kv.value)])

    def backup(self) -> Backup:
        """What could be restored later."""
        self._expire()
        return Backup(
            cluster_id=self.cluster_id,
            revision=self.revision,
            raft_term=self.raft_term,
            data=dict(self.data),
            leases={lease.id: lease.ttl for lease in self._leases.values()},
            compacted=self.compacted,
            log=tuple(self._log),
            versions={key: tuple(versions) for key, versions in self._versions.items()},
        )

    def restore(self, backup: Backup, cluster_id: int | None = None) -> None:
        """Go on from a backup, as another cluster (`etcdctl snapshot restore`), or with the cluster id of the backup's
        as the same one, which went back in time. Every lease has its full time."""
        self._wake()
        self._fresh()
        self.cluster_id = backup.cluster_id if cluster_id is None else cluster_id
        self.raft_term = 2 if cluster_id is not None else backup.raft_term + 1
        self.revision, self.compacted = backup.revision, backup.compacted
        self._log = list(backup.log)
        self._versions = {key: list(versions) for key, versions in backup.versions.items()}
        now = trio.current_time()
        self._leases = {lease_id: _FakeLease(lease_id, ttl, now + ttl) for lease_id, ttl in backup.leases.items()}
        self.data = dict(backup.data)
        self._sorted = sorted(self.data)
        for key, kv in self.data.items():
            if kv.lease in self._leases:
                self._leases[kv.lease].keys.add(key)
        self._wake()

    # --- reading and writing, at once --------------------------------------------------------------------------

    def put(self, key: Text, value: Text, *, lease: int = 0) -> int:
        """What an operator's `etcdctl put` does; the revision."""
        self._expire()
        self._commit([Put(key, value, lease)])
        return self.revision

    def put_kept(self, key: Text, value: Text) -> int:
        """Puts a key under a lease that never ends, as a host does whose agent stays alive; the revision."""
        self._leases.setdefault(_KEPT, _FakeLease(_KEPT, 10**9, float("inf")))
        return self.put(key, value, lease=_KEPT)

    def delete(self, key: Text) -> int:
        """What an operator's `etcdctl del` does; the revision."""
        self._expire()
        self._commit([Delete(key)])
        return self.revision

    def get(self, key: Text) -> bytes | None:
        """The value now."""
        self._expire()
        kv = self.data.get(_raw(key))
        return kv.value if kv else None

    def keys(self, prefix: Text = "", part: Text = "") -> list[str]:
        """The keys now that begin with `prefix` and have `part` after it, sorted."""
        self._expire()
        raw, rest = _raw(prefix), _raw(part)
        keys = (key for key in self._sorted if key.startswith(raw) and rest in key[len(raw) :])
        return [key.decode("utf-8", "backslashreplace") for key in keys]

    def __contains__(self, key: Text) -> bool:
        return self.get(key) is not None

    def leases(self) -> dict[int, int]:
        """Lease -> the TTL that was granted."""
        self._expire()
        return {lease.id: lease.ttl for lease in self._leases.values()}

    # --- inside ------------------------------------------------------------------------------------------------

    def _wake(self, events: Iterable[Event] | None = None) -> None:
        """Have the watches compare with `events`; None: all of them."""
        keys = None if events is None else {event.kv.key for event in events}
        for watch, event in self._waiting.items():
            if keys is None or watch._concerns(keys):
                event.set()

    def _catch_up(self, client: FakeClient | None = None) -> None:
        """The watches (of one client) that wait have been told all there is so far, and know it."""
        for watch in self._waiting:
            if client is None or watch._client is client:
                watch._catch_up()

    def _mind_leases(self) -> None:
        """Have the watch that minds them wake in time."""
        if self._keeper_scope is not None:
            self._keeper_scope.deadline = self._next_expiry()

    def _next_expiry(self) -> float:
        if not self.available:
            return float("inf")
        return min((lease.expires_at for lease in self._leases.values() if lease.keys), default=float("inf"))

    def _expire(self) -> None:
        if not self.available or not self._leases.keys() - {_KEPT}:
            return
        now = trio.current_time()
        due = sorted(
            (le for le in self._leases.values() if le.expires_at <= now), key=lambda le: (le.expires_at, le.id)
        )
        for lease in due:
            self._end_lease(lease)

    def _end_lease(self, lease: _FakeLease) -> None:
        del self._leases[lease.id]
        if lease.keys:
            self._commit([Delete(key) for key in sorted(lease.keys)])

    def _lease(self, lease_id: int) -> _FakeLease:
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseNotFound(f"lease {lease_id:x} is not there: it has expired or was revoked")
        return lease

    def _select(self, key: Text, range_end: Text | None, revision: int = 0) -> list[KeyValue]:
        first = _raw(key)
        if revision and revision < self.revision:
            keys = sorted(key for key in self._versions if _within(key, first, range_end))
            past = [_at(self._versions[key], revision) for key in keys]
            return [kv for kv in past if kv is not None]
        if range_end is None:
            kv = self.data.get(first)
            return [kv] if kv else []
        end = _raw(range_end)
        low = bisect_left(self._sorted, first)
        high = len(self._sorted) if end == b"\0" else bisect_left(self._sorted, end)
        return [self.data[key] for key in self._sorted[low:high]]

    def _commit(self, ops: Sequence[Op]) -> list[PutResult | RangeResult | DeleteResult]:
        """All of it at one revision; nothing at all if it is refused."""
        written: set[bytes] = set()
        for op in ops:
            if isinstance(op, Put):
                if _raw(op.key) in written:
                    raise BadRequest("duplicate key given in txn request")
                written.add(_raw(op.key))
                if not op.key:
                    raise BadRequest("key is not provided")
                if op.lease:
                    self._lease(op.lease)
        for op in ops:
            if isinstance(op, Delete) and any(_within(key, _raw(op.key), op.range_end) for key in written):
                raise BadRequest("duplicate key given in txn request")
        revision = self.revision + 1
        events: list[Event] = []
        results: list[PutResult | RangeResult | DeleteResult] = []
        for op in ops:
            if isinstance(op, Put):
                events.append(self._do_put(op, revision))
                results.append(PutResult(header=Header()))
            elif isinstance(op, Delete):
                removed = self._select(op.key, op.range_end)
                events.extend(self._do_delete(kv, revision) for kv in removed)
                results.append(DeleteResult(header=Header(), deleted=len(removed)))
            else:
                kvs = tuple(self._select(op.key, op.range_end))
                results.append(RangeResult(kvs=kvs, header=Header(), count=len(kvs)))
        if events:
            self.revision = revision
            self._log.extend(events)
            self._wake(events)
            self._mind_leases()
        header = self.header()
        return [evolve(result, header=header) for result in results]

    def _do_put(self, op: Put, revision: int) -> Event:
        key = _raw(op.key)
        old = self.data.get(key)
        if old is None:
            insort(self._sorted, key)
        elif old.lease in self._leases:
            self._leases[old.lease].keys.discard(key)
        kv = KeyValue(
            key=key,
            value=_raw(op.value),
            create_revision=old.create_revision if old else revision,
            mod_revision=revision,
            version=old.version + 1 if old else 1,
            lease=op.lease,
        )
        if op.lease:
            self._leases[op.lease].keys.add(key)
        self.data[key] = kv
        self._versions.setdefault(key, []).append((revision, kv))
        return Event(type=EventType.PUT, kv=kv)

    def _do_delete(self, kv: KeyValue, revision: int) -> Event:
        del self.data[kv.key]
        del self._sorted[bisect_left(self._sorted, kv.key)]
        if kv.lease in self._leases:
            self._leases[kv.lease].keys.discard(kv.key)
        self._versions.setdefault(kv.key, []).append((revision, None))
        return Event(type=EventType.DELETE, kv=KeyValue(key=kv.key, value=b"", mod_revision=revision))

    def _holds(self, compare: Compare) -> bool:
        kv = self.data.get(_raw(compare.key))
        if compare.target is CompareTarget.VALUE:
            if kv is None:
                return False
            return _relation(kv.value, compare.value, compare.result)
        actual = 0
        if kv is not None:
            actual = {
                CompareTarget.VERSION: kv.version,
                CompareTarget.CREATE: kv.create_revision,
                CompareTarget.MOD: kv.mod_revision,
                CompareTarget.LEASE: kv.lease,
            }[compare.target]
        return _relation(actual, compare.value, compare.result)

    def _events_from(self, revision: int) -> list[Event]:
        low = bisect_left(self._log, revision, key=lambda event: event.kv.mod_revision)
        return self._log[low:]


class FakeClient:
    """One host's way to the cluster."""

    def __init__(self, server: FakeEtcd, name: str = "") -> None:
        self.server = server
        self.name = name
        self.calls: list[str] = []
        """The names of the unary calls made, for tests that count them."""
        self.lag: Callable[[], float] | None = None
        """Seconds that a request, an answer or a watch's batch takes besides the server's `delay`; asked for each."""
        self.preferred: tuple[str, ...] = ()
        """The endpoints that were preferred last."""
        self._preferred_anew = trio.Event()
        self.endpoint: str | None = None
        """The endpoint of the connection in use, for a test to set."""
        self._speaks = True
        self._hears = True
        self._refusal: EtcdError | None = None
        self._refuses_reads = False
        self._lose = 0
        self._lose_batches = 0
        self._repeat_batches = 0
        self._stalled_until = float("-inf")

    def __repr__(self) -> str:
        return f"<FakeClient {self.name} {'connected' if self._reachable else 'cut off'}>"

    # --- faults ------------------------------------------------------------------------------------------------

    def cut(self, *, requests: bool = True, answers: bool = True) -> None:
        """This client's requests, or etcd's answers and events to it, are lost, or both; the others' are not."""
        self.server._catch_up(self)
        self._speaks, self._hears = not requests, not answers
        self.server._wake()

    def refuse(self, error: EtcdError, *, reads: bool = True) -> None:
        """etcd answers this client's calls with `error`; without `reads` those alone that write or grant a lease.
        Watches that are open go on, as connections do that stand when a certificate expires."""
        self._refusal, self._refuses_reads = error, reads

    def mend(self) -> None:
        """End what `cut` and `refuse` began: requests and answers arrive again."""
        self._speaks = self._hears = True
        self._refusal = None
        self.server._wake()

    def mend_all(self) -> None:
        """None of these faults is left or to come."""
        self.lag = None
        self._lose = self._lose_batches = self._repeat_batches = 0
        self._stalled_until = float("-inf")
        self.mend()

    def lose_answer(self, calls: int = 1) -> None:
        """The next calls are carried out, and fail."""
        self._lose += calls

    def stall(self, seconds: float) -> None:
        """Events reach this client's watches only after that time."""
        self._stalled_until = trio.current_time() + seconds

    def lose_batches(self, number: int = 1) -> None:
        """So many batches of events never reach this client's watches of more than one key."""
        self._lose_batches += number

    def repeat_batches(self, number: int = 1) -> None:
        """So many batches of events reach this client's watches twice."""
        self._repeat_batches += number

    @property
    def connected(self) -> bool:
        """Whether both directions are open."""
        return self._speaks and self._hears

    @property
    def _reachable(self) -> bool:
        return self.connected and self.server.available

    def _refuses(self, *, writes: bool) -> bool:
        return self._refusal is not None and (writes or self._refuses_reads)

    async def _call(self, name: str, act: Callable[[], _T], *, writes: bool = False) -> _T:
        self.calls.append(name)
        await trio.sleep(self.server.delay + (self.lag() if self.lag else 0.0))
        if not (self._speaks and self.server.available):
            raise Unavailable("no endpoint of etcd answered")
        if self._refusal is not None and self._refuses(writes=writes):
            raise self._refusal
        self.server._expire()
        result = act()
        if self.lag:
            await trio.sleep(self.lag())
        if self._lose or not self._hears:
            self._lose = max(0, self._lose - 1)
            raise Unavailable("the connection to etcd broke before the answer came")
        return result

    # --- the client's protocol ---------------------------------------------------------------------------------

    async def get(self, key: Text, *, serializable: bool = False) -> KeyValue | None:
        """Implements `etcd.api.Client.get`."""
        kvs = (await self.range(key, serializable=serializable)).kvs
        return kvs[0] if kvs else None

    async def range(
        self,
        key: Text,
        range_end: Text | None = None,
        *,
        limit: int = 0,
        revision: int = 0,
        serializable: bool = False,
        keys_only: bool = False,
        count_only: bool = False,
    ) -> RangeResult:
        """Implements `etcd.api.Client.range`. Raises Compacted and BadRequest for revisions as etcd does."""

        def act() -> RangeResult:
            server = self.server
            if revision > server.revision:
                raise BadRequest("required revision is a future revision")
            if 0 < revision < server.compacted:
                raise Compacted(server.compacted)
            stored = server._select(key, range_end, revision)
            shown = () if count_only else stored[:limit] if limit else stored
            return RangeResult(
                kvs=tuple(evolve(kv, value=b"") if keys_only else kv for kv in shown),
                header=server.header(),
                more=bool(limit) and len(stored) > limit,
                count=len(stored),
            )

        return await self._call("range", act)

    async def get_prefix(self, prefix: Text, *, revision: int = 0) -> RangeResult:
        """Implements `etcd.api.Client.get_prefix`, in one page."""
        return await self.range(prefix, prefix_end(prefix), revision=revision)

    async def put(self, key: Text, value: Text, *, lease: int = 0, prev_kv: bool = False) -> PutResult:
        """Implements `etcd.api.Client.put`, with etcd's limit of sizes."""

        def act() -> PutResult:
            old = self.server.data.get(_raw(key))
            _check_size([Put(key, value)])
            self.server._commit([Put(key, value, lease)])
            return PutResult(header=self.server.header(), prev_kv=old if prev_kv else None)

        return await self._call("put", act, writes=True)

    async def delete(self, key: Text, range_end: Text | None = None) -> DeleteResult:
        """Implements `etcd.api.Client.delete`."""

        def act() -> DeleteResult:
            (result,) = self.server._commit([Delete(key, range_end)])
            assert isinstance(result, DeleteResult)
            return result

        return await self._call("delete", act)

    async def delete_prefix(self, prefix: Text) -> DeleteResult:
        """Implements `etcd.api.Client.delete_prefix`."""
        return await self.delete(prefix, prefix_end(prefix))

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Implements `etcd.api.Client.txn`, with etcd's limit of sizes."""

        def act() -> TxnResult:
            if max(len(compare), len(success), len(failure)) > MAX_OPERATIONS:
                raise BadRequest("too many operations in txn request")
            _check_size([*success, *failure])
            succeeded = all(self.server._holds(condition) for condition in compare)
            responses = self.server._commit(success if succeeded else failure)
            return TxnResult(succeeded=succeeded, responses=tuple(responses), header=self.server.header())

        return await self._call("txn", act, writes=not only_reads(success, failure))

    async def grant_lease(self, ttl: int, lease_id: int = 0) -> Lease:
        """Implements `etcd.api.Client.grant_lease`."""

        def act() -> Lease:
            server = self.server
            if lease_id in server._leases:
                raise BadRequest("lease already exists")
            server._next_lease += 1
            lease = _FakeLease(lease_id or server._next_lease, max(ttl, MIN_TTL), 0.0)
            lease.expires_at = trio.current_time() + lease.ttl
            server._leases[lease.id] = lease
            return Lease(id=lease.id, ttl=lease.ttl)

        return await self._call("grant_lease", act, writes=True)

    async def revoke_lease(self, lease_id: int) -> None:
        """Implements `etcd.api.Client.revoke_lease`."""
        await self._call("revoke_lease", lambda: self.server._end_lease(self.server._lease(lease_id)))

    async def lease_time_to_live(self, lease_id: int, *, keys: bool = False) -> LeaseInfo:
        """Implements `etcd.api.Client.lease_time_to_live`."""

        def act() -> LeaseInfo:
            lease = self.server._leases.get(lease_id)
            if lease is None:
                return LeaseInfo(id=lease_id, ttl=-1, granted_ttl=0)
            remaining = max(0, int(min(lease.ttl, lease.expires_at - trio.current_time())))
            return LeaseInfo(
                id=lease_id, ttl=remaining, granted_ttl=lease.ttl, keys=tuple(sorted(lease.keys)) if keys else ()
            )

        return await self._call("lease_time_to_live", act)

    async def refresh_lease(self, lease_id: int) -> int:
        """Implements `etcd.api.Client.refresh_lease`."""

        def act() -> int:
            lease = self.server._lease(lease_id)
            lease.expires_at = trio.current_time() + lease.ttl
            return lease.ttl

        return await self._call("refresh_lease", act)

    def keep_alive(
        self, lease_id: int, ttl: int, *, interval: float | None = None
    ) -> AbstractAsyncContextManager[KeepAlive]:
        """Implements `etcd.api.Client.keep_alive`."""
        return self._keep_alive(lease_id, ttl, ttl / 3 if interval is None else interval)

    @asynccontextmanager
    async def _keep_alive(self, lease_id: int, ttl: int, interval: float) -> AsyncIterator[KeepAlive]:
        keep_alive = _FakeKeepAlive(lease_id, trio.current_time() + ttl)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_alive.run, self, interval)
            try:
                yield keep_alive
            finally:
                nursery.cancel_scope.cancel()

    def watch(
        self,
        key: Text,
        range_end: Text | None = None,
        *,
        start_revision: int = 0,
        progress_notify: bool = True,
    ) -> AbstractAsyncContextManager[Watch]:
        """Implements `etcd.api.Client.watch`."""
        return self._watch(key, range_end, start_revision)

    @asynccontextmanager
    async def _watch(self, key: Text, range_end: Text | None, start_revision: int) -> AsyncIterator[Watch]:
        await trio.lowlevel.checkpoint()
        yield _FakeWatch(self, _raw(key), range_end, start_revision or self.server.revision + 1)

    async def status(self, endpoint: str | None = None) -> Status:
        """Implements `etcd.api.Client.status`."""

        def act() -> Status:
            header = self.server.header()
            return Status(
                version="3.5.0", leader=1, db_size=0, db_size_in_use=0, raft_term=header.raft_term, is_learner=False,
                errors=(), header=header,
            )  # fmt: skip

        return await self._call("status", act)

    async def members(self) -> tuple[Member, ...]:
        """Implements `etcd.api.Client.members`."""
        return await self._call("members", lambda: self.server.members)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Implements `etcd.api.Client.endpoints`."""
        return self.preferred

    def prefer(self, endpoints: Sequence[str]) -> None:
        """Implements `etcd.api.Client.prefer`; only noted."""
        self.preferred = tuple(endpoints)
        self._preferred_anew.set()
        self._preferred_anew = trio.Event()

    async def wait_endpoints(self, seen: Collection[str]) -> tuple[str, ...]:
        """Implements `etcd.api.Client.wait_endpoints`."""
        while set(self.endpoints) == set(seen):
            await self._preferred_anew.wait()
        return self.endpoints

    def watch_prefix(self, prefix: Text, *, start_revision: int = 0) -> AbstractAsyncContextManager[Watch]:
        """Implements `etcd.api.Client.watch_prefix`."""
        return self.watch(prefix, prefix_end(prefix), start_revision=start_revision)


@define(eq=False)
class _FakeKeepAlive:
    lease_id: int
    expires_at: float
    lost: trio.Event = field(factory=trio.Event)

    async def run(self, client: FakeClient, interval: float) -> None:
        while True:
            started = trio.current_time()
            try:
                self.expires_at = started + await client.refresh_lease(self.lease_id)
                wait = interval
            except LeaseNotFound:
                break
            except EtcdError:
                wait = min(interval, 0.5)
            if trio.current_time() + wait < self.expires_at:
                await trio.sleep(wait)
            else:
                await trio.sleep_until(self.expires_at)
                if not client._reachable or client._refuses(writes=False):
                    break
        self.lost.set()


class _FakeWatch:
    """Waits while etcd is away and goes on where it was, as the real one does."""

    def __init__(self, client: FakeClient, key: bytes, range_end: Text | None, start: int) -> None:
        self._client = client
        self._key, self._range_end = key, range_end
        self._next = start
        """Where it resumes, by what it has given out."""
        self._seen = (client.server._generation, start)
        """How far it has looked in which generation of the server: another cluster's revisions say nothing here."""
        self._drops = client.server._drops
        self._progress = False
        self._again: WatchBatch | None = None

    @property
    def reconnects(self) -> int:
        """Implements `api.Watch.reconnects`."""
        return self._client.server.reconnects

    def __aiter__(self) -> _FakeWatch:
        return self

    async def request_progress(self) -> None:
        await trio.lowlevel.checkpoint()
        self._progress = True
        self._client.server._wake()

    async def __anext__(self) -> WatchBatch:
        client, server = self._client, self._client.server
        if self._again is not None:
            again, self._again = self._again, None
            await trio.lowlevel.checkpoint()
            return again
        while True:
            server._expire()
            if self._drops != server._drops and server._drop_error is not None:
                raise server._drop_error
            if trio.current_time() < client._stalled_until:
                await trio.sleep_until(client._stalled_until)
                continue
            if client._hears and server.available:
                batch = self._gather(server)
                if batch is not None:
                    await trio.sleep(server.delay + (client.lag() if client.lag else 0.0))
                    if client._lose_batches and self._range_end is not None:
                        client._lose_batches -= 1
                        continue
                    if client._repeat_batches:
                        client._repeat_batches -= 1
                        self._again = batch
                    return batch
            await self._wait(server)

    async def _wait(self, server: FakeEtcd) -> None:
        """Until there may be something to report. One of the waiting tasks watches the leases, and hands that on."""
        event = server._waiting[self] = trio.Event()
        try:
            if server._keeper is not None:
                await event.wait()
                return
            with trio.move_on_at(server._next_expiry()) as scope:
                server._keeper, server._keeper_scope = self, scope
                await event.wait()
        finally:
            del server._waiting[self]
            if server._keeper is self:
                server._keeper = server._keeper_scope = None
                for other in server._waiting.values():
                    other.set()
                    break

    def _concerns(self, keys: set[bytes]) -> bool:
        if self._range_end is None:
            return self._key in keys
        return any(_within(key, self._key, self._range_end) for key in keys)

    def _catch_up(self) -> None:
        client, server = self._client, self._client.server
        start = self._start(server)
        if client._hears and server.available and self._drops == server._drops and start >= server.compacted:
            behind = any(_within(event.kv.key, self._key, self._range_end) for event in server._events_from(start))
            if not behind:
                self._seen = server._generation, max(start, server.revision + 1)

    def _start(self, server: FakeEtcd) -> int:
        generation, revision = self._seen
        return revision if generation == server._generation else self._next

    def _gather(self, server: FakeEtcd) -> WatchBatch | None:
        start = self._start(server)
        if start < server.compacted:
            raise Compacted(server.compacted)
        events = tuple(
            event for event in server._events_from(start) if _within(event.kv.key, self._key, self._range_end)
        )
        end = max(start, server.revision + 1)
        self._seen = server._generation, end
        if not events and not self._progress:
            return None
        self._progress, self._next = False, end
        return WatchBatch(events=events, revision=server.revision, header=server.header())


def _raw(text: Text) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _within(key: bytes, first: bytes, range_end: Text | None) -> bool:
    if range_end is None:
        return key == first
    end = _raw(range_end)
    return key >= first and (end == b"\0" or key < end)


def _at(versions: list[tuple[int, KeyValue | None]], revision: int) -> KeyValue | None:
    return next((kv for at, kv in reversed(versions) if at <= revision), None)


def _relation(actual: int | bytes, expected: int | bytes, result: Is) -> bool:
    if isinstance(actual, int) != isinstance(expected, int):
        raise BadRequest("the comparison's value does not fit its target")
    if result is Is.EQUAL:
        return actual == expected
    if result is Is.NOT_EQUAL:
        return actual != expected
    low, high = (expected, actual) if result is Is.GREATER else (actual, expected)
    return low < high  # type: ignore[operator]


def _check_size(ops: Sequence[Op]) -> None:
    if sum(len(_raw(op.key)) + len(_raw(op.value)) for op in ops if isinstance(op, Put)) > MAX_REQUEST:
        raise BadRequest("etcdserver: request is too large")


if TYPE_CHECKING:

    def _implements(client: FakeClient) -> Client:
        return client
