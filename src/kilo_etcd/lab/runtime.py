"""The only trace of a lab outside its namespaces: a directory with its control socket, found by its name.

The directory is locked by the process that runs the lab; the kernel lets go of the lock however that process
ends, so a directory that can be locked is a leftover, and the next run removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import frozen

VARIABLE = "KILO_LAB_RUNTIME_DIR"
NAME_VARIABLE = "KILO_LAB"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


class LabError(Exception):
    """Something about a lab went wrong; the message is one sentence for a person."""


def base_directory() -> Path:
    """Where the running labs of this user are found."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    if (user := os.environ.get("XDG_RUNTIME_DIR")) and os.access(user, os.W_OK):
        return Path(user, "kilo-lab")
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/kilo-lab")
    return Path(f"/tmp/kilo-lab-{os.geteuid()}")


def socket_path(name: str) -> Path:
    """The control socket of a lab."""
    return base_directory() / name / "control"


def running_labs() -> list[str]:
    """The names of the labs that run now."""
    base = base_directory()
    if not base.is_dir():
        return []
    return sorted(path.name for path in base.iterdir() if (path / "control").exists() and not _abandoned(path))


def choose_lab(name: str | None) -> str:
    """The lab that a command is meant for: the named one, or the only one. LabError otherwise."""
    running = running_labs()
    name = name or os.environ.get(NAME_VARIABLE)
    if name:
        if name not in running:
            raise LabError(f"no lab called {name!r} is running; start one with: kgctl lab run --name {name}")
        return name
    if not running:
        raise LabError("no lab is running; start one with: kgctl lab run")
    if len(running) > 1:
        raise LabError(f"several labs are running ({', '.join(running)}); say which with --name")
    return running[0]


@frozen
class Runtime:
    """A lab's directory while this process holds it."""

    name: str
    directory: Path
    listener: socket.socket


@contextmanager
def hold(name: str) -> Iterator[Runtime]:
    """Take a name, with a listening control socket; leftovers of dead labs go. LabError when the name is in use."""
    if not _NAME.fullmatch(name):
        raise LabError(f"{name!r} cannot be a lab's name: use letters, digits, dots and dashes")
    base = base_directory()
    with _locked(base):
        for path in base.iterdir():
            if path.is_dir() and _abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        directory = base / name
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            raise LabError(
                f"a lab called {name!r} is running already; choose another --name, or stop that one"
            ) from None
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, f"{os.getpid()}\n".encode())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            # Socket addresses are limited to 108 bytes; the directory's handle is always short.
            handle = os.open(directory, os.O_PATH | os.O_CLOEXEC)
            try:
                listener.bind(f"/proc/self/fd/{handle}/control")
            finally:
                os.close(handle)
            listener.listen(128)
            yield Runtime(name, directory, listener)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
        with suppress(OSError):
            base.rmdir()


@contextmanager
def _locked(base: Path) -> Iterator[None]:
    """Hold the base directory, made if missing, against other runs that start or clean up now."""
    while True:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                raise LabError(f"{base} belongs to another user; set {VARIABLE} to a directory of your own")
            fcntl.flock(fd, fcntl.LOCK_EX)
            # A lab that ended meanwhile removes the directory when it was the last.
            if base.exists() and os.path.samestat(os.fstat(fd), os.stat(base)):
                yield
                return
        finally:
            os.close(fd)


def _abandoned(directory: Path) -> bool:
    try:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
