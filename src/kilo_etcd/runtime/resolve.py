"""Endpoints that are DNS names: looked up again and again, so that a plan holds addresses only.

Each name has a task and a deadline of its own, so that one that hangs or fails delays no other; what fails is tried
again sooner and keeps its last good addresses. As long as the address in use is among the answers it stays in use:
a name with several addresses in changing order must not move a peer back and forth. What a plan makes of the addresses
is in `planning.names`.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address, ip_network
from types import MappingProxyType
from typing import TypeAlias
from urllib.parse import urlsplit

import trio
from attrs import frozen

from kilo_etcd.base import descriptors
from kilo_etcd.etcd.api import Client
from kilo_etcd.model import IPAddress, IPNetwork
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.names import Reasons, Table, plan_names
from kilo_etcd.runtime.logs import Once, get_logger

PERIOD = 30.0
"""Seconds between two look-ups of a name that answers."""
LOOKUP_TIMEOUT = 5.0
"""Seconds for one look-up."""
FIRST_RETRY = 1.0
"""Seconds until a failed look-up is tried again; doubled each time, up to the period."""
JITTER = 0.2
"""By how much, in parts of itself, a wait is longer or shorter: hosts that were started together ask one by one."""

Lookup: TypeAlias = Callable[[str], Awaitable[tuple[IPAddress, ...]]]

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("resolver threads")
_THREADS = 32


async def lookup(name: str) -> tuple[IPAddress, ...]:
    """The addresses of a name, in the system resolver's order. OSError where there are none. Cancellable at once."""
    # Threads of its own: a resolver that hangs must not use up those that program the kernel.
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_THREADS)
        _limiter.set(limiter)
    try:
        answers = await trio.to_thread.run_sync(_getaddrinfo, name, abandon_on_cancel=True, limiter=limiter)
    except UnicodeError:
        raise OSError(f"{name!r} is no DNS name") from None
    addresses = []
    for _, _, _, _, address in answers:
        host = str(address[0])
        # An address with a zone (fe80::1%eth0) means something on this link only.
        if "%" not in host:
            addresses.append(ip_address(host))
    if not addresses:
        raise OSError("the answer holds no address")
    return tuple(dict.fromkeys(addresses))


def _getaddrinfo(name: str) -> list[tuple[object, object, object, object, tuple[object, ...]]]:
    return list(socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM))


async def resolve_once(plan: HostPlan, *, lookup: Lookup = lookup) -> tuple[Table, Reasons]:
    """The addresses of all names in the plan that answer within LOOKUP_TIMEOUT, and why the others have none."""
    table: dict[str, tuple[IPAddress, ...]] = {}
    failed: dict[str, str] = {}

    async def find(name: str) -> None:
        try:
            with trio.fail_after(LOOKUP_TIMEOUT):
                table[name] = await lookup(name)
        except (OSError, trio.TooSlowError) as error:
            failed[name] = _reason(error)

    async with trio.open_nursery() as nursery:
        for name in plan_names(plan):
            nursery.start_soon(find, name)
    return table, failed


def known_endpoints(given: Iterable[str], client: Client) -> tuple[str, ...]:
    """Where etcd is, as far as is known: as it was given, was discovered, or is in its member list."""
    return tuple(dict.fromkeys((*given, *client.endpoints)))


def endpoint_hosts(endpoints: Iterable[str]) -> tuple[IPAddress | str, ...]:
    """The hosts of etcd endpoints (URLs or host:port), as addresses or names."""
    hosts: list[IPAddress | str] = []
    for url in endpoints:
        name = urlsplit(url if "://" in url else f"//{url}").hostname
        if name:
            try:
                hosts.append(ip_address(name))
            except ValueError:
                hosts.append(name)
    return tuple(hosts)


def network_of(address: IPAddress) -> IPNetwork:
    """The network that holds this address alone."""
    return ip_network(address)


async def etcd_networks(endpoints: Iterable[str]) -> tuple[IPNetwork, ...]:
    """The addresses of etcd's endpoints as networks of one address; names that do not resolve now are left out."""
    networks: list[IPNetwork] = []

    async def find(name: str) -> None:
        with trio.move_on_after(LOOKUP_TIMEOUT), contextlib.suppress(OSError):
            networks.extend(map(network_of, await lookup(name)))

    async with trio.open_nursery() as nursery:
        for host in endpoint_hosts(endpoints):
            if isinstance(host, str):
                nursery.start_soon(find, host)
            else:
                networks.append(network_of(host))
    return tuple(dict.fromkeys(networks))


@frozen
class _Task:
    scope: trio.CancelScope


