"""What a host's kernel holds, as far as it concerns us, and the changes that can be made to it: values only.

A `Change` prints itself as the `ip`, `wg` or `sysctl` command line that would do the same; tests compare that
text, `--dry-run` shows it and debug logs carry it. No text and no `repr` ever contains a private or preshared key.
Nothing here reads or writes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from math import inf
from typing import Literal, TypeAlias

from attrs import evolve, field, frozen

from kilo_etcd.kernel.firewall.forward import AddForward, DeleteForward, ForwardRule
from kilo_etcd.kernel.firewall.openings import AddOpening, DeleteOpening, Opening, Place
from kilo_etcd.kernel.firewall.table import AddElements, DeleteElements, DeleteTable, FirewallTable, ReplaceTable
from kilo_etcd.kernel.netlink.formats import RT_TABLE_MAIN, rtnl
from kilo_etcd.kernel.routing.rules import AddRule, DeleteRule, RoutingRule
from kilo_etcd.model import DEFAULT_INTERFACE, Endpoint, IPAddress, IPInterface, IPNetwork

ROUTE_PROTOCOL = 107
"""Marks routes as ours (rtnetlink's `rtm_protocol`; 107 is in no list of well-known numbers)."""

PEER_PROTOCOL = 108
"""Routes of a machine that is a peer have this protocol number (`kgctl connect`). Several may run next to each other
and next to an agent, so of these routes only those that leave by one's own interface are one's own."""

UNREACHABLE_METRIC = 2**32 - 1
"""Of the routes that refuse packets: the worst one that there is, so that any other route comes first."""
MAIN_TABLE = RT_TABLE_MAIN

KERNEL_PROTOCOL: int = rtnl.rt_proto["kernel"]
"""The protocol number of the routes that the kernel itself makes for addresses."""
STATIC_PROTOCOLS: frozenset[int] = frozenset(rtnl.rt_proto[name] for name in ("boot", "static", "dhcp", "ra"))
"""The protocol numbers of routes that administrators and DHCP servers set. Routing daemons have others, and may set
very many routes."""

IPIP_OVERHEAD = 20
WIREGUARD_OVERHEAD = 80
"""Bytes: IPv6 40 + UDP 8 + WireGuard 32."""

Backend = Literal["kernel", "userspace"]


def is_ours(protocol: int, device: str, *, own: int, interface: str) -> bool:
    """Whether a route of `protocol` that leaves by `device` is of who marks routes as `own` and has `interface`."""
    return protocol == own and (own == ROUTE_PROTOCOL or device == interface)


def ipip_name(interface: str) -> str:
    """The IPIP device that belongs to a WireGuard interface (names have at most 15 characters)."""
    return "kilo-ipip" if interface == DEFAULT_INTERFACE else f"{interface[:10]}-ipip"


@frozen(kw_only=True)
class Setup:
    """How the kernel layer shall work on this host."""

    interface: str = DEFAULT_INTERFACE
    private_key: str = field(repr=False)
    """Base64."""
    mtu: int | None = None
    """None: the smallest MTU on the way to the peers' endpoints, minus 80; minus 20 more with IPIP."""
    wireguard: Literal["auto", "kernel", "userspace"] = "auto"
    userspace_command: str = "wireguard-go"
    forward_rules: bool = False
    """Whether to let mesh traffic through iptables' FORWARD."""
    clamp_mss: bool = True
    """Whether TCP that is forwarded is made to fit into the tunnel."""
    protocol: int = ROUTE_PROTOCOL
    """Marks our routes: ROUTE_PROTOCOL for an agent, PEER_PROTOCOL for a peer's machine."""
    runtime_dir: str = "/run/kilo-etcd"
    """Where the sysctls' former values are kept for `cleanup`."""
    uapi_dir: str = "/var/run/wireguard"
    """Where userspace WireGuard opens its sockets; fixed in every implementation, other values are for tests."""


@frozen(kw_only=True)
class Link:
    """A network device. `kind` is the kernel's: `wireguard`, `tun`, `ipip`, ... or empty for hardware."""

    name: str
    index: int = 0
    kind: str = ""
    up: bool = False
    mtu: int = 0


@frozen(kw_only=True)
class ObservedPeer:
    """A peer as the WireGuard device has it. `last_handshake` is in seconds on the clock of the reading that it is of,
    0 for never."""

    public_key: str
    endpoint: Endpoint | None = None
    allowed_ips: tuple[IPNetwork, ...] = ()
    persistent_keepalive: int = 0
    preshared_key: str | None = field(default=None, repr=False)
    last_handshake: float = 0.0
    rx_bytes: int = 0
    tx_bytes: int = 0


@frozen(kw_only=True)
class Route:
    """A route. `device` is the name of the device that it leaves by."""

    destination: IPNetwork
    gateway: IPAddress | None = None
    device: str = ""
    source: IPAddress | None = None
    protocol: int = ROUTE_PROTOCOL
    metric: int = 0
    onlink: bool = False
    unreachable: bool = False
    """It refuses packets (`unreachable`), at `UNREACHABLE_METRIC`."""
    table: int = MAIN_TABLE
    kind: str = ""
    """`throw`: look in the next table; `unreachable`: refuse; empty: the usual kind."""

    def __str__(self) -> str:
        kind = "unreachable" if self.unreachable else self.kind
        words = [kind, str(self.destination)] if kind else [str(self.destination)]
        if self.gateway is not None:
            family = "inet6 " if self.gateway.version == 6 and self.destination.version == 4 else ""
            words.append(f"via {family}{self.gateway}")
        if self.device:
            words.append(f"dev {self.device}")
        words.append(f"proto {self.protocol}")
        if self.source is not None:
            words.append(f"src {self.source}")
        if self.metric:
            words.append(f"metric {self.metric}")
        if self.onlink:
            words.append("onlink")
        if self.table != MAIN_TABLE:
            words.append(f"table {self.table}")
        return " ".join(words)


@frozen
class OwnTable:
    """A routing table of our own, but the main one."""

    routes: Mapping[IPNetwork, Route] = field(factory=dict)
    last: Mapping[IPNetwork, Route] = field(factory=dict)
    """What is left for a packet that none of `routes` takes, at `UNREACHABLE_METRIC`: it does not leave."""


@frozen
class Policy:
    """Policy routing of ours: our own tables by their numbers, and the rules that lead there or past them."""

    tables: Mapping[int, OwnTable] = field(factory=dict)
    """None of them is empty."""
    rules: frozenset[RoutingRule] = frozenset()

    def table(self, number: int) -> OwnTable:
        """The table of that number, which may have nothing in it."""
        return self.tables.get(number, _EMPTY)


_EMPTY = OwnTable()


def unreachable_route(network: IPNetwork) -> Route:
    """The route that refuses packets for a mesh subnet if no other route has them, instead of letting them leave by the
    default route."""
    return Route(destination=network, metric=UNREACHABLE_METRIC, unreachable=True)


class AllowedIPOwners:
    """The index of one state's peers, for the next state: there it is brought up to date, so it can be taken once."""

    def __init__(self, owner: dict[IPNetwork, str], peers: Mapping[str, ObservedPeer]) -> None:
        self._owner: dict[IPNetwork, str] | None = owner
        self._peers = peers

    def take(self, peers: Mapping[str, ObservedPeer]) -> dict[IPNetwork, str] | None:
        """Network -> public key of the peer that it belongs to. None: it is gone, or is about other peers than
        these."""
        owner, self._owner = self._owner, None
        return owner if peers is self._peers else None


@frozen(kw_only=True)
class Observed:
    """What was found on the host at `time` (Unix seconds).

    `link` is the device of our interface's name whether it is ours or not; `ours` says which. `foreign` maps
    each destination in the main table that somebody else's route has to that route.
    """

    time: float = 0.0
    link: Link | None = None
    uplink: Link | None = field(default=None, eq=False)
    """Of the devices by which packets to endpoints leave, one with the smallest MTU."""
    ours: bool = True
    public_key: str = ""
    """Of the device, whether it is ours or not; empty: it has no key."""
    listen_port: int = 0
    mark: int = 0
    """WireGuard's, on its own packets."""
    peers: Mapping[str, ObservedPeer] = field(factory=dict)
    addresses: frozenset[IPInterface] = frozenset()
    routes: Mapping[IPNetwork, Route] = field(factory=dict)
    duplicate_routes: tuple[Route, ...] = ()
    """More routes of ours to destinations that `routes` has already: left by somebody with another metric."""
    unreachable_routes: frozenset[IPNetwork] = frozenset()
    foreign: Mapping[IPNetwork, Route] = field(factory=dict)
    policy: Policy = field(factory=Policy)
    """What there is of `kernel.routing.policy`."""
    ipip: Link | None = None
    ipip_local: IPAddress | None = None
    ipip_ours: bool = True
    lacking: frozenset[int] = frozenset()
    """Families that the kernel has not at all: it takes no rules and no routes of them, and nothing leaves in them."""
    forwarding: frozenset[int] = frozenset()
    held_back: tuple[str, ...] = ()
    """Devices of ours that are kept from forwarding IPv4 although the host forwards it, as by `conf.default`."""
    advertised: tuple[str, ...] = ()
    """Interfaces that accept IPv6 router advertisements now, and would not once the host forwards IPv6."""
    underlay: tuple[str, ...] = ()
    """Devices with an address that `Encryption.sources` names, sorted."""
    strict: Mapping[str, str] = field(factory=dict)
    """Those of them, devices of ours, and `default` for new ones, whose rp_filter is strict -> the own value, next to
    which that of `all` counts."""
    loosened: Mapping[str, str] = field(factory=dict)
    """Devices that were made loose by us, and are -> the former value."""
    table: FirewallTable | None = None
    """The nftables table of our name."""
    forward_rules: frozenset[ForwardRule] = frozenset()
    forward_chains: Mapping[int, str] = field(factory=dict)
    """Family -> the chain that they belong in; looked at only where there are, or shall be, any."""
    dropping: frozenset[Place] = frozenset()
    """Other programs' nftables chains that drop what is forwarded for the mesh, but for rules of ours."""
    openings: frozenset[Opening] = frozenset()
    """Rules of ours in such chains."""
    owners: AllowedIPOwners | None = field(default=None, eq=False, repr=False)
    """Whose the allowed IPs of `peers` are, for `kernel.predict` to compute the next state from this one."""


@frozen(kw_only=True)
class Memory:
    """What the host cannot be asked: the endpoint that we set last, by public key (None: none was set)."""

    endpoints: Mapping[str, Endpoint | None] = field(factory=dict)
    former: Mapping[str, Former] = field(factory=dict)
    """Public key -> where the peer was stated to be until a moment ago."""
    unanswered: Mapping[str, Unanswered] = field(factory=dict)
    """Public key -> what is known of a peer that WireGuard has, or has had, at another endpoint than the stated one."""


@frozen
class Former:
    """The endpoints of a peer that were replaced by others a moment ago.

    A packet that the peer has sent from there and that arrives late has WireGuard follow it back (roaming). Where this
    host sends there again the peer goes on as before, and the new endpoint is never used.
    """

    endpoints: frozenset[Endpoint]
    since: float
    """Unix seconds: when the new one was set last."""
    until: float
    """Unix seconds: a peer that is found at one of them later has really gone back."""
    again: int
    """How many times the new endpoint is set again, at most."""


@frozen(kw_only=True)
class Unanswered:
    """Whether a peer answers where it is looked for (`kernel.unanswered`). Times are Unix seconds."""

    received: int
    """Bytes, at the last reading."""
    sent: int
    sent_at: float
    """The first reading, or the last one that found more sent."""
    since: float = inf
    """The first reading that found more sent, and nothing received so far."""
    set_at: float = -inf
    """When an endpoint was set last because the peer did not answer at another one."""
    other: Endpoint | None = None
    """The learnt endpoint that the stated one has taken the place of, which has the next turn."""


@frozen(kw_only=True)
class PeerActivity:
    """What the WireGuard device alone reports of its peers at `time` (Unix seconds)."""

    time: float = 0.0
    peers: Mapping[str, ObservedPeer] = field(factory=dict)
    """Public key -> peer."""
    set_back: float = 0.0
    """Seconds by which the host's clock is behind the latest date that it had, or dated a handshake by."""
    was_at: float = 0.0
    """That date (Unix seconds)."""
    seen: bool = False
    """Whether the clock was seen to go back; else a handshake of the future is all that says so."""

    def silence(self, peer: ObservedPeer) -> float:
        """Seconds since the last handshake; infinite if there was none."""
        return self.time - peer.last_handshake if peer.last_handshake else float("inf")


@frozen(kw_only=True)
class DeviceTarget:
    """What a plan leaves open: names, key, MTU."""

    interface: str = DEFAULT_INTERFACE
    public_key: str
    private_key: str = field(default="", repr=False)
    mtu: int = 1420
    ipip_mtu: int = 1480
    """Of the IPIP device: what the location's network takes, minus 20. Not the tunnel's own, which would hold up
    full-size packets from locations whose tunnels are wider."""
    backend: Backend = "kernel"
    userspace_command: str = "wireguard-go"
    forward_rules: bool = False
    clamp_mss: bool = True
    protocol: int = ROUTE_PROTOCOL

    @property
    def ipip(self) -> str:
        """The name of the IPIP device that belongs to the interface."""
        return ipip_name(self.interface)


@frozen
class CreateLink:
    """A device of the kernel; for `ipip`, `local` is the underlay address that it sends from."""

    name: str
    kind: str
    local: IPAddress | None = None

    def __str__(self) -> str:
        local = "" if self.local is None else f" local {self.local}"
        return f"ip link add {self.name} type {self.kind}{local}"


@frozen
class StartUserspace:
    """Starts a program that makes a userspace WireGuard device, such as wireguard-go."""

    name: str
    command: str

    def __str__(self) -> str:
        return f"{self.command} {self.name}"


@frozen
class DeleteLink:
    """Removes a device of ours. Its addresses and routes go with it."""

    name: str

    def __str__(self) -> str:
        return f"ip link del {self.name}"


@frozen
class SetMtu:
    """Sets the MTU of a device, in bytes."""

    name: str
    mtu: int

    def __str__(self) -> str:
        return f"ip link set {self.name} mtu {self.mtu}"


@frozen
class SetUp:
    """Brings a device up. Routes into it can be set only then."""

    name: str

    def __str__(self) -> str:
        return f"ip link set {self.name} up"


@frozen
class AddAddress:
    """Gives a device an address, with the length of its network."""

    name: str
    address: IPInterface

    def __str__(self) -> str:
        # Duplicate address detection would keep an IPv6 address unusable for a second.
        nodad = " nodad" if self.address.version == 6 else ""
        return f"ip address add {self.address} dev {self.name}{nodad}"


@frozen
class DeleteAddress:
    """Takes an address from a device. IPv4 routes that have it as their source go with it."""

    name: str
    address: IPInterface

    def __str__(self) -> str:
        return f"ip address del {self.address} dev {self.name}"


@frozen(kw_only=True)
class SetDevice:
    """None leaves the port, the key or the fwmark as it is."""

    name: str
    listen_port: int | None = None
    private_key: str | None = field(default=None, repr=False)
    public_key: str = ""
    """That belongs to `private_key`."""
    mark: int | None = None
    """0 takes it away."""

    def __str__(self) -> str:
        port = "" if self.listen_port is None else f" listen-port {self.listen_port}"
        key = "" if self.private_key is None else " private-key (hidden)"
        mark = "" if self.mark is None else f" fwmark {self.mark or 'off'}"
        return f"wg set {self.name}{port}{mark}{key}"


@frozen(kw_only=True)
class SetPeer:
    """A peer that is new, or what changes of one. None leaves a value as it is.

    With `replace_allowed_ips` the list is the whole list, without it the networks are added (and so taken away
    from the peer that had them, in the same transaction). It is in the order of `PeerPlan.allowed_ips`.
    With `reset` a peer that exists is removed first, in the same transaction, so that its session is forgotten.
    """

    name: str
    public_key: str
    new: bool = False
    endpoint: Endpoint | None = None
    persistent_keepalive: int | None = None
    preshared_key: str | None = field(default=None, repr=False)
    """An empty text removes it."""
    allowed_ips: tuple[IPNetwork, ...] = ()
    replace_allowed_ips: bool = False
    reset: bool = False

    def __str__(self) -> str:
        words = [f"wg set {self.name} peer {self.public_key}"]
        if self.reset:
            words.append(f"remove peer {self.public_key}")
        if self.preshared_key is not None:
            words.append("preshared-key (hidden)" if self.preshared_key else "preshared-key /dev/null")
        if self.endpoint is not None:
            words.append(f"endpoint {self.endpoint}")
        if self.persistent_keepalive is not None:
            words.append(f"persistent-keepalive {self.persistent_keepalive or 'off'}")
        if self.allowed_ips or self.replace_allowed_ips:
            # `wg` spells an addition with a leading plus (wireguard-tools 1.0.20250521 and later).
            plus = "" if self.replace_allowed_ips or self.new else "+"
            words.append("allowed-ips " + (",".join(f"{plus}{ip}" for ip in self.allowed_ips) or '""'))
        return " ".join(words)


@frozen
class RemovePeer:
    """Removes a peer from the WireGuard device, and its session with it."""

    name: str
    public_key: str

    def __str__(self) -> str:
        return f"wg set {self.name} peer {self.public_key} remove"


@frozen
class AddRoute:
    """Adds a route; the kernel refuses one to a destination that has a route of the same metric in the table."""

    route: Route

    def __str__(self) -> str:
        return f"ip route add {self.route}"


@frozen
class ReplaceRoute:
    """In place of a route of ours: one message, without a moment in which there is none."""

    route: Route

    def __str__(self) -> str:
        return f"ip route replace {self.route}"


@frozen
class DeleteRoute:
    """Removes a route of ours."""

    route: Route

    def __str__(self) -> str:
        return f"ip route del {self.route}"


@frozen
class SetForwarding:
    """For the whole host; with `device`, for a device of ours that is kept from it (IPv4 alone has such a switch)."""

    family: int
    device: str = ""

    @property
    def path(self) -> str:
        """The sysctl, below `/proc/sys`."""
        if self.device:
            return f"net/ipv4/conf/{self.device}/forwarding"
        return "net/ipv4/ip_forward" if self.family == 4 else "net/ipv6/conf/all/forwarding"

    def __str__(self) -> str:
        return f"sysctl -w {self.path if '.' in self.device else self.path.replace('/', '.')}=1"


@frozen
class AllowPings:
    """Let a group, by its number, use the kernel's echo sockets, where nobody may (the kernel's default)."""

    group: int

    @property
    def path(self) -> str:
        """The sysctl, below `/proc/sys`."""
        return "net/ipv4/ping_group_range"

    def __str__(self) -> str:
        return f"sysctl -w {self.path.replace('/', '.')}='{self.group} {self.group}'"


@frozen
class KeepAdvertisements:
    """Have an interface accept router advertisements although the host forwards IPv6."""

    name: str

    @property
    def path(self) -> str:
        """The sysctl, below `/proc/sys`."""
        return f"net/ipv6/conf/{self.name}/accept_ra"

    def __str__(self) -> str:
        # The name may have dots (eth0.100), so that slashes it must be.
        return f"sysctl -w {self.path if '.' in self.name else self.path.replace('/', '.')}=2"


@frozen
class LoosenReversePath:
    """Have a device take what comes from a source that is reached by another device (RFC 3704, loose)."""

    name: str

    @property
    def path(self) -> str:
        """The sysctl, below `/proc/sys`."""
        return reverse_path(self.name)

    def __str__(self) -> str:
        return f"sysctl -w {self.path if '.' in self.name else self.path.replace('/', '.')}=2"


def reverse_path(device: str) -> str:
    """The sysctl that says what a device does with sources that are reached by another one."""
    return f"net/ipv4/conf/{device}/rp_filter"


@frozen
class RestoreSysctl:
    """A sysctl gets the value back that it had before us."""

    path: str
    value: str

    def __str__(self) -> str:
        words = self.value.split()
        value = self.value if len(words) < 2 else f"'{' '.join(words)}'"
        dotted = "." in self.path
        return f"sysctl -w {self.path if dotted else self.path.replace('/', '.')}={value}"


LinkChange: TypeAlias = CreateLink | StartUserspace | DeleteLink | SetMtu | SetUp
WireGuardChange: TypeAlias = SetDevice | SetPeer | RemovePeer
RouteChange: TypeAlias = AddRoute | ReplaceRoute | DeleteRoute | AddRule | DeleteRule
TableChange: TypeAlias = ReplaceTable | AddElements | DeleteElements | DeleteTable
FilterChange: TypeAlias = TableChange | AddForward | DeleteForward | AddOpening | DeleteOpening
SysctlChange: TypeAlias = SetForwarding | AllowPings | KeepAdvertisements | LoosenReversePath | RestoreSysctl
AddressChange: TypeAlias = AddAddress | DeleteAddress
Change: TypeAlias = LinkChange | AddressChange | WireGuardChange | RouteChange | SysctlChange | FilterChange


@frozen(kw_only=True)
class FailedChange:
    """Something that could not be brought about, in one sentence that says what to do."""

    subject: str
    """The command that failed, or the network or device concerned."""
    text: str
    destination: IPNetwork | None = None
    """Where nothing but the route to this network is missing."""
    aside: bool = False
    """A host can lead its location without it."""
    version: int = 0
    """The family (4, 6) that the mesh does not have here without it: of an address, or of forwarding. 0: none."""

    def __str__(self) -> str:
        return self.text


@frozen(kw_only=True)
class ApplyReport:
    """What was changed, and what could not be."""

    changes: tuple[Change, ...] = ()
    failures: tuple[FailedChange, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences on what the kernel refuses at present and the mesh works without; these are no failures."""


class AddressScope(StrEnum):
    """How far an address of a host is valid, as `ip address` has it."""

    GLOBAL = "global"
    LINK = "link"
    HOST = "host"


@frozen(kw_only=True)
class HostAddress:
    """An address of the host, for finding the node's internal IP and endpoint."""

    interface: str
    index: int
    address: IPInterface
    scope: AddressScope = AddressScope.GLOBAL
    deprecated: bool = False
    temporary: bool = False
    kind: str = ""
    """The kind of the interface that has it: empty for hardware, else `bridge`, `wireguard`, ..."""
    up: bool = True

    @property
    def for_services(self) -> bool:
        """Whether it is on a device behind which there is no link, where addresses of services are put that several
        hosts may have: the loopback device or a dummy."""
        return self.interface == "lo" or self.kind == "dummy"


@frozen(kw_only=True)
class DefaultRoute:
    """A next hop of a default route of the host, for finding the interface and source address that it calls others
    from."""

    family: int
    """4 or 6."""
    interface: str
    gateway: IPAddress | None
    metric: int = 0
    source: IPAddress | None = None
    """The address that the host prefers as the source of what it sends there."""


@frozen
class StaticRoute:
    """A network that the host reaches by a device, whether over a gateway or not."""

    destination: IPNetwork
    interface: str
    kind: str = ""
    """Of the device."""


@frozen(kw_only=True)
class HostAddresses:
    """What `list_addresses` finds; default routes with the lowest metric first, each next hop by itself."""

    addresses: tuple[HostAddress, ...] = ()
    default_routes: tuple[DefaultRoute, ...] = ()
    links: tuple[Link, ...] = ()
    static_routes: tuple[StaticRoute, ...] = ()
    """Routes of the main table, without default routes, that an administrator or a DHCP server has set."""


def without_counters(observed: Observed) -> Observed:
    """The same without what changes by itself, for comparing two observations."""
    peers = {
        key: evolve(peer, last_handshake=0.0, rx_bytes=0, tx_bytes=0, endpoint=None)
        for key, peer in observed.peers.items()
    }
    return evolve(observed, time=0.0, peers=peers)
