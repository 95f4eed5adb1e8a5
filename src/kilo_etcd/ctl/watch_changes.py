"""Waiting for changes in etcd, for commands that go on: `status --watch`, `mesh join --follow`."""

from __future__ import annotations

from collections.abc import Callable

from kilo_etcd.etcd.api import Client, Compacted, Unavailable


async def watch_changes(
    client: Client,
    prefix: str,
    tell: Callable[[], None],
    *,
    retry: float,
    counts: Callable[[bytes], bool] = lambda _key: True,
) -> None:
    """Call `tell` at once, after each change below `prefix`, and after each gap, forever. EtcdError, but Unavailable.

    `retry` is how many seconds pass before a watch that failed is begun anew; `counts` says whether a key is one whose
    change counts.
    """
    import trio

    while True:
        try:
            async with client.watch_prefix(prefix) as changes:
                # What happened before the watch began is not reported by it.
                tell()
                async for batch in changes:
                    if any(counts(event.kv.key) for event in batch.events):
                        tell()
        except (Compacted, Unavailable):
            await trio.sleep(retry)
