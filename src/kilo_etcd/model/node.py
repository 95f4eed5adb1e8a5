"""A host that runs the agent, with labels and annotations applied."""

from __future__ import annotations

from attrs import frozen

from kilo_etcd.model.addresses import IPAddress, IPInterface, IPNetwork
from kilo_etcd.model.candidate import CandidateClass
from kilo_etcd.model.endpoint import Endpoint
from kilo_etcd.model.settings import DEFAULT_LOCATION, DEFAULT_PORT, Encapsulate, EncryptionStage

LATEST_CLOCK_EPOCH = 2**32 - 1
"""In the year 2106. A greater one would be a mistake, and no later one would be news until all agents start again."""


@frozen(kw_only=True)
class StatedNode:
    """What a node states of itself and others act on: the part that its record and `Node` have in common."""

    public_key: str
    endpoint: Endpoint | None = None
    more_endpoints: tuple[Endpoint, ...] = ()
    """Endpoints in families that `endpoint` is not in; at most one per family, addresses only. Agents that do not know
    the field use `endpoint` alone."""
    internal_ips: tuple[IPInterface, ...] = ()
    underlay: tuple[IPNetwork, ...] | None = None
    """What the host reaches over its own links and must go on reaching there: the networks that it is attached to,
    its default gateways, name servers and etcd. None: its agent is of a version that does not report it."""
    encryption: EncryptionStage | None = None
    """How far it is with the switch to `encrypted`, or back."""
    handshake_epoch: int | None = None
    """Greater than before: the host's WireGuard device is new, and others are to forget its handshakes, which are dated
    by its clock. None: it has not been new since the host is a node."""
    clock_epoch: int | None = None
    """Greater than before: the host's clock went back, and others are to forget its handshakes when their sessions end.
    At least the date that the clock had before (Unix seconds), so that an agent that starts knows what it has told; at
    most `LATEST_CLOCK_EPOCH`."""
    subnets: tuple[IPNetwork, ...] = ()
    location: str = DEFAULT_LOCATION
    port: int = DEFAULT_PORT
    persistent_keepalive: int = 0
    """Seconds; 0 is off."""
    encapsulate: Encapsulate = Encapsulate.CROSSSUBNET
    version: str = ""


@frozen(kw_only=True)
class Node(StatedNode):
    """A host that runs the agent, with labels and annotations applied.

    `mesh_addresses` and `internal_ips` hold at most one address per family. A node with no internal IP has
    an empty tuple there and is a segment of its own.
    """

    name: str
    accepts_since: int = 0
    """The revision of a snapshot in which it was ACCEPTS: a node that has applied that sends it nothing in clear. 0:
    none."""
    mesh_addresses: tuple[IPAddress, ...] = ()
    allowed_location_ips: tuple[IPNetwork, ...] = ()
    leader_wanted: bool = False
    advertises_exit_node: bool = False
    """Whether peers and other nodes may use it as their exit node."""
    exit_node: str = ""
    """The node by which it leaves for the internet itself; empty: by its own network."""
    default_location: str = DEFAULT_LOCATION
    """The one that it states, which a label replaces."""
    registered_revision: int = 0
    """etcd's create revision of the node's record: older nodes have lower ones."""
    observed_endpoints: tuple[Endpoint, ...] = ()
    """Where public hosts' WireGuard sees the node through its NAT: each endpoint once, the newest first. Only of nodes
    that need it: with keepalive, and without a public or forced endpoint in that family."""

    @property
    def candidate_class(self) -> CandidateClass:
        """The class in which the node would stand for leader."""
        public = self.endpoint is not None and self.endpoint.public
        if self.leader_wanted:
            return CandidateClass.ANNOTATED_PUBLIC if public else CandidateClass.ANNOTATED
        return CandidateClass.PUBLIC if public else CandidateClass.REST

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints, the one that the node puts first first."""
        return self.more_endpoints if self.endpoint is None else (self.endpoint, *self.more_endpoints)

    def endpoint_in(self, version: int) -> Endpoint | None:
        """The node's endpoint with an address of family 4 or 6."""
        return next(
            (endpoint for endpoint in self.endpoints if endpoint.address and endpoint.address.version == version), None
        )

    def public_in(self, version: int) -> bool:
        """Whether others can be expected to reach the node from anywhere in family 4 or 6."""
        return any(
            endpoint.public
            for endpoint in self.endpoints
            if endpoint.address is None or endpoint.address.version == version
        )

    def observed_in(self, version: int) -> tuple[Endpoint, ...]:
        """Where the node is seen in family 4 or 6; several: its NAT shows each partner another, or it has moved."""
        return tuple(
            endpoint
            for endpoint in self.observed_endpoints
            if endpoint.address is not None and endpoint.address.version == version
        )

    def may_tell_of(self, endpoint: Endpoint) -> bool:
        """Whether its observations count in the endpoint's family: a host that is not public itself
        may see what is true at its own site only."""
        return endpoint.address is not None and self.public_in(endpoint.address.version)

    def internal_ip(self, version: int) -> IPInterface | None:
        """The node's address on its location's network in family 4 or 6."""
        for ip in self.internal_ips:
            if ip.version == version:
                return ip
        return None

    def mesh_address(self, version: int) -> IPAddress | None:
        """The node's mesh address in family 4 or 6."""
        return next((ip for ip in self.mesh_addresses if ip.version == version), None)
