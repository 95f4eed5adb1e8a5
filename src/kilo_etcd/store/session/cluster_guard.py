"""What a session asks about the etcd that it writes to: whether it is the one that is followed."""

from __future__ import annotations

from typing import Protocol

import trio

from kilo_etcd.etcd.api import Header


class ClusterGuard(Protocol):
    """Knows whether etcd is the one that is followed; see `Mirror`."""

    @property
    def generation(self) -> int:
        """How often it was followed again after it had not been."""

    @property
    def trust(self) -> tuple[int, bool]:
        """`generation`, and whether it may be followed."""

    async def wait_trust_change(self, than: tuple[int, bool]) -> tuple[int, bool]:
        """`trust`, as soon as it differs from `than`."""

    def observe(self, header: Header) -> None:
        """This one has taken a write."""

    def check(self) -> None:
        """Raise ClusterNotTrusted if it is known not to be."""

    async def verify(self) -> None:
        """The same, having looked. EtcdError."""


class NoGuard:
    """Trusts every etcd."""

    generation = 0
    trust = (0, True)

    async def wait_trust_change(self, than: tuple[int, bool]) -> tuple[int, bool]:
        """Implements `ClusterGuard.wait_trust_change`; it never changes."""
        await trio.sleep_forever()

    def observe(self, header: Header) -> None:
        """Implements `ClusterGuard.observe`; nothing is compared."""

    def check(self) -> None:
        """Implements `ClusterGuard.check`; it never raises."""

    async def verify(self) -> None:
        """Implements `ClusterGuard.verify`, without a look at etcd."""
        await trio.lowlevel.checkpoint()
