"""What `encrypted` asks of routing, as values: a table, the rules that lead there, and reverse-path checks. Pure.

The table T has one route for each address of another segment's node: into the tunnel, or to the segment's leader. Each
has a last resort next to it, for the time when the first one is missing (the device is gone): in IPv6 `unreachable`, in
IPv4 a route to `lo`, where the packet ends. IPv4 has none that refuses: a look-up that fails makes even a loose
rp_filter drop what comes in from there, ARP and etcd's answers among it. What T does not know the main table decides.

The rules, before those of an exit node (`kernel.routing.exit_node`) and behind an operator's own below 10600:

1. to the main table, in clear, always: etcd by its addresses and ports; on etcd's host the answers of its ports, a
   container's too; WireGuard's and the agents' own ports from this host's addresses; whatever is sent from an
   endpoint address to which nobody sends through a tunnel; the operator's exemptions.
   WireGuard's packets out carry a mark; the rule by port is for those that come in, whose reverse look-up knows no
   mark. For the same reason no rule says `iif lo`. They are rules and no marks by nftables: who flushes the ruleset
   stays encrypted, and reaches etcd;
2. to T: whatever does not carry the mark, exactly.

A strict rp_filter on the device of the underlay would drop what comes in there from a node, since T leads elsewhere:
such a device is made loose, and nftables goes on with the strict check for everybody else
(`kernel.firewall.cleartext`). A loose check is strict on a device without an IPv4 address, so the WireGuard device gets
one if the mesh has none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from ipaddress import ip_interface, ip_network
from typing import Any

from attrs import evolve

from kilo_etcd.base.mappings import changes as changed_keys
from kilo_etcd.kernel.firewall.nftables import ICMP
from kilo_etcd.kernel.routing.exit_node import MARK, last_resort, route_of
from kilo_etcd.kernel.routing.rules import TABLE_SPAN, RoutingRule, priority_pair, table_number
from kilo_etcd.kernel.state import MAIN_TABLE, UNREACHABLE_METRIC, OwnTable, Policy, Route
from kilo_etcd.model import IPInterface, IPNetwork
from kilo_etcd.model.hostplan import Encryption, Exemption, HostPlan

_TABLES, _PRIORITIES = 108_000_000, 10_600
_TCP, _UDP = 6, 17
"""IANA's numbers of protocols."""


def table_of(interface: str) -> int:
    """The number of the routing table that belongs to an interface."""
    return table_number(_TABLES, interface)


def rule_priorities(interface: str) -> tuple[int, int]:
    """Where the rules of an interface stand: those that lead to the main table, and the one that leads to ours."""
    return priority_pair(_PRIORITIES, interface)


def is_ours(priority: int) -> bool:
    """Whether a rule stands where those of some interface do."""
    return _PRIORITIES <= priority < _PRIORITIES + 100


def is_table(number: int) -> bool:
    """Whether a table is that of some interface."""
    return _TABLES <= number < _TABLES + TABLE_SPAN


def policy_for(plan: HostPlan, interface: str, protocol: int) -> Policy:
    """The rules and the table that a plan asks for."""
    encryption = plan.encryption
    if encryption is None:
        return Policy()
    table = table_of(interface)
    routes = {network: route_of(planned, interface, protocol, table) for network, planned in encryption.send.items()}
    last = {network: _last(network, table, protocol) for network in (*encryption.send, *encryption.hold)}
    tables = {table: OwnTable(routes, last)} if last else {}
    return Policy(tables, frozenset(_rules(encryption, plan.listen_port, interface)))


def changed(old: HostPlan, new: HostPlan) -> list[IPNetwork] | None:
    """The destinations that two plans treat in different ways; None: one of them has no encryption."""
    before, now = old.encryption, new.encryption
    if before is None or now is None:
        return None
    news = changed_keys(before.send, now.send)
    return news if before.hold is now.hold else [*news, *(before.hold ^ now.hold)]


def narrowed(plan: HostPlan, networks: Collection[IPNetwork]) -> HostPlan:
    """The plan with no more destinations than `networks`."""
    encryption = plan.encryption
    assert encryption is not None
    send = {network: encryption.send[network] for network in networks if network in encryption.send}
    hold = frozenset(network for network in networks if network in encryption.hold)
    return evolve(plan, encryption=evolve(encryption, send=send, hold=hold))


def _last(network: IPNetwork, table: int, protocol: int) -> Route:
    if network.version == 6:
        return last_resort(network, table, protocol)
    return Route(destination=network, device="lo", protocol=protocol, table=table, metric=UNREACHABLE_METRIC)


def _rules(encryption: Encryption, listen_port: int, interface: str) -> Iterator[RoutingRule]:
    past, ours = rule_priorities(interface)

    def clear(version: int, **match: Any) -> RoutingRule:
        return RoutingRule(version=version, priority=past, table=MAIN_TABLE, **match)

    for address, port in encryption.etcd:
        yield clear(address.version, destination=ip_network(address), protocol=_TCP, dport=port)
    # From any address: the answers of an etcd in a container have the container's when they are routed.
    for version in {own.version for own in encryption.sources}:
        for port in encryption.etcd_here:
            yield clear(version, protocol=_TCP, sport=port)
    for own in encryption.sources:
        for port in (listen_port, *encryption.talk):
            yield clear(own.version, source=own, protocol=_UDP, sport=port)
    for own in encryption.clear_sources:
        yield clear(own.version, source=own)
    for exemption in encryption.clear:
        version, protocol = exemption.network.version, protocol_of(exemption)
        # The kernel says nothing of a destination that is anywhere.
        to = exemption.network if exemption.network.prefixlen else None
        if exemption.port is None:
            yield clear(version, destination=to, protocol=protocol)
        else:
            yield clear(version, destination=to, protocol=protocol, dport=exemption.port)
            yield clear(version, destination=to, protocol=protocol, sport=exemption.port)
    for version in (4, 6):
        yield RoutingRule(version=version, priority=ours, table=table_of(interface), not_mark=MARK)


def protocol_of(exemption: Exemption) -> int:
    """IANA's number."""
    return {"tcp": _TCP, "udp": _UDP, "icmp": ICMP[exemption.network.version]}[exemption.protocol]


def addresses_of(plan: HostPlan) -> tuple[IPInterface, ...]:
    """The addresses of the WireGuard device: the plan's, and one in IPv4 if the reverse-path check asks for one."""
    encryption = plan.encryption
    if encryption is None or any(address.version == 4 for address in plan.addresses):
        return plan.addresses
    own = next((address for address in encryption.sources if address.version == 4), None)
    return plan.addresses if own is None else (*plan.addresses, ip_interface(own))


def to_loosen(plan: HostPlan, strict: Collection[str]) -> tuple[str, ...]:
    """The devices whose rp_filter must not be strict; `strict` are those, of ours and the underlay's, where it is."""
    return tuple(sorted(strict)) if plan.encryption is not None else ()


def to_tighten(plan: HostPlan, loosened: Mapping[str, str], concerned: Collection[str]) -> tuple[str, ...]:
    """The devices whose rp_filter gets back the value that it had before it was made loose. `concerned`: devices of
    ours and the underlay's."""
    return tuple(sorted(name for name in loosened if plan.encryption is None or name not in concerned))
