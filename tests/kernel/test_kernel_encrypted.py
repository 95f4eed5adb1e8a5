"""What `encrypted` puts into the kernel: what is decided, and what a real kernel holds."""

from __future__ import annotations

import errno
import subprocess
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import trio
from attrs import evolve
from kernel_worlds import PRIVATE, TARGET, key, lines, peer, plan, tunnel, via

from helpers import eventually
from helpers_load import soon
from kilo_etcd.kernel import Kernel, Memory, Setup, cleanup, diff, open_kernel
from kilo_etcd.kernel.errors import NetlinkError, failure
from kilo_etcd.kernel.firewall.netfilter import Netfilter
from kilo_etcd.kernel.firewall.packet_filter import table_for
from kilo_etcd.kernel.firewall.table import FirewallTable, ReplaceTable
from kilo_etcd.kernel.netlink.codec import FormatError
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage
from kilo_etcd.kernel.predict import apply_changes
from kilo_etcd.kernel.routing.encrypted import rule_priorities, table_of
from kilo_etcd.kernel.routing.policy import own_priorities, own_tables
from kilo_etcd.kernel.routing.rules import AddRule, RoutingRule
from kilo_etcd.kernel.state import AddRoute, Change, DeviceTarget, LoosenReversePath, Observed, without_counters
from kilo_etcd.kernel.write import rtnl
from kilo_etcd.model.hostplan import Encryption, Exemption, ExitRoute, HostPlan, Via

T = table_of("kilo0")
PAST, INTO = rule_priorities("kilo0")
ENCRYPTION = Encryption(
    nodes=frozenset(map(ip_address, ("192.168.9.2", "192.168.9.3", "fd00:9::2"))),
    send={
        route.destination: route
        for route in (
            tunnel("192.168.9.2/32", "192.168.9.1"), tunnel("fd00:9::2/128", "fd00:9::1"),
            via("10.2.0.7/32", "192.168.9.77", source="192.168.9.1"),
        )
    },
    hold=frozenset({ip_network("192.168.9.3/32")}),
    refuse=frozenset(map(ip_address, ("192.168.9.2", "fd00:9::2"))),
    etcd=((ip_address("192.168.9.2"), 2379),),
    sources=(ip_address("192.168.9.1"), ip_address("fd00:9::1")),
    talk=(1107,),
    accepted_sources=(ip_network("10.4.0.0/16"), ip_network("192.168.9.7/32"), ip_network("fd00:4::/62")),
    clear=(Exemption.parse("tcp/22@192.168.0.0/17"), Exemption.parse("icmp@fd00:9::/62")),
)  # fmt: skip
PLAIN = plan(
    peer(2, "10.4.0.2/32", "192.168.9.2/32", "fd00:9::2/128", endpoint="192.168.9.2:51820"),
    tunnel("10.4.0.2/32", "10.4.0.1"),
)
ON = evolve(PLAIN, encryption=ENCRYPTION)
LOCAL = Observed(underlay=("eth0",), strict={"eth0": "1", "kilo0": "0"}, forwarding=frozenset({4}))
"""A host whose checks of the reverse path are strict, and that forwards."""


def commands(wanted: HostPlan, observed: Observed, target: DeviceTarget = TARGET) -> list[str]:
    return lines(diff(wanted, observed, Memory(), target))


def after(wanted: HostPlan, observed: Observed) -> Observed:
    return apply_changes(observed, diff(wanted, observed, Memory(), TARGET), "kilo0")


def ours(made: list[str]) -> list[str]:
    return [line for line in made if f"table {T}" in line or " rule " in line or line.startswith(("sysctl", "nft"))]


# -- what is decided: pure ------------------------------------------------------------------------------------


