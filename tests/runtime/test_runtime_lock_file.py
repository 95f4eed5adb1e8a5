"""One agent per host, told apart by a lock that ends with its process; and the pace of repairs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kilo_etcd.base.backoff import RepairBackoff
from kilo_etcd.runtime.lock_file import AlreadyRunning, agent_lock

HOLD = (
    "import sys, pathlib, time\n"
    "from kilo_etcd.runtime.lock_file import agent_lock\n"
    "with agent_lock(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)


def test_a_second_agent_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(AlreadyRunning, match=rf"\(process {first.pid}\); stop it first"), agent_lock(tmp_path):
            pass
        first.kill()
    with agent_lock(tmp_path):
        pass


def test_what_the_agent_starts_does_not_hold_its_place(tmp_path: Path) -> None:
    with agent_lock(tmp_path):
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    with child:
        with agent_lock(tmp_path):
            pass
        child.communicate()


def test_where_no_lock_can_be_made_the_agent_runs_without(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with agent_lock(in_the_way / "below"):
        assert os.listdir(tmp_path) == ["file"]


def test_repairs_are_made_at_once_then_ever_less_often_and_at_once_again_after_a_quiet_time() -> None:
    backoff = RepairBackoff()
    now = 100.0
    assert [backoff.pause(now) for _ in range(backoff.burst)] == [0.0] * backoff.burst
    pauses = []
    for _ in range(30):
        pauses.append(backoff.pause(now))
        now += pauses[-1]
    assert pauses[:3] == [0.5, 1.0, 2.0]
    assert pauses[-1] == backoff.longest
    assert backoff.pause(now + backoff.quiet + 1) == 0.0
