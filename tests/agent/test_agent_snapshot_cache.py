"""The cached snapshot on disk: the file, and a host that boots while etcd is away."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from helpers import eventually, scaled
from kilo_etcd import kernel
from kilo_etcd.agent import cachefile, discover, snapshot_cache
from kilo_etcd.agent.cachefile import FILE, Identity, Unusable, load, save
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.daemon import Daemon
from kilo_etcd.agent.endings import Fatal, Reload
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.etcd import api as etcd
from kilo_etcd.etcd.api import Header, KeyValue
from kilo_etcd.kernel.state import DeleteRoute, HostAddress, Observed
from kilo_etcd.model import Endpoint
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.runtime.logs import setup_logging
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import NodeRecord, decode_node, encode, encode_adoption
from kilo_etcd.store.view import Holdings
from kilo_etcd.testing.fake_etcd import FakeEtcd
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel

KEYS = Keys()
PRIVATE = key_file.generate()
PUBLIC = key_file.public_key(PRIVATE)
SECOND = "B" + "A" * 42 + "="
WHO = Identity(prefix="/kilo", node="h1", public_key=PUBLIC)


def holdings(**others: bytes) -> Holdings:
    texts = {
        KEYS.subnets: b"10.4.0.0/16",
        KEYS.address("h1", ip_interface("10.4.0.1").ip): b"",
        KEYS.node("h1"): encode(NodeRecord(public_key=PUBLIC, endpoint=Endpoint.parse("198.51.100.1:51820"))),
        "/kilo/locations/x": b"\xff not text",
        **others,
    }
    return Holdings(
        header=Header(cluster_id=7, revision=42, raft_term=3),
        kvs=tuple(
            KeyValue(key=key.encode(), value=value, create_revision=number, mod_revision=number, version=1, lease=9)
            for number, (key, value) in enumerate(texts.items(), 3)
        ),
        granularity=None,
        subnets=(ip_network("10.4.0.0/16"),),
    )


def put(path: Path, lines: list[bytes]) -> None:
    """Write these lines with the checksum made right."""
    body = b"".join(line + b"\n" for line in lines)
    end = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(gzip.compress(body + end))


def test_what_is_saved_is_loaded_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / FILE
    assert load(path, WHO) is None
    for _ in range(2):
        save(path, WHO, holdings(), now=1000.0)
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [FILE]
    cached = load(path, WHO)
    assert cached is not None
    assert cached.snapshot == holdings().snapshot(KEYS)
    assert (cached.snapshot.revision, cached.snapshot.cluster_id, set(cached.snapshot.nodes)) == (42, 7, {"h1"})
    assert [cached.age(now) for now in (1030, 1000 + 7200, 999)] == ["30 s", "2 h", "unknown"]


def test_what_cannot_be_written_whole_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILE
    save(path, WHO, holdings(), now=1000.0)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save(path, WHO, holdings(), now=2000.0)
    cached = load(path, WHO)
    assert cached is not None
    assert cached.written == 1000.0
    assert os.listdir(tmp_path) == [FILE]


def _flip(data: bytes) -> bytes:
    lines = gzip.decompress(data).replace(b"10.4.0.1", b"10.4.0.2")
    return gzip.compress(lines)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: b"", "is damaged"),
        (lambda data: data[: len(data) // 2], "is damaged"),
        (lambda data: b"nonsense", "is damaged"),
        (_flip, "its checksum is wrong"),
        (lambda data: gzip.compress(b"{}\n"), "it is cut short"),
    ],
)
def test_what_is_damaged_is_unusable_and_stays(tmp_path: Path, spoil: Callable[[bytes], bytes], says: str) -> None:
    path = tmp_path / FILE
    save(path, WHO, holdings(), now=1000.0)
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt)
    with pytest.raises(Unusable, match=says):
        load(path, WHO)
    assert path.read_bytes() == spoilt


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "directory"])
def test_a_pipe_or_directory_in_its_place_is_unusable(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / FILE)
    with pytest.raises(Unusable, match="no regular file"):
        load(tmp_path / FILE, WHO)


def test_another_mesh_host_key_or_an_open_file_is_unusable(tmp_path: Path) -> None:
    path = tmp_path / FILE
    save(path, WHO, holdings(), now=1000.0)
    for other in (evolve(WHO, prefix="/b"), evolve(WHO, node="h2"), evolve(WHO, public_key=SECOND)):
        with pytest.raises(Unusable, match="was written by an agent whose"):
            load(path, other)
    path.chmod(0o640)
    with pytest.raises(Unusable, match="others can write or read"):
        load(path, WHO)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(Unusable, match="cannot be read"):
        load(path, WHO)
    path.unlink()
    save(path, WHO, holdings(**{KEYS.node("h1"): b"{}"}), now=1000.0)
    with pytest.raises(Unusable, match="does not have this host"):
        load(path, WHO)
    assert cachefile.remove(tmp_path)
    assert not cachefile.remove(tmp_path)


# -- a whole agent, in virtual time ---------------------------------------------------------------------------------


class World:
    """An agent called h1, its disk, and etcd with another host h2."""

    def __init__(self, state_dir: Path) -> None:
        self.etcd = FakeEtcd()
        self.client = self.etcd.client("h1")
        self.host = FakeHost()
        self.log = io.StringIO()
        self.metrics = Metrics()
        self.daemon: Daemon
        self.disk = Disk(state_dir, run=self._now, clock=trio.current_time)
        self.etcd.put(KEYS.address("h2", ip_interface("10.4.0.99").ip), "")
        record = NodeRecord(public_key=SECOND, endpoint=Endpoint.parse("198.51.100.9:51820"))
        self.etcd.put(KEYS.node("h2"), encode(record))

    async def _now(self, work: Callable[[], object]) -> object:
        # A thread would have no part in virtual time.
        await trio.lowlevel.checkpoint()
        return work()

    def logged(self, sentence: str) -> int:
        return self.log.getvalue().count(sentence)

    def programmed(self) -> bool:
        observed = self.host.observed
        return ip_network("10.4.0.0/16") in observed.routes and set(observed.peers) == {SECOND}

    def reboot(self) -> None:
        self.host.observed = Observed()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    made = World(tmp_path)

    async def gather(config: AgentConfig) -> HostFacts:
        await trio.lowlevel.checkpoint()
        address = HostAddress(interface="eth0", index=2, address=ip_interface("192.168.1.1/24"))
        return HostFacts(hostname="h1", addresses=(address,))

    monkeypatch.setattr(discover, "gather", gather)
    monkeypatch.setattr(discover, "location_from_cloud_init", lambda: (None, ""))
    setup_logging("info", stream=made.log, repeated=True)
    return made


@asynccontextmanager
async def running(world: World, **options: Any) -> AsyncIterator[Daemon]:
    config = evolve(
        AgentConfig.build(hostname="h1", lease_ttl="5s", resync_period="20s", listen="off"),
        **options,
    )
    device = FakeKernel(world.host, kernel.Setup(private_key=PRIVATE))
    world.metrics = Metrics()
    world.daemon = Daemon(config, world.client, device, PUBLIC, metrics=world.metrics, disk=world.disk)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.daemon.run)
        yield world.daemon
        with suppress(ProcessLookupError):
            os.kill(os.getpid(), signal.SIGTERM)
    world.host.unwatch(device)


@pytest.mark.autojump
async def test_a_host_boots_into_its_cached_snapshot_and_follows_when_etcd_is_back(world: World) -> None:
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        addresses = world.host.observed.addresses
        await trio.sleep(10)
    assert world.disk.path.exists()
    world.reboot()
    world.etcd.down()
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        assert world.logged("etcd is out of reach: the cached snapshot is in force") == 1
        assert world.host.observed.addresses == addresses
        assert "the cached snapshot is in force" in str(world.metrics.health())
        # It goes on for long, repairs what somebody takes away, and writes nothing to the disk.
        before = world.disk.path.stat().st_mtime_ns
        route = world.host.observed.routes[ip_network("10.4.0.0/16")]
        world.host.tamper([DeleteRoute(route)])
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(scaled(3600))
        assert world.disk.path.stat().st_mtime_ns == before
        # etcd is back, as it was: nothing is torn down, nothing written to the kernel.
        written = len(world.host.history)
        world.etcd.up()
        await eventually(lambda: world.logged("etcd is back: this host has joined again"), 60, every=0.1)
        await eventually(lambda: world.metrics.health() is None, 60, every=0.1)
        assert len(world.host.history) == written
        # The others have not heard of the boot, although the device is an hour old.
        assert decode_node(world.etcd.get(KEYS.node("h1")) or b"").handshake_epoch == 1
        world.etcd.delete(KEYS.node("h2"))
        await eventually(lambda: not world.host.observed.peers, 60, every=0.1)
        await trio.sleep(10)
        assert world.disk.path.stat().st_mtime_ns != before


@pytest.mark.autojump
async def test_what_is_on_the_disk_is_used_only_while_etcd_is_away(world: World) -> None:
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(10)
    world.reboot()
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
    assert world.logged("the cached snapshot is in force") == 0
    # And not by another key: the host was installed anew.
    world.disk.path.write_bytes(b"nonsense")
    world.reboot()
    world.etcd.down()
    async with running(world):
        await trio.sleep(60)
        assert not world.host.observed.routes
        assert world.logged("the cached snapshot cannot be used; going by etcd alone") == 1
        world.etcd.up()
        await eventually(world.programmed, 60, every=0.1)


@pytest.mark.autojump
@pytest.mark.parametrize("away", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [*lines, b"[" * 100_000],
        lambda lines: [b"[" * 100_000, *lines[1:]],
        lambda lines: [lines[0].replace(b'"clusterId":', b'"clusterId":Infinity,"x":'), *lines[1:]],
        lambda lines: [lines[0].replace(b'"written":', b'"written":1' + b"0" * 400 + b',"x":'), *lines[1:]],
        lambda lines: [*lines, json.dumps([KEYS.adopted, None, 3, 3, 1, 0]).encode()],
        lambda lines: [*lines, json.dumps([["fe80::1%x/64"], "a", 2, 2, 1, 0]).encode()],
        lambda lines: [*lines, json.dumps(["/kilo/by/h2/node", "{}", "2", 2.5, None, 0]).encode()],
    ],
)
async def test_an_agent_goes_on_without_a_cache_whose_checksum_is_right_and_whose_content_is_not(
    world: World, spoil: Callable[[list[bytes]], list[bytes]], away: bool
) -> None:
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(10)
    put(world.disk.path, spoil(gzip.decompress(world.disk.path.read_bytes()).splitlines()[:-1]))
    world.reboot()
    if away:
        world.etcd.down()
    async with running(world):
        await trio.sleep(60)
        # Whether more than the first lines is looked at depends on whether etcd answers.
        assert world.logged("the cached snapshot cannot be used; going by etcd alone") == 1 or not away
        assert world.logged("the cached snapshot is in force") == 0
        world.etcd.up()
        await eventually(world.programmed, 60, every=0.1)
        await trio.sleep(30)
    # And the next one finds a good one again.
    assert load(world.disk.path, WHO) is not None


@pytest.mark.autojump
@pytest.mark.parametrize(
    "values",
    [
        {"subnets": []},
        {"subnets": ["::/0", "0.0.0.0/0"]},
        {"subnets": ["fd00::/64"]},
        {"subnets": ["10.4.0.0/32"]},
        {"revision": 2**63 - 1},
        {"revision": 0, "clusterId": 0, "raftTerm": 2**64 - 1},
        {"written": 1e11, "granularity": None},
    ],
)
async def test_an_agent_goes_on_with_whatever_a_cache_may_hold(world: World, values: dict[str, object]) -> None:
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(10)
    lines = gzip.decompress(world.disk.path.read_bytes()).splitlines()[:-1]
    # Without the mesh's own settings among the records the head's are in force.
    cached = [line for line in lines[1:] if b"/kilo/mesh/" not in line]
    put(world.disk.path, [json.dumps({**json.loads(lines[0]), **values}).encode(), *cached])
    world.reboot()
    world.etcd.down()
    async with running(world, mtu=1200):
        await trio.sleep(scaled(600, 120))
        assert world.logged("the cached snapshot is in force") + world.logged("the cached snapshot cannot be used") == 1
        world.etcd.up()
        await trio.sleep(scaled(600, 120))


@pytest.mark.autojump
async def test_an_empty_etcd_after_a_boot_takes_nothing_away_until_it_is_adopted(world: World) -> None:
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(10)
    world.reboot()
    world.etcd.down()
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        world.etcd.replace_cluster()
        world.etcd.up()
        await trio.sleep(300)
        assert world.programmed()
        assert world.logged("etcd is another cluster now") == 1
        assert world.etcd.keys("/kilo/") == []
        world.etcd.put(KEYS.adopted, encode_adoption(world.etcd.cluster_id, "2026-11-24T00:00:00Z"))
        await eventually(lambda: not world.host.observed.peers, 60, every=0.1)
        await eventually(lambda: KEYS.node("h1") in world.etcd.keys("/kilo/by/"), 60, every=0.1)


@pytest.mark.autojump
@pytest.mark.parametrize("rebooted", [True, False])
@pytest.mark.parametrize("what", ["another cluster, empty", "another cluster, a backup", "the same cluster, a backup"])
async def test_an_etcd_that_answers_at_the_start_is_compared_with_the_cache(
    world: World, what: str, rebooted: bool
) -> None:
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        (other,) = world.host.observed.peers
        world.host.receive_from(other)
        await trio.sleep(10)
    written = len(world.host.history)
    if rebooted:
        world.reboot()
    else:
        world.host.receive_from(other)
    # A backup from before h2 came.
    for key in world.etcd.keys(KEYS.by("h2")):
        world.etcd.delete(key)
    world.etcd.replace_cluster(world.etcd.cluster_id if "same" in what else None, keep_data="backup" in what)
    held = dict(world.etcd.data)
    async with running(world) as daemon:
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(300)
        # Nothing is torn down, nothing is written there, and what to do is said where people look.
        assert world.programmed()
        assert rebooted or len(world.host.history) == written
        assert world.etcd.data == held
        assert world.etcd.leases() == {}
        sentence = "etcd went back in time" if "same" in what else "etcd is another cluster now"
        assert world.logged(sentence) == 1
        assert world.logged("etcd is not trusted: the cached snapshot is in force") == 1
        for place in (world.log.getvalue(), str(world.metrics.health()), *daemon.troubles.all()):
            assert sentence in place
            assert "kgctl mesh adopt" in place
        world.etcd.put(KEYS.adopted, encode_adoption(world.etcd.cluster_id, "2026-11-24T00:00:00Z"))
        await eventually(lambda: not world.host.observed.peers, 60, every=0.1)
        await eventually(lambda: KEYS.node("h1") in world.etcd.keys("/kilo/by/"), 60, every=0.1)
        await eventually(lambda: world.metrics.health() is None, 60, every=0.1)
        await trio.sleep(10)
    # Whoever comes later, the adoption known, follows without a word.
    world.reboot()
    async with running(world):
        await eventually(lambda: world.metrics.health() is None, 60, every=0.1)
    assert world.logged(sentence) == 1


@pytest.mark.autojump
async def test_who_was_away_while_an_etcd_was_adopted_follows_it_at_once(world: World) -> None:
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(10)
    world.reboot()
    world.etcd.replace_cluster(keep_data=True)
    world.etcd.put(KEYS.adopted, encode_adoption(world.etcd.cluster_id, "2026-11-24T00:00:00Z"))
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await eventually(lambda: world.metrics.health() is None, 60, every=0.1)
    assert world.logged("this etcd is adopted; following it") == 1
    assert world.logged("etcd is another cluster now") == world.logged("the cached snapshot is in force") == 0


@pytest.mark.autojump
async def test_a_wrong_clock_decides_nothing(world: World) -> None:
    """The clock of the wall goes back by a decade, and forward by one, at a boot without etcd and with another etcd."""
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(10)
    for now in (0.0, 4e9):
        world.disk = evolve(world.disk, clock=partial(float, now))
        world.reboot()
        world.etcd.down()
        async with running(world):
            await eventually(world.programmed, 30, every=0.1)
            world.etcd.up()
            await eventually(lambda: world.metrics.health() is None, 60, every=0.1)
            await trio.sleep(10)
    world.reboot()
    world.etcd.replace_cluster()
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(60)
        assert "another cluster now" in str(world.metrics.health())


@pytest.mark.autojump
async def test_clean_up_takes_it_along(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cleanup(interface: str, *, public_key: str) -> tuple[object, ...]:
        await trio.lowlevel.checkpoint()
        return world.host.cleanup(interface)

    monkeypatch.setattr(kernel, "cleanup", cleanup)
    async with running(world, clean_up=True):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(10)
        assert world.disk.path.exists()
    assert not world.disk.path.exists()


@pytest.mark.autojump
async def test_bursts_are_written_once_and_a_full_disk_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    full = False

    def counting(path: Path, identity: Identity, holdings: Holdings, *, now: float) -> None:
        if full:
            raise OSError(28, "No space left on device")
        written.append(holdings.header.revision)
        save(path, identity, holdings, now=now)

    monkeypatch.setattr(snapshot_cache, "save", counting)
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(60)
        before = len(written)
        await trio.sleep(scaled(600, 120))
        assert len(written) == before
        for number in range(100):
            last = world.etcd.put("/kilo/locations/h2", f"place-{number}")
            await trio.sleep(0.1)
        await trio.sleep(30)
        assert 2 <= len(written) - before <= 4
        assert written[-1] == last
        full = True
        last = world.etcd.put("/kilo/locations/h2", "elsewhere")
        await trio.sleep(300)
        assert world.logged("the snapshot cannot be cached on disk for a boot without etcd") == 1
        full = False
        await eventually(lambda: written[-1] == last, 120, every=0.1)
        assert world.logged("the snapshot is cached on disk again") == 1
        # The last change is written on stop, however recent the write before it.
        world.etcd.put("/kilo/locations/h2", "first")
        await trio.sleep(0.5)
        last = world.etcd.put("/kilo/locations/h2", "second")
        await trio.sleep(0.5)
    assert written[-1] >= last


REFUSALS = [
    etcd.ConnectionRefusedByTls("it refuses the client certificate; check --cert (has it expired?)"),
    etcd.Unauthenticated("refused user 'h1': wrong password or no such user; check --user"),
    etcd.PermissionDenied("user 'h1' may not read '/kilo/mesh/adopted': grant it"),
    etcd.BadRequest("etcd refused to read"),
]


@pytest.mark.autojump
@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
async def test_a_host_boots_into_its_cached_snapshot_if_etcd_refuses_it(world: World, error: etcd.EtcdError) -> None:
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(10)
    world.reboot()
    world.client.refuse(error)
    async with running(world) as daemon:
        await eventually(world.programmed, 1, every=0.1)
        await trio.sleep(scaled(600, 120))
        assert world.programmed()
        # Said once, with etcd's own error, where people look.
        assert world.logged("the cached snapshot is in force") == 1
        assert world.logged(str(error)) <= 3
        for place in (str(world.metrics.health()), *daemon.troubles.all()):
            assert place.startswith(f"{error.kind}; the cached snapshot is in force (age ")
            assert place.endswith(f": {error}")
        # Tried on, until it is mended.
        world.client.mend()
        await eventually(lambda: world.logged("etcd is back: this host has joined again"), 60, every=0.1)
        await eventually(lambda: world.metrics.health() is None, 60, every=0.1)
        world.etcd.delete(KEYS.node("h2"))
        await eventually(lambda: not world.host.observed.peers, 60, every=0.1)


@pytest.mark.autojump
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "error",
    [etcd.Full("etcd is full; compact, defragment, then etcdctl alarm disarm"), etcd.PermissionDenied("no write")],
    ids=lambda error: type(error).__name__,
)
async def test_a_host_that_boots_follows_an_etcd_that_takes_no_writes(
    world: World, error: etcd.EtcdError, cached: bool
) -> None:
    async with running(world):
        await eventually(world.programmed, 30, every=0.1)
        await trio.sleep(10)
    world.reboot()
    if not cached:
        world.disk.path.unlink()
    world.client.refuse(error, reads=False)
    async with running(world) as daemon:
        await eventually(world.programmed, 3, every=0.1)
        await eventually(lambda: daemon.state.revision == world.etcd.revision, 10, every=0.1)
        for place in (str(world.metrics.health()), *daemon.troubles.all()):
            assert place == f"{error.kind}, so this host has not joined again; forwarding follows etcd: {error}"
        # What others write is followed.
        world.etcd.put(KEYS.address("h3", ip_interface("10.4.0.98").ip), "")
        record = NodeRecord(public_key="C" + "A" * 42 + "=", endpoint=Endpoint.parse("198.51.100.8:51820"))
        world.etcd.put(KEYS.node("h3"), encode(record))
        await eventually(lambda: len(world.host.observed.peers) == 2, 5, every=0.1)
        await trio.sleep(scaled(600, 120))
        assert KEYS.status("h1") not in world.etcd
        assert world.logged(str(error)) <= 3
        world.client.mend()
        await eventually(lambda: KEYS.status("h1") in world.etcd, 60, every=0.1)
        await eventually(lambda: world.metrics.health() is None, 60, every=0.1)
        assert len(world.host.observed.peers) == 2


@pytest.mark.autojump
async def test_a_host_with_no_cache_that_etcd_refuses_ends_with_the_reason(world: World) -> None:
    world.client.refuse(REFUSALS[0])
    with pytest.RaisesGroup(pytest.RaisesExc(Fatal, match="has it expired"), flatten_subgroups=True):
        async with running(world):
            await trio.sleep(60)


@pytest.mark.autojump
async def test_code_that_runs_is_reloaded_although_etcd_goes_away_while_it_is_tried(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bool] = []

    async def try_installed(*, etcd_answers: bool) -> str | None:
        tried.append(etcd_answers)
        world.etcd.down()
        await trio.sleep(1)
        return "no endpoint of etcd answered" if etcd_answers else None

    monkeypatch.setattr("kilo_etcd.agent.reload.try_installed", try_installed)
    async with running(world) as daemon:
        await eventually(world.programmed, 30, every=0.1)
        with pytest.raises(Reload):
            await daemon.reloader.reload()
        assert tried == [True, False]
