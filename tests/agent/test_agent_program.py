"""Plans brought to a kernel in memory: what happens to a peer that has the first word and does not use it."""

from __future__ import annotations

import pytest
import trio
from attrs import evolve
from test_agent_contact import LOW, world

from kilo_etcd.agent import program
from kilo_etcd.agent.contact import STAGES
from kilo_etcd.agent.privatekey import generate
from kilo_etcd.agent.program import Programmer
from kilo_etcd.kernel import KernelError
from kilo_etcd.kernel.state import DeleteLink, RemovePeer, SetPeer, Setup
from kilo_etcd.model import Endpoint
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel
from kilo_etcd.topology import build_topology, host_plan

pytestmark = pytest.mark.autojump

TOPOLOGY = build_topology(world())
PLAN = host_plan(TOPOLOGY, "high")

BETWEEN = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="
"""A private key whose public key is higher than one of these hosts' and lower than the other's."""


def resets(host: FakeHost) -> int:
    assert not any(isinstance(change, RemovePeer) for change in host.history)
    return sum(isinstance(change, SetPeer) and change.reset for change in host.history)


async def until_settled(programmer: Programmer) -> list[float]:
    """Apply whenever it is due; the seconds after the start at which it was."""
    start = trio.current_time()
    await programmer.apply(PLAN, TOPOLOGY, standby=False, fresh=False)
    moments = []
    for _ in STAGES:
        await programmer.wait_due()
        moments.append(round(trio.current_time() - start, 3))
        await programmer.apply(PLAN, TOPOLOGY, standby=False, fresh=True)
    with trio.move_on_after(60) as idle:
        await programmer.wait_due()
    assert idle.cancelled_caught
    return moments


async def test_a_silent_peer_is_begun_over_at_each_stage_and_then_left_in_peace() -> None:
    host = FakeHost()
    programmer = Programmer(FakeKernel(host, Setup(private_key=generate())))
    assert await until_settled(programmer) == list(STAGES)
    assert resets(host) == len(STAGES)
    assert host.observed.peers[LOW].endpoint == PLAN.peers[LOW].endpoint


async def test_a_peer_that_has_spoken_keeps_its_session_and_the_endpoint_that_was_learnt() -> None:
    host = FakeHost()
    programmer = Programmer(FakeKernel(host, Setup(private_key=generate())))
    await programmer.apply(PLAN, TOPOLOGY, standby=False, fresh=False)
    assert host.observed.peers[LOW].endpoint is None
    learnt = Endpoint.parse("203.0.113.77:40000")
    host.hear_from(LOW, endpoint=learnt, when=1.0)  # 0.0 would mean never
    for _ in STAGES:
        await programmer.wait_due()
        await programmer.apply(PLAN, TOPOLOGY, standby=False, fresh=True)
    assert resets(host) == 0
    assert host.observed.peers[LOW].endpoint == learnt


async def test_a_standby_waits_for_nothing_until_it_leads() -> None:
    host = FakeHost()
    programmer = Programmer(FakeKernel(host, Setup(private_key=generate())))
    await programmer.apply(PLAN, TOPOLOGY, standby=True, fresh=False)
    with trio.move_on_after(60) as idle:
        await programmer.wait_due()
    assert idle.cancelled_caught
    assert host.observed.peers[LOW].endpoint is None
    assert await until_settled(programmer) == list(STAGES)
    assert host.observed.peers[LOW].endpoint == PLAN.peers[LOW].endpoint


