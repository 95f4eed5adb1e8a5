"""The only trace of a lab outside its namespaces: a directory with its control socket, found by its name.

All of it lies in `kilo-lab`, a subdirectory of this user's own, whatever directory the user names. The directory of a
lab is locked by the process that runs the lab; the kernel lets go of the lock however that process ends, so a lab whose
lock can be had has ended, and the next run removes what it left: its two files, if the lock file bears our mark, and
then the directory, if it is empty. Nothing else is ever removed, and no symbolic link is followed.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum, auto
from pathlib import Path

from attrs import frozen

VARIABLE = "KILO_LAB_RUNTIME_DIR"
NAME_VARIABLE = "KILO_LAB"
SUBDIRECTORY = "kilo-lab"
"""Ours, below the directory that VARIABLE names."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
_MARK = re.compile(rb"kilo-lab [0-9]+\n")
"""What a lock file of ours holds: its program and process."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LabError(Exception):
    """Something about a lab went wrong; the message is one sentence for a person."""


def base_directory() -> Path:
    """Where the running labs of this user are found."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen, SUBDIRECTORY)
    if (user := os.environ.get("XDG_RUNTIME_DIR")) and os.access(user, os.W_OK):
        return Path(user, SUBDIRECTORY)
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run", SUBDIRECTORY)
    return Path(f"/tmp/{SUBDIRECTORY}-{os.geteuid()}")


def socket_path(name: str) -> Path:
    """The control socket of a lab."""
    return base_directory() / name / "control"


def running_labs() -> list[str]:
    """The names of the labs that run now. LabError if their directory is another user's."""
    try:
        base = _open_base(base_directory())
    except FileNotFoundError:
        return []
    try:
        return sorted(name for name in os.listdir(base) if _look(base, name) is _State.RUNNING)
    finally:
        os.close(base)


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
    with ExitStack() as stack:

        def kept(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        with _locked(base) as fd:
            for entry in os.listdir(fd):
                if _look(fd, entry) is _State.ENDED:
                    _remove(fd, entry)
            # A descriptor of its own, since the lock belongs to the other one.
            own = kept(os.open(".", _DIRECTORY, dir_fd=fd))
            place = kept(_take(base, fd, name))
            lock = kept(os.open("lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=place))
            stack.callback(_leave, base, own, name)
            os.write(lock, f"kilo-lab {os.getpid()}\n".encode())
            fcntl.flock(lock, fcntl.LOCK_EX)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            # Socket addresses are limited to 108 bytes; the directory's handle is always short.
            listener.bind(f"/proc/self/fd/{place}/control")
            listener.listen(128)
            yield Runtime(name, base / name, listener)


def _take(base: Path, fd: int, name: str) -> int:
    """A directory of this name, empty and open. LabError when there is another one."""
    with suppress(FileExistsError):
        os.mkdir(name, mode=0o700, dir_fd=fd)
    if _look(fd, name) is _State.RUNNING:
        raise LabError(f"a lab called {name!r} is running already; choose another --name, or stop that one")
    foreign = LabError(f"{base / name} is not the directory of a lab; move it away, or choose another --name")
    try:
        place = os.open(name, _DIRECTORY, dir_fd=fd)
    except OSError:
        raise foreign from None
    # A run that was killed as it began has left an empty one.
    if os.listdir(place) or os.fstat(place).st_uid != os.geteuid():
        os.close(place)
        raise foreign
    return place


def _leave(base: Path, fd: int, name: str) -> None:
    """Remove our own directory, and the base directory if nothing else is in it."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    _remove(fd, name)
    with suppress(OSError):
        if os.path.samestat(os.fstat(fd), os.lstat(base)):
            os.rmdir(base)


@contextmanager
def _locked(base: Path) -> Iterator[int]:
    """Hold the base directory, open and made if missing, against other runs that start or clean up now. LabError."""
    while True:
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            # Another run may have removed it at this very moment. Where a directory above it is a link that leads
            # nowhere, the error is the same, and stays.
            above = base.parent.is_dir() and not os.path.lexists(base)
            if isinstance(error, FileExistsError) and (base.is_dir() or above):
                continue
            raise _unfit(base, f"cannot be made: {error.strerror}") from None
        try:
            fd = _open_base(base)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # A lab that ended meanwhile removes the directory when it was the last.
            try:
                same_directory = os.path.samestat(os.fstat(fd), os.stat(base))
            except FileNotFoundError:
                same_directory = False
            if same_directory:
                yield fd
                return
        finally:
            os.close(fd)


def _open_base(base: Path) -> int:
    """The base directory, opened. FileNotFoundError; LabError if anybody else could put something there."""
    try:
        fd = os.open(base, _DIRECTORY)
    except FileNotFoundError:
        raise
    except OSError as error:
        linked = "is a symbolic link" if base.is_symlink() else f"cannot be opened: {error.strerror}"
        raise _unfit(base, linked) from None
    status = os.fstat(fd)
    if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return fd
    os.close(fd)
    raise _unfit(base, "can be written to by others" if status.st_uid == os.geteuid() else "belongs to another user")


def _unfit(base: Path, why: str) -> LabError:
    return LabError(f"{base} {why}; set {VARIABLE} to a directory of your own")


class _State(Enum):
    """What an entry of the base directory is."""

    RUNNING = auto()
    ENDED = auto()
    FOREIGN = auto()
    """Nothing that a lab has made, or not all of it."""


def _look(base: int, name: str) -> _State:
    try:
        place = os.open(name, _DIRECTORY, dir_fd=base)
    except OSError:
        return _State.FOREIGN
    try:
        # O_NONBLOCK: a FIFO in the file's place must not hang us.
        lock = os.open("lock", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
    except OSError:
        return _State.FOREIGN
    finally:
        os.close(place)
    try:
        status = os.fstat(lock)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or not _MARK.fullmatch(os.pread(lock, 64, 0)):
            return _State.FOREIGN
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _State.RUNNING
    else:
        return _State.ENDED
    finally:
        os.close(lock)


def _remove(base: int, name: str) -> None:
    """Remove what a lab makes in its directory, and the directory if that was all."""
    with suppress(OSError):
        place = os.open(name, _DIRECTORY, dir_fd=base)
        try:
            for own in ("control", "lock"):
                with suppress(FileNotFoundError):
                    os.unlink(own, dir_fd=place)
        finally:
            os.close(place)
        os.rmdir(name, dir_fd=base)
