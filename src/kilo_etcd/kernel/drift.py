"""Which of the kernel's events mean that somebody changed what is ours. Pure: events are bytes, the answer is a short
text.

The kernel reports our own changes too; routes, of which there may be thousands, it keeps to itself if we have set them
(`netlink.Listener.leave_out`). The others are told apart by comparing with the state that we expect *after* our
changes: what appears as we set it, or goes where we want none, is no news. So an unchanged host causes no reading, and
at worst one reading too many is made.

WireGuard reports nothing of its peers: `device_period` is how often its device is worth a look.

IPv4 routes vanish without an event when their device goes down or an address is removed, so those events count as well,
where a route of ours leaves by that device.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from kilo_etcd.kernel.diff import fulfils
from kilo_etcd.kernel.netlink.formats import rtnl
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.routing.exit_node import same_way
from kilo_etcd.kernel.routing.policy import own_tables
from kilo_etcd.kernel.state import (
    MAIN_TABLE,
    ROUTE_PROTOCOL,
    UNREACHABLE_METRIC,
    AddressScope,
    DeviceTarget,
    Link,
    Observed,
    is_ours,
)
from kilo_etcd.model import IPInterface, IPNetwork

_ADVERTISED = rtnl.rt_proto["ra"]
"""The protocol of routes that router advertisements have made."""

LOOK_SECONDS, LOOK_SECONDS_PER_PEER = 0.5, 0.0005


def device_period(peers: int) -> float:
    """Seconds between two looks at a WireGuard device: within one second up to 1,000 peers, and further apart the more
    there are, since reading them takes longer too."""
    return LOOK_SECONDS + LOOK_SECONDS_PER_PEER * peers


class AddressEvents:
    """Where the host can be reached, as far as events have told: its addresses and its default routes.

    A router advertisement has the kernel report the same address and the same route again, every few seconds with some
    routers; that is no news.
    """

    def __init__(self) -> None:
        self._addresses: dict[tuple[int, IPInterface], bool] = {}
        """Index and address -> whether it is deprecated."""
        self._defaults: dict[tuple[int, int, tuple[object, ...]], tuple[object, ...]] = {}
        """Family, metric and nothing more, which a route that replaces another one has too -> preferred source, nexthop
        object, and index and gateway of each next hop. Routes of several advertising routers stand side by side: each
        by itself."""

    def forget(self) -> None:
        """Events were lost."""
        self._addresses.clear()
        self._defaults.clear()

    def news(self, kind: int, body: bytes, own: Container[int]) -> bool:
        """Whether an event says that the host may be reached otherwise now.

        Addresses on our own devices, whose indexes are `own`, do not count.
        """
        if kind in (replies.NEWADDR, replies.DELADDR):
            address = replies.read_address(body, {})
            if address is None or address.scope is not AddressScope.GLOBAL or address.index in own:
                return False
            key = address.index, address.address
            if kind == replies.DELADDR:
                self._addresses.pop(key, None)
                return True
            before, self._addresses[key] = self._addresses.get(key), address.deprecated
            return before is not address.deprecated
        if kind in (replies.NEWROUTE, replies.DELROUTE):
            route = replies.read_route(body)
            if route is None or route.destination.prefixlen or route.table != MAIN_TABLE:
                return False
            way = route.source, route.object, *route.next_hops
            slot = route.destination.version, route.metric, way if route.protocol == _ADVERTISED else ()
            if kind == replies.DELROUTE:
                self._defaults.pop(slot, None)
                return True
            former, self._defaults[slot] = self._defaults.get(slot), way
            return former != way
        return False


def affects_path(kind: int, body: bytes, own: Container[int]) -> bool:
    """Whether an event says that packets to a peer may go another way now, or one with another MTU.

    Our own routes and what happens on our own devices, whose indexes are `own`, do not count.
    """
    if kind in (replies.NEWLINK, replies.DELLINK):
        return replies.read_link(body).link.index not in own
    if kind in (replies.NEWROUTE, replies.DELROUTE):
        route = replies.read_route(body)
        return route is not None and route.protocol != ROUTE_PROTOCOL and route.index not in own
    return False


class DriftWatch:
    """What is believed of the host, and how events bear on it."""

    def __init__(
        self,
        observed: Observed,
        target: DeviceTarget,
        *,
        links: Iterable[Link],
        ways: Container[int],
        egress: Container[int] = (),
        collisions: frozenset[IPNetwork] = frozenset(),
        failing: bool = False,
    ) -> None:
        self.observed = observed
        self.target = target
        self._tables = own_tables(target.interface)
        self.links = {link.index: link for link in links}
        self.ways = ways
        """Indexes of the devices that routes of ours leave by."""
        self.egress = egress
        """Indexes of the devices whose MTU that of the tunnel follows."""
        self.collisions = collisions
        self.failing = failing
        """Something could not be set: then what may have been the obstacle is news too."""

    def news(self, kind: int, body: bytes) -> str | None:
        """What an event says that must be looked into, or None."""
        if kind in (replies.NEWLINK, replies.DELLINK):
            return self._link(kind, replies.read_link(body).link)
        if kind in (replies.NEWADDR, replies.DELADDR):
            return self._address(kind, body)
        if kind in (replies.NEWROUTE, replies.DELROUTE):
            return self._route(kind, body)
        if kind == replies.DELRULE:
            rule = replies.read_rule(body)
            if rule is not None and rule[1] == self.target.protocol and rule[0] in self.observed.policy.rules:
                return f"the rule {rule[0]} was removed"
        if kind == replies.NEWNETCONF:
            return self._setting(body)
        return None

    def _setting(self, body: bytes) -> str | None:
        setting = replies.read_forwarding(body)
        if setting is not None and not setting[1] and setting[0] in self.observed.forwarding:
            return f"forwarding of IPv{setting[0]} was switched off"
        if not self.observed.underlay:
            return None
        if setting is not None and setting[1] and setting[0] not in self.observed.forwarding:
            return f"forwarding of IPv{setting[0]} was switched on"
        if (index := replies.read_strict(body)) is None:
            return None
        name = "all" if index == replies.EVERY else self.links[index].name if index in self.links else ""
        if name in ("all", self.target.interface, *self.observed.underlay):
            return f"the reverse-path check of {name} was made strict"
        return None

    def _own(self) -> list[Link]:
        return [link for link in (self.observed.link, self.observed.ipip) if link is not None]

    def _leads(self, index: int, name: str) -> bool:
        """Whether routes of ours may have gone with a device or its address."""
        return index in self.ways or name in self.observed.underlay

    def _link(self, kind: int, link: Link) -> str | None:
        if kind == replies.DELLINK:
            self.links.pop(link.index, None)
            if any(link.index == own.index for own in self._own()):
                return f"link {link.name} was deleted"
            return f"link {link.name} with routes of ours was deleted" if link.index in self.ways else None
        before = self.links.get(link.index)
        self.links[link.index] = link
        for own in self._own():
            if link.index == own.index:
                if link.name != own.name:
                    return f"link {own.name} was renamed to {link.name}"
                if own.up and not link.up:
                    return f"link {own.name} was set down"
                return f"the MTU of {own.name} was changed" if link.mtu != own.mtu else None
            if link.name == own.name:
                return f"another link is named {own.name}"
        if before is not None and before.up and not link.up and self._leads(link.index, link.name):
            return f"link {link.name} was set down"
        if link.index in self.egress and before is not None and before.mtu != link.mtu:
            return f"the MTU of {link.name}, by which endpoints are reached, is {link.mtu} now"
        if self.failing and link.up and (before is None or not before.up):
            return f"link {link.name} came up"
        return None

    def _address(self, kind: int, body: bytes) -> str | None:
        address = replies.read_address(body, self.links)
        own = self.observed.link
        if address is None or address.scope is AddressScope.LINK:
            return None
        if own is not None and address.index == own.index:
            if kind == replies.DELADDR and address.address in self.observed.addresses:
                return f"address {address.address} was removed from {own.name}"
            if kind == replies.NEWADDR and address.address not in self.observed.addresses:
                return f"address {address.address} was added to {own.name}"
            return None
        if kind == replies.DELADDR and self._leads(address.index, address.interface):
            return f"address {address.address} was removed from {address.interface}"
        if kind == replies.NEWADDR and self.failing:
            return f"address {address.address} was added to {address.interface}"
        return None

    def _route(self, kind: int, body: bytes) -> str | None:
        read = replies.read_route(body)
        if read is not None and read.table in self._tables:
            return self._own_table(kind, read)
        if read is None or read.table != MAIN_TABLE:
            return None
        destination = read.destination
        if read.unreachable:
            planned = destination in self.observed.unreachable_routes
            if self.target.protocol != ROUTE_PROTOCOL or (kind == replies.NEWROUTE) is planned:
                return None
            return f"the unreachable route for {destination} was {'removed' if kind == replies.DELROUTE else 'added'}"
        expected = self.observed.routes.get(destination)
        link = self.links.get(read.index)
        device = link.name if link is not None else ""
        if not is_ours(read.protocol, device, own=self.target.protocol, interface=self.target.interface):
            if kind == replies.NEWROUTE and expected is not None:
                return f"another program set a route to {destination}"
            if kind == replies.DELROUTE and destination in self.collisions:
                return f"the route to {destination} that was in the way is gone"
            return None
        route = read.route({} if link is None else {read.index: link.name})
        if kind == replies.NEWROUTE:
            if expected is None:
                return f"a route to {destination} with our protocol was added"
            if not fulfils(route, expected, self.target):
                return f"the route to {destination} was changed"
            return None
        if expected is not None and fulfils(route, expected, self.target):
            return f"the route to {destination} was removed"
        return None

    def _own_table(self, kind: int, read: replies.FoundRoute) -> str | None:
        link = self.links.get(read.index)
        route = read.route({} if link is None else {read.index: link.name})
        table = self.observed.policy.table(read.table)
        expected = (table.last if read.metric == UNREACHABLE_METRIC else table.routes).get(read.destination)
        if kind == replies.NEWROUTE:
            as_expected = expected is not None and same_way(route, expected, self.target.interface)
            return None if as_expected else f"a route to {read.destination} was set in table {read.table}"
        if expected is not None and same_way(route, expected, self.target.interface):
            return f"the route to {read.destination} was removed from table {read.table}"
        return None
