"""A machine that is a peer, of several meshes or beside an agent: each knows its own routes and leaves others alone."""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from ipaddress import ip_address, ip_network

import pytest
import trio
from attrs import evolve
from kernel_worlds import PRIVATE, host_with, key, lines, peer, plan, tunnel, via

from helpers import eventually
from helpers_namespaces import in_force
from kilo_etcd.kernel import (
    PEER_PROTOCOL,
    ROUTE_PROTOCOL,
    Kernel,
    Memory,
    Setup,
    agent_has,
    cleanup,
    diff,
    leftovers,
    open_kernel,
    other_agent,
)
from kilo_etcd.kernel.errors import NetlinkError, failure
from kilo_etcd.kernel.firewall.packet_filter import table_for
from kilo_etcd.kernel.predict import apply_changes
from kilo_etcd.kernel.routing import exit_node
from kilo_etcd.kernel.routing.exit_node import exit_table, rule_priorities
from kilo_etcd.kernel.routing.policy import own_rules
from kilo_etcd.kernel.state import (
    MAIN_TABLE,
    AddRoute,
    DeviceTarget,
    Observed,
    OwnTable,
    ReplaceRoute,
    Route,
    is_ours,
)
from kilo_etcd.model import IPAddress, IPNetwork
from kilo_etcd.model.hostplan import Encryption, ExitRoute, HostPlan, RoutePlan, Via

FIRST = plan(peer(2, "10.4.0.2/32"), tunnel("10.4.0.0/16", "10.4.0.1"), port=51001)
SECOND = plan(
    peer(3, "10.5.0.2/32"), tunnel("10.5.0.0/16", "10.5.0.1"), addresses=("10.5.0.1/32",), port=51002
)  # fmt: skip
THIRD = plan(
    peer(4, "10.6.0.2/32"), tunnel("10.6.0.0/16", "10.6.0.1"), addresses=("10.6.0.1/32",), port=51003
)  # fmt: skip
PLANS = {"kilo0": (FIRST, ROUTE_PROTOCOL), "kilo-a": (SECOND, PEER_PROTOCOL), "kilo-b": (THIRD, PEER_PROTOCOL)}


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def test_an_agents_routes_are_known_by_their_number_and_a_peers_by_their_interface_too() -> None:
    assert is_ours(107, "eth0", own=107, interface="kilo0")
    assert is_ours(108, "kilo-a", own=108, interface="kilo-a")
    assert not is_ours(108, "kilo-b", own=108, interface="kilo-a")
    assert not is_ours(107, "kilo-a", own=108, interface="kilo-a")
    assert not is_ours(108, "kilo-a", own=107, interface="kilo0")


async def undisturbed(kernel: Kernel) -> None:
    """Nobody reports drift for as long as it takes to look at everything twice."""
    with trio.move_on_after(1.0):
        pytest.fail(await kernel.wait_drift())


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_an_agent_and_two_peers_share_a_machine() -> None:
    async with AsyncExitStack() as stack:
        kernels = {
            name: await stack.enter_async_context(
                open_kernel(Setup(interface=name, private_key=PRIVATE, protocol=protocol))
            )
            for name, (_, protocol) in PLANS.items()
        }
        for _ in range(2):
            for name, (wanted, _) in PLANS.items():
                assert (await kernels[name].apply(wanted, fresh=True)).failures == ()
        for name, (wanted, _) in PLANS.items():
            assert lines(await kernels[name].preview(wanted)) == []
        async with trio.open_nursery() as nursery:
            for kernel in kernels.values():
                nursery.start_soon(undisturbed, kernel)

        sh("ip route del 10.6.0.0/16")
        with trio.fail_after(30):
            assert await kernels["kilo-b"].wait_drift() == "the route to 10.6.0.0/16 was removed"
        await kernels["kilo-b"].apply(THIRD)

        await cleanup("kilo-a", public_key=key(0), protocol=PEER_PROTOCOL)
        found = {line.split()[0]: line.split()[2] for line in sh("ip route show").splitlines()}
        assert found == {"10.4.0.0/16": "kilo0", "10.6.0.0/16": "kilo-b"}
        assert sh("ls /run/wireguard").split() == ["kilo-b.sock", "kilo0.sock"]
        await cleanup("kilo0", public_key=key(0))
        assert "10.6.0.0/16 dev kilo-b proto 108" in sh("ip route show")
        assert lines(await kernels["kilo-b"].preview(THIRD)) == []
        await cleanup("kilo-b", public_key=key(0), protocol=PEER_PROTOCOL)
        assert sh("ip route show") + sh("ls /run/wireguard") == ""


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_cleanup_takes_only_what_is_its_interfaces() -> None:
    async with AsyncExitStack() as stack:
        for name in ("kilo0", "kilo-a"):
            wanted, protocol = PLANS[name]
            setup = Setup(interface=name, private_key=PRIVATE, protocol=protocol)
            kernel = await stack.enter_async_context(open_kernel(setup))
            await kernel.apply(evolve(wanted, unreachable_routes=(ip_network("10.4.0.0/16"),) * (name == "kilo0")))
        agents = [line for line in sh("ip route show").splitlines() if "proto 107" in line]
        assert len(agents) == 2
        assert (await other_agent("kilo-a"), await other_agent("kilo0")) == ("kilo0", "")
        for protocol in (ROUTE_PROTOCOL, PEER_PROTOCOL):
            await cleanup("kilo-a", public_key=key(0), protocol=protocol)
        # A member of a location has no route by its device.
        assert sh("ip route show").splitlines() == agents
        sh("ip route del 10.4.0.0/16 dev kilo0")
        assert await other_agent("kilo-a") == "kilo0"
        await cleanup("kilo-a", public_key=key(0))
        assert sh("ip route show").startswith("unreachable 10.4.0.0/16 proto 107")
        await cleanup("kilo0", public_key=key(0))
        assert sh("ip route show") + sh("ls /run/wireguard") == ""


