"""A host with another name than before, and a host with a copy of another's disk, with real packets."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from test_mesh_scenarios import SHORT, leader, world

from helpers import eventually
from helpers_lab import statuses
from helpers_load import measured_beside
from kilo_etcd.lab.client import Lab
from kilo_etcd.store.keys import Keys

pytestmark = [pytest.mark.lab, pytest.mark.deadline(300)]
KEYS = Keys()
KG = str(Path(sys.executable).parent / "kg")
STATE = "/var/lib/kilo-etcd"
HANDED_OVER = 10.0
"""Seconds that packets to a leader that stops may take to go through its successor: a handshake may be begun again."""


@asynccontextmanager
async def called(lab: Lab, host: str, name: str) -> AsyncIterator[None]:
    """The host's agent runs with this name, and its log is the host's."""
    script = f"exec {KG} --hostname {name} --state-dir {STATE} --listen off >/tmp/{name}.log 2>&1"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.exec, host, "sh", "-c", script)
        yield
        await lab.exec(host, "pkill", "-f", f"kg --hostname {name} ", check=True)


async def errors(lab: Lab) -> dict[str, list[str]]:
    """What `kgctl check` calls an error, by its subject."""
    found: dict[str, list[str]] = {}
    for finding in json.loads((await lab.kgctl("check", "-o", "json", check=False)).stdout):
        if finding["severity"] == "error":
            found.setdefault(finding["subject"], []).append(finding["text"])
    return found


@pytest.mark.parametrize(("role", "longest"), [("member", SHORT), ("leader", HANDED_OVER)])
async def test_a_host_with_another_name_keeps_its_address_and_location(role: str, longest: float) -> None:
    async with world({"gcp": 3, "home": 1}) as lab:
        host = await leader(lab, "gcp")
        if role == "member":
            host = next(name for name in lab.hosts if name.startswith("gcp") and name != host)
        name = f"{host}.example.net"
        address = await lab.mesh_address(host)
        async with lab.probe("home-1", host, interval=0.05) as probe, measured_beside() as machine:
            await lab.stop(host)
            async with called(lab, host, name):

                async def joined() -> bool:
                    return name in await statuses(lab) and (await statuses(lab))[name].get("revision", 0) > 0

                await eventually(joined, 30, every=0.2)
                keys = [kv.key.decode() for kv in await lab.key_values("/kilo")]
                assert [key for key in keys if f"/{host}/" in key or key.endswith(f"/{host}")] == [KEYS.location(host)]
                assert KEYS.address(name, address) in keys
                says = (
                    f"this host was called {host}, and these are still for that name: the label; kgctl node rename "
                    f"{host} {name} moves them; the label counts until then"
                )
                await eventually(lambda: _names(lab, name, says), 20, every=0.5)
                assert (await statuses(lab))[name]["location"] == "gcp"
                await lab.kgctl("node", "rename", host, name, "--yes")

                async def back() -> bool:
                    return (await statuses(lab))[name].get("location") == "gcp" and not await errors(lab)

                await eventually(back, 30, every=0.5)
                for other in (other for other in lab.hosts if other != host):
                    assert await lab.ping(other, str(address))
                    assert (
                        await lab.exec(host, "ping", "-c", "1", "-W", "2", str(await lab.mesh_address(other)))
                    ).returncode == 0
                await probe.flowing_again(longest)
        assert probe.longest_gap < machine.allows(longest), machine


async def _names(lab: Lab, subject: str, text: str) -> bool:
    return text in (await errors(lab)).get(subject, [])


async def test_a_copy_of_a_disk_stays_out_and_both_hosts_are_told() -> None:
    async with world({"gcp": 1, "home": 2}) as lab:
        key = (await lab.exec("home-1", "cat", f"{STATE}/key", check=True)).stdout
        await lab.stop("home-2")
        async with lab.probe("gcp-1", "home-1", interval=0.05) as probe, measured_beside() as machine:
            await lab.exec("home-2", "sh", "-c", f"cat >{STATE}/key", input=key, check=True)
            await lab.start("home-2")

            async def told() -> bool:
                found = await errors(lab)
                return any("its public key is that of node home-1" in text for text in found.get("home-2", [])) and any(
                    text.startswith("home-2 has registered with this host's public key")
                    for text in found.get("home-1", [])
                )

            await eventually(told, 40, every=0.5)
            assert "nothing is taken over" in await lab.log("home-2")
            # It gets a key of its own, as it is told.
            await lab.stop("home-2")
            await lab.exec("home-2", "rm", f"{STATE}/key", check=True)
            await lab.start("home-2")
            await lab.all_pairs_ping(40)
            await eventually(lambda: _without_errors(lab), 30, every=0.5)
        assert probe.longest_gap < machine.allows(SHORT), machine


async def _without_errors(lab: Lab) -> bool:
    return not await errors(lab)
