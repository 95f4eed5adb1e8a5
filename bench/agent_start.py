"""From the start of an agent's process until the host's first ping through the mesh is answered.

The host pings a host of another location every 5 ms, from before its agent is started. A restart finds the interface
in place and loses nothing, so there it is shown when the agent has its plan in force (and how many pings were lost).
The steps are the time stamps of the agent's own log.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from statistics import median

import trio
from attrs import frozen

from _lab import SETTLED_SECONDS, Line, log_lines, mesh
from _table import console, runs, spread, table
from kilo_etcd.lab.client import Lab
from kilo_etcd.lab.machine import STATE_DIR
from kilo_etcd.lab.spec import Spec

INTERVAL = 0.005
STEPS = {
    "starting": "starting",
    "address claimed": "address claimed",
    "registered": "registered",
    "applied": "applied",
    "this host is a segment": "role known",
    "leader elected": "role known",
}


@frozen
class Start:
    """Seconds from the start of the process."""

    first_packet: float
    lost: int
    steps: dict[str, float]


async def start(lab: Lab, host: str, target: str) -> Start:
    """Start the agent of `host` and watch it."""
    async with lab.probe(host, target, interval=INTERVAL) as probe:
        begun = trio.current_time()
        await trio.sleep(0.2)
        wall, started = time.time(), trio.current_time() - begun
        await lab.start(host)
        await probe.flowing_again(30, after=started)
        # A restart loses nothing, so its packets do not say when it is done.
        await trio.sleep(SETTLED_SECONDS)
    result = probe.result
    assert result is not None
    gap = max(result.gaps, key=lambda each: each.seconds, default=None)
    steps: dict[str, float] = {}
    for line in await log_lines(lab, *STEPS):
        if line.host == host and line.at >= wall - 0.001:
            steps.setdefault(STEPS[_event(line)], line.at - wall)
    return Start(max(gap.start + gap.seconds - started, 0) if gap else 0.0, result.lost, steps)


def _event(line: Line) -> str:
    return next(event for event in STEPS if f" {event}" in line.text)


async def off_and_on(lab: Lab, host: str) -> None:
    await lab.power_off(host)
    await lab.power_on(host, agent=False)


async def as_new(lab: Lab, host: str) -> None:
    """As a host that was never in the mesh: nothing on its disk, nothing in etcd (its label apart)."""
    await lab.power_off(host)
    await lab.power_on(host, agent=False)
    await lab.exec(host, "sh", "-c", f"rm -rf {STATE_DIR}/*", check=True)
    for kind in ("nodes", "addresses", "elections", "leaders"):
        answer = (await lab.etcdctl("get", "--prefix", f"/kilo/{kind}/")).stdout.splitlines()
        for key, value in zip(answer[::2], answer[1::2], strict=True):
            if key.endswith(f"/{host}") or value == host:
                await lab.etcdctl("del", key)
    await lab.etcdctl("del", f"/kilo-status/by/{host}/status")


async def stop(lab: Lab, host: str) -> None:
    await lab.stop(host)


async def kill(lab: Lab, host: str) -> None:
    await lab.kill(host)


async def main() -> None:
    """Print the two tables."""
    packets = table(
        "Agent start until the first packet is answered through the mesh, ms",
        "the host", "runs", "min", "median", "max", "pings lost in a restart",
    )  # fmt: skip
    columns = list(dict.fromkeys(STEPS.values()))
    steps = table("What the agent's log says, ms from the start of its process (median)", "the host", *columns)
    labels = {"gcp": "gcp", "home-1": "home", "home-2": "home", "home-3": "home-3"}
    spec = Spec.simple({"gcp": 3, "home": 3}, labels=labels, public=3)
    cases: tuple[tuple[str, str, Callable[[Lab, str], Awaitable[None]], bool], ...] = (
        ("new, alone in its location", "home-3", as_new, False),
        ("powered on, alone in its location", "home-3", off_and_on, False),
        ("powered on, a member", "gcp-3", off_and_on, False),
        ("agent stopped and started, alone", "home-3", stop, True),
        ("agent killed and started, alone", "home-3", kill, True),
    )
    async with mesh(spec) as lab:
        for name, host, before, restart in cases:
            found = []
            for _ in range(runs(4)):
                await before(lab, host)
                found.append(await start(lab, host, "home-2" if host.startswith("gcp") else "gcp-2"))
                await lab.all_pairs_ping(30)
                await trio.sleep(SETTLED_SECONDS)
            times = [e.steps["role known"] for e in found if "role known" in e.steps]
            if not restart:
                times = [e.first_packet for e in found]
            packets.add_row(
                name + (" (plan in force)" if restart else ""),
                *spread(times),
                str(sum(each.lost for each in found)) if restart else "",
            )
            steps.add_row(name, *(
                f"{median(known) * 1000:,.0f}"
                if (known := [each.steps[column] for each in found if column in each.steps]) else "-"
                for column in columns
            ))  # fmt: skip
    console.print(packets)
    console.print(steps)


if __name__ == "__main__":
    trio.run(main)
