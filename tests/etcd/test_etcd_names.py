"""etcd by name, when the name server goes away: the last addresses are good for a new connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import trio

from kilo_etcd.etcd.endpoint import parse_endpoint
from kilo_etcd.etcd.grpc import TransportFailed
from kilo_etcd.etcd.tls import Lookups, connect

NAME = "etcd.example.org"


class NameServer:
    """Answers as it is told: with addresses, with an error, or not at all."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.hangs = threading.Event()
        self.over = threading.Event()
        self.real = socket.getaddrinfo

    def __call__(self, host: str | bytes, port: Any, *args: Any, **kwargs: Any) -> list[object]:
        name = host.decode() if isinstance(host, bytes) else host
        if name != NAME:
            return list(self.real(host, port, *args, **kwargs))
        if self.hangs.is_set():
            self.over.wait(30)
        if not self.answers:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.answers]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", server)
    yield server
    server.over.set()


async def test_a_new_connection_needs_no_name_server_once_the_name_was_resolved(names: NameServer) -> None:
    async with trio.open_nursery() as nursery:

        async def greet(stream: trio.SocketStream) -> None:
            await stream.send_all(b"here")

        listeners = await nursery.start(partial(trio.serve_tcp, greet, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        endpoint = parse_endpoint(f"http://{NAME}:{port}", tls=False)
        lookups = Lookups()

        async def reached() -> bool:
            with trio.fail_after(10):
                stream = await connect(endpoint, None, lookups)
                async with stream:
                    return await stream.receive_some(4) == b"here"

        with pytest.raises(TransportFailed, match="does not resolve"):
            await reached()
        names.answers = ["127.0.0.1"]
        assert await reached()
        names.answers = []
        assert await reached(), "the name server has gone"
        names.hangs.set()
        assert await reached(), "it takes queries and does not answer"
        names.hangs.clear()
        names.answers = ["127.0.0.1", "127.0.0.2"]
        assert await reached()
        assert lookups.last_addresses == ("127.0.0.1", "127.0.0.2"), "what is answered anew counts"
        names.answers = []
        lookups.last_addresses = ("127.0.0.3", "127.0.0.1")  # The first takes nobody.
        assert await reached()
        nursery.cancel_scope.cancel()
