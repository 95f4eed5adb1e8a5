"""A machine that is a peer, of several meshes or beside an agent: each knows its own routes and leaves others alone."""

from __future__ import annotations

import subprocess
from contextlib import AsyncExitStack

import pytest
import trio
from kernel_worlds import PRIVATE, key, lines, peer, plan, tunnel

from kilo_etcd.kernel import PEER_PROTOCOL, ROUTE_PROTOCOL, Kernel, Setup, cleanup, open_kernel
from kilo_etcd.kernel.state import is_ours

FIRST = plan(peer(2, "10.4.0.2/32"), tunnel("10.4.0.0/16", "10.4.0.1"), port=51001)
SECOND = plan(
    peer(3, "10.5.0.2/32"), tunnel("10.5.0.0/16", "10.5.0.1"), addresses=("10.5.0.1/32",), port=51002
)  # fmt: skip
THIRD = plan(
    peer(4, "10.6.0.2/32"), tunnel("10.6.0.0/16", "10.6.0.1"), addresses=("10.6.0.1/32",), port=51003
)  # fmt: skip
PLANS = {"kilo0": (FIRST, ROUTE_PROTOCOL), "kilo-a": (SECOND, PEER_PROTOCOL), "kilo-b": (THIRD, PEER_PROTOCOL)}


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def test_an_agents_routes_are_known_by_their_number_and_a_peers_by_their_interface_too() -> None:
    assert is_ours(107, "eth0", own=107, interface="kilo0")
    assert is_ours(108, "kilo-a", own=108, interface="kilo-a")
    assert not is_ours(108, "kilo-b", own=108, interface="kilo-a")
    assert not is_ours(107, "kilo-a", own=108, interface="kilo-a")
    assert not is_ours(108, "kilo-a", own=107, interface="kilo0")


async def undisturbed(kernel: Kernel) -> None:
    """Nobody reports drift for as long as it takes to look at everything twice."""
    with trio.move_on_after(1.0):
        pytest.fail(await kernel.wait_drift())


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_an_agent_and_two_peers_share_a_machine() -> None:
    async with AsyncExitStack() as stack:
        kernels = {
            name: await stack.enter_async_context(
                open_kernel(Setup(interface=name, private_key=PRIVATE, protocol=protocol))
            )
            for name, (_, protocol) in PLANS.items()
        }
        for _ in range(2):
            for name, (wanted, _) in PLANS.items():
                assert (await kernels[name].apply(wanted, fresh=True)).failures == ()
        for name, (wanted, _) in PLANS.items():
            assert lines(await kernels[name].preview(wanted)) == []
        async with trio.open_nursery() as nursery:
            for kernel in kernels.values():
                nursery.start_soon(undisturbed, kernel)

        sh("ip route del 10.6.0.0/16")
        with trio.fail_after(30):
            assert await kernels["kilo-b"].wait_drift() == "the route to 10.6.0.0/16 was removed"
        await kernels["kilo-b"].apply(THIRD)

        await cleanup("kilo-a", public_key=key(0), protocol=PEER_PROTOCOL)
        found = {line.split()[0]: line.split()[2] for line in sh("ip route show").splitlines()}
        assert found == {"10.4.0.0/16": "kilo0", "10.6.0.0/16": "kilo-b"}
        assert sh("ls /run/wireguard").split() == ["kilo-b.sock", "kilo0.sock"]
        await cleanup("kilo0", public_key=key(0))
        assert "10.6.0.0/16 dev kilo-b proto 108" in sh("ip route show")
        assert lines(await kernels["kilo-b"].preview(THIRD)) == []
        await cleanup("kilo-b", public_key=key(0), protocol=PEER_PROTOCOL)
        assert sh("ip route show") + sh("ls /run/wireguard") == ""
