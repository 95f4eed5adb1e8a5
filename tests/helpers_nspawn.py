"""Hosts with systemd as process 1, on one network, in containers of systemd-nspawn.

Each has this machine's own root under an overlay in memory, without its enabled services, so that nothing is fetched
and nothing of this machine is written to.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest
from attrs import frozen

from helpers import require

NETWORK = "203.0.113"
_BOOT_SECONDS = 120.0
_OWN = ("etc/systemd/system", "etc/kilo-etcd", "opt/kilo-etcd", "var/lib/kilo-etcd", "var/lib/etcd/default", "run")
"""Directories that a host does not take over from this machine."""


@frozen
class Host:
    """A booted container; `process` is its systemd as this machine sees it."""

    name: str
    address: str
    process: int
    root: Path

    def run(self, script: str, *, check: bool = True, cwd: str = "/") -> subprocess.CompletedProcess[str]:
        """A shell script there, which ends at the first command that fails."""
        command = ["nsenter", "--target", str(self.process), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [*command, "bash", "-ec", f"cd {shlex.quote(cwd)}\n{script}"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        if check and done.returncode:
            pytest.fail(f"on {self.name}, exit status {done.returncode}:\n{script}\n{done.stdout}{done.stderr}")
        return done


def wait(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Until it holds; else the test fails with what `what` says."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds} s: {what()}")
        time.sleep(0.1)


@contextmanager
def hosts(names: tuple[str, ...], scratch: Path, visible: Iterable[Path]) -> Iterator[tuple[Host, ...]]:
    """Hosts at the first addresses of a network of their own, with a default route that leads nowhere. `visible`:
    directories of this machine that they see too, wherever these are mounted."""
    require("systemd-nspawn", "nsenter", "unshare", "ip", "mount")
    with ExitStack() as stack:
        network = stack.enter_context(
            _process(("unshare", "--net", "--mount", "--propagation", "private", "sleep", "inf"))
        )
        inside = ("nsenter", "--target", str(network.pid), "--net", "--mount")
        # When it runs its program its namespaces are its own, and private.
        wait(lambda: Path(f"/proc/{network.pid}/comm").read_text() == "sleep\n", 30, lambda: "unshare")
        _run(
            *inside,
            "sh",
            "-ec",
            f"""
            [ -e /sys/fs/cgroup/cgroup.controllers ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup
            mount -t tmpfs tmpfs {shlex.quote(str(scratch))}
            ip link add br0 type bridge && ip address add {NETWORK}.254/24 dev br0 && ip link set br0 up""",
        )
        booting = [stack.enter_context(_booting(inside, name, scratch, visible)) for name in names]
        yield tuple(
            _booted(process, name, f"{NETWORK}.{number}", log)
            for number, (name, (process, log)) in enumerate(zip(names, booting, strict=True), 1)
        )


@contextmanager
def _booting(
    inside: tuple[str, ...], name: str, scratch: Path, visible: Iterable[Path]
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:  # fmt: skip
    home = scratch / name
    root = home / "root"
    removed = " ".join(shlex.quote(f"{root}/{path}") for path in _OWN)
    # A mount namespace of each container's own: the overlay goes with it.
    _run(
        *inside,
        "sh",
        "-ec",
        f"""
        mkdir -p {home}/upper {home}/work {root}
        mount -t overlay overlay -o lowerdir=/,upperdir={home}/upper,workdir={home}/work {root}
        rm -rf {removed} {root}/etc/machine-id
        mkdir -p {root}/run {root}/etc/systemd/system {root}/etc/kilo-etcd
        echo {name} > {root}/etc/hostname""",
    )
    log = scratch.parent / f"{name}.log"
    command = (
        *inside, "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--settings=no", "--console=pipe",
        f"--directory={root}", f"--machine={name}", f"--hostname={name}", "--network-bridge=br0",
        "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--capability=CAP_NET_ADMIN",
        "--bind=/dev/net/tun", *(f"--bind-ro={path}" for path in visible), "--boot",
    )  # fmt: skip
    with log.open("wb") as output, _process(command, output) as process:
        yield process, log


def _booted(process: subprocess.Popen[bytes], name: str, address: str, log: Path) -> Host:
    def init() -> int:
        if process.poll() is not None:
            pytest.fail(f"systemd-nspawn ended with {process.returncode}:\n{log.read_text(errors='replace')}")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return next((int(child) for child in children if _is_systemd(Path(f"/proc/{child}"))), 0)

    wait(init, _BOOT_SECONDS, lambda: f"{name} has no process 1:\n{log.read_text(errors='replace')}")
    host = Host(name, address, init(), Path(f"/proc/{init()}/root"))

    def state() -> str:
        done = host.run("systemctl is-system-running 2>&1", check=False)
        return (done.stdout + done.stderr).strip()

    def why() -> str:
        jobs = host.run("systemctl list-jobs --no-pager 2>&1; journalctl -b -n 20 --no-pager 2>&1", check=False).stdout
        return f"{name} is {state()}\n{jobs}{log.read_text(errors='replace')}"

    wait(lambda: state() in ("running", "degraded"), _BOOT_SECONDS, why)
    host.run(f"ip address add {address}/24 dev host0; ip link set host0 up; ip link set lo up; "
             f"ip route add default via {NETWORK}.254")  # fmt: skip
    return host


def _is_systemd(process: Path) -> bool:
    """Whether it is process 1 of a container, and runs systemd. The first child that systemd-nspawn has is another one,
    which makes it and ends; on a busy machine that is seen."""
    try:
        numbers = re.search(r"^NSpid:(.*)$", (process / "status").read_text(), re.MULTILINE)
        return numbers is not None and numbers[1].split()[1:] == ["1"] and (process / "comm").read_text() == "systemd\n"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def _process(command: tuple[str, ...], output: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process, and no longer than the block. systemd-nspawn ends its container at SIGTERM."""
    program = shutil.which(command[0])
    assert program is not None
    process = subprocess.Popen([program, *command[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
