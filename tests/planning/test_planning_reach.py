"""Members of a location that do not answer at their internal IPs: what is left of a plan, and what is said of it."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from attrs import evolve

from kilo_etcd.agent.status import bounded
from kilo_etcd.model import Encapsulate, Granularity, Snapshot
from kilo_etcd.model.hostplan import ExitRoute, HostPlan, RoutePlan, Via
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.reach import MOST_NAMED, MemberAddress, Silent, about_member, targets, withhold
from kilo_etcd.planning.walk import walk
from kilo_etcd.topology.segments import build_topology
from topology_worlds import MESH, SIX, WORLDS, candidates_of, node, snapshot

LED = snapshot(SIX, candidates=candidates_of(*SIX))
"""a1 leads a2 (same subnet) and a3 (another one); b1 leads b2."""


def silent(*pairs: tuple[str, str], withheld: bool = True, named: bool = True) -> tuple[Silent, ...]:
    return tuple(
        Silent(target=MemberAddress(name, ip_address(address)), withheld=withheld, named=named)
        for name, address in pairs
    )


def planned(world: Snapshot, name: str, *unheard: Silent) -> HostPlan:
    topology = build_topology(world)
    return withhold(host_plan(topology, name), topology, unheard)


def routes(plan: HostPlan) -> dict[str, str]:
    return {str(route.destination): f"{route.via} {route.gateway}" for route in plan.routes.values()}


A1, A2, A3 = ("a1", "10.0.0.1"), ("a2", "10.0.0.2"), ("a3", "10.0.1.3")


def asked(world: Snapshot, name: str) -> set[tuple[str, str]]:
    return {(target.node, str(target.address)) for target in targets(build_topology(world), name)}


def test_who_is_asked_where() -> None:
    assert asked(LED, "a2") == {A1, A3}
    assert asked(LED, "c1") == set(), "it is alone"
    assert asked(WORLDS["cross"], "a2") == {A1, A3}
    assert asked(WORLDS["full"], "a2") == set(), "all are reached through tunnels"
    tunneled = snapshot([evolve(one, encapsulate=Encapsulate.WIREGUARD) for one in SIX])
    assert asked(tunneled, "a2") == {("a1", "10.4.0.1"), ("a3", "10.4.0.3")}, "through the tunnel, at mesh addresses"
    both = WORLDS["dual-stack"]
    assert asked(both, "a1") == {
        ("a2", "10.0.0.2"), ("a2", "fd00:a::2"), ("a3", "10.0.0.3"),
    }, "each family apart"  # fmt: skip


def test_where_everybody_answers_the_plan_is_the_same_object() -> None:
    topology = build_topology(LED)
    plan = host_plan(topology, "a2")
    assert withhold(plan, topology, ()) is plan


def test_a_member_that_never_answered_is_reached_by_the_leader_or_not_at_all() -> None:
    before, plan = planned(LED, "a3"), planned(LED, "a3", *silent(A2))
    assert routes(before)["10.4.0.2/32"] == "ipip 10.0.0.2"
    assert "10.4.0.2/32" not in plan.routes.keys() | set(plan.unreachable_routes), "the route to the leader takes it"
    assert routes(plan)["172.20.2.0/24"] == "ipip 10.0.0.1", "and what is behind it"
    assert plan.unreachable_routes == (MESH,)
    assert plan.ipip_remotes == {ip_address("10.0.0.1")}, "nor is IPIP taken from there"
    (problem,) = plan.problems
    assert problem.text == (
        "a2 has never answered a3 at its internal IP 10.0.0.2, so a3 reaches it through a1, the leader of both: if "
        "the two share no network, label them apart (kgctl location set a2 NAME; both are at location gcp) or take the "
        "address away (kgctl annotate a2 force-internal-ip=-); if they do, let UDP 1107 (--peer-query-port) or ICMP "
        "echo pass between them, or set --encapsulate wireguard"
    )

    leads = planned(LED, "a1", *silent(A2))
    assert routes(leads)["10.4.0.0/16"] == "tunnel None"
    assert leads.unreachable_routes == (MESH, ip_network("10.4.0.2/32"), ip_network("172.20.2.0/24")), (
        "on the leader the mesh's route leads into the tunnel, where nobody has these"
    )
    assert set(leads.refused) == set(leads.unreachable_routes[1:])
    assert routes(leads)["10.4.0.3/32"] == "ipip 10.0.1.3"


def test_who_never_heard_its_leader_is_cut_off_and_refuses_all() -> None:
    plan = planned(LED, "a2", *silent(A1))
    assert routes(plan) == {"10.4.0.3/32": "ipip 10.0.1.3"}
    assert set(plan.unreachable_routes) == {MESH, ip_network("10.4.0.1/32"), ip_network("192.168.0.0/24")}
    assert "a1, its leader, has never answered a2 at its internal IP 10.0.0.1" in plan.problems[0].text
    assert "so a2 sends it nothing and is cut off from all other locations: " in plan.problems[0].text
    alone = planned(LED, "a2", *silent(A1, A3))
    assert (routes(alone), alone.ipip_remotes, alone.ipip_local) == ({}, frozenset(), None)
    assert len(alone.problems) == 2
    for problem in alone.problems:
        assert (
            "(kgctl location set a2 NAME; both are at location gcp) or take the address away (kgctl annotate a2 "
            in (problem.text)
        ), "no member answers it, so it is the one that is labelled wrong"
    assert "(kgctl location set a1 NAME;" in plan.problems[0].text


def test_in_a_cross_mesh_no_node_stands_in_for_another() -> None:
    plan = planned(WORLDS["cross"], "a2", *silent(A1))
    assert "10.4.0.1/32" not in routes(plan)
    assert ip_network("10.4.0.1/32") in plan.unreachable_routes
    assert routes(plan)["10.4.0.4/32" if "10.4.0.4/32" in routes(plan) else "10.4.0.0/16"] == "tunnel None"


def test_each_family_is_withheld_apart() -> None:
    topology = build_topology(WORLDS["dual-stack"])
    leader = topology.segment_of("a1").leader.name
    other = next(name for name in ("a1", "a2") if name != leader)
    address = {"a1": "fd00:a::1", "a2": "fd00:a::2"}[leader]
    plan = withhold(host_plan(topology, other), topology, silent((leader, address)))
    assert {network.version for network, route in plan.routes.items() if str(route.gateway).startswith("fd00")} == set()
    assert any(network == MESH for network in plan.routes)


def test_who_answered_once_keeps_its_routes_and_is_named() -> None:
    plan = planned(LED, "a2", *silent(A1, withheld=False))
    assert routes(plan) == routes(planned(LED, "a2"))
    assert "no longer answers a2 at its internal IP 10.0.0.1, although its agent lives" in plan.problems[0].text
    assert planned(LED, "a2", *silent(A1, named=False)).problems == (), "it was not asked often enough"


def test_of_two_nodes_with_one_internal_ip_the_one_that_answers_is_reached() -> None:
    """Sites without labels that use the same private addresses."""
    twins = [
        node("a1", 1, "", "192.168.1.10/24", "203.0.113.1"),
        node("a2", 2, "", "192.168.1.20/24"),
        node("a3", 3, "", "192.168.1.20/24"),
    ]
    plan = planned(snapshot(twins, candidates=candidates_of(*twins)), "a1", *silent(("a3", "192.168.1.20")))
    assert routes(plan) == {"10.4.0.0/16": "tunnel None", "10.4.0.2/32": "underlay 192.168.1.20"}
    assert "both are at the default location, which is that of hosts without a label" in plan.problems[0].text


def test_the_exit_node_is_not_used_through_a_leader_that_never_answered() -> None:
    topology = build_topology(LED)
    by = RoutePlan(destination=ip_network("0.0.0.0/0"), via=Via.UNDERLAY, gateway=ip_address("10.0.0.1"))
    plan = evolve(host_plan(topology, "a2"), exit_route=ExitRoute(families=frozenset({4}), by=(by,)))
    assert withhold(plan, topology, silent(A3)).exit_route == plan.exit_route
    kept = withhold(plan, topology, silent(A1)).exit_route
    assert kept == ExitRoute(families=frozenset({4})), "its last resort stays, so nothing bypasses it"


def test_a_large_location_is_named_in_a_few_sentences() -> None:
    many = [node(f"n{i}", i, "x", f"10.9.0.{i}/24") for i in range(1, 31)]
    world = snapshot(many, candidates=candidates_of(*many))
    plan = planned(world, "n1", *silent(*((f"n{i}", f"10.9.0.{i}") for i in range(2, 31))))
    assert len(plan.problems) == MOST_NAMED + 1
    assert f"{29 - MOST_NAMED} more members" in plan.problems[-1].text


def test_the_remedy_reaches_a_status_record_whole_however_long_the_names_are() -> None:
    names = ["a" * 63, "b" * 63]
    two = [node(name, i, "x" * 63, f"2001:db8:1111:2222:3333:4444:5555:666{i}/64") for i, name in enumerate(names, 1)]
    plan = planned(
        snapshot(two, candidates=candidates_of(*two)), names[1], *silent((names[0], str(two[0].internal_ips[0].ip)))
    )
    text = plan.problems[0].text
    assert bounded((text,)) == (text,)


@pytest.mark.parametrize("granularity", [Granularity.LOCATION, Granularity.CROSS])
def test_packets_end_where_the_silence_is_and_it_is_said(granularity: Granularity) -> None:
    world = evolve(LED, granularity=granularity)
    topology = build_topology(world)
    plans = {name: host_plan(topology, name) for name in world.nodes}
    plans["a1"] = withhold(plans["a1"], topology, silent(A2))
    plans["a2"] = withhold(plans["a2"], topology, silent(A1))
    path = walk(plans, topology, "a2", "a1")
    assert path.dropped == "a1 does not answer a2 at its internal IP 10.0.0.1"
    if granularity is Granularity.LOCATION:
        far = walk(plans, topology, "b2", "a2")
        assert [hop.target for hop in far.hops] == ["b1", "a1"]
        assert far.dropped == "a2 does not answer a1 at its internal IP 10.0.0.2"
        plans["a3"] = withhold(plans["a3"], topology, silent(A2))
        assert walk(plans, topology, "a3", "a2").dropped == far.dropped, "the leader is where it ends"
        plans["a1"] = host_plan(topology, "a1")
        assert [hop.target for hop in walk(plans, topology, "a3", "a2").hops] == ["a1", "a2"]


def test_a_tunnel_in_which_nobody_answers_is_named_and_nothing_is_withheld() -> None:
    world = snapshot([evolve(one, encapsulate=Encapsulate.WIREGUARD) for one in SIX], candidates=candidates_of(*SIX))
    topology = build_topology(world)
    plan = host_plan(topology, "a2")
    dead = Silent(target=MemberAddress("a1", ip_address("10.4.0.1")), withheld=False, named=True, tunneled=True)
    found = withhold(plan, topology, [dead])
    assert (found.routes, found.unreachable_routes) == (plan.routes, plan.unreachable_routes)
    assert found.problems[0].text.startswith("a1, its leader, does not answer a2 through their tunnel")
    # What `kgctl explain` makes of it.
    shown = {name: host_plan(topology, name) for name in world.nodes}
    shown["a2"] = withhold(plan, topology, [evolve(dead, withheld=True)])
    for target in ("a1", "b2"):
        assert walk(shown, topology, "a2", target).dropped == "a1 does not answer a2 at 10.4.0.1"
    assert walk(shown, topology, "a2", "a3").delivered


def test_whom_a_sentence_is_about_can_be_told_from_it() -> None:
    tunneled = [evolve(one, tunneled=True, withheld=False) for one in silent(A3)]
    for name, unheard in (("a2", silent(A1, A3)), ("a2", silent(A1, A3, withheld=False)), ("a1", silent(A2, A3)),
                          ("a2", tunneled)):  # fmt: skip
        problems = planned(LED, name, *unheard).problems
        assert [about_member(problem.text) for problem in problems] == [one.target.node for one in unheard]
    many = [node(f"n{i}", i, "x", f"10.9.0.{i}/24") for i in range(1, 31)]
    plan = planned(
        snapshot(many, candidates=candidates_of(*many)),
        "n1",
        *silent(*((f"n{i}", f"10.9.0.{i}") for i in range(2, 31))),
    )
    assert about_member(plan.problems[-1].text) == "", "of several"
    for text in ("", "the port is taken", "nobody answers a1 at all", "something answers it at 10.0.0.1"):
        assert about_member(text) is None
