"""A lab leaves nothing behind, however it ends; and it needs no root where the system allows user namespaces."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import kilo_etcd
from helpers import eventually, require
from helpers_packages import copy_requirements
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
    result = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment, command = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"KILO_LAB={name}".encode() in environment or name.encode() in command.split(b"\0"):
            result.append(command.replace(b"\0", b" ").decode())
    return result


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
            process.kill()  # so that nothing waits for it forever
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


def as_nobody(base: Path) -> tuple[list[str], dict[str, str]]:
    """A command that runs this Python as the user nobody, and its environment; both need the directory `base`.

    Others can read neither the checkout nor the Python if they are below a home directory. The packages that the lab
    imports are copied, since their own modes may be as closed as their directories (umask 077). The Python is bound, in
    a mount namespace of the command's own.
    """
    nobody = pwd.getpwnam("nobody")
    require("setpriv", "unshare", "mount")
    packages, python = base / "packages", base / "python"
    shutil.copytree(Path(kilo_etcd.__file__).parent, packages / "kilo_etcd")
    copy_requirements(packages)
    python.mkdir()
    subprocess.run(["chmod", "-R", "a+rX", packages, python], check=True)
    program = python / Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
    bind = 'mount --bind "$0" "$1" && shift && exec "$@"'
    command = [
        *("unshare", "--mount", "sh", "-c", bind, sys.base_prefix, str(python)),
        *("setpriv", "--reuid", str(nobody.pw_uid), "--regid", str(nobody.pw_gid), "--clear-groups", str(program)),
    ]  # fmt: skip
    return command, {
        "PYTHONHOME": str(python),
        "PYTHONPATH": str(packages),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LD_LIBRARY_PATH": str(python / "lib"),  # where a Python with a shared library finds that
    }


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that others may enter, which pytest's are not."""
    base = Path(tempfile.mkdtemp(prefix="kilo-lab-test-"))
    base.chmod(0o755)
    yield base
    shutil.rmtree(base)


async def test_without_root(open_directory: Path) -> None:
    if os.geteuid() == 0:
        command, env = as_nobody(open_directory)
    else:
        command, env = [sys.executable], {"PYTHONPATH": ":".join(filter(None, sys.path))}
    labs = open_directory / "labs"
    labs.mkdir()
    os.chmod(labs, 0o777)
    done = await trio.run_process(
        [*command, "-c", RUN, "rootless"],
        env={**os.environ, **env, VARIABLE: str(labs), "HOME": "/"},
        cwd="/", capture_stdout=True, capture_stderr=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"0\n"
    assert os.listdir(labs) == []
    assert lab_processes("rootless") == []


CHROOT = """
set -e
mount --make-rprivate /
mount -t tmpfs none "$1"
root="$1/root"
mkdir "$root"
if [ "$2" = mounted ]; then mount -t tmpfs none "$root"; fi
for place in /*; do
  if [ -L "$place" ]; then ln -s "$(readlink "$place")" "$root$place"; continue; fi
  [ -d "$place" ] || continue
  mkdir "$root$place"
  case "$place" in
    /proc) if [ "$2" != bare ]; then mount -t proc none "$root/proc"; fi ;;
    *) mount --rbind "$place" "$root$place" ;;
  esac
done
shift 2
exec chroot "$root" "$@"
"""
"""`sh -c CHROOT sh DIRECTORY KIND COMMAND...`: a command in a root like this machine's, in a mount namespace that is
gone with it. KIND: bare (no /proc), plain, or mounted (the chroot is onto a mount)."""


@pytest.mark.parametrize("kind", ["bare", "plain", "mounted"])
def test_in_a_chroot_the_lab_says_what_it_needs(tmp_path: Path, kind: str) -> None:
    require("unshare")
    if os.geteuid():
        pytest.skip("a chroot needs root")
    kgctl = [sys.executable, "-c", "from kilo_etcd.ctl.entry import main; main()", "lab", "run", "three-sites"]
    completed = subprocess.run(
        ["unshare", "--mount", "sh", "-c", CHROOT, "sh", str(tmp_path), kind, *kgctl],
        env={**os.environ, VARIABLE: f"/var/tmp/kilo-lab-{os.getpid()}"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    shutil.rmtree(f"/var/tmp/kilo-lab-{os.getpid()}", ignore_errors=True)
    needs = "the lab needs /proc" if kind == "bare" else "the lab does not run in a chroot: "
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.startswith(f"kgctl: {needs}"), completed.stderr
    assert len(completed.stderr.splitlines()) == 1
