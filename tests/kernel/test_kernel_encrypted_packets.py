"""`encrypted` with packets: a host programmed by us, and a node on its LAN set up by hand with `ip`, `wg` and `nft`."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import trio
from attrs import evolve
from kernel_worlds import PRIVATE, plan, tunnel

from helpers import eventually
from kilo_etcd.kernel import Kernel, Setup, open_kernel
from kilo_etcd.kernel.userspace import public_key_of
from kilo_etcd.kernel.write.wireguard import raw
from kilo_etcd.model import Endpoint
from kilo_etcd.model.hostplan import Encryption, Exemption, HostPlan, PeerPlan

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_namespaces")]

A4, A6, B4, B6 = "192.168.9.1", "fd00:9::1", "192.168.9.2", "fd00:9::2"
_CLEAR = ("etcd", "exempt", "clear4", "clear6")
"""Counters of what arrives in clear. WireGuard may have something to say at any time."""
_PROBER = """
table inet prober {
  counter etcd { }
  counter exempt { }
  counter clear4 { }
  counter clear6 { }
  counter opened { }
  counter too_large { }
  chain arrives {
    type filter hook prerouting priority -400
    iifname != "eth0" accept
    udp dport 51820 accept
    tcp dport 2379 counter name etcd accept
    tcp sport 22 counter name exempt accept
    icmpv6 type { 130-136, 143 } accept
    ip saddr 192.168.9.1 counter name clear4 accept
    ip6 saddr fd00:9::1 counter name clear6 accept
  }
  chain unpacked {
    type filter hook prerouting priority -400
    iifname "wgnode" tcp flags & (syn | ack) == syn counter name opened
    iifname "wgnode" tcp option maxseg size > 1380 counter name too_large
  }
}
"""


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def node(command: str) -> str:
    """At the node set up by hand."""
    return sh(f"ip netns exec node {command}")


def counters(table: str, where: str = "") -> dict[str, int]:
    found = json.loads(sh(f"{where} nft -j list counters table inet {table}"))["nftables"]
    return {one["counter"]["name"]: one["counter"]["packets"] for one in found if "counter" in one}


def arrived() -> dict[str, int]:
    """At the node, by its LAN."""
    return counters("prober", "ip netns exec node")


def refused() -> int:
    return counters("kilo").get("clear_refused", 0)


def answered(address: str, where: str = "", *, mark: int = 0, source: str = "") -> bool:
    words = [
        "ping",
        "-c",
        "1",
        "-W",
        "1",
        "-q",
        *(["-m", str(mark)] if mark else []),
        *(["-I", source] if source else []),
    ]
    program = [*where.split(), *words, address]
    return subprocess.run(program, capture_output=True, check=False).returncode == 0


_SERVER = """
import socket, sys, threading
def echo(c):
    while data := c.recv(99): c.sendall(data)
listeners = []
for port in map(int, sys.argv[1:]):
    one = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    listeners.append(one)
print("ready", flush=True)
import selectors
s = selectors.DefaultSelector()
for one in listeners: s.register(one, 1)
while True:
    for key, _ in s.select():
        c, who = key.fileobj.accept()
        if c.getsockname()[1] == 7:
            threading.Thread(target=echo, args=(c,), daemon=True).start()
            continue
        c.sendall(who[0].encode()); c.close()
"""
_CLIENT = """
import socket, sys
address, port, mark, source, sport = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
s.settimeout(1.5)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if mark: s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
if source or sport: s.bind((source, sport))
try:
    s.connect((address, port)); print(s.recv(99).decode().removeprefix("::ffff:"))
