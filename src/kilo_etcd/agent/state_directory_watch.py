"""Sees to it that the state directory has what the next start needs, and says if it has not."""

from __future__ import annotations

from collections.abc import Callable

import trio

from kilo_etcd.agent.snapshot_cache import SnapshotCache
from kilo_etcd.agent.state_directory import PERIOD_SECONDS
from kilo_etcd.runtime.logs import Logger


async def watch_state_directory(
    cache: SnapshotCache,
    log: Callable[[], Logger],
    *,
    usable: Callable[[bool], object],
    note: Callable[[str | None], None],
) -> None:
    """Look again and again, until cancelled. `usable` is told at each look whether the directory is; `note` takes the
    sentence on what is wrong, when it is another one (None: nothing is)."""
    trouble: str | None = None
    while True:
        look = await cache.look()
        if look.restored:
            log().warning(
                "the private key was gone from the state directory, and was written there again; to have a new one "
                "made, stop the agent, remove it, and start the agent"
            )
        usable(look.trouble is None)
        if look.trouble != trouble:
            trouble = look.trouble
            note(trouble)
        await trio.sleep(PERIOD_SECONDS)
