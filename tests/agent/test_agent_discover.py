"""The internal IP and the endpoint of hosts as they stand in the world, and cloud-init's region."""

from __future__ import annotations

import json
import socket
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import field, frozen

from kilo_etcd import kernel
from kilo_etcd.agent import discover
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.discover import choose, choose_addresses, gather, location_from_cloud_init
from kilo_etcd.kernel.state import DefaultRoute, HostAddress, HostAddresses
from kilo_etcd.model import Endpoint, IPAddress
from kilo_etcd.runtime.host_facts import HostFacts


def address(interface: str, text: str, kind: str = "", **rest: Any) -> HostAddress:
    return HostAddress(interface=interface, index=1, address=ip_interface(text), kind=kind, **rest)


def default(interface: str, gateway: str, metric: int = 0, source: str = "") -> DefaultRoute:
    ip = ip_address(gateway)
    preferred = ip_address(source) if source else None
    return DefaultRoute(family=ip.version, interface=interface, gateway=ip, metric=metric, source=preferred)


LO = (address("lo", "127.0.0.1/8"), address("lo", "::1/128"))
DOCKER = (address("docker0", "172.17.0.1/16", "bridge"), address("br-0123456789ab", "172.18.0.1/16", "bridge"))


@frozen
class Case:
    """A host, and what is to be chosen on it."""

    host: str
    facts: HostFacts
    internal: list[str]
    endpoint: str | None
    because: str
    """Words that stand in one of the reasons."""
    args: dict[str, Any] = field(factory=dict)


def facts(*addresses: HostAddress, ways: tuple[DefaultRoute, ...] = (), resolved: tuple[str, ...] = ()) -> HostFacts:
    return HostFacts(
        hostname="node-1",
        addresses=(*LO, *addresses),
        default_routes=ways,
        resolved=tuple(map(ip_address, resolved)),
    )


LAPTOP = facts(
    address("wlan0", "192.168.1.7/24"),
    address("wlan0", "fe80::7/64"),
    ways=(default("wlan0", "192.168.1.1", 600),),
    resolved=("127.0.1.1",),
)
TWO_LEGS = facts(
    address("eth0", "203.0.113.5/24"),
    address("eth1", "10.1.0.5/16"),
    ways=(default("eth0", "203.0.113.1"),),
)
DUAL = facts(
    address("eth0", "10.1.0.5/16"),
    address("eth0", "fd00:1::5/64"),
    address("eth0", "2001:db8::5/64"),
    address("eth0", "fe80::5/64"),
    ways=(default("eth0", "10.1.0.1"), default("eth0", "fe80::1")),
)

