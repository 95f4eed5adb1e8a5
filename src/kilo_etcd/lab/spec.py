"""What a lab consists of, as values: sites, hosts, which of them are public, how many etcd members.

Read from TOML (`read_spec`) or built in Python (`Spec.simple`). Pure: nothing here touches a namespace.
Everything a person can get wrong in the file is refused with one sentence that names the file and the key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, field, frozen

from kilo_etcd.model import CHOICES, Granularity, InternalIPs, IPNetwork, parse_value

FAMILIES = ("ipv4", "ipv6")
WIREGUARD = ("auto", "kernel", "userspace")
NATS = ("full-cone", "port-restricted", "symmetric")
MAX_SITES = 150
MAX_PUBLIC = 250
RESERVED = ("operator", "internet")
"""Names of machines that every lab has, so no host can have them."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")


class SpecError(ValueError):
    """The description of a lab is wrong; the message is one sentence for the person who wrote it."""


@frozen(kw_only=True)
class HostSpec:
    """One host of a site."""

    name: str
    public: bool = False
    """Whether it has a public address of its own beside its private one; else it is behind the site's NAT."""
    label: str | None = None
    """Location label put into etcd before the agents start; None: no label."""
    subnet: int = 0
    """Index into the site's subnets."""
    args: tuple[str, ...] = ()
    """Further arguments for its agent."""
    families: tuple[str, ...] = ()
    """The address families that it has of the lab's; empty: all."""
    agent: bool = True
    """Whether it runs an agent, where hosts do; else it is a machine like others on its site's network: a printer."""


@frozen(kw_only=True)
class SiteSpec:
    """Hosts behind one router."""

    name: str
    hosts: tuple[HostSpec, ...]
    subnets: tuple[str, ...] = ()
    """Private networks (CIDR), one LAN each; empty: the lab chooses one."""
    latency_ms: float = 0.0
    """Delay added to each direction of the uplink."""
    loss_percent: float = 0.0
    mtu: int = 1500
    """Bytes: of the site's networks and its uplink."""
    strict: bool = False
    """Whether its router drops what passes between the subnets by addresses that are no host's, as clouds do."""
    nat: str = ""
    """How its router translates its hosts' WireGuard: `full-cone`, `port-restricted` or `symmetric` (see `NATS`), and
    then it answers nobody who was not asked, as home routers do. Empty: as the kernel does by itself."""


