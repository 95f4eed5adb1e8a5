"""`kgctl check`: the doctor. It looks at etcd, at what etcd holds, and at what the living agents say of their hosts.

Each finding says what is wrong and what to do about it. What agents and the topology have to say brings its remedy
along in its own sentence. `findings` is pure; `examine` gathers what it needs.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from functools import partial

import click
from attrs import asdict, evolve, field, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.context import Mesh
from kilo_etcd.ctl.output import output_option
from kilo_etcd.ctl.reports.arrivals import (
    PAIRS,
    SHOWN,
    TRIES,
    by_host,
    end_of,
    losses,
    lost_across,
    lost_pairs,
    reached_by,
    some,
)
from kilo_etcd.ctl.reports.causes import Silence, causes, silence
from kilo_etcd.ctl.reports.evidence import Evidence, evidence, shown
from kilo_etcd.ctl.reports.exemptions import exemptions
from kilo_etcd.ctl.reports.internal_arrivals import internal_losses
from kilo_etcd.ctl.reports.live import Live, Pair, differs, gather, pairs, tunnels
from kilo_etcd.ctl.reports.lossy import limited, unsteady
from kilo_etcd.ctl.reports.narrow import narrow
from kilo_etcd.ctl.reports.one_sided import echo_refused
from kilo_etcd.ctl.reports.probed import unreached_through
from kilo_etcd.ctl.reports.render import clean
from kilo_etcd.ctl.reports.report import (
    DROPPED,
    NOT_IN_FORCE,
    Remark,
    Report,
    UnroutedRemark,
    UnsignedRemark,
    claims_without_record,
    grouped,
    grouped_unrouted,
    newest_revision,
    registered_names,
    report,
    set_without_record,
    subject_of,
    unanswered,
    unanswered_pairs,
    unrouted_sentence,
)
from kilo_etcd.ctl.reports.trace import Plans
from kilo_etcd.ctl.trust import distrust
from kilo_etcd.etcd.api import Client, Config, EtcdError, Unavailable
from kilo_etcd.etcd.endpoint import parse_endpoint
from kilo_etcd.model import InternalIPs, IPNetwork
from kilo_etcd.planning.exit_node import BYPASSES
from kilo_etcd.runtime.etcd_members import Usable, usable
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import StatusRecord
from kilo_etcd.store.status_texts import CANNOT_PING
from kilo_etcd.topology.forced_addresses import missing_in
from kilo_etcd.topology.nat import REMEDY, hidden_pair
from kilo_etcd.topology.segments import Topology, build_topology
from kilo_etcd.topology.unrouted import named

CLOCK_SECONDS = 5.0
"""Clocks that differ by more make logs and certificates hard to trust; the mesh itself does not need them."""

SLOW_SECONDS = 0.5
"""etcd promises a lease's keepalive every second or so; from here on it is in danger."""

DEFAULT_QUOTA = 2 << 30
"""Bytes of etcd's database: the default of its --quota-backend-bytes. etcd does not say what its quota is."""

MANY_REVISIONS = 10_000
"""As long as etcd has had fewer, some megabytes, nobody need have it forget any."""

MOST_CLAIMS = 4
"""A host has one claim for each family, and one more while it is renumbered."""

MOST_NAMED = 20
"""Records that are named where there is something wrong with very many; the others are counted."""


_LOSSY = (
    "some packets between it and others get lost (see there), perhaps also those between its agent and etcd: mend that "
    "first, then look at systemctl status kilo-etcd there"
)
"""The remedy for an agent that answers late or not at all, if some packets to or from its host get lost."""


_ANOTHER_EXIT_NODE = (
    "kgctl annotate NODE exit-node=ANOTHER, or exit-node- (its own network), for each node that leaves by it; "
)


class Severity(StrEnum):
    """How bad a finding of `kgctl check` is, the worst first."""

    ERROR = "error"
    """Somebody is not connected, or may soon not be."""
    WARNING = "warning"
    """Worth a look today."""
    NOTE = "note"
    """Good to know; it makes no difference to the exit status."""


@frozen(kw_only=True)
class Finding:
    """`remedy` is empty where `text` says already what to do."""

    severity: Severity
    subject: str
    text: str
    remedy: str = ""


@frozen(kw_only=True)
class MemberState:
    """What one endpoint of etcd has answered. `error`: why it has not."""

    endpoint: str
    error: str = ""
    cluster_id: int = 0
    has_leader: bool = True
    seconds: float = 0.0
    former: bool = False
    """It is given, and no member of etcd has it among its client URLs."""
    errors: tuple[str, ...] = ()
    """What the member itself says is wrong, such as NOSPACE."""
    db_in_use: int = 0
    """Bytes of its database that hold something; what else its file has is filled before it grows."""


