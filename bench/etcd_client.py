"""How fast the etcd client is, against one real etcd on loopback: calls and watch events per second.

python bench/etcd_client.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable

import trio
from rich.console import Console
from rich.table import Table

from kilo_etcd.etcd.api import Put
from kilo_etcd.etcd.client import open_client
from kilo_etcd.testing.etcd_server import EtcdServer

CALLS = 2000
EVENTS = 20_000


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def main() -> None:
    table = Table("what", "per second", "each")
    async with EtcdServer.run() as server, open_client(server.config()) as client:
        await client.put("/k", "v")

        def row(name: str, count: int, seconds: float) -> None:
            table.add_row(name, f"{count / seconds:,.0f}", f"{seconds / count * 1e6:,.0f} µs")

        async def gets(count: int) -> None:
            for _ in range(count):
                await client.get("/k", serializable=True)

        row("get, one after the other", CALLS, await timed(lambda: gets(CALLS)))

        async def side_by_side() -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(gets, CALLS // 50)

        row("get, 50 side by side", CALLS, await timed(side_by_side))

        async def fill() -> None:
            for start in range(0, EVENTS, 100):
                await client.txn([], [Put(f"/w/{n % 1000}", "x" * 100) for n in range(start, start + 100)])

        async def watched() -> None:
            seen = 0
            async with client.watch_prefix("/w/", start_revision=1) as watch:
                while seen < EVENTS:
                    seen += len((await anext(watch)).events)

        await fill()
        row("watch, history of 20,000 events", EVENTS, await timed(watched))

        async def live() -> None:
            seen = 0
            async with client.watch_prefix("/w/") as watch, trio.open_nursery() as nursery:
                nursery.start_soon(fill)
                while seen < EVENTS:
                    seen += len((await anext(watch)).events)

        row("watch, live behind 200 transactions", EVENTS, await timed(live))

        delays: list[float] = []
        async with client.watch("/delay") as watch:
            for _ in range(300):
                await client.put("/delay", "")
                began = time.perf_counter()
                await anext(watch)
                delays.append(time.perf_counter() - began)
        delays.sort()
        table.add_row(
            "event after its put's answer, p99", "", f"{delays[math.ceil(len(delays) * 0.99) - 1] * 1e6:,.0f} µs"
        )
    Console().print(table)


if __name__ == "__main__":
    trio.run(main)
