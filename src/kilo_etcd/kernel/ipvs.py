"""The addresses at which this host's kernel balances services (IPVS), as /proc/net tells them."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

from kilo_etcd.model import IPAddress

TABLE = Path("/proc/net/ip_vs")
_PROTOCOLS = ("TCP", "UDP", "SCTP")


def read() -> frozenset[IPAddress]:
    """The addresses of the virtual servers. Blocking; none where the kernel has no IPVS, or does not show it."""
    try:
        with TABLE.open() as lines:
            return frozenset(addresses(lines))
    except OSError:
        return frozenset()


def addresses(lines: Iterable[str]) -> Iterable[IPAddress]:
    """Those of a table. Lines of headings, real servers and firewall marks have none."""
    for line in lines:
        words = line.split(maxsplit=2)
        if len(words) < 2 or words[0] not in _PROTOCOLS:
            continue
        # As `0A2B0001:01BB`, whatever the host's order of bytes, or `[fd43:...:0001]:01BB`.
        where = words[1].rpartition(":")[0]
        yield ip_address(where[1:-1]) if where.startswith("[") else ip_address(int(where, 16))
