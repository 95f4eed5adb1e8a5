"""What `encrypted` asks of one host, and how far it is with the switch to it or back. Pure.

Between two segments' nodes nothing is to travel in clear, and a switch on a running mesh is to lose nothing. So each
node goes through stages, one by one, and reports each in its record (`model.EncryptionStage`):

    on:    (none) --> ACCEPTS --> SENDS          back:   SENDS --> LEAVES --> STOPPED --> (none)

A stage is reported when the kernel holds it, and what it promises is given up only after a snapshot shows that it is
not promised any more. All that others need to know is then in the snapshot:

* Who is ACCEPTS or SENDS takes packets from all nodes out of the tunnels: others may send there, and do.
* Who is SENDS sends so to all who take it, as soon as it has applied the snapshot that says so of them. A node
  refuses its packets in clear from then on: that revision agents report in their statuses (`Living`).
* On the way back nobody refuses (LEAVES), then nobody sends (STOPPED), then nobody accepts; a node is sent packets in
  clear as soon as it does not refuse them, and takes them from the tunnel as long as somebody may send so.

Who does not live (no status in etcd) is waited for by nobody: it is treated as its record says, and on the way back
counts as having gone all of it. Nothing follows from the time.

An address is sent through the tunnel if no other node has it, nobody else was granted it, and it is not taken for
something near: one that the sender's segment reaches over its own links only if the two share those links on
purpose: one label in a full mesh, or the sender's WireGuard calls the node at an address on them. Decision 0033.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from attrs import evolve, field, frozen

from kilo_etcd.model import (
    DEFAULT_LOCATION,
    EncryptionStage,
    Granularity,
    InternalIPs,
    IPAddress,
    IPNetwork,
    Node,
)
from kilo_etcd.topology.claims import each_hosts_own, network_key
from kilo_etcd.topology.families import same_site
from kilo_etcd.topology.hostplan import Encryption, Exemption, HostPlan, PeerPlan, Problem, RoutePlan, Via
from kilo_etcd.topology.internal import Links, carried, stated
from kilo_etcd.topology.plan import called_at
from kilo_etcd.topology.segments import Segment, Topology, host_network
from kilo_etcd.topology.ways import Hop, bonded, hop

_ACCEPTING = (EncryptionStage.ACCEPTS, EncryptionStage.SENDS)
_MAY_SEND = (*_ACCEPTING, EncryptionStage.LEAVES)


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

    def has(self, address: IPAddress) -> bool:
        """Whether the host may have an address."""
        return not self.addresses or address in self.addresses


@frozen(kw_only=True)
class Living:
    """What the statuses in etcd said of other agents when they were read last."""

    asked: frozenset[str] = frozenset()
    """The nodes that there were then. Of others nothing is known, and they count as living and as having applied
    nothing."""
    applied: Mapping[str, int] = field(factory=dict)
    """The nodes whose agents live -> the newest revision that their kernels are known to have held."""

    def lives(self, name: str) -> bool:
        """Whether a node may live."""
        return name in self.applied or name not in self.asked

    def knows_of(self, name: str, revision: int) -> bool:
        """Whether a node acts by what stands in the snapshot of `revision`, if it acts at all."""
        return name in self.asked and self.applied.get(name, revision) >= revision


NOBODY_ASKED = Living()


@frozen(kw_only=True)
class Report:
    """What a node's record is to say of the switch."""

    stage: EncryptionStage | None = None
    accepts_since: int = 0

    @classmethod
    def of(cls, node: Node) -> Report:
        """What it says."""
        return cls(stage=node.encryption, accepts_since=node.accepts_since)


