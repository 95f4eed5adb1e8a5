"""Two meshes in one etcd, joined by one command: every node of one reaches every node of the other."""

from __future__ import annotations

import json
from functools import partial

import pytest

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

OTHER = ("--prefix", "/b", "--subnet", "10.5.0.0/16")


async def addresses(lab: Lab, prefix: str) -> dict[str, str]:
    report = json.loads((await lab.kgctl("--prefix", prefix, "status", "-o", "json")).stdout)
    return {row["name"]: row["meshAddresses"][0] for row in report["nodes"] if row["meshAddresses"]}


async def test_every_node_reaches_every_node_of_the_other_mesh_until_they_part() -> None:
    require("etcd", "etcdctl", "wireguard-go", "ip")
    spec = Spec(
        sites=(
            SiteSpec(name="a", hosts=(HostSpec(name="a-1", public=True), HostSpec(name="a-2"))),
            SiteSpec(name="b", hosts=(HostSpec(name="b-1", public=True, args=OTHER), HostSpec(name="b-2", args=OTHER))),
        )
    )
    async with running_lab(spec) as lab:

        async def complete() -> bool:
            return len(await addresses(lab, "/kilo")) == len(await addresses(lab, "/b")) == 2

        await eventually(complete, 60, every=0.2)
        here, there = await addresses(lab, "/kilo"), await addresses(lab, "/b")
        assert not await lab.ping("a-2", there["b-2"], timeout=0.5)
        # The joining is of the leaders of the moment, so they should be the public hosts for good.
        for prefix, node in (("/kilo", "a-1"), ("/b", "b-1")):
            await lab.kgctl("--prefix", prefix, "annotate", node, "leader=true", "--yes")
            await lab.kgctl("--prefix", prefix, "wait")

            async def leads(prefix: str = prefix, node: str = node) -> bool:
                report = json.loads((await lab.kgctl("--prefix", prefix, "status", "-o", "json")).stdout)
                return [row["leader"] for row in report["locations"]] == [node]

            await eventually(leads, 60, every=0.2, what=f"{node} leads")
        await lab.kgctl("mesh", "join", "--other-prefix", "/b", "--yes")
        for one, others in (("a-1", there), ("a-2", there), ("b-1", here), ("b-2", here)):
            for other, address in others.items():
                await eventually(partial(lab.ping, one, address), 60, every=0.2, what=f"{one} to {other}")
        await lab.kgctl("mesh", "unjoin", "--other-prefix", "/b", "--yes")

        async def parted() -> bool:
            return not await lab.ping("a-2", there["b-2"], timeout=0.3)

        await eventually(parted, 60, every=0.2)
