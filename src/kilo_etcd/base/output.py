"""A standard output that takes nothing, as on a full disk, gets one sentence instead of a traceback. If nobody reads a
pipe any more, click ends the program in silence."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


@contextmanager
def output_must_arrive(program: str) -> Iterator[None]:
    """End the process with status 1 and a sentence on standard error if its standard output cannot be written."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        # An error in opening a file names the file; code that writes files has a sentence of its own.
        if error.errno not in _REFUSED or error.filename is not None:
            raise
        with suppress(OSError):
            print(f"Error: {program} cannot write to its standard output: {error.strerror}", file=sys.stderr)
        with suppress(OSError):  # What is left in the buffer would fail once more when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
