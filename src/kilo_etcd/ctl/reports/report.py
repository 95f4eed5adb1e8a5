"""The content of `kgctl status`, as values: pure functions of a snapshot, etcd's raw view of it and the agents'
statuses.

It compares three things: what etcd holds (so what the mesh should be), what each agent reports, and which agents
report at all. It decides nothing and it knows nothing of tables or JSON; `ctl.reports.render` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.reports.label import oddity
from kilo_etcd.model import PEER_QUERY_PORT, Candidate, Endpoint, InternalIPs, IPAddress, Node, RejectedRecord, Snapshot
from kilo_etcd.planning.reach import called_location
from kilo_etcd.store.keys import AddressKey, AnnotationKey, Keys, LocationKey, NodeKey
from kilo_etcd.store.records import Role, StatusRecord
from kilo_etcd.store.view import View
from kilo_etcd.topology.mesh_settings import about_flag
from kilo_etcd.topology.probe_reports import sentence
from kilo_etcd.topology.segments import Segment, Topology, build_topology
from kilo_etcd.topology.stages import Switch, switch
from kilo_etcd.topology.unaware import unaware_problems, waiting
from kilo_etcd.topology.unrouted import Unrouted, private_leaders

if TYPE_CHECKING:
    from kilo_etcd.ctl.reports.live import Live, LiveTunnel

NOT_IN_FORCE = "not in force"
"""The role of a node that is registered and yet no part of the mesh: it has no address yet, or is rejected."""
MOST_SUBJECTS = 3
"""Subjects of the same remark that are named in one line."""
DROPPED = "under internal-ips=encrypted packets for there are dropped, not sent in clear"
UNREGISTERED = "not registered"
"""The role of an agent that reports but has no record."""


@frozen(kw_only=True)
class NodeRow:
    """One node. `revision` and `behind` are None when no agent reports for it."""

    name: str
    location: str | None
    mesh_addresses: tuple[str, ...] = ()
    internal_ips: tuple[str, ...] = ()
    endpoint: str | None = None
    observed_endpoints: tuple[str, ...] = ()
    """Its observed endpoints, the newest first."""
    role: str
    alive: bool
    revision: int | None = None
    behind: int | None = None
    """By how many revisions of etcd the agent is behind the newest record of the mesh."""
    version: str = ""


@frozen(kw_only=True)
class LocationRow:
    """One segment of several nodes, or all nodes of a location that are segments of their own."""

    location: str
    nodes: tuple[str, ...]
    leader: str | None
    """None: every node for itself."""
    since: str | None = None
    """RFC 3339: since when it leads, as its own agent reports; None if that does not live, or does not say."""
    reason: str = ""
    next_in_line: str | None = None
    candidates: tuple[str, ...] = ()
    """In the order in which they would lead."""


@frozen(kw_only=True)
class Remark:
    """A node or network, and a sentence about it."""

    subject: str
    text: str
    about: str = ""
    """The node or peer that can mend it, where the subject is a network."""


@frozen(kw_only=True)
class UnsignedRemark(Remark):
    """Members of a location at whose internal IPs something answers, but not with their keys."""

    pairs: tuple[tuple[str, str], ...]
    """Who queries, and the member that does not answer."""


@frozen(kw_only=True)
class UnroutedRemark(Remark):
    """An internal IP, or a network of internal IPs, that is not routed, and why. Under `encrypted` an endpoint too."""

    nodes: tuple[str, ...] = ()
    """The nodes that have this one address."""
    not_from: tuple[str, ...] = ()
    """The segments that do not route it, or the nodes if not all of a segment do not; empty: no segment does."""
    outliers: tuple[str, ...] = ()
    """Nodes that may have the network, or their labels, by mistake."""

    @property
    def subject_with_nodes(self) -> str:
        """The subject, for people."""
        return f"{self.subject} ({first_of(self.nodes, MOST_SUBJECTS)})" if self.nodes else self.subject

    @property
    def nowhere(self) -> str:
        """From where it is not routed, for people."""
        return first_of(self.not_from, MOST_SUBJECTS) or "anywhere"


@frozen(kw_only=True)
class KernelRow:
    """What a living agent has answered of its host's kernel."""

    name: str
    backend: str
    mtu: int
    tunnels: tuple[LiveTunnel, ...]
    """Empty for members, which send by their leader."""
    undone: int
    """By how many changes it differs from the plan."""
    changes: tuple[str, ...]
    """The first of them."""
    trouble: tuple[str, ...]


