"""Other names in etcd whose records have this host's public key: its own from before it was renamed, or those of hosts
with a copy of its disk.

At the start what stands under a name without a living agent is taken over (`store.session.former_names`). Afterwards
it says what the operator has to know: settings under the former name, which the operator alone may write, and hosts
with the same key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kilo_etcd.model import Snapshot
from kilo_etcd.runtime.logs import Once, get_logger
from kilo_etcd.store.annotations import ANNOTATIONS
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.session.session import Session

MOST_NAMED = 5


class Namesakes:
    """Of node `name` with `public_key`. `mirror` gives the mirror that is followed at present."""

    def __init__(
        self,
        session: Session,
        keys: Keys,
        name: str,
        public_key: str,
        once: Once,
        *,
        mirror: Callable[[], Mirror],
    ) -> None:
        self._session = session
        self._keys = keys
        self._name = name
        self._public_key = public_key
        self._once = once
        self._mirror = mirror
        self._former: tuple[str, ...] = ()
        """The names that this run has taken over."""
        self.refusal = ""
        """A clause on what etcd refused this host; empty: nothing."""
        self.errors: tuple[str, ...] = ()
        """Sentences as of the last snapshot."""

    async def take_over(self) -> bool:
        """Have what stands under former names of this host; whether there was any. To be called once the mirror has a
        snapshot. NameTaken, EtcdError."""
        if not (others := self._others()):
            return False
        log = get_logger(node=self._name)
        moved = await self._session.take_over(others)
        for name in moved.names:
            log.warning("this host was renamed; what its former name had in etcd is its own now", former=name)
        for name in moved.living:
            log.error("another node has this host's public key, and its agent runs; nothing is taken over", other=name)
        if moved.refused:
            name = next(name for name in others if name not in moved.names)
            self.refusal = (
                f"; if {name} is this host's former name, run kgctl node rename {name} {self._name}: etcd does not let "
                "this host do that"
            )
            log.error(f"etcd refuses to give this host what {name} has there{self.refusal}", error=moved.refused)
        self._former += moved.names
        return bool(moved.names)

    def _others(self) -> tuple[str, ...]:
        return tuple(name for name in self._mirror().nodes_with_key(self._public_key) if name != self._name)

    def follow(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Sentences on what is wrong with names, as of `snapshot`."""
        self.errors = (*self._left(snapshot), *self._copies())
        return self.errors

    def _left(self, snapshot: Snapshot) -> Iterator[str]:
        """On what the operator has set for a former name."""
        keys, mirror = self._keys, self._mirror()
        for former in self._former:
            if former in snapshot.nodes:
                continue  # Another host has the name now.
            left = [
                *(["the label"] if mirror.kv(keys.location(former)) is not None else []),
                *(f"annotation {name}" for name in ANNOTATIONS if mirror.kv(keys.annotation(former, name)) is not None),
            ]
            users = sorted(node.name for node in snapshot.nodes.values() if node.exit_node == former)
            left += [f"annotation exit-node of {name}" for name in users[:MOST_NAMED]]
            if left:
                yield (
                    f"this host was called {former}, and these are still for that name: {', '.join(left)}; kgctl node "
                    f"rename {former} {self._name} moves them"
                )

    def _copies(self) -> Iterator[str]:
        """On hosts that have this host's key, whose record is the oldest of these."""
        names = self._mirror().nodes_with_key(self._public_key)
        if not names or names[0] != self._name:
            return
        for name in names[1 : MOST_NAMED + 1]:
            yield (
                f"{name} has registered with this host's public key, as a copy of this host's disk does; "
                f"{self._name} keeps its place, since its record is older: give {name} a key of its own (stop its "
                f"agent, remove its key file, start it), or, if it is gone for good, kgctl node forget {name}"
            )
