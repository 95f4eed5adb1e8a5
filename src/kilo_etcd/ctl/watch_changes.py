"""Waiting for changes in etcd, for commands that go on: `status --watch`, `mesh join --follow`."""

from __future__ import annotations

from collections.abc import Callable

from kilo_etcd.etcd.api import Client, Compacted, Unavailable


async def watch_changes(
    client: Client, prefix: str, tell: Callable[[], None], *, retry: float, passing_over: tuple[bytes, ...] = ()
) -> None:
    """Call `tell` at once, after each change below `prefix`, and after each gap, forever. EtcdError, but Unavailable.

    `retry` is how many seconds pass before a watch that failed is begun anew; what begins with something of
    `passing_over` is no change.
    """
    import trio

    while True:
        try:
            async with client.watch_prefix(prefix) as changes:
                # What happened before the watch began is not reported by it.
                tell()
                async for batch in changes:
                    if any(not event.kv.key.startswith(passing_over) for event in batch.events):
                        tell()
        except (Compacted, Unavailable):
            await trio.sleep(retry)
