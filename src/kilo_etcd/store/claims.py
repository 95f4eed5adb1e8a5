"""What is decided once, for good: the mesh's settings by the first agent, and each node's mesh addresses.

The settings are put by create-only transactions, so that of any number of hosts that try at once exactly one wins, and
the others see what it wrote.

A mesh address is claimed by a key below the host's own prefix, and the oldest claim of an address has it
(`store.addresses`). So a host puts its claim, reads what etcd holds after that, and uses the address only if its claim
is the oldest; else it deletes the claim and goes on to the next address. No claim that is older can come later, and of
hosts that try at once the one whose claim etcd took first sees nobody before it. A host that ends between claim and
look finds its claim when it comes back, and looks again; only an address that it may use gets into its record.

A node's search starts at a hash of its name and probes onward: hosts that come at once rarely meet, and the same host
comes back to the same place.

Beside its claims a node has a reservation, put with the first of them, under a lease that its agent keeps. As long as
that or the node's record stands the claims are kept for it. If no address is free, a search takes one whose claims are
kept for nobody. Its former owner puts its reservation first when it comes back, and then looks. Either the reservation
is older than the new claim, and the taker gives way, or it is younger, and the former owner does.

Nothing is taken if that may be a living host's. In an etcd that was restored from a backup, and that no agent follows
yet, all reservations end while the hosts go on. So an address is taken only if an agent follows this etcd whose record
is older than the claims (the youngest of several), if no agent lives under a claimant's name, and if all of that is
still so after `PAUSE`. No search waits for that: it ends (`TakeLater`), and the next one is told what was unused.

All writes are on the condition that the node's name is as it was when the caller looked: a second host of a living
host's name changes nothing of the first one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from ipaddress import IPv4Network, ip_address

import structlog
import trio
from attrs import frozen

from kilo_etcd.etcd.api import (
    Client,
    Compare,
    CompareTarget,
    Delete,
    Get,
    Is,
    KeyValue,
    Op,
    PermissionDenied,
    Put,
    RangeResult,
    absent,
    prefix_end,
    unchanged,
)
from kilo_etcd.model import ACCEPTING, Granularity, InternalIPs, IPAddress, IPInterface, IPNetwork, MeshSettings
from kilo_etcd.store.addresses import AddressIndex, Claimant, named
from kilo_etcd.store.history import last_good
from kilo_etcd.store.keys import AddressKey, Keys, NodeKey, PeerAddressKey, ReservationKey, StatusKey
from kilo_etcd.store.records import (
    RecordError,
    decode_granularity,
    decode_internal_ips,
    decode_node,
    decode_subnets,
    encode_subnets,
)

MOST_AT_ONCE = 100
"""Operations in one transaction: etcd takes 128 (--max-txn-ops)."""

PAUSE = 10
"""Seconds for which nobody must have come back to an unused address before it is taken. After an etcd was adopted all
agents register again within a few. See `pause`."""

LONGEST_PAUSES = 3
"""So many pauses after what was seen unused a search has to begin, or it counts no more: etcd was out of reach
meanwhile."""

RESERVATION_REFRESHES = 4
"""How often in `--forget-after` the lease of a reservation is refreshed. That is a call each time, and no stream of
keepalives: so etcd has one stream for each host, and not two."""

MOST_NAMED = 3
"""Nodes that one sentence names."""


@frozen(kw_only=True)
class Leases:
    """Under which leases a host's claims and its reservation are put; 0: under none."""

    claims: int = 0
    reservation: int


def reservation_ttl(forget_after: int) -> int:
    """Seconds that the lease of a reservation lasts: until `forget_after` after a record's has ended at least, which is
    kept alive more often."""
    return 2 * forget_after + forget_after // RESERVATION_REFRESHES


def pause(lease_ttl: int) -> int:
    """`PAUSE`, or more if short leases last longer: in an etcd that was restored from a backup, and that no agent
    follows, the statuses of the backup stand for as long."""
    return max(PAUSE, 2 * lease_ttl)


class NoAddressLeft(Exception):
    """Every address of the mesh's subnet is claimed; the message says so to the operator."""


@frozen
class Unused:
    """Addresses that were kept for nobody at `seen`, on trio's clock."""

    addresses: frozenset[IPAddress]
    seen: float
    pause: int

    @property
    def due(self) -> float:
        """When they may be taken, if nobody has come back to them."""
        return self.seen + self.pause


