"""`kgctl disconnect` and `kgctl connection`: the connections of this machine, without etcd.

It reads their files (`runtime.connections`) and the kernel.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import click
from attrs import frozen
from click.core import ParameterSource

from kilo_etcd.connect.command import interface_for, run_here
from kilo_etcd.ctl.commands.peer import checked, parse_peer_name
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.group import Group
from kilo_etcd.ctl.output import output_option, show
from kilo_etcd.ctl.reports.render import NONE, Table, clean
from kilo_etcd.runtime import connections
from kilo_etcd.runtime.connections import ConnectionFile
from kilo_etcd.runtime.lock_file import RUNTIME_DIR, connection_lock, disconnect_lock, has_connection_lock
from kilo_etcd.runtime.parsing import parse_interface

END_SECONDS = 30.0
"""How long a connection that is asked to end may take: it waits some seconds for etcd."""


@click.command(
    "disconnect",
    epilog="Examples:\n\n\b\n  kgctl disconnect\n  kgctl disconnect laptop\n  kgctl --prefix /work disconnect",
)
@click.argument("peer", required=False, callback=checked(parse_peer_name))
@click.option("--interface", callback=checked(parse_interface), help="Of which connection. Default: the only one.")
@click.pass_obj
def disconnect_command(mesh: Mesh, peer: str | None, interface: str | None) -> None:
    """End the connection of this machine that PEER names, or the only one, and remove all that is left of it here.

    It asks no etcd, so that it works after a crash, and while an exit node lets nothing out. The record of a connection
    that crashed ends by itself, within five minutes.
    """
    from kilo_etcd.runtime.logs import setup_logging

    setup_logging("warning")
    run_here(_disconnect, mesh, peer, interface, _prefix_given())


@click.group("connection", cls=Group)
def connection_group() -> None:
    """Show the connections of this machine."""


@connection_group.command("status")
@output_option
@click.pass_obj
def status_command(mesh: Mesh, output: str) -> None:
    """Show the connections of this machine: peer, exit node, and how long ago each leader answered. It asks no etcd.

    Exit status 1: there is none, or one has crashed.
    """
    del mesh
    run_here(_status, output)


def _prefix_given() -> bool:
    root = click.get_current_context().find_root()
    return root.get_parameter_source("_prefix_prefix") is not ParameterSource.DEFAULT


def _known() -> tuple[ConnectionFile, ...]:
    try:
        return connections.read_all()
    except OSError as error:
        raise Failure(f"{RUNTIME_DIR} cannot be read: {error.strerror}; run kgctl as root") from None


def chosen(
    known: Sequence[ConnectionFile], peer: str | None, interface: str | None, prefix: str | None
) -> ConnectionFile | None:
    """Which of the connections is meant; None: the one of an interface of which nothing is known. `prefix`: None if
    it was not given. Failure."""
    matching = [
        connection
        for connection in known
        if peer in (None, connection.peer)
        and interface in (None, connection.interface)
        and prefix in (None, connection.prefix)
    ]
    if len(matching) > 1:
        each = "; ".join(_named(connection) for connection in matching)
        raise Failure(f"this machine has {len(matching)} connections: {each}; name one by --interface")
    if matching:
        return matching[0]
    # A connection without a file is known by its interface alone.
    meant = interface or (None if prefix is None else interface_for(prefix))
    if other := next((connection for connection in known if connection.interface == meant), None):
        raise Failure(
            f"the connection of {meant} is another one: {_named(other)}; kgctl disconnect --interface {meant} ends it"
        )
    if peer is not None:
        raise Failure(
            f"this machine has no connection as peer {peer}{'' if interface is None else f' on {interface}'}; "
            "kgctl connection status shows those that it has"
        )
    return None


def _named(connection: ConnectionFile) -> str:
    return f"peer {clean(connection.peer)} of {clean(connection.prefix)} ({clean(connection.interface)})"


async def _disconnect(mesh: Mesh, peer: str | None, interface: str | None, prefix_given: bool) -> None:
    from kilo_etcd.kernel.errors import NO_PERMISSION
    from kilo_etcd.kernel.host import may_change_the_network

    if not may_change_the_network():
        raise Failure(f"nothing was disconnected: {NO_PERMISSION}")
    known = chosen(_known(), peer, interface, mesh.prefix if prefix_given else None)
    name = interface or (interface_for(mesh.prefix) if known is None else known.interface)
    with disconnect_lock(name):
        await _disconnect_alone(known, name, mesh.prefix)


async def _disconnect_alone(known: ConnectionFile | None, name: str, prefix: str) -> None:
    import trio

    from kilo_etcd import kernel
    from kilo_etcd.connect.crash import clean_up_after_a_crash, edges_of

    with trio.move_on_after(END_SECONDS) as patience:
        ended = known is not None and await _end(known)
    if patience.cancelled_caught and known is not None:
        raise Failure(
            f"process {known.process}, the connection, has not ended within {END_SECONDS:g} s; "
            f"kill -9 {known.process}, and say this once more"
        )
    with connection_lock("interface", name, f"the interface {name}"):
        # Whether it was to stay the connection says at its end.
        known = connections.read(name) or known
        public = None if known is None else known.public_key
        edges = edges_of(name, "" if known is None else known.peer, prefix if known is None else known.prefix, public)
        removed = await clean_up_after_a_crash(name, public, edges)
        connections.remove(name)
        if not (ended or removed) and await kernel.agent_has(name, public):
            raise Failure(
                f"{name} is the interface of this host's agent, not of a connection; to remove it, stop the agent and "
                f"run kg --interface {name} cleanup"
            )
    if known is not None and known.stays:
        click.echo(
            f"{name}: removed; the record of peer {clean(known.peer)} stays in etcd until "
            f"kgctl peer remove {clean(known.peer)}"
        )
    elif ended or removed:
        click.echo(f"{name}: disconnected")
    else:
        click.echo(f"{name}: there was no connection")


async def _end(connection: ConnectionFile) -> bool:
    """Have a connection end, and wait until its process has; whether it ran. Failure."""
    import trio

    try:
        process = os.pidfd_open(connection.process)
    except OSError:
        return False
    try:
        # Now the number is certain to be of the process that is looked at. Only a connection has the interface's lock.
        if not (connection.runs and has_connection_lock(connection.process, "interface", connection.interface)):
            return False
        signal.pidfd_send_signal(process, signal.SIGTERM)
        await trio.lowlevel.wait_readable(process)
        return True
    except ProcessLookupError:
        return False
    except PermissionError:  # of the signal, or of the lock
        raise Failure(
            f"process {connection.process}, the connection, is another user's: run kgctl disconnect as root"
        ) from None
    finally:
        os.close(process)


@frozen(kw_only=True)
class ConnectionStatus:
    """A connection and what the kernel says of it."""

    known: ConnectionFile
    state: str
    """connected, connecting, stays (as asked for), crashed, or ended: it crashed, and the kernel has nothing of it."""
    addresses: tuple[str, ...] = ()
    handshake: float | None = None
    """Seconds since the last one with any leader; None: there was none, or that cannot be read."""
    peers: int | None = None
    """WireGuard peers; None: these cannot be read, or are nobody's."""
    answering: int | None = None
    """Those with which there was a handshake in the last three minutes."""


