"""This host's own keys: its registration under a long lease, its candidacy, status and published records under a short
one.

The desired state is given once (`register`, `enter`, `leave`, `put_status`, `put_stage`, `put_observed_endpoints`,
`put_probe_reports`); `run` sees to it that etcd keeps saying so: it keeps the leases, and restores what was lost with
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

Each part has its own state and module: the record at the name (`registration`), what stands under a name that the host
had before (`former_names`), the mesh addresses (`mesh_addresses`) and their leases (`member_leases`), the place in the
election (`candidacy`), what other hosts and people read (`published_records`), what is known of the
leased keys (`leased_keys`), and the writes that make them as they are wanted (`leased_writer`). No part knows the
session. It owns the leases and the lock, and decides the order: registration, then candidacy and status, then what is
published of others.

An etcd that was restored or replaced would take all of this for news. So before this host registers, claims, or takes
a lease there, the `guard` verifies that it is the etcd that is followed; one that is known not to be receives
nothing, and no lease is kept there.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import suppress

import structlog
import trio

from kilo_etcd.etcd.api import (
    Client,
    Delete,
    EtcdError,
    KeyValue,
    LeaseNotFound,
    Op,
    PermissionDenied,
    Put,
)
from kilo_etcd.model import CandidateClass, IPAddress, IPNetwork, MeshSettings, Snapshot
from kilo_etcd.store import claims
from kilo_etcd.store.keys import ElectionKey, Keys, LeaderKey, leased_by, written_by
from kilo_etcd.store.lease import KeptLease
from kilo_etcd.store.mirror import ClusterNotTrusted, Mirror
from kilo_etcd.store.records import (
    NodeRecord,
    ObservedEndpointRecord,
    ProbeReportRecord,
    StageRecord,
    StatusRecord,
    decode_node,
)
from kilo_etcd.store.session.candidacy import Candidacy, WantedCandidacy
from kilo_etcd.store.session.cluster_guard import ClusterGuard, NoGuard
from kilo_etcd.store.session.contested import contested_sentence
from kilo_etcd.store.session.foreign_keys import ForeignKeys
from kilo_etcd.store.session.former_name_look import look_at, look_until_gone
from kilo_etcd.store.session.former_names import FormerName, Moved, move, removal
from kilo_etcd.store.session.leased_keys import RETRY_FIRST, LeasedKeys
from kilo_etcd.store.session.leased_writer import LeasedWriter
from kilo_etcd.store.session.member_leases import MemberLeases
from kilo_etcd.store.session.mesh_addresses import MeshAddresses
from kilo_etcd.store.session.node_identity import NameTaken, status_key_of, where_is
from kilo_etcd.store.session.published_records import Published
from kilo_etcd.store.session.registration import RecordChanged, Registration, Standing

RETRY_MOST = 5.0
"""Seconds between two attempts at most; less for short leases, which an election in etcd gives their full time just
once."""

RENEW_SECONDS = 1.0
"""The longest that a reload waits for etcd to renew the lease."""


class Session:
    """The keys of `node_name`, whose WireGuard key is `public_key`. `lease_ttl` and `forget_after` are seconds. Record
    and claims of an `ephemeral` host go with a lease of `lease_ttl` too.

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
        ephemeral: bool = False,
        on_event: Callable[[str], None] | None = None,
        guard: ClusterGuard | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._client = client
        self._guard = guard or NoGuard()
        self._keys = keys
        self._name = node_name
        self._public_key = public_key
        self._lease_ttl = lease_ttl
        self._on_event = on_event or (lambda _name: None)
        self._rng = rng or random.Random()
        self._log = structlog.get_logger().bind(node=node_name)
        self._retry_most = min(RETRY_MOST, lease_ttl / 3)
        self._lock = trio.Lock()
        self._wake = trio.Event()
        self._member = MemberLeases(
            client,
            keys.reservation(node_name),
            lease_ttl=lease_ttl,
            forget_after=forget_after,
            ephemeral=ephemeral,
            on_unconfirmed=self._mend,
            on_lost=self._lost,
            is_own=self._is_own,
        )
        self._short = KeptLease(client, lease_ttl, on_unconfirmed=self._not_kept, on_lost=self._lost_short)
        self._leased_since: float | None = None
        """Since when this run has its short lease, on trio's clock; None: it has had none yet."""
        self._candidacy = WantedCandidacy(keys, node_name)
        self._published = Published(keys, node_name)
        self._addresses = MeshAddresses(client, keys, node_name, lease_ttl)
        self._foreign = ForeignKeys(keys, node_name)
        self._registration = Registration(
            client,
            keys,
            node_name,
            public_key,
            self._lock,
            self._guard,
            retry_most=self._retry_most,
            on_changed=self._mend,
            on_taken=lambda: self._on_event("name taken"),
            rng=self._rng,
        )
        self._leased = LeasedKeys(
            client,
            self._lock,
            retry_most=self._retry_most,
            lease=lambda: self._short.id,
            on_due=self._mend,
            on_contested=lambda: self._on_event("contested"),
            # There may be hundreds of observed endpoints; the mirror has them all.
            watched=lambda key: not self._published.concerns_others(key),
            rng=self._rng,
        )
        self._writer = LeasedWriter(
            node_name,
            self._leased,
            self._registration,
            lease=lambda: self._short.id,
            replaceable=self._replaceable,
            apart=self._published.concerns_others,
            beside=self._beside,
        )
        self._led: dict[str, int] = {}
        """Locations with a record that this host leads them, as far as is known -> etcd's revision of the record, if
        this run wrote it."""
        self._succeeded = False
        """Whether another host leads in this one's place as soon as its candidacy is gone, or does already."""
        self._generation = 0
        """Of the guard, as far as they have been handled."""
        self.last_error: str | None = None

    def __repr__(self) -> str:
        return f"<Session {self._name} {'healthy' if self.healthy else 'unhealthy'} {self.candidacy}>"

    @property
    def healthy(self) -> bool:
        """Whether all that is wanted is in etcd, as far as is known."""
        return (
            self.last_error is None
            and not (self._member.unconfirmed or self._short.unconfirmed)
            and self._registration.known
            and not self._leased.changed
        )

    @property
    def lapsed(self) -> bool:
        """Whether the short lease may have ended, for all that this host knows: it was not kept for its time."""
        return self._short.unconfirmed

    @property
    def registered(self) -> bool:
        """Whether record and claims stand, as far as this host knows. If not, it is restoring them."""
        return self._registration.known and not self._member.unconfirmed

    @property
    def contested(self) -> str | None:
        """A sentence on the leased keys that another writer changes again and again; None: there are none."""
        return contested_sentence(self._leased.contested)

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """The mesh addresses that this host has claimed; its record states them."""
        return self._addresses.addresses

    def take_lost_addresses(self) -> tuple[IPAddress, ...]:
        """Those that this host has lost to others since this was last asked, whatever had them claimed again."""
        return self._addresses.take_lost()

    @property
    def candidacy(self) -> Candidacy | None:
        """As what this host stands, or will as soon as etcd can be told."""
        return self._candidacy.current

    @property
    def status(self) -> StatusRecord | None:
        """The last one that was put, or that an earlier run of this agent left under a lease that lives."""
        return self._published.status

    @property
    def stage(self) -> StageRecord | None:
        """The last one that was put, or that an earlier run of this agent left under a lease that lives."""
        return self._published.stage

    @property
    def observed_endpoints(self) -> Mapping[str, ObservedEndpointRecord]:
        """Node or peer -> where this host sees it, as etcd says or will as soon as it can be told."""
        return self._published.observed_endpoints.records

    @property
    def probe_reports(self) -> Mapping[str, ProbeReportRecord]:
        """Location -> what this host says of its leader, as etcd says or will as soon as it can be told."""
        return self._published.probe_reports.records

    # --- before the first registration -------------------------------------------------------------------------

    async def ensure_mesh(self, settings: MeshSettings, *, restores: bool = False) -> MeshSettings:
        """Put the mesh's settings where there are none; those in force. `restores`: they were in force already.
        RecordError, EtcdError."""
        return await claims.ensure_mesh(self._client, self._keys, settings, restores=restores)

    async def subnets_in_force(self, configured: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
        """The subnets by which this host finds its address, if etcd's value is `configured`. EtcdError."""
        return await claims.subnets_in_force(self._client, self._keys, self._name, configured)

    async def claim_addresses(
        self,
        subnets: tuple[IPNetwork, ...],
        *,
        former: tuple[IPAddress, ...] = (),
        renumber: bool = False,
        doubted: bool = False,
    ) -> tuple[IPAddress, ...]:
        """This host's mesh addresses, claimed now if it has none yet (the `former` ones of an earlier run, if they are
        free), and their claims restored if another writer has deleted them. `doubted`: another claim may be older; then
        another address is claimed. With `renumber` its claims outside `subnets` are given up. Waits as `register` does
        for the end of a dead owner's status, and until an unused address may be taken if none is free. A host that
        found no address in `subnets` does not look there again at once. NameTaken, NoAddressLeft, EtcdError."""

        async def claim() -> None:
            deadline = trio.current_time() + self._lease_ttl + 1
            moved = await self._claim(subnets, deadline, former=former, renumber=renumber, doubted=doubted)
            if moved and self._registration.record is not None:
                # The record states the addresses of before; if this fails, `run` goes on trying.
                self._registration.look_again()
                self._wake.set()
                await self._register(trio.current_time() + self._lease_ttl + 1)

        await self._until_due(claim)
        return self.addresses

    async def _until_due(self, act: Callable[[], Awaitable[None]]) -> None:
        """Do it under the lock, and again when an unused address may be taken. All else that is wanted is written
        meanwhile. Nothing is done once this host has left the mesh."""
        drops = self._addresses.drops
        while True:
            async with self._lock:
                try:
                    if self._addresses.drops == drops:
                        await act()
                    return
                except claims.TakeLater as later:
                    due = later.unused.due
            while (left := due - trio.current_time()) > 0:
                await trio.sleep(min(1.0, left))
                await self._member.renew_ephemeral()
            await self._guard.verify()

    async def has_claims(self) -> bool:
        """Whether the claims of this host's addresses stand in etcd now. EtcdError."""
        return await self._addresses.stand()

    # --- a former name -----------------------------------------------------------------------------------------

    async def take_over(self, names: Mapping[str, str | None]) -> Moved:
        """Have as this host's own what stands under the other `names` with its public key, the oldest first: after it
        was renamed. Each name has its label, if there is one: the host stays at that location.

        To be called before addresses are claimed. Nothing is taken if an agent lives under one of them; a status that a
        former run left is waited for until its lease ends, unless one of the others is known to live. Nor is one waited
        for whose record is younger than this host's own: it does not keep the key, and any host may write this key into
        its record, which must not delay this one's start. A host that has run beside this one, as this one's record
        says, is none that was renamed, whether its agent runs at present or not. NameTaken, EtcdError."""
        async with self._lock:
            await self._guard.verify()
            standing = await self._registration.look()
            own = standing.node if self._registration.is_own(standing.node) else None
            others = set[str]() if own is None else set(decode_node(own.value).duplicate_of)
            former: list[FormerName] = []
            for name in names:
                each = await look_at(self._client, self._keys, name)
                known = name in others or any(other.lives for other in former)
                if each.lives and each.is_older(own) and not known:
                    each, kept = await look_until_gone(self._client, self._keys, name, self._lease_ttl, self._name)
                    others |= {name} if kept else set()
                if each.node is None or each.public_key == self._public_key:
                    former.append(each)
            if living := tuple(each.name for each in former if each.lives or (each.node and each.name in others)):
                return Moved(living=living, beside=tuple(name for name in living if name in others))
            moved: list[str] = []
            for each in former:
                try:
                    if await self._move(each.name, names[each.name]):
                        moved.append(each.name)
                except PermissionDenied as error:
                    return Moved(names=tuple(moved), refused=str(error))
            return Moved(names=tuple(moved))

    async def _move(self, name: str, label: str | None) -> bool:
        """Whether what stands under a former name is under this one now. EtcdError, NameTaken."""
        registration, keys = self._registration, self._keys
        while True:
            standing = await registration.look_until_free(trio.current_time() + self._lease_ttl + 1)
            own, former = registration.is_own(standing.node), await look_at(self._client, self._keys, name)
            record = former.record
            if record is None or former.public_key != self._public_key or former.lives:
                # The operator or another copy was faster; or an attempt went through although its answer was lost.
                return own and former.node is None
            if not own and standing.node is not None:
                await registration.clear(standing)
                continue
            try:
                writes = removal(keys, former) if own else await self._moving(former, record, standing, label)
                result = await self._client.txn([*registration.conditions(standing), *former.unchanged(keys)], writes)
            except LeaseNotFound:
                self._unconfirm_leases()
                continue
            self._guard.observe(result.header)
            if not result.succeeded:
                continue
            if not own:
                revision, key = result.header.revision, self._published.status_key
                self._leased.put(key, self._published.of_itself[key], revision)
                places = (keys.parse(kv.key) for kv in former.leaders)
                self._led.update({place.location: revision for place in places if isinstance(place, LeaderKey)})
            return True

    async def _moving(self, former: FormerName, record: NodeRecord, standing: Standing, label: str | None) -> list[Op]:
        self._stand_in(record)
        await self._hold_long(None)
        await self._hold_short(standing.status)
        leases = await self._hold_claims(standing)
        status = self._published.of_itself[self._published.status_key]
        long, short = self._member.record.id, self._short.id
        return move(
            self._keys, former, self._name, long=long, short=short, claims=leases, status=status, label=label
        )  # fmt: skip

    # --- the registration --------------------------------------------------------------------------------------

    async def register(self, record: NodeRecord) -> None:
        """Be a member with this record; nothing is written if etcd holds all of it already. Waits up to the short
        lease's time for a dead owner's status to end. NameTaken if it does not; NoAddressLeft if another host has
        taken this one's meanwhile; EtcdError. If it fails `run` goes on trying."""
        async with self._lock:
            self._registration.record = record
            self._stand_in(record)
            if self._member.ephemeral and not self._registration.known:
                # The lease is not kept yet when an agent starts, and finding the host's addresses may have taken long.
                self._member.mark_unconfirmed()

        async def put() -> None:
            if self._registration.record is not None:
                await self._register(trio.current_time() + self._lease_ttl + 1)
                self.last_error = None

        await self._until_due(put)

    def _stand_in(self, record: NodeRecord) -> None:
        # Being there must show at once, or a second host of this name could slip in before the first status.
        self._published.stand_in(
            StatusRecord(
                public_key=self._public_key,
                location=record.location,
                version=record.version,
                address=where_is(record),
            )
        )

    async def _register(self, deadline: float) -> bool:
        """Returns whether the record was written."""
        await self._guard.verify()
        value = self._registration.value(self._addresses.stated)
        while True:
            standing = await self._registration.look_until_free(deadline)
            try:
                await self._hold_long(standing.node if self._registration.is_own(standing.node) else None)
                if self._published.status is not None:
                    await self._hold_short(standing.status)
                reservation = self._member.reservation
                if reservation.unconfirmed or self._addresses.lease not in (0, reservation.id):
                    await self._claim_again(deadline)
                    value = self._registration.value(self._addresses.stated)
            except LeaseNotFound:
                self._unconfirm_leases()
                continue
            key, beside = self._published.status_key, list[Op]()
            status = None if key in self._leased.values else self._published.of_itself.get(key)
            if status is not None:
                beside.append(Put(key, status, lease=self._short.id))
            try:
                written = await self._registration.put(value, self._member.record.id, beside, standing)
            except LeaseNotFound:
                self._unconfirm_leases()
                continue
            if written is None:
                continue
            if status is not None:
                self._leased.put(key, status, written.revision)
            if written.revision:
                self._on_event("registered")
            return written.record

    # --- leases ------------------------------------------------------------------------------------------------

    def _mend(self) -> None:
        self._wake.set()

    def _not_kept(self) -> None:
        self._member.refresh_reservation()
        self._mend()

    def _lost(self) -> None:
        self._on_event("lease lost")

    def _lost_short(self) -> None:
        # The place in the queue is gone, and others' with it where all were cut off: who stands first is to be decided
        # anew, by whoever called `enter`.
        self._candidacy.lose()
        self._lost()

    def _unconfirm_leases(self) -> None:
        # Which of them etcd missed it does not say.
        self._member.mark_unconfirmed()
        self._short.mark_unconfirmed()

    async def _claim(
        self,
        subnets: tuple[IPNetwork, ...],
        deadline: float,
        *,
        former: tuple[IPAddress, ...] = (),
        renumber: bool = False,
        doubted: bool = False,
    ) -> bool:
        """Have addresses in `subnets`, if the name is this host's by `deadline`; whether they are others than before.
        NameTaken, TakeLater, NoAddressLeft, EtcdError."""
        self._addresses.check(subnets, doubted, self._guard.generation)
        while True:
            # First of all: what stands at the name of a living host is not to be touched.
            standing = await self._registration.look_until_free(deadline)
            try:
                leases = await self._hold_claims(standing)
                name = self._registration.conditions(standing)
                return await self._addresses.claim(
                    subnets, leases, name, former=former, renumber=renumber, doubted=doubted
                )
            except LeaseNotFound:
                self._unconfirm_leases()
            except claims.NameChanged:
                continue
            except (claims.NoAddressLeft, PermissionDenied):
                # An agent that ends now, and is started again and again, would leave a lease each time.
                await self._member.end_unused_reservation()
                raise

    async def _claim_again(self, deadline: float) -> None:
        """Restore the claims of this host, if it has any. NameTaken, TakeLater, NoAddressLeft, EtcdError."""
        if self._addresses.addresses:
            await self._claim(self._addresses.subnets, deadline)
        else:
            self._member.reserve_nothing()

    async def _hold_claims(self, standing: Standing) -> claims.Leases:
        """The leases for this host's claims and their reservation. EtcdError."""
        own = self._registration.is_own(standing.node)
        if self._member.ephemeral:
            await self._hold_long(standing.node if own else None)
        return await self._member.for_claims(adopts=own or standing.node is None)

    async def _hold_long(self, node_kv: KeyValue | None) -> None:
        if await self._member.record.lives():
            return
        self._led.clear()
        if node_kv is not None and node_kv.lease:
            info = await self._member.record.adopt(node_kv.lease, self._is_own)
            for key in map(self._keys.parse, info.keys if info is not None else ()):
                if isinstance(key, LeaderKey) and key.node == self._name:
                    self._led[key.location] = 0
        if not self._member.record.id:
            await self._member.record.grant()

    async def _hold_short(self, status_kv: KeyValue | None) -> None:
        if await self._short.lives():
            return
        self._leased.clear()
        if status_kv is not None and status_kv.lease and status_key_of(status_kv) == self._public_key:
            info = await self._short.adopt(status_kv.lease, self._is_own)
            if info is not None:
                self._leased_since = trio.current_time()
                await self._adopt(info.id, info.keys)
        if not self._short.id:
            await self._guard.verify()
            # If the earlier lease was not adopted, its keys are put under the new one. A put keeps the create revision,
            # so the candidacy keeps its place in the queue.
            self._leased.clear()
            await self._short.grant()
            self._leased_since = trio.current_time()
            self._on_event("lease granted")

    def _is_own(self, key: bytes) -> bool:
        """Whether this host's agent alone writes a key, under a lease."""
        return written_by(self._keys.parse(key)) == self._name

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
            if isinstance(parsed, ElectionKey):
                if self._candidacy.adopt(parsed.location, kv.value):
                    self._log.info("candidacy adopted", location=parsed.location)
            else:
                self._published.adopt(parsed, kv.value)

    # --- what is wanted under the short lease ------------------------------------------------------------------

    async def enter(
        self, location: str, rank: CandidateClass, *, in_place: bool = False, succeeded: bool = False
    ) -> bool:
        """Stand for leader of `location`. Standing elsewhere is given up first; as another class too, unless
        `in_place`. `succeeded`: see `leave`."""
        self._candidacy.enter(location, rank, in_place=in_place)
        self._succeeded = succeeded
        return await self._now()

    async def leave(self, *, succeeded: bool = False) -> bool:
        """Stand no more. `succeeded`: another candidate leads then, so that the record that this host leads goes too;
        else it stays, since a location without candidates keeps the leader on record."""
        self._candidacy.leave()
        self._succeeded = succeeded
        return await self._now()

    def _beside(self, written: Collection[str]) -> list[Op]:
        """What goes in the same write as a candidacy: the records that this host leads, of locations where it is not
        any more, or where another leads."""
        stood = [key.location for key in map(self._keys.parse, written) if isinstance(key, ElectionKey)]
        if not stood:
            return []
        location = stood[0] if self._candidacy.current is None else self._candidacy.current.location
        return [
            Delete(self._keys.leader(where, self._name)) for where in self._led if where != location or self._succeeded
        ]

    async def put_status(self, status: StatusRecord) -> bool:
        """Report; written only if it differs from what stands there."""
        self._published.report(status)
        return await self._now()

    async def put_stage(self, stage: StageRecord | None) -> bool:
        """Say this of the switch to `encrypted`; None: nothing."""
        self._published.report_stage(stage)
        return await self._now()

    async def put_observed_endpoints(self, observed_endpoints: Mapping[str, ObservedEndpointRecord]) -> bool:
        """Say of these nodes and peers, and of no others, where this host sees them; only what differs is written."""
        self._published.observed_endpoints.replace(observed_endpoints)
        return await self._now()

    async def put_probe_reports(self, probe_reports: Mapping[str, ProbeReportRecord]) -> bool:
        """Say this of the leaders of these locations, and of no others; only what differs is written."""
        self._published.probe_reports.replace(probe_reports)
        return await self._now()

    async def record_leader(self, location: str, *, known_revision: int) -> bool:
        """Put on record, under the long lease, that this host leads `location`, as far as that is not done: the caller
        knows etcd's revision `known_revision`. Not remembered if etcd is away."""

        def put() -> list[Op]:
            if self._led.get(location, 0) > known_revision or not self._member.record.id:
                return []
            return [Put(self._keys.leader(location, self._name), b"", lease=self._member.record.id)]

        revision = await self._write_once(put)
        if revision:
            self._led[location] = revision
        return revision is not None

    async def _write_once(self, ops: Callable[[], list[Op]]) -> int | None:
        """Write what `ops` gives under the lock, if this host is registered; etcd's revision then, 0: nothing was
        written; None: it failed, and is not tried again."""
        revision = 0

        async def write() -> bool:
            nonlocal revision
            async with self._lock:
                self._guard.check()
                if not self._registration.known or not (operations := ops()):
                    return False
                try:
                    revision = await self._registration.write(operations)
                except RecordChanged:
                    self._registration.look_again()
                    self._wake.set()
                except LeaseNotFound:
                    self._unconfirm_leases()
                    self._wake.set()
            return bool(revision)

        return revision if await self._try(write) else None

    async def _settle_leaders(self, snapshot: Snapshot, mirror: Mirror, *, on_record: bool) -> None:
        """Delete the records that this host leads locations where it is not any more. As a rule they go with its
        candidacy there; without one they would stay. One of its own location under the long lease of an earlier run,
        which nobody keeps, is put under this run's if this host is `on_record` as the last leader of its segment, and
        deleted if it is not."""
        if (own := snapshot.nodes.get(self._name)) is None:
            return
        stands = {key.location for key in map(self._keys.parse, self._leased.values) if isinstance(key, ElectionKey)}

        def settled() -> Iterator[tuple[str, Op]]:
            for where in sorted({*self._led, *self._foreign.led(snapshot)}):
                key = self._keys.leader(where, self._name)
                if (kv := mirror.kv(key)) is None or self._led.get(where, 0) > snapshot.revision:
                    continue
                if where not in {*stands, own.location}:
                    yield where, Delete(key)
                elif where == own.location and self._member.record.id and kv.lease != self._member.record.id:
                    yield where, Put(key, kv.value, lease=self._member.record.id) if on_record else Delete(key)

        if not (changes := dict(settled())):
            return
        if revision := await self._write_once(lambda: [*changes.values()]):
            self._led.update((where, revision) for where, change in changes.items() if isinstance(change, Put))

    async def _now(self) -> bool:
        async def sync() -> bool:
            async with self._lock:
                await self._sync()
            return True

        succeeded = await self._try(sync)
        if not succeeded:
            self._wake.set()
        return succeeded

    async def _try(self, act: Callable[[], Awaitable[bool]]) -> bool:
        """Whether `act` did not fail. It returns whether an error of before is over: one that wrote nothing cannot
        know."""
        try:
            over = await act()
        except ClusterNotTrusted as error:
            # The mirror has logged it.
            self.last_error = str(error)
            return False
        except claims.TakeLater as later:
            # It was logged when the search ended.
            self.last_error = str(later)
            return False
        except (EtcdError, NameTaken, claims.NoAddressLeft) as error:
            if str(error) != self.last_error:
                self._log.warning("etcd could not be updated", error=str(error))
            self.last_error = str(error)
            return False
        if over:
            self.last_error = None
        return True

    async def _sync(self) -> None:
        """Make etcd say what is wanted. Called under the lock. EtcdError, NameTaken, TakeLater, NoAddressLeft."""
        registration = self._registration
        while True:
            self._guard.check()
            if self._generation != self._guard.generation:
                self._generation = self._guard.generation
                self._look_anew()
            try:
                if registration.record is not None and self._member.unconfirmed:
                    registration.look_again()
                if registration.record is not None and not registration.known:
                    registration.check_restores()
                    await self._guard.verify()
                    await self._claim_again(trio.current_time())
                    if await self._register(trio.current_time()):
                        registration.note_restore()
                    self._on_event("registered again")
                await self._sync_short()
                return
            except RecordChanged:
                registration.look_again()
            except LeaseNotFound:
                self._unconfirm_leases()

    def _look_anew(self) -> None:
        """This etcd may not be the one that was written to: an earlier state of that, or what it was before another one
        was in its place. Our leases may live in it all the same, and a watch would wait for a revision far away."""
        self._registration.look_anew()
        self._member.forget()
        self._short.forget()
        self._leased.clear()
        self._addresses.look_anew(self._guard.generation)
        # As with a lease that is lost, or whoever comes first would lead.
        self._lost_short()

    async def _sync_short(self) -> None:
        if self._wanted() or self._published.of_others or self._leased.values:
            await self._hold_short(None)
        await self._writer.bring(self._wanted(), self._published.of_others)

    def _wanted(self) -> dict[str, bytes]:
        return {**self._published.of_itself, **self._candidacy.values}

    def _replaceable(self, key: str) -> bool:
        return self._published.concerns_itself(key) or self._published.concerns_others(key) or self._candidacy.in_place

    async def compare(self, snapshot: Snapshot, mirror: Mirror, *, on_record: bool) -> float:
        """Restore the observed endpoints and probe reports of this host that another writer has changed, and delete
        observed endpoints, probe reports and candidacies that stand in its name and are not its own, and what else
        stands there under no lease and should be under one. Each is deleted only if it is as `mirror` has it: this host
        may have put its own since. Those under a lease are left alone until that of an earlier run has ended: its
        candidacy may yet be taken over, with its place in the queue. The answer is when to compare again although
        nothing has changed, on trio's clock.

        `mirror` has given `snapshot`, by which this host is `on_record`, or not, as the last leader of its segment. If
        it follows another etcd than the one that was written to, all is looked at anew: that one's history may lack
        what the watches would tell."""
        if self._generation != self._guard.generation:
            self._wake.set()
            return float("inf")
        for key in [key for key in self._leased.values if self._published.concerns_others(key)]:
            await self._leased.compare(key, mirror.kv(key), snapshot.revision)
        known_keys = self._leased.values.keys() | self._wanted().keys() | self._published.of_others.keys()
        all_foreign = self._foreign.find(snapshot, mirror, known_keys=known_keys)
        now, earlier_runs = trio.current_time(), 2 * self._lease_ttl
        # Nobody tells when this time is over: it begins with the lease, which is no news to the mirror.
        over = now + earlier_runs if self._leased_since is None else self._leased_since + earlier_runs
        foreign = all_foreign if now >= over else [kv for kv in all_foreign if not kv.lease]
        if foreign:
            await self._leased.find(foreign, snapshot.revision)
        await self._settle_leaders(snapshot, mirror, on_record=on_record)
        return over if len(foreign) < len(all_foreign) else float("inf")

    # --- the end -----------------------------------------------------------------------------------------------

    async def resign(self) -> None:
        """Give candidacy and status up and end the short lease; the registration stays: a stopped host is a member.
        EtcdError."""
        async with self._lock:
            self._candidacy.leave()
            self._published.clear()
            self._guard.check()
            changed, foreign = self._leased.changed, self._leased.foreign_revisions
            own = tuple(self._leased.values)
            self._leased.clear()
            try:
                if changed:
                    await self._registration.delete_own(changed, foreign)
            finally:
                if not await self._short.end():
                    await self._registration.delete_own(own, foreign)
                if self._addresses.lease != self._member.reservation.id:
                    # It ends while it waits for an unused address.
                    await self._member.end_unused_reservation()

    async def renew(self) -> None:
        """Leave whoever takes candidacy and status over the whole length of their lease. Never fails."""
        with suppress(EtcdError), trio.move_on_after(RENEW_SECONDS):
            await self._short.renew()
            await self._member.renew_ephemeral()

    async def forget(self) -> None:
        """Leave the mesh: every key of this host goes, address claims too. The operator's labels stay. EtcdError."""
        await self.resign()
        async with self._lock:
            self._registration.drop()
            self._addresses.drop()
            await self._registration.delete()
            await self._member.end()

    # --- the tasks ---------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the leases and what stands under them, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._short.keep)
            nursery.start_soon(self._member.keep)
            nursery.start_soon(self._registration.watch)
            nursery.start_soon(self._leased.watch)
            nursery.start_soon(self._repair)
            nursery.start_soon(self._follow_trust)
            task_status.started()

    async def _follow_trust(self) -> None:
        """Keep no lease in an etcd that is not followed, and write anew to one that is followed again."""
        trust = self._guard.trust
        while True:
            trust = await self._guard.wait_trust_change(trust)
            _, trusted = trust
            if trusted:
                self._wake.set()
            else:
                self._unconfirm_leases()

    async def _repair(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            delay = RETRY_FIRST
            while not await self._now():
                await trio.sleep(delay * self._rng.uniform(0.5, 1.5))
                delay = min(delay * 2, self._retry_most)
