"""A laptop joins the mesh by two commands, with the real wg, and leaves it again."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

LAPTOP = "10.9.0.2"


async def test_a_laptop_reaches_every_node_and_every_node_the_laptop() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "wg-quick", "ip")
    spec = Spec.simple({"gcp": 2, "home": 2, "cafe": 1}, labels={"gcp": "gcp", "home": "home"}, public=1)
    async with running_lab(spec) as lab:
        await lab.all_pairs_ping(30)
        # The host in the café has no agent any more: it is the laptop.
        await lab.stop("cafe-1")
        kg = str(Path(sys.executable).parent / "kg")
        await lab.exec("cafe-1", kg, "--hostname", "cafe-1", "--state-dir", "/var/lib/kilo-etcd", "cleanup", check=True)

        added = await lab.kgctl(
            "peer", "add", "laptop", "--allowed-ips", LAPTOP, "--persistent-keepalive", "5", "--generate"
        )  # fmt: skip
        conf = added.stdout
        assert "PrivateKey" in conf
        assert "PrivateKey" not in (await lab.etcdctl("get", "--prefix", "/")).stdout
        before = await network(lab)
        await quick(lab, "up", conf)

        nodes = ("gcp-1", "gcp-2", "home-1", "home-2")
        for node in nodes:
            await eventually(partial(lab.ping, "cafe-1", node), 60, every=0.2, what=f"laptop to {node}")
            assert await lab.ping(node, LAPTOP, timeout=3), f"{node} to laptop"
        # Members hand it to their leader: only leaders have shaken hands with it.
        key = (await lab.exec("cafe-1", "wg", "show", "mesh", "public-key", check=True)).stdout.strip()
        assert await knowing(lab, key, *nodes) >= {"gcp-1", "home-1"}
        await quick(lab, "down")
        assert await network(lab) == before

        # With an exit node: everything into the tunnel, and its own packets outside.
        await lab.kgctl("annotate", "gcp-1", "advertise-exit-node=true", "leader=true", "--yes")
        private = next(line.split(" = ")[1] for line in conf.splitlines() if line.startswith("PrivateKey"))
        arguments = ("showconf", "peer", "laptop", "--exit-node", "gcp-1", "-o", "wg-quick", "--private-key-file", "-")
        own = str(Path(sys.executable).parent / "kgctl")

        async def everything() -> str:
            # Until gcp-1 leads it is refused.
            return (await lab.exec("operator", own, *arguments, input=private + "\n")).stdout

        await quick(lab, "up", await eventually(everything, 60, every=0.2, what="a configuration with an exit node"))
        for node in nodes:
            await eventually(partial(lab.ping, "cafe-1", node), 60, every=0.2, what=f"laptop to {node}")
        way = await lab.exec("cafe-1", "ip", "route", "get", "192.0.2.100", check=True)
        assert " dev mesh " in way.stdout
        await quick(lab, "down")
        assert await network(lab) == before

        assert (await lab.kgctl("peer", "remove", "laptop", "--yes")).stdout.endswith("peer laptop: removed\n")

        async def forgotten() -> bool:
            return await knowing(lab, key, *nodes) == set()

        await eventually(forgotten, 60, every=0.2, what="every node without the laptop's key")
        assert not await lab.ping("gcp-1", LAPTOP)


async def quick(lab: Lab, what: str, conf: str = "") -> None:
    """`wg-quick up` or `down`, on the laptop; where the kernel has no WireGuard by wireguard-go."""
    script = f"""
        mkdir -p /run/laptop && cd /run/laptop && umask 077
        if [ {what} = up ]; then cat >mesh.conf <<'END'\n{conf}\nEND
        fi
        WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go wg-quick {what} ./mesh.conf
    """
    await lab.exec("cafe-1", "bash", "-ec", script, check=True)


async def network(lab: Lab) -> str:
    shown = "ip -o link; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; nft list tables"
    return (await lab.exec("cafe-1", "sh", "-c", shown, check=True)).stdout


async def knowing(lab: Lab, key: str, *nodes: str) -> set[str]:
    """The nodes whose WireGuard has the key."""
    return {node for node in nodes if key in (await lab.exec(node, "wg", "show", "kilo0", "peers", check=True)).stdout}
