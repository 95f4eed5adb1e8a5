"""A host whose clock goes back, on the kernel's own WireGuard.

Not collected by itself: `test_mesh_kernel.py` runs it in a guest, whose clock is nobody else's. All hosts there have
one clock, so the one that is to keep the former timestamp does not boot.
"""

from __future__ import annotations

import os

import pytest
import trio
from test_mesh_scenarios import world

from helpers import eventually
from helpers_guest import OWN_CLOCK
from helpers_lab import statuses
from kilo_etcd.lab.client import Lab

pytestmark = [pytest.mark.lab, pytest.mark.deadline(1000)]

WITHIN = 30


async def pinged_by(lab: Lab, source: str, target: str) -> None:
    """`source` alone sends, until it is answered."""

    async def answered() -> bool:
        return await lab.ping(source, target)

    await eventually(answered, WITHIN, every=0.5, what=f"{target} answers {source}")


async def received(lab: Lab, host: str) -> int:
    """Bytes that WireGuard of `host` has received from its only peer."""
    return int((await lab.exec(host, "wg", "show", "kilo0", "transfer", check=True)).stdout.split()[1])


async def owes_nothing(lab: Lab, host: str) -> None:
    """What `host` has sent is answered, if only with a keepalive: else it would begin a handshake by itself before
    long."""
    before = await received(lab, host)

    async def answered() -> bool:
        return await received(lab, host) > before

    await eventually(answered, WITHIN, every=0.5, what=f"a keepalive for {host}")


@pytest.mark.parametrize("granularity", ["location", "full", "cross"])
async def test_a_host_that_boots_with_a_clock_that_went_back_is_heard(granularity: str) -> None:
    assert os.environ.get(OWN_CLOCK), "this test sets the clock"
    labels = {"gcp-1": "gcp", "aws-1": "aws"}
    async with world({"gcp": 1, "aws": 1}, labels, wireguard="kernel", granularity=granularity) as lab:
        # The other end has no part in it: it only answers.
        await lab.power_off("gcp-1")
        await lab.power_on("gcp-1")
        target = str(await lab.mesh_address("aws-1"))
        await pinged_by(lab, "gcp-1", target)
        await owes_nothing(lab, "aws-1")
        await lab.power_off("gcp-1")
        await trio.run_process(["date", "--set", "-1 day"])
        await lab.power_on("gcp-1")
        await pinged_by(lab, "gcp-1", target)

        async def named() -> bool:
            reports = await statuses(lab)
            return any("clock went back by 24 h" in text for text in reports["aws-1"].get("errors", ()))

        # Its agent saw the clock go back.
        await eventually(named, WITHIN, every=0.5)
