"""Our nftables table: what it says, that the kernel holds what it says, and that `nft` reads our text alike."""

from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import ip_address, ip_network

import pytest
import trio
from attrs import evolve
from kernel_worlds import PRIVATE, TARGET, host_with, lines, plan

from helpers import eventually
from kilo_etcd.kernel import Memory, Setup, cleanup, diff, open_kernel
from kilo_etcd.kernel.errors import failure
from kilo_etcd.kernel.firewall.netfilter import Netfilter
from kilo_etcd.kernel.firewall.packet_filter import table_for, table_name
from kilo_etcd.kernel.firewall.table import AddElements, FirewallTable, ReplaceTable, Rule
from kilo_etcd.kernel.predict import apply_changes
from kilo_etcd.kernel.state import Change
from kilo_etcd.model.hostplan import ExitRoute, HostPlan, RoutePlan, Via
from kilo_etcd.testing.fake_kernel import FakeHost, open_fake_kernel

LOCATION = plan(
    masquerade=("192.168.1.50/32", "192.168.16.0/20", "10.0.0.0/7", "fd00:7::/61"),
    masquerade_not=("192.168.16.2", "fd00:7::2"),
)
ENCAPSULATED = evolve(
    LOCATION,
    ipip_remotes=frozenset({ip_address("192.168.9.2"), ip_address("192.168.8.2")}),
    ipip_local=ip_address("192.168.9.1"),
)
ANSWERING = evolve(
    plan(addresses=("fd00:4::1/128",)),
    exit_route=ExitRoute(sources=(ip_address("2001:db8::7"),), families=frozenset({6})),
    routes={
        network: RoutePlan(destination=network, via=Via.TUNNEL, source=ip_address("2001:db8::7"))
        for network in (ip_network("fd00:9::1/128"), ip_network("fd00:9::2/128"))
    },
)


def table(wanted: HostPlan, interface: str = "kilo0") -> FirewallTable:
    found = table_for(wanted, interface)
    assert found is not None
    return found


def nft(*words: str) -> str:
    return subprocess.run(["nft", *words], check=True, capture_output=True, text=True).stdout


# -- what is decided: pure ------------------------------------------------------------------------------------


def test_a_plan_that_needs_no_rules_has_no_table() -> None:
    assert table_for(plan(), "kilo0") is None
    assert diff(plan(), host_with(plan()), Memory(), TARGET) == ()


def test_ipip_is_taken_from_the_nodes_named_and_from_nobody_else() -> None:
    rules = [rule.text for rule in table(ENCAPSULATED).rules if rule.chain == "input"]
    assert rules == [
        "meta l4proto 4 ip daddr 192.168.9.1 ip saddr @ipip_nodes counter name ipip_accepted accept",
        "meta l4proto 4 ip daddr 192.168.9.1 counter name ipip_dropped drop",
    ]
    (nodes, *_) = table(ENCAPSULATED).sets
    assert nodes.addresses == {ip_address("192.168.9.2"), ip_address("192.168.8.2")}


def test_what_comes_out_of_the_tunnel_for_the_locations_network_is_masqueraded_but_to_nodes() -> None:
    assert [rule.text for rule in table(LOCATION).rules] == [
        'iifname "kilo0" ip daddr @nodes4 return',
        'iifname "kilo0" ip6 daddr @nodes6 return',
        'iifname "kilo0" oifname != "kilo0" ip daddr 192.168.1.50/32 counter name masqueraded masquerade',
        'iifname "kilo0" oifname != "kilo0" ip daddr 192.168.16.0/20 counter name masqueraded masquerade',
        'iifname "kilo0" oifname != "kilo0" ip daddr 10.0.0.0/7 counter name masqueraded masquerade',
        'iifname "kilo0" oifname != "kilo0" ip6 daddr fd00:7::/61 counter name masqueraded masquerade',
    ]


def test_tcp_that_a_host_forwards_is_made_to_fit_both_sides_unless_the_operator_does_not_want_it() -> None:
    """The kernel lowers a segment size only, so nothing changes where both sides have one MTU."""
    forwards = plan(clamps=True)
    size = "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu"
    assert [rule.text for rule in table(forwards).rules] == [f'iifname "kilo0" {size}', f'oifname "kilo0" {size}']
    (chain,) = table(forwards).chains
    assert (chain.kind, chain.hook) == ("filter", "forward")
    inside = evolve(ENCAPSULATED, clamps=True)
    assert f'oifname "kilo-ipip" {size}' in [rule.text for rule in table(inside).rules], "members are behind IPIP"
    off = evolve(TARGET, clamp_mss=False)
    assert diff(forwards, host_with(plan()), Memory(), off) == ()
    assert lines(diff(forwards, host_with(forwards), Memory(), off)) == ["nft delete table inet kilo"]
    assert diff(forwards, host_with(forwards), Memory(), TARGET) == ()


