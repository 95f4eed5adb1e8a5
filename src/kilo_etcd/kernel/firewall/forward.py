"""Which rules let forwarded mesh traffic through where the host's FORWARD policy is drop. Pure: values and text.

Only with `--forward-rules`. They are in iptables' chain FORWARD, or in docker's DOCKER-USER where there is one: an
accept in a table of our own does not take back a drop in theirs. Each carries a comment by which it is known as ours.
What passes: whatever comes out of the tunnel or goes into it, encapsulated packets of the location likewise, and, for
the networks behind this host, what the mesh sends them over the location's own network. Nothing else is opened.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import collapse_addresses

from attrs import frozen

from kilo_etcd.model import IPNetwork
from kilo_etcd.model.hostplan import HostPlan

FORWARD, DOCKER = "FORWARD", "DOCKER-USER"


def comment_prefix(interface: str) -> str:
    """The comment of the rules that belong to an interface."""
    return f"kilo-etcd:{interface}"


@frozen
class ForwardRule:
    """`match`: the words between the chain and the comment, in the order in which `iptables -S` prints them."""

    version: int
    chain: str
    match: tuple[str, ...]
    comment: str

    @property
    def words(self) -> tuple[str, ...]:
        """The rule as iptables takes it, after the name of the chain."""
        return (*self.match, "-m", "comment", "--comment", self.comment, "-j", "ACCEPT")

    @property
    def program(self) -> str:
        """The program that has the rule's family: `iptables` or `ip6tables`."""
        return "iptables" if self.version == 4 else "ip6tables"


@frozen
class AddForward:
    """At the head of its chain."""

    rule: ForwardRule

    @property
    def command(self) -> tuple[str, ...]:
        """The command that inserts the rule, which waits up to 5 s for the lock of the tables."""
        return (self.rule.program, "-w", "5", "-I", self.rule.chain, "1", *self.rule.words)

    def __str__(self) -> str:
        return shlex.join(self.command)


@frozen
class DeleteForward:
    """Removes one such rule from its chain."""

    rule: ForwardRule

    @property
    def command(self) -> tuple[str, ...]:
        """The command that removes the rule, which waits up to 5 s for the lock of the tables."""
        return (self.rule.program, "-w", "5", "-D", self.rule.chain, *self.rule.words)

    def __str__(self) -> str:
        return shlex.join(self.command)


def rules_for(plan: HostPlan, interface: str, ipip: str, chains: Mapping[int, str]) -> tuple[ForwardRule, ...]:
    """The rules that a plan asks for. `chains`: family -> the chain to put them in, where there is one."""
    return tuple(
        ForwardRule(version, chains[version], match, comment_prefix(interface))
        for version in sorted(plan.forwarding)
        if version in chains
        for match in matches(plan, interface, ipip if plan.ipip_remotes and version == 4 else "", version)
    )


def matches(plan: HostPlan, interface: str, ipip: str, version: int) -> Iterator[tuple[str, ...]]:
    """The iptables matches of the mesh packets that a host forwards: those that come in or go out by the tunnel or the
    IPIP device (empty: there is none), and on a member those between the mesh's networks and the location's own."""
    for device in (interface, ipip):
        if device:
            yield "-i", device
            yield "-o", device
    behind = [network for network in plan.behind if network.version == version]
    if behind:
        # On a member the mesh's packets come from its leader over the location's network, as anybody's might.
        for far in _collapsed(network for network in plan.routes if network.version == version):
            for near in behind:
                yield "-s", str(far), "-d", str(near)
                yield "-s", str(near), "-d", str(far)


def _collapsed(networks: Iterable[IPNetwork]) -> list[IPNetwork]:
    return list(collapse_addresses(networks))  # type: ignore[type-var]


def read_rules(printed: str, version: int, interface: str) -> tuple[str, frozenset[ForwardRule]]:
    """From what `iptables -S` prints: the chain that rules of ours belong in, and those that are there."""
    chain, rules = FORWARD, set()
    for line in printed.splitlines():
        words = shlex.split(line)
        if words[:2] == ["-N", DOCKER]:
            chain = DOCKER
        if len(words) > 2 and words[0] == "-A" and comment_prefix(interface) in words:
            at = words.index("-m") if "-m" in words else len(words)
            rule = ForwardRule(version, words[1], tuple(words[2:at]), comment_prefix(interface))
            if tuple(words[2:]) == rule.words:
                rules.add(rule)
    return chain, frozenset(rules)
