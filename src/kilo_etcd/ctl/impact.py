"""What a change of etcd's records does to the mesh, in sentences: two snapshots, before and after, held side by side.

Pure. It says what an operator would otherwise see afterwards in `kgctl status`: who moves, who leads instead of whom,
how many tunnels there are, and what cannot be used or given any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import comb

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.reports.render import clean, shown_location
from kilo_etcd.ctl.reports.report import grouped_unrouted, unrouted_remarks, unrouted_sentence
from kilo_etcd.model import InternalIPs, Node, Snapshot
from kilo_etcd.planning.exit_node import trouble_of
from kilo_etcd.store.annotations import ANNOTATIONS
from kilo_etcd.topology.graph import EdgeKind, edges
from kilo_etcd.topology.inclear import back_in_clear, endpoints_in_clear
from kilo_etcd.topology.segments import Segment, Topology, build_topology
from kilo_etcd.topology.unaware import unaware_problems

MOST_REASONS = 4
"""Names in one question; a label set on a hundred nodes moves a hundred."""

MOST_NOTES = 10


def impact(before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    """What differs, most important first; empty where the mesh is the same."""
    old, new = build_topology(before), build_topology(after)
    return (
        *_mesh(before, after),
        *_internal_ips(old, new),
        *_nodes(before, after),
        *_leaders(old, new),
        *_tunnels(old, new),
        *_peers(old, new),
        *_complaints(old, new),
        *_notes(old, new),
    )


def disruption(before: Snapshot, after: Snapshot) -> str:
    """A question to ask before a change by which hosts lose packets, for a moment or for good; empty: none does.

    What is only added (a label for a host to come, a network, an exit node) is no disruption.
    """
    reasons = [
        f"{clean(name)} {text}"
        for name in sorted({*before.nodes, *after.nodes})
        for text in _losses(before.nodes.get(name), after.nodes.get(name))
    ]
    old, new = build_topology(before), build_topology(after)
    reasons += (
        f"{clean(new_leader)} leads {shown_location(location)} instead of {clean(old_leader)}"
        for location, old_leader, new_leader in _new_leaders(old, new)
    )
    reasons += (f"peer {clean(name)} is cut off" for name in sorted(old.peers.keys() - new.peers.keys()))
    if not reasons:
        return ""
    return f"This interrupts traffic in use: {first_of(reasons, MOST_REASONS, '; ')}. Continue?"


def _losses(old: Node | None, new: Node | None) -> Iterator[str]:
    if old is None:
        return
    if new is None:
        yield "leaves the mesh"
        return
    if old.location != new.location:
        yield f"moves to {shown_location(new.location)}"
    if old.endpoint is not None and old.endpoint != new.endpoint:
        yield f"is expected at {new.endpoint or 'no endpoint'}"
    if old.internal_ips and old.internal_ips != new.internal_ips:
        yield f"has internal IP {_listed(new.internal_ips)}"
    lost = {*old.subnets, *old.allowed_location_ips}.difference(new.subnets, new.allowed_location_ips)
    if lost:
        yield f"does not lead any more to {_listed(sorted(lost, key=str))}"
    if old.advertises_exit_node and not new.advertises_exit_node:
        yield "is not an exit node any more"
    if old.exit_node != new.exit_node:
        yield f"leaves for the internet by {clean(new.exit_node) or 'its own network'}"


def _new_leaders(old: Topology, new: Topology) -> Iterator[tuple[str, str, str]]:
    """(location, former leader, present leader), of locations whose leader differs."""
    before, after = _shared(old), _shared(new)
    for location in sorted(before.keys() & after.keys()):
        former, present = before[location].leader.name, after[location].leader.name
        if former != present:
            yield location, former, present


def _mesh(before: Snapshot, after: Snapshot) -> Iterator[str]:
    if before.granularity is not after.granularity:
        yield f"granularity: {before.granularity} becomes {after.granularity}"
    if before.internal_ips is not after.internal_ips:
        yield f"internal-ips: {before.internal_ips} becomes {after.internal_ips}"


def _internal_ips(old: Topology, new: Topology) -> Iterator[str]:
    """What becomes of packets between nodes if the setting is another."""
    was, becomes = old.internal_ips, new.internal_ips
    if old.snapshot.internal_ips is new.snapshot.internal_ips or was is becomes:
        return
    nodes = _counted(len(new.snapshot.nodes), "node")
    if becomes is InternalIPs.ENCRYPTED:
        yield (
            f"the agents of {nodes} switch one by one, so that no packet is lost: each takes packets from the tunnels, "
            "then sends into them, then refuses what comes in clear; kgctl status names the nodes that it waits for"
        )
        endpoints = len(list(endpoints_in_clear(new)))
        next_line = ", what the next line names" if endpoints else ""
        yield (
            "from then on nodes of different segments send each other nothing in clear but etcd's, WireGuard's and "
            f"the agents' own packets, ICMP errors, DHCP{next_line} and what --clear lists; where a tunnel is down "
            "packets are dropped; multicast and broadcast between these nodes are refused"
        )
        if endpoints:
            yield (
                f"packets to and from {_counted(endpoints, 'endpoint')} of nodes in locations with "
                "several members stay in clear, and these nodes refuse no clear text; granularity full encrypts them"
            )
    elif was is InternalIPs.ENCRYPTED:
        leaving, staying = back_in_clear(old, new)
        if leaving:
            internal = {ip.ip for node in old.snapshot.nodes.values() for ip in node.internal_ips}
            counts = ((len(leaving - internal), "endpoint"), (len(leaving & internal), "internal IP"))
            amounts = " and ".join(_counted(count, name) for count, name in counts if count)
            scope = "" if becomes is InternalIPs.OFF else ", from some segments or from all"
            yield (
                f"packets to {amounts} go in clear again{scope}, from the moment on that both ends have gone back: "
                "each first takes what comes in clear, then sends it"
            )
        if staying:
            noun = "other internal IP" if leaving else "internal IP"
            yield f"packets to {_counted(len(staying), noun)} stay in the tunnels"
    if becomes is InternalIPs.OFF and (count := _routed(old)):
        yield (
            f"packets for internal IPs of other segments leave the tunnels: the hosts' own routes lead them, in clear, "
            f"or nowhere ({_counted(count, 'address', 'es')})"
        )
    elif was is InternalIPs.OFF and (count := _routed(new)):
        many = _counted(count, "address", "es")
        yield f"packets for internal IPs of other segments go into the tunnels ({many}), at once"


def _routed(topology: Topology) -> int:
    """How many internal IPs are routed, by `encrypted` too."""
    return sum(len(segment.internal) for segment in topology.segments.values()) if len(topology.segments) > 1 else 0


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else plural}"


def _nodes(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for name in sorted({*before.nodes, *after.nodes}):
        old, new = before.nodes.get(name), after.nodes.get(name)
        if old is None:
            yield f"{clean(name)} joins the mesh"
        elif new is None:
            yield f"{clean(name)} leaves the mesh: the others forget its key and its addresses"
        elif old != new:
            yield from (f"{clean(name)} {text}" for text in _node(old, new))


def _node(old: Node, new: Node) -> Iterator[str]:
    if old.location != new.location:
        yield f"moves from {shown_location(old.location)} to {shown_location(new.location)}"
    for annotation in ANNOTATIONS.values():
        yield from map(clean, annotation.impact(old, new))


def _leaders(old: Topology, new: Topology) -> Iterator[str]:
    before, after = _shared(old), _shared(new)
    for location, former, present in _new_leaders(old, new):
        yield f"{shown_location(location)}: {clean(present)} leads instead of {clean(former)}"
    for location in sorted(after.keys() - before.keys()):
        segment = after[location]
        yield f"{shown_location(location)}: {clean(segment.leader.name)} leads {len(segment.members)} nodes"


def _shared(topology: Topology) -> dict[str, Segment]:
    return {segment.location: segment for segment in topology.segments.values() if len(segment.members) > 1}


def _tunnels(old: Topology, new: Topology) -> Iterator[str]:
    before, after = map(_count, (old, new))
    if before != after:
        yield f"tunnels between nodes: {after} instead of {before}"


def _count(topology: Topology) -> int:
    if topology.policy.direct_within_location:
        return sum(edge.kind is EdgeKind.TUNNEL for edge in edges(topology))
    return comb(len(topology.segments), 2)


def _peers(old: Topology, new: Topology) -> Iterator[str]:
    for name in sorted({*old.peers, *new.peers}):
        if name not in old.peers:
            yield f"peer {clean(name)} joins the mesh"
        elif name not in new.peers:
            yield f"peer {clean(name)} leaves the mesh"
        elif old.peers[name].allowed_ips != new.peers[name].allowed_ips:
            new_ips, old_ips = new.peers[name].allowed_ips, old.peers[name].allowed_ips
            yield f"peer {clean(name)} gets {_listed(new_ips)} instead of {_listed(old_ips)}"


def new_trouble(before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    """What is rejected, or not granted in full, that was not before."""
    old_troubles = set(_troubles(build_topology(before)))
    return tuple(text for text in _troubles(build_topology(after)) if text not in old_troubles)


def _complaints(old: Topology, new: Topology) -> Iterator[str]:
    before, after = _troubles(old), _troubles(new)
    old_troubles, new_troubles = set(before), set(after)
    yield from (f"new trouble: {text}" for text in after if text not in old_troubles)
    yield from (f"trouble that ends: {text}" for text in before if text not in new_troubles)


def _notes(old: Topology, new: Topology) -> Iterator[str]:
    old_remarks = set(unrouted_remarks(old))
    came = grouped_unrouted(note for note in unrouted_remarks(new) if note not in old_remarks)
    yield from (f"note: {clean(note.subject)}: {clean(unrouted_sentence(note))}" for note in came[:MOST_NOTES])
    if len(came) > MOST_NOTES:
        yield f"note: {len(came) - MOST_NOTES} more of these; kgctl status will show them"


def _troubles(topology: Topology) -> list[str]:
    aside = [f"{clean(note.key)}: {clean(note.reason)}" for note in topology.snapshot.rejected]
    stuck = [
        f"{clean(name)}: {clean(text)}"
        for name, node in sorted(topology.snapshot.nodes.items())
        if node.exit_node and (text := trouble_of(topology, name)) is not None
    ]
    return (
        aside
        + [
            f"{clean(problem.subject)}: {clean(problem.text)}"
            for problem in (*topology.problems, *unaware_problems(topology))
        ]
        + stuck
    )


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items)) or "none"
