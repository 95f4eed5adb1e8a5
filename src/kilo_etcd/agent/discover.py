"""Which of the host's addresses is its internal IP, which its endpoint, and which location the host was born in.

The rules are Kilo's: first what the host's name resolves to, then the interfaces of the default route, then the rest;
the internal IP is a private address, or none where the host has none (it is then a segment of its own, and nothing
crosses a public network in clear unless `--internal-cidr` says that it may); the endpoint is public where it can be.

Beyond Kilo, some devices give no address by themselves, unless the default route leads out by them (`_left_aside`):

* container bridges, since docker0 is the same address on every host,
* tunnels: another VPN's address is reached by that VPN's hosts only,
* the loopback device and dummies, where the addresses of services are that several hosts have. One that the host's name
  resolves to is the host's own, and so is one that the default route sends from.

That is looked at first; what is private and what is public, after it. Of several addresses of one interface the one
that the kernel itself sends from comes first: an address that moves between hosts is there beside the host's own.

The decision is pure and every choice comes with its reason; only `gather` and `location_from_cloud_init` look at the
host, and nothing here asks the network but the system's resolver.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from pathlib import Path

import trio
from attrs import frozen

from kilo_etcd import kernel
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.name_servers import name_servers
from kilo_etcd.base import descriptors
from kilo_etcd.kernel.state import HostAddress
from kilo_etcd.model import DEFAULT_PORT, Endpoint, IPAddress, IPInterface, IPNetwork, is_public
from kilo_etcd.runtime.host_facts import TUNNELS, HostFacts, is_container, usable, within
from kilo_etcd.runtime.resolve import lookup

INSTANCE_DATA = Path("/run/cloud-init/instance-data.json")
_MOST_BYTES = 8 * 2**20

HOSTNAME_TIMEOUT = 2.0
"""Seconds for looking up the host's own name, which normally is a matter of /etc/hosts: the agent's start waits."""

_hostnames: dict[str, tuple[IPAddress, ...]] = {}
"""The last answers for the host's own name."""

_VIRTUAL = TUNNELS | {"bridge", "veth", "dummy", "openvswitch"}


@frozen(kw_only=True)
class Chosen:
    """The node's internal IPs (at most one per family) and endpoints, and a sentence on each choice for the log."""

    internal_ips: tuple[IPInterface, ...] = ()
    endpoint: Endpoint | None = None
    more_endpoints: tuple[Endpoint, ...] = ()
    """In the families that `endpoint` is not in."""
    reasons: tuple[str, ...] = ()


@frozen(kw_only=True)
class _Candidate:
    address: IPInterface
    interface: str
    why: str
    order: tuple[int, ...]
    left_aside: str
    """The devices whose addresses do not count by themselves that it is one of; empty: it counts."""

    @property
    def public(self) -> bool:
        return is_public(self.address.ip)


def choose(facts: HostFacts, config: AgentConfig) -> Chosen:
    """What this agent registers, as its flags would have it."""
    return choose_addresses(
        facts,
        port=config.port,
        subnets=config.subnets,
        internal_cidrs=config.internal_cidrs,
        prioritise_private=config.prioritise_private,
        forced_endpoint=config.endpoint,
    )


def choose_addresses(
    facts: HostFacts,
    *,
    port: int = DEFAULT_PORT,
    subnets: Iterable[IPNetwork] = (),
    internal_cidrs: Iterable[IPNetwork] = (),
    prioritise_private: bool = False,
    forced_endpoint: Endpoint | None = None,
) -> Chosen:
    """The internal IP of each family and the endpoint, each with its reason.

    `subnets` are the mesh's: an address within them is never taken. `internal_cidrs` limits the internal IPs to
    these networks, and lets any address count when it is within: a public one, or one of a container bridge, a tunnel
    or the loopback device.
    """
    candidates = _candidates(facts, tuple(subnets))
    cidrs = tuple(internal_cidrs)
    internal: list[IPInterface] = []
    reasons: list[str] = []
    for family in (4, 6):
        of_family = [candidate for candidate in candidates if candidate.address.version == family]
        if cidrs:
            fit = sorted(
                (candidate for candidate in of_family if any(within(candidate.address, cidr) for cidr in cidrs)),
                key=lambda candidate: candidate.public,
            )
            because = "the first within --internal-cidr"
        else:
            fit = [candidate for candidate in of_family if not candidate.public and not candidate.left_aside]
            because = "the first private address"
        if fit:
            internal.append(fit[0].address)
            reasons.append(
                f"internal IP {fit[0].address} ({fit[0].why}, on {fit[0].interface}): {because} of {_of(fit, family)}"
            )
    if not internal:
        reasons.append(_no_internal(candidates, cidrs))
    endpoint, reason = _endpoint(candidates, port, prioritise_private, forced_endpoint)
    reasons.append(reason)
    more = []
    for further in _further(facts, candidates, prioritise_private, endpoint):
        more.append(Endpoint(further.address.ip, port))
        reasons.append(
            f"further endpoint {more[-1]} ({further.why}, on {further.interface}): for those who share "
            f"IPv{further.address.version} with this host"
        )
    return Chosen(internal_ips=tuple(internal), endpoint=endpoint, more_endpoints=tuple(more), reasons=tuple(reasons))


