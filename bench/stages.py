"""What agents cost etcd that wait for each other in the switch to `internal-ips=encrypted`, among 1,000 nodes.

Bytes that a real etcd sends (its own count, `etcd_network_client_grpc_sent_bytes_total`, with the answers to writes
taken off), and requests. "Reading all statuses" is how an agent looked before, every 2 to 20 s. One agent is measured;
all of the mesh wait, so the mesh's figures are that many times the agent's.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Awaitable, Callable
from ipaddress import ip_interface, ip_network
from typing import cast
from urllib.request import urlopen

import structlog
import trio

from _table import console, table
from kilo_etcd.agent.stage_watch import MOST_AT_ONCE, StageWatch
from kilo_etcd.etcd.api import Client, Put
from kilo_etcd.etcd.client import PAGE, open_client
from kilo_etcd.model import EncryptionStage, Endpoint
from kilo_etcd.runtime.logs import Once
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import NodeRecord, Role, StageRecord, StatusRecord, encode
from kilo_etcd.testing.etcd_server import EtcdServer

NODES = 200 if os.environ.get("KILO_BENCH_QUICK") else 1000
NAMES = [f"node-{number}" for number in range(NODES)]
KEYS = Keys()


def key(number: int) -> str:
    """A WireGuard key."""
    return base64.b64encode(number.to_bytes(32)).decode()


def status(number: int, revision: int) -> StatusRecord:
    """As an agent at rest reports."""
    return StatusRecord(
        public_key=key(number), revision=revision, role=Role.MEMBER, location=f"location-{number // 10}",
        leader=f"node-{number // 10 * 10}", version="0.5.0", since="2026-11-27T12:00:00Z", address=f"10.1.0.{number}",
        answers=True,
    )  # fmt: skip


def record(number: int, stage: EncryptionStage, since: int | None) -> NodeRecord:
    """As an agent registers with its stage."""
    inside = ip_interface(f"10.{100 + number // 250}.0.{number % 250 + 1}/24")
    return NodeRecord(
        public_key=key(number), endpoint=Endpoint(inside.ip, 51820), internal_ips=(inside,),
        underlay=(inside.network, ip_network("192.0.2.10/32")), location=f"location-{number // 10}", version="0.5.0",
        mesh_addresses=(ip_interface(f"10.4.{number // 250}.{number % 250 + 1}/16"),), encryption=stage,
        accepts_since=since,
    )  # fmt: skip


class Meter:
    """Counts the bytes that one etcd has sent."""

    def __init__(self, server: EtcdServer) -> None:
        self._server = server

    async def sent(self) -> int:
        """Bytes, of gRPC messages."""
        await trio.sleep(0.5)
        text = await trio.to_thread.run_sync(self._metrics)
        match = re.search(r"^etcd_network_client_grpc_sent_bytes_total (\S+)$", text, re.MULTILINE)
        assert match is not None
        return int(float(match[1]))

    def _metrics(self) -> str:
        with urlopen(f"{self._server.endpoint}/metrics") as answer:
            return bytes(answer.read()).decode()

    async def of(self, work: Callable[[], Awaitable[object]]) -> int:
        """Bytes sent for it."""
        before = await self.sent()
        await work()
        return await self.sent() - before


class Counting:
    """Counts the requests that a client sends."""

    def __init__(self) -> None:
        self.requests = 0

    def of(self, client: Client) -> Counting:
        """The same client, counted."""
        self._client = client
        return self

    def __getattr__(self, name: str) -> object:
        self.requests += name in ("range", "txn", "watch")
        return getattr(self._client, name)


async def put_all(client: Client, puts: list[Put]) -> None:
    """Each in a write of its own, as each agent's is."""
    for put in puts:
        await client.put(put.key, put.value, lease=put.lease)


async def main() -> None:
    """Print the table."""
    async with EtcdServer.run() as server, open_client(server.config()) as client, open_client(server.config()) as own:
        lease = (await client.grant_lease(3600)).id
        meter = Meter(server)

        def stages(revision: int) -> list[Put]:
            return [Put(KEYS.stage(name), encode(StageRecord(revision=revision)), lease) for name in NAMES]

        await put_all(client, [Put(KEYS.status(n), encode(status(i, 50_000)), lease) for i, n in enumerate(NAMES)])
        looked = await meter.of(lambda: own.get_prefix(KEYS.status_root))
        await put_all(client, stages(50_001))
        once = StageWatch(own, KEYS, Once(structlog.get_logger()), lambda: None)
        read_once = await meter.of(lambda: once.ask(NAMES, 0))

        answers = await meter.of(lambda: put_all(client, stages(50_002)))

        def follow() -> None:
            """What the agent does: whoever has reported is not waited for any more."""
            late = (name for name in NAMES if not watch.living.knows_of(name, 50_003))
            watch.follow(frozenset(late), nodes=NODES, cluster=0)

        counting = Counting()
        watch = StageWatch(cast(Client, counting.of(own)), KEYS, Once(structlog.get_logger()), follow)
        follow()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            while len(watch.living.applied) < NODES:  # noqa: ASYNC110
                await trio.sleep(0.1)

            async def all_report() -> None:
                await put_all(client, stages(50_003))
                while not all(watch.living.knows_of(name, 50_003) for name in NAMES):  # noqa: ASYNC110
                    await trio.sleep(0.1)

            counting.requests = 0
            round_ = await meter.of(all_report) - answers
            nursery.cancel_scope.cancel()

        def records(stage: EncryptionStage, since: int | None) -> list[Put]:
            return [Put(KEYS.node(name), encode(record(i, stage, since)), lease) for i, name in enumerate(NAMES)]

        answers = await meter.of(lambda: put_all(client, records(EncryptionStage.ACCEPTS, None)))
        async with own.watch_prefix(KEYS.root) as changes, trio.open_nursery() as nursery:

            async def read() -> None:
                async for _ in changes:
                    pass

            nursery.start_soon(read)
            told = await meter.of(lambda: put_all(client, records(EncryptionStage.SENDS, 50_000))) - answers
            nursery.cancel_scope.cancel()

        pages = str(-(-NODES // PAGE))
        found = table(
            f"The switch among {NODES:,} nodes", "what", "bytes to one agent", "requests of one agent", "MB to all"
        )
        for what, size, requests in (
            ("before: reading all statuses, each time", looked, pages),
            ("reading all stages, once", read_once, str(-(-NODES // MOST_AT_ONCE))),
            ("then all stages reported anew, once", round_, str(counting.requests)),
            ("the records of one stage, which all agents follow anyway", told, "0"),
        ):
            found.add_row(what, f"{size:,}", requests, f"{size * NODES / 1e6:,.0f}")
        console.print(found)


if __name__ == "__main__":
    trio.run(main)
