"""The log as a person reads it, and as the journal gets it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from kilo_etcd.runtime.logs import MOST_NAMED, Once, get_logger, render, setup_logging, write_due, write_rest


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, ours = root.handlers[:], logging.getLogger("kilo_etcd").level
    root.handlers.clear()
    yield
    # Closes what the test had the log go to.
    setup_logging("none", stream=io.StringIO())
    root.handlers[:] = handlers
    logging.getLogger("kilo_etcd").setLevel(ours)
    structlog.reset_defaults()


def lines(level: str = "debug") -> io.StringIO:
    stream = io.StringIO()
    setup_logging(level, stream=stream, clock=lambda: 1_700_000_000.25)
    return stream


def test_an_event_is_one_line_with_its_fields() -> None:
    stream = lines()
    get_logger(node="node-1").bind(location="gcp").info("leader elected", revision=7, members=("a", "b"), empty=None)
    assert (
        stream.getvalue()
        == "2023-11-14T22:13:20.250Z info    leader elected  node=node-1 location=gcp revision=7 members=a,b\n"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "v=plain"),
        ("two words", 'v="two words"'),
        ("", 'v=""'),
        (True, "v=true"),
        (1.5, "v=1.5"),
        ('a"b=c', r'v="a\"b=c"'),
        ("München", "v=München"),
        ("a\nb", r'v="a\nb"'),
        ("\x1b[2J\x9b1m", r'v="\u001b[2J\x9b1m"'),
        ("\u202egnp", r'v="\u202egnp"'),
        ("\ud800", r'v="\ud800"'),
    ],
)
def test_a_value_cannot_break_its_line_or_command_a_terminal(value: Any, shown: str) -> None:
    assert render({"event": "said", "v": value}) == f"said  {shown}"


def test_a_sentence_from_etcd_cannot_either() -> None:
    assert render({"event": "a\n2023 error \x1b[31mforged"}) == r"a\n2023 error \x1b[31mforged"


def test_a_long_value_is_cut() -> None:
    assert len(render({"event": "e", "v": "x" * 1_000_000})) < 2100


def test_levels_are_kept_apart() -> None:
    for level, wanted in [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
        ("none", []),
    ]:
        stream = lines(level)
        for name in ("debug", "info", "warning", "error"):
            getattr(get_logger(), name)("x")
        assert [line.split()[1] for line in stream.getvalue().splitlines()] == wanted


def test_an_unexpected_error_brings_its_traceback() -> None:
    stream = lines()
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        get_logger().exception("the agent stumbled", node="a")
    first, *rest = stream.getvalue().splitlines()
    assert re.search(r" error +the agent stumbled  node=a$", first)
    assert rest[-1] == "    RuntimeError: boom"


def test_colours_are_for_terminals_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    setup_logging("info", stream=terminal)
    get_logger().error("bad")
    assert terminal.getvalue().startswith("\x1b[31m")
    assert "\x1b" not in _written(lambda: get_logger().error("bad"))


def _written(act: Any) -> str:
    stream = lines()
    act()
    return stream.getvalue()


def test_warnings_of_libraries_come_along_and_their_chatter_does_not() -> None:
    stream = lines("info")
    logging.getLogger("pyroute2").warning("odd %s", "message")
    logging.getLogger("pyroute2").info("chatter")
    logging.getLogger("kilo_etcd.kernel").info("of our own")
    logging.getLogger("kilo_etcd.kernel").debug("too fine")
    record = [line.split(maxsplit=2)[1:] for line in stream.getvalue().splitlines()]
    assert record == [["warning", "odd message  logger=pyroute2"], ["info", "of our own  logger=kilo_etcd.kernel"]]


def test_a_second_setup_replaces_the_first() -> None:
    first = lines()
    second = lines()
    get_logger().info("once")
    logging.getLogger("x").warning("once")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 2


def test_logging_never_raises() -> None:
    class Awkward:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    stream = lines()
    get_logger().info("with", thing=Awkward())
    assert 'thing="<Awkward: RuntimeError while it was formatted>"' in stream.getvalue()
    # pytest's own handler would raise, so the record goes to ours alone.
    (ours,) = [
        handler for handler in logging.getLogger().handlers if type(handler).__module__ == "kilo_etcd.runtime.logs"
    ]
    ours.handle(logging.LogRecord("x", logging.WARNING, "", 0, "%d", ("not a number",), None))
    assert stream.getvalue().endswith("warning %d  logger=x\n")
    stream.close()
    get_logger().info("into a closed stream")


def test_a_reader_that_does_not_read_loses_lines_and_is_told() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream, os.fdopen(reading, "rb") as reader:
        setup_logging("info", stream=stream)
        os.set_blocking(reading, False)
        begun = time.monotonic()
        # 64 KiB is a pipe's default capacity; every line beyond it would block forever.
        for number in range(45):
            get_logger().info(f"{number} {'x' * 1900}", number=number)
        assert time.monotonic() - begun < 10
        before = reader.read()
        get_logger().info("heard again")
        after = reader.read().decode()
        assert b"number=0\n" in before
        assert b"number=44\n" not in before
        assert re.search(r"log lines were dropped, since nobody read them  lines=\d+\n.*heard again\n$", after)


# -- the journal --------------------------------------------------------------------------------------------------


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "journal"))
        server.settimeout(5)
        yield server


def entry(server: socket.socket) -> dict[str, str]:
    """The next entry, read by the rules of systemd's native journal protocol."""
    data, ancillary, _, _ = server.recvmsg(1 << 20, socket.CMSG_SPACE(4))
    if ancillary:
        (handle,) = struct.unpack("i", ancillary[0][2][:4])
        with os.fdopen(handle, "rb") as file:
            file.seek(0)
            data = file.read()
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        if b"=" in line:
            name, _, value = line.partition(b"=")
        else:
            name, (size,) = line, struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + size], data[8 + size + 1 :]
        fields[name.decode()] = value.decode()
    return fields


