"""Joins the agents' reports on members that do not answer into one error for each cause. Pure.

Each agent names every member that does not answer it. If hosts without a label share no network, each of them names all
others, and `check` would report the lost packets of each pair too. This module makes one sentence of it that names all
these hosts. While agents are still asking, it is too early to name a cause.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from enum import IntEnum
from itertools import islice

from attrs import frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.reports.arrivals import PAIRS, cut_pairs, end_of
from kilo_etcd.ctl.reports.live import Live
from kilo_etcd.ctl.reports.report import unsigned
from kilo_etcd.planning.reach import about_member, apart, called_location, names_route, share, targets
from kilo_etcd.store.records import StatusRecord, Unreachable
from kilo_etcd.store.status_texts import NO_BASELINE, WAS_DEMOTED
from kilo_etcd.topology.forced_addresses import lacks
from kilo_etcd.topology.segments import Topology

EARLY_SECONDS = 10.0
"""An agent that has run for less has not had the time for handshakes with all peers and queries to all members."""

FEW = 5
"""Members of a location that are looked at for whether they answer each other."""


class Kind(IntEnum):
    """How two members do not reach each other; the worst first."""

    NEVER = 0
    """They never have, so nothing is sent."""
    NO_LONGER = 1
    TUNNELED = 2
    """Not through the tunnel between them."""
    STRANGERS = 3
    """Something answers at their internal IPs that has not their keys, and no packet between them arrives."""


@frozen(kw_only=True)
class Silence:
    """What is known of members of one location, by pairs of names."""

    apart: Mapping[frozenset[str], Kind]
    """They do not reach each other."""
    undecided: frozenset[frozenset[str]]
    """It is not known yet whether they do."""
    young: frozenset[str]
    """Hosts whose agents have started a moment ago."""
    queries_answered: bool
    """Some members answer each other's peer queries."""
    rerouted: frozenset[frozenset[str]] = frozenset()
    """Of `apart`, the pairs of which an agent's error names another program's route as the reason."""
    alone: frozenset[str] = frozenset()
    """Hosts that no other member of their location reaches, so that nothing arrives through them either."""

    def covers_unsigned(self, pairs: Collection[tuple[str, str]]) -> bool:
        """Whether `causes` covers a remark on members that are answered, but not with each other's keys."""
        return bool(pairs) and all(self.apart.get(frozenset(pair)) is Kind.STRANGERS for pair in pairs)

    def covers(self, name: str, error: str) -> bool:
        """Whether `causes` covers an agent's error: it is about such a pair, or follows from one."""
        if error.startswith(NO_BASELINE):
            return any(name in pair and error.startswith(f"{NO_BASELINE} {min(pair - {name})},") for pair in self.apart)
        if error.startswith(WAS_DEMOTED):
            return name in self.alone
        member = about_member(error)
        if member:
            pair = frozenset((name, member))
            return pair in self.apart and not (pair in self.rerouted and names_route(error))
        return member == "" and any(name in pair for pair in self.apart)


def silence(topology: Topology, statuses: Mapping[str, StatusRecord], live: Live) -> Silence:
    """What the living agents say, as far as it is about the members and the addresses that are in force."""
    nodes = topology.snapshot.nodes
    kinds: dict[frozenset[str], Kind] = {}
    for name, status in statuses.items():
        if name not in nodes or not status.unreachable:
            continue
        current = {(target.node, str(target.address)) for target in targets(topology, name)}
        for unreachable in status.unreachable:
            if (unreachable.node, unreachable.address) in current:
                pair, kind = frozenset((name, unreachable.node)), _kind(unreachable, topology)
                kinds[pair] = min(kind, kinds.get(pair, kind))
    cut = cut_pairs(topology, live)
    for one, other in unsigned(statuses, statuses, topology):
        # A tunnel between the two would not lead to the internal IP.
        if (pair := frozenset((one, other))) in cut and end_of(topology, one) == end_of(topology, other):
            kinds.setdefault(pair, Kind.STRANGERS)
    undecided = {
        frozenset((name, other))
        for name, answer in live.answers.items()
        for other in answer.undecided
        if name in nodes and other in nodes
    }
    return Silence(
        apart=kinds,
        undecided=frozenset(undecided - kinds.keys()),
        young=frozenset(name for name in live.answers if _young(statuses.get(name), live.answers[name].time)),
        queries_answered=_queries_answered(topology, statuses, kinds.keys() | undecided),
        rerouted=frozenset(_rerouted(statuses) & kinds.keys()),
        alone=frozenset(
            name for name in frozenset[str]().union(*kinds)
            if all(
                node.name == name or frozenset((name, node.name)) in kinds
                for node in topology.segment_of(name).members
            )
        ),
    )  # fmt: skip


