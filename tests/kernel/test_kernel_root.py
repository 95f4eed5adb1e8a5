"""The kernel layer on a real kernel, in namespaces of the test's own: userspace WireGuard, or the kernel's in a guest.

`ip` and `wg` look at the result, as a person would.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, NoReturn

import pytest
import trio
from attrs import evolve
from hypothesis.strategies import SearchStrategy
from kernel_worlds import GATEWAY4, PRIVATE, key, lines, peer, plan, plans, tunnel, via

from helpers import eventually
from helpers_load import soon
from helpers_namespaces import is_in_force
from kilo_etcd.agent.discover import choose_addresses
from kilo_etcd.kernel import (
    PEER_PROTOCOL,
    Kernel,
    KernelError,
    Setup,
    agent_has,
    cleanup,
    leftovers,
    list_addresses,
    open_kernel,
    userspace,
)
from kilo_etcd.kernel.errors import NetlinkError
from kilo_etcd.kernel.linux import LinuxKernel
from kilo_etcd.kernel.netlink.sockets import Listener, NetlinkMessage, Socket
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.routing.returns import return_priority, return_table
from kilo_etcd.kernel.state import Change, Route, SetPeer, without_counters
from kilo_etcd.kernel.write import rtnl as requests
from kilo_etcd.model import Endpoint
from kilo_etcd.model.hostplan import HostPlan, PeerPlan, Via
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.store.status_texts import NO_WIREGUARD

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_namespaces")]

MESH = tunnel("10.4.0.0/16", "10.4.0.1")
WORLD = plan(
    peer(2, "10.4.0.2/32", "10.5.0.0/24", endpoint="192.168.9.2:51820", keepalive=25, psk=key(90)),
    peer(3, "10.4.0.3/32", "fd00:4::3/128", endpoint="[fd00:9::3]:51820"),
    MESH,
    tunnel("fd00:4::/64", "fd00:4::1"),
    via("10.7.0.0/16", GATEWAY4, source="10.4.0.1"),
    via("10.8.0.0/16", "fd00:9::77"),
    via("fd00:7::/64", "fd00:9::77", source="fd00:4::1"),
    addresses=("10.4.0.1/32", "fd00:4::1/128"),
    unreachable_routes=("10.4.0.0/16", "fd00:4::/64"),
    forwarding=(4, 6),
)
UNREACHABLE = {f"unreachable {text} metric 4294967295" for text in ("10.4.0.0/16", "fd00:4::/64 dev lo")}


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def underlay(mtu: int = 1500) -> None:
    sh(
        f"ip link add eth0 mtu {mtu} type veth peer eth1 mtu {mtu} && ip link set eth0 up && ip link set eth1 up && "
        "ip address add 192.168.9.1/24 dev eth0 && ip address add fd00:9::1/64 dev eth0 nodad"
    )
    # The kernel brings a new link up by and by, and tells of it; likewise with addresses.
    deadline = time.monotonic() + 30
    while (
        sh("ip -br link").count(" UP ") < 2 or sh("ip -br address").count("fe80::") < 2 or not is_in_force("fd00:9::1")
    ):
        assert time.monotonic() < deadline, sh("ip -br address; ip -6 route show table local")


def routes() -> set[str]:
    return {
        " ".join(line.split()).replace(" pref medium", "").replace(" metric 1024", "")
        for version in (4, 6)
        for line in sh(f"ip -{version} route show proto 107").splitlines()
    }


def unchanged() -> str:
    """Everything of the namespace that a person could compare."""
    return "".join(
        sh(command)
        for command in ("ip -br link", "ip -br address", "ip route", "ip -6 route", "ls /run/wireguard /run")
    )


@asynccontextmanager
async def agent(**values: Any) -> AsyncIterator[Kernel]:
    async with open_kernel(Setup(private_key=PRIVATE, **values)) as kernel:
        yield kernel


async def settled(kernel: Kernel, wanted: HostPlan) -> None:
    """The plan is in force, and neither memory nor a fresh look finds anything to do."""
    writes = kernel.writes
    for fresh in (False, True):
        report = await kernel.apply(wanted, fresh=fresh)
        assert lines(report.changes) == []
        assert report.failures == ()
    assert kernel.writes == writes


async def test_a_world_is_set_up_and_the_second_time_nothing_is_written() -> None:
    underlay(mtu=1400)
    async with agent() as kernel:
        preview = await kernel.preview(WORLD)
        report = await kernel.apply(WORLD)
        assert report.failures == ()
        # wireguard-go begins with the very MTU that is wanted, or not.
        assert {c for c in lines(preview) if " mtu " not in c} == {c for c in lines(report.changes) if " mtu " not in c}
        await settled(kernel, WORLD)
        observed = await kernel.observe()
        assert observed.link is not None
        assert observed.link.mtu == 1320
        assert observed.peers[key(2)].endpoint == Endpoint.parse("192.168.9.2:51820")
        assert observed.peers[key(2)].preshared_key == key(90)
    assert routes() == {
        "10.4.0.0/16 dev kilo0 scope link src 10.4.0.1",
        "10.7.0.0/16 via 192.168.9.77 dev eth0 src 10.4.0.1",
        "10.8.0.0/16 via inet6 fd00:9::77 dev eth0",
        "fd00:4::/64 dev kilo0 src fd00:4::1",
        "fd00:7::/64 via fd00:9::77 dev eth0 src fd00:4::1",
        *UNREACHABLE,
    }
    shown = sh("wg show kilo0")
    assert "listening port: 51820" in shown
    assert "allowed ips: 10.4.0.3/32, fd00:4::3/128" in shown
    assert sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding").split() == ["1", "1"]


async def test_a_preview_makes_nothing() -> None:
    underlay()
    before = unchanged()
    async with agent() as kernel:
        said = lines(await kernel.preview(WORLD))
        assert "ip link set kilo0 up" in said
        assert kernel.writes == 0
    assert unchanged() == before


@pytest.mark.parametrize(
    "harm",
    [
        "ip link del kilo0",
        "ip link set kilo0 down",
        "ip route del 10.4.0.0/16",
        "ip -6 route del fd00:4::/64",
        "ip address del 10.4.0.1/32 dev kilo0",
        "ip address add 10.4.99.99/32 dev kilo0",
        "ip route replace 10.7.0.0/16 via 192.168.9.88 proto 107",
        "ip link set eth0 down && ip link set eth0 up && ip address replace fd00:9::1/64 dev eth0 nodad",
        "ip link set kilo0 mtu 1300",
        "ip route del unreachable 10.4.0.0/16 metric 4294967295",
        "ip -6 route del unreachable fd00:4::/64 metric 4294967295",
        "ip route add unreachable 10.77.0.0/16 proto 107 metric 4294967295",
        "ip route flush proto 107",
        "ip address flush dev kilo0",
        "sysctl -q -w net.ipv4.ip_forward=0",
        "sysctl -q -w net.ipv6.conf.all.forwarding=0",
    ],
)
async def test_what_somebody_else_breaks_is_reported_and_repaired(harm: str) -> None:
    underlay()
    async with agent() as kernel:
        await kernel.apply(WORLD)
        with trio.move_on_after(0.2) as quiet:
            await kernel.wait_drift()
        assert quiet.cancelled_caught, "our own changes were taken for somebody else's"
        sh(harm)
        with trio.fail_after(30):
            assert await kernel.wait_drift()
        report = await kernel.apply(WORLD)
        assert report.failures == ()
        assert report.changes
        await settled(kernel, WORLD)


@pytest.mark.parametrize(
    "harm",
    [
        f"wg set kilo0 peer {key(2)} remove",
        f"wg set kilo0 peer {key(2)} allowed-ips 10.99.0.0/16",
        # All but its endpoint.
        f"wg set kilo0 peer {key(3)} remove peer {key(3)} allowed-ips 10.4.0.3/32,fd00:4::3/128",
        f"wg set kilo0 peer {key(2)} persistent-keepalive 77",
        f"wg set kilo0 peer {key(2)} preshared-key /dev/null",
        f"wg set kilo0 peer {key(77)} allowed-ips 10.4.0.3/32",
        "wg set kilo0 listen-port 51999",
        "wg genkey > /run/other-key && wg set kilo0 private-key /run/other-key",
        # Somebody has a configuration of this interface from before.
        f"printf '[Peer]\nPublicKey = {key(77)}\n' > /run/other.conf && wg syncconf kilo0 /run/other.conf",
    ],
)
async def test_wireguard_changed_by_hand_which_no_event_tells_is_found_soon(harm: str) -> None:
    underlay()
    async with agent() as kernel:
        await kernel.apply(WORLD)
        with trio.move_on_after(0.8) as quiet:
            await kernel.wait_drift()
        assert quiet.cancelled_caught, "our own changes were taken for somebody else's"
        sh(harm)
        with soon(5):
            assert "found undone: " in await kernel.wait_drift()
        assert (await kernel.apply(WORLD)).failures == ()
        await settled(kernel, WORLD)


async def test_what_goes_with_an_address_of_its_own_is_restored_at_once_and_nobodys_doing() -> None:
    underlay()
    moved = [evolve(route, source=ip_address("10.4.0.9")) if route.source == ip_address("10.4.0.1") else route
             for route in WORLD.routes.values()]  # fmt: skip
    addresses = (ip_interface("10.4.0.9/32"), *WORLD.addresses[1:])
    renumbered = evolve(WORLD, addresses=addresses, routes={route.destination: route for route in moved})
    # The kernel drops all routes of a device with the last address of their family.
    bare = evolve(
        WORLD,
        addresses=WORLD.addresses[1:],
        routes={each.destination: evolve(each, source=None) if each.destination.version == 4 else each
                for each in WORLD.routes.values()},
    )  # fmt: skip
    async with agent() as kernel:
        for wanted in (WORLD, renumbered, WORLD, bare, WORLD):
            report = await kernel.apply(wanted)
            assert report.failures == ()
            assert {str(route.source) for route in wanted.routes.values() if route.source} >= {
                line.split(" src ")[1].split()[0] for line in routes() if " src 10" in line
            }
            assert len(routes()) == len(WORLD.routes) + len(UNREACHABLE)
            await kernel.observe()
            with trio.move_on_after(1.0) as time_is_up:
                pytest.fail(await kernel.wait_drift())
            assert time_is_up.cancelled_caught
            await settled(kernel, wanted)


async def test_an_endpoint_that_was_learnt_is_nobodys_doing() -> None:
    underlay()
    async with agent() as kernel:
        await kernel.apply(WORLD)
        sh(f"wg set kilo0 peer {key(2)} endpoint 192.0.2.99:1")
        with trio.move_on_after(2) as quiet:
            await kernel.wait_drift()
        assert quiet.cancelled_caught


async def test_userspace_wireguard_that_does_not_answer_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    underlay()
    monkeypatch.setattr(userspace, "_ANSWER", 0.3)
    async with agent(wireguard="userspace") as kernel:
        await kernel.apply(WORLD)
        os.kill(process_of("kilo0"), signal.SIGSTOP)
        try:
            with soon(10):
                assert NO_WIREGUARD in await kernel.wait_drift()
            with pytest.raises(KernelError, match="does not answer"):
                await kernel.apply(WORLD, fresh=True)
            with trio.move_on_after(2) as quiet:
                await kernel.wait_drift()
            assert quiet.cancelled_caught, "it has been told"
        finally:
            os.kill(process_of("kilo0"), signal.SIGCONT)
        await eventually(lambda: answers(kernel))
        await settled(kernel, WORLD)


async def answers(kernel: Kernel) -> bool:
    try:
        await kernel.apply(WORLD, fresh=True)
    except KernelError:
        return False
    return True


def process_of(name: str) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"/run/wireguard/{name}.sock")
        return int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")


async def test_a_new_agent_adopts_what_the_former_left() -> None:
    underlay()
    async with agent() as kernel:
        await kernel.apply(WORLD)
    sh("ip route add 10.99.0.0/16 dev kilo0 proto 107")
    index = json.loads(sh("ip -j link show kilo0"))[0]["ifindex"]
    async with agent() as kernel:
        report = await kernel.apply(WORLD)
        assert lines(report.changes) == ["ip route del 10.99.0.0/16 dev kilo0 proto 107"]
        await settled(kernel, WORLD)
    assert json.loads(sh("ip -j link show kilo0"))[0]["ifindex"] == index


async def test_a_roamed_endpoint_stays_while_other_things_change() -> None:
    underlay()
    async with agent() as kernel:
        await kernel.apply(WORLD)
        sh(f"wg set kilo0 peer {key(2)} endpoint 198.51.100.9:4711")
        more = evolve(WORLD, peers={**WORLD.peers, key(4): peer(4, "10.4.0.4/32")})
        await kernel.apply(more, fresh=True)
        observed = await kernel.observe()
        assert observed.peers[key(2)].endpoint == Endpoint.parse("198.51.100.9:4711")
        assert key(4) in observed.peers


async def test_a_peer_that_does_not_answer_where_it_was_learnt_is_looked_for_at_its_stated_endpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    underlay()
    stated, learnt = "192.168.9.2:51820", "192.168.9.99:4711"
    wanted = plan(peer(2, "10.4.0.2/32", endpoint=stated), MESH)
    async with agent() as kernel:
        assert isinstance(kernel, LinuxKernel)
        await kernel.apply(wanted)
        sh(f"wg set kilo0 peer {key(2)} endpoint {learnt}")
        await settled(kernel, wanted)
        steady = kernel._host.handshake_clock
        since_boot = steady._boot

        async def sent() -> int:
            return (await kernel.peer_activity()).peers[key(2)].tx_bytes

        for number, made in enumerate(([], [f"wg set kilo0 peer #2 endpoint {stated}"]), 1):
            before = await sent()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as packet:
                packet.sendto(b"\0", ("10.4.0.2", 9))

            async def more(before: int = before) -> bool:
                return await sent() > before

            # WireGuard tries again every five seconds.
            await eventually(more, 30, every=0.1)
            monkeypatch.setattr(steady, "_boot", lambda number=number: since_boot() + number * 30)
            assert lines((await kernel.apply(wanted, fresh=True)).changes) == made
        await settled(kernel, wanted)


async def test_an_observed_endpoint_is_set_if_nothing_is_received_and_the_second_time_nothing_is_written() -> None:
    underlay()
    told = peer(2, "10.4.0.2/32", endpoint="192.168.9.40:40001", observed=True)
    async with agent() as kernel:
        assert (await kernel.peer_activity()).peers == {}
        await kernel.apply(plan(peer(2, "10.4.0.2/32", endpoint="192.168.9.2:51820"), MESH))
        report = await kernel.apply(plan(told, MESH))
        assert lines(report.changes) == ["wg set kilo0 peer #2 endpoint 192.168.9.40:40001"]
        await settled(kernel, plan(told, MESH))
        activity = await kernel.peer_activity()
        assert activity.peers[key(2)].endpoint == Endpoint.parse("192.168.9.40:40001")
        assert activity.silence(activity.peers[key(2)]) == float("inf")
        assert activity.peers.keys() == (await kernel.observe()).peers.keys()


async def test_thousands_of_peers_are_set_up_in_a_few_messages_whatever_is_wrong_with_one() -> None:
    def crowd(number: int) -> PeerPlan:
        public = base64.b64encode(number.to_bytes(32, "big")).decode() if number != 2010 else "no key"
        return PeerPlan(
            public_key=public, name="", allowed_ips=(ip_network(0x0A04_0000 + number), ip_network((number << 72, 56)))
        )

    underlay()
    before = evolve(plan(MESH), peers={p.public_key: p for p in map(crowd, range(1, 2000))})
    after = evolve(before, peers={**before.peers, **{p.public_key: p for p in map(crowd, range(2000, 2100))}})
    async with agent() as kernel:
        await kernel.apply(plan(MESH))
        writes = kernel.writes
        assert (await kernel.apply(before)).failures == ()
        assert kernel.writes - writes < 20
        await settled(kernel, before)
        writes = kernel.writes
        assert [failure.subject for failure in (await kernel.apply(after)).failures] == [
            "wg set kilo0 peer no key allowed-ips 10.4.7.218/32,0:0:7:da00::/56"
        ]
        assert kernel.writes - writes < 30, "those beside it are not told one by one"
    assert len(sh("wg show kilo0 allowed-ips").splitlines()) == 2098


@pytest.mark.parametrize("address", ["192.168.9.2", "fd00:9::2", "198.51.100.1"])
async def test_the_mtu_is_that_of_the_way_to_the_endpoints(address: str) -> None:
    underlay(mtu=1400)
    sh("ip route add default via 192.168.9.2 mtu 1380")
    world = plan(peer(2, "10.4.0.2/32", endpoint=str(Endpoint(ip_address(address), 51820))), MESH)
    async with agent() as kernel:
        assert (await kernel.apply(world)).failures == ()
        observed = await kernel.observe()
        assert observed.link is not None
        assert observed.link.mtu == (1300 if address.startswith("198") else 1320)
        sh("ip link set eth0 mtu 1350 && ip link set eth1 mtu 1350")
        sh("ip route replace default via 192.168.9.2 mtu 1340")
        mtu = 1340 if address.startswith("198") else 1350
        # IPv6 waits for a router to say so too.
        sh("ip address replace fd00:9::1/64 dev eth0 nodad")
        assert f"ip link set kilo0 mtu {mtu - 80}" in lines((await kernel.apply(world, fresh=True)).changes)


async def test_an_address_that_comes_while_a_plan_is_applied_is_told_all_the_same() -> None:
    underlay()
    async with agent() as kernel:
        for _ in range(2):
            await kernel.apply(WORLD, fresh=True)
        with trio.move_on_after(0.1):
            await kernel.wait_moved()
        with trio.move_on_after(0.1) as quiet:
            await kernel.wait_moved()
        assert quiet.cancelled_caught
        sh("ip address add 192.168.9.50/24 dev eth0")
        await kernel.apply(WORLD, fresh=True)
        with trio.fail_after(30):
            await kernel.wait_moved()


async def test_routes_that_we_set_ourselves_are_not_told_to_us() -> None:
    underlay()
    sock, listener = Socket(0), Listener(replies.GROUPS)
    listener.leave_out(sock.port, (replies.NEWROUTE, replies.DELROUTE))
    ours, theirs = (Route(destination=ip_network(f"10.{n}.0.0/16"), gateway=ip_address(GATEWAY4)) for n in (20, 21))

    def activity() -> list[tuple[int, str]]:
        found = []
        while events := listener.read():
            for kind, body in events:
                route = replies.read_route(body) if kind in (replies.NEWROUTE, replies.DELROUTE) else None
                found.append((kind, "" if route is None else str(route.destination)))
        return found

    while activity():
        pass
    other = Socket(0)
    for request in (requests.add_route, requests.replace_route, requests.delete_route):
        assert sock.send([request(ours, 0)]) == [None]
        assert other.send([request(theirs, 0)]) == [None]
    new, gone = (replies.NEWROUTE, "10.21.0.0/16"), (replies.DELROUTE, "10.21.0.0/16")
    assert activity() == [new, gone], "a route that replaces itself is nobody's news"
    # One of ours that another program takes away is news, and so is one that it sets with our protocol.
    assert sock.send([requests.add_route(ours, 0)]) == other.send([requests.delete_route(ours, 0)]) == [None]
    assert activity() == [(replies.DELROUTE, "10.20.0.0/16")]
    # All else that we do is told, as it always was.
    index = next(i for i, name in socket.if_nameindex() if name == "eth1")
    assert sock.send([requests.add_address(index, ip_interface("10.77.0.1/32"))]) == [None]
    assert replies.NEWADDR in {kind for kind, _ in activity()}
    for one in (sock, other, listener):
        one.close()


async def test_without_an_endpoint_the_mtu_is_that_of_the_uplink() -> None:
    underlay(mtu=1400)
    sh("ip route add default via 192.168.9.2")
    async with agent() as kernel:
        assert (await kernel.apply(plan(peer(2, "10.4.0.2/32"), MESH))).failures == ()
        assert " mtu 1320 " in sh("ip link show kilo0")


@pytest.mark.parametrize("endpoint", ["198.51.100.1:51820", "[2001:db8::1]:51820", None])
@pytest.mark.parametrize(
    "by",
    [
        "ip route add default nexthop via 192.168.9.254 dev eth0 nexthop via 192.168.8.254 dev eth2; "
        "ip -6 route add default nexthop via fe80::1 dev eth0 nexthop via fe80::2 dev eth2",
        "ip nexthop add id 1 via 192.168.9.254 dev eth0; ip nexthop add id 2 via 192.168.8.254 dev eth2; "
        "ip nexthop add id 3 group 1/2; ip route add default nhid 3; "
        "ip nexthop add id 4 via fe80::1 dev eth0; ip nexthop add id 5 via fe80::2 dev eth2; "
        "ip nexthop add id 6 group 4/5; ip -6 route add default nhid 6",
        "sysctl -w net.ipv4.nexthop_compat_mode=0; "
        "ip nexthop add id 1 via 192.168.9.254 dev eth0; ip nexthop add id 2 via 192.168.8.254 dev eth2; "
        "ip nexthop add id 3 group 1/2; ip route add default nhid 3; "
        "ip nexthop add id 4 via fe80::1 dev eth0; ip nexthop add id 5 via fe80::2 dev eth2; "
        "ip nexthop add id 6 group 4/5; ip -6 route add default nhid 6",
        # Two routes, as the kernel makes them of what two routers advertise; and a spare one.
        "ip route add default nexthop via 192.168.9.254 dev eth0 nexthop via 192.168.8.254 dev eth2; "
        "ip -6 route add default dev eth0 metric 1024; ip -6 route append default dev eth2 metric 1024; "
        "ip -6 route append default dev eth4 metric 2048",
    ],
    ids=["several", "objects", "object-numbers", "two-routers"],
)
async def test_the_narrowest_of_several_next_hops_counts(by: str, endpoint: str | None) -> None:
    underlay()
    sh("ip link add eth2 type veth peer eth3 && ip link set eth2 up && ip link set eth3 up")
    sh("ip link add eth4 mtu 1450 type veth peer eth5 && ip link set eth4 up && ip link set eth5 up")
    sh("ip address add 192.168.8.1/24 dev eth2; ip address add fd00:8::1/64 dev eth2 nodad")
    sh(by)
    world = plan(peer(2, "10.4.0.2/32", endpoint=endpoint), MESH)
    async with agent() as kernel:
        await kernel.apply(world)
        for device, mtu, other in (("eth2", 1400, "eth0"), ("eth0", 1380, "eth2")):
            sh(f"ip link set {other} mtu 1500; ip link set {device} mtu {mtu}")
            await kernel.apply(world, fresh=True)
            assert f" mtu {mtu - 80} " in sh("ip link show kilo0")
        for device in ("eth0", "eth2"):
            sh(f"ip link set {device} mtu 1350")
            with trio.fail_after(30):
                assert f"the MTU of {device}, by which endpoints are reached, is 1350" in await kernel.wait_drift()
            await kernel.apply(world)


async def test_the_mtu_follows_that_of_the_device_by_which_endpoints_are_reached() -> None:
    underlay()
    sh("ip link add eth2 type veth peer eth3 && ip link set eth2 up && ip link set eth3 up")
    async with agent() as kernel:
        await kernel.apply(WORLD)
        for mtu, wanted in ((1420, 1340), (1300, 1280), (1500, 1420)):
            sh(f"ip link set eth0 mtu {mtu}")
            with trio.fail_after(30):
                assert f"the MTU of eth0, by which endpoints are reached, is {mtu} now" in await kernel.wait_drift()
            assert (await kernel.apply(WORLD)).failures == ()
            assert f" mtu {wanted} " in sh("ip link show kilo0")
        sh("ip link set eth2 mtu 1300")
        with trio.move_on_after(0.2) as quiet:
            await kernel.wait_drift()
        assert quiet.cancelled_caught, "a device that leads to no endpoint is not ours to follow"


async def test_a_host_that_forwards_ipv6_goes_on_accepting_router_advertisements() -> None:
    underlay()
    conf = "/proc/sys/net/ipv6/conf"
    sh(f"echo 0 > {conf}/all/forwarding; echo 1 > {conf}/eth0/accept_ra; echo 0 > {conf}/eth1/accept_ra")
    accepted = f"cat {conf}/default/accept_ra {conf}/eth0/accept_ra {conf}/eth1/accept_ra"
    before = sh(accepted).split()
    assert before[1:] == ["1", "0"]
    async with agent() as kernel:
        assert (await kernel.apply(WORLD)).failures == ()
    assert sh(f"cat {conf}/all/forwarding") == "1\n"
    assert sh(accepted).split() == ["2", "2", "0"]
    await cleanup("kilo0")
    assert sh(accepted).split() == before


async def test_messages_that_are_refused_among_many_are_told_apart() -> None:
    underlay()
    index = socket.if_nametoindex("eth0")

    def routes_to(numbers: range) -> list[NetlinkMessage]:
        networks = [ip_network((0x6440_0000 + number * 256, 24)) for number in numbers]
        return [requests.add_route(Route(destination=network, device="eth0"), index) for network in networks]

    routing = Socket(0)
    try:
        assert routing.send(routes_to(range(0, 1000, 7))) == [None] * 143
        answers = routing.send(routes_to(range(1000)))
        assert [number for number, error in enumerate(answers) if error] == list(range(0, 1000, 7))
        assert {error.errno for error in answers if error} == {errno.EEXIST}
        assert {error.errno for error in routing.send(routes_to(range(1000))) if error} == {errno.EEXIST}
        assert routing.send([]) == []
        # An answer that nobody fetched, as after a time out, is nobody's answer.
        routing._submit([requests.get_link("eth1")])
        asked = [requests.get_link(name) for name in ("eth0", "none", "eth1") * 50]
        told = routing.ask(asked, replies.read_link)
        assert [found.link.name for found in told if not isinstance(found, OSError)] == ["eth0", "eth1"] * 50
        assert {error.errno for error in told if isinstance(error, OSError)} == {errno.ENODEV}
    finally:
        routing.close()


async def test_networks_move_to_the_new_leader_in_one_transaction() -> None:
    before = plan(peer(2, "10.4.0.2/32", "10.4.0.3/32", "10.5.0.0/24"), peer(3), MESH)
    after = plan(peer(2), peer(3, "10.4.0.2/32", "10.4.0.3/32", "10.5.0.0/24"), MESH)
    async with agent() as kernel:
        await kernel.apply(before)
        writes = kernel.writes
        assert lines((await kernel.apply(after)).changes) == [
            "wg set kilo0 peer #3 allowed-ips +10.4.0.2/32,+10.4.0.3/32,+10.5.0.0/24"
        ]
        assert kernel.writes == writes + 1
        await settled(kernel, after)


async def test_a_peer_is_reset_in_one_transaction() -> None:
    wanted = plan(peer(2, "10.4.0.2/32", endpoint="203.0.113.2:51820", psk=key(90)), peer(3, "10.4.0.3/32"), MESH)
    async with agent() as kernel:
        await kernel.apply(wanted)
        sh(f"wg set kilo0 peer {key(2)} endpoint 203.0.113.9:4000 && wg set kilo0 peer {key(3)} endpoint 192.0.2.1:1")
        await settled(kernel, wanted)
        writes = kernel.writes
        report = await kernel.apply(wanted, reset=[key(2)])
        assert lines(report.changes) == [
            "wg set kilo0 peer #2 remove peer #2 preshared-key (hidden) endpoint 203.0.113.2:51820 "
            "allowed-ips 10.4.0.2/32"
        ]
        assert kernel.writes == writes + 1
        await settled(kernel, wanted)
        # A peer that was only changed has the endpoint that was learnt.
        assert {k: str(p.endpoint) for k, p in (await kernel.observe()).peers.items()} == {
            key(2): "203.0.113.2:51820",
            key(3): "192.0.2.1:1",
        }


async def test_nothing_is_believed_after_an_error_between_two_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = plan(peer(2, "10.4.0.2/32"), MESH), plan(peer(3, "10.4.0.3/32"), MESH)
    async with agent() as kernel:
        assert isinstance(kernel, LinuxKernel)
        await kernel.apply(before)
        make = kernel._host.make

        def half(changes: Sequence[Change]) -> NoReturn:
            make(changes[:1])
            raise NetlinkError(errno.ENOBUFS)

        with monkeypatch.context() as patch:
            patch.setattr(kernel._host, "make", half)
            with pytest.raises(KernelError, match="No buffer space available"):
                await kernel.apply(after)
        report = await kernel.apply(before)
        assert lines(report.changes) == ["wg set kilo0 peer #3 remove"]
        await settled(kernel, before)


async def test_nothing_is_believed_of_a_new_device_after_an_error_between_two_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = plan(peer(2, "10.4.0.2/32"), MESH)
    async with agent() as kernel:
        assert isinstance(kernel, LinuxKernel)
        make = kernel._host.make

        def half(changes: Sequence[Change]) -> object:
            if any(isinstance(change, SetPeer) for change in changes):
                make(changes[:3])
                raise NetlinkError(errno.ENOBUFS)
            return make(changes)

        with monkeypatch.context() as patch:
            patch.setattr(kernel._host, "make", half)
            with pytest.raises(KernelError, match="No buffer space available"):
                await kernel.apply(wanted)
        assert "10.4.0.1/32" in sh("ip -br address show dev kilo0")
        other = plan(peer(2, "10.4.0.2/32"), tunnel("10.4.0.0/16", "10.4.0.9"), addresses=("10.4.0.9/32",))
        await kernel.apply(other)
        await settled(kernel, other)


async def test_a_kernel_that_cannot_be_read_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent() as kernel:
        assert isinstance(kernel, LinuxKernel)

        def silent(sources: object = ()) -> NoReturn:
            raise NetlinkError(errno.ENOBUFS)

        monkeypatch.setattr(kernel._host, "observe", silent)
        for call in (kernel.apply(WORLD), kernel.preview(WORLD), kernel.observe(), kernel.check()):
            with pytest.raises(KernelError, match="does not tell this host's network state: No buffer space available"):
                await call


async def test_a_failover_on_a_member_is_one_message_and_reads_nothing() -> None:
    underlay()
    before = plan(via("10.4.0.0/16", "192.168.9.2", source="10.4.0.1"))
    after = plan(via("10.4.0.0/16", "192.168.9.3", source="10.4.0.1"))
    async with agent() as kernel:
        await kernel.apply(before)
        writes = kernel.writes
        await kernel.apply(after)
        assert kernel.writes == writes + 1
        await settled(kernel, after)
    assert routes() == {"10.4.0.0/16 via 192.168.9.3 dev eth0 src 10.4.0.1"}


async def test_an_operators_routes_are_left_alone() -> None:
    underlay()
    sh("ip route add 10.7.0.0/16 via 192.168.9.66 && ip -6 route add fd00:7::/64 via fd00:9::66 metric 77")
    async with agent() as kernel:
        report = await kernel.apply(WORLD)
        assert sorted(failure.subject for failure in report.failures) == ["10.7.0.0/16", "fd00:7::/64"]
        assert "192.168.9.66" in sh("ip route show 10.7.0.0/16")
        sh("ip route del 10.7.0.0/16 via 192.168.9.66")
        with trio.fail_after(30):
            assert "in the way" in await kernel.wait_drift()
        report = await kernel.apply(WORLD)
        assert [failure.subject for failure in report.failures] == ["fd00:7::/64"]
        # Now somebody takes it over from us.
        sh("ip route replace 10.7.0.0/16 via 192.168.9.66")
        with trio.fail_after(30):
            await kernel.wait_drift()
        assert len((await kernel.apply(WORLD)).failures) == 2
    await cleanup("kilo0")
    assert "192.168.9.66" in sh("ip route show 10.7.0.0/16")
    assert "fd00:9::66" in sh("ip -6 route show fd00:7::/64")


async def test_where_the_meshs_route_cannot_be_set_packets_do_not_leave_by_the_default_route() -> None:
    underlay()
    sh("ip route add default via 192.168.9.254 && ip -6 route add default via fd00:9::254")
    wanted = plan(
        via("10.4.0.0/16", "192.168.77.1"),
        addresses=("10.4.0.1/32", "fd00:4::1/128"),
        unreachable_routes=("10.4.0.0/16", "fd00:4::/64"),
    )

    def way(address: str) -> str:
        done = subprocess.run(["ip", "route", "get", address], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    async with agent() as kernel:
        (failure,) = (await kernel.apply(wanted)).failures
        assert "its gateway 192.168.77.1 is not on a network of this host" in failure.text
        assert failure.aside, "as a leader the host would not need it"
        assert routes() == UNREACHABLE
        for address in ("10.4.0.2", "fd00:4::2"):
            assert re.search("No route to host|unreachable", way(address)), way(address)
        assert "dev kilo0" not in way("10.4.0.2")
        assert "via 192.168.9.254" in way("10.5.0.2")
        # Whoever has a route of his own gets what he asked for.
        sh("ip route add 10.4.0.0/16 via 192.168.9.253 metric 5000")
        assert "via 192.168.9.253" in way("10.4.0.2")
        await kernel.apply(evolve(wanted, unreachable_routes=()))
        assert routes() == set()


async def test_a_route_that_cannot_be_replaced_does_not_stay_as_it_was() -> None:
    underlay()
    before = plan(MESH, unreachable_routes=("10.4.0.0/16",))
    after = plan(via("10.4.0.0/16", "192.168.77.1", source="10.4.0.1"), unreachable_routes=("10.4.0.0/16",))
    unreachable = "unreachable 10.4.0.0/16 metric 4294967295"
    async with agent() as kernel:
        await kernel.apply(before)
        for _ in range(2):
            (failure,) = (await kernel.apply(after)).failures
            assert "its gateway 192.168.77.1 is not on a network of this host" in failure.text
            assert routes() == {unreachable}
        sh("ip address add 192.168.77.2/24 dev eth0")
        with trio.fail_after(30):
            await kernel.wait_drift()
        assert (await kernel.apply(after)).failures == ()
        assert routes() == {unreachable, "10.4.0.0/16 via 192.168.77.1 dev eth0 src 10.4.0.1"}
        await settled(kernel, after)


async def test_without_ipv6_on_the_device_one_failure_says_so_and_no_route_stays_as_it_was() -> None:
    underlay()
    both = ("10.4.0.1/32", "fd00:4::1/128")
    before = plan(via("fd00:7::/64", "fd00:9::254", source="fd00:4::1"), addresses=both)
    after = plan(via("fd00:7::/64", "fd00:9::253", source="fd00:4::1"), addresses=both)
    async with agent() as kernel:
        await kernel.apply(before)
        sh("sysctl -qw net.ipv6.conf.kilo0.disable_ipv6=1")
        for _ in range(2):
            (failure,) = (await kernel.apply(after)).failures
            assert failure.text.startswith("fd00:4::1/128 could not be put on kilo0: IPv6 is switched off there")
            assert "fd00:7::/64" not in sh("ip -6 route show")
        sh("sysctl -qw net.ipv6.conf.kilo0.disable_ipv6=0")
        assert (await kernel.apply(after, fresh=True)).failures == ()
        assert "fd00:7::/64 via fd00:9::253 dev eth0" in sh("ip -6 route show")
        await settled(kernel, after)


async def test_one_bad_route_does_not_stop_the_others() -> None:
    underlay()
    wanted = plan(via("10.7.0.0/16", "172.31.0.1"), via("10.8.0.0/16", GATEWAY4), MESH)
    async with agent() as kernel:
        report = await kernel.apply(wanted)
        assert [f.text.split(":")[0] for f in report.failures] == ["the route to 10.7.0.0/16 could not be set"]
        assert "172.31.0.1 is not on a network of this host" in report.failures[0].text
        assert len(routes()) == 2
        # The network appears: the kernel says so, and the route is set.
        sh("ip address add 172.31.0.9/24 dev eth0")
        with trio.fail_after(30):
            await kernel.wait_drift()
        assert (await kernel.apply(wanted)).failures == ()
        assert len(routes()) == 3


async def test_cleanup_leaves_nothing_and_may_be_called_twice() -> None:
    underlay()
    before = unchanged()
    forwarding = sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding")
    async with agent() as kernel:
        await kernel.apply(WORLD)
        if kernel.backend == "userspace":
            assert "kilo0.sock" in os.listdir("/run/wireguard")
    assert "ip link del kilo0" in lines(await cleanup("kilo0"))
    assert await cleanup("kilo0") == ()
    after = unchanged().replace("kilo-etcd\n", "")
    assert after.split() == before.split()
    assert sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding") == forwarding


RETURN_TABLE, RETURN_PRIORITY = return_table("kilo0"), return_priority("kilo0")


@pytest.mark.parametrize(
    "harm",
    [
        f"ip rule del priority {RETURN_PRIORITY}",
        f"ip -6 rule del priority {RETURN_PRIORITY}",
        f"ip route flush table {RETURN_TABLE}",
        f"ip -6 route del fd00:9::2 table {RETURN_TABLE}",
        f"ip route replace 192.168.9.2 dev eth0 proto 107 table {RETURN_TABLE}",
        f"ip route add 192.168.9.3 dev eth0 table {RETURN_TABLE}",
    ],
)
async def test_the_way_back_to_members_is_repaired_and_cleaned_up(harm: str) -> None:
    underlay()
    before = unchanged() + sh("ip rule; ip -6 rule")
    wanted = evolve(WORLD, returns={r.destination: r for r in (tunnel("192.168.9.2/32"), tunnel("fd00:9::2/128"))})
    silent = {ip_network(text): "it does not answer" for text in ("192.168.9.4/32", "fd00:9::4/128")}
    wanted = evolve(wanted, returns_refused=silent)
    async with agent() as kernel:
        assert (await kernel.apply(wanted)).failures == ()
        await settled(kernel, wanted)
        with trio.move_on_after(0.2) as quiet:
            await kernel.wait_drift()
        assert quiet.cancelled_caught, "our own changes were taken for somebody else's"
        assert "dev kilo0" in sh("ip route get 192.168.9.2 from 10.4.0.2 iif kilo0")
        assert "dev eth0" in sh("ip route get 192.168.9.2")
        assert "dev eth0" in sh("ip route get 192.168.9.4")
        for way in ("192.168.9.4 from 10.4.0.2", "fd00:9::4 from fd00:4::2"):
            assert re.search("No route to host|unreachable", sh(f"ip route get {way} iif kilo0 2>&1 || true"))
        sh(harm)
        with trio.fail_after(30):
            assert await kernel.wait_drift()
        report = await kernel.apply(wanted)
        assert report.failures == ()
        assert report.changes
        await settled(kernel, wanted)
    await cleanup("kilo0")
    assert (unchanged() + sh("ip rule; ip -6 rule")).replace("kilo-etcd\n", "").split() == before.split()


@pytest.mark.parametrize("taken", ["ip link add kilo0 type veth peer eth9", "ip tuntap add kilo0 mode tun"])
async def test_a_taken_name_is_a_sentence_and_is_not_touched(taken: str) -> None:
    sh(taken)
    before = unchanged()
    async with agent() as kernel:
        with pytest.raises(KernelError, match="kilo0 is taken by a device that is not ours"):
            await kernel.apply(WORLD)
    await cleanup("kilo0")
    assert unchanged() == before


@pytest.mark.parametrize("role", ["member", "alone"])
async def test_a_host_with_a_new_key_knows_its_device_although_no_route_leads_there(role: str) -> None:
    underlay()
    near = {network: route for network, route in WORLD.routes.items() if route.via is Via.UNDERLAY}
    wanted = evolve(WORLD, routes=near if role == "member" else {})
    async with agent() as kernel:
        assert (await kernel.apply(wanted)).failures == ()
    assert not any("dev kilo0" in route for route in routes())
    async with open_kernel(Setup(private_key=key(91))) as kernel:
        await kernel.check()
        report = await kernel.apply(wanted)
        assert report.failures == ()
        await settled(kernel, wanted)
    # Its key file is gone again.
    assert "ip link del kilo0" in " ".join(lines(await cleanup("kilo0")))
    assert "kilo0" not in sh("ip -br link")


@pytest.mark.parametrize("restarted", [False, True])
async def test_an_agent_that_has_nothing_to_change_writes_which_key_its_device_has(restarted: bool) -> None:
    """As after the upgrade of an agent that wrote no such file, or after /run/kilo-etcd was emptied."""
    underlay()
    wanted = evolve(WORLD, routes={})
    async with AsyncExitStack() as stack:
        kernel = await stack.enter_async_context(agent())
        assert (await kernel.apply(wanted)).failures == ()
        sh("rm /run/kilo-etcd/kilo0.*public-key")
        if restarted:
            await stack.aclose()
            kernel = await stack.enter_async_context(agent())
        assert (await kernel.apply(wanted)).changes == ()
        # A connection's cleanup leaves it to the agent.
        assert await agent_has("kilo0", key(92))
        assert await leftovers("kilo0", public_key=key(92), protocol=PEER_PROTOCOL) == ()
    async with open_kernel(Setup(private_key=key(91))) as kernel:
        await kernel.check()
        assert (await kernel.apply(wanted)).failures == ()
        await settled(kernel, wanted)


@pytest.mark.parametrize("length", [24, 32])
async def test_a_wireguard_device_whose_address_only_lies_within_the_meshs_is_left_alone(length: int) -> None:
    """As one that an operator has made in the place of a stopped agent's, whose unreachable routes are still there."""
    underlay()
    async with agent() as kernel:
        await kernel.apply(evolve(WORLD, routes={}))
    sh("ip address flush dev kilo0")
    sh(f"ip address add 10.4.9.9/{length} dev kilo0")
    sh("wg genkey > /run/theirs && wg set kilo0 private-key /run/theirs")
    async with open_kernel(Setup(private_key=key(91))) as kernel:
        with pytest.raises(KernelError, match="a WireGuard device of another program"):
            await kernel.check()
    await cleanup("kilo0", public_key=key(91))
    assert "kilo0" in sh("ip -br link")


