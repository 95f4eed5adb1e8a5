"""`kgctl connect --dry-run`: what would be different in the mesh, in sentences, and here, as `ip` and `wg` commands."""

from __future__ import annotations

import click

from kilo_etcd import etcd, kernel
from kilo_etcd.connect.connection import Edges, Settings, protected_plan, raw_plan
from kilo_etcd.connect.registration import DesiredPeer
from kilo_etcd.ctl.context import Failure
from kilo_etcd.ctl.impact import impact, new_trouble
from kilo_etcd.ctl.reports.render import clean
from kilo_etcd.model import Snapshot
from kilo_etcd.planning.exit_node import through
from kilo_etcd.runtime.discover import etcd_networks
from kilo_etcd.runtime.hostnames import known_names
from kilo_etcd.runtime.resolve import resolve_once, resolve_plan
from kilo_etcd.topology import build_topology


async def show(
    before: Snapshot, after: Snapshot, desired: DesiredPeer, settings: Settings, device: kernel.Kernel, edges: Edges,
    config: etcd.Config, prefix: str,
) -> None:  # fmt: skip
    """Print it; `before` and `after` are the mesh without and with this machine's record. Failure: it is refused."""
    if trouble := new_trouble(before, after):
        raise Failure("; ".join(trouble))
    for line in impact(before, after):
        click.echo(f"# {line}")
    facts = await edges.look()
    topology = build_topology(after)
    plan = raw_plan(topology, desired, settings, facts)
    plan = resolve_plan(plan, *await resolve_once(plan), facts.families())
    etcd_at = await etcd_networks(config)
    plan = protected_plan(plan, (*facts.underlay(), *etcd_at), after.subnets)
    within = plan
    if settings.exit_node is not None:
        plan = through(plan, topology, settings.exit_node, etcd_at)
    for problem in plan.problems:
        click.echo(f"# {clean(problem.text)}")
    for change in await device.preview(plan):
        click.echo(str(change))
    if settings.dns_hosts:
        for line in known_names(topology, within, prefix).described():
            click.echo(f"# {clean(line)}")
    click.echo("# nothing was changed (--dry-run)")
