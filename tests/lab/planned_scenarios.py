"""What an operator does on purpose to a mesh of three locations, and what it may cost (docs/continuity.md).

One world for all of it, which `test_planned.py` runs on userspace WireGuard, `planned_on_kernel.py` on the kernel's.
Every event is done under probes of 100 packets/s: between members of the location concerned and of another, both ways,
and between the two locations that are not concerned. What the kernels of the others were sent, their agents count.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import trio
from attrs import define, field
from test_mesh_scenarios import candidates, leader, pids, world

from helpers import eventually
from helpers_lab import statuses
from helpers_load import WORK, measured
from kilo_etcd.lab.client import Lab, RunningProbe
from kilo_etcd.lab.probe import Gap

HOSTS = {"gcp": 3, "home": 2, "aws": 1}

HANDOVER, SWITCH = 0.05, 0.2
"""Seconds: the gaps promised when leadership is handed over, and when the granularity is switched."""

LEEWAY = 10.0
"""Other work on the machine makes single gaps longer than promised: of `TRIES` the shortest has to keep the promise,
and the longest not to break it so many times over, apart from what the machine held up at the time (`Seen.held`). How
they are distributed is measured by bench/planned.py."""

TRIES = 2

_METRICS = (
    "import urllib.request as u; print(u.urlopen('http://127.0.0.1:1107/metrics', timeout=5).read().decode(), end='')"
)


@asynccontextmanager
async def planned_world(wireguard: str, lease_ttl: int) -> AsyncIterator[Lab]:
    """Three locations, each labelled with its site's name. Within the lease an agent has to be able to start."""
    labels = {site: site for site in HOSTS}
    # Each change of a kernel is logged, so that a test that fails can say which there were.
    args = ("--log-level=debug",)
    async with world(HOSTS, labels, lease_ttl=lease_ttl, wireguard=wireguard, agent_args=args) as lab:
        for site in ("gcp", "home"):
            await candidates(lab, site, HOSTS[site])
        yield lab


async def writes(lab: Lab, hosts: Iterable[str]) -> dict[str, float]:
    """What the agents of these hosts have sent to their kernels since they were started, in messages."""
    result: dict[str, float] = {}

    async def ask(host: str) -> None:
        answer = (await lab.exec(host, sys.executable, "-SEc", _METRICS, check=True)).stdout
        value = re.search(r"^kilo_netlink_writes_total (\S+)$", answer, re.MULTILINE)
        assert value, answer
        result[host] = float(value[1])

    async with trio.open_nursery() as nursery:
        for host in hosts:
            nursery.start_soon(ask, host)
    return result


@define
class Seen:
    """What became of the probes during one event."""

    lost: dict[tuple[str, str], tuple[Gap, ...]] = field(factory=dict)
    """(From, to) -> what was never answered, and when."""
    begun: float = 0.0
    moments: dict[str, float] = field(factory=dict)
    """What the test did -> seconds after `begun`, which is a moment before the probes begin."""
    held: float = 0.0
    """Seconds: the longest that the machine held up the test's own process."""
    slowest: float = 0.0
    """Seconds: the longest round trip. Of hosts that an event does not touch it shows what the machine held up."""
    slowness: float = 1.0
    """How many times slower the machine was than an idle one."""
    gap: float = 0.0
    """Seconds: the longest of all; less where the machine was busy, as many times as it was slower."""

    def beyond(self, control: Seen | None = None) -> float:
        """Seconds of the longest gap that the machine does not explain. `control`: what was seen meanwhile between
        hosts that the event does not touch."""
        held = max(self.held, 0.0 if control is None else control.slowest)
        return max(0.0, self.gap - held / self.slowness)

    def note(self, what: str) -> None:
        self.moments[what] = round(trio.current_time() - self.begun, 2)


