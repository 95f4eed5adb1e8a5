"""The hosts' internal IPs as addresses that the mesh routes."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from attrs import evolve

from kilo_etcd.model import Encapsulate, Endpoint, Granularity, InternalIPs, Node, Snapshot
from kilo_etcd.model.hostplan import Via
from kilo_etcd.planning.peerplan import peer_plan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.route_filter import FilterMemo, filter_routes
from kilo_etcd.topology.segments import Topology, build_topology, routed_at
from kilo_etcd.topology.unrouted import named, private_leaders
from topology_worlds import MESH, MESH6, candidates_of, node, peer, snapshot


def test_the_setting_is_in_force_when_every_node_knows_it() -> None:
    old, new = node("a", 1, "a", "10.1.0.1/24"), node("b", 2, "b", "10.2.0.1/24", underlay=())
    world = snapshot([old, new], internal_ips=InternalIPs.ROUTED)
    first = build_topology(world)
    assert (first.internal_ips, first.unaware) == (InternalIPs.OFF, frozenset({"a"}))
    upgraded = evolve(world, nodes={**world.nodes, "a": evolve(old, underlay=())})
    second = build_topology(upgraded, first)
    assert (second.internal_ips, second.unaware) == (InternalIPs.ROUTED, frozenset())
    assert second == build_topology(upgraded)
    third = build_topology(world, second)
    assert (third.internal_ips, third.unaware) == (InternalIPs.OFF, frozenset({"a"}))
    forgotten = evolve(world, nodes={"b": new})
    assert build_topology(forgotten, third) == build_topology(forgotten)
    assert build_topology(forgotten, third).internal_ips is InternalIPs.ROUTED


def here(name: str, number: int, location: str, internal: str | tuple[str, ...] = (), **rest: Any) -> Node:
    """A node whose agent knows the setting."""
    links = rest.pop("links", "")
    return node(name, number, location, internal, underlay=tuple(map(ip_network, links.split())), **rest)


A1 = here("a1", 1, "a", "10.1.0.1/24", endpoint="203.0.113.1")
A2 = here("a2", 2, "a", "10.1.0.2/24")
B1 = here("b1", 3, "b", "10.2.0.1/24", endpoint="203.0.113.3")
B2 = here("b2", 4, "b", "10.2.0.2/24")
SITES = (A1, A2, B1, B2)


def routed(*nodes: Node, **rest: Any) -> Topology:
    return build_topology(snapshot(nodes, internal_ips=InternalIPs.ROUTED, **rest))


def world_of(topology: Topology) -> Snapshot:
    return topology.snapshot


def routes(topology: Topology, name: str) -> dict[str, tuple[str, str, str]]:
    """Internal IP -> way, next hop and source of the host's route to it."""
    every = {ip.ip for other in topology.snapshot.nodes.values() for ip in other.internal_ips}
    return {
        str(network.network_address): (str(route.via), str(route.gateway or ""), str(route.source))
        for network, route in host_plan(topology, name).routes.items()
        if network.num_addresses == 1 and network.network_address in every
    }


def allowed(topology: Topology, name: str, other: str) -> set[str]:
    (found,) = (one for one in host_plan(topology, name).peers.values() if one.name == other)
    return {str(network) for network in found.allowed_ips}


def test_leaders_and_members_route_the_internal_ips_of_other_segments_from_their_own() -> None:
    topology = routed(*SITES)
    assert routes(topology, "a1") == {
        "10.2.0.1": ("tunnel", "", "10.1.0.1"),
        "10.2.0.2": ("tunnel", "", "10.1.0.1"),
    }
    assert routes(topology, "a2") == {
        "10.2.0.1": ("underlay", "10.1.0.1", "10.1.0.2"),
        "10.2.0.2": ("underlay", "10.1.0.1", "10.1.0.2"),
    }
    assert {"10.2.0.1/32", "10.2.0.2/32", "10.4.0.3/32"} <= allowed(topology, "a1", "b1")
    assert topology.unrouted == ()


def test_off_routes_none() -> None:
    topology = build_topology(snapshot(SITES))
    assert routes(topology, "a1") == {}
    assert topology.unrouted == ()


