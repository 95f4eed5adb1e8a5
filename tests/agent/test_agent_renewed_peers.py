"""Peers that have begun anew, or do not answer, and a clock that goes back: the decisions, and an agent that follows
them on an etcd and a kernel in memory, in virtual time."""

from __future__ import annotations

import base64
import json
from ipaddress import ip_address, ip_interface, ip_network

import pytest
import trio
from agent_world import World, running
from attrs import evolve

from helpers import eventually, put_kept
from kilo_etcd.agent import apply
from kilo_etcd.agent.nat.renewed_peers import OVERDUE_SECONDS, QUIET_SECONDS, RenewedPeers
from kilo_etcd.kernel.state import HostAddress, ObservedPeer, PeerActivity, SetPeer
from kilo_etcd.model import SESSION_SECONDS, Endpoint, Node, Peer, Snapshot
from kilo_etcd.model.hostplan import HostPlan, PeerPlan
from kilo_etcd.model.node import LATEST_CLOCK_EPOCH
from kilo_etcd.planning.handshake_order import MOST_TRIGGERED, STAGES
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.runtime.set_back import FIRST_PAUSE, SetBack
from kilo_etcd.runtime.unanswered_peers import LASTING, PATIENCE, PeerAccounts, UnansweredPeers
from kilo_etcd.store.records import NodeRecord, encode

KEY, PHONE = (base64.b64encode(bytes([number]) * 32).decode() for number in (77, 78))
FIRST, LAST = "+" * 42 + "8=", "z" * 42 + "w="
"""Public keys before and after every other: a host leaves the handshake to the first, and begins with the last."""
NOW = 1_000_000.0


def snapshot(epoch: int | None, *, clock: int | None = None) -> Snapshot:
    node = Node(
        name="b", public_key=KEY, mesh_addresses=(ip_address("10.4.0.2"),), handshake_epoch=epoch,
        clock_epoch=clock, endpoint=Endpoint.parse("203.0.113.2:51820"),
    )  # fmt: skip
    return Snapshot(revision=1, nodes={"b": node}, subnets=(ip_network("10.4.0.0/16"),))


def plan(*keys: str) -> HostPlan:
    names = {KEY: "b", PHONE: "phone"}
    peers = {
        key: PeerPlan(public_key=key, name=names[key], allowed_ips=(ip_network(f"10.4.0.{number}/32"),))
        for number, key in enumerate(keys, 2)
    }
    return HostPlan(node="a", listen_port=51820, peers=peers)


def activity(now: float, *, silence: float, received: int = 1000, sent: int = 1000, key: str = KEY) -> PeerActivity:
    peer = ObservedPeer(
        public_key=key, last_handshake=NOW + now - silence, rx_bytes=received, tx_bytes=sent,
        endpoint=Endpoint.parse("203.0.113.2:51820"),
    )  # fmt: skip
    return PeerActivity(time=NOW + now, peers={key: peer})


def renewed(*, clock: bool = False) -> RenewedPeers:
    """At 0 a node has begun anew; `clock`: its clock went back."""
    peers = RenewedPeers()
    peers.follow(snapshot(None), plan(KEY), now=-100.0)
    peers.follow(snapshot(None, clock=5) if clock else snapshot(1), plan(KEY), now=0.0)
    return peers


def test_a_peer_that_has_begun_anew_and_is_not_heard_is_made_anew_once() -> None:
    peers = renewed()
    assert peers.look(activity(0.1, silence=30), now=0.1) == frozenset()
    assert peers.due(0.1) == 0.1 + QUIET_SECONDS
    assert peers.look(activity(1.5, silence=31), now=1.5) == {KEY}
    assert peers.look(activity(3.0, silence=33), now=3.0) == frozenset()
    peers.follow(snapshot(1), plan(KEY), now=4.0)
    assert peers.look(activity(500.0, silence=530), now=500.0) == frozenset()


def test_a_session_that_works_stays_until_it_should_have_been_renewed() -> None:
    peers = renewed()
    assert peers.look(activity(0.1, silence=30), now=0.1) == frozenset()
    late = OVERDUE_SECONDS - 30
    for second in range(2, 100, 10):
        assert peers.look(activity(second, silence=30 + second, received=1000 + second), now=second) == frozenset()
        assert peers.due(second) == late
    assert peers.look(activity(late, silence=OVERDUE_SECONDS, received=2000), now=late) == {KEY}


