"""The last known mesh, kept on disk: for a host that boots while etcd is away (decision 0014), and for one that finds
another etcd than it left, or an older one (decision 0020).

The file is a gzip of lines of JSON: what it is, the raw key-values one by one, a checksum over all of that. Key-values
and no plan, so that the code that reads etcd reads this too. It holds preshared keys, so only its owner may read it; it
appears whole or not at all (written aside, synced, renamed).

Loading is strict and never fatal: whatever is not as this module writes it, is open to others, or is of another mesh,
host or key is `Unusable`, with a sentence, and left where it is until the next one replaces it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import IO, Any, TypeVar

import trio
from attrs import field, frozen

from kilo_etcd import store
from kilo_etcd.agent.config import shown_duration
from kilo_etcd.agent.logs import Once
from kilo_etcd.agent.privatekey import sync_directory
from kilo_etcd.etcd import Header, KeyValue
from kilo_etcd.model import Granularity, Snapshot

T = TypeVar("T")

FILE = "mesh.jsonl.gz"
FORMAT = 1

PAUSE_SECONDS = 5.0
"""Between two writes at least."""

PAUSE_FACTOR = 50
"""And so many times as long as the last one took: a large mesh that never rests costs 2 % of a CPU at most."""

RETRY_SECONDS = 60.0
"""After a write that failed: what fills a disk takes its time to go."""


class Unusable(Exception):
    """What is on the disk is not to be used; the message says why, in a sentence."""


@frozen(kw_only=True)
class Identity:
    """Whose view of which mesh it is."""

    prefix: str
    node: str
    public_key: str


@frozen(kw_only=True)
class Remembered:
    """A mesh that this host has been in."""

    snapshot: Snapshot
    written: float
    """Seconds since 1970; the mesh had not changed since then for as long as this host was in it."""

    def age(self, now: float) -> str:
        """In words. A host without a battery may boot with its clock in the past, of which nothing can be said."""
        seconds = int(now - self.written)
        return "unknown" if seconds < 0 else shown_duration(seconds)


# -- the file -------------------------------------------------------------------------------------------------------


def save(path: Path, identity: Identity, holdings: store.Holdings, *, now: float) -> None:
    """Replace the file at `path`. OSError."""
    aside = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        aside.unlink()
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as raw:
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as out:
                digest = hashlib.sha256()
                for line in _lines(identity, holdings, now):
                    digest.update(line)
                    out.write(line)
                out.write(_line({"sha256": digest.hexdigest()}))
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    sync_directory(path.parent)


@frozen(kw_only=True)
class Kept:
    """A file's content: whole and this host's, and not taken apart, which costs time that a start may not need."""

    path: Path
    identity: Identity
    head: Mapping[str, Any]
    lines: tuple[bytes, ...]

    def last_seen(self) -> store.LastSeen:
        """What etcd is judged by."""
        key = json.dumps(store.Keys(self.identity.prefix).adopted)
        start = f"[{key},".encode()
        adopted = next((_kv(*json.loads(line)).value for line in self.lines if line.startswith(start)), None)
        holdings = _holdings(self.head, [])
        return store.LastSeen(
            header=holdings.header, granularity=holdings.granularity, subnets=holdings.subnets, adopted=adopted
        )

    def remembered(self) -> Remembered:
        """The mesh. Unusable."""
        try:
            holdings = _holdings(self.head, [_kv(*json.loads(line)) for line in self.lines])
        except (ValueError, TypeError) as error:
            raise _damaged(self.path, error) from None
        snapshot = holdings.snapshot(store.Keys(self.identity.prefix))
        node = snapshot.nodes.get(self.identity.node)
        if node is None or node.public_key != self.identity.public_key:
            raise Unusable(f"the mesh in {self.path} does not have this host")
        return Remembered(snapshot=snapshot, written=float(self.head["written"]))


def read(path: Path, identity: Identity) -> Kept | None:
    """What is kept at `path` for this host; None: nothing. Unusable."""
    try:
        # O_NONBLOCK: a FIFO in the file's place must not hang the agent.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}") from None
    with os.fdopen(handle, "rb") as raw:
        status = os.fstat(raw.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Unusable(f"{path} is no regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            raise Unusable(f"others can write or read {path} (owner {status.st_uid}, mode {mode})")
        try:
            head, lines = _read(raw)
            if head["format"] != FORMAT:
                raise Unusable(f"{path} is of another version of kg (format {head['format']}, not {FORMAT})")
            theirs = Identity(prefix=head["prefix"], node=head["node"], public_key=head["publicKey"])
            kept = Kept(path=path, identity=identity, head=head, lines=lines)
            kept.last_seen()
            float(head["written"])
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from None
    for what, their, our in (
        ("prefix", theirs.prefix, identity.prefix),
        ("name", theirs.node, identity.node),
        ("key", theirs.public_key, identity.public_key),
    ):
        if their != our:
            raise Unusable(f"{path} was written by an agent whose {what} was {their}, which is {our} now")
    return kept


def load(path: Path, identity: Identity) -> Remembered | None:
    """The mesh that is kept at `path` for this host; None: none. Unusable."""
    kept = read(path, identity)
    return None if kept is None else kept.remembered()


def _damaged(path: Path, error: Exception) -> Unusable:
    return Unusable(f"{path} is damaged ({type(error).__name__}: {error})")


def remove(state_dir: Path) -> bool:
    """Remove what is kept; whether there was anything. OSError."""
    try:
        (state_dir / FILE).unlink()
    except FileNotFoundError:
        return False
    return True


def _lines(identity: Identity, holdings: store.Holdings, now: float) -> Iterator[bytes]:
    header = holdings.header
    yield _line(
        {
            "format": FORMAT,
            "prefix": identity.prefix,
            "node": identity.node,
            "publicKey": identity.public_key,
            "written": now,
            "time": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
            "clusterId": header.cluster_id,
            "revision": header.revision,
            "raftTerm": header.raft_term,
            "granularity": holdings.granularity,
            "subnets": [str(subnet) for subnet in holdings.subnets],
        }
    )
    for kv in sorted(holdings.kvs, key=lambda kv: kv.key):
        yield _line(
            [_text(kv.key), _text(kv.value), kv.create_revision, kv.mod_revision, kv.version, kv.lease]
        )  # fmt: skip


def _read(raw: IO[bytes]) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    with gzip.GzipFile(fileobj=raw, mode="rb") as file:
        lines = file.readlines()
    if len(lines) < 2:
        raise ValueError("it is cut short")
    *content, last = lines
    digest = hashlib.sha256()
    for line in content:
        digest.update(line)
    if json.loads(last)["sha256"] != digest.hexdigest():
        raise ValueError("its checksum is wrong")
    return json.loads(content[0]), tuple(content[1:])


def _holdings(head: Mapping[str, Any], kvs: list[KeyValue]) -> store.Holdings:
    return store.Holdings(
        header=Header(
            cluster_id=int(head["clusterId"]), revision=int(head["revision"]), raft_term=int(head["raftTerm"])
        ),
        kvs=tuple(kvs),
        granularity=None if head["granularity"] is None else Granularity(head["granularity"]),
        subnets=tuple(ip_network(subnet) for subnet in head["subnets"]),
    )


def _kv(key: str, value: str, create: int, mod: int, version: int, lease: int) -> KeyValue:
    return KeyValue(
        key=_bytes(key), value=_bytes(value), create_revision=create, mod_revision=mod, version=version, lease=lease
    )


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# -- keeping it -----------------------------------------------------------------------------------------------------


async def _in_thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)


@frozen
class Disk:
    """Where the last known mesh is kept."""

    state_dir: Path
    run: Callable[[Callable[[], Any]], Awaitable[Any]] = _in_thread
    """What runs file work, in which a disk may take its time."""
    clock: Callable[[], float] = field(default=time.time)

    @property
    def path(self) -> Path:
        """The file."""
        return self.state_dir / FILE


class Keeper:
    """Keeps the last known mesh of one agent. `run` is its task; `disk` None: nothing is ever kept or found."""

    def __init__(self, disk: Disk | None, identity: Identity, once: Once) -> None:
        self._disk = disk
        self._identity = identity
        self._once = once
        self._noted: Snapshot | None = None
        self._holdings: Callable[[], store.Holdings | None] = lambda: None
        self._due = trio.Event()

    async def read(self) -> Kept | None:
        """What is kept, if it is of use; if it is not, that is said."""
        disk = self._disk
        if disk is None:
            return None
        try:
            found: Kept | None = await disk.run(lambda: read(disk.path, self._identity))
        except Unusable as error:
            self._unusable(error)
            return None
        return found

    async def remember(self, kept: Kept) -> Remembered | None:
        """The mesh that is kept, if it is of use; if it is not, that is said."""
        assert self._disk is not None
        try:
            found: Remembered = await self._disk.run(kept.remembered)
        except Unusable as error:
            self._unusable(error)
            return None
        return found

    def _unusable(self, error: Unusable) -> None:
        self._once.warning("last known", "the last known mesh cannot be used; going by etcd alone", error=str(error))

    def age(self, remembered: Remembered) -> str:
        """How old it is, in words."""
        return remembered.age(time.time() if self._disk is None else self._disk.clock())

    def note(self, snapshot: Snapshot, holdings: Callable[[], store.Holdings | None]) -> None:
        """`snapshot` is in force, and is to be kept; `holdings`, asked when it is written, is what it was made of."""
        if snapshot is not self._noted:
            self._noted, self._holdings = snapshot, holdings
            self._due.set()

    async def run(self) -> None:
        """Write what is noted, the newest only, until cancelled."""
        while True:
            await self._due.wait()
            await trio.sleep(await self.flush())

    async def flush(self) -> float:
        """Write now what is noted and not written yet; the seconds to leave it alone."""
        disk, holdings = self._disk, self._holdings()
        if disk is None or holdings is None or not self._due.is_set():
            self._due = trio.Event()
            return 0.0
        self._due = trio.Event()
        began = time.monotonic()
        try:
            await disk.run(lambda: save(disk.path, self._identity, holdings, now=disk.clock()))
        except OSError as error:
            self._once.warning(
                "last known", "the mesh cannot be kept on disk for a boot without etcd",
                path=str(disk.path), error=error.strerror or str(error),
            )  # fmt: skip
            self._due.set()
            return RETRY_SECONDS
        self._once.clear("last known", "the mesh is kept on disk again")
        return max(PAUSE_SECONDS, PAUSE_FACTOR * (time.monotonic() - began))

    async def forget(self) -> None:
        """Remove what is kept, and keep nothing more. OSError."""
        disk, self._disk = self._disk, None
        if disk is not None:
            await disk.run(lambda: remove(disk.state_dir))