def test_the_table_is_named_after_the_interface() -> None:
    assert table_name("kilo0") == "kilo"
    assert table_name("wg-home.1") == "kilo-wg-home.1"
    assert table_name("wg 1;flush") == "kilo-wg_201_3bflush"


def test_the_table_is_replaced_only_where_it_differs() -> None:
    host = host_with(ENCAPSULATED)
    assert diff(ENCAPSULATED, host, Memory(), TARGET) == ()
    others = evolve(ENCAPSULATED, ipip_remotes=frozenset({ip_address("192.168.9.2"), ip_address("192.168.9.3")}))
    moved = diff(others, host, Memory(), TARGET)
    assert lines(moved) == [
        "nft add element inet kilo ipip_nodes { 192.168.9.3 }",
        "nft delete element inet kilo ipip_nodes { 192.168.8.2 }",
    ]
    assert diff(others, apply_changes(host, moved, "kilo0"), Memory(), TARGET) == ()
    local = evolve(ENCAPSULATED, ipip_local=ip_address("192.168.9.9"))
    assert ReplaceTable in [type(change) for change in diff(local, host, Memory(), TARGET)]
    assert lines(diff(plan(), host, Memory(), TARGET))[-1] == "nft delete table inet kilo"


def test_a_rule_that_somebody_added_is_a_difference() -> None:
    host = host_with(LOCATION)
    assert host.table is not None
    more = evolve(host.table, rules=(*host.table.rules, Rule(chain="postrouting", expressions=(("counter", ()),))))
    assert [type(c) for c in diff(LOCATION, evolve(host, table=more), Memory(), TARGET)] == [ReplaceTable]


def test_a_kernel_without_nftables_is_one_sentence_and_the_host_may_lead_all_the_same() -> None:
    said = failure(ReplaceTable(table(ENCAPSULATED)), OSError(95, "Operation not supported"))
    assert said.aside
    assert said.text == (
        "this kernel lacks nftables or a part of it, so IPIP is taken from anybody and hosts without an agent do not "
        "answer the mesh: load the modules nf_tables, nft_nat and nft_masq"
    )
    said = failure(ReplaceTable(table(plan(clamps=True))), OSError(95, "Operation not supported"))
    assert said.text == (
        "TCP that this host forwards may be too large for the tunnel, since the kernel refuses the rules that lower "
        "its segment size (Operation not supported): load the module nf_tables (before Linux 4.18 nft_exthdr and "
        "nft_rt too) and restart the agent, or give --no-clamp-mss"
    )
    said = failure(ReplaceTable(table(ANSWERING)), OSError(95, "Operation not supported"))
    assert (
        "no answer as long as it has an exit node: load the modules nf_tables, nft_ct and nft_reject_inet" in said.text
    )


async def test_the_kernel_in_memory_has_a_table_too() -> None:
    host = FakeHost()
    host.refuse = lambda change: "no" if isinstance(change, ReplaceTable) else None
    async with open_fake_kernel(host, Setup(private_key=PRIVATE)) as kernel:
        (refusal,) = (await kernel.apply(LOCATION)).failures
        assert refusal.aside
        host.refuse = lambda change: None
        await kernel.apply(LOCATION)
        assert host.observed.table == table(LOCATION)
        assert (await kernel.apply(LOCATION)).changes == ()
    assert "nft delete table inet kilo" in lines(host.cleanup())


def without_sizes(change: Change) -> str | None:
    return "no sizes" if isinstance(change, ReplaceTable) and "chain sizes" in str(change) else None


