"""`kg --dry-run` on an etcd and a kernel in memory: it always ends with something to read, and writes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from kilo_etcd import kernel
from kilo_etcd.agent import discover
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.dryrun import dry_run
from kilo_etcd.kernel.state import HostAddress
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.store.records import NodeRecord, encode
from kilo_etcd.testing.fake_etcd import FakeEtcd
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel


async def shown(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    state: Path,
    etcd: FakeEtcd,
    addresses: tuple[HostAddress, ...] = (),
    **options: Any,
) -> str:
    host = FakeHost()
    revision = etcd.header().revision

    async def gather(config: AgentConfig) -> HostFacts:
        await trio.lowlevel.checkpoint()
        return HostFacts(hostname=config.hostname, addresses=addresses)

    @asynccontextmanager
    async def open_kernel(setup: kernel.Setup) -> AsyncIterator[FakeKernel]:
        yield FakeKernel(host, setup)

    monkeypatch.setattr(discover, "gather", gather)
    monkeypatch.setattr(kernel, "open_kernel", open_kernel)
    config = evolve(AgentConfig.build(hostname="h1"), state_dir=state, **options)
    await dry_run(config, etcd.client(), lambda config, private: kernel.Setup(private_key=private))
    assert host.history == []
    assert etcd.header().revision == revision
    assert not await trio.Path(state).exists()
    return capsys.readouterr().out


async def test_a_host_that_has_not_joined_sees_what_joining_would_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = await shown(monkeypatch, capsys, tmp_path / "state", FakeEtcd())
    commands = [line for line in text.splitlines() if not line.startswith("# ")]
    assert all(line.split()[0] in ("ip", "wg", "sysctl") for line in commands)
    assert any(line.startswith("ip address add 10.4.") for line in commands)
    assert "private-key (hidden)" in text
    assert "# h1 is not registered yet" in text


async def test_a_renamed_host_is_shown_with_the_address_that_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    private = key_file.generate()
    monkeypatch.setattr(key_file, "peek", lambda _directory: private)
    etcd = FakeEtcd()
    etcd.put("/kilo/mesh/subnets", "10.4.0.0/16")
    etcd.put("/kilo/by/former/node", encode(NodeRecord(public_key=key_file.public_key(private))))
    etcd.put("/kilo/by/former/addresses/10.4.0.7", "")
    text = await shown(monkeypatch, capsys, tmp_path / "state", etcd)
    assert "# former has this host's key: shown as if that were its former name" in text
    assert "not registered" not in text
    assert "ip address add 10.4.0.7/" in text
    assert "wg set kilo0 peer" not in text


@pytest.mark.parametrize("dns_hosts", [True, False])
async def test_it_says_which_names_the_hosts_file_would_get(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dns_hosts: bool
) -> None:
    text = await shown(monkeypatch, capsys, tmp_path / "state", FakeEtcd(), dns_hosts=dns_hosts)
    assert ("# /etc/hosts: h1 is 10.4." in text) is dns_hosts


async def test_an_internal_ip_that_is_forced_and_that_the_host_does_not_have_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    etcd = FakeEtcd()
    record = NodeRecord(public_key="A" * 43 + "=", mesh_addresses=(ip_interface("10.4.0.7/16"),))
    etcd.put("/kilo/mesh/subnets", "10.4.0.0/16")
    etcd.put("/kilo/by/h1/node", encode(record))
    etcd.put("/kilo/by/h1/addresses/10.4.0.7", "")
    etcd.put("/kilo/annotations/h1/force-internal-ip", "192.168.7.99/24")
    mine = HostAddress(interface="eth0", index=2, address=ip_interface("192.168.7.1/24"))
    text = await shown(monkeypatch, capsys, tmp_path / "state", etcd, addresses=(mine,))
    assert "# 192.168.7.99, forced by annotation, is none of this host's addresses" in text


async def test_a_mesh_without_a_free_address_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    etcd = FakeEtcd()
    etcd.put("/kilo/mesh/subnets", "10.4.0.0/30")
    for number in (1, 2):
        key = "A" * 41 + f"{number}A="
        etcd.put(f"/kilo/by/n{number}/node", f'{{"publicKey":"{key}"}}')
        etcd.put(f"/kilo/by/n{number}/addresses/10.4.0.{number}", "")
    text = await shown(monkeypatch, capsys, tmp_path / "state", etcd)
    assert "# no address is left for h1 in 10.4.0.0/30" in text