@frozen(kw_only=True)
class Examined:
    """All that was found out."""

    members: tuple[MemberState, ...]
    uncompacted: int = 0
    """How many revisions etcd keeps, if these are many and all that it ever had; else 0."""
    report: Report
    topology: Topology
    statuses: Mapping[str, StatusRecord] = field(factory=dict)
    live: Live = field(factory=Live)
    claims: Mapping[str, int] = field(factory=dict)
    """Names without a record -> how many mesh addresses they claim."""
    settings: tuple[str, ...] = ()
    """Names without a record that have a label or annotations."""
    led_anew: frozenset[str] = frozenset()
    """Nodes that have another leader than before the agents were asked: by whom their packets went is not known."""


def findings(examined: Examined) -> tuple[Finding, ...]:
    """The findings, the worst first."""
    order = list(Severity)
    untried = tuple(_untried(examined))
    dead = {row.name for row in examined.report.nodes if not row.alive}
    places = evidence(examined.topology, examined.statuses, examined.live, dead)
    live = places.live
    examined = evolve(examined, live=live)
    silences = silence(examined.topology, examined.statuses, live)
    # Each place has one finding.
    silences = evolve(silences, rerouted=frozenset(pair for pair in silences.rerouted if not places.astray(*pair)))
    packets = (*_packets(examined, silences, places), *untried)
    wrong = [finding for finding in packets if finding.severity is Severity.ERROR]
    # If an error names a leader already, the probers' report of that leader would only repeat it.
    reported = unreached_through(examined.topology)
    repeated = [remark for remark in reported if any(_names(finding, remark.about) for finding in wrong)]
    silent = unanswered_pairs(examined.statuses, examined.topology)
    unexplained = {
        pair: senders
        for pair, senders in silent.items()
        if not any(all(_names(finding, name) for name in pair) for finding in wrong)
    }
    repeated += unanswered(silent)
    unsorted = (
        *_etcd(examined.members, examined.uncompacted),
        *_agents(
            examined.report,
            silences,
            reached_by(examined.topology, live),
            places,
            {name: answer.trouble for name, answer in live.answers.items()},
        ),
        *_mode(examined.report),
        *_records(examined.report, frozenset(repeated), tuple(unanswered(unexplained))),
        *_unrouted(examined),
        *_claims(examined.claims),
        *_settings(examined.settings),
        *_hosts(examined, places, wrong),
        *packets,
    )
    return tuple(sorted(dict.fromkeys(unsorted), key=lambda f: (order.index(f.severity), f.subject, f.text)))


def _names(finding: Finding, name: str) -> bool:
    """Whether a finding speaks of a node."""
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", f"{finding.subject} {finding.text}") is not None


def _etcd(members: tuple[MemberState, ...], uncompacted: int = 0) -> Iterator[Finding]:
    for member in members:
        subject = f"etcd {member.endpoint}"
        if member.error and member.former:
            yield Finding(
                severity=Severity.NOTE, subject=subject, text=member.error,
                remedy="etcd's members are reached elsewhere: leave it out of --endpoints",
            )  # fmt: skip
            continue
        if member.error:
            yield Finding(
                severity=Severity.ERROR, subject=subject, text=member.error,
                remedy="start it (systemctl status etcd there), or leave it out of --endpoints",
            )  # fmt: skip
            continue
        if not member.has_leader:
            yield Finding(
                severity=Severity.ERROR, subject=subject, text="it has no leader, so nothing can be written",
                remedy="bring a majority of the cluster's members back",
            )  # fmt: skip
        for error in member.errors:
            yield Finding(
                severity=Severity.ERROR, subject=subject, text=f"it raises an alarm: {error}",
                remedy="etcdctl alarm list; if space is lacking: compact, defragment, then etcdctl alarm disarm",
            )  # fmt: skip
        if member.seconds > SLOW_SECONDS:
            yield Finding(
                severity=Severity.WARNING, subject=subject, text=f"it took {member.seconds:.1f} s to answer",
                remedy="look at its disk and its network",
            )  # fmt: skip
        if member.db_in_use >= DEFAULT_QUOTA / 2 and not member.errors:
            yield Finding(
                severity=Severity.NOTE, subject=subject,
                text=f"{member.db_in_use >> 20:,} MiB of its database are in use; it takes no writes from its quota "
                     f"on, {DEFAULT_QUOTA >> 20:,} MiB unless --quota-backend-bytes says otherwise",
                remedy="etcdctl compact REVISION, then etcdctl defrag; or start etcd with a larger quota",
            )  # fmt: skip
    clusters = Counter(member.cluster_id for member in members if not member.error)
    if len(clusters) > 1:
        yield Finding(
            severity=Severity.ERROR, subject="etcd", text="the endpoints belong to different clusters",
            remedy="give the endpoints of one cluster; agents that use both see two meshes",
        )  # fmt: skip
    if uncompacted:
        yield Finding(
            severity=Severity.NOTE, subject="etcd",
            text=f"it has not compacted any of its {uncompacted:,} revisions yet; if it never does, its database grows "
                 "with every write until its quota is full",
            remedy="unless --auto-compaction-retention is set already, start etcd with "
                   "--auto-compaction-retention=1 (hours)",
        )  # fmt: skip


