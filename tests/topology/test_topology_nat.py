"""Two hosts behind NATs: where each looks for the other, and what is said of pairs that do not meet."""

from __future__ import annotations

from ipaddress import ip_network
from itertools import product
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from kilo_etcd.model import Endpoint, Granularity, Node, Snapshot
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.route_filter import filter_routes
from kilo_etcd.planning.walk import walk_both
from kilo_etcd.topology.nat import about_partner, hidden_pair, hopeless, traversal_failures
from kilo_etcd.topology.segments import build_topology
from topology_worlds import MESH, MESH6, node, peer, plans, snapshot


def at(*texts: str) -> tuple[Endpoint, ...]:
    return tuple(Endpoint.parse(text) for text in texts)


def hidden(name: str, number: int, *seen: str, lan: str = "", location: str | None = None, **rest: Any) -> Node:
    """Behind NAT, at a LAN of its own unless `lan` says otherwise, with keepalive."""
    lan = lan or f"192.168.{number}"
    return node(
        name,
        number,
        name if location is None else location,
        f"{lan}.{number}/24",
        f"{lan}.{number}:51820",
        **{"persistent_keepalive": 25, "observed_endpoints": at(*seen), **rest},
    )


def public(name: str, number: int, **rest: Any) -> Node:
    return node(name, number, name, f"10.0.{number}.1/24", f"203.0.113.{number}:51820", **rest)


HUB = public("hub", 9)
ONE, TWO = "198.51.100.1:40001", "198.51.100.2:40002"


def looks_for(world: Snapshot) -> dict[str, dict[str, str]]:
    """Host -> peer -> endpoint; with a question mark if it is an observed endpoint."""
    return {
        name: {p.name: f"{p.endpoint}{'?' * p.observed}" for p in plan.peers.values()}
        for name, plan in plans(world).items()
    }


def test_hosts_behind_nat_look_for_each_other_where_others_have_seen_them() -> None:
    world = snapshot([HUB, hidden("one", 1, ONE), hidden("two", 2, TWO)])
    assert looks_for(world) == {
        "hub": {"one": f"{ONE}?", "two": f"{TWO}?"},
        "one": {"hub": "203.0.113.9:51820", "two": f"{TWO}?"},
        "two": {"hub": "203.0.113.9:51820", "one": f"{ONE}?"},
    }
    keepalives = {p.name: p.persistent_keepalive for p in plans(world)["one"].peers.values()}
    assert keepalives == {"hub": 25, "two": 25}


def test_where_nobody_has_seen_anybody_all_is_as_before() -> None:
    world = snapshot([HUB, hidden("one", 1), hidden("two", 2)])
    assert looks_for(world)["one"] == {"hub": "203.0.113.9:51820", "two": "192.168.2.2:51820"}


def test_a_phone_is_looked_for_where_it_is_seen() -> None:
    phone = peer("phone", "10.9.0.1/32", persistent_keepalive=25, observed_endpoints=at(TWO))
    assert looks_for(snapshot([hidden("one", 1, ONE)], peers=[phone]))["one"] == {"phone": f"{TWO}?"}
    placed = evolve(phone, observed_endpoints=(), endpoint=Endpoint.parse("198.51.100.77:1"))
    assert looks_for(snapshot([hidden("one", 1, ONE)], peers=[placed]))["one"] == {"phone": "198.51.100.77:1"}


def test_of_several_words_the_newest_counts() -> None:
    world = snapshot([hidden("one", 1, ONE), hidden("two", 2, TWO, "198.51.100.2:999")])
    assert looks_for(world)["one"] == {"two": f"{TWO}?"}


def test_hosts_of_one_network_stay_on_it() -> None:
    same = {"lan": "192.168.7"}
    here, there = hidden("one", 1, ONE, **same), hidden("two", 2, "198.51.100.1:40002", **same)
    assert looks_for(snapshot([here, there]))["one"] == {"two": "192.168.7.2:51820"}, "one NAT, one LAN"
    elsewhere = hidden("two", 2, TWO, **same)
    assert looks_for(snapshot([here, elsewhere]))["one"] == {"two": f"{TWO}?"}, "two homes with the same numbers"
    unseen = evolve(here, observed_endpoints=())
    assert looks_for(snapshot([unseen, elsewhere]))["one"] == {"two": "192.168.7.2:51820"}, "as far as is known"
    label = [evolve(each, location="home") for each in (here, elsewhere)]
    assert looks_for(snapshot(label, Granularity.FULL))["one"] == {"two": "192.168.7.2:51820"}, "a label says it"