async def _status(output: str) -> None:
    statuses = [await _look(connection) for connection in _known()]
    if output == "json":
        click.echo(json.dumps([_as_data(status) for status in statuses], indent=2))
    else:
        show((_table(statuses),))
    for status in statuses:
        if status.state in _CRASHED:
            interface = clean(status.known.interface)
            click.echo(
                f"kgctl: the connection of {interface} {_CRASHED[status.state]}: "
                f"kgctl disconnect --interface {interface} removes it",
                err=True,
            )
    if all(status.state == "ended" for status in statuses) or any(status.state == "crashed" for status in statuses):
        raise click.exceptions.Exit(1)


_CRASHED = {
    "crashed": "has crashed and left interface, routes or rules here",
    "ended": "has crashed, and the kernel has nothing of it; its names may still be in the hosts file",
}


async def _look(connection: ConnectionFile) -> ConnectionStatus:
    from kilo_etcd import kernel
    from kilo_etcd.connect.crash import is_left
    from kilo_etcd.kernel.host import may_change_the_network

    if not connection.runs and not connection.stays:
        # If nobody but root can tell, something may be left.
        left = not may_change_the_network() or await is_left(connection.interface, connection.public_key)
        return ConnectionStatus(known=connection, state="crashed" if left else "ended")
    host_addresses = await kernel.list_addresses()
    own = tuple(
        str(item.address.ip)
        for item in host_addresses.addresses
        if item.interface == connection.interface and not item.address.ip.is_link_local
    )
    state = "stays" if connection.stays else "connected" if own and connection.joined else "connecting"
    if not may_change_the_network():
        # WireGuard shows its peers to none but root.
        return ConnectionStatus(known=connection, state=state, addresses=own)
    activity = await kernel.peers_of(connection.interface, connection.public_key)
    handshakes = [peer.last_handshake for peer in activity.peers.values() if peer.last_handshake]
    now = time.time()
    return ConnectionStatus(
        known=connection,
        state=state,
        addresses=own,
        handshake=max(0.0, now - max(handshakes)) if handshakes else None,
        peers=len(activity.peers),
        answering=sum(now - then < 180 for then in handshakes),
    )


def _table(statuses: Sequence[ConnectionStatus]) -> Table:
    rows = tuple(
        (
            clean(status.known.interface), clean(status.known.peer), clean(status.known.prefix), status.state,
            ", ".join(status.addresses) or NONE, clean(status.known.exit_node or NONE),
            NONE if status.peers is None else f"{status.answering} of {status.peers}",
            NONE if status.handshake is None else f"{status.handshake:.0f} s ago",
        )
        for status in statuses
    )  # fmt: skip
    return Table(
        "Connections",
        ("INTERFACE", "PEER", "PREFIX", "STATE", "ADDRESS", "EXIT NODE", "LEADERS ANSWER", "HANDSHAKE"),
        rows,
        "This machine has no connection.",
        spare=("PREFIX", "HANDSHAKE"),
    )


def _as_data(status: ConnectionStatus) -> dict[str, Any]:
    known = status.known
    return {
        "interface": known.interface, "peer": known.peer, "prefix": known.prefix, "state": status.state,
        "publicKey": known.public_key, "process": known.process if known.runs else None, "since": known.since,
        "addresses": list(status.addresses), "exitNode": known.exit_node, "leaders": status.peers,
        "leadersAnswer": status.answering, "secondsSinceHandshake": status.handshake,
    }  # fmt: skip
