"""The endpoint by which one node calls another's WireGuard. Pure."""

from __future__ import annotations

from kilo_etcd.model import (
    DEFAULT_LOCATION,
    Endpoint,
    IPAddress,
    Node,
)
from kilo_etcd.topology.families import endpoint_for, same_site
from kilo_etcd.topology.nat import observed_endpoint
from kilo_etcd.topology.next_hop import local_endpoint


def chosen_endpoint(own: Node, other: Node, near: bool) -> tuple[Endpoint | None, Endpoint | None]:
    """(where another segment's node says that it is reached, where it is seen through its NAT)."""
    # The default location is whoever has no label, which promises no common network: a full mesh needs no labels.
    public = other.endpoint is not None and other.endpoint.public
    inside = near and (own.location != DEFAULT_LOCATION or not public)
    endpoint = local_endpoint(own, other) if inside else endpoint_for(own, other)
    if other.observed_endpoints and not (inside and own.location != DEFAULT_LOCATION):
        return endpoint, observed_endpoint(own, other, endpoint)
    return endpoint, None


def called_at(own: Node, other: Node) -> IPAddress | None:
    """The address at which leader `own` calls the WireGuard of leader `other`, if `other` states it: not where that is
    seen through a NAT."""
    near = other.location == own.location and same_site(own, other)
    endpoint, observed = chosen_endpoint(own, other, near)
    return None if endpoint is None or observed is not None else endpoint.address
