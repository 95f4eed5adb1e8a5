"""`kgctl connect --dry-run`: what would be different in the mesh, in sentences, and here, as `ip` and `wg` commands."""

from __future__ import annotations

import click

from kilo_etcd import kernel
from kilo_etcd.connect.connection import Edges, Settings, peer_options
from kilo_etcd.connect.registration import DesiredPeer
from kilo_etcd.ctl.context import Failure
from kilo_etcd.ctl.impact import impact, new_trouble
from kilo_etcd.ctl.reports.render import clean
from kilo_etcd.model import Snapshot
from kilo_etcd.planning.peerplan import peer_plan
from kilo_etcd.planning.pipeline import peer_plans
from kilo_etcd.runtime.hostnames import known_names
from kilo_etcd.runtime.resolve import etcd_networks, resolve_once
from kilo_etcd.topology.segments import build_topology


async def show(
    before: Snapshot, after: Snapshot, desired: DesiredPeer, settings: Settings, device: kernel.Kernel, edges: Edges,
    prefix: str,
) -> None:  # fmt: skip
    """Print it; `before` and `after` are the mesh without and with this machine's record. Failure: it is refused."""
    if trouble := new_trouble(before, after):
        raise Failure("; ".join(trouble))
    for line in impact(before, after):
        click.echo(f"# {line}")
    facts = await edges.look()
    topology = build_topology(after)
    table, failed = await resolve_once(peer_plan(topology, desired.name))
    surroundings = facts.surroundings(await etcd_networks(settings.endpoints), table, failed)
    plans = peer_plans(topology, desired.name, peer_options(topology, desired, settings, facts), surroundings)
    for problem in plans.final.problems:
        click.echo(f"# {clean(problem.text)}")
    for change in await device.preview(plans.final):
        click.echo(str(change))
    if settings.dns_hosts:
        for line in known_names(topology, plans.filtered, prefix).described():
            click.echo(f"# {clean(line)}")
    click.echo("# nothing was changed (--dry-run)")
