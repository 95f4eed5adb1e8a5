"""The host as it is: reads an `Observed`, makes `Change`s. Blocking and synchronous, for one thread at a time.

It decides nothing (that is `kernel.diff`) and remembers only indexes of links. Each group of like changes goes out
in one batch; what fails is told apart, and the rest is made all the same.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from attrs import evolve

from kilo_etcd.kernel import ipvs, sysctl, userspace, wireguard
from kilo_etcd.kernel.device_keys import DeviceKeys
from kilo_etcd.kernel.errors import NO_PERMISSION, KernelError, NetlinkError, failure, taken, why_not
from kilo_etcd.kernel.firewall.chains import Obstacle, Refusal
from kilo_etcd.kernel.firewall.destinations import OwnAddresses
from kilo_etcd.kernel.firewall.forward import AddForward, DeleteForward
from kilo_etcd.kernel.firewall.forwardchains import ForwardChains
from kilo_etcd.kernel.firewall.iptables import Iptables
from kilo_etcd.kernel.firewall.netfilter import Netfilter
from kilo_etcd.kernel.firewall.openings import AddOpening, DeleteOpening
from kilo_etcd.kernel.firewall.packet_filter import table_name
from kilo_etcd.kernel.firewall.table import AddElements, DeleteElements, DeleteTable, ReplaceTable
from kilo_etcd.kernel.handshake_clock import HandshakeClock
from kilo_etcd.kernel.needs import leads_into_tunnel, needs, provides
from kilo_etcd.kernel.netlink import sockets
from kilo_etcd.kernel.netlink.codec import FormatError
from kilo_etcd.kernel.netlink.formats import core
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.read.rtnl import FoundLink, WholeRoute
from kilo_etcd.kernel.read.wireguard import DeviceState
from kilo_etcd.kernel.routing import nexthops
from kilo_etcd.kernel.routing import tables as routing
from kilo_etcd.kernel.routing.bypasses import bypasses, suspects
from kilo_etcd.kernel.routing.exit_node import MARK
from kilo_etcd.kernel.routing.policy import onward_tables, removal
from kilo_etcd.kernel.routing.rules import AddRule, DeleteRule, ForeignRule
from kilo_etcd.kernel.state import (
    KERNEL_PROTOCOL,
    MAIN_TABLE,
    ROUTE_PROTOCOL,
    STATIC_PROTOCOLS,
    AddAddress,
    AddressScope,
    AddRoute,
    AllowPings,
    Backend,
    Change,
    CreateLink,
    DefaultRoute,
    DeleteAddress,
    DeleteLink,
    DeleteRoute,
    FailedChange,
    HostAddress,
    HostAddresses,
    KeepAdvertisements,
    Link,
    LoosenReversePath,
    Observed,
    PeerActivity,
    RemovePeer,
    ReplaceRoute,
    RestoreSysctl,
    Route,
    SetDevice,
    SetForwarding,
    SetMtu,
    SetPeer,
    SetUp,
    StartUserspace,
    StaticRoute,
    WireGuardChange,
    ipip_name,
    is_ours,
    reverse_path,
    unreachable_route,
)
from kilo_etcd.kernel.write import rtnl as requests
from kilo_etcd.model import IPAddress, IPInterface, IPNetwork
from kilo_etcd.model.hostplan import HostPlan

_CAP_NET_ADMIN = 12
"""Its bit in the mask that /proc shows (linux/capability.h)."""
_NO_SUCH_FAMILY = frozenset({errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.ENOENT})
"""What a dump says where there is no such family, or no such table."""
_NOBODY_THERE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOENT, errno.ENODEV, errno.EPIPE})
"""What reading a device says whose process, or which itself, has gone since it was found."""
_ALREADY = {
    AddAddress: {errno.EEXIST},
    DeleteAddress: {errno.EADDRNOTAVAIL, errno.ENODEV},
    DeleteRoute: {errno.ESRCH, errno.ENODEV},
    DeleteLink: {errno.ENODEV},
    KeepAdvertisements: {errno.ENOENT},
    AddRule: {errno.EEXIST},
    DeleteRule: {errno.ENOENT},
}
"""Errors that say that what was wanted is so already."""

_TUNNELS = ("wireguard", "tun")
"""The kinds of device that WireGuard has."""

_Batched = AddAddress | DeleteAddress | AddRoute | ReplaceRoute | DeleteRoute | AddRule | DeleteRule


def may_change_the_network() -> bool:
    """Whether this process has CAP_NET_ADMIN."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    except OSError:
        pass
    return True


