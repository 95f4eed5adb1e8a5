"""Reload with code that does not run, and a start of it: a real `kg` in namespaces of its own, run from a copy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from attrs import frozen

import kilo_etcd
from helpers import eventually, require
from kilo_etcd.agent import main
from kilo_etcd.agent.endings import Fatal, Reload, StoppedAtOnce
from kilo_etcd.agent.trial import reason
from kilo_etcd.runtime.key_file import UnusableKey
from kilo_etcd.testing.etcd_server import EtcdServer

SOURCE = Path(kilo_etcd.__file__).parent
REFUSED = "does not run, so the agent goes on with the old one: "
NETWORK = (
    "ip link add eth0 type veth peer name eth1 && ip link set eth0 up && ip link set eth1 up && "
    "ip address add 192.0.2.1/24 dev eth0"
)


@pytest.mark.parametrize(
    ("errors", "says"),
    [
        ("", "it ended with exit status 3 and without a word"),
        ("a line\nkg: no WireGuard\n", "no WireGuard"),
        ("Usage: kg\n\nError: Invalid value for --port\n", "Invalid value for --port"),
        (
            'Traceback (most recent call last):\n  File "/a.py", line 7, in <module>\n    1/0\nZeroDivisionError: no\n',
            "ZeroDivisionError: no (/a.py, line 7)",
        ),
    ],
)
def test_the_last_word_of_code_that_does_not_run_is_its_reason(errors: str, says: str) -> None:
    assert reason(errors, 3) == says


@frozen
class Installed:
    """A copy of the package, and a `kg` that runs by it."""

    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def daemon(self) -> Path:
        return self.directory / "kilo_etcd" / "agent" / "daemon.py"

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def starts(self) -> int:
        return self.log().count(" starting ")

    def refused(self, times: int) -> bool:
        return self.log().count(REFUSED) == times


def command(directory: Path, *arguments: str) -> list[str]:
    program = f"import sys; sys.path.insert(0, {str(directory)!r}); from kilo_etcd.agent.entry import main; main()"
    return [sys.executable, "-c", program, *arguments]


def install(directory: Path) -> None:
    shutil.copytree(SOURCE, directory / "kilo_etcd", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


@asynccontextmanager
async def installed(directory: Path, endpoint: str) -> AsyncIterator[Installed]:
    install(directory)
    arguments = ("--hostname", "h1", "--state-dir", str(directory / "state"), "--endpoints", endpoint)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220
            command(directory, *arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    kg = Installed(directory, process)
    try:
        await eventually(lambda: "this host is a segment" in kg.log(), 60)
        yield kg
        assert process.poll() is None, kg.log()
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.usefixtures("own_namespaces")
async def test_an_agent_goes_on_if_the_code_that_it_is_to_reload_does_not_run(tmp_path: Path) -> None:
    require("etcd", "etcdctl", "wireguard-go", "ip")
    await trio.run_process(["sh", "-c", NETWORK])
    async with EtcdServer.run() as server, installed(tmp_path, server.endpoint) as kg:

        async def reported(text: str) -> bool:
            """Whether `text` is an error that h1 reports; empty: whether it reports none."""
            status = await server.etcdctl("get", "--print-value-only", "/kilo-status/by/h1/status")
            if not status:  # On a busy machine the lease ends before the new code is loaded.
                return False
            errors = json.loads(status).get("errors", [])
            return any(text in error for error in errors) if text else not errors

        good = kg.daemon.read_text()
        # What it cannot import, what it would fall over when it looks, what it may need later; one after the other.
        later = tmp_path / "kilo_etcd" / "agent" / "dryrun.py"
        harm: list[tuple[Callable[[], object], str]] = [
            (lambda: kg.daemon.write_text(f"this is no python\n{good}"), f"SyntaxError: .*{kg.daemon}, line 1"),
            (lambda: later.write_text("import gone_for_good\n"), "No module named 'gone_for_good'"),
            (lambda: shutil.rmtree(tmp_path / "kilo_etcd" / "topology"), "No module named 'kilo_etcd.topology"),
        ]
        for number, (spoil, says) in enumerate(harm, 1):
            spoil()
            kg.process.send_signal(signal.SIGHUP)
            await eventually(partial(kg.refused, number), 60)
            line = next(line for line in reversed(kg.log().splitlines()) if REFUSED in line)
            assert re.search(says, line), line
            await eventually(partial(reported, REFUSED), 20)
            install(tmp_path)
        assert kg.starts() == 1
        assert "Traceback" not in kg.log()
        # And the right one is run.
        kg.process.send_signal(signal.SIGHUP)
        await eventually(lambda: kg.starts() == 2, 60)
        await eventually(partial(reported, ""), 60)


def test_code_that_cannot_be_loaded_is_said_in_one_line_and_not_started_again_at_once(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / "kilo_etcd" / "agent" / "daemon.py").write_text("this is no python\n")
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("kg: the installed code cannot be loaded: SyntaxError: invalid syntax (")
    assert done.stderr.count("\n") == 1
    # A package that it needs is not installed as it should be.
    install(tmp_path)
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "__init__.py").touch()
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("kg: the installed code cannot be loaded: ModuleNotFoundError: No module named ")
    assert done.stderr.count("\n") == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        process = subprocess.Popen(
            command(tmp_path), stderr=subprocess.DEVNULL, env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        )
        try:
            said = systemd.recv(4096).decode()
            assert said.startswith(
                "STATUS=cannot run, will try again: the installed code cannot be loaded: ModuleNotFoundError"
            )
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        finally:
            process.terminate()
            process.wait(20)


@pytest.mark.parametrize(("seconds", "pauses"), [(1.0, 1), (60.0, 0)])
def test_an_agent_that_crashes_at_its_start_waits_and_a_healthy_one_does_not(
    monkeypatch: pytest.MonkeyPatch, seconds: float, pauses: int
) -> None:
    now = 1000.0
    said: list[str] = []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(main, "_pause", said.append)

    def run(*_arguments: object) -> None:
        nonlocal now
        now += seconds
        raise ExceptionGroup("", [ZeroDivisionError()])

    monkeypatch.setattr(trio, "run", run)
    with suppress(ExceptionGroup, SystemExit):
        main._run(main._agent, None)  # type: ignore[arg-type]
    assert len(said) == pauses


@pytest.mark.parametrize(
    ("errors", "status", "paused"),
    [
        ([Fatal("it is broken")], 1, ["it is broken"]),
        ([StoppedAtOnce("stopped at once")], 1, []),
        ([UnusableKey("no key"), Fatal("it is broken")], 2, []),
        ([KeyboardInterrupt()], 130, []),
        ([Fatal("it is broken"), KeyboardInterrupt()], 130, []),
        ([Reload()], 1, []),
    ],
)
def test_the_exit_status_is_that_of_the_errors_in_a_group(
    monkeypatch: pytest.MonkeyPatch, errors: list[BaseException], status: int, paused: list[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr(main, "_pause", said.append)

    def run(*_arguments: object) -> None:
        raise BaseExceptionGroup("", errors)

    def execv(*_arguments: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(trio, "run", run)
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit) as ended:
        main._run(main._agent, None)  # type: ignore[arg-type]
    assert (ended.value.code, said) == (status, paused)
