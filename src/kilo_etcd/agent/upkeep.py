"""What has to be in etcd for as long as this host is a member, and is put back where somebody took it away: the claim
of its mesh address, and the mesh's settings.

The host's registration and candidacy are the session's to keep. Both tasks here sleep until a snapshot shows a lack.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from kilo_etcd import etcd, store
from kilo_etcd.agent.logs import Once, get_logger
from kilo_etcd.model import Granularity, IPNetwork, Snapshot
from kilo_etcd.store.keys import AddressKey

SETTINGS_SECONDS = 2.0
"""Within which the agents put lost settings of the mesh back, each at its own moment."""

REFUSALS = (store.NameTaken, store.NoAddressLeft, store.RecordError)
"""What etcd holds and the agent cannot get past without the operator."""


class Upkeep:
    """Of node `name`. `mirror` gives the mirror that is followed at present."""

    def __init__(
        self,
        session: store.Session,
        keys: store.Keys,
        name: str,
        once: Once,
        *,
        mirror: Callable[[], store.Mirror],
        rng: random.Random,
    ) -> None:
        self._session = session
        self._keys = keys
        self._name = name
        self._once = once
        self._mirror = mirror
        self._rng = rng
        self._snapshot: Snapshot | None = None
        self._granularity = Granularity.LOCATION
        self._subnets: tuple[IPNetwork, ...] = ()
        self._unclaimed = trio.Event()
        self._unsettled = trio.Event()

    def joined(self, granularity: Granularity, subnets: tuple[IPNetwork, ...]) -> None:
        """These were the mesh's settings when this host joined."""
        self._granularity, self._subnets = granularity, subnets

    def follow(self, snapshot: Snapshot) -> None:
        """Look at what a snapshot of etcd lacks."""
        self._snapshot = snapshot
        if self._lacks_claim(snapshot):
            self._unclaimed.set()
        if self._lacks_settings():
            self._unsettled.set()

    async def run(self) -> None:
        """Put back what lacks, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mind_claims)
            nursery.start_soon(self._mind_settings)

    async def _mind_claims(self) -> None:
        """Claim a mesh address anew where somebody has taken the claim away: without one the host is no member."""
        while True:
            await self._unclaimed.wait()
            self._unclaimed = trio.Event()
            try:
                addresses = await self._session.claim_addresses(self._subnets)
            except (etcd.EtcdError, *REFUSALS) as error:
                self._once.error("claim", "the host's mesh address is claimed no more, and cannot be",
                                 error=str(error))  # fmt: skip
            else:
                self._once.clear("claim", "the host has a mesh address again")
                get_logger(node=self._name).warning(
                    "the claim of the host's mesh address was gone; claimed again",
                    addresses=",".join(map(str, addresses)),
                )

    async def _mind_settings(self) -> None:
        """Put the mesh's settings back where etcd has none: it was empty when it was adopted, or somebody took them
        away. The next host to join would put its own there, which may be others than those in force."""
        while True:
            await self._unsettled.wait()
            # One is enough, and it need not be everybody at once.
            await trio.sleep(self._rng.uniform(0.0, SETTINGS_SECONDS))
            self._unsettled = trio.Event()
            snapshot = self._snapshot
            if snapshot is None or not self._lacks_settings():
                continue
            try:
                await self._mirror().vouch()
                if snapshot.subnets:
                    await self._session.ensure_mesh(snapshot.granularity, snapshot.subnets)
                else:
                    # Another etcd was adopted before anybody saw them in the first one.
                    await self._session.ensure_mesh(self._granularity, self._subnets)
            except (etcd.EtcdError, store.RecordError) as error:
                self._once.error("settings lost", "the mesh's settings are not in etcd, and cannot be put there",
                                 error=str(error))  # fmt: skip
            else:
                self._once.clear("settings lost", "the mesh's settings are in etcd again")

    def _lacks_settings(self) -> bool:
        return any(self._mirror().kv(key) is None for key in (self._keys.granularity, self._keys.subnets))

    def _lacks_claim(self, snapshot: Snapshot) -> bool:
        """Whether this host has no address in one of the mesh's subnets, neither in the snapshot nor on its way."""
        if set(snapshot.subnets) != set(self._subnets):
            # A host claims when it joins. The subnets of a running mesh are fixed: a slip of the operator's must not
            # renumber every host.
            return False
        versions = {subnet.version for subnet in snapshot.subnets}
        node = snapshot.nodes.get(self._name)
        have = {address.version for address in node.mesh_addresses} if node else set()
        if versions <= have:
            return False
        for kv in self._mirror().kvs(self._keys.addresses_root):
            if kv.value == self._name.encode() and isinstance(key := self._keys.parse(kv.key), AddressKey):
                have.update(subnet.version for subnet in snapshot.subnets if key.address in subnet)
        return not versions <= have