CASES = [
    Case("laptop", LAPTOP, ["192.168.1.7/24"], "192.168.1.7:51820", "since there is no public one"),
    Case(
        "cloud VM behind 1:1 NAT",
        facts(
            address("ens4", "10.128.0.2/32"), ways=(default("ens4", "10.128.0.1"),), resolved=("10.128.0.2",)
        ),
        ["10.128.0.2/32"],
        "10.128.0.2:51820",
        "what node-1 resolves to",
    ),
    Case(
        "cloud VM behind 1:1 NAT, told its public address",
        facts(address("ens4", "10.128.0.2/32"), ways=(default("ens4", "10.128.0.1"),)),
        ["10.128.0.2/32"],
        "198.51.100.7:51820",
        "set by --endpoint",
        {"forced_endpoint": Endpoint.parse("198.51.100.7:51820")},
    ),
    Case(
        "bare metal, public only",
        facts(address("eno1", "203.0.113.5/24"), ways=(default("eno1", "203.0.113.1"),)),
        [],
        "203.0.113.5:51820",
        "the host has no private address, so it is a segment of its own",
    ),
    Case(
        "bare metal, public only, that may be internal",
        facts(address("eno1", "203.0.113.5/24"), ways=(default("eno1", "203.0.113.1"),)),
        ["203.0.113.5/24"],
        "203.0.113.5:51820",
        "the first within --internal-cidr",
        {"internal_cidrs": (ip_network("203.0.113.5/32"),)},
    ),
    Case("a public and a private leg", TWO_LEGS, ["10.1.0.5/16"], "203.0.113.5:51820", "the first public address"),
    Case(
        "a private endpoint preferred",
        TWO_LEGS,
        ["10.1.0.5/16"],
        "10.1.0.5:51820",
        "--prioritise-private-addresses",
        {"prioritise_private": True},
    ),
    Case(
        "a private endpoint preferred where there is none",
        facts(address("eno1", "203.0.113.5/24"), ways=(default("eno1", "203.0.113.1"),)),
        [],
        "203.0.113.5:51820",
        "the first public address",
        {"prioritise_private": True},
    ),
    Case("another port", TWO_LEGS, ["10.1.0.5/16"], "203.0.113.5:777", "first public", {"port": 777}),
    Case("dual stack", DUAL, ["10.1.0.5/16", "fd00:1::5/64"], "[2001:db8::5]:51820", "the first public address"),
    Case(
        "dual stack, public in both families",
        facts(
            address("eth0", "2001:db8::5/64"),
            address("eth0", "203.0.113.5/24"),
            ways=(default("eth0", "203.0.113.1"), default("eth0", "fe80::1")),
        ),
        [],
        "203.0.113.5:51820",
        "on the default route's interface",
    ),
    Case(
        "docker beside a private network",
        facts(*DOCKER, address("eth0", "192.168.1.7/24"), ways=(default("eth0", "192.168.1.1"),)),
        ["192.168.1.7/24"],
        "192.168.1.7:51820",
        "the first private address",
    ),
    Case(
        "docker on a public host",
        facts(*DOCKER, address("eth0", "203.0.113.5/24"), ways=(default("eth0", "203.0.113.1"),)),
        [],
        "203.0.113.5:51820",
        "those of container bridges",
    ),
    Case("docker and nothing else", facts(*DOCKER), [], None, "no address that others could reach"),
    Case(
        "docker's network allowed by hand",
        facts(*DOCKER, address("eth0", "203.0.113.5/24"), ways=(default("eth0", "203.0.113.1"),)),
        ["172.18.0.1/16"],
        "203.0.113.5:51820",
        "--internal-cidr",
        {"internal_cidrs": (ip_network("172.18.0.0/16"),)},
    ),
    Case(
        "a hypervisor whose uplink is a bridge",
        facts(
            address("virbr0", "192.168.122.1/24", "bridge"),
            address("vmbr0", "10.2.0.9/24", "bridge"),
            ways=(default("vmbr0", "10.2.0.1"),),
        ),
        ["10.2.0.9/24"],
        "10.2.0.9:51820",
        "on vmbr0",
    ),
    Case(
        "a container whose uplink is a veth",
        facts(address("eth0", "10.0.3.7/24", "veth"), ways=(default("eth0", "10.0.3.1"),)),
        ["10.0.3.7/24"],
        "10.0.3.7:51820",
        "on the default route's interface",
    ),
    Case(
        "a lab host without a default route, on a veth",
        facts(address("eth0", "10.0.3.7/24", "veth")),
        ["10.0.3.7/24"],
        "10.0.3.7:51820",
        "on another interface",
    ),
    Case(
        "a tunnel of somebody else's, listed first",
        facts(address("tun0", "10.8.0.2/24", "tun"), address("eth1", "10.1.0.5/24")),
        ["10.1.0.5/24"],
        "10.1.0.5:51820",
        "on eth1",
    ),
    Case(
        "the hostname resolves to the other leg",
        facts(
            address("eth0", "192.168.1.7/24"),
            address("eth1", "10.1.0.5/16"),
            ways=(default("eth0", "192.168.1.1"),),
            resolved=("10.1.0.5",),
        ),
        ["10.1.0.5/16"],
        "10.1.0.5:51820",
        "what node-1 resolves to",
    ),
    Case(
        "the hostname resolves to 127.0.1.1",
        facts(
            address("eth1", "10.9.0.1/24"),
            address("eth0", "10.1.0.5/24"),
            ways=(default("eth0", "10.1.0.1"),),
            resolved=("127.0.1.1",),
        ),
        ["10.1.0.5/24"],
        "10.1.0.5:51820",
        "on the default route's interface",
    ),
    Case(
        "the hostname resolves to an address that is not here",
        facts(address("eth0", "10.1.0.5/24"), ways=(default("eth0", "10.1.0.1"),), resolved=("198.51.100.9",)),
        ["10.1.0.5/24"],
        "10.1.0.5:51820",
        "on the default route's interface",
    ),
    Case(
        "the hostname resolves to every address (nss-myhostname)",
        facts(
            address("eth0", "10.1.0.5/24"),
            address("br7", "172.30.0.1/16", "bridge"),
            ways=(default("eth0", "10.1.0.1"),),
            resolved=("172.30.0.1", "10.1.0.5"),
        ),
        ["10.1.0.5/24"],
        "10.1.0.5:51820",
        "on eth0",
    ),
    Case(
        "two default routes: the lower metric",
        facts(
            address("wlan0", "192.168.2.7/24"),
            address("eth0", "192.168.1.7/24"),
            ways=(default("wlan0", "192.168.2.1", 600), default("eth0", "192.168.1.1", 100)),
        ),
        ["192.168.1.7/24"],
        "192.168.1.7:51820",
        "on eth0",
    ),
    Case(
        "two default routes: the lower metric, although only the other one has a preferred source (DHCP)",
        facts(
            address("wlan0", "192.168.2.7/24"),
            address("eth0", "192.168.1.7/24"),
            ways=(default("wlan0", "192.168.2.1", 600, "192.168.2.7"), default("eth0", "192.168.1.1", 100)),
        ),
        ["192.168.1.7/24"],
        "192.168.1.7:51820",
        "on eth0",
    ),
    Case(
        "two default routes with preferred sources: the lower metric",
        facts(
            address("wlan0", "192.168.2.7/24"),
            address("eth0", "192.168.1.7/24"),
            ways=(
                default("wlan0", "192.168.2.1", 600, "192.168.2.7"),
                default("eth0", "192.168.1.1", 100, "192.168.1.7"),
            ),
        ),
        ["192.168.1.7/24"],
        "192.168.1.7:51820",
        "on eth0",
    ),
    *(
        Case(
            f"a second uplink behind the location's network{words}",
            facts(
                address("eth0", "203.0.113.5/24"),
                address("eth1", "10.1.0.5/24"),
                address("wwan0", "192.168.8.100/24"),
                ways=(default("eth0", "203.0.113.1", 100), default("wwan0", "192.168.8.1", 700, source)),
            ),
            ["10.1.0.5/24"],
            "203.0.113.5:51820",
            "on eth1",
        )
        for words, source in (("", ""), (", with a preferred source", "192.168.8.100"))
    ),
    Case(
        "a second uplink for management, beside links to routers that have no numbers",
        facts(
            address("lo", "10.0.0.9/32"),
            address("eth2", "192.168.9.5/24"),
            ways=(default("swp1", "169.254.0.1"), default("eth2", "192.168.9.1", 900)),
        ),
        ["10.0.0.9/32"],
        "10.0.0.9:51820",
        "what the default route sends from, on lo",
    ),
    Case(
        "--internal-cidr chooses among private networks",
        facts(
            address("eth0", "192.168.1.7/24"), address("eth1", "10.1.0.5/16"), ways=(default("eth0", "192.168.1.1"),)
        ),
        ["10.1.0.5/16"],
        "192.168.1.7:51820",
        "the first within --internal-cidr",
        {"internal_cidrs": (ip_network("10.0.0.0/8"),)},
    ),
    Case(
        "--internal-cidr that fits nothing",
        LAPTOP,
        [],
        "192.168.1.7:51820",
        "no address is within --internal-cidr 10.0.0.0/8",
        {"internal_cidrs": (ip_network("10.0.0.0/8"),)},
    ),
    Case(
        "temporary and deprecated IPv6 addresses come last",
        facts(
            address("eth0", "2001:db8::dead/64", temporary=True),
            address("eth0", "2001:db8::bad/64", deprecated=True),
            address("eth0", "2001:db8::5/64"),
            ways=(default("eth0", "fe80::1"),),
        ),
        [],
        "[2001:db8::5]:51820",
        "the first public address",
    ),
    Case(
        "our own interface, mesh addresses, IPIP and dead links are nothing",
        facts(
            address("kilo0", "10.99.0.1/32", "wireguard"),
            address("eth3", "10.4.7.7/16"),
            address("tunl0", "10.98.0.1/32", "ipip"),
            address("eth9", "10.97.0.1/24", up=False),
        ),
        [],
        None,
        "set --endpoint",
        {"subnets": (ip_network("10.4.0.0/16"),)},
    ),
    Case(
        "a service address on the loopback interface",
        facts(address("lo", "203.0.113.80/32"), address("eth0", "10.1.0.5/24"), ways=(default("eth0", "10.1.0.1"),)),
        ["10.1.0.5/24"],
        "10.1.0.5:51820",
        "no public one",
    ),
    Case(
        "a service address on a dummy, on a public host",
        facts(
            address("dummy0", "10.0.0.80/32", "dummy"),
            address("eth0", "203.0.113.5/24"),
            ways=(default("eth0", "203.0.113.1"),),
        ),
        [],
        "203.0.113.5:51820",
        "those of the loopback device and dummies",
    ),
    Case(
        "kube-proxy's services",
        facts(
            address("kube-ipvs0", "203.0.113.80/32", "dummy"),
            address("kube-ipvs0", "10.96.0.1/32", "dummy"),
            address("eth0", "10.1.0.5/24"),
            ways=(default("eth0", "10.1.0.1"),),
        ),
        ["10.1.0.5/24"],
        "10.1.0.5:51820",
        "no public one",
    ),
    Case(
        "a service address allowed by hand",
        facts(address("lo", "10.0.0.80/32"), address("eth0", "203.0.113.5/24"), ways=(default("eth0", "203.0.113.1"),)),
        ["10.0.0.80/32"],
        "203.0.113.5:51820",
        "--internal-cidr",
        {"internal_cidrs": (ip_network("10.0.0.0/24"),)},
    ),
    Case(
        "the host's own address on the loopback interface, which the default route sends from",
        facts(
            address("lo", "203.0.113.9/32"),
            address("lo", "203.0.113.80/32"),
            address("eth0", "10.1.0.5/31"),
            ways=(default("eth0", "10.1.0.4", source="203.0.113.9"),),
        ),
        ["10.1.0.5/31"],
        "203.0.113.9:51820",
        "what the default route sends from, on lo",
    ),
    Case(
        "the host's own address on the loopback interface, since the links to the routers have no numbers",
        facts(
            address("lo", "10.0.0.9/32"),
            ways=(default("swp1", "169.254.0.1"), default("swp2", "169.254.0.1")),
        ),
        ["10.0.0.9/32"],
        "10.0.0.9:51820",
        "what the default route sends from, on lo",
    ),
    Case(
        "the host's own address on a dummy, by its name",
        facts(
            address("dummy0", "10.0.0.9/32", "dummy"),
            address("eth0", "10.1.0.5/31"),
            ways=(default("eth0", "10.1.0.4"),),
            resolved=("10.0.0.9",),
        ),
        ["10.0.0.9/32"],
        "10.0.0.9:51820",
        "what node-1 resolves to, on dummy0",
    ),
    Case(
        "another VPN on a public host",
        facts(
            address("tailscale0", "100.92.235.32/32", "tun"),
            address("tailscale0", "fd7a:115c::1/128", "tun"),
            address("eth0", "203.0.113.5/24"),
            ways=(default("eth0", "203.0.113.1"),),
        ),
        [],
        "203.0.113.5:51820",
        "those of tunnels, by which the default route does not go (--internal-cidr allows one)",
    ),
    Case(
        "another VPN that answers for the host's name",
        facts(
            address("tailscale0", "100.92.235.32/32", "tun"),
            address("eth0", "203.0.113.5/24"),
            ways=(default("eth0", "203.0.113.1"),),
            resolved=("100.92.235.32",),
        ),
        [],
        "203.0.113.5:51820",
        "the first public address",
    ),
    Case(
        "a public address at the end of a tunnel, beside a private one that the default route leads out by",
        facts(
            address("gre1", "203.0.113.5/32", "gre"),
            address("eth0", "10.1.0.5/24"),
            ways=(default("eth0", "10.1.0.1"),),
        ),
        ["10.1.0.5/24"],
        "10.1.0.5:51820",
        "no public one",
    ),
    Case(
        "another VPN that is to be the location's network",
        facts(
            address("wg0", "10.8.0.2/24", "wireguard"),
            address("eth0", "203.0.113.5/24"),
            ways=(default("eth0", "203.0.113.1"),),
        ),
        ["10.8.0.2/24"],
        "203.0.113.5:51820",
        "--internal-cidr",
        {"internal_cidrs": (ip_network("10.8.0.0/24"),)},
    ),
    Case("only another VPN", facts(address("wg0", "10.8.0.2/24", "wireguard")), [], None, "those of tunnels"),
    Case(
        "a tunnel that is the uplink: PPPoE",
        facts(
            address("ppp0", "203.0.113.5/32", "ppp"),
            address("eth1", "10.1.0.5/24"),
            ways=(default("ppp0", "203.0.113.1"),),
        ),
        ["10.1.0.5/24"],
        "203.0.113.5:51820",
        "on the default route's interface",
    ),
    Case(
        "a tunnel that is the uplink in one family: 6in4",
        facts(
            address("eth0", "203.0.113.5/24"),
            address("he0", "2001:db8::5/64", "sit"),
            address("he0", "10.77.0.1/32", "sit"),
            ways=(default("eth0", "203.0.113.1"), default("he0", "2001:db8::1")),
        ),
        [],
        "203.0.113.5:51820",
        "further endpoint [2001:db8::5]:51820 (on the default route's interface, on he0)",
    ),
    *(
        Case(
            f"a virtual address of keepalived's, {position}",
            facts(*addresses, ways=(default("eth0", "10.1.0.1"),)),
            ["10.1.0.5/24"],
            "10.1.0.5:51820",
            "on eth0",
        )
        for position, addresses in {
            "added first": (address("eth0", "10.1.0.80/32"), address("eth0", "10.1.0.5/24")),
            "added second": (address("eth0", "10.1.0.5/24"), address("eth0", "10.1.0.80/32")),
            "of another network, added first": (address("eth0", "10.9.0.80/24"), address("eth0", "10.1.0.5/24")),
        }.items()
    ),
    Case(
        "a virtual address beside the one that the default route sends from",
        facts(
            address("eth0", "203.0.113.80/24"),
            address("eth0", "203.0.113.5/24"),
            ways=(default("eth0", "203.0.113.1", source="203.0.113.5"),),
        ),
        [],
        "203.0.113.5:51820",
        "the first public address",
    ),
    Case(
        "a default route with two next hops, the second by a bridge",
        facts(
            address("mgmt0", "192.168.0.5/24"),
            address("br-lan", "10.50.0.2/24", "bridge"),
            ways=(default("wan0", "203.0.113.1"), default("br-lan", "10.50.0.1")),
        ),
        ["10.50.0.2/24"],
        "10.50.0.2:51820",
        "on the default route's interface, on br-lan",
    ),
    Case(
        "two routers that advertise themselves on two links",
        facts(
            address("mgmt0", "fd00:9::5/64"),
            address("eth1", "2001:db8:1::5/64"),
            address("eth0", "fd00:1::5/64"),
            ways=(default("eth1", "fe80::1", 1024), default("eth0", "fe80::2", 1024)),
        ),
        ["fd00:1::5/64"],
        "[2001:db8:1::5]:51820",
        "on the default route's interface, on eth0",
    ),
    Case(
        "shared address space (CGNAT) is private",
        facts(address("eth0", "100.64.3.4/10"), ways=(default("eth0", "100.64.0.1"),)),
        ["100.64.3.4/10"],
        "100.64.3.4:51820",
        "no public one",
    ),
    Case("nothing at all", facts(), [], None, "the host has no private address"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.host for case in CASES])
