"""How far an agent has come, from its start to its end, as one value.

    STARTING -> FOLLOWING --------------> JOINED
                    |                       ^
                    +---> FORWARDING -------+

An agent that etcd does not let join goes through FORWARDING: it forwards by what it knows. An agent may leave
in any phase; its phase stays. Pure.
"""

from __future__ import annotations

from enum import Enum

from attrs import evolve, frozen


class Phase(Enum):
    """What an agent has come to."""

    STARTING = "starting"
    """Nothing follows etcd, and nothing is brought to the kernel."""
    FOLLOWING = "following"
    """The tasks run that follow etcd."""
    FORWARDING = "forwarding"
    """So do those that bring snapshots to the kernel, although this host is not registered (again)."""
    JOINED = "joined"
    """This host is registered, and all tasks run."""


_NEXT = {
    Phase.STARTING: {Phase.FOLLOWING},
    Phase.FOLLOWING: {Phase.FORWARDING, Phase.JOINED},
    Phase.FORWARDING: {Phase.JOINED},
    Phase.JOINED: set[Phase](),
}


@frozen
class Lifecycle:
    """How far an agent has come. Only `to` and `leave` give the next value."""

    phase: Phase = Phase.STARTING
    leaving: bool = False
    """It was asked to stop."""

    @property
    def follows_etcd(self) -> bool:
        """Whether the tasks run that follow etcd."""
        return self.phase is not Phase.STARTING

    @property
    def reconciles(self) -> bool:
        """Whether the tasks run that bring snapshots to the kernel."""
        return self.phase in (Phase.FORWARDING, Phase.JOINED)

    @property
    def joined(self) -> bool:
        """Whether this host was registered."""
        return self.phase is Phase.JOINED

    def to(self, phase: Phase) -> Lifecycle:
        """The lifecycle in this phase. ValueError: it does not follow the present one."""
        if self.leaving or phase not in _NEXT[self.phase]:
            raise ValueError(f"an agent that is {self} cannot be {phase.value} next")
        return evolve(self, phase=phase)

    def leave(self) -> Lifecycle:
        """The lifecycle of an agent that was asked to stop; again, nothing changes."""
        return evolve(self, leaving=True)

    def __str__(self) -> str:
        return f"{self.phase.value}, leaving" if self.leaving else self.phase.value