async def veth_that_is_up(*ends: str) -> None:
    """A pair of devices of which nothing changes any more: the kernel brings links up, and gives them addresses, by and
    by."""
    sh(f"ip link add {ends[0]} type veth peer name {ends[1]}")
    for end in ends:
        sh(f"ip link set {end} addrgenmode none && ip link set {end} up")
    await eventually(lambda: sh("ip -br link").count(" UP ") == 2, 30, what="both ends up")


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.parametrize("kind", ["leader", "member"])
async def test_the_cleanup_of_a_connection_takes_nothing_of_an_agent_with_the_same_interface(kind: str) -> None:
    await veth_that_is_up("eth9", "eth8")
    sh("ip addr add 192.168.9.1/24 dev eth9; ip route add default via 192.168.9.254")
    wanted = plan(via("10.5.0.0/16", "192.168.9.5"), unreachable_routes=("10.4.0.0/16",))
    if kind == "leader":
        wanted = evolve(
            plan(
                peer(2, "0.0.0.0/0", "10.4.0.2/32", "::/0", endpoint="192.168.9.2:51820"),
                tunnel("10.4.0.0/16", "10.4.0.1"),
                unreachable_routes=("10.4.0.0/15",),
                forwarding=(4,),
                masquerade=("10.4.0.0/16",),
            ),
            exit_route=ExitRoute(families=frozenset({4}), bypass=(ip_network("192.0.2.1/32"),)),
        )
    state = "; ".join(f"ip {family} rule; ip {family} route show table all" for family in ("-4", "-6"))
    state = f"{state}; ip -o link; nft list tables; cat /proc/sys/net/ipv4/ip_forward; ls /run/kilo-etcd"
    async with open_kernel(Setup(interface="kilo0", private_key=PRIVATE)) as kernel:
        assert (await kernel.apply(wanted)).failures == ()
        before = sh(state)
        for public in (None, key(9)):
            assert await agent_has("kilo0", public)
            assert await cleanup("kilo0", public_key=public, protocol=PEER_PROTOCOL) == ()
            assert await leftovers("kilo0", public_key=public, protocol=PEER_PROTOCOL) == ()
        assert sh(state) == before
        await cleanup("kilo0", public_key=key(200))


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_an_underlay_that_is_a_tunnel_is_no_other_agents() -> None:
    sh("ip tuntap add dev tap0 mode tap; ip addr add 192.168.5.1/24 dev tap0; ip link set tap0 up")
    async with open_kernel(Setup(interface="kilo0", private_key=PRIVATE)) as kernel:
        parts = (tunnel("10.4.0.0/16", "10.4.0.1"), via("10.5.0.0/16", "192.168.5.2"))
        wanted = plan(peer(2, "10.4.0.2/32"), *parts, unreachable_routes=("10.4.0.0/15",))
        assert (await kernel.apply(wanted)).failures == ()
        assert await other_agent("kilo0", public_key=key(200)) == ""
        await cleanup("kilo0", public_key=key(200))
        assert "proto 107" not in sh("ip route show")


