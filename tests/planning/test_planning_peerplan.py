"""The plan of a machine that is an outside peer: what it holds, and what the guard takes out of it."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from attrs import evolve

from kilo_etcd.model import Endpoint, Granularity, Node, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.peerplan import peer_plan
from kilo_etcd.planning.pipeline import protected_plan
from kilo_etcd.planning.route_filter import filter_routes
from kilo_etcd.topology.segments import build_topology
from topology_worlds import MESH, MESH6, candidates_of, node, peer, snapshot

GCP = [
    node("gcp-1", 1, "gcp", "10.1.0.1/24", "203.0.113.1", subnets="172.20.0.0/24"),
    node("gcp-2", 2, "gcp", "10.1.0.2/24", "203.0.113.2"),
]
HOME = node("home-1", 3, "home", "10.2.0.1/24", "203.0.113.3", location_ips="192.168.7.0/24")
LAPTOP = peer("laptop", "10.9.0.2/32 fd09::2/128", persistent_keepalive=10, preshared_key="secret")
WORLD = snapshot([*GCP, HOME], peers=[LAPTOP], candidates=candidates_of(*GCP))


def plan(of: Snapshot = WORLD, **options: Any) -> HostPlan:
    return peer_plan(build_topology(of), "laptop", **options)


def allowed(of: HostPlan) -> dict[str, list[str]]:
    return {value.name: [str(network) for network in value.allowed_ips] for value in of.peers.values()}


def routes(of: HostPlan) -> dict[str, str]:
    return {str(network): str(route.source) for network, route in of.routes.items()}


def test_every_leader_is_a_peer_with_all_that_is_behind_it() -> None:
    made = plan(listen_port=4711)
    assert allowed(made) == {
        "gcp-1": ["10.4.0.1/32", "10.4.0.2/32", "172.20.0.0/24"],
        "home-1": ["10.4.0.3/32", "192.168.7.0/24"],
    }
    assert routes(made) == dict.fromkeys(("10.4.0.0/16", "172.20.0.0/24", "192.168.7.0/24"), "10.9.0.2")
    assert [str(address) for address in made.addresses] == ["10.9.0.2/32", "fd09::2/128"]
    assert made.listen_port == 4711
    assert {(value.persistent_keepalive, value.preshared_key) for value in made.peers.values()} == {(10, "secret")}
    assert (made.forwarding, made.masquerade, made.ipip_remotes) == (frozenset(), (), frozenset())


def test_another_leader_takes_the_place_of_the_one_before() -> None:
    other = evolve(WORLD, candidates=candidates_of(*reversed(GCP)))
    assert allowed(plan(other)) == {
        "gcp-2": ["10.4.0.1/32", "10.4.0.2/32", "172.20.0.0/24"],
        "home-1": ["10.4.0.3/32", "192.168.7.0/24"],
    }
    assert routes(plan(other)) == routes(plan())


def test_in_a_full_mesh_every_node_is_a_peer_of_its_own() -> None:
    made = plan(evolve(WORLD, granularity=Granularity.FULL))
    assert set(allowed(made)) == {"gcp-1", "gcp-2", "home-1"}
    assert allowed(made)["gcp-2"] == ["10.4.0.2/32"]


def test_there_is_no_route_in_a_family_that_the_machine_has_no_address_in() -> None:
    dual = evolve(WORLD, subnets=(MESH, MESH6))
    assert "fd00:4::/64" in routes(plan(dual))
    only_four = evolve(dual, peers={"laptop": peer("laptop", "10.9.0.2/32")})
    assert "fd00:4::/64" not in routes(plan(only_four))
    assert "10.4.0.0/16" in routes(plan(only_four))


def test_a_leader_is_reached_in_a_family_that_the_machine_has() -> None:
    both = node("six-1", 4, "six", "10.3.0.1/24", "203.0.113.4", also="2001:db8::4")
    world = snapshot([HOME, both], peers=[LAPTOP])

    def endpoints(*families: int) -> dict[str, str]:
        return {value.name: str(value.endpoint) for value in plan(world, families=families).peers.values()}

    assert endpoints() == endpoints(4) == {"home-1": "203.0.113.3:51820", "six-1": "203.0.113.4:51820"}
    assert endpoints(6) == {"home-1": "None", "six-1": "[2001:db8::4]:51820"}
    (problem,) = plan(world, families=(6,)).problems
    assert problem.text.startswith(
        "node home-1 is not reached, nor what is behind it: its endpoint is 203.0.113.3:51820"
    )
    named = evolve(HOME, endpoint=Endpoint("vpn.example.org", 51820))
    made = peer_plan(build_topology(snapshot([named], peers=[LAPTOP])), "laptop", families=(6,))
    assert [str(value.endpoint) for value in made.peers.values()] == ["vpn.example.org:51820"]


def test_a_leader_without_an_endpoint_is_named_and_costs_the_others_nothing() -> None:
    made = plan(snapshot([*GCP, evolve(HOME, endpoint=None)], peers=[LAPTOP], candidates=candidates_of(*GCP)))
    assert [problem.subject for problem in made.problems] == ["home-1"]
    assert set(allowed(made)) == {"gcp-1", "home-1"}


def test_the_network_that_the_machine_is_in_is_not_taken_into_the_tunnel() -> None:
    made = protected_plan(plan(), (ip_network("192.168.7.0/25"), ip_network("172.20.0.9/32")), WORLD.subnets)
    assert list(routes(made)) == ["10.4.0.0/16"]
    assert allowed(made) == {"gcp-1": ["10.4.0.1/32", "10.4.0.2/32"], "home-1": ["10.4.0.3/32"]}
    assert [problem.subject for problem in made.problems] == ["172.20.0.0/24", "192.168.7.0/24"]


def test_the_mesh_is_kept_in_a_network_that_overlaps_it_but_not_where_it_would_take_etcd_or_the_gateway() -> None:
    cafe = protected_plan(plan(), (ip_network("10.4.7.0/24"), ip_network("192.0.2.1/32")), WORLD.subnets)
    assert cafe == plan()
    assert protected_plan(plan(), (ip_network("10.4.7.0/24"), ip_network("10.4.7.1/32")), WORLD.subnets) == plan(), (
        "its own network's route, which is narrower, leads to the gateway"
    )
    # Not so if the machine's own network is as wide as the mesh or wider, or holds another address only.
    for networks in (["10.4.7.1/32"], ["10.4.0.0/16", "10.4.7.1/32"], ["10.0.0.0/8", "10.4.7.1/32"],
                     ["10.4.7.0/24", "10.4.8.1/32"]):  # fmt: skip
        inside = protected_plan(plan(), tuple(map(ip_network, networks)), WORLD.subnets)
        assert "10.4.0.0/16" not in routes(inside)
        assert "10.4.0.0/16" in [problem.subject for problem in inside.problems]


@pytest.mark.parametrize("gateway", ["10.4.63.1/32", "192.0.2.1/32"])
@pytest.mark.parametrize("offered", ["10.4.63.0/25", "10.4.63.1/32", "10.4.63.0/24", "10.4.62.0/23"])
def test_no_network_within_the_meshs_subnet_takes_that_of_the_machine_into_the_tunnel(
    offered: str, gateway: str
) -> None:
    near = (ip_network("10.4.63.0/24"), ip_network("10.4.9.0/24"), ip_network(gateway))
    colleague = evolve(GCP[1], mesh_addresses=(ip_address("10.4.9.2"),))

    def world(*networks: str) -> Snapshot:
        home = evolve(HOME, allowed_location_ips=tuple(map(ip_network, networks)))
        return snapshot([GCP[0], colleague, home], peers=[LAPTOP], candidates=candidates_of(*GCP))

    before, offering = plan(world("10.4.128.0/24")), plan(world("10.4.128.0/24", offered))
    clean = protected_plan(before, near, WORLD.subnets)
    assert (clean.routes, clean.peers, clean.problems) == (before.routes, before.peers, before.problems)
    assert "10.4.9.2/32" in allowed(clean)["gcp-1"]
    assert offered in routes(offering)
    for previous in (None, clean):
        made = filter_routes(offering, near, previous, mesh=WORLD.subnets)
        assert (routes(made), allowed(made)) == (routes(clean), allowed(clean))
        assert [problem.subject for problem in made.problems] == [offered]
    assert routes(protected_plan(offering, (ip_network("192.168.7.0/24"),), WORLD.subnets)) == routes(offering)


@pytest.mark.parametrize("offered", ["10.4.63.0/25", "10.4.63.3/32"])
def test_no_network_within_the_meshs_subnet_takes_a_leaders_endpoint_into_the_tunnel(offered: str) -> None:
    home = evolve(HOME, endpoint=Endpoint.parse("10.4.63.3:51820"), allowed_location_ips=(ip_network(offered),))
    offering = plan(snapshot([*GCP, home], peers=[LAPTOP], candidates=candidates_of(*GCP)))
    made = protected_plan(offering, (ip_network("192.168.7.0/24"),), WORLD.subnets)
    assert offered in routes(offering)
    assert offered not in routes(made)
    # A leader whose endpoint comes to lie in a network that was fit until then.
    far = evolve(offering, peers={k: evolve(v, endpoint=None) for k, v in offering.peers.items()})
    clean = filter_routes(far, (), mesh=WORLD.subnets)
    assert offered in routes(clean)
    assert offered not in routes(filter_routes(offering, (), clean, mesh=WORLD.subnets))


def test_a_leader_behind_nat_is_looked_for_where_others_see_it_but_not_through_ones_own_nat() -> None:
    there, elsewhere = Endpoint.parse("198.51.100.3:40001"), Endpoint.parse("198.51.100.9:7000")
    home = evolve(HOME, endpoint=Endpoint.parse("10.2.0.1:51820"), persistent_keepalive=25, observed_endpoints=(there,))

    def looks(seen: tuple[Endpoint, ...], of: Node = home, **options: Any) -> tuple[str, bool]:
        world = snapshot([*GCP, of], peers=[evolve(LAPTOP, observed_endpoints=seen)], candidates=candidates_of(*GCP))
        (found,) = (value for value in plan(world, **options).peers.values() if value.name == "home-1")
        return str(found.endpoint), found.observed

    assert looks((elsewhere,)) == ("198.51.100.3:40001", True)
    assert looks((elsewhere,), families=(6,)) == ("None", False)
    assert looks((evolve(there, port=1),)) == ("10.2.0.1:51820", False), "at home"
    assert looks(()) == ("10.2.0.1:51820", False), "perhaps at home"
    assert looks((elsewhere,), HOME) == ("203.0.113.3:51820", False)
    nowhere = evolve(home, endpoint=None)
    assert looks((), nowhere) == ("198.51.100.3:40001", True)
    assert plan(snapshot([nowhere], peers=[LAPTOP])).problems == ()
