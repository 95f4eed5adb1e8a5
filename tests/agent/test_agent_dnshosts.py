"""`kg --dns-hosts`: the hosts file follows the mesh."""

from __future__ import annotations

import errno
import os
import socket
from functools import partial
from ipaddress import ip_address, ip_interface
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from agent_world import World, running

from helpers import eventually
from kilo_etcd import kernel
from kilo_etcd.agent import dnshosts
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.dnshosts import Names, WriteNames, writer
from kilo_etcd.kernel.state import Change
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.hostnames import BY_AGENT
from kilo_etcd.runtime.hostsfile import HostsFileError, write_names
from kilo_etcd.store.records import NodeRecord, StatusRecord, encode, read

pytestmark = pytest.mark.autojump

FILE = b"127.0.0.1\tlocalhost\n127.0.1.1 h1\n"
OWN_AND = "# kilo-etcd kilo0: begin (kg writes it for /kilo, and kg cleanup removes it)\n"
END = "# kilo-etcd kilo0: end\n"


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_bytes(FILE)
    return path


def into(path: Path) -> WriteNames:
    async def write(names: Names | None) -> bool:
        await trio.lowlevel.checkpoint()
        run = path.parent / "run"
        return write_names(names, "kilo0", prefix="/kilo", own=("h1",), by=BY_AGENT, path=path, lock_dir=run)

    return write


def registers(world: World, name: str, address: str) -> None:
    """Another node comes."""
    record = NodeRecord(
        public_key=key_file.public_key(key_file.generate()),
        internal_ips=(ip_interface("192.168.1.2/24"),),
        mesh_addresses=(ip_interface(f"{address}/16"),),
    )
    world.etcd.put(f"/kilo/by/{name}/addresses/{address}", "")
    world.etcd.put(f"/kilo/by/{name}/node", encode(record))


def block(path: Path) -> list[str]:
    """The lines of the block, without the markers; none, if there is no block."""
    text = path.read_text()
    assert text.startswith(FILE.decode())
    rest = text.removeprefix(FILE.decode())
    if not rest:
        return []
    assert rest.startswith(OWN_AND)
    assert rest.endswith(END)
    return rest.removeprefix(OWN_AND).removesuffix(END).splitlines()


def take_away(path: Path) -> None:
    path.write_bytes(FILE)


def errors(world: World) -> tuple[str, ...]:
    value = world.etcd.get("/kilo-status/by/h1/status")
    return () if value is None else read(StatusRecord, value).record.errors


async def test_names_come_and_go_with_the_nodes_and_stay_when_the_agent_stops(world: World, hosts: Path) -> None:
    async with running(world, write_names=into(hosts), dns_hosts=True) as daemon:
        await eventually(lambda: block(hosts), 10, every=0.1)
        own = daemon.session.addresses[0]
        assert block(hosts) == [f"{own} h1.kilo h1.mesh"]
        registers(world, "node-7", "10.4.0.77")
        await eventually(lambda: "10.4.0.77 node-7.kilo node-7.mesh node-7" in block(hosts), 3, every=0.1)
        world.etcd.delete("/kilo/by/node-7/node")
        await eventually(lambda: len(block(hosts)) == 1, 3, every=0.1)
    assert len(block(hosts)) == 1
    assert world.logged("names removed") == 0


async def test_what_another_program_takes_away_comes_back(world: World, hosts: Path) -> None:
    async with running(world, write_names=into(hosts), dns_hosts=True):
        await eventually(lambda: block(hosts), 10, every=0.1)
        take_away(hosts)
        await eventually(lambda: block(hosts), 30, every=0.1)


async def test_without_the_flag_the_block_of_an_earlier_start_goes(world: World, hosts: Path) -> None:
    async with running(world, write_names=into(hosts), dns_hosts=True):
        await eventually(lambda: block(hosts), 10, every=0.1)
    async with running(world, write_names=into(hosts)):
        await eventually(lambda: not block(hosts), 10, every=0.1)
        registers(world, "node-7", "10.4.0.77")
        await trio.sleep(30)
    assert not block(hosts)


