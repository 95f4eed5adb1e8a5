"""Over which family two nodes of different sites reach each other."""

from __future__ import annotations

from itertools import product

import pytest

from kilo_etcd.model import Endpoint, Node
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.topology.families import apart, endpoint_for, families, pair_family
from kilo_etcd.topology.segments import build_topology
from topology_worlds import MESH, MESH6, node, plans, snapshot

V4, V6, NAT4, ULA = "203.0.113.1", "[2001:db8::1]", "192.168.0.7", "[fd00::7]"
NAME = "vpn.example.org"


def host(first: str | None, also: str | None = None, name: str = "one") -> Node:
    return node(name, 1 if name == "one" else 2, name, (), first, also=also)


PAIRS = [
    # First endpoint and further one of each, and the family.
    ((V4, None), (V4, None), 4),
    ((V4, V6), (V4, V6), 4),
    ((V4, V6), (V4, None), 4),
    ((V4, V6), (V6, None), 6),
    ((V6, NAT4), (V6, NAT4), 6),
    ((V6, NAT4), (V4, V6), 6),
    ((V6, V4), (V4, V6), 6),
    ((V6, V4), (NAT4, ULA), 6),
    ((NAT4, V6), (NAT4, V6), 4),
    ((V6, V4), (V4, None), 4),
    ((V4, ULA), (V6, NAT4), 4),
    ((NAT4, ULA), (V4, V6), 4),
    ((NAT4, None), (V6, None), None),
    ((NAME, None), (V6, None), 6),
    ((None, None), (V6, None), 6),
]


@pytest.mark.parametrize(("one", "other", "family"), PAIRS)
def test_the_family_of_a_pair(
    one: tuple[str | None, str | None], other: tuple[str | None, str | None], family: int | None
) -> None:
    a, b = host(*one), host(*other, name="other")
    assert pair_family(a, b) == pair_family(b, a) == family
    for here, there in ((a, b), (b, a)):
        assert (apart(here, there) is None) == (family is not None)
        endpoint = endpoint_for(here, there)
        if there.endpoint is not None and there.endpoint.address is None:
            assert endpoint == there.endpoint
        elif there.endpoint is not None:
            assert (endpoint and endpoint.address and endpoint.address.version) == family


def test_each_of_two_sends_to_the_other_in_the_same_family() -> None:
    texts = (V4, V6, NAT4, ULA)
    every = [(a, b) for a, b in product(texts, (None, *texts)) if b is None or (":" in a) != (":" in b)]
    for one, other in product(every, every):
        a, b = host(*one), host(*other, name="other")
        there, back = endpoint_for(a, b), endpoint_for(b, a)
        assert (there and there.address and there.address.version) == (back and back.address and back.address.version)
        assert (there is None) == (not families(a) & families(b))


def test_hosts_of_one_family_join_a_mesh_of_both_and_those_without_a_common_one_say_so() -> None:
    both = node("both", 1, "a", (), V4, also=V6, mesh=("10.4.0.1", "fd00:4::1"))
    four = node("four", 2, "b", (), "203.0.113.2", mesh=("10.4.0.2", "fd00:4::2"))
    six = node("six", 3, "c", (), "[2001:db8::3]", mesh=("10.4.0.3", "fd00:4::3"))
    made = plans(snapshot([both, four, six], subnets=(MESH, MESH6)))
    endpoints = {
        name: {p.name: p.endpoint and str(p.endpoint) for p in plan.peers.values()} for name, plan in made.items()
    }
    assert endpoints == {
        "both": {"four": "203.0.113.2:51820", "six": "[2001:db8::3]:51820"},
        "four": {"both": "203.0.113.1:51820", "six": None},
        "six": {"both": "[2001:db8::1]:51820", "four": None},
    }
    assert made["both"].problems == ()
    for name, other in (("four", "six"), ("six", "four")):
        (problem,) = made[name].problems
        assert problem.subject == other
        assert f"no common address family with node {other}" in problem.text


def test_a_host_that_gains_a_family_changes_the_next_plan_as_a_first_one() -> None:
    four, six = node("four", 1, "a", (), V4), node("six", 2, "b", (), V6)
    before = build_topology(snapshot([four, six]))
    old = {name: host_plan(before, name) for name in ("four", "six")}
    world = snapshot([node("four", 1, "a", (), V4, also="[2001:db8::4]"), six])
    after = build_topology(world, before)
    for name, plan in old.items():
        assert host_plan(after, name, plan) == host_plan(build_topology(world), name)
        assert host_plan(after, name, plan).problems == ()
    assert Endpoint.parse("[2001:db8::4]:51820") in [p.endpoint for p in host_plan(after, "six").peers.values()]