def test_no_packet_meets_a_last_resort_alone_while_the_rule_leads_to_the_table() -> None:
    """Nothing is held back by it before there is the route, nor after that is gone."""
    few = evolve(ON, encryption=evolve(ENCRYPTION, send={}, hold=frozenset(), nodes=frozenset()))
    host, pair = after(few, LOCAL), ("192.168.9.2/32 dev kilo0", "192.168.9.2/32 dev lo")
    assert any(f"not fwmark 107 lookup {T}" in str(rule) for rule in host.policy.rules)
    coming = [line for line in commands(ON, host) if any(part in line for part in pair)]
    assert [line.split()[2:6] for line in coming] == [["add", *part.split()] for part in pair]
    going = [line for line in commands(few, after(ON, LOCAL)) if any(part in line for part in pair)]
    assert [line.split()[2:6] for line in going] == [["del", *part.split()] for part in reversed(pair)]


def test_it_is_turned_on_from_the_routes_to_the_rule() -> None:
    made = commands(ON, LOCAL)
    table, *rest = ours(made)
    assert table.startswith("nft 'add table inet kilo")
    assert rest == [
        "sysctl -w net.ipv4.conf.eth0.rp_filter=2",
        "sysctl -w net.ipv4.conf.kilo0.rp_filter=2",
        f"ip route add 192.168.9.2/32 dev kilo0 proto 107 src 192.168.9.1 table {T}",
        f"ip route add fd00:9::2/128 dev kilo0 proto 107 src fd00:9::1 table {T}",
        f"ip route add 10.2.0.7/32 via 192.168.9.77 proto 107 src 192.168.9.1 table {T}",
        f"ip route add 192.168.9.2/32 dev lo proto 107 metric 4294967295 table {T}",
        f"ip route add unreachable fd00:9::2/128 proto 107 metric 4294967295 table {T}",
        f"ip route add 10.2.0.7/32 dev lo proto 107 metric 4294967295 table {T}",
        f"ip route add 192.168.9.3/32 dev lo proto 107 metric 4294967295 table {T}",
        f"ip -4 rule add priority {PAST} from 192.168.9.1 ipproto udp sport 1107 lookup main",
        f"ip -4 rule add priority {PAST} from 192.168.9.1 ipproto udp sport 51820 lookup main",
        f"ip -4 rule add priority {PAST} to 192.168.0.0/17 ipproto tcp dport 22 lookup main",
        f"ip -4 rule add priority {PAST} to 192.168.0.0/17 ipproto tcp sport 22 lookup main",
        f"ip -4 rule add priority {PAST} to 192.168.9.2/32 ipproto tcp dport 2379 lookup main",
        f"ip -4 rule add priority {INTO} not fwmark 107 lookup {T}",
        f"ip -6 rule add priority {PAST} from fd00:9::1 ipproto udp sport 1107 lookup main",
        f"ip -6 rule add priority {PAST} from fd00:9::1 ipproto udp sport 51820 lookup main",
        f"ip -6 rule add priority {PAST} to fd00:9::/62 ipproto ipv6-icmp lookup main",
        f"ip -6 rule add priority {INTO} not fwmark 107 lookup {T}",
    ]
    # WireGuard has its mark and takes the packets before any is sent there.
    marked, known = made.index("wg set kilo0 listen-port 51820 fwmark 107 private-key (hidden)"), made.index(rest[2])
    assert marked < known
    assert any("192.168.9.2/32" in line and "allowed-ips" in line for line in made[marked:known])
    assert commands(ON, after(ON, LOCAL)) == []


def test_what_is_sent_from_an_endpoint_that_nobody_encrypts_for_leaves_in_clear() -> None:
    wanted = evolve(ON, encryption=evolve(ENCRYPTION, clear_sources=(ip_address("203.0.113.1"),)))
    more = [line for line in commands(wanted, LOCAL) if line not in commands(ON, LOCAL)]
    assert more == [f"ip -4 rule add priority {PAST} from 203.0.113.1 lookup main"]
    assert commands(wanted, after(wanted, LOCAL)) == []
    assert commands(ON, after(wanted, LOCAL)) == [f"ip -4 rule del priority {PAST} from 203.0.113.1 lookup main"]


