"""The rule that binds records to each other: one public key, one owner.

It is an index that takes one change at a time and answers with the owners whose standing it may have changed, so
that a change in a mesh of ten thousand costs what it touches. It depends only on what is in it, never on the
order in which it came: agents that hold the same records judge the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Owner: TypeAlias = tuple[str, str]
"""("node" or "peer", name)."""


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
        if key is None or len(self._owners[key]) == 1:
            return []
        others = sorted(self._owners[key] - {owner})
        return [other for other in others if other[0] == "node"] if owner[0] == "node" else others


def describe(owners: Iterable[Owner]) -> str:
    """`node a, peer b`."""
    return ", ".join(f"{kind} {name}" for kind, name in owners)
