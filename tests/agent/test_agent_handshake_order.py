"""Handshake order: between any two hosts that become peers of each other exactly one starts at once."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_interface, ip_network

import pytest
from attrs import evolve

from kilo_etcd.model import Candidate, CandidateClass, Endpoint, Granularity, Node, Peer, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.handshake_order import (
    MOST_TRIGGERED,
    STAGES,
    HandshakeOrder,
    handshake_order,
    peered_since,
    promotions,
)
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.topology.segments import Topology, build_topology

LOW, HIGH = "A" * 43 + "=", "z" * 43 + "="


def node(name: str, key: str, number: int, endpoint: str | None = "203.0.113.{}:51820") -> Node:
    return Node(
        name=name,
        public_key=key,
        location=name,
        endpoint=Endpoint.parse(endpoint.format(number)) if endpoint else None,
        internal_ips=(ip_interface(f"10.0.0.{number}/24"),),
        mesh_addresses=(ip_address(f"10.4.0.{number}"),),
    )


def world(low: Node | None = None, high: Node | None = None, *peers: Peer) -> Snapshot:
    nodes = [low or node("low", LOW, 1), high or node("high", HIGH, 2)]
    return Snapshot(
        revision=7,
        granularity=Granularity.FULL,
        subnets=(ip_network("10.4.0.0/16"),),
        nodes={one.name: one for one in nodes},
        peers={peer.name: peer for peer in peers},
    )


def meet(
    snapshot: Snapshot, name: str, *, standby: bool = False, now: float = 100.0
) -> tuple[HostPlan, Mapping[str, float], HandshakeOrder]:
    plan = host_plan(build_topology(snapshot), name)
    since = peered_since({}, plan, standby=standby, now=now)
    return plan, since, handshake_order(plan, snapshot, since, standby=standby, now=now)


def test_the_lower_key_starts_at_once_and_the_higher_waits() -> None:
    plan, _, low = meet(world(), "low")
    assert low.plan == plan
    assert low.trigger == {HIGH: ip_address("10.4.0.2")}
    assert low.due is None
    _, _, high = meet(world(), "high")
    assert high.plan.peers[LOW].endpoint is None
    assert high.trigger == {}
    assert high.due == 100.0 + STAGES[0]


def test_who_can_be_reached_in_the_pairs_family_counts() -> None:
    # In the family that both have, the higher one is behind NAT: no other can start.
    low = node("low", LOW, 1)
    high = evolve(node("high", HIGH, 2, "[2001:db8::2]:51820"), more_endpoints=(Endpoint.parse("192.168.0.2:51820"),))
    _, _, contact = meet(world(low, high), "high")
    assert contact.plan.peers[LOW].endpoint == low.endpoint
    assert contact.trigger == {LOW: ip_address("10.4.0.1")}


def test_the_higher_gets_the_endpoint_and_starts_when_its_time_has_come() -> None:
    snapshot = world()
    plan, since, first = meet(snapshot, "high")
    assert first.due is not None
    early = handshake_order(plan, snapshot, since, first.waiting, standby=False, now=first.due - 0.01)
    assert early.plan.peers[LOW].endpoint is None
    assert early.due == first.due
    assert early.trigger == {}
    then = handshake_order(plan, snapshot, since, early.waiting, standby=False, now=first.due)
    assert then.plan == plan
    assert then.trigger == then.late == {LOW: ip_address("10.4.0.1")}
    assert (first.late, early.late) == ({}, {})


def test_the_higher_looks_again_whether_they_have_shaken_hands_and_then_no_more() -> None:
    snapshot = world()
    plan, since, seen = meet(snapshot, "high")
    looked = []
    while seen.due is not None:
        now = seen.due
        seen = handshake_order(plan, snapshot, since, seen.waiting, standby=False, now=now)
        looked.append((round(now - 100.0, 3), list(seen.late), seen.plan == plan))
    assert looked == [(stage, [LOW], True) for stage in STAGES]
    after = handshake_order(plan, snapshot, since, seen.waiting, standby=False, now=200.0)
    assert (after.plan, after.trigger, after.late, after.due) == (plan, {}, {}, None)


def test_a_standby_sends_nothing_and_begins_anew_when_it_leads() -> None:
    snapshot = world()
    plan, since, idle = meet(snapshot, "high", standby=True)
    assert since == {}
    assert idle.plan.peers[LOW].endpoint is None
    assert (idle.trigger, idle.due) == ({}, None)
    since = peered_since(since, plan, standby=False, now=200.0)
    leads = handshake_order(plan, snapshot, since, idle.waiting, standby=False, now=200.0)
    assert leads.due == 200.0 + STAGES[0]
    _, _, low = meet(snapshot, "low", standby=True)
    assert (low.trigger, low.due) == ({}, None)
    assert low.plan.peers[HIGH].endpoint is None


def location(leader: str, revision: int) -> Topology:
    """A location of two, led by `leader`, and a host alone in another; keys are such that `far` is the lowest."""
    nodes = [
        evolve(node("one", "m" * 43 + "=", 1), location="gcp"),
        evolve(node("two", "n" * 43 + "=", 2), location="gcp"),
        evolve(node("far", LOW, 3), location="far"),
    ]
    return build_topology(
        Snapshot(
            revision=revision,
            subnets=(ip_network("10.4.0.0/16"),),
            nodes={one.name: one for one in nodes},
            candidates={"gcp": (Candidate(node=leader, rank=CandidateClass.PUBLIC, create_revision=1),)},
        )
    )


@pytest.mark.parametrize("low_is", ["promoted", "remote"])
def test_who_is_promoted_leaves_the_first_word_to_those_who_led_before(low_is: str) -> None:
    before, now = location("one", 1), location("two", 2)
    if low_is == "promoted":
        swap = {"two": LOW, "far": HIGH}
        before, now = (
            build_topology(
                evolve(
                    each.snapshot,
                    nodes={
                        name: evolve(one, public_key=swap.get(name, one.public_key))
                        for name, one in each.snapshot.nodes.items()
                    },
                )
            )
            for each in (before, now)
        )
    promoted = promotions(before, now)
    assert promoted == {"two"}
    said = {}
    for name in ("two", "far"):
        plan = host_plan(now, name)
        (key,) = plan.peers
        said[name] = handshake_order(plan, now.snapshot, {key: 5.0}, promoted=promoted, standby=False, now=5.0)
    assert not said["two"].trigger
    assert said["two"].due == 5.0 + STAGES[0]
    assert list(said["far"].trigger.values()) == [ip_address("10.4.0.2")]
    assert promotions(now, now) == promotions(None, now) == frozenset()


def test_a_host_that_cannot_be_reached_does_not_wait_for_a_handshake() -> None:
    hidden = node("high", HIGH, 2, endpoint="192.168.7.2:51820")
    plan, _, high = meet(world(high=hidden), "high")
    assert high.plan == plan
    assert high.trigger == {LOW: ip_address("10.4.0.1")}
    _, _, nowhere = meet(world(high=node("high", HIGH, 2, endpoint=None)), "high")
    assert nowhere.trigger == high.trigger


@pytest.mark.parametrize("name", ["low", "high"])
@pytest.mark.parametrize("seen", ["", "198.51.100.2:40002"])
def test_a_public_host_lets_who_is_behind_nat_come(name: str, seen: str) -> None:
    other = "high" if name == "low" else "low"
    hidden = node(other, LOW if other == "low" else HIGH, 2, endpoint="192.168.7.2:51820")
    hidden = evolve(hidden, persistent_keepalive=25, observed_endpoints=(Endpoint.parse(seen),) if seen else ())
    plan, _, contact = meet(world(**{other: hidden}), name)
    assert contact.plan == plan, "it may get the endpoint, but it neither waits for its turn nor resets the session"
    assert (contact.trigger, contact.late, contact.due) == ({}, {}, None)


def test_without_labels_a_private_address_is_near_only_on_ones_own_network() -> None:
    high = evolve(node("high", HIGH, 2), location="")
    near = evolve(node("low", LOW, 1, endpoint="10.0.0.1:51820"), location="")
    _, _, contact = meet(world(near, high), "high")
    assert contact.due == 100.0 + STAGES[0], "it waits for its turn"
    far = evolve(near, endpoint=Endpoint.parse("10.7.0.1:51820"), internal_ips=(ip_interface("10.7.0.1/24"),))
    _, _, contact = meet(world(far, high), "high")
    assert (contact.trigger, contact.due) == ({}, None)


@pytest.mark.parametrize("name", ["low", "high"])
def test_a_host_that_alone_can_start_looks_whether_there_was_a_handshake(name: str) -> None:
    hidden = node(name, LOW if name == "low" else HIGH, 2, endpoint="192.168.7.2:51820")
    snapshot = world(**{name: hidden})
    plan, since, seen = meet(snapshot, name)
    looked = []
    while seen.due is not None:
        now = seen.due
        seen = handshake_order(plan, snapshot, since, seen.waiting, standby=False, now=now)
        looked.append((round(now - 100.0, 3), len(seen.late), seen.plan == plan))
    assert looked == [(stage, 1, True) for stage in STAGES[1:]]


def test_peers_from_outside_are_left_alone() -> None:
    phone = Peer(
        name="phone",
        public_key="0" * 43 + "=",
        allowed_ips=(ip_network("10.9.0.1/32"),),
        endpoint=Endpoint.parse("198.51.100.9:51820"),
    )
    plan, _, high = meet(world(None, None, phone), "high")
    assert high.plan.peers[phone.public_key] == plan.peers[phone.public_key]
    assert high.plan.peers[phone.public_key].endpoint is not None


def test_the_account_keeps_who_stays_and_drops_who_goes() -> None:
    snapshot = world()
    plan = host_plan(build_topology(snapshot), "high")
    since = peered_since({}, plan, standby=False, now=1.0)
    assert peered_since(since, plan, standby=False, now=9.0) is since
    alone = Snapshot(revision=8, subnets=snapshot.subnets, nodes={"high": snapshot.nodes["high"]})
    assert peered_since(since, host_plan(build_topology(alone), "high"), standby=False, now=9.0) == {}


def test_a_host_that_meets_very_many_at_once_lets_traffic_decide() -> None:
    many = {f"n{i:03}": node(f"n{i:03}", f"{i:03}" + "A" * 40 + "=", 3) for i in range(MOST_TRIGGERED + 1)}
    high = node("high", HIGH, 2)
    snapshot = evolve(world(), nodes={"high": high, **many})
    plan, since, first = meet(snapshot, "high")
    assert len(first.waiting) == len(many)
    assert first.due is not None
    then = handshake_order(plan, snapshot, since, first.waiting, standby=False, now=first.due)
    assert (then.plan, then.trigger, then.late) == (plan, {}, {})
