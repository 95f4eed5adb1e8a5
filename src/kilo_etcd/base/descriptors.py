"""File descriptors that run short: which errors mean that, and the sentence for the operator.

A process without a free descriptor cannot open a file, a socket or a netlink connection. The error then says nothing of
what it was about to open: not that a file is missing, a device is somebody else's, or a port is taken. Code that turns
an OSError into a sentence or into a "no" calls `shortage` first.
"""

from __future__ import annotations

import errno
import os
import resource

RESERVE = 32
"""Descriptors that are kept for etcd, netlink and WireGuard: a server takes none of the last ones."""

_NUMBERS = frozenset({errno.EMFILE, errno.ENFILE})


class OutOfDescriptors(Exception):
    """Something could not be opened for want of a descriptor; the message is one sentence for the operator."""


def limit() -> int:
    """How many descriptors this process may have open (RLIMIT_NOFILE, soft)."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def is_shortage(error: BaseException) -> bool:
    """Whether this OSError says that no descriptor was free."""
    return isinstance(error, OSError) and error.errno in _NUMBERS


def shortage(error: BaseException) -> str | None:
    """What to say where `error` means that no descriptor was free, as a clause; None: it means something else."""
    if not is_shortage(error):
        return None
    assert isinstance(error, OSError)
    if error.errno == errno.ENFILE:
        return (
            "this host has no file descriptor left: see /proc/sys/fs/file-nr, end what holds them or raise fs.file-max"
        )
    return (
        f"this process has no file descriptor left (it may have {limit()}): see what holds them with "
        f"`ls -l /proc/{os.getpid()}/fd`, and raise LimitNOFILE= in the unit (ulimit -n)"
    )


def exhausted() -> str | None:
    """The same clause if nothing can be opened right now; for errors that do not tell, such as a name server's."""
    try:
        os.close(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return shortage(error)
    return None


def running_short() -> str | None:
    """A sentence if no more than `RESERVE` descriptors are free."""
    try:
        # One of them is the listing's own.
        used = len(os.listdir("/proc/self/fd")) - 1
    except OSError as error:
        return shortage(error)
    if used <= limit() - RESERVE:
        return None
    return (
        f"file descriptors run short: {used} of {limit()} are open; see what holds them with "
        f"`ls -l /proc/{os.getpid()}/fd`, and raise LimitNOFILE= in the unit (ulimit -n)"
    )
