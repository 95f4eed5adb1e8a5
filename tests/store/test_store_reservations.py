"""Unused claims of mesh addresses: for how long they are kept, who may take them, and hosts whose claims go by
themselves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from store_world import KEYS, record, running, wg_key
from structlog.testing import capture_logs

from helpers import eventually, examples
from kilo_etcd.etcd.api import Compare, Delete, EtcdError, Full, Op, PermissionDenied, Put, TxnResult
from kilo_etcd.model import CandidateClass, IPAddress, IPNetwork
from kilo_etcd.store import claims
from kilo_etcd.store.claims import NoAddressLeft
from kilo_etcd.store.mirror import ClusterNotTrusted, Mirror
from kilo_etcd.store.records import StatusRecord, encode
from kilo_etcd.store.session.cluster_guard import NoGuard
from kilo_etcd.store.session.node_identity import NameTaken
from kilo_etcd.store.session.session import Session
from kilo_etcd.store.view import View
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd

pytestmark = pytest.mark.autojump

FORGET_AFTER = 120
AGES = 9 * FORGET_AFTER // 4 + 60
"""After so long nothing but claims is left of a host, in seconds."""
FOUR, SIX = (ip_network("10.4.0.0/30"),), (ip_network("fd00:4::/126"),)
ELSEWHERE = (ip_network("10.9.0.0/30"),)
TAKEN = "no mesh address is free; the unused one of a node that is gone was taken"
LOST = "the mesh address of before is another's now; another one is chosen"


def session(client: FakeClient, name: str, **options: Any) -> Session:
    return Session(client, KEYS, name, wg_key(name), forget_after=FORGET_AFTER, **options)


async def joined(etcd: FakeEtcd, name: str, subnets: tuple[IPNetwork, ...] = FOUR, **options: Any) -> Session:
    """A host that has joined; its agent dies at once."""
    it = session(etcd.client(), name, **options)
    await it.claim_addresses(subnets)
    await it.register(record(name))
    return it


@asynccontextmanager
async def followed(**options: Any) -> AsyncIterator[FakeEtcd]:
    """An etcd that the agent of `first` follows, which joined before all others and has an address elsewhere."""
    etcd = FakeEtcd(**options)
    async with running(await joined(etcd, "first", ELSEWHERE)):
        yield etcd


def holders(etcd: FakeEtcd) -> dict[str, tuple[IPAddress, ...]]:
    """Who has which addresses, by all that etcd holds."""
    view = View(KEYS)
    view.load(etcd.data.values(), etcd.header())
    names = {key.split("/")[3] for key in etcd.keys("/kilo/by/")} - {"first"}
    all_claimed = {address for name in names for address in view.claimed_by(("node", name))}
    result: dict[str, tuple[IPAddress, ...]] = {}
    for address in sorted(all_claimed, key=int):
        holder = view.holder(address)
        assert holder is not None
        result[holder[1]] = (*result.get(holder[1], ()), address)
    return result


def held(etcd: FakeEtcd) -> set[IPAddress]:
    return {address for addresses in holders(etcd).values() for address in addresses}


@pytest.mark.parametrize("subnets", [FOUR, SIX])
async def test_an_unused_claim_is_kept_for_twice_forget_after_and_taken_only_if_no_address_is_free(
    subnets: tuple[IPNetwork, ...],
) -> None:
    async with followed() as etcd:
        room = 2 if subnets is FOUR else 3
        gone = [await joined(etcd, f"gone-{number}", subnets) for number in range(room - 1)]
        await trio.sleep(AGES)
        spare = await joined(etcd, "spare", subnets)
        assert spare.addresses[0] not in {each.addresses[0] for each in gone}, "one is free, so nothing is taken"
        async with running(spare):
            with capture_logs() as logs:
                new = await joined(etcd, "new", subnets)
            (former,) = [each._name for each in gone if each.addresses == new.addresses]
            (line,) = [entry for entry in logs if entry["event"] == TAKEN]
            assert (line["node"], line["former"], line["address"]) == ("new", former, str(new.addresses[0]))
            assert KEYS.address(former, new.addresses[0]) not in etcd
            assert holders(etcd)["new"] == new.addresses


async def test_no_claim_is_taken_as_long_as_the_record_or_the_reservation_stands() -> None:
    async with followed() as etcd:
        gone = [await joined(etcd, f"gone-{number}") for number in range(2)]
        for wait in (0, FORGET_AFTER - 60, 120, FORGET_AFTER - 120):
            await trio.sleep(wait)
            with pytest.raises(NoAddressLeft, match="kgctl node forget --dead-for"):
                await session(etcd.client(), "new").claim_addresses(FOUR)
        assert KEYS.node("gone-0") not in etcd, "its record has ended long ago"
        await trio.sleep(120)
        assert await session(etcd.client(), "new").claim_addresses(FOUR) in [each.addresses for each in gone]


class Counting(FakeClient):
    """Counts how often it refreshes each lease, streams of keepalives included."""

    def __init__(self, server: FakeEtcd, name: str) -> None:
        super().__init__(server, name)
        self.refreshed = Counter[int]()

    async def refresh_lease(self, lease_id: int) -> int:
        self.refreshed[lease_id] += 1
        return await super().refresh_lease(lease_id)


async def test_a_living_host_keeps_its_address_for_ever() -> None:
    async with followed() as etcd:
        clients = [Counting(etcd, f"host-{number}") for number in range(2)]
        hosts = [session(client, client.name) for client in clients]
        async with running(*hosts):
            for each in hosts:
                await each.claim_addresses(FOUR)
                await each.register(record(each._name))
            before = [etcd.data[KEYS.reservation(each._name).encode()] for each in hosts]
            await trio.sleep(10 * FORGET_AFTER)
            assert [etcd.data[KEYS.reservation(each._name).encode()] for each in hosts] == before, "kept, never lost"
            refreshed = {client.refreshed[kv.lease] for client, kv in zip(clients, before, strict=True)}
            assert refreshed <= {39, 40}, "four times in forget-after"
            for each in hosts:
                etcd.delete(KEYS.node(each._name))
            await eventually(lambda: all(each.healthy and KEYS.node(each._name) in etcd for each in hosts))
            with pytest.raises(NoAddressLeft):
                await joined(etcd, "new")
            assert holders(etcd) == {each._name: each.addresses for each in hosts}


async def test_a_reservation_is_refreshed_whenever_another_lease_could_not_be_kept() -> None:
    """As after a suspension of the host, which its clock does not count."""
    etcd = FakeEtcd()
    client = Counting(etcd, "host")
    it = session(client, "host")
    async with running(it):
        await it.claim_addresses(FOUR)
        await it.register(record("host"))
        reservation = etcd.data[KEYS.reservation("host").encode()].lease
        for away in (8, 60):
            await trio.sleep(5)
            before = client.refreshed[reservation]
            client.cut()
            await trio.sleep(away)
            client.mend()
            await eventually(lambda before=before: client.refreshed[reservation] > before, 10)  # type: ignore[misc]
            await eventually(lambda: it.healthy, 10)
        assert client.refreshed[reservation] <= 4


async def test_a_reservation_whose_lease_was_ended_is_put_again() -> None:
    etcd = FakeEtcd()
    it = await joined(etcd, "host")
    async with running(it):
        await etcd.client().revoke_lease(etcd.data[KEYS.reservation("host").encode()].lease)
        assert KEYS.reservation("host") not in etcd
        await trio.sleep(FORGET_AFTER / 2)
        assert etcd.leases()[etcd.data[KEYS.reservation("host").encode()].lease] == 9 * FORGET_AFTER // 4


@pytest.mark.parametrize("confined", [False, True])
async def test_the_former_owner_comes_back_and_takes_another_address(confined: bool) -> None:
    """`confined`: its role does not let the taker delete another's claim, which stands then."""
    async with followed() as etcd:
        former = await joined(etcd, "former")
        await trio.sleep(AGES)
        other = await joined(etcd, "other")
        client = Confined(etcd, "new") if confined else etcd.client()
        new = session(client, "new")
        assert await new.claim_addresses(FOUR) == former.addresses
        await new.register(record("new"))
        assert (KEYS.address("former", former.addresses[0]) in etcd) is confined
        async with running(new, other):
            assert holders(etcd) == {"new": new.addresses, "other": other.addresses}
            told = f"{former.addresses[0]}, which it had, is that of node new since etcd's revision"
            with pytest.raises(NoAddressLeft, match=told), capture_logs() as logs:
                await session(etcd.client(), "former").claim_addresses(FOUR, former=former.addresses)
            assert [(entry["event"], entry["now_of"]) for entry in logs if "now_of" in entry] == [(LOST, "node new")]
            assert holders(etcd) == {"new": new.addresses, "other": other.addresses}
            free = other.addresses
            await other.forget()
            back = await joined(etcd, "former")
            assert back.addresses == free
            assert holders(etcd) == {"new": new.addresses, "former": back.addresses}
            again = session(etcd.client(), "new")
            assert await again.claim_addresses(FOUR, doubted=True) == new.addresses


