"""The networks that a host is attached to, and those that it reaches over its own links."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

from kilo_etcd.kernel.state import DefaultRoute, HostAddress, StaticRoute
from kilo_etcd.model import IPNetwork
from kilo_etcd.runtime.host_facts import MOST_NETWORKS, HostFacts, Reached


def nets(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(ip_network(text) for text in texts)


def address(interface: str, text: str, kind: str = "") -> HostAddress:
    return HostAddress(interface=interface, index=1, kind=kind, address=ip_interface(text), up=True)


def default(interface: str, gateway: str) -> DefaultRoute:
    ip = ip_address(gateway)
    return DefaultRoute(family=ip.version, interface=interface, gateway=ip)


def host(*addresses: HostAddress, ways: tuple[DefaultRoute, ...] = ()) -> HostFacts:
    loopback = (address("lo", "127.0.0.1/8"), address("lo", "::1/128"))
    return HostFacts(hostname="node-1", addresses=(*loopback, *addresses), default_routes=ways)


def test_links_gateways_name_servers_and_etcd_are_reached() -> None:
    facts = HostFacts(
        addresses=(
            address("lo", "127.0.0.1/8"),
            address("eth0", "10.1.0.5/24"),
            address("eth0", "fe80::5/64"),
            address("eth0", "fd00:1::5/64"),
            address("docker0", "172.17.0.1/16", "bridge"),
            address("kilo0", "10.4.0.5/32", "wireguard"),
            address("wg0", "10.8.0.2/24", "wireguard"),
        ),
        default_routes=(
            DefaultRoute(family=4, interface="eth0", gateway=ip_address("10.1.0.1")),
            DefaultRoute(family=6, interface="eth0", gateway=ip_address("fe80::1")),
        ),
        name_servers=(ip_address("10.9.9.9"), ip_address("127.0.0.1")),
    )
    reached = facts.reached(nets("10.1.0.9/32", "203.0.113.7/32"))
    assert reached.stated() == nets(
        "10.1.0.0/24", "10.8.0.0/24", "10.9.9.9/32", "172.17.0.0/16", "203.0.113.7/32", "fd00:1::/64"
    )


def test_the_order_of_what_is_found_does_not_count() -> None:
    some = nets("10.1.0.0/24", "10.9.9.9/32", "10.9.9.8/32", "fd00::/64")
    assert Reached(some).stated() == Reached(some[::-1]).stated()
    assert Reached(nets("10.1.0.7/32"), nets("10.1.0.0/24")).stated() == nets("10.1.0.0/24")


def test_a_host_with_too_many_networks_states_their_family() -> None:
    many = tuple(ip_network(f"10.{number // 128}.{2 * (number % 128)}.0/24") for number in range(MOST_NETWORKS + 1))
    assert Reached(many[:-1]).stated() == many[:-1]
    assert Reached((*many, *nets("fd00::/64"))).stated() == nets("0.0.0.0/0", "fd00::/64")


def test_static_routes_are_reached() -> None:
    facts = HostFacts(
        addresses=(address("eth0", "10.1.0.5/24"),),
        static_routes=(
            StaticRoute(ip_network("10.20.0.0/16"), "eth0"),
            StaticRoute(ip_network("10.30.0.0/16"), "wg0", "wireguard"),
            StaticRoute(ip_network("10.4.0.0/16"), "kilo0", "wireguard"),
            # A VPN's default route in two halves.
            StaticRoute(ip_network("0.0.0.0/1"), "tun0", "tun"),
            StaticRoute(ip_network("8000::/1"), "tun0", "tun"),
        ),
    )
    reached = facts.reached(())
    assert reached.lasting == nets("10.1.0.0/24", "10.20.0.0/16")
    assert reached.passing == nets("10.30.0.0/16"), "tunnels come and go"


def test_the_families_of_a_host_are_those_of_its_default_routes_or_else_of_its_networks() -> None:
    both = (address("eth0", "10.1.0.5/16"), address("eth0", "fd00:1::5/64"))
    assert host(*both, ways=(default("eth0", "10.1.0.1"), default("eth0", "fe80::1"))).families() == {4, 6}
    assert host(*both, ways=(default("eth0", "10.1.0.1"),)).families() == {4}
    assert host(address("eth0", "10.0.3.7/24")).families() == {4}
    assert host().families() == frozenset()


def test_the_underlay_is_where_the_hosts_own_packets_travel() -> None:
    facts = host(
        address("docker0", "172.17.0.1/16", "bridge"),
        address("br-0123456789ab", "172.18.0.1/16", "bridge"),
        address("kilo0", "10.4.0.1/32", "wireguard"),
        address("tun0", "10.8.0.2/24", "tun"),
        address("eth0", "203.0.113.5/24"),
        address("eth1", "10.1.0.5/16", "bridge"),
        ways=(default("eth0", "203.0.113.1"),),
    )
    assert [str(network) for network in facts.underlay()] == ["203.0.113.0/24", "10.1.0.0/16", "203.0.113.1/32"]
