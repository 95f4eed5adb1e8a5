"""Plans brought to a kernel in memory: what happens to a peer that has the first word and does not use it."""

from __future__ import annotations

import pytest
import trio
from attrs import evolve
from test_agent_handshake_order import LOW, world

from kilo_etcd.agent import apply
from kilo_etcd.agent.apply import PlanApplier
from kilo_etcd.kernel import KernelError
from kilo_etcd.kernel.state import DeleteLink, RemovePeer, SetPeer, Setup
from kilo_etcd.model import Endpoint
from kilo_etcd.planning.handshake_order import STAGES
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.runtime.key_file import generate
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel
from kilo_etcd.topology.segments import build_topology

pytestmark = pytest.mark.autojump

TOPOLOGY = build_topology(world())
PLAN = host_plan(TOPOLOGY, "high")

BETWEEN = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="
"""A private key whose public key is higher than one of these hosts' and lower than the other's."""


def resets(host: FakeHost) -> int:
    assert not any(isinstance(change, RemovePeer) for change in host.history)
    return sum(isinstance(change, SetPeer) and change.reset for change in host.history)


async def until_settled(applier: PlanApplier) -> list[float]:
    """Apply whenever it is due; the seconds after the start at which it was."""
    start = trio.current_time()
    await applier.apply(PLAN, TOPOLOGY, standby=False, fresh=False)
    moments = []
    for _ in STAGES:
        await applier.wait_due()
        moments.append(round(trio.current_time() - start, 3))
        await applier.apply(PLAN, TOPOLOGY, standby=False, fresh=True)
    with trio.move_on_after(60) as idle:
        await applier.wait_due()
    assert idle.cancelled_caught
    return moments


async def test_a_silent_peer_is_begun_over_at_each_stage_and_then_left_in_peace() -> None:
    host = FakeHost()
    applier = PlanApplier(FakeKernel(host, Setup(private_key=generate())))
    assert await until_settled(applier) == list(STAGES)
    assert resets(host) == len(STAGES)
    assert host.observed.peers[LOW].endpoint == PLAN.peers[LOW].endpoint


async def test_a_peer_with_a_handshake_keeps_its_session_and_the_endpoint_that_was_learnt() -> None:
    host = FakeHost()
    applier = PlanApplier(FakeKernel(host, Setup(private_key=generate())))
    await applier.apply(PLAN, TOPOLOGY, standby=False, fresh=False)
    assert host.observed.peers[LOW].endpoint is None
    learnt = Endpoint.parse("203.0.113.77:40000")
    host.receive_from(LOW, endpoint=learnt, when=1.0)  # 0.0 would mean never
    for _ in STAGES:
        await applier.wait_due()
        await applier.apply(PLAN, TOPOLOGY, standby=False, fresh=True)
    assert resets(host) == 0
    assert host.observed.peers[LOW].endpoint == learnt


async def test_a_standby_waits_for_nothing_until_it_leads() -> None:
    host = FakeHost()
    applier = PlanApplier(FakeKernel(host, Setup(private_key=generate())))
    await applier.apply(PLAN, TOPOLOGY, standby=True, fresh=False)
    with trio.move_on_after(60) as idle:
        await applier.wait_due()
    assert idle.cancelled_caught
    assert host.observed.peers[LOW].endpoint is None
    assert await until_settled(applier) == list(STAGES)
    assert host.observed.peers[LOW].endpoint == PLAN.peers[LOW].endpoint