def test_without_labels_nothing_says_that_hosts_share_a_network() -> None:
    world = snapshot([hidden("one", 1, ONE, location=""), hidden("two", 2, TWO, location="")], Granularity.FULL)
    assert looks_for(world)["one"] == {"two": f"{TWO}?"}


def test_a_pair_looks_in_the_family_that_it_uses() -> None:
    both = hidden("one", 1, ONE, also="[fd00:1::1]:51820", mesh=("10.4.0.1", "fd00:4::1"))
    six = node("six", 2, "six", "fd00:2::2/64", "[fd00:2::2]:51820", mesh=("10.4.0.2", "fd00:4::2"),
               persistent_keepalive=25, observed_endpoints=at("[2001:db8::2]:40002", TWO))  # fmt: skip
    found = looks_for(snapshot([both, six], subnets=(MESH, MESH6)))
    assert found["one"] == {"six": "[2001:db8::2]:40002?"}
    assert found["six"] == {"one": "[fd00:1::1]:51820"}, "seen in the other family only"


def test_who_has_no_endpoint_at_all_is_looked_for_too_and_is_no_problem() -> None:
    nowhere = hidden("one", 1, ONE)
    world = snapshot([evolve(nowhere, endpoint=None), evolve(hidden("two", 2), endpoint=None)])
    assert looks_for(world)["two"] == {"one": f"{ONE}?"}
    assert plans(world)["two"].problems == ()
    assert plans(world)["one"].problems != ()


def test_a_new_word_changes_the_next_plan_as_a_first_one() -> None:
    before = snapshot([HUB, hidden("one", 1), hidden("two", 2)])
    after = snapshot([HUB, hidden("one", 1, ONE), hidden("two", 2, TWO)])
    topology = build_topology(before)
    followed = build_topology(after, topology)
    for name in after.nodes:
        assert host_plan(followed, name, host_plan(topology, name)) == host_plan(build_topology(after), name)


SEEN = ((), (ONE,), (TWO,), (ONE, "198.51.100.1:7"), (TWO, "198.51.100.2:7"), ("[2001:db8::1]:4",))
LANS = ("192.168.1", "192.168.2")


@st.composite
def worlds(draw: st.DrawFn) -> Snapshot:
    nodes = [HUB] * draw(st.booleans())
    for number in range(1, draw(st.integers(2, 4)) + 1):
        found = hidden(
            f"n{number}", number, *draw(st.sampled_from(SEEN)), lan=draw(st.sampled_from(LANS)),
            location=draw(st.sampled_from(("", "a", "b", f"n{number}"))),
        )  # fmt: skip
        nodes.append(evolve(found, persistent_keepalive=25) if found.observed_endpoints else found)
    return snapshot(nodes, draw(st.sampled_from(list(Granularity))))


@settings(max_examples=examples(60), deadline=None)
@given(worlds(), worlds())
def test_an_observed_endpoint_is_public_and_of_the_pairs_family_and_costs_nothing_to_follow(
    before: Snapshot, after: Snapshot
) -> None:
    old = build_topology(before)
    topology = build_topology(after, old)
    for name, own in after.nodes.items():
        previous = host_plan(old, name) if name in before.nodes else None
        plan = host_plan(topology, name, previous)
        assert plan == host_plan(build_topology(after), name)
        for value in plan.peers.values():
            if value.observed:
                assert value.endpoint is not None
                assert value.endpoint.public
                assert value.endpoint in after.nodes[value.name].observed_endpoints
                assert not after.nodes[value.name].public_in(4)
            else:
                assert value.endpoint not in after.nodes[value.name].observed_endpoints
        for other in after.nodes.values():
            if other.name != name:
                assert hidden_pair(own, other) == hidden_pair(other, own)
                assert (hopeless(own, other) is None) == (hopeless(other, own) is None)


