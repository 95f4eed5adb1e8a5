"""`kgctl check` in a lab in which one thing at a time is broken.

It exits with 1 and names the cause as long as a pair of hosts that should reach each other does not, and says nothing
more when the fault is undone. Each fault is one that the agents cannot repair, so that the pairs stay apart until
somebody does something.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from attrs import frozen

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.beside, pytest.mark.deadline(1200)]

DEAD = 30.0
"""Seconds until a fault has cut its pair off, at most."""

TOLD = 40.0
"""Seconds after that until `check` names the cause, at most."""

WELL = 60.0
"""Seconds until all is well again once the fault is undone, at most; WireGuard may have to begin a handshake again."""

DEMOTED = "for some minutes it leads only if"
"""Of a leader that was demoted: it is named for some minutes after it forwards again."""

Act = Callable[[Lab], Awaitable[object]]


@frozen(kw_only=True)
class Fault:
    """One thing that is broken.

    At least one host of `cut_off` is reached by somebody no more; a finding of `check` has to match `named` (a regular
    expression over subject, text and remedy)."""

    name: str
    break_it: Act
    mend: Act
    cut_off: tuple[str, ...]
    named: str
    blames: str = ""
    """No finding may match it; empty: any may."""
    size: int = 0
    """Bytes of a packet that is lost where smaller ones arrive; 0: all are lost."""
    address: str = ""
    """Behind one of those that are cut off: only packets from LONE to it are lost. Empty: all are."""
    protocol: str = ""
    """`tcp` or `udp`: only this is lost, from a host of LONE's location to those that are cut off. Empty: all is."""


def run(host: str, *commands: str) -> Act:
    """Shell commands on a host."""

    async def act(lab: Lab) -> None:
        for command in commands:
            await lab.exec(host, "sh", "-c", command, check=True)

    return act


def put(key: str, value: str) -> Act:
    return lambda lab: lab.etcdctl("put", key, value)


def delete(key: str) -> Act:
    return lambda lab: lab.etcdctl("del", key)


def each(*acts: Act) -> Act:
    async def act(lab: Lab) -> None:
        for one in acts:
            await one(lab)

    return act


def firewall(host: str, hook: str, *rules: str) -> tuple[Act, Act]:
    """A table of the host's own with these rules in a base chain, and its removal."""
    table = f"inet own_{hook}"
    chain = f"nft add chain {table} c '{{ type filter hook {hook} priority 10; }}'"
    added = [f"nft add rule {table} c {rule}" for rule in rules]
    return run(host, f"nft add table {table}", chain, *added), run(host, f"nft delete table {table}")


def fault(
    name: str, acts: tuple[Act, Act], *cut_off: str, named: str, blames: str = "", size: int = 0, protocol: str = "",
    address: str = "",
) -> Fault:  # fmt: skip
    return Fault(
        name=name,
        break_it=acts[0],
        mend=acts[1],
        cut_off=cut_off,
        named=named,
        blames=blames,
        size=size,
        protocol=protocol,
        address=address,
    )


def both(*pairs: tuple[Act, Act]) -> tuple[Act, Act]:
    return each(*(pair[0] for pair in pairs)), each(*(pair[1] for pair in pairs))


def offered(host: str, network: str, address: str) -> tuple[Act, Act]:
    """A host offers a network that it alone is in."""
    make = f"ip link add br9 type bridge; ip addr add {address}/24 dev br9; ip link set br9 up"
    return (
        each(run(host, make), put(f"/kilo/annotations/{host}/subnets", network)),
        each(delete(f"/kilo/annotations/{host}/subnets"), run(host, "ip link del br9")),
    )


def offered_with_a_host(host: str, network: str, first: str, other: str) -> tuple[Act, Act]:
    """Likewise, and another host that is in it too."""
    put_it, remove_it = offered(host, network, first)
    inside = f"ip netns exec {host}-9"
    make = (
        f"ip netns add {host}-9; ip link add v9 type veth peer w9 netns {host}-9; ip link set v9 master br9 up; "
        f"{inside} ip addr add {other}/24 dev w9; {inside} ip link set w9 up; "
        f"{inside} ip route add default via {first}"
    )
    return each(put_it, run(host, make)), each(run(host, f"ip netns del {host}-9"), remove_it)


KEY = "/var/lib/kilo-etcd/key"


