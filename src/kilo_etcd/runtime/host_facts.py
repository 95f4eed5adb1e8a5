"""The networks that a host is attached to and those that it reaches, from its addresses, routes and name servers.

The agent and `kgctl connect` look at their host and make `HostFacts` of what they find; all that follows is pure. The
mesh routes no internal IP in the networks that a host reaches over its own links (`Reached`) to the host's segment
(`topology`): a printer, a container, the gateway or etcd has that address here.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses

from attrs import frozen

from kilo_etcd.kernel.state import DefaultRoute, HostAddress, StaticRoute, ipip_name
from kilo_etcd.model import DEFAULT_INTERFACE, IPAddress, IPInterface, IPNetwork
from kilo_etcd.planning.names import NO_REASONS, Reasons, Table
from kilo_etcd.planning.pipeline import Surroundings
from kilo_etcd.runtime.resolve import network_of

# fmt: off
TUNNELS = frozenset({
    "amneziawg", "bareudp", "erspan", "geneve", "gre", "gretap", "gtp", "ip6erspan", "ip6gre", "ip6gretap", "ip6tnl",
    "ipip", "ovpn", "ovpn-dco", "ppp", "sit", "tun", "vti", "vti6", "vxlan", "wireguard", "xfrm",
})
"""The kinds of interfaces that are tunnels. Of userspace VPNs (OpenVPN, Tailscale, ZeroTier) it is `tun`."""
_CONTAINERS = (
    "docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "cilium", "lxc", "lxdbr", "incusbr", "podman", "kube-",
    "nodelocaldns", "weave", "vnet",
)
# fmt: on
_SHORTEST = {4: 8, 6: 7}
"""Prefix lengths below which a static route is a part of a default route, as VPNs split it."""
MOST_NETWORKS = 500
"""Of one family in a record. A host with more states the whole family, so that nothing is routed to its segment."""


@frozen
class Reached:
    """The networks that a host reaches over its own links."""

    lasting: tuple[IPNetwork, ...] = ()
    """Its own networks, gateways and name servers."""
    passing: tuple[IPNetwork, ...] = ()
    """What comes and goes by itself: networks of containers and tunnels, addresses behind etcd's DNS names."""

    def stated(self) -> tuple[IPNetwork, ...]:
        """All of it, with nothing said twice, in order."""
        meaningful = [network for network in (*self.lasting, *self.passing) if not _meaningless(network)]
        four = tuple(collapse_addresses(network for network in meaningful if isinstance(network, IPv4Network)))
        six = tuple(collapse_addresses(network for network in meaningful if isinstance(network, IPv6Network)))
        return (
            *(four if len(four) <= MOST_NETWORKS else (IPv4Network("0.0.0.0/0"),)),
            *(six if len(six) <= MOST_NETWORKS else (IPv6Network("::/0"),)),
        )


