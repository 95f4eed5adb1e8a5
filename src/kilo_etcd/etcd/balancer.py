"""Which endpoint to try next: a state machine over endpoints, without clock or network of its own.

The rules. The endpoint in use is used until it fails. One that failed rests: 50 ms the first time, twice as long each
time after, 1 s at most, with jitter (half to whole) so that a thousand clients of a member that died do not come
back in one moment. Those that rest least come first, so a bad endpoint is left at once when there is another, and is
tried again forever. To have connected is no success: a frozen member's kernel accepts connections, and a member
without quorum answers; only an answer from etcd clears the failures.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from attrs import define

from .endpoint import EtcdEndpoint

BACKOFF_FIRST = 0.05
BACKOFF_MOST = 1.0


def backoff(failures: int, jitter: float) -> float:
    """Seconds to rest after the nth failure in a row (n from 1); `jitter` is in 0..1."""
    pause = min(BACKOFF_MOST, BACKOFF_FIRST * 2.0 ** (min(failures, 20) - 1))
    return pause * (0.5 + jitter / 2)


@define
class _EndpointState:
    endpoint: EtcdEndpoint
    failures: int = 0
    rests_until: float = 0.0
    last_used: int = 0


class Balancer:
    """Times are seconds of one monotonic clock, the caller's."""

    def __init__(self, endpoints: Sequence[EtcdEndpoint], rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._records: dict[EtcdEndpoint, _EndpointState] = {}
        self._used = 0
        self.replace(endpoints)

    def replace(self, endpoints: Sequence[EtcdEndpoint]) -> None:
        """These are the endpoints from now on. What is known of those that stay is kept."""
        known = self._records
        self._records = {endpoint: known.get(endpoint) or _EndpointState(endpoint) for endpoint in endpoints}
        # Clients with one list of endpoints spread over them.
        new = [record for endpoint, record in self._records.items() if endpoint not in known]
        self._rng.shuffle(new)
        for place, record in enumerate(new):
            record.last_used = place - len(new)

    def order(self, now: float, among: Collection[EtcdEndpoint] | None = None) -> list[tuple[float, EtcdEndpoint]]:
        """Every endpoint (`among` these) with the seconds it has yet to rest (0: may be tried now), best first."""

        def rank(record: _EndpointState) -> tuple[float, int, int]:
            return max(0.0, record.rests_until - now), record.failures, record.last_used

        records = [r for r in self._records.values() if among is None or r.endpoint in among]
        return [(max(0.0, r.rests_until - now), r.endpoint) for r in sorted(records, key=rank)]

    def all_failed(self, endpoints: Collection[EtcdEndpoint]) -> bool:
        """Whether each of these has failed since it last answered."""
        return all(r.failures > 0 for r in self._records.values() if r.endpoint in endpoints)

    def chosen(self, endpoint: EtcdEndpoint) -> None:
        """`endpoint` is being used: among equals it comes last the next time."""
        self._used += 1
        if (record := self._records.get(endpoint)) is not None:
            record.last_used = self._used

    def failed(self, endpoint: EtcdEndpoint, now: float) -> None:
        """A call or a connection to `endpoint` failed: it rests, longer with each failure in a row."""
        record = self._records.get(endpoint)
        if record is None:
            return  # It is none of the endpoints any more.
        record.failures += 1
        record.rests_until = now + backoff(record.failures, self._rng.random())

    def succeeded(self, endpoint: EtcdEndpoint) -> None:
        """`endpoint` answered: it need not rest, and its failures are forgotten."""
        if (record := self._records.get(endpoint)) is not None:
            record.failures = 0
            record.rests_until = 0.0

    def __repr__(self) -> str:
        parts = [f"{r.endpoint}{f' ({r.failures} failures)' if r.failures else ''}" for r in self._records.values()]
        return f"<Balancer {', '.join(parts)}>"