@pytest.mark.parametrize("standby", [False, True])
async def test_a_peer_that_was_removed_gets_a_handshake_once_it_is_back(
    monkeypatch: pytest.MonkeyPatch, standby: bool
) -> None:
    """The other end goes on with the session that is lost here, whoever had the first word when they met."""
    triggered: list[str] = []
    monkeypatch.setattr(apply, "trigger_handshakes", lambda addresses: triggered.extend(map(str, addresses)))
    host = FakeHost()
    applier = PlanApplier(FakeKernel(host, Setup(private_key=generate())))
    await applier.apply(PLAN, TOPOLOGY, standby=standby, fresh=False)
    host.receive_from(LOW, when=1.0)
    for _ in () if standby else STAGES:
        await applier.wait_due()
        await applier.apply(PLAN, TOPOLOGY, standby=standby, fresh=True)
    (address,) = TOPOLOGY.snapshot.nodes[PLAN.peers[LOW].name].mesh_addresses
    for change in (RemovePeer("kilo0", LOW), DeleteLink("kilo0")):
        triggered.clear()
        host.tamper([change])
        await applier.apply(PLAN, TOPOLOGY, standby=standby, fresh=True)
        assert LOW in host.observed.peers
        assert triggered == ([] if standby else [str(address)])
    triggered.clear()
    await applier.apply(PLAN, TOPOLOGY, standby=standby, fresh=True)
    assert triggered == []


@pytest.mark.parametrize("asked", [False, True])
async def test_a_peer_that_is_to_be_reset_stays_where_the_kernel_refuses_to_add_it(asked: bool) -> None:
    """A silent peer, or one whose session is dead: either is better than none."""
    host = FakeHost()
    applier = PlanApplier(FakeKernel(host, Setup(private_key=generate())))
    await applier.apply(PLAN, TOPOLOGY, standby=False, fresh=False)
    host.refuse = lambda change: "no memory" if isinstance(change, SetPeer) else None
    if asked:
        applier.reset_session([LOW])
    else:
        await applier.wait_due()
    report = await applier.apply(PLAN, TOPOLOGY, standby=False, fresh=True)
    assert len(report.failures) == 1
    assert LOW in host.observed.peers
    host.refuse = lambda change: None
    await applier.apply(PLAN, TOPOLOGY, standby=False, fresh=True)
    assert resets(host) == int(asked), "what was asked for is done as soon as it can be; silent ones have their stages"


@pytest.mark.parametrize("fault", ["broken", "unreadable"])
async def test_a_peer_is_reset_although_the_first_attempt_to_apply_failed(fault: str) -> None:
    host = FakeHost()
    applier = PlanApplier(FakeKernel(host, Setup(private_key=generate())))
    await applier.apply(PLAN, TOPOLOGY, standby=True, fresh=False)
    applier.reset_session([LOW])
    setattr(host, fault, "netlink is out of buffers")
    with pytest.raises(KernelError):
        await applier.apply(PLAN, TOPOLOGY, standby=True, fresh=True)
    setattr(host, fault, None)
    await applier.apply(PLAN, TOPOLOGY, standby=True, fresh=True)
    await applier.apply(PLAN, TOPOLOGY, standby=True, fresh=True)
    assert resets(host) == 1


@pytest.mark.parametrize(("name", "endpoint_at_first", "triggered_at_first"), [("low", True, 1), ("high", False, 0)])
async def test_the_handshake_order_is_the_same_after_an_attempt_to_apply_that_failed(
    monkeypatch: pytest.MonkeyPatch, name: str, endpoint_at_first: bool, triggered_at_first: int
) -> None:
    """Both ends would begin a handshake at one moment else, which costs five seconds."""
    triggered: list[str] = []
    monkeypatch.setattr(apply, "trigger_handshakes", lambda addresses: triggered.extend(map(str, addresses)))
    plan = host_plan(TOPOLOGY, name)
    (key,) = plan.peers
    host = FakeHost()
    applier = PlanApplier(FakeKernel(host, Setup(private_key=generate())))
    host.broken = "netlink is out of buffers"
    with pytest.raises(KernelError):
        await applier.apply(plan, TOPOLOGY, standby=False, fresh=False)
    host.broken = None
    await trio.sleep(0.5)
    await applier.apply(plan, TOPOLOGY, standby=False, fresh=True)
    assert (host.observed.peers[key].endpoint is not None) is endpoint_at_first
    assert len(triggered) == triggered_at_first


