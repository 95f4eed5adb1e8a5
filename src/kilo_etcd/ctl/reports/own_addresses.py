"""How other segments reach each address of one node under `encrypted`: through the tunnels, or in clear and why. Pure.

It joins what `kgctl status` says of single addresses (`Topology.unrouted`) and of endpoints (`topology.inclear`).
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from kilo_etcd.model import InternalIPs, IPAddress
from kilo_etcd.topology.inclear import endpoints_in_clear
from kilo_etcd.topology.places import own_addresses
from kilo_etcd.topology.segments import Topology, host_network

SEVERAL_MEMBERS = (
    "the endpoints of nodes in locations with several members are not encrypted; with granularity full they are"
)


@frozen(kw_only=True)
class OwnAddress:
    """One address of a node."""

    address: IPAddress
    internal: bool
    """It is an internal IP, and not only an endpoint."""
    in_clear: bool
    """Some segment sends there in clear."""
    not_from: tuple[str, ...] = ()
    """The segments or nodes that do, if not all."""
    why: str = ""
    """Why, with what to do."""


def own_addresses_of(topology: Topology, name: str) -> Iterator[OwnAddress]:
    """Each address of a node; none if the mesh does not encrypt or has no other segment."""
    if topology.internal_ips is not InternalIPs.ENCRYPTED or len(topology.segments) < 2:
        return
    node = topology.snapshot.nodes[name]
    internal = {ip.ip for ip in node.internal_ips}
    exposed = {address for holder, address in endpoints_in_clear(topology) if holder.name == name}
    for address in own_addresses(node):
        network = host_network(address)
        entry = next((entry for entry in topology.unrouted if entry.network == network and name in entry.nodes), None)
        if entry is not None:
            why = f"{entry.reason}; {entry.remedy}"
            yield OwnAddress(
                address=address, internal=address in internal, in_clear=True, not_from=entry.not_from, why=why
            )
        else:
            clear = address in exposed
            yield OwnAddress(
                address=address, internal=address in internal, in_clear=clear, why=SEVERAL_MEMBERS if clear else ""
            )
