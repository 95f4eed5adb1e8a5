"""An nftables table of the family inet as a value, and the two changes that can be made to it.

Nothing here decides what is in it (`kernel.firewall`) or how the kernel is told (`kernel.netfilter`).
"""

from __future__ import annotations

from typing import TypeAlias

from attrs import field, frozen

from kilo_etcd.model import IPAddress

Expression: TypeAlias = tuple[str, tuple[tuple[str, bytes], ...]]
"""A step of a rule as nftables has it: its name, and its attributes by name (see `kernel.nftables`)."""


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
    name: str
    version: int
    addresses: frozenset[IPAddress]


@frozen(kw_only=True)
class Rule:
    """One rule of a chain. Two are equal if the kernel does the same with them; `text` is for people."""

    chain: str
    expressions: tuple[Expression, ...] = field(repr=False)
    text: str = field(default="", eq=False)


@frozen(kw_only=True)
class Table:
    """Everything in the table, or as much as was found of it. Counters are named, so that rules are constant."""

    name: str
    chains: tuple[Chain, ...] = ()
    sets: tuple[AddressSet, ...] = ()
    counters: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        """As `nft` reads it, on one line."""
        parts = [f"counter {name} {{ }}" for name in self.counters]
        for one in self.sets:
            elements = ", ".join(map(str, sorted(one.addresses, key=int)))
            kind = "ipv4_addr" if one.version == 4 else "ipv6_addr"
            content = f" elements = {{ {elements} }};" if elements else ""
            parts.append(f"set {one.name} {{ type {kind};{content} }}")
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

    table: Table

    def __str__(self) -> str:
        name = self.table.name
        return f"nft 'add table inet {name}; delete table inet {name}; {self.table}'"


@frozen
class DeleteTable:
    name: str

    def __str__(self) -> str:
        return f"nft delete table inet {self.name}"
