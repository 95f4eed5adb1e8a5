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


def certainly_dropped(text: str, behind: Iterable[IPNetwork]) -> tuple[IPNetwork, ...]:
    """The networks that such a sentence of a host is about, those that it counts among them if that can be told: they
    come after those that it names, in their order, and all that come there of the networks behind the host are as many.
    Empty: it is another sentence."""
    match = _DROPS(text)
    if match is None:
        return ()
    listed, _, more = match["networks"].partition(" and ")
    try:
        named = tuple(map(ip_network, listed.split(", ")))
        count = int(more.partition(" ")[0]) if more else 0
    except ValueError:
        return ()
    networks = set(behind)
    if not networks.issuperset(named):
        return named
    rest = tuple(network for network in networks if str(network) > str(named[-1]))
    return (*named, *rest) if len(rest) == count else named


def dropped_networks(text: str) -> tuple[IPNetwork, ...] | None:
    """The networks that such a sentence is about; empty: it does not name all; None: it is another sentence."""
    match = _DROPS(text)
    if match is None:
        return None
    try:
        return tuple(map(ip_network, match["networks"].split(", ")))
    except ValueError:
        return ()
