"""An agent as a prober of a leader that does not forward, on an etcd and a kernel in memory, in virtual time.

h1 is at gcp with g1, which leads, and g2; home is elsewhere, with one host of that name. All but h1 are records.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
import trio
from agent_world import World, running
from attrs import evolve

from helpers import eventually, scaled
from kilo_etcd.agent.daemon import Daemon
from kilo_etcd.agent.diagnostics import QUIET_SECONDS
from kilo_etcd.agent.leadership import candidacy_policy
from kilo_etcd.agent.obstacle_watch import OBSTACLES_PAUSE
from kilo_etcd.agent.probing import probe_assignment
from kilo_etcd.agent.probing.baseline import OPEN_SECONDS, SETTLE_SECONDS
from kilo_etcd.agent.troubles import HostTrouble
from kilo_etcd.kernel.firewall.chains import Obstacle
from kilo_etcd.kernel.state import DeleteRoute, Route, SetPeer
from kilo_etcd.model import CandidateClass, Endpoint, IPAddress, Node
from kilo_etcd.runtime import key_file
from kilo_etcd.store.diagnostics import request_diagnostics
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, DiagnosticsRequest, NodeRecord, ProbeReportRecord, encode
from kilo_etcd.topology.segments import Segment, Topology

pytestmark = pytest.mark.autojump

KEYS = {name: key_file.public_key(key_file.generate()) for name in ("g1", "g2", "home", "next")}
MESH = {"g1": "10.4.0.51", "g2": "10.4.0.52", "home": "10.4.0.77", "next": "10.4.0.79"}
NEAR = {"g1": "192.168.1.51", "g2": "192.168.1.52"}
HOME = ip_address(MESH["home"])
REPORT = "/kilo/by/h1/probe-reports/gcp"
DETECTED = 2.0
"""Seconds within which a leader that does not forward is named."""


def node(world: World, name: str, location: str, internal: str, number: int) -> None:
    record = NodeRecord(
        public_key=KEYS[name],
        endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
        internal_ips=(ip_interface(internal),),
        location=location,
    )
    world.etcd.put(f"/kilo/by/{name}/addresses/{MESH[name]}", "")
    world.etcd.put(f"/kilo/by/{name}/node", encode(record))


def enter_candidacy(world: World, name: str, rank: CandidateClass = CandidateClass.PUBLIC) -> int:
    """Its candidacy's create revision."""
    world.etcd.put_kept(f"/kilo/by/{name}/elections/gcp", encode(CandidateRecord(rank=rank)))
    return world.etcd.revision


@pytest.fixture
def mesh(world: World) -> World:
    """All but h1 is there; h1 is going to be labelled gcp."""
    node(world, "g1", "gcp", "192.168.1.51/24", 51)
    node(world, "g2", "gcp", "192.168.1.52/24", 52)
    node(world, "home", "home", "192.168.7.2/24", 77)
    world.etcd.put("/kilo/locations/h1", "gcp")
    enter_candidacy(world, "g1")
    world.host.reach = lambda address: True
    world.host.shakes = lambda key: True
    return world


def report(world: World) -> dict[str, object] | None:
    value = world.etcd.get(REPORT)
    return None if value is None else json.loads(value)


async def settle(world: World) -> None:
    await eventually(lambda: world.etcd.get("/kilo/by/h1/elections/gcp") is not None, 30, every=0.1)
    await trio.sleep(5)


def says(world: World, prober: str, candidacy: int, **found: Any) -> None:
    record = ProbeReportRecord(leader="g1", candidacy=candidacy, **{"targets": ("home",), **found})
    world.etcd.put_kept(f"/kilo/by/{prober}/probe-reports/gcp", encode(record))


def keepalives(world: World) -> list[int | None]:
    return [
        change.persistent_keepalive
        for change in world.host.history
        if isinstance(change, SetPeer) and change.persistent_keepalive is not None
    ]


async def test_as_long_as_all_is_well_one_small_packet_goes_out_and_nothing_is_written(mesh: World) -> None:
    asked: list[IPAddress] = []

    def reach(address: IPAddress) -> bool:
        asked.append(address)
        return True

    mesh.host.reach = reach
    async with running(mesh) as daemon:
        await settle(mesh)
        await trio.sleep(600)  # Until members of the location are asked rarely.
        asked.clear()
        revision, written = mesh.etcd.revision, daemon.kernel.writes
        await trio.sleep(60)
        assert set(asked) == {HOME}
        assert 75 <= len(asked) <= 85, "one every 0.75 s"
        assert (mesh.etcd.revision, daemon.kernel.writes) == (revision, written)


