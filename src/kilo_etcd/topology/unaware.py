"""Sentences on agents that do not know the setting internal-ips. Pure.

`Topology.unaware` has their nodes; the setting waits for them; once the mesh encrypts
they are left out alone (`Topology.left_out`).
"""

from __future__ import annotations

from collections.abc import Iterator

from kilo_etcd.base.quoting import first_of
from kilo_etcd.model import InternalIPs
from kilo_etcd.model.hostplan import Problem
from kilo_etcd.topology.segments import Topology

MOST_NAMED = 5


def unaware_problems(topology: Topology) -> tuple[Problem, ...]:
    """One for each node that is left out of `encrypted`, or one if that is not in force for their sake: who has set it
    relies on it. What `routed` waits for is no trouble, see `waiting`."""
    if topology.snapshot.internal_ips is not InternalIPs.ENCRYPTED or not topology.unaware:
        return ()
    return tuple(_left_out(topology)) if topology.left_out else (_not_in_force(topology),)


def waiting(topology: Topology) -> str | None:
    """What `routed` waits for, as during each upgrade to the first version that knows it; None: for nothing."""
    setting = topology.snapshot.internal_ips
    if setting is not InternalIPs.ROUTED or not topology.unaware:
        return None
    return (
        f"{setting} waits until every agent knows the setting, and {topology.internal_ips} is in force meanwhile: "
        f"upgrade the agents on {first_of(sorted(topology.unaware), MOST_NAMED)}, or forget the nodes (kgctl node "
        "forget NODE)"
    )


def _left_out(topology: Topology) -> Iterator[Problem]:
    setting = topology.internal_ips
    named = sorted(topology.left_out)
    for name in named[:MOST_NAMED]:
        segment = topology.segment_of(name)
        leads = segment.leader.name == name and len(segment.members) > 1
        whom = "it and the nodes that it leads" if leads else "it"
        text = (
            f"node {name} is left out of internal-ips={setting}, since its agent does not know the setting: between "
            f"{whom} and other nodes' internal IPs packets travel in clear; upgrade its agent, or forget the node "
            f"(kgctl node forget {name})"
        )
        yield Problem(subject=name, text=text)
    if (more := len(named) - MOST_NAMED) > 0:
        text = (
            f"{more} more nodes are left out of internal-ips={setting}: upgrade their agents (kgctl status names all)"
        )
        yield Problem(subject="internal-ips", text=text)


def _not_in_force(topology: Topology) -> Problem:
    setting, named = topology.snapshot.internal_ips, sorted(topology.unaware)
    return Problem(
        subject="internal-ips",
        text=f"internal-ips={setting} is not in force, since the agents on {first_of(named, MOST_NAMED)} do "
        "not know the setting: packets for internal IPs travel outside of the tunnels; upgrade these agents, or forget "
        "the nodes (kgctl node forget NODE)",
        about=named[0],
    )
