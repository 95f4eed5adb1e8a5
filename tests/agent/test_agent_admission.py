"""Which queries on the peer-query port are answered: replays, floods, old agents, other clocks, forged sources."""

from __future__ import annotations

import socket
import tracemalloc
from ipaddress import ip_address, ip_interface

import pytest
import trio

from helpers import eventually, scaled
from kilo_etcd.agent.leader_hints.admission import (
    BURST,
    MOST_NODES,
    MOST_SOURCES,
    RATE,
    SLOW_BURST,
    STRANGE_BURST,
    WINDOW,
    Admission,
    second_of,
    stamp,
)
from kilo_etcd.agent.leader_hints.peer_query import UdpTransport, served
from kilo_etcd.model import Node

A, B = b"sender-a", b"sender-b"
WALL = 1_800_000_000.0


def test_a_stamp_tells_its_second_and_a_random_number_is_none() -> None:
    assert second_of(stamp(1_800_000_000, 7)) == 1_800_000_000
    assert second_of(b"12345678") is None
    assert len({stamp(5, number) for number in range(1000)}) == 1000


def test_a_query_is_answered_once_however_often_and_late_it_comes() -> None:
    admission = Admission()
    query = stamp(int(WALL), 1)
    assert not admission.repeated(A, query)
    assert admission.answers(A, query, now=0.0, wall=WALL)
    assert admission.repeated(A, query)
    for second in range(200):
        later = float(second)
        assert not admission.answers(A, query, now=later, wall=WALL + later)
    # It is forgotten, and is older than what was asked since.
    for second in range(1, 100):
        assert admission.answers(A, stamp(int(WALL) + second, 1), now=float(second), wall=WALL + second)
    assert not admission.repeated(A, query)
    assert not admission.answers(A, query, now=100.0, wall=WALL + 100)
    # Even when it is older than all that a clock may be off: a host that makes stamps does not ask without.
    now = 99 + WINDOW - 1
    assert not admission.answers(A, query, now=now, wall=WALL + WINDOW + 1)


def test_who_asks_as_hosts_do_is_always_answered_and_who_asks_more_is_not() -> None:
    admission = Admission()
    for half in range(1000):
        now = half / 2
        assert admission.answers(A, stamp(int(WALL + now), half), now=now, wall=WALL + now)
    told = sum(admission.answers(B, stamp(int(WALL), n), now=n / 1000, wall=WALL) for n in range(2000))
    assert told <= BURST + 2 * RATE + 1


def test_agents_without_stamps_are_answered_slowly_and_each_query_once() -> None:
    admission = Admission()
    old = [f"random{number:02}".encode() for number in range(20)]
    assert admission.answers(A, old[0], now=0.0, wall=WALL)
    assert not admission.answers(A, old[0], now=1.0, wall=WALL)
    told = sum(admission.answers(A, nonce, now=2.0, wall=WALL) for nonce in old[1:])
    assert 1 <= told <= SLOW_BURST
    assert admission.answers(A, b"another!", now=60.0, wall=WALL)
    # One who makes stamps has no need of that, until it has been silent for long.
    assert admission.answers(B, stamp(int(WALL), 1), now=0.0, wall=WALL)
    assert not admission.answers(B, b"recorded", now=1.0, wall=WALL)
    assert admission.answers(B, b"recorded", now=WINDOW + 2, wall=WALL)


@pytest.mark.parametrize("stamped", [True, False])
def test_a_query_that_the_rate_refused_may_be_asked_again(stamped: bool) -> None:
    admission = Admission()
    queries = [stamp(int(WALL), n) if stamped else f"random{n:02}".encode() for n in range(20)]
    refused = [query for query in queries if not admission.answers(A, query, now=0.0, wall=WALL)]
    assert refused
    for number, one in enumerate(refused, 1):
        now = 10.0 * number
        assert not admission.repeated(A, one)
        assert admission.answers(A, one, now=now, wall=WALL + now)
        assert admission.repeated(A, one)
        assert not admission.answers(A, one, now=now + 5, wall=WALL + now + 5)


@pytest.mark.parametrize("off", [-10 * WINDOW, 10 * WINDOW, -(2.0**30)])
def test_a_host_with_another_time_is_answered_too(off: float) -> None:
    admission = Admission()
    told = sum(
        admission.answers(A, stamp(int(WALL + off + n), n), now=float(n), wall=WALL + n) for n in range(60)
    )  # fmt: skip
    assert told >= 30


