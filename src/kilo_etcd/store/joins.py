"""The two rules that bind records to each other: one public key, one owner; one network, one node.

Both are indexes that take one change at a time and answer with the owners whose standing it may have changed, so
that a change in a mesh of ten thousand costs what it touches. Both depend only on what is in them, never on the
order in which it came: agents that hold the same records judge the same.

`Seniority` is (create revision, name): the older registration wins, and no two are equal.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Set
from typing import TypeAlias

from kilo_etcd.model import IPNetwork

Owner: TypeAlias = tuple[str, str]
"""("node" or "peer", name)."""
Seniority: TypeAlias = tuple[int, str]
_Place: TypeAlias = tuple[int, int, int]
"""(family, first address, prefix length): sorted, a network stands right before the networks inside it."""


class KeyIndex:
    """Who claims which public key. Two nodes of one key: neither is programmed. A peer never costs a node its place:
    whoever may write one peer could put any host out of the mesh otherwise."""

    def __init__(self) -> None:
        self._owners: dict[str, set[Owner]] = {}
        self._key_of: dict[Owner, str] = {}

    def claim(self, owner: Owner, key: str | None) -> set[Owner]:
        """`owner` claims `key` (None: nothing any more). Returns the others concerned."""
        old = self._key_of.get(owner)
        if old == key:
            return set()
        concerned: set[Owner] = set()
        if old is not None:
            rest = self._owners[old]
            rest.discard(owner)
            concerned |= rest
            if not rest:
                del self._owners[old]
            del self._key_of[owner]
        if key is not None:
            concerned |= self._owners.setdefault(key, set())
            self._owners[key].add(owner)
            self._key_of[owner] = key
        return concerned

    def rivals(self, owner: Owner) -> list[Owner]:
        """The other owners of the same key that keep `owner` from being in force, sorted."""
        key = self._key_of.get(owner)
        others = sorted(self._owners[key] - {owner}) if key is not None else []
        return [other for other in others if other[0] == "node"] if owner[0] == "node" else others


class NetworkIndex:
    """Which node has which networks behind it. Where two nodes' networks overlap the senior keeps its own.

    Networks overlap only by one lying within the other, so the neighbours of a network are found by bisection
    (those inside it) and by trying the prefix lengths in use (those around it). Who wins is decided within a
    connected group of overlapping networks: in order of seniority, each stands unless it overlaps one that stands.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._lengths: Counter[tuple[int, int]] = Counter()
        self._claims: dict[_Place, dict[str, Seniority]] = {}
        self._network: dict[_Place, IPNetwork] = {}
        self._of: dict[str, tuple[tuple[_Place, ...], Seniority]] = {}
        self._lost: dict[str, dict[IPNetwork, tuple[str, IPNetwork]]] = {}

    def claim(self, node: str, networks: tuple[IPNetwork, ...], seniority: Seniority) -> set[str]:
        """`node` claims `networks` and nothing else. Returns the other nodes whose losses changed."""
        places = tuple(_place(network) for network in networks)
        old_places, old_seniority = self._of.get(node, ((), None))
        if old_places == places and (old_seniority == seniority or not places):
            return set()
        concerned: set[_Place] = set()
        for place in old_places:
            concerned |= self._remove(place, node)
        self._of.pop(node, None)
        self._lost.pop(node, None)
        if places:
            self._of[node] = (places, seniority)
        for place, network in zip(places, networks, strict=True):
            self._add(place, network, node, seniority)
            concerned.add(place)
        changed: set[str] = set()
        while concerned:
            group = self._group(concerned.pop())
            concerned -= group
            changed |= self._judge(group)
        changed.discard(node)
        return changed

    def lost(self, node: str) -> dict[IPNetwork, tuple[str, IPNetwork]]:
        """The networks that `node` claims in vain -> (the node that has it, its network)."""
        return self._lost.get(node, {})

    def _add(self, place: _Place, network: IPNetwork, node: str, seniority: Seniority) -> None:
        if place not in self._claims:
            self._claims[place] = {}
            self._network[place] = network
            insort(self._places, place)
            self._lengths[place[0], place[2]] += 1
        self._claims[place][node] = seniority

    def _remove(self, place: _Place, node: str) -> set[_Place]:
        """Returns the places that it overlapped and that are still there."""
        near = self._near(place)
        del self._claims[place][node]
        if self._claims[place]:
            return near
        del self._claims[place], self._network[place]
        del self._places[bisect_left(self._places, place)]
        self._lengths[place[0], place[2]] -= 1
        if not self._lengths[place[0], place[2]]:
            del self._lengths[place[0], place[2]]
        near.discard(place)
        return near

    def _near(self, place: _Place) -> set[_Place]:
        family, first, length = place
        bits = 32 if family == 4 else 128
        near = {
            around
            for other_family, shorter in self._lengths
            if other_family == family
            and shorter <= length
            and (around := (family, first >> (bits - shorter) << (bits - shorter), shorter)) in self._claims
        }
        end = first + (1 << (bits - length))
        index = bisect_left(self._places, place)
        while index < len(self._places) and self._places[index] < (family, end, 0):
            near.add(self._places[index])
            index += 1
        return near

    def _group(self, start: _Place) -> set[_Place]:
        group, todo = {start}, [start]
        while todo:
            for near in self._near(todo.pop()) - group:
                group.add(near)
                todo.append(near)
        return group

    def _judge(self, group: Set[_Place]) -> set[str]:
        claims = sorted((claim, node, place) for place in group for node, claim in self._claims.get(place, {}).items())
        standing = _Standing()
        lost: dict[str, dict[IPNetwork, tuple[str, IPNetwork]]] = {}
        nodes = {node for _, node, _ in claims}
        if len(nodes) > 1:
            for _, node, place in claims:
                winner = standing.rival(place, node)
                if winner is None:
                    standing.add(place, node)
                else:
                    lost.setdefault(node, {})[self._network[place]] = (winner[1], self._network[winner[0]])
        changed = set()
        networks = {self._network[place] for place in group if place in self._network}
        for node in nodes:
            before = self._lost.get(node, {})
            # A node may stand in other groups too: what it lost there stays lost.
            after = {n: w for n, w in before.items() if n not in networks} | lost.get(node, {})
            if after != before:
                changed.add(node)
                if after:
                    self._lost[node] = after
                else:
                    self._lost.pop(node, None)
        return changed


