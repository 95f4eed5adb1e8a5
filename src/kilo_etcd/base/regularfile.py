"""Open a file that has to be a regular one. A FIFO or a directory in its place is an error, and no surprise: the one
would block whoever opens it, the other fails only when it is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotRegular(Exception):
    """The path is that of a directory, a FIFO, a socket or a device."""


def open_regular(path: Path, *, follow: bool) -> BinaryIO:
    """Open the file at `path` for reading. `follow`: also if that is a symbolic link. NotRegular; OSError, as of
    os.open."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise NotRegular
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise
