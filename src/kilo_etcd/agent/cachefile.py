"""The file in which a host caches what etcd held: written, read, and rejected.

The file is a gzip of lines of JSON: what it is, the raw key-values one by one, a checksum over all of that. Key-values
and no plan, so that the code that reads etcd reads this too. It holds preshared keys, so only its owner may read it; it
appears whole or not at all (written aside, synced, renamed). A value that is too long for a record of ours is left out,
when the file is written and when it is read.

Loading is strict and never fatal: whatever is not as this module writes it, is too large, is open to others, or is of
another mesh, host or key is `Unusable`, with a sentence, and left where it is until the next one replaces it. A right
checksum says nothing of the content: every value is checked for its type and range as it is read, and whatever else
goes wrong with it is `Unusable` too (`_reading`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path
from typing import IO, Any, TypeVar

from attrs import frozen

from kilo_etcd.base import descriptors
from kilo_etcd.base.regularfile import NotRegular, open_regular
from kilo_etcd.etcd.api import Header, KeyValue
from kilo_etcd.model import Granularity, InternalIPs, IPAddress, IPNetwork, Snapshot
from kilo_etcd.runtime.key_file import sync_directory
from kilo_etcd.runtime.parsing import shown_duration
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import LastSeen
from kilo_etcd.store.records import MAX_VALUE, RecordError, decode_node
from kilo_etcd.store.view import Holdings, newest

FILE = "mesh.jsonl.gz"
FORMAT = 1

MAX_BYTES = 128 * 1024 * 1024
"""Of the file's content, unpacked: some 100,000 nodes with all their records."""
MAX_RECORDS = 500_000
MAX_KEY = 4096
"""Bytes. The longest key of ours has half of that; a longer one, like a value over MAX_VALUE, is nobody's record."""
MAX_LINE = 6 * (MAX_KEY + MAX_VALUE) + 200
"""Bytes; JSON may take six for each."""


class Unusable(Exception):
    """The cache on the disk cannot be used; the message is the reason, one sentence."""


class TooLarge(ValueError):
    """The mesh has more than is kept on disk; the message says of what, in a clause."""


class _Wrong(ValueError):
    """Something in the file that this module does not write; the message says what, and quotes nothing: it may be
    secret."""


@frozen(kw_only=True)
class Identity:
    """The node, and the mesh, that the file belongs to."""

    prefix: str
    node: str
    public_key: str


@frozen(kw_only=True)
class CachedSnapshot:
    """A mesh that this host has been in."""

    snapshot: Snapshot
    written: float
    """Seconds since 1970; the mesh had not changed since then for as long as this host was in it."""

    def age(self, now: float) -> str:
        """As text. A host without a battery may boot with its clock in the past; then the age is unknown."""
        seconds = int(now - self.written)
        return "unknown" if seconds < 0 else shown_duration(seconds)


def save(path: Path, identity: Identity, holdings: Holdings, *, now: float) -> None:
    """Replace the file at `path`. OSError; TooLarge, with the former file left as it was."""
    aside = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        aside.unlink()
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as raw:
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as out:
                digest = hashlib.sha256()
                size = 0
                for line in _lines(identity, holdings, now):
                    size += len(line)
                    if size > MAX_BYTES - 100:  # for the checksum
                        raise TooLarge(f"the mesh takes more than the {MAX_BYTES} bytes that are kept")
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
class CachedMesh:
    """A file's content: whole and this host's, and not taken apart, which costs time that a start may not need."""

    path: Path
    identity: Identity
    written: float
    header: Header
    granularity: Granularity | None
    subnets: tuple[IPNetwork, ...]
    internal_ips: InternalIPs | None
    adopted: bytes | None
    newest: tuple[bytes, int] | None
    lines: tuple[bytes, ...]

    def last_seen(self) -> LastSeen:
        """The state of etcd that an etcd which answers later is compared with."""
        return LastSeen(
            header=self.header,
            granularity=self.granularity,
            subnets=self.subnets,
            internal_ips=self.internal_ips,
            adopted=self.adopted,
            newest=self.newest,
        )

    def own_addresses(self) -> tuple[IPAddress, ...]:
        """The mesh addresses that this host had; empty too if its record cannot be read."""
        start = b"[" + json.dumps(Keys(self.identity.prefix).node(self.identity.node)).encode() + b","
        try:
            records = [decode_node(_kv(line).value) for line in self.lines if line.startswith(start)]
        except (ValueError, RecursionError, _Wrong, RecordError):
            return ()
        return tuple(
            interface.ip
            for record in records
            if record.public_key == self.identity.public_key
            for interface in record.mesh_addresses
        )

    def decoded(self) -> CachedSnapshot:
        """The mesh. Unusable."""
        with _reading(self.path):
            holdings = Holdings(
                header=self.header,
                kvs=tuple(map(_kv, self.lines)),
                granularity=self.granularity,
                subnets=self.subnets,
                internal_ips=self.internal_ips,
            )
            snapshot = holdings.snapshot(Keys(self.identity.prefix))
        node = snapshot.nodes.get(self.identity.node)
        if node is None or node.public_key != self.identity.public_key:
            raise Unusable(f"the mesh in {self.path} does not have this host")
        return CachedSnapshot(snapshot=snapshot, written=self.written)


def read(path: Path, identity: Identity) -> CachedMesh | None:
    """What is kept at `path` for this host; None: nothing. Unusable."""
    try:
        opened = open_regular(path, follow=False)
    except FileNotFoundError:
        return None
    except NotRegular:
        raise Unusable(f"{path} is no regular file") from None
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {descriptors.shortage(error) or error.strerror}") from None
    with opened as raw, _reading(path):
        status = os.fstat(raw.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            raise Unusable(f"others can write or read {path} (owner {status.st_uid}, mode {mode})")
        if status.st_size > MAX_BYTES:
            raise Unusable(f"{path} is larger than {MAX_BYTES} bytes")
        return _cached(path, identity, _read(raw))


def load(path: Path, identity: Identity) -> CachedSnapshot | None:
    """The mesh that is kept at `path` for this host; None: none. Unusable."""
    cached = read(path, identity)
    return None if cached is None else cached.decoded()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong in the block is Unusable. Its text is shown only if nothing of the content can be in it."""
    try:
        yield
    except Unusable:
        raise
    except (_Wrong, json.JSONDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Unusable(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None
    except RecursionError:
        raise Unusable(f"{path} is damaged: it is nested too deeply") from None
    except Exception as error:
        raise Unusable(f"{path} is damaged ({type(error).__name__})") from None


def remove(state_dir: Path) -> bool:
    """Remove what is kept; whether there was anything. OSError."""
    try:
        (state_dir / FILE).unlink()
    except FileNotFoundError:
        return False
    return True


def _lines(identity: Identity, holdings: Holdings, now: float) -> Iterator[bytes]:
    header, last = holdings.header, newest(holdings.kvs)
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
            "internalIPs": holdings.internal_ips,
            "newest": None if last is None else [_text(last[0]), last[1]],
        }
    )
    if len(holdings.kvs) > MAX_RECORDS:
        raise TooLarge(f"the mesh has {len(holdings.kvs)} keys, and at most {MAX_RECORDS} are kept")
    for kv in sorted(holdings.kvs, key=lambda kv: kv.key):
        # What nobody reads is not kept either.
        if len(kv.key) <= MAX_KEY and len(kv.value) <= MAX_VALUE:
            yield _line(
                [_text(kv.key), _text(kv.value), kv.create_revision, kv.mod_revision, kv.version, kv.lease]
            )  # fmt: skip


def _read(raw: IO[bytes]) -> list[bytes]:
    """The lines, but the checksum's, which is right. One of a value that is nobody's record, as agents of earlier
    versions kept it, is left out; in memory there is never more than `MAX_LINE` of it."""
    lines: list[bytes] = []
    digest = hashlib.sha256()
    newest: bytes | None = None
    """The checksum's, if it is the last line."""
    size, count, too_long = 0, 0, False
    with gzip.GzipFile(fileobj=raw, mode="rb") as file:
        while piece := file.readline(MAX_LINE):
            size += len(piece)
            count += not too_long
            if size > MAX_BYTES or count > MAX_RECORDS + 2:
                raise _Wrong("it holds more than is ever kept")
            if newest is not None:
                digest.update(newest)
                lines.append(newest)
                newest = None
            ends = piece.endswith(b"\n")
            if too_long or (len(piece) == MAX_LINE and not ends):
                digest.update(piece)
                too_long = not ends
            else:
                newest = piece
    if newest is None or not lines:
        raise _Wrong("it is cut short")
    last = json.loads(newest)
    if not isinstance(last, dict) or last.get("sha256") != digest.hexdigest():
        raise _Wrong("its checksum is wrong")
    return lines


def _cached(path: Path, identity: Identity, lines: list[bytes]) -> CachedMesh:
    head = json.loads(lines[0])
    if not isinstance(head, dict):
        raise _Wrong("its first line is no JSON object")
    if (number := head.get("format")) != FORMAT:
        shown = number if isinstance(number, int) and abs(number) < 1000 else "unknown"
        raise Unusable(f"{path} is of another version of kg (format {shown}, not {FORMAT})")
    for noun, name, our in (
        ("prefix", "prefix", identity.prefix),
        ("name", "node", identity.node),
        ("key", "publicKey", identity.public_key),
    ):
        if (their := _text_in(head, name)) != our:
            raise Unusable(f"{path} was written by an agent whose {noun} was {their[:100]!r}, which is {our!r} now")
    written = head.get("written")
    if isinstance(written, bool) or not isinstance(written, int | float) or not 0 <= written < 1e12:
        raise _Wrong("its time is no time")
    start = f"[{json.dumps(Keys(identity.prefix).adopted)},".encode()
    return CachedMesh(
        path=path,
        identity=identity,
        written=float(written),
        header=Header(
            cluster_id=_whole_number(head.get("clusterId"), 2**64),
            revision=_whole_number(head.get("revision")),
            raft_term=_whole_number(head.get("raftTerm"), 2**64),
        ),
        granularity=_setting(Granularity, head.get("granularity"), "granularity"),
        subnets=_subnets(head.get("subnets")),
        internal_ips=_setting(InternalIPs, head.get("internalIPs"), "internal-ips"),
        adopted=next((_kv(line).value for line in lines[1:] if line.startswith(start)), None),
        newest=_newest(head.get("newest")),
        lines=tuple(lines[1:]),
    )


def _text_in(head: dict[str, Any], name: str) -> str:
    value = head.get(name)
    if not isinstance(value, str):
        raise _Wrong(f"its {name} is no text")
    return value


def _whole_number(value: object, end: int = 2**63) -> int:
    # bool is an int.
    if type(value) is not int or not 0 <= value < end:
        raise _Wrong("it has a number that etcd never gives")
    return value


_Setting = TypeVar("_Setting", bound=StrEnum)


def _setting(kind: type[_Setting], value: object, name: str) -> _Setting | None:
    """A setting of the mesh as the file has it; None: it had none."""
    if value is None:
        return None
    setting = next((member for member in kind if member == value), None)
    if setting is None:
        raise _Wrong(f"its {name} is none")
    return setting


def _subnets(value: object) -> tuple[IPNetwork, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _Wrong("its subnets are no list of networks")
    try:
        subnets = tuple(map(ip_network, value))
    except ValueError:
        raise _Wrong("its subnets are no networks") from None
    if len({subnet.version for subnet in subnets}) != len(subnets):
        raise _Wrong("it has two subnets of one family")
    return subnets


def _newest(value: object) -> tuple[bytes, int] | None:
    """The key that was written last; None: the file does not say, as those of earlier versions."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise _Wrong("its newest key is none")
    return _bytes(value[0]), _whole_number(value[1])


def _kv(line: bytes) -> KeyValue:
    parts = json.loads(line)
    if not isinstance(parts, list) or len(parts) != 6:
        raise _Wrong("a line of it is no key-value")
    key, value, create, mod, version, lease = parts
    if not isinstance(key, str) or not isinstance(value, str):
        raise _Wrong("a key or a value in it is no text")
    return KeyValue(
        key=_bytes(key),
        value=_bytes(value),
        create_revision=_whole_number(create),
        mod_revision=_whole_number(mod),
        version=_whole_number(version),
        lease=_whole_number(lease),
    )


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
