"""The rule that binds records to each other: one public key, one owner.

It is an index that takes one change at a time and answers with the owners whose standing it may have changed, so
that a change in a mesh of ten thousand costs what it touches. It depends only on what is in it, never on the
order in which it came: agents that hold the same records decide the same.
"""

from __future__ import annotations

from typing import TypeAlias

KeyOwner: TypeAlias = tuple[str, str]
"""("node" or "peer", name)."""


class KeyIndex:
    """Which owner has which public key. Of two nodes, and of two peers, the one whose record is older keeps it: by
    writing one record nobody can take another's key away. `View` decides between a node and a peer (decision 0024)."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[KeyOwner, ...]] = {}
        """In tuples: nearly all have one, and a set has four times the size."""
        self._key_of: dict[KeyOwner, str] = {}
        self._since: dict[KeyOwner, int] = {}

    def claim(self, owner: KeyOwner, key: str | None, since: int = 0) -> set[KeyOwner]:
        """The record of `owner`, of create revision `since`, has `key` (None: there is no record any more). Returns the
        others concerned."""
        old = self._key_of.get(owner)
        if old == key and (key is None or self._since[owner] == since):
            return set()
        concerned: set[KeyOwner] = set()
        if old is not None:
            remaining = tuple(other for other in self._owners[old] if other != owner)
            concerned.update(remaining)
            if remaining:
                self._owners[old] = remaining
            else:
                del self._owners[old]
            del self._key_of[owner], self._since[owner]
        if key is not None:
            others = self._owners.get(key, ())
            concerned.update(others)
            self._owners[key] = (*others, owner)
            self._key_of[owner], self._since[owner] = key, since
        return concerned

    def keeper(self, kind: str, owner: KeyOwner) -> str | None:
        """The name of the node (or peer) that keeps the key of `owner` among all nodes (peers) with that key: the one
        with the oldest record, by name if two are of one revision. None: there is none."""
        owners = self._owners.get(self._key_of.get(owner, ""), ())
        if len(owners) == 1:  # As nearly always.
            return owner[1] if kind == owner[0] else None
        ages = [(self._since[other], other[1]) for other in owners if other[0] == kind]
        return min(ages)[1] if ages else None

    def nodes(self, key: str) -> tuple[str, ...]:
        """The nodes with this key, the one that keeps it first, then by the age of their records."""
        owners = [owner for owner in self._owners.get(key, ()) if owner[0] == "node"]
        return tuple(name for _, name in sorted((self._since[owner], owner[1]) for owner in owners))

    def peers(self, owner: KeyOwner) -> set[KeyOwner]:
        """The peers that have the same key as `owner`."""
        owners = self._owners.get(self._key_of.get(owner, ""), ())
        return {other for other in owners if other[0] == "peer"} if len(owners) > 1 else set()
