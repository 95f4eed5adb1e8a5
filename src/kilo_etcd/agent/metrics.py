"""What the agent counts, and the small HTTP server that shows it: `/metrics` for Prometheus, `/health` in one line.

The server has a thread of its own that sleeps until somebody asks, holds no request longer than a few seconds, and
never stops the agent: an address that cannot be listened on is an error in the log. The registry is the agent's own.
"""

from __future__ import annotations

import selectors
import socket
import socketserver
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app

from kilo_etcd import __version__
from kilo_etcd.agent.config import ListenAddress
from kilo_etcd.agent.logs import get_logger
from kilo_etcd.model import Snapshot

REQUEST_TIMEOUT = 5.0
"""Seconds that a client may take over its request."""
IP_FREEBIND = 15


class Metrics:
    """The agent's counters and gauges. Setting them is cheap and may be done from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        gauge, counter = self._gauge, self._counter
        self.nodes = gauge("kilo_nodes", "Nodes of the mesh")
        self.peers = gauge("kilo_peers", "Peers outside the mesh's hosts")
        self.set_aside = gauge("kilo_set_aside", "Records, or parts of them, that are not in force")
        self.leader = gauge("kilo_leader", "1 where this node leads its location")
        self.revision_seen = gauge("kilo_revision_seen", "etcd revision of the newest snapshot")
        self.revision_applied = gauge("kilo_revision_applied", "etcd revision of the snapshot that the kernel holds")
        self.problems = gauge("kilo_problems", "What the newest plan could not do")
        self.errors = counter("kilo_errors_total", "Errors by kind", ("kind",))
        self.reconciles = counter("kilo_reconciles_total", "Runs of plan and apply by result", ("result",))
        self.netlink_writes = counter("kilo_netlink_writes_total", "Messages that changed the kernel")
        self.etcd_writes = counter("kilo_etcd_writes_total", "Writes to etcd, keepalives apart")
        self.etcd_connected = gauge("kilo_etcd_connected", "1 where etcd answers")
        self.last_known = gauge(
            "kilo_last_known_mesh", "1 where the mesh in force is from the disk, since etcd was away at the start"
        )
        self.last_etcd_contact = gauge(
            "kilo_last_etcd_contact_timestamp_seconds", "When etcd was last heard of, seconds since 1970"
        )
        self.info = gauge("kilo_build_info", "1, with the agent's version", ("version",))
        self.info.labels(__version__).set(1)
        for result in ("success", "failure"):
            self.reconciles.labels(result)
        self._trouble: str | None = "the mesh has not been programmed yet"
        self._reported: str | None = None
        self._suspicion: Callable[[], str | None] = lambda: None
        self.listen_trouble: str | None = None
        """Why metrics and health are not served although they should be."""

    def _gauge(self, name: str, help: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(name, help, labels, registry=self.registry)

    def _counter(self, name: str, help: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def snapshot(self, snapshot: Snapshot) -> None:
        """Note what the newest snapshot holds."""
        self.nodes.set(len(snapshot.nodes))
        self.peers.set(len(snapshot.peers))
        self.set_aside.set(len(snapshot.set_aside))
        self.revision_seen.set(snapshot.revision)

    def leads(self, leads: bool) -> None:
        """Note whether this node leads its location."""
        self.leader.set(int(leads))

    def reconciled(
        self, *, trouble: str | None, writes: int = 0, revision: int | None = None, problems: int = 0
    ) -> None:
        """Note one run of plan and apply: what could not be brought about (None: nothing), how many messages it was."""
        ok = trouble is None
        self.reconciles.labels("success" if ok else "failure").inc()
        if not ok:
            self.errors.labels("apply").inc()
        if writes:
            self.netlink_writes.inc(writes)
        if revision is not None:
            self.revision_applied.set(revision)
        self.problems.set(problems)
        self._trouble = trouble

    def not_programmed(self, trouble: str) -> None:
        """Say at each look at the health why the newest snapshot is not brought to the kernel, until one is."""
        self._trouble = trouble

    def error(self, kind: str) -> None:
        """Count an error of a kind such as etcd, netlink, dns."""
        self.errors.labels(kind).inc()

    def etcd_contact(self, connected: bool = True, *, at: float | None = None) -> None:
        """Note whether etcd answers; where it does, `at` (seconds since 1970, by default now) is when."""
        self.etcd_connected.set(int(connected))
        if connected:
            self.last_etcd_contact.set(time.time() if at is None else at)

    def etcd_heard(self) -> None:
        """Note that etcd has just answered."""
        self.last_etcd_contact.set(time.time())

    def report_health(self, trouble: str | None) -> None:
        """Say in one sentence why the agent is not well, whatever else is known; None takes it back."""
        self._reported = trouble

    def suspect_when(self, why: Callable[[], str | None]) -> None:
        """Ask `why` at each look at the health whether etcd can be trusted: None where it can, else a sentence."""
        self._suspicion = why

    def health(self) -> str | None:
        """None where all is well, else one sentence."""
        trouble = self._reported or self._suspicion() or self._trouble
        if trouble is None and not _value(self.etcd_connected):
            return "etcd is out of reach; forwarding goes on by the last plan"
        return trouble

    def application(self) -> Callable[..., Iterable[bytes]]:
        """The WSGI application behind `--listen`."""
        exposition = make_wsgi_app(self.registry)

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path, method = environ.get("PATH_INFO", ""), environ.get("REQUEST_METHOD", "GET")
            if method not in ("GET", "HEAD"):
                return _plain(start_response, "405 Method Not Allowed", "only GET and HEAD are answered")
            if path == "/metrics":
                exposed: Iterable[bytes] = exposition(environ, start_response)
                return exposed
            if path == "/health":
                trouble = self.health()
                if trouble is None:
                    return _plain(start_response, "200 OK", "ok")
                return _plain(start_response, "503 Service Unavailable", trouble)
            return _plain(start_response, "404 Not Found", "there is /metrics and /health")

        return answer

    @asynccontextmanager
    async def serve(self, listen: ListenAddress | None) -> AsyncIterator[ListenAddress | None]:
        """Serve while the block runs; yields where (the port that was got, where 0 was asked for), None where not."""
        if listen is None:
            yield None
            return
        try:
            server = _Server(listen)
        except OSError as error:
            self.error("listen")
            reason = error.strerror or str(error)
            self.listen_trouble = (
                f"metrics and health are not served, since {listen} cannot be listened on ({reason}): "
                "choose another address with --listen"
            )
            get_logger().error(self.listen_trouble)
            yield None
            return
        server.set_app(self.application())
        thread = threading.Thread(target=server.run, name="kg-http", daemon=True)
        thread.start()
        try:
            yield ListenAddress(listen.host, server.server_port)
        finally:
            server.stop()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(thread.join)
            server.server_close()


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT

    def address_string(self) -> str:
        # The default looks the client's name up in the DNS.
        return str(self.client_address[0])

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: scrapes are no events."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, listen: ListenAddress) -> None:
        host = listen.host
        if not host:
            host = "::" if _has_ipv6() else "0.0.0.0"
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Before the base class, which closes the server where the address cannot be had.
        self._wake, self._awake = socket.socketpair()
        try:
            super().__init__((host, listen.port), _Handler)
        except BaseException:
            self._close_pair()
            raise
        self.timeout = 0

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the DNS for the host's own full name and may wait long for it.
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # The mesh address may be listened on although the agent has yet to make it.
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def run(self) -> None:
        """Answer until `stop`, without ever waking up for nothing."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.register(self._awake, selectors.EVENT_READ)
            while True:
                if any(key.fileobj is self._awake for key, _ in selector.select()):
                    return
                self.handle_request()

    def stop(self) -> None:
        self._wake.send(b"x")

    def server_close(self) -> None:
        super().server_close()
        self._close_pair()

    def _close_pair(self) -> None:
        self._wake.close()
        self._awake.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up or was too slow is no event."""


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _plain(start_response: Callable[..., Any], status: str, line: str) -> Iterable[bytes]:
    body = (line + "\n").encode()
    start_response(
        status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    )  # fmt: skip
    return [body]


def _value(gauge: Gauge) -> float:
    return next(iter(gauge.collect())).samples[0].value
