"""The same site as `failover`'s, its leaders guarded by keepalived instead of kilo-etcd, as an operator would do it.

    gcp-3 (member)                                                                 home-3 (member)
        |  10.4.2.0/24 via 10.101.0.250, which moves                                  |
    gcp-1 and gcp-2, one WireGuard identity (wg0), keepalived  ==== tunnel ====  home-1 (wg0)

Both hosts of gcp have the same WireGuard key, so that the far side has one peer for the location, and WireGuard's
own roaming follows whichever of them sends: nothing has to be switched at home. VRRP (multicast on the site's bridge)
moves the address that the members have as next hop; keepalived tells them by gratuitous ARP. At a takeover the notify
script sends one packet into the tunnel, so that the handshake begins before a member's packet would begin it; when it
becomes the backup again, it forgets its session, which the far side has left for the master's: else a second takeover
within three minutes would cost 15 s more, until WireGuard finds that out. Timers and priorities are keepalived's
defaults (an advertisement every second, 100) but for the backup's priority of 90. Agents of kilo-etcd do not run.
WireGuard is `wireguard-go` or the kernel's, as the lab's agents would choose.
"""

from __future__ import annotations

import base64
import random
import shutil
from collections.abc import Mapping

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from _lab import Seen, watched
from kilo_etcd.lab.client import Lab, running_lab
from kilo_etcd.lab.spec import Spec

NEXT_HOP = "10.101.0.250"
MESH = {"gcp-1": "10.4.1.1", "gcp-2": "10.4.1.1", "gcp-3": "10.4.1.3", "home-1": "10.4.2.1", "home-3": "10.4.2.3"}
HERE, THERE = "10.4.1.0/24", "10.4.2.0/24"
PRIORITY = {"gcp-1": 100, "gcp-2": 90}

CONFIGURATION = """\
vrrp_instance gateway {{
    state {state}
    interface eth0
    virtual_router_id 51
    priority {priority}
    virtual_ipaddress {{
        {next_hop}/24
    }}
    notify_master "/bin/ping -c 1 -W 1 {far}" root
    notify_backup "/bin/sh /run/begin-anew" root
}}
"""


def why_not() -> str | None:
    """Why there is nothing to compare with, as a sentence; None: there is."""
    if shutil.which("keepalived", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
        return (
            "keepalived was left out, since it is not installed: `make bench-failover` installs it and measures again"
        )
    return None


class Site:
    """The lab of `failover` without agents, set up by hand."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._keys = {"gcp": _key(), "home": _key()}

    async def run(self, host: str, script: str) -> None:
        """A shell script on a host; LabError if a line of it fails."""
        await self.lab.exec(host, "sh", "-euc", script, check=True)

    async def tunnel(self, host: str, peer: str, networks: str, endpoint: str | None) -> None:
        """wg0 with one peer, and forwarding between it and the host's network."""
        own, other = self._keys[host.partition("-")[0]], self._keys[peer]
        to = f"endpoint {endpoint}:51820" if endpoint else ""
        await self.run(
            host,
            f"""
            ip link add wg0 type wireguard 2>/dev/null || wireguard-go wg0 >/dev/null 2>&1
            umask 077
            echo {own[0]} > /run/wg0.key
            wg set wg0 listen-port 51820 private-key /run/wg0.key peer {other[1]} allowed-ips {networks} {to}
            ip address add {MESH[host]}/32 dev wg0
            ip link set wg0 mtu 1420 up
            ip route add {networks} dev wg0
            echo 1 > /proc/sys/net/ipv4/ip_forward
            """,
        )

    async def gateway(self, host: str, home: str) -> None:
        """gcp-1 or gcp-2, from nothing or after a boot."""
        await self.tunnel(host, "home", THERE, home)
        member = (await self.lab.host("gcp-3")).private[0].partition("/")[0]
        text = CONFIGURATION.format(
            state="MASTER" if PRIORITY[host] == 100 else "BACKUP",
            priority=PRIORITY[host], next_hop=NEXT_HOP, far=MESH["home-1"],
        )  # fmt: skip
        await self.run(
            host,
            f"""
            ip route add {MESH["gcp-3"]}/32 via {member}
            cat > /run/begin-anew <<'END'
            wg set wg0 peer {self._keys["home"][1]} remove
            wg set wg0 peer {self._keys["home"][1]} allowed-ips {THERE} endpoint {home}:51820
END
            cat > /run/keepalived.conf <<'END'
{text}
END
            keepalived --vrrp --use-file /run/keepalived.conf --pid /run/keepalived.pid --vrrp_pid /run/vrrp.pid
            """,
        )

    async def build(self) -> None:
        home = (await self.lab.host("home-1")).public[0].partition("/")[0]
        far = (await self.lab.host("home-1")).private[0].partition("/")[0]
        await self.tunnel("home-1", "gcp", HERE, None)
        member = (await self.lab.host("home-3")).private[0].partition("/")[0]
        await self.run("home-1", f"ip route add {MESH['home-3']}/32 via {member}")
        for host, gateway, networks in (("gcp-3", NEXT_HOP, THERE), ("home-3", far, HERE)):
            address = MESH[host]
            await self.run(
                host, f"ip address add {address}/32 dev lo; ip route add {networks} via {gateway} src {address}"
            )
        self.home = home
        for host in PRIORITY:
            await self.gateway(host, home)

    async def rest(self) -> None:
        """Wait until gcp-1 has the next hop's address and packets flow."""
        with trio.fail_after(60):
            while True:
                shown = await self.lab.exec("gcp-1", "ip", "-o", "address", "show", "dev", "eth0")
                if NEXT_HOP in shown.stdout and await self.lab.ping("gcp-3", MESH["home-3"]):
                    break
                await trio.sleep(0.2)
        # A master sends its gratuitous ARP once more after 5 s; the other is a backup by then.
        await trio.sleep(6)


async def crashes_under_keepalived(hosts: Mapping[str, int], count: int, *, interval: float) -> list[Seen]:
    """The master is powered off; afterwards it comes back and, having the higher priority, is master again."""
    result = []
    async with running_lab(Spec.simple(hosts, public=3, agents=False)) as lab:
        site = Site(lab)
        await site.build()
        for _ in range(count):
            await site.rest()
            await trio.sleep(random.uniform(0, 1))
            async with watched(lab, ("gcp-3", "home-3"), interval=interval, patience=20, addresses=MESH) as seen:
                await lab.power_off("gcp-1")
            result.append(seen)
            await lab.power_on("gcp-1", agent=False)
            await site.gateway("gcp-1", site.home)
    return result


def _key() -> tuple[str, str]:
    """Private and public."""
    private = X25519PrivateKey.generate()
    return _text(private.private_bytes_raw()), _text(private.public_key().public_bytes_raw())


def _text(key: bytes) -> str:
    return base64.b64encode(key).decode()
