"""etcd is restored from a backup, or an empty one is put in its place: what `kgctl` says, what adopting it costs."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack

import pytest
import trio
from attrs import evolve

from helpers import eventually, require
from helpers_lab import candidacies, statuses
from helpers_load import measured_beside
from kilo_etcd.lab.client import Lab, RunningProbe, running_lab
from kilo_etcd.lab.machine import BASE
from kilo_etcd.lab.spec import Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

SITES = ("gcp", "home")
DATA = f"{BASE}/etcd/etcd1"
PAIRS = (("gcp-2", "home-2"), ("home-3", "gcp-3"), ("gcp-1", "home-1"), ("gcp-1", "gcp-2"))
GAP = 0.5
"""Seconds; none is measured on an idle machine."""


def spec() -> Spec:
    """The agents know where they are: an empty etcd has no labels."""
    simple = Spec.simple(dict.fromkeys(SITES, 3), public=3, open=True)
    return evolve(
        simple,
        sites=tuple(
            evolve(site, hosts=tuple(evolve(host, args=("--location", site.name)) for host in site.hosts))
            for site in simple.sites
        ),
    )


async def restart_etcd(lab: Lab, *commands: tuple[str, ...], kill: bool = True) -> None:
    """With `commands` between its end and its start."""
    await lab.etcd("kill" if kill else "stop")
    for command in commands:
        await lab.exec("operator", *command, check=True)
    await lab.etcd("start")
    await lab.etcd_ready()


async def settled(lab: Lab) -> bool:
    standing = [len(await candidacies(lab, site)) for site in SITES]
    return standing == [3, 3] and len(await statuses(lab)) == 6


@pytest.mark.parametrize("empty", [True, False])
async def test_agents_say_that_they_do_not_follow_it_and_adopting_it_interrupts_nothing(empty: bool) -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip")
    async with running_lab(spec()) as lab:
        await lab.all_pairs_ping(30)
        await eventually(lambda: settled(lab), 30, every=0.2)
        if empty:
            await restart_etcd(lab, ("rm", "-rf", DATA))
        else:
            await restart_etcd(lab, ("cp", "-a", DATA, f"{DATA}.old"), kill=False)
            for number in range(5):
                await lab.etcdctl("put", "/kilo/locations/elsewhere", str(number))
            # So that every agent has looked at it since.
            await trio.sleep(15)
            await restart_etcd(lab, ("rm", "-rf", DATA), ("cp", "-a", f"{DATA}.old", DATA))
        said = "kgctl mesh adopt, if it is to be the mesh's"

        async def known() -> bool:
            return said in (await lab.kgctl("status")).stdout

        await eventually(known, 30, every=1)

        async def silent() -> bool:
            return await statuses(lab) == {}

        # kgctl asks as soon as most are gone. The last lease may yet have to end; that of an agent that follows stays.
        await eventually(silent, 20, every=0.5)
        status = (await lab.kgctl("status")).stdout
        # The empty one has the same cluster id, since it was made in the same way; what is asked makes it grow.
        assert re.search(
            r"agents do not follow this etcd \((gcp|home)-1.* etcd went back in time: its revision", status
        )
        check = await lab.kgctl("check", check=False)
        assert check.returncode == 1
        assert re.search(r"error: etcd: agents do not follow this etcd \((gcp|home)-", check.stdout)
        label = await lab.kgctl("location", "set", "gcp-2", "gcp", "--yes")
        assert "so what is written here has no effect on them: kgctl mesh adopt" in label.stderr
        wait = await lab.kgctl("wait", check=False)
        assert wait.returncode == 1
        assert said in wait.stderr
        async with AsyncExitStack() as stack:
            machine = await stack.enter_async_context(measured_beside())
            probes: list[RunningProbe] = [await stack.enter_async_context(lab.probe(*pair)) for pair in PAIRS]
            adopted = await lab.kgctl("mesh", "adopt", "--yes")
            assert "do not follow" not in adopted.stderr
            await eventually(lambda: settled(lab), 60, every=0.5)
            await lab.kgctl("wait")
        assert max(probe.longest_gap for probe in probes) < machine.allows(GAP), (machine, probes)
        assert said not in (await lab.kgctl("status")).stdout
