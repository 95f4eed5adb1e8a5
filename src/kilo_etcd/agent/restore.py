"""Restores what another writer has changed in etcd: the claim of this host's mesh address, the mesh's settings, and the
keys in the host's name under its lease.

The host's registration, candidacy and status are watched by the session. The tasks here sleep until there is a
snapshot.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from kilo_etcd.agent.leadership import candidacy_policy
from kilo_etcd.base.backoff import RepairBackoff
from kilo_etcd.etcd import api as etcd
from kilo_etcd.model import Granularity, IPAddress, MeshSettings, Snapshot
from kilo_etcd.runtime.logs import Once, get_logger
from kilo_etcd.store.addresses import Claimant, named
from kilo_etcd.store.claims import NoAddressLeft
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.records import RecordError
from kilo_etcd.store.session.node_identity import NameTaken
from kilo_etcd.store.session.session import Session

SETTINGS_SECONDS = 2.0
"""Within which the agents put lost settings of the mesh back, each at its own moment."""

LOOK_SECONDS = 30.0
"""Seconds at most between two looks at the keys in this host's name."""

RETRY_SECONDS = 5.0
"""After a claim could not be restored."""

REFUSALS = (NameTaken, NoAddressLeft, RecordError)
"""What etcd holds and the agent cannot get past without the operator."""


