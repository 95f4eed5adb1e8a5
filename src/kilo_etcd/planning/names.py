"""DNS names in a plan, and the addresses that stand in their place. Pure; `runtime.resolve` looks names up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TypeAlias

from attrs import evolve

from kilo_etcd.model import Endpoint, IPAddress
from kilo_etcd.model.hostplan import HostPlan, Problem

Table: TypeAlias = Mapping[str, tuple[IPAddress, ...]]
"""DNS name -> its addresses, the one to use first."""
Reasons: TypeAlias = Mapping[str, str]
"""DNS name -> why it has no address."""
NO_REASONS: Reasons = MappingProxyType({})


def resolve_plan(
    plan: HostPlan, table: Table, failed: Reasons = NO_REASONS, families: Collection[int] = ()
) -> HostPlan:
    """The plan with addresses in place of names; the same object where it has no names.

    A peer whose name is not in the table loses its endpoint (it stays reachable when it calls first), and is named in
    a Problem if its name is among those that `failed`; else the answer is still on its way. `families` are those in
    which the host reaches others: an address of another helps nobody; none given means that it is not known.
    """
    replaced = {}
    problems = []
    for key, peer in plan.peers.items():
        endpoint = peer.endpoint
        if endpoint is None or not isinstance(endpoint.host, str):
            continue
        addresses = table.get(endpoint.host)
        fit = next((address for address in addresses or () if not families or address.version in families), None)
        replaced[key] = evolve(peer, endpoint=None if fit is None else Endpoint(fit, endpoint.port))
        if not addresses:
            if endpoint.host not in failed:
                continue
            text = (
                f"the DNS name {endpoint.host} of the endpoint of {peer.name} is not resolved "
                f"({failed[endpoint.host]}); mend the name or the resolver"
            )
            problems.append(Problem(subject=peer.name, text=text))
        elif fit is None:
            ours = " and ".join(f"IPv{version}" for version in sorted(families))
            text = (
                f"no common address family with {peer.name}: this host reaches others over {ours} only, and the DNS "
                f"name {endpoint.host} of its endpoint has no such address; add one to the name"
            )
            problems.append(Problem(subject=peer.name, text=text))
    if not replaced:
        return plan
    return evolve(plan, peers={**plan.peers, **replaced}, problems=(*plan.problems, *problems))


def plan_names(plan: HostPlan) -> frozenset[str]:
    """The DNS names among the plan's endpoints."""
    return frozenset(
        peer.endpoint.host
        for peer in plan.peers.values()
        if peer.endpoint is not None and isinstance(peer.endpoint.host, str)
    )


def names_of(plan: HostPlan, name: str, table: Table) -> tuple[str, ...]:
    """The DNS name of the endpoint of node `name` in an unresolved plan, if it is not in the table."""
    hosts = (peer.endpoint.host for peer in plan.peers.values() if peer.name == name and peer.endpoint is not None)
    return tuple(host for host in hosts if isinstance(host, str) and not table.get(host))