async def test_a_wireguard_device_of_an_operators_is_left_alone() -> None:
    underlay()
    async with agent() as kernel:
        await kernel.apply(WORLD)
    # Nothing marks it as the mesh's.
    for version in (4, 6):
        sh(f"ip -{version} route flush proto 107")
    sh("wg genkey > /run/theirs && wg set kilo0 private-key /run/theirs")
    async with open_kernel(Setup(private_key=key(91))) as kernel:
        with pytest.raises(KernelError, match="a WireGuard device of another program"):
            await kernel.check()
    assert "kilo0" in sh("ip -br link")


async def test_a_dead_userspace_process_is_started_anew() -> None:
    underlay()
    async with agent() as kernel:
        await kernel.apply(WORLD)
        if kernel.backend == "kernel":
            return
        pid = process_of("kilo0")
        assert os.getsid(pid) != os.getsid(0)
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(30):
            assert "removed" in (said := await kernel.wait_drift()) or "deleted" in said
        report = await kernel.apply(WORLD)
        assert lines(report.changes)[0] == "wireguard-go kilo0"
        assert report.failures == ()
        await settled(kernel, WORLD)


async def test_the_userspace_command_may_have_arguments_of_its_own() -> None:
    async with agent(wireguard="userspace", userspace_command="env 'WORD=two words' wireguard-go") as kernel:
        await kernel.apply(WORLD)
        assert "listening port" in sh("wg show kilo0")
        assert "WORD=two words" in sh("tr '\\0' '\\n' </proc/$(pgrep -x wireguard-go)/environ").splitlines()
    await cleanup("kilo0")


