"""From a topology to the plan that goes to the kernel: each step, in order, for a node and for a peer. Pure.

A host's `Surroundings` are what it alone knows, gathered by those who may wait for it; the rest follows from the
topology. `HostPlans` holds the plan at the steps at which others need it, and is the predecessor of the next one, which
costs as much as has changed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from attrs import evolve, field, frozen

from kilo_etcd.model import IPAddress, IPNetwork, Node
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.encryption import NOBODY_ASKED, Living, Outside, StageReport, encrypt
from kilo_etcd.planning.exit_node import as_exit_node, through, with_exit_node
from kilo_etcd.planning.names import NO_REASONS, Reasons, Table, names_of, resolve_plan
from kilo_etcd.planning.peerplan import peer_plan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.reach import Silent, withhold
from kilo_etcd.planning.route_filter import filter_routes, within
from kilo_etcd.topology.segments import Topology


@frozen(kw_only=True)
class EncryptionInputs:
    """What a host knows of the switch to `encrypted`, as `planning.encryption.encrypt` takes it."""

    outside: Outside
    living: Living = NOBODY_ASKED
    stage_report: StageReport | None = None


@frozen(kw_only=True)
class Surroundings:
    """What one host knows of itself and of the networks around it."""

    table: Table = field(factory=dict)
    failed: Reasons = NO_REASONS
    """DNS names that could not be looked up."""
    etcd: tuple[IPNetwork, ...] = ()
    """etcd's addresses, as far as they are known."""
    etcd_unresolved: tuple[str, ...] = ()
    """The DNS names of etcd that no address is known of."""
    underlay: tuple[IPNetwork, ...] = ()
    """The networks and gateways that the host's packets take to others."""
    families: Collection[int] = ()
    """The families (4, 6) in which it reaches others; none: not known."""
    sources: tuple[IPAddress, ...] = ()
    """Its own addresses on the underlay."""
    addresses: frozenset[IPAddress] = frozenset()
    """All addresses that it has; none: not known."""
    silent: tuple[Silent, ...] = ()
    """The members of its location that have never answered it."""
    encryption: EncryptionInputs | None = None
    """None: `encrypted` does not concern it."""

    @property
    def protected(self) -> tuple[IPNetwork, ...]:
        """Networks that no route into the tunnel may cover."""
        return (*self.etcd, *self.underlay)


@frozen(kw_only=True)
class HostPlans:
    """The plan of one node or peer after the steps at which others look at it."""

    raw: HostPlan
    """What follows from the topology alone; endpoints may be DNS names."""
    filtered: HostPlan
    """With addresses in place of names, and without routes that would harm the host: all of it is the mesh's."""
    final: HostPlan
    """With what concerns the world outside the mesh and, under `encrypted`, the host's own addresses."""


def host_plans(
    topology: Topology, name: str, surroundings: Surroundings, previous: HostPlans | None = None
) -> HostPlans:
    """The plan of node `name`; `previous`, its last one, only saves work. UnknownNode: it is not in the mesh."""
    raw = host_plan(topology, name, None if previous is None else previous.raw)
    node = topology.snapshot.nodes[name]
    resolved = resolve_plan(raw, surroundings.table, surroundings.failed, surroundings.families)
    filtered = filter_routes(
        from_own_addresses(resolved, node, surroundings.addresses),
        surroundings.protected,
        None if previous is None else previous.filtered,
        offered_by=topology.allocation.offered_by,
    )
    plan = as_exit_node(filtered, surroundings.underlay, surroundings.families)
    plan = with_exit_node(
        plan,
        topology,
        bypass=surroundings.etcd,
        sources=surroundings.sources,
        unresolved=(*surroundings.etcd_unresolved, *names_of(raw, node.exit_node, surroundings.table)),
    )
    plan = withhold(plan, topology, surroundings.silent)
    if (inputs := surroundings.encryption) is not None:
        last = None if previous is None else previous.final
        plan = encrypt(
            plan, topology, outside=inputs.outside, living=inputs.living, stage_report=inputs.stage_report,
            previous=last,
        )  # fmt: skip
    return HostPlans(raw=raw, filtered=filtered, final=plan)


@frozen(kw_only=True)
class PeerOptions:
    """The settings that a peer outside the mesh chooses for its own plan."""

    listen_port: int
    persistent_keepalive: int
    exit_node: str | None = None
    """The node by which everything leaves that is for outside the mesh."""
    links: tuple[IPNetwork, ...] = ()
    """The networks that it is attached to."""


def peer_plans(topology: Topology, name: str, options: PeerOptions, surroundings: Surroundings) -> HostPlans:
    """The plan of peer `name` on its own machine. KeyError: no such peer is in force."""
    raw = peer_plan(
        topology, name, listen_port=options.listen_port, persistent_keepalive=options.persistent_keepalive,
        families=surroundings.families, links=options.links,
    )  # fmt: skip
    resolved = resolve_plan(raw, surroundings.table, surroundings.failed, surroundings.families)
    filtered = protected_plan(resolved, surroundings.protected, topology.snapshot.subnets)
    plan = filtered
    if options.exit_node is not None:
        unresolved = names_of(raw, options.exit_node, surroundings.table)
        plan = through(plan, topology, options.exit_node, surroundings.etcd, unresolved=unresolved)
    return HostPlans(raw=raw, filtered=filtered, final=plan)


def from_own_addresses(plan: HostPlan, node: Node, addresses: Collection[IPAddress]) -> HostPlan:
    """The plan without routes from an internal IP that is none of the host's `addresses`: the kernel takes no such
    route. The operator may have forced the internal IP, or it is gone for now. The mesh address serves as well."""
    missing = {ip.ip for ip in node.internal_ips}.difference(addresses)
    if not missing or not addresses:
        return plan
    routes = {}
    for network, route in plan.routes.items():
        if route.source in missing:
            source = node.mesh_address(network.version)
            if source is None:
                continue
            route = evolve(route, source=source)
        routes[network] = route
    return evolve(plan, routes=routes)


def protected_plan(plan: HostPlan, protected: tuple[IPNetwork, ...], subnets: tuple[IPNetwork, ...]) -> HostPlan:
    """The plan without routes that would cut the machine off from what its tunnel is made of.

    The mesh's subnets are kept although they overlap the network that the machine happens to be in, whose own route is
    narrower as a rule; but not where they hold etcd or the default gateway itself. An address that lies in a narrower
    protected network is reached by that one's route all the same. Networks within the subnets that somebody offers are
    removed as others are.
    """
    own = [network for network in protected if network.num_addresses > 1]
    single = [network for network in protected if network.num_addresses == 1]
    mesh = [subnet for subnet in subnets if all(_is_reached_beside(subnet, network, own) for network in single)]
    return filter_routes(plan, protected, mesh=mesh)


def _is_reached_beside(subnet: IPNetwork, address: IPNetwork, own: Sequence[IPNetwork]) -> bool:
    """Whether packets for a single address take another way than the route to a subnet of the mesh: it lies outside, or
    in one of the machine's `own` networks that is narrower."""
    return not within(address, (subnet,)) or any(
        network.prefixlen > subnet.prefixlen and within(address, (network,)) for network in own
    )
