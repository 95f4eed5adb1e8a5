"""Calls: what is sent where, for how long, and when it is tried again.

The rule for trying again, in one place. A request that certainly was not acted upon (no connection; the stream
refused, or above the last one that a closing member named; the token refused) is tried again whatever it is. A
request that may have been acted upon is tried again only if it is idempotent: `range`, `status`, `members`, time to
live, one keepalive, authentication, a transaction that only reads. A put, delete, writing transaction, grant,
revoke or compaction is not; the error then says that its outcome is unknown. All attempts together last
`call_timeout`, each `attempt_timeout`; but a read whose answer is on its way is not given up while more of it comes, or
a large one would never be had over a slow link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import trio

from .api import Config, EtcdError, Unavailable
from .auth import Tokens
from .channel import Channel, EndpointsUnreachable
from .connection import Connection, Stream
from .grpc import (
    Deframer,
    Doing,
    Metadata,
    StatusError,
    TransportFailed,
    check_response,
    frame,
    status_of,
    to_error,
)
from .pb import etcd_pb2 as pb


class Message(Protocol):
    """What this client needs of a protobuf message."""

    def SerializeToString(self) -> bytes:
        """The message in protobuf's wire format."""
        ...

    @classmethod
    def FromString(cls, data: bytes, /) -> Self:
        """A message from protobuf's wire format. Raises DecodeError at anything else."""
        ...


M = TypeVar("M", bound=Message)


class Call:
    """One gRPC call. `close` it in all cases: what is not finished is cancelled at the server."""

    def __init__(self, connection: Connection, stream: Stream, token: str) -> None:
        self.connection = connection
        self.token = token
        self._stream = stream
        self._deframer = Deframer()
        self._messages: deque[bytes] = deque()
        self._checked = False
        self.on_data: Callable[[], None] | None = None

    async def send(self, message: Message, *, end: bool = False) -> None:
        """Send a message; with `end`, the last one of this side. Raises TransportFailed."""
        await self._stream.send(frame(message.SerializeToString()), end=end)

    async def receive(self) -> bytes | None:
        """The next message; None when etcd ended the call with OK. Raises StatusError, TransportFailed.

        A receive that is cancelled has taken nothing.
        """
        while not self._messages:
            data = await self._stream.receive()
            if not self._checked:
                check_response(self._stream.headers or ())
                self._checked = True
            if data is None:
                status = status_of(self._stream.trailers or self._stream.headers or ())
                if status:
                    raise status
                return None
            if self.on_data:
                self.on_data()
            self._messages.extend(self._deframer.feed(data))
        return self._messages.popleft()

    def close(self) -> None:
        """End the call; the server is told if it was not finished. Closing twice is allowed."""
        self._stream.close()


