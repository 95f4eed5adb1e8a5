"""The real `kgctl disconnect` and `kgctl connection status`, and what else takes away what a connection has left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import attrs
import pytest
from test_connect_refused import HOSTS, KEYS, KGCTL, NO_CAPABILITY, Laptop, key_of, laptop, sh, world

from helpers import eventually
from kilo_etcd import kernel
from kilo_etcd.connect.disconnect import chosen
from kilo_etcd.ctl.context import Failure
from kilo_etcd.etcd.client import open_client
from kilo_etcd.model import CandidateClass
from kilo_etcd.model.hostplan import HostPlan, RoutePlan, Via
from kilo_etcd.runtime import connections, lock_file
from kilo_etcd.runtime.connections import ConnectionFile
from kilo_etcd.store.records import CandidateRecord, encode

NOBODY = ("setpriv", "--reuid", "65534", "--clear-groups", *NO_CAPABILITY[1:])
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
    with pytest.raises(Failure, match="the connection of kilo-kilo is another one: peer laptop of /kilo"):
        chosen([first], "bob", "kilo-kilo", None)
    with pytest.raises(Failure, match="the connection of kilo-kilo is another one: peer laptop of /kilo"):
        chosen([first], None, "kilo-kilo", "/work")
    with pytest.raises(Failure, match="the connection of kilo-work is another one: peer ann of /kilo"):
        chosen([known("kilo-work", "ann")], None, None, "/work")
    with pytest.raises(Failure, match="no connection as peer bob on kilo-work"):
        chosen([first], "bob", "kilo-work", None)


SOUND: dict[str, object] = {
    "interface": "kilo-kilo", "peer": "l", "prefix": "/kilo", "public_key": "x", "exit_node": None, "process": 1,
    "started": 0, "since": 0.0, "stays": False,
}  # fmt: skip
PARTS: list[dict[str, object]] = [
    {"process": "x"}, {"process": 2**70}, {"process": None}, {"process": -1}, {"process": True}, {"peer": 5},
    {"interface": "kilo-work"}, {"since": "now"}, {"since": float("nan")}, {"stays": 1}, {"exit_node": []},
]  # fmt: skip
ODD = ["[]", "null", "[" * 5000, "\x00", *(json.dumps(SOUND | part) for part in PARTS)]


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_a_file_that_no_connection_has_written_is_none(content: str, tmp_path: Path) -> None:
    connections.write(known("kilo-kilo", "laptop"), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(SOUND))
    assert connections.read("kilo-kilo", tmp_path) is not None
    file.write_text(content)
    assert connections.read("kilo-kilo", tmp_path) is None
    assert connections.read_all(tmp_path) == ()


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
async def by_an_exit_node(tmp_path: Path, *more: str) -> AsyncIterator[tuple[Laptop, subprocess.Popen[bytes]]]:
    """A connection with names and an exit node, through which everything would go."""
    async with laptop(tmp_path) as here:
        await world(here.server)
        async with open_client(here.server.config()) as client:
            await client.put(KEYS.annotation("gcp-1", "advertise-exit-node"), "true")
            await client.put(KEYS.election("default", "gcp-1"), encode(CandidateRecord(rank=CandidateClass.PUBLIC)))
        log = tmp_path / "log"
        with connecting(here, log, "--exit-node", "gcp-1", "--dns-hosts", *more) as process:
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
        assert re.search(r"kilo-kilo .* 0 of 1 ", shown.stdout), shown.stdout
        shown = ran(*NOBODY, KGCTL, "connection", "status")
        assert re.search(r"kilo-kilo .* gcp-1 +- +-", shown.stdout), shown.stdout
        command = [KG, "--interface", "kilo-kilo", "--state-dir", str(tmp_path / "kg"), "cleanup"]
        refused = ran(*command)
        assert (refused.returncode, f"(process {process.pid})" in refused.stderr) == (1, True), refused.stderr
        wrong = ran(KGCTL, "disconnect", "bob")
        assert (wrong.returncode, "no connection as peer bob" in wrong.stderr) == (1, True)
        done = ran(KGCTL, "disconnect", "laptop")
        assert (done.returncode, done.stdout) == (0, "kilo-kilo: disconnected\n"), done.stderr
        assert process.wait(10) == 0
        nothing_is_left()


@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.deadline(600)
async def test_what_a_failed_connect_finds_of_an_earlier_one_stays(tmp_path: Path) -> None:
    async with by_an_exit_node(tmp_path, "--no-clean-up") as (here, process):
        process.terminate()
        assert process.wait(30) == 0
        await here.server.stop()
        before, names = rules(), HOSTS.read_text()
        _, stays = status()
        assert stays[0]["state"] == "stays"
        for more in ([], ["--exit-node", "gcp-1"]):
            said = here.ended(*more)
            assert "kgctl disconnect --interface kilo-kilo ends that" in said
            assert (rules(), HOSTS.read_text(), status()) == (before, names, (0, stays))
        done = ran(KGCTL, "disconnect")
        assert "the record of peer laptop stays in etcd" in done.stdout, done.stderr
        nothing_is_left()


@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.deadline(600)
async def test_after_a_crash_a_failed_connect_with_an_exit_node_lets_nothing_out_either(tmp_path: Path) -> None:
    async with by_an_exit_node(tmp_path) as (here, process):
        process.kill()
        process.wait()
        await here.server.stop()
        before = rules()
        assert "kgctl disconnect --interface kilo-kilo ends that" in here.ended("--exit-node", "gcp-1")
        assert rules() == before
        _, (found,) = status()
        assert (found["state"], found["exitNode"]) == ("crashed", "gcp-1")
        assert ran(KGCTL, "disconnect").returncode == 0
        nothing_is_left()


@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
@pytest.mark.parametrize(
    ("before", "state", "sentence"),
    [
        ("true", "ended", "the kernel has nothing of it"),
        (
            "ip tuntap add kilo-kilo mode tun; ip link set kilo-kilo up; ip route add 10.4.0.0/16 dev kilo-kilo "
            "proto 108",
            "crashed", "left interface, routes or rules here",
        ),
    ],
)  # fmt: skip
def test_of_a_connection_that_crashed_status_says_whether_the_kernel_has_anything(
    before: str, state: str, sentence: str
) -> None:
    connections.write(known("kilo-kilo", "laptop", process=2**22))
    sh(before)
    code, (shown,) = status()
    assert (code, shown["state"]) == (1, state)
    assert sentence in ran(KGCTL, "connection", "status").stderr
    assert ran(KGCTL, "disconnect").returncode == 0
    assert "proto 108" not in rules()
    assert ran(KGCTL, "connection", "status").stdout == "This machine has no connection.\n"


@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.deadline(600)
async def test_a_connection_that_was_to_stay_is_said_to_have_a_record_still(tmp_path: Path) -> None:
    async with by_an_exit_node(tmp_path, "--no-clean-up"):
        done = ran(KGCTL, "disconnect")
        assert "the record of peer laptop stays in etcd" in done.stdout, done.stderr
        nothing_is_left()


@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.deadline(600)
async def test_an_agents_interface_is_neither_connected_nor_disconnected(tmp_path: Path) -> None:
    network = ip_network("10.7.0.0/16")
    plan = HostPlan(
        node="node-1", addresses=(ip_interface("10.7.0.1/32"),), listen_port=51820, peers={},
        routes={network: RoutePlan(destination=network, via=Via.TUNNEL, source=ip_address("10.7.0.1"))},
        masquerade=(network,),
    )  # fmt: skip
    setup = kernel.Setup(interface="kilo0", private_key=key_of(7))
    async with laptop(tmp_path) as here, kernel.open_kernel(setup) as agent:
        await here.server.stop()
        assert (await agent.apply(plan)).failures == ()
        with HOSTS.open("a") as hosts:
            hosts.write("# kilo-etcd kilo0: begin (x)\n10.7.0.2 n2\n# kilo-etcd kilo0: end\n")
        state = "ip rule; ip route show table all; ip -o link; nft list tables; cat /etc/hosts"
        before = sh(state)
        here.ended("--interface", "kilo0")
        assert status() == (1, [])
        assert ran(KGCTL, "disconnect").stdout == "kilo-kilo: there was no connection\n"
        refused = ran(KGCTL, "disconnect", "--interface", "kilo0")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith("kgctl: kilo0 is the interface of this host's agent")
        elsewhere = ran(KG, "--interface", "kilo1", "--state-dir", str(tmp_path / "kg"), "cleanup")
        assert (elsewhere.returncode, "has the interface kilo0" in elsewhere.stderr) == (1, True), elsewhere.stderr
        assert sh(state) == before


@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
def test_only_a_process_that_has_the_interface_is_ended() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            started = connections.started_at(process.pid)
            assert started is not None
            connections.write(attrs.evolve(known("kilo-kilo", "laptop", process=process.pid), started=started))
            done = ran(KGCTL, "disconnect")
            assert (done.returncode, done.stdout) == (0, "kilo-kilo: there was no connection\n"), done.stderr
            assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
def test_who_may_not_end_the_process_is_told_so() -> None:
    connections.write(
        attrs.evolve(
            known("kilo-kilo", "laptop", process=os.getpid()), started=connections.started_at(os.getpid()) or 0
        )
    )
    for file in lock_file.RUNTIME_DIR.glob("connection.*"):
        file.chmod(0o644)
    nobody = (
        "setpriv",
        "--reuid",
        "65534",
        "--clear-groups",
        "--inh-caps",
        "+net_admin",
        "--ambient-caps",
        "+net_admin",
    )
    with lock_file.connection_lock("interface", "kilo-kilo", "the interface kilo-kilo"):
        for mode in (0o600, 0o644):
            for file in lock_file.RUNTIME_DIR.glob("*.lock"):
                file.chmod(mode)
            done = ran(*nobody, KGCTL, "disconnect")
            assert done.returncode == 1, done.stdout
            assert done.stderr == (
                f"kgctl: process {os.getpid()}, the connection, is another user's: run kgctl disconnect as root\n"
            )


@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.root
def test_two_that_disconnect_at_once_send_one_signal() -> None:
    with lock_file.disconnect_lock("kilo-kilo"):
        done = ran(KGCTL, "disconnect")
    assert (done.returncode, done.stderr) == (
        1, f"kgctl: another kgctl disconnect ends kilo-kilo already (process {os.getpid()}); wait for it\n"
    )  # fmt: skip
