"""A laptop joins the mesh by two commands, with the real wg, and leaves it again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(300)]

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
        script = f"""
            mkdir -p /run/laptop && cd /run/laptop && umask 077 && cat >mesh.conf <<'END'\n{conf}\nEND
            wg-quick strip ./mesh.conf >stripped.conf
            wireguard-go mesh && wg setconf mesh stripped.conf
            ip address add {LAPTOP}/32 dev mesh && ip link set mesh up mtu 1420
            ip route add 10.4.0.0/16 dev mesh
        """
        await lab.exec("cafe-1", "sh", "-ec", script, check=True)

        nodes = ("gcp-1", "gcp-2", "home-1", "home-2")
        for node in nodes:
            await eventually(lambda node=node: lab.ping("cafe-1", node), 60, every=0.2, what=f"laptop to {node}")
            assert await lab.ping(node, LAPTOP, timeout=3), f"{node} to laptop"
        # Members hand it to their leader: only leaders have shaken hands with it.
        key = (await lab.exec("cafe-1", "wg", "show", "mesh", "public-key", check=True)).stdout.strip()
        assert await knowing(lab, key, *nodes) >= {"gcp-1", "home-1"}

        assert (await lab.kgctl("peer", "remove", "laptop", "--yes")).stdout.endswith("peer laptop: removed\n")

        async def forgotten() -> bool:
            return await knowing(lab, key, *nodes) == set()

        await eventually(forgotten, 60, every=0.2, what="every node without the laptop's key")
        assert not await lab.ping("gcp-1", LAPTOP)


async def knowing(lab: Lab, key: str, *nodes: str) -> set[str]:
    """The nodes whose WireGuard has the key."""
    return {node for node in nodes if key in (await lab.exec(node, "wg", "show", "kilo0", "peers", check=True)).stdout}
