"""One node as it is in force: its record, with label and annotations applied and its addresses joined.

Pure. An annotation that cannot be read is as if it were not there, and is named; it never takes the node down.
The annotations `force-endpoint`, `force-internal-ip`, `persistent-keepalive` and `subnets` replace what the record
says; an empty `force-endpoint`, `persistent-keepalive` or `subnets` counts as none. `force-internal-ip` empty or `-`
means that the node has no internal IP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import ip_interface
from operator import attrgetter
from typing import Any

from attrs import evolve, fields_dict, frozen

from kilo_etcd.base.quoting import shown
from kilo_etcd.model import Endpoint, IPAddress, IPInterface, Node, ObservedEndpoint, Peer
from kilo_etcd.model.node import StatedNode
from kilo_etcd.store.records import (
    NodeRecord,
    one_per_family,
    parse_address,
    parse_interface,
    parse_keepalive,
    parse_networks,
)

MOST_SEEN = 6
"""So many observed endpoints of one node or peer count, the newest. Correct observers publish three at a time."""


@frozen
class Registered:
    """A node's record and etcd's create revision of it."""

    record: NodeRecord
    create_revision: int

    def annotated(self, annotations: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        """What the annotations set (field of the node -> value), and what is wrong with those that have no effect
        (annotation name -> reason)."""
        values: dict[str, Any] = {}
        wrong: dict[str, str] = {}
        if annotations:  # few nodes have any
            for name, annotation in ANNOTATIONS.items():
                text = annotations.get(name)
                if text or (text is not None and annotation.empty_counts):
                    try:
                        values[annotation.field] = annotation.read(text, self.record)
                    except ValueError as error:
                        wrong[name] = str(error)
        return values, wrong


def join(
    name: str,
    registered: Registered,
    annotated: Mapping[str, Any],
    *,
    label: str | None,
    addresses: tuple[IPAddress, ...],
    observed_endpoints: Iterable[ObservedEndpoint] = (),
) -> Node:
    """The node in force. `annotated` is what its annotations set."""
    record = registered.record
    node = Node(
        **{
            **dict(zip(_STATED, _stated(record), strict=True)),
            "name": name,
            "location": record.location if label is None else label,
            "more_endpoints": _others(annotated.get("endpoint", record.endpoint), record),
            "accepts_since": record.accepts_since or 0,
            "mesh_addresses": addresses,
            "default_location": record.location,
            "registered_revision": registered.create_revision,
            **annotated,
        }
    )
    if "endpoint" in annotated or not node.persistent_keepalive:
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
    value = text.strip().lower()
    if value not in ("true", "false", "1", "0", ""):
        raise ValueError(f"{shown(text)} is neither true nor false")
    return value in ("true", "1")


def _endpoint(text: str, record: NodeRecord) -> Endpoint:
    if "%" in text or len(text) > 300:
        raise ValueError(f"{shown(text)} is no endpoint: write host:port, without a zone")
    return Endpoint.parse(text, default_port=record.port)


def _others(first: Endpoint | None, record: NodeRecord) -> tuple[Endpoint, ...]:
    """The record's endpoints in the families that `first` is not in; a forced one takes the place of its family's."""
    if not record.more_endpoints and first == record.endpoint:
        return ()
    families = {first.address.version} if first is not None and first.address is not None else set()
    result = []
    for endpoint in (record.endpoint, *record.more_endpoints):
        address = None if endpoint is None else endpoint.address
        if endpoint is not None and address is not None and address.version not in families:
            families.add(address.version)
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


# --- what changes when one is set: sentences that begin after the node's name ----------------------------------------


def _endpoint_impact(old: Node, new: Node) -> Iterator[str]:
    if old.endpoint != new.endpoint:
        yield f"is reached at {new.endpoint or 'no endpoint'} instead of {old.endpoint or 'none'}"
    if lost := [f"IPv{version}" for version in (4, 6) if old.public_in(version) and not new.public_in(version)]:
        yield f"has no public endpoint in {' and '.join(lost)} any more: nodes elsewhere no longer reach it there"


def _internal_ips_impact(old: Node, new: Node) -> Iterator[str]:
    if old.internal_ips != new.internal_ips:
        yield f"has internal IP {_listed(new.internal_ips)} instead of {_listed(old.internal_ips)}"


def _keepalive_impact(old: Node, new: Node) -> Iterator[str]:
    if old.persistent_keepalive != new.persistent_keepalive:
        yield f"sends keepalives every {new.persistent_keepalive} s instead of {old.persistent_keepalive} s (0: none)"


def _leader_impact(old: Node, new: Node) -> Iterator[str]:
    if old.leader_wanted != new.leader_wanted:
        yield f"is {'now' if new.leader_wanted else 'no longer'} preferred as its location's leader"


def _advertise_impact(old: Node, new: Node) -> Iterator[str]:
    if old.advertises_exit_node != new.advertises_exit_node:
        yield (
            "advertises itself as an exit node"
            if new.advertises_exit_node
            else "does not advertise itself as an exit node any more"
        )


def _exit_node_impact(old: Node, new: Node) -> Iterator[str]:
    if old.exit_node != new.exit_node:
        way = f"{new.exit_node}, through the tunnel" if new.exit_node else "its own network again"
        yield f"leaves for the internet by {way}"


def _subnets_impact(old: Node, new: Node) -> Iterator[str]:
    if set(old.subnets) != set(new.subnets):
        yield f"leads to networks behind it: {_listed(new.subnets)} instead of {_listed(old.subnets)}"


def _location_networks_impact(old: Node, new: Node) -> Iterator[str]:
    if set(old.allowed_location_ips) != set(new.allowed_location_ips):
        new_networks, old_networks = new.allowed_location_ips, old.allowed_location_ips
        yield f"leads to networks of its location: {_listed(new_networks)} instead of {_listed(old_networks)}"


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items)) or "none"


# --- the table -------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Annotation:
    """One annotation."""

    field: str
    """The field of the node that it sets. Without it that is what the node's record says, or else the default."""
    read: Callable[[str, NodeRecord], Any]
    """The field's value by the annotation's text and the node's record. ValueError."""
    impact: Callable[[Node, Node], Iterator[str]]
    """What changes with the field from one state of a node to another, in sentences that begin after its name."""
    empty_counts: bool = False
    """Whether an empty text says something; else it counts as none."""
    offers_networks: bool = False


