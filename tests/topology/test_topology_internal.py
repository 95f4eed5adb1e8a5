"""The hosts' internal IPs as addresses that the mesh routes."""

from __future__ import annotations

from attrs import evolve
from topology_worlds import node, snapshot

from kilo_etcd.model import InternalIPs
from kilo_etcd.topology import build_topology


def test_the_setting_is_in_force_when_every_node_knows_it() -> None:
    old, new = node("a", 1, "a", "10.1.0.1/24"), node("b", 2, "b", "10.2.0.1/24", underlay=())
    world = snapshot([old, new], internal_ips=InternalIPs.ROUTED)
    first = build_topology(world)
    assert (first.internal_ips, first.unaware) == (InternalIPs.OFF, {"a"})
    upgraded = evolve(world, nodes={**world.nodes, "a": evolve(old, underlay=())})
    second = build_topology(upgraded, first)
    assert (second.internal_ips, second.unaware) == (InternalIPs.ROUTED, frozenset())
    assert second == build_topology(upgraded)
    third = build_topology(world, second)
    assert (third.internal_ips, third.unaware) == (InternalIPs.OFF, {"a"})
    forgotten = evolve(world, nodes={"b": new})
    assert build_topology(forgotten, third) == build_topology(forgotten)
    assert build_topology(forgotten, third).internal_ips is InternalIPs.ROUTED
