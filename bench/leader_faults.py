"""The gap in packets between two locations when a leader does not forward any more.

As in `failover`, a probe every 10 ms in each direction, from a member of the leader's location to one of the other; the
gap of a run is the longer of the two directions' longest ones. The lease is the default one, 5 s: what ends sooner, a
prober has ended. Between two runs the agents of the location are restarted, so that nobody stands behind.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import trio

from _lab import candidates, mesh, watched
from _table import console, distribution, runs, table
from failover import HERE, HOSTS, THERE, spec
from kilo_etcd.lab.client import Lab

Act = Callable[[Lab, str], Awaitable[object]]


def cut(kind: str) -> Act:
    return lambda lab, host: lab.cut(host, kind)


FAULTS: dict[str, Act] = {
    "its host is powered off": lambda lab, host: lab.power_off(host),
    "what it forwards is dropped": cut("forwarding"),
    "its WireGuard port is blocked": cut("port"),
    "it is cut off from its location": cut("location"),
    "it is cut off from the other locations": cut("others"),
    "forwarding is switched off": lambda lab, host: lab.exec(host, "sysctl", "-w", "net.ipv4.ip_forward=0"),
    "its interface is set down": lambda lab, host: lab.exec(host, "ip", "link", "set", "kilo0", "down"),
}


async def settled(lab: Lab) -> list[str]:
    """The candidates of the location, the leader first, once probers have had their first answers."""
    await lab.all_pairs_ping(60)
    await trio.sleep(6)
    return await candidates(lab, HERE, HOSTS[HERE])


async def main() -> None:
    """Print the table."""
    found = table(
        "A leader does not forward: gap, s (probe every 10 ms)", "what", "runs", "min", "median", "p90", "max"
    )
    async with mesh(spec(5)) as lab:
        for what, act in FAULTS.items():
            gaps = []
            for _ in range(runs(10, 1)):
                first, *members = await settled(lab)
                target = (await candidates(lab, THERE, HOSTS[THERE]))[-1]
                await trio.sleep(random.uniform(0, 1))
                async with watched(lab, (members[-1], target), interval=0.01, patience=20) as seen:
                    await act(lab, first)
                gaps.append(seen.gap)
                await (lab.power_on(first) if "powered" in what else lab.heal(first))
                for host in (first, *members):
                    await lab.kill(host)
                    await lab.start(host)
            found.add_row(what, *distribution(gaps, unit=1, digits=2))
    console.print(found)


if __name__ == "__main__":
    trio.run(main)
