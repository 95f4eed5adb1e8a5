"""What drops packets for single destinations: the networks that nodes offer, and members' mesh addresses. Pure.

A network behind this host may be one of services: a chain translates what is for it, or the host itself takes it. The
chains that come later see other packets then, so that of these nothing is certain.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from attrs import evolve, field, frozen

from kilo_etcd.kernel.firewall.chains import (
    FORWARDED,
    SHOWN,
    UNTESTED,
    BaseChain,
    Obstacle,
    Packet,
    drops,
    translates,
)
from kilo_etcd.kernel.firewall.ranges import Networks, bounds, edges
from kilo_etcd.model import IPAddress, IPInterface, IPNetwork
from kilo_etcd.planning.dropped import drops_packets_for

Place = tuple[float, float]
"""As of `BaseChain.place`."""
_PROTOCOLS = ("tcp", "udp")
"""Those of which it is told whether they are dropped."""
_ROUTING: Place = (FORWARDED.index("prerouting"), math.inf)
"""The end of hook prerouting."""


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
    """From where on its packets of a protocol may have another destination, or are no longer forwarded; a protocol that
    is not named: from nowhere. The answers come from another source then, which is translated back at the very end."""


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
        tested = _addresses_tested(chain)
        in_mesh = tuple(found for networks in tested if (found := networks.partly_in(subnets)).by_version)
        of_all, of_members = _Relations(tested), _Relations(in_mesh)
        answers: dict[object, tuple[str, ...]] = {}
        groups: dict[tuple[tuple[str, ...], bool], list[IPNetwork]] = {}
        for one in to:
            if (all_dropped and not one.behind) or (one.member and not in_mesh):
                continue
            if one.by_forward and chain.hook != "forward":
                continue
            # Of very many members most are the same to a chain.
            relation = (of_members if one.member else of_all).of(one.network)
            # By protocol, whether new packets are as they were sent, and answers as they were given.
            genuine = tuple(
                (name, place is None or chain.place <= place, place is None)
                for name in _PROTOCOLS
                for place in (one.translated.get(name),)
            )
            alike = one.ways, one.network.version, one.member, genuine, relation
            if alike not in answers:
                answers[alike] = tuple(
                    name
                    for name, new, answered in genuine
                    if any(
                        drops(chain, packet) for packet in _packets_to(one, name, subnets, new=new, answered=answered)
                    )
                )
            if dropped := answers[alike]:
                groups.setdefault((dropped, one.behind), []).append(one.network)
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


def _addresses_tested(chain: BaseChain) -> tuple[Networks, ...]:
    """The networks of each test of an address, in the chain and where it leads to."""
    found: dict[int, Networks] = {}
    waiting = [
        condition for rules in (chain.rules, *chain.chains.values()) for r in rules for condition in r.conditions
    ]
    while waiting:
        condition = waiting.pop()
        if condition.kind in ("saddr", "daddr"):
            found[id(condition)] = condition.networks
        elif condition.kind == "any" and isinstance(condition.value, tuple):
            waiting += [inner for tests in condition.value for inner in tests]
    return tuple(found.values())


class _Relations:
    """How networks lie to those that a chain tests: the same number for all that lie to each in the same way."""

    def __init__(self, tested: tuple[Networks, ...]) -> None:
        self._tested = tested
        self._edges = {version: edges(tested, version) for version in (4, 6)}
        self._by_place: dict[tuple[int, int, int], int] = {}
        self._numbers: dict[tuple[bool | None, ...], int] = {}

    def of(self, network: IPNetwork) -> int:
        """Of those between the same edges it is looked up."""
        version, ends = network.version, self._edges[network.version]
        first, last = bounds(network)
        place = version, bisect_right(ends, first), bisect_right(ends, last)
        if place not in self._by_place:
            relation = tuple(networks.hold((network,), version) for networks in self._tested)
            self._by_place[place] = self._numbers.setdefault(relation, len(self._numbers))
        return self._by_place[place]


def _may_drop(chain: BaseChain) -> bool:
    rules = (chain.rules, *chain.chains.values())
    return chain.drops or any(rule.verdict == "drop" for group in rules for rule in group)


def _packets_to(
    one: Destination, protocol: str, subnets: tuple[IPNetwork, ...], *, new: bool, answered: bool
) -> Iterator[Packet]:
    network = one.network
    for near, far in one.ways:
        if new:
            yield Packet(network.version, near, far, subnets, protocol, destination=network)
        if answered:
            yield Packet(network.version, far, near, subnets, protocol, source=network, new=False)


_SEVERAL = 2


@frozen(kw_only=True)
class OwnAddresses:
    """The addresses of the host itself."""

    everywhere: frozenset[IPAddress] = frozenset()
    for_services: frozenset[IPInterface] = frozenset()
    """Those of loopback and dummy devices, with the networks that these hold."""

    def may_be(self, network: IPNetwork) -> bool:
        """Whether all packets for a network may be for the host itself: a device for services holds it, or several
        addresses of it, so that others may well be the host's too. One alone may be the host's name to routers."""
        version, (first, last) = network.version, bounds(network)
        if self._held.hold((network,), version):
            return True
        if network.prefixlen == network.max_prefixlen:
            return network.network_address in self.everywhere
        numbers = self._numbers[version]
        return bisect_right(numbers, last) - bisect_left(numbers, first) >= _SEVERAL

    @cached_property
    def _services(self) -> tuple[IPInterface, ...]:
        """Without those that every host has."""
        return tuple(one for one in self.for_services if not (one.ip.is_loopback or one.ip.is_link_local))

    @cached_property
    def _held(self) -> Networks:
        return Networks.of(one.network for one in self._services)

    @cached_property
    def _numbers(self) -> dict[int, list[int]]:
        """Their addresses, in order."""
        return {version: sorted({int(one) for one in self._services if one.version == version}) for version in (4, 6)}


def translated(
    to: Iterable[Destination], chains: Iterable[BaseChain], own: OwnAddresses, subnets: tuple[IPNetwork, ...]
) -> Iterator[Destination]:
    """The destinations, with the place from where on their packets may be others. `chains`: all that forwarded packets
    pass."""
    translating = [_Translation(chain) for chain in chains if _may_translate(chain)]
    for one in to:
        local = own.may_be(one.network)
        places: dict[str, list[Place]] = {name: [_ROUTING] if local else [] for name in _PROTOCOLS}
        for each in translating:
            for name in each.of(one, subnets, local=local):
                places[name].append(each.chain.place)
        yield evolve(one, translated={name: min(found) for name, found in places.items() if found})


class _Translation:
    """What a chain translates. Networks that are alike to it are tried once."""

    def __init__(self, chain: BaseChain) -> None:
        self.chain = chain
        self._relations = _Relations(_addresses_tested(chain))
        self._known: dict[object, tuple[str, ...]] = {}

    def of(self, one: Destination, subnets: tuple[IPNetwork, ...], *, local: bool) -> tuple[str, ...]:
        """The protocols of which it may translate packets for a destination. `local`: this may be the host itself."""
        version, at = one.network.version, None if local else False
        alike = one.ways, version, local, self._relations.of(one.network)
        if alike not in self._known:
            self._known[alike] = tuple(
                name
                for name in _PROTOCOLS
                if any(
                    translates(self.chain, Packet(version, near, far, subnets, name, destination=one.network, local=at))
                    for near, far in one.ways
                )
            )
        return self._known[alike]


def _may_translate(chain: BaseChain) -> bool:
    return any(rule.translates for rules in (chain.rules, *chain.chains.values()) for rule in rules)