def _rerouted(statuses: Mapping[str, StatusRecord]) -> set[frozenset[str]]:
    return {
        frozenset((name, about_member(error) or ""))
        for name, status in statuses.items()
        for error in status.errors
        if names_route(error)
    }


def _kind(unreachable: Unreachable, topology: Topology) -> Kind:
    tunneled = unreachable.address in map(str, topology.snapshot.nodes[unreachable.node].mesh_addresses)
    return Kind.TUNNELED if tunneled else Kind.NO_LONGER if unreachable.routed else Kind.NEVER


def _young(status: StatusRecord | None, time: int) -> bool:
    """Whether the agent has run for a moment only, by its own host's clock; `time`: milliseconds since 1970."""
    try:
        started = datetime.fromisoformat(status.since).timestamp() if status is not None else 0.0
    except ValueError:
        return False
    return 0 <= time / 1000 - started < EARLY_SECONDS


def _queries_answered(
    topology: Topology, statuses: Mapping[str, StatusRecord], silent: Collection[frozenset[str]]
) -> bool:  # fmt: skip
    for segment in topology.segments.values():
        living = (node.name for node in segment.members if node.name in statuses and statuses[node.name].answers)
        sample = list(islice(living, FEW))
        if any(frozenset((one, other)) not in silent for one in sample for other in sample if one < other):
            return True
    return False


@frozen(kw_only=True)
class Cause:
    """Members of a location that do not reach each other, in a sentence with its remedy."""

    subject: str
    text: str
    remedy: str


_SAYS = {
    Kind.NEVER: ("have never answered each other at their internal IPs", ""),
    Kind.NO_LONGER: ("no longer answer each other at their internal IPs", "is the location's network up? "),
    Kind.TUNNELED: (
        "do not answer each other through their tunnels inside the location",
        "let UDP 51820 (--port) pass between them; ",
    ),
    Kind.STRANGERS: (
        "do not reach each other: something answers at their internal IPs, but not with their keys",
        "do other hosts have these addresses there? ",
    ),
}


def causes(topology: Topology, silence: Silence, missing: Collection[str] = ()) -> Iterator[Cause]:
    """One for each location and kind, with all pairs that it explains. `missing`: internal IPs that their hosts do not
    have, which explains why these do not answer there."""
    groups: dict[tuple[str, Kind], list[frozenset[str]]] = {}
    for pair, kind in silence.apart.items():
        if pair in silence.rerouted:
            continue  # The agent's own error names the reason.
        if kind is not Kind.TUNNELED and any(lacks(topology.snapshot.nodes[name], missing) for name in pair):
            continue
        location = topology.snapshot.nodes[min(pair)].location
        groups.setdefault((location, kind), []).append(pair)
    for (location, kind), pairs in sorted(groups.items()):
        yield _cause(topology, location, kind, pairs)


def _cause(topology: Topology, location: str, kind: Kind, pairs: list[frozenset[str]]) -> Cause:
    where = called_location(location)
    names = sorted(frozenset().union(*pairs))
    centre = sorted(frozenset.intersection(*pairs))
    shown = sorted(" - ".join(sorted(pair)) for pair in pairs)
    verb, first = _SAYS[kind]
    if len(pairs) == 1:
        subject, text = shown[0], f"they {verb}"
        labelled = next((name for name in names if topology.segment_of(name).leader.name != name), names[0])
        hosts, quantity = "the two", "both"
    elif len(centre) == 1:
        other_names = [name for name in names if name != centre[0]]
        subject, text, labelled = centre[0], f"it and {first_of(other_names, PAIRS)} {verb}", centre[0]
        hosts, quantity = "they", "all"
    else:
        subject, labelled = where.partition(",")[0], "NODE"
        all_pairs = 2 * len(pairs) == len(names) * (len(names) - 1)
        text = (
            f"{first_of(names, PAIRS)} {verb}"
            if all_pairs
            else f"{len(pairs)} pairs of its hosts {verb}: {first_of(shown, PAIRS)}"
        )
        hosts, quantity = "they", "all"
    remedy = apart(labelled, hosts, f"{quantity} are at {where}")
    if kind is not Kind.TUNNELED:
        remedy += share(labelled)
    return Cause(subject=subject, text=text + _cut_off(topology, kind, names, pairs), remedy=first + remedy)


def _cut_off(topology: Topology, kind: Kind, names: list[str], pairs: Collection[frozenset[str]]) -> str:
    """Which of them reach no other location, since it is their leader that does not answer."""
    if kind not in (Kind.NEVER, Kind.STRANGERS) or len(topology.segments) < 2:
        return ""
    leaders = ((name, topology.segment_of(name).leader.name) for name in names)
    lone = [name for name, leader in leaders if name != leader and frozenset((name, leader)) in pairs]
    return f"; {first_of(lone, PAIRS)} cannot reach other locations" if lone else ""
