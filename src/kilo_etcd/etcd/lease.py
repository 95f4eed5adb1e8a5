"""A lease kept alive from a background task, and its loss told.

Time runs from the moment a keepalive was sent, not from its answer, so `expires_at` is never later than etcd's own
idea. `lost` is set when etcd says that the lease is gone, or at `expires_at` at the latest: then the lease *may*
still live at etcd (which gives every lease its full time again after an election), so who finds `lost` set may ask
`refresh_lease` before granting another. An answer that does not come within one interval, or
`Config.attempt_timeout` if that is shorter, leaves the member for another, so that the lease outlives a member that
froze.

etcd's gRPC proxy sends keepalives in a rhythm of its own while a stream lasts, a third of the TTL rounded up to half a
second, and answers with the next of these. The two rhythms drift apart, until a keepalive would miss its answer by a
hair. So the interval counts from the sending of the last keepalive, which leaves the time of a second attempt, unless
the next answer of a proxy could come too late: then it counts from the last answer. If the answer to such a keepalive
is later than a proxy's would be, etcd itself is slow, and counts as slow until an answer comes well in time. Keepalives
with a long pause between them have a stream each, of which the proxy answers the first one at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from attrs import frozen

from .api import EtcdError
from .calls import Call, Caller
from .channel import EndpointsUnreachable
from .grpc import StatusError, TransportFailed
from .pb import etcd_pb2 as pb
from .tasks import background

PATH = "/etcdserverpb.Lease/LeaseKeepAlive"
PROXY_STEP = 0.55
"""Seconds by which a proxy's answer may be later than its last one was: half a second, and the way."""
AHEAD = 0.95
"""How long the pause between a late answer and the next keepalive is, of the interval."""
WELL = 0.95
"""Within which part of the time an answer comes that ends what is remembered of a slow etcd. Less than the whole, since
the answers of one that is just too slow vary."""
STREAM_EACH = 10.0
"""Seconds between two keepalives from which on each has a stream of its own."""


@frozen
class NextKeepalive:
    """When to send the next keepalive, and whether that counts from an answer, for the sake of a proxy, or did so until
    the answer told that etcd is slow."""

    at: float
    from_answer: bool = False


def next_keepalive(
    sent_at: float, answered_at: float, interval: float, patience: float, *, from_answer: bool
) -> NextKeepalive:
    """When to send the keepalive after the one that was sent and answered then. `from_answer`: as of that one."""
    wait = answered_at - sent_at
    in_time = wait + PROXY_STEP < patience
    # A proxy would have answered sooner after such a pause, so it is etcd that is slow.
    slow = from_answer and wait > (1 - AHEAD) * interval + PROXY_STEP
    if in_time or slow:
        # What is remembered of a slow etcd: else the pause after each second answer would be a proxy's. An answer well
        # in time ends that: the slow one may have been a single late one of a proxy, whose next ones come ever later.
        return NextKeepalive(sent_at + interval, from_answer=slow and wait + PROXY_STEP > WELL * patience)
    return NextKeepalive(answered_at + AHEAD * interval, from_answer=True)


class LeaseKeeper:
    """Implements `api.KeepAlive`."""

    def __init__(self, caller: Caller, lease_id: int, ttl: int, interval: float | None) -> None:
        self.lease_id = lease_id
        self.ttl = ttl
        self.lost = trio.Event()
        self.confirmed = 0
        """Keepalives that etcd has answered."""
        self.last_error: Exception | None = None
        """Why the last keepalive failed; None while they succeed."""
        self._caller = caller
        self._interval = interval if interval is not None else ttl / 3
        self._scope = trio.CancelScope(deadline=trio.current_time() + ttl)
        self._next = NextKeepalive(trio.current_time())

    @property
    def expires_at(self) -> float:
        """Implements `api.KeepAlive.expires_at`. The TTL counts from when the confirmed keepalive was sent."""
        return float(self._scope.deadline)

    async def run(self) -> None:
        """Send keepalives until the lease is lost or the task is cancelled. Failures are tried again as long as the
        lease can live."""
        with self._scope:
            refused_at = -1
            while not self.lost.is_set():
                call: Call | None = None
                await trio.sleep_until(self._next.at)
                try:
                    call = await self._caller.stream(PATH)
                    await self._keep(call)
                except (EndpointsUnreachable, TransportFailed, StatusError, EtcdError) as error:
                    self.last_error = error
                    again = call is None or self._caller.stream_failed(call, error)
                    refused = isinstance(error, StatusError) and not error.leaves_member
                    if not again or isinstance(error, EtcdError) or (refused and refused_at == self.confirmed):
                        # A refused password, or a new token too: perhaps it is put right in time.
                        await trio.sleep(self._interval)
                    refused_at = self.confirmed if refused else -1
                finally:
                    if call:
                        call.close()
        self.lost.set()

    async def _keep(self, call: Call) -> None:
        patience = max(0.25, min(self._interval, self._caller.config.attempt_timeout))
        while True:
            await trio.sleep_until(self._next.at)
            sent_at = trio.current_time()
            answer = None
            with trio.move_on_after(patience):
                await call.send(pb.LeaseKeepAliveRequest(ID=self.lease_id))
                answer = await call.receive()
            if answer is None:
                raise TransportFailed(f"no answer to a keepalive within {patience:g} s")
            ttl = pb.LeaseKeepAliveResponse.FromString(answer).TTL
            if ttl <= 0:
                self.lost.set()
                return
            self._caller.channel.succeeded(call.connection)
            self._scope.deadline = max(self._scope.deadline, sent_at + ttl)
            self._next = next_keepalive(
                sent_at, trio.current_time(), self._interval, patience, from_answer=self._next.from_answer
            )
            self.confirmed += 1
            self.last_error = None
            if self._interval >= STREAM_EACH:
                return

    def __repr__(self) -> str:
        state = "lost" if self.lost.is_set() else f"kept, {self.confirmed} confirmed"
        return f"<LeaseKeeper {self.lease_id:x} [{state}]>"


@asynccontextmanager
async def keep_alive(caller: Caller, lease_id: int, ttl: int, interval: float | None) -> AsyncIterator[LeaseKeeper]:
    """Keep a lease from a background task while the block lasts; every `interval` seconds, or a third of `ttl`."""
    async with background() as nursery:
        keeper = LeaseKeeper(caller, lease_id, ttl, interval)
        nursery.start_soon(keeper.run)
        yield keeper
