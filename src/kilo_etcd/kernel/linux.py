"""The kernel of a Linux host as an async `Kernel`: keeps the state that it expects, applies plans, reports drift.

Between two applies little is read: the state after our own changes is computed (`kernel.predict`), and the kernel
says when somebody else changes something (`kernel.drift`). Of WireGuard's peers it does not, so the device is looked at
now and then, in a way that costs little as long as nothing has changed. The whole is read anew at the start, after a
drift, after a failure and when the caller asks for it. Everything that blocks runs in a worker thread, one call at a
time, and is not cancelled half way.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TypeVar

import trio
from attrs import evolve

from kilo_etcd.base import descriptors
from kilo_etcd.kernel import echo, listening, sysctl
from kilo_etcd.kernel.api import Kernel
from kilo_etcd.kernel.diff import (
    Difference,
    difference,
    is_drift,
    may_go_back,
    must_look,
    remember,
    shadows,
    superseded,
    wants_sizes,
)
from kilo_etcd.kernel.drift import AddressEvents, DriftWatch, affects_path, device_period
from kilo_etcd.kernel.egress import Egress
from kilo_etcd.kernel.errors import NO_PERMISSION, KernelError, NetlinkError, cannot_ping, taken, unreadable, why_not
from kilo_etcd.kernel.firewall import sizes
from kilo_etcd.kernel.firewall.chains import Obstacle, Refusal
from kilo_etcd.kernel.firewall.forward import DeleteForward, comment_prefix
from kilo_etcd.kernel.firewall.netfilter import Reports
from kilo_etcd.kernel.firewall.packet_filter import table_name
from kilo_etcd.kernel.host import Host, may_change_the_network
from kilo_etcd.kernel.needs import possible
from kilo_etcd.kernel.netlink.codec import UNREADABLE
from kilo_etcd.kernel.netlink.sockets import Listener
from kilo_etcd.kernel.predict import apply_changes
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.routing.rules import ForeignRule
from kilo_etcd.kernel.state import (
    PEER_PROTOCOL,
    ROUTE_PROTOCOL,
    AllowPings,
    ApplyReport,
    Backend,
    Change,
    CreateLink,
    DeleteAddress,
    DeleteLink,
    DeviceTarget,
    FailedChange,
    HostAddresses,
    Link,
    Memory,
    Observed,
    PeerActivity,
    Route,
    SetPeer,
    Setup,
    StartUserspace,
)
from kilo_etcd.kernel.userspace import public_key_of
from kilo_etcd.kernel.write.wireguard import raw
from kilo_etcd.model import IPAddress
from kilo_etcd.model.hostplan import HostPlan

_T = TypeVar("_T")

_ROUNDS = 3
_DYING, _POLL = 2.0, 0.01
"""Seconds for a device to follow its dead process, and between two looks at it."""


@asynccontextmanager
async def open_kernel(setup: Setup) -> AsyncIterator[Kernel]:
    """The kernel of this host. Nothing is changed by opening or closing; KernelError if there is no WireGuard."""
    try:
        raw(setup.private_key)
    except OSError as error:
        raise KernelError(f"the private key is unusable: {error.strerror}") from None
    public_key = public_key_of(raw(setup.private_key))
    with _descriptors_named():
        host = Host(
            setup.interface, setup.uapi_dir, setup.runtime_dir,
            public_key=public_key, forward_rules=setup.forward_rules, protocol=setup.protocol,
        )  # fmt: skip
    try:
        with _descriptors_named():
            listener, reports = (
                Listener(replies.GROUPS),
                Reports(table_name(setup.interface), comment_prefix(setup.interface) if setup.forward_rules else ""),
            )
        listener.leave_out(host.port, (replies.NEWROUTE, replies.DELROUTE))
        try:
            backend = await _ask_kernel(lambda: host.choose(setup.wireguard, setup.userspace_command))
            yield LinuxKernel(setup, host, listener, reports, backend)
        finally:
            listener.close()
            reports.close()
    finally:
        host.close()


async def cleanup(
    interface: str,
    *,
    public_key: str | None = None,
    uapi_dir: str = "/var/run/wireguard",
    runtime_dir: str = "/run/kilo-etcd",
    protocol: int = ROUTE_PROTOCOL,
) -> tuple[Change, ...]:
    """Remove everything that an agent ever made for `interface`; what was removed. Nothing the second time.

    `public_key` is this host's, by which a device is known as ours that no route of ours leads to; `protocol` marks our
    routes. What an agent with another interface has made stays; with the protocol of connections, so does all that an
    agent with this one has. KernelError.
    """
    return await _ask_host(_cleanup, interface, public_key, protocol, uapi_dir=uapi_dir, runtime_dir=runtime_dir)


async def leftovers(interface: str, *, public_key: str | None = None, protocol: int) -> tuple[Change, ...]:
    """What `cleanup` would make. KernelError."""
    return await _ask_host(Host.leftovers, interface, public_key, protocol)


async def peers_of(interface: str, public_key: str) -> PeerActivity:
    """What WireGuard knows of the peers of a connection; nothing if there is no such device. KernelError."""
    return await _ask_host(Host.peer_activity, interface, public_key, PEER_PROTOCOL)


async def other_agent(interface: str, *, public_key: str | None = None) -> str:
    """The WireGuard device of an agent of this host that has another interface than this; empty: there is none.
    `public_key` is this host's. KernelError."""
    return await _ask_host(lambda host: host.other_agent(host.observe()), interface, public_key, ROUTE_PROTOCOL)