def _agents(
    report: Report,
    silence: Silence | None = None,
    reached: Mapping[str, Sequence[str]] | None = None,
    places: Evidence | None = None,
    troubles: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Finding]:
    """`reached`: node -> the hosts whose echo requests it answers; `troubles`: node -> what its agent has answered
    that is wrong."""
    if not report.nodes:
        yield Finding(
            severity=Severity.WARNING, subject="mesh", text="no node has registered under this prefix",
            remedy="is it the right --prefix, and the right etcd? else start an agent: systemctl start kilo-etcd",
        )  # fmt: skip
    for row in report.nodes:
        if row.role == NOT_IN_FORCE and row.alive:
            yield Finding(
                severity=Severity.ERROR, subject=row.name, text="its agent lives, but the node is no part of the mesh",
                remedy=f"journalctl -u kilo-etcd there; kgctl node show {row.name}",
            )  # fmt: skip
        if not row.alive:
            if row.role == NOT_IN_FORCE:
                yield Finding(
                    severity=Severity.WARNING, subject=row.name,
                    text="its agent does not report, and the node is no part of the mesh",
                    remedy=f"kgctl node show {row.name}; gone for good, or never there: kgctl node forget {row.name}",
                )  # fmt: skip
                continue
            tried = () if places is None else places.unresponsive.get(row.name, ())
            if askers := (reached or {}).get(row.name):
                # A host that reaches nobody may be the reason itself.
                lost = () if places is None else sorted((set(tried) & places.passing) - set(askers))
                yield Finding(
                    severity=Severity.ERROR if lost else Severity.WARNING, subject=row.name,
                    text=f"its agent does not report; the host answers echo requests of {first_of(askers, SHOWN)}, and "
                         f"none of {first_of(lost, SHOWN)}" if lost
                         else f"its agent does not report, although the host answers echo requests of "
                              f"{first_of(askers, SHOWN)}; its place in the mesh is kept",
                    remedy=_LOSSY if places is not None and row.name in places.in_part.hosts else
                           "systemctl status kilo-etcd there: it is stopped, does not reach etcd (look at ip route get "
                           "ADDRESS-OF-ETCD, a firewall, name lookup), or has another name now (then: kgctl node "
                           f"forget {row.name})",
                )  # fmt: skip
                continue
            gone = places is not None and row.name in places.gone
            leads = gone and places is not None and _leads_location(places.topology, row.name)
            cut_off = "" if places is None else _cut_off_by_exit_node(places, row.name)
            yield Finding(
                severity=Severity.ERROR if leads or cut_off else Severity.WARNING, subject=row.name,
                text=(f"its agent does not report, and it leads its location, through which nothing arrives (tried by "
                     f"{first_of(tried, SHOWN)})" if leads
                     else "its agent does not report" + (
                         f", and the host answers no echo request (tried by {first_of(tried, SHOWN)})" if tried else ""
                     ) + "; its place in the mesh is kept") + cut_off,
                remedy=_ANOTHER_EXIT_NODE * bool(cut_off)
                       + "is the host up? has it a default route and a way to etcd (ip route, ip neigh)? does its "
                       "firewall drop what comes in (nft list ruleset)? systemctl status kilo-etcd there; gone for "
                       f"good: kgctl node forget {row.name}",
            )  # fmt: skip
    for remark in report.disagreements:
        if silence is not None and isinstance(remark, UnsignedRemark) and silence.covers_unsigned(remark.pairs):
            continue
        yield Finding(severity=Severity.WARNING, subject=remark.subject, text=remark.text)
    # What `silence` covers `_packets` tells, once for all of them.
    errors = [error for error in report.errors if silence is None or not silence.covers(error.subject, error.text)]
    if places is not None:
        errors = [error for error in errors if not places.explains_error(error.subject, error.text)]
    errors += (Remark(subject=name, text=text) for name, texts in sorted((troubles or {}).items()) for text in texts)
    for remark in grouped(_distinct(errors)):
        yield Finding(severity=Severity.ERROR, subject=remark.subject, text=remark.text)
    versions = Counter(row.version for row in report.nodes if row.version)
    if len(versions) > 1:
        listed = ", ".join(f"{version} on {number}" for version, number in sorted(versions.items()))
        yield Finding(
            severity=Severity.NOTE, subject="agents", text=f"different versions run: {listed}",
            remedy="upgrade the older ones when it suits",
        )  # fmt: skip


def _cut_off_by_exit_node(places: Evidence, name: str) -> str:
    """Which nodes have no internet because they leave by a node at which nothing arrives, as the end of a sentence;
    empty: none."""
    nodes = places.topology.snapshot.nodes
    users = sorted(user for user, node in nodes.items() if node.exit_node == name and user not in places.unresponsive)
    if not users or name not in places.gone:
        return ""
    leave = "leaves" if len(users) == 1 else "leave"
    return f"; {some(users)} {leave} for the internet by it, so from there nothing gets out but for {BYPASSES}"