FOREIGN = {
    "wireguard": "wireguard-go wg0; wg genkey > /run/theirs; wg set wg0 private-key /run/theirs listen-port 51999 "
    "peer $(wg genkey | wg pubkey) allowed-ips 10.4.0.0/16; ip addr add 10.4.7.7/32 dev wg0",
    "tun": "ip tuntap add wg0 mode tun; ip addr add 10.4.0.6 peer 10.4.0.5 dev wg0",
}
"""Devices of other programs with an address of the mesh's subnet."""


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("agents", ["gone", "leader", "member"])
async def test_a_foreign_device_with_an_address_of_the_mesh_is_no_agents(kind: str, agents: str) -> None:
    sh("ip link add eth9 type veth peer name eth8; ip addr add 192.168.9.1/24 dev eth9; ip link set eth9 up")
    sh("ip link set eth8 up")
    sh(f"{FOREIGN[kind]}; ip link set wg0 up; ip route add 172.22.0.0/16 dev wg0")
    state = "ip -4 -o addr show dev wg0; ip route show dev wg0; wg showconf wg0 2>&1; true"
    before = sh(state)
    parts = [via("10.5.0.0/16", "192.168.9.5")]
    if agents == "leader":
        parts.append(tunnel("10.4.0.0/17", "10.4.0.1"))
    # The name of the agent's comes after that of the other.
    async with open_kernel(Setup(interface="wg1", private_key=PRIVATE)) as kernel:
        assert (await kernel.apply(plan(*parts, unreachable_routes=("10.4.0.0/16",)))).failures == ()
        if agents == "gone":
            sh("ip link del wg1")
        for public in (None, key(200)):
            assert await other_agent("kilo0", public_key=public) == ("" if agents == "gone" else "wg1")
            assert not await agent_has("wg0", public)
            assert await leftovers("wg0", public_key=public, protocol=PEER_PROTOCOL) == ()
            assert await cleanup("wg0", public_key=public, protocol=PEER_PROTOCOL) == ()
            await cleanup("wg0", public_key=public)
            assert sh(state) == before
        assert (await other_agent("kilo0"), "10.4.0.0/16" in sh("ip route show")) == (
            ("", False) if agents == "gone" else ("wg1", True)
        )
        await cleanup("wg1", public_key=key(200))
    assert sh(state) == before


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_foreign_device_that_the_agents_routes_leave_by_is_no_agents() -> None:
    sh("wireguard-go wg0; wg genkey > /run/theirs; wg set wg0 private-key /run/theirs listen-port 51999")
    sh("ip addr add 192.168.5.1/24 dev wg0; ip link set wg0 up")
    async with open_kernel(Setup(interface="kilo0", private_key=PRIVATE)) as kernel:
        await kernel.apply(plan(via("10.5.0.0/16", "192.168.5.2"), unreachable_routes=("10.4.0.0/15",)))
        sh("ip link del kilo0")
        assert not await agent_has("wg0", None)
        await cleanup("wg0", public_key=key(200))
    assert "wg0" in sh("ip -o link")
    assert "proto 107" not in sh("ip route show")


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_the_cleanup_of_a_crashed_connection_leaves_a_member_of_the_same_mesh_its_routes() -> None:
    sh("ip link add eth9 type veth peer name eth8; ip addr add 192.168.9.1/24 dev eth9; ip link set eth9 up")
    sh("ip link set eth8 up")
    async with (
        open_kernel(Setup(interface="kilo0", private_key=PRIVATE)) as agent,
        open_kernel(Setup(interface="kilo-a", private_key=PRIVATE, protocol=PEER_PROTOCOL)) as connection,
    ):
        await agent.apply(plan(via("10.5.0.0/16", "192.168.9.5"), unreachable_routes=("10.4.0.0/16",)))
        addresses = ("10.4.0.77/32",)
        parts = (peer(2, "10.4.0.2/32"), tunnel("10.4.8.0/24", "10.4.0.77"))
        await connection.apply(plan(*parts, addresses=addresses, port=51999))
        agents = [line for line in sh("ip route show").splitlines() if "proto 107" in line]
        assert len(agents) == 2
        assert await other_agent("kilo-a") == "kilo0"
        for protocol in (ROUTE_PROTOCOL, PEER_PROTOCOL):
            await cleanup("kilo-a", protocol=protocol)
        left = sh("ip route show")
        assert [line for line in left.splitlines() if "proto 107" in line] == agents
        assert "kilo-a" not in left + sh("ip -o link")
        await cleanup("kilo0", public_key=key(200))


def test_rules_of_another_interface_at_the_same_priorities_are_not_taken_for_ones_own() -> None:
    first = "kilo-a"
    second = next(name for n in range(1000) if rule_priorities(name := f"kilo-{n}") == rule_priorities(first))
    rules = {name: exit_node.policy_for(AWAY, name, PEER_PROTOCOL).rules for name in (first, second)}
    assert own_rules(rules[first], first) == rules[first]
    assert own_rules(rules[second], first) == frozenset()
    assert own_rules(rules[first] | rules[second], first) == rules[first]
    # What a crash left behind may lack the one that leads to a table.
    main = frozenset(rule for rule in rules[first] if rule.table == MAIN_TABLE)
    assert own_rules(main, first) == main


# -- an exit node
# ---------------------------------------------------------------------------------------------------------

