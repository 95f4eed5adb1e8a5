"""Has peers made anew, or tried by a standby, and the plan applied for that."""

from __future__ import annotations

from collections.abc import Collection

from kilo_etcd.agent.apply import PlanApplier
from kilo_etcd.runtime.reconciler import Reconciler


class PeerResets:
    """What the parts that watch peers ask of `applier`, whose plan `reconciler` has applied again."""

    def __init__(self, applier: PlanApplier, reconciler: Reconciler) -> None:
        self._applier, self._reconciler = applier, reconciler

    def reset_session(self, keys: Collection[str]) -> None:
        """See `PlanApplier.reset_session`."""
        self._applier.reset_session(keys)
        self._reconciler.nudge(fresh=True)

    def renew(self, keys: Collection[str]) -> None:
        """See `PlanApplier.renew`."""
        self._applier.renew(keys)
        self._reconciler.nudge(fresh=True)

    def check_takeover(self, keys: Collection[str]) -> None:
        """See `PlanApplier.check_takeover`."""
        self._applier.check_takeover(keys)
        self._reconciler.nudge()

    async def follow_handshake_order(self) -> None:
        """Have the plan applied again for the sake of new peers, until cancelled."""
        while True:
            await self._applier.wait_due()
            # Read anew: an endpoint that was learnt meanwhile stays as it is.
            self._reconciler.nudge(fresh=True)
