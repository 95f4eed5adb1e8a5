"""`kgctl` as an operator meets it: its command line, its errors, and (with real etcd) what it shows and changes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from helpers import put_kept, require
from kilo_etcd import __version__
from kilo_etcd.ctl.main import _COMMANDS, main
from kilo_etcd.etcd.api import Client, Config, Put, Unavailable
from kilo_etcd.etcd.client import open_client
from kilo_etcd.model import CandidateClass, Endpoint
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, NodeRecord, Role, StatusRecord, encode
from kilo_etcd.testing.etcd_server import EtcdServer, ServerOptions
from kilo_etcd.testing.fake_etcd import FakeEtcd

KGCTL = Path(sys.executable).with_name("kgctl")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="kgctl")


# --- the command line ------------------------------------------------------------------------------------------------


def test_version() -> None:
    assert run("--version").output == f"kgctl, version {__version__}\n"


def test_help_names_every_command_and_each_can_be_loaded() -> None:
    text = run("--help").output
    for name in _COMMANDS:
        assert f"\n  {name} " in text
        result = run(name, "--help")
        assert (result.exit_code, "Usage: kgctl" in result.output) == (0, True), result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["status", "-o", "yaml"], "'yaml' is not one of 'table', 'json'"),
        (["--endpoints", "http://etcd/v3", "status"], "is no etcd endpoint"),
        (["location", "set", "node-1"], "Missing argument 'LABEL'"),
        (["location", "set", "node-1", " "], "the label is empty; kgctl location unset NODE takes a label away"),
        (["location", "set", "node-1", "a\nb"], "characters that do not print"),
        (["location", "set", "node-1", "x" * 5000], "longer than"),
        (["location", "set", "a/b", "gcp"], "'a/b' is no node name"),
        (["location", "set", "node-1", "gcp", "--node", ""], "the node's name is empty"),
        (["location", "unset"], "Missing argument 'NODE...'"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_what_is_wrong(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_what_is_left_out_of_etcds_endpoints_is_a_note_of_check_and_printed_by_no_other_command(
    fake: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def opened(_config: Config, *, on_remark: Callable[[str], object] = print) -> AsyncIterator[Client]:
        on_remark("http://b:2379 is left out")
        yield fake.client()

    monkeypatch.setattr("kilo_etcd.etcd.client.open_client", opened)
    status = run("status")
    assert "is left out" not in status.output + status.stderr
    found = json.loads(run("check", "-o", "json").stdout)
    assert [one["severity"] for one in found if one["text"] == "http://b:2379 is left out"] == ["note"]


async def test_ctrl_c_is_quiet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        port = silent.getsockname()[1]
        process = await trio.lowlevel.open_process(
            [KGCTL, "--endpoints", f"127.0.0.1:{port}", "--dial-timeout", "50s", "--command-timeout", "50s", "status"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            with trio.fail_after(20):
                # It waits for an answer from now on.
                await trio.lowlevel.wait_readable(silent)
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 130
                assert process.stdout is not None
                assert process.stderr is not None
                assert [await process.stdout.receive_some(), await process.stderr.receive_some()] == [b"", b""]
        finally:
            process.kill()
            await process.wait()


# --- with etcd in memory ----------------------------------------------------------------------------------------------

KEY = {name: f"{letter * 43}=" for name, letter in (("node-1", "A"), ("node-2", "I"), ("node-3", "Q"))}


async def register(client: Client, number: int, *, candidate: bool = False) -> int:
    """What the agent of node-<number> writes, at 192.168.0.0/24 with mesh address 10.4.0.<number>."""
    keys, name = Keys(), f"node-{number}"
    record = NodeRecord(
        public_key=KEY[name],
        endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
        internal_ips=(ip_interface(f"192.168.0.{number}/24"),),
        location="home" if number == 3 else "",
    )
    await client.put(f"/kilo/by/{name}/addresses/10.4.0.{number}", "")
    revision = (await client.put(keys.node(name), encode(record))).header.revision
    if candidate:
        offer = CandidateRecord(rank=CandidateClass.PUBLIC, since=f"2026-11-22T10:00:0{number}Z")
        revision = await put_kept(client, keys.election("gcp", name), encode(offer))
    return revision


async def small_world(client: Client) -> None:
    """node-2 leads gcp, node-1 is next; node-3 is at home; one record is broken; node-1's agent reports."""
    await client.put("/kilo/mesh/subnets", "10.4.0.0/16")
    await client.put("/kilo/mesh/granularity", "location")
    await client.put("/kilo/locations/node-1", "gcp")
    await client.put("/kilo/locations/node-2", "gcp")
    await register(client, 2, candidate=True)
    await register(client, 1, candidate=True)
    await client.put("/kilo/by/broken/node", "{")
    newest = await register(client, 3)
    told = StatusRecord(
        public_key=KEY["node-1"],
        revision=newest,
        role=Role.MEMBER,
        location="gcp",
        leader="node-1",
        errors=("the name vpn.example.org does not resolve",),
    )
    await put_kept(client, Keys().status("node-1"), encode(told))


