"""A label is put with the real etcdctl: how long until the last host whose plan it changes has it in its kernel.

A member is moved to a location of its own, and back, by turns through the sites. Time runs from etcd's
acknowledgement (when etcdctl printed the answer: the modification time of the file that took it) to the latest
`applied` with that revision in the agents' logs. All hosts share this machine's cores, and etcdctl does too: hosts may
be done before it is told.
"""

from __future__ import annotations

import json
from statistics import median

import trio
from attrs import frozen

from _lab import SETTLED_SECONDS, log_lines, mesh
from _table import console, p99, runs, table
from kilo_etcd.lab.client import Lab
from kilo_etcd.lab.spec import Spec

PUT = """
acknowledged=$(mktemp) || exit
date +%s.%N
etcdctl put -w json -- "$1" "$2" >"$acknowledged" || exit
stat -c %.9Y "$acknowledged"
cat "$acknowledged"
rm "$acknowledged"
"""


@frozen
class Put:
    started: float
    acknowledged: float
    revision: int


async def put(lab: Lab, key: str, value: str) -> Put:
    """With etcdctl; seconds since 1970."""
    done = await lab.exec("operator", "sh", "-c", PUT, "put", key, value, check=True)
    started, acknowledged, answer = done.stdout.split(maxsplit=2)
    return Put(float(started), float(acknowledged), json.loads(answer)["header"]["revision"])


@frozen
class Seen:
    """What one put brought about; seconds."""

    first: float
    """From the acknowledgement to the first host."""
    middle: float
    """To the median host."""
    last: float
    """To the last host."""
    whole: float
    """From the start of etcdctl to the last host."""
    hosts: int
    """How many hosts had something to change."""


async def measure(hosts: int, count: int) -> list[Seen]:
    """Label puts in one lab."""
    sites = max(2, -(-hosts // 10))
    labels = {f"site-{number}": f"site-{number}" for number in range(1, sites + 1)}
    spec = Spec.simple(hosts, sites=sites, labels=labels, public=hosts)
    puts = []
    async with mesh(spec, deadline=120) as lab:
        await trio.sleep(SETTLED_SECONDS)
        for number in range(count):
            site = spec.sites[number // 2 % sites]
            mover = site.hosts[-1].name
            label = mover if number % 2 == 0 else site.name
            puts.append(await put(lab, f"/kilo/locations/{mover}", label))
            await trio.sleep(SETTLED_SECONDS)
        lines = await log_lines(lab, "applied")
    result = []
    for each in puts:
        done: dict[str, float] = {}
        for line in lines:
            # What comes later than this is the election in the mover's location.
            if line.revision >= each.revision and line.at < each.acknowledged + 1.9:
                done.setdefault(line.host, line.at)
        times = sorted(at - each.acknowledged for at in done.values())
        whole = each.acknowledged - each.started + times[-1]
        result.append(Seen(times[0], median(times), times[-1], whole, len(times)))
    return result


async def main() -> None:
    """Print the table."""
    shown = table(
        "Label put until programmed, ms (from etcd's acknowledgement; the last column from the start of etcdctl)",
        "hosts", "puts", "of them changed", "first host", "median host",
        "last host: min", "median", "p99", "max", "whole: median",
    )  # fmt: skip
    for hosts, count in ((6, runs(20, 4)), (20, runs(20, 4)), (50, runs(24, 4))):
        seen = await measure(hosts, count)
        last = [each.last for each in seen]
        numbers = (
            median(each.first for each in seen), median(each.middle for each in seen),
            min(last), median(last), p99(last), max(last), median(each.whole for each in seen),
        )  # fmt: skip
        changed = sorted({each.hosts for each in seen})
        shown.add_row(
            str(hosts), str(count), str(changed[0]) if len(changed) == 1 else f"{changed[0]} to {changed[-1]}",
            *(f"{number * 1000:,.0f}" for number in numbers),
        )  # fmt: skip
    console.print(shown)


if __name__ == "__main__":
    trio.run(main)
