"""What `kernel.write` packs by pyroute2's classes is to the byte what the kernel's headers say (`handmade`)."""

from __future__ import annotations

import base64
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network

import pytest
from attrs import evolve
from handmade import nft as by_hand_nft
from handmade import rtnl as by_hand
from handmade import wireguard as by_hand_wireguard
from hypothesis import given
from hypothesis import strategies as some

from kilo_etcd.kernel.firewall import nftables
from kilo_etcd.kernel.firewall.chains import Condition
from kilo_etcd.kernel.firewall.openings import Opening
from kilo_etcd.kernel.firewall.table import AddElements, AddressSet, Chain, DeleteElements, FirewallTable, Rule
from kilo_etcd.kernel.read import hooks
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.routing.nexthops import resolve
from kilo_etcd.kernel.routing.rules import RoutingRule
from kilo_etcd.kernel.state import RemovePeer, Route, SetDevice, SetPeer
from kilo_etcd.kernel.write import nft, rtnl, wireguard
from kilo_etcd.model import Endpoint, IPNetwork

INDEXES = some.integers(0, 2**31 - 1)
NUMBERS = some.integers(0, 2**32 - 1)
ADDRESSES = {4: some.ip_addresses(v=4), 6: some.ip_addresses(v=6)}
VERSIONS = some.sampled_from((4, 6))


@some.composite
def networks(draw: some.DrawFn, version: int | None = None) -> IPNetwork:
    version = draw(VERSIONS) if version is None else version
    packed = draw(ADDRESSES[version]).packed
    kind = IPv4Network if version == 4 else IPv6Network
    return kind((packed, draw(some.integers(0, len(packed) * 8))), strict=False)


@some.composite
def routes(draw: some.DrawFn) -> Route:
    destination = draw(networks())
    version = destination.version
    gateway = draw(some.none() | ADDRESSES[version] | (ADDRESSES[6] if version == 4 else some.none()))
    return Route(
        destination=destination,
        gateway=gateway,
        source=draw(some.none() | ADDRESSES[version]),
        protocol=draw(some.sampled_from((107, 108))),
        metric=draw(some.just(0) | NUMBERS),
        onlink=gateway is not None and draw(some.booleans()),
        table=draw(some.sampled_from((254, 107_000_001))),
        kind="" if gateway else draw(some.sampled_from(("", "unreachable", "throw"))),
    )


@given(routes(), INDEXES)
def test_routes(route: Route, index: int) -> None:
    for name in ("add_route", "replace_route", "delete_route"):
        assert getattr(rtnl, name)(route, index) == getattr(by_hand, name)(route, index)
    found = replies.read_route(rtnl.add_route(route, index).body)
    assert found is not None
    assert found.index == index
    assert found.route({}) == route


@given(some.builds(
    RoutingRule, version=VERSIONS, priority=NUMBERS, table=NUMBERS, not_mark=some.just(0) | NUMBERS,
    suppress=some.none() | some.integers(0, 128), protocol=some.integers(0, 255), sport=some.integers(0, 65535),
    dport=some.integers(0, 65535), inbound=some.sampled_from(("", "kilo0", "a-long-name-0.1")),
), some.booleans(), some.booleans(), some.integers(0, 255), some.data())  # fmt: skip
def test_rules(
    rule: RoutingRule, with_source: bool, with_destination: bool, protocol: int, data: some.DataObject
) -> None:
    if with_source:
        rule = evolve(rule, source=data.draw(ADDRESSES[rule.version]))
    if with_destination:
        to = data.draw(networks(rule.version).filter(lambda network: network.prefixlen > 0))
        rule = evolve(rule, destination=to)
    assert rtnl.add_rule(rule, protocol) == by_hand.add_rule(rule, protocol)
    assert rtnl.delete_rule(rule, protocol) == by_hand.delete_rule(rule, protocol)
    assert replies.read_rule(rtnl.add_rule(rule, protocol).body) == (rule, protocol)


@given(networks(), INDEXES)
def test_addresses(network: IPNetwork, index: int) -> None:
    address = ip_interface((network.network_address, network.prefixlen))
    for name in ("add_address", "delete_address"):
        assert getattr(rtnl, name)(index, address) == getattr(by_hand, name)(index, address)
    found = replies.read_address(rtnl.add_address(index, address).body, {})
    assert found is not None
    assert (found.index, found.address) == (index, address)


