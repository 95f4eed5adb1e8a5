"""Networks as ranges: the same answers as from going through all their addresses."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from kilo_etcd.kernel.firewall.chains import BaseChain, Condition, FilterRule
from kilo_etcd.kernel.firewall.destinations import Destination, destination_obstacles
from kilo_etcd.kernel.firewall.ranges import Networks

networks = st.builds(
    lambda number, length: IPv4Network((0x0A000000 + number, length), strict=False),
    st.integers(0, 31),
    st.integers(28, 32),
)
MESH = (IPv4Network("10.0.0.0/28"),)


def addresses(several: Iterable[IPv4Network]) -> set[IPv4Address]:
    return {address for network in several for address in network}


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(networks, max_size=6), st.lists(networks, min_size=1, max_size=3))
def test_a_set_of_networks_holds_what_its_addresses_say(several: list[IPv4Network], subnets: list[IPv4Network]) -> None:
    held, asked = addresses(several), [addresses([subnet]) for subnet in subnets]
    found = Networks.of([*several, IPv6Network("fd00::/64")])
    answer = True if all(one <= held for one in asked) else None if any(one & held for one in asked) else False
    assert found.hold(subnets, 4) is answer
    assert found.hold(subnets, 6) is None
    assert Networks.of(several).hold([], 4) is (None if several else False)


def test_networks_that_hold_a_part_of_the_subnets_only() -> None:
    mesh = [IPv4Network("10.4.0.0/16"), IPv4Network("10.6.0.0/16")]
    part, whole, beyond = IPv4Network("10.4.9.0/24"), IPv4Network("10.0.0.0/8"), IPv4Network("10.8.0.0/16")
    assert Networks.of([part, beyond]).partly_in(mesh) == Networks.of([part])
    assert Networks.of([whole]).partly_in(mesh) == Networks.of([])
    assert Networks.of([mesh[0]]).partly_in(mesh) == Networks.of([mesh[0]]), "not of the other subnet"


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["saddr", "daddr"]), st.lists(networks, min_size=1, max_size=4)), max_size=4),
    st.lists(st.tuples(networks, st.booleans()), max_size=8, unique_by=lambda one: one[0]),
)
def test_many_destinations_are_looked_up_as_each_alone_is(
    rules: list[tuple[str, list[IPv4Network]]], to: list[tuple[IPv4Network, bool]]
) -> None:
    chain = BaseChain(
        family="ip", table="t", name="f", drops=False,
        rules=tuple(
            FilterRule(conditions=(Condition(side, tuple(several)),), verdict="drop") for side, several in rules
        ),
    )  # fmt: skip
    all_of_them = [
        Destination(network=one, ways=(("kilo0", "eth0"),), member=member and one.subnet_of(MESH[0]))
        for one, member in to
    ]

    def dropped(some: list[Destination]) -> set[IPv4Network]:
        return {network for one in destination_obstacles([chain], some, (), MESH) for network in one.networks}  # type: ignore[misc]

    assert dropped(all_of_them) == {network for one in all_of_them for network in dropped([one])}
