"""An etcd v3 client for trio: gRPC over h2, with no dependency on the rest of kilo-etcd.

    async with open_client(Config(endpoints=("10.0.0.1:2379", "10.0.0.2:2379"))) as etcd:
        await etcd.put("/greeting", "hello")
        async with etcd.watch_prefix("/") as watch:
            async for batch in watch:
                ...

The values, errors and protocols are in `api`; what else is here may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import (
        BadRequest,
        Client,
        Compacted,
        Compare,
        CompareTarget,
        Config,
        ConnectionRefusedByTls,
        Delete,
        DeleteResult,
        EtcdError,
        Event,
        EventType,
        Full,
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
        Status,
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
    from .endpoint import EtcdEndpoint, parse_endpoint
    from .values import Member

__all__ = [
    "BadRequest",
    "Client",
    "Compacted",
    "Compare",
    "CompareTarget",
    "Config",
    "ConnectionRefusedByTls",
    "Delete",
    "DeleteResult",
    "EtcdClient",
    "EtcdEndpoint",
    "EtcdError",
    "Event",
    "EventType",
    "Full",
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

_PARTS = ("api", "endpoint", "values", "client")


def __getattr__(name: str) -> object:
    # A name's module is imported when the name is first asked for: `kgctl --help` waits for none of them.
    if name in __all__:
        for part in _PARTS:
            module = import_module(f"{__name__}.{part}")
            if hasattr(module, name):
                globals()[name] = value = getattr(module, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