async def test_without_userspace_wireguard_the_error_says_what_to_install() -> None:
    async with agent(wireguard="userspace", userspace_command="no-such-wireguard") as kernel:
        with pytest.raises(KernelError, match="no-such-wireguard is not installed: install it"):
            await kernel.apply(WORLD)


async def test_a_port_that_is_taken_is_a_sentence_and_the_rest_is_there() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 51820))
        async with agent() as kernel:
            report = await kernel.apply(plan(peer(2, "10.4.0.2/32"), MESH))
    # The kernel's own WireGuard opens its port when the device comes up.
    said = [failure.text for failure in report.failures]
    assert any("UDP port" in text and "taken by another program" in text for text in said), said


async def test_ipip_where_the_kernel_has_it_and_a_sentence_where_not() -> None:
    underlay()
    wanted = plan(
        via("10.4.0.0/16", "192.168.9.2", Via.IPIP, "10.4.0.1"),
        via("10.6.0.0/16", "192.168.8.8", Via.IPIP),
        tunnel("10.5.0.0/16"),
        ipip=("192.168.9.2",),
        ipip_local="192.168.9.1",
    )
    async with agent() as kernel:
        report = await kernel.apply(wanted)
        if report.failures:
            assert [f.text.split(":")[0] for f in report.failures] == ["this kernel has no IPIP (module ipip)"]
            assert os.environ.get("KILO_HAS_IPIP") is None
            assert routes() == {"10.5.0.0/16 dev kilo0 scope link"}
            # What was never made was not undone by another program.
            assert "ip link set kilo-ipip up" in lines(await kernel.preview(wanted))
            assert await kernel.preview(wanted, failed=False) == ()
            await kernel.observe()
            with trio.move_on_after(0.2) as quiet:
                await kernel.wait_drift()
            assert quiet.cancelled_caught
            return
        await settled(kernel, wanted)
        assert "10.4.0.0/16 via 192.168.9.2 dev kilo-ipip src 10.4.0.1 onlink" in routes()
        assert "ipip" in sh("ip -d link show kilo-ipip")
        sh("ip link del kilo-ipip")
        with trio.fail_after(30):
            assert "kilo-ipip was deleted" in await kernel.wait_drift()
        assert (await kernel.apply(wanted)).failures == ()
        await settled(kernel, wanted)
        assert "ip link del kilo-ipip" in lines((await kernel.apply(plan())).changes)