class TakeLater(Exception):
    """No address is free, and one of the `unused` may be taken when they are due."""

    def __init__(self, unused: Unused) -> None:
        super().__init__(
            "no mesh address is free; an unused one is taken if its former owner does not come back within "
            f"{unused.pause} s"
        )
        self.unused = unused


class NameChanged(Exception):
    """What stands at the node's name is not what the caller saw: look again."""


async def ensure_mesh(client: Client, keys: Keys, settings: MeshSettings, *, restores: bool = False) -> MeshSettings:
    """Put the mesh's settings where there are none, and return those in force. RecordError where etcd holds nonsense
    and its history does not say what was in force before; EtcdError.

    `restores`: the settings are those that were in force. Else they are an agent's flags, and where nodes encrypt
    already and `internal-ips` is missing, `encrypted` is put there whatever the flag says.
    """
    granularity, subnets, internal_ips = settings
    values = {
        keys.granularity: granularity.value.encode(),
        keys.subnets: encode_subnets(subnets),
        keys.internal_ips: internal_ips.value.encode(),
    }
    kvs: dict[str, KeyValue] = {}
    for key, value in values.items():
        held = await client.get(key)
        if held is None:
            if key == keys.internal_ips and not restores and await _encrypts(client, keys):
                internal_ips = InternalIPs.ENCRYPTED
                value = internal_ips.value.encode()
            result = await client.txn([absent(key)], [Put(key, value)], [Get(key)])
            if result.succeeded:
                continue
            answer = result.responses[0]
            assert isinstance(answer, RangeResult)
            held = answer.kvs[0] if answer.kvs else None
        if held is not None:
            kvs[key] = held
    if (kv := kvs.get(keys.granularity)) is not None:
        # Nonsense in the granularity is survivable: a mesh exists in any; which one matters less than that all agree.
        granularity = await last_good(client, kv, decode_granularity) or Granularity.LOCATION
    if (kv := kvs.get(keys.subnets)) is not None:
        last_subnets = await last_good(client, kv, decode_subnets)
        if last_subnets is None:
            raise RecordError(_unreadable(keys.subnets, kv))
        subnets = last_subnets
    if (kv := kvs.get(keys.internal_ips)) is not None:
        setting = await last_good(client, kv, decode_internal_ips)
        if setting is None:
            setting = InternalIPs.ENCRYPTED if await _encrypts(client, keys) else InternalIPs.OFF
        internal_ips = setting
    return MeshSettings(granularity, subnets, internal_ips)


async def _encrypts(client: Client, keys: Keys) -> bool:
    """Whether a node's record says that it takes part in `encrypted`."""
    return any(
        isinstance(keys.parse(kv.key), NodeKey) and _takes_part(kv)
        for kv in (await client.get_prefix(keys.by_root)).kvs
    )


def _takes_part(kv: KeyValue) -> bool:
    try:
        return decode_node(kv.value).encryption in ACCEPTING
    except RecordError:
        return False


def _unreadable(key: str, kv: KeyValue) -> str:
    try:
        decode_subnets(kv.value)
    except RecordError as error:
        return f"{key}: {error}; put it right with `etcdctl put {key} 10.4.0.0/16`, or what the mesh's subnets are"
    return key


async def subnets_in_force(
    client: Client, keys: Keys, node: str, configured: tuple[IPNetwork, ...]
) -> tuple[IPNetwork, ...]:
    """The mesh's subnets by which `node` finds its address, if `configured` is what is in etcd: see
    `AddressIndex.subnets`. The whole mesh is looked at only if the value was changed. EtcdError."""
    answer = await client.txn([], [Get(keys.subnets), Get(keys.node(node))])
    kvs = [
        response.kvs[0] if isinstance(response, RangeResult) and response.kvs else None for response in answer.responses
    ]
    changed = kvs[0] is None or kvs[0].create_revision != kvs[0].mod_revision
    if not changed and all(interface.network in configured for interface in _stated(kvs[1])):
        return configured
    from kilo_etcd.store import operator

    snapshot, _ = await operator.snapshot(client, keys)
    return snapshot.subnets or configured


