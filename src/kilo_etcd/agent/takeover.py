"""The takeover check: whether this host itself reaches a leader elsewhere, proved by a WireGuard handshake.

Whom it tries gets to know this host by its report, and shakes hands with it at once; if none has after FIRST_WORD
seconds this host begins itself, in case only it can (NAT).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable
from contextlib import suppress

import trio

from kilo_etcd import kernel
from kilo_etcd.model import Node

PROOF_SECONDS, PROOF_POLL = 1.0, 0.03
"""How long a handshake may take that proves that this host could lead, and the time between two looks for it."""

FIRST_WORD = 0.3
"""Seconds that the targets have to shake hands, who have got to know this host by its word, before it begins itself:
only one of two may (decision 0004), and one of them may be behind a NAT."""


class TakeoverCheck:
    """`prove` has handshakes made with these public keys, and with none any more when it is empty."""

    def __init__(self, device: kernel.Kernel, prove: Callable[[Collection[str]], object]) -> None:
        self._device = device
        self._prove = prove
        self._proving: frozenset[str] = frozenset()

    async def reaches(self, targets: Iterable[Node], former: Container[float] | None) -> bool:
        """Whether this host itself shakes hands with one of them; `former` are the handshakes that it had before."""
        if former is None:
            return False
        keys = frozenset(node.public_key for node in targets)
        if await self._shaken(keys, former, FIRST_WORD):
            return True
        self._proving = keys
        self._prove(keys)
        if await self._shaken(keys, former, PROOF_SECONDS):
            return True
        self.stop()
        return False

    async def handshakes(self, keys: Collection[str]) -> frozenset[float] | None:
        """When the last ones with these peers were; None: it cannot be known."""
        with suppress(OSError, kernel.KernelError):
            peers = (await self._device.hear()).peers
            return frozenset((0.0, *(peers[key].last_handshake for key in keys if key in peers)))
        return None

    async def _shaken(self, keys: Collection[str], former: Container[float], seconds: float) -> bool:
        """Any other handshake than those will do: whether it is a later one, a clock that jumps cannot tell."""
        with trio.move_on_after(seconds):
            while True:
                now = await self.handshakes(keys)
                if now is not None and any(time not in former for time in now):
                    return True
                await trio.sleep(PROOF_POLL)
        return False

    def stop(self) -> None:
        """No more handshakes are wanted."""
        if self._proving:
            self._proving = frozenset()
            self._prove(())
