"""What is claimed once, for good: the mesh's settings by the first agent, and each node's mesh addresses.

Both by create-only transactions, so that of any number of hosts that try at once exactly one wins, and the others
see what it wrote. A node's search starts at a hash of its name and probes onward: hosts that come at once
rarely meet, and the same host comes back to the same place.

A claim is never overwritten. One that somebody else overwrote, deleted, or made anew is restored by the node whose
record stated the address before (`store.addresses` says who that is): deleted, if it stands there, and made anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from hashlib import sha256
from ipaddress import IPv4Network, ip_address

from kilo_etcd.etcd.api import Client, Delete, Get, KeyValue, Put, RangeResult, TxnResult, absent, unchanged
from kilo_etcd.model import ACCEPTING, Granularity, InternalIPs, IPAddress, IPInterface, IPNetwork, MeshSettings
from kilo_etcd.store.history import last_good
from kilo_etcd.store.keys import AddressKey, Keys, NodeKey
from kilo_etcd.store.records import (
    RecordError,
    decode_claim,
    decode_granularity,
    decode_internal_ips,
    decode_node,
    decode_subnets,
    encode_subnets,
)

ATTEMPTS = 5
"""How often a claim is restored that others write at the same moment."""


class NoAddressLeft(Exception):
    """Every address of the mesh's subnet is claimed; the message says so to the operator."""


async def ensure_mesh(client: Client, keys: Keys, settings: MeshSettings, *, restores: bool = False) -> MeshSettings:
    """Put the mesh's settings where there are none, and return those in force. RecordError where etcd holds nonsense
    and its history does not say what was in force before; EtcdError.

    `restores`: the settings are those that were in force. Else they are an agent's flags, and where nodes encrypt
    already and `internal-ips` is missing, `encrypted` is put there whatever the flag says.
    """
    granularity, subnets, internal_ips = settings
    wanted = {
        keys.granularity: granularity.value.encode(),
        keys.subnets: encode_subnets(subnets),
        keys.internal_ips: internal_ips.value.encode(),
    }
    kvs: dict[str, KeyValue] = {}
    for key, value in wanted.items():
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
        known = await last_good(client, kv, decode_subnets)
        if known is None:
            raise RecordError(_unreadable(keys.subnets, kv))
        subnets = known
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
) -> tuple[IPAddress, ...]:
    """One address per family of `subnets`, IPv4 first: the node's own, else newly claimed. NoAddressLeft, EtcdError.

    Its own is what it holds, else what its record states, else what it claimed first. With `renumber` its claims
    outside `subnets` are given up.
    """
    listing = await client.get_prefix(keys.addresses_root)
    taken: dict[IPAddress, KeyValue] = {}
    for kv in listing.kvs:
        parsed = keys.parse(kv.key)
        if isinstance(parsed, AddressKey):
            taken[parsed.address] = kv
    record = await client.get(keys.node(node))
    known = (*held, *(interface.ip for interface in _stated(record)))
    name = node.encode()
    claimed = []
    for version in (4, 6):
        family = [subnet for subnet in subnets if subnet.version == version]
        if not family:
            continue
        own = sorted(
            (address for address, kv in taken.items() if kv.value.strip() == name),
            key=lambda address: (taken[address].create_revision, int(address)),
        )
        for mine in dict.fromkeys((*known, *own)):
            if any(mine in subnet for subnet in family) and await _restore(client, keys, node, mine, taken.get(mine)):
                claimed.append(mine)
                break
        else:
            claimed.append(await _claim(client, keys, node, family, set(taken)))
    if renumber:
        for address, kv in taken.items():
            if kv.value.strip() == name and not any(address in subnet for subnet in subnets):
                await client.txn([unchanged(kv)], [Delete(kv.key)])
    return tuple(claimed)


def _stated(record: KeyValue | None) -> tuple[IPInterface, ...]:
    """The mesh addresses that a node's record states."""
    try:
        return () if record is None else decode_node(record.value).mesh_addresses
    except RecordError:
        return ()


async def _restore(client: Client, keys: Keys, node: str, address: IPAddress, kv: KeyValue | None) -> bool:
    """See to it that the claim of `address`, where `kv` stands, is the node's, as it was first written. False: it is
    another's."""
    key = keys.address(address)
    for _ in range(ATTEMPTS):
        if kv is None:
            result = await client.txn([absent(key)], [Put(key, node)], [Get(key)])
            if result.succeeded:
                return True
            kv = _found(result)
            continue
        if kv.value.strip() == node.encode() and kv.create_revision == kv.mod_revision:
            return True
        if not await _may_take(client, keys, node, address, kv):
            return False
        result = await client.txn([unchanged(kv)], [Delete(key)], [Get(key)])
        kv = None if result.succeeded else _found(result)
    return False


async def _may_take(client: Client, keys: Keys, node: str, address: IPAddress, kv: KeyValue) -> bool:
    """Whether the claim `kv` of `address`, which is not as this node wrote it, is this node's to restore."""
    if kv.create_revision != kv.mod_revision:
        return True
    try:
        claimant = decode_claim(kv.value)
    except RecordError:
        return True  # To everybody it is no claim, so that the address is whose record states it.
    own = await client.get(keys.node(node))
    if (
        own is None
        or address not in (interface.ip for interface in _stated(own))
        or own.mod_revision > kv.create_revision
    ):
        return False
    other = await client.get(keys.node(claimant))
    return address not in (interface.ip for interface in _stated(other)) or (
        other is not None and own.mod_revision < other.mod_revision
    )


def _found(result: TxnResult) -> KeyValue | None:
    answer = result.responses[0]
    assert isinstance(answer, RangeResult)
    return answer.kvs[0] if answer.kvs else None


async def _claim(client: Client, keys: Keys, node: str, subnets: list[IPNetwork], taken: set[IPAddress]) -> IPAddress:
    for subnet in subnets:
        for address in candidates(node, subnet, taken):
            key = keys.address(address)
            result = await client.txn([absent(key)], [Put(key, node)], [Get(key)])
            if result.succeeded:
                return address
            # An earlier attempt of ours may have gone through although its answer was lost.
            held = _found(result)
            if held is not None and held.value.strip() == node.encode():
                return address
            taken.add(address)
    raise NoAddressLeft(
        f"no address is left for {node} in {', '.join(map(str, subnets))}: all are claimed under "
        f"{keys.addresses_root}; delete the keys of nodes that are gone for good"
    )


def candidates(node: str, subnet: IPNetwork, taken: Set[IPAddress]) -> Iterator[IPAddress]:
    """The free host addresses of `subnet`, each once, in the order in which `node` tries them. Never the network's own
    address, nor IPv4's broadcast address or IPv6's anycast address of the subnet's routers."""
    first, count = int(subnet.network_address), subnet.num_addresses
    if count > 2:
        first, count = first + 1, count - (2 if isinstance(subnet, IPv4Network) else 1)
    start = int.from_bytes(sha256(node.encode()).digest()) % count
    for step in range(count):
        address = ip_address((first + (start + step) % count).to_bytes(subnet.max_prefixlen // 8))
        if address not in taken:
            yield address
