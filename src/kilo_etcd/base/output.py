"""A standard output that takes nothing, as on a full disk, gets one sentence instead of a traceback; a pipe that nobody
reads any more ends the program in silence."""

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
        except SystemExit:
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        _discard()
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in _REFUSED or error.filename is not None or _takes_something():
            raise  # It is of another file.
        with suppress(OSError):
            print(f"{program}: cannot write to its standard output: {error.strerror}", file=sys.stderr)
        _discard()
        raise SystemExit(1) from None


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _takes_something() -> bool:
    """Whether standard output takes a line feed, which comes before a traceback then."""
    if sys.stdout is None:
        return True
    try:
        return os.write(sys.stdout.fileno(), b"\n") == 1
    except (OSError, ValueError):
        return False


def _discard() -> None:
    """What is left in the buffer would fail once more when the interpreter ends."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
