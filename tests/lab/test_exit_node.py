"""Nodes that leave for the internet by another node: what goes through, what bypasses the exit node, and that nothing
leaks.

The labs are open: their routers deliver everything, so that what leaks arrives at the server, and is seen there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import trio
from test_laptop_connects import CLIENT, EVERY, INTERNET, SERVER, direct, host, kinds, leaks, leaving, site

from helpers import eventually, require
from kilo_etcd.lab.addressing import lay_out
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

SPEC = Spec(
    sites=(
        site("gcp", host("gcp-1"), host("gcp-2", public=False)),
        site("home", host("home-1"), host("home-2", public=False)),
    ),
    lease_ttl=2,
    families=("ipv4", "ipv6"),
    open=True,
)
HOME = ("home-1", "home-2")
FIREWALLD = """
table inet firewalld {
    chain mangle_PREROUTING {
        type filter hook prerouting priority mangle + 10; policy accept;
        icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
        meta nfproto ipv6 fib saddr . mark . iif oif missing drop
    }
}
"""
"""What firewalld does by default: it drops what comes in another way than its source is reached."""
INWARD = "7778"
"""Stands for ssh: what somebody on the internet reaches home-1 at."""


CALLED = """
import socket, sys, threading
def serve():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
        udp.bind((sys.argv[1], 7779))
        while True:
            data, address = udp.recvfrom(99)
            udp.sendto(data, address)
threading.Thread(target=serve, daemon=True).start()
with socket.create_server(("::", 7779), family=socket.AF_INET6) as server:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(connection.recv(99))
"""
"""Answers whoever calls in IPv6, by TCP and by UDP; UDP from one address, as programs for hosts with several do."""
CALL = """
import socket, sys
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    with socket.socket(socket.AF_INET6, kind) as caller:
        caller.settimeout(2)
        caller.connect((sys.argv[1], 7779))
        caller.send(b"hello")
        assert caller.recv(99) == b"hello"
