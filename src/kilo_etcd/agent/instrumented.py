"""etcd's client, instrumented: counts writes that change something there, keepalives of leases apart.

Everything else of the client is passed through as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from kilo_etcd.etcd import api as etcd


def instrumented(client: etcd.Client, wrote: Callable[[], object], answered: Callable[[], object]) -> etcd.Client:
    """`client`, which calls `wrote` after each write that etcd has taken, and `answered` after each answer."""
    return cast(etcd.Client, _InstrumentedClient(client, wrote, answered))


class _InstrumentedClient:
    def __init__(self, client: etcd.Client, wrote: Callable[[], object], answered: Callable[[], object]) -> None:
        self._client = client
        self._wrote = wrote
        self._answered = answered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def _write(self) -> None:
        self._answered()
        self._wrote()

    async def range(self, *args: Any, **kwargs: Any) -> etcd.RangeResult:
        result = await self._client.range(*args, **kwargs)
        self._answered()
        return result

    async def put(self, *args: Any, **kwargs: Any) -> etcd.PutResult:
        result = await self._client.put(*args, **kwargs)
        self._write()
        return result

    async def delete(self, *args: Any, **kwargs: Any) -> etcd.DeleteResult:
        result = await self._client.delete(*args, **kwargs)
        self._write()
        return result

    async def delete_prefix(self, prefix: etcd.Text) -> etcd.DeleteResult:
        result = await self._client.delete_prefix(prefix)
        self._write()
        return result

    async def txn(
        self, compare: Sequence[etcd.Compare], success: Sequence[etcd.Op] = (), failure: Sequence[etcd.Op] = ()
    ) -> etcd.TxnResult:
        result = await self._client.txn(compare, success, failure)
        self._answered()
        if not all(isinstance(op, etcd.Get) for op in (success if result.succeeded else failure)):
            self._wrote()
        return result

    async def grant_lease(self, *args: Any, **kwargs: Any) -> etcd.Lease:
        result = await self._client.grant_lease(*args, **kwargs)
        self._write()
        return result

    async def revoke_lease(self, lease_id: int) -> None:
        await self._client.revoke_lease(lease_id)
        self._write()
