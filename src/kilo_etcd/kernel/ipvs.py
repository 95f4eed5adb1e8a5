"""The addresses at which this host's kernel balances services (IPVS), as /proc/net tells them."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path

from kilo_etcd.base import descriptors
from kilo_etcd.model import IPAddress

TABLE = Path("/proc/net/ip_vs")
_virtual_servers = re.compile(r"^(?:TCP|UDP|SCTP) +(\S+):", re.MULTILINE).findall
"""Lines of headings, real servers and firewall marks have no address of a service."""


def read() -> frozenset[IPAddress] | None:
    """The addresses of the virtual servers; none if the kernel has no IPVS; None: it does not show them. Blocking.
    OSError if no descriptor is free."""
    try:
        return addresses(TABLE.read_text())
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        if descriptors.is_shortage(error):
            raise
        return None


def addresses(table: str) -> frozenset[IPAddress]:
    """Those of a table, which has a line for each port and for each real server, with numbers of connections."""
    return _addresses(frozenset(_virtual_servers(table)))


@lru_cache(maxsize=1)
def _addresses(words: frozenset[str]) -> frozenset[IPAddress]:
    """As `0A2B0001`, whatever the host's order of bytes, or `[fd43:...:0001]`."""
    return frozenset(ip_address(word[1:-1] if word.startswith("[") else int(word, 16)) for word in words)
