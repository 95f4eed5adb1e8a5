"""Where `kg` begins. structlog draws tracebacks with rich wherever it finds it, and importing that costs a daemon that
never draws 3 MiB and 0.1 s; so rich is not to be found in this process. It stays `kgctl`'s.
"""

from __future__ import annotations

import signal
import sys
from types import ModuleType
from typing import cast


def main() -> None:
    """Run `kg`."""
    # Whoever reloads twice, or before the agent listens for it, is not to end it.
    if not (sys.stdin and sys.stdin.isatty()):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # None makes an import fail as that of a package that is not installed.
    sys.modules.setdefault("rich", cast(ModuleType, None))
    from kilo_etcd.agent.main import main as kg

    kg()