def _endpoint(
    candidates: list[_Candidate], port: int, prioritise_private: bool, forced: Endpoint | None
) -> tuple[Endpoint | None, str]:
    if forced is not None:
        return forced, f"endpoint {forced}: set by --endpoint"
    reachable = [candidate for candidate in candidates if not candidate.left_aside]
    public = [candidate for candidate in reachable if candidate.public]
    private = [candidate for candidate in reachable if not candidate.public]
    first, second = (private, public) if prioritise_private else (public, private)
    if not reachable:
        return None, "no endpoint: the host has no address that others could reach; set --endpoint where it has one"
    best = (first or second)[0]
    endpoint = Endpoint(best.address.ip, port)
    chosen = f"endpoint {endpoint} ({best.why}, on {best.interface})"
    if best.public:
        return endpoint, f"{chosen}: the first public address"
    if prioritise_private:
        return endpoint, f"{chosen}: the first private address, as --prioritise-private-addresses wants"
    return (
        endpoint,
        f"{chosen}: the first private address, since there is no public one; if others are to reach this host through "
        "a forwarded port, set --endpoint or the annotation force-endpoint",
    )


def _further(
    facts: HostFacts, candidates: list[_Candidate], prioritise_private: bool, first: Endpoint | None
) -> Iterable[_Candidate]:
    """The best of each family that `first` is not in. A private one counts only if the host has a default route."""
    ways = {route.family for route in facts.default_routes}
    for family in (4, 6):
        if first is None or (first.address is not None and first.address.version == family):
            continue
        fit = [
            candidate
            for candidate in candidates
            if candidate.address.version == family and not candidate.left_aside and (candidate.public or family in ways)
        ]
        if fit:
            yield min(fit, key=lambda candidate: candidate.public is prioritise_private)


def _no_internal(candidates: list[_Candidate], cidrs: tuple[IPNetwork, ...]) -> str:
    if cidrs:
        return f"no internal IP: no address is within --internal-cidr {','.join(map(str, cidrs))}"
    if aside := sorted({candidate.left_aside for candidate in candidates if not candidate.public}):
        return (
            f"no internal IP: the only private addresses are those of {', '.join(aside)}, by which the default route "
            "does not go (--internal-cidr allows one)"
        )
    return "no internal IP: the host has no private address, so it is a segment of its own (--internal-cidr allows one)"


def _of(fit: list[_Candidate], family: int) -> str:
    return f"{len(fit)} in IPv{family}" if len(fit) > 1 else f"IPv{family}"


