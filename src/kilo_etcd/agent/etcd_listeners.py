"""Where etcd listens, as far as this host knows it: at its members' URLs, and at ports of this host.

The members are kept on disk: one that boots while there is no quorum must reach the others in clear, else there never
is one.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.etcd import api as etcd
from kilo_etcd.etcd.endpoint import EtcdEndpoint, parse_endpoint
from kilo_etcd.etcd.values import Member
from kilo_etcd.runtime.logs import Once

MEMBERS_FILE = "etcd-members.json"
MEMBERS_UNKNOWN = (
    "etcd's members are not known: this agent's etcd endpoints stay outside of the tunnels and, on hosts that "
    "seem to run etcd, TCP 2380 to and from everybody; if the members use other ports, exempt these on their "
    "hosts (--clear tcp/PORT@NETWORK), or let this agent's etcd user list the members"
)
_MOST_BYTES = 2**16


@frozen
class Members:
    """Where etcd's members listen, as URLs."""

    client: tuple[str, ...] = ()
    peer: tuple[str, ...] = ()

    @classmethod
    def of(cls, members: Iterable[Member]) -> Members:
        """As etcd says."""
        listed = tuple(members)
        return cls(
            tuple(sorted({url for member in listed for url in member.client_urls})),
            tuple(sorted({url for member in listed for url in member.peer_urls})),
        )


def read_members(state_dir: Path) -> Members | None:
    """Those kept on disk; None: there are none, or the file is not of this module."""
    try:
        with (state_dir / MEMBERS_FILE).open("rb") as file:
            document = json.loads(file.read(_MOST_BYTES))
        client, peer = document["client"], document["peer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(isinstance(urls, list) and all(isinstance(url, str) for url in urls) for urls in (client, peer)):
        return None
    return Members(tuple(client), tuple(peer))


def write_members(state_dir: Path, members: Members) -> None:
    """Keep them. OSError."""
    path, aside = state_dir / MEMBERS_FILE, state_dir / f"{MEMBERS_FILE}.new"
    aside.write_text(json.dumps({"client": members.client, "peer": members.peer}))
    aside.replace(path)


def remove_members(state_dir: Path) -> None:
    """OSError."""
    (state_dir / MEMBERS_FILE).unlink(missing_ok=True)


def etcd_endpoints_at(urls: Iterable[str]) -> Iterator[tuple[str, EtcdEndpoint]]:
    """Those that are etcd endpoints: another scheme may be, and a file of ours may have been damaged."""
    for url in urls:
        with suppress(etcd.BadRequest):
            yield url, parse_endpoint(url, tls=False)


class EtcdListeners:
    """Where etcd listens, as far as this host knows it: at its members' URLs, and at ports of this host. `listening`
    gives the TCP ports at which something here listens."""

    def __init__(
        self,
        client: etcd.Client,
        once: Once,
        *,
        disk: Disk | None,
        listening: Callable[[], Awaitable[frozenset[int]]],
    ) -> None:
        self._client, self._once, self._disk, self._look_at_ports = client, once, disk, listening
        self.members: Members | None = None
        """None: they are not known."""
        self.ports: frozenset[int] = frozenset()
        """Those at which something on this host listens."""
        self.trouble: str | None = None
        """Why etcd's members are not known, and what follows; None: they are, or are not asked for."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Where etcd's members listen."""
        members = self.members or Members()
        return tuple(url for url, _ in etcd_endpoints_at((*members.client, *members.peer)))

    def note_trouble(self, sentence: str | None) -> None:
        """This is why they are not known."""
        self.trouble = sentence
        self._once.errors("etcd members", () if sentence is None else (sentence,), level="warning")

    async def look_at_ports(self) -> None:
        """Find the ports."""
        self.ports = await self._look_at_ports()

    async def recall(self) -> None:
        """The members are those that an earlier run knew."""
        if self._disk is not None:
            path = self._disk.state_dir
            self.members = await self._disk.run(lambda: read_members(path))

    async def look(self) -> tuple[bool, bool]:
        """Find the ports and ask for the members; whether that has brought news, and whether etcd answered."""
        before = self.members, self.ports, self.trouble
        await self.look_at_ports()
        answered = await self.ask()
        return (self.members, self.ports, self.trouble) != before, answered

    async def ask(self) -> bool:
        """Learn etcd's members; whether etcd answered."""
        try:
            members = Members.of(await self._client.members())
        except etcd.EtcdError as error:
            # If etcd does not answer, another part of the agent reports that.
            if self.members is None and not isinstance(error, etcd.Unavailable):
                self.note_trouble(f"{MEMBERS_UNKNOWN} ({error})")
            return False
        self.note_trouble(None)
        if members == self.members:
            return True
        self.members = members
        disk = self._disk
        if disk is not None:
            path = disk.state_dir
            with suppress(OSError):
                await disk.run(lambda: write_members(path, members))
        return True

    async def forget(self) -> None:
        """Remove from disk what is kept of the members. OSError."""
        if self._disk is not None:
            path = self._disk.state_dir
            await self._disk.run(lambda: remove_members(path))
