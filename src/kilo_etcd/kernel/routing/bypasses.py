"""Finds other programs' rules that precede those of `encrypted`, and by which packets for nodes leave in clear. Pure.

The kernel asks rules in the order of their priorities, so an operator's rule before ours wins: by a table of its own,
or by the main one with `suppress_prefixlength`, it leads packets past the tunnel. The other node refuses them. Rules
that ask for a mark, or for what comes in by some device, are left alone: whoever marks packets means those alone. So
are those limited to ports of what is always left outside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from socket import IPPROTO_TCP, IPPROTO_UDP

from kilo_etcd.kernel.netlink.formats import RT_TABLE_LOCAL
from kilo_etcd.kernel.routing.encrypted import protocol_of, rule_priorities
from kilo_etcd.kernel.routing.rules import ForeignRule
from kilo_etcd.kernel.state import Route
from kilo_etcd.model import IPAddress
from kilo_etcd.model.hostplan import HostPlan


def suspects(plan: HostPlan, rules: Iterable[ForeignRule], interface: str) -> list[ForeignRule]:
    """The rules that may lead packets past the tunnel; what their tables hold decides."""
    encryption = plan.encryption
    if encryption is None:
        return []
    _, ours = rule_priorities(interface)
    versions = {network.version for network in (*encryption.send, *encryption.hold)}
    return [
        rule
        for rule in rules
        if rule.version in versions
        and rule.priority < ours
        and not rule.picks
        and (rule.goto > ours or rule.table not in (0, RT_TABLE_LOCAL))
        and (
            rule.source is None or any(own.version == rule.version and own in rule.source for own in encryption.sources)
        )
    ]


def bypasses(
    plan: HostPlan, tables: Iterable[tuple[ForeignRule, Iterable[Route]]], interface: str, devices: Iterable[str]
) -> Iterator[str]:
    """A sentence for each rule, of `suspects`, by which packets leave in clear. With each, the routes that it leads to;
    `devices` are ours."""
    encryption = plan.encryption
    if encryption is None:
        return
    _, ours = rule_priorities(interface)
    own = {"", "lo", *devices}
    for rule, routes in tables:
        ways = [
            route
            for route in routes
            if route.destination.version == rule.version and route.device not in own and not route.kind
            and (rule.suppress is None or route.destination.prefixlen > rule.suppress)
        ]  # fmt: skip
        near = [
            network.network_address
            for network in sorted({*encryption.send, *encryption.hold}, key=lambda network: (network.version, network))
            if network.version == rule.version
            and (rule.destination is None or network.network_address in rule.destination)
            and not _outside(rule, network.network_address, plan)
            and (rule.goto or any(network.network_address in route.destination for route in ways))
        ]
        if near:
            more = f" and {len(near) - 1} more addresses of nodes" if len(near) > 1 else ", the address of a node,"
            packets = f"packets with {rule.limits}" if rule.limits else "packets"
            yield (
                f"a rule precedes the one that encrypts (priority {ours}), so that {packets} for {near[0]}{more} "
                f"leave in clear: {rule}; give it a priority of 10700 or above, or take these addresses out of it"
            )


def _outside(rule: ForeignRule, address: IPAddress, plan: HostPlan) -> bool:
    """Whether all that a rule leads to an address is left outside of the tunnels anyway."""
    encryption = plan.encryption
    assert encryption is not None
    udp = (plan.listen_port, *encryption.talk)
    from_here = {(IPPROTO_TCP, port) for port in encryption.etcd_here} | {(IPPROTO_UDP, port) for port in udp}
    to_there = {(IPPROTO_TCP, port) for where, port in encryption.etcd if where == address}
    for exemption in encryption.clear:
        if address in exemption.network:
            protocol = protocol_of(exemption)
            if exemption.port is None:
                if rule.protocol == protocol:
                    return True
            else:
                from_here.add((protocol, exemption.port))
                to_there.add((protocol, exemption.port))
    return _within(rule, rule.sports, from_here) or _within(rule, rule.dports, to_there)


def _within(rule: ForeignRule, ports: tuple[int, int] | None, exempted: Collection[tuple[int, int]]) -> bool:
    return ports is not None and all((rule.protocol, port) in exempted for port in range(ports[0], ports[1] + 1))
