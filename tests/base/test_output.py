"""Both programs, their standard output on a full disk (`/dev/full`) or closed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from kilo_etcd.testing.fake_etcd import FakeEtcd

KGCTL = "from kilo_etcd.ctl.entry import main; main()"
KG = "from kilo_etcd.agent.entry import main; main()"
IN_MEMORY = f"""
import kilo_etcd.etcd
from contextlib import asynccontextmanager
from {FakeEtcd.__module__} import FakeEtcd

@asynccontextmanager
async def opened(config):
    yield FakeEtcd().client()

kilo_etcd.etcd.open_client = opened
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
    assert done.stderr == f"Error: {program} cannot write to its standard output: No space left on device\n"


def test_a_closed_output_is_no_traceback() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" --version >&-', sys.executable, KGCTL],
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
