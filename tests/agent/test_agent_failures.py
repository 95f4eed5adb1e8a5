"""Failures of one host, with a real `kg` in namespaces of its own and a real etcd: what it says, what it leaves.

Each sentence here is also in docs/troubleshooting.md, or ought to be.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from attrs import define

from helpers import eventually, require
from kilo_etcd.etcd.api import Full
from kilo_etcd.etcd.client import open_client
from kilo_etcd.model import CandidateClass, Endpoint
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, NodeRecord, encode
from kilo_etcd.store.session.session import Session
from kilo_etcd.testing.certificates import Authority
from kilo_etcd.testing.etcd_server import EtcdServer, ServerOptions

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.usefixtures("own_namespaces")]

BIN = Path(sys.executable).parent
KGCTL = shlex.quote(str(BIN / "kgctl"))
KEYS = ("AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=", "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=")
READY = "leader elected|this host is a segment"
NO_CAPABILITY = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")


def sh(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@define
class Agent:
    """A `kg` that runs."""

    process: subprocess.Popen[bytes]
    journal: Path

    def log(self) -> str:
        text = self.journal.read_text()
        assert "Traceback" not in text, text
        return text

    def logged(self, sentence: str) -> int:
        return self.log().count(sentence)


@define
class Host:
    """The host h1, on which things go wrong."""

    server: EtcdServer
    directory: Path
    runs: int = 0

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def command(self, *arguments: str) -> list[str]:
        return [
            str(BIN / "kg"), "--hostname", "h1", "--state-dir", str(self.state), "--endpoints", self.server.endpoint,
            *arguments,
        ]  # fmt: skip

    def refused(self, *arguments: str, before: tuple[str, ...] = (), status: int = 1) -> str:
        """`kg` ends by itself; its last word, which is one sentence."""
        done = subprocess.run([*before, *self.command(*arguments)], capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr
        *log, sentence = done.stderr.splitlines()
        assert done.returncode == status, done.stderr
        begin = re.match("kg: " if status == 1 else "kg: |Error: ", sentence)
        assert begin is not None, done.stderr
        assert not any(line.startswith(begin[0]) for line in log), done.stderr
        return sentence.removeprefix(begin[0])

    @asynccontextmanager
    async def agent(self, *arguments: str, ready: str = READY) -> AsyncIterator[Agent]:
        """`kg` runs in the block, and has said `ready` (a pattern)."""
        self.runs += 1
        journal = self.directory / f"log-{self.runs}"
        with journal.open("wb") as log:
            process = subprocess.Popen(self.command(*arguments), stdout=log, stderr=log)  # noqa: ASYNC220
        agent = Agent(process, journal)
        try:
            await eventually(lambda: re.search(ready, agent.log()), 60, what=f"{arguments} said {ready!r}")
            yield agent
            assert process.poll() is None, agent.log()
        except AssertionError as error:
            error.add_note(journal.read_text())
            raise
        finally:
            process.terminate()
            process.wait(10)

    async def settled(self, *errors: str) -> None:
        """Until h1 reports these errors (patterns), in this order, and no others."""

        async def reported() -> bool:
            status = await self.etcdctl("get", "--print-value-only", "/kilo-status/by/h1/status")
            found = json.loads(status).get("errors", [])
            assert len(found) == len(errors), found
            assert all(re.search(pattern, text) for pattern, text in zip(errors, found, strict=True)), found
            return True

        await eventually(reported, 10, every=0.1)

    async def etcdctl(self, *arguments: str) -> str:
        return await self.server.etcdctl(*arguments)

    async def add_node(self, name: str, number: int, location: str) -> None:
        record = {
            "publicKey": KEYS[number - 2],
            "endpoint": f"192.0.2.{number}:51820",
            "internalIPs": [f"192.0.2.{number}/24"],
        }
        await self.etcdctl("put", f"/kilo/by/{name}/node", json.dumps(record))
        await self.etcdctl("put", f"/kilo/by/{name}/addresses/10.4.0.{number}", "")
        await self.etcdctl("put", f"/kilo/locations/{name}", location)


def health() -> tuple[int, str]:
    try:
        with urllib.request.urlopen("http://127.0.0.1:1107/health", timeout=30) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as answer:
        with closing(answer):
            return answer.code, answer.read().decode().strip()


@asynccontextmanager
async def host(directory: Path, options: ServerOptions | None = None) -> AsyncIterator[Host]:
    require("etcd", "etcdctl", "wireguard-go", "wg", "ip", "setpriv")
    sh(
        "ip link add eth0 type veth peer name eth1 && ip link set eth0 up && ip link set eth1 up && "
        "ip address add 192.0.2.1/24 dev eth0"
    )
    async with EtcdServer.run(options) as server:
        yield Host(server, directory)


async def test_a_host_that_cannot_take_part_says_why_and_is_never_registered(tmp_path: Path) -> None:
    async with host(tmp_path) as h1:
        sh("ip link add kilo0 type veth peer name other")
        before = sh("ip -o link; ip -o -4 address")
        assert h1.refused() == (
            "the interface name kilo0 is taken by a device that is not ours (veth): "
            "choose another name with --interface, or remove it with `ip link del kilo0`"
        )
        assert sh("ip -o link; ip -o -4 address") == before
        sh("ip link del kilo0")
        assert h1.refused(before=NO_CAPABILITY) == (
            "kilo0 cannot be set up: this process lacks the capability CAP_NET_ADMIN, without which no process "
            "may change the network: run it as root (sudo), or grant it (systemd unit: "
            "AmbientCapabilities=CAP_NET_ADMIN; "
            "container: --cap-add NET_ADMIN)"
        )
        assert h1.refused("--wireguard", "userspace", "--userspace-command", "no-wireguard-go") == (
            "this kernel has no WireGuard and no-wireguard-go is not installed: install it "
            "(Debian: apt install wireguard-go), or load the module wireguard"
        )
        empty = tmp_path / "empty"
        empty.touch()
        sh(f"mount --bind {empty} /dev/net/tun && chmod 0 /dev/net/tun && mount -o remount,bind,ro /dev/net/tun")
        assert h1.refused("--wireguard", "userspace") == (
            "wireguard-go cannot make kilo0, since /dev/net/tun cannot be opened (Read-only file system): load the "
            "module tun (modprobe tun), or let the agent have it (systemd unit: DeviceAllow=/dev/net/tun rw; "
            "container: --device /dev/net/tun)"
        )
        sh("umount /dev/net/tun")
        assert await h1.etcdctl("get", "--prefix", "/kilo", "--keys-only") == ""


async def test_a_wireguard_device_of_the_operators_keeps_its_key_and_peers(tmp_path: Path) -> None:
    async with host(tmp_path) as h1:
        sh("wireguard-go kilo0")
        sh(
            f"wg genkey > {tmp_path}/theirs && wg set kilo0 private-key {tmp_path}/theirs peer {KEYS[0]} "
            "allowed-ips 10.9.0.0/16 && ip address add 10.9.0.1/24 dev kilo0"
        )
        before = sh("wg showconf kilo0; ip -o address show dev kilo0")
        key = sh("wg show kilo0 public-key").strip()
        assert h1.refused() == (
            f"the interface name kilo0 is taken by a device that is not ours (a WireGuard device of another program, "
            f"with public key {key}): choose another name with --interface, or remove it with `ip link del kilo0`"
        )
        sh(shlex.join([*h1.command(), "cleanup"]))
        assert sh("wg showconf kilo0; ip -o address show dev kilo0") == before
        async with h1.agent("--interface", "kilo1"):
            # Ours, although the host has got another key meanwhile: our routes lead there.
            pass
        (h1.state / "key").unlink()
        async with h1.agent("--interface", "kilo1", "--hostname", "h1b"):
            assert sh("wg show kilo1 public-key") != key
        assert sh("wg showconf kilo0; ip -o address show dev kilo0") == before


async def test_ports_that_are_taken_are_reported_and_used_once_they_are_free(tmp_path: Path) -> None:
    async with host(tmp_path) as h1:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp = socket.create_server(("127.0.0.1", 1107))
        with tcp, udp:
            udp.bind(("0.0.0.0", 51820))
            taken = r"UDP port 51820 is taken by another program \(see `ss -lunp sport = :51820`\): end that"
            unheard = (
                r"metrics and health are not served, since 127.0.0.1:1107 cannot be listened on "
                r"\(Address already in use\): choose another address with --listen"
            )
            async with h1.agent("--resync-period", "1s") as agent:
                await h1.settled(taken, unheard)
                assert agent.logged("UDP port 51820 is taken") == agent.logged("cannot be listened on") == 1
                udp.close()
                await h1.settled(unheard)
                assert sh("wg show kilo0 listen-port") == "51820\n"
                assert agent.logged("no longer: UDP port 51820") == 1
        async with h1.agent("--listen", "127.0.0.1:1107"):
            await h1.settled()
            assert health() == (200, "ok")


async def test_what_the_operator_has_on_the_host_is_left_alone_and_reported_until_it_goes(tmp_path: Path) -> None:
    async with host(tmp_path) as h1:
        await h1.add_node("n2", 2, "b")
        sh("ip route add 10.4.0.0/16 dev eth1")
        collision = (
            r"already has a route to 10.4.0.0/16 that is not ours; it was left alone .* `ip route show 10.4.0.0/16`"
        )
        async with h1.agent("--resync-period", "1s") as agent:
            await h1.settled(collision)
            assert re.search(collision, health()[1])
            assert re.search(collision, sh(f"{KGCTL} --endpoints {h1.server.endpoint} status"))
            assert "dev kilo0" not in sh("ip route show 10.4.0.0/16")
            sh("ip route del 10.4.0.0/16 dev eth1")
            await h1.settled()
            await eventually(lambda: health() == (200, "ok"))
            assert "dev kilo0 proto 107" in sh("ip route show 10.4.0.0/16")
            # A part of the mesh's subnet, by a route and by an address.
            sh("ip route add 10.4.7.0/24 dev eth1")
            await h1.settled(r"own route to 10.4.7.0/24 lies within the mesh's subnet 10.4.0.0/16; it was left alone")
            sh("ip route del 10.4.7.0/24 dev eth1")
            await h1.settled()
            sh("ip address add 10.4.0.2/24 dev eth1")
            await h1.settled(r"eth1 has the address 10.4.0.2/24, whose network overlaps the mesh's subnet 10.4.0.0/16")
            sh("ip address del 10.4.0.2/24 dev eth1")
            await h1.settled()
            for obstacle in ("that is not ours", "lies within the mesh's subnet", "overlaps the mesh's subnet"):
                assert agent.logged(obstacle) == 2, "once when it came, once when it went"


async def test_a_name_that_is_taken_while_the_agent_runs_is_reported_until_it_is_free(tmp_path: Path) -> None:
    async with host(tmp_path) as h1, h1.agent("--resync-period", "1s") as agent:
        # The agent would be the quicker one.
        agent.process.send_signal(signal.SIGSTOP)
        sh("ip link del kilo0 && ip link add kilo0 type veth peer name other")
        agent.process.send_signal(signal.SIGCONT)
        taken = r"the interface name kilo0 is taken by a device that is not ours \(veth\)"
        await h1.settled(taken)
        assert re.match(taken, health()[1])
        assert agent.logged("kernel cannot be programmed; trying again") == 1
        sh("ip link del kilo0")
        await h1.settled()
        await eventually(lambda: health() == (200, "ok"))
        assert "10.4.0.0/16 dev kilo0 proto 107" in sh("ip route")


async def test_a_host_that_cannot_forward_goes_on_as_a_member(tmp_path: Path) -> None:
    async with host(tmp_path) as h1:
        await h1.add_node("n2", 2, "b")
        await h1.add_node("n3", 3, "a")
        await h1.etcdctl("put", "/kilo/locations/h1", "a")
        await h1.etcdctl("put", "/kilo/annotations/h1/leader", "true")
        offer = encode(CandidateRecord(rank=CandidateClass.PUBLIC)).decode()
        lease = (await h1.etcdctl("lease", "grant", "3600")).split()[1]
        await h1.etcdctl("put", "--lease", lease, "/kilo/by/n3/elections/a", offer)
        sh("sysctl -q -w net.ipv4.ip_forward=0; mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys")
        wrong = (
            r"net.ipv4.ip_forward could not be set to 1 \(/proc/sys is read-only\): "
            r"set it on the host with `sysctl -w net.ipv4.ip_forward=1`; in a container with a network of its own "
            r"have the container manager set it \(docker run --sysctl net.ipv4.ip_forward=1\), or make /proc/sys "
            r"writable there"
        )
        # There is no n3, so it would not answer.
        async with h1.agent(
            "--internal-cidr", "192.0.2.0/24", "--resync-period", "1s", "--probe", "off"
        ) as agent:  # fmt: skip
            await h1.settled(wrong)
            assert re.search(wrong, health()[1])
            assert "via 192.0.2.3" in sh("ip route show 10.4.0.0/16")
            assert await h1.etcdctl("get", "--prefix", "/kilo/by/h1/elections/a", "--keys-only") == ""
            assert agent.logged("could not be set") == 1
            sh("umount /proc/sys")
            await h1.settled()
            # Able now, and wanted: it leads.
            await eventually(lambda: agent.logged("leader=h1"), 60)
            assert "dev kilo0" in sh("ip route show 10.4.0.0/16")


async def test_a_key_that_is_of_no_use_is_never_overwritten(tmp_path: Path) -> None:
    async with host(tmp_path) as h1:
        h1.state.mkdir()
        key = h1.state / "key"
        none = f"the private key file {key} holds no WireGuard private key"
        for text, mode, sentence in (
            (
                KEYS[0],
                0o644,
                rf"the private key {key} is open to others \(mode 0644\); run chmod 600 {key}; if others ",
            ),
            ("no key", 0o600, rf"{none} .*put the right one back, or stop what uses it .*, remove it, and start "),
            ("", 0o600, none),
        ):
            key.write_text(text)
            key.chmod(mode)
            assert re.match(sentence, h1.refused(status=2))
            assert (key.read_text(), key.stat().st_mode & 0o777) == (text, mode)
        key.unlink()
        sh(f"mount -t tmpfs -o size=4k tmpfs {h1.state} && head -c 4096 /dev/zero > {h1.state}/full")
        assert h1.refused() == (
            f"the private key cannot be written to {h1.state}: No space left on device; "
            "make room there or choose another with --state-dir"
        )
        assert [path.name for path in h1.state.iterdir()] == ["full"]
        sh(f"mount -o remount,ro {h1.state}")
        assert h1.refused() == (
            f"the private key cannot be written to {h1.state}: Read-only file system; "
            "make the directory writable or choose another with --state-dir"
        )
        assert await h1.etcdctl("get", "--prefix", "/kilo", "--keys-only") == ""


async def test_an_etcd_that_is_not_there_or_refuses(tmp_path: Path) -> None:
    async with host(tmp_path) as h1:
        assert h1.refused("--endpoints", "ftp://x:2379", status=2) == (
            "Invalid value for --endpoints (ETCDCTL_ENDPOINTS): 'ftp://x:2379' is no etcd endpoint; "
            "write host:port, http://host:port or https://host:port"
        )
        nobody = "127.0.0.1:1"
        async with h1.agent("--endpoints", nobody, "--command-timeout", "1s", ready="etcd is out of reach") as agent:
            assert "cannot reach etcd at http://127.0.0.1:1: connection refused (is etcd running there?)" in agent.log()
            assert health() == (
                503,
                "waiting for etcd: etcd is out of reach: cannot reach etcd at http://127.0.0.1:1: "
                "connection refused (is etcd running there?)",
            )
        await h1.server.enable_auth({"h1": ("secret", ["/elsewhere"])})
        assert re.search(r"has authentication on: give a user and password \(--user\)$", h1.refused())
        assert re.search(r"refused user 'h1': wrong password .* check --user$", h1.refused("--user", "h1:guess"))
        await h1.etcdctl("role", "grant-permission", "h1", "--prefix=true", "read", "/kilo")
        assert re.search(
            r"user 'h1' may not .* on '/kilo/mesh/granularity' in etcd at http://127.0.0.1:\d+: "
            r"grant it with etcdctl role grant-permission",
            h1.refused("--user", "h1:secret"),
        )
        # The first agent of a mesh needs its settings, or to write them; all else are its own keys.
        for prefix in ("/kilo/mesh/", "/kilo/by/h1/", "/kilo-status/by/h1/"):
            await h1.etcdctl("role", "grant-permission", "h1", "--prefix=true", "readwrite", prefix)
        async with h1.agent("--user", "h1:secret") as agent:
            assert "may not" not in agent.log()
        await h1.etcdctl("role", "revoke-permission", "h1", "--prefix=true", "/kilo/mesh/")
        async with h1.agent("--user", "h1:secret", "--clean-up") as agent:
            await h1.settled()
        assert "may not" not in agent.log()
        left = await h1.etcdctl("get", "--prefix", "/kilo", "--keys-only")
        assert left.split() == ["/kilo/mesh/granularity", "/kilo/mesh/internal-ips", "/kilo/mesh/subnets"]


def refused_as(sentence: str) -> bool:
    status, text = health()
    return status == 503 and re.match(sentence, text) is not None


async def test_health_says_what_etcd_refuses_while_the_agent_runs(tmp_path: Path) -> None:
    async with host(tmp_path) as h1:
        await h1.server.enable_auth({"h1": ("secret", ["/kilo"])})
        await h1.etcdctl("role", "grant-permission", "h1", "--prefix=true", "readwrite", "/kilo")
        async with h1.agent("--user", "h1:secret", "--command-timeout", "2s") as agent:
            await h1.settled()
            for refuse, allow, sentence in (
                (("role", "revoke-permission", "h1", "--prefix=true", "/kilo"),
                 ("role", "grant-permission", "h1", "--prefix=true", "readwrite", "/kilo"),
                 r"etcd denies permission: user 'h1' may not .*: grant it with etcdctl role grant-permission; "),
                (("user", "delete", "h1"), None,
                 r"etcd does not let this host in: .* refused user 'h1': wrong password or no such user; check --user"),
            ):  # fmt: skip
                await h1.etcdctl(*refuse)
                await eventually(partial(refused_as, sentence), 30)
                assert "out of reach" not in health()[1]
                assert health()[1].endswith("; forwarding goes on by the last plan")
                if allow is not None:
                    await h1.etcdctl(*allow)
                    await eventually(lambda: health() == (200, "ok"), 30)
            assert "etcd denies permission; the last snapshot stays" in agent.log()
            assert "etcd does not let this host in; the last snapshot stays" in agent.log()


async def test_an_etcd_that_speaks_tls_to_those_it_knows(tmp_path: Path) -> None:
    async with host(tmp_path, ServerOptions(client_cert=True)) as h1:
        assert h1.server.authority is not None
        ca, known = str(h1.server.authority.ca), h1.server.authority.issue("h1")
        other = Authority(tmp_path / "other", "another CA")
        stranger = other.issue("h1")
        url = h1.server.endpoint
        for arguments, sentence in (
            (("--cacert", str(other.ca)), "its certificate is not trusted (unable to get local issuer certificate); "
             "check --cacert"),
            (("--cacert", ca, "--cert", str(stranger.cert), "--key", str(stranger.key)),
             "it refuses the client certificate, or wants one; check --cert (has it expired?) and --key"),
        ):  # fmt: skip
            assert h1.refused(*arguments) == f"cannot talk to etcd at {url}: {sentence}"
        sound = ("--cacert", ca, "--cert", str(known.cert), "--key", str(known.key))
        async with h1.agent(*sound):
            pass
        plain = url.replace("https", "http")
        async with h1.agent(
            *sound, "--endpoints", plain, "--command-timeout", "1s", ready="etcd is out of reach"
        ) as agent:
            assert "if it speaks TLS, write the endpoint with https://" in agent.log()


async def test_an_etcd_that_lost_its_data_is_not_followed_and_health_says_so(tmp_path: Path) -> None:
    async with host(tmp_path) as h1:
        await h1.add_node("n2", 2, "b")
        async with h1.agent("--resync-period", "1s") as agent:
            peers = sh("wg show kilo0 peers")
            assert peers
            await h1.server.kill()
            sh(f"rm -rf {h1.server.directory / h1.server.name}")
            await h1.server.start(initial=True)
            lost = r"etcd (is another cluster now|went back in time)"
            await eventually(lambda: re.search(lost, health()[1]), 60)
            assert health()[0] == 503
            assert len(re.findall(lost, agent.log())) == 1
            assert sh("wg show kilo0 peers") == peers
        # Nor by an agent that starts now, on a host that has lost all it had: it knows by its disk.
        sh("ip link del kilo0; ip route flush proto 107")
        async with h1.agent(ready="etcd is not trusted: the cached snapshot is in force") as agent:
            await eventually(lambda: sh("wg show kilo0 peers") == peers)
            assert health()[0] == 503
            assert "kgctl mesh adopt" in health()[1]
            assert len(re.findall(lost, agent.log())) == 1
            assert await h1.etcdctl("get", "--prefix", "/kilo", "--keys-only") == ""
            sh(f"{KGCTL} --endpoints {h1.server.endpoint} mesh adopt --yes")
            await eventually(lambda: health() == (200, "ok") and not sh("wg show kilo0 peers"), 60)
            assert "/kilo/by/h1/node" in await h1.etcdctl("get", "--prefix", "/kilo", "--keys-only")


async def test_a_host_boots_into_its_cached_snapshot_while_etcd_is_away(tmp_path: Path) -> None:
    def on_the_host() -> str:
        return sh("wg show kilo0 allowed-ips; ip -br -4 address show dev kilo0; ip route show proto 107")

    async with host(tmp_path) as h1:
        await h1.add_node("n2", 2, "b")
        async with h1.agent():
            await eventually(lambda: KEYS[0] in on_the_host() and health() == (200, "ok"))
            before = on_the_host()
            assert "10.4.0.0/16 dev kilo0" in before
        kept = h1.state / "mesh.jsonl.gz"
        assert kept.stat().st_mode & 0o777 == 0o600
        # What a reboot leaves.
        sh("ip link del kilo0; ip route flush proto 107")
        await h1.server.kill()
        bridged = "etcd is out of reach: the cached snapshot is in force"
        async with h1.agent("--command-timeout", "1s", ready=bridged) as agent:
            await eventually(lambda: on_the_host() == before)
            await eventually(lambda: "the cached snapshot is in force" in health()[1])
            assert health()[0] == 503
            assert agent.logged(bridged) == 1
            await h1.server.start()
            await eventually(lambda: health() == (200, "ok"), 60)
            assert agent.logged("this host has joined again") == 1
            await h1.add_node("n3", 3, "c")
            await eventually(lambda: KEYS[1] in on_the_host())
        sh(shlex.join([*h1.command(), "cleanup"]))
        assert [path.name for path in h1.state.iterdir()] == ["key"]


async def test_a_host_boots_into_its_cached_snapshot_while_etcd_refuses_its_certificate_or_its_user(
    tmp_path: Path,
) -> None:
    def reboot() -> None:
        sh("ip link del kilo0; ip route flush proto 107")

    async with host(tmp_path, ServerOptions(client_cert=True)) as h1:
        authority = h1.server.authority
        assert authority is not None
        known = authority.issue("h1")
        await h1.add_node("n2", 2, "b")
        options = ["--cacert", str(authority.ca), "--cert", str(known.cert), "--key", str(known.key)]
        async with h1.agent(*options):
            await eventually(lambda: sh("wg show kilo0 peers"))
            peers = sh("wg show kilo0 peers")
        reboot()
        authority.issue("h1", seconds=-60)
        async with h1.agent(*options, ready="TLS with etcd fails: the cached snapshot is in force") as agent:
            await eventually(lambda: sh("wg show kilo0 peers") == peers)
            await eventually(
                partial(refused_as, r"TLS with etcd fails; the cached snapshot is in force \(age .*expired")
            )
            authority.issue("h1")
            await eventually(lambda: health() == (200, "ok"), 60)
            assert agent.logged("this host has joined again") == 1
        # The user is removed, and given back.
        await h1.server.enable_auth({"h1": ("secret", ["/kilo"])})
        options += ["--user", "h1:secret", "--command-timeout", "2s"]
        await h1.etcdctl("user", "delete", "h1")
        reboot()
        async with h1.agent(*options, ready="etcd does not let this host in: the cached snapshot is in force") as agent:
            await eventually(lambda: sh("wg show kilo0 peers") == peers)
            await h1.etcdctl("user", "add", "h1:secret")
            # Its role is not there yet.
            await eventually(partial(refused_as, "etcd denies permission; the cached snapshot is in force"), 90)
            await h1.etcdctl("user", "grant-role", "h1", "h1")
            await eventually(lambda: health() == (200, "ok"), 60)
            assert agent.logged("this host has joined again") == 1


async def test_a_host_that_boots_follows_an_etcd_that_is_full(tmp_path: Path) -> None:
    async with host(tmp_path, ServerOptions(arguments=("--quota-backend-bytes", "2000000"))) as h1:
        await h1.add_node("n2", 2, "b")
        async with h1.agent("--lease-ttl", "2s"):
            await eventually(lambda: KEYS[0] in sh("wg show kilo0 peers"))
        sh("ip link del kilo0; ip route flush proto 107")
        async with open_client(h1.server.config()) as client:
            with suppress(Full):
                for number in range(1000):
                    await client.put(f"/elsewhere/{number}", b"x" * 100_000)
            async with h1.agent("--lease-ttl", "2s", ready="etcd takes no writes: the cached snapshot") as agent:
                await eventually(lambda: KEYS[0] in sh("wg show kilo0 peers"))
                await eventually(partial(refused_as, "etcd takes no writes, so this host has not joined again; .*full"))
                # What goes, which a full etcd allows, is followed.
                await h1.etcdctl("del", "/kilo/by/n2/node")
                await eventually(lambda: not sh("wg show kilo0 peers"))
                revision = (await client.delete_prefix("/elsewhere")).header.revision
                await client.compact(revision)
                await h1.etcdctl("defrag")
                await h1.etcdctl("alarm", "disarm")
                await eventually(lambda: health() == (200, "ok"), 60)
                assert agent.logged("this host has joined again") == 1


async def test_a_second_host_of_the_name_of_a_living_one_is_refused(tmp_path: Path) -> None:
    async with host(tmp_path) as h1, open_client(h1.server.config()) as client:
        living = Session(client, Keys("/kilo"), "h1", KEYS[0])
        await living.register(NodeRecord(public_key=KEYS[0], endpoint=Endpoint.parse("192.0.2.77:51820")))
        async with trio.open_nursery() as nursery:
            await nursery.start(living.run)
            # Its agent may be on its last few seconds, so the second one looks for the length of a lease.
            sentence = await trio.to_thread.run_sync(h1.refused, "--lease-ttl", "2s")
            nursery.cancel_scope.cancel()
        assert sentence == (
            f"the name h1 is taken by a living host with public key {KEYS[0]} at 192.0.2.77:51820; "
            "stop the agent there or give this host another name with --hostname"
        )
        # It stops, and nothing is left of it but its record.
        await living.resign()
        async with h1.agent(ready="registered"):
            pass
