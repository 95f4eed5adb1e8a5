"""A kernel in memory: `FakeHost` is the machine, which stays; `FakeKernel` is one agent's hold on it.

It decides with the real diff and changes its state by the real `kernel.predict`, so that a simulated agent programs
exactly what a real one would; only netlink is missing. Nothing is ever slow or wrong here unless a test says so:
`refuse` makes single changes fail, `broken` makes all of them fail, with `unreadable` nobody knows what is there,
`tamper` is somebody else at the keyboard.

    host = FakeHost()
    kernel = FakeKernel(host, Setup(private_key=key))
    await kernel.apply(plan)
    assert ip_network("10.4.0.0/16") in host.observed.routes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager

import trio
from attrs import evolve

from kilo_etcd.kernel.api import Kernel
from kilo_etcd.kernel.diff import (
    Difference,
    difference,
    is_drift,
    may_go_back,
    remember,
    superseded,
    wants_sizes,
)
from kilo_etcd.kernel.drift import device_period
from kilo_etcd.kernel.echo import SPACING, EchoRequests
from kilo_etcd.kernel.errors import KernelError
from kilo_etcd.kernel.firewall import sizes
from kilo_etcd.kernel.firewall.chains import Obstacle, Refusal
from kilo_etcd.kernel.firewall.forward import AddForward, DeleteForward
from kilo_etcd.kernel.firewall.openings import AddOpening, DeleteOpening
from kilo_etcd.kernel.firewall.table import DeleteTable, ReplaceTable
from kilo_etcd.kernel.handshake_clock import HandshakeClock
from kilo_etcd.kernel.needs import possible
from kilo_etcd.kernel.predict import apply_changes
from kilo_etcd.kernel.routing.policy import removal
from kilo_etcd.kernel.routing.rules import ForeignRule
from kilo_etcd.kernel.state import (
    ROUTE_PROTOCOL,
    AddRoute,
    ApplyReport,
    Backend,
    Change,
    DeleteLink,
    DeleteRoute,
    DeviceTarget,
    FailedChange,
    HostAddresses,
    Memory,
    Observed,
    PeerActivity,
    RemovePeer,
    ReplaceRoute,
    RestoreSysctl,
    Route,
    SetDevice,
    SetPeer,
    Setup,
    ipip_name,
    reverse_path,
    unreachable_route,
)
from kilo_etcd.kernel.userspace import public_key_of
from kilo_etcd.kernel.write.wireguard import raw
from kilo_etcd.model import Endpoint, IPAddress
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.walk import longest_match
from kilo_etcd.topology.segments import host_network

HANDSHAKE_BYTES = 148
"""What a handshake begins with."""


class FakeHost:
    """A machine: what its kernel holds, and what tests do to it."""

    def __init__(self, addresses: HostAddresses | None = None) -> None:
        self.observed = Observed()
        self.addresses = addresses or HostAddresses()
        self.history: list[Change] = []
        """Every change ever made by a `FakeKernel`, oldest first."""
        self.refuse: Callable[[Change], str | None] = lambda change: None
        """Why a change fails, or None if it succeeds."""
        self.broken: str | None = None
        """Why nothing can be programmed at all."""
        self.unreadable: str | None = None
        """Why nothing can be read; what needs no reading can be programmed all the same."""
        self.obstacles: tuple[Obstacle, ...] = ()
        self.refusals: tuple[Refusal, ...] = ()
        """What would drop forwarded traffic."""
        self.bypasses: tuple[str, ...] = ()
        """Rules of others by which packets leave in clear."""
        self.listening: frozenset[int] = frozenset()
        """TCP ports at which something listens."""
        self.moved = trio.Event()
        """Set by a test that changes `addresses`."""
        self.reach: Callable[[IPAddress], bool] = lambda address: False
        """Whether an echo request to an address is answered; asked once for each."""
        self.taken: Callable[[IPAddress, IPAddress | None], Route | str] = self._own_route
        """The route to an address from a source address, or why the kernel refuses such packets."""
        self.taken_by_wireguard: Callable[[IPAddress], Route | str] = lambda address: Route(
            destination=host_network(address), device="eth0"
        )
        """The same for a packet of WireGuard's own."""
        self.foreign_rules: tuple[ForeignRule, ...] = ()
        """Policy rules of other programs."""
        self.resolves: Callable[[IPAddress], bool] = lambda address: False
        """Whether an address answers on a link of the host (ARP, ND)."""
        self.no_pings: str | None = None
        """Why the host may not ping."""
        self.largest = float("inf")
        """Bytes of the largest packet that arrives whole."""
        self.fragments = False
        """Whether the network divides larger packets that do not forbid it, and delivers the parts."""
        self.passes: Callable[[IPAddress, int], bool | None] = lambda address, size: size <= self.largest
        """Whether a packet of so many bytes arrives; None: nothing is answered meanwhile."""
        self.large: list[tuple[IPAddress, int]] = []
        """Addresses and sizes of the large echo requests that were sent."""
        self.clock: Callable[[], float] = trio.current_time
        """The host's own clock, which may be wrong and may jump; handshakes are dated by it."""
        self.shakes: Callable[[str], bool] = lambda public_key: False
        """Whether a peer that is given an endpoint and keepalive answers at once with a handshake."""
        self._listeners: list[FakeKernel] = []

    def tamper(
        self, changes: Sequence[Change], interface: str = "kilo0", reason: str = "another writer changed it"
    ) -> None:
        """Somebody else makes changes; the kernel reports them, except WireGuard's, which a look finds."""
        self.observed = apply_changes(self.observed, changes, interface)
        silent = all(isinstance(change, SetDevice | SetPeer | RemovePeer) for change in changes)
        for listener in self._listeners:
            if silent:
                listener.look_at(trio.current_time() + device_period(len(self.observed.peers)))
            else:
                listener.drifted(reason)

    def receive_from(self, public_key: str, *, endpoint: Endpoint | None = None, when: float | None = None) -> None:
        """A handshake with a peer, perhaps from a new endpoint (roaming)."""
        peer = self.observed.peers[public_key]
        updated = evolve(
            peer,
            endpoint=endpoint or peer.endpoint,
            last_handshake=self.clock() if when is None else when,
            rx_bytes=peer.rx_bytes + HANDSHAKE_BYTES,
        )
        self.observed = evolve(self.observed, peers={**self.observed.peers, public_key: updated})
        for listener in self._listeners:
            listener.peer_sent()

    def send_to(self, public_key: str) -> None:
        """WireGuard sends a peer a packet, which nothing answers."""
        peer = self.observed.peers[public_key]
        sent = evolve(peer, tx_bytes=peer.tx_bytes + HANDSHAKE_BYTES)
        self.observed = evolve(self.observed, peers={**self.observed.peers, public_key: sent})

    def _own_route(self, address: IPAddress, source: IPAddress | None) -> Route | str:
        return longest_match(self.observed.routes.items(), address) or "Network is unreachable"

    def watch(self, listener: FakeKernel) -> None:
        """Report to `listener` what happens on the host, as the kernel does to whoever subscribes."""
        self._listeners.append(listener)

    def unwatch(self, listener: FakeKernel) -> None:
        """Report nothing to `listener` any more: its agent has ended."""
        self._listeners.remove(listener)

    def cleanup(self, interface: str = "kilo0", protocol: int = ROUTE_PROTOCOL) -> tuple[Change, ...]:
        """As `kernel.cleanup`."""
        changes = removal(self.observed.policy, protocol)
        changes.extend(DeleteRoute(route) for route in self.observed.routes.values())
        changes.extend(
            DeleteRoute(unreachable_route(network)) for network in sorted(self.observed.unreachable_routes, key=str)
        )
        if self.observed.ipip is not None:
            changes.append(DeleteLink(ipip_name(interface)))
        if self.observed.link is not None and self.observed.ours:
            changes.append(DeleteLink(interface))
        if self.observed.table is not None:
            changes.append(DeleteTable(self.observed.table.name))
        changes.extend(DeleteForward(rule) for rule in sorted(self.observed.forward_rules, key=str))
        changes.extend(DeleteOpening(opening) for opening in sorted(self.observed.openings, key=str))
        changes.extend(RestoreSysctl(reverse_path(name), value) for name, value in self.observed.loosened.items())
        self.observed = apply_changes(self.observed, changes, interface)
        self.history.extend(changes)
        return tuple(changes)


