"""Which endpoint is dialled when: the real channel in virtual time, where a test says which endpoint answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
import trio.testing

from kilo_etcd.etcd import channel as channel_module
from kilo_etcd.etcd.api import Config, Discovery
from kilo_etcd.etcd.balancer import BACKOFF_FIRST
from kilo_etcd.etcd.channel import LOOK_UP_PAUSE, STAGGER, Channel, EndpointsUnreachable
from kilo_etcd.etcd.connection import Connection
from kilo_etcd.etcd.discovery import Discovered
from kilo_etcd.etcd.endpoint import EtcdEndpoint
from kilo_etcd.etcd.grpc import TransportFailed

pytestmark = pytest.mark.autojump

SECONDS = 2.0
"""How long it takes until an endpoint that leads nowhere has failed."""


class _Connection:
    """As much of a connection as the channel looks at."""

    def __init__(self, endpoint: EtcdEndpoint) -> None:
        self.endpoint = endpoint
        self.lost = None
        self.retiring = False

    def retire(self) -> None:
        self.retiring = True

    def close(self) -> None:
        self.retiring = True


class World(Channel):
    """A channel whose endpoints answer at once, refuse at once (`down`), or lead nowhere (`cut_off`)."""

    def __init__(self, config: Config, nursery: trio.Nursery) -> None:
        self.remarks: list[str] = []
        super().__init__(config, nursery, on_remark=self.remarks.append)
        self.down: set[str] = set()
        self.cut_off: set[str] = set()
        self.dialled: list[str] = []

    async def dial_one(self, endpoint: EtcdEndpoint) -> Connection:
        name = endpoint.host
        self.dialled.append(name)
        await trio.sleep(SECONDS if name in self.cut_off else 0)
        if name in self.down | self.cut_off:
            raise TransportFailed("connection refused" if name in self.down else "no answer", processed=False)
        return cast(Connection, _Connection(endpoint))

    async def at(self, *, answers: bool = True) -> str:
        """The host of a new connection; the one before is left."""
        if self._current is not None:
            self.failed(self._current)
        self.dialled.clear()
        connection = await self.connection()
        if answers:
            self.succeeded(connection)
        return connection.endpoint.host

    async def unreachable(self) -> dict[str, str]:
        """Why there is no connection."""
        self.dialled.clear()
        with pytest.raises(EndpointsUnreachable) as error:
            await self.connection()
        return {str(endpoint): failure.reason for endpoint, failure in error.value.failures.items()}


@asynccontextmanager
async def channel(**config: Any) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(Config(**config), nursery)
        nursery.cancel_scope.cancel()


async def test_preferred_endpoints_come_first_and_the_copy_last() -> None:
    async with channel(endpoints=("given",), more_endpoints=("copy",)) as world:
        assert await world.at() == "given"
        world.prefer(("http://member", "http://other"))
        assert [str(endpoint) for endpoint in world.endpoints] == [
            "http://member:2379", "http://other:2379", "http://given:2379", "http://copy:2379",
        ]  # fmt: skip
        await trio.sleep(5)
        assert await world.at() in ("member", "other")
        assert world.dialled in (["member"], ["other"])
        world.down = {"member", "other"}
        await trio.sleep(5)
        assert await world.at() == "given"
        assert "copy" not in world.dialled
        world.down |= {"given"}
        await trio.sleep(5)
        assert await world.at() == "copy"
        world.down = set()
        await trio.sleep(5)
        assert await world.at() in ("member", "other")


async def test_a_later_group_waits_until_those_before_have_failed() -> None:
    async with channel(endpoints=("given",), more_endpoints=("copy",)) as world:
        world.cut_off = {"given"}
        started = trio.current_time()
        assert await world.at() == "copy"
        assert trio.current_time() - started == pytest.approx(SECONDS)


async def test_a_group_that_led_nowhere_costs_a_stagger_and_a_resting_one_nothing() -> None:
    async with channel(endpoints=("given",)) as world:
        world.cut_off = {"a", "b"}
        world.prefer(("a", "b"))
        assert await world.at() == "given"
        for pause, seconds in ((5.0, 2 * STAGGER), (0.0, 0.0), (5.0, 2 * STAGGER)):
            world._balancer.failed(world.parse("a"), trio.current_time())
            world._balancer.failed(world.parse("b"), trio.current_time())
            await trio.sleep(pause)
            started = trio.current_time()
            assert await world.at() == "given"
            # The connection that was left lets its endpoint rest too, a little.
            assert trio.current_time() - started == pytest.approx(seconds, abs=BACKOFF_FIRST)
        # They are tried again, and count as soon as they answer.
        world.cut_off = set()
        await trio.sleep(5)
        assert await world.at() in ("a", "b")


async def test_a_resting_group_is_tried_again_if_no_other_can_be_connected_to() -> None:
    async with channel(endpoints=("given",)) as world:
        world.prefer(("member",))
        assert await world.at() == "member"
        world.down = {"given"}
        assert await world.at() == "member"
        assert world.dialled == ["given", "member"]


async def test_members_whose_urls_lead_nowhere_are_named_once() -> None:
    async with channel(endpoints=("given",)) as world:
        world.down, world.cut_off = {"a"}, {"b"}
        world.prefer(("a", "b"))
        for _ in range(4):
            assert await world.at() == "given"
            await trio.sleep(5)
        assert world.remarks == [
            "none of etcd's members can be connected to at the client URLs that it lists (etcd "
            "--advertise-client-urls), so http://given:2379 is used: http://a:2379: connection refused; "
            "http://b:2379: no answer"
        ]
        world.prefer(("a", "c"))
        assert await world.at() == "c"
        world.down |= {"c"}
        for _ in range(4):
            assert await world.at() == "given"
            await trio.sleep(5)
        assert len(world.remarks) == 1, "one that was connected to is down, which is no fault of its URL"


class Dns:
    """What SRV records name; each look-up takes `seconds`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts: tuple[str, ...] = ()
        self.seconds = 0.0
        self.asked: list[float] = []
        monkeypatch.setattr(channel_module, "discover", self._discover)

    async def _discover(self, _discovery: Discovery) -> Discovered:
        self.asked.append(trio.current_time())
        await trio.sleep(self.seconds)
        if not self.hosts:
            raise TransportFailed("no DNS server answers", processed=False)
        return Discovered(endpoints=tuple(EtcdEndpoint(host, 2379, False) for host in self.hosts))


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> Dns:
    return Dns(monkeypatch)


