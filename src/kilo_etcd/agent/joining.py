"""From the start of an agent to its registration: settings, mesh address, and the record that makes this host a node.

What etcd does not do is tried until it does. Meanwhile the host forwards by what it knows (`Joining._insist`), and only
says that it is no member (again). A host that could not do its part is never registered: others would send it packets.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from kilo_etcd import kernel
from kilo_etcd.agent.cachefile import CachedMesh, CachedSnapshot
from kilo_etcd.agent.config import AgentConfig, too_small_for
from kilo_etcd.agent.endings import Fatal
from kilo_etcd.agent.lifecycle import Lifecycle
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.namesakes import Namesakes
from kilo_etcd.agent.notify import notify
from kilo_etcd.agent.registration import HostRegistration
from kilo_etcd.agent.restore import REFUSALS
from kilo_etcd.agent.snapshot_cache import SnapshotCache
from kilo_etcd.etcd import api as etcd
from kilo_etcd.model import Granularity, InternalIPs, IPNetwork, MeshSettings
from kilo_etcd.planning.encryption import StageReport
from kilo_etcd.runtime.logs import Logger, Once
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import ClusterNotTrusted, Mirror
from kilo_etcd.store.records import NodeRecord, RecordError, decode_node
from kilo_etcd.store.session.session import Session

T = TypeVar("T")

ETCD_PATIENCE_SECONDS = 2.0
"""How long a starting agent waits for etcd before it goes by the cached snapshot."""

Failure = etcd.EtcdError | RecordError | None
"""Why etcd does not let this host join; None: it has not answered."""


def kind_of(failure: Failure) -> str:
    """The kind of trouble with etcd in a few words."""
    if isinstance(failure, RecordError):
        return "etcd holds what cannot be read"
    return (failure or etcd.Unavailable).kind


class Joining:
    """Registers this host, and has it forward until etcd lets it. `lifecycle` says how far the agent has come;
    `follow_etcd` starts what follows etcd, unless it runs, and `forward` what brings snapshots to the kernel, the
    cached one first, if there is one. `on_settings` is told the mesh's settings; `made_device` says whether the
    WireGuard device was made by this agent."""

    def __init__(
        self,
        config: AgentConfig,
        client: etcd.Client,
        device: kernel.Kernel,
        public_key: str,
        *,
        keys: Keys,
        session: Session,
        mirror: Mirror,
        cache: SnapshotCache,
        namesakes: Namesakes,
        registration: HostRegistration,
        once: Once,
        log: Callable[[], Logger],
        metrics: Metrics,
        rng: random.Random,
        lifecycle: Callable[[], Lifecycle],
        follow_etcd: Callable[[trio.Nursery], Awaitable[None]],
        forward: Callable[[trio.Nursery, CachedSnapshot | None], None],
        on_settings: Callable[[MeshSettings], None],
        made_device: Callable[[], bool],
    ) -> None:
        self._config, self._client, self._kernel, self._public_key = config, client, device, public_key
        self._keys, self._session, self._mirror, self._cache = keys, session, mirror, cache
        self._namesakes, self._registration = namesakes, registration
        self._once, self._log, self._metrics, self._rng = once, log, metrics, rng
        self._lifecycle, self._follow_etcd, self._forward = lifecycle, follow_etcd, forward
        self._on_settings, self._made_device = on_settings, made_device
        self.waiting: str | None = None
        """What this agent waits for before it can join, as a sentence."""
        self.failure: Failure = None
        """Why etcd did not let this host join the last time that it tried."""
        self._on_disk: CachedMesh | None = None
        """The cache's content, as long as it may still be of use."""

    async def join(self, nursery: trio.Nursery) -> None:
        """Have this host registered. Fatal."""
        await self._kernel.check()
        self._on_disk = await self._cache.read()
        patience = float("inf")
        former = () if self._on_disk is None else self._on_disk.own_addresses()
        if self._on_disk is not None:
            self._mirror.go_on_from(self._on_disk.last_seen())
            patience = trio.current_time() + ETCD_PATIENCE_SECONDS
        settings = await self._insist(nursery, self._settings_of_a_followed_etcd, patience=patience)
        subnets = settings.subnets
        self.use_subnets(subnets)
        self._on_settings(settings)
        renumber = self._config.renumber
        await self._follow_etcd(nursery)
        await self._insist(nursery, lambda: self._mirror.wait_first())
        moved = await self._insist(nursery, self._namesakes.take_over)
        addresses = await self._insist(
            nursery,
            lambda: self._session.claim_addresses(subnets, former=former, renumber=renumber, doubted=moved),
        )
        self._log().info(
            "address claimed", addresses=",".join(map(str, addresses)), granularity=str(settings.granularity)
        )
        # Where the last agent was with the switch to `encrypted`, the kernel still is, or is to be again.
        self._registration.report = await self._insist(nursery, self._reported)
        if self._registration.epoch is not None and (self._made_device() or not await self._has_device()):
            self._registration.epoch += 1
        # Not before: etcd may have kept us waiting, and the network may have come meanwhile.
        record = await self._registration.look()
        await self._insist(nursery, lambda: self._session.register(record))

    def joined(self) -> None:
        """This host has joined: the cache's content is of no use any more."""
        self._on_disk = None

    def use_subnets(self, subnets: tuple[IPNetwork, ...]) -> None:
        """The mesh's subnets are these. Fatal: they need a larger MTU than the operator has given."""
        if reason := too_small_for(self._config.mtu, subnets):
            raise Fatal(reason)
        self._registration.subnets = subnets

    def use_first_subnets(self, subnets: tuple[IPNetwork, ...]) -> None:
        """The same, if they are not known yet."""
        if not self._registration.subnets:
            self.use_subnets(subnets)

    async def _insist(
        self, nursery: trio.Nursery, call: Callable[[], Awaitable[T]], *, patience: float = float("-inf")
    ) -> T:
        """The result of an etcd call that is tried until etcd answers it and lets this host do it. If it does neither,
        the host forwards by what it knows; that etcd does not answer counts from `patience` on, on trio's clock.

        Fatal: there is nothing that it could go by, and waiting does not cure what etcd says; or the name or the mesh
        address of this host is another's.
        """
        delay = 0.2
        while True:
            failure: Failure = None
            try:
                with trio.move_on_at(patience if patience > trio.current_time() else float("inf")):
                    result = await call()
                    self._once.clear("etcd", "etcd is back")
                    self.waiting = self.failure = None
                    return result
            except (etcd.EtcdError, RecordError) as error:
                failure = error
            except REFUSALS as error:
                raise Fatal(str(error)) from error
            self.failure = failure
            self._note(failure)
            waits = isinstance(failure, etcd.Unavailable | ClusterNotTrusted | None)
            away = failure is None or type(failure) is etcd.Unavailable
            forwards = (away and trio.current_time() < patience) or await self._forward_unjoined(nursery, failure)
            if not forwards and not waits:
                raise Fatal(str(failure)) from failure
            self._metrics.error("etcd")
            await trio.sleep(delay * self._rng.uniform(0.5, 1.0))
            delay = min(delay * 1.6, 3.0)

    def _note(self, failure: Failure) -> None:
        if failure is None or isinstance(failure, ClusterNotTrusted):
            return  # The mirror logs it.
        self._once.error("etcd", kind_of(failure), error=str(failure))
        self.waiting = f"waiting for etcd: {kind_of(failure)}: {failure}"
        if not self._lifecycle().reconciles:
            notify(f"STATUS=waiting for etcd: {failure}")

    async def _forward_unjoined(self, nursery: trio.Nursery, failure: Failure) -> bool:
        """Forward although etcd does not let this host join (None: it has not answered in time): by what etcd holds,
        as soon as it can be read and has this host, and until then by the cached snapshot on disk. Nothing is written
        to etcd. Whether there is either."""
        if self._lifecycle().reconciles:
            return True
        cached = None
        # The address in an ephemeral host's snapshot may be another's by now.
        if (on_disk := self._on_disk) is not None and not self._config.ephemeral:
            self._on_disk = None
            mtu = self._config.mtu
            cached = await self._cache.remember(on_disk, fits=lambda snapshot: too_small_for(mtu, snapshot.subnets))
        if cached is None and (failure is None or type(failure) is etcd.Unavailable or not await self._is_on_record()):
            return False
        await self._follow_etcd(nursery)
        # What cannot be read of the host now keeps no cached snapshot from being in force.
        await self._registration.look_again(register=False)
        if cached is not None:
            snapshot = cached.snapshot
            self._log().warning(
                f"{kind_of(failure)}: the cached snapshot is in force",
                revision=snapshot.revision, age=self._cache.age(cached), nodes=len(snapshot.nodes),
            )  # fmt: skip
            self.use_subnets(snapshot.subnets)
        self._forward(nursery, cached)
        return True

    async def _settings_of_a_followed_etcd(self) -> MeshSettings:
        """The mesh's settings, once etcd is known to be the one that is followed. EtcdError."""
        if self._lifecycle().follows_etcd:
            await self._mirror.wait_newer(None)
            self._mirror.check()
        elif not await self._mirror.verify_cluster():
            self._mirror.check()
        return await self._settings()

    async def _settings(self) -> MeshSettings:
        config = self._config
        desired = MeshSettings(
            config.mesh_granularity or Granularity.LOCATION, config.subnets, config.internal_ips or InternalIPs.ROUTED
        )
        settings = await self._session.ensure_mesh(desired)
        if config.renumber:
            return settings
        return settings._replace(subnets=await self._session.subnets_in_force(settings.subnets))

    async def _own_record(self) -> NodeRecord | None:
        """This host's record in etcd; None: there is none with its key. EtcdError."""
        kv = await self._client.get(self._keys.node(self._config.hostname))
        try:
            record = None if kv is None else decode_node(kv.value)
        except RecordError:
            return None
        return record if record is not None and record.public_key == self._public_key else None

    async def _is_on_record(self) -> bool:
        """Whether etcd can be read, and has this host's record."""
        try:
            return await self._own_record() is not None
        except etcd.EtcdError:
            return False

    async def _reported(self) -> StageReport:
        """The stage of the switch to `encrypted` in this host's record in etcd, whose former names and epochs
        are taken in too."""
        record = await self._own_record()
        if record is None:
            return StageReport()
        registration = self._registration
        registration.epoch = record.handshake_epoch or 0
        registration.clock_epoch = max(record.clock_epoch or 0, registration.clock_epoch or 0) or None
        self._namesakes.recall(record.former_names)
        return StageReport(stage=record.encryption, accepts_since=record.accepts_since or 0)

    async def _has_device(self) -> bool:
        """Whether the host has its WireGuard device already, or that cannot be read."""
        try:
            observed = await self._kernel.observe()
        except (OSError, kernel.KernelError):
            return True
        # One that is not ours leaves this host without a device, and its agent without a start.
        return observed.link is not None
