"""The token that user and password are exchanged for: fetched once, shared by all calls, fetched again when etcd
refuses it. Never per call: etcd spends a tenth of a second of bcrypt on each. For the same reason a password that was
refused is not tried again at once, however many ask: a second later at first, a minute later at last, with jitter.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import trio

from .api import Unauthenticated

REFUSAL_FIRST = 1.0
REFUSAL_MOST = 60.0


class Tokens:
    """The token that goes with each call, fetched once for all tasks that wait for it. After a refusal the next
    attempts wait, from `REFUSAL_FIRST` to `REFUSAL_MOST` seconds, and fail meanwhile with the same refusal."""

    def __init__(self, authenticate: Callable[[], Awaitable[str]]) -> None:
        self._authenticate = authenticate
        self._token: str | None = None
        self._lock = trio.Lock()
        self._refusal = ""
        self._refusals = 0
        self._refused_until = 0.0

    async def get(self) -> str:
        """The token; empty when etcd has authentication off. Raises what `authenticate` raises."""
        while self._token is None:
            async with self._lock:
                if self._token is None:
                    self._token = await self._fetch()
        return self._token

    async def _fetch(self) -> str:
        if self._refusals and trio.current_time() < self._refused_until:
            raise Unauthenticated(self._refusal)
        try:
            token = await self._authenticate()
        except Unauthenticated as error:
            pause = min(REFUSAL_MOST, REFUSAL_FIRST * 2.0 ** min(self._refusals, 10))
            self._refusals += 1
            self._refusal = str(error)
            self._refused_until = trio.current_time() + pause * random.uniform(0.5, 1.0)
            raise
        self._refusals = 0
        return token

    def refuse(self, token: str) -> None:
        """`token` was refused. Where another call has fetched a newer one already, that stays."""
        if self._token == token:
            self._token = None
