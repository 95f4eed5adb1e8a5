"""A host that cannot reach etcd and queries other nodes for the leaders: messages, memory, and a whole agent."""

from __future__ import annotations

import socket
import time
from ipaddress import IPv4Address, ip_address, ip_interface
from typing import Any

import pytest
import trio
import trio.testing
from agent_world import PRIVATE, World, running
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from helpers import eventually
from kilo_etcd.agent.leader_hints import hints as leader_hints
from kilo_etcd.agent.leader_hints.admission import stamp
from kilo_etcd.agent.leader_hints.hints import (
    LeaderHint,
    LeaderHints,
    LeaderHistory,
    PeerMessage,
    digest,
    followed,
    leaders_hinted,
    sender_of,
    unpack,
)
from kilo_etcd.agent.leader_hints.peer_query import UdpTransport, served
from kilo_etcd.agent.probing.reachability import AT_ONCE
from kilo_etcd.model import Candidate, CandidateClass, Endpoint, Node, Snapshot
from kilo_etcd.runtime import key_file
from kilo_etcd.store.records import CandidateRecord, NodeRecord, decode_status, encode
from kilo_etcd.topology.segments import build_topology

SECRET = b"0123456789abcdef0123456789abcdef"


# -- messages ---------------------------------------------------------------------------------------------------------


def message(**rest: Any) -> PeerMessage:
    return PeerMessage(**{"is_response": True, "nonce": b"12345678", "sender": digest("a"), "revision": 2**40, **rest})


def test_a_message_comes_back_as_it_was() -> None:
    for peer_message in (message(is_response=False), message(), message(leaders=((digest("s"), digest("l")),))):
        data = peer_message.pack(SECRET)
        assert sender_of(data) == digest("a")
        assert unpack(data, SECRET) == peer_message


def test_a_query_cannot_be_used_to_multiply_and_a_response_fits_any_tunnel() -> None:
    assert len(message(is_response=False).pack(SECRET)) == 44
    most = message(leaders=tuple((digest(str(n)), digest("l")) for n in range(leader_hints.MOST_LEADERS)))
    assert len(most.pack(SECRET)) == 1004


def test_with_another_secret_or_changed_it_is_nothing() -> None:
    data = message(leaders=((digest("s"), digest("l")),)).pack(SECRET)
    assert unpack(data, SECRET[::-1]) is None
    for place in range(len(data)):
        assert unpack(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], SECRET) is None
        assert unpack(data[:place], SECRET) is None


@given(st.binary(max_size=2048))
def test_any_bytes_are_a_message_or_not(data: bytes) -> None:
    assert unpack(data, SECRET) is None
    assert sender_of(data) is None or len(data) >= 44


def test_both_ends_agree_on_a_secret_and_a_key_of_no_use_has_none() -> None:
    one, other = key_file.generate(), key_file.generate()
    secret = key_file.agreed(one, key_file.public_key(other))
    assert secret is not None
    assert secret == key_file.agreed(other, key_file.public_key(one))
    assert key_file.agreed(one, "A" * 43 + "=") is None


# -- memory, and what is made of it -----------------------------------------------------------------------------------


def node(name: str, location: str, number: int) -> Node:
    return Node(
        name=name,
        public_key=f"key-{name}",
        location=location,
        endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
        internal_ips=(ip_interface(f"10.0.{ord(location)}.{number}/24"),),
        mesh_addresses=(ip_address(f"10.4.0.{number}"),),
        registered_revision=number,
    )


NODES = [
    node("a1", "a", 1),
    node("a2", "a", 2),
    node("a3", "a", 3),
    node("b1", "b", 4),
    node("b2", "b", 5),
    node("c1", "c", 6),
]


def led(revision: int, **leaders: str) -> Snapshot:
    """A snapshot in which these nodes alone stand at their locations."""
    return Snapshot(
        revision=revision,
        nodes={one.name: one for one in NODES},
        candidates={
            location: (Candidate(node=name, rank=CandidateClass.PUBLIC, create_revision=revision),)
            for location, name in leaders.items()
        },
    )


def asked(revision: int) -> PeerMessage:
    return message(is_response=False, revision=revision)


def named(answer: PeerMessage) -> dict[str, str]:
    keys = {digest(f"location:{location}"): location for location in "abc"}
    names = {digest(one.public_key): one.name for one in NODES}
    return {keys[segment]: names[leader] for segment, leader in answer.leaders}


