"""What only the kernel's own WireGuard can show: long dumps, single peers changed, networks that move under traffic.

Not collected by itself: `test_kernel_guest.py` runs it where a kernel has WireGuard, on this machine or in a guest.
"""

from __future__ import annotations

import base64
import socket
import subprocess
import threading
from functools import partial
from ipaddress import ip_network

import pytest
import trio
from attrs import evolve
from kernel_worlds import PRIVATE, key, lines, peer, plan, tunnel

from helpers import eventually
from kilo_etcd.kernel import Setup, open_kernel
from kilo_etcd.model.hostplan import HostPlan

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_namespaces"), pytest.mark.deadline(1000)]

MESH = tunnel("10.4.0.0/16", "10.4.0.1")
KERNEL = Setup(private_key=PRIVATE, wireguard="kernel")


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


async def test_dumps_of_many_messages_are_put_together_by_key() -> None:
    """One peer's allowed IPs fill several messages of a dump, and so do many peers."""
    wide = tuple(ip_network(f"10.{64 + i // 256}.{i % 256}.0/24") for i in range(3000))
    crowd = {}
    for i in range(500):
        name = base64.b64encode(f"{i:032d}".encode()).decode()
        one = evolve(peer(2, f"10.4.{1 + i // 250}.{i % 250}/32", f"fd04::{i + 1:x}/128"), public_key=name)
        crowd[name] = one
    wanted = plan(evolve(peer(2), allowed_ips=wide), MESH)
    wanted = evolve(wanted, peers={**wanted.peers, **crowd})
    async with open_kernel(KERNEL) as kernel:
        assert (await kernel.apply(wanted)).failures == ()
        # 3,000 networks and 500 peers went out in messages of some 30 kB, not in one for each.
        assert kernel.writes < 30
        observed = await kernel.observe()
        assert {name: p.allowed_ips for name, p in observed.peers.items()} == {
            name: p.allowed_ips for name, p in wanted.peers.items()
        }
        assert (await kernel.peer_activity()).peers == observed.peers
        writes = kernel.writes
        assert lines((await kernel.apply(wanted, fresh=True)).changes) == []
        assert kernel.writes == writes

        # One of them changes: one message about that one.
        changed = next(iter(crowd))
        more = evolve(wanted, peers={**wanted.peers, changed: evolve(crowd[changed], persistent_keepalive=25)})
        assert lines((await kernel.apply(more)).changes) == [f"wg set kilo0 peer {changed} persistent-keepalive 25"]
        assert kernel.writes == writes + 1
    assert len(sh("wg show kilo0 peers").split()) == 501
    (shown,) = (line for line in sh("wg show kilo0 allowed-ips").splitlines() if line.startswith(key(2)))
    assert len(shown.split()) == 3001


def far_end(number: int, public: str) -> str:
    """A host behind 192.168.<number>.0/24 that has 10.5.0.9, made with `ip` and `wg`; its public key."""
    name, private = f"far{number}", base64.b64encode(bytes([8 * number]) * 32).decode()
    sh(
        f"ip netns add {name} && ip link add to{number} type veth peer name eth0 netns {name} && "
        f"ip address add 192.168.{number}.1/24 dev to{number} && ip link set to{number} up && "
        f"ip -n {name} address add 192.168.{number}.2/24 dev eth0 && ip -n {name} link set eth0 up && "
        f"ip -n {name} link add wg0 type wireguard && ip -n {name} address add 10.5.0.9/32 dev wg0"
    )
    subprocess.run(
        ["ip", "netns", "exec", name, "wg", "set", "wg0", "listen-port", "51820", "private-key", "/dev/stdin",
         "peer", public, "allowed-ips", "10.4.0.0/16", "endpoint", f"192.168.{number}.1:51820"],
        input=private, text=True, check=True,
    )  # fmt: skip
    sh(f"ip -n {name} link set wg0 up && ip -n {name} route add 10.4.0.0/16 dev wg0")
    return public_key(private)


def public_key(private: str) -> str:
    return subprocess.run(["wg", "pubkey"], input=private, text=True, check=True, capture_output=True).stdout.strip()


def arrived(number: int) -> int:
    """UDP packets that have come out of the tunnel at a far end."""
    return int(
        sh(f"ip netns exec far{number} nft -j list counter inet seen got").partition('"packets": ')[2].split(",")[0]
    )


async def test_no_packet_is_lost_while_a_network_moves_between_peers() -> None:
    """One way: an answer that is on its way meets a device that takes its source from somebody else by then."""
    public = public_key(PRIVATE)
    ends = {number: far_end(number, public) for number in (2, 3)}
    for number in ends:
        sh(
            f"ip netns exec far{number} nft 'table inet seen {{ counter got {{ }}; chain in {{ type filter hook input "
            "priority 0; iifname wg0 udp dport 9 counter name got drop; }; }'"
        )

    def at(owner: int) -> HostPlan:
        peers = [
            evolve(
                peer(number, *(("10.5.0.9/32",) if number == owner else ()), endpoint=f"192.168.{number}.2:51820"),
                public_key=public_key,
            )
            for number, public_key in ends.items()
        ]
        return plan(*peers, MESH, tunnel("10.5.0.9/32", "10.4.0.1"))

    async with open_kernel(KERNEL) as kernel:
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for owner in (2, 3):  # shake hands with both
            assert (await kernel.apply(at(owner))).failures == ()

            async def shaken(owner: int = owner) -> bool:
                sender.sendto(b"first", ("10.5.0.9", 9))
                return arrived(owner) > 0

            await eventually(shaken, 60, every=0.1, what=f"a packet at {owner}")
        before = arrived(2) + arrived(3)
        done = threading.Event()
        sent = 0

        def flood() -> None:
            nonlocal sent
            while not done.wait(0.001):
                sender.sendto(b"x", ("10.5.0.9", 9))
                sent += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, flood)
            for turn in range(40):
                seen = sent
                await kernel.apply(at(2 + turn % 2))
                await eventually(partial(lambda seen: sent > seen + 3, seen), 60, every=0.002)
            done.set()
        sender.close()
        assert sent > 120
        await eventually(lambda: arrived(2) + arrived(3) - before >= sent, 60, every=0.1, what="every packet")
        assert arrived(2) + arrived(3) - before == sent
        assert min(arrived(2), arrived(3)) > 20
