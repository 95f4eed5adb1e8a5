"""An nftables table of the family inet as a value, and the changes that can be made to it.

It is replaced whole, but for addresses that come and go: they change its sets alone.

Nothing here decides what is in it (`kernel.firewall.packet_filter`) or how the kernel is told
(`kernel.firewall.netfilter`).
"""

from __future__ import annotations

from typing import TypeAlias

from attrs import evolve, field, frozen

from kilo_etcd.model import IPAddress

Expression: TypeAlias = tuple[str, tuple[tuple[str, bytes], ...]]
"""A step of a rule as nftables has it: its name, and its attributes by name (see `kernel.firewall.nftables`)."""


@frozen(kw_only=True)
class Chain:
    """A base chain whose policy is accept."""

    name: str
    kind: str
    """`filter`, `nat` or `route` (which looks for a route anew if a rule has changed the mark)."""
    hook: str
    priority: int


@frozen(kw_only=True)
class AddressSet:
    """A named set of addresses of one family, which rules look up."""

    name: str
    version: int
    addresses: frozenset[IPAddress]

    @property
    def identity(self) -> tuple[str, int]:
        """By what a set is the same one although its addresses have changed."""
        return self.name, self.version


@frozen(kw_only=True)
class Rule:
    """One rule of a chain. Two are equal if the kernel does the same with them; `text` is for people."""

    chain: str
    expressions: tuple[Expression, ...] = field(repr=False)
    text: str = field(default="", eq=False)


@frozen(kw_only=True)
class FirewallTable:
    """Everything in the table, or as much as was found of it. Counters are named, so that rules are constant."""

    name: str
    chains: tuple[Chain, ...] = ()
    sets: tuple[AddressSet, ...] = ()
    counters: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        """As `nft` reads it, on one line."""
        parts = [f"counter {name} {{ }}" for name in self.counters]
        for address_set in self.sets:
            elements = _listed(address_set.addresses)
            kind = "ipv4_addr" if address_set.version == 4 else "ipv6_addr"
            content = f" elements = {{ {elements} }};" if elements else ""
            parts.append(f"set {address_set.name} {{ type {kind};{content} }}")
        for chain in self.chains:
            rules = "".join(f" {rule.text};" for rule in self.rules if rule.chain == chain.name)
            parts.append(
                f"chain {chain.name} {{ type {chain.kind} hook {chain.hook} priority {chain.priority}; "
                f"policy accept;{rules} }}"
            )
        return f"table inet {self.name} {{ {'; '.join(parts)}; }}"


@frozen
class ReplaceTable:
    """The table as it shall be, in place of what there is, in one transaction."""

    table: FirewallTable

    def __str__(self) -> str:
        name = self.table.name
        return f"nft 'add table inet {name}; delete table inet {name}; {self.table}'"


@frozen
class AddElements:
    """Addresses that come into a set of a table."""

    table: str
    set: AddressSet
    """With the addresses that come."""

    def __str__(self) -> str:
        return f"nft add element inet {self.table} {self.set.name} {{ {_listed(self.set.addresses)} }}"


@frozen
class DeleteElements:
    """Addresses that leave a set of a table."""

    table: str
    set: AddressSet
    """With the addresses that leave."""

    def __str__(self) -> str:
        return f"nft delete element inet {self.table} {self.set.name} {{ {_listed(self.set.addresses)} }}"


def _listed(addresses: frozenset[IPAddress]) -> str:
    return ", ".join(map(str, sorted(addresses, key=int)))


def element_changes(table: FirewallTable, planned: FirewallTable) -> list[AddElements | DeleteElements] | None:
    """What makes one table of the other if they differ in nothing but the elements of their sets; else None."""
    if evolve(table, sets=()) != evolve(planned, sets=()) or [address_set.identity for address_set in table.sets] != [
        address_set.identity for address_set in planned.sets
    ]:
        return None
    changes: list[AddElements | DeleteElements] = []
    for before, after in zip(table.sets, planned.sets, strict=True):
        if new := after.addresses - before.addresses:
            changes.append(AddElements(planned.name, evolve(after, addresses=new)))
        if removed := before.addresses - after.addresses:
            changes.append(DeleteElements(planned.name, evolve(after, addresses=removed)))
    return changes


def with_elements(table: FirewallTable, change: AddElements | DeleteElements) -> FirewallTable:
    """The table after the change."""

    def changed(address_set: AddressSet) -> AddressSet:
        if address_set.identity != change.set.identity:
            return address_set
        if isinstance(change, AddElements):
            return evolve(address_set, addresses=address_set.addresses | change.set.addresses)
        return evolve(address_set, addresses=address_set.addresses - change.set.addresses)

    return evolve(table, sets=tuple(map(changed, table.sets)))


@frozen
class DeleteTable:
    """Removes the whole table of that name."""

    name: str

    def __str__(self) -> str:
        return f"nft delete table inet {self.name}"
