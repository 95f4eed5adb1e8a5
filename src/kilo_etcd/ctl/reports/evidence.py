"""Joins what hosts themselves show of why packets are lost: a route that is not the plan's, a WireGuard that does not
answer, a host that does not, UDP packets that do not arrive. Pure.

A lost packet that passes such a place says nothing of the hosts behind it, so `ctl.reports.arrivals` and
`ctl.reports.internal_arrivals` leave it out. Each place has one finding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from ipaddress import ip_address
from itertools import chain, pairwise

from attrs import evolve, field, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.reports.arrivals import (
    PAIRS,
    SHOWN,
    Loss,
    by_host,
    by_mesh_address,
    end_of,
    good_hops,
    limiting_hosts,
    lost_hops,
    path,
    reached_by,
    some,
)
from kilo_etcd.ctl.reports.causes import Kind
from kilo_etcd.ctl.reports.live import Live, ago, pairs, tunnels
from kilo_etcd.ctl.reports.lossy import Lossy, lossy
from kilo_etcd.model import Node
from kilo_etcd.store.records import StatusRecord
from kilo_etcd.store.status_texts import NO_IPV6, NO_WIREGUARD
from kilo_etcd.topology.forced_addresses import lacks
from kilo_etcd.topology.segments import Topology

_Hop = frozenset[str]

_NO_WAY_IN_IPV6 = re.compile(r"node (\S+) cannot be reached in IPv6 inside the location")
"""An agent's error about another member (`planning.plan`)."""

_REMOVED = re.compile(" (rule|route) ")


@frozen
class _Blocked:
    """A way on which WireGuard's packets are lost."""

    seconds: int | None
    """Since the last handshake; None: there was none."""
    endpoint: str
    """To which they are sent; empty: that is not known."""


@frozen(kw_only=True)
class Evidence:
    """The places at which packets are known to be lost."""

    topology: Topology
    live: Live = field(factory=Live)
    """The answers, without the IPv6 packets that are known to be lost (`_without_ipv6`)."""
    in_part: Lossy = field(factory=Lossy)
    """Where some packets get lost."""
    limiting: frozenset[str] = frozenset()
    """Hosts whose firewalls take a limited number of echo requests."""
    routes: Mapping[str, Mapping[str, str]] = field(factory=dict)
    """Host -> addresses to which its kernel takes another route than the plan's, each with that route."""
    named: frozenset[str] = frozenset()
    """Those of them whose agents name the routes of other programs themselves."""
    endpoints: Mapping[str, Mapping[str, str]] = field(factory=dict)
    """Host -> nodes whose endpoints its kernel has no route to, each with the endpoint and what the kernel answers."""
    without_ipv6: frozenset[str] = frozenset()
    """Hosts on whose devices IPv6 is switched off."""
    stopped: frozenset[str] = frozenset()
    """Hosts whose WireGuard does not answer their agents."""
    unresponsive: Mapping[str, tuple[str, ...]] = field(factory=dict)
    """Hosts whose agents do not answer, and that do not answer these hosts' echo requests, if it is known that their
    leader is not the reason."""
    passing: frozenset[str] = frozenset()
    """Hosts that answer some echo request, or that one has passed which was answered."""
    blocked: Mapping[str, Mapping[str, _Blocked]] = field(factory=dict)
    """Host -> nodes whose WireGuard sends packets that do not arrive at it."""

    @cached_property
    def gone(self) -> frozenset[str]:
        """Hosts that show no sign of life."""
        return frozenset(self.unresponsive.keys() - self.passing)

    def explains_error(self, name: str, error: str) -> bool:
        """Whether a host's error follows from IPv6 that is switched off on it or on the member that it names."""
        match = _NO_WAY_IN_IPV6.match(error)
        return match is not None and not self.without_ipv6.isdisjoint((name, match[1]))

    @cached_property
    def hops(self) -> frozenset[_Hop]:
        """Pairs of adjacent hosts between which all packets are lost, or so many that those of some are."""
        losing_hosts = (*self.endpoints.items(), *self.blocked.items())
        lost = frozenset(frozenset((one, other)) for one, others in losing_hosts for other in others)
        return lost | self.in_part.heavy

    def unexplained(self, apart: Mapping[_Hop, Kind]) -> dict[_Hop, Kind]:
        """The pairs of members none of whose kernels takes another route to the other."""
        return {pair: kind for pair, kind in apart.items() if not self.astray(*pair) and not self.stopped & pair}

    def astray(self, one: str, other: str) -> bool:
        """Whether the kernel of one of two hosts takes another route to the other."""
        nodes = self.topology.snapshot.nodes
        return any(
            address in self.routes.get(here, ())
            for here, there in ((one, other), (other, one))
            for address in (*_mesh(nodes[there]), *(str(ip.ip) for ip in nodes[there].internal_ips))
        )

    def explains_tunnel(self, one: str, other: str) -> bool:
        """Whether it is known why the tunnel between two hosts has no session."""
        return bool((self.stopped | self.gone) & {one, other}) or any(
            there in self.endpoints.get(here, ()) for here, there in ((one, other), (other, one))
        )

    def explains(self, one: str, other: str) -> bool:
        """Whether packets from `one` to the mesh addresses of `other`, or the answers, pass one of the places."""
        nodes = self.topology.snapshot.nodes
        there, back = (_mesh(nodes[name]) for name in (other, one))
        return self.between(one, other, there, back)

    def between(self, one: str, other: str, there: Collection[str], back: Collection[str]) -> bool:
        """Whether packets from `one` to the addresses `there` of `other`, or the answers to the addresses `back`, pass
        one of the places."""
        hosts = path(self.topology, one, other)
        if self.stopped.intersection(hosts) or self.gone.intersection(hosts):
            return True
        if one in self.unresponsive or other in self.unresponsive:
            return True
        if any(frozenset(hop) in self.hops for hop in pairwise(hosts)):
            return True
        return any(
            address in self.routes.get(name, ())
            for senders, addresses in ((hosts[:-1], there), (hosts[1:], back))
            for name in senders
            for address in addresses
        )


