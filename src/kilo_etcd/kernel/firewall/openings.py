"""Rules of ours in other programs' nftables chains, which let forwarded mesh packets through (`--forward-rules`). Pure.

An accept in a table of our own takes back no drop in another table, so the rule has to be at the head of the chain that
drops. What iptables keeps (FORWARD, DOCKER-USER) is `kernel.firewall.forward`'s; here are the chains of all other
programs: firewalld's, or those of an operator's own ruleset. Each rule carries a comment by which it is known as ours;
whoever reloads such a firewall takes it away, and the agent restores it.
"""

from __future__ import annotations

from collections.abc import Collection

from attrs import field, frozen

from kilo_etcd.kernel.firewall.forward import matches
from kilo_etcd.model.hostplan import HostPlan

Place = tuple[str, str, str]
"""Family, table, chain."""

_LONGEST = 120
"""Bytes that nft allows for a comment are 128."""


@frozen
class Opening:
    """A rule that lets mesh packets through in a chain of another program that drops what it does not know.

    `match`: as iptables would say it, in pairs of words (`-i kilo0`).
    """

    family: str
    table: str
    chain: str
    match: tuple[str, ...]
    comment_prefix: str
    handle: int = field(default=0, eq=False)
    """The kernel's number of the rule; 0: it is not there yet."""

    @property
    def comment(self) -> str:
        """The comment by which the rule is recognised as ours, and for which packets it is."""
        return " ".join((self.comment_prefix, *self.match))

    @property
    def remedy(self) -> str:
        """What the owner of the chain can do instead."""
        names = [value for word, value in zip(self.match[::2], self.match[1::2], strict=True) if word in ("-i", "-o")]
        if self.table == "firewalld" and names:
            return f"firewall-cmd --permanent --zone=trusted --add-interface={names[0]} && firewall-cmd --reload"
        return "let mesh packets through in its own configuration"

    @property
    def text(self) -> str:
        """As nft says it."""
        family = "ip6" if ":" in " ".join(self.match) else "ip"
        names = {"-i": "iifname", "-o": "oifname", "-s": f"{family} saddr", "-d": f"{family} daddr"}
        pairs = zip(self.match[::2], self.match[1::2], strict=True)
        conditions = " ".join(f'{names[w]} "{v}"' if w in ("-i", "-o") else f"{names[w]} {v}" for w, v in pairs)
        return f'{conditions} accept comment "{self.comment}"'


@frozen
class AddOpening:
    """At the head of its chain."""

    opening: Opening

    def __str__(self) -> str:
        opening = self.opening
        return f"nft insert rule {opening.family} {opening.table} {opening.chain} {opening.text}"


@frozen
class DeleteOpening:
    """Removes such a rule from its chain, by the kernel's number of it."""

    opening: Opening

    def __str__(self) -> str:
        opening = self.opening
        return f"nft delete rule {opening.family} {opening.table} {opening.chain} handle {opening.handle}"


def openings_for(
    plan: HostPlan, interface: str, ipip: str, dropping: Collection[Place], comment_prefix: str
) -> tuple[Opening, ...]:
    """The rules that a plan asks for in the chains that drop."""
    result: dict[Opening, None] = {}
    for family, table, chain in sorted(dropping):
        versions = {"ip": {4}, "ip6": {6}}.get(family, {4, 6}) & plan.forwarding
        for version in sorted(versions):
            for match in matches(plan, interface, ipip if plan.ipip_remotes and version == 4 else "", version):
                opening = Opening(family, table, chain, match, comment_prefix)
                if len(opening.comment) <= _LONGEST:
                    result[opening] = None
    return tuple(result)
