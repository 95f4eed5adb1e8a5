"""The peer record of the machine that connects: put under a lease, kept, taken away again.

`decide` is pure: what to write for the desired peer, given what etcd holds, or the sentence with which it is refused. A
record under a lease is a connect's, and dies with it within `LEASE_SECONDS`; one without a lease is the operator's, is
used as it is and stays. An address within the mesh's subnets is claimed like a node's, so that no node ever gets it:
the claim is put under the lease, and the record only after a look at all claims has shown that no other is older; else
the claim is taken back and another address is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from ipaddress import ip_network
from itertools import chain
from typing import TYPE_CHECKING

import trio
from attrs import evolve, frozen

from kilo_etcd.ctl.change import after
from kilo_etcd.ctl.context import Failure
from kilo_etcd.ctl.impact import new_trouble
from kilo_etcd.etcd.api import (
    Client,
    Compare,
    CompareTarget,
    Delete,
    EtcdError,
    Is,
    KeyValue,
    LeaseNotFound,
    Put,
    absent,
    unchanged,
)
from kilo_etcd.model import IPAddress, IPNetwork, Snapshot
from kilo_etcd.store import operator
from kilo_etcd.store.addresses import Claimant, named
from kilo_etcd.store.claims import candidates, look
from kilo_etcd.store.keys import Keys, PeerAddressKey, PeerKey
from kilo_etcd.store.lease import KeptLease
from kilo_etcd.store.records import PeerRecord, RecordError, decode_peer, encode

if TYPE_CHECKING:
    from kilo_etcd.store.view import View

LEASE_SECONDS = 300
"""How long leaders go on knowing a machine that has vanished: a laptop in a train's tunnel has not."""

ATTEMPTS = 5
KEEPALIVE = 10
"""Seconds; Kilo's default. A peer is behind NAT more often than not."""


MAX_SKIPPED_ADDRESSES = 1 << 16
"""How many addresses a network may have for the choice of an address to skip all of them, one after the other."""


@frozen(kw_only=True)
class DesiredPeer:
    """What the caller asks for; None: what the record has, or else what is chosen here."""

    name: str
    public_key: str
    allowed_ips: tuple[IPNetwork, ...] | None = None
    persistent_keepalive: int | None = None
    clean_up: bool = True
    replace: bool = False
    attached: tuple[IPNetwork, ...] = ()
    """The networks that this machine is attached to, of which no address is chosen: it may be another's there."""


@frozen(kw_only=True)
class Decision:
    """What to write: the claims, and then the record. Nothing if `record` stands there already."""

    record: PeerRecord
    writes: bool = True
    claims: tuple[IPAddress, ...] = ()
    chosen: tuple[IPAddress, ...] = ()
    """Those of the addresses that were chosen here."""
    lost: tuple[IPAddress, ...] = ()
    """Those that the record had so far and that others have: its claims of these go."""


def decide(
    desired: DesiredPeer, snapshot: Snapshot, view: View, keys: Keys, former: PeerRecord | None = None
) -> Decision:
    """What to write for the desired peer. `former` is what stood there, if the record is gone and is put anew: what
    `desired` leaves open stays. Failure, in one sentence, if it cannot be."""
    name = desired.name
    if not snapshot.subnets:
        raise Failure(f"there is no mesh under {keys.prefix} yet: the first agent makes it")
    if name in snapshot.nodes:
        raise Failure(f"{name} is a node of this mesh already; give this machine another name: kgctl connect PEER")
    held = view.kv(keys.peer(name))
    record = None if held is None else _readable(held)
    if held is not None and not desired.replace:
        _refuse(desired, held, record)
    base = record or former or PeerRecord(public_key=desired.public_key, persistent_keepalive=KEEPALIVE)
    lost = dict(_lost(name, base.allowed_ips, snapshot, view))
    if held is not None and record is not None and not held.lease and not _differs(desired, record):
        if not lost:
            return Decision(record=record, writes=False)
        if not desired.replace:
            whose = ", ".join(f"{network.network_address} of {named(holder)}" for network, holder in lost.items())
            raise Failure(
                f"peer {name} is registered with mesh addresses that others claimed before: {whose}; say --yes to "
                "replace the record, and have a free address chosen"
            )
    chosen: tuple[IPAddress, ...] = ()
    allowed = desired.allowed_ips
    if allowed is None:
        allowed = tuple(network for network in base.allowed_ips if network not in lost)
        if lost or not any(network.num_addresses == 1 for network in allowed):
            free = _free_addresses(name, snapshot, view, desired.attached)
            chosen = tuple(address for address in free if ip_network(address) not in allowed)
            allowed = (*allowed, *(ip_network(address) for address in chosen))
    if not any(network.num_addresses == 1 for network in allowed):
        raise Failure(f"--allowed-ips {','.join(map(str, allowed))} names no single address for this machine itself")
    keepalive = base.persistent_keepalive if desired.persistent_keepalive is None else desired.persistent_keepalive
    return Decision(
        record=evolve(base, public_key=desired.public_key, allowed_ips=allowed, persistent_keepalive=keepalive),
        claims=tuple(_to_claim(name, allowed, snapshot, view)),
        chosen=chosen,
        lost=tuple(network.network_address for network in lost),
    )


