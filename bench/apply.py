"""Programming many peers and routes: the kernel layer against `wg setconf`, `wg set` and `ip -batch`, in one run.

    python bench/apply.py

Ours is `apply` of a plan: the host is read anew, compared with the plan, changed, and what is then believed of it is
kept. The tools' time is that of a process that reads a file; no interpreter starts in ours, since the agent runs. What
the topology of a big mesh costs before is in bench/topology.py.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import trio
from attrs import evolve

from _table import QUICK, console, runs, table
from _worlds import Backend, inside, run_in_worlds, sh
from kilo_etcd.kernel import ApplyReport, Kernel, Setup, cleanup, open_kernel
from kilo_etcd.model import Endpoint, IPNetwork
from kilo_etcd.model.hostplan import HostPlan, PeerPlan, RoutePlan, Via

PRIVATE = b64encode(bytes([9]) * 32).decode()
HAND = "hand0"
OWN = ip_interface("10.4.0.1/32")
PEERS = {100: 9, 1_000: 7, 10_000: 5}
ROUTES = {1_000: 9, 10_000: 5}


def peers(count: int) -> dict[str, PeerPlan]:
    """Each with its mesh address and a network behind it."""
    rng = random.Random(count)
    made = {}
    for number in range(count):
        key = b64encode(rng.randbytes(32)).decode()
        made[key] = PeerPlan(
            public_key=key,
            name=f"node-{number}",
            endpoint=Endpoint(ip_address(0xCB00_0000 + number), 51820),
            allowed_ips=(ip_network(0x0A04_0100 + number), ip_network((0x6440_0000 + number * 256, 24))),
        )
    return made


def routes(count: int, gateway: str | None = None) -> dict[IPNetwork, RoutePlan]:
    networks = [ip_network((0x6440_0000 + number * 256, 24)) for number in range(count)]
    way = Via.TUNNEL if gateway is None else Via.UNDERLAY
    by = None if gateway is None else ip_address(gateway)
    return {n: RoutePlan(destination=n, via=way, gateway=by, source=OWN.ip) for n in networks}


def plan(**values: Any) -> HostPlan:
    mesh = ip_network("10.4.0.0/16")
    first = {mesh: RoutePlan(destination=mesh, via=Via.TUNNEL, source=OWN.ip)}
    more = values.pop("routes", {})
    return HostPlan(node="node", addresses=(OWN,), routes={**first, **more}, **values)


def section(peer: PeerPlan) -> str:
    allowed = ", ".join(str(network) for network in peer.allowed_ips)
    return f"[Peer]\nPublicKey = {peer.public_key}\nEndpoint = {peer.endpoint}\nAllowedIPs = {allowed}\n"


def written(text: str) -> str:
    """A file that holds the text."""
    file = Path("/run/given")
    file.write_text(text)
    return str(file)


def timed(work: Callable[[], object]) -> float:
    """Seconds. Garbage is collected before, not within."""
    gc.collect()
    began = perf_counter()
    work()
    return perf_counter() - began


def run(*command: str) -> Callable[[], object]:
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@asynccontextmanager
async def ours(backend: Backend) -> AsyncIterator[Kernel]:
    """A kernel layer whose device is there, without a peer."""
    async with open_kernel(Setup(private_key=PRIVATE, wireguard=backend)) as kernel:
        assert not (await kernel.apply(plan())).failures
        yield kernel
    await cleanup("kilo0")


async def apply(kernel: Kernel, wanted: HostPlan, *, fresh: bool = False) -> tuple[float, ApplyReport, int]:
    """Seconds, what was done, and in how many messages."""
    gc.collect()
    before = kernel.writes
    began = perf_counter()
    report = await kernel.apply(wanted, fresh=fresh)
    took = perf_counter() - began
    assert not report.failures, report.failures[0]
    return took, report, kernel.writes - before


def make_hand(backend: Backend) -> None:
    sh(f"ip link add {HAND} type wireguard" if backend == "kernel" else f"wireguard-go {HAND} >/dev/null 2>&1")
    sh(f"ip address add {OWN} dev {HAND} && ip link set {HAND} up")


def row(name: str, count: int, mine: list[float], theirs: list[float], messages: int) -> tuple[str, ...]:
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return (
        name,
        str(len(mine)),
        f"{median(mine) * 1000:,.1f}",
        f"{median(theirs) * 1000:,.1f}",
        f"{median(mine) / count * 1e6:,.1f}",
        f"{messages:,}",
        f"{median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
    )


HEADINGS = ("what", "rounds", "ours ms", "tool's ms", "ours µs each", "messages", "ratio", "of a round")


async def peers_come(backend: Backend) -> None:
    shown = table(f"Peers come ({backend} WireGuard): ours, and `wg setconf`", *HEADINGS)
    for count, rounds in PEERS.items():
        wanted = plan(peers=peers(count))
        file = written(f"[Interface]\nPrivateKey = {PRIVATE}\n" + "".join(map(section, wanted.peers.values())))
        mine, theirs, messages = [], [], 0
        for _ in range(runs(rounds)):
            async with ours(backend) as kernel:
                took, report, messages = await apply(kernel, wanted, fresh=True)
                assert len(report.changes) == count
                mine.append(took)
            make_hand(backend)
            theirs.append(timed(run("wg", "setconf", HAND, file)))
            assert len(sh(f"wg show {HAND} peers").split()) == count
            sh(f"ip link del {HAND}")
        shown.add_row(*row(f"{count:,} peers", count, mine, theirs, messages))
    console.print(shown)
    print()


async def routes_come(backend: Backend) -> None:
    shown = table("Routes come: ours, and `ip -batch`", *HEADINGS)
    for count, rounds in ROUTES.items():
        wanted = plan(routes=routes(count))
        networks = [network for network in wanted.routes if network.prefixlen == 24]
        file = written("".join(f"route add {network} dev kilo0 proto 107 src {OWN.ip}\n" for network in networks))
        mine, theirs, messages = [], [], 0
        for _ in range(runs(rounds)):
            async with ours(backend) as kernel:
                took, report, messages = await apply(kernel, wanted, fresh=True)
                assert len(report.changes) == count
                mine.append(took)
                await apply(kernel, plan())
                theirs.append(timed(run("ip", "-batch", file)))
                assert len(sh("ip route show proto 107").splitlines()) == count + 1
        shown.add_row(*row(f"{count:,} routes", count, mine, theirs, messages))
    console.print(shown)
    print()


async def leader_changes(backend: Backend) -> None:
    """On a member, all of whose routes go by its leader. What it did itself must not make it look at the host again."""
    shown = table("A member's leader changes: ours, and `ip -batch`", *HEADINGS)
    for count, rounds in ROUTES.items():

        def batch(gateway: str, count: int = count) -> str:
            others = (f"11.{number >> 8}.{number & 255}.0/24" for number in range(count))
            return written("".join(f"route replace {other} via {gateway} src 192.168.9.1\n" for other in others))

        mine, theirs, messages = [], [], 0
        async with ours(backend) as kernel:
            await apply(kernel, plan(routes=routes(count, "192.168.9.2")))
            run("ip", "-batch", batch("192.168.9.2"))()
            for last in range(3, 3 + runs(rounds)):
                took, report, messages = await apply(kernel, plan(routes=routes(count, f"192.168.9.{last}")))
                assert len(report.changes) == count
                mine.append(took)
                with trio.move_on_after(0.5) as quiet:
                    await kernel.wait_drift()
                assert quiet.cancelled_caught
                file = batch(f"192.168.9.{last}")
                theirs.append(timed(run("ip", "-batch", file)))
        sh("ip route flush root 11.0.0.0/8")
        shown.add_row(*row(f"{count:,} routes", count, mine, theirs, messages))
    console.print(shown)
    print()


def changed(wanted: HostPlan, number: int) -> HostPlan:
    """The same with one peer that gets another endpoint and one more network; the other peers are the same objects."""
    key = list(wanted.peers)[number]
    peer = wanted.peers[key]
    other = evolve(
        peer,
        endpoint=Endpoint(ip_address(0xCA00_0000 + number), 51820),
        allowed_ips=(*peer.allowed_ips, ip_network((0x7000_0000 + number * 256, 24))),
    )
    return evolve(wanted, peers={**wanted.peers, key: other})


async def one_changes(backend: Backend) -> None:
    count = 1_000 if QUICK and backend == "userspace" else 10_000
    shown = table(f"One peer of {count:,} changes ({backend} WireGuard): ours, and the tool's like", *HEADINGS)
    wanted = plan(peers=peers(count))
    steps: dict[str, tuple[list[float], list[float], list[int]]] = {}

    def note(name: str, mine: float, theirs: float, messages: int) -> None:
        ours_took, theirs_took, sent = steps.setdefault(name, ([], [], []))
        ours_took.append(mine)
        theirs_took.append(theirs)
        sent.append(messages)

    async with ours(backend) as kernel:
        await apply(kernel, wanted)
        for number in range(runs(21, 5)):
            wanted = changed(wanted, number)
            took, report, messages = await apply(kernel, wanted)
            assert len(report.changes) == 1
            key = list(wanted.peers)[-1 - number]
            theirs = timed(
                run("wg", "set", "kilo0", "peer", key, "endpoint", f"192.0.2.1:{number + 1}",
                    "allowed-ips", f"{wanted.peers[key].allowed_ips[0]},113.{number}.0.0/24")
            )  # fmt: skip
            note("one peer changes; `wg set`", took, theirs, messages)
            took, report, messages = await apply(kernel, wanted)
            assert not report.changes
            note("nothing changes; `true`", took, timed(run("true")), messages)
        for _ in range(runs(7)):
            await kernel.apply(wanted, fresh=True)
            took, report, messages = await apply(kernel, wanted, fresh=True)
            assert not report.changes
            note("all is read anew; `wg show dump`", took, timed(run("wg", "show", "kilo0", "dump")), messages)
    for name, (mine, others, sent) in steps.items():
        shown.add_row(*row(name, 1, mine, others, max(sent)))
    console.print(shown)
    print()


async def measure(backend: Backend) -> None:
    sh(
        "ip link add eth0 type veth peer name far && ip link set far up && ip link set eth0 up && "
        "ip address add 192.168.9.1/24 dev eth0 && ip route add default via 192.168.9.2"
    )
    wanted = os.environ.get("KILO_BENCH_ONLY", "")
    for part in (peers_come, one_changes, routes_come, leader_changes):
        if wanted in part.__name__ and not (part is routes_come and backend == "userspace"):
            await part(backend)


if __name__ == "__main__":
    found = inside()
    if found is None:
        sys.exit(run_in_worlds(__file__))
    trio.run(measure, found)
