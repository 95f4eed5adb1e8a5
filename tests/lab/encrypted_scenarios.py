"""`encrypted` with real packets: a full mesh of hosts on one network, of which half check reverse paths strictly.

`test_encrypted.py` runs it on userspace WireGuard, `encrypted_on_kernel.py` on the kernel's.
"""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from itertools import permutations

import pytest
import trio

from helpers import eventually
from helpers_lab import records
from kilo_etcd.lab.capture import Flow
from kilo_etcd.lab.client import Lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec
from kilo_etcd.model import Granularity

WIREGUARD, ETCD = 51820, 2379
STRICT = {"lan-1": 1, "lan-2": 1, "lan-3": 2, "lan-4": 2}
"""rp_filter."""
NODES = ("lan-1", "lan-2", "lan-3", "lan-4")
STRANGER = "lan-5"

SERVER = """
import socket, sys, threading
def tcp(family, address):
    listener = socket.create_server((address, 7000), family=family)
    while True:
        connection, _ = listener.accept()
        connection.sendall(b"hello")
        connection.close()
def udp(family, address):
    one = socket.socket(family, socket.SOCK_DGRAM)
    one.bind((address, 7000))
    while True:
        data, peer = one.recvfrom(2000)
        one.sendto(data, peer)
for address in sys.argv[1:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for work in (tcp, udp):
        threading.Thread(target=work, args=(family, address)).start()
"""
CLIENT = """
import socket, sys
for address in sys.argv[1:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_connection((address, 7000), timeout=5) as connection:
        assert connection.recv(9) == b"hello"
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        one.settimeout(5)
        one.sendto(b"x" * 1500, (address, 7000))
        assert len(one.recv(2000)) == 1500
"""
PROBED = (("lan-1", "lan-2"), ("lan-2", "lan-1"), ("lan-1", "lan-3"), ("lan-3", "lan-1"), ("lan-3", "lan-4"))
OPERATORS = (
    "ip rule add pref 9000 fwmark 0x42 lookup 4242",
    "ip route add default via 10.101.0.1 dev eth0 table 4242",
)
"""A rule of an operator's own, on lan-1."""
KILL_WIREGUARD = """
import os, signal
own = os.readlink("/proc/self/ns/net")
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if open(f"/proc/{pid}/comm").read() == "wireguard-go\\n" and os.readlink(f"/proc/{pid}/ns/net") == own:
            os.kill(int(pid), signal.SIGKILL)
            print(pid)
    except OSError:
        pass
"""


def one_lan(*families: str, wireguard: str = "auto") -> Spec:
    hosts = (*(HostSpec(name=name) for name in NODES), HostSpec(name=STRANGER, agent=False))
    lan = SiteSpec(name="lan", hosts=hosts)
    return Spec(sites=(lan,), granularity=Granularity.FULL, open=True, families=families, wireguard=wireguard)


async def started(lab: Lab, within: float) -> dict[str, list[str]]:
    """Wait for the mesh; the internal IPs of its hosts."""
    for name, strict in STRICT.items():
        values = [f"net.ipv4.conf.{where}.rp_filter={strict}" for where in ("all", "default", "eth0")]
        await lab.exec(name, "sysctl", "-qw", *values, check=True)
    await lab.all_pairs_ping(within, hosts=NODES)
    return await internal_ips(lab)


async def internal_ips(lab: Lab) -> dict[str, list[str]]:
    return {row.host: [address.partition("/")[0] for address in row.private] for row in await lab.status()}


async def set_to(lab: Lab, mode: str, stage: str | None) -> None:
    await lab.kgctl("mesh", "set", "internal-ips", mode, "--yes")
    await all_report(lab, stage)


async def all_report(lab: Lab, stage: str | None) -> None:
    """Wait until all nodes are at a stage of the switch."""

    async def there() -> bool:
        return {record.get("encryption") for record in (await records(lab)).values()} == {stage}

    await eventually(there, 120, every=0.1, what=f"all nodes report {stage}")