def test_a_handshake_since_the_news_is_a_session_that_works() -> None:
    peers = renewed()
    assert peers.look(activity(0.1, silence=0.05), now=0.1) == frozenset()
    assert peers.look(activity(1.5, silence=1.4), now=1.5) == frozenset()
    # The other end may have answered this host's handshake: its own would be dropped still.
    assert peers.look(activity(200.0, silence=199.9), now=200.0) == {KEY}


def test_a_handshake_just_before_the_news_is_a_session_that_works() -> None:
    peers = renewed()
    # The record came by etcd, and the handshake did not have to wait for it.
    assert peers.look(activity(0.1, silence=0.6), now=0.1) == frozenset()
    assert peers.look(activity(1.5, silence=2.0), now=1.5) == frozenset()
    peers = renewed()
    assert peers.look(activity(0.1, silence=1.6), now=0.1) == frozenset()
    assert peers.look(activity(1.5, silence=3.0), now=1.5) == {KEY}


def test_a_session_of_a_host_whose_clock_went_back_stays_until_it_is_overdue_even_if_nobody_uses_it() -> None:
    peers = renewed(clock=True)
    for second in (0.1, 1.5, 60.0, OVERDUE_SECONDS - 31):
        assert peers.look(activity(second, silence=30 + second), now=second) == frozenset()
    late = OVERDUE_SECONDS - 30
    assert peers.due(60.0) == late
    assert peers.look(activity(late, silence=OVERDUE_SECONDS), now=late) == {KEY}
    # If it boots meanwhile, the session is lost.
    peers = renewed(clock=True)
    peers.look(activity(0.1, silence=30), now=0.1)
    peers.follow(snapshot(1, clock=5), plan(KEY), now=2.0)
    peers.follow(snapshot(1, clock=6), plan(KEY), now=2.1)
    assert peers.look(activity(2.2, silence=32), now=2.2) == frozenset()
    assert peers.look(activity(3.5, silence=33), now=3.5) == {KEY}


def test_a_session_since_a_boot_is_not_taken_for_lost_when_the_clock_goes_back_later() -> None:
    peers = renewed()
    peers.look(activity(0.1, silence=30), now=0.1)
    assert peers.look(activity(1.5, silence=0.5), now=1.5) == frozenset(), "it has booted, and has begun a session"
    peers.follow(snapshot(1, clock=5), plan(KEY), now=20.0)
    for second in (20.1, 21.5, 60.0):
        assert peers.look(activity(second, silence=second - 1), now=second) == frozenset(), (
            "nobody uses it, and it works"
        )
    late = OVERDUE_SECONDS + 1
    assert peers.look(activity(late, silence=OVERDUE_SECONDS), now=late) == {KEY}


def test_nobody_looks_often_for_a_peer_that_the_device_does_not_have() -> None:
    peers = renewed()
    assert peers.look(PeerActivity(time=NOW), now=0.1) == frozenset()
    assert peers.due(0.1) == float("inf")


def test_an_etcd_that_was_restored_makes_nothing_anew() -> None:
    peers = RenewedPeers()
    peers.follow(snapshot(5, clock=9), plan(KEY), now=0.0)
    for number, former in enumerate((snapshot(3, clock=9), snapshot(3, clock=2), snapshot(None)), 1):
        peers.follow(former, plan(KEY), now=float(number))
        assert peers.due(float(number)) == float("inf")
    peers.follow(snapshot(1), plan(KEY), now=9.0)
    assert peers.look(activity(9.0, silence=30), now=9.0) == frozenset()
    assert peers.look(activity(11.0, silence=32), now=11.0) == {KEY}


def test_a_clock_epoch_that_falls_and_rises_again_is_no_news() -> None:
    peers = RenewedPeers()
    for number, clock in enumerate((5, 4, 5)):
        peers.follow(snapshot(3, clock=clock), plan(KEY), now=float(number))
    for now in (3.0, 5.0):
        assert peers.look(activity(now, silence=OVERDUE_SECONDS), now=now) == frozenset()


