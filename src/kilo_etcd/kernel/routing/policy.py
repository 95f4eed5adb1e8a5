"""Policy routing of ours: rules, and tables next to the main one. One mechanism for all features that need some. Pure.

`kernel.routing.returns`, `kernel.routing.encrypted` and `kernel.routing.exit_node` say which rules and routes there
must be; this module combines them, compares them with what there is, and removes them. Tables and priorities are
computed from the interface's name, so that what is ours is known after a crash, and two interfaces of one machine do
not conflict. Of two names, one pair in fifty has the same priorities: then the protocol tells an agent's rules from a
peer's, and there is one agent on a host.

A table is filled before a rule leads there, and the rule goes before the table is emptied. If a rule leads there
already, a destination that is new gets its route before its last resort, and loses the last resort before the route:
between the two changes the last resort alone would drop a packet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from kilo_etcd.base.mappings import changes as changed_keys
from kilo_etcd.kernel.routing import encrypted, exit_node, returns
from kilo_etcd.kernel.routing.exit_node import same_way
from kilo_etcd.kernel.routing.rules import AddRule, DeleteRule, RoutingRule
from kilo_etcd.kernel.state import (
    MAIN_TABLE,
    AddRoute,
    Change,
    DeleteRoute,
    Observed,
    OwnTable,
    Policy,
    ReplaceRoute,
    Route,
)
from kilo_etcd.model import IPNetwork
from kilo_etcd.model.hostplan import HostPlan


def own_tables(interface: str) -> tuple[int, ...]:
    """The numbers of the tables that belong to an interface."""
    return *onward_tables(interface), exit_node.exit_table(interface)


def onward_tables(interface: str) -> tuple[int, ...]:
    """Those of them that say, as the main table does, by which devices packets of the mesh go on."""
    return returns.return_table(interface), encrypted.table_of(interface)


def own_priorities(interface: str) -> frozenset[int]:
    """Where the rules of an interface stand."""
    return frozenset(
        (
            returns.return_priority(interface),
            *encrypted.rule_priorities(interface),
            *exit_node.rule_priorities(interface),
        )
    )


def own_rules(rules: Iterable[RoutingRule], interface: str) -> frozenset[RoutingRule]:
    """Those of `rules`, which stand at the interface's priorities, that are not of another interface with the same
    priorities: its rules lead to a table of its own."""
    tables = own_tables(interface)
    kept: set[RoutingRule] = set()
    pairs = (
        (returns.return_priority(interface),),
        encrypted.rule_priorities(interface),
        exit_node.rule_priorities(interface),
    )
    for priorities in pairs:
        near = [rule for rule in rules if rule.priority in priorities]
        own = any(rule.table in tables for rule in near)
        others = any(rule.table not in tables and rule.table != MAIN_TABLE for rule in near)
        # Both may have those that lead to the main table: the kernel has them once.
        kept.update(rule for rule in near if rule.table in tables or (rule.table == MAIN_TABLE and (own or not others)))
    return frozenset(kept)


def policy_for(plan: HostPlan, observed: Observed, interface: str, protocol: int) -> Policy:
    """What a plan asks for of a host as it is: nothing of a family that its kernel lacks, and of an exit node that is
    held just what there is."""
    parts = [returns.policy_for(plan, interface, protocol), encrypted.policy_for(plan, interface, protocol)]
    if plan.exit_route is not None and plan.exit_route.held:
        parts.append(_part(observed.policy, exit_node.exit_table(interface), exit_node.rule_priorities(interface)))
    else:
        parts.append(exit_node.policy_for(plan, interface, protocol))
    policy = Policy(
        {number: table for part in parts for number, table in part.tables.items()},
        frozenset(rule for part in parts for rule in part.rules),
    )
    return _without(policy, observed.lacking) if observed.lacking else policy


def _part(policy: Policy, table: int, priorities: tuple[int, ...]) -> Policy:
    tables = {table: policy.tables[table]} if table in policy.tables else {}
    return Policy(tables, frozenset(rule for rule in policy.rules if rule.priority in priorities))


def _without(policy: Policy, versions: frozenset[int]) -> Policy:
    def remaining(routes: Mapping[IPNetwork, Route]) -> dict[IPNetwork, Route]:
        return {network: route for network, route in routes.items() if network.version not in versions}

    tables = {n: OwnTable(remaining(table.routes), remaining(table.last)) for n, table in policy.tables.items()}
    return Policy(
        {n: table for n, table in tables.items() if table.routes or table.last},
        frozenset(rule for rule in policy.rules if rule.version not in versions),
    )


def changes(
    plan: HostPlan, observed: Observed, interface: str, protocol: int, settled: HostPlan | None
) -> tuple[list[Change], list[Change]]:
    """What has to be made, and what has to go then. `settled`: a plan that `observed` fulfils to the last."""
    asks = plan.returns or plan.returns_refused or plan.encryption is not None or plan.exit_route is not None
    if not (asks or observed.policy.tables or observed.policy.rules) or (settled is not None and _same(plan, settled)):
        return [], []
    policy = observed.policy
    if settled is not None and (news := encrypted.changed(settled, plan)) is not None:
        plan, policy = encrypted.narrowed(plan, news), _narrowed(policy, encrypted.table_of(interface), news)
    planned = policy_for(plan, observed, interface, protocol)
    numbers = sorted({*planned.tables, *policy.tables})
    made = [change for n in numbers for change in _made(planned.table(n), policy.table(n), interface)]
    made += [AddRule(rule) for rule in sorted(planned.rules - policy.rules, key=lambda rule: rule.order)]
    # The one that leads to our table goes before those that lead past it.
    removed = sorted(policy.rules - planned.rules, key=lambda rule: rule.order, reverse=True)
    stale: list[Change] = [DeleteRule(rule) for rule in removed]
    stale += [change for n in numbers for change in _stale(planned.table(n), policy.table(n))]
    return made, stale


def _same(plan: HostPlan, settled: HostPlan) -> bool:
    """Whether two plans certainly ask for the same. The table of an exit node follows from the peers' endpoints too."""
    if plan.exit_route is not None or settled.exit_route is not None or plan.listen_port != settled.listen_port:
        return False
    same_returns = plan.returns == settled.returns and plan.returns_refused.keys() == settled.returns_refused.keys()
    return same_returns and plan.encryption is settled.encryption


