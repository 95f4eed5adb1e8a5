"""Networks behind hosts and machines without an agent: reached from everywhere, and their answers find back."""

from __future__ import annotations

import json
from itertools import product

import pytest

from helpers import eventually, require
from helpers_lab import leads
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.runtime import LabError
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(600)]

OPEN = ("--forward-rules",)
BOXES = {"gcp-2": "172.20.2.5", "aws-1": "172.20.3.5"}
"""Host -> the container behind it."""
BOX = """\
ip netns add box
ip link add box0 type veth peer name eth0 netns box
ip addr add {net}.1/24 dev box0
ip link set box0 up
ip -n box addr add {net}.5/24 dev eth0
ip -n box link set lo up
ip -n box link set eth0 up
ip -n box route add default via {net}.1
"""


def site(label: str, *hosts: HostSpec) -> SiteSpec:
    return SiteSpec(name=label, hosts=hosts)


def host(name: str, *args: str) -> HostSpec:
    return HostSpec(name=name, public=True, label=name.partition("-")[0], args=args)


SPEC = Spec(
    sites=(
        site("gcp", host("gcp-1"), host("gcp-2", *OPEN)),
        site("home", host("home-1"), host("home-2"), HostSpec(name="printer", agent=False)),
        site("aws", host("aws-1")),
    )
)
NODES = [one.name for one in SPEC.hosts if one.agent]


async def annotate(lab: Lab, node: str, name: str, value: str) -> None:
    await lab.etcdctl("put", f"/kilo/annotations/{node}/{name}", value)


async def reached(lab: Lab, *targets: str, sources: list[str] = NODES, deadline: float = 20) -> None:
    """Each of these nodes gets an answer from each of these addresses."""
    missing = list(product(sources, targets))

    async def all_answer() -> bool:
        missing[:] = [(source, target) for source, target in missing if not await lab.ping(source, target)]
        return not missing

    await eventually(all_answer, deadline, every=0.1, what=f"answers; {missing}")


async def seen(lab: Lab, machine: str, interface: str, target: str, sources: list[str]) -> dict[str, set[str]]:
    """Node -> the addresses from which its pings of `target` come in at `machine`."""
    result = {}
    for source in sources:
        async with lab.capture(machine, [interface]) as capture:
            assert await lab.ping(source, target, timeout=5), f"{source} to {target}"
        result[source] = {
            flow.source for flow in capture.flows if flow.protocol == "icmp" and flow.destination == target
        }
    return result


async def masquerading(lab: Lab) -> list[str]:
    """The nodes whose nftables table masquerades anything."""
    tables = {name: (await lab.exec(name, "nft", "list", "ruleset", check=True)).stdout for name in NODES}
    return [name for name, text in tables.items() if "masquerade" in text]


async def registered(lab: Lab, name: str) -> int:
    answer = json.loads((await lab.etcdctl("get", f"/kilo/by/{name}/node", "-w", "json")).stdout)
    return int(answer["kvs"][0]["create_revision"])


async def box(lab: Lab, name: str, *command: str) -> int:
    """Run something in the container behind a host; its exit status."""
    return (await lab.exec(name, "nsenter", "--net=/run/netns/box", *command)).returncode


