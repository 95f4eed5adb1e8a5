"""The chains that forwarded packets pass, whoever made them: what in them drops mesh packets, and the rules of ours
that open those of hook forward.

`kernel.firewall.chains` says what a chain does, `kernel.firewall.hooks` reads nftables', `kernel.firewall.iptables` the
older xtables'. Here they are put together for one host; nothing is read again as long as nftables' ruleset stays as it
is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from operator import is_
from pathlib import Path

from attrs import evolve, frozen

from kilo_etcd.kernel import sysctl
from kilo_etcd.kernel.firewall.chains import (
    UNKNOWN_DEVICE,
    BaseChain,
    Obstacle,
    Packet,
    Refusal,
    drops,
    obstacles,
    packets,
    refusals,
)
from kilo_etcd.kernel.firewall.destinations import Destination, OwnAddresses, destination_obstacles, translated
from kilo_etcd.kernel.firewall.forward import comment_prefix
from kilo_etcd.kernel.firewall.hooks import ours
from kilo_etcd.kernel.firewall.iptables import Iptables
from kilo_etcd.kernel.firewall.netfilter import Netfilter
from kilo_etcd.kernel.firewall.openings import AddOpening, DeleteOpening, Opening, Place
from kilo_etcd.kernel.firewall.packet_filter import table_name
from kilo_etcd.kernel.state import ipip_name
from kilo_etcd.model import IPNetwork, overlap
from kilo_etcd.model.hostplan import HostPlan, Via

LEGACY_SECONDS, LEGACY_DROPPING_SECONDS = 40.0, 15.0
"""How long a reading of the older xtables' chain is believed: with the pauses between two looks at what drops forwarded
packets that makes less than a minute. If something drops, its end is to be seen sooner."""

_MANY_ADDRESSES, _ADDRESSES_SECONDS = 1000, 40.0
"""How long the host's own addresses are believed if there are more than so many: services may have very many. Else they
are read each time."""
_ATTEMPTS = 3
"""Readings of both at most, while somebody goes on changing them; the next call reads them again."""


@frozen(kw_only=True)
class _Found:
    """What was found for single destinations, and for which plan, devices and chains."""

    plan: HostPlan
    devices: tuple[str, ...]
    ways: Mapping[IPNetwork, str]
    """The devices by which networks behind the host are reached."""
    chains: tuple[BaseChain, ...]
    untranslated: tuple[Obstacle, ...]
    """If no packet had its destination translated."""
    translating: tuple[BaseChain, ...] = ()
    own: OwnAddresses | None = None
    obstacles: tuple[Obstacle, ...]


class ForwardChains:
    """Of one network namespace. Blocking. `record`: a file that says that there may be rules of ours, so that hosts
    that never had any are not searched for them; `opening`: whether chains that drop are to be opened; `own`: reads the
    host's addresses; `routed`: the devices to which its routes lead what is for some networks."""

    def __init__(
        self, interface: str, record: Path, netfilter: Netfilter, iptables: Iptables, *, opening: bool,
        own: Callable[[], OwnAddresses] = OwnAddresses,
        routed: Callable[[Collection[IPNetwork]], Mapping[IPNetwork, str]] = lambda networks: {},
    ) -> None:  # fmt: skip
        self._interface = interface
        self._record = record
        self._netfilter = netfilter
        self._iptables = iptables
        self._opening = opening
        self._read_own = own
        self._routed = routed
        self._last_own: tuple[float, OwnAddresses] | None = None
        self._legacy_drops = False
        """Whether a chain of the older xtables dropped mesh traffic when it was last looked at."""
        self._by_destination: _Found | None = None
        """What was found for single destinations, of which there may be many."""

    def obstacles(self, plan: HostPlan | None, devices: Collection[str]) -> tuple[Obstacle, ...]:
        """What drops mesh traffic between the tunnel and `devices`, or on its way to and from a member or an offered
        network, or may do so. OSError."""
        versions = plan.forwarding if plan is not None and plan.forwarding else frozenset({4, 6})
        patience = LEGACY_DROPPING_SECONDS if self._legacy_drops else LEGACY_SECONDS
        read = (self._iptables.legacy(version, patience=patience) for version in sorted(versions))
        legacy_chains = tuple(chain for chain in read if chain is not None)
        sent = self._sent(versions, plan, devices)
        legacy = obstacles(legacy_chains, sent, self._interface, opening=self._opening)
        # What drops and what translates are two readings: of one ruleset, if it has not changed meanwhile.
        for _ in range(_ATTEMPTS):
            passed = self._passed_chains()
            at_destinations = self._at_destinations(plan, tuple(devices), (*passed, *legacy_chains), sent)
            if _same(passed, self._passed_chains()):
                break
        # If it reaches no others of its location, packets come in and go out by a device of the internet's, on which
        # all hosts may well drop private addresses. What is behind it has devices of its own.
        near = plan is not None and _reaches_members(plan)
        chains = tuple(chain for chain in passed if near or chain.hook == "forward")
        self._legacy_drops = bool(legacy)
        off = sysctl.not_forwarding([self._interface, *devices]) if 4 in versions else ()
        blocked = frozenset({4} if self._interface in off or set(devices) <= set(off) else ())
        return (
            *obstacles(chains, sent, self._interface, opening=self._opening),
            *legacy,
            *at_destinations,
            *(
                Obstacle(
                    f"net.ipv4.conf.{name}.forwarding is 0, so what comes in by {name} is not forwarded: "
                    f"sysctl -w {sysctl.command(name)}=1, and look for what switches it off in /etc/sysctl.d",
                    blocked=blocked,
                )
                for name in off
            ),
        )  # fmt: skip

    def _passed_chains(self) -> tuple[BaseChain, ...]:
        """Those that the packets pass which this host forwards; of our own table that of hook forward."""
        own = "inet", table_name(self._interface)
        return tuple(
            chain
            for chain in self._netfilter.passed_chains()
            if chain.hook == "forward" or (chain.family, chain.table) != own
        )

    def _at_destinations(
        self, plan: HostPlan | None, devices: tuple[str, ...], chains: tuple[BaseChain, ...], sent: tuple[Packet, ...]
    ) -> tuple[Obstacle, ...]:
        if plan is None:
            return ()
        last, subnets, own = self._by_destination, _subnets(plan), self._own() if plan.behind else None
        ways = {} if own is None else self._ways(plan.behind, own)
        if (
            last is None
            or last.plan is not plan
            or (last.devices, last.ways) != (devices, ways)
            or not _same(last.chains, chains)
        ):
            every = destinations(plan, self._interface, devices, ways)
            obstacles = destination_obstacles(chains, every, sent, subnets)
            last = self._by_destination = _Found(
                plan=plan, devices=devices, ways=ways, chains=chains, untranslated=obstacles, obstacles=obstacles
            )
        if not last.untranslated:
            return ()
        translating, own = self._translating(), own or self._own()
        if not _same(last.translating, translating) or last.own != own:
            named = {network for obstacle in last.untranslated for network in obstacle.networks}
            every = destinations(plan, self._interface, devices, ways)
            to = (destination for destination in every if destination.network in named)
            obstacles = destination_obstacles(chains, translated(to, translating, own, subnets), sent, subnets)
            last = self._by_destination = evolve(last, translating=translating, own=own, obstacles=obstacles)
        return last.obstacles

    def _ways(self, networks: Collection[IPNetwork], own: OwnAddresses) -> dict[IPNetwork, str]:
        """The devices by which networks are reached: those of links, unless a narrower route leads elsewhere."""
        on_links = {network: own.device_to(network) for network in networks}
        known = [network for network, device in on_links.items() if device != UNKNOWN_DEVICE]
        routed = self._routed(known) if known else {}
        return {
            network: device if device == routed.get(network) else UNKNOWN_DEVICE for network, device in on_links.items()
        }

    def _own(self) -> OwnAddresses:
        last, now = self._last_own, time.monotonic()
        if last is None or len(last[1].everywhere) <= _MANY_ADDRESSES or now - last[0] > _ADDRESSES_SECONDS:
            last = self._last_own = now, self._read_own()
        return last[1]

    def _translating(self) -> tuple[BaseChain, ...]:
        """The chains that may translate the destinations of forwarded packets. All that packets pass are among them: a
        rule may write a header anywhere."""
        read = (self._iptables.legacy_translation(version, patience=LEGACY_DROPPING_SECONDS) for version in (4, 6))
        legacy = tuple(chain for chain in read if chain is not None)
        translating = self._netfilter.translating_chains()
        known = {(chain.family, chain.table, chain.name) for chain in translating}
        passed = self._netfilter.passed_chains()
        others = tuple(chain for chain in passed if (chain.family, chain.table, chain.name) not in known)
        return (*others, *translating, *legacy)

    def refusals(self, plan: HostPlan, devices: Collection[str]) -> tuple[Refusal, ...]:
        """What drops all of TCP or UDP that this host itself exchanges with the mesh. `devices`: those by which it
        reaches its location's network. OSError."""
        ways = {route.via for route in plan.routes.values()}
        used = {self._interface} if Via.TUNNEL in ways or plan.forwarding else set()
        used |= {ipip_name(self._interface)} if plan.ipip_remotes else set()
        used |= set(devices) if Via.UNDERLAY in ways else set()
        versions = {address.version for address in plan.addresses}
        own = table_name(self._interface)
        chains = (chain for chain in self._netfilter.host_chains() if (chain.family, chain.table) != ("inet", own))
        return refusals(chains, used, versions, _subnets(plan))

    def _sent(self, versions: Collection[int], plan: HostPlan | None, devices: Collection[str]) -> tuple[Packet, ...]:
        """The packets that this host forwards, as its firewall sees them."""
        return packets(self._interface, devices or ("any other device",), versions, _subnets(plan))

    def read(self, devices: Collection[str]) -> tuple[frozenset[Place], frozenset[Opening]]:
        """Which nftables chains of others drop what is forwarded, but for rules of ours, and those rules; nothing if
        nobody wants any and none were made. OSError."""
        if not self._opening and not self._record.exists():
            return frozenset(), frozenset()
        own, chains = comment_prefix(self._interface), self._netfilter.forward_chains()
        openings = ours(chains, own)
        if not self._opening:
            if not openings:
                self._record.unlink(missing_ok=True)
            return frozenset(), openings
        sent = self._sent((4, 6), None, devices)
        return frozenset(
            (chain.family, chain.table, chain.name)
            for chain in chains
            if not chain.iptables and any(drops(chain, packet, without=own) is not False for packet in sent)
        ), openings

    def edit(self, change: AddOpening | DeleteOpening) -> None:
        """OSError if the chain's table is gone, or is not ours to change."""
        with suppress(OSError):
            self._record.parent.mkdir(parents=True, exist_ok=True)
            self._record.touch()
        self._netfilter.edit(change)


