"""What the agent tells of itself: a status line for systemd, a status record for etcd.

systemd is told at once. The record goes to etcd by a task of its own, the newest only: the larger the mesh, the more
snapshots share one write. What etcd does not take, the session goes on trying to put.
"""

from __future__ import annotations

from datetime import UTC, datetime

import trio
from attrs import evolve, frozen

from kilo_etcd import __version__
from kilo_etcd.agent.leadership.candidacy_policy import SegmentRole
from kilo_etcd.agent.notify import notify
from kilo_etcd.model import Granularity, Snapshot
from kilo_etcd.store.records import Role, StatusRecord, Unreachable
from kilo_etcd.store.session.session import Session

MOST_ERRORS = 20
MOST_CHARACTERS = 1000
"""Of the errors in a status record, and of each of them: every host of the mesh keeps all statuses within reach."""

PAUSE_PER_NODE = 0.001
"""Seconds of pause after a status write, per node of the mesh: 10,000 hosts that follow one change make 1,000 writes
a second at most."""


@frozen(kw_only=True)
class State:
    """How the agent is after one run of plan and apply."""

    role: SegmentRole | None
    """None: it has none yet."""
    revision: int
    """The last one applied."""
    failures: tuple[str, ...]
    """Which parts of the plan are not in force."""
    errors: tuple[str, ...]
    """All that is wrong with this host, failures among it."""
    programmed: bool
    address: str
    unreachable: tuple[Unreachable, ...] = ()
    """Members of the location that do not answer."""
    unsigned: tuple[str, ...] = ()
    """Those that answer without their key."""
    unanswered: tuple[str, ...] = ()
    """Nodes to which WireGuard sends, and from which nothing comes."""
    unanswered_peers: tuple[str, ...] = ()
    """The same of outside peers."""
    answers: bool = False
    """Whether this host answers others."""
    peer_query_port: int | None = None
    """Where, if not at the usual port."""
    clear: tuple[str, ...] | None = None
    """What stays in clear under `encrypted` (`--clear`); None: it is not reported."""
    without_etcd: str
    """Why the mesh in force is not etcd's, as a sentence; empty: it is."""


class StatusReporter:
    """Reports on one agent. `run` is its task."""

    def __init__(self, session: Session, public_key: str, granularity_flag: Granularity | None) -> None:
        self._session = session
        self._public_key = public_key
        self._granularity_flag = granularity_flag
        self._since = _now()
        self._status: StatusRecord | None = None
        self._nodes = 0
        self._due = trio.Event()

    def publish(self, snapshot: Snapshot, state: State, *, leaving: bool) -> None:
        """Tell systemd, unless the agent is `leaving`, and have the status written."""
        role, nodes = state.role, len(snapshot.nodes)
        if not leaving and role is not None:
            notify(
                f"STATUS={role}; {_count(nodes, 'node')}; revision {state.revision}"
                + (f"; {_count(len(state.failures), 'problem')}" if state.failures else "")
                + (f"; {state.without_etcd}" if state.without_etcd else ""),
            )
        self._nodes = nodes
        self._status = StatusRecord(
            public_key=self._public_key,
            revision=state.revision,
            role=role.kind if role else Role.ALONE,
            location=role.location if role else "",
            leader=role.leader if role and role.kind is not Role.ALONE else "",
            granularity_flag=self._granularity_flag,
            errors=bounded(state.errors),
            rejected=len(snapshot.rejected),
            version=__version__,
            since=self._since,
            leads_since=self._since_when(role),
            address=state.address,
            unreachable=state.unreachable,
            unsigned=state.unsigned,
            unanswered=state.unanswered,
            unanswered_peers=state.unanswered_peers,
            answers=state.answers,
            peer_query_port=state.peer_query_port,
            clear=state.clear,
        )
        self._due.set()

    def _since_when(self, role: SegmentRole | None) -> str:
        """Since when this host leads. An agent that takes over from a former one of this host goes on counting."""
        if role is None or role.kind is not Role.LEADER:
            return ""
        before = self._status or self._session.status
        if before is not None and (before.role, before.location) == (role.kind, role.location) and before.leads_since:
            return before.leads_since
        return _now()

    async def run(self) -> None:
        """Write the newest status until cancelled."""
        written: StatusRecord | None = None
        while True:
            await self._due.wait()
            self._due = trio.Event()
            pause = self._nodes * PAUSE_PER_NODE
            if self._status is not None and written is not None:
                # That a revision was applied can wait until all who share the machine and etcd have applied it.
                quiet = evolve(self._status, revision=written.revision) == written
                await trio.sleep(pause if quiet else 0)
            if self._status is not None:
                written = self._status
                await self._session.put_status(written)
            await trio.sleep(pause)


def bounded(errors: tuple[str, ...]) -> tuple[str, ...]:
    """The first errors, cut where they are long, and how many more there are."""
    first = tuple(
        text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…" for text in errors[:MOST_ERRORS]
    )
    more = len(errors) - len(first)
    return (*first, f"{more} more; the agent's log on this host names the first of them") if more else first


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
