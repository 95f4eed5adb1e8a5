"""The packets of the simulated hosts: who gets an answer from whom, by what the kernels in memory really hold.

`reaches` follows a packet there and its answer back, hop by hop, with `planning.walk`: not through the plans of the
agents, but through plans read off the kernels (`programmed`), whoever put there what is there. Then each hop is tried
on the underlay as the faults have left it. It trusts nothing that etcd says: who a host is, where it is and which mesh
addresses it has are facts here.

Public addresses are reached by the WAN, private ones by the LAN, which is one routed network: the operator promises
that hosts of one label reach each other, and any hosts may get one label. There is no delay and no loss: a packet
arrives at once or never.

Under `encrypted` a private address is reached as the kernel's own table says, and a host drops what its packet filter
refuses. What the agents say to each other is outside of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from ipaddress import ip_interface
from typing import TYPE_CHECKING

import trio
from attrs import define, evolve, frozen

from kilo_etcd.kernel.firewall.table import AddressSet
from kilo_etcd.kernel.routing import encrypted, returns
from kilo_etcd.kernel.state import Observed, OwnTable, Route, ipip_name
from kilo_etcd.model import (
    DEFAULT_INTERFACE,
    DEFAULT_PORT,
    Endpoint,
    IPAddress,
    IPInterface,
    IPNetwork,
    Node,
    Snapshot,
    is_public,
)
from kilo_etcd.model.hostplan import Encryption, HostPlan, PeerPlan, RoutePlan, Via
from kilo_etcd.planning.walk import Hop, longest_match, walk
from kilo_etcd.testing.fake_kernel import FakeHost
from kilo_etcd.topology.segments import Topology, build_topology

if TYPE_CHECKING:
    from simulation.sessions import Sessions

_Followed = tuple[str, tuple[Hop, ...], tuple[Hop, ...]]
"""Why there is no answer, or the ways there and back."""

T, LED = encrypted.table_of(DEFAULT_INTERFACE), encrypted.rule_priorities(DEFAULT_INTERFACE)[1]
"""The table of `encrypted`, and where the rule that leads there stands."""
RETURNS, RETURNING = returns.return_table(DEFAULT_INTERFACE), returns.return_priority(DEFAULT_INTERFACE)

FRESH = 120.0
"""Seconds for which a WireGuard session is used before packets have it renewed (its paper's Rekey-After-Time)."""


@frozen(kw_only=True)
class Place:
    """Where a host stands, and what WireGuard key it has."""

    public_key: str
    inside: tuple[IPInterface, ...]
    """Its addresses on the LAN."""
    outside: tuple[IPInterface, ...]
    """Its addresses on the WAN."""


@define
class Condition:
    """What is not well with a host's network."""

    powered: bool = True
    forwards: bool = True
    """Whether it passes packets on, whatever its sysctl says."""
    tunnels: bool = True
    """Whether packets get through to its WireGuard port."""
    lan: bool = True
    wan: bool = True

    def mend(self) -> None:
        """All but the power is as it should be."""
        self.forwards = self.tunnels = self.lan = self.wan = True


@define
class _Host:
    place: Place
    machine: FakeHost
    condition: Condition
    seen: tuple[Observed, bool] | None = None
    plan: HostPlan | None = None

    @property
    def encrypts(self) -> bool:
        """Whether its kernel has anything of `encrypted`."""
        observed = self.machine.observed
        return T in observed.policy.tables or any(address_set.addresses for address_set in refused(observed))


class Network:
    """All machines, and the wires between them."""

    def __init__(self) -> None:
        self._hosts: dict[str, _Host] = {}
        self._by_key: dict[str, str] = {}
        self._transports: dict[str, SimulatedPost] = {}
        self._drawn: tuple[object, Topology] | None = None
        self._state: list[tuple[object, ...]] = []
        self._leased: list[Observed] = []
        self.sessions: Sessions | None = None
        """None: each handshake is taken that arrives, whenever it is dated."""
        self._known: dict[tuple[str, IPAddress], _Followed] = {}
        """What has been followed as long as nothing has changed."""

    def add(self, name: str, place: Place, machine: FakeHost) -> Condition:
        """Connect a machine; what is returned is for faults to change."""
        condition = Condition()
        self._hosts[name] = _Host(place, machine, condition)
        self._by_key[place.public_key] = name
        machine.reach = lambda address: self.answers(name, address)
        machine.shakes = lambda public_key: self.shake(name, public_key)
        return condition

    def move(self, name: str, place: Place) -> None:
        """A machine has other addresses."""
        if self._hosts[name].place != place:
            self._hosts[name].place = place
            self._state, self._drawn = [], None

    # -- packets ------------------------------------------------------------------------------------------------

    def reaches(self, source: str, address: IPAddress) -> bool:
        """Whether a packet from host `source` to `address` arrives, and its answer too."""
        return self.trace(source, address) == ""

    def trace(self, source: str, address: IPAddress) -> str:
        """Why an echo request from `source` to `address` is not answered; empty: it is."""
        return self._follow(source, address)[0]

    def answers(self, source: str, address: IPAddress) -> bool:
        """As `reaches`; sessions of WireGuard on the way are renewed, as packets have it done."""
        why, there, back = self._follow(source, address)
        if why:
            # The packet itself, once it arrives, tells the first host on the way where the sender is now.
            self.trigger_handshake(source, address)
            why, there, back = self._follow(source, address)
        if not why:
            self._renew((*there, *back))
        return not why

    def trigger_handshake(self, source: str, address: IPAddress) -> None:
        """One packet from `source` into the tunnel, whose fate is of no interest: it makes WireGuard shake hands."""
        key = self._peer_for(self._hosts[source].machine.observed, address)
        if key is not None:
            self.shake(source, key)

    def send_in_vain(self, source: str, address: IPAddress) -> None:
        """Packets from `source` to `address`, or their answers, which are lost between two ends of a tunnel: the first
        of these two goes on sending to where WireGuard looks for the second."""
        _, there, back = self._follow(source, address)
        for hop in (*there, *back):
            if not self._stops(hop, address):
                continue
            if hop.peer is not None and self._hosts[hop.source].machine.observed.peers[hop.peer].endpoint is not None:
                self._hosts[hop.source].machine.send_to(hop.peer)
            return

    def shake(self, source: str, public_key: str) -> bool:
        """Whether a handshake that `source` begins with the peer of that key succeeds; both then know of it."""
        name = self._by_key.get(public_key)
        here = self._hosts[source]
        mine = here.machine.observed.peers.get(public_key)
        if name is None or mine is None or mine.endpoint is None or not _up(here.machine.observed):
            return False
        there = self._hosts[name]
        theirs = there.machine.observed.peers.get(here.place.public_key)
        if theirs is None or not _up(there.machine.observed) or self._lost(source, name, mine.endpoint):
            return False
        if self.sessions is not None:
            if not self.sessions.takes(source, name):
                return False
            self.sessions.begun(source, name)
        back = self._address_towards(here, mine.endpoint)
        here.machine.receive_from(public_key)
        there.machine.receive_from(here.place.public_key, endpoint=Endpoint(back, DEFAULT_PORT))
        return True

    def transport(self, name: str) -> SimulatedPost:
        """The way of a host's datagrams to mesh addresses, and of others' to it."""
        transport = self._transports[name] = SimulatedPost(self, name)
        return transport

    def deliver(self, data: bytes, source: str, address: IPAddress) -> None:
        """A datagram from `source`, which arrives if there is a way."""
        lan = self._on_lan(address)
        if lan is not None:
            sender = next(
                (
                    interface.ip
                    for interface in self._hosts[source].place.inside
                    if interface.version == address.version
                ),
                None,
            )
            if lan in self._transports and sender is not None and not self._over_lan(source, lan):
                self._transports[lan].arrived(data, sender)
            return
        for name, host in self._hosts.items():
            if _has(host.machine.observed, address) and name in self._transports and self.answers(source, address):
                own = self._hosts[source].machine.observed.addresses
                sender = next((interface.ip for interface in own if interface.version == address.version), None)
                if sender is not None:
                    self._transports[name].arrived(data, sender)

    def fate(self, source: str, address: IPAddress) -> str:
        """What becomes of an echo request from `source`, and of its answer: `encrypted` if both go through a tunnel,
        `clear` if one does not, or why there is no answer."""
        why, there, back = self._follow(source, address)
        return why or ("encrypted" if _encrypted(there) and _encrypted(back) else "clear")

    # -- inside -------------------------------------------------------------------------------------------------

    def _follow(self, source: str, address: IPAddress) -> _Followed:
        state: list[tuple[object, ...]] = []
        for host in self._hosts.values():
            condition = host.condition
            state.append(
                (
                    id(host.machine.observed),
                    condition.powered,
                    condition.forwards,
                    condition.tunnels,
                    condition.lan,
                    condition.wan,
                )
            )
        if state != self._state:
            self._state, self._known = state, {}
            # What an id stands for must not be another thing meanwhile.
            self._leased = [host.machine.observed for host in self._hosts.values()]
        found = self._known.get((source, address))
        if found is None:
            found = self._known[source, address] = self._follow_anew(source, address)
        return found

    def _follow_anew(self, source: str, address: IPAddress) -> _Followed:
        if not self._hosts[source].condition.powered:
            return f"{source} is switched off", (), ()
        owner = self._on_lan(address)
        if owner is not None and not any(host.encrypts for host in self._hosts.values()):
            return self._over_lan(source, owner), (), ()
        if owner is None:
            owner = next((name for name, host in self._hosts.items() if _has(host.machine.observed, address)), None)
        if owner is None:
            return f"nobody has {address}", (), ()
        plans = {name: self._programmed(host) for name, host in self._hosts.items()}
        topology = self._topology()
        there = walk(plans, topology, source, address)
        if not there.delivered:
            return str(there), (), ()
        if there.source is None or owner == source:
            return "", (), ()
        back = walk(plans, topology, owner, there.source, sender=address)
        if not back.delivered:
            return f"on the way back: {back}", (), ()
        for way, sender in ((there, there.source), (back, address)):
            for hop in way.hops:
                if why := self._stops(hop, sender):
                    return why, there.hops, back.hops
        return "", there.hops, back.hops

    def _over_lan(self, source: str, target: str) -> str:
        """Why the LAN does not take a packet to a host; empty: it does."""
        here, there = self._hosts[source].condition, self._hosts[target].condition
        if not here.powered or not there.powered:
            return f"{target if here.powered else source} is switched off"
        return "" if (here.lan and there.lan) or source == target else f"the LAN of {source} or {target} is cut"

    def _stops(self, hop: Hop, sender: IPAddress) -> str:
        """Why a packet of `sender` does not make this hop; empty: it does."""
        host, target = self._hosts[hop.source], self._hosts[hop.target]
        if hop.medium is Via.TUNNEL:
            assert hop.peer is not None
            peer = host.machine.observed.peers[hop.peer]
            if peer.endpoint is None:
                return f"{hop.source} knows no endpoint of {hop.target}"
            return self._lost(hop.source, hop.target, peer.endpoint)
        for name, condition in ((hop.source, host.condition), (hop.target, target.condition)):
            if not condition.powered:
                return f"{name} is switched off"
            if not condition.lan:
                return f"{name} is cut off from the LAN"
        if hop.medium is Via.UNDERLAY and any(
            sender in address_set.addresses for address_set in refused(target.machine.observed)
        ):
            return f"{hop.target} refuses what comes from {sender} in clear"
        return ""

    def _lost(self, source: str, target: str, endpoint: Endpoint) -> str:
        """Why WireGuard's packets between two hosts do not get through to that endpoint of the second."""
        address, there = endpoint.address, self._hosts[target].place
        if (
            all(address != interface.ip for interface in (*there.inside, *there.outside))
            or endpoint.port != DEFAULT_PORT
        ):
            return f"{target} is not at {endpoint}, where {source} looks for it"
        assert address is not None
        for name in (source, target):
            condition = self._hosts[name].condition
            if not condition.powered:
                return f"{name} is switched off"
            if not condition.tunnels:
                return f"the WireGuard port of {name} is blocked"
            if not (condition.wan if is_public(address) else condition.lan):
                return f"{name} is cut off from the {'WAN' if is_public(address) else 'LAN'}"
        return ""

    def _renew(self, hops: Iterable[Hop]) -> None:
        for hop in hops:
            if hop.peer is not None:
                machine = self._hosts[hop.source].machine
                if machine.clock() - machine.observed.peers[hop.peer].last_handshake > FRESH:
                    self.shake(hop.source, hop.peer)

    def _on_lan(self, address: IPAddress) -> str | None:
        for name, host in self._hosts.items():
            if any(address == interface.ip for interface in host.place.inside):
                return name
        return None

    @staticmethod
    def _address_towards(host: _Host, endpoint: Endpoint) -> IPAddress:
        address = endpoint.address
        assert address is not None
        own = host.place.outside if is_public(address) else host.place.inside
        return next(interface.ip for interface in own if interface.version == address.version)

    @staticmethod
    def _peer_for(observed: Observed, address: IPAddress) -> str | None:
        return longest_match(
            ((network, key) for key, peer in observed.peers.items() for network in peer.allowed_ips), address
        )

    def _programmed(self, host: _Host) -> HostPlan:
        state = (host.machine.observed, host.condition.forwards)
        if host.plan is None or host.seen is None or host.seen[0] is not state[0] or host.seen[1] != state[1]:
            host.seen, host.plan = state, programmed(*state)
        return host.plan

    def _topology(self) -> Topology:
        """The hosts as they are: one location, whose LAN they share, and the mesh addresses that their kernels have."""
        state = tuple(host.machine.observed.addresses for host in self._hosts.values())
        if self._drawn is None or self._drawn[0] != state:
            nodes = {name: _node(name, host) for name, host in self._hosts.items()}
            self._drawn = state, build_topology(Snapshot(revision=1, nodes=nodes))
        return self._drawn[1]


class SimulatedPost:
    """See `agent.leader_hints.peer_query.DatagramTransport`."""

    def __init__(self, network: Network, name: str) -> None:
        self._network, self._name = network, name
        self._arrived_in, self._arrived = trio.open_memory_channel[tuple[bytes, IPAddress]](32)

    def arrived(self, data: bytes, sender: IPAddress) -> None:
        with suppress(trio.WouldBlock):
            self._arrived_in.send_nowait((data, sender))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    admit = staticmethod(lambda _data, _source: True)

    def serve(self, addresses: object) -> None:
        """All that is delivered is this host's."""

    async def send(self, data: bytes, address: IPAddress) -> None:
        await trio.lowlevel.checkpoint()
        self._network.deliver(data, self._name, address)

    async def receive(self) -> tuple[bytes, IPAddress]:
        return await self._arrived.receive()


def programmed(observed: Observed, forwards: bool = True) -> HostPlan:
    """The plan that would have a kernel hold what it holds."""
    up = _up(observed)
    ipip = observed.ipip is not None and observed.ipip.up and observed.ipip_local is not None
    peers = {
        key: PeerPlan(public_key=key, name=key, endpoint=peer.endpoint, allowed_ips=peer.allowed_ips)
        for key, peer in observed.peers.items()
    }

    def planned(routes: Mapping[IPNetwork, Route]) -> dict[IPNetwork, RoutePlan]:
        found = {}
        for destination, route in routes.items():
            way = _WAYS.get(route.device, Via.UNDERLAY)
            if (way is Via.TUNNEL and not up) or (way is Via.IPIP and not ipip):
                continue
            gateway = None if way is Via.TUNNEL else route.gateway
            found[destination] = RoutePlan(destination=destination, via=way, gateway=gateway, source=route.source)
        return found

    def led(table: OwnTable, priority: int) -> tuple[dict[IPNetwork, RoutePlan], dict[IPNetwork, str]]:
        versions = {rule.version for rule in observed.policy.rules if rule.priority == priority}
        ways = {network: route for network, route in planned(table.routes).items() if network.version in versions}
        ends = (network for network in table.last if network.version in versions and network not in ways)
        return ways, dict.fromkeys(ends, "its last resort takes it")

    routes = planned(observed.routes)
    refused: dict[IPNetwork, str] = {}
    encryption = None
    if T in observed.policy.tables:
        # A host route to the same address in the main table is asked later.
        sent, refused = led(observed.policy.table(T), LED)
        routes = {network: route for network, route in routes.items() if network not in refused} | sent
        encryption = Encryption(send=sent)
    back, lost = led(observed.policy.table(RETURNS), RETURNING)
    return HostPlan(
        node="",
        peers=peers if up else {},
        routes=routes,
        refused=refused,
        returns=back,
        returns_refused=lost,
        encryption=encryption,
        forwarding=observed.forwarding if forwards else frozenset(),
        ipip_remotes=_ipip_nodes(observed) if ipip else frozenset(),
        ipip_local=observed.ipip_local if ipip else None,
    )


_WAYS = {DEFAULT_INTERFACE: Via.TUNNEL, ipip_name(DEFAULT_INTERFACE): Via.IPIP}


def refused(observed: Observed) -> Iterator[AddressSet]:
    """The sources whose packets in clear a kernel drops."""
    sets = () if observed.table is None else observed.table.sets
    return (address_set for address_set in sets if address_set.name in ("refuse4", "refuse6"))


def _encrypted(hops: Iterable[Hop]) -> bool:
    return any(hop.encrypted for hop in hops)


def _ipip_nodes(observed: Observed) -> frozenset[IPAddress]:
    """From whom the packet filter takes IPIP."""
    sets = () if observed.table is None else observed.table.sets
    return next((address_set.addresses for address_set in sets if address_set.name == "ipip_nodes"), frozenset())


def _node(name: str, host: _Host) -> Node:
    return Node(
        name=name,
        public_key=host.place.public_key,
        internal_ips=host.place.inside,
        mesh_addresses=tuple(
            sorted(
                (interface.ip for interface in host.machine.observed.addresses),
                key=lambda address: (address.version, int(address)),
            )
        ),
        endpoint=Endpoint(host.place.outside[0].ip, DEFAULT_PORT),
    )


def _up(observed: Observed) -> bool:
    return observed.link is not None and observed.link.up


def _has(observed: Observed, address: IPAddress) -> bool:
    return _up(observed) and any(interface.ip == address for interface in observed.addresses)


def moved(home: Place, number: int) -> Place:
    """The place with another address on the LAN."""
    inside = [ip_interface(f"{interface.network[number]}/{interface.network.prefixlen}") for interface in home.inside]
    return evolve(home, inside=tuple(inside))


def place(name: str, public_key: str, *, dual: bool) -> Place:
    """The place of the host called `a-1`: number 1 of site a."""
    site, number = ord(name[0]), int(name.partition("-")[2])
    inside, outside = [f"192.168.{site}.{number}/24"], [f"198.51.{site}.{number}/24"]
    if dual:
        inside.append(f"fd00:{site:x}::{number:x}/64")
        outside.append(f"2001:db8:{site:x}::{number:x}/64")
    return Place(
        public_key=public_key,
        inside=tuple(map(ip_interface, inside)),
        outside=tuple(map(ip_interface, outside)),
    )