class Host:
    """One network namespace's devices, addresses, routes and WireGuard device of the name `interface`."""

    def __init__(
        self,
        interface: str,
        uapi_dir: str = "/var/run/wireguard",
        runtime_dir: str = "/run/kilo-etcd",
        *,
        public_key: str = "",
        forward_rules: bool = False,
        protocol: int = ROUTE_PROTOCOL,
    ):
        self.interface = interface
        self._public_key = public_key
        """This host's, if it is known: a device that has it is ours."""
        self.protocol = protocol
        self.ipip = ipip_name(interface)
        self._record = Path(runtime_dir) / f"{interface}.sysctl.json"
        self.device_keys = DeviceKeys(runtime_dir)
        self._route = sockets.Socket(core.NETLINK_ROUTE)
        self._generic = wireguard.generic_socket()
        self.netfilter = Netfilter()
        self._forward_rules = forward_rules
        self._iptables = Iptables(interface, Path(runtime_dir) / f"{interface}.forward", self.netfilter.generation)
        self._chains = ForwardChains(
            interface,
            Path(runtime_dir) / f"{interface}.openings",
            self.netfilter,
            self._iptables,
            opening=forward_rules,
            own=self._own_addresses,
            routed=lambda networks: routing.devices_to(self._route, networks, self.links),
        )
        self.userspace = userspace.UserspaceDevice(uapi_dir, runtime_dir)
        self._kernel: wireguard.KernelDevice | None = None
        self._writes = 0
        self.handshake_clock = HandshakeClock()
        self.links: dict[int, Link] = {}
        self.egress: set[int] = set()
        """Indexes of the devices that `egress_mtus` has come upon."""
        self._devices: tuple[str, ...] = ()
        """By which mesh packets go on to the location, when last read; else the devices with a default route."""
        self.uplinks: dict[int, tuple[tuple[int, int], ...]] = {}
        """Of the default routes that others have set in the main table, when last read: the index of each next hop's
        device -> family and metric of the routes that it belongs to."""
        self.several = False
        """Whether, when last read, a route of the main table had several next hops, or default routes of one family had
        the same metric."""
        self._objects: Mapping[int, nexthops.Hops] = {}
        """The nexthop objects when routes were last read, if these are told without what the objects say."""
        self.ways: set[int] = set()
        """Indexes of the devices that routes of ours leave by, and of those that some did since they were last read."""

    def close(self) -> None:
        """Close the sockets. What is on the host stays as it is."""
        self._route.close()
        self._generic.close()
        self.netfilter.close()

    @property
    def port(self) -> int:
        """The kernel's number for the socket that routes are set by."""
        return self._route.port

    @property
    def writes(self) -> int:
        """How many messages that change something were sent so far: netlink, UAPI, iptables, sysctl."""
        written = self._writes + self.netfilter.writes + self._iptables.writes + self.userspace.writes
        return written + (self._kernel.writes if self._kernel else 0)

    def obstacles(self, plan: HostPlan | None) -> tuple[Obstacle, ...]:
        """What of this host's own settings drops mesh traffic that it forwards, or may do so."""
        return self._chains.obstacles(plan, self._devices)

    def refusals(self, plan: HostPlan | None) -> tuple[Refusal, ...]:
        """What drops all of TCP or UDP that this host itself sends to the mesh or gets from it."""
        return () if plan is None else self._chains.refusals(plan, self._devices)

    def bypasses(self, plan: HostPlan | None) -> tuple[str, ...]:
        """Rules of others by which packets leave in clear that `plan` has encrypted, as sentences."""
        if plan is None or plan.encryption is None:
            return ()
        rules = suspects(plan, routing.foreign_rules(self._route, self.protocol), self.interface)
        if not rules:
            return ()
        self._read_links()
        names = {index: link.name for index, link in self.links.items()}
        tables = [(rule, routing.routes_of(self._route, rule.version, rule.table, names)) for rule in rules]
        return tuple(bypasses(plan, tables, self.interface, (self.interface, self.ipip)))

    def choose(self, setting: str, command: str) -> Backend:
        """Where WireGuard runs here: what is there already counts, then what the kernel can do."""
        link = self._find(self.interface)
        if (
            setting != "kernel"
            and link is not None
            and link.link.kind == "tun"
            and self.userspace.process(link.link.name)
        ):
            return "userspace"
        if setting == "userspace":
            return "userspace"
        if self._kernel_device() is not None:
            return "kernel"
        if setting == "kernel":
            raise KernelError(
                "this kernel has no WireGuard, and --wireguard kernel asks for it: load the module wireguard, "
                "or use --wireguard auto with wireguard-go installed"
            )
        return "userspace"

    def _kernel_device(self) -> wireguard.KernelDevice | None:
        if self._kernel is None:
            try:
                family = wireguard.available(self._generic)
            except NetlinkError:
                family = None
            if family is not None:
                self._kernel = wireguard.KernelDevice(self._generic, family)
        return self._kernel

    def observe(self, sources: Collection[IPAddress] = ()) -> Observed:
        """Read everything that concerns us. `sources`: addresses on whose devices the reverse-path check matters."""
        links = self._read_links()
        own = next((f.link for f in links if f.link.name == self.interface), None)
        ipip = next((f for f in links if f.link.name == self.ipip), None)
        ours, state = self._read_device(own)
        routes, duplicates, foreign, unreachable_routes = self._read_routes()
        addresses: frozenset[IPInterface] = frozenset()
        everywhere = self._read_addresses() if sources else []
        if own is not None and ours:
            found_there = everywhere if sources else self._read_addresses(own.index)
            addresses = frozenset(
                a.address for a in found_there if a.index == own.index and a.scope is not AddressScope.LINK
            )
            # If the host's key was replaced, the device is known by the key that it was given before, or by routes of
            # ours that lead there, which a member of a location does not have. Any other is an operator's, who must not
            # lose peers and key.
            if not (own.name in _led_to(routes.values(), duplicates) or self._knows(state)):
                ours, addresses = False, frozenset()
        devices = {a.interface for a in everywhere if a.address.ip in sources} - {"", self.interface, self.ipip, "lo"}
        policy = routing.read(
            self._route, self.interface, self.protocol, {index: link.name for index, link in self.links.items()}
        )
        names = {link.link.name for link in links}
        forward_chains, forward_rules = self._iptables.read(self._forward_rules)
        tables = (policy.table(number) for number in onward_tables(self.interface))
        onward = (*routes.values(), *(route for table in tables for route in table.routes.values()))
        near = {route.device for route in onward} - {self.interface, ""}
        far = {self.links[index].name for index in self.uplinks if index in self.links}
        self._devices = tuple(sorted(near or far))
        dropping, openings = self._chains.read(self._devices)
        uplinks = (link for index in self.egress if (link := self.links.get(index)) is not None)
        return Observed(
            time=self.handshake_clock.now(),
            link=own,
            uplink=min(uplinks, key=attrgetter("mtu"), default=None),
            ours=ours,
            public_key=state.public_key,
            listen_port=state.listen_port,
            mark=state.mark,
            peers=state.peers,
            addresses=addresses,
            routes=routes,
            duplicate_routes=tuple(duplicates),
            unreachable_routes=frozenset(unreachable_routes),
            foreign=foreign,
            policy=policy,
            ipip=ipip.link if ipip else None,
            ipip_local=ipip.local if ipip else None,
            ipip_ours=ipip is None or ipip.link.kind == "ipip",
            lacking=sysctl.lacking(),
            forwarding=sysctl.forwarding(),
            held_back=sysctl.not_forwarding(name for name in (self.interface, self.ipip) if name in names),
            advertised=sysctl.advertised(self.interface, self.ipip),
            underlay=tuple(sorted(devices)),
            strict=sysctl.strict({"default", *devices, *(names & {self.interface, self.ipip})}) if sources else {},
            loosened=sysctl.loosened(self._record),
            table=self.netfilter.read(table_name(self.interface)),
            forward_rules=forward_rules,
            forward_chains=forward_chains,
            dropping=dropping,
            openings=openings,
        )

    def peer_activity(self) -> PeerActivity:
        """Read the device's state of its peers; empty, if there is no device or it is not ours."""
        link = self._find(self.interface)
        ours, state = self._read_device(link.link if link is not None else None)
        clock = self.handshake_clock
        return PeerActivity(
            time=clock.now(),
            peers=state.peers if ours else {},
            set_back=clock.set_back,
            was_at=clock.was_at,
            seen=clock.seen,
        )

    def fingerprint(self, link: Link) -> int | None:
        """A number that stays the same while nobody sets anything of our WireGuard device `link`. Of endpoints only
        whether there is one counts. None: it is not there. OSError."""
        device = self._kernel_device() if link.kind == "wireguard" else self.userspace
        try:
            return None if device is None else device.fingerprint(link.name)
        except OSError as error:
            if error.errno in _NOBODY_THERE:
                return None
            raise

    def device(self, link: Link) -> DeviceState | None:
        """What our WireGuard device `link` says; None: it is not there. KernelError."""
        ours, state = self._read_device(link)
        return state if ours else None

    def _knows(self, state: DeviceState) -> bool:
        """Whether our WireGuard device is known by its key: it has this host's, or none yet, or the one that an agent
        gave it."""
        nothing = not (state.public_key or state.peers)
        return (
            nothing
            or state.public_key == self._public_key
            or (self.protocol == ROUTE_PROTOCOL and self._is_agents(self.interface, state))
        )

    def _is_agents(self, name: str, state: DeviceState) -> bool:
        """Whether an agent has given the WireGuard device `name` the key that it has."""
        return bool(state.public_key) and state.public_key == self.device_keys.read(name)

    def check(self, backend: Backend, command: str) -> None:
        """KernelError if no plan could be brought about, as things are. Changes nothing."""
        if not may_change_the_network():
            raise KernelError(f"{self.interface} cannot be set up: {NO_PERMISSION}")
        observed = self.observe()
        if observed.link is not None and not observed.ours:
            raise KernelError(taken(observed.link.name, observed.link.kind, observed.public_key))
        if backend == "userspace" and observed.link is None:
            self.userspace.check(self.interface, command)

    def _find(self, name: str) -> FoundLink | None:
        try:
            return self._route.get(requests.get_link(name), replies.read_link)
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    def _read_links(self) -> list[FoundLink]:
        links: list[FoundLink] = []
        self._route.dump(requests.get_links(), lambda body: links.append(replies.read_link(body)))
        self.links = {f.link.index: f.link for f in links}
        return links

    def _read_device(self, link: Link | None) -> tuple[bool, DeviceState]:
        """Whether the link is ours, and what its WireGuard says."""
        nothing = DeviceState()
        if link is None:
            return True, nothing
        try:
            if link.kind == "wireguard":
                device = self._kernel_device()
                return (False, nothing) if device is None else (True, self._dated(device.read(link.name)))
            if link.kind == "tun" and self.userspace.process(link.name) is not None:
                return True, self._dated(self.userspace.read(link.name))
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                raise KernelError(f"{link.name} cannot be read: {NO_PERMISSION}") from None
            if error.errno in _NOBODY_THERE:
                return False, nothing
            raise KernelError(f"{link.name} cannot be read: {why_not(error)}") from None
        return False, nothing

    def _dated(self, state: DeviceState) -> DeviceState:
        return evolve(state, peers=self.handshake_clock.date(state.peers))

    def _read_addresses(self, index: int = 0) -> list[HostAddress]:
        addresses: list[HostAddress] = []

        def keep(body: bytes) -> None:
            address = replies.read_address(body, self.links)
            if address is not None and index in (0, address.index):
                addresses.append(address)

        try:
            self._route.dump(requests.get_addresses(index), keep)
        except NetlinkError as error:
            if error.errno != errno.ENODEV:  # gone since the links were read
                raise
        return addresses

    def _own_addresses(self) -> OwnAddresses:
        self._read_links()
        addresses, balanced = self._read_addresses(), ipvs.read()
        for_services = frozenset(item.address for item in addresses if item.for_services)
        links: dict[IPNetwork, frozenset[str]] = {}
        for item in addresses:
            network = item.address.network
            if item.up and not item.for_services and network.prefixlen < network.max_prefixlen:
                links[network] = links.get(network, frozenset()) | {item.interface}
        return OwnAddresses(
            everywhere=frozenset(item.address.ip for item in addresses),
            for_services=for_services,
            # At each of them a service may be balanced, if the kernel does not show where.
            balanced=frozenset(address.ip for address in for_services) if balanced is None else balanced,
            links=links,
        )

    def _read_routes(self) -> tuple[dict[IPNetwork, Route], list[Route], dict[IPNetwork, Route], set[IPNetwork]]:
        """Ours, duplicates of ours to the same destinations, somebody else's, and the destinations of our unreachable
        routes."""
        unreachable_routes: set[IPNetwork] = set()
        routes: dict[IPNetwork, Route] = {}
        duplicates: list[Route] = []
        foreign: dict[IPNetwork, Route] = {}
        names = {index: link.name for index, link in self.links.items()}
        self.ways = set()
        self.uplinks = {}
        self.several = False
        objects = self._objects = nexthops.read(self._route)

        def keep(body: bytes) -> None:
            read = replies.read_route(body)
            if read is None or read.table != MAIN_TABLE:
                return
            if read.unreachable:
                # An agent's, which is in nobody's way.
                if self.protocol == ROUTE_PROTOCOL:
                    unreachable_routes.add(read.destination)
                return
            route = read.route(names)
            if not is_ours(read.protocol, route.device, own=self.protocol, interface=self.interface):
                # What the kernel adds for our own addresses is nobody else's.
                if not (read.protocol == KERNEL_PROTOCOL and route.device in (self.interface, self.ipip)):
                    foreign[read.destination] = route
                    if not read.destination.prefixlen and read.type == replies.UNICAST:
                        slot = read.destination.version, read.metric
                        self.several |= any(slot in slots for slots in self.uplinks.values())
                        for index, _ in nexthops.hops(read, objects):
                            self.uplinks[index] = (*self.uplinks.get(index, ()), slot)
                    self.several |= len(nexthops.hops(read, objects)) > 1
            elif read.destination in routes:
                duplicates.append(route)
            else:
                routes[read.destination] = route
                self.ways.add(read.index)

        for version in (4, 6):
            try:
                self._route.dump(requests.get_routes(version), keep)
            except NetlinkError as error:
                if error.errno not in _NO_SUCH_FAMILY:
                    raise
        return routes, duplicates, foreign, unreachable_routes

    def note_ways(self, made: Iterable[Change]) -> None:
        """Add the devices of new routes to `ways`; which one leads to a gateway on the underlay the kernel knows."""
        routes = (change.route for change in made if isinstance(change, AddRoute | ReplaceRoute))
        hops = {(route.device, route.gateway) for route in routes}
        self.ways.update(self._index(device) for device, _ in hops if device)
        gateways = [gateway for device, gateway in hops if not device and gateway is not None]
        answers = self._route.ask([requests.get_route_to(gateway, MARK) for gateway in gateways], replies.read_way)
        self.ways.update(answer[0] for answer in answers if not isinstance(answer, NetlinkError))

    def resolved(self, addresses: Collection[IPAddress]) -> frozenset[IPAddress]:
        """See `kernel.api.Kernel.resolved`."""
        result: set[IPAddress] = set()

        def keep(body: bytes) -> None:
            address = replies.read_neighbour(body)
            if address is not None and address in searched:
                result.add(address)

        searched = frozenset(addresses)
        for version in sorted({address.version for address in searched}):
            try:
                self._route.dump(requests.get_neighbours(version), keep)
            except NetlinkError as error:
                if error.errno not in _NO_SUCH_FAMILY:
                    raise
        return frozenset(result)

    def foreign_rules(self) -> tuple[ForeignRule, ...]:
        """See `kernel.api.Kernel.foreign_rules`."""
        return tuple(routing.foreign_rules(self._route, self.protocol))

    def routes_taken(
        self, sources: Mapping[IPAddress, IPAddress | None], *, by_wireguard: bool = False
    ) -> dict[IPAddress, Route | str]:
        """See `kernel.api.Kernel.routes_taken`."""
        self._read_links()
        names = {index: link.name for index, link in self.links.items()}
        mark = MARK if by_wireguard else 0
        queries = [requests.get_route_between(source, address, mark) for address, source in sources.items()]
        answers = self._route.ask(queries, replies.read_taken)
        return {
            address: str(answer.strerror) if isinstance(answer, NetlinkError) else answer.route(names)
            for address, answer in zip(sources, answers, strict=True)
        }

    def addresses(self) -> HostAddresses:
        """Everything that discovery of internal IP and endpoint looks at."""
        self._read_links()
        defaults: list[DefaultRoute] = []
        static: list[StaticRoute] = []
        objects = nexthops.read(self._route)

        def keep(body: bytes) -> None:
            read = replies.read_route(body)
            if read is None or read.table != MAIN_TABLE or read.type != replies.UNICAST:
                return
            for index, gateway in nexthops.hops(read, objects):
                link = self.links.get(index)
                if link is not None and read.destination.prefixlen:
                    if read.protocol in STATIC_PROTOCOLS and link.up:
                        static.append(StaticRoute(read.destination, link.name, link.kind))
                elif link is not None:
                    defaults.append(
                        DefaultRoute(
                            family=read.destination.version,
                            interface=link.name,
                            gateway=gateway,
                            metric=read.metric,
                            source=read.source,
                        )
                    )

        for version in (4, 6):
            try:
                self._route.dump(requests.get_routes(version), keep)
            except NetlinkError as error:
                if error.errno not in _NO_SUCH_FAMILY:
                    raise
        return HostAddresses(
            addresses=tuple(self._read_addresses()),
            default_routes=tuple(sorted(defaults, key=lambda route: (route.metric, route.family))),
            links=tuple(self.links.values()),
            static_routes=tuple(sorted(static, key=lambda route: (route.interface, str(route.destination)))),
        )

    def egress_mtus(self, addresses: Collection[IPAddress]) -> dict[IPAddress, int | None]:
        """The MTU on the way to each address, in bytes; None if there is no way outside our own devices.

        The lookups carry WireGuard's own fwmark, since its packets bypass an exit node. If the route has several next
        hops, the narrowest counts: which one packets take may change without an event. That takes a second lookup for
        each address, which hosts without such routes (`several`) are spared.
        """
        ways = self._route.ask([requests.get_route_to(address, MARK) for address in addresses], replies.read_way)
        routes: Sequence[WholeRoute | NetlinkError | None] = [None] * len(addresses)
        if self.several:
            whole = [requests.get_route_to(address, MARK, whole=True) for address in addresses]
            routes = self._route.ask(whole, replies.read_whole_route)
        return {
            address: self._egress_mtu(way, route) for address, way, route in zip(addresses, ways, routes, strict=True)
        }

    def _egress_mtu(self, way: tuple[int, int] | NetlinkError, route: WholeRoute | NetlinkError | None) -> int | None:
        if isinstance(way, NetlinkError):
            return None
        index, mtu = way
        if self._egress_link(index) is None:
            return None
        hops = {index: mtu}
        if isinstance(route, WholeRoute):
            beside = () if route.default is None else self._uplinks_beside(route.default)
            of_object = [index for index, _ in self._objects.get(route.object, ())]
            hops = {**dict.fromkeys((*route.devices, *of_object, *beside), route.mtu), **hops}
        links = [(link, mtu) for hop, mtu in hops.items() if (link := self._egress_link(hop)) is not None]
        self.egress.update(link.index for link, _ in links)
        return min(min(mtu, link.mtu) if mtu else link.mtu for link, mtu in links)

    def _egress_link(self, index: int) -> Link | None:
        """The device; None if it is one of ours, or the loopback device."""
        link = self.links.get(index)
        return None if link is None or link.name in (self.interface, self.ipip, "lo") else link

    def _uplinks_beside(self, metric: int) -> list[int]:
        """The devices of IPv6's default routes with a metric: of several routers the kernel takes one that answers."""
        return [index for index, slots in self.uplinks.items() if (6, metric) in slots]

    def make(self, changes: Sequence[Change]) -> tuple[list[Change], list[tuple[Change, FailedChange]]]:
        """Make changes in their order. What was made, and what was not and why."""
        made: list[Change] = []
        failed: list[tuple[Change, FailedChange]] = []
        missing: set[str] = set()
        """Devices, addresses and rules that could not be made: what needs them is left out, since its failure says
        nothing new."""
        for kind, run in itertools.groupby(changes, _group):
            # Looked at one by one: a device may turn out to be missing within the group.
            able = (change for change in run if not needs(change) & missing)
            if kind == "wireguard":
                results = self._make_wireguard(list(able))
            elif kind in ("addresses", "batch", "into the tunnel"):
                results = self._make_batch(list(able))
            else:
                results = ((change, self._make_one(change)) for change in able)
            for change, error in results:
                if error is None:
                    made.append(change)
                    continue
                failed.append((change, failure(change, error)))
                missing |= provides(change)
        return made, failed

    def _make_wireguard(self, group: list[Change]) -> Iterator[tuple[Change, OSError | None]]:
        changes: list[WireGuardChange] = [c for c in group if isinstance(c, SetDevice | SetPeer | RemovePeer)]
        if not changes:
            return
        link = self._find(self.interface)
        device: wireguard.Device | None = self.userspace
        if link is not None and link.link.kind == "wireguard":
            device = self._kernel_device()
        assert device is not None
        yield from _write(device, self.interface, changes)

    def _make_batch(self, group: list[Change]) -> Iterator[tuple[Change, OSError | None]]:
        changes: list[_Batched] = [c for c in group if isinstance(c, _Batched)]
        sent = [(change, self._packed(change)) for change in changes]
        batch = [message for _, message in sent if isinstance(message, NetlinkMessage)]
        self._writes += len(batch)
        answers = iter(self._route.send(batch))
        for change, message in sent:
            error = next(answers) if isinstance(message, NetlinkMessage) else message
            yield change, None if error and error.errno in _ALREADY.get(type(change), ()) else error

    def _packed(self, change: _Batched) -> NetlinkMessage | OSError:
        """An error concerns this change alone."""
        try:
            return self._message(change) or NetlinkError(errno.ENODEV)
        except FormatError as error:
            return error

    def _message(self, change: _Batched) -> NetlinkMessage | None:
        """None: the device that the change names is not there."""
        if isinstance(change, AddAddress | DeleteAddress):
            index = self._index(change.name)
            pack = requests.add_address if isinstance(change, AddAddress) else requests.delete_address
            return pack(index, change.address) if index else None
        if isinstance(change, AddRule):
            return requests.add_rule(change.rule, self.protocol)
        if isinstance(change, DeleteRule):
            return requests.delete_rule(change.rule, self.protocol)
        route = change.route
        index = self._index(route.device) if route.device else 0
        if route.device and not index:
            return None
        if isinstance(change, AddRoute):
            return requests.add_route(route, index)
        if isinstance(change, ReplaceRoute):
            return requests.replace_route(route, index)
        return requests.delete_route(route, index)

    def _make_one(self, change: Change) -> OSError | None:
        try:
            match change:
                case CreateLink(name=name, kind=kind, local=local):
                    if kind == "wireguard" and self._kernel_device() is None:
                        raise OSError(errno.EOPNOTSUPP, "this kernel has no WireGuard")
                    self._send(requests.create_link(name, kind, local))
                    self._forget(name)
                case StartUserspace(name=name, command=command):
                    self._writes += 1
                    self.userspace.start(name, command)
                    self._forget(name)
                case DeleteLink(name=name):
                    self._delete_link(name)
                case SetMtu(name=name, mtu=mtu):
                    self._send(requests.set_mtu(self._index(name), mtu))
                case SetUp(name=name):
                    self._send(requests.set_up(self._index(name)))
                case SetForwarding() | AllowPings() | KeepAdvertisements() | LoosenReversePath():
                    self._writes += 1
                    sysctl.change_to(change, self._record)
                case RestoreSysctl():
                    self._writes += 1
                    sysctl.restore(change, self._record)
                case ReplaceTable(table=table):
                    self.netfilter.replace(table)
                case AddElements() | DeleteElements():
                    self.netfilter.change_elements(change)
                case DeleteTable(name=name):
                    self.netfilter.delete(name)
                case AddForward() | DeleteForward():
                    self._iptables.make(change)
                case AddOpening() | DeleteOpening():
                    self._chains.edit(change)
                case _:
                    raise TypeError(change)
        except OSError as error:
            return None if error.errno in _ALREADY.get(type(change), ()) else error
        return None

    def _delete_link(self, name: str) -> None:
        process = self.userspace.process(name)
        index = self._index(name)
        if index:
            self._send(requests.delete_link(index))
        self._forget(name)
        if process is not None:
            self.userspace.wait_gone(name, process)

    def _send(self, message: NetlinkMessage) -> None:
        self._writes += 1
        (error,) = self._route.send([message])
        if error is not None:
            raise error

    def _index(self, name: str) -> int:
        """0 if there is no such device."""
        index = next((index for index, link in self.links.items() if link.name == name), 0)
        if not index and (device := self._find(name)) is not None:
            index = device.link.index
            self.links[index] = device.link
        return index

    def _forget(self, name: str) -> None:
        self.links = {index: link for index, link in self.links.items() if link.name != name}

    def leftovers(self) -> tuple[Change, ...]:
        """What `cleanup` has to make: everything recognisable as ours goes."""
        observed = self.observe()
        changes = removal(observed.policy, self.protocol)
        if self.agent_has(observed):
            # What has no more than the interface's name is the agent's.
            return *changes, *(DeleteRoute(route) for route in (*observed.routes.values(), *observed.duplicate_routes))
        routes = [*observed.routes.values(), *observed.duplicate_routes]
        if self.other_agent(observed):
            # An agent's routes lead anywhere: these are the other one's.
            changes.extend(DeleteRoute(route) for route in routes if route.device in (self.interface, self.ipip))
        else:
            changes.extend(DeleteRoute(route) for route in routes)
            changes.extend(
                DeleteRoute(unreachable_route(network)) for network in sorted(observed.unreachable_routes, key=str)
            )
        if observed.ipip is not None and observed.ipip_ours:
            changes.append(DeleteLink(self.ipip))
        if observed.link is not None and observed.ours:
            changes.append(DeleteLink(self.interface))
        if observed.table is not None:
            changes.append(DeleteTable(observed.table.name))
        changes.extend(DeleteForward(rule) for rule in sorted(observed.forward_rules, key=str))
        changes.extend(DeleteOpening(opening) for opening in sorted(observed.openings, key=str))
        deleted_links = {reverse_path(change.name) for change in changes if isinstance(change, DeleteLink)}
        changes.extend(change for change in sysctl.to_restore(self._record) if change.path not in deleted_links)
        return tuple(changes)

    def agent_has(self, observed: Observed) -> bool:
        """Of a connection: whether the interface is certain to be an agent's, by what `observe` has just read. It has
        the key that an agent gave it, or an agent's rules or routes into the tunnel lead there; a device with the
        connection's own key is the connection's."""
        link = observed.link
        if self.protocol == ROUTE_PROTOCOL or (self._public_key and observed.public_key == self._public_key):
            return False
        if link is not None and self._is_agents(link.name, self._read_device(link)[1]):
            return True
        names = {index: link.name for index, link in self.links.items()}
        policy = routing.read(self._route, self.interface, ROUTE_PROTOCOL, names)
        in_tables = (
            route for table in policy.tables.values() for route in (*table.routes.values(), *table.last.values())
        )
        leading_there = (
            route
            for route in observed.foreign.values()
            if route.device == self.ipip or (route.device == self.interface and route.gateway is None)
        )
        return bool(policy.rules) or any(route.protocol == ROUTE_PROTOCOL for route in (*leading_there, *in_tables))

    def other_agent(self, observed: Observed) -> str:
        """The WireGuard device of an agent with another interface than this, by what `observe` has just read; empty:
        none is certain. It has this host's key or the one that an agent gave it, or an agent's routes into the tunnel
        lead there. If our own device is an agent's there is no other: a host has one."""
        if self.protocol != ROUTE_PROTOCOL or (observed.link is not None and observed.ours):
            return ""
        others = [link for link in self.links.values() if link.kind in _TUNNELS and link.name != self.interface]
        led_to = _led_to(observed.routes.values(), observed.duplicate_routes)
        by_key = [link.name for link in others if self._has_an_agents_key(link)]
        return min(by_key or (link.name for link in others if link.name in led_to), default="")

    def _has_an_agents_key(self, link: Link) -> bool:
        try:
            _, state = self._read_device(link)
        except KernelError:
            return False
        return bool(state.public_key) and (state.public_key == self._public_key or self._is_agents(link.name, state))

    def forget_records(self) -> None:
        """Forget which values sysctls had before us, which have been restored or are to stay, and our device's key."""
        self._record.unlink(missing_ok=True)
        self.device_keys.forget(self.interface)


def _led_to(*groups: Iterable[Route]) -> set[str]:
    """The devices that routes lead into. One by way of a gateway leads into the underlay, which may be a tunnel too."""
    return {route.device for group in groups for route in group if route.gateway is None}


def _write(
    device: wireguard.Device, name: str, changes: Sequence[WireGuardChange]
) -> Iterator[tuple[Change, OSError | None]]:
    """Make changes at once. One that is refused must not take the others with it: then each half by itself."""
    try:
        device.write(name, changes)
    except OSError as error:
        if len(changes) == 1:
            yield changes[0], error
            return
        half = len(changes) // 2
        yield from _write(device, name, changes[:half])
        yield from _write(device, name, changes[half:])
    else:
        yield from ((change, None) for change in changes)


def _group(change: Change) -> object:
    if isinstance(change, SetDevice | SetPeer | RemovePeer):
        return "wireguard"
    if isinstance(change, AddRule) and leads_into_tunnel(change.rule):
        return "into the tunnel"
    if isinstance(change, AddAddress):
        return "addresses"  # Routes need them.
    if isinstance(change, _Batched):
        return "batch"
    return "one"
