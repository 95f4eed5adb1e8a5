"""IPv4, IPv6 and both, under the mesh and in it; and packets as large as the tunnels take. With real packets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import permutations
from typing import Any

import pytest
import trio

from helpers import eventually, require
from helpers_lab import candidacies, leads, records, statuses
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

BOTH = ("--subnet", "10.4.0.0/16,fd00:4::/64")
SIX = ("--subnet", "fd00:4::/64", "--encapsulate", "wireguard")


def site(name: str, *hosts: HostSpec, mtu: int = 1500, nat: str = "") -> SiteSpec:
    return SiteSpec(name=name, hosts=hosts, mtu=mtu, nat=nat)


def host(name: str, *families: str, public: bool = True) -> HostSpec:
    """At the location that its name begins with."""
    return HostSpec(name=name, public=public, label=name.partition("-")[0], families=families)


@asynccontextmanager
async def world(*sites: SiteSpec, apart: Iterable[tuple[str, str]] = (), **options: Any) -> AsyncIterator[Lab]:
    """A lab in which every ordered pair pings in each family of the mesh, but those that are `apart`."""
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip", "ping")
    async with running_lab(Spec(sites=sites, **options)) as lab:
        await reached(lab, apart)
        yield lab


async def reached(lab: Lab, apart: Iterable[tuple[str, str]] = (), deadline: float = 30) -> None:
    """Every ordered pair pings at every mesh address, but those that are `apart`, in neither direction."""
    expected = sorted({*apart, *((there, here) for here, there in apart)})

    async def as_expected() -> bool:
        return await lab.missing_pings(timeout=0.5) == expected

    await eventually(as_expected, deadline, every=0.1, what=f"pings of all pairs but {expected}")


async def errors(lab: Lab) -> dict[str, list[str]]:
    """Host -> what its agent reports in its status."""
    return {name: status.get("errors", []) for name, status in (await statuses(lab)).items()}


async def endpoints(lab: Lab, at: str) -> dict[str, str]:
    """Public key -> the endpoint that the host's WireGuard has."""
    shown = (await lab.exec(at, "wg", "show", "kilo0", "endpoints", check=True)).stdout
    return dict(line.split("\t") for line in shown.splitlines())


async def endpoint_of(lab: Lab, at: str, name: str) -> str:
    record = json.loads((await lab.etcdctl("get", "--print-value-only", f"/kilo/by/{name}/node")).stdout)
    return (await endpoints(lab, at))[record["publicKey"]]


async def mtu_of(lab: Lab, name: str, interface: str = "kilo0") -> int:
    words = (await lab.exec(name, "ip", "-o", "link", "show", interface, check=True)).stdout.split()
    return int(words[words.index("mtu") + 1])


async def full_size_packets_pass(lab: Lab, apart: Iterable[tuple[str, str]] = ()) -> None:
    """Each pair, each family: a packet as large as the sender's tunnel takes, that nobody may fragment."""
    rows = {row.host: row.mesh for row in await lab.status() if row.mesh}
    failed = []

    async def send(here: str, address: str) -> None:
        async def answered() -> bool:
            # What leaves the location does so by its leader's tunnel, which learns what the way beneath it takes.
            near = [name for name in rows if name.partition("-")[0] == here.partition("-")[0]]
            mtu = min([await mtu_of(lab, name) for name in near])
            size = mtu - (48 if ":" in address else 28)
            ping = await lab.exec(here, "ping", "-c", "1", "-W", "1", "-M", "do", "-s", str(size), address)
            return ping.returncode == 0

        try:
            await eventually(answered, 60, every=0.2, what="an answer")
        except AssertionError:
            failed.append((here, address))

    async with trio.open_nursery() as nursery:
        for here, there in permutations(rows, 2):
            if (here, there) in apart or (there, here) in apart:
                continue
            for address in rows[there]:
                nursery.start_soon(send, here, address)
    assert failed == []


async def test_a_forced_endpoint_is_used_although_packets_come_from_the_former_one() -> None:
    """The host behind NAT is only ever sent to, by one whose own agent does not follow."""
    async with world(
        site("gcp", host("gcp-1")),
        site("home", host("home-1", public=False), nat="symmetric"),
        families=("ipv4", "ipv6"),
        agent_args=BOTH,
    ) as lab:
        assert (await endpoint_of(lab, "home-1", "gcp-1")).startswith("198.51.100.")
        await lab.freeze("gcp-1")
        async with lab.probe("gcp-1", "home-1") as probe:
            for forced in ("[2001:db8:1::1]:51820", "198.51.100.1:51820", "[2001:db8:1::1]:51820"):
                await lab.etcdctl("put", "/kilo/annotations/gcp-1/force-endpoint", forced)

                async def at_both_ends(forced: str = forced) -> bool:
                    ends = [await endpoint_of(lab, *ends) for ends in permutations(("home-1", "gcp-1"))]
                    assert [end[0] == "[" for end in ends] == [forced[0] == "["] * 2, ends
                    return True

                await eventually(at_both_ends, 30, every=0.1, what=f"{forced} is in use")
                await probe.flowing_again(30, after=(await probe.peek()).duration)


