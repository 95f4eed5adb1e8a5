"""Whether the mesh routes an internal IP from a node, and why not. Pure.

It is the rule of `topology.internal` (decision 0029) in sentences; what the hosts' plans then hold is
`ctl.reports.trace`'s to follow.
"""

from __future__ import annotations

from kilo_etcd.model import InternalIPs, IPAddress, Node
from kilo_etcd.topology.internal import REMEDY
from kilo_etcd.topology.places import exchanged
from kilo_etcd.topology.segments import Topology, host_network
from kilo_etcd.topology.unrouted import ENCRYPTED_REMEDY, Unrouted, endpoint_holders, named, obstacle


def holders(topology: Topology, address: IPAddress) -> tuple[Node, ...]:
    """The nodes that have it as an internal IP, by name."""
    nodes = topology.snapshot.nodes
    return tuple(nodes[name] for name in sorted(nodes) if any(address == ip.ip for ip in nodes[name].internal_ips))


def same_network(topology: Topology, one: Node, other: Node) -> bool:
    """Whether two nodes reach each other's internal IPs over a network of their location's own, if at all."""
    there, here = topology.segment_of(one.name), topology.segment_of(other.name)
    return there.key == here.key or not topology.policy.share_no_site(there.site, here.site)


def unrouted_from(topology: Topology, address: IPAddress, source: Node) -> Unrouted | None:
    """What `kgctl status` says of an address that node `source` does not reach by the mesh; None: nothing."""
    names = {source.name, named(topology.segment_of(source.name))}
    return next(
        (
            entry
            for entry in topology.unrouted
            if entry.network == host_network(address) and (not entry.not_from or names.intersection(entry.not_from))
        ),
        None,
    )


def why_not_routed(topology: Topology, address: IPAddress, holder: Node, source: Node) -> str:
    """Why what node `source` sends to an internal IP of `holder`, elsewhere, does not travel in the mesh, in a clause;
    empty: nothing in the mesh as a whole prevents it."""
    if topology.internal_ips is InternalIPs.OFF:
        setting = topology.snapshot.internal_ips
        if setting is InternalIPs.OFF:
            return "the mesh carries no internal IPs (kgctl mesh set internal-ips routed)"
        return f"internal-ips {setting} waits for agents that do not know it (kgctl status names them)"
    if topology.internal_ips is InternalIPs.ENCRYPTED:
        entry = unrouted_from(topology, address, source)
        return "" if entry is None else f"{entry.reason}; {entry.remedy}"
    why = _not_routed(topology, address, holder, source)
    return f"{why}; {ENCRYPTED_REMEDY}" if why and encrypted_carries(topology, address, holder, source) else why


def encrypted_carries(topology: Topology, address: IPAddress, holder: Node, source: Node) -> bool:
    """Whether, in a mesh that does not encrypt, what node `source` sends to an address of `holder` would travel in the
    tunnels if it did."""
    from kilo_etcd.topology.inclear import would_be_encrypted

    there, here = topology.segment_of(holder.name), topology.segment_of(source.name)
    return exchanged(here, there, topology.policy) and address in would_be_encrypted(topology)


def _not_routed(topology: Topology, address: IPAddress, holder: Node, source: Node) -> str:
    """The same under `routed`."""
    there, here = topology.segment_of(holder.name), topology.segment_of(source.name)
    if (reasons := obstacle(topology, address, holder.name, there, endpoint_holders(topology))) is not None:
        return "; ".join(reasons)
    if host_network(address) not in there.internal:
        return f"the leader of its segment, {there.leader.name}, does not reach {holder.name} there"
    if (network := here.links.holding(address)) is not None:
        for entry in topology.unrouted:
            if entry.outliers and address in entry.network and named(here) in entry.not_from:
                return f"{entry.reason}; {entry.remedy}"
        return f"{source.name} or a host of its segment reaches {network} over its own links; {REMEDY}"
    if address.version in here.called and host_network(address) in there.front:
        caller = here.leader.name
        return (
            f"the WireGuard of {caller}, called at a private endpoint, may receive packets from the WireGuard of "
            f"{holder.name} there"
        )
    return ""