def test_an_address_that_two_have_is_routed_to_neither() -> None:
    # No network in common: forced addresses are on no link.
    twin = evolve(B2, internal_ips=A2.internal_ips)
    other = here("c1", 5, "c", "10.3.0.1/24", endpoint="203.0.113.5")
    topology = routed(A1, A2, B1, twin, other)
    assert "10.1.0.2" not in routes(topology, "c1")
    assert "10.1.0.1" in routes(topology, "c1")
    entry, twice = topology.unrouted
    assert (str(entry.network), entry.segments, entry.not_from) == ("10.1.0.0/24", ("a", "b"), ("a", "b"))
    assert (str(twice.network), twice.nodes, twice.not_from) == ("10.1.0.2/32", ("a2", "b2"), ())
    assert twice.reason == "a2 and b2 have it"
    assert "hosts of a, b have networks with these addresses of their own" in str(entry)
    assert "force-internal-ip" in entry.remedy


def test_nothing_is_routed_where_hosts_reach_it_over_their_own_links() -> None:
    docker = evolve(A2, underlay=(ip_network("10.2.0.0/28"),))
    topology = routed(A1, docker, B1, B2)
    assert routes(topology, "a1") == {}
    assert allowed(topology, "a1", "b1") == {"10.4.0.3/32", "10.4.0.4/32"}
    # Answers must find back: the other side sends to this side's internal IPs all the same, from its mesh address.
    assert routes(topology, "b2") == {
        "10.1.0.1": ("underlay", "10.2.0.1", "10.4.0.4"),
        "10.1.0.2": ("underlay", "10.2.0.1", "10.4.0.4"),
    }
    (entry,) = topology.unrouted
    assert str(entry.network) == "10.2.0.0/28"
    assert "a2 reaches these addresses over its own links" in entry.reason
    assert "if a2 should not, remove the route" in entry.remedy
    assert entry.outliers == (), "of two hosts neither is the odd one"


def test_a_host_that_differs_from_the_others_of_its_location_is_suspect_and_twin_networks_are_nobodys_mistake() -> None:
    def of(*nodes: Node) -> dict[str, tuple[str, ...]]:
        return {str(entry.network): entry.outliers for entry in routed(*nodes).unrouted if entry.outliers}

    twins = [here(name, number, "b", f"10.1.0.{number}/24") for name, number in (("b1", 13), ("b2", 14))]
    assert routed(A1, A2, *twins).unrouted
    assert of(A1, A2, *twins) == {}
    assert of(A1, twins[0]) == {}, "of one host each"
    assert of(here("a1", 1, "a", "10.3.0.1/24"), A2, *twins) == {}, "half of a location is on the other network"

    # An address of a1's network, on b2's loopback perhaps.
    b3 = here("b3", 7, "b", "10.2.0.3/24")
    stray = evolve(B2, underlay=(ip_network("10.1.0.0/24"),))
    assert of(A1, A2, B1, stray, b3) == {"10.1.0.0/24": ("b2",)}
    assert of(A1, A2, B1, stray) == {}
    assert of(A1, A2, B1, stray, evolve(b3, underlay=stray.underlay)) == {}, "two of three, as with containers"
    # A route to one address of a's.
    assert of(A1, A2, B1, evolve(B2, underlay=(ip_network("10.1.0.2/32"),)), b3) == {"10.1.0.2/32": ("b2",)}

    mislabelled = here("a3", 5, "b", "10.1.0.3/24")
    assert of(A1, A2, B1, B2, mislabelled) == {"10.1.0.0/24": ("a3",)}
    (entry,) = (entry for entry in routed(A1, A2, B1, B2, mislabelled).unrouted if entry.outliers)
    assert entry.remedy.startswith(
        "of its location a3 alone is on that network: if its label is wrong, correct it (kgctl location set a3 a), or "
    )
    # A second network of its own, a network for each host, and one host at the other site: nobody's mistake.
    both = evolve(mislabelled, internal_ips=(ip_interface("10.2.0.9/24"), ip_interface("10.1.0.3/24")))
    assert of(A1, A2, B1, B2, both) == {}
    apart = [here(f"b{number}", number, "b", f"10.1{number}.0.1/24") for number in (3, 4)]
    assert of(A1, A2, *apart, mislabelled) == {}
    assert of(A1, B1, B2, mislabelled) == {}
    odd = [evolve(node, location="a's; $(x)") for node in (A1, A2)]
    (entry,) = (entry for entry in routed(*odd, B1, B2, mislabelled).unrouted if entry.outliers)
    assert """(kgctl location set a3 'a'"'"'s; $(x)')""" in entry.remedy
    odd = [evolve(node, location="-a") for node in (A1, A2)]
    (entry,) = (entry for entry in routed(*odd, B1, B2, mislabelled).unrouted if entry.outliers)
    assert "(kgctl location set -- a3 -a)" in entry.remedy
    homeless = [evolve(node, location="") for node in (A1, A2)]
    (entry,) = (entry for entry in routed(*homeless, B1, B2, mislabelled).unrouted if entry.outliers)
    assert "(kgctl location unset a3)" in entry.remedy
    (entry,) = (
        entry
        for entry in routed(*homeless, B1, B2, evolve(mislabelled, default_location="b")).unrouted
        if entry.outliers
    )
    assert "(--location on a3)" in entry.remedy


