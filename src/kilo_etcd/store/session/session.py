"""This host's own keys: its registration under a long lease, its candidacy, status and published records under a short
one.

The desired state is given once (`register`, `enter`, `leave`, `put_status`, `put_stage`, `put_observed_endpoints`,
`put_probe_reports`); `run` sees to it that etcd keeps saying so: it keeps both leases, and restores what was lost with
a lease, deleted, or overwritten (`store.session.leased_keys`; the mirror reports observed endpoints and probe reports,
see `compare`). While etcd is away it tries again with jitter, forever, and never raises. Nothing is written that etcd
holds already: an agent that starts again within the lease's time finds its own keys, adopts their leases, and goes on
without a write.

The name is the host's as long as the record at it carries the host's public key: every write under the short lease
is conditional on that. Another key at the name is respected while its owner lives (its status is there), and
replaced when it does not. A copy of this machine has the same name and key: each would put its own record back over the
other's forever, and wake the whole mesh each time. So a record is restored a few times a minute and no more.

A desired state that cannot be written at once is kept: `enter`, `leave` and `put_status` return False, and `run` goes
on trying. A candidacy that is gone with its lease is no longer desired: `on_event` reports "lease lost", and a host
that wants to stand says so again. `register`, `ensure_mesh` and `claim_addresses` raise instead, since nothing can
begin before they are done.

An etcd that was restored or replaced would take all of this for news. So before this host registers, claims, or takes
a lease there, the `guard` verifies that it is the etcd that is followed; one that is known not to be receives
nothing.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_interface
from typing import Protocol

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
    Header,
    Is,
    KeyValue,
    LeaseNotFound,
    Op,
    PermissionDenied,
    Put,
    RangeResult,
    TxnResult,
    absent,
    unchanged,
)
from kilo_etcd.model import CandidateClass, IPAddress, IPInterface, IPNetwork, MeshSettings, Snapshot
from kilo_etcd.store import claims
from kilo_etcd.store.keys import ElectionKey, EndpointKey, Keys, ProbeReportKey, StageKey, StatusKey, leased_by
from kilo_etcd.store.lease import KeptLease
from kilo_etcd.store.mirror import ClusterNotTrusted, Mirror
from kilo_etcd.store.records import (
    CandidateRecord,
    NodeRecord,
    ObservedEndpointRecord,
    ProbeReportRecord,
    RecordError,
    StageRecord,
    StatusRecord,
    decode_candidate,
    decode_stage,
    decode_status,
    encode,
)
from kilo_etcd.store.session import published_records
from kilo_etcd.store.session.leased_keys import LeasedKeys
from kilo_etcd.store.session.node_identity import (
    NameTaken,
    RestoreCounter,
    public_key_of,
    status_key_of,
    taken_by,
    where_is,
)

RETRY_FIRST = 0.2
RETRY_MOST = 5.0
"""Seconds between two attempts; less for short leases, which an election in etcd gives their full time just once."""

RENEW_SECONDS = 1.0
"""The longest that a reload waits for etcd to renew the lease."""

MOST_AT_ONCE = 100
"""Operations in one transaction: etcd takes 128 (--max-txn-ops)."""


class ClusterGuard(Protocol):
    """Knows whether etcd is the one that is followed; see `Mirror`."""

    @property
    def generation(self) -> int:
        """How often it was followed again after it had not been."""

    def observe(self, header: Header) -> None:
        """This one has taken a write."""

    def check(self) -> None:
        """Raise ClusterNotTrusted if it is known not to be."""

    async def verify(self) -> None:
        """The same, having looked. EtcdError."""


class _NoGuard:
    generation = 0

    def observe(self, header: Header) -> None:
        pass

    def check(self) -> None:
        pass

    async def verify(self) -> None:
        await trio.lowlevel.checkpoint()


class _RecordChanged(Exception):
    """The record at our name is not the one we put: look again."""


@frozen
class Candidacy:
    """Where and as what this host stands for leader."""

    location: str
    rank: CandidateClass
    since: str = ""
    in_place: bool = False
    """Whether it may take the place of one that stands there, whose create revision it then keeps."""


class Session:
    """The keys of `node_name`, whose WireGuard key is `public_key`. `lease_ttl` and `forget_after` are seconds.

    `on_event(name)` is told of "lease lost", "lease granted", "registered", "registered again", "name taken", and
    "contested" when `contested` changes.
    """

    def __init__(
        self,
        client: Client,
        keys: Keys,
        node_name: str,
        public_key: str,
        *,
        lease_ttl: int = 5,
        forget_after: int = 86400,
        on_event: Callable[[str], None] | None = None,
        guard: ClusterGuard | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._client = client
        self._guard = guard or _NoGuard()
        self._keys = keys
        self._name = node_name
        self._public_key = public_key
        self._lease_ttl = lease_ttl
        self._forget_after = forget_after
        self._on_event = on_event or (lambda _name: None)
        self._rng = rng or random.Random()
        self._log = structlog.get_logger().bind(node=node_name)
        self._retry_most = min(RETRY_MOST, lease_ttl / 3)
        self._lock = trio.Lock()
        self._node_key = keys.node(node_name)
        self._status_key, self._stage_key = keys.status(node_name), keys.stage(node_name)
        # What is wanted.
        self._record: NodeRecord | None = None
        self._status: StatusRecord | None = None
        self._status_given = False
        """Whether the status is the agent's, not one that `register` made up."""
        self._stage: StageRecord | None = None
        self._candidacy: Candidacy | None = None
        self._observed_endpoints = published_records.observed_endpoints(keys, node_name)
        self._probe_reports = published_records.probe_reports(keys, node_name)
        self._subnets: tuple[IPNetwork, ...] = ()
        self.addresses: tuple[IPAddress, ...] = ()
        """The mesh addresses that this host has claimed; its record states them."""
        # What etcd is known to hold.
        self._record_kv: KeyValue | None = None
        self._leased = LeasedKeys(
            client,
            self._lock,
            retry_most=self._retry_most,
            lease=lambda: self._short.id,
            on_due=self._mend,
            on_contested=lambda: self._on_event("contested"),
            # There may be hundreds of observed endpoints; the mirror has them all.
            watched=lambda key: not self._is_published(key),
            rng=self._rng,
        )
        self._leased_since = float("inf")
        """Since when this run has its short lease, on trio's clock."""
        self._places_of: tuple[object, object, tuple[str, ...]] = (None, None, ())
        """Candidacies and probe reports of all, and the keys among them that have this host's name."""
        self._restores = RestoreCounter(self._node_key)
        self._seen = 0
        """etcd's revision up to which the record is known to be as `_record_kv` says."""
        self._long = KeptLease(client, forget_after, on_unconfirmed=self._mend, on_lost=self._lost)
        self._short = KeptLease(client, lease_ttl, on_unconfirmed=self._mend, on_lost=self._lost_short)
        self._generation = 0
        """Of the guard, as far as they have been handled."""
        self._record_watch = trio.CancelScope()
        self._registered = trio.Event()
        self._wake = trio.Event()
        self.last_error: str | None = None

    def __repr__(self) -> str:
        return f"<Session {self._name} {'healthy' if self.healthy else 'unhealthy'} {self._candidacy}>"

    @property
    def healthy(self) -> bool:
        """Whether all that is wanted is in etcd, as far as is known."""
        return (
            self.last_error is None
            and not (self._long.unconfirmed or self._short.unconfirmed)
            and self._record_kv is not None
            and not self._leased.changed
        )

    @property
    def lapsed(self) -> bool:
        """Whether the short lease may have ended, for all that this host knows: it was not kept for its time."""
        return self._short.unconfirmed

    @property
    def contested(self) -> str | None:
        """A sentence on the leased keys that another writer changes again and again; None: there are none."""
        if not (keys := self._leased.contested):
            return None
        more = f" and {len(keys) - 1} more of this host's keys are" if len(keys) > 1 else " is"
        return (
            f"{keys[0]}{more} {published_records.CHANGED_AGAIN}, and restored at least once a minute; see who "
            "writes there; if a copy of this machine runs, give it a WireGuard key and a --hostname of its own"
        )

    @property
    def candidacy(self) -> Candidacy | None:
        """As what this host stands, or will as soon as etcd can be told."""
        return self._candidacy

    @property
    def observed_endpoints(self) -> Mapping[str, ObservedEndpointRecord]:
        """Node or peer -> where this host sees it, as etcd says or will as soon as it can be told."""
        return self._observed_endpoints.records

    @property
    def probe_reports(self) -> Mapping[str, ProbeReportRecord]:
        """Location -> what this host says of its leader, as etcd says or will as soon as it can be told."""
        return self._probe_reports.records

    # --- before the first registration -------------------------------------------------------------------------

    async def ensure_mesh(self, settings: MeshSettings, *, restores: bool = False) -> MeshSettings:
        """Put the mesh's settings where there are none; those in force. `restores`: they were in force already.
        RecordError, EtcdError."""
        return await claims.ensure_mesh(self._client, self._keys, settings, restores=restores)

    async def subnets_in_force(self, configured: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
        """The subnets by which this host finds its address, if etcd's value is `configured`. EtcdError."""
        return await claims.subnets_in_force(self._client, self._keys, self._name, configured)

    async def claim_addresses(self, subnets: tuple[IPNetwork, ...], *, renumber: bool = False) -> tuple[IPAddress, ...]:
        """This host's mesh addresses, claimed now if it has none yet, and their claims restored if somebody else has
        changed them. With `renumber` its claims outside `subnets` are given up. NoAddressLeft, EtcdError."""
        self._subnets = subnets
        before = self.addresses
        await self._claim(renumber=renumber)
        if before and before != self.addresses and self._record is not None:
            async with self._lock:
                await self._register(trio.current_time() + self._lease_ttl + 1)
        return self.addresses

    async def _claim(self, *, renumber: bool = False) -> None:
        before = self.addresses
        held = () if renumber else before
        self.addresses = await claims.claim_addresses(
            self._client, self._keys, self._name, self._subnets, held=held, renumber=renumber
        )
        if before and before != self.addresses:
            now, then = (",".join(map(str, addresses)) for addresses in (self.addresses, before))
            self._log.error("mesh address lost to another claim; another one was claimed", lost=then, address=now)

    def _statement(self) -> tuple[IPInterface, ...]:
        return tuple(
            ip_interface(f"{address}/{subnet.prefixlen}")
            for address in self.addresses
            for subnet in self._subnets
            if address in subnet
        )

    # --- the registration --------------------------------------------------------------------------------------

    async def register(self, record: NodeRecord) -> None:
        """Be a member with this record; nothing is written if etcd holds all of it already. Waits up to the short
        lease's time for a dead owner's status to end. NameTaken if it does not; EtcdError."""
        async with self._lock:
            self._record = record
            if self._status is None:
                self._status_given = False
                # Being there must show at once, or a second host of this name could slip in before the first status.
                self._status = StatusRecord(
                    public_key=self._public_key,
                    location=record.location,
                    version=record.version,
                    address=where_is(record),
                )
            await self._register(trio.current_time() + self._lease_ttl + 1)
            self.last_error = None

    async def _register(self, deadline: float) -> bool:
        """Returns whether the record was written."""
        assert self._record is not None
        await self._guard.verify()
        value = encode(evolve(self._record, mesh_addresses=self._statement()))
        wrote = False
        while True:
            node_kv, status_kv, seen = await self._look()
            taken = taken_by(self._name, self._public_key, node_kv, status_kv)
            if taken is not None:
                left = deadline - trio.current_time()
                if left <= 0:
                    self._on_event("name taken")
                    raise NameTaken(taken)
                await trio.sleep(min(0.5, left))
                continue
            mine = node_kv is not None and public_key_of(node_kv) == self._public_key
            try:
                await self._hold_long(node_kv if mine else None)
                if self._status is not None:
                    await self._hold_short(status_kv)
            except LeaseNotFound:
                continue
            compare = [unchanged(kv) if kv else absent(key) for kv, key in self._both(node_kv, status_kv)]
            if node_kv is not None and not self._registered.is_set() and public_key_of(node_kv) != self._public_key:
                # Made anew, since of two records with one key the older one keeps it: this one is no older than its
                # key. A record that is changed while this runs is another matter: it is restored, with its age.
                await self._client.txn(compare, [Delete(self._node_key)])
                continue
            ops: list[Op] = []
            if node_kv is None or node_kv.value != value or node_kv.lease != self._long.id:
                ops.append(Put(self._node_key, value, lease=self._long.id))
            status = None
            if self._status is not None and self._status_key not in self._leased.values:
                status = encode(self._status)
                ops.append(Put(self._status_key, status, lease=self._short.id))
            if not ops and node_kv is not None:
                self._record_kv, self._seen = node_kv, seen
                break
            try:
                done = await self._client.txn(compare, ops)
            except LeaseNotFound:
                self._unconfirm_leases()
                continue
            self._guard.observe(done.header)
            if done.succeeded:
                if status is not None:
                    self._leased.put(self._status_key, status, done.header.revision)
                self._seen = revision = done.header.revision
                wrote = isinstance(ops[0], Put) and ops[0].key == self._node_key
                self._record_kv = (
                    KeyValue(key=self._node_key.encode(), value=value, mod_revision=revision, lease=self._long.id)
                    if wrote
                    else node_kv
                )
                self._log.info("registered", revision=revision, new=node_kv is None)
                self._on_event("registered")
                break
        self._registered.set()
        return wrote

    async def _look(self) -> tuple[KeyValue | None, KeyValue | None, int]:
        answer = await self._client.txn([], [Get(self._node_key), Get(self._status_key)])
        return _one(answer, 0), _one(answer, 1), answer.header.revision

    def _both(
        self, node_kv: KeyValue | None, status_kv: KeyValue | None
    ) -> tuple[tuple[KeyValue | None, str], tuple[KeyValue | None, str]]:
        return (node_kv, self._node_key), (status_kv, self._status_key)

    # --- leases ------------------------------------------------------------------------------------------------

    def _mend(self) -> None:
        self._wake.set()

    def _lost(self) -> None:
        self._on_event("lease lost")

    def _lost_short(self) -> None:
        # The place in the queue is gone, and others' with it where all were cut off: who stands first is to be decided
        # anew, by whoever called `enter`.
        self._candidacy = None
        self._lost()

    def _unconfirm_leases(self) -> None:
        # Which of the two etcd missed it does not say.
        self._long.mark_unconfirmed()
        self._short.mark_unconfirmed()

    async def _hold_long(self, node_kv: KeyValue | None) -> None:
        if await self._long.lives():
            return
        if node_kv is not None and node_kv.lease:
            await self._long.adopt(node_kv.lease)
        if not self._long.id:
            await self._long.grant()

    async def _hold_short(self, status_kv: KeyValue | None) -> None:
        if await self._short.lives():
            return
        self._leased.clear()
        if status_kv is not None and status_kv.lease and status_key_of(status_kv) == self._public_key:
            info = await self._short.adopt(status_kv.lease)
            if info is not None:
                self._leased_since = trio.current_time()
                await self._adopt(info.id, info.keys)
        if not self._short.id:
            await self._guard.verify()
            # What was adopted from a lease of another length is put under the new one, which does not move its create
            # revision: the place in the queue is kept.
            self._leased.clear()
            await self._short.grant()
            self._leased_since = trio.current_time()
            self._on_event("lease granted")

    async def _adopt(self, lease_id: int, held: tuple[bytes, ...]) -> None:
        """Take over what an earlier run of this agent put under a lease that still lives."""
        for raw in held:
            parsed = self._keys.parse(raw)
            if leased_by(parsed) != self._name:
                continue
            kv = await self._client.get(raw)
            if kv is None or kv.lease != lease_id:
                continue
            self._leased.put(raw.decode(), kv.value, kv.mod_revision)
            try:
                if isinstance(parsed, EndpointKey):
                    self._observed_endpoints.adopt(parsed.name, kv.value)
                elif isinstance(parsed, ProbeReportKey):
                    self._probe_reports.adopt(parsed.location, kv.value)
                elif isinstance(parsed, StatusKey):
                    if not self._status_given:
                        self._status = decode_status(kv.value)
                elif isinstance(parsed, StageKey):
                    self._stage = self._stage or decode_stage(kv.value)
                elif isinstance(parsed, ElectionKey) and self._candidacy is None:
                    record = decode_candidate(kv.value)
                    self._candidacy = Candidacy(parsed.location, record.rank, record.since)
                    self._log.info("candidacy adopted", location=parsed.location)
            except RecordError:
                continue

    # --- candidacy and status ----------------------------------------------------------------------------------

    async def enter(self, location: str, rank: CandidateClass, *, in_place: bool = False) -> bool:
        """Stand for leader of `location`. Standing elsewhere is given up first; as another class too, unless
        `in_place`."""
        now = self._candidacy
        if now is None or (now.location, now.rank) != (location, rank):
            since = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            self._candidacy = Candidacy(location, rank, since, in_place)
        return await self._now()

    async def leave(self) -> bool:
        """Stand no more."""
        self._candidacy = None
        return await self._now()

    async def put_status(self, status: StatusRecord) -> bool:
        """Report; written only if it differs from what stands there."""
        self._status, self._status_given = status, True
        return await self._now()

    @property
    def status(self) -> StatusRecord | None:
        """The last one that was put, or that an earlier run of this agent left under a lease that lives."""
        return self._status

    async def put_stage(self, stage: StageRecord | None) -> bool:
        """Say this of the switch to `encrypted`; None: nothing."""
        self._stage = stage
        return await self._now()

    @property
    def stage(self) -> StageRecord | None:
        """The last one that was put, or that an earlier run of this agent left under a lease that lives."""
        return self._stage

    async def put_observed_endpoints(self, observed_endpoints: Mapping[str, ObservedEndpointRecord]) -> bool:
        """Say of these nodes and peers, and of no others, where this host sees them; only what differs is written."""
        self._observed_endpoints.replace(observed_endpoints)
        return await self._now()

    async def put_probe_reports(self, probe_reports: Mapping[str, ProbeReportRecord]) -> bool:
        """Say this of the leaders of these locations, and of no others; only what differs is written."""
        self._probe_reports.replace(probe_reports)
        return await self._now()

    async def record_leader(self, location: str) -> bool:
        """Leave this host's name at `/kilo/leaders/<location>`; not remembered if etcd is away."""
        key = self._keys.leader(location)

        async def put() -> None:
            self._guard.check()
            await self._client.txn(
                [Compare(key, CompareTarget.VALUE, Is.EQUAL, self._name.encode())], [], [Put(key, self._name)]
            )

        return await self._try(put)

    async def _now(self) -> bool:
        async def sync() -> None:
            async with self._lock:
                await self._sync()

        done = await self._try(sync)
        if not done:
            self._wake.set()
        return done

    async def _try(self, act: Callable[[], Awaitable[None]]) -> bool:
        try:
            await act()
        except ClusterNotTrusted as error:
            # The mirror has logged it.
            self.last_error = str(error)
            return False
        except (EtcdError, NameTaken, claims.NoAddressLeft) as error:
            if str(error) != self.last_error:
                self._log.warning("etcd could not be updated", error=str(error))
            self.last_error = str(error)
            return False
        self.last_error = None
        return True

    async def _sync(self) -> None:
        """Make etcd say what is wanted. Called under the lock. EtcdError, NameTaken, NoAddressLeft."""
        while True:
            self._guard.check()
            if self._generation != self._guard.generation:
                self._generation = self._guard.generation
                self._look_anew()
            try:
                if self._record is not None and self._long.unconfirmed:
                    self._record_kv = None
                if self._record is not None and self._record_kv is None:
                    self._restores.check(trio.current_time())
                    await self._guard.verify()
                    if self._subnets:
                        await self._claim()
                    if await self._register(trio.current_time()):
                        self._restores.note(trio.current_time())
                    self._on_event("registered again")
                await self._sync_short()
                return
            except _RecordChanged:
                self._record_kv = None
            except LeaseNotFound:
                self._unconfirm_leases()

    def _look_anew(self) -> None:
        """This etcd may not be the one that was written to: an earlier state of that, or what it was before another one
        was in its place. Our leases may live in it all the same, and a watch would wait for a revision far away."""
        self._record_kv = None
        self._long.forget()
        self._short.forget()
        self._leased.clear()
        self._record_watch.cancel()

    async def _sync_short(self) -> None:
        if self._wanted() or self._published() or self._leased.values:
            await self._hold_short(None)
        wanted, words = self._wanted(), self._published()
        own = self._leased.values.keys() - (self._leased.foreign - wanted.keys() - words.keys())
        await self._bring(wanted, {key for key in own if not self._is_published(key)})
        # In writes of their own, and last: where etcd does not let this host say something of others, it stands for
        # leader and reports all the same.
        await self._bring(words, {key for key in own if self._is_published(key)})
        await self._delete_foreign()

    async def _delete_foreign(self) -> None:
        """Delete what others have written in this host's name. What etcd denies here hinders nothing of this host's
        own, and no other kind of key."""
        denied: PermissionDenied | None = None
        for words in (False, True):
            try:
                await self._bring({}, {key for key in self._leased.foreign if self._is_published(key) is words})
            except PermissionDenied as error:
                denied = error
        if denied is not None:
            raise denied

    async def compare(self, snapshot: Snapshot, mirror: Mirror) -> None:
        """Restore the observed endpoints and probe reports of this host that another writer has changed, and delete
        observed endpoints, probe reports and candidacies that stand in its name and are not its own. Those under a
        lease are left alone until that of an earlier run has ended: its candidacy may yet be taken over, with its place
        in the queue.

        `mirror` has given `snapshot`. If it follows another etcd than the one that was written to, all is looked at
        anew: that one's history may lack what the watches would tell."""
        if self._generation != self._guard.generation:
            self._wake.set()
            return
        for key in [key for key in self._leased.values if self._is_published(key)]:
            await self._leased.compare(key, mirror.kv(key), snapshot.revision)
        if self._places_of[0] is not snapshot.candidates or self._places_of[1] is not snapshot.probe_reports:
            places = published_records.places(self._keys, self._name, snapshot)
            self._places_of = snapshot.candidates, snapshot.probe_reports, places
        observed = [self._keys.endpoint(name, self._name) for name in mirror.observed_by(self._name)]
        known = self._leased.values.keys() | self._wanted().keys() | self._published().keys()
        alone = trio.current_time() - self._leased_since > 2 * self._lease_ttl
        kvs = (mirror.kv(key) for key in {*self._places_of[2], *observed, *mirror.leaseless(self._name)} - known)
        if foreign := [kv for kv in kvs if kv is not None and (alone or not kv.lease)]:
            await self._leased.find(foreign, snapshot.revision)

    async def _bring(self, wanted: Mapping[str, bytes], held: Collection[str]) -> None:
        """Make etcd hold `wanted`, and nothing else of `held`, but for what is to be restored later."""
        # What has to queue anew must go before it comes again.
        gone = [
            key
            for key in held
            if wanted.get(key) != self._leased.values[key] and not (key in wanted and self._replaceable(key))
        ]
        if gone:
            for key in gone:
                self._leased.may_remove(key)
            revision = await self._write([Delete(key) for key in gone])
            for key in gone:
                self._leased.remove(key, revision)
        new = {
            key: value
            for key, value in wanted.items()
            if not (self._leased.confirmed(key, value) or self._leased.waits(key, value))
        }
        if new:
            changed = set(self._leased.changed)
            fresh = [key for key in new if key not in self._leased.values]
            for key, value in new.items():
                # Should the answer be lost, it may stand there: then it is for us to put again, or to take away.
                self._leased.may_put(key, value, self._seen)
            try:
                revision = await self._write([Put(key, value, lease=self._short.id) for key, value in new.items()])
            except PermissionDenied:
                for key in fresh:
                    self._leased.remove(key)
                raise
            for key, value in new.items():
                self._leased.put(key, value, revision)
            for key in new:
                # Once for a row of changes: if it goes on, `contested` tells.
                if key in changed and self._leased.changes(key) == 1:
                    self._log.warning("key restored after another writer changed it", key=key, revision=revision)

    def _published(self) -> dict[str, bytes]:
        return {**self._observed_endpoints.values, **self._probe_reports.values}

    def _wanted(self) -> dict[str, bytes]:
        wanted = {}
        if self._status is not None:
            wanted[self._status_key] = encode(self._status)
        if self._stage is not None:
            wanted[self._stage_key] = encode(self._stage)
        if (current := self._candidacy) is not None:
            key = self._keys.election(current.location, self._name)
            wanted[key] = encode(CandidateRecord(rank=current.rank, since=current.since))
        return wanted

    def _replaceable(self, key: str) -> bool:
        if key in (self._status_key, self._stage_key) or self._is_published(key):
            return True
        return self._candidacy is not None and self._candidacy.in_place

    def _is_published(self, key: str) -> bool:
        return self._observed_endpoints.concern(key) or self._probe_reports.concern(key)

    async def _write(self, ops: list[Op]) -> int:
        """The revision of the last of them."""
        revision = 0
        for first in range(0, len(ops), MOST_AT_ONCE):
            compare = (
                []
                if self._record_kv is None
                else [Compare(self._node_key, CompareTarget.MOD, Is.EQUAL, self._record_kv.mod_revision)]
            )
            done = await self._client.txn(compare, ops[first : first + MOST_AT_ONCE])
            self._guard.observe(done.header)
            if not done.succeeded:
                raise _RecordChanged
            revision = done.header.revision
        return revision

    # --- the end -----------------------------------------------------------------------------------------------

    async def resign(self) -> None:
        """Give candidacy and status up and end the short lease; the registration stays. EtcdError."""
        async with self._lock:
            self._candidacy, self._status, self._stage = None, None, None
            self._observed_endpoints.replace({})
            self._probe_reports.replace({})
            changed = self._leased.changed
            self._leased.clear()
            try:
                if changed:
                    await self._delete_own(changed)
            finally:
                await self._short.end()

    async def _delete_own(self, changed: Sequence[str]) -> None:
        """Delete keys of this host that another writer has changed: they may be under no lease, or another, and would
        outlive the host. If the name is another host's by now, they are that one's; so is a status with its key."""
        node_kv, status_kv, _ = await self._look()
        if node_kv is not None and public_key_of(node_kv) not in (None, self._public_key):
            return
        compare = [unchanged(kv) if kv else absent(key) for kv, key in self._both(node_kv, status_kv)]
        keys = [key for key in changed if key != self._status_key]
        if len(keys) < len(changed) and status_kv is not None and not self._is_anothers(status_kv):
            keys.append(self._status_key)  # The last, since all writes compare it.
        for first in range(0, len(keys), MOST_AT_ONCE):
            done = await self._client.txn(compare, [Delete(key) for key in keys[first : first + MOST_AT_ONCE]])
            if not done.succeeded:
                return  # Another host has taken the name.

    def _is_anothers(self, status_kv: KeyValue) -> bool:
        """Whether another host of this name lives: nobody keeps a status that is under no lease."""
        return bool(status_kv.lease) and status_key_of(status_kv) not in (None, self._public_key)

    async def renew(self) -> None:
        """Leave whoever takes candidacy and status over the whole length of their lease. Never fails."""
        with suppress(EtcdError), trio.move_on_after(RENEW_SECONDS):
            await self._short.renew()

    async def close(self) -> None:
        """The same as `resign`: a stopped host stays a member."""
        await self.resign()

    async def forget(self) -> None:
        """Leave the mesh: every key of this host goes, address claims too. The operator's labels stay. EtcdError."""
        await self.resign()
        async with self._lock:
            self._record = None
            self._subnets, self.addresses = (), ()
            self._record_kv = None
            # First: a record that states an address whose claim is gone looks like an attack.
            node_kv = await self._client.get(self._node_key)
            if node_kv is not None and public_key_of(node_kv) == self._public_key:
                await self._client.txn([unchanged(node_kv)], [Delete(self._node_key)])
            for root in (self._keys.leaders_root, self._keys.addresses_root):
                for kv in (await self._client.get_prefix(root)).kvs:
                    if kv.value == self._name.encode():
                        await self._client.txn([unchanged(kv)], [Delete(kv.key)])
            await self._long.end()

    # --- the tasks ---------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the leases and what stands under them, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._short.keep)
            nursery.start_soon(self._long.keep)
            nursery.start_soon(self._watch_record)
            nursery.start_soon(self._leased.watch)
            nursery.start_soon(self._repair)
            task_status.started()

    async def _repair(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            delay = RETRY_FIRST
            while not await self._now():
                await trio.sleep(delay * self._rng.uniform(0.5, 1.5))
                delay = min(delay * 2, self._retry_most)

    async def _watch_record(self) -> None:
        """See to it that the registration is not taken away unnoticed."""
        delay = RETRY_FIRST
        while True:
            await self._registered.wait()
            known = self._record_kv
            if known is None:
                await trio.sleep(delay)
                continue
            try:
                with trio.CancelScope() as self._record_watch:
                    async with self._client.watch(self._node_key, start_revision=self._seen + 1) as watch:
                        async for batch in watch:
                            delay = RETRY_FIRST
                            for event in batch.events:
                                await self._record_event(event.type, event.kv)
            except EtcdError:
                # Whatever happened meanwhile is seen by looking again.
                self._record_kv = None
                self._wake.set()
            await trio.sleep(delay * self._rng.uniform(0.5, 1.5))
            delay = min(delay * 2, self._retry_most)

    async def _record_event(self, kind: EventType, kv: KeyValue) -> None:
        async with self._lock:
            known = self._record_kv
            if self._record is None or known is None or kv.mod_revision <= known.mod_revision:
                return
            if kind is EventType.PUT and kv.value == known.value and kv.lease == known.lease:
                self._record_kv = kv
                return
            self._record_kv = None
        self._log.warning("another writer changed this host's record; restoring it")
        self._wake.set()


def _one(answer: TxnResult, index: int) -> KeyValue | None:
    response = answer.responses[index]
    assert isinstance(response, RangeResult)
    return response.kvs[0] if response.kvs else None