AWAY = evolve(
    plan(
        peer(2, "0.0.0.0/0", "10.5.0.2/32", "::/0", endpoint="192.168.9.2:51820"),
        tunnel("10.5.0.0/16", "10.5.0.1"),
        addresses=("10.5.0.1/32",),
        port=51002,
    ),
    exit_route=ExitRoute(families=frozenset({4}), bypass=(ip_network("192.0.2.1/32"), ip_network("2001:db8::1/128"))),
)
TARGET = DeviceTarget(public_key=key(200), private_key=PRIVATE, interface="kilo-a", protocol=PEER_PROTOCOL)
TABLE = exit_table("kilo-a")
MAIN_FIRST, OURS = rule_priorities("kilo-a")


def test_the_exit_route_is_made_routes_first_and_unmade_rules_first() -> None:
    made = [line for line in lines(diff(AWAY, Observed(), Memory(), TARGET)) if "rule" in line or "table" in line]
    assert made == [
        f"ip route add throw 192.0.2.1/32 proto 108 table {TABLE}",
        f"ip route add throw 192.168.9.2/32 proto 108 table {TABLE}",
        f"ip route add throw 2001:db8::1/128 proto 108 table {TABLE}",
        f"ip route add 0.0.0.0/0 dev kilo-a proto 108 src 10.5.0.1 table {TABLE}",
        f"ip route add unreachable 0.0.0.0/0 proto 108 metric 4294967295 table {TABLE}",
        f"ip route add unreachable ::/0 proto 108 metric 4294967295 table {TABLE}",
        f"ip -4 rule add priority {MAIN_FIRST} lookup main suppress_prefixlength 7",
        f"ip -4 rule add priority {OURS} not fwmark 107 lookup {TABLE}",
        f"ip -6 rule add priority {MAIN_FIRST} lookup main suppress_prefixlength 6",
        f"ip -6 rule add priority {OURS} not fwmark 107 lookup {TABLE}",
    ]
    host = host_with(AWAY, TARGET)
    assert diff(AWAY, host, Memory(), TARGET) == ()
    without = lines(diff(evolve(AWAY, exit_route=None), host, Memory(), TARGET))
    assert [line.split()[2] for line in without[:4]] == ["rule"] * 4
    assert [line.split()[1] for line in without[4:10]] == ["route"] * 6
    # As long as a rule asks for the mark WireGuard's own packets need it.
    assert without[10:] == ["wg set kilo-a fwmark off"]
    # An operator's own mark is nobody's business where none is needed.
    assert diff(evolve(AWAY, exit_route=None), evolve(host_with(evolve(AWAY, exit_route=None), TARGET), mark=7),
                Memory(), TARGET) == ()  # fmt: skip


def test_what_is_sent_from_the_hosts_own_addresses_goes_as_before() -> None:
    assert AWAY.exit_route is not None
    own = (ip_address("192.168.9.1"), ip_address("2001:db8::7"))
    sourced = evolve(AWAY, exit_route=evolve(AWAY.exit_route, sources=own))
    host = host_with(AWAY, TARGET)
    table, *changes = lines(diff(sourced, host, Memory(), TARGET))
    # In IPv6 a rule by source would let out what is refused: answers are told by connection tracking, and find a route
    # into the tunnel first.
    assert changes == [
        f"ip route add ::/0 dev kilo-a proto 108 table {TABLE}",
        f"ip -4 rule add priority {MAIN_FIRST} from 192.168.9.1 lookup main",
    ]
    assert "type route hook output priority -150; policy accept; meta nfproto ipv6 meta mark 0" in table
    moved = evolve(AWAY, exit_route=evolve(AWAY.exit_route, sources=own[1:]))
    assert lines(diff(moved, host_with(sourced, TARGET), Memory(), TARGET)) == [
        f"ip -4 rule del priority {MAIN_FIRST} from 192.168.9.1 lookup main"
    ]


def test_where_a_peer_is_only_said_to_be_nothing_goes_beside_the_tunnel() -> None:
    (known,) = AWAY.peers.values()
    guessed = evolve(AWAY, peers={known.public_key: evolve(known, observed=True)})
    made = lines(diff(guessed, Observed(), Memory(), TARGET))
    assert [line for line in made if "throw 192.168.9.2" in line] == []
    assert "throw 192.168.9.2/32" in "".join(lines(diff(AWAY, Observed(), Memory(), TARGET)))


def test_an_exit_route_that_is_held_is_left_as_it_is() -> None:
    assert AWAY.exit_route is not None
    held = evolve(AWAY, exit_route=evolve(AWAY.exit_route, held=True, bypass=()))
    assert lines(diff(held, host_with(AWAY, TARGET), Memory(), TARGET)) == []
    without = host_with(evolve(AWAY, exit_route=None), TARGET)
    assert lines(diff(held, without, Memory(), TARGET)) == []