async def claim_addresses(
    client: Client,
    keys: Keys,
    node: str,
    subnets: tuple[IPNetwork, ...],
    *,
    leases: Leases,
    name: Sequence[Compare] = (),
    held: tuple[IPAddress, ...] = (),
    former: tuple[IPAddress, ...] = (),
    renumber: bool = False,
    doubted: bool = False,
    unused: Unused | None = None,
    pause: int = PAUSE,
) -> tuple[IPAddress, ...]:
    """One address per family of `subnets`, IPv4 first: the node's own, else newly claimed. `name`: the conditions that
    the node's name is the caller's. `unused`: what the search before this one found, see `pause`. TakeLater,
    NoAddressLeft, NameChanged, EtcdError.

    Its own is what it holds, else what its record states, else what it claimed first, else a `former` one; one that
    another claimed before, or has taken since, is given up. One that its claim and its record agree on was looked at
    before the record was written, and etcd is asked again only if it is `doubted`, or was kept for nobody. Its other
    claims within `subnets` are given up, with `renumber` those outside too. All that stays is under `leases`.
    """
    it = await _own(client, keys, node)
    search = _Search(client, keys, node, it, leases, name, held, unused, pause)
    while not await search.keep():
        it = await _own(client, keys, node)
        search = _Search(client, keys, node, it, leases, name, held, unused, pause)
    doubted = doubted or it.reservation is None or not it.reservation.lease
    own, stated = search.own, it.stated
    claims = sorted(own, key=lambda address: (own[address], int(address)))
    preferred = tuple(dict.fromkeys((*held, *stated, *claims, *former)))
    claimed = []
    for version in (4, 6):
        family = [subnet for subnet in subnets if subnet.version == version]
        if not family:
            continue
        within = [address for address in preferred if _within(address, family)]
        if within and not doubted and within[0] in own and within[0] in stated:
            claimed.append(within[0])
        else:
            claimed.append(await search.find(within, family))
    for address in [address for address in own if address not in claimed]:
        if renumber or _within(address, subnets):
            await search.give_up(address)
    return tuple(claimed)


@frozen(kw_only=True)
class _Own:
    """What a node has: its claims, its reservation, and the addresses that its record states."""

    claims: Mapping[IPAddress, KeyValue]
    reservation: KeyValue | None
    stated: tuple[IPAddress, ...]


async def _own(client: Client, keys: Keys, node: str) -> _Own:
    root = keys.addresses(node)
    reads = [Get(root, prefix_end(root)), Get(keys.reservation(node)), Get(keys.node(node))]
    claims, reservation, record = (
        response.kvs for response in (await client.txn([], reads)).responses if isinstance(response, RangeResult)
    )
    parsed = ((keys.parse(kv.key), kv) for kv in claims)
    return _Own(
        claims={key.address: kv for key, kv in parsed if isinstance(key, AddressKey)},
        reservation=next(iter(reservation), None),
        stated=tuple(interface.ip for kv in record for interface in _stated(kv)),
    )


def _stated(record: KeyValue | None) -> tuple[IPInterface, ...]:
    """The mesh addresses that a node's record states."""
    try:
        return () if record is None else decode_node(record.value).mesh_addresses
    except RecordError:
        return ()


