"""Where packets get lost in part, by the echo requests that each host has sent to others that answer. Pure.

Each way from one host to another has its share of requests without an answer. Ways that have a hop in common tell on
which hop they are lost; and if no hop explains it, that packets are told apart by their addresses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from attrs import field, frozen

from kilo_etcd.ctl.reports.arrivals import Loss, by_host, by_mesh_address, hops_between, limiting_hosts, path, some
from kilo_etcd.ctl.reports.live import Live
from kilo_etcd.topology.segments import Topology


@frozen
class Counted:
    """The echo requests that one host has sent to a mesh address of another one that answers some."""

    sender: str
    target: str
    version: int
    sent: int
    missing: int
    """Requests without an answer."""


SOME = 4
"""Missing answers that are no coincidence, out of some twenty."""

_SHARE = 0.05
"""Of the requests between two hosts: from here on missing answers are a loss to look at."""

_COINCIDENCE = 0.02
"""How likely it may be at most that one pair of hosts loses so many more packets than others by chance, for all pairs
that are compared together."""


@frozen(kw_only=True)
class Lossy:
    """Where packets get lost in part."""

    ways: Mapping[frozenset[str], tuple[Counted, ...]] = field(factory=dict)
    """Two adjacent hosts between whom packets get lost -> the requests that this explains."""
    ends: Mapping[frozenset[str], tuple[Counted, ...]] = field(factory=dict)
    """Two hosts whose packets get lost, while others' pass all hops of the way between them -> their requests."""
    forwarders: Mapping[str, tuple[Counted, ...]] = field(factory=dict)
    """Hosts that forward packets of several such pairs, and of no other -> the requests of these pairs."""
    limited: Mapping[str, tuple[str, ...]] = field(factory=dict)
    """Hosts that limit how many echo requests they answer -> the senders."""
    heavy: frozenset[frozenset[str]] = frozenset()
    """Those of `ways` on which at least half of all echo requests got no answer, whoever sent them: one that is lost
    altogether has no other cause."""

    @property
    def hosts(self) -> frozenset[str]:
        """All that are at an end."""
        return frozenset(name for pair in (*self.ways, *self.ends) for name in pair).union(self.forwarders)


def lossy(topology: Topology, live: Live) -> Lossy:
    """Packets that get lost between two hosts are lost on that hop of the way between them on which the largest share
    is, over all ways that it is part of; unless others' packets pass all these hops and far fewer of them are lost:
    then something tells packets apart by their addresses."""
    # Those of whose requests none was answered while they were counted may not be up yet.
    ways = [way for way in counted_ways(topology, live) if way.missing < way.sent]
    if not any(way.missing for way in ways):
        return Lossy()
    limiters = _limited(ways, limiting_hosts(live))
    flows: dict[_Flow, list[Counted]] = {}
    for way in ways:
        if way.target not in limiters:
            flows.setdefault((frozenset((way.sender, way.target)), way.version), []).append(way)
    hops = {flow: hops_between(topology, *sorted(flow[0])) for flow in flows}
    shares = {flow: _share(counted) for flow, counted in flows.items()}
    apart = _apart_from_others(hops, shares)
    by_hop: dict[frozenset[str], list[Counted]] = {}
    for flow, counted in flows.items():
        for hop in () if flow in apart else hops[flow]:
            by_hop.setdefault(hop, []).extend(counted)
    lost = {hop: _share(passing) for hop, passing in by_hop.items()}
    blamed: dict[frozenset[str], list[Counted]] = {}
    ends: dict[frozenset[str], list[Counted]] = {}
    for flow, counted in flows.items():
        if flow in apart:
            ends.setdefault(flow[0], []).extend(counted)
        elif shares[flow].missing:
            hop = min(hops[flow], key=lambda hop: (-lost[hop].least, sorted(hop)))
            blamed.setdefault(hop, []).extend(way for way in counted if way.missing)
    named = {hop: tuple(passing) for hop, passing in blamed.items() if _is_loss(passing, lost[hop])}
    pairs = {pair: tuple(counted) for pair, counted in ends.items() if _is_loss(counted, _share(counted))}
    forwarders = _forwarders(topology, pairs, {flow[0] for flow in flows})
    explained = {frozenset((way.sender, way.target)) for passing in forwarders.values() for way in passing}
    return Lossy(
        ways=named,
        ends={pair: counted for pair, counted in pairs.items() if pair not in explained},
        forwarders=forwarders,
        limited=limiters,
        heavy=frozenset(hop for hop in named if all(2 * way.missing >= way.sent for way in by_hop[hop])),
    )