@pytest.mark.parametrize("standby", [False, True])
async def test_a_peer_that_somebody_took_away_is_spoken_to_once_it_is_back(
    monkeypatch: pytest.MonkeyPatch, standby: bool
) -> None:
    """The other end goes on with the session that is lost here, whoever had the first word when they met."""
    spoken: list[str] = []
    monkeypatch.setattr(program, "speak", lambda addresses: spoken.extend(map(str, addresses)))
    host = FakeHost()
    programmer = Programmer(FakeKernel(host, Setup(private_key=generate())))
    await programmer.apply(PLAN, TOPOLOGY, standby=standby, fresh=False)
    host.hear_from(LOW, when=1.0)
    for _ in () if standby else STAGES:
        await programmer.wait_due()
        await programmer.apply(PLAN, TOPOLOGY, standby=standby, fresh=True)
    (address,) = TOPOLOGY.snapshot.nodes[PLAN.peers[LOW].name].mesh_addresses
    for change in (RemovePeer("kilo0", LOW), DeleteLink("kilo0")):
        spoken.clear()
        host.tamper([change])
        await programmer.apply(PLAN, TOPOLOGY, standby=standby, fresh=True)
        assert LOW in host.observed.peers
        assert spoken == ([] if standby else [str(address)])
    spoken.clear()
    await programmer.apply(PLAN, TOPOLOGY, standby=standby, fresh=True)
    assert spoken == []


@pytest.mark.parametrize("asked", [False, True])
async def test_a_peer_that_is_to_be_reset_stays_where_the_kernel_refuses_to_add_it(asked: bool) -> None:
    """A silent peer, or one whose session is dead: either is better than none."""
    host = FakeHost()
    programmer = Programmer(FakeKernel(host, Setup(private_key=generate())))
    await programmer.apply(PLAN, TOPOLOGY, standby=False, fresh=False)
    host.refuse = lambda change: "no memory" if isinstance(change, SetPeer) else None
    if asked:
        programmer.begin_over([LOW])
    else:
        await programmer.wait_due()
    report = await programmer.apply(PLAN, TOPOLOGY, standby=False, fresh=True)
    assert len(report.failures) == 1
    assert LOW in host.observed.peers
    host.refuse = lambda change: None
    await programmer.apply(PLAN, TOPOLOGY, standby=False, fresh=True)
    assert resets(host) == int(asked), "what was asked for is done as soon as it can be; silent ones have their stages"


@pytest.mark.parametrize("fault", ["broken", "unreadable"])
async def test_a_peer_is_reset_although_the_first_attempt_to_apply_failed(fault: str) -> None:
    host = FakeHost()
    programmer = Programmer(FakeKernel(host, Setup(private_key=generate())))
    await programmer.apply(PLAN, TOPOLOGY, standby=True, fresh=False)
    programmer.begin_over([LOW])
    setattr(host, fault, "netlink is out of buffers")
    with pytest.raises(KernelError):
        await programmer.apply(PLAN, TOPOLOGY, standby=True, fresh=True)
    setattr(host, fault, None)
    await programmer.apply(PLAN, TOPOLOGY, standby=True, fresh=True)
    await programmer.apply(PLAN, TOPOLOGY, standby=True, fresh=True)
    assert resets(host) == 1


@pytest.mark.parametrize(("name", "endpoint_at_first", "spoken_at_first"), [("low", True, 1), ("high", False, 0)])
async def test_who_speaks_first_is_the_same_after_an_attempt_to_apply_that_failed(
    monkeypatch: pytest.MonkeyPatch, name: str, endpoint_at_first: bool, spoken_at_first: int
) -> None:
    """Both ends would begin a handshake at one moment else, which costs five seconds."""
    spoken: list[str] = []
    monkeypatch.setattr(program, "speak", lambda addresses: spoken.extend(map(str, addresses)))
    plan = host_plan(TOPOLOGY, name)
    (key,) = plan.peers
    host = FakeHost()
    programmer = Programmer(FakeKernel(host, Setup(private_key=generate())))
    host.broken = "netlink is out of buffers"
    with pytest.raises(KernelError):
        await programmer.apply(plan, TOPOLOGY, standby=False, fresh=False)
    host.broken = None
    await trio.sleep(0.5)
    await programmer.apply(plan, TOPOLOGY, standby=False, fresh=True)
    assert (host.observed.peers[key].endpoint is not None) is endpoint_at_first
    assert len(spoken) == spoken_at_first