def test_the_host_whose_link_has_the_addresses_is_named_though_its_network_is_stated_with_a_neighbours() -> None:
    """The two halves of a network are one link of the segment. What the host reaches there is its own network, which
    nobody should take from it."""
    halves = (
        here("b1", 3, "b", "192.168.0.2/25", endpoint="203.0.113.3", links="192.168.0.0/25"),
        here("b2", 4, "b", "192.168.0.140/25", links="192.168.0.128/25"),
    )
    other = here("c1", 5, "c", "192.168.0.130/32", endpoint="203.0.113.5")
    (entry,) = routed(*halves, other).unrouted
    assert entry.reason == "b2 reaches these addresses over its own links, so they are not routed from there"
    assert entry.remedy.startswith("give one of them other addresses")


def test_a_network_that_one_host_states_hides_no_other_reason() -> None:
    twins = [
        here(name, number, name, "10.3.0.7/24", endpoint=f"203.0.113.{number}") for name, number in (("c", 5), ("d", 6))
    ]
    topology = routed(A1, A2, evolve(B1, underlay=(ip_network("0.0.0.0/0"),)), B2, *twins)
    assert routes(topology, "b1") == {}
    assert "10.2.0.1" in routes(topology, "a1"), "others send there all the same"
    reasons = {str(entry.network): entry.reason for entry in topology.unrouted}
    assert reasons["0.0.0.0/0"] == ("b1 reaches these addresses over its own links, so they are not routed from there")
    # Both twins have 10.3.0.0/24 themselves, and one address in it.
    assert reasons.keys() == {"0.0.0.0/0", "10.3.0.0/24", "10.3.0.7/32"}
    assert reasons["10.3.0.7/32"] == "c and d have it"
    forced = [evolve(twin, internal_ips=here("x", 9, "c", "10.3.0.7/32").internal_ips) for twin in twins]
    lone = evolve(B1, underlay=(ip_network("10.3.0.0/16"),))
    unrouted = routed(A1, A2, lone, B2, *forced).unrouted
    assert [str(entry.network) for entry in unrouted] == ["10.3.0.0/16", "10.3.0.7/32"]
    # Nor does the address itself, as the network that a record with a forged internal IP states.
    forger = here("forger", 9, "e", "10.2.0.2/32", endpoint="203.0.113.9")
    (entry,) = (one for one in routed(*SITES, forger).unrouted if str(one.network) == "10.2.0.2/32")
    assert (entry.reason, entry.segments) == ("b2 and forger have it", ("b", "e"))
    offering = evolve(A2, subnets=(ip_network("10.5.0.0/24"),))
    taken = here("c", 5, "c", "10.5.0.7/32", endpoint="203.0.113.5")
    unrouted = routed(A1, offering, evolve(lone, underlay=(ip_network("10.5.0.0/16"),)), B2, taken).unrouted
    assert [str(entry.network) for entry in unrouted] == ["10.5.0.0/16", "10.5.0.7/32"]
    assert "10.5.0.0/24 of node a2" in unrouted[1].reason


def test_a_host_without_an_internal_ip_stands_in_no_network_of_its_locations() -> None:
    rented = here("rented", 7, "a", endpoint="203.0.113.7")
    topology = routed(A1, A2, B1, rented)
    assert routes(topology, "rented") == dict.fromkeys(("10.1.0.1", "10.1.0.2", "10.2.0.1"), ("tunnel", "", "10.4.0.7"))
    assert {"10.1.0.1/32", "10.1.0.2/32"} <= allowed(topology, "rented", "a1")
    assert routed_at(ip_address("10.1.0.2"), topology.segments["location:a"], topology.segments["node:rented"],
                     topology.policy)  # fmt: skip
    # As soon as it has one the location's network is its own.
    world, plan = topology.snapshot, host_plan(topology, "rented")
    for moved in (evolve(rented, internal_ips=here("x", 9, "a", "10.1.0.9/24").internal_ips), rented):
        world = evolve(world, nodes={**world.nodes, "rented": moved})
        topology = build_topology(world, topology)
        plan = host_plan(topology, "rented", plan)
        assert plan == host_plan(build_topology(world), "rented")
        assert ("10.1.0.2" in routes(topology, "rented")) is not bool(moved.internal_ips)


