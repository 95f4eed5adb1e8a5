"""Small worlds, seen from each host in turn. To look at a change: `git diff tests/topology/worlds` after
`python tests/topology/test_topology_worlds.py`, which writes the files anew."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from attrs import evolve

from kilo_etcd.model import Endpoint, Granularity
from kilo_etcd.model.hostplan import HostPlan, Via
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.render import render
from kilo_etcd.planning.walk import walk, walk_both
from kilo_etcd.topology.segments import UnknownNode, build_topology
from topology_worlds import PHONE, SIX, WORLDS, candidates_of, node, peer, plans, seen_by_all, snapshot

PICTURES = Path(__file__).parent / "worlds"


@pytest.mark.parametrize("name", WORLDS)
def test_the_world_seen_from_each_host(name: str) -> None:
    assert seen_by_all(WORLDS[name]) == (PICTURES / f"{name}.txt").read_text(encoding="utf-8")


def test_a_failover_turns_one_route_on_a_member_and_no_peer() -> None:
    nodes = [node(f"a{n}", n, "a", f"10.0.0.{n}/24", "203.0.113.1") for n in (1, 2, 3)]
    nodes.append(node("b1", 9, "b", "10.0.0.1/24", "203.0.113.9"))
    before = host_plan(build_topology(snapshot(nodes, candidates=candidates_of(*nodes[:3]))), "a3")
    after = host_plan(build_topology(snapshot(nodes, candidates=candidates_of(*nodes[1:3]))), "a3")
    assert before.peers == after.peers
    assert [str(key) for key in before.routes if before.routes[key] != after.routes[key]] == ["10.4.0.0/16"]


def test_the_routes_of_a_member_do_not_grow_with_the_mesh() -> None:
    nodes = [node(f"n{n}", n, f"l{n // 5}", f"10.0.0.{n % 5 + 1}/24", f"203.0.113.{n}") for n in range(100)]
    assert len(host_plan(build_topology(snapshot(nodes)), "n3").routes) == 5


def test_nodes_that_share_no_family_are_not_put_into_one_segment() -> None:
    nodes = [
        node("a1", 1, "a", "10.0.0.1/24", "203.0.113.1"),
        node("a2", 2, "a", "fd00:a::2/64", "203.0.113.2"),
        node("a3", 3, "a", ("10.0.0.3/24", "fd00:a::3/64"), "203.0.113.3"),
    ]
    topology = build_topology(snapshot(nodes))
    assert {tuple(m.name for m in s.members) for s in topology.segments.values()} == {("a1", "a3"), ("a2",)}
    there, back = walk_both(plans(topology.snapshot), topology, "a1", "a2", 4)
    assert there.delivered
    assert back.delivered


def test_an_unknown_node_is_named() -> None:
    with pytest.raises(UnknownNode, match="no node 'x' in the mesh"):
        host_plan(build_topology(snapshot(SIX)), "x")
    with pytest.raises(KeyError):
        build_topology(snapshot(SIX)).segment_of("x")


def test_a_node_that_has_no_address_yet_harms_nobody() -> None:
    new = evolve(SIX[1], mesh_addresses=())
    world = snapshot([new, *SIX[2:], SIX[0]])
    assert "addr" not in render(plans(world)["a2"])
    assert plans(world)["a1"].routes.keys() < plans(snapshot(SIX))["a1"].routes.keys()


def test_the_longer_registered_node_keeps_a_network_and_everyone_agrees() -> None:
    old = evolve(SIX[4], subnets=(ip_network("172.20.0.0/16"),), registered_revision=1)
    new = evolve(SIX[1], registered_revision=2)
    for host, plan in plans(snapshot([old, new, SIX[0], SIX[3]])).items():
        every = {str(n): p.name for p in plan.peers.values() for n in p.allowed_ips}
        assert "172.20.2.0/24" not in every, host
        assert ip_network("172.20.2.0/24") not in plan.routes, host
        assert [p.text for p in plan.problems if p.subject == "172.20.2.0/24"] == [
            "172.20.2.0/24 of node a2 is left out: it overlaps 172.20.0.0/16 of node b2, which comes first; "
            "take it out of one of the two"
        ], host


@pytest.mark.parametrize(
    ("offered", "why"),
    [
        ("0.0.0.0/0", "a default route"),
        ("127.0.0.0/8", "each host's own"),
        ("169.254.169.254/32", "each host's own"),
        ("224.0.0.0/4", "each host's own"),
        ("fe80::/64", "each host's own"),
        ("10.0.0.0/8", "it covers the mesh's own subnet"),
        ("10.4.0.0/24", "it holds the mesh address of a node"),
        ("172.20.2.128/25", "it overlaps 172.20.2.0/24 of node a2"),
    ],
)
def test_what_an_outside_peer_may_not_have(offered: str, why: str) -> None:
    for plan in plans(snapshot(SIX, peers=[peer("p", offered + " 10.9.0.0/24")])).values():
        assert ip_network(offered) not in plan.routes
        assert plan.peers["key-p"].allowed_ips == (ip_network("10.9.0.0/24"),)
        assert any(why in problem.text for problem in plan.problems)


def test_a_peer_inside_the_mesh_subnet_is_reached() -> None:
    world = snapshot(SIX, peers=[peer("p", "10.4.200.1/32")])
    topology = build_topology(world)
    for name, plan in plans(world).items():
        assert not [problem for problem in plan.problems if problem.subject != "b2"]
        assert walk(plans(world), topology, name, ip_address("10.4.200.1")).hops[-1].target == "peer p"


def test_an_outside_peer_with_the_key_of_a_node_is_left_out_until_the_key_is_free() -> None:
    thief = evolve(PHONE, public_key="key-a2")
    world = snapshot(SIX, peers=[thief])
    topology = build_topology(world)
    assert not topology.peers
    assert "public key of node a2" in topology.problems[0].text
    freed = evolve(world, nodes={**world.nodes, "a2": evolve(SIX[1], public_key="other")})
    assert build_topology(freed, topology) == build_topology(freed)
    assert build_topology(freed, topology).peers == {"phone": thief}


class TestWalk:
    """What the walker finds in plans that are wrong."""

    topology = build_topology(snapshot(SIX))

    def path(self, start: str, goal: str, **changed: HostPlan) -> str:
        found = plans(self.topology.snapshot)
        return str(walk({**found, **changed}, self.topology, start, goal))

    def test_across_the_world(self) -> None:
        assert self.path("a3", "b2") == "a3 -ipip-> a1 -tunnel-> b1 -underlay-> b2 delivered"
        assert self.path("a1", "a1") == "here delivered"

    def test_behind_a_node(self) -> None:
        path = walk(plans(self.topology.snapshot), self.topology, "b2", ip_address("172.20.2.9"))
        assert [(hop.target, hop.encrypted) for hop in path.hops] == [("b1", False), ("a1", True), ("a2", False)]

    def test_no_route(self) -> None:
        bare = evolve(host_plan(self.topology, "a1"), routes={})
        assert "a1 has no route to 10.4.0.5" in self.path("a2", "b2", a1=bare)

    def test_no_peer(self) -> None:
        bare = evolve(host_plan(self.topology, "a1"), peers={})
        assert "a1 has no WireGuard peer whose allowed IPs hold 10.4.0.5" in self.path("a2", "b2", a1=bare)
        assert "a1 has no WireGuard peer b1" in self.path("b2", "a2", a1=bare)

    def test_the_receiver_checks_the_source(self) -> None:
        plan = host_plan(self.topology, "b1")
        narrow = evolve(plan.peers["key-a1"], allowed_ips=(ip_network("10.4.0.1/32"),))
        path = self.path("a2", "b2", b1=evolve(plan, peers={**plan.peers, "key-a1": narrow}))
        assert path.endswith(
            "dropped: b1 does not take 10.4.0.2 from a1: by its allowed IPs the address belongs to nobody"
        )

    def test_no_forwarding(self) -> None:
        still = evolve(host_plan(self.topology, "b1"), forwarding=frozenset())
        assert self.path("a1", "b2", b1=still).endswith("dropped: b1 does not forward IPv4")

    def test_loop(self) -> None:
        plan = host_plan(self.topology, "a1")
        mesh = ip_network("10.4.0.0/16")
        turned = evolve(plan.routes[mesh], via=Via.UNDERLAY, gateway=ip_address("10.0.0.2"))
        looping = evolve(plan, routes={**plan.routes, mesh: turned})
        assert self.path("a1", "b2", a1=looping).endswith("dropped: it comes back to a1: a routing loop")

    def test_not_a_neighbour(self) -> None:
        world = WORLDS["ipip-never"]
        path = walk(plans(world), build_topology(world), "a3", "a1")
        assert path.dropped == "the gateway 10.0.0.1 is not a neighbour of a3"

    def test_ipip_is_refused(self) -> None:
        deaf = evolve(host_plan(self.topology, "a1"), ipip_remotes=frozenset())
        assert self.path("a3", "b1", a1=deaf).endswith("dropped: a1 does not take IPIP from a3")

    def test_no_endpoint_on_either_side(self) -> None:
        world = snapshot(SIX, Granularity.FULL)
        path = walk(plans(world), build_topology(world), "a2", "b2")
        assert path.dropped == "neither of a2 and b2 knows an endpoint of the other"


def test_in_a_full_mesh_of_one_site_tunnels_stay_inside() -> None:
    plan = plans(snapshot(SIX, Granularity.FULL))["a1"]
    assert plan.peers["key-a2"].endpoint == Endpoint(ip_address("10.0.0.2"), 51820)


if __name__ == "__main__":
    for world_name, world_value in WORLDS.items():
        (PICTURES / f"{world_name}.txt").write_text(seen_by_all(world_value), encoding="utf-8")