class Caller:
    """Makes calls over the channel: with a token, with deadlines, and again at another member if that can do no
    harm."""

    def __init__(self, config: Config, channel: Channel) -> None:
        self.config = config
        self.channel = channel
        self.tokens = Tokens(self._authenticate) if config.user else None

    async def unary(
        self,
        path: str,
        request: Message,
        answer: type[M],
        doing: Doing,
        *,
        idempotent: bool = False,
        auth: bool = True,
        streaming: bool = False,
    ) -> M:
        """`streaming`: the method is one of streams, of which one answer is wanted. Raises EtcdError only."""
        # What is sent once only is given all the time: to give up early would only make its outcome unknown.
        timeout = self.config.attempt_timeout if idempotent else self.config.call_timeout
        last: Exception | None = None
        token_refused = False
        under_way: tuple[Connection, float] | None = None
        with trio.move_on_after(self.config.call_timeout) as overall:
            while True:
                try:
                    connection = await self.channel.connection()
                except EndpointsUnreachable as error:
                    if error.permanent:
                        raise error.to_error() from None
                    last = error  # The balancer lets endpoints rest, so this loop does not spin.
                    continue
                token = await self.tokens.get() if auth and self.tokens else ""
                try:
                    under_way = connection, trio.current_time()
                    with trio.move_on_after(timeout) as attempt:

                        def more(scope: trio.CancelScope = attempt) -> None:
                            scope.deadline = trio.current_time() + timeout
                            overall.deadline = max(overall.deadline, scope.deadline)

                        on_data = more if idempotent else None
                        raw = await self.attempt(connection, path, request, token, on_data, streaming=streaming)
                        self.channel.succeeded(connection)
                        return answer.FromString(raw)
                    failure: Exception = TransportFailed(f"no answer within {timeout:g} s")
                except TransportFailed as error:
                    failure = error
                except StatusError as status:
                    under_way = None
                    if auth and not token_refused and self._refused(status, token):
                        token_refused = True
                        continue
                    failure = status
                    if not status.leaves_member:
                        raise self.explain(status, connection, doing) from None
                under_way = None
                self.channel.failed(connection)
                if not idempotent and (isinstance(failure, StatusError) or getattr(failure, "processed", True)):
                    raise self._unknown(failure, connection, doing) from None
                last = self.explain(failure, connection, doing)
        if under_way is not None:
            # The time was up while an answer was awaited.
            connection, began = under_way
            if trio.current_time() - began >= self.config.attempt_timeout:
                self.channel.failed(connection)
            failure = TransportFailed(f"no answer within {self.config.call_timeout:g} s")
            if not idempotent:
                raise self._unknown(failure, connection, doing)
            last = last or self.explain(failure, connection, doing)
        if isinstance(last, EndpointsUnreachable):
            last = last.to_error()
        raise last if last else Unavailable(f"etcd did not {doing} within {self.config.call_timeout:g} s; retry")

    async def attempt(
        self,
        connection: Connection,
        path: str,
        request: Message,
        token: str,
        more: Callable[[], None] | None = None,
        *,
        streaming: bool = False,
    ) -> bytes:
        """One attempt on one connection, of a call with one answer; `more` is called as parts of it arrive. A stream is
        not ended before its answer is there: etcd's gRPC proxy would cancel it (etcd issue 9751). Raises StatusError,
        TransportFailed."""
        call = await self._begin(connection, path, token)
        call.on_data = more
        try:
            await call.send(request, end=not streaming)
            message = await call.receive()
            if message is None:
                raise TransportFailed("etcd ended the call without an answer")
            if not streaming:
                await call.receive()  # The status, which is in the trailers.
            return message
        finally:
            call.close()

    async def stream(self, path: str) -> Call:
        """Begin a call of many messages, which a member without quorum shall end.

        Raises Unreachable, TransportFailed, and EtcdError for a refused password.
        """
        connection = await self.channel.connection()
        token = await self.tokens.get() if self.tokens else ""
        return await self._begin(connection, path, token, (("hasleader", "true"),))

    def stream_failed(self, call: Call, error: Exception) -> bool:
        """Whether to begin the call anew after `error`; leaves the member, or the token, as that asks for."""
        if isinstance(error, StatusError) and not error.leaves_member:
            return self._refused(error, call.token)
        self.channel.failed(call.connection)
        return True

    def explain(self, failure: Exception, connection: Connection, doing: Doing) -> EtcdError:
        """The error for a caller of the client: which endpoint could not do what, why, and what to do."""
        endpoint = str(connection.endpoint)
        if isinstance(failure, StatusError):
            return to_error(failure, doing, endpoint=endpoint, user=self.config.shown_user)
        return Unavailable(f"etcd at {endpoint} could not {doing}: {failure}; retry")

    def _unknown(self, failure: Exception, connection: Connection, doing: Doing) -> EtcdError:
        reason = failure.message if isinstance(failure, StatusError) else str(failure)
        return Unavailable(
            f"etcd at {connection.endpoint} may or may not have done it ({doing}): {reason}; read, then retry"
        )

    def _refused(self, status: StatusError, token: str) -> bool:
        """Whether a new token may help; then the next call fetches one."""
        if self.tokens is None or not (status.token_refused or "user name is empty" in status.message):
            return False
        self.tokens.refuse(token)
        return True

    async def _begin(self, connection: Connection, path: str, token: str, metadata: Metadata = ()) -> Call:
        stream = await connection.open(path, (*metadata, ("token", token)) if token else metadata)
        return Call(connection, stream, token)

    async def _authenticate(self) -> str:
        request = pb.AuthenticateRequest(name=self.config.user or "", password=self.config.password or "")
        doing = Doing(f"authenticate user {self.config.shown_user!r}")
        try:
            answer = await self.unary(
                "/etcdserverpb.Auth/Authenticate", request, pb.AuthenticateResponse, doing, idempotent=True, auth=False
            )
        except EtcdError as error:
            # As etcdctl does: a user given to an etcd without authentication is no error.
            if "authentication is not enabled" in str(error):
                return ""
            raise
        return answer.token
