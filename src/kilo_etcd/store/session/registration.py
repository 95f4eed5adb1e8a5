"""This host's record in etcd: put at its name under the long lease, watched, and restored if another writer changes it.

The name is the host's as long as the record at it carries the host's public key: every write in its name is conditional
on that (`Registration.write`). The record is put in the same transaction as the first status, so that no second host
of this name slips in between. A record is restored a few times a minute and no more (`node_identity.RestoreCounter`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import structlog
import trio
from attrs import evolve, frozen

from kilo_etcd.etcd.api import (
    Client,
    Compare,
    CompareTarget,
    Delete,
    EtcdError,
    EventType,
    Get,
    Is,
    KeyValue,
    Op,
    Put,
    RangeResult,
    TxnResult,
    absent,
    prefix_end,
    unchanged,
)
from kilo_etcd.model import IPInterface
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import NodeRecord, encode
from kilo_etcd.store.session.cluster_guard import ClusterGuard
from kilo_etcd.store.session.leased_keys import RETRY_FIRST
from kilo_etcd.store.session.node_identity import (
    NameTaken,
    RestoreCounter,
    public_key_of,
    status_key_of,
    taken_by,
)

MOST_AT_ONCE = 100
"""Operations in one transaction: etcd takes 128 (--max-txn-ops)."""


class RecordChanged(Exception):
    """The record at our name is not the one we put: look again."""


@frozen
class Standing:
    """What stands at this host's name, as of `revision`."""

    node: KeyValue | None
    status: KeyValue | None
    revision: int


@frozen
class Written:
    """The outcome of a registration; `revision` is 0 if etcd held all of it already."""

    record: bool
    """Whether the record was written."""
    revision: int


