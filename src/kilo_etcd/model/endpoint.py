"""Where a WireGuard device is reached."""

from __future__ import annotations

from ipaddress import (
    IPv6Address,
)

from attrs import frozen

from kilo_etcd.base.fast_ip import ip_address
from kilo_etcd.base.quoting import shown
from kilo_etcd.model.addresses import IPAddress, is_dns_name, is_public

SESSION_SECONDS = 180
"""From this age on a WireGuard session is over (REJECT_AFTER_TIME of its paper): an endpoint in use is younger."""


@frozen
class Endpoint:
    """Where a WireGuard device is reached: an address or a DNS name, and a UDP port.

    >>> str(Endpoint.parse("[2001:db8::1]:51820"))
    '[2001:db8::1]:51820'
    """

    host: IPAddress | str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> Endpoint:
        """`host:port`, `[v6]:port`, or with `default_port` a bare host. ValueError says what is wrong."""
        text = text.strip()
        if text.startswith("["):
            name, closed, rest = text[1:].partition("]")
            if not closed or (rest and not rest.startswith(":")):
                raise ValueError(f"{shown(text)} is no endpoint: write [address]:port")
            port_text = rest[1:]
        elif text.count(":") > 1:
            name, port_text = text, ""
        else:
            name, _, port_text = text.partition(":")
        if not port_text and default_port is None:
            raise ValueError(f"{shown(text)} is no endpoint: the port is missing (host:port)")
        try:
            port = int(port_text) if port_text else int(default_port or 0)
        except ValueError:
            raise ValueError(f"{shown(text)} is no endpoint: {shown(port_text)} is no port") from None
        if not 0 < port < 65536:
            raise ValueError(f"{shown(text)} is no endpoint: {shown(port_text)} is not within 1 to 65535")
        try:
            return cls(ip_address(name), port)
        except ValueError:
            if not is_dns_name(name):
                raise ValueError(
                    f"{shown(text)} is no endpoint: {shown(name)} is neither an address nor a DNS name"
                ) from None
            return cls(name.lower(), port)

    @property
    def address(self) -> IPAddress | None:
        """The host as an address; None for a DNS name that is not resolved yet."""
        return None if isinstance(self.host, str) else self.host

    @property
    def public(self) -> bool:
        """Whether others can be expected to reach it from anywhere: a DNS name or a public address."""
        return True if isinstance(self.host, str) else is_public(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if isinstance(self.host, IPv6Address) else f"{self.host}:{self.port}"
