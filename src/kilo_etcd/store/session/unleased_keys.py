"""What stands in this host's name under no lease: the claims of its mesh addresses, and where it is the leader on
record."""

from __future__ import annotations

from ipaddress import ip_interface

import structlog

from kilo_etcd.etcd.api import Client, Compare, CompareTarget, Delete, Is, Put, unchanged
from kilo_etcd.model import IPAddress, IPInterface, IPNetwork
from kilo_etcd.store import claims
from kilo_etcd.store.keys import Keys


class UnleasedKeys:
    """Of node `name`."""

    def __init__(self, client: Client, keys: Keys, name: str) -> None:
        self._client = client
        self._keys = keys
        self._name = name
        self._log = structlog.get_logger().bind(node=name)
        self._subnets: tuple[IPNetwork, ...] = ()
        self.addresses: tuple[IPAddress, ...] = ()
        """The mesh addresses that this host has claimed."""

    @property
    def stated(self) -> tuple[IPInterface, ...]:
        """The claimed addresses, as the host's record states them."""
        return tuple(
            ip_interface(f"{address}/{subnet.prefixlen}")
            for address in self.addresses
            for subnet in self._subnets
            if address in subnet
        )

    async def claim(self, subnets: tuple[IPNetwork, ...], *, renumber: bool = False) -> bool:
        """Have an address in `subnets` for each family, claimed now if there is none. `renumber` chooses anew.
        Whether others than before were claimed; the first claims are none such. NoAddressLeft, EtcdError."""
        self._subnets = subnets
        before = self.addresses
        held = () if renumber else before
        self.addresses = await claims.claim_addresses(
            self._client, self._keys, self._name, subnets, held=held, renumber=renumber
        )
        if not before or before == self.addresses:
            return False
        now, then = (",".join(map(str, addresses)) for addresses in (self.addresses, before))
        self._log.error("mesh address lost to another claim; another one was claimed", lost=then, address=now)
        return True

    async def claim_again(self) -> None:
        """Restore the claims, if there are any. NoAddressLeft, EtcdError."""
        if self._subnets:
            await self.claim(self._subnets)

    async def record_leader(self, location: str) -> None:
        """Leave the host's name at `/kilo/leaders/<location>`. EtcdError."""
        key = self._keys.leader(location)
        await self._client.txn(
            [Compare(key, CompareTarget.VALUE, Is.EQUAL, self._name.encode())], [], [Put(key, self._name)]
        )

    def drop(self) -> None:
        """Want no address any more."""
        self._subnets, self.addresses = (), ()

    async def delete(self) -> None:
        """Delete all that is this host's. EtcdError."""
        for root in (self._keys.leaders_root, self._keys.addresses_root):
            for kv in (await self._client.get_prefix(root)).kvs:
                if kv.value == self._name.encode():
                    await self._client.txn([unchanged(kv)], [Delete(kv.key)])
