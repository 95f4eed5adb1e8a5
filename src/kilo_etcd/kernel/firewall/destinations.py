"""What drops packets for single destinations: the networks that nodes offer, and members' mesh addresses. Pure.

A network behind this host may be one of services: a chain translates what is for it, or the host itself takes it. The
chains that come later see packets for other addresses then, which are not known: only what they drop whatever the
address is certain. What the host takes they do not see.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property, partial
from ipaddress import IPv4Network, IPv6Network
from operator import itemgetter
from typing import Literal

from attrs import evolve, field, frozen

from kilo_etcd.kernel.firewall.chains import (
    FORWARDED,
    SHOWN,
    UNKNOWN_DEVICE,
    UNTESTED,
    BaseChain,
    FilterRule,
    Obstacle,
    Packet,
    drops,
    translates,
)
from kilo_etcd.kernel.firewall.ranges import Index, Networks, bounds
from kilo_etcd.model import IPAddress, IPInterface, IPNetwork, overlap
from kilo_etcd.planning.dropped import drops_packets_for

Place = tuple[float, float]
"""As of `BaseChain.place`."""
_PROTOCOLS = ("tcp", "udp")
"""Those of which it is told whether they are dropped."""
_ROUTING: Place = (FORWARDED.index("prerouting"), math.inf)
"""The end of hook prerouting."""
_KUBE_PROXY = "kube-proxy"
"""The nftables tables of Kubernetes. They drop and reject what is for services and is translated to none: of a family
or a protocol there may be none at all."""
_ANYWHERE: dict[int, IPNetwork] = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}
"""IP version -> where a packet may be for whose address is not known."""


@frozen(kw_only=True)
class Destination:
    """A network that packets of the mesh go to through this host: an offered one, or a member's mesh address."""

    network: IPNetwork
    ways: tuple[tuple[str, str], ...]
    """Devices by which these packets come in and go out."""
    behind: bool = False
    """It is behind this host itself, which forwards to it whether it leads or not."""
    member: bool = False
    by_forward: bool = False
    """Only chains of hook forward count."""
    translated: Mapping[str, Place] = field(factory=dict)
    """From where on its packets of a protocol may have another destination; a protocol that is not named: from nowhere.
    The answers come from another source then, which is translated back at the very end."""
    services: bool = False
    """It may be a network of services, or the address of one."""
    taken: frozenset[str] = frozenset()
    """Protocols of which the host itself may take its packets, so that they are not forwarded."""


def destination_obstacles(
    chains: Iterable[BaseChain], to: Iterable[Destination], sent: Iterable[Packet], subnets: tuple[IPNetwork, ...]
) -> tuple[Obstacle, ...]:
    """What for certain drops all TCP or UDP packets to some destinations, or all of the answers: sentences for each
    chain. A firewall may well let some ports through and no others. If a chain drops `sent` too, only networks behind
    this host are named."""
    to, sent = tuple(to), tuple(sent)
    result: list[Obstacle] = []
    for chain in chains:
        if not _may_drop(chain):
            continue
        all_dropped = any(packet.protocol in UNTESTED and drops(chain, packet) for packet in sent)
        tests = AddressTests(chain)
        in_mesh = [some for networks in tests.networks if (some := networks.partly_in(subnets)).by_version]
        of_members = Index(in_mesh)
        answers: dict[object, tuple[str, ...]] = {}
        ends_services = chain.table == _KUBE_PROXY
        dropped_anywhere = cache(partial(drops, chain))
        groups: dict[tuple[tuple[str, ...], bool], list[IPNetwork]] = {}
        for destination in to:
            if (all_dropped and not destination.behind) or (destination.member and not in_mesh):
                continue
            if (destination.by_forward and chain.hook != "forward") or (destination.services and ends_services):
                continue
            # Of very many members most are the same to a chain.
            relation = (of_members if destination.member else tests.index).of(destination.network)
            # By protocol, as what new packets come here, and answers.
            states = tuple((name, *_states(destination, name, chain)) for name in _PROTOCOLS)
            alike = destination.ways, destination.network.version, destination.member, states, relation
            if alike not in answers:
                back, there = (tests.narrowed(side, destination.network) for side in ("saddr", "daddr"))
                answers[alike] = tuple(
                    name
                    for name, new, answered in states
                    if any(
                        dropped_anywhere(packet) if packet.translated else drops(there if packet.new else back, packet)
                        for packet in _packets_to(destination, name, subnets, new=new, answered=answered)
                    )
                )
            if dropped := answers[alike]:
                groups.setdefault((dropped, destination.behind), []).append(destination.network)
        for (protocols, behind), networks in groups.items():
            kind = "" if len(protocols) == 2 else f"{SHOWN[protocols[0]]} "
            result.append(
                Obstacle(
                    f"{drops_packets_for(networks, kind)}, in {chain}: let through what is for them there, and the "
                    "answers",
                    certain=len(protocols) == 2,
                    blocked=frozenset(),
                    networks=tuple(sorted(networks, key=str)),
                    leading=not behind,
                    chain=str(chain),
                )
            )
    return tuple(result)


