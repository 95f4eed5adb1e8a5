"""A host does not register the networks that it reaches anew for nothing."""

from __future__ import annotations

import json
from ipaddress import ip_network

import pytest
from agent_world import World, running

from helpers import eventually
from kilo_etcd.agent.registration import KEPT_SECONDS, MOST_KEPT_SECONDS, PassingNetworks, networks_to_register
from kilo_etcd.etcd import api as etcd
from kilo_etcd.model import IPNetwork
from kilo_etcd.runtime.host_facts import Reached


def nets(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(ip_network(text) for text in texts)


def test_what_comes_and_goes_by_itself_is_stated_on_coming_and_withdrawn_with_the_next_change() -> None:
    lan, other, docker = nets("10.1.0.0/24", "10.2.0.0/24", "172.18.0.0/16")
    first, counted = networks_to_register(Reached((lan,)), Reached(), None)
    assert first == (lan,)
    second, counted = networks_to_register(Reached((lan,), (docker,)), counted, first)
    assert second == (lan, docker)
    third, counted = networks_to_register(Reached((lan,)), counted, second)
    assert third == second
    fourth, counted = networks_to_register(Reached((lan,), (docker,)), counted, third)
    assert fourth == second
    fifth, counted = networks_to_register(Reached((lan,)), counted, fourth)
    assert networks_to_register(Reached((lan, other)), counted, fifth)[0] == (lan, other)
    assert networks_to_register(Reached((other,)), counted, fifth)[0] == (other,)
    assert networks_to_register(Reached(), counted, fifth)[0] == ()


def test_what_is_gone_for_a_minute_counts_no_more_and_what_comes_again_and_again_counts_longer() -> None:
    docker, other = nets("172.18.0.0/16", "172.19.0.0/16")
    passing, now = PassingNetworks(), 1000.0
    kept: list[float] = []
    for _ in range(9):
        assert set(passing.look((docker, other), now)) == {docker, other}
        gone = now
        while docker in passing.look((other,), now):
            now += 10
        kept.append(now - gone)
    assert kept[:3] == [KEPT_SECONDS, 2 * KEPT_SECONDS, 4 * KEPT_SECONDS]
    assert kept[-1] == MOST_KEPT_SECONDS
    for number in range(1000):
        passing.look(nets(f"10.{number // 256}.{number % 256}.0/24"), now)
        now += MOST_KEPT_SECONDS
    assert len(passing._kept) <= 256
    assert len(passing._seen) <= 2


@pytest.mark.autojump
async def test_an_etcd_that_is_a_mesh_address_is_named(world: World) -> None:
    settings = etcd.Config(endpoints=("http://10.4.0.9:2379", "http://192.168.1.5:2379"))

    def errors() -> str:
        return str(json.loads(world.etcd.get("/kilo-status/by/h1/status") or b"{}").get("errors"))

    async with running(world, etcd=settings):
        await eventually(lambda: "etcd's endpoint 10.4.0.9 is a mesh address" in errors(), 30, every=0.1)
        assert errors().count("is a mesh address") == 1
        assert world.logged("10.4.0.9 is a mesh address") == 1
