"""One HTTP/2 connection over a trio stream: many calls side by side, and a member that freezes is noticed.

Three tasks run in `run`: one reads, one writes, one pings. Callers change h2's state without awaiting and wake the
writer, so that a cancelled caller can never leave half a frame on the wire; its stream is reset and the connection goes
on. Received bytes are credited to the connection at once and to their stream when they are taken, so that a slow
reader of one stream (a watch) is held back by its own window alone. It promises no reconnection: once lost, it is lost,
and every stream says why.

The probe is a PING where gRPC servers permit one, and else a health check, which is a call. For grpc-go (etcd) counts
pings that come more often than every 5 s, or with no call open, as strikes, and hangs up after the third; only headers
or data that it sends clear them. See handlePing in grpc-go's http2_server.go.
"""

from __future__ import annotations

import itertools
import math
import ssl
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio

from .endpoint import EtcdEndpoint
from .grpc import TransportFailed, frame, request_headers

STREAM_WINDOW = 4 << 20
CONNECTION_WINDOW = 16 << 20
READ_SIZE = 256 << 10
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

Headers = list[tuple[bytes, bytes]]
_Gone = (OSError, ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError)
_numbers = itertools.count(1)


class Stream:
    """One exchange on the connection, used by one task. Close it in all cases; that is synchronous."""

    def __init__(self, connection: Connection, stream_id: int) -> None:
        self.id = stream_id
        self.headers: Headers | None = None
        """The first headers of the answer, once `receive` has given something."""
        self.trailers: Headers | None = None
        self._connection = connection
        self._chunks: deque[bytes] = deque()
        self._uncredited = 0
        self._ended = False
        self._sent_end = False
        self._failure: TransportFailed | None = None
        self._wake = trio.lowlevel.ParkingLot()

    async def send(self, data: bytes, *, end: bool = False) -> None:
        """Hand `data` over to the writer as far as the peer's windows allow. Raises TransportFailed."""
        h2c = self._connection._h2
        view = memoryview(data)
        while True:
            if self._failure:
                raise self._failure
            if self._ended:
                return  # The answer is complete already (an error, most likely): it says more than we could.
            room = min(h2c.local_flow_control_window(self.id), h2c.max_outbound_frame_size)
            if room > 0 or not view:
                part, view = bytes(view[:room]), view[room:]
                h2c.send_data(self.id, part, end_stream=end and not view)
                self._connection._wake_writer()
                if not view:
                    self._sent_end = end
                    return
            else:
                await self._wake.park()

    async def receive(self) -> bytes | None:
        """The next bytes; None at the end, when `trailers` (or `headers`, if they were all) hold the status."""
        while not self._chunks:
            if self._failure:
                raise self._failure
            if self._ended:
                return None
            await self._wake.park()
        data = self._chunks.popleft()
        self._uncredited += len(data)
        if self._uncredited >= STREAM_WINDOW // 2 and not self._ended and not self._failure:
            self._connection._credit(self._uncredited, self.id)
            self._uncredited = 0
        return data

    def close(self) -> None:
        """End the stream; it is reset at the server if it was not finished."""
        self._connection._close_stream(self)

    def _fail(self, failure: TransportFailed) -> None:
        if not self._ended and self._failure is None:
            self._failure = failure
        self._wake.unpark_all()