def test_a_record_without_a_lease_that_somebody_puts_anew_is_no_news_of_the_peer() -> None:
    def world(revision: int) -> Snapshot:
        peer = Peer(name="phone", public_key=PHONE, registered_revision=revision)
        return evolve(snapshot(None), peers={"phone": peer})

    peers = RenewedPeers()
    peers.follow(world(7), plan(PHONE), now=0.0)
    peers.follow(world(9), plan(PHONE), now=1.0)
    assert peers.due(1.0) == float("inf")


def test_a_laptop_whose_record_is_another_one_is_made_anew() -> None:
    def world(revision: int) -> Snapshot:
        peer = Peer(name="phone", public_key=PHONE, registered_revision=revision, leased=True)
        return evolve(snapshot(None), peers={"phone": peer})

    peers = RenewedPeers()
    peers.follow(world(7), plan(PHONE), now=0.0)
    peers.follow(world(7), plan(PHONE), now=1.0)
    assert peers.due(1.0) == float("inf")
    peers.follow(world(9), plan(PHONE), now=2.0)
    assert peers.look(activity(2.0, silence=20, key=PHONE), now=2.0) == frozenset()
    assert peers.look(activity(4.0, silence=22, key=PHONE), now=4.0) == {PHONE}


def test_an_agent_that_starts_makes_a_peer_anew_whose_clock_has_not_caught_up_when_its_session_has_ended() -> None:
    """The other end may have begun the session that there is, so that it does not show that this host's WireGuard takes
    the peer's own handshakes."""

    def started(clock: float) -> RenewedPeers:
        peers = RenewedPeers()
        peers.follow(snapshot(3, clock=int(clock)), plan(KEY), now=0.0)
        peers.follow(snapshot(3, clock=int(clock)), plan(KEY), now=0.5)
        return peers

    ahead = started(NOW + 86400)
    assert ahead.look(activity(1.0, silence=20), now=1.0) == frozenset()
    assert ahead.look(activity(3.0, silence=22), now=3.0) == frozenset(), "it works"
    assert ahead.due(3.0) == 3.0 + OVERDUE_SECONDS - 22
    late = 3.0 + OVERDUE_SECONDS - 22
    assert ahead.look(activity(late, silence=OVERDUE_SECONDS), now=late) == {KEY}
    assert ahead.look(activity(late + 300, silence=300), now=late + 300) == frozenset(), "once"
    # It catches up before the session ends, or has long since.
    for clock in (NOW + 100, NOW - 5):
        caught_up = started(clock)
        for now in (1.0, 3.0, late):
            assert caught_up.look(activity(now, silence=19 + now), now=now) == frozenset()
        assert caught_up.due(late) == float("inf")
    # Nor is one made anew that is new.
    ahead = started(NOW + 86400)
    for now in (1.0, 3.0):
        new = PeerActivity(time=NOW + now, peers={KEY: ObservedPeer(public_key=KEY)})
        assert ahead.look(new, now=now) == frozenset()


def test_what_is_no_news_makes_nothing_anew() -> None:
    peers = RenewedPeers()
    peers.follow(snapshot(3), plan(KEY), now=0.0)
    peers.follow(snapshot(3), plan(KEY), now=1.0)
    assert peers.look(activity(500.0, silence=1000), now=500.0) == frozenset(), "an agent that starts knows no former"
    peers.follow(snapshot(4), plan(), now=501.0)
    peers.follow(snapshot(4), plan(KEY), now=502.0)
    assert peers.look(activity(600.0, silence=1000), now=600.0) == frozenset(), "a peer that was away is new anyway"


