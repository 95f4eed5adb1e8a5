"""The host plan: what one host's kernel must hold. The topology yields this value, the kernel layer realises it.

A plan is complete (what is not in it is removed, as far as it is ours) and says nothing about how it is
brought about. It names devices by role, not by name, so that it is the same whatever the interface is called.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from ipaddress import ip_network

from attrs import field, frozen

from kilo_etcd.model import DEFAULT_PORT, Endpoint, IPAddress, IPInterface, IPNetwork

TAKEOVER_CHECK_KEEPALIVE = 5
"""Seconds between keepalives to a peer whose handshake is a takeover check: the least that has a device send at once,
and little more."""


class Via(StrEnum):
    """By what a route leaves the host."""

    TUNNEL = "tunnel"
    """The WireGuard interface: allowed IPs choose the peer."""
    UNDERLAY = "underlay"
    """To a gateway on the location's network, on the same link."""
    IPIP = "ipip"
    """To a gateway on the location's network, encapsulated, whether it is on the same link or not."""


@frozen(kw_only=True)
class PeerPlan:
    """One WireGuard peer. `endpoint` may still be a DNS name; None leaves what the device has learnt.

    `allowed_ips` is sorted by (family, address, prefix length) and without duplicates; no network is in
    two peers of one plan. A peer that is allowed nothing is one that a handshake is wanted with,
    and no more.
    """

    public_key: str
    name: str
    """The node's or peer's name; for people."""
    endpoint: Endpoint | None = None
    observed: bool = False
    """The endpoint is an observed endpoint: it counts only while this host itself receives nothing from the peer."""
    allowed_ips: tuple[IPNetwork, ...] = ()
    persistent_keepalive: int = 0
    preshared_key: str | None = field(default=None, repr=False)

    @property
    def in_use(self) -> bool:
        """Whether packets are exchanged with it; else there are handshakes and no more."""
        return bool(self.allowed_ips)


@frozen(kw_only=True)
class RoutePlan:
    """One route in the main table, marked as ours by its protocol number."""

    destination: IPNetwork
    via: Via
    gateway: IPAddress | None = None
    """The next hop on the location's network for UNDERLAY and IPIP; None for TUNNEL."""
    source: IPAddress | None = None
    """Preferred source address: the host's mesh address, so that replies find their way back."""


@frozen(kw_only=True)
class Problem:
    """Something that the plan could not do, in a sentence an operator can act on."""

    subject: str
    """The node, peer or network concerned."""
    text: str
    about: str = ""
    """The node or peer that can mend it, where the subject is a network."""


@frozen(kw_only=True)
class ExitRoute:
    """The default route into the tunnel, which only the operator can ask for (decision 0013)."""

    families: frozenset[int] = frozenset()
    """In which packets for anywhere go to the exit node. In the other family they are refused at once: what was
    to go through the exit node must not bypass it."""
    by: tuple[RoutePlan, ...] = ()
    """The default routes that do not lead into the tunnel: a member's, to its leader. At most one per family."""
    bypass: tuple[IPNetwork, ...] = ()
    """Reached as if there were no tunnel: etcd, what is near. The peers' endpoints bypass it without being named."""
    sources: tuple[IPAddress, ...] = ()
    """The host's own addresses on the underlay: answers from there go as if there were no tunnel."""
    held: bool = False
    """The kernel's routes for it stay as they are: what must bypass it is not known
    yet."""

    @property
    def answers6(self) -> bool:
        """Whether there is an IPv6 address of the host's own that others can call, and are to be answered from."""
        return any(address.version == 6 for address in self.sources)


@frozen(kw_only=True)
class Exemption:
    """What is sent to a network, and taken from it, in clear although `encrypted` is on: `tcp/22@10.0.0.0/24`."""

    protocol: str
    """`tcp`, `udp` or `icmp`; with an IPv6 network `icmp` is ICMPv6."""
    port: int | None = None
    """Of the server, whichever of the two it is; None: any."""
    network: IPNetwork
    """Of the other side."""

    @classmethod
    def parse(cls, text: str) -> Exemption:
        """From `PROTOCOL[/PORT]@NETWORK`. ValueError, with a sentence, if it is none."""
        service, at, where = text.strip().partition("@")
        protocol, slash, port = service.partition("/")
        if protocol not in ("tcp", "udp", "icmp") or not at or (slash and not port):
            raise ValueError(
                f"{text!r} is not an exemption: write PROTOCOL[/PORT]@NETWORK with the protocol tcp, udp or icmp, "
                "for example tcp/22@10.0.0.0/24"
            )
        try:
            network = ip_network(where)
        except ValueError as error:
            raise ValueError(f"{text!r} does not name a network after the @: {error}") from None
        if not slash:
            return cls(protocol=protocol, network=network)
        if protocol == "icmp":
            raise ValueError(f"{text!r}: ICMP has no ports; write icmp@{where}")
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"{text!r}: {port} is not a port; ports are 1 to 65535")
        return cls(protocol=protocol, port=int(port), network=network)

    def __str__(self) -> str:
        return f"{self.protocol}{'' if self.port is None else f'/{self.port}'}@{self.network}"