def test_a_wrong_observation_takes_no_route_away_and_is_ignored() -> None:
    offered = ip_network("198.51.100.0/24")
    hub = evolve(HUB, subnets=(offered,))
    quiet = snapshot([hub, hidden("one", 1), hidden("two", 2, TWO), hidden("three", 3, "203.0.113.77:1")])
    told = evolve(quiet, nodes={**quiet.nodes, "one": hidden("one", 1, ONE)}, revision=8)
    protected = (ip_network("192.168.2.0/24"),)
    plan, filtered = None, None
    for world in (quiet, told, told, quiet, told):
        plan = host_plan(build_topology(world), "two", filtered)
        filtered = filter_routes(plan, protected, filtered)
        assert filtered == filter_routes(host_plan(build_topology(world), "two"), protected)
        assert offered in filtered.routes
        assert filtered.problems == plan.problems
        # If nobody loses anything by it, an observed endpoint is used.
        assert {value.name: str(value.endpoint) for value in filtered.peers.values() if value.observed} == {
            "three": "203.0.113.77:1"
        }
    assert plan is not None
    assert plan.peers["key-one"].endpoint == Endpoint.parse(ONE)
    assert filtered is not None
    assert filtered.peers["key-one"].endpoint is None
    # An endpoint that is the node's own word is protected as before.
    other = evolve(told, nodes={**told.nodes, "one": node("one", 1, "one", "10.0.1.1/24", ONE)})
    assert offered not in filter_routes(host_plan(build_topology(other), "two"), protected).routes


# What is said

CONE, VARYING = (ONE,), (ONE, "198.51.100.1:7")


@pytest.mark.parametrize(
    ("mine", "theirs", "keepalive", "text"),
    [
        (CONE, CONE, (25, 25), "what they send does not get through"),
        (CONE, VARYING, (25, 25), "the NAT of two shows each partner another port (symmetric)"),
        (VARYING, CONE, (25, 25), "the NAT of one shows each partner another port (symmetric)"),
        (VARYING, VARYING, (25, 25), "both NATs show each partner another port (symmetric)"),
        (CONE, (), (25, 25), None),
        ((), CONE, (25, 25), "no host with a public endpoint sees one"),
        (CONE, (), (25, 0), "two without persistent-keepalive; set it on both"),
        ((), (), (0, 0), "one and two without persistent-keepalive; set it on both"),
    ],
)
def test_what_is_said_of_a_pair_that_has_not_met(
    mine: tuple[str, ...], theirs: tuple[str, ...], keepalive: tuple[int, int], text: str | None
) -> None:
    one = hidden("one", 1, *mine, persistent_keepalive=keepalive[0])
    two = hidden("two", 2, *theirs, persistent_keepalive=keepalive[1])
    said = traversal_failures(one, two)
    if text is None:
        assert said is None, "nobody sees the other: it may just be down"
        return
    assert said is not None
    assert text in said
    assert said.startswith("no tunnel to node two: it and one are both behind NAT, and ")
    assert "public endpoint lead the location" in said
    assert "force-endpoint" in said
    assert (about_partner(said), about_partner(said[1:])) == ("two", None)


def test_a_pair_of_which_one_is_public_or_at_one_site_is_none() -> None:
    one = hidden("one", 1, *VARYING)
    assert hidden_pair(one, HUB) is None
    assert hidden_pair(one, hidden("two", 2, *VARYING)) == 4
    near = hidden("two", 2, *VARYING, location="one")
    assert hidden_pair(one, near) is None
    assert traversal_failures(one, near) is None
    assert traversal_failures(one, HUB) is None
    assert hidden_pair(one, node("six", 3, "six", "fd00:3::3/64", "[fd00:3::3]:1")) is None, "no common family"


def test_only_two_symmetric_nats_are_hopeless_and_then_the_walk_says_so() -> None:
    for mine, theirs in product((CONE, VARYING), repeat=2):
        one, two = hidden("one", 1, *mine), hidden("two", 2, *theirs)
        why = hopeless(one, two)
        assert (why is not None) == (mine == theirs == VARYING)
        world = snapshot([one, two])
        there, back = walk_both(plans(world), build_topology(world), "one", "two", 4)
        assert there.delivered == back.delivered == (why is None)
        if why is not None:
            assert there.dropped == why
            assert "each partner another port" in back.dropped


def test_a_leader_with_a_public_endpoint_carries_a_host_that_meets_nobody() -> None:
    inside = {"lan": "10.0.9", "location": "hub"}
    world = snapshot([evolve(HUB, internal_ips=hidden("x", 9, lan="10.0.9").internal_ips, leader_wanted=True),
                      hidden("one", 1, *VARYING, **inside), hidden("two", 2, *VARYING)])  # fmt: skip
    there, back = walk_both(plans(world), build_topology(world), "one", "two", 4)
    assert [hop.target for hop in there.hops] == ["hub", "two"]
    assert there.delivered
    assert back.delivered