async def agent_has(interface: str, public_key: str | None) -> bool:
    """Whether an interface is an agent's, and not that of a connection with `public_key`. KernelError."""
    return await _ask_host(lambda host: host.agent_has(host.observe()), interface, public_key, PEER_PROTOCOL)


async def _ask_host(
    question: Callable[[Host], _T], interface: str, public_key: str | None, protocol: int, **directories: str
) -> _T:
    """The answer of the host of an interface. KernelError."""

    def ask() -> _T:
        # Only agents ever add rules for forwarding.
        agents = protocol == ROUTE_PROTOCOL
        host = Host(interface, public_key=public_key or "", forward_rules=agents, protocol=protocol, **directories)
        try:
            return question(host)
        finally:
            host.close()

    return await _ask_kernel(ask)


def _cleanup(host: Host) -> tuple[Change, ...]:
    if not may_change_the_network():
        raise KernelError(f"nothing was cleaned up: {NO_PERMISSION}")
    all_made: list[Change] = []
    for _ in range(_ROUNDS):
        changes = host.leftovers()
        if not changes:
            if not host.agent_has(host.observe()):
                host.forget_records()
            break
        made, failed = host.make(changes)
        all_made.extend(made)
        if failed and not made:
            raise KernelError(failed[0][1].text)
    return tuple(all_made)


async def list_addresses() -> HostAddresses:
    """The host's addresses, links and default routes."""

    def read() -> HostAddresses:
        host = Host("")
        try:
            return host.addresses()
        finally:
            host.close()

    return await _ask_kernel(read)


async def _in_thread(work: Callable[[], _T]) -> _T:
    with _descriptors_named():
        return await trio.to_thread.run_sync(work)