def copied_key(host: str, source: str) -> tuple[Act, Act]:
    """The agent of `host` starts with the private key of `source`, and again with its own."""

    async def copy(lab: Lab) -> None:
        key = (await lab.exec(source, "cat", KEY, check=True)).stdout.strip()
        await lab.stop(host)
        await run(host, f"mv {KEY} {KEY}.own", f"umask 077; echo '{key}' > {KEY}")(lab)
        await lab.start(host)

    async def own(lab: Lab) -> None:
        await lab.stop(host)
        await run(host, f"mv {KEY}.own {KEY}")(lab)
        await lab.start(host)

    return copy, own


def beside(host: str, kind: str, hook: str, priority: int, *rules: str) -> tuple[Act, Act]:
    """A chain of the host's own that translates destinations, or writes headers, of other packets."""
    chain = f"nft add chain ip own_beside c '{{ type {kind} hook {hook} priority {priority}; }}'"
    added = [f"nft add rule ip own_beside c {rule}" for rule in rules]
    return run(host, "nft add table ip own_beside", chain, *added), run(host, "nft delete table ip own_beside")


def rule(host: str, address: str) -> tuple[Act, Act]:
    """A rule of another program that drops what is for one address."""
    return run(host, f"ip rule add pref 5 to {address} blackhole"), run(host, "ip rule del pref 5")


def no_default_route(host: str, etcd: str) -> tuple[Act, Act]:
    """The default route is lost, but the way to etcd is not."""

    async def lose(lab: Lab) -> None:
        route = (await lab.exec(host, "ip", "-4", "route", "show", "default", check=True)).stdout.strip()
        lost.append(route)
        await run(host, f"ip route add {etcd} {route.removeprefix('default ')}", f"ip route del {route}")(lab)

    async def restore(lab: Lab) -> None:
        await run(host, f"ip route add {lost.pop()}", f"ip route del {etcd}")(lab)

    lost: list[str] = []
    return lose, restore


def signalled(host: str, name: str) -> Act:
    """The userspace WireGuard of a host receives a signal."""
    of_host = 'test "$(readlink /proc/$p/ns/net)" = "$(readlink /proc/self/ns/net)"'
    return run(host, f"for p in $(pgrep -x wireguard-go); do {of_host} && kill -{name} $p; done; true")


GCP = ("gcp-1", "gcp-2")
"""A location of two on one LAN; gcp-3 is on another one."""
LONE = "lone-1"
"""A location of one host: nobody can lead instead of it."""
SPEC = Spec(
    sites=(
        SiteSpec(
            name="gcp",
            hosts=(HostSpec(name="gcp-1", label="gcp", public=True), HostSpec(name="gcp-2", label="gcp")),
            subnets=("10.1.0.0/24",),
        ),
        SiteSpec(
            name="home",
            hosts=(HostSpec(name="home-1", label="home", public=True), HostSpec(name="home-2", label="home")),
            subnets=("10.2.0.0/24",),
        ),
        SiteSpec(name="lone", hosts=(HostSpec(name=LONE, label="lone", public=True),), subnets=("10.3.0.0/24",)),
    ),
)  # fmt: skip

ASK = """
import socket, sys
protocol, address = sys.argv[1:]
with socket.socket(type=socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as asking:
    asking.settimeout(3)
    try:
        asking.connect((address, 9))
        asking.send(b"?")
        asking.recv(1)
    except ConnectionRefusedError:
        print("refused")
    except (TimeoutError, PermissionError):
        print("silent")
"""
"""Says whether port 9 of an address answers to a TCP or UDP packet, that it is closed."""

STOP_FORWARDING = "sysctl -q -w net.ipv4.conf.kilo0.forwarding={0} net.ipv4.conf.eth0.forwarding={0}"


LEADS = "it leads its location and does not forward"