def test_an_empty_mesh_says_so(fake: FakeEtcd) -> None:
    assert "No node has registered yet." in run("status").output
    assert run("location", "list").output == "No node is registered or labelled yet.\n"


def test_status_json_of_a_small_world(fake: FakeEtcd) -> None:
    trio.run(small_world, fake.client())
    data = json.loads(run("status", "-o", "json").output)
    assert [(row["name"], row["role"], row["behind"]) for row in data["nodes"]] == [
        ("broken", "not in force", None),
        ("node-1", "member", 0),
        ("node-2", "leader", None),
        ("node-3", "alone", None),
    ]
    assert [aside["key"] for aside in data["rejected"]] == ["/kilo/by/broken/node"]
    assert [remark["subject"] for remark in data["disagreements"]] == ["node-1"]


def test_a_status_under_no_lease_makes_no_agent_alive(fake: FakeEtcd) -> None:
    trio.run(small_world, fake.client())
    fake.put(Keys().status("node-2"), encode(StatusRecord(public_key=KEY["node-2"])))
    rows = {row["name"]: row["alive"] for row in json.loads(run("status", "-o", "json").output)["nodes"]}
    assert (rows["node-1"], rows["node-2"]) == (True, False)
    assert "its agent does not report" in run("node", "show", "node-2").output


def test_an_agent_is_behind_only_for_the_mesh_s_own_records(fake: FakeEtcd) -> None:
    trio.run(small_world, fake.client())
    fake.put("/somebody/else", "x")
    fake.put_kept(Keys().status("node-2"), encode(StatusRecord(public_key=KEY["node-2"])))
    assert [n["behind"] for n in json.loads(run("status", "-o", "json").output)["nodes"]][1] == 0
    fake.put("/kilo/locations/node-3", "gcp")
    behind = [n["behind"] for n in json.loads(run("status", "-o", "json").output)["nodes"]][1]
    assert behind > 0


def test_a_label_is_written_and_taken_away(fake: FakeEtcd) -> None:
    assert run("location", "set", "node-9", " gcp ").output == "node-9: gcp; node-9 is not registered yet\n"
    assert fake.get("/kilo/locations/node-9") == b"gcp"
    odd = run("location", "set", "node-9", "berlin  # the old site")
    assert (odd.exit_code, odd.stderr) == (
        0,
        'kgctl: location "berlin  # the old site" has "#" in its name, and a comment behind a value is part of the '
        "value: is that meant?\n",
    )
    assert run("location", "unset", "node-9").output == "node-9: label removed; node-9 is not registered yet\n"
    assert fake.keys("/kilo/") == []


def test_several_failures_of_etcd_at_once_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def failing(config: Config, **_: object) -> AsyncIterator[Client]:
        raise ExceptionGroup("tasks", [Unavailable("etcd is away"), Unavailable("etcd is away")])
        yield

    monkeypatch.setattr("kilo_etcd.etcd.client.open_client", failing)
    result = run("status")
    assert (result.exit_code, result.stderr) == (1, "kgctl: etcd is away\n")


