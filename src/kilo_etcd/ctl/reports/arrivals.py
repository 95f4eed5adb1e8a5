"""Which hosts' packets arrive, by the echo requests that the living agents have sent when they were asked. Pure.

A lost packet alone says little; all of them together say where it is lost. Members that reach nobody outside while
their leader does have a leader that passes nothing on. A host whose echo requests are answered, and that answers none,
filters them. Where no host answers any, sessions of tunnels and answered peer queries are the only signals that are
left: then a finding says what was asked, and that it is not known whether packets arrive. What a tunnel without a
session explains is left to whoever says that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from ipaddress import ip_address
from itertools import pairwise
from operator import attrgetter

from attrs import evolve, field, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.reports.live import Live, Pair, pairs, tunnels
from kilo_etcd.store.records import DiagnosticsResponse
from kilo_etcd.store.status_texts import FORWARDING_LOOK
from kilo_etcd.topology.segments import Topology

TRIES = 64
"""Nodes that each host is to try."""

PAIRS = 20
"""Pairs that are named one by one."""

_OVERHEAD = {4: 60, 6: 80}
"""Bytes that WireGuard and the outer headers add to a packet, by the family of the endpoint."""

_IPV6_SMALLEST = 1280
"""Bytes: what IPv6 demands of a link (RFC 8200), so of the tunnel too."""

_ECHO_HEADERS = {4: 28, 6: 48}
"""Bytes that `ping -s` adds to the size that it is given, by family."""

SHOWN = 5
"""How many names a sentence lists."""


@frozen(kw_only=True)
class Loss:
    """Packets that do not arrive, in a sentence with its remedy."""

    subject: str
    text: str
    remedy: str
    filtered: bool = False
    """Only echo requests are known to be lost."""
    between: tuple[str, str] | None = None
    """A host and a node or an address; `kgctl explain --live` shows where packets between the two are lost."""

    @property
    def next_steps(self) -> str:
        """The remedy with the command that shows more, if there is one."""
        return self.remedy if self.between is None else f"{self.remedy}; kgctl explain {' '.join(self.between)} --live"


@frozen
class _Tried:
    """Which nodes have reached which, by node and family."""

    good: frozenset[tuple[str, str]]
    bad: Mapping[tuple[str, str], frozenset[int]]
    """Pair -> the families in which there was no answer."""

    def meet(self, one: str, other: str) -> bool:
        """Whether one of the two has reached the other, or they are the same."""
        return one == other or (one, other) in self.good or (other, one) in self.good

    @property
    def tried(self) -> frozenset[str]:
        """The hosts that have sent something."""
        return frozenset(one for one, _ in (*self.good, *self.bad))

    def cut(self, one: str, other: str) -> bool:
        """Whether packets between the two are known to be lost and the findings say so."""
        return ((one, other) in self.bad or (other, one) in self.bad) and not self.meet(one, other)


def losses(
    topology: Topology,
    live: Live,
    down: Collection[frozenset[str]] = (),
    *,
    apart: Collection[frozenset[str]] = (),
    queries_answered: bool = False,
    explained: Callable[[str, str], bool] = lambda one, other: False,
) -> tuple[Loss, ...]:
    """The losses that no other finding explains.

    `down`: pairs of leaders whose tunnel is known to have no session; `apart`: pairs of members of a location that are
    known not to reach each other; `queries_answered`: members of a location answer each other's peer queries.
    `explained`: whether packets from one host to another are known to be lost at a place that is named elsewhere.
    """
    tried = _tried(topology, live)
    bad = {
        pair: versions
        for pair, versions in tried.bad.items()
        if not across(topology, *pair, apart) and not explained(*pair)
    }
    tried = evolve(tried, bad=bad)
    if not tried.bad:
        return ()
    sessions = [pair for pair in pairs(topology, tunnels(topology, live)) if pair.up]
    if (
        (sessions or queries_answered)
        and not tried.good
        and all(not _explained(topology, *pair, down) for pair in tried.bad)
    ):
        return (_unanswered(topology, tried, sessions),)
    result: list[Loss] = []
    tried = _without_limited(tried, live)
    if not tried.bad:
        return ()
    remaining = set(tried.bad)
    for sender in sorted({pair[0] for pair in remaining}):
        targets = sorted(other for one, other in remaining if one == sender)
        answered = sorted(one for one, other in tried.good if other == sender)
        # Packets arrive there, and its answers do here; who does not answer it answers others: so it is what it sends.
        others_reach = any(one != sender and other in targets for one, other in tried.good)
        if len(targets) > 1 and answered and others_reach and not any(one == sender for one, _ in tried.good):
            remaining = {pair for pair in remaining if pair[0] != sender}
            result.append(_unanswered_sender(sender, targets, answered))
    for target in sorted({pair[1] for pair in remaining}):
        askers = sorted(one for one, other in (*remaining, *tried.good) if other == target)
        if any((asker, target) in tried.good for asker in askers):
            continue
        if all(_explained(topology, asker, target, down) for asker in askers):
            continue
        reaches = any(one == target for one, _ in tried.good)
        if len(askers) < 2 and not reaches:
            continue  # It may as well be the one that asks.
        families = frozenset(version for asker in askers for version in tried.bad[asker, target])
        remaining = {pair for pair in remaining if pair[1] != target}
        own = target in tried.tried
        answer = live.answers.get(target)
        unsent = answer is not None and bool(answer.unsent_peers)
        result.append(
            _unreached(topology, target, askers, families, own=own, reaches=reaches, sessions=sessions, unsent=unsent)
        )
    mute = {loss.subject for loss in result if not loss.filtered}
    # A host that is cut off reaches no other host either; one finding is enough.
    remaining = {pair for pair in remaining if pair[0] not in mute}
    result += _by_leader(topology, live, tried, remaining, down)
    return tuple(result)


def _without_limited(tried: _Tried, live: Live) -> _Tried:
    """Without the lost requests to hosts that answer others', and take a limited number."""
    limited = limiting_hosts(live) & {target for _, target in tried.good}
    return evolve(tried, bad={pair: versions for pair, versions in tried.bad.items() if pair[1] not in limited})