def _place(network: IPNetwork) -> _Place:
    return network.version, int(network.network_address), network.prefixlen


class _Standing:
    """The claims of one group that stand, while it is judged. At one place only one node can stand."""

    def __init__(self) -> None:
        self._node: dict[_Place, str] = {}
        self._places: list[_Place] = []
        self._lengths: set[tuple[int, int]] = set()

    def add(self, place: _Place, node: str) -> None:
        self._node[place] = node
        self._lengths.add((place[0], place[2]))
        insort(self._places, place)

    def rival(self, place: _Place, node: str) -> tuple[_Place, str] | None:
        """The widest, then lowest, place that overlaps and that another node holds."""
        family, first, length = place
        bits = 32 if family == 4 else 128
        for other_family, shorter in sorted(self._lengths):
            if other_family == family and shorter <= length:
                around = (family, first >> (bits - shorter) << (bits - shorter), shorter)
                if self._node.get(around, node) != node:
                    return around, self._node[around]
        index = bisect_left(self._places, place)
        end = (family, first + (1 << (bits - length)), 0)
        while index < len(self._places) and self._places[index] < end:
            if self._node[self._places[index]] != node:
                return self._places[index], self._node[self._places[index]]
            index += 1
        return None


def describe(owners: Iterable[Owner]) -> str:
    """`node a, peer b`."""
    return ", ".join(f"{kind} {name}" for kind, name in owners)
