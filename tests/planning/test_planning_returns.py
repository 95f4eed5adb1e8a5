"""How a leader sends on what comes out of the tunnel for its members' internal IPs."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from attrs import evolve

from kilo_etcd.model import Encapsulate, Granularity, InternalIPs, Snapshot
from kilo_etcd.model.hostplan import Via
from kilo_etcd.planning.reach import MemberAddress, Silent, withhold
from kilo_etcd.planning.render import render
from kilo_etcd.planning.walk import walk
from kilo_etcd.topology.next_hop import next_hop
from kilo_etcd.topology.segments import build_topology
from topology_worlds import node, plans, snapshot

NEVER, ALWAYS, CROSS, WIREGUARD = Encapsulate.NEVER, Encapsulate.ALWAYS, Encapsulate.CROSSSUBNET, Encapsulate.WIREGUARD
INTERNAL = ip_network("10.0.0.2/32")


def back(leader: Encapsulate, member: Encapsulate, internal: str = "10.0.0.2/24", **rest: Any) -> list[str]:
    """What leader a1 does with what comes out of the tunnel for its member a2, as text."""
    world = snapshot(
        [
            node("a1", 1, "a", "10.0.0.1/24", "203.0.113.1", encapsulate=leader, location_ips="10.0.0.0/21"),
            node("a2", 2, "a", (internal, "fd00:a::2/64"), encapsulate=member),
            node("b1", 3, "b", "10.9.0.1/24", "203.0.113.3"),
        ],
        **rest,
    )
    made = plans(world)
    assert made["a2"].returns == made["b1"].returns == {}, "only a leader does, and for members"
    head = "out of the tunnel: "
    return [line.removeprefix(head) for line in render(made["a1"]).splitlines() if line.startswith(head)]


@pytest.mark.parametrize("mode", [NEVER, ALWAYS, CROSS])
def test_the_pair_s_way_is_taken(mode: Encapsulate) -> None:
    encapsulated = ["route 10.0.0.2/32 via 10.0.0.2 dev ipip"]
    assert back(mode, NEVER) == back(mode, CROSS) == (encapsulated if mode is ALWAYS else [])
    assert back(mode, ALWAYS) == encapsulated
    assert back(mode, CROSS, "10.0.7.2/24") == ["route 10.0.7.2/32 via 10.0.7.2 dev ipip"]
    assert back(mode, WIREGUARD) == back(WIREGUARD, mode) == ["route 10.0.0.2/32 dev wg"]


@pytest.mark.parametrize("internal", ["10.0.0.2/24", "10.0.0.2/25", "10.0.7.2/24"])
@pytest.mark.parametrize("one", Encapsulate)
@pytest.mark.parametrize("other", Encapsulate)
def test_a_pair_uses_one_way_in_both_directions(one: Encapsulate, other: Encapsulate, internal: str) -> None:
    """Else a host that checks the reverse path drops half of what comes in."""
    a = node("a1", 1, "a", "10.0.0.201/24", encapsulate=one)
    b = node("a2", 2, "a", internal, encapsulate=other)
    there, back = next_hop(a, b, 4), next_hop(b, a, 4)
    assert there is not None
    assert back is not None
    assert there.via is back.via
    if there.via is Via.UNDERLAY and {one, other} != {NEVER}:
        assert there.trouble == back.trouble == "", "nobody but two that never encapsulate needs a neighbour"


def test_both_take_part_in_it() -> None:
    world = snapshot(
        [
            node("a1", 1, "a", "10.0.0.1/24", "203.0.113.1", encapsulate=NEVER, location_ips="10.0.0.0/24"),
            node("a2", 2, "a", "10.0.0.2/24", encapsulate=ALWAYS),
            node("a3", 3, "a", "10.0.0.3/24", encapsulate=WIREGUARD),
        ]
    )
    made = plans(world)
    assert made["a1"].ipip_remotes == {INTERNAL.network_address}
    assert made["a2"].ipip_remotes == {made["a1"].ipip_local}
    allowed = {peer.name: [str(network) for network in peer.allowed_ips] for peer in made["a1"].peers.values()}
    assert allowed == {"a3": ["10.0.0.3/32", "10.4.0.3/32"]}, "what it sends from its internal IP is taken"


def test_an_address_that_has_never_answered_is_sent_nothing() -> None:
    world = snapshot(
        [
            node("a1", 1, "a", "10.0.0.1/24", "203.0.113.1", encapsulate=ALWAYS, location_ips="10.0.0.0/24"),
            node("a2", 2, "a", "10.0.0.2/24", encapsulate=ALWAYS),
            node("a3", 3, "a", "10.0.0.3/24", encapsulate=ALWAYS),
        ]
    )
    plan = plans(world)["a1"]
    silent = Silent(target=MemberAddress("a2", INTERNAL.network_address), withheld=True, named=True)
    left = withhold(plan, build_topology(world), [silent])
    assert list(map(str, left.returns)) == ["10.0.0.3/32"]
    assert {route.gateway for route in left.returns.values()} == left.ipip_remotes
    # Nor is what comes out of the tunnel for it left to the main table, by which it would go in clear.
    assert "out of the tunnel: unreachable 10.0.0.2/32" in render(left).splitlines()
    answered_once = withhold(plan, build_topology(world), [evolve(silent, withheld=False)])
    assert (answered_once.returns, answered_once.returns_refused) == (plan.returns, {})


@pytest.mark.parametrize("member", [NEVER, ALWAYS])
def test_what_comes_out_of_the_tunnel_for_an_address_that_has_never_answered_is_refused(member: Encapsulate) -> None:
    world = routed_world(ALWAYS, member)
    topology, made = build_topology(world), plans(world)
    assert walk(made, topology, "b1", INTERNAL.network_address).delivered
    silent = Silent(target=MemberAddress("a2", INTERNAL.network_address), withheld=True, named=True)
    made["a1"] = withhold(made["a1"], topology, [silent])
    path = walk(made, topology, "b1", INTERNAL.network_address)
    assert path.dropped == "a2 does not answer a1 at its internal IP 10.0.0.2"
    # A member has nothing of the kind: nothing comes out of its tunnel for others.
    silent = Silent(target=MemberAddress("a1", ip_address("10.0.0.1")), withheld=True, named=True)
    assert withhold(made["a2"], topology, [silent]).returns_refused == {}


def routed_world(leader: Encapsulate, member: Encapsulate, **rest: Any) -> Snapshot:
    """Two sites with networks of their own, and internal IPs that are routed."""
    return snapshot(
        [
            node("a1", 1, "a", "10.0.0.1/24", "203.0.113.1", encapsulate=leader, underlay=()),
            node("a2", 2, "a", "10.0.0.2/24", encapsulate=member, underlay=()),
            node("b1", 3, "b", "10.9.0.1/24", "203.0.113.3", underlay=()),
        ],
        internal_ips=InternalIPs.ROUTED,
        **rest,
    )


@pytest.mark.parametrize("member", Encapsulate)
@pytest.mark.parametrize("leader", Encapsulate)
def test_a_member_is_answered_at_a_routed_internal_ip_as_it_sends(leader: Encapsulate, member: Encapsulate) -> None:
    world = routed_world(leader, member)
    topology, made = build_topology(world), plans(world)
    there = walk(made, topology, "a2", ip_address("10.9.0.1"))
    back = walk(made, topology, "b1", INTERNAL.network_address)
    assert (there.source, back.source) == (INTERNAL.network_address, ip_address("10.9.0.1"))
    for path in (there, back):
        assert path.delivered, path
    medium = Via.TUNNEL if WIREGUARD in (leader, member) else Via.IPIP if ALWAYS in (leader, member) else Via.UNDERLAY
    assert there.hops[0].medium is back.hops[-1].medium is medium


def test_an_address_that_nobody_outside_sends_to_needs_none() -> None:
    lone = [
        node("a1", 1, "a", "10.0.0.1/24", "203.0.113.1", encapsulate=ALWAYS),
        node("a2", 2, "a", "10.0.0.2/24", encapsulate=ALWAYS),
    ]
    assert plans(snapshot(lone))["a1"].returns == {}
    offering = [evolve(lone[0], allowed_location_ips=(ip_network("10.0.0.0/24"),)), lone[1]]
    assert list(plans(snapshot(offering))["a1"].returns) == [INTERNAL]
    for granularity in (Granularity.FULL, Granularity.CROSS):
        assert plans(snapshot(offering, granularity))["a1"].returns == {}


def test_what_the_setting_internal_ips_routes_is_sent_on_as_the_member_sends_too() -> None:
    world = snapshot(
        [
            node("a1", 1, "a", "10.0.0.1/24", "203.0.113.1", encapsulate=NEVER, underlay=()),
            node("a2", 2, "a", "10.0.0.2/24", encapsulate=ALWAYS, underlay=()),
            node("b1", 3, "b", "10.9.0.1/24", "203.0.113.3", underlay=()),
        ],
        internal_ips=InternalIPs.ROUTED,
    )
    made = plans(world)
    assert INTERNAL in made["b1"].routes
    assert [(str(route.via), route.gateway) for route in made["a1"].returns.values()] == [
        ("ipip", INTERNAL.network_address)
    ]
    # An address that is routed to nobody needs none.
    twin = evolve(world.nodes["b1"], internal_ips=world.nodes["a2"].internal_ips)
    assert plans(evolve(world, nodes={**world.nodes, "b1": twin}))["a1"].returns == {}


@pytest.mark.parametrize("granularity", [Granularity.LOCATION, Granularity.CROSS])
def test_packets_that_always_cannot_encapsulate_are_named_once(granularity: Granularity) -> None:
    def problems(mode: Encapsulate, *internal: str) -> list[str]:
        world = snapshot(
            [node(f"a{n}", n, "a", tuple(ip.format(n) for ip in internal), encapsulate=mode) for n in range(1, 7)],
            granularity=granularity,
        )
        return [problem.text for plan in plans(world).values() for problem in plan.problems]

    said = problems(ALWAYS, "fd00:a::{}/64")
    assert len(said) == 6
    assert said[0] == (
        "packets to a2, a3, a4 and 2 more go over IPv6 as they are, although encapsulate is always: IPIP carries IPv4 "
        "only; encapsulate wireguard encapsulates them"
    )
    assert problems(ALWAYS, "10.0.0.{}/24", "fd00:a::{}/64") == []
    assert problems(CROSS, "fd00:a::{}/64") == problems(WIREGUARD, "fd00:a::{}/64") == []