async def test_a_host_whose_claim_was_deleted_has_its_address_again_if_that_is_free() -> None:
    etcd = FakeEtcd()
    wide = (ip_network("10.4.0.0/16"),)
    usual = await joined(etcd, "host", wide)
    await usual.forget()
    other = next(address for address in map(ip_address, ("10.4.0.7", "10.4.0.8")) if address not in usual.addresses)
    assert await session(etcd.client(), "host").claim_addresses(wide, former=(other,)) == (other,)


async def test_an_address_may_be_taken_any_number_of_times_by_hosts_that_delete_no_other_claims() -> None:
    async with followed() as etcd:
        keeps = await joined(etcd, "keeps")
        async with running(keeps):
            for number in range(60):
                it = session(Confined(etcd, f"worker-{number}"), f"worker-{number}")
                await it.claim_addresses(FOUR)
                await it.register(record(it._name))
                assert holders(etcd)[it._name] == it.addresses
                await trio.sleep(AGES)
            assert len([key for key in etcd.keys("/kilo/by/worker-") if "/addresses/" in key]) == 60


@pytest.mark.parametrize("confined", [False, True])
async def test_nothing_is_taken_beside_agents_that_know_no_reservations_if_the_old_claim_stays(confined: bool) -> None:
    """To an agent of an older version the oldest claim has the address."""
    async with followed() as etcd:
        former = await joined(etcd, "former")
        await trio.sleep(AGES)
        older = await joined(etcd, "older")
        async with running(older):
            etcd.delete(KEYS.reservation("older"))
            new = session(Confined(etcd, "new") if confined else etcd.client(), "new")
            if confined:
                with pytest.raises(NoAddressLeft):
                    await new.claim_addresses(FOUR)
            else:
                assert await new.claim_addresses(FOUR) == former.addresses
            assert (KEYS.address("former", former.addresses[0]) in etcd) is confined


# --- what must not be taken ---------------------------------------------------------------------------------------


