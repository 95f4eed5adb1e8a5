"""One node as it is in force: its record, with label and annotations applied and its addresses joined.

Pure. An annotation that cannot be read is as if it were not there, and is named; it never takes the node down.
The annotations `force-endpoint`, `force-internal-ip`, `persistent-keepalive` and `subnets` replace what the record
says; an empty `force-endpoint`, `persistent-keepalive` or `subnets` counts as none. `force-internal-ip` empty or `-`
means that the node has no internal IP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_interface
from typing import TypeVar

from attrs import evolve, frozen

from kilo_etcd.base.quoting import shown
from kilo_etcd.model import Endpoint, IPAddress, IPInterface, IPNetwork, Node, ObservedEndpoint, Peer
from kilo_etcd.store.records import (
    NodeRecord,
    one_per_family,
    parse_address,
    parse_interface,
    parse_keepalive,
    parse_networks,
)

ANNOTATIONS = frozenset(
    (
        "force-endpoint",
        "force-internal-ip",
        "leader",
        "persistent-keepalive",
        "allowed-location-ips",
        "subnets",
        "advertise-exit-node",
        "exit-node",
    )
)
T = TypeVar("T")

MOST_SEEN = 6
"""So many observed endpoints of one node or peer count, the newest. Correct observers publish three at a time."""


@frozen
class Registered:
    """A node's record and etcd's create revision of it."""

    record: NodeRecord
    create_revision: int

    def annotated(self, annotations: Mapping[str, str]) -> tuple[Annotated, dict[str, str]]:
        """The annotations' effect, and what is wrong with those that have none (annotation name -> reason)."""
        record = self.record
        wrong: dict[str, str] = {}
        if not annotations:
            return self._unannotated(), wrong

        def value(name: str, parse: Callable[[str], T], otherwise: T) -> T:
            text = annotations.get(name)
            if text is None:
                return otherwise
            try:
                return parse(text)
            except ValueError as error:
                wrong[name] = str(error)
                return otherwise

        endpoint = value("force-endpoint", lambda text: _endpoint(text, record), record.endpoint)
        return Annotated(
            endpoint=endpoint,
            forced=bool(annotations.get("force-endpoint")) and "force-endpoint" not in wrong,
            more_endpoints=_others(endpoint, record),
            internal_ips=value("force-internal-ip", lambda text: _internal_ips(text, record), record.internal_ips),
            leader_wanted=value("leader", lambda text: text.lower() not in ("", "0", "false"), False),
            advertises_exit_node=value("advertise-exit-node", _yes_or_no, False),
            # Any text counts: a name that nobody has leads nowhere, while none at all would let everything out.
            exit_node=value("exit-node", str.strip, ""),
            persistent_keepalive=value(
                "persistent-keepalive",
                lambda text: parse_keepalive(text) if text else record.persistent_keepalive,
                record.persistent_keepalive,
            ),
            allowed_location_ips=value("allowed-location-ips", parse_networks, ()),
            subnets=value("subnets", lambda text: parse_networks(text) or record.subnets, record.subnets),
        ), wrong

    def _unannotated(self) -> Annotated:
        # As most nodes are. The same as to look for each annotation in vain; a test compares them.
        record = self.record
        return Annotated(
            endpoint=record.endpoint,
            more_endpoints=_others(record.endpoint, record),
            internal_ips=record.internal_ips,
            persistent_keepalive=record.persistent_keepalive,
            subnets=record.subnets,
        )


@frozen(kw_only=True)
class Annotated:
    """What annotations can say about a node."""

    endpoint: Endpoint | None
    forced: bool = False
    """Whether the operator has set the endpoint."""
    more_endpoints: tuple[Endpoint, ...]
    internal_ips: tuple[IPInterface, ...]
    leader_wanted: bool = False
    advertises_exit_node: bool = False
    exit_node: str = ""
    persistent_keepalive: int
    allowed_location_ips: tuple[IPNetwork, ...] = ()
    subnets: tuple[IPNetwork, ...]


