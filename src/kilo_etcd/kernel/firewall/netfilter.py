"""The kernel's nftables as this project needs them: read one table, replace it or remove it, listen for changes.

It uses nfnetlink, so that neither a program nor a process is needed. Where the kernel has no nftables, or we may not
ask, there is no table to be read; a change is refused with an OSError.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

from attrs import evolve

from kilo_etcd.base import descriptors
from kilo_etcd.kernel.firewall import hooks
from kilo_etcd.kernel.firewall.chains import FORWARDED, BaseChain
from kilo_etcd.kernel.firewall.nftables import be32
from kilo_etcd.kernel.firewall.openings import AddOpening, DeleteOpening
from kilo_etcd.kernel.firewall.table import AddElements, DeleteElements, FirewallTable
from kilo_etcd.kernel.netlink import sockets
from kilo_etcd.kernel.netlink.codec import UNREADABLE
from kilo_etcd.kernel.netlink.formats import NF_INET_HOOKS, nft
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage
from kilo_etcd.kernel.read import nft as read
from kilo_etcd.kernel.write import nft as write

PROTOCOL = read.PROTOCOL
_ATTEMPTS = 3
"""Readings of all chains of forwarded packets at most, while somebody goes on changing them; the next call reads them
again."""
_NONE = frozenset({errno.ENOENT, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL, errno.EPROTONOSUPPORT})
"""What reading says where there is nothing to be read."""

HOST_HOOKS = ("ingress", "prerouting", "input", "output", "postrouting", "egress")

T = TypeVar("T")

_Reading = tuple[int, tuple[BaseChain, ...]] | None
"""The number of a ruleset, and chains that were read of it."""


class Netfilter:
    """One network namespace's nftables. Blocking; for one thread at a time."""

    def __init__(self) -> None:
        self._socket: sockets.Socket | None = None
        self._passed: _Reading = None
        self._translating: _Reading = None
        self.writes = 0

    def close(self) -> None:
        """Close the socket, if one was needed."""
        if self._socket is not None:
            self._socket.close()

    def _open(self) -> sockets.Socket:
        # Only now: a kernel may lack nfnetlink, and most hosts never need it.
        if self._socket is None:
            self._socket = sockets.Socket(PROTOCOL)
        return self._socket

    @property
    def port(self) -> int:
        """The number by which the kernel names the author of a change; 0 if we never made any."""
        return 0 if self._socket is None else self._socket.port

    def read(self, name: str) -> FirewallTable | None:
        """The table of that name, or None where there is none to be seen."""
        try:
            device = self._open()
            device.get(write.get_table(name), bytes)
            return _read(device, name)
        except OSError as error:
            if error.errno in _NONE:
                return None
            raise

    def generation(self) -> int | None:
        """A number that changes with every change of nftables, whoever makes it; None where there is none."""
        try:
            return self._open().get(write.get_generation(), read.read_generation)
        except OSError:
            return None

    def forward_chains(self) -> tuple[BaseChain, ...]:
        """Every base chain of hook forward; read again only if nftables has changed."""
        return tuple(chain for chain in self.passed_chains() if chain.hook == "forward")

    def passed_chains(self) -> tuple[BaseChain, ...]:
        """Every base chain that a forwarded packet passes; read again only if nftables has changed."""
        self._passed = self._read_chains(self._passed, lambda device: hooks.read(device, FORWARDED))
        return () if self._passed is None else self._passed[1]

    def translating_chains(self) -> tuple[BaseChain, ...]:
        """The chains that translate destinations of forwarded packets, and those that they lead to; read again only if
        nftables has changed. There may be very many, so few ask."""
        self._translating = self._read_chains(self._translating, hooks.read_translating)
        return () if self._translating is None else self._translating[1]

    def _read_chains(self, last: _Reading, read: Callable[[sockets.Socket], tuple[BaseChain, ...]]) -> _Reading:
        """The last reading, or a new one if nftables has changed; None: there is nothing to be read."""
        for _ in range(_ATTEMPTS):
            # Again after each reading, which takes several dumps: a firewall that is reloaded meanwhile is seen half,
            # as one that drops nothing.
            generation = self.generation()
            if generation is None:
                return None
            if last is not None and last[0] == generation:
                break
            try:
                last = generation, read(self._open())
            except OSError as error:
                if error.errno in _NONE:
                    return None
                raise
        return last

    def host_chains(self) -> tuple[BaseChain, ...]:
        """Every base chain that packets meet which this host itself sends or gets. Always read: few ask."""
        try:
            return hooks.read(self._open(), HOST_HOOKS)
        except OSError as error:
            if error.errno in _NONE:
                return ()
            raise

    def edit(self, change: AddOpening | DeleteOpening) -> None:
        """Insert or remove a rule of ours in another program's chain. Raises OSError."""
        pack = write.insert_rule if isinstance(change, AddOpening) else write.delete_rule
        self._transact([pack(change.opening)])

    def replace(self, table: FirewallTable) -> None:
        """Put a table in the place of what there is of that name, in one transaction. Raises OSError."""
        self._transact(write.replace_table(table))

    def change_elements(self, change: AddElements | DeleteElements) -> None:
        """Add addresses to a set of ours, or remove them; rules and counters stay. Raises OSError."""
        self._transact(write.change_elements(change))

    def delete(self, name: str) -> None:
        """Remove the table of that name; it is no error if there is none."""
        self._transact(write.delete_table(name))

    def _transact(self, messages: Sequence[NetlinkMessage]) -> None:
        """All of it or nothing."""
        self.writes += 1
        self._open().transact(write.transaction(messages))


