"""What `encrypted` asks of one host's kernel: the plan with its routes, what it accepts and what it refuses. Pure.

`topology.places` decides which addresses are reached through the tunnels, and `topology.stages` which nodes use them at
which stage of the switch. This module makes a host's plan of both, segment by segment: what a host does about one other
segment depends on that segment and on the host alone, so the next plan costs what has changed and not what there is.
The outcome is the same with and without a previous plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from attrs import evolve, field, frozen

from kilo_etcd.base.blocks import Blocks
from kilo_etcd.base.mappings import changes, copied
from kilo_etcd.model import ACCEPTING, EncryptionStage, IPAddress, IPNetwork, Node
from kilo_etcd.model.hostplan import Encryption, Exemption, HostPlan, PeerPlan, PlanMemo, Problem, RoutePlan, Via
from kilo_etcd.topology.granularity import GranularityPolicy
from kilo_etcd.topology.next_hop import NextHop, next_hop, tunneled
from kilo_etcd.topology.places import Address, Place, Places, both_ways, exchanged, own_addresses, own_endpoints, sent
from kilo_etcd.topology.prefix_allocation import network_key
from kilo_etcd.topology.segments import Topology
from kilo_etcd.topology.stages import NOBODY_ASKED, Living, SegmentPair, StageReport, in_force, report, waited_for
from kilo_etcd.topology.unaware import unaware_problems

__all__ = ["NOBODY_ASKED", "Living", "Outside", "StageReport", "awaited", "encrypt", "report", "waited_for"]

T = TypeVar("T")


@frozen(kw_only=True)
class Outside:
    """What always stays outside of the tunnels, as the host alone knows it. See `Encryption` for the fields."""

    etcd: tuple[tuple[IPAddress, int], ...] = ()
    etcd_here: tuple[int, ...] = ()
    talk: tuple[int, ...] = ()
    sources: tuple[IPAddress, ...] = ()
    clear: tuple[Exemption, ...] = ()
    addresses: frozenset[IPAddress] = frozenset()
    """All addresses of the host: an internal IP that is none of them (the operator forced it, or it is gone for now)
    is no source that the kernel takes. Empty: not known."""
    silent: frozenset[IPAddress] = frozenset()
    """Those of the leader at which it has never answered: who is there may be anybody."""

    def has(self, address: IPAddress) -> bool:
        """Whether the host may have an address."""
        return not self.addresses or address in self.addresses


def encrypt(
    plan: HostPlan,
    topology: Topology,
    *,
    outside: Outside,
    living: Living = NOBODY_ASKED,
    stage_report: StageReport | None = None,
    previous: HostPlan | None = None,
) -> HostPlan:
    """A host's `plan`, guarded already, with what the setting `encrypted` asks for at the host's stage; without any
    of it, `plan` itself. `stage_report`: what the host has reported, or tried to, and the snapshot does not show yet.
    `previous`, the last outcome, only saves work; that of another host does too."""
    on = in_force(topology)
    own = topology.snapshot.nodes[plan.node]
    promised = stage_report is not None and stage_report.stage in ACCEPTING
    if stage_report is not None and not promised:
        # Others may have seen already what it does not do any more, but not yet what it does from now on.
        own = evolve(own, encryption=stage_report.stage)
    if not promised and not on and own.encryption is None:
        return plan
    last = previous.memo if previous is not None else None
    memo = last if isinstance(last, _EncryptionMemo) else _EncryptionMemo()
    places, moved = memo.places.after(topology)
    view = _EncryptionView.of(own, topology, places, outside)
    if memo.view != view:
        moved = frozenset({*places.of, *memo.parts})
    elif memo.living is not living:
        nodes = topology.snapshot.nodes
        moved |= {topology.segment_of(name).key for name in living.changed(memo.living) if name in nodes}
    parts, whole = _followed(memo, moved, view, places, living)
    if not promised and not on and own.encryption is EncryptionStage.STOPPED and not whole.awaited:
        return plan
    peers = _peers(plan.peers, memo, view, places, parts, moved)
    routes = _routes(plan.routes, memo, whole.exempted)
    base, forwarding = plan.peers, plan.forwarding
    segment = topology.segment_of(own.name)
    if len(segment.members) > 1:
        forwarding = forwarding.union(version for part in parts.values() for version in part.versions)
    of = (topology.snapshot.subnets, plan.behind, places.of[segment.key], own.name)
    accepted_sources = (
        memo.accepted_sources
        if memo.accepted_sources_of == of and memo.encryption is not None
        else _accepted_sources(*of)
    )
    encryption = Encryption(
        nodes=whole.nodes, send=whole.send, hold=whole.hold, refuse=whole.refuse,
        etcd=outside.etcd, etcd_here=outside.etcd_here, talk=outside.talk, clear=outside.clear,
        sources=_in_order(outside, own), accepted_sources=accepted_sources,
        clear_sources=_clear_sources(own, outside, places.of[segment.key]),
    )  # fmt: skip
    if memo.encryption is not None and _same(encryption, memo.encryption):
        encryption = memo.encryption
    problems = (problem for key in sorted(whole.troubled) for problem in parts[key].problems)
    return evolve(
        plan,
        peers=peers,
        routes=routes,
        forwarding=forwarding,
        encryption=encryption,
        problems=(*plan.problems, *(unaware_problems(topology) if on else ()), *problems),
        memo=_EncryptionMemo(
            places=places, view=view, living=living, parts=parts, whole=whole, base=base, peers=peers,
            main=plan.routes, routes=routes, encryption=encryption,
            accepted_sources=accepted_sources, accepted_sources_of=of,
        ),
    )  # fmt: skip


def awaited(plan: HostPlan) -> frozenset[str]:
    """The same as `waited_for`, of a plan that `encrypt` has made or left as it was."""
    return plan.memo.whole.awaited if isinstance(plan.memo, _EncryptionMemo) else frozenset()


# -- what is done about one segment ------------------------------------------------------------------------------------


@frozen(kw_only=True)
class _EncryptionView:
    """All that a part depends on, apart from its segment and the living agents."""

    own: Node
    leader: Node
    segment: str
    addresses: tuple[tuple[IPAddress, bool], ...]
    """The host's own that may be sent to through the tunnels, and whether it has each."""
    leaders: tuple[IPAddress, ...]
    """The leader's that may be."""
    silent: frozenset[IPAddress]
    clear: tuple[Exemption, ...]
    links: tuple[IPNetwork, ...]
    policy: GranularityPolicy
    on: bool
    since: int

    @classmethod
    def of(cls, own: Node, topology: Topology, places: Places, outside: Outside) -> _EncryptionView:
        """Of the present."""
        segment = topology.segment_of(own.name)
        place = places.of[segment.key]
        return cls(
            own=own, leader=segment.leader, segment=segment.key,
            addresses=tuple((address.address, outside.has(address.address)) for address in place.of[own.name]),
            leaders=tuple(address.address for address in place.of[segment.leader.name]),
            silent=outside.silent, clear=outside.clear, links=place.links.networks, policy=topology.policy,
            on=in_force(topology), since=topology.snapshot.internal_ips_since,
        )  # fmt: skip

    def before(self, place: Place, living: Living) -> SegmentPair:
        """The host and another segment."""
        return SegmentPair(
            own=self.own, own_leader=self.leader, leader=place.segment.leader, on=self.on, since=self.since,
            living=living,
        )  # fmt: skip

    def exempts(self, address: IPAddress) -> bool:
        """Whether something that the host sends to an address stays in clear on purpose."""
        return any(
            exemption.network.version == address.version and address in exemption.network for exemption in self.clear
        )

    def exchanges(self, here: Place, there: Place) -> bool:
        """Whether the host exchanges packets with a segment through the tunnels."""
        return exchanged(here.segment, there.segment, self.policy)

    @property
    def by_leader(self) -> bool:
        """Whether all tunnels are its leader's, and the host has one to that."""
        return self.leader.name != self.own.name and tunneled(self.own, self.leader)

    def outbound(self, version: int, usable: Collection[IPAddress]) -> _Outbound | str:
        """How packets of a family go to a segment, or why they cannot. `usable`: own addresses that answers find."""
        leader, own = self.leader, self.own
        hop = NextHop(Via.TUNNEL) if leader.name == own.name else next_hop(own, leader, version)
        if hop is None or hop.trouble:
            why = "they share no address family" if hop is None else hop.trouble
            return f"{own.name} does not reach its leader {leader.name} in IPv{version}: {why}"
        if hop.gateway in self.silent:
            return f"its leader {leader.name} does not answer {own.name} at {hop.gateway}"
        inner = [ip.ip for ip in own.internal_ips if ip.version == version and ip.ip in usable]
        source = next((address for address in (*inner, own.mesh_address(version)) if address is not None), None)
        if source is None:
            return (
                f"{own.name} has no IPv{version} address that answers could be sent to; give it a mesh address in "
                f"IPv{version}"
            )
        return _Outbound(hop, source)

    def refuses_clear(self, version: int, answered: Collection[IPAddress]) -> bool:
        """Whether clear text in a family to the host itself is always wrong: all own
        addresses are sent through the tunnel, and its leader does not pass packets on plain."""
        if self.leader.name != self.own.name:
            hop = next_hop(self.leader, self.own, version)
            if hop is None or hop.via is Via.UNDERLAY:
                return False
        return all(address in answered for address in own_addresses(self.own) if address.version == version)


