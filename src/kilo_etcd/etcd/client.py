"""The client: each method of `api.Client` as one call. Policy is elsewhere: in `calls`, `lease` and `watch`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from . import api, values
from .calls import Caller, M, Message
from .channel import Channel, EndpointsUnreachable
from .grpc import Doing, StatusError, TransportFailed
from .lease import keep_alive
from .pb import etcd_pb2 as pb
from .tasks import background
from .values import first_key, only_reads, prefix_range, raw
from .watch import watch

PAGE = 500
"""Keys in one answer when a prefix is read: with values of etcd's largest size still under a gigabyte."""


class EtcdClient:
    """Implements `api.Client`; made by `open_client`."""

    def __init__(
        self, config: api.Config, nursery: trio.Nursery, *, on_remark: Callable[[str], object] = lambda _sentence: None
    ) -> None:
        if not config.endpoints and config.discovery is None:
            raise api.BadRequest("no etcd endpoint is given; use --endpoints")
        self._config = config
        self._caller = Caller(config, Channel(config, nursery, on_remark=on_remark))

    @property
    def endpoint(self) -> str | None:
        """Implements `api.Client.endpoint`."""
        return self._caller.channel.endpoint

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Implements `api.Client.endpoints`."""
        return tuple(map(str, self._caller.channel.endpoints))

    def prefer(self, endpoints: Sequence[str]) -> None:
        """Implements `api.Client.prefer`."""
        self._caller.channel.prefer(endpoints)

    async def wait_endpoints(self, seen: Collection[str]) -> tuple[str, ...]:
        """Implements `api.Client.wait_endpoints`."""
        return await self._caller.channel.wait_endpoints(seen)

    async def get(self, key: api.Text, *, serializable: bool = False) -> api.KeyValue | None:
        """Implements `api.Client.get`."""
        result = await self.range(key, serializable=serializable)
        return result.kvs[0] if result.kvs else None

    async def range(
        self,
        key: api.Text,
        range_end: api.Text | None = None,
        *,
        limit: int = 0,
        revision: int = 0,
        serializable: bool = False,
        keys_only: bool = False,
        count_only: bool = False,
    ) -> api.RangeResult:
        """Implements `api.Client.range`. A Compacted names the oldest revision that is left, found by a watch, or
        the one after `revision` if that fails."""
        request = pb.RangeRequest(
            key=raw(key),
            range_end=raw(range_end or b""),
            limit=limit,
            revision=revision,
            serializable=serializable,
            keys_only=keys_only,
            count_only=count_only,
        )
        try:
            answer = await self._call("KV/Range", request, pb.RangeResponse, Doing("read", raw(key)), idempotent=True)
        except api.Compacted as error:
            raise api.Compacted(error.compact_revision or await self._compact_revision(raw(key), revision)) from None
        return values.range_result(answer)

    async def get_prefix(self, prefix: api.Text, *, revision: int = 0) -> api.RangeResult:
        """Implements `api.Client.get_prefix`. If no revision was asked for and the pages' one is compacted meanwhile,
        it is read again, three times in all."""
        for _ in (1, 2, 3):
            try:
                return await self._read_pages(prefix, revision)
            except api.Compacted as error:
                # The revision of the first page went under while the others were read.
                if revision:
                    raise
                compacted = error
        raise compacted

    async def _read_pages(self, prefix: api.Text, revision: int) -> api.RangeResult:
        key, end = prefix_range(prefix)
        first = page = await self.range(key, end, limit=PAGE, revision=revision)
        kvs = list(page.kvs)
        while page.more:
            page = await self.range(kvs[-1].key + b"\0", end, limit=PAGE, revision=revision or first.header.revision)
            kvs.extend(page.kvs)
        return api.RangeResult(kvs=tuple(kvs), header=first.header, more=False, count=len(kvs))

    async def _compact_revision(self, key: bytes, revision: int) -> int:
        """Where a compacted revision was asked for, a watch is told which is the oldest; a read is not."""
        with trio.move_on_after(self._config.attempt_timeout):
            try:
                async with watch(self._caller, key, b"", revision, False) as watching:
                    await anext(watching)
            except api.Compacted as error:
                return error.compact_revision
            except api.EtcdError:
                pass
        return revision + 1

    async def put(self, key: api.Text, value: api.Text, *, lease: int = 0, prev_kv: bool = False) -> api.PutResult:
        """Implements `api.Client.put`."""
        request = pb.PutRequest(key=raw(key), value=raw(value), lease=lease, prev_kv=prev_kv)
        return values.put_result(await self._call("KV/Put", request, pb.PutResponse, Doing("write", raw(key))))

    async def delete(self, key: api.Text, range_end: api.Text | None = None) -> api.DeleteResult:
        """Implements `api.Client.delete`."""
        request = pb.DeleteRangeRequest(key=raw(key), range_end=raw(range_end or b""))
        answer = await self._call("KV/DeleteRange", request, pb.DeleteRangeResponse, Doing("delete", raw(key)))
        return values.delete_result(answer)

    async def delete_prefix(self, prefix: api.Text) -> api.DeleteResult:
        """Implements `api.Client.delete_prefix`."""
        return await self.delete(*prefix_range(prefix))

    async def txn(
        self, compare: Sequence[api.Compare], success: Sequence[api.Op] = (), failure: Sequence[api.Op] = ()
    ) -> api.TxnResult:
        """Implements `api.Client.txn`. An error names the first key that the transaction writes."""
        doing = Doing("commit a transaction on", first_key(compare, success, failure))
        request = values.transaction(compare, success, failure)
        answer = await self._call("KV/Txn", request, pb.TxnResponse, doing, idempotent=only_reads(success, failure))
        return values.txn_result(answer)

    async def compact(self, revision: int) -> None:
        """Forget the revisions before `revision`; nothing happens where they are forgotten already."""
        request = pb.CompactionRequest(revision=revision, physical=True)
        with suppress(api.Compacted):
            await self._call("KV/Compact", request, pb.CompactionResponse, Doing(f"compact at {revision}"))

    async def grant_lease(self, ttl: int, lease_id: int = 0) -> api.Lease:
        """Implements `api.Client.grant_lease`."""
        request = pb.LeaseGrantRequest(TTL=ttl, ID=lease_id)
        answer = await self._call("Lease/LeaseGrant", request, pb.LeaseGrantResponse, Doing("grant a lease"))
        return api.Lease(id=answer.ID, ttl=answer.TTL)

    async def revoke_lease(self, lease_id: int) -> None:
        """Implements `api.Client.revoke_lease`."""
        request = pb.LeaseRevokeRequest(ID=lease_id)
        await self._call("Lease/LeaseRevoke", request, pb.LeaseRevokeResponse, Doing(f"revoke lease {lease_id:x}"))

    async def lease_time_to_live(self, lease_id: int, *, keys: bool = False) -> api.LeaseInfo:
        """Implements `api.Client.lease_time_to_live`."""
        answer = await self._call(
            "Lease/LeaseTimeToLive",
            pb.LeaseTimeToLiveRequest(ID=lease_id, keys=keys),
            pb.LeaseTimeToLiveResponse,
            Doing(f"look up lease {lease_id:x}"),
            idempotent=True,
        )
        return api.LeaseInfo(id=answer.ID, ttl=answer.TTL, granted_ttl=answer.grantedTTL, keys=tuple(answer.keys))

    async def refresh_lease(self, lease_id: int) -> int:
        """Implements `api.Client.refresh_lease`."""
        answer = await self._call(
            "Lease/LeaseKeepAlive",
            pb.LeaseKeepAliveRequest(ID=lease_id),
            pb.LeaseKeepAliveResponse,
            Doing(f"refresh lease {lease_id:x}"),
            idempotent=True,
            streaming=True,
        )
        if answer.TTL <= 0:
            raise api.LeaseNotFound(f"etcd has no lease {lease_id:x} (expired or revoked); grant another")
        return answer.TTL

    def keep_alive(
        self, lease_id: int, ttl: int, *, interval: float | None = None
    ) -> AbstractAsyncContextManager[api.KeepAlive]:
        """Implements `api.Client.keep_alive`."""
        return keep_alive(self._caller, lease_id, ttl, interval)

    def watch(
        self,
        key: api.Text,
        range_end: api.Text | None = None,
        *,
        start_revision: int = 0,
        progress_notify: bool = True,
    ) -> AbstractAsyncContextManager[api.Watch]:
        """Implements `api.Client.watch`."""
        return watch(self._caller, raw(key), raw(range_end or b""), start_revision, progress_notify)

    def watch_prefix(self, prefix: api.Text, *, start_revision: int = 0) -> AbstractAsyncContextManager[api.Watch]:
        """Implements `api.Client.watch_prefix`."""
        return watch(self._caller, *prefix_range(prefix), start_revision, True)

    async def status(self, endpoint: str | None = None) -> api.Status:
        """The status of a member: the one in use, or the one at `endpoint`. Raises EtcdError."""
        doing = Doing("tell its status")
        path = "/etcdserverpb.Maintenance/Status"
        if endpoint is None:
            return values.status(
                await self._caller.unary(path, pb.StatusRequest(), pb.StatusResponse, doing, idempotent=True)
            )
        parsed = self._caller.channel.parse(endpoint)
        connection = None
        try:
            connection = await self._caller.channel.dial_one(parsed)
            token = await self._caller.tokens.get() if self._caller.tokens else ""
            with trio.move_on_after(self._config.attempt_timeout):
                answer = await self._caller.attempt(connection, path, pb.StatusRequest(), token)
                return values.status(pb.StatusResponse.FromString(answer))
            raise TransportFailed(f"no answer within {self._config.attempt_timeout:g} s")
        except TransportFailed as failure:
            raise EndpointsUnreachable({parsed: failure}).to_error() from None
        except StatusError as failure:
            assert connection
            raise self._caller.explain(failure, connection, doing) from None
        finally:
            if connection:
                connection.close()

    async def members(self) -> tuple[values.Member, ...]:
        """The members of the cluster, as the member in use knows them."""
        answer = await self._call(
            "Cluster/MemberList",
            pb.MemberListRequest(),
            pb.MemberListResponse,
            Doing("list its members"),
            idempotent=True,
        )
        return tuple(map(values.member, answer.members))

    async def _call(
        self,
        method: str,
        request: Message,
        answer: type[M],
        doing: Doing,
        *,
        idempotent: bool = False,
        streaming: bool = False,
    ) -> M:
        path = f"/etcdserverpb.{method}"
        return await self._caller.unary(path, request, answer, doing, idempotent=idempotent, streaming=streaming)

    def __repr__(self) -> str:
        user = f" as {self._config.shown_user!r}" if self._config.user else ""
        return f"<EtcdClient{user} {self._caller.channel!r}>"


@asynccontextmanager
async def open_client(
    config: api.Config, *, on_remark: Callable[[str], object] = lambda _sentence: None
) -> AsyncIterator[EtcdClient]:
    """A client for the length of the block. Connects when first used, so etcd need not be there. `on_remark` is called
    with sentences on discovered endpoints that are left out. Raises BadRequest for endpoints that are none."""
    async with background() as nursery:
        yield EtcdClient(config, nursery, on_remark=on_remark)


if TYPE_CHECKING:

    def _implements(client: EtcdClient) -> api.Client:
        return client
