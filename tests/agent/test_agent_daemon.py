"""One whole agent, on an etcd and a kernel in memory, in virtual time."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
import trio
from agent_world import World, running
from attrs import evolve

from helpers import eventually
from kilo_etcd import kernel
from kilo_etcd.agent import status
from kilo_etcd.agent.troubles import HostTrouble
from kilo_etcd.etcd import api as etcd
from kilo_etcd.kernel.firewall.table import ReplaceTable
from kilo_etcd.kernel.state import AddRoute, Change, DeleteLink, DeleteRoute, HostAddress
from kilo_etcd.model import CandidateClass, Endpoint
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.host_facts import HostFacts
from kilo_etcd.store.claims import candidates
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import (
    CandidateRecord,
    NodeRecord,
    ProbeReportRecord,
    StatusRecord,
    decode_node,
    decode_status,
    encode,
    encode_adoption,
)
from kilo_etcd.store.session.node_identity import NameTaken
from kilo_etcd.testing.fake_kernel import FakeKernel

pytestmark = pytest.mark.autojump


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], Iterator[bytes]]]:
    """Stands for systemd: each call gives the messages since the last one. Few fit into the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def received() -> Iterator[bytes]:
            with suppress(BlockingIOError):
                while True:
                    yield listening.recv(4096)

        yield received


@pytest.mark.parametrize("etcd_is_there", [True, False])
async def test_what_clean_up_removes_is_not_restored(
    world: World, monkeypatch: pytest.MonkeyPatch, etcd_is_there: bool
) -> None:
    async def cleanup(interface: str, *, public_key: str) -> tuple[Change, ...]:
        changes: tuple[Change, ...] = (*map(DeleteRoute, world.host.observed.routes.values()), DeleteLink(interface))
        for change in changes:
            world.host.tamper([change])
            await trio.sleep(1)
        return changes

    monkeypatch.setattr(kernel, "cleanup", cleanup)
    async with running(world, clean_up=True):
        if not etcd_is_there:
            world.etcd.down()
    assert world.host.observed.link is None
    assert not world.host.observed.routes
    assert world.logged("another program change") == 0
    assert world.logged("could not be removed") == (0 if etcd_is_there else 1)
    if etcd_is_there:
        assert not [key for key in world.etcd.keys("/") if key.endswith("h1")]


async def test_health_and_the_status_line_have_etcds_own_error_and_its_kind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(status, "notify", lambda *assignments: said.append(assignments[-1]))
    async with running(world) as daemon:
        await eventually(lambda: world.metrics.health() is None, 30, every=0.1)
        for error, kind in (
            (etcd.PermissionDenied("user 'h1' may not read: grant it"), "etcd denies permission"),
            (etcd.Unauthenticated("refused user 'h1': wrong password; check --user"), "etcd does not let this host in"),
            (etcd.ConnectionRefusedByTls("its certificate has expired; renew it"), "TLS with etcd fails"),
            (etcd.Full("etcd is full; compact, defragment, then etcdctl alarm disarm"), "etcd takes no writes"),
            (etcd.Unavailable("connection refused"), "etcd is out of reach"),
        ):
            look = world.client.range

            async def refuse(*_args: object, error: etcd.EtcdError = error, **_options: object) -> None:
                await trio.lowlevel.checkpoint()
                raise error

            monkeypatch.setattr(world.client, "range", refuse)
            await eventually(lambda: not daemon.mirror.connected, 30, every=0.1)
            await eventually(partial(lambda kind: kind in said[-1], kind), 5, every=0.1)
            assert world.metrics.health() == f"{kind}: {error}; forwarding goes on by the last plan"
            assert f"{kind}: {error}" in said[-1]
            monkeypatch.setattr(world.client, "range", look)
            await eventually(lambda: world.metrics.health() is None, 30, every=0.1)
            await eventually(lambda: "etcd" not in said[-1], 5, every=0.1)


async def test_a_claim_that_is_taken_away_is_claimed_again(world: World) -> None:
    async with running(world):
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        world.etcd.delete(claim)
        await eventually(lambda: world.etcd.keys("/kilo/by/h1/addresses/") == [claim], 10, every=0.1)
        await eventually(
            lambda: world.daemon.snapshots.snapshot and "h1" in world.daemon.snapshots.snapshot.nodes, 10, every=0.1
        )
        assert world.logged(f"{claim} was deleted") == 1
        assert world.logged("is not among the mesh's nodes") == 0


async def test_a_claim_that_the_mirror_does_not_have_yet_is_not_taken_for_deleted(world: World) -> None:
    world.client.stall(20)
    async with running(world, joined=False) as daemon:
        await eventually(lambda: world.etcd.keys("/kilo/by/h1/addresses/") != [], 10, every=0.1)
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        await eventually(lambda: daemon.mirror.kv(claim) is not None, 60, every=0.1)
    assert world.logged("deleted") == 0