def _without_ipv6(topology: Topology, statuses: Mapping[str, StatusRecord], live: Live, off: Collection[str]) -> Live:
    """The answers without the IPv6 packets that are lost, or take other routes, because a host on their way has IPv6
    switched `off`, or two members have no way in IPv6 between them. These hosts' errors say so."""
    apart = {
        frozenset((name, match[1]))
        for name, status in statuses.items()
        for error in status.errors
        if (match := _NO_WAY_IN_IPV6.match(error))
    }
    if not off and not apart:
        return live
    by_address = {
        str(address): node.name
        for node in topology.snapshot.nodes.values()
        for address in (*node.mesh_addresses, *(ip.ip for ip in node.internal_ips))
        if address.version == 6
    }

    def explained(name: str, address: str) -> bool:
        target = by_address.get(address)
        if target is None:
            return False
        hosts = path(topology, name, target)
        return any(host in off for host in hosts) or any(frozenset(hop) in apart for hop in pairwise(hosts))

    return evolve(live, answers={
        name: evolve(
            answer,
            unreached=tuple(address for address in answer.unreached if not explained(name, address)),
            routes=tuple(route for route in answer.routes if not explained(name, route.address)),
        ) if name in topology.snapshot.nodes else answer
        for name, answer in live.answers.items()
    })  # fmt: skip


def _hosts_that_say(text: str, statuses: Mapping[str, StatusRecord], live: Live) -> frozenset[str]:
    """The hosts in whose errors a text stands."""
    return frozenset(
        name
        for texts in (
            {name: status.errors for name, status in statuses.items()},
            {name: answer.trouble for name, answer in live.answers.items()},
        )
        for name, errors in texts.items()
        if any(text in error for error in errors)
    )


def evidence(
    topology: Topology, statuses: Mapping[str, StatusRecord], live: Live, dead: Collection[str] = ()
) -> Evidence:
    """What the answers and the statuses show. `dead`: nodes whose agents do not live."""
    nodes = topology.snapshot.nodes
    without_ipv6 = _hosts_that_say(NO_IPV6, statuses, live) & nodes.keys()
    live = _without_ipv6(topology, statuses, live, without_ipv6)
    lost = lost_hops(topology, live)
    reached = reached_by(topology, live)
    paths = {path(topology, asker, other) for other, askers in reached.items() for asker in askers}
    routes, endpoints = _routes(topology, live, lost)
    return Evidence(
        topology=topology,
        live=live,
        in_part=lossy(topology, live),
        limiting=limiting_hosts(live),
        routes=routes,
        named=frozenset(
            name
            for name, foreign in routes.items()
            if name in statuses and all(_names_route(statuses[name].errors, route) for route in foreign.values())
        ),
        endpoints=endpoints,
        without_ipv6=without_ipv6,
        stopped=_hosts_that_say(NO_WIREGUARD, statuses, live) & nodes.keys(),
        unresponsive=_unresponsive(topology, statuses, live, {*live.silent, *dead} & nodes.keys(), reached, paths),
        passing=frozenset(chain.from_iterable(paths)),
        blocked=_blocked(topology, live, lost),
    )