class FakeKernel:
    """See `kernel.api.Kernel`. A new one on the same host is an agent that was started again."""

    def __init__(self, host: FakeHost, setup: Setup, *, delay: float = 0.0) -> None:
        """`delay`: seconds (of trio's clock) that an `apply` takes when it changes anything."""
        self.host = host
        self.writes = 0
        self.plan: HostPlan | None = None
        self._setup = setup
        self._delay = delay
        self._memory = Memory()
        self._sizes_refused = ""
        self._public_key = public_key_of(raw(setup.private_key))
        self._lock = trio.Lock()
        self._failed: frozenset[Change] = frozenset()
        self._drift: str | None = None
        self._event = trio.Event()
        self._look_at = float("inf")
        self._clock: HandshakeClock | None = None
        host.watch(self)

    @property
    def backend(self) -> Backend:
        """Always `kernel`: nothing differs here between the kernel and a program."""
        return "kernel"

    def drifted(self, reason: str) -> None:
        """Somebody else has changed something: `wait_drift` returns with `reason`, once there is a plan."""
        if self.plan is not None:
            self._drift = reason
            self._event.set()

    def look_at(self, when: float) -> None:
        """The next look at the device, of all that the real kernel takes, which finds something."""
        self._look_at = min(self._look_at, when)
        self._event.set()

    def peer_sent(self) -> None:
        """A packet of a peer has arrived: if an endpoint may go back to an old one thereby, the device is looked at
        soon."""
        if may_go_back(self._memory, self.host.clock()):
            self.look_at(trio.current_time() + device_period(len(self.host.observed.peers)))

    async def check(self) -> None:
        """Implements `kernel.api.Kernel.check`: nothing is ever in the way here."""
        await trio.lowlevel.checkpoint()

    async def apply(self, plan: HostPlan, *, fresh: bool = False, reset: Collection[str] = ()) -> ApplyReport:
        """Implements `kernel.api.Kernel.apply`; `FakeHost.broken` and `FakeHost.refuse` make it fail."""
        async with self._lock:
            await trio.lowlevel.checkpoint()
            if self.host.broken is not None:
                raise KernelError(self.host.broken)
            if fresh:
                self._sizes_refused = ""
            if fresh or self.plan is None:
                self._read()
            # What is done by somebody from here on is drift again.
            self._drift = None
            observed = self._now()
            todo, refused = self._decide_and_ask(plan, observed, reset)
            if reasons := [why for change, why in refused.items() if sizes.is_set_by(change)]:
                self._sizes_refused = reasons[0]
                todo, refused = self._decide_and_ask(plan, observed, reset)
            made = possible(todo.changes, refused)
            self._failed = frozenset(refused)
            made += superseded([change for change in todo.changes if change not in made], self._now())
            if made and self._delay:
                await trio.sleep(self._delay)
            self.host.observed = apply_changes(self.host.observed, made, self._setup.interface)
            for change in made:
                if isinstance(change, SetPeer) and change.persistent_keepalive and self.host.shakes(change.public_key):
                    self.host.receive_from(change.public_key)
            self.host.history.extend(made)
            self.writes += len(made)
            self.plan = plan
            self._memory = remember(
                plan, self._memory, made=made, failed=refused, observed=observed, now=self.host.clock()
            )
            failures = (*todo.failures, *(_failure(change, why) for change, why in refused.items()))
            wanted = self._sizes_refused and wants_sizes(plan, observed, self._target(plan))
            return ApplyReport(changes=made, failures=failures, notes=(self._sizes_refused,) if wanted else ())

    def _decide_and_ask(
        self, plan: HostPlan, observed: Observed, reset: Collection[str]
    ) -> tuple[Difference, dict[Change, str]]:
        """What is to be done, and what of it the host refuses, with its reasons."""
        todo = self._decide(plan, observed, reset)
        return todo, {change: why for change in todo.changes if (why := self.host.refuse(change)) is not None}

    def _decide(self, plan: HostPlan, observed: Observed, reset: Collection[str]) -> Difference:
        return difference(plan, observed, self._memory, self._target(plan), reset=reset)

    async def preview(self, plan: HostPlan, *, failed: bool = True) -> tuple[Change, ...]:
        """Implements `kernel.api.Kernel.preview`."""
        await trio.lowlevel.checkpoint()
        changes = difference(plan, self._read(), self._memory, self._target(plan)).changes
        return changes if failed else possible(changes, self._failed)

    async def observe(self) -> Observed:
        """Implements `kernel.api.Kernel.observe`. Differences that it finds make `wait_drift` return."""
        await trio.lowlevel.checkpoint()
        observed = self._read()
        if (plan := self.plan) is not None:
            changes = possible(difference(plan, observed, self._memory, self._target(plan)).changes, self._failed)
            if any(is_drift(change, observed, self._memory) for change in changes):
                self.drifted("found undone")
        return observed

    async def refusals(self) -> tuple[Refusal, ...]:
        """Implements `kernel.api.Kernel.refusals`: those of `FakeHost.refusals`."""
        await trio.lowlevel.checkpoint()
        return self.host.refusals

    async def obstacles(self) -> tuple[Obstacle, ...]:
        """Implements `kernel.api.Kernel.obstacles`: those of `FakeHost.obstacles`."""
        await trio.lowlevel.checkpoint()
        return self.host.obstacles

    async def bypasses(self) -> tuple[str, ...]:
        """Implements `kernel.api.Kernel.bypasses`: those of `FakeHost.bypasses`."""
        await trio.lowlevel.checkpoint()
        return self.host.bypasses

    async def listening(self) -> frozenset[int]:
        """Implements `kernel.api.Kernel.listening`: the ports of `FakeHost.listening`."""
        await trio.lowlevel.checkpoint()
        return self.host.listening

    async def peer_activity(self) -> PeerActivity:
        """Implements `kernel.api.Kernel.peer_activity`."""
        await trio.lowlevel.checkpoint()
        self._read()
        if self._clock is None:
            self._clock = HandshakeClock(lambda: self.host.clock(), trio.current_time)
        peers = self._clock.date(self.host.observed.peers)
        return PeerActivity(
            time=self._clock.now(),
            peers=peers,
            set_back=self._clock.set_back,
            was_at=self._clock.was_at,
            seen=self._clock.seen,
        )

    async def count_echoes(self, addresses: Collection[IPAddress], requests: EchoRequests) -> Mapping[IPAddress, int]:
        """Implements `kernel.api.Kernel.count_echoes`, as `ping`."""
        if self.host.no_pings is not None:
            raise KernelError(self.host.no_pings)
        await trio.sleep(SPACING * (requests.times - 1))
        every = [address for address in addresses for _ in range(requests.times) if self.host.reach(address)]
        return Counter(every)

    async def ping(self, addresses: Collection[IPAddress], requests: EchoRequests) -> Mapping[IPAddress, float]:
        """Implements `kernel.api.Kernel.ping`: `FakeHost.reach` decides who answers, and who does not costs the time
        that waiting takes."""
        if self.host.no_pings is not None:
            raise KernelError(self.host.no_pings)
        answered: dict[IPAddress, float] = {}
        if requests.size:
            self.host.large += ((address, requests.size) for address in addresses for _ in range(requests.times))
        if requests.size > self.host.largest and (requests.dont_fragment or not self.host.fragments):
            await trio.sleep(SPACING * (requests.times - 1) + requests.patience)
            return answered
        for turn in range(requests.times):
            answered.update(
                (address, 0.0) for address in addresses if address not in answered and self.host.reach(address)
            )
            if len(answered) == len(addresses) or (requests.first and answered):
                await trio.lowlevel.checkpoint()
                break
            await trio.sleep(SPACING if turn + 1 < requests.times else requests.patience)
        return answered

    async def passes(self, address: IPAddress, size: int, patience: float) -> bool | None:
        """Implements `kernel.api.Kernel.passes`, by `FakeHost.passes`; no answer costs `patience`."""
        self.host.large.append((address, size))
        answer = self.host.passes(address, size)
        await trio.sleep(patience if answer is None else SPACING)
        return answer

    async def foreign_rules(self) -> tuple[ForeignRule, ...]:
        """Implements `kernel.api.Kernel.foreign_rules`, by `FakeHost.foreign_rules`."""
        await trio.lowlevel.checkpoint()
        return self.host.foreign_rules

    async def routes_taken(
        self, sources: Mapping[IPAddress, IPAddress | None], *, by_wireguard: bool = False
    ) -> Mapping[IPAddress, Route | str]:
        """Implements `kernel.api.Kernel.routes_taken`, by `FakeHost.taken`; WireGuard sends by
        `FakeHost.taken_by_wireguard`."""
        await trio.lowlevel.checkpoint()
        if by_wireguard:
            return {address: self.host.taken_by_wireguard(address) for address in sources}
        return {address: self.host.taken(address, source) for address, source in sources.items()}

    async def resolved(self, addresses: Collection[IPAddress]) -> frozenset[IPAddress]:
        """Implements `kernel.api.Kernel.resolved`, by `FakeHost.resolves`."""
        await trio.lowlevel.checkpoint()
        return frozenset(filter(self.host.resolves, addresses))

    async def wait_moved(self) -> None:
        """Implements `kernel.api.Kernel.wait_moved`; `FakeHost.moved` ends the wait."""
        await self.host.moved.wait()
        self.host.moved = trio.Event()

    async def wait_drift(self) -> str:
        """Implements `kernel.api.Kernel.wait_drift`."""
        await trio.lowlevel.checkpoint()
        while self._drift is None:
            self._event = trio.Event()
            with trio.move_on_at(self._look_at):
                await self._event.wait()
            if trio.current_time() >= self._look_at:
                self._look_at = float("inf")
                try:
                    await self.observe()
                except KernelError as error:
                    self._drift = str(error)
        reason, self._drift = self._drift, None
        return reason

    def _read(self) -> Observed:
        if self.host.unreadable is not None:
            raise KernelError(self.host.unreadable)
        return self._now()

    def _now(self) -> Observed:
        return evolve(self.host.observed, time=self.host.clock())

    def _target(self, plan: HostPlan) -> DeviceTarget:
        overhead = 100 if plan.ipip_remotes else 80
        return DeviceTarget(
            interface=self._setup.interface,
            public_key=self._public_key,
            private_key=self._setup.private_key,
            mtu=self._setup.mtu or 1500 - overhead,
            forward_rules=self._setup.forward_rules,
            clamp_mss=self._setup.clamp_mss and not self._sizes_refused,
            protocol=self._setup.protocol,
        )


@asynccontextmanager
async def open_fake_kernel(host: FakeHost, setup: Setup, *, delay: float = 0.0) -> AsyncIterator[Kernel]:
    """As `kernel.open_kernel`, on a host in memory."""
    kernel = FakeKernel(host, setup, delay=delay)
    try:
        yield kernel
    finally:
        host.unwatch(kernel)


def _failure(change: Change, why: str) -> FailedChange:
    destination = change.route.destination if isinstance(change, AddRoute | ReplaceRoute | DeleteRoute) else None
    aside = isinstance(change, ReplaceTable | DeleteTable | AddForward | DeleteForward | AddOpening | DeleteOpening)
    if isinstance(change, AddRoute | DeleteRoute) and change.route.unreachable:
        destination, aside = None, True
    return FailedChange(subject=str(change), text=why, destination=destination, aside=aside)