async def test_a_leader_that_does_not_forward_is_named_and_demoted(mesh: World) -> None:
    async with running(mesh) as daemon:
        await settle(mesh)
        enter_candidacy(mesh, "g2", CandidateClass.REST)
        mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
        began = trio.current_time()
        await eventually(lambda: (report(mesh) or {}).get("canTakeOver"), DETECTED, every=0.01)
        found = report(mesh)
        assert found is not None
        assert {**found, "candidacy": 0} == {
            "leader": "g1",
            "candidacy": 0,
            "targets": ["home"],
            "leaderReachable": True,
            "membersReachable": False,
            "canTakeOver": True,
            "unconfirmed": False,
        }
        assert trio.current_time() - began < DETECTED
        assert keepalives(mesh) == [5], "the handshake was asked for"
        assert daemon.state.role is not None
        assert daemon.state.role.leader == "g1", "one prober is none"
        says(mesh, "g2", int(str(found["candidacy"])), leader_reachable=True)
        await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "h1", 1, every=0.01)
        await trio.sleep(1)
        assert report(mesh) is not None, "without it the one demoted would lead again"
        # The one demoted has seen it, and stands anew.
        mesh.etcd.delete("/kilo/by/g1/elections/gcp")
        enter_candidacy(mesh, "g1", CandidateClass.DEMOTED)
        await eventually(lambda: report(mesh) is None, 5, every=0.1)
        assert daemon.state.role.leader == "h1"
        await eventually(lambda: keepalives(mesh)[-1] == 0, 5, every=0.1)
        assert mesh.logged("warning a leader does not forward") == 1


async def test_echo_requests_that_are_lost_while_kgctl_sends_many_are_no_sign(mesh: World) -> None:
    """Firewalls may take a limited number of them."""
    async with running(mesh) as daemon:
        await settle(mesh)
        mesh.host.reach = lambda address: False
        for _ in range(4):
            await daemon.diagnostics.answer(DiagnosticsRequest(tries=64))
        assert report(mesh) is None
        mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
        await eventually(lambda: report(mesh), QUIET_SECONDS + DETECTED, every=0.01)


async def test_the_other_candidates_probe_on_the_report_of_the_first(mesh: World) -> None:
    enter_candidacy(mesh, "g2")
    candidacy = mesh.etcd.data[b"/kilo/by/g1/elections/gcp"].create_revision
    async with running(mesh):
        await settle(mesh)
        mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
        await trio.sleep(5)
        assert report(mesh) is None, "g2 is next in line, and it is for g2 to notice"
        says(mesh, "g2", candidacy, leader_reachable=True)
        await eventually(lambda: report(mesh) is not None, 1, every=0.01)
        assert not (report(mesh) or {}).get("canTakeOver"), "home knows g2, who is next, and not h1"
        mesh.host.reach = lambda address: True
        await eventually(lambda: report(mesh) is None, 2, every=0.1)


@pytest.mark.parametrize("shakes", [True, False])
async def test_a_report_that_nobody_confirms_says_so_and_counts_once_somebody_does_and_a_handshake_is_shown(
    mesh: World, shakes: bool
) -> None:
    """The way from h1 to its leader may be what is broken."""
    async with running(mesh) as daemon:
        await settle(mesh)
        enter_candidacy(mesh, "g2", CandidateClass.REST)
        mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
        await eventually(lambda: (report(mesh) or {}).get("canTakeOver"), DETECTED, every=0.01)
        await trio.sleep(OPEN_SECONDS - 2)
        assert (report(mesh) or {}).get("unconfirmed") is False
        await eventually(lambda: (report(mesh) or {}).get("unconfirmed"), 4, every=0.1)
        assert not (report(mesh) or {}).get("canTakeOver"), "home forgets it"
        await eventually(lambda: keepalives(mesh)[-1] == 0, 5, every=0.1)
        revision = mesh.etcd.data[REPORT.encode()].mod_revision
        await trio.sleep(60)
        assert mesh.etcd.data[REPORT.encode()].mod_revision == revision, "it stays, and is not written again"
        mesh.host.shakes = lambda key: shakes
        says(mesh, "g2", int(str((report(mesh) or {})["candidacy"])), leader_reachable=True)
        if shakes:
            await eventually(
                lambda: daemon.state.role is not None and daemon.state.role.leader == "h1", DETECTED, every=0.01
            )
        else:
            await trio.sleep(60)
            assert daemon.state.role is not None
            assert daemon.state.role.leader == "g1", "h1 reaches nobody any more"


async def test_when_the_far_end_is_down_nobody_can_do_better(mesh: World) -> None:
    async with running(mesh) as daemon:
        await settle(mesh)
        mesh.host.reach = lambda address: address != HOME
        mesh.host.shakes = lambda key: False
        await eventually(lambda: report(mesh) is not None, DETECTED, every=0.01)
        found = report(mesh)
        assert found is not None
        assert not found["canTakeOver"]
        says(mesh, "g2", int(str(found["candidacy"])), leader_reachable=True)
        await trio.sleep(200)
        assert daemon.state.role is not None
        assert daemon.state.role.leader == "g1"
        # When it is back nothing is said any more.
        mesh.host.reach = lambda address: True
        await eventually(lambda: report(mesh) is None, 10, every=0.1)


