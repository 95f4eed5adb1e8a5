"""Peers that do not answer where WireGuard looks for them, at one reading of the device after the other."""

from __future__ import annotations

import pytest
from attrs import define, evolve
from kernel_worlds import TARGET, host_with, key, lines, peer, plan, tunnel

from kilo_etcd.kernel.diff import diff, remember
from kilo_etcd.kernel.predict import apply_changes
from kilo_etcd.kernel.state import Memory, Observed
from kilo_etcd.model import Endpoint
from kilo_etcd.model.hostplan import HostPlan

STATED, LEARNT, ELSEWHERE = "198.51.100.2:51820", "203.0.113.9:4711", "203.0.113.10:4711"
RESYNC = 30


@define
class Host:
    """A host that reads its device every `RESYNC` seconds."""

    plan: HostPlan
    observed: Observed
    memory: Memory
    time: float = 1000.0

    def read(self, *, sent: int = 0, received: int = 0, endpoint: str | None = None) -> list[str]:
        """What it sets at the next reading, before which so many bytes were sent to the peer, and came from there."""
        self.time += RESYNC
        before = self.observed.peers[key(2)]
        observed_peer = evolve(
            before,
            endpoint=before.endpoint if endpoint is None else Endpoint.parse(endpoint),
            tx_bytes=before.tx_bytes + sent,
            rx_bytes=before.rx_bytes + received,
            last_handshake=self.time if received else before.last_handshake,
        )
        self.observed = evolve(self.observed, time=self.time, peers={key(2): observed_peer})
        changes = diff(self.plan, self.observed, self.memory, TARGET)
        self.memory = remember(self.plan, self.memory, made=changes, observed=self.observed, now=self.time)
        self.observed = apply_changes(self.observed, changes, TARGET.interface)
        assert diff(self.plan, self.observed, self.memory, TARGET) == (), "once"
        return [line.removeprefix("wg set kilo0 peer #2 endpoint ") for line in lines(changes)]

    def turns(self, seconds: float, *, sent: int = 148) -> list[tuple[float, str]]:
        """What it sets while packets are sent and nothing comes, and how many seconds from now."""
        began = self.time
        return [(self.time - began, one) for _ in range(int(seconds / RESYNC)) for one in self.read(sent=sent)]


def with_endpoint(endpoint: str | None, *, observed: bool = False) -> HostPlan:
    return plan(peer(2, "10.4.0.2/32", endpoint=endpoint, observed=observed))


def moved(stated: str = STATED, learnt: str = LEARNT, *, observed: bool = False) -> Host:
    """A peer that was heard at an endpoint that is not stated."""
    wanted = with_endpoint(stated, observed=observed)
    host = Host(wanted, host_with(wanted), remember(wanted, Memory()))
    host.read(sent=1, received=1, endpoint=learnt)
    return host


@pytest.mark.parametrize(
    ("stated", "learnt"),
    [(STATED, LEARNT), ("192.168.99.1:51820", "192.168.99.61:51820"), (STATED, "[2001:db8::2]:51820")],
    ids=["public", "private", "another family"],
)
def test_a_peer_that_is_silent_where_it_was_heard_is_looked_for_where_it_is_stated_to_be(
    stated: str, learnt: str
) -> None:
    """It has moved back, and this host has moved as well, so that none of its packets has told."""
    host = moved(stated, learnt)
    assert host.turns(240) == [(180.0, stated)]
    assert host.read(received=1) == []
    assert host.turns(600) == [], "it was heard there: nothing else is known of it"
    assert host.memory.unanswered == {}


def test_a_peer_that_is_silent_at_both_endpoints_is_looked_for_at_each_in_turn_but_rarely() -> None:
    """One that is behind NAT, or has roamed while etcd was away, comes back where it was, not where it is stated."""
    host = moved("192.168.0.2:51820")
    assert host.turns(1000) == [
        (180.0, "192.168.0.2:51820"), (360.0, LEARNT), (540.0, "192.168.0.2:51820"), (720.0, LEARNT),
        (900.0, "192.168.0.2:51820"),
    ]  # fmt: skip
    assert host.read(received=1, endpoint=ELSEWHERE) == []
    assert host.turns(400) == [(180.0, "192.168.0.2:51820"), (360.0, ELSEWHERE)]


