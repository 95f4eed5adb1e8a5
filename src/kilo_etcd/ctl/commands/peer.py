"""`kgctl peer`: WireGuard endpoints outside the mesh's hosts: a laptop, a phone, a router, another mesh.

A peer is checked before anything is written, by the rules that the agents themselves apply: what they would reject
or not give in full is refused. Kilo's Peer manifests are read as they are. A private key never goes to etcd.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kilo_etcd.base.quoting import sentence, shown, shown_path
from kilo_etcd.ctl.change import MOST, Edit, Outcome, carry_out, change_options
from kilo_etcd.ctl.commands import complete
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.formats.manifest import NamedPeer, as_text, exact_network, manifest, read_peers
from kilo_etcd.ctl.group import Group
from kilo_etcd.ctl.output import show
from kilo_etcd.ctl.reports.render import NONE, Table, clean
from kilo_etcd.model import Endpoint, Snapshot
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys, PeerKey
from kilo_etcd.store.records import PeerRecord, RecordError, check_key, decode_peer, encode, parse_keepalive
from kilo_etcd.store.view import View

if TYPE_CHECKING:
    from kilo_etcd.ctl.formats.wgconf import Configuration
    from kilo_etcd.etcd.api import Client

FORMATS = ("table", "json", "yaml")
MAX_FILE = 1024 * 1024
"""Bytes that are read of a file: 8 KiB for each of the peers that one transaction takes."""


def parse_peer_name(text: str) -> str:
    """A peer's name: one part of an etcd key that a person types. ValueError, in one clause."""
    if not text:
        raise ValueError("the peer's name is empty")
    if "/" in text or any(c.isspace() or not c.isprintable() for c in text):
        raise ValueError(f"{shown(text)} is no peer name; leave out '/', white space and control characters")
    if len(text.encode()) > 253:
        raise ValueError("the peer's name is longer than 253 bytes")
    return text