async def test_if_a_path_is_open_again_for_all_no_takeover_check_counts(mesh: World) -> None:
    async with running(mesh) as daemon:
        await settle(mesh)
        candidacy = mesh.etcd.data[b"/kilo/by/g1/elections/gcp"].create_revision
        turns = scaled(40, 8)
        for turn in range(turns):
            mesh.host.reach = lambda address: address != HOME
            mesh.host.shakes = lambda key: False
            await eventually(lambda: report(mesh) is not None, 3, every=0.01)
            says(mesh, "g2", candidacy, leader_reachable=True)
            await trio.sleep(6 + turn / turns * 1.5)
            mesh.host.reach = lambda address: True
            mesh.host.shakes = lambda key: True
            home = KEYS["home"]
            if mesh.host.observed.peers[home].persistent_keepalive:
                mesh.host.receive_from(home)
            await trio.sleep(0.5)
            mesh.etcd.delete("/kilo/by/g2/probe-reports/gcp")
            await eventually(lambda: report(mesh) is None, 3, every=0.01)
            await trio.sleep(2)
        assert mesh.logged("leader elected") == 1
        assert daemon.state.role is not None
        assert daemon.state.role.leader == "g1"


async def test_when_the_far_end_has_another_leader_the_word_is_taken_back_and_the_watch_goes_on(mesh: World) -> None:
    node(mesh, "next", "home", "192.168.7.3/24", 79)
    for name in ("home", "next"):
        mesh.etcd.put_kept(f"/kilo/by/{name}/elections/home", encode(CandidateRecord(rank=CandidateClass.PUBLIC)))
    async with running(mesh):
        await settle(mesh)
        mesh.host.reach = lambda address: address != HOME
        mesh.host.shakes = lambda key: False
        await eventually(lambda: report(mesh) is not None, DETECTED, every=0.01)
        mesh.etcd.delete("/kilo/by/home/elections/home")
        await eventually(lambda: report(mesh) is None, DETECTED, every=0.01)
        await trio.sleep(20)
        mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
        await eventually(lambda: report(mesh) is not None, DETECTED, every=0.01)
        assert (report(mesh) or {})["targets"] == ["next"]


async def test_an_answer_by_way_of_the_successor_takes_nothing_back(mesh: World) -> None:
    enter_candidacy(mesh, "g2")
    candidacy = mesh.etcd.data[b"/kilo/by/g1/elections/gcp"].create_revision

    def reach(address: IPAddress) -> bool:
        gateway = mesh.host.observed.routes[ip_network("10.4.0.0/16")].gateway
        return address == ip_address(NEAR["g1"]) or gateway == ip_address(NEAR["g2"])

    async with running(mesh) as daemon:
        await settle(mesh)
        mesh.host.reach = reach
        moments = scaled(20, 7)
        for moment in range(moments):
            says(mesh, "g2", candidacy, leader_reachable=True)
            await eventually(lambda: report(mesh) is not None, DETECTED, every=0.01)
            await trio.sleep(1 + moment / moments * 1.4)
            says(mesh, "g2", candidacy, leader_reachable=True, can_take_over=True)
            await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "g2", 1, every=0.001)
            for _ in range(300):
                await trio.sleep(0.01)
                assert daemon.state.role is not None
                assert daemon.state.role.leader == "g2", f"it led again, {moment}"


async def test_an_old_handshake_does_not_count_whatever_the_clock_says(mesh: World) -> None:
    async with running(mesh):
        await settle(mesh)
        mesh.host.shakes = lambda key: False
        mesh.host.receive_from(KEYS["home"], when=trio.current_time() + 3600)  # since then it was restored
        mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
        await eventually(lambda: report(mesh) is not None, DETECTED, every=0.01)
        await trio.sleep(30)
        assert not (report(mesh) or {})["canTakeOver"]


async def test_a_switch_to_a_full_mesh_ends_what_is_said(mesh: World) -> None:
    async with running(mesh):
        await settle(mesh)
        mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
        await eventually(lambda: report(mesh) is not None, DETECTED, every=0.01)
        mesh.etcd.put("/kilo/mesh/granularity", "full")
        await eventually(lambda: report(mesh) is None, 1, every=0.01)


async def test_a_link_that_loses_a_fifth_of_its_packets_causes_no_probe_report(mesh: World) -> None:
    chance = random.Random(5)
    mesh.host.reach = lambda address: chance.random() < 0.8 * 0.8
    async with running(mesh) as daemon:
        await settle(mesh)
        revision = mesh.etcd.revision
        await trio.sleep(scaled(3600, 600))
        assert mesh.etcd.revision == revision
        assert daemon.state.role is not None
        assert daemon.state.role.leader == "g1"


