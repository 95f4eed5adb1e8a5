"""Throughput and latency through two leaders, programmed by kilo-etcd, against the same path written by hand.

    python bench/path.py

Host a (location one) -> its leader l1 -> WireGuard -> leader l2 -> host b (location two). The path stands three
times, each in four namespaces of its own: as the topology plans it and the kernel layer programs it, as an operator
would write it with `ip` and `wg`, and by hand once more, as a control: how far the two by hand are apart is how much of
a difference is chance. Rounds take the three in turn, in another order each time; a ratio is one of a round. All
namespaces share the machine's cores with the sender and the receiver.
"""

from __future__ import annotations

import ctypes
import os
import random
import shlex
import signal
import socket
import sys
import time
from base64 import b64encode
from collections.abc import Sequence
from ipaddress import ip_address, ip_interface, ip_network
from statistics import median, quantiles

import trio

from _table import QUICK, console, table
from _worlds import Backend, inside, run_in_worlds, sh
from kilo_etcd.kernel import Setup, open_kernel
from kilo_etcd.kernel.userspace import public_key_of
from kilo_etcd.model import Candidate, Endpoint, Node, Snapshot
from kilo_etcd.topology import build_topology, host_plan

HOSTS = ("a", "l1", "l2", "b")
PRIVATE = {name: b64encode(bytes([number + 1]) * 32).decode() for number, name in enumerate(HOSTS)}
PUBLIC = {name: public_key_of(bytes([number + 1]) * 32) for number, name in enumerate(HOSTS)}
INSIDE = {"a": "192.168.1.10", "l1": "192.168.1.1", "l2": "192.168.2.1", "b": "192.168.2.10"}
OUTSIDE = {"l1": "203.0.113.1", "l2": "203.0.113.2"}
MESH = {name: f"10.4.0.{number + 1}" for number, name in enumerate(HOSTS)}
WORLDS = ("kilo", "hand", "control")
PORT = 5201
ROUNDS, SECONDS, PINGS = (6, 0.3, 100) if QUICK else (120, 0.4, 200)


def at(world: str, host: str, script: str) -> None:
    """Run lines of shell on a host, with a directory of its own for WireGuard's sockets."""
    given = f"set -e\nmount -t tmpfs none /run/wireguard\n{script}\n"
    sh(f"ip netns exec {world}-{host} unshare -m sh >/dev/null", given=given)


def build(world: str) -> None:
    """The hosts and the network under them."""
    for host in HOSTS:
        sh(f"ip netns add {world}-{host} && ip -n {world}-{host} link set lo up")
    for one, name_one, other, name_other in (
        ("a", "lan", "l1", "lan"), ("l1", "wan", "l2", "wan"), ("l2", "lan", "b", "lan"),
    ):  # fmt: skip
        sh(f"ip link add {name_one} netns {world}-{one} type veth peer name {name_other} netns {world}-{other}")
    for name, addresses in (("lan", INSIDE), ("wan", OUTSIDE)):
        for host, address in addresses.items():
            sh(f"ip -n {world}-{host} address add {address}/24 dev {name} && ip -n {world}-{host} link set {name} up")


def by_hand(world: str, backend: Backend) -> None:
    """What a person writes who knows `ip` and `wg` and needs just this path."""
    # In a session of its own, as a service's would be and ours is: sessions are what the scheduler shares cores among.
    start = "LOG_LEVEL=error setsid wireguard-go wg0 >/dev/null 2>&1"
    make = "ip link add wg0 type wireguard" if backend == "kernel" else start
    for own, far, member, behind in (("l1", "l2", "a", "b"), ("l2", "l1", "b", "a")):
        at(
            world,
            own,
            f"{make}\necho {PRIVATE[own]} >/run/wireguard/key\n"
            f"wg set wg0 listen-port 51820 private-key /run/wireguard/key"
            f" peer {PUBLIC[far]} endpoint {OUTSIDE[far]}:51820 allowed-ips {MESH[far]}/32,{MESH[behind]}/32\n"
            f"ip address add {MESH[own]}/32 dev wg0\nip link set wg0 mtu 1420 up\n"
            f"ip route add 10.4.0.0/16 dev wg0 src {MESH[own]}\n"
            f"ip route add {MESH[member]}/32 via {INSIDE[member]}\nsysctl -qw net.ipv4.ip_forward=1",
        )
        at(
            world,
            member,
            f"ip address add {MESH[member]}/32 dev lo\nip route add 10.4.0.0/16 via {INSIDE[own]} src {MESH[member]}",
        )


def snapshot() -> Snapshot:
    """What etcd would hold for these hosts."""
    nodes = {
        name: Node(
            name=name,
            public_key=PUBLIC[name],
            location="one" if name in ("a", "l1") else "two",
            endpoint=Endpoint(ip_address(OUTSIDE.get(name, INSIDE[name])), 51820),
            internal_ips=(ip_interface(f"{INSIDE[name]}/24"),),
            mesh_addresses=(ip_address(MESH[name]),),
            registered_revision=number + 2,
        )
        for number, name in enumerate(HOSTS)
    }
    offers = {
        nodes[name].location: (Candidate(node=name, rank=nodes[name].candidate_class, create_revision=10),)
        for name in OUTSIDE
    }
    return Snapshot(revision=20, subnets=(ip_network("10.4.0.0/16"),), nodes=nodes, candidates=offers)


