"""`kgctl connect`: its command line, and what has to be had before the mesh is joined: name, key, interface, port."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from kilo_etcd.base.quoting import shown_path
from kilo_etcd.ctl.commands import complete
from kilo_etcd.ctl.commands.peer import checked, parse_allowed, parse_peer_name
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.store.keys import encode_name
from kilo_etcd.store.records import parse_keepalive

if TYPE_CHECKING:
    from kilo_etcd.connect.connection import Edges
    from kilo_etcd.runtime.connections import ConnectionFile

SYSTEM_STATE = Path("/var/lib/kilo-etcd/connect")
MTU = (576, 65455)
"""Bytes: the least that IPv4 demands of a link, and the most that WireGuard leaves of a packet."""


class _Command(click.Command):
    """Takes `--clean-up=false` as well, as Kilo spells it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spelled = {"--clean-up=true": "--clean-up", "--clean-up=false": "--no-clean-up"}
        return super().parse_args(ctx, [spelled.get(arg, arg) for arg in args])


def interface_for(prefix: str) -> str:
    """The interface's name for a mesh: another one for each prefix, at most 15 characters."""
    plain = prefix.strip("/")
    if re.fullmatch(r"[a-z0-9-]{1,10}", plain) and not plain.endswith("ipip"):
        return f"kilo-{plain}"
    readable = re.sub(r"[^a-z0-9]", "", plain.lower())[:5]
    return f"kilo-{readable}{sha256(prefix.encode()).hexdigest()[:5]}"


def key_file_for(prefix: str, peer: str) -> Path:
    """Where the private key is kept unless the caller says otherwise."""
    base = SYSTEM_STATE
    if os.geteuid() != 0:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
        base = Path(state) / "kilo-etcd/connect"
    return base / encode_name(prefix.strip("/")) / encode_name(peer) / "key"


