"""Completion with real names, and the manual pages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import click
import pytest
import trio
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from test_kgctl_explain import world

from kilo_etcd.agent.main import main as kg
from kilo_etcd.ctl.commands.man import page
from kilo_etcd.ctl.main import main
from kilo_etcd.etcd.client import open_client
from kilo_etcd.testing.etcd_server import EtcdServer
from kilo_etcd.testing.fake_etcd import FakeEtcd


@pytest.fixture
def etcd(fake: FakeEtcd) -> FakeEtcd:
    trio.run(world, fake.client())
    fake.put("/kilo/locations/gcp-1", "gcp")
    fake.put_kept("/kilo/by/home-1/leaders/home", "")
    return fake


def completed(*words: str) -> list[str]:
    *before, incomplete = words
    completion_items = ShellComplete(main, {}, "kgctl", "_KGCTL_COMPLETE").get_completions(before, incomplete)
    return [item.value for item in completion_items]


def commands_of(command: click.Command, *names: str) -> Iterator[tuple[str, ...]]:
    yield names
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands_of(inner, *names, name)


@pytest.mark.parametrize("program", [kg, main])
def test_no_line_of_any_help_ends_before_its_sentence_does(program: click.Command) -> None:
    for names in commands_of(program):
        text = CliRunner().invoke(program, [*names, "--help"]).stdout
        cut = [line for line in text.splitlines() if line.endswith("...") and not line.startswith("Usage:")]
        assert cut == [], names


@pytest.mark.usefixtures("etcd")
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("explain", "gcp"), ["gcp-1", "gcp-2", "gcp-3"]),
        (("explain", "gcp-1", "lap"), ["laptop"]),
        (("--prefix", "/kilo", "node", "show", "home"), ["home-1", "home-2"]),
        (("location", "set", "home-1", ""), ["gcp", "home"]),
        (("location", "unset", "home-1", "home"), ["home-1", "home-2"]),
        (("peer", "remove", ""), ["laptop"]),
        (("showconf", "peer", ""), ["laptop"]),
        (("annotate", "gcp-1", "force"), ["force-endpoint=", "force-internal-ip="]),
        (("--prefix", "/other", "explain", ""), []),
        (("pe",), ["peer"]),
    ],
)
def test_names_are_those_in_etcd(words: tuple[str, ...], names: list[str]) -> None:
    assert completed(*words) == names


def test_nothing_is_said_where_etcd_is_away(etcd: FakeEtcd) -> None:
    etcd.down()
    assert completed("explain", "") == []
    assert completed("--endpoints", "nonsense://", "explain", "") == []


@pytest.mark.etcd
async def test_bash_completes() -> None:
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout
    line = "kgctl explain gcp-"
    async with EtcdServer.run() as server, open_client(server.config()) as client:
        await world(client)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = await trio.run_process(
            ["bash", "--norc", "-c", f"{script}\nCOMP_WORDS=({line}) COMP_CWORD=2\n_kgctl_completion kgctl\n"
             'printf "%s\\n" "${COMPREPLY[@]}"'],
            env={**os.environ, "PATH": path, "ETCDCTL_ENDPOINTS": ",".join(server.config().endpoints)},
            capture_stdout=True,
        )  # fmt: skip
    assert done.stdout.decode().split() == ["gcp-1", "gcp-2", "gcp-3"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert "_KGCTL_COMPLETE" in done.stdout
    assert f"{shell}_complete" in done.stdout
    # A shell that is here reads it without complaint.
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)


def test_the_manual_has_every_command_option_and_example() -> None:
    text = page(main, "kgctl", 1, date(2026, 11, 23))
    assert text.startswith('.TH KGCTL 1 2026-11-23 "kilo-etcd ')
    for heading in ("kgctl annotate", "kgctl peer add", "kgctl lab power\\-off", "kgctl location set"):
        assert f'.SS "{heading}"' in text
    assert ".B \\-\\-endpoints TEXT" in text
    assert "kgctl peer add laptop" in text
    assert text.count("Show this message and exit") == 1
    # No line begins with a request that is none.
    requests = {line.split()[0] for line in text.splitlines() if line.startswith((".", "'"))}
    assert requests == {".TH", ".SH", ".SS", ".PP", ".TP", ".B", ".nf", ".fi"}
    agent = page(kg, "kg", 8, date(2026, 11, 23))
    assert re.search(r"^\.B \\-\\-encapsulate never\|", agent, re.MULTILINE)
    assert '.SS "kg cleanup"' in agent


def test_the_manual_is_written_where_it_is_told(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["man", str(tmp_path / "man")])
    assert done.stdout.split() == [f"{tmp_path}/man/man1/kgctl.1", f"{tmp_path}/man/man8/kg.8"]
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(main, ["man", str(tmp_path / "file" / "x")])
    assert (done.exit_code, done.stderr) == (
        1,
        f"kgctl: {tmp_path}/file/x/man1/kgctl.1 cannot be written: Not a directory; choose a directory of yours\n",
    )