@frozen(kw_only=True)
class LiveReport:
    """What was asked of the hosts."""

    kernels: tuple[KernelRow, ...] = ()
    silent: tuple[str, ...] = ()
    """Living agents that have not answered in time."""
    refused: str | None = None
    """Why nothing could be asked."""
    tunnels: int = 0
    """Pairs of leaders of which at least one has answered."""
    up: int = 0
    """Those of them whose session lives."""


@frozen(kw_only=True)
class Report:
    """All of `kgctl status`."""

    revision: int
    granularity: str
    subnets: tuple[str, ...]
    internal_ips: str
    """The setting."""
    internal_ips_in_force: str
    unaware: tuple[str, ...] = ()
    """The nodes whose agents do not know the setting: it is not in force before they do, or are forgotten."""
    switch: Switch | None = None
    """How far the switch to `encrypted`, or back, is; None: nothing of it is under way."""
    urgent: tuple[Remark, ...] = ()
    """Errors of the mesh as a whole, to be said before all else."""
    nodes: tuple[NodeRow, ...] = ()
    locations: tuple[LocationRow, ...] = ()
    peers: tuple[str, ...] = ()
    rejected: tuple[RejectedRecord, ...] = ()
    disagreements: tuple[Remark, ...] = field(factory=tuple)
    """Agents whose status differs from what etcd says."""
    errors: tuple[Remark, ...] = ()
    """The failures that agents report, without what each of them reports of the whole mesh (`problems`)."""
    problems: tuple[Remark, ...] = ()
    """What is wrong with the mesh as a whole: networks that the topology could not grant, leaders through which probers
    get no answer, exemptions that are stated at one end only."""
    notes: tuple[Remark, ...] = ()
    """What may be a mistake of the operator's."""
    unrouted: tuple[UnroutedRemark, ...] = ()
    """Internal IPs that are not routed, and why; what the setting waits for."""
    live: LiveReport | None = None
    """None: nobody was asked."""


def newest_revision(view: View, keys: Keys) -> int:
    """The revision of the newest record of the mesh: an agent that has applied it has missed nothing that is there.
    Deletions leave no record and do not count here; `store.operator.newest_change` finds them too.

    etcd's own revision would not do: it moves with every status and with other programs' keys as well.
    """
    return max((kv.mod_revision for kv in view.kvs(keys.root)), default=0)


def registered_names(view: View, keys: Keys) -> frozenset[str]:
    """The names with a record in etcd, whether it is in force or not."""
    parsed = (keys.parse(kv.key) for kv in view.kvs(keys.by_root))
    return frozenset(key.node for key in parsed if isinstance(key, NodeKey))


def claims_without_record(view: View, keys: Keys, registered: Collection[str]) -> dict[str, int]:
    """Names that claim mesh addresses and are not among those `registered` -> how many they claim."""
    parsed = (keys.parse(kv.key) for kv in view.kvs(keys.by_root))
    return Counter(key.node for key in parsed if isinstance(key, AddressKey) and key.node not in registered)


def set_without_record(view: View, keys: Keys, registered: Collection[str]) -> tuple[str, ...]:
    """Names that have a label or annotations and are not among those `registered`, sorted."""
    parsed = [keys.parse(kv.key) for root in (keys.locations_root, keys.annotations_root) for kv in view.kvs(root)]
    named = {key.node for key in parsed if isinstance(key, LocationKey | AnnotationKey)}
    return tuple(sorted(named.difference(registered)))


