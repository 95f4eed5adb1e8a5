"""How a leader sends on what comes out of the tunnel for its members' internal IPs, as values: a table of its own, and
a rule that leads there. Pure.

A member that encapsulates what it sends to other segments expects the answers encapsulated too: they come from an
address that it reaches by its IPIP device, and a strict `rp_filter` drops them on any other. In the main table such a
route to an internal IP would be one to the far end of the very packets that carry it, and loop. So it is in a table
that only packets out of the tunnel use: the rule says `iif`. Linux asks the same rule when it checks the
reverse path of a packet that is about to leave by the tunnel (`fib_validate_source` takes the device that a packet
leaves by for the one that its answer comes in by), so the leader's own `rp_filter`, strict or loose, finds the IPIP
device where the member's packets came from. No sysctl is needed, and the device needs no address.

Table and priority are computed from the interface's name, so what is ours is known after a crash. The rule stands
before those of an exit node: by the main table, which these ask first, the internal IP is a neighbour.

A member that has never answered has an unreachable route there: by the main table what comes out of the tunnel for it
would go in clear to whoever has its address on the location's network.
"""

from __future__ import annotations

from zlib import crc32

from kilo_etcd.kernel.routing.exit_node import last_resort, route_of
from kilo_etcd.kernel.routing.rules import TABLE_SPAN, AddRule, RoutingRule, table_number
from kilo_etcd.kernel.state import AddRoute, OwnTable, Policy, ReplaceRoute
from kilo_etcd.model.hostplan import HostPlan

_TABLES, _PRIORITIES = 109_000_000, 10_500


def return_table(interface: str) -> int:
    """The number of the routing table that belongs to an interface."""
    return table_number(_TABLES, interface)


def return_priority(interface: str) -> int:
    """Where the rule of an interface stands."""
    return _PRIORITIES + crc32(interface.encode()) % 100


def is_returning(change: AddRoute | ReplaceRoute | AddRule) -> bool:
    """Whether a change is one of these, of whichever interface."""
    return (
        bool(change.rule.inbound)
        if isinstance(change, AddRule)
        else _TABLES <= change.route.table < _TABLES + TABLE_SPAN
    )


def policy_for(plan: HostPlan, interface: str, protocol: int) -> Policy:
    """The table that a plan asks for, and a rule for each family that it has routes in."""
    number, priority = return_table(interface), return_priority(interface)
    routes = {network: route_of(planned, interface, protocol, number) for network, planned in plan.returns.items()}
    last = {network: last_resort(network, number, protocol) for network in plan.returns_refused}
    rules = (
        RoutingRule(version=version, priority=priority, table=number, inbound=interface)
        for version in {network.version for network in (*plan.returns, *plan.returns_refused)}
    )
    return Policy({number: OwnTable(routes, last)} if routes or last else {}, frozenset(rules))