def limiting_hosts(live: Live) -> frozenset[str]:
    """The hosts whose firewalls are known to take a limited number of echo requests."""
    return frozenset(name for name, answer in live.answers.items() if answer.limits_echoes)


def reached_by(topology: Topology, live: Live) -> dict[str, tuple[str, ...]]:
    """Node -> the hosts whose echo requests it has answered, whether its agent lives or not."""
    reached: dict[str, list[str]] = {}
    for one, other in sorted(_tried(topology, live).good):
        reached.setdefault(other, []).append(one)
    return {name: tuple(askers) for name, askers in reached.items()}


def narrow(topology: Topology, live: Live) -> Iterator[Loss]:
    """Ways on which small packets arrive and none as large as the tunnel's MTU, one for all ways of a host. Where
    ping works and nothing else does, this is why. Large packets that get lost where small ones do say nothing."""
    limiting, reached = limiting_hosts(live), _to_nodes(topology, live, attrgetter("reached"))
    uncertain = {(way.sender, way.target) for way in _counted(topology, live) if way.missing >= _SOME}
    uncertain |= {pair for pair in reached if pair[1] in limiting}
    lost = _to_nodes(topology, live, attrgetter("small_only")) - uncertain
    passed = reached - uncertain - lost
    blamed = _blamed(topology, lost, passed, lambda sender: live.answers[sender].mtu)
    for host, others in by_host(blamed):
        senders = {sender for other in others for sender in blamed[frozenset((host, other))]}
        size = max(live.answers[sender].mtu for sender in senders)
        yield Loss(
            subject=host if len(others) > 1 else f"{host} - {others[0]}", filtered=True,
            text=f"small packets arrive between it and {some(others)}, and none of {size} bytes does" if len(others) > 1
                 else f"small packets arrive between them, and none of {size} bytes does",
            remedy=_other_mtu(live, (host,) if len(others) > 1 else (host, others[0]), senders)
                   or _smaller(topology, live, host, others[0], size),
        )  # fmt: skip


