"""Leader hints: what hosts report to each other of leaders while one of them cannot reach etcd.

A host that is cut off from etcd queries other nodes, one a time, whether they have seen a newer revision than it has,
and which segments have other leaders since. It follows the hints until etcd is back: an overlay on its last
snapshot that changes leaders and nothing else (`followed`). The revision decides: only a node that has applied a later
revision is followed, and the later of two.

Each message carries a tag that only its two ends can compute: a hash keyed with the secret on which their WireGuard
keys agree. A response names the query's random number, so an old one is of no use. Names do not travel, only
digests of them: who is asked by a stranger, or told of one, understands nothing.

Pure: bytes, topologies and times come in, bytes and snapshots go out.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable, Mapping
from hashlib import blake2b, blake2s

from attrs import define, evolve, field, frozen

from kilo_etcd.model import Candidate, CandidateClass, Snapshot
from kilo_etcd.topology.segments import Segment, Topology

MOST_LEADERS = 60
"""Leaders in one answer, which then has 1,004 bytes."""

FRESH = 15.0
"""Seconds for which a leader hint counts."""

_QUERY, _RESPONSE, _LOCAL = 1, 2, 2
"""Kinds: a query, a response, and what is added if it goes over a location's own network."""
_HEAD = struct.Struct("!2sB8s8sQB")
"""`kE`, kind, nonce, digest of the sender's public key, revision, number of leaders."""
_LEADER = struct.Struct("!8s8s")
"""Digests of a segment's key and of its leader's public key."""
_MAGIC = b"kE"
_TAG_BYTES = 16


def digest(text: str) -> bytes:
    """By what a segment's or a node's key is named in messages."""
    return blake2b(text.encode(), digest_size=8).digest()


@frozen(kw_only=True)
class PeerMessage:
    """A query (`is_response` is False) or a response."""

    is_response: bool
    nonce: bytes
    """Eight random bytes of the sender of the query."""
    sender: bytes
    revision: int
    """The one that the sender has applied."""
    leaders: tuple[tuple[bytes, bytes], ...] = ()
    """(segment, leader): those that have changed since the asker's revision, as far as they fit."""
    local: bool = False
    """It goes between the internal IPs of two nodes, and that it arrives is all there is to it."""

    def pack(self, secret: bytes) -> bytes:
        """The bytes of it, for the node that shares this secret."""
        kind = (_RESPONSE if self.is_response else _QUERY) + (_LOCAL if self.local else 0)
        head = _HEAD.pack(_MAGIC, kind, self.nonce, self.sender, self.revision, len(self.leaders))
        body = head + b"".join(_LEADER.pack(*leader) for leader in self.leaders)
        return body + _tag(body, secret)


def sender_of(data: bytes) -> bytes | None:
    """The sender that a message names; None: it is no message."""
    if len(data) < _HEAD.size + _TAG_BYTES:
        return None
    magic, kind, _, sender, _, number = _HEAD.unpack(data[: _HEAD.size])
    fits = len(data) == _HEAD.size + number * _LEADER.size + _TAG_BYTES
    return bytes(sender) if magic == _MAGIC and _QUERY <= kind <= _RESPONSE + _LOCAL and fits else None


def nonce_of(data: bytes) -> tuple[bytes, bool]:
    """The random number of a message of which `sender_of` knows the sender, and whether it says that it is an answer:
    a look that costs nothing."""
    return data[3:11], data[2] in (_RESPONSE, _RESPONSE + _LOCAL)


def unpack(data: bytes, secret: bytes) -> PeerMessage | None:
    """The message, if it was made with this secret."""
    if sender_of(data) is None:
        return None
    body, tag = data[:-_TAG_BYTES], data[-_TAG_BYTES:]
    if not hmac.compare_digest(tag, _tag(body, secret)):
        return None
    _, kind, nonce, sender, revision, _ = _HEAD.unpack(body[: _HEAD.size])
    leaders = tuple((segment, leader) for segment, leader in _LEADER.iter_unpack(body[_HEAD.size :]))
    local = kind > _LOCAL
    is_response = kind in (_RESPONSE, _RESPONSE + _LOCAL)
    return PeerMessage(
        is_response=is_response, nonce=nonce, sender=sender, revision=revision, leaders=leaders, local=local
    )