except OSError: print("")
"""


@contextmanager
def listening(*ports: int, where: str = "") -> Iterator[None]:
    command = [*where.split(), sys.executable, "-c", _SERVER, *map(str, ports)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            process.terminate()


def connected(address: str, port: int, where: str = "", *, mark: int = 0, source: str = "", sport: int = 0) -> str:
    """Which source the server saw; empty: no connection."""
    words = [sys.executable, "-c", _CLIENT, address, str(port), str(mark), source, str(sport)]
    return subprocess.run([*where.split(), *words], check=True, capture_output=True, text=True).stdout.strip()


NODE = "ip netns exec node"
_SEND = """
import socket, sys
kind, address, sport, dport, data = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), bytes.fromhex(sys.argv[5])
if kind == "icmp":
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
else:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    s.bind(("", sport))
s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 107)
s.sendto(data, (address, dport))
"""


def sends(kind: str, address: str = A4, *, sport: int = 0, dport: int = 0, data: bytes = b"x") -> int:
    """How many packets are refused here when the node sends one in clear."""
    before = refused()
    words = [kind, address, str(sport), str(dport), data.hex()]
    subprocess.run([*NODE.split(), sys.executable, "-c", _SEND, *words], check=True, capture_output=True)
    return refused() - before


def icmp(kind: int) -> bytes:
    body = struct.pack("!BBHI", kind, 0, 0, 0) + bytes(28)
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBHI", kind, 0, ~total & 0xFFFF, 0) + bytes(28)


def private_key(path: Path) -> str:
    path.write_text(sh("wg genkey"))
    path.chmod(0o600)
    return sh(f"wg pubkey < {path}").strip()


async def other_node(strict: int, tmp_path: Path) -> str:
    """A LAN and a node there, all by hand; its public key."""
    sh(f"sysctl -qw net.ipv4.conf.all.rp_filter={strict} net.ipv4.conf.default.rp_filter={strict}")
    sh("ip netns add node && ip link add eth0 type veth peer eth0 netns node")
    for where, four, six in (("", A4, A6), (NODE, B4, B6)):
        sh(f"{where} ip link set eth0 addrgenmode none && {where} ip link set eth0 up && {where} ip link set lo up")
        sh(f"{where} ip address add {four}/24 dev eth0 && {where} ip -6 address add {six}/64 dev eth0 nodad")
    node("ip address add 192.168.9.50/24 dev eth0")
    await eventually(lambda: f"local {A6}" in sh("ip -6 route show table local"), 30, what="the address's route")
    public = private_key(tmp_path / "key")
    node("wireguard-go wgnode")
    ours = public_key_of(raw(PRIVATE))
    node(
        f"wg set wgnode private-key {tmp_path}/key listen-port 51820 fwmark 107 peer {ours} endpoint {A4}:51820 "
        f"allowed-ips 10.4.0.1/32,{A4}/32,{A6}/128"
    )
    node("ip address add 10.4.0.2/32 dev wgnode && ip netns exec node ip link set wgnode up")
    node(f"ip route add {A4} dev wgnode src {B4} table 1107 && ip netns exec node ip rule add pref 601 from {B4} "
         "ipproto udp sport 51820 lookup main")  # fmt: skip
    node(f"ip -6 route add {A6} dev wgnode src {B6} table 1107")
    node("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0 net.ipv4.conf.wgnode.rp_filter=0")
    for version, own in ((4, B4), (6, B6)):
        node(f"ip -{version} rule add pref 600 from {own} ipproto tcp sport 2379 lookup main")
        node(f"ip -{version} rule add pref 609 not fwmark 107 lookup 1107")
    (tmp_path / "prober").write_text(_PROBER)
    node(f"nft -f {tmp_path}/prober")
    return public


def plan_for(public: str, *, refuse: bool = True) -> HostPlan:
    networks = tuple(ip_network(text) for text in ("10.4.0.2/32", B4, B6))
    known = PeerPlan(public_key=public, name="node", endpoint=Endpoint.parse(f"{B4}:51820"), allowed_ips=networks)
    there = frozenset(map(ip_address, (B4, B6)))
    routes = [tunnel(f"{B4}/32", A4), tunnel(f"{B6}/128", A6)]
    return evolve(
        plan(known, tunnel("10.4.0.2/32", "10.4.0.1")),
        encryption=Encryption(
            nodes=there, send={route.destination: route for route in routes}, refuse=there if refuse else frozenset(),
            etcd=((ip_address(B4), 2379), (ip_address(B6), 2379)),
            etcd_here=(2379,), sources=(ip_address(A4), ip_address(A6)),
            clear=(Exemption.parse("tcp/22@192.168.9.0/24"),),
        ),
    )  # fmt: skip


@asynccontextmanager
async def host(wanted: HostPlan) -> AsyncIterator[Kernel]:
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        assert (await kernel.apply(wanted)).failures == ()
        yield kernel


def forget_neighbours() -> None:
    for where in ("", NODE):
        sh(f"{where} ip neigh flush all")


def grown(before: dict[str, int]) -> set[str]:
    """What has arrived in clear since."""
    return {name for name, packets in arrived().items() if name in _CLEAR and packets > before[name]}


@pytest.mark.parametrize("strict", [1, 2])
async def test_what_a_host_and_a_node_say_to_each_other_is_encrypted(strict: int, tmp_path: Path) -> None:
    public = await other_node(strict, tmp_path)
    # In clear before: so what the prober counts is what it is meant to.
    before = arrived()
    assert connected(B4, 22) == ""
    assert {"clear4"} <= grown(before)
    async with host(plan_for(public, refuse=False)) as kernel:
        # Whoever does not refuse yet takes both.
        assert answered(B4)
        assert answered(A4, NODE, mark=107)
        assert (await kernel.apply(plan_for(public))).failures == ()
        with listening(22, 2379, 8080, where=NODE):
            for cold in (False, True):
                if cold:
                    forget_neighbours()
                before = arrived()
                assert answered(B4)
                assert answered(B6)
                assert (connected(B4, 8080), connected(B6, 8080)) == (A4, A6)
                assert grown(before) == set()
                before = arrived()
                assert (connected(B4, 2379), connected(B6, 2379)) == (A4, A6)
                assert grown(before) == {"etcd"}
        assert answered(A4, NODE)
        assert answered(A6, NODE)

        # Without our nftables what we send is encrypted all the same, and etcd is reached.
        sh("nft flush ruleset")
        before = arrived()
        with listening(2379, where=NODE):
            assert answered(B4)
            assert connected(B4, 2379) == A4
        assert grown(before) == {"etcd"}


@pytest.mark.parametrize("strict", [1, 2])
async def test_what_comes_in_clear_from_a_node_is_refused(strict: int, tmp_path: Path) -> None:
    public = await other_node(strict, tmp_path)
    async with host(plan_for(public)):
        assert answered(A4, NODE)
        for address in (A4, A6):
            count = refused()
            assert not answered(address, NODE, mark=107)
            assert refused() > count
        with listening(22, 8080):
            assert connected(A4, 8080, NODE) == B4
            assert connected(A4, 8080, NODE, mark=107) == ""
            # Whoever has etcd's address opens nothing from etcd's port.
            assert connected(A4, 8080, NODE, mark=107, sport=2379) == ""
            # What is exempted gets in, and its answer back.
            before = arrived()
            assert connected(A4, 22, NODE, mark=107) == B4
            assert "exempt" in grown(before)
        assert sends("udp", dport=9, sport=9) == 1
        assert sends("udp", dport=51820, sport=9) == 0
        assert sends("udp", dport=68, sport=67) == 0
        assert sends("udp", "192.168.9.255", dport=9, sport=9) == 1
        assert [sends("icmp", data=icmp(kind)) for kind in (3, 11, 12, 8, 5)] == [0, 0, 0, 1, 1]
        # Who is no node is taken as ever, unless its source is reached by another device.
        assert answered(A4, NODE, mark=107, source="192.168.9.50")
        sh("ip link add elsewhere type veth peer beyond && ip link set elsewhere up && ip link set beyond up")
        sh("ip route add 10.77.0.0/24 dev elsewhere")
        node("ip address add 10.77.0.1/32 dev lo")
        assert not answered(A4, NODE, mark=107, source="10.77.0.1")
        assert counters("kilo").get("spoofed", 0) == (1 if strict == 1 else 0)


@pytest.mark.parametrize("strict", [1, 2])
async def test_an_etcd_in_a_container_answers_without_the_tunnel(strict: int, tmp_path: Path) -> None:
    public = await other_node(strict, tmp_path)
    sh("sysctl -qw net.ipv4.ip_forward=1")
    sh("ip netns add box && ip link add docker0 type veth peer eth0 netns box && ip link set docker0 up")
    sh("ip address add 172.17.0.1/16 dev docker0")
    for words in ("link set eth0 up", "address add 172.17.0.2/16 dev eth0", "route add default via 172.17.0.1"):
        sh(f"ip -n box {words}")
    sh("nft add table ip docker")
    sh("nft 'add chain ip docker published { type nat hook prerouting priority -100; }'")
    sh("nft 'add rule ip docker published fib daddr type local tcp dport { 2379, 8080 } dnat to 172.17.0.2'")
    async with host(plan_for(public, refuse=False)):
        sh("ip link del kilo0")
        with listening(2379, 8080, where="ip netns exec box"):
            assert connected(A4, 2379, NODE, mark=107) == B4
            assert connected(A4, 8080, NODE, mark=107) == "", "what is not etcd's does not leave in clear"


async def test_nothing_leaves_in_clear_without_the_device(tmp_path: Path) -> None:
    public = await other_node(1, tmp_path)
    async with host(plan_for(public)) as kernel:
        assert answered(B4)
        sh("ip link del kilo0")
        forget_neighbours()
        before = arrived()
        assert not answered(B4)
        assert not answered(B6)
        with listening(2379, 8080, where=NODE):
            assert connected(B4, 8080) == ""
            assert (connected(B4, 2379), connected(B6, 2379)) == (A4, A6)
        assert grown(before) == {"etcd"}
        # Nor is who asks etcd here turned away by a look-up that fails, its neighbour discovery first.
        with listening(2379):
            for address, theirs in ((A4, B4), (A6, B6)):
                forget_neighbours()
                assert connected(address, 2379, NODE, mark=107) == theirs
        with trio.fail_after(30):
            await kernel.wait_drift()
        assert (await kernel.apply(plan_for(public), fresh=True)).failures == ()
        before = arrived()
        assert answered(B4)
        assert answered(B6)
        assert grown(before) == set()
        # An address that is held is reached neither way.
        held = plan_for(public)
        assert held.encryption is not None
        hold = evolve(held, encryption=evolve(held.encryption, send={}, hold=frozenset(held.encryption.send)))
        assert (await kernel.apply(hold)).failures == ()
        before = arrived()
        assert not answered(B4)
        assert not answered(B6)
        assert grown(before) == set()


def pinging(address: str) -> subprocess.Popen[str]:
    """A hundred times a second, until SIGINT."""
    return subprocess.Popen(["ping", "-i", "0.01", "-q", address], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("strict", [1, 2])
async def test_the_switch_by_stages_loses_nothing(strict: int, tmp_path: Path) -> None:
    """On and off again under 100 packets a second, with a connection that was open before."""
    public = await other_node(strict, tmp_path)
    for version in (4, 6):
        node(f"ip -{version} rule del pref 609")
    sends = plan_for(public, refuse=False)
    assert sends.encryption is not None
    accepts = evolve(sends, encryption=evolve(sends.encryption, send={}))
    async with host(evolve(accepts, encryption=None)) as kernel:
        with listening(7, where=NODE), socket.create_connection((B4, 7), 10) as open_before:
            pings = pinging(B4)

            async def goes_on(*clear: str) -> None:
                before = arrived()
                await trio.sleep(0.2)
                open_before.sendall(b"hello")
                assert open_before.recv(99) == b"hello"
                assert grown(before) == set(clear)

            async def here(wanted: HostPlan) -> None:
                assert (await kernel.apply(wanted)).failures == ()

            await goes_on("clear4")
            await here(accepts)
            await goes_on("clear4")
            await here(sends)
            await goes_on()
            node("ip rule add pref 609 not fwmark 107 lookup 1107")
            await goes_on()
            await here(plan_for(public))
            await goes_on()
            await here(sends)
            node("ip rule del pref 609")
            await goes_on()
            await here(accepts)
            await goes_on("clear4")
            await here(evolve(accepts, encryption=None))
            await goes_on("clear4")
            pings.send_signal(signal.SIGINT)
            said = pings.communicate()[0].split("statistics ---")[1].split()
    sent, received = int(said[0]), int(said[3])
    assert sent > 30
    # The last one may have been under way.
    assert sent - received <= 1, said


async def test_a_container_reaches_a_node_by_the_hosts_own_address(tmp_path: Path) -> None:
    public = await other_node(1, tmp_path)
    sh("ip netns add box && ip link add docker0 type veth peer eth0 netns box")
    sh("ip address add 172.17.0.1/24 dev docker0 && ip link set docker0 up")
    box = "ip netns exec box"
    sh(f"{box} ip address add 172.17.0.2/24 dev eth0 && {box} ip link set eth0 up")
    sh(f"{box} ip route add default via 172.17.0.1")
    sh("sysctl -qw net.ipv4.ip_forward=1")
    sh("nft 'table ip nat { chain post { type nat hook postrouting priority 100; "
       'ip saddr 172.17.0.0/24 oifname != "docker0" counter masquerade; }; }\'')  # fmt: skip
    async with host(plan_for(public)) as kernel:
        with listening(8080, where=NODE):
            before = arrived()
            assert connected(B4, 8080, box) == A4
            assert grown(before) == set()
            # It believes that it may send 1,460 bytes at once, and the tunnel takes 1,380.
            assert (arrived()["opened"], arrived()["too_large"]) == (1, 0)
            assert counters("kilo")["outgoing"] == 1
            assert "packets 0" in sh("nft list table ip nat")
            # What the mesh knows keeps its source: the node has a route there.
            known = plan_for(public)
            assert known.encryption is not None
            behind = evolve(known.encryption, accepted_sources=(ip_network("172.17.0.0/24"),))
            sh("nft delete table ip nat")
            await kernel.apply(evolve(known, encryption=behind))
            node(f"ip route add 172.17.0.0/24 dev wgnode && {NODE} wg set wgnode peer {public_key_of(raw(PRIVATE))} "
                 f"allowed-ips 10.4.0.1/32,{A4}/32,{A6}/128,172.17.0.0/24")  # fmt: skip
            assert connected(B4, 8080, box) == "172.17.0.2"