async def test_a_rival_claim_changes_nothing_and_is_reported(world: World) -> None:
    async with running(world):
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        addresses = world.host.observed.addresses
        netlink = world.daemon.kernel.writes
        rival = claim.replace("h1", "h2")
        world.etcd.put("/kilo/by/h2/node", encode(NodeRecord(public_key="B" + "A" * 42 + "=")))
        world.etcd.put(rival, "")
        world.etcd.put(claim, b"x" * 1_000_000)
        await trio.sleep(60)
        assert world.logged(f"{rival}: node h1 claimed the address before") == 1
        assert world.etcd.keys("/kilo/", "/addresses/") == [claim, rival]
        assert (world.host.observed.addresses, world.daemon.kernel.writes) == (addresses, netlink)


async def test_an_address_that_an_older_claim_has_is_given_up(world: World) -> None:
    async with running(world):
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        # As with etcd's state of before this host came, in which another host has found the address free.
        async with world.daemon.session._lock:
            world.etcd.delete(claim)
            world.etcd.put(claim.replace("h1", "h2"), "")
            world.etcd.put_kept("/kilo/by/h2/reservation", "")
        await eventually(lambda: world.etcd.keys("/kilo/by/h1/addresses/") not in ([], [claim]), 10, every=0.1)
        (now,) = world.etcd.keys("/kilo/by/h1/addresses/")
        await eventually(lambda: now.rpartition("/")[2] in str(world.host.observed.addresses), 10, every=0.1)
        assert claim.rpartition("/")[2] not in str(world.host.observed.addresses)
        assert claim.replace("h1", "h2") in world.etcd
        assert world.logged("this host took mesh address") == 1


async def test_that_this_host_lost_its_address_is_reported_until_nobody_else_claims_it(world: World) -> None:
    def sentences(lost: str) -> tuple[str, ...]:
        errors = decode_status(world.value("/kilo-status/by/h1/status")).errors
        return tuple(error for error in errors if lost in error)

    async with running(world):
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        rival, lost = claim.replace("h1", "h2"), claim.rpartition("/")[2]
        world.etcd.put("/kilo/by/h2/node", encode(NodeRecord(public_key="B" + "A" * 42 + "=")))
        world.etcd.put(rival, "")
        world.etcd.delete(claim)
        await eventually(lambda: world.etcd.keys("/kilo/by/h1/addresses/") not in ([], [claim]), 10, every=0.1)
        await eventually(lambda: len(sentences(lost)) == 1, 10, every=0.1)
        await trio.sleep(60)
        (sentence,) = sentences(lost)
        assert (
            f"lost {lost}: node h2 had the older claim of {lost}; if that claim is a mistake, etcdctl del {rival}; "
            in (sentence)
        )
        world.etcd.delete(rival)
        await eventually(lambda: not sentences(lost), 10, every=0.1)
        assert world.logged("no other node claims the mesh address that this host lost") == 1


def _claim_first(world: World, claim: str, rival: str) -> None:
    """As if `rival` had claimed the address of a host's `claim` before it."""
    world.etcd.delete(claim)
    world.etcd.put(claim.replace("h1", rival), "")
    world.etcd.put_kept(Keys().reservation(rival), "")


def _renumbering(world: World) -> str:
    value = world.etcd.get("/kilo-status/by/h1/status")
    errors = () if value is None else decode_status(value).errors
    return " ".join(error for error in errors if error.startswith("this host took mesh address"))


async def test_that_an_address_was_lost_together_with_the_record_is_reported(world: World) -> None:
    async with running(world) as daemon:
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        rival, lost = claim.replace("h1", "h2"), claim.rpartition("/")[2]
        async with daemon.session._lock:
            world.etcd.delete("/kilo/by/h1/node")
            world.etcd.delete("/kilo/by/h1/reservation")
            _claim_first(world, claim, "h2")
            daemon.session._unconfirm_leases()
        await eventually(lambda: f"node h2 had the older claim of {lost}" in _renumbering(world), 20, every=0.1)
        await trio.sleep(60)
        assert f"lost {lost}: " in _renumbering(world)
        world.etcd.delete(rival)
        await eventually(lambda: _renumbering(world) == "", 10, every=0.1)