@contextmanager
def _descriptors_named() -> Iterator[None]:
    """Raise KernelError where something could not be opened for want of a descriptor: that says nothing of what was
    to be opened."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NetlinkError) or not descriptors.is_shortage(error):
            raise
        raise KernelError(f"the kernel cannot be asked: {why_not(error)}") from None


async def _ask_kernel(work: Callable[[], _T]) -> _T:
    """As `_in_thread`, with any OSError as a KernelError: netlink may fail for a time, mostly for want of memory, and
    the caller is to retry."""
    try:
        return await _in_thread(work)
    except OSError as error:
        raise KernelError(unreadable(error)) from error


class LinuxKernel:
    """See `kernel.api.Kernel`; made by `open_kernel`."""

    def __init__(self, setup: Setup, host: Host, listener: Listener, reports: Reports, backend: Backend) -> None:
        self._setup = setup
        self._host = host
        self._listener = listener
        self._reports = reports
        self._backend: Backend = backend
        self._public_key = public_key_of(raw(setup.private_key))
        self._lock = trio.Lock()
        self._writes = 0
        self._memory = Memory()
        self._sizes_refused = ""
        """Why the kernel takes no rules that have TCP fit into the tunnel; empty: it does, as far as is known."""
        self._observed: Observed | None = None
        self._plan: HostPlan | None = None
        self._watch: DriftWatch | None = None
        self._egress = Egress(host.egress_mtus, self._uplinks)
        self._address_events = AddressEvents()
        self._allocated: HostPlan | None = None
        """A plan that `_observed` fulfils to the last."""
        self._failed: frozenset[Change] = frozenset()
        """The changes that failed when the last plan was applied."""
        self._drift: str | None = None
        self._wake = trio.Event()
        self._moved = trio.Event()
        self._sources: tuple[IPAddress, ...] = ()
        """This host's addresses on whose devices the reverse-path check matters, of the last plan."""
        self._index = 0
        """Of the interface when it was last ours."""
        self._fingerprint: int | None = None
        """The device's fingerprint when it last was as expected."""
        self._looked_at = True
        """Whether the device is looked at; not while it cannot be read, which has been reported."""

    def __repr__(self) -> str:
        peers = "unread" if self._observed is None else f"{len(self._observed.peers)} peers"
        return f"<LinuxKernel {self._setup.interface} {self._backend} {peers} writes={self.writes}>"

    @property
    def backend(self) -> Backend:
        """Implements `kernel.api.Kernel.backend`."""
        return self._backend

    @property
    def writes(self) -> int:
        """Implements `kernel.api.Kernel.writes`."""
        return self._writes

    async def check(self) -> None:
        """Implements `kernel.api.Kernel.check`."""
        async with self._lock:
            await _ask_kernel(lambda: self._host.check(self._backend, self._setup.userspace_command))

    async def apply(self, plan: HostPlan, *, fresh: bool = False, reset: Collection[str] = ()) -> ApplyReport:
        """Implements `kernel.api.Kernel.apply`, in a thread: other tasks run on, and the next call waits."""
        async with self._lock:
            before = self._host.writes
            try:
                return await _ask_kernel(lambda: self._apply(plan, fresh, frozenset(reset)))
            finally:
                self._writes += self._host.writes - before

    async def preview(self, plan: HostPlan, *, failed: bool = True) -> tuple[Change, ...]:
        """Implements `kernel.api.Kernel.preview`."""
        async with self._lock:
            changes = await _ask_kernel(lambda: self._preview(plan))
            return changes if failed else possible(changes, self._failed)

    async def observe(self) -> Observed:
        """Implements `kernel.api.Kernel.observe`. Differences that it finds make `wait_drift` return."""
        async with self._lock:
            observed = await _ask_kernel(self._read)
            self._notice(observed)
            return observed

    async def obstacles(self) -> tuple[Obstacle, ...]:
        """Implements `kernel.api.Kernel.obstacles`, for the plan in force."""
        async with self._lock:
            return await _ask_kernel(lambda: self._host.obstacles(self._plan))

    async def refusals(self) -> tuple[Refusal, ...]:
        """Implements `kernel.api.Kernel.refusals`, for the plan in force."""
        async with self._lock:
            return await _ask_kernel(lambda: self._host.refusals(self._plan))

    async def bypasses(self) -> tuple[str, ...]:
        """Implements `kernel.api.Kernel.bypasses`."""
        async with self._lock:
            return await _ask_kernel(lambda: self._host.bypasses(self._plan))

    async def listening(self) -> frozenset[int]:
        """Implements `kernel.api.Kernel.listening`, from `/proc/net`."""
        return await _ask_kernel(listening.read)

    async def peer_activity(self) -> PeerActivity:
        """Implements `kernel.api.Kernel.peer_activity`."""
        async with self._lock:
            return await _ask_kernel(self._host.peer_activity)

    async def ping(self, addresses: Collection[IPAddress], requests: echo.EchoRequests) -> Mapping[IPAddress, float]:
        """Implements `kernel.api.Kernel.ping`. If nobody may ping on this host (the kernel's default), it allows it to
        the agent's own group first."""
        return await self._allowed(lambda: echo.ping(addresses, requests))

    async def count_echoes(
        self, addresses: Collection[IPAddress], requests: echo.EchoRequests
    ) -> Mapping[IPAddress, int]:
        """Implements `kernel.api.Kernel.count_echoes`, as `ping`."""
        return await self._allowed(lambda: echo.count(addresses, requests))

    async def passes(self, address: IPAddress, size: int, patience: float) -> bool | None:
        """Implements `kernel.api.Kernel.passes`, as `ping`."""
        return await self._allowed(lambda: echo.passes(address, size, patience))

    async def _allowed(self, send: Callable[[], Awaitable[_T]]) -> _T:
        """The result of `send`, which pings."""
        failed: Sequence[tuple[Change, FailedChange]] = ()
        try:
            try:
                return await send()
            except PermissionError:
                if not sysctl.nobody_may_ping():
                    raise  # A range that somebody has chosen is left as it is.
                async with self._lock:
                    _, failed = await _in_thread(lambda: self._host.make([AllowPings(os.getegid())]))
            return await send()
        except OSError as error:
            raise KernelError(failed[0][1].text if failed else cannot_ping(error)) from None

    async def foreign_rules(self) -> tuple[ForeignRule, ...]:
        """Implements `kernel.api.Kernel.foreign_rules`."""
        async with self._lock:
            return await _ask_kernel(self._host.foreign_rules)

    async def routes_taken(
        self, sources: Mapping[IPAddress, IPAddress | None], *, by_wireguard: bool = False
    ) -> Mapping[IPAddress, Route | str]:
        """Implements `kernel.api.Kernel.routes_taken`."""
        async with self._lock:
            return await _ask_kernel(lambda: self._host.routes_taken(sources, by_wireguard=by_wireguard))

    async def resolved(self, addresses: Collection[IPAddress]) -> frozenset[IPAddress]:
        """Implements `kernel.api.Kernel.resolved`."""
        async with self._lock:
            return await _ask_kernel(lambda: self._host.resolved(addresses))

    async def wait_drift(self) -> str:
        """Implements `kernel.api.Kernel.wait_drift`. Of routes, rules and tables the kernel itself reports; the
        WireGuard device, of which it reports nothing, is looked at now and then."""
        look_at = trio.current_time()
        while self._drift is None:
            with trio.move_on_at(look_at):
                await self._wait_event()
            async with self._lock:
                self._note_activity()
                if trio.current_time() >= look_at and self._drift is None:
                    await _in_thread(self._look_at_device)
                    look_at = trio.current_time() + device_period(0 if self._plan is None else len(self._plan.peers))
        reason, self._drift = self._drift, None
        return reason

    async def wait_moved(self) -> None:
        """Implements `kernel.api.Kernel.wait_moved`."""
        await self._moved.wait()
        self._moved = trio.Event()

    async def _wait_event(self) -> None:
        """Until the kernel reports something, or `observe` has found something."""
        self._wake = trio.Event()
        async with trio.open_nursery() as nursery:

            async def readable(source: socket.socket) -> None:
                await trio.lowlevel.wait_readable(source)
                nursery.cancel_scope.cancel()

            nursery.start_soon(readable, self._listener.socket)
            if self._reports.socket is not None:
                nursery.start_soon(readable, self._reports.socket)
            await self._wake.wait()
            nursery.cancel_scope.cancel()

    def _note_activity(self) -> None:
        if (news := self._reports.news(self._host.netfilter.port)) is not None and self._plan is not None:
            self._drift = news
            self._observed = None
        while (events := self._listener.read()) != []:
            if self._note_event(events):
                self._moved.set()
            if events is None:
                if self._plan is not None:
                    self._drift = "the kernel reported more than could be read"
                    self._observed = None
                continue
            for kind, body in events:
                if self._watch is not None and (news := self._news(self._watch, kind, body)) is not None:
                    self._drift = news
                    self._observed = None

    @staticmethod
    def _news(watch: DriftWatch, kind: int, body: bytes) -> str | None:
        try:
            return watch.news(kind, body)
        except UNREADABLE:
            return "the kernel reported something that could not be read"

    def _look_at_device(self) -> None:
        """Whether another program has changed the WireGuard device, for which there is no event."""
        plan, believed = self._plan, self._watch.observed if self._watch is not None else None
        if plan is None or believed is None or believed.link is None or not self._looked_at:
            return
        try:
            fingerprint = self._host.fingerprint(believed.link)
            if fingerprint is None or (
                fingerprint == self._fingerprint and not may_go_back(self._memory, self._host.handshake_clock.now())
            ):
                return
            state = self._host.device(believed.link)
        except (OSError, KernelError) as error:
            self._looked_at = False
            why = why_not(error) if isinstance(error, OSError) else error
            self._drift = f"{believed.link.name} cannot be read: {why}"
        else:
            if state is None:
                return
            present = evolve(
                believed,
                time=self._host.handshake_clock.now(),
                public_key=state.public_key,
                listen_port=state.listen_port,
                mark=state.mark,
                peers=state.peers,
            )
            if (change := self._undone(plan, present)) is None:
                self._fingerprint = fingerprint
                return
            self._drift = self._drift_text(change)
        self._observed = None

    def _undone(self, plan: HostPlan, observed: Observed) -> Change | None:
        """The first change that another program must have made necessary."""
        memory = self._memory
        changes = difference(plan, observed, memory, self._target(plan)).changes
        able = possible(changes, self._failed)
        return next((change for change in able if is_drift(change, observed, memory)), None)

    def _drift_text(self, change: Change) -> str:
        went_back = isinstance(change, SetPeer) and change.public_key in self._memory.former
        return f"{'WireGuard went back to a former endpoint' if went_back else 'found undone'}: {change}"

    def _note_event(self, events: list[tuple[int, bytes]] | None) -> bool:
        """What events mean for others than the plan (None: some were lost). Whether the host may have moved."""
        own = {link.index for link in self._own()}
        moved = False
        with suppress(*UNREADABLE):
            if events is not None:
                for kind, body in events:
                    moved |= self._address_events.news(kind, body, own)
                if any(affects_path(kind, body, own) for kind, body in events):
                    self._egress.forget()
                return moved
        # What they reported is not known.
        self._egress.forget()
        self._address_events.forget()
        return True

    def _own(self) -> list[Link]:
        observed = self._watch.observed if self._watch is not None else Observed()
        return [link for link in (observed.link, observed.ipip) if link is not None]

    def _notice(self, observed: Observed) -> None:
        """Wake the waiter if a reading shows what no event told: WireGuard changes make none."""
        if self._plan is None or not observed.ours:
            return
        if (change := self._undone(self._plan, observed)) is not None:
            self._drift = self._drift_text(change)
            self._wake.set()

    def _read(self) -> Observed:
        while (events := self._listener.read()) != []:
            # What they say of the plan is forgotten: the state is about to be read.
            if self._note_event(events):
                trio.from_thread.run_sync(self._moved.set)
        self._reports.news(0)
        self._egress.expire()
        self._allocated = None
        several = self._host.several
        self._observed = self._observe_settled()
        if self._host.several is not several:
            self._egress.forget()  # What is asked of the ways is different now.
        if self._watch is not None:
            # What is about to be read takes the place of the events that were just forgotten.
            self._watch.ways = self._host.ways
            self._watch.links = dict(self._host.links)
        return self._observed

    def _observe_settled(self) -> Observed:
        """A reading; if userspace WireGuard has just died, one taken after its device has gone too."""
        deadline = time.monotonic() + _DYING
        while True:
            observed = self._host.observe(self._sources)
            dying = observed.link is not None and not observed.ours and observed.link.index == self._index
            if not dying or time.monotonic() > deadline:
                return observed
            time.sleep(_POLL)

    def _ready(self) -> Observed:
        """The expected state, read if it is not known; KernelError if the interface is another program's."""
        observed = self._observed or self._read()
        if observed.link is not None and not observed.ours:
            raise KernelError(taken(observed.link.name, observed.link.kind, observed.public_key))
        return observed

    def _look_for(self, plan: HostPlan) -> None:
        """Have the next reading tell what this plan needs to know; what is believed may lack it."""
        sources = plan.encryption.sources if plan.encryption is not None else ()
        if sources != self._sources:
            self._sources = sources
            self._observed = None

    def _preview(self, plan: HostPlan) -> tuple[Change, ...]:
        self._look_for(plan)
        self._observed = None
        return difference(plan, self._ready(), self._memory, self._target(plan)).changes

    def _apply(self, plan: HostPlan, fresh: bool, reset: frozenset[str]) -> ApplyReport:
        if not may_change_the_network():
            raise KernelError(f"{self._setup.interface} cannot be set up: {NO_PERMISSION}")
        self._look_for(plan)
        if fresh:
            self._sizes_refused = ""
        if fresh or must_look(plan, self._allocated, self._memory):
            self._observed = None
        self._plan = plan
        self._drift = None
        observed = self._ready()
        target = self._target(plan)
        settled = self._allocated
        todo = difference(plan, observed, self._memory, target, settled, reset=reset)
        all_made: list[Change] = []
        if any(self._structural(change) for change in todo.changes):
            all_made.extend(self._make_device(todo))
            observed = self._read()
            target = self._target(plan)
            settled = None
            todo = difference(plan, observed, self._memory, target, reset=reset)
        made, failed = self._make(todo.changes)
        all_made.extend(made)
        if not failed and any(isinstance(change, DeleteAddress | DeleteLink) for change in made):
            # What goes takes other things along, such as the routes of an address. Nobody else did that, and nobody is
            # to wait for the kernel to report it.
            observed = self._read()
            settled, target = None, self._target(plan)
            reset -= {change.public_key for change in made if isinstance(change, SetPeer)}
            todo = difference(plan, observed, self._memory, target, reset=reset)
            made, failed = self._make(todo.changes)
            all_made.extend(made)
        if failed:
            # What was believed may have been wrong, or one change in another's way: look again, once.
            for change, why in failed:
                if sizes.is_set_by(change):
                    self._sizes_refused = why.text
            failed = [(change, why) for change, why in failed if not sizes.is_set_by(change)]
            observed = self._read()
            settled, target = None, self._target(plan)
            done = set(made)
            # What was left out, since it needs what has failed, is not there either.
            removed, _ = self._make(superseded([change for change in todo.changes if change not in done], observed))
            all_made.extend(removed)
            observed = apply_changes(observed, removed, target.interface)
            reset -= {change.public_key for change in made if isinstance(change, SetPeer)}
            again = difference(plan, observed, self._memory, target, reset=reset)
            if possible(again.changes, {change for change, _ in failed}):
                todo = again
                made, failed = self._make(todo.changes)
                all_made.extend(made)
            else:
                made = []
        self._memory = remember(
            plan, self._memory, settled, made=all_made, failed=[change for change, _ in failed],
            observed=observed, now=self._host.handshake_clock.now(),
        )  # fmt: skip
        self._settle(plan, observed, made, failed, todo, target)
        if any(isinstance(change, DeleteForward) for change in all_made):
            # The program that did it is reported as somebody else.
            self._reports.news(0)
        return ApplyReport(
            changes=tuple(all_made),
            failures=(*todo.failures, *(failure for _, failure in failed)),
            notes=(self._sizes_refused,) if self._sizes_refused and wants_sizes(plan, observed, target) else (),
        )

    def _make(self, changes: Sequence[Change]) -> tuple[list[Change], list[tuple[Change, FailedChange]]]:
        # Nothing is believed of the host until all is made: an error in between leaves a state that nobody knows.
        self._observed = self._allocated = None
        return self._host.make(changes)

    def _settle(
        self,
        plan: HostPlan,
        observed: Observed,
        made: list[Change],
        failed: list[tuple[Change, FailedChange]],
        todo: Difference,
        target: DeviceTarget,
    ) -> None:
        """Keep what is now believed of the host."""
        observed = apply_changes(observed, made, target.interface) if made else observed
        self._host.note_ways(made)
        if target.protocol == ROUTE_PROTOCOL and observed.link is not None and observed.public_key == target.public_key:
            # At each apply: an agent of before may have written no file, or somebody has removed it since.
            self._host.device_keys.write(target.interface, target.public_key)
        if observed.ipip is not None and not observed.ipip.index:
            index = next((link.index for link in self._host.links.values() if link.name == target.ipip), 0)
            observed = evolve(observed, ipip=evolve(observed.ipip, index=index))
        self._index = observed.link.index if observed.link is not None else 0
        self._looked_at = True
        # What goes takes other things along: that is looked at once more.
        complete = not failed and not todo.failures and not any(isinstance(c, DeleteLink | DeleteAddress) for c in made)
        self._allocated = plan if complete else None
        self._failed = frozenset(change for change, _ in failed)
        self._watch = DriftWatch(
            observed,
            target,
            links=self._host.links.values(),
            ways=self._host.ways,
            egress=self._host.egress,
            collisions=frozenset((plan.routes.keys() & observed.foreign.keys()) | shadows(plan, observed).keys()),
            failing=bool(failed or todo.failures),
        )
        self._observed = None if failed else observed

    def _structural(self, change: Change) -> bool:
        return isinstance(change, CreateLink | StartUserspace) and change.name == self._setup.interface

    def _make_device(self, todo: Difference) -> list[Change]:
        changes = [
            change
            for change in todo.changes
            if self._structural(change) or (isinstance(change, DeleteLink) and change.name == self._setup.interface)
        ]
        made, failed = self._make(changes)
        if failed:
            raise KernelError(failed[0][1].text)
        return made

    def _target(self, plan: HostPlan) -> DeviceTarget:
        return DeviceTarget(
            interface=self._setup.interface,
            public_key=self._public_key,
            private_key=self._setup.private_key,
            mtu=self._setup.mtu or self._egress.mtu(plan),
            ipip_mtu=self._egress.ipip_mtu(plan),
            backend=self._backend,
            userspace_command=self._setup.userspace_command,
            forward_rules=self._setup.forward_rules,
            clamp_mss=self._setup.clamp_mss and not self._sizes_refused,
            protocol=self._setup.protocol,
        )

    def _uplinks(self) -> list[int]:
        """The MTUs of the devices with a default route: for a host that has been told no endpoint, a silent member."""
        links = [link for link in self._host.links.values() if link.index in self._host.uplinks]
        self._host.egress.update(link.index for link in links)
        return [link.mtu for link in links]
