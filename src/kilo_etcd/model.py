"""The values that everything else uses: nodes, peers, candidates and the snapshot of them all.

Every value is frozen; equality is by content, so `is` may be used as a fast path but never as the meaning.
Nothing here reads a clock, a file or a socket, and nothing here knows how a record looks in etcd
(`store.records`) or how the kernel is told (`kernel`).

A `Snapshot` holds *effective* values: labels and annotations are already applied to the nodes, address
claims are already joined, and what could not be read or contradicts another record has been rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from attrs import field, frozen

from kilo_etcd.fast_ip import ip_address
from kilo_etcd.quoting import shown

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPInterface: TypeAlias = IPv4Interface | IPv6Interface
IPNetwork: TypeAlias = IPv4Network | IPv6Network

DEFAULT_LOCATION = ""
DEFAULT_PREFIX = "/kilo"
DEFAULT_INTERFACE = "kilo0"
DEFAULT_PORT = 51820
SESSION_SECONDS = 180
"""From this age on a WireGuard session is over (REJECT_AFTER_TIME of its paper): an endpoint in use is younger."""
DEFAULT_SUBNET = "10.4.0.0/16"


class Granularity(StrEnum):
    """How tunnels are drawn (DESIGN section 4)."""

    LOCATION = "location"
    FULL = "full"
    CROSS = "cross"


class InternalIPs(StrEnum):
    """What of the traffic between the hosts' internal IPs travels in the tunnels."""

    OFF = "off"
    """None of it."""
    ROUTED = "routed"
    """What goes to internal IPs of other segments."""
    ENCRYPTED = "encrypted"
    """The same, and nothing between nodes of two segments travels in clear."""


class EncryptionStage(StrEnum):
    """How far a node is with the switch to `encrypted`, as it reports it. No stage: none of it is in its kernel.

    Each is reported once the kernel holds it, and given up before the kernel does (`topology.stages`).
    """

    ACCEPTS = "accepts"
    """It takes what others send it through the tunnels, and begins to send so itself."""
    SENDS = "sends"
    """It also sends through the tunnel to all nodes that accept it, and refuses clear text of those that send so
    too."""
    LEAVES = "leaves"
    """On the way back: it refuses nothing any more."""
    STOPPED = "stopped"
    """On the way back: it sends nothing so any more; it still takes it."""


ACCEPTING = (EncryptionStage.ACCEPTS, EncryptionStage.SENDS)
"""The stages of nodes that take part in `encrypted`."""


class MeshSettings(NamedTuple):
    """What holds for the mesh as a whole: written by the first agent, changed by operators."""

    granularity: Granularity
    subnets: tuple[IPNetwork, ...]
    internal_ips: InternalIPs = InternalIPs.ROUTED


class Encapsulate(StrEnum):
    """How nodes of one location reach each other when they are not on one link (DESIGN section 4)."""

    NEVER = "never"
    CROSSSUBNET = "crosssubnet"
    ALWAYS = "always"
    WIREGUARD = "wireguard"


class CandidateClass(IntEnum):
    """How well a candidate suits as leader; the smaller leads."""

    ANNOTATED_PUBLIC = 0
    ANNOTATED = 1
    PUBLIC = 2
    REST = 3
    DEMOTED = 4
    """It led and did not forward: it is a candidate again, behind all others, until its hold-down is over."""


@frozen
class Endpoint:
    """Where a WireGuard device is reached: an address or a DNS name, and a UDP port.

    >>> str(Endpoint.parse("[2001:db8::1]:51820"))
    '[2001:db8::1]:51820'
    """

    host: IPAddress | str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> Endpoint:
        """`host:port`, `[v6]:port`, or with `default_port` a bare host. ValueError says what is wrong."""
        text = text.strip()
        if text.startswith("["):
            name, closed, rest = text[1:].partition("]")
            if not closed or (rest and not rest.startswith(":")):
                raise ValueError(f"{shown(text)} is no endpoint: write [address]:port")
            port_text = rest[1:]
        elif text.count(":") > 1:
            name, port_text = text, ""
        else:
            name, _, port_text = text.partition(":")
        if not port_text and default_port is None:
            raise ValueError(f"{shown(text)} is no endpoint: the port is missing (host:port)")
        try:
            port = int(port_text) if port_text else int(default_port or 0)
        except ValueError:
            raise ValueError(f"{shown(text)} is no endpoint: {shown(port_text)} is no port") from None
        if not 0 < port < 65536:
            raise ValueError(f"{shown(text)} is no endpoint: {shown(port_text)} is not within 1 to 65535")
        try:
            return cls(ip_address(name), port)
        except ValueError:
            if not is_dns_name(name):
                raise ValueError(
                    f"{shown(text)} is no endpoint: {shown(name)} is neither an address nor a DNS name"
                ) from None
            return cls(name.lower(), port)

    @property
    def address(self) -> IPAddress | None:
        """The host as an address; None for a DNS name that is not resolved yet."""
        return None if isinstance(self.host, str) else self.host

    @property
    def public(self) -> bool:
        """Whether others can be expected to reach it from anywhere: a DNS name or a public address."""
        return True if isinstance(self.host, str) else is_public(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if isinstance(self.host, IPv6Address) else f"{self.host}:{self.port}"


def is_dns_name(text: str) -> bool:
    """Whether a text can be a host's name."""
    labels = text.rstrip(".").split(".")
    # All-numeric last labels are mistyped IPv4 addresses, never host names (RFC 3696 section 2).
    return (
        0 < len(text) <= 253
        and not labels[-1].isdigit()
        and all(
            0 < len(label) <= 63
            and label[0] != "-"
            and label[-1] != "-"
            and all(c.isascii() and (c.isalnum() or c in "-_") for c in label)
            for label in labels
        )
    )


# Documentation networks stand for the internet in the lab and in examples, so they count as public here
# although the registry (and `ipaddress.is_global`) says that they are not.
_PRIVATE = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3",
    )
)  # fmt: skip
_PUBLIC6 = IPv6Network("2000::/3")