def test_it_is_turned_off_from_the_rule_to_the_mark() -> None:
    host = after(ON, LOCAL)
    assert (host.strict, host.loosened, host.mark) == ({}, {"eth0": "1", "kilo0": "0"}, 107)
    made = commands(PLAIN, host)
    kinds = [line.split()[2] if " rule " in line else line.split()[0] for line in made]
    assert kinds == ["rule"] * 10 + ["ip"] * 7 + ["nft", "sysctl", "sysctl", "wg"]
    # What leads into the tunnel goes before what leads past it.
    assert [index for index, line in enumerate(made) if "not fwmark" in line] == [0, 4]
    assert made[-4:] == [
        "nft delete table inet kilo", "sysctl -w net.ipv4.conf.eth0.rp_filter=1",
        "sysctl -w net.ipv4.conf.kilo0.rp_filter=0", "wg set kilo0 fwmark off",
    ]  # fmt: skip
    off = after(PLAIN, host)
    assert (off.policy.tables, off.policy.rules, off.loosened, off.mark, off.table) == ({}, frozenset(), {}, 0, None)


def test_an_address_of_the_main_table_and_of_ours_is_never_without_a_way() -> None:
    """From `routed` to `encrypted` and back: there is a route somewhere at any time."""
    routed = evolve(PLAIN, routes={**PLAIN.routes, **{n: r for n, r in ENCRYPTION.send.items() if r.via is Via.TUNNEL}})
    for before, then in ((routed, ON), (ON, routed)):
        host = after(before, LOCAL)
        for change in diff(then, host, Memory(), TARGET):
            host = apply_changes(host, [change], "kilo0")
            for network in ENCRYPTION.nodes:
                there = ip_network(network)
                if there in routed.routes:
                    into = [rule for rule in host.policy.rules if rule.table == T and rule.version == network.version]
                    assert there in host.routes or (into and there in host.policy.table(T).routes), str(change)


def test_one_address_more_is_a_few_changes_and_no_new_table() -> None:
    more = evolve(
        ENCRYPTION,
        nodes={*ENCRYPTION.nodes, ip_address("192.168.9.4")},
        send={**ENCRYPTION.send, ip_network("192.168.9.3/32"): tunnel("192.168.9.3/32", "192.168.9.1")},
        hold=frozenset(),
        refuse=frozenset({ip_address("192.168.9.3"), ip_address("fd00:9::2")}),
    )
    assert commands(evolve(PLAIN, encryption=more), after(ON, LOCAL)) == [
        "nft add element inet kilo others4 { 192.168.9.4 }",
        "nft add element inet kilo refuse4 { 192.168.9.3 }",
        "nft delete element inet kilo refuse4 { 192.168.9.2 }",
        f"ip route add 192.168.9.3/32 dev kilo0 proto 107 src 192.168.9.1 table {T}",
    ]
    # And held again: the last resort is there already, nothing leaves in clear in between.
    assert commands(ON, after(evolve(PLAIN, encryption=more), LOCAL))[3:] == [
        f"ip route del 192.168.9.3/32 dev kilo0 proto 107 src 192.168.9.1 table {T}"
    ]


def test_a_way_by_a_leader_changes_in_one_message() -> None:
    elsewhere = {**ENCRYPTION.send, ip_network("10.2.0.7/32"): via("10.2.0.7/32", "192.168.9.78", source="192.168.9.1")}
    assert commands(evolve(PLAIN, encryption=evolve(ENCRYPTION, send=elsewhere)), after(ON, LOCAL)) == [
        f"ip route replace 10.2.0.7/32 via 192.168.9.78 proto 107 src 192.168.9.1 table {T}"
    ]


