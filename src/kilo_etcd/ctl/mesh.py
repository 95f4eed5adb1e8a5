"""`kgctl mesh`: what holds for the mesh as a whole: its granularity, which can be switched live, and its subnets."""

from __future__ import annotations

import json

import click

from kilo_etcd.ctl.change import Edit, Outcome, carry_out, change_options
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.join import join_command, part_command
from kilo_etcd.ctl.output import output_option
from kilo_etcd.model import Granularity, Snapshot
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.view import View


@click.group("mesh")
def mesh_group() -> None:
    """Show and set what holds for the whole mesh, and join it to another one."""


mesh_group.add_command(join_command)
mesh_group.add_command(part_command)


@mesh_group.command("show")
@output_option
@click.pass_obj
def show_command(mesh: Mesh, output: str) -> None:
    """Show granularity, subnets, and how many nodes, locations and peers there are."""
    snapshot = mesh.ask(operator.snapshot)[0]
    found = {
        "granularity": snapshot.granularity.value,
        "subnets": [str(subnet) for subnet in snapshot.subnets],
        "nodes": len(snapshot.nodes),
        "locations": len({node.location for node in snapshot.nodes.values()}),
        "peers": len(snapshot.peers),
        "setAside": len(snapshot.set_aside),
        "revision": snapshot.revision,
    }
    if output == "json":
        click.echo(json.dumps(found, indent=2))
        return
    if not snapshot.subnets:
        raise Failure(f"there is no mesh under {mesh.prefix} yet: the first agent makes it")
    names = {"setAside": "records set aside"}
    for name, value in found.items():
        shown = ", ".join(value) if isinstance(value, list) else str(value)
        click.echo(f"{names.get(name, name) + ':':<20}{shown}")


@mesh_group.command(
    "set", epilog="Examples:\n\n\b\n  kgctl mesh set granularity full --dry-run\n  kgctl mesh set granularity location"
)
@click.argument("what", type=click.Choice(("granularity", "subnets")))
@click.argument("value")
@change_options
@click.pass_obj
def set_command(mesh: Mesh, what: str, value: str, dry_run: bool, yes: bool) -> None:
    """Set the mesh's granularity: location, full or cross. It is switched live, with a short gap everywhere."""
    if what == "subnets":
        raise Failure(
            "the mesh's subnets are fixed: every node's address is from them; for other ones start a second mesh "
            "under another --prefix"
        )
    try:
        granularity = Granularity(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no granularity: write location, full or cross.") from None

    def decide(before: Snapshot, _view: View, keys: Keys) -> Edit:
        nodes = len(before.nodes)
        return Edit(
            puts={keys.granularity: granularity.value},
            asks=f"Every tunnel of {nodes} nodes is drawn anew. Go on?" if nodes else "",
        )

    if carry_out(mesh, decide, dry_run=dry_run, yes=yes) is Outcome.NOTHING:
        click.echo(f"Nothing to change: the granularity is {granularity} already.")
