"""Hosts behind NATs of three kinds, with real packets: who meets whom, who does not and says so; a phone that roams."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest

from helpers import eventually, require
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec
from kilo_etcd.model import Granularity

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

KEEPALIVE = ("--persistent-keepalive", "5")
KINDS = {"cone": "full-cone", "port": "port-restricted", "sym": "symmetric"}
DIRECT = {
    ("cone", "cone"): True,
    ("cone", "port"): True,
    ("cone", "sym"): True,
    ("port", "port"): True,
    ("port", "sym"): False,
    ("sym", "sym"): False,
}
"""Kind and kind of NAT -> whether two hosts behind such meet."""


def home(name: str, *more: HostSpec) -> SiteSpec:
    """A host behind the NAT that its name begins with; nothing is public but `more`."""
    return SiteSpec(name=name, nat=KINDS[name[:-1]], hosts=(HostSpec(name=name, label=name, args=KEEPALIVE), *more))


def hub(*names: str) -> SiteSpec:
    return SiteSpec(name="hub", hosts=tuple(HostSpec(name=name, public=True, label=name) for name in names))


async def missing(lab: Lab) -> set[tuple[str, str]]:
    return {(min(pair), max(pair)) for pair in await lab.missing_pings(timeout=0.5)}


async def traversal_failures(lab: Lab) -> set[tuple[str, str]]:
    """(host, the other) for all that agents report of hosts that they do not meet."""
    report = json.loads((await lab.kgctl("status", "-o", "json")).stdout)
    said = [(remark["subject"], re.match(r"no tunnel to node (\S+): it and \S+ are both behind NAT", remark["text"]))
            for remark in report["errors"]]  # fmt: skip
    assert all(match for _, match in said), report["errors"]
    return {(subject, match[1]) for subject, match in said if match}


async def writes(lab: Lab, host: str) -> list[float]:
    """How often the host's agent has written to etcd and to the kernel so far."""
    get = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:1107/metrics').read().decode())"
    text = (await lab.exec(host, sys.executable, "-c", get, check=True)).stdout
    counters = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("kilo_"))
    return [float(counters[name]) for name in ("kilo_etcd_writes_total", "kilo_netlink_writes_total")]


async def test_which_nats_let_hosts_meet_and_what_becomes_of_the_others() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip")
    hidden = [f"{kind}{number}" for kind in KINDS for number in (1, 2)]
    door = HostSpec(name="door", public=True, label="sym2")
    sites = [home(name, *([door] if name == "sym2" else [])) for name in hidden]
    apart = {pair for pair in combinations(sorted(hidden), 2) if not DIRECT[pair[0][:-1], pair[1][:-1]]}
    assert len(apart) == 5
    async with running_lab(
        Spec(sites=(hub("hub-1", "hub-2"), *sites), granularity=Granularity.FULL, agent_args=("--resync-period", "10s"))
    ) as lab:

        async def as_the_table_says() -> bool:
            return await missing(lab) == apart

        await eventually(as_the_table_says, 60, every=0.2, what=f"all pairs but {sorted(apart)}")

        async def both_ends_say_so() -> bool:
            return await traversal_failures(lab) == apart | {(there, here) for here, there in apart}

        await eventually(both_ends_say_so, 60, every=0.5, what="a word on each of them, from both ends")

        # Nothing more is to be told: nobody writes anything, although keepalives and attempts go on.
        before = {name: await writes(lab, name) for name in lab.hosts}
        for _ in range(5):
            assert await missing(lab) == apart
        explained = await lab.kgctl("explain", "port1", "sym1", check=False)
        assert "no tunnel to node sym1" in explained.stdout
        assert "force-endpoint" in explained.stdout
        hopeless = await lab.kgctl("explain", "sym1", "sym2", check=False)
        assert hopeless.returncode == 1
        assert "each partner another port" in hopeless.stdout
        assert {name: await writes(lab, name) for name in lab.hosts} == before

        # A location's public leader carries the one who meets nobody.
        await lab.etcdctl("put", "/kilo/mesh/granularity", "location")
        rest = {pair for pair in apart if "sym2" not in pair}

        async def carried() -> bool:
            return await missing(lab) == rest

        await eventually(carried, 30, every=0.2, what=f"all pairs but {sorted(rest)}")


