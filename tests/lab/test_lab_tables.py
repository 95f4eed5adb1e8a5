"""What `kgctl lab` prints: tables that fit the terminal, and the help and options of the program that runs inside."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from attrs import evolve
from click.testing import CliRunner
from rich.console import Console

from kilo_etcd.ctl.commands import lab as commands
from kilo_etcd.ctl.commands.lab import flow_lines
from kilo_etcd.ctl.main import main
from kilo_etcd.lab.capture import Flow
from kilo_etcd.lab.client import HostStatus
from kilo_etcd.lab.demo import hosts_as_table

ADDRESSES = {
    "private": ("10.101.0.11/24", "fd00:65:0:ffff::11/64"),
    "public": ("198.51.100.101", "2001:db8:1::ffff:101"),
    "mesh": ("10.4.190.128", "fd3c:4f2a:91b7:0:d41d:8cd9:8f00:b204"),
}


def host(*, six: bool, cuts: tuple[str, ...] = ()) -> HostStatus:
    found = {kind: pair if six else pair[:1] for kind, pair in ADDRESSES.items()}
    return HostStatus(
        host="frankfurt-1", site="frankfurt", power=True, agent="killed by SIGKILL", agent_pid=1, cuts=cuts, **found
    )  # fmt: skip


@pytest.mark.parametrize(("width", "six", "one_column"), [(80, False, True), (80, True, True), (200, True, False)])
def test_a_host_s_addresses_are_in_one_piece_whatever_the_terminal(width: int, six: bool, one_column: bool) -> None:
    shown_text = io.StringIO()
    console = Console(file=shown_text, width=width)
    rows = [host(six=six), host(six=six, cuts=("etcd",))]
    console.print(hosts_as_table("default", rows, console))
    shown = shown_text.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    words = shown.split()
    for pair in ADDRESSES.values():
        for address in pair if six else pair[:1]:
            assert words.count(address) == len(rows)
    assert ("addresses" in words) is one_column
    assert "…" not in shown


def test_addresses_of_any_length_keep_the_columns_of_a_capture() -> None:
    six = Flow(
        source="2001:db8:1::ffff:101", destination="fd3c:4f2a:91b7:0:d41d:8cd9:8f00:b204", protocol="tcp",
        source_port=7000, destination_port=51820, packets=1, bytes=60,
    )  # fmt: skip
    four = evolve(six, source="10.7.0.11", source_port=51820, destination="10.7.0.12", packets=20)
    first, second = flow_lines((six, four))
    assert "[2001:db8:1::ffff:101]:7000 " in first
    assert "10.7.0.11:51820 " in second
    assert first.index("packets") == second.index("packets")


@pytest.mark.parametrize(
    ("arguments", "machine", "command"),
    [
        (("gcp-1", "kg", "--help"), "gcp-1", ("kg", "--help")),
        (("gcp-1", "kgctl", "--name", "x"), "gcp-1", ("kgctl", "--name", "x")),
        (("--name", "b", "gcp-1", "wg"), "gcp-1", ("wg",)),
        (("gcp-1", "--", "wg", "-h"), "gcp-1", ("wg", "-h")),
    ],
)
def test_what_follows_the_machine_is_the_commands(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], machine: str, command: tuple[str, ...]
) -> None:
    ran: list[tuple[str, tuple[str, ...]]] = []
    monkeypatch.setattr(commands, "run_here", lambda lab, machine, command: ran.append((machine, tuple(command))))

    def with_lab(name: str | None, work: Callable[[None], object]) -> int:
        work(None)
        return 0

    monkeypatch.setattr(commands, "_with_lab", with_lab)
    result = CliRunner().invoke(main, ["lab", "exec", *arguments], prog_name="kgctl")
    assert (result.exit_code, ran) == (0, [(machine, command)])
