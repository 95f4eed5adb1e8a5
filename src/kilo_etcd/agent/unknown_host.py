"""A host whose agent runs and that is not among the mesh's nodes: why, and what it does meanwhile."""

from __future__ import annotations

from collections.abc import Collection

from kilo_etcd import kernel
from kilo_etcd.agent.apply import PlanApplier
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.namesakes import Namesakes
from kilo_etcd.agent.registration import HostRegistration
from kilo_etcd.etcd import api as etcd
from kilo_etcd.model import IPNetwork, Snapshot
from kilo_etcd.model.hostplan import HostPlan, RoutePlan, Via
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.session.session import Session


class UnknownHost:
    """This host, if a snapshot does not have it."""

    def __init__(
        self,
        config: AgentConfig,
        client: etcd.Client,
        keys: Keys,
        public_key: str,
        *,
        mirror: Mirror,
        session: Session,
        registration: HostRegistration,
        namesakes: Namesakes,
        applier: PlanApplier,
    ) -> None:
        self._config, self._client, self._keys, self._name = config, client, keys, config.hostname
        self._public_key, self._mirror, self._session = public_key, mirror, session
        self._registration, self._namesakes, self._applier = registration, namesakes, applier

    def is_outdated(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot is older than the registration, so that the one that has it is on its way."""
        record = self._mirror.kv(self._keys.node(self._name))
        return record is None or record.mod_revision > snapshot.revision

    async def explain(self, snapshot: Snapshot) -> str:
        """Why the host is unknown, as a sentence. Next to an agent with its key it exchanges no packets with the mesh
        from here on."""
        twin = await self._living_twin(snapshot)
        silenced = await self._silence(twin) if twin else ""
        key = self._keys.node(self._name)
        claims = {self._keys.address(self._name, address) for address in self._session.addresses}
        why = why_unknown(
            snapshot, self._name, self._registration.subnets, own_keys={key, *claims}, renumber=self._config.renumber
        )
        return why + self._namesakes.refusal + silenced

    async def _living_twin(self, snapshot: Snapshot) -> str | None:
        """The node that has this host's key and is in the mesh, if its agent runs; None also if etcd does not say."""
        names = (node.name for node in snapshot.nodes.values() if node.public_key == self._public_key)
        if (name := next(names, None)) is None:
            return None
        try:
            status = await self._client.get(self._keys.status(name))
        except etcd.EtcdError:
            return None
        return name if status is not None and status.lease else None

    async def _silence(self, twin: str) -> str:
        """Exchange no packets with the mesh, whose WireGuard would take this host for `twin`, and send here what is for
        that. Returns what to say of it."""
        # A tunnel without peers drops what its routes lead there. By them an agent that starts here with another key
        # knows that the device is its own.
        subnets = self._registration.subnets
        routes = {subnet: RoutePlan(destination=subnet, via=Via.TUNNEL) for subnet in subnets}
        silent = HostPlan(
            node=self._name, listen_port=self._config.port, routes=routes, unreachable_routes=subnets
        )  # fmt: skip
        try:
            await self._applier.silence(silent)
        except kernel.KernelError as error:
            return f"; the kernel still holds its peers: {error}"
        return f"; the agent of {twin} runs, so this host exchanges no packets with the mesh"


def why_unknown(
    snapshot: Snapshot, name: str, subnets: tuple[IPNetwork, ...], *, own_keys: Collection[str], renumber: bool
) -> str:
    """Why node `name`, whose addresses are of `subnets` and that has these keys, is not in the snapshot."""
    if set(snapshot.subnets) != set(subnets):
        now, own = (",".join(map(str, networks)) for networks in (snapshot.subnets, subnets))
        return (
            f"this host is not among the mesh's nodes: its address is in {own}, and most nodes' are in {now} now; "
            "to have it renumbered, start its agent once with --renumber"
            if not renumber
            else f"this host is not among the mesh's nodes: it was renumbered into {own}, and most nodes' "
            f"addresses are in {now} still; start their agents once with --renumber too"
        )
    reasons = "; ".join(note.reason for note in snapshot.rejected if note.key in own_keys)
    return f"this host is not among the mesh's nodes: {reasons or f'see the rejected records of {name}'}"