async def test_a_table_that_is_refused_is_made_without_the_rules_on_segment_sizes() -> None:
    host, both = FakeHost(), evolve(ENCAPSULATED, clamps=True)
    host.refuse = without_sizes
    async with open_fake_kernel(host, Setup(private_key=PRIVATE)) as kernel:
        report = await kernel.apply(plan(clamps=True))
        assert (report.failures, report.notes, host.observed.table) == ((), ("no sizes",), None)
        report = await kernel.apply(both)
        assert (report.failures, report.notes, host.observed.table) == ((), ("no sizes",), table(ENCAPSULATED))
        assert await kernel.preview(both) == (), "nothing is undone"
        assert (await kernel.apply(both, fresh=True)).changes == ()
        assert (await kernel.apply(ENCAPSULATED)).notes == (), "nothing is missing"
        host.refuse = lambda change: None
        report = await kernel.apply(both, fresh=True)
        assert (report.notes, host.observed.table) == ((), table(both))


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_kernel_that_refuses_the_rules_on_segment_sizes_gets_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    replace, both = Netfilter.replace, evolve(LOCATION, clamps=True)

    def lacking(netfilter: Netfilter, wanted: FirewallTable) -> None:
        if without_sizes(ReplaceTable(wanted)):
            raise OSError(95, "Operation not supported")
        replace(netfilter, wanted)

    monkeypatch.setattr(Netfilter, "replace", lacking)
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        report = await kernel.apply(plan(clamps=True))
        assert (report.failures, [note.split(",")[0] for note in report.notes]) == (
            (), ["TCP that this host forwards may be too large for the tunnel"]
        )  # fmt: skip
        for _ in range(2):
            report = await kernel.apply(both, fresh=True)
            assert (report.failures, len(report.notes)) == ((), 1)
            assert (await kernel.observe()).table == table(LOCATION)
            assert await kernel.preview(both) == ()
        writes = kernel.writes
        assert (await kernel.apply(both)).changes == ()
        assert kernel.writes == writes, "what is refused is not tried all the time"
        monkeypatch.setattr(Netfilter, "replace", replace)
        assert (await kernel.apply(both, fresh=True)).notes == ()
        assert (await kernel.observe()).table == table(both)


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_the_kernel_gets_no_rules_on_segment_sizes_if_the_operator_does_not_want_them() -> None:
    async with open_kernel(Setup(private_key=PRIVATE, clamp_mss=False)) as kernel:
        report = await kernel.apply(evolve(LOCATION, clamps=True))
        assert (report.failures, report.notes) == ((), ())
        assert (await kernel.observe()).table == table(LOCATION)


# -- what the kernel holds ------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_the_kernel_gives_back_what_it_was_given_and_nft_reads_our_text_alike() -> None:
    netfilter = Netfilter()
    assert netfilter.read("kilo") is None
    clamping = evolve(ENCAPSULATED, clamps=True)
    for wanted in (LOCATION, ENCAPSULATED, evolve(ENCAPSULATED, masquerade=()), ANSWERING, clamping):
        netfilter.replace(table(wanted))
        assert netfilter.read("kilo") == table(wanted)
    for wanted in (clamping, ANSWERING):
        netfilter.replace(table(wanted))
        ours = nft("list", "table", "inet", "kilo")
        nft("delete", "table", "inet", "kilo")
        nft(str(ReplaceTable(table(wanted))).removeprefix("nft '").removesuffix("'"))
        assert nft("list", "table", "inet", "kilo") == ours
    odd = table(LOCATION, "wg 1;flush")
    netfilter.replace(odd)
    assert netfilter.read(odd.name) == odd
    netfilter.delete("kilo")
    netfilter.delete("kilo")
    assert nft("list", "tables").split() == ["table", "inet", odd.name]
    netfilter.close()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_thousands_of_nodes_fit_one_transaction() -> None:
    many = frozenset(ip_address(0x0A000001 + number) for number in range(20_000))
    wanted = table(evolve(ENCAPSULATED, ipip_remotes=many))
    netfilter = Netfilter()
    netfilter.replace(wanted)
    assert netfilter.read("kilo") == wanted
    netfilter.close()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.parametrize(
    "harm",
    [
        "flush ruleset",
        "delete table inet kilo",
        "flush chain inet kilo postrouting",
        "insert rule inet kilo postrouting return",
        "delete element inet kilo nodes4 { 192.168.16.2 }",
        "add chain inet kilo more { type filter hook forward priority 0; policy drop; }",
    ],
)
async def test_a_table_that_somebody_changes_is_repaired(harm: str) -> None:
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        report = await kernel.apply(LOCATION)
        assert report.failures == ()
        nft("add table inet other; add chain inet other kilo")
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def harmed() -> None:
                nft(harm)

            with trio.fail_after(30):
                assert await kernel.wait_drift() == "nftables table inet kilo was changed"
        report = await kernel.apply(LOCATION, fresh=True)
        only = AddElements if harm.startswith("delete element") else ReplaceTable
        assert [type(change) for change in report.changes] == [only]
        # Neither our own change nor somebody's own table is news.
        nft("add table inet other; add chain inet other more")
        with trio.move_on_after(0.2) as waited:
            await kernel.wait_drift()
        assert waited.cancelled_caught
        writes = kernel.writes
        assert (await kernel.apply(LOCATION, fresh=True)).changes == ()
        assert kernel.writes == writes


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_new_agent_adopts_the_table_and_cleanup_removes_it_alone() -> None:
    nft("add table inet other")
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(LOCATION)
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        assert (await kernel.apply(LOCATION)).changes == ()
        assert lines((await kernel.apply(plan())).changes) == ["nft delete table inet kilo"]
        await kernel.apply(LOCATION)
    assert "nft delete table inet kilo" in lines(await cleanup("kilo0"))
    assert nft("list", "tables").split() == ["table", "inet", "other"]


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_ipip_from_a_stranger_is_dropped_and_counted() -> None:
    """Two hosts on a wire; IPIP is a header, which a raw socket writes."""

    def sh(command: str) -> None:
        subprocess.run(command, shell=True, check=True)

    sh(
        "mount -t tmpfs none /run/netns 2>/dev/null || mkdir -p /run/netns; ip netns add far && "
        "ip link add wire type veth peer name wire netns far && ip address add 192.168.9.1/24 dev wire && "
        "ip link set wire up && for last in 2 3; do ip -n far address add 192.168.9.$last/24 dev wire; done && "
        "ip -n far link set wire up"
    )
    netfilter = Netfilter()
    netfilter.replace(table(evolve(ENCAPSULATED, masquerade=())))
    send = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 4); s.bind(('{}', 0)); "
        "s.sendto(bytes(20), ('192.168.9.1', 0))"
    )
    for source in ("192.168.9.2", "192.168.9.3", "192.168.9.3"):
        sh(f'ip netns exec far python3 -c "{send.format(source)}"')
    found = json.loads(nft("-j", "list", "counters", "table", "inet", "kilo"))["nftables"]
    counted = {item["counter"]["name"]: item["counter"]["packets"] for item in found if "counter" in item}
    assert counted == {"ipip_accepted": 1, "ipip_dropped": 2}
    netfilter.close()


