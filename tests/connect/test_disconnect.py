"""The real `kgctl disconnect` and `kgctl connection status`, and what else takes away what a connection has left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from test_connect_refused import HOSTS, KEYS, KGCTL, Laptop, key_of, laptop, sh, world

from helpers import eventually
from kilo_etcd.connect.disconnect import chosen
from kilo_etcd.ctl.context import Failure
from kilo_etcd.etcd.client import open_client
from kilo_etcd.model import CandidateClass
from kilo_etcd.runtime import connections
from kilo_etcd.runtime.connections import ConnectionFile
from kilo_etcd.store.records import CandidateRecord, encode

KG = str(Path(sys.executable).with_name("kg"))


def known(interface: str, peer: str, prefix: str = "/kilo", process: int = 0) -> ConnectionFile:
    return ConnectionFile(
        interface=interface, peer=peer, prefix=prefix, public_key=key_of(1), process=process, started=0, since=0.0
    )


def test_which_connection_is_meant() -> None:
    first, second = known("kilo-kilo", "laptop"), known("kilo-work", "ann", "/work")
    assert chosen([first], None, None, None) is first
    assert chosen([], None, None, None) is None
    assert chosen([first, second], "ann", None, None) is second
    assert chosen([first, second], None, None, "/work") is second
    assert chosen([first, second], None, "kilo-kilo", None) is first
    with pytest.raises(Failure, match="this machine has 2 connections: peer laptop of /kilo"):
        chosen([first, second], None, None, None)
    with pytest.raises(Failure, match="no connection as peer bob"):
        chosen([first], "bob", None, None)


def test_the_file_of_a_connection_tells_whether_its_process_runs(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        started = connections.started_at(process.pid)
        assert started is not None
        running = ConnectionFile(
            interface="kilo-kilo", peer="laptop", prefix="/kilo", public_key=key_of(1), process=process.pid,
            started=started, since=1.5,
        )  # fmt: skip
        connections.write(running, tmp_path)
        assert connections.read_all(tmp_path) == (running,)
        assert running.runs
    finally:
        process.kill()
        process.wait()
    assert not running.runs
    connections.remove("kilo-kilo", tmp_path)
    assert connections.read_all(tmp_path) == ()
    assert connections.read_all(tmp_path / "nothing") == ()


@contextmanager
def connecting(here: Laptop, log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stderr:
        process = subprocess.Popen(here.command(*arguments), stderr=stderr)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def by_an_exit_node(tmp_path: Path) -> AsyncIterator[tuple[Laptop, subprocess.Popen[bytes]]]:
    """A connection with names and an exit node, through which everything would go."""
    async with laptop(tmp_path) as here:
        await world(here.server)
        async with open_client(here.server.config()) as client:
            await client.put(KEYS.annotation("gcp-1", "advertise-exit-node"), "true")
            await client.put(KEYS.election("default", "gcp-1"), encode(CandidateRecord(rank=CandidateClass.PUBLIC)))
        log = tmp_path / "log"
        with connecting(here, log, "--exit-node", "gcp-1", "--dns-hosts") as process:
            await eventually(lambda: "connected  interface" in log.read_text(), 60, every=0.1)
            await eventually(lambda: "gcp-1.kilo" in HOSTS.read_text(), 60, every=0.1)
            assert "fwmark" in rules()
            yield here, process


def rules() -> str:
    return sh("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip -o link")


def nothing_is_left() -> None:
    left = rules()
    assert "fwmark" not in left
    assert "proto 108" not in left
    assert "kilo-kilo" not in left
    assert sh("cat /etc/hosts") == "127.0.0.1 localhost\n"
    assert status() == (1, [])


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def status() -> tuple[int, list[dict[str, object]]]:
    done = ran(KGCTL, "connection", "status", "-o", "json")
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("way", ["disconnect", "connect", "kg cleanup"])
@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.deadline(600)
async def test_after_a_crash_while_etcd_is_away_there_is_a_way_back(way: str, tmp_path: Path) -> None:
    async with by_an_exit_node(tmp_path) as (here, process):
        process.kill()
        process.wait()
        await here.server.stop()
        assert "fwmark" in rules()
        code, (found,) = status()
        assert (code, found["state"], found["peer"], found["exitNode"]) == (1, "crashed", "laptop", "gcp-1")
        if way == "disconnect":
            done = ran(KGCTL, "disconnect")
            assert (done.returncode, done.stdout) == (0, "kilo-kilo: disconnected\n"), done.stderr
            again = ran(KGCTL, "disconnect")
            assert (again.returncode, again.stdout) == (0, "kilo-kilo: there was no connection\n"), again.stderr
        elif way == "connect":
            assert "127.0.0.1" in here.ended()
        else:
            command = [KG, "--interface", "kilo-kilo", "--state-dir", str(tmp_path / "kg"), "cleanup"]
            done = ran(*command)
            assert done.returncode == 0, done.stderr
            assert "ip -4 rule del" in done.stdout
        nothing_is_left()


@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.deadline(600)
async def test_a_connection_that_runs_is_ended_and_kg_cleanup_leaves_it_alone(tmp_path: Path) -> None:
    async with by_an_exit_node(tmp_path) as (_, process):
        code, (found,) = status()
        assert (code, found["state"], found["process"]) == (0, "connected", process.pid)
        assert (found["leaders"], found["leadersAnswer"]) == (1, 0)
        shown = ran(KGCTL, "connection", "status")
        assert "kilo-kilo" in shown.stdout
        command = [KG, "--interface", "kilo-kilo", "--state-dir", str(tmp_path / "kg"), "cleanup"]
        refused = ran(*command)
        assert (refused.returncode, f"(process {process.pid})" in refused.stderr) == (1, True), refused.stderr
        wrong = ran(KGCTL, "disconnect", "bob")
        assert (wrong.returncode, "no connection as peer bob" in wrong.stderr) == (1, True)
        done = ran(KGCTL, "disconnect", "laptop")
        assert (done.returncode, done.stdout) == (0, "kilo-kilo: disconnected\n"), done.stderr
        assert process.wait(10) == 0
        nothing_is_left()
