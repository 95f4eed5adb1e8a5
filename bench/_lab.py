"""What the benchmarks that run in the lab share: a mesh that has settled, and what its agents say.

A lab's hosts share the machine's cores, so what takes work on every host at once takes longer here than on hosts of
their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from types import MappingProxyType
from typing import Any

import trio
from attrs import define, frozen

from kilo_etcd.lab.client import Lab, RunningProbe, running_lab
from kilo_etcd.lab.machine import BASE
from kilo_etcd.lab.spec import Spec
from kilo_etcd.store.keys import ElectionKey, Keys, StatusKey

KEYS = Keys()
_NONE: Mapping[str, str] = MappingProxyType({})

SETTLED_SECONDS = 2.6
"""After a change: a host that has just come stands for leader after 2 s; then nothing is left to do."""


@asynccontextmanager
async def mesh(spec: Spec, *, deadline: float = 60.0) -> AsyncIterator[Lab]:
    """A lab whose hosts all reach each other and have all taken their places in their locations' queues."""
    async with running_lab(spec) as lab:
        await lab.all_pairs_ping(deadline)
        await trio.sleep(SETTLED_SECONDS)
        yield lab


@define
class Seen:
    """What became of the probes of one event; times in seconds."""

    gap: float = 0.0
    """The time over which what was sent was never answered, of the probe that fared worst."""
    slowest: float = 0.0
    """The longest round trip of what was answered."""
    sent: int = 0
    lost: int = 0


@asynccontextmanager
async def watched(
    lab: Lab, *pairs: tuple[str, str], interval: float, patience: float, addresses: Mapping[str, str] = _NONE
) -> AsyncIterator[Seen]:
    """Probe these pairs, both ways, while in the block and, after it, until packets flow again.

    `interval` and `patience` (how long they may take to flow again) in seconds; `addresses` where they are no nodes.
    """
    seen, stop, probes = Seen(), trio.Event(), []

    async def probe(source: str, target: str, task_status: trio.TaskStatus[RunningProbe]) -> None:
        async with lab.probe(source, target, interval, address=addresses.get(target)) as running:
            task_status.started(running)
            await stop.wait()

    async with trio.open_nursery() as nursery:
        for a, b in pairs:
            probes.append(await nursery.start(probe, a, b))
            probes.append(await nursery.start(probe, b, a))
        begun = trio.current_time()
        await trio.sleep(0.3)
        yield seen
        after = trio.current_time() - begun
        for running in probes:
            await running.flowing_again(patience, after=after)
        stop.set()
    for running in probes:
        assert running.result is not None
        seen.gap, seen.slowest = max(seen.gap, running.longest_gap), max(seen.slowest, running.result.slowest)
        seen.sent, seen.lost = seen.sent + running.sent, seen.lost + running.lost


async def statuses(lab: Lab) -> dict[str, dict[str, Any]]:
    """node -> what its agent reports of itself."""
    found = ((KEYS.parse(kv.key), kv.value) for kv in await lab.key_values(KEYS.status_by_root))
    return {key.node: json.loads(value) for key, value in found if isinstance(key, StatusKey)}


async def candidates(lab: Lab, location: str, number: int) -> list[str]:
    """The candidates of a location, first in line first, as soon as there are `number` of them."""
    with trio.fail_after(30):
        while True:
            parsed = ((KEYS.parse(kv.key), kv) for kv in await lab.key_values(KEYS.by_root))
            found = sorted(
                (json.loads(kv.value).get("rank", 0), kv.create_revision, key.node)
                for key, kv in parsed
                if isinstance(key, ElectionKey) and key.location == location
            )
            if len(found) == number:
                return [name for _, _, name in found]
            await trio.sleep(0.1)


async def leads(lab: Lab, node: str, deadline: float = 20.0) -> None:
    """Wait until `node` says that it leads."""
    with trio.fail_after(deadline):
        while (await statuses(lab)).get(node, {}).get("role") != "leader":  # noqa: ASYNC110 (another process's news)
            await trio.sleep(0.05)


@frozen
class Line:
    """One line of an agent's log."""

    host: str
    at: float
    """Seconds since 1970, whole milliseconds (rounded down)."""
    text: str

    @property
    def revision(self) -> int:
        match = re.search(r"\brevision=(\d+)", self.text)
        return int(match[1]) if match else 0


async def log_lines(lab: Lab, *events: str) -> list[Line]:
    """The lines of all agents' logs that tell of one of these events, in the order of their time stamps."""
    patterns = [part for event in events for part in ("-e", f" {event}")]
    completed = await lab.exec("operator", "sh", "-c", f'cd {BASE}/logs && grep -H "$@" *.log', "grep", *patterns)
    lines = []
    for line in completed.stdout.splitlines():
        name, _, rest = line.partition(".log:")
        stamp, _, text = rest.partition(" ")
        try:
            at = datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
        except ValueError:
            continue
        lines.append(Line(name, at, text))
    return sorted(lines, key=lambda line: line.at)
