"""`kgctl mesh join` and `unjoin`: two meshes joined, each one's segments as the other's outside peers (Kilo's
multi-cluster).

Each segment of one mesh becomes one peer of the other: its leader's key and endpoint, and all addresses and networks
behind it. So every node of one reaches every node of the other by the leaders of both. The peers are named after the
other mesh, by which they are known again: joining once more brings them up to date, and parting removes them. When a
leader changes they have to be brought up to date; `--follow` does that while it runs.

The meshes may live in one etcd under two prefixes, or in two. What overlaps is refused before anything is written; if
the second mesh cannot be written to, the first is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click
from attrs import evolve, frozen

from kilo_etcd.base.quoting import first_of, sentence
from kilo_etcd.ctl.change import Edit, Prepared, change_options, confirm, prepare
from kilo_etcd.ctl.commands.peer import parse_peer_name
from kilo_etcd.ctl.context import Failure, Mesh, run
from kilo_etcd.ctl.environment_file import used
from kilo_etcd.ctl.reports.render import clean
from kilo_etcd.ctl.watch_changes import watch_changes
from kilo_etcd.model import IPNetwork, Snapshot
from kilo_etcd.runtime.options import etcd_config, etcd_flags, etcd_values
from kilo_etcd.runtime.parsing import parse_prefix
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys, PeerKey
from kilo_etcd.store.records import PeerRecord, encode
from kilo_etcd.store.view import View
from kilo_etcd.topology.internal import Links

if TYPE_CHECKING:
    from kilo_etcd.topology.segments import Topology

F = TypeVar("F", bound=Callable[..., Any])

RETRY_SECONDS = 2.0

SHOWN = 5
"""How many overlaps are named; one is enough to begin with."""


def visitors(topology: Topology, label: str, hosts: Topology | None = None) -> dict[str, PeerRecord]:
    """What a mesh, called `label`, is to another, `hosts`: one peer for each segment, by name."""
    plain = (lambda _: False) if hosts is None else _unambiguous(hosts, label)
    return {
        f"{label}.{key.replace(', other family', '-other-family').replace(':', '.', 1).replace(' ', '_')}": PeerRecord(
            public_key=segment.leader.public_key,
            endpoint=segment.leader.endpoint,
            allowed_ips=tuple(n for n in segment.reach if n in segment.allowed or plain(n)),
            persistent_keepalive=segment.leader.persistent_keepalive,
        )
        for key, segment in sorted(topology.segments.items())
    }


def _unambiguous(hosts: Topology, label: str) -> Callable[[IPNetwork], bool]:
    """Whether an internal IP of the mesh called `label` can mean nothing else in another mesh: there it is a peer's
    network, which everybody routes."""
    links = Links.of(hosts.snapshot.nodes.values())

    def apart(network: IPNetwork) -> bool:
        address = network.network_address
        granted = hosts.allocation.granted_at(address)
        return (
            not links.hold(network.version, int(address))
            and not any(subnet.version == network.version and address in subnet for subnet in hosts.snapshot.subnets)
            and (granted is None or (granted.owner[0] == "peer" and granted.owner[1].startswith(f"{label}.")))
            and address not in hosts.internals.endpoints
        )

    return apart


def default_label(prefix: str) -> str:
    """What a mesh is called in the other by default: its prefix, with dashes."""
    return prefix.strip("/").replace("/", "-")


def overlaps(one: Topology, other: Topology, names: tuple[str, str]) -> Iterator[str]:
    """What cannot be told apart once they are joined, pair by pair; the meshes are called `names`."""
    for mine in _networks(one):
        for theirs in _networks(other):
            if mine.version == theirs.version and mine.overlaps(theirs):
                yield f"{mine} of {names[0]} overlaps {theirs} of {names[1]}"
    for giver, taker, (giver_name, taker_name) in ((one, other, names), (other, one, (names[1], names[0]))):
        for network in _networks(giver):
            for node in taker.snapshot.nodes.values():
                for internal in node.internal_ips:
                    if network.version == internal.version and network.overlaps(internal.network):
                        yield (
                            f"{network} of {giver_name} overlaps {internal.network}, which {node.name} of {taker_name} "
                            "is on"
                        )


def _networks(topology: Topology) -> Iterable[IPNetwork]:
    result = dict.fromkeys(topology.snapshot.subnets)
    for segment in topology.segments.values():
        result.update(dict.fromkeys(segment.networks))
    return result


@frozen(kw_only=True)
class Side:
    """One of the two meshes, and what it is called in the other."""

    mesh: Mesh
    label: str

    @property
    def name(self) -> str:
        """The mesh's prefix in etcd, by which reports tell the two apart."""
        return self.mesh.prefix


