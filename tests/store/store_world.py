"""A small world for the store's tests: keys, records that are fine, and etcd key-values made by hand."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import trio

from kilo_etcd.etcd.api import Event, EventType, Header, KeyValue
from kilo_etcd.model import Endpoint
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import NodeRecord, encode, parse_interface, parse_networks
from kilo_etcd.store.session.session import Session
from kilo_etcd.store.view import View

KEYS = Keys()


def wg_key(name: str) -> str:
    return b64encode(sha256(name.encode()).digest()).decode()


@asynccontextmanager
async def running(*sessions: Session) -> AsyncIterator[None]:
    """Keep the leases of these while in the block."""
    async with trio.open_nursery() as nursery:
        for each in sessions:
            await nursery.start(each.run)
        yield
        nursery.cancel_scope.cancel()


def record(name: str, **fields: Any) -> NodeRecord:
    values: dict[str, Any] = {"public_key": wg_key(name), "endpoint": Endpoint.parse("203.0.113.1:51820")} | fields
    if isinstance(values.get("subnets"), str):
        values["subnets"] = parse_networks(str(values["subnets"]))
    if isinstance(values.get("internal_ips"), str):
        values["internal_ips"] = (parse_interface(values["internal_ips"]),)
    return NodeRecord(**values)


class World:
    """What etcd holds, written with `put`, seen through a `View`."""

    def __init__(self, *, mesh: bool = True) -> None:
        self.view = View(KEYS)
        self.data: dict[bytes, KeyValue] = {}
        self.revision = 0
        if mesh:
            self.put(KEYS.granularity, "location")
            self.put(KEYS.subnets, "10.4.0.0/16")

    def put(self, key: str | bytes, value: str | bytes, *, lease: int = 9) -> None:
        raw = key.encode() if isinstance(key, str) else key
        self.revision += 1
        old = self.data.get(raw)
        kv = KeyValue(
            key=raw,
            value=value.encode() if isinstance(value, str) else value,
            create_revision=old.create_revision if old else self.revision,
            mod_revision=self.revision,
            version=old.version + 1 if old else 1,
            lease=lease,
        )
        self.data[raw] = kv
        self.view.apply([Event(type=EventType.PUT, kv=kv)], self.header)

    def delete(self, key: str | bytes) -> None:
        raw = key.encode() if isinstance(key, str) else key
        self.revision += 1
        if self.data.pop(raw, None) is not None:
            gone = KeyValue(key=raw, value=b"", mod_revision=self.revision)
            self.view.apply([Event(type=EventType.DELETE, kv=gone)], self.header)

    @property
    def header(self) -> Header:
        return Header(cluster_id=1, revision=self.revision, raft_term=1)

    def node(self, name: str, address: str | None = None, **fields: object) -> None:
        self.put(KEYS.node(name), encode(record(name, **fields)))
        if address and (claim := f"/kilo/by/{name}/addresses/{address}").encode() not in self.data:
            self.put(claim, "")

    def peer(self, name: str, **fields: object) -> None:
        self.put(KEYS.peer(name), json.dumps({"publicKey": wg_key(name)} | fields))

    def from_scratch(self) -> View:
        view = View(KEYS)
        view.load(self.data.values(), Header(cluster_id=1, revision=self.view.revision, raft_term=1))
        return view

    @property
    def aside(self) -> dict[str, str]:
        return {note.key: note.reason for note in self.view.snapshot().rejected}
