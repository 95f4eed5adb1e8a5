"""What follows from the mesh's granularity: one policy for each, which all that depends on it asks. Pure.

A node with no internal IP is a segment of its own whatever the policy is, since it shares no network with others.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from kilo_etcd.model import DEFAULT_LOCATION, Granularity, Node
from kilo_etcd.topology.families import same_site


@frozen(kw_only=True, eq=False)
class GranularityPolicy:
    """How the nodes of one location reach each other and the rest of the mesh."""

    leader_per_location: bool
    """Whether the nodes of a location share a leader. Else each node is a segment of its own."""
    direct_within_location: bool
    """Whether nodes of one location reach each other over its own network although each is a segment of its own."""
    default_location_is_a_site: bool
    """Whether nodes with no label share a network, as the nodes of one label do."""

    @property
    def location_network_in_use(self) -> bool:
        """Whether nodes of one location reach each other over its own network, and not through tunnels."""
        return self.leader_per_location or self.direct_within_location

    def tunnel_between(self, leader: Node, other: Node) -> bool:
        """Whether the leaders of two segments have a tunnel to each other."""
        return not (self.direct_within_location and same_site(leader, other))

    def share_no_site(self, site: str | None, other: str | None) -> bool:
        """Whether nodes of two segments, by their sites, may be sent packets for internal IPs through the tunnels: the
        segments of one location reach each other there over the location's own network."""
        return site is None or site != other or (site == DEFAULT_LOCATION and not self.default_location_is_a_site)


POLICIES: Mapping[Granularity, GranularityPolicy] = {
    Granularity.LOCATION: GranularityPolicy(
        leader_per_location=True, direct_within_location=False, default_location_is_a_site=True
    ),
    Granularity.FULL: GranularityPolicy(
        leader_per_location=False, direct_within_location=False, default_location_is_a_site=False
    ),
    Granularity.CROSS: GranularityPolicy(
        leader_per_location=False, direct_within_location=True, default_location_is_a_site=True
    ),
}
