"""A host does not register the networks that it reaches anew for nothing."""

from __future__ import annotations

from ipaddress import ip_network

from kilo_etcd.agent.registration import networks_to_register
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