def _leads_location(topology: Topology, name: str) -> bool:
    """Whether a node leads a location, and is not a segment of its own by the mesh's granularity or for want of an
    internal IP."""
    shares = topology.policy.leader_per_location and bool(topology.snapshot.nodes[name].internal_ips)
    return shares and end_of(topology, name) == name


def _distinct(errors: Iterable[Remark]) -> tuple[Remark, ...]:
    """The errors, each once: an agent's status and its answer may name one error, in two sentences if it is about a
    sysctl that the agent cannot set. Such sentences begin with the sysctl."""
    result: dict[tuple[str, str], Remark] = {}
    for remark in errors:
        first = remark.text.split(" ", 1)[0]
        result.setdefault((remark.subject, first if first.startswith("net.") else remark.text), remark)
    return tuple(result.values())


def _mode(report: Report) -> Iterator[Finding]:
    for remark in report.urgent:
        # Of tunnels `_tunnel` tells, with the remedy.
        if DROPPED not in remark.text:
            yield Finding(severity=Severity.ERROR, subject=remark.subject, text=remark.text)
    if report.switch is not None:
        yield Finding(
            severity=Severity.NOTE, subject="internal-ips",
            text=f"the switch to {report.internal_ips} is under way: {report.switch}",
            remedy="journalctl -u kilo-etcd on those that it waits for; kgctl node forget those that are gone for good",
        )  # fmt: skip


def _records(
    report: Report, named_elsewhere: Collection[Remark] = (), in_their_place: Sequence[Remark] = ()
) -> Iterator[Finding]:
    """`named_elsewhere`: problems that other findings name, in whole or in part; `in_their_place`: what is left."""
    for aside in report.rejected[:MOST_NAMED]:
        if aside.in_force and aside.author:
            yield Finding(
                severity=Severity.NOTE, subject=aside.key, text=aside.reason,
                remedy=f"{aside.author} has another version of the agent: upgrade the older ones when it suits",
            )  # fmt: skip
            continue
        yield Finding(
            severity=Severity.WARNING if aside.in_force else Severity.ERROR,
            subject=aside.key, text=aside.reason if aside.in_force else f"rejected: {aside.reason}",
            remedy=f"etcdctl get {aside.key}; " + (
                f"the agent of {aside.author} writes it: is it up? systemctl status kilo-etcd there; gone for good: "
                f"etcdctl del {aside.key}" if aside.author
                else "upgrade the agents, or take the field out" if aside.in_force
                else "put it right or delete it"
            ),
        )  # fmt: skip
    if (more := len(report.rejected) - MOST_NAMED) > 0:
        yield Finding(
            severity=Severity.ERROR, subject="records", text=f"{more} more records are rejected",
            remedy="kgctl status -o json lists all under rejected; find out who writes them",
        )  # fmt: skip
    left = (problem for problem in report.problems if problem not in named_elsewhere)
    for remark in (*left, *in_their_place):
        yield Finding(severity=Severity.WARNING, subject=remark.subject, text=remark.text)
    for remark in report.notes:
        yield Finding(severity=Severity.NOTE, subject=remark.subject, text=remark.text)


def _claims(claims: Mapping[str, int]) -> Iterator[Finding]:
    """What names without a record claim, which no other host can have."""
    many = {name: number for name, number in claims.items() if number > MOST_CLAIMS}
    for name, number in sorted(many.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_NAMED]:
        yield Finding(
            severity=Severity.WARNING, subject=name,
            text=f"it claims {number} mesh addresses, which no other host can have, and no node of that name is "
                 "registered",
            remedy=f"find out who writes the keys of {name} in etcd; kgctl node forget {name} takes the claims away",
        )  # fmt: skip
    if few := sorted(claims.keys() - many.keys()):
        yield Finding(
            severity=Severity.NOTE, subject="claims",
            text=f"mesh addresses are claimed by {some(few)}, which are not registered: they are joining, or gone for "
                 "longer than --forget-after",
            remedy="gone for good: kgctl node forget NODE takes the claim away, kgctl node forget --dead-for 24h all",
        )  # fmt: skip


def _settings(names: Sequence[str]) -> Iterator[Finding]:
    """A note on labels and annotations of nodes that have not registered."""
    if names:
        yield Finding(
            severity=Severity.NOTE, subject="labels and annotations",
            text=f"{some(names)} {'has' if len(names) == 1 else 'have'} labels or annotations and no record: is the "
                 "name right? they count once a host of that name joins",
            remedy="its host has another name now: kgctl node rename NODE NEW; gone for good: kgctl node forget NODE",
        )  # fmt: skip