def _readable(held: KeyValue) -> PeerRecord | None:
    try:
        return decode_peer(held.value)
    except RecordError:
        return None


def _differs(desired: DesiredPeer, record: PeerRecord) -> bool:
    differing_ips = desired.allowed_ips is not None and set(desired.allowed_ips) != set(record.allowed_ips)
    return differing_ips or record.public_key != desired.public_key


def _refuse(desired: DesiredPeer, held: KeyValue, record: PeerRecord | None) -> None:
    remedy = "give this machine another name, or say --yes to replace the record"
    if record is None:
        raise Failure(f"there is a record of peer {desired.name} already, which cannot be read; {remedy}")
    if record.public_key != desired.public_key:
        holder = ", of a kgctl connect elsewhere or of this machine's with another key" if held.lease else ""
        raise Failure(
            f"peer {desired.name} is registered with another public key ({record.public_key}){holder}; {remedy}"
        )
    if not held.lease and _differs(desired, record):
        raise Failure(
            f"peer {desired.name} is registered with {', '.join(map(str, record.allowed_ips)) or 'no address'}; leave "
            "--allowed-ips out, or say --yes to replace the record"
        )


def _free_addresses(
    name: str, snapshot: Snapshot, view: View, attached: tuple[IPNetwork, ...] = ()
) -> tuple[IPAddress, ...]:
    """One address of each of the mesh's subnets: the peer's own claim of before, or else a free one, outside the
    narrower ones of the networks `attached` if there is one."""
    me = ("peer", name)
    claimed = sorted((address for address in view.claimed_by(me) if view.holder(address) == me), key=int)
    granted = [network for peer in snapshot.peers.values() if peer.name != name for network in peer.allowed_ips]
    addresses: list[IPAddress] = []
    for subnet in snapshot.subnets:
        own = [address for address in claimed if address in subnet]
        narrower = [
            network for network in attached
            if network.prefixlen > subnet.prefixlen and network.num_addresses <= MAX_SKIPPED_ADDRESSES
        ]  # fmt: skip

        def free_there(address: IPAddress, narrower: Iterable[IPNetwork] = narrower) -> bool:
            return view.free(address) and not any(address in network for network in narrower)

        tries: Iterable[IPAddress] = own or chain(
            candidates(f"peer/{name}", subnet, free_there), candidates(f"peer/{name}", subnet, view.free)
        )
        free = (a for a in tries if not any(a.version == n.version and a in n for n in granted))
        address = next(free, None)
        if address is None:
            raise Failure(
                f"no address is left for this machine in {subnet}; give one outside it with --allowed-ips, or forget "
                "nodes that are gone for good (kgctl node list --claims)"
            )
        addresses.append(address)
    return tuple(addresses)


def _lost(
    name: str, allowed: Iterable[IPNetwork], snapshot: Snapshot, view: View
) -> Iterable[tuple[IPNetwork, Claimant]]:
    """The mesh addresses among `allowed` that are another's, and whose."""
    for network in allowed:
        address = network.network_address
        if network.num_addresses == 1 and any(address in subnet for subnet in snapshot.subnets):
            holder = view.holder(address)
            if holder not in (None, ("peer", name)):
                yield network, holder


def _to_claim(name: str, allowed: Iterable[IPNetwork], snapshot: Snapshot, view: View) -> Iterable[IPAddress]:
    for network in allowed:
        for subnet in snapshot.subnets:
            if network.version != subnet.version or not network.overlaps(subnet):
                continue
            if network.num_addresses != 1:
                raise Failure(
                    f"{network} overlaps the mesh's subnet {subnet}, whose addresses nodes claim; choose another, or "
                    "single addresses within it; nothing was written"
                )
            address = network.network_address
            holder = view.holder(address)
            if holder not in (None, ("peer", name)):
                raise Failure(
                    f"{address} is claimed by {named(holder)} already; leave --allowed-ips out "
                    "to have a free address chosen; nothing was written"
                )
            yield address


