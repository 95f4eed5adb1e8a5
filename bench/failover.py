"""A location's leader crashes: the gap in packets with kilo-etcd, and with keepalived on the same two hosts.

A crash is `power_off`: the host, its interfaces and its processes are gone at once, at a random moment between two
keepalives of the lease (or two of keepalived's advertisements). A probe sends every 10 ms in each direction between a
member of the leader's location and one of the other; the gap of a run is the longer of the two directions'. What
keepalived is told to do is in `_keepalived.py`.
"""

from __future__ import annotations

import random

import trio
from attrs import evolve

from _keepalived import crashes_under_keepalived, why_not
from _lab import Seen, candidates, leads, mesh, watched
from _table import console, distribution, runs, table
from kilo_etcd.lab.client import Lab
from kilo_etcd.lab.spec import Spec

HERE, THERE = "gcp", "home"
HOSTS = {HERE: 3, THERE: 3}
INTERVAL = 0.01

CASES = ((5, "auto"), (2, "auto"), (5, "off"), (3, "off"), (2, "off"))
"""--lease-ttl in seconds, and --probe."""


def spec(ttl: int, *arguments: str) -> Spec:
    """Two locations of three public hosts each."""
    found = Spec.simple(HOSTS, labels={site: site for site in HOSTS}, public=3, lease_ttl=ttl)
    return evolve(found, agent_args=arguments)


async def crashes(lab: Lab, ttl: int, count: int, *, probers: bool) -> list[Seen]:
    """The leader's host is powered off; afterwards it comes back and queues at the end."""
    result = []
    target = (await candidates(lab, THERE, 3))[-1]
    for _ in range(count):
        first, second, third = await candidates(lab, HERE, 3)
        await trio.sleep(random.uniform(0, max(1.0, ttl / 3)))
        async with watched(lab, (third, target), interval=INTERVAL, patience=ttl + 10) as seen:
            await lab.power_off(first)
            await leads(lab, second)
        result.append(seen)
        await lab.power_on(first)
        if probers:
            # Else who was demoted would stand behind for five minutes.
            for host in (first, second, third):
                await lab.kill(host)
                await lab.start(host)
        await lab.all_pairs_ping(30)
        await candidates(lab, HERE, 3)
        # Probers have had their first answers by then.
        await trio.sleep(4 if probers else 0.5)
    return result


async def main() -> None:
    """Print the table."""
    gaps = table(
        "A location's leader is powered off: gap, s (probes every 10 ms, both ways)",
        "who guards", "runs", "min", "median", "p90", "max",
    )  # fmt: skip
    count = runs(10)
    for ttl, probe in CASES:
        async with mesh(spec(ttl, "--probe", probe)) as lab:
            seen = await crashes(lab, ttl, count, probers=probe == "auto")
        how = "with probes" if probe == "auto" else "--probe off"
        gaps.add_row(f"kilo-etcd, lease of {ttl} s, {how}", *distribution([s.gap for s in seen], unit=1, digits=2))
    if (reason := why_not()) is None:
        seen = await crashes_under_keepalived(HOSTS, count, interval=INTERVAL)
        gaps.add_row("keepalived, its default timers", *distribution([s.gap for s in seen], unit=1, digits=2))
    console.print(gaps)
    if reason is not None:
        console.print(reason)


if __name__ == "__main__":
    trio.run(main)
