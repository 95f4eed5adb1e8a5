"""Many at once: agents that start, move, vanish and return together, and one that cannot make up its mind.

The bounds are two to three times what was measured, per host; a storm would be ten times that, or would not end.
"""

from __future__ import annotations

import io

import pytest
import trio
from attrs import evolve
from crowd import KEYS, PER_SITE, SITES, Account, Crowd, CrowdHost, crowd, log, most  # noqa: F401

from helpers import eventually

pytestmark = [pytest.mark.autojump, pytest.mark.deadline(20_000)]


def bounded(done: dict[str, Account], bounds: Account) -> None:
    """No host has done more than `bounds` of anything."""
    for name, account in done.items():
        over = bounds - account
        worst = min(over.etcd_writes, over.etcd_calls, over.snapshots, over.kernel_writes, over.lines)
        assert worst >= 0, f"{name}: {account}, more than {bounds}"


async def test_hosts_that_join_and_start_again_together(log: io.StringIO) -> None:  # noqa: F811
    async with crowd(log) as it:
        # Nobody knows anybody, and all claim addresses at one moment.
        bounded(it.accounts(), Account(etcd_writes=20, etcd_calls=80, snapshots=20, kernel_writes=240, lines=20))
        leaders = it.leaders()
        assert sorted(leaders.values()) == [PER_SITE] * SITES
        async with it.counting() as done:
            await trio.sleep(90)
        bounded(done, Account(etcd_calls=90, snapshots=4))
        # Within the lease's time: each says once that it is back.
        async with it.counting() as done:
            for host in it.hosts.values():
                await host.kill()
            for host in it.hosts.values():
                host.start()
            await it.at_rest()
        bounded(done, Account(etcd_writes=3, etcd_calls=80, snapshots=20, kernel_writes=60, lines=20))
        assert it.leaders() == leaders
        # After it.
        async with it.counting() as done:
            for host in it.hosts.values():
                await host.kill()
            await trio.sleep(60)
            for host in it.hosts.values():
                host.start()
            await it.at_rest()
        bounded(done, Account(etcd_writes=15, etcd_calls=90, snapshots=15, kernel_writes=80, lines=25))


async def test_a_label_for_each_host_within_a_second(log: io.StringIO) -> None:  # noqa: F811
    async with crowd(log) as it:
        names = list(it.hosts)
        async with it.counting() as done:
            for number, name in enumerate(names):
                it.etcd.put(KEYS.location(name), "abcde"[number % SITES])
                await trio.sleep(0.02)
            await it.at_rest()
        bounded(done, Account(etcd_writes=60, etcd_calls=120, snapshots=160, kernel_writes=800, lines=45))
        # All of it in one moment is one change.
        async with it.counting() as done:
            for name in names:
                it.etcd.put(KEYS.location(name), name[0])
            await it.at_rest()
        bounded(done, Account(etcd_writes=15, etcd_calls=60, snapshots=15, kernel_writes=320, lines=25))


async def test_a_host_that_joins_and_leaves_every_two_seconds(log: io.StringIO) -> None:  # noqa: F811
    """It leaves for good each time: the operator forgets it, so that every other host has a peer less."""
    rounds = 4 * PER_SITE
    async with crowd(log, sites=4, per_site=2) as it:
        async with it.counting() as done:
            for _ in range(rounds):
                host = CrowdHost(it, "e-99", {})
                it.etcd.put(KEYS.location("e-99"), "e")
                host.start()
                await trio.sleep(1)
                await host.kill()
                it.etcd.delete(KEYS.node("e-99"))
                await trio.sleep(1)
            await it.at_rest()
        # What each comes to costs what it must, and the log says the first ones, one every ten seconds, and the last.
        bounded(
            done, Account(etcd_writes=4 * rounds, etcd_calls=8 * rounds, snapshots=6 * rounds,
                          kernel_writes=8 * rounds, lines=30)
        )  # fmt: skip
        said = [line for line in log.getvalue().splitlines() if "applied" in line and "node=a-1 " in line]
        assert "left_out_before=" in said[-1]
        left_out = sum(int(line.partition("left_out_before=")[2] or 0) for line in said)
        assert left_out + len(said) >= 2 * rounds - 2


async def test_a_whole_site_lost_and_back(log: io.StringIO) -> None:  # noqa: F811
    async with crowd(log, per_site=min(4, PER_SITE)) as it:
        site = [host for name, host in it.hosts.items() if name.startswith("a-")]
        # From etcd alone: the site goes on by the leader that both sides knew.
        leaders = it.leaders()
        async with it.counting() as done:
            for host in site:
                host.client.cut()
            await trio.sleep(120)
            assert it.leaders() == leaders
            for host in site:
                host.client.mend()
            await it.at_rest()
        bounded(done, Account(etcd_writes=15, etcd_calls=1200, snapshots=40, kernel_writes=80, lines=20))
        assert it.leaders() == leaders, "who led goes on leading"
        # All of it.
        async with it.counting() as done:
            for host in site:
                await host.kill()
                host.machine.observed = type(host.machine.observed)()
            await trio.sleep(120)
            for host in site:
                host.start()
            await it.at_rest()
        bounded(done, Account(etcd_writes=15, etcd_calls=600, snapshots=40, kernel_writes=120, lines=25))


async def _spread(it: Crowd) -> bool:
    """Whether the hosts come back at different moments after an outage of a minute; each within ten seconds."""
    moments: set[tuple[str, float]] = set()
    for host in it.hosts.values():
        host.client.calls.clear()
    it.etcd.down()
    await trio.sleep(60)
    it.etcd.up()
    start = trio.current_time()

    def back() -> bool:
        moments.update((name, trio.current_time() - start) for name, host in it.hosts.items() if host.settled)
        return all(host.settled for host in it.hosts.values())

    await eventually(back, 30, every=0.05)
    first: dict[str, float] = {}
    for name, moment in sorted(moments, key=lambda one: one[1]):
        first.setdefault(name, moment)
    assert max(first.values()) < 10
    return len({round(moment, 2) for moment in first.values()}) > 1


async def test_a_long_time_without_etcd(log: io.StringIO) -> None:  # noqa: F811
    """An hour in `make test`."""
    away = 360 * PER_SITE
    async with crowd(log, sites=2, per_site=1) as it:
        held = {name: host.machine.observed for name, host in it.hosts.items()}
        leaders = it.leaders()
        async with it.counting() as done:
            it.etcd.down()
            await trio.sleep(away)
            # Nothing has changed but the time of the reading.
            for name, host in it.hosts.items():
                assert evolve(host.machine.observed, time=0.0) == evolve(held[name], time=0.0)
            it.etcd.up()
            await it.at_rest()
        # Five calls a second at most, two of them for each of two long leases, all of which fail; one line that it is
        # away, and one that it is back.
        bounded(done, Account(etcd_writes=2, etcd_calls=5 * away, snapshots=5 + away // 30, kernel_writes=0, lines=3))
        assert it.leaders() == leaders
        # The moments at which they come back are spread, not one; those of a few hosts may meet by chance, once.
        assert any([await _spread(it) for _ in range(4)])
