"""What a host registers as reached over its own links, and that it does not register anew for nothing."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

from kilo_etcd.kernel.state import DefaultRoute, HostAddress, StaticRoute
from kilo_etcd.model import IPNetwork
from kilo_etcd.runtime.discover import HostFacts
from kilo_etcd.runtime.underlay import MOST_NETWORKS, Reached, name_servers


def nets(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(ip_network(text) for text in texts)


def address(interface: str, text: str, kind: str = "") -> HostAddress:
    return HostAddress(interface=interface, index=1, kind=kind, address=ip_interface(text), up=True)


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


def test_what_comes_and_goes_by_itself_is_stated_on_coming_and_withdrawn_with_the_next_change() -> None:
    lan, other, docker = nets("10.1.0.0/24", "10.2.0.0/24", "172.18.0.0/16")
    first, counted = Reached((lan,)).registered(Reached(), None)
    assert first == (lan,)
    second, counted = Reached((lan,), (docker,)).registered(counted, first)
    assert second == (lan, docker)
    third, counted = Reached((lan,)).registered(counted, second)
    assert third == second
    fourth, counted = Reached((lan,), (docker,)).registered(counted, third)
    assert fourth == second
    fifth, counted = Reached((lan,)).registered(counted, fourth)
    assert Reached((lan, other)).registered(counted, fifth)[0] == (lan, other)
    assert Reached((other,)).registered(counted, fifth)[0] == (other,)
    assert Reached().registered(counted, fifth)[0] == ()


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


def test_name_servers_are_those_that_are_asked_in_the_end(tmp_path: Path) -> None:
    own, behind, more = tmp_path / "resolv.conf", tmp_path / "resolved.conf", tmp_path / "unbound.conf"

    def asked() -> list[str]:
        return [str(name_server) for name_server in name_servers(own, (behind, more))]

    assert asked() == []
    own.write_text("# nameserver 9.9.9.9\nnameserver 10.1.0.1\nnameserver x\n nameserver fe80::1%eth0\nsearch a\n")
    assert asked() == ["10.1.0.1"]
    behind.write_text("nameserver 192.168.1.1\nnameserver fd00::53\n")
    assert asked() == ["10.1.0.1"], "no resolver of the host's own is asked"
    for stub in ("127.0.0.53", "127.0.0.1", "::1"):
        own.write_text(f"nameserver {stub}\n")
        assert asked() == ["192.168.1.1", "fd00::53"]
    own.write_text("nameserver 127.0.0.1\nnameserver 10.1.0.1\n")
    assert asked() == ["10.1.0.1", "192.168.1.1", "fd00::53"]
    more.write_text('forward-zone:\n  name: "."\n  forward-addr: 10.5.0.1@53\n  forward-addr: fd00::5\n')
    behind.write_bytes(b"nameserver 10.0.0.1\n\xff\xfe")
    assert asked() == ["10.1.0.1", "10.0.0.1", "10.5.0.1", "fd00::5"]
    behind.unlink()
    more.unlink()
    own.write_text("nameserver 127.0.0.1\n")
    assert asked() == [], "what stands in its configuration is not known"