def join(
    name: str,
    registered: Registered,
    annotated: Annotated,
    *,
    label: str | None,
    addresses: tuple[IPAddress, ...],
    observed_endpoints: Iterable[ObservedEndpoint] = (),
) -> Node:
    """The node in force."""
    record = registered.record
    node = Node(
        name=name,
        public_key=record.public_key,
        location=record.location if label is None else label,
        endpoint=annotated.endpoint,
        more_endpoints=annotated.more_endpoints,
        internal_ips=annotated.internal_ips,
        underlay=record.underlay,
        encryption=record.encryption,
        accepts_since=record.accepts_since or 0,
        mesh_addresses=addresses,
        port=record.port,
        subnets=annotated.subnets,
        allowed_location_ips=annotated.allowed_location_ips,
        persistent_keepalive=annotated.persistent_keepalive,
        leader_wanted=annotated.leader_wanted,
        advertises_exit_node=annotated.advertises_exit_node,
        exit_node=annotated.exit_node,
        encapsulate=record.encapsulate,
        default_location=record.location,
        version=record.version,
        registered_revision=registered.create_revision,
    )
    if annotated.forced or not annotated.persistent_keepalive:
        return node
    observed = tuple(
        endpoint
        for endpoint in _observed(node.public_key, observed_endpoints)
        if not node.public_in(_version(endpoint))
    )
    return evolve(node, observed_endpoints=observed) if observed else node


def join_peer(peer: Peer, observed_endpoints: Iterable[ObservedEndpoint]) -> Peer:
    """The peer in force: with its observed endpoints, if nothing else says where it is."""
    if peer.endpoint is not None or not peer.persistent_keepalive:
        return peer
    observed = _observed(peer.public_key, observed_endpoints)
    return evolve(peer, observed_endpoints=observed) if observed else peer


def _observed(public_key: str, observed_endpoints: Iterable[ObservedEndpoint]) -> tuple[Endpoint, ...]:
    """The endpoints that count, each once. Observers may disagree, so the order must not: the newest first.

    `observed_endpoints` are those whose observers can know (`ObservedEndpoint.counts`).
    """
    counting = sorted(
        (observed for observed in observed_endpoints if observed.public_key == public_key and observed.endpoint.public),
        key=lambda observed_endpoint: (-observed_endpoint.revision, observed_endpoint.observer),
    )
    return tuple(dict.fromkeys(observed.endpoint for observed in counting[:MOST_SEEN]))


def _version(endpoint: Endpoint) -> int:
    return 4 if endpoint.address is None else endpoint.address.version


def _yes_or_no(text: str) -> bool:
    # What opens a path must be stated clearly.
    word = text.strip().lower()
    if word not in ("true", "false", "1", "0", ""):
        raise ValueError(f"{shown(text)} is neither true nor false")
    return word in ("true", "1")


def _endpoint(text: str, record: NodeRecord) -> Endpoint | None:
    if not text:
        return record.endpoint
    if "%" in text or len(text) > 300:
        raise ValueError(f"{shown(text)} is no endpoint: write host:port, without a zone")
    return Endpoint.parse(text, default_port=record.port)


def _others(first: Endpoint | None, record: NodeRecord) -> tuple[Endpoint, ...]:
    """The record's endpoints in the families that `first` is not in; a forced one takes the place of its family's."""
    if not record.more_endpoints and first == record.endpoint:
        return ()
    taken = {first.address.version} if first is not None and first.address is not None else set()
    result = []
    for endpoint in (record.endpoint, *record.more_endpoints):
        address = None if endpoint is None else endpoint.address
        if endpoint is not None and address is not None and address.version not in taken:
            taken.add(address.version)
            result.append(endpoint)
    return tuple(result)


def _internal_ips(text: str, record: NodeRecord) -> tuple[IPInterface, ...]:
    if text in ("", "-"):
        return ()
    return one_per_family(tuple(_internal_ip(part.strip(), record) for part in text.split(",") if part.strip()))


def _internal_ip(text: str, record: NodeRecord) -> IPInterface:
    if "/" in text:
        return parse_interface(text)
    # A bare address is most likely on a network that the host has told us about: then it has that network's length.
    address = parse_address(text)
    length = next((ip.network.prefixlen for ip in record.internal_ips if address in ip.network), address.max_prefixlen)
    return ip_interface(f"{address}/{length}")