async def refuse_each_other(lab: Lab, addresses: dict[str, list[str]]) -> None:
    async def each() -> bool:
        for name in addresses.keys() - {STRANGER}:
            rules = (await lab.exec(name, "nft", "list", "table", "inet", "kilo")).stdout
            refused = rules.partition("set refuse4")[2].partition("chain ")[0]
            others = addresses.keys() - {name, STRANGER}
            if not all(address in refused for other in others for address in addresses[other]):
                return False
        return True

    await eventually(each, 120, every=0.1, what="all nodes refuse each other's packets in clear")


async def all_pairs_talk(lab: Lab, addresses: dict[str, list[str]]) -> None:
    """Ping, TCP and UDP, large enough for fragments."""

    async def one(here: str, *there: str) -> None:
        for address in there:
            assert await lab.ping(here, address, timeout=3), (here, address)
        await lab.exec(here, sys.executable, "-c", CLIENT, *there, check=True)

    async with trio.open_nursery() as nursery:
        for here, there in permutations(NODES, 2):
            nursery.start_soon(one, here, *addresses[there])


def in_clear(flows: tuple[Flow, ...]) -> list[Flow]:
    """What is neither WireGuard nor etcd, ARP, neighbour or listener discovery."""
    return [
        flow
        for flow in flows
        if flow.protocol not in ("arp", "icmpv6")
        and not (flow.protocol == "udp" and flow.between(WIREGUARD))
        and not (flow.protocol == "tcp" and flow.between(ETCD))
    ]


async def recovers(lab: Lab, addresses: dict[str, list[str]]) -> None:
    async def talk() -> bool:
        return all([await lab.ping(here, addresses[there][0], timeout=1) for here, there in permutations(NODES, 2)])

    await eventually(talk, 120, every=0.2, what="all pairs ping by themselves again")