def test_an_exit_node_and_encryption_share_the_mark_and_keep_their_order() -> None:
    away = evolve(ON, exit_route=ExitRoute(families=frozenset({4}), sources=(ip_address("192.168.9.1"),)))
    host = after(away, LOCAL)
    assert commands(away, host) == []
    exit_first = min(rule.priority for rule in host.policy.rules if rule.priority >= 10_700)
    assert {rule.priority for rule in host.policy.rules if rule.priority < 10_700} == {PAST, INTO}
    assert PAST < INTO < exit_first
    assert len(host.policy.tables) == 2
    for less in (evolve(away, exit_route=None), evolve(away, encryption=None)):
        assert not any("fwmark" in line and line.startswith("wg") for line in commands(less, host))
        assert commands(less, after(less, host)) == []
    # One that is held is left as it is, whatever becomes of the encryption.
    assert away.exit_route is not None
    held = evolve(away, encryption=None, exit_route=evolve(away.exit_route, held=True, sources=()))
    left = after(held, host)
    assert {rule.priority >= 10_700 for rule in left.policy.rules} == {True}
    assert left.mark == 107


def test_a_mesh_without_ipv4_has_an_address_for_the_reverse_path_check() -> None:
    six = evolve(ON, addresses=plan(addresses=("fd00:4::1/128",)).addresses)
    assert "ip address add 192.168.9.1/32 dev kilo0" in commands(six, LOCAL)
    host = after(six, LOCAL)
    assert commands(six, host) == []
    assert "ip address del 192.168.9.1/32 dev kilo0" in commands(evolve(six, encryption=None), host)


def test_a_host_that_is_loose_already_is_left_so() -> None:
    loose = Observed(underlay=("eth0",))
    made = commands(ON, loose)
    assert not any("sysctl" in line for line in made)
    assert "spoofed" not in "".join(made)
    assert 'iifname "eth0" ip saddr != @others4' in "".join(commands(ON, LOCAL))


def test_a_host_that_forwards_nothing_tracks_no_connections() -> None:
    idle = table_for(ON, "kilo0")
    assert idle is not None
    assert [chain.name for chain in idle.chains] == ["encrypted"]


def test_wireguards_packets_are_looked_up_nowhere_but_come_behind_the_reverse_path_check() -> None:
    table = table_for(ON, "kilo0", strict=("eth0",))
    assert table is not None
    texts = [rule.text for rule in table.rules if rule.chain == "encrypted"]
    quick = texts.index("udp dport 51820 ip daddr 192.168.9.1 accept")
    assert texts[quick + 1] == "udp dport 51820 ip6 daddr fd00:9::1 accept"
    (spoofed,) = (number for number, text in enumerate(texts) if "counter name spoofed drop" in text)
    looked_up = [number for number, text in enumerate(texts) if "@refuse" in text or "fib daddr" in text]
    assert spoofed < quick < min(looked_up)


def test_a_plan_without_it_costs_and_changes_nothing() -> None:
    assert ours(commands(PLAIN, LOCAL)) == []
    assert table_for(PLAIN, "kilo0", strict=("eth0",), forwarding=(4, 6)) is None


def test_interfaces_of_one_machine_keep_apart() -> None:
    names = ("kilo0", "kilo1", "kilo-a", "kilo-b", "wg0", "wg1", "mesh0", "kilo-kilo")
    tables = [number for name in names for number in own_tables(name)]
    assert len(set(tables)) == len(tables)
    priorities = [priority for name in names for priority in own_priorities(name)]
    assert len(set(priorities)) == len(priorities)
    assert all(10_600 <= rule_priorities(name)[0] < rule_priorities(name)[1] < 10_700 for name in names)