@frozen(kw_only=True)
class HostFacts:
    """What was found on the host: the addresses in the kernel's order, default routes with the lowest metric first."""

    hostname: str = ""
    resolved: tuple[IPAddress, ...] = ()
    """What the host's name resolves to, in the resolver's order."""
    addresses: tuple[HostAddress, ...] = ()
    default_routes: tuple[DefaultRoute, ...] = ()
    static_routes: tuple[StaticRoute, ...] = ()
    name_servers: tuple[IPAddress, ...] = ()
    """Those in use, by resolv.conf."""
    own_interface: str = DEFAULT_INTERFACE

    def underlay(self) -> tuple[IPNetwork, ...]:
        """The networks that the host's own packets travel on: those it is attached to, and its default gateways.

        Tunnels and container bridges are left out, unless the default route goes there.
        """
        stood_in = [item.address.network for item in self._stands_at()]
        gateways = [network_of(route.gateway) for route in self.default_routes if route.gateway is not None]
        return tuple(dict.fromkeys((*stood_in, *gateways)))

    def reached(self, etcd: Iterable[IPNetwork]) -> Reached:
        """What the host reaches over its own links, containers, tunnels and static routes included, and these addresses
        of etcd."""
        links = [item for item in self.addresses if usable(item, self.own_interface, ())]
        gateways = [route.gateway for route in self.default_routes if route.gateway is not None]
        lasting: list[IPNetwork] = []
        passing: list[IPNetwork] = []
        for item in links:
            (passing if _comes_and_goes(item) else lasting).append(item.address.network)
        for route in self.static_routes:
            if route.destination.prefixlen < _SHORTEST[route.destination.version]:
                continue
            if route.interface not in (self.own_interface, ipip_name(self.own_interface), "lo"):
                comes_and_goes = route.interface.startswith(_CONTAINERS) or route.kind in TUNNELS
                (passing if comes_and_goes else lasting).append(route.destination)
        lasting += map(network_of, (*gateways, *self.name_servers))
        return Reached(tuple(lasting), (*passing, *etcd))

    def sources(self) -> tuple[IPAddress, ...]:
        """The host's own addresses there: others call it at these."""
        return tuple(dict.fromkeys(item.address.ip for item in self._stands_at()))

    def _stands_at(self) -> list[HostAddress]:
        ways = {route.interface for route in self.default_routes}
        return [
            item
            for item in self.addresses
            if usable(item, self.own_interface, ()) and (item.interface in ways or not _comes_and_goes(item))
        ]

    def surroundings(
        self, etcd: tuple[IPNetwork, ...], table: Table, failed: Reasons = NO_REASONS, unresolved: tuple[str, ...] = ()
    ) -> Surroundings:
        """What a plan needs to know of them. `etcd` are etcd's addresses, `unresolved` its names that have none;
        `table` and `failed`: what is known of DNS names."""
        return Surroundings(
            table=table, failed=failed, etcd=etcd, etcd_unresolved=unresolved, underlay=self.underlay(),
            families=self.families(), sources=self.sources(),
            addresses=self.own_addresses(),
        )  # fmt: skip

    def own_addresses(self) -> frozenset[IPAddress]:
        """All addresses of the host."""
        return frozenset(item.address.ip for item in self.addresses)

    def families(self) -> frozenset[int]:
        """The families in which the host has a way to others: those of its default routes, or else of its networks."""
        return frozenset(route.family for route in self.default_routes) or frozenset(
            network.version for network in self.underlay()
        )

    def ways_out(self, version: int, *, first: bool = False) -> frozenset[str]:
        """The interfaces that the next hops of the default routes of family 4 or 6 are on; `first`: only of those with
        the lowest metric."""
        return frozenset(route.interface for route in self._defaults(version, first=first))

    def sent_from(self, version: int, *, first: bool = False) -> frozenset[IPAddress]:
        """The addresses of family 4 or 6 that the kernel takes as the source of what leaves by the default route, if it
        does not take one of the device's: a route's preferred source; or one of a device for services, if the devices
        of the routes with the lowest metric have none, as where the link to the router has no numbers. `first`: only of
        the routes with the lowest metric, since the others are for the day when those are gone."""
        preferred = frozenset(route.source for route in self._defaults(version, first=first) if route.source)
        in_use = self._defaults(version, first=True)
        if not in_use or any(route.source for route in in_use):
            return preferred
        ways = self.ways_out(version, first=True)
        items = [item for item in self.addresses if item.address.version == version and usable(item, "", ())]
        if any(item.interface in ways for item in items):
            return preferred
        return preferred.union(item.address.ip for item in items if item.for_services and not is_container(item))

    def _defaults(self, version: int, *, first: bool) -> list[DefaultRoute]:
        routes = [route for route in self.default_routes if route.family == version]
        lowest = min((route.metric for route in routes), default=0)
        return [route for route in routes if not first or route.metric == lowest]

    def holds_gateway(self, item: HostAddress) -> bool:
        """Whether the gateway of a default route is on the network of an address, by that address's interface."""
        return any(
            route.interface == item.interface and route.gateway is not None and route.gateway in item.address.network
            for route in self.default_routes
        )

    def overlaps(self, subnets: Iterable[IPNetwork]) -> tuple[str, ...]:
        """A sentence for each address of the operator's whose network has addresses in common with the mesh."""
        subnets = tuple(subnets)
        return tuple(
            f"{item.interface} has the address {item.address}, whose network overlaps the mesh's subnet {subnet}; it "
            "was left alone, and mesh addresses in it may not be reached from here: use another network there"
            for item in self.addresses
            if item.interface not in (self.own_interface, ipip_name(self.own_interface))
            for subnet in subnets
            if subnet.version == item.address.version and item.address.network.overlaps(subnet)
        )


def usable(item: HostAddress, own_interface: str, subnets: tuple[IPNetwork, ...]) -> bool:
    """Whether an address counts: its interface is up and neither the mesh's (`own_interface`) nor an IPIP tunnel, it is
    no loopback, link-local or site-local address, and it is in none of `subnets`."""
    ip = item.address.ip
    if not item.up or item.interface == own_interface or item.kind == "ipip" or item.interface.startswith("tunl"):
        return False
    if ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return False
    if isinstance(ip, IPv6Address) and (ip.ipv4_mapped is not None or ip.is_site_local):
        return False
    return not any(within(item.address, subnet) for subnet in subnets)


def is_container(item: HostAddress) -> bool:
    """Whether it is an address of a container bridge, by the interface's name."""
    return item.interface.startswith(_CONTAINERS)


def _comes_and_goes(item: HostAddress) -> bool:
    """Whether it is an address of a container bridge or of a tunnel."""
    return is_container(item) or item.kind in TUNNELS


def within(address: IPInterface, network: IPNetwork) -> bool:
    """Whether an address is in a network, which may be of the other family."""
    return address.version == network.version and address.ip in network


def _meaningless(network: IPNetwork) -> bool:
    address: IPv4Address | IPv6Address = network.network_address
    return address.is_loopback or address.is_link_local or (address.is_unspecified and network.prefixlen > 0)
