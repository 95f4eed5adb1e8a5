"""Echo requests, in network namespaces of the test's own."""

from __future__ import annotations

import errno
import socket
import subprocess
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
from attrs import evolve
from kernel_worlds import PRIVATE, plan

from kilo_etcd.kernel import KernelError, Setup, cleanup, echo, open_kernel, sysctl
from kilo_etcd.kernel.echo import EchoRequests
from kilo_etcd.kernel.routing.rules import deciding_rule
from kilo_etcd.model import IPAddress

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_namespaces")]

RANGE = Path("/proc/sys/net/ipv4/ping_group_range")
HERE, ALSO, SIX = ip_address("127.0.0.1"), ip_address("127.0.0.2"), ip_address("::1")
NOBODY, NOWHERE = ip_address("192.0.2.9"), ip_address("203.0.113.9")


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def allowed() -> list[str]:
    return RANGE.read_text().split()


def allow_groups(text: str) -> None:
    RANGE.write_text(text)


def allow() -> None:
    allow_groups("0 0")
    sh("ip link add eth0 type veth peer eth1 && ip link set eth0 up && ip address add 192.0.2.1/24 dev eth0")


async def test_who_is_there_answers_in_both_families_and_who_is_not_does_not() -> None:
    allow()
    with trio.fail_after(20):
        found = await echo.ping([HERE, ALSO, SIX, NOBODY, NOWHERE], EchoRequests(times=2, patience=0.3))
    assert set(found) == {HERE, ALSO, SIX}
    assert all(0 <= seconds < 5 for seconds in found.values())


async def test_answers_are_counted_where_requests_get_lost() -> None:
    allow()
    sh("nft 'add table inet t; add chain inet t in { type filter hook input priority 0; }'")
    sh("nft 'add rule inet t in icmp type echo-request ip daddr 127.0.0.2 numgen inc mod 4 0 drop'")
    with trio.fail_after(20):
        counts = await echo.count([HERE, ALSO, SIX, NOBODY], EchoRequests(times=20, patience=0.3))
    assert counts == {HERE: 20, ALSO: 15, SIX: 20}


async def test_requests_leave_from_the_source_address_that_is_asked_for() -> None:
    allow()
    sh("ip address add 192.0.2.7/32 dev lo; ip address add fd00::7/128 dev lo")
    # Only what comes from the second address is answered.
    sh("nft 'add table inet t; add chain inet t out { type filter hook output priority 0; }'")
    sh("nft 'add rule inet t out icmp type echo-request ip saddr != 192.0.2.7 drop'")
    sh("nft 'add rule inet t out icmpv6 type echo-request ip6 saddr != fd00::7 drop'")
    own = {HERE: ip_address("192.0.2.7"), SIX: ip_address("fd00::7"), ALSO: ip_address("203.0.113.66")}
    with trio.fail_after(20):
        assert await echo.ping([HERE, SIX, ALSO], EchoRequests(times=2, patience=0.2)) == {}
        assert set(await echo.ping([HERE, SIX, ALSO], EchoRequests(sources=own, times=2, patience=0.2))) == {HERE, SIX}