@frozen(kw_only=True)
class Encryption:
    """What `encrypted` needs of the kernel: nothing that hosts of two segments say to each other travels in clear.

    The stages of the switch are in the values: an address is in `nodes` as soon as packets from it are accepted from
    the tunnel, in `send` once it accepts ours there, in `refuse` once it sends its own there.
    """

    nodes: Collection[IPAddress] = ()
    """Internal and endpoint addresses of other segments' nodes that may come out of the tunnel, whichever stage they
    are at. What is forwarded to them (containers) gets this host's own address."""
    send: Mapping[IPNetwork, RoutePlan] = field(factory=dict)
    """Host networks (/32, /128) -> the route of this host's own table; it never falls back to the main table."""
    hold: frozenset[IPNetwork] = frozenset()
    """Host networks that nothing leaves for, neither through a tunnel nor in clear."""
    refuse: Collection[IPAddress] = ()
    """Sources whose packets in clear are dropped, but for what is always left outside and `clear`. None of which this
    host gets packets by a leader that passes them on plain."""
    etcd: tuple[tuple[IPAddress, int], ...] = ()
    """Address and TCP port of etcd's endpoints, and of its members' peer ports if this host is one."""
    etcd_here: tuple[int, ...] = ()
    """TCP ports of the etcd member on this host."""
    talk: tuple[int, ...] = ()
    """UDP ports by which agents talk to each other in clear, on both sides the same."""
    sources: tuple[IPAddress, ...] = ()
    """This host's own addresses on the underlay, the preferred one of each family first: WireGuard and etcd answer from
    these, and forwarded packets leave with the first of their family."""
    accepted_sources: tuple[IPNetwork, ...] = ()
    """What the other segments take packets from by way of this host: what it forwards from there keeps its source. On
    members the mesh's subnets and what is behind the host, on leaders also the segment's members and networks."""
    clear: tuple[Exemption, ...] = ()
    """What the operator leaves in clear. It takes the main table, which has no route of ours to the addresses of `send`
    that are in such a network."""
    clear_sources: tuple[IPAddress, ...] = ()
    """This host's own endpoint addresses to which other nodes send in clear. What it sends from these, answers above
    all, leaves in clear too: out of a tunnel nobody would take it."""


@frozen(eq=False)
class PlanMemo:
    """What a step of `planning` keeps with a plan that it has made; each step has its own kind."""


@frozen(kw_only=True)
class HostPlan:
    """Everything that the kernel of one host shall hold for us.

    `revision` is the snapshot's; it takes no part in equality, since a plan that is otherwise equal needs no
    change of the kernel.
    """

    node: str
    revision: int = field(default=0, eq=False)
    addresses: tuple[IPInterface, ...] = ()
    """On the WireGuard interface, as /32 and /128."""
    listen_port: int = DEFAULT_PORT
    peers: Mapping[str, PeerPlan] = field(factory=dict)
    """Public key -> peer."""
    routes: Mapping[IPNetwork, RoutePlan] = field(factory=dict)
    """Destination -> route."""
    unreachable_routes: tuple[IPNetwork, ...] = ()
    """The mesh's subnets: where none of `routes` takes a packet for them it is refused, so that it does not leave in
    clear by the host's default route. And `refused`."""
    refused: Mapping[IPNetwork, str] = field(factory=dict)
    """Networks within the location that are refused, since the member that they are behind does not answer; why, as a
    sentence."""
    returns: Mapping[IPNetwork, RoutePlan] = field(factory=dict)
    """Of a leader: a member's internal IP (/32, /128) -> the way, IPIP or TUNNEL, of what comes out of the tunnel for
    it, as the member sends what is for there. What this host itself sends to the address takes the main table's way."""
    returns_refused: Mapping[IPNetwork, str] = field(factory=dict)
    """Of a leader: a member's internal IP that has never answered -> why, for people. What comes out of the tunnel for
    it is refused, so that it does not go in clear to whoever has the address here."""
    forwarding: frozenset[int] = frozenset()
    """Families (4, 6) in which the host must forward packets."""
    clamps: bool = False
    """This host forwards between the tunnel and other networks: TCP is told of the smaller MTU of the two sides (MSS
    clamping)."""
    ipip_remotes: frozenset[IPAddress] = frozenset()
    """Nodes of the location that IPIP packets are exchanged with; empty: no IPIP device is needed."""
    ipip_local: IPAddress | None = None
    behind: tuple[IPNetwork, ...] = ()
    """Networks behind this host itself: its containers, say."""
    masquerade: tuple[IPNetwork, ...] = ()
    """Networks of the location to which this host forwards what comes out of the tunnel, in its own name: who is there
    runs no agent and would not know how to answer."""
    masquerade_not: frozenset[IPAddress] = frozenset()
    """Addresses within them that do know: members of this host's segment."""
    is_exit_node: bool = False
    """This host is an exit node: it forwards and masquerades packets from the tunnel for destinations outside the
    mesh."""
    inside: tuple[IPNetwork, ...] = ()
    """Of an exit node: the networks that know the mesh's addresses and answer them."""
    blocked: tuple[IPNetwork, ...] = ()
    """Of an exit node: networks that it is attached to and leads to nobody: it is a way to the internet, not to hosts
    that trust their own link. What is offered (`inside`, `masquerade`, `behind`) is reached all the same."""
    exit_route: ExitRoute | None = None
    encryption: Encryption | None = None
    """None: nothing of it is in the kernel."""
    problems: tuple[Problem, ...] = ()
    memo: PlanMemo | None = field(default=None, eq=False, repr=False)
    """What `planning` needs to compute the next plan from this one; it means nothing to anyone else."""

    def routes_alone(self, address: IPAddress) -> bool:
        """Whether an internal IP has a route of its own, as those of other segments have: into the tunnel, or to the
        host's leader, which sends it into one."""
        return ip_network(address) in self.routes

    def leads_into_tunnel(self, address: IPAddress) -> bool:
        """Whether packets for an internal IP of another segment, which has a route of its own, go into the tunnel."""
        route = self.routes.get(ip_network(address))
        return route is not None and route.via is Via.TUNNEL
