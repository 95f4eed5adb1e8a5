"""The packet filter's part of what fits into the tunnel (MSS clamping): chain `sizes` of our nftables table. Pure.

A host that forwards between the tunnel and another network joins two sides whose MTUs differ. Its ICMP errors tell the
ends (path MTU discovery), if nobody on the way drops these. So the segment size that each end of a TCP connection names
in its handshake is lowered to what the routes of both directions take. A size that fits already is left alone, so the
rules change nothing between sides of one MTU.

A kernel may refuse the chain, or any table. Forwarding goes on without it, as it does where the operator does not want
it, so that is no failure; the rest of the table must not be lost with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from kilo_etcd.kernel.firewall import nftables as nft
from kilo_etcd.kernel.firewall.table import Chain, FirewallTable, ReplaceTable, Rule
from kilo_etcd.kernel.netlink.formats import NF_PRIORITIES

_SYN, _RST = 0x02, 0x04
"""Flags of TCP (RFC 9293)."""

CHAIN = Chain(name="sizes", kind="filter", hook="forward", priority=NF_PRIORITIES["mangle"])


def is_in(table: FirewallTable | None) -> bool:
    """Whether the table has the chain."""
    return table is not None and CHAIN in table.chains


def is_set_by(change: object) -> bool:
    """Whether a change sets a table with the chain: if it is refused, it is to be tried without."""
    return isinstance(change, ReplaceTable) and is_in(change.table)


def rules(devices: Collection[str]) -> Iterator[Rule]:
    """The rules of the chain, for what comes in by one of these devices or leaves by one."""
    opens = (*nft.match_protocol(6), *nft.match_tcp_flags(_SYN | _RST, _SYN))
    for direction in ("iifname", "oifname"):
        for device in devices:
            yield Rule(
                chain=CHAIN.name,
                expressions=(*nft.match_interface(direction, device), *opens, *nft.clamp_segments()),
                text=f'{direction} "{device}" tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu',
            )