def _routes(
    topology: Topology, live: Live, lost: Collection[_Hop]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:  # fmt: skip
    nodes = topology.snapshot.nodes
    names = {node.public_key: node.name for node in nodes.values()}
    living = {*live.answers, *live.silent}
    good = good_hops(topology, live)
    routes: dict[str, dict[str, str]] = {}
    endpoints: dict[str, dict[str, str]] = {}
    for name, answer in live.answers.items():
        foreign = {route.address: route.route for route in answer.routes if route.foreign and name in nodes}
        if not foreign:
            continue  # In a large full mesh there are millions of tunnels.
        # An endpoint is tried itself only if the mesh leads packets to it into the tunnels.
        untried = foreign.keys() - {*answer.reached, *answer.unreached}
        far = {
            names[tunnel.public_key]: address
            for tunnel in answer.tunnels
            if tunnel.public_key in names and (address := _host(tunnel.endpoint)) in untried
        }
        own = {address: route for address, route in foreign.items() if address not in far.values()}
        if own:
            routes[name] = own
        if cut := {
            other: f"{address} ({foreign[address]})"
            for other, address in far.items()
            # In a large mesh not every pair sends echo requests.
            if (hop := frozenset((name, other))) in lost or (other in living and hop not in good)
        }:
            endpoints[name] = cut
    return routes, endpoints


def _names_route(errors: Collection[str], route: str) -> bool:
    """Whether an error is about the route by which another program has taken packets elsewhere."""
    network = route.rpartition(" route ")[2] if ", by ip " in route else ""
    return bool(network) and any(f"own route to {network} " in error for error in errors)


def _host(endpoint: str) -> str:
    """The address of an endpoint."""
    text = endpoint.rpartition(":")[0].strip("[]")
    try:
        return str(ip_address(text))
    except ValueError:
        return ""


def _unresponsive(
    topology: Topology,
    statuses: Mapping[str, StatusRecord],
    live: Live,
    names: Collection[str],
    reached: Mapping[str, Sequence[str]],
    paths: Collection[tuple[str, ...]],
) -> dict[str, tuple[str, ...]]:
    by_address = by_mesh_address(topology)
    tried: dict[str, list[str]] = {}
    for name, answer in sorted(live.answers.items()):
        for address in answer.unreached:
            target = by_address.get(address)
            if target is None or target not in names or name not in topology.snapshot.nodes:
                continue
            if name not in reached.get(target, ()):  # A host that answers in one family is there.
                tried.setdefault(target, []).append(name)
    forwarding = {name for hosts in paths for name in hosts[1:-1]}

    def at_fault(name: str) -> bool:
        """Whether it is the place itself. If its location reaches it and nothing arrives by its leader, that may be."""
        leader, status = end_of(topology, name), statuses.get(name)
        stale = status is not None and status.leader not in ("", leader)
        near = any(end_of(topology, asker) == leader for asker in reached.get(name, ()))
        return leader == name or leader in forwarding or stale or not near

    return {name: tuple(dict.fromkeys(ones)) for name, ones in tried.items() if at_fault(name)}


def _blocked(topology: Topology, live: Live, lost: Collection[_Hop]) -> dict[str, dict[str, _Blocked]]:
    """By what both ends of a tunnel have counted while echo requests went through it and were lost."""
    nodes = topology.snapshot.nodes
    names = {node.public_key: node.name for node in nodes.values()}
    # Where an echo request was answered WireGuard's packets have arrived, both ways.
    lost = frozenset(lost) - good_hops(topology, live)
    # An end that sends nothing has a reason of its own.
    unsent = {(name, key) for name, answer in live.answers.items() for key in answer.unsent_peers}
    counted = {
        (here, far)
        for here, answer in live.answers.items()
        for key in answer.unanswered_peers
        if (far := names.get(key)) in live.answers
        and frozenset((here, far)) in lost
        and (far, nodes[here].public_key) not in unsent
    }
    if not counted:
        return {}
    result: dict[str, dict[str, _Blocked]] = {}
    # A tunnel without a session has an error of its own.
    for pair in filter(lambda pair: pair.up, pairs(topology, tunnels(topology, live))):
        for here, far in ((pair.one, pair.other), (pair.other, pair.one)):
            if (here, far) in counted:
                endpoint = next((end.endpoint for end in pair.ends if end.node == far), "")
                result.setdefault(here, {})[far] = _Blocked(pair.handshake, endpoint)
    return result


def _mesh(node: Node) -> tuple[str, ...]:
    return tuple(map(str, node.mesh_addresses))


def shown(places: Evidence, missing: Collection[str] = ()) -> Iterator[Loss]:
    """One error for each place. `missing`: internal IPs that their hosts do not have, which explains why these take
    other routes."""
    nodes = places.topology.snapshot.nodes
    # Without the address the agent's routes, which send from it, cannot be there.
    astray = sorted(name for name in places.routes if name not in places.named and not lacks(nodes[name], missing))
    for name in astray[:PAIRS]:
        yield _other_route(name, places.routes[name])
    if more := astray[PAIRS:]:
        yield Loss(
            subject="routes",
            text=f"the kernels of {len(more)} more hosts take other routes than the agents' too, {some(more)}",
            remedy="mend what is named first, then ask again",
        )  # fmt: skip
    for name, far in sorted(places.endpoints.items()):
        yield Loss(
            subject=name,
            text=f"its WireGuard reaches nobody at {some(far.values())}, the endpoints of {some(far)}: the host's "
                 "kernel gives no route there" if len(far) > 1
                 else f"its WireGuard does not reach {some(far)} at {some(far.values())}: the host's kernel gives no "
                 "route there",
            remedy=f"ip route show default and ip rule show on {name}: is the default route gone, or does a rule "
                   "refuse these packets?",
        )  # fmt: skip
    yield from _blocked_ways(places)


def _blocked_ways(places: Evidence) -> Iterator[Loss]:
    """One error for each host that most of the blocked ways have in common."""
    ways = {
        (sender, name)
        for name, senders in places.blocked.items()
        for sender in senders
        if not places.explains_tunnel(name, sender)
    }
    received = Counter(name for _, name in ways)
    for name, far in by_host(map(frozenset, ways), received.__getitem__):
        senders = {other for other in far if (other, name) in ways}
        yield _blocked_way(places, name, senders, {other for other in far if (name, other) in ways})


def _blocked_way(places: Evidence, name: str, senders: Collection[str], receivers: Collection[str]) -> Loss:
    """Between one host and some others. `senders`: those whose packets do not arrive at it; `receivers`: those at which
    its packets do not."""
    far = sorted({*senders, *receivers})
    ways = [(here, there) for other in far for here, there in ((name, other), (other, name))]
    blocked_ways = [way for here, there in ways if (way := places.blocked.get(here, {}).get(there)) is not None]
    last = min((way.seconds for way in blocked_ways if way.seconds is not None), default=None)
    # Not the endpoint in its record: the tunnel may use another one.
    into = {way.endpoint for sender in senders if (way := places.blocked.get(name, {}).get(sender)) is not None}
    stated = places.topology.snapshot.nodes[name].endpoint
    endpoint = (into.pop() if len(into) == 1 else "") or str(stated or 51820)
    callers = [*(senders and far), *([name] if receivers else [])]
    if not receivers:
        symptom, passes = (
            f"WireGuard's packets from {some(far)} do not arrive at {name}",
            f"UDP {endpoint} to {name}",
        )
    elif not senders:
        symptom, passes = (
            f"WireGuard's packets from {name} do not arrive at {some(far)}",
            f"UDP {stated or 51820} from {name}",
        )
    else:
        symptom, passes = (
            f"WireGuard's packets between {name} and {some(far)} do not arrive",
            f"UDP {endpoint} to and from {name}",
        )
    return Loss(
        subject=name if len(far) > 1 else f"{name} - {far[0]}",
        text=f"{symptom}, although they are sent (last handshake: {ago(last)} ago)",
        remedy=f"let {passes} pass, on the way and through the firewalls of both ends (nft list ruleset)"
               + (f"; ip neigh on {' and '.join(callers)}" if _is_private(endpoint) and len(far) == 1 else ""),
        between=(far[0], name),
    )  # fmt: skip


def _is_private(endpoint: str) -> bool:
    """Whether an endpoint is on a network of the hosts' own, where the neighbour table may be wrong."""
    address = _host(endpoint)
    return bool(address) and ip_address(address).is_private


def _other_route(name: str, routes: Mapping[str, str]) -> Loss:
    first = next(iter(routes.values()))
    rules = dict.fromkeys(rule for route in routes.values() if (rule := route.partition(", by ip ")[2]))
    removals = ["ip " + _REMOVED.sub(r" \1 del ", rule, count=1) for rule in rules]
    kinds = {match[1] for rule in rules if (match := _REMOVED.search(rule))}
    kind = kinds.pop() if len(kinds) == 1 else "route"
    named = f"that {kind}" if len(rules) == 1 else f"those {kind}s"
    table = f" table {first.partition(',')[0].rpartition(' table ')[2]}" if " table " in first.partition(",")[0] else ""
    return Loss(
        subject=name,
        text=f"its kernel sends packets for {some(routes)} by another route than the agent's: {first}",
        remedy=f"remove {named} of another program on {name} ({first_of(removals, SHOWN, '; ')})" if rules
               else f"ip rule and ip route show{table} on {name}: remove the rule or the route that comes before the "
                    "agent's",
    )  # fmt: skip
