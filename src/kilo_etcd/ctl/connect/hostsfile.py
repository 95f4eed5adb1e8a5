"""Brings a block into /etc/hosts and out of it again.

The file is replaced whole, with its mode and owner, so that nobody ever reads half of it. Where it cannot be replaced
(it is mounted, as in a container) it is written in place. Several at once take turns.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from kilo_etcd.agent.only_one import RUNTIME_DIR
from kilo_etcd.ctl.connect.names import with_block
from kilo_etcd.model import IPAddress

HOSTS = Path("/etc/hosts")


def write_names(
    names: Mapping[str, tuple[IPAddress, ...]] | None,
    interface: str,
    *,
    prefix: str,
    own: str = "",
    path: Path = HOSTS,
    lock_dir: Path = RUNTIME_DIR,
) -> bool:
    """Have the block of `interface` say `names`, or be gone (None). Whether the file was changed. OSError."""
    with _turn(lock_dir):
        try:
            before = path.read_bytes()
        except FileNotFoundError:
            if not names:
                return False
            before = b""
        after = with_block(before, interface, names, prefix=prefix, own=own)
        if after == before:
            return False
        _replace(path, after)
        return True


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / "hosts.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, content: bytes) -> None:
    target = path.resolve()
    aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                if target.exists():
                    status = target.stat()
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
                    shutil.copystat(target, aside)
                    # The time of the copy would say that nothing was written.
                    os.utime(aside)
                os.fsync(file.fileno())
            os.rename(aside, target)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise
    except OSError:
        # EBUSY where the file is a mount, EROFS or EACCES where its directory may not be written: the file itself may.
        with target.open("r+b" if target.exists() else "wb") as file:
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
