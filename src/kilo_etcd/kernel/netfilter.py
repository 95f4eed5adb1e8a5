"""The kernel's nftables as this project needs them: read one table, replace it or remove it, hear who changes it.

Spoken by nfnetlink, so that neither a program nor a process is needed. Where the kernel has no nftables, or we may not
ask, there is no table to be read; a change is refused with an OSError.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from ipaddress import ip_address

from kilo_etcd import descriptors
from kilo_etcd.kernel import hooks, netlink
from kilo_etcd.kernel.chains import BaseChain
from kilo_etcd.kernel.netlink import Message, attribute, attributes, nested, text
from kilo_etcd.kernel.nftables import be32, elements, pack_expressions, read_expressions
from kilo_etcd.kernel.openings import AddOpening, DeleteOpening
from kilo_etcd.kernel.table import AddressSet, Chain, Rule, Table

PROTOCOL = 12
_SUBSYSTEM = 10
_INET = 1
_GROUP = 7
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN = 0, 1, 2, 3, 4
_NEWRULE, _GETRULE, _DELRULE, _NEWSET, _GETSET, _NEWSETELEM, _GETSETELEM = 6, 7, 8, 9, 10, 12, 13
_GETGEN, _NEWOBJ, _GETOBJ = 16, 18, 19
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_KEY_TYPE = {4: 7, 6: 8}
_KEY_LENGTH = {4: 4, 6: 16}
_COUNTER = 1
_ACCEPT = 1
_APPEND = 0x800
_ELEMENTS = 1000
"""Elements per message: a list is one attribute, which has at most 65,535 bytes."""
_NONE = frozenset({errno.ENOENT, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL, errno.EPROTONOSUPPORT})
"""What reading says where there is nothing to be read."""


def _message(kind: int, *body: bytes, flags: int = 0) -> Message:
    return Message(_SUBSYSTEM << 8 | kind, flags, struct.pack("=BBH", _INET, 0, 0) + b"".join(body))


def _delimiter(kind: int) -> Message:
    return Message(kind, 0, struct.pack("!BBH", 0, 0, _SUBSYSTEM))


def pack_table(table: Table) -> list[Message]:
    """The messages that put a table in the place of what there is of that name."""
    create = netlink.CREATE
    name = text(1, table.name)
    found = [*pack_deletion(table.name), _message(_NEWTABLE, name, flags=create)]
    for counter in table.counters:
        found.append(_message(_NEWOBJ, name, text(2, counter), attribute(3, be32(_COUNTER)), nested(4), flags=create))
    for number, one in enumerate(table.sets, 1):
        found.append(
            _message(
                _NEWSET,
                name,
                text(2, one.name),
                attribute(3, be32(0)),
                attribute(4, be32(_KEY_TYPE[one.version])),
                attribute(5, be32(_KEY_LENGTH[one.version])),
                attribute(10, be32(number)),
                flags=create,
            )
        )
        addresses = sorted(one.addresses, key=int)
        for start in range(0, len(addresses), _ELEMENTS):
            part = (nested(1, nested(1, attribute(1, a.packed))) for a in addresses[start : start + _ELEMENTS])
            found.append(_message(_NEWSETELEM, name, text(2, one.name), nested(3, *part), flags=create))
    for chain in table.chains:
        hook = nested(4, attribute(1, be32(_HOOKS[chain.hook])), attribute(2, be32(chain.priority)))
        policy = attribute(5, be32(_ACCEPT))
        found.append(_message(_NEWCHAIN, name, text(3, chain.name), hook, policy, text(7, chain.kind), flags=create))
    for rule in table.rules:
        packed = nested(4, pack_expressions(rule.expressions))
        found.append(_message(_NEWRULE, name, text(2, rule.chain), packed, flags=create | _APPEND))
    return found


def pack_deletion(name: str) -> list[Message]:
    """The messages that remove a table, whether it is there or not."""
    return [_message(_NEWTABLE, text(1, name), flags=netlink.CREATE), _message(_DELTABLE, text(1, name))]


class Netfilter:
    """One network namespace's nftables. Blocking; for one thread at a time."""

    def __init__(self) -> None:
        self._socket: netlink.Socket | None = None
        self._forward: tuple[int, tuple[BaseChain, ...]] | None = None
        self.writes = 0

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _open(self) -> netlink.Socket:
        # Only now: a kernel may lack nfnetlink, and most hosts never need it.
        if self._socket is None:
            self._socket = netlink.Socket(PROTOCOL)
        return self._socket

    @property
    def port(self) -> int:
        """The number by which the kernel names whoever made a change; 0 if we never made any."""
        return 0 if self._socket is None else self._socket.port

    def read(self, name: str) -> Table | None:
        """The table of that name, or None where there is none to be seen."""
        try:
            device = self._open()
            device.get(_message(_GETTABLE, text(1, name)))
            return self._read(device, name)
        except OSError as error:
            if error.errno in _NONE:
                return None
            raise

    def _read(self, device: netlink.Socket, name: str) -> Table:
        wanted = name.encode() + b"\0"

        def dump(kind: int, *body: bytes) -> list[dict[int, bytes]]:
            found: list[dict[int, bytes]] = []
            device.dump(_message(kind, text(1, name), *body), lambda data: found.append(attributes(data, 4)))
            return [item for item in found if item.get(1) == wanted]

        sets = [(item, _text(item, 2)) for item in dump(_GETSET) if not _number(item.get(3)) & 1]
        return Table(
            name=name,
            chains=tuple(_chain(item) for item in dump(_GETCHAIN)),
            sets=tuple(
                AddressSet(
                    name=own,
                    version=4 if _number(item.get(5)) == 4 else 6,
                    addresses=frozenset(
                        ip_address(key)
                        for part in dump(_GETSETELEM, text(2, own))
                        for element in elements(part.get(3, b""))
                        if len(key := attributes(attributes(element).get(1, b"")).get(1, b"")) in (4, 16)
                    ),
                )
                for item, own in sets
            ),
            counters=tuple(sorted(_text(item, 2) for item in dump(_GETOBJ))),
            rules=tuple(
                Rule(chain=_text(item, 2), expressions=read_expressions(item.get(4, b""))) for item in dump(_GETRULE)
            ),
        )

    def generation(self) -> int | None:
        """A number that changes with every change of nftables, whoever makes it; None where there is none."""
        try:
            return _number(attributes(self._open().get(_message(_GETGEN)), 4).get(1))
        except OSError:
            return None

    def forward_chains(self) -> tuple[BaseChain, ...]:
        """Every base chain of hook forward; read again only if nftables has changed."""
        generation = self.generation()
        if generation is None:
            return ()
        if self._forward is None or self._forward[0] != generation:
            try:
                self._forward = generation, hooks.read(self._open())
            except OSError as error:
                if error.errno in _NONE:
                    return ()
                raise
        return self._forward[1]

    def edit(self, change: AddOpening | DeleteOpening) -> None:
        pack = hooks.pack_insertion if isinstance(change, AddOpening) else hooks.pack_removal
        self._transact([pack(change.opening)])

    def replace(self, table: Table) -> None:
        self._transact(pack_table(table))

    def delete(self, name: str) -> None:
        self._transact(pack_deletion(name))

    def _transact(self, messages: Sequence[Message]) -> None:
        """All of it or nothing."""
        self.writes += 1
        self._open().transact([_delimiter(_BATCH_BEGIN), *messages, _delimiter(_BATCH_END)])


