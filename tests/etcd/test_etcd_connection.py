"""One connection against an HTTP/2 peer in memory, in virtual time: windows, resets, goodbyes, pings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
import trio
import trio.testing

from kilo_etcd.etcd.api import Config, Unauthenticated, Unavailable
from kilo_etcd.etcd.auth import Tokens
from kilo_etcd.etcd.client import EtcdClient, open_client
from kilo_etcd.etcd.connection import CONNECTION_WINDOW, HEALTH_CHECK, Connection
from kilo_etcd.etcd.endpoint import parse_endpoint
from kilo_etcd.etcd.grpc import TransportFailed, frame
from kilo_etcd.etcd.pb import etcd_pb2 as pb

E = TypeVar("E", bound=h2.events.Event)

pytestmark = pytest.mark.autojump


class Peer:
    """An HTTP/2 server that does what it is told and remembers what came."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.events: list[h2.events.Event] = []
        self.on_event: Callable[[h2.events.Event], None] = lambda event: None
        self._stream = stream
        self._lock = trio.Lock()

    def got(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    async def flush(self) -> None:
        async with self._lock:
            if data := self.h2.data_to_send():
                await self._stream.send_all(data)

    async def run(self) -> None:
        self.h2.initiate_connection()
        await self.flush()
        while data := await self._stream.receive_some():
            for event in self.h2.receive_data(bytes(data)):
                self.events.append(event)
                self.on_event(event)
            await self.flush()


@asynccontextmanager
async def connected(silent: bool = False) -> AsyncIterator[tuple[Connection, Peer]]:
    ours, theirs = trio.testing.memory_stream_pair()
    connection = Connection(ours, parse_endpoint("peer:1", tls=False))
    peer = Peer(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        if not silent:
            nursery.start_soon(peer.run)
            await connection.ready()
        yield connection, peer
        connection.close()
        nursery.cancel_scope.cancel()


async def test_a_peer_that_says_nothing_is_never_ready() -> None:
    async with connected(silent=True) as (connection, _):
        with trio.move_on_after(60) as scope:
            await connection.ready()
        assert scope.cancelled_caught
        assert "connecting" in repr(connection)


async def test_a_peer_that_falls_silent_is_lost_within_three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as (connection, peer):
        stream = await connection.open("/x")
        monkeypatch.setattr(peer, "flush", trio.sleep_forever)
        began = trio.current_time()
        with pytest.raises(TransportFailed, match="has not answered"):
            await stream.receive()
        assert trio.current_time() - began == pytest.approx(2.5, abs=0.01)
        assert "lost" in repr(connection)
        with pytest.raises(TransportFailed) as caught:
            await connection.open("/x")
        assert not caught.value.processed


async def test_probes_are_pings_only_where_the_server_has_said_something_since() -> None:
    async with connected() as (connection, peer):
        peer.on_event = partial(answer_health_checks, peer)
        await trio.sleep(60)
        assert connection.lost is None
        kinds = [
            "ping" if isinstance(event, h2.events.PingReceived) else "call"
            for event in peer.events
            if isinstance(event, h2.events.PingReceived | h2.events.RequestReceived)
        ]
        assert kinds[:4] == ["ping", "call", "ping", "call"]
        assert len(kinds) == 59
        requests = peer.got(h2.events.RequestReceived)
        assert all(dict(event.headers)[b":path"].decode() == HEALTH_CHECK for event in requests)


async def test_a_request_larger_than_the_windows_waits_for_them() -> None:
    async with connected() as (connection, peer):
        received = bytearray()

        def take(event: h2.events.Event) -> None:
            if isinstance(event, h2.events.DataReceived):
                received.extend(event.data or b"")
                peer.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)

        peer.on_event = take
        stream = await connection.open("/x")
        body = bytes(range(256)) * 2000
        await stream.send(body, end=True)
        await trio.testing.wait_all_tasks_blocked()
        assert received == body


async def test_a_call_that_is_given_up_is_reset_and_others_go_on() -> None:
    async with connected() as (connection, peer):
        stream = await connection.open("/x")
        other = await connection.open("/y")
        with trio.move_on_after(0.1):
            await stream.receive()
        stream.close()
        await trio.testing.wait_all_tasks_blocked()
        resets = peer.got(h2.events.StreamReset)
        assert [(e.stream_id, e.error_code) for e in resets] == [(1, h2.errors.ErrorCodes.CANCEL)]
        peer.h2.send_headers(other.id, [(":status", "200")])
        peer.h2.send_data(other.id, b"hello", end_stream=True)
        await peer.flush()
        assert await other.receive() == b"hello"
        assert await other.receive() is None
        other.close()
        assert "0 streams" in repr(connection)


@pytest.mark.parametrize(
    ("code", "processed"), [(h2.errors.ErrorCodes.REFUSED_STREAM, False), (h2.errors.ErrorCodes.INTERNAL_ERROR, True)]
)
async def test_only_a_refused_stream_is_known_not_to_be_processed(code: h2.errors.ErrorCodes, processed: bool) -> None:
    async with connected() as (connection, peer):
        stream = await connection.open("/x")
        await trio.testing.wait_all_tasks_blocked()
        peer.h2.reset_stream(stream.id, code)
        await peer.flush()
        with pytest.raises(TransportFailed) as caught:
            await stream.receive()
        assert caught.value.processed is processed
        assert connection.lost is None


async def test_a_goodbye_tells_which_calls_were_not_processed() -> None:
    async with connected() as (connection, peer):
        first, second = await connection.open("/x"), await connection.open("/y")
        await trio.testing.wait_all_tasks_blocked()
        peer.h2.close_connection(last_stream_id=first.id)
        await peer.flush()
        for stream, processed in ((first, True), (second, False)):
            with pytest.raises(TransportFailed) as caught:
                await stream.receive()
            assert caught.value.processed is processed
        assert connection.lost


async def test_a_goodbye_right_behind_much_data_is_just_a_goodbye() -> None:
    async with connected() as (connection, peer):
        stream = await connection.open("/x")
        await trio.testing.wait_all_tasks_blocked()
        connection._uncredited = CONNECTION_WINDOW // 2  # As after answers of eight megabytes.
        peer.h2.send_headers(stream.id, [(":status", "200")])
        peer.h2.send_data(stream.id, bytes(100))
        peer.h2.close_connection()
        await peer.flush()
        assert await stream.receive() == bytes(100)
        await trio.testing.wait_all_tasks_blocked()
        assert connection.lost
        assert "closed the connection" in connection.lost.reason


async def test_a_write_that_a_living_member_never_answers_is_of_unknown_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a member without quorum does: it answers pings, and may yet commit. It is left for another."""
    peers: list[Peer] = []
    async with trio.open_nursery() as nursery:

        async def connect(*_args: object) -> trio.abc.Stream:
            ours, theirs = trio.testing.memory_stream_pair()
            peers.append(peer := Peer(theirs))
            peer.on_event = partial(answer_health_checks, peer)
            nursery.start_soon(peer.run)
            return ours

        monkeypatch.setattr("kilo_etcd.etcd.channel.connect", connect)
        async with open_client(Config(endpoints=("one:1", "two:1"))) as client:
            began = trio.current_time()
            with pytest.raises(Unavailable, match="may or may not have done it"):
                await client.put("/k", "v")
            assert trio.current_time() - began == pytest.approx(5)
            requests = [e for p in peers for e in p.got(h2.events.RequestReceived)]
            assert [path_of(e) for e in requests].count("/etcdserverpb.KV/Put") == 1, "sent once"
            assert client.endpoint is None
        nursery.cancel_scope.cancel()


def path_of(event: h2.events.RequestReceived) -> str:
    return str(dict(event.headers)[b":path"].decode())


def answer_health_checks(peer: Peer, event: h2.events.Event) -> None:
    if isinstance(event, h2.events.RequestReceived) and path_of(event) == HEALTH_CHECK:
        assert event.stream_id is not None
        peer.h2.send_headers(event.stream_id, [(":status", "200"), ("grpc-status", "0")], end_stream=True)


async def test_calls_beyond_the_peers_limit_wait_for_their_turn() -> None:
    async with connected() as (connection, peer):
        peer.h2.update_settings({3: 1})  # MAX_CONCURRENT_STREAMS
        await peer.flush()
        await trio.testing.wait_all_tasks_blocked()
        first = await connection.open("/x")
        with trio.move_on_after(0.1) as scope:
            await connection.open("/y")
        assert scope.cancelled_caught
        first.close()
        second = await connection.open("/y")
        second.close()


async def test_a_retired_connection_ends_with_its_last_call() -> None:
    async with connected() as (connection, _):
        stream = await connection.open("/x")
        connection.retire()
        assert connection.lost is None
        stream.close()
        assert connection.lost


async def test_what_a_slow_reader_has_not_taken_is_bounded_by_its_window() -> None:
    async with connected() as (connection, peer):
        stream = await connection.open("/x")
        await trio.testing.wait_all_tasks_blocked()
        peer.h2.send_headers(stream.id, [(":status", "200")])
        sent = 0
        while room := min(peer.h2.local_flow_control_window(stream.id), 16384):
            peer.h2.send_data(stream.id, bytes(room))
            sent += room
            await peer.flush()
            await trio.testing.wait_all_tasks_blocked()
        assert sent == 4 << 20
        taken = 0
        while taken < sent:
            taken += len(await stream.receive() or b"")
        await trio.testing.wait_all_tasks_blocked()
        assert peer.h2.local_flow_control_window(stream.id) >= 2 << 20
        stream.close()


@asynccontextmanager
async def client_of(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[Peer, int, str], Awaitable[None]]
) -> AsyncIterator[EtcdClient]:
    """A client whose every connection is to a peer that answers calls (stream, path) as told."""
    async with trio.open_nursery() as nursery:

        async def connect(*_args: object) -> trio.abc.Stream:
            ours, theirs = trio.testing.memory_stream_pair()
            peer = Peer(theirs)

            def on_event(event: h2.events.Event) -> None:
                answer_health_checks(peer, event)
                if isinstance(event, h2.events.RequestReceived) and path_of(event) != HEALTH_CHECK:
                    nursery.start_soon(answer, peer, event.stream_id, path_of(event))

            peer.on_event = on_event
            nursery.start_soon(peer.run)
            return ours

        monkeypatch.setattr("kilo_etcd.etcd.channel.connect", connect)
        async with open_client(Config(endpoints=("one:1",), user="kilo", password="secret")) as client:
            assert client._caller.tokens
            client._caller.tokens._token = "token"
            yield client
        nursery.cancel_scope.cancel()


HEADERS = [(":status", "200"), ("content-type", "application/grpc")]


async def test_a_large_answer_over_a_slow_link_is_had_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of a megabyte that somebody has put there must not keep a host from reading the rest."""
    value = bytes(1 << 20)
    attempts = 0

    async def answer(peer: Peer, stream: int, path: str) -> None:
        nonlocal attempts
        attempts += 1
        data = frame(pb.RangeResponse(kvs=[pb.KeyValue(key=b"/k", value=value)]).SerializeToString())
        peer.h2.send_headers(stream, HEADERS)
        for start in range(0, len(data), 8192):
            peer.h2.send_data(stream, data[start : start + 8192])
            await peer.flush()
            await trio.sleep(0.1)
        peer.h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
        await peer.flush()

    async with client_of(monkeypatch, answer) as client:
        kv = await client.get("/k")
        assert kv
        assert kv.value == value
        assert attempts == 1


async def test_an_answer_that_stops_half_way_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(peer: Peer, stream: int, path: str) -> None:
        peer.h2.send_headers(stream, HEADERS)
        peer.h2.send_data(stream, frame(bytes(100))[:50])
        await peer.flush()

    async with client_of(monkeypatch, answer) as client:
        began = trio.current_time()
        with pytest.raises(Unavailable):
            await client.get("/k")
        assert trio.current_time() - began < 10


async def test_a_watch_outlives_an_etcd_that_can_give_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one without quorum, after a restart in which it has forgotten its tokens."""
    watches = 0

    async def answer(peer: Peer, stream: int, path: str) -> None:
        nonlocal watches
        if path != "/etcdserverpb.Watch/Watch":
            return  # Authenticate: no quorum, no answer.
        watches += 1
        peer.h2.send_headers(stream, HEADERS)
        if watches == 2:
            peer.h2.send_headers(
                stream, [("grpc-status", "16"), ("grpc-message", "invalid auth token")], end_stream=True
            )
            await peer.flush()
            return
        made = pb.WatchResponse(created=True, header=pb.ResponseHeader(revision=1))
        peer.h2.send_data(stream, frame(made.SerializeToString()))
        if watches == 1:
            peer.h2.send_headers(stream, [("grpc-status", "14"), ("grpc-message", "no leader")], end_stream=True)
        else:
            one = pb.Event(kv=pb.KeyValue(key=b"/k", value=b"v", mod_revision=2))
            event = pb.WatchResponse(events=[one], header=pb.ResponseHeader(revision=2))
            peer.h2.send_data(stream, frame(event.SerializeToString()))
        await peer.flush()

    async with client_of(monkeypatch, answer) as client, trio.open_nursery() as nursery:
        async with client.watch("/k") as watch:

            async def quorum_comes_back() -> None:
                await trio.sleep(60)
                assert client._caller.tokens
                client._caller.tokens._token = "new token"

            nursery.start_soon(quorum_comes_back)
            batch = await anext(watch)
            assert [event.kv.value for event in batch.events] == [b"v"]
        assert watches == 3


# -- tokens


async def test_a_refused_password_is_not_asked_about_all_the_time_and_works_again_once_it_is_right() -> None:
    asked: list[float] = []
    right = False

    async def authenticate() -> str:
        asked.append(trio.current_time())
        await trio.sleep(0.1)
        if not right:
            raise Unauthenticated("wrong password")
        return "token"

    tokens = Tokens(authenticate)
    deadline = trio.current_time() + 600
    while trio.current_time() < deadline:
        with pytest.raises(Unauthenticated, match="wrong password"):
            await tokens.get()
        await trio.sleep(0.5)
    assert 10 < len(asked) < 30
    right = True
    with trio.fail_after(61):
        while True:
            try:
                assert await tokens.get() == "token"
                break
            except Unauthenticated:
                await trio.sleep(0.5)
    tokens.refuse("token")
    assert await tokens.get() == "token"
