"""The settings of one agent, from its command line and its environment, read and checked.

`AgentConfig.build` takes the texts as an operator writes them and yields one frozen value; it reads no file and
asks no kernel, and every refusal is one sentence with the flag and its environment variable (`click.BadParameter`,
so that `kg` ends with it and without a traceback). Which flags exist and what they mean is `agent.options`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from ipaddress import ip_address, ip_network
from pathlib import Path

from attrs import field, frozen

from kilo_etcd.etcd.api import Config
from kilo_etcd.model import (
    DEFAULT_INTERFACE,
    DEFAULT_PORT,
    DEFAULT_PREFIX,
    DEFAULT_STATE_DIR,
    DEFAULT_SUBNET,
    LARGEST_MTU,
    PEER_QUERY_PORT,
    SMALLEST_MTU,
    Encapsulate,
    Endpoint,
    Granularity,
    InternalIPs,
    IPNetwork,
)
from kilo_etcd.model.hostplan import Exemption
from kilo_etcd.runtime.parsing import (
    one_of,
    parse_duration,
    parse_interface,
    parse_log_level,
    parse_own_name,
    parse_prefix,
    read,
)

LEASE_TTL_FLOOR = 2.0
"""Seconds. etcd grants no lease shorter than 1.5 election timeouts, which is 2 s with its defaults."""

DEFAULT_LISTEN = "127.0.0.1:1107"
"""Kilo's port, but on loopback: a mesh host is often on the open internet, where an unauthenticated page
about it should be the operator's decision (`--listen :1107`), not ours."""


class WireGuardKind(StrEnum):
    """Which WireGuard the agent uses."""

    AUTO = "auto"
    """The kernel's where it has one, else a userspace one."""
    KERNEL = "kernel"
    USERSPACE = "userspace"


class Probe(StrEnum):
    """Whether hosts try if packets get through leaders, and reach the members of their location."""

    AUTO = "auto"
    OFF = "off"