def test_a_peer_that_is_sent_to_and_does_not_answer_is_named_until_it_does() -> None:
    accounts, world, sends = PeerAccounts(), snapshot(None), plan(KEY)

    def look(now: float, sent: int = 1000, received: int = 1000) -> UnansweredPeers:
        return accounts.look(world, sends, activity(now, silence=1000, sent=sent, received=received))

    assert look(0) == UnansweredPeers()
    assert look(5, sent=1148) == UnansweredPeers(waiting=True)
    assert look(15, sent=1296).nodes == ()
    assert look(5 + PATIENCE, sent=1444).nodes == ("b",)
    # Nobody sends any more: that is no answer.
    assert look(100, sent=1444).nodes == ("b",)
    assert look(5 + PATIENCE + LASTING, sent=1444).nodes == ()
    assert look(400, sent=1592) == UnansweredPeers(waiting=True)
    assert look(415, sent=1740).nodes == ("b",)
    assert look(430, sent=1740, received=1092) == UnansweredPeers()
    # One packet, such as the keepalive that ends an exchange, is not answered.
    assert look(435, sent=1772, received=1092) == UnansweredPeers(waiting=True)
    assert look(465, sent=1772, received=1092) == UnansweredPeers(waiting=True)
    assert look(475, sent=1772, received=1092) == UnansweredPeers()


def test_a_peer_that_nothing_is_sent_to_or_that_answers_is_not_named() -> None:
    accounts, world, sends = PeerAccounts(), snapshot(None), plan(KEY)
    for second in range(0, 200, 5):
        assert accounts.look(world, sends, activity(second, silence=1000)).nodes == ()
    for second in range(200, 400, 5):
        read = activity(second, silence=1000, sent=1000 + second, received=1000 + second)
        assert accounts.look(world, sends, read) == UnansweredPeers()
    # This host alone has keepalive, and nobody answers that. Only the handshake is.
    for second in range(400, 1000, 5):
        sent, received = second // 25 * 32, second // 120 * 92
        read = activity(second, silence=second % 120, sent=1400 + sent, received=1400 + received)
        assert accounts.look(world, sends, read) == UnansweredPeers()


def test_laptops_and_phones_are_named_apart() -> None:
    accounts = PeerAccounts()
    for second in range(0, 60, 5):
        found = accounts.look(
            snapshot(None), plan(PHONE), activity(second, silence=1000, sent=1000 + second, key=PHONE)
        )
    assert (found.nodes, found.peers) == ((), ("phone",))


def gone_back(seconds: float, *, was_at: float, now: float, seen: bool = True) -> PeerActivity:
    return PeerActivity(time=now, set_back=seconds, was_at=was_at, seen=seen)


def nobody(*names: str) -> UnansweredPeers:
    """Nodes that do not answer."""
    return UnansweredPeers(names)


def test_a_clock_that_went_back_is_told_of_as_long_as_it_matters() -> None:
    clock, day = SetBack(), 86400.0
    assert clock.sentence(unanswered=nobody("b"), now=5.0) is None
    clock.note(gone_back(day, was_at=NOW, now=10.0), unanswered=nobody("off"), now=10.0)
    assert "clock went back by 24 h" in (clock.sentence(unanswered=nobody(), now=11.0) or "")
    later = 11.0 + SESSION_SECONDS
    assert clock.sentence(unanswered=nobody(), now=later) is None
    assert clock.sentence(unanswered=nobody("off"), now=later) is None, "it did not answer before either"
    assert clock.sentence(unanswered=nobody("b", "off"), now=2 * later) is not None, "it comes again"
    assert clock.sentence(unanswered=nobody("b"), now=10.0 + day) is None, "it has caught up"
    clock.note(gone_back(86399.99, was_at=NOW, now=10.0), now=10.0)
    assert "by 24 h" in (clock.sentence(unanswered=nobody(), now=11.0) or "")
    clock.note(gone_back(130.0, was_at=NOW, now=100_000.0), now=100_000.0)
    assert clock.sentence(unanswered=nobody("b"), now=100_131.0) is None
    clock.note(gone_back(1000 * day, was_at=NOW, now=0.0), now=0.0)
    assert clock.sentence(unanswered=nobody("b"), now=30 * day) is None, "by then it is something else"


def test_a_clock_that_has_caught_up_while_the_host_slept_is_of_no_interest() -> None:
    clock = SetBack()
    assert clock.read(gone_back(3600.0, was_at=NOW + 3600, now=NOW), now=10.0)
    assert clock.epoch(None, now=10.0) is not None
    assert clock.matters(now=20.0)
    # The monotonic clock stands still in sleep.
    assert not clock.read(gone_back(0.0, was_at=NOW + 18000, now=NOW + 18000), now=20.0)
    assert clock.sentence(now=20.0) is None
    assert not clock.matters(now=20.0)


