"""A WireGuard endpoint outside the mesh's hosts."""

from __future__ import annotations

from attrs import field, frozen

from kilo_etcd.model.addresses import IPNetwork
from kilo_etcd.model.endpoint import Endpoint


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
    leased: bool = False
    """Whether the record is under a lease, as that of a machine that is connected is."""
