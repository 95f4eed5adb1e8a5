"""What systemd is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
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


def agent(state: Path) -> subprocess.Popen[str]:
    """`kg` with a state directory that keeps it from running."""
    command = [sys.executable, "-m", "kilo_etcd.agent.main", "--hostname", "h1", "--state-dir", str(state)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("systemd", ["path"], indirect=True)
def test_what_the_operator_has_to_mend_is_not_tried_every_second(systemd: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    systemd.settimeout(60)
    with agent(tmp_path / "file" / "state") as process:
        said = systemd.recv(4096).decode()
        assert said.startswith("STATUS=cannot run, will try again: ")
        assert process.poll() is None
        process.terminate()
        _, printed = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGTERM  # for systemd an end as asked
    assert printed.splitlines()[-1] == f"kg: {said.removeprefix('STATUS=cannot run, will try again: ')}"
    assert "Traceback" not in printed


@pytest.mark.parametrize(("mode", "service", "status"), [(0o644, True, 2), (None, False, 1)])
def test_it_ends_at_once_where_starting_again_is_no_use_or_nobody_starts_it_again(
    mode: int | None, service: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        server.setblocking(False)
        if service:
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        if mode is None:
            (tmp_path / "state").touch()
        else:
            (tmp_path / "state").mkdir()
            (tmp_path / "state" / "key").touch(mode)
            (tmp_path / "state" / "key").chmod(mode)
        with agent(tmp_path / "state") as process:
            _, printed = process.communicate(timeout=60)
        assert process.returncode == status, printed
        with pytest.raises(BlockingIOError):
            server.recv(4096)  # it does not say that it will try again


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
