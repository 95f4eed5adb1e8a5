"""Which address families a node can serve as the leader of its location, and to whom it gives way if it cannot serve
one.

A mesh with IPv4 and IPv6 has mesh addresses in both. A leader carries a family for the members of its location that
have an internal IP of it (`topology.next_hop`), and if its own kernel takes the mesh's addresses and routes of that
family. One that loses IPv6 (`disable_ipv6`, an address that is gone) goes on answering in IPv4: nobody suspects it, and
its location is cut off in IPv6.

A node gives way to a candidate that serves all that it serves itself, and a family more: never two to each other. One
that serves less than others because of how it was set up is no better a leader for having been first. Without such a
candidate nothing is won by giving way, nor if other locations may not reach that candidate: one with a public endpoint
does not give way to one without.

Pure: a snapshot comes in, and the families in which this host's own kernel refuses what the mesh needs.
"""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen

from kilo_etcd.kernel.state import FailedChange
from kilo_etcd.model import CandidateClass, IPNetwork, Node, Snapshot
from kilo_etcd.topology.next_hop import next_hop


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


def gives_way(snapshot: Snapshot, name: str, refused: frozenset[int]) -> GivesWay | None:
    """The candidate of its location that node `name` is to give way to; None: there is none."""
    own = snapshot.nodes.get(name)
    if own is None:
        return None
    families = {subnet.version for subnet in snapshot.subnets}
    # Most hosts have all families: a location may have thousands of members.
    doubtful = {family for family in families if family in refused or own.internal_ip(family) is None}
    if not doubtful:
        return None
    members = [node for node in snapshot.nodes.values() if node.location == own.location and node.internal_ips]
    lacking = {family for family in doubtful if family in refused or _leaves_out(own, members, family)}
    for candidate in snapshot.candidates.get(own.location, ()):
        other = snapshot.nodes.get(candidate.node)
        if other is None or other is own or candidate.rank is CandidateClass.DEMOTED:
            continue
        if _public(own) and not _public(other):
            continue
        less = {family for family in families if _leaves_out(other, members, family)}
        if less < lacking:
            return GivesWay(other.name, tuple(sorted(lacking - less)))
    return None


def _public(node: Node) -> bool:
    return node.endpoint is not None and node.endpoint.public


def _leaves_out(leader: Node, members: Iterable[Node], family: int) -> bool:
    """Whether a member has an internal IP of a family in which it does not reach `leader`."""
    return any(
        member.internal_ip(family) is not None and next_hop(member, leader, family) is None
        for member in members
        if member.name != leader.name
    )
