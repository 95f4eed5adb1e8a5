"""Endpoints that are names: plans, and the resolver in virtual time."""

from __future__ import annotations

import io
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import trio
import trio.testing

from kilo_etcd.etcd.api import Config
from kilo_etcd.model import Endpoint, IPAddress
from kilo_etcd.model.hostplan import HostPlan, PeerPlan, Problem
from kilo_etcd.planning.names import resolve_plan
from kilo_etcd.runtime.logs import setup_logging
from kilo_etcd.runtime.resolve import Resolver, endpoint_hosts, etcd_networks, lookup, resolve_once

A, B, C = (ip_address(text) for text in ("198.51.100.1", "198.51.100.2", "2001:db8::3"))


def plan(**endpoints: str | None) -> HostPlan:
    return HostPlan(
        node="me",
        peers={
            f"key-{name}": PeerPlan(
                public_key=f"key-{name}", name=name, endpoint=Endpoint.parse(text) if text else None
            )
            for name, text in endpoints.items()
        },
        problems=(Problem(subject="x", text="was there before"),),
    )


def test_a_plan_without_names_stays_the_object_it_is() -> None:
    given = plan(a="198.51.100.1:51820", b=None)
    assert resolve_plan(given, {"unused.example": (A,)}) is given


def test_names_become_their_first_address_and_the_rest_is_left() -> None:
    given = plan(a="a.example:777", b="198.51.100.9:1", c=None)
    done = resolve_plan(given, {"a.example": (C, A)})
    assert done.peers["key-a"].endpoint == Endpoint(C, 777)
    assert done.peers["key-b"] is given.peers["key-b"]
    assert done.problems == given.problems
    assert list(done.peers) == list(given.peers)
    assert resolve_plan(given, {"a.example": (C, A)}) == done


def test_a_name_that_is_not_resolved_costs_one_peer_its_endpoint_and_is_named() -> None:
    given = plan(a="a.example:777", b="b.example:1")
    done = resolve_plan(given, {"b.example": (B,)}, {"a.example": "SERVFAIL"})
    assert done.peers["key-a"].endpoint is None
    assert done.peers["key-b"].endpoint == Endpoint(B, 1)
    assert [problem.subject for problem in done.problems] == ["x", "a"]
    assert done.problems[-1].text == (
        "the DNS name a.example of the endpoint of a is not resolved (SERVFAIL); mend the name or the resolver"
    )
    # While the answer is on its way nothing is wrong.
    assert resolve_plan(given, {"b.example": (B,)}).problems == given.problems


def test_of_a_names_addresses_the_first_of_a_family_that_the_host_has_is_taken() -> None:
    given = plan(a="a.example:777")
    table = {"a.example": (C, A)}
    for families, address in (({4}, A), ({6}, C), ({4, 6}, C)):
        done = resolve_plan(given, table, families=families)
        assert done.peers["key-a"].endpoint == Endpoint(address, 777)
    done = resolve_plan(given, {"a.example": (C,)}, families={4})
    assert done.peers["key-a"].endpoint is None
    assert "no common address family with a" in done.problems[-1].text


def test_the_hosts_of_etcds_endpoints() -> None:
    given = ("https://etcd.example:2379", "[2001:db8::3]:2379", "198.51.100.1:2379", "http://b.example", "lone")
    assert endpoint_hosts(given) == ("etcd.example", C, A, "b.example", "lone")


async def test_the_systems_resolver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # An answer for a name of this machine would come from files that not every machine has.
    answers = {"a.example": ("198.51.100.2", "fe80::1%eth0", "2001:db8::3", "198.51.100.2")}
    real = socket.getaddrinfo

    def getaddrinfo(name: str, *arguments: object, **options: Any) -> list[Any]:
        if name not in answers:
            return real(name, *arguments, **options)  # type: ignore[arg-type]
        return [(None, None, 0, "", (address, 0)) for address in answers[name]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert await lookup("a.example") == (B, C)
    assert await lookup("198.51.100.1") == (A,)
    for name in ("no-such-name.invalid", "a" * 64 + ".example", ""):
        with pytest.raises(OSError):
            await lookup(name)


class World:
    """A DNS whose answers a test can change. It keeps when it was asked."""

    def __init__(self, **answers: tuple[IPAddress, ...] | OSError | None) -> None:
        self.answers = {name.replace("_", "."): answer for name, answer in answers.items()}
        self.asked: list[tuple[str, float]] = []

    async def lookup(self, name: str) -> tuple[IPAddress, ...]:
        self.asked.append((name, trio.current_time()))
        answer = self.answers[name]
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, OSError):
            raise answer
        return answer or ()

    def times(self, name: str) -> list[float]:
        return [time for asked, time in self.asked if asked == name]


@asynccontextmanager
async def running(world: World, *names: str) -> AsyncIterator[Resolver]:
    resolver = Resolver(lookup=world.lookup, jitter=0.0)
    resolver.set_names(frozenset(names))
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.run)
        await trio.testing.wait_all_tasks_blocked()
        yield resolver
        nursery.cancel_scope.cancel()


@pytest.mark.autojump
async def test_a_change_in_the_dns_is_noticed_within_the_period() -> None:
    world = World(a_example=(A,))
    async with running(world, "a.example") as resolver:
        assert resolver.table == {"a.example": (A,)}
        await resolver.wait_changed()
        begun = trio.current_time()
        world.answers["a.example"] = (B,)
        await resolver.wait_changed()
        assert resolver.table == {"a.example": (B,)}
        assert trio.current_time() - begun <= 30