def _tag(body: bytes, secret: bytes) -> bytes:
    return blake2s(body, key=secret, digest_size=_TAG_BYTES, person=b"kilo-etc").digest()


@define
class LeaderHistory:
    """Since which revision each segment has had its leader, as far as this host has seen."""

    _since: dict[str, tuple[str, int]] = field(factory=dict)
    _noted: object = None

    def note(self, topology: Topology) -> None:
        """`topology` is in force."""
        if topology.identity is self._noted:
            return
        since = self._since
        keys: Iterable[str] = topology.segments if topology.base is not self._noted else topology.changed
        for key in keys:
            segment = topology.segments.get(key)
            if segment is None:
                since.pop(key, None)
            elif key not in since or since[key][0] != segment.leader.name:
                since[key] = (segment.leader.name, topology.snapshot.revision)
        if len(since) > len(topology.segments):
            self._since = {key: since[key] for key in since if key in topology.segments}
        self._noted = topology.identity

    def response(self, query: PeerMessage, topology: Topology, own: bytes, asker: str) -> PeerMessage:
        """What to tell the node `asker`: its own segment first, then the newest changes."""
        home = topology.segment_of(asker).key if asker in topology.snapshot.nodes else ""
        changed = sorted(
            (key for key, (_, revision) in self._since.items() if revision > query.revision),
            key=lambda key: (key != home, -self._since[key][1]),
        )
        return PeerMessage(
            is_response=True,
            nonce=query.nonce,
            sender=own,
            revision=topology.snapshot.revision,
            leaders=_leaders(topology, changed),
        )


def _leaders(topology: Topology, keys: Iterable[str]) -> tuple[tuple[bytes, bytes], ...]:
    segments = (topology.segments[key] for key in keys if key in topology.segments)
    shared = (segment for segment in segments if len(segment.members) > 1)
    return tuple((digest(segment.key), digest(segment.leader.public_key)) for segment in shared)[:MOST_LEADERS]


@frozen
class LeaderHint:
    """The last hint of a node, and when it came."""

    time: float
    revision: int
    leaders: Mapping[bytes, bytes]


@frozen
class LeaderHints:
    """Which segments have which leaders by the hints of nodes that have applied `revision`, a later one than this host.

    In force as long as this host's own snapshot is older.
    """

    revision: int = 0
    leaders: Mapping[str, str] = field(factory=dict)


def leaders_hinted(topology: Topology, hints: Iterable[LeaderHint], now: float) -> LeaderHints:
    """The hints on what this host knows: segments of `topology` and their members."""
    later = [hint for hint in hints if hint.revision > topology.snapshot.revision and now - hint.time <= FRESH]
    if not later:
        return LeaderHints()
    later.sort(key=lambda hint: hint.revision)
    newest: dict[bytes, bytes] = {}
    for hint in later:
        newest.update(hint.leaders)
    leaders: dict[str, str] = {}
    for key, segment in topology.segments.items():
        leader = newest.get(digest(key)) if len(segment.members) > 1 else None
        if leader is None:
            continue
        name = next((node.name for node in segment.members if digest(node.public_key) == leader), None)
        if name is not None:
            leaders[key] = name
    return LeaderHints(later[-1].revision, leaders) if leaders else LeaderHints()


def followed(topology: Topology, hints: LeaderHints) -> Snapshot:
    """The snapshot of `topology`, but that the hinted nodes lead; nothing else differs, nor does the revision."""
    snapshot = topology.snapshot
    if hints.revision <= snapshot.revision or not hints.leaders:
        return snapshot
    candidates = dict(snapshot.candidates)
    for key, name in hints.leaders.items():
        segment: Segment | None = topology.segments.get(key)
        if segment is None or all(node.name != name for node in segment.members):
            continue
        others = tuple(candidate for candidate in candidates.get(segment.location, ()) if candidate.node != name)
        first = Candidate(node=name, rank=CandidateClass.ANNOTATED_PUBLIC, create_revision=0)
        candidates[segment.location] = (first, *others)
    # Probe reports are about an election that is over.
    return evolve(snapshot, candidates=candidates, probe_reports={})
