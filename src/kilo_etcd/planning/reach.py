"""Which members of a location a host needs to reach at their internal IPs, and its plan where some do not answer.

That two nodes have one label, or none, says that they share a network; nothing ensures it. If they do not, packets for
the other's private address leave by the default route, in clear, to whoever has that address there. So a host sends
none of the mesh's packets to an internal IP that has never answered: those routes are taken out of its plan, and where
no other route of the plan takes such packets they are refused. Each pair is named, with the remedy.

The agent finds out which members answer (`agent.probing.reachability`); here it is a value that goes into the plan.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from attrs import evolve, frozen

from kilo_etcd.model import IPAddress, IPNetwork, Node
from kilo_etcd.model.hostplan import HostPlan, Problem, RoutePlan
from kilo_etcd.topology.families import same_site
from kilo_etcd.topology.next_hop import next_hop, tunneled
from kilo_etcd.topology.prefix_allocation import network_key
from kilo_etcd.topology.segments import Topology, host_network

MOST_NAMED = 8
"""Pairs that are named one by one: the sentences are part of a record in etcd."""


@frozen(cache_hash=True)
class MemberAddress:
    """A member of the location, and where it is asked: at an internal IP, or at a mesh address if it is reached through
    the tunnel."""

    node: str
    address: IPAddress


@frozen(kw_only=True)
class Silent:
    """A target that does not answer."""

    target: MemberAddress
    withheld: bool
    """It has never answered, so nothing is sent to it; else it did once, and its routes stay."""
    tunneled: bool = False
    """It is reached through the tunnel: its packets are encrypted, and nothing has to be withheld."""
    route: str = ""
    """The kernel's route to it, if that is not the plan's."""
    named: bool
    """It is to be reported: it was tried often enough, and its agent lives."""


def targets(topology: Topology, name: str) -> dict[MemberAddress, Node]:
    """Where node `name` reaches the members of its location. UnknownNode.

    In a `full` mesh that is nowhere: each node is a segment of its own.
    """
    own, families = topology.snapshot.nodes[name], topology.families
    return {target: node for node in local_members(topology, name) for target in targets_of(own, node, families)}


def targets_of(own: Node, node: Node, families: Collection[int]) -> tuple[MemberAddress, ...]:
    """Where `own` reaches one member of its location, for packets of these families."""
    if tunneled(own, node):
        versions = {address.version for address in own.mesh_addresses}
        return tuple(
            MemberAddress(node.name, mesh_address)
            for mesh_address in node.mesh_addresses
            if mesh_address.version in versions
        )
    hops = (next_hop(own, node, version) for version in sorted(families))
    gateways = (hop.gateway for hop in hops if hop is not None and hop.gateway is not None)
    return tuple(MemberAddress(node.name, gateway) for gateway in dict.fromkeys(gateways))


def local_members(topology: Topology, name: str) -> list[Node]:
    """The nodes that node `name` reaches inside its location."""
    own = topology.snapshot.nodes[name]
    if topology.policy.direct_within_location:
        near = (segment.leader for segment in topology.segments.values() if segment.location == own.location)
        return [node for node in near if node.name != name and same_site(own, node)]
    return [node for node in topology.segment_of(name).members if node.name != name]


def withhold(plan: HostPlan, topology: Topology, silent: Collection[Silent]) -> HostPlan:
    """`plan`, complete otherwise, without the routes to targets that never answered; who does not answer is named.

    A member sends what it withholds by its leader instead, where that one answers; all else is refused. `plan` itself
    where everybody answers.
    """
    if not silent:
        return plan
    segment = topology.segment_of(plan.node)
    leader = "" if segment.leader.name == plan.node else segment.leader.name
    withheld = {member.target for member in silent if member.withheld}
    routes, refused = _rerouted(plan, topology, leader, withheld) if withheld else (plan.routes, {})
    silent_addresses = {target.address for target in withheld}
    if silent_addresses:
        silent_addresses -= {target.address for target in targets(topology, plan.node) if target not in withheld}
    refused_returns = {} if leader else _refused_returns(topology, plan.node, silent_addresses)
    remotes = plan.ipip_remotes - silent_addresses
    exit_route = plan.exit_route
    if exit_route is not None and any(
        MemberAddress(leader, route.gateway) in withheld for route in exit_route.by if route.gateway
    ):
        exit_route = evolve(exit_route, by=())
    return evolve(
        plan,
        routes=routes,
        unreachable_routes=(
            *plan.unreachable_routes,
            *sorted(set(refused).difference(plan.unreachable_routes), key=network_key),
        ),
        refused=refused,
        returns={n: route for n, route in plan.returns.items() if route.gateway not in silent_addresses},
        returns_refused=refused_returns,
        ipip_remotes=remotes,
        ipip_local=plan.ipip_local if remotes else None,
        exit_route=exit_route,
        problems=(*plan.problems, *_problems(topology, plan.node, leader, silent)),
    )


def _refused_returns(topology: Topology, leader: str, silent_addresses: Collection[IPAddress]) -> dict[IPNetwork, str]:
    """The members' internal IPs, of those that do not answer their leader, that other segments send to; and why not."""
    if not silent_addresses:
        return {}
    segment = topology.segment_of(leader)
    return {
        network: f"{node.name} does not answer {leader} at its internal IP {network.network_address}"
        for node in segment.members
        if node.name != leader
        for network in segment.reached_at(node)
        if network.network_address in silent_addresses
    }


