"""The shape of the mesh: which nodes share a gateway, who it is, and which networks stand behind it.

`build_topology` is a pure function of a snapshot. Given the topology of an earlier snapshot it does the same
work only for what differs, and what does not differ is the same object as before; that is how a host follows
one change in a mesh of thousands within a millisecond or two. The first topology is computed as the
difference to an empty one, so there is one way of computing, not two.

A location's nodes must be able to speak to each other, so nodes that share no address family are not put
into one segment: of one location, those with an internal IP of the mesh's first family form the segment,
those with one of the other family only form a second, and a node with none is a segment of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from itertools import compress, count, islice
from operator import is_not
from typing import TypeVar

from attrs import evolve, field, frozen

from kilo_etcd.model import Granularity, InternalIPs, IPAddress, IPNetwork, Node, Peer, Snapshot
from kilo_etcd.topology.claims import Claim, Owner, Settlement, network_key, settle
from kilo_etcd.topology.election import Election, elect
from kilo_etcd.topology.hostplan import Problem

K = TypeVar("K")
V = TypeVar("V")


class UnknownNode(KeyError):
    """There is no node of that name in the topology."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"there is no node {self.name!r} in the mesh; `kgctl status` lists those that are"


@frozen(kw_only=True)
class Segment:
    """The nodes that share one gateway, and all that other segments need to know of them."""

    key: str
    location: str
    members: tuple[Node, ...]
    """By name."""
    leader: Node
    challengers: tuple[tuple[Node, tuple[str, ...]], ...]
    """Members who say that nobody gets through the leader, with whom each has tried to reach: those get to know it as a
    WireGuard peer, so that it can prove that it could do better."""
    election: Election
    subnets: Mapping[str, tuple[IPNetwork, ...]]
    """Member -> the networks behind it that are granted to it; members with none are not in it."""
    location_networks: tuple[IPNetwork, ...]
    """The granted `allowed_location_ips` of all members."""
    networks: tuple[IPNetwork, ...]
    """All networks behind the leader, without the mesh addresses."""
    allowed: tuple[IPNetwork, ...]
    """The allowed IPs of the leader as others' WireGuard peer: mesh addresses and networks."""

    @property
    def next_in_line(self) -> str | None:
        """Who leads when the leader's candidacy ends."""
        return self.election.next_in_line


@frozen(kw_only=True)
class Topology:
    """The mesh as all agents see it that have seen this snapshot."""

    snapshot: Snapshot
    segments: dict[str, Segment]
    peers: Mapping[str, Peer]
    """The outside peers in force, with the allowed IPs that are granted to them."""
    problems: tuple[Problem, ...] = ()
    settlement: Settlement = field(eq=False, repr=False)
    identity: object = field(factory=object, eq=False, repr=False)
    base: object = field(default=None, eq=False, repr=False)
    """`identity` of the topology that this one was computed from."""
    changed: frozenset[str] = field(default=frozenset(), eq=False, repr=False)
    """Keys of the segments that differ from those of `base`."""
    unaware: frozenset[str] = frozenset()
    """The nodes whose agents do not know the setting internal-ips: as long as there are any it is not in force, since
    they would drop what others send them by it."""

    @property
    def internal_ips(self) -> InternalIPs:
        """What is in force of the setting."""
        return InternalIPs.OFF if self.unaware else self.snapshot.internal_ips

    def segment_of(self, name: str) -> Segment:
        """The segment that a node is in. UnknownNode: it is not in the mesh."""
        node = self.snapshot.nodes.get(name)
        if node is None:
            raise UnknownNode(name)
        return self.segments[segment_key(node, self.snapshot)]

    @property
    def families(self) -> frozenset[int]:
        """The families (4, 6) in which packets travel."""
        return self.settlement.versions.union(subnet.version for subnet in self.snapshot.subnets)

    def __repr__(self) -> str:
        snapshot = self.snapshot
        return f"<Topology r{snapshot.revision} {snapshot.granularity} {len(self.segments)} segments>"


def host_network(address: IPAddress) -> IPNetwork:
    """The /32 or /128 of an address."""
    if isinstance(address, IPv4Address):
        return IPv4Network((int(address), 32))
    return IPv6Network((int(address), 128))


def same_site(one: Node, other: Node) -> bool:
    """Whether two nodes reach each other over their location's own network: one label, one family in common."""
    return one.location == other.location and common_family(one, other) is not None


def common_family(one: Node, other: Node) -> int | None:
    """The family in which both have an internal IP; 4 where both will do."""
    return next((v for v in (4, 6) if one.internal_ip(v) is not None and other.internal_ip(v) is not None), None)


def segment_key(node: Node, snapshot: Snapshot) -> str:
    """The key of the segment that a node belongs to; it depends on nothing but the node and the mesh's settings."""
    if snapshot.granularity is not Granularity.LOCATION or not node.internal_ips:
        return f"node:{node.name}"
    return _location_keys(node.location)[node.internal_ip(_first_family(snapshot)) is None]


def _location_keys(location: str) -> tuple[str, str]:
    return f"location:{location}", f"location, other family:{location}"


