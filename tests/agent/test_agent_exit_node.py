"""A host that leaves for the internet by another node: its agent programs that, watches it, and says what is wrong."""

from __future__ import annotations

import base64
import json
from ipaddress import ip_interface, ip_network

import pytest
import trio
from agent_world import World, running
from attrs import evolve

from helpers import eventually, scaled
from kilo_etcd.etcd.api import Config
from kilo_etcd.kernel.routing.exit_node import exit_table
from kilo_etcd.kernel.state import DefaultRoute, DeleteLink, HostAddress, ObservedPeer
from kilo_etcd.model import Endpoint, IPAddress
from kilo_etcd.model.hostplan import PeerPlan
from kilo_etcd.runtime.exit_node_monitor import KEEPALIVE_BYTES, PATIENCE, PERIOD, Counters
from kilo_etcd.runtime.resolve import Resolver
from kilo_etcd.store.records import NodeRecord, encode

ANYWHERE = ip_network("0.0.0.0/0")
TABLE = exit_table("kilo0")
EXIT = base64.b64encode(bytes([9]) * 32).decode()


def advertise(world: World, *, offers: bool = True) -> None:
    """A node in a location of its own that offers an exit node."""
    record = NodeRecord(public_key=EXIT, endpoint=Endpoint.parse("203.0.113.9:51820"), location="exit")
    world.etcd.put("/kilo/by/exit-1/addresses/10.4.0.99", "")
    world.etcd.put("/kilo/by/exit-1/node", encode(record))
    if offers:
        world.etcd.put("/kilo/annotations/exit-1/advertise-exit-node", "true")


def use_exit_node(world: World, name: str = "exit-1") -> None:
    world.etcd.put("/kilo/annotations/h1/exit-node", name)


def errors(world: World) -> list[str]:
    found: list[str] = json.loads(world.etcd.get("/kilo-status/by/h1/status") or b"{}").get("errors", [])
    return found


def traffic(world: World, *, sent: int = 0, received: int = 0) -> None:
    peers = world.host.observed.peers
    peer = peers[EXIT]
    moved = evolve(peer, tx_bytes=peer.tx_bytes + sent, rx_bytes=peer.rx_bytes + received)
    world.host.observed = evolve(world.host.observed, peers={**peers, EXIT: moved})


@pytest.mark.autojump
async def test_the_annotation_turns_the_exit_node_on_and_off_live(world: World) -> None:
    advertise(world)
    async with running(world):
        await trio.sleep(5)
        assert world.host.observed.policy.rules == frozenset()
        use_exit_node(world)
        await eventually(lambda: ANYWHERE in world.host.observed.policy.table(TABLE).routes, 10, every=0.1)
        observed = world.host.observed
        assert observed.policy.table(TABLE).routes[ANYWHERE].device == "kilo0"
        assert {str(rule.source) for rule in observed.policy.rules if rule.source} == {"192.168.1.1"}
        assert "203.0.113.9/32" in {str(network) for network in observed.policy.table(TABLE).routes}
        assert ANYWHERE in observed.peers[EXIT].allowed_ips
        assert ANYWHERE not in observed.routes
        writes, netlink = world.writes(), world.daemon.kernel.writes
        await trio.sleep(scaled(600, 120))
        assert (world.writes(), world.daemon.kernel.writes) == (writes, netlink), "steady"

        # Another address of the host's: answers from there stay outside too.
        more = HostAddress(interface="eth0", index=2, address=ip_interface("192.168.1.77/24"))
        world.facts = evolve(world.facts, addresses=(*world.facts.addresses, more))
        world.host.moved.set()
        sources = {"192.168.1.1", "192.168.1.77"}
        await eventually(
            lambda: {str(rule.source) for rule in world.host.observed.policy.rules if rule.source} == sources,
            10,
            every=0.1,
        )

        # One of IPv6: its answers are told by nftables, and there is a route for them to begin with.
        six = HostAddress(interface="eth0", index=2, address=ip_interface("2001:db8::7/64"))
        before = world.facts
        world.facts = evolve(before, addresses=(*before.addresses, six))
        world.host.moved.set()
        await eventually(lambda: world.host.observed.table is not None, 10, every=0.1)
        table = world.host.observed.table
        assert table is not None
        assert [chain.name for chain in table.chains] == ["prerouting", "delivered", "output"]
        assert world.host.observed.policy.table(TABLE).routes[ip_network("::/0")].device == "kilo0"
        assert {str(rule.source) for rule in world.host.observed.policy.rules if rule.source} == sources
        world.facts = before
        world.host.moved.set()
        await eventually(lambda: world.host.observed.table is None, 10, every=0.1)
        assert ip_network("::/0") not in world.host.observed.policy.table(TABLE).routes

        # Somebody takes the device away: nothing is let out beside it, and it comes back.
        world.host.tamper([DeleteLink("kilo0")])
        assert ANYWHERE not in world.host.observed.policy.table(TABLE).routes
        assert ANYWHERE in world.host.observed.policy.table(TABLE).last
        await eventually(lambda: ANYWHERE in world.host.observed.policy.table(TABLE).routes, 10, every=0.1)

        # The exit node withdraws its offer: blocked, and said, until the annotation goes.
        world.etcd.delete("/kilo/annotations/exit-1/advertise-exit-node")
        await eventually(lambda: ANYWHERE not in world.host.observed.policy.table(TABLE).routes, 10, every=0.1)
        assert ANYWHERE in world.host.observed.policy.table(TABLE).last
        await eventually(lambda: any("until then nothing leaves h1" in text for text in errors(world)), 10, every=0.1)
        world.etcd.delete("/kilo/annotations/h1/exit-node")
        await eventually(lambda: not world.host.observed.policy.rules, 10, every=0.1)
        assert (world.host.observed.policy.table(TABLE).routes, world.host.observed.policy.table(TABLE).last) == (
            {},
            {},
        )
        assert ANYWHERE not in world.host.observed.peers[EXIT].allowed_ips
        await eventually(lambda: errors(world) == [], 10, every=0.1)


