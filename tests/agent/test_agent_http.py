"""The listener: slow clients, too many of them, long headers, and a process whose descriptors run short."""

from __future__ import annotations

import io
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import structlog
import trio

from helpers import eventually
from kilo_etcd.agent import http
from kilo_etcd.agent.config import ListenAddress
from kilo_etcd.agent.http import DEADLINE, MOST_CONNECTIONS, MOST_HEAD, Answer, Request, Server, parse
from kilo_etcd.base import descriptors
from kilo_etcd.runtime.logs import setup_logging

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def test_requests_are_parsed_and_nonsense_is_none() -> None:
    assert parse(b"GET /metrics?a=b HTTP/1.1\r\nAccept: text/plain\r\nX-Y:  z ") == Request(
        "GET", "/metrics", {"accept": "text/plain", "x-y": "z"}
    )
    for nonsense in (b"", b"GET", b"GET /", b"GET x HTTP/1.1", b"GET / HTTQ/1.1", b"GET / HTTP/1.1\r\nno colon",
                     b"\x16\x03\x01\x02", b"G3T / HTTP/1.1", b"GET / HTTP/1.1\r\n folded: x"):  # fmt: skip
        assert parse(nonsense) is None


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Server, int]]:
    def answer(request: Request) -> Answer:
        if request.path == "/broken":
            raise ZeroDivisionError("a gauge that cannot be read")
        return Answer.line("200 OK", request.path)

    listener = http.listen(ListenAddress("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = Server(listener, answer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        yield server, port
        nursery.cancel_scope.cancel()


async def ask(port: int, request: bytes = GET, source: str = "127.0.0.1") -> bytes:
    with trio.fail_after(10), trio.socket.socket() as client:
        await client.bind((source, 0))
        await client.connect(("127.0.0.1", port))
        await client.send(request)
        answer = b""
        while part := await client.recv(65536):
            answer += part
        return answer


def dribbler(port: int, source: str = "127.0.0.1") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(source, 0))
    client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
    return client


async def test_head_and_wrong_methods_and_long_headers_are_answered_and_the_connection_ends() -> None:
    async with serving() as (_, port):
        assert (await ask(port)).endswith(b"\r\n\r\n/health\n")
        assert (await ask(port, GET.replace(b"GET", b"HEAD"))).endswith(b"Connection: close\r\n\r\n")
        assert (await ask(port, GET.replace(b"GET", b"POST"))).startswith(b"HTTP/1.1 405 ")
        assert (await ask(port, b"\x16\x03\x01 tls\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
        assert (await ask(port, b"GET / HTTP/1.1\r\nX: " + b"a" * MOST_HEAD)).startswith(b"HTTP/1.1 431 ")
        assert (await ask(port, GET + b"a body that nobody asked for" * 100)).startswith(b"HTTP/1.1 200 ")


async def test_an_answer_that_fails_harms_that_request_alone() -> None:
    stream = io.StringIO()
    setup_logging("info", stream=stream)
    async with serving() as (_, port):
        assert (await ask(port, GET.replace(b"/health", b"/broken"))).startswith(b"HTTP/1.1 500 ")
        assert (await ask(port)).startswith(b"HTTP/1.1 200 ")
    structlog.reset_defaults()
    assert "a gauge that cannot be read" in stream.getvalue()


async def test_no_more_than_so_many_are_open_and_a_flood_of_one_source_does_not_keep_out_another() -> None:
    async with serving() as (server, port):
        slow = [dribbler(port) for _ in range(4 * MOST_CONNECTIONS)]
        try:
            await eventually(lambda: server.connections == MOST_CONNECTIONS, 10)
            before = len(os.listdir("/proc/self/fd"))
            # A scrape from elsewhere, and one from the flooding address itself.
            assert (await ask(port, source="127.0.0.2")).startswith(b"HTTP/1.1 200 ")
            assert (await ask(port)).startswith(b"HTTP/1.1 200 ")
            assert server.connections <= MOST_CONNECTIONS
            assert len(os.listdir("/proc/self/fd")) <= before + 2
            # Those that had to go were closed at once, the oldest first.
            assert slow[0].recv(10) == b""
        finally:
            for sock in slow:
                sock.close()


async def test_a_source_with_few_connections_loses_none_to_one_with_many() -> None:
    async with serving() as (server, port):
        honest = dribbler(port, "127.0.0.2")
        await eventually(lambda: server.connections == 1, 5)
        slow = [dribbler(port) for _ in range(3 * MOST_CONNECTIONS)]
        try:
            await eventually(lambda: server.connections == MOST_CONNECTIONS, 10)
            await eventually(lambda: slow[2 * MOST_CONNECTIONS - 1] and _closed(slow[0]), 10)
            honest.sendall(b"x\r\n\r\n")
            honest.settimeout(5)
            answer = await trio.to_thread.run_sync(honest.recv, 4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
        finally:
            for sock in (*slow, honest):
                sock.close()


def _closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(10) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


async def test_a_client_that_dribbles_is_cut_off_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DEADLINE <= 10
    monkeypatch.setattr(http, "DEADLINE", 0.3)
    async with serving() as (server, port):
        with dribbler(port) as slow:
            await eventually(lambda: server.connections == 1, 5)
            # A byte now and then does not prolong it.
            with trio.fail_after(5):
                while server.connections:
                    try:
                        slow.send(b"a")
                    except OSError:
                        break
                    await trio.sleep(0.01)
            await eventually(lambda: server.connections == 0, 5)


async def test_sources_are_ipv4_addresses_and_ipv6_networks() -> None:
    assert http._source("::ffff:192.0.2.1") == http._source("192.0.2.1")
    assert http._source("2001:db8::1") == http._source("2001:db8::ffff:1")
    assert http._source("2001:db8::1") != http._source("2001:db8:0:1::1")
    assert http._source("fe80::1%eth0")


@contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """This process may open `number` descriptors more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    lowest = os.open("/dev/null", os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + number + 200, hard))
    try:
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        for one in held[-number:] if number else []:
            os.close(one)
        held = held[: len(held) - number]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for one in (*held, lowest):
            os.close(one)


async def test_the_last_descriptors_are_not_the_listeners() -> None:
    async with serving() as (server, port):
        # Both ends are in this process: a client takes one as well.
        with descriptors_left(descriptors.RESERVE - 4):
            slow = [dribbler(port) for _ in range(8)]
            try:
                await eventually(lambda: _closed(slow[0]), 5)
                assert server.connections <= 1
                assert descriptors.exhausted() is None
                assert descriptors.running_short() is not None
                assert (await ask(port)).startswith(b"HTTP/1.1 200 ")
            finally:
                for sock in slow:
                    sock.close()
    assert descriptors.running_short() is None


async def test_a_listener_without_any_descriptor_goes_on_when_there_are_some_again() -> None:
    async with serving() as (_, port):
        with socket.socket() as early:
            with descriptors_left(0):
                assert descriptors.exhausted() is not None
                early.connect(("127.0.0.1", port))
                early.sendall(GET)
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
            early.settimeout(5)
            answer = await trio.to_thread.run_sync(early.recv, 4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
