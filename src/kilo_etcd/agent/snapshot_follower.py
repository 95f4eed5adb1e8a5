"""Which snapshot is to be in force: etcd's newest, or for now the one before it or the cached one."""

from __future__ import annotations

from collections.abc import Callable

import trio

from kilo_etcd.agent.adoption import LONGEST_SECONDS, Adoption
from kilo_etcd.agent.cachefile import CachedSnapshot
from kilo_etcd.agent.lifecycle import Lifecycle
from kilo_etcd.model import IPNetwork, Snapshot
from kilo_etcd.runtime.logs import Once
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.topology.segments import Topology

WAITS_FOR_OTHERS = (
    f"etcd is followed again; the last plan stays until the other hosts are back there, for {LONGEST_SECONDS:g} s at "
    "most"
)
"""The line that says why an etcd that was adopted is not followed yet."""


class SnapshotFollower:
    """Chooses the snapshot that the host `name` is to bring to the kernel. `run` is its task. `lifecycle` says how
    far the agent has come, `topology` what is in force; `on_hold` is told the snapshots of etcd that wait, and
    `on_subnets` the mesh's subnets in those that are followed before this host has joined. `nudge` has the snapshot
    brought to the kernel."""

    def __init__(
        self,
        name: str,
        public_key: str,
        mirror: Mirror,
        once: Once,
        *,
        lifecycle: Callable[[], Lifecycle],
        topology: Callable[[], Topology | None],
        on_hold: Callable[[Snapshot], None],
        on_subnets: Callable[[tuple[IPNetwork, ...]], None],
        nudge: Callable[[], None],
    ) -> None:
        self._name, self._public_key, self._mirror, self._once = name, public_key, mirror, once
        self._lifecycle, self._topology, self._nudge = lifecycle, topology, nudge
        self._on_hold, self._on_subnets = on_hold, on_subnets
        self._adoption = Adoption(0)
        self.snapshot: Snapshot | None = None
        """The one that is to be in force."""
        self.cached: CachedSnapshot | None = None
        """The cached snapshot, if this host has begun with it and not joined since."""

    @property
    def waits(self) -> bool:
        """Whether the snapshots of an etcd that was adopted wait until other hosts are back there."""
        return self._adoption.waits

    @property
    def goes_by_cache(self) -> bool:
        """Whether the cached snapshot is to be in force."""
        return self.goes_by(self.snapshot)

    def goes_by(self, snapshot: Snapshot | None) -> bool:
        """Whether this is the cached snapshot."""
        return self.cached is not None and snapshot is self.cached.snapshot

    async def run(self) -> None:
        """Follow etcd, until cancelled."""
        snapshot: Snapshot | None = None
        while True:
            with trio.move_on_at(self._adoption.until):
                snapshot = await self._mirror.wait_newer(snapshot)
            if snapshot is not None:
                self._take(snapshot)

    def begin_with(self, cached: CachedSnapshot) -> None:
        """The cached snapshot is to be in force, until etcd has one."""
        self.cached, self.snapshot = cached, cached.snapshot
        self._nudge()

    def joined(self) -> None:
        """This host has joined while snapshots are followed."""
        self._nudge()
        if self._mirror.current is not None:
            # A snapshot without this host was not put in force before.
            self._take(self._mirror.current)

    def _take(self, snapshot: Snapshot) -> None:
        """Put etcd's newest snapshot in force, unless what is in force is better for now."""
        missing = self._adoption.missing(self._mirror.generation, self._topology(), snapshot, trio.current_time())
        self._once.errors("adoption", (WAITS_FOR_OTHERS,) if missing else (), level="info")
        joined = self._lifecycle().joined
        if missing:
            if joined:
                self._on_hold(snapshot)
            return
        if not joined:
            own = snapshot.nodes.get(self._name)
            if own is None or own.public_key != self._public_key:
                return  # Until this host is a member again.
            self._on_subnets(snapshot.subnets)
        self.snapshot = snapshot
        if joined:
            self.cached = None
        self._nudge()