def test_it_tells_which_leaders_have_changed_since_the_askers_revision() -> None:
    leader_history = LeaderHistory()
    topology = build_topology(led(10, a="a1", b="b1"))
    leader_history.note(topology)
    for snapshot in (led(20, a="a2", b="b1"), led(30, a="a2", b="b2"), led(40, a="a2", b="b2")):
        topology = build_topology(snapshot, topology)
        leader_history.note(topology)
    own = digest("key-a2")
    answer = leader_history.response(asked(15), topology, own, "c1")
    assert named(answer) == {"a": "a2", "b": "b2"}
    assert (answer.revision, answer.sender, answer.nonce) == (40, own, b"12345678")
    assert named(leader_history.response(asked(25), topology, own, "c1")) == {"b": "b2"}
    assert named(leader_history.response(asked(40), topology, own, "c1")) == {}
    assert next(iter(named(leader_history.response(asked(5), topology, own, "a1")))) == "a", (
        "the asker's own comes first"
    )


def test_a_leader_that_came_back_has_changed_too() -> None:
    leader_history = LeaderHistory()
    topology = build_topology(led(10, a="a1"))
    leader_history.note(topology)
    for snapshot in (led(20, a="a2"), led(30, a="a1")):
        topology = build_topology(snapshot, topology)
        leader_history.note(topology)
    assert named(leader_history.response(asked(15), topology, digest("x"), "a3")) == {"a": "a1"}


def test_a_topology_that_was_missed_makes_no_difference() -> None:
    leader_history = LeaderHistory()
    leader_history.note(build_topology(led(10, a="a1", b="b1")))
    last = build_topology(led(30, a="a2", b="b1"), build_topology(led(20, a="a1", b="b1")))
    leader_history.note(last)
    assert named(leader_history.response(asked(15), last, digest("x"), "c1")) == {"a": "a2"}


def hint(revision: int, time: float = 0.0, **leaders: str) -> LeaderHint:
    return LeaderHint(
        time, revision, {digest(f"location:{key}"): digest(f"key-{name}") for key, name in leaders.items()}
    )  # fmt: skip


def test_the_newer_revision_is_followed_and_nobody_else() -> None:
    topology = build_topology(led(20, a="a1", b="b1"))
    assert leaders_hinted(topology, [hint(20, a="a2"), hint(19, a="a3")], 1.0) == LeaderHints()
    assert leaders_hinted(topology, [hint(30, a="a2")], leader_hints.FRESH + 1) == LeaderHints(), "too long ago"
    found = leaders_hinted(topology, [hint(40, a="a3"), hint(30, a="a2", b="b2")], 1.0)
    assert found == LeaderHints(40, {"location:a": "a3", "location:b": "b2"}), "the later word counts"
    assert leaders_hinted(topology, [hint(30, a="b1", x="a1")], 1.0) == LeaderHints(), "no such segment, no such member"


def test_what_was_heard_changes_leaders_and_nothing_else() -> None:
    topology = build_topology(led(20, a="a1", b="b1"))
    hints = LeaderHints(30, {"location:a": "a2"})
    snapshot = followed(topology, hints)
    other = build_topology(snapshot, topology)
    assert (other.segment_of("a1").leader.name, other.segment_of("b1").leader.name) == ("a2", "b1")
    assert evolve(snapshot, candidates=topology.snapshot.candidates) == topology.snapshot
    assert followed(topology, LeaderHints(20, {"location:a": "a2"})) is topology.snapshot, "it is not newer"
    assert followed(topology, LeaderHints(30, {"location:a": "gone"})) == topology.snapshot


# -- a whole agent ----------------------------------------------------------------------------------------------------

G1 = key_file.generate()
MESH_G1 = ip_address("10.4.0.51")


