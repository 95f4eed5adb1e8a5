"""`kgctl explain FROM TO`: the way of a packet through the mesh, there and back, step by step.

What it says follows from what etcd holds (`ctl.reports.trace`) and from what the agents on the way report
(`ctl.reports.hops`), on the operator's desk and without touching a host. With `--live` the hosts are asked what their
kernels have, and to send packets; a firewall or a broken link shows there as a tunnel without a session, or as an
answer that does not come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import click
from attrs import evolve, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.commands import complete
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.output import output_option, show
from kilo_etcd.ctl.reports.render import Table, clean, shown_location
from kilo_etcd.ctl.reports.trace import Plans, Trace, TracedPath, Unknown, ends, explain, internal_traces, met
from kilo_etcd.model import Snapshot
from kilo_etcd.topology.unaware import unaware_problems

HOSTS_NAMED = 5
"""In a headline."""


@frozen(kw_only=True)
class Explanation:
    """All that `kgctl explain` has to say. `remarks` are about the hosts on the way: (name, sentence)."""

    traces: tuple[Trace, ...]
    urgent: tuple[str, ...] = ()
    """Errors of the mesh as a whole, to be said before all else."""
    internal: tuple[Trace, ...] = ()
    """To the internal IPs of the node at the far end, if that is one and was asked for by its name."""
    remarks: tuple[tuple[str, str], ...] = ()
    live: tuple[tuple[str, str], ...] | None = None
    """What the kernels of the hosts on the way lack for it, likewise; None: they were not asked."""

    @property
    def works(self) -> bool:
        """Whether every trace works, as far as is known."""
        # An internal IP that is not routed is none of the mesh's.
        carried = (trace for trace in self.internal if not trace.there.unrouted)
        return all(trace.works for trace in (*self.traces, *carried)) and not self.live


@click.command(
    "explain",
    epilog="Examples:\n\n\b\n  kgctl explain node-1 node-7\n  kgctl explain node-1 node-7 --live\n"
    "  kgctl explain node-1 10.9.0.2 -o json",
)
@click.argument("source", metavar="FROM", shell_complete=complete.nodes)
@click.argument("target", metavar="TO", shell_complete=complete.ends)
@click.option("--live", is_flag=True, help="Ask the hosts on the path whether their kernels hold what they should.")
@output_option
@click.pass_obj
def explain_command(mesh: Mesh, source: str, target: str, output: str, live: bool) -> None:
    """Trace a packet from node FROM to a node, a peer or an address, and the answer to it.

    The trace is computed from what etcd holds and from what the agents on the way report. Exit status 1: something
    there would drop the packet or is known not to work, or nothing is known of a host; or, with --live, a host differs
    from its plan.
    """
    from kilo_etcd.ctl.commands.status import Looked, look
    from kilo_etcd.ctl.reports.arrivals import TRIES
    from kilo_etcd.ctl.reports.hops import suspicions, weigh
    from kilo_etcd.ctl.reports.live import gather
    from kilo_etcd.ctl.reports.report import remarks_on
    from kilo_etcd.planning.reach import about_member

    def traced(looked: Looked) -> tuple[Plans, tuple[Trace, ...], tuple[Trace, ...]]:
        plans = Plans(looked.topology, looked.statuses)
        try:
            return plans, explain(plans, source, target), internal_traces(plans, source, target)
        except Unknown as error:
            raise Failure(str(error)) from None

    looked = mesh.ask(look)
    plans, traces, internal = traced(looked)
    gathered = against = None
    if live:
        # If packets are lost, those that other hosts send tell at which host.
        few = len(looked.statuses) <= TRIES
        way = met((*traces, *internal)) | {source, target}
        gathered = mesh.ask(
            partial(
                gather,
                names=looked.statuses.keys() if few else way & looked.statuses.keys(),
                tries=TRIES if few else 0,
                targets=ends((*traces, *internal), looked.topology),
            )
        )
        # An agent that is asked looks anew at what it reports.
        looked = mesh.ask(look)
        plans, traces, internal = traced(looked)
    topology, snapshot, statuses = looked.topology, looked.topology.snapshot, looked.statuses
    names = met((*traces, *internal)) | {source} | ({target} if target in snapshot.nodes else set())
    # A remark about a member that is not on the path is left out. If the packet is dropped at its source, the leader
    # that it should go to next is not among the hops, but belongs to the path.
    near = names | {topology.segment_of(name).leader.name for name in names & snapshot.nodes.keys()}
    remarks = tuple(
        remark
        for remark in remarks_on(looked.report(about=names), names)
        if (about_member(remark[1]) or source) in near
    )
    if gathered is not None:
        against = tuple(dict.fromkeys(suspicions((*traces, *internal), topology, statuses, gathered, names)))
        # The hosts' answers are shown as what is wrong. A remark that says the same is left out.
        remarks = tuple(remark for remark in remarks if remark not in against)
    traces, internal = (weigh(group, source, plans, gathered) for group in (traces, internal))
    if against:
        named = dict.fromkeys(name for subject, _ in against for name in subject.split(" - "))
        beside = tuple(name for name in named if name in snapshot.nodes)
        if not beside and any(subject != "-" for subject, _ in against):
            beside = ("the hosts on the way",)
        traces = tuple(evolve(trace, beside=beside) for trace in traces)
    urgent = tuple(problem.text for problem in unaware_problems(topology))
    explanation = Explanation(urgent=urgent, traces=traces, internal=internal, remarks=remarks, live=against)
    if output == "json":
        click.echo(explanation_json(explanation))
    else:
        _print(explanation, source, snapshot)
    if not explanation.works:
        raise SystemExit(1)


def _print(explanation: Explanation, source: str, snapshot: Snapshot) -> None:
    for text in explanation.urgent:
        click.echo(f"error: {clean(text)}")
    for trace in explanation.traces:
        show(trace_tables(trace, snapshot), clean(trace_heading(trace)))
        click.echo()
    if explanation.internal:
        show([internal_table(explanation.internal, live=explanation.live is not None)])
        click.echo()
    for title, remarks in (
        ("Hosts on the way", explanation.remarks),
        ("What is wrong on the hosts on the way", explanation.live),
    ):
        if remarks:
            show([Table(title, ("NODE", "REMARK"), tuple((clean(n), clean(t)) for n, t in remarks))])
    if explanation.live is None:
        if explanation.works and any(trace.there.steps for trace in explanation.traces):
            click.echo("Nothing was sent: with --live the hosts on the way try it.")
    elif not explanation.live and explanation.works:
        tried = any(trace.answered for trace in explanation.traces)
        arrive = ", and packets arrive" if tried else f"; {source} did not try whether packets arrive"
        click.echo(f"The kernels of the hosts on the way hold what they should{arrive}.")


def trace_heading(trace: Trace) -> str:
    """The outcome in one line: that of the worst hop."""
    there, back = trace.there, trace.back
    start = _start(trace)
    if there.dropped:
        return f"{start}dropped on the way there: {there.dropped}"
    if there.lost and not trace.answered:
        return f"{start}does not arrive: {there.lost}"
    suspicion = "" if trace.answered else trace.suspicion or there.suspicion
    may = "may arrive" if suspicion else "arrives"
    if back is not None and back.dropped:
        return f"{start}{may}, but the answer is dropped: {back.dropped}"
    if back is not None and back.lost and not trace.answered:
        return f"{start}{may}, but the answer does not: {back.lost}"
    if suspicion:
        return f"{start}may not arrive: {suspicion}"
    if back is not None and back.suspicion and not trace.answered:
        return f"{start}arrives, but the answer may not: {back.suspicion}"
    if trace.beside:
        names = f"see what is wrong on {_and_on(trace.beside)}"
        if trace.answered:
            return f"{start}echo requests arrive, but other packets may not: {names}"
        return f"{start}may not arrive: {names}"
    if there.leaves:
        return f"{start}{there.leaves}"
    arrives = "should arrive, but was not tried" if trace.asked and not trace.tried else "arrives"
    if back is None:
        return f"{start}{arrives}; {trace.unasked}"
    reversed_steps = tuple((s.target, s.source, s.medium) for s in reversed(back.steps))
    way = (
        "the answer takes the same way"
        if reversed_steps == tuple((s.source, s.target, s.medium) for s in there.steps)
        else "the answer takes another way"
    )
    return f"{start}{arrives}; {way}"


def _and_on(names: tuple[str, ...]) -> str:
    if len(names) > HOSTS_NAMED:
        return first_of(names, HOSTS_NAMED)
    *others, last = names
    return f"{', on '.join(others)}, and on {last}" if others else last


def _start(trace: Trace) -> str:
    holder = f", the internal IP of {trace.there.holder}" if trace.there.holder else ""
    return f"{trace.there.source} to {trace.there.destination}{holder}: "


def trace_tables(trace: Trace, snapshot: Snapshot) -> Iterator[Table]:
    """The steps there and back, as tables."""
    for title, path in (("There", trace.there), ("Back", trace.back)):
        if path is None or not (path.steps or path.dropped):
            continue
        rows: list[tuple[str, ...]] = [
            (
                str(number),
                _called(step.source, snapshot),
                _called(step.target, snapshot),
                "yes" if step.encrypted else "no",
                step.medium,
                step.over,
            )
            for number, step in enumerate(path.steps, 1)
        ]
        if path.dropped:
            last = path.steps[-1].target if path.steps else path.start
            rows.append((str(len(rows) + 1), _called(last, snapshot), "dropped", "", "", clean(path.dropped)))
        columns: tuple[str, ...] = ("HOP", "FROM", "TO", "ENCRYPTED", "HOW", "TO ADDRESS")
        further = (
            ("TABLE", [step.table for step in path.steps], trace.there.holder),
            ("KERNEL'S ROUTE", [path.kernel_route, *("" for _ in path.steps[1:])], path.kernel_route),
            (
                "BUT",
                [step.trouble if step.broken else "" for step in path.steps],
                any(step.broken for step in path.steps),
            ),
        )
        for column, cells, shown in further:
            if shown:
                columns = (*columns, column)
                rows = [(*row, clean(cell)) for row, cell in zip(rows, [*cells, ""], strict=False)]
        yield Table(title, columns, tuple(rows))


def internal_table(traces: tuple[Trace, ...], *, live: bool = False) -> Table:
    """How each internal IP is reached, a line for each."""
    rows = []
    for trace in traces:
        there = trace.there
        way = ", ".join(f"{step.target} ({step.medium})" for step in there.steps)
        tables = "; ".join(dict.fromkeys(step.table for step in there.steps))
        outcome = trace_heading(trace).removeprefix(_start(trace))
        if there.unrouted:
            outcome = f"not routed: {there.unrouted}"
        tried = "answered" if trace.answered else "no answer" if trace.tried else "not tried"
        rows.append(
            (
                there.destination,
                there.source,
                way or "-",
                tables or "-",
                *((there.kernel_route or "-", tried) if live else ()),
                outcome,
            )
        )
    columns = ("INTERNAL IP", "FROM", "BY", "TABLE", *(("KERNEL'S ROUTE", "ECHO") if live else ()), "OUTCOME")
    return Table("By internal IP", columns, tuple(tuple(map(clean, row)) for row in rows))


def _called(name: str, snapshot: Snapshot) -> str:
    node = snapshot.nodes.get(name)
    return clean(name) if node is None else f"{clean(name)} [{shown_location(node.location)}]"


def explanation_json(explanation: Explanation) -> str:
    """The explanation as JSON; stable (docs/kgctl.md)."""

    def path(value: TracedPath | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {
            "source": value.source,
            "destination": value.destination,
            "internalIpOf": value.holder or None,
            "unrouted": value.unrouted or None,
            "arrives": not (value.dropped or value.lost),
            "kernelsRoute": value.kernel_route or None,
            "dropped": value.dropped or None,
            "leaves": value.leaves or None,
            "hops": [
                {"from": s.source, "to": s.target, "encrypted": s.encrypted, "how": s.medium, "address": s.over,
                 "table": s.table, "trouble": s.trouble or None, "broken": s.broken}
                for s in value.steps
            ],
        }  # fmt: skip

    def traces_json(traces: tuple[Trace, ...]) -> list[dict[str, Any]]:
        return [
            {"works": trace.works, "answered": trace.answered if trace.tried else None, "says": trace_heading(trace),
             "there": path(trace.there), "back": path(trace.back),
             "unasked": trace.unasked or None}
            for trace in traces
        ]  # fmt: skip

    return json.dumps(
        {
            "works": explanation.works,
            "urgent": list(explanation.urgent),
            "traces": traces_json(explanation.traces),
            "internal": traces_json(explanation.internal),
            "remarks": [{"node": name, "text": text} for name, text in explanation.remarks],
            "live": None
            if explanation.live is None
            else [{"node": name, "text": text} for name, text in explanation.live],
        },
        indent=2,
        ensure_ascii=False,
    )
