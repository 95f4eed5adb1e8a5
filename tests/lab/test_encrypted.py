"""`encrypted` in a lab, with real packets: a full mesh of hosts that share one network."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
import trio

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec
from kilo_etcd.model import Granularity

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

WIREGUARD, ETCD, PEER_QUERY = 51820, 2379, 1107
NODES = ("lan-1", "lan-2", "lan-3", "lan-4")


def one_lan(*families: str) -> Spec:
    hosts = (*(HostSpec(name=name) for name in NODES), HostSpec(name="stranger", agent=False))
    return Spec(
        sites=(SiteSpec(name="lan", hosts=hosts),), granularity=Granularity.FULL, open=True,
        families=families or ("ipv4",),
    )  # fmt: skip


async def records(lab: Lab) -> dict[str, dict[str, object]]:
    text = (await lab.etcdctl("get", "--prefix", "-w", "json", "/kilo/nodes/")).stdout
    import base64

    found = {}
    for kv in json.loads(text).get("kvs", []):
        name = base64.b64decode(kv["key"]).decode().rpartition("/")[2]
        found[name] = json.loads(base64.b64decode(kv["value"]))
    return found


async def stages(lab: Lab) -> set[object]:
    return {record.get("encryption") for record in (await records(lab)).values()}


async def test_a_full_mesh_on_one_lan_says_nothing_in_clear() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip", "ping")
    async with running_lab(one_lan()) as lab:
        await lab.all_pairs_ping(60, hosts=NODES)
        rows = {row.host: row.private[0].partition("/")[0] for row in await lab.status()}
        print(rows)
        await lab.kgctl("mesh", "set", "internal-ips", "encrypted", "--yes")

        async def all_send() -> bool:
            return await stages(lab) == {"sends"}

        with trio.move_on_after(20):
            await eventually(all_send, 30, every=0.2, what="all nodes send through the tunnels")
        print(await records(lab))
        for argv in (("ip", "rule"), ("ip", "route", "show", "table", "all"), ("wg", "show"), ("nft", "list", "ruleset")):
            print((await lab.exec("lan-1", *argv)).stdout[:3000])
        print((await lab.log("lan-1"))[-3000:])
        async with lab.capture("lan-1", ["eth0"]) as seen:
            for here, there in permutations(NODES, 2):
                print(here, there, await lab.ping(here, rows[there], timeout=2))
        print(*seen.flows, sep="\n")
        assert False
