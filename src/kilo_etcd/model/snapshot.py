"""Everything that etcd holds under the prefix at one revision, read and made consistent."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from kilo_etcd.base.mappings import Changed
from kilo_etcd.model.addresses import IPNetwork
from kilo_etcd.model.candidate import Candidate, ProbeReport
from kilo_etcd.model.endpoint import Endpoint
from kilo_etcd.model.node import Node
from kilo_etcd.model.peer import Peer
from kilo_etcd.model.settings import Granularity, InternalIPs


@frozen(kw_only=True)
class ObservedEndpoint:
    """What one observer's WireGuard reports: where the owner of a public key sends from."""

    observer: str
    public_key: str
    endpoint: Endpoint
    revision: int
    """etcd's mod revision of it: newer ones have higher ones."""

    def counts(self, nodes: Mapping[str, Node]) -> bool:
        """Whether its observer, by what `nodes` says, can know: a node that is public itself in that family."""
        node = nodes.get(self.observer)
        return node is not None and node.may_tell_of(self.endpoint)


REST_IN_FORCE = "the rest of the record is in force"
"""How the reason ends if only a part of a record is rejected."""


@frozen
class RejectedRecord:
    """A record, or a part of one, that is not in force, and why."""

    key: str
    reason: str
    author: str = ""
    """The node whose agent alone writes the key; empty: an operator writes it, or nobody should."""

    @property
    def in_force(self) -> bool:
        """Whether only a part of the record is rejected, as where another version of the agent writes it."""
        return self.reason.endswith(REST_IN_FORCE)

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@frozen(kw_only=True)
class Snapshot:
    """What etcd holds under the prefix at `revision`, read and made consistent.

    `revision` is the highest mod revision under the watched prefix (or the revision of the listing), so two
    agents with equal revisions have equal snapshots. Mappings must not be changed by whoever receives them.
    """

    revision: int
    cluster_id: int = 0
    raft_term: int = 0
    granularity: Granularity = Granularity.LOCATION
    subnets: tuple[IPNetwork, ...] = ()
    internal_ips: InternalIPs = InternalIPs.OFF
    """The setting. What is in force is the topology's to say: agents of older versions do not know it."""
    internal_ips_since: int = field(default=0, eq=False)
    """etcd's revision at which the setting was written; 0: its key is missing, or holds nonsense."""
    nodes: Mapping[str, Node] = field(factory=dict)
    peers: Mapping[str, Peer] = field(factory=dict)
    candidates: Mapping[str, tuple[Candidate, ...]] = field(factory=dict)
    """Location -> its candidates, in no particular order."""
    leaders: Mapping[str, tuple[str, ...]] = field(factory=dict)
    """Location -> the nodes on record as its leaders, the last one first, for the case that no candidate is left."""
    observed_endpoints: Mapping[str, tuple[ObservedEndpoint, ...]] = field(factory=dict)
    """Node or peer -> its observed endpoints, by observer, all of them. Those that count are in
    `Node.observed_endpoints` and `Peer.observed_endpoints`."""
    probe_reports: Mapping[str, tuple[ProbeReport, ...]] = field(factory=dict)
    """Location -> the probe reports on its leader, by prober."""
    rejected: tuple[RejectedRecord, ...] = ()
    nodes_changed: Changed[str, Node] | None = field(default=None, eq=False, repr=False)
    """In what `nodes` differ from those of the snapshot before, as far as is known. It only saves work."""

    def candidate_names(self) -> frozenset[str]:
        """The nodes that stand as candidates anywhere, whose agents lived a lease's time ago."""
        return frozenset(candidate.node for standing in self.candidates.values() for candidate in standing)
