"""The sentence of an agent on a firewall that drops packets for some nodes or offered networks: how it begins, and
which networks one is about. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_network

from kilo_etcd.base.quoting import first_of
from kilo_etcd.model import IPNetwork

MOST_NAMED = 20
"""Networks that a sentence names."""

_DROPS = re.compile(r"the firewall drops (?:\w+ )?packets for networks of the mesh \((?P<networks>[^)]*)\)").match


def drops_packets_for(networks: Iterable[IPNetwork], kind: str = "") -> str:
    """How the sentence begins. `kind`: of the packets, with a space at its end; empty: all."""
    named = first_of(sorted(map(str, networks)), MOST_NAMED)
    return f"the firewall drops {kind}packets for networks of the mesh ({named})"


def dropped_networks(text: str) -> tuple[IPNetwork, ...] | None:
    """The networks that such a sentence is about; empty: it does not name all; None: it is another sentence."""
    match = _DROPS(text)
    if match is None:
        return None
    try:
        return tuple(map(ip_network, match["networks"].split(", ")))
    except ValueError:
        return ()