def faults(mesh: dict[str, str], lan: dict[str, str], etcd: str) -> list[Fault]:
    """The faults, for hosts with these mesh addresses and these addresses on their LANs, and etcd at this one."""
    port = "udp dport 51820 drop"
    everywhere = "10.4.0.0/16"
    return [
        fault("nothing is forwarded in a location", both(*(firewall(host, "forward", "drop") for host in GCP)),
              *GCP, named=r"gcp-\d.*(forward|firewall)"),
        fault("a firewall that rejects what it forwards, as firewalld's",
              both(*(firewall(host, "forward", "ct state established,related accept",
                              "reject with icmpx type admin-prohibited") for host in GCP)),
              *GCP, named=r"gcp-\d.*(forward|firewall|chain)"),
        fault("a firewall that forwards echo requests and no TCP",
              both(*(firewall(host, "forward", "ct state established,related accept", "meta l4proto icmp accept",
                              "drop") for host in GCP)),
              *GCP, named=r"gcp-\d.*drops TCP and UDP packets", protocol="tcp"),
        fault("a firewall that forwards echo requests and TCP, and no UDP",
              both(*(firewall(host, "forward", "ct state established,related accept",
                              "meta l4proto { icmp, tcp } accept", "drop") for host in GCP)),
              *GCP, named=r"gcp-\d.*drops UDP packets", protocol="udp"),
        fault("a firewall that forwards echo requests, and TCP and UDP to some ports only",
              both(*(firewall(host, "forward", "ct state established,related accept", "meta l4proto icmp accept",
                              "meta l4proto . th dport { tcp . 22, udp . 53 } accept", "drop") for host in GCP)),
              *GCP, named=r"gcp-\d.*may drop TCP and UDP packets", protocol="tcp"),
        fault("a firewall that drops TCP and UDP as it hands them on",
              both(*(firewall(host, "postrouting", 'iifname "kilo0" meta l4proto { tcp, udp } drop') for host in GCP)),
              *GCP, named=r"gcp-\d.*drops TCP and UDP packets", protocol="tcp"),
        fault("a firewall that drops what is for an offered network",
              both(offered("gcp-2", "172.20.1.0/24", "172.20.1.1"),
                   *(firewall(host, "forward", "ip daddr 172.20.1.0/24 drop") for host in GCP)),
              "gcp-2", named=r"gcp-\d.*drops packets for networks of the mesh \(172.20.1.0/24\)",
              address="172.20.1.1"),
        fault("the same, where what comes in is given another TTL first",
              both(offered("gcp-2", "172.20.1.0/24", "172.20.1.1"),
                   *(firewall(host, "forward", "ip daddr 172.20.1.0/24 drop") for host in GCP),
                   *(beside(host, "filter", "prerouting", -150, "ip ttl set 65") for host in GCP)),
              "gcp-2", named=r"gcp-\d.*drops packets for networks of the mesh \(172.20.1.0/24\)",
              address="172.20.1.1"),
        fault("a firewall that drops TCP and UDP for one member, where DNS is redirected",
              both(*(firewall(host, "forward", f"ip daddr {mesh['gcp-2']} meta l4proto {{ tcp, udp }} drop")
                     for host in GCP),
                   *(beside(host, "nat", "prerouting", -100, "udp dport 53 redirect", "tcp dport 53 redirect")
                     for host in GCP)),
              "gcp-2", named=rf"gcp-\d.*drops packets for networks of the mesh \({re.escape(mesh['gcp-2'])}/32\)",
              protocol="tcp"),
        fault("a firewall that drops what is for a network on a link, where one address of that is translated",
              both(offered_with_a_host("gcp-1", "172.20.1.0/24", "172.20.1.1", "172.20.1.9"),
                   firewall("gcp-1", "forward", "ip daddr 172.20.1.0/24 drop"),
                   beside("gcp-1", "nat", "prerouting", -100,
                          *(f"ip daddr 172.20.1.240 {name} dport 53 dnat to 172.20.1.9" for name in ("tcp", "udp")))),
              "gcp-1", named=r"gcp-1.*drops packets for networks of the mesh \(172.20.1.0/24\)",
              address="172.20.1.9"),
        fault("a host drops all UDP that it sends", firewall(LONE, "output", "oifname kilo0 meta l4proto udp drop"),
              *GCP, named="lone-1.*drops all UDP packets that go out", protocol="udp"),
        fault("a host drops all TCP that comes in, before all else",
              firewall(LONE, "prerouting", f"ip saddr {everywhere} meta l4proto tcp drop"),
              *GCP, named="lone-1.*drops all TCP packets that come in", protocol="tcp"),
        fault("forwarding is off on single interfaces",
              both(*((run(host, STOP_FORWARDING.format(0)), run(host, STOP_FORWARDING.format(1))) for host in GCP)),
              *GCP, named=r"gcp-\d.*forward"),
        fault("WireGuard's port is closed to the world", firewall(LONE, "input", port), LONE,
              named=r"lone-1.*let UDP \S+:51820", blames="kilo0"),
        fault("WireGuard's packets do not leave", firewall(LONE, "output", "udp sport 51820 drop"), LONE,
              named="lone-1.*UDP"),
        fault("WireGuard's packets are dropped on the way", (lambda lab: lab.cut(LONE, "port"),
              lambda lab: lab.heal(LONE)), LONE, named=r"lone-1.*let UDP \S+:51820", blames="kilo0"),
        fault("a site is cut off from the others",
              (lambda lab: lab.cut_site("lone", "others"), lambda lab: lab.heal_site("lone")), LONE, named="lone-1"),
        fault("a wrong internal IP",
              (put("/kilo/annotations/gcp-2/force-internal-ip", "10.1.0.250/24"),
               delete("/kilo/annotations/gcp-2/force-internal-ip")), "gcp-2", named="gcp-2.*(internal|10.1.0.250)"),
        fault("two hosts of a location have one internal IP",
              (put("/kilo/annotations/gcp-2/force-internal-ip", f"{lan['gcp-1']}/24"),
               delete("/kilo/annotations/gcp-2/force-internal-ip")),
              "gcp-2", named=f"gcp-1, gcp-2 they have the same internal IP {re.escape(lan['gcp-1'])}"),
        fault("large packets are lost on the way",
              both(firewall(LONE, "input", "udp dport 51820 meta length gt 1300 drop"),
                   firewall(LONE, "output", "udp sport 51820 meta length gt 1300 drop")),
              LONE, named="lone-1.*none of 1[0-9]+ bytes .*up to 1232 bytes pass.* 1232 as --mtu", size=1350),
        fault("a member's network device has a small MTU",
              (run("gcp-2", "ip link set dev eth0 mtu 700"), run("gcp-2", "ip link set dev eth0 mtu 1500")),
              "gcp-2", named="^gcp-1 - gcp-2 .*the MTU of eth0 on gcp-2 is 700 bytes.*mtu 1500", blames="^(home|lone)",
              size=1350),
        fault("most packets to a member get lost",
              firewall("gcp-2", "input", "iifname eth0 numgen random mod 100 lt 60 drop"), "gcp-2",
              named="^gcp-1 - gcp-2 .*packets get lost", blames="^(home|lone)"),
        fault("some packets of two hosts get lost, and none of others",
              firewall(LONE, "input", f"iifname kilo0 ip saddr {mesh['gcp-2']} numgen random mod 100 lt 60 drop"),
              "gcp-2", named=f"^gcp-2 - lone-1 .*packets get lost.*ping -c 100 -i 0.1 {mesh[LONE]}. on gcp-2|"
              f"^gcp-2 - lone-1 .*packets get lost.*ping -c 100 -i 0.1 {mesh['gcp-2']}. on lone-1",
              blames="^gcp-1 - lone-1 .*packets get lost|^gcp-1 - gcp-2 .*packets get lost"),
        fault("a leader translates the addresses of what its location sends to one host",
              (run("gcp-1", "nft add table ip own_nat",
                   "nft 'add chain ip own_nat c { type nat hook postrouting priority 100; }'",
                   f"nft add rule ip own_nat c oifname kilo0 ip daddr {mesh['home-2']} snat to 172.31.9.9"),
               run("gcp-1", "nft delete table ip own_nat")),
              "home-2", named="^gcp-1 - home-2 .*snat.*on gcp-1 first"),
        fault("a location's network is cut",
              (lambda lab: lab.cut("gcp-2", "location"), lambda lab: lab.heal("gcp-2")), *GCP, named="gcp-[12]"),
        fault("a wrong entry in the neighbour table",
              (run("gcp-2", f"ip neigh replace {lan['gcp-1']} lladdr 02:00:00:00:00:99 nud permanent dev eth0"),
               run("gcp-2", f"ip neigh del {lan['gcp-1']} dev eth0")), *GCP, named="gcp-[12]"),
        fault("a rule before the routing table",
              (run(LONE, f"ip rule add pref 50 to {everywhere} unreachable"), run(LONE, "ip rule del pref 50")),
              LONE, named="lone-1"),
        fault("a rule that sends the mesh's packets in clear",
              (run(LONE, "ip route add default dev eth0 table 99", f"ip rule add pref 50 to {everywhere} lookup 99"),
               run(LONE, "ip rule del pref 50", "ip route flush table 99")), LONE, named="lone-1"),
        fault("narrower routes of the operator's",
              (run(LONE, "ip route add blackhole 10.4.0.0/17", "ip route add blackhole 10.4.128.0/17"),
               run(LONE, "ip route del blackhole 10.4.0.0/17", "ip route del blackhole 10.4.128.0/17")),
              LONE, named="lone-1"),
        fault("one address has a route of the operator's",
              (run(LONE, f"ip route add blackhole {mesh['gcp-2']}/32"),
               run(LONE, f"ip route del blackhole {mesh['gcp-2']}/32")), LONE, named="lone-1"),
        fault("a member drops what is for a leader of another location", rule("gcp-2", mesh[LONE]), LONE,
              named=f"gcp-2.*{re.escape(mesh[LONE])}.*rule del", blames=LEADS),
        fault("a member drops what is for its leader", rule("gcp-2", mesh["gcp-1"]), "gcp-2",
              named=f"gcp-2.*{re.escape(mesh['gcp-1'])}.*rule|gcp-1.*{re.escape(mesh['gcp-2'])}.*rule", blames=LEADS),
        fault("an IPsec policy drops what is for one host",
              (run(LONE, f"ip xfrm policy add dir out dst {mesh['gcp-2']}/32 action block"),
               run(LONE, f"ip xfrm policy del dir out dst {mesh['gcp-2']}/32")),
              LONE, named="lone-1.*ip xfrm policy", blames=LEADS),
        fault("a host loses its default route", no_default_route(LONE, etcd), LONE,
              named="^lone-1 .*(default route|endpoints)", blames=f"^(gcp|home).*|{LEADS}"),
        fault("a WireGuard process is frozen", (signalled(LONE, "STOP"), signalled(LONE, "CONT")), LONE,
              named="^lone-1 .*WireGuard", blames=f"^(gcp|home).*|{LEADS}"),
        fault("a host takes nothing from its tunnels", firewall(LONE, "input", 'iifname "kilo0" drop'), LONE,
              named="lone-1"),
        fault("a host sends nothing into its tunnels", firewall(LONE, "output", 'oifname "kilo0" drop'), LONE,
              named="lone-1"),
        fault("a host takes no echo requests", firewall(LONE, "input", "icmp type echo-request drop"), LONE,
              named="lone-1"),
        fault("an iptables rule drops one source",
              (run(LONE, f"iptables -I INPUT -s {mesh['gcp-2']} -j DROP"),
               run(LONE, f"iptables -D INPUT -s {mesh['gcp-2']} -j DROP")), LONE, named="lone-1"),
        fault("an agent hangs and its device is gone",
              (each(lambda lab: lab.freeze(LONE), run(LONE, "ip link del kilo0")), lambda lab: lab.thaw(LONE)),
              LONE, named="lone-1"),
        fault("a host has the key file of another", copied_key(LONE, "gcp-1"), LONE,
              named="lone-1.*its public key is that of node gcp-1"),
        fault("a host is down", (lambda lab: lab.power_off("home-2"), lambda lab: lab.power_on("home-2")),
              "home-2", named="home-2"),
        fault("two hosts with no label that share no network",
              (each(delete("/kilo/locations/lone-1"), delete("/kilo/locations/home-2")),
               each(put("/kilo/locations/lone-1", "lone"), put("/kilo/locations/home-2", "home"))),
              LONE, "home-2", named="(lone-1|home-2).*label"),
        fault("full mesh, and one pair's WireGuard is blocked on the LAN",
              (each(put("/kilo/mesh/granularity", "full"),
                    firewall("gcp-2", "input", f"ip saddr {{ {lan['gcp-1']}, {lan['gcp-1 public']} }} {port}")[0],
                    firewall("gcp-1", "input", f"ip saddr {lan['gcp-2']} {port}")[0]),
               each(firewall("gcp-2", "input")[1], firewall("gcp-1", "input")[1],
                    put("/kilo/mesh/granularity", "location"))),
              *GCP, named="gcp-1 - gcp-2|gcp-2 - gcp-1|gcp-[12].*gcp-[12]"),
        fault("cross, and a pair's tunnel is blocked",
              (each(put("/kilo/mesh/granularity", "cross"),
                    firewall(LONE, "input", f"ip saddr {lan['gcp-1 public']} {port}")[0],
                    firewall(LONE, "output", f"ip daddr {lan['gcp-1 public']} {port}")[0]),
               each(firewall(LONE, "input")[1], firewall(LONE, "output")[1],
                    put("/kilo/mesh/granularity", "location"))),
              LONE, "gcp-1", named="gcp-1 - lone-1|lone-1.*gcp-1|gcp-1.*lone-1"),
    ]  # fmt: skip


