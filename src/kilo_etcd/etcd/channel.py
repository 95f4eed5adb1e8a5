"""The connection in use, of several endpoints: made when first needed, left when it fails, made again.

One connection carries everything. Dialling is a background task shared by all who wait, so that a cancelled caller
spoils it for nobody. A second endpoint is tried beside the first when that has not answered in `STAGGER` seconds,
and a member counts as connected only when its HTTP/2 settings have come, for a frozen one's kernel takes
connections as well. A connection that is left while calls run on it is retired: they go on until they end, or the
ping says that it is dead.

Endpoints come in groups, and one of a later group is tried only if none of those before can be connected to: those that
were preferred since (`prefer`), the first of those that were given if that is wanted (`Config.prefer_first`), all that
were given or discovered, and `Config.more_endpoints`. In a group each client begins at an endpoint of its own, so that
clients with one list spread over it. A connection that stands is not left for an endpoint that comes before. A group of
which none has answered since it failed is not waited for: it is begun, or left to rest, and the next one is tried
beside it. Discovered endpoints are looked up again as soon as none of them answers, beside the attempts to connect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import trio
from attrs import define, evolve, field

from .api import Config, ConnectionRefusedByTls, Discovery, EtcdError, Unavailable
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
        """`on_remark` is called with sentences on endpoints that are left out or lead nowhere. Raises BadRequest for an
        endpoint that is none."""
        self._config = config
        self._nursery = nursery
        self._on_remark = on_remark
        self._preferred: tuple[EtcdEndpoint, ...] = ()
        self._first = self._parse(config.endpoints)
        """The given ones, or the discovered ones."""
        self._more = self._parse(config.more_endpoints)
        self._looking_up: trio.Event | None = None
        """Set at the end of the look-up under way."""
        self._looked_up_at = -math.inf
        self._look_up_failure: TransportFailed | None = None
        """Why the last look-up has failed."""
        self._remarks: tuple[str, ...] = ()
        self._preferred_settled = False
        """One of the preferred ones was connected to, or it was said that none can be."""
        self._preferred_failures: dict[EtcdEndpoint, TransportFailed] = {}
        self._changed = trio.Event()
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
        self._preferred_settled = self._current is not None and self._current.endpoint in self._preferred
        self._preferred_failures.clear()
        self._replaced()

    async def wait_endpoints(self, seen: Collection[str]) -> tuple[str, ...]:
        """The endpoints, as soon as they are others than these, in whichever order."""
        while set(now := tuple(map(str, self.endpoints))) == set(seen):
            await self._changed.wait()
        return now

    def _replaced(self) -> None:
        self._balancer.replace(self.endpoints)
        self._changed.set()
        self._changed = trio.Event()

    def _parse(self, endpoints: Sequence[str]) -> tuple[EtcdEndpoint, ...]:
        return tuple(dict.fromkeys(map(self.parse, endpoints)))

    def parse(self, text: str) -> EtcdEndpoint:
        """An endpoint as this channel connects to it. Raises BadRequest."""
        endpoint, discovery = parse_endpoint(text, tls=self._config.tls is not None), self._config.discovery
        if endpoint.tls and discovery is not None:
            return evolve(endpoint, server_name=discovery.server_name)
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
            await self._renew_discovered()
            async with trio.open_nursery() as attempts:
                await self._try_groups(dial, attempts)
            if dial.connection is None and self._look_up_failure is not None:
                dial.failures[self._discovered] = self._look_up_failure
            self._note_members(dial)
        finally:
            self._current = dial.connection
            self._dialling = None
            dial.done.set()

    async def _try_groups(self, dial: _Dial, attempts: trio.Nursery) -> None:
        """Begin the attempts in their order, until the first that succeeds cancels the rest."""
        started = trio.current_time()
        tried, postponed, under_way = set[EtcdEndpoint](), list[tuple[float, EtcdEndpoint]](), list[trio.Event]()

        async def begin(rest: float, endpoint: EtcdEndpoint) -> None:
            await trio.sleep_until(max(started + rest, trio.current_time()))
            over = trio.Event()
            under_way.append(over)
            attempts.start_soon(self._attempt, dial, endpoint, over, attempts.cancel_scope)
            with trio.move_on_after(STAGGER):
                await over.wait()

        first = self._first[:1] if self._config.prefer_first else ()
        for group in (self._preferred, first, self._first, self._more):
            left = set(group) - tried
            if not left:
                continue
            for over in under_way:
                await over.wait()
            tried |= left
            doubtful = self._balancer.all_failed(left)
            for rest, endpoint in self._balancer.order(started, left):
                if doubtful and rest > 0:
                    postponed.append((rest, endpoint))
                else:
                    await begin(rest, endpoint)
            if doubtful:
                under_way.clear()
        for rest, endpoint in sorted(postponed, key=lambda pair: pair[0]):
            await begin(rest, endpoint)

    def _note_members(self, dial: _Dial) -> None:
        """Say once that none of the preferred endpoints can be connected to, while another can."""
        preferred, failures = self._preferred, self._preferred_failures
        if dial.connection is None or self._preferred_settled or not preferred or not failures.keys() >= {*preferred}:
            return
        self._preferred_settled = True
        reasons = "; ".join(f"{endpoint}: {failures[endpoint].reason}" for endpoint in preferred)
        self._on_remark(
            "none of etcd's members can be connected to at the client URLs that it lists (etcd "
            f"--advertise-client-urls), so {dial.connection.endpoint} is used: {reasons}"
        )

    @property
    def _discovered(self) -> str:
        assert self._config.discovery is not None
        return f"the endpoints of {self._config.discovery.domain}"

    async def _renew_discovered(self) -> None:
        """Look the endpoints up if none is known, or none has answered since it failed: beside the dial, since DNS may
        be away too. The dial waits for them only as far as there are no others."""
        if self._config.discovery is None:
            return
        known = bool(self.endpoints)
        if self._looking_up is None and self._balancer.all_failed(self._first):
            due = self._looked_up_at + LOOK_UP_PAUSE
            if not known:
                await trio.sleep_until(due)
            if due <= trio.current_time():
                self._looking_up = trio.Event()
                self._nursery.start_soon(self._look_up, self._config.discovery, self._looking_up)
        if self._looking_up is not None and not self._first and not self._preferred:
            with trio.move_on_after(STAGGER if known else math.inf):
                await self._looking_up.wait()

    async def _look_up(self, discovery: Discovery, over: trio.Event) -> None:
        try:
            discovered = await discover(discovery)
        except TransportFailed as failure:
            self._look_up_failure = failure
        else:
            self._look_up_failure = None
            if set(discovered.endpoints) != set(self._first):
                self._first = discovered.endpoints
                self._replaced()
            for remark in discovered.remarks:
                if remark not in self._remarks:
                    self._on_remark(remark)
            self._remarks = discovered.remarks
        finally:
            self._looking_up = None
            self._looked_up_at = trio.current_time()
            over.set()

    async def _attempt(self, dial: _Dial, endpoint: EtcdEndpoint, over: trio.Event, won: trio.CancelScope) -> None:
        self._balancer.chosen(endpoint)
        try:
            connection = await self.dial_one(endpoint)
        except TransportFailed as failure:
            dial.failures[endpoint] = failure
            if endpoint in self._preferred:
                self._preferred_failures[endpoint] = failure
            self._balancer.failed(endpoint, trio.current_time())
        else:
            self._preferred_settled |= endpoint in self._preferred
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
