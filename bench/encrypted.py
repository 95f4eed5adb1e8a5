"""What `internal-ips=encrypted` costs: throughput and latency between two hosts of one network at their internal IPs,
against WireGuard set up by hand, and the packets that the switch there and back loses.

    bench/encrypted.py [RUNS]

By hand the two hosts are called at addresses that stand on the WireGuard devices and lead there by the main table: no
rules, no packet filter. Programmed by kilo-etcd, they are called at the very addresses that WireGuard's own packets go
to (decision 0030). The switch is made on a full mesh of three hosts in the lab, on this machine's way to have
WireGuard, under 100 pings a second in each of six directions.
"""

from __future__ import annotations

import json
import shlex
import sys
from base64 import b64encode
from contextlib import AsyncExitStack
from ipaddress import ip_address, ip_interface, ip_network
from itertools import permutations

import trio

from _lab import KEYS, mesh
from _table import console, runs, table
from _traffic import WORLDS, compare
from _worlds import Backend, at, inside, run_in_worlds, sh
from kilo_etcd.kernel import Setup, open_kernel
from kilo_etcd.kernel.userspace import public_key_of
from kilo_etcd.lab.client import Lab
from kilo_etcd.lab.spec import Spec
from kilo_etcd.model import EncryptionStage, Endpoint, Granularity, InternalIPs, Node, Snapshot
from kilo_etcd.planning.encryption import Living, Outside, encrypt
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.store.keys import NodeKey
from kilo_etcd.topology.segments import build_topology

HOSTS = ("a", "b")
PRIVATE = {name: b64encode(bytes([number + 1]) * 32).decode() for number, name in enumerate(HOSTS)}
PUBLIC = {name: public_key_of(bytes([number + 1]) * 32) for number, name in enumerate(HOSTS)}
LAN = {"a": "192.168.1.1", "b": "192.168.1.2"}
MESH = {"a": "10.4.0.1", "b": "10.4.0.2"}
REVISION = 20
STEPS = ("off to routed", "routed to encrypted", "encrypted to off")


def build(world: str) -> None:
    """Two hosts, one wire."""
    for host in HOSTS:
        sh(f"ip netns add {world}-{host} && ip -n {world}-{host} link set lo up")
    sh(f"ip link add eth0 netns {world}-a type veth peer name eth0 netns {world}-b")
    for host, address in LAN.items():
        sh(f"ip -n {world}-{host} address add {address}/24 dev eth0 && ip -n {world}-{host} link set eth0 up")


def by_hand(world: str, backend: Backend) -> None:
    """What a person writes who knows `ip` and `wg`."""
    # In a session of its own, as a service's would be and ours is: sessions are what the scheduler shares cores among.
    start = "LOG_LEVEL=error setsid wireguard-go wg0 >/dev/null 2>&1"
    make = "ip link add wg0 type wireguard" if backend == "kernel" else start
    for own, far in (("a", "b"), ("b", "a")):
        at(
            world,
            own,
            f"{make}\necho {PRIVATE[own]} >/run/wireguard/key\n"
            f"wg set wg0 listen-port 51820 private-key /run/wireguard/key"
            f" peer {PUBLIC[far]} endpoint {LAN[far]}:51820 allowed-ips {MESH[far]}/32\n"
            f"ip address add {MESH[own]}/32 dev wg0\nip link set wg0 mtu 1420 up\n"
            f"ip route add {MESH[far]}/32 dev wg0 src {MESH[own]}",
        )


def snapshot() -> Snapshot:
    """What etcd would hold for these hosts, once they send encrypted."""
    nodes = {
        name: Node(
            name=name,
            public_key=PUBLIC[name],
            endpoint=Endpoint(ip_address(LAN[name]), 51820),
            internal_ips=(ip_interface(f"{LAN[name]}/24"),),
            mesh_addresses=(ip_address(MESH[name]),),
            registered_revision=number + 2,
            encryption=EncryptionStage.SENDS,
            accepts_since=number + 2,
        )
        for number, name in enumerate(HOSTS)
    }
    return Snapshot(
        revision=REVISION,
        subnets=(ip_network("10.4.0.0/16"),),
        nodes=nodes,
        granularity=Granularity.FULL,
        internal_ips=InternalIPs.ENCRYPTED,
    )


