"""This host's addresses and endpoints: looked up, registered if they differ, and looked up again.

What is found decides nothing here; the rules are `agent.discover`'s. What it finds is kept for whoever asks: the
facts, from which the surroundings of a plan follow, and addresses of the operator's in the mesh's way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import trio
from attrs import define, evolve, field

from kilo_etcd import __version__, kernel
from kilo_etcd.agent import discover
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.namesakes import FormerSettings
from kilo_etcd.agent.restore import REFUSALS
from kilo_etcd.base import descriptors
from kilo_etcd.etcd import api as etcd
from kilo_etcd.model import IPNetwork
from kilo_etcd.planning.encryption import StageReport
from kilo_etcd.runtime.host_facts import HostFacts, Reached
from kilo_etcd.runtime.logs import Logger, Once
from kilo_etcd.runtime.resolve import etcd_networks
from kilo_etcd.store.records import NodeRecord
from kilo_etcd.store.session.session import Session
from kilo_etcd.store.status_texts import ETCD_INSIDE

KEPT_SECONDS, MOST_KEPT_SECONDS = 60.0, 3600.0
"""Seconds for which a passing network still counts after it is gone: at first, and at most. They double each time that
it is withdrawn."""
_MOST_REMEMBERED = 256


@define
class PassingNetworks:
    """Networks that come and go by themselves, such as containers'. Times are seconds of one monotonic clock."""

    _seen: dict[IPNetwork, float] = field(factory=dict)
    """When each was last there."""
    _kept: dict[IPNetwork, float] = field(factory=dict)
    """For how long those count that were withdrawn before, the latest last."""

    def look(self, present: Iterable[IPNetwork], now: float) -> Collection[IPNetwork]:
        """Those that count: they are there, or have not been gone for long."""
        self._seen.update(dict.fromkeys(present, now))
        for network, seen in list(self._seen.items()):
            seconds = self._kept.get(network, KEPT_SECONDS)
            if now - seen >= seconds:
                del self._seen[network]
                self._kept.pop(network, None)
                self._kept[network] = min(2 * seconds, MOST_KEPT_SECONDS)
                if len(self._kept) > _MOST_REMEMBERED:
                    del self._kept[next(iter(self._kept))]
        return self._seen.keys()