def _unrouted(examined: Examined) -> Iterator[Finding]:
    """A warning where a host may have its label, a route or an address by mistake. Under `encrypted` what is sent to
    such an address travels in clear, which is a warning unless the operator has exempted it on every host that sends
    there."""
    in_clear = examined.report.internal_ips_in_force == InternalIPs.ENCRYPTED
    exempted = _exempted(examined) if in_clear else frozenset()
    of: dict[Severity, list[UnroutedRemark]] = {Severity.WARNING: [], Severity.NOTE: []}
    for remark in examined.report.unrouted:
        harmless = remark.subject in exempted if in_clear else not remark.outliers
        of[Severity.NOTE if harmless else Severity.WARNING].append(remark)
    for severity, remarks in of.items():
        unrouted = grouped_unrouted(remarks)
        for remark in unrouted[:MOST_NAMED]:
            exempts = " (--clear exempts it)" if in_clear and severity is Severity.NOTE else ""
            yield Finding(severity=severity, subject=remark.subject, text=f"{unrouted_sentence(remark)}{exempts}")
        if (more := len(unrouted) - MOST_NAMED) > 0:
            yield Finding(
                severity=severity, subject="internal-ips", text=f"{more} more internal IPs are not routed",
                remedy="kgctl status -o json lists all under unrouted",
            )  # fmt: skip


def _exempted(examined: Examined) -> frozenset[str]:
    """The addresses and networks of `Topology.unrouted` to which all hosts that send there leave something in clear on
    purpose, as far as they have answered."""
    topology = examined.topology
    answers = examined.live.answers
    clear = {
        name: tuple(exemption.network for exemption in exemptions(answer.clear)) for name, answer in answers.items()
    }
    named_senders: dict[str, set[str]] = {}
    for segment in topology.segments.values():
        for node in segment.members:
            named_senders.setdefault(named(segment), set()).add(node.name)
            named_senders.setdefault(node.name, set()).add(node.name)
    result = set()
    for unrouted in topology.unrouted:
        names = unrouted.not_from or named_senders.keys()
        senders = {sender for name in names for sender in named_senders.get(name, ())}.difference(unrouted.nodes)
        if senders and all(any(_covers(network, unrouted.network) for network in clear.get(n, ())) for n in senders):
            result.add(subject_of(unrouted))
    return frozenset(result)


def _covers(network: IPNetwork, other: IPNetwork) -> bool:
    return network.version == other.version and other.subnet_of(network)  # type: ignore[arg-type]


def _hosts(examined: Examined, places: Evidence, wrong: Collection[Finding]) -> Iterator[Finding]:
    """`wrong`: errors about packets, which name what drops them already."""
    live, topology = examined.live, examined.topology
    if live.refused:
        yield Finding(
            severity=Severity.WARNING, subject="hosts", text=f"their agents could not be asked: {live.refused}",
            remedy=("ask as a user who may write below /kilo-status/ (ETCDCTL_USER; a host's own user may not), or "
                    if live.denied else "mend that and check again, or ")
                   + "look on the hosts: wg show, journalctl -u kilo-etcd",
        )  # fmt: skip
    alive = {row.name for row in examined.report.nodes if row.alive}
    for name in live.silent:
        # If only some packets get lost, others may have no answer although the host answers.
        lossy = name in places.in_part.hosts
        tried = None if lossy else places.unresponsive.get(name)
        cut_off = _cut_off_by_exit_node(places, name) if tried else ""
        if name in places.stopped or (tried and name not in alive):
            continue  # `_agents` says that.
        yield Finding(
            severity=Severity.ERROR if tried else Severity.WARNING, subject=name,
            text=f"its agent has not answered in time, and its host answers no echo request of "
                 f"{first_of(tried, SHOWN)}{cut_off}" if tried else "its agent lives, but has not answered in time",
            remedy=_ANOTHER_EXIT_NODE * bool(cut_off)
                   + "is the host up, with its default route (ip route), and its WireGuard running? systemctl status "
                   "kilo-etcd there" if tried
                   else _LOSSY if lossy
                   else "systemctl status kilo-etcd there; an agent of an older version does not answer diagnostics "
                        "requests",
        )  # fmt: skip
    for name, off in live.clocks.items():
        if abs(off) > CLOCK_SECONDS:
            yield Finding(
                severity=Severity.WARNING, subject=name,
                text=f"its clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this machine's",
                remedy="chronyc tracking or timedatectl, there and here",
            )  # fmt: skip
    for name, answer in live.answers.items():
        if answer.undone:
            yield Finding(
                severity=Severity.WARNING, subject=name,
                text=f"its kernel was {differs(answer)}",
                remedy="the agent repairs it; if it happens again: journalctl -u kilo-etcd there names the change",
            )  # fmt: skip
        yield from (Finding(severity=Severity.WARNING, subject=name, text=text) for text in answer.own_losses)
        yield from (Finding(severity=Severity.NOTE, subject=name, text=text) for text in answer.refused)
        status = examined.statuses.get(name)
        candidate = _may_lead(topology, name)
        start = (
            "it is a candidate for leader, and would not forward all packets if it led"
            if candidate
            else "it forwards for others, and perhaps not all packets"
        )
        errors = {*answer.trouble, *(status.errors if status is not None else ())}
        for text in answer.possible_obstacles if candidate else answer.untested_obstacles:
            if text not in errors and not any(text in error.remedy for error in wrong):
                yield Finding(severity=Severity.WARNING, subject=name, text=f"{start}: {text}")
    if slow := [name for name, answer in sorted(live.answers.items()) if answer.backend == "userspace"]:
        yield Finding(
            severity=Severity.NOTE, subject="agents",
            text=f"WireGuard runs in userspace, which is slower, on {some(slow)}",
            remedy="modprobe wireguard there, then restart kilo-etcd",
        )  # fmt: skip
    mtus = Counter(live.answers[name].mtu for name in live.answers if live.answers[name].mtu)
    if len(mtus) > 1:
        hosts = {mtu: f"{number} host{'' if number == 1 else 's'}" for mtu, number in mtus.items()}
        listed = ", ".join(f"{mtu} bytes on {hosts[mtu]}" for mtu in sorted(mtus))
        yield Finding(
            severity=Severity.NOTE, subject="tunnels", text=f"their MTUs differ: {listed}",
            remedy="it does no harm unless large packets are lost; if so, set the smallest on all: --mtu (KILO_MTU)",
        )  # fmt: skip


