"""The way of a packet from a node to an address, and of the answer, as values. Pure.

Each host's plan is computed as that host computes it, and the packet is led through them (`planning.walk`). Where the
mesh has no route for an address, the trace says how the packet goes on outside: by the exit node that its source uses,
or by the source's own routing table. What is known against a hop is `ctl.reports.hops`' concern.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address, ip_network

from attrs import evolve, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.reports.exemptions import exemptions
from kilo_etcd.ctl.reports.internal import encrypted_carries, holders, same_network, unrouted_from, why_not_routed
from kilo_etcd.ctl.reports.own_addresses import SEVERAL_MEMBERS
from kilo_etcd.model import DEFAULT_INTERFACE, InternalIPs, IPAddress, Node, Snapshot, is_public, is_within
from kilo_etcd.model.hostplan import Exemption, HostPlan, Problem, Via
from kilo_etcd.planning.encryption import Living, Outside, encrypt
from kilo_etcd.planning.exit_node import LINK_LOCAL, inside, near, trouble_of
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.reach import MemberAddress, Silent, withhold
from kilo_etcd.planning.route_filter import filter_routes
from kilo_etcd.planning.walk import Hop, Path, longest_match, walk
from kilo_etcd.store.keys import record_endings
from kilo_etcd.store.records import StatusRecord
from kilo_etcd.topology.inclear import endpoints_in_clear
from kilo_etcd.topology.internal import endpoints_of
from kilo_etcd.topology.places import has_address, is_offered, own_addresses
from kilo_etcd.topology.segments import Topology, host_network
from kilo_etcd.topology.unrouted import ENCRYPTED_REMEDY, listed

MEDIUM = {Via.TUNNEL: "WireGuard", Via.UNDERLAY: "clear", Via.IPIP: "clear, in IPIP"}

MAIN = "main"


class Unknown(ValueError):
    """A name or an address that the mesh does not know; the message is one sentence."""


@frozen(kw_only=True)
class Step:
    """One hop, in words. `over` is where on the underlay the packet goes."""

    source: str
    target: str
    encrypted: bool
    medium: str
    over: str
    table: str = MAIN
    """The routing table that `source` finds it in, and the rule and the mark by which it gets there."""
    trouble: str = ""
    """What is known against this hop, in a clause; empty: nothing."""
    broken: bool = False
    """`trouble` is that packets do not arrive by it; else it is only that they may not."""
    foreign_route: str = ""
    """The route, not the agent's, by which the kernel of `source` sends it; empty: it is not known to."""


@frozen(kw_only=True)
class TracedPath:
    """A packet's path in one direction."""

    source: str
    destination: str
    start: str = ""
    """The node that sends it."""
    holder: str = ""
    """The node whose internal IP the destination is; empty: it is none, or not reached by the mesh."""
    steps: tuple[Step, ...] = ()
    dropped: str = ""
    """Where and why a host drops it; empty: none does."""
    leaves: str = ""
    """How it goes on from the last host, outside the mesh; empty: it does not leave the mesh."""
    misdelivered: str = ""
    """Why it does not arrive although no host of the mesh drops it."""
    kernel_route: str = ""
    """The route that the first host's kernel chooses, as it says itself; empty: it was not asked."""
    unrouted: str = ""
    """Why the mesh does not carry it, if it is for another node's internal IP; empty: it does, or need not."""

    @property
    def lost(self) -> str:
        """Why it does not arrive, other than `dropped`; empty: nothing is known."""
        return self.misdelivered or next((step.trouble for step in self.steps if step.broken), "")

    @property
    def suspicion(self) -> str:
        """Why it may not arrive; empty: nothing is known."""
        return next((step.trouble for step in self.steps if step.trouble and not step.broken), "")


@frozen(kw_only=True)
class Trace:
    """There and back in one family. `back` is None where the far end is not ours to ask."""

    there: TracedPath
    back: TracedPath | None = None
    unasked: str = ""
    """Why `back` is None, in a sentence."""
    answered: bool = False
    """An echo request was sent there just now and answered: what is known against the hops matters less."""
    tried: bool = False
    """An echo request was sent there just now."""
    asked: bool = False
    """The hosts were asked to send echo requests just now: if none was `tried`, it is not known whether it arrives."""
    beside: tuple[str, ...] = ()
    """Hosts on the way at which something is known to be wrong, although echo requests are answered."""
    suspicion: str = ""
    """Why it may not work, besides what is known against single hops."""

    @property
    def paths(self) -> tuple[TracedPath, ...]:
        """There, and back if that is known."""
        return (self.there,) if self.back is None else (self.there, self.back)

    @property
    def works(self) -> bool:
        """Whether nothing is known against it, in either direction."""
        if any(path.dropped for path in self.paths):
            return False
        return self.answered or not (self.suspicion or any(path.lost or path.suspicion for path in self.paths))


