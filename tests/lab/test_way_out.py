"""Nodes that leave for the internet by another node: what goes through, what stays outside, and that nothing leaks."""

from __future__ import annotations

import json
import sys

import pytest
import trio
from test_laptop_connects import CLIENT, INTERNET, SERVER, direct, host, site

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(150)]

SPEC = Spec(
    sites=(
        site("gcp", host("gcp-1"), host("gcp-2", public=False)),
        site("home", host("home-1"), host("home-2", public=False)),
    ),
    lease_ttl=2,
)
HOME = ("home-1", "home-2")
INWARD = "7778"
"""Stands for ssh: what somebody on the internet reaches home-1 at."""


async def let_through(lab: Lab, router: str, port: str) -> None:
    for side in ("dport", "sport"):
        rule = f"insert rule inet lab forward tcp {side} {port} accept"
        await lab.exec(router, "nft", *rule.split(), check=True)


async def shown(lab: Lab, *argv: str, node: str) -> str:
    return (await lab.exec(node, *argv, check=True)).stdout


async def seen(lab: Lab) -> dict[str, str]:
    return {name: await direct(lab, name) for name in HOME}


async def test_nodes_leave_by_a_gateway_answer_who_calls_them_and_leak_nothing() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "ip", "ping", "nft")
    async with running_lab(SPEC) as lab, trio.open_nursery() as nursery:
        await lab.all_pairs_ping(30)
        # Both sites let the server's port through, so that what went beside the tunnel would arrive, and be seen to.
        await let_through(lab, "router:gcp", "7777")
        await let_through(lab, "router:home", "7777")
        await let_through(lab, "router:home", INWARD)
        nursery.start_soon(lab.exec, "operator", sys.executable, "-c", SERVER)
        nursery.start_soon(lab.exec, "home-1", sys.executable, "-c", SERVER.replace("7777", INWARD))
        await eventually(lambda: direct(lab, "gcp-1"), 30, every=0.2, what="the server's answer to gcp-1")
        beside, expected = await seen(lab), await direct(lab, "gcp-2")
        assert expected not in beside.values()
        assert all(beside.values())
        public = await shown(
            lab, "ip", "-4", "-o", "addr", "show", "dev", "eth0", "to", beside["home-1"], node="home-1"
        )
        assert beside["home-1"] in public
        call = CLIENT.replace(INTERNET, beside["home-1"]).replace("7777", INWARD)

        async def called() -> str:
            """What somebody on the internet hears from home-1, at its public address."""
            return (await lab.exec("operator", sys.executable, "-c", call)).stdout.strip()

        async def all_by(address: str) -> bool:
            return set((await seen(lab)).values()) == {address}

        assert await called() == INTERNET
        rules = await shown(lab, "ip", "rule", node="home-1")

        # Refused in a sentence: no gateway, a member before its leader.
        refused = await lab.kgctl("annotate", "home-1", "way-out=gcp-1", "--yes", check=False)
        assert (refused.returncode, "kgctl annotate gcp-1 gateway=true" in refused.stderr) == (1, True), refused.stderr
        await lab.kgctl("annotate", "gcp-1", "gateway=true")
        leader = await leader_of(lab)
        (member,) = set(HOME) - {leader}
        refused = await lab.kgctl("annotate", member, "way-out=gcp-1", "--yes", check=False)
        assert f"kgctl annotate {leader} way-out=gcp-1 too" in refused.stderr, refused.stderr

        for name in (leader, member):
            await lab.kgctl("annotate", name, "way-out=gcp-1", "--yes")
        await eventually(lambda: all_by(expected), 60, every=0.2, what="both leave by gcp-1")
        assert await called() == INTERNET
        await lab.all_pairs_ping(30)
        for outside in ("192.0.2.1", "198.51.100.1", "169.254.169.254", "10.102.0.1"):
            assert " dev eth0 " in await shown(lab, "ip", "route", "get", outside, node="home-1"), outside
        assert (await lab.exec("home-1", "ip", "-6", "route", "get", "2001:db8::9")).returncode != 0

        # Who led follows, and the other way round; nobody is let out beside the tunnel meanwhile.
        await lab.stop(leader)
        await eventually(lambda: all_by(expected), 60, every=0.2, what="both leave by gcp-1 with another leader")
        await lab.start(leader)
        await lab.kgctl("wait")

        # The gateway is none any more: closed, although home's router would let it all through.
        await lab.kgctl("annotate", "gcp-1", "gateway-", "--yes")
        await eventually(lambda: all_by(""), 60, every=0.2, what="nobody gets out")
        assert await called() == INTERNET
        await lab.all_pairs_ping(30)
        status = (await lab.kgctl("status")).stdout
        assert "node gcp-1 offers no way out; allow it with kgctl annotate gcp-1 gateway=true" in status

        for name in HOME:
            await lab.kgctl("annotate", name, "way-out-", "--yes")

        async def as_before() -> bool:
            return await seen(lab) == beside

        await eventually(as_before, 60, every=0.2, what="both leave by their own network again")
        assert await shown(lab, "ip", "rule", node="home-1") == rules
        # Cleaning up takes all of it away.
        await lab.kgctl("annotate", "gcp-1", "gateway=true")
        for name in ((await leader_of(lab)), *HOME):
            await lab.kgctl("annotate", name, "way-out=gcp-1", "--yes")
        await eventually(lambda: all_by(expected), 60, every=0.2, what="both leave by gcp-1 again")
        await lab.stop("home-1")
        kg = str(sys.executable).replace("/python", "/kg")
        await lab.exec("home-1", kg, "--hostname", "home-1", "--state-dir", "/var/lib/kilo-etcd", "cleanup", check=True)
        left = await shown(lab, "sh", "-c", "ip rule; ip route show table all", node="home-1")
        assert ("fwmark" in left, "proto 107" in left) == (False, False), left
        assert await direct(lab, "home-1") == beside["home-1"]
        nursery.cancel_scope.cancel()


async def leader_of(lab: Lab) -> str:
    report = json.loads((await lab.kgctl("status", "-o", "json")).stdout)
    return str(next(row["leader"] for row in report["locations"] if row["location"] == "home"))
