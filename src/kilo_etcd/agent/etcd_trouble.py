"""Why the mesh in force on this host is not etcd's, or etcd does not hold what this host has to say."""

from __future__ import annotations

from collections.abc import Callable

from kilo_etcd.agent.joining import Joining, kind_of
from kilo_etcd.agent.lifecycle import Lifecycle
from kilo_etcd.agent.snapshot_cache import SnapshotCache
from kilo_etcd.agent.snapshot_follower import SnapshotFollower
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.session.session import Session


class EtcdTrouble:
    """Says why this host does not follow etcd. `lifecycle` says how far the agent has come."""

    def __init__(
        self,
        mirror: Mirror,
        session: Session,
        joining: Joining,
        snapshots: SnapshotFollower,
        cache: SnapshotCache,
        *,
        lifecycle: Callable[[], Lifecycle],
    ) -> None:
        self._mirror, self._session, self._joining = mirror, session, joining
        self._snapshots, self._cache, self._lifecycle = snapshots, cache, lifecycle

    def not_followed(self) -> str | None:
        """Why this host does not follow etcd, or has not joined."""
        return self._mirror.untrusted_reason or self._bridged()

    def without_etcd(self) -> str:
        """The same, or why etcd cannot be read; empty: the mesh in force is etcd's."""
        return self.not_followed() or self._mirror.trouble or ""

    def sentence(self) -> str | None:
        """Why etcd is not followed or does not hold what this host has to say, with etcd's own error and what to do."""
        if (reason := self.not_followed()) is not None:
            return reason
        if (trouble := self._mirror.trouble) is not None:
            return f"{trouble}; forwarding goes on by the last plan"
        return self._joining.waiting or self._session.last_error or self._session.contested

    def _bridged(self) -> str | None:
        """Why this host forwards without having joined, and by what, as a sentence; None: it has joined."""
        if self._lifecycle().joined or not self._lifecycle().reconciles:
            return None
        failure = self._mirror.failure or self._joining.failure
        why = "" if failure is None else f": {failure}"
        cached = self._snapshots.cached
        if cached is None or not self._snapshots.goes_by_cache:
            return f"{kind_of(failure)}, so this host has not joined again; forwarding follows etcd{why}"
        return f"{kind_of(failure)}; the cached snapshot is in force (age {self._cache.age(cached)}){why}"
