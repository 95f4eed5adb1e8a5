"""How a report looks: tables with frames on a terminal, aligned text in a pipe, JSON for programs.

Pure: values in, text out. The columns are the same on a terminal and in a pipe; only the frame differs. Names come
from etcd, where anyone with write access may put anything, so characters that could steer a terminal are escaped.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import attrs
from attrs import evolve, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.model import DEFAULT_LOCATION, InternalIPs

if TYPE_CHECKING:
    from kilo_etcd.ctl.reports.report import LiveReport, LocationRow, NodeRow, Report

MOST_TROUBLES = 20
"""Rows of one kind of trouble; the others are counted. JSON has all."""
MOST_TUNNELS = 60
"""How many tunnels a table has; of more, those without a session only. JSON has all."""
SHOWN_NODES = 2
"""Nodes that the name of a row has."""
DEFAULT_LOCATION_SHOWN = "(default)"
NONE = "-"


@frozen
class Table:
    """A title, the names of the columns, and the rows. Cells are clean text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    empty: str = ""
    """What is printed instead if there is no row; empty: nothing at all."""
    spare: tuple[str, ...] = ()
    """The columns that a terminal too narrow for all leaves out, the first first."""


def clean(text: str) -> str:
    """The text with every character that does not print as itself written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_location(location: str | None) -> str:
    """A location for people: the default one has no name."""
    if location is None:
        return NONE
    return DEFAULT_LOCATION_SHOWN if location == DEFAULT_LOCATION else clean(location)


def status_tables(report: Report) -> tuple[Table, ...]:
    """The report as tables; those about trouble are left out when there is none."""
    from kilo_etcd.ctl.reports.report import grouped_unrouted

    tables = (
        Table("What is wrong with the mesh", ("SUBJECT", "ERROR"), _remarks(report.urgent)),
        Table(
            "Nodes",
            ("NODE", "LOCATION", "MESH ADDRESS", "INTERNAL IP", "ENDPOINT", "ROLE", "AGENT", "REVISION"),
            _node_rows(report.nodes),
            "No node has registered yet.",
            spare=("INTERNAL IP", "REVISION", "ENDPOINT"),
        ),
        Table(
            "Locations",
            ("LOCATION", "NODES", "LEADER", "SINCE", "NEXT IN LINE", "CANDIDATES"),
            _location_rows(report.locations),
            spare=("CANDIDATES",),
        ),
        Table(
            "Rejected",
            ("KEY", "REASON"),
            _first(report.rejected, lambda r: (clean(r.key), clean(r.reason)), "rejected records"),
        ),
        Table("Agents that disagree", ("NODE", "WHAT"), _remarks(report.disagreements)),
        Table("Errors that agents report", ("NODE", "ERROR"), _remarks(report.errors)),
        Table("Problems", ("SUBJECT", "PROBLEM"), _remarks(report.problems)),
        Table("Is that meant?", ("SUBJECT", "NOTE"), _remarks(report.notes)),
        Table(
            f"{'Addresses' if report.internal_ips_in_force == InternalIPs.ENCRYPTED else 'Internal IPs'} "
            "that are not routed",
            ("SUBJECT", "NOT FROM", "WHY"),
            _first(
                grouped_unrouted(report.unrouted),
                lambda remark: (clean(remark.subject), clean(remark.nowhere), clean(remark.text)),
                "of these",
            ),
        ),
        *(_live_tables(report.live) if report.live is not None else ()),
    )
    return tuple(table for table in tables if table.rows or table.empty)


def _live_tables(live: LiveReport) -> tuple[Table, ...]:
    from kilo_etcd.ctl.reports.live import ago, amount

    rows = [tunnel for kernel in live.kernels for tunnel in kernel.tunnels]
    title = "Tunnels, as the leaders have them"
    if len(rows) > MOST_TUNNELS:
        rows = [tunnel for tunnel in rows if not tunnel.up][:MOST_TUNNELS]
        title = "Tunnels without a session, as the leaders have them"
    trouble = [(kernel.name, text) for kernel in live.kernels for text in kernel.trouble]
    trouble += [(name, "its agent lives, but has not answered in time") for name in live.silent]
    trouble += [("-", f"no host could be asked: {live.refused}")] if live.refused else []
    return (
        Table(
            title,
            ("NODE", "TO", "HANDSHAKE", "RECEIVED", "SENT", "ENDPOINT"),
            tuple(
                (
                    clean(t.node),
                    clean(t.other),
                    ago(t.handshake),
                    amount(t.received),
                    amount(t.sent),
                    t.endpoint or NONE,
                )
                for t in rows
            ),
        ),
        Table(
            "Kernels that differ from the plan",
            ("NODE", "CHANGES", "THE FIRST"),
            tuple(
                (clean(kernel.name), str(kernel.undone), clean(kernel.changes[0]) if kernel.changes else NONE)
                for kernel in live.kernels
                if kernel.undone
            ),
        ),
        Table("Hosts that were asked", ("NODE", "WHAT"), tuple((clean(name), clean(text)) for name, text in trouble)),
    )


def status_heading(report: Report) -> str:
    """The mesh in one line."""
    alive = sum(row.alive for row in report.nodes)
    parts = [
        f"granularity {report.granularity}",
        f"internal-ips {shown_mode(report)}",
        f"subnets {', '.join(report.subnets) or NONE}",
        f"{len(report.nodes)} node{'' if len(report.nodes) == 1 else 's'}, {alive} alive",
        f"revision {report.revision}",
    ]
    if report.peers:
        parts.insert(4, f"peers {', '.join(map(clean, report.peers))}")
    if report.live is not None and report.live.tunnels:
        parts.append(f"{report.live.up} of {report.live.tunnels} tunnels up")
    return "; ".join(parts)


def shown_mode(report: Report) -> str:
    """The setting internal-ips, what is in force, how far the switch to `encrypted` or back is, and what stays in clear
    under it."""
    shown = shown_internal_ips(report.internal_ips, report.internal_ips_in_force, len(report.unaware))
    notes = [] if report.switch is None else [clean(str(report.switch))]
    if report.internal_ips_in_force == InternalIPs.ENCRYPTED and (unrouted := len(report.unrouted)):
        notes.append(f"but not {unrouted} address{'' if unrouted == 1 else 'es'}, named below")
    return f"{shown} ({', '.join(notes)})" if notes else shown


def shown_internal_ips(setting: str, in_force: str, unaware: int) -> str:
    """The setting internal-ips, and what is in force as long as `unaware` agents do not know it."""
    if setting == in_force:
        return setting
    return f"{in_force} ({setting} waits for {unaware} agent{'' if unaware == 1 else 's'})"


def status_json(report: Report) -> str:
    """The report as JSON, with the field names of the records in etcd (camel case). Text is as etcd has it."""
    return json.dumps(_data(report), indent=2, ensure_ascii=False)


def plain(tables: Iterable[Table], heading: str = "") -> str:
    """Aligned text without a frame and without a width."""
    blocks = [heading] if heading else []
    for table in tables:
        if not table.rows:
            blocks.append(table.empty)
            continue
        lines = (table.columns, *table.rows)
        widths = [max(_width(line[i]) for line in lines) for i in range(len(table.columns))]
        text = (
            "  ".join(c + " " * (w - _width(c)) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        blocks.append("\n".join((f"{table.title}:", *text) if table.title else text))
    return "\n\n".join(blocks)


def framed(tables: Iterable[Table], heading: str = "", *, width: int | None = None, colour: bool = True) -> str:
    """Tables for a terminal of `width` columns (None: this one's).

    Where a table is too wide it loses its frame, then its spare columns, which a line says; then cells are wrapped. An
    address in one piece is worth more than a frame: it is there to be copied.
    """
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    written = io.StringIO()
    console = Console(file=written, force_terminal=colour, no_color=not colour, width=width, highlight=False)
    if heading:
        console.print(Text(heading))
    for table in tables:
        if not table.rows:
            console.print(Text(table.empty))
            continue
        table, with_frame, left_out = _fitting(table, console.width)
        drawn = RichTable(
            title=table.title or None, title_justify="left", title_style="bold",
            box=HEAVY_HEAD if with_frame else None, padding=(0, 1) if with_frame else (0, 2, 0, 0),
            pad_edge=with_frame,
        )  # fmt: skip
        for column in table.columns:
            drawn.add_column(column, overflow="fold")
        for row in table.rows:
            # Text, not str: a name in square brackets is a name, not markup.
            drawn.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        console.print(drawn)
        if left_out:
            console.print(Text(f"(the terminal is too narrow for {', '.join(left_out)})", style="dim"))
    return written.getvalue().rstrip("\n")


def _fitting(table: Table, width: int) -> tuple[Table, bool, tuple[str, ...]]:
    """The table as it fits, whether with its frame, and the columns that were left out."""

    def needs(shown: Table) -> int:
        return sum(max(_width(line[i]) for line in (shown.columns, *shown.rows)) + 2 for i in range(len(shown.columns)))

    if needs(table) + len(table.columns) + 1 <= width:
        return table, True, ()
    left_out: tuple[str, ...] = ()
    shown = table
    for name in table.spare:
        if needs(shown) - 2 <= width:
            break
        at = shown.columns.index(name)
        rows = tuple((*row[:at], *row[at + 1 :]) for row in shown.rows)
        shown = evolve(shown, columns=(*shown.columns[:at], *shown.columns[at + 1 :]), rows=rows)
        left_out = (*left_out, name)
    return shown, False, left_out


_STYLES = {"leader": "bold", "gone": "red", "not in force": "red", "not registered": "red", NONE: "dim"}


def _node_cells(row: NodeRow) -> tuple[str, ...]:
    revision = NONE
    if row.revision is not None:
        revision = f"{row.revision} ({row.behind} behind)" if row.behind else str(row.revision)
    return (
        clean(row.name),
        shown_location(row.location),
        ", ".join(row.mesh_addresses) or NONE,
        ", ".join(row.internal_ips) or NONE,
        f"{row.observed_endpoints[0]} (observed)" if row.observed_endpoints else row.endpoint or NONE,
        row.role,
        "alive" if row.alive else "gone",
        revision,
    )


def _location_rows(rows: Sequence[LocationRow]) -> tuple[tuple[str, ...], ...]:
    """A location has several rows if not all of its nodes form one segment; then each row names some."""
    number = Counter(row.location for row in rows)

    def called(row: LocationRow) -> str:
        shown = shown_location(row.location)
        return shown if number[row.location] == 1 else f"{shown}: {clean(first_of(row.nodes, SHOWN_NODES))}"

    return tuple(_location_cells(row, called(row)) for row in rows)


def _location_cells(row: LocationRow, name: str) -> tuple[str, ...]:
    if row.leader is None:
        return name, str(len(row.nodes)), "each node for itself", NONE, NONE, NONE
    return (
        name,
        str(len(row.nodes)),
        clean(row.leader),
        clean(row.since) if row.since else NONE,
        clean(row.next_in_line) if row.next_in_line else NONE,
        ", ".join(map(clean, row.candidates)) or NONE,
    )


def _remarks(remarks: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    return _first(remarks, lambda remark: (clean(remark.subject), clean(remark.text)), "of these")


def _first(items: Sequence[Any], cells: Callable[[Any], tuple[str, ...]], note: str) -> tuple[tuple[str, ...], ...]:
    """The first `MOST_TROUBLES` as rows, and a row that counts the others."""
    rows = tuple(cells(item) for item in items[:MOST_TROUBLES])
    more = len(items) - len(rows)
    if not more:
        return rows
    filled = [NONE] * (len(rows[0]) - 2)
    return (*rows, (f"{more} more", *filled, f"{note}; kgctl status -o json lists all"))


def _node_rows(nodes: Sequence[NodeRow]) -> tuple[tuple[str, ...], ...]:
    """All members, and the first of what is registered and yet no member: anybody who may write can add to those."""
    from kilo_etcd.ctl.reports.report import NOT_IN_FORCE

    idle = [row for row in nodes if row.role == NOT_IN_FORCE and not row.alive]
    left_out = {row.name for row in idle[MOST_TROUBLES:]}
    rows = tuple(_node_cells(row) for row in nodes if row.name not in left_out)
    if not left_out:
        return rows
    more = (f"{len(left_out)} more", NONE, NONE, NONE, NONE, f"{NOT_IN_FORCE}; kgctl status -o json lists all")
    return (*rows, (*more, NONE, NONE))


def _width(text: str) -> int:
    # East Asian wide characters take two columns; labels are any text.
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _data(value: Any) -> Any:
    """What JSON can hold of our values, with names in camel case."""
    if isinstance(value, tuple):
        return [_data(item) for item in value]
    if attrs.has(type(value)):
        return {_camel_name(field.name): _data(getattr(value, field.name)) for field in attrs.fields(type(value))}
    return value


@cache
def _camel_name(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)