async def test_the_kernel_names_the_route_that_it_chooses() -> None:
    allow()
    sh("ip address add fd00:2::1/64 dev eth0 nodad; ip link set eth1 up; ip route add 10.2.0.7 via 192.0.2.9")
    sh("ip rule add pref 50 from 192.0.2.1 to 10.2.0.8 lookup 99; ip route add default dev eth0 table 99")
    sh("ip route add blackhole 10.2.0.9")
    here = ip_address("192.0.2.1")
    seven, eight, nine, six = map(ip_address, ("10.2.0.7", "10.2.0.8", "10.2.0.9", "fd00:2::7"))
    async with open_kernel(Setup(private_key=PRIVATE, wireguard="userspace")) as kernel:
        found = await kernel.routes_taken({seven: here, eight: here, nine: here, six: ip_address("fd00:2::1")})
        assert {address: (one.device, str(one.gateway), one.table) for address, one in found.items()
                if not isinstance(one, str)} == {
            seven: ("eth0", "192.0.2.9", 254), eight: ("eth0", "None", 99), six: ("eth0", "None", 254),
        }  # fmt: skip
        assert found[nine] == "Invalid argument"
        assert await kernel.routes_taken({eight: None}) == {eight: "Network is unreachable"}
        # What WireGuard sends has its mark.
        sh("ip rule add pref 40 to 10.2.0.7 blackhole; ip rule add pref 41 fwmark 0x1 to 10.2.0.9 blackhole")
        assert await kernel.routes_taken({seven: None}) == {seven: "Invalid argument"}
        assert (await kernel.routes_taken({seven: None}, by_wireguard=True)) == {seven: "Invalid argument"}
        rules = await kernel.foreign_rules()
        assert str(deciding_rule(rules, seven, None)) == "ip -4 rule priority 40 from all to 10.2.0.7/32 blackhole"
        by_source = str(deciding_rule(rules, eight, 99, here))
        assert by_source.endswith("priority 50 from 192.0.2.1/32 to 10.2.0.8/32 lookup 99")
        assert deciding_rule(rules, eight, 99) is None, "it asks for a source"
        assert deciding_rule(rules, nine, None) is None, "it asks for a mark"
        for table in (253, 254, 255):
            assert deciding_rule(rules, seven, table) is None, "the kernel's own rules are no other program's"


async def test_the_first_answer_ends_it_if_one_is_enough() -> None:
    allow()
    with trio.fail_after(20):
        assert HERE in await echo.ping([HERE, NOBODY], EchoRequests(times=1000, patience=1000, first=True))
        assert set(await echo.ping([HERE, SIX], EchoRequests(times=1000, patience=1000))) == {HERE, SIX}
    assert await echo.ping([], EchoRequests(patience=1000)) == {}


async def test_a_request_is_as_large_as_it_is_to_be() -> None:
    allow()
    sh("nft add table inet t && nft add chain inet t c '{ type filter hook input priority 0; }'")
    sh("nft add rule inet t c meta length gt 1400 drop")
    with trio.fail_after(20):
        assert set(await echo.ping([HERE, SIX], EchoRequests(times=2, patience=0.3, size=1400))) == {HERE, SIX}
        assert await echo.ping([HERE, SIX], EchoRequests(times=2, patience=0.3, size=1401)) == {}


async def test_no_request_is_divided_if_none_may_be() -> None:
    allow()
    sh("ip link set lo mtu 1300")
    with trio.fail_after(20):
        assert set(await echo.ping([HERE, SIX], EchoRequests(times=2, patience=0.3, size=1400))) == {HERE, SIX}
        whole = EchoRequests(times=2, patience=0.3, size=1400, dont_fragment=True)
        assert await echo.ping([HERE, SIX], whole) == {}
        assert set(await echo.ping([HERE, SIX], evolve(whole, size=1300))) == {HERE, SIX}


async def test_a_size_passes_or_not_however_slow_the_link_is() -> None:
    """A small packet that follows tells a large one that was lost from one that takes long."""
    allow()
    sh("nft 'add table inet t; add chain inet t in { type filter hook input priority 0; }'")
    sh("nft 'add rule inet t in meta length > 1300 drop; add rule inet t in ip daddr 127.0.0.2 drop'")
    with trio.fail_after(60):
        for address in (HERE, SIX):
            assert [await echo.passes(address, size, 10) for size in (576, 1300, 1301)] == [True, True, False]
        assert await echo.passes(ALSO, 1300, 0.3) is None
        assert await echo.passes(NOWHERE, 1300, 0.3) is None
        sh("tc qdisc add dev lo root tbf rate 32kbit burst 1400 limit 20000")
        assert [await echo.passes(HERE, size, 10) for size in (1300, 1300, 1301)] == [True, True, False]
        sh("tc qdisc del dev lo root; ip link set lo mtu 1280")
        assert [await echo.passes(HERE, size, 10) for size in (1280, 1281)] == [True, False], "no request is divided"


