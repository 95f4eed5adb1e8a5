"""`kgctl graph`: the mesh as it is meant to be, coloured by what its hosts say of it."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from kilo_etcd.ctl.context import Failure, Mesh

if TYPE_CHECKING:
    from kilo_etcd.ctl.reports.live import Live
    from kilo_etcd.etcd.api import Client
    from kilo_etcd.model import Snapshot
    from kilo_etcd.store.keys import Keys

PATIENCE_SECONDS = 2.5
"""A host with a broken tunnel tries it for a second and a half before it answers."""


@click.command(
    "graph",
    epilog="Examples:\n\n\b\n  kgctl graph | circo -Tsvg > mesh.svg\n  kgctl graph -o svg > mesh.svg\n"
    "  kgctl graph -o mermaid          for a wiki\n  kgctl graph --plain             from etcd alone",
)
@click.option(
    "-o", "--output", type=click.Choice(("dot", "svg", "png", "mermaid", "json")), default="dot", show_default=True,
    help="svg and png are drawn by graphviz.",
)  # fmt: skip
@click.option("--plain", is_flag=True, help="Ask no host: the mesh as etcd has it, as Kilo draws it.")
@click.pass_obj
def graph_command(mesh: Mesh, output: str, plain: bool) -> None:
    """Print the mesh as a graph. Tunnels that are up are green, those that are not red; hosts that are gone are grey.

    The living agents report that on a request in etcd, which is deleted after the response.
    """
    from kilo_etcd.ctl.reports.draw import CannotDraw, graph_json, mermaid, picture
    from kilo_etcd.ctl.reports.live import edge_states
    from kilo_etcd.topology.graph import graph
    from kilo_etcd.topology.segments import build_topology

    if output == "png" and sys.stdout.isatty():
        raise Failure("a PNG is nothing to look at in a terminal: kgctl graph -o png > mesh.png")
    snapshot, live, gone = mesh.ask(partial(_read, plain=plain))
    if live is not None and live.refused:
        click.echo(f"kgctl: drawn without colours, since the hosts could not be asked: {live.refused}", err=True)
    topology = build_topology(snapshot)
    states = edge_states(topology, live) if live is not None else {}
    if output in ("mermaid", "json"):
        write = mermaid if output == "mermaid" else graph_json
        click.echo(write(topology, states, gone).rstrip("\n"))
        return
    dot = graph(topology, states, gone)
    if output == "dot":
        click.echo(dot.rstrip("\n"))
        return
    try:
        sys.stdout.buffer.write(picture(dot, output))
    except CannotDraw as error:
        raise Failure(str(error)) from None


async def _read(client: Client, keys: Keys, *, plain: bool) -> tuple[Snapshot, Live | None, frozenset[str] | None]:
    from kilo_etcd.ctl.reports.live import gather
    from kilo_etcd.store import operator
    from kilo_etcd.store.records import Role

    snapshot = (await operator.snapshot(client, keys))[0]
    if plain:
        return snapshot, None, None
    statuses = await operator.statuses(client, keys)
    # Members have no tunnels of their own.
    leaders = [name for name, status in statuses.items() if status.role is not Role.MEMBER]
    gone = frozenset(snapshot.nodes.keys() - statuses.keys())
    return snapshot, await gather(client, keys, leaders, patience=PATIENCE_SECONDS), gone
