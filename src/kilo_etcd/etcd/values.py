"""Between the values of `api` and etcd's messages; nothing else knows both."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from .api import (
    Compare,
    CompareTarget,
    Delete,
    DeleteResult,
    Event,
    EventType,
    Get,
    Header,
    KeyValue,
    Op,
    Put,
    PutResult,
    RangeResult,
    Status,
    Text,
    TxnResult,
    prefix_end,
)
from .pb import etcd_pb2 as pb


@frozen(kw_only=True)
class Member:
    """A member of the cluster. `name` is empty until it has started for the first time."""

    id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    is_learner: bool


def raw(text: Text) -> bytes:
    """A key or value as etcd has it: text as UTF-8, bytes as they are."""
    return text.encode() if isinstance(text, str) else text


def prefix_range(prefix: Text) -> tuple[bytes, bytes]:
    """Key and range_end of all keys with the prefix; the empty prefix means all keys, which etcd writes as NUL."""
    return raw(prefix) or b"\0", prefix_end(prefix)


def header(message: pb.ResponseHeader) -> Header:
    """The header of an answer, from protobuf."""
    return Header(
        cluster_id=message.cluster_id,
        member_id=message.member_id,
        revision=message.revision,
        raft_term=message.raft_term,
    )


def key_value(kv: pb.KeyValue) -> KeyValue:
    """A key with its value, from protobuf."""
    return KeyValue(
        key=kv.key,
        value=kv.value,
        create_revision=kv.create_revision,
        mod_revision=kv.mod_revision,
        version=kv.version,
        lease=kv.lease,
    )


def event(message: pb.Event) -> Event:
    """A change of a key, from protobuf."""
    return Event(type=EventType(message.type), kv=key_value(message.kv))


def range_result(answer: pb.RangeResponse) -> RangeResult:
    """The answer to a range request, from protobuf."""
    return RangeResult(
        kvs=tuple(map(key_value, answer.kvs)), header=header(answer.header), more=answer.more, count=answer.count
    )


def put_result(answer: pb.PutResponse) -> PutResult:
    """The answer to a put, from protobuf."""
    return PutResult(
        header=header(answer.header), prev_kv=key_value(answer.prev_kv) if answer.HasField("prev_kv") else None
    )


def delete_result(answer: pb.DeleteRangeResponse) -> DeleteResult:
    """The answer to a deletion, from protobuf."""
    return DeleteResult(header=header(answer.header), deleted=answer.deleted)


def compare(condition: Compare) -> pb.Compare:
    """A condition of a transaction, for protobuf. Raises TypeError if the value does not suit what is compared."""
    message = pb.Compare(
        key=raw(condition.key),
        target=condition.target.value,  # type: ignore[arg-type]
        result=condition.result.value,  # type: ignore[arg-type]
    )
    if condition.target is CompareTarget.VALUE:
        message.value = condition.value if isinstance(condition.value, bytes) else raw(str(condition.value))
        return message
    if not isinstance(condition.value, int):
        raise TypeError(f"a comparison of {condition.target.name} is with a number, not {condition.value!r}")
    number = condition.value
    if condition.target is CompareTarget.VERSION:
        message.version = number
    elif condition.target is CompareTarget.CREATE:
        message.create_revision = number
    elif condition.target is CompareTarget.MOD:
        message.mod_revision = number
    else:
        message.lease = number
    return message


def operation(op: Op) -> pb.RequestOp:
    """An operation of a transaction, for protobuf."""
    if isinstance(op, Put):
        return pb.RequestOp(request_put=pb.PutRequest(key=raw(op.key), value=raw(op.value), lease=op.lease))
    end = raw(op.range_end) if op.range_end is not None else b""
    if isinstance(op, Get):
        return pb.RequestOp(request_range=pb.RangeRequest(key=raw(op.key), range_end=end))
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=raw(op.key), range_end=end))


def transaction(conditions: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op]) -> pb.TxnRequest:
    """A transaction, for protobuf."""
    return pb.TxnRequest(
        compare=[compare(condition) for condition in conditions],
        success=[operation(op) for op in success],
        failure=[operation(op) for op in failure],
    )


def only_reads(*operations: Sequence[Op]) -> bool:
    """Whether no operation writes, so that the transaction may be sent a second time."""
    return all(isinstance(op, Get) for ops in operations for op in ops)


def first_key(conditions: Sequence[Compare], *operations: Sequence[Op]) -> bytes | None:
    """The key to name in an error of a transaction: the first that it writes, else the first at all."""
    written = [op.key for ops in operations for op in ops if isinstance(op, Put | Delete)]
    others = [op.key for ops in operations for op in ops] + [condition.key for condition in conditions]
    return next((raw(key) for key in written + others), None)


def txn_result(answer: pb.TxnResponse) -> TxnResult:
    """The answer to a transaction, from protobuf. Each response has the header of the whole."""
    overall = header(answer.header)
    responses: list[PutResult | RangeResult | DeleteResult] = []
    for response in answer.responses:
        # The answers inside carry no header but the revision; the transaction's own is theirs.
        match response.WhichOneof("response"):
            case "response_put":
                put = put_result(response.response_put)
                responses.append(PutResult(header=overall, prev_kv=put.prev_kv))
            case "response_range":
                range_response = range_result(response.response_range)
                responses.append(
                    RangeResult(
                        kvs=range_response.kvs, header=overall, more=range_response.more, count=range_response.count
                    )
                )
            case "response_delete_range":
                responses.append(DeleteResult(header=overall, deleted=response.response_delete_range.deleted))
    return TxnResult(succeeded=answer.succeeded, responses=tuple(responses), header=overall)


def status(answer: pb.StatusResponse) -> Status:
    """A member's status, from protobuf."""
    return Status(
        version=answer.version,
        leader=answer.leader,
        db_size=answer.dbSize,
        db_size_in_use=answer.dbSizeInUse,
        raft_term=answer.raftTerm,
        is_learner=answer.isLearner,
        errors=tuple(answer.errors),
        header=header(answer.header),
    )


def member(message: pb.Member) -> Member:
    """A member of the cluster, from protobuf."""
    return Member(
        id=message.ID,
        name=message.name,
        peer_urls=tuple(message.peerURLs),
        client_urls=tuple(message.clientURLs),
        is_learner=message.isLearner,
    )
