"""Decides what one host's kernel holds, as a function of the topology and of what the host knows. Pure.

What is named as its module (`render`, `route_filter`, `walk`) is imported from there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilo_etcd.planning.peerplan import peer_plan
    from kilo_etcd.planning.plan import host_plan
    from kilo_etcd.planning.walk import Hop, Path, walk_both

__all__ = ["Hop", "Path", "host_plan", "peer_plan", "walk_both"]

_PARTS = {
    "peerplan": ("peer_plan",),
    "plan": ("host_plan",),
    "walk": ("Hop", "Path", "walk_both"),
}


def __getattr__(name: str) -> object:
    # A name's module is imported when the name is first asked for: most of kgctl's commands plan for no host.
    for part, names in _PARTS.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"{__name__}.{part}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
