"""One lease of this host over its life: adopted or granted, kept, unconfirmed, lost.

An unconfirmed lease is not kept: it may stand in an etcd that is not to be told anything. One that could not be kept is
not lost yet: etcd refreshes all leases when it elects a new leader, so after an
outage of etcd a lease is most likely still there. So it is unconfirmed first, and only etcd's own answer ends it.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from kilo_etcd.etcd.api import Client, EtcdError, KeepAlive, Lease, LeaseInfo, LeaseNotFound, PermissionDenied
from kilo_etcd.store.events import wait_any

LONGEST_INTERVAL = 600.0
"""Seconds at most between two keepalives, however long the lease."""


def keep_interval(ttl: int) -> float:
    """Seconds between two keepalives of a lease of `ttl` seconds."""
    return min(ttl / 3, LONGEST_INTERVAL)


class KeptLease:
    """A lease of `ttl` seconds. `on_unconfirmed` is called when keeping it fails, `on_lost` when etcd says it is
    gone. With `refresh_every`, in seconds, no stream of keepalives is open: it is one call each time."""

    def __init__(
        self,
        client: Client,
        ttl: int,
        *,
        on_unconfirmed: Callable[[], None],
        on_lost: Callable[[], None],
        refresh_every: float | None = None,
    ) -> None:
        self._client = client
        self._ttl = ttl
        self._refresh_every = refresh_every
        self._on_unconfirmed = on_unconfirmed
        self._on_lost = on_lost
        self._lease: Lease | None = None
        self._changed = trio.Event()
        self._keeping: KeepAlive | None = None
        self._keeping_ended = trio.Event()
        self._renewing = False
        self._due = False
        """Whether it is to be refreshed before its time."""
        self._log = structlog.get_logger()
        self.unconfirmed = False

    def __repr__(self) -> str:
        return f"<KeptLease {self._lease} {'unconfirmed' if self.unconfirmed else self._keeping or ''}>"

    @property
    def id(self) -> int:
        """0: there is none."""
        return self._lease.id if self._lease is not None else 0

    def _set(self, lease: Lease | None) -> None:
        self._lease, self.unconfirmed = lease, False
        self._notify()

    def mark_unconfirmed(self) -> None:
        """Ask etcd before the lease is used again, and do not keep it until then."""
        if self._lease is not None and not self.unconfirmed:
            self.unconfirmed = True
            self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def refresh_now(self) -> None:
        """Have it refreshed before its time, which does not count while a host is suspended. One that has a stream of
        keepalives needs none."""
        if self._refresh_every is not None:
            self._due = True
            self._notify()

    def forget(self) -> None:
        """Have none, whatever has become of it."""
        self._set(None)

    async def lives(self) -> bool:
        """Whether there is a lease; etcd is asked only if it is unconfirmed. EtcdError."""
        if self._lease is not None and self.unconfirmed:
            try:
                await self._client.refresh_lease(self._lease.id)
            except LeaseNotFound:
                self._log.warning("lease lost", lease=f"{self._lease.id:x}", ttl=self._lease.ttl)
                self._set(None)
                self._on_lost()
            else:
                self._set(self._lease)
        return self._lease is not None

    async def adopt(self, lease_id: int, own: Callable[[bytes], bool]) -> LeaseInfo | None:
        """Take over a lease that an earlier run left, if it lives; what is known of it, or None. One of another length
        is refreshed but not taken: `id` is 0 then. Nor is one that holds a key that is not `own`: to end it would
        delete what is another's. EtcdError."""
        info = await self._client.lease_time_to_live(lease_id, keys=True)
        if info.ttl < 0:
            return None
        try:
            await self._client.refresh_lease(lease_id)
        except LeaseNotFound:
            return None
        if info.granted_ttl == self._ttl and all(map(own, info.keys)):
            self._set(Lease(id=lease_id, ttl=info.granted_ttl))
        return info

    async def grant(self) -> None:
        """A new lease. EtcdError."""
        self._set(await self._client.grant_lease(self._ttl))

    async def renew(self) -> None:
        """Let the lease last its whole length from now on. EtcdError; if so, it lasts what is left of it. It is not
        kept meanwhile: etcd's gRPC proxy would answer with the next keepalive of its own, seconds later."""
        lease = self._lease
        if lease is None or self.unconfirmed:
            return
        self._renewing = True
        self._notify()
        try:
            if self._keeping is not None:
                await self._keeping_ended.wait()
            await self._client.refresh_lease(lease.id)
        finally:
            self._renewing = False
            self._notify()

    async def end(self) -> bool:
        """Keep it no more, and tell etcd to end it and delete what is under it. EtcdError; if so, it ends by itself.
        False: so it does too, since etcd refuses; another user has put a key under it that this one may not write."""
        lease = self._lease
        self._set(None)
        if lease is None:
            return True
        try:
            await self._client.revoke_lease(lease.id)
        except LeaseNotFound:
            return True
        except PermissionDenied as error:
            self._log.warning("a lease ends by itself only", lease=f"{lease.id:x}", ttl=lease.ttl, error=str(error))
            return False
        return True

    async def keep(self) -> None:
        """The task: keep whatever lease there is, until cancelled."""
        while True:
            changed, lease = self._changed, self._lease
            if lease is None or self.unconfirmed or self._renewing:
                await changed.wait()
                continue
            try:
                if self._refresh_every is None:
                    self._keeping_ended = trio.Event()
                    interval = keep_interval(lease.ttl)
                    async with self._client.keep_alive(lease.id, lease.ttl, interval=interval) as self._keeping:
                        await wait_any(self._keeping.lost, changed)
                else:
                    if not self._due:
                        with trio.move_on_after(self._refresh_every):
                            await changed.wait()
                            continue
                    self._due = False
                    await self._client.refresh_lease(lease.id)
                    continue
            except EtcdError as error:
                self._log.warning("a lease cannot be kept alive", error=str(error))
            finally:
                self._keeping = None
                self._keeping_ended.set()
            if lease is self._lease and not changed.is_set():
                self.mark_unconfirmed()
                self._on_unconfirmed()
