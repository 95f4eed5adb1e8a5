"""The leases that make a host a member of the mesh: its record is under one, and the reservation of its mesh addresses
under another, which lasts longer. Those of an ephemeral host are one lease, as long as that of its status, and its
claims are under it too (decision 0040)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from kilo_etcd.etcd.api import Client, EtcdError, LeaseNotFound
from kilo_etcd.store import claims
from kilo_etcd.store.lease import KeptLease


class MemberLeases:
    """Of one host. `lease_ttl` and `forget_after` are seconds. `on_lost` is told that the lease of the record is gone,
    `on_unconfirmed` that one could not be kept, and `is_own` says whether this host alone writes a key under a lease.
    """

    def __init__(
        self,
        client: Client,
        reservation_key: str,
        *,
        lease_ttl: int,
        forget_after: int,
        ephemeral: bool,
        on_unconfirmed: Callable[[], None],
        on_lost: Callable[[], None],
        is_own: Callable[[bytes], bool],
    ) -> None:
        self._client, self._reservation_key, self._is_own = client, reservation_key, is_own
        self._on_unconfirmed = on_unconfirmed
        self.ephemeral = ephemeral
        self.record = KeptLease(
            client, lease_ttl if ephemeral else forget_after, on_unconfirmed=self._not_kept, on_lost=on_lost
        )
        self.reservation = (
            self.record
            if ephemeral
            else KeptLease(
                client,
                claims.reservation_ttl(forget_after),
                on_unconfirmed=on_unconfirmed,
                on_lost=lambda: None,
                refresh_every=forget_after / claims.RESERVATION_REFRESHES,
            )
        )

    def _not_kept(self) -> None:
        self.refresh_reservation()
        self._on_unconfirmed()

    def refresh_reservation(self) -> None:
        """To be called if a lease of this host was not kept: it may have been suspended, and its clock stood still."""
        self.reservation.refresh_now()

    @property
    def unconfirmed(self) -> bool:
        """Whether one may have ended, for all that this host knows."""
        return self.record.unconfirmed or self.reservation.unconfirmed

    def mark_unconfirmed(self) -> None:
        """Ask etcd before one is used again."""
        self.record.mark_unconfirmed()
        self.reservation.mark_unconfirmed()

    def forget(self) -> None:
        """Have none."""
        self.record.forget()
        self.reservation.forget()

    def reserve_nothing(self) -> None:
        """This host has no address to reserve."""
        if not self.ephemeral:
            self.reservation.forget()

    async def for_claims(self, *, adopts: bool) -> claims.Leases:
        """The leases for this host's claims and their reservation; that of an earlier run if it `adopts` it. Of an
        ephemeral host the lease of the record must live. EtcdError."""
        if self.ephemeral:
            return claims.Leases(claims=self.record.id, reservation=self.record.id)
        if not await self.reservation.lives():
            held = await self._client.get(self._reservation_key)
            if held is not None and held.lease and adopts:
                await self.reservation.adopt(held.lease, self._is_own)
            if not self.reservation.id:
                await self.reservation.grant()
        return claims.Leases(reservation=self.reservation.id)

    async def end_unused_reservation(self) -> None:
        """End the lease of the reservation if nothing is under it: no address was found. If etcd does not do it, it
        ends by itself."""
        reservation = self.reservation
        if self.ephemeral or not reservation.id:
            return
        with suppress(EtcdError):
            if not (await self._client.lease_time_to_live(reservation.id, keys=True)).keys:
                await reservation.end()

    async def renew_ephemeral(self) -> None:
        """Let the lease of an ephemeral host last its whole length from now on: nobody keeps it while an agent starts
        or after it has stopped. EtcdError; if so, it lasts what is left of it."""
        if self.ephemeral:
            try:
                await self.record.renew()
            except LeaseNotFound:
                self.record.mark_unconfirmed()

    async def end(self) -> None:
        """End them. EtcdError; if so, they end by themselves."""
        await self.record.end()
        await self.reservation.end()

    async def keep(self) -> None:
        """The task: keep whatever there is, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.record.keep)
            if self.reservation is not self.record:
                nursery.start_soon(self.reservation.keep)