async def test_that_an_address_is_another_hosts_in_an_adopted_backup_is_reported(world: World) -> None:
    address = next(candidates("h1", ip_network("10.4.0.0/16"), lambda _each: True))
    claim = Keys().address("h1", address)
    _claim_first(world, claim, "h2")
    backup = world.etcd.backup()
    for key in world.etcd.keys("/kilo/by/h2/"):
        world.etcd.delete(key)
    async with running(world) as daemon:
        assert daemon.session.addresses == (address,)
        world.etcd.restore(backup, cluster_id=0xC7)
        await eventually(lambda: daemon.mirror.untrusted_reason is not None, 10, every=0.1)
        world.etcd.put(Keys().adopted, encode_adoption(world.etcd.cluster_id, "2026-11-24T00:00:00Z"))
        await eventually(lambda: f"node h2 had the older claim of {address}" in _renumbering(world), 60, every=0.1)
        assert daemon.session.addresses != (address,)


async def test_addresses_that_were_lost_one_after_the_other_are_all_reported(world: World) -> None:
    async with running(world) as daemon:
        lost = []
        for rival in ("h2", "h3"):
            (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
            lost.append(claim.rpartition("/")[2])
            async with daemon.session._lock:
                _claim_first(world, claim, rival)
            await eventually(lambda: f"the older claim of {lost[-1]}" in _renumbering(world), 20, every=0.1)
        first, second = lost
        assert f"lost {first},{second}: node h2 had the older claim of {first}; node h3 had" in _renumbering(world)
        world.etcd.delete(Keys().address("h2", ip_address(first)))
        await eventually(lambda: f"lost {second}: " in _renumbering(world), 10, every=0.1)
        # Whoever claims it now has it rightly.
        world.etcd.put(Keys().address("h4", ip_address(first)), "")
        world.etcd.delete(Keys().address("h3", ip_address(second)))
        await eventually(lambda: _renumbering(world) == "", 10, every=0.1)


async def test_a_claim_that_cannot_be_restored_shows_in_the_health_and_the_status_until_it_can(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_args: object, **_rest: object) -> None:
        await trio.lowlevel.checkpoint()
        raise etcd.PermissionDenied("user kilo may not write there")

    def named() -> bool:
        found = decode_status(world.value("/kilo-status/by/h1/status")).errors
        return any("cannot be restored" in sentence for sentence in found)

    async with running(world) as daemon:
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        with monkeypatch.context() as patched:
            patched.setattr(daemon.session, "claim_addresses", refuse)
            world.etcd.delete(claim)
            await eventually(lambda: world.metrics.health() is not None, 10, every=0.1)
            sentence = world.metrics.health()
            assert sentence is not None
            assert sentence.startswith("the claim of this host's mesh address cannot be restored (")
            assert claim in sentence
            assert sentence.endswith("user kilo may not write there")
            await eventually(named, 5, every=0.1)
            await trio.sleep(60)
            assert world.logged("cannot be restored") == 1
        await eventually(lambda: world.metrics.health() is None, 20, every=0.1)
        await eventually(lambda: not named(), 5, every=0.1)
        # Somebody else puts it right.
        with monkeypatch.context() as patched:
            patched.setattr(daemon.session, "claim_addresses", refuse)
            world.etcd.delete(claim)
            await eventually(lambda: world.metrics.health() is not None, 10, every=0.1)
            world.etcd.put(claim, "")
            await eventually(lambda: world.metrics.health() is None, 20, every=0.1)


async def test_a_claim_that_cannot_be_restored_is_not_said_to_stand_because_etcd_is_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_args: object, **_rest: object) -> None:
        await trio.lowlevel.checkpoint()
        raise etcd.PermissionDenied("user kilo may not write there")

    again = "this host's mesh address is claimed again"
    async with running(world) as daemon:
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        with monkeypatch.context() as patched:
            patched.setattr(daemon.session, "claim_addresses", refuse)
            world.etcd.delete(claim)
            await eventually(lambda: daemon.troubles.of(HostTrouble.CLAIM) != (), 10, every=0.1)
            world.client.cut()
            await eventually(lambda: not daemon.session.registered, 3600, every=1)
            await trio.sleep(60)
            assert daemon.troubles.of(HostTrouble.CLAIM) != ()
            assert world.logged(again) == 0
        world.client.mend()
        await eventually(lambda: daemon.troubles.of(HostTrouble.CLAIM) == (), 120, every=0.1)
        assert claim in world.etcd
        assert world.logged(again) == 1


async def test_whoever_deletes_a_claim_for_ever_is_not_fought_for_ever(world: World) -> None:
    async with running(world):
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        addresses = world.host.observed.addresses
        before = world.etcd.revision
        for _ in range(600):
            if claim in world.etcd:
                world.etcd.delete(claim)
            await trio.sleep(0.1)
        assert world.etcd.revision - before < 120
        assert world.host.observed.addresses == addresses
        await eventually(lambda: claim in world.etcd, 30, every=0.1)