async def test_a_target_that_never_answered_does_not_count(mesh: World) -> None:
    asked: list[IPAddress] = []

    def nobody(address: IPAddress) -> bool:
        asked.append(address)
        return False

    # Members that never answered would not be sent anything at all.
    mesh.host.reach = lambda address: address not in ip_network("10.4.0.0/16")
    async with running(mesh):
        await settle(mesh)
        mesh.host.reach = nobody
        await trio.sleep(100)
        asked.clear()
        await trio.sleep(300)
        assert report(mesh) is None
        assert set(asked) == {HOME, *map(ip_address, (*NEAR.values(), MESH["g2"]))}
        assert mesh.logged("no host elsewhere has ever answered an echo request through the leader g1") == 1
        status = json.loads(mesh.etcd.get("/kilo-status/by/h1/status") or b"")
        assert any("let ICMP echo pass" in error for error in status["errors"])
        mesh.host.reach = lambda address: True
        await eventually(lambda: mesh.logged("no longer: no host elsewhere has ever answered") == 1, 10, every=0.1)
        status = json.loads(mesh.etcd.get("/kilo-status/by/h1/status") or b"")
        assert not any("no host elsewhere" in error for error in status.get("errors", ()))


async def test_a_leader_that_never_forwarded_is_reported_and_demoted_once_a_target_confirms_it(mesh: World) -> None:
    mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
    async with running(mesh) as daemon:
        # A location of two, and an agent that starts while the leader is bad already.
        await eventually(lambda: daemon.state.role is not None and daemon.state.role.kind == "member", 5, every=0.01)
        await eventually(lambda: mesh.etcd.get("/kilo/by/h1/elections/gcp") is not None, 30, every=0.01)
        began = trio.current_time()
        found = await eventually(lambda: report(mesh), DETECTED, every=0.01)
        assert (found["leaderReachable"], found["canTakeOver"]) == (True, False)
        await trio.sleep(0.4)
        assert not (report(mesh) or {}).get("canTakeOver"), "nobody has confirmed it"
        says(mesh, "home", int(str(found["candidacy"])), leader_reachable=True, targets=("h1",))
        await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "h1", 1, every=0.01)
        assert trio.current_time() - began < DETECTED + 0.5


async def test_a_report_without_a_baseline_that_nobody_confirms_is_taken_back_and_made_seldom(mesh: World) -> None:
    """The far end filters echo requests: it shakes hands, and finds a way back."""
    mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
    async with running(mesh) as daemon:
        await settle(mesh)
        enter_candidacy(mesh, "g2", CandidateClass.REST)
        await eventually(lambda: report(mesh) is None, OPEN_SECONDS + 2, every=0.1)
        made: list[float] = []
        turns = scaled(12_000, 4_000)
        for _ in range(turns):
            if report(mesh) is not None and (not made or trio.current_time() - made[-1] > OPEN_SECONDS + 1):
                made.append(trio.current_time())
            await trio.sleep(0.3)
        assert daemon.state.role is not None
        assert daemon.state.role.leader == "g1"
        # Ever more seldom: after half a minute, 1, 2, 4 and 8 minutes, then each 10; 5 in the first 20 minutes.
        assert 5 <= len(made) <= 6 + turns * 0.3 / 600, made
        assert mesh.logged("although they have handshakes with this host directly") == 1


async def test_a_blocked_port_counts_without_a_baseline_once_tunnels_have_had_their_time(mesh: World) -> None:
    """The leader does not answer the target either."""
    mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
    async with running(mesh) as daemon:
        found = await eventually(lambda: report(mesh), 40, every=0.01)
        began = trio.current_time()
        says(mesh, "home", int(str(found["candidacy"])), targets=("h1",))
        await trio.sleep(SETTLE_SECONDS - 1)
        assert daemon.state.role is not None
        assert daemon.state.role.leader == "g1"
        await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "h1", 3, every=0.01)
        assert trio.current_time() - began >= SETTLE_SECONDS - 0.1


async def test_who_would_drop_forwarded_packets_itself_does_not_take_over(mesh: World) -> None:
    mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
    mesh.host.obstacles = (Obstacle("the firewall drops what this host forwards"),)
    async with running(mesh) as daemon:
        found = await eventually(lambda: report(mesh), 40, every=0.01)
        says(mesh, "home", int(str(found["candidacy"])), leader_reachable=True, targets=("h1",))
        await trio.sleep(20)
        assert daemon.state.role is not None
        assert daemon.state.role.leader == "g1"
        assert mesh.logged("the firewall drops what this host forwards") == 0, "it does not forward as yet"
        mesh.host.obstacles = ()
        mesh.etcd.delete("/kilo/by/home/probe-reports/gcp")
        found = await eventually(lambda: report(mesh), 120, every=0.01)
        says(mesh, "home", int(str(found["candidacy"])), leader_reachable=True, targets=("h1",))
        await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "h1", 3, every=0.01)
        # As the leader it says so at once.
        assert mesh.metrics.health() is None
        mesh.host.obstacles = (Obstacle("the firewall drops what this host forwards"),)
        await eventually(lambda: mesh.logged("error   the firewall drops what this host forwards") == 1, 40, every=0.1)
        assert mesh.metrics.health() == "the firewall drops what this host forwards"
        mesh.host.obstacles = ()
        await eventually(lambda: mesh.metrics.health() is None, 40, every=0.1)


