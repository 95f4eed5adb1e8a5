"""Reads every base chain of some hooks from nftables, of all families and whoever made it, and knows those rules in
them that are ours (`--forward-rules`)."""

from __future__ import annotations

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


def read(device: sockets.Socket, hooks: Collection[str]) -> tuple[BaseChain, ...]:
    """All base chains of some hooks, with the chains that they lead to; but for the chains that translate addresses, of
    which Kubernetes has thousands. OSError: nftables is not to be read."""
    bases: dict[tuple[int, str], list[replies.FoundBase]] = {}

    def keep(body: bytes) -> None:
        if (base := replies.read_base(body)) is not None and base.hook in hooks:
            bases.setdefault((base.family, base.table), []).append(base)

    dormant: set[tuple[int, str]] = set()

    def keep_dormant(body: bytes) -> None:
        if (table := replies.read_dormant(body)) is not None:
            dormant.add(table)

    device.dump(requests.get_all_chains(), keep)
    if bases:
        device.dump(requests.get_all_tables(), keep_dormant)
    return tuple(
        BaseChain(
            family=FAMILIES[family], table=table, name=base.name, hook=base.hook, drops=base.drops,
            devices=base.devices, rules=rules[base.name], chains=rules,
        )
        for (family, table), chains in sorted(bases.items()) if (family, table) not in dormant
        for base in chains
        for rules in (_rules_from(device, family, table, base.name, follow=base.filters),)
    )  # fmt: skip


def _rules_from(
    device: sockets.Socket, family: int, table: str, base: str, *, follow: bool
) -> dict[str, tuple[FilterRule, ...]]:  # fmt: skip
    """The rules of a chain and of those that it leads to. Others are not read: Kubernetes has thousands in a table.
    Without `follow`: of this chain alone, and what it leads to cannot be told."""

    def members_of(name: str) -> list[Found] | None:
        members: list[Found] = []

        def keep(body: bytes) -> None:
            if len(members) <= MOST_MEMBERS:
                members.extend(replies.read_members(body))

        device.dump(requests.get_elements(table, name, family), keep)
        return members if len(members) <= MOST_MEMBERS else None

    @cache
    def all_sets() -> dict[str, FoundSet]:
        found: dict[str, FoundSet] = {}

        def keep(body: bytes) -> None:
            if (item := replies.read_set(body, table)) is not None:
                name, flags, length = item
                found[name] = FoundSet(flags=flags, key_length=length, members=partial(members_of, name))

        device.dump(requests.get_sets(table, family), keep)
        return found

    result: dict[str, tuple[FilterRule, ...]] = {}
    missing = [base]
    while missing:
        chain = missing.pop()
        items: list[Found] = []

        def keep(body: bytes, chain: str = chain, items: list[Found] = items) -> None:
            if (item := replies.read_rule_of(body, family, table, chain)) is not None:
                items.append(item)

        device.dump(requests.get_rules_of(table, chain, family), keep)
        result[chain] = rules = tuple(
            rule for item in items for rule in _rules(item, lambda name: all_sets().get(name))
        )
        if follow:
            missing += [rule.target for rule in rules if rule.target and rule.target not in result]
        else:
            result[chain] = tuple(
                evolve(rule, verdict="unknown", target="") if rule.verdict in ("jump", "goto") else rule
                for rule in rules
            )
    return result


def _rules(item: Found, sets: Sets) -> tuple[FilterRule, ...]:
    try:
        return replies.to_rules(item, sets)
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
