"""The mesh addresses of this host: claimed in its name under no lease, so that it has them again when it comes back.
The claims of an ephemeral host are under its lease, and go with it.

Nothing here waits. A search that found no free address is remembered, with what was unused, and none like it is begun
before its time: each reads all claims of the mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_interface

import structlog
import trio
from attrs import frozen

from kilo_etcd.etcd.api import Client, Compare, Get, RangeResult
from kilo_etcd.model import IPAddress, IPInterface, IPNetwork
from kilo_etcd.store import claims
from kilo_etcd.store.keys import Keys

FULL_FIRST, FULL_MOST = 60.0, 900.0
"""Seconds after which a host that found no address looks again; each time twice as long, up to the second one."""


@frozen
class _LastSearch:
    """The last search that found no address: what it looked for, how it ended, and until when none like it is begun, on
    trio's clock."""

    subnets: tuple[IPNetwork, ...]
    doubted: bool
    end: claims.TakeLater | claims.NoAddressLeft
    until: float


class MeshAddresses:
    """Of node `name`, whose short lease lasts `lease_ttl` seconds."""

    def __init__(self, client: Client, keys: Keys, name: str, lease_ttl: int) -> None:
        self._client = client
        self._keys = keys
        self._name = name
        self._wait = claims.pause(lease_ttl)
        self._log = structlog.get_logger().bind(node=name)
        self._subnets: tuple[IPNetwork, ...] = ()
        self.addresses: tuple[IPAddress, ...] = ()
        """The mesh addresses that this host has claimed."""
        self._lost: tuple[IPAddress, ...] = ()
        """Those that it has lost to others, as far as nobody has asked for them yet."""
        self.lease = 0
        """What their reservation is under."""
        self._unused: claims.Unused | None = None
        """What a search saw, see `claims.LONGEST_PAUSES`."""
        self._last: _LastSearch | None = None
        self._full: tuple[IPNetwork, ...] = ()
        """The subnets in which no address was left."""
        self._pause = FULL_FIRST
        self._generation = 0
        """Of the etcd in which addresses were looked for."""
        self.drops = 0
        """How often this host has left the mesh."""

    @property
    def stated(self) -> tuple[IPInterface, ...]:
        """The claimed addresses, as the host's record states them."""
        return tuple(
            ip_interface(f"{address}/{subnet.prefixlen}")
            for address in self.addresses
            for subnet in self._subnets
            if address in subnet
        )

    async def claim(
        self,
        subnets: tuple[IPNetwork, ...],
        leases: claims.Leases,
        name: Sequence[Compare],
        *,
        former: tuple[IPAddress, ...] = (),
        renumber: bool = False,
        doubted: bool = False,
    ) -> bool:
        """Have an address in `subnets` for each family, claimed now if there is none, on the conditions `name`.
        `former`: what an earlier run had; `renumber` chooses anew; `doubted`: another claim may be older. Whether
        others than before were claimed; the first claims are none such. TakeLater, NoAddressLeft, NameChanged,
        EtcdError."""
        before = self.addresses
        held = () if renumber else before
        try:
            self.addresses = await claims.claim_addresses(
                self._client,
                self._keys,
                self._name,
                subnets,
                leases=leases,
                name=name,
                held=held,
                former=() if renumber else former,
                renumber=renumber,
                doubted=doubted,
                unused=self._unused,
                pause=self._wait,
            )
        except claims.TakeLater as end:
            if end.unused != self._unused:
                self._log.info("no mesh address is free; an unused one is taken if its former owner stays away",
                               seconds=self._wait)  # fmt: skip
            self._unused = end.unused
            self._last = _LastSearch(subnets, doubted, end, end.unused.due)
            raise
        except claims.NoAddressLeft as end:
            if self._full != subnets:
                self._full, self._pause = subnets, FULL_FIRST
            self._last = _LastSearch(subnets, doubted, end, trio.current_time() + self._pause)
            self._pause = min(2 * self._pause, FULL_MOST)
            raise
        self._last, self._full, self._pause = None, (), FULL_FIRST
        self._subnets = subnets
        self.lease = leases.reservation
        if not before or before == self.addresses:
            return False
        self._lost += tuple(address for address in before if address not in self.addresses)
        now, then = (",".join(map(str, addresses)) for addresses in (self.addresses, before))
        self._log.error("mesh address lost to an older claim; another one was claimed", lost=then, address=now)
        return True

    def take_lost(self) -> tuple[IPAddress, ...]:
        """Those that were lost to others since this was last asked."""
        lost, self._lost = self._lost, ()
        return lost

    def check(self, subnets: tuple[IPNetwork, ...], doubted: bool, generation: int) -> None:
        """TakeLater, NoAddressLeft: as the last search ended, if it is too early for another one of the kind in the
        etcd of this `generation`."""
        if self._generation != generation:
            self.look_anew(generation)
        last = self._last
        if last is not None and (last.subnets, last.doubted) == (subnets, doubted) and trio.current_time() < last.until:
            raise last.end.with_traceback(None)

    def look_anew(self, generation: int) -> None:
        """Etcd is another one: what was seen does not count, and no search is too early."""
        self._generation = generation
        self._unused = self._last = None
        self._full, self._pause = (), FULL_FIRST

    async def stand(self) -> bool:
        """Whether etcd has each of the claims now, and their reservation under a lease, by a linearizable read.
        EtcdError."""
        keys = [self._keys.reservation(self._name), *(self._keys.address(self._name, each) for each in self.addresses)]
        answer = await self._client.txn([], [Get(key) for key in keys])
        kvs = [each.kvs for each in answer.responses if isinstance(each, RangeResult)]
        return all(kvs) and bool(kvs[0][0].lease)

    @property
    def subnets(self) -> tuple[IPNetwork, ...]:
        """Those that the addresses were claimed in; empty: none were."""
        return self._subnets

    def drop(self) -> None:
        """Want no address any more."""
        self._subnets, self.addresses = (), ()
        self.drops += 1
