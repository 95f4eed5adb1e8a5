"""Every command of kgctl, in every trouble with etcd: one sentence, a status that is not 0, and nothing changed."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import click
import pytest
import trio
from click.testing import CliRunner, Result
from test_kgctl_explain import world

from kilo_etcd.ctl.main import main
from kilo_etcd.etcd.api import PermissionDenied
from kilo_etcd.lab import LabError
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


READING = {
    "check": ["check"],
    "explain": ["explain", "gcp-1", "home-1"],
    "graph": ["graph"],
    "location list": ["location", "list"],
    "mesh show": ["mesh", "show"],
    "node list": ["node", "list"],
    "node show": ["node", "show", "gcp-1"],
    "peer list": ["peer", "list"],
    "peer show": ["peer", "show", "laptop"],
    "showconf node": ["showconf", "node", "gcp-1"],
    "showconf peer": ["showconf", "peer", "laptop"],
    "status": ["status"],
    "wait": ["wait", "--timeout", "1s"],
}
WRITING = {
    "annotate": ["annotate", "gcp-1", "leader=true"],
    "location set": ["location", "set", "gcp-1", "elsewhere", "--yes"],
    "location unset": ["location", "unset", "labelled"],
    "mesh adopt": ["mesh", "adopt", "--yes"],
    "mesh join": ["mesh", "join", "--other-prefix", "/b", "--yes"],
    "mesh unjoin": ["mesh", "unjoin", "--other-prefix", "/b", "--yes"],
    "mesh set": ["mesh", "set", "granularity", "full", "--yes"],
    "node forget": ["node", "forget", "home-2", "--yes"],
    "node rename": ["node", "rename", "home-2", "home-3", "--yes"],
    "peer add": ["peer", "add", "phone", "--allowed-ips", "10.9.0.7", "--public-key", "Y" + "A" * 42 + "="],
    "peer remove": ["peer", "remove", "laptop", "--yes"],
}
ELSEWHERE = {"completion", "man", "connect", "connection", "disconnect", "lab"}
"""Those that need no etcd, and those that are tested where they have what they need."""
BOTH = list((READING | WRITING).values())


def test_every_command_is_here() -> None:
    context = click.Context(main)
    found = set()
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        below = command.list_commands(context) if isinstance(command, click.Group) else [""]
        found |= {f"{name} {part}".strip() for part in below if name not in ELSEWHERE}
    assert found == READING.keys() | WRITING.keys()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="kgctl")


def one_sentence(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("kgctl: ")
    return line


@pytest.mark.parametrize("command", BOTH, ids=" ".join)
def test_etcd_out_of_reach(command: list[str]) -> None:
    patience = "2s" if command is BOTH[0] else "100ms"
    said = one_sentence(run("--endpoints", f"127.0.0.1:{free_port()}", "--command-timeout", patience, *command))
    # On a slow machine the time of the others is up before the connection is refused.
    assert "connection refused" in said or (command is not BOTH[0] and "etcd did not" in said)


@pytest.mark.parametrize("command", BOTH, ids=" ".join)
def test_an_etcd_that_says_nothing(command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        said = one_sentence(
            run("--endpoints", endpoint, "--command-timeout", "100ms", "--dial-timeout", "80ms", *command)
        )
    # On a slow machine the time is up before the connection is.
    assert endpoint in said or "etcd did not" in said


@pytest.fixture
def etcd(fake: FakeEtcd) -> FakeEtcd:
    trio.run(world, fake.client())
    fake.put("/kilo/locations/labelled", "x")
    fake.put("/b/mesh/subnets", "10.55.0.0/16")
    return fake


async def denied(*_: object, **__: object) -> None:
    await trio.lowlevel.checkpoint()
    raise PermissionDenied("user eve may not do this in etcd at 127.0.0.1:2379: grant it with etcdctl role")


@pytest.mark.parametrize("command", BOTH, ids=" ".join)
def test_a_user_who_may_not_read(etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr(FakeClient, "range", denied)
    before = etcd.revision
    assert "user eve may not" in one_sentence(run(*command))
    assert etcd.revision == before


@pytest.mark.parametrize("command", [c for name, c in WRITING.items() if not name.startswith("mesh j")], ids=" ".join)
def test_a_user_who_may_not_write(etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    etcd.put("/kilo/peers/b.node.x", '{"publicKey": "X%s=", "allowedIPs": ["10.56.0.1/32"]}' % ("A" * 42))
    for name in ("put", "txn", "delete"):
        monkeypatch.setattr(FakeClient, name, denied)
    before = etcd.revision
    result = run(*command)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("kgctl: ")
    assert "user eve may not" in result.stderr
    assert etcd.revision == before


@pytest.mark.parametrize("command", BOTH, ids=" ".join)
def test_a_certificate_that_is_not_there(command: list[str], tmp_path: Path) -> None:
    result = run("--cacert", str(tmp_path / "ca.pem"), *command)
    assert result.exit_code == 2
    assert "ca.pem" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_lab_that_ends_at_its_deadline_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        async def all_pairs_ping(self, deadline: float) -> None:
            await trio.lowlevel.checkpoint()
            raise LabError(f"after {deadline:g} s 2 pairs do not ping: a to b, b to a")

    @asynccontextmanager
    async def built(*_: object, **__: object) -> AsyncIterator[Silent]:
        yield Silent()

    monkeypatch.setattr("kilo_etcd.ctl.commands.lab.running_lab", built)
    said = one_sentence(run("lab", "run", "three-sites", "--deadline", "6"))
    assert "after 6 s 2 pairs do not ping: a to b, b to a; so the lab ends: with --deadline 60 it waits longer" in said