def test_a_mistake_of_ours_is_not_dressed_up_as_the_operator_s(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def broken(config: Config, **_: object) -> AsyncIterator[Client]:
        raise ExceptionGroup("tasks", [Unavailable("etcd is away"), ZeroDivisionError()])
        yield

    monkeypatch.setattr("kilo_etcd.etcd.client.open_client", broken)
    assert isinstance(run("status").exception, ExceptionGroup)


# --- with real etcd --------------------------------------------------------------------------------------------------


async def kgctl(server: EtcdServer, *arguments: str, check: int = 0) -> str:
    """Run the real program; its output, or with `check` other than 0 what it says on stderr."""
    done = await trio.run_process(
        [KGCTL, "--endpoints", server.endpoint, *arguments], capture_stdout=True, capture_stderr=True, check=False
    )
    assert done.returncode == check, done.stderr.decode()
    if not check:
        assert done.stderr == b""
    return (done.stderr if check else done.stdout).decode()


async def world_at(server: EtcdServer) -> None:
    async with open_client(server.config()) as client:
        await small_world(client)


@pytest.mark.etcd
async def test_status_shows_the_mesh_and_its_troubles() -> None:
    require("etcd")
    async with EtcdServer.run() as server:
        assert "No node has registered yet." in await kgctl(server, "status")
        await world_at(server)
        text = await kgctl(server, "status")
        lines = [" ".join(line.split()) for line in text.splitlines()]
        assert any(
            line.startswith("node-2 gcp 10.4.0.2 192.168.0.2/24 203.0.113.2:51820 leader gone") for line in lines
        ), text
        assert "gcp 2 node-2 - node-1 node-2, node-1" in lines
        assert any(line.startswith("broken - - - - not in force gone") for line in lines)
        assert any(line.startswith("/kilo/by/broken/node the value is not JSON") for line in lines)
        assert "node-1 it takes node-1 for its leader, but by etcd's records node-2 leads" in lines
        assert "node-1 the name vpn.example.org does not resolve" in lines

        data = json.loads(await kgctl(server, "status", "-o", "json"))
        assert [(row["name"], row["role"], row["alive"], row["behind"]) for row in data["nodes"]] == [
            ("broken", "not in force", False, None),
            ("node-1", "member", True, 0),
            ("node-2", "leader", False, None),
            ("node-3", "alone", False, None),
        ]


@pytest.mark.etcd
async def test_labels_are_set_listed_and_unset() -> None:
    require("etcd", "etcdctl")
    async with EtcdServer.run() as server:
        await world_at(server)
        assert await kgctl(server, "location", "set", "node-3", "東京/eu 1", "--yes") == (
            "node-3 moves from home to 東京/eu 1\nnode-3: 東京/eu 1\n"
        )
        assert await server.etcdctl("get", "--print-value-only", "/kilo/locations/node-3") == "東京/eu 1\n"
        assert await kgctl(
            server, "location", "set", "node-3", "aws", "--node", "node-1", "--node", "node-9", "--yes"
        ) == (
            "node-1 moves from gcp to aws\nnode-3 moves from 東京/eu 1 to aws\naws: node-1 leads 2 nodes\n"
            "node-3: aws\nnode-1: aws\nnode-9: aws; node-9 is not registered yet\n"
        )
        assert await kgctl(server, "location", "unset", "node-3", "node-2", "node-2", "--yes") == (
            "node-2 moves from gcp to (default)\nnode-3 moves from aws to home\n"
            "tunnels between nodes: 3 instead of 1\n"
            "node-3: label removed\nnode-2: label removed\n"
        )
        assert await kgctl(server, "location", "unset", "node-2") == "node-2: had no label\n"
        assert await kgctl(server, "location", "list") == (
            "NODE    LOCATION   FROM            NOTE\n"
            "broken  (default)  -\n"
            "node-1  aws        label\n"
            "node-2  (default)  -\n"
            "node-3  home       host's default\n"
            "node-9  aws        label           not registered yet\n"
        )
        assert json.loads(await kgctl(server, "location", "list", "-o", "json"))[-1] == {
            "node": "node-9",
            "location": "aws",
            "source": "label",
            "registered": False,
        }


@pytest.mark.etcd
async def test_a_thousand_dead_nodes_are_listed_and_forgotten() -> None:
    require("etcd")
    async with EtcdServer.run() as server:
        await world_at(server)
        async with open_client(server.config()) as client:
            for first in range(0, 1000, 100):
                names = {f"runner-{n:04}": f"10.4.{n // 250 + 1}.{n % 250}" for n in range(first, first + 100)}
                puts = [Put(Keys().address(name, ip_address(address)), "") for name, address in names.items()]
                await client.txn([], puts)
            # It says for how long names without a record have been silent.
            own = await client.get(Keys().node("node-1"))
            assert own is not None
            await client.put(own.key, own.value, lease=(await client.grant_lease(600)).id)
            revision = (await client.get_prefix("/kilo/by/node-1")).header.revision
        listed = json.loads(await kgctl(server, "node", "list", "--claims", "-o", "json"))
        assert sum(node["node"].startswith("runner-") for node in listed) == 1000
        text = await kgctl(server, "node", "forget", "--dead-for", "400s", "--yes")
        assert "and 990 more: forgotten." in text
        async with open_client(server.config()) as client:
            left = await client.get_prefix("/kilo/by/runner-")
            assert not left.kvs
            # A transaction takes 42 names, with three conditions each; the question to agents is put and taken back.
            assert left.header.revision - revision == 24 + 2
            assert (await client.get_prefix("/kilo/by/node-1")).kvs


@pytest.mark.etcd
async def test_the_prefix_separates_meshes() -> None:
    require("etcd", "etcdctl")
    async with EtcdServer.run() as server:
        await kgctl(server, "--prefix", "/other", "location", "set", "node-1", "gcp")
        assert await server.etcdctl("get", "--prefix", "--keys-only", "/") == "/other/locations/node-1\n\n"
        assert await kgctl(server, "location", "list") == "No node is registered or labelled yet.\n"


@pytest.mark.etcd
async def test_the_graph_is_dot() -> None:
    require("etcd", "dot")
    async with EtcdServer.run() as server:
        await world_at(server)
        dot = await kgctl(server, "graph")
        drawn = await trio.run_process(["dot", "-Tplain"], stdin=dot.encode(), capture_stdout=True)
        for name in ("node-1", "node-2", "node-3"):
            assert name in drawn.stdout.decode()


@pytest.mark.etcd
async def test_wrong_password_and_wrong_ca_are_one_sentence_each() -> None:
    require("etcd", "etcdctl")
    async with EtcdServer.run() as server:
        await server.enable_auth()
        said = await kgctl(server, "--user", "root:wrong", "status", check=1)
        assert said.startswith("kgctl: ")
        assert len(said.splitlines()) == 1
        assert "wrong" not in said.replace("wrong user", "").replace("wrong password", "")
        said = await kgctl(server, "status", check=1)
        assert said.startswith("kgctl: ")
        assert len(said.splitlines()) == 1
    async with EtcdServer.run(ServerOptions(tls=True)) as server:
        said = await kgctl(server, "status", check=1)
        assert said.startswith("kgctl: ")
        assert len(said.splitlines()) == 1