def test_a_peer_that_nobody_sends_anything_stays_where_it_was_heard() -> None:
    """Its endpoint grows old, which says nothing: NATs with a mapping of one to one keep it forever."""
    host = moved("192.168.0.2:51820")
    assert host.turns(3600, sent=0) == []
    assert host.read(sent=148) == [], "the answer may be under way"
    assert host.read(sent=148) == ["192.168.0.2:51820"]


def test_what_was_sent_long_ago_is_no_reason_to_take_what_was_sent_just_now_for_lost() -> None:
    host = moved()
    assert host.turns(3600, sent=0) == []
    assert host.read(sent=148) == []
    assert host.turns(120, sent=0) == []
    assert host.read(sent=148) == []


def test_a_peer_that_is_heard_stays_where_it_is_heard() -> None:
    host = moved()
    for _ in range(20):
        assert host.read(sent=148, received=92) == []
    # It begins handshakes that do not come to an end: WireGuard would go back to where they come from at once.
    for _ in range(20):
        last = host.observed.peers[key(2)].last_handshake
        assert host.read(sent=92, received=148) == []
        heard = evolve(host.observed.peers[key(2)], last_handshake=last)
        host.observed = evolve(host.observed, peers={key(2): heard})


@pytest.mark.parametrize("stated", [None, "node.example.org:51820"], ids=["roaming laptop", "name not resolved"])
def test_a_peer_that_is_stated_to_be_nowhere_stays_where_it_was_heard(stated: str | None) -> None:
    host = moved()
    host.plan = with_endpoint(stated)
    assert host.turns(1000) == []


def test_a_peer_that_others_see_is_looked_for_there_as_before() -> None:
    host = moved(STATED, observed=True)
    assert host.turns(1000) == [(180.0, STATED)]


def test_an_agent_that_was_started_again_looks_in_both_places_too() -> None:
    host = moved()
    host.memory = Memory()
    assert host.turns(120) == [], "it may be in use"
    assert host.turns(400) == [(60.0, STATED), (240.0, LEARNT)]


def test_an_endpoint_that_is_stated_anew_is_set_at_once_and_begins_anew() -> None:
    host = moved()
    host.turns(360)
    assert host.observed.peers[key(2)].endpoint == Endpoint.parse(LEARNT)
    host.plan = with_endpoint(ELSEWHERE)
    assert host.read(sent=148) == [ELSEWHERE]
    assert host.turns(400) == [(180.0, LEARNT), (360.0, ELSEWHERE)]


def test_a_learnt_endpoint_that_is_routed_into_the_tunnel_has_no_turn() -> None:
    wanted = with_endpoint(STATED)
    host = moved(learnt="10.2.0.7:51820")
    route = tunnel("10.2.0.7/32", "10.4.0.1")
    host.plan = evolve(wanted, routes={**wanted.routes, route.destination: route})
    host.memory = remember(host.plan, host.memory)
    changes = diff(host.plan, host.observed, host.memory, TARGET)
    host.observed = apply_changes(host.observed, changes, TARGET.interface)
    assert host.turns(600) == []
    assert host.observed.peers[key(2)].endpoint == Endpoint.parse(STATED)


def test_the_account_of_a_peer_goes_with_it_and_is_kept_by_what_reads_nothing() -> None:
    host = moved()
    host.turns(90)
    assert host.memory.unanswered[key(2)].since < host.time
    same = remember(host.plan, host.memory, host.plan, observed=host.observed, now=host.time)
    assert same.unanswered == host.memory.unanswered
    others = plan(*host.plan.peers.values(), peer(3, "10.4.0.3/32", endpoint=ELSEWHERE))
    assert remember(others, host.memory, host.plan).unanswered == host.memory.unanswered
    (made,) = diff(host.plan, evolve(host.observed, peers={}), host.memory, TARGET)
    assert remember(host.plan, host.memory, made=[made], observed=host.observed).unanswered == {}
    assert remember(plan(), host.memory, observed=host.observed).unanswered == {}


def test_a_private_endpoint_that_changes_behind_a_nat_has_its_turn_once_the_peer_does_not_answer() -> None:
    host = moved("192.168.0.2:51820")
    host.plan = with_endpoint("192.168.0.77:51820")
    assert host.turns(3600, sent=0) == []
    assert host.turns(240) == [(60.0, "192.168.0.77:51820"), (240.0, LEARNT)]
