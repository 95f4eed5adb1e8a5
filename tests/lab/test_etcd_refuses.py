"""etcd answers and refuses the hosts: what still forwards, with real packets."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from attrs import evolve

from helpers import eventually, require
from helpers_lab import candidacies
from kilo_etcd.lab.addressing import lay_out
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.machine import STATE_DIR
from kilo_etcd.lab.spec import Spec
from kilo_etcd.testing.certificates import Authority

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

SITES = ("gcp", "home")


async def cached(lab: Lab, host: str) -> tuple[int, int]:
    """How many records of nodes and how many candidacies a host has cached."""
    text = (await lab.exec(host, "zcat", f"{STATE_DIR}/mesh.jsonl.gz")).stdout.partition("\n")[
        2
    ]  # The head names keys.
    return text.count('/node",'), text.count("/elections/")


async def test_a_power_cut_of_all_hosts_is_survived_while_etcds_certificate_has_expired(tmp_path: Path) -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip")
    plain = Spec.simple(dict.fromkeys(SITES, 2), labels={site: site for site in SITES}, open=True)
    address = str(next(iter(lay_out(plain).members.values()))[0])
    authority = Authority(tmp_path / "pki")
    server = authority.issue("server", (address,))
    encrypted = f"https://{address}:2378"
    spec = evolve(
        plain,
        etcd_args=(
            "--listen-client-urls", f"http://{address}:2379,http://127.0.0.1:2379,{encrypted}",
            "--cert-file", str(server.cert), "--key-file", str(server.key),
        ),
        agent_args=("--endpoints", encrypted, "--cacert", str(authority.ca)),
    )  # fmt: skip
    async with running_lab(spec) as lab:
        await lab.all_pairs_ping(30)

        async def all_cached() -> bool:
            number = len(lab.hosts)
            standing = sum([len(await candidacies(lab, site)) for site in SITES])
            return all([await cached(lab, host) == (number, standing) for host in lab.hosts]) and standing == number

        await eventually(all_cached, 60, every=0.5, what="each host has cached the mesh")
        authority.issue("server", (address,), seconds=-60)
        for host in lab.hosts:
            await lab.power_off(host)
        for host in lab.hosts:
            await lab.power_on(host)
        await lab.all_pairs_ping(30)
        for host in lab.hosts:
            log = await lab.log(host)
            assert "TLS with etcd fails: the cached snapshot is in force" in log
            assert "its certificate is not valid now (certificate has expired); renew etcd's certificate" in log
        # Renewed, with nothing started anew.
        authority.issue("server", (address,))
        for host in lab.hosts:
            await eventually(partial(joined, lab, host), 30, every=0.5, what=f"{host} has joined")
        await lab.all_pairs_ping(30)


async def joined(lab: Lab, host: str) -> bool:
    return "this host has joined again" in await lab.log(host)