class HostRegistration:
    """This host's record, and what else is known of its place. `subnets` are the mesh's, once they are known.
    `endpoints` are etcd's, `etcd` gives their addresses as far as they are known, `former` what is set for former names
    of the host."""

    def __init__(
        self,
        config: AgentConfig,
        public_key: str,
        session: Session,
        log: Logger,
        once: Once,
        *,
        endpoints: Callable[[], tuple[str, ...]] = tuple,
        etcd: Callable[[], tuple[IPNetwork, ...]] = tuple,
        former: Callable[[], FormerSettings] = FormerSettings,
    ) -> None:
        self._config = config
        self._public_key = public_key
        self._session = session
        self._log = log
        self._once = once
        self._endpoints = endpoints
        self._etcd = etcd
        self._former = former
        self._reached = Reached()
        """What the record's `underlay` was made of."""
        self._passing = PassingNetworks()
        self._looking = trio.Lock()
        self._untold = False
        """Whether the session may hold another record than `record`."""
        self.subnets: tuple[IPNetwork, ...] = ()
        self.record: NodeRecord | None = None
        self.report = StageReport()
        """The stage of the switch to `encrypted` in the record."""
        self.epoch: int | None = None
        """The epoch of the host's WireGuard device in the record; None: it had no record."""
        self.clock_epoch: int | None = None
        """The epoch of its clock there; None: it never went back."""
        self.facts = HostFacts()
        """What was found on the host when it was last looked at."""
        self.overlaps: tuple[str, ...] = ()
        """Sentences on the operator's addresses within the mesh's subnets."""
        self.etcd_inside: tuple[str, ...] = ()
        """Sentences on endpoints of etcd that are mesh addresses."""

    @property
    def address(self) -> str:
        """The registered endpoint, for people; empty: none."""
        return str(self.record.endpoint or "") if self.record else ""

    async def look(self) -> NodeRecord:
        """The record that the host should have, for the caller to register. OSError, KernelError."""
        record, reasons = await self._find(await etcd_networks(self._endpoints()))
        self._keep(record, reasons if record != self.record else ())
        return record

    async def look_again(self, *, register: bool) -> None:
        """Look, and register what has changed, if that is wanted; what cannot be done is logged once, and left for the
        next time."""
        async with self._looking:
            try:
                record, reasons = await self._find(self._etcd())
                if record != self.record or self._untold:
                    if register:
                        # If this fails the session goes on trying, whatever becomes of the addresses meanwhile.
                        self._untold = True
                        await self._session.register(record)
                        self._untold = False
                    alike = self.record is not None and record == evolve(
                        self.record,
                        underlay=record.underlay,
                        encryption=record.encryption,
                        accepts_since=record.accepts_since,
                        clock_epoch=record.clock_epoch,
                    )
                    self._keep(record, () if alike else reasons)
            except (etcd.EtcdError, *REFUSALS) as error:
                self._once.warning("addresses", "the changed record is not registered yet", error=str(error))
            except (OSError, kernel.KernelError, descriptors.OutOfDescriptors) as error:
                self._once.warning(
                    "addresses", "the host's addresses cannot be read", error=descriptors.shortage(error) or str(error)
                )
            else:
                self._once.clear("addresses", "the host's addresses are registered again")

    async def report_stage(self, report: StageReport) -> bool:
        """Register this stage of the switch to `encrypted`; whether the record has it."""
        self.report = report
        await self.look_again(register=True)
        record = self.record
        return record is not None and (record.encryption, record.accepts_since or 0) == (
            report.stage,
            report.accepts_since,
        )

    async def _find(self, etcd_at: tuple[IPNetwork, ...]) -> tuple[NodeRecord, tuple[tuple[str, dict[str, str]], ...]]:
        """The record, and what to say of the choices in it."""
        config = self._config
        facts = await discover.gather(config)
        chosen = discover.choose(facts, config)
        former = self._former()
        location, why = config.location, "--location"
        if former.label is not None:
            location, why = former.label, "the label of a former name of this host"
        elif not location:
            location, why = discover.location_from_cloud_init()
        self.facts = facts
        self.overlaps = facts.overlaps(self.subnets)
        self.etcd_inside = etcd_inside(etcd_at, self.subnets)
        reached = facts.reached(etcd_at)
        counting = self._passing.look(reached.passing, trio.current_time())
        before = evolve(self._reached, passing=tuple(n for n in self._reached.passing if n in counting))
        stated, self._reached = networks_to_register(
            reached, before, None if self.record is None else self.record.underlay
        )
        self._once.errors("overlaps", self.overlaps, level="warning")
        self._once.errors("etcd inside", self.etcd_inside, level="warning")
        record = NodeRecord(
            public_key=self._public_key,
            endpoint=chosen.endpoint,
            more_endpoints=chosen.more_endpoints,
            internal_ips=chosen.internal_ips,
            underlay=stated,
            encryption=self.report.stage,
            accepts_since=self.report.accepts_since or None,
            handshake_epoch=self.epoch or None,
            clock_epoch=self.clock_epoch,
            location=location or "",
            port=config.port,
            persistent_keepalive=config.persistent_keepalive,
            encapsulate=config.encapsulate,
            version=__version__,
            former_names=former.names,
            duplicate_of=former.duplicate_of,
        )
        notes = [("address chosen", {"reason": reason}) for reason in chosen.reasons]
        if location:
            notes.append(("default location chosen", {"default_location": location, "reason": why}))
        return record, tuple(notes)

    def _keep(self, record: NodeRecord, reasons: tuple[tuple[str, dict[str, str]], ...]) -> None:
        self.record = record
        for event, fields in reasons:
            self._log.info(event, **fields)


def etcd_inside(etcd_at: Iterable[IPNetwork], subnets: Collection[IPNetwork]) -> tuple[str, ...]:
    """A sentence for each address of etcd's that is within the mesh's subnets."""
    return tuple(
        f"{ETCD_INSIDE}{network.network_address} is a mesh address: a host that boots has no tunnel yet to reach it "
        "by, and one that loses its tunnels loses etcd too; give etcd's address on the network outside the mesh "
        "(ETCDCTL_ENDPOINTS)"
        for network in etcd_at
        if any(network.version == subnet.version and network.network_address in subnet for subnet in subnets)
    )


def networks_to_register(
    reached: Reached, before: Reached, record: tuple[IPNetwork, ...] | None
) -> tuple[tuple[IPNetwork, ...], Reached]:
    """What to state of the networks `reached`, and those that were counted for it, given those counted `before` for
    `record`.

    A passing network that is gone and still counts (`PassingNetworks`) stays stated until something else changes: each
    record that is written wakes the whole mesh.
    """
    together = Reached((*reached.lasting, *reached.passing, *before.passing))
    if record is not None and together.stated() == record:
        return record, before
    return reached.stated(), reached