@frozen
class _Counted:
    """The echo requests that one host has sent to a mesh address of another one that answers some."""

    sender: str
    target: str
    version: int
    sent: int
    missing: int
    """Requests without an answer."""


_SOME = 4
"""Missing answers that are no coincidence, out of some twenty."""

_SHARE = 0.05
"""Of the requests between two hosts: from here on missing answers are a loss to look at."""


_COINCIDENCE = 0.02
"""How likely it may be at most that one pair of hosts loses so many more packets than others by chance, for all pairs
that are compared together."""


@frozen(kw_only=True)
class Lossy:
    """Where packets get lost in part."""

    ways: Mapping[frozenset[str], tuple[_Counted, ...]] = field(factory=dict)
    """Two adjacent hosts between whom packets get lost -> the requests that this explains."""
    ends: Mapping[frozenset[str], tuple[_Counted, ...]] = field(factory=dict)
    """Two hosts whose packets get lost, while others' are not on any hop of the way between them -> their requests."""
    forwarders: Mapping[str, tuple[_Counted, ...]] = field(factory=dict)
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
    ways = [way for way in _counted(topology, live) if way.missing < way.sent]
    if not any(way.missing for way in ways):
        return Lossy()
    limiters = _limited(ways, limiting_hosts(live))
    flows: dict[_Flow, list[_Counted]] = {}
    for way in ways:
        if way.target not in limiters:
            flows.setdefault((frozenset((way.sender, way.target)), way.version), []).append(way)
    hops = {flow: _hops(topology, *sorted(flow[0])) for flow in flows}
    shares = {flow: _share(counted) for flow, counted in flows.items()}
    apart = _apart_from_others(hops, shares)
    by_hop: dict[frozenset[str], list[_Counted]] = {}
    for flow, counted in flows.items():
        for hop in () if flow in apart else hops[flow]:
            by_hop.setdefault(hop, []).extend(counted)
    lost = {hop: _share(passing) for hop, passing in by_hop.items()}
    blamed: dict[frozenset[str], list[_Counted]] = {}
    ends: dict[frozenset[str], list[_Counted]] = {}
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
        """What the share is at least, in all likelihood."""
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


def _share(ways: Collection[_Counted]) -> _Share:
    return _Share(sum(way.missing for way in ways), sum(way.sent for way in ways))


def _is_loss(explained: Collection[_Counted], share: _Share) -> bool:
    return _share(explained).missing >= _SOME and share.share >= _SHARE


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
        total[hop] = _Share(sum(shares[flow].missing for flow in flows), sum(shares[flow].sent for flow in flows))
        least[hop] = min((shares[flow] for flow in flows), key=lambda share: (share.share, -share.sent))

    suspects = [flow for flow, share in shares.items() if share.missing >= _SOME]

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
    topology: Topology, lost: Mapping[frozenset[str], tuple[_Counted, ...]], tried: Collection[frozenset[str]]
) -> dict[str, tuple[_Counted, ...]]:  # fmt: skip
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


def _limited(ways: Iterable[_Counted], known: Collection[str]) -> dict[str, tuple[str, ...]]:
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
        if target in known or back[target] <= sum(senders.values()) // (2 * _SOME) - 1
    }


def by_mesh_address(topology: Topology) -> dict[str, str]:
    """Mesh address -> the node that has it."""
    return {str(address): node.name for node in topology.snapshot.nodes.values() for address in node.mesh_addresses}


