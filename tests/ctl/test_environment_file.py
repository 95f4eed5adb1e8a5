"""Where `kgctl` looks for etcd on a host whose agent has an environment file."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kilo_etcd.ctl import environment_file
from kilo_etcd.ctl.commands import join
from kilo_etcd.ctl.context import Mesh
from kilo_etcd.ctl.environment_file import parse
from kilo_etcd.ctl.group import first_sentence
from kilo_etcd.ctl.main import main
from kilo_etcd.etcd.api import Config
from kilo_etcd.runtime.etcd_members import keep
from kilo_etcd.runtime.options import etcd_config

FILE = """
# The agent's.
KILO_LOCATION=berlin
KILO_PREFIX=/mesh
ETCDCTL_ENDPOINTS="https://10.0.0.5:2379,\\
https://10.0.0.6:2379"
ETCDCTL_USER=root
ETCDCTL_PASSWORD='it''s $ecret'
ETCDCTL_INSECURE_SKIP_TLS_VERIFY=true
ETCDCTL_CACERT=
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kilo-etcd.env"
    monkeypatch.setattr(environment_file, "PATH", path)
    return path


def mesh(*args: str, env: dict[str, str] | None = None) -> tuple[Mesh, str]:
    """What a command gets, and what was written to standard error."""
    found: list[Mesh] = []
    command = click.Command("probe", callback=click.pass_obj(found.append))
    group = type(main)("kgctl", params=main.params, callback=main.callback)
    group.get_command = lambda context, name: command  # type: ignore[method-assign, assignment]
    result = CliRunner().invoke(group, [*args, "probe"], env=env or {})
    assert result.exit_code == 0, result.output
    return found[0], result.stderr


def test_etcd_is_that_of_the_agents_file(path: Path) -> None:
    path.write_text(FILE)
    found, errors = mesh()
    assert (found.etcd.endpoints, found.prefix, errors) == (
        ("https://10.0.0.5:2379", "https://10.0.0.6:2379"), "/mesh", "",
    )  # fmt: skip
    assert (found.etcd.user, found.etcd.password) == ("root", "it''s $ecret")
    assert found.etcd.tls is not None
    assert (found.etcd.tls.insecure_skip_verify, found.etcd.tls.ca) == (True, None)
    assert mesh("--prefix", "/other")[0].prefix == "/other"


@pytest.mark.parametrize(
    ("args", "env"),
    [(("--endpoints", "h:1"), {}), (("--dial-timeout", "1s"), {}), ((), {"ETCDCTL_ENDPOINTS": "h:1"})],
)
def test_whatever_is_given_of_etcd_leaves_the_whole_file_out(path: Path, args: tuple[str], env: dict[str, str]) -> None:
    path.write_text(FILE)
    found, _ = mesh(*args, env=env)
    assert (found.etcd.user, found.etcd.tls, found.prefix) == (None, None, "/kilo")


def test_without_a_file_etcd_is_on_this_machine(path: Path) -> None:
    found, errors = mesh()
    assert (found.etcd.endpoints, errors) == (("127.0.0.1:2379",), "")
    path.mkdir()
    found, errors = mesh()
    assert found.etcd.endpoints == ("127.0.0.1:2379",)
    assert errors == (
        f"kgctl: {path} cannot be read (Is a directory), so etcd is looked for at 127.0.0.1:2379; run kgctl as root, "
        "or set ETCDCTL_ENDPOINTS\n"
    )
    path.rmdir()
    path.write_bytes(b"\xff")
    assert "it is not UTF-8" in mesh()[1]


def test_a_wrong_value_in_the_file_is_one_sentence_that_names_it(path: Path) -> None:
    path.write_text("ETCDCTL_DIAL_TIMEOUT=soon\n")
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 2
    assert f"{path}: Invalid value for --dial-timeout (ETCDCTL_DIAL_TIMEOUT): 'soon' is no duration" in result.output
    # What asks no etcd reads no file.
    for words in (("completion", "bash"), ("lab", "--help"), ("status", "--help"), ("--help",)):
        result = CliRunner().invoke(main, words)
        assert (result.exit_code, result.stderr) == (0, ""), words
    path.write_text("ETCDCTL_INSECURE_SKIP_TLS_VERIFY=perhaps\n")
    result = CliRunner().invoke(main, ["status"])
    assert (result.exit_code, "'perhaps' is not a valid boolean" in result.output) == (2, True)


