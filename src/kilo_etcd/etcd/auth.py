"""The token that user and password are exchanged for: fetched once, shared by all calls, fetched again when etcd
refuses it. Never per call: etcd spends a tenth of a second of bcrypt on each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


class Tokens:
    def __init__(self, authenticate: Callable[[], Awaitable[str]]) -> None:
        self._authenticate = authenticate
        self._token: str | None = None
        self._lock = trio.Lock()

    async def get(self) -> str:
        """The token; empty when etcd has authentication off. Raises what `authenticate` raises."""
        while self._token is None:
            async with self._lock:
                if self._token is None:
                    self._token = await self._authenticate()
        return self._token

    def refuse(self, token: str) -> None:
        """`token` was refused. Where another call has fetched a newer one already, that stays."""
        if self._token == token:
            self._token = None
