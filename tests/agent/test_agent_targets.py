"""Which hosts are tried, of more than can be tried: those that are known to live."""

from __future__ import annotations

from attrs import evolve

from kilo_etcd.agent.probing.ping_targets import nodes_to_try
from kilo_etcd.agent.probing.probe_assignment import assignment_of
from kilo_etcd.model import Candidate, CandidateClass, Snapshot
from kilo_etcd.topology.segments import build_topology
from topology_worlds import node, snapshot

LIVING = ("far-1", "far-2")


def mesh_with_records_of_dead_hosts() -> Snapshot:
    """Two hosts at home, each of two other sites with one that lives, and 200 records that nobody stands behind."""
    nodes = [
        node("home-1", 1, "home", "10.0.0.1/24", "203.0.113.1"),
        node("home-2", 2, "home", "10.0.0.2/24", "203.0.113.2"),
        *(node(name, 3 + n, name, f"10.1.{n}.1/24", f"203.0.113.{3 + n}") for n, name in enumerate(LIVING)),
        *(node(f"dead-{n}", 10 + n, f"dead-{n}", f"10.2.{n}.1/24", f"198.51.100.{n}") for n in range(200)),
    ]
    standing = {"home": ("home-1", "home-2"), **{name: (name,) for name in LIVING}}
    candidates = {
        location: tuple(
            Candidate(node=name, rank=CandidateClass.PUBLIC, create_revision=n) for n, name in enumerate(names, 1)
        )
        for location, names in standing.items()
    }
    return evolve(snapshot(nodes), candidates=candidates)


def test_a_leader_is_watched_by_hosts_that_live() -> None:
    assignment = assignment_of(build_topology(mesh_with_records_of_dead_hosts()), "home-2")
    assert assignment is not None
    assert {target.name for target in assignment.targets[:2]} == set(LIVING)


def test_check_sends_packets_to_hosts_that_live() -> None:
    topology = build_topology(mesh_with_records_of_dead_hosts())
    for name in ("home-1", "home-2"):
        assert {tried.name for tried in nodes_to_try(topology, name, 10)} & set(LIVING) == set(LIVING)