class Plans(Mapping[str, HostPlan]):
    """The plan of every node, each computed when it is first asked for: a packet meets only a few.

    `statuses`: what the agents report; what they say is not reached they send nothing to.
    """

    def __init__(self, topology: Topology, statuses: Mapping[str, StatusRecord]) -> None:
        self.topology = topology
        self.statuses = statuses
        self._made: dict[str, HostPlan] = {}
        self._led: dict[str, HostPlan] = {}
        """With the routes by which packets are led."""

    def __getitem__(self, name: str) -> HostPlan:
        plan = self.of_kernel(name)
        if (encryption := plan.encryption) is None:
            return plan
        if name not in self._led:
            # The table of these comes before the main one, and what is held goes nowhere.
            routes = {**plan.routes, **encryption.send}
            why = f"{name} has no way into the tunnel for it, and sends nothing in clear"
            self._led[name] = evolve(
                plan,
                routes={network: route for network, route in routes.items() if network not in encryption.hold},
                refused={**plan.refused, **dict.fromkeys(encryption.hold, why)},
            )
        return self._led[name]

    def of_kernel(self, name: str) -> HostPlan:
        """A node's plan, in which `routes` are those of the main table alone."""
        if name not in self._made:
            if name not in self.topology.snapshot.nodes:
                raise KeyError(name)
            topology, plan = self.topology, host_plan(self.topology, name)
            # Of the networks that a host is attached to the record has only those of its internal IPs.
            near_it = [ip.network for ip in topology.snapshot.nodes[name].internal_ips]
            plan = filter_routes(plan, near_it, offered_by=topology.allocation.offered_by)
            plan = withhold(plan, topology, _silent(self.statuses.get(name)))
            living = Living(
                asked=frozenset(topology.snapshot.nodes),
                applied={other: status.revision for other, status in self.statuses.items()},
            )
            # What was found out for one host, of the whole mesh, serves the next.
            last = next(reversed(self._made.values()), None)
            outside = Outside(clear=self._clear(name))
            self._made[name] = encrypt(plan, topology, outside=outside, living=living, previous=last)
        return self._made[name]

    def _clear(self, name: str) -> tuple[Exemption, ...]:
        status = self.statuses.get(name)
        return () if status is None else exemptions(status.clear or ())

    def __iter__(self) -> Iterator[str]:
        return iter(self.topology.snapshot.nodes)

    def __len__(self) -> int:
        return len(self.topology.snapshot.nodes)


def _silent(status: StatusRecord | None) -> tuple[Silent, ...]:
    result = []
    for unreachable in status.unreachable if status is not None else ():
        with suppress(ValueError):
            target = MemberAddress(unreachable.node, ip_address(unreachable.address))
            if not unreachable.routed:
                result.append(Silent(target=target, withheld=True, named=False))
    return tuple(result)


def explain(plans: Plans, source: str, target: str) -> tuple[Trace, ...]:
    """The traces from node `source` to a node, a peer or an address, one for each family that they share.

    Unknown: `source` is no node, or `target` is no name that the mesh knows and no address.
    """
    topology = plans.topology
    snapshot = topology.snapshot
    if source not in snapshot.nodes:
        raise Unknown(_no_node(snapshot, source))
    sender = snapshot.nodes[source]
    if not sender.mesh_addresses:
        raise Unknown(f"node {source} has no mesh address yet, so nothing can be sent from it")
    destinations = _destinations(snapshot, target)
    traces = [
        _trace(topology, plans, source, own, destination)
        for destination in destinations
        if (own := _own_address(plans[source], sender, destination)) is not None
    ]
    if not traces and not _is_name(snapshot, target) and not _in_mesh(snapshot, destinations[0]):
        return (_outward(topology, plans, source, destinations[0]),)
    if not traces:
        families = " and ".join(f"IPv{address.version}" for address in sender.mesh_addresses)
        raise Unknown(f"node {source} has {families} only, in which {target} has no address")
    return tuple(traces)


