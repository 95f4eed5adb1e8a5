"""Endpoints from DNS: the SRV records of a domain, looked up and chosen as etcdctl does.

Two services are looked up, `_etcd-client-ssl._tcp` for endpoints with TLS and `_etcd-client._tcp` for those without;
a service name is put behind each (`_etcd-client-ssl-NAME._tcp`). DNS is seldom authenticated. So unless the discovery
is insecure, endpoints without TLS are left out, and the certificates of the others must be good for the domain, not
for the name that a record gives.

dnspython is imported by the first look-up, since few hosts need it (decision 0037).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio
from attrs import frozen

from .api import Discovery
from .endpoint import EtcdEndpoint
from .grpc import TransportFailed

if TYPE_CHECKING:
    import dns.asyncresolver

LOOKUP_SECONDS = 3.0
"""How long both look-ups together may take: less than a call, whose error says why they failed."""


@frozen
class SrvRecord:
    """Where a service is: the target's name and its port."""

    target: str
    port: int


@frozen(kw_only=True)
class Discovered:
    """What DNS says: the endpoints to use, and sentences on those that are left out."""

    endpoints: tuple[EtcdEndpoint, ...] = ()
    remarks: tuple[str, ...] = ()


def service(discovery: Discovery, *, tls: bool) -> str:
    """The name whose SRV records give the endpoints with or without TLS."""
    name = f"-{discovery.service_name}" if discovery.service_name else ""
    return f"_etcd-client{'-ssl' if tls else ''}{name}._tcp.{discovery.domain}"


def choose(discovery: Discovery, secure: Iterable[SrvRecord], plain: Iterable[SrvRecord]) -> Discovered:
    """The endpoints that these records give, those of the service with TLS and those of the one without."""
    # A target that is the root says that the service is not there (RFC 2782).
    with_tls = [EtcdEndpoint(r.target, r.port, True, discovery.server_name) for r in secure if r.target]
    without_tls = [EtcdEndpoint(r.target, r.port, False) for r in plain if r.target]
    if discovery.insecure:
        return Discovered(endpoints=tuple(dict.fromkeys([*with_tls, *without_tls])))
    remarks = (
        f"{endpoint} of the SRV records of {service(discovery, tls=False)} is left out, since it is without TLS "
        "(--insecure-discovery takes it)"
        for endpoint in dict.fromkeys(without_tls)
    )
    return Discovered(endpoints=tuple(dict.fromkeys(with_tls)), remarks=tuple(remarks))


async def discover(discovery: Discovery) -> Discovered:
    """Look the endpoints up now. Raises TransportFailed if DNS names none that may be used, or does not answer."""
    answers: dict[bool, tuple[SrvRecord, ...] | str] = {}

    async def look_up(tls: bool) -> None:
        answers[tls] = await _srv_records(service(discovery, tls=tls))

    with trio.move_on_after(LOOKUP_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_up, True)
            nursery.start_soon(look_up, False)
    records, reasons = dict[bool, tuple[SrvRecord, ...]](), list[str]()
    for tls in (True, False):
        answer = answers.get(tls, "no DNS server answers")
        if isinstance(answer, str):
            reasons.append(f"{service(discovery, tls=tls)}: {answer}")
        else:
            records[tls] = answer
    discovered = choose(discovery, records.get(True, ()), records.get(False, ()))
    if not discovered.endpoints:
        raise TransportFailed(
            "; ".join((*reasons, *discovered.remarks)) or "its SRV records name no host", processed=False
        )
    return discovered


async def _srv_records(name: str) -> tuple[SrvRecord, ...] | str:
    """The SRV records of a name, or why there are none, as a clause."""
    import dns.asyncbackend
    import dns.exception
    import dns.resolver

    try:
        answer = await resolver().resolve(
            name, "SRV", lifetime=LOOKUP_SECONDS, search=False, backend=dns.asyncbackend.get_backend("trio")
        )
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return "there are no SRV records"
    except dns.resolver.NoResolverConfiguration:
        return "/etc/resolv.conf names no DNS server"
    except (dns.resolver.NoNameservers, dns.exception.Timeout, OSError):
        return "no DNS server answers"
    except (dns.exception.DNSException, ValueError) as error:
        return f"it cannot be looked up ({error or type(error).__name__})"
    return tuple(SrvRecord(record.target.to_text(omit_final_dot=True).rstrip("."), record.port) for record in answer)


def resolver() -> dns.asyncresolver.Resolver:
    """A resolver that asks the servers in /etc/resolv.conf, as the file is now."""
    import dns.asyncresolver

    return dns.asyncresolver.Resolver()