def checked(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A click callback that refuses what `parse` refuses; tuples are parsed one by one, None stays."""

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            if value is None:
                return None
            return tuple(map(parse, value)) if isinstance(value, tuple) else parse(value)
        except ValueError as error:
            raise click.BadParameter(sentence(error), context, parameter) from None

    return callback


def parse_allowed(text: str) -> tuple[Any, ...]:
    """Comma-separated networks."""
    return tuple(dict.fromkeys(exact_network(part) for part in text.split(",") if part.strip()))


PEER_NAME = checked(parse_peer_name)
format_option = click.option(
    "-o", "--output", type=click.Choice(FORMATS), default="table", help="The output format; json and yaml: Kilo's Peer."
)


@click.group("peer", cls=Group)
def peer_group() -> None:
    """Add, list, show and remove peers: laptops, phones, routers, other meshes."""


@peer_group.command(
    "add",
    epilog="Examples:\n\n\b\n"
    '  kgctl peer add laptop --public-key "$(wg pubkey <key)" --allowed-ips 10.9.0.2\n'
    "  kgctl peer add phone --allowed-ips 10.9.0.3 --generate --qr\n"
    "  kgctl peer add laptop --allowed-ips 10.9.0.2 --generate > laptop.conf\n"
    "  kgctl peer add -f peers.yaml\n"
    "  kubectl get peers -o yaml | kgctl peer add -f -",
)
@click.argument("name", required=False, callback=PEER_NAME)
@click.option("--public-key", callback=checked(check_key), help="Its WireGuard public key, as wg pubkey prints it.")
@click.option("--allowed-ips", callback=checked(parse_allowed), help="The networks behind it, comma-separated.")
@click.option(
    "--endpoint",
    callback=checked(Endpoint.parse),
    help="Where it is reached, host:port. Without it, the peer has to connect first.",
)
@click.option("--persistent-keepalive", callback=checked(parse_keepalive), help="Seconds; 25 for one behind NAT.")
@click.option("--preshared-key-file", type=click.Path(path_type=Path), help="A file with a preshared key.")
@click.option("--generate", is_flag=True, help="Make its private key here and print its configuration for wg-quick.")
@click.option("--qr", is_flag=True, help="With --generate: print the configuration as a QR code, for a phone.")
@click.option(
    "-f", "--file", "file", help="Read peers from this file, or - for standard input: YAML or JSON, Kilo's Peer."
)
@click.option("--replace", is_flag=True, help="Replace a peer that is there already.")
@change_options
@click.pass_obj
def add_command(
    mesh: Mesh,
    name: str | None,
    public_key: str | None,
    allowed_ips: tuple[Any, ...] | None,
    endpoint: Endpoint | None,
    persistent_keepalive: int | None,
    preshared_key_file: Path | None,
    generate: bool,
    qr: bool,
    file: str | None,
    replace: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Add peer NAME, or the peers of a file. All of them, or none if one is refused."""
    private: str | None = None
    if file is not None:
        if generate or any(
            value is not None for value in (public_key, allowed_ips, endpoint, persistent_keepalive, preshared_key_file)
        ):
            raise click.UsageError("With --file all is in the file; leave the other options out.")
        peers = _from_file(file, name)
    else:
        if name is None:
            raise click.UsageError("Give the peer a NAME, or read peers with --file.")
        if generate == (public_key is not None):
            raise click.UsageError("Give its --public-key, or have its keys made here with --generate.")
        if qr and not generate:
            raise click.UsageError("--qr goes with --generate: only then is there a whole configuration to show.")
        if not allowed_ips:
            raise click.UsageError("Give --allowed-ips: the address of the peer in the mesh, such as 10.9.0.2.")
        if generate:
            from kilo_etcd.runtime import key_file

            private = key_file.generate()
            public_key = key_file.public_key(private)
        assert public_key is not None
        record = PeerRecord(
            public_key=public_key,
            allowed_ips=allowed_ips,
            endpoint=endpoint,
            persistent_keepalive=persistent_keepalive or 0,
            preshared_key=None if preshared_key_file is None else _key_in(preshared_key_file),
        )
        peers = (NamedPeer(name, record),)
    names = [peer.name or "" for peer in peers]

    def decide(before: Snapshot, view: View, keys: Keys) -> Edit:
        for peer in peers:
            if (clash := _clash(peer, before, frozenset(names))) is not None:
                raise Failure(f"peer {peer.name}: {clash}; nothing was written")
        puts = {keys.peer(peer.name or ""): encode(peer.record).decode() for peer in peers}
        for peer_name, (key, value) in zip(names, puts.items(), strict=True):
            held = view.kv(key)
            if held is not None and held.value.decode(errors="replace") != value and not replace:
                raise Failure(
                    f"there is a peer {peer_name} already; --replace replaces it, kgctl peer show {peer_name} shows it"
                )
        return Edit(puts=puts, refuses_trouble=True)

    # With --generate standard output is the configuration, and nothing else.
    outcome = carry_out(mesh, decide, dry_run=dry_run, yes=yes, aside=private is not None)
    for peer_name in names:
        if outcome is not Outcome.DRY_RUN:
            click.echo(f"peer {clean(peer_name)}: {'added' if outcome is Outcome.WRITTEN else 'is so already'}",
                       err=private is not None)  # fmt: skip
    if private is not None and outcome is Outcome.WRITTEN:
        _print_configuration(mesh, names[0], private, qr=qr)


def _clash(peer: NamedPeer, snapshot: Snapshot, replaced: frozenset[str]) -> str | None:
    """What of the mesh's own, or of a peer that is not among `replaced`, it would take; None: nothing. In one clause.

    Rarer clashes are found by the agents' own rules (`Edit.refuses_trouble`).
    """
    other_peers = [other for name, other in sorted(snapshot.peers.items()) if name not in replaced]
    for owner, key in (
        *((f"node {node.name}", node.public_key) for node in snapshot.nodes.values()),
        *((f"peer {other.name}", other.public_key) for other in other_peers),
    ):
        if key == peer.record.public_key:
            return f"its public key is that of {owner}; make it a key of its own (wg genkey, or --generate)"
    for network in peer.record.allowed_ips:
        if network.prefixlen == 0:
            return (
                f"{network} is a default route, which no host routes; for an exit node use kgctl annotate NODE "
                f"advertise-exit-node=true"
            )
        for subnet in snapshot.subnets:
            if network.version == subnet.version and network.overlaps(subnet):
                return f"{network} overlaps the mesh's subnet {subnet}, whose addresses nodes claim; choose another"
        if network.num_addresses == 1:
            # A wider one may be a location's network, which the peer is to carry.
            for node in snapshot.nodes.values():
                if any(ip.ip == network.network_address for ip in node.internal_ips):
                    return f"{network.network_address} is the internal IP of node {node.name}; choose another address"
        for other in other_peers:
            for theirs in other.allowed_ips:
                if network.version == theirs.version and network.overlaps(theirs):
                    return f"{network} overlaps {theirs} of peer {other.name}; choose another"
    return None


def _from_file(file: str, name: str | None) -> tuple[NamedPeer, ...]:
    text = read_text(file)
    try:
        peers = read_peers(text, "standard input" if file == "-" else file)
    except ValueError as error:
        raise Failure(f"{error}; nothing was written") from None
    if len(peers) > MOST:
        raise Failure(f"there are {len(peers)} peers in it, and one transaction of etcd's takes {MOST}: split it")
    if name is not None:
        if len(peers) != 1:
            raise Failure(f"there are {len(peers)} peers in it, which cannot all be called {name}")
        peers = (NamedPeer(name, peers[0].record),)
    names_seen: set[str] = set()
    for peer in peers:
        if peer.name is None:
            raise Failure("a peer in it has no name (metadata.name): give it one, or NAME on the command line")
        try:
            parse_peer_name(peer.name)
        except ValueError as error:
            raise Failure(f"{error}; nothing was written") from None
        if peer.name in names_seen:
            raise Failure(f"two peers in it are called {peer.name}; nothing was written")
        names_seen.add(peer.name)
    return peers


def read_text(file: str) -> str:
    """The text of a file, or of standard input for `-`. Failure if it cannot be read, or is larger than any that is of
    use here."""
    source = "standard input" if file == "-" else file
    try:
        if file == "-":
            raw = sys.stdin.buffer.read(MAX_FILE + 1)
        else:
            with Path(file).open("rb") as opened:
                raw = opened.read(MAX_FILE + 1)
    except OSError as error:
        raise Failure(f"{shown_path(file)} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_FILE:
        raise Failure(f"{source} is larger than {MAX_FILE} bytes; split it")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Failure(f"{source} is not UTF-8 text") from None


def _key_in(path: Path) -> str:
    try:
        return check_key(read_text(str(path)).strip())
    except ValueError:
        # The key itself is a secret, so it is not repeated.
        raise Failure(f"{path} holds no WireGuard key (32 bytes in base64, as wg genpsk prints them)") from None


def _print_configuration(mesh: Mesh, name: str, private: str, *, qr: bool) -> None:
    from kilo_etcd.ctl.formats.wgconf import of_peer, text
    from kilo_etcd.topology.segments import build_topology

    try:
        configuration = of_peer(build_topology(mesh.ask(operator.snapshot)[0]), name)
    except (Failure, KeyError) as error:
        why = error.message if isinstance(error, Failure) else "it was removed meanwhile"
        raise Failure(
            f"peer {name} was added, but not its configuration made: {why}; "
            "add it again with --replace, since its private key is kept nowhere"
        ) from None
    if not configuration.peers:
        click.echo("kgctl: the mesh has no node yet, so the configuration leads nowhere", err=True)
    printed = text(with_private_key(configuration, private), quick=True)
    if qr:
        try:
            show_qr(printed)
            return
        except Failure as failure:  # The key exists here only, so the text is better than nothing.
            click.echo(f"kgctl: {failure.message}", err=True)
    click.echo(printed)


def with_private_key(configuration: Configuration, private: str | None) -> Configuration:
    """The configuration with the private key in it."""
    from attrs import evolve

    return evolve(configuration, private_key=private)


def show_qr(text: str) -> None:
    """The text as a QR code, in characters; Failure if it is too long for one."""
    click.echo(qr_code(text)[1].rstrip("\n"))


def qr_code(text: str) -> tuple[Any, str]:
    """segno's code, and it drawn in half blocks."""
    import io

    import segno

    try:
        code = segno.make(text, error="l", micro=False)
    except segno.DataOverflowError:
        raise Failure(
            f"the configuration has {len(text.encode())} bytes, and a QR code holds 2,953: carry it over as a file"
        ) from None
    drawn = io.StringIO()
    code.terminal(drawn, compact=True)
    return code, drawn.getvalue()


@peer_group.command("list")
@format_option
@click.pass_obj
def list_command(mesh: Mesh, output: str) -> None:
    """List the peers."""
    _print(mesh, output, None)


@peer_group.command("show")
@click.argument("name", callback=PEER_NAME, shell_complete=complete.peers)
@format_option
@click.pass_obj
def show_command(mesh: Mesh, name: str, output: str) -> None:
    """Show one peer. The preshared key is in json and yaml only."""
    _print(mesh, output, name)


def _print(mesh: Mesh, output: str, only: str | None) -> None:
    records, notes = mesh.ask(partial(_look, only=only, noted=output == "table"))
    if only is not None and only not in records:
        raise Failure(f"there is no peer {only}; kgctl peer list lists them")
    if output != "table":
        readable = [manifest(name, record) for name, record in records.items() if isinstance(record, PeerRecord)]
        if only is not None and not readable:
            raise Failure(f"peer {only} cannot be read: {records[only]}")
        if readable or output == "json":
            click.echo(as_text(readable, output))
        return
    rows = tuple(_row(name, record, notes.get(name, ())) for name, record in sorted(records.items()))
    columns = ("PEER", "PUBLIC KEY", "ALLOWED IPS", "ENDPOINT", "KEEPALIVE", "PRESHARED KEY", "NOTE")
    spare = ("PRESHARED KEY", "KEEPALIVE", "PUBLIC KEY") if only is None else ()
    show([Table("", columns, rows, "There is no peer yet.", spare)])


async def _look(
    client: Client, keys: Keys, *, only: str | None, noted: bool
) -> tuple[dict[str, PeerRecord | str], Mapping[str, list[str]]]:
    """The peers, or what is wrong with their records; with `noted` what of them is not in force, for which all of the
    mesh has to be looked at."""
    kvs = (await client.get_prefix(keys.peers_root)).kvs
    notes: Mapping[str, list[str]] = {}
    if noted and kvs:
        snapshot, view = await operator.snapshot(client, keys)
        kvs, notes = view.kvs(keys.peers_root), _notes(snapshot, keys)
    result: dict[str, PeerRecord | str] = {}
    for kv in kvs:
        parsed = keys.parse(kv.key)
        if isinstance(parsed, PeerKey) and only in (None, parsed.name):
            try:
                result[parsed.name] = decode_peer(kv.value)
            except RecordError as error:
                result[parsed.name] = str(error)
    return result, notes


def _notes(snapshot: Snapshot, keys: Keys) -> Mapping[str, list[str]]:
    """What peers are not given, by name."""
    from kilo_etcd.topology.segments import build_topology

    result = defaultdict(list)
    for note in snapshot.rejected:
        parsed = keys.parse(note.key)
        if isinstance(parsed, PeerKey):
            result[parsed.name].append(note.reason)
    for problem in build_topology(snapshot).problems:
        for name in {problem.subject, problem.about}:
            result[name].append(problem.text)
    return result


def _row(name: str, record: PeerRecord | str, reasons: Iterable[str]) -> tuple[str, ...]:
    if isinstance(record, str):
        return clean(name), NONE, NONE, NONE, NONE, NONE, f"not in force: {clean(record)}"
    return (
        clean(name),
        record.public_key,
        ", ".join(map(str, record.allowed_ips)) or NONE,
        str(record.endpoint) if record.endpoint is not None else NONE,
        f"{record.persistent_keepalive} s" if record.persistent_keepalive else NONE,
        "yes" if record.preshared_key is not None else "no",
        clean("; ".join(reasons)),
    )


@peer_group.command("remove")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, callback=PEER_NAME, shell_complete=complete.peers)
@change_options
@click.pass_obj
def remove_command(mesh: Mesh, names: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Remove peers. Every leader forgets their keys at once."""

    def decide(_before: Snapshot, view: View, keys: Keys) -> Edit:
        for name in names:
            if view.kv(keys.peer(name)) is None:
                raise Failure(f"there is no peer {name}; kgctl peer list lists them; nothing was removed")
        unique = dict.fromkeys(names)
        claims = (keys.peer_address(name, address) for name in unique for address in view.claimed_by(("peer", name)))
        return Edit(deletes=(*map(keys.peer, unique), *claims), asks_if_disruptive=True)

    if carry_out(mesh, decide, dry_run=dry_run, yes=yes) is Outcome.WRITTEN:
        for name in dict.fromkeys(names):
            click.echo(f"peer {clean(name)}: removed")
