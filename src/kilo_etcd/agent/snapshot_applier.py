"""Makes the plan of a snapshot for this host, and brings it to the kernel.

topology -> inputs of this host -> plan -> kernel, by `planning.pipeline` and `agent.apply`; what comes of it is one
`HostState` after the other. Called by the one task of `runtime.reconciler`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from attrs import evolve, frozen

from kilo_etcd import kernel
from kilo_etcd.agent.apply import PlanApplier
from kilo_etcd.agent.host_state import HostState
from kilo_etcd.agent.leader_hints.service import PeerQueryService
from kilo_etcd.agent.leadership import candidacy_policy
from kilo_etcd.agent.leadership.candidacy import CandidacyTask
from kilo_etcd.agent.leadership.served_families import refused_families
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.notify import notify
from kilo_etcd.agent.plan_inputs import PlanInputs
from kilo_etcd.agent.unknown_host import UnknownHost
from kilo_etcd.kernel.state import CreateLink, StartUserspace
from kilo_etcd.model import Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.names import plan_names
from kilo_etcd.planning.pipeline import HostPlans, host_plans
from kilo_etcd.runtime.logs import Once, get_logger
from kilo_etcd.runtime.reconciler import Reconciler
from kilo_etcd.runtime.resolve import Resolver
from kilo_etcd.store.records import Role
from kilo_etcd.topology.segments import Topology, UnknownNode, build_topology


@frozen(kw_only=True)
class AppliedSnapshot:
    """What was just brought to the kernel, for the parts that go by it."""

    snapshot: Snapshot
    topology: Topology
    plans: HostPlans
    standby: bool
    """The host exchanges no packets with its peers."""
    whole: bool
    """All of the plan is in force."""
    fresh: bool
    """The kernel was read anew."""


class SnapshotApplier:
    """Brings snapshots to the kernel of this host. `missing_addresses` gives sentences on internal IPs that the
    host does not have. `on_snapshot` is told what is about to be applied, `publish` writes the status, and
    `on_applied` is told what is in the kernel after that."""

    def __init__(
        self,
        name: str,
        interface: str,
        public_key: str,
        device: kernel.Kernel,
        applier: PlanApplier,
        reconciler: Reconciler,
        *,
        inputs: PlanInputs,
        unknown_host: UnknownHost,
        peer_queries: PeerQueryService,
        candidacy: CandidacyTask,
        resolver: Resolver,
        once: Once,
        metrics: Metrics,
        missing_addresses: Callable[[], tuple[str, ...]],
        on_snapshot: Callable[[Snapshot], None],
        publish: Callable[[Snapshot], None],
        on_applied: Callable[[AppliedSnapshot], None],
    ) -> None:
        self._name, self._interface, self._public_key = name, interface, public_key
        self._kernel, self._applier, self._reconciler = device, applier, reconciler
        self._inputs, self._unknown_host, self._peer_queries = inputs, unknown_host, peer_queries
        self._candidacy, self._resolver, self._once, self._metrics = candidacy, resolver, once, metrics
        self._missing_addresses, self._on_snapshot = missing_addresses, on_snapshot
        self._publish, self._on_applied = publish, on_applied
        self._internal_ips: candidacy_policy.InternalIPsState | None = None
        self.state = HostState()
        self.applied = trio.Event()
        """Set by the next apply, and replaced by another."""
        self.made_device = False
        """Whether the WireGuard device was made anew since this agent began."""

    async def apply(self, snapshot: Snapshot, fresh: bool) -> None:
        """Plan, and bring the plan to the kernel, which is read anew if `fresh`. KernelError: as
        `Reconciler.program`."""
        self._on_snapshot(snapshot)
        topology = self._build_topology(snapshot)
        own = snapshot.nodes.get(self._name)
        if own is not None and own.public_key != self._public_key:
            # The same: it has the record of an earlier run with another key, or what another writer has put.
            return
        try:
            surroundings = await self._inputs.surroundings(topology)
            plans = host_plans(topology, self._name, surroundings, self.state.plans)
        except UnknownNode:
            await self._apply_nothing(snapshot)
            return
        self._set(plans=plans)
        self._once.clear("unknown", "this host is among the mesh's nodes again")
        plan = plans.final
        self._resolver.set_names(plan_names(plans.raw))
        standby = candidacy_policy.is_standby(candidacy_policy.role_of(topology, self._name), plan)
        before = self._kernel.writes
        report = await self._reconciler.program(
            lambda: self._applier.apply(plan, topology, standby=standby, fresh=fresh)
        )  # fmt: skip
        writes = self._kernel.writes - before
        if isinstance(report, str):
            self._set(programmed=False, ready=False, failures=(report,))
            self._metrics.reconciled(trouble=report, writes=writes)
            self._publish(snapshot)
            return
        self._note_internal_ips(topology)
        self._once.errors("forced addresses", self._missing_addresses())
        self._note_report(report, plan, snapshot, writes)
        self._candidacy.follow(topology)
        self._note_role(snapshot)
        self._publish(snapshot)
        self._on_applied(
            AppliedSnapshot(
                snapshot=snapshot, topology=topology, plans=plans, standby=standby, whole=not report.failures,
                fresh=fresh,
            )
        )  # fmt: skip
        applied, self.applied = self.applied, trio.Event()
        applied.set()

    def _set(self, **fields: Any) -> None:
        self.state = evolve(self.state, **fields)

    def _build_topology(self, snapshot: Snapshot) -> Topology:
        topology = build_topology(snapshot, self.state.topology)
        if (hints := self._peer_queries.follow(topology)) is not snapshot:
            topology = build_topology(hints, topology)
        self._set(topology=topology)
        return topology

    async def _apply_nothing(self, snapshot: Snapshot) -> None:
        """Report that the snapshot does not have this host, unless it is only too old."""
        if self._unknown_host.is_outdated(snapshot):
            return
        why = await self._unknown_host.explain(snapshot)
        self._set(failures=(why,))
        self._once.error("unknown", why, revision=snapshot.revision)
        self._metrics.not_programmed(why)
        self._publish(snapshot)
        notify(f"STATUS={why}")

    def _note_report(self, report: kernel.ApplyReport, plan: HostPlan, snapshot: Snapshot, writes: int) -> None:
        for change in report.changes:
            self._reconciler.log.debug("changed", command=str(change))
        failures = (
            *(str(failure) for failure in report.failures),
            *(problem.text for problem in plan.problems),
        )
        self._once.errors("plan", failures, revision=snapshot.revision)
        self._once.errors("notes", report.notes, level="warning", revision=snapshot.revision)
        self._metrics.reconciled(
            trouble=str(report.failures[0]) if report.failures else None,
            writes=writes,
            revision=snapshot.revision,
            problems=len(plan.problems),
        )
        if report.changes:
            self._reconciler.log.info(
                "applied", changes=len(report.changes), failures=len(report.failures),
                peers=len(plan.peers), routes=len(plan.routes), revision=snapshot.revision,
            )  # fmt: skip
        self.made_device |= any(
            isinstance(change, CreateLink | StartUserspace) and change.name == self._interface
            for change in report.changes
        )
        missing = (failure.destination for failure in report.failures if not failure.aside)
        self._set(
            plan=plan,
            revision=snapshot.revision,
            failures=failures,
            programmed=True,
            ready=candidacy_policy.able_to_lead(missing, snapshot.subnets),
            refused_families=refused_families(report.failures, snapshot.subnets),
        )

    def _note_internal_ips(self, topology: Topology) -> None:
        before, self._internal_ips = self._internal_ips, candidacy_policy.InternalIPsState.of(topology)
        if (news := self._internal_ips.news(before)) is not None:
            event, fields = news
            self._reconciler.log.info(event, revision=topology.snapshot.revision, **fields)

    def _note_role(self, snapshot: Snapshot) -> None:
        topology = self.state.topology
        assert topology is not None
        role = candidacy_policy.role_of(topology, self._name)
        if role == self.state.role:
            return
        self._set(role=role)
        log = self._reconciler.log = get_logger().bind(node=self._name, location=role.location)
        if role.kind is Role.ALONE:
            log.info("this host is a segment of its own", revision=snapshot.revision)
        else:
            demoted = topology.segment_of(self._name).election.demoted
            log.info(
                "leader elected", leader=role.leader, role=role.kind, demoted=demoted,
                revision=snapshot.revision,
            )  # fmt: skip
        self._metrics.leads(role.kind is Role.LEADER)