"""


async def shown(lab: Lab, *argv: str, node: str) -> str:
    return (await lab.exec(node, *argv, check=True)).stdout


async def seen(lab: Lab) -> dict[str, str]:
    return {name: await direct(lab, name) for name in HOME}


async def test_nodes_leave_by_an_exit_node_answer_who_calls_them_and_leak_nothing() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "ip", "ping", "nft")
    async with running_lab(SPEC) as lab, trio.open_nursery() as nursery:
        await lab.all_pairs_ping(30)
        nursery.start_soon(lab.exec, "operator", sys.executable, "-c", SERVER)
        nursery.start_soon(lab.exec, "home-1", sys.executable, "-c", SERVER.replace("7777", INWARD))
        public6 = str(next(ip for ip in lay_out(SPEC).hosts["home-1"].public if ip.version == 6))
        nursery.start_soon(lab.exec, "home-1", sys.executable, "-c", CALLED, public6)
        await eventually(lambda: direct(lab, "gcp-1"), 30, every=0.2, what="the server's answer to gcp-1")
        beside, expected = await seen(lab), await direct(lab, "gcp-2")
        assert expected not in beside.values()
        assert all(beside.values())
        public = await shown(
            lab, "ip", "-4", "-o", "addr", "show", "dev", "eth0", "to", beside["home-1"], node="home-1"
        )
        assert beside["home-1"] in public
        call = CLIENT.replace(INTERNET, beside["home-1"]).replace("7777", INWARD)

        async def called() -> str:
            """What a host on the internet receives from home-1, at its public address."""
            return (await lab.exec("operator", sys.executable, "-c", call)).stdout.strip()

        async def called6() -> bool:
            """Whether home-1 answers at its public IPv6 address: pings, TCP, UDP."""
            done = await lab.exec("operator", sys.executable, "-c", CALL, public6)
            return done.returncode == 0 and await lab.ping("operator", public6)

        async def all_by(address: str) -> bool:
            return set((await seen(lab)).values()) == {address}

        assert await called() == INTERNET
        await lab.exec("home-1", "nft", "-f", "-", input=FIREWALLD, check=True)
        await eventually(called6, 30, every=0.2, what="answers in IPv6")
        assert kinds(await leaks(lab, "home", *HOME)) == set(EVERY), "what would leak is seen"
        rules = await shown(lab, "ip", "rule", node="home-1")

        # Refused in a sentence: no exit node, a member before its leader.
        refused = await lab.kgctl("annotate", "home-1", "exit-node=gcp-1", "--yes", check=False)
        assert (refused.returncode, "kgctl annotate gcp-1 advertise-exit-node=true" in refused.stderr) == (1, True), (
            refused.stderr
        )
        await lab.kgctl("annotate", "gcp-1", "advertise-exit-node=true")
        leader = await leader_of(lab)
        (member,) = set(HOME) - {leader}
        refused = await lab.kgctl("annotate", member, "exit-node=gcp-1", "--yes", check=False)
        assert f"kgctl annotate {leader} exit-node=gcp-1 too" in refused.stderr, refused.stderr

        for name in (leader, member):
            await lab.kgctl("annotate", name, "exit-node=gcp-1", "--yes")
        await eventually(lambda: all_by(expected), 60, every=0.2, what="both leave by gcp-1")
        assert await leaks(lab, "home", *HOME) == []
        assert await called() == INTERNET
        assert await called6()
        await lab.all_pairs_ping(30)
        hosts = lay_out(SPEC).hosts
        for name in HOME:
            for one, two in zip(hosts[name].private, hosts["gcp-2"].private, strict=True):
                assert await lab.ping(name, str(two.ip)), f"{name} to gcp-2's internal IP {two.ip}"
                assert await lab.ping("gcp-2", str(one.ip)), f"gcp-2 to {name}'s internal IP {one.ip}"
        for outside in ("192.0.2.1", "198.51.100.1", "169.254.169.254", "10.102.0.1"):
            assert " dev eth0 " in await shown(lab, "ip", "route", "get", outside, node="home-1"), outside
        for name in HOME:
            way = await lab.exec(name, "ip", "-6", "route", "get", "2001:db8::9")
            assert " dev eth0 " not in way.stdout, name

        # Who led follows, and the other way round; nobody is let out beside the tunnel meanwhile.
        await lab.stop(leader)
        await eventually(lambda: all_by(expected), 60, every=0.2, what="both leave by gcp-1 with another leader")
        # Whoever flushes nftables while no agent runs loses the answers in IPv6, and nothing leaks.
        alone = leader
        await lab.exec(alone, "nft", "flush", "ruleset", check=True)
        assert await leaks(lab, "home", alone) == []
        if alone == "home-1":
            assert await called() == INTERNET
            assert not await called6()
        await lab.start(leader)
        await lab.kgctl("wait")

        # The exit node is none any more: blocked, although home's router would let it all through.
        await lab.kgctl("annotate", "gcp-1", "advertise-exit-node-", "--yes")
        await eventually(lambda: all_by(""), 60, every=0.2, what="nobody gets out")
        assert await leaks(lab, "home", *HOME) == []
        assert await called() == INTERNET
        assert await called6()
        for name in HOME:
            await lab.exec(name, "ip", "link", "del", "kilo0", check=True)
            assert await leaks(lab, "home", name) == []
        await eventually(called6, 30, every=0.2, what="answers in IPv6 again")
        await lab.all_pairs_ping(30)
        status = (await lab.kgctl("status")).stdout
        assert (
            "node gcp-1 does not advertise itself as an exit node; allow it with kgctl annotate gcp-1 "
            "advertise-exit-node=true" in status
        )
        assert "until then nothing leaves home-1 but for" in (await lab.kgctl("check", check=False)).stdout

        for name in HOME:
            await lab.kgctl("annotate", name, "exit-node-", "--yes")

        async def as_before() -> bool:
            return await seen(lab) == beside

        await eventually(as_before, 60, every=0.2, what="both leave by their own network again")
        assert await shown(lab, "ip", "rule", node="home-1") == rules
        # Cleaning up takes all of it away.
        await lab.kgctl("annotate", "gcp-1", "advertise-exit-node=true")
        for name in ((await leader_of(lab)), *HOME):
            await lab.kgctl("annotate", name, "exit-node=gcp-1", "--yes")
        await eventually(lambda: all_by(expected), 60, every=0.2, what="both leave by gcp-1 again")
        await lab.stop("home-1")
        kg = str(Path(sys.executable).parent / "kg")
        await lab.exec("home-1", kg, "--hostname", "home-1", "--state-dir", "/var/lib/kilo-etcd", "cleanup", check=True)
        left = await shown(lab, "sh", "-c", "ip rule; ip route show table all", node="home-1")
        assert ("fwmark" in left, "proto 107" in left) == (False, False), left
        assert await direct(lab, "home-1") == beside["home-1"]
        nursery.cancel_scope.cancel()


async def leader_of(lab: Lab) -> str:
    report = json.loads((await lab.kgctl("status", "-o", "json")).stdout)
    return str(next(row["leader"] for row in report["locations"] if row["location"] == "home"))


MESH6 = Spec(
    sites=(site("gcp", host("gcp-1")), site("home", host("home-1"))),
    agent_args=("--subnet", "fd00:4::/64"),
    lease_ttl=2,
    families=("ipv4", "ipv6"),
    open=True,
)


async def test_in_an_ipv6_mesh_ipv4_is_closed_and_ipv6_goes_through_or_nowhere() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "ip", "ping", "nft")
    await in_an_ipv6_mesh(MESH6)


async def in_an_ipv6_mesh(spec: Spec, within: float = 30) -> None:
    """`within`: seconds for anything to come about."""
    async with running_lab(spec) as lab, trio.open_nursery() as nursery:
        await lab.all_pairs_ping(within)
        public6 = str(next(ip for ip in lay_out(spec).hosts["home-1"].public if ip.version == 6))
        nursery.start_soon(lab.exec, "home-1", sys.executable, "-c", CALLED, public6)

        async def called6() -> bool:
            done = await lab.exec("operator", sys.executable, "-c", CALL, public6)
            return done.returncode == 0 and await lab.ping("operator", public6)

        async def through_gcp() -> bool:
            return kinds(await leaving(lab, "gcp", "home-1")) == {(6, kind) for kind in ("tcp", "udp", "icmpv6")}

        assert kinds(await leaks(lab, "home", "home-1")) == set(EVERY), "what would leak is seen"
        await lab.kgctl("annotate", "gcp-1", "advertise-exit-node=true")
        await lab.kgctl("annotate", "home-1", "exit-node=gcp-1", "--yes")
        await eventually(through_gcp, within, every=0.2, what="home-1 leaves by gcp-1 in IPv6")
        assert await leaks(lab, "home", "home-1") == []
        await eventually(called6, within, every=0.2, what="answers in IPv6")
        await lab.kgctl("annotate", "gcp-1", "advertise-exit-node-", "--yes")

        async def closed() -> bool:
            return not await leaving(lab, "gcp", "home-1")

        await eventually(closed, within, every=0.2, what="nothing leaves by gcp-1")
        assert await leaks(lab, "home", "home-1") == []
        await eventually(called6, within, every=0.2, what="answers in IPv6")
        nursery.cancel_scope.cancel()
