"""What the client offers, as values and a protocol: the seam at which the in-memory fake takes its place.

Keys and values are bytes; `str` is taken as UTF-8 where a key or value is given. Revisions are etcd's int64.
Every failure is an `EtcdError`; each subclass is one thing that a caller can act on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import TYPE_CHECKING, Protocol, TypeAlias

from attrs import field, frozen

if TYPE_CHECKING:
    import trio

    from .values import Member

Text: TypeAlias = str | bytes


class EtcdError(Exception):
    """Something that etcd or the way to it refused or failed; the message is one sentence for the operator."""

    kind = "etcd failed"
    """The kind of failure, in a few words; the message has the rest."""


class Unavailable(EtcdError):
    """No endpoint answered in time, or the member has no quorum: retrying later can help."""

    kind = "etcd is out of reach"


class Full(Unavailable):
    """etcd's database has reached its quota (NOSPACE): it answers, and takes no writes until that is mended."""

    kind = "etcd takes no writes"


class Unauthenticated(EtcdError):
    """Wrong or missing user, password, token or client certificate."""

    kind = "etcd does not let this host in"


class PermissionDenied(EtcdError):
    """The user is known but may not do this; the message names the key."""

    kind = "etcd denies permission"


class ConnectionRefusedByTls(EtcdError):
    """TLS could not be agreed: unknown CA, wrong name, client certificate refused or missing."""

    kind = "TLS with etcd fails"


class Compacted(EtcdError):
    """The revision asked for is gone; `compact_revision` is the oldest that can be watched."""

    def __init__(self, compact_revision: int) -> None:
        super().__init__(f"etcd has compacted the revisions before {compact_revision}; list again")
        self.compact_revision = compact_revision


class LeaseNotFound(EtcdError):
    """The lease has expired, was revoked or never was."""


class BadRequest(EtcdError):
    """etcd understood and refused: too large, too many operations, duplicate key in a transaction."""


@frozen(kw_only=True)
class Header:
    """What every answer of etcd carries: which cluster and member gave it, at which revision of the store and term of
    raft."""

    cluster_id: int = 0
    member_id: int = 0
    revision: int = 0
    raft_term: int = 0


@frozen(kw_only=True)
class KeyValue:
    """A key as etcd holds it. The revisions are those of its creation and last write; `version` counts its writes since
    the creation, and `lease` is 0 if none holds it."""

    key: bytes
    value: bytes
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    lease: int = 0


class EventType(Enum):
    """What happened to a key, with the numbers of etcd's protocol. A lease that ends gives a DELETE too."""

    PUT = 0
    DELETE = 1


@frozen(kw_only=True)
class Event:
    """A change of one key. On DELETE `kv` has the key and the mod revision of the deletion, no value."""

    type: EventType
    kv: KeyValue


@frozen(kw_only=True)
class WatchBatch:
    """Events in revision order; an empty batch is a progress notice: all up to `revision` has been seen.

    A batch never splits a revision: all events of one transaction are in one batch (fragments are joined).
    """

    events: tuple[Event, ...]
    revision: int
    header: Header


@frozen(kw_only=True)
class RangeResult:
    """The keys of a range, in order, at one revision. `count` is how many there are; with `more`, `kvs` has only the
    first, because of a limit."""

    kvs: tuple[KeyValue, ...]
    header: Header
    more: bool = False
    count: int = 0


@frozen(kw_only=True)
class PutResult:
    """The answer to a put. `prev_kv` is what the key held before, if that was asked for and there was something."""

    header: Header
    prev_kv: KeyValue | None = None


@frozen(kw_only=True)
class DeleteResult:
    """The answer to a deletion: how many keys are gone. 0 is no error."""

    header: Header
    deleted: int


class CompareTarget(Enum):
    """Which property of a key a condition looks at, with the numbers of etcd's protocol."""

    VERSION = 0
    CREATE = 1
    MOD = 2
    VALUE = 3
    LEASE = 4


class Is(Enum):
    """How a condition compares, with the numbers of etcd's protocol: the key's property stands left, the condition's
    value right."""

    EQUAL = 0
    GREATER = 1
    LESS = 2
    NOT_EQUAL = 3


@frozen
class Compare:
    """A condition of a transaction, e.g. `Compare("/k", CompareTarget.CREATE, Is.EQUAL, 0)`: the key does not exist."""

    key: Text
    target: CompareTarget
    result: Is
    value: int | bytes


def absent(key: Text) -> Compare:
    """The condition that `key` does not exist."""
    return Compare(key, CompareTarget.CREATE, Is.EQUAL, 0)