class Connection:
    """One HTTP/2 connection to a member. It asks for a sign of life whenever nothing has arrived for `ping_interval`
    seconds, and is lost if none arrives within `ping_timeout`."""

    def __init__(
        self,
        transport: trio.abc.Stream,
        endpoint: EtcdEndpoint,
        *,
        ping_interval: float = 1.0,
        ping_timeout: float = 1.5,
    ) -> None:
        self.endpoint = endpoint
        self.number = next(_numbers)
        self.lost: TransportFailed | None = None
        """Why the connection is of no use any more; set once."""
        self.last_received = -math.inf
        """trio.current_time() when something last arrived."""
        self.retiring = False
        """Takes no new calls; closes itself with its last stream."""
        self.server_version: str | None = None
        """etcd's version, once someone has asked."""
        self._transport = transport
        self._ping_interval = ping_interval
        self._ping_timeout = ping_timeout
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True,
                header_encoding=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._streams: dict[int, Stream] = {}
        self._ready = trio.Event()
        self._heard = trio.Event()
        self._slots = trio.lowlevel.ParkingLot()
        self._writer = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()
        self._unsent: set[int] = set()
        """Streams of which the writer has taken nothing yet."""
        self._uncredited = 0
        self._may_ping = True
        self._first_bytes = b""

    # -- what callers use ------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait for the peer's settings, which a frozen member never sends. Raises TransportFailed."""
        await self._ready.wait()
        if self.lost:
            raise self.lost

    async def open(self, path: str, metadata: tuple[tuple[str, str], ...] = ()) -> Stream:
        """Begin a call. Raises TransportFailed with `processed` False: nothing was sent."""
        limit = self._h2.remote_settings.max_concurrent_streams
        while not self.lost and self._h2.open_outbound_streams >= limit:
            await self._slots.park()
        if self.lost:
            raise TransportFailed(self.lost.reason, processed=False, permanent=self.lost.permanent)
        try:
            stream_id = self._h2.get_next_available_stream_id()
        except h2.exceptions.NoAvailableStreamIDError:
            self.retire()
            raise TransportFailed("the connection has used all its stream numbers", processed=False) from None
        self._h2.send_headers(
            stream_id,
            request_headers(path, authority=self.endpoint.authority, tls=self.endpoint.tls, metadata=metadata),
        )
        stream = self._streams[stream_id] = Stream(self, stream_id)
        self._unsent.add(stream_id)
        self._wake_writer()
        return stream

    def retire(self) -> None:
        """Take no new calls, and close with the last stream; at once if there is none."""
        self.retiring = True
        if not self._streams:
            self.close("no longer needed")

    def close(self, reason: str = "closed by this client") -> None:
        """End the connection now. Its streams fail with `reason`."""
        self._lose(reason)

    def __repr__(self) -> str:
        if self.lost:
            state = f"lost: {self.lost.reason}"
        elif not self._ready.is_set():
            state = "connecting"
        else:
            state = f"{'retiring' if self.retiring else 'open'}, {len(self._streams)} streams"
        return f"<Connection {self.number} to {self.endpoint} [{state}]>"

    # -- the three tasks -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the connection until it is lost; never raises for a failure of the peer."""
        self._h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                h2.settings.SettingCodes.ENABLE_PUSH: 0,
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: 64 << 10,
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._ping)
                    await self._read()
        finally:
            self._lose("closed by this client")
            await trio.aclose_forcefully(self._transport)

    async def _read(self) -> None:
        while True:
            try:
                data = await self._transport.receive_some(READ_SIZE)
            except _Gone as error:
                cause = error.__cause__
                refused = isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError)
                return self._lose(_why(error), permanent=refused and not self._ready.is_set())
            if not data:
                return self._lose(self._explain_end())
            self.last_received = trio.current_time()
            self._heard.set()
            if not self._ready.is_set():
                self._first_bytes = (self._first_bytes + bytes(data))[:9]
                if not _may_be_settings(self._first_bytes):
                    return self._lose(*self._explain_garbage(None))
            try:
                events = self._h2.receive_data(bytes(data))
            except h2.exceptions.ProtocolError as error:
                return self._lose(*self._explain_garbage(error))
            for event in events:
                self._handle(event)
            self._wake_writer()

    async def _write(self) -> None:
        while True:
            data = self._h2.data_to_send()
            self._unsent.clear()
            if not data:
                await self._writer.park()
                continue
            try:
                await self._transport.send_all(data)
            except _Gone as error:
                # What was received before tells more than a broken pipe does: let the reader find the end.
                with trio.move_on_after(0.2):
                    await trio.sleep_forever()
                return self._lose(_why(error))

    async def _ping(self) -> None:
        await self._ready.wait()
        while True:
            now = trio.current_time()
            quiet_until = self.last_received + self._ping_interval
            if now < quiet_until:
                await trio.sleep(quiet_until - now)
                continue
            self._heard = trio.Event()
            self._probe()
            with trio.move_on_after(self._ping_timeout):
                await self._heard.wait()
            # Perhaps it was this process that was stopped: then the answer waits in the socket.
            if not self._heard.is_set() and trio.current_time() - now > self._ping_timeout + 0.25:
                with trio.move_on_after(0.25):
                    await self._heard.wait()
            if self._heard.is_set():
                continue
            waited = self._ping_interval + self._ping_timeout
            return self._lose(f"the member has not answered for {waited:g} s (frozen or cut off)")

    def _probe(self) -> None:
        if self._may_ping:
            self._may_ping = False
            self._h2.ping(b"kiloetcd")
            return self._wake_writer()
        try:
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(
                stream_id, request_headers(HEALTH_CHECK, authority=self.endpoint.authority, tls=self.endpoint.tls)
            )
            self._h2.send_data(stream_id, frame(b""), end_stream=True)
        except h2.exceptions.ProtocolError:
            pass  # No stream to be had: the connection is busy, or will be seen to be dead.
        return self._wake_writer()

    # -- what arrives ----------------------------------------------------------------------------------------------

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.DataReceived):
            self._may_ping = True
            assert event.stream_id is not None
            self._uncredited += event.flow_controlled_length or 0
            if self._uncredited >= CONNECTION_WINDOW // 2:
                # Refused where a goodbye came in the same bytes as this data: then there is nothing to credit.
                with suppress(h2.exceptions.ProtocolError):
                    self._h2.increment_flow_control_window(self._uncredited)
                self._uncredited = 0
            stream = self._streams.get(event.stream_id)
            if stream and event.data:
                stream._uncredited += (event.flow_controlled_length or 0) - len(event.data)
                stream._chunks.append(event.data)
                stream._wake.unpark_all()
        elif isinstance(event, h2.events.ResponseReceived):
            self._may_ping = True
            if stream := self._streams.get(event.stream_id or 0):
                stream.headers = _plain(event.headers)
        elif isinstance(event, h2.events.TrailersReceived):
            self._may_ping = True
            if stream := self._streams.get(event.stream_id or 0):
                stream.trailers = _plain(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            if stream := self._streams.get(event.stream_id or 0):
                stream._ended = True
                stream._wake.unpark_all()
            self._slots.unpark_all()
        elif isinstance(event, h2.events.StreamReset):
            refused = event.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
            if stream := self._streams.get(event.stream_id or 0):
                stream._fail(TransportFailed(f"etcd reset the call ({event.error_code!r})", processed=not refused))
            self._slots.unpark_all()
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            for stream in self._streams.values():
                stream._wake.unpark_all()
            self._slots.unpark_all()
            if isinstance(event, h2.events.RemoteSettingsChanged):
                self._ready.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            # h2 knows no life after GOAWAY: what the peer had begun is lost, the rest is free to be retried.
            last = event.last_stream_id or 0
            for stream_id, stream in self._streams.items():
                if stream_id > last:
                    stream._fail(TransportFailed("etcd is closing the connection", processed=False))
            note = (event.additional_data or b"").decode(errors="replace")
            self._lose(f"etcd closed the connection ({note or 'it is stopping'})")

    def _explain_end(self) -> str:
        if self._ready.is_set():
            return "etcd closed the connection"
        if self.endpoint.tls:
            return "it hung up before it said anything; does it want a client certificate?"
        return "it hung up before it said anything; if it speaks TLS, write the endpoint with https://"

    def _explain_garbage(self, error: Exception | None) -> tuple[str, bool]:
        first = self._first_bytes
        if not self._ready.is_set() and not self.endpoint.tls and (first[:1] == b"\x15" or first.startswith(b"HTTP/1")):
            return "it speaks TLS or plain HTTP/1, not HTTP/2 without TLS; write the endpoint with https://", True
        if not self._ready.is_set():
            return "what answers there does not speak HTTP/2; is it etcd's client port?", True
        return f"the member broke the HTTP/2 protocol ({error})", False

    # -- ends ------------------------------------------------------------------------------------------------------

    def _lose(self, reason: str, permanent: bool = False) -> None:
        if self.lost:
            return
        self.lost = TransportFailed(reason, permanent=permanent)
        self._ready.set()
        self._slots.unpark_all()
        for stream in self._streams.values():
            stream._fail(TransportFailed(reason, processed=stream.id not in self._unsent, permanent=permanent))
        self._scope.cancel()

    def _close_stream(self, stream: Stream) -> None:
        if self._streams.pop(stream.id, None) is None:
            return
        if not self.lost and not (stream._ended and stream._sent_end) and not stream._failure:
            with suppress(h2.exceptions.ProtocolError):
                self._h2.reset_stream(stream.id, h2.errors.ErrorCodes.CANCEL)
            self._wake_writer()
        self._slots.unpark_all()
        if self.retiring and not self._streams:
            self.close("no longer needed")

    def _credit(self, count: int, stream_id: int) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self._h2.increment_flow_control_window(count, stream_id)
        self._wake_writer()

    def _wake_writer(self) -> None:
        self._writer.unpark_all()


def _may_be_settings(first: bytes) -> bool:
    """Whether these are the first bytes of a SETTINGS frame (RFC 9113, 4.1): short, type 4, stream 0."""
    length, kind, number = first[:3], first[3:4], first[5:9]
    return (
        length[:1] in (b"", b"\0") and length[1:2] in (b"", b"\0") and kind in (b"", b"\4") and not number.strip(b"\0")
    )


def _plain(headers: Sequence[tuple[bytes, bytes]] | None) -> Headers:
    return [(bytes(name), bytes(value)) for name, value in headers or ()]


def _why(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) and error.__cause__ else error
    if isinstance(cause, ssl.SSLError):
        return explain_tls(cause)
    return f"the connection broke ({getattr(cause, 'strerror', None) or cause})"


def explain_tls(error: ssl.SSLError) -> str:
    """What a TLS failure means and what to do about it, as half a sentence."""
    if isinstance(error, ssl.SSLCertVerificationError):
        text = error.verify_message or str(error)
        if error.verify_code in (62, 63, 64):
            return f"its certificate is for another name ({text}); use a name that the certificate has"
        if error.verify_code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, _HAS_EXPIRED
            return f"its certificate is not valid now ({text}); renew etcd's certificate, or set the clock"
        return f"its certificate is not trusted ({text}); check --cacert"
    text = f"{error.reason or ''} {error}".upper().replace(" ", "_")
    if "CERTIFICATE_REQUIRED" in text or "BAD_CERTIFICATE" in text:
        return "it refuses the client certificate, or wants one; check --cert (has it expired?) and --key"
    if "ALERT_UNKNOWN_CA" in text or "CERTIFICATE_UNKNOWN" in text or "CERTIFICATE_EXPIRED" in text:
        return "it refuses the client certificate (unknown CA, or expired); check --cert"
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return "it does not speak TLS; write the endpoint with http://"
    return f"TLS failed ({error.reason or error})"
