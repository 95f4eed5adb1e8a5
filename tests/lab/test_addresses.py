"""Addresses that a host gets beside its own: of services, of another VPN, and those that move between hosts."""

from __future__ import annotations

import pytest

from helpers import eventually, require
from helpers_lab import records
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec

pytestmark = [pytest.mark.lab, pytest.mark.deadline(240)]

HUB = SiteSpec(name="hub", hosts=tuple(HostSpec(name=f"hub-{n}", public=True, label="hub") for n in (1, 2, 3)))
HOME = SiteSpec(name="home", nat="port-restricted", hosts=(HostSpec(name="home-1", label="home"),))
FARM = SiteSpec(name="farm", nat="port-restricted", hosts=(HostSpec(name="farm-1", label="farm"),))
SERVICE = "203.0.113.80/32"


async def look(lab: Lab, host: str, *commands: str) -> None:
    """Run commands on a host, and wait until its agent has looked at its addresses after them: it registers the
    network of a container bridge that is made for that."""
    bridge = (
        "ip link add docker7 type veth peer c7",
        "ip link set docker7 up",
        "ip address add 172.31.7.1/24 dev docker7",
    )
    for command in (*commands, *bridge):
        await lab.exec(host, *command.split(), check=True)

    async def registered() -> bool:
        return "172.31.7.0/24" in (await records(lab))[host]["underlay"]

    await eventually(registered, 30, what=f"{host} has registered another network")


async def test_service_addresses_and_another_vpn_move_no_host_and_nobody_is_cut_off() -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ip")
    async with running_lab(Spec(sites=(HUB, HOME, FARM), agent_args=("--persistent-keepalive", "5"))) as lab:
        await lab.all_pairs_ping(60)
        before = await records(lab)
        for host in ("home-1", "farm-1"):
            await look(lab, host, f"ip address add {SERVICE} dev lo")
        lan = next(ip for ip in before["hub-1"]["internalIPs"])
        await look(
            lab,
            "hub-1",
            "ip tuntap add dev tailscale0 mode tun",
            "ip link set tailscale0 up",
            "ip address add 100.92.235.32/32 dev tailscale0",
            f"ip address del {lan} dev eth0",
        )
        after = await records(lab)
        for host in ("home-1", "farm-1"):
            assert after[host]["endpoint"] == before[host]["endpoint"]
            assert after[host]["internalIPs"] == before[host]["internalIPs"]
        assert not after["hub-1"].get("internalIPs")
        await lab.all_pairs_ping(60)
