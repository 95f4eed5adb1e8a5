"""The agent's metrics, and its answers on `--listen`: `/metrics` for Prometheus, `/health` in one line.

`/health` answers 503 if the host does not do its part, whatever the cause. It is for monitoring, and for programs
that choose hosts; nothing of what it names is mended by a restart. Whether the agent hangs is for systemd's watchdog to
find out, which `agent.daemon` feeds.

The server (`agent.http`) is a task of the agent's: an agent whose loop hangs does not say that it is well. An address
that cannot be listened on is an error in the log and stops nothing. The registry is the agent's own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import choose_encoder

from kilo_etcd import __version__
from kilo_etcd.agent import http
from kilo_etcd.agent.config import ListenAddress
from kilo_etcd.base import descriptors
from kilo_etcd.model import Snapshot
from kilo_etcd.runtime.logs import get_logger


class Metrics:
    """The agent's counters and gauges. Setting them is cheap and may be done from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        gauge, counter = self._gauge, self._counter
        self.nodes = gauge("kilo_nodes", "Nodes of the mesh")
        self.peers = gauge("kilo_peers", "Peers outside the mesh's hosts")
        self.rejected = gauge("kilo_rejected_records", "Records, or parts of them, that are rejected and not in force")
        self.leader = gauge("kilo_leader", "1 if this node leads its location")
        self.revision_seen = gauge("kilo_revision_seen", "etcd revision of the newest snapshot")
        self.revision_applied = gauge("kilo_revision_applied", "etcd revision of the snapshot that the kernel holds")
        self.problems = gauge("kilo_problems", "Parts of the newest plan that could not be applied")
        self.unreachable = gauge(
            "kilo_unreachable_members", "Members of this location that do not answer at their internal IPs"
        )
        self.unanswered = gauge(
            "kilo_unanswered_peers", "WireGuard peers that are sent to and do not answer, by kind", ("kind",)
        )
        for kind in ("node", "peer"):
            self.unanswered.labels(kind)
        self.errors = counter("kilo_errors_total", "Errors by kind", ("kind",))
        self.reconciles = counter("kilo_reconciles_total", "Runs of plan and apply by result", ("result",))
        self.netlink_writes = counter("kilo_netlink_writes_total", "Messages that brought the kernel to the plan")
        self.etcd_writes = counter("kilo_etcd_writes_total", "Writes to etcd, keepalives apart")
        self.etcd_connected = gauge("kilo_etcd_connected", "1 if etcd answers")
        self.cached_mesh = gauge(
            "kilo_snapshot_from_cache",
            "1 if the snapshot in force is from the cache on disk, since etcd was away at the start",
        )
        self.state_directory = gauge(
            "kilo_state_directory_usable",
            "1 if the state directory has the private key and takes the snapshot for a boot without etcd",
        )
        self.state_directory.set(1)
        self.last_etcd_contact = gauge(
            "kilo_last_etcd_contact_timestamp_seconds", "When etcd last answered, seconds since 1970"
        )
        self.info = gauge("kilo_build_info", "1, with the agent's version", ("version",))
        self.info.labels(__version__).set(1)
        for result in ("success", "failure"):
            self.reconciles.labels(result)
        self._trouble: str | None = "the mesh has not been programmed yet"
        self._reported: str | None = None
        self._whys: list[Callable[[], str | None]] = []
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
        self.rejected.set(len(snapshot.rejected))
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

    def etcd_answered(self) -> None:
        """Note that etcd has just answered."""
        self.last_etcd_contact.set(time.time())

    def report_health(self, trouble: str | None) -> None:
        """Say in one sentence why the agent is not well, whatever else is known; None takes it back."""
        self._reported = trouble

    def untrusted_when(self, why: Callable[[], str | None]) -> None:
        """Ask `why` too, at each look at the health: None if all is well as far as it knows, else a sentence."""
        self._whys.append(why)

    def health(self) -> str | None:
        """None if this host does its part, else one sentence: etcd's trouble first, since it explains others."""
        whys = (why() for why in self._whys)
        trouble = self._reported or next(filter(None, whys), None) or self._trouble or descriptors.running_short()
        if trouble is None and not _value(self.etcd_connected):
            return "etcd is out of reach; forwarding goes on by the last plan"
        return trouble

    def answer(self, request: http.Request) -> http.Answer:
        """What is served behind `--listen`."""
        if request.path == "/metrics":
            try:
                encode, kind = choose_encoder(request.headers.get("accept", ""))
            except Exception:  # Versions that are none; a client must not fill the log with them.
                encode, kind = choose_encoder("")
            return http.Answer("200 OK", encode(self.registry), kind)
        if request.path == "/health":
            trouble = self.health()
            if trouble is None:
                return http.Answer.line("200 OK", "ok")
            return http.Answer.line("503 Service Unavailable", " ".join(trouble.split()))
        return http.Answer.line("404 Not Found", "there is /metrics and /health")

    @asynccontextmanager
    async def serve(self, listen: ListenAddress | None) -> AsyncIterator[ListenAddress | None]:
        """Serve while the block runs; yields where (the port that was got, where 0 was asked for), None where not."""
        if listen is None:
            yield None
            return
        try:
            listener = http.listen(listen)
        except OSError as error:
            self.error("listen")
            if (short := descriptors.shortage(error)) is not None:
                self.listen_trouble = f"metrics and health are not served: {short}"
            else:
                reason = error.strerror or str(error)
                self.listen_trouble = (
                    f"metrics and health are not served, since {listen} cannot be listened on ({reason}): "
                    "choose another address with --listen"
                )
            get_logger().error(self.listen_trouble)
            yield None
            return
        port = int(listener.getsockname()[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(http.Server(listener, self.answer).run)
            try:
                yield ListenAddress(listen.host, port)
            finally:
                nursery.cancel_scope.cancel()


def _value(gauge: Gauge) -> float:
    return next(iter(gauge.collect())).samples[0].value