def _narrowed(policy: Policy, number: int, networks: Collection[IPNetwork]) -> Policy:
    """With no more of a table than its routes to `networks`."""
    table = policy.table(number)
    routes = {network: table.routes[network] for network in networks if network in table.routes}
    last = {network: table.last[network] for network in networks if network in table.last}
    others = {n: other for n, other in policy.tables.items() if n != number}
    return Policy({**others, number: OwnTable(routes, last)}, policy.rules)


def _made(planned: OwnTable, table: OwnTable, interface: str) -> Iterator[Change]:
    changed = changed_keys(table.routes, planned.routes)
    new = {destination for destination in changed if destination not in table.routes and destination not in table.last}
    yield from (AddRoute(planned.routes[destination]) for destination in changed if destination in new)
    for destination in changed_keys(table.last, planned.last):
        if (last := planned.last.get(destination)) is not None:
            yield AddRoute(last) if destination not in table.last else ReplaceRoute(last)
    for destination in changed:
        route, present = planned.routes.get(destination), table.routes.get(destination)
        if route is None or destination in new or (present is not None and same_way(present, route, interface)):
            continue
        if present is None:
            yield AddRoute(route)
        elif not route.device and route.gateway is not None and route.gateway in destination:
            # By which device a neighbour is reached the kernel asks this very table first, where a route into the
            # tunnel would be the answer. Meanwhile there is the last resort.
            yield from (DeleteRoute(present), AddRoute(route))
        else:
            yield ReplaceRoute(route)


def _stale(planned: OwnTable, table: OwnTable) -> Iterator[Change]:
    yield from (DeleteRoute(route) for destination, route in table.last.items() if destination not in planned.last)
    yield from (DeleteRoute(route) for destination, route in table.routes.items() if destination not in planned.routes)


def removal(policy: Policy, protocol: int) -> list[Change]:
    """What has to be done so that nothing of it is left that is marked with `protocol`: an agent and a connection may
    have had the same interface. The rules are all of it."""
    removed = sorted(policy.rules, key=lambda rule: rule.order, reverse=True)
    stale: list[Change] = [DeleteRule(rule) for rule in removed]
    for table in policy.tables.values():
        routes = (*table.last.values(), *table.routes.values())
        stale.extend(DeleteRoute(route) for route in routes if route.protocol == protocol)
    return stale
