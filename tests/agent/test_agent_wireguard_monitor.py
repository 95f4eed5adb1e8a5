"""An agent that listens to its own WireGuard, on an etcd and a kernel in memory, in virtual time."""

from __future__ import annotations

import base64
import json
import random
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, ClassVar, cast

import pytest
import trio
from agent_world import PRIVATE, World, running
from attrs import evolve

from helpers import eventually, scaled
from kilo_etcd.agent.nat.nat_traversal import PATIENCE
from kilo_etcd.agent.nat.wireguard_monitor import WireGuardMonitor
from kilo_etcd.kernel import KernelError
from kilo_etcd.kernel.state import HostAddress, ObservedPeer, PeerActivity, SetPeer
from kilo_etcd.model import Endpoint, Node, Snapshot
from kilo_etcd.model.hostplan import HostPlan, PeerPlan
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.runtime.set_back import SetBack
from kilo_etcd.store.records import NodeRecord, ObservedEndpointRecord, encode

pytestmark = pytest.mark.autojump

HOME = key_file.public_key(key_file.generate())
PHONE = key_file.public_key(key_file.generate())
SEEN, MOVED = Endpoint.parse("198.51.100.1:40001"), Endpoint.parse("198.51.100.1:40777")


def public(world: World) -> None:
    world.facts = HostFacts(
        hostname="h1",
        addresses=(
            HostAddress(interface="eth0", index=2, address=ip_interface("192.168.1.1/24")),
            HostAddress(interface="eth0", index=2, address=ip_interface("203.0.113.1/24")),
        ),
    )


def home(world: World, keepalive: int = 25, epoch: int | None = None) -> None:
    """Another host, behind another NAT."""
    record = NodeRecord(
        public_key=HOME,
        endpoint=Endpoint.parse("192.168.7.2:51820"),
        internal_ips=(ip_interface("192.168.7.2/24"),),
        location="home",
        persistent_keepalive=keepalive,
        handshake_epoch=epoch,
    )
    world.etcd.put("/kilo/by/home/addresses/10.4.0.77", "")
    world.etcd.put("/kilo/by/home/node", encode(record))


def phone(world: World) -> None:
    record = {"publicKey": PHONE, "allowedIPs": ["10.9.0.1/32"], "persistentKeepalive": 25}
    world.etcd.put("/kilo/peers/phone", json.dumps(record))


def told(world: World) -> dict[str, str]:
    keys = world.etcd.keys("/kilo/by/", "/endpoints/")
    return {key.split("/")[5]: json.loads(world.etcd.get(key) or b"")["endpoint"] for key in keys}


def observers(world: World, *names: str) -> None:
    """Public nodes, each in a location of its own."""
    for name in names:
        if f"/kilo/by/{name}/node" in world.etcd:
            continue
        number = 100 + ord(name[-1]) % 100
        record = NodeRecord(
            public_key=base64.b64encode(bytes([number]) * 32).decode(),
            endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
            location=name,
        )
        world.etcd.put(f"/kilo/by/{name}/addresses/10.4.9.{number}", "")
        world.etcd.put(f"/kilo/by/{name}/node", encode(record))


def sees(world: World, observer: str, endpoint: Endpoint, key: str = HOME, name: str = "home") -> None:
    """What a public node says of another, or of a peer."""
    observers(world, observer)
    world.etcd.put_kept(
        f"/kilo/by/{observer}/endpoints/{name}", encode(ObservedEndpointRecord(public_key=key, endpoint=endpoint))
    )


def endpoint(world: World, key: str = HOME) -> Endpoint | None:
    return world.host.observed.peers[key].endpoint


def errors(world: World) -> list[str]:
    found: list[str] = json.loads(world.etcd.get("/kilo-status/by/h1/status") or b"{}").get("errors", [])
    return found