def test_what_fails_is_said_with_what_follows_and_keeps_nobody_from_leading() -> None:
    every = diff(ON, LOCAL, Memory(), evolve(TARGET, clamp_mss=False))

    def why(change: Change, code: int = errno.EOPNOTSUPP) -> str:
        found = failure(change, NetlinkError(code))
        assert found.aside
        return found.text

    texts = {str(change): why(change) for change in every if ours([str(change)])}
    assert len(texts) == 20
    for command, text in texts.items():
        if " rule " in command:
            assert "leaves in clear" in text
        elif "metric" in command:
            assert "may leave in clear" in text
        elif "ip route" in command:
            assert "is dropped" in text
        elif "sysctl" in command:
            assert command in text
        else:
            assert "what comes in clear from other nodes is taken" in text
            assert "nft_fib_inet" in text
    (six,) = [change for change in every if "fd00:9::2/128 dev kilo0" in str(change)]
    assert why(six, errno.EACCES).endswith("is dropped; set net.ipv6.conf.kilo0.disable_ipv6=0")
    assert why(LoosenReversePath("eth0.100"), errno.EROFS).count("net/ipv4/conf/eth0.100/rp_filter") == 2


# -- what a kernel holds --------------------------------------------------------------------------------------


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def state() -> str:
    shown = "".join(sh(f"ip -{v} rule; ip -{v} route show table all") for v in (4, 6))
    values = "".join(f"{path.parent.name} {path.read_text()}" for path in _RP_FILTER.glob("*/rp_filter"))
    return "\n".join(sorted(f"{shown}{values}{sh('nft list tables')}".splitlines()))


_RP_FILTER = Path("/proc/sys/net/ipv4/conf")


async def lan(strict: str = "1") -> None:
    sh(f"sysctl -qw net.ipv4.conf.all.rp_filter={strict} net.ipv4.conf.default.rp_filter={strict}")
    sh("ip link add eth0 type veth peer eth1")
    for end in ("eth0", "eth1"):
        sh(f"ip link set {end} addrgenmode none && ip link set {end} up")
    # The kernel brings a new link up by and by.
    await eventually(lambda: sh("ip -br link").count(" UP ") == 2, 30, what="both ends up")
    sh("ip address add 192.168.9.1/24 dev eth0 && ip -6 address add fd00:9::1/64 dev eth0 nodad")
    sh("ip route add default via 192.168.9.77; ip -6 route add default via fd00:9::77")
    await eventually(lambda: "local fd00:9::1" in sh("ip -6 route show table local"), 30, what="the address's route")


def table(wanted: HostPlan) -> FirewallTable:
    found = table_for(wanted, "kilo0", strict=("eth0",), forwarding=(4, 6))
    assert found is not None
    return found


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_the_kernel_gives_back_the_table_and_nft_reads_our_text_alike() -> None:
    netfilter = Netfilter()
    everything = evolve(
        ON,
        encryption=evolve(
            ENCRYPTION, etcd_here=(2379, 2380), etcd=(*ENCRYPTION.etcd, (ip_address("fd00:9::2"), 2379)),
            clear=(*map(Exemption.parse, ("udp/161@0.0.0.0/0", "tcp@192.168.9.2", "icmp@192.168.9.2", "udp@::/0")),),
        ),
        ipip_remotes=frozenset({ip_address("192.168.9.8")}), ipip_local=ip_address("192.168.9.1"),
        masquerade=(ip_network("192.168.1.50/32"),), masquerade_not=frozenset({ip_address("192.168.1.7")}),
    )  # fmt: skip
    for wanted in (ON, everything):
        netfilter.replace(table(wanted))
        assert netfilter.read("kilo") == table(wanted)
        listed = subprocess.run(["nft", "list", "table", "inet", "kilo"], check=True, capture_output=True, text=True)
        sh("nft delete table inet kilo")
        sh(str(ReplaceTable(table(wanted))))
        assert sh("nft list table inet kilo") == listed.stdout
    netfilter.close()


