"""`kgctl mesh`: what holds for the mesh as a whole. The settings granularity and internal-ips can be switched live; the
subnets cannot."""

from __future__ import annotations

import json
from enum import StrEnum

import click

from kilo_etcd.ctl.change import Edit, Outcome, carry_out, change_options
from kilo_etcd.ctl.commands.join import join_command, unjoin_command
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.group import Group
from kilo_etcd.ctl.output import output_option
from kilo_etcd.ctl.reports.render import shown_internal_ips
from kilo_etcd.etcd.api import Client
from kilo_etcd.model import CHOICES, Granularity, InternalIPs, Snapshot, parse_value
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import encode_adoption
from kilo_etcd.store.view import View
from kilo_etcd.topology.segments import Topology, build_topology
from kilo_etcd.topology.stages import Switch, switch


@click.group("mesh", cls=Group)
def mesh_group() -> None:
    """Show and change the settings of the mesh, and join it to another one."""


mesh_group.add_command(join_command)
mesh_group.add_command(unjoin_command)


@mesh_group.command("show")
@output_option
@click.pass_obj
def show_command(mesh: Mesh, output: str) -> None:
    """Show granularity, subnets, internal-ips, and how many nodes, locations and peers there are."""

    async def look(client: Client, keys: Keys) -> tuple[Topology, Switch | None]:
        topology = build_topology((await operator.snapshot(client, keys))[0])
        if switch(topology) is None:
            return topology, None
        return topology, switch(topology, await operator.statuses(client, keys))

    topology, far = mesh.ask(look)
    snapshot = topology.snapshot
    document = {
        "granularity": snapshot.granularity.value,
        "subnets": [str(subnet) for subnet in snapshot.subnets],
        "internalIps": snapshot.internal_ips.value,
        "internalIpsInForce": topology.internal_ips.value,
        "switch": None if far is None else str(far),
        "nodes": len(snapshot.nodes),
        "locations": len({node.location for node in snapshot.nodes.values()}),
        "peers": len(snapshot.peers),
        "rejected": len(snapshot.rejected),
        "revision": snapshot.revision,
    }
    if output == "json":
        click.echo(json.dumps(document, indent=2))
        return
    if not snapshot.subnets:
        raise Failure(f"there is no mesh under {mesh.prefix} yet: the first agent makes it")
    shown = shown_internal_ips(snapshot.internal_ips, topology.internal_ips, len(topology.unaware))
    document["internalIps"] = shown if far is None else f"{shown} ({far})"
    del document["internalIpsInForce"], document["switch"]
    names = {"internalIps": "internal-ips", "rejected": "rejected records"}
    for name, value in document.items():
        shown = ", ".join(value) if isinstance(value, list) else str(value)
        click.echo(f"{names.get(name, name) + ':':<20}{shown}")


_SETTINGS = click.Choice(("granularity", "internal-ips"))


def _setting(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """A click callback: a setting that can be changed; of the subnets it says why they cannot."""
    if value == "subnets":
        raise Failure(
            "the mesh's subnets are fixed: every node's address is from them; for other ones start a second mesh "
            "under another --prefix"
        )
    return _SETTINGS.convert(value, parameter, context)


@mesh_group.command(
    "set",
    help="Change a setting of the mesh, live.\n\n"
    f"granularity: {CHOICES[Granularity]}; the switch has a short gap everywhere. internal-ips: routed (what goes to "
    "internal IPs of other segments travels in the tunnels), encrypted (and nothing between two segments' nodes "
    "travels in clear), or off (mesh addresses and offered networks only).",
    epilog="Examples:\n\n\b\n"
    "  kgctl mesh set granularity full --dry-run\n"
    "  kgctl mesh set granularity location\n"
    "  kgctl mesh set internal-ips off",
)
@click.argument(
    "setting",
    metavar="{granularity|internal-ips}",
    callback=_setting,
    shell_complete=_SETTINGS.shell_complete,
)
@click.argument("value")
@change_options
@click.pass_obj
def set_command(mesh: Mesh, setting: str, value: str, dry_run: bool, yes: bool) -> None:
    """Change a setting of the mesh, live."""
    kind: type[StrEnum] = Granularity if setting == "granularity" else InternalIPs
    try:
        value = parse_value(kind, value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a value of {setting}: write {CHOICES[kind]}.") from None
    effect = "Every tunnel" if setting == "granularity" else "The routing to internal IPs"
    verb = "is drawn anew" if setting == "granularity" else "changes"

    def decide(before: Snapshot, _view: View, keys: Keys) -> Edit:
        nodes = len(before.nodes)
        key = keys.granularity if setting == "granularity" else keys.internal_ips
        return Edit(
            puts={key: value},
            asks=f"{effect} of {nodes} node{'' if nodes == 1 else 's'} {verb}. Continue?" if nodes else "",
        )

    if carry_out(mesh, decide, dry_run=dry_run, yes=yes) is Outcome.NOTHING:
        click.echo(f"Nothing to change: {setting} is {value} already.")


@mesh_group.command("adopt", epilog="Example:\n\n\b\n  kgctl --endpoints http://10.0.0.9:2379 mesh adopt --dry-run")
@change_options
@click.pass_obj
def adopt_command(mesh: Mesh, dry_run: bool, yes: bool) -> None:
    """Declare that this etcd is the mesh's, after it was restored from a backup or replaced.

    Agents that followed another etcd, or a later state of this one, keep what they have until this command is given.
    """
    from datetime import UTC, datetime

    async def look(client: Client, keys: Keys) -> tuple[Snapshot, int]:
        snapshot = (await operator.snapshot(client, keys))[0]
        return snapshot, len(await operator.locations(client, keys))

    snapshot, labels = mesh.ask(look)
    settings = f"subnets {', '.join(map(str, snapshot.subnets))}" if snapshot.subnets else "no settings of a mesh"
    held = f"{len(snapshot.nodes)} nodes, {labels} labels, {len(snapshot.peers)} peers, {settings}"
    click.echo(f"This etcd is cluster {snapshot.cluster_id:x} at revision {snapshot.revision}; {mesh.prefix}: {held}")
    click.echo("Agents that hold on to what they knew will follow it within seconds, and take away what is not in it.")
    moment = datetime.now(UTC).isoformat(timespec="milliseconds")

    def decide(_before: Snapshot, _view: View, keys: Keys) -> Edit:
        return Edit(
            puts={keys.adopted: encode_adoption(snapshot.cluster_id, moment)}, asks="Have all agents follow this etcd?"
        )

    if carry_out(mesh, decide, dry_run=dry_run, yes=yes, adopts=True) is Outcome.WRITTEN:
        click.echo("Adopted.")