def test_what_is_chosen_and_why(case: Case) -> None:
    chosen = choose_addresses(case.facts, **case.args)
    assert [str(ip) for ip in chosen.internal_ips] == case.internal
    assert (str(chosen.endpoint) if chosen.endpoint else None) == case.endpoint
    assert case.because in "\n".join(chosen.reasons)


V6_ONLY = facts(address("eth0", "2001:db8::5/64"), ways=(default("eth0", "fe80::1"),))
ULA = facts(address("eth0", "203.0.113.5/24"), address("eth0", "fd00::5/64"), ways=(default("eth0", "203.0.113.1"),))


@pytest.mark.parametrize(
    ("found", "args", "endpoints"),
    [
        (DUAL, {}, ["[2001:db8::5]:51820", "10.1.0.5:51820"]),
        (DUAL, {"prioritise_private": True}, ["10.1.0.5:51820", "[fd00:1::5]:51820"]),
        (DUAL, {"forced_endpoint": Endpoint.parse("198.51.100.7:1")}, ["198.51.100.7:1", "[2001:db8::5]:51820"]),
        (
            DUAL,
            {"forced_endpoint": Endpoint.parse("vpn.example.org:1")},
            ["vpn.example.org:1", "10.1.0.5:51820", "[2001:db8::5]:51820"],
        ),
        (V6_ONLY, {}, ["[2001:db8::5]:51820"]),
        # A private network without an exit node is nowhere for other sites.
        (ULA, {}, ["203.0.113.5:51820"]),
        (TWO_LEGS, {}, ["203.0.113.5:51820"]),
    ],
)
def test_an_endpoint_per_family(found: HostFacts, args: dict[str, Any], endpoints: list[str]) -> None:
    chosen = choose_addresses(found, **args)
    assert [str(one) for one in (chosen.endpoint, *chosen.more_endpoints)] == endpoints
    for endpoint in chosen.more_endpoints:
        assert f"further endpoint {endpoint}" in "\n".join(chosen.reasons)