def test_an_endpoint_in_use_is_left_out() -> None:
    topology = routed(A1, A2, evolve(B1, endpoint=Endpoint.parse("10.2.0.1:51820")), B2)
    assert routes(topology, "a1").keys() == {"10.2.0.2"}
    assert [entry.reason for entry in topology.unrouted] == [
        "the WireGuard of b, called at private endpoints, may receive its packets there",
        "other segments reach its WireGuard there",
    ]
    assert routes(topology, "b2").keys() == {"10.1.0.2"}
    assert routes(topology, "a1")["10.2.0.2"] == ("tunnel", "", "10.4.0.1")
    assert routes(topology, "a2")["10.2.0.2"] == ("underlay", "10.1.0.1", "10.1.0.2")
    # As that of an outside peer, and no more when another leads.
    calling = peer("p", "10.99.0.1/32", endpoint=Endpoint.parse("10.2.0.2:51820"))
    assert routes(routed(*SITES, peers=[calling]), "a1").keys() == {"10.2.0.1"}
    other = routed(A1, A2, evolve(B1, endpoint=Endpoint.parse("10.2.0.1:51820")), evolve(B2, leader_wanted=True))
    assert "10.2.0.1" in routes(other, "a1")


def test_of_a_host_whose_internal_ip_is_not_routed_nobody_says_that_its_mesh_address_works() -> None:
    """A topology does not know whether packets arrive there."""
    six = evolve(A2, internal_ips=(*A2.internal_ips, ip_interface("fd00:a::2/64")))
    (apart,) = routed(A1, six, B1, B2).unrouted
    assert str(apart) == (
        "fd00:a::2 is not routed: a2 and its leader a1 do not reach each other in that family; "
        "the host is to be reached at its mesh address"
    )
    private = routed(A1, A2, evolve(B1, endpoint=Endpoint.parse("10.2.0.1:51820")), B2)
    assert [entry.remedy.partition(";")[0] for entry in private.unrouted] == [
        "the host is to be reached at its mesh address"
    ] * 2
    (both,) = routed(A1, evolve(A2, underlay=(ip_network("10.2.0.0/28"),)), B1, B2).unrouted
    assert both.remedy.endswith("; the hosts are to be reached at their mesh addresses")


def test_whose_wireguard_is_reached_at_an_address_is_named() -> None:
    taken = evolve(B1, endpoint=Endpoint.parse("10.1.0.2:51820"))
    entries = {str(entry.network): entry for entry in routed(A1, A2, taken, B2).unrouted}
    assert entries["10.1.0.2/32"].reason == "other segments reach the WireGuard of b1 there"
    calling = peer("p", "10.99.0.1/32", endpoint=Endpoint.parse("10.2.0.2:51820"))
    (entry,) = routed(*SITES, peers=[calling]).unrouted
    assert (entry.nodes, entry.reason) == (("b2",), "other segments reach the WireGuard of peer p there")


def test_a_leader_with_a_private_endpoint_instead_of_one_with_a_public_one_is_named() -> None:
    private = evolve(A2, endpoint=Endpoint.parse("10.1.0.2:51820"))
    stands = candidates_of(private)
    topology = routed(A1, private, B1, B2, candidates=stands)
    (problem,) = private_leaders(topology)
    assert (problem.subject, problem.about) == ("a", "a2")
    assert (
        "at the private endpoint 10.1.0.2:51820: as long as it leads, its internal IP 10.1.0.2 is not rou"
        in problem.text
    )
    assert "a1 would lead with a public endpoint, and is not a candidate: is the host up?" in problem.text
    wanted = evolve(private, leader_wanted=True)
    (problem,) = private_leaders(routed(A1, wanted, B1, B2, candidates=candidates_of(A1, wanted)))
    assert problem.text.endswith("let a1 lead, with a public endpoint: kgctl annotate a2 leader-")
    # The public one leads; or nobody is public; or internal IPs are not routed; or there is no other segment.
    assert not list(private_leaders(routed(A1, private, B1, B2, candidates=candidates_of(A1, private))))
    hidden = evolve(A1, endpoint=Endpoint.parse("10.1.0.1:51820"))
    assert not list(private_leaders(routed(hidden, private, B1, B2)))
    assert not list(private_leaders(build_topology(snapshot((A1, private, B1, B2), candidates=stands))))
    assert not list(private_leaders(routed(A1, private, candidates=stands)))