_Flow = tuple[frozenset[str], int]
"""Two hosts that send each other echo requests, and the family of these."""


@frozen
class _Share:
    """The echo requests without an answer, of so many."""

    missing: int
    sent: int

    @property
    def share(self) -> float:
        """Of those that were sent."""
        return self.missing / self.sent

    @property
    def least(self) -> float:
        """The share less one standard deviation: it is hardly smaller than this."""
        return self.share - math.sqrt(self.share * (1 - self.share) / self.sent)

    def without(self, other: _Share) -> _Share:
        """The requests that are not among the other ones."""
        return _Share(self.missing - other.missing, self.sent - other.sent)

    def chance(self, others: _Share) -> float:
        """How likely it is that of all that are missing so many are here, if as large a share is lost of the others:
        the one-sided exact test of Fisher's."""
        missing, sent = self.missing + others.missing, self.sent + others.sent
        most = min(missing, self.sent)
        ways = sum(
            math.comb(self.sent, number) * math.comb(others.sent, missing - number)
            for number in range(self.missing, most + 1)
        )
        return ways / math.comb(sent, missing)


def _share(parts: Collection[Counted] | Collection[_Share]) -> _Share:
    return _Share(sum(part.missing for part in parts), sum(part.sent for part in parts))


def _is_loss(explained: Collection[Counted], share: _Share) -> bool:
    return _share(explained).missing >= SOME and share.share >= _SHARE


def _apart_from_others(
    hops: Mapping[_Flow, tuple[frozenset[str], ...]], shares: Mapping[_Flow, _Share]
) -> frozenset[_Flow]:  # fmt: skip
    """The flows that lose far more than what others lose on the hops of their ways adds up to: all others on each hop,
    or the one of them that loses least."""
    passing: dict[frozenset[str], list[_Flow]] = {}
    for flow, on_the_way in hops.items():
        for hop in on_the_way:
            passing.setdefault(hop, []).append(flow)
    total, least = {}, {}
    for hop, flows in passing.items():
        total[hop] = _share([shares[flow] for flow in flows])
        least[hop] = min((shares[flow] for flow in flows), key=lambda share: (share.share, -share.sent))

    suspects = [flow for flow, share in shares.items() if share.missing >= SOME]

    def is_apart(flow: _Flow) -> bool:
        share, on_the_way = shares[flow], hops[flow]
        if any(len(passing[hop]) == 1 for hop in on_the_way):
            return False
        by_all = share.chance(_in_a_row([total[hop].without(share) for hop in on_the_way]))
        by_least = share.chance(_in_a_row([least[hop] for hop in on_the_way]))
        # Each is one of many: the flow of all that lose some, and those that lose least of all on their hops.
        chosen = math.prod(len(passing[hop]) for hop in on_the_way)
        return min(by_all * len(suspects), by_least * max(chosen, len(suspects))) < _COINCIDENCE

    return frozenset(filter(is_apart, suspects))


def _in_a_row(hops: Collection[_Share]) -> _Share:
    """What is lost of packets that pass several hops, known no better than that of the hop with the fewest packets."""
    sent = min(hop.sent for hop in hops)
    return _Share(round(sent * (1 - math.prod(1 - hop.share for hop in hops))), sent)


def _forwarders(
    topology: Topology, lost: Mapping[frozenset[str], tuple[Counted, ...]], tried: Collection[frozenset[str]]
) -> dict[str, tuple[Counted, ...]]:  # fmt: skip
    """The hosts that forward the packets of several pairs of hosts, all of which lose some."""
    through: dict[str, set[frozenset[str]]] = {}
    for pair in tried:
        for name in path(topology, *sorted(pair))[1:-1]:
            through.setdefault(name, set()).add(pair)
    return {
        name: tuple(way for pair in sorted(pairs, key=sorted) for way in lost[pair])
        for name, pairs in sorted(through.items())
        if len(pairs) > 1 and pairs <= lost.keys()
    }


