"""What systemd hears."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kilo_etcd.agent.notify import notify, notify_reloading, watchdog_interval


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        name = str(tmp_path / "notify") if request.param == "path" else f"@kilo-etcd-test-{os.getpid()}"
        server.bind(name.replace("@", "\0"))
        server.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield server


def test_one_message_has_all_assignments(systemd: socket.socket) -> None:
    assert notify("READY=1", "STATUS=leader of gcp; 6 nodes")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=leader of gcp; 6 nodes"


def test_a_line_break_in_a_status_is_no_assignment(systemd: socket.socket) -> None:
    assert notify("STATUS=bad\nMAINPID=1")
    assert systemd.recv(4096) == b"STATUS=bad MAINPID=1"


def test_reloading_comes_with_its_moment(systemd: socket.socket) -> None:
    assert notify_reloading()
    first, second = systemd.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")


@pytest.mark.parametrize("name", ["/nowhere/notify", "@nobody-listens-here", "relative", "", "/" + "x" * 200])
def test_a_socket_that_is_not_there_is_no_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert not notify("READY=1")


def test_a_systemd_that_does_not_read_is_not_waited_for(systemd: socket.socket) -> None:
    results = [notify(f"STATUS={number}") for number in range(2000)]
    assert results[0]
    assert not results[-1]


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [("30000000", None, 30.0), ("30000000", "1", None), (None, None, None), ("x", None, None), ("0", None, None)],
)
def test_the_watchdogs_interval(
    usec: str | None, pid: str | None, interval: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert watchdog_interval() == interval
