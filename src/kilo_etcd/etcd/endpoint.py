"""Endpoints as etcdctl takes them: `host:port`, `http://host:port`, `https://host:port`, IPv6 in brackets.

Parsing only; it refuses, in one sentence, what is not an endpoint. A comma list is split by the caller.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from attrs import frozen

from .api import BadRequest

DEFAULT_PORT = 2379


@frozen
class EtcdEndpoint:
    """The host and port of one etcd member. `host` is a name or an IP address; an IPv6 address has no brackets."""

    host: str
    port: int
    tls: bool
    server_name: str = ""
    """The name that the certificate must be good for; empty: that is `host`."""

    @property
    def authority(self) -> str:
        """`host:port`, as the `:authority` of a request."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"


def _shown(text: str) -> str:
    """Without user and password, which may precede an @ and be spelled in any way."""
    return repr(text.rpartition("@")[2])


def parse_endpoint(text: str, *, tls: bool) -> EtcdEndpoint:
    """Parse one endpoint; `tls` decides where no scheme does (as etcdctl: TLS when certificates are given).

    Raises BadRequest.
    """
    stripped = text.strip()
    scheme, separator, _ = stripped.partition("://")
    if separator and scheme.lower() not in ("http", "https"):
        raise BadRequest(f"{_shown(text)} is not an etcd endpoint: use http:// or https://")
    try:
        url = urlsplit(stripped if separator else f"//{stripped}")
        host, port = url.hostname, url.port
        (host or "").removesuffix(".").encode("idna")  # Empty and overlong labels are refused here.
    except ValueError:
        host, port = None, None
    if not host or url.path.strip("/") or url.query or url.username or any(letter.isspace() for letter in host):
        raise BadRequest(
            f"{_shown(text)} is not an etcd endpoint: write host:port, such as 10.0.0.1:2379 or [fd00::1]:2379"
        )
    return EtcdEndpoint(host, DEFAULT_PORT if port is None else port, scheme.lower() == "https" if separator else tls)
