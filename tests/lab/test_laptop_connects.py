"""A laptop behind NAT runs `kgctl connect`, follows the mesh by names, and leaves nothing behind. With real packets."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio

from helpers import eventually, require
from helpers_lab import statuses
from kilo_etcd.lab.addressing import lay_out
from kilo_etcd.lab.capture import Flow
from kilo_etcd.lab.client import Completed, Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

KGCTL = str(Path(sys.executable).parent / "kgctl")
SECOND = ("--prefix", "/second")


def site(name: str, *hosts: HostSpec, nat: str = "") -> SiteSpec:
    return SiteSpec(name=name, hosts=hosts, nat=nat)


def host(name: str, *args: str, public: bool = True) -> HostSpec:
    return HostSpec(name=name, public=public, label=name.partition("-")[0], args=args)


SPEC = Spec(
    sites=(
        site("gcp", host("gcp-1"), host("gcp-2"), host("gcp-3", public=False)),
        site("home", host("home-1"), host("home-2", public=False)),
        site("attic", host("attic-1", "--persistent-keepalive", "5", public=False), nat="port-restricted"),
        site("far", host("far-1", *SECOND, "--subnet", "10.5.0.0/16")),
        site("cafe", host("cafe-1", public=False), nat="port-restricted"),
    ),
    lease_ttl=2,
)
NODES = ("gcp-1", "gcp-2", "gcp-3", "home-1", "home-2", "attic-1")
"""attic-1 is behind a NAT, as the laptop is: they meet by what public hosts see of both."""


class Connected:
    """A `kgctl connect` on the laptop; `ended` is how it has ended."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.pidfile = f"/run/{name}.pid"
        self.ended: Completed | None = None

    async def run(self, arguments: tuple[str, ...], task_status: trio.TaskStatus[None]) -> None:
        script = f'echo $$ >{self.pidfile}; exec "$@" 2>&1'
        task_status.started()
        self.ended = await self.lab.exec("cafe-1", "sh", "-c", script, "sh", KGCTL, *arguments)

    async def signal(self, name: str) -> None:
        await self.lab.exec("cafe-1", "sh", "-c", f"kill -{name} $(cat {self.pidfile})", check=True)


@asynccontextmanager
async def connected(lab: Lab, name: str, *arguments: str) -> AsyncIterator[Connected]:
    """`kgctl` with these arguments runs on the laptop while in the block, and is told to end at its end."""
    made = Connected(lab, name)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run, arguments)
        yield made
        await made.signal("TERM")


async def reaches(lab: Lab, *names: str) -> None:
    """The laptop pings each of them by name."""

    async def answered(name: str) -> bool:
        return (await lab.exec("cafe-1", "ping", "-c", "1", "-W", "1", name)).returncode == 0

    for name in names:
        await eventually(partial(answered, name), 30, every=0.2, what=f"laptop to {name}")


async def shown(lab: Lab, *argv: str) -> str:
    return (await lab.exec("cafe-1", *argv, check=True)).stdout


async def leader_of_gcp(lab: Lab) -> str:
    return str(next(status["leader"] for status in (await statuses(lab)).values() if status["location"] == "gcp"))