def _read(device: sockets.Socket, name: str) -> FirewallTable:
    def dump(request: NetlinkMessage, take: Callable[[bytes, str], T | None]) -> list[T]:
        items: list[T] = []

        def keep(body: bytes) -> None:
            if (item := take(body, name)) is not None:
                items.append(item)

        device.dump(request, keep)
        return items

    sets = []
    for address_set in dump(write.get_sets(name), read.read_set):
        parts = dump(write.get_elements(name, address_set.name), read.read_addresses)
        sets.append(evolve(address_set, addresses=frozenset(chain.from_iterable(parts))))
    return FirewallTable(
        name=name,
        chains=tuple(dump(write.get_chains(name), read.read_chain)),
        sets=tuple(sets),
        counters=tuple(sorted(dump(write.get_objects(name), read.read_object))),
        rules=tuple(dump(write.get_rules(name), read.read_rule)),
    )


class Reports:
    """Reports changes to one table that others make, and, if there is a comment of ours to look for, of rules with it
    that go and of forward chains that come (see `kernel.firewall.forward`, `kernel.firewall.openings`). `socket` is
    None where the kernel has no nfnetlink."""

    def __init__(self, name: str, comment: str = "") -> None:
        self._comment = comment.encode()
        self._name = name
        self._packed = name.encode() + b"\0"
        self._change_text = f"nftables table inet {name} was changed"
        self._listener: sockets.Listener | None = None
        try:
            self._listener = sockets.Listener([read.GROUP], PROTOCOL)
        except OSError as error:
            if descriptors.is_shortage(error):
                raise  # Else changes to the table would go unnoticed for as long as the agent runs.

    @property
    def socket(self) -> socket.socket | None:
        """The socket that becomes readable when there is something to report."""
        return None if self._listener is None else self._listener.socket

    def news(self, own_port: int) -> str | None:
        """What has happened since the last call, by others than the socket `own_port`; None: nothing to us."""
        if self._listener is None:
            return None
        news = None
        while (events := self._listener.read_from()) != []:
            if events is None:
                return self._change_text
            for kind, port, body in events:
                if read.subsystem(kind) and port != own_port:
                    news = self._read_or_report(kind, body) or news
        return news

    def _read_or_report(self, kind: int, body: bytes) -> str | None:
        try:
            return self._read(kind & 0xFF, kind, body)
        except UNREADABLE:
            return self._change_text

    def _read(self, command: int, kind: int, body: bytes) -> str | None:
        # First what costs nothing: a firewall's reload is thousands of events.
        inet = read.family_of(body) == nft.NFPROTO_INET
        if inet and self._packed in body and read.table_of(kind, body) == self._name:
            return self._change_text
        if not self._comment:
            return None
        if command == nft.NFT_MSG_DELRULE and self._comment in body:
            table, chain = read.table_of(kind, body), read.chain_of(body)
            where = "FORWARD or DOCKER-USER" if table == "filter" else f"{chain} of table {table}"
            return f"a rule of ours was removed from the chain {where}"
        if command != nft.NFT_MSG_NEWCHAIN:
            return None
        table = read.table_of(kind, body)
        if table == "filter" and not inet:
            return "docker has come" if b"DOCKER-USER\0" in body else None
        result, hook = read.read_chain_items(body)
        if hook.get("NFTA_HOOK_HOOKNUM") == be32(NF_INET_HOOKS["forward"]):
            return f"a firewall has made the chain {read.text(result, 'NFTA_CHAIN_NAME')} of table {table}"
        return None

    def close(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.close()