async def test_a_thousand_routes_and_peers() -> None:
    many = plan(*(tunnel(f"10.{20 + i // 250}.{i % 250}.0/24") for i in range(1000)))
    crowd = {}
    for i in range(600):
        one = peer(2, f"10.4.{i // 250}.{i % 250}/32", f"10.{100 + i // 250}.{i % 250}.0/24")
        name = base64.b64encode(f"{i:032d}".encode()).decode()
        crowd[name] = evolve(one, public_key=name)
    many = evolve(many, peers=crowd)
    async with agent() as kernel:
        assert (await kernel.apply(many)).failures == ()
        await settled(kernel, many)
        observed = await kernel.observe()
        assert len(observed.peers) == 600
        assert len(observed.routes) == 1000
        with trio.move_on_after(0.2) as quiet:
            await kernel.wait_drift()
        assert quiet.cancelled_caught


async def test_from_plan_to_plan_what_is_believed_is_what_is_there() -> None:
    """A walk through drawn plans: after each, a fresh look agrees with the state computed from our own changes."""
    underlay()
    drawn = _draw(plans(ipip=os.environ.get("KILO_HAS_IPIP") is not None), 25)
    async with agent() as kernel:
        for wanted in drawn:
            report = await kernel.apply(wanted)
            assert report.failures == ()
            await settled(kernel, wanted)
            observed = without_counters(await kernel.observe())
            assert {k: p.allowed_ips for k, p in observed.peers.items()} == {
                k: p.allowed_ips for k, p in wanted.peers.items()
            }
            assert set(observed.routes) == set(wanted.routes)