def unchanged(kv: KeyValue) -> Compare:
    """The condition that `kv` has not been written since it was read."""
    return Compare(kv.key, CompareTarget.MOD, Is.EQUAL, kv.mod_revision)


@frozen
class Put:
    """Write `key` in a transaction. `lease` is the lease that it ends with; 0: none."""

    key: Text
    value: Text
    lease: int = 0


@frozen
class Get:
    """Read in a transaction: `key` alone, or the range from it up to and without `range_end`."""

    key: Text
    range_end: Text | None = None


@frozen
class Delete:
    """Delete in a transaction: `key` alone, or the range from it up to and without `range_end`."""

    key: Text
    range_end: Text | None = None


Op: TypeAlias = Put | Get | Delete


@frozen(kw_only=True)
class TxnResult:
    """The answer to a transaction: whether all conditions held, and one response for each operation of the side that
    was executed, in its order."""

    succeeded: bool
    responses: tuple[PutResult | RangeResult | DeleteResult, ...]
    header: Header


@frozen(kw_only=True)
class Lease:
    """A lease that etcd has granted. Keys under it are deleted when it ends."""

    id: int
    ttl: int
    """Seconds, as granted (etcd may grant more than was asked for)."""


@frozen(kw_only=True)
class LeaseInfo:
    """How a lease stands at the member that was asked."""

    id: int
    ttl: int
    """Seconds left; -1: the lease does not exist."""
    granted_ttl: int
    keys: tuple[bytes, ...] = ()


@frozen(kw_only=True)
class Status:
    """A member's own account of itself."""

    version: str
    leader: int
    db_size: int
    """Bytes."""
    db_size_in_use: int
    """Bytes of these that hold something. What is free is filled before the database grows."""
    raft_term: int
    is_learner: bool
    errors: tuple[str, ...]
    header: Header


def prefix_end(prefix: Text) -> bytes:
    """The `range_end` that makes a range of all keys with `prefix` (etcd's rule: last byte plus one)."""
    raw = bytearray(prefix.encode() if isinstance(prefix, str) else prefix)
    while raw:
        if raw[-1] < 0xFF:
            raw[-1] += 1
            return bytes(raw)
        raw.pop()
    return b"\0"


class Watch(Protocol):
    """Iterate for batches. Reconnects by itself and resumes at the next revision, nothing lost or doubled;
    raises `Compacted` when it cannot."""

    @property
    def reconnects(self) -> int:
        """How often it has connected anew: etcd may have been replaced meanwhile."""
        ...

    def __aiter__(self) -> Watch: ...
    async def __anext__(self) -> WatchBatch: ...
    async def request_progress(self) -> None:
        """Ask for a progress notice now; it arrives as an empty batch."""
        ...


class KeepAlive(Protocol):
    """A lease being kept. `lost` is set when etcd says that the lease is gone, or when so long no keepalive was
    confirmed that it must have ended."""

    lease_id: int
    lost: trio.Event

    @property
    def expires_at(self) -> float:
        """trio.current_time() until which the lease is known to live."""
        ...