async def dead_pairs(lab: Lab, one: Fault, mesh: dict[str, str]) -> list[tuple[str, str]]:
    """The ordered pairs whose ping is not answered and one of which the fault cuts off; a host that is off answers
    nobody."""
    hosts = one.cut_off
    if one.protocol:
        dead = []
        for host in hosts:
            # Where nothing listens an answer comes all the same: it is refused.
            done = await lab.exec(LONE, sys.executable, "-c", ASK, one.protocol, mesh[host], check=False)
            assert done.stdout.strip() in ("refused", "silent"), done
            if done.stdout.strip() == "silent":
                dead.append((LONE, host))
        return dead
    if one.address:
        done = await lab.exec(LONE, "ping", "-c", "1", "-W", "1", one.address, check=False)
        return [(LONE, hosts[0])] if done.returncode else []
    if one.size:
        size = str(one.size - 28)
        done = await lab.exec(hosts[0], "ping", "-c", "1", "-W", "1", "-s", size, mesh["gcp-1"], check=False)
        return [(hosts[0], "gcp-1")] if done.returncode else []
    missing = [(one, other) for one, other in await lab.missing_pings(timeout=1.0) if {one, other} & set(hosts)]
    off = [row.host for row in await lab.status() if not row.power]
    return missing + [("gcp-1", host) for host in off if host in hosts]


