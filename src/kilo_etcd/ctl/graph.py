"""`kgctl graph`: the mesh as it is meant to be, in DOT, for graphviz to draw."""

from __future__ import annotations

import click

from kilo_etcd.ctl.context import Mesh
from kilo_etcd.model import Snapshot


@click.command("graph")
@click.pass_obj
def graph_command(mesh: Mesh) -> None:
    """Print the mesh as a graph, in DOT.

    To see it: kgctl graph | circo -Tsvg > mesh.svg
    """
    from kilo_etcd.store import operator
    from kilo_etcd.topology import build_topology
    from kilo_etcd.topology.graph import graph

    snapshot: Snapshot = mesh.ask(operator.snapshot)[0]
    click.echo(graph(build_topology(snapshot)).rstrip("\n"))
