"""`encrypted` with real packets: a full mesh of hosts that share one network, etcd on hosts of the mesh, and members
behind leaders."""

from __future__ import annotations

import json
import sys
from base64 import b64decode
from contextlib import AsyncExitStack, suppress
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import trio
from encrypted_scenarios import (
    SERVER,
    WIREGUARD,
    in_clear,
    nothing_in_clear,
    one_lan,
    refuse_each_other,
    set_to,
    switched,
)

from helpers import eventually, require
from kilo_etcd.ctl.reports.report import DROPPED
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.runtime import LabError
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec
from kilo_etcd.model import Granularity

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

PROGRAMS = ("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip", "ping")


async def test_a_full_mesh_on_one_lan_says_nothing_in_clear() -> None:
    require(*PROGRAMS)
    async with running_lab(one_lan("ipv4", "ipv6")) as lab:
        await nothing_in_clear(lab, 60)


async def test_the_switch_loses_no_packet_and_leaves_nothing() -> None:
    require(*PROGRAMS)
    async with running_lab(one_lan("ipv4", "ipv6")) as lab:
        await switched(lab, 60)


MEMBERS = ("m-1", "m-2", "m-3")


CACHE = "/var/lib/kilo-etcd/mesh.jsonl.gz"


class EtcdOnHosts:
    """An etcd cluster, a member on each host of a lab, whose data outlive a power cut as a disk's do."""

    def __init__(self, lab: Lab, nursery: trio.Nursery, addresses: dict[str, str]) -> None:
        self.lab, self.nursery, self.addresses = lab, nursery, addresses

    def start(self, name: str) -> None:
        own, urls = self.addresses[name], {one: f"http://{at}:2380" for one, at in self.addresses.items()}
        self.nursery.start_soon(
            self._run, name, "etcd", "--name", name, "--data-dir", f"/var/lib/kilo-etcd/{name}",
            "--listen-client-urls", f"http://{own}:2379", "--advertise-client-urls", f"http://{own}:2379",
            "--listen-peer-urls", urls[name], "--initial-advertise-peer-urls", urls[name],
            "--initial-cluster", ",".join(f"{one}={url}" for one, url in urls.items()), "--log-level", "error",
        )  # fmt: skip

    async def _run(self, name: str, *argv: str) -> None:
        await self.lab.exec(name, *argv, env={"ETCDCTL_ENDPOINTS": None})

    async def ctl(self, *argv: str) -> str:
        endpoints = ",".join(f"http://{at}:2379" for at in self.addresses.values())
        env = {"ETCDCTL_ENDPOINTS": None}
        return (await self.lab.exec("m-1", "etcdctl", "--endpoints", endpoints, *argv, env=env, check=True)).stdout

    async def ready(self) -> None:
        async def healthy() -> bool:
            with suppress(LabError):
                await self.ctl("endpoint", "health")
                return True
            return False

        await eventually(healthy, 60, every=0.2, what="etcd has a quorum")

    async def records(self) -> list[dict[str, Any]]:
        """Of the nodes, as etcd has them."""
        document = json.loads(await self.ctl("get", "--prefix", "-w", "json", "/kilo/by/"))
        return [kv for kv in document.get("kvs", ()) if b64decode(kv["key"]).endswith(b"/node")]

    async def newest(self) -> int:
        """The revision of the newest of them."""
        return max(int(kv["mod_revision"]) for kv in await self.records())

    async def stages(self) -> set[str | None]:
        return {json.loads(b64decode(kv["value"])).get("encryption") for kv in await self.records()}