def _text(item: dict[int, bytes], kind: int) -> str:
    return item.get(kind, b"").rstrip(b"\0").decode(errors="replace")


def _number(data: bytes | None) -> int:
    return int.from_bytes(data or b"")


def _chain(item: dict[int, bytes]) -> Chain:
    hook = attributes(item.get(4, b""))
    number = _number(hook.get(1)) if 1 in hook else -1
    accepts = _number(item.get(5)) == _ACCEPT
    return Chain(
        name=_text(item, 3),
        # A chain that drops by default is none of ours, whatever its name.
        kind=_text(item, 7) if accepts else "",
        hook=next((name for name, value in _HOOKS.items() if value == number), ""),
        priority=struct.unpack("!i", hook[2])[0] if 2 in hook else 0,
    )


class Reports:
    """Hears of changes to one table that others make, and, if there is a comment of ours to look for, of rules with it
    that go and of forward chains that come (see `kernel.forward`, `kernel.openings`). `socket` is None where the kernel
    has no nfnetlink."""

    def __init__(self, name: str, comment: str = "") -> None:
        self._comment = comment.encode()
        self._name = name.encode() + b"\0"
        self._what = f"nftables table inet {name} was changed"
        self._listener: netlink.Listener | None = None
        try:
            self._listener = netlink.Listener([_GROUP], PROTOCOL)
        except OSError as error:
            if descriptors.is_shortage(error):
                raise  # Else changes to the table would go unnoticed for as long as the agent runs.

    @property
    def socket(self) -> socket.socket | None:
        return None if self._listener is None else self._listener.socket

    def news(self, own_port: int) -> str | None:
        """What has happened since the last call, by others than the socket `own_port`; None: nothing to us."""
        if self._listener is None:
            return None
        news = None
        while (events := self._listener.read_from()) != []:
            if events is None:
                return self._what
            for kind, port, body in events:
                if kind >> 8 == _SUBSYSTEM and port != own_port:
                    news = self._heard(kind & 0xFF, body) or news
        return news

    def _heard(self, kind: int, body: bytes) -> str | None:
        table = attributes(body, 4).get(1)
        if body[0] == _INET and table == self._name:
            return self._what
        if not self._comment:
            return None
        item = attributes(body, 4)
        if kind == _DELRULE and self._comment in body:
            where = "FORWARD or DOCKER-USER" if table == b"filter\0" else f"{_text(item, 2)} of table {_text(item, 1)}"
            return f"a rule of ours was removed from the chain {where}"
        if kind != _NEWCHAIN:
            return None
        if table == b"filter\0" and body[0] != _INET:
            return "docker has come" if b"DOCKER-USER\0" in body else None
        hook = attributes(item.get(4, b""))
        if hook.get(1) == be32(_HOOKS["forward"]):
            return f"a firewall has made the chain {_text(item, 3)} of table {_text(item, 1)}"
        return None

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
