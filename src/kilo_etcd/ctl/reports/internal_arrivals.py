"""Which internal IPs that the mesh routes do not answer, by the echo requests of the living agents, and why. Pure.

An agent that is asked sends an echo request from the route's source address to each internal IP that its plan has a
route to. What does not arrive at the mesh address either is left to `ctl.reports.arrivals`, and a route that is not the
plan's to `ctl.reports.evidence`. What remains tells the two apart by address: a firewall.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import IntEnum
from ipaddress import ip_address

from attrs import field, frozen

from kilo_etcd.ctl.reports.arrivals import PAIRS, Loss, across, by_mesh_address, end_of, some
from kilo_etcd.ctl.reports.evidence import Evidence
from kilo_etcd.ctl.reports.exemptions import exemptions
from kilo_etcd.ctl.reports.live import Live
from kilo_etcd.store.records import DiagnosticsResponse
from kilo_etcd.topology.segments import Topology

_Pair = tuple[str, str]


@frozen
class _Echoes:
    """Internal IPs by pairs of nodes, the sender first."""

    good: frozenset[_Pair] = frozenset()
    lost: Mapping[_Pair, tuple[str, ...]] = field(factory=dict)
    """Although a mesh address of the node has answered."""


def internal_losses(
    topology: Topology,
    live: Live,
    places: Evidence,
    apart: Collection[frozenset[str]] = (),
    *,
    missing: Collection[str] = (),
    explained: Callable[[str, str], bool] = lambda one, other: False,
) -> tuple[Loss, ...]:
    """One for each host that is known to be the place, then the pairs that remain; of each kind the first `PAIRS`.

    `places`: the places that other findings name. `apart`: pairs of members of a location that do not reach each other,
    or of which that is not known yet. `missing`: internal IPs that their hosts do not have, which their agents report.
    `explained`: whether another finding says why echo requests between two hosts are lost.
    """
    losses = []
    echoes = _echoes(topology, live, places, frozenset(missing))
    remaining = {pair for pair in echoes.lost if not across(topology, *pair, apart) and not explained(*pair)}
    for _ in range(PAIRS):
        if (place := _place(topology, echoes, remaining)) is None:
            break
        role, name = place
        passing = {pair for pair in remaining if place in _places(topology, *pair)}
        remaining -= passing
        losses.append(_at(topology, live, name, role, sorted(passing), echoes))
    losses.extend(_by_pairs(topology, live, sorted(remaining), echoes))
    return tuple(losses)


def _echoes(topology: Topology, live: Live, places: Evidence, missing: frozenset[str]) -> _Echoes:
    nodes = topology.snapshot.nodes
    mesh = by_mesh_address(topology)
    internal = {
        str(address): holders[0] for address, holders in topology.internals.holders.items() if len(holders) == 1
    }
    good: set[_Pair] = set()
    lost: dict[_Pair, tuple[str, ...]] = {}
    for name, answer in live.answers.items():
        if name not in nodes:
            continue
        reached = {mesh[address] for address in answer.reached if address in mesh}
        lost_too = {
            (mesh[address], ip_address(address).version) for address in answer.unreached if address in mesh
        }  # fmt: skip
        good |= {(name, internal[address]) for address in answer.reached if address in internal}
        for address in answer.unreached:
            target = internal.get(address)
            if target is None or target not in reached or target in places.limiting:
                continue
            if (target, ip_address(address).version) in lost_too:
                continue
            own = {str(ip.ip) for ip in nodes[name].internal_ips}
            # The answer may take another route than the agent's, too. A host has an error of its own for that, as one
            # has that lacks an address.
            if address not in missing and not own & missing and not places.between(name, target, (address,), own):
                lost[name, target] = (*lost.get((name, target), ()), address)
    return _Echoes(frozenset(good - lost.keys()), lost)


class InternalRole(IntEnum):
    """The part that a host has in the path of lost packets. Of roles that explain equally many losses the lowest
    counts."""

    RECEIVES = 0
    SENDS = 1
    ENDS = 2
    """It receives or sends them."""
    FORWARDS = 3
    """As the leader of one of the two."""


_Place = tuple[InternalRole, str]


def _places(topology: Topology, one: str, other: str) -> Iterator[_Place]:
    """The hosts that packets from `one` to `other` pass, and what they do with them."""
    yield InternalRole.SENDS, one
    yield InternalRole.RECEIVES, other
    yield InternalRole.ENDS, one
    yield InternalRole.ENDS, other
    for name in (one, other):
        if (leader := end_of(topology, name)) != name:
            yield InternalRole.FORWARDS, leader


def _place(topology: Topology, echoes: _Echoes, remaining: Iterable[_Pair]) -> _Place | None:
    """The place that most of the losses have in common and nothing that has arrived; None: no two have any."""
    innocent = {place for pair in echoes.good for place in _places(topology, *pair)}
    number: dict[_Place, int] = {}
    for pair in remaining:
        for place in _places(topology, *pair):
            if place not in innocent:
                number[place] = number.get(place, 0) + 1
    most = max(number.values(), default=0)
    return None if most < 2 else min(place for place, count in number.items() if count == most)


_DOES = {
    InternalRole.RECEIVES: "no echo request to its internal IP {own} is answered (tried by {far})",
    InternalRole.SENDS: "no echo request that it sends to the internal IPs of {far} is answered",
    InternalRole.ENDS: "no echo request between its internal IP and those of {far} is answered",
    InternalRole.FORWARDS: "it leads its location, and no echo request to internal IPs arrives through it, for "
    "instance from {first}",
}


def _at(topology: Topology, live: Live, name: str, role: InternalRole, pairs: list[_Pair], echoes: _Echoes) -> Loss:
    one, other = pairs[0]
    own = dict.fromkeys(address for pair in pairs for address in echoes.lost[pair])
    far = sorted({host for pair in pairs for host in pair} - {name})
    # If it is the only member that was tried, its leader may as well be the place.
    hosts = list(dict.fromkeys((name, end_of(topology, name))))
    text = _DOES[role].format(own=some(own), far=some(far), first=f"{one} to {other}")
    return Loss(
        subject=name, text=f"{text}, although echo requests to mesh addresses are answered",
        remedy=_remedy(topology, live, hosts, one, echoes.lost[one, other][0]),
        between=(one, echoes.lost[one, other][0]),
    )  # fmt: skip


def _by_pairs(topology: Topology, live: Live, pairs: list[_Pair], echoes: _Echoes) -> Iterator[Loss]:
    unordered = sorted({(min(pair), max(pair)) for pair in pairs})
    for pair in unordered[:PAIRS]:
        one, other = pair if pair in echoes.lost else pair[::-1]
        address = echoes.lost[one, other][0]
        on_the_way = list(dict.fromkeys(name for _, name in _places(topology, one, other)))
        yield Loss(
            subject=f"{one} - {other}",
            text=f"{one} and {other} do not reach each other at internal IPs ({address} for instance), although they "
                 "do at mesh addresses"
                 if pair in echoes.lost and pair[::-1] in echoes.lost
                 else f"{one} does not reach {other} at its internal IP {address}, although it does at the mesh "
                 "address",
            remedy=_remedy(topology, live, on_the_way, one, address),
            between=(one, address),
        )  # fmt: skip
    if more := unordered[PAIRS:]:
        yield Loss(
            subject="internal-ips",
            text=f"{len(more)} more pairs do not reach each other at internal IPs, "
                 f"{some(f'{one} - {other}' for one, other in more)}",
            remedy="mend what is named first, then ask again",
        )  # fmt: skip


def _past_the_tunnels(
    topology: Topology, answer: DiagnosticsResponse, name: str, source: str, address: str
) -> Iterator[str]:
    """That a host's exemption has its echo requests to, or its answers from, an internal IP leave in clear."""
    own = [ip.ip for ip in topology.snapshot.nodes[source].internal_ips]
    far = [ip_address(address)] if name == source else own
    for exemption in exemptions(answer.clear):
        network = exemption.network
        if exemption.protocol == "icmp" and any(ip.version == network.version and ip in network for ip in far):
            yield f"its --clear {exemption} has these packets travel outside the tunnels, where there may be no path"


def _remedy(topology: Topology, live: Live, hosts: Iterable[str], source: str, address: str) -> str:
    names = [name for name in hosts if name in topology.snapshot.nodes]
    obstacles = [
        f"{name}: {text}"
        for name in names
        if (answer := live.answers.get(name)) is not None
        for text in (
            *answer.trouble,
            *answer.possible_obstacles,
            *_past_the_tunnels(topology, answer, name, source, address),
        )
    ]
    commands = "nft list ruleset, iptables-save, ip xfrm policy"
    look = f"look on {some(names)} for what drops packets by their addresses: {commands}"
    return "; ".join((*obstacles, look, "the mesh address works"))