def _packets(examined: Examined, silence: Silence, places: Evidence) -> Iterator[Finding]:
    """Tunnels and packets, and members that do not answer each other: each cause once."""
    live, topology = examined.live, examined.topology
    missing = missing_in(error for status in examined.statuses.values() for error in status.errors)
    for cause in causes(topology, evolve(silence, apart=places.unexplained(silence.apart)), missing):
        yield Finding(severity=Severity.ERROR, subject=cause.subject, text=cause.text, remedy=cause.remedy)
    for loss in shown(places, missing):
        yield Finding(severity=Severity.ERROR, subject=loss.subject, text=loss.text, remedy=loss.next_steps)
    down = [
        pair for pair in pairs(topology, tunnels(topology, live))
        if pair.up is False and not places.explains_tunnel(pair.one, pair.other)
    ]  # fmt: skip
    anew = {(pair.one, pair.other) for pair in down if {pair.one, pair.other} & examined.led_anew}
    down = [pair for pair in down if (pair.one, pair.other) not in anew]
    early = {pair for pair in down if pair.handshake is None and silence.young & {pair.one, pair.other}}
    yield from _tunnels(topology, [pair for pair in down if pair not in early])
    unsettled = silence.undecided | {frozenset((pair.one, pair.other)) for pair in early}
    moved = {pair for pair in lost_pairs(topology, live) if examined.led_anew.intersection(pair)}
    for subject, symptom, between in (
        ("packets", "do not arrive", moved),
        ("tunnels", "have no session", anew - moved),
    ):
        if between:
            yield Finding(
                severity=Severity.WARNING, subject=subject,
                text=f"it is too early to tell why some {symptom}, between "
                     f"{some(f'{one} and {other}' for one, other in sorted(between))}: their leader has just changed",
                remedy="ask again in ten seconds: kgctl check",
            )  # fmt: skip
    if lost := sorted({*lost_across(topology, live, unsettled), *((pair.one, pair.other) for pair in early)}):
        yield Finding(
            severity=Severity.WARNING, subject="packets",
            text=f"some are lost between {some(f'{a} and {b}' for a, b in lost)}, and it is too early to tell why: the "
                 "agents have just begun to ask each other",
            remedy="ask again in ten seconds: kgctl check",
        )  # fmt: skip
    ends = [frozenset((pair.one, pair.other)) for pair in down]
    apart = {*silence.apart, *unsettled}
    refused = partial(echo_refused, Plans(topology, examined.statuses))

    def led_anew(one: str, other: str) -> bool:
        return not examined.led_anew.isdisjoint((one, other))

    for loss in losses(
        topology, live, ends, apart=apart, queries_answered=silence.queries_answered,
        explained=lambda one, other: led_anew(one, other) or places.explains(one, other),
    ):  # fmt: skip
        yield Finding(
            severity=Severity.WARNING if loss.filtered else Severity.ERROR, subject=loss.subject, text=loss.text,
            remedy=loss.next_steps,
        )  # fmt: skip
    for loss in internal_losses(
        topology, live, places, apart, missing=missing,
        explained=lambda one, other: led_anew(one, other) or refused(one, other),
    ):  # fmt: skip
        yield Finding(severity=Severity.ERROR, subject=loss.subject, text=loss.text, remedy=loss.next_steps)
    for severity, milder in (
        (Severity.WARNING, (*unsteady(topology, places.in_part), *narrow(topology, live))),
        (Severity.NOTE, limited(places.in_part)),
    ):
        for loss in milder:
            yield Finding(severity=severity, subject=loss.subject, text=loss.text, remedy=loss.remedy)