def test_a_kernel_without_ipv6_is_asked_for_nothing_of_it() -> None:
    without = Observed(lacking=frozenset({6}))
    changes = diff(AWAY, without, Memory(), TARGET)
    made = lines(changes)
    assert [line for line in made if "ip -6" in line or ("route" in line and "::" in line)] == []
    assert [line for line in made if "ip -4 rule" in line] != []
    assert diff(AWAY, apply_changes(without, changes, "kilo-a"), Memory(), TARGET) == ()


def test_a_failure_of_an_exit_route_is_reported_and_keeps_nobody_from_leading() -> None:
    every = diff(AWAY, Observed(), Memory(), TARGET)
    exit_route = [change for change in every if "table" in str(change) or " rule " in str(change)]
    assert len(exit_route) == 10
    for change in exit_route:
        said = failure(change, NetlinkError(errno.EOPNOTSUPP))
        assert said.aside
        blocked = "unreachable" in str(change) or "rule" in str(change)
        assert ("may bypass the exit node" if blocked else "is refused or ends in the tunnel") in said.text


def test_ipv6_that_is_switched_off_on_the_device_is_said_to_be_so() -> None:
    own = AWAY.exit_route
    assert own is not None
    away = evolve(AWAY, exit_route=evolve(own, sources=(ip_address("2001:db8::7"),)))
    (into,) = [change for change in diff(away, Observed(), Memory(), TARGET) if "::/0 dev" in str(change)]
    said = failure(into, NetlinkError(errno.EACCES))
    assert "set net.ipv6.conf.kilo-a.disable_ipv6=0" in said.text
    # And a route into the mesh: the capability is there.
    for change in (
        AddRoute(Route(destination=ip_network("fd00:4::/64"), device="kilo-a")),
        ReplaceRoute(Route(destination=ip_network("fd00:4::/64"), device="kilo-a")),
    ):
        said = failure(change, NetlinkError(errno.EACCES))
        assert "since IPv6 is switched off on kilo-a: set net.ipv6.conf.kilo-a.disable_ipv6=0" in said.text
        assert "CAP_NET_ADMIN" not in said.text
    for code, network in ((errno.EPERM, "fd00:4::/64"), (errno.EACCES, "10.4.0.0/16")):
        said = failure(AddRoute(Route(destination=ip_network(network), device="kilo-a")), NetlinkError(code))
        assert "CAP_NET_ADMIN" in said.text


ANSWERING = plan(
    peer(2, "0.0.0.0/0", "10.5.0.2/32", "fd00:5::2/128", "::/0", endpoint="192.168.9.2:51820"),
    addresses=("10.5.0.1/32", "fd00:5::1/128"),
)


def test_answers_in_ipv6_are_told_from_what_the_host_begins() -> None:
    exit_route = ExitRoute(families=frozenset({4, 6}), sources=(ip_address("2001:db8::7"),))
    behind = (ip_network("172.20.0.0/24"), ip_network("fd77::/64"))
    table = table_for(evolve(ANSWERING, exit_route=exit_route, behind=behind), "kilo0")
    assert table is not None
    assert [rule.text for rule in table.rules] == [
        'ip6 daddr @own6 iifname != "kilo0" meta mark 0 meta mark set 107',
        "meta nfproto ipv6 meta mark 107 meta mark set 0",
        "ip6 saddr fd00:5::1 return",
        'meta nfproto ipv6 meta mark 0 oifname != "lo" ct direction reply counter name answers meta mark set 107',
        "ip6 saddr fd77::/64 return",
        'meta nfproto ipv6 meta mark 0 oifname "kilo0" counter name refused reject with icmpx host-unreachable',
    ]
    # Another node's internal IP is reached from this host's own, which that node knows.
    own, others = exit_route.sources[0], [ip_network(f"fd00:9::{number}/128") for number in (1, 2, 3)]
    inside = {
        network: RoutePlan(destination=network, via=way, source=source)
        for network, way, source in zip(
            others, (Via.TUNNEL, Via.TUNNEL, Via.UNDERLAY), (own, ip_address("fd00:5::1"), own), strict=True
        )
    }
    sent = ip_network("2001:db8::9/128")
    encryption = Encryption(send={sent: RoutePlan(destination=sent, via=Via.TUNNEL, source=own)})
    rule = "ip6 daddr @internal6 return"
    for more, expected, text in (
        (None, {others[0]}, f"ip6 saddr {own} {rule}"), (encryption, {others[0], sent}, rule)
    ):  # fmt: skip
        wanted = evolve(ANSWERING, exit_route=exit_route, routes={**ANSWERING.routes, **inside}, encryption=more)
        table = table_for(wanted, "kilo0")
        assert table is not None
        (addresses,) = (each.addresses for each in table.sets if each.name == "internal6")
        assert addresses == {network.network_address for network in expected}
        said = [rule.text for rule in table.rules if rule.chain == "output"]
        assert said.index(text) < next(n for n, text in enumerate(said) if "answers" in text)
    # A host that has no IPv6 address which others could call tracks no connections; a laptop answers nobody.
    for sources in ((), (ip_address("192.168.9.1"),)):
        assert table_for(evolve(ANSWERING, exit_route=evolve(exit_route, sources=sources)), "kilo0") is None