def is_public(address: IPAddress) -> bool:
    """Whether an address is routed on the internet: not private, shared (CGNAT), link-local or loopback."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _PRIVATE)
    return address in _PUBLIC6


@frozen(kw_only=True)
class Node:
    """A host that runs the agent, with labels and annotations applied.

    `mesh_addresses` and `internal_ips` hold at most one address per family. A node with no internal IP has
    an empty tuple there and is a segment of its own.
    """

    name: str
    public_key: str
    location: str = DEFAULT_LOCATION
    endpoint: Endpoint | None = None
    more_endpoints: tuple[Endpoint, ...] = ()
    """Endpoints in families that `endpoint` is not in; at most one per family, addresses only."""
    internal_ips: tuple[IPInterface, ...] = ()
    underlay: tuple[IPNetwork, ...] | None = None
    """What the host reaches over its own links and must go on reaching there: the networks that it is attached to,
    its default gateways, name servers and etcd. None: its agent is of a version that does not report it."""
    encryption: EncryptionStage | None = None
    """How far it is with the switch to `encrypted`, or back."""
    accepts_since: int = 0
    """The revision of a snapshot in which it was ACCEPTS: a node that has applied that sends it nothing in clear. 0:
    none."""
    mesh_addresses: tuple[IPAddress, ...] = ()
    port: int = DEFAULT_PORT
    subnets: tuple[IPNetwork, ...] = ()
    allowed_location_ips: tuple[IPNetwork, ...] = ()
    persistent_keepalive: int = 0
    """Seconds; 0 is off."""
    leader_wanted: bool = False
    advertises_exit_node: bool = False
    """Whether peers and other nodes may use it as their exit node."""
    exit_node: str = ""
    """The node by which it leaves for the internet itself; empty: by its own network."""
    encapsulate: Encapsulate = Encapsulate.CROSSSUBNET
    default_location: str = DEFAULT_LOCATION
    version: str = ""
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


@frozen(kw_only=True)
class Peer:
    """A WireGuard endpoint outside the mesh's hosts. Every segment leader serves it."""

    name: str
    public_key: str
    allowed_ips: tuple[IPNetwork, ...] = ()
    endpoint: Endpoint | None = None
    persistent_keepalive: int = 0
    preshared_key: str | None = field(default=None, repr=False)
    observed_endpoints: tuple[Endpoint, ...] = ()
    """As a node's; only of peers with keepalive whose record has no endpoint."""
    registered_revision: int = 0
    """etcd's create revision of the peer's record: older peers have lower ones."""


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


@frozen(kw_only=True)
class Candidate:
    """A node's standing offer to lead its location; it lives as long as the node's short lease."""

    node: str
    rank: CandidateClass
    create_revision: int
    since: str = ""
    """RFC 3339 time at which the candidacy was entered; for people only, nothing is decided by it."""


@frozen(kw_only=True)
class ProbeReport:
    """What a prober reports of a leader through which it reaches no target any more; it lives as long as the prober's
    short lease. Single observations: `topology.probe_reports` decides what follows from them."""

    prober: str
    leader: str
    candidacy: int
    """etcd's create revision of the candidacy by which it led: a later one of the same node is not meant."""
    targets: tuple[str, ...] = ()
    """The nodes that were tried; if the prober is one of them, the members of the leader's location were."""
    leader_reachable: bool = False
    """The leader itself answers the prober, without forwarding."""
    members_reachable: bool = False
    """Another member of the location answers the prober."""
    can_take_over: bool = False
    """The prober has a tunnel of its own to one of the targets, just verified by a handshake: it could lead instead."""


@frozen
class RejectedRecord:
    """A record, or a part of one, that is not in force, and why."""

    key: str
    reason: str
    author: str = ""
    """The node whose agent alone writes the key; empty: an operator writes it, or nobody should."""

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


_NOTHING: Mapping[str, str] = MappingProxyType({})


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
    leaders: Mapping[str, str] = _NOTHING
    """Location -> the node recorded as its leader, for the case that no candidate is left."""
    observed_endpoints: Mapping[str, tuple[ObservedEndpoint, ...]] = field(factory=dict)
    """Node or peer -> its observed endpoints, by observer, all of them. Those that count are in
    `Node.observed_endpoints` and `Peer.observed_endpoints`."""
    probe_reports: Mapping[str, tuple[ProbeReport, ...]] = field(factory=dict)
    """Location -> the probe reports on its leader, by prober."""
    rejected: tuple[RejectedRecord, ...] = ()
