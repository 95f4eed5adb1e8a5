"""Operators ask through etcd, agents answer with what their kernels have: on an etcd and a kernel in memory."""

from __future__ import annotations

import io
from collections import Counter
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
import trio
from attrs import evolve

from helpers import eventually
from kilo_etcd.agent import diagnostics
from kilo_etcd.agent.diagnostics import MOST_SIZED, MOST_TRIED, AppliedPlan, DiagnosticsServer
from kilo_etcd.etcd.api import PermissionDenied, Unavailable
from kilo_etcd.kernel.firewall.chains import Obstacle, Refusal
from kilo_etcd.kernel.routing.rules import ForeignRule
from kilo_etcd.kernel.state import AddRoute, DeleteRoute, Route, Setup
from kilo_etcd.model import Endpoint, IPAddress, Node, Peer, Snapshot
from kilo_etcd.model.hostplan import Encryption, HostPlan, PeerPlan, RoutePlan, Via
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.logs import Once, get_logger, setup_logging
from kilo_etcd.store.diagnostics import LEASE_SECONDS, PATIENCE_SECONDS, request_diagnostics
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import (
    DiagnosticsRequest,
    DiagnosticsResponse,
    EchoSize,
    RecordError,
    TakenRoute,
    Tunnel,
    decode_diagnostics_response,
    encode,
)
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel
from kilo_etcd.topology.segments import Topology, build_topology

pytestmark = pytest.mark.autojump

KEYS = Keys()
KEY, SECOND = "A" * 43 + "=", "B" + "A" * 42 + "="
PLAN = HostPlan(
    node="h1",
    addresses=(ip_interface("10.4.0.1/32"),),
    peers={
        KEY: PeerPlan(
            public_key=KEY,
            name="h2",
            endpoint=Endpoint.parse("203.0.113.2:51820"),
            allowed_ips=(ip_network("10.3.0.0/24"), ip_network("10.4.0.2/32")),
        ),
        SECOND: PeerPlan(public_key=SECOND, name="laptop", allowed_ips=(ip_network("10.9.0.2/32"),)),
    },
    routes={ip_network("10.4.0.0/16"): RoutePlan(destination=ip_network("10.4.0.0/16"), via=Via.TUNNEL)},
)


class World:
    """The agent of h1 as far as it responds; `triggered` is where it has sent packets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.etcd = FakeEtcd()
        self.host = FakeHost()
        self.kernel = FakeKernel(self.host, Setup(private_key=key_file.generate()))
        self.log = io.StringIO()
        self.triggered: list[IPAddress] = []
        self.sends = True
        setup_logging("info", stream=self.log)
        monkeypatch.setattr(diagnostics, "trigger_handshakes", self.triggered.extend)

    def answerer(
        self, plan: HostPlan | None = PLAN, topology: Topology | None = None, client: FakeClient | None = None
    ) -> DiagnosticsServer:
        return DiagnosticsServer(
            client or self.etcd.client("h1"),
            KEYS,
            "h1",
            self.kernel,
            lambda: AppliedPlan(plan=plan, revision=7, topology=topology, sends=self.sends, undecided=("h9",)),
            Once(get_logger()),
        )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_who_is_asked_answers_and_nothing_stays(world: World) -> None:
    await world.kernel.apply(PLAN)
    world.host.receive_from(KEY, when=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.answerer().run)
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(5)
        started = trio.current_time()
        answers = await request_diagnostics(world.etcd.client("desk"), KEYS, ["h1"])
        assert trio.current_time() - started < 0.1
        nursery.cancel_scope.cancel()
    (response,) = answers.values()
    assert (response.revision, response.backend, response.undone, response.mtu) == (7, "kernel", 0, 1420)
    assert response.undecided == ("h9",)
    assert response.tunnels == (Tunnel(KEY, 4, 148, 0, "203.0.113.2:51820"), Tunnel(SECOND, -1, 0, 0, ""))
    assert world.etcd.keys("/") == []
    # A session of five seconds' age is awake, and a laptop without an endpoint is left asleep.
    assert world.triggered == []


async def test_who_is_silent_is_not_waited_for_long_and_who_is_not_asked_is_silent(world: World) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.answerer().run)
        await trio.testing.wait_all_tasks_blocked()
        started = trio.current_time()
        assert set(await request_diagnostics(world.etcd.client("desk"), KEYS, ["h1", "h2"], patience=2)) == {"h1"}
        assert trio.current_time() - started == pytest.approx(2, abs=0.1)
        assert await request_diagnostics(world.etcd.client("desk"), KEYS, ["h2"], patience=2) == {}
        assert await request_diagnostics(world.etcd.client("desk"), KEYS, []) == {}
        nursery.cancel_scope.cancel()


async def test_requests_whose_askers_have_gone_keep_nobody_waiting(world: World) -> None:
    """Each takes seconds, since nobody has a session with the host's peers."""
    await world.kernel.apply(PLAN)
    desk = world.etcd.client("desk")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.answerer().run)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(500):
            lease = (await desk.grant_lease(15)).id
            await desk.put(KEYS.request(lease), encode(DiagnosticsRequest()), lease=lease)
            await desk.revoke_lease(lease)
        assert set(await request_diagnostics(desk, KEYS, ["h1"], patience=5)) == {"h1"}
        nursery.cancel_scope.cancel()