async def nothing_in_clear(lab: Lab, within: float) -> None:
    """All goes through tunnels; who takes over a node's address gets no answer; what breaks comes back by itself."""
    async with trio.open_nursery() as servers:
        addresses = await started(lab, within)
        assert all(len(addresses[name]) == 2 for name in NODES)
        for name in NODES:
            servers.start_soon(lab.exec, name, sys.executable, "-c", SERVER, *addresses[name])
        await set_to(lab, "encrypted", "sends")
        await refuse_each_other(lab, addresses)
        explained = await lab.kgctl("explain", "lan-1", addresses["lan-2"][0])
        assert "WireGuard" in explained.stdout
        assert "not fwmark 107" in explained.stdout
        assert "not routed" not in (await lab.kgctl("status")).stdout
        for cold in (False, True):
            async with AsyncExitStack() as stack:
                seen = [await stack.enter_async_context(lab.capture(name, ["eth0"])) for name in NODES]
                if cold:
                    for name in NODES:
                        await lab.exec(name, "ip", "neigh", "flush", "all", check=True)
                await all_pairs_talk(lab, addresses)
            flows = tuple(flow for running_capture in seen for flow in running_capture.flows)
            assert in_clear(flows) == []
            echoes = [flow for flow in flows if flow.protocol == "icmpv6" and flow.bytes // flow.packets > 90]
            assert echoes == [], "nothing of ICMPv6 but discovery"
            assert any(flow.between(WIREGUARD) for flow in flows)

        # A machine that takes over a node's address.
        await lab.power_off("lan-4")
        stolen, victim = addresses["lan-4"][0], addresses["lan-1"][0]
        await lab.exec(STRANGER, "ip", "address", "add", f"{stolen}/24", "dev", "eth0", check=True)
        assert await lab.ping(STRANGER, victim, timeout=2), "under its own address, as ever"
        for name in NODES[:3]:
            await lab.exec(name, "ip", "neigh", "flush", "all", check=True)
        code = (await lab.exec(STRANGER, "ping", "-c", "2", "-W", "1", "-I", stolen, victim)).returncode
        assert code != 0, "no answer"
        assert not await lab.ping("lan-1", stolen, timeout=2), "nor is it called"
        await lab.exec(STRANGER, "ip", "address", "del", f"{stolen}/24", "dev", "eth0", check=True)
        await lab.power_on("lan-4")
        await recovers(lab, addresses)

        await lab.etcd("kill")
        assert [await lab.ping("lan-1", addresses[name][0], timeout=2) for name in NODES[1:]] == [True] * 3
        await lab.etcd("start")
        await lab.etcd_ready()
        await lab.kill("lan-2")
        await lab.start("lan-2")
        if lab.spec is not None and lab.spec.wireguard != "kernel":
            killed = await lab.exec("lan-3", sys.executable, "-c", KILL_WIREGUARD, check=True)
            assert killed.stdout.strip()
        await recovers(lab, addresses)
        await all_report(lab, "sends")
        async with lab.capture("lan-3", ["eth0"]) as after:
            for name in ("lan-1", "lan-2", "lan-4"):
                assert await lab.ping("lan-3", addresses[name][0], timeout=2)
                assert await lab.ping(name, addresses["lan-3"][0], timeout=2)
        assert in_clear(after.flows) == []
        servers.cancel_scope.cancel()


async def switched(lab: Lab, within: float) -> None:
    """Off, routed, encrypted and off under 100 pings a second in each direction; then nothing of it is left, and an
    operator's own rule for marked packets stands."""
    addresses = await started(lab, within)
    await set_to(lab, "off", None)
    for line in OPERATORS:
        await lab.exec("lan-1", *line.split(), check=True)
    untouched = {name: await traces(lab, name) for name in NODES}
    async with AsyncExitStack() as stack:
        probes = [
            await stack.enter_async_context(lab.probe(here, there, address=address))
            for here, there in PROBED
            for address in addresses[there]
        ]
        for mode, stage in (("routed", None), ("encrypted", "sends"), ("off", None)):
            await trio.sleep(1)
            await set_to(lab, mode, stage)
            if stage is not None:
                await refuse_each_other(lab, addresses)
                got = (await lab.exec("lan-1", "ip", "route", "get", "198.18.0.1", "mark", "0x42", check=True)).stdout
                assert "via 10.101.0.1 dev eth0 table 4242" in got, got
        await trio.sleep(1)
    losses = {probe.target: probe.result for probe in probes if probe.lost}
    if losses:
        pytest.fail("\n".join((str(losses), *[f"{name}:\n{await lab.log(name)}" for name in NODES])))
    assert all(probe.sent > 200 for probe in probes)

    async def as_before() -> bool:
        return {name: await traces(lab, name) for name in NODES} == untouched

    await eventually(as_before, 20, every=0.2, what="nothing of it is left")

    await set_to(lab, "encrypted", "sends")
    await lab.stop("lan-1")
    kg = (sys.executable, "-m", "kilo_etcd.agent.main")
    await lab.exec("lan-1", *kg, "--hostname", "lan-1", "--state-dir", "/var/lib/kilo-etcd", "cleanup", check=True)
    left = await traces(lab, "lan-1")
    assert "lookup 4242" in left
    assert "107" not in left, left
    assert "kilo" not in left, left
    assert not (await lab.exec("lan-1", "ls", "/var/lib/kilo-etcd/etcd-members.json")).stdout


async def traces(lab: Lab, name: str) -> str:
    """Rules, tables, the mark, nft and rp_filter of a host, as text."""
    script = (
        "ip rule; ip -6 rule; ip route show table all | grep -v 'proto kernel' | grep -v 'dev kilo0 proto 107 scope'"
        " | grep -v 'unreachable 10.4'; wg show all fwmark; nft list ruleset; cat /proc/sys/net/ipv4/conf/*/rp_filter"
    )
    return (await lab.exec(name, "sh", "-c", script)).stdout
