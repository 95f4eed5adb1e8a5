"""The packet filter's part of a plan: one nftables table of our own as a frozen value, and as text that `nft` reads.

The table is replaced whole, in one transaction, and only where it differs from what is there. It says two things:

* IPIP, which carries no authentication of its sender, is taken from the nodes that the plan exchanges it with and from
  nobody else;
* what comes out of the tunnel for a location's network (a printer that runs no agent) is masqueraded by the host that
  forwards it there, so that the answer finds its way back. The location's nodes have routes and need none of that,
  nor do networks behind a node; what this host sends itself, to etcd for instance, is never touched;
* of an exit node: packets from the tunnel for destinations outside the mesh are masqueraded too; what is for a private
  network that the exit node is attached to, and that nobody offers, is dropped, and so is what is for link-local
  addresses;
* of a node that has an exit node, in IPv6 (`kernel.routing.exit_node` says why): an answer to a connection that
  somebody else has opened gets WireGuard's mark, and with it a route outside the tunnel; what else is about to enter
  the tunnel from an address that the mesh does not know is refused, since the exit node would drop it in silence; what
  is for another node's internal IP is not, since that node knows the host's own internal IP. What
  comes in for one of the host's own addresses has the mark on its way in: firewalld asks which way its source is
  reached, mark and all, and drops it if that is another than it came. Packets with a mark of somebody else's are left
  to them.
* with `encrypted`, what `kernel.firewall.cleartext` has;
* of a host that forwards, what `kernel.firewall.sizes` has.

Nothing is opened here: an `accept` of ours does not take back a `drop` of another table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from kilo_etcd.kernel.firewall import cleartext, sizes
from kilo_etcd.kernel.firewall import nftables as nft
from kilo_etcd.kernel.firewall.table import AddressSet, Chain, FirewallTable, Rule
from kilo_etcd.kernel.netlink.formats import NF_PRIORITIES
from kilo_etcd.kernel.routing.exit_node import MARK
from kilo_etcd.kernel.state import ipip_name
from kilo_etcd.model import DEFAULT_INTERFACE, IPAddress
from kilo_etcd.model.hostplan import HostPlan, Via

_COUNTERS = tuple(
    sorted(
        (
            "answers", "ipip_accepted", "ipip_dropped", "masqueraded", "refused", "exit_node", "exit_node_blocked",
            *cleartext.COUNTERS,
        )
    )
)  # fmt: skip
"""Sorted, as the kernel's are when they are read."""

IPIP_PROTOCOL = 4
"""IANA's number for IPv4 in IPv4."""


def table_name(interface: str) -> str:
    """The table (family inet) that belongs to a WireGuard interface."""
    if interface == DEFAULT_INTERFACE:
        return "kilo"
    # nftables' names are plain identifiers, those of interfaces nearly anything.
    return "kilo-" + re.sub(r"[^A-Za-z0-9_.-]", lambda match: f"_{ord(match[0]):x}", interface)