def test_the_journal_gets_the_line_and_every_field(journald: socket.socket) -> None:
    setup_logging("info", journal=Path(journald.getsockname()))
    get_logger(node="node-1").warning("leader gone", location="g cp", **{"next-up": ("a", "b")}, nothing=None)
    got = entry(journald)
    assert got.pop("SYSLOG_PID") == str(os.getpid())
    assert got == {
        "MESSAGE": 'leader gone  node=node-1 location="g cp" next-up=a,b',
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "kg",
        "KILO_EVENT": "leader gone",
        "KILO_NODE": "node-1",
        "KILO_LOCATION": "g cp",
        "KILO_NEXT_UP": "a,b",
    }


def test_a_field_with_a_line_break_stays_one_field(journald: socket.socket) -> None:
    setup_logging("info", journal=Path(journald.getsockname()))
    get_logger().error("bad record", value="x\nPRIORITY=0\nFORGED=1")
    got = entry(journald)
    assert got["PRIORITY"] == "3"
    assert got["KILO_VALUE"] == "x\nPRIORITY=0\nFORGED=1"
    assert "FORGED" not in got


def test_an_entry_too_large_for_a_datagram_arrives(journald: socket.socket) -> None:
    setup_logging("info", journal=Path(journald.getsockname()))
    get_logger().info("much", **{f"f{number}": "x" * 2000 for number in range(200)})
    assert entry(journald)["KILO_F199"] == "x" * 2000


def test_a_journald_that_was_restarted_is_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as first:
        first.bind(str(path))
        setup_logging("info", journal=path)
        get_logger().info("one")
        assert entry(first)["KILO_EVENT"] == "one"
    path.unlink()
    get_logger().info("while it is away")
    assert "while it is away" in capsys.readouterr().err
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
        second.bind(str(path))
        get_logger().info("two")
        assert entry(second)["KILO_EVENT"] == "two"


def test_a_frozen_journald_delays_little_and_hears_of_the_loss(journald: socket.socket) -> None:
    setup_logging("info", journal=Path(journald.getsockname()))
    begun = time.monotonic()
    for number in range(2000):
        get_logger().info(f"on {number}")
    assert time.monotonic() - begun < 5
    journald.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            entry(journald)
    journald.settimeout(5)
    get_logger().info("heard again")
    assert int(entry(journald)["KILO_DROPPED_BEFORE"]) > 1000


