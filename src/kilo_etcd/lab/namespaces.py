"""Linux namespaces from Python: make them, enter them, spawn a process inside, open a socket inside.

Python has `os.unshare` and `os.setns` from 3.12 on; 3.11 is supported, so libc is called by ctypes. What this
module promises: a spawned process either runs its program or its parent is told in one sentence why not; and
the calling process is in its own namespaces again when a function returns. It refuses to be used from a
process with several threads that fork.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import NoReturn

from attrs import frozen

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(OSError):
    """A namespace could not be made or entered, or a process could not be started in it; says which and why."""


def _checked(result: int, doing: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise NamespaceError(code, f"{doing}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "new namespaces are refused")


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "entering a namespace failed")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None
    )
    _checked(result, f"mounting {kind or source} on {target} failed")


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when its parent thread ends."""
    _checked(_libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl failed")


NEEDS_ROOT_MOUNT = (
    "the lab does not run in a chroot: who enters one of its machines would be in the root outside (setns(2)); run it "
    "outside the chroot, in a virtual machine, or in a container"
)
NEEDS_PROC = "the lab needs /proc: mount -t proc proc /proc"


def check_root() -> None:
    """Whether a lab can be built from this root, as far as can be told without a namespace of one's own.

    NamespaceError with a sentence for the user.
    """
    try:
        with open("/proc/self/mountinfo") as file:
            roots = [line for line in file if line.split(" ", 5)[4] == "/"]
    except OSError:
        raise NamespaceError(errno.ENOENT, NEEDS_PROC) from None
    if not roots:
        raise NamespaceError(errno.EINVAL, NEEDS_ROOT_MOUNT)


def check_entering() -> None:
    """Whether who enters this process's own mount namespace has the root that the process has: in a chroot onto a mount
    nobody has. For a process with a mount namespace of its own. NamespaceError with a sentence for the user."""
    working_directory = os.open(".", os.O_PATH | os.O_CLOEXEC)
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        before = os.stat("/")
        setns(namespace, CLONE_NEWNS)
        if not os.path.samestat(before, os.stat("/")):
            raise NamespaceError(errno.EINVAL, NEEDS_ROOT_MOUNT)
        os.fchdir(working_directory)
    finally:
        os.close(namespace)
        os.close(working_directory)


def enter_lab_namespaces() -> None:
    """Leave the outer world: new mount, PID (for children) and network namespaces, and a user namespace if needed.

    NamespaceError with a sentence for the user when the system allows neither.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWUTS
    try:
        unshare(flags)
    except NamespaceError as refused:
        if refused.errno != errno.EPERM:
            raise
    else:
        return
    try:
        unshare(CLONE_NEWUSER | flags)
        # The kernel wants this before an unprivileged gid_map (user_namespaces(7)).
        with suppress(FileNotFoundError):
            _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")
    except OSError as refused:
        raise NamespaceError(
            refused.errno,
            "the lab needs root, or a system that allows unprivileged user namespaces "
            f"(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns): {refused.strerror}",
        ) from None


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


@frozen
class Namespaces:
    """Open handles to the namespaces of a machine; valid, and keeping them alive, until closed."""

    pid: int
    net: int
    mnt: int
    uts: int

    @classmethod
    def of(cls, pid: int) -> Namespaces:
        """Those in which a process lives."""
        return cls(
            *(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("pid", "net", "mnt", "uts"))
        )

    def enter(self) -> None:
        """Move this process in, except for the PID namespace, which only children can be in."""
        setns(self.net, CLONE_NEWNET)
        setns(self.uts, CLONE_NEWUTS)
        setns(self.mnt, CLONE_NEWNS)

    def close(self) -> None:
        """Let go of them."""
        for fd in (self.pid, self.net, self.mnt, self.uts):
            os.close(fd)


@contextmanager
def inside_network(net: int) -> Iterator[None]:
    """Be in another network namespace for a moment: a socket opened there stays there. No await within."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(net, CLONE_NEWNET)
        try:
            yield
        finally:
            setns(own, CLONE_NEWNET)
    finally:
        os.close(own)


def open_socket(net: int, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket that lives in the network namespace `net`."""
    with inside_network(net):
        return socket.socket(family, kind, protocol)


@contextmanager
def _children_in(pid_namespace: int | None) -> Iterator[None]:
    """Have the children forked meanwhile live in another PID namespace; None makes a new one."""
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if pid_namespace is None:
            unshare(CLONE_NEWPID)
        else:
            setns(pid_namespace, CLONE_NEWPID)
        try:
            yield
        finally:
            setns(own, CLONE_NEWPID)
    finally:
        os.close(own)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    stdio: tuple[int, int, int],
    within: Namespaces | None = None,
    first: Callable[[], None] | None = None,
    cwd: str | None = None,
    terminal: bool = False,
) -> int:
    """Start a program in a session of its own, `within` a machine or here; returns its pid as this process sees it.

    With `first` the child is the first process of a new PID namespace, and calls it before the program.
    `terminal` makes standard input its controlling terminal. A missing `cwd` becomes `/`. Returns after exec,
    so whatever `first` does is done. NamespaceError when the program could not be started.
    """
    reader, writer = os.pipe()
    with _children_in(within.pid) if within else _children_in(None) if first else nullcontext():
        pid = os.fork()
        if pid == 0:
            _become(argv, env, stdio, within, first, cwd, terminal, writer)
    os.close(writer)
    with open(reader, "rb") as answer:
        complaint = answer.read().decode(errors="replace")
    if complaint:
        os.waitpid(pid, 0)
        raise NamespaceError(errno.ENOEXEC, complaint)
    return pid


def _become(
    argv: Sequence[str],
    env: Mapping[str, str],
    stdio: tuple[int, int, int],
    within: Namespaces | None,
    first: Callable[[], None] | None,
    cwd: str | None,
    terminal: bool,
    writer: int,
) -> NoReturn:
    """What the forked child does; never returns, whatever happens."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        # Sources may be among 0 to 2 themselves, so move them out of the way first.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in stdio]
        for target, fd in enumerate(high):
            os.dup2(fd, target)
        if terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if within is not None:
            within.enter()
        if first is not None:
            first()
        try:
            os.chdir(cwd or "/")
        except OSError:
            os.chdir("/")
        os.execvpe(argv[0], list(argv), dict(env))
    except FileNotFoundError:
        os.write(writer, f"{argv[0]} is not installed, or not in PATH".encode())
    except OSError as error:
        os.write(writer, (error.strerror or str(error)).encode())
    except BaseException as error:
        os.write(writer, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(126)
    raise AssertionError