def table_for(
    plan: HostPlan,
    interface: str,
    *,
    strict: Collection[str] = (),
    forwarding: Collection[int] = (),
    clamp_mss: bool = True,
) -> FirewallTable | None:
    """The table that a plan asks for; None where it needs none. `strict`, `forwarding`: the host's, see `cleartext`.
    `clamp_mss`: whether TCP that is forwarded is to fit into the tunnel."""
    chains: list[Chain] = []
    sets: list[AddressSet] = []
    rules: list[Rule] = []
    if plan.ipip_remotes and plan.ipip_local is not None:
        chains.append(Chain(name="input", kind="filter", hook="input", priority=NF_PRIORITIES["filter"]))
        sets.append(AddressSet(name="ipip_nodes", version=4, addresses=plan.ipip_remotes))
        to_us = (*nft.match_protocol(IPIP_PROTOCOL), *nft.match_address(plan.ipip_local, "daddr"))
        text = f"meta l4proto {IPIP_PROTOCOL} ip daddr {plan.ipip_local}"
        rules += (
            Rule(
                chain="input",
                expressions=(*to_us, *nft.match_set("ipip_nodes", 4, "saddr"), *nft.count("ipip_accepted"), nft.ACCEPT),
                text=f"{text} ip saddr @ipip_nodes counter name ipip_accepted accept",
            ),
            Rule(
                chain="input",
                expressions=(*to_us, *nft.count("ipip_dropped"), nft.DROP),
                text=f"{text} counter name ipip_dropped drop",
            ),
        )
    if plan.masquerade or plan.is_exit_node:
        chains.append(Chain(name="postrouting", kind="nat", hook="postrouting", priority=NF_PRIORITIES["srcnat"]))
        rules += _masquerade(plan, interface, sets)
        if plan.is_exit_node:
            rules += _exit_node(plan, interface)
    if plan.is_exit_node and plan.blocked:
        chains.append(Chain(name="forward", kind="filter", hook="forward", priority=NF_PRIORITIES["filter"]))
        rules += _blocked(plan, interface)
    if plan.exit_route is not None and plan.exit_route.answers6:
        chains.append(Chain(name="prerouting", kind="filter", hook="prerouting", priority=NF_PRIORITIES["mangle"]))
        chains.append(Chain(name="delivered", kind="filter", hook="input", priority=NF_PRIORITIES["filter"]))
        chains.append(Chain(name="output", kind="route", hook="output", priority=NF_PRIORITIES["mangle"]))
        own = frozenset(address for address in plan.exit_route.sources if address.version == 6)
        sets.append(AddressSet(name="own6", version=6, addresses=own))
        away = _internal_ips(plan, own)
        if away:
            sets.append(AddressSet(name="internal6", version=6, addresses=frozenset(away)))
        rules += _answers(plan, interface, away)
    forwarded = {*forwarding, *plan.forwarding}
    more = cleartext.parts(plan, interface, ipip_name(interface), strict, forwarded)
    chains += more.chains
    sets += more.sets
    rules += more.rules
    # Hosts with `encrypted` forward what their containers send.
    if clamp_mss and (plan.clamps or any(chain.hook == "postrouting" for chain in more.chains)):
        chains.append(sizes.CHAIN)
        rules += sizes.rules((interface, ipip_name(interface)) if plan.ipip_remotes else (interface,))
    if not rules:
        return None
    counters = [name for name in _COUNTERS if _counted(rules, name)]
    return FirewallTable(
        name=table_name(interface), chains=tuple(chains), sets=tuple(sets), counters=tuple(counters),
        rules=tuple(rules),
    )  # fmt: skip


def _masquerade(plan: HostPlan, interface: str, sets: list[AddressSet]) -> Iterable[Rule]:
    inbound = nft.match_interface("iifname", interface)
    text = f'iifname "{interface}"'
    for version in (4, 6):
        nodes = frozenset(address for address in plan.masquerade_not if address.version == version)
        if nodes:
            family = "ip" if version == 4 else "ip6"
            sets.append(AddressSet(name=f"nodes{version}", version=version, addresses=nodes))
            yield Rule(
                chain="postrouting",
                expressions=(*inbound, *nft.match_set(f"nodes{version}", version, "daddr"), nft.RETURN),
                text=f"{text} {family} daddr @nodes{version} return",
            )
    outbound = nft.match_interface("oifname", interface, equal=False)
    text += f' oifname != "{interface}"'
    for network in plan.masquerade:
        family = "ip" if network.version == 4 else "ip6"
        yield Rule(
            chain="postrouting",
            expressions=(
                *inbound, *outbound, *nft.match_network(network, "daddr"), *nft.count("masqueraded"), nft.MASQUERADE
            ),
            text=f"{text} {family} daddr {network} counter name masqueraded masquerade",
        )  # fmt: skip


def _exit_node(plan: HostPlan, interface: str) -> Iterable[Rule]:
    inbound = nft.match_interface("iifname", interface)
    text = f'iifname "{interface}"'
    for network in plan.inside:
        family = "ip" if network.version == 4 else "ip6"
        yield Rule(
            chain="postrouting",
            expressions=(*inbound, *nft.match_network(network, "daddr"), nft.RETURN),
            text=f"{text} {family} daddr {network} return",
        )
    outbound = nft.match_interface("oifname", interface, equal=False)
    yield Rule(
        chain="postrouting",
        expressions=(*inbound, *outbound, *nft.count("exit_node"), nft.MASQUERADE),
        text=f'{text} oifname != "{interface}" counter name exit_node masquerade',
    )