class Letters:
    """The post of one agent; the test is everybody else."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, IPv4Address]] = []
        self.admit: Any = lambda _data, _source: True
        self.served: set[Any] = set()
        self._in, self._out = trio.open_memory_channel[tuple[bytes, Any]](100)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    async def send(self, data: bytes, address: Any) -> None:
        await trio.lowlevel.checkpoint()
        message = unpack(data, secret())
        # What goes over the location's own network is another matter (test_agent_reachability).
        if message is None or not message.local:
            self.sent.append((data, address))

    async def receive(self) -> tuple[bytes, Any]:
        return await self._out.receive()

    def bring(self, data: bytes, source: Any = MESH_G1) -> None:
        if self.admit(data, source):
            self._in.send_nowait((data, source))

    def serve(self, addresses: Any) -> None:
        self.served = set(addresses)


@pytest.fixture
def mesh(world: World) -> World:
    """h1 is at gcp with g1, and leads."""
    record = NodeRecord(
        public_key=key_file.public_key(G1),
        endpoint=Endpoint.parse("203.0.113.51:51820"),
        internal_ips=(ip_interface("192.168.1.51/24"),),
        location="gcp",
    )
    world.etcd.put(f"/kilo/by/g1/addresses/{MESH_G1}", "")
    world.etcd.put("/kilo/by/g1/node", encode(record))
    world.etcd.put("/kilo/locations/h1", "gcp")
    return world


def secret() -> bytes:
    found = key_file.agreed(G1, key_file.public_key(PRIVATE))
    assert found is not None
    return found


def answer(query: PeerMessage, revision: int, leader: str, nonce: bytes | None = None) -> bytes:
    told = PeerMessage(
        is_response=True, nonce=nonce or query.nonce, sender=digest(key_file.public_key(G1)), revision=revision,
        leaders=((digest("location:gcp"), digest(leader)),),
    )  # fmt: skip
    return told.pack(secret())


@pytest.mark.autojump
async def test_a_leader_that_was_replaced_while_it_was_cut_off_follows_the_new_one(mesh: World) -> None:
    transport = Letters()
    async with running(mesh, transport=transport) as daemon:
        await eventually(lambda: mesh.etcd.get("/kilo/by/h1/elections/gcp") is not None, 30, every=0.1)
        await trio.sleep(20)
        assert transport.sent == [], "as long as etcd answers nobody is asked"
        mesh.etcd.put_kept("/kilo/by/g1/elections/gcp", encode(CandidateRecord(rank=CandidateClass.REST)))
        await trio.sleep(1)
        assert daemon.state.role is not None
        assert daemon.state.role.leader == "h1"
        mesh.client.cut()
        await eventually(lambda: transport.sent, 8, every=0.1)
        query = unpack(transport.sent[-1][0], secret())
        assert query is not None
        assert transport.sent[-1][1] == MESH_G1
        g1 = key_file.public_key(G1)
        for useless in (
            b"", b"kE", answer(query, query.revision, g1), answer(query, 9999, g1, nonce=b"another1"),
            answer(query, 9999, g1)[:-1] + b"?",
        ):  # fmt: skip
            transport.bring(useless)
        await trio.sleep(0.2)
        assert daemon.state.role.leader == "h1"
        # The query has been used up by the response that was not newer.
        used = query.nonce
        await eventually(lambda: (new := unpack(transport.sent[-1][0], secret())) and new.nonce != used, 2, every=0.1)
        query = unpack(transport.sent[-1][0], secret())
        assert query is not None
        before = daemon.state.revision
        transport.bring(answer(query, mesh.etcd.revision + 5, g1))
        await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "g1", 1, every=0.01)
        assert daemon.state.revision == before, "the revision has not moved"
        assert mesh.logged("following the leaders that other nodes report") == 1
        await trio.sleep(60)
        assert daemon.state.role.leader == "g1", "silence is no news"
        mesh.client.mend()
        await eventually(lambda: mesh.logged("following etcd again") == 1, 40, every=0.1)
        await trio.sleep(5)
        sent = len(transport.sent)
        await trio.sleep(30)
        assert len(transport.sent) == sent
        assert daemon.state.role.leader == "g1", "it stood first when h1's lease had ended"


@pytest.mark.autojump
async def test_where_the_port_is_taken_that_is_said_and_the_agent_goes_on(mesh: World) -> None:
    class Taken(Letters):
        taken = True

        async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            async with trio.open_nursery():
                if self.taken:
                    raise OSError(98, "Address already in use")
                task_status.started()
                await self.lost.wait()
                raise OSError(19, "No such device")

        lost = trio.Event()

    def answers() -> bool:
        return decode_status(mesh.etcd.get("/kilo-status/by/h1/status") or b"").answers

    transport = Taken()
    async with running(mesh, transport=transport):
        await trio.sleep(200)
        assert mesh.logged("peer queries do not work") == 1
        assert mesh.logged("Address already in use") == 1
        assert not answers(), "its status does not promise what it cannot do"
        transport.taken = False
        await eventually(answers, 70, every=0.1)
        revision = mesh.etcd.revision
        await trio.sleep(200)
        assert mesh.etcd.revision == revision
        transport.lost.set()
        await eventually(lambda: not answers(), 5, every=0.1)


@pytest.mark.autojump
async def test_who_asks_is_answered_if_it_is_known(mesh: World) -> None:
    transport = Letters()
    async with running(mesh, transport=transport) as daemon:
        await eventually(lambda: mesh.etcd.get("/kilo/by/h1/elections/gcp") is not None, 30, every=0.1)
        await trio.sleep(5)
        query = PeerMessage(is_response=False, nonce=b"question", sender=digest(key_file.public_key(G1)), revision=1)
        stranger = evolve(query, sender=digest("nobody"))
        for data in (stranger.pack(secret()), query.pack(SECRET)):
            transport.bring(data)
        await trio.sleep(1)
        assert transport.sent == []
        transport.bring(query.pack(secret()))
        await eventually(lambda: transport.sent, 1, every=0.01)
        assert transport.sent[0][1] == MESH_G1
        told = unpack(transport.sent[0][0], secret())
        assert told is not None
        assert told.leaders == ((digest("location:gcp"), digest(daemon.public_key)),)
        assert (told.nonce, told.revision) == (b"question", daemon.state.revision)
        assert daemon.snapshots.snapshot is not None
        own = daemon.snapshots.snapshot.nodes["h1"]
        assert transport.served == {*own.mesh_addresses, *(interface.ip for interface in own.internal_ips)}
        assert len(transport.served) == 2
        # Whoever brings it again, from wherever, is not answered, and neither is the one who made it: it is a replay.
        transport.sent.clear()
        for source in (ip_address("192.0.2.66"), MESH_G1):
            transport.bring(query.pack(secret()), source)
        await trio.sleep(1)
        assert transport.sent == []
        # Another query, relayed from an address that the responder does not know, is answered to its sender.
        transport.bring(evolve(query, nonce=stamp(int(time.time()), 1)).pack(secret()), ip_address("192.0.2.66"))
        await eventually(lambda: transport.sent, 1, every=0.01)
        assert transport.sent[0][1] == MESH_G1
        # Who has lost etcd itself has nothing to say.
        mesh.client.cut()
        await eventually(lambda: len(transport.sent) > 1, 20, every=0.1)
        transport.sent.clear()
        transport.bring(evolve(query, nonce=stamp(int(time.time()), 2)).pack(secret()))
        await trio.sleep(0.1)
        assert all(unpack(data, secret()) != told for data, _ in transport.sent)
        assert not any(
            peer_message.is_response for data, _ in transport.sent if (peer_message := unpack(data, secret()))
        )


@pytest.mark.autojump
async def test_behind_a_nat_of_its_own_a_host_is_asked_at_its_private_address(mesh: World) -> None:
    """The other hosts of the location call it at the NAT's address, which no packet has that arrives."""
    transport, inside = Letters(), ip_address("192.168.1.1")
    async with running(mesh, transport=transport) as daemon:
        await eventually(lambda: inside in transport.served, 30, every=0.1)
        mesh.etcd.put("/kilo/annotations/h1/force-internal-ip", "10.99.0.7/24")
        await eventually(lambda: ip_address("10.99.0.7") in transport.served, 5, every=0.1)
        assert inside in transport.served
        moved = evolve(mesh.facts.addresses[0], address=ip_interface("192.168.1.8/24"))
        mesh.facts = evolve(mesh.facts, addresses=(moved,))
        mesh.host.moved.set()
        await eventually(lambda: ip_address("192.168.1.8") in transport.served, 5, every=0.1)
        assert inside not in transport.served
        assert daemon.snapshots.snapshot is not None
        assert {*daemon.snapshots.snapshot.nodes["h1"].mesh_addresses} < transport.served


