"""`kgctl location`: the labels, which are what shapes the mesh. The same as `etcdctl put`, with checks and an answer.

A node may be labelled before it has ever registered (a host is often labelled while it is being installed); that is
done and printed, so that a mistyped name is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
from attrs import frozen

from kilo_etcd.base.quoting import sentence
from kilo_etcd.ctl.change import Edit, Outcome, carry_out, change_options
from kilo_etcd.ctl.commands import complete
from kilo_etcd.ctl.context import Mesh
from kilo_etcd.ctl.group import Group
from kilo_etcd.ctl.output import output_option, show
from kilo_etcd.ctl.reports.label import oddity
from kilo_etcd.ctl.reports.render import Table, clean, shown_location
from kilo_etcd.ctl.reports.report import registered_names
from kilo_etcd.etcd.api import Client
from kilo_etcd.model import Snapshot
from kilo_etcd.runtime.parsing import parse_node_name
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import decode_label
from kilo_etcd.store.view import View


@frozen(kw_only=True)
class LocationLine:
    """One node of `kgctl location list`: its location, and where that comes from."""

    node: str
    location: str
    source: str
    registered: bool


def check_label(text: str) -> str:
    """A label as it will be stored. ValueError, in one clause."""
    label = text.strip()
    if not label:
        raise ValueError("the label is empty; kgctl location unset NODE takes a label away")
    if not label.isprintable():
        raise ValueError(f"{label!r} has characters that do not print")
    decode_label(label.encode())
    return label


def location_lines(snapshot: Snapshot, labels: dict[str, str], registered: frozenset[str]) -> tuple[LocationLine, ...]:
    """Every node that is labelled or registered, by name."""
    lines = []
    for name in sorted({*labels, *snapshot.nodes, *registered}):
        node = snapshot.nodes.get(name)
        default = node.default_location if node is not None else ""
        lines.append(
            LocationLine(
                node=name,
                location=labels.get(name, default),
                source="label" if name in labels else "host's default" if default else "",
                registered=name in registered or node is not None,
            )
        )
    return tuple(lines)


def _checked(check: Callable[[str], str]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            return tuple(map(check, value)) if isinstance(value, tuple) else check(value)
        except ValueError as error:
            raise click.BadParameter(sentence(error), context, parameter) from None

    return callback


_NODE, _LABEL = _checked(parse_node_name), _checked(check_label)


@click.group("location", cls=Group)
def location_group() -> None:
    """Set, list and unset the labels that shape the mesh."""


@location_group.command("set")
@click.argument("node", callback=_NODE, shell_complete=complete.nodes)
@click.argument("label", callback=_LABEL, shell_complete=complete.labels)
@click.option(
    "--node", "others", callback=_NODE, multiple=True, help="Label this node too; may be given several times."
)
@change_options
@click.pass_obj
def set_command(mesh: Mesh, node: str, label: str, others: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Label NODE with the location LABEL. It moves at once, live."""
    nodes = tuple(dict.fromkeys((node, *others)))
    registered: frozenset[str] = frozenset()

    def decide(_before: Snapshot, view: View, keys: Keys) -> Edit:
        nonlocal registered
        registered = registered_names(view, keys)
        return Edit(puts={keys.location(name): label for name in nodes}, asks_if_disruptive=True)

    if (odd := oddity(label)) is not None:
        click.echo(f'kgctl: location "{clean(label)}" {odd}: is that meant?', err=True)
    outcome = carry_out(mesh, decide, dry_run=dry_run, yes=yes)
    if outcome is not Outcome.DRY_RUN:
        already = " already" if outcome is Outcome.NOTHING else ""
        for name in nodes:
            click.echo(f"{name}: {clean(label)}{already}{'' if name in registered else _not_yet(name)}")


@location_group.command("unset")
@click.argument("nodes", metavar="NODE...", callback=_NODE, nargs=-1, required=True, shell_complete=complete.nodes)
@change_options
@click.pass_obj
def unset_command(mesh: Mesh, nodes: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Remove NODE's label; the host's own default location counts again."""
    had_label: dict[str, bool] = {}
    registered: frozenset[str] = frozenset()

    def decide(_before: Snapshot, view: View, keys: Keys) -> Edit:
        nonlocal registered
        registered = registered_names(view, keys)
        had_label.update({name: view.kv(keys.location(name)) is not None for name in nodes})
        return Edit(deletes=tuple(keys.location(name) for name in had_label), asks_if_disruptive=True)

    if carry_out(mesh, decide, dry_run=dry_run, yes=yes) is not Outcome.DRY_RUN:
        for name, was_there in had_label.items():
            text = "label removed" if was_there else "had no label"
            click.echo(f"{name}: {text}{'' if name in registered else _not_yet(name)}")


@location_group.command("list")
@output_option
@click.pass_obj
def list_command(mesh: Mesh, output: str) -> None:
    """List every node's location, and whether a label or the host itself says so."""

    async def work(client: Client, keys: Keys) -> tuple[LocationLine, ...]:
        snapshot, view = await operator.snapshot(client, keys)
        labels = dict(operator.labels(keys, view.kvs(keys.locations_root)))
        return location_lines(snapshot, labels, registered_names(view, keys))

    lines = mesh.ask(work)
    if output == "json":
        rows = [
            {"node": li.node, "location": li.location, "source": li.source or None, "registered": li.registered}
            for li in lines
        ]
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    show([locations_table(lines)])


def locations_table(lines: tuple[LocationLine, ...]) -> Table:
    """The lines as a table."""
    return Table(
        "",
        ("NODE", "LOCATION", "FROM", "NOTE"),
        tuple(
            (
                clean(li.node),
                shown_location(li.location),
                li.source or "-",
                "" if li.registered else "not registered yet",
            )
            for li in lines
        ),
        "No node is registered or labelled yet.",
    )


def _not_yet(name: str) -> str:
    return f"; {name} is not registered yet"
