"""Whether members of a location answer at their internal IPs: what is remembered, and a whole agent that asks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
import trio
from agent_world import PRIVATE, World, running
from attrs import evolve
from simulation import KEYS, Shape, in_memory, seeded
from simulation import World as Simulated
from simulation.host import SimulatedAgent

from helpers import eventually, scaled
from kilo_etcd.agent.leader_hints.admission import stamp
from kilo_etcd.agent.leader_hints.hints import PeerMessage, digest, sender_of, unpack
from kilo_etcd.agent.probing.reachability import (
    AGAIN,
    AT_ONCE,
    LONGEST,
    LONGEST_OF_MANY,
    NAMED_AFTER,
    PER_TARGET,
    RARELY,
    SPACING,
    MemberAnswer,
    Reachability,
    Records,
)
from kilo_etcd.kernel.routing.rules import ForeignRule
from kilo_etcd.kernel.state import Observed, Setup
from kilo_etcd.model import CandidateClass, Encapsulate, Endpoint, IPAddress, Node, Snapshot
from kilo_etcd.model.hostplan import HostPlan, RoutePlan, Via
from kilo_etcd.planning.reach import MemberAddress, Silent
from kilo_etcd.runtime import key_file
from kilo_etcd.store.records import CandidateRecord, NodeRecord, Unreachable, decode_status, encode
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel
from kilo_etcd.topology.segments import build_topology

# -- the record of answers --------------------------------------------------------------------------------------------


def node(name: str, address: str, **rest: Any) -> Node:
    return Node(name=name, public_key=f"key-{name}", internal_ips=(ip_interface(f"{address}/24"),), **rest)


OWN = node("h", "10.0.0.1")
A, B = node("a", "10.0.0.2"), node("b", "10.0.0.3")
TA, TB = MemberAddress("a", ip_address("10.0.0.2")), MemberAddress("b", ip_address("10.0.0.3"))
BOTH = {TA: A, TB: B}
ALL = ("a", "b")


def records() -> Records:
    return Records(random.Random(1))


def withheld(one: Records) -> set[str]:
    return {silent.target.node for silent in one.silent_ones(ALL) if silent.withheld}


def named(one: Records, living: tuple[str, ...] = ALL) -> set[str]:
    return {silent.target.node for silent in one.silent_ones(living) if silent.named}


def test_nobody_counts_before_the_first_answer_and_everybody_after_it() -> None:
    known = records()
    assert known.follow(OWN, BOTH, 0.0, first="b")
    assert withheld(known) == {"a", "b"}
    assert named(known) == set(), "nobody was asked yet"
    assert known.due(0.0) == [TB], "the leader is asked at once"
    assert set(known.due(2 * SPACING)) == {TA, TB}
    assert known.answered(TA, MemberAnswer.SIGNED, 1.0)
    assert known.answered(TB, MemberAnswer.UNSIGNED, 1.0)
    assert withheld(known) == set()
    for _ in range(10 * NAMED_AFTER):
        known.silent(TA, 5.0)
    assert withheld(known) == set(), "who has answered once keeps its routes"
    assert known.silent_ones(ALL) == (Silent(target=TA, withheld=False, named=True),)
    assert named(known, ("b",)) == set(), "a host that is down is no news"
    assert known.answered(TA, MemberAnswer.UNSIGNED, 6.0), "and that it answers again is"
    assert named(known) == set()


def test_who_never_answers_is_named_after_some_attempts_and_asked_less_and_less_often() -> None:
    known = records()
    known.follow(OWN, {TA: A}, 0.0)
    now, news, pauses = 0.0, [], []
    for _ in range(20):
        news.append(known.silent(TA, now))
        pauses.append(known.next_due() - now)
        now = known.next_due()
    assert [index for index, one in enumerate(news, 1) if one] == [NAMED_AFTER]
    assert named(known) == {"a"}
    assert pauses[0] < 1.3 * AGAIN
    assert sum(pauses[: NAMED_AFTER - 1]) < 5.0
    assert 0.7 * LONGEST < max(pauses) < 1.3 * LONGEST
    many = {
        MemberAddress(f"n{i}", ip_address(f"10.1.{i // 250}.{i % 250 + 1}")): node(f"n{i}", "10.1.0.1")
        for i in range(2000)
    }
    known.follow(OWN, many, now)
    for _ in range(20):
        for target in many:
            known.silent(target, now)
    assert known.next_due() - now > 0.7 * LONGEST_OF_MANY


def test_a_changed_record_an_answer_due_and_a_question_are_reasons_to_ask_at_once() -> None:
    known = records()
    known.follow(OWN, BOTH, 0.0)
    for target in BOTH:
        known.silent(target, 100.0)
    assert known.due(100.0) == []
    assert not known.follow(OWN, dict(BOTH), 100.0), "nothing has changed"
    assert known.follow(OWN, {TA: evolve(A, port=1), TB: B}, 100.0)
    assert known.due(100.0) == [TA]
    assert known.heard_of(TB, 100.0)
    assert set(known.due(100.0)) == {TA, TB}
    known.silent(TB, 100.5)
    assert set(known.due(100.5)) == {TA, TB}, "it may have been started while it was being asked"
    known.silent(TB, 100.5)
    assert set(known.due(100.5)) == {TA}
    known.answered(TA, MemberAnswer.SIGNED, 100.0)
    assert not known.heard_of(TA, 101.0), "that it answers is known"
    assert not known.heard_of(MemberAddress("x", TA.address), 101.0)
    assert 100.5 < known.next_due() < 110.0, "the other is still asked"
    known.answered(TB, MemberAnswer.SIGNED, 100.0)
    assert known.next_due() > 100.0 + 0.7 * RARELY


def test_who_was_moved_or_has_another_key_or_address_begins_anew_and_so_does_all_if_this_host_was_moved() -> None:
    known = records()
    elsewhere = MemberAddress("a", ip_address("10.0.7.2"))
    for change in (
        {TA: evolve(A, public_key="another"), TB: B},
        {elsewhere: evolve(A, internal_ips=(ip_interface("10.0.7.2/24"),)), TB: B},
    ):
        known.follow(OWN, BOTH, 0.0)
        for target in BOTH:
            known.answered(target, MemberAnswer.SIGNED, 0.0)
        known.follow(OWN, change, 1.0)
        assert withheld(known) == {"a"}
    known.follow(OWN, {TB: B}, 2.0)  # a has another label for a while.
    known.follow(OWN, BOTH, 3.0)
    assert withheld(known) == {"a"}
    known.follow(evolve(OWN, location="x"), BOTH, 4.0)
    assert withheld(known) == {"a", "b"}


def test_a_route_that_is_there_counts_until_its_node_is_silent_although_it_lives() -> None:
    known = records()
    known.follow(OWN, BOTH, 0.0, assumed={TA, TB})
    assert withheld(known) == set()
    for target in BOTH:
        for _ in range(NAMED_AFTER):
            known.silent(target, 1.0)
    assert known.silent_ones(("b",)) == (Silent(target=TB, withheld=True, named=True),)
    known.answered(TB, MemberAnswer.UNSIGNED, 2.0)
    assert known.silent_ones(("b",)) == ()


def test_an_address_of_the_other_family_that_comes_to_this_host_makes_it_forget_nobody() -> None:
    known = records()
    sixth = MemberAddress("a", ip_address("fd00::2"))
    both = evolve(OWN, internal_ips=(*OWN.internal_ips, ip_interface("fd00::1/64")))
    nodes = {**BOTH, sixth: A}
    for own, targets, forgotten in (
        (OWN, BOTH, {"a", "b"}),
        (both, nodes, {"a"}),
        (evolve(both, internal_ips=(*OWN.internal_ips, ip_interface("fd00::9/64"))), nodes, {"a"}),
        (OWN, BOTH, set[str]()),
        (evolve(OWN, internal_ips=(ip_interface("10.0.0.9/24"),)), BOTH, {"a", "b"}),
    ):
        known.follow(own, targets, 0.0)
        assert withheld(known) == forgotten
        for target in targets:
            known.answered(target, MemberAnswer.SIGNED, 0.0)


def test_silence_from_before_a_members_agent_lived_means_nothing_and_it_is_asked_at_once() -> None:
    known = records()
    known.follow(OWN, BOTH, 0.0, assumed={TA})
    for target in BOTH:
        for _ in range(3 * NAMED_AFTER):
            known.silent(target, 100.0)
    assert known.due(110.0) == []
    assert known.live_again(("a", "b"), 110.0)
    assert set(known.due(110.0 + 2 * SPACING)) == {TA, TB}
    assert named(known) == set()
    assert withheld(known) == {"b"}, "the route that was there still counts"
    known.silent(TA, 111.0)
    assert TA in known.due(111.0), "the attempt that was under way may have come too early"
    known.silent(TA, 111.0)
    assert not known.live_again(("b",), 111.0) or known.due(111.0 + SPACING) == [TB]
    for target in BOTH:
        known.answered(target, MemberAnswer.UNSIGNED, 112.0)
    assert not known.live_again(ALL, 113.0), "who answers needs not be asked"


def test_a_large_location_is_asked_bit_by_bit_and_rarely() -> None:
    known = records()
    many = {
        MemberAddress(f"n{i}", ip_address(f"10.1.{i // 250}.{i % 250 + 1}")): node(f"n{i}", "10.1.0.1")
        for i in range(1000)
    }
    known.follow(OWN, many, 0.0)
    assert len(known.due(SPACING * 1000 / 10)) == AT_ONCE
    assert len([one for one in many if one in known.due(SPACING * 10)]) < 30, (
        "a newcomer does not hear from all at once"
    )
    for target in many:
        known.answered(target, MemberAnswer.SIGNED, 0.0)
    assert known.next_due() > 0.7 * PER_TARGET * 1000, "about an hour"


def test_an_answer_without_the_key_is_asked_for_again_and_said() -> None:
    known = records()
    known.follow(OWN, BOTH, 0.0)
    assert [known.answered(TA, MemberAnswer.UNSIGNED, 0.0) for _ in range(NAMED_AFTER)] == [True, False, False, True]
    assert known.unsigned() == (TA,)
    assert known.answered(TA, MemberAnswer.SIGNED, 1.0)
    assert known.unsigned() == ()
    assert not known.answered(TA, MemberAnswer.UNSIGNED, 2.0), "that changes nothing that is said or routed"


# -- a whole agent ----------------------------------------------------------------------------------------------------

G1 = key_file.generate()
INSIDE = ip_address("192.168.1.51")
MESH_G1 = ip_network("10.4.0.51/32")
NEVER = "has never answered h1 at its internal IP 192.168.1.51"


class Wire:
    """The post of h1, and g1 at its other end, as far as `answers` says."""

    def __init__(self) -> None:
        self.answers = True
        self.asked = self.told = 0
        self._in, self._out = trio.open_memory_channel[tuple[bytes, Any]](100)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    admit: Any = None
    """Set by whoever uses it."""

    async def send(self, data: bytes, address: Any) -> None:
        await trio.lowlevel.checkpoint()
        query = unpack(data, secret())
        self.told += query is not None and query.local and query.is_response
        if query is not None and query.local and not query.is_response and address == INSIDE:
            self.asked += 1
            if self.answers:
                self.bring(evolve(query, is_response=True, sender=digest(key_file.public_key(G1))))
                for _ in range(5):  # The answer is faster than the sender.
                    await trio.lowlevel.checkpoint()

    def serve(self, addresses: object) -> None:
        """All of them."""

    def bring(self, message: PeerMessage) -> None:
        data = message.pack(secret())
        if self.admit(data, INSIDE):
            self._in.send_nowait((data, INSIDE))

    async def receive(self) -> tuple[bytes, Any]:
        return await self._out.receive()


def secret() -> bytes:
    found = key_file.agreed(G1, key_file.public_key(PRIVATE))
    assert found is not None
    return found


@pytest.fixture
def mesh(world: World) -> World:
    """g1 is at gcp and leads it; h1 is going to be labelled gcp."""
    record = NodeRecord(
        public_key=key_file.public_key(G1),
        endpoint=Endpoint.parse("203.0.113.51:51820"),
        internal_ips=(ip_interface("192.168.1.51/24"),),
        location="gcp",
    )
    world.etcd.put("/kilo/by/g1/addresses/10.4.0.51", "")
    world.etcd.put("/kilo/by/g1/node", encode(record))
    world.etcd.put("/kilo/locations/h1", "gcp")
    world.etcd.put_kept("/kilo/by/g1/elections/gcp", encode(CandidateRecord(rank=CandidateClass.PUBLIC)))
    return world


def routed(world: World) -> bool:
    return MESH_G1 in world.host.observed.routes


def unreachable(world: World) -> list[Unreachable]:
    value = world.etcd.get("/kilo-status/by/h1/status")
    return [] if value is None else list(decode_status(value).unreachable)


def gauge(world: World) -> float | None:
    return world.metrics.registry.get_sample_value("kilo_unreachable_members")


pytestmark = pytest.mark.autojump


async def test_a_member_that_answers_is_routed_within_a_moment_and_asked_rarely(mesh: World) -> None:
    wire = Wire()
    async with running(mesh, transport=wire) as daemon:
        await eventually(lambda: routed(mesh), 20.5, every=0.01)
        await eventually(lambda: mesh.etcd.get("/kilo/by/h1/elections/gcp") is not None, 30, every=0.1)
        await trio.sleep(30)
        asked, revision, writes = wire.asked, mesh.etcd.revision, daemon.kernel.writes
        wire.answers = False
        mesh.etcd.delete("/kilo/by/g1/elections/gcp")  # It is down.
        seconds = scaled(7200)
        await trio.sleep(seconds)
        assert asked + 2 < wire.asked < asked + 20 + seconds / 40
        assert routed(mesh), "who is down later keeps its route"
        assert (mesh.logged(NEVER), mesh.logged("no longer answers"), gauge(mesh)) == (0, 0, 0.0)
        assert daemon.kernel.writes - writes <= 4, "h1 leads now, and that is all"
        assert mesh.etcd.revision - revision <= 6


async def test_a_member_that_answers_no_more_is_named_as_one_that_is_routed(mesh: World) -> None:
    wire = Wire()
    async with running(mesh, transport=wire):
        await eventually(lambda: routed(mesh), 20.5, every=0.01)
        wire.answers = False
        await eventually(lambda: unreachable(mesh) == [("g1", "192.168.1.51", True)], 7200, every=10)
        assert routed(mesh)


async def test_a_rule_of_another_program_is_named_and_not_the_locations_network(mesh: World) -> None:
    wire = Wire()
    async with running(mesh, transport=wire):
        await eventually(lambda: routed(mesh), 20.5, every=0.01)
        wire.answers = False
        own = mesh.host.taken
        there = ip_address("192.168.1.51")
        mesh.host.foreign_rules = (
            ForeignRule(version=4, priority=5, table=0, destination=ip_network("192.168.1.51/32"), refuses="blackhole"),
        )
        mesh.host.taken = lambda address, source: "Invalid argument" if address == there else own(address, source)
        told = (
            "g1, its leader, does not answer h1 at 192.168.1.51, to which the kernel of h1 takes another route than "
            "the agent's: none: Invalid argument, by ip -4 rule priority 5 from all to 192.168.1.51/32 blackhole"
        )
        await eventually(lambda: mesh.logged(told), 7200, every=10)
        assert mesh.logged("no longer answers") == 0
        # With the rule gone and the member silent, it is the network.
        mesh.host.taken, mesh.host.foreign_rules = own, ()
        await eventually(lambda: mesh.logged("no longer answers"), 7200, every=10)


async def test_a_member_that_never_answers_is_not_routed_and_is_named_until_it_answers(mesh: World) -> None:
    wire = Wire()
    wire.answers = False
    async with running(mesh, transport=wire) as daemon:
        await eventually(lambda: daemon.in_force().undecided == ("g1",), 2, every=0.1)
        await eventually(lambda: mesh.logged(NEVER), 12, every=0.1)
        assert not routed(mesh)
        assert ip_network("10.4.0.0/16") not in mesh.host.observed.routes
        assert {ip_network("10.4.0.0/16"), MESH_G1} <= mesh.host.observed.unreachable_routes
        await eventually(lambda: unreachable(mesh) == [("g1", "192.168.1.51", False)], 5, every=0.1)
        assert daemon.in_force().undecided == ()
        assert gauge(mesh) == 1.0
        assert daemon.state.plan is not None
        revision, writes = mesh.etcd.revision, daemon.kernel.writes
        asked = wire.asked
        seconds = scaled(3600, 600)
        await trio.sleep(seconds)
        assert mesh.logged(NEVER) == 1
        assert seconds / LONGEST - 5 < wire.asked - asked < seconds / LONGEST + 30
        assert (mesh.etcd.revision, daemon.kernel.writes) == (revision, writes), "nothing is written meanwhile"
        wire.answers = True
        # It has been started, say, and asks; else its next turn comes within about a minute.
        query = PeerMessage(
            is_response=False, nonce=b"12345678", sender=digest(key_file.public_key(G1)), revision=0, local=True
        )
        wire.bring(query)
        await eventually(lambda: routed(mesh), 2, every=0.01)
        assert MESH_G1 not in mesh.host.observed.unreachable_routes
        await eventually(lambda: unreachable(mesh) == [], 5, every=0.1)
        assert (mesh.logged("no longer: g1, its leader, has never answered"), gauge(mesh)) == (1, 0.0)


@pytest.mark.parametrize("by", ["echo", "link"])
async def test_a_network_that_filters_one_thing_loses_nothing(mesh: World, by: str) -> None:
    """Neither the query arrives nor, in the second case, an echo request: ARP is enough."""
    wire = Wire()
    wire.answers = False
    if by == "echo":
        mesh.host.reach = lambda address: address == INSIDE
    else:
        mesh.host.resolves = lambda address: address == INSIDE
    async with running(mesh, transport=wire):
        await eventually(lambda: routed(mesh), 2, every=0.01)
        await trio.sleep(60)
        assert mesh.logged(NEVER) == 0
        value = mesh.etcd.get("/kilo-status/by/h1/status")
        assert value is not None
        assert decode_status(value).unsigned == ("g1",), "something answers"


async def test_an_agent_that_may_not_ping_asks_all_the_same(mesh: World) -> None:
    mesh.host.no_pings = "this host may not ping"
    async with running(mesh, transport=Wire()):
        await eventually(lambda: routed(mesh), 20.5, every=0.01)


async def test_without_probes_all_is_as_the_records_say(mesh: World) -> None:
    async with running(mesh, transport=Wire(), probe=False):
        await eventually(lambda: routed(mesh), 20.5, every=0.01)
        await trio.sleep(60)
        assert routed(mesh)
        assert mesh.logged(NEVER) == 0


async def test_a_restarted_agent_keeps_a_route_as_long_as_nothing_speaks_against_it(mesh: World) -> None:
    wire = Wire()
    async with running(mesh, transport=wire):
        await eventually(lambda: routed(mesh), 20.5, every=0.01)
    mesh.host.history.clear()
    wire.answers = False
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    async with running(mesh, transport=wire):
        await trio.sleep(60)
        assert routed(mesh), "g1 is down"
        assert not [change for change in mesh.host.history if "10.4.0.51" in str(change)]
        # It lives, and they do not reach each other, as in a mesh that was set up by an agent that did not look.
        mesh.etcd.put_kept("/kilo/by/g1/elections/gcp", encode(CandidateRecord(rank=CandidateClass.PUBLIC)))
        await eventually(lambda: mesh.logged("has never answered h1"), 90, every=0.1)
        assert not routed(mesh)


async def test_a_member_that_comes_back_where_only_arp_passes_is_neither_cut_off_nor_named(mesh: World) -> None:
    """It cannot ask this host, nor answer it but by ARP, and was down when this agent started."""
    wire = Wire()
    wire.answers = False
    mesh.host.resolves = lambda address: address == INSIDE
    async with running(mesh, transport=wire):
        await eventually(lambda: routed(mesh), 5, every=0.01)
    mesh.host.history.clear()
    mesh.host.resolves = lambda address: False
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    async with running(mesh, transport=wire):
        await trio.sleep(300)
        mesh.host.resolves = lambda address: address == INSIDE
        mesh.etcd.put_kept("/kilo/by/g1/elections/gcp", encode(CandidateRecord(rank=CandidateClass.PUBLIC)))
        await trio.sleep(120)
        assert mesh.logged(NEVER) == 0
        assert not [change for change in mesh.host.history if "10.4.0.51" in str(change)]


async def test_a_member_that_boots_later_is_reached_at_once_where_only_arp_passes(mesh: World) -> None:
    wire = Wire()
    wire.answers = False
    mesh.host.resolves = lambda address: False
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    async with running(mesh, transport=wire):
        await trio.sleep(400)
        assert not routed(mesh)
        mesh.host.resolves = lambda address: address == INSIDE
        mesh.etcd.put_kept("/kilo/by/g1/elections/gcp", encode(CandidateRecord(rank=CandidateClass.PUBLIC)))
        await eventually(lambda: routed(mesh), 3, every=0.01)


async def test_an_address_that_this_host_has_itself_is_no_other_hosts(mesh: World) -> None:
    """Two sites without labels, both 192.168.1.0/24, a host .1 at each: it would answer itself."""
    record = NodeRecord(
        public_key=key_file.public_key(G1), internal_ips=(ip_interface("192.168.1.1/24"),), location="gcp"
    )
    mesh.etcd.put("/kilo/by/g1/node", encode(record))
    mesh.host.reach = lambda address: True
    async with running(mesh, transport=Wire()):
        await eventually(lambda: mesh.logged("has never answered h1 at its internal IP 192.168.1.1"), 15, every=0.1)
        assert not routed(mesh)


@pytest.mark.parametrize("shakes", [False, True])
async def test_a_member_in_the_tunnel_is_named_if_it_does_not_even_shake_hands(mesh: World, shakes: bool) -> None:
    wire = Wire()
    wire.answers = False
    async with running(mesh, transport=wire, encapsulate=Encapsulate.WIREGUARD):
        key = key_file.public_key(G1)
        await eventually(lambda: key in mesh.host.observed.peers, 10, every=0.1)
        for _ in range(60):
            if shakes:
                mesh.host.receive_from(key)
            await trio.sleep(1)
        said = mesh.logged("g1, its leader, does not answer h1 through their tunnel inside the location")
        assert said == (0 if shakes else 1)
        assert ip_network("10.4.0.0/16") in mesh.host.observed.routes, "what is encrypted is not withheld"
        assert unreachable(mesh) == ([] if shakes else [("g1", "10.4.0.51", True)])


@pytest.mark.parametrize("way", [Via.TUNNEL, Via.UNDERLAY, Via.IPIP])
async def test_a_new_member_is_asked_only_once_the_kernel_leads_nothing_for_it_into_the_tunnel(way: Via) -> None:
    """It was at another location, so that its internal IP was routed through this host's tunnels, or its leader's,
    where it answers."""
    there = ip_network("10.0.0.2/32")
    before = HostPlan(node="h", routes={there: RoutePlan(destination=there, via=way)})
    kernel_holds: list[HostPlan | None] = [None]
    asked: list[str] = []

    async def ask(member: Node, address: IPAddress, note: Callable[[bytes], None]) -> None:
        asked.append(member.name)
        note(b"nonce")
        reachability.answered_by(b"nonce", member)

    reachability = Reachability(
        FakeKernel(FakeHost(), Setup(private_key=PRIVATE)),
        "h",
        ask=ask,
        on_change=lambda: None,
        programmed=lambda: kernel_holds[0],
        rng=random.Random(1),
    )
    reachability.start(Observed())
    snapshot = Snapshot(
        revision=1, subnets=(ip_network("10.4.0.0/16"),),
        nodes={one.name: evolve(one, mesh_addresses=(ip_address(f"10.4.0.{i}"),)) for i, one in enumerate((OWN, A), 1)},
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reachability.run)
        assert reachability.follow(build_topology(snapshot)) != ()
        await trio.sleep(5)
        kernel_holds[0] = before
        await trio.sleep(5)
        assert asked == []
        kernel_holds[0] = HostPlan(node="h")
        await eventually(lambda: asked == ["a"], 1)
        nursery.cancel_scope.cancel()


def test_local_messages_are_told_from_others() -> None:
    query = PeerMessage(is_response=False, nonce=b"12345678", sender=digest("a"), revision=0, local=True)
    for peer_message in (
        query,
        evolve(query, is_response=True),
        evolve(query, local=False),
        evolve(query, is_response=True, local=False),
    ):
        data = peer_message.pack(secret())
        assert (unpack(data, secret()), sender_of(data)) == (peer_message, digest("a"))
        assert len(data) == 44


# -- a location of whole agents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lonely", ["a-1", "a-3"])
async def test_a_location_whose_network_is_cut_from_the_start_sends_nothing_into_it_and_heals_by_itself(
    lonely: str,
) -> None:
    """In a-1's case it is the one that leads, or would."""
    shape = Shape(sites=(3, 1))
    with seeded(1), in_memory():
        async with trio.open_nursery() as nursery:
            world = Simulated(1, nursery, shape=shape)
            nursery.start_soon(world.keepalives)
            for name, host in world.hosts.items():
                world.etcd.put(KEYS.location(name), name[0])
                host.condition.lan = name != lonely
            for host in world.hosts.values():
                host.start()
                await trio.sleep(0.5)

            def agents() -> list[SimulatedAgent]:
                return [host.agent for host in world.hosts.values() if host.agent is not None]

            def heard() -> bool:
                found = {
                    agent.name: {one.target.node for one in known.silent}
                    for agent in agents()
                    if (known := agent.reachability) is not None
                }
                others = {"a-1", "a-2", "a-3"} - {lonely}
                return found == {"b-1": set(), lonely: others} | {name: {lonely} for name in others}

            await eventually(heard, 60, every=0.5)
            await trio.sleep(20)
            inside = {interface.ip for interface in world.hosts[lonely].place.inside}
            for name, host in world.hosts.items():
                ways = {route.gateway for route in host.machine.observed.routes.values()}
                assert not ways & inside, f"{name} sends into the network that is cut"
                said = " ".join(host.agent.troubles.all()) if host.agent is not None else ""
                assert ("has never answered" in said) is (name != "b-1"), name
            assert not {route.gateway for route in world.hosts[lonely].machine.observed.routes.values()} - {None}
            world.hosts[lonely].condition.lan = True
            await eventually(world.at_rest, 1.3 * LONGEST + 20, every=1.0)
            nursery.cancel_scope.cancel()


async def test_a_query_over_the_locations_network_is_answered_once(mesh: World) -> None:
    wire = Wire()
    async with running(mesh, transport=wire):
        await eventually(lambda: routed(mesh), 5, every=0.01)
        nonce, sender = stamp(int(time.time()), 1), digest(key_file.public_key(G1))
        query = PeerMessage(is_response=False, nonce=nonce, sender=sender, revision=0, local=True)
        for _ in range(20):
            wire.bring(query)
            await trio.sleep(1)
        assert wire.told == 1
        # An answer to no query of ours is not even looked at.
        assert not wire.admit(evolve(query, is_response=True).pack(secret()), INSIDE)