async def test_a_host_that_is_reached_otherwise_is_noticed() -> None:
    underlay()
    async with agent() as kernel, trio.open_nursery() as nursery:
        assert (await kernel.apply(WORLD)).failures == ()
        nursery.start_soon(kernel.wait_drift)
        for change in (
            "ip address add 192.168.77.1/24 dev eth1",
            "ip route add default via 192.168.9.254",
            "ip route del default",
            "ip address del 192.168.77.1/24 dev eth1",
            "ip address add fd00:77::1/64 dev eth1 nodad",
        ):
            with trio.move_on_after(0.3):  # what came before, our own changes with it
                while True:
                    await kernel.wait_moved()
            sh(change)
            with trio.fail_after(30):
                await kernel.wait_moved()
        # Our own interface's addresses are no news of that kind.
        with trio.move_on_after(0.3) as quiet:
            await kernel.apply(evolve(WORLD, addresses=WORLD.addresses[:1]))
            await kernel.wait_moved()
        assert quiet.cancelled_caught
        nursery.cancel_scope.cancel()


async def test_addresses_of_the_host() -> None:
    underlay()
    sh("ip route add default via 192.168.9.254 metric 100")
    host_addresses = await list_addresses()
    assert [str(a.address) for a in host_addresses.addresses if a.interface == "eth0" and a.scope == "global"] == [
        "192.168.9.1/24",
        "fd00:9::1/64",
    ]
    sh("ip route add 10.20.0.0/16 via 192.168.9.254; ip route add blackhole 10.21.0.0/16")
    sh("ip route add fd00:20::/32 dev eth0")
    # A routing daemon's.
    sh("ip route add 10.22.0.0/16 via 192.168.9.254 proto bird; ip route add 10.23.0.0/16 dev eth0 table 99")
    host_addresses = await list_addresses()
    assert [(str(route.destination), route.interface) for route in host_addresses.static_routes] == [
        ("10.20.0.0/16", "eth0"), ("fd00:20::/32", "eth0"),
    ]  # fmt: skip
    (default,) = host_addresses.default_routes
    assert (default.family, default.interface, default.gateway, default.metric) == (
        4, "eth0", ip_address("192.168.9.254"), 100,
    )  # fmt: skip


