"""A schedule of faults drawn from a seed, on real etcd, real agents and real packets; the simulation's, in small.

`KILO_CHAOS=7` plays another one. What is drawn is the same each time; when the hosts notice is not.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from test_mesh_scenarios import world

from helpers import eventually
from helpers_lab import statuses
from kilo_etcd.lab.client import Lab

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

SEED = int(os.environ.get("KILO_CHAOS", "1"))
HOSTS = {"gcp": 3, "home": 2}
FAULTS = 20

Act = Callable[[Lab, str], Awaitable[object]]


async def crash(lab: Lab, host: str) -> None:
    """systemd starts it again."""
    await lab.kill(host)
    await lab.start(host)


async def reboot(lab: Lab, host: str) -> None:
    await lab.power_off(host)
    await trio.sleep(1)
    await lab.power_on(host)


async def freeze(lab: Lab, host: str) -> None:
    await lab.freeze(host)
    await trio.sleep(3)
    await lab.thaw(host)


async def etcd_restarts(lab: Lab, host: str) -> None:
    await lab.etcd("kill")
    await trio.sleep(1)
    await lab.etcd("start")
    await lab.etcd_ready()


async def interface_gone(lab: Lab, host: str) -> None:
    await lab.exec(host, "ip", "link", "del", "kilo0")


async def labelled(lab: Lab, host: str) -> None:
    await lab.label(host, "edge")


async def unlabelled(lab: Lab, host: str) -> None:
    await lab.label(host, host.partition("-")[0])


def cut(kind: str) -> Act:
    return lambda lab, host: lab.cut(host, kind)


KINDS: dict[str, Act] = {
    "crash": crash,
    "reload": lambda lab, host: lab.reload(host),
    "stop": lambda lab, host: lab.stop(host),
    "start": lambda lab, host: lab.start(host),
    "reboot": reboot,
    "freeze": freeze,
    "cut off from etcd": cut("etcd"),
    "cut off from the others": cut("others"),
    "forwards nothing": cut("forwarding"),
    "healed": lambda lab, host: lab.heal(host),
    "etcd restarts": etcd_restarts,
    "interface deleted": interface_gone,
    "labelled": labelled,
    "unlabelled": unlabelled,
}


TO_AN_AGENT = ("crash", "reload", "stop", "freeze")
"""Nothing happens where none runs."""


async def test_a_schedule_of_faults() -> None:
    draw = random.Random(SEED)
    said: list[str] = []
    async with world(HOSTS, {site: site for site in HOSTS}, lease_ttl=3) as lab:
        try:
            for _ in range(FAULTS):
                kind, host = draw.choice(list(KINDS)), draw.choice(lab.hosts)
                said.append(f"{kind} {host}")
                if kind not in TO_AN_AGENT or (await lab.host(host)).agent == "running":
                    await KINDS[kind](lab, host)
                await trio.sleep(draw.choice((0.0, 0.3, 1.0)))
            for host in lab.hosts:
                await lab.heal(host)
                await lab.label(host, host.partition("-")[0])
                await lab.start(host)
            await lab.all_pairs_ping(90)
            await eventually(lambda: _agreed(lab), 60, every=0.2)
        except BaseException as error:
            error.add_note(f"KILO_CHAOS={SEED}: {'; '.join(said)}")
            raise


async def _agreed(lab: Lab) -> bool:
    """Whether all report, and those of one location name one leader, and nobody has anything to complain of but that
    it was demoted."""
    reports = await statuses(lab)
    assert reports.keys() == set(lab.hosts), reports.keys()
    for site in HOSTS:
        leaders = {str(report.get("leader")) for host, report in reports.items() if host.startswith(site)}
        assert len(leaders) == 1, leaders
        # A host that is alone, or not yet labelled anew, names none.
        assert leaders <= set(lab.hosts), leaders
    errors = [text for report in reports.values() for text in report.get("errors", ())]
    assert all("does not forward" in str(text) for text in errors), errors
    return True