async def test_a_laptop_behind_nat_follows_two_meshes_by_name_and_leaves_nothing() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "ip", "ping")
    async with running_lab(SPEC) as lab:
        await lab.all_pairs_ping(30, hosts=NODES)
        # The host in the café has no agent any more: it is the laptop.
        await lab.stop("cafe-1")
        kg = str(Path(sys.executable).parent / "kg")
        await lab.exec("cafe-1", kg, "--hostname", "cafe-1", "--state-dir", "/var/lib/kilo-etcd", "cleanup", check=True)
        before = {what: await shown(lab, "sh", "-c", what) for what in ("ip route; ip -6 route", "cat /etc/hosts")}
        links = await shown(lab, "ip", "-o", "link")

        async with (
            # The lab's NATs know WireGuard by its port.
            connected(lab, "first", "connect", "laptop", "--dns-hosts", "--port", "51820") as first,
            connected(lab, "second", *SECOND, "connect", "laptop", "--dns-hosts") as second,
        ):
            await reaches(lab, *(f"{name}.kilo" for name in NODES), "far-1.second", "gcp-1", "far-1")
            address = (await shown(lab, "ip", "-o", "-4", "address", "show", "kilo-kilo")).split()[3].split("/")[0]
            assert address.startswith("10.4.")
            for node in ("gcp-3", "home-2"):
                assert await lab.ping(node, address, timeout=3), f"{node} to laptop"

            refused = await lab.exec("cafe-1", KGCTL, "connect", "laptop")
            assert refused.returncode == 1
            pid = (await shown(lab, "cat", first.pidfile)).strip()
            assert f"has the interface kilo-kilo already (process {pid})" in refused.stderr

            gone = await leader_of_gcp(lab)
            await lab.power_off(gone)
            await reaches(lab, *(name for name in NODES if name != gone))
            # A route that somebody takes away comes back.
            await lab.exec("cafe-1", "ip", "route", "del", "10.4.0.0/16", check=True)
            await reaches(lab, "home-2.kilo")

        for one in (first, second):
            assert one.ended is not None
            assert one.ended.returncode == 0, one.ended.stdout
            assert "Traceback" not in one.ended.stdout
        assert {what: await shown(lab, "sh", "-c", what) for what in before} == before
        assert await shown(lab, "ip", "-o", "link") == links
        left = (await lab.etcdctl("get", "--prefix", "--keys-only", "/")).stdout.split()
        assert [key for key in left if "peers/" in key or key.endswith(address)] == []


# --- an exit node
# --------------------------------------------------------------------------------------------------------

INTERNET = "192.0.2.100"
"""The operator's desk stands for a server on the internet."""
SERVER = """
import socket
with socket.create_server(("0.0.0.0", 7777)) as server:
    while True:
        connection, address = server.accept()
        with connection:
            connection.sendall(address[0].encode())
"""
CLIENT = f"""
import socket
with socket.create_connection(("{INTERNET}", 7777), timeout=2) as connection:
    print(connection.recv(99).decode())
"""
TRIES = """
import socket
for family, address in ((socket.AF_INET, "192.0.2.100"), (socket.AF_INET6, "2001:db8:2::64")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(family, kind) as one:
            one.settimeout(0.5)
            try:
                one.connect((address, 9))
                one.send(b"hello")
            except OSError:
                pass
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        try:
            one.sendto(b"hello", (address, 9))
        except OSError:
            pass
"""
"""Begins to speak to the server in each family: TCP, UDP that is connected, UDP that is not."""
EVERY = [(4, "tcp"), (4, "udp"), (4, "icmp"), (6, "tcp"), (6, "udp"), (6, "icmpv6")]
OUT = Spec(
    sites=(
        site("gcp", host("gcp-1"), host("gcp-2", public=False)),
        site("home", host("home-1")),
        site("cafe", host("cafe-1", public=False)),
    ),
    lease_ttl=2,
    families=("ipv4", "ipv6"),
    open=True,
)


async def leaving(lab: Lab, site: str, *names: str) -> list[Flow]:
    """What arrives at the server from the addresses of a site when hosts begin to speak to it, in each family."""
    assert lab.spec is not None
    layout = lay_out(lab.spec)
    own = [ip for lab_addresses in layout.hosts.values() if lab_addresses.site == site for ip in lab_addresses.public]
    addresses = set(map(str, (*layout.sites[site].wan, *own)))
    async with lab.capture("operator") as capture:
        for name in names:
            await lab.exec(name, sys.executable, "-c", TRIES, check=True)
            for version in ("-4", "-6"):
                server = INTERNET if version == "-4" else "2001:db8:2::64"
                await lab.exec(name, "ping", version, "-c", "1", "-W", "0.5", server)
    return [flow for flow in capture.flows if flow.source in addresses]


def kinds(flows: Iterable[Flow]) -> set[tuple[int, str]]:
    return {(ip_address(flow.source).version, flow.protocol) for flow in flows}


leaks = leaving  # of the site that the hosts stand in


async def seen_as(lab: Lab) -> str:
    """The address that a server on the internet sees the laptop come from; empty: it is not reached."""
    done = await lab.exec("cafe-1", sys.executable, "-c", CLIENT)
    return done.stdout.strip()


async def all_routing(lab: Lab) -> str:
    commands = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip -o link; cat /etc/hosts"
    return await shown(lab, "sh", "-c", commands)


