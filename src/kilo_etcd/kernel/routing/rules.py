"""Rules of policy routing as values, and the changes that make them; `kernel.routing.policy` says which there shall
be."""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

from attrs import frozen

from kilo_etcd.kernel.netlink.formats import RT_TABLE_DEFAULT, RT_TABLE_LOCAL, RT_TABLE_MAIN
from kilo_etcd.model import IPAddress, IPNetwork

_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp"}
"""IANA's numbers, and their names in ip-rule(8)."""


TABLE_SPAN = 1_000_000
"""So many tables may belong to interfaces, from the first one of a kind on."""


def table_number(first: int, interface: str) -> int:
    """The routing table of an interface among those from `first` on. It is computed from the name, so what is ours is
    known after a crash."""
    return first + crc32(interface.encode()) % TABLE_SPAN


def priority_pair(first: int, interface: str) -> tuple[int, int]:
    """Two priorities of an interface's rules, one behind the other, among the hundred from `first` on."""
    lower = first + 2 * (crc32(interface.encode()) % 50)
    return lower, lower + 1


@frozen(kw_only=True)
class RoutingRule:
    """A rule of policy routing (ip-rule(8))."""

    version: int
    priority: int
    table: int
    not_mark: int = 0
    """Packets with this mark are left out; 0: none are."""
    source: IPAddress | None = None
    """Only packets from this address; None: from any."""
    destination: IPNetwork | None = None
    """Only packets for this network; None: for any."""
    protocol: int = 0
    """Only packets of this IP protocol; 0: of any."""
    sport: int = 0
    """Only packets from this port; 0: from any."""
    dport: int = 0
    """Only packets for this port; 0: for any."""
    inbound: str = ""
    """Only packets that come in by the device of this name, which need not exist; empty: from anywhere."""
    suppress: int | None = None
    """Routes of the table whose prefixes are at most this long do not count, so with 0 the default route does not."""

    @property
    def order(self) -> tuple[int, int, str]:
        """By family, then as the kernel asks them."""
        return self.version, self.priority, str(self)

    def __str__(self) -> str:
        words = [f"priority {self.priority}"]
        if self.source is not None:
            words.append(f"from {self.source}")
        if self.destination is not None:
            words.append(f"to {self.destination}")
        if self.protocol:
            words.append(f"ipproto {_PROTOCOLS.get(self.protocol, self.protocol)}")
        if self.sport:
            words.append(f"sport {self.sport}")
        if self.dport:
            words.append(f"dport {self.dport}")
        if self.inbound:
            words.append(f"iif {self.inbound}")
        if self.not_mark:
            words.append(f"not fwmark {self.not_mark}")
        words.append(f"lookup {self.table}" if self.table != RT_TABLE_MAIN else "lookup main")
        if self.suppress is not None:
            words.append(f"suppress_prefixlength {self.suppress}")
        return " ".join(words)


@frozen(kw_only=True)
class ForeignRule:
    """A rule that is none of ours, as far as it matters here."""

    version: int
    priority: int
    table: int
    """That it leads to; 0: none."""
    goto: int = 0
    """The priority that it leads to; 0: none."""
    source: IPNetwork | None = None
    destination: IPNetwork | None = None
    protocol: int = 0
    """Of the packets that it asks for; 0: any."""
    sports: tuple[int, int] | None = None
    """The first and the last port from which they are; None: any."""
    dports: tuple[int, int] | None = None
    """The same of the ports that they are for."""
    suppress: int | None = None
    refuses: str = ""
    """What it does with packets that it refuses, as ip-rule(8) calls it; empty: it leads elsewhere."""
    picks: bool = False
    """Whether it asks for a mark, a device, or for what else a packet to a node need not have."""

    @property
    def limits(self) -> str:
        """To which protocol and ports it is limited, as ip-rule(8) says it; empty: to none."""
        words = []
        if self.protocol:
            words.append(f"ipproto {_PROTOCOLS.get(self.protocol, self.protocol)}")
        for side, ports in (("sport", self.sports), ("dport", self.dports)):
            if ports is not None:
                words.append(f"{side} {ports[0]}" if ports[0] == ports[1] else f"{side} {ports[0]}-{ports[1]}")
        return " ".join(words)

    def __str__(self) -> str:
        words = [f"priority {self.priority}", f"from {self.source or 'all'}"]
        if self.destination is not None:
            words.append(f"to {self.destination}")
        if self.limits:
            words.append(self.limits)
        table = "main" if self.table == RT_TABLE_MAIN else str(self.table)
        words.append(self.refuses or (f"goto {self.goto}" if self.goto else f"lookup {table}"))
        if self.suppress is not None:
            words.append(f"suppress_prefixlength {self.suppress}")
        return f"ip -{self.version} rule {' '.join(words)}"


_KERNELS_OWN = frozenset({RT_TABLE_LOCAL, RT_TABLE_MAIN, RT_TABLE_DEFAULT})
"""The tables that the kernel's own rules lead to. To delete the first of these rules would cut the host off."""


def deciding_rule(
    rules: Iterable[ForeignRule], address: IPAddress, table: int | None, source: IPAddress | None = None
) -> ForeignRule | None:
    """The rule of another program by which the kernel chose a route for an address, as far as can be told. `table`: the
    route's; None: the kernel refuses the packets. `source`: None if the kernel chooses the source address; it asks no
    rule for a source then."""
    matching = (
        rule
        for rule in rules
        if rule.version == address.version
        and not rule.picks
        and not rule.limits
        and (rule.source is None or (source is not None and source in rule.source))
        and (rule.destination is None or address in rule.destination)
        and (rule.refuses if table is None else rule.table == table and table not in _KERNELS_OWN)
    )
    return min(matching, key=lambda rule: rule.priority, default=None)


@frozen
class AddRule:
    """Adds a policy rule; it prints as `ip` has it."""

    rule: RoutingRule

    def __str__(self) -> str:
        return f"ip -{self.rule.version} rule add {self.rule}"


@frozen
class DeleteRule:
    """Removes a policy rule; it prints as `ip` has it."""

    rule: RoutingRule

    def __str__(self) -> str:
        return f"ip -{self.rule.version} rule del {self.rule}"