def test_an_epoch_is_told_once_and_never_again_for_the_same_jump() -> None:
    clock = SetBack()
    assert clock.epoch(None, now=0.0) is None
    assert not clock.matters(now=0.0)
    clock.note(gone_back(3600.0, was_at=NOW + 0.4, now=1.0), now=1.0)
    assert clock.epoch(None, now=1.0) == NOW
    assert clock.epoch(int(NOW), now=2.0) is None
    assert clock.matters(now=2.0)
    assert not clock.matters(now=3601.0)
    # The agent starts again, and reads the same handshake of the future.
    clock = SetBack()
    clock.note(gone_back(1800.0, was_at=NOW + 0.6, now=1.0, seen=False), now=1.0)
    assert clock.epoch(int(NOW), now=1.0) is None


def test_an_epoch_is_a_date_that_others_take_however_far_ahead_the_clock_was() -> None:
    clock = SetBack()
    clock.note(gone_back(1e12, was_at=1e12, now=1.0), now=1.0)
    assert clock.epoch(None, now=1.0) == LATEST_CLOCK_EPOCH
    clock = SetBack()
    clock.note(gone_back(1e12, was_at=1e12, now=1.0, seen=False), now=1.0)
    assert clock.epoch(LATEST_CLOCK_EPOCH, now=1.0) is None, "that is told"


def test_a_jump_that_is_seen_is_told_although_the_clock_was_further_ahead_before_another_one() -> None:
    year = 365 * 86400
    clock = SetBack()
    clock.note(gone_back(3600.0, was_at=NOW, now=1.0), now=1.0)
    assert clock.epoch(int(NOW) + year, now=1.0) == NOW + year + 1
    # That of before, in a record that was told of it: what is seen is one more.
    clock = SetBack()
    clock.note(gone_back(3600.0, was_at=NOW, now=1.0, seen=False), now=1.0)
    clock.note(gone_back(7200.0, was_at=NOW, now=2.0), now=2.0)
    assert clock.epoch(int(NOW), now=2.0) == NOW + 1


def test_a_node_that_has_begun_a_session_since_and_does_not_answer_is_named_with_the_clock() -> None:
    """Its handshake does not show that it takes this host's."""
    clock, accounts = SetBack(), PeerAccounts()
    clock.note(gone_back(86400.0, was_at=NOW + 86400, now=NOW), now=0.0)
    for now in range(40, 300, 5):
        read = activity(now, silence=now - 40, sent=1000 + now, received=1148)
        unanswered = accounts.look(snapshot(None), plan(KEY), read)
    assert unanswered.nodes == ("b",)
    assert "clock went back by 24 h" in (clock.sentence(unanswered=unanswered, now=300.0) or "")


def test_the_sentence_says_when_the_others_make_the_host_anew() -> None:
    clock = SetBack()
    for at in (0.0, 60.0):
        clock.note(gone_back(86400.0, was_at=NOW + at, now=at), now=at)
        clock.epoch(None, now=at)
        said = clock.sentence(now=at) or ""
        assert ("within 3 min" in said) == (at == 0)
        assert ("not before 10 min after the last time" in said) == (at == 60)


def test_a_step_is_noted_once_and_only_if_it_matters() -> None:
    clock = SetBack()
    found = [clock.read(gone_back(by, was_at=NOW, now=0.0), now=0.0) for by in (0, 100, 119, 121, 130, 20, 139, 141)]
    assert found == [False, False, False, True, False, False, False, True]


def test_a_clock_that_goes_to_and_fro_makes_ever_fewer_epochs() -> None:
    clock, epochs = SetBack(), list[float]()
    for second in range(0, 86400, 30):
        clock.note(gone_back(150.0, was_at=NOW + second, now=second), now=second)
        if clock.epoch(None, now=second) is not None:
            epochs.append(second)
    assert epochs[:4] == [0, FIRST_PAUSE, 3 * FIRST_PAUSE, 7 * FIRST_PAUSE]
    assert len(epochs) <= 9
    # What waits is told in the end, unless the clock has caught up.
    clock = SetBack()
    for seconds, late in ((3600.0, NOW + 5), (130.0, None)):
        clock = SetBack()
        clock.note(gone_back(3600.0, was_at=NOW, now=0.0), now=0.0)
        assert clock.epoch(None, now=0.0) == NOW
        clock.note(gone_back(seconds, was_at=NOW + 5, now=5.0), now=5.0)
        assert clock.epoch(None, now=5.0) is None
        assert clock.epoch(None, now=FIRST_PAUSE) == late