@frozen
class _Outbound:
    """How packets go, and from which address."""

    next_hop: NextHop
    source: IPAddress


@frozen(kw_only=True)
class _Part:
    """What a host does about one other segment. No two parts of a host have a network in common."""

    gate: str = ""
    """The public key of the peer through which it gets packets."""
    nodes: tuple[IPAddress, ...] = ()
    networks: tuple[IPNetwork, ...] = ()
    """The same as host networks."""
    send: tuple[RoutePlan, ...] = ()
    hold: tuple[IPNetwork, ...] = ()
    exempted: tuple[IPNetwork, ...] = ()
    """Of `send` and `hold`, those to which something stays in clear on purpose."""
    refuse: tuple[IPAddress, ...] = ()
    problems: tuple[Problem, ...] = ()
    awaited: frozenset[str] = frozenset()
    versions: frozenset[int] = frozenset()


_NO_PART = _Part()


def _part(view: _EncryptionView, here: Place, there: Place, living: Living, old: _Part) -> _Part:
    pair = view.before(there, living)
    awaited = pair.awaited(there.segment.members)
    if not view.exchanges(here, there):
        # On the way back the members of its own segment count too: they send by it.
        return _Part(awaited=awaited - {view.own.name}) if awaited and not view.on else _NO_PART
    addresses = sent(here, there)
    if not addresses:
        return _Part(awaited=awaited)
    sendable, answered = both_ways(here, there, view.own.name, addresses)
    usable = {address for address, present in view.addresses if present and address in answered}
    versions = frozenset(address.address.version for address in addresses)
    outbounds = {version: view.outbound(version, usable) for version in versions}
    refuses_clear = {version: view.on and view.refuses_clear(version, answered) for version in versions}
    members = there.segment.members
    sends = pair.sent_to(members)
    refused = pair.refused(members) if any(refuses_clear.values()) else frozenset()
    before = {id(route.destination): route for route in old.send}
    send, hold, exempted, refuse, problems = [], [], [], [], []
    for address in sendable:
        version, name = address.address.version, address.node.name
        if name in sends:
            if view.clear and view.exempts(address.address):
                exempted.append(address.network)
            outbound = outbounds[version]
            if isinstance(outbound, _Outbound):
                send.append(_route(address, outbound, before.get(id(address.network))))
            else:
                hold.append(address.network)
                text = f"nothing is sent to {address.address} of node {name} as long as all is encrypted: {outbound}"
                problems.append(Problem(subject=name, text=text))
        if refuses_clear[version] and name in refused:
            refuse.append(address.address)
    nodes = tuple(address.address for address in addresses)
    return _Part(
        gate=(view.leader if view.by_leader else there.segment.leader).public_key,
        nodes=nodes, networks=tuple(address.network for address in addresses), send=tuple(send), hold=tuple(hold),
        exempted=tuple(exempted),
        refuse=nodes if len(refuse) == len(nodes) else tuple(refuse), problems=tuple(problems), awaited=awaited,
        versions=versions,
    )  # fmt: skip


