"""One agent per host: two would undo each other's work forever, since both know their routes by the same number.

The claim is a lock on a file that the kernel lets go of when its process ends, however it ends. A host is a network
namespace: its number is part of the file's name, since namespaces may share a file system. Where no such file can be
made the agent runs without.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from pathlib import Path

from kilo_etcd.base import descriptors
from kilo_etcd.base.namespaces import network_namespace

RUNTIME_DIR = Path("/run/kilo-etcd")


class AlreadyRunning(Exception):
    """Another one runs here; the message is one sentence for the operator."""


@contextmanager
def agent_lock(directory: Path = RUNTIME_DIR) -> Iterator[None]:
    """Be the only agent of this network namespace while in the block. AlreadyRunning if there is one;
    OutOfDescriptors if that cannot be found out."""
    with exclusive_lock(
        "agent",
        "an agent runs on this host already{}; stop it first, for instance with `systemctl stop kilo-etcd`",
        directory,
    ):
        yield


def connection_lock(kind: str, resource: str, called: str) -> AbstractContextManager[None]:
    """Hold something of a `kind` (interface, mesh, exit-node) that two `kgctl connect` of one machine would fight over;
    `called`: as the sentence of AlreadyRunning names it."""
    refusal = f"another kgctl connect of this machine has {called} already{{}}; end that one first"
    return exclusive_lock(_connection_lock(kind, resource), refusal)


def has_connection_lock(process: int, kind: str, resource: str, directory: Path = RUNTIME_DIR) -> bool:
    """Whether a process holds `connection_lock`. OSError if that cannot be seen."""
    try:
        handle = os.open(_lock_path(_connection_lock(kind, resource), directory), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(handle, 20, 0).decode(errors="replace").strip() == str(process)
    finally:
        os.close(handle)
    return False


def disconnect_lock(interface: str) -> AbstractContextManager[None]:
    """Be the only `kgctl disconnect` of an interface: by a second signal a connection ends at once. AlreadyRunning."""
    return exclusive_lock(
        _connection_lock("disconnect", interface), f"another kgctl disconnect ends {interface} already{{}}; wait for it"
    )


def _connection_lock(kind: str, resource: str) -> str:
    return f"connect-{kind}.{sha256(resource.encode()).hexdigest()[:16]}"


def _lock_path(name: str, directory: Path) -> Path:
    return directory / f"{name}.{network_namespace()}.lock"


@contextmanager
def exclusive_lock(name: str, refusal: str, directory: Path = RUNTIME_DIR) -> Iterator[None]:
    """Hold the lock `name` alone in this network namespace while in the block. AlreadyRunning, with `refusal` as the
    sentence in which `{}` names the process, if another one holds it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(_lock_path(name, directory), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if (short := descriptors.shortage(error)) is not None:
            raise descriptors.OutOfDescriptors(f"it cannot be seen whether another agent runs here: {short}") from None
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode(errors="replace").strip()
            raise AlreadyRunning(refusal.replace("{}", f" (process {owner})" if owner.isdigit() else "")) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