async def test_what_a_public_host_hears_is_told_once_followed_and_taken_back(world: World) -> None:
    public(world)
    home(world)
    phone(world)
    async with running(world):
        await eventually(
            lambda: HOME in world.host.observed.peers and PHONE in world.host.observed.peers, 10, every=0.1
        )
        await trio.sleep(60)
        assert told(world) == {}, "nobody has been heard"
        world.host.receive_from(HOME, endpoint=SEEN)
        world.host.receive_from(PHONE, endpoint=MOVED)
        await eventually(lambda: told(world) == {"home": str(SEEN), "phone": str(MOVED)}, 15, every=0.1)
        await trio.sleep(10)
        writes, netlink, revision = world.writes(), world.daemon.kernel.writes, world.etcd.revision
        for _ in range(10):
            await trio.sleep(60)
            world.host.receive_from(HOME)
            world.host.receive_from(PHONE)
        assert (world.writes(), world.daemon.kernel.writes, world.etcd.revision) == (writes, netlink, revision)
        world.host.receive_from(HOME, endpoint=MOVED)
        await eventually(lambda: told(world)["home"] == str(MOVED), 15, every=0.1)
        assert endpoint(world) == MOVED
        await trio.sleep(200)
        world.host.receive_from(HOME)
        await eventually(lambda: "phone" not in told(world), 100, every=0.5)
        assert told(world) == {"home": str(MOVED)}, "the phone has been silent for too long"
        world.etcd.delete("/kilo/by/home/node")
        await eventually(lambda: told(world) == {}, 15, every=0.1)


async def test_a_phone_that_roams_all_the_time_does_not_storm_etcd(world: World) -> None:
    public(world)
    phone(world)
    async with running(world):
        await eventually(lambda: PHONE in world.host.observed.peers, 10, every=0.1)
        await trio.sleep(10)
        before, chance = world.etcd.revision, random.Random(1)
        turns = scaled(600, 150)
        for _ in range(turns):
            world.host.receive_from(PHONE, endpoint=Endpoint(SEEN.host, chance.randrange(1024, 65536)))
            await trio.sleep(3)
        # In half an hour; each word is followed by one on what was applied.
        assert world.etcd.revision - before < turns * 80 / 600
        last = endpoint(world, PHONE)
        await eventually(lambda: told(world) == {"phone": str(last)}, 120, every=1)


async def test_an_agent_that_starts_again_says_nothing_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    public(world)
    home(world)
    async with running(world):
        await eventually(lambda: HOME in world.host.observed.peers, 10, every=0.1)
        world.host.receive_from(HOME, endpoint=SEEN, when=trio.current_time() + 1)
        await eventually(lambda: told(world) == {"home": str(SEEN)}, 15, every=0.1)
        key = b"/kilo/by/h1/endpoints/home"
        first = world.etcd.data[key]
        monkeypatch.setattr(world.daemon.session, "resign", trio.lowlevel.checkpoint)
    async with running(world):
        world.host.receive_from(HOME)
        await trio.sleep(30)
        assert world.etcd.data[key] == first
        assert endpoint(world) == SEEN
    assert told(world) == {}, "stopped in order, it takes its word back"


async def test_a_host_behind_nat_follows_what_others_observe_until_it_receives_packets_itself(world: World) -> None:
    home(world)
    observers(world, "a", "b")
    async with running(world, persistent_keepalive=25):
        await eventually(lambda: HOME in world.host.observed.peers, 10, every=0.1)
        assert endpoint(world) == Endpoint.parse("192.168.7.2:51820")
        sees(world, "a", SEEN)
        await eventually(lambda: endpoint(world) == SEEN, 2, every=0.1)
        await trio.sleep(5)
        world.host.receive_from(HOME, endpoint=MOVED)
        netlink = world.daemon.kernel.writes
        sees(world, "a", Endpoint.parse("198.51.100.1:5"))
        sees(world, "b", Endpoint.parse("198.51.100.1:6"))
        for _ in range(20):
            await trio.sleep(10)
            peer = world.host.observed.peers[HOME]
            world.host.receive_from(HOME)
            active = evolve(peer, rx_bytes=peer.rx_bytes + 32, last_handshake=trio.current_time())
            world.host.observed = evolve(world.host.observed, peers={**world.host.observed.peers, HOME: active})
        assert endpoint(world) == MOVED
        assert world.daemon.kernel.writes == netlink
        keys = ["/kilo/by/a/endpoints/home", "/kilo/by/b/endpoints/home"]
        assert world.etcd.keys("/kilo/by/", "/endpoints/") == keys, "itself it tells nothing, not being public"