def _route(address: Address, outbound: _Outbound, old: RoutePlan | None) -> RoutePlan:
    hop, source = outbound.next_hop, outbound.source
    if old is not None and (old.via, old.gateway, old.source) == (hop.via, hop.gateway, source):
        return old
    return RoutePlan(destination=address.network, via=hop.via, gateway=hop.gateway, source=source)


# -- all of it, as it follows changes ----------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class _Whole:
    """The parts together."""

    nodes: Blocks[IPAddress, None] = field(factory=Blocks)
    send: Blocks[IPNetwork, RoutePlan] = field(factory=Blocks)
    hold: frozenset[IPNetwork] = frozenset()
    exempted: frozenset[IPNetwork] = frozenset()
    refuse: Blocks[IPAddress, None] = field(factory=Blocks)
    awaited: frozenset[str] = frozenset()
    troubled: frozenset[str] = frozenset()
    """The segments whose parts have problems."""


@frozen(kw_only=True, eq=False)
class _EncryptionMemo(PlanMemo):
    """What the next plan is computed from."""

    places: Places = field(factory=Places)
    view: _EncryptionView | None = None
    living: Living = NOBODY_ASKED
    parts: Mapping[str, _Part] = field(factory=dict)
    whole: _Whole = field(factory=_Whole)
    base: Mapping[str, PeerPlan] = field(factory=dict)
    """The peers of the plan that was handed in."""
    peers: Mapping[str, PeerPlan] = field(factory=dict)
    main: Mapping[IPNetwork, RoutePlan] = field(factory=dict)
    """The routes of the plan that was handed in."""
    routes: Mapping[IPNetwork, RoutePlan] = field(factory=dict)
    encryption: Encryption | None = None
    accepted_sources: tuple[IPNetwork, ...] = ()
    accepted_sources_of: tuple[tuple[IPNetwork, ...], tuple[IPNetwork, ...], Place, str] | None = None
    """What `accepted_sources` was computed from."""


