"""Waiting until the hosts of the mesh are back in an etcd that was adopted, before it is followed.

Such an etcd may be empty, or older than some hosts. Each agent finds out by itself that it was adopted, and registers
there; the first ones would take all others out of their kernels, and in again one by one. So the last plan stays until
all nodes of the cached snapshot are registered and its leaders stand again, for `LONGEST_SECONDS` at most: a node that
is gone for good never comes. Pure; the caller gives the time.
"""

from __future__ import annotations

from attrs import define

from kilo_etcd.model import Snapshot
from kilo_etcd.store.mirror import PROBE_PERIOD
from kilo_etcd.topology.segments import Topology

LONGEST_SECONDS = 2 * PROBE_PERIOD
"""Agents look every 4 to 6 s whether their etcd was adopted; then they need a second or two to register."""


def missing(before: Topology, now: Snapshot) -> frozenset[str]:
    """The nodes of `before` that `now` lacks, and its leaders that stood as candidates and do not any more."""
    leaders = {segment.leader.name for segment in before.segments.values()} & before.snapshot.candidate_names()
    return frozenset(before.snapshot.nodes.keys() - now.nodes.keys() | leaders - now.candidate_names())


@define
class Adoption:
    """One agent's wait. `generation` is that of the etcd that it follows (`Mirror.generation`); a new one begins a
    wait."""

    generation: int
    until: float = float("inf")
    """When the wait is over in any case, on the caller's clock; infinity: there is none."""
    _before: Topology | None = None

    @property
    def waits(self) -> bool:
        """Whether the wait is on."""
        return self._before is not None

    def missing(self, generation: int, in_force: Topology | None, newest: Snapshot, now: float) -> frozenset[str]:
        """The nodes to wait for before `newest` replaces what is `in_force`; none: do not wait."""
        if generation != self.generation:
            self.generation, self.until, self._before = generation, now + LONGEST_SECONDS, in_force
        nodes = frozenset[str]() if self._before is None or now >= self.until else missing(self._before, newest)
        if not nodes:
            self.until, self._before = float("inf"), None
        return nodes