def _other_options(command: F) -> F:
    """`--other-prefix` and etcd's flags once more; what is not given is as for the first mesh."""
    for flag in reversed(list(etcd_flags())):
        if flag.name in ("--endpoints", "--cacert", "--cert", "--key", "--user", "--password"):
            name = f"--other-{flag.name.removeprefix('--')}"
            text = f"{flag.name} for the other mesh's etcd (default: as for the first)."
            command = click.option(name, f"other_{flag.parameter}", envvar=f"KILO_OTHER_{flag.parameter.upper()}",
                                   show_envvar=flag.secret, help=text)(command)  # fmt: skip
    for name, text in (
        ("--other-prefix", "The other mesh's prefix (default: this one's, in another etcd)."),
        ("--label", "What this mesh is called in the other (default: after its prefix)."),
        ("--other-label", "What the other mesh is called in this one (default: after its prefix)."),
    ):
        command = click.option(name, help=text)(command)
    return command


_CREDENTIALS = frozenset({"cacert", "cert", "key", "user", "password"})


def _sides(context: click.Context, options: dict[str, Any]) -> tuple[Side, Side]:
    mesh: Mesh = context.obj
    values = etcd_values(context.find_root())
    if options["other_endpoints"] and used(context):
        # The host's own credentials are for no other etcd than that of its file.
        values.update(dict.fromkeys(values.keys() & _CREDENTIALS, ""))
    values.update({name.removeprefix("other_"): value for name, value in options.items() if value is not None
                   and name.removeprefix("other_") in values})  # fmt: skip
    if options["other_endpoints"]:
        values.update(discovery_srv="", discovery_srv_name="")
    try:
        prefix = parse_prefix(options["other_prefix"]) if options["other_prefix"] else mesh.prefix
    except ValueError as error:
        raise click.BadParameter(sentence(error), param_hint="--other-prefix") from None
    config = etcd_config(**values)
    if not options["other_endpoints"]:
        config = evolve(config, more_endpoints=mesh.etcd.more_endpoints)
    other = Mesh(config, prefix)
    if other == mesh:
        raise click.UsageError("These are one and the same mesh: give --other-prefix, or --other-endpoints.")
    labels = [options["label"] or default_label(mesh.prefix), options["other_label"] or default_label(prefix)]
    if labels[0] == labels[1]:
        raise click.UsageError(f"Both meshes would be called {labels[0]}: give them names, --label and --other-label.")
    for label in labels:
        try:
            parse_peer_name(label)
        except ValueError:
            raise click.UsageError(f"{label!r} is no name for a mesh; leave out '/' and white space.") from None
    return Side(mesh=mesh, label=labels[0]), Side(mesh=other, label=labels[1])


_EXAMPLES = (
    "Examples:\n\n\b\n  kgctl --prefix /a mesh {} --other-prefix /b\n"
    "  kgctl mesh {} --other-endpoints https://etcd.example.org:2379 --other-label office"
)


@click.command("join", epilog=_EXAMPLES.format("join", "join"))
@_other_options
@click.option("--follow", is_flag=True, help="Keep running, and update the peers when leaders change, until Ctrl-C.")
@change_options
@click.pass_context
def join_command(context: click.Context, /, dry_run: bool, yes: bool, follow: bool, **options: Any) -> None:
    """Join this mesh and another: every segment of one becomes a peer of the other, both ways.

    Joining again updates the peers. That is needed when a leader changes; --follow does it.
    """
    one, other = _sides(context, options)
    written = _carry_out(one, other, _joined, dry_run=dry_run, ask="" if yes or follow else "Join the two meshes?")
    click.echo("The meshes are joined." if written else "Nothing was written (--dry-run)." if dry_run else
               "Nothing to change: the meshes are joined already.")  # fmt: skip
    if follow and not dry_run:
        _follow(one, other)