async def test_a_session_that_died_with_the_others_nat_is_begun_over(world: World) -> None:
    home(world)
    async with running(world, persistent_keepalive=25):
        sees(world, "a", SEEN)
        await eventually(lambda: HOME in world.host.observed.peers and endpoint(world) == SEEN, 10, every=0.1)
        await trio.sleep(5)
        world.host.receive_from(HOME)
        await trio.sleep(30)
        changes = len(world.host.history)
        sees(world, "a", MOVED)
        await eventually(lambda: endpoint(world) == MOVED, 100, every=0.5)
        since = world.host.history[changes:]
        assert [isinstance(change, SetPeer) and change.reset for change in since] == [True]
        assert world.logged("another program change") == 0


async def test_who_is_not_heard_is_named_in_log_and_status_until_it_is(world: World) -> None:
    home(world)
    async with running(world, persistent_keepalive=25):
        await eventually(lambda: HOME in world.host.observed.peers, 10, every=0.1)
        for name in ("home", "h1"):
            key = HOME if name == "home" else key_file.public_key(PRIVATE)
            sees(world, "a", SEEN, key, name)
            sees(world, "b", MOVED, key, name)
        start = trio.current_time()
        await eventually(lambda: errors(world), 60, every=0.1)
        assert trio.current_time() - start >= PATIENCE - 1
        (said,) = errors(world)
        assert said.startswith("no tunnel to node home: it and h1 are both behind NAT, and both NATs show")
        for _ in range(60):
            world.host.send_to(HOME)
            await trio.sleep(5)
        assert world.logged(said) == 1
        # It is named once, with what is wrong with its NAT.
        assert "unanswered" not in json.loads(world.etcd.get("/kilo-status/by/h1/status") or b"{}")
        world.host.receive_from(HOME, endpoint=MOVED)
        await eventually(lambda: not errors(world), 15, every=0.1)
        assert world.logged(f"no longer: {said}") == 1


