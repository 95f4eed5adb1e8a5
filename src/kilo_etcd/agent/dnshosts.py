"""`kg --dns-hosts`: keeps the names of the mesh in the host's own hosts file.

The block follows the mesh, at most once a second, and comes back within a resync if another program has taken it away.
An agent that runs without the flag removes the block of an earlier start. A file that cannot be written is one log line
and one sentence for the status; all else goes on, and the next change or resync tries again.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial

import trio
from attrs import frozen

from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.model import IPAddress
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.runtime.hostnames import BY_AGENT, NAMES_TROUBLE, MeshNames, known_names
from kilo_etcd.runtime.hostsfile import HOSTS, HostsFileError, write_names
from kilo_etcd.runtime.logs import Logger, Once
from kilo_etcd.topology.segments import Topology

PAUSE_SECONDS = 1.0
"""Between two writes of the file."""

RETRY_SECONDS = 60.0
"""After the block of an earlier start could not be removed."""

Names = dict[str, tuple[IPAddress, ...]]
WriteNames = Callable[[Names | None], Awaitable[bool]]
"""Has the block hold these names, or be gone (None). Whether the file was changed. HostsFileError."""


def writer(config: AgentConfig) -> WriteNames:
    """What writes the block of this agent into /etc/hosts."""
    own = socket.gethostname()
    own_names = (config.hostname, own, own.partition(".")[0])

    async def write(names: Names | None) -> bool:
        return await trio.to_thread.run_sync(
            partial(write_names, names, config.interface, prefix=config.prefix, own=own_names, by=BY_AGENT)
        )

    return write


@frozen
class _Inputs:
    topology: Topology
    plan: HostPlan

    def same_names(self, other: _Inputs | None) -> bool:
        """Whether both yield the same names, as far as that is seen without computing them."""
        if other is None:
            return False
        mine, theirs = self.topology.snapshot, other.topology.snapshot
        return (
            mine.nodes is theirs.nodes
            and self.topology.peers is other.topology.peers
            and self.plan.routes is other.plan.routes
            and self.plan.addresses == other.plan.addresses
        )


class DnsHosts:
    """`follow` tells it of the mesh; `run` is its task, and the only one that touches the file."""

    def __init__(
        self, write: WriteNames, *, enabled: bool, prefix: str, log: Logger, once: Once, on_trouble: Callable[[], None]
    ) -> None:
        """`on_trouble` is called when `trouble` has changed."""
        self._write = write
        self._enabled = enabled
        self._prefix = prefix
        self._log = log
        self._once = once
        self._on_trouble = on_trouble
        self._latest: _Inputs | None = None
        self._due = trio.Event()
        self._look = False
        self.trouble: str | None = None
        """Why the file does not hold what it should, as a sentence."""

    def follow(self, topology: Topology, plan: HostPlan, *, fresh: bool = False) -> None:
        """The mesh that is in force, and this host's plan without what an exit node adds. `fresh`: look at the file
        even if the names are the same."""
        inputs = _Inputs(topology, plan)
        self._look = self._look or fresh
        if fresh or not inputs.same_names(self._latest):
            self._due.set()
        self._latest = inputs

    async def run(self) -> None:
        """Write until cancelled; without the flag, remove the block of an earlier start."""
        if not self._enabled:
            while True:
                await self.remove()
                if self.trouble is None:
                    return
                await trio.sleep(RETRY_SECONDS)
        names: MeshNames | None = None
        while True:
            await self._due.wait()
            self._due, look, self._look = trio.Event(), self._look, False
            assert self._latest is not None
            before, names = names, known_names(self._latest.topology, self._latest.plan, self._prefix)
            if look or before is None or before.addresses != names.addresses or self.trouble is not None:
                await self._put(dict(names.addresses))
            self._note_left_out(names)
            await trio.sleep(PAUSE_SECONDS)

    async def remove(self) -> None:
        """Take the block away, if there is one."""
        await self._put(None)

    async def _put(self, names: Names | None) -> None:
        trouble: str | None = None
        try:
            changed = await self._write(names)
        except HostsFileError as error:
            action = "brought into" if names is not None else "removed from"
            trouble = f"{NAMES_TROUBLE}{action} the hosts file: {error}{_remedy(error)}"
            self._once.warning("dns hosts", trouble)
        else:
            self._once.clear("dns hosts", "the hosts file can be written again")
            if changed:
                self._log.info("names removed" if names is None else "names written", names=len(names or ()))
        if trouble != self.trouble:
            self.trouble = trouble
            self._on_trouble()

    def _note_left_out(self, names: MeshNames) -> None:
        if names.left_out:
            short = names.left_out_in_short()
            self._once.error("left out", "not all names of the mesh are written", level="info", names=short)
        else:
            self._once.clear("left out", "all names of the mesh are written")


def _remedy(error: HostsFileError) -> str:
    if error.errno == errno.EROFS and "INVOCATION_ID" in os.environ:
        return f"; {HOSTS} was replaced since the service was started, which systemctl restart kilo-etcd makes good"
    return ""
