"""A host that was renamed finds its public key in a record under its former name. `move` says what to write so that all
of that is the host's under its new name: record, mesh addresses, and that it leads a location. Pure.

One public key is one host to WireGuard, so the record under the former name keeps the key from the new one for as long
as its lease lasts (decision 0024). The move is one transaction on the condition that nothing lives there. So of two
copies of a disk that start at once one alone moves it, and the address is nobody's at no time.

A host whose agent lives is not moved away: it is the original of a copied disk, or one of two copies.
"""

from __future__ import annotations

from collections.abc import Iterable

from attrs import evolve, frozen

from kilo_etcd.etcd.api import Compare, Delete, KeyValue, Op, Put, absent, prefix_end, unchanged
from kilo_etcd.store.claims import Leases
from kilo_etcd.store.keys import AddressKey, Keys, LeaderKey, NodeKey
from kilo_etcd.store.records import NodeRecord, RecordError, decode_node, encode


@frozen(kw_only=True)
class FormerName:
    """What etcd holds under another name than this host's."""

    name: str
    node: KeyValue | None
    status: KeyValue | None
    addresses: tuple[KeyValue, ...] = ()
    leaders: tuple[KeyValue, ...] = ()

    @classmethod
    def of(cls, keys: Keys, name: str, kvs: Iterable[KeyValue], status: KeyValue | None) -> FormerName:
        """From what stands below the name's prefix."""
        parsed = [(keys.parse(kv.key), kv) for kv in kvs]
        return cls(
            name=name,
            node=next((kv for key, kv in parsed if isinstance(key, NodeKey)), None),
            status=status,
            addresses=tuple(kv for key, kv in parsed if isinstance(key, AddressKey)),
            leaders=tuple(kv for key, kv in parsed if isinstance(key, LeaderKey)),
        )

    @property
    def record(self) -> NodeRecord | None:
        """The record, if there is one that can be read."""
        try:
            return None if self.node is None else decode_node(self.node.value)
        except RecordError:
            return None

    @property
    def public_key(self) -> str | None:
        """The key in the record, if there is one that can be read."""
        record = self.record
        return None if record is None else record.public_key

    @property
    def lives(self) -> bool:
        """Whether an agent lives there: its status is under a lease. Whose it is does not matter."""
        return self.status is not None and bool(self.status.lease)

    def is_older(self, own: KeyValue | None) -> bool:
        """Whether the record is not younger than this host's `own`, if there is one."""
        return own is None or self.node is None or self.node.create_revision < own.create_revision

    def unchanged(self, keys: Keys) -> list[Compare]:
        """The conditions that record and status are still these."""
        wanted = (self.node, keys.node(self.name)), (self.status, keys.status(self.name))
        return [absent(key) if kv is None else unchanged(kv) for kv, key in wanted]


@frozen(kw_only=True)
class Moved:
    """What has become of the records under other names with this host's key."""

    names: tuple[str, ...] = ()
    """What stood under these is this host's now, or gone."""
    living: tuple[str, ...] = ()
    """Agents live under these, or have lived beside this host's, so nothing was moved."""
    beside: tuple[str, ...] = ()
    """Those of them that are known to live, or to have lived beside this host's: their status outlived its lease."""
    refused: str = ""
    """etcd's reason why this host may not do it; empty: it may."""


def removal(keys: Keys, former: FormerName) -> list[Op]:
    """The writes by which nothing is left under a former name."""
    return [Delete(root, prefix_end(root)) for root in (keys.by(former.name), keys.status_by(former.name))]


def move(
    keys: Keys,
    former: FormerName,
    to: str,
    *,
    long: int,
    short: int,
    claims: Leases,
    status: bytes,
    label: str | None = None,
) -> list[Op]:
    """The writes by which what stands under a former name is under the name `to`, which has no record, with `status`
    beside it; `long`, `short` and `claims` are the leases there. `label` is the former name's, which the record states
    as the host's own default location, so that the host does not move.

    Claims that the record does not state are not moved: a host has one address of each family. What was under the short
    lease is not moved either: a candidacy is to be decided anew."""
    record = former.record
    assert record is not None
    stated = tuple(interface.ip for interface in record.mesh_addresses)
    location = record.location if label is None else label
    names = tuple(name for name in dict.fromkeys((former.name, *record.former_names)) if name != to)
    claimed = [key.address for kv in former.addresses if isinstance(key := keys.parse(kv.key), AddressKey)]
    locations = [key.location for kv in former.leaders if isinstance(key := keys.parse(kv.key), LeaderKey)]
    return [
        *removal(keys, former),
        Put(keys.node(to), encode(evolve(record, location=location, former_names=names, duplicate_of=())), lease=long),
        Put(keys.status(to), status, lease=short),
        Put(keys.reservation(to), b"", lease=claims.reservation),
        *(Put(keys.address(to, address), b"", lease=claims.claims) for address in claimed if address in stated),
        *(Put(keys.leader(location, to), b"", lease=long) for location in locations),
    ]