class Resolver:
    """Keeps `table` true for the names wanted. `run` is its task; all else may be called before and while it runs."""

    def __init__(
        self,
        period: float = PERIOD,
        *,
        timeout: float = LOOKUP_TIMEOUT,
        lookup: Lookup = lookup,
        jitter: float = JITTER,
    ) -> None:
        self._jitter = jitter
        self._period = period
        self._timeout = timeout
        self._lookup = lookup
        self._rng = random.Random()
        self._wanted: frozenset[str] = frozenset()
        self._kept: dict[str, frozenset[str]] = {}
        self._table: dict[str, tuple[IPAddress, ...]] = {}
        self._failed: dict[str, str] = {}
        self._renewed = trio.Event()
        self._changed = trio.Event()
        self._tasks: dict[str, _Task] = {}
        self._once = Once(get_logger())

    @property
    def table(self) -> Table:
        """Name -> its addresses, the one to use first. Names without a good answer so far are missing."""
        return MappingProxyType(self._table)

    @property
    def failed(self) -> Reasons:
        """Name -> why it could not be looked up; of names that are not in the table."""
        return MappingProxyType(self._failed)

    def set_names(self, names: frozenset[str]) -> None:
        """Look up these names from now on, and no others (those of `networks` apart)."""
        if names != self._wanted:
            self._wanted = names
            self._renewed.set()

    def networks(self, endpoints: Iterable[str], *, purpose: str = "etcd") -> tuple[IPNetwork, ...]:
        """The addresses of etcd's endpoints as networks of one address, as far as they are known by now.

        Names among them are looked up until this is called for the same purpose without them.
        """
        hosts = endpoint_hosts(endpoints)
        names = frozenset(host for host in hosts if isinstance(host, str))
        if names != self._kept.get(purpose, frozenset()):
            self._kept[purpose] = names
            self._renewed.set()
        addresses = [
            address
            for host in hosts
            for address in (self._table.get(host, ()) if isinstance(host, str) else (host,))
        ]  # fmt: skip
        return tuple(dict.fromkeys(map(network_of, addresses)))

    def unresolved(self, endpoints: Iterable[str]) -> tuple[str, ...]:
        """The names among etcd's endpoints that no address is known of."""
        return tuple(
            host for host in endpoint_hosts(endpoints) if isinstance(host, str) and not self._table.get(host)
        )  # fmt: skip

    async def wait_changed(self) -> None:
        """Return when `table` or `failed` has changed since the last return (or since the start)."""
        await self._changed.wait()
        self._changed = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look up until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                needed = self._wanted.union(*self._kept.values())
                for name in [name for name in self._tasks if name not in needed]:
                    self._tasks.pop(name).scope.cancel()
                    self._table.pop(name, None)
                    self._failed.pop(name, None)
                    self._once.clear(name, "the DNS name is not needed any more", name=name)
                for name in sorted(needed - self._tasks.keys()):
                    scope = trio.CancelScope()
                    self._tasks[name] = _Task(scope)
                    nursery.start_soon(self._follow, name, scope)
                await self._renewed.wait()
                self._renewed = trio.Event()

    async def _follow(self, name: str, scope: trio.CancelScope) -> None:
        with scope:
            retry = FIRST_RETRY
            while True:
                try:
                    with trio.fail_after(self._timeout):
                        answers = await self._lookup(name)
                except (OSError, trio.TooSlowError) as error:
                    reason = _reason(error)
                    held = self._table.get(name, ())
                    if held or any(name in names for names in self._kept.values()):
                        self._once.warning(
                            name, "the DNS name of an endpoint is not resolved",
                            name=name, error=reason, still=held or None,
                        )  # fmt: skip
                    elif name not in self._failed:
                        # The plan says which peer it costs its endpoint, once: resolvers give changing reasons.
                        self._failed[name] = reason
                        self._changed.set()
                    await self._pause(min(retry, self._period))
                    retry *= 2
                    continue
                retry = FIRST_RETRY
                self._once.clear(name, "the DNS name of an endpoint is resolved again", name=name)
                self._note_answers(name, answers)
                await self._pause(self._period)

    async def _pause(self, seconds: float) -> None:
        await trio.sleep(seconds * self._rng.uniform(1 - self._jitter, 1 + self._jitter))

    def _note_answers(self, name: str, answers: tuple[IPAddress, ...]) -> None:
        held = self._table.get(name, ())
        if not answers or set(held) == set(answers):
            return
        self._failed.pop(name, None)
        if held and held[0] in answers:
            answers = (held[0], *(address for address in answers if address != held[0]))
        self._table[name] = answers
        self._changed.set()


def _reason(error: OSError | trio.TooSlowError) -> str:
    if isinstance(error, trio.TooSlowError):
        return "no answer in time"
    # The resolver does not tell: without a descriptor it finds no server, no file, and no such name.
    return descriptors.shortage(error) or descriptors.exhausted() or error.strerror or str(error)