async def settled(kernel: Kernel, wanted: HostPlan) -> None:
    writes = kernel.writes
    for fresh in (False, True, True):
        report = await kernel.apply(wanted, fresh=fresh)
        assert (lines(report.changes), report.failures) == ([], ())
    assert kernel.writes == writes


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_it_is_set_up_repaired_and_removed_on_a_real_kernel() -> None:
    await lan()
    before = state()
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(PLAIN)
        without = state()
        report = await kernel.apply(ON)
        assert report.failures == ()
        await settled(kernel, ON)
        with trio.move_on_after(0.7) as waited:
            raise AssertionError(await kernel.wait_drift())
        assert waited.cancelled_caught
        assert sh("wg show kilo0 fwmark") == "0x6b\n"

        def way(address: str, *more: str) -> str:
            return sh(f"ip route get {address} {' '.join(more)}").split(" dev ")[1].split()[0]

        assert [way(text) for text in ("192.168.9.2", "fd00:9::2", "192.168.9.3")] == ["kilo0", "kilo0", "lo"]
        assert "src 192.168.9.1" in sh("ip route get 192.168.9.2")
        assert way("192.168.9.2", "mark 107") == "eth0"
        assert way("192.168.9.2", "ipproto tcp dport 2379") == "eth0"
        assert way("192.168.9.2", "ipproto tcp dport 2380") == "kilo0"
        assert way("192.168.9.2", "from 192.168.9.1 ipproto udp sport 51820 dport 51820") == "eth0"
        assert way("192.168.9.50") == "eth0"

        whole = state()
        for harm in (
            f"ip rule del priority {INTO}",
            f"ip -6 rule del priority {INTO}",
            f"ip rule del priority {PAST} to 192.168.9.2 ipproto tcp dport 2379",
            f"ip route del 192.168.9.2 dev kilo0 table {T}",
            f"ip route del 192.168.9.3 table {T}",
            f"ip -6 route del unreachable fd00:9::2 table {T}",
            f"ip -6 route del fd00:9::2 dev kilo0 table {T}",
            "wg set kilo0 fwmark off",
            "sysctl -w net.ipv4.conf.eth0.rp_filter=1",
            "nft flush ruleset",
            "nft add element inet kilo refuse4 '{ 192.168.9.99 }'",
        ):
            with soon(20):
                sh(harm)
                with trio.fail_after(30):
                    await kernel.wait_drift()
                assert len((await kernel.apply(ON, fresh=True)).changes) == 1, harm
                assert state() == whole, harm
        await settled(kernel, ON)

        assert (await kernel.apply(PLAIN)).failures == ()
        await settled(kernel, PLAIN)
        assert sh("wg show kilo0 fwmark") == "off\n"
        assert state() == without
        assert (await kernel.apply(ON)).failures == ()
    # Another agent finds it, and cleanup takes it away.
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await settled(kernel, ON)
    await cleanup("kilo0", public_key=key(0))
    assert state() == before
    assert await cleanup("kilo0", public_key=key(0)) == ()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_rule_of_an_operators_that_lets_packets_out_in_clear_is_named() -> None:
    await lan()
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(ON)
        sh("ip route add default dev eth0 table 300")
        sh("ip route add 10.99.0.0/16 dev eth0 table 301")
        harmless = (
            "from all ipproto udp sport 51820 lookup 300",  # WireGuard's own
            "from all ipproto tcp dport 22 to 192.168.9.2 lookup 300",  # exempted
            "from 10.50.0.1 lookup 300",  # another host's address
            "from all lookup 301",  # nobody's network
            "fwmark 7 lookup 300",  # marked packets
            "iif eth0 lookup 300",  # forwarded packets
            "from all blackhole to 192.168.9.2",
            "to 10.99.0.0/16 lookup 300",
        )
        for words in harmless:
            sh(f"ip rule add priority 300 {words}")
        assert await kernel.bypasses() == ()
        for words, first in (
            ("from all lookup 300", "10.2.0.7 and 2 more addresses of nodes"),
            ("from 192.168.9.1 to 192.168.9.3 lookup 300", "192.168.9.3, the address of a node,"),
            ("from all lookup main suppress_prefixlength 0", "192.168.9.2 and 1 more addresses of nodes"),
            ("from all ipproto tcp lookup main", "10.2.0.7 and 2 more addresses of nodes"),
            ("from all ipproto tcp dport 80 lookup 300", "10.2.0.7 and 2 more addresses of nodes"),
            ("from all ipproto udp sport 1000-51820 lookup 300", "10.2.0.7 and 2 more addresses of nodes"),
            ("from all ipproto tcp dport 22 lookup 300", "10.2.0.7, the address of a node,"),
        ):
            sh(f"ip rule add priority 301 {words}")
            (commands,) = await kernel.bypasses()
            assert f"(priority {INTO})" in commands
            asked = words.partition("ipproto ")[2].partition(" lookup")[0]
            limited = f"with ipproto {asked} " if asked else ""
            assert f"so that packets {limited}for {first} leave in clear: ip -4 rule priority 301 from " in commands
            sh(f"ip rule del priority 301 {words}")
        sh("ip rule add priority 12000 lookup 300")
        assert await kernel.bypasses() == ()
        await kernel.apply(PLAIN)
        sh("ip rule add priority 301 lookup 300")
        assert await kernel.bypasses() == ()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_person_who_types_what_is_printed_gets_the_same() -> None:
    await lan()
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(PLAIN)
        made = (await kernel.apply(ON)).changes
        ours = by_anybody(state())
        undone = (await kernel.apply(PLAIN)).changes
        without = state()
        for changes, then in ((made, ours), (undone, without)):
            for change in changes:
                sh(str(change))
            assert by_anybody(state()) == then