async def test_in_an_etcd_that_no_earlier_agent_follows_nothing_is_taken() -> None:
    """It was restored from a backup, and waits to be adopted: the hosts go on, and their leases end here."""
    etcd = FakeEtcd()
    hosts = [await joined(etcd, f"host-{number}") for number in range(2)]
    await trio.sleep(AGES)
    async with running(await joined(etcd, "newcomer", ELSEWHERE)):
        assert not [key for key in etcd.keys("/kilo/by/host") if "/addresses/" not in key], "kept for nobody"
        with pytest.raises(
            NoAddressLeft, match="2 of these are kept for nobody, and not taken, since no agent follows"
        ):
            await joined(etcd, "new")
        for each in hosts:
            back = await joined(etcd, each._name)
            assert back.addresses == each.addresses


async def test_a_host_that_comes_back_while_another_waits_to_take_its_address_keeps_it() -> None:
    """As after an adoption, when all hosts come back within seconds."""
    async with followed() as etcd, trio.open_nursery() as nursery:
        owners = [await joined(etcd, f"owner-{number}") for number in range(2)]
        await trio.sleep(AGES)

        async def take() -> None:
            with pytest.raises(NoAddressLeft):
                await joined(etcd, "new")

        nursery.start_soon(take)
        await trio.sleep(5)
        for each in owners:
            assert (await joined(etcd, each._name)).addresses == each.addresses


async def test_an_ephemeral_host_takes_an_unused_address_although_that_takes_longer_than_its_lease() -> None:
    async with followed() as etcd:
        for number in (1, 2):
            etcd.put(KEYS.address(f"gone-{number}", ip_address(f"10.4.0.{number}")), "")
        started = trio.current_time()
        it = await joined(etcd, "brief", ephemeral=True)
        assert KEYS.address("brief", it.addresses[0]) in etcd
        assert trio.current_time() - started < 15, "not again and again"


async def test_only_an_address_of_the_family_that_is_full_is_taken() -> None:
    async with followed() as etcd:
        for number, subnet in ((1, "fd00:4::"), (1, "10.4.0."), (2, "10.4.0.")):
            etcd.put(KEYS.address(f"gone-{number}", ip_address(f"{subnet}{number}")), "")
        assert (await joined(etcd, "new", (*FOUR, *SIX))).addresses[0] in FOUR[0]
        assert etcd.keys(KEYS.addresses("gone-1"))[-1:] == [KEYS.address("gone-1", ip_address("fd00:4::1"))]


async def test_an_address_that_was_not_unused_all_the_time_is_not_taken() -> None:
    async with followed() as etcd, trio.open_nursery() as nursery:
        for number in (1, 2):
            etcd.put(KEYS.address(f"host-{number}", ip_address(f"10.4.0.{number}")), "")
        etcd.put_kept(KEYS.reservation("host-1"), "")

        async def take() -> None:
            with pytest.raises(NoAddressLeft):
                await joined(etcd, "new")

        nursery.start_soon(take)
        await trio.sleep(5)
        etcd.put_kept(KEYS.reservation("host-2"), "")
        etcd.delete(KEYS.reservation("host-1"))


async def test_an_address_is_not_taken_as_long_as_an_agent_lives_under_the_name() -> None:
    async with followed() as etcd:
        for number in (1, 2):
            etcd.put(KEYS.address(f"host-{number}", ip_address(f"10.4.0.{number}")), "")
        etcd.put_kept(KEYS.status("host-1"), "{}")
        assert (await joined(etcd, "new")).addresses == (ip_address("10.4.0.2"),)
        with pytest.raises(NoAddressLeft):
            await joined(etcd, "newer")


@pytest.mark.parametrize("ephemeral", [False, True])
async def test_a_second_host_of_a_living_hosts_name_changes_nothing_of_it(ephemeral: bool) -> None:
    for of_the_living in (False, True):
        etcd = FakeEtcd()
        living = await joined(etcd, "web", ephemeral=of_the_living)
        async with running(living):
            await living.put_status(StatusRecord(public_key=wg_key("web"), location=""))
            before = {key: etcd.data[key.encode()] for key in of(etcd, "web")}
            second = Session(
                etcd.client(), KEYS, "web", wg_key("second"), forget_after=FORGET_AFTER, ephemeral=ephemeral
            )
            with pytest.raises(NameTaken):
                await second.claim_addresses(FOUR)
            await second.forget()
            await trio.sleep(3 * FORGET_AFTER)
            assert {key: etcd.data[key.encode()] for key in of(etcd, "web")} == before
            assert living.healthy