class Registration:
    """The record of node `name`, whose WireGuard key is `public_key`. Changed under `lock`.

    `on_changed` is called when the record has to be restored, `on_taken` when another living host has the name.
    """

    def __init__(
        self,
        client: Client,
        keys: Keys,
        name: str,
        public_key: str,
        lock: trio.Lock,
        guard: ClusterGuard,
        *,
        retry_most: float,
        on_changed: Callable[[], None],
        on_taken: Callable[[], None],
        rng: random.Random,
    ) -> None:
        self._client = client
        self._name = name
        self._public_key = public_key
        self._lock = lock
        self._guard = guard
        self._retry_most = retry_most
        self._on_changed = on_changed
        self._on_taken = on_taken
        self._rng = rng
        self._log = structlog.get_logger().bind(node=name)
        self._node_key, self._status_key = keys.node(name), keys.status(name)
        self._roots = keys.by(name), keys.status_by(name)
        self.record: NodeRecord | None = None
        """What is wanted."""
        self._known: KeyValue | None = None
        """What etcd is known to hold."""
        self.seen = 0
        """etcd's revision up to which the record is known to be as it was put."""
        self._restores = RestoreCounter(self._node_key)
        self._watch_scope = trio.CancelScope()
        self._registered = trio.Event()

    @property
    def known(self) -> bool:
        """Whether the record is in etcd, as far as is known."""
        return self._known is not None

    def look_again(self) -> None:
        """The record may not be there any more."""
        self._known = None

    def look_anew(self) -> None:
        """Etcd is another one, in which a watch would wait for a revision far away."""
        self._known = None
        self._watch_scope.cancel()

    def check_restores(self) -> None:
        """NameTaken if the record is restored too often."""
        self._restores.check(trio.current_time())

    def note_restore(self) -> None:
        """The record was restored."""
        self._restores.note(trio.current_time())

    # --- the name ----------------------------------------------------------------------------------------------

    async def look(self) -> Standing:
        """What stands at the name. EtcdError."""
        answer = await self._client.txn([], [Get(self._node_key), Get(self._status_key)])
        return Standing(_only_kv(answer, 0), _only_kv(answer, 1), answer.header.revision)

    async def look_until_free(self, deadline: float) -> Standing:
        """The same, as soon as no other living host has the name. NameTaken if one has it at `deadline`, on trio's
        clock; EtcdError."""
        while True:
            standing = await self.look()
            reason = taken_by(self._name, self._public_key, standing.node, standing.status)
            if reason is None:
                return standing
            remaining = deadline - trio.current_time()
            if remaining <= 0:
                self._on_taken()
                raise NameTaken(reason)
            await trio.sleep(min(0.5, remaining))

    def is_own(self, node_kv: KeyValue | None) -> bool:
        """Whether a record at the name carries this host's key."""
        return node_kv is not None and public_key_of(node_kv) == self._public_key

    def conditions(self, standing: Standing) -> list[Compare]:
        """That the name is still as `standing` says."""
        standing_keys = (standing.node, self._node_key), (standing.status, self._status_key)
        return [unchanged(kv) if kv else absent(key) for kv, key in standing_keys]

    # --- writes ------------------------------------------------------------------------------------------------

    def value(self, stated: tuple[IPInterface, ...]) -> bytes:
        """The wanted record, with the mesh addresses that it states."""
        assert self.record is not None
        return encode(evolve(self.record, mesh_addresses=stated))

    async def clear(self, standing: Standing) -> None:
        """Delete the record at the name, which is that of a host that does not live any more. EtcdError."""
        await self._client.txn(self.conditions(standing), [Delete(self._node_key)])

    async def put(self, value: bytes, lease: int, beside: Sequence[Op], standing: Standing) -> Written | None:
        """Put `beside` and what etcd lacks of the record, if the name is as `standing` says; None: look again.
        EtcdError."""
        node_kv = standing.node
        if node_kv is not None and not self._registered.is_set() and not self.is_own(node_kv):
            # Made anew, since of two records with one key the older one keeps it: this one is no older than its
            # key. A record that is changed while this runs is another matter: it is restored, with its age.
            await self.clear(standing)
            return None
        ops = list(beside)
        lacks = node_kv is None or node_kv.value != value or node_kv.lease != lease
        if lacks:
            ops.insert(0, Put(self._node_key, value, lease=lease))
        if not ops:
            self._known, self.seen = node_kv, standing.revision
            self._registered.set()
            return Written(record=False, revision=0)
        result = await self._client.txn(self.conditions(standing), ops)
        self._guard.observe(result.header)
        if not result.succeeded:
            return None
        self.seen = revision = result.header.revision
        self._known = (
            KeyValue(key=self._node_key.encode(), value=value, mod_revision=revision, lease=lease) if lacks else node_kv
        )
        self._log.info("registered", revision=revision, new=node_kv is None)
        self._registered.set()
        return Written(record=lacks, revision=revision)

    def _as_known(self) -> list[Compare]:
        return [] if self._known is None else [_written_at(self._node_key, self._known.mod_revision)]

    async def write(self, ops: list[Op]) -> int:
        """Write in this host's name; the revision of the last write. RecordChanged, EtcdError."""
        revision = 0
        for first in range(0, len(ops), MOST_AT_ONCE):
            result = await self._client.txn(self._as_known(), ops[first : first + MOST_AT_ONCE])
            self._guard.observe(result.header)
            if not result.succeeded:
                raise RecordChanged
            revision = result.header.revision
        return revision

    async def delete_unchanged(self, revisions: Mapping[str, int]) -> int:
        """Delete keys in this host's name, each only if it is as it was found, at this mod revision: one that was
        written since may be this host's own by now. etcd's revision then. RecordChanged, EtcdError."""
        return await self._delete_unchanged(revisions, self._as_known())

    async def _delete_unchanged(self, revisions: Mapping[str, int], name: list[Compare]) -> int:
        """The same on the condition `name`; RecordChanged if that does not hold."""
        revision, rest = 0, list(_portions(list(revisions), MOST_AT_ONCE))
        while rest:
            portion = rest.pop()
            as_read = [_written_at(key, revisions[key]) for key in portion]
            result = await self._client.txn(
                [*name, *as_read], [Delete(key) for key in portion], [Get(compare.key) for compare in name]
            )
            self._guard.observe(result.header)
            revision = result.header.revision
            if result.succeeded:
                continue
            if any(_mod_revision(_only_kv(result, index)) != compare.value for index, compare in enumerate(name)):
                raise RecordChanged
            if len(portion) > 1:
                # Halves, so that one key that changes all the time does not keep the others.
                rest += _portions(portion, (len(portion) + 1) // 2)
        return revision

    async def delete_own(self, changed: Sequence[str], revisions: Mapping[str, int]) -> None:
        """Delete keys of this host that another writer has changed: they may be under no lease, or another, and would
        outlive the host. Those of them that are in `revisions` go only if they are as they were found, see
        `delete_unchanged`. If the name is another host's by now, they are that one's; so is a status with its key."""
        standing = await self.look()
        if standing.node is not None and public_key_of(standing.node) not in (None, self._public_key):
            return
        revisions = {key: revision for key, revision in revisions.items() if key != self._status_key}
        with suppress(RecordChanged):  # Another host has taken the name.
            await self._delete_unchanged(revisions, self.conditions(standing))
        keys = [key for key in changed if key != self._status_key and key not in revisions]
        if self._status_key in changed and standing.status is not None and not self._is_anothers(standing.status):
            keys.append(self._status_key)  # The last, since all writes compare it.
        for first in range(0, len(keys), MOST_AT_ONCE):
            ops = [Delete(key) for key in keys[first : first + MOST_AT_ONCE]]
            result = await self._client.txn(self.conditions(standing), ops)
            if not result.succeeded:
                return  # Another host has taken the name.

    def _is_anothers(self, status_kv: KeyValue) -> bool:
        """Whether another host of this name lives: nobody keeps a status that is under no lease."""
        return bool(status_kv.lease) and status_key_of(status_kv) not in (None, self._public_key)

    def drop(self) -> None:
        """Want no record any more."""
        self.record, self._known = None, None

    async def delete(self) -> None:
        """Delete all keys of the name, unless another host's record is there, or its status without a record.
        EtcdError."""
        standing = await self.look()
        if standing.node is None:
            free = standing.status is None or not self._is_anothers(standing.status)
            as_it_was = self.conditions(standing)
        else:
            free, as_it_was = self.is_own(standing.node), [unchanged(standing.node)]
        if free:
            await self._client.txn(as_it_was, [Delete(root, prefix_end(root)) for root in self._roots])

    # --- the task ----------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """See to it that the registration is not taken away unnoticed, until cancelled."""
        delay = RETRY_FIRST
        while True:
            await self._registered.wait()
            known_kv = self._known
            if known_kv is None:
                await trio.sleep(delay)
                continue
            try:
                with trio.CancelScope() as self._watch_scope:
                    async with self._client.watch(self._node_key, start_revision=self.seen + 1) as watch:
                        async for batch in watch:
                            delay = RETRY_FIRST
                            for event in batch.events:
                                await self._event(event.type, event.kv)
            except EtcdError:
                # Whatever happened meanwhile is seen by looking again.
                self._known = None
                self._on_changed()
            await trio.sleep(delay * self._rng.uniform(0.5, 1.5))
            delay = min(delay * 2, self._retry_most)

    async def _event(self, kind: EventType, kv: KeyValue) -> None:
        async with self._lock:
            known_kv = self._known
            if self.record is None or known_kv is None or kv.mod_revision <= known_kv.mod_revision:
                return
            if kind is EventType.PUT and kv.value == known_kv.value and kv.lease == known_kv.lease:
                self._known = kv
                return
            self._known = None
        self._log.warning("another writer changed this host's record; restoring it")
        self._on_changed()


def _written_at(key: str, revision: int) -> Compare:
    return Compare(key, CompareTarget.MOD, Is.EQUAL, revision)


def _mod_revision(kv: KeyValue | None) -> int:
    return 0 if kv is None else kv.mod_revision


def _portions(keys: list[str], most: int) -> Iterator[list[str]]:
    return (keys[first : first + most] for first in range(0, len(keys), most))


def _only_kv(answer: TxnResult, index: int) -> KeyValue | None:
    response = answer.responses[index]
    assert isinstance(response, RangeResult)
    return response.kvs[0] if response.kvs else None
