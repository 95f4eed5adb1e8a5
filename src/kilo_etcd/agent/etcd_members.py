"""`--endpoints-from-cluster`: the agent's endpoints follow etcd's member list while it runs.

Members of etcd are replaced one after the other, until none is left at the endpoints that the agent was given. So it
asks for the list again and again, which costs etcd less than the agent's keepalives do, connects to its members first,
and keeps a copy on disk for its next start (`runtime.etcd_members`). An etcd that is not followed says nothing of where
the right one is.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.etcd import api as etcd
from kilo_etcd.runtime.etcd_members import keep, remove, usable
from kilo_etcd.runtime.logs import Logger, Once

PERIOD = 5.0
"""Seconds between two looks at the list at most: members may be replaced by a script."""


class EtcdMembers:
    """Of one agent. `trusted` says whether the etcd that answers is the one that is followed."""

    def __init__(
        self,
        config: AgentConfig,
        client: etcd.Client,
        log: Logger,
        once: Once,
        *,
        disk: Disk | None,
        trusted: Callable[[], bool],
        rng: random.Random,
    ) -> None:
        self._config, self._client, self._log, self._once = config, client, log, once
        self._disk, self._trusted, self._rng = disk, trusted, rng
        self.endpoints: tuple[str, ...] = ()
        """Those of the member list, once it is known."""
        self._written: tuple[str, ...] | None = None
        """What the copy has; None: that is not known."""

    async def run(self) -> None:
        """Follow the list, until cancelled."""
        while True:
            await self.look()
            await trio.sleep(PERIOD * self._rng.uniform(0.6, 1.0))

    async def look(self) -> None:
        """Ask for the list once, and go by it."""
        if not self._trusted():
            return
        try:
            members = await self._client.members()
        except etcd.Unavailable:
            return  # The mirror reports that etcd does not answer.
        except etcd.EtcdError as error:
            self._once.warning(
                "etcd member list", "etcd's members cannot be listed, so the endpoints stay what they are",
                error=str(error),
            )  # fmt: skip
            return
        if not self._trusted():
            return  # It was learnt while the list was on its way.
        self._once.clear("etcd member list", "etcd's members can be listed again")
        usable_members = usable(members, self._config.etcd)
        self._once.errors("etcd members left out", usable_members.remarks, level="warning")
        await self._write(usable_members.endpoints)
        if not usable_members.endpoints or usable_members.endpoints == self.endpoints:
            return
        self.endpoints = usable_members.endpoints
        self._client.prefer(usable_members.endpoints)
        self._log.info("etcd endpoints follow the member list", endpoints=",".join(usable_members.endpoints))

    async def _write(self, endpoints: tuple[str, ...]) -> None:
        """Have the copy be of these; a copy that a list without usable members contradicts is removed."""
        disk, config = self._disk, self._config
        if disk is None or endpoints == self._written:
            return
        path = disk.state_dir
        try:
            await disk.run(lambda: keep(config.etcd, path, endpoints) if endpoints else remove(path))
        except OSError as error:
            self._once.warning("etcd endpoints copy", "etcd's endpoints cannot be kept on disk",
                               error=error.strerror)  # fmt: skip
            return
        self._written = endpoints
        self._once.clear("etcd endpoints copy", "etcd's endpoints are kept on disk again")

    async def forget(self) -> None:
        """Remove the copy. OSError."""
        if self._disk is not None:
            path = self._disk.state_dir
            await self._disk.run(lambda: remove(path))