def _followed(
    memo: _EncryptionMemo, moved: frozenset[str], view: _EncryptionView, places: Places, living: Living
) -> tuple[Mapping[str, _Part], _Whole]:
    own_place = places.of[view.segment]
    differing: list[tuple[str, _Part, _Part]] = []
    for key in moved:
        old, place = memo.parts.get(key, _NO_PART), places.of.get(key)
        new = _NO_PART if place is None else _part(view, own_place, place, living, old)
        if new != old or key not in memo.parts or place is None:
            differing.append((key, old, new))
    if not differing:
        return memo.parts, memo.whole
    parts = copied(memo.parts)
    for key, _, new in differing:
        if key in places.of:
            parts[key] = new
        else:
            parts.pop(key, None)
    whole = memo.whole
    pairs = [(old, new) for _, old, new in differing]
    nodes = _exchanged(whole.nodes, ((old.nodes, new.nodes) for old, new in pairs))
    refuse = _exchanged(whole.refuse, ((old.refuse, new.refuse) for old, new in pairs))
    return parts, _Whole(
        nodes=nodes,
        send=_sent(whole.send, pairs),
        hold=_changed(whole.hold, ((old.hold, new.hold) for old, new in pairs)),
        exempted=_changed(whole.exempted, ((old.exempted, new.exempted) for old, new in pairs)),
        # Once all are through with the switch the packet filter needs but one set of them.
        refuse=nodes if refuse == nodes else refuse,
        awaited=_changed(whole.awaited, ((old.awaited, new.awaited) for old, new in pairs)),
        troubled=_changed(
            whole.troubled,
            (((key,) if old.problems else (), (key,) if new.problems else ()) for key, old, new in differing),
        ),
    )


def _changed(former: frozenset[T], pairs: Iterable[tuple[Collection[T], Collection[T]]]) -> frozenset[T]:
    """`former` itself if it comes out the same. `pairs`: what parts of it were, and are."""
    less, more = _less_and_more(pairs)
    differing = frozenset(more - former) | ((less - more) & former)
    return differing ^ former if differing else former


def _exchanged(former: Blocks[T, None], pairs: Iterable[tuple[Collection[T], Collection[T]]]) -> Blocks[T, None]:
    """The same of the keys of `former`."""
    less, more = _less_and_more(pairs)
    return former.after(dict.fromkeys(more), less) if less or more else former


def _less_and_more(pairs: Iterable[tuple[Collection[T], Collection[T]]]) -> tuple[set[T], set[T]]:
    less: set[T] = set()
    more: set[T] = set()
    for old, new in pairs:
        if old is not new:
            # Most are the same objects, and hashes of addresses are slow.
            new_ids, old_ids = set(map(id, new)), set(map(id, old))
            less.update(item for item in old if id(item) not in new_ids)
            more.update(item for item in new if id(item) not in old_ids)
    return less, more