async def test_a_host_whose_key_is_that_of_an_older_record_says_so(world: World) -> None:
    """As after its own record has ended, and somebody else has put one with its key before it came back."""
    keys = Keys()
    async with running(world) as daemon:
        world.etcd.delete(keys.node("h1"))
        world.etcd.put(keys.node("older"), encode(NodeRecord(public_key=daemon.public_key)))
        says = "this host is not among the mesh's nodes: its public key is that of node older, whose record is older"
        await eventually(lambda: world.logged(says) == 1, 10, every=0.1)
        await eventually(lambda: says in str(world.metrics.health()), 10, every=0.1)
        assert "kgctl node forget older" in str(world.metrics.health())
        status = keys.status("h1")
        await eventually(lambda: says.encode() in (world.etcd.get(status) or b""), 10, every=0.1)
        world.etcd.delete(keys.node("older"))
        await eventually(lambda: world.metrics.health() is None, 10, every=0.1)


async def test_a_host_whose_key_is_that_of_a_host_that_runs_exchanges_no_packets(world: World) -> None:
    """As with a copied key file: to WireGuard both are one, and the mesh would send to whichever spoke last."""
    keys = Keys()
    world.etcd.put(keys.address("h2", ip_interface("10.4.0.99").ip), "")
    world.etcd.put(
        keys.node("h2"), encode(NodeRecord(public_key="B" + "A" * 42 + "=", endpoint=Endpoint.parse("198.51.100.9:1")))
    )
    async with running(world) as daemon:
        await eventually(lambda: len(world.host.observed.peers) == 1, 10, every=0.1)
        world.etcd.put(keys.address("older", ip_interface("10.4.0.98").ip), "")
        lease = (await world.client.grant_lease(3600)).id
        world.etcd.put(keys.status("older"), encode(StatusRecord(public_key=daemon.public_key)), lease=lease)
        world.etcd.delete(keys.node("h1"))
        world.etcd.put(keys.node("older"), encode(NodeRecord(public_key=daemon.public_key)))
        await eventually(lambda: not world.host.observed.peers, 10, every=0.1)
        assert {str(route.destination) for route in world.host.observed.routes.values()} == {"10.4.0.0/16"}
        says = "the agent of older runs, so this host exchanges no packets with the mesh"
        await eventually(lambda: says in str(world.metrics.health()), 10, every=0.1)
        writes = daemon.kernel.writes
        await trio.sleep(120)
        assert daemon.kernel.writes == writes
        world.etcd.delete(keys.node("older"))
        await eventually(lambda: len(world.host.observed.peers) == 1, 10, every=0.1)
        await eventually(lambda: world.metrics.health() is None, 10, every=0.1)


async def test_a_record_with_another_key_at_this_hosts_name_is_not_followed(world: World) -> None:
    """As the snapshot of an agent that has a new key, before that is registered."""
    keys = Keys()
    async with running(world) as daemon:
        own = world.etcd.get(keys.node("h1")) or b""
        peers, writes = dict(world.host.observed.peers), daemon.kernel.writes
        for name, key in (("h1", "B" + "A" * 42 + "="), ("thief", daemon.public_key)):
            world.etcd.put(keys.node(name), encode(NodeRecord(public_key=key)))
        world.etcd.put(keys.address("thief", ip_interface("10.4.0.99").ip), "")
        await eventually(lambda: world.etcd.get(keys.node("h1")) == own, 10, every=0.1)
        await trio.sleep(10)
        assert daemon.kernel.writes == writes
        assert world.host.observed.peers == peers
        assert world.logged("another program change") == 0


async def test_an_etcd_that_was_replaced_is_not_trusted_until_it_is_adopted(world: World) -> None:
    keys = Keys()
    world.etcd.put(keys.address("h2", ip_interface("10.4.0.99").ip), "")
    world.etcd.put(
        keys.node("h2"), encode(NodeRecord(public_key="B" + "A" * 42 + "=", endpoint=Endpoint.parse("198.51.100.9:1")))
    )
    async with running(world):
        await eventually(lambda: len(world.host.observed.peers) == 1, 10, every=0.1)
        addresses = world.host.observed.addresses
        world.etcd.replace_cluster()
        await trio.sleep(600)
        # Nor is it told anything: not a lease, not a registration.
        assert (world.etcd.revision, world.etcd.leases()) == (1, {})
        assert world.logged("etcd is another cluster now") == 1
        assert (len(world.host.observed.peers), world.host.observed.addresses) == (1, addresses)
        assert "kgctl mesh adopt" in str(world.metrics.health())
        world.etcd.put(keys.adopted, encode_adoption(world.etcd.cluster_id, "2026-11-24T00:00:00Z"))
        await eventually(lambda: not world.host.observed.peers, 60, every=0.1)
        assert world.host.observed.addresses == addresses
        await eventually(lambda: world.metrics.health() is None, 60, every=0.1)


