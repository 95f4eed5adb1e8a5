"""Which address families a node can serve as the leader of its location, and to whom it gives way if it cannot serve
one.

A mesh with IPv4 and IPv6 has mesh addresses in both. A leader carries a family for the members of its location that
have an internal IP of it (`topology.next_hop`), and if its own kernel takes the mesh's addresses and routes of that
family. One that loses IPv6 (`disable_ipv6`, an address that is gone) goes on answering in IPv4: nobody suspects it, and
its location is cut off in IPv6.

A node gives way to a candidate of its segment that serves all that it serves itself, and a family more, and that it is
ahead of in the queue. It leaves the queue and stands anew at its end: one that serves less than others is no better a
leader for having been first, but better than none if the others stop or do not forward. It does not enter ahead of such
a candidate either, which only one that the operator has chosen could. What another host's kernel refuses is not known
here. So two may each take the other for the better one; since it is only ever the one ahead that leaves, the last one
stays.

Without such a candidate nothing is won by giving way, nor if other locations may not reach that candidate: one with a
public endpoint does not give way to one that has none of that family.

Pure: a snapshot comes in, and the families in which this host's own kernel refuses what the mesh needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from attrs import evolve, frozen

from kilo_etcd.kernel.state import FailedChange
from kilo_etcd.model import Candidate, CandidateClass, Granularity, IPNetwork, Node, Snapshot
from kilo_etcd.topology.next_hop import next_hop
from kilo_etcd.topology.segments import segment_key


def refused_families(failures: Iterable[FailedChange], subnets: Iterable[IPNetwork]) -> frozenset[int]:
    """The families of which the kernel does not take this host's mesh address, the mesh's own route or forwarding."""
    mesh = set(subnets)
    counting = [failure for failure in failures if not failure.aside]
    destinations = (failure.destination for failure in counting)
    routes = {destination.version for destination in destinations if destination is not None and destination in mesh}
    return frozenset(routes | {failure.version for failure in counting if failure.version})


@frozen
class GivesWay:
    """A node is to give way as a candidate: to node `to`, which serves `families` too."""

    to: str
    families: tuple[int, ...]

    def __str__(self) -> str:
        families = " and ".join(f"IPv{family}" for family in self.families)
        return f"{self.to} serves {families} in this location, and this host does not"


def gives_way(snapshot: Snapshot, name: str, refused: frozenset[int], rank: CandidateClass) -> GivesWay | None:
    """The candidate of its segment that node `name` is to give way to; None: there is none. `rank` is the class in
    which it would stand anew."""
    own = snapshot.nodes.get(name)
    if own is None:
        return None
    families = {subnet.version for subnet in snapshot.subnets}
    # Most hosts have all families: a location may have thousands of members.
    doubtful = {family for family in families if family in refused or own.internal_ip(family) is None}
    if not doubtful:
        return None
    in_location = {_kind(node): node for node in snapshot.nodes.values() if node.location == own.location}
    # As with all that candidacies depend on, whatever granularity is in force.
    grouped = evolve(snapshot, granularity=Granularity.LOCATION)
    key = segment_key(own, grouped)
    kinds = {kind: node for kind, node in in_location.items() if segment_key(node, grouped) == key}
    lacking = {family for family in doubtful if family in refused or _leaves_out(own, kinds.values(), family)}
    if not lacking:
        return None
    less = {
        kind: {family for family in families if _leaves_out(node, kinds.values(), family)}
        for kind, node in kinds.items()
    }
    candidates = snapshot.candidates.get(own.location, ())
    place = min([(rank, inf), *(_place(candidate) for candidate in candidates if candidate.node == name)])
    for candidate in candidates:
        other = snapshot.nodes.get(candidate.node)
        if other is None or other is own or other.location != own.location:
            continue
        if candidate.rank is CandidateClass.DEMOTED or _place(candidate) < place:
            continue
        # Of the location's other segment there is no kind here.
        missing = less.get(_kind(other), lacking)
        if missing < lacking and _reached_as_well(other, own):
            return GivesWay(other.name, tuple(sorted(lacking - missing)))
    return None


def _kind(node: Node) -> tuple[object, ...]:
    """All of a node that its segment, and the families in which it and others of its location reach each other, depend
    on. Of each kind one stands for all: two of one kind reach each other as one reaches itself."""
    return node.encapsulate, *(node.internal_ip(family) is None for family in (4, 6))


def _place(candidate: Candidate) -> tuple[CandidateClass, float]:
    """The queue's order."""
    return candidate.rank, candidate.create_revision


def _reached_as_well(other: Node, own: Node) -> bool:
    """Whether `other` has public endpoints of the families that `own` has them in. A DNS name stands for any."""
    public = [endpoint.address for endpoint in own.endpoints if endpoint.public]
    return all(any(map(other.public_in, (4, 6) if address is None else (address.version,))) for address in public)


def _leaves_out(leader: Node, members: Iterable[Node], family: int) -> bool:
    """Whether a member has an internal IP of a family in which it does not reach `leader`."""
    return any(
        member.internal_ip(family) is not None and next_hop(member, leader, family) is None for member in members
    )
