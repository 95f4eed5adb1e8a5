"""Both programs, their standard output on a full disk (`/dev/full`) or closed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from kilo_etcd.testing.fake_etcd import FakeEtcd

KGCTL = "from kilo_etcd.ctl.entry import main; main()"
KG = "from kilo_etcd.agent.entry import main; main()"
IN_MEMORY = f"""
import kilo_etcd.etcd.client
from contextlib import asynccontextmanager
from {FakeEtcd.__module__} import FakeEtcd

@asynccontextmanager
async def opened(config, **_):
    yield FakeEtcd().client()

kilo_etcd.etcd.client.open_client = opened
{KGCTL}
"""


@pytest.mark.parametrize(
    ("program", "script", "arguments"),
    [
        ("kgctl", KGCTL, ["--help"]),
        ("kgctl", KGCTL, ["--version"]),
        ("kg", KG, ["--help"]),
        ("kgctl", IN_MEMORY, ["peer", "list"]),
        ("kgctl", IN_MEMORY, ["status", "-o", "json"]),
    ],
)
def test_an_output_that_takes_nothing_is_one_sentence(program: str, script: str, arguments: Sequence[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == f"{program}: cannot write to its standard output: No space left on device\n"


FOREIGN = """
from kilo_etcd.base.output import output_must_arrive
with output_must_arrive("kg"):
    print("said")
    with open("/dev/full", "w") as full:
        full.write("lost")
"""
OTHER_ERROR = """
from kilo_etcd.base.output import output_must_arrive
with output_must_arrive("kg"):
    print("said")
    raise RuntimeError("the real one")
"""


def test_the_error_of_another_file_is_not_taken_for_one_of_the_output() -> None:
    done = subprocess.run([sys.executable, "-c", FOREIGN], capture_output=True, text=True, check=False)
    assert "said\n" in done.stdout
    assert "OSError: [Errno 28]" in done.stderr
    assert "cannot write to its standard output" not in done.stderr


def test_another_error_is_not_hidden_by_the_output() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", OTHER_ERROR], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert "RuntimeError: the real one" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"]])
def test_a_pipe_that_nobody_reads_ends_it_in_silence(arguments: Sequence[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", KGCTL, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_output_is_no_traceback() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" --version >&-', sys.executable, KGCTL],
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
