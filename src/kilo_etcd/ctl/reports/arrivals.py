"""Which hosts' packets arrive, by the echo requests that the living agents have sent when they were asked. Pure.

A lost packet alone says little; all of them together say where it is lost. Members that reach nobody outside while
their leader does have a leader that passes nothing on. A host whose echo requests are answered, and that answers none,
filters them. Where no host answers any, sessions of tunnels and answered peer queries are the only signals that are
left: then a finding says what was asked, and that it is not known whether packets arrive. What a tunnel without a
session explains is left to whoever says that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from ipaddress import ip_address
from itertools import pairwise

from attrs import evolve, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.reports.live import Live, Pair, pairs, tunnels
from kilo_etcd.store.status_texts import FORWARDING_LOOK
from kilo_etcd.topology.segments import Topology

TRIES = 64
"""Nodes that each host is to try."""

PAIRS = 20
"""Pairs that are named one by one."""

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
    partly: frozenset[tuple[str, str]] = frozenset()
    """Of the bad pairs those that have reached each other in the other family."""

    def family(self, pairs: Iterable[tuple[str, str]]) -> int | None:
        """The one family in which alone packets between these bad pairs are lost; None: there is no such family."""
        pairs = frozenset(pairs)
        versions = frozenset(version for pair in pairs for version in self.bad.get(pair, ()))
        return next(iter(versions)) if len(versions) == 1 and not pairs.isdisjoint(self.partly) else None

    def meet(self, one: str, other: str) -> bool:
        """Whether one of the two has reached the other, or they are the same."""
        return one == other or (one, other) in self.good or (other, one) in self.good

    @property
    def tried(self) -> frozenset[str]:
        """The hosts that have sent something."""
        return frozenset(sender for sender, _ in (*self.good, *self.bad))

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
        if len(targets) > 1 and answered and others_reach and not any(asker == sender for asker, _ in tried.good):
            remaining = {pair for pair in remaining if pair[0] != sender}
            family = tried.family((sender, target) for target in targets)
            result.append(_unanswered_sender(sender, targets, answered, family))
    for target in sorted({pair[1] for pair in remaining}):
        askers = sorted(one for one, other in (*remaining, *tried.good) if other == target)
        if any((asker, target) in tried.good for asker in askers):
            continue
        if all(_explained(topology, asker, target, down) for asker in askers):
            continue
        reaches = any(sender == target for sender, _ in tried.good)
        if len(askers) < 2 and not reaches:
            continue  # It may as well be the one that asks.
        families = frozenset(version for asker in askers for version in tried.bad[asker, target])
        remaining = {pair for pair in remaining if pair[1] != target}
        own = target in tried.tried
        family = tried.family((asker, target) for asker in askers)
        answer = live.answers.get(target)
        unsent = answer is not None and bool(answer.unsent_peers)
        result.append(
            _unreached(
                topology,
                target,
                askers,
                families,
                own=own,
                reaches=reaches,
                sessions=sessions,
                unsent=unsent,
                family=family,
            )
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
    """Node -> the hosts whose echo requests it has answered, be it in one family, whether its agent lives or not."""
    reached: dict[str, list[str]] = {}
    tried = _tried(topology, live)
    for one, other in sorted(tried.good | tried.partly):
        reached.setdefault(other, []).append(one)
    return {name: tuple(askers) for name, askers in reached.items()}


def by_mesh_address(topology: Topology) -> dict[str, str]:
    """Mesh address -> the node that has it."""
    return {str(address): node.name for node in topology.snapshot.nodes.values() for address in node.mesh_addresses}


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
    return any(hop in pairs for hop in hops_between(topology, one, other))


def lost_hops(topology: Topology, live: Live) -> frozenset[frozenset[str]]:
    """The pairs of adjacent hosts that are part of a way on which packets were lost."""
    return frozenset(hop for pair in lost_pairs(topology, live) for hop in hops_between(topology, *pair))


def good_hops(topology: Topology, live: Live) -> frozenset[frozenset[str]]:
    """The pairs of adjacent hosts between which packets have arrived."""
    return frozenset(hop for pair in _tried(topology, live).good for hop in hops_between(topology, *pair))


def path(topology: Topology, one: str, other: str) -> tuple[str, ...]:
    """The hosts that packets from `one` to `other` pass, both included."""
    here, there = end_of(topology, one), end_of(topology, other)
    return tuple(dict.fromkeys((one, other) if here == there else (one, here, there, other)))


def hops_between(topology: Topology, one: str, other: str) -> tuple[frozenset[str], ...]:
    """The pairs of adjacent hosts that packets from `one` to `other` pass."""
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
    return _Tried(frozenset(good - bad.keys()), bad, frozenset(good & bad.keys()))


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
        text=f"none of the {_ip(tried.family(tried.bad))}echo requests that {senders} to mesh addresses was answered, "
             f"although {signal}: it is not known whether other packets arrive",
        remedy="let ICMP echo requests from the mesh pass the hosts' firewalls; if they do pass, look for what drops "
               "all that comes in by kilo0 (nft list ruleset), and for a rule or route of the operator's (ip rule)",
    )  # fmt: skip


def _ip(family: int | None) -> str:
    """An adjective for packets of one family alone; empty for all."""
    return "" if family is None else f"IPv{family} "


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
    family: int | None = None,
) -> Loss:
    """`own`: it has sent echo requests itself; `reaches`: one of them was answered; `unsent`: its WireGuard receives
    and does not send; `family`: in the other one it is reached."""
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
    its_own = f", nor {'one' if family is None else f'an IPv{family} one'} of its own" if own else ""
    if family is not None:
        return Loss(
            subject=target, text=f"{unanswered}{its_own}, although in IPv{10 - family} it is reached",
            remedy=f"look there for what drops IPv{family} packets that come in by kilo0 or go out by it: nft list "
                   f"ruleset, ip -{family} rule, ip xfrm policy",
        )  # fmt: skip
    far = sorted({pair.one if pair.other == target else pair.other
                  for pair in sessions if target in (pair.one, pair.other)})  # fmt: skip
    if far:
        return Loss(
            subject=target, text=f"{unanswered}{its_own}, although its tunnel to {far[0]} has a session",
            remedy="look there for what drops " + (
                "UDP 51820 (--port) that goes out, or packets that go out by kilo0" if unsent
                else "packets that come in by kilo0 or go out by it"
            ) + ": nft list ruleset, ip rule, ip xfrm policy",
        )  # fmt: skip
    return Loss(
        subject=target, text=f"{unanswered}{its_own}",
        remedy="is the host up? journalctl -u kilo-etcd there; does its firewall (nft list ruleset) let pass what "
               "comes in from the mesh, and what goes out to it?",
    )  # fmt: skip


def _unanswered_sender(sender: str, targets: Iterable[str], answered: Iterable[str], family: int | None) -> Loss:
    return Loss(
        subject=sender,
        text=f"none of the {_ip(family)}echo requests that it sends to {some(targets)} is answered, although it "
             f"answers those of {some(answered)}",
        remedy="look there for what drops or changes its own packets: nft list ruleset and iptables-save (snat, "
               "masquerade, drop), ip rule, ip xfrm policy",
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
        near = sorted({sender for sender, _ in out} | {receiver for _, receiver in back})
        far = sorted({receiver for _, receiver in out} | {sender for sender, _ in back})
        source, target = lost[0]
        way = (
            f"between {some(near)} and {some(far)}"
            if out and back
            else f"from {some(near if out else far)} to {some(far if out else near)}"
        )
        family = tried.family(lost)
        answer = live.answers.get(leader)
        obstacles = () if answer is None else (*answer.trouble, *answer.possible_obstacles)
        yield Loss(
            subject=leader,
            text=f"it leads its location and does not forward{'' if family is None else f' IPv{family}'}: through it "
                 f"{'nothing' if family is None else f'no IPv{family}'} arrives {way}",
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
        family = tried.family(pair for other in others for pair in ((host, other), (other, host)) if pair in lost)
        only = "" if family is None else f" in IPv{family}"
        if first:
            where = f"{first} first, then on {where}"
        yield Loss(
            subject=" - ".join(ends) if len(others) == 1 else f"{first} - {host}" if first else host,
            text=(f"{' and '.join(ends)} do not reach each other{only}" if out and back
                  else f"{ends[0]} {does} not reach {ends[1]}{only}")
                 + (f", and all that is lost passes {first}; what arrives there does not" if first else ""),
            remedy="look for a firewall (nft list ruleset), " + ("a translation of addresses (snat), " if first else "")
                   + f"another program's rule (ip rule) or IPsec policy (ip xfrm policy), on {where}"
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
