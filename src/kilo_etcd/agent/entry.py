"""Where `kg` begins, and what keeps it small: a daemon on every host pays for each MiB once per host.

structlog draws tracebacks with rich wherever it finds it, and importing that costs a daemon that never draws 3 MiB and
0.1 s; so rich is not to be found in this process. It stays `kgctl`'s. structlog also imports asyncio, for methods that
nobody calls in a trio program: 1.5 MiB and 7 ms; it finds an empty module of that name. prometheus_client imports HTTP
servers and clients, which are not used either: 2.6 MiB. And glibc gives each thread a heap of its own to allocate from,
which is for threads that compete; the agent's two seldom run, and share the first: 1 MiB.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from contextlib import suppress
from types import ModuleType
from typing import cast

M_ARENA_MAX = -8
"""<malloc.h>"""
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
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    # Whoever reloads twice, or before the agent listens for it, is not to end it.
    if not (sys.stdin and sys.stdin.isatty()):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # None makes an import fail as that of a package that is not installed.
    sys.modules.setdefault("rich", cast(ModuleType, None))
    for name, contents in _EMPTY.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        for each in contents:
            if not hasattr(module, each):
                setattr(module, each, type(each, (), {}))
    from kilo_etcd.agent.main import main as kg

    kg()