async def test_other_vpns_and_service_addresses_give_no_address() -> None:
    underlay()
    sh("ip tuntap add dev tailscale0 mode tun; ip link set tailscale0 up")
    sh("ip address add 100.92.235.32/32 dev tailscale0")
    sh("ip address add 203.0.113.80/32 dev lo; ip route add default via 192.168.9.254")

    async def chosen() -> tuple[list[str], str]:
        found = await list_addresses()
        result = choose_addresses(HostFacts(addresses=found.addresses, default_routes=found.default_routes))
        return [str(ip.ip) for ip in result.internal_ips], str(result.endpoint)

    assert await chosen() == (["192.168.9.1", "fd00:9::1"], "192.168.9.1:51820")
    # An address that moves between hosts comes first in the kernel's list here.
    sh("ip address del 192.168.9.1/24 dev eth0; ip address add 192.168.9.80/32 dev eth0")
    sh("ip address add 192.168.9.1/24 dev eth0; ip route add default via 192.168.9.254")
    assert (await chosen())[0] == ["192.168.9.1", "fd00:9::1"]
    sh("ip address del 192.168.9.1/24 dev eth0; ip address del 192.168.9.80/32 dev eth0")
    assert await chosen() == (["fd00:9::1"], "[fd00:9::1]:51820")
    # As on hosts that announce their own address to routers.
    sh("ip route add default dev eth0 src 203.0.113.80")
    assert await chosen() == (["fd00:9::1"], "203.0.113.80:51820")


