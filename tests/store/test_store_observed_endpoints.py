"""Where hosts see each other through NATs: in the snapshot, and among a host's own keys."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from store_world import KEYS, World, record, running, wg_key
from test_store_session import member, session

from helpers import examples
from kilo_etcd.model import Endpoint
from kilo_etcd.store.annotations import MOST_SEEN
from kilo_etcd.store.records import ObservedEndpointRecord, encode
from kilo_etcd.store.session.registration import MOST_AT_ONCE
from kilo_etcd.testing.fake_etcd import FakeEtcd

HOME = Endpoint.parse("192.168.0.2:51820")


def observed(endpoint: str, of: str = "home") -> ObservedEndpointRecord:
    return ObservedEndpointRecord(public_key=wg_key(of), endpoint=Endpoint.parse(endpoint))


def observed_by(world: World, name: str, endpoint: str | None = None) -> None:
    """A node that sees others; a public one in both families, if nothing else is said."""
    number = 20 + ord(name)
    world.node(
        name, f"10.4.0.{number}", endpoint=Endpoint.parse(endpoint or f"203.0.113.{number}:51820"),
        more_endpoints=() if endpoint else (Endpoint.parse(f"[2001:db8::{number}]:51820"),),
    )  # fmt: skip


def at_home(**fields: object) -> World:
    """A node behind NAT with keepalive, a phone, and three public nodes."""
    world = World()
    for name in "abc":
        observed_by(world, name)
    world.node("home", "10.4.0.1", **{"endpoint": HOME, "persistent_keepalive": 25, **fields})
    world.peer("phone", allowedIPs=["10.9.0.1/32"], persistentKeepalive=25)
    return world


def see(world: World, observer: str, endpoint: str, of: str = "home", key: str | None = None) -> None:
    world.put(KEYS.endpoint(of, observer), encode(observed(endpoint, key or of)))


def seen(world: World, name: str = "home") -> list[str]:
    return [str(endpoint) for endpoint in world.view.snapshot().nodes[name].observed_endpoints]


def test_what_observers_see_is_the_nodes_and_the_newest_word_comes_first() -> None:
    world = at_home()
    assert seen(world) == []
    see(world, "a", "203.0.113.9:40001")
    see(world, "b", "203.0.113.9:40001")
    assert seen(world) == ["203.0.113.9:40001"], "they agree"
    before = world.view.snapshot().nodes["home"]
    see(world, "c", "203.0.113.9:40001")
    assert world.view.snapshot().nodes["home"] is before, "one more who agrees is no change"
    see(world, "a", "203.0.113.9:40777")
    assert seen(world) == ["203.0.113.9:40777", "203.0.113.9:40001"]
    world.delete(KEYS.endpoint("home", "a"))
    assert seen(world) == ["203.0.113.9:40001"]
    assert [observed_endpoint.observer for observed_endpoint in world.view.snapshot().observed_endpoints["home"]] == [
        "b",
        "c",
    ]
    for observer in "bc":
        world.delete(KEYS.endpoint("home", observer))
    assert seen(world) == []
    assert dict(world.view.snapshot().observed_endpoints) == {}


def test_a_phone_is_seen_too_unless_its_record_says_where_it_is() -> None:
    world = at_home()
    see(world, "a", "198.51.100.7:6000", "phone")
    assert [str(endpoint) for endpoint in world.view.snapshot().peers["phone"].observed_endpoints] == [
        "198.51.100.7:6000"
    ]
    world.peer("phone", allowedIPs=["10.9.0.1/32"], persistentKeepalive=25, endpoint="198.51.100.1:51820")
    assert world.view.snapshot().peers["phone"].observed_endpoints == ()
    world.peer("phone", allowedIPs=["10.9.0.1/32"])
    assert world.view.snapshot().peers["phone"].observed_endpoints == (), "without keepalive the NAT forgets it"


def test_a_word_counts_only_where_nothing_better_is_known() -> None:
    for fields in ({"persistent_keepalive": 0}, {"endpoint": Endpoint.parse("203.0.113.1:51820")}):
        world = at_home(**fields)
        see(world, "a", "203.0.113.9:40001")
        assert seen(world) == []
    world = at_home()
    see(world, "a", "203.0.113.9:40001")
    see(world, "a", "[2001:db8::9]:40001")
    assert seen(world) == ["[2001:db8::9]:40001"]
    see(world, "b", "10.1.1.1:40001")
    assert seen(world) == ["[2001:db8::9]:40001"], "a private address means something at one site only"
    world.put(KEYS.annotation("home", "force-endpoint"), "10.8.8.8:51820")
    assert seen(world) == [], "the operator's word goes before all"
    world.put(KEYS.annotation("home", "force-endpoint"), "not an endpoint at all")
    assert seen(world) == ["[2001:db8::9]:40001"]


def test_only_the_word_of_a_public_node_of_the_mesh_counts() -> None:
    world = at_home()
    see(world, "nobody", "203.0.113.66:6666")
    see(world, "home", "203.0.113.66:6666")
    see(world, "phone", "203.0.113.66:6666")
    assert seen(world) == []
    see(world, "a", "203.0.113.9:40001")
    assert seen(world) == ["203.0.113.9:40001"]
    observed_by(world, "a", "10.1.1.1:51820")
    assert seen(world) == [], "it may be at one site with it now"
    observed_by(world, "a", "203.0.113.70:51820")
    assert seen(world) == ["203.0.113.9:40001"]
    see(world, "b", "[2001:db8::9]:40001", "phone")
    assert [str(endpoint) for endpoint in world.view.snapshot().peers["phone"].observed_endpoints] == [
        "[2001:db8::9]:40001"
    ]
    world.delete(KEYS.node("b"))
    assert world.view.snapshot().peers["phone"].observed_endpoints == (), "it has left the mesh"
    see(world, "a", "[2001:db8::9]:40001")
    assert seen(world) == [], "it is public in IPv4 only"
    # What is rejected of it is said no more, and all who count are still listed.
    assert len(world.view.snapshot().observed_endpoints["home"]) == 4


def test_of_many_observations_few_count() -> None:
    world = at_home()
    for number in range(20):
        name = f"observer-{number}"
        world.node(name, f"10.4.1.{number + 1}", endpoint=Endpoint.parse(f"203.0.113.{number + 1}:51820"))
        see(world, name, f"203.0.113.9:{40000 + number}")
    assert len(seen(world)) == MOST_SEEN
    assert seen(world)[0] == "203.0.113.9:40019"


def test_a_word_on_another_key_is_on_another_host() -> None:
    world = at_home()
    see(world, "a", "203.0.113.9:40001", key="the host before it was made anew")
    assert seen(world) == []
    see(world, "b", "203.0.113.9:40002")
    assert seen(world) == ["203.0.113.9:40002"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("203.0.113.9:40001", "not JSON"),
        ("{}", "the field publicKey is missing"),
        ('{"publicKey":"x","endpoint":"203.0.113.9:1"}', "publicKey"),
        ('{"publicKey":"' + wg_key("home") + '","endpoint":"home.example.org:1"}', "no address and port"),
    ],
)
def test_a_bad_word_is_named_and_harms_nobody(value: str, reason: str) -> None:
    world = at_home()
    see(world, "a", "203.0.113.9:40001")
    world.put(KEYS.endpoint("home", "b"), value)
    assert seen(world) == ["203.0.113.9:40001"]
    assert reason in world.aside[KEYS.endpoint("home", "b")]


_STEP = st.tuples(
    st.sampled_from(("see", "see", "forget", "node", "gone", "peer", "observer", "observer gone", "observer hidden")),
    st.sampled_from(("home", "phone")),
    st.sampled_from("abc"),
    st.sampled_from(("203.0.113.9:1", "203.0.113.9:2", "[2001:db8::9]:1", "10.0.0.1:1")),
)


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(_STEP, max_size=12))
def test_one_word_at_a_time_comes_to_the_same_as_reading_all(steps: list[tuple[str, str, str, str]]) -> None:
    world = at_home()
    for what, name, observer, endpoint in steps:
        if what == "see":
            see(world, observer, endpoint, name)
        elif what == "forget":
            world.delete(KEYS.endpoint(name, observer))
        elif what == "node":
            world.node("home", "10.4.0.1", endpoint=HOME, persistent_keepalive=len(endpoint) % 2)
        elif what == "observer":
            observed_by(world, observer)
        elif what == "observer gone":
            world.delete(KEYS.node(observer))
        elif what == "observer hidden":
            observed_by(world, observer, "10.0.0.9:1" if len(endpoint) % 2 else "203.0.113.9:1")
        elif what == "peer":
            world.peer("phone", allowedIPs=["10.9.0.1/32"], persistentKeepalive=len(endpoint) % 2)
        else:
            world.delete(KEYS.node("home"))
        now, afresh = world.view.snapshot(), world.from_scratch().snapshot()
        assert (now.nodes, now.peers, now.observed_endpoints) == (afresh.nodes, afresh.peers, afresh.observed_endpoints)


# Among a host's own keys


def told(etcd: FakeEtcd) -> list[str]:
    return etcd.keys("/kilo/by/", "/endpoints/")


@pytest.mark.autojump
async def test_what_a_host_sees_is_under_its_short_lease_and_goes_with_it() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await it.put_observed_endpoints({"home": observed("203.0.113.9:40001")})
        assert told(etcd) == ["/kilo/by/a/endpoints/home"]
        revision = etcd.revision
        await it.put_observed_endpoints({"home": observed("203.0.113.9:40001")})
        await trio.sleep(600)
        assert etcd.revision == revision, "nothing is written in steady state"
        await it.put_observed_endpoints(
            {"home": observed("203.0.113.9:40002"), "phone": observed("203.0.113.8:1", "phone")}
        )
        assert etcd.revision == revision + 1, "one write for all of it"
        await it.put_observed_endpoints({"phone": observed("203.0.113.8:1", "phone")})
        assert told(etcd) == ["/kilo/by/a/endpoints/phone"]
    await trio.sleep(6)
    assert told(etcd) == []


@pytest.mark.autojump
async def test_an_agent_that_starts_again_within_the_ttl_goes_on_saying_what_it_said() -> None:
    etcd = FakeEtcd()
    async with member(etcd) as it:
        await it.put_observed_endpoints({"home": observed("203.0.113.9:40001")})
    await trio.sleep(2)
    revision = etcd.revision
    again = session(etcd.client())
    async with running(again):
        await again.register(record("a"))
        assert again.observed_endpoints == {"home": observed("203.0.113.9:40001")}
        await again.put_observed_endpoints(again.observed_endpoints)
        assert etcd.revision == revision
        await again.resign()
        assert told(etcd) == []
        assert again.observed_endpoints == {}


@pytest.mark.autojump
async def test_a_lost_lease_brings_all_of_it_back_however_much_it_is() -> None:
    etcd = FakeEtcd()
    many = {f"phone-{n}": observed(f"203.0.113.8:{n + 1}", f"phone-{n}") for n in range(3 * MOST_AT_ONCE)}
    async with member(etcd) as it:
        await it.put_observed_endpoints(many)
        assert len(told(etcd)) == len(many)
        lease = etcd.data[b"/kilo/by/a/endpoints/phone-0"].lease
        await etcd.client().revoke_lease(lease)
        await trio.sleep(20)
        assert len(told(etcd)) == len(many)
        assert etcd.data[b"/kilo/by/a/endpoints/phone-0"].lease != lease
        await it.put_observed_endpoints({})
        assert told(etcd) == []