def _counted(topology: Topology, live: Live) -> list[_Counted]:
    nodes, by_address = topology.snapshot.nodes, by_mesh_address(topology)
    return [
        _Counted(name, target, 6 if ":" in echo.address else 4, echo.sent, echo.sent - echo.answered)
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
    counted: Mapping[frozenset[str], tuple[_Counted, ...]],
    look: str,
) -> Loss:
    """Between one host and some others."""
    ways = [way for other in others for way in counted[frozenset((host, other))]]
    own = [way for way in ways if host in (way.sender, way.target) and not {way.sender, way.target} - {host, *others}]
    total, worst = _share(ways), _worst(own or ways)
    return Loss(
        subject=host if len(others) > 1 else f"{host} - {others[0]}", filtered=True,
        text=f"{f'between it and {some(others)}' if len(others) > 1 else 'between them'} packets get lost: "
             f"{total.missing} of {total.sent} echo requests got no answer",
        remedy=f"{_ping(topology, worst)} shows how many; {look}",
    )  # fmt: skip


def _worst(ways: Iterable[_Counted]) -> _Counted:
    return max(ways, key=lambda way: (way.missing / way.sent, -way.version))


def _ping(topology: Topology, way: _Counted) -> str:
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


def _to_nodes(
    topology: Topology, live: Live, addresses: Callable[[DiagnosticsResponse], Collection[str]]
) -> set[tuple[str, str]]:
    """The pairs of hosts that have sent packets to mesh addresses, and the nodes that have these, of some addresses of
    the answers."""
    nodes, by_address = topology.snapshot.nodes, by_mesh_address(topology)
    return {
        (name, target)
        for name, answer in live.answers.items()
        if name in nodes
        for address in addresses(answer)
        if (target := by_address.get(address)) is not None and target != name
    }


def _blamed(
    topology: Topology,
    lost: Collection[tuple[str, str]],
    passed: Collection[tuple[str, str]],
    size: Callable[[str], int],
) -> dict[frozenset[str], set[str]]:
    """Two adjacent hosts for each way on which packets got lost, between whom none that was as large is known to have
    passed, and of those the two who have most such ways in common; with the senders. If there are none: the two ends.
    `size`: the bytes of a sender's packets."""
    largest: dict[frozenset[str], int] = {}
    for pair in passed:
        for hop in _hops(topology, *pair):
            largest[hop] = max(largest.get(hop, 0), size(pair[0]))
    suspects = {
        pair: [
            hop for hop in _hops(topology, *pair) if hop not in largest or largest[hop] < size(pair[0])
        ] or [frozenset(pair)]
        for pair in lost
    }  # fmt: skip
    number = Counter(hop for hops in suspects.values() for hop in hops)
    blamed: dict[frozenset[str], set[str]] = {}
    for pair, hops in suspects.items():
        hop = min(hops, key=lambda hop: (-number[hop], sorted(hop)))
        blamed.setdefault(hop, set()).add(pair[0])
    return blamed


def by_host(
    pairs: Iterable[frozenset[str]], prefer: Callable[[str], int] = lambda host: 0
) -> Iterator[tuple[str, list[str]]]:
    """Pairs of hosts, each once, by the host that most of those left have in common, with the others of its pairs.
    `prefer`: of hosts with equally many pairs the one with the largest number."""
    others: dict[str, set[str]] = {}
    for one, other in pairs:
        others.setdefault(one, set()).add(other)
        others.setdefault(other, set()).add(one)
    while others:
        host = min(others, key=lambda name: (-len(others[name]), -prefer(name), name))
        far = sorted(others.pop(host))
        for other in far:
            others[other].discard(host)
            if not others[other]:
                del others[other]
        yield host, far