async def test_a_laptop_leaves_by_an_exit_node_and_what_must_bypass_it_does() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "ip", "ping", "nft")
    async with running_lab(OUT) as lab, trio.open_nursery() as nursery:
        await lab.all_pairs_ping(30, hosts=("gcp-1", "gcp-2", "home-1"))
        await lab.stop("cafe-1")
        kg = str(Path(sys.executable).parent / "kg")
        await lab.exec("cafe-1", kg, "--hostname", "cafe-1", "--state-dir", "/var/lib/kilo-etcd", "cleanup", check=True)
        nursery.start_soon(lab.exec, "operator", sys.executable, "-c", SERVER)
        await eventually(lambda: direct(lab, "gcp-1"), 30, every=0.2, what="the server's answer to gcp-1")
        beside = await seen_as(lab)
        assert beside not in ("", await direct(lab, "gcp-2"))
        assert kinds(await leaks(lab, "cafe", "cafe-1")) == set(EVERY), "what would leak is seen"
        before = await all_routing(lab)

        for node, says in {
            "gcp-1": "kgctl annotate gcp-1 advertise-exit-node=true",
            "nobody": "the exit node nobody is no node of the mesh",
        }.items():
            refused = await lab.exec("cafe-1", KGCTL, "connect", "laptop", "--exit-node", node)
            assert (refused.returncode, says in refused.stderr) == (1, True), refused.stderr
        completed = await lab.kgctl("annotate", "gcp-2", "advertise-exit-node=true")
        assert "advertises itself as an exit node" in completed.stdout
        refused = await lab.exec("cafe-1", KGCTL, "connect", "laptop", "--exit-node", "gcp-2")
        assert "annotate gcp-1 with advertise-exit-node=true instead" in refused.stderr
        await lab.kgctl("annotate", "gcp-1", "advertise-exit-node=true")

        async with connected(lab, "first", "connect", "laptop", "--exit-node", "gcp-1", "--dns-hosts") as first:
            # As what comes from behind gcp's router, and not from behind the café's.
            expected = await direct(lab, "gcp-2")

            async def by_gcp() -> bool:
                return await seen_as(lab) == expected

            await eventually(by_gcp, 60, every=0.2, what="the laptop leaves by gcp")
            assert await leaks(lab, "cafe", "cafe-1") == []
            await reaches(lab, "gcp-2.kilo", "home-1.kilo")
            for outside in ("192.0.2.1", "198.51.100.1", "10.103.0.1"):
                assert " dev eth0 " in await shown(lab, "ip", "route", "get", outside), outside
            assert " dev kilo-kilo " in await shown(lab, "ip", "route", "get", INTERNET)
            assert (await lab.exec("cafe-1", "ip", "-6", "route", "get", "2001:db8::9")).returncode != 0
            assert "fwmark" in await shown(lab, "sh", "-c", "wg show kilo-kilo")

            # What somebody takes away comes back; nothing bypasses the exit node.
            (ours,) = [line for line in (await shown(lab, "ip", "rule")).splitlines() if "fwmark" in line]
            await lab.exec("cafe-1", "ip", "rule", "del", "priority", ours.partition(":")[0], check=True)
            await eventually(by_gcp, 60, every=0.2, what="the laptop leaves by gcp")
            await lab.kgctl("annotate", "gcp-1", "advertise-exit-node-", "--yes")

            async def shut() -> bool:
                return await seen_as(lab) == ""

            await eventually(shut, 30, every=0.2, what="no exit node")
            assert " dev kilo-kilo " in await shown(lab, "ip", "route", "get", INTERNET)
            assert await leaks(lab, "cafe", "cafe-1") == []
            await reaches(lab, "home-1.kilo")
            await lab.kgctl("annotate", "gcp-1", "advertise-exit-node=true")
            await eventually(by_gcp, 60, every=0.2, what="the laptop leaves by gcp")

        assert first.ended is not None
        assert first.ended.returncode == 0, first.ended.stdout
        assert "nothing leaves this machine but for the mesh" in first.ended.stdout
        assert await all_routing(lab) == before
        nursery.cancel_scope.cancel()


async def direct(lab: Lab, name: str) -> str:
    """As what address a host is seen by the server."""
    return (await lab.exec(name, sys.executable, "-c", CLIENT)).stdout.strip()