def report(
    snapshot: Snapshot,
    statuses: Mapping[str, StatusRecord],
    *,
    newest: int,
    registered: frozenset[str] = frozenset(),
    live: Live | None = None,
    topology: Topology | None = None,
    about: Collection[str] | None = None,
    distrust: str | None = None,
) -> Report:
    """The report on `snapshot`; `newest` is what `newest_revision` says, `registered` what `registered_names` says,
    `distrust` a sentence on agents that do not follow this etcd.

    `topology` is that of the snapshot, where the caller has it already. With `about` it has no rows for other nodes,
    and no status of their own.
    """
    if topology is None:
        topology = build_topology(snapshot)
    names = sorted(name for name in {*snapshot.nodes, *registered, *statuses} if about is None or name in about)
    urgent = unaware_problems(topology)
    everyones = {problem.text for problem in (*topology.problems, *urgent)}
    return Report(
        revision=newest,
        granularity=snapshot.granularity.value,
        subnets=tuple(map(str, snapshot.subnets)),
        internal_ips=snapshot.internal_ips.value,
        internal_ips_in_force=topology.internal_ips.value,
        unaware=tuple(sorted(topology.unaware)),
        switch=switch(topology, statuses),
        urgent=(
            *(() if distrust is None else (Remark(subject="etcd", text=distrust),)),
            *(Remark(subject=problem.subject, text=problem.text, about=problem.about) for problem in urgent),
            *(_cut_off(topology, live) if live is not None else ()),
        ),
        nodes=tuple(_node_row(name, topology, statuses.get(name), newest, name in registered) for name in names),
        locations=_location_rows(topology, statuses),
        peers=tuple(sorted(topology.peers)),
        # What the operator writes comes first, since of very many the first are shown.
        rejected=tuple(sorted(snapshot.rejected, key=lambda record: (record.author != "", "/by/" in record.key))),
        disagreements=tuple(
            Remark(subject=name, text=text)
            for name in names
            if name in statuses
            for text in _disagreements(name, statuses[name], topology, newest)
        )
        + tuple(_other_ports(names, statuses))
        + tuple(_unsigned(names, statuses, topology, separately=about is not None)),
        errors=tuple(
            Remark(subject=name, text=error)
            for name in names
            if name in statuses
            for error in statuses[name].errors
            if error not in everyones and not about_flag(error)
        ),
        problems=(
            *(
                Remark(subject=problem.subject, text=problem.text, about=problem.about)
                for problem in (*topology.problems, *private_leaders(topology))
            ),
            *_same_internal_ips(snapshot, statuses, separately=about is not None),
            *_same_endpoints(snapshot, statuses, separately=about is not None),
            *_unreached_through(topology),
            *unanswered(unanswered_pairs(statuses, topology), about),
            *_one_sided(topology, statuses, about),
        ),
        notes=(
            *_odd_locations(snapshot),
            *_unanswered_peers(names, statuses, topology),
            *_without_internal_ip(topology, names),
            *_flags(names, statuses),
            *_endpoints_in_clear(topology, names),
        ),
        unrouted=tuple(unrouted_remarks(topology)) if about is None else (),
        live=None if live is None else _live_report(topology, live),
    )


def _odd_locations(snapshot: Snapshot) -> Iterator[Remark]:
    nodes: dict[str, list[str]] = {}
    for name, node in sorted(snapshot.nodes.items()):
        nodes.setdefault(node.location, []).append(name)
    for location, names in sorted(nodes.items()):
        if (odd := oddity(location)) is not None:
            yield Remark(
                subject=location,
                text=f"the location of {first_of(names, 1)} {odd}: if that is not meant, correct KILO_LOCATION there, "
                f"or kgctl location set {names[0]} NAME",
            )


def _without_internal_ip(topology: Topology, names: Iterable[str]) -> Iterator[Remark]:
    """On nodes that are registered without an internal IP in a mesh that routes those of others: one remark for all of
    them."""
    if not topology.internal_families:
        return
    nodes = topology.snapshot.nodes
    without = [name for name in names if name in nodes and not nodes[name].internal_ips]
    if without:
        yield Remark(
            subject=first_of(without, MOST_SUBJECTS),
            text="no internal IP is registered, so nobody reaches it at one, and it is in no group with others of its "
            "location; if it should have one, look at its private addresses (ip address) and KILO_INTERNAL_CIDR there",
        )


def _same_internal_ips(
    snapshot: Snapshot, statuses: Mapping[str, StatusRecord], *, separately: bool
) -> Iterator[Remark]:
    """On hosts of one location that have one internal IP."""
    having: dict[tuple[str, IPAddress], list[str]] = {}
    for name, node in sorted(snapshot.nodes.items()):
        for ip in node.internal_ips:
            having.setdefault((node.location, ip.ip), []).append(name)
    for (location, address), names in having.items():

        def remedy(last: str) -> str:
            return (
                f"give {last} another one (--internal-cidr, or kgctl annotate {last} force-internal-ip=ADDRESS); if "
                f"they share no network, label them apart (kgctl location set {last} NAME)"
            )

        yield from _shared(
            names, f"internal IP {address} at {called_location(location)}", remedy, statuses, separately=separately
        )


