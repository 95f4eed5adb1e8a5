"""Where `kg` begins, and what keeps it small: a daemon on every host pays for each MiB once per host.

structlog draws tracebacks with rich wherever it finds it, and importing that costs a daemon that never draws 3 MiB and
0.1 s; so rich is not to be found in this process. It stays `kgctl`'s. structlog also imports asyncio, for methods that
nobody calls in a trio program: 1.5 MiB and 7 ms; it finds an empty module of that name. And glibc gives each thread a
heap of its own to allocate from, which is for threads that compete; the agent's two seldom run, and share the first:
1 MiB.
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


def main() -> None:
    """Run `kg`."""
    with suppress(OSError, AttributeError):  # Another C library has no such setting, and needs none.
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    # Whoever reloads twice, or before the agent listens for it, is not to end it.
    if not (sys.stdin and sys.stdin.isatty()):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # None makes an import fail as that of a package that is not installed.
    sys.modules.setdefault("rich", cast(ModuleType, None))
    sys.modules.setdefault("asyncio", ModuleType("asyncio"))
    from kilo_etcd.agent.main import main as kg

    kg()