async def test_hosts_with_etcd_on_them_boot_without_it_and_let_it_come() -> None:
    """Three nodes on one network, etcd's three members on them. All are switched off, and boot before any etcd runs."""
    require(*PROGRAMS)
    endpoints = ",".join(f"http://10.101.0.{11 + k}:2379" for k in range(3))
    hosts = tuple(HostSpec(name=name, args=("--endpoints", endpoints)) for name in MEMBERS)
    spec = Spec(sites=(SiteSpec(name="m", hosts=hosts),), granularity=Granularity.FULL, agents=False, open=True)
    async with running_lab(spec) as lab, trio.open_nursery() as running:
        addresses = {row.host: row.private[0].partition("/")[0] for row in await lab.status()}
        assert set(endpoints.split(",")) == {f"http://{address}:2379" for address in addresses.values()}
        etcd = EtcdOnHosts(lab, running, addresses)
        for name in MEMBERS:
            etcd.start(name)
        await etcd.ready()
        for name in MEMBERS:
            await lab.start(name)
        await lab.all_pairs_ping(60)
        await etcd.ctl("put", "/kilo/mesh/internal-ips", "encrypted")

        async def sending() -> bool:
            return await etcd.stages() == {"sends"}

        async def talk() -> bool:
            return all([await lab.ping(a, addresses[b], timeout=1) for a, b in permutations(MEMBERS, 2)])

        async def says_nothing_in_clear() -> None:
            async with AsyncExitStack() as stack:
                seen = [await stack.enter_async_context(lab.capture(name, ["eth0"])) for name in MEMBERS]
                assert await talk()
            flows = [flow for running_capture in seen for flow in in_clear(running_capture.flows)]
            assert [flow for flow in flows if not (flow.protocol == "tcp" and flow.between(2380))] == []

        await eventually(sending, 60, every=0.2, what="all send")
        await refuse_each_other(lab, {name: [address] for name, address in addresses.items()})
        await says_nothing_in_clear()

        newest = await etcd.newest()

        async def kept() -> bool:
            first = [(await lab.exec(name, "sh", "-c", f"zcat {CACHE} | head -n 1")).stdout for name in MEMBERS]
            return all(line and json.loads(line)["revision"] >= newest for line in first)

        await eventually(kept, 60, every=0.2, what="each host has kept the mesh as it is")
        for name in MEMBERS:
            await lab.power_off(name)
        for name in MEMBERS:
            await lab.power_on(name, agent=True)
        # By the mesh that each has kept, and with nobody to ask. Until an agent runs nothing of it is in the kernel.
        await refuse_each_other(lab, {name: [address] for name, address in addresses.items()})
        await eventually(talk, 60, every=0.2, what="all pairs ping without etcd")
        async with lab.capture("m-1", ["eth0"]) as alone:
            assert await lab.ping("m-1", addresses["m-2"], timeout=2)
        assert [flow for flow in in_clear(alone.flows) if flow.protocol != "tcp"] == []
        for name in MEMBERS:
            etcd.start(name)
        await etcd.ready()
        await eventually(sending, 60, every=0.2, what="all send")
        await refuse_each_other(lab, {name: [address] for name, address in addresses.items()})
        await says_nothing_in_clear()
        running.cancel_scope.cancel()


async def test_members_behind_leaders_say_nothing_in_clear_between_sites() -> None:
    """Two sites with logical groups. The leaders' firewalls drop what is forwarded, as docker has it."""
    require(*PROGRAMS, "iptables")
    sites = tuple(
        SiteSpec(
            name=name,
            hosts=tuple(HostSpec(name=f"{name}-{k}", public=k == 1, label=name) for k in (1, 2)),
        )
        for name in ("one", "two")
    )
    lone = SiteSpec(name="lone", hosts=(HostSpec(name="lone-1", public=True, label="lone"),))
    spec = Spec(sites=(*sites, lone), open=True, agent_args=("--forward-rules",))
    async with running_lab(spec) as lab:
        for name in ("one-1", "two-1"):
            await lab.exec(name, "iptables", "-P", "FORWARD", "DROP", check=True)
        await lab.all_pairs_ping(60)
        addresses = {row.host: row.private[0].partition("/")[0] for row in await lab.status()}
        across = [(a, b) for a, b in permutations(lab.hosts, 2) if a.partition("-")[0] != b.partition("-")[0]]

        async def talk() -> bool:
            return all([await lab.ping(a, addresses[b], timeout=1) for a, b in across])

        await eventually(talk, 60, every=0.2, what="routed before")
        async with AsyncExitStack() as stack:
            probes = [
                await stack.enter_async_context(lab.probe(a, b, address=addresses[b]))
                for a, b in (("one-2", "two-2"), ("two-2", "one-2"), ("one-1", "two-2"), ("two-2", "one-1"))
            ]
            public = {row.host: row.public[0] for row in await lab.status() if row.public}
            async with lab.probe("lone-1", "one-1", address=public["one-1"]) as called, lab.probe(
                "one-1", "lone-1", address=public["lone-1"]
            ) as calling:  # fmt: skip
                await set_to(lab, "encrypted", "sends")
            assert (called.lost, calling.lost) == (0, 0), "a leader answers from its public address"
            async with lab.capture("router:one", ["wan"]) as one, lab.capture("router:two", ["wan"]) as two:
                assert await talk()
            await set_to(lab, "routed", None)
        assert [probe.lost for probe in probes] == [0] * len(probes)
        assert in_clear((*one.flows, *two.flows)) == []
        assert any(flow.between(WIREGUARD) for flow in one.flows)