@pytest.mark.parametrize("line", ["KILO_PREFIX=/", "ETCDCTL_CERT=/x", "ETCDCTL_DIAL_TIMEOUT=soon"])
@pytest.mark.usefixtures("virtual_time")
def test_a_mistake_in_the_file_is_a_sentence_and_does_not_show_while_a_word_is_completed(path: Path, line: str) -> None:
    path.write_text(f"ETCDCTL_ENDPOINTS=127.0.0.1:1\n{line}\n")
    result = CliRunner().invoke(main, ["status"])
    assert (result.exit_code, "Traceback" in result.output) == (2, False)
    assert f"Error: {path}: " in result.output
    assert isinstance(result.exception, SystemExit)
    for words in ("kgctl st", "kgctl node forget "):
        number = str(len(words.split(" ")) - 1)
        completing = {"_KGCTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": number}
        completed = CliRunner().invoke(main, [], prog_name="kgctl", env=completing)
        assert (completed.exception, completed.stderr) == (None, ""), words


def test_an_environment_file_is_read_as_systemd_reads_it() -> None:
    text = '; no\n#no\nA=1\n B = x\n1=no\nC="a \\"b\\" \\$c"\nD=\\\n d e \nE=a\\ b\nF=\nnothing\nG=\'\\\'\n'
    assert parse(text) == {"A": "1", "C": 'a "b" $c', "D": "d e", "E": "a b", "F": "", "G": "\\"}


def test_the_hosts_credentials_are_for_its_own_etcd_alone(path: Path) -> None:
    path.write_text("ETCDCTL_ENDPOINTS=127.0.0.1:1\nETCDCTL_USER=host\nETCDCTL_PASSWORD=secret\n")
    root = main.make_context("kgctl", ["mesh"])
    given = {"other_prefix": None, "label": None, "other_label": "office"}
    given |= {f"other_{name}": None for name in ("cacert", "cert", "key", "user", "password")}
    with root:
        root.obj = Mesh(etcd_config(endpoints="127.0.0.1:1", user="host", password="secret"), "/kilo")
        first, other = join._sides(root, {**given, "other_endpoints": "stranger.example:2379"})
        assert (first.mesh.etcd.user, other.mesh.etcd.user, other.mesh.etcd.password) == ("host", None, None)
        _, same = join._sides(root, {**given, "other_endpoints": None, "other_prefix": "/b"})
        assert (same.mesh.etcd.user, same.mesh.etcd.password) == ("host", "secret"), "the same etcd"


def test_help_lists_commands_with_whole_sentences_and_a_wrong_one_is_answered_with_the_nearest() -> None:
    for group in ("peer", "location", "node", "mesh", "lab", "showconf"):
        listed = CliRunner().invoke(main, [group, "--help"]).output.partition("Commands:")[2]
        assert listed
        assert "..." not in listed
    assert first_sentence("One thing. Another\n\nA third.") == "One thing."
    assert first_sentence("One\nthing") == "One thing"
    result = CliRunner().invoke(main, ["sattus"])
    assert (result.exit_code, "Did you mean 'status'?" in result.output) == (2, True)


def test_a_variable_of_etcdctls_that_is_not_taken_is_refused(path: Path) -> None:
    path.write_text("ETCDCTL_ENDPOINTS=127.0.0.1:1\nETCDCTL_KEEPALIVE_TIME=10s\nETCDCTL_PEERS=x\n")
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 2
    assert f"{path}: ETCDCTL_PEERS is set, which kgctl does not take" in result.output
    path.unlink()
    result = CliRunner().invoke(main, ["status"], env={"ETCDCTL_API": "2"})
    assert result.exit_code == 2
    assert "ETCDCTL_API=2: kgctl speaks etcd's API 3 only; write ETCDCTL_API=3 or unset it." in result.output
    assert CliRunner().invoke(main, ["completion", "bash"], env={"ETCDCTL_API": "2"}).exit_code == 0


def test_the_members_that_the_agent_has_found_are_tried_too(path: Path, tmp_path: Path) -> None:
    given = Config(endpoints=("127.0.0.1:1",))
    keep(given, tmp_path, ("http://127.0.0.1:2",))
    text = f"ETCDCTL_ENDPOINTS=127.0.0.1:1\nKILO_STATE_DIR={tmp_path}\nETCDCTL_COMMAND_TIMEOUT=300ms\n"
    path.write_text(text)
    assert "127.0.0.1:2" not in CliRunner().invoke(main, ["status"]).output
    path.write_text(f"{text}KILO_ENDPOINTS_FROM_CLUSTER=true\n")
    output = CliRunner().invoke(main, ["status"]).output
    assert "http://127.0.0.1:1: connection refused" in output
    assert "http://127.0.0.1:2: connection refused" in output