def test_under_systemd_the_journal_is_chosen_by_itself(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server, (tmp_path / "stderr").open("wb") as stderr:
        server.bind(str(tmp_path / "journal"))
        server.settimeout(20)
        status = os.fstat(stderr.fileno())
        program = (
            "import sys; from pathlib import Path; from kilo_etcd.runtime import logs; "
            "logs.JOURNAL_SOCKET = Path(sys.argv[1]); logs.setup_logging(); logs.get_logger().info('hello', a=1)"
        )
        for stream, expected in ((f"{status.st_dev}:{status.st_ino}", True), ("1:1", False), ("junk", False)):
            done = subprocess.run(
                [sys.executable, "-c", program, str(tmp_path / "journal")],
                env={**os.environ, "JOURNAL_STREAM": stream},
                stderr=stderr,
                check=True,
            )
            assert done.returncode == 0
            assert ("hello" in (tmp_path / "stderr").read_text()) is not expected
            if expected:
                assert entry(server)["KILO_A"] == "1"


# -- logged once ----------------------------------------------------------------------------------------------------


class RecordedLog:
    """A log that remembers."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattr__(self, level: str) -> Any:
        def record(event: str, **fields: Any) -> None:
            self.events.append(f"{level}: {event}" + (f" {json.dumps(fields)}" if fields else ""))

        return record


def test_a_lasting_error_is_said_once_again_when_changed_and_when_gone() -> None:
    log = RecordedLog()
    once = Once(log)
    assert once.error("etcd", "out of reach", error="refused")
    assert not once.error("etcd", "out of reach", error="refused")
    assert once.error("etcd", "out of reach", error="timed out")
    assert once.clear("etcd", "back")
    assert not once.clear("etcd", "back")
    assert once.error("etcd", "out of reach", error="timed out")
    assert log.events == [
        'error: out of reach {"error": "refused"}',
        'error: out of reach {"error": "timed out"}',
        "info: back",
        'error: out of reach {"error": "timed out"}',
    ]


def test_a_new_revision_is_no_news() -> None:
    once = Once(RecordedLog())
    assert once.error("k", "bad", revision=1)
    assert not once.error("k", "bad", revision=2)


def test_of_very_many_at_once_the_first_are_named_and_the_others_counted() -> None:
    log = RecordedLog()
    once = Once(log)
    flood = tuple(f"record {number}" for number in range(5000))
    once.errors("records", flood, noun="rejected records", revision=1)
    assert len(log.events) == MOST_NAMED + 1
    assert log.events[0].startswith("error: record 0 ")
    assert log.events[-1].startswith("error: 4990 more rejected records (5000 in all now); kgctl status shows them")
    log.events.clear()
    once.errors("records", flood, noun="rejected records", revision=2)
    assert log.events == []
    once.errors("records", ("one",), noun="rejected records", revision=3)
    assert [event for event in log.events if event.startswith("error")] == [
        event for event in log.events if event.startswith("error: one ")
    ]
    assert len(log.events) == 1 + MOST_NAMED + 1
    assert log.events[-1].startswith("info: no longer: 4990 more rejected records (1 in all now)")
    log.events.clear()
    once.errors("records", (), noun="rejected records", revision=4)
    assert [event.partition(" {")[0] for event in log.events] == ["info: no longer: one"]


def test_a_flood_in_small_parts_is_a_flood() -> None:
    stream = io.StringIO()
    now = 0.0
    setup_logging("info", stream=stream, monotonic=lambda: now)
    try:
        once = Once(get_logger())
        for part in range(200):
            now = part * 0.025
            once.errors("records", tuple(f"record {number}" for number in range(25 * part)), noun="rejected records")
        for part in range(200, -1, -1):
            now += 0.025
            once.errors("records", tuple(f"record {number}" for number in range(25 * part)), noun="rejected records")
        now += 100
        write_due()
        lines = stream.getvalue().splitlines()
        assert len(lines) < 60
        assert "record 0" in lines[0]
        assert "_like" not in stream.getvalue()
        assert any("no longer: 15 more rejected records (0 in all now)" in line for line in lines[-6:])
    finally:
        structlog.reset_defaults()


def test_of_a_group_what_came_and_what_went_is_said() -> None:
    log = RecordedLog()
    once = Once(log)
    once.errors("records", ("a", "b"), revision=1)
    once.errors("records", ("b", "a"), revision=2)
    once.errors("records", ("b", "c"), level="warning", revision=3)
    once.errors("records", (), revision=4)
    assert log.events == [
        'error: a {"revision": 1}',
        'error: b {"revision": 1}',
        'warning: c {"revision": 3}',
        'info: no longer: a {"revision": 3}',
        'info: no longer: b {"revision": 4}',
        'info: no longer: c {"revision": 4}',
    ]


def test_what_is_said_again_and_again_is_said_less_often_but_the_first_and_the_last_are() -> None:
    out, now = io.StringIO(), 0.0
    setup_logging("debug", stream=out, monotonic=lambda: now)
    log = get_logger()
    for revision in range(1000):
        log.info("applied", revision=revision)
        log.debug("changed", command="x")
    assert out.getvalue().count("applied") == 10
    assert out.getvalue().count("changed") == 1000, "who asks for everything gets everything"
    now = 10.0
    write_due()
    assert out.getvalue().splitlines()[-1].endswith("applied  revision=999 left_out_before=989")
    log.info("applied", revision=1000)
    assert "revision=1000" not in out.getvalue()
    write_rest()
    assert out.getvalue().endswith("applied  revision=1000\n")