# --- an agent ------------------------------------------------------------------------------------------------------


def other(world: World, epoch: int | None = None, *, clock: int | None = None, key: str = KEY) -> None:
    """A public node elsewhere, and this host is one too."""
    world.facts = HostFacts(
        hostname="h1",
        addresses=(HostAddress(interface="eth0", index=2, address=ip_interface("203.0.113.1/24")),),
    )
    record = NodeRecord(
        public_key=key, endpoint=Endpoint.parse("203.0.113.2:51820"), location="b", handshake_epoch=epoch,
        clock_epoch=clock,
    )  # fmt: skip
    world.etcd.put("/kilo/by/b/addresses/10.4.9.2", "")
    world.etcd.put("/kilo/by/b/node", encode(record))


def resets(world: World) -> int:
    return sum(isinstance(change, SetPeer) and change.reset for change in world.host.history)


def own(world: World, kind: str = "kilo/by/h1/node") -> dict[str, object]:
    found: dict[str, object] = json.loads(world.etcd.get(f"/{kind}") or b"{}")
    return found


STATUS = "kilo-status/by/h1/status"


@pytest.mark.autojump
@pytest.mark.parametrize("key", [FIRST, LAST])
async def test_an_agent_makes_a_peer_anew_that_has_begun_anew(
    world: World, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other(world, key=key)
    async with running(world):
        await eventually(lambda: key in world.host.observed.peers, 10, every=0.1)
        world.host.receive_from(key)
        await trio.sleep(60)
        before = resets(world)
        triggered: list[object] = []
        monkeypatch.setattr(apply, "trigger_handshakes", lambda addresses: triggered.extend(addresses))
        other(world, epoch=1, key=key)
        await eventually(lambda: resets(world) == before + 1, 4, every=0.01)
        # If the other end has made this host anew too, one of the two begins.
        assert triggered == ([ip_address("10.4.9.2")] if key == LAST else [])
        world.host.receive_from(key)
        await trio.sleep(300)
        assert resets(world) == before + 1
        assert len(triggered) == 1, "the host that waited sends a packet through the session, to see that it works"
        assert world.logged("another program changed") == 0


@pytest.mark.autojump
async def test_each_of_many_peers_that_have_begun_anew_at_once_is_begun_with(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = MOST_TRIGGERED + 44
    keys = [base64.b64encode(bytes([60 + number // 250, number % 250]) * 16).decode() for number in range(many)]

    def put(epoch: int | None) -> None:
        for number, key in enumerate(keys):
            host = f"{number // 250}.{number % 250 + 1}"
            record = NodeRecord(
                public_key=key, endpoint=Endpoint.parse(f"203.1.{host}:51820"), location=f"l{number}",
                handshake_epoch=epoch,
            )  # fmt: skip
            world.etcd.put(f"/kilo/by/n{number}/addresses/10.4.2{host}", "")
            world.etcd.put(f"/kilo/by/n{number}/node", encode(record))

    other(world)
    put(None)
    async with running(world):
        await eventually(lambda: set(keys) <= world.host.observed.peers.keys(), 30, every=0.1)
        for key in keys:
            world.host.receive_from(key)
        await trio.sleep(60)
        triggered: list[list[object]] = []
        monkeypatch.setattr(apply, "trigger_handshakes", lambda addresses: triggered.append(list(addresses)))
        put(1)
        await trio.sleep(20)
        made_anew = {change.public_key for change in world.host.history if isinstance(change, SetPeer) and change.reset}
        assert made_anew == set(keys)
        assert len({address for addresses in triggered for address in addresses}) == many
        assert max(map(len, triggered)) <= MOST_TRIGGERED


@pytest.mark.autojump
async def test_a_peer_that_was_made_anew_and_does_not_begin_is_begun_with_a_moment_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    other(world, key=FIRST)
    async with running(world):
        await eventually(lambda: FIRST in world.host.observed.peers, 10, every=0.1)
        world.host.receive_from(FIRST)
        await trio.sleep(60)
        before = resets(world)
        triggered: list[float] = []
        monkeypatch.setattr(
            apply, "trigger_handshakes", lambda addresses: triggered.extend(trio.current_time() for _ in addresses)
        )
        other(world, epoch=1, key=FIRST)
        await eventually(lambda: resets(world) == before + 1, 4, every=0.01)
        made = trio.current_time()
        await eventually(lambda: triggered, 1, every=0.01)
        assert made + STAGES[0] - 0.02 <= triggered[0] <= made + STAGES[0] + 0.02
        assert world.host.observed.peers[FIRST].endpoint == Endpoint.parse("203.0.113.2:51820")


@pytest.mark.autojump
async def test_an_agent_whose_clock_goes_back_has_others_forget_it_and_says_so(world: World) -> None:
    other(world)
    off = 0.0
    world.host.clock = lambda: trio.current_time() + off
    async with running(world):
        await eventually(lambda: KEY in world.host.observed.peers, 10, every=0.1)
        await eventually(lambda: own(world), 5, every=0.1)
        off = 86400.0
        await trio.sleep(60)
        assert "clockEpoch" not in own(world), "forward is no harm"
        chosen = world.logged("address chosen")
        off, date = 0.0, trio.current_time() + off
        await eventually(lambda: "clockEpoch" in own(world), 30, every=0.1)
        epoch = own(world)["clockEpoch"]
        assert isinstance(epoch, int)
        assert date <= epoch <= date + 60
        assert "handshakeEpoch" not in own(world), "its sessions go on"
        await eventually(lambda: "clock went back by 24 h" in str(own(world, STATUS).get("errors")), 10, every=0.1)
        await trio.sleep(600)
        assert "errors" not in own(world, STATUS)
        assert own(world).get("clockEpoch") == epoch
        assert world.logged("address chosen") == chosen, "nothing of its addresses is new"
        assert world.logged("clock went back") == 2, "that it does, and that it matters no longer"


@pytest.mark.autojump
async def test_a_host_that_boots_has_others_forget_it_and_one_whose_agent_restarts_has_not(world: World) -> None:
    async with running(world):
        await eventually(lambda: own(world), 5, every=0.1)
        assert "handshakeEpoch" not in own(world), "nobody knows a new host"
    async with running(world):
        await eventually(lambda: own(world, STATUS), 5, every=0.1)
        assert "handshakeEpoch" not in own(world)
    for boot in (1, 2):
        world.host.observed = evolve(world.host.observed, link=None, peers={}, public_key="")
        async with running(world):
            await eventually(lambda: own(world).get("handshakeEpoch") == boot, 5, every=0.1)  # noqa: B023


@pytest.mark.autojump
async def test_nobody_looks_at_a_clock_that_has_caught_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    other(world)
    off = 150.0
    world.host.clock = lambda: trio.current_time() + off
    async with running(world):
        await eventually(lambda: KEY in world.host.observed.peers, 10, every=0.1)
        await trio.sleep(30)
        off = 0.0
        await eventually(lambda: "clockEpoch" in own(world), 30, every=0.1)
        await trio.sleep(200)
        monkeypatch.setattr(SetBack, "sentence", None)
        await trio.sleep(100)


@pytest.mark.autojump
async def test_a_small_step_of_the_clock_is_nothing_to_anybody(world: World) -> None:
    other(world)
    off = 0.0
    world.host.clock = lambda: trio.current_time() + off
    async with running(world):
        await eventually(lambda: KEY in world.host.observed.peers, 10, every=0.1)
        await trio.sleep(30)
        for back in range(5):
            off = -20.0 * back
            await trio.sleep(60)
        assert "clockEpoch" not in own(world)
        assert "errors" not in own(world, STATUS)


@pytest.mark.autojump
async def test_an_agent_that_starts_again_has_told_of_a_handshake_of_the_future(world: World) -> None:
    other(world)
    async with running(world):
        await eventually(lambda: KEY in world.host.observed.peers, 10, every=0.1)
        await trio.sleep(3)
    world.host.receive_from(KEY, when=world.host.clock() + 86400)
    epochs = []
    for _ in range(3):
        async with running(world):
            await trio.sleep(40)
            epochs.append((own(world).get("clockEpoch"), world.etcd.data[b"/kilo/by/h1/node"].mod_revision))
    assert epochs[0][0] is not None
    assert len(set(epochs)) == 1, "the record is written once"
    assert "handshakeEpoch" not in own(world)


@pytest.mark.autojump
async def test_a_device_of_somebody_else_is_no_boot(world: World) -> None:
    async with running(world):
        await eventually(lambda: own(world), 5, every=0.1)
    world.host.observed = evolve(world.host.observed, ours=False, peers={})
    async with running(world, joined=False):
        await trio.sleep(30)
        assert "handshakeEpoch" not in own(world)


@pytest.mark.autojump
@pytest.mark.parametrize("key", [KEY, PHONE])
async def test_a_peer_behind_nat_that_is_made_anew_keeps_the_endpoint_where_it_was_heard(
    world: World, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    triggered: list[object] = []
    other(world)

    def behind_nat(epoch: int | None) -> None:
        record = NodeRecord(
            public_key=KEY, location="b", handshake_epoch=epoch, persistent_keepalive=25,
            internal_ips=(ip_interface("192.168.5.2/24"),), endpoint=Endpoint.parse("192.168.5.2:51820"),
        )  # fmt: skip
        world.etcd.put("/kilo/by/b/node", encode(record))

    client = world.etcd.client()
    phone = json.dumps({"publicKey": PHONE, "allowedIPs": ["10.5.0.7/32"]}).encode()
    behind_nat(None)
    await put_kept(client, "/kilo/peers/phone", phone)
    async with running(world):
        await eventually(lambda: key in world.host.observed.peers, 10, every=0.1)
        heard = Endpoint.parse("198.51.100.9:40000")
        world.host.receive_from(key, endpoint=heard)
        await trio.sleep(60)
        before = resets(world)
        monkeypatch.setattr(apply, "trigger_handshakes", lambda addresses: triggered.extend(addresses))
        if key == KEY:
            behind_nat(1)
        else:
            world.etcd.delete("/kilo/peers/phone")
            await put_kept(client, "/kilo/peers/phone", phone)
        await trio.sleep(8)
        assert world.host.observed.peers[key].endpoint == heard
        if key == KEY:
            assert resets(world) == before + 1
            assert triggered == [ip_address("10.4.9.2")], "it may have nothing to send"


@pytest.mark.autojump
async def test_a_node_that_does_not_answer_is_in_status_metrics_and_log(world: World) -> None:
    other(world)

    def silent() -> float | None:
        return world.metrics.registry.get_sample_value("kilo_unanswered_peers", {"kind": "node"})

    async with running(world):
        await eventually(lambda: KEY in world.host.observed.peers, 10, every=0.1)
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                while True:
                    world.host.send_to(KEY)
                    await trio.sleep(5)

            nursery.start_soon(send)
            await eventually(lambda: own(world, STATUS).get("unanswered") == ["b"], 60, every=0.1)
            assert silent() == 1
            assert world.logged("node b does not answer, although WireGuard sends to it") == 1
            world.host.receive_from(KEY)
            await eventually(lambda: "unanswered" not in own(world, STATUS), 15, every=0.1)
            assert silent() == 0
            nursery.cancel_scope.cancel()


@pytest.mark.autojump
async def test_a_phone_that_does_not_answer_is_in_the_log_without_a_warning(world: World) -> None:
    other(world)
    world.etcd.put("/kilo/peers/phone", json.dumps({"publicKey": PHONE, "allowedIPs": ["10.5.0.7/32"]}))
    async with running(world):
        await eventually(lambda: PHONE in world.host.observed.peers, 10, every=0.1)
        for _ in range(12):
            world.host.send_to(PHONE)
            await trio.sleep(5)
        assert own(world, STATUS).get("unansweredPeers") == ["phone"]
        (line,) = [line for line in world.log.getvalue().splitlines() if "peer phone does not answer" in line]
        assert "warning" not in line.lower()
        assert "info" in line.lower()
