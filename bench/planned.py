"""What an operator does on purpose, and the gap in packets that it makes: agents stopped, restarted, reloaded, leaders
handed over, shapes switched.

Six hosts at two locations. Probes go both ways, every 5 ms, between a member of the location concerned that never leads
in that run and a member of the other one. A gap is the time over which what was sent was never answered, of the probe
that fared worst. "Slowest answer" is the longest round trip of what was answered: WireGuard keeps packets for a peer
that it has yet to shake hands with. Leadership goes round: who has led comes again, and queues at the end.

    bench/planned.py [EVENT...] [RUNS]
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable

import trio

from _lab import SETTLED_SECONDS, Seen, candidates, leads, mesh, statuses, watched
from _table import console, distribution, runs, table
from kilo_etcd.lab.client import Lab
from kilo_etcd.lab.spec import Spec

HERE, THERE = "gcp", "home"
HOSTS = {HERE: 3, THERE: 3}
INTERVAL = 0.005


# -- the events: each is done to `first`, who leads, or `second`, who is next in line ------------------------------


async def stopped(lab: Lab, first: str, second: str) -> None:
    """`systemctl stop`: the agent hands over and ends."""
    await lab.stop(first)
    await leads(lab, second)


async def restarted(lab: Lab, first: str, second: str) -> None:
    """`systemctl restart`."""
    await lab.stop(first)
    await lab.start(first)
    await candidates(lab, HERE, 3)


async def relabelled(lab: Lab, first: str, second: str) -> None:
    await lab.etcdctl("put", f"/kilo/locations/{first}", first)
    await leads(lab, second)


async def annotated(lab: Lab, first: str, second: str) -> None:
    """The operator's annotation makes the next in line a better candidate: it leads 2 s later."""
    await lab.etcdctl("put", f"/kilo/annotations/{second}/leader", "true")
    await leads(lab, second)


async def moved(lab: Lab, first: str, second: str) -> None:
    """The annotation that `first` has goes to `second`, by two commands."""
    await lab.etcdctl("del", f"/kilo/annotations/{first}/leader")
    await lab.etcdctl("put", f"/kilo/annotations/{second}/leader", "true")
    await leads(lab, second)
    # By now it has long led, and whatever else follows from the other's annotation has followed.
    await trio.sleep(SETTLED_SECONDS)


async def killed(lab: Lab, first: str, second: str) -> None:
    """SIGKILL, and started again within the lease."""
    await lab.kill(first)
    await lab.start(first)
    await trio.sleep(SETTLED_SECONDS)


async def reloaded(lab: Lab, first: str, second: str) -> None:
    """`systemctl reload`: what is installed now runs in place of what ran."""
    await lab.reload(first)
    await trio.sleep(SETTLED_SECONDS)


async def member_restarted(lab: Lab, first: str, second: str) -> None:
    await lab.stop(second)
    await lab.start(second)
    await trio.sleep(SETTLED_SECONDS)


Act = Callable[[Lab, str, str], Awaitable[None]]


async def each(lab: Lab, act: Act, count: int) -> list[Seen]:
    """Whoever leads, then the next one. Everyone is put in place again after each."""
    result = []
    target = (await candidates(lab, THERE, 3))[-1]
    for _ in range(count):
        first, second, third = await candidates(lab, HERE, 3)
        async with watched(lab, (third, target), interval=INTERVAL, patience=10) as seen:
            await act(lab, first, second)
        result.append(seen)
        await lab.start(first)
        await lab.etcdctl("put", f"/kilo/locations/{first}", HERE)
        removed = await lab.etcdctl("del", f"/kilo/annotations/{second}/leader")
        if removed.stdout.strip() == "1":
            # It leads no more when another has the older candidacy: one more handover, 3 s later.
            await trio.sleep(SETTLED_SECONDS + 1)
        await candidates(lab, HERE, 3)
        await lab.all_pairs_ping(30)
    return result


