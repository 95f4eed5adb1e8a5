"""`kgctl annotate`: what an operator says about one node, as `name=value`; `name-` takes it back.

The values are read as the agents read them, so one that they would reject is refused here. As with labels, a
node may be annotated before it has registered.
"""

from __future__ import annotations

from difflib import get_close_matches

import click

from kilo_etcd.base.quoting import either, sentence
from kilo_etcd.ctl.change import Edit, Outcome, carry_out, change_options
from kilo_etcd.ctl.commands import complete
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.reports.render import clean
from kilo_etcd.ctl.reports.report import registered_names
from kilo_etcd.model import Snapshot
from kilo_etcd.planning.exit_node import trouble_of
from kilo_etcd.runtime.parsing import parse_node_name
from kilo_etcd.store.annotations import ANNOTATIONS, Registered
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import MAX_ANNOTATION, NodeRecord, RecordError, decode_node, decode_text
from kilo_etcd.store.view import View
from kilo_etcd.topology.segments import build_topology


def parse_annotation(text: str) -> tuple[str, str | None]:
    """`name=value` or `name-` (None: taken back). ValueError, in one clause."""
    name, separator, value = text.partition("=")
    if not separator:
        if not text.endswith("-"):
            raise ValueError(f"{text!r} is neither name=value nor, to take it back, name-")
        name = text[:-1]
    if name not in ANNOTATIONS:
        near = get_close_matches(name, ANNOTATIONS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(ANNOTATIONS))}"
        raise ValueError(f"no annotation is called {name!r}; {hint}")
    return name, (decode_text(value.encode(), MAX_ANNOTATION) if separator else None)


def _record(view: View, keys: Keys, node: str) -> NodeRecord:
    """The node's record; one of no host where there is none to be read."""
    kv = view.kv(keys.node(node))
    try:
        if kv is not None:
            return decode_node(kv.value)
    except RecordError:
        pass
    return NodeRecord(public_key="A" * 43 + "=")


def _no_exit_node(after: Snapshot, node: str) -> str | None:
    # Of a host that has not registered it is not known where it will be.
    return trouble_of(build_topology(after), node) if node in after.nodes else None


def _arguments(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str | None]:  # fmt: skip
    result: dict[str, str | None] = {}
    for text in values:
        try:
            name, value = parse_annotation(text)
        except ValueError as error:
            raise click.BadParameter(sentence(error), context, parameter) from None
        if name in result:
            raise click.BadParameter(f"{name} is given twice.", context, parameter)
        result[name] = value
    return result


def node_argument(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """A click callback: the name of a node, checked."""
    try:
        return parse_node_name(value)
    except ValueError as error:
        raise click.BadParameter(sentence(error), context, parameter) from None


@click.command(
    "annotate",
    help=f"Set or remove annotations of NODE: {either(*ANNOTATIONS)}. They take effect at once. The command asks first "
    "if that interrupts traffic in use.",
    epilog="Examples:\n\n\b\n"
    "  kgctl annotate node-1 leader=true\n"
    "  kgctl annotate node-1 force-endpoint=vpn.example.org:51820 persistent-keepalive=25\n"
    "  kgctl annotate node-1 allowed-location-ips=192.0.2.0/28 --dry-run\n"
    "  kgctl annotate exit-1 advertise-exit-node=true\n"
    "  kgctl annotate node-1 exit-node=exit-1\n"
    "  kgctl annotate node-1 leader-",
)
@click.argument("node", callback=node_argument, shell_complete=complete.nodes)
@click.argument(
    "annotations",
    metavar="NAME=VALUE|NAME-...",
    nargs=-1,
    required=True,
    callback=_arguments,
    shell_complete=complete.annotation_names,
)
@change_options
@click.pass_obj
def annotate_command(mesh: Mesh, node: str, annotations: dict[str, str | None], dry_run: bool, yes: bool) -> None:
    """Set or remove annotations of NODE."""
    registered: frozenset[str] = frozenset()
    forced: tuple[str, ...] = ()

    def decide(_before: Snapshot, view: View, keys: Keys) -> Edit:
        nonlocal registered, forced
        registered = registered_names(view, keys)
        values = {name: value for name, value in annotations.items() if value is not None}
        record = _record(view, keys, node)
        annotated, wrong = Registered(record, 0).annotated(values)
        if wrong:
            raise Failure("; ".join(f"{name}: {reason}" for name, reason in wrong.items()) + "; nothing was written")
        forced = tuple(str(ip.ip) for ip in annotated.get("internal_ips", ()) if ip not in record.internal_ips)
        return Edit(
            puts={keys.annotation(node, name): value for name, value in values.items()},
            deletes=tuple(keys.annotation(node, name) for name, value in annotations.items() if value is None),
            # A network that would be left out is a mistake of this command; other trouble may have other causes.
            refuses_trouble=any(text and ANNOTATIONS[name].offers_networks for name, text in values.items()),
            asks_if_disruptive=True,
            forbids=lambda after: _no_exit_node(after, node) if values.get("exit-node") else None,
        )

    outcome = carry_out(mesh, decide, dry_run=dry_run, yes=yes)
    if outcome is Outcome.NOTHING:
        click.echo("Nothing to change: its annotations say so already.")
    elif forced:
        click.echo(
            f"Only {clean(node)}'s agent knows whether the host has {' and '.join(forced)}: if it has not, kgctl "
            "status shows an error"
        )
    if outcome is Outcome.WRITTEN:
        later = "" if node in registered else f"; {clean(node)} is not registered yet"
        click.echo(f"{clean(node)}: annotated{later}")
