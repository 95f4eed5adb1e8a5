"""The connection in use, of several endpoints: made when first needed, left when it fails, made again.

One connection carries everything. Dialling is a background task shared by all who wait, so that a cancelled caller
spoils it for nobody. A second endpoint is tried beside the first when that has not answered in `STAGGER` seconds,
and a member counts as connected only when its HTTP/2 settings have come, for a frozen one's kernel takes
connections as well. A connection that is left while calls run on it is retired: they go on until they end, or the
ping says that it is dead.

Endpoints come in groups, and one of a later group is tried only if none of those before can be connected to: those that
were preferred since (`prefer`), those that were given or discovered, and `Config.more_endpoints`. Discovered ones are
looked up again as soon as none of them answers, beside the attempts to connect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import trio
from attrs import define, evolve, field

from .api import Config, ConnectionRefusedByTls, EtcdError, Unavailable
from .balancer import Balancer
from .connection import Connection
from .discovery import discover
from .endpoint import EtcdEndpoint, parse_endpoint
from .grpc import TransportFailed
from .tls import Lookups, connect

STAGGER = 0.3
LOOK_UP_PAUSE = 2.0
"""Seconds between two look-ups of discovered endpoints at least."""


class EndpointsUnreachable(Exception):
    """Each endpoint was tried once, none could be connected to."""

    def __init__(self, failures: dict[EtcdEndpoint | str, TransportFailed]) -> None:
        super().__init__(failures)
        self.failures = failures

    @property
    def permanent(self) -> bool:
        """Whether trying again is of no use before someone changes something."""
        return bool(self.failures) and all(failure.permanent for failure in self.failures.values())

    def to_error(self) -> EtcdError:
        """The error for a caller of the client, with the reason of each endpoint: ConnectionRefusedByTls if trying
        again is of no use, else Unavailable."""
        reasons = "; ".join(sorted(f"{endpoint}: {failure.reason}" for endpoint, failure in self.failures.items()))
        if self.permanent:
            return ConnectionRefusedByTls(f"cannot talk to etcd at {reasons}")
        return Unavailable(f"cannot reach etcd at {reasons}")


@define(eq=False)
class _Dial:
    done: trio.Event = field(factory=trio.Event)
    connection: Connection | None = None
    failures: dict[EtcdEndpoint | str, TransportFailed] = field(factory=dict)
    """Why the endpoints could not be connected to, or not be found."""


class Channel:
    """One connection to etcd for all calls, made anew at the next endpoint when it is lost or a call fails over it.
    Tasks that need one at the same time wait for the same attempt."""

    def __init__(
        self, config: Config, nursery: trio.Nursery, *, on_remark: Callable[[str], object] = lambda _sentence: None
    ) -> None:
        """`on_remark` is called with sentences on discovered endpoints that are left out. Raises BadRequest for an
        endpoint that is none."""
        self._config = config
        self._nursery = nursery
        self._on_remark = on_remark
        self._preferred: tuple[EtcdEndpoint, ...] = ()
        self._first = self._parse(config.endpoints)
        """The given ones, or the discovered ones."""
        self._more = self._parse(config.more_endpoints)
        self._looking_up = False
        self._looked_up_at = -math.inf
        self._remarks: tuple[str, ...] = ()
        self._balancer = Balancer(self.endpoints)
        self._current: Connection | None = None
        self._dialling: _Dial | None = None
        self._live: set[Connection] = set()
        self._lookups: dict[EtcdEndpoint, Lookups] = {}

    @property
    def endpoints(self) -> tuple[EtcdEndpoint, ...]:
        """All that may be used now, those to try first before the others."""
        return tuple(dict.fromkeys((*self._preferred, *self._first, *self._more)))

    def prefer(self, endpoints: Sequence[str]) -> None:
        """Try these before all others from now on. Raises BadRequest."""
        self._preferred = self._parse(endpoints)
        self._balancer.replace(self.endpoints)

    def _parse(self, endpoints: Sequence[str]) -> tuple[EtcdEndpoint, ...]:
        return tuple(dict.fromkeys(map(self.parse, endpoints)))

    def parse(self, text: str) -> EtcdEndpoint:
        """An endpoint as this channel connects to it. Raises BadRequest."""
        endpoint, discovery = parse_endpoint(text, tls=self._config.tls is not None), self._config.discovery
        if endpoint.tls and discovery is not None and not discovery.insecure:
            return evolve(endpoint, server_name=discovery.domain.rstrip("."))
        return endpoint

    async def connection(self) -> Connection:
        """The connection for a new call. Raises Unreachable after each endpoint was tried once."""
        while True:
            current = self._current
            if current is not None and current.lost is None and not current.retiring:
                return current
            if self._dialling is None:
                self._dialling = _Dial()
                self._nursery.start_soon(self._dial, self._dialling)
            dial = self._dialling
            await dial.done.wait()
            if dial.connection is None:
                raise EndpointsUnreachable(dial.failures)

    @property
    def endpoint(self) -> str | None:
        """The endpoint of the connection in use, as a URL; None while there is none."""
        return str(self._current.endpoint) if self._current and self._current.lost is None else None

    def failed(self, connection: Connection) -> None:
        """Something about `connection` failed that another member may do better: leave it."""
        if connection.retiring:
            return
        if self._current is connection:
            self._current = None
        self._balancer.failed(connection.endpoint, trio.current_time())
        connection.retire()

    def succeeded(self, connection: Connection) -> None:
        """A call over `connection` was answered: its endpoint has no failures any more."""
        if not connection.retiring:
            self._balancer.succeeded(connection.endpoint)

    async def dial_one(self, endpoint: EtcdEndpoint) -> Connection:
        """A connection of the caller's own, which the caller closes. Raises TransportFailed."""
        connection: Connection | None = None
        timeout = self._config.dial_timeout
        # One each, so that a name which hangs is in the way of itself only.
        lookups = self._lookups.setdefault(endpoint, Lookups())
        try:
            with trio.move_on_after(timeout) as scope:
                transport = await connect(endpoint, self._config.tls, lookups)
                connection = Connection(
                    transport,
                    endpoint,
                    ping_interval=self._config.ping_interval,
                    ping_timeout=self._config.ping_timeout,
                )
                self._nursery.start_soon(self._serve, connection)
                await connection.ready()
                return connection
        except BaseException:
            if connection:
                connection.close()
            raise
        assert scope.cancelled_caught
        if connection:
            connection.close()
        hint = "frozen or cut off"
        if endpoint.tls and connection is None:
            hint += "; or it does not speak TLS: then write http://"
        raise TransportFailed(f"it did not answer within {timeout:g} s ({hint})", processed=False)

    async def _dial(self, dial: _Dial) -> None:
        try:
            if self._config.discovery is not None:
                await self._renew_discovered(dial)
            tried = set[EtcdEndpoint]()
            for group in (self._preferred, self._first, self._more):
                if (left := set(group) - tried) and dial.connection is None:
                    tried |= left
                    await self._dial_some(dial, left)
        finally:
            self._current = dial.connection
            self._dialling = None
            dial.done.set()

    async def _dial_some(self, dial: _Dial, endpoints: Collection[EtcdEndpoint]) -> None:
        async with trio.open_nursery() as attempts:
            started = trio.current_time()
            for rest, endpoint in self._balancer.order(started, endpoints):
                await trio.sleep_until(max(started + rest, trio.current_time()))
                over = trio.Event()
                attempts.start_soon(self._attempt, dial, endpoint, over, attempts.cancel_scope)
                with trio.move_on_after(STAGGER):
                    await over.wait()

    async def _renew_discovered(self, dial: _Dial) -> None:
        """Look the endpoints up if none is known, or none has answered since it failed; the latter beside the dial,
        since DNS may be away too."""
        due = self._looked_up_at + LOOK_UP_PAUSE
        if not self._first:
            if not self._preferred and not self._more:
                await trio.sleep_until(due)
            await self._look_up(dial)
        elif not self._looking_up and due <= trio.current_time() and self._balancer.all_failed(self._first):
            self._nursery.start_soon(self._look_up, dial)

    async def _look_up(self, dial: _Dial) -> None:
        discovery = self._config.discovery
        assert discovery is not None
        self._looking_up = True
        try:
            found = await discover(discovery)
        except TransportFailed as failure:
            dial.failures[f"the endpoints of {discovery.domain}"] = failure
        else:
            if set(found.endpoints) != set(self._first):
                self._first = found.endpoints
                self._balancer.replace(self.endpoints)
            for remark in found.remarks:
                if remark not in self._remarks:
                    self._on_remark(remark)
            self._remarks = found.remarks
        finally:
            self._looking_up = False
            self._looked_up_at = trio.current_time()

    async def _attempt(self, dial: _Dial, endpoint: EtcdEndpoint, over: trio.Event, won: trio.CancelScope) -> None:
        self._balancer.chosen(endpoint)
        try:
            connection = await self.dial_one(endpoint)
        except TransportFailed as failure:
            dial.failures[endpoint] = failure
            self._balancer.failed(endpoint, trio.current_time())
        else:
            if dial.connection is None:
                dial.connection = connection
                won.cancel()
            else:
                connection.close()
        over.set()

    async def _serve(self, connection: Connection) -> None:
        self._live.add(connection)
        try:
            await connection.run()
        finally:
            self._live.discard(connection)
            if self._current is connection:
                self._current = None
                if not connection.retiring:
                    connection.retiring = True
                    self._balancer.failed(connection.endpoint, trio.current_time())

    def __repr__(self) -> str:
        state = repr(self._current) if self._current else "dialling" if self._dialling else "not connected"
        others = len(self._live - {self._current}) if self._current else len(self._live)
        return f"<Channel {state}{f', {others} retiring' if others else ''}, {self._balancer!r}>"