_SEGMENT_SIZES = """
import socket, sys
listener = socket.create_server(("::", 5001), family=socket.AF_INET6, dualstack_ipv6=True)
print(flush=True)
while True:
    connection, _ = listener.accept()
    size = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    connection.sendall(str(size).encode())
    connection.close()
"""
_CONNECT = (
    "import socket, sys; c = socket.create_connection((sys.argv[1], 5001), 10); "
    "print(c.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG), c.recv(99).decode())"
)


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_both_ends_of_a_forwarded_connection_send_no_more_than_the_narrower_side_takes() -> None:
    """A host in the middle forwards; the device towards the far end is named as the tunnel's and takes 1300 bytes."""

    def sh(command: str) -> str:
        return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout

    sh(
        "mount -t tmpfs none /run/netns 2>/dev/null || mkdir -p /run/netns; ip netns add far; ip netns add near; "
        "ip link add kilo0 type veth peer name wire netns far; ip link add eth0 type veth peer name wire netns near; "
        "for net in far near; do ip -n $net link set wire up; ip -n $net link set lo up; done; "
        "ip address add 10.4.0.1/24 dev kilo0; ip address add fd00:4::1/64 dev kilo0 nodad; "
        "ip address add 10.1.0.1/24 dev eth0; ip address add fd00:1::1/64 dev eth0 nodad; "
        "ip link set kilo0 mtu 1300 up; ip link set eth0 up; "
        "ip -n far address add 10.4.0.9/24 dev wire; ip -n far address add fd00:4::9/64 dev wire nodad; "
        "ip -n near address add 10.1.0.9/24 dev wire; ip -n near address add fd00:1::9/64 dev wire nodad; "
        "for via in 10.4.0.1 fd00:4::1; do ip -n far route add default via $via; done; "
        "for via in 10.1.0.1 fd00:1::1; do ip -n near route add default via $via; done; "
        "sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"
    )
    ends = {"near": ("10.4.0.9", "fd00:4::9"), "far": ("10.1.0.9", "fd00:1::9")}

    def sizes() -> list[str]:
        return [
            sh(f"ip netns exec {name} {sys.executable} -c '{_CONNECT}' {address}").strip()
            for name, addresses in ends.items()
            for address in addresses
        ]

    def answer() -> bool:
        """A worker of the kernel makes routes of IPv6 addresses by and by."""
        pings = (f"ip netns exec {name} ping -c 1 -W 1 {address}" for name in ends for address in ends[name])
        return all(subprocess.run(ping, shell=True, capture_output=True, check=False).returncode == 0 for ping in pings)

    await eventually(answer, 30, every=0.05, what="answers from both ends")

    def serve(name: str) -> subprocess.Popen[str]:
        program = ["ip", "netns", "exec", name, sys.executable, "-c", _SEGMENT_SIZES]
        return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)

    servers = [serve(name) for name in ends]
    netfilter = Netfilter()
    try:
        for server in servers:
            assert server.stdout is not None
            server.stdout.readline()
        assert set(sizes()) == {"1448 1448", "1428 1428"}, "of 1500 bytes, less headers and timestamps"
        netfilter.replace(table(plan(clamps=True)))
        assert set(sizes()) == {"1248 1248", "1228 1228"}
        sh("ip link set kilo0 mtu 1500; ip link set eth0 mtu 1500")
        assert set(sizes()) == {"1448 1448", "1428 1428"}, "nothing changes between sides of one MTU"
    finally:
        netfilter.close()
        for server in servers:
            server.kill()
            server.wait()