def test_segments_of_one_location_are_told_apart_by_name() -> None:
    six = here("a6", 6, "a", "fd00:1::6/64", endpoint="203.0.113.6")
    topology = routed(A1, A2, six)
    assert sorted(map(named, topology.segments.values())) == ["a", "a (its nodes with IPv6 only)"]


def test_homes_without_a_label_in_a_full_mesh_are_named() -> None:
    homes = [
        here(name, number, "", f"192.168.1.{number}/24", endpoint=f"203.0.113.{number}")
        for name, number in (("h1", 1), ("h2", 2))
    ]
    topology = routed(*homes, A1, granularity=Granularity.FULL)
    assert "192.168.1.2" not in routes(topology, "h1")
    assert "192.168.1.2" in routes(topology, "a1")
    (entry,) = topology.unrouted
    assert (str(entry.network), entry.not_from) == ("192.168.1.0/24", ("h1", "h2"))
    assert (
        entry.reason
        == "h1, h2, which have no label, are attached to this network, or to several with the same addresses"
    )
    # On one LAN whose addresses are the endpoints, each address has its own reason, and that alone.
    lan = [evolve(one, endpoint=Endpoint.parse(f"{one.internal_ips[0].ip}:51820")) for one in homes]
    unrouted = routed(*lan, granularity=Granularity.FULL).unrouted
    assert [entry.reason for entry in unrouted] == ["other segments reach its WireGuard there"] * 2


def test_a_private_endpoint_behind_nat_is_not_in_use_where_the_node_is_seen() -> None:
    behind = evolve(
        B1,
        endpoint=Endpoint.parse("10.2.0.1:51820"),
        observed_endpoints=(Endpoint.parse("198.51.100.9:1024"),),
        persistent_keepalive=25,
    )
    topology = routed(A1, A2, behind)
    assert routes(topology, "a1") == {"10.2.0.1": ("tunnel", "", "10.1.0.1")}


def test_what_is_granted_to_another_or_within_the_mesh_is_left_out() -> None:
    offering = evolve(A2, subnets=(ip_network("10.2.0.2/31"),))
    topology = routed(A1, offering, B1, B2, peers=[peer("p", "10.2.0.0/31")])
    assert routes(topology, "a1").keys() == set()
    reasons = " ".join(map(str, topology.unrouted))
    assert "10.2.0.2 is not routed: it is within 10.2.0.2/31 of node a2" in reasons
    assert "10.2.0.1 is not routed: it is within 10.2.0.0/31 of peer p" in reasons
    inside = evolve(B2, internal_ips=here("x", 9, "b", "10.4.200.1/24").internal_ips)
    assert "it is within the mesh's subnet" in " ".join(map(str, routed(A1, A2, B1, inside).unrouted))


@pytest.mark.parametrize("sealed", ["b1", "b2"])
def test_a_member_that_speaks_wireguard_with_its_leader_is_reached_through_that_tunnel(sealed: str) -> None:
    nodes = [evolve(one, encapsulate=Encapsulate.WIREGUARD) if one.name == sealed else one for one in SITES]
    topology = routed(*nodes)
    assert routes(topology, "a1") == routes(routed(*SITES), "a1")
    assert routes(topology, "b2") == {
        "10.1.0.1": ("tunnel", "", "10.2.0.2"),
        "10.1.0.2": ("tunnel", "", "10.2.0.2"),
    }
    assert {"10.1.0.1/32", "10.1.0.2/32"} <= allowed(topology, "b2", "b1")
    assert {"10.2.0.1/32", "10.2.0.2/32"}.isdisjoint(allowed(topology, "b2", "b1")), "they share a network"
    # The leader's own packets for the address, WireGuard's to the member's endpoint among them, take the network's way.
    leader = host_plan(topology, "b1")
    assert allowed(topology, "b1", "b2") == {"10.4.0.4/32", "10.2.0.2/32"}
    assert routes(topology, "b1").keys() == {"10.1.0.1", "10.1.0.2"}
    assert list(map(str, leader.returns)) == ["10.2.0.2/32"]
    near = filter_routes(leader, [ip_network("10.2.0.0/24")])
    assert near == leader, "what only comes out of the tunnel cuts nobody off"
    assert isinstance(near.memo, FilterMemo)
    again = filter_routes(host_plan(topology, "b1", near), [ip_network("10.2.0.0/24")], near)
    assert (again, type(again.memo)) == (leader, FilterMemo)


