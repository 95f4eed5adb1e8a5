"""A lab without agents: the underlay behaves as an internet does, and the operations do what they say."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from helpers import eventually, require
from kilo_etcd.lab import HostSpec, Lab, LabError, SiteSpec, Spec, attach, running_lab, running_labs

pytestmark = [pytest.mark.lab]

SIX = Spec.simple({"gcp": 3, "dc": 3}, agents=False)
# In place of kg: something that lives, and one that does not.
SLEEPER = ("sh", "-c", "echo started $2; exec sleep infinity", "sleeper")
DYING = ("sh", "-c", "echo no key >&2; exit 3", "dying")

LISTEN = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', {port})); s.settimeout(5)\n"
ECHO = LISTEN + "print('ready', flush=True); data, who = s.recvfrom(99); print(who[0]); s.sendto(data, who)"
ASK = LISTEN + "s.settimeout({wait}); s.sendto(b'hello', ('{to}', {target})); print(s.recv(99).decode())"


@pytest.fixture(autouse=True)
def _needs() -> None:
    require("etcd", "etcdctl", "ip", "nft")


@asynccontextmanager
async def lab_of(spec: Spec) -> AsyncIterator[Lab]:
    async with running_lab(spec) as lab:
        yield lab


async def udp(lab: Lab, source: str, target: str, address: str, port: int, wait: float = 3.0) -> tuple[bool, str]:
    """Whether a datagram from source to target comes back, and from which address it came."""
    seen = ""
    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            nonlocal seen
            done = await lab.exec(target, "timeout", "4", "python3", "-c", ECHO.format(port=port))
            seen = done.stdout.replace("ready", "").strip()

        nursery.start_soon(listen)

        async def listening() -> bool:
            return f":{port} " in (await lab.exec(target, "ss", "-Huln")).stdout

        await eventually(listening)
        asked = await lab.exec(
            source, "python3", "-c", ASK.format(port=51820, wait=wait, to=address, target=port), check=False
        )
        if asked.returncode:
            nursery.cancel_scope.cancel()
    return asked.stdout.strip() == "hello", seen


async def test_the_underlay_is_an_internet_that_lets_wireguard_and_etcd_through() -> None:
    async with lab_of(SIX) as lab:
        # Within a site, everyone reaches everyone.
        assert await lab.ping("gcp-2", "10.101.0.13")
        assert await lab.ping("gcp-2", "198.51.100.1")
        # WireGuard's port between public hosts, without NAT, and from behind NAT with the router's address.
        assert await udp(lab, "gcp-1", "dc-1", "198.51.100.2", 51820) == (True, "198.51.100.1")
        assert await udp(lab, "gcp-3", "dc-1", "198.51.100.2", 51820) == (True, "203.0.113.1")
        counted = await lab.counters("gcp")
        assert counted["wireguard"].packets == 4
        assert counted["other"].packets == 0
        # Anything else is counted and dropped, at the sender's router.
        assert not await lab.ping("gcp-1", "198.51.100.2", timeout=0.3)
        before = (await lab.counters("gcp"))["other"].packets
        assert before == 1
        # Private addresses of another site do not exist on the internet.
        assert not await lab.ping("gcp-1", "10.102.0.11", timeout=0.3)
        assert (await lab.counters("dc"))["other"].packets == 0
        # etcd is reached from everywhere, by the real etcdctl, with nothing but the environment.
        assert (await lab.exec("dc-3", "etcdctl", "put", "hello", "there", check=True)).stdout == "OK\n"
        assert (await lab.etcdctl("get", "--print-value-only", "hello")).stdout == "there\n"
        assert (await lab.counters("dc"))["etcd"].packets > 0


async def test_an_open_lab_delivers_everything_and_counts_it() -> None:
    async with lab_of(Spec.simple({"gcp": 1, "dc": 1}, agents=False, open=True)) as lab:
        assert await lab.ping("gcp-1", "198.51.100.2")
        assert [(await lab.counters(site))["other"].packets for site in ("gcp", "dc")] == [2, 2]


async def test_programs_run_in_a_machine_as_on_a_host() -> None:
    async with lab_of(SIX) as lab:
        done = await lab.exec("dc-2", "sh", "-c", "hostname; cat; echo oops >&2; exit 7", input="given\n")
        assert (done.stdout, done.stderr, done.returncode) == ("dc-2\ngiven\n", "oops\n", 7)
        assert (await lab.exec("dc-2", "sh", "-c", "kill -9 $$")).returncode == -9
        assert (await lab.exec("router:dc", "hostname")).stdout == "router-dc\n"
        with pytest.raises(LabError, match="no-such-program is not installed"):
            await lab.exec("dc-2", "no-such-program")
        with pytest.raises(LabError, match="there is no 'nobody' in this lab"):
            await lab.exec("nobody", "true")
        # A program ends with whoever asked for it.
        with trio.move_on_after(0.2):
            await lab.exec("dc-2", "sleep", "1234")

        async def gone() -> bool:
            return "1234" not in (await lab.exec("dc-2", "ps", "-eo", "args")).stdout

        await eventually(gone)
        # Files outside are as they were, the state directory and /run are the host's own.
        await lab.exec("dc-2", "sh", "-c", "echo mine > /var/lib/kilo-etcd/x; echo mine > /run/x", check=True)
        assert (await lab.exec("dc-3", "ls", "/var/lib/kilo-etcd")).stdout == ""
        assert "x\n" not in (await lab.exec("dc-3", "ls", "/run")).stdout


async def test_power_off_is_sudden_and_keeps_the_disk() -> None:
    async with lab_of(SIX.evolve(agents=True, agent_command=SLEEPER)) as lab:
        await lab.exec("gcp-2", "sh", "-c", "echo kept > /var/lib/kilo-etcd/x; echo lost > /run/x", check=True)
        first = await lab.agent_pid("gcp-2")
        async with lab.probe("gcp-1", "gcp-2", address="10.101.0.12") as probe:
            await lab.power_off("gcp-2")
            assert not (await lab.host("gcp-2")).power
            assert not await lab.ping("gcp-1", "10.101.0.12", timeout=0.3)
            with pytest.raises(LabError, match="gcp-2 is powered off"):
                await lab.exec("gcp-2", "true")
            await lab.power_on("gcp-2")
            await probe.flowing_again(30, after=(await probe.peek()).duration)
        assert probe.lost > 0
        assert probe.longest_gap > 0.25
        assert (await lab.exec("gcp-2", "cat", "/var/lib/kilo-etcd/x")).stdout == "kept\n"
        assert (await lab.exec("gcp-2", "cat", "/run/x")).returncode == 1
        second = await lab.agent_pid("gcp-2")
        assert second is not None
        assert second != first


async def test_agents_are_stopped_killed_frozen_and_started() -> None:
    async with lab_of(SIX.evolve(agents=True, agent_command=SLEEPER, etcd=3)) as lab:

        async def says(text: str) -> bool:
            return (await lab.host("dc-1")).agent == text

        assert await says("running")
        await lab.freeze("dc-1")
        assert await says("frozen")
        await lab.stop("dc-1")
        assert await says("killed by SIGTERM")
        with pytest.raises(LabError, match="the agent of dc-1 does not run"):
            await lab.kill("dc-1")
        pid = await lab.start("dc-1")
        assert await lab.agent_pid("dc-1") == pid == await lab.start("dc-1")
        await lab.kill("dc-1")
        assert await says("killed by SIGKILL")
        assert "started dc-1" in await lab.log("dc-1")
        # The same for etcd: without a majority nothing is written, with one member lost all is well.
        await lab.etcd("kill", "etcd1")

        async def writes() -> bool:
            # While the two elect a leader, a put may be refused or lost.
            argv = ("--command-timeout", "3s", "--endpoints", "http://192.0.2.2:2379", "put", "a", "1")
            return (await lab.etcdctl(*argv, check=False)).returncode == 0

        await eventually(writes, 60)
        await lab.etcd("freeze", "etcd2")
        done = await lab.etcdctl(
            "--command-timeout", "1s", "--endpoints", "http://192.0.2.3:2379", "put", "a", "2", check=False
        )
        assert done.returncode != 0
        await lab.etcd("thaw", "etcd2")
        await lab.etcd("start", "etcd1")
        await lab.etcd_ready()
        assert (await lab.etcdctl("get", "--print-value-only", "a")).stdout in ("1\n", "2\n")


async def test_an_agent_that_dies_is_named_with_its_last_words() -> None:
    async with lab_of(SIX.evolve(agents=True, agent_command=DYING)) as lab:
        with pytest.raises(LabError, match=r"30 pairs do not ping: .*agent of gcp-1 exited with status 3 \(no key\)"):
            await lab.all_pairs_ping(0.5)


async def test_cuts_are_silent_and_heal() -> None:
    async with lab_of(SIX) as lab:

        async def reaches_etcd(host: str) -> bool:
            return (await lab.exec(host, "etcdctl", "--command-timeout", "1s", "get", "x")).returncode == 0

        await lab.cut("dc-2", "location")
        assert not await lab.ping("dc-2", "10.102.0.13", timeout=0.3)
        assert not await lab.ping("dc-3", "10.102.0.12", timeout=0.3)
        assert await reaches_etcd("dc-2")
        await lab.cut("dc-2", "etcd")
        assert (await lab.host("dc-2")).cuts == ("etcd", "location")
        assert not await reaches_etcd("dc-2")
        await lab.heal("dc-2")
        assert await lab.ping("dc-2", "10.102.0.13")
        assert await reaches_etcd("dc-2")
        await lab.cut_site("dc", "etcd")
        assert not await reaches_etcd("dc-2")
        assert await reaches_etcd("gcp-2")
        assert (await udp(lab, "dc-1", "gcp-1", "198.51.100.1", 51820))[0]
        await lab.heal_site("dc")
        await lab.cut_site("dc", "others")
        assert await reaches_etcd("dc-2")
        assert not (await udp(lab, "dc-1", "gcp-1", "198.51.100.1", 51820, wait=0.3))[0]
        with pytest.raises(LabError, match="cannot be cut from"):
            await lab.cut("dc-2", "gravity")


async def test_labels_are_put_by_etcdctl() -> None:
    labelled = Spec.simple({"gcp": 2, "dc": 2}, labels={"gcp": "gcp"}, agents=False)
    async with lab_of(labelled) as lab:
        assert (await lab.etcdctl("get", "--prefix", "/kilo/locations/")).stdout.split() == [
            "/kilo/locations/gcp-1", "gcp", "/kilo/locations/gcp-2", "gcp",
        ]  # fmt: skip
        await lab.label("dc-1", "--odd label")
        assert "--odd label\n" in (await lab.etcdctl("get", "/kilo/locations/dc-1")).stdout
        await lab.unlabel("dc-1")
        assert (await lab.etcdctl("get", "/kilo/locations/dc-1")).stdout == ""


async def test_a_capture_counts_what_passes_between_hosts() -> None:
    async with lab_of(SIX) as lab:
        async with lab.capture("router:gcp") as captured:
            assert await lab.ping("gcp-2", "10.101.0.13")
            assert (await udp(lab, "gcp-2", "gcp-3", "10.101.0.13", 51820))[0]
        flows = {(flow.source, flow.destination, flow.protocol, flow.destination_port): flow for flow in captured.flows}
        assert flows["10.101.0.12", "10.101.0.13", "icmp", 0].packets == 1
        assert flows["10.101.0.13", "10.101.0.12", "icmp", 0].packets == 1
        assert flows["10.101.0.12", "10.101.0.13", "udp", 51820].packets == 1
        with pytest.raises(LabError, match="nosuch in gcp-1 cannot be captured"):
            async with lab.capture("gcp-1", ["nosuch"]):
                pass


async def test_several_subnets_and_both_families() -> None:
    hosts = (HostSpec(name="a", public=True), HostSpec(name="b", subnet=1))
    one = SiteSpec(name="one", hosts=hosts, subnets=("10.20.1.0/24", "10.20.2.0/24"))
    two = SiteSpec(name="two", hosts=(HostSpec(name="c", public=True),))
    async with lab_of(Spec(sites=(one, two), families=("ipv4", "ipv6"), agents=False)) as lab:
        assert await lab.ping("a", "10.20.2.11")
        assert await lab.ping("a", "fd00:101:1::b")
        assert await lab.ping("b", "2001:db8:1::1")
        over6 = {"ETCDCTL_ENDPOINTS": "http://[2001:db8:2::1]:2379"}
        done = await lab.exec("b", "etcdctl", "put", "six", "6", env=over6)
        assert done.stdout == "OK\n"
        assert not await lab.ping("a", "2001:db8:1::2", timeout=0.3)


async def test_two_labs_at_once_but_not_with_one_name() -> None:
    small = Spec.simple({"a": 1, "b": 1}, agents=False)
    mine = f"test-{os.getpid()}"
    async with running_lab(small, mine) as one, running_lab(small) as two:
        assert {one.name, two.name} <= set(running_labs())
        await one.etcdctl("put", "only", "one")
        assert (await two.etcdctl("get", "only")).stdout == ""
        assert (await attach(mine).host("a-1")).site == "a"
        with pytest.raises(LabError, match="is running already"):
            async with running_lab(small, mine):
                pass
    with pytest.raises(LabError, match=f"no lab called '{mine}' is running"):
        attach(mine)


async def test_a_signal_to_the_agent_is_not_seen_by_the_lab() -> None:
    async with lab_of(SIX.evolve(agents=True, agent_command=SLEEPER)) as lab:
        await lab.exec("gcp-1", "sh", "-c", "kill -9 -1")

        async def killed() -> bool:
            return (await lab.host("gcp-1")).agent == f"killed by {signal.SIGKILL.name}"

        await eventually(killed, 10, every=0.05)
        assert (await lab.exec("gcp-1", "true")).returncode == 0