async def program(host: str, backend: Backend) -> None:
    """Run on a host: what its agent would have programmed."""
    topology = build_topology(snapshot())
    outside = Outside(
        etcd=((ip_address("192.168.1.9"), 2379),), talk=(1107,), sources=(ip_address(LAN[host]),)
    )  # fmt: skip
    living = Living(asked=frozenset(HOSTS), applied=dict.fromkeys(HOSTS, REVISION))
    plan = encrypt(host_plan(topology, host), topology, outside=outside, living=living)
    assert plan.encryption is not None
    assert plan.encryption.send, "it sends through the tunnel"
    assert plan.encryption.refuse, "and refuses the rest"
    setup = Setup(private_key=PRIVATE[host], wireguard=backend, runtime_dir="/run/wireguard/kilo-etcd")
    async with open_kernel(setup) as kernel:
        report = await kernel.apply(plan)
        assert not report.failures, report.failures[0]


def measure(backend: Backend) -> None:
    """The path."""
    for world in WORLDS:
        build(world)
        if world == "kilo":
            for host in HOSTS:
                at(world, host, f"exec {shlex.join([sys.executable, __file__, '--program', host])}")
        else:
            by_hand(world, backend)
    called = {world: LAN["b"] if world == "kilo" else MESH["b"] for world in WORLDS}
    compare(f"a -> b at its internal IP, {backend} WireGuard", "a", "b", called)


async def followed(lab: Lab, hosts: tuple[str, ...], mode: str) -> None:
    """Wait until all nodes are at the last stage, and under `encrypted` each refuses all others."""
    while True:
        kvs = [kv for kv in await lab.key_values(KEYS.by_root) if isinstance(KEYS.parse(kv.key), NodeKey)]
        stages = {json.loads(kv.value).get("encryption") for kv in kvs}
        if stages == {"sends" if mode == "encrypted" else None} and (mode != "encrypted" or await refusing(lab, hosts)):
            return
        await trio.sleep(0.05)


async def refusing(lab: Lab, hosts: tuple[str, ...]) -> bool:
    """Whether each host refuses all others."""
    for host in hosts:
        rules = (await lab.exec(host, "nft", "list", "set", "inet", "kilo", "refuse4")).stdout
        if rules.count("10.101.0.") < len(hosts) - 1:
            return False
    return True


async def switch(number: int) -> None:
    """The switch there and back, so often."""
    spec = Spec.simple({"lan": 3}, public=0, granularity=Granularity.FULL, open=True)
    lost: dict[str, list[int]] = {}
    sent: dict[str, int] = {}
    gaps: dict[str, float] = {}
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    async with mesh(spec) as lab:
        addresses = {row.host: row.private[0].partition("/")[0] for row in await lab.status()}
        hosts = tuple(addresses)
        await lab.kgctl("mesh", "set", "internal-ips", "off", "--yes")
        for _ in range(number):
            probes = {}
            async with AsyncExitStack() as stack:
                for a, b in permutations(hosts, 2):
                    probes[f"{a} to {b}"] = await stack.enter_async_context(lab.probe(a, b, address=addresses[b]))
                for step in STEPS:
                    mode = step.rpartition(" ")[2]
                    await trio.sleep(0.5)
                    began = trio.current_time()
                    await lab.kgctl("mesh", "set", "internal-ips", mode, "--yes")
                    await followed(lab, hosts, mode)
                    seconds[step].append(trio.current_time() - began)
                await trio.sleep(1)
            for way, probe in probes.items():
                lost.setdefault(way, []).append(probe.lost)
                gaps[way] = max(gaps.get(way, 0.0), probe.longest_gap)
                sent[way] = sent.get(way, 0) + probe.sent
    shown = table(
        f"off -> routed -> encrypted -> off, full mesh of three hosts, 100 pings/s: {number} runs",
        "direction", "sent", "lost", "runs with loss", "longest gap, ms",
    )  # fmt: skip
    for way, found in lost.items():
        shown.add_row(way, f"{sent[way]:,}", str(sum(found)), str(sum(map(bool, found))),
                      f"{gaps[way] * 1000:.0f}")  # fmt: skip
    console.print(shown)
    took = table("until all have followed, and refuse clear text", "step", "median s", "longest s")
    for step, found_seconds in seconds.items():
        ordered = sorted(found_seconds)
        took.add_row(step, f"{ordered[len(ordered) // 2]:.1f}", f"{ordered[-1]:.1f}")
    console.print(took)


def main() -> int:
    """The exit status."""
    found = inside()
    if found is None:
        failed = run_in_worlds(__file__)
        trio.run(switch, int(sys.argv[1]) if len(sys.argv) > 1 else runs(20))
        return failed
    if sys.argv[1:2] == ["--program"]:
        trio.run(program, sys.argv[2], found)
    else:
        measure(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