def _first_family(snapshot: Snapshot) -> int:
    return 6 if snapshot.subnets and all(subnet.version == 6 for subnet in snapshot.subnets) else 4


def changes(old: Mapping[K, V], new: Mapping[K, V]) -> list[K]:
    """The keys whose values differ or are on one side only. Identical values cost next to nothing."""
    if old is new:
        return []
    if len(old) == len(new) and list(old) == list(new):
        # The same keys in the same order: comparing side by side spares as many look-ups as there are keys.
        pairs = compress(new, map(is_not, new.values(), old.values()))
        return [key for key in pairs if old[key] != new[key]]
    differing = list(compress(new, map(is_not, new.values(), map(old.get, new))))
    added = sum(key not in old for key in differing)
    result = [key for key in differing if key not in old or old[key] != new[key]]
    if len(new) - added != len(old):
        result += [key for key in old if key not in new]
    return result


def lined_up(old: Mapping[K, V], new: Mapping[K, V]) -> list[K] | None:
    """The same where few keys came and went and the others are the same objects in the same order, as when one mapping
    was made from the other; else None. It looks up those few alone, since the hash of a network is slow. The
    order is not that of `changes`."""
    here, there = list(old), list(new)
    before, after = list(old.values()), list(new.values())
    result: list[K] = []
    at = 0
    for _ in range(_FEW):
        shorter = min(len(here), len(there))
        at = next(compress(count(at), map(is_not, islice(here, at, None), islice(there, at, None))), shorter)
        if at == shorter:
            differing = compress(there, map(is_not, after, before))
            result += [key for key in differing if old[key] != new[key]]
            return [*result, *here[at:], *there[at:]]
        if here[at] not in new:
            result.append(here[at])
            del here[at], before[at]
        elif there[at] not in old:
            result.append(there[at])
            del there[at], after[at]
        elif here[at] != there[at]:
            return None
        else:
            at += 1
    return None


_FEW = 12


def build_topology(snapshot: Snapshot, previous: Topology | None = None) -> Topology:
    """The topology of `snapshot`; equal with and without `previous`, which only saves work."""
    if previous is None or (previous.snapshot.granularity, previous.snapshot.subnets) != (
        snapshot.granularity,
        snapshot.subnets,
    ):
        nothing = Snapshot(revision=0, granularity=snapshot.granularity, subnets=snapshot.subnets)
        previous = Topology(snapshot=nothing, segments={}, peers={}, settlement=Settlement(snapshot.subnets))
    before = previous.snapshot
    changed = changes(before.nodes, snapshot.nodes)
    unaware = _unaware(previous.unaware, changed, snapshot)

    members: dict[str, dict[str, Node]] = {}
    for name in changed:
        for nodes in (before.nodes, snapshot.nodes):
            if (node := nodes.get(name)) is not None:
                key = segment_key(node, snapshot)
                if key not in members:
                    segment = previous.segments.get(key)
                    members[key] = {} if segment is None else {member.name: member for member in segment.members}
                if nodes is before.nodes:
                    members[key].pop(name, None)
                else:
                    members[key][name] = node

    claims = dict(_claims_of_nodes(changed, snapshot))
    claims.update(_claims_of_locations(members))
    refused, clashes = _clashing_keys(snapshot, previous, changed)
    if refused or before.peers is not snapshot.peers or len(previous.peers) != len(before.peers):
        claims.update(_claims_of_peers(before, snapshot, refused))
    settlement = settle(
        previous.settlement,
        claims,
        lambda: (address for node in snapshot.nodes.values() for address in node.mesh_addresses),
        addresses_changed=any(_addresses(before, name) != _addresses(snapshot, name) for name in changed),
    )

    touched = set(members)
    for location in (
        *changes(before.candidates, snapshot.candidates),
        *changes(before.leaders, snapshot.leaders),
        *changes(before.verdicts, snapshot.verdicts),
    ):
        touched.update(key for key in _location_keys(location) if key in previous.segments)
    if settlement is not previous.settlement:
        for kind, name in changes(previous.settlement.granted, settlement.granted):
            if kind == "node" and name in snapshot.nodes:
                touched.add(segment_key(snapshot.nodes[name], snapshot))
            elif kind == "location":
                touched.add(name)

    segments = previous.segments.copy()
    really = set()
    for key in sorted(touched):
        old = segments.get(key)
        nodes_of = members.get(key) if key in members else {m.name: m for m in old.members} if old else {}
        new = _segment(key, nodes_of, snapshot, settlement) if nodes_of else None
        if old != new:
            really.add(key)
            if new is None:
                del segments[key]
            else:
                segments[key] = new
    return Topology(
        snapshot=snapshot,
        segments=segments,
        peers=_peers(snapshot, previous, settlement, refused),
        problems=settlement.problems + clashes,
        settlement=settlement,
        base=previous.identity,
        changed=frozenset(really),
        unaware=unaware,
    )


def _unaware(before: frozenset[str], changed: list[str], snapshot: Snapshot) -> frozenset[str]:
    now = {name for name in changed if (node := snapshot.nodes.get(name)) is not None and node.underlay is None}
    return before if now == before.intersection(changed) else before.difference(changed) | now


