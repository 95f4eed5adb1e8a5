"""What is claimed once and for ever: the mesh's settings by the first agent, and each node's mesh addresses.

Both by create-only transactions, so that of any number of hosts that try at once exactly one wins, and the others
see what it wrote. A node's search starts at a hash of its name and probes onward: hosts that come at once
rarely meet, and the same host comes back to the same place.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from hashlib import sha256
from ipaddress import IPv4Network, ip_address

from kilo_etcd.etcd.api import Client, Get, KeyValue, Put, RangeResult, absent
from kilo_etcd.model import Granularity, IPAddress, IPNetwork
from kilo_etcd.store.history import last_good
from kilo_etcd.store.keys import AddressKey, Keys
from kilo_etcd.store.records import (
    RecordError,
    decode_granularity,
    decode_subnets,
    decode_text,
    encode_subnets,
)


class NoAddressLeft(Exception):
    """Every address of the mesh's subnet is claimed; the message says so to the operator."""


async def ensure_mesh(
    client: Client, keys: Keys, granularity: Granularity, subnets: tuple[IPNetwork, ...]
) -> tuple[Granularity, tuple[IPNetwork, ...]]:
    """Put the mesh's settings where there are none, and return those in force. RecordError where etcd holds nonsense
    and its history does not say what was in force before; EtcdError."""
    wanted = {keys.granularity: granularity.value.encode(), keys.subnets: encode_subnets(subnets)}
    found: dict[str, KeyValue] = {}
    for key, value in wanted.items():
        held = await client.get(key)
        if held is None:
            result = await client.txn([absent(key)], [Put(key, value)], [Get(key)])
            if result.succeeded:
                continue
            answer = result.responses[0]
            assert isinstance(answer, RangeResult)
            held = answer.kvs[0] if answer.kvs else None
        if held is not None:
            found[key] = held
    if (kv := found.get(keys.granularity)) is not None:
        # Nonsense in the granularity is survivable: a mesh exists in any; which one matters less than that all agree.
        granularity = await last_good(client, kv, decode_granularity) or Granularity.LOCATION
    if (kv := found.get(keys.subnets)) is not None:
        known = await last_good(client, kv, decode_subnets)
        if known is None:
            raise RecordError(_unreadable(keys.subnets, kv))
        subnets = known
    return granularity, subnets


def _unreadable(key: str, kv: KeyValue) -> str:
    try:
        decode_subnets(kv.value)
    except RecordError as error:
        return f"{key}: {error}; put it right with `etcdctl put {key} 10.4.0.0/16`, or what the mesh's subnets are"
    return key


async def claim_addresses(
    client: Client, keys: Keys, node: str, subnets: tuple[IPNetwork, ...]
) -> tuple[IPAddress, ...]:
    """One address per family of `subnets`, IPv4 first: the node's own from before, else newly claimed. NoAddressLeft,
    EtcdError."""
    listing = await client.get_prefix(keys.addresses_root)
    taken: dict[IPAddress, str] = {}
    for kv in listing.kvs:
        parsed = keys.parse(kv.key)
        if isinstance(parsed, AddressKey):
            try:
                taken[parsed.address] = decode_text(kv.value)
            except RecordError:
                taken[parsed.address] = ""
    claimed = []
    for version in (4, 6):
        family = [subnet for subnet in subnets if subnet.version == version]
        if not family:
            continue
        own = [a for a, owner in taken.items() if owner == node and any(a in subnet for subnet in family)]
        # The lowest, as everybody else counts it too (`effective.lowest_per_family`).
        claimed.append(min(own, key=int) if own else await _claim(client, keys, node, family, taken))
    return tuple(claimed)


async def _claim(
    client: Client, keys: Keys, node: str, subnets: list[IPNetwork], taken: dict[IPAddress, str]
) -> IPAddress:
    for subnet in subnets:
        for address in candidates(node, subnet, taken.keys()):
            key = keys.address(address)
            result = await client.txn([absent(key)], [Put(key, node)], [Get(key)])
            if result.succeeded:
                return address
            answer = result.responses[0]
            assert isinstance(answer, RangeResult)
            # An earlier attempt of ours may have gone through although its answer was lost.
            if answer.kvs and answer.kvs[0].value == node.encode():
                return address
            taken[address] = ""
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