async def test_who_drops_only_some_of_what_it_would_forward_takes_over_all_the_same(mesh: World) -> None:
    """IPv6, say, or what strangers begin: as the gateway of a location it is better than none."""
    mesh.host.obstacles = (Obstacle("the firewall drops what this host forwards", blocked=frozenset({6})),)
    async with running(mesh) as daemon:
        await settle(mesh)
        await trio.sleep(5)
        mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
        found = await eventually(lambda: report(mesh), DETECTED, every=0.01)
        says(mesh, "home", int(str(found["candidacy"])), leader_reachable=True, targets=("h1",))
        await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "h1", 5, every=0.01)


async def test_one_of_several_that_falls_silent_does_not_count_either(mesh: World) -> None:
    KEYS.setdefault("away", key_file.public_key(key_file.generate()))
    MESH["away"] = "10.4.0.78"
    node(mesh, "away", "away", "192.168.8.2/24", 78)
    async with running(mesh):
        await settle(mesh)
        mesh.host.reach = lambda address: address != HOME
        await trio.sleep(100)
        assert report(mesh) is None


async def test_a_prober_checks_itself_first(mesh: World) -> None:
    async with running(mesh):
        await settle(mesh)
        route = next(route for route in mesh.host.observed.routes.values() if route.destination.prefixlen == 16)
        mesh.host.reach = lambda address: False
        listeners, mesh.host._listeners = mesh.host._listeners, []  # nobody tells of it
        mesh.host.tamper([DeleteRoute(route)])
        mesh.host._listeners = listeners
        await trio.sleep(1.9)
        assert route.destination in mesh.host.observed.routes, "it was found, and restored"
        assert report(mesh) is None


@pytest.mark.parametrize("answer", [Route(destination=ip_network("10.4.0.0/16"), device="lo"), "No route to host"])
async def test_a_prober_whose_packets_another_rule_leads_elsewhere_reports_nobody(
    mesh: World, answer: Route | str
) -> None:
    """A broken member must not take leadership from a leader that forwards."""
    async with running(mesh):
        await settle(mesh)
        mesh.host.reach = lambda address: False
        mesh.host.taken = lambda address, source: answer
        await trio.sleep(20)
        assert report(mesh) is None
        mesh.host.taken = mesh.host._own_route
        await eventually(lambda: report(mesh) is not None, 10, every=0.1)


async def test_a_prober_that_nobody_reaches_at_its_own_mesh_address_reports_nobody(mesh: World) -> None:
    """Its own packet filter drops them, say: others of its location answer it on their network, and not in the mesh."""
    reach = mesh.host.reach
    async with running(mesh):
        await settle(mesh)
        near = {ip_address(address) for address in NEAR.values()}
        mesh.host.reach = lambda address: address in near
        await trio.sleep(20)
        assert mesh.logged("a leader does not forward") == 0
        mesh.host.reach = lambda address: address in near or address == ip_address(MESH["g2"])
        await eventually(lambda: report(mesh) is not None, 10, every=0.1)
        # It has been so only since.
        mesh.host.reach = lambda address: address in near
        await eventually(lambda: report(mesh) is None, 10, every=0.1)
        mesh.host.reach = reach


async def test_requests_that_were_sent_before_a_host_was_as_planned_again_count_for_nothing(mesh: World) -> None:
    async with running(mesh):
        await settle(mesh)
        reach = mesh.host.reach
        for after in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            mesh.host.reach = lambda address: False
            mesh.host.taken = lambda address, source: "No route to host"
            await trio.sleep(20 + after)
            # The leader follows what has changed about this host a moment later.
            mesh.host.taken = mesh.host._own_route
            await trio.sleep(0.4)
            mesh.host.reach = reach
            await trio.sleep(5)
            assert mesh.logged("a leader does not forward") == 0, after


async def test_a_host_that_may_not_ping_says_so_once_and_goes_on(mesh: World) -> None:
    mesh.host.no_pings = "this process may not ping"
    async with running(mesh) as daemon:
        await settle(mesh)
        await trio.sleep(300)
        assert mesh.logged("cannot probe") == 1
        assert daemon.state.role is not None
        mesh.host.no_pings = None
        await eventually(lambda: mesh.logged("can probe again") == 1, 70, every=1)


async def test_a_host_that_may_ping_no_more_in_the_midst_of_a_suspicion_goes_on_too(mesh: World) -> None:
    async with running(mesh) as daemon:
        await settle(mesh)

        def silent(address: object) -> bool:
            mesh.host.no_pings = "this process may not ping"
            return False

        mesh.host.reach = silent
        await eventually(lambda: mesh.logged("cannot probe") == 1, 5, every=0.1)
        await trio.sleep(100)
        assert daemon.state.role is not None
        assert mesh.logged("cannot probe") == 1


