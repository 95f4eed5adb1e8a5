"""The agent under internal-ips=encrypted: what it keeps outside of the tunnels, and how it reports its stages."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Collection
from ipaddress import IPv4Network, ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import click
import pytest
import structlog
import trio
from agent_world import World, running
from attrs import evolve

from helpers import eventually
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.encrypting import ASK_PATIENCE, Encrypting, outside
from kilo_etcd.agent.etcd_listeners import Members, read_members, remove_members, write_members
from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.etcd.api import Config, PermissionDenied, Unavailable
from kilo_etcd.etcd.values import Member
from kilo_etcd.kernel.routing.encrypted import table_of
from kilo_etcd.model import EncryptionStage, Endpoint, Granularity, InternalIPs, IPAddress, IPNetwork, Node, Snapshot
from kilo_etcd.model.hostplan import Exemption, HostPlan
from kilo_etcd.planning.encryption import StageReport
from kilo_etcd.planning.pipeline import Surroundings, host_plans
from kilo_etcd.runtime.logs import Once
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import NodeRecord, StageRecord, decode_node, decode_status, encode
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd
from kilo_etcd.topology.segments import Topology, build_topology

OTHER = base64.b64encode(bytes([9]) * 32).decode()
TABLE = table_of("kilo0")
THEIRS: IPNetwork = IPv4Network("192.168.1.9/32")


def config(*endpoints: str, clear: str = "") -> AgentConfig:
    built = AgentConfig.build(hostname="h1", listen="off", clear=clear)
    return evolve(built, etcd=Config(endpoints=endpoints))


def test_etcd_stays_outside_by_address_and_port() -> None:
    own = (ip_address("10.0.0.1"),)
    table = {"etcd.example": (ip_address("10.0.0.7"),)}
    found = outside(config("https://10.0.0.2:2379", "etcd.example:4001", clear="tcp/22@10.0.0.0/24"), None, own, table)
    assert found.etcd == ((ip_address("10.0.0.2"), 2379), (ip_address("10.0.0.7"), 4001))
    assert (found.etcd_here, found.talk, found.sources) == ((), (1107,), own)
    assert found.clear == (Exemption.parse("tcp/22@10.0.0.0/24"),)
    assert outside(evolve(config(), peer_query_port=2107), None, own, {}).talk == (2107,)


def test_a_member_of_etcd_here_has_its_peers_outside_too() -> None:
    members = Members(
        ("http://10.0.0.1:2379", "http://10.0.0.2:2379"), ("http://10.0.0.1:2380", "http://10.0.0.2:2380")
    )
    here = outside(config("127.0.0.1:2379"), members, (ip_address("10.0.0.1"),), {})
    assert here.etcd == ((ip_address("10.0.0.2"), 2379), (ip_address("10.0.0.2"), 2380))
    assert here.etcd_here == (2379, 2380)
    # At an address that is none of the underlay.
    aside = outside(config("10.0.0.1:2379"), members, (), {}, addresses=frozenset({ip_address("10.0.0.1")}))
    assert (aside.etcd, aside.etcd_here) == (here.etcd, here.etcd_here)
    elsewhere = outside(config("10.0.0.1:2379"), members, (ip_address("10.0.0.9"),), {})
    assert [port for _, port in elsewhere.etcd] == [2379, 2379]
    assert elsewhere.etcd_here == ()


ANYWHERE = tuple(map(Exemption.parse, ("tcp/2380@0.0.0.0/0", "tcp/2380@::/0")))


@pytest.mark.parametrize(
    ("endpoint", "listening", "clear", "here"),
    [
        ("10.0.0.2:2379", (), (), ()),
        ("10.0.0.2:2379", (22, 2379), (), (2379,)),
        ("10.0.0.2:2379", (22, 2379, 2380), ANYWHERE, (2379, 2380)),
        ("10.0.0.1:2379", (), ANYWHERE, (2379,)),  # in a container, of which nothing is seen here
        ("127.0.0.1:2379", (), ANYWHERE, (2379,)),
    ],
)
def test_nothing_of_etcds_is_cut_where_its_members_are_not_known(
    endpoint: str, listening: tuple[int, ...], clear: tuple[Exemption, ...], here: tuple[int, ...]
) -> None:
    own = (ip_address("10.0.0.1"),)
    found = outside(config(endpoint), None, own, {}, listening=frozenset(listening))
    assert (found.clear, found.etcd_here) == (clear, here)
    members = Members(("http://10.0.0.2:2379",), ("http://10.0.0.2:2380",))
    known = outside(config(endpoint), members, own, {}, listening=frozenset(listening))
    assert known.clear == ()


def test_a_members_host_reaches_members_whose_names_are_not_resolved_yet() -> None:
    members = Members((), ("http://a.example:2381", "http://b.example:2381"))
    own = (ip_address("10.0.0.1"),)
    found = outside(config("10.0.0.2:2379"), members, own, {}, listening=frozenset({2381}))
    assert [str(exemption) for exemption in found.clear] == ["tcp/2381@0.0.0.0/0", "tcp/2381@::/0"]
    table = {"a.example": own, "b.example": (ip_address("10.0.0.3"),)}
    later = outside(config("10.0.0.2:2379"), members, own, table, listening=frozenset({2381}))
    assert (later.clear, (ip_address("10.0.0.3"), 2381) in later.etcd) == ((), True)


def test_members_are_kept_on_disk(tmp_path: Path) -> None:
    assert read_members(tmp_path) is None
    members = Members(("http://10.0.0.1:2379",), ("http://10.0.0.1:2380",))
    write_members(tmp_path, members)
    assert read_members(tmp_path) == members
    for nonsense in ("", "[]", '{"client": 1, "peer": []}', '{"client": [1], "peer": []}', "{" * 5000):
        (tmp_path / "etcd-members.json").write_text(nonsense)
        assert read_members(tmp_path) is None
    remove_members(tmp_path)
    remove_members(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_exemption_is_a_sentence() -> None:
    with pytest.raises(click.UsageError, match="not an exemption"):
        config("10.0.0.1:2379", clear="22@10.0.0.0/24")


def node(world: World, stage: EncryptionStage | None) -> None:
    """A node on the same LAN."""
    record = NodeRecord(
        public_key=OTHER,
        endpoint=Endpoint.parse("192.168.1.9:51820"),
        internal_ips=(ip_interface("192.168.1.9/24"),),
        underlay=(ip_network("192.168.1.0/24"),),
        encryption=stage,
        accepts_since=1 if stage is EncryptionStage.SENDS else None,
    )
    if "/kilo/by/h9/addresses/10.4.0.9" not in world.etcd:
        world.etcd.put("/kilo/by/h9/addresses/10.4.0.9", "")
    world.etcd.put("/kilo/by/h9/node", encode(record))


def lives(world: World, revision: int) -> None:
    world.etcd.put_kept("/kilo-status/by/h9/stage", encode(StageRecord(revision=revision)))


def stage(world: World) -> EncryptionStage | None:
    value = world.etcd.get("/kilo/by/h1/node")
    return None if value is None else decode_node(value).encryption


async def at_once(work: Callable[[], Any]) -> Any:
    """File work that takes no virtual time, as it would in a thread."""
    await trio.lowlevel.checkpoint()
    return work()


def sends(world: World) -> bool:
    table = world.host.observed.policy.tables.get(TABLE)
    return table is not None and THEIRS in table.routes


def refuses(world: World) -> bool:
    plan = world.daemon.state.plan
    return plan is not None and plan.encryption is not None and THEIRS.network_address in plan.encryption.refuse


@pytest.mark.autojump
async def test_a_listing_of_etcds_members_that_fails_is_repeated_soon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then TCP 2380 bypasses the tunnels, to and from everybody."""
    world.etcd.put("/kilo/mesh/granularity", "full")
    world.etcd.put("/kilo/mesh/internal-ips", "encrypted")
    world.etcd.put("/kilo/mesh/subnets", "10.4.0.0/16")
    world.etcd.members = (
        Member(id=1, name="a", peer_urls=("http://192.168.1.9:2380",), client_urls=(), is_learner=False),
    )
    node(world, EncryptionStage.SENDS)
    world.host.listening = frozenset({2380})
    failures = [Unavailable("the connection to etcd broke before the answer came")] * 3
    members = world.client.members

    async def fail_first() -> tuple[Member, ...]:
        if failures:
            raise failures.pop()
        return await members()

    monkeypatch.setattr(world.client, "members", fail_first)

    def anywhere() -> bool:
        plan = world.daemon.state.plan
        return plan is not None and plan.encryption is not None and bool(plan.encryption.clear)

    async with running(world):
        began = trio.current_time()
        await eventually(anywhere, 10, every=0.1)
        await eventually(lambda: not anywhere(), 60, every=0.1)
        assert trio.current_time() - began < 15
        assert not failures