@pytest.mark.parametrize(("name", "spoken_at_once", "times"), [("low", 1, 2), ("high", 0, 3)])
async def test_a_peer_that_goes_back_to_its_former_endpoint_is_spoken_to_at_the_new_one(
    monkeypatch: pytest.MonkeyPatch, name: str, spoken_at_once: int, times: int
) -> None:
    """Its packets come from the former one, as long as none from this host has reached it from elsewhere."""
    spoken: list[str] = []
    monkeypatch.setattr(program, "speak", lambda addresses: spoken.extend(map(str, addresses)))
    plan = host_plan(TOPOLOGY, name)
    ((key, peer),) = plan.peers.items()
    host = FakeHost()
    kernel = FakeKernel(host, Setup(private_key=BETWEEN))
    programmer = Programmer(kernel)
    await programmer.apply(plan, TOPOLOGY, standby=False, fresh=False)
    host.hear_from(key, endpoint=peer.endpoint, when=1.0)
    for _ in STAGES if name == "high" else ():
        await programmer.wait_due()
        await programmer.apply(plan, TOPOLOGY, standby=False, fresh=True)
    new = Endpoint.parse("203.0.113.77:51820")
    moved = evolve(plan, peers={key: evolve(peer, endpoint=new)})
    spoken.clear()
    await trio.sleep(10)
    await programmer.apply(moved, TOPOLOGY, standby=False, fresh=False)
    assert len(spoken) == spoken_at_once
    assert resets(host) == 0

    for number in range(1, times + 1):
        host.hear_from(key, endpoint=peer.endpoint)
        with trio.fail_after(2):
            await kernel.wait_drift()
        spoken.clear()
        await programmer.apply(moved, TOPOLOGY, standby=False, fresh=True)
        assert host.observed.peers[key].endpoint == new
        assert spoken == [str(TOPOLOGY.snapshot.nodes[peer.name].mesh_addresses[0])]
        assert resets(host) == int(number == times)

    # Enough: it is left where it is heard.
    host.hear_from(key, endpoint=peer.endpoint)
    with trio.move_on_after(60) as idle:
        await kernel.wait_drift()
    assert idle.cancelled_caught
    await programmer.apply(moved, TOPOLOGY, standby=False, fresh=True)
    assert host.observed.peers[key].endpoint == peer.endpoint


async def test_a_peer_that_does_not_answer_is_spoken_to_where_it_is_looked_for_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that it can tell where this host is by now: neither may know of the other."""
    spoken: list[str] = []
    monkeypatch.setattr(program, "speak", lambda addresses: spoken.extend(map(str, addresses)))
    plan = host_plan(TOPOLOGY, "low")
    ((key, peer),) = plan.peers.items()
    host = FakeHost()
    kernel = FakeKernel(host, Setup(private_key=LOW))
    programmer = Programmer(kernel)
    await programmer.apply(plan, TOPOLOGY, standby=False, fresh=False)
    await trio.sleep(10)
    learnt = Endpoint.parse("203.0.113.77:4711")
    host.hear_from(key, endpoint=learnt)
    for endpoint in (peer.endpoint, learnt):
        spoken.clear()
        for _ in range(6):
            assert spoken == []
            await programmer.apply(plan, TOPOLOGY, standby=False, fresh=True)
            host.send_to(key)
            await trio.sleep(30)
        await programmer.apply(plan, TOPOLOGY, standby=False, fresh=True)
        assert host.observed.peers[key].endpoint == endpoint
        assert spoken == [str(TOPOLOGY.snapshot.nodes[peer.name].mesh_addresses[0])]
        with trio.move_on_after(20) as quiet:
            await kernel.wait_drift()
        assert quiet.cancelled_caught, "nobody was at the kernel"