@frozen(kw_only=True)
class Spec:
    """A whole lab."""

    sites: tuple[SiteSpec, ...]
    etcd: int = 1
    granularity: Granularity = Granularity.LOCATION
    internal_ips: InternalIPs = InternalIPs.ROUTED
    families: tuple[str, ...] = ("ipv4",)
    lease_ttl: int = 5
    wireguard: str = "auto"
    agents: bool = True
    """Whether each host runs an agent."""
    open: bool = False
    """Whether routers pass on what is neither WireGuard nor etcd, as the internet does, and count it. Else they count
    and drop it: then a packet that must not leave its host gets nowhere, whether it has left or not."""
    agent_args: tuple[str, ...] = ()
    """Further arguments for every agent."""
    etcd_args: tuple[str, ...] = ()
    """Further arguments for every etcd member."""
    next_steps: tuple[str, ...] = ()
    """Commands to try once the lab runs, with what they show: printed then."""
    agent_command: tuple[str, ...] = field(default=())
    """What to run as agent in place of `kg` (with the same arguments); for trials."""

    def __attrs_post_init__(self) -> None:
        _check(self, "the lab")

    @property
    def hosts(self) -> tuple[HostSpec, ...]:
        """All hosts, site by site."""
        return tuple(host for site in self.sites for host in site.hosts)

    def site_of(self, host: str) -> SiteSpec:
        """The site of a host; KeyError where there is none."""
        for site in self.sites:
            if any(h.name == host for h in site.hosts):
                return site
        raise KeyError(host)

    @classmethod
    def simple(
        cls,
        hosts: int | Mapping[str, int] = 6,
        *,
        sites: int | None = None,
        labels: Mapping[str, str] | None = None,
        public: int = 1,
        **options: Any,
    ) -> Spec:
        """A lab of `hosts` hosts spread evenly over `sites` sites, or of {site: number of hosts}.

        Sites are `site-1`, ..., unless named; at most ten hosts share one unless `sites` says so. Host k
        of a site is `<site>-<k>`. The first `public` hosts of a site are public. `labels` maps a site, or
        a host, to the label put into etcd for it. `options` are further fields of `Spec`.
        """
        if isinstance(hosts, int):
            count = sites or max(2, -(-hosts // 10))
            share, more = divmod(hosts, count)
            hosts = {f"site-{i + 1}": share + (i < more) for i in range(count)}
        labels = labels or {}
        site_specs = tuple(
            SiteSpec(
                name=site,
                hosts=tuple(
                    HostSpec(
                        name=(name := f"{site}-{k}"),
                        public=k <= public,
                        label=labels.get(name, labels.get(site)),
                    )
                    for k in range(1, number + 1)
                ),
            )
            for site, number in hosts.items()
        )
        return cls(sites=site_specs, **options)

    def evolve(self, **changes: Any) -> Spec:
        """The same lab with some fields changed."""
        return evolve(self, **changes)

    def as_mapping(self) -> dict[str, Any]:
        """As a TOML file would hold it; `parse_spec` is its inverse."""
        data = asdict(self)
        data["site"] = data.pop("sites")
        for site in data["site"]:
            site["host"] = site.pop("hosts")
            for host in site["host"]:
                if host["label"] is None:
                    del host["label"]
        return data


def read_spec(path: Path) -> Spec:
    """The lab described by a TOML file. SpecError (one sentence) for whatever is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: is not UTF-8 text") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: is not TOML: {error}") from None
    except RecursionError:
        raise SpecError(f"{path}: is nested too deeply") from None
    return parse_spec(data, str(path))


def parse_spec(data: Mapping[str, Any], source: str) -> Spec:
    """The lab in a mapping as TOML gives it; `source` names it in errors."""
    top = _Table(data, source, "")
    sites = tuple(_site(table) for table in top.tables("site"))
    try:
        granularity = parse_value(Granularity, top.text("granularity", "location"))
    except ValueError:
        raise top.wrong("granularity", f"write {CHOICES[Granularity]}") from None
    try:
        internal_ips = parse_value(InternalIPs, top.text("internal_ips", "routed"))
    except ValueError:
        raise top.wrong("internal_ips", f"write {CHOICES[InternalIPs]}") from None
    values: dict[str, Any] = {
        "sites": sites,
        "etcd": top.integer("etcd", 1),
        "granularity": granularity,
        "internal_ips": internal_ips,
        "families": top.texts("families", ("ipv4",)),
        "lease_ttl": top.integer("lease_ttl", 5),
        "wireguard": top.text("wireguard", "auto"),
        "agents": top.boolean("agents", True),
        "open": top.boolean("open", False),
        "agent_args": top.texts("agent_args"),
        "etcd_args": top.texts("etcd_args"),
        "agent_command": top.texts("agent_command"),
        "next_steps": top.texts("next_steps"),
    }
    top.finish()
    try:
        return Spec(**values)
    except SpecError as error:
        raise SpecError(str(error).replace("the lab", source, 1)) from None


def _site(table: _Table) -> SiteSpec:
    name = table.text("name")
    number, public = table.integer("hosts", 0), table.integer("public", 0)
    label = table.optional_text("label")
    hosts = [HostSpec(name=f"{name}-{k}", public=k <= public, label=label) for k in range(1, number + 1)]
    for host in table.tables("host", required=False):
        hosts.append(
            HostSpec(
                name=host.text("name"),
                public=host.boolean("public", False),
                label=host.optional_text("label", label),
                subnet=host.integer("subnet", 0),
                args=host.texts("args"),
                families=host.texts("families"),
                agent=host.boolean("agent", True),
            )
        )
        host.finish()
    site = SiteSpec(
        name=name,
        hosts=tuple(hosts),
        subnets=table.texts("subnets"),
        latency_ms=table.number("latency_ms", 0.0),
        loss_percent=table.number("loss_percent", 0.0),
        mtu=table.integer("mtu", 1500),
        strict=table.boolean("strict", False),
        nat=table.text("nat", ""),
    )
    table.finish()
    return site


def _check(spec: Spec, source: str) -> None:
    """What holds for a lab however it was made."""

    def refuse(where: str, why: str) -> SpecError:
        return SpecError(f"{source}: {where}: {why}")

    if not spec.sites:
        raise refuse("site", "there is no site; add a [[site]] table")
    if len(spec.sites) > MAX_SITES:
        raise refuse("site", f"{len(spec.sites)} sites are more than {MAX_SITES}")
    if spec.etcd not in (1, 3):
        raise refuse("etcd", f"{spec.etcd} members are not possible here; write 1 or 3")
    if spec.lease_ttl < 2:
        raise refuse("lease_ttl", f"{spec.lease_ttl} s is below etcd's own floor of 2 s")
    if spec.wireguard not in WIREGUARD:
        raise refuse("wireguard", f"{spec.wireguard!r} is unknown; write {', '.join(WIREGUARD)}")
    if not spec.families or set(spec.families) - set(FAMILIES):
        raise refuse("families", 'write ["ipv4"], ["ipv6"] or both')
    holders: dict[str, str] = dict.fromkeys(RESERVED, "the lab itself")
    site_names: set[str] = set()
    for site in spec.sites:
        if not _NAME.fullmatch(site.name):
            raise refuse("site.name", f"{site.name!r} is no name: use a-z, 0-9 and - (at most 42 characters)")
        if site.name in site_names:
            raise refuse("site.name", f"two sites are called {site.name!r}")
        site_names.add(site.name)
        place = f"site {site.name}"
        if not site.hosts:
            raise refuse(place, "it has no hosts; write hosts = 3 or add [[site.host]] tables")
        networks = [_network(text, place, refuse) for text in site.subnets]
        for i, network in enumerate(networks):
            if any(network.version == other.version and network.overlaps(other) for other in networks[:i]):
                raise refuse(f"{place}.subnets", f"{network} overlaps another subnet of the site")
        if not 0 <= site.loss_percent <= 100:
            raise refuse(f"{place}.loss_percent", f"{site.loss_percent} is not within 0 to 100")
        if not 1280 <= site.mtu <= 65535:
            raise refuse(f"{place}.mtu", f"{site.mtu} is not within 1280 (the least that IPv6 needs) to 65535")
        if site.nat and site.nat not in NATS:
            raise refuse(f"{place}.nat", f"{site.nat!r} is unknown; write {', '.join(NATS)}")
        if site.latency_ms < 0:
            raise refuse(f"{place}.latency_ms", f"{site.latency_ms} is negative")
        for host in site.hosts:
            where = f"{place}, host {host.name}"
            if not _NAME.fullmatch(host.name):
                raise refuse(where, f"{host.name!r} is no host name: use a-z, 0-9 and - (at most 42 characters)")
            if host.name in holders:
                raise refuse(where, f"the name is taken already by {holders[host.name]}")
            holders[host.name] = place
            if set(host.families) - set(spec.families):
                raise refuse(f"{where}.families", f"choose among the lab's, which are {', '.join(spec.families)}")
            if not 0 <= host.subnet < max(1, len(networks)):
                raise refuse(f"{where}.subnet", f"there is no subnet number {host.subnet} (they count from 0)")
    if sum(host.public for host in spec.hosts) > MAX_PUBLIC:
        raise refuse("public", f"more than {MAX_PUBLIC} hosts are public")


def _network(text: str, place: str, refuse: Any) -> IPNetwork:
    try:
        network = ip_network(text)
    except ValueError as error:
        raise refuse(f"{place}.subnets", f"{text!r} is no network: {error}") from None
    if network.version != 4 or network.prefixlen > 28:
        raise refuse(f"{place}.subnets", f"{text} must be an IPv4 network of /28 or larger")
    return network


class _Table:
    """One TOML table being read; remembers which keys were asked for, so that the others can be refused."""

    def __init__(self, data: Mapping[str, Any], source: str, path: str) -> None:
        self._data, self._source, self._path = data, source, path
        self._known: set[str] = set()

    def wrong(self, key: str, why: str) -> SpecError:
        return SpecError(f"{self._source}: {self._path}{key}: {self._data.get(key)!r} is wrong: {why}")

    def _get(self, key: str, default: Any, kinds: type | tuple[type, ...], called: str) -> Any:
        self._known.add(key)
        if key not in self._data:
            if default is ...:
                raise SpecError(f"{self._source}: {self._path}{key} is missing")
            return default
        value = self._data[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise self.wrong(key, f"write {called}")
        return value

    def text(self, key: str, default: Any = ...) -> str:
        return str(self._get(key, default, str, "a text in quotes"))

    def optional_text(self, key: str, default: str | None = None) -> str | None:
        value = self._get(key, default, str, "a text in quotes")
        return None if value is None else str(value)

    def integer(self, key: str, default: Any = ...) -> int:
        return int(self._get(key, default, int, "a whole number"))

    def number(self, key: str, default: Any = ...) -> float:
        return float(self._get(key, default, (int, float), "a number"))

    def boolean(self, key: str, default: Any = ...) -> bool:
        return bool(self._get(key, default, bool, "true or false"))

    def texts(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        value = self._get(key, default, (list, tuple), "a list of texts")
        if not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "write a list of texts")
        return tuple(value)

    def tables(self, key: str, *, required: bool = True) -> Iterator[_Table]:
        value = self._get(key, ... if required else (), (list, tuple), f"[[{self._path}{key}]] tables")
        for number, item in enumerate(value, 1):
            if not isinstance(item, Mapping):
                raise self.wrong(key, f"write [[{self._path}{key}]] tables")
            yield _Table(item, self._source, f"{self._path}{key}[{number}].")

    def finish(self) -> None:
        """Refuse unknown keys."""
        for key in self._data:
            if key not in self._known:
                names = ", ".join(sorted(self._known))
                raise SpecError(f"{self._source}: {self._path}{key} is unknown; known here are {names}")