def _reaches_members(plan: HostPlan) -> bool:
    return any(route.via is not Via.TUNNEL for route in plan.routes.values())


def destinations(
    plan: HostPlan, interface: str, devices: Collection[str], ways: Mapping[IPNetwork, str]
) -> Iterator[Destination]:  # fmt: skip
    """The members and the offered networks to which a host forwards packets of the mesh, or would if it led. `devices`:
    those by which it reaches its location's network; `ways`: that by which it reaches each network behind it."""
    subnets = _subnets(plan)
    reaches = _reaches_members(plan)
    near = tuple(devices) if reaches else ()
    leads = any(route.via is Via.TUNNEL and route.destination in subnets for route in plan.routes.values())
    for network in plan.behind:
        incoming = (*((interface,) if leads else ()), *near)
        yield Destination(network=network, ways=tuple((name, ways[network]) for name in incoming), behind=True)
    outward = tuple((interface, name) for name in devices)
    for network in plan.masquerade:
        yield Destination(network=network, ways=outward, by_forward=not reaches)
    for network, route in plan.routes.items():
        if network in subnets or network.prefixlen == 0 or any(overlap(network, other) for other in plan.masquerade):
            continue
        if route.via is not Via.TUNNEL:
            member = any(overlap(network, subnet) for subnet in subnets)
            yield Destination(network=network, ways=outward, member=member, by_forward=not reaches)
        # An address alone may be one of very many internal IPs.
        elif network.prefixlen < network.max_prefixlen and near:
            yield Destination(network=network, ways=tuple((name, interface) for name in near))


def _same(one: tuple[BaseChain, ...], other: tuple[BaseChain, ...]) -> bool:
    """Whether they are of one reading: equal chains may lead to others that differ."""
    return len(one) == len(other) and all(map(is_, one, other))


def _subnets(plan: HostPlan | None) -> tuple[IPNetwork, ...]:
    """The mesh's subnets. A plan refuses other networks too, of members that never answered, from which nothing comes
    and to which nothing goes."""
    if plan is None:
        return ()
    own = [address.ip for address in plan.addresses]
    return tuple(
        network
        for network in plan.unreachable_routes
        if network not in plan.refused or any(address in network for address in own)
    )