def _blocked(plan: HostPlan, interface: str) -> Iterable[Rule]:
    inbound = nft.match_interface("iifname", interface)
    text = f'iifname "{interface}"'
    for network in dict.fromkeys((*plan.inside, *plan.masquerade, *plan.behind)):
        family = "ip" if network.version == 4 else "ip6"
        yield Rule(
            chain="forward",
            expressions=(*inbound, *nft.match_network(network, "daddr"), nft.RETURN),
            text=f"{text} {family} daddr {network} return",
        )
    outbound = nft.match_interface("oifname", interface, equal=False)
    for network in plan.blocked:
        family = "ip" if network.version == 4 else "ip6"
        yield Rule(
            chain="forward",
            expressions=(
                *inbound, *outbound, *nft.match_network(network, "daddr"), *nft.count("exit_node_blocked"), nft.DROP
            ),
            text=f'{text} oifname != "{interface}" {family} daddr {network} counter name exit_node_blocked drop',
        )  # fmt: skip


def _internal_ips(plan: HostPlan, own: Collection[IPAddress]) -> dict[IPAddress, IPAddress | None]:
    """The IPv6 addresses of other segments' nodes to which this host's packets travel in the mesh, whatever addresses
    the mesh has -> the address of its `own` by which the far end knows it. With `encrypted` it is None: all that goes
    there does."""
    near = {
        route.destination.network_address: route.source
        for route in plan.routes.values()
        if route.via is Via.TUNNEL and route.source in own and route.destination.prefixlen == 128
    }
    send = () if plan.encryption is None else plan.encryption.send
    return {**near, **{network.network_address: None for network in send if network.version == 6}}


def _answers(plan: HostPlan, interface: str, away: Mapping[IPAddress, IPAddress | None]) -> Iterable[Rule]:
    """`away`: as `_internal_ips` has it."""
    mark = f"meta mark set {MARK}"
    yield Rule(
        chain="prerouting",
        expressions=(
            *nft.match_set("own6", 6, "daddr"), *nft.match_interface("iifname", interface, equal=False),
            *nft.match_mark(0), *nft.set_mark(MARK),
        ),
        text=f'ip6 daddr @own6 iifname != "{interface}" meta mark 0 {mark}',
    )  # fmt: skip
    # What a tunnel of somebody else's takes out of it must not have the mark any more.
    yield Rule(
        chain="delivered",
        expressions=(*nft.match_family(6), *nft.match_mark(MARK), *nft.set_mark(0)),
        text=f"meta nfproto ipv6 meta mark {MARK} meta mark set 0",
    )
    for own in (address.ip for address in plan.addresses if address.version == 6):
        yield Rule(
            chain="output",
            expressions=(*nft.match_address(own, "saddr"), nft.RETURN),
            text=f"ip6 saddr {own} return",
        )
    # Before answers are marked: with `encrypted` the mark would take them out of the tunnel. Without it the far end
    # takes packets of the host's internal IP only; another address is refused below.
    for source in (
        [None] if None in away.values() else sorted({address for address in away.values() if address is not None})
    ):
        yield Rule(
            chain="output",
            expressions=(
                *(() if source is None else nft.match_address(source, "saddr")),
                *nft.match_set("internal6", 6, "daddr"), nft.RETURN,
            ),
            text=f"{'' if source is None else f'ip6 saddr {source} '}ip6 daddr @internal6 return",
        )  # fmt: skip
    unmarked, text = (*nft.match_family(6), *nft.match_mark(0)), "meta nfproto ipv6 meta mark 0"
    # What a host says to itself needs no second route.
    yield Rule(
        chain="output",
        expressions=(
            *unmarked, *nft.match_interface("oifname", "lo", equal=False), *nft.match_answer(), *nft.count("answers"),
            *nft.set_mark(MARK),
        ),
        text=f'{text} oifname != "lo" ct direction reply counter name answers {mark}',
    )  # fmt: skip
    for network in dict.fromkeys((*plan.behind, *plan.masquerade)):
        if network.version == 6:
            yield Rule(
                chain="output",
                expressions=(*nft.match_network(network, "saddr"), nft.RETURN),
                text=f"ip6 saddr {network} return",
            )
    yield Rule(
        chain="output",
        expressions=(*unmarked, *nft.match_interface("oifname", interface), *nft.count("refused"), nft.REJECT),
        text=f'{text} oifname "{interface}" counter name refused reject with icmpx host-unreachable',
    )


def _counted(rules: Iterable[Rule], name: str) -> bool:
    (counter,) = nft.count(name)
    return any(counter in rule.expressions for rule in rules)