def _same_endpoints(snapshot: Snapshot, statuses: Mapping[str, StatusRecord], *, separately: bool) -> Iterator[Remark]:
    """On nodes that have one endpoint. A private one counts within a location, since two sites may have the same, and
    if it is not an internal IP that the nodes have too, which `_same_internal_ips` names."""
    having: dict[tuple[Endpoint, str | None], list[str]] = {}
    inside: set[tuple[Endpoint, str | None, str]] = set()
    for name, node in sorted(snapshot.nodes.items()):
        for endpoint in dict.fromkeys(node.endpoints):
            key = endpoint, None if endpoint.public else node.location
            having.setdefault(key, []).append(name)
            if any(ip.ip == endpoint.address for ip in node.internal_ips):
                inside.add((*key, name))
    for (endpoint, location), names in having.items():
        if all((endpoint, location, name) in inside for name in names):
            continue

        def remedy(last: str) -> str:
            return (
                f"give {last} one of its own (--endpoint, or kgctl annotate {last} force-endpoint=HOST:PORT; behind "
                "one NAT a port of its own, --port)"
            )

        yield from _shared(names, f"endpoint {endpoint}", remedy, statuses, separately=separately)


def _shared(
    names: Sequence[str],
    shared_address: str,
    remedy: Callable[[str], str],
    statuses: Mapping[str, StatusRecord],
    *,
    separately: bool,
) -> Iterator[Remark]:
    """On nodes that have one address: at most one of them is reached there. One remark for all of them; with
    `separately` one for each node. `remedy`: what to do with the node that is named."""
    if len(names) == 1:
        return
    silent = [name for name in names if name not in statuses]
    last = (silent or names)[-1]
    forget_hint = f"if {last} is gone for good, kgctl node forget {last}; else " if silent else ""
    text = f"they have the same {shared_address}, so at most one of them is reached there: {forget_hint}{remedy(last)}"
    if separately:
        yield from (Remark(subject=name, text=f"{first_of(names, MOST_SUBJECTS)}: {text}") for name in names)
    else:
        yield Remark(subject=first_of(names, MOST_SUBJECTS), text=text, about=last)


def _flags(names: Iterable[str], statuses: Mapping[str, StatusRecord]) -> tuple[Remark, ...]:
    """On flags that differ from the mesh's settings, each kind once for all nodes: after a setting was changed that is
    as it should be."""
    return grouped(
        Remark(subject=name, text=error)
        for name in names
        if name in statuses
        for error in statuses[name].errors
        if about_flag(error)
    )


def unanswered_pairs(statuses: Mapping[str, StatusRecord], topology: Topology) -> dict[frozenset[str], set[str]]:
    """Two nodes between which WireGuard's packets get no answer -> those of the two that report it. An agent that is
    gone is named for that."""
    nodes = topology.snapshot.nodes
    senders: dict[frozenset[str], set[str]] = {}
    for name in statuses.keys() & nodes.keys():
        for other in statuses[name].unanswered:
            if other != name and other in statuses and other in nodes:
                senders.setdefault(frozenset((name, other)), set()).add(name)
    return senders


def unanswered(
    senders: Mapping[frozenset[str], Collection[str]], about: Collection[str] | None = None
) -> Iterator[Remark]:
    """On the nodes of `unanswered_pairs`: one remark for all that a node has in common; with `about` one for each pair
    of each of these nodes."""
    if not senders:
        return
    from kilo_etcd.ctl.reports.arrivals import by_host

    hosts = list(by_host(senders))
    if about is not None:
        both = ((name, next(iter(pair - {name}))) for pair in sorted(senders, key=sorted) for name in sorted(pair))
        hosts = [(name, [other]) for name, other in both if name in about]
    for host, others in hosts:
        sending = sorted(set().union(*(senders[frozenset((host, other))] for other in others)))
        yield Remark(
            subject=host,
            text=f"WireGuard's packets between it and {first_of(others, MOST_SUBJECTS)} are not answered (sent by "
            f"{first_of(sending, MOST_SUBJECTS)}): a firewall may drop them (kgctl check), or the sender's clock went "
            "back (timedatectl there), so that the other end drops its handshakes as replays until it makes it a new "
            "peer: agents do so by themselves within 3 min, if its clock goes back seldom",
        )