class _Search:
    """Of `node`, which has `own`, and has used the addresses `used` in this run; `name`, `unused` and `pause` as
    in `claim_addresses`."""

    def __init__(
        self,
        client: Client,
        keys: Keys,
        node: str,
        own: _Own,
        leases: Leases,
        name: Sequence[Compare],
        used: Sequence[IPAddress],
        unused: Unused | None,
        pause: int,
    ) -> None:
        self._client = client
        self._name = name
        self._used = used
        self._seen, self._pause = unused, pause
        self._keys = keys
        self._node = node
        self._leases = leases
        self._log = structlog.get_logger().bind(node=node)
        self._held = own
        self.own = {address: kv.create_revision for address, kv in own.claims.items()}
        """The addresses that the node claims, with the create revision of each claim."""
        lacks = own.reservation is None or own.reservation.lease != leases.reservation
        self._reservation = [Put(keys.reservation(node), b"", lease=leases.reservation)] if lacks else []
        """What is to be written of it."""
        self._index: AddressIndex | None = None
        """What was there before the first claim of this search."""
        self._registered: tuple[str, ...] = ()
        """The nodes that had a record then."""
        self._read = set[str]()
        """Those of them whose record was read."""
        self._since = AddressIndex()
        """The claims that were there after the last one."""
        self._began = trio.current_time()
        self._denied = False
        """Whether this host may not delete the claims of others."""

    async def keep(self) -> bool:
        """Have the claims that stand under the leases where they belong, and reserved; False: they are others by now.
        EtcdError."""
        kvs = self._held.claims.values()
        elsewhere = [kv for kv in kvs if kv.lease != self._leases.claims]
        if (reservation := self._held.reservation) is not None and not reservation.lease:
            # It must be as old as what it counts for: put over, it would keep the age of one that counted for nothing.
            await self._write([unchanged(reservation)], [Delete(reservation.key)])
        if not kvs or not (elsewhere or self._reservation):
            return True
        for first in range(0, max(len(elsewhere), 1), MOST_AT_ONCE):
            some = elsewhere[first : first + MOST_AT_ONCE]
            moved = [Put(kv.key, b"", lease=self._leases.claims) for kv in some]
            if not await self._put([unchanged(kv) for kv in some], moved):
                return False
        return True

    async def _put(self, conditions: Sequence[Compare], ops: Sequence[Op]) -> bool:
        """Write, with what is to be written of the reservation; whether the conditions held. NameChanged, EtcdError."""
        if not await self._write(conditions, [*ops, *self._reservation]):
            return False
        self._reservation = []
        return True

    async def _write(self, conditions: Sequence[Compare], ops: Sequence[Op]) -> bool:
        # One condition that cannot hold would do for etcd; the answer is to say which it was.
        result = await self._client.txn([*self._name, *conditions], ops, [Get(compare.key) for compare in self._name])
        if not result.succeeded and not all(map(_holds, self._name, result.responses)):
            raise NameChanged
        return result.succeeded

    async def find(self, preferred: Iterable[IPAddress], family: list[IPNetwork]) -> IPAddress:
        """The first of `preferred` that may be used, else another one of `family`, claimed. TakeLater, NoAddressLeft,
        EtcdError."""
        index = await self._look(family)
        lost = dict[IPAddress, Claimant]()
        address = await self._own_or_free(preferred, family, index, lost) or await self._take(family)
        # Not before: a search that ends until an unused address may be taken would log it twice.
        for before, holder in lost.items():
            self._log.warning("the mesh address of before is another's now; another one is chosen",
                              address=str(before), now_of=named(holder))  # fmt: skip
        if address is not None:
            return address
        whose = [_whose(before, holder, index) for before, holder in lost.items()]
        raise NoAddressLeft("; ".join((self._full(await self._look(family), family), *whose)))

    async def _own_or_free(
        self,
        preferred: Iterable[IPAddress],
        family: list[IPNetwork],
        index: AddressIndex,
        lost: dict[IPAddress, Claimant],
    ) -> IPAddress | None:
        """An address as `find` gives it, if nothing is to be taken for it. Those of `preferred` that are others' are
        put into `lost`."""
        me = ("node", self._node)
        for address in preferred:
            holder = index.holder(address)
            # After etcd was restored from a backup an old claim may stand in the place of this host's.
            if holder is None or holder == me or (address in self._used and not index.reservations.is_kept(holder)):
                if await self._claim(address, index):
                    return address
                continue
            lost[address] = holder
            if address in self.own:
                await self.give_up(address)
        for subnet in family:
            for address in candidates(self._node, subnet, self._free):
                if await self._claim(address, index):
                    return address
        return None

    def _full(self, index: AddressIndex, family: list[IPNetwork]) -> str:
        """That all addresses are claimed: by whom, and what to do."""
        in_use, unused = 0, list[str]()
        for address in index.all_claimed():
            holder = index.oldest(address)
            if not _within(address, family) or holder is None:
                continue
            if holder[0] == "peer" or index.reservations.has_record(holder[1]):
                in_use += 1
            else:
                unused.append(f"{address} of {holder[1]}")
        named_ones = [*unused[:MOST_NAMED], *([f"{len(unused) - MOST_NAMED} more"] if unused[MOST_NAMED:] else [])]
        lapsed = sum(_within(address, family) for address in index.lapsed())
        shown = f" ({', '.join(named_ones)})" if unused else ""
        sentences = [
            f"no address is left for {self._node} in {', '.join(map(str, family))}: {in_use} are those of hosts in the "
            f"mesh, {len(unused)} those of hosts that are gone{shown}",
            "forget those that are gone for good (kgctl node list --claims says since when they are; kgctl node forget "
            "NAME, or kgctl node forget --dead-for 24h)",
        ]
        if lapsed:
            untaken = "are kept for nobody, and not taken, since no agent follows this etcd that joined before"
            if self._denied and not index.reservations.all_reserved():
                untaken = (
                    "are kept for nobody, and not taken, since agents of an older version are in the mesh: upgrade them"
                )
            sentences.insert(1, f"{lapsed} of these {untaken}")
        return "; ".join(sentences)

    async def _take(self, family: list[IPNetwork]) -> IPAddress | None:
        """An address of `family` whose claims are kept for nobody, now and when they were seen before, as this node's
        own; None: there is none. Each node begins at another one, so that many that come at once rarely meet.
        TakeLater, NameChanged, EtcdError."""
        all_unused = await self._unused(family)
        if not any(_within(address, family) for address in all_unused):
            return None
        # A look at etcd may take longer than the pause.
        if self._seen is None or self._began > self._seen.seen + LONGEST_PAUSES * self._pause:
            raise TakeLater(Unused(frozenset(all_unused), trio.current_time(), self._pause))
        if self._began < self._seen.due:
            raise TakeLater(self._seen)
        unused = [address for address in all_unused if address in self._seen.addresses and _within(address, family)]
        index = latest = await self._look(family)
        first = _place(self._node, len(unused)) if unused else 0
        for address in (*unused[first:], *unused[:first]):
            former = sorted(name for _, name in index.claims(address))
            unchanged_since = latest.claims(address) == index.claims(address)
            if self._denied and not index.reservations.all_reserved():
                break
            if not unchanged_since or not await self._take_from(address, index):
                continue
            latest = await look(self._client, self._keys)
            if latest.oldest(address) == ("node", self._node):
                self._log.warning(
                    "no mesh address is free; the unused one of a node that is gone was taken",
                    address=str(address), former=", ".join(former),
                )  # fmt: skip
                return address
            await self.give_up(address)
        # Others were faster: what is said of a full space is to be as it is now.
        self._index, self._read = None, set()
        return None

    async def _unused(self, family: list[IPNetwork]) -> list[IPAddress]:
        """The addresses that may be taken, those of other families too, as etcd is now. EtcdError."""
        root = self._keys.status_by_root
        statuses = (await self._client.range(root, prefix_end(root), keys_only=True)).kvs
        parsed = ((self._keys.parse(kv.key), kv.lease) for kv in statuses)
        living = {key.node for key, lease in parsed if isinstance(key, StatusKey) and lease} - {self._node}
        index = await self._look(family)
        oldest = min((since for name in living if (since := index.reservations.since(name)) is not None), default=None)
        return [
            address
            for address in index.lapsed()
            if oldest is not None
            and oldest < max(index.claims(address).values())
            and not any(name in living or name == self._node for _, name in index.claims(address))
        ]

    async def _take_from(self, address: IPAddress, index: AddressIndex) -> bool:
        """Claim an address which others claim by `index`, and delete their claims if this host may; whether that was
        written. Whose claim comes first is to be seen after that. NameChanged, EtcdError."""
        claims = {name: created for (_, name), created in index.claims(address).items()}
        own = absent(self._keys.address(self._node, address))
        put = Put(self._keys.address(self._node, address), b"", lease=self._leases.claims)
        conditions = [own]
        for name, created in claims.items():
            conditions += [
                Compare(self._keys.address(name, address), CompareTarget.CREATE, Is.EQUAL, created),
                # So it is too if there is none.
                Compare(self._keys.reservation(name), CompareTarget.LEASE, Is.EQUAL, 0),
                absent(self._keys.node(name)),
            ]
        if len(conditions) > MOST_AT_ONCE:
            conditions = [own]
        elif not self._denied:
            try:
                deletes = [Delete(self._keys.address(name, address)) for name in claims]
                return await self._put(conditions, [*deletes, put])
            except PermissionDenied:
                self._denied = True
        # A host's own user may write its own keys only, and a reservation under no lease counts for nothing. The claims
        # of the others stay, and count no more, which agents that put no reservation do not know.
        return index.reservations.all_reserved() and await self._put(conditions, [put])

    async def _look(self, family: list[IPNetwork]) -> AddressIndex:
        """All claims, and what records state of nodes that have no address of `family` by a claim: there is one only if
        a claim was deleted, so these few are read one by one."""
        if self._index is None:
            self._index, self._registered = await _list(self._client, self._keys)
        silent = [name for name in self._registered if not self._index.of(name, tuple(family))]
        unread = [name for name in silent if name not in self._read]
        self._read.update(unread)
        for first in range(0, len(unread), MOST_AT_ONCE):
            some = unread[first : first + MOST_AT_ONCE]
            answer = await self._client.txn([], [Get(self._keys.node(name)) for name in some])
            for name, response in zip(some, answer.responses, strict=True):
                assert isinstance(response, RangeResult)
                for kv in response.kvs:
                    self._index.settle(self._index.state(name, _stated(kv)))
        return self._index

    def _free(self, address: IPAddress) -> bool:
        return (self._index is None or self._index.free(address)) and self._since.free(address)

    async def _claim(self, address: IPAddress, index: AddressIndex) -> bool:
        """Claim an address unless that is done; whether nobody claimed it before. Else the claim is deleted."""
        key, me = self._keys.address(self._node, address), ("node", self._node)
        new = me not in index.claims(address)
        if new:
            # An earlier attempt may have gone through although its answer was lost.
            await self._put([absent(key)], [Put(key, b"", lease=self._leases.claims)])
            index = self._since = await look(self._client, self._keys)
        first = not new or address in self._used or index.earliest(address) == me
        if first and index.oldest(address) == me:
            return True
        await self.give_up(address)
        return False

    async def give_up(self, address: IPAddress) -> None:
        """Delete a claim of the node. NameChanged, EtcdError."""
        self.own.pop(address, None)
        await self._write([], [Delete(self._keys.address(self._node, address))])


