"""What drops packets for single destinations: the networks that nodes offer, and members' mesh addresses. Pure.

A network behind this host may be one of services: a chain translates what is for it, or the host itself takes it. The
chains that come later see other packets then, so that of these nothing is certain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from attrs import evolve, frozen

from kilo_etcd.kernel.firewall.chains import (
    FORWARDED,
    SHOWN,
    UNTESTED,
    BaseChain,
    Obstacle,
    Packet,
    drops,
    translates,
    within,
)
from kilo_etcd.model import IPAddress, IPNetwork
from kilo_etcd.planning.dropped import drops_packets_for

Place = tuple[float, float]
"""As of `BaseChain.place`."""
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
    translated: Place | None = None
    """From where on its packets may have another destination, or are no longer forwarded; None: from nowhere. The
    answers come from another source then, which is translated back at the very end."""


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
        in_mesh = tuple(filter(None, (_overlapping(networks, subnets) for networks in tested)))
        answers: dict[object, tuple[str, ...]] = {}
        groups: dict[tuple[tuple[str, ...], bool], list[IPNetwork]] = {}
        for one in to:
            if (all_dropped and not one.behind) or (one.member and not in_mesh):
                continue
            if one.by_forward and chain.hook != "forward":
                continue
            # Of very many members most are the same to a chain.
            relation = (
                within(networks, (one.network,), one.network.version)
                for networks in (in_mesh if one.member else tested)
            )
            new, answered = one.translated is None or chain.place <= one.translated, one.translated is None
            alike = one.ways, one.network.version, one.member, new, answered, tuple(relation)
            if alike not in answers:
                answers[alike] = tuple(
                    protocol
                    for protocol in ("tcp", "udp")
                    if any(
                        drops(chain, packet)
                        for packet in _packets_to(one, protocol, subnets, new=new, answered=answered)
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


def _addresses_tested(chain: BaseChain) -> tuple[tuple[IPNetwork, ...], ...]:
    """The networks of each test of an address, in the chain and where it leads to."""
    found: dict[tuple[IPNetwork, ...], None] = {}
    waiting = [
        condition for rules in (chain.rules, *chain.chains.values()) for r in rules for condition in r.conditions
    ]
    while waiting:
        condition = waiting.pop()
        if condition.kind in ("saddr", "daddr"):
            found[condition.value if isinstance(condition.value, tuple) else (condition.value,)] = None
        elif condition.kind == "any" and isinstance(condition.value, tuple):
            waiting += [inner for tests in condition.value for inner in tests]
    return tuple(found)


def _overlapping(networks: Iterable[IPNetwork], subnets: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
    """Those of some networks in which there are some addresses of the subnets and not all."""
    return tuple(network for network in networks if within((network,), subnets, network.version) is None)


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


@frozen(kw_only=True)
class OwnAddresses:
    """The addresses of the host itself."""

    everywhere: frozenset[IPAddress] = frozenset()
    for_services: frozenset[IPAddress] = frozenset()
    """Those of loopback and dummy devices: of a network that holds one, others may well be the host's too."""

    def may_be(self, network: IPNetwork) -> bool:
        """Whether packets for a network may be for the host itself."""
        if network.prefixlen == network.max_prefixlen:
            return network.network_address in self.everywhere
        return any(address in network for address in self.for_services)


def translated(
    to: Iterable[Destination], chains: Iterable[BaseChain], own: OwnAddresses, subnets: tuple[IPNetwork, ...]
) -> Iterator[Destination]:
    """The destinations, with the place from where on their packets may be others. `chains`: all that forwarded packets
    pass."""
    translating = sorted(filter(_may_translate, chains), key=lambda chain: chain.place)
    for one in to:
        local = own.may_be(one.network)
        packets = [
            Packet(one.network.version, near, far, subnets, destination=one.network, local=None if local else False)
            for near, far in one.ways
        ]
        places: list[Place] = [
            chain.place for chain in translating if any(translates(chain, packet) for packet in packets)
        ]
        yield evolve(one, translated=min([*places, *([_ROUTING] if local else [])], default=None))


def _may_translate(chain: BaseChain) -> bool:
    return any(rule.translates for rules in (chain.rules, *chain.chains.values()) for rule in rules)