def _unanswered_peers(
    names: Collection[str], statuses: Mapping[str, StatusRecord], topology: Topology
) -> Iterator[Remark]:
    """On outside peers that do not answer: one remark for all of them."""
    reporting = [name for name in names if name in statuses]
    silent = sorted({peer for name in reporting for peer in statuses[name].unanswered_peers if peer in topology.peers})
    if silent:
        yield Remark(
            subject=first_of(silent, MOST_SUBJECTS),
            text="packets are sent to it, and it does not answer: does the device sleep? else connect it anew",
        )


def _unreached_through(topology: Topology) -> Iterator[Remark]:
    from kilo_etcd.ctl.reports.probed import unreached_through

    return unreached_through(topology)


def _one_sided(
    topology: Topology, statuses: Mapping[str, StatusRecord], about: Collection[str] | None
) -> Iterator[Remark]:
    if topology.internal_ips is not InternalIPs.ENCRYPTED or not any(status.clear for status in statuses.values()):
        return
    from kilo_etcd.ctl.reports.one_sided import one_sided

    for mismatch in one_sided(topology, statuses, about):
        yield Remark(subject=mismatch.subject, text=mismatch.text, about=mismatch.others[0])


def _endpoints_in_clear(topology: Topology, names: Collection[str]) -> Iterator[Remark]:
    """Under `encrypted`, endpoints that stay in clear: one remark for all of them."""
    if topology.internal_ips is not InternalIPs.ENCRYPTED:
        return
    from kilo_etcd.topology.inclear import endpoints_in_clear

    endpoints = sorted(
        {f"{node.name} {address}" for node, address in endpoints_in_clear(topology) if node.name in names}
    )
    if endpoints:
        yield Remark(
            subject="internal-ips",
            text="packets to and from the endpoints of nodes in locations with several members stay in clear, and "
            f"these nodes refuse no clear text of that family: {first_of(endpoints, MOST_SUBJECTS)}; granularity full "
            "encrypts them",
        )


def unrouted_remarks(topology: Topology) -> Iterator[UnroutedRemark]:
    """Which internal IPs are not routed although the setting asks for it, and why."""
    if (text := waiting(topology)) is not None:
        yield UnroutedRemark(subject="internal-ips", text=text)
    for unrouted in topology.unrouted:
        yield UnroutedRemark(
            subject=subject_of(unrouted),
            text=f"{unrouted.reason}; {unrouted.remedy}",
            nodes=unrouted.nodes,
            not_from=unrouted.not_from,
            outliers=unrouted.outliers,
        )


def subject_of(unrouted: Unrouted) -> str:
    """The address, or the network."""
    return str(unrouted.network.network_address) if unrouted.network.num_addresses == 1 else str(unrouted.network)


def _cut_off(topology: Topology, live: Live) -> Iterator[Remark]:
    """The tunnels without a session, if nothing goes past them."""
    if topology.internal_ips is not InternalIPs.ENCRYPTED:
        return
    from kilo_etcd.ctl.reports.live import pairs, tunnels

    down = [pair for pair in pairs(topology, tunnels(topology, live)) if pair.up is False]
    for pair in down[:MOST_SUBJECTS]:
        yield Remark(subject=f"{pair.one} - {pair.other}", text=f"no tunnel between them ({pair.last}): {DROPPED}")
    if (more := len(down) - MOST_SUBJECTS) > 0:
        yield Remark(subject="tunnels", text=f"{more} more have no session: {DROPPED}")


def grouped(remarks: Iterable[Remark]) -> tuple[Remark, ...]:
    """Remarks that say the same of several subjects as one."""
    subjects: dict[tuple[str, str], list[str]] = {}
    for remark in remarks:
        subjects.setdefault((remark.text, remark.about), []).append(remark.subject)
    return tuple(
        Remark(subject=first_of(names, MOST_SUBJECTS), text=text, about=about)
        for (text, about), names in subjects.items()
    )


def grouped_unrouted(remarks: Iterable[UnroutedRemark]) -> tuple[UnroutedRemark, ...]:
    """Remarks that say the same of several subjects as one: in a full mesh on one LAN there is one for each node. The
    subjects name the nodes."""
    alike: dict[tuple[str, tuple[str, ...]], list[UnroutedRemark]] = {}
    for remark in remarks:
        alike.setdefault((remark.text, remark.not_from), []).append(remark)
    return tuple(
        UnroutedRemark(
            subject=first_of([remark.subject_with_nodes for remark in group], MOST_SUBJECTS),
            text=text,
            nodes=tuple(dict.fromkeys(name for remark in group for name in remark.nodes)),
            not_from=not_from,
            outliers=tuple(dict.fromkeys(name for remark in group for name in remark.outliers)),
        )
        for (text, not_from), group in alike.items()
    )


