"""Gathers what this host alone knows, for its plan: its networks, members that do not answer, the switch to
`encrypted`."""

from __future__ import annotations

from collections.abc import Callable

from attrs import evolve

from kilo_etcd import kernel
from kilo_etcd.agent.encrypting import Encrypting
from kilo_etcd.agent.etcd_endpoints import EtcdEndpoints
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.probing.reachability import Reachability
from kilo_etcd.agent.registration import HostRegistration
from kilo_etcd.kernel.state import Observed
from kilo_etcd.planning.pipeline import EncryptionInputs, Surroundings
from kilo_etcd.planning.reach import Silent
from kilo_etcd.runtime.resolve import Resolver
from kilo_etcd.topology.segments import Topology


class PlanInputs:
    """Collects what node `name` knows for its plan. `reachability` None: nothing is probed. `etcd_away`: whether
    this host has not joined."""

    def __init__(
        self,
        name: str,
        device: kernel.Kernel,
        *,
        registration: HostRegistration,
        endpoints: EtcdEndpoints,
        resolver: Resolver,
        reachability: Reachability | None,
        encrypting: Encrypting,
        metrics: Metrics,
        etcd_away: Callable[[], bool],
    ) -> None:
        self._name, self._kernel, self._registration, self._endpoints = name, device, registration, endpoints
        self._resolver, self._reachability, self._encrypting = resolver, reachability, encrypting
        self._metrics, self._etcd_away = metrics, etcd_away

    async def surroundings(self, topology: Topology) -> Surroundings:
        """What this host knows, for its plan. UnknownNode: it is not in the mesh."""
        topology.segment_of(self._name)
        silent = await self._never_answered(topology)
        encryption = await self._encryption_inputs(topology, silent)
        networks = self._endpoints.networks()
        surroundings = self._registration.facts.surroundings(
            networks, self._resolver.table, self._resolver.failed, self._resolver.unresolved(self._endpoints.needed())
        )
        return evolve(surroundings, silent=silent, encryption=encryption)

    async def _never_answered(self, topology: Topology) -> tuple[Silent, ...]:
        """The members of the location that have never answered. UnknownNode."""
        reachability = self._reachability
        if reachability is None:
            return ()
        if not reachability.ready:
            try:
                reachability.start(await self._kernel.observe())
            except (OSError, kernel.KernelError):
                reachability.start(Observed())  # If that lasts, `apply` says so.
        silent = reachability.follow(topology)
        self._metrics.unreachable.set(len({member.target.node for member in silent if member.named}))
        return silent

    async def _encryption_inputs(self, topology: Topology, silent: tuple[Silent, ...]) -> EncryptionInputs | None:
        self._encrypting.withdraw()
        if not self._encrypting.concerns(topology):
            return None
        await self._encrypting.prepare(topology, etcd_away=self._etcd_away())
        self._resolver.networks(self._encrypting.etcd_urls, purpose="encryption")
        leader, facts = topology.segment_of(self._name).leader.name, self._registration.facts
        return self._encrypting.inputs(
            topology, sources=facts.sources(), addresses=facts.own_addresses(),
            table=self._resolver.table,
            silent=frozenset(
                member.target.address for member in silent if member.withheld and member.target.node == leader
            ),
        )  # fmt: skip