async def moves(lab: Lab, act: Act, count: int) -> list[Seen]:
    """To and fro between two hosts; the third is the oldest candidate."""
    target = (await candidates(lab, THERE, 3))[-1]
    third, first, second = await candidates(lab, HERE, 3)
    await lab.etcdctl("put", f"/kilo/annotations/{first}/leader", "true")
    await leads(lab, first)
    result = []
    for _ in range(count):
        await candidates(lab, HERE, 3)
        async with watched(lab, (third, target), interval=INTERVAL, patience=10) as seen:
            await act(lab, first, second)
        result.append(seen)
        first, second = second, first
        await lab.all_pairs_ping(30)
    await lab.etcdctl("del", f"/kilo/annotations/{first}/leader")
    await trio.sleep(SETTLED_SECONDS + 1)
    return result


async def switches(lab: Lab, act: Act, count: int) -> list[Seen]:
    """Granularity, round and round; probes between the locations and inside one."""
    result = []
    shapes = ("full", "location", "cross", "location", "full", "cross")
    for number in range(count):
        before = max(status["revision"] for status in (await statuses(lab)).values())
        async with watched(lab, ("gcp-3", "home-3"), ("home-2", "home-3"), interval=INTERVAL, patience=10) as seen:
            await lab.etcdctl("put", "/kilo/mesh/granularity", shapes[number % len(shapes)])
            await applied_after(lab, before)
        result.append(seen)
        await lab.all_pairs_ping(30)
        await trio.sleep(SETTLED_SECONDS)
    await lab.etcdctl("put", "/kilo/mesh/granularity", "location")
    await lab.all_pairs_ping(30)
    await trio.sleep(SETTLED_SECONDS)
    return result


async def applied_after(lab: Lab, revision: int) -> None:
    """Wait until every agent has applied a later revision."""
    with trio.fail_after(20):
        while min(status["revision"] for status in (await statuses(lab)).values()) <= revision:  # noqa: ASYNC110
            await trio.sleep(0.05)


async def nothing(lab: Lab, first: str, second: str) -> None:
    """Nothing is done."""
    await trio.sleep(SETTLED_SECONDS)


Many = Callable[[Lab, Act, int], Awaitable[list[Seen]]]
EVENTS: dict[str, tuple[str, Many, Act, float]] = {
    "stopped": ("leader's agent stopped", each, stopped, 1),
    "restarted": ("leader's agent restarted", each, restarted, 1),
    "relabelled": ("leader relabelled", each, relabelled, 1),
    "annotated": ("another annotated as leader", each, annotated, 1),
    "moved": ("leader annotation moved", moves, moved, 1),
    "switched": ("granularity switched", switches, nothing, 1.5),
    "killed": ("leader's agent killed and started within the lease", each, killed, 0.3),
    "reloaded": ("leader's agent reloaded", each, reloaded, 0.3),
    "member": ("member's agent restarted", each, member_restarted, 0.3),
    "nothing": ("nothing (the machine's own noise)", each, nothing, 0.5),
}
"""What it is called, how it is done again and again, what is done, and the share of the runs."""


async def main() -> None:
    """Print the table."""
    chosen = [word for word in sys.argv[1:] if word in EVENTS] or list(EVENTS)
    count = next((int(word) for word in sys.argv[1:] if word.isdecimal()), runs(20, 3))
    gaps = table(
        "What an operator does: gap, ms (probes every 5 ms, both ways)",
        "event", "runs", "min", "median", "p90", "max", "slowest answer: median", "max", "lost, all runs",
    )  # fmt: skip
    spec = Spec.simple(HOSTS, labels={site: site for site in HOSTS}, public=3, lease_ttl=5)
    async with mesh(spec) as lab:
        for name in chosen:
            called, many, act, share = EVENTS[name]
            found = await many(lab, act, max(1, round(count * share)))
            slowest = distribution([seen.slowest for seen in found])
            gaps.add_row(
                called,
                *distribution([seen.gap for seen in found]),
                slowest[2],
                slowest[4],
                f"{sum(seen.lost for seen in found)} of {sum(seen.sent for seen in found):,}",
            )
    console.print(gaps)


if __name__ == "__main__":
    trio.run(main)
