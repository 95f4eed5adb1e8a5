"""The newest plan of a host, and how much of it is in force, as a frozen value."""

from __future__ import annotations

from attrs import frozen

from kilo_etcd.agent.leadership.candidacy_policy import SegmentRole, is_standby
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.pipeline import HostPlans
from kilo_etcd.store.records import Role
from kilo_etcd.topology.segments import Topology


@frozen(kw_only=True)
class HostState:
    """The topology and the plans are the newest; all else is as of the last plan that was brought to the kernel."""

    topology: Topology | None = None
    """With the leaders that other nodes report, as long as they are followed."""
    plans: HostPlans | None = None
    """The kernel may not have taken them."""
    plan: HostPlan | None = None
    """What was last brought to the kernel."""
    role: SegmentRole | None = None
    revision: int = 0
    """That of the snapshot that was last applied."""
    failures: tuple[str, ...] = ()
    """Sentences: which parts of the plan are not in force, or why the newest snapshot cannot be applied."""
    programmed: bool = False
    """Whether the kernel could be programmed the last time."""
    ready: bool = False
    """Programmed well enough to lead."""
    refused_families: frozenset[int] = frozenset()
    """Those in which the kernel does not take what the mesh needs."""

    @property
    def leads(self) -> bool:
        """Whether this host leads its segment."""
        return self.role is not None and self.role.kind is Role.LEADER

    @property
    def sends(self) -> bool:
        """Whether the host's own packets leave through its tunnels."""
        return self.role is not None and self.plan is not None and not is_standby(self.role, self.plan)

    def is_alone(self, name: str) -> bool:
        """Whether the node `name` is in the mesh, and the only one of its location."""
        if self.topology is None or name not in self.topology.snapshot.nodes:
            return False
        return len(self.topology.segment_of(name).members) == 1