@pytest.mark.parametrize("ahead", [WINDOW - 1, 10 * WINDOW])
@pytest.mark.parametrize("corrected", [0.0, -WINDOW - 10])
def test_a_local_query_is_answered_after_a_clock_was_corrected(ahead: float, corrected: float) -> None:
    """A host boots with its clock ahead; then it is corrected, and the agent restarts."""
    admission, now = Admission(), 100.0
    assert admission.answers(A, stamp(int(WALL), 0), now=now - 50, wall=WALL - 50)
    assert admission.answers(A, stamp(int(WALL + ahead), 1), now=now, wall=WALL, local=True)
    told = [
        admission.answers(A, stamp(int(WALL + corrected) + n, n), now=now + n, wall=WALL + n, local=True)
        for n in range(2, 60, 6)
    ]
    assert all(told)
    query = stamp(int(WALL + corrected) + 100, 1)
    assert admission.answers(A, query, now=now + 100, wall=WALL + 100, local=True)
    assert not admission.answers(A, query, now=now + 110, wall=WALL + 110, local=True), "a replay"
    recorded = [stamp(int(WALL - 200) + n, n) for n in range(100)]
    told = [admission.answers(A, one, now=now + 120, wall=WALL + 120, local=True) for one in recorded]
    assert sum(told) <= SLOW_BURST, "and recordings are answered slowly"
    refused = stamp(int(WALL - 100), 9)
    assert not admission.answers(A, refused, now=now + 150, wall=WALL + 150), "a query about leaders is not"


def test_strangers_have_a_rate_each_and_forged_ones_crowd_out_nobody() -> None:
    admission = Admission()
    assert sum(admission.from_stranger("x", 0.0) for _ in range(1000)) == STRANGE_BURST
    for number in range(10 * MOST_SOURCES):
        assert admission.from_stranger(number, 1.0)
    assert len(admission._strange) <= MOST_SOURCES
    assert admission.from_stranger("an honest one", 1.0)


def test_the_memory_is_bounded() -> None:
    admission = Admission()
    for number in range(MOST_NODES + 10):
        admission.answers(number.to_bytes(8), stamp(int(WALL), 1), now=0.0, wall=WALL)
    assert len(admission._senders) == MOST_NODES


def test_a_node_costs_less_than_a_kilobyte_however_much_it_asks() -> None:
    admission = Admission()
    tracemalloc.start()
    try:
        nodes = scaled(500)
        for number in range(nodes):
            for count in range(50):
                admission.answers(number.to_bytes(8), stamp(int(WALL), count), now=float(count), wall=WALL)
        assert tracemalloc.get_traced_memory()[0] < nodes * 1024
    finally:
        tracemalloc.stop()
    assert admission.repeated((1).to_bytes(8), stamp(int(WALL), 49))


async def test_only_what_is_sent_to_the_served_addresses_and_admitted_is_received() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transport = UdpTransport(port)
    transport.serve([ip_address("127.0.0.7"), ip_address("::1")])
    transport.admit = lambda data, _source: data != b"noise"
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as out6,
    ):
        async with trio.open_nursery() as nursery:
            await nursery.start(transport.run)
            for target in ("127.0.0.1", "127.0.0.8", "127.0.0.7"):
                out.sendto(f"to {target}".encode(), (target, port))
                out.sendto(b"noise", (target, port))
            with trio.fail_after(5):
                assert (await transport.receive())[0] == b"to 127.0.0.7"
                out6.sendto(b"to ::1", ("::1", port))
                assert (await transport.receive())[0] == b"to ::1"
                # The address has moved.
                transport.serve([ip_address("127.0.0.8")])
                for target in ("127.0.0.7", "127.0.0.8"):
                    out.sendto(target.encode(), (target, port))
                assert (await transport.receive())[0] == b"127.0.0.8"
            nursery.cancel_scope.cancel()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_a_nat_has_translated_is_received_at_the_private_address() -> None:
    """The node's internal IP is the NAT's (`force-internal-ip`); packets for it arrive at the host's own address."""
    for command in (
        "ip link set lo up",
        "ip address add 192.168.9.1/24 dev lo",
        "ip address add 192.168.10.1/24 dev lo",
        "ip route add 10.99.0.0/24 dev lo",
        "nft add table ip nat",
        "nft add chain ip nat output { type nat hook output priority -100 ; }",
        "nft add rule ip nat output ip daddr 10.99.0.7 dnat to 192.168.9.1",
    ):
        await trio.run_process(command.split())
    node = Node(name="a", public_key="a", internal_ips=(ip_interface("10.99.0.7/24"),))
    own, transport = (ip_address("192.168.9.1"), ip_address("203.0.113.5")), UdpTransport(1107)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        async with trio.open_nursery() as nursery:
            transport.serve(served(node, own))
            await nursery.start(transport.run)
            out.sendto(b"elsewhere", ("192.168.10.1", 1107))
            out.sendto(b"translated", ("10.99.0.7", 1107))
            with trio.fail_after(5):
                assert (await transport.receive())[0] == b"translated"
            nursery.cancel_scope.cancel()


async def test_a_flood_of_replays_costs_no_answer_and_an_honest_query_gets_through() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transport = UdpTransport(port)
    admission = Admission()
    replay, honest = stamp(int(WALL), 1), stamp(int(WALL), 2)
    assert admission.answers(A, replay, now=0.0, wall=WALL)
    transport.admit = lambda data, _source: not admission.repeated(A, data)
    got: list[bytes] = []

    async def collect() -> None:
        while True:
            got.append((await transport.receive())[0])

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        async with trio.open_nursery() as nursery:
            await nursery.start(transport.run)
            nursery.start_soon(collect)
            for _ in range(100):
                out.sendto(replay, ("127.0.0.1", port))
            out.sendto(honest, ("127.0.0.1", port))
            await eventually(lambda: got, 5)
            nursery.cancel_scope.cancel()
    assert got == [honest]
