"""The packet filter's part of `encrypted`: chains and sets of our nftables table. Pure.

* `encrypted`, in prerouting before connections are tracked, refuses packets in clear from nodes that use their tunnel.
  By the tunnel, from this host itself and from all others everything passes. From such a node pass WireGuard's port,
  what is always left outside (`kernel.routing.encrypted`), ICMP's errors, neighbour discovery, DHCP, and fragments
  whose protocol cannot be told; the first fragment decides about them. What etcd and exempted servers answer passes
  only if it opens no connection (SYN without ACK): else whoever takes etcd's address could open any port from etcd's.
* The same chain goes on with the strict reverse-path check of devices that were made loose, for all but nodes.
* `outgoing` gives what is forwarded to nodes (from containers) this host's own address, before docker's masquerade
  does: connections keep it when the way to a node changes from clear to the tunnel. What comes from addresses that the
  mesh knows keeps its source.

Multicast and broadcast from nodes are refused like the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache

from attrs import frozen

from kilo_etcd.kernel.firewall import nftables as nft
from kilo_etcd.kernel.firewall.table import AddressSet, Chain, Expression, FirewallTable, Rule
from kilo_etcd.kernel.netlink.formats import NF_PRIORITIES
from kilo_etcd.kernel.routing.encrypted import protocol_of
from kilo_etcd.model import IPAddress, IPNetwork
from kilo_etcd.model.hostplan import Encryption, Exemption, HostPlan

COUNTERS = ("clear_refused", "outgoing", "spoofed")
_FILTER, _NAT = "encrypted", "outgoing"
_SYN, _ACK = 0x02, 0x10
"""Flags of TCP (RFC 9293)."""
_FAMILY = {4: "ip", 6: "ip6"}
_ERRORS = {4: ((3, 3), (11, 12)), 6: ((1, 4), (130, 136), (143, 143))}
"""Types of ICMP from and to: errors; in IPv6 also listener discovery, router and neighbour discovery, but no redirects
(RFC 792, 4443, 4861, 2710, 3810)."""
_DHCP = ((67, 68), (68, 67), (67, 67), (547, 546), (546, 547))
_Match = tuple[tuple[Expression, ...], str]
"""Expressions, and the same as nft says it."""
_OPENS_NOTHING: _Match = nft.match_tcp_flags(_SYN | _ACK, _SYN, equal=False), "tcp flags & (syn | ack) != syn"


@frozen
class Parts:
    """Of a table."""

    chains: Sequence[Chain] = ()
    sets: Sequence[AddressSet] = ()
    rules: Sequence[Rule] = ()


def refused_sources(table: FirewallTable | None) -> frozenset[IPAddress]:
    """The addresses whose packets in clear a kernel refuses that has this table of ours."""
    sets = () if table is None else table.sets
    return frozenset(
        address
        for address_set in sets
        if address_set.name in ("refuse4", "refuse6")
        for address in address_set.addresses
    )


def parts(plan: HostPlan, interface: str, ipip: str, strict: Collection[str], forwarding: Collection[int]) -> Parts:
    """The chains, sets and rules that a plan asks for. `strict`: devices that were made loose and are to go on with the
    check; `forwarding`: the families that the host forwards."""
    encryption = plan.encryption
    if encryption is None:
        return Parts()
    devices = (interface, ipip) if plan.ipip_remotes else (interface,)
    chains = [Chain(name=_FILTER, kind="filter", hook="prerouting", priority=NF_PRIORITIES["raw"])]
    sets = [
        AddressSet(name=f"{name}{v}", version=v, addresses=_within(_Same(addresses), v))
        for name, addresses in (("others", encryption.nodes), ("refuse", encryption.refuse))
        for v in (4, 6)
    ]
    rules = list(_refusal(plan, encryption, devices, strict))
    versions = [v for v in (4, 6) if v in forwarding and any(own.version == v for own in encryption.sources)]
    if versions:
        chains.append(Chain(name=_NAT, kind="nat", hook="postrouting", priority=NF_PRIORITIES["srcnat"] - 1))
        for version in versions:
            hosts = (
                network.network_address
                for network in encryption.accepted_sources
                if network.prefixlen == network.max_prefixlen
            )
            sources = (*encryption.sources, *hosts)
            sets.append(AddressSet(name=f"known{version}", version=version, addresses=_of(sources, version)))
        rules += _outgoing(encryption, devices, versions)
    return Parts(chains, sets, rules)


class _Same:
    """Equal to one of the same object. There may be 10,000 addresses, which are not looked at for that."""

    def __init__(self, addresses: Collection[IPAddress]) -> None:
        self.addresses = addresses

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.addresses is other.addresses

    def __hash__(self) -> int:
        return id(self.addresses)


@lru_cache(8)
def _within(same: _Same, version: int) -> frozenset[IPAddress]:
    return _of(same.addresses, version)


def _of(addresses: Collection[IPAddress], version: int) -> frozenset[IPAddress]:
    return frozenset(address for address in addresses if address.version == version)


def _rule(chain: str, *matches: _Match, then: _Match) -> Rule:
    all_matches = (*matches, then)
    return Rule(
        chain=chain,
        expressions=tuple(expression for expressions, _ in all_matches for expression in expressions),
        text=" ".join(text for _, text in all_matches),
    )


_ACCEPT: _Match = ((nft.ACCEPT,), "accept")
_RETURN: _Match = ((nft.RETURN,), "return")


def _dropped(counter: str) -> _Match:
    return (*nft.count(counter), nft.DROP), f"counter name {counter} drop"


def _in_set(name: str, version: int, side: str, *, within: bool = True) -> _Match:
    text = f"{_FAMILY[version]} {side} {'' if within else '!= '}@{name}{version}"
    return nft.match_set(f"{name}{version}", version, side, within=within), text


def _by(direction: str, device: str) -> _Match:
    return nft.match_interface(direction, device), f'{direction} "{device}"'


def _port(protocol: int, side: str, port: int) -> _Match:
    return (*nft.match_protocol(protocol), *nft.match_port(side, port)), f"{_NAMES[protocol]} {side} {port}"


_NAMES = {6: "tcp", 17: "udp"}


def _refusal(
    plan: HostPlan, encryption: Encryption, devices: Collection[str], strict: Collection[str]
) -> Iterator[Rule]:
    for device in ("lo", *devices):
        yield _rule(_FILTER, _by("iifname", device), then=_ACCEPT)
    some_source: _Match = (nft.match_some_source(), "ip saddr != 0.0.0.0")
    other_way: _Match = (nft.match_other_way_back(), "fib saddr . iif oif missing")
    for device in sorted(strict):
        no_node = _in_set("others", 4, "saddr", within=False)
        yield _rule(_FILTER, _by("iifname", device), no_node, some_source, other_way, then=_dropped("spoofed"))
    # All that the tunnels carry comes this way, and to compare an address costs less than to look up a route.
    for own in encryption.sources:
        to_own = (nft.match_address(own, "daddr"), f"{_FAMILY[own.version]} daddr {own}")
        yield _rule(_FILTER, _port(17, "dport", plan.listen_port), to_own, then=_ACCEPT)
    for version in (4, 6):
        yield _rule(_FILTER, _in_set("refuse", version, "saddr", within=False), then=_ACCEPT)
    to_us: _Match = (nft.match_to_us(), "fib daddr type local")
    for port in (plan.listen_port, *encryption.talk):
        yield _rule(_FILTER, _port(17, "dport", port), to_us, then=_ACCEPT)
    for port in encryption.etcd_here:
        yield _rule(_FILTER, _port(6, "dport", port), to_us, then=_ACCEPT)
    for address, port in encryption.etcd:
        source = (nft.match_address(address, "saddr"), f"{_FAMILY[address.version]} saddr {address}")
        yield _rule(_FILTER, source, _port(6, "sport", port), _OPENS_NOTHING, then=_ACCEPT)
    for version, ranges in _ERRORS.items():
        for first, last in ranges:
            types = f"{first}" if first == last else f"{first}-{last}"
            icmp_types: _Match = (
                nft.match_icmp(version, first, last),
                f"{'icmp' if version == 4 else 'icmpv6'} type {types}",
            )
            yield _rule(_FILTER, icmp_types, then=_ACCEPT)
    for sport, dport in _DHCP:
        ports: _Match = (
            (*nft.match_protocol(17), *nft.match_ports(sport, dport)),
            f"udp sport {sport} udp dport {dport}",
        )
        yield _rule(_FILTER, ports, then=_ACCEPT)
    for exemption in encryption.clear:
        yield from _exempted(exemption)
    yield _rule(_FILTER, (nft.match_later_fragment(4), "ip frag-off & 0x1fff != 0"), then=_ACCEPT)
    yield _rule(_FILTER, (nft.match_later_fragment(6), "frag frag-off != 0"), then=_ACCEPT)
    yield _rule(_FILTER, then=_dropped("clear_refused"))


def _network(network: IPNetwork, side: str) -> _Match:
    if not network.prefixlen:
        return nft.match_family(network.version), f"meta nfproto ipv{network.version}"
    return nft.match_network(network, side), f"{_FAMILY[network.version]} {side} {network}"


def _exempted(exemption: Exemption) -> Iterator[Rule]:
    source, protocol = _network(exemption.network, "saddr"), protocol_of(exemption)
    if exemption.port is None:
        whole_protocol: _Match = (nft.match_protocol(protocol), f"meta l4proto {protocol}")
        yield _rule(_FILTER, source, whole_protocol, then=_ACCEPT)
        return
    yield _rule(_FILTER, source, _port(protocol, "dport", exemption.port), then=_ACCEPT)
    if exemption.protocol == "tcp":
        yield _rule(_FILTER, source, _port(protocol, "sport", exemption.port), _OPENS_NOTHING, then=_ACCEPT)
    else:
        yield _rule(_FILTER, source, _port(protocol, "sport", exemption.port), then=_ACCEPT)


def _outgoing(encryption: Encryption, devices: Collection[str], versions: Collection[int]) -> Iterator[Rule]:
    for device in devices:
        yield _rule(_NAT, _by("iifname", device), then=_RETURN)
    for version in versions:
        own = next(address for address in encryption.sources if address.version == version)
        to_node = _in_set("others", version, "daddr")
        yield _rule(_NAT, to_node, _in_set("known", version, "saddr"), then=_RETURN)
        for network in encryption.accepted_sources:
            if network.version == version and network.prefixlen < network.max_prefixlen:
                yield _rule(_NAT, to_node, _network(network, "saddr"), then=_RETURN)
        nat: _Match = (
            (*nft.count("outgoing"), *nft.source_nat(own)),
            f"counter name outgoing snat {_FAMILY[version]} to {own}",
        )
        yield _rule(_NAT, to_node, then=nat)