async def test_a_host_that_may_not_ping_goes_on_if_others_suspect_the_leader_too(mesh: World) -> None:
    enter_candidacy(mesh, "g2")
    candidacy = mesh.etcd.data[b"/kilo/by/g1/elections/gcp"].create_revision
    mesh.host.no_pings = "this process may not ping"
    async with running(mesh) as daemon:
        await settle(mesh)
        says(mesh, "g2", candidacy, leader_reachable=True)
        await eventually(lambda: mesh.logged("cannot probe") == 1, 1, every=0.01)
        await trio.sleep(100)
        assert daemon.state.role is not None
        assert report(mesh) is None


async def test_without_probes_nothing_is_tried(mesh: World) -> None:
    asked: list[IPAddress] = []

    def reach(address: IPAddress) -> bool:
        asked.append(address)
        return False

    mesh.host.reach = reach
    async with running(mesh, probe=False):
        await settle(mesh)
        assert asked == []


async def test_a_prober_that_ends_in_order_takes_its_report_away(mesh: World) -> None:
    async with running(mesh):
        await settle(mesh)
        mesh.host.reach = lambda address: address == ip_address(NEAR["g1"])
        await eventually(lambda: (report(mesh) or {}).get("canTakeOver"), DETECTED, every=0.01)
    assert report(mesh) is None


# -- of another location ----------------------------------------------------------------------------------------------


async def test_a_leader_elsewhere_that_is_named_tries_back(world: World) -> None:
    node(world, "g1", "gcp", "10.9.1.51/24", 51)
    node(world, "g2", "gcp", "10.9.1.52/24", 52)
    candidacy = enter_candidacy(world, "g1")
    enter_candidacy(world, "g2")
    answering = {ip_address(MESH["g1"])}
    world.host.reach = lambda address: address in answering
    async with running(world):
        await trio.sleep(5)
        record = ProbeReportRecord(leader="g1", candidacy=candidacy, targets=("h1",), leader_reachable=True)
        world.etcd.put_kept("/kilo/by/g2/probe-reports/gcp", encode(record))
        await eventually(lambda: report(world) is not None, 1, every=0.01)
        assert report(world) == {
            "leader": "g1",
            "candidacy": candidacy,
            "targets": ["g2"],
            "leaderReachable": True,
            "membersReachable": False,
            "canTakeOver": False,
            "unconfirmed": False,
        }
        answering.add(ip_address(MESH["g2"]))
        await eventually(lambda: report(world) is None, 2, every=0.1)
        answering.clear()
        await eventually(lambda: report(world) is not None, 2, every=0.1)
        world.etcd.delete("/kilo/by/g2/probe-reports/gcp")
        await eventually(lambda: report(world) is None, 1, every=0.1)


async def test_those_who_were_called_do_not_keep_each_others_words_in_force(world: World) -> None:
    node(world, "g1", "gcp", "10.9.1.51/24", 51)
    node(world, "g2", "gcp", "10.9.1.52/24", 52)
    node(world, "home", "home", "10.9.2.52/24", 77)
    candidacy = enter_candidacy(world, "g1")
    enter_candidacy(world, "g2")
    async with running(world):
        await trio.sleep(5)
        record = ProbeReportRecord(leader="g1", candidacy=candidacy, targets=("h1", "home"), leader_reachable=True)
        world.etcd.put_kept("/kilo/by/g2/probe-reports/gcp", encode(record))
        await eventually(lambda: report(world) is not None, 1, every=0.01)
        world.etcd.put_kept("/kilo/by/home/probe-reports/gcp", encode(evolve(record, targets=("g2",))))
        world.etcd.delete("/kilo/by/g2/probe-reports/gcp")
        await eventually(lambda: report(world) is None, 1, every=0.01)


# -- the suspected
# ------------------------------------------------------------------------------------------------------


async def report_leader(mesh: World, daemon: Daemon) -> None:
    """g1 and g2 come to stand beside h1, which leads, and say that it does not forward; g1 leads then."""
    enter_candidacy(mesh, "g1", CandidateClass.REST)
    enter_candidacy(mesh, "g2", CandidateClass.REST)
    own = mesh.etcd.data[b"/kilo/by/h1/elections/gcp"].create_revision
    for prober in ("g1", "g2"):
        found = ProbeReportRecord(
            leader="h1", candidacy=own, targets=("home",), leader_reachable=True, can_take_over=prober == "g1"
        )
        mesh.etcd.put_kept(f"/kilo/by/{prober}/probe-reports/gcp", encode(found))
    await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "g1", 1, every=0.01)


