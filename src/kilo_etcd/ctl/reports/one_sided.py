"""Exemptions (`--clear`) that one host states and the other does not: what the first sends in clear the other refuses,
or answers through the tunnels. Pure.

They are known from the statuses, without a packet; of agents that do not say what they exempt (they are of older
versions, or exempt too much to list), nothing is concluded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import ip_network
from itertools import islice

from attrs import frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.reports.exemptions import exemptions
from kilo_etcd.ctl.reports.trace import Plans
from kilo_etcd.model import InternalIPs, IPAddress, Node
from kilo_etcd.model.hostplan import Exemption
from kilo_etcd.store.records import StatusRecord
from kilo_etcd.topology.places import own_addresses
from kilo_etcd.topology.segments import Topology, host_network

MOST_LOOKED_AT = 20
"""Hosts of which it is looked, for one exemption, whether they refuse."""
MOST_NAMED = 3

Exempted = Mapping[str, tuple[Exemption, ...]]
"""Node -> its exemptions, of those whose agents say which they have."""


@frozen(kw_only=True)
class OneSided:
    """An exemption of one or more hosts, and hosts to which it sends in clear and that do not send to it so."""

    exemption: Exemption
    senders: tuple[str, ...]
    others: tuple[str, ...]
    refusing: int
    """How many of them refuse it."""
    needed: Exemption
    """The exemption that the first of the others needs for the first sender."""

    @property
    def subject(self) -> str:
        """The hosts, for people."""
        return f"{first_of(self.senders, MOST_NAMED)} - {first_of(self.others, MOST_NAMED)}"

    @property
    def text(self) -> str:
        """A sentence with its remedy."""
        others, first = first_of(self.others, MOST_NAMED), self.others[0]
        likewise = "" if len(self.others) == len(self.senders) == 1 else "; likewise for each pair of the others"
        back = "what is sent back travels in the tunnels"
        fate = "is refused there" if self.refusing else back
        if 0 < self.refusing < len(self.others):
            fate = f"is refused by {self.refusing} of them; {back} from the others"
        return (
            f"--clear {self.exemption} is stated at one end only: what {first_of(self.senders, MOST_NAMED)} "
            f"{'sends' if len(self.senders) == 1 else 'send'} to "
            f"{others} by it leaves in clear, and {fate}; state it on {first} too "
            f"(add {self.needed} to KILO_CLEAR there{likewise}), or take it away on "
            f"{first_of(self.senders, MOST_NAMED)}"
        )


def exempted(statuses: Mapping[str, StatusRecord]) -> Exempted:
    """What each node leaves in clear, as its agent says."""
    return {name: exemptions(status.clear) for name, status in statuses.items() if status.clear is not None}


def one_sided(
    topology: Topology, statuses: Mapping[str, StatusRecord], names: Collection[str] | None = None
) -> Iterator[OneSided]:
    """One for each exemption and each group of hosts that state the same; `names`: of these hosts only."""
    if topology.internal_ips is not InternalIPs.ENCRYPTED:
        return
    plans = Plans(topology, statuses)
    alike: dict[tuple[Exemption, ...], list[Node]] = {}
    for name, stated in sorted(exempted(statuses).items()):
        if name in topology.snapshot.nodes and (names is None or name in names):
            alike.setdefault(stated, []).append(topology.snapshot.nodes[name])
    for exemption in sorted({exemption for stated in alike for exemption in stated}, key=str):
        senders = [node for stated, nodes in alike.items() if exemption in stated for node in nodes]
        for stated, nodes in alike.items():
            if (mismatch := _mismatch(exemption, senders, stated, nodes, plans)) is not None:
                yield mismatch


def _mismatch(
    exemption: Exemption, senders: Iterable[Node], stated: tuple[Exemption, ...], nodes: list[Node], plans: Plans
) -> OneSided | None:
    """What hosts that state `stated` refuse of an exemption of `senders`, or else answer through the tunnels; None:
    nothing."""
    unknown = {node.name: address for node in senders if (address := _uncovered(node, exemption, stated)) is not None}
    if not unknown:
        return None
    # A host refuses no node of its own segment, so a segment that has all the senders is not looked at.
    segments = {plans.topology.segment_of(name).key for name in unknown}
    receivers = (
        node for node in nodes
        if any(_within(address, exemption) for address in own_addresses(node))
        and segments != {plans.topology.segment_of(node.name).key}
    )  # fmt: skip
    others: dict[str, bool] = {}
    sending: set[str] = set()
    first: set[str] = set()
    for node in islice(receivers, MOST_LOOKED_AT):
        if (encryption := plans[node.name].encryption) is None:
            continue
        near = plans.topology.segment_of(node.name)
        far = {name: a for name, a in unknown.items() if plans.topology.segment_of(name) is not near}
        refused = {name for name, address in far.items() if address in encryption.refuse}
        tunneled = {name for name, address in far.items() if host_network(address) in encryption.send}
        if refused or tunneled:
            others[node.name] = bool(refused)
            first = first or refused or tunneled
            sending |= refused or tunneled
    if not others:
        return None
    return OneSided(
        exemption=exemption, senders=tuple(sorted(sending)), others=tuple(others), refusing=sum(others.values()),
        needed=Exemption(protocol=exemption.protocol, port=exemption.port, network=ip_network(unknown[min(first)])),
    )  # fmt: skip


def echo_refused(plans: Plans, one: str, other: str) -> bool:
    """Whether an exemption of one of two hosts, and not of the other, has them lose echo requests at internal IPs."""
    nodes, statuses = plans.topology.snapshot.nodes, plans.statuses
    stated = exempted({name: statuses[name] for name in (one, other) if name in statuses})
    if len(stated) < 2 or not {one, other} <= nodes.keys():
        return False
    return any(
        exemption.protocol == "icmp"
        and (mismatch := _mismatch(exemption, (nodes[here],), stated[there], [nodes[there]], plans)) is not None
        and mismatch.refusing
        for here, there in ((one, other), (other, one))
        for exemption in stated[here]
    )


def _uncovered(node: Node, exemption: Exemption, stated: Iterable[Exemption]) -> IPAddress | None:
    """The first internal IP of a node that `stated` does not have for what an exemption is about, or endpoint if it has
    no internal IP of that family; None: there is none."""
    matching = [
        own_exemption
        for own_exemption in stated
        if own_exemption.protocol == exemption.protocol
        and (own_exemption.port is None or own_exemption.port == exemption.port)
    ]
    version = exemption.network.version
    internal = [ip.ip for ip in node.internal_ips if ip.version == version]
    own = internal or [address for address in own_addresses(node) if address.version == version]
    return next(
        (address for address in own if not any(_within(address, own_exemption) for own_exemption in matching)), None
    )


def _within(address: IPAddress, exemption: Exemption) -> bool:
    return address.version == exemption.network.version and address in exemption.network
