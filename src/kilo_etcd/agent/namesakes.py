"""Other names in etcd whose records have this host's public key: its own from before it was renamed, or those of hosts
with a copy of its disk.

At the start what stands under a name without a living agent is taken over (`store.session.former_names`). Labels and
annotations are the operator's to move: they are named until that is done. Until then the label counts as the host's own
default location, so that the host stays where it is; the record keeps the former name, for the next run. Hosts with the
same key are named too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import frozen

from kilo_etcd.runtime.logs import Once, get_logger
from kilo_etcd.store.annotations import ANNOTATIONS
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.records import RecordError, decode_label
from kilo_etcd.store.session.session import Session

MOST_NAMED = 5
LABEL = "the label"


@frozen(kw_only=True)
class FormerSettings:
    """What is set for names that this host had before, and which names with its key never were its own."""

    names: tuple[str, ...] = ()
    """Those that a label or an annotation is for."""
    label: str | None = None
    """That of one of them: the host goes on at its location until the operator has moved it."""
    duplicate_of: tuple[str, ...] = ()
    """Nodes with this host's key and an older record, whose agents have run beside this one."""


class Namesakes:
    """Of node `name` with `public_key`."""

    def __init__(
        self,
        session: Session,
        keys: Keys,
        name: str,
        public_key: str,
        once: Once,
        *,
        mirror: Mirror,
    ) -> None:
        self._session = session
        self._keys = keys
        self._name = name
        self._public_key = public_key
        self._once = once
        self._mirror = mirror
        self._former: tuple[str, ...] = ()
        """The names that this run or an earlier one has taken over."""
        self._beside: tuple[str, ...] = ()
        """Those under which another agent with this host's key has run beside this one."""
        self.refusal = ""
        """A clause on what etcd refused this host; empty: nothing."""
        self.errors: tuple[str, ...] = ()
        """Sentences as of the last look."""

    async def take_over(self) -> bool:
        """Have what stands under former names of this host; whether there was any. To be called once the mirror has a
        snapshot. NameTaken, EtcdError."""
        if not (others := self._others()):
            return False
        log = get_logger(node=self._name)
        moved = await self._session.take_over({name: self._label(name) for name in others})
        for name in moved.names:
            log.warning("this host was renamed; what its former name had in etcd is its own now", former=name)
        for name in moved.living:
            log.error(
                "another node has this host's public key, and its agent runs or has run beside this one; nothing is "
                "taken over",
                other=name,
            )
        if moved.refused:
            name = next(name for name in others if name not in moved.names)
            self.refusal = (
                f"; if {name} is this host's former name, run kgctl node rename {name} {self._name}: etcd does not let "
                "this host do that"
            )
            log.error(f"etcd refuses to give this host what {name} has there{self.refusal}", error=moved.refused)
        self._former += moved.names
        self._beside = moved.beside
        return bool(moved.names)

    def _others(self) -> tuple[str, ...]:
        return tuple(name for name in self._mirror.nodes_with_key(self._public_key) if name != self._name)

    def recall(self, names: Iterable[str]) -> None:
        """The host's record has these former names, from an earlier run."""
        self._former = tuple(name for name in dict.fromkeys((*self._former, *names)) if name != self._name)

    def former(self) -> FormerSettings:
        """What is set for former names now, for the host's record."""
        self._drop_taken()
        left = {name: settings for name in self._former if (settings := self._settings(name))}
        labels = (self._label(name) for name in left)
        label = next((label for label in labels if label is not None), None)
        return FormerSettings(names=tuple(left), label=label, duplicate_of=tuple(self._older()))

    def _older(self) -> Iterator[str]:
        """The hosts of a copied disk that keep the key from this one."""
        for name in self._mirror.nodes_with_key(self._public_key):
            if name == self._name:
                return
            if name in self._beside:
                yield name

    def _drop_taken(self) -> None:
        """A name that another host has by now is this host's no more, also when that host leaves again."""
        mirror, own = self._mirror, self._mirror.nodes_with_key(self._public_key)
        self._former = tuple(name for name in self._former if mirror.kv(self._keys.node(name)) is None or name in own)

    def _label(self, name: str) -> str | None:
        """The label of a name; None: there is none that can be read."""
        kv = self._mirror.kv(self._keys.location(name))
        try:
            return None if kv is None else decode_label(kv.value)
        except RecordError:
            return None

    def look(self) -> tuple[str, ...]:
        """Sentences on what is wrong with names, by what the mirror has now."""
        self._drop_taken()
        self.errors = (*self._left(), *self._copies())
        return self.errors

    def _left(self) -> Iterator[str]:
        for former in self._former:
            if settings := self._settings(former):
                counts = ""
                if LABEL in settings and self._mirror.kv(self._keys.location(self._name)) is None:
                    counts = f"; the label counts until then{', annotations do not' if len(settings) > 1 else ''}"
                yield (
                    f"this host was called {former}, and these are still for that name: {', '.join(settings)}; kgctl "
                    f"node rename {former} {self._name} moves them{counts}"
                )

    def _settings(self, former: str) -> tuple[str, ...]:
        """The label and the annotations of a former name, and the annotations of others that name it as exit node."""
        keys, mirror = self._keys, self._mirror
        nodes = {} if mirror.current is None else mirror.current.nodes
        users = sorted(node.name for node in nodes.values() if node.exit_node == former)
        return (
            *([LABEL] if mirror.kv(keys.location(former)) is not None else []),
            *(f"annotation {name}" for name in ANNOTATIONS if mirror.kv(keys.annotation(former, name)) is not None),
            *(f"annotation exit-node of {name}" for name in users[:MOST_NAMED]),
        )

    def _copies(self) -> Iterator[str]:
        """On hosts that have this host's key, whose record is the oldest of these."""
        names = self._mirror.nodes_with_key(self._public_key)
        if not names or names[0] != self._name:
            return
        for name in names[1 : MOST_NAMED + 1]:
            yield (
                f"{name} has registered with this host's public key, as a copy of this host's disk does; "
                f"{self._name} keeps its place, since its record is older: give {name} a key of its own (stop its "
                f"agent, remove its key file, start it), or, if it is gone for good, kgctl node forget {name}"
            )