async def demote(mesh: World, daemon: Daemon) -> None:
    """Have h1 lead, be demoted on the reports of g1 and g2, and stand again, with the reports withdrawn."""
    await settle(mesh)
    await report_leader(mesh, daemon)
    await settle(mesh)
    for prober in ("g1", "g2"):
        mesh.etcd.delete(f"/kilo/by/{prober}/probe-reports/gcp")


async def test_a_demoted_leader_is_behind_everyone_for_a_while(mesh: World) -> None:
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    async with running(mesh) as daemon:
        await settle(mesh)
        assert daemon.state.role is not None
        assert daemon.state.role.leader == "h1"
        await report_leader(mesh, daemon)
        await eventually(lambda: mesh.etcd.get("/kilo/by/h1/elections/gcp") is None, 1, every=0.01)
        await settle(mesh)
        record = json.loads(mesh.etcd.get("/kilo/by/h1/elections/gcp") or b"")
        assert record["rank"] == CandidateClass.DEMOTED
        status = json.loads(mesh.etcd.get("/kilo-status/by/h1/status") or b"")
        (error,) = status["errors"]
        assert error.startswith(
            "this host was demoted as leader: g1 and g2 found no way through it, to home for instance"
        )
        assert "ip rule; ip route get MESH-ADDRESS" in error
        assert "restart the agent to clear it now: systemctl restart kilo-etcd" in error
        assert "h1" not in error, "whoever shows it names the host"
        assert mesh.logged("demoted as leader") == 1
        for prober in ("g1", "g2"):
            mesh.etcd.delete(f"/kilo/by/{prober}/probe-reports/gcp")
        await trio.sleep(candidacy_policy.HOLD_DOWN_SECONDS + 10)
        record = json.loads(mesh.etcd.get("/kilo/by/h1/elections/gcp") or b"")
        assert record["rank"] != CandidateClass.DEMOTED
        assert daemon.state.role.leader == "g1"
        await eventually(lambda: mesh.logged("candidacy is as before") == 1, 30, every=1)


async def test_that_a_host_was_demoted_is_no_error_where_it_leads_nobody(mesh: World) -> None:
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")

    def errors() -> list[str]:
        return list(json.loads(mesh.etcd.get("/kilo-status/by/h1/status") or b"{}").get("errors", ()))

    async with running(mesh) as daemon:
        await demote(mesh, daemon)
        await eventually(lambda: any("demoted" in error for error in errors()), 5, every=0.01)
        mesh.etcd.put_kept("/kilo/locations/h1", b"elsewhere")
        await eventually(lambda: not any("demoted" in error for error in errors()), 5, every=0.01)


async def test_a_demoted_leader_whose_firewall_goes_is_a_candidate_as_before(mesh: World) -> None:
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    mesh.host.obstacles = (Obstacle("the firewall drops what this host forwards"),)
    async with running(mesh) as daemon:
        await demote(mesh, daemon)
        await trio.sleep(30)
        assert json.loads(mesh.etcd.get("/kilo/by/h1/elections/gcp") or b"")["rank"] == CandidateClass.DEMOTED
        assert daemon.troubles.of(HostTrouble.FORWARDING) == ("the firewall drops what this host forwards",), (
            "the operator has to know"
        )
        mesh.host.obstacles = ()

        def as_before() -> bool:
            return bool(json.loads(mesh.etcd.get("/kilo/by/h1/elections/gcp") or b"")["rank"] != CandidateClass.DEMOTED)

        await eventually(as_before, 20, every=0.1)
        await eventually(lambda: daemon.troubles.of(HostTrouble.FORWARDING) == (), 20, every=0.1)


async def test_a_network_that_is_cut_off_is_named_and_when_somebody_asks_looked_at_again(mesh: World) -> None:
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    network = ip_network("172.20.1.0/24")
    mesh.host.obstacles = (
        Obstacle("its network is cut off", networks=(network,), leading=False),
        Obstacle("it drops what is for another", networks=(network,)),
    )
    async with running(mesh) as daemon:
        await eventually(lambda: len(daemon.troubles.of(HostTrouble.DROPPED_NETWORKS)) == 2, 20, every=0.1)
        assert daemon.troubles.of(HostTrouble.FORWARDING) == (), "others get through"
        mesh.host.obstacles = ()
        await request_diagnostics(mesh.etcd.client("desk"), Keys(), ["h1"], tries=1)
        await eventually(lambda: daemon.troubles.of(HostTrouble.DROPPED_NETWORKS) == (), OBSTACLES_PAUSE + 1, every=0.1)


async def test_a_plan_that_does_not_forward_ends_no_hold_down(mesh: World) -> None:
    """The mesh is full for a while, so each host is a segment of its own; the firewall is what it was."""
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    mesh.host.obstacles = (Obstacle("the firewall drops what this host forwards"),)
    async with running(mesh) as daemon:
        await demote(mesh, daemon)
        await trio.sleep(20)
        mesh.etcd.put("/kilo/mesh/granularity", "full")
        await eventually(lambda: daemon.state.plan is not None and not daemon.state.plan.forwarding, 5, every=0.1)
        await trio.sleep(30)
        assert daemon.troubles.of(HostTrouble.FORWARDING) == ()
        mesh.etcd.put("/kilo/mesh/granularity", "location")
        await eventually(lambda: daemon.state.plan is not None and bool(daemon.state.plan.forwarding), 5, every=0.1)
        await trio.sleep(30)
        assert json.loads(mesh.etcd.get("/kilo/by/h1/elections/gcp") or b"")["rank"] == CandidateClass.DEMOTED


