"""What a host checks of itself before it reports another: one that cannot check itself reports none."""

from __future__ import annotations

from collections.abc import Callable, Collection

from kilo_etcd import kernel
from kilo_etcd.agent.probing.taken_routes import taken_route
from kilo_etcd.model import IPAddress
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.topology.segments import Topology


class SelfCheck:
    """Of node `name`. `programmed` gives the plan that the kernel was asked for, `topology` the one in force,
    `missing_addresses` sentences on internal IPs that the host does not have."""

    def __init__(
        self,
        device: kernel.Kernel,
        name: str,
        *,
        programmed: Callable[[], HostPlan | None],
        topology: Callable[[], Topology | None],
        missing_addresses: Callable[[], tuple[str, ...]],
    ) -> None:
        self._kernel, self._name, self._programmed = device, name, programmed
        self._topology, self._missing_addresses = topology, missing_addresses

    async def sound(self, targets: Collection[IPAddress]) -> bool:
        """Whether the kernel is as the plan in force wants it, read anew, and sends to these mesh addresses by the
        plan's routes. If a rule of another program leads elsewhere, their silence says nothing of a leader. Nor if
        answers go to an internal IP that the host does not have."""
        plan = self._programmed()
        if self._missing_addresses():
            return False
        try:
            if plan is None or await self._kernel.preview(plan):
                return False
            observed = await self._kernel.observe()
            routes = await self._kernel.routes_taken(dict.fromkeys(targets))
            return not any(taken_route(address, None, answer, observed).foreign for address, answer in routes.items())
        except (OSError, kernel.KernelError):
            return False  # A host that cannot check itself reports no other.

    async def forwards(self) -> bool:
        """Whether nothing is known on this host that drops all that it would forward in the family that probers try."""
        topology = self._topology()
        own = topology.snapshot.nodes.get(self._name) if topology is not None else None
        tried = {address.version for address in own.mesh_addresses[:1]} if own is not None else set()
        try:
            return not any(obstacle.certain and tried & obstacle.blocked for obstacle in await self._kernel.obstacles())
        except (OSError, kernel.KernelError):
            return True