@pytest.mark.parametrize(
    ("state", "link_address", "answered"),
    [
        (0x02, b"\2\0\0\0\0\1", True),
        (0x80, b"\2\0\0\0\0\1", True),
        (0x20, None, False),
        (0x01, None, False),
        (0x40, bytes(6), False),  # as the loopback device's
        (0x04, None, False),
    ],
)
def test_neighbours_that_have_answered(state: int, link_address: bytes | None, answered: bool) -> None:
    for address in (ip_address("192.168.9.2"), ip_address("fe80::2")):
        found = replies.read_neighbour(by_hand.neighbour(address, state, link_address))
        assert found == (address if answered else None)


def test_nexthop_objects_and_the_next_hops_that_they_stand_for() -> None:
    one, two = (ip_address("192.0.2.1"), ip_address("fe80::1"))
    told = [
        by_hand.nexthop(1, 7, one), by_hand.nexthop(2, 8, two), by_hand.nexthop(3, 9),
        by_hand.nexthop(4, group=(1, 2, 99)),
    ]  # fmt: skip
    assert resolve([replies.read_nexthop(body) for body in told]) == {
        1: ((7, one),), 2: ((8, two),), 3: ((9, None),), 4: ((7, one), (8, two)),
    }  # fmt: skip


def test_links_and_requests() -> None:
    local = ip_address("192.168.9.1")
    for name, arguments in (
        ("get_link", ("kilo0",)), ("get_links", ()), ("create_link", ("kilo0", "wireguard")),
        ("create_link", ("kilo-ipip", "ipip", local)), ("create_link", ("kilo-ipip", "ipip")), ("delete_link", (7,)),
        ("set_mtu", (7, 1420)), ("set_up", (7,)), ("get_addresses", (7,)), ("get_routes", (4,)),
        ("get_neighbours", (4,)), ("get_neighbours", (6,)), ("get_nexthops", ()),
        ("get_routes", (6, 107_000_001)), ("get_rules", (4,)), ("get_rules", (6,)),
        ("get_route_to", (ip_address("192.0.2.1"),)), ("get_route_to", (ip_address("2001:db8::1"), 107)),
        ("get_route_between", (None, ip_address("192.0.2.1"))),
        ("get_route_between", (ip_address("192.0.2.7"), ip_address("192.0.2.1"))),
        ("get_route_between", (ip_address("2001:db8::7"), ip_address("2001:db8::1"))),
    ):  # fmt: skip
        assert getattr(rtnl, name)(*arguments) == getattr(by_hand, name)(*arguments), name
    for address in (ip_address("192.0.2.1"), ip_address("2001:db8::1")):
        assert rtnl.get_route_to(address, 107, whole=True) == by_hand.get_route_to(address, 107, whole=True)


KEYS = some.binary(min_size=32, max_size=32).map(lambda key: base64.b64encode(key).decode())
PORTS = some.integers(0, 65535)
ENDPOINTS = some.builds(
    Endpoint, ADDRESSES[4] | ADDRESSES[6] | some.just(IPv6Address("fe80::1%7")), some.integers(1, 65535)
)
PEERS = some.builds(
    SetPeer,
    name=some.just("kilo0"), public_key=KEYS, endpoint=some.none() | ENDPOINTS,
    persistent_keepalive=some.none() | PORTS, preshared_key=some.none() | some.just("") | KEYS,
    allowed_ips=some.lists(networks(), max_size=6).map(tuple), replace_allowed_ips=some.booleans(),
    reset=some.booleans(),
)  # fmt: skip
DEVICES = some.builds(
    SetDevice, name=some.just("kilo0"), private_key=some.none() | KEYS, listen_port=some.none() | PORTS,
    mark=some.none() | NUMBERS,
)  # fmt: skip


CHANGES = some.builds(
    lambda device, rest: [*device, *rest],
    some.lists(DEVICES, max_size=1),
    some.lists(PEERS | some.builds(RemovePeer, some.just("kilo0"), KEYS), max_size=8),
)


@given(CHANGES)
def test_wireguard(changes: list[SetPeer | SetDevice | RemovePeer]) -> None:
    assert wireguard.set_device(33, "kilo0", changes) == by_hand_wireguard.encode(33, "kilo0", changes)


def test_a_peer_with_more_allowed_ips_than_one_message_holds() -> None:
    many = tuple(IPv4Network((0x0A00_0000 + number, 32)) for number in range(1234))
    (peer,) = [SetPeer(name="kilo0", public_key=base64.b64encode(bytes(32)).decode(), allowed_ips=many)]
    assert wireguard.set_device(33, "kilo0", [peer]) == by_hand_wireguard.encode(33, "kilo0", [peer])


