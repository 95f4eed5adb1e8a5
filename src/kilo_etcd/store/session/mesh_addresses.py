"""The mesh addresses of this host: claimed in its name under no lease, so that it has them again when it comes back."""

from __future__ import annotations

from ipaddress import ip_interface

import structlog

from kilo_etcd.etcd.api import Client, Get, RangeResult
from kilo_etcd.model import IPAddress, IPInterface, IPNetwork
from kilo_etcd.store import claims
from kilo_etcd.store.keys import Keys


class MeshAddresses:
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

    async def claim(self, subnets: tuple[IPNetwork, ...], *, renumber: bool = False, doubted: bool = False) -> bool:
        """Have an address in `subnets` for each family, claimed now if there is none. `renumber` chooses anew;
        `doubted`: another claim may be older. Whether others than before were claimed; the first claims are none such.
        NoAddressLeft, EtcdError."""
        self._subnets = subnets
        before = self.addresses
        held = () if renumber else before
        self.addresses = await claims.claim_addresses(
            self._client, self._keys, self._name, subnets, held=held, renumber=renumber, doubted=doubted
        )
        if not before or before == self.addresses:
            return False
        now, then = (",".join(map(str, addresses)) for addresses in (self.addresses, before))
        self._log.error("mesh address lost to an older claim; another one was claimed", lost=then, address=now)
        return True

    async def stand(self) -> bool:
        """Whether etcd has each of the claims now, by a linearizable read. EtcdError."""
        keys = [self._keys.address(self._name, address) for address in self.addresses]
        answer = await self._client.txn([], [Get(key) for key in keys])
        return all(isinstance(response, RangeResult) and response.kvs for response in answer.responses)

    async def claim_again(self) -> None:
        """Restore the claims, if there are any. NoAddressLeft, EtcdError."""
        if self._subnets:
            await self.claim(self._subnets)

    def drop(self) -> None:
        """Want no address any more."""
        self._subnets, self.addresses = (), ()