async def test_a_backup_made_while_the_record_was_away_is_noticed_to_lack_it(world: World) -> None:
    """In its history the record was deleted before the revision from which the agent watches it."""
    async with running(world):
        await eventually(lambda: "/kilo-status/by/h1/status" in world.etcd)
        world.etcd.delete("/kilo/by/h1/node")
        saved = world.etcd.backup()
        await eventually(lambda: "/kilo/by/h1/node" in world.etcd, 10, every=0.1)
        world.etcd.restore(saved, cluster_id=0xC2)
        world.etcd.put("/kilo/mesh/adopted", f"{0xC2:x} now")
        await eventually(lambda: "/kilo/by/h1/node" in world.etcd, 30, every=0.1)
        await eventually(
            lambda: world.daemon.snapshots.snapshot and "h1" in world.daemon.snapshots.snapshot.nodes, 10, every=0.1
        )


async def test_other_subnets_renumber_nobody(world: World) -> None:
    async with running(world):
        addresses = world.host.observed.addresses
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        world.etcd.put("/kilo/mesh/subnets", "10.50.0.0/16")
        await trio.sleep(60)
        assert (
            world.logged("/kilo/mesh/subnets: the value is 10.50.0.0/16, but the nodes' addresses are in 10.4.0.0/16")
            == 1
        )
        assert world.host.observed.addresses == addresses
        assert world.metrics.health() is None
    async with running(world):
        await trio.sleep(60)
        assert world.host.observed.addresses == addresses
        assert world.etcd.keys("/kilo/by/h1/addresses/") == [claim]
        assert world.daemon.registration.subnets == (ip_network("10.4.0.0/16"),)


async def test_a_host_is_renumbered_on_purpose(world: World) -> None:
    async with running(world):
        pass
    world.etcd.put("/kilo/mesh/subnets", "10.50.0.0/16")
    async with running(world, renumber=True):
        await eventually(lambda: "10.50." in str(world.host.observed.addresses), 10, every=0.1)
        (claim,) = world.etcd.keys("/kilo/by/h1/addresses/")
        assert claim.startswith("/kilo/by/h1/addresses/10.50.")
        await eventually(lambda: world.metrics.health() is None, 10, every=0.1)


async def test_whoever_undoes_everything_is_not_fought_for_ever(world: World) -> None:
    async with running(world):
        (route,) = world.host.observed.routes.values()
        with trio.move_on_after(100):
            while True:
                world.host.tamper([DeleteRoute(route)])
                await eventually(lambda: bool(world.host.observed.routes), 60, every=0.1)
        assert 12 <= world.logged("another program change") <= 30
        world.host.tamper([DeleteRoute(route)])
        await eventually(lambda: bool(world.host.observed.routes), 12, every=0.1)
        await trio.sleep(60)
        world.host.tamper([DeleteRoute(route)])
        await eventually(lambda: bool(world.host.observed.routes), 0.3, every=0.1)


async def test_writes_to_etcd_are_counted_and_there_are_none_in_steady_state(world: World) -> None:
    async with running(world):
        await trio.sleep(10)
        before = world.writes()
        assert before >= 4  # settings, claim, lease, registration
        netlink = world.daemon.kernel.writes
        await trio.sleep(45)
        assert world.writes() == before
        assert world.daemon.kernel.writes == netlink
        world.facts = HostFacts(hostname="h1")
        await eventually(lambda: world.writes() > before, 30, every=0.1)
        assert world.metrics.registry.get_sample_value("kilo_last_etcd_contact_timestamp_seconds")


async def test_a_leader_whose_kernel_has_no_nftables_is_healthy_without_smaller_segments(world: World) -> None:
    sentence = "this kernel takes no table"
    world.host.refuse = lambda change: sentence if isinstance(change, ReplaceTable) else None
    async with running(world):
        beside = key_file.public_key(key_file.generate())
        world.etcd.put("/kilo/by/h2/addresses/10.4.0.2", "")
        world.etcd.put(
            "/kilo/by/h2/node", encode(NodeRecord(public_key=beside, internal_ips=(ip_interface("192.168.1.2/24"),)))
        )
        await eventually(lambda: world.logged(sentence) == 1, 30, every=0.1)
        await trio.sleep(90)
        assert world.logged(sentence) == 1
        assert (world.metrics.health(), world.daemon.state.failures) == (None, ())