async def test_clean_up_removes_the_block(world: World, hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cleanup(interface: str, *, public_key: str) -> tuple[Change, ...]:
        await trio.lowlevel.checkpoint()
        return ()

    monkeypatch.setattr(kernel, "cleanup", cleanup)
    async with running(world, write_names=into(hosts), dns_hosts=True, clean_up=True):
        await eventually(lambda: block(hosts), 10, every=0.1)
    assert not block(hosts)


class Disk:
    """Takes down when the file is written, and refuses on demand."""

    def __init__(self) -> None:
        self.written: list[tuple[float, Names | None]] = []
        self.refuses: int | None = None

    async def __call__(self, names: Names | None) -> bool:
        await trio.lowlevel.checkpoint()
        self.written.append((trio.current_time(), names))
        if self.refuses is not None:
            error = HostsFileError(f"/etc/hosts is left as it was: {os.strerror(self.refuses)}")
            error.errno = self.refuses
            raise error
        return True


async def test_a_file_that_cannot_be_written_is_said_once_and_in_the_status_until_it_can(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVOCATION_ID", "1")
    disk = Disk()
    disk.refuses = errno.EROFS
    async with running(world, write_names=disk, dns_hosts=True):
        sentence = (
            "the names of the mesh cannot be brought into the hosts file: /etc/hosts is left as it was: Read-only "
            "file system; /etc/hosts was replaced since the service was started, which "
            "systemctl restart kilo-etcd makes good"
        )
        await eventually(lambda: errors(world) == (sentence,), 10, every=0.1)
        registers(world, "node-7", "10.4.0.77")
        await trio.sleep(100)
        assert world.daemon.state.topology is not None
        assert "node-7" in world.daemon.state.topology.snapshot.nodes, "all else goes on"
        assert world.logged("the names of the mesh cannot be") == 1
        assert errors(world) == (sentence,)
        disk.refuses = None
        await eventually(lambda: errors(world) == (), 40, every=0.1)
        assert world.logged("the hosts file can be written again") == 1
        assert "node-7" in (disk.written[-1][1] or {})


async def test_a_block_that_cannot_be_removed_is_tried_again(world: World) -> None:
    disk = Disk()
    disk.refuses = errno.ENOSPC
    async with running(world, write_names=disk):
        await eventually(lambda: errors(world), 10, every=0.1)
        assert errors(world) == (
            "the names of the mesh cannot be removed from the hosts file: /etc/hosts is left as it was: "
            "No space left on device",
        )
        disk.refuses = None
        await eventually(lambda: not errors(world), 2 * dnshosts.RETRY_SECONDS, every=0.1)
        count = len(disk.written)
        await trio.sleep(300)
        assert len(disk.written) == count


async def test_many_changes_are_written_once_a_second_at_most_and_what_changes_no_name_not_at_all(world: World) -> None:
    disk = Disk()
    async with running(world, write_names=disk, dns_hosts=True, resync_period=3600.0):
        await eventually(lambda: disk.written, 10, every=0.1)
        for at in range(40):
            registers(world, f"n{at}", f"10.4.1.{at}")
            await trio.sleep(0.1)
        await eventually(lambda: len(disk.written[-1][1] or {}) == 41, 3, every=0.1)
        times = [time for time, _ in disk.written]
        assert all(later - earlier > 0.999 for earlier, later in pairwise(times))
        await trio.sleep(5)
        count = len(disk.written)
        world.etcd.put("/kilo/annotations/n1/leader", "true")
        world.etcd.put("/kilo/mesh/adopted", "1")
        await trio.sleep(30)
        assert len(disk.written) == count


def test_the_block_is_the_agents_own_and_does_not_name_this_host_in_short(
    hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-1.example.org")
    monkeypatch.setattr(dnshosts, "write_names", partial(write_names, path=hosts, lock_dir=hosts.parent / "run"))
    write = writer(AgentConfig.build(hostname="h2"))
    names: Names = {name: (ip_address(f"10.4.0.{at}"),) for at, name in enumerate(("h2", "node-1", "node-2"))}
    assert trio.run(write, names)
    assert block(hosts) == [
        "10.4.0.0 h2.kilo h2.mesh", "10.4.0.1 node-1.kilo node-1.mesh", "10.4.0.2 node-2.kilo node-2.mesh node-2"
    ]  # fmt: skip
    assert trio.run(write, None)
    assert not block(hosts)