def test_the_served_addresses_are_those_to_which_packets_for_the_node_come() -> None:
    def told(own: str, *internal: str) -> list[str]:
        one = evolve(node("a1", "a", 1), mesh_addresses=(), internal_ips=tuple(map(ip_interface, internal)))
        return list(map(str, served(one, tuple(map(ip_address, own.split())))))

    assert told("192.168.1.1 203.0.113.5", "192.168.1.1/24") == ["192.168.1.1"]
    assert told("192.168.1.1 203.0.113.5 fd00::1", "10.99.0.7/24") == ["10.99.0.7", "192.168.1.1"]
    assert told("203.0.113.5 fd00::1", "10.99.0.7/24") == ["10.99.0.7", "203.0.113.5"]
    assert told("192.168.1.1 fd00::1", "192.168.1.1/24", "fd00:99::7/64") == ["192.168.1.1", "fd00:99::7", "fd00::1"]
    assert told("", "192.168.1.1/24") == ["192.168.1.1"]


async def test_datagrams_go_both_ways_in_both_families_and_a_taken_port_is_an_error() -> None:
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as probe:
        await probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transport = UdpTransport(port)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        for text in ("127.0.0.1", "::1"):
            await transport.send(b"hello", ip_address(text))
            with trio.fail_after(5):
                assert await transport.receive() == (b"hello", ip_address(text))
        # The answers of a whole batch of members have come while this process had other things to do.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            for number in range(AT_ONCE):
                other.sendto(bytes([number]), ("127.0.0.1", port))
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5):
            assert [(await transport.receive())[0][0] for _ in range(AT_ONCE)] == list(range(AT_ONCE))
        with pytest.raises(ExceptionGroup) as caught:
            async with trio.open_nursery() as inner:
                await inner.start(UdpTransport(port).run)
        assert caught.group_contains(OSError, match="in use")
        nursery.cancel_scope.cancel()