async def test_a_host_leads_in_spite_of_a_route_that_collides_and_its_status_line_counts_the_problem(
    world: World, supervisor: Callable[[], Iterator[bytes]]
) -> None:
    def put(name: str, record: NodeRecord) -> None:
        world.etcd.put(f"/kilo/by/{name}/addresses/10.4.0.{name[1:]}", "")
        world.etcd.put(f"/kilo/by/{name}/node", encode(record))

    elsewhere, beside = (key_file.public_key(key_file.generate()) for _ in range(2))
    put("h3", NodeRecord(public_key=elsewhere, endpoint=Endpoint.parse("203.0.113.3:51820"), location="b"))
    world.etcd.put("/kilo/annotations/h3/subnets", "172.17.0.0/16")
    collides = ip_network("172.17.0.0/16")
    world.host.refuse = lambda change: (
        "it collides" if isinstance(change, AddRoute) and change.route.destination == collides else None
    )

    def leads_with_a_problem() -> bool:
        return any(
            message.startswith(b"STATUS=leader of ") and message.endswith(b"; 1 problem") for message in supervisor()
        )

    async with running(world):
        await eventually(lambda: world.logged("it collides") == 1, 10, every=0.1)
        # One more in the location: this host registered first, so it leads for want of candidates, and stands.
        put("h2", NodeRecord(public_key=beside, internal_ips=(ip_interface("192.168.1.2/24"),)))
        await eventually(leads_with_a_problem, 10, every=0.1)
        await eventually(lambda: world.etcd.keys("/kilo/by/h1/elections/") != [], 10, every=0.1)


