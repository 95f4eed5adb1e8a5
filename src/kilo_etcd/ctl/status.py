"""`kgctl status`: one look at the mesh. What it says is in `ctl.report`, how it looks in `ctl.render`."""

from __future__ import annotations

import click

from kilo_etcd.ctl.context import Mesh
from kilo_etcd.ctl.output import output_option, show
from kilo_etcd.ctl.render import status_heading, status_json, status_tables
from kilo_etcd.ctl.report import Report, newest_revision, registered_names, report
from kilo_etcd.etcd.api import Client
from kilo_etcd.model import Snapshot
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys


async def read_mesh(client: Client, keys: Keys) -> tuple[Snapshot, Report]:
    """What etcd holds now, and the report on it."""
    # Statuses first: an agent can only have got further since, so nobody is called behind for our slowness.
    statuses = await operator.statuses(client, keys)
    snapshot, view = await operator.snapshot(client, keys)
    newest = newest_revision(view, keys)
    return snapshot, report(snapshot, statuses, newest=newest, registered=registered_names(view, keys))


@click.command("status")
@output_option
@click.pass_obj
def status_command(mesh: Mesh, output: str) -> None:
    """Show nodes, locations, their leaders and who is next, and everything that is not as it should be."""
    found = mesh.ask(read_mesh)[1]
    if output == "json":
        click.echo(status_json(found))
    else:
        show(status_tables(found), status_heading(found))
