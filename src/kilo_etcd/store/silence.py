"""For how long the agents of nodes have been silent, as far as etcd tells.

etcd keeps no times. While a node has a record, the lease of that says when it was last kept alive. After that lease has
ended claims of mesh addresses may be left, with a reservation, whose lease says the same, and later without one. Then
all that is known is that both leases had their whole lengths to end. So each number is a lower bound; an election
in etcd gives all leases their full time again, and then it is lower still. Claims that an agent of before reservations
left count as the others as soon as all nodes have one: for a day after the upgrade that may be too much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import trio
from attrs import field, frozen

from kilo_etcd.etcd.api import Client, EtcdError, LeaseInfo
from kilo_etcd.model import IPAddress
from kilo_etcd.store.claims import RESERVATION_REFRESHES
from kilo_etcd.store.keys import AddressKey, Keys, NodeKey, ReservationKey
from kilo_etcd.store.lease import keep_interval
from kilo_etcd.store.view import View

AT_ONCE = 16
"""Leases that etcd is asked for at a time."""

MOST_ASKED = 16
"""Leases of living nodes that are looked at for their length."""


@frozen(kw_only=True)
class Claiming:
    """A node that has a record or claims mesh addresses."""

    name: str
    addresses: tuple[IPAddress, ...] = ()
    """The claimed ones."""
    registered: bool
    reserved: bool
    """Whether its claims are kept for it although it has no record."""
    alive: bool
    silent: int = 0
    """Seconds at least; 0 for a living one, and for one whose record is under no lease."""


def silent_for(info: LeaseInfo, interval: float | None = None) -> int:
    """Seconds for which nobody has kept a lease alive, at least. `interval`: seconds between two keepalives."""
    if info.ttl < 0:
        return 0  # It ends this very moment, and its record with it.
    return max(0, info.granted_ttl - info.ttl - int(keep_interval(info.granted_ttl) if interval is None else interval))


def _without_record(reservation: LeaseInfo) -> int:
    """The same of a node without a record, by the lease of its reservation. That of its record has ended, if there was
    one."""
    if reservation.ttl < 0:
        return 0
    forget_after = reservation.granted_ttl * RESERVATION_REFRESHES // (2 * RESERVATION_REFRESHES + 1)
    silent = silent_for(reservation, forget_after / RESERVATION_REFRESHES)
    if reservation.granted_ttl - reservation.ttl + keep_interval(forget_after) < forget_after:
        # No record has ended since it was refreshed. The host is joining, or was renamed and is yet to join, or its
        # agent finds no address in a full space and keeps what it has.
        return silent
    return max(forget_after, silent)


async def claiming(client: Client, keys: Keys, view: View, living: Collection[str]) -> tuple[Claiming, ...]:
    """All nodes that have a record or a claim, by name. EtcdError."""
    written = _Written.of(keys, view)
    records, reservations = written.records, written.reservations
    some_living = sorted(records.keys() & set(living))[:MOST_ASKED]
    leases = {name: lease for name, lease in records.items() if lease and (name not in living or name in some_living)}
    infos = await _infos(client, leases | {name: reservations[name] for name in reservations.keys() - records.keys()})
    ended = _shortest(infos[name] for name in leases if name not in written.ephemeral)
    if records.keys() <= reservations.keys():
        ended *= 2

    def silent(name: str) -> int:
        if name in living:
            return 0
        if name in records:
            return silent_for(infos[name]) if name in infos else 0
        return _without_record(infos[name]) if name in reservations else ended

    return tuple(
        Claiming(
            name=name,
            addresses=tuple(written.claims.get(name, ())),
            registered=name in records,
            reserved=name in reservations,
            alive=name in living,
            silent=silent(name),
        )
        for name in sorted(records.keys() | written.claims.keys())
    )


async def _infos(client: Client, leases: Mapping[str, int]) -> dict[str, LeaseInfo]:
    """Name -> what is known of its lease. etcd is asked for each, several at a time. EtcdError."""
    infos: dict[str, LeaseInfo] = {}
    rest, errors = iter(leases.items()), list[EtcdError]()

    async def ask() -> None:
        for name, lease in rest:
            try:
                infos[name] = await client.lease_time_to_live(lease)
            except EtcdError as error:
                errors.append(error)
            if errors:
                return

    async with trio.open_nursery() as nursery:
        for _ in range(min(AT_ONCE, len(leases))):
            nursery.start_soon(ask)
    if errors:
        raise errors[0]
    return infos


@frozen
class _Written:
    """What nodes have written, by name: the leases of records (0: none) and reservations, and claims."""

    records: dict[str, int] = field(factory=dict)
    reservations: dict[str, int] = field(factory=dict)
    claims: dict[str, list[IPAddress]] = field(factory=dict)
    ephemeral: set[str] = field(factory=set)
    """Nodes whose claims go with a lease."""

    @classmethod
    def of(cls, keys: Keys, view: View) -> _Written:
        it = cls()
        for kv in view.kvs(keys.by_root):
            match keys.parse(kv.key):
                case NodeKey(name):
                    it.records[name] = kv.lease
                case ReservationKey(name) if kv.lease:
                    it.reservations[name] = kv.lease
                case AddressKey(name, address):
                    it.claims.setdefault(name, []).append(address)
                    if kv.lease:
                        it.ephemeral.add(name)
        return it


def _shortest(infos: Iterable[LeaseInfo]) -> int:
    """As long as the shortest lease of a record lasts (--forget-after); for as long again the reservation does."""
    return min((info.granted_ttl for info in infos if info.ttl >= 0), default=0)
