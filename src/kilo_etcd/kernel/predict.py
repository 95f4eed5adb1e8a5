"""What each change does to a host, without a host: `apply_changes(observed, changes)` is the state afterwards.

The kernel layer uses it to know the state after its own writes without reading it again, the in-memory kernel
(`kilo_etcd.testing.fake_kernel`) is made of it, and the property tests check the diff against it. It promises to
do what Linux does with these messages, the implicit parts too: a device that goes takes its addresses and routes
with it, and an allowed IP that is given to one peer is taken from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attrs import evolve

from kilo_etcd.kernel.firewall.forward import AddForward, DeleteForward
from kilo_etcd.kernel.firewall.openings import AddOpening, DeleteOpening
from kilo_etcd.kernel.firewall.table import AddElements, DeleteElements, DeleteTable, ReplaceTable, with_elements
from kilo_etcd.kernel.routing.rules import AddRule, DeleteRule
from kilo_etcd.kernel.state import (
    MAIN_TABLE,
    UNREACHABLE_METRIC,
    AddAddress,
    AddRoute,
    AllowedIPOwners,
    Change,
    CreateLink,
    DeleteAddress,
    DeleteLink,
    DeleteRoute,
    KeepAdvertisements,
    Link,
    LoosenReversePath,
    Observed,
    ObservedPeer,
    OwnTable,
    Policy,
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
    reverse_path,
)
from kilo_etcd.model import IPNetwork

_RouteTest = Callable[[Route], bool]


def network_order(network: IPNetwork) -> tuple[int, int, int]:
    """The order of allowed IPs: family, address, prefix length."""
    return (network.version, int(network.network_address), network.prefixlen)


def apply_changes(observed: Observed, changes: Iterable[Change], interface: str) -> Observed:
    """The state after `changes`, made to the host whose WireGuard interface is named `interface`.

    Indexes of new links are 0, since only the kernel knows them.
    """
    effect = _Effect(observed, interface)
    for change in changes:
        effect.make(change)
    return effect.result()


class _Effect:
    """One pass over many changes, with copies made once."""

    def __init__(self, observed: Observed, interface: str) -> None:
        self._start = observed
        self._interface = interface
        self._link = observed.link
        self._ipip = observed.ipip
        self._ipip_local = observed.ipip_local
        self._public_key = observed.public_key
        self._port = observed.listen_port
        self._mark = observed.mark
        self._tables: dict[int, tuple[dict[IPNetwork, Route], dict[IPNetwork, Route]]] = {}
        """Those of our own tables that have changed: their routes, and those of last resort."""
        self._rules = set(observed.policy.rules)
        self._strict, self._loosened = dict(observed.strict), dict(observed.loosened)
        self._peers = dict(observed.peers)
        self._owner: dict[IPNetwork, str] | None = None
        """Network -> public key of the peer that has it among its allowed IPs; made when it is needed."""
        if observed.owners is not None:
            self._owner = observed.owners.take(observed.peers)
        self._addresses = set(observed.addresses)
        self._routes = dict(observed.routes)
        self._duplicates = list(observed.duplicate_routes)
        self._unreachable_routes = set(observed.unreachable_routes)
        self._forwarding = set(observed.forwarding)
        self._advertised = observed.advertised
        self._table = observed.table
        self._held_back = observed.held_back
        self._forward_rules = set(observed.forward_rules)
        self._openings = set(observed.openings)

    def make(self, change: Change) -> None:
        match change:
            case CreateLink(name=name, kind=kind, local=local):
                if name == self._interface:
                    self._new_device(name, kind)
                else:
                    self._ipip, self._ipip_local = Link(name=name, kind=kind), local
            case StartUserspace(name=name):
                self._new_device(name, "tun")
            case DeleteLink(name=name):
                self._delete_link(name)
            case SetMtu(name=name, mtu=mtu):
                self._set_link(name, mtu=mtu)
            case SetUp(name=name):
                self._set_link(name, up=True)
            case AddAddress(address=address):
                self._addresses.add(address)
            case DeleteAddress(address=address):
                self._addresses.discard(address)
                self._drop_routes(lambda route: route.source == address.ip)
            case SetDevice(listen_port=port, private_key=key, public_key=public, mark=mark):
                self._mark = self._mark if mark is None else mark
                self._port = self._port if port is None else port
                self._public_key = self._public_key if key is None else public
            case SetPeer():
                self._set_peer(change)
            case RemovePeer(public_key=public_key):
                removed = self._peers.pop(public_key, None)
                if removed is not None and self._owner is not None:
                    for network in removed.allowed_ips:
                        self._owner.pop(network, None)
            case AddRoute(route=Route(unreachable=True, destination=destination)):
                self._unreachable_routes.add(destination)
            case DeleteRoute(route=Route(unreachable=True, destination=destination)):
                self._unreachable_routes.discard(destination)
            case AddRoute(route=route) | ReplaceRoute(route=route) if route.table != MAIN_TABLE:
                self._own_table(route.table)[route.metric == UNREACHABLE_METRIC][route.destination] = route
            case DeleteRoute(route=route) if route.table != MAIN_TABLE:
                self._own_table(route.table)[route.metric == UNREACHABLE_METRIC].pop(route.destination, None)
            case AddRule(rule=rule):
                self._rules.add(rule)
            case DeleteRule(rule=rule):
                self._rules.discard(rule)
            case LoosenReversePath(name=name):
                former = self._strict.pop(name, None)
                if former is not None:
                    self._loosened.setdefault(name, former)
            case RestoreSysctl(path=path):
                for name in [name for name in self._loosened if reverse_path(name) == path]:
                    self._strict[name] = self._loosened.pop(name)
            case AddRoute(route=route) | ReplaceRoute(route=route):
                self._routes[route.destination] = route
            case DeleteRoute(route=route):
                if self._routes.get(route.destination) == route:
                    del self._routes[route.destination]
                self._duplicates = [other for other in self._duplicates if other != route]
            case SetForwarding(device=device) if device:
                self._held_back = tuple(held for held in self._held_back if held != device)
            case SetForwarding(family=family):
                self._forwarding.add(family)
                self._advertised = self._advertised if family == 4 else ()
            case KeepAdvertisements(name=name):
                self._advertised = tuple(held for held in self._advertised if held != name)
            case ReplaceTable(table=table):
                self._table = table
            case AddElements() | DeleteElements():
                self._table = None if self._table is None else with_elements(self._table, change)
            case DeleteTable():
                self._table = None
            case AddForward(rule=rule):
                self._forward_rules.add(rule)
            case DeleteForward(rule=rule):
                self._forward_rules.discard(rule)
            case AddOpening(opening=opening):
                self._openings.add(opening)
            case DeleteOpening(opening=opening):
                self._openings.discard(opening)
            case _:
                pass

    def result(self) -> Observed:
        return evolve(
            self._start,
            link=self._link,
            public_key=self._public_key,
            listen_port=self._port,
            mark=self._mark,
            policy=self._policy(),
            strict=self._strict,
            loosened=self._loosened,
            peers=self._peers,
            addresses=frozenset(self._addresses),
            routes=self._routes,
            duplicate_routes=tuple(self._duplicates),
            unreachable_routes=frozenset(self._unreachable_routes),
            ipip=self._ipip,
            ipip_local=self._ipip_local,
            forwarding=frozenset(self._forwarding),
            advertised=self._advertised,
            table=self._table,
            held_back=self._held_back,
            forward_rules=frozenset(self._forward_rules),
            openings=frozenset(self._openings),
            owners=None if self._owner is None else AllowedIPOwners(self._owner, self._peers),
        )

    def _own_table(self, number: int) -> tuple[dict[IPNetwork, Route], dict[IPNetwork, Route]]:
        if number not in self._tables:
            table = self._start.policy.table(number)
            self._tables[number] = dict(table.routes), dict(table.last)
        return self._tables[number]

    def _policy(self) -> Policy:
        before = self._start.policy
        if not self._tables and self._rules == before.rules:
            return before
        tables = {**before.tables, **{number: OwnTable(*kinds) for number, kinds in self._tables.items()}}
        return Policy(
            {number: table for number, table in tables.items() if table.routes or table.last}, frozenset(self._rules)
        )

    def _new_device(self, name: str, kind: str) -> None:
        self._link = Link(name=name, kind=kind)
        self._public_key, self._port, self._mark = "", 0, 0
        self._peers, self._owner = {}, None
        self._addresses = set()

    def _set_link(self, name: str, *, mtu: int | None = None, up: bool | None = None) -> None:
        link = self._link if name == self._interface else self._ipip
        if link is None:
            return
        link = evolve(link, mtu=link.mtu if mtu is None else mtu, up=link.up if up is None else up)
        if name == self._interface:
            self._link = link
        else:
            self._ipip = link

    def _delete_link(self, name: str) -> None:
        self._strict.pop(name, None)
        self._loosened.pop(name, None)
        if name == self._interface:
            self._link = None
            self._public_key, self._port, self._mark = "", 0, 0
            self._peers, self._owner = {}, None
            # IPv4 routes go with the address that they prefer as their source.
            sources = {address.ip for address in self._addresses}
            self._addresses = set()
            self._drop_routes(lambda route: route.source in sources)
        else:
            self._ipip, self._ipip_local = None, None
        self._drop_routes(lambda route: route.device == name)

    def _drop_routes(self, goes: _RouteTest) -> None:
        self._routes = {destination: route for destination, route in self._routes.items() if not goes(route)}
        self._duplicates = [route for route in self._duplicates if not goes(route)]
        for number in {*self._start.policy.tables, *self._tables}:
            routes, last = self._own_table(number)
            for kind in (routes, last):
                for destination in [destination for destination, route in kind.items() if goes(route)]:
                    del kind[destination]

    def _set_peer(self, change: SetPeer) -> None:
        key = change.public_key
        peer = self._peers.get(key) or ObservedPeer(public_key=key)
        if self._owner is None:
            self._owner = {network: k for k, p in self._peers.items() for network in p.allowed_ips}
        owner = self._owner
        if change.reset:
            for network in peer.allowed_ips:
                owner.pop(network, None)
            peer = ObservedPeer(public_key=key)
        if change.replace_allowed_ips:
            for network in peer.allowed_ips:
                owner.pop(network, None)
        for network in change.allowed_ips:
            former = owner.setdefault(network, key)
            if former != key:
                loser = self._peers[former]
                remaining = tuple(ip for ip in loser.allowed_ips if ip != network)
                self._peers[former] = evolve(loser, allowed_ips=remaining)
                owner[network] = key
        allowed = change.allowed_ips
        if not change.replace_allowed_ips and peer.allowed_ips:
            allowed = tuple(sorted({*peer.allowed_ips, *allowed}, key=network_order)) if allowed else peer.allowed_ips
        keepalive, preshared = change.persistent_keepalive, change.preshared_key
        self._peers[key] = ObservedPeer(
            public_key=key,
            endpoint=change.endpoint or peer.endpoint,
            allowed_ips=allowed,
            persistent_keepalive=peer.persistent_keepalive if keepalive is None else keepalive,
            preshared_key=peer.preshared_key if preshared is None else (preshared or None),
            last_handshake=peer.last_handshake,
            rx_bytes=peer.rx_bytes,
            tx_bytes=peer.tx_bytes,
        )