async def test_systemd_has_a_ready_agent_that_feeds_the_watchdog_while_etcd_is_away(
    world: World, monkeypatch: pytest.MonkeyPatch, supervisor: Callable[[], Iterator[bytes]]
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    world.etcd.down()
    async with running(world, joined=False):
        messages: list[bytes] = []
        for _ in range(12):
            await trio.sleep(5)
            messages += supervisor()
    assert messages[0] == b"READY=1\nSTATUS=joining the mesh"
    assert messages.count(b"WATCHDOG=1") >= 11
    assert any(message.startswith(b"STATUS=waiting for etcd: ") for message in messages)


async def test_the_watchdog_is_fed_by_the_reconciler(
    world: World, monkeypatch: pytest.MonkeyPatch, supervisor: Callable[[], Iterator[bytes]]
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")

    def beats() -> int:
        return sum(b"WATCHDOG=1" in message for message in supervisor())

    async with running(world, resync_period=3600.0) as daemon:
        await trio.sleep(20)
        beats()
        reconciles = world.metrics.registry.get_sample_value("kilo_reconciles_total", {"result": "success"})
        await trio.sleep(20)
        assert beats() >= 3
        assert reconciles == world.metrics.registry.get_sample_value("kilo_reconciles_total", {"result": "success"})
        assert isinstance(daemon.kernel, FakeKernel)
        async with daemon.kernel._lock:
            daemon._reconciler.nudge(fresh=True)
            await trio.sleep(20)
            beats()
            await trio.sleep(20)
            assert beats() == 0


async def test_a_leader_that_cannot_hand_over_says_so(world: World) -> None:
    other = NodeRecord(
        public_key=key_file.public_key(key_file.generate()), internal_ips=(ip_interface("192.168.1.2/24"),)
    )
    async with running(world):
        world.etcd.put("/kilo/by/h2/addresses/10.4.0.2", "")
        world.etcd.put("/kilo/by/h2/node", encode(other))
        await eventually(lambda: world.etcd.keys("/kilo/by/", "/elections/") != [], 10, every=0.1)
        world.etcd.put_kept(
            "/kilo/by/h2/elections/@default", encode(CandidateRecord(rank=CandidateClass.REST, since=""))
        )
        world.etcd.put_kept("/kilo-status/by/h2/status", encode(StatusRecord(public_key=other.public_key, revision=1)))
        await trio.sleep(1)
        assert world.daemon.state.topology is not None
        assert world.daemon.state.topology.segment_of("h1").next_in_line is not None, world.daemon.snapshots.snapshot
        world.etcd.delay = 10.0
    assert world.logged("leadership was not handed over, since etcd does not answer") == 1
    assert world.host.observed.link is not None


async def test_a_leader_whose_candidacy_was_put_under_no_lease_leads_on_and_a_dead_host_s_does_not_count(
    world: World,
) -> None:
    """As by `etcdctl put`, in the name of the leader and of a host that does not run."""
    other = NodeRecord(
        public_key=key_file.public_key(key_file.generate()), internal_ips=(ip_interface("192.168.1.2/24"),)
    )
    key = "/kilo/by/h1/elections/@default"
    async with running(world):
        world.etcd.put("/kilo/by/h2/addresses/10.4.0.2", "")
        world.etcd.put("/kilo/by/h2/node", encode(other))
        await eventually(lambda: key in world.etcd, 10, every=0.1)
        offer = encode(CandidateRecord(rank=CandidateClass.ANNOTATED, since=""))
        world.etcd.put("/kilo/by/h2/elections/@default", offer)
        await trio.sleep(5)
        before = world.etcd.data[key.encode()]
        world.etcd.put(key, before.value)
        await eventually(lambda: world.etcd.data[key.encode()].lease == before.lease, 1, every=0.1)
        assert world.etcd.data[key.encode()].create_revision == before.create_revision
        await trio.sleep(5)
        assert world.daemon.state.topology is not None
        assert world.daemon.state.topology.segment_of("h1").leader.name == "h1"
        assert [candidate.node for candidate in world.daemon.state.topology.snapshot.candidates[""]] == ["h1"]
    assert world.logged("it is under no lease, so no agent keeps it") >= 1


async def test_a_key_of_another_s_lease_in_its_name_goes_as_soon_as_it_can_be_no_earlier_run_s(world: World) -> None:
    key = "/kilo/by/h1/probe-reports/elsewhere"
    report = ProbeReportRecord(leader="h2", candidacy=1, targets=("h1",), leader_reachable=True)
    lease = (await world.etcd.client().grant_lease(3600)).id
    async with running(world, resync_period=3600.0):
        await eventually(lambda: world.etcd.get("/kilo-status/by/h1/status") is not None, 10, every=0.1)
        leased_since = trio.current_time()
        world.etcd.put(key, encode(report), lease=lease)
        await eventually(lambda: key not in world.etcd, 2 * 5 + 0.5, every=0.1)
        assert trio.current_time() > leased_since + 2 * 5 - 0.5


async def test_addresses_that_come_late_are_registered_at_once(world: World) -> None:
    late, world.facts = world.facts, HostFacts(hostname="h1")
    async with running(world, resync_period=3600.0):
        await eventually(lambda: world.etcd.get("/kilo/by/h1/node") is not None, 10, every=0.1)
        assert b"192.168" not in (world.etcd.get("/kilo/by/h1/node") or b"")
        world.facts = late
        world.host.moved.set()
        await eventually(lambda: b"192.168" in (world.etcd.get("/kilo/by/h1/node") or b""), 2, every=0.1)


async def test_new_addresses_that_cannot_be_registered_do_not_end_the_agent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(world) as daemon:

        async def refused(record: NodeRecord) -> None:
            await trio.lowlevel.checkpoint()
            raise NameTaken("the name h1 is taken")

        monkeypatch.setattr(daemon.session, "register", refused)
        world.facts = HostFacts(hostname="h1")
        await trio.sleep(70)
        assert world.logged("is not registered yet") == 1
        assert world.logged("address chosen") == 2  # internal IP and endpoint, as it started


async def test_a_host_whose_name_another_took_says_so_until_that_one_is_gone(world: World) -> None:
    stranger = key_file.public_key(key_file.generate())
    async with running(world):
        await eventually(lambda: world.metrics.health() is None, 10, every=0.1)
        addresses = world.host.observed.addresses
        # This host was away for longer than its lease, and another took its name.
        status = StatusRecord(public_key=stranger, revision=1, address="198.51.100.9:51820")
        lease = (await world.etcd.client().grant_lease(3600)).id
        world.etcd.put("/kilo-status/by/h1/status", encode(status), lease=lease)
        world.etcd.put("/kilo/by/h1/node", encode(NodeRecord(public_key=stranger)))
        await trio.sleep(30)
        sentence = (
            f"the name h1 is taken by a living host with public key {stranger} at 198.51.100.9:51820; "
            "stop the agent there or give this host another name with --hostname"
        )
        assert world.metrics.health() == sentence
        assert world.logged(sentence) == 1
        assert world.host.observed.addresses == addresses
        world.etcd.delete("/kilo-status/by/h1/status")
        await eventually(lambda: world.metrics.health() is None, 30, every=0.1)
        assert decode_node(world.value("/kilo/by/h1/node")).public_key == world.daemon.public_key


async def test_a_copy_of_this_machine_is_not_fought_for_ever_and_shows_in_its_health(world: World) -> None:
    async with running(world) as daemon:
        copy = NodeRecord(public_key=daemon.public_key, endpoint=Endpoint.parse("198.51.100.9:51820"))
        with trio.move_on_after(30):
            while True:
                world.etcd.put("/kilo/by/h1/node", encode(copy))
                await trio.sleep(0.5)
        before = world.writes()
        assert "if a copy of this machine runs, give it a WireGuard key and a --hostname of its own" in (
            world.metrics.health() or ""
        )
        await trio.sleep(15)
        assert world.writes() == before
        await eventually(lambda: world.metrics.health() is None, 120, every=0.1)


async def test_a_status_that_another_writes_again_and_again_is_restored_and_named(world: World) -> None:
    def sentences() -> tuple[str, ...]:
        return decode_status(world.value("/kilo-status/by/h1/status")).errors

    async with running(world) as daemon:
        await eventually(lambda: "/kilo-status/by/h1/status" in world.etcd)
        for _ in range(4):
            world.etcd.put("/kilo-status/by/h1/status", "{}")
            await eventually(lambda: world.etcd.get("/kilo-status/by/h1/status") != b"{}", 10)
        (sentence,) = sentences()
        assert "/kilo-status/by/h1/status is changed again and again by another writer" in sentence
        assert daemon.session.contested == sentence == world.metrics.health()
        assert world.logged("changed again and again") == 1
        await eventually(lambda: not sentences(), 400, every=1)
        assert world.logged("no longer: ") == 1


async def test_an_address_within_the_meshs_subnet_is_reported_until_it_goes(world: World) -> None:
    usual = world.facts
    world.facts = evolve(
        usual,
        addresses=(
            *usual.addresses,
            *(
                HostAddress(interface=name, index=3, address=ip_interface(text))
                for name, text in (("kilo0", "10.4.0.1/32"), ("br0", "10.4.7.1/24"), ("br1", "10.5.0.1/24"))
            ),
        ),
    )

    def reported() -> tuple[str, ...]:
        (kv,) = world.etcd.keys("/kilo-status/")
        return decode_status(world.value(kv)).errors

    async with running(world):
        await eventually(reported, 5, every=0.1)
        (sentence,) = reported()
        assert sentence.startswith(
            "br0 has the address 10.4.7.1/24, whose network overlaps the mesh's subnet 10.4.0.0/16"
        )
        assert world.metrics.health() is None
        world.facts = usual
        await eventually(lambda: not reported(), 30, every=0.1)
        assert world.logged("br0 has the address") == 2


async def test_an_internal_ip_that_the_operator_forces_and_the_host_does_not_have_is_reported(world: World) -> None:
    own = next(item.address for item in world.facts.addresses if item.address.version == 4)
    annotation = "/kilo/annotations/h1/force-internal-ip"

    def reported() -> tuple[str, ...]:
        (kv,) = world.etcd.keys("/kilo-status/by/h1/status")
        return decode_status(world.value(kv)).errors

    async with running(world):
        await eventually(lambda: world.metrics.health() is None, 30, every=0.1)
        assert reported() == ()
        world.etcd.put(annotation, str(own))
        await trio.sleep(5)
        assert reported() == ()
        wrong = own.network.network_address + 99
        world.etcd.put(annotation, str(wrong))
        await eventually(reported, 5, every=0.1)
        (sentence,) = reported()
        assert sentence.startswith(f"{wrong}, forced by annotation, is none of this host's addresses")
        assert world.logged("forced by annotation") == 1
        world.etcd.delete(annotation)
        await eventually(lambda: not reported(), 5, every=0.1)


async def test_a_change_of_internal_ips_and_what_it_waits_for_are_a_line_each(world: World) -> None:
    key = key_file.public_key(key_file.generate())
    old = encode(NodeRecord(public_key=key, internal_ips=(ip_interface("10.9.0.1/24"),)))
    async with running(world) as daemon:
        await eventually(lambda: world.metrics.health() is None, 30, every=0.1)
        assert world.logged("internal-ips") == 0

        async def put(key: str, value: str | bytes | None) -> None:
            if value is None:
                world.etcd.delete(key)
            else:
                world.etcd.put(key, value)
            revision = world.etcd.revision
            await eventually(lambda: daemon.state.revision >= revision, 30, every=0.1)

        await put(Keys().internal_ips, "off")
        assert world.logged("internal-ips changed ") == world.logged("setting=off before=routed") == 1
        await put(Keys().node("old"), old)
        await put(Keys().address("old", ip_address("10.4.0.99")), "")
        await put(Keys().internal_ips, "routed")
        assert world.logged("internal-ips changed and is not in force yet") == 1
        assert world.logged("waits_for_agents_of=old") == 1
        await put(Keys().node("old"), None)
        assert world.logged("internal-ips is in force now") == 1
        await put(Keys().node("old"), old)
        assert world.logged("internal-ips is not in force any more") == 1
        # Nonsense changes nothing, and is named with what stays in force.
        await put(Keys().internal_ips, "all")
        assert world.logged("kgctl mesh set internal-ips routed); routed stays in force until then") == 1
        lines = [line for line in world.log.getvalue().splitlines() if "info    internal-ips" in line]
        assert len(lines) == 4, lines