def encrypt(
    plan: HostPlan,
    topology: Topology,
    *,
    outside: Outside,
    living: Living = NOBODY_ASKED,
    told: Report | None = None,
) -> HostPlan:
    """A host's `plan`, guarded already, with what the setting `encrypted` asks for at the host's stage; without any
    of it, `plan` itself. `told`: what the host has reported, or tried to, and the snapshot does not show yet."""
    on = _in_force(topology)
    own = topology.snapshot.nodes[plan.node]
    if told is not None and told.stage not in _ACCEPTING:
        # Others may have seen already what it does not do any more, but not yet what it does from now on.
        own = evolve(own, encryption=told.stage)
    promised = told is not None and told.stage in _ACCEPTING
    if not promised and not on and (own.encryption is None or _gone_back(topology, own, living)):
        return plan
    view = _View.of(topology, own.name)
    nodes: set[IPAddress] = set()
    refuse: set[IPAddress] = set()
    hold: set[IPNetwork] = set()
    send: dict[IPNetwork, RoutePlan] = {}
    allowed: dict[str, list[IPNetwork]] = {}
    problems: list[Problem] = []
    own_leader = view.place.segment.leader
    by_leader = own_leader.name != own.name and bonded(own, own_leader)
    for there in view.others():
        found = view.sent_to(there)
        if not found:
            continue
        leader = there.segment.leader
        nodes.update(one.address for one in found)
        gate = own_leader if by_leader else leader
        allowed.setdefault(gate.public_key, []).extend(one.network for one in found)
        here = frozenset(one.address for one in view.sent_from(there))
        ways = {version: view.way(version, frozenset(filter(outside.has, here))) for version in (4, 6)}
        whole = {version: on and view.whole(version, here) for version in (4, 6)}
        for one in found:
            version = one.address.version
            if _sends(own, one.node, own_leader, leader, living, on=on):
                way = ways[version]
                if isinstance(way, _Way):
                    send[one.network] = RoutePlan(
                        destination=one.network, way=way.hop.way, gateway=way.hop.gateway, source=way.source
                    )
                else:
                    hold.add(one.network)
                    text = (
                        f"nothing is sent to {one.address} of node {one.node.name} as long as all is encrypted: {way}"
                    )
                    problems.append(Problem(subject=one.node.name, text=text))
            if whole[version] and _refuses(own, one.node, own_leader, leader, living, topology):
                refuse.add(one.address)
    peers = dict(plan.peers)
    for key, networks in allowed.items():
        if (peer := peers.get(key)) is not None:
            peers[key] = _allowing(peer, networks)
    forwarding = plan.forwarding
    if len(view.place.segment.members) > 1:
        forwarding = forwarding.union(address.version for address in nodes)
    return evolve(
        plan,
        peers=peers,
        forwarding=forwarding,
        encryption=Encryption(
            nodes=frozenset(nodes), send=send, hold=frozenset(hold), refuse=frozenset(refuse),
            etcd=outside.etcd, etcd_here=outside.etcd_here, talk=outside.talk, clear=outside.clear,
            sources=_in_order(outside, own), known=view.known(plan),
        ),
        problems=(*plan.problems, *problems),
    )  # fmt: skip


def report(topology: Topology, plan: HostPlan) -> Report:
    """What the record of the host is to say once its kernel holds `plan`, which `encrypt` made of the same."""
    own = topology.snapshot.nodes[plan.node]
    said = Report.of(own)
    if _in_force(topology):
        if own.encryption is EncryptionStage.SENDS:
            return said
        if own.encryption is EncryptionStage.ACCEPTS:
            return Report(stage=EncryptionStage.SENDS, accepts_since=topology.snapshot.revision)
        return Report(stage=EncryptionStage.ACCEPTS)
    if own.encryption in _ACCEPTING:
        return Report(stage=EncryptionStage.LEAVES)
    if own.encryption is EncryptionStage.LEAVES:
        sends = plan.encryption is not None and plan.encryption.send
        return said if sends else Report(stage=EncryptionStage.STOPPED)
    return Report() if own.encryption is None or plan.encryption is None else said


def waited_for(topology: Topology, name: str, living: Living) -> frozenset[str]:
    """The nodes of whom the host has to know whether they live or what they have applied, before it goes on."""
    own = topology.snapshot.nodes.get(name)
    if own is None or own.encryption is None:
        return frozenset()
    others = (node for node in topology.snapshot.nodes.values() if node.name != name)
    if not _in_force(topology):
        return frozenset(node.name for node in others if node.encryption in _MAY_SEND and living.lives(node.name))
    if own.encryption is not EncryptionStage.SENDS:
        return frozenset()
    own_leader = topology.segment_of(name).leader
    found: set[str] = set()
    for node in others:
        leader = topology.segment_of(node.name).leader
        if node.encryption is leader.encryption is EncryptionStage.SENDS:
            since = _since(own, own_leader, leader, topology)
            found.update(one.name for one in (node, leader) if not living.knows_of(one.name, since))
    return frozenset(found - {name})


