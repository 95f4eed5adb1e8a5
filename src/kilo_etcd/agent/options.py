"""The command-line flags of `kg`: their names, environment and meaning.

One table holds them; etcd's flags and `--prefix`, which `kgctl` has too, are in `runtime.options`. The click decorator,
the unit's environment file and its test are all made from the tables, so a flag cannot exist in one place only.
Checking is done by `AgentConfig.build` and `etcd_config`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from kilo_etcd.agent.config import DEFAULT_LISTEN, AgentConfig, Probe, WireGuardKind
from kilo_etcd.model import (
    DEFAULT_INTERFACE,
    DEFAULT_PORT,
    DEFAULT_STATE_DIR,
    DEFAULT_SUBNET,
    PEER_QUERY_PORT,
    Encapsulate,
    Granularity,
    InternalIPs,
)
from kilo_etcd.runtime.options import PREFIX, Flag, etcd_config, etcd_flags, kilo_flag, refuse_variables, with_flags
from kilo_etcd.runtime.parsing import LOG_LEVELS

F = TypeVar("F", bound=Callable[..., Any])

_AGENT = (
    kilo_flag("--hostname", "", "The node's name in the mesh (default: the system's host name)."),
    kilo_flag(
        "--location", "", "The node's location, unless a label in etcd overrides it (default: cloud-init's region)."
    ),
    kilo_flag("--interface", DEFAULT_INTERFACE, "The WireGuard interface."),
    kilo_flag("--port", str(DEFAULT_PORT), "The UDP port of WireGuard."),
    kilo_flag(
        "--mesh-granularity",
        "",
        "How segments are formed, if etcd has no setting yet (default: location).",
        choices=tuple(Granularity),
    ),
    kilo_flag(
        "--internal-ips",
        "",
        "Which traffic to the hosts' internal IPs travels in the tunnels, if etcd has no setting yet "
        "(default: routed).",
        choices=tuple(InternalIPs),
    ),
    kilo_flag(
        "--clear",
        "",
        "Traffic with other nodes that stays in clear under internal-ips=encrypted, such as "
        "tcp/22@10.0.0.0/24 (PROTOCOL[/PORT]@NETWORK); several times or comma-separated.",
        several=True,
    ),
    kilo_flag(
        "--subnet",
        "",
        "The network of the mesh addresses, if etcd has no setting yet; one per family, comma-separated "
        f"(default: {DEFAULT_SUBNET}).",
    ),
    kilo_flag(
        "--renumber",
        "false",
        "At the start, replace a mesh address outside etcd's mesh/subnets by one within.",
        switch=True,
    ),
    kilo_flag(
        "--encapsulate",
        Encapsulate.CROSSSUBNET.value,
        "When packets between nodes of one location are encapsulated.",
        choices=tuple(Encapsulate),
    ),
    kilo_flag("--mtu", "auto", "The MTU of the WireGuard interface: auto or a number of bytes."),
    kilo_flag(
        "--internal-cidr",
        "",
        "Only addresses within this network may be the internal IP; several times or comma-separated.",
        several=True,
    ),
    kilo_flag(
        "--prioritise-private-addresses",
        "false",
        "Prefer a private address to a public one for the endpoint.",
        switch=True,
    ),
    kilo_flag("--endpoint", "", "The host:port at which other locations reach this node (default: discovered)."),
    kilo_flag("--persistent-keepalive", "0", "Seconds between keepalives to this node's peers; 0 is off."),
    kilo_flag("--resync-period", "30s", "How often the kernel is compared with the plan, whatever else happens."),
    kilo_flag(
        "--clean-up",
        "false",
        "On stopping, leave the mesh and remove everything that the agent made.",
        switch=True,
        negative="--no-clean-up",
    ),
    kilo_flag(
        "--probe",
        Probe.AUTO.value,
        "Whether this host probes leaders and members of its location, and reports in etcd if "
        "packets do not get through.",
        choices=tuple(Probe),
    ),
    kilo_flag(
        "--forward-rules",
        "false",
        "Let forwarded mesh traffic through the forward chains that drop it: docker's, firewalld's, any other's.",
        switch=True,
        negative="--no-forward-rules",
    ),
    kilo_flag(
        "--clamp-mss",
        "true",
        "Have TCP that this host forwards fit into the tunnel: lower the segment size (MSS) in its handshakes.",
        switch=True,
        negative="--no-clamp-mss",
    ),
    kilo_flag(
        "--dns-hosts",
        "false",
        "Keep the names of all nodes and peers in /etc/hosts: NAME.mesh, and NAME where nothing else has it.",
        switch=True,
        negative="--no-dns-hosts",
    ),
    kilo_flag(
        "--wireguard",
        WireGuardKind.AUTO.value,
        "Which WireGuard to use; auto takes the kernel's if there is one.",
        choices=tuple(WireGuardKind),
    ),
    kilo_flag("--userspace-command", "wireguard-go", "The userspace WireGuard to start if one is needed."),
    PREFIX,
    kilo_flag(
        "--endpoints-from-cluster",
        "false",
        "Follow etcd's member list: connect to the members' client URLs, and to --endpoints if none of them answers.",
        switch=True,
        negative="--no-endpoints-from-cluster",
    ),
    kilo_flag("--lease-ttl", "5s", "How long a silent leader keeps its place; at least 2s, in whole seconds."),
    kilo_flag(
        "--forget-after",
        "24h",
        "How long a node that is gone stays a member; for as long again its mesh address is kept for it.",
    ),
    kilo_flag(
        "--ephemeral",
        "false",
        "This host is short-lived: its record, mesh address and status go when it stops, or with its short lease; a "
        "stop removes interface and routes too.",
        switch=True,
        negative="--no-ephemeral",
    ),
    kilo_flag("--state-dir", DEFAULT_STATE_DIR, "Where the private key and the cached snapshot are kept."),
    kilo_flag(
        "--listen", DEFAULT_LISTEN, "Where /metrics and /health are served; :1107 is everywhere, off is nowhere."
    ),
    kilo_flag(
        "--peer-query-port",
        str(PEER_QUERY_PORT),
        "The UDP port at which nodes ask each other while etcd is away; the same on all hosts of a mesh.",
    ),
    kilo_flag("--log-level", "info", "The lowest level that is logged.", choices=(*LOG_LEVELS, "all", "warn")),
    kilo_flag("--dry-run", "false", "Print what would be changed, change nothing, and end.", switch=True),
)  # fmt: skip


def agent_flags() -> Iterator[Flag]:
    """The flags of `kg`, etcd's not among them, in the order of its help."""
    yield from _AGENT


def all_flags() -> Iterator[Flag]:
    """Every flag of `kg`: what the unit's environment file may set."""
    yield from etcd_flags()
    yield from _AGENT


def agent_options(command: F) -> F:
    """Give a click command all flags of `kg`, etcd's among them; it is called with `config`, an AgentConfig."""

    def build(values: dict[str, Any]) -> AgentConfig:
        refuse_variables("kg")
        etcd = etcd_config(**{flag.parameter: values.pop(flag.parameter) for flag in etcd_flags()})
        values["hostname"] = values["hostname"] or socket.gethostname()
        return AgentConfig.build(**values, etcd=etcd)

    return with_flags(command, tuple(all_flags()), "config", build)