def internal_traces(plans: Plans, source: str, target: str) -> tuple[Trace, ...]:
    """The traces from node `source` to the internal IPs of another node: how its partners that know it by these reach
    it. None to a name that is no node's."""
    topology = plans.topology
    nodes = topology.snapshot.nodes
    if target not in nodes or target == source:
        return ()
    result = []
    for ip in nodes[target].internal_ips:
        own = _own_address(plans[source], nodes[source], ip.ip)
        trace = _outward(topology, plans, source, ip.ip) if own is None else _trace(topology, plans, source, own, ip.ip)
        if not trace.there.holder and not same_network(topology, nodes[target], nodes[source]):
            why = why_not_routed(topology, ip.ip, nodes[target], nodes[source])
            trace = evolve(trace, there=evolve(trace.there, unrouted=why))
        result.append(trace)
    return tuple(result)


def _own_address(plan: HostPlan, sender: Node, destination: IPAddress) -> IPAddress | None:
    """The address that a node sends from: what its route prefers. None: it has none of that family in the mesh."""
    route = longest_match(plan.routes.items(), destination)
    if route is not None and route.source is not None:
        return route.source
    return sender.mesh_address(destination.version)


def _is_name(snapshot: Snapshot, target: str) -> bool:
    return target in snapshot.nodes or target in snapshot.peers


def _in_mesh(snapshot: Snapshot, address: IPAddress) -> bool:
    return is_within(address, snapshot.subnets)


def _why_rejected(snapshot: Snapshot, name: str, *, or_peer: bool = False) -> str | None:
    """Why the record of a node, or that of a peer, is not in force; None: there is none that is rejected."""
    of_node, of_peer = record_endings(name) if name else ("", "")
    endings = (of_node, of_peer) if or_peer else of_node
    return next((record.reason for record in snapshot.rejected if name and record.key.endswith(endings)), None)


def _no_node(snapshot: Snapshot, name: str) -> str:
    if (reason := _why_rejected(snapshot, name)) is not None:
        return f"node {name} is not in force: {reason}"
    if name in snapshot.peers:
        return f"{name} is a peer; explain starts at a node, so ask the other way round: the answer's way is shown too"
    return f"there is no node {name}; kgctl status lists them"


def _destinations(snapshot: Snapshot, target: str) -> tuple[IPAddress, ...]:
    if target in snapshot.nodes:
        addresses = snapshot.nodes[target].mesh_addresses
        if not addresses:
            raise Unknown(f"node {target} has no mesh address yet")
        return addresses
    if target in snapshot.peers:
        allowed = snapshot.peers[target].allowed_ips
        if not allowed:
            raise Unknown(f"peer {target} has no allowed IPs, so nothing can be sent to it")
        return tuple({network.version: network.network_address for network in reversed(allowed)}.values())
    try:
        return (ip_address(target),)
    except ValueError:
        if (reason := _why_rejected(snapshot, target, or_peer=True)) is not None:
            raise Unknown(f"{target} is not in force: {reason}") from None
        raise Unknown(f"{target} is no node, no peer and no address; kgctl status lists them") from None


def _trace(topology: Topology, plans: Plans, source: str, own: IPAddress, destination: IPAddress) -> Trace:
    nodes = topology.snapshot.nodes
    plan = plans[source]
    # What is in the mesh's subnets and has no route is refused (`HostPlan.unreachable_routes`), and does not leave.
    networks = (*plan.routes, *plan.refused, *topology.snapshot.subnets, *plan.unreachable_routes)
    routed = any(destination in network for network in networks if network.version == destination.version)
    if not routed and destination not in nodes[source].mesh_addresses:
        return _outward(topology, plans, source, destination)
    path = walk(plans, topology, source, destination, sender=own)
    there = _traced_path(path, source, own, destination, topology, plans)
    end = path.hops[-1].target if path.hops else source
    if path.dropped:
        return Trace(there=there, unasked="what does not arrive is not answered")
    if end not in nodes:
        unasked = f"{end} answers by its own configuration, which is not in etcd"
        if holders := topology.internals.holders.of(destination):
            unasked += f"; it is the internal IP of {first_of(holders, 2)} too, which the peer's allowed IPs hide"
        return Trace(there=there, unasked=unasked)
    if destination in (ip.ip for ip in nodes[end].internal_ips):
        there = evolve(there, holder=end)
    back = walk(plans, topology, end, own, sender=destination)
    return Trace(there=there, back=_traced_path(back, end, destination, own, topology, plans))


