"""A lab leaves nothing behind, however it ends; and it needs no root where the system allows user namespaces."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from helpers import eventually, require
from kilo_etcd.lab import Spec, running_lab, running_labs
from kilo_etcd.lab.runtime import VARIABLE

pytestmark = [pytest.mark.lab]

SMALL = Spec.simple({"a": 2, "b": 2}, agents=True, agent_command=("sh", "-c", "exec sleep infinity"))

RUN = """
import sys, trio
from kilo_etcd.lab import Spec, running_lab
async def main():
    spec = Spec.simple({"a": 2, "b": 2}, agents=True, agent_command=("sh", "-c", "exec sleep infinity"))
    async with running_lab(spec, sys.argv[1]) as lab:
        assert await lab.ping("a-2", "10.101.0.11")
        print((await lab.exec("a-1", "id", "-u", check=True)).stdout.strip(), flush=True)
        if sys.argv[2:]:
            await trio.sleep_forever()
trio.run(main)
"""


@pytest.fixture(autouse=True)
def _needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require("etcd", "etcdctl", "ip", "nft")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "labs"))
    yield
    assert not (tmp_path / "labs").exists() or not list((tmp_path / "labs").iterdir())


def traces() -> dict[str, set[str]]:
    """What a lab could leave behind, as seen from outside."""
    printed = {
        name: subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for name, command in {"netns": ["ip", "netns"], "links": ["ip", "-o", "link"]}.items()
    }
    found = {name: set(text.splitlines()) for name, text in printed.items()}
    found["mounts"] = set(Path("/proc/mounts").read_text().splitlines())
    return found


def lab_processes(name: str) -> list[str]:
    """Command lines of processes that belong to the lab called `name` (its name is in their environment)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment, command = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"KILO_LAB={name}".encode() in environment or name.encode() in command.split(b"\0"):
            found.append(command.replace(b"\0", b" ").decode())
    return found


async def test_a_lab_that_ends_leaves_nothing() -> None:
    before = traces()
    name = f"left-{os.getpid()}"
    async with running_lab(SMALL, name):
        # Each of 4 hosts, 2 routers, etcd, the operator and the internet has processes; none is visible by name only.
        assert len(lab_processes(name)) >= 9
        assert traces()["links"] == before["links"]
    assert lab_processes(name) == []
    assert traces() == before
    assert running_labs() == []


async def test_a_lab_that_fails_inside_leaves_nothing() -> None:
    name = f"fails-{os.getpid()}"
    with pytest.raises(RuntimeError, match="in the block"):
        async with running_lab(SMALL, name):
            raise RuntimeError("in the block")
    assert lab_processes(name) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_a_lab_whose_process_is_signalled_leaves_nothing(number: signal.Signals) -> None:
    before = traces()
    name = f"signal-{os.getpid()}-{int(number)}"
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", RUN, name, "stay"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"0\n"
            assert running_labs() == [name]
            process.send_signal(number)
            await eventually(lambda: process.poll() is not None)
        finally:
            process.kill()  # so that nothing waits for it for ever
    await eventually(lambda: not lab_processes(name), what="no process of the lab lives")
    assert traces() == before
    assert running_labs() == []
    # What a killed one could not take away is a directory; the next run with the same name does.
    async with running_lab(SMALL, name) as lab:
        assert (await lab.exec("a-1", "true")).returncode == 0


async def test_kgctl_lab_run_gives_the_status_of_its_command(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text('agents = false\n[[site]]\nname = "a"\nhosts = 1\n[[site]]\nname = "b"\nhosts = 1\n')
    kgctl = [sys.executable, "-m", "kilo_etcd.ctl.main", "lab"]
    command = "echo $KILO_LAB_MACHINE; etcdctl get x && kgctl lab exec a-1 hostname; exit 5"
    done = await trio.run_process(
        [*kgctl, "run", str(file), "--name", "status", "--command", command],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == (b"operator\na-1\n", 5), done.stderr
    done = await trio.run_process([*kgctl, "status"], capture_stderr=True, check=False)
    assert (done.stderr, done.returncode) == (b"kgctl: no lab is running; start one with: kgctl lab run\n", 1)
    file.write_text("colour = 3\n")
    done = await trio.run_process([*kgctl, "run", str(file)], capture_stderr=True, check=False)
    assert (done.stderr, done.returncode) == (f"kgctl: {file}: site is missing\n".encode(), 1)


def interpreter_for_nobody() -> str:
    """A Python of this version that a user without rights may run."""
    for candidate in (
        sys.executable,
        shutil.which(f"python3.{sys.version_info.minor}", path="/usr/local/bin:/usr/bin"),
    ):
        if candidate is None:
            continue
        path = Path(candidate).resolve()
        if all(parent.stat().st_mode & stat.S_IXOTH for parent in [path, *path.parents]):
            return candidate
    pytest.fail("needs a Python that every user may run: apt-get install python3", pytrace=False)


def open_directory() -> Path:
    base = Path(tempfile.mkdtemp(prefix="kilo-lab-test-"))
    base.chmod(0o777)
    return base


async def test_without_root() -> None:
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        require("setpriv")
        prefix = ["setpriv", "--reuid", str(nobody.pw_uid), "--regid", str(nobody.pw_gid), "--clear-groups"]
        python = interpreter_for_nobody()
    else:
        prefix, python = [], sys.executable
    # pytest's directories are closed to others.
    base = open_directory()
    env = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), VARIABLE: str(base), "HOME": "/"}
    try:
        done = await trio.run_process(
            [*prefix, python, "-c", RUN, "rootless"], env=env, capture_stdout=True, capture_stderr=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout == b"0\n"
        assert os.listdir(base) == []
    finally:
        shutil.rmtree(base)
    assert lab_processes("rootless") == []