def _within(address: IPAddress, family: Iterable[IPNetwork]) -> bool:
    return any(address in subnet for subnet in family)


def _whose(address: IPAddress, holder: Claimant, index: AddressIndex) -> str:
    claimed = index.claims(address).get(holder)
    since = "by its record" if claimed is None else f"since etcd's revision {claimed}"
    return f"{address}, which it had, is that of {named(holder)} {since}"


def _holds(compare: Compare, response: object) -> bool:
    """Whether a condition on a whole key holds by what was read of it."""
    assert isinstance(response, RangeResult)
    if compare.target is CompareTarget.MOD:
        return bool(response.kvs) and response.kvs[0].mod_revision == compare.value
    return not response.kvs


async def look(client: Client, keys: Keys) -> AddressIndex:
    """All claims of mesh addresses that stand now, by linearizable reads. EtcdError."""
    return (await _list(client, keys))[0]


async def _list(client: Client, keys: Keys) -> tuple[AddressIndex, tuple[str, ...]]:
    """The same, and the nodes that have a record. Only keys are read: what claims an address is a key, and values are
    nearly all of what etcd holds."""
    index, registered = AddressIndex(), list[str]()
    for root in (keys.by_root, keys.peer_addresses_root):
        for kv in (await client.range(root, prefix_end(root), keys_only=True)).kvs:
            match keys.parse(kv.key):
                case AddressKey(name, address):
                    index.claim(address, ("node", name), kv.create_revision)
                case ReservationKey(name) if kv.lease:
                    index.reserve(name, kv.create_revision)
                case PeerAddressKey(name, address):
                    index.claim(address, ("peer", name), kv.create_revision)
                case NodeKey(name):
                    registered.append(name)
                    index.register(name, kv.create_revision)
    return index, tuple(registered)


def candidates(node: str, subnet: IPNetwork, free: Callable[[IPAddress], bool]) -> Iterator[IPAddress]:
    """The `free` host addresses of `subnet`, each once, in the order in which `node` tries them. Never the network's
    own address, nor IPv4's broadcast address or IPv6's anycast address of the subnet's routers."""
    first, count = int(subnet.network_address), subnet.num_addresses
    if count > 2:
        first, count = first + 1, count - (2 if isinstance(subnet, IPv4Network) else 1)
    start = _place(node, count)
    for step in range(count):
        address = ip_address((first + (start + step) % count).to_bytes(subnet.max_prefixlen // 8))
        if free(address):
            yield address


def _place(node: str, count: int) -> int:
    """Where in `count` places a node begins its search."""
    return int.from_bytes(sha256(node.encode()).digest()) % count
