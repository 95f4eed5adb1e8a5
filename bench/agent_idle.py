"""What an agent costs while nothing happens: memory, CPU time, writes to the kernel and to etcd.

In a mesh of six real hosts, and in one of 1,000 of which one is real and the others are records in etcd, ten to a
location. Writes to etcd are counted by etcd's revision, which every write of anybody moves and keepalives do not.
Writes to the kernel are the agent's own count, and beside it what `ip monitor` saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import trio
from rich.table import Table

from _lab import KEYS, SETTLED_SECONDS, candidates, mesh
from _table import QUICK, console, table
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import Spec
from kilo_etcd.store.keys import NodeKey

HERE = Path(__file__).parent
SECONDS = 15 if QUICK else 60
NODES = 1000
CALM_SECONDS = 8


async def revision(lab: Lab) -> int:
    """etcd's."""
    answer = await lab.etcdctl("get", "/kilo/mesh/granularity", "-w", "json")
    return int(json.loads(answer.stdout)["header"]["revision"])


async def sample(lab: Lab, host: str) -> dict[str, Any]:
    """One host's agent over SECONDS."""
    before = await revision(lab)
    done = await lab.exec(host, sys.executable, str(HERE / "_sample.py"), str(SECONDS), check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "etcd_writes": await revision(lab) - before}


def show(rows: Table, name: str, found: dict[str, Any]) -> None:
    minutes = found["seconds"] / 60
    rows.add_row(
        name,
        f"{found['nodes']:,.0f}",
        *(f"{found[key]:.1f}" for key in ("rss", "pss")),
        f"{found['cpu'] / found['seconds'] * 100:.2f} %",
        *(f"{found[key] / minutes:g}" for key in ("netlink_writes", "kernel_events", "etcd_writes")),
        f"{found['device_rss']:.1f}",
    )


async def calm(lab: Lab, nodes: int, deadline: float = 120) -> None:
    """Wait until etcd has stood still for a while with so many hosts registered."""
    count = sum(isinstance(KEYS.parse(kv.key), NodeKey) for kv in await lab.key_values(KEYS.by_root))
    assert count == nodes, f"{count} hosts are registered, not {nodes}"
    with trio.fail_after(deadline):
        last = 0
        while True:
            await trio.sleep(CALM_SECONDS)
            now = await revision(lab)
            if now == last:
                return
            last = now


async def main() -> None:
    """Print the table."""
    rows = table(
        f"An agent at rest, over {SECONDS} s each (memory in MiB; writes per minute)",
        "agent", "nodes", "RSS", "PSS", "CPU", "netlink writes", "ip monitor", "etcd writes", "wireguard-go",
    )  # fmt: skip
    labels = {"gcp": "gcp", "home": "home"}
    async with mesh(Spec.simple({"gcp": 3, "home": 3}, labels=labels, public=3)) as lab:
        first, *_, last = await candidates(lab, "gcp", 3)
        await calm(lab, 6)
        found: dict[str, dict[str, Any]] = {}

        async def note(host: str) -> None:
            found[host] = await sample(lab, host)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(note, first)
            nursery.start_soon(note, last)
        show(rows, "leader", found[first])
        show(rows, "member", found[last])
    spec = Spec.simple({"here": 1}, labels={"here": "location-0"}, public=1)
    async with running_lab(spec) as lab:
        host = lab.hosts[0]
        with trio.fail_after(30):
            while not (row := await lab.host(host)).mesh:  # noqa: ASYNC110 (another process's news)
                await trio.sleep(0.1)
        fill = [sys.executable, str(HERE / "_fill.py"), str(NODES - 1), row.private[0]]
        await lab.exec("operator", *fill, check=True)
        await calm(lab, NODES)
        await trio.sleep(SETTLED_SECONDS)
        show(rows, "leader, 10 per location", await sample(lab, host))
        await lab.etcdctl("put", "/kilo/mesh/granularity", "full")
        await calm(lab, NODES)
        show(rows, "the same in a full mesh", await sample(lab, host))
    console.print(rows)


if __name__ == "__main__":
    trio.run(main)
