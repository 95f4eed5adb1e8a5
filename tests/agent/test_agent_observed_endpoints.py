"""Which observed endpoints a host publishes, which peers it misses, and how often it may publish."""

from __future__ import annotations

import random
from ipaddress import ip_address, ip_network
from itertools import pairwise
from typing import Any

import pytest
from attrs import evolve

from kilo_etcd.agent.nat.nat_traversal import MOST_SAID, PATIENCE, SILENCE, Attempts, partners
from kilo_etcd.agent.nat.observed_endpoints import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    OBSERVERS,
    QUIET,
    STALE,
    PublishSchedule,
    observed_here,
    to_publish,
    to_watch,
)
from kilo_etcd.kernel.state import ObservedPeer, PeerActivity
from kilo_etcd.model import Endpoint, Granularity, Node, ObservedEndpoint, Peer, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.store.records import ObservedEndpointRecord
from kilo_etcd.topology.segments import build_topology

NOW = 1_000_000.0
THERE, ELSEWHERE = "198.51.100.1:40001", "198.51.100.1:40777"


def node(name: str, number: int, endpoint: str, **rest: Any) -> Node:
    """In a location of its own, without an internal IP."""
    return Node(
        name=name,
        public_key=f"key-{name}",
        location=name,
        endpoint=Endpoint.parse(endpoint),
        mesh_addresses=(ip_address(f"10.4.0.{number}"),),
        **rest,
    )


HUB = node("hub", 9, "203.0.113.9:51820")


def hidden(name: str, number: int, *seen: str, keepalive: int = 25) -> Node:
    return node(
        name,
        number,
        f"192.168.{number}.1:51820",
        persistent_keepalive=keepalive,
        observed_endpoints=tuple(map(Endpoint.parse, seen)),
    )


PHONE = Peer(name="phone", public_key="key-phone", allowed_ips=(ip_network("10.9.0.1/32"),), persistent_keepalive=25)


def world(*nodes: Node, peers: tuple[Peer, ...] = (PHONE,), **rest: Any) -> Snapshot:
    return Snapshot(
        revision=7,
        granularity=Granularity.FULL,
        subnets=(ip_network("10.4.0.0/16"),),
        nodes={one.name: one for one in nodes},
        peers={peer.name: peer for peer in peers},
        **rest,
    )


def activity(ago: float = 5.0, **endpoints: str) -> PeerActivity:
    """Every named peer has shaken hands `ago` seconds ago."""
    return PeerActivity(
        time=NOW,
        peers={
            f"key-{name}": ObservedPeer(
                public_key=f"key-{name}", endpoint=Endpoint.parse(endpoint), last_handshake=NOW - ago, rx_bytes=100
            )
            for name, endpoint in endpoints.items()
        },
    )


def plan_of(name: str, of: Snapshot) -> HostPlan:
    return host_plan(build_topology(of), name)


def told_by(name: str, of: Snapshot, what: PeerActivity) -> dict[str, str]:
    records = observed_here(to_watch(of.nodes[name], of, plan_of(name, of)), what)
    return {subject: str(record.endpoint) for subject, record in records.items()}


def test_a_public_host_tells_where_it_hears_those_behind_nat() -> None:
    of = world(HUB, hidden("home", 1), node("public", 2, "203.0.113.2:51820", persistent_keepalive=25))
    everybody = activity(home=THERE, phone="198.51.100.8:6000", public="203.0.113.2:51999")
    assert told_by("hub", of, everybody) == {"home": THERE, "phone": "198.51.100.8:6000"}


@pytest.mark.parametrize(
    ("what", "of"),
    [
        (activity(STALE + 1, home=THERE), world(HUB, hidden("home", 1))),
        (PeerActivity(time=NOW), world(HUB, hidden("home", 1))),
        (activity(home="192.168.1.1:51820"), world(HUB, hidden("home", 1))),
        (activity(home="[2001:db8::1]:40001"), world(HUB, hidden("home", 1))),
        (activity(home=THERE), world(HUB, hidden("home", 1, keepalive=0))),
        (activity(home=THERE), world(evolve(HUB, endpoint=Endpoint.parse("10.0.0.9:51820")), hidden("home", 1))),
        (activity(phone=THERE), world(HUB, hidden("phone", 1, keepalive=0))),
        (activity(phone=THERE), world(HUB, peers=(evolve(PHONE, persistent_keepalive=0),))),
        (activity(phone=THERE), world(HUB, peers=(evolve(PHONE, endpoint=Endpoint.parse("vpn.example.org:1")),))),
    ],
    ids=(
        "long silent", "not there", "private address", "family in which the observer is not public", "no keepalive",
        "observer behind NAT", "a node has the phone's name", "phone without keepalive", "phone with an endpoint",
    ),
)  # fmt: skip
def test_nothing_is_told_that_helps_nobody(what: PeerActivity, of: Snapshot) -> None:
    assert told_by("hub", of, what) == {}