class Gone(Failure):
    """Somebody has taken the record away, or has given the name to another key."""


class PeerRegistration:
    """Puts the record, keeps its lease, and takes it away. `run` is its task."""

    def __init__(self, client: Client, keys: Keys, desired: DesiredPeer, on_unconfirmed: Callable[[], None]) -> None:
        self._client = client
        self._keys = keys
        self._desired = desired
        self._lease = KeptLease(client, LEASE_SECONDS, on_unconfirmed=on_unconfirmed, on_lost=lambda: None)
        self.decision: Decision | None = None
        self.revision = 0
        """etcd's, from which on the record stands there."""
        self.renewing = False
        """Whether the record is being put anew, and may not stand there meanwhile."""
        self._former: PeerRecord | None = None
        """The record that this run has put, or has found in its place since."""
        self._taken_away: KeyValue | None = None
        """The record that is to be put back, as it stood before this run took it away."""

    @property
    def removes(self) -> bool:
        """Whether the record goes at the end: this run has put it."""
        return self.decision is not None and self.decision.writes and self._desired.clean_up

    @property
    def leased(self) -> bool:
        """Whether there is a lease, with or without anything under it."""
        return bool(self._lease.id)

    @property
    def unconfirmed(self) -> bool:
        """Whether etcd is to be asked if the lease still lives."""
        return self._lease.unconfirmed

    async def prospect(self) -> tuple[Decision, Snapshot, Snapshot]:
        """What would be written, and the mesh before and after. Failure, EtcdError."""
        before, view = await operator.snapshot(self._client, self._keys)
        decision = decide(self._desired, before, view, self._keys)
        return decision, before, after(view, self._puts(decision), [])

    def _puts(self, decision: Decision) -> dict[str, str]:
        if not decision.writes:
            return {}
        claims = {self._keys.peer_address(self._desired.name, address): "" for address in decision.claims}
        return {self._keys.peer(self._desired.name): encode(decision.record).decode(), **claims}

    async def register(self) -> Decision:
        """Put the record unless it stands there already. Failure, with nothing written; EtcdError: claims that were put
        already end with their lease."""
        for _ in range(ATTEMPTS):
            before, view = await operator.snapshot(self._client, self._keys)
            decision = decide(self._desired, before, view, self._keys, self._former)
            puts = self._puts(decision)
            if not puts:
                self.decision, self.revision = decision, view.revision
                return decision
            held = {key: view.kv(key) for key in puts}
            # This uses the view up.
            if trouble := new_trouble(before, after(view, puts, [])):
                what = "nothing was written" if self._former is None else "the record was not put again"
                raise Failure(f"{'; '.join(trouble)}; {what}")
            try:
                revision = await self._write(puts, held, decision)
            except LeaseNotFound:
                self._lease.mark_unconfirmed()
                continue
            if revision:
                self.decision, self.revision, self._former = decision, revision, decision.record
                return decision
        raise Failure(f"others change the record of peer {self._desired.name} again and again; nothing was written")

    async def _write(self, puts: Mapping[str, str], held: Mapping[str, KeyValue | None], decision: Decision) -> int:
        """Put the claims, then the record if these are the oldest claims of their addresses; etcd's revision then. 0:
        etcd does not hold what is `held` any more, or another claim is older. LeaseNotFound, EtcdError."""
        claims = (self._keys.peer_address(self._desired.name, address) for address in decision.claims)
        new = [key for key in claims if held[key] is None]
        if (new or self._desired.clean_up) and not await self._lease.lives():
            await self._lease.grant()
        compare = {key: absent(key) if kv is None else unchanged(kv) for key, kv in held.items()}
        if new:
            # Under the lease even if the record is to stay: they end if this machine gets no further.
            claimed = await self._client.txn(
                [compare[key] for key in new], [Put(key, puts[key], lease=self._lease.id) for key in new]
            )
            if not claimed.succeeded:
                return 0
            for key in new:
                compare[key] = Compare(key, CompareTarget.MOD, Is.EQUAL, claimed.header.revision)
            if not await self._has(decision.claims):
                await self._take_back(compare[key] for key in new)
                return 0
        lease = self._lease.id if self._desired.clean_up else 0
        stands = new if lease else []
        record = self._keys.peer(self._desired.name)
        former = held[record]
        if lease and former is not None and former.lease not in (0, lease):
            # An earlier run's. The machine may have booted with a clock that went back, and a record that is put over
            # does not have the nodes forget its handshakes.
            if not (await self._client.txn([compare[record]], [Delete(record)])).succeeded:
                await self._take_back(compare[key] for key in new)
                return 0
            self._former = _readable(former)
            compare[record] = absent(record)
        result = await self._client.txn(
            [*compare.values()],
            [
                *(Put(key, value, lease=lease) for key, value in puts.items() if key not in stands),
                *(Delete(self._keys.peer_address(self._desired.name, address)) for address in decision.lost),
            ],
        )
        if not result.succeeded:
            await self._take_back(compare[key] for key in new)
            return 0
        if not lease:
            with suppress(EtcdError):  # Nothing is under it, and it ends by itself.
                await self._lease.end()
        return result.header.revision

    async def _take_back(self, claims: Iterable[Compare]) -> None:
        """Delete claims, each if it is as it was put."""
        for claim in claims:
            await self._client.txn([claim], [Delete(claim.key)])

    async def _has(self, addresses: Iterable[IPAddress]) -> bool:
        """Whether no claim of these addresses is older than this machine's."""
        index, me = await look(self._client, self._keys), ("peer", self._desired.name)
        return all(index.oldest(address) == index.earliest(address) == me for address in addresses)

    async def renew(self) -> bool:
        """Take the record away and put the same one back, if it is under this run's lease: the nodes take its key for
        a new peer's then, and forget its handshakes. Whether they do. Gone; EtcdError: call again, since it may be
        gone. What it has of networks that a younger record wants too may go to that one."""
        if not self.removes:
            return False
        key = self._keys.peer(self._desired.name)
        while True:
            held = await self._client.get(key)
            if held is None:
                if self._taken_away is None:
                    # It has ended with its lease, and `mend` puts it again.
                    return True
                if await self._put_back(key, self._taken_away):
                    return True
                continue
            self._check_key(held)
            if not held.lease or held.lease != self._lease.id:
                self._taken_away, self.renewing = None, False
                return False
            if self._taken_away is not None and held.create_revision > self._taken_away.create_revision:
                # The answer to the put got lost.
                self._put_anew(held.mod_revision)
                return True
            self._former = _readable(held) or self._former
            # etcd whose disk is full deletes, and puts nothing: then the record is better left as it is.
            put = await self._client.txn([unchanged(held)], [Put(key, held.value, lease=held.lease)])
            if put.succeeded:
                # In between it is not there, and nobody else has taken it away.
                self._taken_away, self.renewing = held, True
                await self._client.txn([Compare(key, CompareTarget.MOD, Is.EQUAL, put.header.revision)], [Delete(key)])

    async def _put_back(self, key: str, taken_away: KeyValue) -> bool:
        """Whether the record stands again. False: somebody has put one, or its lease has ended."""
        try:
            put = await self._client.txn([absent(key)], [Put(key, taken_away.value, lease=taken_away.lease)])
        except LeaseNotFound:
            self._lease.mark_unconfirmed()
            self._taken_away, self.renewing = None, False
            return False
        if put.succeeded:
            self._put_anew(put.header.revision)
        return put.succeeded

    def _put_anew(self, revision: int) -> None:
        self.revision, self._taken_away, self.renewing = revision, None, False

    def _check_key(self, held: KeyValue) -> None:
        record = _readable(held)
        if record is not None and record.public_key != self._desired.public_key:
            raise Gone(f"peer {self._desired.name} has another public key now: another machine has taken the name")

    async def mend(self, held: KeyValue | None) -> bool:
        """Put the record back where it went with its lease; whether it was. `held` is what stands there as of
        `revision` or later. Gone if somebody else did it; Failure, EtcdError."""
        if held is not None:
            self._check_key(held)
        if self.removes and not await self._lease.lives():
            # What the caller was allowed to replace once it may not replace forever.
            self._desired = evolve(self._desired, replace=False)
            await self.register()
            return True
        if held is None:
            # Perhaps the lease ended and nobody has noticed yet: sleeping machines keep no leases.
            self._lease.mark_unconfirmed()
            if not self.removes or await self._lease.lives():
                raise Gone(f"the record of peer {self._desired.name} was removed by another writer")
            return await self.mend(None)
        return False

    async def keep(self) -> None:
        """The task: keep the lease, if there is one, until cancelled."""
        if self.removes:
            await self._lease.keep()
        else:
            await trio.sleep_forever()

    async def withdraw(self) -> None:
        """Take away what this run has put. EtcdError; then it ends with its lease."""
        lease = self._lease.id
        if await self._lease.end():
            return
        for key in (await self._client.lease_time_to_live(lease, keys=True)).keys:
            match self._keys.parse(key):
                case PeerKey(name) | PeerAddressKey(name) if name == self._desired.name:
                    await self._client.txn([Compare(key, CompareTarget.LEASE, Is.EQUAL, lease)], [Delete(key)])