PLANS_OUT = [
    ExitRoute(families=frozenset(families), by=tuple(by), sources=tuple(map(ip_address, sources)))
    for families in ((), (4,), (6,), (4, 6))
    for by in ((), *([[via("::/0", "fe80::9", source="fd00:5::1")]] if 6 in families else []))
    for sources in ((), ("192.168.9.1",), ("2001:db8::7",), ("192.168.9.1", "2001:db8::7", "2001:db8::8"))
]


@pytest.mark.parametrize("exit_route", PLANS_OUT, ids=str)
def test_no_packet_for_the_internet_that_the_host_begins_bypasses_the_exit_node(exit_route: ExitRoute) -> None:
    """Walks the rules as the kernel does, with a main table that has a default route, halves of it, and 2000::/3."""
    wanted = evolve(ANSWERING, exit_route=exit_route)
    host = host_with(wanted, evolve(TARGET, interface="kilo0", protocol=ROUTE_PROTOCOL))
    for device_gone in (False, True):
        routes = {} if device_gone else host.policy.table(exit_table("kilo0")).routes
        for address in ("1.1.1.1", "203.0.113.9", "2001:db8:99::1", "2600::1"):
            to = ip_address(address)
            asked = [None, *map(ip_address, ("2001:db8::7", "2001:db8::8") if to.version == 6 else ())]
            # In IPv6 the kernel asks once more if it is refused, from an address that it chooses.
            assert {_walk(to, source, host, routes) for source in asked} <= {"kilo0", "by a neighbour", "refused"}