def _traced_path(
    path: Path, start: str, own: IPAddress, destination: IPAddress, topology: Topology, plans: Plans, leaves: str = ""
) -> TracedPath:  # fmt: skip
    return TracedPath(
        source=f"{start} ({own})" if has_address(topology.snapshot.nodes[start], own) else f"{own} at {start}",
        destination=str(destination),
        start=start,
        steps=tuple(
            _step(hop, topology, plans, destination, before is not None and before.encrypted)
            for before, hop in zip((None, *path.hops), path.hops, strict=False)
        ),
        dropped=path.dropped,
        leaves="" if path.dropped else leaves,
    )


def _step(hop: Hop, topology: Topology, plans: Plans, destination: IPAddress, out_of_tunnel: bool) -> Step:
    plan = plans[hop.source]
    if hop.peer is not None:
        endpoint = plan.peers[hop.peer].endpoint
        over = str(endpoint) if endpoint is not None else "the endpoint that its WireGuard has learnt"
    else:
        # The walker has taken the narrowest route; its gateway is the next node's internal IP of that family.
        target = topology.snapshot.nodes[hop.target]
        version = destination.version
        routes = (*plan.routes.values(), *(plan.returns.values() if out_of_tunnel else ()))
        gateways = {route.gateway for route in routes if route.destination.version == version}
        over = ", ".join(str(ip.ip) for ip in target.internal_ips if ip.ip in gateways) or str(destination)
    return Step(
        source=hop.source, target=hop.target, encrypted=hop.encrypted, medium=MEDIUM[hop.medium], over=over,
        table=routing_table(plan, destination, out_of_tunnel=out_of_tunnel),
    )  # fmt: skip


def routing_table(plan: HostPlan, destination: IPAddress, *, out_of_tunnel: bool = False) -> str:
    """The routing table in which a host finds its route to an address, and what leads there; numbers are those of the
    interface's default name. `out_of_tunnel`: for a packet that it has received through the tunnel."""
    if out_of_tunnel and host_network(destination) in plan.returns:
        from kilo_etcd.kernel.routing.returns import return_priority, return_table

        rule = f"rule {return_priority(DEFAULT_INTERFACE)}: iif {DEFAULT_INTERFACE}"
        return f"{return_table(DEFAULT_INTERFACE)} ({rule})"
    encryption = plan.encryption
    host = host_network(destination)
    if encryption is None or not (host in encryption.send or host in encryption.hold):
        return MAIN
    return encrypted_table()


def encrypted_table() -> str:
    """The routing table of `encrypted`, and the rule that leads there."""
    from kilo_etcd.kernel.routing.encrypted import rule_priorities, table_of
    from kilo_etcd.kernel.routing.exit_node import MARK

    priority = rule_priorities(DEFAULT_INTERFACE)[1]
    return f"{table_of(DEFAULT_INTERFACE)} (rule {priority}: not fwmark {MARK})"


# -- outside the mesh --------------------------------------------------------------------------------------------------


def _outward(topology: Topology, plans: Plans, source: str, destination: IPAddress) -> Trace:
    """The way to an address that the mesh has no route for."""
    node = topology.snapshot.nodes[source]
    if node.exit_node and not _stays(topology, plans, node, destination):
        return _by_exit_node(topology, plans, node, destination)
    leaves, misdelivered = _by_own_table(topology, node, destination)
    there = TracedPath(
        source=source, destination=str(destination), start=source, leaves=leaves, misdelivered=misdelivered
    )
    return Trace(there=there, unasked="what is outside the mesh is not known here")


def _on_own_network(node: Node, destination: IPAddress) -> bool:
    return any(ip.version == destination.version and destination in ip.network for ip in node.internal_ips)


def _stays(topology: Topology, plans: Plans, node: Node, destination: IPAddress) -> bool:
    """Whether a node that uses an exit node sends it by its own routing table all the same."""
    around = near(plans[node.name], topology)
    return _on_own_network(node, destination) or is_within(destination, around)


