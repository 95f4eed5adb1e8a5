"""`ip_address`, `ip_interface` and `ip_network`, quicker for IPv4 text as a program writes it.

A mesh of a thousand nodes is some three thousand addresses to read at each start, and `ipaddress` takes several times
as long for one as the C library's inet_pton(3) does. Every text gives the same value as with `ipaddress`, or the same
ValueError: what inet_pton does not take (it takes four decimal numbers without leading zeros) is left to `ipaddress`.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from socket import AF_INET, inet_pton

_LENGTHS = {str(length): length for length in range(33)}


def ip_address(text: str) -> IPv4Address | IPv6Address:
    """As `ipaddress.ip_address`."""
    try:
        return IPv4Address(inet_pton(AF_INET, text))
    except (OSError, ValueError):  # ValueError: a NUL in it, or no Unicode
        return ipaddress.ip_address(text)


def ip_interface(text: str) -> IPv4Interface | IPv6Interface:
    """As `ipaddress.ip_interface`."""
    address, _, length = text.partition("/")
    if (number := _LENGTHS.get(length)) is not None:
        try:
            return IPv4Interface((inet_pton(AF_INET, address), number))
        except (OSError, ValueError):
            pass
    return ipaddress.ip_interface(text)


def ip_network(text: str) -> IPv4Network | IPv6Network:
    """As `ipaddress.ip_network(text, strict=False)`: host bits are masked away."""
    address, _, length = text.partition("/")
    if (number := _LENGTHS.get(length)) is not None:
        try:
            return IPv4Network((inet_pton(AF_INET, address), number), strict=False)
        except (OSError, ValueError):
            pass
    return ipaddress.ip_network(text, strict=False)