@pytest.mark.parametrize(
    ("by", "told"),
    [
        ("nexthop via 192.168.9.254 dev eth0 nexthop via 192.168.8.254 dev eth1", True),
        ("nhid 3", True),
        ("nhid 3", False),
    ],
)
async def test_each_next_hop_of_a_route_counts(by: str, told: bool) -> None:
    """`told`: whether the kernel tells of a route what its nexthop object says."""
    underlay()
    sh("ip address add 192.168.8.1/24 dev eth1")
    if by.startswith("nhid"):
        sh(f"sysctl -w net.ipv4.nexthop_compat_mode={int(told)}")
        sh("ip nexthop add id 1 via 192.168.9.254 dev eth0; ip nexthop add id 2 via 192.168.8.254 dev eth1")
        sh("ip nexthop add id 3 group 1/2")
    sh(f"ip route add default {by}; ip route add 10.20.0.0/16 {by}")
    sh("ip -6 route add default nexthop via fe80::1 dev eth0 nexthop via fe80::2 dev eth1")
    found = await list_addresses()
    assert {(route.interface, str(route.gateway)) for route in found.default_routes} == {
        ("eth0", "192.168.9.254"), ("eth1", "192.168.8.254"), ("eth0", "fe80::1"), ("eth1", "fe80::2"),
    }  # fmt: skip
    assert [(str(route.destination), route.interface) for route in found.static_routes] == [
        ("10.20.0.0/16", "eth0"), ("10.20.0.0/16", "eth1"),
    ]  # fmt: skip


def _draw(strategy: SearchStrategy[HostPlan], count: int) -> list[HostPlan]:
    from hypothesis import HealthCheck, Phase, given, settings

    drawn: list[HostPlan] = []

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(one: HostPlan) -> None:
        drawn.append(one)

    collect()
    return drawn