def _untried(examined: Examined) -> Iterator[Finding]:
    """Who has not sent echo requests: those that say themselves that they cannot, and the others."""
    live, statuses, nodes = examined.live, examined.statuses, examined.topology.snapshot.nodes
    if len(nodes) < 2:
        return
    without = {
        name for name, answer in live.answers.items() if name in nodes and not (answer.reached or answer.unreached)
    }
    says = {
        name: (*live.answers[name].trouble, *(statuses[name].errors if name in statuses else ())) for name in without
    }
    unable = {name for name in without if any(text.startswith(CANNOT_PING) for text in says[name])}
    if unable:
        yield Finding(
            severity=Severity.NOTE, subject="packets",
            text=f"{some(sorted(unable))} cannot ping, so it is not known whether packets from there arrive",
            remedy="the error of each host says what to set there",
        )  # fmt: skip
    # A host with an error may have sent none because of it.
    if others := {name for name in without - unable if not says[name]}:
        yield Finding(
            severity=Severity.NOTE, subject="packets", text=f"{some(sorted(others))} sent no echo requests",
            remedy="agents of older versions send none when they are asked; upgrade them when it suits",
        )  # fmt: skip


def _may_lead(topology: Topology, name: str) -> bool:
    """Whether a node does not lead, and stands for it."""
    if name not in topology.snapshot.nodes:
        return False
    segment = topology.segment_of(name)
    return segment.leader.name != name and name in segment.election.order


def _tunnels(topology: Topology, down: Iterable[Pair]) -> Iterator[Finding]:
    """The tunnels without a session. One error for all tunnels of a host, but one for each pair that a NAT keeps
    apart."""
    nodes = topology.snapshot.nodes
    dropped = f"; {DROPPED}" if topology.internal_ips is InternalIPs.ENCRYPTED else ""
    remaining: dict[frozenset[str], Pair] = {}
    for pair in down:
        if hidden_pair(nodes[pair.one], nodes[pair.other]) is None:
            remaining[frozenset((pair.one, pair.other))] = pair
        else:
            yield Finding(
                severity=Severity.ERROR, subject=f"{pair.one} - {pair.other}",
                text=f"no tunnel between them: {pair.last}{dropped}",
                remedy=f"{REMEDY}; kgctl status says what their hosts know of it",
            )  # fmt: skip
    alike: dict[str, list[frozenset[str]]] = {}
    for names, pair in remaining.items():
        # A sentence about several tunnels must be true of each.
        alike.setdefault("never" if pair.handshake is None else "once", []).append(names)
    hosts = [(host, others) for pairs in alike.values() for host, others in by_host(pairs)]
    for host, others in hosts[:PAIRS]:
        ends = [nodes[name] for name in (host, others[0])]
        if len(others) == 1:
            ends.sort(key=lambda node: node.name)
        ports = " and ".join(f"UDP {node.endpoint} to {node.name}" for node in ends if node.endpoint is not None)
        last = min((remaining[frozenset((host, other))] for other in others), key=_age).last
        yield Finding(
            severity=Severity.ERROR, subject=host if len(others) > 1 else " - ".join(node.name for node in ends),
            text=f"no tunnel between it and {some(others)}: {'the ' if last.startswith('last') else ''}{last}{dropped}"
                 if len(others) > 1
                 else f"no tunnel between them: {last}{dropped}",
            remedy=f"let {ports or 'UDP 51820'} pass, on the way and through the firewalls of both ends; kgctl explain "
                   f"{ends[0].name} {ends[1].name} --live",
        )  # fmt: skip
    if more := hosts[PAIRS:]:
        number = sum(len(others) for _, others in more)
        yield Finding(
            severity=Severity.ERROR, subject="tunnels",
            text=f"{number} more {'has' if number == 1 else 'have'} no session, of {some(host for host, _ in more)}",
            remedy="mend what is named first, then ask again",
        )  # fmt: skip


def _age(pair: Pair) -> float:
    """Seconds since the last handshake."""
    return float("inf") if pair.handshake is None else pair.handshake


_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow"}


def _coloured(severity: Severity) -> str:
    # click itself takes colours out where there is no terminal; NO_COLOR it does not know.
    plain = severity not in _COLOURS or os.environ.get("NO_COLOR")
    return str(severity) if plain else click.style(severity, fg=_COLOURS[severity])


@click.command("check", epilog="Example:\n\n\b\n  kgctl check || mail -s 'the mesh' admin")
@output_option
@click.pass_obj
def check_command(mesh: Mesh, output: str) -> None:
    """Find everything that is wrong, and say what to do about it.

    The living agents are asked what their hosts have, and to send packets to each other. Exit status 1: there are
    errors or warnings.
    """
    findings = mesh_findings(mesh)
    counts = Counter(finding.severity for finding in findings)
    if output == "json":
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        for finding in bounded(findings):
            click.echo(f"{_coloured(finding.severity)}: "
                       f"{clean(finding.subject)}: {clean(finding.text)}")  # fmt: skip
            if finding.remedy:
                click.echo(f"    {clean(finding.remedy)}")
        totals = [f"{counts[kind]} {kind}{'' if counts[kind] == 1 else 's'}" for kind in Severity if counts[kind]]
        click.echo(", ".join(totals) if totals else "All is well: etcd, records, agents, kernels, tunnels and packets.")
    if counts[Severity.ERROR] or counts[Severity.WARNING]:
        raise SystemExit(1)