def _by_own_table(topology: Topology, node: Node, destination: IPAddress) -> tuple[str, str]:
    """(how it leaves the node, why it does not arrive)."""
    table = f"{node.name} sends it by its own routing table"
    segment = topology.segment_of(node.name)
    if any(destination == ip.ip for ip in node.internal_ips):
        return f"it is the internal IP of {node.name} itself", ""
    if any(destination in n for n in segment.subnets.get(node.name, ()) if n.version == destination.version):
        return f"{table}: it is in a network behind {node.name}", ""
    if any(destination in n for n in segment.location_networks if n.version == destination.version):
        return f"{table}: it is in a network of its own location", ""
    why = next((problem.text for problem in topology.problems if _about(problem, destination)), "")
    if why:
        return table, f"it is no part of the mesh, and {table} ({why})"
    owners = holders(topology, destination)
    owner = next((holder for holder in owners if holder.location == node.location), owners[0] if owners else None)
    if owner is not None and same_network(topology, owner, node):
        others = [other for other in owners if not same_network(topology, other, node)]
        too = f"; {_named_at(others, destination.version)}, elsewhere" if others else ""
        where = "at the same location" if owner.location == node.location else "on its own network"
        routed = topology.internal_ips is InternalIPs.ROUTED
        hint = f"; {ENCRYPTED_REMEDY}" if routed and encrypted_carries(topology, destination, owner, node) else ""
        return f"{table}, in clear: it is the internal IP of {owner.name} {where}{too}{hint}", ""
    if owner is not None and _on_own_network(node, destination):
        why = why_not_routed(topology, destination, owner, node) or f"{node.name} has no route to it in the mesh"
        if _maybe_one_network(topology, owner, node, destination):
            elsewhere = f"it is the internal IP of {owner.name} if both are on that network"
            return f"{table}, in clear: {elsewhere}; it is not routed: {why}", ""
        instead = f"and reaches a host on {node.name}'s own network, if there is one"
        return table, (
            f"it is the internal IP of {owner.name}, which is not routed: {why}; {table}, in clear, {instead}; "
            f"{_named_at(owners, destination.version)}"
        )
    if owner is None and (endpoint := _endpoint_in_clear(topology, node, destination)):
        return f"{table}, in clear: {endpoint}", ""
    called = [other for other in topology.snapshot.nodes.values() if _is_endpoint(other, destination)]
    near = next((other for other in called if same_network(topology, other, node)), None)
    if owner is None and near is not None:
        return f"{table}, in clear: it is the endpoint of {near.name} at the same location", ""
    if _on_own_network(node, destination):
        return f"{table}, in clear: it is on its location's network", ""
    if is_public(destination) or (called and owner is None):
        return f"{table}, outside the mesh" + (f": it is the endpoint of {called[0].name}" if called else ""), ""
    if owner is not None and topology.internal_ips is InternalIPs.OFF:
        # Routers of a site may connect its networks, and the mesh knows nothing of them.
        return (
            f"{table}, in clear; the mesh does not know whether it arrives: it is the internal IP of {owner.name}, and "
            f"{why_not_routed(topology, destination, owner, node)}; {_named_at(owners, destination.version)}"
        ), ""
    if owner is not None:
        why = why_not_routed(topology, destination, owner, node) or f"{node.name} has no route to it in the mesh"
        return (
            table,
            f"it is the internal IP of {owner.name}, which is not routed: {why}; {table}, in clear; "
            f"{_named_at(owners, destination.version)}",
        )
    return table, f"no node or peer of the mesh has it, and {table}, in clear"


def _endpoint_in_clear(topology: Topology, node: Node, destination: IPAddress) -> str:
    """Whose endpoint a packet of `node` travels to in clear although the mesh encrypts, and why, in a clause; empty: it
    is none."""
    if topology.internal_ips is not InternalIPs.ENCRYPTED:
        return ""
    if (entry := unrouted_from(topology, destination, node)) is not None:
        return f"it is the endpoint of {listed(entry.nodes)}, and not encrypted: {entry.reason}; {entry.remedy}"
    own = topology.segment_of(node.name).key
    of = (
        holder.name
        for holder, address in endpoints_in_clear(topology)
        if address == destination and topology.segment_of(holder.name).key != own
    )
    if not (name := next(of, "")):
        return ""
    return f"it is the endpoint of {name}, and {SEVERAL_MEMBERS}"


def _maybe_one_network(topology: Topology, owner: Node, node: Node, destination: IPAddress) -> bool:
    """Whether two nodes of different segments may be attached to one network, although no label says so: both have no
    label, or the tunnel between them ends at that address."""
    leads = topology.segment_of(owner.name).leader.name == owner.name
    return owner.location == node.location or (leads and destination in endpoints_of(owner, topology.policy))