class Restorer:
    """Of node `name`. `on_news` is called when `trouble` is another."""

    def __init__(
        self,
        session: Session,
        keys: Keys,
        name: str,
        once: Once,
        *,
        mirror: Mirror,
        rng: random.Random,
        on_news: Callable[[], object] = lambda: None,
    ) -> None:
        self._session = session
        self._keys = keys
        self._name = name
        self._once = once
        self._mirror = mirror
        self._rng = rng
        self._snapshot: Snapshot | None = None
        self._settings = MeshSettings(Granularity.LOCATION, ())
        self.renumbered: str | None = None
        """A sentence on the addresses that this host has lost since it joined, while those who had them claim them."""
        self._lost_to: dict[IPAddress, Claimant | None] = {}
        """Each of these addresses and who had the older claim of it; None: not known yet."""
        self.trouble: str | None = None
        """A sentence on the claim that cannot be restored."""
        self._on_news = on_news
        self._unclaimed = trio.Event()
        self._unsettled = trio.Event()
        self._news = trio.Event()

    def joined(self, settings: MeshSettings) -> None:
        """These were the mesh's settings when this host joined."""
        self._settings = settings

    def follow(self, snapshot: Snapshot) -> None:
        """Look at what a snapshot of etcd lacks."""
        self._snapshot = snapshot
        self._news.set()
        if self._mirror.kv(self._keys.internal_ips) is not None:
            self._settings = self._settings._replace(internal_ips=snapshot.internal_ips)
        if self._lost_claims():
            self._unclaimed.set()
        self._follow_renumbering()
        if self._lacks_settings():
            self._unsettled.set()

    async def run(self) -> None:
        """Restore what lacks, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_claims)
            nursery.start_soon(self._watch_settings)
            nursery.start_soon(self._watch_leased)

    async def _watch_leased(self) -> None:
        due = float("inf")
        while True:
            with trio.move_on_at(min(due, trio.current_time() + LOOK_SECONDS)):
                await self._news.wait()
            self._news = trio.Event()
            due = float("inf")
            if self._snapshot is not None and self._mirror.untrusted_reason is None:
                on_record = candidacy_policy.on_record(self._snapshot, self._name)
                due = await self._session.compare(self._snapshot, self._mirror, on_record=on_record)

    async def _watch_claims(self) -> None:
        """Restore the claim of a mesh address that another writer has deleted; take another address if an older claim
        of this one is there."""
        backoff = RepairBackoff()
        log = get_logger(node=self._name)
        while True:
            await self._unclaimed.wait()
            self._unclaimed = trio.Event()
            # A writer that deletes it again and again is not answered each time at once: the address stays this host's
            # meanwhile.
            await trio.sleep(backoff.pause(trio.current_time()))
            while self.trouble is not None and not self._session.registered:  # noqa: ASYNC110 - rare, and nobody tells
                # Whether the claims stand is not known before etcd has been asked.
                await trio.sleep(RETRY_SECONDS)
            lost, before = self._lost_claims(), self._session.addresses
            if not lost:
                self._claimed()
                continue
            try:
                await self._mirror.verify()
                if not self._older_claims() and await self._session.has_claims():
                    self._claimed()  # the mirror is behind etcd, and another snapshot follows
                    continue
                addresses = await self._session.claim_addresses(self._settings.subnets, doubted=True)
            except (etcd.EtcdError, *REFUSALS) as error:
                self._once.error("claim", "the claim of this host's mesh address cannot be restored",
                                 claim="; ".join(lost), error=str(error))  # fmt: skip
                self._note_trouble(
                    f"the claim of this host's mesh address cannot be restored ({'; '.join(lost)}): {error}"
                )
                await trio.sleep(RETRY_SECONDS)
                self._unclaimed.set()
                continue
            self._claimed()
            if addresses == before:
                log.error("another writer deleted the claim of this host's mesh address; restored",
                          claim="; ".join(lost))  # fmt: skip

    def _follow_renumbering(self) -> None:
        """Say which addresses this host has lost, as long as those who had the older claims have them. A mirror that
        has this host's new claims has seen what stood before them."""
        self._lost_to.update(dict.fromkeys(self._session.take_lost_addresses()))
        new = (self._keys.address(self._name, address) for address in self._session.addresses)
        if not self._lost_to or any(self._mirror.kv(key) is None for key in new):
            return
        holders = {address: self._mirror.holder(address) for address in self._lost_to}
        me = ("node", self._name)
        self._lost_to = {
            address: holder
            for address, holder in holders.items()
            if holder not in (None, me) and self._lost_to[address] in (None, holder)
        }
        sentence = self._renumbering() if self._lost_to else None
        if sentence == self.renumbered:
            return
        self.renumbered = sentence
        if sentence is None:
            self._once.clear("renumbered", "no other node claims the mesh address that this host lost")
        else:
            self._once.error("renumbered", sentence)
        self._on_news()

    def _renumbering(self) -> str:
        holders = [(address, holder) for address, holder in self._lost_to.items() if holder is not None]
        why = [f"{named(holder)} had the older claim of {address}" for address, holder in holders]
        claims = [self._keys.address(name, address) for address, (kind, name) in holders if kind == "node"]
        now, then = (",".join(map(str, ips)) for ips in (self._session.addresses, self._lost_to))
        remedy = f"if that claim is a mistake, etcdctl del {' '.join(claims)}; " if claims else ""
        return (
            f"this host took mesh address {now} and lost {then}: {'; '.join(why)}; {remedy}see which users may write "
            f"{self._keys.by_root}"
        )

    def _claimed(self) -> None:
        self._once.clear("claim", "this host's mesh address is claimed again")
        self._note_trouble(None)

    def _note_trouble(self, sentence: str | None) -> None:
        if sentence != self.trouble:
            self.trouble = sentence
            self._on_news()

    async def _watch_settings(self) -> None:
        """Put the mesh's settings back where etcd has none: it was empty when it was adopted, or somebody took them
        away. The next host to join would put its own there, which may be others than those in force."""
        while True:
            await self._unsettled.wait()
            # One is enough, and it need not be everybody at once.
            await trio.sleep(self._rng.uniform(0.0, SETTINGS_SECONDS))
            self._unsettled = trio.Event()
            snapshot = self._snapshot
            if snapshot is None or not self._lacks_settings():
                continue
            try:
                await self._mirror.verify()
                settings = self._settings
                if snapshot.subnets:
                    # Else another etcd was adopted before anybody saw them in the first one.
                    settings = settings._replace(granularity=snapshot.granularity, subnets=snapshot.subnets)
                await self._session.ensure_mesh(settings, restores=True)
            except (etcd.EtcdError, RecordError) as error:
                self._once.error("settings lost", "the mesh's settings are not in etcd, and cannot be put there",
                                 error=str(error))  # fmt: skip
            else:
                self._once.clear("settings lost", "the mesh's settings are in etcd again")

    def _lacks_settings(self) -> bool:
        return any(self._mirror.kv(key) is None for key in self._keys.settings)

    def _lost_claims(self) -> tuple[str, ...]:
        """What is wrong with the claims of this host's addresses, as the mirror has them. It may be behind etcd, and
        lack a claim that was put a moment ago."""
        if not self._session.registered or not self._session.addresses:
            return ()  # The session restores them with the record: they may have gone with their lease.
        keys = [self._keys.address(self._name, address) for address in self._session.addresses]
        reservation = self._keys.reservation(self._name)
        lost = [f"{key} was deleted" for key in (*keys, reservation) if self._mirror.kv(key) is None]
        if (kv := self._mirror.kv(reservation)) is not None and not kv.lease:
            lost.append(f"{reservation} was put under no lease")
        return self._older_claims() or tuple(lost)

    def _older_claims(self) -> tuple[str, ...]:
        holders = ((address, self._mirror.holder(address)) for address in self._session.addresses)
        return tuple(
            f"{named(holder)} has the older claim of {address}"
            for address, holder in holders
            if holder not in (None, ("node", self._name))
        )