def _candidates(facts: HostFacts, subnets: tuple[IPNetwork, ...]) -> list[_Candidate]:
    """All addresses that can be meant, best first."""
    items = [item for item in facts.addresses if usable(item, facts.own_interface, subnets)]
    first_ways = {family: facts.ways_out(family, first=True) for family in (4, 6)}
    first_sources = facts.sent_from(4, first=True) | facts.sent_from(6, first=True)
    sources = facts.sent_from(4) | facts.sent_from(6)
    interfaces = list(dict.fromkeys(item.interface for item in items))
    # A single answer is somebody's decision (/etc/hosts, DNS); several are nss-myhostname listing every interface.
    resolved_items = {
        family: [item for item in items if item.address.version == family and item.address.ip in facts.resolved]
        for family in (4, 6)
    }
    result = []
    for position, item in enumerate(items):
        family, ip = item.address.version, item.address.ip
        on_way = item.interface in first_ways[family]
        named = item in resolved_items[family]
        decided = named and len(resolved_items[family]) == 1
        virtual = not (on_way or decided or ip in first_sources) and (item.kind in _VIRTUAL or is_container(item))
        if named:
            tier, why = 0, f"what {facts.hostname or 'the host name'} resolves to"
        elif on_way:
            tier, why = 1, "on the default route's interface"
        elif ip in first_sources:
            tier, why = 1, "what the default route sends from"
        else:
            tier, why = 2, "on another interface"
        resolved_position = facts.resolved.index(ip) if named else 0
        rank = (virtual, item.deprecated, item.temporary, tier, family == 6, resolved_position, ip not in first_sources)
        # Between addresses of one interface only: another uplink may have a gateway and a source of its own.
        source = 0 if ip in sources else 1 if facts.holds_gateway(item) else 2
        order = (*rank, interfaces.index(item.interface), source, position)
        result.append(
            _Candidate(
                address=item.address,
                interface=item.interface,
                why=why,
                order=tuple(map(int, order)),
                left_aside=_left_aside(facts, item, decided=decided, sent_from=sources),
            )
        )
    return sorted(result, key=lambda candidate: candidate.order)


def _left_aside(facts: HostFacts, item: HostAddress, *, decided: bool, sent_from: frozenset[IPAddress]) -> str:
    """The devices whose addresses do not count by themselves that `item` is one of; empty: it counts. `decided`: the
    host's name resolves to it alone, which says nothing of a tunnel: some VPNs answer for the name themselves."""
    if item.interface in facts.ways_out(item.address.version) or item.address.ip in sent_from:
        return ""
    if is_container(item):
        return "container bridges"
    if item.kind in TUNNELS:
        return "tunnels"
    if item.for_services and not decided:
        return "the loopback device and dummies"
    return ""


# -- looking at the host ------------------------------------------------------------------------------------------


async def gather(config: AgentConfig) -> HostFacts:
    """The host as it is now. A name that does not resolve is no error, it decides nothing."""
    resolved = await _resolve_hostname(config.hostname)
    host_addresses = await kernel.list_addresses()
    return HostFacts(
        hostname=config.hostname,
        resolved=resolved,
        addresses=host_addresses.addresses,
        default_routes=host_addresses.default_routes,
        static_routes=host_addresses.static_routes,
        name_servers=name_servers(),
        own_interface=config.interface,
    )


async def _resolve_hostname(hostname: str) -> tuple[IPAddress, ...]:
    # A nameserver that is away for a moment must not make the host change its internal IP: only an answer counts,
    # and that there is no such name is one.
    with trio.move_on_after(HOSTNAME_TIMEOUT):
        try:
            _hostnames[hostname] = await lookup(hostname)
        except socket.gaierror as error:
            if error.errno == socket.EAI_NONAME and descriptors.exhausted() is None:
                _hostnames.pop(hostname, None)
        except OSError:
            pass
    return _hostnames.get(hostname, ())


def location_from_cloud_init(path: Path = INSTANCE_DATA) -> tuple[str | None, str]:
    """The region that cloud-init recorded on the host (`v1.region`), and a sentence on where it comes from or why not.

    OutOfDescriptors if it cannot be opened for want of one: that says nothing on where the host is.

    Read from the world-readable, redacted file of this boot; what cloud-init keeps under /var/lib/cloud is a pickle,
    which nobody should load.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES)
        data = json.loads(raw)
    except FileNotFoundError:
        return None, f"no location from cloud-init: there is no {path}"
    except OSError as error:
        if (short := descriptors.shortage(error)) is not None:
            raise descriptors.OutOfDescriptors(f"{path} cannot be read: {short}") from None
        return None, f"no location from cloud-init: {path} cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return None, f"no location from cloud-init: {path} is not JSON"
    standard = data.get("v1") if isinstance(data, dict) else None
    region = standard.get("region") if isinstance(standard, dict) else None
    if not isinstance(region, str) or not region.strip() or not region.isprintable():
        return None, f"no location from cloud-init: {path} has no v1.region"
    return region.strip(), f"cloud-init's region (v1.region in {path})"
