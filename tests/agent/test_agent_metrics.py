"""What Prometheus and a health check see."""

from __future__ import annotations

import http.client
import io
import socket
import threading
from functools import partial

import pytest
import structlog
import trio
from prometheus_client import REGISTRY

from kilo_etcd.agent.config import ListenAddress
from kilo_etcd.agent.http import Request
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.model import Node, Peer, RejectedRecord, Snapshot
from kilo_etcd.runtime.logs import setup_logging

ANYWHERE = ListenAddress("127.0.0.1", 0)


def ask(where: ListenAddress | None, path: str, method: str = "GET") -> tuple[int, str]:
    assert where is not None
    connection = http.client.HTTPConnection(where.host or "127.0.0.1", where.port, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


async def get(where: ListenAddress | None, path: str, method: str = "GET") -> tuple[int, str]:
    return await trio.to_thread.run_sync(partial(ask, where, path, method))


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_what_the_agent_notes_is_counted() -> None:
    metrics = Metrics()
    metrics.snapshot(
        Snapshot(
            revision=7,
            nodes={name: Node(name=name, public_key=name) for name in "abc"},
            peers={"p": Peer(name="p", public_key="p")},
            rejected=(RejectedRecord("/kilo/by/x/node", "is not JSON"),),
        )
    )
    metrics.leads(True)
    metrics.reconciled(trouble=None, writes=12, revision=7, problems=2)
    metrics.reconciled(trouble="no permission")
    metrics.error("dns")
    metrics.etcd_writes.inc()
    metrics.etcd_contact(at=1000.0)
    expected = {
        "kilo_nodes": 3, "kilo_peers": 1, "kilo_rejected_records": 1, "kilo_leader": 1, "kilo_revision_seen": 7,
        "kilo_revision_applied": 7, "kilo_netlink_writes_total": 12, "kilo_etcd_writes_total": 1,
        "kilo_etcd_connected": 1, "kilo_last_etcd_contact_timestamp_seconds": 1000,
    }  # fmt: skip
    assert {name: sample(metrics, name) for name in expected} == expected
    assert sample(metrics, "kilo_reconciles_total", result="success") == 1
    assert sample(metrics, "kilo_reconciles_total", result="failure") == 1
    assert sample(metrics, "kilo_errors_total", kind="dns") == 1
    assert sample(metrics, "kilo_errors_total", kind="apply") == 1


def test_two_agents_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.leads(True)
    assert (sample(first, "kilo_leader"), sample(second, "kilo_leader")) == (1, 0)
    assert REGISTRY.get_sample_value("kilo_leader") is None


async def test_metrics_and_health_are_served_until_the_block_ends() -> None:
    metrics = Metrics()
    before = {*threading.enumerate()}
    async with metrics.serve(ANYWHERE) as where:
        status, text = await get(where, "/metrics")
        assert status == 200
        assert "kilo_nodes 0.0" in text.splitlines()
        assert (await get(where, "/other")) == (404, "there is /metrics and /health\n")
        assert (await get(where, "/metrics", "POST"))[0] == 405
        assert (await get(where, "/health", "HEAD"))[0] == 503
    with pytest.raises(ConnectionRefusedError):
        await get(where, "/health")
    # trio keeps worker threads for a while, as many as were busy at once.
    assert not [thread for thread in {*threading.enumerate()} - before if not thread.name.startswith("Trio thread")]


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=" + "1" * 5000, ";" * 5000, "\xff", ""])
def test_metrics_are_answered_whatever_a_client_accepts(accept: str) -> None:
    answer = Metrics().answer(Request("GET", "/metrics", {"accept": accept}))
    assert (answer.status, b"kilo_nodes 0.0" in answer.body) == ("200 OK", True)


async def test_health_says_in_one_line_what_is_wrong() -> None:
    metrics = Metrics()
    async with metrics.serve(ANYWHERE) as where:
        assert await get(where, "/health") == (503, "the mesh has not been programmed yet\n")
        metrics.etcd_contact()
        metrics.reconciled(trouble=None)
        assert await get(where, "/health") == (200, "ok\n")
        metrics.etcd_connected.set(0)
        assert await get(where, "/health") == (503, "etcd is out of reach; forwarding goes on by the last plan\n")
        metrics.etcd_contact()
        metrics.reconciled(trouble="UDP port 51820 is taken")
        assert await get(where, "/health") == (503, "UDP port 51820 is taken\n")
        metrics.reconciled(trouble=None)
        wrong = ["etcd went back in time", "the firewall drops"]
        metrics.untrusted_when(lambda: wrong[0] if len(wrong) > 1 else None)
        metrics.untrusted_when(lambda: wrong[-1] if wrong else None)
        assert await get(where, "/health") == (503, "etcd went back in time\n")
        del wrong[0]
        assert await get(where, "/health") == (503, "the firewall drops\n")
        wrong.clear()
        metrics.report_health("stopping")
        assert await get(where, "/health") == (503, "stopping\n")
        metrics.report_health(None)
        assert await get(where, "/health") == (200, "ok\n")


async def test_a_port_in_use_is_an_error_in_the_log_and_the_agent_goes_on() -> None:
    stream = io.StringIO()
    setup_logging("info", stream=stream)
    try:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            metrics = Metrics()
            async with metrics.serve(ListenAddress("127.0.0.1", port)) as where:
                assert where is None
    finally:
        structlog.reset_defaults()
    (line,) = stream.getvalue().splitlines()
    assert "choose another address with --listen" in line
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in line
    assert metrics.listen_trouble is not None
    assert metrics.listen_trouble in line
    assert "Address already in use" in line
    assert sample(metrics, "kilo_errors_total", kind="listen") == 1


async def test_nothing_is_served_where_nothing_is_asked_for() -> None:
    async with Metrics().serve(None) as where:
        assert where is None


async def test_everywhere_is_reached_by_both_families() -> None:
    async with Metrics().serve(ListenAddress("", 0)) as where:
        assert where is not None
        assert (await get(ListenAddress("127.0.0.1", where.port), "/metrics"))[0] == 200


async def test_a_client_that_says_nothing_holds_up_nobody() -> None:
    async with Metrics().serve(ANYWHERE) as where:
        assert where is not None
        with socket.create_connection((where.host, where.port)):
            assert (await get(where, "/metrics"))[0] == 200


async def test_an_address_that_is_not_there_yet_can_be_listened_on() -> None:
    async with Metrics().serve(ListenAddress("198.51.100.77", 0)) as where:
        assert where is not None