async def test_the_suspect_checks_itself(mesh: World) -> None:
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    async with running(mesh):
        await settle(mesh)
        mesh.host.reach = lambda address: False
        route = next(route for route in mesh.host.observed.routes.values() if route.destination.prefixlen == 16)
        listeners, mesh.host._listeners = mesh.host._listeners, []
        mesh.host.tamper([DeleteRoute(route)])
        mesh.host._listeners = listeners
        own = mesh.etcd.data[b"/kilo/by/h1/elections/gcp"].create_revision
        mesh.etcd.put_kept(
            "/kilo/by/g2/probe-reports/gcp", encode(ProbeReportRecord(leader="h1", candidacy=own, targets=("home",)))
        )
        await eventually(lambda: route.destination in mesh.host.observed.routes, 1, every=0.01)


def test_each_time_within_a_while_it_is_twice_as_long() -> None:
    first = candidacy_policy.HoldDown().again(100.0)
    assert first.until == 100.0 + candidacy_policy.HOLD_DOWN_SECONDS
    second = first.again(first.until + 10)
    assert second.seconds == 2 * first.seconds
    assert second.again(second.until + second.seconds + 1).seconds == candidacy_policy.HOLD_DOWN_SECONDS
    longest = first
    for _ in range(10):
        longest = longest.again(longest.until)
    assert longest.seconds == candidacy_policy.HOLD_DOWN_MOST


def test_the_probe_packets_stay_below_a_kilobit_a_second() -> None:
    # 20 of IPv4, 8 of ICMP, 4 of ours; WireGuard pads to 16 and adds 32, UDP and IPv4 28.
    assert (20 + 8 + 4 + 32 + 28) * 8 / probe_assignment.PERIOD < 1000


async def test_a_host_that_has_nobody_to_try_chooses_nobody(mesh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_candidacy(mesh, "g2")
    chosen: list[str] = []

    def targets(topology: Topology, segment: Segment, own: Node, reported: Collection[str]) -> tuple[Node, ...]:
        chosen.append(own.name)
        return ()

    monkeypatch.setattr(probe_assignment, "_targets", targets)
    async with running(mesh):
        await settle(mesh)
        assert chosen == [], "g2 is next in line"
        mesh.etcd.delete("/kilo/by/g2/elections/gcp")
        await trio.sleep(1)
        assert set(chosen) == {"h1"}


async def test_who_leads_all_the_same_takes_its_class_up_again_in_its_place(mesh: World) -> None:
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    async with running(mesh) as daemon:
        await settle(mesh)
        await report_leader(mesh, daemon)
        await settle(mesh)
        for node_name in ("g1", "g2"):
            mesh.etcd.delete(f"/kilo/by/{node_name}/elections/gcp")
            mesh.etcd.delete(f"/kilo/by/{node_name}/probe-reports/gcp")
        await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "h1", 1, every=0.01)
        behind = mesh.etcd.data[b"/kilo/by/h1/elections/gcp"]
        assert json.loads(behind.value)["rank"] == CandidateClass.DEMOTED
        await trio.sleep(candidacy_policy.HOLD_DOWN_SECONDS + 5)
        now = mesh.etcd.data[b"/kilo/by/h1/elections/gcp"]
        assert json.loads(now.value)["rank"] == CandidateClass.REST
        assert now.create_revision == behind.create_revision


async def test_the_operators_choice_ends_it(mesh: World) -> None:
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    async with running(mesh) as daemon:
        await settle(mesh)
        await report_leader(mesh, daemon)
        await settle(mesh)
        mesh.etcd.put("/kilo/annotations/h1/leader", "true")
        await eventually(lambda: daemon.state.role is not None and daemon.state.role.leader == "h1", 10, every=0.1)


async def test_a_restart_of_its_agent_clears_a_demotion(mesh: World) -> None:
    mesh.etcd.delete("/kilo/by/g1/elections/gcp")
    async with running(mesh) as daemon:
        await demote(mesh, daemon)
        await trio.sleep(5)
        assert b"demoted" in (mesh.etcd.get("/kilo-status/by/h1/status") or b"")
    async with running(mesh):
        await settle(mesh)
        assert json.loads(mesh.etcd.get("/kilo/by/h1/elections/gcp") or b"")["rank"] != CandidateClass.DEMOTED
        assert b"demoted" not in (mesh.etcd.get("/kilo-status/by/h1/status") or b"demoted")
