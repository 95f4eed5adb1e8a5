"""Throughput and latency through two leaders, programmed by kilo-etcd, against the same path written by hand.

    python bench/path.py

Host a (location one) -> its leader l1 -> WireGuard -> leader l2 -> host b (location two). The path stands three
times, each in four namespaces of its own: as the topology plans it and the kernel layer programs it, as an operator
would write it with `ip` and `wg`, and by hand once more, as a control (`_traffic`).
"""

from __future__ import annotations

import shlex
import sys
from base64 import b64encode
from ipaddress import ip_address, ip_interface, ip_network

import trio

from _traffic import WORLDS, compare
from _worlds import Backend, at, inside, run_in_worlds, sh
from kilo_etcd.kernel import Setup, open_kernel
from kilo_etcd.kernel.userspace import public_key_of
from kilo_etcd.model import Candidate, Endpoint, Node, Snapshot
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.topology.segments import build_topology

HOSTS = ("a", "l1", "l2", "b")
PRIVATE = {name: b64encode(bytes([number + 1]) * 32).decode() for number, name in enumerate(HOSTS)}
PUBLIC = {name: public_key_of(bytes([number + 1]) * 32) for number, name in enumerate(HOSTS)}
INSIDE = {"a": "192.168.1.10", "l1": "192.168.1.1", "l2": "192.168.2.1", "b": "192.168.2.10"}
OUTSIDE = {"l1": "203.0.113.1", "l2": "203.0.113.2"}
MESH = {name: f"10.4.0.{number + 1}" for number, name in enumerate(HOSTS)}


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


def measure(backend: Backend) -> None:
    for world in WORLDS:
        build(world)
        if world == "kilo":
            for host in HOSTS:
                at(world, host, f"exec {shlex.join([sys.executable, __file__, host])}")
        else:
            by_hand(world, backend)
    compare(f"a -> leader -> leader -> b, {backend} WireGuard", "a", "b", dict.fromkeys(WORLDS, MESH["b"]))


if __name__ == "__main__":
    found = inside()
    if found is None:
        sys.exit(run_in_worlds(__file__))
    if len(sys.argv) > 1:
        trio.run(program, sys.argv[1], found)
    else:
        measure(found)
