"""`--endpoints-from-cluster`: the agent's endpoints follow etcd's member list."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from helpers import eventually, require
from helpers_dns import dns_server
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.etcd_members import PERIOD, EtcdMembers
from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.etcd.api import Config, PermissionDenied, Unavailable
from kilo_etcd.etcd.client import open_client
from kilo_etcd.etcd.values import Member
from kilo_etcd.runtime.etcd_members import FILE, keep
from kilo_etcd.runtime.logs import Once
from kilo_etcd.testing.etcd_server import EtcdCluster, EtcdProxy, EtcdServer
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd

BIN = Path(sys.executable).parent


class World:
    """One agent's part, with an etcd in memory."""

    def __init__(self, disk: Disk | None = None) -> None:
        self.server = FakeEtcd()
        self.client = FakeClient(self.server)
        self.trusted = True
        log = structlog.get_logger()
        self.config = AgentConfig(hostname="h1", etcd=Config(endpoints=("10.0.0.1:2379",)))
        self.members = EtcdMembers(
            self.config,
            self.client,
            log,
            Once(log),
            disk=disk,
            trusted=lambda: self.trusted,
            rng=random.Random(1),
        )

    def have(self, *urls: str) -> None:
        self.server.members = tuple(
            Member(id=number, name=f"m{number}", peer_urls=(), client_urls=(url,) if url else (), is_learner=False)
            for number, url in enumerate(urls)
        )


@pytest.mark.autojump
async def test_the_list_is_followed_and_kept(tmp_path: Path) -> None:
    world = World(Disk(tmp_path, run=_at_once))
    world.have("http://10.0.0.1:2379")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.members.run)
        await trio.sleep(PERIOD)
        assert world.client.endpoints == ("http://10.0.0.1:2379",)
        world.have("http://10.0.0.1:2379", "http://10.0.0.2:2379", "")
        await trio.sleep(PERIOD)
        assert list(world.client.endpoints) == ["http://10.0.0.1:2379", "http://10.0.0.2:2379"]
        world.have("http://10.0.0.2:2379")
        await trio.sleep(PERIOD)
        assert list(world.client.endpoints) == ["http://10.0.0.2:2379"]
        assert json.loads((tmp_path / FILE).read_text())["members"] == ["http://10.0.0.2:2379"]
        with capture_logs() as logs:
            await trio.sleep(10 * PERIOD)
        assert logs == []
        nursery.cancel_scope.cancel()
    await world.members.forget()
    assert not (tmp_path / FILE).exists()


async def _at_once(work: object) -> object:
    assert callable(work)
    return work()


@pytest.mark.autojump
async def test_what_is_of_no_use_is_said_once_and_the_endpoints_stay() -> None:
    world = World()
    world.have("http://localhost:2379", "http://0.0.0.0:2379")
    with capture_logs() as logs:
        for _ in range(3):
            await world.members.look()
    assert world.client.preferred == ()
    first, second = (entry["event"] for entry in logs)
    assert "http://localhost:2379 of etcd member m0 is left out" in first
    assert "http://0.0.0.0:2379 of etcd member m1 is left out" in second


@pytest.mark.autojump
async def test_a_list_without_usable_members_removes_the_copy_and_writing_is_tried_again(tmp_path: Path) -> None:
    failing = True

    async def run(work: object) -> object:
        if failing:
            raise OSError(28, "No space left on device")
        return await _at_once(work)

    world = World(Disk(tmp_path, run=run))
    keep(world.config.etcd, tmp_path, ("http://10.0.0.7:2379",))
    world.have("http://localhost:2379")
    await world.members.look()
    assert (tmp_path / FILE).exists()
    failing = False
    await world.members.look()
    assert not (tmp_path / FILE).exists()
    world.have("http://10.0.0.1:2379")
    await world.members.look()
    world.have("http://localhost:2379")
    await world.members.look()
    assert not (tmp_path / FILE).exists()
    assert world.client.preferred == ("http://10.0.0.1:2379",)
    world.have("http://10.0.0.1:2379")
    await world.members.look()
    assert json.loads((tmp_path / FILE).read_text())["members"] == ["http://10.0.0.1:2379"]


@pytest.mark.autojump
async def test_an_etcd_that_is_not_followed_says_nothing_of_its_members() -> None:
    world = World()
    world.have("http://10.0.0.9:2379")
    world.trusted = False
    await world.members.look()
    assert world.client.preferred == ()
    assert world.client.calls == []

    class Learns(FakeClient):
        async def members(self) -> tuple[Member, ...]:
            world.trusted = False
            return await super().members()

    world.trusted = True
    world.members._client = client = Learns(world.server)
    await world.members.look()
    assert client.preferred == ()


@pytest.mark.autojump
@pytest.mark.parametrize(
    ("error", "lines"), [(Unavailable("away"), 0), (PermissionDenied("etcd denies it: give the user a role"), 1)]
)
async def test_a_list_that_cannot_be_had_changes_nothing(error: Exception, lines: int) -> None:
    world = World()
    world.have("http://10.0.0.1:2379")
    await world.members.look()
    assert isinstance(error, Unavailable | PermissionDenied)
    world.client.refuse(error)
    with capture_logs() as logs:
        await world.members.look()
        await world.members.look()
    assert len(logs) == lines
    assert world.client.preferred == ("http://10.0.0.1:2379",)