def _rerouted(
    plan: HostPlan, topology: Topology, leader: str, withheld: Collection[MemberAddress]
) -> tuple[dict[IPNetwork, RoutePlan], dict[IPNetwork, str]]:
    """(the routes that are left, what is refused and why)."""
    direct: dict[IPNetwork, str] = {}
    for node in local_members(topology, plan.node):
        networks = topology.segment_of(node.name).subnets.get(node.name, ())
        direct.update(dict.fromkeys((*map(host_network, node.mesh_addresses), *networks), node.name))
    addresses = {target.address for target in withheld}
    tunneled = {target.node: target for target in withheld if host_network(target.address) in direct}
    routes: dict[IPNetwork, RoutePlan] = {}
    lost = {host_network(target.address): target for target in tunneled.values()}
    for network, route in plan.routes.items():
        node_there = direct.get(network, leader)
        if route.gateway is None:
            target = tunneled.get(node_there)
        else:
            target = MemberAddress(node_there, route.gateway)
        if target is not None and target.address in addresses and target in withheld:
            lost[network] = target
        else:
            routes[network] = route
    if leader in tunneled:
        # A node with a tunnel of its own, and no route since the mesh's covers it too, is reached as before.
        for network in direct.keys() - plan.routes.keys() - lost.keys():
            subnet_route = next(
                (plan.routes[subnet] for subnet in topology.snapshot.subnets if _within(network, subnet)), None
            )
            if subnet_route is not None:
                routes[network] = evolve(subnet_route, destination=network)
    outward = {network.version: routes[network] for network in topology.snapshot.subnets if network in routes}
    refused = {}
    for network, target in lost.items():
        if leader and network in direct and network.version in outward:
            if not any(_within(network, subnet) for subnet in topology.snapshot.subnets):
                routes[network] = evolve(outward[network.version], destination=network)
        else:
            at = f"at {target.address}" if target in tunneled.values() else f"at its internal IP {target.address}"
            refused[network] = f"{target.node} does not answer {plan.node} {at}"
    return routes, refused


def _within(network: IPNetwork, subnet: IPNetwork) -> bool:
    no_wider = network.version == subnet.version and network.prefixlen >= subnet.prefixlen
    return no_wider and network.network_address in subnet


def _problems(topology: Topology, name: str, leader: str, silent: Collection[Silent]) -> list[Problem]:
    named = sorted(
        (member for member in silent if member.named),
        key=lambda member: (
            member.target.node != leader,
            not member.withheld,
            member.target.node,
            member.target.address.version,
        ),
    )
    where = called_location(topology.snapshot.nodes[name].location)
    through = leader if all(member.target.node != leader for member in silent if member.withheld) else ""
    others = {node.name for node in topology.segment_of(name).members} - {name}
    # If none of several answers, it is more likely this host that is labelled wrong.
    stranger = (
        name if len(others) > 1 and others == {member.target.node for member in silent if member.withheld} else ""
    )
    problems = []
    for member in named[:MOST_NAMED]:
        text = _sentence(name, member, where, leader, through, stranger or member.target.node)
        problems.append(Problem(subject=member.target.node, text=text))
    if (more := len(named) - MOST_NAMED) > 0:
        text = f"{more} more members of {where} do not answer {name} at their internal IPs; kgctl explain names each"
        problems.append(Problem(subject=name, text=text))
    return problems


def called_location(location: str) -> str:
    """A location, for people."""
    return f"location {location}" if location else "the default location, which is that of hosts without a label"


def apart(node: str, hosts: str, where: str) -> str:
    """What to do if hosts share no network, as the beginning of a sentence. `hosts`: "the two" or "they"; `where`:
    "both are at location gcp"."""
    return f"if {hosts} share no network, label them apart (kgctl location set {node} NAME; {where})"


def share(node: str) -> str:
    """What else to do, as its end."""
    return (
        f" or take the address away (kgctl annotate {node} force-internal-ip=-); if they do, let UDP 1107 "
        "(--peer-query-port) or ICMP echo pass between them, or set --encapsulate wireguard"
    )


_ANOTHER_ROUTE = "takes another route than the agent's: "


def _sentence(name: str, silent: Silent, where: str, leader: str, through: str, labelled: str) -> str:
    """`labelled`: the node to be labelled apart."""
    node, address = silent.target.node, silent.target.address
    called = f"{node}, its leader," if node == leader else node
    if silent.route:
        return (
            f"{called} does not answer {name} at {address}, to which the kernel of {name} {_ANOTHER_ROUTE}"
            f"{silent.route}; remove that rule or route of another program on {name} (ip rule, ip route)"
        )
    labels = apart(labelled, "the two", f"both are at {where}")
    if silent.tunneled:
        return (
            f"{called} does not answer {name} through their tunnel inside the location, although its agent lives: let "
            f"UDP 51820 (--port) pass between them; {labels}"
        )
    remedy = labels + share(labelled)
    if not silent.withheld:
        return (
            f"{called} no longer answers {name} at its internal IP {address}, although its agent lives: is the "
            f"location's network up? {remedy}"
        )
    follows = f"so {name} sends it nothing"
    if node == leader:
        follows += " and is cut off from all other locations"
    elif through:
        follows = f"so {name} reaches it through {through}, the leader of both"
    return f"{called} has never answered {name} at its internal IP {address}, {follows}: {remedy}"


_ABOUT = re.compile(
    r"(?P<node>\S+?)(, its leader,)? (has never answered|no longer answers|does not answer) \S+ (at|through) "
    r"|\d+ more members of "
).match


def about_member(text: str) -> str | None:
    """The member that a sentence of ours says does not answer; empty: several; None: it is another sentence."""
    match = _ABOUT(text)
    return None if match is None else match["node"] or ""


def names_route(text: str) -> bool:
    """Whether a sentence of ours on a member that does not answer names another program's route as the reason."""
    return about_member(text) is not None and _ANOTHER_ROUTE in text
