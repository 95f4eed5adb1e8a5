"""A laptop behind NAT runs `kgctl connect`, follows the mesh by names, and leaves nothing behind. With real packets."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from helpers import eventually, require
from kilo_etcd.lab.client import Completed, Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(150)]

KGCTL = str(Path(sys.executable).parent / "kgctl")
SECOND = ("--prefix", "/second")


def site(name: str, *hosts: HostSpec) -> SiteSpec:
    return SiteSpec(name=name, hosts=hosts)


def host(name: str, *args: str, public: bool = True) -> HostSpec:
    return HostSpec(name=name, public=public, label=name.partition("-")[0], args=args)


SPEC = Spec(
    sites=(
        site("gcp", host("gcp-1"), host("gcp-2"), host("gcp-3", public=False)),
        site("home", host("home-1"), host("home-2", public=False)),
        site("far", host("far-1", *SECOND, "--subnet", "10.5.0.0/16")),
        site("cafe", host("cafe-1", public=False)),
    ),
    lease_ttl=2,
)
NODES = ("gcp-1", "gcp-2", "gcp-3", "home-1", "home-2")


class Connected:
    """A `kgctl connect` on the laptop; `ended` is how it has ended."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.pidfile = f"/run/{name}.pid"
        self.ended: Completed | None = None

    async def run(self, arguments: tuple[str, ...], task_status: trio.TaskStatus[None]) -> None:
        script = f'echo $$ >{self.pidfile}; exec "$@" 2>&1'
        task_status.started()
        self.ended = await self.lab.exec("cafe-1", "sh", "-c", script, "sh", KGCTL, *arguments)

    async def signal(self, name: str) -> None:
        await self.lab.exec("cafe-1", "sh", "-c", f"kill -{name} $(cat {self.pidfile})", check=True)


@asynccontextmanager
async def connected(lab: Lab, name: str, *arguments: str) -> AsyncIterator[Connected]:
    """`kgctl` with these arguments runs on the laptop while in the block, and is told to end at its end."""
    made = Connected(lab, name)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run, arguments)
        yield made
        await made.signal("TERM")


async def reaches(lab: Lab, *names: str) -> None:
    """The laptop pings each of them by name."""

    async def answered(name: str) -> bool:
        return (await lab.exec("cafe-1", "ping", "-c", "1", "-W", "1", name)).returncode == 0

    for name in names:
        await eventually(lambda name=name: answered(name), 30, every=0.2, what=f"laptop to {name}")


async def shown(lab: Lab, *argv: str) -> str:
    return (await lab.exec("cafe-1", *argv, check=True)).stdout


async def leader_of_gcp(lab: Lab) -> str:
    return (await lab.etcdctl("get", "--print-value-only", "/kilo/leaders/gcp")).stdout.strip()


async def test_a_laptop_behind_nat_follows_two_meshes_by_name_and_leaves_nothing() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "ip", "ping")
    async with running_lab(SPEC) as lab:
        await lab.all_pairs_ping(30, hosts=NODES)
        # The host in the café has no agent any more: it is the laptop.
        await lab.stop("cafe-1")
        kg = str(Path(sys.executable).parent / "kg")
        await lab.exec("cafe-1", kg, "--hostname", "cafe-1", "--state-dir", "/var/lib/kilo-etcd", "cleanup", check=True)
        before = {what: await shown(lab, "sh", "-c", what) for what in ("ip route; ip -6 route", "cat /etc/hosts")}
        links = await shown(lab, "ip", "-o", "link")

        async with (
            connected(lab, "first", "connect", "laptop", "--dns-hosts") as first,
            connected(lab, "second", *SECOND, "connect", "laptop", "--dns-hosts") as second,
        ):
            await reaches(lab, *(f"{name}.kilo" for name in NODES), "far-1.second", "gcp-1", "far-1")
            address = (await shown(lab, "ip", "-o", "-4", "address", "show", "kilo-kilo")).split()[3].split("/")[0]
            assert address.startswith("10.4.")
            for node in ("gcp-3", "home-2"):
                assert await lab.ping(node, address, timeout=3), f"{node} to laptop"

            refused = await lab.exec("cafe-1", KGCTL, "connect", "laptop")
            assert refused.returncode == 1
            pid = (await shown(lab, "cat", first.pidfile)).strip()
            assert f"has the interface kilo-kilo already (process {pid})" in refused.stderr

            gone = await leader_of_gcp(lab)
            await lab.power_off(gone)
            await reaches(lab, *(name for name in NODES if name != gone))
            # A route that somebody takes away comes back.
            await lab.exec("cafe-1", "ip", "route", "del", "10.4.0.0/16", check=True)
            await reaches(lab, "home-2.kilo")

        for one in (first, second):
            assert one.ended is not None
            assert one.ended.returncode == 0, one.ended.stdout
            assert "Traceback" not in one.ended.stdout
        assert {what: await shown(lab, "sh", "-c", what) for what in before} == before
        assert await shown(lab, "ip", "-o", "link") == links
        left = (await lab.etcdctl("get", "--prefix", "--keys-only", "/")).stdout.split()
        assert [key for key in left if "peers/" in key or key.endswith(address)] == []
