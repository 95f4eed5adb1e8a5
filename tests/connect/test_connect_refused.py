"""The real `kgctl connect` with a real etcd, in namespaces of its own: what it refuses, and how it outlives a crash."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path

import pytest
from attrs import define

from helpers import eventually, require
from kilo_etcd.etcd.client import open_client
from kilo_etcd.model import Endpoint
from kilo_etcd.runtime import key_file
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import NodeRecord, PeerRecord, encode
from kilo_etcd.testing.etcd_server import EtcdServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.etcd,
    pytest.mark.usefixtures("own_namespaces"),
    pytest.mark.deadline(600),
]

KGCTL = str(Path(sys.executable).with_name("kgctl"))
KEYS = Keys()
HOSTS = Path("/etc/hosts")
NO_CAPABILITY = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")


def key_of(number: int) -> str:
    return base64.b64encode(bytes([number]) * 32).decode()


def sh(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@define
class Laptop:
    """Where `kgctl connect laptop` is typed."""

    server: EtcdServer
    key: Path

    def command(self, *arguments: str) -> list[str]:
        return [KGCTL, "--endpoints", self.server.endpoint, "connect", "laptop", "--private-key", str(self.key),
                *arguments]  # fmt: skip

    def ended(self, *arguments: str, before: tuple[str, ...] = (), status: int = 1) -> str:
        """It ends by itself: what it says, but for the log."""
        done = subprocess.run([*before, *self.command(*arguments)], capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        if status == 1:
            assert done.stderr.count("\nkgctl: ") + done.stderr.startswith("kgctl: ") == 1, done.stderr
        return done.stderr if status else done.stdout


async def world(server: EtcdServer) -> None:
    node = NodeRecord(public_key=key_of(1), endpoint=Endpoint.parse("203.0.113.1:51820"))
    async with open_client(server.config()) as client:
        await client.put("/kilo/mesh/subnets", "10.4.0.0/16")
        await client.put("/kilo/by/gcp-1/addresses/10.4.0.1", "")
        await client.put(KEYS.node("gcp-1"), encode(node))


@asynccontextmanager
async def laptop(tmp_path: Path) -> AsyncIterator[Laptop]:
    require("etcd", "etcdctl", "wireguard-go", "wg", "ip", "setpriv")
    # The machine's own file is none of a test's business.
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    sh(f"mount --bind {tmp_path}/hosts /etc/hosts")
    async with EtcdServer.run() as server:
        yield Laptop(server, tmp_path / "state" / "key")


async def contents(server: EtcdServer) -> str:
    return await server.etcdctl("get", "--prefix", "/")


async def test_what_it_refuses_and_that_nothing_is_changed_then(tmp_path: Path) -> None:
    async with laptop(tmp_path) as here:
        assert "CAP_NET_ADMIN" in here.ended(before=NO_CAPABILITY)
        assert not here.key.exists()
        assert "there is no mesh under /kilo yet" in here.ended()
        assert here.key.stat().st_mode & 0o777 == 0o600
        await world(here.server)
        held = PeerRecord(public_key=key_of(9), allowed_ips=(ip_network("10.9.0.2/32"),))
        async with open_client(here.server.config()) as client:
            await client.put(KEYS.peer("laptop"), encode(held))
            assert "registered with another public key" in here.ended()
            await client.delete(KEYS.peer("laptop"))
        before = await contents(here.server)
        links = sh("ip -o link")
        assert "10.4.0.1 is claimed by node gcp-1 already" in here.ended("--allowed-ips", "10.4.0.1")
        assert "overlaps the mesh's subnet" in here.ended("--allowed-ips", "10.9.0.2,10.4.0.0/24")
        assert "nonsense" in here.ended("--allowed-ips", "nonsense", status=2)
        here.key.chmod(0o644)
        assert "is open to others" in here.ended()
        here.key.chmod(0o600)
        assert await contents(here.server) == before
        assert sh("ip -o link") == links
        sh("ip link add kilo-kilo type veth peer eth9")
        assert "the interface name kilo-kilo is taken" in here.ended()
        sh("ip link del kilo-kilo")
        printed = here.ended("--dry-run", "--dns-hosts", "--clean-up=false", status=0)
        assert "# peer laptop joins the mesh" in printed
        assert "ip route add 10.4.0.0/16 dev kilo-kilo proto 108 src 10.4." in printed
        assert await contents(here.server) == before
        assert sh("ip -o link") == links
        here.server.freeze()
        assert "127.0.0.1" in here.ended()
        here.server.thaw()
        await here.server.healthy()
        await here.server.stop()
        assert "127.0.0.1" in here.ended()


async def test_a_crash_leaves_what_the_next_run_takes_over_and_removes(tmp_path: Path) -> None:
    async with laptop(tmp_path) as here:
        await world(here.server)
        before = await contents(here.server)

        def start() -> subprocess.Popen[bytes]:
            with (tmp_path / "log").open("ab") as log:
                return subprocess.Popen(here.command("--dns-hosts"), stderr=log)

        async def connected() -> None:
            await eventually(lambda: "10.4.0.1 gcp-1.kilo gcp-1" in HOSTS.read_text(), 60, every=0.1)
            await eventually(lambda: key_of(1) in sh("wg show kilo-kilo peers"), 60, every=0.1)

        first = start()
        await connected()
        device = sh("wg show kilo-kilo public-key") + sh("ip -o link show kilo-kilo").split(":")[0]
        own = key_file.peek_public_key(here.key.parent)
        assert own is not None
        assert own in device
        first.kill()
        first.wait()
        log = tmp_path / "log"
        log.write_text("")
        second = start()
        try:
            await eventually(lambda: "connected  interface" in log.read_text(), 60, every=0.1)
            await connected()
            assert sh("wg show kilo-kilo public-key") + sh("ip -o link show kilo-kilo").split(":")[0] == device
        finally:
            second.terminate()
            status = second.wait(30)
        assert (status, "Traceback" in log.read_text()) == (0, False), log.read_text()
        assert sh("cat /etc/hosts") == "127.0.0.1 localhost\n"
        assert "kilo-kilo" not in sh("ip -o link")
        assert await contents(here.server) == before