def _named_at(owners: Sequence[Node], version: int) -> str:
    """At which mesh addresses the nodes are reached, of this family if they have one."""
    reached = ((node.name, node.mesh_address(version) or next(iter(node.mesh_addresses), None)) for node in owners)
    sentences = (f"{name} is reached at its mesh address {address}" for name, address in reached if address is not None)
    return "; ".join(sentences) or "it has no mesh address yet"


def _is_endpoint(node: Node, address: IPAddress) -> bool:
    return any(endpoint.address == address for endpoint in node.endpoints)


def _about(problem: Problem, destination: IPAddress) -> bool:
    """Whether it says that a network with this address in it was left out; a default route holds nobody's."""
    with suppress(ValueError):
        network = ip_network(problem.subject)
        return bool(network.prefixlen) and network.version == destination.version and destination in network
    return False


def _by_exit_node(topology: Topology, plans: Plans, node: Node, destination: IPAddress) -> Trace:
    """The way by the exit node that `node` uses. Up to there it is that of any other packet for the exit node."""
    nodes = topology.snapshot.nodes
    exit_node, version = node.exit_node, destination.version

    def refused(why: str, path: Path | None = None) -> Trace:
        there = TracedPath(source=node.name, destination=str(destination), start=node.name, dropped=why)
        if path is not None and own is not None:
            there = _traced_path(path, node.name, own, destination, topology, plans)
        return Trace(there=there, unasked="what does not arrive is not answered")

    own = node.mesh_address(version)
    if (why := trouble_of(topology, node.name)) is not None:
        return refused(why)
    at_exit = nodes[exit_node].mesh_address(version)
    if own is None or at_exit is None:
        lacking = node.name if own is None else exit_node
        return refused(
            f"{lacking} has no IPv{version} address in the mesh, so {node.name} refuses what would bypass its "
            f"exit node {exit_node} in IPv{version}"
        )
    path = walk(plans, topology, node.name, at_exit, sender=own)
    if path.dropped:
        return refused(path.dropped, path)
    for hop in path.hops:
        # Its leader, which hands on what is for the internet as it sends its own.
        if hop.source != node.name and (why := trouble_of(topology, hop.source)) is not None:
            return refused(why)
    if (why := _blocked(topology, nodes[exit_node], destination)) is not None:
        return refused(why)
    there = _traced_path(
        path, node.name, own, destination, topology, plans,
        leaves=f"{exit_node} sends it on to the internet in its own name",
    )  # fmt: skip
    back = walk(plans, topology, exit_node, own, sender=at_exit)
    return Trace(there=there, back=_traced_path(back, exit_node, at_exit, own, topology, plans))


def _blocked(topology: Topology, exit_node: Node, destination: IPAddress) -> str | None:
    """Why an exit node does not hand a packet on; None: it does. Of the networks that it is attached to, the record has
    only those of its internal IPs."""
    own = [ip.network for ip in exit_node.internal_ips if not is_public(ip.network.network_address)]
    shut = (network for network in (*own, *LINK_LOCAL) if network.version == destination.version)
    open_to = (network for network in inside(topology, exit_node.name) if network.version == destination.version)
    if any(destination in network for network in shut) and not any(destination in network for network in open_to):
        return f"{exit_node.name} leads to the internet, and not into the private networks that it is attached to"
    return None


# -- what is met on the way --------------------------------------------------------------------------------------------


def met(traces: tuple[Trace, ...]) -> frozenset[str]:
    """The names on the path."""
    steps = (step for trace in traces for path in trace.paths for step in path.steps)
    return frozenset(name for step in steps for name in (step.source, step.target))


def ends(traces: tuple[Trace, ...], topology: Topology) -> tuple[str, ...]:
    """The addresses that the hosts on the way try: the mesh addresses of the nodes that the traces begin and end at
    and pass, and the internal IPs, endpoints and addresses in offered networks that are one end of them."""
    snapshot = topology.snapshot
    nodes = [snapshot.nodes[name] for name in sorted(met(traces) & snapshot.nodes.keys())]
    mesh = [str(address) for node in nodes for address in node.mesh_addresses]
    own = {str(address) for node in nodes for address in own_addresses(node)}
    theirs = [
        path.destination
        for trace in traces
        for path in trace.paths
        if path.destination in own or is_offered(topology, ip_address(path.destination))
    ]
    return tuple(dict.fromkeys((*mesh, *theirs)))
