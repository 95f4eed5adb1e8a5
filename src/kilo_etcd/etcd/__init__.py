"""An etcd v3 client for trio: gRPC over h2, with no dependency on the rest of kilo-etcd.

    async with open_client(Config(endpoints=("10.0.0.1:2379", "10.0.0.2:2379"))) as etcd:
        await etcd.put("/greeting", "hello")
        async with etcd.watch_prefix("/") as watch:
            async for batch in watch:
                ...

The values, errors and protocols are in `api`; what else is here may change.
"""

from .api import (
    BadRequest,
    Client,
    Compacted,
    Compare,
    Config,
    ConnectionRefusedByTls,
    Delete,
    DeleteResult,
    EtcdError,
    Event,
    EventType,
    Get,
    Header,
    Is,
    KeepAlive,
    KeyValue,
    Lease,
    LeaseInfo,
    LeaseNotFound,
    Op,
    PermissionDenied,
    Put,
    PutResult,
    RangeResult,
    Target,
    Text,
    Tls,
    TxnResult,
    Unauthenticated,
    Unavailable,
    Watch,
    WatchBatch,
    absent,
    prefix_end,
    unchanged,
)
from .client import EtcdClient, open_client
from .endpoint import Endpoint, parse_endpoint
from .values import Member, Status

__all__ = [
    "BadRequest",
    "Client",
    "Compacted",
    "Compare",
    "Config",
    "ConnectionRefusedByTls",
    "Delete",
    "DeleteResult",
    "Endpoint",
    "EtcdClient",
    "EtcdError",
    "Event",
    "EventType",
    "Get",
    "Header",
    "Is",
    "KeepAlive",
    "KeyValue",
    "Lease",
    "LeaseInfo",
    "LeaseNotFound",
    "Member",
    "Op",
    "PermissionDenied",
    "Put",
    "PutResult",
    "RangeResult",
    "Status",
    "Target",
    "Text",
    "Tls",
    "TxnResult",
    "Unauthenticated",
    "Unavailable",
    "Watch",
    "WatchBatch",
    "absent",
    "open_client",
    "parse_endpoint",
    "prefix_end",
    "unchanged",
]