def _other_mtu(live: Live, hosts: Collection[str], senders: Collection[str]) -> str:
    """What to do if the large packets of `senders` are lost since a device of one of these hosts has another MTU than
    those of most hosts; else empty."""
    mtus = Counter(answer.uplink_mtu for answer in live.answers.values() if answer.uplink)
    usual = max(mtus, key=lambda mtu: (mtus[mtu], mtu), default=0)
    unusual = [
        name
        for name in hosts
        if (answer := live.answers.get(name)) is not None and _loses_large_packets(name, answer, usual, senders)
    ]
    if len(unusual) != 1:
        return ""
    name, answer = unusual[0], live.answers[unusual[0]]
    device, mtu = answer.uplink, answer.uplink_mtu
    smallest = min(answer.mtu for answer in live.answers.values() if answer.mtu)
    otherwise = (
        f"give all hosts {smallest} as --mtu (KILO_MTU) and restart the agents"
        if mtu > answer.mtu
        else f"it carries no mesh with IPv6 addresses, which needs {_IPV6_SMALLEST + _OVERHEAD[4]} bytes or more"
    )
    return (
        f"the MTU of {device} on {name} is {mtu} bytes, and that of other hosts' devices {usual}: if its network "
        f"carries {'more' if mtu < usual else 'less'}, ip link set dev {device} mtu {usual} there, and in the "
        f"configuration of its interfaces; if not, {otherwise}"
    )


def _loses_large_packets(name: str, answer: DiagnosticsResponse, usual: int, senders: Collection[str]) -> bool:
    """Whether the MTU of a host's device is not the usual one, and may be why packets of `senders` are lost."""
    mtu = answer.uplink_mtu
    if mtu in (0, usual):
        return False
    if mtu > usual:
        # The packets of the others are small enough.
        return {*senders} == {name}
    # Its own are too, unless its tunnel takes what IPv6 needs and its device less.
    return name not in senders or mtu - _OVERHEAD[4] < answer.mtu


def _smaller(topology: Topology, live: Live, one: str, other: str, size: int) -> str:
    """What to do about a way between two hosts on which no packet of `size` bytes arrives. How many bytes do arrive is
    not known; so the sentence says how to find that out, through the tunnel, where nothing has to be subtracted."""
    by_node = tunnels(topology, live)
    ends = [end for node, far in ((one, other), (other, one)) for end in by_node.get(node, ()) if end.other == far]
    outer = {6 if end.endpoint.startswith("[") else 4 for end in ends if end.endpoint}
    version = outer.pop() if len(outer) == 1 else None
    less = f"less than {size + _OVERHEAD[version]} bytes" if version else "less than their tunnels take it to"
    overhead = str(_OVERHEAD[version]) if version else "60 in IPv4, less 80 in IPv6"
    address = topology.snapshot.nodes[other].mesh_addresses[0]
    six = any(address.version == 6 for node in (one, other) for address in topology.snapshot.nodes[node].mesh_addresses)
    most = "" if not six else (
        f" (not under {_IPV6_SMALLEST}, which the mesh's IPv6 needs: the way has to carry "
        f"{_IPV6_SMALLEST + _OVERHEAD[version or 6]} bytes)"
    )  # fmt: skip
    return (
        f"the way carries {less}: find on {one} the largest N for which `ping -M do -s N {address}` is answered, give "
        f"both ends N + {_ECHO_HEADERS[address.version]} as --mtu (KILO_MTU){most} and restart the agents (if you know "
        f"the path MTU: that less {overhead}); or let large UDP packets and ICMP's fragmentation-needed pass; a "
        "firewall that drops only large echo requests looks the same"
    )


def lost_across(
    topology: Topology, live: Live, pairs: Collection[frozenset[str]]
) -> tuple[tuple[str, str], ...]:  # fmt: skip
    """The pairs of hosts between which packets were lost on a way that one of these pairs of adjacent hosts is part
    of."""
    return tuple(pair for pair in lost_pairs(topology, live) if across(topology, *pair, pairs))


def lost_pairs(topology: Topology, live: Live) -> tuple[tuple[str, str], ...]:
    """The pairs of hosts between which packets were lost."""
    return tuple(sorted({(min(pair), max(pair)) for pair in _tried(topology, live).bad}))


def cut_pairs(topology: Topology, live: Live) -> frozenset[frozenset[str]]:
    """The pairs of hosts between which packets were lost, and none has arrived."""
    tried = _tried(topology, live)
    return frozenset(frozenset(pair) for pair in tried.bad if tried.cut(*pair))


