"""One machine of the lab: its namespaces, its furniture (hostname, /etc/hosts, /run, state), its processes.

A machine is a PID, network, mount and UTS namespace held by a sleeping first process. Killing that process is
the power switch: the kernel ends everything inside at once. Orphans are reaped because the first process
ignores SIGCHLD. What a machine keeps over a power cycle is its state directory alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import trio
from attrs import define, field

from kilo_etcd.lab import namespaces
from kilo_etcd.lab.namespaces import NamespaceError, Namespaces
from kilo_etcd.model import IPAddress

BASE = "/run/kilo-lab"
"""The lab's own tmpfs, at the same place in the lab's namespace and in every machine."""
STATE_DIR = "/var/lib/kilo-etcd"
_SIOCGIFADDR = 0x8915


@define(eq=False)
class Process:
    """A child of the world; `ended` is set, and `status` known, when it has been reaped."""

    pid: int
    ended: trio.Event = field(factory=trio.Event)
    status: int | None = None
    """Exit status; minus the signal's number when killed."""
    frozen: bool = False

    @property
    def alive(self) -> bool:
        """Whether it has not been reaped yet."""
        return self.status is None

    async def mind(self) -> None:
        """Wait for its end. Exactly one task runs this."""
        fd = os.pidfd_open(self.pid)
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
        _, status = os.waitpid(self.pid, 0)  # noqa: ASYNC222 (it has ended)
        self.status = os.waitstatus_to_exitcode(status)
        self.ended.set()

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal, if it still lives."""
        if self.alive:
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.pid, number)

    @property
    def description(self) -> str:
        """For people: `running`, `frozen`, `exited with status 1`, `killed by SIGKILL`."""
        if self.status is None:
            return "frozen" if self.frozen else "running"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        return f"exited with status {self.status}"


@define(eq=False)
class Machine:
    """A machine that is powered on."""

    name: str
    first: Process
    namespaces: Namespaces
    environment: Mapping[str, str]
    closers: list[socket.socket | trio.socket.SocketType] = field(factory=list)
    """Sockets of the world that live in the machine's network, which would keep it alive."""

    @classmethod
    def boot(
        cls,
        name: str,
        nursery: trio.Nursery,
        *,
        environment: Mapping[str, str],
        hosts_file: str,
        sysctls: Mapping[str, str],
    ) -> Machine:
        """Make the namespaces and furnish them. NamespaceError says what the system refused."""
        home = home_of(name)
        for directory in ("state", "run"):
            (home / directory).mkdir(parents=True, exist_ok=True)
        hostname = name.rpartition(":")[2] if name.startswith("etcd:") else name.replace(":", "-")
        (home / "hostname").write_text(f"{hostname}\n")
        (home / "hosts").write_text(hosts_file)
        (home / "resolv.conf").write_text("# There is no DNS in the lab.\n")
        with open(os.devnull, "r+b") as null:
            stdio = (null.fileno(),) * 3
            pid = namespaces.spawn(
                ["sleep", "infinity"],
                env=environment,
                stdio=stdio,
                first=lambda: _furnish(home, hostname, sysctls),
            )
        first = Process(pid)
        nursery.start_soon(first.mind)
        return cls(name, first, Namespaces.of(pid), environment)

    def spawn(
        self,
        nursery: trio.Nursery,
        argv: Sequence[str],
        stdio: tuple[int, int, int],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: str | None = None,
        terminal: bool = False,
    ) -> Process:
        """Start a program inside, in a session of its own. A variable that is None in `env` is left out."""
        merged = {key: value for key, value in {**self.environment, **(env or {})}.items() if value is not None}
        process = Process(
            namespaces.spawn(argv, env=merged, stdio=stdio, within=self.namespaces, cwd=cwd, terminal=terminal)
        )
        nursery.start_soon(process.mind)
        return process

    async def run(self, nursery: trio.Nursery, argv: Sequence[str], stdin: str = "", *, cwd: str | None = None) -> str:
        """Run a program to its end with `stdin` on standard input; what it printed. NamespaceError if it failed."""
        return await run_program(
            lambda stdio: self.spawn(nursery, argv, stdio, cwd=cwd), f"{argv[0]} in {self.name}", stdin
        )

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket in the machine's network, closed when the machine is powered off."""
        opened = namespaces.open_socket(self.namespaces.net, family, kind, protocol)
        self.closers.append(opened)
        return opened

    def interface_addresses(self, interface: str) -> tuple[IPAddress, ...]:
        """An interface's first IPv4 and first global IPv6 address; asks the kernel, spawns nothing."""
        addresses: list[IPAddress] = []
        with namespaces.open_socket(self.namespaces.net, socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("16s240x", interface.encode()))
            addresses.append(IPv4Address(answer[20:24]))
        with suppress(OSError):
            for line in Path(f"/proc/{self.first.pid}/net/if_inet6").read_text().splitlines():
                digits, _, _, scope, _, name = line.split()
                if name == interface and scope == "00":
                    addresses.append(IPv6Address(int(digits, 16)))
                    break
        return tuple(addresses)

    async def power_off(self) -> None:
        """Kill everything inside, at once, and let go of the namespaces."""
        self.first.signal(signal.SIGKILL)
        for closer in self.closers:
            closer.close()
        self.closers.clear()
        await self.first.ended.wait()
        self.namespaces.close()