async def test_check_names_a_host_whose_ipv6_is_switched_off_and_nothing_that_follows_from_it() -> None:
    async with world(
        site("gcp", host("gcp-1"), host("gcp-2", public=False)),
        site("home", host("home-1")),
        families=("ipv4", "ipv6"),
        agent_args=(*BOTH, "--encapsulate", "wireguard"),
    ) as lab:
        for name in ("gcp-1", "gcp-2"):
            sysctl = "net.ipv6.conf.all.disable_ipv6={}"
            await lab.exec(name, "sysctl", "-qw", sysctl.format(1), check=True)

            async def named(name: str = name) -> bool:
                assert (name, "home-1") in await lab.missing_pings(timeout=0.5)
                found = json.loads((await lab.kgctl("check", "-o", "json", check=False)).stdout)
                (one,) = [finding for finding in found if finding["severity"] != "note"]
                assert (one["severity"], one["subject"]) == ("error", name)
                assert "IPv6 is switched off there" in one["text"]
                return True

            await eventually(named, 60, every=0.5, what=f"one error, of {name}")
            told = await lab.kgctl("explain", name, "home-1", "--live", check=False)
            assert told.returncode == 1
            assert "IPv6 is switched off there" in told.stdout
            await lab.exec(name, "sysctl", "-qw", sysctl.format(0), check=True)
            await reached(lab)


async def test_both_families_and_hosts_of_one() -> None:
    apart = [("four-1", "six-1"), ("four-1", "six-2")]
    async with world(
        site("gcp", host("gcp-1"), host("gcp-2")),
        site("home", host("home-1", public=False), host("home-2", public=False), nat="symmetric"),
        site("four", host("four-1", "ipv4")),
        site("six", host("six-1", "ipv6"), host("six-2", "ipv6", public=False), nat="symmetric"),
        apart=apart,
        families=("ipv4", "ipv6"),
        agent_args=BOTH,
    ) as lab:
        # Who leads six is the public host; the pair without a common family is named at both ends, and nothing else is.
        said = await errors(lab)
        assert [name for name, texts in said.items() if texts] == ["four-1", "six-1"]
        assert "no common address family with node six-1" in said["four-1"][0]
        assert "no common address family with node four-1" in said["six-1"][0]
        assert "no common address family with node six-1" in await lab.log("four-1")
        assert "no common address family with node six-1" in (await lab.kgctl("status")).stdout

        leader = await leads(lab, "gcp-1", "gcp-2")
        assert (await endpoint_of(lab, "four-1", leader)).startswith("198.51.100.")
        assert (await endpoint_of(lab, "six-1", leader)).startswith("[2001:db8:1::")
        assert (await endpoint_of(lab, leader, "six-1")).startswith("[2001:db8:1::")
        for drawn in (f"[2001:db8:1::{leader[-1]}]:51820", f"198.51.100.{leader[-1]}:51820"):
            assert drawn in (await lab.kgctl("graph")).stdout
            assert drawn in (await lab.kgctl("node", "show", leader)).stdout

        # Forced to IPv6, a host is reached there by those who have it, and as before by those who have not.
        await lab.etcdctl("put", f"/kilo/annotations/{leader}/force-endpoint", f"[2001:db8:1::{leader[-1]}]:51820")

        async def moved() -> bool:
            return (await endpoint_of(lab, await leads(lab, "home-1", "home-2"), leader)).startswith("[2001:")

        await eventually(moved, 60, every=0.1, what="the forced endpoint")
        assert (await endpoint_of(lab, "four-1", leader)).startswith("198.51.100.")

        # Without leaders every host for itself: the same pairs are apart, and no others.
        for name in ("home-1", "home-2", "six-2"):  # Behind NAT, they speak first.
            await lab.etcdctl("put", f"/kilo/annotations/{name}/persistent-keepalive", "1")
        await lab.etcdctl("put", "/kilo/mesh/granularity", "cross")
        # Behind two NATs of this kind nobody finds the other.
        apart += [(home, "six-2") for home in ("home-1", "home-2")]
        await reached(lab, apart)
        await full_size_packets_pass(lab, apart)


async def test_ipv6_alone_beneath_a_mesh_of_both() -> None:
    async with world(
        site("gcp", host("gcp-1"), host("gcp-2"), mtu=1400),
        site("home", host("home-1"), host("home-2"), mtu=1400),
        families=("ipv6",),
        agent_args=BOTH,
        lease_ttl=2,
    ) as lab:
        assert await errors(lab) == {name: [] for name in lab.hosts}
        assert [await mtu_of(lab, name) for name in lab.hosts] == [1320] * 4
        await full_size_packets_pass(lab)

        # The tunnel follows its way, down to what IPv6 demands of a device, and up again.
        for mtu, expected in ((1380, 1300), (1300, 1280), (1400, 1320)):
            await lab.exec("home-1", "ip", "link", "set", "eth0", "mtu", str(mtu), check=True)

            async def followed(expected: int = expected) -> bool:
                return await mtu_of(lab, "home-1") == expected

            await eventually(followed, 60, every=0.05, what=f"an MTU of {expected}")

        gone = await leads(lab, "gcp-1", "gcp-2")
        await lab.power_off(gone)
        await lab.all_pairs_ping(30, hosts=[name for name in lab.hosts if name != gone])
        await lab.power_on(gone)
        await reached(lab)
        await lab.etcdctl("put", "/kilo/mesh/granularity", "full")
        await reached(lab)
        await full_size_packets_pass(lab)

        # By labels alone: a location and two hosts for themselves; then those a location, and a live host moves away.
        await lab.etcdctl("put", "/kilo/mesh/granularity", "location")
        for labels in ({"home-1": "home-1", "home-2": "home-2"}, {"home-1": "aws", "home-2": "aws", "gcp-2": "edge"}):
            for name, label in labels.items():
                await lab.etcdctl("put", f"/kilo/locations/{name}", label)
            await reached(lab)


