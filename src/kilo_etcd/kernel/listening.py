"""The TCP ports at which this host's network namespace listens, as /proc/net tells them."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from sys import byteorder

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENS = "0A"
"""TCP_LISTEN (net/tcp_states.h)."""


def read() -> frozenset[int]:
    """The ports, without those that only this host itself reaches. Blocking; a file that is not there has none."""
    result: set[int] = set()
    for path in TABLES:
        try:
            with path.open() as lines:
                result.update(ports(lines))
        except OSError:
            continue
    return frozenset(result)


def ports(lines: Iterable[str]) -> Iterable[int]:
    """Those of one table; what is no line of a socket is left out."""
    for line in lines:
        words = line.split(maxsplit=4)
        if len(words) < 4 or words[3] != _LISTENS:
            continue
        where, _, port = words[1].rpartition(":")
        # The kernel writes an address as numbers of 32 bits in the host's order.
        numbers = (int(where[at : at + 8], 16).to_bytes(4, byteorder) for at in range(0, len(where), 8))
        address = ip_address(b"".join(numbers))
        inner = getattr(address, "ipv4_mapped", None) or address
        if not inner.is_loopback:
            yield int(port, 16)