def _addresses(snapshot: Snapshot, name: str) -> tuple[IPAddress, ...]:
    node = snapshot.nodes.get(name)
    return () if node is None else node.mesh_addresses


def _segment(key: str, members: Mapping[str, Node], snapshot: Snapshot, settlement: Settlement) -> Segment:
    ordered = tuple(members[name] for name in sorted(members))
    location = ordered[0].location
    election = elect(
        ordered,
        snapshot.candidates.get(location, ()),
        snapshot.leaders.get(location),
        snapshot.verdicts.get(location, ()),
    )
    subnets = {node.name: granted for node in ordered if (granted := settlement(("node", node.name)))}
    location_networks = settlement(("location", key))
    networks = _sorted((*location_networks, *(network for granted in subnets.values() for network in granted)))
    return Segment(
        key=key,
        location=location,
        members=ordered,
        leader=members[election.leader],
        challengers=_challengers(members, election.leader, snapshot),
        election=election,
        subnets=subnets,
        location_networks=location_networks,
        networks=networks,
        allowed=_sorted((*(host_network(a) for node in ordered for a in node.mesh_addresses), *networks)),
    )


def _challengers(
    members: Mapping[str, Node], leader: str, snapshot: Snapshot
) -> tuple[tuple[Node, tuple[str, ...]], ...]:
    location = members[leader].location
    said = snapshot.verdicts.get(location, ())
    if not said:
        return ()
    held = {one.create_revision for one in snapshot.candidates.get(location, ()) if one.node == leader}
    return tuple(
        (members[one.witness], one.targets)
        for one in said
        if one.witness in members and one.witness != leader and one.leader == leader and one.candidacy in held
    )


def _sorted(networks: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
    return networks if len(networks) < 2 else tuple(sorted(networks, key=network_key))


def _claims_of_nodes(names: Iterable[str], snapshot: Snapshot) -> Iterator[tuple[Owner, tuple[Claim, ...]]]:
    for name in names:
        node = snapshot.nodes.get(name)
        if node is None or not node.subnets:
            yield ("node", name), ()
        else:
            yield ("node", name), (Claim((0, node.registered_revision, name), f"node {name}", node.subnets),)


def _claims_of_locations(
    members: Mapping[str, Mapping[str, Node]],
) -> Iterator[tuple[Owner, tuple[Claim, ...]]]:
    for key, nodes in members.items():
        yield (
            ("location", key),
            tuple(
                Claim(
                    (0, node.registered_revision, name),
                    f"node {name} (allowed-location-ips)",
                    node.allowed_location_ips,
                )
                for name, node in sorted(nodes.items())
                if node.allowed_location_ips
            ),
        )


def _claims_of_peers(
    before: Snapshot, snapshot: Snapshot, refused: frozenset[str]
) -> Iterator[tuple[Owner, tuple[Claim, ...]]]:
    for name in {*before.peers, *snapshot.peers}:
        peer = snapshot.peers.get(name)
        if peer is None or name in refused or not peer.allowed_ips:
            yield ("peer", name), ()
        else:
            yield ("peer", name), (Claim((1, peer.registered_revision, name), f"peer {name}", peer.allowed_ips),)


def _clashing_keys(
    snapshot: Snapshot, previous: Topology, changed: list[str]
) -> tuple[frozenset[str], tuple[Problem, ...]]:
    """The outside peers whose public key is a node's, or that of an older peer. A view has left them out already; a
    snapshot that was made by other means must not bring the kernel one key for two."""
    if not snapshot.peers:
        return frozenset(), ()
    by_key: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in sorted(snapshot.peers, key=lambda name: (snapshot.peers[name].registered_revision, name)):
        first = by_key.setdefault(snapshot.peers[name].public_key, name)
        if first != name:
            refused[name] = f"peer {first}"
    if (
        previous.snapshot.peers is snapshot.peers
        and len(previous.peers) == len(snapshot.peers)
        and not any(node.public_key in by_key for name in changed if (node := snapshot.nodes.get(name)))
    ):
        return frozenset(), ()
    for node in snapshot.nodes.values():
        if node.public_key in by_key:
            refused[by_key[node.public_key]] = f"node {node.name}"
    problems = tuple(
        Problem(
            subject=name, text=f"peer {name} is left out: it has the public key of {refused[name]}; give it its own"
        )
        for name in sorted(refused)
    )
    return frozenset(refused), problems


def _peers(
    snapshot: Snapshot, previous: Topology, settlement: Settlement, refused: frozenset[str]
) -> Mapping[str, Peer]:
    kept = snapshot.peers is previous.snapshot.peers and len(previous.peers) == len(snapshot.peers) and not refused
    if kept and settlement is previous.settlement:
        return previous.peers
    result: dict[str, Peer] = {}
    for name, peer in snapshot.peers.items():
        if name not in refused:
            granted = settlement(("peer", name))
            effective = peer if granted == peer.allowed_ips else evolve(peer, allowed_ips=granted)
            old = previous.peers.get(name)
            result[name] = old if old is not None and old == effective else effective
    return result
