"""Internal IPs that an annotation gives a host and that it does not have. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kilo_etcd.model import InternalIPs, IPAddress, IPNetwork, Node
from kilo_etcd.topology.segments import Topology

_IS_NONE = ", forced by annotation, is none of this host's addresses"


def missing_addresses(
    topology: Topology, name: str, addresses: Collection[IPAddress], networks: Iterable[IPNetwork]
) -> tuple[str, ...]:
    """A sentence for each internal IP of the node `name`, forced by annotation, that is not among its host's
    `addresses`; `networks` are those that the host is attached to.

    A NAT that translates one to one may lead the members of its location to such an address, unless the host is
    attached to that network itself. What arrives through a tunnel has passed no NAT, so that where internal IPs are
    routed the address is wrong in any case.
    """
    node = topology.snapshot.nodes.get(name)
    if node is None or not addresses:
        return ()
    attached = [network for network in networks if network.num_addresses > 1]
    routed = topology.internal_ips is not InternalIPs.OFF and len(topology.segments) > 1
    result = []
    for ip in (interface.ip for interface in node.internal_ips):
        near = any(ip in network for network in attached)
        if ip in addresses or not (near or routed):
            continue
        nat = "" if near else "; what a NAT translates to this host is an endpoint (force-endpoint), no internal IP"
        result.append(
            f"{ip}{_IS_NONE}, so it does not take packets for it: name one that it has (kgctl annotate {name} "
            f"force-internal-ip=ADDRESS), or take the annotation back (kgctl annotate {name} force-internal-ip-){nat}"
        )
    return tuple(result)


def lacks(node: Node, missing: Collection[str]) -> bool:
    """Whether an internal IP of the node is among these."""
    return any(str(interface.ip) in missing for interface in node.internal_ips)


def missing_in(errors: Iterable[str]) -> frozenset[str]:
    """The addresses that these errors of an agent's name as missing."""
    return frozenset(error.partition(_IS_NONE)[0] for error in errors if _IS_NONE in error)