def record(endpoint: str, of: str = "home") -> ObservedEndpointRecord:
    return ObservedEndpointRecord(public_key=f"key-{of}", endpoint=Endpoint.parse(endpoint))


def observed_endpoints(*observers: str, key: str = "key-home") -> dict[str, tuple[ObservedEndpoint, ...]]:
    there = Endpoint.parse(THERE)
    return {"home": tuple(ObservedEndpoint(observer=o, public_key=key, endpoint=there, revision=1) for o in observers)}


def test_a_few_observers_are_enough_and_others_take_the_place_of_those_that_go() -> None:
    seen, some = {"home": record(THERE)}, ["a", "b", "c"][:OBSERVERS]
    public = [node(name, number, f"203.0.113.{number}:51820") for number, name in enumerate(some, 20)]
    assert to_publish(seen, world(HUB, *public, observed_endpoints=observed_endpoints(*some)), "hub", {}) == {}
    assert to_publish(seen, world(HUB, *public, observed_endpoints=observed_endpoints(*some[1:])), "hub", {}) == seen
    assert (
        to_publish(seen, world(HUB, *public, observed_endpoints=observed_endpoints(*some, "hub")), "hub", seen) == seen
    ), "an observer that has published goes on"
    assert (
        to_publish(seen, world(HUB, *public, observed_endpoints=observed_endpoints(*some, key="of old")), "hub", {})
        == seen
    )
    hidden_ones = [evolve(one, endpoint=Endpoint.parse("10.0.0.1:1")) for one in public]
    said = observed_endpoints(*some)
    assert to_publish(seen, world(HUB, *hidden_ones, observed_endpoints=said), "hub", {}) == seen, (
        "who counts for nobody"
    )
    assert to_publish(seen, world(HUB, observed_endpoints=said), "hub", {}) == seen, "no nodes at all"
    assert to_publish({}, world(HUB, *public, observed_endpoints=observed_endpoints(*some)), "hub", seen) == {}


def writes(
    account: PublishSchedule, said: list[tuple[float, str]], until: float, nodes: int = 10
) -> list[tuple[float, str]]:
    """When what is written, if `said` is heard from the given moments on, which are in order."""
    told: dict[str, ObservedEndpointRecord] = {}
    done = []
    now, due, heard = 0.0, None, 0
    while now <= until:
        while heard < len(said) and said[heard][0] <= now:
            heard += 1
        wanted = {"home": record(said[heard - 1][1])} if heard and said[heard - 1][1] else {}
        result, due = account.ready(wanted, told, now=now, nodes=nodes)
        if result != told:
            done.append((now, str(result["home"].endpoint) if result else ""))
        told = result
        moments = [since for since, _ in said[heard : heard + 1]] + ([due] if due is not None else [])
        now = min(moments, default=until + 1)
    return done


def test_what_changes_once_is_written_once_soon_and_never_again() -> None:
    ((when, what),) = writes(PublishSchedule(random.Random(1)), [(0.0, THERE)], 10_000.0)
    assert when < 1.0
    assert what == THERE
    first, second, third = writes(
        PublishSchedule(random.Random(1)), [(0.0, THERE), (100.0, ELSEWHERE), (200.0, "")], 10_000.0
    )
    assert (first[1], second[1], third[1]) == (THERE, ELSEWHERE, "")
    assert second[0] < 101.0
    assert third[0] < 201.0


def test_what_was_a_moment_only_is_not_written() -> None:
    account = PublishSchedule(random.Random(1))
    assert len(writes(account, [(0.0, THERE), (0.001, ELSEWHERE), (0.002, THERE)], 1000.0)) == 1
    _, due = account.ready({"home": record(ELSEWHERE)}, {"home": record(THERE)}, now=1001.0, nodes=10)
    assert due is not None
    assert account.ready({"home": record(THERE)}, {"home": record(THERE)}, now=due, nodes=10)[1] is None


def test_who_roams_without_end_is_written_of_less_and_less_often() -> None:
    roaming = [(float(second), f"198.51.100.1:{1000 + second}") for second in range(3600)]
    moments = [when for when, _ in writes(PublishSchedule(random.Random(1)), roaming, 3600.0)]
    assert len(moments) < 3600 / LONGEST_PAUSE + 8
    pauses = [later - earlier for earlier, later in pairwise(moments)]
    assert pauses[0] >= FIRST_PAUSE
    assert all(longer >= shorter * 0.8 for shorter, longer in pairwise(pauses))
    assert min(pauses[5:]) >= LONGEST_PAUSE
    assert max(pauses) < LONGEST_PAUSE + 5
    late = [*roaming, (3600.0 + 2 * QUIET, THERE)]
    assert writes(PublishSchedule(random.Random(1)), late, 9000.0)[-1][0] < 3600.0 + 2 * QUIET + 1


