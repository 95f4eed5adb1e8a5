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
class Usable:
    """The endpoints that the member list gives, and sentences on the client URLs that are left out."""

    endpoints: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def usable(members: Iterable[Member], config: Config) -> Usable:
    """What a host that reaches etcd by `config` can use of these members."""
    given = [parse_endpoint(text, tls=config.tls is not None) for text in config.endpoints]
    with_tls = any(endpoint.tls for endpoint in given)
    if config.discovery is not None:
        with_tls = not config.discovery.insecure
    here = any(_is_here(endpoint) for endpoint in given)
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
                    why = _unusable(endpoint, with_tls=with_tls, here=here)
                if why is None:
                    endpoints[str(endpoint)] = None
                else:
                    remarks.append(f"{url} of {name} is left out: it {why} (etcd --advertise-client-urls)")
    return Usable(endpoints=tuple(endpoints), remarks=tuple(remarks))


def _unusable(endpoint: EtcdEndpoint, *, with_tls: bool, here: bool) -> str | None:
    """Why an endpoint cannot be used, as a clause without its subject; None: it can."""
    if with_tls and not endpoint.tls:
        return "is without TLS, with which this host reaches etcd"
    if _is_here(endpoint) and not here:
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


def _is_here(endpoint: EtcdEndpoint) -> bool:
    try:
        return ip_address(endpoint.host).is_loopback
    except ValueError:
        name = endpoint.host.rstrip(".").lower()
        return name == "localhost" or name.endswith(".localhost")


def with_known_members(config: Config, state_dir: Path) -> Config:
    """`config`, with the endpoints of the copy to be tried if none of its own can be connected to."""
    return evolve(config, more_endpoints=_read(state_dir / FILE, _given(config)))


def keep(config: Config, state_dir: Path, endpoints: tuple[str, ...]) -> None:
    """Write the copy. OSError."""
    write_whole(state_dir / FILE, json.dumps({"given": _given(config), "members": endpoints}).encode() + b"\n")


def remove(state_dir: Path) -> None:
    """OSError."""
    (state_dir / FILE).unlink(missing_ok=True)


def _given(config: Config) -> list[str]:
    """What says where etcd is, in `config`."""
    discovery = config.discovery
    return sorted(config.endpoints) if discovery is None else [discovery.domain, discovery.service_name]


def _read(path: Path, given: list[str]) -> tuple[str, ...]:
    """The members' endpoints if they were kept for the same `given`; a file that is of no use is as good as none."""
    try:
        with open_regular(path, follow=False) as file:
            document: Any = json.loads(file.read(MOST_BYTES))
        members = document["members"] if document["given"] == given else []
        return tuple(str(parse_endpoint(text, tls=False)) for text in members)
    except (OSError, NotRegular, ValueError, KeyError, TypeError, AttributeError, RecursionError, BadRequest):
        return ()