def _in_force(topology: Topology) -> bool:
    return topology.internal_ips is InternalIPs.ENCRYPTED


def _gone_back(topology: Topology, own: Node, living: Living) -> bool:
    """Whether nobody sends to the host through the tunnel any more, nor the host to anybody."""
    return own.encryption is EncryptionStage.STOPPED and not any(
        node.encryption in _MAY_SEND and living.lives(node.name)
        for node in topology.snapshot.nodes.values()
        if node.name != own.name
    )


def _sends(own: Node, node: Node, own_leader: Node, leader: Node, living: Living, *, on: bool) -> bool:
    """Whether what goes to `node`, which `leader` stands before, goes through the tunnel, or nowhere."""
    if own.encryption not in _MAY_SEND:
        return False
    if on:
        # What a leader does not take from the tunnels, or does not send into them, its members do not get.
        here = own_leader.name == own.name or own_leader.encryption in _ACCEPTING
        return here and node.encryption in _ACCEPTING and leader.encryption in _ACCEPTING
    return node.encryption is EncryptionStage.SENDS and living.lives(node.name)


def _since(own: Node, own_leader: Node, leader: Node, topology: Topology) -> int:
    """The revision of a snapshot by which a node that `leader` stands before sends the host nothing in clear."""
    return max(*(one.accepts_since for one in (own, own_leader, leader)), topology.snapshot.internal_ips_since)


def _refuses(own: Node, node: Node, own_leader: Node, leader: Node, living: Living, topology: Topology) -> bool:
    """Whether `node` sends this host nothing in clear any more."""
    ready = all(one.encryption is EncryptionStage.SENDS for one in (own, node, own_leader, leader))
    since = _since(own, own_leader, leader, topology)
    return ready and living.knows_of(node.name, since) and living.knows_of(leader.name, since)


def _allowing(peer: PeerPlan, networks: Iterable[IPNetwork]) -> PeerPlan:
    every = {*peer.allowed_ips, *networks}
    if len(every) == len(peer.allowed_ips):
        return peer
    return evolve(peer, allowed_ips=tuple(sorted(every, key=network_key)))


def _in_order(outside: Outside, own: Node) -> tuple[IPAddress, ...]:
    """The internal IPs first."""
    internal = [ip.ip for ip in own.internal_ips if outside.has(ip.ip)]
    return tuple(dict.fromkeys((*internal, *outside.sources)))


@frozen(eq=False)
class _Address:
    """One at which a node is called."""

    node: Node
    address: IPAddress
    network: IPNetwork


@frozen
class _Way:
    """How packets go, and from which address."""

    hop: Hop
    source: IPAddress


@frozen(eq=False)
class _Place:
    """A segment, with what of it counts here."""

    segment: Segment
    addresses: tuple[_Address, ...]
    """What may be sent to it through the tunnels."""

    def links(self) -> Links:
        """What its hosts reach over their own links."""
        # Where internal IPs are not routed the topology has none.
        known = self.segment.links
        return known if known.networks else Links.of(self.segment.members)


def own_addresses(node: Node) -> Iterator[IPAddress]:
    """The internal IPs of a node, and the endpoints that are addresses of its own: in a network that it stands in. Not
    that of a router which forwards its port."""
    yield from (ip.ip for ip in node.internal_ips)
    known = {ip.ip for ip in node.internal_ips}
    for endpoint in node.endpoints:
        address = endpoint.address
        if (
            address is not None
            and address not in known
            and any(network.version == address.version and address in network for network in stated(node))
        ):
            yield address