async def test_a_request_that_etcd_could_not_be_asked_about_is_skipped_and_the_next_one_answered(world: World) -> None:
    class Failing(FakeClient):
        async def get(self, *arguments: Any, **options: Any) -> Any:
            if not failed:
                failed.append(True)
                raise Unavailable("no leader")
            return await super().get(*arguments, **options)

    failed: list[bool] = []
    desk = world.etcd.client("desk")
    answerer = world.answerer(client=Failing(world.etcd, "h1"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answerer.run)
        await trio.testing.wait_all_tasks_blocked()
        lease = (await desk.grant_lease(15)).id
        await desk.put(KEYS.request(lease), encode(DiagnosticsRequest()), lease=lease)
        assert set(await request_diagnostics(desk, KEYS, ["h1"], patience=3)) == {"h1"}
        assert failed
        nursery.cancel_scope.cancel()


async def test_a_handshake_is_triggered_in_an_idle_tunnel(world: World) -> None:
    await world.kernel.apply(PLAN)
    async with trio.open_nursery() as nursery:
        replies: list[DiagnosticsResponse] = []

        async def reply() -> None:
            replies.append(await world.answerer().answer(DiagnosticsRequest()))

        nursery.start_soon(reply)
        await eventually(lambda: world.triggered)
        world.host.receive_from(KEY)
    # To an address of one host; the network before it may have nobody at its first address.
    assert list(map(str, world.triggered)) == ["10.4.0.2"]
    assert replies[0].tunnels[0].handshake >= 0
    # Nobody there: the answer says so in the end.
    started = trio.current_time()
    await trio.sleep(200)
    response = await world.answerer().answer(DiagnosticsRequest())
    assert response.tunnels[0].handshake >= 200
    assert trio.current_time() - started < 202
    # A member's packets go by its leader, and try none of its own tunnels.
    world.sends = False
    world.triggered.clear()
    await world.answerer().answer(DiagnosticsRequest())
    assert world.triggered == []


async def test_what_the_kernel_lacks_is_counted_and_named(world: World) -> None:
    response = await world.answerer().answer(DiagnosticsRequest())
    assert response.undone > 5
    assert any(command.startswith("ip route add 10.4.0.0/16") for command in response.changes)
    assert decode_diagnostics_response(encode(response)) == response
    # What the agent could not do is an error in its status, and nothing that another program has undone.
    world.host.refuse = lambda change: "no" if isinstance(change, AddRoute) else None
    await world.kernel.apply(PLAN)
    assert (await world.answerer().answer(DiagnosticsRequest())).undone == 0
    world.host.obstacles = (Obstacle("FORWARD drops"), Obstacle("the chain x may drop", certain=False))
    assert (await world.answerer().answer(DiagnosticsRequest())).trouble == ()  # it has nothing to forward
    forwarding = world.answerer(evolve(PLAN, forwarding=frozenset({4})))
    response = await forwarding.answer(DiagnosticsRequest())
    assert (response.trouble, response.possible_obstacles) == (("FORWARD drops",), ("the chain x may drop",))
    assert response.untested_obstacles == ("the chain x may drop",)
    world.host.obstacles += (Obstacle("y may drop ICMP", certain=False, untested=False),)
    response = await forwarding.answer(DiagnosticsRequest())
    assert response.possible_obstacles == ("the chain x may drop", "y may drop ICMP")
    assert response.untested_obstacles == ("the chain x may drop",), "of ICMP the echo requests tell"
    assert decode_diagnostics_response(encode(response)) == response
    world.sends = False
    response = await forwarding.answer(DiagnosticsRequest())
    assert (response.trouble, response.possible_obstacles) == ((), ("FORWARD drops",)), "it may lead one day"
    assert response.untested_obstacles == ()
    network = ip_network("172.20.1.0/24")
    world.host.obstacles = (Obstacle("its network is cut off", networks=(network,), leading=False),)
    assert (await forwarding.answer(DiagnosticsRequest())).trouble == ("its network is cut off",), (
        "now, and not one day"
    )


async def test_what_is_dropped_of_others_too_is_named_once(world: World) -> None:
    world.host.obstacles = (
        Obstacle("f drops", chain="f"),
        Obstacle("g drops", networks=(ip_network("10.9.0.0/24"),), chain="g"),
    )
    world.host.refusals = tuple(Refusal(f"{name} drops", meant=False, chain=name) for name in ("f", "g", ""))
    response = await world.answerer(evolve(PLAN, forwarding=frozenset({4}))).answer(DiagnosticsRequest())
    assert (response.trouble, response.own_losses) == (("f drops", "g drops"), ("g drops", " drops"))


async def test_an_address_in_an_offered_network_is_tried(world: World) -> None:
    network = ip_network("172.20.1.0/24")
    world.host.reach = lambda address: str(address) == "172.20.1.1"
    topology = build_topology(
        Snapshot(
            revision=1,
            nodes={
                name: Node(
                    name=name, public_key=name, location=name, subnets=(network,) if name == "h2" else (),
                    mesh_addresses=(ip_address(f"10.4.0.{name[1]}"),),
                )
                for name in ("h1", "h2")
            },
        )
    )  # fmt: skip
    plan = evolve(PLAN, routes={**PLAN.routes, network: RoutePlan(destination=network, via=Via.TUNNEL)})
    asked = DiagnosticsRequest(targets=("172.20.1.1", "172.20.1.2", "172.20.2.1"))
    response = await world.answerer(plan, topology=topology).answer(asked)
    assert (response.reached, response.unreached) == (("172.20.1.1",), ("172.20.1.2",)), "of no other network"
    response = await world.answerer(PLAN, topology=topology).answer(asked)
    assert (response.reached, response.unreached) == ((), ()), "it has no route there"


async def test_packets_are_sent_to_whom_is_asked_for(world: World) -> None:
    world.host.reach = lambda address: str(address) == "10.4.0.9"
    response = await world.answerer().answer(
        DiagnosticsRequest(targets=("10.4.0.9", "10.4.0.8", "nonsense", "fd00::1"))
    )
    assert (response.reached, response.unreached) == ((), ()), "this host has no address yet"
    topology = build_topology(
        Snapshot(
            revision=1,
            nodes={
                f"h{number}": Node(
                    name=f"h{number}", public_key=str(number), mesh_addresses=(ip_address(f"10.4.0.{number}"),)
                )
                for number in range(1, 101)
            },
        )
    )
    answerer = world.answerer(topology=topology)
    response = await answerer.answer(
        DiagnosticsRequest(targets=("10.4.0.1", "10.4.0.9", "10.4.0.8", "nonsense", "fd00::1"))
    )
    assert (response.reached, response.unreached) == (("10.4.0.9",), ("10.4.0.8",))
    assert decode_diagnostics_response(encode(response)) == response
    assert response.small_only == ()
    await world.kernel.apply(PLAN)
    response = await answerer.answer(DiagnosticsRequest(targets=("10.4.0.9",)))
    assert (response.mtu > 0, response.small_only) == (True, ())
    world.host.largest = response.mtu - 1
    assert (narrow := await answerer.answer(DiagnosticsRequest(targets=("10.4.0.9",)))).small_only == ("10.4.0.9",)
    assert decode_diagnostics_response(encode(narrow)) == narrow
    assert narrow.largest == (EchoSize("10.4.0.9", response.mtu - 1),)
    world.host.largest = 1001
    narrow = await answerer.answer(DiagnosticsRequest(targets=("10.4.0.9",)))
    assert narrow.largest == (EchoSize("10.4.0.9", 1001),), "to the byte"
    world.host.largest = 575
    narrow = await answerer.answer(DiagnosticsRequest(targets=("10.4.0.9",)))
    assert (narrow.small_only, narrow.largest) == (("10.4.0.9",), ()), "no tunnel has so small an MTU"
    world.host.largest = response.mtu
    assert (await answerer.answer(DiagnosticsRequest(targets=("10.4.0.9",)))).small_only == ()
    everybody = await answerer.answer(DiagnosticsRequest(tries=200))
    assert len(everybody.unreached) == 98
    some = await answerer.answer(DiagnosticsRequest(tries=64))
    assert len(some.unreached) + len(some.reached) == 64
    foreign = await answerer.answer(DiagnosticsRequest(targets=("192.0.2.66", "10.4.0.200", "10.4.0.9")))
    assert (foreign.reached, foreign.unreached) == (("10.4.0.9",), ()), "others' addresses are not pinged"
    world.host.no_pings = "this process may not ping"
    assert (await answerer.answer(DiagnosticsRequest(tries=4))).trouble == ("this process may not ping",)
    assert (await answerer.answer(DiagnosticsRequest())).trouble == ()
    assert (await world.answerer(plan=None).answer(DiagnosticsRequest())).undone == 0


async def test_who_answers_large_packets_is_sent_one(world: World) -> None:
    topology, _ = await narrow_world(world)
    world.host.large.clear()
    response = await world.answerer(topology=topology).answer(DiagnosticsRequest(tries=8))
    assert (len(response.reached), response.small_only) == (8, ())
    assert sorted(world.host.large) == sorted((ip_address(address), response.mtu) for address in response.reached)


async def test_only_to_the_far_ends_of_tunnels_packets_may_not_be_divided(world: World) -> None:
    """h2 is the far end of this host's tunnel, and h3 is beyond it, where a network may take less."""
    topology, plan = await narrow_world(world)
    answerer = world.answerer(plan=plan, topology=topology)
    world.host.largest, world.host.fragments = 1300, True
    targets = DiagnosticsRequest(targets=("10.4.0.2", "10.4.0.3"))
    response = await answerer.answer(targets)
    assert (response.small_only, response.largest) == (("10.4.0.2",), (EchoSize("10.4.0.2", 1300),))
    world.sends = False
    assert (await answerer.answer(targets)).small_only == (), "a member's packets pass its leader's tunnel"


async def test_a_size_is_measured_on_links_that_are_slow_or_lose_packets_or_not_at_all(world: World) -> None:
    topology, plan = await narrow_world(world)
    answerer = world.answerer(plan=plan, topology=topology)
    targets = DiagnosticsRequest(tries=MOST_SIZED)
    world.host.largest = 1300
    sent: Counter[IPAddress] = Counter()

    def slow(address: IPAddress, size: int) -> bool | None:
        sent[address] += 1
        return None if sent[address] % 3 == 1 else size <= 1300

    world.host.passes = slow
    response = await answerer.answer(targets)
    assert len(response.small_only) == MOST_SIZED
    assert {size for _, size in response.largest} <= {1300}, "a packet with no answer at all says nothing of its size"

    def lossy(address: IPAddress, size: int) -> bool | None:
        sent[address] += 1
        return size <= 1300 and sent[address] % 3 > 0

    world.host.passes = lossy
    response = await answerer.answer(targets)
    assert [size for _, size in response.largest] == [1300] * MOST_SIZED
    world.host.passes = lambda *_: None
    world.host.large.clear()
    started = trio.current_time()
    response = await answerer.answer(targets)
    assert (len(response.small_only), response.largest) == (MOST_SIZED, ())
    assert trio.current_time() - started < PATIENCE_SECONDS


async def narrow_world(world: World) -> tuple[Topology, HostPlan]:
    """A mesh of nine, all of which answer."""
    nodes = {
        f"h{number}": Node(name=f"h{number}", public_key=KEY if number == 2 else str(number),
                           location=f"l{number}", mesh_addresses=(ip_address(f"10.4.0.{number}"),))
        for number in range(1, 10)
    }  # fmt: skip
    world.host.reach = lambda address: True
    await world.kernel.apply(PLAN)
    return build_topology(Snapshot(revision=1, nodes=nodes)), PLAN


async def test_where_addresses_answer_later_requests_only_or_too_few_packets_get_lost(
    world: World,
) -> None:
    nodes = {
        f"h{number}": Node(name=f"h{number}", public_key=str(number), mesh_addresses=(ip_address(f"10.4.0.{number}"),))
        for number in (1, 6, 7, 8, 9)
    }
    asked: Counter[IPAddress] = Counter()
    needed = {ip_address("10.4.0.7"): 40, ip_address("10.4.0.8"): 20, ip_address("10.4.0.9"): 7}
    dropped = ip_address("10.4.0.6")

    def reach(address: IPAddress) -> bool:
        asked[address] += 1
        return asked[address] >= needed.get(address, 0) and (address != dropped or asked[address] % 5 > 0)

    world.host.reach = reach
    answerer = world.answerer(topology=build_topology(Snapshot(revision=1, nodes=nodes)))
    response = await answerer.answer(DiagnosticsRequest(targets=tuple(map(str, (dropped, *needed)))))
    assert (response.reached, response.unreached) == (("10.4.0.6", "10.4.0.8", "10.4.0.9"), ("10.4.0.7",))
    assert response.echoes == (("10.4.0.6", 20, 16), ("10.4.0.9", 20, 20), ("10.4.0.8", 32, 13))
    assert decode_diagnostics_response(encode(response)) == response


async def test_internal_ips_that_the_plan_has_a_route_to_are_tried_from_its_source(world: World) -> None:
    internal, mine = ip_address("10.2.0.2"), ip_address("10.1.0.1")
    route = RoutePlan(destination=ip_network("10.2.0.2/32"), via=Via.TUNNEL, source=mine)
    plan = evolve(PLAN, routes={**PLAN.routes, route.destination: route})
    nodes = {
        "h1": Node(name="h1", public_key="1", mesh_addresses=(ip_address("10.4.0.1"),)),
        "h2": Node(
            name="h2", public_key=KEY, mesh_addresses=(ip_address("10.4.0.2"),),
            internal_ips=(ip_interface("10.2.0.2/24"), ip_interface("10.2.0.200/24")),
        ),
    }  # fmt: skip
    topology = build_topology(Snapshot(revision=1, nodes=nodes))
    answerer = world.answerer(plan, topology)
    await world.kernel.apply(plan)
    world.host.reach = lambda address: address == internal
    for request in (DiagnosticsRequest(tries=4), DiagnosticsRequest(targets=("10.2.0.2", "10.2.0.200", "10.4.0.2"))):
        response = await answerer.answer(request)
        assert (response.reached, response.unreached) == (("10.2.0.2",), ("10.4.0.2",))
        assert response.routes == (TakenRoute("10.2.0.2", "10.1.0.1", "10.2.0.2 dev kilo0", False),)
        assert decode_diagnostics_response(encode(response)) == response
    # Not if the route leads to a peer that has the address.
    peer = Peer(name="laptop", public_key=SECOND, allowed_ips=(route.destination,))
    taken_by_peer = build_topology(Snapshot(revision=1, nodes=nodes, peers={"laptop": peer}))
    assert taken_by_peer.peers["laptop"].allowed_ips == (route.destination,)
    assert (await world.answerer(plan, taken_by_peer).answer(request)).reached == ()
    # One that goes through the tunnel by a table of its own is tried as well.
    encrypted = evolve(PLAN, encryption=Encryption(send={route.destination: route}))
    answerer2 = world.answerer(encrypted, build_topology(Snapshot(revision=1, nodes=nodes)))
    assert (await answerer2.answer(DiagnosticsRequest(tries=4))).reached == ("10.2.0.2",)
    other = Route(destination=ip_network("10.2.0.2/32"), device="eth0", gateway=ip_address("10.1.0.254"), table=99)
    ours = world.host.taken
    world.host.taken = lambda address, source: other if address == internal else ours(address, source)
    (taken,) = (await answerer.answer(DiagnosticsRequest(tries=4))).routes
    assert taken == TakenRoute("10.2.0.2", "10.1.0.1", "10.2.0.2 via 10.1.0.254 dev eth0 table 99", True)
    # Unless the plan changes meanwhile, as in a handover: the kernel's choice may be that of the new plan.
    plans = iter((plan, PLAN))
    moving = world.answerer(plan, topology)
    moving._programmed = lambda: AppliedPlan(plan=next(plans), revision=8, topology=topology, sends=False)
    response = await moving.answer(DiagnosticsRequest(tries=4))
    assert (response.reached, response.routes) == (("10.2.0.2",), ())
    world.host.taken = lambda address, source: "No route to host"
    assert (await answerer.answer(DiagnosticsRequest(tries=4))).routes[0][2:] == ("none: No route to host", True)
    # A route that is not there, since the kernel refuses it for instance, is preceded by none.
    world.host.tamper([DeleteRoute(one) for one in world.host.observed.routes.values()])
    for choice in ("No route to host", other):
        world.host.taken = partial(lambda choice, address, source: choice, choice)
        (taken,) = (await answerer.answer(DiagnosticsRequest(tries=4))).routes
        assert not taken.foreign


async def test_routes_of_other_programs_to_mesh_addresses_members_and_endpoints_are_named(world: World) -> None:
    far, near = ip_address("10.4.0.2"), ip_address("192.168.1.3")
    nodes = {
        name: Node(
            name=name, public_key=key, location=place, mesh_addresses=(ip_address(f"10.4.0.{number}"),),
            internal_ips=(ip_interface(f"192.168.1.{number}/24"),),
        )
        for number, (name, key, place) in enumerate(
            (("h1", "1", "here"), ("h2", KEY, "there"), ("h3", "3", "here")), 1
        )
    }  # fmt: skip
    topology = build_topology(Snapshot(revision=1, nodes=nodes, subnets=(ip_network("10.4.0.0/16"),)))
    await world.kernel.apply(PLAN)
    answerer = world.answerer(PLAN, topology)
    direct = Route(destination=ip_network("192.168.1.0/24"), device="eth0")
    ours = world.host.taken
    refused: set[IPAddress] = set()
    why = "Invalid argument"
    world.host.taken = lambda address, source: (
        why if address in refused else direct if address in direct.destination else ours(address, source)
    )
    assert (await answerer.answer(DiagnosticsRequest(tries=4))).routes == ()
    refused |= {far, near}
    rule = ForeignRule(version=4, priority=5, table=0, destination=ip_network("10.4.0.2/32"), refuses="blackhole")
    world.host.foreign_rules = (rule,)
    found = {route.address: route for route in (await answerer.answer(DiagnosticsRequest(tries=4))).routes}
    assert found == {
        "10.4.0.2": TakenRoute("10.4.0.2", "", f"none: Invalid argument, by {rule}", True),
        "192.168.1.3": TakenRoute("192.168.1.3", "", "none: Invalid argument", True),
    }
    # A rule of kind `unreachable` is answered as a missing route is.
    why = "Network is unreachable"
    assert "192.168.1.3" not in {taken.address for taken in (await answerer.answer(DiagnosticsRequest(tries=4))).routes}
    member = evolve(rule, destination=ip_network("192.168.1.3/32"), refuses="unreachable")
    world.host.foreign_rules = (rule, member)
    routes = (await answerer.answer(DiagnosticsRequest(tries=4))).routes
    assert TakenRoute("192.168.1.3", "", f"none: {why}, by {member}", True) in routes
    why, world.host.foreign_rules = "Invalid argument", (rule,)
    # What the plan itself refuses is no other program's doing.
    refusing = world.answerer(evolve(PLAN, refused={ip_network("10.4.0.2/32"): "h2 does not answer"}), topology)
    assert [route.address for route in (await refusing.answer(DiagnosticsRequest(tries=4))).routes] == ["192.168.1.3"]
    refused.clear()
    world.host.taken_by_wireguard = lambda address: "Network is unreachable"
    (endpoint,) = (await answerer.answer(DiagnosticsRequest(tries=4))).routes
    assert endpoint == TakenRoute("203.0.113.2", "", "none: Network is unreachable", True)
    world.sends = False
    assert (await answerer.answer(DiagnosticsRequest(tries=4))).routes == (), "a member sends by its leader"


async def test_what_goes_one_way_only_while_echo_requests_are_sent_is_counted(world: World) -> None:
    nodes = {
        name: Node(name=name, public_key=key, mesh_addresses=(ip_address(f"10.4.0.{number}"),))
        for number, (name, key) in enumerate((("h1", "1"), ("h2", KEY)), 1)
    }
    await world.kernel.apply(PLAN)
    answerer = world.answerer(PLAN, build_topology(Snapshot(revision=1, nodes=nodes)))
    counted: dict[str, tuple[int, int]] = {}

    def answered(address: IPAddress) -> bool:
        for key, (sent, received) in counted.items():
            peer = world.host.observed.peers[key]
            more = evolve(peer, tx_bytes=peer.tx_bytes + sent, rx_bytes=peer.rx_bytes + received)
            world.host.observed = evolve(world.host.observed, peers={**world.host.observed.peers, key: more})
        counted.clear()
        return False

    world.host.reach = answered
    for sent, received in ((0, 0), (1, 1), (1, 0), (0, 1)):
        counted[KEY] = sent, received
        response = await answerer.answer(DiagnosticsRequest(tries=4))
        assert response.unanswered_peers == ((KEY,) if sent > received else ())
        assert response.unsent_peers == ((KEY,) if sent < received else ())
        assert decode_diagnostics_response(encode(response)) == response


async def test_endpoints_that_go_through_the_tunnel_are_tried_if_a_request_names_them(world: World) -> None:
    endpoint, mine = ip_address("203.0.113.2"), ip_address("10.1.0.1")
    route = RoutePlan(destination=ip_network("203.0.113.2/32"), via=Via.TUNNEL, source=mine)
    nodes = {
        "h1": Node(name="h1", public_key="1", mesh_addresses=(ip_address("10.4.0.1"),)),
        "h2": Node(
            name="h2", public_key=KEY, mesh_addresses=(ip_address("10.4.0.2"),),
            endpoint=Endpoint.parse("203.0.113.2:51820"), underlay=(ip_network("203.0.113.0/24"),),
        ),
    }  # fmt: skip
    topology = build_topology(Snapshot(revision=1, nodes=nodes))
    plan = evolve(PLAN, encryption=Encryption(send={route.destination: route}))
    await world.kernel.apply(plan)
    world.host.reach = lambda address: address == endpoint
    request = DiagnosticsRequest(targets=("203.0.113.2", "203.0.113.3"))
    response = await world.answerer(plan, topology).answer(request)
    assert (response.reached, response.unreached) == (("203.0.113.2",), ())
    assert [(route.address, route.source) for route in response.routes] == [("203.0.113.2", "10.1.0.1")]
    assert (await world.answerer(plan, topology).answer(DiagnosticsRequest(tries=4))).reached == ()
    # In clear nobody is pinged at another's wish.
    for other in (PLAN, evolve(PLAN, encryption=Encryption())):
        assert (await world.answerer(other, topology).answer(request)).reached == ()


async def test_a_request_has_so_many_tried_and_no_more(world: World) -> None:
    nodes = (
        Node(name=f"h{number}", public_key=str(number), mesh_addresses=(ip_address("10.4.0.0") + number,))
        for number in range(1, 1001)
    )
    topology = build_topology(Snapshot(revision=1, nodes={node.name: node for node in nodes}))
    all_of_them = tuple(str(ip_address("10.4.0.0") + number) for number in range(2, 1001))
    response = await world.answerer(topology=topology).answer(DiagnosticsRequest(tries=10**9, targets=all_of_them))
    assert MOST_TRIED <= len(response.unreached) + len(response.reached) <= 2 * MOST_TRIED


async def test_requesting_again_after_etcd_was_away_and_an_invalid_request(world: World) -> None:
    client = world.etcd.client("desk")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.answerer().run)
        await trio.testing.wait_all_tasks_blocked()
        world.etcd.down()
        await trio.sleep(60)
        world.etcd.up()
        await trio.sleep(60)
        lease = await client.grant_lease(LEASE_SECONDS)
        await client.put(KEYS.request(lease.id), b"\xff what?", lease=lease.id)
        await client.put(KEYS.request(1), encode(DiagnosticsRequest()))  # without a lease: its answer would stay
        assert "h1" in await request_diagnostics(client, KEYS, ["h1"])
        nursery.cancel_scope.cancel()
    assert [key for key in world.etcd.keys("/") if "answers" in key] == []


async def test_an_agent_that_may_not_receive_requests_says_so_once_and_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def denied(*_: object) -> None:
        nonlocal tries
        tries += 1
        await trio.lowlevel.checkpoint()
        raise PermissionDenied("user h1 may not watch /kilo-status/requests/")

    monkeypatch.setattr(diagnostics, "serve", denied)
    with trio.move_on_after(100):
        await world.answerer().run()
    assert 3 <= tries <= 7
    assert world.log.getvalue().count("diagnostics requests of kgctl cannot be served") == 1


def test_answers_that_are_none() -> None:
    for text in ('{"tunnels": [["x"]]}', '{"tunnels": [[1, 2, 3, 4, 5]]}', '{"undone": -1}', "[]"):
        with pytest.raises(RecordError):
            decode_diagnostics_response(text.encode())
    with pytest.raises(RecordError, match="no whole number"):
        decode_diagnostics_response(encode(DiagnosticsResponse(tunnels=(Tunnel(KEY, -2, 0, 0, ""),))))