def home_of(name: str) -> Path:
    """Where the lab keeps a machine's files."""
    return Path(BASE, "machines", re.sub(r"[^a-z0-9-]", "-", name))


async def run_program(start: Callable[[tuple[int, int, int]], Process], called: str, stdin: str = "") -> str:
    """Run a program to its end with `stdin` on standard input; what it printed. NamespaceError if it failed."""
    source, target = _scratch(stdin.encode()), _scratch(b"")
    try:
        process = start((source, target, target))
        await process.ended.wait()
        os.lseek(target, 0, os.SEEK_SET)
        printed = b"".join(iter(lambda: os.read(target, 65536), b"")).decode(errors="replace")
    finally:
        os.close(source)
        os.close(target)
    if process.status:
        raise NamespaceError(0, f"{called} failed: {' '.join(printed.split())[-400:]}")
    return printed


def _scratch(content: bytes) -> int:
    fd = os.memfd_create("scratch", os.MFD_CLOEXEC)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def set_sysctl(path: Path, value: str) -> None:
    """Write a setting of the kernel. OSError, as a sentence."""
    try:
        path.write_text(value)
    except OSError as error:
        text = (
            f"{path} cannot be written ({error.strerror}): in a container the lab needs all capabilities, as with "
            "systemd-nspawn --capability=all"
        )
        raise OSError(error.errno, text) from None


def _furnish(home: Path, hostname: str, sysctls: Mapping[str, str]) -> None:
    """Runs in the machine's first process, before it falls asleep."""
    namespaces.unshare(namespaces.CLONE_NEWNET | namespaces.CLONE_NEWNS | namespaces.CLONE_NEWUTS)
    namespaces.mount("none", "/", flags=namespaces.MS_REC | namespaces.MS_PRIVATE)
    socket.sethostname(hostname)
    for key, value in sysctls.items():
        path = Path("/proc/sys/net", key)
        # A kernel without IPv6 has no such settings and needs none.
        if path.exists():
            set_sysctl(path, value)
    for name in ("hostname", "hosts", "resolv.conf"):
        # What is missing outside (or leads below the hidden /run) cannot be mounted over, and need not be.
        if os.path.exists(f"/etc/{name}"):
            with suppress(OSError):
                namespaces.mount(str(home / name), os.path.realpath(f"/etc/{name}"), flags=namespaces.MS_BIND)
    namespaces.mount(str(home / "state"), STATE_DIR, flags=namespaces.MS_BIND)
    run = str(home / "run")
    namespaces.mount("tmpfs", run, "tmpfs", namespaces.MS_NOSUID | namespaces.MS_NODEV, "mode=755")
    os.mkdir(f"{run}{BASE.removeprefix('/run')}")
    # A bind mount does not bring along what is mounted below.
    for below in ("", "/control", "/hidden"):
        if os.path.isdir(BASE + below):
            flags = namespaces.MS_BIND | (namespaces.MS_REC if below else 0)
            namespaces.mount(BASE + below, f"{run}{BASE.removeprefix('/run')}{below}", flags=flags)
    namespaces.mount(run, "/run", flags=namespaces.MS_MOVE)
    for kind, target in (("proc", "/proc"), ("sysfs", "/sys")):
        # Some containers forbid it; then the outer one stays, which shows more than it should but works.
        with suppress(OSError):
            namespaces.mount(kind, target, kind, namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