async def doctor(lab: Lab) -> tuple[int, list[str]]:
    """The exit status of `kgctl check`, and its findings but for notes, each as one text."""
    done = await lab.kgctl("check", "-o", "json", check=False)
    found = [load for load in json.loads(done.stdout) if load["severity"] != "note"]
    return done.returncode, [" ".join((one["subject"], one["text"], one["remedy"])) for one in found]


async def well(lab: Lab) -> bool:
    if await lab.missing_pings(timeout=1.0):
        return False
    assert [text for text in (await doctor(lab))[1] if DEMOTED not in text] == []
    return True


async def limited_echo_requests_are_no_fault(lab: Lab) -> None:
    """Firewalls of many hosts have such a limit, and `check` exceeds it."""
    limits = [
        firewall(host, "input", "icmp type echo-request limit rate 5/second accept", "icmp type echo-request drop")
        for host in lab.hosts
    ]
    for limit, _ in limits:
        await limit(lab)
    for _ in range(3):
        assert await doctor(lab) == (0, [])
        assert not [host for host in lab.hosts if "a leader does not forward" in await lab.log(host)]
    for _, lift in limits:
        await lift(lab)
    await eventually(lambda: well(lab), WELL, every=0.5)


async def test_check_names_whatever_keeps_two_hosts_apart() -> None:
    require("etcd", "etcdctl", "wireguard-go", "ip", "nft", "iptables")
    async with running_lab(SPEC) as lab:
        await lab.all_pairs_ping(60)
        await eventually(lambda: well(lab), WELL, every=0.5)
        rows = {row.host: row for row in await lab.status()}
        mesh = {host: row.mesh[0] for host, row in rows.items()}
        lan = {host: row.private[0].partition("/")[0] for host, row in rows.items()}
        lan |= {f"{host} public": row.public[0] for host, row in rows.items() if row.public}
        layout = lab.layout
        assert layout is not None
        await limited_echo_requests_are_no_fault(lab)
        for one in faults(mesh, lan, str(layout.servers[0])):
            began = trio.current_time()
            await one.break_it(lab)
            apart = await eventually(
                partial(dead_pairs, lab, one, mesh), DEAD, every=0.2, what=f"a dead pair: {one.name}"
            )
            dead = trio.current_time() - began

            async def told(one: Fault = one) -> bool:
                status, found = await doctor(lab)
                assert status == 1, f"{one.name}: all is well, says check"
                assert any(re.search(one.named, text) for text in found), f"{one.name}: check says only {found}"
                blamed = [
                    text for text in found
                    if one.blames and re.search(one.blames, text) and DEMOTED not in text
                ]  # fmt: skip
                assert not blamed, f"{one.name}: check blames another: {blamed}"
                return True

            await eventually(told, TOLD, every=0.2)
            said = trio.current_time() - began
            assert await dead_pairs(lab, one, mesh), f"{one.name}: {apart} were apart, and reach each other now"
            await one.mend(lab)
            await eventually(lambda: well(lab), WELL, every=0.2, what=f"all is well again after: {one.name}")
            print(f"{one.name}: apart after {dead:.1f} s, named after {said:.1f} s, "
                  f"well again after {trio.current_time() - began:.1f} s")  # fmt: skip