@pytest.mark.autojump
async def test_the_switch_by_stages_and_back(world: World, tmp_path: Path) -> None:
    world.etcd.put("/kilo/mesh/granularity", "full")
    world.etcd.put("/kilo/mesh/internal-ips", "encrypted")
    world.etcd.put("/kilo/mesh/subnets", "10.4.0.0/16")
    world.etcd.members = (
        Member(id=1, name="a", peer_urls=("http://192.168.1.1:2380",), client_urls=(), is_learner=False),
        Member(id=2, name="b", peer_urls=("http://192.168.1.9:2380",), client_urls=(), is_learner=False),
    )
    node(world, None)
    lives(world, 1)
    disk = Disk(tmp_path, run=at_once)
    async with running(world, disk=disk):
        await eventually(lambda: stage(world) is EncryptionStage.SENDS, 30, every=0.1)
        assert not sends(world)
        assert read_members(tmp_path) == Members((), ("http://192.168.1.1:2380", "http://192.168.1.9:2380"))
        plan = world.daemon.state.plan
        assert plan is not None
        assert plan.encryption is not None
        assert (ip_address("192.168.1.9"), 2380) in plan.encryption.etcd
        assert plan.encryption.etcd_here == (2379, 2380)
        node(world, EncryptionStage.ACCEPTS)
        await eventually(lambda: sends(world), 30, every=0.1)
        assert not refuses(world)
        node(world, EncryptionStage.SENDS)
        await trio.sleep(30)
        assert not refuses(world), "it has not applied yet that this host accepts"
        lives(world, 10_000)
        await eventually(lambda: refuses(world), 60, every=0.1)
    # The next agent goes on from there.
    async with running(world, disk=disk):
        await eventually(lambda: refuses(world), 30, every=0.1)
        assert (stage(world), sends(world)) == (EncryptionStage.SENDS, True)
    async with running(world, disk=disk):
        await eventually(lambda: refuses(world), 30, every=0.1)
        world.etcd.put("/kilo/mesh/internal-ips", "off")
        await eventually(lambda: stage(world) is EncryptionStage.LEAVES, 30, every=0.1)
        assert (refuses(world), sends(world)) == (False, True), "the other one may refuse still"
        node(world, EncryptionStage.LEAVES)
        await eventually(lambda: stage(world) is EncryptionStage.STOPPED, 30, every=0.1)
        assert not sends(world)
        await trio.sleep(30)
        assert world.host.observed.policy.rules, "the other one may send still"
        node(world, EncryptionStage.STOPPED)
        await eventually(lambda: stage(world) is None, 60, every=0.1)
        assert world.host.observed.policy.rules == frozenset()