async def test_a_phone_that_roams_keeps_its_session_and_others_learn_where_it_is() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip")
    cafe = SiteSpec(name="cafe", nat="port-restricted", hosts=(HostSpec(name="phone"),))
    async with running_lab(
        Spec(sites=(hub("hub-1", "hub-2"), home("cone1"), cafe), granularity=Granularity.FULL)
    ) as lab:
        await lab.all_pairs_ping(30, hosts=["hub-1", "hub-2", "cone1"])
        # The host in the café has no agent any more: it is the phone.
        await lab.stop("phone")
        kg = str(Path(sys.executable).parent / "kg")
        await lab.exec("phone", kg, "--hostname", "phone", "--state-dir", "/var/lib/kilo-etcd", "cleanup", check=True)
        added = await lab.kgctl(
            "peer", "add", "phone", "--allowed-ips", "10.9.0.2", "--persistent-keepalive", "3", "--generate"
        )  # fmt: skip
        script = f"""
            mkdir -p /run/phone && cd /run/phone && umask 077 && cat >mesh.conf <<'END'\n{added.stdout}\nEND
            wg-quick strip ./mesh.conf >stripped.conf
            wireguard-go mesh && wg setconf mesh stripped.conf
            ip address add 10.9.0.2/32 dev mesh && ip link set mesh up mtu 1420
            ip route add 10.4.0.0/16 dev mesh
        """
        await lab.exec("phone", "sh", "-ec", script, check=True)
        key = (await lab.exec("phone", "wg", "show", "mesh", "public-key", check=True)).stdout.strip()

        async def shown(what: str, at: str = "hub-1") -> str:
            lines = (await lab.exec(at, "wg", "show", "kilo0", what, check=True)).stdout.splitlines()
            return dict(line.split("\t") for line in lines)[key]

        async def told() -> set[str]:
            kvs = [kv for kv in await lab.key_values("/kilo/by/") if kv.key.endswith(b"/endpoints/phone")]
            return {json.loads(kv.value)["endpoint"] for kv in kvs}

        for name in ("hub-1", "hub-2"):
            await eventually(partial(lab.ping, "phone", name), 15, every=0.2, what=f"the phone reaches {name}")

        async def told_as_seen() -> bool:
            return await told() == {await shown("endpoints")} == {await shown("endpoints", "hub-2")}

        await eventually(told_as_seen, 30, every=0.2, what="one word on the phone from both")
        # cone1, which the phone's configuration knows by a private address, calls it where the others have seen it.
        cafe_address = (await shown("endpoints")).partition(":")[0]
        assert (await shown("endpoints", "cone1")).startswith(cafe_address)

        handshake, before = await shown("latest-handshakes"), await shown("endpoints")
        await lab.exec("phone", "wg", "set", "mesh", "listen-port", "40404", check=True)

        async def elsewhere() -> bool:
            return await shown("endpoints") != before

        await eventually(elsewhere, 15, every=0.1, what="the endpoint is learnt")
        assert await lab.ping("phone", "hub-1", timeout=3)
        assert await lab.ping("hub-1", "10.9.0.2", timeout=3)
        assert await shown("latest-handshakes") == handshake, "the same session"
        await eventually(told_as_seen, 45, every=0.2, what="both say where it is now")

        # Its agents' own doings change nothing of it, and a host that goes takes its word along.
        assert await shown("endpoints") != before
        await lab.stop("hub-2")
        keys = [kv.key for kv in await lab.key_values("/kilo/by/") if kv.key.endswith(b"/endpoints/phone")]
        assert keys == [b"/kilo/by/hub-1/endpoints/phone"]
