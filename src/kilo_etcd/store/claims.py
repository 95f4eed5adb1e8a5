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
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from ipaddress import IPv4Network, ip_address

from kilo_etcd.etcd.api import Client, Get, KeyValue, Put, RangeResult, absent, prefix_end
from kilo_etcd.model import ACCEPTING, Granularity, InternalIPs, IPAddress, IPInterface, IPNetwork, MeshSettings
from kilo_etcd.store.addresses import AddressIndex, oldest
from kilo_etcd.store.history import last_good
from kilo_etcd.store.keys import AddressKey, Keys, NodeKey, PeerAddressKey
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


class NoAddressLeft(Exception):
    """Every address of the mesh's subnet is claimed; the message says so to the operator."""


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
    held: tuple[IPAddress, ...] = (),
    renumber: bool = False,
    doubted: bool = False,
) -> tuple[IPAddress, ...]:
    """One address per family of `subnets`, IPv4 first: the node's own, else newly claimed. NoAddressLeft, EtcdError.

    Its own is what it holds, else what its record states, else what it claimed first; one that another claimed before
    is given up. One that its claim and its record agree on was looked at before the record was written, and etcd is
    asked again only if it is `doubted`. With `renumber` its claims outside `subnets` are given up.
    """
    own, stated = await _own(client, keys, node)
    preferred = tuple(dict.fromkeys((*held, *stated, *sorted(own, key=lambda address: (own[address], int(address))))))
    search = _Search(client, keys, node, own)
    claimed = []
    for version in (4, 6):
        family = [subnet for subnet in subnets if subnet.version == version]
        if not family:
            continue
        within = [address for address in preferred if any(address in subnet for subnet in family)]
        if within and not doubted and within[0] in own and within[0] in stated:
            claimed.append(within[0])
        else:
            claimed.append(await search.find(within, family))
    if renumber:
        for address in [address for address in own if not any(address in subnet for subnet in subnets)]:
            await client.delete(keys.address(node, address))
    return tuple(claimed)


async def _own(client: Client, keys: Keys, node: str) -> tuple[dict[IPAddress, int], tuple[IPAddress, ...]]:
    """The addresses that a node claims, with the create revision of each claim, and those that its record states."""
    root = keys.addresses(node)
    answer = await client.txn([], [Get(root, prefix_end(root)), Get(keys.node(node))])
    claims, record = answer.responses
    assert isinstance(claims, RangeResult)
    assert isinstance(record, RangeResult)
    parsed = ((keys.parse(kv.key), kv.create_revision) for kv in claims.kvs)
    own = {key.address: created for key, created in parsed if isinstance(key, AddressKey)}
    return own, tuple(interface.ip for kv in record.kvs for interface in _stated(kv))


def _stated(record: KeyValue | None) -> tuple[IPInterface, ...]:
    """The mesh addresses that a node's record states."""
    try:
        return () if record is None else decode_node(record.value).mesh_addresses
    except RecordError:
        return ()


class _Search:
    """Of `node`, which claims the addresses `own`."""

    def __init__(self, client: Client, keys: Keys, node: str, own: dict[IPAddress, int]) -> None:
        self._client = client
        self._keys = keys
        self._node = node
        self._own = own
        self._index: AddressIndex | None = None
        """What was there before the first claim of this search."""
        self._registered: tuple[str, ...] = ()
        """The nodes that had a record then."""
        self._read = set[str]()
        """Those of them whose record was read."""
        self._since = AddressIndex()
        """The claims that were there after the last one."""

    async def find(self, preferred: Iterable[IPAddress], family: list[IPNetwork]) -> IPAddress:
        """The first of `preferred` that may be used, else another one of `family`, claimed. NoAddressLeft,
        EtcdError."""
        index = await self._look(family)
        me = ("node", self._node)
        for address in preferred:
            if index.holder(address) in (me, None):
                if await self._claim(address, index):
                    return address
            elif address in self._own:
                await self._give_up(address)
        for subnet in family:
            for address in candidates(self._node, subnet, self._free):
                if await self._claim(address, index):
                    return address
        raise NoAddressLeft(
            f"no address is left for {self._node} in {', '.join(map(str, family))}: all are claimed; forget the nodes "
            "that are gone for good (kgctl node list --claims, kgctl node forget --dead-for 24h)"
        )

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
        key = self._keys.address(self._node, address)
        if ("node", self._node) not in index.claims(address):
            # An earlier attempt may have gone through although its answer was lost.
            await self._client.txn([absent(key)], [Put(key, b"")])
            index = self._since = await look(self._client, self._keys)
        claims = index.claims(address)
        if claims and oldest(claims) == ("node", self._node):
            return True
        await self._give_up(address)
        return False

    async def _give_up(self, address: IPAddress) -> None:
        self._own.pop(address, None)
        await self._client.delete(self._keys.address(self._node, address))


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
                case PeerAddressKey(name, address):
                    index.claim(address, ("peer", name), kv.create_revision)
                case NodeKey(name):
                    registered.append(name)
    return index, tuple(registered)


def candidates(node: str, subnet: IPNetwork, free: Callable[[IPAddress], bool]) -> Iterator[IPAddress]:
    """The `free` host addresses of `subnet`, each once, in the order in which `node` tries them. Never the network's
    own address, nor IPv4's broadcast address or IPv6's anycast address of the subnet's routers."""
    first, count = int(subnet.network_address), subnet.num_addresses
    if count > 2:
        first, count = first + 1, count - (2 if isinstance(subnet, IPv4Network) else 1)
    start = int.from_bytes(sha256(node.encode()).digest()) % count
    for step in range(count):
        address = ip_address((first + (start + step) % count).to_bytes(subnet.max_prefixlen // 8))
        if free(address):
            yield address