@pytest.mark.autojump
async def test_the_mesh_is_kept_on_disk_before_others_rely_on_the_setting(world: World, tmp_path: Path) -> None:
    world.etcd.put("/kilo/mesh/internal-ips", "off")
    disk = Disk(tmp_path, run=at_once)

    def kept() -> str:
        with gzip.open(disk.path) as file:
            return str(json.loads(file.readline())["internalIPs"])

    async with running(world, disk=disk):
        await eventually(disk.path.exists, 30, every=0.1)
        # Within the pause between two writes.
        world.etcd.put("/kilo/mesh/internal-ips", "encrypted")
        assert kept() == "off"
        await eventually(lambda: stage(world) is EncryptionStage.ACCEPTS, 30)
        assert kept() == "encrypted"


@pytest.mark.autojump
async def test_who_is_gone_is_waited_for_by_nobody(world: World) -> None:
    world.etcd.put("/kilo/mesh/granularity", "full")
    world.etcd.put("/kilo/mesh/internal-ips", "encrypted")
    world.etcd.put("/kilo/mesh/subnets", "10.4.0.0/16")
    node(world, EncryptionStage.SENDS)
    async with running(world):
        await eventually(lambda: refuses(world) and sends(world), 60, every=0.1)
        world.etcd.put("/kilo/mesh/internal-ips", "routed")
        await eventually(lambda: stage(world) is None, 60, every=0.1)
        assert world.host.observed.policy.rules == frozenset()


