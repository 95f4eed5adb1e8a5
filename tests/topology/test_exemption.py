"""What `--clear` takes, and how a plan with `encrypted` is printed."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from kilo_etcd.model.hostplan import Encryption, Exemption, HostPlan, RoutePlan, Via
from kilo_etcd.planning.render import render


@pytest.mark.parametrize(
    "text", ["tcp/22@10.0.0.0/24", "udp/161@fd00::/64", "tcp@192.0.2.7/32", "icmp@10.0.0.0/8", "icmp@fd00::/8"]
)
def test_an_exemption_prints_as_it_is_written(text: str) -> None:
    assert str(Exemption.parse(text)) == text


def test_an_exemption_is_a_protocol_a_port_and_a_network() -> None:
    exemption = Exemption.parse(" tcp/22@10.0.0.0/24 ")
    assert exemption == Exemption(protocol="tcp", port=22, network=ip_network("10.0.0.0/24"))
    assert Exemption.parse("udp@10.0.0.1").network == ip_network("10.0.0.1/32")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ssh@10.0.0.0/24", "write PROTOCOL[/PORT]@NETWORK"),
        ("tcp/22", "write PROTOCOL[/PORT]@NETWORK"),
        ("tcp/@10.0.0.0/24", "write PROTOCOL[/PORT]@NETWORK"),
        ("tcp/22@10.0.0.1/24", "10.0.0.1/24 has host bits set"),
        ("tcp/22@everywhere", "does not name a network after the @"),
        ("tcp/22@", "does not name a network after the @"),
        ("tcp/0@10.0.0.0/24", "0 is not a port"),
        ("tcp/65536@10.0.0.0/24", "65536 is not a port"),
        ("tcp/\u0662@10.0.0.0/24", "is not a port"),
        ("icmp/8@10.0.0.0/24", "ICMP has no ports"),
    ],
)
def test_what_is_no_exemption_is_refused_with_a_sentence(text: str, part: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Exemption.parse(text)
    assert part in str(caught.value)


def test_a_plan_with_encryption_reads_without_a_manual() -> None:
    there = ip_network("10.0.0.2/32")
    encryption = Encryption(
        send={there: RoutePlan(destination=there, via=Via.TUNNEL, source=ip_address("10.0.0.1"))},
        hold=frozenset({ip_network("10.0.0.3/32")}),
        refuse=frozenset({ip_address("10.0.0.2")}),
        etcd=((ip_address("10.0.0.9"), 2379),),
        etcd_here=(2380,),
        talk=(1107,),
        clear=(Exemption.parse("tcp/22@10.0.0.0/24"),),
    )
    assert render(HostPlan(node="node-1", encryption=encryption)).splitlines() == [
        "encrypted route 10.0.0.2/32 dev wg src 10.0.0.1",
        "encrypted hold 10.0.0.3/32",
        "encrypted refuse 10.0.0.2",
        "encrypted but not 10.0.0.9 tcp/2379, tcp/2380 here, udp/1107, tcp/22@10.0.0.0/24",
    ]
