"""Which of the kernel's events say that the host may be reached otherwise."""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_interface, ip_network

from kilo_etcd.kernel.drift import AddressEvents
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.state import Route
from kilo_etcd.kernel.write import rtnl as requests

OWN = frozenset({7})
_PROTOCOL_AT, _ADVERTISED = 5, 9
"""Where a message has the protocol of a route, and that of advertised ones (linux/rtnetlink.h: rtmsg, RTPROT_RA)."""


def address(text: str, index: int = 2) -> bytes:
    return requests.add_address(index, ip_interface(text)).body


def default(gateway: str, index: int = 2, metric: int = 0, source: str = "") -> bytes:
    via = ip_address(gateway)
    any_ = ip_network("0.0.0.0/0" if via.version == 4 else "::/0")
    preferred = ip_address(source) if source else None
    route = Route(destination=any_, device="eth0", gateway=via, metric=metric, source=preferred)
    return requests.add_route(route, index).body


def advertised(router: str) -> bytes:
    """A default route that the kernel has made of a router's advertisement."""
    body = bytearray(default(router, metric=1024))
    body[_PROTOCOL_AT] = _ADVERTISED
    return bytes(body)


def several(*gateways: str, index: int = 2) -> bytes:
    hops = b"".join(struct.pack("=HBBiHH4s", 16, 0, 0, index, 8, 5, ip_address(gateway).packed) for gateway in gateways)
    return struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 3, 0, 1, 0) + struct.pack("=HH", 4 + len(hops), 9) + hops


def test_an_address_is_news_once() -> None:
    host = AddressEvents()
    for text in ("192.0.2.7/24", "2001:db8::7/64"):
        assert host.news(replies.NEWADDR, address(text), OWN)
        # A router advertisement says it again every few seconds.
        assert not host.news(replies.NEWADDR, address(text), OWN)
        assert host.news(replies.NEWADDR, address(text, index=3), OWN)
        assert host.news(replies.DELADDR, address(text), OWN)
        assert host.news(replies.NEWADDR, address(text), OWN)


def test_what_happens_on_our_own_devices_is_none() -> None:
    host = AddressEvents()
    assert not host.news(replies.NEWADDR, address("10.4.0.1/32", index=7), OWN)
    assert not host.news(replies.DELADDR, address("10.4.0.1/32", index=7), OWN)


def test_a_default_route_is_news_when_it_goes_another_way() -> None:
    host = AddressEvents()
    assert host.news(replies.NEWROUTE, default("192.0.2.1"), OWN)
    assert not host.news(replies.NEWROUTE, default("192.0.2.1"), OWN)
    # Replaced, and replaced back: the kernel does not say that the former one went.
    assert host.news(replies.NEWROUTE, default("192.0.2.2"), OWN)
    assert host.news(replies.NEWROUTE, default("192.0.2.1"), OWN)
    assert host.news(replies.NEWROUTE, default("2001:db8::1"), OWN)
    assert host.news(replies.DELROUTE, default("192.0.2.1"), OWN)
    assert host.news(replies.NEWROUTE, default("192.0.2.1"), OWN)


def test_a_default_route_is_news_when_it_sends_from_another_address() -> None:
    host = AddressEvents()
    assert host.news(replies.NEWROUTE, default("192.0.2.1"), OWN)
    assert host.news(replies.NEWROUTE, default("192.0.2.1", source="192.0.2.7"), OWN)
    assert not host.news(replies.NEWROUTE, default("192.0.2.1", source="192.0.2.7"), OWN)


def test_two_routers_that_advertise_themselves_in_turn_are_no_news() -> None:
    host = AddressEvents()
    for router in ("fe80::1", "fe80::2"):
        assert host.news(replies.NEWROUTE, advertised(router), OWN)
    for router in ("fe80::1", "fe80::2"):
        assert not host.news(replies.NEWROUTE, advertised(router), OWN)
    assert host.news(replies.DELROUTE, advertised("fe80::1"), OWN)
    assert host.news(replies.NEWROUTE, advertised("fe80::1"), OWN)


def test_a_default_route_is_news_when_one_of_its_next_hops_changes() -> None:
    host = AddressEvents()
    assert host.news(replies.NEWROUTE, several("192.0.2.1", "192.0.2.2"), OWN)
    assert not host.news(replies.NEWROUTE, several("192.0.2.1", "192.0.2.2"), OWN)
    assert host.news(replies.NEWROUTE, several("192.0.2.1", "192.0.2.3"), OWN)


def test_another_route_is_none() -> None:
    other = Route(destination=ip_network("198.51.100.0/24"), device="eth0", gateway=ip_address("192.0.2.1"))
    assert not AddressEvents().news(replies.NEWROUTE, requests.add_route(other, 2).body, OWN)


def test_after_lost_events_all_is_news_again() -> None:
    host = AddressEvents()
    host.news(replies.NEWADDR, address("192.0.2.7/24"), OWN)
    host.forget()
    assert host.news(replies.NEWADDR, address("192.0.2.7/24"), OWN)