@given(networks(), some.sampled_from(("saddr", "daddr")), some.sets(some.ip_addresses(v=4), max_size=5), NUMBERS)
def test_tables(network: IPNetwork, side: str, addresses: set[IPv4Address], mark: int) -> None:
    rule = (
        *nftables.match_interface("iifname", "kilo0"), *nftables.match_interface("oifname", "kilo0", equal=False),
        *nftables.match_protocol(4), *nftables.match_network(network, side), *nftables.match_set("nodes", 4, side),
        *nftables.match_address(network.network_address, side), *nftables.count("dropped"),
        *nftables.match_family(6), *nftables.match_mark(0), *nftables.match_answer(), *nftables.set_mark(mark),
        *nftables.match_set("nodes", 4, side, within=False), *nftables.match_some_source(), *nftables.match_to_us(),
        *nftables.match_other_way_back(), *nftables.match_port("sport", 2379), *nftables.match_ports(67, 68),
        *nftables.match_tcp_flags(0x12, 0x02), *nftables.match_icmp(4, 11, 12), *nftables.match_icmp(6, 143, 143),
        *nftables.match_later_fragment(4), *nftables.match_later_fragment(6), *nftables.clamp_segments(),
        *nftables.source_nat(network.network_address),
    )  # fmt: skip
    table = FirewallTable(
        name="kilo",
        chains=(Chain(name="input", kind="filter", hook="input", priority=-5),),
        sets=(AddressSet(name="nodes", version=4, addresses=frozenset(addresses)),),
        counters=("dropped",),
        rules=tuple(
            Rule(chain="input", expressions=(*rule, last))
            for last in (nftables.ACCEPT, nftables.DROP, nftables.RETURN, nftables.MASQUERADE, nftables.REJECT)
        ),
    )
    assert nft.replace_table(table) == by_hand_nft.pack_table(table)
    assert nft.delete_table("kilo") == by_hand_nft.pack_deletion("kilo")
    for change in (AddElements("kilo", table.sets[0]), DeleteElements("kilo", table.sets[0])):
        assert nft.change_elements(change) == by_hand_nft.change_elements(change)


@pytest.mark.parametrize("family", ["inet", "ip", "ip6"])
def test_rules_in_chains_of_others(family: str) -> None:
    match = ("-i", "kilo0", "-s", "fd00::/64" if family == "ip6" else "10.4.0.0/16")
    opening = Opening(family, "firewalld", "filter_FORWARD", match, "kilo-etcd:kilo0", 0x1_0000_0002)
    side = nftables.match_network(ip_network(match[3]), "saddr")
    expressions = (*nftables.match_interface("iifname", "kilo0"), *side, nftables.ACCEPT)
    assert nft.insert_rule(opening) == by_hand_nft.insert_rule(opening, expressions)
    assert nft.delete_rule(opening) == by_hand_nft.delete_rule(opening)
    number = {"inet": 1, "ip": 2, "ip6": 10}[family]
    found = hooks.read_rule_of(nft.insert_rule(opening).body, number, "firewalld", "filter_FORWARD")
    assert found is not None
    (rule,) = hooks.to_rules(found)
    assert (rule.comment, rule.verdict, rule.conditions[0]) == (
        opening.comment, "accept", Condition("iif", "kilo0")
    )  # fmt: skip
    assert rule.conditions[-1] == Condition("saddr", ip_network(match[3]))
    for name, arguments in (
        ("get_rules_of", ("firewalld", "filter_FORWARD", number)), ("get_elements", ("firewalld", "some", number)),
        ("get_all_chains", ()),
    ):  # fmt: skip
        assert getattr(nft, name)(*arguments) == getattr(by_hand_nft, name)(*arguments)


def test_a_set_of_more_elements_than_one_message_holds() -> None:
    addresses = frozenset(IPv6Address(number) for number in range(2500))
    table = FirewallTable(name="kilo", sets=(AddressSet(name="nodes6", version=6, addresses=addresses),))
    assert nft.replace_table(table) == by_hand_nft.pack_table(table)


@pytest.mark.parametrize("key", ["", "nonsense", base64.b64encode(bytes(31)).decode()])
def test_a_key_that_is_none_is_an_error_of_that_peer(key: str) -> None:
    with pytest.raises(OSError, match="32 bytes in base64"):
        wireguard.set_device(33, "kilo0", [RemovePeer("kilo0", key)])
