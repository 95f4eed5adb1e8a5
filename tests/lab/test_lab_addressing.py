"""The lab's network as text: what each machine is told, seen from each machine."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from kilo_etcd.lab import HostSpec, SiteSpec, Spec, SpecError
from kilo_etcd.lab.addressing import (
    host_cut_script,
    hosts_file,
    interface_commands,
    lay_out,
    netem_commands,
    router_firewall,
    site_cut_script,
    sysctls,
    wire_command,
)
from kilo_etcd.lab.spec import NATS
from kilo_etcd.model import is_public

SPEC = Spec.simple({"gcp": 2, "dc": 2})


def test_a_public_host_seen_from_itself() -> None:
    assert interface_commands(lay_out(SPEC), "gcp-1") == [
        "link set lo up",
        "addr add 10.101.0.11/24 dev eth0",
        "addr add 198.51.100.1/32 dev eth0",
        "link set eth0 up",
        "route add 0.0.0.0/0 via 10.101.0.1 dev eth0 src 198.51.100.1",
    ]


def test_a_host_behind_nat_seen_from_itself() -> None:
    layout = lay_out(SPEC)
    assert interface_commands(layout, "dc-2") == [
        "link set lo up",
        "addr add 10.102.0.12/24 dev eth0",
        "link set eth0 up",
        "route add 0.0.0.0/0 via 10.102.0.1 dev eth0",
    ]
    assert "10.102.0.12 dc-2\n" in hosts_file(layout, "dc-2")


def test_a_router_seen_from_itself() -> None:
    assert interface_commands(lay_out(SPEC), "router:dc") == [
        "link add name lan0 address 02:6b:04:00:00:00 type bridge forward_delay 0 mcast_snooping 0",
        "addr add 10.102.0.1/24 dev lan0",
        "link set lan0 up",
        "link set lo up",
        "addr add 203.0.113.2/32 dev wan",
        "link set wan up",
        "route add 0.0.0.0/0 via 203.0.113.254 dev wan onlink",
        "route add 198.51.100.2/32 dev lan0",
        "link set port3 master lan0 addrgenmode none up",
        "link set port4 master lan0 addrgenmode none up",
    ]


def test_the_internet_knows_public_addresses_only() -> None:
    routes = [line.split()[2] for line in interface_commands(lay_out(SPEC), "internet") if line.startswith("route")]
    assert all(is_public(ip_address(route.removesuffix("/32"))) for route in routes)
    assert {"198.51.100.1/32", "198.51.100.2/32", "203.0.113.1/32", "203.0.113.2/32", "192.0.2.1/32"} <= set(routes)


def test_only_routers_and_the_internet_forward() -> None:
    assert {name: sysctls(name)["ipv4/ip_forward"] for name in ("internet", "router:dc", "gcp-1", "etcd:etcd1")} == {
        "internet": "1",
        "router:dc": "1",
        "gcp-1": "0",
        "etcd:etcd1": "0",
    }


def test_a_router_lets_wireguard_and_etcd_through_and_counts_the_rest() -> None:
    text = router_firewall(lay_out(SPEC), "gcp")
    assert "udp dport 51820 counter name wireguard accept" in text
    assert "ip daddr 192.0.2.1 tcp dport 2379 counter name etcd accept" in text
    assert "counter name other drop" in text
    assert "counter name other accept" in router_firewall(lay_out(SPEC.evolve(open=True)), "gcp")
    assert "oifname wan ip saddr 10.101.0.0/24 masquerade" in text


def test_a_routers_nat_is_of_the_kind_that_was_asked_for() -> None:
    def rules(kind: str) -> str:
        hosts = (HostSpec(name="in", families=("ipv4",)), HostSpec(name="out", public=True))
        spec = Spec(sites=(SiteSpec(name="home", nat=kind, hosts=hosts),), families=("ipv4", "ipv6"))
        return router_firewall(lay_out(spec), "home")

    own, stranger = "ip saddr 10.101.0.11 udp sport 51820 masquerade", "iifname wan meta l4proto udp drop"
    assert own not in rules("")
    assert stranger not in rules("")
    for kind in NATS:
        assert stranger in rules(kind)
        assert ("dnat ip to 10.101.0.11:51820" in rules(kind)) == (kind == "full-cone")
    assert f"{own} to :40001" in rules("full-cone")
    assert f"{own} to :40001" in rules("port-restricted")
    assert f"{own} to :20000-39999 fully-random" in rules("symmetric")
    assert "ip6 saddr fd00:101::c udp sport 51820 masquerade to :40002" in rules("full-cone")
    assert "ip6 daddr 2001:db8:3::1 udp dport 40002 dnat ip6 to [fd00:101::c]:51820" in rules("full-cone")


def test_cuts_name_whom_they_cut_off() -> None:
    layout = lay_out(SPEC)
    assert "ip daddr { 192.0.2.1 } drop" in host_cut_script(layout, "gcp-2", ["etcd"])
    assert "ip saddr { 10.101.0.11, 198.51.100.1 } drop" in host_cut_script(layout, "gcp-2", ["location"])
    others = "ip saddr { 198.51.100.1, 10.101.0.11, 198.51.100.2, 203.0.113.2 } drop"
    assert others in host_cut_script(layout, "gcp-2", ["others"])
    assert "drop" not in host_cut_script(layout, "gcp-2", [])
    assert site_cut_script(layout, "dc", ["others"]).splitlines() == [
        "flush chain inet lab cut",
        "add rule inet lab cut ip saddr { 198.51.100.1, 203.0.113.1 } drop",
        "add rule inet lab cut ip daddr { 198.51.100.1, 203.0.113.1 } drop",
    ]


def test_latency_only_where_it_is_asked_for() -> None:
    (near, far) = SPEC.sites
    assert netem_commands(lay_out(SPEC)) == {}
    slow = SiteSpec(name=far.name, hosts=far.hosts, latency_ms=20, loss_percent=1)
    wanted = "netem limit 100000 delay 20ms loss 1%"
    assert netem_commands(lay_out(Spec(sites=(near, slow)))) == {
        "router:dc": [f"qdisc add dev wan root {wanted}"],
        "internet": [f"qdisc add dev site2 root {wanted}"],
    }


def test_both_families() -> None:
    layout = lay_out(SPEC.evolve(families=("ipv4", "ipv6")))
    assert "addr add fd00:101:0::b/64 dev eth0 nodad".replace(":0::", "::") in [
        line.replace(":0:", ":") for line in interface_commands(layout, "gcp-1")
    ]
    assert "route add ::/0 via fd00:101::1 dev eth0 src 2001:db8:1::1" in interface_commands(layout, "gcp-1")


def test_addresses_are_unique_even_with_many_hosts() -> None:
    layout = lay_out(Spec.simple(120, public=3))
    addresses = [ip for host in layout.hosts.values() for ip in host.addresses]
    assert len(addresses) == len(set(addresses)) == 120 + 36
    assert len({wire.mac for wire in layout.wires}) == len(layout.wires)


def test_a_subnet_that_is_too_small_is_refused() -> None:
    hosts = tuple(HostSpec(name=f"h{i}") for i in range(14))
    with pytest.raises(SpecError, match="no address left for host h13"):
        lay_out(Spec(sites=(SiteSpec(name="a", hosts=hosts, subnets=("10.0.0.0/28",)),)))


def test_a_host_of_one_family_in_a_lab_of_both() -> None:
    hosts = (HostSpec(name="four", families=("ipv4",)), HostSpec(name="six", public=True, families=("ipv6",)))
    layout = lay_out(Spec(sites=(SiteSpec(name="dc", hosts=hosts),), families=("ipv4", "ipv6")))
    assert [line for line in interface_commands(layout, "four") if ":" in line] == []
    assert interface_commands(layout, "six") == [
        "link set lo up",
        "addr add fd00:101::c/64 dev eth0 nodad",
        "addr add 2001:db8:1::1/128 dev eth0 nodad",
        "link set eth0 up",
        "route add ::/0 via fd00:101::1 dev eth0 src 2001:db8:1::1",
    ]
    assert layout.endpoints_for("six") == ("http://[2001:db8:2::1]:2379",)
    assert layout.endpoints_for("four") == layout.endpoints_for("operator") == ("http://192.0.2.1:2379",)


def test_a_site_of_a_smaller_mtu() -> None:
    layout = lay_out(Spec(sites=(SiteSpec(name="dsl", hosts=(HostSpec(name="attic"),), mtu=1400),)))
    pids = dict.fromkeys(layout.machines, 7)
    assert [wire_command(wire, pids).count(" mtu 1400") for wire in layout.wires] == [0, 0, 2, 2]