@frozen(eq=False)
class _View:
    """The mesh as one host sees it."""

    topology: Topology
    own: Node
    place: _Place
    _holders: Mapping[IPAddress, int]
    _links: Links
    _memo: dict[str, _Place] = field(factory=dict)

    @classmethod
    def of(cls, topology: Topology, name: str) -> _View:
        """Of node `name`."""
        holders = Counter(address for node in topology.snapshot.nodes.values() for address in set(own_addresses(node)))
        own, segment = topology.snapshot.nodes[name], topology.segment_of(name)
        place = _place(segment, topology, holders)
        return cls(topology, own, place, holders, place.links())

    def others(self) -> Iterator[_Place]:
        """The segments that this host exchanges packets with through the tunnels."""
        leader = self.place.segment.leader
        cross = self.topology.snapshot.granularity is Granularity.CROSS
        for key, segment in self.topology.segments.items():
            if key == self.place.segment.key:
                continue
            if cross and segment.leader.location == leader.location and same_site(leader, segment.leader):
                continue
            yield _place(segment, self.topology, self._holders)

    def sent_to(self, there: _Place) -> list[_Address]:
        """The addresses that this host's segment sends to that one."""
        return _sent(self.place, there, self._links)

    def sent_from(self, there: _Place) -> list[_Address]:
        """This host's own addresses that are sent to its segment from that one."""
        found = [one for one in self.place.addresses if one.node.name == self.own.name]
        return _sent(there, _Place(self.place.segment, tuple(found)), there.links()) if found else []

    def way(self, version: int, here: frozenset[IPAddress]) -> _Way | str:
        """How packets of a family go to a segment, or why they cannot. `here`: own addresses that answers find."""
        leader = self.place.segment.leader
        way = Hop(Via.TUNNEL) if leader.name == self.own.name else hop(self.own, leader, version)
        if way is None or way.trouble:
            why = "they share no address family" if way is None else way.trouble
            return f"{self.own.name} does not reach its leader {leader.name} in IPv{version}: {why}"
        inner = [ip.ip for ip in self.own.internal_ips if ip.version == version and ip.ip in here]
        source = next((address for address in (*inner, self.own.mesh_address(version)) if address is not None), None)
        if source is None:
            return f"{self.own.name} has no address in IPv{version} at which an answer finds it; give it a mesh address"
        return _Way(way, source)

    def whole(self, version: int, here: frozenset[IPAddress]) -> bool:
        """Whether what comes in clear in a family to the host itself can be none of what it is to get: all own
        addresses are sent through the tunnel, and its leader does not pass packets on plain."""
        leader = self.place.segment.leader
        if leader.name != self.own.name:
            way = hop(leader, self.own, version)
            if way is None or way.way is Via.UNDERLAY:
                return False
        return all(address in here for address in own_addresses(self.own) if address.version == version)

    def known(self, plan: HostPlan) -> tuple[IPNetwork, ...]:
        """What others take packets from by way of this host."""
        found = {*self.topology.snapshot.subnets, *plan.behind}
        if self.place.segment.leader.name == self.own.name:
            found.update(self.place.segment.networks)
            found.update(one.network for one in self.place.addresses)
        return tuple(sorted(found, key=network_key))


def _place(segment: Segment, topology: Topology, holders: Mapping[IPAddress, int]) -> _Place:
    found = []
    for node in segment.members:
        known = segment.carried.get(node.name)
        if len(segment.members) == 1:
            networks: Iterable[IPNetwork] = map(host_network, own_addresses(node))
        else:
            networks = map(host_network, carried(node, segment.leader)) if known is None else known
        for network in networks:
            address = network.network_address
            if holders[address] == 1 and _meant(address, node, segment.key, topology):
                found.append(_Address(node, address, network))
    return _Place(segment, tuple(found))


def _meant(address: IPAddress, node: Node, segment: str, topology: Topology) -> bool:
    """Whether an address can mean nothing but the node, apart from what others have near them."""
    settlement = topology.settlement
    if each_hosts_own(address):
        return False
    if any(subnet.version == address.version and address in subnet for subnet in settlement.mesh):
        return False
    granted = settlement.granted_at(address)
    return granted is None or granted.owner in (("node", node.name), ("location", segment))


def _sent(here: _Place, there: _Place, links: Links) -> list[_Address]:
    """The addresses of `there` that segment `here`, whose hosts reach `links`, sends through the tunnel."""
    near = [one for one in there.addresses if links.hold(one.address.version, int(one.address))]
    if not near:
        return list(there.addresses)
    location = there.segment.location
    if location == here.segment.location and location != DEFAULT_LOCATION:
        return list(there.addresses)
    leader = there.segment.leader
    called = called_at(here.segment.leader, leader)
    # Whose WireGuard is called at one address over a common link is meant by its other ones there too.
    meant = leader.name if any(one.node is leader and one.address == called for one in near) else None
    alike = {one.network for one in near if one.node.name != meant}
    return [one for one in there.addresses if one.network not in alike]