def across(topology: Topology, one: str, other: str, pairs: Collection[frozenset[str]]) -> bool:
    """Whether one of these pairs of adjacent hosts is part of the way from `one` to `other`."""
    return any(hop in pairs for hop in _hops(topology, one, other))


def lost_hops(topology: Topology, live: Live) -> frozenset[frozenset[str]]:
    """The pairs of adjacent hosts that are part of a way on which packets were lost."""
    return frozenset(hop for pair in lost_pairs(topology, live) for hop in _hops(topology, *pair))


def good_hops(topology: Topology, live: Live) -> frozenset[frozenset[str]]:
    """The pairs of adjacent hosts between which packets have arrived."""
    return frozenset(hop for pair in _tried(topology, live).good for hop in _hops(topology, *pair))


def path(topology: Topology, one: str, other: str) -> tuple[str, ...]:
    """The hosts that packets from `one` to `other` pass, both included."""
    here, there = end_of(topology, one), end_of(topology, other)
    return tuple(dict.fromkeys((one, other) if here == there else (one, here, there, other)))


def _hops(topology: Topology, one: str, other: str) -> tuple[frozenset[str], ...]:
    return tuple(map(frozenset, pairwise(path(topology, one, other))))


def _tried(topology: Topology, live: Live) -> _Tried:
    by_address = by_mesh_address(topology)
    living = {*live.answers, *live.silent}
    good: set[tuple[str, str]] = set()
    bad: dict[tuple[str, str], frozenset[int]] = {}
    for name, answer in live.answers.items():
        if name not in topology.snapshot.nodes:
            continue
        for address in answer.unreached:
            target = by_address.get(address)
            # That an agent is not there is said anyway; its host may be off.
            if target is not None and target != name and target in living:
                pair = name, target
                bad[pair] = bad.get(pair, frozenset()) | {ip_address(address).version}
        good |= {(name, by_address[address]) for address in answer.reached if address in by_address}
    return _Tried(frozenset(good - bad.keys()), bad)


def _explained(topology: Topology, one: str, other: str, down: Collection[frozenset[str]]) -> bool:
    return frozenset((end_of(topology, one), end_of(topology, other))) in down


def _unanswered(topology: Topology, tried: _Tried, sessions: Collection[Pair]) -> Loss:
    """Nobody answers an echo request. Whether packets arrive all the same, nothing that was asked can tell."""
    number = len(tried.tried)
    senders = f"{number} hosts sent" if number > 1 else f"{next(iter(tried.tried))} sent"
    tunnel = f"{len(sessions)} tunnel{' has a session' if len(sessions) == 1 else 's have sessions'}"
    signal = tunnel if sessions else "members of a location answer each other's peer queries"
    return Loss(
        subject="packets", filtered=True,
        text=f"none of the echo requests that {senders} to mesh addresses was answered, although {signal}: it is not "
             "known whether other packets arrive",
        remedy="let ICMP echo requests from the mesh pass the hosts' firewalls; if they do pass, look for what drops "
               "all that comes in by kilo0 (nft list ruleset), and for a rule or route of the operator's (ip rule)",
    )  # fmt: skip


def end_of(topology: Topology, name: str) -> str:
    """The node whose tunnel carries what a node sends elsewhere."""
    return topology.segment_of(name).leader.name