class AddressTests:
    """The tests of addresses in a chain and where it leads to. Networks to which it is the same are found by an index,
    and so are the rules that may match packets for one of very many."""

    def __init__(self, chain: BaseChain) -> None:
        self._chain = chain
        self._groups = {**chain.chains, chain.name: chain.rules}
        self._numbers: dict[object, int] = {}
        self.networks = tuple(self._all_tested())
        self.index = Index(self.networks)
        self._by_side = {side: self._by_test(side) for side in ("saddr", "daddr")}

    def _all_tested(self) -> Iterator[Networks]:
        waiting = [condition for rules in self._groups.values() for rule in rules for condition in rule.conditions]
        while waiting:
            condition = waiting.pop()
            if condition.kind in ("saddr", "daddr"):
                if condition.networks.key not in self._numbers:
                    self._numbers[condition.networks.key] = len(self._numbers)
                    yield condition.networks
            elif condition.kind == "any" and isinstance(condition.value, tuple):
                waiting += [inner for tests in condition.value for inner in tests]

    def _by_test(self, side: str) -> _BySide:
        always: dict[str, list[_Placed]] = {name: [] for name in self._groups}
        by_test: dict[int, list[tuple[str, _Placed]]] = {}
        for name, rules in self._groups.items():
            for placed in enumerate(rules):
                tests = (condition for condition in placed[1].conditions if condition.kind == side and condition.equal)
                if (test := next(tests, None)) is None:
                    always[name].append(placed)
                else:
                    by_test.setdefault(self._numbers[test.networks.key], []).append((name, placed))
        return always, {name: _rules_of(some) for name, some in always.items()}, by_test

    def narrowed(self, side: str, network: IPNetwork) -> BaseChain:
        """The chain without rules that match no packet whose `saddr` or `daddr` is in a network."""
        always, rules, by_test = self._by_side[side]
        further: dict[str, list[_Placed]] = {}
        for number in self.index.of(network)[1] & by_test.keys():
            for name, placed in by_test[number]:
                further.setdefault(name, []).append(placed)
        chains = rules | {name: _rules_of([*always[name], *some]) for name, some in further.items()}
        return evolve(self._chain, rules=chains[self._chain.name], chains=chains)


_Placed = tuple[int, FilterRule]
_BySide = tuple[
    dict[str, list[_Placed]], dict[str, tuple[FilterRule, ...]], dict[int, list[tuple[str, _Placed]]]
]  # fmt: skip
"""Of each chain the rules that test no address of a side, with their places and without; and those that do, by the
number of the test."""


def _rules_of(some: list[_Placed]) -> tuple[FilterRule, ...]:
    return tuple(rule for _, rule in sorted(some, key=itemgetter(0)))


def _may_drop(chain: BaseChain) -> bool:
    rules = (chain.rules, *chain.chains.values())
    return chain.drops or any(rule.verdict == "drop" for group in rules for rule in group)


_State = Literal["as sent", "translated", "gone"]


def _states(to: Destination, protocol: str, chain: BaseChain) -> tuple[_State, _State]:
    """As what new packets to a destination come to a chain, and the answers. Which of two chains at one place the
    kernel passes first is not known; a chain that translates sees packets as they were sent."""
    taken, translated_from = protocol in to.taken, to.translated.get(protocol)
    answered: _State = "gone" if taken else "as sent" if translated_from is None else "translated"
    if taken and chain.place > _ROUTING:
        return "gone", answered
    before = translated_from is None or chain.place < translated_from
    return "as sent" if before or (chain.place == translated_from and _may_translate(chain)) else "translated", answered


def _packets_to(
    to: Destination, protocol: str, subnets: tuple[IPNetwork, ...], *, new: _State, answered: _State
) -> Iterator[Packet]:
    version = to.network.version
    for near, far in to.ways:
        for state, is_new in ((new, True), (answered, False)):
            if state == "gone":
                continue
            translated = state == "translated"
            # What the host itself takes comes to it by the chains before routing.
            local = None if translated or protocol in to.taken else False
            network = _ANYWHERE[version] if translated else to.network
            source, destination = (None, network) if is_new else (network, None)
            other = UNKNOWN_DEVICE if translated else far
            devices = (near, other) if is_new else (other, near)
            yield Packet(version, *devices, subnets, protocol, source, destination, is_new, local, translated)


