"""The plan for a machine that is an outside peer: a laptop that follows the mesh.

The same value as a node's, so that the same code brings it about. Each segment's leader is a WireGuard peer with all
that is granted to its segment; the mesh's subnets and the networks behind nodes go into the tunnel; nothing is
forwarded. `kgctl showconf peer` prints of it what WireGuard itself can be told.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_interface

from kilo_etcd.model import DEFAULT_PORT, Endpoint, IPAddress, IPNetwork, Node, Peer
from kilo_etcd.model.hostplan import HostPlan, PeerPlan, Problem, RoutePlan, Via
from kilo_etcd.topology.internal import Links, collapsed
from kilo_etcd.topology.segments import Topology


def peer_plan(
    topology: Topology,
    name: str,
    *,
    listen_port: int = DEFAULT_PORT,
    persistent_keepalive: int | None = None,
    families: Collection[int] = (),
    links: Collection[IPNetwork] = (),
) -> HostPlan:
    """The plan of the machine that is peer `name`. KeyError: no such peer is in force.

    `persistent_keepalive`: seconds; None: as in its record. `families` are those in which the machine reaches others
    over its underlay, none if that is not known; routes are set for those that it has an address of its own in. `links`
    are the networks that it is attached to: no internal IP of a node within is routed.
    """
    peer = topology.peers[name]
    own: dict[int, IPAddress] = {}
    for network in peer.allowed_ips:
        if network.num_addresses == 1:
            own.setdefault(network.version, network.network_address)
    keepalive = peer.persistent_keepalive if persistent_keepalive is None else persistent_keepalive
    peers: dict[str, PeerPlan] = {}
    routes: dict[IPNetwork, RoutePlan] = {}
    problems = list(topology.problems)
    near = Links.made_of(collapsed(links))

    def route(networks: Collection[IPNetwork]) -> None:
        for network in networks:
            if network.version in own:
                routes[network] = RoutePlan(destination=network, via=Via.TUNNEL, source=own[network.version])

    route(topology.snapshot.subnets)
    for segment in sorted(topology.segments.values(), key=lambda segment: segment.leader.name):
        leader = segment.leader
        endpoint = _endpoint(leader, families)
        observed = _observed(leader, peer, endpoint, families)
        used = observed or endpoint
        # What is near the machine is not elsewhere, and WireGuard's own packets must not go into the tunnel.
        amiss = {
            network
            for network in segment.internal
            if near.hold(network.version, int(network.network_address))
            or (used is not None and network.network_address == used.address)
        }
        route(segment.networks)
        route([network for network in segment.internal if network not in amiss])
        if endpoint is None and observed is None:
            problems.append(Problem(subject=leader.name, text=_unreachable(leader, families)))
        peers[leader.public_key] = PeerPlan(
            public_key=leader.public_key,
            name=leader.name,
            endpoint=used,
            observed=observed is not None,
            allowed_ips=tuple(n for n in segment.reach if n not in amiss) if amiss else segment.reach,
            persistent_keepalive=keepalive,
            preshared_key=peer.preshared_key,
        )
    return HostPlan(
        node=name,
        revision=topology.snapshot.revision,
        addresses=tuple(ip_interface(str(n)) for n in peer.allowed_ips if n.num_addresses == 1),
        listen_port=listen_port,
        peers=peers,
        routes=routes,
        problems=tuple(sorted(problems, key=lambda problem: (problem.subject, problem.text))),
    )


def _endpoint(leader: Node, families: Collection[int]) -> Endpoint | None:
    """Where the leader is reached: its first endpoint, unless the machine has no way there and has one to another."""
    fit = (
        endpoint for endpoint in leader.endpoints if endpoint.address is None or endpoint.address.version in families
    )
    return next(fit, None) if families else leader.endpoint


def _observed(leader: Node, peer: Peer, registered: Endpoint | None, families: Collection[int]) -> Endpoint | None:
    """Where to look for a leader behind NAT: where others see it, unless they see the machine behind that very NAT."""
    if registered is not None and registered.public:
        return None
    own = {endpoint.address for endpoint in peer.observed_endpoints}
    if not own and registered is not None:
        return None  # It may be at home with it for all that is known.
    return next(
        (
            endpoint
            for endpoint in leader.observed_endpoints
            if endpoint.address is not None
            and endpoint.address not in own
            and endpoint.address.version in (families or (4, 6))
        ),
        None,
    )


def _unreachable(leader: Node, families: Collection[int]) -> str:
    if leader.endpoint is None:
        return (
            f"node {leader.name} is not reached, nor what is behind it: it has no endpoint; set force-endpoint on it, "
            "or let a node that has one lead its location"
        )
    ours = " and ".join(f"IPv{version}" for version in sorted(families))
    return (
        f"node {leader.name} is not reached, nor what is behind it: its endpoint is {leader.endpoint}, and this "
        f"machine reaches others over {ours} only"
    )