async def program(host: str, backend: Backend) -> None:
    """Run on a host: what its agent would have programmed."""
    setup = Setup(private_key=PRIVATE[host], wireguard=backend, runtime_dir="/run/wireguard/kilo-etcd")
    async with open_kernel(setup) as kernel:
        report = await kernel.apply(host_plan(build_topology(snapshot()), host))
        assert not report.failures, report.failures[0]


def enter(namespace: str) -> None:
    """Sockets that are opened from now on are this namespace's."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")


def serve(world: str) -> int:
    """A process on b that takes what comes by TCP and says how much it was, and echoes what comes by UDP."""
    enter(f"{world}-b")
    streams = socket.create_server((MESH["b"], PORT))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind((MESH["b"], PORT))
    process = os.fork()
    if process:
        return process
    if os.fork() == 0:
        while True:
            datagrams.sendto(*datagrams.recvfrom(2048))
    buffer = bytearray(1 << 18)
    while True:
        stream, _ = streams.accept()
        with stream:
            total = 0
            while size := stream.recv_into(buffer):
                total += size
            stream.sendall(total.to_bytes(8, "big"))


def throughput(world: str) -> float:
    """Mbit/s of one TCP stream from a to b, counted at b, until b has the last byte."""
    enter(f"{world}-a")
    data = memoryview(bytes(1 << 17))
    with socket.create_connection((MESH["b"], PORT), timeout=30) as stream:
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        total = int.from_bytes(stream.recv(8), "big")
        return total * 8 / (time.monotonic() - began) / 1e6


def latency(world: str) -> list[float]:
    """Seconds there and back, of single UDP packets one after the other."""
    enter(f"{world}-a")
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.connect((MESH["b"], PORT))
        out.settimeout(2)
        for _ in range(PINGS):
            began = time.perf_counter()
            out.send(b"x" * 64)
            out.recv(2048)
            times.append(time.perf_counter() - began)
    return times


def answers(world: str) -> None:
    """Wait until the path carries packets."""
    deadline = time.monotonic() + 20
    while True:
        try:
            latency(world)
            return
        except TimeoutError:
            if time.monotonic() > deadline:
                raise


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[str, str, str, str]:
    """Median, the 95 % interval of the median (bootstrap), quartiles, extremes."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    rng = random.Random(1)
    medians = sorted(median(rng.choices(found, k=len(found))) for _ in range(2000))
    low, _, high = quantiles(found, n=4)
    return (
        f"{median(found):.3f}",
        f"{medians[50]:.3f} to {medians[1949]:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{min(found):.2f} to {max(found):.2f}",
    )


def measure(backend: Backend) -> None:
    for world in WORLDS:
        build(world)
        if world == "kilo":
            for host in HOSTS:
                at(world, host, f"exec {shlex.join([sys.executable, __file__, host])}")
        else:
            by_hand(world, backend)
    servers = [serve(world) for world in WORLDS]
    rates: dict[str, list[float]] = {world: [] for world in WORLDS}
    middles: dict[str, list[float]] = {world: [] for world in WORLDS}
    highs: dict[str, list[float]] = {world: [] for world in WORLDS}
    shown = table(
        f"a -> leader -> leader -> b, {backend} WireGuard: {ROUNDS} rounds, {SECONDS:g} s of TCP, {PINGS} UDP echoes",
        "what", "median", "by hand", "ratio", "95 % of the median", "half of the rounds", "all rounds",
    )  # fmt: skip
    try:
        for world in WORLDS:
            answers(world)
        for number in range(ROUNDS + 1):
            order = WORLDS[number % 3 :] + WORLDS[: number % 3]
            for world in order if number % 2 else order[::-1]:
                rate, times = throughput(world), sorted(latency(world))
                if number:  # the first is not counted
                    rates[world].append(rate)
                    middles[world].append(median(times))
                    highs[world].append(times[len(times) * 99 // 100])
    finally:
        for server in servers:
            os.kill(server, signal.SIGKILL)
    for name, found, unit, digits in (
        ("Mbit/s", rates, 1.0, 0), ("median echo, µs", middles, 1e6, 1), ("99 % of the echoes, µs", highs, 1e6, 1),
    ):  # fmt: skip
        for world in ("kilo", "control"):
            ours, theirs = found[world], found["hand"]
            both = (f"{median(values) * unit:,.{digits}f}" for values in (ours, theirs))
            shown.add_row(f"{world}: {name}", *both, *ratios(ours, theirs))
    console.print(shown)
    print()


if __name__ == "__main__":
    found = inside()
    if found is None:
        sys.exit(run_in_worlds(__file__))
    if len(sys.argv) > 1:
        trio.run(program, sys.argv[1], found)
    else:
        measure(found)
