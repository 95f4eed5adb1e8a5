"""Endpoints from etcd's member list: which of the members' client URLs a host can use, and the copy on disk.

The copy is for an agent that starts when no member is left at the endpoints that it was given. It counts only as long
as the same endpoints are given: an operator who gives others means another etcd, maybe. `kgctl` on the host reads it
too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from kilo_etcd.base.regularfile import NotRegular, open_regular
from kilo_etcd.base.wholefile import write_whole
from kilo_etcd.etcd.api import BadRequest, Config
from kilo_etcd.etcd.endpoint import EtcdEndpoint, parse_endpoint

if TYPE_CHECKING:
    from kilo_etcd.etcd.values import Member

FILE = "etcd-endpoints.json"
MOST_BYTES = 2**16


@frozen(kw_only=True)
class _Access:
    """How a host reaches etcd, as far as its members' URLs are judged by it."""

    with_tls: bool
    here: bool
    """At the host itself."""

    @classmethod
    def of(cls, config: Config) -> _Access:
        given = [parse_endpoint(text, tls=config.tls is not None) for text in config.endpoints]
        with_tls = any(endpoint.tls for endpoint in given)
        if config.discovery is not None:
            with_tls = config.tls is not None or not config.discovery.insecure
        return cls(with_tls=with_tls, here=any(map(_is_here, given)))

    def unusable(self, endpoint: EtcdEndpoint) -> str | None:
        """Why an endpoint cannot be used, as a clause without its subject; None: it can."""
        if self.with_tls and not endpoint.tls:
            return "is without TLS, with which this host reaches etcd"
        if _is_here(endpoint) and not self.here:
            return "is reached on the member's own host only"
        try:
            address = ip_address(endpoint.host)
        except ValueError:
            return None
        if address.is_unspecified:
            return "is no address to connect to"
        if address.is_link_local:
            return "is reached on the member's own link only"
        return None


@frozen(kw_only=True)
class Usable:
    """The endpoints that the member list gives, and sentences on the client URLs that are left out."""

    endpoints: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def usable(members: Iterable[Member], config: Config) -> Usable:
    """What a host that reaches etcd by `config` can use of these members."""
    access = _Access.of(config)
    endpoints, remarks = dict[str, None](), list[str]()
    for member in sorted(members, key=lambda member: member.id):
        name = f"etcd member {member.name or format(member.id, 'x')}"
        if not member.client_urls:
            remarks.append(f"{name} has no client URL yet, so it has not started")
        elif member.is_learner:
            remarks.append(f"{name} is a learner, which serves no clients yet")
        else:
            for url in member.client_urls:
                try:
                    endpoint = parse_endpoint(url, tls=False)
                except BadRequest:
                    why: str | None = "is no endpoint"
                else:
                    why = access.unusable(endpoint)
                if why is None:
                    endpoints[str(endpoint)] = None
                else:
                    remarks.append(f"{url} of {name} is left out: it {why} (etcd --advertise-client-urls)")
    return Usable(endpoints=tuple(endpoints), remarks=tuple(remarks))


def _is_here(endpoint: EtcdEndpoint) -> bool:
    try:
        return ip_address(endpoint.host).is_loopback
    except ValueError:
        name = endpoint.host.rstrip(".").lower()
        return name == "localhost" or name.endswith(".localhost")


def with_known_members(config: Config, state_dir: Path) -> Config:
    """`config`, with the endpoints of the copy to be tried if none of its own can be connected to."""
    return evolve(config, more_endpoints=_read(state_dir / FILE, config))


def keep(config: Config, state_dir: Path, endpoints: tuple[str, ...]) -> None:
    """Write the copy. OSError."""
    write_whole(state_dir / FILE, json.dumps({"given": _given(config), "members": endpoints}).encode() + b"\n")


def remove(state_dir: Path) -> None:
    """OSError."""
    (state_dir / FILE).unlink(missing_ok=True)


def _given(config: Config) -> dict[str, object]:
    """What says where etcd is, in `config`, and whether it is reached with TLS."""
    discovery, tls = config.discovery, config.tls is not None
    if discovery is None:
        return {"endpoints": sorted(str(parse_endpoint(text, tls=tls)) for text in config.endpoints), "tls": tls}
    return {
        "discovery": [discovery.domain, discovery.service_name],
        "insecure": discovery.insecure,
        "tls": tls,
    }


def _read(path: Path, config: Config) -> tuple[str, ...]:
    """The members' endpoints if they were kept for the same `config`, those that it can use today; a file that is of no
    use is as good as none."""
    try:
        with open_regular(path, follow=False) as file:
            document: Any = json.loads(file.read(MOST_BYTES))
        members = document["members"] if document["given"] == _given(config) else []
        if not isinstance(members, list) or not all(isinstance(text, str) for text in members):
            return ()
        endpoints = [parse_endpoint(text, tls=False) for text in members]
    except (OSError, NotRegular, ValueError, KeyError, TypeError, RecursionError, BadRequest):
        return ()
    access = _Access.of(config)
    return tuple(str(endpoint) for endpoint in endpoints if access.unusable(endpoint) is None)
