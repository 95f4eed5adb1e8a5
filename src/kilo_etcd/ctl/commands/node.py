"""`kgctl node`: the hosts of the mesh: a list, everything about one, forgetting one that is gone for good, and giving
one another name.

`show` computes the node's own plan as its agent does: the peers and routes that its kernel should hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from kilo_etcd.ctl.change import Edit, Outcome, carry_out, carry_out_each, change_options
from kilo_etcd.ctl.commands import complete
from kilo_etcd.ctl.commands.annotate import node_argument
from kilo_etcd.ctl.commands.peer import checked
from kilo_etcd.ctl.commands.status import look, read_mesh
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.group import Group
from kilo_etcd.ctl.node_edits import forgetting, forgetting_each, renaming
from kilo_etcd.ctl.output import output_option, show
from kilo_etcd.ctl.reports.render import NONE, Table, clean, shown_location
from kilo_etcd.ctl.reports.report import NodeRow, remarks_on
from kilo_etcd.etcd.api import Client
from kilo_etcd.model import Snapshot
from kilo_etcd.runtime.parsing import parse_duration, parse_node_name, parse_own_name, shown_duration
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys, encode_name
from kilo_etcd.store.view import View

if TYPE_CHECKING:
    from kilo_etcd.ctl.reports.own_addresses import OwnAddress
    from kilo_etcd.model.hostplan import HostPlan
    from kilo_etcd.store.records import StatusRecord
    from kilo_etcd.store.silence import Claiming


@click.group("node", cls=Group)
def node_group() -> None:
    """List the nodes, show one, forget one that is gone for good, rename one."""


@node_group.command("list")
@click.option(
    "--claims", is_flag=True, help="List instead who claims mesh addresses, and for how long agents have been silent."
)
@output_option
@click.pass_obj
def list_command(mesh: Mesh, claims: bool, output: str) -> None:
    """List the nodes, with location, role, and whether their agents live."""
    if claims:
        _list_claims(mesh.ask(_look_at_claims), output)
        return
    report = mesh.ask(read_mesh)
    if output == "json":
        documents = [
            {"node": row.name, "location": row.location, "role": row.role, "alive": row.alive,
             "meshAddresses": list(row.mesh_addresses), "endpoint": row.endpoint}
            for row in report.nodes
        ]  # fmt: skip
        click.echo(json.dumps(documents, indent=2, ensure_ascii=False))
        return
    rows = tuple(
        (
            clean(row.name),
            shown_location(row.location),
            row.role,
            "alive" if row.alive else "gone",
            ", ".join(row.mesh_addresses) or NONE,
        )
        for row in report.nodes
    )
    show([Table("", ("NODE", "LOCATION", "ROLE", "AGENT", "MESH ADDRESS"), rows, "No node has registered yet.")])


async def _look_at_claims(client: Client, keys: Keys) -> tuple[Claiming, ...]:
    from kilo_etcd.store.silence import claiming

    living = await operator.statuses(client, keys)
    _, view = await operator.snapshot(client, keys)
    return await claiming(client, keys, view, living.keys())


def _list_claims(nodes: tuple[Claiming, ...], output: str) -> None:
    if output == "json":
        documents = [
            {"node": node.name, "addresses": list(map(str, node.addresses)), "registered": node.registered,
             "reserved": node.reserved, "alive": node.alive, "silentSeconds": node.silent}
            for node in nodes
        ]  # fmt: skip
        click.echo(json.dumps(documents, indent=2, ensure_ascii=False))
        return
    rows = tuple(
        (clean(node.name), _listed(node.addresses), "yes" if node.registered else "no", _silence(node) + _kept(node))
        for node in nodes
    )
    show([Table("", ("NODE", "CLAIMED ADDRESS", "RECORD", "AGENT"), rows, "Nobody claims an address yet.")])


def _kept(node: Claiming) -> str:
    return "" if node.alive or node.registered or node.reserved else "; another node may take its address"


def _silence(node: Claiming) -> str:
    if node.alive:
        return "alive"
    if node.reserved and not node.registered and not node.silent:
        return "joining, or an agent keeps its addresses without a record"
    silent = f"silent for {shown_duration(node.silent)} at least"
    return silent if node.registered else f"joining, or {silent}"


@frozen(kw_only=True)
class Shown:
    """All that `kgctl node show` says."""

    row: NodeRow
    facts: tuple[tuple[str, str], ...]
    plan: HostPlan | None
    addresses: tuple[OwnAddress, ...]
    """How others reach the node under `encrypted`."""
    remarks: tuple[str, ...]


@node_group.command("show", epilog="Example:\n\n\b\n  kgctl node show node-1")
@click.argument("node", callback=node_argument, shell_complete=complete.nodes)
@output_option
@click.pass_obj
def show_command(mesh: Mesh, node: str, output: str) -> None:
    """Show NODE: its record with its annotations, and the peers and routes that its kernel should hold.

    Under internal-ips=encrypted also the routes of the table that leads into the tunnels, and which addresses of NODE
    others reach through the tunnels or in clear, and why.
    """
    from kilo_etcd.ctl.reports.own_addresses import own_addresses_of
    from kilo_etcd.ctl.reports.trace import Plans

    looked = mesh.ask(look)
    snapshot, report = looked.topology.snapshot, looked.report(about={node})
    row = next(iter(report.nodes), None)
    if row is None:
        raise Failure(f"there is no node {node}; kgctl node list lists them")
    in_force = node in snapshot.nodes
    part = encode_name(node)
    aside = [f"{note.key}: {note.reason}" for note in snapshot.rejected if part in note.key.split("/")]
    shown = Shown(
        row=row,
        facts=_facts(snapshot, node, looked.statuses.get(node)),
        plan=Plans(looked.topology, looked.statuses).of_kernel(node) if in_force else None,
        addresses=tuple(own_addresses_of(looked.topology, node)) if in_force else (),
        remarks=(*(text for _, text in remarks_on(report, {node})), *aside),
    )
    click.echo(_json(shown)) if output == "json" else show(_tables(shown), _heading(row))


def _heading(row: NodeRow) -> str:
    alive = "its agent lives" if row.alive else "its agent does not report"
    revision = f" and has applied revision {row.revision}" if row.revision is not None else ""
    place = "" if row.location is None else f" in {shown_location(row.location)}"
    return f"{clean(row.name)}: {row.role}{place}; {alive}{revision}"


def _facts(snapshot: Snapshot, name: str, status: StatusRecord | None) -> tuple[tuple[str, str], ...]:
    node = snapshot.nodes.get(name)
    if node is None:
        return ()
    keepalive = node.persistent_keepalive
    return (
        ("public key", node.public_key),
        ("mesh address", _listed(node.mesh_addresses)),
        ("internal IP", _listed(node.internal_ips)),
        ("endpoint", ", ".join(map(str, node.endpoints)) or NONE),
        ("observed endpoints", _listed(node.observed_endpoints)),
        ("port", str(node.port)),
        ("own default location", shown_location(node.default_location) if node.default_location else NONE),
        ("preferred as leader", "yes" if node.leader_wanted else "no"),
        ("advertised as exit node", "yes" if node.advertises_exit_node else "no"),
        ("leaves by", clean(node.exit_node) or "its own network"),
        ("persistent keepalive", f"{keepalive} s" if keepalive else NONE),
        ("networks behind it", _listed(node.subnets)),
        ("networks of its location", _listed(node.allowed_location_ips)),
        ("inside its location", node.encapsulate.value),
        ("stage of encrypted", NONE if node.encryption is None else node.encryption.value),
        ("exempted (--clear)", "not reported" if status is None or status.clear is None else _listed(status.clear)),
        ("version", clean(node.version) or NONE),
    )


def _listed(items: tuple[Any, ...]) -> str:
    return ", ".join(map(str, items)) or NONE


def _tables(shown: Shown) -> list[Table]:
    tables = [Table("", ("WHAT", "VALUE"), shown.facts)]
    if shown.plan is not None:
        peers = sorted(shown.plan.peers.values(), key=lambda peer: peer.name)
        rows = tuple(
            (clean(p.name), str(p.endpoint) if p.endpoint is not None else NONE, _listed(p.allowed_ips)) for p in peers
        )
        tables.append(Table("WireGuard peers it should have", ("PEER", "ENDPOINT", "ALLOWED IPS"), rows))
        routes = tuple(
            (str(r.destination), r.via.value, str(r.gateway) if r.gateway is not None else NONE)
            for r in shown.plan.routes.values()
        )
        tables.append(Table("Routes it should have", ("TO", "VIA", "GATEWAY"), routes))
        tables += _encrypted_tables(shown.plan, shown.addresses)
    tables.append(Table("What is wrong", ("REMARK",), tuple((clean(text),) for text in shown.remarks)))
    return [table for table in tables if table.rows]


def _encrypted_tables(plan: HostPlan, addresses: tuple[OwnAddress, ...]) -> Iterator[Table]:
    yield Table(
        "Which of its addresses others reach through the tunnels",
        ("ADDRESS", "IS ITS", "REACHED", "WHY"),
        tuple(
            (
                str(address.address),
                "internal IP" if address.internal else "endpoint",
                "through the tunnels"
                if not address.in_clear
                else f"in clear from {clean(', '.join(address.not_from)) or 'everywhere'}",
                clean(address.why) or NONE,
            )
            for address in addresses
        ),
    )
    if (encryption := plan.encryption) is None:
        return
    from kilo_etcd.ctl.reports.trace import encrypted_table

    rows = [
        (
            str(route.destination),
            route.via.value,
            NONE if route.gateway is None else str(route.gateway),
            NONE if route.source is None else str(route.source),
        )
        for route in encryption.send.values()
    ]
    rows += [
        (str(network), "dropped: no way into the tunnel", NONE, NONE) for network in sorted(encryption.hold, key=str)
    ]
    yield Table(
        f"Routes it should have in table {encrypted_table()}", ("TO", "VIA", "GATEWAY", "FROM"), tuple(sorted(rows))
    )


def _encrypted_json(shown: Shown) -> dict[str, Any] | None:
    encryption = None if shown.plan is None else shown.plan.encryption
    if encryption is None:
        return None
    return {
        "addresses": [
            {"address": str(address.address), "internalIp": address.internal, "inClear": address.in_clear,
             "notFrom": list(address.not_from), "why": address.why or None}
            for address in shown.addresses
        ],
        "routes": [
            {"to": str(r.destination), "via": r.via.value, "gateway": str(r.gateway) if r.gateway else None,
             "source": str(r.source) if r.source else None}
            for r in encryption.send.values()
        ],
        "dropped": sorted(map(str, encryption.hold)),
    }  # fmt: skip


def _json(shown: Shown) -> str:
    plan = shown.plan
    return json.dumps(
        {
            "node": shown.row.name,
            "location": shown.row.location,
            "role": shown.row.role,
            "alive": shown.row.alive,
            "revision": shown.row.revision,
            "facts": {name.replace(" ", "_"): value for name, value in shown.facts},
            "peers": [
                {"name": p.name, "publicKey": p.public_key, "endpoint": str(p.endpoint) if p.endpoint else None,
                 "allowedIPs": list(map(str, p.allowed_ips)), "persistentKeepalive": p.persistent_keepalive}
                for p in (sorted(plan.peers.values(), key=lambda p: p.name) if plan is not None else ())
            ],
            "routes": [
                {"to": str(r.destination), "via": r.via.value, "gateway": str(r.gateway) if r.gateway else None}
                for r in (plan.routes.values() if plan is not None else ())
            ],
            "encrypted": _encrypted_json(shown),
            "remarks": list(shown.remarks),
        },
        indent=2, ensure_ascii=False,
    )  # fmt: skip


def _age(text: str) -> float:
    seconds = parse_duration(text)
    if not seconds > 0:
        raise ValueError("the time is zero; write for instance 24h or 7d")
    return seconds


@node_group.command(
    "forget", epilog="Examples:\n\n\b\n  kgctl node forget node-7\n  kgctl node forget --dead-for 24h --dry-run"
)
@click.argument("node", required=False, callback=checked(parse_node_name), shell_complete=complete.nodes)
@click.option(
    "--dead-for", "age", metavar="TIME", callback=checked(_age),
    help="Forget all nodes whose agents have been silent for so long at least: 24h, 7d.",
)  # fmt: skip
@click.option("--keep-labels", is_flag=True, help="Keep its label and annotations, for a host of this name to come.")
@change_options
@click.pass_obj
def forget_command(
    mesh: Mesh, node: str | None, age: float | None, keep_labels: bool, dry_run: bool, yes: bool
) -> None:  # fmt: skip
    """Remove NODE from the mesh now; its record would otherwise stay until its lease ends (--forget-after).

    Use it for a host that is gone for good. Its label and annotations go too. It is refused while the node's agent
    lives, since the node would come back at once.

    With --dead-for no name is needed: it takes the nodes whose records nobody has kept alive for so long, and names
    that claim mesh addresses and have no record any more. Of these it is known only that they were silent for
    --forget-after (24 h by default), so a longer TIME does not take them. Their labels and annotations stay, since such
    a name may also be that of a host that joins just now. kgctl node list --claims shows what is known.
    """
    if (node is None) == (age is None):
        raise click.UsageError("Give a NODE, or --dead-for TIME.")
    if node is not None:

        def decide(_before: Snapshot, view: View, keys: Keys) -> Edit:
            return forgetting(node, view, keys, keep_labels=keep_labels)

        if carry_out(mesh, decide, dry_run=dry_run, yes=yes) is Outcome.WRITTEN:
            click.echo(f"{clean(node)} is forgotten.")
        return

    def dead() -> list[Claiming]:
        return [each for each in mesh.ask(_look_at_claims) if not each.alive and age is not None and each.silent >= age]

    silent = dead()
    if not silent:
        click.echo("Nothing to change: no agent is known to have been silent for so long (kgctl node list --claims).")
        return
    for each in silent:
        click.echo(f"{clean(each.name)}: {_silence(each)}; {_listed(each.addresses)}")

    def decide_each(_before: Snapshot, view: View, keys: Keys) -> Mapping[str, Edit]:
        return forgetting_each([each.name for each in silent], view, keys, keep_labels=keep_labels)

    carry_out_each(
        mesh,
        decide_each,
        question=lambda count: f"{count} {'node leaves' if count == 1 else 'nodes leave'} the mesh. Continue?",
        still=lambda: [each.name for each in dead()],
        done="forgotten.",
        dry_run=dry_run,
        yes=yes,
    )


@node_group.command("rename", epilog="Example:\n\n\b\n  kgctl node rename node-7 node-7.example.net")
@click.argument("old", callback=node_argument, shell_complete=complete.nodes)
@click.argument("new", callback=checked(parse_own_name), shell_complete=complete.nodes)
@change_options
@click.pass_obj
def rename_command(mesh: Mesh, old: str, new: str, dry_run: bool, yes: bool) -> None:
    """Move what is set for OLD to NEW, after its host was given that name: label, annotations, and the exit-node of
    other nodes that is OLD.

    The host's agent takes its own records over when it starts under the new name. What it left under the old one, as
    where etcd does not let it write there, goes. It is refused while OLD's agent lives.
    """

    def decide(_before: Snapshot, view: View, keys: Keys) -> Edit:
        return renaming(old, new, view, keys)

    if carry_out(mesh, decide, dry_run=dry_run, yes=yes) is Outcome.WRITTEN:
        click.echo(f"{clean(old)} is {clean(new)} now.")
