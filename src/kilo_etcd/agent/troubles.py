"""What is wrong with this host now, in one place: sentences by kind of trouble, in the order of the status.

Some parts of the agent report a trouble when it changes (`Troubles.note`); the others are asked for theirs (`sources`).
Nothing here decides whether something is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto

from kilo_etcd.runtime.logs import Once

Sentences = tuple[str, ...] | str | None
"""What holds of one trouble; None or empty: nothing is wrong."""


class HostTrouble(Enum):
    """What may be wrong, in the order of the status."""

    SETTINGS = auto()
    """Flags that contradict the mesh's settings."""
    PLAN = auto()
    """Which parts of the plan are not in force."""
    NAMES = auto()
    """Other names with this host's key."""
    FORWARDING = auto()
    """What drops what this host forwards."""
    DROPPED_NETWORKS = auto()
    """What on this host drops packets for some members or offered networks."""
    TRAVERSAL = auto()
    """Nodes that, like this host, are behind NAT, and cannot be reached."""
    OVERLAPS = auto()
    """Addresses of the operator's within the mesh's subnets."""
    ETCD_INSIDE = auto()
    """Endpoints of etcd that are mesh addresses."""
    FORCED_ADDRESSES = auto()
    """Internal IPs that the operator has given this host, and that it does not have."""
    EXIT_NODE = auto()
    """The exit node that this host uses does not answer."""
    ENCRYPTION = auto()
    """What the switch to `encrypted` waits for."""
    NO_BASELINE = auto()
    """A leader through which no target has ever answered this host, which would report it."""
    RENUMBERED = auto()
    """The address that this host has lost since it joined."""
    CLAIM = auto()
    """The claim that cannot be restored."""
    CONTESTED = auto()
    """A record that another writer changes again and again."""
    ETCD = auto()
    """Why etcd is not followed, or this host has not joined."""
    DEMOTED = auto()
    """Why this host is behind all other candidates."""
    NOT_STANDING = auto()
    """Why it is no candidate although the operator has chosen it."""
    LISTEN = auto()
    """Why metrics and health are not served."""
    RELOAD = auto()
    """Installed code that does not run."""
    CLOCK = auto()
    """This host's clock went back."""
    STATE_DIRECTORY = auto()
    """A state directory that is not of use for the next start."""
    HOSTS_FILE = auto()
    """The names of the mesh cannot be written."""


_LOGGED = {
    HostTrouble.SETTINGS: ("settings", "error"),
    HostTrouble.FORWARDING: ("forwarding", "error"),
    HostTrouble.DROPPED_NETWORKS: ("dropped networks", "error"),
    HostTrouble.TRAVERSAL: ("traversal", "warning"),
    HostTrouble.EXIT_NODE: ("exit node", "warning"),
    HostTrouble.NO_BASELINE: ("no baseline", "warning"),
    HostTrouble.CONTESTED: ("contested", "error"),
    HostTrouble.CLOCK: ("clock", "error"),
    HostTrouble.STATE_DIRECTORY: ("state directory", "warning"),
}
"""The group of log lines that a trouble has, and their level. What is in none is logged by the part that finds it."""


def sentences(what: Sentences) -> tuple[str, ...]:
    """Return the sentences that are not empty."""
    return tuple(filter(None, (what,) if isinstance(what, str) or what is None else what))


class Troubles:
    """Gathers what is wrong on this host, for its status. `on_change` is called after what was noted has changed."""

    def __init__(
        self, once: Once, sources: Mapping[HostTrouble, Callable[[], Sentences]], *, on_change: Callable[[], None]
    ) -> None:
        """`sources`: of troubles that are asked for."""
        self._once, self._sources, self._on_change = once, sources, on_change
        self._noted: dict[HostTrouble, tuple[str, ...]] = {}

    def of(self, trouble: HostTrouble) -> tuple[str, ...]:
        """The sentences of one trouble now."""
        source = self._sources.get(trouble)
        return self._noted.get(trouble, ()) if source is None else sentences(source())

    def all(self) -> tuple[str, ...]:
        """All that is wrong with this host, as sentences."""
        return tuple(text for trouble in HostTrouble for text in self.of(trouble))

    def keep(self, trouble: HostTrouble, what: Sentences, *, logged: Sentences = ()) -> None:
        """These hold now; what is new or gone is logged, if the trouble has log lines. `logged`: those for which
        another part has log lines, and which are left out."""
        self._noted[trouble] = sentences(what)
        if (lines := _LOGGED.get(trouble)) is not None:
            group, level = lines
            elsewhere = sentences(logged)
            self._once.errors(group, tuple(text for text in self._noted[trouble] if text not in elsewhere), level=level)

    def note(self, changes: Mapping[HostTrouble, Sentences]) -> None:
        """Keep these, and have the status published again."""
        for trouble, what in changes.items():
            self.keep(trouble, what)
        self._on_change()

    def look(self, trouble: HostTrouble) -> None:
        """What is asked for this trouble has news: log that, and have the status published again."""
        group, level = _LOGGED[trouble]
        self._once.errors(group, self.of(trouble), level=level)
        self._on_change()
