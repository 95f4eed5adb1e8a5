"""Internal IPs that are routed through the tunnels, with real packets: two sites with networks of their own, and two
homes whose networks have the same numbers."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import trio
from test_leader_faults import in_line

from helpers import eventually, require
from helpers_lab import leads, statuses
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

WIREGUARD = 51820

SERVER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7000))
print("listening", flush=True)
connection, peer = listener.accept()
print(peer[0], flush=True)
while data := connection.recv(4096):
    connection.sendall(data)
"""
CLIENT = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7000), timeout=30)
end, count = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    connection.sendall(b"%6d" % count)
    received = b""
    while len(received) < 6:
        received += connection.recv(6 - len(received))
    assert int(received) == count
    count += 1
    time.sleep(0.05)
print(count)
"""


def site(name: str, network: str, *hosts: HostSpec) -> SiteSpec:
    return SiteSpec(name=name, subnets=(network,), hosts=hosts)


def host(name: str, *, public: bool = False, agent: bool = True) -> HostSpec:
    """At the location that its name begins with."""
    return HostSpec(name=name, public=public, agent=agent, label=name.partition("-")[0] if agent else None)


async def internal_ips(lab: Lab) -> dict[str, str]:
    return {row.host: row.private[0].partition("/")[0] for row in await lab.status()}


async def leads_not(lab: Lab, name: str) -> bool:
    """Whether the members of gcp follow another host."""
    found = await statuses(lab)
    return all(found.get(member, {}).get("leader", name) != name for member in lab.hosts if member.startswith("gcp"))


async def missing(lab: Lab, addresses: dict[str, str]) -> list[tuple[str, str]]:
    """The ordered pairs of hosts that do not ping at internal IPs."""
    result = []

    async def one(here: str, there: str) -> None:
        if not await lab.ping(here, addresses[there], timeout=1):
            result.append((here, there))

    async with trio.open_nursery() as nursery:
        for here, there in permutations(addresses, 2):
            nursery.start_soon(one, here, there)
    return sorted(result)


async def test_two_sites_reach_each_other_at_their_internal_ips() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip", "ping")
    spec = Spec(
        open=True,
        sites=(
            site("gcp", "10.1.0.0/24", host("gcp-1", public=True), host("gcp-2", public=True), host("gcp-3")),
            site("home", "10.2.0.0/24", host("home-1", public=True), host("home-2", public=True), host("home-3")),
        ),
    )
    async with running_lab(spec) as lab:
        await lab.all_pairs_ping(30)
        addresses = await internal_ips(lab)

        async def all_answer() -> bool:
            return not await missing(lab, addresses)

        await eventually(all_answer, 30, every=0.2, what="30 pairs ping at internal IPs")

        before = {name: (await lab.counters(name))["other"].packets for name in ("gcp", "home")}
        async with lab.capture("internet", ["site1", "site2"]) as between, lab.capture("home-3", ["eth0"]) as at_home:
            assert await missing(lab, addresses) == []
        clear = [flow for flow in between.flows if flow.protocol == "icmp" or flow.source.startswith("10.")]
        assert clear == []
        assert any(flow.protocol == "udp" and flow.between(WIREGUARD) for flow in between.flows)
        assert {name: (await lab.counters(name))["other"].packets for name in before} == before
        # Each is seen under its internal IP, not under the mesh's or a leader's.
        seen = {
            flow.source for flow in at_home.flows if flow.protocol == "icmp" and flow.destination == addresses["home-3"]
        }
        assert seen >= {addresses[name] for name in ("gcp-1", "gcp-2", "gcp-3")}

        await check_session(lab, addresses)
        await check_switch(lab, addresses)


async def test_a_member_whose_own_way_to_its_leader_is_broken_keeps_no_other_hosts_internal_ips_from_being_routed() -> (
    None
):
    """gcp-2 may take over with its private endpoint, and as long as it may, home-1 sends no packet to gcp's internal
    IPs that WireGuard could take for its own."""
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip", "ping")
    spec = Spec(
        agent_args=("--encapsulate", "wireguard"),
        sites=(
            site("gcp", "10.1.0.0/24", host("gcp-1", public=True), host("gcp-2"), host("gcp-3")),
            site("home", "10.2.0.0/24", host("home-1", public=True), host("home-2")),
        ),
    )
    async with running_lab(spec) as lab:
        first, (broken, _) = await in_line(lab, 3)
        addresses = await internal_ips(lab)
        healthy = {name: address for name, address in addresses.items() if name != broken}

        async def all_answer() -> bool:
            return not await missing(lab, healthy)

        await eventually(all_answer, 30, every=0.2, what="the hosts ping at internal IPs")
        rules = (
            "add table inet foreign",
            "add chain inet foreign out { type filter hook output priority 0; }",
            f"add rule inet foreign out ip daddr {addresses[first]} udp dport {WIREGUARD} drop",
        )
        await lab.exec(broken, "nft", "; ".join(rules), check=True)

        async def unconfirmed() -> bool:
            found = await lab.etcdctl("get", "--prefix", "--print-value-only", f"/kilo/by/{broken}/probe-reports/")
            return bool(found.stdout.strip()) and json.loads(found.stdout)["unconfirmed"] is True

        await eventually(unconfirmed, 60, every=0.2, what=f"{broken} says that nobody confirms its report")
        await eventually(all_answer, 10, every=0.2, what="the healthy hosts ping at internal IPs again")
        assert await missing(lab, addresses) != [], f"{broken} is cut off"
        # A leader that forwards nothing is replaced all the same.
        await lab.cut(first, "forwarding")
        await eventually(partial(leads_not, lab, first), 30, every=0.2, what=f"another leads than {first}")


async def test_what_drops_packets_by_internal_ips_alone_is_found() -> None:
    require("etcd", "etcdctl", "wireguard-go", "nft", "ip")
    spec = Spec(
        open=True,
        sites=(
            site("gcp", "10.1.0.0/24", host("gcp-1", public=True), host("gcp-2"), host("gcp-3")),
            site("home", "10.2.0.0/24", host("home-1", public=True), host("home-2"), host("home-3")),
        ),
    )
    async with running_lab(spec) as lab:
        await lab.all_pairs_ping(60)
        addresses = await internal_ips(lab)

        async def findings() -> list[tuple[str, str]]:
            document = json.loads((await lab.kgctl("check", "-o", "json", check=False)).stdout)
            return [(one["subject"], one["text"]) for one in document if one["severity"] == "error"]

        async def explained(here: str, to: str) -> dict[str, Any]:
            document = json.loads((await lab.kgctl("explain", here, to, "--live", "-o", "json", check=False)).stdout)
            (trace,) = document["internal"] or document["traces"]
            return {**trace, "all": document["works"], "live": document["live"]}

        async def well() -> bool:
            return await findings() == [] and (await explained("gcp-2", "home-2"))["answered"] is True

        async def under_own_address() -> bool:
            """As long as a host that is called at a private endpoint leads, or is about to, gcp-2 sends from its mesh
            address instead."""
            trace = await explained("gcp-2", "home-2")
            return bool(trace["there"]["source"] == f"gcp-2 ({addresses['gcp-2']})")

        await eventually(well, 60, every=0.5, what="all is well, and internal IPs are tried")
        await eventually(under_own_address, 60, every=0.5, what="the public hosts lead")
        for to in ("home-2", addresses["home-2"]):
            found = await explained("gcp-2", to)
            assert (found["works"], found["all"], found["answered"]) == (True, True, True)
            assert found["there"]["source"] == f"gcp-2 ({addresses['gcp-2']})"
            route = f"{addresses['home-2']} via {addresses['gcp-1']} dev eth0"
            assert found["there"]["kernelsRoute"] == route
        chain = (
            "nft add table inet x; nft add chain inet x c '{{ type filter hook {} priority -10; }}'; "
            "nft add rule inet x c {}"
        )
        faults = {
            "home-2": ("home-2", chain.format("input", "ip saddr 10.1.0.0/24 drop"), "nft delete table inet x"),
            "gcp-1": ("gcp-1", chain.format("forward", "ip daddr 10.2.0.0/24 drop"), "nft delete table inet x"),
            "gcp-2": (
                "gcp-2", "ip route add default dev eth0 table 99; ip rule add pref 50 to 10.2.0.0/24 lookup 99",
                "ip rule del pref 50; ip route flush table 99",
            ),
        }  # fmt: skip
        for subject, (where, break_it, mend) in faults.items():
            await lab.exec(where, "sh", "-c", break_it, check=True)
            assert await lab.missing_pings() == [], "mesh addresses are reached"

            async def named(subject: str = subject) -> bool:
                found = await findings()
                return bool(found) and all(name == subject or subject in name.split(" - ") for name, _ in found)

            await eventually(named, 20, every=0.5, what=f"check names {subject}")
            found = await explained("gcp-2", "home-2")
            assert (found["works"], found["all"]) == (False, False), (subject, found)
            assert subject in str(found["live"])
            if subject == "gcp-2":
                assert found["there"]["kernelsRoute"] == (
                    f"{addresses['home-2']} dev eth0 table 99, "
                    "by ip -4 rule priority 50 from all to 10.2.0.0/24 lookup 99"
                )
                assert "by another route than the agent's" in found["says"]
            await lab.exec(where, "sh", "-c", mend, check=True)
            await eventually(well, 30, every=0.5, what="all is well again")


async def check_session(lab: Lab, addresses: dict[str, str]) -> None:
    """A TCP session between members, to an internal IP, outlives the crash of the leaders on both sides."""
    here, there = "gcp-3", "home-3"
    results: dict[str, str] = {}

    async def run(name: str, *argv: str) -> None:
        results[name] = (await lab.exec(name, sys.executable, "-c", *argv, check=True)).stdout

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, there, SERVER, addresses[there])

        async def listening() -> bool:
            return ":7000" in (await lab.exec(there, "ss", "-ltn")).stdout

        await eventually(listening, 20, every=0.1, what="the server listens")
        nursery.start_soon(run, here, CLIENT, addresses[there], "20")
        await trio.sleep(1)
        for location in ("gcp", "home"):
            leader = await leads(lab, f"{location}-1", f"{location}-2", f"{location}-3")
            assert leader not in (here, there)
            await lab.power_off(leader)
            await eventually(
                lambda: lab.ping(here, addresses[there], timeout=1), 20, every=0.1, what="the next leader forwards"
            )
    assert int(results[here]) > 50
    assert addresses[here] in results[there], "under its internal IP"
    for name in lab.hosts:
        if (await lab.host(name)).agent == "off" or (await lab.host(name)).agent_pid is None:
            await lab.power_on(name)


async def check_switch(lab: Lab, addresses: dict[str, str]) -> None:
    """Off and on again, live: the routes go and come, the mesh stays."""
    await lab.all_pairs_ping(60)
    await lab.kgctl("mesh", "set", "internal-ips", "off", "--yes")

    async def routes(name: str) -> set[str]:
        shown = json.loads((await lab.exec(name, "ip", "-j", "route", check=True)).stdout)
        return {route["dst"] for route in shown}

    async def none_left() -> bool:
        return all(not routes_of & set(addresses.values()) for routes_of in [await routes(n) for n in lab.hosts])

    await eventually(none_left, 20, every=0.2, what="no route to an internal IP is left")
    assert await lab.missing_pings() == []
    await lab.kgctl("mesh", "set", "internal-ips", "routed", "--yes")

    async def all_answer() -> bool:
        return not await missing(lab, addresses)

    await eventually(all_answer, 30, every=0.2, what="30 pairs ping at internal IPs again")


async def test_networks_with_the_same_numbers_keep_what_is_theirs() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip", "ping")
    spec = Spec(
        open=True,
        sites=(
            site(
                "home", "192.168.1.0/24", host("home-1", public=True), host("home-2"), host("printer", agent=False),
            ),
            site(
                "cabin", "192.168.1.0/24",
                host("camera", agent=False), host("cabin-2", public=True), host("cabin-3"), host("cabin-4"),
            ),
            site("gcp", "10.1.0.0/24", host("gcp-1", public=True), host("gcp-2")),
        ),
    )  # fmt: skip
    nodes = ["home-1", "home-2", "cabin-2", "cabin-3", "cabin-4", "gcp-1", "gcp-2"]
    async with running_lab(spec) as lab:
        await lab.all_pairs_ping(30, hosts=nodes)
        addresses = await internal_ips(lab)
        assert addresses["home-2"] == addresses["cabin-2"]
        assert addresses["printer"] == addresses["cabin-3"]
        assert addresses["camera"] == addresses["home-1"]

        async def routed(name: str) -> set[str]:
            shown = json.loads((await lab.exec(name, "ip", "-j", "route", check=True)).stdout)
            return {route["dst"] for route in shown} & set(addresses.values())

        # From elsewhere each can be told apart but the one that two have.
        mine, theirs = {addresses["gcp-1"], addresses["gcp-2"]}, {addresses[name] for name in ("cabin-3", "cabin-4")}
        expected = {
            **dict.fromkeys(("gcp-1", "gcp-2"), theirs | {addresses["home-1"]}),
            **dict.fromkeys(("home-1", "home-2", "cabin-2", "cabin-3", "cabin-4"), mine),
        }

        async def as_expected() -> bool:
            return {name: await routed(name) for name in nodes} == expected

        await eventually(as_expected, 30, every=0.2, what="routes to what cannot be mistaken")
        neighbours = {
            "home-1": ("home-2", "printer"),
            "home-2": ("home-1", "printer"),
            "cabin-2": ("camera", "cabin-3", "cabin-4"),
            "cabin-4": ("camera", "cabin-2"),
        }
        for name, near in neighbours.items():
            async with lab.capture(name, ["kilo0"]) as tunnel:
                for other in near:
                    assert await lab.ping(name, addresses[other], timeout=2), (name, other)
            assert not [flow for flow in tunnel.flows if flow.destination in {addresses[other] for other in near}]
        for here, there in (("gcp-1", "home-1"), ("gcp-2", "cabin-4"), ("cabin-4", "gcp-2"), ("home-2", "gcp-2"),
                            ("gcp-2", "cabin-3")):  # fmt: skip
            assert await lab.ping(here, addresses[there], timeout=2), (here, there)
        assert await lab.missing_pings(*nodes) == []
