"""`kgctl showconf`: the WireGuard configuration of a node or a peer, for `wg setconf`, `wg-quick` and phones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from attrs import evolve

from kilo_etcd.ctl.commands import complete
from kilo_etcd.ctl.commands.annotate import node_argument
from kilo_etcd.ctl.commands.peer import PEER_NAME, checked, parse_allowed, qr_code, show_qr
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.formats.manifest import as_text, manifest
from kilo_etcd.ctl.formats.wgconf import (
    Configuration,
    Entry,
    allowing,
    node_as_peer,
    of_node,
    of_peer,
    peer_as_peer,
    section,
    text,
)
from kilo_etcd.ctl.group import Group
from kilo_etcd.planning.exit_node import unusable
from kilo_etcd.runtime.parsing import parse_node_name
from kilo_etcd.store import operator
from kilo_etcd.store.records import check_key
from kilo_etcd.topology.segments import Topology, UnknownNode, build_topology

FORMATS = ("wireguard", "wg-quick", "json", "yaml")


def conf_options(command: Any) -> Any:
    """What both kinds share."""
    for option in reversed(
        (
            click.option("--as-peer", is_flag=True, help="As one entry for another machine's configuration."),
            click.option("-o", "--output", type=click.Choice(FORMATS), default="wireguard", help="The output format."),
            click.option(
                "--allowed-ips", callback=checked(parse_allowed), help="Further allowed IPs, comma-separated."
            ),
            click.option("--private-key-file", help="Put the private key of this file into it; - is standard input."),
        )
    ):
        command = option(command)
    return command


@click.group("showconf", cls=Group)
def showconf_group() -> None:
    """Print the WireGuard configuration of a node or a peer.

    `-o wireguard` is for `wg setconf` and wg-quick; `-o wg-quick` has addresses too, for wg-quick and phones.
    """


@showconf_group.command("node", epilog="Example:\n\n\b\n  kgctl --prefix /a showconf node gcp-1 --as-peer -o yaml")
@click.argument("name", metavar="NODE", callback=node_argument, shell_complete=complete.nodes)
@conf_options
@click.pass_obj
def node_command(mesh: Mesh, /, name: str, **options: Any) -> None:
    """Print the configuration of NODE as its agent programs it; with --as-peer an entry for it."""
    topology = _topology(mesh)
    try:
        shown = node_as_peer(topology, name) if options["as_peer"] else of_node(topology, name)
    except UnknownNode as error:
        raise Failure(str(error)) from None
    _print(shown, **options)


@showconf_group.command(
    "peer",
    epilog="Examples:\n\n\b\n"
    "  kgctl showconf peer laptop -o wg-quick --private-key-file key > /etc/wireguard/mesh.conf\n"
    "  kgctl showconf peer phone --qr --private-key-file -\n"
    "  kgctl showconf peer phone --qr --private-key-file - --exit-node exit-1",
)
@click.argument("name", metavar="PEER", callback=PEER_NAME, shell_complete=complete.peers)
@conf_options
@click.option(
    "--exit-node",
    metavar="NODE",
    callback=checked(parse_node_name),
    shell_complete=complete.nodes,
    help="Send packets for destinations outside the mesh through this node; it must have the annotation "
    "advertise-exit-node.",
)
@click.option("--qr", is_flag=True, help="As a QR code in the terminal, for a phone.")
@click.option("--png", type=click.Path(path_type=Path), help="Write it as a QR code into this PNG file.")
@click.pass_obj
def peer_command(mesh: Mesh, /, name: str, exit_node: str | None, qr: bool, png: Path | None, **options: Any) -> None:
    """Print the configuration of PEER: with it the peer reaches the whole mesh; with --as-peer an entry for it.

    It names the leaders of the moment. Ask again when a location's leader has changed for good.
    """
    topology = _topology(mesh)
    if name not in topology.peers:
        raise Failure(f"there is no peer {name} in force; kgctl peer list lists them")
    if exit_node is not None:
        if options["as_peer"]:
            raise click.UsageError("An entry for another machine has no exit node: leave --exit-node or --as-peer out.")
        if (trouble := unusable(topology, exit_node)) is not None:
            raise Failure(trouble)
    if qr or png is not None:
        if options["as_peer"] or options["output"] not in ("wireguard", "wg-quick"):
            raise click.UsageError("A QR code holds a whole configuration: leave --as-peer and --output out.")
        configuration = _complete(
            of_peer(topology, name, exit_node), options["private_key_file"], options["allowed_ips"]
        )
        printed = text(configuration, quick=True)
        if png is not None:
            code, _ = qr_code(printed)
            try:
                code.save(str(png), kind="png", scale=6)
            except OSError as error:
                raise Failure(f"{png} cannot be written: {error.strerror}") from None
        if qr:
            show_qr(printed)
        return
    _print(peer_as_peer(topology, name) if options["as_peer"] else of_peer(topology, name, exit_node), **options)


def _topology(mesh: Mesh) -> Topology:
    return build_topology(mesh.ask(operator.snapshot)[0])


def _print(
    shown: Configuration | Entry,
    *,
    as_peer: bool,
    output: str,
    allowed_ips: tuple[Any, ...] | None,
    private_key_file: str | None,
) -> None:
    if isinstance(shown, Entry):
        if private_key_file is not None:
            raise click.UsageError("An entry for another machine has no private key: leave --private-key-file out.")
        shown = allowing(shown, allowed_ips or ())
        if output in ("json", "yaml"):
            click.echo(as_text([manifest(shown.name, shown.record)], output))
        else:
            click.echo(section(shown))
        return
    shown = _complete(shown, private_key_file, allowed_ips)
    if output in ("json", "yaml"):
        click.echo(_as_data(shown, output))
    else:
        click.echo(text(shown, quick=output == "wg-quick"))


def _complete(
    configuration: Configuration, private_key_file: str | None, allowed_ips: tuple[Any, ...] | None
) -> Configuration:  # fmt: skip
    if allowed_ips:
        if len(configuration.peers) != 1:
            names = ", ".join(entry.name for entry in configuration.peers) or "none"
            raise Failure(
                f"an allowed IP belongs to one peer, and this configuration has {len(configuration.peers)} ({names}); "
                "add it to the one that you mean by hand, or use --as-peer"
            )
        configuration = evolve(configuration, peers=(allowing(configuration.peers[0], allowed_ips),))
    if private_key_file is None:
        return configuration
    from kilo_etcd.ctl.commands.peer import read_text

    try:
        return evolve(configuration, private_key=check_key(read_text(private_key_file).strip()))
    except ValueError:
        # The key itself is a secret, so it is not repeated.
        source = "standard input" if private_key_file == "-" else private_key_file
        raise Failure(f"{source} holds no WireGuard private key (as wg genkey prints it)") from None


def _as_data(configuration: Configuration, output: str) -> str:
    data: dict[str, Any] = {"name": configuration.name}
    if configuration.private_key is not None:
        data["privateKey"] = configuration.private_key
    if configuration.listen_port is not None:
        data["listenPort"] = configuration.listen_port
    data["addresses"] = [str(address) for address in configuration.addresses]
    data["peers"] = [manifest(entry.name, entry.record) for entry in configuration.peers]
    if output == "json":
        return json.dumps(data, indent=2, ensure_ascii=False)
    import yaml

    printed: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return printed.rstrip("\n")