async def test_an_ipv6_mesh_over_ipv4_alone_and_an_mtu_that_is_too_small_for_it() -> None:
    small = HostSpec(name="dsl-2", public=True, label="dsl", args=("--mtu", "1279"))
    async with running_lab(
        Spec(
            sites=(site("gcp", host("gcp-1"), host("gcp-2")), site("dsl", host("dsl-1"), small, mtu=1400)),
            agent_args=SIX,
        )
    ) as lab:
        # Over IPv4 alone, IPv6 packets find no way inside a location but the tunnel.
        three = ["gcp-1", "gcp-2", "dsl-1"]
        await lab.all_pairs_ping(30, hosts=three)

        async def refused() -> bool:
            return "--mtu 1279 is too small" in await lab.log("dsl-2")

        await eventually(refused, 60, every=0.1, what="the refusal")

        async def gone() -> bool:
            return await lab.agent_pid("dsl-2") is None

        await eventually(gone, 30, every=0.1, what="the end of the agent that refused")
        await full_size_packets_pass(lab, [("dsl-2", name) for name in three])
        shown = (await lab.kgctl("graph")).stdout
        assert "fd00:4::" in shown
        assert "10.4." not in shown
        assert "dsl-2" not in shown


async def test_a_leader_that_loses_ipv6_gives_way_to_one_that_has_it_and_is_last_in_line_when_it_has_it_again() -> None:
    sites = (site("gcp", host("gcp-1"), host("gcp-2")), site("home", host("home-1"), host("home-2")))
    async with world(*sites, families=("ipv4", "ipv6"), agent_args=BOTH) as lab:

        async def both_stand() -> bool:
            return len(await candidacies(lab, "home")) == 2

        await eventually(both_stand, 30, what="both candidacies")
        lost = await leads(lab, "home-1", "home-2")
        other = {"home-1": "home-2", "home-2": "home-1"}[lost]
        six = next(text for text in (await records(lab))[lost]["internalIPs"] if ":" in text)
        gateway = (await lab.exec(lost, "ip", "-6", "route", "show", "default", check=True)).stdout.split()[2]
        await lab.exec(lost, "sysctl", "-w", "net.ipv6.conf.all.disable_ipv6=1", check=True)

        async def gave_way() -> bool:
            rest = [pair for pair in await lab.missing_pings(timeout=0.5) if lost not in pair]
            return list(await candidacies(lab, "home")) == [other] and not rest

        await eventually(gave_way, 30, every=0.1, what=f"{other} leads, and all others reach each other")
        assert f"{other} serves IPv6 in this location, and this host does not" in await lab.log(lost)

        await lab.exec(lost, "sysctl", "-w", "net.ipv6.conf.all.disable_ipv6=0", check=True)
        await lab.exec(lost, "ip", "address", "add", six, "dev", "eth0", "nodad", check=True)
        await lab.exec(lost, "ip", "-6", "route", "replace", "default", "via", gateway, "dev", "eth0", check=True)
        await reached(lab)
        await eventually(both_stand, 30, what="both candidacies again")
        assert list(await candidacies(lab, "home")) == [other, lost]


async def test_hosts_without_ipv6_are_in_line_behind_a_leader_that_has_it_and_lead_if_it_does_not_forward() -> None:
    """The lease is so long that only probers can have noticed."""
    gcp = (host("gcp-1", "ipv4"), host("gcp-2"), host("gcp-3", "ipv4"))
    async with running_lab(
        Spec(
            sites=(site("gcp", *gcp), site("home", host("home-1"))),
            families=("ipv4", "ipv6"),
            agent_args=BOTH,
            lease_ttl=90,
        )
    ) as lab:

        async def in_line() -> bool:
            line = list(await candidacies(lab, "gcp"))
            return len(line) == 3 and line[0] == "gcp-2"

        await eventually(in_line, 30, every=0.1, what="gcp-2 leads, and the others are in line")

        async with lab.probe("gcp-1", "home-1") as probe:
            await probe.flowing_again(30, after=0)
            await lab.cut("gcp-2", "port")
            await probe.flowing_again(60, after=(await probe.peek()).duration)
        assert await leads(lab, "gcp-1", "gcp-3") != "gcp-2"
