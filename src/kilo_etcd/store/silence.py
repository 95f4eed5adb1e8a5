"""For how long the agents of nodes have been silent, as far as etcd tells.

etcd keeps no times. While a node has a record, the lease of that says when it was last kept alive. After the lease has
ended claims of mesh addresses may be left, and all that is known is that it had its whole length to end. So each number
is a lower bound; an election in etcd gives all leases their full time again, and then it is lower still.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from attrs import frozen

from kilo_etcd.etcd.api import Client, LeaseInfo
from kilo_etcd.model import IPAddress
from kilo_etcd.store.keys import AddressKey, Keys, NodeKey
from kilo_etcd.store.lease import keep_interval
from kilo_etcd.store.view import View

MOST_ASKED = 16
"""Leases of living nodes that are looked at for their length."""


@frozen(kw_only=True)
class Claiming:
    """A node that has a record or claims mesh addresses."""

    name: str
    addresses: tuple[IPAddress, ...] = ()
    """The claimed ones."""
    registered: bool
    alive: bool
    silent: int = 0
    """Seconds at least; 0 for a living one, and for one whose record is under no lease."""


def silent_for(info: LeaseInfo) -> int:
    """Seconds for which nobody has kept a lease alive, at least."""
    if info.ttl < 0:
        return 0  # It ends this very moment, and its record with it.
    return max(0, info.granted_ttl - info.ttl - int(keep_interval(info.granted_ttl)))


async def claiming(client: Client, keys: Keys, view: View, living: Collection[str]) -> tuple[Claiming, ...]:
    """All nodes that have a record or a claim, by name. EtcdError."""
    leases, claims = _written(keys, view)
    infos: dict[str, LeaseInfo] = {}
    dead = [name for name in leases if name not in living]
    for name in (*dead, *sorted(leases.keys() & set(living))[:MOST_ASKED]):
        if leases[name]:
            infos[name] = await client.lease_time_to_live(leases[name])
    ended = _shortest(infos.values())

    def silent(name: str) -> int:
        if name in living:
            return 0
        if name in leases:
            return silent_for(infos[name]) if name in infos else 0
        return ended

    return tuple(
        Claiming(
            name=name,
            addresses=tuple(claims.get(name, ())),
            registered=name in leases,
            alive=name in living,
            silent=silent(name),
        )
        for name in sorted(leases.keys() | claims.keys())
    )


def _written(keys: Keys, view: View) -> tuple[Mapping[str, int], Mapping[str, list[IPAddress]]]:
    """The lease of each node's record, 0: none; and what each node claims."""
    leases: dict[str, int] = {}
    claims: dict[str, list[IPAddress]] = {}
    for kv in view.kvs(keys.by_root):
        match keys.parse(kv.key):
            case NodeKey(name):
                leases[name] = kv.lease
            case AddressKey(name, address):
                claims.setdefault(name, []).append(address)
    return leases, claims


def _shortest(infos: Iterable[LeaseInfo]) -> int:
    """For how long a node without a record has been silent at least: as long as the shortest lease of a record lasts
    (--forget-after)."""
    return min((info.granted_ttl for info in infos if info.ttl >= 0), default=0)
