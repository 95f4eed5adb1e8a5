"""Networks as ranges: the same answers as from going through all their addresses."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from kilo_etcd.kernel.firewall.chains import (
    BaseChain,
    Condition,
    FilterRule,
    Packet,
    Verdict,
    drops,
    translates,
)
from kilo_etcd.kernel.firewall.destinations import AddressTests, Destination, destination_obstacles
from kilo_etcd.kernel.firewall.ranges import Index, Networks

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


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.lists(networks, max_size=4), max_size=5), st.lists(networks, min_size=1, max_size=4))
def test_an_index_finds_the_sets_that_hold_a_network(several: list[list[IPv4Network]], to: list[IPv4Network]) -> None:
    sets = [Networks.of(some) for some in several]
    index = Index(sets)
    for network in to:
        answers = [one.hold([network], 4) for one in sets]
        assert index.of(network) == (
            frozenset(number for number, answer in enumerate(answers) if answer),
            frozenset(number for number, answer in enumerate(answers) if answer is not False),
        )
    assert index.of(IPv6Network("::/0")) == (frozenset(), frozenset())


VERDICTS: tuple[Verdict, ...] = ("accept", "drop", "return", "jump", "goto", "")
conditions = st.builds(
    lambda side, several, equal: Condition(side, tuple(several), equal),
    st.sampled_from(["saddr", "daddr"]),
    st.lists(networks, max_size=3),
    st.booleans(),
)
either = st.builds(lambda inner, equal: Condition("any", ((inner,),), equal), conditions, st.booleans())
rules = st.lists(
    st.builds(
        lambda tests, verdict, translates: FilterRule(
            conditions=tuple(tests),
            verdict=verdict,
            target="c" if verdict in ("jump", "goto") else "",
            translates=translates,
        ),
        st.lists(conditions | either | st.just(Condition("?")), max_size=3),
        st.sampled_from(VERDICTS),
        st.sampled_from([False, False, True]),
    ),
    max_size=6,
).map(tuple)


@settings(max_examples=examples(400), deadline=None)
@given(rules, rules, st.booleans(), networks)
def test_a_chain_without_the_rules_that_match_nothing_of_a_network_does_the_same(
    base: tuple[FilterRule, ...], inner: tuple[FilterRule, ...], policy: bool, network: IPv4Network
) -> None:
    flat = tuple(one for one in inner if not one.target)  # The kernel lets no chain lead to itself.
    chain = BaseChain(family="ip", table="t", name="f", drops=policy, rules=base, chains={"c": flat})
    tests = AddressTests(chain)
    for side, packet in (
        ("saddr", Packet(4, "kilo0", "eth0", MESH, source=network, new=False)),
        ("daddr", Packet(4, "kilo0", "eth0", MESH, destination=network)),
    ):
        narrowed = tests.narrowed(side, network)
        assert drops(narrowed, packet) is drops(chain, packet)
        assert translates(narrowed, packet) is translates(chain, packet)