async def test_an_exemption_is_a_way_in_to_members_while_no_tunnel_works_and_no_agent_runs() -> None:
    """Two locations whose networks a router joins: between members `routed` has routes into the tunnels."""
    require(*PROGRAMS)
    hosts = tuple(
        HostSpec(
            name=f"{label}-{k}", public=k == 1, label=label, subnet=subnet,
            args=("--clear", f"tcp/7000@10.62.{1 - subnet}.0/24"),
        )
        for subnet, label in enumerate(("one", "two"))
        for k in (1, 2)
    )  # fmt: skip
    town = SiteSpec(name="town", subnets=("10.62.0.0/24", "10.62.1.0/24"), hosts=hosts)
    async with running_lab(Spec(sites=(town,), open=True)) as lab, trio.open_nursery() as running:
        await lab.all_pairs_ping(60)
        await set_to(lab, "encrypted", "sends")
        addresses = {row.host: row.private[0].partition("/")[0] for row in await lab.status()}
        running.start_soon(partial(lab.exec, "two-2", sys.executable, "-c", SERVER, addresses["two-2"]))

        async def served(here: str) -> bool:
            code = f"import socket; print(socket.create_connection(('{addresses['two-2']}', 7000), 2).recv(9))"
            return "hello" in (await lab.exec(here, sys.executable, "-c", code)).stdout

        async with lab.capture("two-2", ["eth0"]) as seen:
            for here in ("one-1", "one-2"):
                await eventually(partial(served, here), 30, every=0.2, what=f"{here} is served")
                assert await lab.ping(here, addresses["two-2"], timeout=3)
        ways = {flow.source for flow in seen.flows if flow.protocol == "tcp" and flow.between(7000)}
        assert {addresses["one-2"], addresses["two-2"]} <= ways
        for name in lab.hosts:
            await lab.kill(name)
            await lab.cut(name, "port")
        for here in ("one-1", "one-2"):
            assert not await lab.ping(here, addresses["two-2"], timeout=1), "its tunnel is cut"
            assert await served(here)
        running.cancel_scope.cancel()


async def test_status_and_explain_say_so_while_every_tunnel_is_cut() -> None:
    """Nobody could lead better, so the probe reports stand; no host is asked."""
    require(*PROGRAMS)
    sites = tuple(
        SiteSpec(name=name, hosts=tuple(HostSpec(name=f"{name}-{k}", public=True, label=name) for k in (1, 2)))
        for name in ("one", "two")
    )
    async with running_lab(Spec(sites=sites)) as lab:
        await lab.all_pairs_ping(60)
        await set_to(lab, "encrypted", "sends")

        async def said(*arguments: str) -> str:
            return " ".join((await lab.kgctl(*arguments, check=False)).stdout.split())

        async def probing() -> bool:
            return "no host elsewhere has ever answered" not in await said("status")

        await eventually(probing, 60, every=0.5, what="the next in line have been answered")
        assert "through it packets do not arrive" not in await said("status")
        for name in lab.hosts:
            await lab.cut(name, "port")

        async def named() -> bool:
            problems = await said("status")
            return problems.count("through it packets do not arrive") == 2 and DROPPED in problems

        await eventually(named, 60, every=0.5, what="status names both leaders")
        explained = await said("explain", "one-1", "two-1")
        assert "may not arrive" in explained
        assert " gets no answer from " in explained
        for name in lab.hosts:
            await lab.heal(name)

        async def silent() -> bool:
            return "packets do not arrive" not in await said("status")

        await eventually(silent, 60, every=0.5, what="it is over")