def test_the_flags_reach_the_choice() -> None:
    config = AgentConfig.build(hostname="node-1", port="777", internal_cidr="203.0.113.0/24", endpoint="x.example")
    chosen = choose(TWO_LEGS, config)
    assert [str(ip) for ip in chosen.internal_ips] == ["203.0.113.5/24"]
    assert chosen.endpoint == Endpoint("x.example", 777)


async def test_the_hosts_own_facts_can_be_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def list_addresses() -> HostAddresses:
        return HostAddresses(addresses=LO, default_routes=(default("eth0", "10.0.0.1"),))

    async def lookup(name: str) -> tuple[IPAddress, ...]:
        if name != "node-1":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return (ip_address("10.1.0.5"),)

    monkeypatch.setattr(kernel, "list_addresses", list_addresses)
    monkeypatch.setattr(discover, "lookup", lookup)
    found = await gather(AgentConfig(hostname="node-1", interface="wg7"))
    assert found.resolved == (ip_address("10.1.0.5"),)
    assert (found.addresses, found.own_interface) == (LO, "wg7")
    assert found.default_routes == (default("eth0", "10.0.0.1"),)
    assert (await gather(AgentConfig(hostname="no-such-name.invalid"))).resolved == ()


@pytest.mark.autojump
async def test_a_nameserver_that_is_away_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answer: tuple[IPAddress, ...] | Exception | None = (ip_address("10.1.0.5"),)

    async def lookup(name: str) -> tuple[IPAddress, ...]:
        assert name == "node-1"
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, Exception):
            raise answer
        return answer or ()

    async def list_addresses() -> HostAddresses:
        return HostAddresses()

    monkeypatch.setattr(discover, "lookup", lookup)
    monkeypatch.setattr(discover, "_hostnames", {})
    monkeypatch.setattr(kernel, "list_addresses", list_addresses)
    config = AgentConfig(hostname="node-1")
    known = (ip_address("10.1.0.5"),)
    assert (await gather(config)).resolved == known
    answer = None
    assert (await gather(config)).resolved == known
    answer = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert (await gather(config)).resolved == known
    answer = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert (await gather(config)).resolved == ()