ANNOTATIONS: Mapping[str, Annotation] = {
    "force-endpoint": Annotation(field="endpoint", read=_endpoint, impact=_endpoint_impact),
    "force-internal-ip": Annotation(
        field="internal_ips", read=_internal_ips, impact=_internal_ips_impact, empty_counts=True
    ),
    "persistent-keepalive": Annotation(
        field="persistent_keepalive", read=lambda text, _: parse_keepalive(text), impact=_keepalive_impact
    ),
    "leader": Annotation(
        field="leader_wanted", read=lambda text, _: text.lower() not in ("0", "false"), impact=_leader_impact
    ),
    "advertise-exit-node": Annotation(
        field="advertises_exit_node", read=lambda text, _: _yes_or_no(text), impact=_advertise_impact
    ),
    # Any text counts: a name that nobody has leads nowhere, while none at all would let everything out.
    "exit-node": Annotation(field="exit_node", read=lambda text, _: text.strip(), impact=_exit_node_impact),
    "subnets": Annotation(
        field="subnets",
        read=lambda text, record: parse_networks(text) or record.subnets,
        impact=_subnets_impact,
        offers_networks=True,
    ),
    "allowed-location-ips": Annotation(
        field="allowed_location_ips",
        read=lambda text, _: parse_networks(text),
        impact=_location_networks_impact,
        offers_networks=True,
    ),
}
"""All annotations, by name, in the order in which `kgctl` tells of their impact."""

_STATED = tuple(fields_dict(StatedNode))
_stated = attrgetter(*_STATED)
