"""Follows a packet through the mesh: given all host plans, which way does it take, and where does it end?

Each host is asked as its kernel would: the longest matching route, of a table of its own for what comes out of the
tunnel (`HostPlan.returns`) before those of the main table, WireGuard's choice of a peer by allowed
IPs, and at the far end WireGuard's check that the source address belongs to the peer it came from. The walker
trusts nothing but the plans, so it finds what is wrong with them. A connection works if both directions do.

It knows nothing of real links: a host that is down, a firewall, a wrong endpoint are not seen here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from attrs import evolve, frozen

from kilo_etcd.model import IPAddress, IPNetwork, Node
from kilo_etcd.model.hostplan import HostPlan, PeerPlan, RoutePlan, Via
from kilo_etcd.topology.nat import hopeless
from kilo_etcd.topology.places import has_address
from kilo_etcd.topology.segments import Topology, UnknownNode

T = TypeVar("T")


@frozen(kw_only=True)
class Hop:
    """One step, between two names of nodes (the last may go to an outside peer)."""

    source: str
    target: str
    medium: Via
    peer: str | None = None
    """The public key of the receiving end of the tunnel."""

    @property
    def encrypted(self) -> bool:
        """Whether the packet is inside WireGuard on this step."""
        return self.medium is Via.TUNNEL


@frozen(kw_only=True)
class Path:
    """The steps taken; `dropped` says at whom and why the packet ends before its goal, or is empty."""

    source: IPAddress | None
    destination: IPAddress | None
    hops: tuple[Hop, ...] = ()
    dropped: str = ""

    @property
    def delivered(self) -> bool:
        """Whether the packet arrived."""
        return not self.dropped

    def __str__(self) -> str:
        steps = "".join(f" -{hop.medium}-> {hop.target}" for hop in self.hops)
        end = f" dropped: {self.dropped}" if self.dropped else " delivered"
        return (self.hops[0].source if self.hops else "here") + steps + end


def walk(
    plans: Mapping[str, HostPlan],
    topology: Topology,
    source: str,
    destination: IPAddress | str,
    *,
    sender: IPAddress | None = None,
) -> Path:
    """The path of a packet from node `source` to an address, or to a node's first mesh address that fits.

    `sender` is the packet's source address (for one that a host forwards, such as an outside peer's answer);
    without it, the one that the first route prefers. UnknownNode: `source` or `destination` is no node.
    """
    nodes = topology.snapshot.nodes
    if source not in nodes:
        raise UnknownNode(source)
    if isinstance(destination, str):
        if destination not in nodes:
            raise UnknownNode(destination)
        versions = [address.version for address in nodes[source].mesh_addresses]
        fitting = [a for a in nodes[destination].mesh_addresses if not versions or a.version in versions]
        if not fitting:
            why = f"{source} and {destination} have no mesh address of one family"
            return Path(source=sender, destination=None, dropped=why)
        destination = fitting[0]
    return _Walker(plans, topology, destination).walk(source, sender)


def walk_both(
    plans: Mapping[str, HostPlan], topology: Topology, one: str, other: str, version: int
) -> tuple[Path, Path]:
    """There and back between the mesh addresses of two nodes in family `version`, which both must have."""
    there, back = (topology.snapshot.nodes[name].mesh_address(version) for name in (other, one))
    if there is None or back is None:
        raise ValueError(f"{one} and {other} do not both have a mesh address of IPv{version}")
    return walk(plans, topology, one, there), walk(plans, topology, other, back)


def longest_match(networks: Iterable[tuple[IPNetwork, T]], address: IPAddress) -> T | None:
    """The value of the narrowest network that holds `address`."""
    best, length = None, -1
    for network, value in networks:
        if network.version == address.version and network.prefixlen > length and address in network:
            best, length = value, network.prefixlen
    return best


def refusal(plan: HostPlan, address: IPAddress) -> str | None:
    """Why a host refuses packets for `address` although the mesh knows a way; None: it does not."""
    if not plan.refused:
        return None
    routed = ((network, None) for network in plan.routes)
    return longest_match((*routed, *plan.refused.items()), address)


class _Walker:
    def __init__(self, plans: Mapping[str, HostPlan], topology: Topology, destination: IPAddress) -> None:
        self.plans, self.topology, self.destination = plans, topology, destination
        self.names = {node.public_key: name for name, node in topology.snapshot.nodes.items()}
        self.internal = any(
            destination == ip.ip for node in topology.snapshot.nodes.values() for ip in node.internal_ips
        )
        """Whether a node has the destination on its own links."""

    def walk(self, start: str, sender: IPAddress | None) -> Path:
        path = Path(source=sender, destination=self.destination)
        at, visited = start, {start}
        while not self._is_home(at):
            plan = self.plans.get(at)
            if plan is None:
                return evolve(path, dropped=f"the plan of {at} is not known")
            if at != start and self.destination.version not in plan.forwarding:
                return evolve(path, dropped=f"{at} does not forward IPv{self.destination.version}")
            out_of_tunnel = bool(path.hops) and path.hops[-1].encrypted
            route = longest_match(plan.returns.items(), self.destination) if out_of_tunnel else None
            if route is None:
                if out_of_tunnel and (why := longest_match(plan.returns_refused.items(), self.destination)) is not None:
                    return evolve(path, dropped=why)
                if (why := refusal(plan, self.destination)) is not None:
                    return evolve(path, dropped=why)
                route = self._route(at, plan, self.destination)
            if route is None and self.internal:
                step = self._on_link(at)
                if isinstance(step, str):
                    return evolve(path, dropped=step)
                own = self.topology.snapshot.nodes[at].internal_ip(self.destination.version)
                source = path.source or (None if own is None else own.ip)
                path, at = evolve(path, source=source, hops=(*path.hops, step)), step.target
                if at in visited:
                    return evolve(path, dropped=f"it comes back to {at}: a routing loop")
                visited.add(at)
                continue
            if route is None:
                return evolve(path, dropped=f"{at} has no route to {self.destination}")
            if path.source is None:
                if route.source is None:
                    return evolve(path, dropped=f"{at} has no address to send from")
                path = evolve(path, source=route.source)
            step = self._tunnel(at, plan, path.source) if route.via is Via.TUNNEL else self._local(at, plan, route)
            if isinstance(step, str):
                return evolve(path, dropped=step)
            path = evolve(path, hops=(*path.hops, step))
            if step.target not in self.topology.snapshot.nodes:
                return path  # Outside peers deliver by themselves.
            at = step.target
            if at in visited:
                return evolve(path, dropped=f"it comes back to {at}: a routing loop")
            visited.add(at)
        return path

    def _route(self, at: str, plan: HostPlan, address: IPAddress) -> RoutePlan | None:
        """The route that the host's kernel takes; None: none of the plan's, but one over its own links or none."""
        node = self.topology.snapshot.nodes[at]
        links = (*(ip.network for ip in node.internal_ips), *(node.underlay or ()))
        planned: list[tuple[IPNetwork, RoutePlan | None]] = list(plan.routes.items())
        if self.internal or address != self.destination:
            planned += [(network, None) for network in links if network not in plan.routes]
        return longest_match(planned, address)

    def _on_link(self, at: str) -> Hop | str:
        """Where a packet ends that leaves over the location's own network."""
        own = self.topology.snapshot.nodes[at]
        target = self._with_internal_ip(own, self.destination)
        if target is None:
            return f"{at} sends it over its own links, where no node has {self.destination}"
        return Hop(source=at, target=target.name, medium=Via.UNDERLAY)

    def _is_home(self, name: str) -> bool:
        """Whether the packet is for the node, or for a network behind it that is no node's."""
        node = self.topology.snapshot.nodes[name]
        if has_address(node, self.destination):
            return True
        segment = self.topology.segment_of(name)
        behind = segment.subnets.get(name, ())
        if name == segment.leader.name:
            behind += segment.location_networks
        return any(n.version == self.destination.version and self.destination in n for n in behind)

    def _tunnel(self, at: str, plan: HostPlan, sender: IPAddress | None) -> Hop | str:
        peer = self._peer_for(plan, self.destination)
        if peer is None:
            return f"{at} has no WireGuard peer whose allowed IPs hold {self.destination}"
        target = self.names.get(peer.public_key)
        if target is None:
            return Hop(source=at, target=f"peer {peer.name}", medium=Via.TUNNEL, peer=peer.public_key)
        target_plan = self.plans.get(target)
        if target_plan is None:
            return f"the plan of {target} is not known"
        own_key = self.topology.snapshot.nodes[at].public_key
        back = target_plan.peers.get(own_key)
        if back is None:
            return f"{target} has no WireGuard peer {at}"
        if peer.endpoint is None and back.endpoint is None:
            return f"neither of {at} and {target} knows an endpoint of the other"
        if peer.endpoint is not None and (address := peer.endpoint.address) is not None:
            route = self._route(at, plan, address)
            # Under `encrypted` WireGuard's own packets pass those by their mark.
            passed = plan.encryption is not None and route is not None and route.destination in plan.encryption.send
            if route is not None and route.via is Via.TUNNEL and not passed:
                return f"{at} routes {address}, the endpoint of {target}, into the tunnel"
        if (why := hopeless(self.topology.snapshot.nodes[at], self.topology.snapshot.nodes[target])) is not None:
            return why
        expected = None if sender is None else self._peer_for(target_plan, sender)
        if expected is None or expected.public_key != own_key:
            of = "nobody" if expected is None else expected.name
            return f"{target} does not take {sender} from {at}: by its allowed IPs the address belongs to {of}"
        return Hop(source=at, target=target, medium=Via.TUNNEL, peer=peer.public_key)

    @staticmethod
    def _peer_for(plan: HostPlan, address: IPAddress) -> PeerPlan | None:
        return longest_match(((n, peer) for peer in plan.peers.values() for n in peer.allowed_ips), address)

    def _local(self, at: str, plan: HostPlan, route: RoutePlan) -> Hop | str:
        own = self.topology.snapshot.nodes[at]
        gateway = route.gateway
        target = None if gateway is None else self._with_internal_ip(own, gateway)
        if gateway is None or target is None:
            return f"the gateway {gateway} of {at} is no node of its location"
        if route.via is Via.UNDERLAY:
            own_ip = own.internal_ip(gateway.version)
            if own_ip is None or gateway not in own_ip.network:
                return f"the gateway {gateway} is not a neighbour of {at}"
        else:
            target_plan = self.plans.get(target.name)
            if target_plan is None or plan.ipip_local is None or plan.ipip_local not in target_plan.ipip_remotes:
                return f"{target.name} does not take IPIP from {at}"
            if gateway not in plan.ipip_remotes:
                return f"{at} has no IPIP tunnel to {gateway}"
        return Hop(source=at, target=target.name, medium=route.via)

    def _with_internal_ip(self, own: Node, address: IPAddress) -> Node | None:
        for node in self.topology.snapshot.nodes.values():
            if node.location == own.location and any(address == ip.ip for ip in node.internal_ips):
                return node
        return None