def _sent(former: Blocks[IPNetwork, RoutePlan], pairs: Iterable[tuple[_Part, _Part]]) -> Blocks[IPNetwork, RoutePlan]:
    """`former` itself if it comes out the same."""
    less: dict[IPNetwork, RoutePlan] = {}
    more: dict[IPNetwork, RoutePlan] = {}
    for old, new in pairs:
        new_ids, old_ids = set(map(id, new.send)), set(map(id, old.send))
        less.update((route.destination, route) for route in old.send if id(route) not in new_ids)
        more.update((route.destination, route) for route in new.send if id(route) not in old_ids)
    return former.after(more, less) if more or less else former


def _peers(
    base: Mapping[str, PeerPlan],
    memo: _EncryptionMemo,
    view: _EncryptionView,
    places: Places,
    parts: Mapping[str, _Part],
    moved: Iterable[str],
) -> Mapping[str, PeerPlan]:
    """The plan's peers, allowed what comes out of the tunnels from nodes."""
    touched = set(changes(memo.base, base))
    for key in moved:
        old, new = memo.parts.get(key, _NO_PART), parts.get(key, _NO_PART)
        if (old.gate, old.networks) != (new.gate, new.networks):
            touched.update((old.gate, new.gate))
    if not touched:
        return memo.peers
    all_networks: tuple[IPNetwork, ...] = ()
    if view.by_leader and view.leader.public_key in touched:
        all_networks = tuple(network for part in parts.values() for network in part.networks)
    result = copied(memo.peers)
    for key in touched:
        peer = base.get(key)
        if peer is None:
            result.pop(key, None)
            continue
        if view.by_leader:
            networks = all_networks if key == view.leader.public_key else ()
        else:
            part = parts.get(places.key_of(peer.name), _NO_PART)
            networks = part.networks if part.gate == key else ()
        result[key] = _allowing(peer, networks)
    return result


def _routes(
    main: Mapping[IPNetwork, RoutePlan], memo: _EncryptionMemo, exempted: frozenset[IPNetwork]
) -> Mapping[IPNetwork, RoutePlan]:
    """The routes of the main table, without those that would lead into a tunnel what is exempted: all else that goes to
    such an address takes the table of these."""
    if not exempted:
        return main
    before = memo.whole.exempted
    if not before:
        touched, result = set(exempted), copied(main)
    else:
        touched = {*changes(memo.main, main), *(before ^ exempted)}
        if not touched:
            return memo.routes
        result = copied(memo.routes)
    for network in touched:
        if network in main and network not in exempted:
            result[network] = main[network]
        else:
            result.pop(network, None)
    return result


def _allowing(peer: PeerPlan, networks: Iterable[IPNetwork]) -> PeerPlan:
    allowed_ids = set(map(id, peer.allowed_ips))
    if all(id(network) in allowed_ids for network in networks):
        return peer
    allowed_ips = {*peer.allowed_ips, *networks}
    if len(allowed_ips) == len(peer.allowed_ips):
        return peer
    return evolve(peer, allowed_ips=tuple(sorted(allowed_ips, key=network_key)))


def _clear_sources(own: Node, outside: Outside, place: Place) -> tuple[IPAddress, ...]:
    """The host's own endpoint addresses at which no segment sends to it through the tunnels."""
    carried = {address.address for address in place.of[own.name]}
    return tuple(address for address in own_endpoints(own) if address not in carried and outside.has(address))


def _accepted_sources(
    subnets: Iterable[IPNetwork], behind: Iterable[IPNetwork], place: Place, name: str
) -> tuple[IPNetwork, ...]:
    """The sources from which others accept packets by way of this host."""
    networks = {*subnets, *behind}
    if place.segment.leader.name == name:
        networks.update(place.segment.networks)
        networks.update(address.network for address in place.addresses)
    return tuple(sorted(networks, key=network_key))


def _in_order(outside: Outside, own: Node) -> tuple[IPAddress, ...]:
    """The internal IPs first."""
    internal = [ip.ip for ip in own.internal_ips if outside.has(ip.ip)]
    return tuple(dict.fromkeys((*internal, *outside.sources)))


def _same(one: Encryption, other: Encryption) -> bool:
    """Whether two are equal, decided quickly: large parts are the same object if they are."""
    large = ("nodes", "send", "hold", "refuse")
    return all(getattr(one, name) is getattr(other, name) for name in large) and evolve(
        one, nodes=(), send={}, hold=frozenset(), refuse=()
    ) == evolve(other, nodes=(), send={}, hold=frozenset(), refuse=())