def _unreached(
    topology: Topology,
    target: str,
    askers: list[str],
    families: frozenset[int],
    *,
    own: bool,
    reaches: bool,
    sessions: Collection[Pair],
    unsent: bool = False,
) -> Loss:
    """`own`: it has sent echo requests itself; `reaches`: one of them was answered; `unsent`: its WireGuard receives
    and does not send."""
    addresses = " and ".join(
        str(address) for address in topology.snapshot.nodes[target].mesh_addresses if address.version in families
    )
    if reaches:
        return Loss(
            subject=target, filtered=True,
            text=f"its own packets are answered, but echo requests to {addresses} are not (tried by {some(askers)})",
            remedy="let ICMP echo requests from the mesh pass its firewall: without them it is not known whether "
                   "packets arrive there",
        )  # fmt: skip
    unanswered = f"no echo request to it at {addresses} was answered (tried by {some(askers)})"
    its_own = ", nor one of its own" if own else ""
    far = sorted({pair.one if pair.other == target else pair.other
                  for pair in sessions if target in (pair.one, pair.other)})  # fmt: skip
    if far:
        return Loss(
            subject=target, text=f"{unanswered}{its_own}, although its tunnel to {far[0]} has a session",
            remedy="look there for what drops " + (
                "UDP 51820 (--port) that goes out, or packets that go out by kilo0" if unsent
                else "packets that come in by kilo0 or go out by it"
            ) + ": nft list ruleset, ip rule",
        )  # fmt: skip
    return Loss(
        subject=target, text=f"{unanswered}{its_own}",
        remedy="is the host up? journalctl -u kilo-etcd there; does its firewall (nft list ruleset) let pass what "
               "comes in from the mesh, and what goes out to it?",
    )  # fmt: skip


def _unanswered_sender(sender: str, targets: Iterable[str], answered: Iterable[str]) -> Loss:
    return Loss(
        subject=sender,
        text=f"none of the echo requests that it sends to {some(targets)} is answered, although it answers those of "
             f"{some(answered)}",
        remedy="look there for what drops or changes its own packets: nft list ruleset and iptables-save (snat, "
               "masquerade, drop), ip rule",
    )  # fmt: skip


def _by_leader(
    topology: Topology,
    live: Live,
    tried: _Tried,
    remaining: Collection[tuple[str, str]],
    down: Collection[frozenset[str]],
) -> Iterator[Loss]:
    blamed: dict[str, list[tuple[str, str]]] = {}
    alone: list[tuple[str, str]] = []
    for one, other in sorted(remaining):
        here, there = end_of(topology, one), end_of(topology, other)
        if here == there:
            # Within a segment nobody else is on the way.
            alone.append((one, other))
        elif _explained(topology, one, other, down) or tried.cut(one, here) or tried.cut(there, other):
            continue
        elif there != other and (one, there) in tried.good:
            blamed.setdefault(there, []).append((one, other))
        elif here != one and (tried.meet(here, other) or tried.meet(here, there)):
            blamed.setdefault(here, []).append((one, other))
        elif there != other and (tried.meet(there, one) or tried.meet(there, here)):
            blamed.setdefault(there, []).append((one, other))
        else:
            alone.append((one, other))
    alone += _take_ambiguous(topology, tried, blamed)
    for leader, lost in sorted(blamed.items()):
        own = {node.name for node in topology.segment_of(leader).members}
        out, back = [pair for pair in lost if pair[0] in own], [pair for pair in lost if pair[0] not in own]
        near = sorted({one for one, _ in out} | {other for _, other in back})
        far = sorted({other for _, other in out} | {one for one, _ in back})
        source, target = lost[0]
        way = (
            f"between {some(near)} and {some(far)}"
            if out and back
            else f"from {some(near if out else far)} to {some(far if out else near)}"
        )
        answer = live.answers.get(leader)
        obstacles = () if answer is None else (*answer.trouble, *answer.possible_obstacles)
        yield Loss(
            subject=leader,
            text=f"it leads its location and does not forward: through it nothing arrives {way}",
            remedy="; ".join(obstacles) or f"look there for {FORWARDING_LOOK}",
            between=None if obstacles else (source, target),
        )  # fmt: skip
    yield from _apart(topology, set(alone), tried)