def bounded(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings for people: of those that say the same of many subjects the first, and how many more."""
    kinds: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.severity, finding.text), []).append(finding)
    for (severity, text), alike in kinds.items():
        yield from alike[:MOST_NAMED]
        if (more := len(alike) - MOST_NAMED) > 0:
            yield Finding(
                severity=severity, subject=f"{more} more", text=text, remedy="kgctl check -o json lists all"
            )  # fmt: skip


def mesh_findings(mesh: Mesh) -> tuple[Finding, ...]:
    """What `kgctl check` finds. Failure: etcd cannot be asked at all."""
    remarks: list[str] = []
    of_mesh = findings(mesh.ask(lambda client, keys: examine(client, keys, mesh.etcd), on_remark=remarks.append))
    return (*of_mesh, *(Finding(severity=Severity.NOTE, subject="etcd", text=sentence) for sentence in remarks))


async def _members(client: Client, config: Config) -> tuple[MemberState, ...]:
    import trio

    endpoints, former = await _asked(client, config)
    states: dict[str, MemberState] = {}

    async def look(endpoint: str) -> None:
        started = trio.current_time()
        try:
            response = await client.status(endpoint)
        except EtcdError as error:
            states[endpoint] = MemberState(endpoint=endpoint, error=str(error), former=endpoint in former)
        else:
            states[endpoint] = MemberState(
                endpoint=endpoint,
                cluster_id=response.header.cluster_id,
                has_leader=response.leader != 0,
                seconds=trio.current_time() - started,
                former=endpoint in former,
                errors=response.errors,
                db_in_use=response.db_size_in_use,
            )

    async with trio.open_nursery() as nursery:
        for endpoint in endpoints:
            nursery.start_soon(look, endpoint)
    return tuple(states[endpoint] for endpoint in endpoints)


async def _uncompacted(client: Client, keys: Keys, revision: int) -> int:
    """How many revisions etcd keeps, if it has never forgotten one and there are many; else, or if it does not tell,
    0."""
    if revision < MANY_REVISIONS:
        return 0
    try:
        await client.range(keys.adopted, revision=1)
    except EtcdError:  # Compacted, mostly.
        return 0
    return revision


async def _asked(client: Client, config: Config) -> tuple[tuple[str, ...], frozenset[str]]:
    """The endpoints to ask, and those of them that are given and not among the members' client URLs. The members are
    asked if this host's agent follows their list."""
    given = config.endpoints or client.endpoints
    if not config.more_endpoints:
        return given, frozenset()
    # The copy may be older than the list.
    members = Usable(endpoints=config.more_endpoints)
    with suppress(EtcdError):
        listed = usable(await client.members(), config)
        members = listed if listed.endpoints else members
    others = tuple(text for text in given if _url(text, config) not in members.endpoints)
    # A given endpoint may be how a member is reached whose own URL is of no use.
    return (*members.endpoints, *others), frozenset() if members.remarks else frozenset(others)


def _url(endpoint: str, config: Config) -> str:
    return str(parse_endpoint(endpoint, tls=config.tls is not None))


async def examine(client: Client, keys: Keys, config: Config) -> Examined:
    """Ask etcd's members, etcd and the agents. EtcdError: etcd as a whole does not answer."""
    living = await operator.statuses(client, keys)
    members = await _members(client, config)
    before = build_topology((await operator.snapshot(client, keys))[0])
    live = await gather(client, keys, living.keys(), tries=TRIES)
    snapshot, view = await operator.snapshot(client, keys)
    newest = newest_revision(view, keys)
    with suppress(Unavailable):
        # Who has not applied a deletion still has a peer or a label that is gone.
        newest = await operator.newest_change(client, keys, newest, view.header.revision)
    # Last: what the agents have found out while they were asked explains what they have lost, and none is behind.
    statuses = {name: status for name, status in (await operator.statuses(client, keys)).items() if name in living}
    topology = build_topology(snapshot)
    registered = registered_names(view, keys)
    return Examined(
        members=members,
        uncompacted=await _uncompacted(client, keys, snapshot.revision),
        report=report(
            snapshot,
            statuses,
            newest=newest,
            registered=registered,
            topology=topology,
            distrust=await distrust(client, keys, registered, statuses.keys()),
        ),
        topology=topology,
        statuses=statuses,
        live=live,
        claims=claims_without_record(view, keys, registered),
        settings=set_without_record(view, keys, registered),
        led_anew=frozenset(
            name
            for name in before.snapshot.nodes.keys() & snapshot.nodes.keys()
            if end_of(before, name) != end_of(topology, name)
        ),
    )