@pytest.mark.autojump
async def test_an_exit_node_that_dies_is_named_until_it_answers(world: World) -> None:
    advertise(world)
    use_exit_node(world)
    async with running(world):
        await eventually(lambda: ANYWHERE in world.host.observed.policy.table(TABLE).routes, 10, every=0.1)
        for _ in range(20):
            traffic(world, sent=5000, received=4000)
            await trio.sleep(PERIOD)
        await trio.sleep(scaled(3600, 600))
        assert errors(world) == [], "what is idle is not suspected"
        traffic(world, sent=148)
        await trio.sleep(PATIENCE - PERIOD)
        assert errors(world) == []
        said = "nothing comes back from the exit node exit-1, so nothing leaves this host"
        await eventually(lambda: any(said in text for text in errors(world)), 30, every=0.5)
        assert world.logged(said) == 1
        traffic(world, received=92)
        await eventually(lambda: errors(world) == [], 30, every=0.5)
        traffic(world, sent=148)
        await eventually(lambda: errors(world) != [], 60, every=0.5)
        world.etcd.delete("/kilo/annotations/h1/exit-node")
        await eventually(lambda: errors(world) == [], 30, every=0.5)


@pytest.mark.autojump
async def test_nothing_is_touched_before_etcds_name_is_known(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[IPAddress] = []

    async def lookup(_name: str) -> tuple[IPAddress, ...]:
        await trio.lowlevel.checkpoint()
        if not answers:
            raise OSError("no answer")
        return tuple(answers)

    advertise(world)
    use_exit_node(world)
    monkeypatch.setattr("kilo_etcd.agent.daemon.Resolver", lambda: Resolver(lookup=lookup))
    async with running(world, etcd=Config(endpoints=("http://etcd.example.org:2379",))):
        await eventually(lambda: EXIT in world.host.observed.peers, 10, every=0.1)
        await trio.sleep(10)
        assert world.host.observed.policy.rules == frozenset()
        assert any("the DNS name etcd.example.org is not resolved" in text for text in errors(world))
        answers.append(ip_interface("192.0.2.77").ip)
        await eventually(lambda: world.host.observed.policy.rules, 60, every=0.1)
        made = [str(change) for change in world.host.history]
        bypass = next(at for at, text in enumerate(made) if text.startswith("ip route add throw 192.0.2.77/32"))
        assert bypass < min(at for at, text in enumerate(made) if "rule add" in text)
        await eventually(lambda: errors(world) == [], 10, every=0.1)


@pytest.mark.autojump
async def test_names_of_etcd_that_do_not_serve_hold_no_route(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, IPAddress] = {}

    async def lookup(name: str) -> tuple[IPAddress, ...]:
        await trio.lowlevel.checkpoint()
        if name not in known:
            raise OSError("no answer")
        return (known[name],)

    advertise(world)
    use_exit_node(world)
    monkeypatch.setattr("kilo_etcd.agent.daemon.Resolver", lambda: Resolver(lookup=lookup))
    client = world.client
    client.prefer(("http://10.9.9.9:2379", "http://member.example.org:2379"))
    client.endpoint = "http://serves.example.org:2379"
    async with running(world, etcd=Config(endpoints=("http://given.example.org:2379",))):
        await eventually(lambda: EXIT in world.host.observed.peers, 10, every=0.1)
        await trio.sleep(10)
        assert [text for text in errors(world) if "the DNS name" in text] == [
            next(text for text in errors(world) if "serves.example.org is not resolved" in text)
        ]
        assert world.host.observed.policy.rules == frozenset()
        known["serves.example.org"] = ip_interface("192.0.2.77").ip
        await eventually(lambda: world.host.observed.policy.rules, 60, every=0.1)
        made = [str(change) for change in world.host.history]
        for address in ("192.0.2.77", "10.9.9.9"):
            assert any(text.startswith(f"ip route add throw {address}/32") for text in made)
        # Endpoints that are discovered, or in the member list, bypass it as soon as they are known.
        client.prefer(("http://10.9.9.8:2379",))
        await trio.sleep(0.5)
        assert any(str(change).startswith("ip route add throw 10.9.9.8/32") for change in world.host.history)
        client.endpoint = None
        world.etcd.put("/kilo/locations/h1", "elsewhere")
        await trio.sleep(10)
        assert errors(world) == []


@pytest.mark.autojump
async def test_an_exit_node_blocks_its_own_network_and_says_which_family_it_lacks(world: World) -> None:
    world.etcd.put("/kilo/mesh/subnets", "10.4.0.0/16,fd00:4::/64")
    world.facts = evolve(
        world.facts,
        default_routes=(DefaultRoute(family=4, interface="eth0", gateway=ip_interface("192.168.1.254").ip),),
    )
    async with running(world):
        world.etcd.put("/kilo/annotations/h1/advertise-exit-node", "true")
        await eventually(lambda: world.host.observed.table is not None, 10, every=0.1)
        table = world.host.observed.table
        assert table is not None
        blocked = [rule.text for rule in table.rules if "exit_node_blocked" in rule.text]
        assert any("ip daddr 192.168.1.0/24" in text for text in blocked)
        assert any("ip daddr 169.254.0.0/16" in text for text in blocked)
        await eventually(
            lambda: any("exit node h1 has no default route in IPv6" in text for text in errors(world)), 10, every=0.1
        )


# The account of one peer


PLANNED = PeerPlan(public_key=EXIT, name="exit-1")


def run(steps: list[tuple[float, int, int]], planned: PeerPlan = PLANNED) -> list[bool]:
    """(time, sent so far, received so far) -> whether it is silent then."""
    counters = Counters()
    return [
        counters.silent(planned, ObservedPeer(public_key=EXIT, tx_bytes=sent, rx_bytes=received), now=now)
        for now, sent, received in steps
    ]


def test_a_peer_that_gets_packets_and_sends_none_is_silent() -> None:
    assert run([(0, 0, 0), (5, 148, 0), (10, 296, 0), (20, 444, 0), (26, 592, 0), (30, 600, 92)]) == [
        False, False, False, False, True, False,
    ]  # fmt: skip


def test_keepalives_that_nobody_answers_are_no_silence() -> None:
    kept = evolve(PLANNED, persistent_keepalive=25)
    steps = [(25.0 * n, KEEPALIVE_BYTES * n, 1000) for n in range(20)]
    assert not any(run(steps, kept))
    assert run([*steps, (481.0, 32 * 19 + 600, 1000), (502.0, 32 * 19 + 700, 1000)], kept)[-2:] == [False, True]


def test_a_device_made_anew_and_another_exit_node_begin_anew() -> None:
    assert run([(0, 9000, 500), (5, 9500, 500), (30, 100, 0), (35, 120, 0)]) == [False, False, False, False]
    counters = Counters()
    peer = ObservedPeer(public_key=EXIT, tx_bytes=0)
    counters.silent(PLANNED, peer, now=0)
    counters.silent(PLANNED, evolve(peer, tx_bytes=999), now=1)
    assert not counters.silent(evolve(PLANNED, public_key="another"), evolve(peer, tx_bytes=9999), now=60)
    assert not counters.silent(PLANNED, None, now=61)