def unrouted_sentence(remark: UnroutedRemark) -> str:
    """The remark with where it is from, for text without columns."""
    about_the_setting = not (remark.nodes or remark.not_from)
    return remark.text if about_the_setting else f"not routed from {remark.nowhere}: {remark.text}"


def _live_report(topology: Topology, live: Live) -> LiveReport:
    from kilo_etcd.ctl.reports.live import pairs, tunnels

    by_leader = tunnels(topology, live)
    answered = [pair for pair in pairs(topology, by_leader) if pair.ends]
    return LiveReport(
        kernels=tuple(
            KernelRow(
                name=name,
                backend=answer.backend,
                mtu=answer.mtu,
                tunnels=by_leader.get(name, ()),
                undone=answer.undone,
                changes=answer.changes,
                trouble=answer.trouble,
            )
            for name, answer in sorted(live.answers.items())
        ),
        silent=live.silent,
        refused=live.refused or None,
        tunnels=len(answered),
        up=sum(pair.up is True for pair in answered),
    )


def remarks_on(report: Report, names: Collection[str]) -> tuple[tuple[str, str], ...]:
    """(name, sentence) for everything that the report has to say against the named nodes."""
    silent = [(row.name, "its agent does not report: is the host up?") for row in report.nodes if not row.alive]
    reported = [(r.about or r.subject, r.text) for r in (*report.disagreements, *report.errors, *report.problems)]
    return tuple(dict.fromkeys(pair for pair in (*silent, *reported) if pair[0] in names))


def _node_row(name: str, topology: Topology, status: StatusRecord | None, newest: int, registered: bool) -> NodeRow:
    node = topology.snapshot.nodes.get(name)
    revision = status.revision if status is not None else None
    return NodeRow(
        name=name,
        location=node.location if node is not None else None,
        mesh_addresses=tuple(map(str, node.mesh_addresses)) if node is not None else (),
        internal_ips=tuple(map(str, node.internal_ips)) if node is not None else (),
        endpoint=str(node.endpoint) if node is not None and node.endpoint is not None else None,
        observed_endpoints=tuple(map(str, node.observed_endpoints)) if node is not None else (),
        role=_role(node, topology) if node is not None else NOT_IN_FORCE if registered else UNREGISTERED,
        alive=status is not None,
        revision=revision,
        # An agent that has just listed may be ahead of the newest record.
        behind=max(0, newest - revision) if revision is not None else None,
        version=status.version if status is not None else "",
    )


def _role(node: Node, topology: Topology) -> str:
    segment = topology.segment_of(node.name)
    if len(segment.members) == 1:
        return "alone"
    return "leader" if segment.leader.name == node.name else "member"


def _location_rows(topology: Topology, statuses: Mapping[str, StatusRecord]) -> tuple[LocationRow, ...]:
    rows: list[LocationRow] = []
    alone: dict[str, list[str]] = {}
    for segment in topology.segments.values():
        if len(segment.members) > 1:
            rows.append(_segment_row(segment, topology.snapshot, statuses.get(segment.leader.name)))
        else:
            alone.setdefault(segment.location, []).append(segment.leader.name)
    rows.extend(
        LocationRow(location=location, nodes=tuple(sorted(names)), leader=names[0] if len(names) == 1 else None)
        for location, names in alone.items()
    )
    return tuple(sorted(rows, key=lambda row: (row.location, row.nodes)))


def _segment_row(segment: Segment, snapshot: Snapshot, leader: StatusRecord | None) -> LocationRow:
    members = {node.name for node in segment.members}
    standing: dict[str, Candidate] = {}
    for candidate in sorted(snapshot.candidates.get(segment.location, ()), key=lambda c: (c.rank, c.create_revision)):
        if candidate.node in members:
            standing.setdefault(candidate.node, candidate)
    leads = leader is not None and (leader.role, leader.location) == (Role.LEADER, segment.location)
    return LocationRow(
        location=segment.location,
        nodes=tuple(sorted(members)),
        leader=segment.leader.name,
        since=(leader.leads_since or None) if leader is not None and leads else None,
        reason=_reason(segment, snapshot),
        next_in_line=segment.next_in_line,
        candidates=tuple(standing),
    )