def test_of_a_thousand_observers_few_publish_before_they_see_the_others() -> None:
    told_at = sorted(
        writes(PublishSchedule(random.Random(n)), [(0.0, THERE)], 60.0, nodes=1000)[0][0] for n in range(1000)
    )
    third, watch_delay = told_at[OBSERVERS - 1], 0.1
    assert sum(when < third + watch_delay for when in told_at) < 40
    assert told_at[-1] < 15.0


# Who is not heard


def attempts(own: Node, *others: Node) -> tuple[Snapshot, HostPlan, dict[str, Node]]:
    of = world(own, *others, peers=())
    plan = plan_of(own.name, of)
    return of, plan, partners(own, of, plan)


def unheard(*names: str) -> PeerActivity:
    return PeerActivity(time=NOW, peers={f"key-{name}": ObservedPeer(public_key=f"key-{name}") for name in names})


def test_silence_is_named_when_it_lasts_and_forgotten_when_it_ends() -> None:
    one, two = hidden("one", 1, THERE), hidden("two", 2, "198.51.100.2:1", "198.51.100.2:2")
    _, plan, nodes = attempts(one, two, HUB)
    assert list(nodes) == ["key-two"]
    account = Attempts()
    first = account.look(one, nodes, plan, unheard("two"), now=0.0)
    assert (first.sentences, first.waiting) == ((), True)
    assert account.look(one, nodes, plan, unheard("two"), now=PATIENCE - 0.1).sentences == ()
    late = account.look(one, nodes, plan, unheard("two"), now=PATIENCE)
    assert len(late.sentences) == 1
    assert "the NAT of two shows each partner another port" in late.sentences[0]
    assert not late.waiting
    assert account.look(one, nodes, plan, activity(two="198.51.100.2:3"), now=PATIENCE + 1).sentences == ()
    assert account.look(one, nodes, plan, unheard("two"), now=PATIENCE + 2).sentences == (), "it begins anew"


def test_a_new_word_on_where_it_is_gives_it_time_again() -> None:
    one, two = hidden("one", 1, THERE), hidden("two", 2, "198.51.100.2:1")
    _, plan, nodes = attempts(one, two)
    account = Attempts()
    account.look(one, nodes, plan, unheard("two"), now=0.0)
    _, plan, nodes = attempts(one, hidden("two", 2, "198.51.100.2:2"))
    assert account.look(one, nodes, plan, unheard("two"), now=PATIENCE).waiting
    assert account.look(one, nodes, plan, unheard("two"), now=2 * PATIENCE).sentences


def test_a_long_silence_after_a_session_counts_too_and_public_hosts_have_nothing_to_say() -> None:
    one, two = hidden("one", 1, THERE), hidden("two", 2, "198.51.100.2:1")
    _, plan, nodes = attempts(one, two)
    account = Attempts()
    silent = activity(STALE + 1, two="198.51.100.2:1")
    account.look(one, nodes, plan, silent, now=0.0)
    assert "does not get through" in account.look(one, nodes, plan, silent, now=PATIENCE).sentences[0]
    assert attempts(HUB, one, two)[2] == {}


def test_the_sentences_have_an_end_however_many_there_are() -> None:
    one = hidden("one", 1, THERE)
    many = [hidden(f"n{n:02}", n + 10, f"198.51.100.2:{n + 1}") for n in range(50)]
    _, plan, nodes = attempts(one, *many)
    account = Attempts()
    everybody = unheard(*(each.name for each in many))
    account.look(one, nodes, plan, everybody, now=0.0)
    said = account.look(one, nodes, plan, everybody, now=PATIENCE).sentences
    assert len(said) == MOST_SAID
    assert said[-1] == f"{50 - MOST_SAID + 1} more nodes behind NAT are not reached directly"


def test_who_falls_silent_while_others_see_it_elsewhere_is_begun_over() -> None:
    one, two = hidden("one", 1, THERE), hidden("two", 2, ELSEWHERE)
    _, plan, nodes = attempts(one, two)
    account = Attempts()
    wait = max(SILENCE, 2.5 * 25)
    there = activity(two="198.51.100.2:1")
    assert not account.look(one, nodes, plan, there, now=0.0).reset_session
    assert not account.look(one, nodes, plan, there, now=wait).reset_session
    assert account.look(one, nodes, plan, there, now=wait + 1).reset_session == {"key-two"}
    assert not account.look(one, nodes, plan, there, now=wait + 2).reset_session, "once"
    # As long as it is heard, or nobody knows better, it is left alone.
    account = Attempts()
    for second in range(300):
        peers = {k: evolve(p, rx_bytes=second // 20) for k, p in there.peers.items()}
        assert not account.look(one, nodes, plan, evolve(there, peers=peers), now=float(second)).reset_session
    account = Attempts()
    for second in range(300):
        assert not account.look(one, nodes, plan, activity(two=ELSEWHERE), now=float(second)).reset_session