@pytest.mark.parametrize(("name", "spoken_at_once", "times"), [("low", 1, 2), ("high", 0, 3)])
async def test_a_peer_that_goes_back_to_its_former_endpoint_is_spoken_to_at_the_new_one(
    monkeypatch: pytest.MonkeyPatch, name: str, spoken_at_once: int, times: int
) -> None:
    """Its packets come from the former one, as long as none from this host has reached it from elsewhere."""
    triggered: list[str] = []
    monkeypatch.setattr(apply, "trigger_handshakes", lambda addresses: triggered.extend(map(str, addresses)))
    plan = host_plan(TOPOLOGY, name)
    ((key, peer),) = plan.peers.items()
    host = FakeHost()
    kernel = FakeKernel(host, Setup(private_key=BETWEEN))
    applier = PlanApplier(kernel)
    await applier.apply(plan, TOPOLOGY, standby=False, fresh=False)
    host.receive_from(key, endpoint=peer.endpoint, when=1.0)
    for _ in STAGES if name == "high" else ():
        await applier.wait_due()
        await applier.apply(plan, TOPOLOGY, standby=False, fresh=True)
    new = Endpoint.parse("203.0.113.77:51820")
    moved = evolve(plan, peers={key: evolve(peer, endpoint=new)})
    triggered.clear()
    await trio.sleep(10)
    await applier.apply(moved, TOPOLOGY, standby=False, fresh=False)
    assert len(triggered) == spoken_at_once
    assert resets(host) == 0

    for number in range(1, times + 1):
        host.receive_from(key, endpoint=peer.endpoint)
        with trio.fail_after(2):
            await kernel.wait_drift()
        triggered.clear()
        await applier.apply(moved, TOPOLOGY, standby=False, fresh=True)
        assert host.observed.peers[key].endpoint == new
        assert triggered == [str(TOPOLOGY.snapshot.nodes[peer.name].mesh_addresses[0])]
        assert resets(host) == int(number == times)

    # Enough: it is left where it is heard.
    host.receive_from(key, endpoint=peer.endpoint)
    with trio.move_on_after(60) as idle:
        await kernel.wait_drift()
    assert idle.cancelled_caught
    await applier.apply(moved, TOPOLOGY, standby=False, fresh=True)
    assert host.observed.peers[key].endpoint == peer.endpoint


async def test_a_peer_that_does_not_answer_is_spoken_to_where_it_is_looked_for_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that it can tell where this host is by now: neither may know of the other."""
    triggered: list[str] = []
    monkeypatch.setattr(apply, "trigger_handshakes", lambda addresses: triggered.extend(map(str, addresses)))
    plan = host_plan(TOPOLOGY, "low")
    ((key, peer),) = plan.peers.items()
    host = FakeHost()
    kernel = FakeKernel(host, Setup(private_key=LOW))
    applier = PlanApplier(kernel)
    await applier.apply(plan, TOPOLOGY, standby=False, fresh=False)
    await trio.sleep(10)
    learnt = Endpoint.parse("203.0.113.77:4711")
    host.receive_from(key, endpoint=learnt)
    for endpoint in (peer.endpoint, learnt):
        triggered.clear()
        for _ in range(6):
            assert triggered == []
            await applier.apply(plan, TOPOLOGY, standby=False, fresh=True)
            host.send_to(key)
            await trio.sleep(30)
        await applier.apply(plan, TOPOLOGY, standby=False, fresh=True)
        assert host.observed.peers[key].endpoint == endpoint
        assert triggered == [str(TOPOLOGY.snapshot.nodes[peer.name].mesh_addresses[0])]
        with trio.move_on_after(20) as quiet:
            await kernel.wait_drift()
        assert quiet.cancelled_caught, "nobody was at the kernel"
