"""Where `kg` begins, and what keeps it small: a daemon on every host pays for each MiB once per host.

structlog draws tracebacks with rich wherever it finds it, and importing that costs a daemon that never draws 3 MiB and
0.1 s; so rich is not to be found in this process. It stays `kgctl`'s. structlog also imports asyncio, for methods that
nobody calls in a trio program: 1.5 MiB and 7 ms; it finds an empty module of that name. prometheus_client imports HTTP
servers and clients, which are not used either: 2.6 MiB. protobuf imports its implementation in Python also where that
in C is in use: 1.3 MiB and 8 ms. And glibc gives each thread a heap of its own to allocate from, which is for threads
that compete; the agent's two seldom run, and share the first: 1 MiB. What is large and short-lived, as the records of a
whole mesh are, glibc soon takes from the heap too, where it leaves holes; it is to be mapped and given back: 0.3 to 1.3
MiB at 1,000 nodes. What is imported stays: until all is there (`agent.main`) the collector of cyclic garbage looks at
each new object once, not again and again.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import NoReturn, cast

M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3
"""<malloc.h>"""
LARGE = 128 * 1024
"""Bytes; glibc's own at first, which grows to 32 MiB by itself."""
OBJECTS_BETWEEN_LOOKS, NEVER = 5_000, 1_000_000
"""Thresholds of the collector: of objects, and of its looks at the new ones until it looks at older ones."""
PAUSE_SECONDS = 10.0
"""As `agent.main.PAUSE_SECONDS`, which may be what cannot be loaded."""
_EMPTY = {
    "asyncio": (),
    "http.server": ("BaseHTTPRequestHandler",),
    "urllib.request": (
        "BaseHandler", "HTTPHandler", "HTTPRedirectHandler", "HTTPSHandler", "Request", "build_opener"
    ),
    "wsgiref.simple_server": ("WSGIRequestHandler", "WSGIServer", "make_server"),
}  # fmt: skip
"""Modules that are imported and not used, and the names that are taken from them."""


def main() -> None:
    """Run `kg`."""
    with suppress(OSError, AttributeError):  # Another C library has no such setting, and needs none.
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
    # A second reload, or one before the agent handles the signal, must not end it.
    if not (sys.stdin and sys.stdin.isatty()):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # None makes an import fail as that of a package that is not installed.
    sys.modules.setdefault("rich", cast(ModuleType, None))
    gc.set_threshold(OBJECTS_BETWEEN_LOOKS, NEVER)
    try:
        for name, contents in _unused():
            module = sys.modules.setdefault(name, ModuleType(name))
            for attribute in contents:
                if not hasattr(module, attribute):
                    setattr(module, attribute, type(attribute, (), {}))
        from kilo_etcd.base.output import output_must_arrive
        from kilo_etcd.base.sharedrepr import share_repr

        share_repr()
        from kilo_etcd.agent.main import main as kg
    except Exception as error:  # Of which kind it is only the broken installation knows.
        _cannot_be_loaded(error)

    with output_must_arrive("kg"):
        kg()


def _cannot_be_loaded(error: Exception) -> NoReturn:
    """Say so in one line. As a service, let some time pass: systemd starts it again at once."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (place.filename, place.lineno)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    sentence = (
        f"the installed code cannot be loaded: {type(error).__name__}: {message} ({where[0]}, line {where[1]}); "
        "install it anew"
    )
    print(f"kg: {sentence}", file=sys.stderr, flush=True)
    if "NOTIFY_SOCKET" in os.environ:
        with suppress(Exception):
            from kilo_etcd.agent.notify import notify

            notify(f"STATUS=cannot run, will try again: {sentence}")
        time.sleep(PAUSE_SECONDS)
    sys.exit(1)


def _unused() -> Iterator[tuple[str, tuple[str, ...]]]:
    from google.protobuf.internal import api_implementation

    yield from _EMPTY.items()
    if api_implementation.Type() == "upb":  # the one in C
        yield "google.protobuf.internal.python_message", ()