@frozen
class ListenAddress:
    """Where metrics and health are served; an empty host is all addresses of both families."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@frozen(kw_only=True)
class AgentConfig:
    """How one agent shall behave. All durations are in seconds."""

    hostname: str
    location: str | None = None
    """The default location; None: not given, so cloud-init's region counts, else the default location."""
    interface: str = DEFAULT_INTERFACE
    port: int = DEFAULT_PORT
    mesh_granularity: Granularity | None = None
    """What this agent puts into an empty etcd (None: not given, so `location`); after that the mesh's own counts."""
    internal_ips: InternalIPs | None = None
    """The same for what of the internal IPs' traffic travels in the tunnels; None: `routed`."""
    clear: tuple[Exemption, ...] = ()
    """Traffic with other nodes that stays in clear although `encrypted` is in force."""
    subnets: tuple[IPNetwork, ...] = (ip_network(DEFAULT_SUBNET),)
    """At most one per family, never empty; for an empty etcd too."""
    subnets_given: bool = False
    """Whether the operator chose them: an agent that was told nothing cannot disagree with the mesh."""
    encapsulate: Encapsulate = Encapsulate.CROSSSUBNET
    mtu: int | None = None
    """None: from the egress interface."""
    internal_cidrs: tuple[IPNetwork, ...] = ()
    """Where not empty, only addresses within them may be internal IPs."""
    prioritise_private: bool = False
    resync_period: float = 30.0
    clean_up: bool = False
    probe: bool = True
    """Whether this host is a prober of leaders."""
    renumber: bool = False
    """Whether a mesh address outside of etcd's `mesh/subnets` is given up for one within, at the start."""
    forward_rules: bool = False
    """Whether mesh traffic is let through a FORWARD chain whose policy is drop."""
    clamp_mss: bool = True
    """Whether TCP that this host forwards is made to fit into the tunnel."""
    dns_hosts: bool = False
    """Whether the hosts file holds the names of the mesh."""
    log_level: str = "info"
    wireguard: WireGuardKind = WireGuardKind.AUTO
    userspace_command: tuple[str, ...] = ("wireguard-go",)
    prefix: str = DEFAULT_PREFIX
    lease_ttl: float = 5.0
    """Whole seconds (etcd knows no others), at least LEASE_TTL_FLOOR."""
    forget_after: float = 86400.0
    """Whole seconds."""
    ephemeral: bool = False
    """Whether the host's record and claims go with its short lease."""
    state_dir: Path = field(default=Path(DEFAULT_STATE_DIR))
    listen: ListenAddress | None = ListenAddress("127.0.0.1", 1107)
    """None: nothing is served."""
    peer_query_port: int = PEER_QUERY_PORT
    """Where this host takes peer queries, and where it sends its own: one for the whole mesh."""
    endpoint: Endpoint | None = None
    """Forces the endpoint that this node registers; None: discovered."""
    persistent_keepalive: int = 0
    dry_run: bool = False
    etcd: Config = field(factory=Config)
    """How to reach etcd (etcdctl's flags)."""
    endpoints_from_cluster: bool = False
    """Whether the agent connects to the members that etcd lists."""

    @property
    def wanted_subnets(self) -> tuple[IPNetwork, ...]:
        """The subnets that the operator chose for this agent, which may differ from the mesh's; none: no choice."""
        return self.subnets if self.subnets_given else ()

    @classmethod
    def build(
        cls,
        *,
        hostname: str,
        location: str | None = None,
        interface: str = DEFAULT_INTERFACE,
        port: str = str(DEFAULT_PORT),
        mesh_granularity: str = "",
        internal_ips: str = "",
        clear: str | Iterable[str] = (),
        subnet: str | Iterable[str] = "",
        encapsulate: str = "crosssubnet",
        mtu: str = "auto",
        internal_cidr: str | Iterable[str] = (),
        prioritise_private_addresses: bool = False,
        resync_period: str = "30s",
        clean_up: bool = False,
        probe: str = "auto",
        renumber: bool = False,
        forward_rules: bool = False,
        clamp_mss: bool = True,
        dns_hosts: bool = False,
        log_level: str = "info",
        wireguard: str = "auto",
        userspace_command: str = "wireguard-go",
        prefix: str = DEFAULT_PREFIX,
        lease_ttl: str = "5s",
        forget_after: str = "24h",
        ephemeral: bool = False,
        state_dir: str = DEFAULT_STATE_DIR,
        listen: str = DEFAULT_LISTEN,
        peer_query_port: str = str(PEER_QUERY_PORT),
        endpoint: str = "",
        persistent_keepalive: str = "0",
        dry_run: bool = False,
        endpoints_from_cluster: bool = False,
        etcd: Config | None = None,
    ) -> AgentConfig:
        """The configuration that these texts mean, one parameter per flag; click.BadParameter where one is wrong."""
        listen_port = read("--port", lambda: parse_number(port, 1, 65535))
        chosen = bool(_items(subnet))
        ttl = read("--lease-ttl", lambda: _whole_seconds(lease_ttl, LEASE_TTL_FLOOR))
        return cls(
            hostname=read("--hostname", lambda: parse_own_name(hostname)),
            # An empty KILO_LOCATION= line in an environment file means that nobody has decided.
            location=location or None,
            interface=read("--interface", lambda: parse_interface(interface)),
            port=listen_port,
            mesh_granularity=read(
                "--mesh-granularity", lambda: one_of(Granularity, mesh_granularity) if mesh_granularity else None
            ),
            internal_ips=read("--internal-ips", lambda: one_of(InternalIPs, internal_ips) if internal_ips else None),
            clear=read("--clear", lambda: tuple(map(Exemption.parse, _items(clear)))),
            subnets=read("--subnet", lambda: parse_subnets(subnet if chosen else DEFAULT_SUBNET)),
            subnets_given=chosen,
            encapsulate=read("--encapsulate", lambda: one_of(Encapsulate, encapsulate)),
            mtu=read("--mtu", lambda: parse_mtu(mtu)),
            internal_cidrs=read("--internal-cidr", lambda: tuple(map(parse_network, _items(internal_cidr)))),
            prioritise_private=prioritise_private_addresses,
            resync_period=read("--resync-period", lambda: _at_least(parse_duration(resync_period), 1.0)),
            clean_up=clean_up,
            probe=read("--probe", lambda: one_of(Probe, probe)) is Probe.AUTO,
            renumber=renumber,
            forward_rules=forward_rules,
            clamp_mss=clamp_mss,
            dns_hosts=dns_hosts,
            log_level=read("--log-level", lambda: parse_log_level(log_level)),
            wireguard=read("--wireguard", lambda: one_of(WireGuardKind, wireguard)),
            userspace_command=read("--userspace-command", lambda: parse_command(userspace_command)),
            prefix=read("--prefix", lambda: parse_prefix(prefix)),
            lease_ttl=ttl,
            forget_after=read("--forget-after", lambda: _whole_seconds(forget_after, ttl)),
            ephemeral=ephemeral,
            state_dir=read("--state-dir", lambda: _absolute(state_dir)),
            listen=read("--listen", lambda: parse_listen(listen)),
            peer_query_port=read("--peer-query-port", lambda: _other_port(peer_query_port, listen_port)),
            endpoint=read("--endpoint", lambda: Endpoint.parse(endpoint, listen_port) if endpoint.strip() else None),
            persistent_keepalive=read("--persistent-keepalive", lambda: _keepalive(persistent_keepalive)),
            dry_run=dry_run,
            endpoints_from_cluster=endpoints_from_cluster,
            etcd=Config() if etcd is None else etcd,
        )