# --- a real agent -------------------------------------------------------------------------------------------------


class Host:
    """A host in namespaces of its own."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        require("etcd", "etcdctl", "wireguard-go", "ip")
        subprocess.run(
            "ip link add eth0 type veth peer name eth1 && ip link set eth0 up && ip link set eth1 up && "
            "ip address add 192.0.2.1/24 dev eth0",
            shell=True, check=True,
        )  # fmt: skip
        self.directory, self.arguments, self.runs = directory, arguments, 0

    @property
    def log(self) -> str:
        """What the last agent has said."""
        text = (self.directory / f"log-{self.runs}").read_text()
        assert "Traceback" not in text, text
        return text

    @contextmanager
    def agent(self) -> Iterator[subprocess.Popen[bytes]]:
        """`kg` runs in the block."""
        self.runs += 1
        command = [str(BIN / "kg"), "--hostname", "h1", "--state-dir", str(self.directory / "state"), *self.arguments]
        with (self.directory / f"log-{self.runs}").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
            assert process.poll() is None, self.log
        except AssertionError as error:
            error.add_note(self.log)
            raise
        finally:
            process.terminate()
            process.wait(20)

    async def said(self, pattern: str) -> None:
        await eventually(lambda: re.search(pattern, self.log), 60, every=0.05, what=f"the agent said {pattern!r}")

    async def applies(self, server: EtcdServer, location: str) -> None:
        """The agent has applied what is put into etcd now."""
        async with open_client(server.config()) as client:

            async def put() -> int:
                with suppress(Unavailable):  # The leader may have gone with the last member.
                    return (await client.put("/kilo/locations/h1", location)).header.revision
                return 0

            revision = await eventually(put, 60)

            async def reported() -> bool:
                status = await client.get("/kilo-status/by/h1/status")
                return status is not None and json.loads(status.value).get("revision", 0) >= revision

            await eventually(reported, 60, every=0.1, what=f"the agent has location {location}")


@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.usefixtures("own_namespaces")
async def test_all_members_are_replaced_and_the_agent_goes_on_and_starts_again(tmp_path: Path) -> None:
    async with EtcdCluster.run(3) as cluster:
        first = tuple(cluster.members)
        host = Host(tmp_path, "--endpoints", ",".join(m.endpoint for m in first), "--endpoints-from-cluster")
        with host.agent():
            await host.said("this host is a segment|leader elected")
            for old in first:
                new = await cluster.add()
                await host.said(re.escape(new.endpoint))
                await cluster.remove(old)
            await host.applies(cluster.members[0], "there")
        assert not {m.endpoint for m in first} & {m.endpoint for m in cluster.members}
        with host.agent():
            await host.said("this host is a segment|leader elected")
            await host.applies(cluster.members[0], "back")
        host.arguments = host.arguments[:2]
        with host.agent() as process:
            await host.said("cannot reach etcd")
            assert process.poll() is None
        assert not (tmp_path / "state" / FILE).exists()


@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.usefixtures("own_namespaces")
async def test_an_agent_finds_etcd_by_srv_records_and_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETCDCTL_VERSION", "v3.5.9")
    async with EtcdCluster.run(3) as cluster, dns_server(53) as dns:
        resolv = tmp_path / "resolv.conf"
        resolv.write_text("nameserver 127.0.0.1\n")
        await trio.run_process(["mount", "--bind", str(resolv), "/etc/resolv.conf"])
        first, second, third = cluster.members
        name = "_etcd-client._tcp.example.com"
        dns.records[name] = [("localhost.", first.client_port)]
        host = Host(tmp_path, "--discovery-srv", "example.com", "--insecure-discovery")
        with host.agent():
            await host.said("this host is a segment|leader elected")
            assert "without effect" in host.log
            assert host.log.count("ETCDCTL_VERSION") == 1
            dns.records[name] = [("localhost.", second.client_port)]
            await first.kill()
            await host.applies(third, "there")


@pytest.mark.root
@pytest.mark.etcd
@pytest.mark.usefixtures("own_namespaces")
async def test_an_agent_is_healthy_again_after_its_proxy_is_restarted(tmp_path: Path) -> None:
    """It is away for longer than it takes to doubt a lease, so that the agent asks for its leases one by one."""
    async with EtcdServer.run() as server, EtcdProxy.run(server) as proxy:
        host = Host(tmp_path, "--endpoints", proxy.endpoint)
        with host.agent():
            await host.said("this host is a segment|leader elected")
            await host.applies(server, "here")
            await proxy.kill()
            async with open_client(server.config()) as client:

                async def lease_ended() -> bool:
                    return await client.get("/kilo-status/by/h1/status") is None

                await eventually(lease_ended, 60, every=0.1)
            await proxy.start()
            await host.applies(server, "there")
