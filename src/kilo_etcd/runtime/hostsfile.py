"""Brings a block into /etc/hosts and out of it again.

The file is replaced whole (written aside, synced, renamed), with its mode, owner and extended attributes, so that
nobody ever reads half of it. It is written in place only if it cannot be replaced: it is a mount of its own, as in a
container, or its directory cannot be written to. Then nothing before our block is touched, room is reserved first, and
what was there is restored if a step fails. After an error the file is as it was before, and the error says so.

Several runs take turns. If another program changes the file meanwhile, it is read again. A symbolic link stays one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from kilo_etcd.model import IPAddress
from kilo_etcd.runtime.hostnames import BY_CONNECT, with_block
from kilo_etcd.runtime.key_file import sync_directory
from kilo_etcd.runtime.lock_file import RUNTIME_DIR

HOSTS = Path("/etc/hosts")

_NOT_REPLACEABLE = frozenset({errno.EBUSY, errno.EXDEV, errno.EROFS, errno.EACCES, errno.EPERM})
"""A mount of its own; a directory that may not be written, or an owner that may not be set, where the file itself may
be written."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_ATTEMPTS = 5


class HostsFileError(OSError):
    """The file could not be written, and is as it was unless the message says otherwise; it is one sentence."""


class _Changed(Exception):
    """Another program has written the file since it was read."""


def write_names(
    names: Mapping[str, tuple[IPAddress, ...]] | None,
    interface: str,
    *,
    prefix: str,
    own: Collection[str] = (),
    by: str = BY_CONNECT,
    path: Path = HOSTS,
    lock_dir: Path = RUNTIME_DIR,
) -> bool:
    """Have the block of `interface` say `names`, or be gone (None). `own` are names of this machine, `by` says in
    the block who writes it. Whether the file was changed. HostsFileError."""
    with _turn(lock_dir):
        for _ in range(_ATTEMPTS):
            try:
                target = Path(os.path.realpath(path))
                before = _read(target)
                after = with_block(before or b"", interface, names, prefix=prefix, own=own, by=by)
                if after == (before or b""):
                    return False
                _write(target, before, after)
            except _Changed:
                continue
            except HostsFileError:
                raise
            except OSError as error:
                failure = HostsFileError(f"{path} is left as it was: {error.strerror or error}")
                failure.errno = error.errno
                raise failure from None
            return True
        raise HostsFileError(f"{path} is left as it was: another program writes it all the time")


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / "hosts.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(target: Path) -> bytes | None:
    """What the file holds; None: there is none."""
    try:
        return target.read_bytes()
    except FileNotFoundError:
        return None


def _write(target: Path, before: bytes | None, after: bytes) -> None:
    try:
        _replace(target, before, after)
    except OSError as error:
        if before is None:
            raise
        if error.errno in _NOT_REPLACEABLE:
            _write_in_place(target, before, after)
        elif error.errno in _NO_ROOM and before.startswith(after):
            # On a full disk our block, at the file's end, can still be taken away.
            _write_in_place(target, before, after)
        else:
            raise


def _replace(target: Path, before: bytes | None, after: bytes) -> None:
    """Put a new file in the place of the old one. OSError, with the old one untouched; _Changed."""
    aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(after)
            file.flush()
            if before is not None:
                status = target.stat()
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
                # Mode, and extended attributes: SELinux's label, access lists.
                shutil.copystat(target, aside)
                # The time of the copy would say that nothing was written.
                os.utime(aside)
            os.fsync(file.fileno())
        if _read(target) != before:
            raise _Changed
        os.rename(aside, target)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    with suppress(OSError):
        sync_directory(target.parent)


def _write_in_place(target: Path, before: bytes, after: bytes) -> None:
    """Make the file's content `after`. OSError, _Changed: it is as it was; HostsFileError: that failed too."""
    handle = os.open(target, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(handle, "r+b", buffering=0) as file:
        if file.read() != before:
            raise _Changed
        # The text before the first difference is not touched: as a rule all that is not ours.
        start = _in_common(before, after)
        try:
            # Blank lines say nothing, should we be killed here; once they are on the disk there is room for the rest.
            _fill(file.fileno(), b"\n" * (len(after) - len(before)), len(before))
            os.fsync(file.fileno())
            _fill(file.fileno(), after[start:], start)
            file.truncate(len(after))
            os.fsync(file.fileno())
            if _content(file.fileno()) != after:
                raise OSError(errno.EIO, "it does not hold what was written")
        except OSError as error:
            try:
                _fill(file.fileno(), before[start:], start)
                file.truncate(len(before))
                os.fsync(file.fileno())
                restored = _content(file.fileno()) == before
            except OSError:
                restored = False
            if restored:
                raise
            raise HostsFileError(
                f"{target} is damaged behind its first {start} bytes, and could not be restored: {error.strerror}"
            ) from None


def _in_common(one: bytes, other: bytes) -> int:
    """How many bytes are the same at the beginning of both."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[:middle] == other[:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _fill(handle: int, data: bytes, start: int) -> None:
    while data:
        written = os.pwrite(handle, data, start)
        data, start = data[written:], start + written


def _content(handle: int) -> bytes:
    return os.pread(handle, os.fstat(handle).st_size + 1, 0)