@asynccontextmanager
async def probed(lab: Lab, *pairs: tuple[str, str]) -> AsyncIterator[Seen]:
    """Probes both ways between the pairs while in the block, and until packets flow again."""
    seen = Seen(begun=trio.current_time())
    probes: dict[tuple[str, str], RunningProbe] = {}
    async with AsyncExitStack() as stack:
        machine = stack.enter_context(measured())
        for a, b in pairs:
            for way in ((a, b), (b, a)):
                probes[way] = await stack.enter_async_context(lab.probe(*way))
        begun = trio.current_time()
        seen.note("probes sent")
        yield seen
        seen.note("settled")
        after = trio.current_time() - begun
        for running in probes.values():
            await running.flowing_again(30, after=after)
    seen.lost = {way: running.gaps for way, running in probes.items() if running.lost}
    # A measurement takes so long on an idle machine.
    seen.held = machine.stall - WORK
    seen.slowest = max(running.result.slowest for running in probes.values() if running.result is not None)
    seen.slowness = machine.slowness
    seen.gap = max(running.longest_gap for running in probes.values()) / machine.slowness


async def steady(lab: Lab) -> None:
    """Everyone stands for leader who can, and every agent says that it has applied all there is."""
    await candidates(lab, "gcp", 3)
    await candidates(lab, "home", 2)

    async def settled() -> bool:
        answer = json.loads((await lab.etcdctl("get", "--prefix", "/kilo/", "-w", "json")).stdout)
        newest = max(kv["mod_revision"] for kv in answer["kvs"])
        reports = await statuses(lab)
        return reports.keys() == set(lab.hosts) and all(_revision(report) >= newest for report in reports.values())

    await eventually(settled, 60, every=0.1, what="every host at the newest revision")


def _revision(report: dict[str, object]) -> int:
    return int(str(report["revision"]))


async def nothing_moves(lab: Lab) -> None:
    """Agents that stop, crash, reload or reboot where they do not lead, or come back within the lease where they do."""
    # Who has not applied all of the mesh's beginning would do so after its restart.
    await steady(lab)
    queue = await candidates(lab, "gcp", 3)
    first, second, third = queue
    pairs = ((third, "home-2"), (second, "aws-1"), ("home-1", "aws-1"))

    async def stop_and_start(host: str) -> None:
        await lab.stop(host)
        await lab.start(host)

    async def kill_and_start(host: str) -> None:
        await lab.kill(host)
        await lab.start(host)

    async def power_cycle(host: str) -> None:
        """Longer than its lease, so that it comes back as somebody new."""
        await lab.power_off(host)
        await eventually(partial(_is_away, lab, host), 60, every=0.2, what=f"the lease of {host} ends")
        await lab.power_on(host)

    for what, act, host in (
        ("a member's agent is stopped and started", stop_and_start, third),
        ("a member's agent is killed and started", kill_and_start, second),
        ("a member's agent is reloaded", lab.reload, third),
        ("the leader's agent is killed and started within the lease", kill_and_start, first),
        ("the leader's agent is reloaded", lab.reload, first),
        ("the agent of a host that is alone is reloaded", lab.reload, "aws-1"),
        ("a member reboots", power_cycle, second),
    ):
        rebooted = act is power_cycle
        others = [other for other in lab.hosts if other != host]
        before, since, running = await writes(lab, others), (await statuses(lab))[host]["since"], await pids(lab)
        probing = [pair for pair in pairs if not (rebooted and host in pair)]
        async with probed(lab, *probing) as seen:
            await trio.sleep(1)  # `since` is in whole seconds
            seen.note("begun")
            await act(host)
            seen.note("done")
            await eventually(partial(_is_back, lab, host, since), 60, every=0.1, what=f"{host} reports anew")
            seen.note("reports anew")
            await steady(lab)
        now = await leader(lab, "gcp")
        if seen.lost or now != first:
            pytest.fail(f"{what}: {now} leads gcp, before it was {first}; {seen}\n{await last_logged(lab, queue)}")
        written = await writes(lab, others)
        wrote = [other for other in others if written[other] != before[other]]
        assert not wrote, f"{what}: {seen}\n{await last_logged(lab, wrote)}"
        expected = [first, third, second] if rebooted else queue
        assert await candidates(lab, "gcp", 3) == expected, f"{what}: {seen}\n{await last_logged(lab, queue)}"
        if not rebooted:
            # It has adopted what it found, as it was.
            assert await writes(lab, [host]) == {host: 0}, f"{what}: {seen}\n{await last_logged(lab, [host])}"
        if act == lab.reload:
            assert await pids(lab) == running, what


