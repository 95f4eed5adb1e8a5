"""What is packed for the kernel, as pyroute2 reads it; and what userspace WireGuard is told and answers, as text."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from attrs import evolve
from handmade.attributes import attribute
from kernel_worlds import PRIVATE, key, peer

from kilo_etcd.kernel import userspace
from kilo_etcd.kernel.drift import device_period
from kilo_etcd.kernel.netlink import sockets
from kilo_etcd.kernel.netlink.formats import core
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.read.wireguard import DeviceReader
from kilo_etcd.kernel.routing.rules import RoutingRule
from kilo_etcd.kernel.state import RemovePeer, Route, SetDevice, SetPeer
from kilo_etcd.kernel.write import rtnl as requests
from kilo_etcd.kernel.write.wireguard import set_device
from kilo_etcd.model import Endpoint


def framed(message: NetlinkMessage) -> bytes:
    return sockets._HEADER.pack(16 + len(message.body), message.type, message.flags, 1, 0) + message.body


def read(kind: Any, message: NetlinkMessage) -> Any:
    decoded = kind(framed(message))
    decoded.decode()
    return decoded


@pytest.mark.parametrize(
    "route",
    [
        Route(destination=ip_network("10.4.0.0/16"), source=ip_address("10.4.0.1")),
        Route(destination=ip_network("10.4.0.0/16"), gateway=ip_address("192.168.9.2"), onlink=True, metric=5),
        Route(destination=ip_network("fd00:4::/64"), gateway=ip_address("fe80::1"), source=ip_address("fd00:4::1")),
        Route(destination=ip_network("10.4.0.0/16"), gateway=ip_address("fd00:9::2")),
    ],
    ids=str,
)
def test_routes(route: Route) -> None:
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    message = requests.add_route(route, 7)
    assert (message.type, message.flags) == (replies.NEWROUTE, core.NLM_F_CREATE | core.NLM_F_EXCL)
    seen = read(rtmsg, message)
    assert seen["dst_len"] == route.destination.prefixlen
    assert seen["proto"] == 107
    assert seen["table"] == 254
    assert seen["type"] == 1
    assert seen.get_attr("RTA_DST") == str(route.destination.network_address)
    assert seen.get_attr("RTA_OIF") == 7
    via = seen.get_attr("RTA_VIA")
    gateway = seen.get_attr("RTA_GATEWAY") or (via["addr"] if via else None)
    assert gateway == (None if route.gateway is None else str(route.gateway))
    assert seen.get_attr("RTA_PREFSRC") == (None if route.source is None else str(route.source))
    found = replies.read_route(message.body)
    assert found is not None
    assert found.route({}) == route


def test_replacing_and_deleting_say_so() -> None:
    route = Route(destination=ip_network("10.4.0.0/16"), source=ip_address("10.4.0.1"))
    assert requests.replace_route(route, 0).flags == core.NLM_F_CREATE | core.NLM_F_REPLACE
    deleted = replies.read_route(requests.delete_route(route, 0).body)
    assert deleted is not None
    assert deleted.protocol == 107, "so that nobody else's route can be hit"


@pytest.mark.parametrize(
    ("route", "kind"),
    [
        (Route(destination=ip_network("0.0.0.0/0"), table=107_000_001, protocol=108), 1),
        (Route(destination=ip_network("192.0.2.1/32"), table=107_000_001, protocol=108, kind="throw"), 9),
        (Route(destination=ip_network("::/0"), table=107_000_001, protocol=108, kind="unreachable"), 7),
    ],
    ids=str,
)
def test_routes_of_another_table_and_kind(route: Route, kind: int) -> None:
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    message = requests.add_route(route, 0)
    seen = read(rtmsg, message)
    assert (seen["type"], seen["proto"], seen["table"]) == (kind, 108, 0)
    assert seen.get_attr("RTA_TABLE") == 107_000_001
    found = replies.read_route(message.body)
    assert found is not None
    assert found.route({}) == route


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(version=4, priority=10700, table=254, suppress=0),
        RoutingRule(version=6, priority=10700, table=254, suppress=6),
        RoutingRule(version=6, priority=10701, table=107_000_001, not_mark=107),
    ],
    ids=str,
)
def test_rules(rule: RoutingRule) -> None:
    from pyroute2.netlink.rtnl.fibmsg import fibmsg

    message = requests.add_rule(rule, 108)
    assert (message.type, message.flags) == (replies.NEWRULE, core.NLM_F_CREATE | core.NLM_F_EXCL)
    seen = read(fibmsg, message)
    assert (seen["action"], seen["flags"]) == (1, 2 if rule.not_mark else 0)
    assert seen.get_attr("FRA_PRIORITY") == rule.priority
    assert seen.get_attr("FRA_TABLE") == rule.table
    assert seen.get_attr("FRA_PROTOCOL") == 108
    assert seen.get_attr("FRA_FWMARK") == (rule.not_mark or None)
    assert seen.get_attr("FRA_SUPPRESS_PREFIXLEN") == rule.suppress
    assert replies.read_rule(message.body) == (rule, 108)


PLAIN_RULE = RoutingRule(version=4, priority=10701, table=107_000_001)


@pytest.mark.parametrize(
    ("number", "value"),
    [
        (10, bytes(3) + b"\1"),
        (11, bytes(3) + b"\1"),
        (12, bytes(7) + b"\1"),
        (13, bytes(4)),
        (16, bytes([255, 0, 0, 0])),
        (16, bytes([255] * 4)),
        (17, b"eth0\0"),
        (19, b"\1"),
        (20, bytes(8)),
        (25, b"\1"),
        (28, b"\0\xf0"),
        (99, b"\1"),
    ],
    ids=[
        "fwmark",
        "realm",
        "tun_id",
        "suppress_ifgroup",
        "mask",
        "mark 0",
        "oif",
        "l3mdev",
        "uidrange",
        "dscp",
        "port mask",
        "new",
    ],
)
def test_a_rule_of_others_that_selects_fewer_packets_is_none_of_ours(number: int, value: bytes) -> None:
    """By linux/fib_rules.h."""
    body = requests.add_rule(PLAIN_RULE, 108).body
    assert replies.read_rule(body) == (PLAIN_RULE, 108)
    assert replies.read_rule(body + attribute(number, value)) is None


def test_a_rule_of_ours_is_known_by_a_kernel_that_adds_masks_of_ports() -> None:
    rule = evolve(PLAIN_RULE, sport=51820)
    body = requests.add_rule(rule, 108).body
    assert replies.read_rule(body + attribute(28, b"\xff\xff")) == (rule, 108)


def test_a_rule_of_others_for_one_class_of_traffic_is_none_of_ours() -> None:
    body = bytearray(requests.add_rule(PLAIN_RULE, 108).body)
    body[3] = 0x10
    assert replies.read_rule(bytes(body)) is None


@pytest.mark.parametrize("text", ["10.4.0.1/32", "fd00:4::1/128"])
def test_addresses(text: str) -> None:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    message = requests.add_address(7, ip_interface(text))
    seen = read(ifaddrmsg, message)
    assert seen["index"] == 7
    assert f"{seen.get_attr('IFA_LOCAL')}/{seen['prefixlen']}" == text
    assert seen["flags"] == (2 if ":" in text else 0), "IPv6: no duplicate address detection"
    address = replies.read_address(message.body, {})
    assert address is not None
    assert str(address.address) == text


def test_links() -> None:
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    seen = read(ifinfmsg, requests.create_link("kilo-ipip", "ipip", ip_address("192.168.9.1")))
    assert seen.get_attr("IFLA_IFNAME") == "kilo-ipip"
    info = seen.get_attr("IFLA_LINKINFO")
    assert info.get_attr("IFLA_INFO_KIND") == "ipip"
    assert info.get_attr("IFLA_INFO_DATA").get_attr("IFLA_IPIP_LOCAL") == "192.168.9.1"


CHANGES = (
    SetDevice(name="kilo0", listen_port=51820, private_key=PRIVATE, public_key=key(1)),
    SetPeer(
        name="kilo0",
        public_key=key(2),
        endpoint=Endpoint.parse("203.0.113.2:51821"),
        persistent_keepalive=25,
        preshared_key=key(90),
        allowed_ips=(ip_network("10.4.0.2/32"), ip_network("fd00:4::2/128")),
        replace_allowed_ips=True,
    ),
    SetPeer(name="kilo0", public_key=key(3), endpoint=Endpoint.parse("[2001:db8::3]:51820"), preshared_key=""),
    RemovePeer("kilo0", key(4)),
)


def test_wireguard_messages() -> None:
    from pyroute2.netlink.generic.wireguard import wgmsg

    (message,) = set_device(33, "kilo0", CHANGES)
    seen = read(wgmsg, message)
    assert seen["cmd"] == 1
    assert seen.get_attr("WGDEVICE_A_IFNAME") == "kilo0"
    assert seen.get_attr("WGDEVICE_A_LISTEN_PORT") == 51820
    assert seen.get_attr("WGDEVICE_A_PRIVATE_KEY").decode() == PRIVATE
    two, three, four = seen.get_attr("WGDEVICE_A_PEERS")
    assert two.get_attr("WGPEER_A_PUBLIC_KEY").decode() == key(2)
    assert two.get_attr("WGPEER_A_FLAGS") == 2
    assert two.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") == 25
    assert (two.get_attr("WGPEER_A_ENDPOINT")["addr"], two.get_attr("WGPEER_A_ENDPOINT")["port"]) == (
        "203.0.113.2",
        51821,
    )
    assert [ip["addr"] for ip in two.get_attr("WGPEER_A_ALLOWEDIPS")] == ["10.4.0.2/32", "fd00:4::2/128"]
    assert three.get_attr("WGPEER_A_ENDPOINT")["addr"] == "2001:db8::3"
    assert three.get_attr("WGPEER_A_PRESHARED_KEY").decode() == key(0)
    assert four.get_attr("WGPEER_A_FLAGS") == 1


def test_a_peer_that_is_reset_is_removed_and_added_in_one_message() -> None:
    from pyroute2.netlink.generic.wireguard import wgmsg

    change = SetPeer(
        name="kilo0", public_key=key(2), reset=True, replace_allowed_ips=True, allowed_ips=(ip_network("10.4.0.2/32"),)
    )
    crowd = [SetPeer(name="k", public_key=key(3), allowed_ips=tuple(ip_network((j << 8, 24)) for j in range(n)))
             for n in range(1055, 1075)]  # fmt: skip
    messages = set()
    for before in ([], *([set_peer] for set_peer in crowd)):
        *rest, last = set_device(33, "kilo0", [*before, change])
        messages.add(len(rest) + 1)
        gone, back = read(wgmsg, last).get_attr("WGDEVICE_A_PEERS")[-2:]
        assert gone.get_attr("WGPEER_A_PUBLIC_KEY") == back.get_attr("WGPEER_A_PUBLIC_KEY") == key(2).encode()
        assert (gone.get_attr("WGPEER_A_FLAGS"), back.get_attr("WGPEER_A_FLAGS")) == (1, 2)
        assert [ip["addr"] for ip in back.get_attr("WGPEER_A_ALLOWEDIPS")] == ["10.4.0.2/32"]
    assert messages == {1, 2}, "with and without room for both in the first message"
    name = f"public_key={bytes([2] * 32).hex()}"
    assert userspace.encode([change]).split()[1:] == [
        name, "remove=true", name, "replace_allowed_ips=true", "allowed_ip=10.4.0.2/32"
    ]  # fmt: skip


def test_the_mark_of_wireguards_own_packets() -> None:
    from pyroute2.netlink.generic.wireguard import wgmsg

    for mark in (107, 0):
        (message,) = set_device(33, "kilo0", [SetDevice(name="kilo0", mark=mark)])
        assert read(wgmsg, message).get_attr("WGDEVICE_A_FWMARK") == mark
        reader = DeviceReader()
        reader.take(message.body)
        assert reader.result().mark == mark
        assert userspace.encode([SetDevice(name="kilo0", mark=mark)]) == f"set=1\nfwmark={mark}\n\n"
    assert userspace.decode("fwmark=107\nerrno=0\n\n").mark == 107


def test_a_peer_that_comes_back_in_two_messages_is_one() -> None:
    def message(*allowed: str) -> bytes:
        change = SetPeer(name="k", public_key=key(2), allowed_ips=tuple(ip_network(a) for a in allowed))
        return set_device(33, "k", [change])[0].body

    reader = DeviceReader()
    for part in (message("10.4.0.9/32", "10.5.0.0/24"), message("10.4.0.2/32")):
        reader.take(part)
    observed_peer = reader.result().peers[key(2)]
    assert [str(ip) for ip in observed_peer.allowed_ips] == ["10.4.0.2/32", "10.4.0.9/32", "10.5.0.0/24"]


def test_a_second_reading_takes_over_what_is_the_same_and_nothing_else() -> None:
    def reading(former: DeviceReader | None, endpoint: str, *allowed: str) -> DeviceReader:
        change = SetPeer(
            name="k",
            public_key=key(2),
            endpoint=Endpoint.parse(endpoint),
            allowed_ips=tuple(ip_network(a) for a in allowed),
        )
        reader = DeviceReader(former)
        reader.take(set_device(33, "k", [change])[0].body)
        return reader

    first = reading(None, "203.0.113.2:51820", "10.4.0.2/32", "fd00:4::2/128")
    before = first.result().peers[key(2)]
    second = reading(first, "203.0.113.2:51820", "10.4.0.2/32", "fd00:4::2/128")
    assert second.result().peers[key(2)] == before
    third = reading(second, "203.0.113.2:4000", "10.4.0.3/32")
    observed_peer = third.result().peers[key(2)]
    assert str(observed_peer.endpoint) == "203.0.113.2:4000"
    assert [str(ip) for ip in observed_peer.allowed_ips] == ["10.4.0.3/32"]


def test_many_peers_are_spread_over_messages_that_each_fit() -> None:
    crowd = [
        SetPeer(name="k", public_key=key(i), allowed_ips=tuple(ip_network(f"10.{i}.{j}.0/24") for j in range(200)))
        for i in range(1, 20)
    ]
    sent = set_device(33, "k", crowd)
    assert 1 < len(sent) < len(crowd)
    assert all(len(message.body) < 40_000 for message in sent)
    reader = DeviceReader()
    for message in sent:
        reader.take(message.body)
    assert {k: len(p.allowed_ips) for k, p in reader.result().peers.items()} == {key(i): 200 for i in range(1, 20)}


def test_a_key_that_is_none_is_an_error_of_that_peer() -> None:
    with pytest.raises(OSError, match="32 bytes in base64"):
        set_device(33, "k", [RemovePeer("k", "nonsense")])


def test_userspace_is_told_in_one_transaction() -> None:
    def hexed(number: int) -> str:
        return bytes([number] * 32).hex()

    assert userspace.encode(CHANGES) == "\n".join(
        (
            "set=1",
            f"private_key={hexed(9)}",
            "listen_port=51820",
            f"public_key={hexed(2)}",
            f"preshared_key={hexed(90)}",
            "endpoint=203.0.113.2:51821",
            "persistent_keepalive_interval=25",
            "replace_allowed_ips=true",
            "allowed_ip=10.4.0.2/32",
            "allowed_ip=fd00:4::2/128",
            f"public_key={hexed(3)}",
            f"preshared_key={hexed(0)}",
            "endpoint=[2001:db8::3]:51820",
            f"public_key={hexed(4)}",
            "remove=true",
            "",
            "",
        )
    )


def test_userspace_answers() -> None:
    two, three = bytes([2] * 32).hex(), bytes([3] * 32).hex()
    state = userspace.decode(
        f"private_key={bytes([9] * 32).hex()}\nlisten_port=51820\npublic_key={two}\npreshared_key={'0' * 64}\n"
        "protocol_version=1\nendpoint=[2001:db8::3]:51820\nlast_handshake_time_sec=1700000000\n"
        "last_handshake_time_nsec=500000000\ntx_bytes=12\nrx_bytes=34\npersistent_keepalive_interval=25\n"
        f"allowed_ip=10.5.0.0/24\nallowed_ip=10.4.0.2/32\npublic_key={three}\nerrno=0\n\n"
    )
    observed_peer = state.peers[key(2)]
    assert state.listen_port == 51820
    assert state.public_key == userspace.public_key_of(bytes([9] * 32))
    assert (observed_peer.last_handshake, observed_peer.tx_bytes, observed_peer.rx_bytes) == (1700000000.5, 12, 34)
    assert observed_peer.preshared_key is None
    assert str(observed_peer.endpoint) == "[2001:db8::3]:51820"
    assert observed_peer.allowed_ips == peer(2, "10.4.0.2/32", "10.5.0.0/24").allowed_ips
    assert state.peers[key(3)].allowed_ips == ()


def test_userspace_errors_are_errors() -> None:
    with pytest.raises(OSError) as caught:
        userspace.decode("errno=-98\n\n")
    assert caught.value.errno == 98


UAPI = """private_key={private}
listen_port=51820
fwmark=0
public_key={one}
preshared_key={zero}
protocol_version=1
endpoint=192.0.2.1:51820
last_handshake_time_sec=1
last_handshake_time_nsec=2
tx_bytes=3
rx_bytes=4
persistent_keepalive_interval=0
allowed_ip=10.4.0.1/32
public_key={two}
preshared_key={zero}
persistent_keepalive_interval=0
allowed_ip=10.4.0.2/32
errno=0

