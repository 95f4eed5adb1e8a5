"""The agent `kg` at the hands of a clumsy operator, with real packets: what it refuses, and what harms only itself."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import eventually, require
from kilo_etcd.lab.client import Completed, Lab, running_lab
from kilo_etcd.lab.spec import Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

KG = str(Path(sys.executable).parent / "kg")


@asynccontextmanager
async def mesh(**options: Any) -> AsyncIterator[Lab]:
    """gcp-1 alone, and home-1 and home-2 at another site."""
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip")
    spec = Spec.simple({"gcp": 1, "home": 2}, labels={"gcp": "gcp"}, public=2, **options)
    async with running_lab(spec) as lab:
        await lab.all_pairs_ping(30)
        yield lab


async def kg(lab: Lab, host: str, *arguments: str, state_dir: str = "/var/lib/kilo-etcd") -> Completed:
    return await lab.exec(host, KG, "--hostname", host, "--state-dir", state_dir, "--listen", "off", *arguments)


async def revision(lab: Lab) -> int:
    return int(json.loads((await lab.etcdctl("get", "/none", "-w", "json")).stdout)["header"]["revision"])


async def test_a_second_agent_or_a_cleanup_beside_a_running_agent_is_refused_and_disturbs_nobody() -> None:
    async with mesh() as lab:

        async def logged() -> list[str]:
            """What the agent logs, apart from its first answer as a prober, which may come late."""
            return [line for line in (await lab.log("home-1")).splitlines() if "answers through the leader" not in line]

        before = await logged()
        refusal = "kg: an agent runs on this host already (process "
        for arguments, state_dir in (
            ((), "/var/lib/kilo-etcd"),
            (("--interface", "wg7"), "/tmp/x"),
            (("cleanup",), ""),
        ):
            refused = await kg(lab, "home-1", *arguments, state_dir=state_dir or "/var/lib/kilo-etcd")
            assert (refused.returncode, refused.stderr[: len(refusal)]) == (1, refusal)
            assert len(refused.stderr.splitlines()) == 1
        assert await logged() == before
        assert await lab.missing_pings() == []


async def test_each_host_starts_with_a_new_key_whether_it_leads_or_not() -> None:
    async with mesh() as lab:
        for host in lab.hosts:
            address, key = await lab.mesh_address(host), await public_key(lab, host)
            await lab.stop(host)
            await lab.exec(host, "rm", "/var/lib/kilo-etcd/key", check=True)
            await lab.start(host)
            await eventually(lambda: _has_another(lab, host, key), 30, every=0.2)  # noqa: B023 - awaited here
            await lab.all_pairs_ping(30)
            assert await lab.mesh_address(host) == address


async def _has_another(lab: Lab, host: str, key: str) -> bool:
    return await public_key(lab, host) != key


async def public_key(lab: Lab, host: str) -> str:
    return (await lab.exec(host, "wg", "show", "kilo0", "public-key", check=True)).stdout


async def test_cleanup_goes_as_far_as_it_can_without_etcd_and_ends_the_work_later() -> None:
    async with mesh() as lab:
        await lab.stop("home-2")
        await lab.etcd("kill")
        first = await kg(lab, "home-2", "cleanup")
        assert first.returncode == 1
        assert "ip link del kilo0" in first.stdout
        assert "the records of home-2 are still in etcd" in first.stderr
        assert "run kg cleanup again" in first.stderr
        left = await lab.exec("home-2", "sh", "-c", "ip -o link; ip route; ps ax; ls /run/wireguard")
        assert not any(word in left.stdout for word in ("kilo0", "proto 107", "wireguard-go"))
        await lab.etcd("start")
        await lab.etcd_ready()
        for _ in range(2):
            assert (await kg(lab, "home-2", "cleanup")).returncode == 0
        keys = (await lab.etcdctl("get", "--prefix", "--keys-only", "/kilo/")).stdout
        assert "home-2" not in keys
        await lab.start("home-2")
        await lab.all_pairs_ping(30)


async def test_leaving_with_clean_up_while_etcd_is_away_leaves_nothing_and_puts_nothing_back() -> None:
    async with mesh(agent_args=("--clean-up", "--resync-period", "1s")) as lab:
        await lab.etcd("kill")
        await lab.stop("home-2")
        left = await lab.exec("home-2", "sh", "-c", "ip -o link; ip route; ps ax; ls /run/wireguard")
        assert not any(word in left.stdout for word in ("kilo0", "proto 107", "wireguard-go"))
        assert "another program change" not in await lab.log("home-2")


async def test_a_dry_run_before_joining_shows_all_and_writes_nothing() -> None:
    async with mesh() as lab:
        await lab.stop("home-2")
        assert (await kg(lab, "home-2", "cleanup")).returncode == 0
        # The others' plans and the statuses about them are still on their way.
        await eventually(lambda: _steady(lab), 60, every=0.5)
        before = await revision(lab)
        shown = await kg(lab, "home-2", "--dry-run", state_dir="/tmp/none")
        assert shown.returncode == 0, shown.stderr
        commands = [line for line in shown.stdout.splitlines() if not line.startswith("# ")]
        assert "ip link set kilo0 up" in commands
        assert all(line.split()[0] in ("ip", "wg", "wireguard-go", "sysctl") for line in commands)
        assert await revision(lab) == before
        left = await lab.exec("home-2", "sh", "-c", "ip -o link; ip route; ps ax; ls /tmp")
        assert not any(word in left.stdout for word in ("kilo0", "proto 107", "wireguard-go", "none"))


async def _steady(lab: Lab) -> bool:
    first = await revision(lab)
    keys = (await lab.etcdctl("get", "--prefix", "/kilo-status/")).stdout
    return "home-2" not in keys and await revision(lab) == first


async def test_an_agent_killed_at_any_moment_of_its_start_comes_back_with_the_address_it_had() -> None:
    async with mesh() as lab:
        address = await lab.mesh_address("home-2")
        for moment in ("starting", "address chosen", "address claimed", "registered"):
            await lab.kill("home-2")
            await lab.exec("home-2", "ip", "link", "del", "kilo0")
            length = len(await lab.log("home-2"))
            await lab.start("home-2")

            async def reached(length: int = length, moment: str = moment) -> bool:
                # A registration that stands already is not said again; then the first plan's word is as near.
                new = (await lab.log("home-2"))[length:]
                return moment in new or (moment == "registered" and "applied" in new)

            await eventually(reached, 60, what=moment)
        await lab.kill("home-2")
        await lab.start("home-2")
        await lab.all_pairs_ping(30)
        assert await lab.mesh_address("home-2") == address
        claims = [kv.key for kv in await lab.key_values("/kilo/by/") if b"/addresses/" in kv.key]
        assert len(claims) == 3


async def test_a_name_that_does_not_resolve_harms_its_own_endpoint_only() -> None:
    async with mesh() as lab:
        pids = [row.agent_pid for row in await lab.status()]
        # gcp-1 needs the endpoint of its location's leader only.
        await lab.etcdctl("put", "/kilo/annotations/home-1/leader", "true")
        await lab.etcdctl("put", "/kilo/annotations/home-1/force-endpoint", "no.such.name.invalid:51820")

        async def named() -> bool:
            return "no.such.name.invalid" in await lab.log("gcp-1")

        await eventually(named, 60, every=0.2, what="gcp-1 speaks of the name")
        await lab.etcdctl("put", "/kilo/annotations/gcp-1/persistent-keepalive", "7")

        async def followed() -> bool:
            return "\t7" in (await lab.exec("gcp-1", "wg", "show", "kilo0", "persistent-keepalive")).stdout

        await eventually(followed, 60, every=0.2, what="another change is followed")
        await lab.all_pairs_ping(30, hosts=("home-1", "home-2"))
        await lab.etcdctl("del", "/kilo/annotations/home-1/force-endpoint")
        await lab.all_pairs_ping(30)
        assert [row.agent_pid for row in await lab.status()] == pids


async def test_a_normal_start_has_no_word_of_warning() -> None:
    async with mesh() as lab:
        for host in lab.hosts:
            log = await lab.log(host)
            assert log.count(" info ") == len(log.splitlines()), log


async def test_names_of_the_mesh_resolve_on_every_host_and_go_with_the_agent() -> None:
    async with mesh(agent_args=("--dns-hosts",)) as lab:
        before = {host: (await lab.exec(host, "cat", "/etc/hosts")).stdout.split("# kilo")[0] for host in lab.hosts}
        mesh_addresses = {row.host: row.mesh[0] for row in await lab.status()}
        for host, other in (("gcp-1", "home-2"), ("home-2", "gcp-1"), ("home-2", "home-1")):
            for name in (f"{other}.mesh", other):

                async def resolves(host: str = host, name: str = name, other: str = other) -> bool:
                    return (await lab.exec(host, "getent", "hosts", name)).stdout.startswith(
                        f"{mesh_addresses[other]} "
                    )

                await eventually(resolves, 10, every=0.1)
                await lab.exec(host, "ping", "-c1", "-W5", name, check=True)
        # A host's own name leads where it led, and so does what is looked up after the agent has stopped.
        assert not (await lab.exec("home-2", "getent", "hosts", "home-2")).stdout.startswith("10.4.")
        await lab.stop("home-2")
        assert (await lab.exec("home-2", "getent", "hosts", "gcp-1")).stdout.startswith("10.4.")
        removed = await kg(lab, "home-2", "cleanup")
        assert "the names of the mesh are removed from /etc/hosts" in removed.stdout
        assert (await lab.exec("home-2", "cat", "/etc/hosts")).stdout == before["home-2"]

        async def forgotten() -> bool:
            return "home-2" not in (await lab.exec("gcp-1", "cat", "/etc/hosts")).stdout

        await eventually(forgotten, 10, every=0.1)
