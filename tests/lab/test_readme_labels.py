"""The README's own lines: its shell loops over etcdctl, run as they stand there, label the hosts as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

README = (Path(__file__).parents[2] / "README.md").read_text()


def lines_below(heading: str) -> list[str]:
    """The sh blocks below a heading of the README, up to the next heading."""
    section = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", re.sub(r"(?m)^# every", "every", README), re.M | re.S
    )
    assert section, heading
    return re.findall(r"```sh\n(.*?)```", section[1], re.S)


async def labels(lab: Lab) -> dict[str, str]:
    lines = (await lab.etcdctl("get", "--prefix", "/kilo/locations/")).stdout.splitlines()
    return {key.rpartition("/")[2]: value for key, value in zip(lines[::2], lines[1::2], strict=True)}


async def test_the_loops_of_the_readme() -> None:
    require("etcd", "etcdctl", "wireguard-go")
    (nodes,) = lines_below("The shapes")
    nodes = nodes.replace("every node that has registered, one name a line\n", "")
    (logical,) = lines_below("Logical groups")
    one_cloud, two_clouds = lines_below("Mixed")
    hosts = ["aws-1", "aws-2", "gcp-1", "gcp-2", "home-1", "home-2"]
    own = {"home-1": "home-1", "home-2": "home-2"}
    gcp = {"gcp-1": "gcp", "gcp-2": "gcp"}
    spec = Spec.simple({"aws": 2, "gcp": 2, "home": 2}, labels={h: h for h in hosts}, public=2)
    async with running_lab(spec) as lab:
        await lab.all_pairs_ping(30)
        for host in hosts:
            await lab.unlabel(host)
        for script, expected, clusters in (
            (one_cloud, {**own, **gcp, "aws-1": "aws-1", "aws-2": "aws-2"}, 5),
            (two_clouds, {**own, **gcp, "aws-1": "aws", "aws-2": "aws"}, 4),
        ):
            await lab.exec("operator", "sh", "-euc", nodes + script, check=True)
            assert await labels(lab) == expected
            await lab.all_pairs_ping(30)

            async def shaped(clusters: int = clusters) -> bool:
                return (await lab.kgctl("graph")).stdout.count("subgraph cluster_") == clusters

            await eventually(shaped, 60, every=0.1)
        for host in hosts:
            await lab.unlabel(host)
        await lab.exec("operator", "sh", "-euc", nodes + logical, check=True)
        assert await labels(lab) == gcp