@pytest.mark.autojump
async def test_who_is_back_is_waited_for_on_the_way_back(world: World) -> None:
    world.etcd.put("/kilo/mesh/granularity", "full")
    world.etcd.put("/kilo/mesh/internal-ips", "encrypted")
    world.etcd.put("/kilo/mesh/subnets", "10.4.0.0/16")
    node(world, EncryptionStage.SENDS)
    async with running(world):
        await eventually(lambda: refuses(world) and sends(world), 60, every=0.1)
        lives(world, 10_000)
        world.etcd.put("/kilo/mesh/internal-ips", "routed")
        await eventually(lambda: stage(world) is EncryptionStage.LEAVES, 60, every=0.1)
        await trio.sleep(30)
        assert sends(world), "it has not applied the new setting yet, and refuses clear text"
        assert stage(world) is EncryptionStage.LEAVES


@pytest.mark.autojump
async def test_who_cannot_read_what_others_report_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def denied(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise PermissionDenied("permission denied")

    world.etcd.put("/kilo/mesh/granularity", "full")
    world.etcd.put("/kilo/mesh/internal-ips", "encrypted")
    world.etcd.put("/kilo/mesh/subnets", "10.4.0.0/16")
    node(world, None)
    lives(world, 1)
    sentence = "what their hosts send in clear is not refused"
    async with running(world):
        await eventually(lambda: stage(world) is EncryptionStage.SENDS, 30, every=0.1)
        assert world.logged(sentence) == 0
        with monkeypatch.context() as patched:
            patched.setattr(FakeClient, "range", denied)
            node(world, EncryptionStage.SENDS)
            await eventually(lambda: world.logged(sentence) == 1, 30, every=0.1)
            assert not refuses(world)
            lives(world, 10_000)
        await eventually(lambda: refuses(world), 60, every=0.1)
        assert world.logged("the reports of other agents can be read again") == 1


@pytest.mark.autojump
async def test_etcds_members_that_cannot_be_listed_are_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def denied(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise PermissionDenied("permission denied")

    def reported() -> tuple[str, ...]:
        value = world.etcd.get("/kilo-status/by/h1/status")
        return () if value is None else tuple(text for text in decode_status(value).errors if "members" in text)

    world.etcd.put("/kilo/mesh/internal-ips", "encrypted")
    world.host.listening = frozenset({2380})
    with monkeypatch.context() as patched:
        patched.setattr(FakeClient, "members", denied)
        async with running(world):
            await eventually(lambda: len(reported()) == 1, 30, every=0.1)
            assert "this agent's etcd endpoints stay outside" in reported()[0]
            plan = world.daemon.state.plan
            assert plan is not None
            assert plan.encryption is not None
            assert plan.encryption.clear == ANYWHERE
            patched.undo()
            await eventually(lambda: reported() == (), 90, every=0.1)
            plan = world.daemon.state.plan
            assert plan is not None
            assert plan.encryption is not None
            assert plan.encryption.clear == ()


def a_lan() -> Topology:
    """Of h1 and h9, a full mesh that encrypts."""
    hosts = {
        name: Node(
            name=name,
            public_key=name,
            endpoint=Endpoint(ip_address(f"192.168.1.{number}"), 51820),
            internal_ips=(ip_interface(f"192.168.1.{number}/24"),),
            underlay=(ip_network("192.168.1.0/24"),),
            mesh_addresses=(ip_address(f"10.4.0.{number}"),),
        )
        for number, name in enumerate(("h1", "h9"), 1)
    }
    return build_topology(
        Snapshot(revision=5, nodes=hosts, granularity=Granularity.FULL, internal_ips=InternalIPs.ENCRYPTED)
    )


def bare(
    server: FakeEtcd,
    told: list[StageReport],
    stages: list[StageRecord | None] | None = None,
    refuses: Collection[str] = (),
    client: FakeClient | None = None,
) -> Encrypting:
    """The part of an agent on h1; `told` and `stages`: what it has reported; `refuses`: whom its kernel refuses."""
    said: list[StageRecord | None] = [None] if stages is None else stages

    async def register(report: StageReport) -> bool:
        await trio.lowlevel.checkpoint()
        told.append(report)
        return True

    async def listening() -> frozenset[int]:
        await trio.lowlevel.checkpoint()
        return frozenset()

    async def refused() -> frozenset[IPAddress]:
        await trio.lowlevel.checkpoint()
        return frozenset(map(ip_address, refuses))

    async def put_stage(stage: StageRecord | None) -> None:
        await trio.lowlevel.checkpoint()
        said.append(stage)

    return Encrypting(
        config("10.0.0.1:2379"), client or server.client(), Keys(), Once(structlog.get_logger()),
        disk=None, register=register, keep=trio.lowlevel.checkpoint, nudge=lambda: None,
        stage=lambda: said[-1], put_stage=put_stage, listening=listening, refused=refused,
    )  # fmt: skip


@pytest.mark.autojump
async def test_who_lives_is_asked_again_when_etcd_is_back() -> None:
    server, topology = FakeEtcd(), a_lan()
    encrypting = bare(server, [])
    server.put_kept("/kilo-status/by/h9/stage", encode(StageRecord(revision=3)))
    await encrypting.prepare(topology, etcd_away=True)
    assert not encrypting.living.lives("h9"), "as its record says"
    await encrypting.prepare(topology, etcd_away=True)
    assert not encrypting.living.lives("h9")
    await encrypting.prepare(topology, etcd_away=False)
    assert encrypting.living.applied == {"h9": 3}
    server.put_kept("/kilo-status/by/h9/stage", encode(StageRecord(revision=4)))
    await encrypting.prepare(topology, etcd_away=False)
    assert encrypting.living.applied == {"h9": 3}, "from then on as long as somebody is waited for"


@pytest.mark.parametrize(
    ("mode", "refuses", "gone"),
    [
        (InternalIPs.ENCRYPTED, True, True),
        # The kernel of h9, whose agent is away, may send in clear.
        (InternalIPs.ENCRYPTED, False, False),
        (InternalIPs.ROUTED, True, False),
    ],
)
@pytest.mark.autojump
async def test_an_agent_that_starts_goes_on_to_refuse_and_waits_on_the_way_back(
    mode: InternalIPs, refuses: bool, gone: bool
) -> None:
    lan = a_lan()
    topology = build_topology(evolve(lan.snapshot, internal_ips=mode))
    theirs = [str(ip.ip) for ip in lan.snapshot.nodes["h9"].internal_ips]
    encrypting = bare(FakeEtcd(), [], refuses=theirs if refuses else ())
    await encrypting.prepare(topology, etcd_away=False)
    assert encrypting.living.lives("h9") is not gone


def hanging() -> float:
    return 60.0


@pytest.mark.parametrize("lag", [None, hanging])
@pytest.mark.autojump
async def test_an_agent_that_starts_goes_on_to_refuse_although_etcd_does_not_answer(
    lag: Callable[[], float] | None,
) -> None:
    lan = a_lan()
    server = FakeEtcd()
    client = server.client()
    theirs = [str(ip.ip) for ip in lan.snapshot.nodes["h9"].internal_ips]
    encrypting = bare(server, [], refuses=theirs, client=client)
    client.lag = lag
    if lag is None:
        client.cut()
    began = trio.current_time()
    await encrypting.prepare(lan, etcd_away=False)
    assert trio.current_time() - began <= ASK_PATIENCE
    assert not encrypting.living.lives("h9")
    assert encrypting.living.lives("h1"), "nothing is known of it"


@pytest.mark.autojump
async def test_all_stages_of_a_large_mesh_are_read_in_time_where_etcd_is_far() -> None:
    server, lan = FakeEtcd(), a_lan().snapshot
    names = [f"n{number}" for number in range(10_000)]
    for name in names:
        server.put_kept(Keys().stage(name), encode(StageRecord(revision=3)))
    nodes = {**lan.nodes, **{name: Node(name=name, public_key=name) for name in names}}
    client = server.client()
    client.lag = lambda: 0.04
    encrypting = bare(server, [], client=client)
    began = trio.current_time()
    await encrypting.prepare(build_topology(evolve(lan, nodes=nodes)), etcd_away=False)
    assert trio.current_time() - began < 0.75 * ASK_PATIENCE
    assert encrypting.living.applied == dict.fromkeys(names, 3)


@pytest.mark.autojump
async def test_members_that_are_no_endpoints_end_no_agent(world: World, tmp_path: Path) -> None:
    odd = ("http://[::1", "http://a:x", "unix://socket:1", "")
    world.etcd.put("/kilo/mesh/internal-ips", "encrypted")
    write_members(tmp_path, Members(odd, odd))
    # Until etcd says who they are.
    world.etcd.members = (Member(id=1, name="a", peer_urls=odd, client_urls=odd, is_learner=False),)
    async with running(world, disk=Disk(tmp_path, run=at_once)):
        await eventually(lambda: stage(world) is EncryptionStage.SENDS, 30, every=0.1)
    assert list(outside(config("10.0.0.1:2379"), Members(odd, odd), (), {}).etcd) == [(ip_address("10.0.0.1"), 2379)]


def planned(encrypting: Encrypting, topology: Topology) -> HostPlan:
    inputs = encrypting.inputs(topology, sources=(), addresses=frozenset(), table={})
    return host_plans(topology, "h1", Surroundings(encryption=inputs)).final


@pytest.mark.autojump
async def test_a_stage_is_not_reported_of_a_plan_that_is_being_replaced() -> None:
    """The kernel may be on its way from it already when the report is made."""
    topology = a_lan()
    told: list[StageReport] = []
    encrypting = bare(FakeEtcd(), told)

    def applied() -> None:
        plan = planned(encrypting, topology)
        encrypting.follow(topology, plan, whole=True)

    async with trio.open_nursery() as nursery:
        applied()
        encrypting.withdraw()
        nursery.start_soon(encrypting.run)
        await trio.sleep(10)
        assert told == []
        applied()
        await trio.sleep(10)
        assert told == [StageReport(stage=EncryptionStage.ACCEPTS)]
        nursery.cancel_scope.cancel()


@pytest.mark.autojump
async def test_in_a_switch_of_a_large_mesh_each_agent_reports_what_it_has_applied_twice() -> None:
    lan = a_lan().snapshot
    crowd = {
        f"n{number}": Node(
            name=f"n{number}", public_key=f"n{number}", internal_ips=(ip_interface(f"10.9.{number}.1/24"),), underlay=()
        )
        for number in range(100)
    }
    nodes = {**lan.nodes, **crowd}
    stages: list[StageRecord | None] = [None]
    encrypting = bare(FakeEtcd(), [], stages)
    topology: Topology | None = None

    async def applied(revision: int) -> None:
        nonlocal topology
        snapshot = evolve(lan, revision=revision, nodes=dict(nodes), internal_ips_since=5)
        topology = build_topology(snapshot, topology)
        plan = planned(encrypting, topology)
        encrypting.follow(topology, plan, whole=True)
        await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(encrypting.run)
        await applied(6)
        revision = 6
        for name in nodes:
            revision += 1
            nodes[name] = evolve(nodes[name], encryption=EncryptionStage.SENDS, accepts_since=revision - 1)
            await applied(revision)
        await trio.sleep(5)
        reported = [stage.revision for stage in stages if stage is not None]
        assert (reported[0], len(reported)) == (6, 2)
        assert reported[-1] >= revision - 1, "by which it sends to all of them"
        # One that joins is told soon, and nothing is reported without a cause.
        nodes["n300"] = evolve(crowd["n0"], name="n300", encryption=EncryptionStage.ACCEPTS)
        await applied(revision + 1)
        nodes["n300"] = evolve(nodes["n300"], encryption=EncryptionStage.SENDS, accepts_since=revision + 1)
        await applied(revision + 2)
        await applied(revision + 3)
        await trio.sleep(5)
        assert len(stages) == 4
        assert stages[-1] in (StageRecord(revision=revision + 2), StageRecord(revision=revision + 3))
        nursery.cancel_scope.cancel()