def _limited(ways: Iterable[Counted], known: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The targets that leave requests unanswered of hosts that answer all of theirs: of lost packets answers would be
    missing in both directions. `known`: hosts whose firewalls are known to have a limit."""
    missing: dict[tuple[str, str], int] = {}
    for way in ways:
        missing[way.sender, way.target] = missing.get((way.sender, way.target), 0) + way.missing
    to: dict[str, dict[str, int]] = {}
    back: Counter[str] = Counter()
    for (sender, target), number in missing.items():
        if number and (target in known or (target, sender) in missing):
            to.setdefault(target, {})[sender] = number
            back[target] += missing.get((target, sender), 0)
    # With as many lost in each direction on average the one would seldom be so much larger by chance.
    return {
        target: tuple(sorted(senders))
        for target, senders in to.items()
        if target in known or back[target] <= sum(senders.values()) // (2 * SOME) - 1
    }


def counted_ways(topology: Topology, live: Live) -> list[Counted]:
    """The echo requests that the answers count, of each host to each mesh address of another one."""
    nodes, by_address = topology.snapshot.nodes, by_mesh_address(topology)
    return [
        Counted(name, target, 6 if ":" in echo.address else 4, echo.sent, echo.sent - echo.answered)
        for name, answer in live.answers.items()
        if name in nodes
        for echo in answer.echoes
        if (target := by_address.get(echo.address)) is not None and target != name and echo.sent >= echo.answered
    ]


def unsteady(topology: Topology, in_part: Lossy) -> Iterator[Loss]:
    """The ways on which packets get lost in part, one for all of a host."""
    for host, others in by_host(in_part.ways):
        yield _unsteady(
            topology, host, others, in_part.ways,
            "if the network between them loses as many (ping to the endpoint that `wg` shows there), look at links and "
            "queues (ip -s link), else at a firewall's limits (nft list ruleset); a way that has just come up looks "
            "the same: check again",
        )  # fmt: skip
    for host, others in by_host(in_part.ends):
        hosts = dict.fromkeys(name for other in others for name in path(topology, host, other)[1:-1])
        forward = [name for name in hosts if name not in (host, *others)]
        yield _unsteady(
            topology, host, others, in_part.ends,
            "other packets pass the hosts on the way, so look for a rule about these addresses (nft list ruleset; tc) "
            f"on {some((host, *others))}" + (f", or on {some(forward)}, on the way" if forward else ""),
        )  # fmt: skip
    for name, ways in sorted(in_part.forwarders.items()):
        worst, total = _worst(ways), _share(ways)
        yield Loss(
            subject=name, filtered=True,
            text=f"packets get lost that it forwards, and none between it and other hosts: {total.missing} of "
                 f"{total.sent} echo requests got no answer, of {worst.sender} to {worst.target} for instance",
            remedy=f"{_ping(topology, worst)} shows how many; look on {name} for what drops forwarded packets (nft "
                   "list ruleset; tc)",
        )  # fmt: skip


def _unsteady(
    topology: Topology,
    host: str,
    others: list[str],
    counted: Mapping[frozenset[str], tuple[Counted, ...]],
    look: str,
) -> Loss:
    """Between one host and some others."""
    ways = [way for other in others for way in counted[frozenset((host, other))]]
    own = [way for way in ways if host in (way.sender, way.target) and {way.sender, way.target} <= {host, *others}]
    total, worst = _share(ways), _worst(own or ways)
    return Loss(
        subject=host if len(others) > 1 else f"{host} - {others[0]}", filtered=True,
        text=f"{f'between it and {some(others)}' if len(others) > 1 else 'between them'} packets get lost: "
             f"{total.missing} of {total.sent} echo requests got no answer",
        remedy=f"{_ping(topology, worst)} shows how many; {look}",
    )  # fmt: skip


def _worst(ways: Iterable[Counted]) -> Counted:
    return max(ways, key=lambda way: (way.missing / way.sent, -way.version))


def _ping(topology: Topology, way: Counted) -> str:
    address = topology.snapshot.nodes[way.target].mesh_address(way.version)
    return f"`ping -c 100 -i 0.1 {address}` on {way.sender}"


def limited(in_part: Lossy) -> Iterator[Loss]:
    """Hosts that limit how many echo requests they answer."""
    for target, senders in sorted(in_part.limited.items()):
        yield Loss(
            subject=target, filtered=True,
            text=f"it leaves echo requests of {some(senders)} unanswered, whose number its firewall limits",
            remedy="nft list ruleset there: a limit on echo requests does no harm, one on other packets would",
        )  # fmt: skip