async def test_a_silent_member_names_nobody_who_does_not_answer_it() -> None:
    node = Node(name="b", public_key=HOME, mesh_addresses=(ip_address("10.4.0.2"),), endpoint=SEEN)
    own = Node(name="a", public_key=PHONE, mesh_addresses=(ip_address("10.4.0.1"),), endpoint=MOVED)
    snapshot = Snapshot(revision=1, nodes={"a": own, "b": node}, subnets=(ip_network("10.4.0.0/16"),))
    peer = PeerPlan(public_key=HOME, name="b", allowed_ips=(ip_network("10.4.0.2/32"),), endpoint=SEEN)
    found: list[tuple[str, ...]] = []

    class Device:
        async def peer_activity(self) -> PeerActivity:
            await trio.lowlevel.checkpoint()
            now = trio.current_time()
            # Whatever WireGuard sends of its own accord.
            return PeerActivity(time=now, peers={HOME: ObservedPeer(public_key=HOME, tx_bytes=int(now * 10))})

    class Session:
        observed_endpoints: ClassVar[dict[str, ObservedEndpointRecord]] = {}

    def ignore(*_of: object) -> None: ...

    monitor = WireGuardMonitor(
        cast(Any, Device()), cast(Any, Session()), "a", on_traversal_failures=ignore,
        on_unanswered=lambda unanswered: found.append(unanswered.nodes), set_back=SetBack(),
        on_set_back=ignore, reset_session=ignore, renew=ignore,
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(monitor.run)
        monitor.follow(snapshot, HostPlan(node="a", listen_port=1, peers={HOME: peer}), tunnels=False)
        await trio.sleep(200)
        assert found == []
        monitor.follow(snapshot, HostPlan(node="a", listen_port=1, peers={HOME: peer}), tunnels=True)
        await eventually(lambda: found == [("b",)], 100, every=0.1)
        nursery.cancel_scope.cancel()


async def test_a_session_between_two_plans_that_came_before_one_reading_is_a_session_since_the_first() -> None:
    node = Node(name="b", public_key=HOME, mesh_addresses=(ip_address("10.4.0.2"),), endpoint=SEEN)
    own = Node(name="a", public_key=PHONE, mesh_addresses=(ip_address("10.4.0.1"),), endpoint=MOVED)
    former = Snapshot(revision=1, nodes={"a": own, "b": node}, subnets=(ip_network("10.4.0.0/16"),))
    booted = evolve(former, revision=2, nodes={"a": own, "b": evolve(node, handshake_epoch=1)})
    keys = (HOME, *(base64.b64encode(number.to_bytes(32)).decode() for number in range(1, 2000)))
    peers = {key: PeerPlan(public_key=key, name="b" if key == HOME else key, allowed_ips=()) for key in keys}
    plan = HostPlan(node="a", listen_port=1, peers=peers)
    handshake, readings, renewed = trio.current_time() - 100, 0, list[object]()

    class Device:
        async def peer_activity(self) -> PeerActivity:
            nonlocal readings
            await trio.lowlevel.checkpoint()
            readings += 1
            peer = ObservedPeer(public_key=HOME, last_handshake=handshake)
            return PeerActivity(time=trio.current_time(), peers={HOME: peer})

    class Session:
        observed_endpoints: ClassVar[dict[str, ObservedEndpointRecord]] = {}

    def ignore(*_of: object) -> None: ...

    monitor = WireGuardMonitor(
        cast(Any, Device()), cast(Any, Session()), "a", on_traversal_failures=ignore, on_unanswered=ignore,
        set_back=SetBack(), on_set_back=ignore, reset_session=ignore, renew=renewed.append,
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(monitor.run)
        monitor.follow(former, plan, tunnels=True)
        await eventually(lambda: readings == 1, 1, every=0.1)
        monitor.follow(booted, plan, tunnels=True)
        handshake = trio.current_time()
        await trio.sleep(3)
        assert readings == 1, "so many peers take their time"
        monitor.follow(evolve(booted, revision=3), plan, tunnels=True)
        await trio.sleep(60)
        assert readings > 2
        assert renewed == []
        nursery.cancel_scope.cancel()


async def test_a_device_is_read_seldom_where_nothing_changes_and_not_without_peers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    public(world)
    read = 0
    async with running(world):
        inner = world.daemon.kernel.peer_activity

        async def peer_activity() -> PeerActivity:
            nonlocal read
            read += 1
            return await inner()

        monkeypatch.setattr(world.daemon.kernel, "peer_activity", peer_activity)
        await trio.sleep(120)
        assert read == 0
        home(world, keepalive=0)
        await eventually(lambda: HOME in world.host.observed.peers, 10, every=0.1)
        world.host.receive_from(HOME, endpoint=SEEN)
        await trio.sleep(60)
        read = 0
        await trio.sleep(600)
        assert read <= 61
        assert told(world) == {}


async def test_a_device_that_cannot_be_read_for_a_while_is_read_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    public(world)
    home(world)
    async with running(world):
        await eventually(lambda: HOME in world.host.observed.peers, 10, every=0.1)
        peer_activity, failures = world.daemon.kernel.peer_activity, [KernelError("it is gone"), OSError("no answer")]

        async def hear_badly() -> PeerActivity:
            if failures:
                raise failures.pop()
            return await peer_activity()

        monkeypatch.setattr(world.daemon.kernel, "peer_activity", hear_badly)
        world.host.receive_from(HOME, endpoint=SEEN)
        await eventually(lambda: told(world) == {"home": str(SEEN)}, 60, every=0.1)
        assert failures == []


@pytest.mark.parametrize(("gap", "again", "records"), [(3, SEEN, 0), (12, SEEN, 0), (12, MOVED, 1), (1000, SEEN, 1)])
async def test_where_a_host_is_seen_stays_published_while_it_is_made_anew(
    world: World, gap: int, again: Endpoint, records: int
) -> None:
    """A boot takes `gap` seconds from the record to the first handshake."""
    public(world)
    home(world)
    async with running(world):
        await eventually(lambda: HOME in world.host.observed.peers, 10, every=0.1)
        world.host.receive_from(HOME, endpoint=SEEN)
        await eventually(lambda: told(world) == {"home": str(SEEN)}, 20, every=0.1)
        await trio.sleep(100)
        home(world, epoch=1)
        await eventually(lambda: not world.host.observed.peers[HOME].last_handshake, 5, every=0.1)
        before = world.etcd.revision
        await trio.sleep(min(gap, 60))
        if gap < 60:
            assert told(world) == {"home": str(SEEN)}
            world.host.receive_from(HOME, endpoint=again)
            await trio.sleep(20)
        assert told(world) == ({"home": str(again)} if gap < 60 else {})
        written = [event for event in world.etcd._log if event.kv.mod_revision > before]
        assert sum(b"/endpoints/" in event.kv.key for event in written) == records
