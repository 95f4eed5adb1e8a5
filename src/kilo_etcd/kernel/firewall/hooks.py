"""Reads every base chain of some hooks from nftables, of all families and whoever made it, and knows those rules in
them that are ours (`--forward-rules`)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from functools import cache, partial

from attrs import evolve

from kilo_etcd.kernel.firewall.chains import BaseChain, FilterRule
from kilo_etcd.kernel.firewall.openings import Opening
from kilo_etcd.kernel.netlink import sockets
from kilo_etcd.kernel.netlink.codec import UNREADABLE
from kilo_etcd.kernel.read import hooks as replies
from kilo_etcd.kernel.read.hooks import FAMILIES, MOST_MEMBERS, Found, FoundSet, Sets
from kilo_etcd.kernel.write import nft as requests

MOST_CHAINS, MOST_RULES = 64, 1000
"""Of a base chain that translates addresses as many chains are read, and of each of these as many rules: Kubernetes has
thousands."""
MOST_SERVICES = 20_000
"""So many rules of such a chain, and members of a set that it uses, are read if it is asked what it translates: of very
many services their addresses at least are known."""


def read(device: sockets.Socket, hooks: Collection[str]) -> tuple[BaseChain, ...]:
    """All base chains of some hooks, with the chains that they lead to. Of those that translate addresses only their
    own rules are read: what they lead to cannot be told. OSError: nftables is not to be read."""
    return tuple(_chain(device, base, math.inf if base.filters else 1) for base in _bases(device, hooks))


def read_translating(device: sockets.Socket) -> tuple[BaseChain, ...]:
    """The base chains that translate destinations of forwarded packets, with the chains that they lead to. What there
    is too much of to be read may translate. OSError: nftables is not to be read."""
    bases = _bases(device, ("prerouting",))
    return tuple(_chain(device, base, MOST_CHAINS, MOST_SERVICES, MOST_SERVICES) for base in bases if not base.filters)


def _bases(device: sockets.Socket, hooks: Collection[str]) -> list[replies.FoundBase]:
    """The base chains of some hooks that are switched on."""
    bases: list[replies.FoundBase] = []

    def keep(body: bytes) -> None:
        if (base := replies.read_base(body)) is not None and base.hook in hooks:
            bases.append(base)

    dormant: set[tuple[int, str]] = set()

    def keep_dormant(body: bytes) -> None:
        if (table := replies.read_dormant(body)) is not None:
            dormant.add(table)

    device.dump(requests.get_all_chains(), keep)
    if bases:
        device.dump(requests.get_all_tables(), keep_dormant)
    bases.sort(key=lambda base: (base.family, base.table))
    return [base for base in bases if (base.family, base.table) not in dormant]


def _chain(
    device: sockets.Socket, base: replies.FoundBase, most: float, most_rules: int = MOST_RULES,
    most_members: int = MOST_MEMBERS,
) -> BaseChain:  # fmt: skip
    rules = _rules_from(device, base, most, most_rules, most_members)
    return BaseChain(
        family=FAMILIES[base.family], table=base.table, name=base.name, hook=base.hook, priority=base.priority,
        drops=base.drops, devices=base.devices, rules=rules[base.name], chains=rules,
    )  # fmt: skip


def _rules_from(
    device: sockets.Socket, base: replies.FoundBase, most: float, most_rules: int, most_members: int
) -> dict[str, tuple[FilterRule, ...]]:  # fmt: skip
    """The rules of a chain and of those that it leads to, of at most so many. Others are not read: Kubernetes has
    thousands in a table."""
    family, table = base.family, base.table

    def members_of(name: str) -> list[Found] | None:
        members: list[Found] = []

        def keep(body: bytes) -> None:
            if len(members) <= most_members:
                members.extend(replies.read_members(body))

        device.dump(requests.get_elements(table, name, family), keep)
        return members if len(members) <= most_members else None

    @cache
    def all_sets() -> dict[str, FoundSet]:
        sets: dict[str, FoundSet] = {}

        def keep(body: bytes) -> None:
            if (item := replies.read_set(body, table)) is not None:
                name, flags, length = item
                sets[name] = FoundSet(flags=flags, key_length=length, members=partial(members_of, name))

        device.dump(requests.get_sets(table, family), keep)
        return sets

    result: dict[str, tuple[FilterRule, ...]] = {}
    missing = deque([base.name])
    while missing and len(result) < most:
        chain = missing.popleft()
        if chain in result:
            continue
        items: list[Found] = []

        def keep(body: bytes, chain: str = chain, items: list[Found] = items) -> None:
            enough = not base.filters and len(items) > most_rules
            if not enough and (item := replies.read_rule_of(body, family, table, chain)) is not None:
                items.append(item)

        device.dump(requests.get_rules_of(table, chain, family), keep)
        if base.filters or len(items) <= most_rules:
            rules = tuple(rule for item in items for rule in _rules(item, base.hook, lambda name: all_sets().get(name)))
        else:
            rules = (FilterRule(verdict="unknown"),)
        result[chain] = rules
        missing += [rule.target for rule in rules if rule.target]
    if base.filters:
        return result
    return {chain: tuple(_or_unknown(rule, result, base.hook) for rule in rules) for chain, rules in result.items()}


def _or_unknown(rule: FilterRule, known: Collection[str], hook: str) -> FilterRule:
    """A rule of a chain that translates addresses, given the chains that were read. What is not known may translate
    destinations of what is forwarded only at hook prerouting: later, the kernel lets none be translated."""
    if rule.verdict in ("jump", "goto") and rule.target not in known:
        rule = evolve(rule, verdict="unknown", target="")
    return evolve(rule, translates=rule.translates or (rule.verdict == "unknown" and hook == "prerouting"))


def _rules(item: Found, hook: str, sets: Sets) -> tuple[FilterRule, ...]:
    try:
        return replies.to_rules(item, sets, hook)
    except UNREADABLE:
        return (FilterRule(verdict="unknown"),)


def ours(chains: tuple[BaseChain, ...], comment_prefix: str) -> frozenset[Opening]:
    """The rules that carry our comment: `comment_prefix`, a space and the words of the match."""
    return frozenset(
        Opening(chain.family, chain.table, chain.name, tuple(rule.comment.split()[1:]), comment_prefix, rule.handle)
        for chain in chains
        if not chain.iptables
        for rule in chain.rules
        if rule.comment.startswith(f"{comment_prefix} ")
    )