class Client(Protocol):
    """etcd, as kilo uses it. One client serves any number of tasks."""

    async def get(self, key: Text, *, serializable: bool = False) -> KeyValue | None:
        """The key, or None if it does not exist. `serializable` lets the member answer from what it has, without its
        leader: sooner, and maybe of the past."""
        ...

    async def range(
        self,
        key: Text,
        range_end: Text | None = None,
        *,
        limit: int = 0,
        revision: int = 0,
        serializable: bool = False,
        keys_only: bool = False,
        count_only: bool = False,
    ) -> RangeResult:
        """The keys from `key` up to and without `range_end`, or `key` alone, at `revision` (0: now). `limit` 0 means
        all. Raises Compacted if the revision is gone."""
        ...

    async def get_prefix(self, prefix: Text, *, revision: int = 0) -> RangeResult:
        """All keys with the prefix at one revision, read in pages so that no answer is too large."""
        ...

    async def put(self, key: Text, value: Text, *, lease: int = 0, prev_kv: bool = False) -> PutResult:
        """Write a key, under a lease if one is given. It is sent again only if etcd certainly did not process it:
        after Unavailable it may or may not be written."""
        ...

    async def delete(self, key: Text, range_end: Text | None = None) -> DeleteResult:
        """Delete a key, or the range from it up to and without `range_end`. It is sent again as with `put`."""
        ...

    async def delete_prefix(self, prefix: Text) -> DeleteResult:
        """Delete all keys with the prefix; the empty prefix means everything."""
        ...

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Execute `success` if all conditions of `compare` hold, else `failure`, at one revision. If neither writes, it
        is repeated when an answer fails to come; else it is sent again as with `put`."""
        ...

    async def grant_lease(self, ttl: int, lease_id: int = 0) -> Lease:
        """Make a lease of `ttl` seconds. `lease_id` 0 lets etcd choose the ID."""
        ...

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease now; its keys are deleted. Raises LeaseNotFound."""
        ...

    async def lease_time_to_live(self, lease_id: int, *, keys: bool = False) -> LeaseInfo:
        """How long a lease still lives, and with `keys` which keys are under it. A lease that does not exist is no
        error: its `ttl` is -1."""
        ...

    async def refresh_lease(self, lease_id: int) -> int:
        """One keepalive; the TTL in seconds, or LeaseNotFound. Behind etcd's gRPC proxy a lease that `keep_alive` keeps
        is answered for with the proxy's next keepalive of it, so end that first."""
        ...

    def keep_alive(
        self, lease_id: int, ttl: int, *, interval: float | None = None
    ) -> AbstractAsyncContextManager[KeepAlive]:
        """Keep the lease from a background task until the block ends: every `interval` seconds (ttl/3)."""
        ...

    def watch(
        self,
        key: Text,
        range_end: Text | None = None,
        *,
        start_revision: int = 0,
        progress_notify: bool = True,
    ) -> AbstractAsyncContextManager[Watch]:
        """Watch a key, or the range from it up to and without `range_end`, from `start_revision` on (0: from now; the
        block then begins once etcd has made the watch). `progress_notify` has etcd send an empty batch now and then
        while nothing changes."""
        ...

    def watch_prefix(self, prefix: Text, *, start_revision: int = 0) -> AbstractAsyncContextManager[Watch]:
        """Watch all keys with the prefix, as `watch` does for a range."""
        ...

    async def members(self) -> tuple[Member, ...]:
        """The members of the cluster, as the member in use knows them."""
        ...

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoints that it may connect to, as URLs; discovered ones as soon as they are known."""
        ...

    @property
    def endpoint(self) -> str | None:
        """The endpoint of the connection in use, as a URL; None while there is none."""
        ...

    async def wait_endpoints(self, seen: Collection[str]) -> tuple[str, ...]:
        """`endpoints`, as soon as they are others than `seen`, in whichever order."""
        ...

    def prefer(self, endpoints: Sequence[str]) -> None:
        """Connect to these from now on, and to those of the configuration only if none of them can be connected to.
        A connection that stands is kept. Raises BadRequest for an endpoint that is none."""
        ...

    async def status(self, endpoint: str | None = None) -> Status:
        """The status of a member: the one in use, or the one at `endpoint`."""
        ...


@frozen(kw_only=True)
class Tls:
    """Paths of PEM files. `ca` None: the system's CAs."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    insecure_skip_verify: bool = False


@frozen(kw_only=True)
class Discovery:
    """Where the SRV records are that name etcd's endpoints, as etcdctl looks for them."""

    domain: str
    service_name: str = ""
    """What the names of the services end in."""
    insecure: bool = False
    """Whether endpoints without TLS are taken too."""

    @property
    def server_name(self) -> str:
        """The name that certificates must be good for; empty: each for the name of its endpoint."""
        return "" if self.insecure else self.domain.rstrip(".")


@frozen(kw_only=True)
class Config:
    """How to reach etcd. Endpoints are URLs (`http://`, `https://`) or `host:port` as etcdctl takes them."""

    endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    """None if they are discovered."""
    prefer_first: bool = False
    """Whether the first of `endpoints` is tried before the others."""
    more_endpoints: tuple[str, ...] = ()
    """Tried if none of the others can be connected to."""
    discovery: Discovery | None = None
    tls: Tls | None = None
    user: str | None = None
    """In messages: `shown_user`."""
    password: str | None = field(default=None, repr=False)
    dial_timeout: float = 2.0
    """Seconds for one attempt to connect (TCP, TLS, HTTP/2 preface)."""
    call_timeout: float = 5.0
    """Seconds for a unary call, all attempts together; a read takes longer while parts of its answer come."""
    attempt_timeout: float = 2.0
    """Seconds for one attempt of a unary call."""
    ping_interval: float = 1.0
    """Seconds of silence after which the member is pinged."""
    ping_timeout: float = 1.5
    """Seconds without an answer to a ping after which the member is left. ping_interval + ping_timeout < 3."""

    @property
    def shown_user(self) -> str:
        """The user's name up to a colon: beside a password of its own, `name:password` is taken for the name."""
        return (self.user or "").partition(":")[0]
