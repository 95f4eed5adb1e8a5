"""Which MTU the tunnel gets, and when the kernel is asked about the ways."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import ip_address

import pytest
from kernel_worlds import peer, plan

from kilo_etcd.kernel.egress import Egress
from kilo_etcd.model import IPAddress
from kilo_etcd.model.hostplan import HostPlan

WAYS = {ip_address("203.0.113.1"): 1500, ip_address("203.0.113.2"): 1400, ip_address("fd00:9::3"): None}


class Kernel:
    def __init__(self) -> None:
        self.ways: dict[IPAddress, int | None] = dict(WAYS)
        self.asked: list[set[str]] = []

    def ask(self, addresses: Collection[IPAddress]) -> Mapping[IPAddress, int | None]:
        self.asked.append({str(address) for address in addresses})
        return {address: self.ways[address] for address in addresses}


def world(*endpoints: str | None, ipip: bool = False) -> HostPlan:
    peers = [peer(number + 2, endpoint=endpoint) for number, endpoint in enumerate(endpoints)]
    return plan(*peers, ipip=("192.168.9.2",) if ipip else ())


def test_the_narrowest_way_counts_less_what_encapsulation_takes() -> None:
    egress = Egress(Kernel().ask)
    assert egress.mtu(world()) == 1420
    assert egress.mtu(world("203.0.113.1:1", None, "[fd00:9::3]:1", "node.example.org:1")) == 1420
    assert egress.mtu(world("203.0.113.1:1", "203.0.113.2:1")) == 1320
    assert egress.mtu(world("203.0.113.1:1", "203.0.113.2:1", ipip=True)) == 1300
    assert egress.mtu(world("203.0.113.1:1")) == 1420, "who is gone is not counted"


def test_the_kernel_is_asked_once_until_something_changes() -> None:
    kernel = Kernel()
    egress = Egress(kernel.ask)
    for _ in range(3):
        egress.mtu(world("203.0.113.1:1", "203.0.113.2:1"))
    assert kernel.asked == [{"203.0.113.1", "203.0.113.2"}]
    assert egress.mtu(world("203.0.113.1:1", "203.0.113.1:2")) == 1420
    assert kernel.asked[1:] == [{"203.0.113.1"}], "only whose endpoint is another"
    kernel.ways[ip_address("203.0.113.1")] = 1300
    assert egress.mtu(world("203.0.113.1:1")) == 1420
    egress.forget()
    assert egress.mtu(world("203.0.113.1:1")) == 1220


def test_what_is_old_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    kernel = Kernel()
    egress = Egress(kernel.ask)
    assert egress.mtu(world("203.0.113.1:1")) == 1420
    kernel.ways[ip_address("203.0.113.1")] = 1300  # learnt from a router on the way, of which no event tells
    now += 30
    egress.expire()
    assert egress.mtu(world("203.0.113.1:1")) == 1420
    now += 31
    egress.expire()
    assert egress.mtu(world("203.0.113.1:1")) == 1220


def test_the_ipip_device_is_as_wide_as_the_locations_network_lets_it() -> None:
    kernel = Kernel()
    kernel.ways[ip_address("192.168.9.2")] = 1450
    egress = Egress(kernel.ask)
    for _ in range(2):
        assert egress.ipip_mtu(world(ipip=True)) == 1430
    assert kernel.asked == [{"192.168.9.2"}]
    assert egress.ipip_mtu(world()) == 1480