def test_ipv6_travels_in_a_mesh_of_ipv4_and_is_no_new_problem() -> None:
    both = [
        here("a1", 1, "a", ("10.1.0.1/24", "fd00:a1::1/64"), endpoint="203.0.113.1"),
        here("a2", 2, "a", ("10.1.0.2/24", "fd00:a1::2/64")),
        here("b1", 3, "b", ("10.2.0.1/24", "fd00:b1::1/64"), endpoint="203.0.113.3"),
        here("b2", 4, "b", "10.2.0.2/24"),
        here("b3", 5, "b", ("10.2.0.3/24", "fd00:b1::3/64")),
    ]
    topology = routed(*both)
    assert routes(topology, "a2")["fd00:b1::3"] == ("underlay", "fd00:a1::1", "fd00:a1::2")
    assert "fd00:a1::1" not in routes(topology, "b2")
    assert host_plan(topology, "a1").forwarding == {4, 6}
    assert all(host_plan(topology, one.name).problems == () for one in both)


def test_nodes_of_one_location_are_not_sent_into_tunnels_for_each_other() -> None:
    for granularity in (Granularity.FULL, Granularity.CROSS):
        topology = routed(*SITES, granularity=granularity)
        assert routes(topology, "a2").keys() == {"10.2.0.1", "10.2.0.2"}
        segments = topology.segments
        assert not routed_at(ip_address("10.1.0.1"), segments["node:a1"], segments["node:a2"], topology.policy)


def test_outside_peers_are_allowed_internal_ips_but_those_on_their_own_links() -> None:
    topology = routed(*SITES, peers=[peer("laptop", "10.99.0.1/32")])
    plan = peer_plan(topology, "laptop", links=[ip_network("10.2.0.0/24")])
    assert plan.routes[ip_network("10.1.0.2/32")].via is Via.TUNNEL
    assert ip_network("10.2.0.2/32") not in plan.routes
    every = {network for value in plan.peers.values() for network in value.allowed_ips}
    assert ip_network("10.1.0.1/32") in every
    assert ip_network("10.2.0.1/32") not in every


def test_a_host_that_moves_is_relabelled_or_leaves_takes_its_routes_along() -> None:
    topology = routed(*SITES)
    plan = host_plan(topology, "a1")
    world = world_of(topology)
    steps: list[tuple[Node | None, set[str]]] = [
        (evolve(B2, internal_ips=here("x", 9, "b", "10.2.0.77/24").internal_ips), {"10.2.0.1", "10.2.0.77"}),
        (evolve(B2, location="a", internal_ips=here("x", 9, "a", "10.1.0.3/24").internal_ips), {"10.2.0.1"}),
        (evolve(B2, underlay=None), set()),
        (B2, {"10.2.0.1", "10.2.0.2"}),
        (None, {"10.2.0.1"}),
    ]
    for moved, expected in steps:
        nodes = {name: one for name, one in world.nodes.items() if name != "b2"}
        world = evolve(world, revision=world.revision + 1, nodes=nodes if moved is None else {**nodes, "b2": moved})
        topology = build_topology(world, topology)
        assert topology == build_topology(world)
        plan = host_plan(topology, "a1", plan)
        assert plan == host_plan(build_topology(world), "a1")
        assert {
            str(n.network_address) for n in plan.routes if n.prefixlen == 32 and n.network_address not in MESH
        } == expected


def test_a_node_of_a_full_mesh_that_gets_the_label_of_others_is_reached_over_their_network() -> None:
    topology = routed(A1, A2, B1, granularity=Granularity.FULL)
    plan = host_plan(topology, "a1")
    assert routes(topology, "a1").keys() == {"10.2.0.1"}
    world = topology.snapshot
    after = build_topology(evolve(world, nodes={**world.nodes, "b1": evolve(B1, location="a")}), topology)
    again = host_plan(after, "a1", plan)
    assert again == host_plan(build_topology(after.snapshot), "a1")
    assert not [network for network in again.routes if network.network_address in ip_network("10.2.0.0/24")]


def test_the_exit_node_knows_that_members_answer() -> None:
    exit_node = evolve(A1, advertises_exit_node=True)
    topology = routed(exit_node, A2, B1, subnets=(MESH, MESH6))
    assert ip_network("10.1.0.2/32") in host_plan(topology, "a1").inside