def _other_port(text: str, port: int) -> int:
    number = parse_number(text, 1, 65535)
    if number == port:
        raise ValueError(f"{number} is WireGuard's port (--port); name another one")
    return number


def parse_number(text: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    text = text.strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ValueError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)


def parse_network(text: str) -> IPNetwork:
    """A network in CIDR notation, host bits zero."""
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is no network; write for instance 10.4.0.0/16") from None
    raise ValueError(f"{text!r} has host bits set; did you mean {network}?")


def parse_subnets(value: str | Iterable[str]) -> tuple[IPNetwork, ...]:
    """The mesh's subnets: one or two, one per family, each with room for more than one host."""
    networks = tuple(map(parse_network, _items(value)))
    if not networks:
        raise ValueError("no subnet is given; write for instance 10.4.0.0/16")
    for network in networks:
        if sum(other.version == network.version for other in networks) > 1:
            raise ValueError(f"there is more than one IPv{network.version} subnet; give one per family")
        if network.max_prefixlen - network.prefixlen < 2 or network.prefixlen == 0:
            raise ValueError(f"{network} has no sensible size for a mesh; write for instance 10.4.0.0/16")
    return networks


def parse_mtu(text: str) -> int | None:
    """Bytes; None: `auto`. ValueError says what was expected."""
    return None if text.strip() in ("", "auto") else parse_number(text, SMALLEST_MTU[4], LARGEST_MTU)


def too_small_for(mtu: int | None, subnets: Iterable[IPNetwork]) -> str | None:
    """Why `--mtu` cannot be used with a mesh of these subnets, as a sentence; None where it can."""
    six = next((subnet for subnet in subnets if subnet.version == 6), None)
    if mtu is None or mtu >= SMALLEST_MTU[6] or six is None:
        return None
    return (
        f"--mtu {mtu} is too small: the mesh has the IPv6 subnet {six}, and Linux removes IPv6 from a device of less "
        f"than {SMALLEST_MTU[6]} bytes; give {SMALLEST_MTU[6]} or more, or auto"
    )


def parse_listen(text: str) -> ListenAddress | None:
    """`host:port`, `[v6]:port` or `:port`; `off` or empty: None. The host is an address, since names can change."""
    text = text.strip()
    # An empty environment variable is as good as none, so a value is needed there.
    if text in ("", "off"):
        return None
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        raise ValueError(f"{text!r} is no listen address; write for instance 127.0.0.1:1107 or :1107")
    host = host.strip("[]")
    if host and host != "localhost":
        try:
            ip_address(host)
        except ValueError:
            raise ValueError(f"{text!r} is no listen address; {host!r} is no IP address") from None
    return ListenAddress("127.0.0.1" if host == "localhost" else host, parse_number(port, 0, 65535))


def parse_command(text: str) -> tuple[str, ...]:
    """A command and its arguments, split as a shell would."""
    import shlex

    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is no command: {error}") from None
    if not words:
        raise ValueError("the command is empty; write for instance wireguard-go")
    return words


def _items(value: str | Iterable[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    return tuple(item.strip() for text in texts for item in text.split(",") if item.strip())


def _at_least(seconds: float, floor: float) -> float:
    if seconds < floor:
        raise ValueError(f"{seconds:g} s is too short; give at least {floor:g}s")
    return seconds


def _whole_seconds(text: str, floor: float) -> float:
    seconds = _at_least(parse_duration(text), floor)
    if seconds != int(seconds):
        raise ValueError(f"{seconds:g} s is no whole number of seconds, and etcd's leases know no others")
    return seconds


def _keepalive(text: str) -> int:
    seconds = parse_duration(text)
    if seconds != int(seconds) or not 0 <= seconds <= 65535:
        raise ValueError(f"{text!r} is not a whole number of seconds from 0 (off) to 65535")
    return int(seconds)


def _absolute(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is no absolute path; write for instance {DEFAULT_STATE_DIR}")
    return Path(text)