@pytest.mark.parametrize("ephemeral", [False, True])
async def test_a_second_host_of_the_name_changes_nothing_if_the_first_one_comes_while_it_looks(ephemeral: bool) -> None:
    etcd = FakeEtcd()
    first = await joined(etcd, "web")
    await first.resign()
    again = session(etcd.client(), "web")

    class Overtaken(FakeClient):
        async def txn(self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()) -> Any:
            if not again.registered and any(isinstance(op, Put) and "/by/web/" in str(op.key) for op in success):
                await again.claim_addresses(FOUR)
                await again.register(record("web"))
            return await super().txn(compare, success, failure)

    second = Session(
        Overtaken(etcd), KEYS, "web", wg_key("second"), forget_after=FORGET_AFTER, ephemeral=ephemeral, lease_ttl=2
    )
    async with running(again):
        with pytest.raises(NameTaken):
            await second.claim_addresses(FOUR, doubted=True)
        kvs = [etcd.data[key.encode()] for key in (KEYS.address("web", first.addresses[0]), KEYS.reservation("web"))]
        assert [etcd.leases().get(kv.lease) for kv in kvs] == [None, 9 * FORGET_AFTER // 4]
        assert again.addresses == first.addresses


async def test_after_a_restored_backup_a_host_keeps_its_address_before_an_unused_claim_of_before() -> None:
    """It had taken the address after the backup was made."""
    etcd = FakeEtcd()
    former = await joined(etcd, "former")
    await trio.sleep(AGES)
    it = session(etcd.client(), "host")
    it._addresses.addresses, it._addresses._subnets = former.addresses, FOUR
    assert await it.claim_addresses(FOUR, doubted=True) == former.addresses
    await it.register(record("host"))
    assert holders(etcd) == {"host": former.addresses}
    with capture_logs() as logs:
        assert (await joined(etcd, "former")).addresses != former.addresses
    assert [entry["now_of"] for entry in logs if entry["event"] == LOST] == ["node host"]


async def test_a_host_keeps_one_claim_of_each_family() -> None:
    """After a restored backup it has that of before too."""
    etcd = FakeEtcd()
    (before,) = (await joined(etcd, "host")).addresses
    (now,) = {ip_address("10.4.0.1"), ip_address("10.4.0.2")} - {before}
    it = session(etcd.client(), "host")
    it._addresses.addresses, it._addresses._subnets = (now,), FOUR
    assert await it.claim_addresses(FOUR, doubted=True) == (now,)
    assert KEYS.address("host", before) not in etcd


# --- while an unused address is waited for ------------------------------------------------------------------------


def fill(etcd: FakeEtcd) -> None:
    """Claim both addresses of FOUR for hosts that are gone."""
    for number in (1, 2):
        etcd.put(KEYS.address(f"gone-{number}", ip_address(f"10.4.0.{number}")), "")


async def test_a_host_that_waits_for_an_unused_address_writes_all_else_meanwhile() -> None:
    async with followed() as etcd:
        it = await joined(etcd, "host", (ip_network("10.8.0.0/30"),))
        fill(etcd)
        async with running(it), trio.open_nursery() as nursery:
            nursery.start_soon(it.claim_addresses, FOUR)
            await trio.sleep(3)
            with trio.fail_after(1):
                assert await it.put_status(StatusRecord(public_key=wg_key("host"), location="", version="2"))
                assert await it.enter("gcp", CandidateClass.REST)
                await it.register(record("host", location="gcp"))
            candidate = KEYS.election("gcp", "host")
            etcd.delete(candidate)
            etcd.delete(KEYS.node("host"))
            await eventually(lambda: KEYS.node("host") in etcd and candidate in etcd, 5)
            assert len(etcd.keys(KEYS.addresses("host"))) == 1, "none is taken yet"
            assert it.healthy
        assert it.addresses[0] in FOUR[0]
        stated = json.loads(etcd.data[KEYS.node("host").encode()].value)
        assert (stated["meshAddresses"], stated["location"]) == ([f"{it.addresses[0]}/30"], "gcp")


async def test_a_host_that_leaves_while_it_waits_for_an_unused_address_takes_none() -> None:
    async with followed() as etcd, trio.open_nursery() as nursery:
        fill(etcd)
        it = session(etcd.client(), "host")
        nursery.start_soon(it.claim_addresses, FOUR)
        await trio.sleep(3)
        with trio.fail_after(1):
            await it.forget()
        await trio.sleep(60)
        assert of(etcd, "host") == []


async def test_a_running_host_that_lost_its_address_waits_for_an_unused_one_with_nobody_behind_it() -> None:
    async with followed() as etcd:
        client = etcd.client()
        it = await joined(etcd, "host")
        it = session(client, "host")
        async with running(it):
            await it.claim_addresses(FOUR)
            await it.register(record("host"))
            client.cut()
            await trio.sleep(AGES)
            etcd.delete(KEYS.address("host", it.addresses[0]))
            fill(etcd)
            etcd.put_kept(KEYS.reservation(f"gone-{int(it.addresses[0]) % 4}"), "")
            with capture_logs() as logs:
                client.mend()
                await eventually(lambda: "an unused one is taken" in (it.last_error or ""), 10)
                with trio.fail_after(1):
                    assert not await it.put_status(StatusRecord(public_key=wg_key("host"), location="", version="2"))
                await eventually(lambda: it.healthy, 20)
            assert holders(etcd)["host"] == it.addresses
            assert json.loads(etcd.data[KEYS.status("host").encode()].value)["version"] == "2"
            events = [entry["event"] for entry in logs]
            waits = "no mesh address is free; an unused one is taken if its former owner stays away"
            assert [events.count(event) for event in (waits, TAKEN, LOST)] == [1, 1, 1]


@pytest.mark.parametrize("away", [5, 60])
async def test_a_host_that_loses_etcd_while_it_waits_takes_no_address_by_what_it_saw_long_ago(away: int) -> None:
    async with followed() as etcd:
        fill(etcd)
        client = etcd.client()
        it = session(client, "host")
        with trio.move_on_after(3):
            await it.claim_addresses(FOUR)
        client.cut()
        await trio.sleep(away)
        client.mend()
        started = trio.current_time()
        await it.claim_addresses(FOUR)
        assert trio.current_time() - started == pytest.approx(2 if away == 5 else 10, abs=0.1)


async def test_what_was_unused_in_another_etcd_does_not_count() -> None:
    async with followed() as etcd:
        fill(etcd)
        guard = NoGuard()
        it = session(etcd.client(), "host", guard=guard)
        with trio.move_on_after(9):
            await it.claim_addresses(FOUR)
        guard.generation = 1
        started = trio.current_time()
        await it.claim_addresses(FOUR)
        assert trio.current_time() - started == pytest.approx(10, abs=0.1)


async def test_nothing_is_taken_in_an_etcd_that_is_not_followed_any_more_after_the_wait() -> None:
    class Guard(NoGuard):
        trusted = True

        async def verify(self) -> None:
            await super().verify()
            if not self.trusted:
                raise ClusterNotTrusted("another etcd")

    async with followed() as etcd:
        fill(etcd)
        guard = Guard()
        it = session(etcd.client(), "host", guard=guard)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def claim() -> None:
                with pytest.raises(ClusterNotTrusted):
                    await it.claim_addresses(FOUR)

            await trio.sleep(5)
            guard.trusted = False
        assert of(etcd, "host") == []


async def test_what_was_unused_a_moment_ago_is_not_taken_before_its_time() -> None:
    async with followed() as etcd:
        fill(etcd)
        client = etcd.client()
        leases = claims.Leases(reservation=(await client.grant_lease(300)).id)
        unused = claims.Unused(frozenset(FOUR[0].hosts()), trio.current_time(), claims.PAUSE)
        await trio.sleep(claims.PAUSE - 1)
        with pytest.raises(claims.TakeLater):
            await claims.claim_addresses(client, KEYS, "host", FOUR, leases=leases, unused=unused)
        await trio.sleep(1)
        assert await claims.claim_addresses(client, KEYS, "host", FOUR, leases=leases, unused=unused)


async def test_two_hosts_that_wait_while_one_address_comes_free_share_out_what_there_is() -> None:
    async with followed() as etcd, running(await joined(etcd, "kept")), trio.open_nursery() as nursery:
        last = next(address for address in map(ip_address, ("10.4.0.1", "10.4.0.2")) if address not in held(etcd))
        etcd.put(KEYS.address("gone", last), "")
        waiting = [session(etcd.client(), name) for name in ("one", "two")]
        outcomes: list[tuple[IPAddress, ...] | str] = []

        async def wait(it: Session) -> None:
            try:
                outcomes.append(await it.claim_addresses(FOUR))
            except NoAddressLeft as error:
                outcomes.append(str(error))

        for it in waiting:
            nursery.start_soon(wait, it)
        await trio.sleep(5)
        etcd.delete(KEYS.address("gone", last))
        await trio.sleep(10)
        assert sorted(map(len, outcomes))[0] == 1
        assert (last,) in outcomes
        assert any("no address is left" in outcome for outcome in outcomes)


async def test_a_host_whose_new_address_could_not_be_put_on_record_states_it_later() -> None:
    class Refusing(FakeClient):
        """Takes no record."""

        async def txn(self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()) -> Any:
            if refuses and any(isinstance(op, Put) and op.key == KEYS.node("host") for op in success):
                raise Full("no space")
            return await super().txn(compare, success, failure)

    refuses = False
    etcd = FakeEtcd()
    it = session(Refusing(etcd), "host")
    async with running(it):
        await it.claim_addresses(FOUR)
        await it.register(record("host"))
        refuses = True
        with pytest.raises(Full):
            await it.claim_addresses(ELSEWHERE)
        await trio.sleep(5)
        assert not it.healthy
        refuses = False
        await eventually(lambda: it.healthy, 20)
        stated = json.loads(etcd.data[KEYS.node("host").encode()].value)["meshAddresses"]
        assert stated == [f"{it.addresses[0]}/30"]
        assert it.addresses[0] in ELSEWHERE[0]


# --- reservations under no lease ----------------------------------------------------------------------------------


@pytest.mark.parametrize("confined", [False, True])
async def test_a_reservation_under_no_lease_counts_for_nothing(confined: bool) -> None:
    async with followed() as etcd:
        gone = await joined(etcd, "gone")
        etcd.put(KEYS.reservation("gone"), "")
        other = await joined(etcd, "other")
        async with running(other):
            await trio.sleep(AGES)
            new = session(Confined(etcd, "new") if confined else etcd.client(), "new")
            assert await new.claim_addresses(FOUR) == gone.addresses
            await new.register(record("new"))
            with pytest.raises(NoAddressLeft):
                await joined(etcd, "gone")
            assert holders(etcd)["new"] == gone.addresses, "the reservation of the former owner is made anew"


# --- a full space -------------------------------------------------------------------------------------------------


async def test_a_running_host_that_comes_back_to_a_full_space_says_whose_its_address_is_and_looks_rarely() -> None:
    async with followed() as etcd:
        client = etcd.client()
        it, other = session(client, "host"), await joined(etcd, "other")
        async with running(it, other):
            await it.claim_addresses(FOUR)
            await it.register(record("host"))
            client.cut()
            await trio.sleep(AGES)
            new = await joined(etcd, "new")
            async with running(new):
                client.calls.clear()
                client.mend()
                await trio.sleep(3600)
                assert 5 <= client.calls.count("range") // 3 <= 10
                assert f"{new.addresses[0]}, which it had, is that of node new since" in (it.last_error or "")
                assert "2 are those of hosts in the mesh, 0 those of hosts that are gone" in (it.last_error or "")
                assert not it.healthy
                assert holders(etcd) == {"new": new.addresses, "other": other.addresses}
                await new.forget()
                await eventually(lambda: it.healthy, 1000)
                assert holders(etcd) == {"host": it.addresses, "other": other.addresses}


class ClaimsDenied(FakeClient):
    """Of a user that may claim no address."""

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        if any(isinstance(op, Put) for op in success):
            raise PermissionDenied("etcd denies it")
        return await super().txn(compare, success, failure)


@pytest.mark.parametrize("refusal", [NoAddressLeft, PermissionDenied])
async def test_a_start_that_finds_no_address_leaves_no_lease(refusal: type[Exception]) -> None:
    etcd = FakeEtcd()
    if refusal is NoAddressLeft:
        fill(etcd)
    for _ in range(20):
        client = etcd.client() if refusal is NoAddressLeft else ClaimsDenied(etcd, "new")
        with pytest.raises(refusal):
            await session(client, "new").claim_addresses(FOUR)
    assert etcd.leases() == {}
    assert etcd.keys(KEYS.by("new")) == []


async def test_a_start_that_is_ended_while_it_waits_for_an_unused_address_leaves_no_lease() -> None:
    async with followed() as etcd, trio.open_nursery() as nursery:
        fill(etcd)
        before = etcd.leases()
        it = session(etcd.client(), "host")
        nursery.start_soon(it.claim_addresses, FOUR)
        await trio.sleep(3)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await it.resign()
        assert etcd.leases() == before


async def test_a_host_that_found_no_address_looks_at_once_in_other_subnets_and_in_another_etcd() -> None:
    etcd = FakeEtcd()
    for number in (1, 2):
        etcd.put(KEYS.address(f"host-{number}", ip_address(f"10.4.0.{number}")), "")
    it = session(etcd.client(), "new")
    with pytest.raises(NoAddressLeft):
        await it.claim_addresses(FOUR)
    assert (await it.claim_addresses(ELSEWHERE))[0] in ELSEWHERE[0]
    await it.forget()
    with pytest.raises(NoAddressLeft):
        await it.claim_addresses(FOUR)
    etcd.delete(KEYS.address("host-1", ip_address("10.4.0.1")))
    it._look_anew()
    assert await it.claim_addresses(FOUR) == (ip_address("10.4.0.1"),)


class Confined(FakeClient):
    """May write its own keys only."""

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        for op in success:
            own = KEYS.by(self.name), KEYS.status_by(self.name)
            if isinstance(op, Delete) and not str(op.key).startswith(own):
                raise PermissionDenied("etcd denies it")
        return await super().txn(compare, success, failure)

    def __init__(self, server: FakeEtcd, name: str) -> None:
        super().__init__(server, name)


async def test_a_host_that_may_not_delete_claims_tries_it_once_and_names_older_agents() -> None:
    denied = list[str]()

    class Counting(Confined):
        async def txn(
            self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
        ) -> TxnResult:
            try:
                return await super().txn(compare, success, failure)
            except PermissionDenied as error:
                denied.append(str(error))
                raise

    async with followed() as etcd:
        for number in range(1, 255):
            etcd.put(KEYS.address(f"gone-{number}", ip_address(f"10.4.0.{number}")), "")
        etcd.put_kept(KEYS.node("older"), encode(record("older")))
        subnets = (ip_network("10.4.0.0/24"),)
        with pytest.raises(NoAddressLeft, match="since agents of an older version are in the mesh: upgrade them"):
            await session(Counting(etcd, "new"), "new").claim_addresses(subnets)
        assert len(denied) == 1
        etcd.delete(KEYS.node("older"))
        denied.clear()
        await session(Counting(etcd, "new"), "new").claim_addresses(subnets)
        assert len(denied) == 1


@pytest.mark.parametrize("ttl", [5, 30])
async def test_in_a_restored_etcd_statuses_of_the_backup_are_no_living_agents(ttl: int) -> None:
    """They stand until their leases end, and nobody keeps them."""
    etcd = FakeEtcd()
    await joined(etcd, "first", ELSEWHERE, lease_ttl=ttl)
    fill(etcd)
    with pytest.raises(NoAddressLeft):
        await joined(etcd, "new", lease_ttl=ttl)


async def test_a_search_that_takes_longer_than_the_pause_ends() -> None:
    class Slow(FakeClient):
        async def range(self, *arguments: Any, **options: Any) -> Any:
            await trio.sleep(12)
            return await super().range(*arguments, **options)

    async with followed() as etcd:
        fill(etcd)
        with trio.fail_after(300):
            assert await session(Slow(etcd, "slow"), "slow").claim_addresses(FOUR)


@pytest.mark.parametrize("older", [False, True])
async def test_an_owner_that_comes_back_just_before_keeps_its_address(older: bool) -> None:
    """`older`: its agent is of a version that puts no reservation."""
    async with followed() as etcd:
        owner = await joined(etcd, "owner")
        other = await joined(etcd, "other")
        await trio.sleep(AGES)
        back = session(etcd.client(), "owner")

        class Overtaken(FakeClient):
            async def txn(
                self, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
            ) -> Any:
                if any(isinstance(op, Delete) for op in success) and KEYS.node("owner") not in etcd:
                    if older:
                        etcd.put_kept(KEYS.node("owner"), encode(record("owner")))
                    elif not back.addresses:
                        await back.claim_addresses(FOUR)
                return await super().txn(compare, success, failure)

        new = session(Overtaken(etcd, "new"), "new")
        assert await new.claim_addresses(FOUR) == other.addresses
        assert KEYS.address("owner", owner.addresses[0]) in etcd
        assert holders(etcd) == {"owner": owner.addresses, "new": other.addresses}


@pytest.mark.parametrize("confined", [False, True])
async def test_of_many_hosts_that_take_unused_addresses_at_once_few_meet(confined: bool) -> None:
    subnet = (ip_network("10.4.0.0/27"),)
    async with followed(delay=0.01) as etcd:
        for number in range(1, 31):
            etcd.put(KEYS.address(f"gone-{number}", ip_address(f"10.4.0.{number}")), "")
        clients = [Confined(etcd, f"new-{n}") if confined else etcd.client(f"new-{n}") for n in range(16)]
        takers = [session(client, client.name) for client in clients]
        before = etcd.header().revision
        async with trio.open_nursery() as nursery:
            for each in takers:
                nursery.start_soon(each.claim_addresses, subnet)
        assert len({each.addresses for each in takers}) == 16
        assert {each._name: each.addresses for each in takers}.items() <= holders(etcd).items()
        writes, reads = etcd.header().revision - before, sum(client.calls.count("range") for client in clients)
        # Two more writes for each that meets another one. Nine reads each, all of the tree's keys or of a part.
        assert writes <= (24 if confined else 16)
        assert reads <= (152 if confined else 144)


@pytest.mark.parametrize("confined", [False, True])
async def test_of_hosts_that_race_for_the_last_unused_address_one_has_it(confined: bool) -> None:
    async with followed(delay=0.01) as etcd, running(await joined(etcd, "kept")):
        gone = await joined(etcd, "gone")
        await trio.sleep(AGES)
        racers = [session(Confined(etcd, n) if confined else etcd.client(), n) for n in ("r1", "r2", "r3", "r4")]
        won, sentences = list[Session](), list[str]()

        async def race(racer: Session) -> None:
            try:
                await racer.claim_addresses(FOUR)
                won.append(racer)
            except NoAddressLeft as error:
                sentences.append(str(error))

        async with trio.open_nursery() as nursery:
            for racer in racers:
                nursery.start_soon(race, racer)
        assert [each.addresses for each in won] == [gone.addresses]
        assert not any("kept for nobody, and not taken" in sentence for sentence in sentences), sentences
        assert holders(etcd)[won[0]._name] == gone.addresses


async def test_peers_and_addresses_that_a_record_states_are_never_taken() -> None:
    etcd = FakeEtcd()
    etcd.put("/kilo/peer-addresses/laptop/10.4.0.1", "")
    etcd.put(KEYS.address("gone", ip_address("10.4.0.1")), "")
    etcd.put(KEYS.address("gone", ip_address("10.4.0.2")), "")
    stating = {"publicKey": wg_key("stating"), "meshAddresses": ["10.4.0.2/30"]}
    etcd.put(KEYS.node("stating"), json.dumps(stating))
    with pytest.raises(NoAddressLeft):
        await joined(etcd, "new")


# --- ephemeral hosts ----------------------------------------------------------------------------------------------


def of(etcd: FakeEtcd, name: str) -> list[str]:
    return [*etcd.keys(KEYS.by(name)), *etcd.keys(KEYS.status_by(name))]


async def test_record_claim_and_status_of_an_ephemeral_host_go_with_its_short_lease() -> None:
    etcd = FakeEtcd()
    it = await joined(etcd, "brief", ephemeral=True)
    async with running(it):
        await it.put_status(StatusRecord(public_key=wg_key("brief"), location=""))
        await trio.sleep(600)
        assert len(of(etcd, "brief")) == 4
        assert {etcd.leases()[etcd.data[key.encode()].lease] for key in of(etcd, "brief")} == {5}
    await trio.sleep(6)
    assert of(etcd, "brief") == []


async def test_many_short_lived_hosts_never_fill_the_space() -> None:
    etcd = FakeEtcd()
    for number in range(20):
        await joined(etcd, f"worker-{number}", ephemeral=True)
        await trio.sleep(6)
    assert etcd.keys("/kilo/by/") == []


async def test_an_ephemeral_host_that_loses_etcd_for_longer_than_its_lease_joins_again() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    it = session(client, "brief", ephemeral=True)
    mirror = Mirror(client, KEYS)
    async with running(it), trio.open_nursery() as nursery:
        await nursery.start(mirror.run)
        await it.claim_addresses(FOUR)
        await it.register(record("brief"))
        (before,) = it.addresses
        client.cut()
        await eventually(lambda: not of(etcd, "brief"), 20)
        client.mend()
        await eventually(lambda: it.healthy and len(of(etcd, "brief")) == 4, 60)
        assert it.addresses == (before,)
        client.cut()
        await eventually(lambda: not of(etcd, "brief"), 20)
        etcd.put(KEYS.address("other", before), "")
        etcd.put_kept(KEYS.reservation("other"), "")
        client.mend()
        await eventually(lambda: it.healthy and len(of(etcd, "brief")) == 4, 60)
        assert it.addresses != (before,)
        assert holders(etcd) == {"other": (before,), "brief": it.addresses}
        nursery.cancel_scope.cancel()


async def test_a_restart_within_the_lease_goes_on_with_what_is_there() -> None:
    etcd = FakeEtcd()
    first = await joined(etcd, "brief", ephemeral=True)
    await first.put_status(StatusRecord(public_key=wg_key("brief"), location="", version="1"))
    for _ in range(2):
        await trio.sleep(3)
        await first.renew()
    revision = etcd.revision
    again = await joined(etcd, "brief", ephemeral=True)
    async with running(again):
        await trio.sleep(60)
        assert again.addresses == first.addresses
        assert etcd.revision == revision


@pytest.mark.parametrize("first", [False, True])
async def test_a_permanent_host_may_become_ephemeral_and_the_other_way_round(first: bool) -> None:
    etcd = FakeEtcd()
    before = await joined(etcd, "host", ephemeral=first)
    await before.put_status(StatusRecord(public_key=wg_key("host"), location=""))
    await before.resign()
    it = await joined(etcd, "host", ephemeral=not first)
    assert it.addresses == before.addresses
    async with running(it):
        await trio.sleep(60)
        assert holders(etcd) == {"host": it.addresses}
    await trio.sleep(60)
    if first:
        claim, *rest = of(etcd, "host")
        assert claim == KEYS.address("host", it.addresses[0])
        assert etcd.data[claim.encode()].lease == 0
        assert rest == [KEYS.node("host"), KEYS.reservation("host")]
    else:
        assert of(etcd, "host") == []


async def test_all_claims_of_a_host_that_becomes_ephemeral_go_with_its_lease() -> None:
    etcd = FakeEtcd()
    for number in range(250):
        etcd.put(KEYS.address("host", ip_address(f"10.5.0.{number}")), "")
    await joined(etcd, "host", ephemeral=True)
    assert {etcd.data[key.encode()].lease for key in etcd.keys(KEYS.addresses("host"))}.isdisjoint({0})
    await trio.sleep(60)
    assert of(etcd, "host") == []


async def test_an_ephemeral_host_whose_lease_ends_before_it_has_registered_claims_again() -> None:
    etcd = FakeEtcd()
    it = session(etcd.client(), "slow", ephemeral=True)
    (address,) = await it.claim_addresses(FOUR)
    await trio.sleep(10)
    assert of(etcd, "slow") == []
    await it.register(record("slow"))
    assert KEYS.address("slow", address) in etcd
    assert len(of(etcd, "slow")) == 4


async def test_a_host_that_leaves_for_good_leaves_nothing() -> None:
    for ephemeral in (False, True):
        etcd = FakeEtcd()
        it = await joined(etcd, "host", ephemeral=ephemeral)
        async with running(it):
            await it.put_status(StatusRecord(public_key=wg_key("host"), location=""))
            await it.forget()
            await trio.sleep(60)
            assert of(etcd, "host") == []
            assert etcd.leases() == {}


async def test_a_clean_up_of_a_host_whose_agent_is_stopped_leaves_nothing() -> None:
    etcd = FakeEtcd()
    await joined(etcd, "host")
    await session(etcd.client(), "host").forget()
    assert of(etcd, "host") == []


async def test_an_ephemeral_host_is_kept_when_a_changed_record_cannot_be_written() -> None:
    etcd = FakeEtcd()
    client = etcd.client()
    it = session(client, "brief", ephemeral=True)
    async with running(it):
        await it.claim_addresses(FOUR)
        await it.register(record("brief"))
        client.refuse(Full("no space"), reads=False)
        with pytest.raises(Full):
            await it.register(record("brief", location="gcp"))
        await trio.sleep(60)
        assert KEYS.node("brief") in etcd


# --- any order of events ------------------------------------------------------------------------------------------


@settings(max_examples=examples(40))
@given(
    schedule=st.lists(
        st.tuples(
            st.sampled_from(["start", "ephemeral", "crash", "leave", "cut", "mend", "sleep"]),
            st.integers(0, 3),
            st.sampled_from([0.0, 0.02, 3.0, 7.0, FORGET_AFTER + 30.0, 2.5 * FORGET_AFTER]),
        ),
        max_size=14,
    ),
    confined=st.booleans(),
    delay=st.sampled_from([0.0, 0.01]),
)
async def test_no_two_hosts_have_one_address_whatever_happens(
    schedule: list[tuple[str, int, float]], confined: bool, delay: float
) -> None:
    """Two addresses for four hosts, that start, crash, leave, lose etcd and come back."""
    etcd = FakeEtcd(delay=delay)
    first = await joined(etcd, "first", ELSEWHERE)
    agents: dict[int, tuple[Session, FakeClient, trio.CancelScope]] = {}

    async def agent(number: int, ephemeral: bool) -> None:
        client = Confined(etcd, f"h{number}") if confined else etcd.client(f"h{number}")
        it = session(client, f"h{number}", ephemeral=ephemeral)
        with trio.CancelScope() as scope:
            agents[number] = it, client, scope
            while True:
                try:
                    await it.claim_addresses(FOUR)
                    await it.register(record(f"h{number}"))
                    break
                except (NoAddressLeft, NameTaken, EtcdError):
                    await trio.sleep(1)
            await it.run()

    def look() -> None:
        """Whoever is registered and sees etcd has its address, and nobody else has."""
        view = View(KEYS)
        view.load(etcd.data.values(), etcd.header())
        for it, client, _ in agents.values():
            if client.connected and it.healthy:
                for address in it.addresses:
                    assert view.holder(address) == ("node", it._name), (it, address)

    async with running(first), trio.open_nursery() as nursery:
        for what, number, seconds in schedule:
            if what in ("start", "ephemeral") and number not in agents:
                nursery.start_soon(agent, number, what == "ephemeral")
            elif what == "sleep":
                pass
            elif number in agents:
                it, client, scope = agents[number]
                if what == "cut":
                    client.cut()
                elif what == "mend":
                    client.mend()
                elif what in ("crash", "leave"):
                    if what == "leave" and client.connected and it.healthy:
                        await it.forget()
                    scope.cancel()
                    del agents[number]
            await trio.sleep(seconds)
            look()
        for _, client, _ in agents.values():
            client.mend()
        await trio.sleep(1000)
        look()
        living = [it.addresses for it, _, _ in agents.values() if it.healthy]
        assert len({address for addresses in living for address in addresses}) == len(living)
        nursery.cancel_scope.cancel()