SRV: dict[str, Any] = {"endpoints": (), "discovery": Discovery(domain="example.com", insecure=True)}


async def test_dns_that_is_away_costs_known_members_nothing_and_a_copy_a_stagger(dns: Dns) -> None:
    dns.seconds = 3.0
    async with channel(**SRV, more_endpoints=("copy",)) as world:
        started = trio.current_time()
        assert await world.at() == "copy"
        assert trio.current_time() - started == pytest.approx(STAGGER)
        world.prefer(("m1", "m2"))
        for _ in range(3):
            await trio.sleep(10)
            started = trio.current_time()
            assert await world.at() in ("m1", "m2")
            assert trio.current_time() - started == pytest.approx(0)
        # What DNS says at last counts.
        dns.hosts = ("found",)
        world.down = {"copy", "m1", "m2"}
        await trio.sleep(10)
        assert await world.at() == "found"


async def test_discovered_endpoints_come_before_the_copy(dns: Dns) -> None:
    dns.hosts, dns.seconds = ("found",), 0.1
    async with channel(**SRV, more_endpoints=("copy",)) as world:
        assert await world.at() == "found"


async def test_dns_is_asked_at_a_bounded_rate(dns: Dns) -> None:
    async with channel(**SRV) as world:
        for _ in range(3):
            assert await world.unreachable() == {"the endpoints of example.com": "no DNS server answers"}
        dns.hosts, world.down = ("found",), {"found"}
        for _ in range(10):
            await world.unreachable()
        gaps = [later - sooner for sooner, later in zip(dns.asked, dns.asked[1:], strict=False)]
        assert len(gaps) > 3
        assert min(gaps) >= LOOK_UP_PAUSE


async def test_endpoints_that_change_wake_who_waits_for_them(dns: Dns) -> None:
    dns.hosts = ("found",)
    async with channel(**SRV) as world, trio.open_nursery() as nursery:
        seen: list[tuple[str, ...]] = [()]

        async def follow() -> None:
            while True:
                seen.append(await world.wait_endpoints(seen[-1]))

        nursery.start_soon(follow)
        assert await world.at() == "found"
        await trio.testing.wait_all_tasks_blocked()
        assert seen[1:] == [("http://found:2379",)]
        world.prefer(("found",))
        await trio.testing.wait_all_tasks_blocked()
        assert len(seen) == 2
        world.prefer(("member",))
        await trio.testing.wait_all_tasks_blocked()
        assert seen[2:] == [("http://member:2379", "http://found:2379")]
        nursery.cancel_scope.cancel()