@frozen(kw_only=True)
class OwnAddresses:
    """The addresses of the host itself."""

    everywhere: frozenset[IPAddress] = frozenset()
    for_services: frozenset[IPInterface] = frozenset()
    """Those of loopback and dummy devices, with the networks that these hold."""
    balanced: frozenset[IPAddress] = frozenset()
    """Those at which the kernel balances services (IPVS)."""
    links: Mapping[IPNetwork, frozenset[str]] = field(factory=dict)
    """The networks of other devices, behind which there is a link, and these devices."""

    def device_to(self, network: IPNetwork) -> str:
        """The device by which packets for a network go out, if it is on one link; else it is not known."""
        holding = (link for link in self.links if link.prefixlen <= network.prefixlen and overlap(link, network))
        names = frozenset[str]().union(*(self.links[link] for link in holding))
        return next(iter(names)) if len(names) == 1 else UNKNOWN_DEVICE

    def on_link(self, network: IPNetwork) -> bool:
        """Whether a network is that of a link of this host, or holds one: of hosts, and none of services. A part of a
        link's network may be set apart for services, as load balancers do."""
        version, whole = network.version, bounds(network)
        return any(link.version == version and _within(bounds(link), whole) for link in self.links)

    def may_be(self, network: IPNetwork) -> bool:
        """Whether all packets for a network may be for the host itself: a device for services holds it, or an address
        of it at which the kernel balances a service, so that the network is one of services. Of a link's network
        only that address is one. Any other address there may be the host's name to routers, or one that several hosts
        have; the rest of the network is elsewhere then."""
        version, (first, last) = network.version, bounds(network)
        if self._held.hold((network,), version):
            return True
        if network.prefixlen == network.max_prefixlen:
            return network.network_address in self.everywhere
        if self.on_link(network):
            return False
        numbers = self._numbers[version]
        return bisect_left(numbers, first) < bisect_right(numbers, last)

    @cached_property
    def _services(self) -> tuple[IPInterface, ...]:
        """Without those that every host has."""
        return tuple(held for held in self.for_services if not (held.ip.is_loopback or held.ip.is_link_local))

    @cached_property
    def _held(self) -> Networks:
        return Networks.of(address.network for address in self._services)

    @cached_property
    def _numbers(self) -> dict[int, list[int]]:
        """The addresses for services that are balanced, in order."""
        services = {address.ip for address in self._services} & self.balanced
        return {version: sorted(int(ip) for ip in services if ip.version == version) for version in (4, 6)}


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def translated(
    to: Iterable[Destination], chains: Iterable[BaseChain], own: OwnAddresses, subnets: tuple[IPNetwork, ...]
) -> Iterator[Destination]:
    """The destinations, with the place from where on their packets may be others. `chains`: all that forwarded packets
    pass. What may be translated of packets for members, or for hosts on a link, is a matter of single ports or
    addresses, so that there only what translates all of them counts."""
    translating = [_Translation(chain) for chain in chains if _may_translate(chain)]
    for destination in to:
        hosts = destination.member or own.on_link(destination.network)
        local = not destination.member and own.may_be(destination.network)
        service = not hosts and destination.network.prefixlen == destination.network.max_prefixlen
        places: dict[str, list[Place]] = {name: [] for name in _PROTOCOLS}
        taken = set(_PROTOCOLS if local else ())
        for each in translating:
            for name, takes in each.of(destination, subnets, local=local, all_of_it=hosts):
                places[name].append(each.chain.place)
                # The one host of a service may be this one.
                to_itself = takes or (service and each.chain.place <= _ROUTING)
                taken |= {name} if to_itself else set()
        first = {name: min(several) for name, several in places.items() if several}
        yield evolve(destination, translated=first, taken=frozenset(taken), services=not hosts)


class _Translation:
    """What a chain translates. Networks that are alike to it are tried once."""

    def __init__(self, chain: BaseChain) -> None:
        self.chain = chain
        self._tests = AddressTests(chain)
        self._takes = any(rule.takes for rules in (chain.rules, *chain.chains.values()) for rule in rules)
        self._known: dict[object, dict[str, tuple[set[bool | None], bool]]] = {}

    def of(
        self, to: Destination, subnets: tuple[IPNetwork, ...], *, local: bool, all_of_it: bool
    ) -> Iterator[tuple[str, bool]]:  # fmt: skip
        """The protocols of which it translates packets for a destination, `all_of_it` or some, and whether it may give
        some to the host itself. `local`: the destination may be the host itself."""
        version, at = to.network.version, None if local else False
        alike = to.ways, version, local, self._tests.index.of(to.network)
        if alike not in self._known:
            narrowed = self._tests.narrowed("daddr", to.network)
            taking = _taking_alone(narrowed) if self._takes else None
            self._known[alike] = {}
            for name in _PROTOCOLS:
                packets = [
                    Packet(version, near, far, subnets, name, destination=to.network, local=at) for near, far in to.ways
                ]
                takes = taking is not None and any(translates(taking, packet) is not False for packet in packets)
                self._known[alike][name] = {translates(narrowed, packet) for packet in packets}, takes
        for name, (answers, takes) in self._known[alike].items():
            if True in answers or (None in answers and not all_of_it):
                yield name, takes


def _taking_alone(chain: BaseChain) -> BaseChain:
    """A chain whose other rules translate nothing."""

    def alone(rules: tuple[FilterRule, ...]) -> tuple[FilterRule, ...]:
        return tuple(rule if rule.translates == rule.takes else evolve(rule, translates=rule.takes) for rule in rules)

    return evolve(chain, rules=alone(chain.rules), chains={name: alone(rules) for name, rules in chain.chains.items()})


def _may_translate(chain: BaseChain) -> bool:
    return any(rule.translates for rules in (chain.rules, *chain.chains.values()) for rule in rules)