async def test_many_large_answers_are_all_taken() -> None:
    """As large as a tunnel's MTU where the network has jumbo frames."""
    allow()
    many = {ip_address(f"127.0.1.{number}") for number in range(1, 129)}
    with trio.fail_after(20):
        assert set(await echo.ping(many, EchoRequests(times=4, patience=0.6, size=8921))) == many


async def test_calls_do_not_take_each_others_answers() -> None:
    allow()
    found: list[set[IPAddress]] = []

    async def one(*addresses: IPAddress) -> None:
        found.append(set(await echo.ping(addresses, EchoRequests(times=3, patience=0.3))))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one, HERE, NOBODY)
            nursery.start_soon(one, NOBODY)
    assert found.count({HERE}) == found.count(set()) == 5


async def test_a_firewall_that_refuses_to_send_is_silence() -> None:
    allow()
    sh("nft 'add table inet t; add chain inet t out { type filter hook output priority 0; }; add rule inet t out drop'")
    with trio.fail_after(20):
        assert await echo.ping([HERE, SIX], EchoRequests(times=2, patience=0.2)) == {}


async def test_where_nobody_may_ping_the_agent_lets_its_own_group_and_gives_it_back() -> None:
    assert allowed() == ["1", "0"]
    with pytest.raises(PermissionError):
        await echo.ping([HERE], EchoRequests(patience=1))
    async with open_kernel(Setup(private_key=PRIVATE, wireguard="userspace")) as kernel:
        assert set(await kernel.ping([HERE], EchoRequests(patience=1))) == {HERE}
        assert allowed() == ["0", "0"]
        assert set(await kernel.ping([HERE], EchoRequests(patience=1))) == {HERE}
    assert [str(change) for change in await cleanup("kilo0")] == ["sysctl -w net.ipv4.ping_group_range='1 0'"]
    assert allowed() == ["1", "0"]
    assert await cleanup("kilo0") == ()


async def test_what_lets_the_agent_ping_is_not_counted_with_what_brings_about_a_plan() -> None:
    # A plan may be applied at that very moment, by an agent that restarts and finds all as it was.
    wanted = plan(unreachable_routes=("10.4.0.0/16",))
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(wanted)
        written = kernel.writes
        assert written > 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.ping, [HERE], EchoRequests(patience=1))
            nursery.start_soon(partial(kernel.apply, wanted, fresh=True))
        assert allowed() == ["0", "0"]
        assert kernel.writes == written
    await cleanup("kilo0")


async def test_a_range_that_somebody_has_chosen_is_left_as_it_is() -> None:
    allow_groups("77 78")
    async with open_kernel(Setup(private_key=PRIVATE, wireguard="userspace")) as kernel:
        with pytest.raises(KernelError, match=r"leaves its group out.*set it on the host with `sysctl -w .*='0 0'`"):
            await kernel.ping([HERE], EchoRequests(patience=1))
    assert allowed() == ["77", "78"]


async def test_where_the_host_does_not_let_it_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: str, value: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(sysctl, "_write", read_only)
    async with open_kernel(Setup(private_key=PRIVATE, wireguard="userspace")) as kernel:
        with pytest.raises(KernelError, match=r"may not ping, .*set it on the host with `sysctl -w"):
            await kernel.ping([HERE], EchoRequests(patience=1))


async def test_what_cannot_be_sent_is_silence_whatever_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    allow()

    # A WireGuard device's word on a peer that has no endpoint.
    def sendto(*_: object) -> int:
        raise OSError(errno.EDESTADDRREQ, "Destination address required")

    monkeypatch.setattr(socket.socket, "sendto", sendto, raising=False)
    assert await echo.ping([HERE, SIX], EchoRequests(times=2, patience=0.1)) == {}


async def test_a_host_that_has_no_sockets_to_spare_cannot_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(version: int) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(echo, "_open", no_more)
    async with open_kernel(Setup(private_key=PRIVATE, wireguard="userspace")) as kernel:
        with pytest.raises(KernelError, match="this host cannot ping: this process has no file descriptor left"):
            await kernel.ping([HERE], EchoRequests(patience=1))
