"""The takeover check: whether this host itself reaches a leader elsewhere, verified by a WireGuard handshake.

The targets add this host as a peer because of its report, and start a handshake at once; if there is none after
FIRST_HANDSHAKE_SECONDS seconds this host starts itself, in case only it can (NAT).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable
from contextlib import suppress

import trio

from kilo_etcd import kernel
from kilo_etcd.model import Node

TAKEOVER_CHECK_SECONDS, TAKEOVER_CHECK_POLL = 1.0, 0.03
"""How long the handshake of a takeover check may take, and the time between two looks for it."""

FIRST_HANDSHAKE_SECONDS = 0.3
"""Seconds that the targets, which know this host by its report, have for a handshake before it starts one itself:
only one of two may (decision 0004), and one of them may be behind a NAT."""


class TakeoverCheck:
    """`check_takeover` has handshakes made with these public keys, and with none any more when it is empty."""

    def __init__(self, device: kernel.Kernel, check_takeover: Callable[[Collection[str]], object]) -> None:
        self._device = device
        self._check_takeover = check_takeover
        self._proving: frozenset[str] = frozenset()

    async def reaches(self, targets: Iterable[Node], former: Container[float] | None) -> bool:
        """Whether this host itself has a handshake with one of them; `former` are the handshakes that it had before."""
        if former is None:
            return False
        keys = frozenset(node.public_key for node in targets)
        if await self._shaken(keys, former, FIRST_HANDSHAKE_SECONDS):
            return True
        self._proving = keys
        self._check_takeover(keys)
        if await self._shaken(keys, former, TAKEOVER_CHECK_SECONDS):
            return True
        self.stop()
        return False

    async def handshakes(self, keys: Collection[str] | None = None) -> frozenset[float] | None:
        """When the last ones with these peers were, or with all; None: it cannot be known."""
        with suppress(OSError, kernel.KernelError):
            peers = (await self._device.peer_activity()).peers
            wanted = peers if keys is None else (key for key in keys if key in peers)
            return frozenset((0.0, *(peers[key].last_handshake for key in wanted)))
        return None

    async def _shaken(self, keys: Collection[str], former: Container[float], seconds: float) -> bool:
        """Any other handshake than those will do: whether it is a later one, a clock that jumps cannot tell."""
        with trio.move_on_after(seconds):
            while True:
                now = await self.handshakes(keys)
                if now is not None and any(time not in former for time in now):
                    return True
                await trio.sleep(TAKEOVER_CHECK_POLL)
        return False

    def stop(self) -> None:
        """No more handshakes are wanted."""
        if self._proving:
            self._proving = frozenset()
            self._check_takeover(())