def _apart(topology: Topology, lost: Collection[tuple[str, str]], tried: _Tried) -> Iterator[Loss]:
    """Pairs of which nothing tells at which host packets are lost, by the host that most of them have in common; if
    they share another one that others' packets to the same hosts do not pass, that is named first."""
    hosts = list(by_host({frozenset(pair) for pair in lost}))
    for host, others in hosts[:PAIRS]:
        out = any((host, other) in lost for other in others)
        back = any((other, host) in lost for other in others)
        ends = (host, some(others)) if out else (some(others), host)
        if len(others) == 1 and out and back:
            ends = (min(ends), max(ends))
        does = "do" if not out and len(others) > 1 else "does"
        first = _on_lost_ways_only(topology, lost, tried, host, others)
        leaders = {name for other in others for name in path(topology, host, other)[1:-1]}
        between = sorted(leaders - {host, first, *others})
        where = "one of the two" if len(others) == 1 else host
        if first:
            where = f"{first} first, then on {where}"
        yield Loss(
            subject=" - ".join(ends) if len(others) == 1 else f"{first} - {host}" if first else host,
            text=(f"{' and '.join(ends)} do not reach each other" if out and back
                  else f"{ends[0]} {does} not reach {ends[1]}")
                 + (f", and all that is lost passes {first}; what arrives there does not" if first else ""),
            remedy="look for a firewall (nft list ruleset), " + ("a translation of addresses (snat), " if first else "")
                   + f"or another program's rule (ip rule), on {where}"
                   + (f", on {' or '.join(between)}" if between else "") + ", or on the way"
                   + ("" if between or any(end_of(topology, host) != end_of(topology, other) for other in others)
                      else "; and for a wrong entry in the neighbour table (ip neigh)"),
            between=next((one, other) for one, other in sorted(lost) if host in (one, other)),
        )  # fmt: skip
    if more := hosts[PAIRS:]:
        number = sum(len(others) for _, others in more)
        yield Loss(
            subject="packets",
            text=f"{number} more pairs do not reach each other, of {some(host for host, _ in more)}",
            remedy="mend what is named first, then ask again",
        )  # fmt: skip


def _on_lost_ways_only(
    topology: Topology, lost: Collection[tuple[str, str]], tried: _Tried, host: str, others: Collection[str]
) -> str:  # fmt: skip
    """The one node besides `host` that all lost packets between it and several others pass, and none that arrive where
    these should; empty: there is none, or there are several."""
    pairs = {pair for other in others for pair in ((host, other), (other, host)) if pair in lost}
    targets = {target for _, target in pairs}
    passed = {name for pair in tried.good if pair[1] in targets for name in path(topology, *pair)}
    shared = set.intersection(*({*path(topology, *pair)} for pair in pairs)) - passed - {host}
    return shared.pop() if len(others) > 1 and passed and len(shared) == 1 else ""


def _take_ambiguous(
    topology: Topology, tried: _Tried, blamed: dict[str, list[tuple[str, str]]]
) -> list[tuple[str, str]]:
    """Takes the pairs of hosts of which a leader that forwards other packets may not be the reason: pairs for which two
    leaders are blamed, one for each direction, since one lost direction loses the answers of the other; and all pairs
    for which one is blamed, if another host is part of each of them."""
    forwarding = {
        end_of(topology, member)
        for one, other in tried.good
        if end_of(topology, one) != end_of(topology, other)
        for member in (one, other)
        if end_of(topology, member) != member
    }
    leaders: dict[frozenset[str], set[str]] = {}
    for leader, lost in blamed.items():
        for pair in lost:
            leaders.setdefault(frozenset(pair), set()).add(leader)
    ambiguous = {pair for pair, both in leaders.items() if len(both) > 1 and both <= forwarding}
    taken = [pair for lost in blamed.values() for pair in lost if frozenset(pair) in ambiguous]
    for leader, lost in list(blamed.items()):
        rest = [pair for pair in lost if frozenset(pair) not in ambiguous]
        common = set(rest[0]).intersection(*rest[1:]) - {leader} if rest else set()
        if leader in forwarding and common:
            taken += rest
            rest = []
        blamed[leader] = rest
        if not rest:
            del blamed[leader]
    return taken


def some(names: Iterable[str]) -> str:
    """The first few names."""
    return first_of(names, SHOWN)