async def test_containers_behind_hosts_and_a_printer() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip", "ping", "iptables")
    async with running_lab(SPEC) as lab:
        await lab.all_pairs_ping(30)
        rows = {row.host: row for row in await lab.status()}
        lan = {name: row.private[0].partition("/")[0] for name, row in rows.items()}
        mesh = {name: row.mesh[0] for name, row in rows.items() if row.mesh}
        assert rows["printer"].agent == "none"
        with pytest.raises(LabError, match="printer runs no agent"):
            await lab.start("printer")
        assert await masquerading(lab) == []

        for name, address in BOXES.items():
            network = address.rpartition(".")[0]
            await lab.exec(name, "sh", "-ec", BOX.format(net=network), check=True)
            await annotate(lab, name, "subnets", f"{network}.0/24")
        await annotate(lab, "home-1", "allowed-location-ips", f"{lan['printer']}/32")
        await reached(lab, *BOXES.values(), lan["printer"])

        # A container sees who it is that asks, from near and far, and may ask first.
        for name, address in BOXES.items():
            others = [node for node in NODES if node != name]
            assert await seen(lab, name, "box0", address, others) == {node: {mesh[node]} for node in others}
            for target in (mesh["gcp-1"], mesh["home-2"], lan["printer"]):
                assert await box(lab, name, "ping", "-c", "1", "-w", "30", target) == 0, (name, target)

        # The printer sees its neighbours; the one that leads stands for all others, and it alone.
        leader = await leads(lab, "home-1", "home-2")
        successor = "home-1" if leader == "home-2" else "home-2"
        far = [name for name in NODES if not name.startswith("home")]
        assert await seen(lab, "printer", "eth0", lan["printer"], far) == {name: {lan[leader]} for name in far}
        assert await seen(lab, "printer", "eth0", lan["printer"], [successor]) == {successor: {lan[successor]}}
        assert await masquerading(lab) == [leader]

        await annotate(lab, successor, "leader", "true")

        async def handed_over() -> bool:
            return await leads(lab, successor, leader) == successor and await masquerading(lab) == [successor]

        await eventually(handed_over, 20, every=0.1, what=f"{successor} leads, and masquerades")
        await reached(lab, lan["printer"])
        assert await seen(lab, "printer", "eth0", lan["printer"], far) == {name: {lan[successor]} for name in far}

        # FORWARD drops, as docker sets it: the host with --forward-rules lets the mesh through, the other does not.
        for name in BOXES:
            await lab.exec(name, "iptables", "-P", "FORWARD", "DROP", check=True)
        await reached(lab, BOXES["gcp-2"])
        assert not await lab.ping("gcp-1", BOXES["aws-1"])
        assert not await lab.ping("home-1", BOXES["aws-1"])
        await lab.exec("aws-1", "iptables", "-P", "FORWARD", "ACCEPT", check=True)
        await reached(lab, BOXES["aws-1"])

        # What the younger of two may not have harms nothing: another's network, all, etcd's network, a host's LAN.
        older, younger = sorted(BOXES, key={name: await registered(lab, name) for name in BOXES}.__getitem__)
        theirs, near = BOXES[older].replace(".5", ".0/25"), lan[older].rpartition(".")[0] + ".0/24"
        own = BOXES[younger].replace(".5", ".0/24")
        await annotate(lab, younger, "subnets", f"{own},{theirs},0.0.0.0/0,192.0.2.0/24,{near}")
        left_out = (
            f"{theirs} of node {younger} is left out: it overlaps {theirs.replace('/25', '/24')} of node {older}, "
            "which comes first; take it out of one of the two"
        )
        unrouted = f"192.0.2.0/24 of node {younger} is not routed here"

        async def reported() -> bool:
            logs = {name: await lab.log(name) for name in NODES}
            return all(left_out in log and (unrouted in log or name == younger) for name, log in logs.items())

        await eventually(reported, 15, every=0.1, what="what was left out, in every agent's log")
        await reached(lab, *BOXES.values(), lan["printer"])
        await lab.all_pairs_ping(10)
        for name in NODES:
            routes = (await lab.exec(name, "ip", "-4", "route", check=True)).stdout.splitlines()
            assert not [line for line in routes if line.startswith("default") and "kilo0" in line]
            assert not [line for line in routes if line.startswith("192.0.2.0/24")]
            if name == older:
                assert [line.split()[2] for line in routes if line.startswith(near)] == ["eth0"]

        # The operator reads each of it once, or by host where hosts differ.
        async def shown() -> bool:
            status = (await lab.kgctl("status")).stdout
            (line,) = [line for line in status.splitlines() if theirs in line]
            assert left_out in line
            assert f"0.0.0.0/0 of node {younger} is left out" in status
            return status.count(unrouted) == len(NODES) - 1

        await eventually(shown, 10, every=0.2, what="the reports in kgctl status")
        # Where every host is its own gateway, the one that was told of the printer leads to it.
        for granularity in ("cross", "full"):
            await lab.etcdctl("put", "/kilo/mesh/granularity", granularity)

            async def switched() -> bool:
                return await masquerading(lab) == ["home-1"]

            await eventually(switched, 20, every=0.1, what=f"home-1 masquerades alone, in {granularity}")
            await reached(lab, *BOXES.values(), lan["printer"])

        explained = (await lab.kgctl("explain", older, near.replace(".0/24", ".77"))).stdout
        assert f"{near} of node {younger} is not routed here" in explained
