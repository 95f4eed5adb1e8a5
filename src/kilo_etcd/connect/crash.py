"""The machine around a connection, and the remains of a connection that crashed. Nothing here asks etcd."""

from __future__ import annotations

import socket
from functools import partial

import trio

from kilo_etcd import kernel
from kilo_etcd.connect.connection import Edges, Names
from kilo_etcd.kernel.routing.rules import DeleteRule
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.runtime.hostsfile import write_names
from kilo_etcd.runtime.logs import get_logger


def edges_of(interface: str, peer: str, prefix: str, public_key: str | None) -> Edges:
    """The parts of the machine that a connection touches. `public_key`: its own, by which its device is known."""
    return Edges(
        look=partial(_facts, interface),
        write_names=partial(_write_names, interface, peer, prefix),
        clean_up=partial(kernel.cleanup, interface, public_key=public_key, protocol=kernel.PEER_PROTOCOL),
    )


async def blocks_exit_path(interface: str, public_key: str | None) -> bool:
    """Whether the connection's rules for an exit node are there: while it does not run they block all packets to
    destinations outside the mesh. KernelError."""
    return any(isinstance(change, DeleteRule) for change in await _left(interface, public_key))


async def is_left(interface: str, public_key: str | None) -> bool:
    """Whether the kernel has anything of the connection. KernelError."""
    return bool(await _left(interface, public_key))


async def _left(interface: str, public_key: str | None) -> tuple[kernel.Change, ...]:
    return await kernel.leftovers(interface, public_key=public_key, protocol=kernel.PEER_PROTOCOL)


async def clean_up_after_a_crash(interface: str, public_key: str | None, edges: Edges) -> bool:
    """Remove all that is left of a connection that does not run; whether there was anything. An agent's interface of
    the same name stays, with its routes and rules. KernelError, OSError."""
    of_agent = await kernel.agent_has(interface, public_key)
    changes = await edges.clean_up()
    names = not of_agent and await edges.write_names(None)
    if changes:
        get_logger().info("removed what a crash had left", interface=interface, changes=len(changes))
    return bool(changes or names)


async def _write_names(interface: str, peer: str, prefix: str, names: Names | None) -> bool:
    host = socket.gethostname()
    return await trio.to_thread.run_sync(
        partial(write_names, names, interface, prefix=prefix, own=(peer, host, host.partition(".")[0]))
    )


async def _facts(interface: str) -> HostFacts:
    host_addresses = await kernel.list_addresses()
    return HostFacts(
        addresses=host_addresses.addresses, default_routes=host_addresses.default_routes, own_interface=interface
    )
