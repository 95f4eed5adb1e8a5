"""The network namespace of this process, whose number is in the names of files that several namespaces may share."""

from __future__ import annotations

import os


def network_namespace() -> int:
    """The number of this process's network namespace. OSError."""
    return os.stat("/proc/self/ns/net").st_ino