""".format(private="11" * 32, one="22" * 32, two="33" * 32, zero="0" * 64)


def test_what_userspace_has_seen_does_not_change_its_mark_and_what_it_was_told_does() -> None:
    mark = userspace.fingerprint(UAPI)
    for seen in (("192.0.2.1:51820", "198.51.100.1:7"), ("tx_bytes=3", "tx_bytes=9"), ("time_sec=1", "time_sec=99")):
        assert userspace.fingerprint(UAPI.replace(*seen)) == mark
    head, one, two = UAPI.removesuffix("errno=0\n\n").split("public_key=")
    assert userspace.fingerprint(f"{head}public_key={two}public_key={one}errno=0\n\n") == mark, "peers have no order"
    for told in (
        ("10.4.0.1/32", "10.4.0.9/32"),
        ("51820\nfw", "51821\nfw"),
        ("11" * 32, "44" * 32),
        ("22" * 32, "55" * 32),
        ("endpoint=192.0.2.1:51820\n", ""),
    ):
        assert userspace.fingerprint(UAPI.replace(*told)) != mark
    with pytest.raises(OSError, match="No such device"):
        userspace.fingerprint("errno=-19\n\n")


def test_what_the_kernels_device_has_seen_does_not_change_its_mark_and_what_it_was_told_does() -> None:
    def mark(*changes: SetPeer, counter: int = 1) -> int:
        reader = DeviceReader()
        for message in set_device(30, "kilo0", changes):
            reader.take(message.body)
        reader._peers = {key: (*found[:5], counter, *found[6:]) for key, found in reader._peers.items()}
        return reader.fingerprint()

    one = SetPeer(
        name="kilo0", public_key=key(1), endpoint=Endpoint.parse("192.0.2.1:1"), persistent_keepalive=0,
        allowed_ips=(ip_network("10.4.0.1/32"),),
    )  # fmt: skip
    two = SetPeer(name="kilo0", public_key=key(2), allowed_ips=(ip_network("10.4.0.2/32"),))
    same = mark(one, two)
    assert mark(two, one, counter=7) == same
    assert mark(evolve(one, endpoint=Endpoint.parse("192.0.2.2:2")), two) == same
    for other in (
        evolve(one, persistent_keepalive=5), evolve(one, allowed_ips=()), evolve(one, preshared_key=key(9)),
        evolve(one, endpoint=None),
    ):  # fmt: skip
        assert mark(other, two) != same
    assert mark(one) != same


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("02000000 08000100ffffffff 0800020000000000", (4, False)),
        ("02000000 08000100ffffffff 0800020001000000", (4, True)),
        ("0a000000 08000100ffffffff 0800020000000000", (6, False)),
        # One interface's, and another setting.
        ("02000000 0800010002000000 0800020000000000", None),
        ("02000000 08000100ffffffff 0800030000000000", None),
        ("1c000000 08000100ffffffff 0800020000000000", None),
    ],
)
def test_forwarding_that_is_switched(body: str, found: tuple[int, bool] | None) -> None:
    assert replies.read_forwarding(bytes.fromhex(body)) == found


def test_a_device_is_looked_at_within_a_second_up_to_a_thousand_peers() -> None:
    assert device_period(0) == 0.5
    assert device_period(1000) == 1.0
    assert device_period(10_000) == 5.5