@click.command("unjoin", epilog=_EXAMPLES.format("unjoin", "unjoin"))
@_other_options
@change_options
@click.pass_context
def unjoin_command(context: click.Context, /, dry_run: bool, yes: bool, **options: Any) -> None:
    """Undo mesh join: each mesh removes the peers that are the other's segments."""
    one, other = _sides(context, options)
    written = _carry_out(one, other, _parted, dry_run=dry_run, ask="" if yes else "Part the two meshes?")
    click.echo("The meshes are parted." if written else "Nothing was written (--dry-run)." if dry_run else
               "Nothing to change: the meshes are not joined.")  # fmt: skip


Peers = dict[str, PeerRecord]
DesiredPeers = Callable[[Side, Side], tuple[Peers, Peers]]
"""(one mesh, the other) -> the peers that each of them shall have of the other. Failure."""


def _joined(one: Side, other: Side) -> tuple[Peers, Peers]:
    here, there = _topology(one), _topology(other)
    if overlapping := list(overlaps(here, there, (one.label, other.label))):
        raise Failure(
            f"{first_of(overlapping, SHOWN, '; ')}: a network can be in one of the meshes only, so one has to be "
            f"made with "
            "another --subnet, or its annotations changed; nothing was written"
        )
    for side, topology in ((other, there), (one, here)):
        if not topology.segments:
            raise Failure(f"there is no node under {side.name}: its first agent makes the mesh; nothing was written")
    return visitors(there, other.label, here), visitors(here, one.label, there)


def _parted(_one: Side, _other: Side) -> tuple[Peers, Peers]:
    return {}, {}


def _topology(side: Side) -> Topology:
    from kilo_etcd.topology.segments import build_topology

    return build_topology(side.mesh.ask(operator.snapshot)[0])


def _carry_out(one: Side, other: Side, desired_peers: DesiredPeers, *, dry_run: bool, ask: str) -> bool:
    """Have both meshes know what they shall of each other; whether anything was written. Failure."""
    of_other, of_one = desired_peers(one, other)
    prepared = [
        (side, change)
        for side, far, peers in ((one, other, of_other), (other, one, of_one))
        if (change := prepare(side.mesh, partial(_edit, far.label, peers))) is not None
    ]
    for side, change in prepared:
        click.echo(f"In {clean(side.name)}:")
        for line in change.lines:
            click.echo(f"  {line}")
    if dry_run or not prepared:
        return False
    if ask:
        confirm(ask)
    _write([change for _, change in prepared])
    return True


def _write(changes: list[Prepared]) -> None:
    changes[0].write()
    for change in changes[1:]:
        try:
            change.write()
        except Failure as failure:
            restored = False
            with suppress(Failure):
                restored = changes[0].take_back()
            hint = "" if restored else f"; {changes[0].mesh.prefix} could not be restored: run the opposite command"
            raise Failure(f"{change.mesh.prefix}: {failure.message}{hint}") from None


def _edit(label: str, peers: dict[str, PeerRecord], _before: Snapshot, view: View, keys: Keys) -> Edit:
    puts = {keys.peer(name): encode(record).decode() for name, record in peers.items()}
    held = (keys.parse(kv.key) for kv in view.kvs(keys.peers_root))
    ours = (
        key.name
        for key in held
        if isinstance(key, PeerKey) and key.name.startswith((f"{label}.location", f"{label}.node."))
    )
    return Edit(
        puts=puts,
        deletes=tuple(sorted(keys.peer(name) for name in ours if name not in peers)),
        refuses_trouble=bool(peers),
    )


def _follow(one: Side, other: Side) -> None:
    """Join again after each change in either mesh, forever. A failure is printed, and the next attempt follows."""
    import trio

    async def follow() -> None:
        changed = trio.Event()

        async def watch(side: Side) -> None:
            from kilo_etcd.etcd.client import open_client

            async with open_client(side.mesh.etcd) as client:
                await watch_changes(client, Keys(side.mesh.prefix).root, changed_now, retry=RETRY_SECONDS)

        def changed_now() -> None:
            changed.set()

        last = ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, one)
            nursery.start_soon(watch, other)
            while True:
                await changed.wait()
                changed = trio.Event()
                try:
                    await trio.to_thread.run_sync(
                        partial(_carry_out, one, other, _joined, dry_run=False, ask=""), abandon_on_cancel=True
                    )
                    last = ""
                except Failure as failure:
                    if failure.message != last:
                        last = failure.message
                        click.echo(f"kgctl: {last}; trying again", err=True)
                    await trio.sleep(RETRY_SECONDS)
                    changed.set()

    run(follow)
