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

from kilo_etcd.model import Endpoint, IPAddress, IPInterface, IPNetwork, Node, Peer, Sighting
from kilo_etcd.quoting import shown
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
        "gateway",
        "way-out",
    )
)
T = TypeVar("T")

MOST_SEEN = 6
"""So many sightings of one node or peer count, the newest. Honest observers keep to three at a time."""


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
            gateway=value("gateway", _yes_or_no, False),
            # Any text counts: a name that nobody has leads nowhere, while none at all would let everything out.
            way_out=value("way-out", str.strip, ""),
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
    """Whether the endpoint is the operator's word."""
    more_endpoints: tuple[Endpoint, ...]
    internal_ips: tuple[IPInterface, ...]
    leader_wanted: bool = False
    gateway: bool = False
    way_out: str = ""
    persistent_keepalive: int
    allowed_location_ips: tuple[IPNetwork, ...] = ()
    subnets: tuple[IPNetwork, ...]


def join(
    name: str,
    registered: Registered,
    said: Annotated,
    *,
    label: str | None,
    addresses: tuple[IPAddress, ...],
    sightings: Iterable[Sighting] = (),
) -> Node:
    """The node in force."""
    record = registered.record
    node = Node(
        name=name,
        public_key=record.public_key,
        location=record.location if label is None else label,
        endpoint=said.endpoint,
        more_endpoints=said.more_endpoints,
        internal_ips=said.internal_ips,
        underlay=record.underlay,
        encryption=record.encryption,
        accepts_since=record.accepts_since or 0,
        mesh_addresses=addresses,
        port=record.port,
        subnets=said.subnets,
        allowed_location_ips=said.allowed_location_ips,
        persistent_keepalive=said.persistent_keepalive,
        leader_wanted=said.leader_wanted,
        gateway=said.gateway,
        way_out=said.way_out,
        encapsulate=record.encapsulate,
        default_location=record.location,
        version=record.version,
        registered_revision=registered.create_revision,
    )
    if said.forced or not said.persistent_keepalive:
        return node
    seen = tuple(one for one in _seen(node.public_key, sightings) if not node.public_in(_version(one)))
    return evolve(node, seen=seen) if seen else node


def join_peer(peer: Peer, sightings: Iterable[Sighting]) -> Peer:
    """The peer in force: with where it is seen, if nothing else says where it is."""
    if peer.endpoint is not None or not peer.persistent_keepalive:
        return peer
    seen = _seen(peer.public_key, sightings)
    return evolve(peer, seen=seen) if seen else peer


def _seen(public_key: str, sightings: Iterable[Sighting]) -> tuple[Endpoint, ...]:
    """The endpoints that count, each once. Observers may disagree, so the order must not: the newest word first.

    `sightings` are those whose observers can know (`Sighting.counts`).
    """
    counting = sorted(
        (one for one in sightings if one.public_key == public_key and one.endpoint.public),
        key=lambda one: (-one.revision, one.observer),
    )
    return tuple(dict.fromkeys(one.endpoint for one in counting[:MOST_SEEN]))


def _version(endpoint: Endpoint) -> int:
    return 4 if endpoint.address is None else endpoint.address.version


def _yes_or_no(text: str) -> bool:
    # What opens a way must be said clearly.
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
    found = []
    for one in (record.endpoint, *record.more_endpoints):
        address = None if one is None else one.address
        if one is not None and address is not None and address.version not in taken:
            taken.add(address.version)
            found.append(one)
    return tuple(found)


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
