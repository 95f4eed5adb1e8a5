"""A reload: the code that is installed now is tried (`agent.trial`), and replaces the code that runs if it works."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from kilo_etcd.agent.endings import Reload
from kilo_etcd.agent.notify import notify, notify_reloading
from kilo_etcd.agent.trial import try_installed
from kilo_etcd.etcd import api as etcd
from kilo_etcd.runtime.logs import Logger
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.session.session import Session


class Reloader:
    """Tries the installed code and runs it in this process, unless `stopping` is set. `note` takes a sentence on
    installed code that does not run."""

    def __init__(
        self,
        client: etcd.Client,
        keys: Keys,
        mirror: Mirror,
        session: Session,
        *,
        stopping: trio.Event,
        log: Callable[[], Logger],
        note: Callable[[str], None],
    ) -> None:
        self._client, self._keys, self._mirror, self._session = client, keys, mirror, session
        self._stopping, self._log, self._note = stopping, log, note

    async def reload(self) -> None:
        """Raise Reload if the code that is installed now runs, and go on with the present code if it does not."""
        self._log().info("reloading")
        notify_reloading()
        reason = await try_installed(etcd_answers=(answers := await self._etcd_answers()))
        if reason is not None and answers and not await self._etcd_answers():
            # It went away meanwhile, which says nothing of the code.
            reason = await try_installed(etcd_answers=False)
        if self._stopping.is_set():
            return
        if reason is None:
            await self._session.renew()
            raise Reload
        sentence = (
            "the code that is installed now does not run, so the agent goes on with the old one: "
            f"{reason}; once that is mended: systemctl reload kilo-etcd"
        )
        self._log().error(sentence)
        self._note(sentence)
        notify("READY=1", f"STATUS={sentence}")

    async def _etcd_answers(self) -> bool:
        """Whether etcd can be read now, and is followed."""
        if not self._mirror.followed:
            return False
        with suppress(etcd.EtcdError):
            await self._client.get(self._keys.adopted)
            return True
        return False
