"""IP addresses and host names: their types, and which of them are public."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPInterface: TypeAlias = IPv4Interface | IPv6Interface
IPNetwork: TypeAlias = IPv4Network | IPv6Network


def overlap(one: IPNetwork, other: IPNetwork) -> bool:
    """Whether two networks, of whichever families, have addresses in common."""
    return one.version == other.version and one.overlaps(other)


def is_within(address: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    """Whether an address is in one of some networks, of whichever families."""
    return any(network.version == address.version and address in network for network in networks)


def is_dns_name(text: str) -> bool:
    """Whether a text can be a host's name."""
    labels = text.rstrip(".").split(".")
    # All-numeric last labels are mistyped IPv4 addresses, never host names (RFC 3696 section 2).
    return (
        0 < len(text) <= 253
        and not labels[-1].isdigit()
        and all(
            0 < len(label) <= 63
            and label[0] != "-"
            and label[-1] != "-"
            and all(c.isascii() and (c.isalnum() or c in "-_") for c in label)
            for label in labels
        )
    )


# Documentation networks stand for the internet in the lab and in examples, so they count as public here
# although the registry (and `ipaddress.is_global`) says that they are not.
_PRIVATE = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3",
    )
)  # fmt: skip
_PUBLIC6 = IPv6Network("2000::/3")


def is_public(address: IPAddress) -> bool:
    """Whether an address is routed on the internet: not private, shared (CGNAT), link-local or loopback."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _PRIVATE)
    return address in _PUBLIC6