def by_anybody(state: str) -> str:
    """Without the mark by which we know our rules."""
    return "\n".join(line.removesuffix(" proto 107") for line in state.splitlines())


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_is_believed_is_what_is_there_and_element_changes_are_small() -> None:
    await lan(strict="2")
    many = frozenset(ip_address(0x0A000001 + number) for number in range(10_000))
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        for refuse in (frozenset(), many, many - {ip_address("10.0.0.9")}, ENCRYPTION.refuse):
            anywhere = tuple(map(Exemption.parse, ("udp/161@0.0.0.0/0", "tcp@::/0")))
            known = evolve(ENCRYPTION, refuse=refuse, nodes={*refuse, *ENCRYPTION.nodes}, clear=anywhere)
            wanted = evolve(PLAIN, encryption=known)
            assert (await kernel.apply(wanted)).failures == ()
            believed = await kernel.apply(wanted)
            assert believed.changes == ()
            assert without_counters(await kernel.observe()).table == table_for(wanted, "kilo0")
            await settled(kernel, wanted)
        writes = kernel.writes
        fewer = evolve(wanted, encryption=evolve(known, refuse=frozenset(), nodes=ENCRYPTION.nodes))
        await kernel.apply(fewer)
        assert kernel.writes == writes + 2


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_without_the_exceptions_nothing_is_led_into_the_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel whose rules know no ports."""
    await lan()
    refused = evolve(ENCRYPTION, clear=(), etcd=((ip_address("192.168.9.2"), 2379),))
    pack = rtnl.add_rule

    def old(rule: RoutingRule, protocol: int) -> NetlinkMessage:
        if rule.sport or rule.dport:
            raise FormatError
        return pack(rule, protocol)

    monkeypatch.setattr(rtnl, "add_rule", old)
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        report = await kernel.apply(evolve(PLAIN, encryption=refused))
        assert {failure.subject.split(" lookup ")[-1] for failure in report.failures} == {"main"}
        assert not any(isinstance(change, AddRule) for change in report.changes)
        assert any(isinstance(change, AddRoute) and change.route.table == T for change in report.changes)
        assert "fwmark" not in sh("ip rule; ip -6 rule")
