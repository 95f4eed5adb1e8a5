"""What an election is decided by: candidacies, and what probers report of leaders."""

from __future__ import annotations

from enum import IntEnum

from attrs import frozen


class CandidateClass(IntEnum):
    """How well a candidate suits as leader; the smaller leads."""

    ANNOTATED_PUBLIC = 0
    ANNOTATED = 1
    PUBLIC = 2
    REST = 3
    DEMOTED = 4
    """It led and did not forward: it is a candidate again, behind all others, until its hold-down is over."""


@frozen(kw_only=True)
class Candidate:
    """A node's standing offer to lead its location; it lives as long as the node's short lease."""

    node: str
    rank: CandidateClass
    create_revision: int
    since: str = ""
    """RFC 3339 time at which the candidacy was entered; for people only, nothing is decided by it."""


@frozen(kw_only=True)
class ProbeReport:
    """What a prober reports of a leader through which it reaches no target any more; it lives as long as the prober's
    short lease. Single observations: `topology.probe_reports` decides what follows from them."""

    prober: str
    leader: str
    candidacy: int
    """etcd's create revision of the candidacy by which it led: a later one of the same node is not meant."""
    targets: tuple[str, ...] = ()
    """The nodes that were tried; if the prober is one of them, the members of the leader's location were."""
    leader_reachable: bool = False
    """The leader itself answers the prober, without forwarding."""
    members_reachable: bool = False
    """Another member of the location answers the prober."""
    can_take_over: bool = False
    """The prober has a tunnel of its own to one of the targets, just verified by a handshake: it could lead instead."""
    unconfirmed: bool = False
    """No other host has reported the leader for as long as it would take one."""