def _reason(segment: Segment, snapshot: Snapshot) -> str:
    demoted = segment.election.demoted
    if demoted is None:
        return segment.election.reason.value
    return f"{demoted} does not forward: {sentence(demoted, snapshot.probe_reports.get(segment.location, ()))}"


def unsigned(
    names: Iterable[str], statuses: Mapping[str, StatusRecord], topology: Topology
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """The hosts, of those named, to which something answers at the internal IP of another member that does not
    authenticate as this one, although its agent would; each with that member."""
    nodes = topology.snapshot.nodes
    for name in names:
        for other in statuses[name].unsigned if name in statuses and name in nodes else ():
            status = statuses.get(other)
            # Who queries at another port than the other one takes gets no answer, and is named for that.
            ports = {None if s is None else s.peer_query_port for s in (status, statuses[name])}
            if other in nodes and status is not None and status.answers and len(ports) == 1:
                yield name, other


def _unsigned(
    names: Iterable[str], statuses: Mapping[str, StatusRecord], topology: Topology, *, separately: bool
) -> Iterator[UnsignedRemark]:
    """A firewall may drop the peer queries of a whole location: several pairs are one remark for each location, unless
    `separately` is given."""
    nodes = topology.snapshot.nodes
    pairs: dict[str, list[tuple[str, str]]] = {}
    for pair in unsigned(names, statuses, topology):
        pairs.setdefault(nodes[pair[1]].location, []).append(pair)
    for location, result in sorted(pairs.items()):
        if separately or len(result) == 1:
            for name, other in result:
                addresses = " and ".join(str(internal_ip.ip) for internal_ip in nodes[other].internal_ips)
                yield UnsignedRemark(
                    subject=name,
                    pairs=((name, other),),
                    text=f"something answers it at {addresses}, the internal IP of {other}, but not with {other}'s "
                    "key: a firewall drops UDP 1107 (--peer-query-port) between the two, or that is another host's "
                    f"network; if so, label them apart (kgctl location set {other} NAME)",
                )
            continue
        answering = sorted({other for _, other in result})
        first = first_of([f"{name} asks {other}" for name, other in result], MOST_SUBJECTS)
        yield UnsignedRemark(
            pairs=tuple(result),
            subject=f"location {location}" if location else "the default location",
            text=f"something answers at the internal IPs of {first_of(answering, MOST_SUBJECTS)}, but not with their "
            f"keys, in {len(result)} cases ({first}): a firewall drops UDP 1107 (--peer-query-port) between these "
            "hosts, or these are other hosts' networks; if so, label them apart (kgctl location set NODE NAME)",
        )


def _disagreements(name: str, status: StatusRecord, topology: Topology, newest: int) -> list[str]:
    result = []
    if status.revision < newest:
        result.append(f"it has applied revision {status.revision}, {newest - status.revision} behind {newest}")
    return [*result, *contradictions(name, status, topology)]


def _other_ports(names: Sequence[str], statuses: Mapping[str, StatusRecord]) -> Iterator[Remark]:
    """The agents that take peer queries at another port than most, so that others query them in vain."""
    ports = {name: status.peer_query_port or PEER_QUERY_PORT for name, status in statuses.items()}
    if len(number := Counter(ports.values())) < 2:
        return
    usual = max(number, key=lambda port: (number[port], port == PEER_QUERY_PORT, -port))
    for name in names:
        if (port := ports.get(name, usual)) != usual:
            yield Remark(
                subject=name,
                text=f"it takes peer queries at UDP {port} and most others at {usual}, so they query each other in "
                "vain while etcd is away: give all agents the same --peer-query-port",
            )


def contradictions(name: str, status: StatusRecord, topology: Topology) -> list[str]:
    """In what an agent differs from etcd so that packets may go astray, in sentences that begin with "it"."""
    node = topology.snapshot.nodes.get(name)
    result = []
    if node is not None:
        if status.public_key and status.public_key != node.public_key:
            result.append("it reports another public key than the one registered: are there two hosts of this name?")
        segment = topology.segment_of(name)
        if len(segment.members) > 1 and status.leader != segment.leader.name:
            takes = f"takes {status.leader} for its leader" if status.leader else "sees no leader"
            result.append(f"it {takes}, but by etcd's records {segment.leader.name} leads")
    return result