async def test_the_kernels_own_list_is_understood() -> None:
    found = await gather(AgentConfig(hostname="localhost"))
    assert all(item.address.version in (4, 6) for item in found.addresses)
    assert choose(found, AgentConfig(hostname="localhost")).reasons


# -- cloud-init ---------------------------------------------------------------------------------------------------


def test_cloud_inits_region_is_the_location(tmp_path: Path) -> None:
    path = tmp_path / "instance-data.json"
    path.write_text(json.dumps({"v1": {"region": "europe-west3", "availability_zone": "europe-west3-a"}}))
    assert location_from_cloud_init(path) == ("europe-west3", f"cloud-init's region (v1.region in {path})")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no"),
        (b"", "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "has no v1.region"),
        (b'{"v1": 1}', "has no v1.region"),
        (b'{"v1": {"region": null}}', "has no v1.region"),
        (b'{"v1": {"region": "  "}}', "has no v1.region"),
        (b'{"v1": {"region": "a\\nb"}}', "has no v1.region"),
    ],
)
def test_without_a_region_there_is_a_reason(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "instance-data.json"
    if content is not None:
        path.write_bytes(content)
    location, reason = location_from_cloud_init(path)
    assert location is None
    assert why in reason


def test_a_directory_in_its_place_is_a_reason_too(tmp_path: Path) -> None:
    assert location_from_cloud_init(tmp_path) == (
        None,
        f"no location from cloud-init: {tmp_path} cannot be read: Is a directory",
    )