def _walk(to: IPAddress, source: IPAddress | None, host: Observed, routes: Mapping[IPNetwork, Route]) -> str:
    main = [ip_network(text) for text in ("0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "::/0", "2000::/3")]
    for rule in sorted(host.policy.rules, key=lambda rule: rule.order):
        if rule.version != to.version or rule.source not in (None, source):
            continue
        if rule.table == MAIN_TABLE:
            shortest = -1 if rule.suppress is None else rule.suppress
            if any(to in network and network.prefixlen > shortest for network in main if network.version == to.version):
                return "outside"
            continue
        found = [
            route for route in routes.values() if route.destination.version == to.version and to in route.destination
        ]
        best = max(found, key=lambda one: one.destination.prefixlen, default=None)
        if best is None:
            assert ip_network("::/0" if to.version == 6 else "0.0.0.0/0") in host.policy.table(exit_table("kilo0")).last
            return "refused"
        if best.kind != "throw":
            return best.device or "by a neighbour"
    return "outside"


@pytest.mark.parametrize("way", [Via.UNDERLAY, Via.IPIP])
def test_a_member_leaves_by_its_leader(way: Via) -> None:
    by = via("0.0.0.0/0", "192.168.9.77", way, source="10.5.0.1")
    away = evolve(AWAY, exit_route=ExitRoute(families=frozenset({4}), by=(by,)))
    target = evolve(TARGET, interface="kilo0", protocol=ROUTE_PROTOCOL)
    device = " dev kilo-ipip" if way is Via.IPIP else ""
    onlink = " onlink" if way is Via.IPIP else ""
    made = lines(diff(away, Observed(), Memory(), target))
    table = exit_table("kilo0")
    expected = f"ip route add 0.0.0.0/0 via 192.168.9.77{device} proto 107 src 10.5.0.1{onlink} table {table}"
    assert [line for line in made if "0.0.0.0/0" in line and "unreachable" not in line and "via" in line] == [expected]
    # The kernel says by which device a neighbour is reached.
    host = host_with(away, target)
    routes = {
        key: evolve(route, device=route.device or "eth0") if route.gateway else route
        for key, route in host.policy.table(exit_table("kilo0")).routes.items()
    }
    assert (
        lines(
            diff(
                away,
                evolve(
                    host, policy=evolve(host.policy, tables={table: OwnTable(routes, host.policy.table(table).last)})
                ),
                Memory(),
                target,
            )
        )
        == []
    )


def exit_state() -> str:
    shown = [sh(f"ip -{version} {what}") for version in (4, 6) for what in ("rule", "route show table all")]
    return "\n".join(
        line for line in "".join(shown).splitlines() if str(TABLE) in line or "suppress_prefixlength" in line
    )


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_an_exit_route_is_set_up_repaired_and_removed_on_a_real_kernel() -> None:
    await veth_that_is_up("eth0", "eth1")
    sh("ip address add 192.168.9.1/24 dev eth0 && ip route add default via 192.168.9.77")
    before = sh("ip rule; ip -6 rule; ip route show table all")
    setup = Setup(interface="kilo-a", private_key=PRIVATE, protocol=PEER_PROTOCOL)
    async with open_kernel(setup) as kernel:
        assert (await kernel.apply(AWAY)).failures == ()
        writes = kernel.writes
        for fresh in (False, True, True):
            assert lines((await kernel.apply(AWAY, fresh=fresh)).changes) == []
        assert kernel.writes == writes
        assert sh("wg show kilo-a fwmark") == "0x6b\n"
        assert exit_state().count(str(TABLE)) == 8

        def way(address: str) -> str:
            return sh(f"ip route get {address}").split(" dev ")[1].split()[0]

        found = {text: way(text) for text in ("8.8.8.8", "10.5.7.7", "192.0.2.1", "192.168.9.2", "192.168.9.55")}
        assert found == {
            "8.8.8.8": "kilo-a", "10.5.7.7": "kilo-a", "192.0.2.1": "eth0", "192.168.9.2": "eth0",
            "192.168.9.55": "eth0",
        }  # fmt: skip
        assert "via 192.168.9.77" in sh("ip route get 8.8.8.8 mark 107")

        whole = exit_state()
        for taken in (
            f"ip rule del priority {OURS}",
            f"ip -6 rule del priority {MAIN_FIRST}",
            f"ip route del 0.0.0.0/0 table {TABLE}",
            f"ip route del throw 192.0.2.1 table {TABLE}",
            f"ip -6 route del unreachable default table {TABLE}",
        ):
            sh(taken)
            with trio.fail_after(30):
                await kernel.wait_drift()
            assert len((await kernel.apply(AWAY, fresh=True)).changes) == 1, taken
            assert sorted(exit_state().splitlines()) == sorted(whole.splitlines())

        await kernel.apply(evolve(AWAY, exit_route=None))
        assert (exit_state(), sh("wg show kilo-a fwmark")) == ("", "off\n")
        await kernel.apply(AWAY)
    await cleanup("kilo-a", public_key=key(0), protocol=PEER_PROTOCOL)
    assert sh("ip rule; ip -6 rule; ip route show table all") == before
    assert await cleanup("kilo-a", public_key=key(0), protocol=PEER_PROTOCOL) == ()


EXIT = ExitRoute(
    families=frozenset({4}),
    bypass=tuple(
        ip_network(text)
        for text in ("169.254.0.0/16", "192.0.2.1/32", "224.0.0.0/4", "255.255.255.255/32", "fe80::/10")
    ),
    sources=(ip_address("192.168.9.1"),),
)
NODE = evolve(AWAY, exit_route=EXIT)
MEMBER = evolve(NODE, exit_route=evolve(EXIT, by=(via("0.0.0.0/0", "192.168.9.77", source="10.5.0.1"),)))


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_nodes_exit_route_lets_answers_bypass_it_and_is_blocked_without_its_device() -> None:
    await veth_that_is_up("eth0", "eth1")
    sh("ip address add 192.168.9.1/24 dev eth0 && ip route add default via 192.168.9.77")
    sh("ip address add 2001:db8:9::1/64 dev eth0 nodad && ip -6 route add default via 2001:db8:9::77")
    await in_force("2001:db8:9::1")
    before = sh("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all")

    def way(address: str, version: int = 4) -> str:
        done = subprocess.run(f"ip -{version} route get {address}", shell=True, capture_output=True, text=True)
        words = done.stdout.split()
        return words[words.index("dev") + 1] if done.returncode == 0 and "unreachable" not in words else "refused"

    sh("ip neighbour replace 2001:db8:9::77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent")

    def begins(address: str) -> int:
        """How many packets leave by eth0 when programs begin to speak to an IPv6 address: TCP, UDP, pings."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as seen:
            seen.bind(("eth0", 3))  # ETH_P_ALL
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                with socket.socket(socket.AF_INET6, kind) as sock, suppress(OSError):
                    sock.settimeout(0.1)
                    sock.connect((address, 9))
                    sock.send(b"hello")
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock, suppress(OSError):
                sock.sendto(b"hello", (address, 9))
            subprocess.run(["ping", "-6", "-c", "1", "-W", "0.1", address], capture_output=True)
            seen.setblocking(False)
            packets: list[bytes] = []
            with suppress(BlockingIOError):
                while True:
                    packets.append(seen.recv(2048))
        return sum(packet[24:40] == ip_address(address).packed for packet in packets)

    assert begins("2001:db8::99") >= 4

    async def settles(kernel: Kernel, wanted: HostPlan) -> None:
        assert (await kernel.apply(wanted)).failures == ()
        writes = kernel.writes
        for fresh in (False, True, True):
            assert lines((await kernel.apply(wanted, fresh=fresh)).changes) == []
        assert kernel.writes == writes

    async with open_kernel(Setup(interface="kilo0", private_key=PRIVATE)) as kernel:
        await settles(kernel, NODE)
        asked = (
            "8.8.8.8", "8.8.8.8 from 192.168.9.1", "8.8.8.8 from 10.5.0.1", "169.254.169.254", "192.0.2.1",
            "192.168.9.2", "10.5.7.7",
        )  # fmt: skip
        assert {text: way(text) for text in asked} == {
            "8.8.8.8": "kilo0", "8.8.8.8 from 192.168.9.1": "eth0", "8.8.8.8 from 10.5.0.1": "kilo0",
            "169.254.169.254": "eth0", "192.0.2.1": "eth0", "192.168.9.2": "eth0", "10.5.7.7": "kilo0",
        }  # fmt: skip
        assert "src 10.5.0.1" in sh("ip route get 8.8.8.8")
        # In a family that the node has no mesh address in, nothing leaves beside; its link is as it was.
        assert (way("2001:db8::99", 6), way("2001:db8:9::2", 6)) == ("refused", "eth0")

        # An address that comes is one more rule, one that is taken away is one less; what is removed comes back.
        assert NODE.exit_route is not None
        other = (*NODE.exit_route.sources, ip_address("192.168.9.5"))
        assert len((await kernel.apply(evolve(NODE, exit_route=evolve(NODE.exit_route, sources=other)))).changes) == 1
        await settles(kernel, NODE)

        # In IPv6 the rule of nftables tells answers; without it, and without the device, nothing gets out either.
        six = (*NODE.exit_route.sources, ip_address("2001:db8:9::1"))
        answering = evolve(NODE, exit_route=evolve(NODE.exit_route, sources=six))
        await settles(kernel, answering)
        assert way("2001:db8::99", 6) == way("2001:db8::99 from 2001:db8:9::1", 6) == "kilo0"
        assert way("2001:db8::99 mark 107", 6) == "eth0"
        # What it forwards, for containers, goes the same way.
        assert way("2001:db8::99 from 2001:db8:9::2 iif eth0", 6) == "kilo0"
        assert begins("2001:db8::99") == 0
        sh("nft flush ruleset")
        assert begins("2001:db8::99") == 0
        with trio.fail_after(30):
            await kernel.wait_drift()
        assert [str(change)[:3] for change in (await kernel.apply(answering, fresh=True)).changes] == ["nft"]
        sh("ip link del kilo0")
        assert begins("2001:db8::99") == 0
        with trio.fail_after(30):
            await kernel.wait_drift()
        await kernel.apply(answering, fresh=True)
        # Halves of all addresses, as VPN programs set them, are no way outside, nor is what is given out in IPv6.
        for route in ("0.0.0.0/1 via 192.168.9.77", "2000::/3 via 2001:db8:9::77"):
            sh(f"ip route add {route}")
        assert (way("8.8.8.8 from 0.0.0.0"), begins("2001:db8::99")) == ("kilo0", 0)
        for route in ("0.0.0.0/1 via 192.168.9.77", "2000::/3 via 2001:db8:9::77"):
            sh(f"ip route del {route}")
        await settles(kernel, NODE)
        assert begins("2001:db8::99") == 0
        sh("ip rule del from 192.168.9.1 lookup main")
        with trio.fail_after(30):
            await kernel.wait_drift()
        assert len((await kernel.apply(NODE, fresh=True)).changes) == 1

        # The device goes, and nothing is let out beside it; it comes back.
        sh("ip link del kilo0")
        assert way("8.8.8.8") == "refused"
        assert way("8.8.8.8 from 192.168.9.1") == "eth0"
        with trio.fail_after(30):
            await kernel.wait_drift()
        await kernel.apply(NODE, fresh=True)
        assert way("8.8.8.8") == "kilo0"

        # The node leads no more: it leaves by its leader. Back again.
        await settles(kernel, MEMBER)
        assert "via 192.168.9.77 dev eth0" in sh("ip route get 8.8.8.8")
        assert "src 10.5.0.1" in sh("ip route get 8.8.8.8")
        await settles(kernel, NODE)

        await settles(kernel, evolve(NODE, exit_route=None))
        left = sh("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all")
        assert str(exit_table("kilo0")) not in left
        assert "suppress" not in left
        await settles(kernel, NODE)
    await cleanup("kilo0", public_key=key(0))
    assert sh("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all") == before
    assert await cleanup("kilo0", public_key=key(0)) == ()
