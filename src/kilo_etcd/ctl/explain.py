"""`kgctl explain FROM TO`: the way of a packet through the mesh, there and back, step by step.

What it says follows from what etcd holds (`ctl.trace`) and from what the agents on the way report (`ctl.hops`), on the
operator's desk and without touching a host. With `--live` the hosts are asked what their kernels have, and to send
packets; a firewall or a broken link shows there as a tunnel without a session, or as an answer that does not come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import click
from attrs import frozen

from kilo_etcd.ctl import complete
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.output import output_option, show
from kilo_etcd.ctl.render import Table, clean, shown_location
from kilo_etcd.ctl.trace import Journey, Plans, Unknown, Way, ends, explain, internal_journeys, met
from kilo_etcd.model import Snapshot
from kilo_etcd.topology.unaware import unaware_problems


@frozen(kw_only=True)
class Explanation:
    """All that `kgctl explain` has to say. `remarks` are about the hosts on the way: (name, sentence)."""

    journeys: tuple[Journey, ...]
    urgent: tuple[str, ...] = ()
    """Errors of the mesh as a whole, to be said before all else."""
    internal: tuple[Journey, ...] = ()
    """To the internal IPs of the node at the far end, if that is one and was asked for by its name."""
    remarks: tuple[tuple[str, str], ...] = ()
    live: tuple[tuple[str, str], ...] | None = None
    """What speaks against it in the kernels of the hosts on the way, likewise, beyond `remarks`; None: they were not
    asked."""

    @property
    def works(self) -> bool:
        """Whether every journey works, as far as is known."""
        # An internal IP that is not routed is none of the mesh's.
        carried = (journey for journey in self.internal if not journey.there.unrouted)
        return all(journey.works for journey in (*self.journeys, *carried)) and not self.live


@click.command(
    "explain",
    epilog="Examples:\n\n\b\n  kgctl explain node-1 node-7\n  kgctl explain node-1 node-7 --live\n"
    "  kgctl explain node-1 10.9.0.2 -o json",
)
@click.argument("source", metavar="FROM", shell_complete=complete.nodes)
@click.argument("target", metavar="TO", shell_complete=complete.ends)
@click.option("--live", is_flag=True, help="Ask the hosts on the way whether their kernels hold what they should.")
@output_option
@click.pass_obj
def explain_command(mesh: Mesh, source: str, target: str, output: str, live: bool) -> None:
    """Show the way of a packet from node FROM to a node, a peer or an address, and back.

    It follows from what etcd holds and what the agents on the way report. Exit status 1: something there would drop
    the packet or is known not to work, or nothing is known of a host; or, with --live, a host differs from its plan.
    """
    from kilo_etcd.ctl.hops import doubts, weigh
    from kilo_etcd.ctl.live import gather
    from kilo_etcd.ctl.report import remarks_on
    from kilo_etcd.ctl.status import look

    looked = mesh.ask(look)
    topology, snapshot, statuses = looked.topology, looked.topology.snapshot, looked.statuses
    plans = Plans(topology, statuses)
    try:
        journeys = explain(plans, source, target)
    except Unknown as error:
        raise Failure(str(error)) from None
    internal = internal_journeys(plans, source, target)
    names = met((*journeys, *internal)) | {source} | ({target} if target in snapshot.nodes else set())
    remarks = remarks_on(looked.report(about=names), names)
    said = against = None
    if live:
        said = mesh.ask(partial(gather, names=names & statuses.keys(), targets=ends((*journeys, *internal), snapshot)))
        against = tuple(dict.fromkeys(one for one in doubts(journeys, topology, statuses, said) if one not in remarks))
    journeys, internal = (weigh(which, source, plans, said) for which in (journeys, internal))
    urgent = tuple(problem.text for problem in unaware_problems(topology))
    found = Explanation(urgent=urgent, journeys=journeys, internal=internal, remarks=remarks, live=against)
    if output == "json":
        click.echo(explanation_json(found))
    else:
        _print(found, source, snapshot)
    if not found.works:
        raise SystemExit(1)


def _print(found: Explanation, source: str, snapshot: Snapshot) -> None:
    for text in found.urgent:
        click.echo(f"error: {clean(text)}")
    for journey in found.journeys:
        show(journey_tables(journey, snapshot), clean(journey_heading(journey)))
        click.echo()
    if found.internal:
        show([internal_table(found.internal, live=found.live is not None)])
        click.echo()
    for title, remarks in (("Hosts on the way", found.remarks), ("What their kernels say against it", found.live)):
        if remarks:
            show([Table(title, ("NODE", "REMARK"), tuple((clean(n), clean(t)) for n, t in remarks))])
    if found.live is None:
        if found.works and any(journey.there.steps for journey in found.journeys):
            click.echo("Nothing was sent: with --live the hosts on the way try it.")
    elif not found.live and found.works:
        tried = any(journey.answered for journey in found.journeys)
        arrive = ", and packets arrive" if tried else f"; whether packets arrive was not tried by {source}"
        click.echo(f"The kernels of the hosts on the way hold what they should{arrive}.")


def journey_heading(journey: Journey) -> str:
    """The outcome in one line: that of the worst hop."""
    there, back = journey.there, journey.back
    start = _start(journey)
    if there.dropped:
        return f"{start}dropped on the way there: {there.dropped}"
    if there.lost and not journey.answered:
        return f"{start}does not arrive: {there.lost}"
    doubt = "" if journey.answered else journey.doubt or there.doubt
    may = "may arrive" if doubt else "arrives"
    if back is not None and back.dropped:
        return f"{start}{may}, but the answer is dropped: {back.dropped}"
    if back is not None and back.lost and not journey.answered:
        return f"{start}{may}, but the answer does not: {back.lost}"
    if doubt:
        return f"{start}may not arrive: {doubt}"
    if back is not None and back.doubt and not journey.answered:
        return f"{start}arrives, but the answer may not: {back.doubt}"
    if there.leaves:
        return f"{start}{there.leaves}"
    if back is None:
        return f"{start}arrives; {journey.unasked}"
    same = tuple((s.target, s.source, s.medium) for s in reversed(back.steps))
    way = (
        "the answer takes the same way"
        if same == tuple((s.source, s.target, s.medium) for s in there.steps)
        else "the answer takes another way"
    )
    return f"{start}arrives; {way}"


def _start(journey: Journey) -> str:
    whose = f", the internal IP of {journey.there.whose}" if journey.there.whose else ""
    return f"{journey.there.source} to {journey.there.destination}{whose}: "


def journey_tables(journey: Journey, snapshot: Snapshot) -> Iterator[Table]:
    """The steps there and back, as tables."""
    for title, way in (("There", journey.there), ("Back", journey.back)):
        if way is None or not (way.steps or way.dropped):
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
            for number, step in enumerate(way.steps, 1)
        ]
        if way.dropped:
            rows.append((str(len(rows) + 1), "", "dropped", "", "", clean(way.dropped)))
        columns: tuple[str, ...] = ("HOP", "FROM", "TO", "ENCRYPTED", "HOW", "TO ADDRESS")
        further = (
            ("TABLE", [step.table for step in way.steps], journey.there.whose),
            ("KERNEL'S ROUTE", [way.taken, *("" for _ in way.steps[1:])], way.taken),
            (
                "BUT",
                [step.trouble if step.broken else "" for step in way.steps],
                any(step.broken for step in way.steps),
            ),
        )
        for column, cells, shown in further:
            if shown:
                columns = (*columns, column)
                rows = [(*row, clean(cell)) for row, cell in zip(rows, [*cells, ""], strict=False)]
        yield Table(title, columns, tuple(rows))


def internal_table(journeys: tuple[Journey, ...], *, live: bool = False) -> Table:
    """How each internal IP is reached, a line for each."""
    rows = []
    for journey in journeys:
        there = journey.there
        way = ", ".join(f"{step.target} ({step.medium})" for step in there.steps)
        tables = "; ".join(dict.fromkeys(step.table for step in there.steps))
        outcome = journey_heading(journey).removeprefix(_start(journey))
        if there.unrouted:
            outcome = f"not routed: {there.unrouted}"
        tried = "answered" if journey.answered else "no answer" if journey.tried else "not tried"
        rows.append(
            (
                there.destination,
                there.source,
                way or "-",
                tables or "-",
                *((there.taken or "-", tried) if live else ()),
                outcome,
            )
        )
    columns = ("INTERNAL IP", "FROM", "BY", "TABLE", *(("KERNEL'S ROUTE", "ECHO") if live else ()), "OUTCOME")
    return Table("By internal IP", columns, tuple(tuple(map(clean, row)) for row in rows))


def _called(name: str, snapshot: Snapshot) -> str:
    node = snapshot.nodes.get(name)
    return clean(name) if node is None else f"{clean(name)} [{shown_location(node.location)}]"


def explanation_json(found: Explanation) -> str:
    """The explanation as JSON; stable (docs/kgctl.md)."""

    def way(value: Way | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {
            "source": value.source,
            "destination": value.destination,
            "internalIpOf": value.whose or None,
            "unrouted": value.unrouted or None,
            "arrives": not (value.dropped or value.lost),
            "kernelsRoute": value.taken or None,
            "dropped": value.dropped or None,
            "leaves": value.leaves or None,
            "hops": [
                {"from": s.source, "to": s.target, "encrypted": s.encrypted, "how": s.medium, "address": s.over,
                 "table": s.table, "trouble": s.trouble or None, "broken": s.broken}
                for s in value.steps
            ],
        }  # fmt: skip

    def told(these: tuple[Journey, ...]) -> list[dict[str, Any]]:
        return [
            {"works": j.works, "answered": j.answered if j.tried else None, "says": journey_heading(j),
             "there": way(j.there), "back": way(j.back),
             "unasked": j.unasked or None}
            for j in these
        ]  # fmt: skip

    return json.dumps(
        {
            "works": found.works,
            "urgent": list(found.urgent),
            "journeys": told(found.journeys),
            "internal": told(found.internal),
            "remarks": [{"node": name, "text": text} for name, text in found.remarks],
            "live": None if found.live is None else [{"node": name, "text": text} for name, text in found.live],
        },
        indent=2, ensure_ascii=False,
    )  # fmt: skip