@pytest.mark.autojump
async def test_answers_in_another_order_are_no_change() -> None:
    world = World(a_example=(A, B))
    async with running(world, "a.example") as resolver:
        await resolver.wait_changed()
        world.answers["a.example"] = (B, A)
        with trio.move_on_after(100) as waited:
            await resolver.wait_changed()
        assert waited.cancelled_caught
        assert len(world.asked) == 4
        # A new address joins; the one in use stays in use.
        world.answers["a.example"] = (C, B, A)
        await resolver.wait_changed()
        assert resolver.table["a.example"] == (A, C, B)


@pytest.mark.autojump
async def test_a_failure_keeps_the_last_address_and_is_retried_sooner_and_slower() -> None:
    world = World(a_example=(A,))
    async with running(world, "a.example") as resolver:
        world.answers["a.example"] = OSError("SERVFAIL")
        begun = trio.current_time()
        await trio.sleep(125)
        assert [time - begun for time in world.times("a.example")] == pytest.approx(
            [0, 30, 31, 33, 37, 45, 61, 91, 121], abs=0.01
        )
        assert resolver.table == {"a.example": (A,)}
        world.answers["a.example"] = (B,)
        await trio.sleep(30)
        assert resolver.table == {"a.example": (B,)}


@pytest.mark.autojump
async def test_a_name_that_hangs_or_fails_delays_no_other() -> None:
    world = World(hangs_example=None, fails_example=OSError("NXDOMAIN"), a_example=(A,), empty_example=())
    async with running(world, "hangs.example", "fails.example", "a.example", "empty.example") as resolver:
        assert resolver.table == {"a.example": (A,)}
        await trio.sleep(31)
        assert len(world.times("a.example")) == 2
        # Five seconds are given to one that hangs, and it is asked again.
        assert world.times("hangs.example")[1] - world.times("hangs.example")[0] == pytest.approx(6, abs=0.01)


@pytest.mark.autojump
async def test_a_name_that_never_had_an_answer_is_told_by_one_voice() -> None:
    log = io.StringIO()
    setup_logging("info", stream=log)
    world = World(a_example=OSError("NXDOMAIN"), etcd_example=OSError("SERVFAIL"))
    async with running(world, "a.example") as resolver:
        await resolver.wait_changed()
        assert resolver.failed == {"a.example": "NXDOMAIN"}
        # The plan says it; what no plan has in it, the resolver says itself, and once.
        resolver.networks(["etcd.example:2379"])
        world.answers["a.example"] = OSError("another reason")
        await trio.sleep(100)
        assert log.getvalue().count("a.example") == 0
        assert log.getvalue().count("etcd.example") == 1
        world.answers["a.example"] = (A,)
        await resolver.wait_changed()
        assert (resolver.table, resolver.failed) == ({"a.example": (A,)}, {})


@pytest.mark.autojump
async def test_names_come_and_go() -> None:
    world = World(a_example=(A,), b_example=(B,))
    async with running(world, "a.example") as resolver:
        resolver.set_names(frozenset({"b.example"}))
        await trio.testing.wait_all_tasks_blocked()
        assert resolver.table == {"b.example": (B,)}
        asked = len(world.times("a.example"))
        await trio.sleep(100)
        assert len(world.times("a.example")) == asked
        resolver.set_names(frozenset({"a.example", "b.example"}))
        await trio.testing.wait_all_tasks_blocked()
        assert resolver.table == {"a.example": (A,), "b.example": (B,)}


@pytest.mark.autojump
async def test_etcds_names_are_looked_up_and_kept() -> None:
    world = World(etcd_example=(A, C))
    async with running(world) as resolver:
        endpoints = ("https://etcd.example:2379", "198.51.100.2:2379")
        assert resolver.networks(endpoints) == (ip_network("198.51.100.2/32"),)
        await resolver.wait_changed()
        resolver.set_names(frozenset())
        await trio.testing.wait_all_tasks_blocked()
        assert resolver.networks(endpoints) == tuple(
            map(ip_network, ("198.51.100.1/32", "2001:db8::3/128", "198.51.100.2/32"))
        )


@pytest.mark.autojump
async def test_etcds_names_that_left_its_endpoints_are_looked_up_no_more() -> None:
    world = World(old_example=(A,), new_example=(B,), peer_example=(C,))
    async with running(world) as resolver:
        resolver.networks(["https://peer.example:2380"], purpose="encryption")
        for name in ("old.example", "new.example"):
            resolver.networks([f"https://{name}:2379"])
            await trio.testing.wait_all_tasks_blocked()
            assert resolver.table.keys() == {name, "peer.example"}
        asked = len(world.times("old.example"))
        await trio.sleep(100)
        assert len(world.times("old.example")) == asked


@pytest.mark.autojump
async def test_names_can_be_looked_up_once() -> None:
    world = World(a_example=(A,), fails_example=OSError("no"), hangs_example=None)
    given = plan(a="a.example:1", b="fails.example:1", c="hangs.example:1", d=None)
    assert await resolve_once(given, lookup=world.lookup) == (
        {"a.example": (A,)},
        {"fails.example": "no", "hangs.example": "no answer in time"},
    )
    assert trio.current_time() == pytest.approx(5, abs=0.01)


async def test_etcds_networks_are_single_addresses() -> None:
    etcd = Config(endpoints=("https://[2001:db8::1]:2379", "192.0.2.1:2379", "http://no-such-name.invalid:1"))
    assert set(await etcd_networks(etcd.endpoints)) == {ip_network("2001:db8::1/128"), ip_network("192.0.2.1/32")}