def free_port() -> int:
    """A UDP port that nobody has at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("0.0.0.0", 0))
        port: int = probe.getsockname()[1]
        return port


def _interface(text: str) -> str:
    from kilo_etcd.runtime.parsing import parse_interface

    return parse_interface(text)


def _node_name(text: str) -> str:
    from kilo_etcd.runtime.parsing import parse_node_name

    return parse_node_name(text)


def _log_level(text: str) -> str:
    from kilo_etcd.runtime.parsing import parse_log_level

    return parse_log_level(text)


@frozen(kw_only=True)
class Options:
    """The command line, read."""

    peer: str
    interface: str
    key_file: Path
    allowed_ips: tuple[Any, ...] | None
    port: int | None
    mtu: int | None
    persistent_keepalive: int | None
    clean_up: bool
    dns_hosts: bool
    exit_node: str | None
    wireguard: Any
    dry_run: bool
    yes: bool


@click.command(
    "connect",
    cls=_Command,
    epilog="Examples:\n\n\b\n"
    "  kgctl connect\n"
    "  kgctl connect laptop --dns-hosts\n"
    "  kgctl connect --exit-node exit-1\n"
    "  kgctl --prefix /work connect --allowed-ips 10.9.0.2",
)
@click.argument("peer", required=False, callback=checked(parse_peer_name), shell_complete=complete.peers)
@click.option(
    "--allowed-ips",
    callback=checked(parse_allowed),
    help="The addresses of this machine, comma-separated. Default: those of its record, else free ones of the mesh.",
)
@click.option(
    "--private-key",
    type=click.Path(path_type=Path),
    help="The file with the private key; created if it does not exist. Default: one for each mesh and name.",
)
@click.option("--interface", callback=checked(_interface), help="The interface's name. Default: kilo- and the prefix.")
@click.option("--port", type=click.IntRange(1, 65535), help="UDP port of WireGuard. Default: a free one.")
@click.option("--mtu", type=click.IntRange(*MTU), help="Bytes. Default: by the ways to the leaders.")
@click.option(
    "--persistent-keepalive",
    callback=checked(parse_keepalive),
    help="Seconds, 0 is off. Default: as in its record, else 10.",
)
@click.option(
    "--clean-up/--no-clean-up",
    default=True,
    help="Remove interface, routes, names and record at the end. Default: yes.",
)
@click.option("--dns-hosts", is_flag=True, help="Write the names of nodes and peers into /etc/hosts.")
@click.option(
    "--exit-node",
    metavar="NODE",
    callback=checked(_node_name),
    shell_complete=complete.nodes,
    help="Send packets for destinations outside the mesh through this node, as a VPN does; it must have the "
    "annotation advertise-exit-node.",
)
@click.option(
    "--wireguard",
    type=click.Choice(("auto", "kernel", "userspace")),
    default="auto",
    show_default=True,
    help="Which WireGuard to use.",
)
@click.option("--log-level", callback=checked(_log_level), default="info", show_default=True, help="As kg has it.")
@click.option("--dry-run", is_flag=True, help="Print what would be changed here and in etcd, and change nothing.")
@click.option("--yes", "-y", is_flag=True, help="Replace a record of this name that is another machine's.")
@click.pass_obj
def connect_command(
    mesh: Mesh,
    /,
    peer: str | None,
    private_key: Path | None,
    interface: str | None,
    log_level: str,
    **options: Any,
) -> None:
    """Make this machine a peer of the mesh, named PEER (default: the host's name), until Ctrl-C.

    It registers the machine, sets up an interface with routes to the whole mesh, and follows changes. At the end
    all of it is removed.
    """
    from kilo_etcd.runtime.logs import setup_logging

    try:
        name = peer or parse_peer_name(socket.gethostname())
    except ValueError as error:
        raise click.UsageError(f"{error}; name this machine: kgctl connect PEER.") from None
    if private_key is not None and shown_path(str(private_key)) != str(private_key) and not private_key.exists():
        # It would become the name of a file.
        raise click.UsageError("--private-key takes the name of a file with the key, not the key itself.")
    setup_logging(log_level)
    _run(
        mesh,
        Options(
            peer=name,
            interface=interface or interface_for(mesh.prefix),
            key_file=private_key or key_file_for(mesh.prefix, name),
            **options,
        ),
    )


def _run(mesh: Mesh, options: Options) -> None:
    run_here(_connect, mesh, options)


def run_here(work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """Run a command of this machine; Failure, in one sentence, for whatever may be expected to go wrong."""
    import trio

    from kilo_etcd import kernel
    from kilo_etcd.etcd import api as etcd
    from kilo_etcd.runtime.hostsfile import HostsFileError
    from kilo_etcd.runtime.key_file import KeyFileError
    from kilo_etcd.runtime.lock_file import AlreadyRunning

    sentences: list[str] = []
    ends: list[BaseException] = []
    # Up to Python 3.11.3 what is raised within `except*` gets out of it in a group.
    try:
        trio.run(work, *arguments)
    except* KeyboardInterrupt:
        ends.append(KeyboardInterrupt())
    except* (Failure, etcd.EtcdError, kernel.KernelError, AlreadyRunning, KeyFileError, HostsFileError) as group:
        sentences += [error.message if isinstance(error, Failure) else str(error) for error in _leaves(group)]
    except* click.exceptions.Exit as group:
        ends += _leaves(group)
    if sentences:
        raise Failure("; ".join(dict.fromkeys(sentences)))
    if ends:
        raise ends[0] from None


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


async def _connect(mesh: Mesh, options: Options) -> None:
    import trio

    from kilo_etcd.connect.crash import blocks_exit_path, clean_up_after_a_crash, edges_of
    from kilo_etcd.runtime import connections
    from kilo_etcd.runtime.key_file import generate, load_or_create_file, peek_file, public_key

    _may_change_the_network(options)
    with _alone(options, "interface", options.interface, f"the interface {options.interface}"):
        if options.dry_run:
            private = peek_file(options.key_file) or generate()
        else:
            private = load_or_create_file(options.key_file, flag="--private-key")
        public = public_key(private)
        edges = edges_of(options.interface, options.peer, mesh.prefix, public)
        if options.dry_run:
            await _connect_alone(mesh, options, private, edges)
            return
        former = connections.read(options.interface)
        blocked = await blocks_exit_path(options.interface, public)
        if blocked and options.exit_node is None and not (former is not None and former.stays):
            await clean_up_after_a_crash(options.interface, public, edges)
            blocked = False
        connections.write(
            connections.ConnectionFile(
                interface=options.interface, peer=options.peer, prefix=mesh.prefix, public_key=public,
                exit_node=options.exit_node, process=os.getpid(), started=connections.started_at(os.getpid()) or 0,
                since=time.time(),
            )
        )  # fmt: skip
        try:
            await _connect_alone(mesh, options, private, edges)
        except Exception as error:
            known = connections.read(options.interface)
            if not blocked or (known is not None and known.joined):
                raise
            sentence = (
                f"an earlier connection still sends all packets that leave this machine to its exit node: "
                f"kgctl disconnect --interface {options.interface} ends that"
            )
            raise ExceptionGroup("", [error, Failure(sentence)]) from None
        finally:
            with trio.CancelScope(shield=True):
                await _ended(options.interface, public, former)


async def _ended(interface: str, public: str, former: ConnectionFile | None) -> None:
    """Have the file of the connection say what is left; `former`: what it said of an earlier one, of which nothing has
    been changed if this one has not joined."""
    from kilo_etcd import kernel
    from kilo_etcd.connect.crash import is_left
    from kilo_etcd.runtime import connections

    known = connections.read(interface)
    if known is not None and known.stays:
        return
    try:
        left = await is_left(interface, public)
    except (kernel.KernelError, OSError) as error:
        _remark(str(error))
        left = True
    if known is not None and known.joined:
        if not left:
            connections.remove(interface)
    elif former is not None and (left or former.stays):
        connections.write(former)
    else:
        connections.remove(interface)


async def _connect_alone(mesh: Mesh, options: Options, private: str, edges: Edges) -> None:
    from kilo_etcd import kernel
    from kilo_etcd.connect.connection import PeerConnection, Settings
    from kilo_etcd.connect.registration import DesiredPeer, PeerRegistration
    from kilo_etcd.etcd.client import open_client
    from kilo_etcd.planning.exit_node import unusable
    from kilo_etcd.runtime.key_file import public_key
    from kilo_etcd.store.keys import Keys
    from kilo_etcd.topology.segments import build_topology

    desired = DesiredPeer(
        name=options.peer,
        public_key=public_key(private),
        allowed_ips=options.allowed_ips,
        persistent_keepalive=options.persistent_keepalive,
        clean_up=options.clean_up,
        replace=options.yes,
        attached=(await edges.look()).underlay(),
    )
    async with open_client(mesh.etcd, on_remark=_remark) as client:
        registration = PeerRegistration(client, Keys(mesh.prefix), desired, lambda: None)
        decision, before, after = await registration.prospect()
        if options.exit_node is not None and (trouble := unusable(build_topology(after), options.exit_node)):
            raise Failure(trouble)
        endpoint = decision.record.endpoint
        settings = Settings(
            interface=options.interface,
            listen_port=options.port or (endpoint.port if endpoint is not None else free_port()),
            endpoints=tuple(dict.fromkeys((*mesh.etcd.endpoints, *client.endpoints))),
            dns_hosts=options.dns_hosts,
            exit_node=options.exit_node,
        )
        setup = kernel.Setup(
            interface=options.interface,
            private_key=private,
            mtu=options.mtu,
            wireguard=options.wireguard,
            protocol=kernel.PEER_PROTOCOL,
        )
        where = f"{mesh.prefix} {before.cluster_id}"
        with (
            _alone(options, "mesh", where, f"the mesh at {mesh.prefix}"),
            _alone(options, "exit-node", "", "an exit node") if options.exit_node is not None else nullcontext(),
        ):
            async with kernel.open_kernel(setup) as device:
                if options.dry_run:
                    from kilo_etcd.connect.dryrun import show

                    await show(before, after, desired, settings, device, edges, mesh.prefix)
                    return
                await PeerConnection(desired, settings, client, mesh.prefix, device, edges).run()


def _remark(sentence: str) -> None:
    click.echo(f"kgctl: {sentence}", err=True)


def _may_change_the_network(options: Options) -> None:
    from kilo_etcd.kernel.errors import NO_PERMISSION
    from kilo_etcd.kernel.host import may_change_the_network

    if not options.dry_run and not may_change_the_network():
        raise Failure(f"{options.interface} cannot be set up: {NO_PERMISSION}")


def _alone(options: Options, kind: str, resource: str, called: str) -> AbstractContextManager[None]:
    """Hold something that two connects of one machine would fight over."""
    from kilo_etcd.runtime.lock_file import connection_lock

    return nullcontext() if options.dry_run else connection_lock(kind, resource, called)
