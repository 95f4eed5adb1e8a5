"""The gap in packets between two locations when a leader goes: crashed, stopped, relabelled, outranked.

A probe sends in each direction between a member of the leader's location and a member of the other; the gap of a run is
the longer of the two directions' longest ones, to within the probe's interval. A crash (`power_off`: the host and
all its processes are gone at once) comes at a random moment between two keepalives of the lease.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from attrs import define

from _lab import SETTLED_SECONDS, candidates, leads, mesh
from _table import console, runs, spread, table
from kilo_etcd.lab.client import Lab
from kilo_etcd.lab.spec import Spec

HERE, THERE = "gcp", "home"
HOSTS = {HERE: 3, THERE: 3}


@define
class Seen:
    """Over both directions."""

    gap: float = 0.0
    sent: int = 0
    lost: int = 0


def spec(ttl: int) -> Spec:
    return Spec.simple(HOSTS, labels={site: site for site in HOSTS}, public=3, lease_ttl=ttl)


@asynccontextmanager
async def watched(lab: Lab, source: str, target: str, *, interval: float, patience: float) -> AsyncIterator[Seen]:
    """Probe while in the block and, after it, until packets flow again in both directions."""
    seen = Seen()
    async with (
        lab.probe(source, target, interval=interval) as out,
        lab.probe(target, source, interval=interval) as back,
    ):
        begun = trio.current_time()
        await trio.sleep(0.3)
        yield seen
        after = trio.current_time() - begun
        await out.flowing_again(patience, after=after)
        await back.flowing_again(patience, after=after)
    seen.gap = max(out.longest_gap, back.longest_gap)
    seen.sent, seen.lost = out.sent + back.sent, out.lost + back.lost


async def crashes(lab: Lab, ttl: int, count: int) -> list[Seen]:
    """The leader's host is powered off; afterwards it comes back and queues at the end."""
    found = []
    target = (await candidates(lab, THERE, 3))[-1]
    for _ in range(count):
        first, second, third = await candidates(lab, HERE, 3)
        await trio.sleep(random.uniform(0, ttl / 3))
        async with watched(lab, third, target, interval=0.01, patience=ttl + 10) as seen:
            await lab.power_off(first)
            await leads(lab, second)
        found.append(seen)
        await lab.power_on(first)
        await lab.all_pairs_ping(30)
        await candidates(lab, HERE, 3)
        await trio.sleep(0.5)
    return found


async def stopped(lab: Lab, first: str, second: str) -> None:
    """SIGTERM; the agent hands over and ends."""
    await lab.stop(first)


async def relabelled(lab: Lab, first: str, second: str) -> None:
    await lab.etcdctl("put", f"/kilo/locations/{first}", first)
    await leads(lab, second)


async def outranked(lab: Lab, first: str, second: str) -> None:
    """The operator's annotation makes the next in line a better candidate; it queues anew, and leads."""
    await lab.etcdctl("put", f"/kilo/annotations/{second}/leader", "true")
    await leads(lab, second)


async def restarted(lab: Lab, first: str, second: str) -> None:
    """Killed with SIGKILL and started again within the lease."""
    await lab.kill(first)
    await lab.start(first)
    await trio.sleep(SETTLED_SECONDS)


async def member_restarted(lab: Lab, first: str, second: str) -> None:
    """The agent of a member, stopped with SIGTERM and started again."""
    await lab.stop(second)
    await lab.start(second)
    await trio.sleep(SETTLED_SECONDS)


async def restore(lab: Lab, first: str, second: str) -> None:
    """Everyone in place again, the labels and annotations as at first."""
    await lab.start(first)
    await lab.etcdctl("put", f"/kilo/locations/{first}", HERE)
    removed = await lab.etcdctl("del", f"/kilo/annotations/{second}/leader")
    # Without its annotation a leader queues anew, and that is one more handover.
    await trio.sleep(SETTLED_SECONDS * (2 if removed.stdout.strip() == "1" else 1))
    await lab.all_pairs_ping(30)
    await candidates(lab, HERE, 3)


async def handovers(lab: Lab, act: Callable[[Lab, str, str], Awaitable[None]], count: int) -> list[Seen]:
    """The same six hosts and both directions, the probe twice as fine."""
    found = []
    target = (await candidates(lab, THERE, 3))[-1]
    for _ in range(count):
        first, second, third = await candidates(lab, HERE, 3)
        async with watched(lab, third, target, interval=0.005, patience=10) as seen:
            await act(lab, first, second)
        found.append(seen)
        await restore(lab, first, second)
    return found


async def main() -> None:
    """Print the two tables."""
    crashed = table("A leader's host crashes: gap, s (probe every 10 ms)", "lease TTL", "runs", "min", "median", "max")
    handed = table(
        "A leader goes in an orderly way, or its agent restarts: gap, ms (probe every 5 ms)",
        "what", "runs", "min", "median", "max", "lost, all runs",
    )  # fmt: skip
    for ttl in (2, 3, 5):
        async with mesh(spec(ttl)) as lab:
            found = await crashes(lab, ttl, runs(3, 1))
            crashed.add_row(f"{ttl} s", *spread([seen.gap for seen in found], unit=1, digits=2))
            if ttl != 5:
                continue
            console.print(crashed)
            for name, act in (
                ("leader's agent stopped (SIGTERM)", stopped),
                ("leader relabelled", relabelled),
                ("another outranks it (annotation)", outranked),
                ("leader's agent killed, started within the lease", restarted),
                ("member's agent stopped and started", member_restarted),
            ):
                found = await handovers(lab, act, runs(3, 1))
                handed.add_row(
                    name,
                    *spread([seen.gap for seen in found]),
                    f"{sum(seen.lost for seen in found)} of {sum(seen.sent for seen in found):,}",
                )
    console.print(handed)


if __name__ == "__main__":
    trio.run(main)
