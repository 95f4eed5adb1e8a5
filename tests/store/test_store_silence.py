"""For how long agents have been silent, by the leases of their records."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
import trio
from store_world import KEYS, record, wg_key

from helpers import require
from kilo_etcd.etcd.api import Client, LeaseInfo
from kilo_etcd.etcd.client import open_client
from kilo_etcd.store import operator
from kilo_etcd.store.session.session import Session
from kilo_etcd.store.silence import Claiming, claiming, silent_for
from kilo_etcd.testing.etcd_server import EtcdServer
from kilo_etcd.testing.fake_etcd import FakeEtcd

SUBNETS = (ip_network("10.4.0.0/16"),)
DAY = 86400


@pytest.mark.parametrize(
    ("ttl", "granted", "seconds"),
    [(DAY, DAY, 0), (DAY - 500, DAY, 0), (DAY - 4200, DAY, 3600), (0, DAY, DAY - 600), (-1, 0, 0), (10, 30, 10)],
)
def test_silence_is_what_has_gone_of_the_lease_less_a_keepalive(ttl: int, granted: int, seconds: int) -> None:
    assert silent_for(LeaseInfo(id=1, ttl=ttl, granted_ttl=granted)) == seconds


async def _nodes(client: Client) -> dict[str, Claiming]:
    living = await operator.statuses(client, KEYS)
    _, view = await operator.snapshot(client, KEYS)
    return {node.name: node for node in await claiming(client, KEYS, view, living.keys())}


async def _join(client: Client, name: str, forget_after: int = DAY) -> Session:
    it = Session(client, KEYS, name, wg_key(name), forget_after=forget_after)
    await it.claim_addresses(SUBNETS)
    await it.register(record(name))
    return it


@pytest.mark.autojump
async def test_a_claim_without_a_record_is_as_old_as_a_lease_at_least() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    async with trio.open_nursery() as nursery:
        living = await _join(client, "living")
        await nursery.start(living.run)
        for name in ("away", "short-lived"):
            await _join(client, name, DAY if name == "away" else 3600)
        await trio.sleep(2 * 3600)
        found = await _nodes(client)
        assert [found[name].alive for name in sorted(found)] == [False, True, False]
        assert (found["away"].registered, found["away"].silent) == (True, 2 * 3600 - 600)
        assert (found["short-lived"].registered, found["short-lived"].silent) == (False, 2 * 3600 - 900)
        assert found["living"].silent == 0
        assert all(len(node.addresses) == 1 for node in found.values())
        nursery.cancel_scope.cancel()


@pytest.mark.autojump
async def test_the_reservation_says_more_than_that_the_record_has_ended() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    for name in ("brief", "ephemeral"):
        it = Session(client, KEYS, name, wg_key(name), forget_after=7200, ephemeral=name == "ephemeral")
        await it.claim_addresses(SUBNETS)
        await it.register(record(name))
    async with trio.open_nursery() as nursery:
        await nursery.start(it.run)
        await trio.sleep(10800)
        found = await _nodes(client)
        assert (found["brief"].registered, found["brief"].reserved) == (False, True)
        assert found["brief"].silent == 10800 - 1800
        await trio.sleep(7200)
        found = await _nodes(client)
        assert (found["brief"].registered, found["brief"].reserved) == (False, False)
        assert found["brief"].silent == 0, "an ephemeral node's lease says nothing of others"
        assert found["ephemeral"].alive
        nursery.cancel_scope.cancel()


@pytest.mark.autojump
async def test_what_is_known_of_the_silence_grows_and_is_a_lower_bound() -> None:
    etcd, forget_after = FakeEtcd(), 7200
    client = etcd.client()
    async with trio.open_nursery() as nursery:
        living = await _join(client, "living", forget_after)
        await nursery.start(living.run)
        await _join(client, "gone", forget_after)
        died, known, seen = trio.current_time(), 0, set()
        for _ in range(60):
            await trio.sleep(311)
            node = (await _nodes(client))["gone"]
            assert known <= node.silent <= trio.current_time() - died, node
            known = node.silent
            seen.add((node.registered, node.reserved))
        assert (known, seen) == (2 * forget_after, {(True, True), (False, True), (False, False)})
        nursery.cancel_scope.cancel()


@pytest.mark.autojump
async def test_a_host_whose_reservation_is_kept_is_not_silent_although_it_has_no_record() -> None:
    """It is joining, or finds no address in a full space; one that was renamed has been silent for as long as its
    reservation."""
    etcd, forget_after = FakeEtcd(), 7200
    client = etcd.client()
    it = Session(client, KEYS, "host", wg_key("host"), forget_after=forget_after)
    await it.claim_addresses(SUBNETS)
    assert ((await _nodes(client))["host"].registered, (await _nodes(client))["host"].silent) == (False, 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(it.run)
        for _ in range(20):
            await trio.sleep(1000)
            assert (await _nodes(client))["host"].silent == 0
        nursery.cancel_scope.cancel()
    left, known = trio.current_time(), 0
    for _ in range(40):
        await trio.sleep(100)
        silent = (await _nodes(client))["host"].silent
        assert known <= silent <= trio.current_time() - left
        known = silent
    assert known > 0


@pytest.mark.etcd
async def test_a_real_etcd_tells_what_is_left_of_a_lease() -> None:
    require("etcd", "etcdctl")
    async with EtcdServer.run() as server, open_client(server.config()) as client:
        away = await _join(client, "away")
        await away.resign()
        found = await _nodes(client)
        assert found["away"] == Claiming(
            name="away", addresses=away.addresses, registered=True, reserved=True, alive=False, silent=0
        )