async def last_logged(lab: Lab, hosts: Iterable[str], lines: int = 30) -> str:
    """The end of what the agents of these hosts have logged, for whoever reads why a test failed."""
    return "\n".join([f"{host}: {line}" for host in hosts for line in (await lab.log(host)).splitlines()[-lines:]])


async def _is_back(lab: Lab, host: str, since: object) -> bool:
    return bool((await statuses(lab)).get(host, {}).get("since", since) != since)


async def _is_away(lab: Lab, host: str) -> bool:
    return host not in await statuses(lab)


async def handed_over(lab: Lab, *, crowded: bool = False) -> None:
    """Leadership goes from one host to another in every way that an operator has.

    `crowded`: all hosts share one slow processor, where gaps say little; each is tried once, and the worst counts.
    """

    async def stopped(first: str, second: str) -> None:
        await lab.stop(first)

    async def annotated(first: str, second: str) -> None:
        await lab.kgctl("annotate", second, "leader=true")

    async def relabelled(first: str, second: str) -> None:
        await lab.etcdctl("put", f"/kilo/locations/{first}", "elsewhere")

    for what, act in (("stopped", stopped), ("annotated", annotated), ("relabelled", relabelled)):
        gaps, beyond = [], []
        for _ in range(1 if crowded else TRIES):
            first, second, third = await candidates(lab, "gcp", 3)
            async with probed(lab, (third, "home-2"), (third, "aws-1")) as concerned, probed(
                lab, ("home-2", "aws-1")
            ) as others:  # fmt: skip
                await act(first, second)
                await eventually(partial(_leads, lab, second), 30, every=0.05)
            gaps.append(concerned.gap)
            beyond.append(concerned.beyond(control=others))
            assert others.lost == {}, (what, others)
            # As before, with the two at the end of the queue.
            await lab.start(first)
            await lab.etcdctl("put", f"/kilo/locations/{first}", "gcp")
            await lab.etcdctl("del", f"/kilo/annotations/{second}/leader")
            await steady(lab)
            await lab.all_pairs_ping(30)
        kept(gaps, beyond, HANDOVER, what, crowded=crowded)


async def _leads(lab: Lab, node: str) -> bool:
    return (await statuses(lab)).get(node, {}).get("role") == "leader"


async def switched(lab: Lab) -> None:
    """The granularity, live, to each of the others and back."""
    gaps, beyond = [], []
    for shape in ("full", "location", "cross", "location"):
        revision = max(map(_revision, (await statuses(lab)).values()))
        async with probed(lab, ("gcp-2", "home-2"), ("gcp-2", "gcp-3"), ("home-1", "aws-1")) as seen:
            await lab.etcdctl("put", "/kilo/mesh/granularity", shape)
            await eventually(partial(_followed, lab, revision), 30, every=0.1, what=f"{shape} followed by all")
        gaps.append(seen.gap)
        beyond.append(seen.beyond())
        await lab.all_pairs_ping(30)
    kept(gaps, beyond, SWITCH, "switched")


async def _followed(lab: Lab, revision: int) -> bool:
    return all(_revision(report) > revision for report in (await statuses(lab)).values())


def kept(gaps: list[float], beyond: list[float], promised: float, what: str, *, crowded: bool = False) -> None:
    """See `LEEWAY`; `beyond` is what the machine does not explain of each gap. In a crowd (the guest, whose processes
    share one core of a machine that others use) twice as much is left: less than the two seconds or more that it takes
    if leadership is not handed over but lost."""
    assert crowded or min(gaps) < promised, (what, gaps)
    assert max(beyond) < promised * LEEWAY * (1 + crowded), (what, gaps, beyond)


EVENTS: tuple[Callable[[Lab], Awaitable[None]], ...] = (nothing_moves, handed_over, switched)
